"""The training loss and its class weights: torch's, over mixed targets, several batches and several devices."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpn_jax
from dpn_jax.finetune import FinetuneConfig, TrainState, class_weights, finetune, make_optimizer, mix, train_step
from dpn_jax.finetune.loss import batch_metrics
from dpn_jax.finetune.report import read_metrics
from tests.support import models
from tests.support.finetune_runs import write_images, write_weights
from tests.support.models import randomize

CLASSES = 5
WEIGHTS = (0.2, 1.0, 5.0, 2.0, 0.7)


def logits_and_labels(size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(0, 3, (size, CLASSES)).astype(np.float32), rng.integers(0, CLASSES, size)


def mean_loss(logits: jax.Array, targets: np.ndarray, counted: np.ndarray, **options: object) -> jax.Array:
    found = batch_metrics(logits, jnp.asarray(targets), jnp.asarray(counted), **options)
    return found["loss"] / found["count"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_it_is_torchs(smoothing: float, weights: tuple[float, ...] | None) -> None:
    torch = pytest.importorskip("torch")
    logits, labels = logits_and_labels()
    theirs = torch.tensor(logits, requires_grad=True)
    weight = None if weights is None else torch.tensor(weights)
    loss = torch.nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing, reduction="mean")(
        theirs, torch.tensor(labels)
    )
    loss.backward()
    padded = np.concatenate([logits, np.full((3, CLASSES), 9, np.float32)])  # padding counts nowhere
    targets = np.eye(CLASSES, dtype=np.float32)[[*labels, 0, 1, 2]]
    counted = np.array([1] * len(labels) + [0] * 3, np.float32)
    ours, gradient = jax.value_and_grad(mean_loss)(
        jnp.asarray(padded), targets, counted, label_smoothing=smoothing, class_weights=weights
    )
    assert float(ours) == pytest.approx(loss.item(), rel=1e-6)
    np.testing.assert_allclose(gradient[: len(labels)], theirs.grad.numpy(), rtol=0, atol=1e-6)
    assert not gradient[len(labels) :].any()


def test_of_mixed_targets_each_part_has_the_weight_of_its_class() -> None:
    """A picture of half a rare and half a frequent class counts as half of each, above and below the line."""
    logits, labels = logits_and_labels(6)
    targets = 0.75 * np.eye(CLASSES, dtype=np.float32)[labels] + 0.25 * np.eye(CLASSES, dtype=np.float32)[labels[::-1]]
    logs = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    weights = np.array(WEIGHTS)
    above = below = 0.0
    for row in range(6):
        for k in range(CLASSES):
            above -= weights[k] * (0.9 * targets[row, k] + 0.1 / CLASSES) * logs[row, k]
            below += weights[k] * targets[row, k]
    ours = mean_loss(jnp.asarray(logits), targets, np.ones(6, np.float32), label_smoothing=0.1, class_weights=WEIGHTS)
    assert float(ours) == pytest.approx(above / below, rel=1e-6)
    scaled = tuple(7 * weight for weight in WEIGHTS)
    again = mean_loss(jnp.asarray(logits), targets, np.ones(6, np.float32), label_smoothing=0.1, class_weights=scaled)
    assert float(again) == pytest.approx(float(ours), rel=1e-6)


def test_balanced_is_scikit_learns_and_1_in_the_mean_over_the_images() -> None:
    labels = np.random.default_rng(0).choice(CLASSES, 200, p=[0.5, 0.3, 0.1, 0.05, 0.05])
    weights = class_weights(FinetuneConfig(class_weights="balanced"), CLASSES, labels)
    assert np.mean([weights[label] for label in labels]) == pytest.approx(1, abs=1e-12)
    sums = [sum(weights[label] for label in labels if label == k) for k in range(CLASSES)]
    np.testing.assert_allclose(sums, 200 / CLASSES)  # each class counts as much as any other
    utils = pytest.importorskip("sklearn.utils.class_weight")
    theirs = utils.compute_class_weight("balanced", classes=np.arange(CLASSES), y=labels)
    np.testing.assert_allclose(weights, theirs, rtol=1e-12)


def test_weights_that_cannot_be_are_refused() -> None:
    for value, message in (
        ("equal", r"class_weights must be one of \('none', 'balanced'\) or a number for each class, got 'equal'"),
        ((1.0, 0.0), "class_weights must be positive numbers, got 0.0"),
        ((1.0, float("nan")), "class_weights must be positive numbers, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            FinetuneConfig(class_weights=value)
    with pytest.raises(ValueError, match="make up for the same twice; choose one"):
        FinetuneConfig(class_weights="balanced", sampling="balanced")
    balanced = FinetuneConfig(class_weights="balanced")
    with pytest.raises(ValueError, match="one for each of the 3 classes, got 2"):
        class_weights(FinetuneConfig(class_weights=[1, 2]), 3)
    with pytest.raises(ValueError, match=r"counts the training labels: TrainState.create\(..., labels=labels\)"):
        class_weights(balanced, 3)
    with pytest.raises(ValueError, match="no weight for class 1: it has no training images"):
        class_weights(balanced, 3, [0, 2, 2])
    with pytest.raises(ValueError, match="no weight for class 3: there are 3 classes"):
        class_weights(balanced, 3, [0, 1, 2, 3])


@pytest.mark.slow
def test_a_step_follows_the_weighted_mean_of_its_batches() -> None:
    """Of two mixed batches that make one update, and with the padding that a batch may have."""
    model = randomize(dpn_jax.DPN(models.TINY.replace(depths=(1,), dense_increments=(4,)), rngs=None))
    config = FinetuneConfig(
        optimizer="sgd",
        learning_rate=0.5,
        momentum=0,
        weight_decay=0,
        freeze="backbone",
        accumulate=2,
        mixup=0.4,
        label_smoothing=0.2,
        class_weights=WEIGHTS,
    )
    state = TrainState.create(model, make_optimizer(config, model), config)
    before, expected, rng = np.array(model.classifier.bias[...]), [], np.random.default_rng(0)
    features = jax.jit(lambda images: model.forward_head(model.forward_features(images)))
    for step in range(2):
        images = rng.normal(0, 1, (8, 32, 32, 3)).astype(np.float32)
        labels = rng.integers(0, CLASSES, 8, dtype=np.int32)
        counted = np.array([1] * 7 + [0], np.float32)
        key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))[0]
        mixed, targets = mix(key, jnp.asarray(images), jax.nn.one_hot(labels, CLASSES), mixup=0.4)
        state, metrics = train_step(state, {"image": images, "label": labels, "weight": counted})
        logits, weights = np.array(features(mixed), np.float64), np.array(WEIGHTS)
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        wanted = weights * (0.8 * np.array(targets) + 0.2 / CLASSES)
        below = (counted[:, None] * weights * np.array(targets)).sum()
        expected.append((counted[:, None] * (wanted.sum(axis=1, keepdims=True) * shares - wanted)).sum(axis=0) / below)
        loss = -(counted[:, None] * wanted * np.log(shares)).sum() / below
        assert float(metrics["loss"] / metrics["count"]) == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(
        np.array(state.params["classifier"]["bias"]), before - 0.5 * np.mean(expected, axis=0), atol=2e-6
    )


@pytest.mark.slow
def test_a_run_weighs_its_classes_in_training_only(tmp_path: Path) -> None:
    images, weights = write_images(tmp_path / "images"), write_weights(tmp_path / "tiny.safetensors")
    for index in range(3, 10):
        (images / "blue" / f"{index}.png").unlink()
    still = FinetuneConfig(
        epochs=1, batch_size=18, workers=0, learning_rate=1e-30, freeze="backbone", skip_check=True, report=False
    )
    options = {"none": "none", "balanced": "balanced", "explicit": (18 / (3 * 2), 18 / (3 * 8), 18 / (3 * 8))}
    rows = {}
    for name, value in options.items():
        config = dataclasses.replace(still, class_weights=value)
        finetune(images, tmp_path / name, config, source=weights, progress=False)
        rows[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    assert rows["balanced"] == rows["explicit"]
    assert rows["balanced"][-1] == rows["none"][-1], "validation has no weights"
    assert abs(rows["balanced"][0]["loss"] / rows["none"][0]["loss"] - 1) > 1e-4
    finetune(None, tmp_path / "explicit", resume=True)  # its options are read back as they were
