"""`dpn-jax convert`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dpn_jax.checkpoint.save import convert
from dpn_jax.cli.options import Command, Dtype, option
from dpn_jax.cli.output import DONE
from dpn_jax.config import variant_of
from dpn_jax.errors import printable


@dataclasses.dataclass(frozen=True)
class Convert(Command):
    """Convert weights from timm's layout to Flax's, or back."""

    source: Annotated[str, tyro.conf.Positional, option("SOURCE")]
    """A file (.pth and .bin need torch), a folder with config.json and weights, a tag or a hub id."""
    destination: Annotated[str, tyro.conf.Positional, option("DESTINATION")]
    """The .safetensors file to write."""
    to: Annotated[Literal["flax", "timm"] | None, option("{flax,timm}", "the one that SOURCE is not in")] = None
    """The layout to write."""
    model: Annotated[str | None, option("VARIANT", "that of SOURCE")] = None
    """The architecture."""
    dtype: Annotated[Dtype | None, option("{float32,bfloat16,float16}", "that of SOURCE")] = None
    """Dtype of the weights to write."""
    revision: Annotated[str | None, option("REVISION")] = None
    """Branch, tag or commit on the hub."""
    force: bool = False
    """Overwrite an existing DESTINATION."""
    allow_nonfinite: bool = False
    """Accept weights with NaN, infinity or negative variances."""

    def run(self) -> int:
        """Converts and prints what was written."""
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
        print(
            f"{printable(self.destination)}: {variant}, {len(read.tensors)} tensors in {layout} layout, {size:,} bytes"
        )
        return DONE
