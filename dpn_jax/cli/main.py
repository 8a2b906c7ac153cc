"""The `dpn-jax` command: results go to stdout, everything else to stderr; an error is one line, never a traceback."""

import _thread
import codecs
import contextlib
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence

import flax
import jax

import dpn_jax
from dpn_jax.cli import early
from dpn_jax.cli.cache import keep_compiled
from dpn_jax.cli.output import DONE, INTERRUPTED, NOTHING_DONE, SOME_FAILED, note
from dpn_jax.cli.words import parse
from dpn_jax.errors import ProcessLostError, reason, shortened, shown
from dpn_jax.fast.memory import keep_freed_memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: the words after `dpn-jax`; defaults to those of this process, which then also keeps compiled programs
        for its next run and freed memory for its next call.

    Returns:
      The exit code: 0 done; 1 some inputs failed and the rest were done; 2 nothing could be done; 130 Ctrl-C;
      143 SIGTERM.
    """

    def run(words: list[str]) -> int:
        if words == ["--version"]:
            print(f"dpn_jax {dpn_jax.__version__} (jax {jax.__version__}, flax {flax.__version__})")
            return DONE
        command = parse(words)
        if arguments is None:
            keep_compiled()
            keep_freed_memory()
        return command.run()

    early.restore()
    return guarded(run, arguments)


def guarded(command: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Calls `command` and turns an error into one line on stderr and an exit code.

    Args:
      command: from the words to an exit code.
      arguments: the words; defaults to those of this process. `--traceback`, anywhere among them, is left out and has
        the whole traceback of an error printed before its line.

    Returns:
      The exit code, as `main`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    in_full = "--traceback" in words
    warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow warns about odd files that it reads correctly
    logging.basicConfig(format="dpn-jax: %(message)s", level=logging.WARNING)
    codecs.register_error("dpn-jax", printed_instead)
    with contextlib.suppress(AttributeError):  # stdout may have been replaced by another object
        sys.stdout.reconfigure(errors="dpn-jax")
    hook = sys.unraisablehook
    ours = sys.unraisablehook = lambda lost: interrupt_again(lost) or hook(lost)
    try:
        if sys.stdout is None:
            raise ValueError("standard output is closed; send it to a file, or to /dev/null")
        code = command([word for word in words if word != "--traceback"])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the pipe has exited, as in `dpn-jax ... | head`
        abandon_stdout()
        return SOME_FAILED
    except Exception as error:
        if isinstance(error, OSError):
            abandon_stdout()
        if in_full:
            traceback.print_exc()
        note(shortened(in_one_line(error), 1000))
        if isinstance(error, ProcessLostError):
            sys.stdout.flush()
            os._exit(NOTHING_DONE)  # JAX would wait for the other process, and then abort
        return NOTHING_DONE
    finally:
        if sys.unraisablehook is ours:  # a failed checkpoint leaves another one behind, on purpose
            sys.unraisablehook = hook


def in_one_line(error: Exception) -> str:
    """What failed, why, and what to do.

    Example:
      >>> in_one_line(PermissionError(13, "Permission denied", "photos"))
      'photos: Permission denied'
      >>> in_one_line(KeyError("stem"))
      "unexpected KeyError: 'stem'; please report what --traceback prints"
    """
    text = str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return f"out of memory ({reason(error)}); free some, or use a smaller --batch-size or --image-size"
    if isinstance(error, OSError):
        name = error.filename or ("output" if type(error) is OSError else type(error).__name__)
        return f"{shown(name)}: {reason(error)}"
    if "Unable to initialize backend" in text or (isinstance(error, AssertionError) and not has_device()):
        return f"JAX finds no device ({reason(error)}); set JAX_PLATFORMS=cpu to run on the CPU"
    if isinstance(error, ValueError):  # includes the package's own exceptions
        return text.split("\n")[0]
    return f"unexpected {type(error).__name__}: {reason(error)}; please report what --traceback prints"


def has_device() -> bool:
    """Whether JAX has a backend at all; for some platforms that are not there, it fails with a bare assertion."""
    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):
        return False


def printed_instead(error: UnicodeError) -> tuple[str | bytes, int]:
    r"""What is printed of a character that the output's encoding lacks; an error handler for `codecs`.

    Returns:
      A byte of a file name that is not UTF-8 as it is, or else an escape such as `\u2192`; and where to go on.
    """
    error.end = error.start + 1
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


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
