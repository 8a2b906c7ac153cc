"""Rewrites one of our files for timm: `python -m convert.flax_to_timm SOURCE DESTINATION`.

What `dpn-jax convert --to timm` does, and then has timm load the result strictly. A DESTINATION that ends in `.pth` or
`.bin` is written by torch.
"""

import sys
import tempfile
from pathlib import Path

import tyro

from convert.command import run
from convert.timm_import import create_timm_model
from dpn_jax.checkpoint.save import convert
from dpn_jax.errors import CheckpointError


def main(
    source: tyro.conf.Positional[str],
    destination: tyro.conf.Positional[Path],
    /,
    force: bool = False,
    allow_nonfinite: bool = False,
) -> None:
    """Rewrite one of our files for timm, and have timm load it.

    Args:
      source: what dpn_jax.save or convert.timm_to_flax wrote.
      destination: the file to write: .safetensors, .pth or .bin.
      force: overwrite an existing destination.
      allow_nonfinite: accept NaN, infinity and negative running variances.
    """
    import safetensors.torch
    import torch

    if destination.exists() and not force:
        raise CheckpointError(f"{destination}: exists already; overwrite it with --force")
    with tempfile.TemporaryDirectory(dir=destination.absolute().parent) as folder:
        written = Path(folder) / f"{destination.stem}.safetensors"
        read = convert(source, written, to="timm", allow_nonfinite=allow_nonfinite)
        tensors = safetensors.torch.load_file(written)
        create_timm_model(read.config).load_state_dict(tensors, strict=True)
        if destination.suffix in (".pth", ".bin"):
            written = Path(folder) / destination.name
            torch.save(tensors, written)
        elif destination.suffix != ".safetensors":
            raise ValueError(f"{destination}: the name must end in .safetensors, .pth or .bin")
        written.replace(destination)
    print(f"{destination}: {len(tensors)} tensors, loaded strictly by timm")


if __name__ == "__main__":
    sys.exit(run(main))
