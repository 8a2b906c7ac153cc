"""Files there and back: every layout, dtype and wrapper, adaptation as timm does it, what a saved model remembers."""

import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

pytest.importorskip("tests.support.timm_models")
import safetensors.torch
import torch

import dpn_jax
from convert.timm_import import create_timm_model
from dpn_jax import CheckpointError, DPNConfig
from dpn_jax.checkpoint.load import adapt_input_channels
from dpn_jax.checkpoint.names import infer_config, name_table
from dpn_jax.checkpoint.open import open_checkpoint
from dpn_jax.checkpoint.save import convert
from dpn_jax.config import VARIANTS
from dpn_jax.pretrained import get_config
from tests.support.models import TINY, values
from tests.support.timm_models import (
    assert_logits,
    assert_weights,
    flax_name,
    images,
    save_timm,
    timm_dpn,
    to_flax,
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata()


# The table


@pytest.mark.parametrize("variant", VARIANTS)
def test_table_is_timms_state_dict(variant: str) -> None:
    with torch.device("meta"):
        model = create_timm_model(get_config(variant))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    entries = name_table(get_config(variant))
    assert [(entry.timm, entry.timm_shape) for entry in entries] == list(theirs.items())
    assert [entry.flax for entry in entries] == [flax_name(name, len(shape)) for name, shape in theirs.items()]
    assert [entry.is_parameter for entry in entries] == [name in dict(model.named_parameters()) for name in theirs]


# timm -> Flax -> timm


@pytest.mark.parametrize("split", [False, True])
def test_a_loaded_model_is_timms(timm: ModuleType, split: bool, tmp_path: Path) -> None:
    reference = timm_dpn(timm, split=split)
    model = dpn_jax.load(save_timm(reference, tmp_path / "a.safetensors"))
    assert model.config == TINY.replace(split_expand=split)
    assert_weights(model, reference.state_dict())
    assert_logits(model, reference)


@pytest.mark.parametrize("counters", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_gives_the_same_bytes(
    dtype: str, counters: bool, tiny_timm: torch.nn.Module, tmp_path: Path, timm: ModuleType
) -> None:
    state = {
        name: tensor.to(DTYPES[dtype]) if tensor.ndim else tensor
        for name, tensor in tiny_timm.state_dict().items()
        if tensor.ndim or counters
    }
    source, flax, back = (tmp_path / f"{name}.safetensors" for name in ("source", "flax", "back"))
    safetensors.torch.save_file(state, source, metadata={"format": "pt"})
    convert(source, flax)
    convert(flax, back)
    assert back.read_bytes() == source.read_bytes()

    written = safetensors.torch.load_file(flax)
    assert {name: value.dtype for name, value in written.items() if value.ndim} == {
        flax_name(name, value.ndim): value.dtype for name, value in state.items() if value.ndim
    }
    missing, unexpected = timm_dpn(timm, seed=1).load_state_dict(safetensors.torch.load_file(back), strict=counters)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)


def test_round_trip_from_a_saved_model(tiny_timm: torch.nn.Module, tiny_timm_file: Path, tmp_path: Path) -> None:
    dpn_jax.save(dpn_jax.load(tiny_timm_file), tmp_path / "flax.safetensors")
    convert(tmp_path / "flax.safetensors", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == tiny_timm_file.read_bytes()


def test_a_converted_file_is_a_saved_one(tiny_timm_file: Path, tmp_path: Path) -> None:
    convert(tiny_timm_file, tmp_path / "converted.safetensors")
    dpn_jax.save(dpn_jax.load(tiny_timm_file), tmp_path / "saved.safetensors")
    converted, saved = (metadata(tmp_path / f"{name}.safetensors") for name in ("converted", "saved"))
    assert converted == saved
    assert_weights(dpn_jax.load(tmp_path / "converted.safetensors"), safetensors.torch.load_file(tiny_timm_file))


def test_dtype_is_cast_and_counters_are_not(tiny_timm: torch.nn.Module, tiny_timm_file: Path, tmp_path: Path) -> None:
    convert(tiny_timm_file, tmp_path / "half.safetensors", to="timm", dtype=jnp.bfloat16)
    written = safetensors.torch.load_file(tmp_path / "half.safetensors")
    for name, tensor in tiny_timm.state_dict().items():
        assert torch.equal(written[name], tensor.bfloat16() if tensor.ndim else tensor)


def test_layout_to_write(tiny_timm_file: Path, tmp_path: Path) -> None:
    convert(tiny_timm_file, tmp_path / "a.safetensors", to="flax")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="flax")
    convert(tiny_timm_file, tmp_path / "c.safetensors", to="timm")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "c.safetensors").read_bytes() == tiny_timm_file.read_bytes()


