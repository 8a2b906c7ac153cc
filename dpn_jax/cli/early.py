"""Ctrl-C in the first seconds of the command, while JAX is imported: it ends at once, without a traceback.

Imported first by `dpn_jax` itself, since no code of the command runs before that.
"""

import os
import signal
import sys
from pathlib import Path

_is_module = sys.argv[:1] == ["-m"] and "dpn_jax" in sys.orig_argv
_is_command = _is_module or [Path(program).stem for program in sys.argv[:1]] == ["dpn-jax"]


def restore() -> None:
    """Gives Ctrl-C back its meaning, once everything is imported."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, _: object) -> None:
    os._exit(128 + number)


if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
