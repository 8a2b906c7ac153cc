"""What a run reports: `metrics.jsonl`, TensorBoard's events, plotted curves."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from dpn_jax.checkpoint.card import CardFacts
from dpn_jax.checkpoint.hub import hub_id
from dpn_jax.config import VARIANTS
from dpn_jax.errors import RunError
from dpn_jax.finetune.metrics import Row, quality
from dpn_jax.finetune.record import config_from_json, read_record

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
CURVES = "curves.png"
_TITLES = {
    "loss": "loss (train: with smoothing, mixing, class weights)",
    "accuracy": "accuracy (train: on augmented images)",
    "learning_rate": "learning rate",
}


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


def read_metrics(path: str | os.PathLike) -> list[Row]:
    """Reads the lines of `metrics.jsonl`.

    Args:
      path: the file; an incomplete last line is ignored.
    """
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith("\n"):
            break
        rows.append(row)
    return rows


def plot_curves(rows: Iterable[Row], path: str | os.PathLike) -> None:
    """Plots training and validation loss and accuracy, and the learning rate, over epochs.

    The training loss is the one that is minimized, with label smoothing, mixing and class weights; the title says so.

    Args:
      rows: lines of `metrics.jsonl`.
      path: the PNG file to write.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and may need a display

    rows = list(rows)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), _TITLES, strict=True):
        for split, style in (("train", "-"), ("val", "o-")):
            points = [(row["epoch"], row[name]) for row in rows if row["split"] == split and name in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=split, markersize=3)
        axes.set(xlabel="epoch", title=_TITLES[name])
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=110)


def run_facts(run: Path) -> CardFacts | None:
    """What a finished run knows for the card of its model; None of what is no run.

    Nothing of this machine is told: neither folders nor file names.

    Args:
      run: the folder.
    """
    try:
        fields = read_record(run)
        config = config_from_json(fields["config"])
        rows = [row for row in read_metrics(run / METRICS) if row["split"] == "val"]
    except (RunError, OSError, KeyError, TypeError, ValueError):
        return None
    source = fields["source"]
    start = hub_id(source) or ("random weights" if source in VARIANTS else "other weights")
    chosen = {name: value for name, value in dataclasses.asdict(config).items() if name in _TOLD}
    options = ", ".join(f"{name} {value}" for name, value in chosen.items())
    best = max(rows, key=lambda row: quality(row, config.metric), default=None)
    metrics = {}
    if best is not None:
        metrics["top1"] = 100 * best["accuracy"]
        metrics |= {"top5": 100 * best["accuracy5"]} if "accuracy5" in best else {}
    return CardFacts(
        procedure=f"`dpn-jax finetune` from {start}: {options}.",
        evaluated_on="validation images, by which the epoch was chosen" if best else None,
        metrics=metrics or None,
    )


_TOLD = (
    "epochs",
    "batch_size",
    "optimizer",
    "learning_rate",
    "weight_decay",
    "layer_decay",
    "label_smoothing",
    "mixup",
    "cutmix",
    "freeze",
    "norms",
    "image_size",
    "seed",
)


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _before(row: Row, step: int) -> bool:
    return row["step"] < step or (row["step"] == step and row["split"] == "train")
