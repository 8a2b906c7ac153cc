"""The `dpn-jax` command. Results go to stdout, everything else to stderr; an error is one line, never a traceback."""

import _thread
import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence

import tyro

from dpn_jax.cli.cache import keep_compiled
from dpn_jax.cli.classify import Classify
from dpn_jax.cli.convert import Convert
from dpn_jax.cli.evaluate import Evaluate
from dpn_jax.cli.export import Export
from dpn_jax.cli.finetune import Finetune
from dpn_jax.cli.models import Models
from dpn_jax.cli.output import INTERRUPTED, NOTHING_DONE, SOME_FAILED, note
from dpn_jax.errors import reason
from dpn_jax.fast.memory import keep_freed_memory

COMMANDS = {
    "classify": Classify,
    "evaluate": Evaluate,
    "finetune": Finetune,
    "convert": Convert,
    "export": Export,
    "models": Models,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: the words after `dpn-jax`; those of this process when left out, which is then the command's own: what
        JAX compiles is kept for its next run, and memory for its next call.

    Returns:
      The exit code: 0 done; 1 some inputs failed and the rest were done; 2 nothing could be done; 130 Ctrl-C.
    """

    def run() -> int:
        command = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="dpn-jax", args=arguments)
        if arguments is None:
            keep_compiled()
            keep_freed_memory()
        return command.run()

    return guarded(run)


def guarded(command: Callable[[], int]) -> int:
    """Calls `command`; what goes wrong becomes one line on stderr and an exit code.

    Args:
      command: returns an exit code.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd files that are read all the same
    logging.basicConfig(format="dpn-jax: %(message)s", level=logging.WARNING)
    with contextlib.suppress(AttributeError):  # a replaced stdout
        sys.stdout.reconfigure(errors="surrogateescape")  # file names come out as the bytes that they are
    hook = sys.unraisablehook
    ours = sys.unraisablehook = lambda lost: interrupt_again(lost) or hook(lost)
    try:
        code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader has gone, as `| head` does: nobody is left to tell
        abandon_stdout()
        return SOME_FAILED
    except OSError as error:
        abandon_stdout()
        note(f"{error.filename or 'output'}: {reason(error)}")
        return NOTHING_DONE
    except ValueError as error:  # CheckpointError and ImageError are too
        note(str(error).split("\n")[0])
        return NOTHING_DONE
    finally:
        if sys.unraisablehook is ours:  # a failed checkpoint leaves another one behind, on purpose
            sys.unraisablehook = hook


def interrupt_again(lost: "sys.UnraisableHookArgs") -> bool:
    """Sends a Ctrl-C again that Python has dropped, as it came while a destructor or JAX's hook of the garbage
    collector ran, which nothing can be raised from.

    Args:
      lost: what `sys.unraisablehook` is told.

    Returns:
      Whether it was one.
    """
    was_one = issubclass(lost.exc_type, KeyboardInterrupt)
    if was_one:
        threading.Timer(0.01, _thread.interrupt_main).start()  # once that code is left
    return was_one


def abandon_stdout() -> None:
    """Keeps the interpreter from failing once more when it flushes stdout at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
