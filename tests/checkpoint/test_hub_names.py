"""Names and folders that `from_pretrained` takes, as far as they need no client: see `test_hub` for that."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

import dpn_jax
from dpn_jax.checkpoint.hub import locate
from dpn_jax.checkpoint.timm_config import Described
from dpn_jax.cli.options import ModelOptions
from dpn_jax.pretrained import PRETRAINED, Preprocessing
from tests.support.hub_server import CONFIG


def test_a_variant_is_answered_with_its_tags() -> None:
    with pytest.raises(
        ValueError, match=r"'dpn68b' is an architecture; its weights are dpn68b.mx_in1k or dpn68b.ra_in1k"
    ):
        locate("dpn68b")
    with pytest.raises(ValueError, match="no weights are published"):
        locate("dpn48b")


@pytest.mark.parametrize("name", ["dpn92.mx", "timm/", "a/b/c", "hf-hub:dpn9", "no\0name", " "])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^unknown model .*(did you mean|known: )"):
        locate(name)


@pytest.mark.parametrize(
    "name", ["x" * 5000, "no/such.safetensors", "no/such.ckpt", "./nothing", "/nothing", "a\0b.pth", ""]
)
def test_a_path_that_cannot_be_read_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dpn_jax.CheckpointError):
        dpn_jax.from_pretrained(name)
    with pytest.raises(dpn_jax.CheckpointError):
        dpn_jax.load(name)


def test_a_folder_laid_out_like_a_repository(tiny_file: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(tiny_file.read_bytes())
    assert locate(tmp_path).described == Described()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model = dpn_jax.from_pretrained(str(tmp_path))
    assert model.provenance.source == tmp_path.name
    assert model.provenance.class_names == ("ant", "bee", "cat", "dog", "eel")
    assert model.provenance.preprocessing == Preprocessing(
        image_size=64, crop_fraction=0.9, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)
    )


def test_timms_prefix_of_a_folder(tiny_file: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_file, tmp_path / "model.safetensors")
    assert locate(f"local-dir:{tmp_path}").weights == tmp_path / "model.safetensors"
    with pytest.raises(dpn_jax.CheckpointError, match=r"no model\.safetensors"):
        locate(f"local-dir:{tmp_path.parent}")


# Where a name is both


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The repositories that the hub was asked for; it has none."""
    names: list[str] = []

    def download(repository: str, *_: object, **__: object) -> str:
        names.append(repository)
        raise errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return names


@pytest.mark.parametrize("content", [None, "notes.txt", "config.json"])
@pytest.mark.parametrize("name", ["dpn68.mx_in1k", "timm/dpn68.mx_in1k", "you/your-dpn"])
def test_a_folder_without_weights_shadows_nothing(name: str, content: str | None, here: Path, asked: list[str]) -> None:
    (here / name).mkdir(parents=True)
    if content:
        (here / name / content).write_text("{}")
    with pytest.raises(dpn_jax.CheckpointError) as caught:
        locate(name)
    assert set(asked) == {name if "/" in name else f"timm/{name}"}
    assert str(caught.value).endswith("; the folder of that name here has no model.safetensors or pytorch_model.bin")


def test_a_packaged_tag_is_not_shadowed(here: Path) -> None:
    (here / "dpn_tiny.digits").mkdir()
    assert locate("dpn_tiny.digits").source == "dpn_tiny.digits"
    with pytest.raises(dpn_jax.CheckpointError, match="in this folder"):
        locate(Path("dpn_tiny.digits"))


