"""The optimizer and its schedule, against hand-computed values."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import dpn_jax
from dpn_jax.finetune import FinetuneConfig, frozen_norms, learning_rate, make_optimizer
from dpn_jax.finetune.optimizer import StepCounts
from dpn_jax.finetune.parameters import layer_distance, path_of
from tests.support.models import TINY, randomize

RATE = 0.1
PLAIN = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "learning_rate": RATE}


@pytest.fixture(scope="module")
def model() -> dpn_jax.DPN:
    config = TINY.replace(depths=(1, 2), num_classes=3)
    return randomize(dpn_jax.DPN(config, rngs=None))


@pytest.fixture(scope="module")
def params(model: dpn_jax.DPN) -> nnx.State:
    """Of each block only `reduce`: fewer are compiled sooner."""
    flat = nnx.to_flat_state(nnx.as_pure(nnx.state(model, nnx.Param)))
    return nnx.from_flat_state([(path, leaf) for path, leaf in flat if path[0] != "stages" or path[3] == "reduce"])


def by_name(tree: nnx.State) -> dict[str, np.ndarray]:
    leaves = jax.tree.leaves_with_path(tree)
    return {".".join(map(str, path_of(path))): np.asarray(leaf) for path, leaf in leaves}


def filled(params: nnx.State, value: float) -> nnx.State:
    return jax.tree.map(lambda p: np.full(p.shape, value, p.dtype), params)


def updates_of(tx: optax.GradientTransformation, params: nnx.State, gradients: Sequence[float]) -> list[nnx.State]:
    """The updates for gradients that are the same everywhere; the parameters stay as they are."""
    init, update = jax.jit(tx.init), jax.jit(tx.update)  # one program each, not one for each shape
    state, updates = init(params), []
    for gradient in gradients:
        update_, state = update(filled(params, gradient), state, params)
        updates.append(update_)
    return updates


@pytest.mark.parametrize("lengths", [{"steps_per_epoch": 5}, {"steps": 50}, {"steps": 50, "steps_per_epoch": 5}])
def test_rate_has_a_linear_warmup_and_a_cosine_decay(lengths: dict[str, int]) -> None:
    config = FinetuneConfig(
        epochs=10, warmup_epochs=2, learning_rate=0.2, final_learning_rate=0.02, warmup_learning_rate=0.01
    )
    schedule = learning_rate(config, **lengths)
    for update in range(60):
        turn = math.cos(math.pi * min((update - 10) / 40, 1))
        expected = 0.01 + 0.19 * update / 10 if update < 10 else 0.02 + 0.18 * (1 + turn) / 2
        assert float(schedule(update)) == pytest.approx(expected, abs=1e-7), update


def test_rate_without_length_warmup_or_fall() -> None:
    assert float(learning_rate(FinetuneConfig(learning_rate=0.3))(1000)) == pytest.approx(0.3)
    no_warmup = learning_rate(FinetuneConfig(learning_rate=0.3, warmup_epochs=0), steps=10)
    assert [float(no_warmup(update)) for update in (0, 5, 10)] == pytest.approx([0.3, 0.15, 0])
    only_warmup = learning_rate(FinetuneConfig(epochs=2, learning_rate=0.3, warmup_epochs=2), steps=10)
    assert [float(only_warmup(update)) for update in (0, 3, 9)] == pytest.approx([1e-5, 0.1, 0.3], abs=1e-5)
    gentle = learning_rate(FinetuneConfig(learning_rate=1e-6), steps=20)
    assert max(float(gentle(update)) for update in range(20)) == pytest.approx(1e-6), "the warmup is not above the peak"
    for lengths in ({"steps": 0}, {"steps_per_epoch": 0}):
        with pytest.raises(ValueError, match="must be more than 0"):
            learning_rate(FinetuneConfig(), **lengths)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lion"])
def test_only_kernels_decay(name: str, model: dpn_jax.DPN, params: nnx.State) -> None:
    config = FinetuneConfig(optimizer=name, learning_rate=RATE, weight_decay=0.5)
    [updates] = updates_of(make_optimizer(config, model), params, [0])
    # without a gradient, the update of lamb has the norm of the kernel
    factor = RATE if name == "lamb" else RATE * 0.5
    values = by_name(params)
    for path, update in by_name(updates).items():
        expected = -factor * values[path] if path.endswith("kernel") else np.zeros_like(values[path])
        np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=path)


def test_adaptive_optimizers_scale_their_steps(model: dpn_jax.DPN, params: nnx.State) -> None:
    config = {"learning_rate": RATE, "weight_decay": 0.0}
    length = np.linalg.norm(by_name(params)["classifier.kernel"])
    size = by_name(params)["classifier.kernel"].size
    # adam and lion move each value by the rate, lamb each tensor by the rate times its length
    for name, expected in (("adamw", RATE), ("lion", RATE), ("lamb", RATE * length / size**0.5)):
        [updates] = updates_of(make_optimizer(FinetuneConfig(optimizer=name, **config), model), params, [0.5])
        np.testing.assert_allclose(by_name(updates)["classifier.kernel"], -expected, rtol=1e-4, err_msg=name)


def test_sgd_is_torchs(model: dpn_jax.DPN, params: nnx.State) -> None:
    config = FinetuneConfig(optimizer="sgd", momentum=0.9, weight_decay=0.2, learning_rate=RATE)
    tx = make_optimizer(config, model)
    state, update, name = jax.jit(tx.init)(params), jax.jit(tx.update), "stages.0.0.reduce.conv.kernel"
    expected, buffer = by_name(params)[name].astype(np.float64), 0.0
    for gradient in (0.5, -1.0, 0.25):
        updates, state = update(filled(params, gradient), state, params)
        params = jax.tree.map(lambda p, u: np.asarray(p) + np.asarray(u), params, updates)
        buffer = 0.9 * buffer + (gradient + 0.2 * expected)
        expected = expected - RATE * buffer
    np.testing.assert_allclose(by_name(params)[name], expected, rtol=1e-5, atol=1e-6)


def test_layer_decay_counts_blocks_from_the_classifier(model: dpn_jax.DPN, params: nnx.State) -> None:
    tx = make_optimizer(FinetuneConfig(**PLAIN, layer_decay=0.5), model)
    [updates] = updates_of(tx, params, [1])
    factors = {name: set(np.unique(np.float32(update / -RATE).round(5))) for name, update in by_name(updates).items()}
    expected = {"classifier": 1, "norm": 0.5, "stages.1.1": 0.5, "stages.1.0": 0.25, "stages.0.0": 0.125}
    for prefix, factor in (expected | {"stem": 0.0625}).items():
        found = set.union(*(values for name, values in factors.items() if name.startswith(prefix + ".")))
        assert found == {np.float32(factor)}, prefix
    assert layer_distance(("stem", "conv", "kernel"), (3, 4, 20, 3)) == 31


def test_frozen_parameters_have_no_update_and_no_moments(model: dpn_jax.DPN, params: nnx.State) -> None:
    config = FinetuneConfig(freeze="backbone", accumulate=2, clip_norm=1.0, layer_decay=0.5)
    tx = make_optimizer(config, model)
    # two moments and the accumulated gradient of the classifier's kernel and bias
    assert sum(leaf.ndim > 0 for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params))) == 6
    updates = updates_of(tx, params, [1, 1])[-1]
    for name, update in by_name(updates).items():
        assert np.any(update) == name.startswith("classifier"), name


def test_clipping_comes_first_and_sees_only_what_is_trained(model: dpn_jax.DPN, params: nnx.State) -> None:
    tx = make_optimizer(FinetuneConfig(**PLAIN, freeze="backbone", clip_norm=2.0), model)
    long, short = (by_name(updates) for updates in updates_of(tx, params, [1e3, 1e-3]))  # the frozen part is longer
    assert math.hypot(*(np.linalg.norm(update) for update in long.values())) == pytest.approx(RATE * 2, rel=1e-5)
    np.testing.assert_allclose(short["classifier.bias"], -RATE * 1e-3, rtol=1e-5)


def test_accumulation_averages_then_clips_then_moves(model: dpn_jax.DPN, params: nnx.State) -> None:
    config = FinetuneConfig(**PLAIN, accumulate=3, clip_norm=1e3)
    tx = make_optimizer(config, model, steps=4, steps_per_epoch=1)
    first = [by_name(updates)["classifier.bias"][0] for updates in updates_of(tx, params, (1.0, 2.0, 6.0) * 2)]
    # the rate counts updates: the warmup's at the first, the highest at the second
    assert first == pytest.approx([0, 0, -1e-5 * 3, 0, 0, -RATE * 3], rel=1e-3)


def test_what_is_left_over_at_the_end_of_an_epoch_is_an_update(model: dpn_jax.DPN, params: nnx.State) -> None:
    config = FinetuneConfig(**PLAIN, accumulate=3, warmup_epochs=0, final_learning_rate=RATE)
    tx = make_optimizer(config, model, batches_per_epoch=5)
    gradients = (1.0, 2.0, 6.0, 1.0, 5.0)  # the mean of three, and of the two that are left
    moved = [by_name(updates)["classifier.bias"][0] for updates in updates_of(tx, params, gradients * 2)]
    assert moved == pytest.approx([0, 0, -RATE * 3, 0, -RATE * 3] * 2)
    fewer = make_optimizer(dataclasses.replace(config, accumulate=16), model, batches_per_epoch=2)
    moved = [by_name(updates)["classifier.bias"][0] for updates in updates_of(fewer, params, (1.0, 2.0) * 2)]
    assert moved == pytest.approx([0, -RATE * 1.5] * 2)


@pytest.mark.parametrize(("epochs", "batches", "accumulate"), [(1, 4, 4), (1, 1, 1), (1, 3, 16), (2, 2, 2)])
def test_every_run_has_an_update_at_the_full_rate(epochs: int, batches: int, accumulate: int) -> None:
    config = FinetuneConfig(epochs=epochs, accumulate=accumulate, learning_rate=RATE)
    steps = StepCounts(config, batches)
    assert steps.updates == epochs * math.ceil(batches / accumulate)
    schedule = learning_rate(config, steps_per_epoch=steps.updates_per_epoch)
    rates = [float(schedule(update)) for update in range(steps.updates)]
    assert min(rates) > 0 and max(rates) == pytest.approx(RATE)


def test_checkpoints_are_counted_in_updates() -> None:
    steps = StepCounts(FinetuneConfig(epochs=2, checkpoint_every=2, accumulate=3), per_epoch=8)
    assert (steps.total, steps.updates) == (16, 6)
    assert [step for step in range(1, 17) if steps.saves(step)] == [6, 8, 11, 16]
    assert [step for step in range(17) if steps.ends_epoch(step)] == [8, 16]


def test_frozen_norms_follow_frozen_parameters(model: dpn_jax.DPN) -> None:
    blocks = [f"stages.{stage}.{block}" for stage, block in ((0, 0), (1, 0), (1, 1))]
    units = ["reduce", "grouped", "expand"]
    norms = ["stem.norm"]
    for block in blocks:
        norms += [f"{block}.shortcut.norm"] * (block[-1] == "0") + [f"{block}.{unit}.norm" for unit in units]
    norms.append("norm")
    assert frozen_norms(FinetuneConfig(norms="frozen"), model) == tuple(norms)
    expected = {"none": 0, "weights": 0, "stem": 1, "stage1": 5, "stage2": len(norms) - 1, "backbone": len(norms)}
    for freeze, count in expected.items():
        assert frozen_norms(FinetuneConfig(freeze=freeze), model) == tuple(norms[:count]), freeze


def test_what_cannot_be_frozen_is_refused(model: dpn_jax.DPN) -> None:
    with pytest.raises(ValueError, match=r"freeze must be stage1 to stage2 .* got 'stage3'"):
        make_optimizer(FinetuneConfig(freeze="stage3"), model)
    headless = dpn_jax.DPN(model.config.replace(num_classes=0), rngs=None)
    with pytest.raises(ValueError, match="'backbone' leaves nothing to train"):
        make_optimizer(FinetuneConfig(freeze="backbone"), headless)


def test_works_in_nnx_optimizer(model: dpn_jax.DPN) -> None:
    model = nnx.clone(model)
    before = by_name(nnx.as_pure(nnx.state(model, nnx.Param)))
    config = FinetuneConfig(**PLAIN | {"momentum": 0.9}, freeze="stage1", layer_decay=0.5, clip_norm=1e9)
    optimizer = nnx.Optimizer(model, make_optimizer(config, model), wrt=nnx.Param)
    gradients = jax.tree.map(lambda p: np.ones(p.shape, p.dtype), nnx.state(model, nnx.Param))
    update = nnx.jit(lambda optimizer, model: optimizer.update(model, gradients))
    for _ in range(2):
        update(optimizer, model)
    after = by_name(nnx.as_pure(nnx.state(model, nnx.Param)))
    np.testing.assert_array_equal(after["stages.0.0.reduce.conv.kernel"], before["stages.0.0.reduce.conv.kernel"])
    np.testing.assert_allclose(before["classifier.bias"] - after["classifier.bias"], RATE * 2.9, rtol=1e-5)
