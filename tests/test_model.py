from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dpn_jax
from dpn_jax.checkpoint.names import name_table
from dpn_jax.model import DualPath
from tests.support.models import TINY


@pytest.fixture
def model() -> dpn_jax.DPN:
    model = dpn_jax.create_model(TINY, rngs=nnx.Rngs(0))
    model.eval()
    return model


@pytest.fixture
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, 32, 48, 3))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("dpn68b", "dpn131") else pytest.mark.slow)
        for name in dpn_jax.list_models()
    ],
)
def test_variants_have_the_right_shapes_without_allocating(name: str) -> None:
    model = nnx.eval_shape(lambda: dpn_jax.create_model(name, num_classes=7, in_channels=4, rngs=nnx.Rngs(0)))
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))}
    assert shapes == {entry.flax: entry.flax_shape for entry in name_table(model.config)}
    model.eval()
    structure, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((2, 97, 64, 4), jnp.float32)
    features, logits = jax.eval_shape(
        lambda state, x: (nnx.merge(structure, state).forward_features(x), nnx.merge(structure, state)(x)),
        state,
        images,
    )
    size = (7, 4) if name == "dpn_mini" else (4, 2)  # it has three stages
    assert features.shape == (2, *size, model.config.num_features)
    assert logits.shape == (2, 7)


def test_abstract_models_agree_with_real_ones() -> None:
    abstract, real = dpn_jax.DPN(TINY, rngs=None), dpn_jax.DPN(TINY, rngs=nnx.Rngs(0))
    described = [
        {path: (leaf.shape, leaf.dtype) for path, leaf in nnx.to_flat_state(nnx.state(model))}
        for model in (abstract, real)
    ]
    assert described[0] == described[1]


def test_seeds_decide_the_initial_values() -> None:
    first, same, other = (dpn_jax.create_model(TINY, rngs=nnx.Rngs(seed)) for seed in (0, 0, 1))
    kernel = first.stages[1][0].grouped.conv.kernel[...]
    np.testing.assert_array_equal(kernel, same.stages[1][0].grouped.conv.kernel[...])
    assert not np.array_equal(kernel, other.stages[1][0].grouped.conv.kernel[...])


forward = nnx.jit(lambda model, images: model(images))
features_of = nnx.jit(lambda model, images: model.forward_features(images))


def test_a_call_is_features_then_head(model: dpn_jax.DPN, images: jax.Array) -> None:
    np.testing.assert_array_equal(forward(model, images), model.forward_head(features_of(model, images)))


def test_jax_transformations(model: dpn_jax.DPN, images: jax.Array) -> None:
    expected = forward(model, images)
    structure, state = nnx.split(model)

    def apply(state: nnx.State, images: jax.Array) -> jax.Array:
        return nnx.merge(structure, state)(images)

    np.testing.assert_allclose(jax.jit(apply)(state, images), expected, rtol=1e-4, atol=1e-5)
    one_by_one = jax.jit(jax.vmap(lambda image: apply(state, image[None])[0]))(images)
    np.testing.assert_allclose(one_by_one, expected, rtol=1e-4, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda images: apply(state, images).sum()))(images)
    assert gradient.shape == images.shape and bool(jnp.abs(gradient).max() > 0)


