"""What each backend runs: the choices as data, `PLANS`. What each one measured is in docs/performance.md."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dpn_jax.fast import cpu, tpu
from dpn_jax.fast.grouped import Merged, Native
from dpn_jax.fast.lanes import Lanes
from dpn_jax.operations import PLAIN, Operations


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a backend runs the network.

    Args:
      grouped: (maximum channels per group, formulation of the grouped convolution), ascending.
      operations: what the rest is computed with; its `convolve` runs the 1x1 convolutions, in training the stem's too.
      barriers: in inference, keep what feeds a convolution from being computed again for each of its taps.
      compiler_options: for `jax.jit`, on that backend only, and only where its compiler knows them.
      split_expand: in training, a convolution for each path after the grouped one, so that the sum with the residual
        path is fused with it.
      training_barriers: in training, keep what feeds a grouped convolution, and its gradient, from being fused with it.
      recomputed: in training, run each block's `reduce` as `tpu.Recomputed`.
    """

    grouped: tuple[tuple[int, Native], ...]
    operations: Operations = PLAIN
    barriers: bool = False
    compiler_options: tuple[tuple[str, str], ...] = ()
    split_expand: bool = False
    training_barriers: bool = False
    recomputed: bool = False

    def formulation(self, per_group: int) -> Native:
        """The grouped convolution's formulation for groups of `per_group` channels."""
        return next((chosen for most, chosen in self.grouped if per_group <= most), Native())


# measured by benchmarks/cpu.py and benchmarks/tpu_compile.py; the GPU's is not measured yet
PLANS: dict[str, Plan] = {
    "cpu": Plan(
        grouped=((24, Lanes()), (32, Merged(width=1, sliced=True))),
        operations=Operations(cpu.convolve, cpu.moments, cpu.normalize, cpu.max_pool, cpu.fork),
        barriers=True,
        # matrix products by Eigen instead of YNNPACK; AVX-512 in full, where there is any
        compiler_options=(("xla_cpu_experimental_ynn_fusion_type", ""), ("xla_cpu_prefer_vector_width", "512")),
    ),
    "tpu": Plan(
        grouped=((32, Merged(width=16)),),
        operations=Operations(moments=tpu.moments, normalize=tpu.normalize),
        # both products of a `reduce`, one for each path, as one fusion
        compiler_options=(("xla_tpu_enable_multi_level_output_dot_dot_fusion", "true"),),
        split_expand=True,
        training_barriers=True,  # or the input gradient is written in float32
        recomputed=True,  # or a map as wide as both paths is written and read again
    ),
    "gpu": Plan(grouped=((32, Merged(width=32)),)),
}


def plan_for(backend: str | None) -> Plan:
    """The plan of a backend; None is the default backend.

    Raises:
      ValueError: an unknown backend.
    """
    backend = jax.default_backend() if backend is None else backend
    if backend not in PLANS:
        raise ValueError(f"backend must be one of {', '.join(PLANS)}, got {backend!r}")
    return PLANS[backend]


def compiler_options(backend: str | None = None) -> dict[str, str]:
    """A backend's compiler options, for `fast_forward` and for a training step around `fast_apply`.

    Args:
      backend: as for `fast_forward`.

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
    plan = plan_for(backend)
    if plan is not PLANS.get(jax.default_backend()):
        return {}
    return {name: value for name, value in plan.compiler_options if _is_known(name, value)}


@functools.cache
def _is_known(option: str, value: str) -> bool:
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
