"""A changed model is never silently wrong: what assumes the stock structure refuses it in one line."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dpn_jax
from dpn_jax import DPN
from dpn_jax.blocks import DualPath, DualPathBlock
from dpn_jax.layers import NormAct
from dpn_jax.stock import changes
from tests.support.changed_models import CHANGED, Gate, SqueezeExciteBlock, changed_model
from tests.support.models import TINY

IMAGES = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"num_classes": 0}, {"drop_rate": 0.5}, {"split_expand": True}], ids=str)
def test_stock_models_are_stock(options: dict[str, Any], mode: str) -> None:
    model = dpn_jax.create_model(TINY, **options, dtype=jnp.bfloat16, remat=True)
    getattr(model, mode)()
    assert changes(model) == {}
    assert changes(nnx.view(model, use_running_average=True, deterministic=True)) == {}
    assert changes(nnx.merge(*nnx.split(model))) == {}


@pytest.mark.parametrize("name", CHANGED)
def test_what_was_changed_is_named(name: str) -> None:
    expected = {
        "squeeze-excite after expand": {"stages.0.0": "is a SqueezeExciteAfter, not a DualPathBlock"},
        "squeeze-excite between": {"stages.0.0": "is a SqueezeExciteBlock, not a DualPathBlock"},
        "activation": {"stages.0.0.expand.norm": "activation is 'silu', not 'relu'"},
        "norm": {"stages.0.0.expand.norm": "is a Halved, not a NormAct"},
        "head": {"": "is a OwnHead, not a DPN"},
        "linear head": {"classifier": "is a Linear, not a Conv"},
    }[name]
    found = changes(changed_model(name))
    assert expected.items() <= found.items()


@pytest.mark.parametrize("name", CHANGED)
def test_the_fast_forms_refuse_it_in_one_line(name: str) -> None:
    model = changed_model(name)
    for run in (dpn_jax.fast_forward, lambda model: dpn_jax.fast_apply(model, IMAGES)):
        with pytest.raises(ValueError, match=r"needs a stock DPN, but .* (is a|activation is) .*fast=False") as caught:
            run(model)
        assert "\n" not in str(caught.value)


def test_removed_and_added_blocks_are_named() -> None:
    model = dpn_jax.create_model(TINY)
    last = model.stages[1][-1]
    model.stages[1].append(last)
    assert changes(model) == {"stages.1": "length is 2, not 1"}
    shorter = dpn_jax.create_model(TINY)
    shorter.stages[0] = nnx.List(list(shorter.stages[0])[:-1])
    assert changes(shorter) == {"stages.0": "length is 1, not 2"}


def test_a_method_of_ones_own_is_named() -> None:
    model = dpn_jax.create_model(TINY)
    model.forward_head = lambda features: features.sum()
    assert changes(model) == {"": "has an attribute 'forward_head' that a stock one lacks"}


HIDDEN = {  # changes that are easily overlooked
    "dropout": (lambda model: setattr(model, "dropout", Gate(4, rngs=nnx.Rngs(0))), "dropout", "is a Gate"),
    "no module as dropout": (lambda model: setattr(model, "dropout", None), "", "dropout is None"),
    "a layer's dtype": (
        lambda model: setattr(model.norm, "dtype", jnp.dtype("bfloat16")),
        "norm",
        "dtype is 'bfloat16'",
    ),
    "tied": (
        lambda model: setattr(model.stages[0][0].expand.norm, "scale", model.stages[0][0].grouped.norm.scale),
        "stages.0.0.grouped.norm",
        "scale is the variable of stages.0.0.expand.norm.scale, not its own",
    ),
    "two at once": (
        lambda model: (setattr(model.norm, "epsilon", 1.0), setattr(model.norm, "activation", "silu")),
        "norm",
        "activation is 'silu', not 'relu'; epsilon is 1.0, not 0.001",
    ),
    "method": (lambda model: setattr(model, "forward_head", MethodType(DPN.forward_head, model)), "", "forward_head"),
}


@pytest.mark.parametrize(("change", "path", "said"), HIDDEN.values(), ids=HIDDEN)
def test_hidden_changes_are_named(change: Callable[[dpn_jax.DPN], None], path: str, said: str) -> None:
    model = dpn_jax.create_model(TINY)
    change(model)
    found = changes(model)
    assert next(iter(found)) == path
    assert said in found[path]


def test_methods_that_a_copy_would_not_have_are_refused() -> None:
    model = dpn_jax.create_model(TINY)
    model.forward_features = MethodType(DPN.forward_features, model)
    with pytest.raises(ValueError, match="the model has a method 'forward_features' that was set on it"):
        dpn_jax.Classifier(model, fast=False)


def test_a_stock_model_known_from_within_a_trace_is_good_outside(tmp_path: Path) -> None:
    config = TINY.replace(num_classes=11)  # of no other test: the first to ask is a trace
    model = dpn_jax.create_model(config)
    dpn_jax.save(model, tmp_path / "a.safetensors")
    assert jax.jit(lambda x: x + len(changes(model)))(1) == 1
    loaded = dpn_jax.load(tmp_path / "a.safetensors")
    loaded.norm.mean.set_value(loaded.norm.mean[...] + 1)
    loaded.train()
    assert loaded(IMAGES).shape == (2, 11)


def test_blocks_and_norms_are_arguments() -> None:
    block = functools.partial(SqueezeExciteBlock, ratio=2)
    model = dpn_jax.create_model(TINY, block=block, norm=GroupNormAct)
    assert all(type(block) is SqueezeExciteBlock for stage in model.stages for block in stage)
    assert type(model.stem.norm) is type(model.stages[0][0].expand.norm) is type(model.norm) is GroupNormAct
    assert not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))
    loss = nnx.jit(nnx.value_and_grad(lambda model: model(IMAGES).var()))
    value, gradients = loss(model)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_initial_values_of_a_changed_model() -> None:
    plain, renamed = dpn_jax.create_model(TINY), dpn_jax.create_model(TINY, block=Renamed)
    jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(model)) for model in (plain, renamed)))
    changed = dpn_jax.create_model(TINY, block=ZeroInitialized)
    assert not np.asarray(changed.stages[0][0].reduce.conv.kernel[...]).any(), "what a block sets stays"
    assert np.asarray(changed.stages[0][0].grouped.conv.kernel[...]).any()
    alone = DualPathBlock(TINY.stages[0], 0, split_expand=False, rngs=nnx.Rngs(0))
    assert np.asarray(alone.reduce.conv.kernel[...]).any(), "a block by itself has values too"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "SEBlock"}, "block must be a class of nnx.Module .* got 'SEBlock'"),
        ({"norm": print}, "norm must be a class of nnx.Module .* got <built-in function print>"),
        ({"block": object}, "block must be a class of nnx.Module .* got <class 'object'>"),
        ({"block": lambda *_, **__: None}, "block must be a class of nnx.Module"),
    ],
)
def test_what_is_no_module_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpn_jax.create_model(TINY, **options)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"block Narrow gives shapes .*, the network needs"):
        dpn_jax.create_model(TINY, block=Narrow)
    with pytest.raises(ValueError, match=r"norm Pooling gives shapes .*, the network needs"):
        dpn_jax.create_model(TINY, norm=Pooling)


def test_a_view_changes_nothing_in_the_model() -> None:
    model = dpn_jax.create_model(TINY)
    view = nnx.view(model, use_running_average=True, deterministic=True)
    assert not model.norm.use_running_average and view.norm.use_running_average
    expected = nnx.merge(*nnx.split(model))
    expected.eval()
    run: Callable[..., jax.Array] = nnx.jit(lambda model, images: model(images))
    np.testing.assert_array_equal(run(view, IMAGES), run(expected, IMAGES))
    np.testing.assert_array_equal(view.norm.mean[...], model.norm.mean[...])


class GroupNormAct(nnx.Module):
    """A norm without statistics, of parts one by one."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, activation: str = "relu", **_: Any) -> None:
        self.scale = nnx.Param(jnp.ones(channels))

    def __call__(self, x: Any) -> Any:
        parts, structure = jax.tree.flatten(x)
        return jax.tree.unflatten(structure, [nnx.relu(part / (1 + jnp.abs(part).mean())) for part in parts])


