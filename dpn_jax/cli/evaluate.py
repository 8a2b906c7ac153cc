"""`dpn-jax evaluate`."""

import contextlib
import dataclasses
from typing import Annotated

import tyro

from dpn_jax.cli.options import ClassifierOptions
from dpn_jax.cli.output import (
    DONE,
    NOTHING_DONE,
    SOME_FAILED,
    Format,
    note_once,
    note_throughput,
    print_rows,
    progress,
    text_table,
)
from dpn_jax.images.sources import Unlabeled, are_crops
from dpn_jax.inference.evaluation import labeled_images, score
from dpn_jax.multihost import is_first, require_same, together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(ClassifierOptions):
    """Measure top-1 and top-5 accuracy on labeled images."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Holds one folder of images per class, named by label, WordNet synset or class index; or was written
    by `dpn-jax pack`; or is a file *.csv with columns image (paths) and label (such names)."""
    format: Format = "table"
    """table for people; json or csv for programs."""

    def run(self) -> int:
        """Classifies every image, then prints one row."""
        self.check()
        classifier = together(self.classifier)
        images = together(lambda: labeled_images(self.data, classifier))
        require_same(list(images.files), "images")
        prepared = together(lambda: are_crops(images, classifier.transform))
        with contextlib.closing(classifier.stream_in_processes(Unlabeled(images), prepared=prepared)) as results:
            accuracy = score(progress(results, len(images), "image"), images.labels)
        for failure in accuracy.failures:
            note_once(str(failure))
        if not accuracy.images:
            return NOTHING_DONE
        throughput = classifier.throughput
        row = {
            "images": accuracy.images,
            "failed": len(accuracy.failures),
            "top1": round(100 * accuracy.top1 / accuracy.images, 3),
            "top5": round(100 * accuracy.top5 / accuracy.images, 3),
            "images_per_second": None if throughput is None else round(throughput.rate, 2),
        }
        if is_first():
            print_row(row, self.format)
        note_throughput(throughput)
        return SOME_FAILED if accuracy.failures else DONE


def print_row(row: dict[str, float | None], format: Format) -> None:
    """Prints an evaluation."""
    rate = "-" if row["images_per_second"] is None else f"{row['images_per_second']:.1f}"
    cells = (row["images"], row["failed"], f"{row['top1']:.3f}%", f"{row['top5']:.3f}%", rate)
    print_rows([row], format, text_table(("images", "failed", "top-1", "top-5", "images/s"), [cells]))
