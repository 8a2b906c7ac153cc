"""`finetune` from a folder to a file of weights, in this process; what kills it is in `test_faults`."""

import dataclasses
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx
from PIL import Image

import dpn_jax
from dpn_jax import multihost
from dpn_jax.finetune import (
    Checkpoints,
    DataError,
    FinetuneConfig,
    Finetuned,
    RunError,
    finetune,
    initial_model,
    read_metrics,
)
from dpn_jax.finetune import loop as loop_module
from dpn_jax.finetune.metrics import quality
from dpn_jax.finetune.report import METRICS, Log
from tests.support.finetune_runs import COLORS, contents
from tests.support.models import TINY

CONFIG = FinetuneConfig(
    epochs=3,
    batch_size=8,
    workers=0,
    optimizer="sgd",
    learning_rate=0.05,
    warmup_epochs=0,
    ema_decay=0.8,
    keep=1,
    report=False,
)


@pytest.fixture(scope="module", autouse=True)
def a_line_an_epoch() -> Iterator[None]:
    """So that a run can be stopped between two lines of its log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "_LOGS_PER_EPOCH", 1)
        yield


@pytest.fixture(scope="module")
def finished(images: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Finetuned:
    """A run of 3 epochs of 3 steps; do not change it."""
    return finetune(images, tmp_path_factory.mktemp("runs") / "finished", CONFIG, source=weights)


@pytest.fixture
def copy(finished: Finetuned, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return shutil.copytree(finished.output, tmp_path / "copy")


def test_a_run_learns_and_writes_its_files(finished: Finetuned) -> None:
    assert (finished.step, finished.steps) == (9, 9)
    names = {path.name for path in finished.output.iterdir() if not path.name.startswith(".")}
    about = {"config.json", "images.json"}
    assert names == about | {"checkpoints", "metrics.jsonl", "tensorboard", "model.safetensors", "curves.png"}
    with Image.open(finished.output / "curves.png") as curves:
        assert curves.size[0] > 600
    assert list((finished.output / "tensorboard").glob("events.out.tfevents.*"))
    losses = [row["loss"] for row in read_metrics(finished.output / METRICS) if row["split"] == "train"]
    assert losses[-1] < losses[0]


def test_metrics_have_a_line_for_each_log_and_validation(finished: Finetuned) -> None:
    rows = read_metrics(finished.output / METRICS)
    assert [(row["split"], row["step"]) for row in rows] == [
        (split, step) for step in (3, 6, 9) for split in ("train", "val")
    ]
    assert rows[2]["epoch"] == 2.0
    assert rows[2]["learning_rate"] == pytest.approx(0.05 * (1 + np.cos(np.pi * 5 / 9)) / 2)  # of step 6
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert finished.best == max((row for row in rows if row["split"] == "val"), key=quality)


def test_the_record_has_everything_the_run_depends_on(finished: Finetuned) -> None:
    record = json.loads((finished.output / "config.json").read_text())
    assert record["config"]["learning_rate"] == 0.05
    assert record["class_names"] == list(COLORS)
    assert record["source"] == "tiny.safetensors"
    assert record["start"]["source"].endswith("/tiny.safetensors")
    images = json.loads((finished.output / "images.json").read_text())
    assert [[len(files) for files in images[split].values()] for split in ("train", "val")] == [[8] * 3, [2] * 3]
    assert record["versions"].keys() >= {"dpn-jax", "jax", "optax"}


def test_the_weights_name_the_users_classes(finished: Finetuned, images: Path) -> None:
    classifier = dpn_jax.Classifier.from_pretrained(finished.weights)
    assert classifier.labels == COLORS
    assert classifier.transform.preprocessing.image_size == 32
    (best,) = classifier(images / "red" / "0.png", top_k=1)
    assert best.label in COLORS


def test_a_finished_run_is_a_model(finished: Finetuned) -> None:
    ours, file = dpn_jax.from_pretrained(finished.output), dpn_jax.load(finished.weights)
    assert ours.provenance == file.provenance
    assert np.array_equal(ours.classifier.kernel.get_value(), file.classifier.kernel.get_value())


def test_the_weights_are_the_moving_average(finished: Finetuned) -> None:
    model, values = dpn_jax.load(finished.weights), checkpoint_values(finished.output, finished.best["step"])
    for part, name in ((model.classifier.kernel, "0/classifier/kernel"), (model.norm.var, "1/norm/var")):
        assert np.array_equal(part.get_value(), values[f"ema/{name}"])
    assert not np.array_equal(model.classifier.kernel.get_value(), values["params/classifier/kernel"])


def test_the_newest_checkpoint_and_the_best_one_are_there(finished: Finetuned) -> None:
    steps = {int(path.name) for path in (finished.output / "checkpoints").iterdir()}
    assert steps >= {finished.best["step"], 9}
    assert len(steps) == 2  # with keep=1: the last one, and the best when it was written


def test_resuming_what_is_finished_changes_nothing(
    finished: Finetuned, copy: Path, images: Path, weights: Path
) -> None:
    for given in ({}, {"source": weights}):
        again = finetune(images if given else None, copy, resume=True, **given)
        assert contents(copy) == contents(finished.output)
        assert again.best == finished.best


def test_a_finished_run_is_extended(finished: Finetuned, copy: Path) -> None:
    notes: list[str] = []
    longer = finetune(None, copy, dataclasses.replace(CONFIG, epochs=4), resume=True, note=notes.append)
    assert (longer.step, longer.steps) == (12, 12)
    assert "epochs was 3 and is 4 from here" in notes
    rate = 0.05 * (1 + np.cos(np.pi * 9 / 12)) / 2
    assert f"the learning rate follows the schedule of 4 epochs: it is {rate:.3g} here" in notes
    rows = read_metrics(copy / METRICS)
    assert rows[: len(rows) - 2] == read_metrics(finished.output / METRICS)
    again = finetune(None, copy, resume=True)
    assert (again.step, again.steps) == (12, 12), "the run now has 4 epochs"
    with pytest.raises(RunError, match="4 epochs are done already; --epochs must be at least 4"):
        finetune(None, copy, CONFIG, resume=True)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    finished: Finetuned, copy: Path, images: Path, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = min(int(path.name) for path in (copy / "checkpoints").iterdir())
    assert before < 9
    damage(copy / "checkpoints" / "9")
    notes: list[str] = []
    finetune(images, copy, CONFIG, source=weights, resume=True, note=notes.append)
    assert "9: the checkpoint" in caplog.text
    assert "trying the one before" in caplog.text
    assert f"resuming from step {before}" in notes
    assert contents(copy) == contents(finished.output)
    assert (copy / "checkpoints" / "damaged-9").is_dir()


def damage(checkpoint: Path) -> None:
    """Changes one bit of each file of values."""
    for path in (checkpoint / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def test_no_run_is_overwritten(finished: Finetuned, images: Path, weights: Path) -> None:
    with pytest.raises(RunError, match=r"finished: already exists; continue it with --resume"):
        finetune(images, finished.output, CONFIG, source=weights)


def test_only_a_run_is_resumed(images: Path, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run to resume"):
        finetune(images, tmp_path / "none", CONFIG, source=weights, resume=True)
    assert not (tmp_path / "none").exists()


def test_a_run_is_resumed_with_the_same_options_only(finished: Finetuned, weights: Path) -> None:
    other = dataclasses.replace(CONFIG, learning_rate=0.1, batch_size=4)
    with pytest.raises(RunError, match=r"other options: batch_size was 8, now 4; learning_rate was 0.05, now 0.1"):
        finetune(None, finished.output, other, resume=True)
    with pytest.raises(RunError, match=r'other options: source was ".*tiny.safetensors", now "dpn68b"'):
        finetune(None, finished.output, source="dpn68b", resume=True)


def test_a_new_run_must_say_what_it_starts_from(images: Path, weights: Path, tmp_path: Path) -> None:
    for folder, source in ((images, None), (None, weights)):
        with pytest.raises(ValueError, match="a new run needs a folder of images and a source"):
            finetune(folder, tmp_path / "run", source=source)


def test_a_bucket_is_refused_before_anything_is_made(
    images: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("s3://bucket/run", "gs://bucket/run"):
        with pytest.raises(RunError, match=f"{url}: a URL; only local"):
            finetune(images, url, source=weights)
    with pytest.raises(DataError, match="s3://bucket/photos: a URL; only local files and gs:// can be read"):
        finetune("s3://bucket/photos", "run", source=weights)
    assert list(tmp_path.iterdir()) == []


def test_new_images_are_told_and_do_not_change_a_resumed_run(
    finished: Finetuned, copy: Path, images: Path, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(images, tmp_path / "changed"))
    shutil.copy(changed / "red" / "0.png", changed / "red" / "new.png")
    shutil.rmtree(copy / "checkpoints" / "9")
    notes: list[str] = []
    finetune(changed, copy, resume=True, note=notes.append)
    assert f"one image more than the run has, such as {changed / 'red' / 'new.png'}: not used" in notes
    assert contents(copy) == contents(finished.output)


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_exported(
    images: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([(0.2, 1.0), (0.9, 1.0), (0.9, 0.5), None, (0.9, 0.6), (0.5, 0.1)])

    def scripted(*_: object, **__: object) -> dict[str, float] | None:
        score = next(scores)  # None: interrupted
        return score and {"loss": score[1], "accuracy": score[0], "accuracy5": 1.0}

    monkeypatch.setattr(loop_module, "validate", scripted)
    config = dataclasses.replace(CONFIG, epochs=5, batch_size=24, ema_decay=None, keep=1)
    notes: list[str] = []
    run = finetune(images, tmp_path / "run", config, source=weights)
    assert (run.weights, run.step) == (None, 4)
    run = finetune(images, tmp_path / "run", config, source=weights, resume=True, note=notes.append)
    assert run.best["step"] == 3
    assert sorted(path.name for path in (run.output / "checkpoints").iterdir()) == ["3", "5"]
    assert any("the weights after step 3" in note for note in notes)
    kernel = dpn_jax.load(run.weights).classifier.kernel.get_value()
    best, last = (checkpoint_values(run.output, step) for step in (3, 5))
    assert np.array_equal(best["params/classifier/kernel"], kernel)
    assert not np.array_equal(last["params/classifier/kernel"], kernel)


def checkpoint_values(output: Path, step: int) -> dict[str, np.ndarray]:
    return orbax.checkpoint.PyTreeCheckpointer().restore(output / "checkpoints" / str(step) / "state")


@pytest.mark.slow
def test_a_signal_stops_where_it_can_be_resumed(
    finished: Finetuned, images: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    step_once = loop_module.train_step

    def signaled(state: object, batch: object) -> object:
        if int(state.step) == 3:  # in the second epoch, in the middle of nothing
            signal.raise_signal(signal.SIGTERM)
        return step_once(state, batch)

    monkeypatch.setattr(loop_module, "train_step", signaled)
    run = finetune(images, output, CONFIG, source=weights)
    assert (run.weights, run.step, run.signal) == (None, 4, signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    validate = loop_module.validate

    def interrupted(*arguments: object, **options: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return validate(*arguments, **options)

    monkeypatch.setattr(loop_module, "validate", interrupted)
    run = finetune(images, output, CONFIG, source=weights, resume=True)
    assert (run.weights, run.step, run.signal) == (None, 6, signal.SIGINT)
    monkeypatch.undo()
    finetune(images, output, CONFIG, source=weights, resume=True)
    assert contents(output) == contents(finished.output)


@pytest.mark.slow
def test_broken_images_are_found_first_or_done_without(images: Path, weights: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(images, tmp_path / "changed"))
    (changed / "red" / "3.png").write_bytes(b"no image")
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=4)
    with pytest.raises(DataError, match=r"1 of 30 images cannot be read, such as .*red/3.png.*--skip-broken"):
        finetune(changed, tmp_path / "run", config, source=weights)
    assert not (tmp_path / "run").exists()
    notes: list[str] = []
    config = dataclasses.replace(config, skip_broken=True)
    run = finetune(changed, tmp_path / "run", config, source=weights, note=notes.append)
    assert any(note.startswith("1 images cannot be read") for note in notes)
    assert json.loads((run.output / "images.json").read_text())["broken"].keys() == {"red/3.png"}
    (changed / "red" / "3.png").write_bytes((changed / "red" / "4.png").read_bytes())  # repaired: still not used
    finetune(None, run.output, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("follow", ["repair", "remove", "skip"])
def test_what_the_message_about_a_broken_image_advises_works(
    images: Path, weights: Path, tmp_path: Path, follow: str
) -> None:
    changed = Path(shutil.copytree(images, tmp_path / "changed"))
    config = dataclasses.replace(CONFIG, epochs=2, skip_check=True)
    broken, whole = changed / "red" / "3.png", (changed / "red" / "3.png").read_bytes()
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"red/3.png: .*repair or remove it and continue with --resume, or .*--skip-b"):
        finetune(changed, tmp_path / "run", config, source=weights)
    match follow:
        case "repair":
            broken.write_bytes(whole)
        case "remove":
            broken.unlink()
        case "skip":
            config = dataclasses.replace(config, skip_broken=True)
    notes: list[str] = []
    run = finetune(None, tmp_path / "run", config, resume=True, note=notes.append)
    assert run.step == run.steps == 6
    assert any("one training image fewer" in note for note in notes) == (follow == "remove")


@pytest.mark.parametrize("what", ["run.opened", "loop.Checkpoints", "loop.Log", "report.Log.write", "run.plot_curves"])
def test_every_process_hears_that_the_first_has_failed(copy: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Or the others would wait for it forever."""
    told: list[object] = []

    def broadcast(value: object, *, source: int = 0) -> object:
        told.append(value)
        return value

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multihost, "broadcast", broadcast)
    monkeypatch.setattr(f"dpn_jax.finetune.{what}", fail)
    with pytest.raises((RunError, OSError), match="No space left on device"):
        finetune(None, copy, resume=True, progress=False)
    assert told[-1] == {"error": "[Errno 28] No space left on device"}


