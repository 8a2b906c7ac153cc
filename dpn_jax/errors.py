"""Every exception of the package; how a reason and a path are printed on one line."""

import errno
import os

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system says that has no locks; what is written there goes without."""
_SYSTEM_ERRORS = ("No space left on device", "File too large", "Disk quota exceeded", "Permission denied")
_MOST = 200  # characters of a name or a reason


def reason(error: BaseException) -> str:
    r"""Why something failed, in one printable line of at most 200 characters.

    Example:
      >>> reason(FileNotFoundError(2, "No such file or directory", "photo.jpg"))
      'No such file or directory'
      >>> reason(RuntimeError("write failed:\n  OS error 28: No space left on device [...]"))
      'No space left on device'
    """
    if isinstance(error, OSError) and error.strerror:
        return shown(error.strerror)
    text = " ".join(str(error).split())
    line = next((phrase for phrase in _SYSTEM_ERRORS if phrase in text), text)  # libraries wrap system errors
    return shown(line) if line else type(error).__name__


def shown(path: str | bytes | os.PathLike) -> str:
    r"""How a message prints a path or a name: on one line, printable, at most 200 characters.

    Example:
      >>> shown("photo.jpg"), shown("new\nline.jpg")
      ('photo.jpg', "'new\\nline.jpg'")
    """
    return shortened(printable(path), _MOST)


def printable(path: str | bytes | os.PathLike) -> str:
    """How a result prints a path or a name: on one line, printable, whole."""
    name = os.fsdecode(path)
    return name if name.isprintable() else repr(name)


def shortened(text: str, most: int) -> str:
    """Text of at most `most` characters, with an ellipsis in the middle where it was longer.

    Example:
      >>> shortened("photographs/of/cats/tabby.jpg", 20)
      'photograp...abby.jpg'
    """
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[: most - 3 - half]}...{text[len(text) - half :]}"


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit; the first line of the message says why and what to do.

    Attributes:
      missing, unknown, misshaped: names of the tensors at fault, sorted; empty if the reason is another.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unknown: tuple[str, ...] = (),
        misshaped: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.missing = missing
        self.unknown = unknown
        self.misshaped = misshaped


class ImageError(ValueError):
    """An image or a folder of images cannot be read; the message is one printable line that names it."""


class PackError(ValueError):
    """Images cannot be packed; the message is one line that names the folder or the file."""


class ExportError(ValueError):
    """A model cannot be exported, or an exported model not read; the message is one line that names the file."""


class DataError(ValueError):
    """A folder or an image cannot be trained on; the message is one line that names it."""


class RunError(ValueError):
    """A run, of fine-tuning or in several processes, cannot go on; the message is one line: why, and what to do."""


class ProcessLostError(RunError):
    """Another process of the run has ended; this one can only end too."""


class DivergedError(RunError):
    """The loss, the gradient or a parameter is no longer finite."""
