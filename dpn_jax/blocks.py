"""The parts of the network, to be read alongside the paper's Figure 2 (Chen et al., NIPS 2017, arXiv 1707.01629).

Every block carries two tensors. It reads both, *adds* to the residual path and *appends* to the dense path:
features are reused as in a ResNet and explored as in a DenseNet.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dpn_jax.config import DPNConfig, StageConfig
from dpn_jax.layers import Conv, NormAct, NormActConv, global_pool, initialized_together, window_average
from dpn_jax.operations import PLAIN, Operations


class DualPath(NamedTuple):
    """What flows between the blocks of a stage."""

    residual: jax.Array
    """`[B, H, W, R]`: blocks add to it."""
    dense: jax.Array
    """`[B, H, W, D]`: blocks append to it."""


class Stem(nnx.Module):
    """A strided convolution, norm and activation: `[B, H, W, in_channels]` -> `[B, H/2, W/2, stem_features]`.

    Args:
      config: the architecture.
      norm, options: as for `DualPathBlock`.
    """

    def __init__(self, config: DPNConfig, *, norm: Callable[..., nnx.Module] = NormAct, **options: Any) -> None:
        self.conv = Conv(config.in_channels, config.stem_features, kernel_size=config.stem_kernel, stride=2, **options)
        self.norm = norm(config.stem_features, activation=config.outer_activation, **options)

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B, H, W, C]` to `[B, H / 2, W / 2, stem_features]`, rounded up."""
        return self.norm(self.conv(images))


class Expand(nnx.Module):
    """A block's last unit: what it adds to the residual path and what it appends to the dense path.

    One 1x1 convolution whose result is split or, in the `b` variants, two of them behind one norm.

    Args:
      stage: the stage's sizes.
      split: whether there are two convolutions.
      norm, options: as for `DualPathBlock`.
    """

    def __init__(
        self, stage: StageConfig, *, split: bool, norm: Callable[..., nnx.Module] = NormAct, **options: Any
    ) -> None:
        self.norm = norm(stage.bottleneck, **options)
        if split:
            self.residual = Conv(stage.bottleneck, stage.residual, **options)
            self.dense = Conv(stage.bottleneck, stage.increment, **options)
        else:
            self.conv = Conv(stage.bottleneck, stage.residual + stage.increment, **options)
        self.split = split
        self.residual_channels = stage.residual

    def __call__(self, x: jax.Array) -> DualPath:
        """`[B, H, W, bottleneck]` to what is added and what is appended."""
        x = self.norm(x)
        if self.split:
            return DualPath(self.residual(x), self.dense(x))
        return split_paths(self.conv(x), self.residual_channels)

    @property
    def convolutions(self) -> tuple[Conv, ...]:
        """The one or two convolutions, in the order of their outputs."""
        return (self.residual, self.dense) if self.split else (self.conv,)


class DualPathBlock(nnx.Module):
    """One micro-block of the paper's Figure 2 (d): 1x1 reduce, grouped 3x3, 1x1 expand.

    The first block of a stage projects what it reads with `shortcut` to start both paths anew.

    Args:
      stage: the stage's sizes.
      index: number of the block in its stage, from 0.
      split_expand: see `DPNConfig`.
      norm: called as `norm(channels, **options)`, also with `activation=` for the stem's and the last one.
      operations: the functions to use, see `dpn_jax.operations`.
      rngs: source of the initial values; None leaves them abstract.
      options: `dtype` and `param_dtype`, see `DPN`.

    Source: paper Section 4.2; `timm.models.dpn.DualPathBlock`.
    """

    def __init__(
        self,
        stage: StageConfig,
        index: int,
        *,
        split_expand: bool,
        norm: Callable[..., nnx.Module] = NormAct,
        operations: Operations = PLAIN,
        rngs: nnx.Rngs | None,
        **options: Any,
    ) -> None:
        channels, width, out = stage.block_in_channels(index), stage.bottleneck, stage.residual + 2 * stage.increment
        stride, dilation = stage.block_steps(index)
        options = {"norm": norm, "operations": operations, "rngs": rngs, **options}
        with initialized_together(self, rngs):
            self.shortcut = NormActConv(channels, out, stride=stride, **options) if index == 0 else None
            self.reduce = NormActConv(channels, width, **options)
            self.grouped = NormActConv(
                width, width, kernel_size=3, stride=stride, dilation=dilation, groups=stage.groups, **options
            )
            self.expand = Expand(stage, split=split_expand, **options)
        self.residual_channels = stage.residual
        self.operations = operations

    def __call__(self, x: DualPath | jax.Array) -> DualPath:
        """Maps both paths (or the stem's output) to both paths, `[B, H', W', C]` each."""
        kept, x = self.operations.fork(x)
        residual, dense = self.project(kept)
        added, appended = self.expand(self.grouped(self.reduce(x)))
        return DualPath(residual + added, jnp.concatenate([dense, appended], axis=-1))

    def project(self, x: DualPath | jax.Array) -> DualPath:
        """The paths to add to and append to: the input, or its projection in a stage's first block."""
        return x if self.shortcut is None else split_paths(self.shortcut(x), self.residual_channels)

    def set_view(self, operations: Operations | None = None) -> None:
        """For `nnx.view`: other operations."""
        self.operations = operations or self.operations


def split_paths(x: jax.Array, residual_channels: int) -> DualPath:
    """Splits a concatenated map: the first channels are the residual path's."""
    # jnp.split, not two slices: its gradient is one concatenation, where that of two slices is a sum of padded maps
    return DualPath(*jnp.split(x, [residual_channels], axis=-1))


def join_paths(x: DualPath | jax.Array) -> jax.Array:
    """Both paths as one map `[B, H, W, R + D]`, residual first, as timm carries them."""
    return jnp.concatenate(x, axis=-1) if isinstance(x, DualPath) else x


def pool_and_classify(
    features: jax.Array,
    config: DPNConfig,
    classify: Callable[[jax.Array], jax.Array] | None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """The head: pools `[B, H, W, C]`, then calls the 1x1 convolution `classify`; in reverse with `test_time_pool`."""
    if config.test_time_pool:
        # timm's TestTimePoolHead: overlapping windows the size of the training features, each classified
        x = window_average(features, config.test_time_pool)
        return global_pool(x if classify is None else classify(x), "avgmax")[:, 0, 0]
    x = global_pool(features, config.global_pool)
    x = x if dropout is None else dropout(x)
    x = x if classify is None else classify(x)
    return x[:, 0, 0] if config.global_pool else x
