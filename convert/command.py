"""Runs a script as the `dpn-jax` command runs: an error is one line, never a traceback."""

import sys
from collections.abc import Callable, Sequence

import tyro

from dpn_jax.cli.main import guarded


def run(main: Callable[..., int | None], arguments: Sequence[str] | None = None) -> int:
    """Runs a script's `main` with the words of a command line.

    Args:
      main: the typed function; its docstring is the help text.
      arguments: the words; defaults to those of this process.

    Returns:
      The exit code, as `dpn_jax.cli.main.main`.
    """

    def call(words: list[str]) -> int:
        run_as = getattr(sys.modules["__main__"], "__spec__", None)  # argv[0] of `python -m` is a path
        prog = f"python -m {run_as.name}" if run_as else None
        return tyro.cli(main, prog=prog, args=words, config=(tyro.conf.FlagCreatePairsOff,)) or 0

    return guarded(call, arguments)
