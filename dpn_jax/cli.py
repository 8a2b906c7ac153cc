"""The `dpn-jax` command. Results go to stdout, everything else to stderr; an error is one line, never a traceback."""

import contextlib
import csv
import dataclasses
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import tqdm
import tyro

from dpn_jax.checkpoint import convert, from_pretrained
from dpn_jax.config import PRETRAINED, VARIANTS, Preprocessing, default_preprocessing, variant_of
from dpn_jax.inference import Classifier, Prediction
from dpn_jax.preprocess import ImageError, Transform, image_files, read_labels
from dpn_jax.weights import table

DONE, SOME_FAILED, NOTHING_DONE, INTERRUPTED = 0, 1, 2, 130

DEFAULT_TAG = "dpn92.mx_in1k"

Format = Literal["table", "json", "csv"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Classify:
    """Name what is on photos."""

    images: tyro.conf.Positional[tuple[str, ...]]
    """Photos, and folders of photos."""
    model: str | None = None
    """A pretrained tag or hub id (dpn92.mx_in1k when neither this nor --weights is given); beside --weights, the
    architecture and preprocessing of that file."""
    weights: str | None = None
    """A file of weights: timm's or ours."""
    top_k: int = 5
    """How many classes to name."""
    batch_size: int = 16
    """Images run at once."""
    dtype: Dtype = "float32"
    """Dtype of the arithmetic."""
    format: Format = "table"
    """table for people; json (one object a line) or csv for programs."""
    labels: str | None = None
    """A file with the name of each class, one a line."""
    image_size: int | None = None
    """Side of the prepared images, pixels, at least 32."""
    use_test_size: bool = False
    """Prepare images at the larger size that timm tests some weights with."""
    test_time_pool: bool = False
    """Mean-max pooling over windows of the training size, for larger images."""
    exif: bool = False
    """Turn photos as their EXIF orientation says; timm does not."""
    device: str | None = None
    """Run on this kind of device: cpu, gpu, tpu."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    allow_nonfinite: bool = False
    """Take weights with NaN, infinity or negative variances."""

    def run(self) -> int:
        """Classifies, and prints as it goes."""
        if self.top_k < 1:
            raise ValueError(f"--top-k must be at least 1, got {self.top_k}")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")
        if not self.images:
            raise ValueError("name at least one photo or folder")
        device = find_device(self.device)
        found = list(self._found())
        paths = [path for path in found if not isinstance(path, ImageError)]
        failures = [path for path in found if isinstance(path, ImageError)]
        for failure in failures:
            note(str(failure))
        if not paths:
            return NOTHING_DONE
        classifier = self._classifier(device)
        done = 0
        with contextlib.closing(classifier.stream(paths, top_k=self.top_k)) as results:
            print_header(self.format)
            for path, result in zip(paths, progress(results, len(paths), "image"), strict=True):
                if isinstance(result, ImageError):
                    failures.append(result)
                    note(str(result))
                else:
                    done += 1
                    print_predictions(path, result, self.format)
        if not done:
            return NOTHING_DONE
        return SOME_FAILED if failures else DONE

    def _found(self) -> Iterator[str | ImageError]:
        """The files that are meant, and an error for each folder without any."""
        for name in self.images:
            if not Path(name).is_dir():
                yield name
            elif files := image_files(name):
                yield from map(str, files)
            else:
                yield ImageError(f"{printable(name)}: no images in this folder")

    def _classifier(self, device: jax.Device | None) -> Classifier:
        model = from_pretrained(
            Path(self.weights) if self.weights else self.model or DEFAULT_TAG,
            model=self.model if self.weights else None,
            dtype=self.dtype,
            revision=self.revision,
            test_time_pool=7 if self.test_time_pool else None,
            allow_nonfinite=self.allow_nonfinite,
        )
        settings = model.provenance.preprocessing
        tag = PRETRAINED.get((self.model or ("" if self.weights else DEFAULT_TAG)).removeprefix("timm/"))
        if tag:
            settings = (self.use_test_size and tag.test_preprocessing) or tag.preprocessing
        elif settings is None:
            settings = default_preprocessing(model.config)
            note(f"{self.weights}: does not say how to prepare images; taking {describe(settings)} (see --model)")
        if self.image_size is not None:
            settings = dataclasses.replace(settings, image_size=self.image_size)
        return Classifier(
            model,
            transform=Transform(settings, exif=self.exif),
            labels=read_labels(self.labels, model.config.num_classes) if self.labels else None,
            batch_size=self.batch_size,
            device=device,
        )


@dataclasses.dataclass(frozen=True)
class Convert:
    """Rewrite weights from timm's layout to ours, or back; needs no torch where the source is safetensors."""

    source: tyro.conf.Positional[str]
    """A file, a folder with config.json and weights, a tag or a hub id."""
    destination: tyro.conf.Positional[str]
    """The .safetensors file to write."""
    to: Literal["flax", "timm"] | None = None
    """The layout to write; the other one than the source's when left out."""
    model: str | None = None
    """The variant, when it should not be recognised from the file."""
    dtype: Dtype | None = None
    """Cast the weights; kept as they are when left out."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    force: bool = False
    """Overwrite an existing destination."""
    allow_nonfinite: bool = False
    """Take weights with NaN, infinity or negative variances."""

    def run(self) -> int:
        """Converts, and says what was written."""
        read = convert(
            self.source,
            self.destination,
            to=self.to,
            model=self.model,
            dtype=self.dtype,
            revision=self.revision,
            overwrite=self.force,
            allow_nonfinite=self.allow_nonfinite,
        )
        layout = self.to or ("flax" if read.is_timm else "timm")
        variant = variant_of(read.config) or "a custom DPN"
        size = Path(self.destination).stat().st_size
        print(f"{printable(self.destination)}: {variant}, {len(read.file)} tensors in {layout} layout, {size:,} bytes")
        return DONE


@dataclasses.dataclass(frozen=True)
class Models:
    """List the variants and the published weights."""

    format: Format = "table"
    """table for people; json (one object a line) or csv for programs."""

    def run(self) -> int:
        """Prints a row for each set of weights, and for each variant without any."""
        rows = [row for variant in VARIANTS for row in self._rows(variant)]
        if self.format == "json":
            for row in rows:
                print(json.dumps(row))
        elif self.format == "csv":
            writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        else:
            print(f"{'weights':<16}{'parameters':>12}{'GMACs':>8}{'top-1':>9}{'top-5':>9}  preprocessing")
            for row in rows:
                top1, top5 = (f"{row[key]:.3f}" if row[key] else "-" for key in ("top1", "top5"))
                print(
                    f"{row['weights'] or row['variant'] + ' (none)':<16}{row['parameters'] / 1e6:>10.2f} M"
                    f"{row['gmacs']:>8.2f}{top1:>9}{top5:>9}  {row['preprocessing']}"
                )
        return DONE

    def _rows(self, variant: str) -> Iterator[dict[str, object]]:
        config = VARIANTS[variant]
        size = {
            "parameters": sum(math.prod(entry.timm_shape) for entry in table(config) if entry.is_parameter),
            "gmacs": round(config.multiply_adds() / 1e9, 3),
        }
        tags = [(name, tag) for name, tag in PRETRAINED.items() if tag.variant == variant]
        for name, tag in tags or [(None, None)]:
            settings = tag.preprocessing if tag else default_preprocessing(config)
            accuracy = {"top1": tag.top1 if tag else None, "top5": tag.top5 if tag else None}
            yield {"weights": name, "variant": variant, **size, **accuracy, "preprocessing": describe(settings)}


COMMANDS = {"classify": Classify, "convert": Convert, "models": Models}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: the words after `dpn-jax`; those of this process when left out.

    Returns:
      The exit code: 0 done; 1 some inputs failed and the rest were done; 2 nothing could be done; 130 Ctrl-C.
    """
    return guarded(lambda: tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="dpn-jax", args=arguments).run())


