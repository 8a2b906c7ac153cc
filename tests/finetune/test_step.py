"""The training step: what it changes and what not, on one device and on many."""

import dataclasses
import functools
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dpn_jax
from dpn_jax.finetune import (
    FinetuneConfig,
    TrainState,
    data_mesh,
    eval_step,
    frozen_norms,
    make_optimizer,
    mix,
    replicate,
    shard_batch,
    train_step,
)
from dpn_jax.finetune import step as step_module
from dpn_jax.finetune.optimizer import learning_rate_of
from dpn_jax.finetune.parameters import path_of
from dpn_jax.images.transform import Transform
from tests.support import data_parallel, models
from tests.support.models import randomize

CLASSES = 7
TINY = models.TINY.replace(depths=(1,), dense_increments=(4,), num_classes=CLASSES)
SGD = {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.0, "weight_decay": 0.0}
PLAIN = FinetuneConfig(**SGD, norms="frozen", label_smoothing=0.3)
FULL = FinetuneConfig(accumulate=2, ema_decay=0.8, mixup=0.2, cutmix=0.2, drop_rate=0.3, learning_rate=0.01)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> dpn_jax.DPN:
    """A tiny model; do not change it."""
    model = randomize(dpn_jax.DPN(TINY, rngs=None))
    model.train()
    return model


@pytest.fixture(scope="module")
def begin(model: dpn_jax.DPN) -> Callable[[FinetuneConfig], TrainState]:
    """A state with the optimizer that this configuration had before: its step is compiled once."""
    make = functools.cache(lambda config: make_optimizer(config, model, steps=10 if config == FULL else None))
    return lambda config: TrainState.create(model, make(config), config)


def batch(size: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, size, dtype=np.int32)
    return {"image": images, "label": labels, "weight": np.ones(size, np.float32)}


def start(model: dpn_jax.DPN, **options: object) -> TrainState:
    config = FinetuneConfig(**options)
    return TrainState.create(model, make_optimizer(config, model), config)


def arrays(state: nnx.State) -> dict[str, np.ndarray]:
    """Copies, by name."""
    leaves = jax.tree.leaves_with_path(state)
    return {".".join(map(str, path_of(path))): np.array(leaf) for path, leaf in leaves}


def logits_of(model: dpn_jax.DPN, images: np.ndarray) -> np.ndarray:
    return np.array(jax.jit(model)(Transform(dpn_jax.pretrained.default_preprocessing(TINY)).normalize(images)))


TRAINED: dict[str, Callable[[str], bool]] = {
    "none": lambda name: True,
    "stem": lambda name: not name.startswith("stem."),
    "stage1": lambda name: not name.startswith(("stem.", "stages.0.")),
    "backbone": lambda name: name.startswith("classifier."),
    "weights": lambda name: name.startswith("classifier.") or "norm." in name,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("freeze", "norms"),
    [*((freeze, "train") for freeze in TRAINED), ("none", "frozen")],
)
def test_what_is_frozen_stays_to_the_bit(freeze: str, norms: str) -> None:
    model = randomize(dpn_jax.DPN(models.TINY.replace(num_classes=CLASSES), rngs=None))
    # by itself this optimizer would let frozen parameters decay; make_optimizer's would not
    config = FinetuneConfig(freeze=freeze, norms=norms, ema_decay=0.4)
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1))
    state = TrainState.create(model, tx, config)
    params, statistics = arrays(state.params), arrays(state.statistics)
    frozen = frozen_norms(config, model)
    for seed in range(2):
        state, _ = train_step(state, batch(seed=seed))
    for ema in (False, True):
        for name, value in arrays(state.weights(ema=ema)[0]).items():
            assert (value.tobytes() != params[name].tobytes()) == TRAINED[freeze](name), name
        for name, value in arrays(state.weights(ema=ema)[1]).items():
            assert (value.tobytes() != statistics[name].tobytes()) == (name.rpartition(".")[0] not in frozen), name


