"""Runs a script as the `dpn-jax` command runs: an error is one line, never a traceback."""

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
        return tyro.cli(main, args=words, config=(tyro.conf.FlagCreatePairsOff,)) or 0

    return guarded(call, arguments)
