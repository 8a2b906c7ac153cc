"""The optimizer and its learning rate schedule, built from optax."""

import jax
import jax.numpy as jnp
import optax

from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.finetune.parameters import check_freeze, decayed, layer_distance, path_of, trainable
from dpn_jax.model import DPN


def learning_rate(
    config: FinetuneConfig, *, steps: int | None = None, steps_per_epoch: float | None = None
) -> optax.Schedule:
    """The learning rate by update: linear warmup from 0 to the peak, then cosine decay to the final rate.

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
      >>> [round(float(schedule(update)), 3) for update in (0, 5, 10, 30, 50)]
      [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    if steps is None and steps_per_epoch is None:
        return optax.constant_schedule(config.learning_rate)
    steps = round(config.epochs * steps_per_epoch) if steps is None else steps
    steps_per_epoch = steps / config.epochs if steps_per_epoch is None else steps_per_epoch
    if steps < 1 or steps_per_epoch <= 0:
        raise ValueError(f"steps and steps_per_epoch must be more than 0, got {steps} and {steps_per_epoch}")
    warmup = min(round(config.warmup_epochs * steps_per_epoch), steps)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),  # optax wants at least one step of decay
        end_value=config.final_learning_rate,
    )
    # as a float: optax mixes the integer count with floats, which strict dtype promotion rejects
    return lambda count: schedule(jnp.asarray(count, float))


def make_optimizer(
    config: FinetuneConfig, model: DPN, *, steps: int | None = None, steps_per_epoch: float | None = None
) -> optax.GradientTransformation:
    """The optimizer of a configuration.

    In this order: gradients of `config.accumulate` batches are averaged, clipped, transformed by the optimizer with
    weight decay of the kernels, and scaled by the learning rate and by layer-wise decay. Frozen parameters get no
    update, do not count in the gradient's norm and have no moments. SGD is torch's: decay is added to the gradient,
    momentum has no dampening.

    Args:
      config: the options.
      model: the model; only its architecture and parameter dtype are used.
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
        optimizer = _accumulate(optimizer, config.accumulate, model.param_dtype)

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


def _accumulate(
    optimizer: optax.GradientTransformation, every: int, dtype: jax.typing.DTypeLike
) -> optax.GradientTransformation:
    dtype = dtype if dtype.itemsize >= 4 else "float32"
    return optax.MultiSteps(optimizer, every, accumulator_dtype=dtype).gradient_transformation()


def _promote(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Allows dtype promotion: optax mixes its integer counts with floats, which strict promotion rejects."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)
