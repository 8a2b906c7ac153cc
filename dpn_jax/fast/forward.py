"""The same network, rearranged for speed: `fast_forward`. `dpn_jax.model` stays the definition.

A norm that directly follows a convolution is folded into it, the two paths stay apart (a 1x1 convolution over both is
the sum of two, on kernels that are split once), and the grouped convolution is written as the backend runs it best,
the order of its channels being folded into the kernels around it. What each choice measured: docs/performance.md.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dpn_jax.config import StageConfig
from dpn_jax.fast.grouped import Formulation, Lanes, Merged, Native, convolve
from dpn_jax.layers import ACTIVATIONS, Conv, NormAct, NormActConv, max_pool
from dpn_jax.model import DPN, DualPath, DualPathBlock, join_paths, pool_and_classify


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a backend runs the network.

    Args:
      grouped: the grouped convolution's formulation by the most channels a group that it is for, ascending.
      matmul: 1x1 convolutions, and the stem's in training, as matrix products.
      barriers: keep what feeds a convolution from being computed again for each of its taps.
      compiler_options: for `jax.jit`, on that backend only, and only where its compiler knows them.
      in_training: whether these options suit a training step too.
    """

    grouped: tuple[tuple[int, Formulation], ...]
    matmul: bool = False
    barriers: bool = False
    compiler_options: tuple[tuple[str, str], ...] = ()
    in_training: bool = True

    def formulation(self, per_group: int) -> Formulation:
        """The grouped convolution's formulation for groups of so many channels."""
        return next((chosen for most, chosen in self.grouped if per_group <= most), Native())


# measured by benchmarks/cpu.py and benchmarks/tpu_compile.py; the GPU's is not measured yet
PLANS = {
    "cpu": Plan(
        grouped=((24, Lanes()), (32, Merged(width=1, sliced=True))),
        matmul=True,
        barriers=True,
        # matrix products by Eigen instead of YNNPACK; AVX-512 in full, where there is any
        compiler_options=(("xla_cpu_experimental_ynn_fusion_type", ""), ("xla_cpu_prefer_vector_width", "512")),
    ),
    "tpu": Plan(
        grouped=((32, Merged(width=16)),),
        # both products of a `reduce`, one for each path, as one fusion
        compiler_options=(("xla_tpu_enable_multi_level_output_dot_dot_fusion", "true"),),
        in_training=False,  # a step compiles more than three times as long
    ),
    "gpu": Plan(grouped=((32, Merged(width=32)),)),
}


class Affine(NamedTuple):
    """A norm in eval mode: `x * scale + shift`."""

    scale: jax.Array
    shift: jax.Array


class Unit(NamedTuple):
    """Norm, activation and 1x1 convolution over one or both paths; the norm that follows is in kernels and bias."""

    norms: tuple[Affine, ...]
    """One for each path that is read."""
    kernels: tuple[tuple[jax.Array, ...], ...]
    """`[I, O]` for each output and each path that is read."""
    bias: jax.Array | None = None


class Block(NamedTuple):
    """One block's folded parameters."""

    shortcut: Unit | None
    reduce: Unit
    grouped: jax.Array
    grouped_bias: jax.Array
    expand: tuple[jax.Array, jax.Array]
    """`[I, O]` for what is added to the residual path, and for what is appended to the dense one."""


class Folded(NamedTuple):
    """The whole network's folded parameters."""

    stem: jax.Array
    stem_bias: jax.Array
    stages: tuple[tuple[Block, ...], ...]
    norms: tuple[Affine, ...]
    classifier: tuple[jax.Array, jax.Array] | None


def fast_forward(model: DPN, *, backend: str | None = None, donate: bool = False) -> "FastForward":
    """A jitted forward pass in eval mode, faster than `jax.jit(model)` and equal to it up to rounding.

    Args:
      model: the model; its parameters are copied, later changes to it are not seen.
      backend: 'cpu', 'gpu' or 'tpu': whose formulations to take; left out, the default backend's.
      donate: give the model's arrays up, block by block, so that parameters are in memory about once, not twice. The
        model cannot be used afterwards.

    Returns:
      A function of images `[B, H, W, C]`, normalized floats, that gives what `model(images)` gives. It compiles once
      for each shape. Its attributes `params` and `apply` (a pure function of params and images) are there for sharding
      and for ahead-of-time compilation.

    Raises:
      ValueError: an unknown backend.

    Example:
      >>> import dpn_jax, jax.numpy as jnp
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3)
      >>> dpn_jax.fast_forward(model)(jnp.zeros((1, 64, 64, 3))).shape
      (1, 3)
    """
    return FastForward(model, _plan(backend), compiler_options=compiler_options(backend), donate=donate)