def test_state_is_donated_and_the_model_is_not(
    model: dpn_jax.DPN, begin: Callable[[FinetuneConfig], TrainState]
) -> None:
    before = arrays(nnx.as_pure(nnx.state(model)))
    first = begin(PLAIN)
    copy = first.model()
    second, _ = train_step(first, batch())
    assert int(second.step) == 1
    assert first.params["classifier"]["kernel"].is_deleted()
    after = arrays(nnx.as_pure(nnx.state(model)))
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    assert not model.norm.use_running_average and model.config.drop_rate == 0

    second.model().classifier.bias[...] += 1.0
    np.testing.assert_array_equal(copy.classifier.kernel[...], model.classifier.kernel[...])
    assert copy.config == model.config and copy.provenance == model.provenance

    copy = begin(FULL).model()
    assert copy.config == TINY.replace(drop_rate=0.3)
    assert copy.norm.use_running_average and copy.dropout.deterministic
    copy.train()  # dropout has its random numbers
    assert 0 < np.count_nonzero(copy.dropout(np.ones(100, np.float32))) < 100


@pytest.mark.slow
def test_one_program_for_all_steps(
    begin: Callable[[FinetuneConfig], TrainState], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = Mock(wraps=step_module._train_step)
    monkeypatch.setattr(step_module, "_train_step", traced)
    state, losses = begin(FULL), []
    for _ in range(4):
        state, metrics = train_step(state, batch())
        losses.append(float(metrics["loss"]))
    # what is drawn anew for each step differs, and from the third on the parameters
    assert len(set(losses)) == 4

    again = begin(FULL)
    for loss in losses:
        again, metrics = train_step(again, batch())
        assert float(metrics["loss"]) == loss
    assert traced.call_count == 1
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(state)))


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [True, False])
def test_moving_average_is_numpys(begin: Callable[[FinetuneConfig], TrainState], warmup: bool) -> None:
    state = begin(dataclasses.replace(FULL, ema_warmup=warmup))
    decays = iter((0.0, 1 - 2 ** (-2 / 3) if warmup else 0.8))  # of each update, as timm.utils.ModelEmaV3
    expected = [arrays(tree) for tree in state.weights()]
    for number in range(1, 5):
        state, _ = train_step(state, batch(seed=number))
        decay = next(decays) if number % 2 == 0 else 1.0
        for average, now in zip(expected, map(arrays, state.weights()), strict=True):
            for name in average if number % 2 == 0 else ():
                moved = decay * average[name].astype(np.float64) + (1 - decay) * now[name]
                average[name] = now[name] if name.endswith("steps") else moved
    for average, got in zip(expected, map(arrays, state.weights(ema=True)), strict=True):
        for name, value in got.items():
            np.testing.assert_allclose(value, average[name], rtol=1e-5, atol=1e-6, err_msg=name)
    evaluated, model = eval_step(state, batch(), ema=True), state.model(ema=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits_of(model, batch()["image"]), batch()["label"])
    assert float(evaluated["loss"]) == pytest.approx(float(loss.sum()), rel=1e-4)
    assert float(eval_step(state, batch())["loss"]) != pytest.approx(float(loss.sum()), rel=1e-4)


def test_evaluation_counts_what_is_real(begin: Callable[[FinetuneConfig], TrainState]) -> None:
    torch = pytest.importorskip("torch")
    state, data = begin(PLAIN), batch(32)
    weight = (np.arange(32) < 27).astype(np.float32)
    got = eval_step(state, data | {"weight": weight})
    logits = logits_of(state.model(), data["image"])[:27]
    order = np.argsort(-logits, axis=1)
    hits = order == data["label"][:27, None]
    loss = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(data["label"][:27]).long(), reduction="sum"
    )
    assert {name: float(value) for name, value in got.items()} == {
        "loss": pytest.approx(loss.item(), rel=1e-4),
        "correct": hits[:, 0].sum(),
        "correct5": hits[:, :5].sum(),
        "count": 27,
    }
    assert 0 < hits[:, 0].sum() < hits[:, :5].sum() < 27