@pytest.mark.parametrize("name", ["dpn68.mx_in1k", "timm/dpn68.mx_in1k", "dpn_tiny.digits"])
def test_a_folder_with_weights_is_taken_and_said(
    name: str, here: Path, tiny_file: Path, asked: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (here / name).mkdir(parents=True)
    shutil.copy(tiny_file, here / name / "model.safetensors")
    weights = Path(name) / "model.safetensors"
    with caplog.at_level(logging.WARNING, logger="dpn_jax"):
        assert locate(name).weights == weights
        assert locate(f"./{name}").weights == locate(Path(name)).weights == weights
    (record,) = caplog.records
    advice = f"hf-hub:{name}"
    assert record.getMessage() == f"{name}: took the local {weights}; {advice} would be the published weights"
    if PRETRAINED[name.removeprefix("timm/")].packaged:
        assert locate(advice).source == name
    else:
        with pytest.raises(dpn_jax.CheckpointError):
            locate(advice)
        assert asked


@pytest.mark.parametrize("kind", ["file", "folder", "packaged", "local-dir"])
def test_a_revision_without_meaning(kind: str, here: Path, tiny_file: Path) -> None:
    shutil.copy(tiny_file, here / "model.safetensors")
    sources = {"file": "model.safetensors", "folder": ".", "packaged": "dpn_tiny.digits", "local-dir": "local-dir:."}
    with pytest.raises(ValueError, match=r"is local, where --revision \(revision='v1'\) has no meaning; drop it"):
        dpn_jax.from_pretrained(sources[kind], revision="v1")
    dpn_jax.from_pretrained(sources[kind])


# Runs of `finetune`


def write_run(folder: Path) -> None:
    """As much of a run as is looked at."""
    (folder / "checkpoints").mkdir()
    record = {"config": {}, "source": "a", "architecture": {}, "preprocessing": {}, "class_names": []}
    (folder / "config.json").write_text(json.dumps(record))


def test_a_finished_run_is_a_model(tiny_file: Path, tmp_path: Path) -> None:
    model = dpn_jax.load(tiny_file)
    model.provenance = model.provenance._replace(class_names=tuple("abcde"), preprocessing=Preprocessing(image_size=48))
    write_run(tmp_path)
    dpn_jax.save(model, tmp_path / "model.safetensors")
    for loaded in (dpn_jax.from_pretrained(str(tmp_path)), dpn_jax.load(tmp_path)):
        assert loaded.provenance == model.provenance
    assert ModelOptions(weights=str(tmp_path)).load()[1] == model.provenance.preprocessing


@pytest.mark.parametrize("name", ["run", "runs/first", "dpn68.mx_in1k"])
def test_an_unfinished_run_says_how_to_finish_it(name: str, here: Path, asked: list[str]) -> None:
    (here / name).mkdir(parents=True)
    write_run(here / name)
    with pytest.raises(dpn_jax.CheckpointError) as caught:
        dpn_jax.from_pretrained(name)
    advice = f"dpn-jax finetune --output {name} --resume"
    assert str(caught.value) == f"{name}: an unfinished fine-tuning run; finish it: {advice}"
    assert not asked


# What the client says


def test_a_gated_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise errors.GatedRepoError.__new__(errors.GatedRepoError)  # what its argument is depends on the version

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(
        dpn_jax.CheckpointError, match=r"^you/dpn: gated; ask for access .*, then log in: hf auth login"
    ):
        locate("you/dpn")


def test_retries_are_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    client = logging.getLogger("huggingface_hub.utils._http")

    def download(*_: object, **__: object) -> str:
        for number in range(1, 6):
            client.warning("'[Errno 111] Connection refused' thrown while requesting HEAD http://localhost/a")
            client.warning("Retrying in %ds [Retry %d/5].", number, number)
        client.warning("something else")
        raise errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING), pytest.raises(dpn_jax.CheckpointError):
            locate("you/dpn")
        told = [record.getMessage() for record in caplog.records if record.getMessage() != "something else"]
        assert told == ["you/dpn: the hub does not answer; trying again"]
        assert len(caplog.records) > 1  # everything else is passed on
    client.warning("Retrying in 1s [Retry 1/5].")
    assert caplog.records[-1].name == client.name  # and what others do with the client