def fast_apply(model: DPN, images: jax.Array, *, backend: str | None = None) -> jax.Array:
    """`model(images)`, faster: for training steps, in whichever mode the model is.

    The parameters stay as they are stored; only what runs is rearranged, inside the program, so gradients come back in
    the stored layout, and running statistics and random streams move as they do in `model(images)`. To be called under
    `jit` (compiled or differentiated step by step it gains nothing), best with
    `compiler_options=compiler_options(training=True)`. On a CPU it differentiates in reverse mode only.

    Args:
      model: the model.
      images: `[B, H, W, C]`, normalized floats.
      backend: as for `fast_forward`.

    Returns:
      What `model(images)` gives, up to rounding.

    Raises:
      ValueError: an unknown backend, or images that do not fit.

    Example:
      >>> import dpn_jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3, depths=(1,), dense_increments=(8,))
      >>> loss = lambda model: fast_apply(model, jnp.ones((2, 32, 32, 3))).var()
      >>> gradients = nnx.jit(nnx.grad(loss))(model)
      >>> int(model.norm.steps[...])
      1
    """
    plan = _plan(backend)
    rearranged = nnx.clone(model)
    _rearrange(rearranged, plan, back=False)
    outputs = rearranged(images)
    _rearrange(rearranged, plan, back=True)
    nnx.update(model, nnx.state(rearranged, nnx.Not(nnx.Param)))
    return outputs


def compiler_options(backend: str | None = None, *, training: bool = False) -> dict[str, str]:
    """What a backend's compiler is told for `fast_forward`, or best for a training step around `fast_apply`.

    Args:
      backend: as for `fast_forward`.
      training: for a training step.

    Returns:
      Names and values for `jax.jit(compiler_options=...)`; only what the compiler knows, as they come and go with its
      versions, so nothing where the default backend is another one.

    Raises:
      ValueError: an unknown backend.

    Example:
      >>> step = jax.jit(lambda x: x + 1, compiler_options=compiler_options())
      >>> int(step(1))
      2
    """
    plan = _plan(backend)
    if plan is not PLANS.get(jax.default_backend()) or (training and not plan.in_training):
        return {}
    return {name: value for name, value in plan.compiler_options if _is_known(name, value)}


