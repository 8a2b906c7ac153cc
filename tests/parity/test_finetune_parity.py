"""Fine-tuning against torch and timm: the loss curve of SGD, and which parameter is in which group."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import KeyPath

pytest.importorskip("tests.support.timm_models")
import torch

import dpn_jax
from dpn_jax.checkpoint.names import name_table, to_flax
from dpn_jax.finetune import FinetuneConfig, TrainState, make_optimizer, train_step
from dpn_jax.finetune.parameters import decayed, layer_distance, path_of
from dpn_jax.finetune.step import _average
from tests.support.timm_models import nchw, random_images, randomize, randomized, save_timm, timm_dpn

BOUND = 1e-6
CLASSES = 5
BATCHES = 8
SGD = {"optimizer": "sgd", "learning_rate": 0.005, "momentum": 0.9, "weight_decay": 0.01}


def tiny(timm: ModuleType) -> torch.nn.Module:
    return randomize(timm_dpn(timm, k_sec=(1,), inc_sec=(4,)).double())


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path_of(path)))


def dpn68b(timm: ModuleType) -> torch.nn.Module:
    return randomized("dpn68b", k_sec=(1, 1, 1, 1), num_classes=CLASSES)


@pytest.mark.parametrize(
    ("make", "size", "norms"),
    [
        pytest.param(tiny, 16, "train", id="tiny-train", marks=pytest.mark.slow),
        pytest.param(tiny, 16, "frozen", id="tiny-frozen", marks=pytest.mark.slow),
        pytest.param(dpn68b, 32, "train", id="dpn68b-train", marks=pytest.mark.slow),
        pytest.param(dpn68b, 32, "frozen", id="dpn68b-frozen", marks=(pytest.mark.slow, pytest.mark.exhaustive)),
    ],
)
def test_fifty_sgd_steps_have_torchs_losses(
    make: Callable[[ModuleType], torch.nn.Module], size: int, norms: str, timm: ModuleType, tmp_path: Path
) -> None:
    config = FinetuneConfig(**SGD, norms=norms, label_smoothing=0.1)
    theirs = make(timm).train(norms == "train")
    ours = dpn_jax.load(save_timm(theirs, tmp_path / "model.safetensors"), dtype="float64", param_dtype="float64")
    state = TrainState.create(ours, make_optimizer(config, ours), config)
    kernels = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim == 1]
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    rng = np.random.default_rng(0)
    batches = [(random_images((4, size, size, 3), seed=n), rng.integers(0, CLASSES, 4)) for n in range(BATCHES)]
    got, expected = [], []
    for number in range(50):
        images, labels = batches[number % BATCHES]
        state, metrics = train_step(state, {"image": images, "label": labels})
        got.append(float(metrics["loss"] / metrics["count"]))
        loss = loss_of(theirs(nchw(images, torch.float64)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())

    np.testing.assert_allclose(got, expected, rtol=BOUND)
    assert np.ptp(got[::BATCHES]) > 0.02  # the same batch: the parameters have moved
    entries = {entry.timm: entry for entry in name_table(ours.config)}
    leaves = [leaf for tree in state.weights() for leaf in jax.tree.leaves_with_path(tree)]
    trained = {dotted(path): np.asarray(leaf) for path, leaf in leaves}
    for name, value in theirs.state_dict().items():
        ours_value, value = trained.pop(entries[name].flax), to_flax(entries[name], value.numpy())
        np.testing.assert_allclose(ours_value, value, rtol=1e-4, atol=BOUND, err_msg=name)
    assert not trained


def test_groups_are_timms(timm: ModuleType) -> None:
    from timm.optim import param_groups_layer_decay  # here, after the fixture has imported timm its way

    theirs = timm.create_model("dpn68b", num_classes=CLASSES)
    groups = param_groups_layer_decay(theirs, weight_decay=0.05, layer_decay=0.5)
    config = dpn_jax.pretrained.get_config("dpn68b").replace(num_classes=CLASSES)
    params = nnx.as_pure(nnx.state(dpn_jax.DPN(config, rngs=None), nnx.Param))
    distances = jax.tree.map_with_path(lambda path, _: layer_distance(path_of(path), config.depths), params)
    ours = {dotted(path): 0.5**value for path, value in jax.tree.leaves_with_path(distances)}
    decays = {dotted(path): value for path, value in jax.tree.leaves_with_path(decayed(params))}

    names = {parameter: name for name, parameter in theirs.named_parameters()}
    flax = {entry.timm: entry.flax for entry in name_table(config)}
    members = [(flax[names[parameter]], group) for group in groups for parameter in group["params"]]
    assert ours == {name: pytest.approx(group["lr_scale"]) for name, group in members}
    assert decays == {name: group["weight_decay"] > 0 for name, group in members}
    assert len(set(ours.values())) == sum(config.depths) + 2


@pytest.mark.parametrize("warmup", [True, False])
def test_the_moving_average_is_timms(warmup: bool, timm: ModuleType) -> None:
    theirs = torch.nn.Linear(3, 2, bias=False).double()
    average = timm.utils.ModelEmaV3(theirs, decay=0.7, use_warmup=warmup)
    config = FinetuneConfig(ema_decay=0.7, ema_warmup=warmup)
    ours = theirs.weight.detach().numpy().copy()
    for update in range(1, 20):
        with torch.no_grad():
            theirs.weight += torch.from_numpy(np.random.default_rng(update).normal(size=(2, 3)))
        average.update(theirs, step=update)
        now = theirs.weight.detach().numpy()
        ours = _average(jnp.asarray(ours), jnp.asarray(now), config, jnp.int32(update), jnp.bool_(True))
        np.testing.assert_allclose(ours, average.module.weight.detach().numpy(), rtol=1e-12)
