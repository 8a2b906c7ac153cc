"""Every benchmark runs, at a tiny size, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def run(module: str, *options: str, json_file: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, *options, *(["--json", str(json_file)] if json_file else [])]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.usefixtures("timm_models")
@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("benchmarks.cpu", ("--batches", "1", "--training-batches", "2", "--skip-compile")),
        pytest.param(
            "benchmarks.gpu",
            ("--batches", "2", "--device", "cpu", "--probe", "64", "--compile-modes"),
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_both_sides_are_timed_in_both_tasks(module: str, options: tuple[str, ...], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run(module, "--models", "dpn_tiny", "--size", "32", "--rounds", "1", *options, json_file=report)
    assert done.returncode == 0, done.stderr
    assert f"$ python -m {module}" in done.stdout and "jax 0." in done.stdout
    figures = json.loads(report.read_text())
    assert {row["task"] for row in figures["rows"]} == {"inference", "training"}
    assert {row["contender"].split()[0] for row in figures["rows"]} == {"dpn_jax", "timm"}
    for row in figures["rows"]:
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["median_ms"])


@pytest.mark.usefixtures("timm_models")
def test_a_missing_card_is_one_line() -> None:
    done = run("benchmarks.gpu")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no cuda" in done.stderr


@pytest.mark.exhaustive
@pytest.mark.usefixtures("timm_models")
def test_parity_prints_its_table() -> None:
    pytest.importorskip("tests.support.photos")
    done = run("benchmarks.parity", "--models", "dpn48b", "--photos", "1")
    assert done.returncode == 0, done.stderr
    assert "| dpn48b |" in done.stdout


@pytest.mark.exhaustive
def test_reading_is_held_against_memory(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("--model", "dpn_tiny", "--size", "32", "--batch-size", "4", "--steps", "1", "--rounds", "1")
    done = run("benchmarks.input", *options, "--workers", "0", json_file=report)
    assert done.returncode == 0, done.stderr
    figures = json.loads(report.read_text())
    rates = figures["images_per_second"]
    assert figures["ratio"] == pytest.approx(rates["files"] / rates["memory"])
    assert "ratio" in done.stdout
    assert figures["reading"]["ratio"] == pytest.approx(figures["reading"]["packed"] / figures["reading"]["decoded"])
    assert figures["reading"]["ratio"] > 10, "packed crops are read ten times as fast as photos are decoded"


@pytest.mark.exhaustive
@pytest.mark.usefixtures("timm_models")
def test_the_host_is_held_against_the_model(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("--size", "32", "--photos", "16", "--batch-size", "4", "--rounds", "1")
    done = run("benchmarks.classify", *options, json_file=report)
    assert done.returncode == 0, done.stderr
    figures = json.loads(report.read_text())
    rates = figures["images_per_second"]
    assert set(rates) > {"model", "torch's DataLoader"} and all(rate > 0 for rate in rates.values())
    assert figures["by torch"] == pytest.approx(rates["decoding, processes"] / rates["torch's DataLoader"])


@pytest.mark.exhaustive
def test_rounding_is_held_against_float32(tmp_path: Path) -> None:
    pytest.importorskip("tests.support.photos")
    report = tmp_path / "report.json"
    done = run("benchmarks.precision", "--models", "dpn48b", "--photos", "1", "--size", "64", json_file=report)
    assert done.returncode == 0, done.stderr
    rows = {row["arithmetic"]: row for row in json.loads(report.read_text())["rows"]}
    assert len(rows) == 4
    assert all(1e-6 < row["error"] < 0.2 and row["cosine"] < 1 for row in rows.values())
