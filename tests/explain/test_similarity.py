"""CKA against its definition, and receptive fields."""

import jax
import numpy as np
import pytest

from dpn_jax import explain


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Song et al., 2012, equation 4, term by term."""
    k, m = (features @ features.T for features in (x, y))
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    n, one = len(k), np.ones(len(k))
    last = 2 / (n - 2) * (one @ k @ m @ one)
    return (np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - last) / (n * (n - 3))


def features(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape) + 0.5


def test_it_is_its_definition() -> None:
    a, b = features(0, (20, 5, 3)), features(1, (20, 7))
    b[:, :3] += a[:, 0]
    flat = a.reshape(20, -1)
    expected = hsic(flat, b) / np.sqrt(hsic(flat, flat) * hsic(b, b))
    assert abs(explain.cka(a, b) - expected) < 1e-5
    with jax.enable_x64(True):
        assert abs(explain.cka(a, b) - expected) < 1e-12


def test_minibatches_are_summed_before_the_ratio() -> None:
    a, b = features(0, (24, 5)), features(1, (24, 7))
    b[:, :3] += a[:, :3]
    parts = [slice(0, 10), slice(10, 24)]
    sums = [sum(hsic(x[part], y[part]) for part in parts) for x, y in ((a, b), (a, a), (b, b))]
    expected = sums[0] / np.sqrt(sums[1] * sums[2])
    got = explain.cka([a[part] for part in parts], (b[part] for part in parts))
    assert abs(got - expected) < 1e-5
    assert abs(got - np.mean([explain.cka(a[part], b[part]) for part in parts])) > 1e-4


def test_rotations_scales_and_shifts_do_not_matter_and_noise_does() -> None:
    a = features(0, (64, 16)).astype(np.float32)
    rotation = np.linalg.qr(features(1, (16, 16)))[0].astype(np.float32)
    assert abs(explain.cka(a, 100 + 3 * a @ rotation) - 1) < 1e-4
    unrelated = [explain.cka(a, features(seed, (64, 16))) for seed in range(2, 12)]
    assert abs(np.mean(unrelated)) < 0.03 and min(unrelated) < 0  # unbiased: the biased one is near 0.2 here


def test_half_precision_is_widened() -> None:
    a = features(0, (32, 64))
    assert abs(explain.cka(a.astype(np.float16), a.astype(np.float16)) - 1) < 1e-5


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((8, 3)), np.ones((6, 3)), "features of the same images, got 8 and 6 in a batch"),
        ([np.ones((8, 3))] * 2, [np.ones((8, 3))], "got more batches of one than of the other"),
        (np.ones((1, 3)), np.ones((1, 3)), "at least 4 images a batch for an unbiased estimate, got 1"),
        ([np.ones((8, 3)), np.ones((3, 3))], [np.ones((8, 3)), np.ones((3, 3))], "at least 4 images .* got 3"),
    ],
)
def test_what_has_no_estimate_is_refused(a: object, b: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain.cka(a, b)
