"""Recorded experiments: what was trained, how, and what came of it."""
