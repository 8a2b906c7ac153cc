"""The optimizer and its learning rate schedule, built from optax."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.finetune.parameters import check_freeze, decayed, layer_distance, path_of, trainable
from dpn_jax.model import DPN


@dataclasses.dataclass(frozen=True)
class StepCounts:
    """How many steps an epoch and the run have; a step is one batch, an update those that `accumulate` averages.

    Example:
      >>> steps = StepCounts(FinetuneConfig(epochs=3, accumulate=4), per_epoch=10)
      >>> steps.total, steps.updates, [steps.updates_at(step) for step in (3, 4, 9, 10, 14)]
      (30, 9, [0, 1, 2, 3, 4])
    """

    config: FinetuneConfig
    per_epoch: int

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self.config.epochs * self.per_epoch

    @property
    def updates(self) -> int:
        """Updates of the parameters in the run."""
        return self.updates_at(self.total)

    @property
    def updates_per_epoch(self) -> int:
        """One for each `accumulate` batches, and one for the rest, as in timm's `train.py`."""
        return math.ceil(self.per_epoch / self.config.accumulate)

    def updates_at(self, step: int) -> int:
        """Updates that are done after so many steps."""
        epochs, rest = divmod(step, self.per_epoch)
        return epochs * self.updates_per_epoch + rest // self.config.accumulate

    def saves(self, step: int) -> bool:
        """Whether there is a checkpoint after step number `step`: at the end of an epoch, or of so many updates."""
        every = self.config.checkpoint_every
        due = every is not None and self.updates_at(step) // every > self.updates_at(step - 1) // every
        return due or self.ends_epoch(step)

    def ends_epoch(self, step: int) -> bool:
        """Whether step number `step` is the last one of an epoch."""
        return step > 0 and step % self.per_epoch == 0


def learning_rate(
    config: FinetuneConfig, *, steps: int | None = None, steps_per_epoch: float | None = None
) -> optax.Schedule:
    """The learning rate by update: linear warmup to the peak, then cosine decay to the final rate.

    At least one update is at the peak, however short the run is.

    Args:
      config: the rates and the length of the warmup.
      steps: updates in total; defaults to `config.epochs` times `steps_per_epoch`, and without both the rate is
        constant.
      steps_per_epoch: updates per epoch; defaults to `steps` divided by `config.epochs`.

    Returns:
      A function from the number of updates done to the rate.

    Raises:
      ValueError: `steps` or `steps_per_epoch` is not positive.

    Example:
      >>> config = FinetuneConfig(epochs=10, warmup_epochs=2, learning_rate=0.1)
      >>> schedule = learning_rate(config, steps_per_epoch=5)
      >>> [round(float(schedule(update)), 5) for update in (0, 5, 10, 30, 50)]
      [1e-05, 0.05001, 0.1, 0.05, 0.0]
    """
    if steps is None and steps_per_epoch is None:
        return optax.constant_schedule(config.learning_rate)
    steps = round(config.epochs * steps_per_epoch) if steps is None else steps
    steps_per_epoch = steps / config.epochs if steps_per_epoch is None else steps_per_epoch
    if steps < 1 or steps_per_epoch <= 0:
        raise ValueError(f"steps and steps_per_epoch must be more than 0, got {steps} and {steps_per_epoch}")
    warmup = min(round(config.warmup_epochs * steps_per_epoch), steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=min(config.warmup_learning_rate, config.learning_rate),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),  # optax wants at least one step of decay
        end_value=config.final_learning_rate,
    )
    # as a float: optax mixes the integer count with floats, which strict dtype promotion rejects
    return lambda count: schedule(jnp.asarray(count, float))


