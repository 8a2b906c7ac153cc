"""`dpn-jax embed`."""

import contextlib
import dataclasses
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from dpn_jax.checkpoint.write import writable_path, write_atomically
from dpn_jax.cli.classify import found_photos
from dpn_jax.cli.options import ClassifierOptions, option
from dpn_jax.cli.output import DONE, NOTHING_DONE, SOME_FAILED, note, progress
from dpn_jax.errors import DataError, ImageError, printable, shown
from dpn_jax.paths import local_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embed(ClassifierOptions):
    """Write the features of photos, for linear probes and retrieval."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional, option("IMAGE_OR_FOLDER...", hint="(required)")]
    """Photos, folders of photos, or folders that `dpn-jax pack` has written."""
    output: Annotated[str, option("FILE", hint="(required)")]
    """The file to write: .npz has arrays `features` [N, C], float32, and `files` [N]; .parquet columns `file` and
    `features`, and needs pyarrow."""
    force: bool = False
    """Overwrite an existing FILE."""

    def run(self) -> int:
        """Embeds the images, then writes the file."""
        path = self._checked_output()
        if (self.coordinator, self.processes, self.process_index, self.distributed) != (None, None, None, False):
            raise ValueError("dpn-jax embed runs in one process; run one for each part of the images")
        self.check()
        photos, failures = found_photos(self.images)
        if not photos:
            return NOTHING_DONE
        classifier = self.classifier()
        files: list[str] = []
        rows: list[np.ndarray] = []
        prepared = photos.are_crops(classifier.transform)
        with contextlib.closing(classifier.stream_features(photos, prepared=prepared, total=len(photos))) as features:
            for name, row in zip(photos.names, progress(features, len(photos), "image"), strict=True):
                if isinstance(row, ImageError):
                    failures += 1
                    note(str(row))
                else:
                    files.append(name)
                    rows.append(row)
        if not rows:
            return NOTHING_DONE
        table = np.stack(rows)
        write_atomically(path, [_parquet(files, table) if path.suffix == ".parquet" else _npz(files, table)])
        print(f"{printable(path)}: features of {len(files)} images, {table.shape[1]} each")
        return SOME_FAILED if failures else DONE

    def _checked_output(self) -> Path:
        local_path(self.output, error=DataError)
        path = writable_path(self.output, overwrite=self.force, error=DataError)
        if not path.parent.is_dir():
            raise DataError(f"{shown(path.parent)}: no such folder")
        if path.suffix not in (".npz", ".parquet"):
            raise ValueError(f"--output {shown(path)}: the name must end in .npz or .parquet")
        if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise DataError(f"{shown(path)}: pyarrow writes Parquet: pip install pyarrow, or name a file .npz")
        if self.exported:
            raise ValueError("--exported gives logits only; use --model or --weights for features")
        return path


def _npz(files: Sequence[str], features: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.savez(content, features=features, files=np.array(files, np.str_))
    return content.getvalue()


def _parquet(files: Sequence[str], features: np.ndarray) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    content = io.BytesIO()
    pq.write_table(pa.table({"file": list(files), "features": values}), content)
    return content.getvalue()
