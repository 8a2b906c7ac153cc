"""timm's `config.json`, field by field. `parity/test_preprocess_parity` compares pixels. No torch."""

import json
from pathlib import Path
from typing import Any

import pytest

import dpn_jax
from dpn_jax import CheckpointError
from dpn_jax.checkpoint.timm_config import Described, read_timm_config
from dpn_jax.config import VARIANTS
from dpn_jax.pretrained import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from tests.support.damaged_files import mutations
from tests.support.hub_server import CONFIG, FLAT_CONFIG
from tests.support.models import TINY, save_timms_layout


def read(tmp_path: Path, config: object) -> Described:
    path = tmp_path / "config.json"
    path.write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    return read_timm_config(path)


def with_fields(**fields: object) -> dict[str, Any]:
    """A `config.json` with other fields in its `pretrained_cfg`."""
    return CONFIG | {"pretrained_cfg": CONFIG["pretrained_cfg"] | fields}


# Classes


@pytest.mark.parametrize("place", ["label_names", "labels", "pretrained_cfg"])
@pytest.mark.parametrize(
    "names",
    [["ant", "bee", "cat", "dog", "eel"], {str(i): name for i, name in enumerate(("ant", "bee", "cat", "dog", "eel"))}],
)
def test_names_in_a_list_or_by_index(names: object, place: str, tmp_path: Path) -> None:
    config = with_fields(label_names=names if place == "pretrained_cfg" else None)
    if place != "pretrained_cfg":
        config |= {place: names}
    assert read(tmp_path, config).class_names == ("ant", "bee", "cat", "dog", "eel")


def test_names_in_any_order_and_with_gaps(tmp_path: Path) -> None:
    described = read(tmp_path, with_fields(label_names=None) | {"label_names": {"4": "eel", "0": "ant"}})
    assert described.class_names == ("ant", "<unmapped:1>", "<unmapped:2>", "<unmapped:3>", "eel")  # timm's words


