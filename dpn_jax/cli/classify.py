"""`dpn-jax classify`."""

import contextlib
import csv
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from dpn_jax.cli.options import ClassifierOptions, option
from dpn_jax.cli.output import DONE, NOTHING_DONE, SOME_FAILED, Format, json_line, note_once, note_throughput, progress
from dpn_jax.errors import ImageError, printable, shown
from dpn_jax.images.folders import image_files
from dpn_jax.inference.classifier import Prediction
from dpn_jax.multihost import is_first, require_same, together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(ClassifierOptions):
    """Classify photos."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional, option("IMAGE_OR_FOLDER...", hint="(required)")]
    """Photos, or folders of photos."""
    top_k: Annotated[int | None, option("K", "5, or fewer if the model has fewer classes")] = None
    """Number of classes to print per image."""
    format: Format = "table"
    """table for people; json (one object per line) or csv for programs."""

    def run(self) -> int:
        """Classifies the images and prints each batch as it is done."""
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"--top-k must be at least 1, got {self.top_k}")
        self.check()
        if not self.images:
            raise ValueError("name at least one photo or folder")
        if "" in self.images:  # such as from a shell variable that is not set; to Path it would be the current folder
            raise ValueError("the name of a photo or folder is empty")
        found = together(lambda: list(self._found()))
        require_same(list(map(str, found)), "images")
        paths = [path for path in found if not isinstance(path, ImageError)]
        failures = [path for path in found if isinstance(path, ImageError)]
        for failure in failures:
            note_once(str(failure))
        if not paths:
            return NOTHING_DONE
        classifier = together(self.classifier)
        done = 0
        with contextlib.closing(classifier.stream_in_processes(paths, top_k=self.top_k)) as results:
            if is_first():
                print_header(self.format)
            for path, result in zip(paths, progress(results, len(paths), "image"), strict=True):
                if isinstance(result, ImageError):
                    failures.append(result)
                    note_once(str(result))
                else:
                    done += 1
                    if is_first():
                        print_predictions(path, result, self.format)
        note_throughput(classifier.throughput)
        if not done:
            return NOTHING_DONE
        return SOME_FAILED if failures else DONE

    def _found(self) -> Iterator[str | ImageError]:
        """Yields the files, and an error for each folder without images."""
        for name in self.images:
            if not Path(name).is_dir():
                yield name
            elif files := image_files(name):
                yield from map(str, files)
            else:
                yield ImageError(f"{shown(name)}: no images in this folder")


def print_header(format: Format) -> None:
    """Prints the first line of a CSV table."""
    if format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerow(
            ["image", "rank", "index", "synset", "label", "probability"]
        )


def print_predictions(path: str, predictions: Sequence[Prediction], format: Format) -> None:
    """Prints the classes of one image."""
    if format == "json":
        print(json_line({"image": path, "predictions": [prediction._asdict() for prediction in predictions]}))
    elif format == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        for rank, best in enumerate(predictions, start=1):
            writer.writerow([path, rank, best.index, best.synset, best.label, f"{best.probability:.6f}"])
    else:
        print(printable(path))
        for best in predictions:
            print(f"  {best.probability:7.2%}  {printable(best.label)}")
