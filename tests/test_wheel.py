"""What a user installs, rather than what lies in the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_an_installed_wheel_classifies_and_converts(tiny_timm_file: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, timeout=300)

    def run(*words: object) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=300
        ).stdout

    where = run("-c", "import dpn_jax; print(dpn_jax.__file__)")
    assert Path(where.strip()).parent == site / "dpn_jax"
    assert {path.name for path in (site / "dpn_jax").iterdir()} >= {
        "py.typed",
        "cli",
        "finetune",
    }
    assert (site / "dpn_jax" / "images" / "imagenet1k.txt").is_file()
    assert not (site / "tests").exists() and not (site / "convert").exists()

    command = site / "bin" / "dpn-jax"
    ours = tmp_path / "ours.safetensors"
    assert "flax layout" in run(command, "convert", tiny_timm_file, ours)
    photo = ROOT / "samples" / "cat.jpg"
    assert run(command, "classify", photo, "--weights", ours, "--top-k", 1).count("%") == 1
    assert "dpn92.mx_in1k" in run(command, "models")
    assert "on cpu, " in run(command, "export", "tiny.jaxexport", "--weights", ours, "--platforms", "cpu")
    words = run(command, "--help")
    assert all(name in words for name in ("classify", "evaluate", "finetune", "convert", "export", "models"))
