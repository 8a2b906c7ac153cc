"""What the commands print: results to stdout, everything else to stderr, and the exit code."""

import contextlib
import sys
from collections.abc import Iterable, Sequence
from typing import Literal

import tqdm

from dpn_jax.inference.throughput import Throughput
from dpn_jax.pretrained import Preprocessing

DONE, SOME_FAILED, NOTHING_DONE, INTERRUPTED = 0, 1, 2, 130

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


def progress(items: Iterable[object], total: int, unit: str) -> Iterable[object]:
    """A progress bar on a terminal's stderr, nothing elsewhere."""
    return tqdm.tqdm(items, total=total, unit=unit, disable=None if total > 1 else True, file=sys.stderr)


def note(message: str) -> None:
    """One line on stderr, beside the progress bar."""
    with contextlib.suppress(OSError):
        tqdm.tqdm.write(f"dpn-jax: {message}", file=sys.stderr)


def note_throughput(throughput: Throughput | None) -> None:
    """Says how fast images went through and what held them up, where it could be told."""
    if throughput is None:
        return
    limit, other = ("host", "device") if throughput.limit == "host" else ("device", "host")
    spare = getattr(throughput, other)
    note(f"{throughput.rate:.1f} images/s; the {limit} was the limit (the {other} could do {spare:.1f})")


def describe(settings: Preprocessing) -> str:
    """A line about how images are prepared."""
    mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (settings.mean, settings.std))
    crop = f"{settings.image_size} pixels, crop {settings.crop_fraction:g}, {settings.interpolation}"
    return f"{crop}, mean {mean}, std {std}"
