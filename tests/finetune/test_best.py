"""The report on the best weights: right, written once, and the same whatever has interrupted the run."""

import csv
import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from flax import nnx

import dpn_jax
from dpn_jax.finetune import FinetuneConfig, Finetuned, TrainState, finetune
from dpn_jax.finetune import best as best_module
from dpn_jax.finetune import loop as loop_module
from tests.support.changed_models import SqueezeExciteAfter
from tests.support.finetune_runs import COLORS, contents
from tests.support.models import TINY

CONFIG = FinetuneConfig(epochs=2, batch_size=8, workers=0, optimizer="sgd", learning_rate=0.02, warmup_epochs=0)
FILES = {"report/confusion.csv", "report/predictions.csv", "report/report.html", "report/results.json"}


@pytest.fixture(scope="module")
def finished(images: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Finetuned:
    """Do not change it."""
    return finetune(images, tmp_path_factory.mktemp("runs") / "run", CONFIG, source=weights, progress=False)


@pytest.fixture
def copy(finished: Finetuned, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return shutil.copytree(finished.output, tmp_path / "copy")


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[dpn_jax.DPN]:
    """The models that are evaluated for a report."""
    seen: list[dpn_jax.DPN] = []

    def classifier(model: dpn_jax.DPN, **options: object) -> dpn_jax.Classifier:
        seen.append(model)
        return dpn_jax.Classifier(model, **options)

    monkeypatch.setattr(best_module, "Classifier", classifier)
    return seen


def interrupted(change: Callable[[], None], after: int) -> Callable[..., object]:
    step_once = loop_module.train_step

    def step(state: TrainState, batch: object) -> object:
        if int(state.step) == after:
            change()
        return step_once(state, batch)

    return step


def test_it_is_about_the_best_weights_and_the_validation_images(finished: Finetuned, images: Path) -> None:
    assert contents(finished.output).keys() >= FILES
    folder = finished.output / "report"
    results = json.loads((folder / "results.json").read_text())
    listed = json.loads((finished.output / "images.json").read_text())["val"]
    total = sum(map(len, listed.values()))
    assert (results["step"], results["images"], results["failed"]) == (finished.best["step"], total, 0)
    assert results["top1"] == pytest.approx(100 * finished.best["accuracy"], abs=1e-3)
    assert results["loss"] == pytest.approx(finished.best["loss"], rel=1e-3)
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows if row["label"] == "red"} == set(listed["red"]), "as images.json names them"
    best = dpn_jax.Classifier.from_pretrained(finished.weights)
    for row, found in zip(rows, best([images / row["file"] for row in rows], top_k=1), strict=True):
        assert (row["prediction"], f"{found[0].probability:.4f}") == (
            found[0].label,
            f"{float(row['probability']):.4f}",
        )
    with (folder / "confusion.csv").open(newline="") as file:
        confusion = list(csv.DictReader(file))
    assert [row["label"] for row in confusion] == list(COLORS)
    right = sum(int(row[row["label"]]) for row in confusion)
    assert right == round(finished.best["accuracy"] * total)


def test_it_is_written_once_and_again_for_other_weights(
    finished: Finetuned, copy: Path, evaluations: list[dpn_jax.DPN]
) -> None:
    finetune(None, copy, resume=True)
    assert evaluations == [] and contents(copy) == contents(finished.output)
    for damage in ("other step", "no page", "no JSON"):
        match damage:
            case "other step":
                results = json.loads((copy / "report" / "results.json").read_text())
                (copy / "report" / "results.json").write_text(json.dumps(results | {"step": 1}))
            case "no page":
                (copy / "report" / "report.html").unlink()
            case "no JSON":
                (copy / "report" / "results.json").write_text("{")
        finetune(None, copy, resume=True)
        assert len(evaluations) == 1, damage
        assert contents(copy) == contents(finished.output), damage
        evaluations.clear()


def test_an_interrupted_run_writes_the_same_bytes(
    finished: Finetuned, images: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    monkeypatch.setattr(loop_module, "train_step", interrupted(lambda: signal.raise_signal(signal.SIGTERM), 3))
    run = finetune(images, output, CONFIG, source=weights, progress=False)
    assert run.weights is None and not (output / "report").exists()
    monkeypatch.undo()

    def stopped(rows: object, interruption: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return until(rows, interruption)

    until, notes = best_module._until, []
    monkeypatch.setattr(best_module, "_until", stopped)
    run = finetune(None, output, resume=True, progress=False, note=notes.append)
    assert (run.signal, run.step, run.weights) == (signal.SIGINT, run.steps, output / "model.safetensors")
    assert not (output / "report").exists()
    assert f"stopped before {output / 'report'} was written; the weights are" in notes
    monkeypatch.undo()
    run = finetune(None, output, resume=True, progress=False)
    assert run.signal is None
    assert contents(output) == contents(finished.output)


@pytest.mark.slow
def test_without_it_and_with_it_afterwards(images: Path, tmp_path: Path, evaluations: list[dpn_jax.DPN]) -> None:
    """Of a changed model, in its plain form."""
    output, config = tmp_path / "run", dataclasses.replace(CONFIG, epochs=1, fast=False, report=False, image_size=32)

    def model() -> dpn_jax.DPN:
        changed = TINY.replace(depths=(1,), dense_increments=(4,), num_classes=3)
        return dpn_jax.create_model(changed, block=SqueezeExciteAfter, rngs=nnx.Rngs(0))

    finetune(images, output, config, model=model(), progress=False)
    assert not (output / "report").exists() and evaluations == []
    notes: list[str] = []
    finetune(None, output, dataclasses.replace(config, report=True), model=model(), resume=True, note=notes.append)
    assert contents(output).keys() >= FILES and len(evaluations) == 1
    assert f"{output / 'report' / 'report.html'}: the validation images with these weights" in notes