@pytest.mark.parametrize("soft", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_label_smoothing_is_torchs(begin: Callable[[FinetuneConfig], TrainState], soft: bool) -> None:
    torch = pytest.importorskip("torch")
    data, rng = batch(), np.random.default_rng(1)
    weight = np.array([1, 0.5, 0, 2], np.float32)
    labels = rng.dirichlet(np.ones(CLASSES), 4).astype(np.float32) if soft else data["label"]
    state = begin(PLAIN)
    bias = arrays(state.params)["classifier.bias"]
    logits = torch.from_numpy(logits_of(state.model(), data["image"]))
    target = torch.from_numpy(labels) if soft else torch.from_numpy(labels).long()
    losses = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.3, reduction="none")
    state, metrics = train_step(state, data | {"label": labels, "weight": weight})
    assert float(metrics["loss"]) == pytest.approx(float(losses @ torch.from_numpy(weight)), rel=1e-4)
    # the gradient is that of the weighted mean
    one_hot = labels if soft else np.eye(CLASSES)[labels]
    error = logits.softmax(1).numpy() - (0.7 * one_hot + 0.3 / CLASSES)
    moved = arrays(state.params)["classifier.bias"] - bias
    np.testing.assert_allclose(moved, -0.1 * weight @ error / weight.sum(), rtol=1e-3, atol=1e-5)


def test_accumulated_batches_are_one_large_batch(begin: Callable[[FinetuneConfig], TrainState]) -> None:
    whole = batch(4)
    large, _ = train_step(begin(PLAIN), whole)
    small = begin(dataclasses.replace(PLAIN, accumulate=2))
    for part in range(2):
        small, _ = train_step(small, {name: np.split(values, 2)[part] for name, values in whole.items()})
    before, got = arrays(begin(PLAIN).params), arrays(small.params)
    for name, value in arrays(large.params).items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.abs(value - before[name]).max() > 1e-4, name


