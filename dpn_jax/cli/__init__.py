"""The commands of `dpn-jax`, one module each: a dataclass of options with `run() -> exit code`."""
