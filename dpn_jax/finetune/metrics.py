"""The metrics of training and validation steps, fetched late so that the device never waits for the host."""

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from dpn_jax.errors import DivergedError
from dpn_jax.finetune.config import Metric
from dpn_jax.finetune.data import Batch
from dpn_jax.finetune.loss import Metrics
from dpn_jax.finetune.step import TrainState, eval_step

Row = dict[str, Any]
"""A line of `metrics.jsonl`: `split`, `step`, and numbers by name."""

_STEPS_IN_FLIGHT = 2


class Window:
    """The metrics of the training steps since the last line of the log.

    Args:
      layers: the factor on the learning rate of each layer whose own metrics are wanted, see `layer_rates`.

    Example:
      >>> window = Window()
      >>> for step, loss in enumerate((2.0, 1.0), start=1):
      ...     metrics = {"loss": 4 * loss, "correct": 2.0, "count": 4.0, "gradient_norm": 1.0, "learning_rate": 0.1}
      ...     window.add(step, {name: jax.numpy.float32(value) for name, value in metrics.items()})
      >>> window.fetch()
      >>> window.means()["loss"]
      1.5
    """

    def __init__(self, layers: Mapping[str, float] = MappingProxyType({})) -> None:
        self._layers = layers
        self.sums: dict[str, float] = {}
        """Sums of the fetched metrics; JSON, so that a checkpoint can hold them."""
        self._pending: list[tuple[int, Metrics]] = []

    def add(self, step: int, metrics: Metrics) -> None:
        """Adds the metrics of a step, which may still be running."""
        self._pending.append((step, metrics))
        wait([metrics for _, metrics in self._pending])

    def fetch(self) -> None:
        """Waits for the steps and sums their metrics.

        Raises:
          DivergedError: a loss or a gradient is not finite; the message names the step and the learning rate.
        """
        pending, self._pending = jax.device_get(self._pending), []
        for step, metrics in pending:
            values = {name: float(value) for name, value in metrics.items()} | {"steps": 1.0}
            for name in ("loss", "gradient_norm"):
                if not math.isfinite(values[name]):
                    what = f"the {name.replace('_', ' ')} is {values[name]}"
                    raise DivergedError(f"{what} at step {step}, learning rate {values['learning_rate']:.3g}")
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.sums["learning_rate"] = values["learning_rate"]  # no sum, but the last one

    def means(self) -> dict[str, float]:
        """Means over the fetched images or steps; starts a new window."""
        sums, self.sums = self.sums, {}
        return {
            "loss": sums["loss"] / sums["count"],
            "accuracy": sums["correct"] / sums["count"],
            "learning_rate": sums["learning_rate"],
            "gradient_norm": sums["gradient_norm"] / sums["steps"],
            **{f"gradient_norm/{name}": sums[f"gradient_norm/{name}"] / sums["steps"] for name in self._layers},
            **{f"learning_rate/{name}": sums["learning_rate"] * factor for name, factor in self._layers.items()},
        }


def validate(
    state: TrainState, batches: Iterable[Batch], *, ema: bool, stop: Callable[[], bool]
) -> dict[str, float] | None:
    """Means over the validation images.

    Args:
      state: the state, which is not changed.
      batches: the batches of all validation images.
      ema: evaluate the moving average.
      stop: called before each batch; True ends the validation.

    Returns:
      `loss`, `accuracy` and `accuracy5`; None if stopped.

    Raises:
      DivergedError: the loss is not finite.
    """
    found: list[Metrics] = []
    for batch in batches:
        if stop():
            return None
        found.append(eval_step(state, batch, ema=ema))
        wait(found)
    found = jax.device_get(found)
    sums = {name: math.fsum(float(metrics[name]) for metrics in found) for name in found[0]}
    if not math.isfinite(sums["loss"]):
        raise DivergedError(f"the validation loss is {sums['loss']} after step {int(state.step)}")
    names = {"loss": "loss", "accuracy": "correct", "accuracy5": "correct5"}
    return {name: sums[summed] / sums["count"] for name, summed in names.items()}


def wait(metrics: list[Metrics]) -> None:
    """Keeps the device a few steps behind, so that it always has work, but no further: each step holds its batch."""
    if len(metrics) > _STEPS_IN_FLIGHT:
        jax.block_until_ready(metrics[-1 - _STEPS_IN_FLIGHT])


def quality(row: Row, metric: Metric = "accuracy") -> tuple[float, float]:
    """The key that ranks validations: the metric, then the other one.

    Example:
      >>> quality({"accuracy": 0.5, "loss": 1.25}, "loss")
      (-1.25, 0.5)
    """
    found = (row["accuracy"], -row["loss"])
    return found if metric == "accuracy" else found[::-1]
