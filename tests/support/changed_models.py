"""Models that a researcher changed, each in another way; all have randomized statistics and are in eval mode."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpn_jax import DPN, create_model
from dpn_jax.blocks import DualPath, DualPathBlock
from dpn_jax.config import StageConfig
from dpn_jax.layers import NormAct
from tests.support.models import TINY, randomize

CHANGED = ("squeeze-excite after expand", "squeeze-excite between", "activation", "norm", "head", "linear head")


class Gate(nnx.Module):
    """Squeeze-excite: a weight for each channel, from all pixels."""

    def __init__(self, channels: int, *, ratio: int = 4, rngs: nnx.Rngs) -> None:
        self.squeeze = nnx.Linear(channels, max(channels // ratio, 1), rngs=rngs)
        self.excite = nnx.Linear(max(channels // ratio, 1), channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * nnx.sigmoid(self.excite(nnx.relu(self.squeeze(x.mean(axis=(1, 2), keepdims=True)))))


class SqueezeExciteBlock(DualPathBlock):
    """Gates between the grouped convolution and `expand`."""

    def __init__(self, stage: StageConfig, index: int, *, ratio: int = 4, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(stage, index, rngs=rngs, **options)
        self.gate = Gate(stage.bottleneck, ratio=ratio, rngs=rngs)

    def __call__(self, x: DualPath | jax.Array) -> DualPath:
        kept, x = self.operations.fork(x)
        paths = self.project(kept)
        added, appended = self.expand(self.gate(self.grouped(self.reduce(x))))
        return DualPath(paths.residual + added, jnp.concatenate([paths.dense, appended], axis=-1))


class SqueezeExciteAfter(DualPathBlock):
    """Gates the residual path after the block."""

    def __init__(self, stage: StageConfig, index: int, *, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(stage, index, rngs=rngs, **options)
        self.gate = Gate(stage.residual, rngs=rngs)

    def __call__(self, x: DualPath | jax.Array) -> DualPath:
        residual, dense = super().__call__(x)
        return DualPath(self.gate(residual), dense)


class Halved(NormAct):
    """The same names and shapes, other values."""

    def __call__(self, x: Any) -> Any:
        return jax.tree.map(lambda part: part / 2, super().__call__(x))


class OwnHead(DPN):
    """Classifies the largest features."""

    def forward_head(self, features: jax.Array, *, pre_logits: bool = False) -> jax.Array:
        return super().forward_head(features.max(axis=(1, 2), keepdims=True), pre_logits=pre_logits)


def changed_model(name: str, seed: int = 0) -> DPN:
    """One of `CHANGED`."""
    config, rngs = TINY.replace(drop_rate=0.1), nnx.Rngs(seed)
    match name:
        case "squeeze-excite after expand":
            model = create_model(config, block=SqueezeExciteAfter, rngs=rngs)
        case "squeeze-excite between":
            model = create_model(config, block=SqueezeExciteBlock, rngs=rngs)
        case "head":
            model = OwnHead(config, rngs=rngs)
        case _:
            model = create_model(config, rngs=rngs)
    if name == "activation":
        model.stages[0][0].expand.norm.activation = "silu"
    if name == "norm":
        model.stages[0][0].expand.norm = Halved(TINY.stages[0].bottleneck, rngs=rngs)
    if name == "linear head":
        model.classifier = nnx.Linear(TINY.num_features, TINY.num_classes, rngs=rngs)
    return randomize(model, seed=seed)
