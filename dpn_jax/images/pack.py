"""Packs images into ArrayRecord shards, in parallel; goes on where an interrupted pack stopped."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpn_jax.checkpoint.write import write_atomically
from dpn_jax.errors import NO_LOCKS, ImageError, PackError, reason, shown
from dpn_jax.images.packed import is_packed
from dpn_jax.images.read import read_image
from dpn_jax.images.records import MANIFEST, PLAN, Manifest, Record, Shard, array_record
from dpn_jax.images.splits import ImageFolder, list_images
from dpn_jax.images.transform import Transform
from dpn_jax.images.workers import prefetched, refuse_in_starting_worker
from dpn_jax.paths import local_path
from dpn_jax.pretrained import Preprocessing

SHARD_SIZE = 512
"""Images: shards of 50 to 100 MB, of photos as of crops."""
_LOCK = ".lock"
_TEMPORARY = ".tmp"
_DIFFERENCES = {"data": "images", "digest": "images", "crops": "--crops", "shard_size": "--shard-size"}
"""What each part of a plan comes from."""


class Packed(NamedTuple):
    """What has been packed."""

    images: int
    shards: int
    bytes: int
    """Of all shards."""
    broken: tuple[str, ...]
    """The reason for each image that could not be read, a line that names it."""


def pack(
    data: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    crops: Preprocessing | None = None,
    shard_size: int = SHARD_SIZE,
    workers: int = 2,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda shards, total: shards,
) -> Packed:
    """Packs images into shards that are read much faster than files: `PackedImages`.

    A shard has a temporary name until it is whole, and the manifest is written last. Packing again what was interrupted
    keeps the whole shards, after reading them back, and packing again what was finished repairs damaged ones. Images
    that cannot be read are left out and listed in the manifest.

    Args:
      data: class folders, a CSV file or packed photos, as for `list_images`.
      destination: the folder to write, new or empty, or one in which the same images were packed.
      crops: pack crops of uint8, as `Transform(crops).crop` gives them; defaults to the photos' own files.
      shard_size: images in a shard.
      workers: processes that read images and write shards; 0 uses threads instead.
      progress: called with the shards, as they are done, and their number; what it returns is iterated over.

    Returns:
      How many images were packed.

    Raises:
      PackError: `destination` has something else in it, is in use or cannot be written, or no image can be read.
      ImageError: `data` cannot be listed, or array_record is not installed.
      ValueError: `shard_size` or `workers` is out of range, or `crops` has neither 1 nor 3 channels.

    Example:
      >>> pack("no-such-folder", "packed")
      Traceback (most recent call last):
      dpn_jax.errors.ImageError: no-such-folder: no such folder
    """
    refuse_in_starting_worker()
    for name, value, least in (("shard_size", shard_size, 1), ("workers", workers, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    root, folder = local_path(data, error=ImageError), local_path(destination, error=PackError)
    array_record()
    if folder.absolute().is_relative_to(root.absolute()):
        raise PackError(f"{shown(folder)}: lies in DATA, whose folders are classes; choose another DESTINATION")
    images = list_images(root)
    if images.preprocessing:
        raise PackError(f"{shown(root)}: holds crops already; name the folder with the photos")
    names = _names(images, root.parent if root.is_file() else root)
    transform = None if crops is None else Transform(crops)
    plan = {
        "data": str(root.absolute()),
        "digest": _digest(images, names),
        "crops": None if crops is None else dataclasses.asdict(crops),
        "shard_size": shard_size,
    }
    plan = json.loads(json.dumps(plan))  # tuples are lists, as in the one that is read
    with _opened(folder, plan):
        shards, broken = [], {}
        source = _Shards(folder, images, names, transform, shard_size)
        with contextlib.closing(prefetched(source, min(workers, len(source)))) as written:
            for shard, failed in progress(written, len(source)):
                shards += [shard] if shard.names else []
                broken |= failed
        if not shards:
            raise PackError(f"{shown(root)}: no image can be read; {next(iter(broken.values()))}")
        manifest = Manifest(images.class_names, crops, tuple(shards), broken, plan)
        _write(folder / MANIFEST, manifest.to_json())
        (folder / PLAN).unlink(missing_ok=True)
    size = sum(shard.size for shard in shards)
    return Packed(len(images) - len(broken), len(shards), size, tuple(broken.values()))


def _names(images: ImageFolder, root: Path) -> tuple[str, ...]:
    """Each image's path from the data's folder, and never an absolute one."""
    root = root.absolute()
    paths = (Path(file).absolute() for file in images.files)
    return tuple(
        (path.relative_to(root) if path.is_relative_to(root) else path).as_posix().lstrip("/") for path in paths
    )


def _digest(images: ImageFolder, names: Sequence[str]) -> str:
    digest = hashlib.blake2b(repr(images.class_names).encode(), digest_size=16)
    for name, label in zip(names, images.labels, strict=True):
        digest.update(b"%d/%s\0" % (label, os.fsencode(name)))
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(folder: Path, plan: dict[str, Any]) -> Iterator[None]:
    """The destination, with the plan in it and without what an interrupted pack has left.

    Raises:
      PackError: it is in use, has something else in it, or cannot be written.
    """
    import filelock

    try:
        if folder.exists() and not folder.is_dir():
            raise PackError(f"{shown(folder)}: not a folder; choose another DESTINATION")
        if folder.is_dir() and not is_packed(folder) and any(path.name != _LOCK for path in folder.iterdir()):
            raise PackError(f"{shown(folder)}: not empty, and not packed images; choose another DESTINATION")
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(filelock.FileLock(folder / _LOCK).acquire(timeout=0))
            except filelock.Timeout:
                raise PackError(
                    f"{shown(folder)}: another process packs into it; wait for its end, or stop it"
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            _agree(folder, plan)
            stack.callback(_remove_temporary, folder)
            yield
    except OSError as error:
        raise PackError(f"{shown(error.filename or folder)}: cannot be written ({reason(error)})") from error


def _agree(folder: Path, plan: dict[str, Any]) -> None:
    """Writes the plan, or refuses another one."""
    _remove_temporary(folder)
    for name in (PLAN, MANIFEST):
        try:
            before = json.loads((folder / name).read_text("utf-8"))
            before = before if name == PLAN else before["plan"]
            different = [key for key in plan if before[key] != plan[key]]
        except (FileNotFoundError, ValueError, LookupError, TypeError):  # of damaged ones, the shards say what they are
            continue
        if different:
            what = " and ".join(dict.fromkeys(_DIFFERENCES[key] for key in different))
            raise PackError(f"{shown(folder)}: was packed with other {what}; choose another DESTINATION, or remove it")
        return
    _write(folder / PLAN, json.dumps(plan, indent=1))


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, [f"{text}\n".encode()])
    except OSError as error:
        raise PackError(f"{shown(path)}: cannot be written ({reason(error)})") from error


def _remove_temporary(folder: Path) -> None:
    for path in folder.glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class _Shards:
    """The shards by index: to ask for one writes it, unless it is there. The source of the worker processes."""

    folder: Path
    images: ImageFolder
    names: Sequence[str]
    transform: Transform | None
    size: int

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.size)

    def __getitem__(self, number: int) -> tuple[Shard, dict[str, str]]:
        """The shard, and the reason for each of its images that cannot be read."""
        path = self.folder / f"{number:05}-of-{len(self):05}.array_record"
        indices = range(number * self.size, min((number + 1) * self.size, len(self.images)))
        broken: dict[str, str] = {}
        kept = self._kept(path, indices, broken)
        if kept is None:
            kept = self._write(path, indices, broken)
        size = path.stat().st_size if kept else 0
        names, labels = (tuple(column[index] for index in kept) for column in (self.names, self.images.labels))
        return Shard(path.name, size, names, labels), broken

    def _kept(self, path: Path, indices: Sequence[int], broken: dict[str, str]) -> list[int] | None:
        """The images in a whole shard; None if there is none, or it lacks an image that can be read."""
        if not path.exists():
            return None
        try:
            reader = array_record().reader(str(path), options="readahead_buffer_size:0")
            there = [Record.from_bytes(reader.read([number])[0])[:3] for number in range(reader.num_records())]
        except (RuntimeError, ValueError):
            return None
        kept = []
        for index in indices:
            if there[len(kept) : len(kept) + 1] == [(self.images.labels[index], self.names[index], self._size(index))]:
                kept.append(index)
            elif self._record(index, broken):
                return None
        return kept if len(kept) == len(there) else None

    def _write(self, path: Path, indices: Sequence[int], broken: dict[str, str]) -> list[int]:
        """Writes a shard, and returns the images in it.

        Raises:
          PackError: it cannot be written; nothing is left.
        """
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}{_TEMPORARY}")
        kept = []
        try:
            writer = array_record().writer(str(temporary), "group_size:1,uncompressed")
            try:
                for index in indices:
                    if record := self._record(index, broken):
                        writer.write(record.to_bytes())
                        kept.append(index)
            finally:
                writer.close()
            if kept:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                temporary.replace(path)
            else:
                path.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:
            raise PackError(
                f"{shown(path)}: cannot be written ({reason(error)}); run the same command again"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return kept

    def _record(self, index: int, broken: dict[str, str]) -> Record | None:
        """An image as it is packed; None if it cannot be read."""
        try:
            source, label = self.images[index]
            if self.transform is not None:
                image = self.transform.crop(source)
            else:
                read_image(source)  # what cannot be decoded is not packed
                image = source if isinstance(source, bytes) else Path(source).read_bytes()
        except ImageError as error:
            broken[self.names[index]] = str(error)
            return None
        size = len(image) if isinstance(image, bytes) else self._size(index)
        return Record(label, self.names[index], size, image)

    def _size(self, index: int) -> int:
        """Bytes of an image's file; 0 if it is gone."""
        try:
            source, _ = self.images[index]
            return len(source) if isinstance(source, bytes) else Path(source).stat().st_size
        except (OSError, ImageError):
            return 0
