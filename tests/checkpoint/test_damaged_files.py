"""Files that are damaged, hostile or somebody else's, and failures to write: one `CheckpointError`, nothing lost."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("tests.support.timm_models")
import safetensors.torch
import torch

import dpn_jax
from dpn_jax import CheckpointError
from dpn_jax.checkpoint.files import LazyTensor, write_tensors
from dpn_jax.checkpoint.names import check, infer_config, name_table
from dpn_jax.checkpoint.save import convert
from dpn_jax.config import VARIANTS
from dpn_jax.pretrained import get_config
from tests.support.models import TINY, values
from tests.support.timm_models import assert_weights

ROOT = Path(__file__).parents[2]
State = dict[str, torch.Tensor]


@pytest.fixture
def state(tiny_timm: torch.nn.Module) -> State:
    """timm's tensors, to be changed."""
    return {name: tensor.clone() for name, tensor in tiny_timm.state_dict().items()}


def forge(header: bytes | dict[str, object], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def refused(path: Path, **options: object) -> str:
    """The message's first line, the same from `load` and `convert`, which leaves nothing behind."""
    with pytest.raises(CheckpointError) as loading:
        dpn_jax.load(path, **options)
    before = set(path.parent.iterdir())
    with pytest.raises(CheckpointError) as converting:
        convert(path, path.with_name("converted.safetensors"), **options)
    assert set(path.parent.iterdir()) == before
    assert str(loading.value) == str(converting.value)
    line = str(loading.value).split("\n")[0]
    assert len(line) < 500
    assert str(path.parent) in line
    return line


# Damaged and hostile safetensors


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FORGED = {
    "empty file": b"",
    "text": b"dear reader, this is no checkpoint\n",
    "html": b"<!DOCTYPE html><html><title>Sign in</title></html>",
    "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "header of 2^63 bytes": forge(b"{}", length=2**63),
    "header of 2^64 - 1 bytes": forge(b"{}", length=2**64 - 1),
    "header longer than the file": forge(b"{}", length=100),
    "empty header": forge(b"{}"),
    "header is a list": forge(b"[]"),
    "header is not JSON": forge(b"{'a': 1}"),
    "header is not UTF-8": forge(b'{"\xff": 1}'),
    "deep header": forge(b'{"a":' * 100_000),
    "no data": forge({"a": TENSOR}),
    "data left over": forge({"a": TENSOR}, bytes(9)),
    "overlapping": forge({"a": TENSOR, "b": {**TENSOR, "data_offsets": [4, 12]}}, bytes(12)),
    "a hole": forge({"a": TENSOR, "b": {**TENSOR, "data_offsets": [12, 20]}}, bytes(20)),
    "backwards": forge({"a": {**TENSOR, "data_offsets": [8, 0]}}, bytes(8)),
    "negative offset": forge({"a": {**TENSOR, "data_offsets": [-8, 0]}}, bytes(8)),
    "wrong size": forge({"a": {**TENSOR, "shape": [3]}}, bytes(8)),
    "size overflows": forge({"a": {**TENSOR, "shape": [2**62, 2**62]}}, bytes(8)),
    "negative shape": forge({"a": {**TENSOR, "shape": [-1, -2]}}, bytes(8)),
    "fractional shape": forge({"a": {**TENSOR, "shape": [2.0]}}, bytes(8)),
    "unknown dtype": forge({"a": {**TENSOR, "dtype": "F33"}}, bytes(8)),
    "float8": forge({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)),
    "bool": forge({"a": {"dtype": "BOOL", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)),
    "duplicate names": forge(b'{"a":%b,"a":%b}' % ((json.dumps(TENSOR).encode(),) * 2), bytes(8)),
    "duplicate fields": forge(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "strange field": forge({"a": {**TENSOR, "stride": [1]}}, bytes(8)),
    "missing field": forge({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "metadata is a number": forge({"__metadata__": 3, "a": TENSOR}, bytes(8)),
    "no DPN": forge({"conv.weight": TENSOR}, bytes(8)),
    "zero-dimensional": forge(
        {"features.conv1_1.conv.weight": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "zero-sized": forge(
        {"features.conv1_1.conv.weight": {"dtype": "F32", "shape": [0, 3, 3, 3], "data_offsets": [0, 0]}}
    ),
}


@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED)
def test_forged_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    refused(tmp_path / "a.safetensors")


def test_duplicate_of_a_whole_file(tiny_timm_file: Path, tmp_path: Path) -> None:
    content = tiny_timm_file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    name = b"features.conv1_1.bn.running_mean"
    entry = json.dumps(json.loads(header)[name.decode()]).encode()
    (tmp_path / "a.safetensors").write_bytes(forge(header[:-1] + b',"%b":%b}' % (name, entry), content[8 + length :]))
    assert f"{name.decode()!r} twice" in refused(tmp_path / "a.safetensors")


def test_truncated_anywhere(tiny_timm_file: Path, tmp_path: Path) -> None:
    content = tiny_timm_file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for end in (0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(content) // 2, len(content) - 1):
        (tmp_path / "a.safetensors").write_bytes(content[:end])
        refused(tmp_path / "a.safetensors")


def test_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert refused(tmp_path / "pipe.safetensors").endswith("is not a file")
    assert refused(tmp_path / "absent.safetensors").endswith("no such file")
    assert refused(tmp_path / "absent.index.json").endswith("no such file")
    (tmp_path / "folder").mkdir()
    assert "no model.safetensors" in refused(tmp_path / "folder")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "link.safetensors")
    refused(tmp_path / "link.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_an_index_of_shards_says_what_to_pass_instead(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"weight_map": {"norm.scale": "model-00001-of-00002.safetensors"}}')
    assert refused(tmp_path / name).endswith("pass all weights as one .safetensors or .pth file")


@pytest.mark.parametrize("in_channels", [0, 2])
@pytest.mark.parametrize("model", [None, TINY])
def test_zero_channels(in_channels: int, model: dpn_jax.DPNConfig | None, state: State, tmp_path: Path) -> None:
    state["features.conv1_1.conv.weight"] = torch.zeros(8, in_channels, 3, 3)
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    if in_channels:
        assert dpn_jax.load(tmp_path / "a.safetensors", model=model).config.in_channels == in_channels
    else:
        refused(tmp_path / "a.safetensors", model=model)


# Hostile and unusable PyTorch files


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def contain(payload: Payload, where: str, state: State) -> object:
    return {"alone": payload, "beside": {"state_dict": state, "args": payload}, "within": state | {"x": payload}}[where]


@pytest.mark.parametrize("suffix", ["pth", "bin", "safetensors"])
@pytest.mark.parametrize("where", ["alone", "beside", "within"])
@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_does_not_run(writer: str, where: str, suffix: str, state: State, tmp_path: Path) -> None:
    content = contain(Payload(tmp_path / "written"), where, state)
    path = tmp_path / f"a.{suffix}"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    assert "refused" in refused(path)
    assert not (tmp_path / "written").exists()


def own_container() -> dict[str, object]:
    content: dict[str, object] = {}
    content["state_dict"] = content
    return content


NOT_TENSORS = {
    "list": [torch.zeros(3)],
    "none": None,
    "tensor": torch.zeros(3),
    "number among them": {"a": torch.zeros(3), "b": 3},
    "nameless number": {"": 3},
    "wrapped list": {"state_dict": [torch.zeros(3)]},
    "container of itself": own_container(),
    "nothing": {},
    "integer names": {0: torch.zeros(3)},
    "no DPN": {"fc.weight": torch.zeros(3, 3)},
}
STRANGE_TENSORS = {
    "sparse": lambda: torch.eye(8).to_sparse(),
    "complex": lambda: torch.zeros(8, dtype=torch.complex64),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(8), 1.0, 0, torch.qint8),
    "float8": lambda: torch.zeros(8).to(torch.float8_e4m3fn),
    "bool": lambda: torch.zeros(8, dtype=torch.bool),
    "meta": lambda: torch.zeros(8, device="meta"),
    "without dimensions": lambda: torch.tensor(1.0),
}


@pytest.mark.parametrize("content", NOT_TENSORS.values(), ids=NOT_TENSORS)
def test_pth_without_tensors_by_name(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    refused(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("make", STRANGE_TENSORS.values(), ids=STRANGE_TENSORS)
def test_pth_with_strange_tensors(make: Callable[[], torch.Tensor], state: State, tmp_path: Path) -> None:
    torch.save(state | {"features.conv1_1.bn.weight": make()}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth")


def test_views_of_larger_storages_are_read(tiny_timm: torch.nn.Module, state: State, tmp_path: Path) -> None:
    name = "features.conv1_1.bn.bias"
    state[name] = torch.stack([state[name]] * 2, 1)[:, 1]  # every other element of its storage
    torch.save(state, tmp_path / "a.pth")
    assert_weights(dpn_jax.load(tmp_path / "a.pth"), tiny_timm.state_dict())


@pytest.mark.parametrize("legacy", [False, True])
def test_pth_under_another_name(legacy: bool, tiny_timm: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(tiny_timm.state_dict(), tmp_path / "a.safetensors", _use_new_zipfile_serialization=not legacy)
    assert_weights(dpn_jax.load(tmp_path / "a.safetensors"), tiny_timm.state_dict())


def test_without_torch_the_message_says_what_to_install(
    tiny_timm: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(tiny_timm.state_dict(), tmp_path / "a.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert 'pip install "dpn-jax[convert]"' in refused(tmp_path / "a.pth")


# Tensors that do not fit


def test_missing_unknown_and_misshaped_are_one_error(state: State, tmp_path: Path) -> None:
    missing = ["features.conv2_1.c1x1_a.conv.weight", "classifier.bias", "features.conv1_1.bn.running_var"]
    for name in missing:
        del state[name]
    state |= {"head.weight": torch.zeros(2), "aaa": torch.zeros(2)}
    state["features.conv3_1.c1x1_c.bn.bias"] = torch.zeros(17)
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    line = refused(tmp_path / "a.safetensors", model=TINY)
    assert "3 missing (first: classifier.bias), 2 unknown (first: aaa), 1 misshaped" in line
    with pytest.raises(CheckpointError) as caught:
        dpn_jax.load(tmp_path / "a.safetensors", model=TINY)
    assert caught.value.missing == tuple(sorted(missing))
    assert caught.value.unknown == ("aaa", "head.weight")
    assert caught.value.misshaped == ("features.conv3_1.c1x1_c.bn.bias: [17], expected [16]",)
    for name in (*missing, "aaa", "head.weight", "features.conv3_1.c1x1_c.bn.bias"):
        assert name in str(caught.value)


@pytest.mark.parametrize("model", [None, TINY])
def test_any_one_tensor_missing_or_misshaped(model: dpn_jax.DPNConfig | None) -> None:
    whole = {entry.timm: entry.timm_shape for entry in name_table(TINY)}
    assert infer_config(whole) == TINY
    for entry in name_table(TINY):
        faulty = [{name: shape for name, shape in whole.items() if name != entry.timm}] * (not entry.is_counter)
        faulty += [whole | {entry.timm: (*entry.timm_shape, 2)}, whole | {entry.timm: (9999,)}]
        for shapes in faulty:
            with pytest.raises(CheckpointError):
                check(infer_config(shapes) if model is None else model, shapes)


@pytest.mark.parametrize("half", ["weight", "bias"])
def test_half_a_classifier(half: str, state: State, tmp_path: Path) -> None:
    del state[f"classifier.{half}"]
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    assert f"classifier.{half}" in refused(tmp_path / "a.safetensors")


def test_our_names_without_our_metadata(tiny_timm_file: Path, tiny_timm: torch.nn.Module, tmp_path: Path) -> None:
    convert(tiny_timm_file, tmp_path / "a.safetensors")
    safetensors.torch.save_file(safetensors.torch.load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert "model=" in refused(tmp_path / "b.safetensors")
    assert_weights(dpn_jax.load(tmp_path / "b.safetensors", model=TINY), tiny_timm.state_dict())


@pytest.mark.parametrize("named", VARIANTS)
@pytest.mark.parametrize("is_timm", [True, False])
def test_another_variants_weights_are_recognized(named: str, is_timm: bool) -> None:
    for variant in VARIANTS:
        entries = name_table(get_config(variant))
        shapes = {e.timm: e.timm_shape for e in entries} if is_timm else {e.flax: e.flax_shape for e in entries}
        if {variant, named} == {"dpn48b"} or variant == named:
            check(get_config(named), shapes)
            continue
        with pytest.raises(CheckpointError) as caught:
            check(get_config(named), shapes)
        line = str(caught.value).split("\n")[0]
        assert f"looks like {variant}'s weights" in line
        assert len(line) < 400


def test_a_file_of_another_variant(tmp_path: Path) -> None:
    header, end = {}, 0
    for entry in name_table(get_config("dpn68b")):
        size = 4 * int(np.prod(entry.timm_shape))
        dtype = {"dtype": "F32", "shape": entry.timm_shape}
        header[entry.timm], end = dtype | {"data_offsets": [end, end + size]}, end + size
    path = tmp_path / "a.safetensors"
    path.write_bytes(forge(header))
    os.truncate(path, path.stat().st_size + end)  # 50 MB of zeros that take no room
    assert "the file looks like dpn68b's weights" in refused(path, model="dpn68")
    assert dpn_jax.load(path, model="dpn68b").config == get_config("dpn68b")


# Values


BAD_VALUES = {
    "nan": ("features.conv2_1.c1x1_a.conv.weight", float("nan"), "NaN or infinity"),
    "inf": ("classifier.bias", float("inf"), "NaN or infinity"),
    "-inf": ("features.conv5_bn_ac.bn.running_mean", -float("inf"), "NaN or infinity"),
    "negative variance": ("features.conv2_1.c3x3_b.bn.running_var", -1e-3, "a negative running variance"),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "value", "said"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_values(name: str, value: float, said: str, dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    state = {key: tensor.to(dtype) if tensor.ndim else tensor for key, tensor in state.items()}
    state[name].view(-1)[-1] = value
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    assert f"{name}: {said}; --allow-nonfinite" in refused(path)
    assert_weights(
        dpn_jax.load(path, allow_nonfinite=True), {key: t.float() if t.ndim else t for key, t in state.items()}
    )
    convert(path, tmp_path / "b.safetensors", to="timm", allow_nonfinite=True)
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_every_bad_tensor_is_listed(state: State, tmp_path: Path) -> None:
    bad = [name for name in state if name.endswith("running_var")]
    for name in bad:
        state[name][0] = -1
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    assert f"and {len(bad) - 1} more" in refused(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        dpn_jax.load(tmp_path / "a.safetensors")
    assert all(name in str(caught.value) for name in bad)


def test_large_values_whose_sum_overflows_are_fine(state: State, tmp_path: Path) -> None:
    state["classifier.weight"].fill_(3e38)
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    assert_weights(dpn_jax.load(tmp_path / "a.safetensors"), state)


def test_values_that_do_not_fit_the_dtype_asked_for(state: State, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state["classifier.bias"] = torch.full((5,), 1e6)
    safetensors.torch.save_file(state, path)
    with pytest.raises(CheckpointError, match=r"classifier\.bias: NaN or infinity"):
        dpn_jax.load(path, param_dtype=jnp.float16)
    with pytest.raises(CheckpointError, match=r"classifier\.bias: NaN or infinity"):
        convert(path, tmp_path / "b.safetensors", dtype=jnp.float16)
    convert(path, tmp_path / "b.safetensors", dtype=jnp.bfloat16)
    state["classifier.bias"] = torch.full((5,), 1e300, dtype=torch.float64)
    safetensors.torch.save_file(state, path)
    with pytest.raises(CheckpointError, match=r"classifier\.bias: NaN or infinity"):
        dpn_jax.load(path)
    assert np.isinf(values(dpn_jax.load(path, allow_nonfinite=True))["classifier.bias"]).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_kernels_that_are_not_floating_point(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    state["features.conv1_1.conv.weight"] = torch.zeros(8, 3, 3, 3, dtype=dtype)
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    assert "features.conv1_1.conv.weight" in refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [3.0, float("nan")])
def test_floating_point_counters(value: float, state: State, tmp_path: Path) -> None:
    state["features.conv1_1.bn.num_batches_tracked"] = torch.tensor(value)  # as `tensor.float()` over everything leaves
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(state, path)
    if value == 3:
        assert values(dpn_jax.load(path))["stem.norm.steps"] == 3
        convert(path, tmp_path / "b.safetensors", to="timm")
        written = safetensors.torch.load_file(tmp_path / "b.safetensors")
        assert torch.equal(written["features.conv1_1.bn.num_batches_tracked"], torch.tensor(3))
    else:
        refused(path)
        dpn_jax.load(path, allow_nonfinite=True)


# Our own metadata


def changed(metadata: dict[str, str], key: str, field: str, value: object) -> dict[str, str]:
    return metadata | {key: json.dumps(json.loads(metadata[key]) | {field: value})}


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        ("config", "depths", []),
        ("config", "depths", 5),
        ("config", "depths", [10**9] * 3),
        ("config", "depths", [2, 1, 1]),
        ("config", "groups", "4"),
        ("config", "drop_rate", None),
        ("config", "global_pool", []),
        ("config", "outer_activation", "tanh"),
        ("config", "newer_field", 1),
        ("provenance", "source", ["a"]),
        ("provenance", "sha256", {"a": 1}),
        ("provenance", "class_names", 5),
        ("provenance", "class_names", [["a"]]),
        ("provenance", "preprocessing", 5),
        ("provenance", "preprocessing", {"mean": [10**400] * 3}),
        ("provenance", "preprocessing", {"newer_field": 1}),
    ],
)
def test_damaged_metadata(key: str, field: str, value: object, tiny_timm_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    convert(tiny_timm_file, path)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors, path, metadata=changed(metadata, key, field, value))
    refused(path)


@pytest.mark.parametrize("key", ["config", "provenance"])
@pytest.mark.parametrize("text", [None, "", "[]", "5", "{", "[" * 100_000])
def test_damaged_metadata_text(key: str, text: str | None, tiny_timm_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    convert(tiny_timm_file, path)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    metadata = {name: value for name, value in metadata.items() if name != key} | ({} if text is None else {key: text})
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, metadata=metadata)
    assert "damaged metadata" in refused(path)


# Writing


def test_an_existing_file_stays(tiny_timm_file: Path, tmp_path: Path) -> None:
    model = dpn_jax.load(tiny_timm_file)
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"precious")
    for write in (
        lambda **options: dpn_jax.save(model, path, **options),
        lambda **options: convert(tiny_timm_file, path, **options),
    ):
        path.write_bytes(b"precious")
        with pytest.raises(CheckpointError, match="exists already"):
            write()
        assert path.read_bytes() == b"precious"
        write(overwrite=True)
        dpn_jax.load(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("alias", ["itself", "symlink", "hard link", "dots"])
def test_the_source_is_never_the_destination(alias: str, tiny_timm_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    source.write_bytes(tiny_timm_file.read_bytes())
    destination = tmp_path / "destination.safetensors"
    if alias == "itself":
        destination = source
    elif alias == "symlink":
        destination.symlink_to(source)
    elif alias == "hard link":
        destination.hardlink_to(source)
    else:
        destination = tmp_path / ".." / tmp_path.name / "source.safetensors"
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert(source, destination, overwrite=True)
    assert source.read_bytes() == tiny_timm_file.read_bytes()


def test_destinations_that_cannot_be(tiny_timm_file: Path, tmp_path: Path) -> None:
    model = dpn_jax.load(tiny_timm_file)
    (tmp_path / "folder.safetensors").mkdir()
    for path in (
        tmp_path / "absent" / "a.safetensors",
        tmp_path / "folder.safetensors",
        tmp_path / f"{'x' * 300}.safetensors",
    ):
        for write in (
            lambda path=path: convert(tiny_timm_file, path, overwrite=True),
            lambda path=path: dpn_jax.save(model, path, overwrite=True),
        ):
            with pytest.raises(CheckpointError, match=r"cannot be written|too long"):
                write()
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        convert(tiny_timm_file, tmp_path / "a.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]


def test_a_reader_never_sees_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def log_fsync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append("folder to disk" if target == tmp_path else f"{target.stat().st_size} bytes to disk")
        fsync(descriptor)

    def log_replace(source: Path, target: Path) -> Path:
        assert path.read_bytes() == b"old"
        events.append("renamed")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "replace", log_replace)
    array = np.arange(1000, dtype=np.float32)
    write_tensors(path, {"a": LazyTensor(array.shape, array.dtype, lambda: array)}, {}, overwrite=True)
    assert events == [f"{path.stat().st_size} bytes to disk", "renamed", "folder to disk"]
    np.testing.assert_array_equal(safetensors.numpy.load_file(path)["a"], array)


def test_a_tensor_that_cannot_be_read_leaves_no_part(tmp_path: Path) -> None:
    def fail() -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "a.safetensors", {"a": LazyTensor((2,), np.dtype(np.float32), fail)}, {})
    assert not any(tmp_path.iterdir())


def run(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, check=False
    )


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from dpn_jax.checkpoint.files import LazyTensor, write_tensors
array = np.ones(1_000_000, np.float32)
tensors = {f"t{i}": LazyTensor(array.shape, array.dtype, lambda: array) for i in range(3)}
tensors["t3"] = LazyTensor(array.shape, array.dtype, lambda: os.kill(os.getpid(), signal.SIGKILL))
write_tensors(Path(sys.argv[1]), tensors, {}, overwrite=True)
"""


def test_killed_while_writing(tiny_timm_file: Path, tmp_path: Path, tiny_timm: torch.nn.Module) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(tiny_timm_file.read_bytes())
    assert run(KILLED, path).returncode == -signal.SIGKILL
    assert [left.suffix for left in tmp_path.iterdir() if left != path] == [".tmp"]  # it was writing
    assert path.read_bytes() == tiny_timm_file.read_bytes()
    assert_weights(dpn_jax.load(path), tiny_timm.state_dict())


FULL_DISK = """
import resource, sys
import dpn_jax
from dpn_jax.checkpoint.save import convert
source, old, new = sys.argv[1:]
model = dpn_jax.load(source)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
for path in (old, new):
    for write in (lambda: convert(source, path, overwrite=True), lambda: dpn_jax.save(model, path, overwrite=True)):
        try:
            write()
        except dpn_jax.CheckpointError as error:
            print(error)
"""


def test_full_disk(tiny_timm_file: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    old.write_bytes(b"precious")
    result = run(FULL_DISK, tiny_timm_file, old, new)
    assert not result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert all("cannot be written" in line for line in lines)
    assert [str(path) in line for line, path in zip(lines, (old, old, new, new), strict=True)] == [True] * 4
    assert old.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [old]


# Anything else


def mutations(content: bytes, head: int, count: int, seed: int) -> Iterator[bytes]:
    """Damaged copies; the first `head` bytes, where the structure is, get most of it."""
    rng = random.Random(seed)
    for _ in range(count):
        mutated = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 5])):
            end = head if rng.random() < 0.9 else len(mutated)
            start = rng.randrange(max(1, min(end, len(mutated))))
            match rng.randrange(6):
                case 0:
                    mutated[start : start + 1] = bytes([rng.randrange(256)])
                case 1:
                    del mutated[start : start + rng.choice([1, 4, 50])]
                case 2:
                    mutated[start:start] = rng.choice([b"0", b"9", b'"', b"]", b"null", b"-", b"\0", b"\xff", b"1e999"])
                case 3:
                    mutated[start:start] = mutated[start : start + rng.choice([1, 8, 80])]
                case 4:
                    mutated[start : start + 1] = b"%d" % rng.randrange(10)
                case 5:
                    mutated[start : start + 8] = rng.choice([bytes(8), b"\xff" * 8, (2**63).to_bytes(8, "little")])
        yield bytes(mutated)


def attempt(path: Path) -> bool:
    """Whether it loads; any exception but one fails the test."""
    outcomes = set()
    destination = path.with_name("converted.safetensors")
    for call in (lambda: dpn_jax.load(path), lambda: convert(path, destination, overwrite=True)):
        try:
            call()
            outcomes.add(True)
        except CheckpointError as error:
            assert str(path.parent) in str(error)
            outcomes.add(False)
    assert len(outcomes) == 1
    return outcomes.pop()


@pytest.mark.parametrize("layout", ["timm", "flax"])
def test_mutated_safetensors(layout: str, tiny_timm_file: Path, tmp_path: Path) -> None:
    source = tiny_timm_file
    if layout == "flax":
        source = tmp_path / "flax.safetensors"
        convert(tiny_timm_file, source)
    content = source.read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    path = tmp_path / "a.safetensors"
    loaded = []
    for mutated in mutations(content, head, 600, seed=1):
        path.write_bytes(mutated)
        loaded.append(attempt(path))
    assert 0 < sum(loaded) < len(loaded)


def test_mutated_metadata(tiny_timm_file: Path, tmp_path: Path) -> None:
    convert(tiny_timm_file, tmp_path / "flax.safetensors")
    with safetensors.safe_open(tmp_path / "flax.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(tmp_path / "flax.safetensors")
    loaded = []
    for key in ("config", "provenance"):
        content = metadata[key].encode()
        for mutated in mutations(content, len(content), 100, seed=2):
            text = mutated.decode(errors="replace")
            safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", metadata=metadata | {key: text})
            loaded.append(attempt(tmp_path / "a.safetensors"))
    assert 0 < sum(loaded) < len(loaded)


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
def test_mutated_pth(legacy: bool, state: State, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    loaded = []
    for mutated in [content, *mutations(content, 16_000, 200, seed=4)]:
        path.write_bytes(mutated)
        loaded.append(attempt(path))
    assert 0 < sum(loaded) < len(loaded)
