"""The small model of the tests, and random values for any of ours. Needs no torch."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpn_jax import DPN, DPNConfig

TINY = DPNConfig(
    depths=(2, 1),
    dense_increments=(4, 8),
    bottleneck_width=8,
    groups=4,
    residual_width=64,
    stem_features=8,
    stem_kernel=3,
    num_classes=5,
)
"""Both kinds of block, with and without a projection shortcut; timm's `DPN` can express it too."""


def randomize(model: DPN, *, seed: int = 0) -> DPN:
    """Draws every parameter and every statistic, in place: fresh norms are all 0 and 1 and hide mistakes.

    Args:
      model: one of ours, which may be abstract (`DPN(config, rngs=None)`: nothing is compiled).
      seed: another one, other values.

    Returns:
      The same model, in eval mode.
    """
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name == "kernel":
            return rng.normal(0, 1 / np.sqrt(np.prod(shape[:-1])), shape)
        if name == "steps":
            return np.full(shape, 3)
        return rng.uniform(0.5, 2, shape) if name in ("scale", "var") else rng.normal(0, 0.3, shape)

    state = nnx.to_flat_state(nnx.as_pure(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    drawn = [(path, jnp.asarray(draw(path[-1], value.shape), value.dtype)) for path, value in state]
    nnx.update(model, nnx.from_flat_state(drawn))
    model.eval()
    return model


def values(model: DPN) -> dict[str, np.ndarray]:
    """Every parameter, statistic and counter of a model by name."""
    state = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in state}
