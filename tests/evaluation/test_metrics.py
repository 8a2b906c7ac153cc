"""Every figure is scikit-learn's, scipy's or a formula's on the same predictions, digit for digit."""

import numpy as np
import pytest

from dpn_jax.evaluation.metrics import Evaluation, Proportion, most_confused


def random_result(seed: int, images: int = 300, classes: int = 7, *, scale: float = 2.0) -> Evaluation:
    """Logits that know the classes a little; class 3 has no images."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([k for k in range(classes) if k != 3], images)
    logits = (scale * (rng.normal(size=(images, classes)) + np.eye(classes)[labels])).astype(np.float32)
    names = tuple(f"class {k}" for k in range(classes))
    return Evaluation(names, tuple(f"{n}.png" for n in range(images)), labels, logits)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")  # class 3 has no images
@pytest.mark.parametrize("seed", range(3))
def test_scikit_learn_says_the_same(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    result = random_result(seed)
    true, taken, every = result.labels, result.predictions, range(7)
    assert result.top1.value == metrics.accuracy_score(true, taken)
    assert result.top5.value == metrics.top_k_accuracy_score(true, result.logits, k=5, labels=every)
    assert result.top(3).value == metrics.top_k_accuracy_score(true, result.logits, k=3, labels=every)
    np.testing.assert_array_equal(result.confusion, metrics.confusion_matrix(true, taken, labels=every))
    assert result.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(true, taken), rel=1e-15)
    assert result.macro_f1 == pytest.approx(metrics.f1_score(true, taken, average="macro"), rel=1e-15)
    shifted = np.exp(result.logits.astype(np.float64))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    assert result.loss == pytest.approx(metrics.log_loss(true, probabilities, labels=every), rel=1e-12)
    report = metrics.classification_report(true, taken, output_dict=True, zero_division=0)
    for row in result.per_class:
        theirs = report[row.name.removeprefix("class ")]
        assert (row.images, row.f1) == (theirs["support"], pytest.approx(theirs["f1-score"], rel=1e-15))
        if row.images:
            assert row.recall.value == theirs["recall"]
        if row.precision.total:
            assert row.precision.value == theirs["precision"]


@pytest.mark.parametrize(("count", "total"), [(0, 5), (5, 5), (19, 20), (38_123, 50_000)])
def test_the_interval_is_wilsons(count: int, total: int) -> None:
    z, share = 1.959963984540054, count / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    assert Proportion(count, total).interval == pytest.approx((middle - half, middle + half), abs=1e-12)
    assert Proportion(0, 0).interval == (0, 1) and np.isnan(Proportion(0, 0).value)


def test_calibration_by_hand() -> None:
    result = random_result(1)
    probabilities = np.exp(result.logits) / np.exp(result.logits).sum(axis=1, keepdims=True)
    confidence, right = probabilities.max(axis=1), result.predictions == result.labels
    error = 0.0
    for low, high in zip(np.arange(15) / 15, np.arange(1, 16) / 15, strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    found = result.calibration()
    assert found.error == pytest.approx(error, rel=1e-5) and found.counts.sum() == len(result)
    sure = Evaluation(("a", "b"), ("x", "y"), np.array([0, 1]), np.array([[99, 0], [99, 0]], np.float32))
    assert sure.calibration().error == 0.5 and sure.calibration().counts.tolist() == [0] * 14 + [2]
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        result.calibration(0)


def test_the_temperature_mends_what_was_spoiled() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 5)).astype(np.float32) * 2
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(5, p=row / row.sum()) for row in chances])
    spoiled = Evaluation(tuple("abcde"), ("",) * 4000, labels, 3 * logits)
    assert spoiled.temperature == pytest.approx(3, rel=0.05)
    assert spoiled.calibration(spoiled.temperature).error < 0.03 < 0.1 < spoiled.calibration().error
    losses = [
        Evaluation(tuple("abcde"), ("",) * 4000, labels, 3 * logits / t).loss for t in (1, spoiled.temperature, 9)
    ]
    assert losses[1] == min(losses)


def test_equal_logits_stand_in_the_order_of_the_classes() -> None:
    logits = np.array([[1, 1, 0], [1, 1, 0], [0, np.nan, 1]], np.float32)
    result = Evaluation(tuple("abc"), tuple("xyz"), np.array([0, 1, 1]), logits)
    assert result.ranks.tolist() == [0, 1, 3] and result.predictions.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="k must be 1 to the number of classes, 3, got 4"):
        result.top(4)


def test_the_worst_come_first() -> None:
    result = random_result(2)
    worst = result.mistakes(5)
    wrong = result.predictions != result.labels
    assert wrong[worst].all() and result.confidences[worst[0]] == result.confidences[wrong].max()
    assert (np.diff(result.confidences[worst]) <= 0).all()
    (true, taken, count), *rest = most_confused(result, 4)
    off_diagonal = result.confusion - np.diag(np.diag(result.confusion))
    assert count == off_diagonal.max() and len(rest) == 3
    assert result.confusion[result.class_names.index(true), result.class_names.index(taken)] == count


def test_nothing_to_evaluate() -> None:
    nothing = Evaluation(("a", "b"), (), np.zeros(0, int), np.zeros((0, 2), np.float32))
    assert nothing.top1 == (0, 0) and nothing.per_class == () and nothing.mistakes(3) == []
