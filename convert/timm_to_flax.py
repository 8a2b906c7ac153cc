"""Rewrites timm's weights as one of our files: `python -m convert.timm_to_flax SOURCE DESTINATION`.

What `dpn-jax convert --to flax` does, and also takes weights through timm itself: `timm:dpn92.mx_in1k` is
`timm.create_model("dpn92.mx_in1k", pretrained=True)`, with timm's cache, URLs and local overrides.
"""

import sys
import tempfile
from pathlib import Path

import tyro

from convert.command import run
from convert.timm_import import import_timm
from dpn_jax.checkpoint import convert


def main(
    source: tyro.conf.Positional[str],
    destination: tyro.conf.Positional[Path],
    /,
    model: str | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    untrained: bool = False,
) -> None:
    """Rewrite timm's weights as one of our files.

    Args:
      source: a file (.safetensors, .pth, .bin), a tag, a hub id, or timm:NAME to ask timm.
      destination: the .safetensors file to write.
      model: the variant, when it should not be recognised from the file.
      force: overwrite an existing destination.
      allow_nonfinite: take NaN, infinity and negative running variances.
      untrained: with timm:NAME, timm's random initial weights, to try things out where there is no network.
    """
    with tempfile.TemporaryDirectory() as folder:
        if source.startswith("timm:"):
            import safetensors.torch

            pretrained = import_timm().create_model(source.removeprefix("timm:"), pretrained=not untrained)
            source = str(Path(folder) / f"{source.removeprefix('timm:')}.safetensors")
            safetensors.torch.save_file(pretrained.state_dict(), source, metadata={"format": "pt"})
        read = convert(source, destination, to="flax", model=model, overwrite=force, allow_nonfinite=allow_nonfinite)
    print(f"{destination}: {len(read.file)} tensors; check it with: python -m convert.verify {destination}")


if __name__ == "__main__":
    sys.exit(run(main))
