"""The `dpn-jax` command: results go to stdout, everything else to stderr; an error is one line, never a traceback."""

import _thread
import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence

import flax
import jax
import tyro

import dpn_jax
from dpn_jax.cli.cache import keep_compiled
from dpn_jax.cli.classify import Classify
from dpn_jax.cli.convert import Convert
from dpn_jax.cli.evaluate import Evaluate
from dpn_jax.cli.export import Export
from dpn_jax.cli.finetune import Finetune, finetune_command
from dpn_jax.cli.models import Models
from dpn_jax.cli.output import DONE, INTERRUPTED, NOTHING_DONE, SOME_FAILED, note
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
      arguments: the words after `dpn-jax`; defaults to those of this process, which then also keeps compiled programs
        for its next run and freed memory for its next call.

    Returns:
      The exit code: 0 done; 1 some inputs failed and the rest were done; 2 nothing could be done; 130 Ctrl-C;
      143 SIGTERM.
    """

    def run() -> int:
        words = sys.argv[1:] if arguments is None else list(arguments)
        if words == ["--version"]:
            print(f"dpn_jax {dpn_jax.__version__} (jax {jax.__version__}, flax {flax.__version__})")
            return DONE
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS | {"finetune": finetune_command(words)},
            prog="dpn-jax",
            description="Dual Path Networks in JAX; `dpn-jax --version` prints the versions.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        if arguments is None:
            keep_compiled()
            keep_freed_memory()
        return command.run()

    return guarded(run)


def guarded(command: Callable[[], int]) -> int:
    """Calls `command` and turns an error into one line on stderr and an exit code.

    Args:
      command: returns an exit code.

    Returns:
      The exit code, as `main`.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow warns about odd files that it reads correctly
    logging.basicConfig(format="dpn-jax: %(message)s", level=logging.WARNING)
    with contextlib.suppress(AttributeError):  # stdout may have been replaced by another object
        sys.stdout.reconfigure(errors="surrogateescape")  # prints file names that are not UTF-8 as their bytes
    hook = sys.unraisablehook
    ours = sys.unraisablehook = lambda lost: interrupt_again(lost) or hook(lost)
    try:
        code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the pipe has exited, as in `dpn-jax ... | head`
        abandon_stdout()
        return SOME_FAILED
    except OSError as error:
        abandon_stdout()
        note(f"{error.filename or 'output'}: {reason(error)}")
        return NOTHING_DONE
    except ValueError as error:  # includes the package's own exceptions
        note(str(error).split("\n")[0])
        return NOTHING_DONE
    finally:
        if sys.unraisablehook is ours:  # a failed checkpoint leaves another one behind, on purpose
            sys.unraisablehook = hook


def interrupt_again(lost: "sys.UnraisableHookArgs") -> bool:
    """Repeats a Ctrl-C that Python dropped because it came during a destructor or JAX's garbage collection callback.

    Args:
      lost: the argument of `sys.unraisablehook`.

    Returns:
      Whether it was a Ctrl-C.
    """
    interrupted = issubclass(lost.exc_type, KeyboardInterrupt)
    if interrupted:
        threading.Timer(0.01, _thread.interrupt_main).start()  # after the destructor or callback has returned
    return interrupted


def abandon_stdout() -> None:
    """Keeps the interpreter from failing again when it flushes stdout at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
