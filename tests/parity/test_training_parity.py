"""Training against timm in float64: the loss, every gradient, and the running statistics."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("tests.support.timm_models")
import torch

import dpn_jax
from dpn_jax.checkpoint.names import name_table, to_flax
from tests.support.timm_models import nchw, random_images, randomized, relative_error, save_timm

RATE = 0.05
BOUND = 1e-8


def loss_of(model: dpn_jax.DPN, images: jax.Array, labels: jax.Array, backend: str | None) -> jax.Array:
    logits = model(images) if backend is None else dpn_jax.fast_apply(model, images, backend=backend)
    scores = jax.nn.log_softmax(logits)
    return -(scores * jax.nn.one_hot(labels, scores.shape[1], dtype=scores.dtype)).sum(axis=1).mean()


@functools.partial(nnx.jit, static_argnames="backend")
def step(model: dpn_jax.DPN, images: jax.Array, labels: jax.Array, backend: str | None) -> tuple[jax.Array, nnx.State]:
    """One step of plain SGD; the model changes in place."""
    loss, gradients = nnx.value_and_grad(loss_of)(model, images, labels, backend)
    parameters = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, g: p - RATE * g, parameters, gradients))
    return loss, gradients


FULL, SHORT = {}, {"k_sec": (1, 2, 1, 1)}
# without the costly passes, XLA's own grouped convolutions take minutes to differentiate
XLAS_OWN = (pytest.mark.slow, pytest.mark.optimized)


@pytest.mark.parametrize(
    ("name", "options", "remat", "norms", "backend"),
    [
        pytest.param("dpn68b", SHORT, False, "train", "cpu", marks=pytest.mark.slow),
        pytest.param("dpn68b", SHORT, False, "train", "tpu", marks=XLAS_OWN),
        pytest.param("dpn92", SHORT, False, "train", "gpu", marks=(*XLAS_OWN, pytest.mark.exhaustive)),
        pytest.param("dpn68b", SHORT, True, "train", "cpu", marks=(pytest.mark.slow, pytest.mark.exhaustive)),
        pytest.param("dpn92", SHORT, False, "frozen", "cpu", marks=pytest.mark.slow),
        pytest.param("dpn68b", SHORT, False, "frozen", None, marks=XLAS_OWN),
        pytest.param("dpn68b", FULL, False, "train", None, marks=(*XLAS_OWN, pytest.mark.exhaustive)),
        pytest.param("dpn92", FULL, False, "train", "cpu", marks=(pytest.mark.slow, pytest.mark.exhaustive)),
    ],
)
def test_three_sgd_steps_equal_timm(
    name: str, options: dict[str, object], remat: bool, norms: str, backend: str | None, tmp_path: Path
) -> None:
    theirs = randomized(name, num_classes=10, **options).train(norms == "train")
    path = save_timm(theirs, tmp_path / "model.safetensors")
    ours = dpn_jax.load(path, dtype="float64", param_dtype="float64", remat=remat)
    expected_steps = int(ours.norm.steps[...]) + (3 if norms == "train" else 0)
    ours.train() if norms == "train" else ours.eval()
    optimizer = torch.optim.SGD(theirs.parameters(), lr=RATE)
    entries = {entry.timm: entry for entry in name_table(ours.config)}
    labels = np.array([3, 1, 9, 3])

    for number in range(3):
        images = random_images((4, 64, 64, 3), seed=number)
        loss, gradients = step(ours, jnp.asarray(images), jnp.asarray(labels), backend)
        optimizer.zero_grad()
        expected_loss = torch.nn.functional.cross_entropy(theirs(nchw(images, torch.float64)), torch.from_numpy(labels))
        expected_loss.backward()

        assert abs(loss.item() / expected_loss.item() - 1) <= BOUND
        got = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(gradients)}
        expected = {n: to_flax(entries[n], p.grad.numpy()) for n, p in theirs.named_parameters()}
        assert got.keys() == {entries[n].flax for n in expected}
        errors = {n: relative_error(got[entries[n].flax], value) for n, value in expected.items()}
        assert max(errors.values()) <= BOUND, max(errors.items(), key=lambda item: item[1])
        optimizer.step()

    got = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(ours))}
    for entry_name, value in theirs.state_dict().items():
        entry = entries[entry_name]
        error = np.abs(np.asarray(got[entry.flax]) - to_flax(entry, value.numpy())).max()
        assert error <= BOUND * max(1, float(value.abs().max())), entry_name
    assert int(ours.norm.steps[...]) == int(theirs.features.conv5_bn_ac.bn.num_batches_tracked) == expected_steps
