"""The files of a run: `config.json` (what it depends on), `metrics.jsonl`, TensorBoard's events, plotted curves."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpn_jax.config import DPNConfig
from dpn_jax.errors import RunError, reason
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.finetune.metrics import Row
from dpn_jax.pretrained import Preprocessing

RECORD = "config.json"
METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
CURVES = "curves.png"
_VERSIONS = ("dpn-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything that a run depends on."""

    config: FinetuneConfig
    source: str
    """The tag, hub id or file of the initial weights, or the variant if they are random."""
    architecture: DPNConfig
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    images: dict[str, Any]
    """Number of images and digest of their names for each split, and the broken images."""

    def as_json(self) -> dict[str, Any]:
        """The record as it comes back from JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def start_record(output: Path, record: Record) -> None:
    """Creates the folder of a new run, with its record.

    Raises:
      RunError: the folder exists and is not empty, or cannot be created.
    """
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            hint = "continue it with --resume (resume=True), or " if (output / RECORD).exists() else ""
            raise RunError(f"{output}: already exists; {hint}choose another --output")
        output.mkdir(parents=True, exist_ok=True)
        temporary = output / f".{RECORD}.tmp"
        temporary.write_text(json.dumps(record.as_json() | {"versions": _versions()}, indent=1) + "\n", "utf-8")
        temporary.replace(output / RECORD)
    except OSError as error:
        raise RunError(f"{output}: cannot be created ({reason(error)})") from error


def read_record(output: Path) -> dict[str, Any]:
    """Reads the record of a run, as JSON.

    Raises:
      RunError: there is none, or it is damaged.
    """
    path = output / RECORD
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RunError(f"{output}: no run to resume (no {RECORD} in it); drop --resume to start one") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({reason(error)})") from error
    except ValueError as error:
        raise RunError(f"{path}: damaged ({error}); start again with another --output") from error


def read_config(output: Path) -> FinetuneConfig:
    """The options of a run, from its record.

    Raises:
      RunError: there is no record, or it is damaged.
    """
    record = read_record(output)
    try:
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in record["config"].items()}
        return FinetuneConfig(**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{output / RECORD}: damaged, or written by another version of dpn_jax ({error})") from error


def check_record(output: Path, record: Record) -> None:
    """Compares the record of a run with that of the run to be resumed.

    Raises:
      RunError: they differ; the message names each difference with both values.
    """
    saved, given = read_record(output), record.as_json()
    if isinstance(saved.get("preprocessing"), dict):  # of an older version, without what is newer
        saved["preprocessing"] = dataclasses.asdict(Preprocessing()) | saved["preprocessing"]
    # other options can select other images, so they are reported first
    defaults = json.loads(json.dumps(dataclasses.asdict(FinetuneConfig())))  # of options newer than the run
    for old, new in ((defaults | (saved.get("config") or {}), given.pop("config")), (saved, given)):
        different = [name for name in new if old.get(name) != new[name]]
        if different:
            values = "; ".join(f"{name} was {_short(old.get(name))}, now {_short(new[name])}" for name in different)
            raise RunError(f"{output}: cannot be resumed: different {', '.join(different)} ({values})")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            from dpn_jax import __version__

            found[name] = __version__ if name == "dpn-jax" else "unknown"
    return found


class Log:
    """Writes metrics to `metrics.jsonl`, a line at a time, and for TensorBoard.

    `metrics.jsonl` has no times or rates, which only TensorBoard gets: a run that was interrupted and resumed writes
    the same bytes as one that was not.

    Args:
      folder: the run's folder.
      step: where the run starts or resumes. Lines of later steps and an incomplete line are dropped, and so is the
        validation at this step, which is repeated.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> log = Log(folder, step=0)
      >>> log.write({"split": "train", "step": 1, "loss": 0.5}, images_per_second=100.0)
      >>> log.write({"split": "train", "step": 2, "loss": 0.4})
      >>> log.close()
      >>> Log(folder, step=1).close()
      >>> read_metrics(folder / METRICS)
      [{'split': 'train', 'step': 1, 'loss': 0.5}]
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        # not SummaryWriter: its thread can die, of a full disk for example, and it then waits forever
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self.path = folder / METRICS
        kept = [row for row in read_metrics(self.path) if _before(row, step)] if self.path.exists() else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        temporary.replace(self.path)
        (folder / EVENTS).mkdir(exist_ok=True)
        suffix = f".{os.getpid()}.{time.monotonic_ns()}"  # the writer's own names only have seconds
        self._events = EventsWriter(str(folder / EVENTS / "events"), suffix)
        start = event_pb2.SessionLog(
            status=event_pb2.SessionLog.START
        )  # TensorBoard then drops later steps of earlier files
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, session_log=start))

    def write(self, row: Row, **for_tensorboard: float) -> None:
        """Appends a line.

        Args:
          row: `split` ('train' or 'val'), `step` and any numbers.
          for_tensorboard: numbers for TensorBoard only.
        """
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
        numbers = {name: value for name, value in row.items() if name not in ("split", "step")} | for_tensorboard
        for name, value in numbers.items():
            summary = scalar(f"{row['split']}/{name}", value)
            self._events.write_event(event_pb2.Event(wall_time=time.time(), step=row["step"], summary=summary))
        self._events.flush()

    def close(self) -> None:
        """Closes TensorBoard's file; all lines are already written."""
        with contextlib.suppress(OSError):  # it retries what could not be written
            self._events.close()


def read_metrics(path: Path) -> list[Row]:
    """Reads the lines of `metrics.jsonl`.

    Args:
      path: the file; an incomplete last line is ignored.
    """
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith("\n"):
            break
        rows.append(row)
    return rows


def plot_curves(rows: Iterable[Row], path: Path) -> None:
    """Plots training and validation loss and accuracy, and the learning rate, over epochs.

    Args:
      rows: lines of `metrics.jsonl`.
      path: the PNG file to write.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and may need a display

    rows = list(rows)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("loss", "accuracy", "learning_rate"), strict=True):
        for split, style in (("train", "-"), ("val", "o-")):
            points = [(row["epoch"], row[name]) for row in rows if row["split"] == split and name in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=split, markersize=3)
        axes.set(xlabel="epoch", title=name.replace("_", " "))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=110)


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _before(row: Row, step: int) -> bool:
    return row["step"] < step or (row["step"] == step and row["split"] == "train")
