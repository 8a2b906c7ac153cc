"""Converts our weights to timm's: `python -m convert.flax_to_timm SOURCE DESTINATION`.

Does what `dpn-jax convert --to timm` does, then loads the result into timm's model strictly. A DESTINATION that ends in
`.pth` or `.bin` is written by torch.
"""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from convert.command import run
from convert.timm_import import create_timm_model
from dpn_jax.checkpoint.save import convert
from dpn_jax.cli.options import option
from dpn_jax.errors import CheckpointError, shown


def main(
    source: Annotated[str, tyro.conf.Positional, option("SOURCE")],
    destination: Annotated[Path, tyro.conf.Positional, option("DESTINATION")],
    /,
    force: bool = False,
    allow_nonfinite: bool = False,
) -> None:
    """Convert our weights to timm's, and load them into timm's model.

    Args:
      source: A file that dpn_jax.save or convert.timm_to_flax wrote.
      destination: The file to write: .safetensors, .pth or .bin.
      force: Overwrite an existing DESTINATION.
      allow_nonfinite: Accept weights with NaN, infinity or negative variances.
    """
    import safetensors.torch
    import torch

    if destination.exists() and not force:
        raise CheckpointError(f"{shown(destination)}: exists already; overwrite it with --force")
    with tempfile.TemporaryDirectory(dir=destination.absolute().parent) as folder:
        written = Path(folder) / f"{destination.stem}.safetensors"
        read = convert(source, written, to="timm", allow_nonfinite=allow_nonfinite)
        tensors = safetensors.torch.load_file(written)
        create_timm_model(read.config).load_state_dict(tensors, strict=True)
        if destination.suffix in (".pth", ".bin"):
            written = Path(folder) / destination.name
            torch.save(tensors, written)
        elif destination.suffix != ".safetensors":
            raise ValueError(f"{shown(destination)}: the name must end in .safetensors, .pth or .bin")
        written.replace(destination)
    print(f"{shown(destination)}: {len(tensors)} tensors, loaded strictly by timm")


if __name__ == "__main__":
    sys.exit(run(main))
