"""The training step: pure functions of a `TrainState` and a batch, one compiled program each."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding

from dpn_jax.config import DPNConfig
from dpn_jax.fast.plan import compiler_options
from dpn_jax.fast.training import fast_apply
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.finetune.data import Batch
from dpn_jax.finetune.layerwise import layer_norms
from dpn_jax.finetune.loss import Metrics, batch_metrics, class_weights
from dpn_jax.finetune.mixup import mix
from dpn_jax.finetune.optimizer import learning_rate_of, updates_of
from dpn_jax.finetune.parameters import trainable, training_mode
from dpn_jax.inference.program import normalize
from dpn_jax.model import DPN
from dpn_jax.pretrained import Preprocessing, default_preprocessing
from dpn_jax.stock import refuse_bound_methods, require_stock

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Setup:
    """The static part of a step: what it is compiled for."""

    graphdef: nnx.GraphDef[DPN] = dataclasses.field(hash=False, repr=False)
    """The model in training mode, without its arrays. Not hashed: that would take too long at every step."""
    architecture: DPNConfig
    dtype: np.dtype
    """Dtype of targets, losses and metrics: the model's, at least float32."""
    tx: optax.GradientTransformation
    config: FinetuneConfig
    preprocessing: Preprocessing
    class_weights: tuple[float, ...] | None
    """Of the training loss, see `batch_metrics`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes, as a pytree of arrays; `setup` is static and not part of the tree."""

    step: jax.Array
    """int32, batches seen."""
    params: nnx.State
    """Parameters, of the model's `param_dtype`."""
    statistics: nnx.State
    """Running statistics of the norms."""
    optimizer: optax.OptState
    """What optax keeps: momenta, the number of updates."""
    ema: tuple[nnx.State, nnx.State] | None
    """Averages of `params` and `statistics`, if `config.ema_decay` is set."""
    setup: Setup = dataclasses.field(metadata={"static": True})
    """What does not change: the model's structure, the optimizer, the options."""

    @classmethod
    def create(
        cls,
        model: DPN,
        tx: optax.GradientTransformation,
        config: FinetuneConfig,
        *,
        preprocessing: Preprocessing | None = None,
        labels: Sequence[int] | None = None,
    ) -> Self:
        """The state before the first step.

        Args:
          model: the model, which is copied and not changed. `dtype` and `remat` are those of the model, dropout is
            that of `config`.
          tx: the optimizer, from `make_optimizer` or any optax transformation.
          config: the options.
          preprocessing: its mean and standard deviation normalize uint8 images; defaults to that of the weights.
          labels: those of all training images, which `config.class_weights="balanced"` needs.

        Raises:
          ValueError: the model has no classifier or no pooling, or `config.freeze`, `config.class_weights` or the
            preprocessing does not fit, or it is not stock (see `dpn_jax.stock`) and `config.fast` is set.
        """
        refuse_bound_methods(model)
        if type(model.dropout) is not nnx.Dropout:
            raise ValueError(f"training sets the dropout of `config`; the model's is a {type(model.dropout).__name__}")
        if config.fast:
            require_stock(model, "training in the fast form", "run the plain form: FinetuneConfig(fast=False)")
        preprocessing = preprocessing or model.provenance.preprocessing or default_preprocessing(model.config)
        if not (model.config.num_classes and model.config.global_pool):
            raise ValueError("training needs a model with a classifier and pooling; see DPN.reset_classifier")
        if len(preprocessing.mean) != model.config.in_channels:
            raise ValueError(
                f"preprocessing has {len(preprocessing.mean)} channels and the model {model.config.in_channels}"
            )
        graphdef, params, statistics = training_mode(model, config)
        dtype = model.dtype if model.dtype.itemsize >= 4 else np.dtype(np.float32)
        weights = class_weights(config, model.config.num_classes, labels)
        state = cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            statistics=statistics,
            optimizer=tx.init(params),
            ema=None if config.ema_decay is None else (params, statistics),
            setup=Setup(graphdef, model.config, dtype, tx, config, preprocessing, weights),
        )
        # a step donates the buffers of its state: no other array may use them
        return jax.tree.map(lambda x: jnp.array(x, copy=True), state)

    def model(self, *, ema: bool = False) -> DPN:
        """The model, in eval mode; an independent copy on the default device, with its config and provenance.

        Args:
          ema: use the averages.

        Raises:
          ValueError: there are no averages.
        """
        arrays = jax.tree.map(lambda x: jnp.array(np.asarray(x), copy=True), self.weights(ema=ema))
        model = nnx.merge(self.setup.graphdef, *arrays)
        rate = self.setup.config.drop_rate
        model.dropout = nnx.Dropout(rate, rngs=nnx.Rngs(self.setup.config.seed) if rate else None)
        model.eval()
        return model

    def weights(self, *, ema: bool = False) -> tuple[nnx.State, nnx.State]:
        """Parameters and norm statistics, or their averages.

        Args:
          ema: the averages.

        Raises:
          ValueError: there are no averages.
        """
        if not ema:
            return self.params, self.statistics
        if self.ema is None:
            raise ValueError("there is no moving average: set ema_decay, such as 0.999, in FinetuneConfig")
        return self.ema