class FastForward:
    """What `fast_forward` returns: `params`, and a pure `apply(params, images)`."""

    def __init__(
        self, model: DPN, plan: Plan, *, compiler_options: Mapping[str, str] | None = None, donate: bool = False
    ) -> None:
        self.config = model.config
        self.plan = plan
        self.dtype = model.dtype
        self.params = fold(model, plan, donate=donate)
        self.jitted = jax.jit(self.apply, compiler_options=dict(compiler_options or {}))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to logits `[B, num_classes]`, as the model does."""
        # inside somebody's `jit` there is one program, with that one's options
        run = self.apply if isinstance(images, jax.core.Tracer) else self.jitted
        return run(self.params, images)

    def apply(self, params: Folded, images: jax.Array) -> jax.Array:
        """The forward pass, not jitted."""
        self.config.check_images(images.shape, images.dtype)
        activate = ACTIVATIONS[self.config.outer_activation]
        x = activate(convolve(images.astype(self.dtype), params.stem, stride=2) + params.stem_bias)
        x = self._keep(max_pool(x))
        for stage, blocks in zip(self.config.stages, params.stages, strict=True):
            for index, block in enumerate(blocks):
                x = self._block(stage, block, x, stride=stage.stride if index == 0 else 1)
        paths = DualPath(
            *(activate(path * scale + shift) for path, (scale, shift) in zip(x, params.norms, strict=True))
        )

        def classify(x: jax.Array) -> jax.Array:
            kernel, bias = params.classifier
            return self._pointwise(x, kernel) + bias

        return pool_and_classify(join_paths(paths), self.config, None if params.classifier is None else classify)

    def _block(self, stage: StageConfig, block: Block, x: DualPath | jax.Array, *, stride: int) -> DualPath:
        paths = x if isinstance(x, DualPath) else (x,)
        residual, dense = x if block.shortcut is None else self._unit(block.shortcut, paths, stride=stride)
        (h,) = self._unit(block.reduce, paths)
        formulation = self.plan.formulation(stage.bottleneck // stage.groups)
        h = formulation.apply(self._keep(nnx.relu(h)), block.grouped, stride=stride)
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
        return convolve(x, kernel[None, None], matmul=self.plan.matmul)

    def _keep(self, x: DualPath | jax.Array) -> DualPath | jax.Array:
        return lax.optimization_barrier(x) if self.plan.barriers else x


def _plan(backend: str | None) -> Plan:
    backend = jax.default_backend() if backend is None else backend
    if backend not in PLANS:
        raise ValueError(f"backend must be one of {', '.join(PLANS)}, got {backend!r}")
    return PLANS[backend]


@functools.cache
def _is_known(option: str, value: str) -> bool:
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _rearrange(model: DPN, plan: Plan, *, back: bool) -> None:
    """Writes a model's convolutions as a plan has them; between `reduce` and `expand` channels get another order."""
    for _, part in nnx.iter_modules(model):
        if isinstance(part, Conv | NormAct):
            part.matmul = plan.matmul
    for stage, blocks in zip(model.config.stages, model.stages, strict=True):
        formulation = plan.formulation(stage.bottleneck // stage.groups)
        move = formulation.restore if back else formulation.interleave
        for block in blocks:
            block.forked = plan.barriers
            block.grouped.conv.formulation = formulation
            last = [block.reduce.conv.kernel]
            for norm in (block.grouped.norm, block.expand.norm):
                last += [norm.scale, norm.bias, norm.mean, norm.var]
            for variable in last:
                variable.set_value(move(variable.get_value(), stage.groups))
            for conv in block.expand.convolutions():
                conv.kernel.set_value(move(conv.kernel.get_value(), stage.groups, axis=2))


def fold(model: DPN, plan: Plan, *, donate: bool = False) -> Folded:
    """A model's parameters for `FastForward.apply`, computed in float32 at least and then cast to the model's dtype."""

    def cast(array: np.ndarray) -> jax.Array:
        return jnp.asarray(np.ascontiguousarray(array).astype(model.dtype))

    def affines(norm: NormAct, cuts: list[int]) -> tuple[Affine, ...]:
        scale, shift = _affine(norm)
        pairs = zip(np.split(scale, cuts), np.split(shift, cuts), strict=True)
        return tuple(Affine(cast(scale), cast(shift)) for scale, shift in pairs)

    def unit(
        source: NormActConv,
        cuts: list[int],
        *,
        outputs: list[int],
        following: NormAct | None = None,
        interleave: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> Unit:
        kernel, bias = _kernel(source.conv.kernel)[0, 0], None
        if following is not None:
            scale, shift = _affine(following)
            kernel, bias = interleave(kernel * scale), cast(interleave(shift))
        kernels = tuple(tuple(map(cast, np.split(part, cuts))) for part in np.split(kernel, outputs, axis=1))
        return Unit(affines(source.norm, cuts), kernels, bias)

    def folded_block(stage: StageConfig, block: DualPathBlock, cuts: list[int]) -> Block:
        formulation = plan.formulation(stage.bottleneck // stage.groups)
        interleave = functools.partial(formulation.interleave, groups=stage.groups)
        scale, shift = _affine(block.expand.norm)
        return Block(
            shortcut=None if block.shortcut is None else unit(block.shortcut, cuts, outputs=[stage.residual]),
            reduce=unit(block.reduce, cuts, outputs=[], following=block.grouped.norm, interleave=interleave),
            grouped=cast(formulation.arrange(_kernel(block.grouped.conv.kernel) * scale, stage.groups)),
            grouped_bias=cast(interleave(shift)),
            expand=tuple(cast(interleave(kernel, axis=0)) for kernel in _expand_kernels(block, stage)),
        )

    scale, shift = _affine(model.stem.norm)
    cuts: list[int] = []  # where the residual path ends in what a block reads; the stem's output is one map
    stages = []
    for stage, blocks in zip(model.config.stages, model.stages, strict=True):
        folded_blocks = []
        for block in blocks:
            folded_blocks.append(folded_block(stage, block, cuts))
            if donate:
                for array in jax.tree.leaves(jax.block_until_ready((folded_blocks[-1], nnx.state(block)))[1]):
                    array.delete()
            cuts = [stage.residual]
        stages.append(tuple(folded_blocks))
    head = model.classifier
    return Folded(
        stem=cast(_kernel(model.stem.conv.kernel) * scale),
        stem_bias=cast(shift),
        stages=tuple(stages),
        norms=affines(model.norm, cuts),
        classifier=None if head is None else (cast(_kernel(head.kernel)[0, 0]), cast(_kernel(head.bias))),
    )


def _affine(norm: NormAct) -> tuple[np.ndarray, np.ndarray]:
    """`NormAct` in eval mode as `x * scale + shift`."""
    scale = _kernel(norm.scale) / np.sqrt(_kernel(norm.var) + norm.epsilon)
    return scale, _kernel(norm.bias) - _kernel(norm.mean) * scale


def _kernel(variable: nnx.Variable) -> np.ndarray:
    array = np.asarray(variable.get_value())
    return array.astype(np.promote_types(array.dtype, np.float32), copy=False)


def _expand_kernels(block: DualPathBlock, stage: StageConfig) -> list[np.ndarray]:
    kernels = [_kernel(conv.kernel)[0, 0] for conv in block.expand.convolutions()]
    return kernels if len(kernels) > 1 else np.split(kernels[0], [stage.residual], axis=1)