def test_initial_model_keeps_the_classifier_of_the_same_classes_only(finished: Finetuned, weights: Path) -> None:
    notes: list[str] = []
    kept = initial_model(finished.weights, CONFIG, COLORS, note=notes.append)
    other = initial_model(finished.weights, CONFIG, ("a", "b", "c"), note=notes.append)
    saved = dpn_jax.load(finished.weights).classifier.kernel.get_value()
    assert np.array_equal(kept.classifier.kernel.get_value(), saved)
    assert not np.array_equal(other.classifier.kernel.get_value(), saved)
    assert other.provenance.class_names == ("a", "b", "c")
    assert "kept" in notes[0] and "new classifier for 3 classes" in notes[1]


@pytest.mark.slow
def test_initial_model_has_random_weights_for_an_architecture_and_says_so() -> None:
    notes: list[str] = []
    config = dataclasses.replace(CONFIG, seed=3, image_size=48)
    model = initial_model(TINY, config, ("a", "b"), note=notes.append)
    again = dpn_jax.create_model(TINY, num_classes=2, rngs=nnx.Rngs(3))
    for ours, theirs in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again)), strict=True):
        assert np.array_equal(ours, theirs)
    assert "random weights" in notes[0]
    assert model.provenance.preprocessing.image_size == 48


