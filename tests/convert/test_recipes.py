"""The recorded runs with timm and torch are the runs that they say they repeat."""

import json
from pathlib import Path

import pytest

pytest.importorskip("tests.support.timm_models")
pytest.importorskip("dpn_jax.finetune")

import numpy as np

from dpn_jax.finetune import FinetuneConfig, finetune, read_metrics
from recipes import timm_finetune
from tests.support.finetune_runs import write_images
from tests.support.models import TINY


@pytest.mark.slow
def test_timm_and_torch_repeat_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images", count=12)
    config = FinetuneConfig(epochs=3, batch_size=6, learning_rate=5e-3, image_size=32, workers=0, report=False)
    finetune(images, tmp_path / "run", config, source=TINY, progress=False)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"]["learning_rate"] == 5e-3
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    accuracies = timm_finetune.main(images, tmp_path / "run")
    losses = [float(line.split()[3].rstrip(",")) for line in capsys.readouterr().out.splitlines() if "loss" in line]
    steps = np.array([row["loss"] for row in rows if row["split"] == "train"]).reshape(3, -1)
    np.testing.assert_allclose(losses, steps.mean(axis=1), atol=2e-4)  # printed with four digits
    assert accuracies == [row["accuracy"] for row in rows if row["split"] == "val"]
    with pytest.raises(SystemExit, match="mixup"):
        record["config"]["mixup"] = 0.5
        (tmp_path / "run" / "config.json").write_text(json.dumps(record))
        timm_finetune.main(images, tmp_path / "run")
