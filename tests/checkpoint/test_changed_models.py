"""Changed models: saved by their paths, restored into an equal instance, and refused in every other way."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import dpn_jax
from dpn_jax import DPN, CheckpointError
from dpn_jax.checkpoint.save import convert
from dpn_jax.stock import changes
from tests.support.changed_models import Halved, changed_model
from tests.support.models import TINY, randomize, values

IMAGES = np.random.default_rng(0).standard_normal((2, 48, 48, 3), np.float32)
GATE = ("excite.bias", "excite.kernel", "squeeze.bias", "squeeze.kernel")


def stock(seed: int) -> DPN:
    """A small model whose norms, statistics and counters all differ, in eval mode."""
    model = dpn_jax.create_model(TINY.replace(drop_rate=0.1), rngs=nnx.Rngs(seed))
    return randomize(model, seed=seed)


CHANGED = {
    "squeeze-excite after expand": ("stages.0.0: a SqueezeExciteAfter", "a DualPathBlock"),
    "squeeze-excite between": ("stages.0.0: a SqueezeExciteBlock", "a DualPathBlock"),
    "linear head": ("classifier: a Linear", "a Conv"),
    "norm": ("stages.0.0.expand.norm: a Halved", "a NormAct"),
    "activation": ("stages.0.0.expand.norm: activation is 'silu'", "'relu'"),
    "head": ("the model: a OwnHead", "a DPN"),
}
changed = pytest.mark.parametrize(("name", "in_file", "in_model"), [(name, *said) for name, said in CHANGED.items()])


def outputs(model: DPN) -> np.ndarray:
    return np.asarray(nnx.jit(lambda model, x: model(x))(model, IMAGES))


def contents(model: DPN) -> dict[str, np.ndarray]:
    """Every value of a model, RNG state too."""
    state = nnx.to_flat_state(nnx.as_pure(nnx.state(model)))
    return {
        ".".join(map(str, path)): np.asarray(jax.random.key_data(value) if path[-1] == "key" else value)
        for path, value in state
    }


def assert_refused(path: Path, model: nnx.Module, *said: str) -> CheckpointError:
    """Restoring raises one `CheckpointError` whose first line says all of `said`, and leaves the model as it was."""
    before, provenance = contents(model), model.provenance
    with pytest.raises(CheckpointError) as caught:
        dpn_jax.load(path, into=model)
    line = str(caught.value).split("\n")[0]
    assert line.startswith(f"{path}: does not fit the model: ")
    assert all(part in line for part in said), line
    after = contents(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert model.provenance is provenance
    return caught.value


@changed
def test_a_changed_model_is_restored_into_an_equal_one(name: str, in_file: str, in_model: str, tmp_path: Path) -> None:
    model, other = changed_model(name, 0), changed_model(name, 1)
    model.provenance = model.provenance._replace(source="mine", class_names=tuple("abcde"))
    other.train()
    before = contents(other)
    dpn_jax.save(model, tmp_path / "a.safetensors")
    assert dpn_jax.load(tmp_path / "a.safetensors", into=other) is other
    assert other.provenance == model.provenance
    np.testing.assert_array_equal(outputs(other), outputs(model))
    after = contents(other)
    for path, value in contents(model).items():
        np.testing.assert_array_equal(after[path], before[path] if path.startswith("dropout.") else value)
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["changes"]) == changes(model)


@changed
def test_a_changed_model_does_not_go_into_a_stock_one(name: str, in_file: str, in_model: str, tmp_path: Path) -> None:
    dpn_jax.save(changed_model(name), tmp_path / "a.safetensors")
    error = assert_refused(tmp_path / "a.safetensors", stock(1), f"{in_file} in the file, {in_model} in the model")
    assert all(".gate." in name for name in error.unknown)


@changed
def test_a_stock_model_goes_into_a_changed_one_only_where_all_paths_fit(
    name: str, in_file: str, in_model: str, tmp_path: Path
) -> None:
    model, other = stock(0), changed_model(name, 1)
    dpn_jax.save(model, tmp_path / "a.safetensors")
    if values(model).keys() == values(other).keys() and "Linear" not in in_file:
        dpn_jax.load(tmp_path / "a.safetensors", into=other)
        for path, value in values(model).items():
            np.testing.assert_array_equal(values(other)[path], value)
    else:
        assert_refused(tmp_path / "a.safetensors", other)


@changed
def test_without_an_instance_one_line_says_what_to_do(name: str, in_file: str, in_model: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    dpn_jax.save(changed_model(name), path)
    for read, said in (
        (lambda: dpn_jax.load(path), ""),
        (lambda: dpn_jax.load(path, model=TINY), ""),
        (lambda: dpn_jax.from_pretrained(str(path)), ""),
        (lambda: convert(path, tmp_path / "b.safetensors"), "timm has no such layer"),
        (lambda: convert(path, tmp_path / "b.safetensors", to="flax"), ""),
    ):
        with pytest.raises(CheckpointError, match=r"load\(path, into=model\)") as caught:
            read()
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{path}: a changed model's file ({in_file.split(':')[0]} ")
        assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_all_differences_are_one_sorted_error(tmp_path: Path) -> None:
    model, other = changed_model("squeeze-excite after expand"), changed_model("linear head", 1)
    other.norm = Halved(TINY.num_features + 1, rngs=nnx.Rngs(0))
    dpn_jax.save(model, tmp_path / "a.safetensors")
    error = assert_refused(tmp_path / "a.safetensors", other, "12 unknown", "5 misshaped", "5 changed")
    assert error.missing == ()
    assert error.unknown == tuple(f"stages.{block}.gate.{name}" for block in ("0.0", "0.1", "1.0") for name in GATE)
    assert error.misshaped == (
        f"classifier.kernel: [1, 1, {TINY.num_features}, 5], expected [{TINY.num_features}, 5]",
        *(
            f"norm.{name}: [{TINY.num_features}], expected [{TINY.num_features + 1}]"
            for name in ("bias", "mean", "scale", "var")
        ),
    )
    assert str(error).endswith(
        "changed:\n"
        "  classifier: a Conv in the file, a Linear in the model\n"
        "  norm: a NormAct in the file, a Halved in the model\n"
        "  stages.0.0: a SqueezeExciteAfter in the file, a DualPathBlock in the model\n"
        "  stages.0.1: a SqueezeExciteAfter in the file, a DualPathBlock in the model\n"
        "  stages.1.0: a SqueezeExciteAfter in the file, a DualPathBlock in the model"
    )
    assert assert_refused(_saved(stock(0), tmp_path / "b.safetensors"), model).missing == error.unknown


def _saved(model: DPN, path: Path) -> Path:
    dpn_jax.save(model, path)
    return path


def test_two_models_that_were_changed_differently(tmp_path: Path) -> None:
    path = _saved(changed_model("activation"), tmp_path / "a.safetensors")
    assert_refused(
        path, changed_model("norm", 1), "expand.norm: activation is 'silu' in the file, a Halved in the model"
    )


def test_what_names_and_shapes_do_not_tell_is_compared(tmp_path: Path) -> None:
    path = _saved(randomize(dpn_jax.create_model(TINY.replace(outer_activation="silu"))), tmp_path / "a.safetensors")
    said = "config: outer_activation 'silu' in the file, 'relu' in the model"
    assert_refused(path, stock(0), said)
    assert_refused(
        _saved(stock(0), tmp_path / "b.safetensors"), dpn_jax.create_model(TINY, global_pool="max"), "config"
    )


def test_a_class_of_its_own(tmp_path: Path) -> None:
    class MyDPN(DPN):
        def forward_head(self, features: jax.Array, *, pre_logits: bool = False) -> jax.Array:
            return super().forward_head(2 * features, pre_logits=pre_logits)

    model, other = (MyDPN(TINY, rngs=nnx.Rngs(seed)) for seed in range(2))
    model.eval()
    path = _saved(model, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(outputs(dpn_jax.load(path, into=other)), outputs(model))
    assert_refused(path, stock(0), "the model: a MyDPN in the file, a DPN in the model")


def test_timms_weights_go_into_a_model_with_another_activation(tiny_timm_file: Path) -> None:
    model = dpn_jax.load(tiny_timm_file, into=changed_model("activation"))
    assert model.stages[0][0].expand.norm.activation == "silu"
    assert model.provenance.source == "tiny.safetensors"
    expected = dpn_jax.load(tiny_timm_file)
    for name, value in values(expected).items():
        np.testing.assert_array_equal(values(model)[name], value)
    np.testing.assert_array_equal(outputs(dpn_jax.load(tiny_timm_file, into=stock(0))), outputs(expected))


def test_timms_weights_are_named_as_in_their_file(tiny_timm_file: Path) -> None:
    model = dpn_jax.create_model(TINY.replace(num_classes=7, depths=(1, 1), dense_increments=(4, 4)), rngs=nnx.Rngs(0))
    error = assert_refused(tiny_timm_file, model, "unknown (first: features.conv2_2.")
    assert (
        f"classifier.weight: [1, 1, {TINY.num_features}, 5], expected [1, 1, {model.config.num_features}, 7]"
        in error.misshaped
    )


def test_counters_that_old_files_lack_are_zero(tmp_path: Path) -> None:
    path = _saved(stock(0), tmp_path / "a.safetensors")
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = {name: array for name, array in safetensors.numpy.load_file(path).items() if array.ndim}
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    assert dpn_jax.load(path, into=stock(1)).norm.steps.get_value() == 0


def test_parameters_keep_the_dtype_of_the_instance(tmp_path: Path) -> None:
    model = stock(0)
    path = _saved(model, tmp_path / "a.safetensors")
    other = dpn_jax.load(_saved(stock(1), tmp_path / "b.safetensors"), param_dtype=jnp.bfloat16)
    dpn_jax.load(path, into=other)
    for name, value in values(model).items():
        restored = values(other)[name]
        assert restored.dtype == (jnp.bfloat16 if value.ndim else jnp.int32)
        np.testing.assert_array_equal(restored, value.astype(restored.dtype))


def test_values_are_checked_before_any_is_restored(tmp_path: Path) -> None:
    model, other = (changed_model("squeeze-excite after expand", seed) for seed in range(2))
    model.stages[0][0].gate.excite.bias[...] = jnp.nan
    path = _saved(model, tmp_path / "a.safetensors")
    before = values(other)
    with pytest.raises(CheckpointError, match=r"stages\.0\.0\.gate\.excite\.bias: NaN or infinity; --allow-nonfinite"):
        dpn_jax.load(path, into=other)
    for name, value in before.items():
        np.testing.assert_array_equal(values(other)[name], value)
    dpn_jax.load(path, into=other, allow_nonfinite=True)
    assert np.isnan(values(other)["stages.0.0.gate.excite.bias"]).all()


@pytest.mark.parametrize("options", [{"num_classes": 5}, {"model": TINY}, {"dtype": jnp.float32, "rngs": nnx.Rngs(0)}])
def test_an_instance_takes_no_options_that_build_one(options: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"into= .*; {'=, '.join(options)}= cannot be given"):
        dpn_jax.load(tmp_path / "a.safetensors", into=stock(0), **options)
    with pytest.raises(ValueError, match="into= must be a model, got <class"):
        dpn_jax.load(tmp_path / "a.safetensors", into=DPN)


def test_an_abstract_instance_is_filled(tmp_path: Path) -> None:
    model = stock(0)
    path = _saved(model, tmp_path / "a.safetensors")
    abstract = DPN(TINY, rngs=None)
    np.testing.assert_array_equal(outputs(dpn_jax.load(path, into=abstract)), outputs(model))


def test_other_variables_and_dtypes_are_carried(tmp_path: Path) -> None:
    def build(fill: int) -> DPN:
        model = stock(fill)
        for dtype in ("bool", "int8", "uint8", "int16", "uint16", "uint32", "float16", "bfloat16", "complex64"):
            setattr(model.stem, dtype, nnx.Variable(jnp.full((2, 3), fill, dtype)))
        model.stem.array = jnp.full(3, fill)
        return model

    model, other = build(1), build(0)
    dpn_jax.load(_saved(model, tmp_path / "a.safetensors"), into=other)
    after = contents(other)
    for name, value in contents(model).items():
        if not name.startswith("dropout."):
            assert after[name].dtype == value.dtype
            np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda: jnp.zeros(3, "int4"), "stem.extra is int4, which a file cannot hold"),
        (lambda: jnp.zeros(3, "float8_e4m3fn"), "stem.extra is float8_e4m3fn, which a file cannot hold"),
        (lambda: jax.random.key(0), r"stem.extra is key<\w+>, which a file cannot hold"),
        (lambda: {"x": jnp.zeros(3)}, "stem.extra is a dict, which a file cannot hold"),
        (lambda: 0.5, "stem.extra is a float, which a file cannot hold"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(value: Callable[[], object], said: str, tmp_path: Path) -> None:
    model = stock(0)
    model.stem.extra = nnx.Variable(value())
    with pytest.raises(ValueError, match=said) as caught:
        dpn_jax.save(model, tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_only_a_dpn_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only a DPN can be saved, got a Linear"):
        dpn_jax.save(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["", "[]", "5", "null", '{"norm": 5}', '{"norm": ["a"]}', "[" * 100_000])
def test_damaged_changes(text: str, tmp_path: Path) -> None:
    path = _saved(stock(0), tmp_path / "a.safetensors")
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata() | {"changes": text}
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, metadata=metadata)
    for options in ({}, {"into": stock(1)}):
        with pytest.raises(CheckpointError, match="damaged metadata"):
            dpn_jax.load(path, **options)


def test_a_stock_models_file_says_nothing_of_changes(tmp_path: Path) -> None:
    with safetensors.safe_open(_saved(stock(0), tmp_path / "a.safetensors"), framework="numpy") as file:
        assert file.metadata().keys() == {"format", "config", "provenance", "versions"}
        assert set(file.keys()) == set(values(stock(0)))
