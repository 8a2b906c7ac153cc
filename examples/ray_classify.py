"""Classifies any number of photos on a Ray cluster: `python -m examples.ray_classify PHOTOS RESULTS`.

Ray Data reads the encoded photos, hands them to actors that hold a `Classifier` each, and writes a row for every photo
into Parquet files; a photo that cannot be read gets a row that says why. The classifier decodes, as timm does. What a
node had not delivered when it died is done again on another: there is one row for every photo.

PHOTOS and RESULTS are URLs such as gs://bucket/photos, or folders that all nodes share; every node needs
"dpn-jax[ray]". Run it on a node, or `ray job submit --working-dir . -- python -m examples.ray_classify ...`.
On TPU (not run there: the tests have a cluster of CPUs) ask for all chips of a host, `--tpus 4` or `--tpus 8`.
"""

import contextlib
import dataclasses
import sys
from typing import Annotated, Literal

import tyro

try:
    import pyarrow.dataset
    import ray.data
except ImportError as error:
    sys.exit(f'ray_classify needs {error.name}: pip install "dpn-jax[ray]"')

from dpn_jax import Classifier
from dpn_jax.cli.main import guarded
from dpn_jax.errors import ImageError
from dpn_jax.images.read import SUFFIXES, UNSUPPORTED_SUFFIXES

READ_AHEAD = 8
"""Batches that an actor gets at a time: it decodes some while its devices compute another."""
STRINGS, INTEGERS, FLOATS = (pyarrow.list_(kind()) for kind in (pyarrow.string, pyarrow.int32, pyarrow.float32))
COLUMNS = {"labels": STRINGS, "indices": INTEGERS, "probabilities": FLOATS, "error": pyarrow.string()}
"""Columns of the results, beside those of the photos: the classes, best first, or an error."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to classify, and where."""

    photos: Annotated[str, tyro.conf.Positional]
    """Folder of photos, or Parquet with --column."""
    results: Annotated[str, tyro.conf.Positional]
    """New folder for Parquet files: path, labels, indices, probabilities and error of each photo."""
    column: str | None = None
    """The photos are Parquet, encoded in this column; the other columns are passed on to the results."""
    model: str = "dpn92.mx_in1k"
    """Pretrained tag, hub id, file or folder of weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the arithmetic."""
    top_k: int | None = None
    """Classes of each photo; defaults to 5, or fewer if the model has fewer."""
    batch_size: int = 64
    """Photos in a batch, over all devices of an actor."""
    cpus: float = 1
    """CPUs of an actor; there are as many actors as the cluster has room for."""
    gpus: float = 0
    """GPUs of an actor."""
    tpus: int = 0
    """TPU chips of an actor: 1, 2, 4 or 8."""


class PhotoClassifier:
    """What an actor holds: a model, compiled for one batch size, on all devices that the actor has."""

    def __init__(self, options: Options) -> None:
        self.column, self.top_k, size = options.column or "bytes", options.top_k, options.batch_size
        self.model = Classifier.from_pretrained(options.model, dtype=options.dtype, batch_size=size, devices="all")

    def __call__(self, photos: pyarrow.Table) -> pyarrow.Table:
        """Classifies photos: the column of encoded images is replaced by `COLUMNS`."""
        rows, encoded = [], photos[self.column].to_pylist()
        # with a total, every batch is padded to the full size: one program runs, however Ray cuts the photos
        for result in self.model.stream(encoded, top_k=self.top_k, total=self.model.batch_size):
            if isinstance(result, ImageError):
                rows.append({"error": str(result).removeprefix("bytes: ")})
            else:
                labels, probabilities, indices, _ = zip(*result, strict=True)
                rows.append({"labels": labels, "indices": indices, "probabilities": probabilities})
        classified = pyarrow.Table.from_pylist(rows, pyarrow.schema(COLUMNS))
        for name in COLUMNS:
            photos = photos.append_column(name, classified[name])
        return photos.drop_columns(self.column)


def main(options: Options) -> int:
    """Classifies the photos; returns 1 if some of them could not be read."""
    with contextlib.suppress(FileNotFoundError):
        if pyarrow.dataset.dataset(options.results).count_rows():
            raise ValueError(f"{options.results}: there are results already; name a new folder, or remove these")
    if options.column:
        columns = pyarrow.dataset.dataset(options.photos).schema.names
        if options.column not in columns or COLUMNS.keys() & set(columns):
            raise ValueError(f"{options.photos}: needs {options.column!r} and none of {[*COLUMNS]}, has {columns}")
        photos = ray.data.read_parquet(options.photos)
    else:
        suffixes = sorted(SUFFIXES | UNSUPPORTED_SUFFIXES.keys())  # what Pillow cannot read gets a row too
        photos = ray.data.read_binary_files(options.photos, include_paths=True, file_extensions=suffixes)
    classified = photos.map_batches(
        PhotoClassifier,
        fn_constructor_args=(options,),
        batch_size=READ_AHEAD * options.batch_size,
        batch_format="pyarrow",
        num_cpus=options.cpus,
        num_gpus=options.gpus,
        resources={"TPU": options.tpus} if options.tpus else None,  # Ray refuses 0
    )
    try:
        classified.write_parquet(options.results)
    except ray.exceptions.ActorDiedError as error:  # an unknown model, for example; the reason is the last line
        raise ValueError(str(error).strip().split("\n")[-1]) from error
    written = pyarrow.dataset.dataset(options.results)
    failed = written.count_rows(filter=pyarrow.dataset.field("error").is_valid())
    print(f"{written.count_rows()} photos in {options.results}, {failed} of them not readable: see the column error")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Options, args=words))))
