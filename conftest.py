"""Settings and fixtures of all tests, the examples in `dpn_jax/` among them. Imports neither torch nor timm."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

if TYPE_CHECKING:
    import torch

collect_ignore = ["tests/support"]  # no tests or examples; some of it needs torch

jax.config.update("jax_numpy_dtype_promotion", "strict")

# torch's threads spin while they wait: those of several workers on the same cores take twice the time. Set before torch
# is imported, which reads it only then, and for the processes that a test starts.
os.environ["OMP_NUM_THREADS"] = str(
    max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
)

# a shell ignores Ctrl-C for what it runs in the background, and the processes that a test starts would inherit that
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Tests run in parallel where pytest-xdist is installed: `-n auto` is the default, `-n 0` turns it off."""
    if getattr(config.option, "numprocesses", 0) is None and not (config.option.tx or hasattr(config, "workerinput")):
        config.option.numprocesses, config.option.maxprocesses = "auto", config.option.maxprocesses or 4
        by_file = "docs" in config.args  # blocks of a page share their names
        default = "loadfile" if by_file else "worksteal"
        config.option.dist = default if config.option.dist == "no" else config.option.dist


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test runs is compiled in half the time, for slower code; in full where it is marked `optimized`."""
    hurry = item.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", hurry)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(hurry))  # for the processes that a test starts


_SLOW_EXAMPLES = {"train_step", "fast_apply", "fast_forward", "export_model", "Classifier"}  # they compile networks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow what cannot be marked where it is.

    Examples, all tests of the finished run of `finetune/test_run`, and what runs in a step of its own.
    """
    for item in items:
        example = isinstance(item, pytest.DoctestItem) and item.name.rpartition(".")[2] in _SLOW_EXAMPLES
        apart = any(item.get_closest_marker(name) for name in ("browser", "docs", "exhaustive", "notebook", "ray"))
        if example or apart or "finished" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What JAX compiles is kept in this folder, for all workers and the processes that tests start."""
    base = tmp_path_factory.getbasetemp()
    folder = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "xla")
    for name, value in (("jax_compilation_cache_dir", folder), ("jax_persistent_cache_min_compile_time_secs", 0.0)):
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    compilation_cache.reset_cache()  # what was compiled on import has settled that there is none
    yield folder


@pytest.fixture(autouse=True)
def forget_compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """No program of a slow test stays in memory: hundreds of networks run into the limit of memory maps and abort."""
    yield
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()


@pytest.fixture(scope="session")
def timm_models() -> ModuleType:
    """`tests.support.timm_models`; a test that needs it is skipped where torch or timm is not installed."""
    return pytest.importorskip("tests.support.timm_models")


@pytest.fixture(scope="session")
def timm(timm_models: ModuleType) -> ModuleType:
    """The reference implementation."""
    return timm_models.timm


@pytest.fixture(scope="session")
def tiny_timm(timm_models: ModuleType, timm: ModuleType) -> "torch.nn.Module":
    """A small DPN of timm's with random weights and statistics; do not change it."""
    return timm_models.timm_dpn(timm)


@pytest.fixture(scope="session")
def tiny_timm_file(
    timm_models: ModuleType, tiny_timm: "torch.nn.Module", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its weights as timm publishes them; do not change the file."""
    return timm_models.save_timm(tiny_timm, tmp_path_factory.mktemp("timm") / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DPN's random weights in timm's layout, made without torch; do not change the file."""
    from tests.support import models  # not before JAX is configured, above

    return models.save_timms_layout(models.TINY, tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(scope="session")
def dpn92_file(timm_models: ModuleType, timm: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's untrained DPN-92; do not change the file."""
    return timm_models.save_timm(timm.create_model("dpn92"), tmp_path_factory.mktemp("dpn92") / "dpn92.safetensors")
