"""Runs that are stopped, killed or out of a resource: the real command, mostly in a process of its own.

`KILLS=20 python -m pytest tests/finetune/test_faults.py -k random_moments -o faulthandler_timeout=3600` kills and
resumes at 20 random moments.
"""

import os
import random
import resource
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dpn_jax.cli.main import main
from dpn_jax.finetune import read_metrics
from tests.support.finetune_runs import COLORS, Runs, contents, finish, wait_for

KILLS = int(os.environ.get("KILLS", "1"))

Main = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def reference(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupts; do not change it."""
    output = tmp_path_factory.mktemp("reference") / "run"
    code, out, err = runs.run(output)
    assert code == 0, err
    assert "model.safetensors" in out
    return output


@pytest.fixture
def complain(capfd: pytest.CaptureFixture[str]) -> Main:
    """Runs the command in this process; returns its exit code and stderr."""

    def complain(words: list[str]) -> tuple[int, str]:
        capfd.readouterr()
        code = main(words)
        return code, capfd.readouterr().err

    return complain


def assert_resumes(runs: Runs, output: Path, reference: Path) -> str:
    """A resumed run ends with the same bits as the run that was never interrupted."""
    code, _, err = runs.run(output, "--resume")
    assert code == 0, err
    assert contents(output) == contents(reference)
    return err


def assert_one_line(complaint: str, *parts: str) -> None:
    """The last line has all parts, and nothing looks like a traceback."""
    assert "Traceback" not in complaint
    last = complaint.strip().splitlines()[-1]
    assert last.startswith("dpn-jax: ")
    for part in parts:
        assert part in last, last


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)])
def test_a_signal_saves_and_says_how_to_continue(
    runs: Runs, reference: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "a run"
    process = runs.start(output)
    assert wait_for(lambda: (output / "checkpoints" / "2").exists(), process)
    process.send_signal(number)
    code, out, err = finish(process)
    assert (code, out) == (128 + number, "")
    advice = f"continue with: dpn-jax finetune --output '{output}' --resume"
    assert_one_line(err, advice)
    assert not (output / "model.safetensors").exists()
    code, _, err = finish(runs.call(shlex.split(advice.partition("dpn-jax ")[2])))
    assert code == 0, err
    assert contents(output) == contents(reference)


@pytest.mark.slow
def test_kill_at_random_moments_changes_nothing(runs: Runs, reference: Path, tmp_path: Path) -> None:
    moments = random.Random(time.time_ns())
    for number in range(KILLS):
        output, step, more = tmp_path / str(number), moments.randint(0, 12), moments.uniform(0, 0.5)
        process = runs.start(output)
        assert wait_for(lambda output=output, step=step: count_lines(output) >= step, process)
        time.sleep(more)
        process.kill()
        finish(process)
        err = assert_resumes(runs, output, reference)
        print(f"killed {more:.2f} s after step {step};", *(line for line in err.splitlines() if "step" in line))


def count_lines(output: Path) -> int:
    """Training steps that were logged; -1 before the run's folder is there."""
    path = output / "metrics.jsonl"
    if not path.exists():
        return 0 if (output / "config.json").exists() else -1
    return path.read_bytes().count(b'"train"')


@pytest.mark.slow
def test_kill_inside_a_checkpoint_write_changes_nothing(runs: Runs, reference: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for _ in range(3):  # each time a little further
        process = runs.start(output, *(["--resume"] if output.exists() else []))
        assert wait_for(lambda: len(list_steps(output)) > 1, process)
        assert wait_for(lambda: list((output / "checkpoints").glob("*tmp*/state*/*")), process, every=0.0002)
        process.kill()
        finish(process)
        assert list((output / "checkpoints").glob("*tmp*")), "the write was over: the test has missed it"
    assert_resumes(runs, output, reference)
    assert not list((output / "checkpoints").glob("*tmp*"))


def list_steps(output: Path) -> list[int]:
    return [int(path.name) for path in (output / "checkpoints").glob("*") if path.name.isdigit()]


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_keeps_the_checkpoints(runs: Runs, reference: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = runs.start(output)
    assert wait_for(lambda: (output / "checkpoints" / "2").exists(), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
    code, _, err = finish(process)
    assert code == 2
    assert_one_line(err, str(output), "File too large", "--resume")
    assert len(err.strip().splitlines()) <= 3, err
    assert 2 in list_steps(output) or 3 in list_steps(output)
    assert_resumes(runs, output, reference)


@pytest.mark.slow
def test_a_loss_that_is_nan_stops_the_run(runs: Runs, tmp_path: Path, complain: Main) -> None:
    output = tmp_path / "run"
    code, err = complain(runs.words(output, "--optimizer", "sgd", "--learning-rate", "1e30", "--epochs", "1"))
    assert code == 2
    assert_one_line(err, "training has diverged", "at step 3, learning rate 6.67e+29", "checkpoint", "--learning-rate")
    saved = list_steps(output)
    assert f"checkpoint {max(saved)} is kept" in err
    assert not (output / "model.safetensors").exists()


def test_an_empty_class_folder_is_named(runs: Runs, tmp_path: Path, complain: Main) -> None:
    images = shutil.copytree(runs.images, tmp_path / "images")
    (images / "yellow").mkdir()
    assert_refused(runs, images, tmp_path, complain, "yellow", "no images")


def test_one_class_is_too_few(runs: Runs, tmp_path: Path, complain: Main) -> None:
    shutil.copytree(runs.images / "red", tmp_path / "images" / "red")
    assert_refused(runs, tmp_path / "images", tmp_path, complain, "one class only")


def test_a_batch_larger_than_the_data_is_refused(runs: Runs, tmp_path: Path, complain: Main) -> None:
    assert_refused(runs, runs.images, tmp_path, complain, "batch_size 500", "24 training images", options=("500",))


def assert_refused(
    runs: Runs, images: Path, folder: Path, complain: Main, *parts: str, options: tuple[str, ...] = ("6",)
) -> None:
    """One line, exit code 2, and no folder left behind that would be in the way of the next attempt."""
    words = ["finetune", str(images), "--weights", str(runs.weights), "--output", str(folder / "run")]
    code, err = complain([*words, "--workers", "0", "--batch-size", *options])
    assert code == 2
    assert_one_line(err, *parts)
    assert not (folder / "run").exists()


def test_an_unreadable_image_is_named(runs: Runs, tmp_path: Path, complain: Main) -> None:
    images = shutil.copytree(runs.images, tmp_path / "images")
    for path in (images / "red").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    words = ["finetune", str(images), "--weights", str(runs.weights), "--output", str(tmp_path / "run")]
    code, err = complain([*words, "--workers", "0", "--batch-size", "24", "--epochs", "1"])
    assert code == 2
    assert_one_line(err, str(images / "red"), "--skip-broken")


@pytest.mark.slow
def test_options_that_differ_from_the_saved_ones_are_named(runs: Runs, reference: Path, complain: Main) -> None:
    code, err = complain(runs.words(reference, "--resume", "--seed", "1", "--optimizer", "lion"))
    assert code == 2
    assert_one_line(err, 'optimizer was "adamw", now "lion"; seed was 0, now 1')
    code, err = complain(["finetune", "--output", str(reference), "--resume", "--epochs=3", "--learning-rate", "0.001"])
    assert code == 2
    assert_one_line(err, "learning_rate was 0.02, now 0.001"), "a default of the command, not of the run"


@pytest.mark.slow
def test_two_processes_that_resume_one_run(runs: Runs, reference: Path, tmp_path: Path, complain: Main) -> None:
    output = tmp_path / "run"
    process = runs.start(output)
    assert wait_for(lambda: (output / "checkpoints" / "2").exists(), process)
    code, err = complain(["finetune", "--output", str(output), "--resume"])
    assert code == 2
    assert_one_line(err, f"{output}: another process is training in it")
    code, _, err = finish(process)
    assert code == 0, err
    assert contents(output) == contents(reference)


def test_a_new_run_must_name_its_images(tmp_path: Path, complain: Main) -> None:
    code, err = complain(["finetune", "--output", str(tmp_path / "run"), "--model", "dpn68b"])
    assert code == 2
    assert_one_line(err, "name the folder of images: dpn-jax finetune DATA --output RUN")


def test_what_to_start_from_must_be_named(runs: Runs, tmp_path: Path, complain: Main) -> None:
    code, err = complain(["finetune", str(runs.images), "--output", str(tmp_path / "run")])
    assert code == 2
    assert_one_line(err, "--model TAG", "--weights FILE")


def test_the_options_of_processes_are_refused_unless_complete(runs: Runs, tmp_path: Path, complain: Main) -> None:
    code, err = complain(runs.words(tmp_path / "run", "--processes", "2"))
    assert code == 2
    assert_one_line(err, "--coordinator, --processes and --process-index must be given together")


@pytest.mark.slow
def test_two_processes_equal_one(runs: Runs, tmp_path: Path) -> None:
    options = ("--optimizer", "sgd", "--mixup", "0", "--drop-rate", "0")
    code, _, err = runs.run(tmp_path / "one", *options)
    assert code == 0, err
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    processes = [
        runs.start(tmp_path / "two", *options, "--coordinator", address, "--processes", 2, "--process-index", index)
        for index in range(2)
    ]
    outcomes = [finish(process) for process in processes]
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert "validation" in outcomes[0][1]
    assert "dpn-jax" not in outcomes[1][1] + outcomes[1][2]  # only process 0 prints
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5, err_msg=name)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


@pytest.mark.slow
def test_classify_names_the_users_classes(runs: Runs, reference: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", str(runs.images / "red"), "--weights", str(reference / "model.safetensors")]) == 0
    assert {line.split()[-1] for line in capfd.readouterr().out.splitlines() if line[0] == " "} == set(COLORS)
