"""Rewrites timm's weights as one of our files: `python -m convert.timm_to_flax SOURCE DESTINATION`.

What `dpn-jax convert --to flax` does, and also takes weights through timm itself: `timm:dpn92.mx_in1k` is
`timm.create_model("dpn92.mx_in1k", pretrained=True)`, with timm's cache, URLs and local overrides.
"""

import json
import sys
import tempfile
from pathlib import Path

import tyro

from convert.command import run
from convert.timm_import import import_timm
from dpn_jax.checkpoint.save import convert


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
      model: the variant; defaults to the one recognized from the file.
      force: overwrite an existing destination.
      allow_nonfinite: accept NaN, infinity and negative running variances.
      untrained: with timm:NAME, timm's random initial weights, to try things out where there is no network.
    """
    with tempfile.TemporaryDirectory() as folder:
        if source.startswith("timm:"):
            source = _ask_timm(source.removeprefix("timm:"), Path(folder), pretrained=not untrained)
        read = convert(source, destination, to="flax", model=model, overwrite=force, allow_nonfinite=allow_nonfinite)
    print(f"{destination}: {len(read.tensors)} tensors; check it with: python -m convert.verify {destination}")


def _ask_timm(name: str, folder: Path, *, pretrained: bool) -> Path:
    """Has timm make a model, and writes it into a folder as timm would for the hub."""
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