def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One forward and backward pass over a batch, and an update of the parameters every `config.accumulate` batches.

    Randomness depends only on `config.seed` and `state.step`. On several devices (`shard_batch`, `replicate`) norms
    and gradients are those of the whole batch.

    Args:
      state: the state. **Its arrays are donated** to the result, so do not use it afterwards.
      batch: see `Batch`.

    Returns:
      The next state, and `loss` (the training loss, with label smoothing, mixing and class weights), `correct`,
      `correct5` (against the most probable class of the target), `count`, `gradient_norm` (before clipping, without
      frozen parameters) and `learning_rate` (of the last update; NaN if `tx` is not from `make_optimizer`); with
      `config.log_layers` also `gradient_norm/<layer>` for each layer.

    Raises:
      ValueError: the batch does not fit the model.

    Example:
      >>> import numpy as np
      >>> from dpn_jax import create_model
      >>> from dpn_jax.finetune.optimizer import make_optimizer
      >>> model = create_model("dpn68", num_classes=2, depths=(1,), dense_increments=(8,))
      >>> config = FinetuneConfig(optimizer="sgd")
      >>> state = TrainState.create(model, make_optimizer(config, model), config)
      >>> batch = {"image": np.zeros((2, 32, 32, 3), np.uint8), "label": np.array([0, 1])}
      >>> state, metrics = train_step(state, batch)
      >>> int(state.step), float(metrics["count"])
      (1, 2.0)
    """
    batch = _checked(batch, state.setup.architecture)
    run = _program(_train_step, state, static_argnames="sharding", donate_argnames="state")
    return run(state, batch, sharding=_mesh_sharding(state))


def eval_step(state: TrainState, batch: Batch, *, ema: bool = False) -> Metrics:
    """Loss (plain cross-entropy, without class weights) and accuracy over a batch, with the running statistics.

    Args:
      state: the state, which is not changed.
      batch: see `Batch`.
      ema: evaluate the averages.

    Returns:
      `loss`, `correct`, `correct5` and `count`.

    Raises:
      ValueError: the batch does not fit the model, or there are no averages.
    """
    batch = _checked(batch, state.setup.architecture)
    run = _program(_eval_step, state, static_argnames=("setup", "sharding"))
    return run(*state.weights(ema=ema), batch, setup=state.setup, sharding=_mesh_sharding(state))


def _program(step: Callable[..., Any], state: TrainState, **names: str | tuple[str, ...]) -> Callable[..., Any]:
    """The compiled step; the plain function if called under another `jit`."""
    return step if isinstance(state.step, jax.core.Tracer) else _jitted(step, **names)


@functools.cache
def _jitted(step: Callable[..., Any], **names: str | tuple[str, ...]) -> Callable[..., Any]:
    # not at import time: the options depend on the backend
    return jax.jit(step, compiler_options=compiler_options(), **names)


def _train_step(state: TrainState, batch: Batch, sharding: NamedSharding | None) -> tuple[TrainState, Metrics]:
    setup, config = state.setup, state.setup.config
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    mix_key, dropout_key = jax.random.split(key)
    images, targets, weights = _prepare(batch, setup)
    images, targets = mix(mix_key, images, targets, mixup=config.mixup, cutmix=config.cutmix)
    trained = trainable(config, state.params)

    def mean_loss(params: nnx.State) -> tuple[jax.Array, tuple[nnx.State, Metrics]]:
        # otherwise the backward pass would continue through frozen layers
        params = jax.tree.map(lambda t, p: p if t else jax.lax.stop_gradient(p), trained, params)
        model = nnx.merge(setup.graphdef, params, state.statistics)
        model.dropout.rngs = nnx.Rngs(dropout=dropout_key).dropout
        logits, of_loss = _forward(model, images, config), {"label_smoothing": config.label_smoothing}
        metrics = batch_metrics(logits, targets, weights, **of_loss, class_weights=setup.class_weights)
        return metrics["loss"] / metrics["count"], (nnx.as_pure(nnx.state(model, nnx.BatchStat)), metrics)

    gradients, (statistics, metrics) = jax.grad(mean_loss, has_aux=True)(state.params)
    updates, optimizer = setup.tx.update(gradients, state.optimizer, state.params)
    moved = optax.apply_updates(state.params, updates)
    # frozen parameters stay whatever the optimizer does, such as weight decay
    params = jax.tree.map(lambda t, new, old: new if t else old, trained, moved, state.params)
    step = state.step + 1
    ema = state.ema and _average(state.ema, (params, statistics), config, *updates_of(optimizer, step))
    metrics |= {"gradient_norm": optax.tree.norm(gradients), "learning_rate": learning_rate_of(optimizer)}
    if config.log_layers:
        metrics |= {f"gradient_norm/{name}": norm for name, norm in layer_norms(gradients).items()}
    return _constrain((TrainState(step, params, statistics, optimizer, ema, setup), metrics), sharding)


def _eval_step(
    params: nnx.State, statistics: nnx.State, batch: Batch, setup: Setup, sharding: NamedSharding | None
) -> Metrics:
    images, targets, weights = _prepare(batch, setup)
    model = nnx.merge(setup.graphdef, params, statistics)
    model.eval()
    return _constrain(batch_metrics(_forward(model, images, setup.config), targets, weights), sharding)


def _forward(model: DPN, images: jax.Array, config: FinetuneConfig) -> jax.Array:
    """Logits of training and evaluation alike."""
    return fast_apply(model, images) if config.fast else model(images)


def _checked(batch: Batch, architecture: DPNConfig) -> Batch:
    if not {"image", "label"} <= set(batch):
        raise ValueError(f"a batch needs 'image' and 'label', got {sorted(batch)}")
    images, labels = batch["image"], batch["label"]
    architecture.check_images(images.shape, "float32" if images.dtype == np.uint8 else images.dtype)
    if labels.shape not in ((len(images),), (len(images), architecture.num_classes)):
        expected = f"[{len(images)}] or [{len(images)}, {architecture.num_classes}]"
        raise ValueError(f"labels must be {expected}, got {list(labels.shape)}")
    return {name: batch[name] for name in ("image", "label", "weight") if name in batch}


def _prepare(batch: Batch, setup: Setup) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalized images `[B, H, W, C]`, class probabilities `[B, K]` and weights `[B]`."""
    images, labels = batch["image"], batch["label"]
    if images.dtype == jnp.uint8:
        images = normalize(images, setup.preprocessing)
    if labels.ndim == 1:
        targets = jax.nn.one_hot(labels, setup.architecture.num_classes, dtype=setup.dtype)
    else:
        targets = labels.astype(setup.dtype)
    weights = batch.get("weight", np.ones(len(images)))
    return images, targets, jnp.asarray(weights, setup.dtype)