@pytest.mark.slow
def test_remat_gives_the_same_outputs_gradients_and_statistics(images: jax.Array) -> None:
    plain, remat = (dpn_jax.create_model(TINY, remat=remat, rngs=nnx.Rngs(0)) for remat in (False, True))
    losses = [nnx.jit(nnx.value_and_grad(lambda m, x: jnp.square(m(x)).sum()))(m, images) for m in (plain, remat)]
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(losses[0][1]), jax.tree.leaves(losses[1][1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(plain.norm.var[...], remat.norm.var[...], rtol=1e-5)
    assert int(remat.stages[0][0].reduce.norm.steps[...]) == 1


def test_train_and_eval_switch_norms_and_dropout(images: jax.Array) -> None:
    model = dpn_jax.create_model(TINY, drop_rate=0.5, rngs=nnx.Rngs(0))
    assert not np.array_equal(forward(model, images), forward(model, images))
    assert int(model.norm.steps[...]) == 2
    model.eval()
    np.testing.assert_array_equal(forward(model, images), forward(model, images))
    assert int(model.norm.steps[...]) == 2


def test_bfloat16_computes_with_float32_parameters(images: jax.Array) -> None:
    model = dpn_jax.create_model(TINY, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert nnx.eval_shape(lambda m, x: m(x), model, images).dtype == jnp.bfloat16
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(nnx.state(model)))


def test_blocks_carry_two_tensors(model: dpn_jax.DPN) -> None:
    path = model.stages[0][0](jnp.zeros((1, 8, 8, 8)))
    assert isinstance(path, DualPath)
    assert (path.residual.shape[-1], path.dense.shape[-1]) == (64, 12)
    assert model.stages[0][1](path).dense.shape[-1] == 16


@pytest.mark.parametrize("pool", ["avg", "catavgmax", ""])
def test_reset_classifier(model: dpn_jax.DPN, images: jax.Array, pool: str) -> None:
    features = features_of(model, images)
    model.reset_classifier(3, pool, rngs=nnx.Rngs(1))
    assert model.config.num_classes == 3
    shape = (2, 4, 6, 3) if pool == "" else (2, 3)
    assert model.forward_head(features).shape == nnx.eval_shape(forward, model, images).shape == shape
    np.testing.assert_array_equal(features_of(model, images), features)
    model.reset_classifier(0)
    assert model.classifier is None
    assert nnx.eval_shape(forward, model, images).shape[-1] == model.config.head_features


def test_reset_classifier_needs_rngs(model: dpn_jax.DPN) -> None:
    with pytest.raises(ValueError, match="rngs"):
        model.reset_classifier(3)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "mean", rngs=nnx.Rngs(0))
    assert model.config.num_classes == 5


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((32, 32, 3), "float32", r"\[B, H, W, 3\], got \[32, 32, 3\]"),
        ((1, 3, 32, 32), "float32", r"got \[1, 3, 32, 32\]"),
        ((0, 32, 32, 3), "float32", r"got \[0, 32, 32, 3\]"),
        ((1, 32, 32, 3), "uint8", "normalized floats.*uint8"),
    ],
)
def test_wrong_images_are_refused(model: dpn_jax.DPN, shape: tuple[int, ...], dtype: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(jnp.zeros(shape, dtype))


def test_test_time_pool_needs_large_images() -> None:
    model = dpn_jax.create_model(TINY, test_time_pool=7, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="test_time_pool is 7 but the features are only 4x4"):
        forward(model, jnp.zeros((2, 32, 32, 3)))


def test_unknown_keywords_are_refused() -> None:
    with pytest.raises(TypeError, match="num_clases"):
        dpn_jax.create_model(TINY, num_clases=3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters(dtype: jax.typing.DTypeLike) -> None:
    model = dpn_jax.create_model(TINY, param_dtype=dtype)
    floats = [leaf for leaf in jax.tree.leaves(nnx.state(model)) if leaf.ndim]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(dtype)}
    exact = dpn_jax.create_model(TINY).stem.conv.kernel[...]
    np.testing.assert_allclose(model.stem.conv.kernel[...].astype("float32"), exact, rtol=1e-2)


@pytest.mark.parametrize("argument", ["dtype", "param_dtype"])
@pytest.mark.parametrize("dtype", [jnp.int32, "int8", bool, "floats", None, "complex64", 5])
def test_networks_compute_in_floats(argument: str, dtype: object, tiny_file: Path) -> None:
    for make in (dpn_jax.create_model, dpn_jax.from_pretrained):
        with pytest.raises(ValueError, match=rf"^{argument} must be a floating-point one, such as .*, got "):
            make(TINY if make is dpn_jax.create_model else tiny_file, **{argument: dtype})


@pytest.mark.parametrize("rngs", [0, jax.random.key(0), "params", {"params": 0}])
def test_rngs_are_flaxs(rngs: object, tiny_file: Path) -> None:
    for make in (dpn_jax.create_model, dpn_jax.from_pretrained):
        with pytest.raises(ValueError, match=r"^rngs must be nnx.Rngs, such as nnx.Rngs\(0\), got "):
            make(TINY if make is dpn_jax.create_model else tiny_file, rngs=rngs)
