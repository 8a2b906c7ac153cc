"""Converts timm's weights to ours: `python -m convert.timm_to_flax SOURCE DESTINATION`.

Does what `dpn-jax convert --to flax` does, and also gets weights through timm: `timm:dpn92.mx_in1k` is
`timm.create_model("dpn92.mx_in1k", pretrained=True)`, with timm's cache, URLs and local overrides.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from convert.command import run
from convert.timm_import import import_timm
from dpn_jax.checkpoint.save import convert
from dpn_jax.cli.options import option
from dpn_jax.errors import shown


def main(
    source: Annotated[str, tyro.conf.Positional, option("SOURCE")],
    destination: Annotated[Path, tyro.conf.Positional, option("DESTINATION")],
    /,
    model: Annotated[str | None, option("VARIANT", "that of SOURCE")] = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    untrained: bool = False,
) -> None:
    """Convert timm's weights to ours.

    Args:
      source: A file (.safetensors, .pth, .bin), a tag, a hub id, or timm:NAME for weights from timm.
      destination: The .safetensors file to write.
      model: The architecture.
      force: Overwrite an existing DESTINATION.
      allow_nonfinite: Accept weights with NaN, infinity or negative variances.
      untrained: With timm:NAME, use timm's random initialization, which needs no network.
    """
    with tempfile.TemporaryDirectory() as folder:
        if source.startswith("timm:"):
            source = _save_from_timm(source.removeprefix("timm:"), Path(folder), pretrained=not untrained)
        read = convert(source, destination, to="flax", model=model, overwrite=force, allow_nonfinite=allow_nonfinite)
    print(f"{shown(destination)}: {len(read.tensors)} tensors; check it with: python -m convert.verify {destination}")


def _save_from_timm(name: str, folder: Path, *, pretrained: bool) -> Path:
    """Creates a model with timm and saves it in the hub's layout."""
    import safetensors.torch

    model = import_timm().create_model(name, pretrained=pretrained)
    checkpoint = folder / f"timm:{name}"
    checkpoint.mkdir()
    safetensors.torch.save_file(model.state_dict(), checkpoint / "model.safetensors", metadata={"format": "pt"})
    config = {"architecture": model.pretrained_cfg["architecture"], "pretrained_cfg": model.pretrained_cfg}
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


if __name__ == "__main__":
    sys.exit(run(main))
