"""A run's folder: what the run depends on (`config.json`), its images (`images.json`), who trains in it (`.lock`)."""

import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from dpn_jax.config import DPNConfig
from dpn_jax.errors import NO_LOCKS, RunError, reason, shortened, shown
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.images.splits import ImageFolder
from dpn_jax.paths import readable_path
from dpn_jax.pretrained import Preprocessing

RECORD = "config.json"
IMAGES = "images.json"
LOCK = ".lock"

_FREE = frozenset(
    {"epochs", "workers", "keep", "checkpoint_every", "skip_broken", "skip_check", "remat", "patience", "report"}
)
"""Options that may differ when a run is resumed."""
_MOST_MISSING = 0.1
"""The largest fraction of a run's images that may be gone: beyond it, the folder is another one."""
_VERSIONS = ("dpn-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


@dataclasses.dataclass(frozen=True)
class Instance:
    """What is known of a model that a run was given itself."""

    digest: str
    """SHA-256 of its initial values."""
    changes: dict[str, str]
    """How it differs from a stock one, see `dpn_jax.stock.changes`."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run depends on, besides its images."""

    config: FinetuneConfig
    folder: str
    """The images' folder, absolute."""
    start: dict[str, str | None]
    """`source`, `model` and `revision` of the initial weights as they were given; no source for an architecture."""
    source: str
    """The tag, hub id or file of the initial weights, or the variant if they are random."""
    architecture: DPNConfig
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    instance: Instance | None = None
    """Of a run that started from a model instance: its values are not in the folder before the first checkpoint."""

    @classmethod
    def from_json(cls, output: Path, fields: Mapping[str, Any]) -> Self:
        """The record as it was written.

        Raises:
          RunError: it is damaged, or of another version of this package.
        """
        try:
            return cls(
                config=config_from_json(fields["config"]),
                folder=fields["folder"],
                start=fields["start"],
                source=fields["source"],
                architecture=DPNConfig(**{name: _as_tuple(value) for name, value in fields["architecture"].items()}),
                preprocessing=Preprocessing(
                    **{name: _as_tuple(value) for name, value in fields["preprocessing"].items()}
                ),
                class_names=tuple(fields["class_names"]),
                instance=Instance(**fields["instance"]) if fields.get("instance") else None,
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = "damaged, or written by another version of dpn_jax"
            raise RunError(
                f"{shown(output / RECORD)}: {what} ({reason(error)}); start again with another --output"
            ) from error

    def continued(
        self, output: Path, config: FinetuneConfig | None, start: Mapping[str, str | None], note: Callable[[str], None]
    ) -> FinetuneConfig:
        """The options of a run that is resumed.

        Args:
          output: the run's folder, for messages.
          config: the options that are asked for; defaults to the run's.
          start: `source`, `model` and `revision` that are asked for, where they are.
          note: called with a line for each option that differs and may.

        Raises:
          RunError: what is asked for would give another result; the message names each difference.
        """
        given = {name: value for name, value in start.items() if value is not None}
        old = dataclasses.asdict(self.config) | self.start
        new = dataclasses.asdict(config or self.config) | given
        different = [name for name in new if new[name] != old[name]]
        if fixed := [name for name in different if name not in _FREE]:
            values = "; ".join(f"{name} was {_short(old[name])}, now {_short(new[name])}" for name in fixed)
            raise RunError(f"{shown(output)}: cannot be resumed with other options: {values}")
        for name in different:
            note(f"{name} was {_short(old[name])} and is {_short(new[name])} from here")
        return config or self.config


def config_from_json(fields: Mapping[str, Any]) -> FinetuneConfig:
    """The options of a run, from `dataclasses.asdict` through JSON."""
    return FinetuneConfig(**{name: _as_tuple(value) for name, value in fields.items()})


@contextlib.contextmanager
def opened(output: Path, *, resume: bool) -> Iterator[None]:
    """Keeps other processes out of a run's folder; the system releases the lock of a process that dies.

    Args:
      output: the folder; created for a new run, and removed again if no run has been started in it.
      resume: whether there is a run in it.

    Raises:
      RunError: another process holds the lock, a new run's folder is not empty, or there is no run to resume.
    """
    import filelock

    if resume:
        read_record(output)  # raises where there is none
    has_run = (output / RECORD).exists()
    lock = filelock.FileLock(output / LOCK)
    created = not output.exists()
    try:
        if not resume and (has_run or not (created or output.is_dir())):
            hint = "continue it with --resume (resume=True), or " if has_run else ""
            raise RunError(f"{shown(output)}: already exists; {hint}choose another --output")
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise RunError(f"{shown(output)}: another process is training in it; wait for its end, or stop it") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise RunError(f"{shown(output)}: cannot be created ({reason(error)})") from error
    try:
        if not resume and any(entry.name != LOCK for entry in output.iterdir()):
            raise RunError(f"{shown(output)}: already exists; choose another --output")
        yield
    finally:
        lock.release()
        if not (output / RECORD).exists():
            with contextlib.suppress(OSError):
                (output / LOCK).unlink()
                if created:
                    output.rmdir()


def write_record(output: Path, record: Record) -> None:
    """Writes `config.json`.

    Raises:
      RunError: it cannot be written.
    """
    _write(output / RECORD, dataclasses.asdict(record) | {"versions": _versions()})


def read_record(output: Path) -> dict[str, Any]:
    """Reads `config.json`, as JSON.

    Raises:
      RunError: there is none, or it is damaged.
    """
    return _read(output / RECORD, f"{shown(output)}: no run to resume (no {RECORD} in it); drop --resume to start one")


def name_in(root: Path, file: str) -> str:
    """How a run names an image, wherever its folder is.

    Example:
      >>> name_in(Path("/photos"), "/photos/train/cat/1.jpg")
      'train/cat/1.jpg'
    """
    return readable_path(file).relative_to(root).as_posix()


def write_images(output: Path, root: Path, splits: Mapping[str, ImageFolder], broken: Mapping[str, str]) -> None:
    """Writes `images.json`: the run's images by split and class, so that a resumed run sees the same ones.

    Args:
      output: the run's folder.
      root: the images' folder, absolute.
      splits: the images.
      broken: the reason for each file that is left out because it cannot be read.

    Raises:
      RunError: it cannot be written.
    """
    listed: dict[str, Any] = {"broken": {name_in(root, file): why for file, why in broken.items()}}
    for split, folder in splits.items():
        classes = listed[split] = {name: [] for name in folder.class_names}
        for file, label in zip(folder.files, folder.labels, strict=True):
            classes[folder.class_names[label]].append(name_in(root, file))
    _write(output / IMAGES, listed)


def read_images(output: Path) -> dict[str, Any]:
    """Reads `images.json`, as JSON.

    Raises:
      RunError: there is none, or it is damaged.
    """
    return _read(output / IMAGES, f"{shown(output)}: no {IMAGES} in it; start again with another --output")


def find_images(
    listed: Mapping[str, Any], root: Path, present: set[str], note: Callable[[str], None]
) -> dict[str, ImageFolder]:
    """A run's images in their order. Those that are gone are skipped; new ones are not used, which keeps the result.

    Args:
      listed: from `read_images`.
      root: the images' folder, absolute.
      present: the files that are there now.
      note: called with a line that says what has changed.

    Raises:
      RunError: too many are gone.
    """
    found, known = {}, {str(root / file) for file in listed["broken"]}
    for split in ("train", "val"):
        classes = listed[split]
        pairs = [(str(root / file), label) for label, files in enumerate(classes.values()) for file in files]
        files, labels = zip(*pairs, strict=True)
        gone = [index for index, file in enumerate(files) if file not in present]
        if gone:
            some = f"{_count(len(gone), split)} fewer than the run has, such as {shown(files[gone[0]])}"
            if len(gone) > _MOST_MISSING * len(files):
                raise RunError(f"{shown(root)}: {some}; name the run's own images")
            note(f"{some}: {'the next ones take their places' if split == 'train' else 'done without'}")
        known.update(files)
        found[split] = ImageFolder(tuple(classes), files, labels, skipped=frozenset(gone))
    if more := sorted(present - known):
        note(f"{_count(len(more))} more than the run has, such as {shown(more[0])}: not used")
    return found


def _count(number: int, split: str = "") -> str:
    kind = {"train": "training ", "val": "validation "}.get(split, "")
    return f"one {kind}image" if number == 1 else f"{number} {kind}images"


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _short(value: object) -> str:
    return shortened(json.dumps(value), 200)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{shown(path)}: cannot be written ({reason(error)})") from error


def _read(path: Path, if_missing: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RunError(if_missing) from None
    except OSError as error:
        raise RunError(f"{shown(path)}: cannot be read ({reason(error)})") from error
    except ValueError as error:
        raise RunError(f"{shown(path)}: damaged ({reason(error)}); start again with another --output") from error


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            from dpn_jax import __version__

            found[name] = __version__ if name == "dpn-jax" else "unknown"
    return found
