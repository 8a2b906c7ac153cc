"""Fixtures that several test modules share."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import pytest
import torch

from convert.timm_import import import_timm
from tests.checkpoints import save_timm, timm_dpn


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled() -> Iterator[None]:
    """Hundreds of compiled programs in one process run into the system's limit of memory maps, which ends it."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """The reference implementation."""
    return import_timm()


@pytest.fixture(scope="session")
def tiny_timm(timm: ModuleType) -> torch.nn.Module:
    """A small DPN of timm's with random weights and statistics; do not change it."""
    return timm_dpn(timm)


@pytest.fixture(scope="session")
def tiny_timm_file(tiny_timm: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights as timm publishes them; do not change the file."""
    return save_timm(tiny_timm, tmp_path_factory.mktemp("timm") / "tiny.safetensors")
