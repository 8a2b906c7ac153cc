"""The scripts in `convert/`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tests.support.timm_models")
import torch

import dpn_jax
from convert import flax_to_timm, timm_to_flax, verify
from convert.command import run
from convert.timm_import import create_timm_model
from dpn_jax.checkpoint import names as weights
from tests.support.models import TINY


def test_there_and_back_through_pth(tiny_timm_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.pth"
    assert run(timm_to_flax.main, [str(tiny_timm_file), str(ours)]) == 0
    assert run(flax_to_timm.main, [str(ours), str(theirs)]) == 0
    loaded = torch.load(theirs, weights_only=True)
    again = dpn_jax.load(tiny_timm_file)
    np.testing.assert_array_equal(
        loaded["features.conv1_1.conv.weight"].permute(2, 3, 1, 0).numpy(), again.stem.conv.kernel[...]
    )
    assert run(flax_to_timm.main, [str(ours), str(theirs)]) == 2
    assert "exists already" in capfd.readouterr().err


def test_weights_that_timm_makes_keep_their_preprocessing(tmp_path: Path) -> None:
    ours = tmp_path / "dpn68b.safetensors"
    assert run(timm_to_flax.main, ["timm:dpn68b.ra_in1k", str(ours), "--untrained"]) == 0
    provenance = dpn_jax.load(ours).provenance
    assert provenance.source == "timm:dpn68b.ra_in1k"
    assert provenance.preprocessing == dpn_jax.preprocessing("dpn68b.ra_in1k").preprocessing


def test_verify_agrees(tiny_timm_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(verify.main, [str(tiny_timm_file), "--size", "64"]) == 0
    out, err = capfd.readouterr()
    assert "equal to timm" in out and not err
    assert out.count("stage 1") == 2


def test_verify_takes_our_files_and_photos(tiny_timm_file: Path, tmp_path: Path) -> None:
    from tests.support.photos import PHOTOS

    ours = tmp_path / "ours.safetensors"
    assert run(timm_to_flax.main, [str(tiny_timm_file), str(ours)]) == 0
    assert run(verify.main, [str(ours), *map(str, PHOTOS[:2]), "--size", "64"]) == 0


def test_verify_notices_a_wrong_port(
    tiny_timm_file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = weights.to_flax

    def flipped(entry: weights.Entry, array: np.ndarray) -> np.ndarray:
        kernel = right(entry, array)
        return kernel[::-1] if "grouped" in entry.flax and entry.is_kernel else kernel

    monkeypatch.setattr("dpn_jax.checkpoint.open.to_flax", flipped)
    monkeypatch.setattr(verify, "convert", _copy_instead)
    assert run(verify.main, [str(tiny_timm_file), "--size", "64"]) == 1
    assert "NOT EQUAL to timm" in capfd.readouterr().out


def _copy_instead(source: str, destination: Path, **_: object) -> None:
    destination.write_bytes(Path(source).read_bytes())


def test_help_names_the_command_and_no_path() -> None:
    command = [sys.executable, "-m", "convert.verify", "--help"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.startswith("usage: python -m convert.verify ")


def test_a_missing_checkpoint_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(verify.main, ["no-such-file.safetensors"]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_timm_cannot_express_every_config() -> None:
    with pytest.raises(ValueError, match="64 residual channels"):
        create_timm_model(TINY.replace(residual_width=16))
    with pytest.raises(ValueError, match="output stride of 32 only, got output_stride=8"):
        create_timm_model(TINY.replace(output_stride=8))
