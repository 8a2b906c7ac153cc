"""What the commands print: results to stdout, everything else to stderr, and the exit code."""

import contextlib
import sys
from collections.abc import Iterable
from typing import Literal

import tqdm

from dpn_jax.inference.throughput import Throughput
from dpn_jax.pretrained import Preprocessing

DONE, SOME_FAILED, NOTHING_DONE, INTERRUPTED = 0, 1, 2, 130

Format = Literal["table", "json", "csv"]


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
