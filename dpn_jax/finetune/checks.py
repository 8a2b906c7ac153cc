"""Which images of a folder cannot be read, found before the first epoch."""

import contextlib
import dataclasses
import math

from dpn_jax.errors import ImageError
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.images.sources import prepared
from dpn_jax.images.splits import ImageFolder
from dpn_jax.images.transform import Transform
from dpn_jax.images.workers import prefetched, refuse_in_starting_worker
from dpn_jax.pretrained import Preprocessing

_FILES_PER_CHECK = 32


def find_broken(folder: ImageFolder, config: FinetuneConfig, preprocessing: Preprocessing) -> dict[str, str]:
    """Reads every image once, in `config.workers` processes, and finds those that cannot be read or cropped.

    Args:
      folder: the images.
      config: only `workers` is used.
      preprocessing: as for `batches`.

    Returns:
      The reason for each broken file, one line that names it; `folder.without(...)` removes them.

    Raises:
      DataError: a worker died.
    """
    refuse_in_starting_worker()
    with contextlib.closing(prefetched(_Checks(folder, Transform(preprocessing)), config.workers)) as found:
        return {file: reason for checked in found for file, reason in checked}


@dataclasses.dataclass(frozen=True)
class _Checks:
    """The broken files among each few files, by index."""

    folder: ImageFolder
    transform: Transform

    def __len__(self) -> int:
        return math.ceil(len(self.folder) / _FILES_PER_CHECK)

    def __getitem__(self, index: int) -> list[tuple[str, str]]:
        broken = []
        start = index * _FILES_PER_CHECK
        for number in range(start, min(start + _FILES_PER_CHECK, len(self.folder))):
            try:
                prepared(self.folder, number, self.transform.crop)
            except ImageError as error:
                broken.append((self.folder.files[number], str(error)))
        return broken