@pytest.mark.slow
def test_training_ends_when_nothing_gets_better(images: Path, weights: Path, tmp_path: Path) -> None:
    """Nothing is learned, so the first epoch stays the best; callbacks see each line of the log."""
    still = FinetuneConfig(
        epochs=9,
        batch_size=6,
        workers=0,
        learning_rate=1e-30,
        freeze="backbone",
        patience=2,
        metric="loss",
        report=False,
    )
    notes: list[str] = []
    rows: list[dict] = []
    run = finetune(images, tmp_path / "run", still, source=weights, note=notes.append, callbacks=[rows.append])
    validations = [row for row in rows if row["split"] == "val"]
    assert [row["epoch"] for row in validations] == [1, 2, 3] and run.best == validations[0]
    assert rows == read_metrics(tmp_path / "run" / METRICS)
    assert "no better validation for 2 epochs: training ends (patience 2)" in notes
    assert run.weights is not None and run.step == 3 * run.steps / 9
    again = finetune(images, tmp_path / "run", resume=True, callbacks=[rows.append])
    assert (again.weights, again.step, again.best) == (run.weights, run.step, run.best)

    def impatient(row: dict) -> None:
        if row["split"] == "val":
            raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        finetune(images, tmp_path / "other", still, source=weights, callbacks=[impatient])
    assert finetune(images, tmp_path / "other", resume=True).best["epoch"] == 1


