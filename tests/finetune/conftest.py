"""What runs of several modules start from."""

from pathlib import Path

import pytest

from tests.support.finetune_runs import write_images, write_weights


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of a few colors, a folder for each."""
    return write_images(tmp_path_factory.mktemp("images") / "colors")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network's."""
    return write_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors")
