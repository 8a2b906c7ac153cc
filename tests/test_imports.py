"""The library stands alone: no torch, no timm, imports one way."""

import ast
import os
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
EXTRAS = ("orbax", "grain", "tensorboardX", "matplotlib", "etils")

LAYERS = [
    {"config"},
    {"layers", "model", "fast", "checkpoint", "images", "inference", "finetune"},
    {"cli"},
    {"__main__"},
]


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


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name: str) -> None:
    if name == "dpn_jax.__init__":
        return
    layer = name.split(".")[1]  # a sub-package is one layer
    level = next(level for level, names in enumerate(LAYERS) if layer in names)
    inside = {layer} if (PACKAGE / layer).is_dir() else set()
    allowed = set.union(inside, *LAYERS[:level])
    path = PACKAGE.parent.joinpath(*name.split(".")).with_suffix(".py")
    imported = {
        node.module.split(".")[1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dpn_jax.")
    }
    assert imported <= allowed, f"{name} imports {sorted(imported - allowed)}"


def test_public_names_are_there() -> None:
    names = "list_models list_pretrained create_model from_pretrained preprocessing save load Classifier DPN DPNConfig"
    for name in names.split():
        assert callable(getattr(dpn_jax, name))
    assert (PACKAGE / "py.typed").is_file()
