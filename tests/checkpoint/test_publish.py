"""What is published is read by the real timm and by us: the same logits, class names and preprocessing."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from flax import nnx

import dpn_jax
from dpn_jax import CardFacts, CheckpointError, DPNConfig, Preprocessing, save_pretrained
from dpn_jax.blocks import DualPathBlock
from dpn_jax.checkpoint.publish import timm_config
from dpn_jax.checkpoint.timm_config import read_timm_config
from dpn_jax.config import OWN_VARIANTS, VARIANTS
from dpn_jax.pretrained import Provenance
from tests.support.hub_server import Hub
from tests.support.models import TINY, randomize, values

NAMES = ("ant", "bee", "cat", "dog", "eel")
SETTINGS = Preprocessing(
    image_size=(48, 64), crop_fraction=0.9, interpolation="bilinear", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
)
CONFIGS = {
    "tiny": TINY,
    "b": TINY.replace(split_expand=True, outer_activation="silu"),
    "large stem": TINY.replace(stem_kernel=7, residual_width=256),
    "dpn_tiny": VARIANTS["dpn_tiny"].replace(num_classes=5),
    "another pool": TINY.replace(global_pool="catavgmax"),
    "one channel": TINY.replace(in_channels=1, global_pool="max"),
}


def published(config: DPNConfig, folder: Path, **options: object) -> dpn_jax.DPN:
    """A randomized model, and what was written of it."""
    model = randomize(dpn_jax.DPN(config, rngs=None))
    settings = SETTINGS
    if config.in_channels == 1:
        settings = dataclasses.replace(SETTINGS, mean=(0.4,), std=(0.2,))
    model.provenance = Provenance("timm/dpn68b.ra_in1k@" + 40 * "0", "ab" * 32, settings, NAMES)
    save_pretrained(model, folder, **options)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_timm_and_we_read_it_back(name: str, tmp_path: Path, timm_models: ModuleType) -> None:
    import timm
    import torch

    model = published(CONFIGS[name], tmp_path / "mine")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True).eval()
    images = np.random.default_rng(0).normal(size=(2, 48, 64, CONFIGS[name].in_channels)).astype(np.float32)
    expected = np.asarray(nnx.jit(lambda model, images: model(images))(model, images))
    with torch.inference_mode():
        got = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
    assert tuple(theirs.pretrained_cfg["label_names"]) == NAMES
    data = timm.data.resolve_data_config(pretrained_cfg=theirs.pretrained_cfg)
    settings = model.provenance.preprocessing
    assert list(data["input_size"]) == [CONFIGS[name].in_channels, 48, 64]
    assert (tuple(data["mean"]), tuple(data["std"])) == (settings.mean, settings.std)
    assert (data["crop_pct"], data["interpolation"], data["crop_mode"]) == (0.9, "bilinear", "center")
    assert theirs.pretrained_cfg["first_conv"] == "features.conv1_1.conv"
    assert isinstance(theirs.get_submodule(theirs.pretrained_cfg["classifier"]), torch.nn.Conv2d)

    ours = dpn_jax.from_pretrained(tmp_path / "mine")
    assert ours.config == model.config
    assert ours.provenance[2:] == model.provenance[2:]
    for path, value in values(model).items():
        np.testing.assert_array_equal(values(ours)[path], value)


def test_there_and_back_through_timm(tmp_path: Path, timm_models: ModuleType) -> None:
    import timm

    model = published(CONFIGS["b"], tmp_path / "mine")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True)
    timm.models.save_for_hf(theirs, tmp_path / "theirs", safe_serialization=True)
    back = dpn_jax.from_pretrained(tmp_path / "theirs")
    assert (back.config, back.provenance[2:]) == (model.config, model.provenance[2:])
    again = dpn_jax.from_pretrained(save_pretrained(back, tmp_path / "again"))
    assert (again.config, again.provenance[2:]) == (model.config, model.provenance[2:])
    for path, value in values(model).items():
        np.testing.assert_array_equal(values(again)[path], value)


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - OWN_VARIANTS))
def test_a_variant_has_its_name_and_nothing_else(variant: str, tmp_path: Path) -> None:
    config = timm_config(VARIANTS[variant], Preprocessing())
    assert config["architecture"] == variant and "model_args" not in config and "label_names" not in config
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_timm_config(tmp_path / "config.json")
    assert read.variant == variant
    assert read.preprocessing == dataclasses.replace(Preprocessing(), image_size=(224, 224))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem_kernel": 5}, "stem_kernel and residual_width 3 and 64 or 7 and 256, got 5 and 64"),
        ({"output_stride": 8}, "no output_stride 8; the same weights work with 32"),
        ({"test_time_pool": 7}, "no test_time_pool 7; the same weights work with 0"),
        ({"depths": (1,) * 5, "dense_increments": (4,) * 5}, "at most 4 stages, got 5"),
    ],
)
def test_what_timm_cannot_build_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    model = randomize(dpn_jax.DPN(TINY.replace(**changes), rngs=None))
    with pytest.raises(ValueError, match=message):
        save_pretrained(model, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_changed_model_is_refused(tmp_path: Path) -> None:
    class Mine(DualPathBlock):
        pass

    with pytest.raises(ValueError, match=r"Mine.*dpn_jax\.save"):
        save_pretrained(dpn_jax.DPN(TINY, block=Mine, rngs=nnx.Rngs(0)), tmp_path / "mine")


def test_the_card_is_read_by_the_hub_and_kept_when_edited(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    folder = tmp_path / "mine"
    facts = CardFacts(data="Ants.", license="cc0-1.0", metrics={"top1": 91.25, "images": 300}, evaluated_on="val")
    published(TINY, folder, facts=facts)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name, card.data.base_model) == (
        "cc0-1.0",
        "timm",
        "timm/dpn68b.ra_in1k",
    )
    assert card.data.pipeline_tag == "image-classification" and "timm" in card.data.tags
    assert "# mine" in card.text and "| top-1 accuracy | 91.250% |" in card.text and "val, 300 images" in card.text
    assert "Ants." in card.text and "Not stated." in card.text
    (folder / "README.md").write_text("mine")
    with pytest.raises(
        CheckpointError, match=r"config\.json: exists already; choose another folder, or overwrite=True"
    ):
        published(TINY, folder)
    published(TINY, folder, overwrite=True)
    assert (folder / "README.md").read_text() == "mine"


def test_nothing_of_this_machine_is_told(tmp_path: Path) -> None:
    model = randomize(dpn_jax.DPN(TINY, rngs=None))
    model.provenance = Provenance(str(tmp_path / "secret-project" / "model.safetensors"), None, SETTINGS, NAMES)
    save_pretrained(model, tmp_path / "mine")
    for file in (tmp_path / "mine").iterdir():
        content = file.read_bytes()
        assert b"secret-project" not in content and str(tmp_path).encode() not in content
    assert dpn_jax.from_pretrained(tmp_path / "mine").provenance.source == "mine"
    assert model.provenance.source.endswith("model.safetensors"), "the model is not changed"


PUSH = """
import sys
import dpn_jax
model = dpn_jax.from_pretrained("local-dir:" + sys.argv[1])
push = lambda **options: print(dpn_jax.push_to_hub(model, "you/your-dpn", token="hf_test", **options))
push(private=True, facts=dpn_jax.CardFacts(data="Ants."))
push(commit_message="Again")
push(revision="next", commit_message="Elsewhere")
push(create_pr=True, commit_message="Please")
"""


@pytest.mark.slow
def test_the_real_client_pushes_and_pulls(tmp_path: Path) -> None:
    model = published(TINY, tmp_path / "mine")
    with Hub() as hub:
        variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        variables |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        variables |= {"no_proxy": "127.0.0.1,localhost", "JAX_PLATFORMS": "cpu"}

        def run(script: str, *words: str) -> str:
            command = [sys.executable, "-c", script, *words]
            ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
            assert ended.returncode == 0, ended.stderr
            return ended.stdout

        addresses = run(PUSH, str(tmp_path / "mine")).split()
        assert addresses[0].startswith(f"{hub.endpoint}/you/your-dpn/commit/")
        assert addresses[3] == f"{hub.endpoint}/you/your-dpn/discussions/1"
        ours, card = ("config.json", "model.safetensors"), hub.files("you/your-dpn", "main")["README.md"].decode()
        name = "you/your-dpn"
        assert hub.commits == [
            (name, "main", "Upload a model with dpn_jax", ("README.md", *ours), False, True),
            (name, "main", "Again", ours, False, True),
            (name, "next", "Elsewhere", ("README.md", *ours), False, True),
            (name, "main", "Please", ours, True, True),
        ]
        assert "Ants." in card and 'from_pretrained("you/your-dpn")' in card
        content = f"{hub.files(name, 'main')}"
        assert str(tmp_path) not in content and "hf_test" not in content
        script = "import sys, dpn_jax; dpn_jax.save(dpn_jax.from_pretrained('you/your-dpn'), sys.argv[1])"
        run(script, str(tmp_path / "back.safetensors"))
    back = dpn_jax.load(tmp_path / "back.safetensors")
    assert (back.config, back.provenance.class_names) == (model.config, NAMES)
    for path, value in values(model).items():
        np.testing.assert_array_equal(values(back)[path], value)


@pytest.mark.slow
def test_a_run_is_published_with_what_it_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optax")
    from dpn_jax.cli.main import main
    from dpn_jax.finetune import FinetuneConfig, finetune
    from tests.support.finetune_runs import write_images

    images = write_images(tmp_path / "secret-photos", count=12)
    config = FinetuneConfig(epochs=1, batch_size=6, image_size=32, workers=0, report=False)
    finetune(images, tmp_path / "run", config, source="dpn_tiny", progress=False)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "mine")]) == 0
    assert "dpn_tiny in timm's hub layout: README.md, config.json, model.safetensors" in capsys.readouterr().out
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "`dpn-jax finetune` from random weights: epochs 1, batch_size 6" in card and "top-1 accuracy" in card
    for file in (tmp_path / "mine").iterdir():
        assert b"secret-photos" not in file.read_bytes() and str(tmp_path).encode() not in file.read_bytes()
    run, mine = (dpn_jax.from_pretrained(tmp_path / name) for name in ("run", "mine"))
    assert mine.provenance.class_names == run.provenance.class_names
    assert mine.provenance.preprocessing == run.provenance.preprocessing
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "mine")]) == 2
    assert "config.json: exists already" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "mine"), "--force"]) == 0
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "other"), "--to", "flax"]) == 2
    assert "--to has no meaning for a folder" in capsys.readouterr().err
