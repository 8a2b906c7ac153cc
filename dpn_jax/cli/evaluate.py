"""`dpn-jax evaluate`."""

import contextlib
import csv
import dataclasses
import json
import sys

import tyro

from dpn_jax.cli.options import ClassifierOptions
from dpn_jax.cli.output import DONE, NOTHING_DONE, SOME_FAILED, Format, note, note_throughput, progress
from dpn_jax.inference.evaluation import labeled_images, score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(ClassifierOptions):
    """Measure top-1 and top-5 over a folder of class folders."""

    folder: tyro.conf.Positional[str]
    """Holds a folder of images for each class, named by its label, its ImageNet synset, or its number from 0."""
    format: Format = "table"
    """table for people; json or csv for programs."""

    def run(self) -> int:
        """Classifies every image, then prints one row."""
        self.check()
        classifier = self.classifier()
        examples = labeled_images(self.folder, classifier)
        top_k = min(5, len(classifier.labels))
        with contextlib.closing(classifier.stream((path for path, _ in examples), top_k=top_k)) as results:
            accuracy = score(progress(results, len(examples), "image"), (label for _, label in examples))
        for failure in accuracy.failures:
            note(str(failure))
        if not accuracy.images:
            return NOTHING_DONE
        throughput = classifier.throughput
        print_row(
            {
                "images": accuracy.images,
                "failed": len(accuracy.failures),
                "top1": round(100 * accuracy.top1 / accuracy.images, 3),
                "top5": round(100 * accuracy.top5 / accuracy.images, 3),
                "images_per_second": None if throughput is None else round(throughput.rate, 2),
            },
            self.format,
        )
        note_throughput(throughput)
        return SOME_FAILED if accuracy.failures else DONE


def print_row(row: dict[str, float | None], format: Format) -> None:
    """Prints one row with its names."""
    if format == "json":
        print(json.dumps(row))
    elif format == "csv":
        writer = csv.DictWriter(sys.stdout, row, lineterminator="\n")
        writer.writeheader()
        writer.writerow(row)
    else:
        top1, top5 = f"{row['top1']:.3f}%", f"{row['top5']:.3f}%"
        rate = "-" if row["images_per_second"] is None else f"{row['images_per_second']:.1f}"
        print(f"{'images':>8}{'failed':>8}{'top-1':>10}{'top-5':>10}{'images/s':>10}")
        print(f"{row['images']:>8}{row['failed']:>8}{top1:>10}{top5:>10}{rate:>10}")
