"""What the scripts here share with the `dpn-jax` command: one line for an error, never a traceback."""

from collections.abc import Callable, Sequence

import tyro

from dpn_jax.cli.main import guarded


def run(main: Callable[..., int | None], arguments: Sequence[str] | None = None) -> int:
    """Runs a script's `main` with the command line.

    Args:
      main: the typed function; its docstring is the help text.
      arguments: the words of the command line; defaults to this process's.

    Returns:
      The exit code, as `dpn_jax.cli.main.main`.
    """
    return guarded(lambda: tyro.cli(main, args=arguments) or 0)