def _average(
    old: nnx.State, new: nnx.State, config: FinetuneConfig, updates: jax.Array, updated: jax.Array
) -> nnx.State:
    """The exponential moving average; counters are copied, and constant values stay bit-identical.

    Source: `timm.utils.ModelEmaV3`.
    """
    decay = jnp.asarray(config.ema_decay, float)
    if config.ema_warmup:
        # 0.37 at the second update, 0.9 at the 32nd, 0.99 at the 1000th
        decay = jnp.minimum(decay, 1 - updates.astype(decay.dtype) ** (-2 / 3))
    first = updates == 1  # taken as it is: the average is not to hold what was there before training

    def move(old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return jnp.where(updated, new, old)
        moved = jnp.where(first, new, old + (1 - decay).astype(old.dtype) * (new - old))
        return jnp.where(updated, moved, old)

    return jax.tree.map(move, old, new)


def _mesh_sharding(state: TrainState) -> NamedSharding | None:
    """The sharding of a state on a mesh, which the outputs of a step must have too; None without a mesh."""
    sharding = None if isinstance(state.step, jax.core.Tracer) else state.step.sharding
    return sharding if isinstance(sharding, NamedSharding) else None


def _constrain(tree: Tree, sharding: NamedSharding | None) -> Tree:
    return tree if sharding is None else jax.lax.with_sharding_constraint(tree, sharding)
