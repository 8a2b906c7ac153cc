"""Accuracies that others have published for the pretrained weights."""

import csv
import functools
import importlib.resources
from typing import NamedTuple


class Published(NamedTuple):
    """One published result."""

    source: str
    """Who measured it."""
    dataset: str
    """'imagenet-1k' is its validation set."""
    model: str
    """The pretrained tag, or the authors' name of the network; a star means pretraining on ImageNet-5k."""
    image_size: int
    """Side of the images, pixels."""
    pooling: str
    """'avg', or 'avgmax': the paper's mean-max pooling, `test_time_pool`."""
    crop_fraction: float | None
    """Of the image, as in `Preprocessing`."""
    top1: float
    """Percent."""
    top5: float
    """Percent."""


@functools.cache
def published_results() -> tuple[Published, ...]:
    """All of them, from `published.csv` in this folder.

    Example:
      >>> published_results()[1].model, published_results()[1].top1
      ('dpn92.mx_in1k', 80.032)
    """
    text = importlib.resources.files(__package__).joinpath("published.csv").read_text("utf-8")
    return tuple(
        Published(
            row["source"],
            row["dataset"],
            row["model"],
            int(row["image_size"]),
            row["pooling"],
            float(row["crop_pct"]) if row["crop_pct"] else None,
            float(row["top1"]),
            float(row["top5"]),
        )
        for row in csv.DictReader(text.splitlines())
    )


def published_for(tag: str, image_size: int, *, test_time_pool: bool = False) -> Published | None:
    """What was published for weights on ImageNet-1k's validation images, at this size and with this pooling, or None.

    timm's own results come first, then the authors', of the weights that timm converted.

    Example:
      >>> published_for("dpn92.mx_in1k", 320, test_time_pool=True).top1
      81.21
    """
    names = (tag, _AUTHORS_NAMES.get(tag))
    wanted = ("imagenet-1k", image_size, "avgmax" if test_time_pool else "avg")
    found = (row for row in published_results() if (row.dataset, row.image_size, row.pooling) == wanted)
    return next((row for row in found if row.model in names), None)


_AUTHORS_NAMES = {  # timm's files were dpn68b_extra, dpn92_extra and dpn107_extra before they got tags
    "dpn68.mx_in1k": "DPN-68",
    "dpn68b.mx_in1k": "DPN-68*",
    "dpn92.mx_in1k": "DPN-92*",
    "dpn98.mx_in1k": "DPN-98",
    "dpn131.mx_in1k": "DPN-131",
    "dpn107.mx_in1k": "DPN-107*",
}