class Renamed(DualPathBlock):
    """Changes nothing."""


class ZeroInitialized(DualPathBlock):
    """Sets a kernel by itself."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        kernel = self.reduce.conv.kernel
        kernel.set_value(jnp.zeros(kernel.shape))


class Narrow(DualPathBlock):
    """Appends nothing."""

    def __call__(self, x: DualPath | jax.Array) -> DualPath:
        residual, dense = super().__call__(x)
        return DualPath(residual, dense[..., 1:])


class Pooling(NormAct):
    """Loses a row."""

    def __call__(self, x: Any) -> Any:
        return jax.tree.map(lambda part: part[:, 1:], super().__call__(x))


@pytest.mark.parametrize("name", CHANGED)
def test_the_plain_form_gives_the_models_own_numbers(name: str, tmp_path: Path) -> None:
    model = changed_model(name)
    model.provenance = model.provenance._replace(preprocessing=dpn_jax.Preprocessing(image_size=32))
    expected = np.asarray(nnx.jit(lambda model, images: model(images))(model, IMAGES))
    for call in (dpn_jax.Classifier, lambda model: dpn_jax.export_model(model, tmp_path / "m", platforms=["cpu"])):
        with pytest.raises(ValueError, match=r"needs a stock DPN, but .*fast=False"):
            call(model)
    classifier = dpn_jax.Classifier(model, fast=False)
    np.testing.assert_allclose(classifier.logits(IMAGES), expected, rtol=1e-5, atol=1e-6)
    best = classifier(np.zeros((40, 50, 3), np.uint8), top_k=1)[0]
    assert best.probability >= 1 / TINY.num_classes
    exported = dpn_jax.export_model(model, tmp_path / "plain", platforms=["cpu"], fast=False)
    np.testing.assert_allclose(exported.call(IMAGES), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squeeze-excite between", "norm"])
def test_training_in_the_plain_form_is_the_models_own(name: str) -> None:
    """Three steps of SGD without anything random, against the same written with `nnx` alone."""
    model = changed_model(name)
    config = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 0.01, "label_smoothing": 0.0}
    labels = np.array([3, 1])
    finetune = pytest.importorskip("dpn_jax.finetune")
    optax = pytest.importorskip("optax")
    with pytest.raises(ValueError, match=r"needs a stock DPN, but .*FinetuneConfig\(fast=False\)"):
        finetune.TrainState.create(
            model, finetune.make_optimizer(finetune.FinetuneConfig(**config), model), finetune.FinetuneConfig(**config)
        )
    config = finetune.FinetuneConfig(**config, fast=False)
    state = finetune.TrainState.create(model, finetune.make_optimizer(config, model), config)
    expected = nnx.merge(*nnx.split(model))
    expected.train()
    expected.dropout = nnx.Dropout(0.0)

    @nnx.jit
    def step(model: nnx.Module, images: jax.Array) -> None:
        def loss(model: nnx.Module) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

        gradients = nnx.grad(loss)(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.01 * g, nnx.state(model, nnx.Param), gradients))

    for _ in range(3):
        state, _ = finetune.train_step(state, {"image": IMAGES, "label": labels})
        step(expected, IMAGES)
    expected.eval()
    np.testing.assert_allclose(state.model()(IMAGES), expected(IMAGES), rtol=1e-4, atol=1e-5)
