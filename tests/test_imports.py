"""The library stands alone: no torch, no timm, imports one way."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dpn_jax

PACKAGE = Path(dpn_jax.__file__).parent
MODULES = sorted(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Block())
"""
TORCH = ("torch", "timm", "torchvision")
EXTRAS = ("orbax", "grain", "array_record", "tensorboardX", "matplotlib", "etils", "gcsfs")

ORDER = [
    "config",
    "pretrained",
    "errors",
    "paths",
    "operations",
    "layers",
    "blocks",
    "model",
    "stock",
    "multihost",
    "checkpoint",
    "images",
    "fast",
    "inference",
    "evaluation",
    "explain",
    "finetune",
    "cli",
    "__main__",
]
"""The house from top to bottom, as in CONTRIBUTING's table: each imports only what stands before it."""


def run(script: str, blocked: tuple[str, ...]) -> None:
    script = BLOCK.format(blocked=blocked) + script
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=120)


def test_every_module_imports_without_torch_and_timm() -> None:
    run("import importlib\n" + "".join(f"importlib.import_module({name!r})\n" for name in MODULES), TORCH)


def test_only_finetuning_needs_the_extra() -> None:
    names = [name for name in MODULES if not name.startswith("dpn_jax.finetune")]
    script = "import importlib\n" + "".join(f"importlib.import_module({name!r})\n" for name in names)
    run(script + "import dpn_jax.finetune.config\n", TORCH + EXTRAS)


def test_importing_touches_no_network_library_and_no_device() -> None:
    script = (
        "import sys, dpn_jax.cli.main, jax\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "assert not jax._src.xla_bridge.backends_are_initialized()\n"
        "assert not jax.config.jax_compilation_cache_dir and not jax.config.jax_enable_x64\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=environment)


def imported(name: str) -> set[str]:
    """The modules of this package that a module imports, wherever in its text."""
    path = PACKAGE.parent.joinpath(*name.split(".")).with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dpn_jax":
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "dpn_jax"}
    return found - {"dpn_jax"}


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"dpn_jax.__init__"}))
def test_imports_run_one_way(name: str) -> None:
    place = ORDER.index(name.split(".")[1])
    backwards = {other for other in imported(name) if ORDER.index(other.split(".")[1]) > place}
    assert not backwards, f"{name} imports {sorted(backwards)}"


@pytest.mark.parametrize("package", [name for name in ORDER if (PACKAGE / name).is_dir()])
def test_no_circle_within_a_package(package: str) -> None:
    inside = {name for name in MODULES if name.startswith(f"dpn_jax.{package}.") and not name.endswith("__init__")}
    graph = {name: imported(name) & inside for name in inside}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("name", ["config", "operations", "layers", "blocks", "model"])
def test_the_readable_model_names_no_backend(name: str) -> None:
    words = "backend|compiler|xla|llvm|eigen|cpu|gpu|tpu|cuda|rocm"
    text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    found = re.findall(rf"^.*(?<![a-z])(?:{words})s?(?![a-z]).*$", text, re.IGNORECASE | re.MULTILINE)
    assert not found


def test_modules_are_short() -> None:
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in PACKAGE.rglob("*.py")}
    assert not {str(path): count for path, count in lines.items() if count > 330}


def test_public_names_are_there() -> None:
    names = "list_models list_pretrained create_model from_pretrained preprocessing save load Classifier DPN DPNConfig"
    for name in names.split():
        assert callable(getattr(dpn_jax, name))
    assert (PACKAGE / "py.typed").is_file()
