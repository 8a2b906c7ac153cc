"""`dpn-jax classify`."""

import contextlib
import csv
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import tyro

from dpn_jax.cli.options import ClassifierOptions, option
from dpn_jax.cli.output import DONE, NOTHING_DONE, SOME_FAILED, Format, json_line, note_once, note_throughput, progress
from dpn_jax.errors import ImageError, printable, shown
from dpn_jax.images.folders import image_files
from dpn_jax.images.packed import PackedImages, is_packed
from dpn_jax.images.read import ImageSource
from dpn_jax.images.sources import are_crops
from dpn_jax.images.transform import Transform
from dpn_jax.inference.prediction import Prediction
from dpn_jax.multihost import is_first, require_same, together
from dpn_jax.paths import kind, readable_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(ClassifierOptions):
    """Classify photos."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional, option("IMAGE_OR_FOLDER...", hint="(required)")]
    """Photos, folders of photos, or folders that `dpn-jax pack` has written."""
    top_k: Annotated[int | None, option("K", "5, or fewer if the model has fewer classes")] = None
    """Number of classes to print per image."""
    format: Format = "table"
    """table for people; json (one object per line) or csv for programs."""

    def run(self) -> int:
        """Classifies the images and prints each batch as it is done."""
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"--top-k must be at least 1, got {self.top_k}")
        self.check()
        photos, failed = found_photos(self.images)
        if not photos:
            return NOTHING_DONE
        classifier = together(self.classifier)
        done = 0
        prepared = together(lambda: photos.are_crops(classifier.transform))
        results = classifier.stream_in_processes(photos, top_k=self.top_k, prepared=prepared)
        with contextlib.closing(results):
            if is_first():
                print_header(self.format)
            for path, result in zip(photos.names, progress(results, len(photos), "image"), strict=True):
                if isinstance(result, ImageError):
                    failed += 1
                    note_once(str(result))
                else:
                    done += 1
                    if is_first():
                        print_predictions(path, result, self.format)
        note_throughput(classifier.throughput)
        if not done:
            return NOTHING_DONE
        return SOME_FAILED if failed else DONE


class Photos(Sequence[ImageSource | ImageError]):
    """Photos by name, and images of packed folders, which are read when they are asked for.

    Args:
      found: the path of each image, and the packed folder that it is in, if it is.
    """

    def __init__(self, found: Sequence[tuple[str, PackedImages | None]]) -> None:
        self.names = [name for name, _ in found]
        self._packed = [packed for _, packed in found]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> ImageSource | ImageError:
        name, packed = self.names[index], self._packed[index]
        try:
            return name if packed is None else packed.image(name)
        except ImageError as error:
            return error

    def are_crops(self, transform: Transform) -> bool:
        """Whether they are packed crops of this transform.

        Raises:
          ImageError: they are crops of another one.
          ValueError: some are crops and others are not.
        """
        folders = {id(packed): packed for packed in self._packed}.values()
        kinds = {packed is not None and are_crops(packed, transform) for packed in folders}
        if len(kinds) > 1:
            raise ValueError("packed crops and photos cannot be classified in one run; name one of them")
        return kinds == {True}


def found_photos(names: Sequence[str]) -> tuple[Photos, int]:
    """The photos that are named, and how many of the names have none, which are told; the same in every process.

    Args:
      names: photos, folders of photos, or packed folders.

    Raises:
      ValueError: there are no names, or an empty one.
    """
    if not names:
        raise ValueError("name at least one photo or folder")
    if "" in names:  # such as from a shell variable that is not set; to Path it would be the current folder
        raise ValueError("the name of a photo or folder is empty")
    found = together(lambda: list(_found(names)))
    failures = [image for image in found if isinstance(image, ImageError)]
    photos = Photos([image for image in found if not isinstance(image, ImageError)])
    require_same([*photos.names, *map(str, failures)], "images")
    for failure in failures:
        note_once(str(failure))
    return photos, len(failures)


def _found(names: Sequence[str]) -> Iterator[tuple[str, PackedImages | None] | ImageError]:
    """Yields the files, each with the packed folder it is in, and an error for each folder without images."""
    for name in names:
        if kind(readable_path(name, error=ImageError)) != "folder":
            yield name, None
            continue
        packed = PackedImages(name) if is_packed(name) else None
        if files := image_files(name) if packed is None else packed.files:
            yield from ((str(file), packed) for file in files)
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