def test_conversion_returns_what_it_read(tiny_timm_file: Path, tmp_path: Path) -> None:
    checkpoint = convert(tiny_timm_file, tmp_path / "a.safetensors")
    assert checkpoint.is_timm
    assert checkpoint.config == TINY
    assert not convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors").is_timm


@pytest.mark.parametrize("dtype", [np.int32, jnp.uint8])
def test_only_floats_can_be_cast_to(dtype: type, tiny_timm_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be"):
        convert(tiny_timm_file, tmp_path / "a.safetensors", dtype=dtype)


@pytest.mark.parametrize("padding", range(8))
def test_tensors_need_not_be_aligned(padding: int, tiny_timm: torch.nn.Module, tmp_path: Path) -> None:
    path = save_timm(tiny_timm, tmp_path / "a.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" " * padding
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert_weights(dpn_jax.load(path), tiny_timm.state_dict())


@pytest.mark.parametrize("start", [b"\x80", b"\x80\x02", b"\x80\x04", b"PK"])
def test_a_header_length_that_looks_like_a_pickle(start: bytes, tiny_timm: torch.nn.Module, tmp_path: Path) -> None:
    path = save_timm(tiny_timm, tmp_path / "a.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    wanted = next(n for n in range(length, length + 70_000) if n.to_bytes(8, "little").startswith(start))
    header = content[8 : 8 + length].ljust(wanted)
    path.write_bytes(wanted.to_bytes(8, "little") + header + content[8 + length :])
    assert_weights(dpn_jax.load(path), tiny_timm.state_dict())


def test_no_classifier_at_all_gives_a_model_without_one(
    timm: ModuleType, tiny_timm: torch.nn.Module, tmp_path: Path
) -> None:
    headless = timm_dpn(timm, num_classes=0)
    headless.load_state_dict(tiny_timm.state_dict(), strict=False)
    model = dpn_jax.load(save_timm(headless, tmp_path / "a.safetensors"))
    assert model.config == TINY.replace(num_classes=0)
    assert model.classifier is None
    assert_weights(model, headless.state_dict())
    assert dpn_jax.load(tmp_path / "a.safetensors", num_classes=3).classifier.kernel.shape == (1, 1, 152, 3)


# Adaptation


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 7])
def test_input_channels_as_timm_adapts_them(
    channels: int, timm: ModuleType, tiny_timm: torch.nn.Module, tiny_timm_file: Path
) -> None:
    model = dpn_jax.load(tiny_timm_file, in_channels=channels)
    state = dict(tiny_timm.state_dict())
    stem = state["features.conv1_1.conv.weight"]
    reference = timm_dpn(timm, in_chans=channels)
    reference.load_state_dict(state | {"features.conv1_1.conv.weight": timm.models.adapt_input_conv(channels, stem)})
    ours, theirs = values(model), to_flax(reference.state_dict())
    np.testing.assert_allclose(ours.pop("stem.conv.kernel"), theirs.pop("stem.conv.kernel"), rtol=1e-6, atol=1e-7)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    assert model.config.in_channels == channels


def test_adapted_to_gray_the_photos_are_prepared_gray() -> None:
    classifier = dpn_jax.Classifier.from_pretrained("dpn_tiny.digits", in_channels=1)
    digits = sorted((Path(__file__).parents[2] / "samples" / "digits").glob("*.png"))
    right = [best.label == path.stem for (best,), path in zip(classifier(digits, top_k=1), digits, strict=True)]
    assert sum(right) >= 8  # of ten: the sum of the kernels is not the same function
    assert classifier.transform(digits[0]).shape == (32, 32, 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("channels", [1, 4])
def test_input_channels_keep_the_dtype(dtype: str, channels: int, timm: ModuleType) -> None:
    kernel = torch.randn(8, 3, 3, 3, generator=torch.manual_seed(0)).to(DTYPES[dtype])
    array = kernel.double().numpy().astype(jnp.dtype(dtype))
    ours = adapt_input_channels(array.transpose(2, 3, 1, 0), channels).transpose(3, 2, 0, 1)
    assert ours.dtype == array.dtype
    theirs = timm.models.adapt_input_conv(channels, kernel).double().numpy()  # in float32, always
    atol = 1e-6 if dtype == "float64" else 0
    np.testing.assert_allclose(ours.astype(np.float64), theirs, rtol=1e-6, atol=atol)


def test_adapted_from_gray_weights_is_refused(timm: ModuleType, tmp_path: Path) -> None:
    path = save_timm(timm_dpn(timm, in_chans=1), tmp_path / "a.safetensors")
    assert dpn_jax.load(path).config.in_channels == 1
    with pytest.raises(ValueError, match="in_channels=3 can be adapted from 3 channels, but the weights read 1"):
        dpn_jax.load(path, in_channels=3)


def test_another_number_of_classes_starts_a_new_classifier(tiny_timm: torch.nn.Module, tiny_timm_file: Path) -> None:
    model = dpn_jax.load(tiny_timm_file, num_classes=9, rngs=nnx.Rngs(3))
    ours = values(model)
    assert ours["classifier.kernel"].shape == (1, 1, 152, 9)
    for name, value in to_flax(tiny_timm.state_dict()).items():
        if not name.startswith("classifier"):
            np.testing.assert_array_equal(ours[name], value)
    again = values(dpn_jax.load(tiny_timm_file, num_classes=9, rngs=nnx.Rngs(3)))
    np.testing.assert_array_equal(again["classifier.kernel"], ours["classifier.kernel"])
    assert (values(dpn_jax.load(tiny_timm_file, num_classes=9))["classifier.kernel"] != ours["classifier.kernel"]).any()


def test_the_same_number_of_classes_keeps_it(tiny_timm: torch.nn.Module, tiny_timm_file: Path) -> None:
    assert_weights(dpn_jax.load(tiny_timm_file, num_classes=5), tiny_timm.state_dict())
    assert dpn_jax.load(tiny_timm_file, num_classes=0).classifier is None


@pytest.mark.parametrize("pool", ["max", "avgmax", "catavgmax"])
def test_pool(pool: str, timm: ModuleType, tiny_timm_file: Path, tmp_path: Path) -> None:
    reference = timm_dpn(timm, global_pool=pool)
    if pool == "catavgmax":  # the classifier's width tells this one
        model = dpn_jax.load(save_timm(reference, tmp_path / "a.safetensors"))
        with pytest.raises(ValueError, match="global_pool='catavgmax' gives the classifier 304 features"):
            dpn_jax.load(tiny_timm_file, global_pool=pool)
        assert dpn_jax.load(tiny_timm_file, global_pool=pool, num_classes=5).classifier.kernel.shape == (1, 1, 304, 5)
    else:
        model = dpn_jax.load(tiny_timm_file, global_pool=pool)
    assert model.config.global_pool == pool
    assert_weights(model, reference.state_dict())


def test_arrives_in_eval_mode_with_the_options_asked_for(tiny_timm_file: Path) -> None:
    model = dpn_jax.load(tiny_timm_file, drop_rate=0.5, test_time_pool=2, dtype=jnp.bfloat16, param_dtype=jnp.float16)
    assert model.dropout.deterministic
    assert model.stem.norm.use_running_average
    assert (model.dropout.rate, model.config.drop_rate, model.config.test_time_pool) == (0.5, 0.5, 2)
    assert (model.dtype, model.param_dtype) == (jnp.bfloat16, jnp.float16)
    assert {value.dtype for value in values(model).values() if value.ndim} == {np.dtype(np.float16)}
    model.train()
    assert not model.dropout.deterministic


@pytest.mark.parametrize("layout", ["timm", "flax", "pth"])
def test_the_model_does_not_follow_later_changes_of_the_file(layout: str, timm: ModuleType, tmp_path: Path) -> None:
    # every tensor at a multiple of 64 bytes: JAX uses what is aligned like that where it lies, mapped file or not
    reference = timm_dpn(timm, k_r=16, inc_sec=(16, 16), num_init_features=16, num_classes=16)
    state = {name: tensor for name, tensor in reference.state_dict().items() if tensor.ndim}
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(state, path)
    if layout == "flax":
        convert(path, path := tmp_path / "b.safetensors")
    if layout == "pth":
        torch.save(state, path := tmp_path / "a.pth")
        start = 1024
    else:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        start = -(-(8 + length) // 64) * 64
        header = content[8 : 8 + length].ljust(start - 8)
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    model = dpn_jax.load(path)
    before = {name: value.copy() for name, value in values(model).items()}
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * (path.stat().st_size - start))
    for name, value in values(model).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_a_config_says_what_the_tensors_do_not(tiny_timm: torch.nn.Module, tiny_timm_file: Path) -> None:
    config = TINY.replace(outer_activation="silu", num_classes=77)  # how many classes there are is for the file to say
    model = dpn_jax.load(tiny_timm_file, model=config)
    assert model.config == config.replace(num_classes=5)
    assert_weights(model, tiny_timm.state_dict())


# What a saved model remembers


@pytest.mark.parametrize("config", [TINY, TINY.replace(outer_activation="silu", global_pool="max", drop_rate=0.25)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_save_and_load(config: DPNConfig, dtype: type, tiny_timm_file: Path, tmp_path: Path) -> None:
    model = dpn_jax.load(tiny_timm_file, model=config, param_dtype=dtype)
    dpn_jax.save(model, tmp_path / "a.safetensors")
    loaded = dpn_jax.load(tmp_path / "a.safetensors", param_dtype=dtype)
    assert loaded.config == config
    ours, theirs = values(loaded), values(model)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        np.testing.assert_array_equal(ours[name], value)
    header = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert {str(value.dtype) for value in header.values() if value.ndim} == {jnp.dtype(dtype).name}


def test_dpn48b_keeps_its_activation(timm: ModuleType, tmp_path: Path) -> None:
    model = nnx.eval_shape(lambda: dpn_jax.create_model("dpn48b"))
    assert model.config.outer_activation == "silu"
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in timm.create_model("dpn48b").state_dict().items()}
    assert infer_config(shapes).outer_activation == "silu"


def test_provenance_is_kept(tiny_timm_file: Path, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "model.safetensors").write_bytes(tiny_timm_file.read_bytes())
    described = {"input_size": [3, 64, 64], "mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bilinear"}
    labels = {"label_names": list("abcde")}
    (tmp_path / "repo" / "config.json").write_text(json.dumps({"pretrained_cfg": described} | labels))
    first = dpn_jax.from_pretrained(tmp_path / "repo")
    dpn_jax.save(first, tmp_path / "first.safetensors")
    dpn_jax.save(dpn_jax.load(tmp_path / "first.safetensors"), tmp_path / "second.safetensors")
    provenance = dpn_jax.load(tmp_path / "second.safetensors").provenance
    assert provenance.source == "repo"
    assert provenance.sha256 is None  # nothing was promised for a local file
    assert provenance.preprocessing == first.provenance.preprocessing
    assert provenance.preprocessing.image_size == 64
    assert provenance.class_names == tuple("abcde")
    assert dpn_jax.load(tmp_path / "second.safetensors", num_classes=2).provenance.class_names is None


def test_files_that_were_saved_with_a_hash_keep_it(tiny_timm_file: Path, tmp_path: Path) -> None:
    model = dpn_jax.load(tiny_timm_file)
    model.provenance = model.provenance._replace(sha256="ab" * 32)
    dpn_jax.save(model, tmp_path / "a.safetensors")
    dpn_jax.save(dpn_jax.load(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert dpn_jax.load(tmp_path / "b.safetensors").provenance == model.provenance


def test_metadata(tiny_timm_file: Path, tmp_path: Path) -> None:
    dpn_jax.save(dpn_jax.load(tiny_timm_file), tmp_path / "a.safetensors")
    written = metadata(tmp_path / "a.safetensors")
    assert written.keys() == {"format", "config", "provenance", "versions"}
    assert written["format"] == "dpn_jax"
    assert DPNConfig(**json.loads(written["config"])) == TINY
    assert json.loads(written["provenance"])["source"] == "tiny.safetensors"
    assert json.loads(written["versions"]).keys() == {"jax", "flax", "numpy", "safetensors"}
    assert json.loads(written["versions"])["jax"] == jax.__version__
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert metadata(tmp_path / "b.safetensors") == {"format": "pt"}


def test_a_trained_model_is_saved_as_it_is(tiny_timm_file: Path, tmp_path: Path) -> None:
    model = dpn_jax.load(tiny_timm_file)
    before = values(model)
    model.train()
    nnx.jit(lambda model, x: model(x).sum())(model, images())
    assert (values(model)["norm.mean"] != before["norm.mean"]).all()
    dpn_jax.save(model, tmp_path / "a.safetensors")
    loaded = values(dpn_jax.load(tmp_path / "a.safetensors"))
    assert loaded["norm.steps"] == before["norm.steps"] + 1
    for name, value in values(model).items():
        np.testing.assert_array_equal(loaded[name], value)


def test_an_abstract_model_has_nothing_to_save(tmp_path: Path) -> None:
    model = nnx.eval_shape(lambda: dpn_jax.create_model(TINY))
    with pytest.raises(ValueError, match="the model is abstract"):
        dpn_jax.save(model, tmp_path / "a.safetensors")
    assert not any(tmp_path.iterdir())


def test_open_checkpoint_reads_no_values(tiny_timm_file: Path) -> None:
    checkpoint = open_checkpoint(tiny_timm_file)
    assert checkpoint.config == TINY
    assert checkpoint.provenance.source == "tiny.safetensors"
    entry = name_table(TINY)[0]
    tensor = checkpoint.tensors[entry.flax]
    assert tensor.shape == entry.flax_shape == (3, 3, 3, 8)
    assert tensor.file_name == entry.timm


# Size and speed


# getrusage's ru_maxrss will not do: a child starts with its parent's
MEMORY_CHILD = """
import sys
from pathlib import Path
from dpn_jax.checkpoint.save import convert
def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
convert(sys.argv[3], sys.argv[4])  # a small one first: what the imports and the libraries take
before = memory("VmRSS:")
convert(sys.argv[1], sys.argv[2])
print(memory("VmHWM:") - before)
"""


@pytest.mark.slow
def test_conversion_needs_little_more_memory_than_the_file_has(
    dpn92_file: Path, tiny_timm_file: Path, tmp_path: Path
) -> None:
    flax, back, small, smaller = (tmp_path / f"{name}.safetensors" for name in ("flax", "back", "small", "smaller"))
    for arguments in ((dpn92_file, flax, tiny_timm_file, small), (flax, back, small, smaller)):
        command = [sys.executable, "-c", MEMORY_CHILD, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        assert int(result.stdout) <= 1.5 * dpn92_file.stat().st_size
    assert back.read_bytes() == dpn92_file.read_bytes()


@pytest.mark.slow
def test_loading_is_as_fast_as_timms(timm: ModuleType, dpn92_file: Path) -> None:
    loaders = {
        "ours": functools.partial(dpn_jax.load, dpn92_file),  # returns when every array is there
        "timm": functools.partial(timm.create_model, "dpn92", checkpoint_path=str(dpn92_file)),
    }
    ratios = []
    for _ in range(13):  # in turn: whatever else the machine does slows both
        seconds = {}
        for name, load in loaders.items():
            start = time.perf_counter()
            load()
            seconds[name] = time.perf_counter() - start
        ratios.append(seconds["ours"] / seconds["timm"])
    assert statistics.median(ratios[2:]) <= 1, ratios


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dpn68b", "dpn107"])
def test_a_variant_there_and_back(variant: str, timm: ModuleType, tmp_path: Path) -> None:
    source = save_timm(timm.create_model(variant), tmp_path / "source.safetensors")
    model = dpn_jax.load(source)
    assert model.config == get_config(variant)
    assert_weights(model, safetensors.torch.load_file(source))
    convert(source, tmp_path / "flax.safetensors")
    convert(tmp_path / "flax.safetensors", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


def test_unknown_models_are_value_errors(tiny_timm_file: Path) -> None:
    with pytest.raises(ValueError, match="unknown model 'dpn9'"):
        dpn_jax.load(tiny_timm_file, model="dpn9")
    with pytest.raises(CheckpointError, match="do not fit the architecture"):
        dpn_jax.load(tiny_timm_file, model="dpn92")
