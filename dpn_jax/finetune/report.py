"""What a run tells: `metrics.jsonl`, TensorBoard's events, a plot of the curves, a table."""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from dpn_jax.finetune.metrics import Row

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
CURVES = "curves.png"


class Log:
    """Writes what was measured, a line at a time, into `metrics.jsonl` and for TensorBoard.

    `metrics.jsonl` holds nothing that depends on when or how fast a run went: that of a run that was interrupted and
    resumed is the same, byte for byte, as if it had not been. The rate is TensorBoard's alone.

    Args:
      folder: the run's.
      step: where the run (re)starts. Lines of later steps, and a line cut short, are dropped, and so is the validation
        at this very step, which is made again.

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
        # SummaryWriter hands events to a thread and waits for ever where that has died, of a full disk for example
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self.path = folder / METRICS
        kept = [row for row in read_metrics(self.path) if _before(row, step)] if self.path.exists() else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        temporary.replace(self.path)
        (folder / EVENTS).mkdir(exist_ok=True)
        suffix = f".{os.getpid()}.{time.monotonic_ns()}"  # the writer's own names have seconds
        self._events = EventsWriter(str(folder / EVENTS / "events"), suffix)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # TensorBoard forgets what came after it
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, session_log=start))

    def write(self, row: Row, **for_tensorboard: float) -> None:
        """Adds a line.

        Args:
          row: `split` ('train' or 'val'), `step` and any numbers.
          for_tensorboard: numbers that only TensorBoard shows.
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
        """Closes TensorBoard's file; every line is written already."""
        with contextlib.suppress(OSError):  # it tries once more to write what could not be written
            self._events.close()


def read_metrics(path: Path) -> list[Row]:
    """The lines of `metrics.jsonl`.

    Args:
      path: the file; its last line may be cut short, and is then left out.
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
    """Draws loss and accuracy, of training and validation, and the learning rate over the epochs.

    Args:
      rows: lines of `metrics.jsonl`.
      path: the PNG file.
    """
    from matplotlib.figure import Figure  # not pyplot: it keeps figures and wants a display

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


def table(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """Text in columns, numbers to the right.

    Example:
      >>> print(table(("split", "loss"), [("train", 0.25), ("val", 1.5)]))
      split    loss
      train  0.2500
      val    1.5000
    """
    lines = [tuple(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in line) for line in (head, *body)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _before(row: Row, step: int) -> bool:
    return row["step"] < step or (row["step"] == step and row["split"] == "train")
