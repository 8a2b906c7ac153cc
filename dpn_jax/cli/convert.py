"""`dpn-jax convert`."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from dpn_jax.checkpoint.save import convert
from dpn_jax.cli.options import Dtype
from dpn_jax.cli.output import DONE
from dpn_jax.config import variant_of
from dpn_jax.errors import shown


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
    """The variant, when it should not be recognized from the file."""
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
        print(f"{shown(self.destination)}: {variant}, {len(read.tensors)} tensors in {layout} layout, {size:,} bytes")
        return DONE
