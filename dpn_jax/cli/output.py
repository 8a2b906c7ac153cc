"""What the commands print: results to stdout, everything else to stderr, and the exit codes."""

import contextlib
import csv
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import jax
import tqdm

from dpn_jax.inference.throughput import Throughput
from dpn_jax.multihost import is_first
from dpn_jax.pretrained import Preprocessing

DONE, SOME_FAILED, NOTHING_DONE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

Format = Literal["table", "json", "csv"]


def text_table(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """Text in columns: the first left-aligned, the others right-aligned, floats with 4 digits.

    Example:
      >>> print(text_table(("split", "loss"), [("train", 0.25), ("val", 1.5)]))
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


def print_rows(rows: Sequence[Mapping[str, object]], format: Format, table: str) -> None:
    """Prints rows as JSON, one object per line, or as CSV; or else `table`, which has the same rows for people."""
    if format == "json":
        for row in rows:
            print(json_line(row))
    elif format == "csv":
        writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print(table)


def json_line(value: object) -> str:
    """JSON on one line; NaN and the infinities, which JSON lacks, are null.

    Example:
      >>> json_line({"loss": float("nan"), "top": [0.5, float("inf")]})
      '{"loss": null, "top": [0.5, null]}'
    """

    def finite(value: object) -> object:
        if isinstance(value, Mapping):
            return {name: finite(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), allow_nan=False)


def progress(items: Iterable[object], total: int, unit: str) -> Iterable[object]:
    """Shows a progress bar if stderr is a terminal."""
    if sys.stderr is None or not is_first():
        return items
    return tqdm.tqdm(items, total=total, unit=unit, disable=None if total > 1 else True, file=sys.stderr)


def note(message: str) -> None:
    """Prints a line to stderr, above the progress bar if there is one."""
    if sys.stderr is None:  # closed; tqdm would print to stdout
        return
    with contextlib.suppress(OSError):
        tqdm.tqdm.write(f"dpn-jax: {message}", file=sys.stderr)


def note_once(message: str) -> None:
    """Prints a line to stderr, in process 0 only."""
    if is_first():
        note(message)


def note_throughput(throughput: Throughput | None) -> None:
    """Prints how fast images were processed and what limited it, if that was measured."""
    if throughput is None or jax.process_count() > 1:  # of the images of one process
        return
    limit, other = ("host", "device") if throughput.limit == "host" else ("device", "host")
    spare = getattr(throughput, other)
    note(f"{throughput.rate:.1f} images/s; the {limit} was the limit (the {other} could do {spare:.1f})")


def describe(settings: Preprocessing) -> str:
    """Preprocessing on one line."""
    mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (settings.mean, settings.std))
    size = f"{settings.height} x {settings.width}" if settings.height != settings.width else settings.height
    mode = "" if settings.crop_mode == "center" else f"{settings.crop_mode} "
    crop = f"{size} pixels, {mode}crop {settings.crop_fraction:g}, {settings.interpolation}"
    return f"{crop}, mean {mean}, std {std}"
