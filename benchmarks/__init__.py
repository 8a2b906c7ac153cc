"""Measurements; each module is one command that prints what it ran on."""