def test_the_metric_decides_what_is_best() -> None:
    exact, sure = {"accuracy": 0.9, "loss": 0.5}, {"accuracy": 0.8, "loss": 0.4}
    assert quality(exact) > quality(sure) and quality(exact, "loss") < quality(sure, "loss")
    with pytest.raises(ValueError, match=r"metric must be one of \('accuracy', 'loss'\), got 'f1'"):
        FinetuneConfig(metric="f1")
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        FinetuneConfig(patience=0)


def test_log_is_cut_back_to_where_a_run_resumes(tmp_path: Path) -> None:
    log = Log(tmp_path, step=0)
    for step in range(1, 5):
        log.write({"split": "train", "step": step, "loss": 1 / 3})
        log.write({"split": "val", "step": step, "loss": 0.1})
    log.close()
    whole = (tmp_path / METRICS).read_bytes()
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b'{"split": "train", "st')
    log = Log(tmp_path, step=3)
    rows = [(row["split"], row["step"]) for row in read_metrics(tmp_path / METRICS)]
    assert rows == [("train", 1), ("val", 1), ("train", 2), ("val", 2), ("train", 3)]
    log.write({"split": "val", "step": 3, "loss": 0.1})
    log.write({"split": "train", "step": 4, "loss": 1 / 3})
    log.write({"split": "val", "step": 4, "loss": 0.1})
    log.close()
    assert (tmp_path / METRICS).read_bytes() == whole


