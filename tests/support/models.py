"""The small model of the tests, and random values for any of ours. Needs no torch."""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

import dpn_jax
from dpn_jax import DPN, DPNConfig
from dpn_jax.checkpoint.names import name_table, to_flax
from dpn_jax.checkpoint.save import convert

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


def save_timms_layout(config: DPNConfig, path: Path, *, seed: int = 0) -> Path:
    """Writes random weights in timm's layout, as published."""
    dpn_jax.save(randomize(DPN(config, rngs=None), seed=seed), path.with_suffix(".flax"))
    convert(path.with_suffix(".flax"), path, to="timm")
    return path


def assert_timms_weights(model: DPN, state: Mapping[str, np.ndarray]) -> None:
    """Every tensor of the model is that of timm's layout, to the bit."""
    table = name_table(model.config)
    assert {entry.timm for entry in table} == state.keys()
    ours = values(model)
    for entry in table:
        np.testing.assert_array_equal(ours[entry.flax], to_flax(entry, state[entry.timm]), err_msg=entry.timm)


def values(model: DPN) -> dict[str, np.ndarray]:
    """Every parameter, statistic and counter of a model by name."""
    state = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in state}