def guarded(command: Callable[[], int]) -> int:
    """Calls `command`; what goes wrong becomes one line on stderr and an exit code.

    Args:
      command: returns an exit code.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd files that are read all the same
    logging.basicConfig(format="dpn-jax: %(message)s", level=logging.WARNING)
    with contextlib.suppress(AttributeError):  # a replaced stdout
        sys.stdout.reconfigure(errors="surrogateescape")  # file names come out as the bytes that they are
    try:
        code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader has gone, as `| head` does: nobody is left to tell
        abandon_stdout()
        return SOME_FAILED
    except OSError as error:
        abandon_stdout()
        note(f"{error.filename or 'output'}: {error.strerror or error}")
        return NOTHING_DONE
    except ValueError as error:  # CheckpointError and ImageError are too
        note(str(error).split("\n")[0])
        return NOTHING_DONE


def find_device(kind: str | None) -> jax.Device | None:
    """The first device of a kind, or None for JAX's default.

    Raises:
      ValueError: there is none; nothing falls back silently.
    """
    if kind is None:
        return None
    try:
        return jax.devices(kind)[0]
    except RuntimeError as error:
        present = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise ValueError(f"--device {kind}: there is no such device here, only {present}") from error


def print_header(format: Format) -> None:
    """The first line of a CSV table."""
    if format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerow(
            ["image", "rank", "index", "synset", "label", "probability"]
        )


def print_predictions(path: str, predictions: Sequence[Prediction], format: Format) -> None:
    """Prints what is on one image."""
    if format == "json":
        print(json.dumps({"image": path, "predictions": [prediction._asdict() for prediction in predictions]}))
    elif format == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        for rank, best in enumerate(predictions, start=1):
            writer.writerow([path, rank, best.index, best.synset, best.label, f"{best.probability:.6f}"])
    else:
        print(printable(path))
        for best in predictions:
            print(f"  {best.probability:7.2%}  {best.label}")


def progress(items: Iterable[object], total: int, unit: str) -> Iterable[object]:
    """A progress bar on a terminal's stderr, nothing elsewhere."""
    return tqdm.tqdm(items, total=total, unit=unit, disable=None if total > 1 else True, file=sys.stderr)


def note(message: str) -> None:
    """One line on stderr, beside the progress bar."""
    with contextlib.suppress(OSError):
        tqdm.tqdm.write(f"dpn-jax: {message}", file=sys.stderr)


def printable(name: str) -> str:
    """A file's name in one printable line."""
    return name if name.isprintable() else repr(name)


def describe(settings: Preprocessing) -> str:
    """A line about how images are prepared."""
    mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (settings.mean, settings.std))
    crop = f"{settings.image_size} pixels, crop {settings.crop_fraction:g}, {settings.interpolation}"
    return f"{crop}, mean {mean}, std {std}"


def abandon_stdout() -> None:
    """Keeps the interpreter from failing once more when it flushes stdout at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
