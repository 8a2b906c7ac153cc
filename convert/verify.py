"""Compares our model with timm's on your weights: `python -m convert.verify CHECKPOINT [PHOTO...]`.

Both models load the checkpoint and run on the same input; the table has the error after every stage.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import dpn_jax
from convert.command import run
from convert.timm_import import create_timm_model
from dpn_jax.checkpoint.open import open_checkpoint
from dpn_jax.checkpoint.save import convert
from dpn_jax.cli.options import option
from dpn_jax.config import variant_of
from dpn_jax.images.transform import Transform
from dpn_jax.pretrained import default_preprocessing

BOUNDS = {"float64": 1e-10, "float32": 1e-5}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tensor of the forward pass in both models.

    Args:
      name: the tensor.
      shape: `[B, ...]`, channels last.
      relative: L2 norm of the difference divided by that of timm's tensor.
      largest: largest absolute difference of an element.
    """

    name: str
    shape: tuple[int, ...]
    relative: float
    largest: float

    def within(self, bound: float) -> bool:
        """Whether the relative error is a number and at most `bound`."""
        return self.relative <= bound


def compare(checkpoint: str | Path, images: np.ndarray, dtype: str, *, model: str | None = None) -> list[Comparison]:
    """Runs a checkpoint in both models, in eval mode.

    Args:
      checkpoint: timm's file or ours, a tag or a hub id.
      images: `[B, H, W, C]`, normalized.
      dtype: 'float32' or 'float64', of weights and arithmetic.
      model: the architecture; defaults to that of the checkpoint.

    Returns:
      One comparison each of the stem, the stages, the features, the pooled features, the logits and the top-5 classes.
    """
    import safetensors.torch
    import torch

    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        ours = dpn_jax.from_pretrained(checkpoint, model=model, dtype=dtype, param_dtype=dtype)
        theirs = create_timm_model(ours.config).to(getattr(torch, dtype))  # before loading, which would round float64
        with tempfile.TemporaryDirectory() as folder:
            timm_file = Path(folder) / "timm.safetensors"
            convert(checkpoint, timm_file, to="timm", model=model)
            theirs.load_state_dict(safetensors.torch.load_file(timm_file), strict=True)
        got = dict(_named(*_forward(ours, jnp.asarray(images, dtype))))
        with torch.no_grad():
            batch = torch.from_numpy(images).permute(0, 3, 1, 2).to(getattr(torch, dtype))
            features, stages = theirs.forward_intermediates(batch)
            pooled = theirs.forward_head(features, pre_logits=True)
            expected = dict(_named(features, stages, pooled, theirs.forward_head(features)))
        rows = [_compare(name, np.asarray(got[name]), value.numpy()) for name, value in expected.items()]
        return [*rows, _compare_top5(np.asarray(got["logits"]), expected["logits"].numpy())]


@nnx.jit
def _forward(model: dpn_jax.DPN, images: jax.Array) -> tuple[jax.Array, list[jax.Array], jax.Array, jax.Array]:
    features, stages = model.forward_intermediates(images)
    return features, stages, model.forward_head(features, pre_logits=True), model.forward_head(features)


def _named(features: object, stages: list[object], pooled: object, logits: object) -> Iterator[tuple[str, object]]:
    yield "stem", stages[0]
    for number, stage in enumerate(stages[1:], start=1):
        yield f"stage {number}", stage
    yield from (("features", features), ("pooled", pooled), ("logits", logits))


def _compare_top5(ours: np.ndarray, theirs: np.ndarray) -> Comparison:
    """Counts the positions at which the top-5 classes differ."""
    best = [np.argsort(-logits, axis=1, kind="stable")[:, :5] for logits in (ours, theirs)]
    different = float((best[0] != best[1]).sum())
    return Comparison("top-5", best[0].shape, different / best[0].size, different)


def _compare(name: str, ours: np.ndarray, theirs: np.ndarray) -> Comparison:
    theirs = theirs.transpose(0, 2, 3, 1) if theirs.ndim == 4 else theirs
    if ours.shape != theirs.shape:
        return Comparison(name, ours.shape, np.inf, np.inf)
    difference = np.asarray(ours, np.float64) - theirs
    relative = float(np.linalg.norm(difference) / max(np.linalg.norm(theirs), np.finfo(theirs.dtype).tiny))
    return Comparison(name, ours.shape, relative, float(np.abs(difference).max()))


def main(
    checkpoint: Annotated[str, tyro.conf.Positional, option("CHECKPOINT")],
    photos: Annotated[tuple[Path, ...], tyro.conf.Positional, option("[PHOTO...]", "two images of noise")] = (),
    /,
    model: Annotated[str | None, option("VARIANT", "that of CHECKPOINT")] = None,
    size: Annotated[int | None, option("PIXELS", "that of CHECKPOINT")] = None,
    seed: int = 0,
) -> int:
    """Compare our model with timm's on a checkpoint.

    Args:
      checkpoint: timm's file or ours, a tag or a hub id.
      photos: Photos to run on.
      model: The architecture.
      size: Side of the images.
      seed: Seed of the noise.
    """
    opened = open_checkpoint(Path(checkpoint) if Path(checkpoint).exists() else checkpoint, model=model)
    settings = opened.provenance.preprocessing or default_preprocessing(opened.config)
    if size is not None:
        settings = dataclasses.replace(settings, image_size=size)
    if photos:
        transform = Transform(settings)
        images = np.stack([transform(photo) for photo in photos])
    else:
        shape = (2, settings.height, settings.width, opened.config.in_channels)
        images = np.random.default_rng(seed).normal(size=shape)
    print(f"{checkpoint}: {variant_of(opened.config) or 'custom DPN'}, images {list(images.shape)}")

    agrees = True
    for dtype, bound in BOUNDS.items():
        print(f"\n{dtype:<10} {'shape':<22} {'relative error':>15} {'largest error':>15}")
        for row in compare(checkpoint, images, dtype, model=model):
            agrees &= row.within(bound)
            mark = "" if row.within(bound) else f"  above {bound:g}"
            print(f"{row.name:<10} {list(row.shape)!s:<22} {row.relative:>15.2e} {row.largest:>15.2e}{mark}")
    print(f"\n{'equal to timm' if agrees else 'NOT EQUAL to timm'} (bounds: {BOUNDS})")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(run(main))
