"""Names and folders that `from_pretrained` takes, as far as they need no client: see `test_hub` for that."""

import json
from pathlib import Path

import pytest

import dpn_jax
from dpn_jax.checkpoint.hub import locate
from dpn_jax.pretrained import Preprocessing
from tests.support.hub_server import CONFIG, FLAT_CONFIG


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


@pytest.mark.parametrize("name", ["x" * 5000, "no/such.safetensors", "./nothing", "/nothing", "a\0b.pth", ""])
def test_a_path_that_cannot_be_read_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dpn_jax.CheckpointError):
        dpn_jax.from_pretrained(name)
    with pytest.raises(dpn_jax.CheckpointError):
        dpn_jax.load(name)


def test_a_folder_laid_out_like_a_repository(tiny_timm_file: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(tiny_timm_file.read_bytes())
    assert locate(tmp_path).preprocessing is None
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model = dpn_jax.from_pretrained(str(tmp_path))
    assert model.provenance.source == tmp_path.name
    assert model.provenance.class_names == ("ant", "bee", "cat", "dog", "eel")
    assert model.provenance.preprocessing == Preprocessing(
        image_size=64, crop_fraction=0.9, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)
    )


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"pretrained_cfg": null}',
        json.dumps(CONFIG | {"architecture": "vit"}).encode(),
        json.dumps(CONFIG | {"architecture": {}}).encode(),
        json.dumps(CONFIG | {"model_args": {"global_pool": "soft"}}).encode(),
        json.dumps(FLAT_CONFIG | {"input_size": []}).encode(),
        json.dumps(FLAT_CONFIG | {"input_size": {}}).encode(),
        json.dumps(FLAT_CONFIG | {"crop_pct": 1.5}).encode(),
        json.dumps(FLAT_CONFIG | {"mean": [10**400] * 3}).encode(),
        json.dumps(FLAT_CONFIG | {"interpolation": "sinc"}).encode(),
        json.dumps(FLAT_CONFIG | {"labels": 5}).encode(),
    ],
)
def test_a_config_json_that_is_not_timms(config: bytes, tmp_path: Path, tiny_timm_file: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(tiny_timm_file.read_bytes())
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(dpn_jax.CheckpointError, match=r"config\.json: not the config"):
        dpn_jax.from_pretrained(tmp_path)
