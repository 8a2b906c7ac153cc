"""The forward pass for inference: `fast_forward`, the same network rearranged, and `PlainForward`, the model as it is.

The two paths stay apart (a 1x1 convolution over both is the sum of two, on kernels that are split once), and the
grouped convolution is written as the backend runs it best, the order of its channels being folded into the kernels
around it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dpn_jax.blocks import DualPath, join_paths, pool_and_classify
from dpn_jax.config import StageConfig
from dpn_jax.fast.fold import Block, Folded, Unit, fold
from dpn_jax.fast.plan import Plan, compiler_options, plan_for
from dpn_jax.layers import ACTIVATIONS
from dpn_jax.model import DPN
from dpn_jax.operations import PLAIN
from dpn_jax.stock import refuse_unknown_features, require_stock, split_in_eval_mode


def fast_forward(model: DPN, *, backend: str | None = None, donate: bool = False) -> "FastForward":
    """A jitted forward pass in eval mode, faster than `jax.jit(model)` and equal to it up to rounding.

    Args:
      model: the model; its parameters are copied, later changes to it are not seen.
      backend: 'cpu', 'gpu' or 'tpu': whose plan to follow; defaults to the default backend's.
      donate: free the model's arrays, block by block, so that parameters are in memory about once, not twice. The
        model cannot be used afterwards.

    Returns:
      A function of images `[B, H, W, C]`, normalized floats, that gives what `model(images)` gives. It compiles once
      for each shape. Its attributes `params` and `apply` (a pure function of params and images) are there for sharding
      and for ahead-of-time compilation.

    Raises:
      ValueError: an unknown backend, or a model that is not stock (see `dpn_jax.stock`).

    Example:
      >>> import dpn_jax, jax.numpy as jnp
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3)
      >>> dpn_jax.fast_forward(model)(jnp.zeros((1, 64, 64, 3))).shape
      (1, 3)
    """
    return FastForward(model, plan_for(backend), compiler_options=compiler_options(backend), donate=donate)


class Forward:
    """A jitted forward pass in eval mode: `params`, and a pure `apply(params, images)`."""

    def __init__(self, params: Any, *, compiler_options: Mapping[str, str] | None = None) -> None:
        self.params = params
        self.compiler_options = dict(compiler_options or {})

    @functools.cached_property
    def jitted(self) -> Callable[[Any, jax.Array], jax.Array]:
        """`apply`, jitted."""
        return jax.jit(self.apply, compiler_options=self.compiler_options)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is compiled, which can be neither copied nor pickled."""
        return {name: value for name, value in vars(self).items() if name != "jitted"}

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to logits `[B, num_classes]`, as the model does."""
        # inside a caller's `jit`, the caller's compiler options apply
        run = self.apply if isinstance(images, jax.core.Tracer) else self.jitted
        return run(self.params, images)

    def apply(self, params: Any, images: jax.Array) -> jax.Array:
        """The forward pass, not jitted."""
        raise NotImplementedError

    def pre_logits(self, params: Any, images: jax.Array) -> jax.Array:
        """The same without the classifier, `[B, head_features]`."""
        raise NotImplementedError


class PlainForward(Forward):
    """The model itself, whatever was changed in it; later changes to it are not seen.

    Raises:
      ValueError: a method was set on an instance, see `stock.refuse_bound_methods`.
    """

    def __init__(self, model: nnx.Module) -> None:
        self.structure, params = split_in_eval_mode(model)
        super().__init__(params)

    def apply(self, params: nnx.State, images: jax.Array) -> jax.Array:
        """The forward pass, not jitted."""
        return nnx.merge(self.structure, params)(images)

    def pre_logits(self, params: nnx.State, images: jax.Array) -> jax.Array:
        """The same without the classifier, `[B, head_features]`.

        Raises:
          ValueError: they are not known, see `stock.refuse_unknown_features`.
        """
        model = nnx.merge(self.structure, params)
        refuse_unknown_features(model)
        return model.forward_head(model.forward_features(images), pre_logits=True)


class FastForward(Forward):
    """What `fast_forward` returns."""

    def __init__(
        self, model: DPN, plan: Plan, *, compiler_options: Mapping[str, str] | None = None, donate: bool = False
    ) -> None:
        require_stock(model, "the fast form", "run the plain form: fast=False, or call the model itself")
        self.config = model.config
        self.plan = plan
        self.dtype = model.dtype
        super().__init__(fold(model, plan, donate=donate), compiler_options=compiler_options)

    def apply(self, params: Folded, images: jax.Array) -> jax.Array:
        """The forward pass, not jitted."""
        self.config.check_images(images.shape, images.dtype)
        activate = ACTIVATIONS[self.config.outer_activation]
        x = activate(PLAIN.convolve(images.astype(self.dtype), params.stem, stride=2) + params.stem_bias)
        x = self._keep(self.plan.operations.max_pool(x))
        for stage, blocks in zip(self.config.stages, params.stages, strict=True):
            for index, block in enumerate(blocks):
                stride, dilation = stage.block_steps(index)
                x = self._block(stage, block, x, stride=stride, dilation=dilation)
        paths = DualPath(
            *(activate(path * scale + shift) for path, (scale, shift) in zip(x, params.norms, strict=True))
        )

        def classify(x: jax.Array) -> jax.Array:
            kernel, bias = params.classifier
            return self._pointwise(x, kernel) + bias

        return pool_and_classify(join_paths(paths), self.config, None if params.classifier is None else classify)

    def pre_logits(self, params: Folded, images: jax.Array) -> jax.Array:
        """The same without the classifier, `[B, head_features]`."""
        return self.apply(params._replace(classifier=None), images)

    def _block(
        self, stage: StageConfig, block: Block, x: DualPath | jax.Array, *, stride: int, dilation: int
    ) -> DualPath:
        paths = x if isinstance(x, DualPath) else (x,)
        residual, dense = x if block.shortcut is None else self._unit(block.shortcut, paths, stride=stride)
        (h,) = self._unit(block.reduce, paths)
        formulation = self.plan.formulation(stage.bottleneck // stage.groups)
        h = formulation.apply(self._keep(nnx.relu(h)), block.grouped, stride=stride, dilation=dilation)
        h = self._keep(nnx.relu(h + block.grouped_bias))
        added, appended = (self._pointwise(h, kernel) for kernel in block.expand)
        return self._keep(DualPath(residual + added, jnp.concatenate([dense, appended], axis=-1)))

    def _unit(self, unit: Unit, paths: tuple[jax.Array, ...], *, stride: int = 1) -> list[jax.Array]:
        # a 1x1 convolution at stride 2 reads every other pixel: nothing is computed on the rest
        paths = [path[:, ::stride, ::stride] for path in paths]
        paths = [nnx.relu(path * scale + shift) for path, (scale, shift) in zip(paths, unit.norms, strict=True)]
        outputs = []
        for kernels in unit.kernels:
            parts = (self._pointwise(path, kernel) for path, kernel in zip(paths, kernels, strict=True))
            total = functools.reduce(jnp.add, parts)
            outputs.append(total if unit.bias is None else total + unit.bias)
        return outputs

    def _pointwise(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return self.plan.operations.convolve(x, kernel[None, None])

    def _keep(self, x: DualPath | jax.Array) -> DualPath | jax.Array:
        return lax.optimization_barrier(x) if self.plan.barriers else x