@pytest.mark.slow
def test_gradient_norm_is_that_of_what_is_trained(model: dpn_jax.DPN) -> None:
    state = start(model, freeze="backbone", clip_norm=1e-3, label_smoothing=0.0, **SGD)
    eager, data = state.model(), batch()

    def loss(classifier: tuple[jax.Array, jax.Array]) -> jax.Array:
        kernel, bias = classifier
        logits = features @ kernel[0, 0] + bias
        return optax.softmax_cross_entropy_with_integer_labels(logits, data["label"]).mean()

    normalized = Transform(dpn_jax.pretrained.default_preprocessing(TINY)).normalize(data["image"])
    features = eager.forward_features(normalized).mean(axis=(1, 2))
    expected = optax.tree.norm(jax.grad(loss)((eager.classifier.kernel[...], eager.classifier.bias[...])))
    _, metrics = train_step(state, data)
    assert float(metrics["gradient_norm"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(metrics["learning_rate"]) == pytest.approx(0.1)


@pytest.mark.slow
def test_bfloat16_and_remat_keep_float32_parameters(model: dpn_jax.DPN) -> None:
    half = dpn_jax.DPN(TINY, dtype=jnp.bfloat16, remat=True, rngs=None)
    nnx.update(half, nnx.state(model))
    state, metrics = train_step(start(half, **SGD), batch())
    _, expected = train_step(start(model, **SGD), batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    assert metrics["loss"].dtype == jnp.float32
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=0.05)
    assert float(metrics["loss"]) != float(expected["loss"])
    assert state.model().dtype == jnp.bfloat16


def test_misfits_are_named(model: dpn_jax.DPN) -> None:
    config, data = FinetuneConfig(), batch()
    state = TrainState.create(model, optax.sgd(0.1), config)
    with pytest.raises(ValueError, match=r"'image' and 'label', got \['image'\]"):
        train_step(state, {"image": data["image"]})
    with pytest.raises(ValueError, match=r"images must be \[B, H, W, 3\]"):
        eval_step(state, data | {"image": data["image"][..., :1]})
    with pytest.raises(ValueError, match="normalized floats"):
        eval_step(state, data | {"image": data["image"].astype(np.int32)})
    with pytest.raises(ValueError, match=r"labels must be \[4\] or \[4, 7\], got \[4, 6\]"):
        eval_step(state, data | {"label": np.zeros((4, 6), np.float32)})
    for ask in (lambda: state.model(ema=True), lambda: eval_step(state, data, ema=True)):
        with pytest.raises(ValueError, match="set ema_decay"):
            ask()
    for change in ({"num_classes": 0}, {"global_pool": ""}):
        with pytest.raises(ValueError, match="classifier and pooling"):
            start(dpn_jax.DPN(TINY.replace(**change), rngs=None))
    with pytest.raises(ValueError, match="preprocessing has 1 channels and the model 3"):
        TrainState.create(model, optax.sgd(0.1), config, preprocessing=dpn_jax.Preprocessing(mean=(0.5,), std=(0.5,)))
    assert math.isnan(learning_rate_of(state.optimizer))


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixed_labels_are_fractions_of_the_pixels(alphas: tuple[float, float]) -> None:
    size = 5
    images = jnp.broadcast_to(jnp.eye(size)[:, None, None], (size, 12, 17, size))  # each image in its own channel
    mixed = jax.jit(lambda key: mix(key, images, jnp.eye(size), mixup=alphas[0], cutmix=alphas[1]))
    ratios, cuts = [], 0
    for seed in range(60):
        got, targets = mixed(jax.random.key(seed))
        np.testing.assert_allclose(got.mean(axis=(1, 2)), targets, atol=1e-5)
        np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
        kept = np.asarray(got[0, :, :, 0])
        np.testing.assert_allclose(got[0, :, :, 4], 1 - kept, atol=1e-6)
        ratios.append(float(targets[0, 0]))
        if set(np.unique(kept)) <= {0, 1} and 0 < kept.mean() < 1:
            cuts += 1
            rows, columns = np.nonzero(kept == 0)
            assert (1 - kept).sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # a rectangle
        elif not alphas[0]:
            assert kept.min() == kept.max()  # a cut of nothing, or of everything
        else:
            assert np.ptp(kept) == 0
    assert len(set(ratios)) > 30 and min(ratios) >= 0 and max(ratios) <= 1
    assert 0.3 < np.mean(ratios) < 0.75
    low, high = {(0.4, 0.0): (0, 0), (0.0, 1.0): (45, 60), (0.4, 1.0): (15, 45)}[alphas]
    assert low <= cuts <= high


def test_nothing_is_mixed_unless_asked() -> None:
    images, targets = jnp.ones((2, 4, 4, 3)), jnp.eye(2)
    assert mix(jax.random.key(0), images, targets) == (images, targets)


@pytest.mark.slow
def test_batches_and_states_go_onto_a_mesh(model: dpn_jax.DPN) -> None:
    mesh = data_mesh()
    state = replicate(start(model, **SGD, norms="frozen"), mesh)
    for _ in range(2):
        state, metrics = train_step(state, shard_batch(batch(), mesh))
    assert state.step.sharding == jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert float(metrics["count"]) == 4


@functools.cache
def on_one_device() -> dict[str, np.ndarray]:
    return data_parallel.train()


def compare(got: dict[str, np.ndarray], devices: int) -> None:
    assert got.pop("devices") == devices
    expected = on_one_device()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def spawn(output: Path, index: int, count: int, coordinator: str, devices: int, axis: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.data_parallel", output, index, count, coordinator, axis]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "axis"),
    [(1, 8, "auto"), pytest.param(1, 4, "explicit", marks=pytest.mark.exhaustive), (2, 2, "auto")],
)
def test_many_devices_and_processes_are_one_device(tmp_path: Path, processes: int, devices: int, axis: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    outputs = [tmp_path / f"{index}.npz" for index in range(processes)]
    running = [spawn(output, index, processes, coordinator, devices, axis) for index, output in enumerate(outputs)]
    try:
        for process in running:
            log, _ = process.communicate(timeout=300)
            assert process.returncode == 0, log
    finally:
        for process in running:
            process.kill()
            process.wait()
    for output in outputs:
        with np.load(output) as saved:
            seen = dict(saved)
            # those of a called computation are not ordered with the others: a step of DPN-68 at 224 pixels hangs
            main, called = seen.pop("collectives")
            assert main > 20 and called == 0
            compare(seen, processes * devices)


@pytest.mark.slow
def test_a_batch_must_fit_the_devices() -> None:
    script = (
        "import numpy as np\n"
        "from dpn_jax.finetune import data_mesh, shard_batch\n"
        "try:\n    shard_batch({'label': np.zeros(6)}, data_mesh())\n"
        "except ValueError as error:\n    print(error)\n"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("a batch must be a multiple of the 4 devices, got 6 for 'label'"), done
