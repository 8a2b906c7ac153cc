"""`dpn-jax pack`."""

import contextlib
import dataclasses
import signal
import sys
from typing import Annotated

import tyro

from dpn_jax.cli.options import DEFAULT_TAG, Command, option
from dpn_jax.cli.output import DONE, SOME_FAILED, TERMINATED, note, progress
from dpn_jax.errors import printable
from dpn_jax.images.pack import SHARD_SIZE, pack
from dpn_jax.images.transform import preprocessing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack(Command):
    """Pack images into shards (ArrayRecord), which are read faster than files."""

    data: Annotated[str, tyro.conf.Positional, option("DATA")]
    """Holds one folder of images per class; or is a file *.csv with columns image (paths) and label (class names)."""
    destination: Annotated[str, tyro.conf.Positional, option("DESTINATION")]
    """The folder to write. The same command again goes on where it was interrupted, and repairs damaged shards."""
    crops: bool = False
    """Pack resized and cropped pixels, which need no decoding, instead of the photos' own files."""
    model: Annotated[str | None, option("TAG", f"{DEFAULT_TAG}")] = None
    """The pretrained tag whose crop to use, with --crops."""
    image_size: Annotated[int | None, option("PIXELS", "that of the weights")] = None
    """Side of the crops, at least 32."""
    use_test_size: bool = False
    """Use the larger image size that timm tests some weights at."""
    shard_size: int = SHARD_SIZE
    """Images in a shard."""
    workers: int = 2
    """Processes that read images and write shards; 0 uses threads instead."""

    def run(self) -> int:
        """Packs, and prints what was written."""
        if not self.crops and (self.model or self.image_size is not None or self.use_test_size):
            raise ValueError("--model, --image-size and --use-test-size say how to crop: add --crops")
        crops = None
        if self.crops:
            transform = preprocessing(
                self.model or DEFAULT_TAG, use_test_size=self.use_test_size, image_size=self.image_size
            )
            crops = transform.preprocessing
        with contextlib.ExitStack() as stack:
            handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # which ends the workers first
            stack.callback(signal.signal, signal.SIGTERM, handler)
            packed = pack(
                self.data,
                self.destination,
                crops=crops,
                shard_size=self.shard_size,
                workers=self.workers,
                progress=lambda shards, total: progress(shards, total, "shard"),
            )
        for why in packed.broken:
            note(f"skipped: {why}")
        what = "photos" if crops is None else f"crops of {crops.height} x {crops.width} pixels"
        shards = "one shard" if packed.shards == 1 else f"{packed.shards} shards"
        print(f"{printable(self.destination)}: {packed.images} {what} in {shards}, {packed.bytes:,} bytes")
        return SOME_FAILED if packed.broken else DONE