def test_checkpoints_keep_the_newest_and_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(6):
        checkpoints.save(step, {"w": np.full(4, step, np.float32)}, {"step": step}, best=1 if step > 1 else None)
    assert checkpoints.steps() == [1, 4, 5]
    saved = checkpoints.newest({"w": np.zeros(4, np.float32)})
    assert (saved.step, saved.notes, saved.state["w"].tolist()) == (5, {"step": 5}, [5, 5, 5, 5])


@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_every_damaged_file_of_a_checkpoint_is_noticed_or_not_needed(tmp_path: Path, harm: str) -> None:
    like = {"w": np.random.default_rng(0).standard_normal((40, 50)).astype(np.float32), "n": np.int32(3)}
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, like, {"x": 0.5})
    noticed = 0
    for path in [path for path in (tmp_path / "1").rglob("*") if path.is_file()]:
        content = path.read_bytes()
        match harm:
            case "flip" if content:
                path.write_bytes(
                    content[: len(content) // 2]
                    + bytes([content[len(content) // 2] ^ 1])
                    + content[len(content) // 2 + 1 :]
                )
            case "cut":
                path.write_bytes(content[: len(content) // 2])
            case "delete":
                path.unlink()
        try:
            saved = checkpoints.load(1, like)
        except RunError as error:
            assert str(tmp_path / "1") in str(error)
            assert "\n" not in str(error)
            noticed += 1
        else:
            assert np.array_equal(saved.state["w"], like["w"])
            assert saved.notes == {"x": 0.5}
        path.write_bytes(content)
    assert noticed >= 4


def test_checkpoints_all_damaged_or_of_another_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"w": np.zeros(4, np.float32)}, {})
    with pytest.raises(RunError, match="of another model"):
        checkpoints.load(1, {"w": np.zeros(5, np.float32)})
    (tmp_path / "1" / "notes" / "metadata").write_text("{")
    with pytest.raises(RunError, match="every checkpoint is damaged"):
        checkpoints.newest({"w": np.zeros(4, np.float32)})