def make_optimizer(
    config: FinetuneConfig,
    model: DPN,
    *,
    batches_per_epoch: int | None = None,
    steps: int | None = None,
    steps_per_epoch: float | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a configuration.

    In this order: gradients of `config.accumulate` batches are averaged, clipped, transformed by the optimizer with
    weight decay of the kernels, and scaled by the learning rate and by layer-wise decay. Frozen parameters get no
    update, do not count in the gradient's norm and have no moments. SGD is torch's: decay is added to the gradient,
    momentum has no dampening.

    Args:
      config: the options.
      model: the model; only its architecture and parameter dtype are used.
      batches_per_epoch: batches in an epoch. The gradients that are left over at the end of an epoch are then averaged
        for an update of their own, as in timm, and `steps_per_epoch` defaults to the number of updates.
      steps, steps_per_epoch: see `learning_rate`.

    Returns:
      A transformation for `TrainState.create`, or for `nnx.Optimizer(model, tx, wrt=nnx.Param)`. Its state holds the
      current `learning_rate`.

    Raises:
      ValueError: `config.freeze` does not fit the model.

    Example:
      >>> from dpn_jax import create_model
      >>> from flax import nnx
      >>> model = create_model("dpn68", num_classes=10, depths=(1,), dense_increments=(8,))
      >>> tx = make_optimizer(FinetuneConfig(optimizer="sgd", learning_rate=0.1), model, steps=100)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    Source: `torch.optim.SGD`; `timm.optim.param_groups_layer_decay`.
    """
    check_freeze(config, model)
    if batches_per_epoch is not None and steps_per_epoch is None:
        steps_per_epoch = StepCounts(config, batches_per_epoch).updates_per_epoch
    schedule = learning_rate(config, steps=steps, steps_per_epoch=steps_per_epoch)
    parts = [
        *_direction(config),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(schedule),
    ]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.layer_decay < 1:
        parts.append(_scale_by_layer(config.layer_decay, model.config.depths))
    optimizer = optax.chain(*parts)
    if config.accumulate > 1:
        optimizer = _accumulate(optimizer, config, batches_per_epoch, model.param_dtype)

    def labels(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda trained: "trained" if trained else "frozen", trainable(config, params))

    return _promote(optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels))


def _direction(config: FinetuneConfig) -> list[optax.GradientTransformation]:
    decay = optax.add_decayed_weights(config.weight_decay, mask=decayed)
    match config.optimizer:
        case "sgd":
            return [decay, optax.trace(config.momentum)]
        case "adamw":
            return [optax.scale_by_adam(b1=config.momentum), decay]
        case "lamb":
            return [optax.scale_by_adam(b1=config.momentum, eps=1e-6), decay, optax.scale_by_trust_ratio()]
        case "lion":
            return [optax.scale_by_lion(b1=config.momentum), decay]
    raise ValueError(f"optimizer must be sgd, adamw, lamb or lion, got {config.optimizer!r}")


def _scale_by_layer(factor: float, depths: tuple[int, ...]) -> optax.GradientTransformation:
    def scale(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        return jax.tree.map_with_path(lambda path, u: u * factor ** layer_distance(path_of(path), depths), updates)

    return optax.stateless(scale)


def learning_rate_of(optimizer: optax.OptState) -> jax.Array:
    """The learning rate of the last update, float32; NaN of an optimizer that is not from `make_optimizer`."""
    found = optax.tree.get(optimizer, "learning_rate", math.nan, filtering=lambda _, x: isinstance(x, jax.Array))
    return jnp.asarray(found, jnp.float32)


def updates_of(optimizer: optax.OptState, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many updates of the parameters there were after `step` batches, and whether the last batch made one."""
    updates, batches = (optax.tree.get(optimizer, name, None) for name in ("gradient_step", "mini_step"))
    return (step, jnp.bool_(True)) if updates is None else (updates, batches == 0)


def _accumulate(
    optimizer: optax.GradientTransformation,
    config: FinetuneConfig,
    batches_per_epoch: int | None,
    dtype: jax.typing.DTypeLike,
) -> optax.GradientTransformation:
    def batches_of(update: jax.Array) -> jax.Array | int:
        """How many batches an update averages: fewer for the last one of an epoch."""
        if batches_per_epoch is None:
            return config.accumulate
        updates = StepCounts(config, batches_per_epoch).updates_per_epoch
        rest = batches_per_epoch - config.accumulate * (updates - 1)
        return jnp.where(update % updates == updates - 1, rest, config.accumulate)

    dtype = dtype if dtype.itemsize >= 4 else "float32"
    return optax.MultiSteps(optimizer, batches_of, accumulator_dtype=dtype).gradient_transformation()


def _promote(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Allows dtype promotion: optax mixes its integer counts with floats, which strict promotion rejects."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)