@pytest.mark.parametrize(
    "names",
    [
        {"0": "a", "5": "f"},
        {"ant": "0"},
        {"-1": "a"},
        {"0": "a", "00": "b"},
        {"0": 5},
        {"0": None},
        {"999999999999": "a"},
        {"1" * 5000: "a"},
        [1, 2],
        "abcde",
        5,
        True,
        [["a"]],
    ],
)
def test_names_that_are_none(names: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not the config\.json of a timm DPN \(.*"):
        read(tmp_path, with_fields(label_names=None) | {"label_names": names})


def test_so_many_classes_are_not_made_up(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="label_names"):
        read(tmp_path, CONFIG | {"num_classes": 10**12, "label_names": {"0": "a"}})


# Preprocessing


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({"crop_mode": "squash"}, {"crop_mode": "squash"}),
        ({"crop_mode": None}, {}),
        ({"input_size": [3, 64, 96]}, {"image_size": (64, 96)}),
        ({"interpolation": "hamming"}, {"interpolation": "hamming"}),
        ({"crop_pct": 0}, {"crop_fraction": 0.875}),
        ({"mean": [0.5], "std": [0.1]}, {"mean": (0.5,) * 3, "std": (0.1,) * 3}),
        ({"mean": None, "std": []}, {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}),
        ({"input_size": [1, 64, 64], "mean": [0.5], "std": [0.1]}, {"mean": (0.5,), "std": (0.1,)}),
        ({"test_input_size": [3, 288, 288], "test_crop_pct": 1.0}, {}),
    ],
)
def test_fields_are_read(fields: dict[str, object], changes: dict[str, Any], tmp_path: Path) -> None:
    as_it_was = {"image_size": 64, "crop_fraction": 0.9, "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    assert read(tmp_path, with_fields(**fields)).preprocessing == Preprocessing(**as_it_was | changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_mode", "middle"),
        ("crop_mode", 1),
        ("crop_mode", ["center"]),
        ("input_size", 224),
        ("input_size", [224, 224]),
        ("input_size", [3, 224.0, 224]),
        ("input_size", [3, True, 224]),
        ("input_size", [3, 8, 224]),
        ("input_size", [3, 10**400, 224]),
        ("input_size", [1, 224, 224]),
        ("input_size", "3x224x224"),
        ("crop_pct", "0.9"),
        ("crop_pct", True),
        ("crop_pct", float("nan")),
        ("crop_pct", 1e-300),
        ("crop_pct", -1),
        ("mean", "555"),
        ("mean", ["0.5", "0.5", "0.5"]),
        ("mean", [0.5, 0.5, None]),
        ("mean", [float("nan")] * 3),
        ("mean", {"0": 1}),
        ("std", [0, 0, 0]),
        ("std", [float("inf")] * 3),
        ("std", [0.5, 0.5]),
        ("interpolation", "random"),
        ("label_offset", 1),
    ],
)
def test_fields_of_another_type_or_range(field: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not the config\.json of a timm DPN") as caught:
        read(tmp_path, with_fields(**{field: value}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


# The architecture


def test_model_args_that_we_have(tmp_path: Path) -> None:
    args = {"global_pool": "avgmax", "drop_rate": 0.25, "act_layer": "silu", "fc_act_layer": "elu", "num_classes": 5}
    args |= {"k_sec": None, "output_stride": 32, "norm_layer": "batchnorm2d"}
    save_timms_layout(TINY, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_args": args}))
    model = dpn_jax.from_pretrained(tmp_path)
    assert model.config == TINY.replace(global_pool="avgmax", drop_rate=0.25, outer_activation="silu")
    assert model.dropout.rate == 0.25


def test_sizes_in_model_args(tmp_path: Path) -> None:
    args = {
        "k_sec": [2, 1],
        "inc_sec": [4, 8],
        "k_r": 8,
        "groups": 4,
        "num_init_features": 8,
        "small": True,
        "b": False,
    }
    save_timms_layout(TINY, tmp_path / "model.safetensors")
    config = CONFIG | {"architecture": "dpn68b", "model_args": args}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert dpn_jax.from_pretrained(tmp_path).config == TINY
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": args | {"k_r": 16}}))
    with pytest.raises(CheckpointError, match="do not fit the architecture"):
        dpn_jax.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_stride", 16),
        ("norm_layer", "groupnorm"),
        ("act_layer", "gelu"),
        ("act_layer", ["relu"]),
        ("global_pool", "soft"),
        ("drop_rate", 1.5),
        ("drop_rate", "0.5"),
        ("drop_path_rate", 0.1),
        ("features_only", True),
        ("k_sec", 5),
        ("k_sec", [3, "4", 5, 6]),
        ("groups", 7),
        ("b", "yes"),
        ("small", 1),
        ("norm_eps", 1e-5),
    ],
)
def test_model_args_that_we_have_not(name: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not the config\.json of a timm DPN"):
        read(tmp_path, CONFIG | {"architecture": "dpn68", "model_args": {name: value}})


@pytest.mark.parametrize("variant", sorted(set(VARIANTS)))
def test_nothing_but_the_architecture(variant: str, tmp_path: Path) -> None:
    assert read(tmp_path, {"architecture": variant}) == Described(variant, Preprocessing())  # timm's defaults


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b"{}",
        b'{"pretrained_cfg": null}',
        b'{"model_type": "resnet"}',
        CONFIG | {"architecture": "vit"},
        CONFIG | {"architecture": {}},
        CONFIG | {"architecture": ["dpn92"]},
        CONFIG | {"model_args": []},
        CONFIG | {"pretrained_cfg": []},
        CONFIG | {"num_classes": "5"},
        FLAT_CONFIG | {"input_size": []},
        FLAT_CONFIG | {"input_size": {}},
        FLAT_CONFIG | {"crop_pct": 1.5},
        FLAT_CONFIG | {"mean": [10**400] * 3},
        FLAT_CONFIG | {"interpolation": "sinc"},
        FLAT_CONFIG | {"labels": 5},
    ],
)
def test_what_is_not_timms(config: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not the config"):
        read(tmp_path, config)


def test_mutated(tmp_path: Path) -> None:
    labels = {str(i): name for i, name in enumerate(("ant", "bee", "cat", "dog", "eel"))}
    args = {"global_pool": "avgmax", "drop_rate": 0.25, "k_sec": [3, 4, 12, 3], "b": True, "in_chans": 3}
    content = json.dumps(CONFIG | {"architecture": "dpn68", "model_args": args, "label_names": labels}).encode()
    good = 0
    for mutated in mutations(content, len(content), 1000, seed=5):
        try:
            good += read(tmp_path, mutated).variant is not None
        except CheckpointError as error:
            assert str(error).startswith(str(tmp_path))
            assert len(str(error)) < 500
    assert 0 < good < 1000
