"""`dpn-jax evaluate` counts what timm's `validate.py` counts: the same files, the same weights, timm's own loop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tests.support.timm_models")
pytest.importorskip("tests.support.photos")
import torch

from dpn_jax.images.folders import natural_key
from tests.support.photos import PHOTOS
from tests.support.timm_models import save_timm, timm, timm_dpn

CLASSES, SIZE = 10, 64
ON_DEVICES = """
import sys
from dpn_jax.cli.main import main
sys.exit(max(main([*sys.argv[1:], "--devices", count]) for count in "138"))
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """203 crops of real photos, in folders named by class index."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(203):
        with Image.open(PHOTOS[number % len(PHOTOS)]) as photo:
            side = int(min(photo.size) * rng.uniform(0.3, 0.9))
            x, y = (int(rng.integers(0, length - side)) for length in photo.size)
            crop = photo.convert("RGB").crop((x, y, x + side, y + side)).resize((90, 80))
        folder = root / str(rng.integers(CLASSES))
        folder.mkdir(exist_ok=True)
        crop.save(folder / f"{number}.jpg", quality=90)
    return root


def timms_counts(model: torch.nn.Module, photos: Path) -> list[int]:
    """The loop of timm's `validate.py`, with its data set, its loader, its meters."""
    names = sorted((folder.name for folder in photos.iterdir()), key=natural_key)
    data_set = timm.data.create_dataset("", root=str(photos), class_map={name: int(name) for name in names})
    config = timm.data.resolve_data_config({"input_size": (3, SIZE, SIZE), "crop_pct": 0.875}, verbose=False)
    loader = timm.data.create_loader(
        data_set, batch_size=20, use_prefetcher=False, num_workers=0, device=torch.device("cpu"), **config
    )
    meters = [timm.utils.AverageMeter() for _ in range(2)]
    with torch.inference_mode():
        for images, target in loader:
            for meter, value in zip(meters, timm.utils.accuracy(model(images), target, topk=(1, 5)), strict=True):
                meter.update(value.item(), images.size(0))
    assert meters[0].count == len(data_set) == 203
    return [round(meter.sum / 100) for meter in meters]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # timm's files
def test_counts_equal_timms_loop(photos: Path, tmp_path: Path) -> None:
    model = timm_dpn(timm, num_classes=CLASSES)
    weights = save_timm(model, tmp_path / "timm.safetensors")
    expected = timms_counts(model, photos)
    assert 0 < expected[0] < expected[1] < 203
    words = ["evaluate", photos, "--weights", weights, "--image-size", SIZE, "--batch-size", 20, "--format", "json"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = [sys.executable, "-c", ON_DEVICES, *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stderr
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [[round(row[name] * 203 / 100) for name in ("top1", "top5")] for row in rows] == [expected] * 3
