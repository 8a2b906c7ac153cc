"""The training step's forward pass: `fast_apply`, the model with other operations and other orders of channels."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dpn_jax.fast.plan import Plan, plan_for
from dpn_jax.fast.tpu import Recomputed
from dpn_jax.model import DPN
from dpn_jax.operations import PLAIN, Features, Operations
from dpn_jax.stock import require_stock


def fast_apply(model: DPN, images: jax.Array, *, backend: str | None = None) -> jax.Array:
    """`model(images)`, faster: for training steps, in whichever mode the model is.

    The parameters stay as they are stored; only what runs is rearranged, inside the program, so gradients come back in
    the stored layout, and running statistics and random streams move as they do in `model(images)`. To be called under
    `jit` (compiled or differentiated step by step it gains nothing), best with
    `compiler_options=compiler_options()`. On a CPU it supports only reverse-mode differentiation.

    Args:
      model: the model.
      images: `[B, H, W, C]`, normalized floats.
      backend: 'cpu', 'gpu' or 'tpu': whose plan to follow; defaults to the default backend's.

    Returns:
      What `model(images)` gives, up to rounding.

    Raises:
      ValueError: an unknown backend, a model that is not stock (see `dpn_jax.stock`), or images that do not fit.

    Example:
      >>> import dpn_jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3, depths=(1,), dense_increments=(8,))
      >>> loss = lambda model: fast_apply(model, jnp.ones((2, 32, 32, 3))).var()
      >>> gradients = nnx.jit(nnx.grad(loss))(model)
      >>> int(model.norm.steps[...])
      1
    """
    plan = plan_for(backend)
    require_stock(model, "fast_apply", "call the model itself (FinetuneConfig(fast=False))")
    fast = nnx.view(nnx.clone(model), operations=training_operations(plan))
    _move_channels(fast, plan, back=False)
    if plan.split_expand:
        _split_expand(fast)
    if plan.recomputed:
        _recompute_reduce(fast)
    before = {path: variable.get_value() for path, variable in _moving(fast)}
    outputs = fast(images)
    moved = {path for path, variable in _moving(fast) if variable.get_value() is not before[path]}
    _move_channels(fast, plan, back=True)
    # only what has moved: a model from outside the trace, closed over in eval mode, could not be updated
    nnx.update(model, nnx.from_flat_state([(path, variable) for path, variable in _moving(fast) if path in moved]))
    return outputs


@dataclasses.dataclass(frozen=True)
class Convolve:
    """`operations.convolve` as a plan runs it; grouped convolutions read and return channels in their layout."""

    plan: Plan

    def __call__(
        self, x: Features, kernel: jax.Array, *, stride: int = 1, dilation: int = 1, groups: int = 1
    ) -> jax.Array:
        """See `operations.convolve`."""
        if groups == 1:
            if dilation > 1:
                return PLAIN.convolve(x, kernel, stride=stride, dilation=dilation)
            return self.plan.operations.convolve(x, kernel, stride=stride)
        formulation = self.plan.formulation(kernel.shape[2])
        if self.plan.training_barriers:
            x = jax.lax.optimization_barrier(x)
        return formulation.apply(x, formulation.pack_kernel(kernel, groups), stride=stride, dilation=dilation)


def training_operations(plan: Plan) -> Operations:
    """What a training step computes with: the plan's operations, and its formulations of the grouped convolution."""
    return dataclasses.replace(plan.operations, convolve=Convolve(plan))


def _moving(model: DPN) -> list[tuple[tuple[str | int, ...], nnx.Variable]]:
    """What a forward pass may change: running statistics and random streams, by path."""
    return list(nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Param))))


def _move_channels(model: DPN, plan: Plan, *, back: bool) -> None:
    """Puts the channels between `reduce` and `expand` into the layout of the grouped convolution, or back."""
    for stage, blocks in zip(model.config.stages, model.stages, strict=True):
        formulation = plan.formulation(stage.bottleneck // stage.groups)
        move = formulation.from_layout if back else formulation.to_layout
        for block in blocks:
            last_axis = [block.reduce.conv.kernel]
            for norm in (block.grouped.norm, block.expand.norm):
                last_axis += [norm.scale, norm.bias, norm.mean, norm.var]
            for variable in last_axis:
                variable.set_value(move(variable.get_value(), stage.groups))
            for conv in block.expand.convolutions:
                conv.kernel.set_value(move(conv.kernel.get_value(), stage.groups, axis=2))


def _split_expand(model: DPN) -> None:
    """Gives every block one convolution for each path, as the `b` variants have them, on slices of the same kernel."""
    for blocks in model.stages:
        for expand in (block.expand for block in blocks if not block.expand.split):
            kernels = jnp.split(expand.conv.kernel.get_value(), [expand.residual_channels], axis=-1)
            expand.residual, expand.dense = expand.conv, nnx.clone(expand.conv)
            for conv, kernel in zip((expand.residual, expand.dense), kernels, strict=True):
                conv.kernel.set_value(kernel)
            del expand.conv
            expand.split = True


def _recompute_reduce(model: DPN) -> None:
    """Has every block compute twice what its `reduce` passes back."""
    for blocks in model.stages:
        for block in blocks:
            block.reduce = Recomputed(block.reduce)
