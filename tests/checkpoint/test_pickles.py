"""PyTorch's files: every wrapper that trainers put around the tensors, and what must not be read. Needs torch."""

import argparse
import contextlib
import datetime
import logging
import pickle
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("tests.support.timm_models")
import safetensors.torch
import torch

import dpn_jax
from dpn_jax.checkpoint.save import convert
from tests.support.damaged_files import attempt, mutations, refused
from tests.support.models import TINY
from tests.support.timm_models import assert_weights, timm_dpn

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
State = dict[str, torch.Tensor]


@pytest.fixture
def state(tiny_timm: torch.nn.Module) -> State:
    """timm's tensors, to be changed."""
    return {name: tensor.clone() for name, tensor in tiny_timm.state_dict().items()}


# PyTorch's files


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pth_of_any_dtype(dtype: str, legacy: bool, tiny_timm: torch.nn.Module, tmp_path: Path) -> None:
    state = {name: t.to(DTYPES[dtype]) if t.ndim else t for name, t in tiny_timm.state_dict().items()}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    expected = {name: tensor.float() if tensor.ndim else tensor for name, tensor in state.items()}
    assert_weights(dpn_jax.load(tmp_path / "a.pth"), expected)
    convert(tmp_path / "a.pth", tmp_path / "a.safetensors", to="timm")
    safetensors.torch.save_file(state, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


@pytest.mark.parametrize(
    "wrapper",
    [["state_dict"], ["model"], ["state_dict_ema"], ["model_ema"], ["model", "state_dict"], ["model_state_dict"]],
)
def test_wrapped_pth(
    wrapper: list[str], tiny_timm: torch.nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content: dict[str, object] = dict(tiny_timm.state_dict())
    for key in reversed(wrapper):
        content = {"epoch": 3, key: content, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "a.pth")
    assert_weights(dpn_jax.load(tmp_path / "a.pth"), tiny_timm.state_dict())
    assert [record.getMessage() for record in caplog.records] == [
        f"a.pth: took the tensors under {key!r}" for key in wrapper
    ]


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema"])
def test_the_average_wins(average: str, timm: ModuleType, tiny_timm: torch.nn.Module, tmp_path: Path) -> None:
    other = timm_dpn(timm, seed=1).state_dict()
    torch.save({"state_dict": other, average: tiny_timm.state_dict()}, tmp_path / "a.pth")
    assert_weights(dpn_jax.load(tmp_path / "a.pth"), tiny_timm.state_dict())
    torch.save({"state_dict": tiny_timm.state_dict(), average: None}, tmp_path / "b.pth")
    assert_weights(dpn_jax.load(tmp_path / "b.pth"), tiny_timm.state_dict())


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.backbone.", "timm_model."],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_prefixes_of_wrapped_modules(
    prefix: str, suffix: str, tiny_timm: torch.nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {prefix + name: tensor for name, tensor in tiny_timm.state_dict().items()}
    path = tmp_path / f"a.{suffix}"
    (torch.save if suffix == "pth" else safetensors.torch.save_file)(state, path)
    with caplog.at_level(logging.WARNING, logger="dpn_jax"):
        assert_weights(dpn_jax.load(path), tiny_timm.state_dict())
    assert [record.getMessage() for record in caplog.records] == [f"{path.name}: stripped {prefix!r} from every name"]


def test_a_plain_file_is_not_remarked_on(tiny_timm_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    dpn_jax.load(tiny_timm_file)
    assert not caplog.records


def test_a_prefix_of_some_names_only_is_none(state: State, tmp_path: Path) -> None:
    content = {f"model.{name}": tensor for name, tensor in state.items()} | {"loss.weight": torch.ones(5)}
    torch.save({"state_dict": content}, tmp_path / "a.pth")
    with pytest.raises(dpn_jax.CheckpointError, match=r"unknown .*loss\.weight"):
        dpn_jax.load(tmp_path / "a.pth", model=TINY)


def test_torchs_averaged_model(timm: ModuleType, tiny_timm: torch.nn.Module, tmp_path: Path) -> None:
    average = torch.optim.swa_utils.AveragedModel(tiny_timm, use_buffers=True)
    torch.save(
        {"model": timm_dpn(timm, seed=1).state_dict(), "model_ema": average.state_dict()}, tmp_path / "a.pth"
    )  # as torchvision's
    assert "n_averaged" in average.state_dict()
    assert_weights(dpn_jax.load(tmp_path / "a.pth"), tiny_timm.state_dict())


# What trainers write beside the tensors


@pytest.mark.parametrize("ema", [False, True])
def test_checkpoints_of_timms_train_script(
    ema: bool, timm: ModuleType, tiny_timm: torch.nn.Module, tmp_path: Path
) -> None:
    args = argparse.Namespace(model="dpn68", lr=0.1, mean=(0.5, 0.5), data_dir=tmp_path, device=torch.device("cpu"))
    optimizer = torch.optim.SGD(tiny_timm.parameters(), lr=0.1, momentum=0.9)
    saver = timm.utils.CheckpointSaver(
        timm_dpn(timm, seed=1) if ema else tiny_timm,
        optimizer,
        args=args,
        model_ema=timm.utils.ModelEmaV3(tiny_timm) if ema else None,
        amp_scaler=timm.utils.NativeScaler(device="cpu"),
        checkpoint_dir=str(tmp_path),
    )
    saver.save_checkpoint(3, metric=np.float64(71.5))
    for name in ("last", "model_best"):
        assert_weights(dpn_jax.load(tmp_path / f"{name}.pth.tar"), tiny_timm.state_dict())


def lightning(modules: pytest.MonkeyPatch, module: str, name: str, *parents: type) -> type:
    """A class of another library's, as far as a pickle knows it."""
    made = type(name, parents, {"__module__": module})
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        modules.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    setattr(sys.modules[module], name, made)
    return made


@pytest.mark.parametrize("legacy", [False, True])
def test_what_trainers_keep_beside_the_tensors(
    legacy: bool, state: State, tiny_timm: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attributes = lightning(monkeypatch, "lightning.fabric.utilities.data", "AttributeDict", dict)
    nodes = lightning(monkeypatch, "omegaconf.dictconfig", "DictConfig")
    config = nodes()
    config.content = {"lr": 0.1}
    beside = {
        "epoch": np.int64(3),
        "best": np.float32(0.5),
        "random": np.random.RandomState(0).get_state(),
        "args": argparse.Namespace(output=tmp_path, ratio=(3 / 4, 4 / 3), scale=np.float64(1)),
        "hyper_parameters": attributes(lr=0.1, config=config),
        "callbacks": {"ModelCheckpoint": {"best_model_path": tmp_path, "scores": defaultdict(list, a=[1])}},
        "optimizer_states": [torch.optim.AdamW(tiny_timm.parameters()).state_dict()],
        "version": torch.torch_version.TorchVersion("2.6.0"),
        "started": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        "milestones": Counter([3, 4]),
    }
    content = beside | {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
    monkeypatch.undo()
    assert_weights(dpn_jax.load(tmp_path / "a.ckpt"), tiny_timm.state_dict())


@pytest.mark.parametrize("value", [np.float64(3), argparse.Namespace()])
def test_among_the_tensors_only_tensors(value: object, state: State, tmp_path: Path) -> None:
    torch.save(state | {"x": value}, tmp_path / "a.pth")
    assert refused(tmp_path / "a.pth").endswith("'x' is not a tensor")


def test_what_torch_is_told_to_read_stays_as_it_was(state: State, tmp_path: Path) -> None:
    torch.save({"state_dict": state, "args": argparse.Namespace()}, tmp_path / "a.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        dpn_jax.load(tmp_path / "a.pth")
        assert set(torch.serialization.get_safe_globals()) == before
        with ThreadPoolExecutor(4) as pool:  # one that is ready must not take the names away from the others
            list(pool.map(dpn_jax.load, [tmp_path / "a.pth"] * 8))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pth", weights_only=True)


class Options:
    """A class of a user's program."""


def raw(name: bytes) -> bytes:
    """A pickle that calls something."""
    return b"\x80\x02c" + name + b"\n)R."


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (Options(), "tests.checkpoint.test_pickles.Options"),
        (raw(b"posix\nsystem"), "posix.system"),
        (raw(b"builtins\neval"), "eval"),
        (raw(b"a.b.c\n" + b"d" * 150), "a.b.c." + "d" * 150),
        (raw(b"evil\x1b[31m\nname"), "'evil\\x1b[31m.name'"),
        (raw(b"a\n" + b"x" * 3000), "a." + "x" * 198),
    ],
)
def test_a_refusal_names_what_is_in_the_way(content: object, named: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    line = refused(path)
    assert line.startswith(f"{path}: refused: {named} is in it, ")
    assert line.isprintable()


def test_the_advice_to_save_the_tensors_alone(tiny_timm: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(tiny_timm, tmp_path / "model.pth")
    line = refused(tmp_path / "model.pth")
    assert "timm.models.dpn.DPN is in it" in line
    advice = line.partition("save the tensors alone: ")[2]
    with contextlib.chdir(tmp_path):
        exec(advice, {"torch": torch, "model": tiny_timm})
    assert_weights(dpn_jax.load(tmp_path / "weights.pth"), tiny_timm.state_dict())


def test_parameters_as_torch_modules_save_them(tiny_timm: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(tiny_timm.state_dict(keep_vars=True), tmp_path / "a.pth")
    assert_weights(dpn_jax.load(tmp_path / "a.pth"), tiny_timm.state_dict())


def test_flat_classifier_is_taken_and_written_as_a_convolution(tiny_timm: torch.nn.Module, tmp_path: Path) -> None:
    state = tiny_timm.state_dict()
    flat = state | {"classifier.weight": state["classifier.weight"].flatten(1)}
    torch.save(flat, tmp_path / "flat.pth")
    assert_weights(dpn_jax.load(tmp_path / "flat.pth"), state)
    convert(tmp_path / "flat.pth", tmp_path / "a.safetensors", to="timm")
    assert safetensors.torch.load_file(tmp_path / "a.safetensors")["classifier.weight"].shape == (5, 152, 1, 1)


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


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
def test_mutated_pth(legacy: bool, state: State, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    beside = {"args": argparse.Namespace(scale=np.float64(1)), "random": np.random.RandomState(0).get_state()}
    torch.save(beside | {"state_dict": state}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    loaded = []
    for mutated in [content, *mutations(content, 16_000, 200, seed=4)]:
        path.write_bytes(mutated)
        loaded.append(attempt(path))
    assert 0 < sum(loaded) < len(loaded)
