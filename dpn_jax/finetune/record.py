"""`config.json`: what a run was begun with, so that it can only be resumed with the same."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from dpn_jax.config import DPNConfig
from dpn_jax.errors import RunError, reason
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.pretrained import Preprocessing

RECORD = "config.json"
_VERSIONS = ("dpn-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run depends on."""

    config: FinetuneConfig
    source: str
    """The tag, hub id or file that it starts from, or the variant whose weights are drawn."""
    architecture: DPNConfig
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    images: dict[str, Any]
    """Of each split how many there are and a digest of their names, and those that cannot be read."""

    def as_json(self) -> dict[str, Any]:
        """The record as JSON has it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def begin(output: Path, record: Record) -> None:
    """Makes a run's folder.

    Raises:
      RunError: it exists and has something in it, or cannot be made.
    """
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            hint = "go on with it by --resume (resume=True), or " if (output / RECORD).exists() else ""
            raise RunError(f"{output}: exists already; {hint}name another --output")
        output.mkdir(parents=True, exist_ok=True)
        temporary = output / f".{RECORD}.tmp"
        temporary.write_text(json.dumps(record.as_json() | {"versions": _versions()}, indent=1) + "\n", "utf-8")
        temporary.replace(output / RECORD)
    except OSError as error:
        raise RunError(f"{output}: cannot be made ({reason(error)})") from error


def read_record(output: Path) -> dict[str, Any]:
    """The record of a run, as JSON has it.

    Raises:
      RunError: there is none, or it is damaged.
    """
    path = output / RECORD
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RunError(f"{output}: no run to resume (no {RECORD} in it); leave out --resume to begin one") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({reason(error)})") from error
    except ValueError as error:
        raise RunError(f"{path}: damaged ({error}); begin again with another --output") from error


def check_same(output: Path, record: Record) -> None:
    """Compares a run's record with what it is to be resumed with.

    Raises:
      RunError: something differs; the message names it with both values.
    """
    saved, given = read_record(output), record.as_json()
    # other choices can make other images, so they are told first
    for old, new in ((saved.get("config") or {}, given.pop("config")), (saved, given)):
        different = [name for name in new if old.get(name) != new[name]]
        if different:
            values = "; ".join(f"{name} was {_short(old.get(name))}, now {_short(new[name])}" for name in different)
            raise RunError(f"{output}: cannot be resumed with another {', '.join(different)} ({values})")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            from dpn_jax import __version__

            found[name] = __version__ if name == "dpn-jax" else "unknown"
    return found
