"""Dual Path Networks (Chen et al., NIPS 2017, arXiv 1707.01629): the network of the paper's Table 1.

Its blocks, the paper's Figure 2, are in `dpn_jax.blocks`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx

from dpn_jax.blocks import DualPath, DualPathBlock, Stem, join_paths, pool_and_classify
from dpn_jax.config import DPNConfig, FeatureInfo
from dpn_jax.layers import Conv, NormAct, initialized_together
from dpn_jax.operations import PLAIN, Operations, check_arguments
from dpn_jax.pretrained import Provenance, get_config

Indices = int | Sequence[int] | None


class DPN(nnx.Module):
    """A Dual Path Network: images `[B, H, W, in_channels]` -> logits `[B, num_classes]`.

    Made in training mode, like every NNX module; `model.eval()` switches to the running statistics, without dropout.

    Args:
      config: the architecture.
      block: makes a block, called as `block(stage, index, split_expand=, norm=, operations=, dtype=, param_dtype=,
        rngs=)` with a `StageConfig` and the block's number; a class such as a subclass of `DualPathBlock`.
      norm: makes a norm, see `DualPathBlock`; a class such as a subclass of `NormAct`.
      operations: the functions that the layers use, see `dpn_jax.operations`.
      dtype: dtype of the arithmetic and of the results.
      param_dtype: dtype of the parameters and the running statistics.
      remat: recompute each block's activations in the backward pass instead of keeping them: less memory, more time.
      rngs: streams `params` (initial values) and, where `drop_rate` is not 0, `dropout`. None leaves every parameter
        abstract (`jax.ShapeDtypeStruct`), to be filled in on loading.

    Raises:
      ValueError: `block` or `norm` is not a class of `nnx.Module`, or gives other shapes than the network needs; a
        dtype is not floating-point; `rngs` is no `nnx.Rngs`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> config = DPNConfig(depths=(1, 1), dense_increments=(4, 4), bottleneck_width=8, groups=4, residual_width=8)
      >>> model = DPN(config.replace(num_classes=5), rngs=nnx.Rngs(0))
      >>> nnx.jit(lambda model, images: model(images))(model, jnp.zeros((2, 32, 32, 3))).shape
      (2, 5)

    Source: paper Table 1; `timm.models.dpn.DPN`.
    """

    def __init__(
        self,
        config: DPNConfig,
        *,
        block: Callable[..., nnx.Module] = DualPathBlock,
        norm: Callable[..., nnx.Module] = NormAct,
        operations: Operations = PLAIN,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs | None,
    ) -> None:
        check_arguments(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        _check_class("block", block)
        _check_class("norm", norm)
        options = {"operations": operations, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        with initialized_together(self, rngs):
            self.stem = Stem(config, norm=norm, **options)
            self.stages = nnx.List(
                nnx.List(
                    block(stage, index, split_expand=config.split_expand, norm=norm, **options)
                    for index in range(stage.depth)
                )
                for stage in config.stages
            )
            self.norm = norm(config.num_features, activation=config.outer_activation, **options)
            self.dropout = nnx.Dropout(config.drop_rate, rngs=rngs if config.drop_rate else None)
            self.classifier = nnx.data(_classifier(config, **options))
        self.config = config
        self.provenance = Provenance()
        self.operations = operations
        self.dtype = jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        self.remat = remat
        if (block, norm) != (DualPathBlock, NormAct):
            _check_shapes(self)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Classifies images.

        Args:
          images: `[B, H, W, in_channels]`, normalized floats, any size, rounded up at each stride.

        Returns:
          Logits `[B, num_classes]`; with `global_pool=""` `[B, H/32, W/32, num_classes]`; with `num_classes=0` the
          pooled features.

        Raises:
          ValueError: the shape or the dtype of the images does not fit.
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: jax.Array) -> jax.Array:
        """The features after the last norm and activation.

        Args:
          images: as for `__call__`.

        Returns:
          `[B, H/32, W/32, num_features]`, sizes rounded up; with `output_stride` 16 or 8 divided by that.
        """
        x = self.operations.max_pool(self.stem(self._checked(images)))
        for stage in self.stages:
            x = self._run(stage, x)
        return join_paths(self.norm(x))

    def forward_head(self, features: jax.Array, *, pre_logits: bool = False) -> jax.Array:
        """Pools and classifies features.

        Args:
          features: `[B, H, W, num_features]` from `forward_features`.
          pre_logits: stop after pooling (and dropout).

        Returns:
          `[B, num_classes]`, or `[B, head_features]` for `pre_logits` or where there is no classifier; with
          `global_pool=""` the two middle axes stay.

        Raises:
          ValueError: the features are smaller than `test_time_pool`.
        """
        classifier = None if pre_logits else self.classifier
        return pool_and_classify(features, self.config, classifier, dropout=self.dropout)

    @overload
    def forward_intermediates(
        self, images: jax.Array, indices: Indices = None, *, intermediates_only: Literal[False] = False, **options: bool
    ) -> tuple[jax.Array, list[jax.Array]]: ...

    @overload
    def forward_intermediates(
        self, images: jax.Array, indices: Indices = None, *, intermediates_only: Literal[True], **options: bool
    ) -> list[jax.Array]: ...

    def forward_intermediates(
        self,
        images: jax.Array,
        indices: Indices = None,
        *,
        norm: bool = False,
        stop_early: bool = False,
        intermediates_only: bool = False,
    ) -> list[jax.Array] | tuple[jax.Array, list[jax.Array]]:
        """The features along the way, as for a detector or a segmentation network.

        Args:
          images: as for `__call__`.
          indices: which ones, see `feature_info`; 0 is the stem (before its max-pool) and 1, 2, ... the stages.
            Negative ones count from the end, an integer n takes the last n, None takes all. They come in the network's
            order.
          norm: apply the final norm and activation to the last stage's features.
          stop_early: compute nothing after the last one wanted.
          intermediates_only: return only the list.

        Returns:
          `(features, intermediates)`: features as from `forward_features` (where `stop_early` stopped before the last
          stage, the last intermediate computed) and a list of `[B, h, w, c]`; or the list alone.

        Raises:
          ValueError: an index is out of range.

        Source: `timm.models.dpn.DPN.forward_intermediates`.
        """
        wanted = _take_indices(indices, len(self.stages) + 1)
        stages = self.stages[: max(wanted)] if stop_early else self.stages
        taken: list[jax.Array] = []

        x = self.stem(self._checked(images))
        if 0 in wanted:
            taken.append(x)
        if stages:
            x = self.operations.max_pool(x)
        for number, stage in enumerate(stages, start=1):
            x = self._run(stage, x)
            raw = x
            if number == len(self.stages):
                x = self.norm(x)
            if number in wanted:
                taken.append(join_paths(x if norm else raw))
        return taken if intermediates_only else (join_paths(x), taken)

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """The index, the channels and the reduction of each map of `forward_intermediates`."""
        return self.config.feature_info

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, *, rngs: nnx.Rngs | None = None
    ) -> None:
        """Replaces the classifier with a fresh one.

        Args:
          num_classes: its width; 0 removes it.
          global_pool: another pool; None keeps the current one.
          rngs: stream `params` for the initial values; needed unless `num_classes` is 0.

        Raises:
          ValueError: a bad number or pool, or no `rngs`.
        """
        if num_classes and rngs is None:
            raise ValueError("reset_classifier needs rngs=nnx.Rngs(seed) for the new classifier's initial values")
        pool = self.config.global_pool if global_pool is None else global_pool
        self.config = self.config.replace(num_classes=num_classes, global_pool=pool)
        self.provenance = self.provenance._replace(class_names=None)
        options = {"operations": self.operations, "dtype": self.dtype, "param_dtype": self.param_dtype}
        self.classifier = nnx.data(_classifier(self.config, rngs=rngs, **options))

    def set_view(self, operations: Operations | None = None) -> None:
        """For `nnx.view`: other operations.

        Args:
          operations: None keeps those that it has.
        """
        self.operations = operations or self.operations

    def _run(self, stage: nnx.List[DualPathBlock], x: DualPath | jax.Array) -> DualPath:
        for block in stage:
            x = _call_remat(block, x) if self.remat else block(x)
        return x

    def _checked(self, images: jax.Array) -> jax.Array:
        self.config.check_images(images.shape, images.dtype)
        return images.astype(self.dtype)


def create_model(
    name: str | DPNConfig,
    *,
    block: Callable[..., nnx.Module] = DualPathBlock,
    norm: Callable[..., nnx.Module] = NormAct,
    dtype: jax.typing.DTypeLike = jnp.float32,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    rngs: nnx.Rngs | None = None,
    **changes: object,
) -> DPN:
    """A freshly initialized DPN, in training mode.

    Args:
      name: a variant ('dpn92'), a pretrained tag (its architecture only; weights come from `from_pretrained`) or a
        config.
      block, norm, dtype, param_dtype, remat: see `DPN`.
      rngs: see `DPN`; defaults to `nnx.Rngs(0)`.
      changes: any field of `DPNConfig`, such as `num_classes`, `in_channels`, `global_pool` or `drop_rate`.

    Raises:
      ValueError: an unknown name or a field out of its range.
      TypeError: a keyword that is not a field of `DPNConfig`.

    Example:
      >>> model = create_model("dpn68", num_classes=10, depths=(1, 1, 1, 1))
      >>> model.config.num_features
      704
    """
    config = name if isinstance(name, DPNConfig) else get_config(name)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    options = {"block": block, "norm": norm, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return DPN(config.replace(**changes), **options, rngs=rngs)


@nnx.remat
def _call_remat(block: DualPathBlock, x: DualPath | jax.Array) -> DualPath:
    return block(x)


def _classifier(config: DPNConfig, **options: Any) -> Conv | None:
    if not config.num_classes:
        return None
    # a 1x1 convolution, so that it can also classify every position of a map (global_pool="", test_time_pool)
    return Conv(config.head_features, config.num_classes, use_bias=True, **options)


def _check_class(name: str, given: object) -> None:
    kind = given.func if isinstance(given, functools.partial) else given
    if not (isinstance(kind, type) and issubclass(kind, nnx.Module)):
        raise ValueError(f"{name} must be a class of nnx.Module (or a functools.partial of one), got {given!r}")


def _check_shapes(model: DPN) -> None:
    """Refuses custom blocks and norms that give other shapes than the network needs."""

    def check(name: str, module: nnx.Module, x: Any, expected: Any) -> Any:
        got = nnx.eval_shape(lambda module, x: module(x), module, x)
        if [leaf.shape for leaf in jax.tree.leaves(got)] != [leaf.shape for leaf in jax.tree.leaves(expected)]:
            shapes = [[list(leaf.shape) for leaf in jax.tree.leaves(tree)] for tree in (got, expected)]
            raise ValueError(f"{name} {type(module).__name__} gives shapes {shapes[0]}, the network needs {shapes[1]}")
        return got

    def spec(size: int, channels: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2, size, size, channels), model.dtype)

    size = 2 ** len(model.stages)
    x: Any = spec(size, model.config.stem_features)
    check("norm", model.stem.norm, x, x)
    for stage, sizes in zip(model.stages, model.config.stages, strict=True):
        size //= sizes.stride
        for index, block in enumerate(stage):
            dense = sizes.block_in_channels(index + 1) - sizes.residual
            x = check("block", block, x, DualPath(spec(size, sizes.residual), spec(size, dense)))
    check("norm", model.norm, x, x)


def _take_indices(indices: Indices, count: int) -> set[int]:
    """`timm.models._features.feature_take_indices`, as a set."""
    if indices is None:
        indices = count
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"indices, as the last n, must be 1 to {count}, got {indices}")
        return set(range(count - indices, count))
    if not indices or not all(-count <= index < count for index in indices):
        raise ValueError(f"indices must be in {-count} to {count - 1}, at least one, got {list(indices)}")
    return {index % count for index in indices}
