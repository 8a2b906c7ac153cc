"""Local paths and URLs: what is read from a bucket, through `etils.epath` and gcsfs, and what must be a local file.

The path of a URL is an `epath.Path`, which has the methods of `pathlib.Path`, but is none: what differs is in this
module. Nothing is imported for local paths.
"""

import atexit
import contextlib
import errno
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from dpn_jax.errors import reason, shown

_BUCKET = "gs"
"""The scheme that can be read."""


def is_url(path: str | os.PathLike) -> bool:
    """Whether a name is a URL, such as 's3://bucket/run', `Path("gs://bucket/run")` or an `epath.Path` of one.

    Example:
      >>> is_url("gs://bucket/run"), is_url("run"), is_url("C:/run")
      (True, False, False)
    """
    # a Path has one slash left; a drive of Windows has one letter
    slashes = ":/" if isinstance(path, os.PathLike) else "://"
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+" + slashes, os.fsdecode(path)))


def local_path(path: str | os.PathLike, *, error: type[ValueError] = ValueError) -> Path:
    """The path of a file or folder on this machine; a bucket's would become a folder named `s3:`.

    Args:
      path: what a user named.
      error: the exception to raise.

    Raises:
      ValueError, or `error`: it is a URL.

    Example:
      >>> local_path("s3://bucket/run")
      Traceback (most recent call last):
      ValueError: s3://bucket/run: a URL; only local files can be read and written: copy it from or to a local path
    """
    if is_url(path):
        raise error(f"{shown(path)}: a URL; only local files can be read and written: copy it from or to a local path")
    return Path(path)


def readable_path(path: str | os.PathLike, *, error: type[ValueError] = ValueError) -> Path:
    """The path of a file or folder that can be read, on this machine or in a bucket.

    Args:
      path: what a user named.
      error: the exception to raise.

    Returns:
      A local path, or the `epath.Path` of a URL 'gs://bucket/...'.

    Raises:
      ValueError, or `error`: it is a URL of another kind, or what reads them is not installed.

    Example:
      >>> readable_path("photos")
      PosixPath('photos')
      >>> readable_path("s3://bucket/photos")
      Traceback (most recent call last):
      ValueError: s3://bucket/photos: a URL; only local files and gs:// can be read: copy it to a local path
    """
    if not is_url(path):
        return Path(os.fsdecode(path))
    scheme, _, name = os.fsdecode(path).partition(":")
    if scheme != _BUCKET:
        raise error(f"{shown(path)}: a URL; only local files and {_BUCKET}:// can be read: copy it to a local path")
    if not (importlib.util.find_spec("etils") and importlib.util.find_spec("gcsfs")):
        raise error(f'{shown(path)}: a URL, which gcsfs reads: pip install "dpn-jax[gcs]"')
    # else gcsfs asks of what kind a bucket is, and says at each access where nobody is logged in that it cannot
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    from etils import epath

    return epath.Path(f"{_BUCKET}://{name.lstrip('/')}")


def absolute(path: Path) -> Path:
    """The absolute path; a URL is one.

    Example:
      >>> absolute(Path("run")).is_absolute()
      True
    """
    return path.absolute() if isinstance(path, Path) else path


def kind(path: Path) -> Literal["folder", "file"] | None:
    """What is at a path, if anything.

    Raises:
      OSError: that cannot be found out.

    Example:
      >>> kind(Path(__file__)), kind(Path("no-such-file"))
      ('file', None)
    """
    if isinstance(path, Path):
        return "folder" if path.is_dir() else "file" if path.exists() else None
    with contextlib.suppress(FileNotFoundError), _os_errors(path):
        return "folder" if path.stat().is_directory else "file"
    return None


def size(path: Path) -> int:
    """Bytes of a file.

    Raises:
      OSError: there is none, or it cannot be found out.

    Example:
      >>> size(Path(__file__)) > 1000
      True
    """
    if isinstance(path, Path):
        return path.stat().st_size
    with _os_errors(path):
        forget(path)
        return path.stat().length


def forget(path: Path) -> None:
    """Makes gcsfs list a bucket again, of which it keeps what it has listed once; does nothing for a local path.

    Example:
      >>> forget(Path("photos"))
    """
    if not isinstance(path, Path):
        from etils.epath import backend

        with contextlib.suppress(Exception):  # what fails here fails at the next access too, which says so
            backend.fsspec_backend.fs(path).invalidate_cache()


def holds(folder: Path, names: Collection[str]) -> bool:
    """Whether a folder has files of all these names.

    Raises:
      OSError: it cannot be listed.

    Example:
      >>> holds(Path(__file__).parent, ["paths.py", "errors.py"])
      True
    """
    if isinstance(folder, Path):
        return all((folder / name).is_file() for name in names)
    return {*names} <= {name for name, is_folder in entries(folder) if not is_folder}


def entries(folder: Path) -> Iterator[tuple[str, bool]]:
    """The names in a folder, and whether each is a folder; those of a bucket in one request, once until `forget`.

    Raises:
      OSError: it cannot be listed.

    Example:
      >>> ("paths.py", False) in entries(Path(__file__).parent)
      True
    """
    if isinstance(folder, Path):
        with os.scandir(folder) as found:
            yield from ((entry.name, entry.is_dir()) for entry in found)
        return

    def refuse(error: Exception) -> None:
        raise error

    with _os_errors(folder):
        _, folders, files = next(folder.walk(on_error=refuse))
    yield from ((name, True) for name in folders)
    yield from ((name, False) for name in files if name)  # one without a name stands for an empty folder


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file, open for reading bytes.

    Raises:
      OSError: it cannot be opened or read.

    Example:
      >>> with opened(Path(__file__)) as file:
      ...     len(file.read(3))
      3
    """
    if isinstance(path, Path):
        with path.open("rb") as file:
            yield file
    else:
        with _os_errors(path), path.open("rb") as file:
            yield file


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
      OSError: it cannot be read.

    Example:
      >>> len(read_bytes(Path(__file__))) == size(Path(__file__))
      True
    """
    forget(path)  # and with it the size that the file had
    with opened(path) as file:
        return file.read()


def local_copy(
    path: str | os.PathLike, *, error: type[ValueError] = ValueError, files: Callable[[list[str]], list[str]] = list
) -> Path:
    """The local path of what a user named; a URL's file or folder is copied, until this process ends.

    Args:
      path: what a user named.
      error: the exception to raise.
      files: of the names in a folder of a bucket, those that are copied; folders in it never are.

    Raises:
      ValueError, or `error`: as `readable_path`, or it cannot be copied.

    Example:
      >>> local_copy("run")
      PosixPath('run')
    """
    source = readable_path(path, error=error)
    if isinstance(source, Path):
        return source
    try:
        forget(source)
        found = kind(source)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        folder = tempfile.mkdtemp(prefix="dpn_jax-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        copy = Path(folder, *source.parts[1:])  # messages then show where it comes from
        if found == "file":
            _copy(source, copy)
        else:
            for name in files([name for name, is_folder in entries(source) if not is_folder]):
                _copy(source / name, copy / name)
            copy.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise error(f"{shown(source)}: {reason(failure)}") from failure
    return copy


def _copy(source: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    with opened(source) as remote, copy.open("wb") as file:
        shutil.copyfileobj(remote, file, 2**24)


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Whatever the layers below a URL raise, as an OSError."""
    try:
        yield
    except FileNotFoundError as error:  # its message is the name
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path)) from error
    except OSError:
        raise
    except Exception as error:
        raise OSError(reason(error)) from error
