"""Several devices, several processes: the results of one, in order."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import dpn_jax
from dpn_jax.errors import RunError
from dpn_jax.inference.program import find_devices
from dpn_jax.multihost import merged, require_same, together
from tests.support.models import TINY, randomize

pytestmark = pytest.mark.optimized  # nothing is compiled here but in processes that last as long as users' do


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model = randomize(dpn_jax.create_model(TINY, num_classes=6))
    model.provenance = model.provenance._replace(
        preprocessing=dpn_jax.Preprocessing(image_size=32), class_names=tuple("abcdef")
    )
    dpn_jax.save(model, path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """203 photos in class folders."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(203):
        folder = root / "abc"[number % 3]
        folder.mkdir(exist_ok=True)
        color = rng.integers(1, 256, 3)
        pixels = rng.integers(0, color, (33 + number % 9, 41, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03}.png")
    return root


@pytest.mark.slow
def test_eight_devices_equal_one(weights: Path, photos: Path) -> None:
    words = [sys.executable, "-m", "tests.support.many_devices", weights, photos]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    seen = json.loads(ended.stdout)
    logits = np.array(seen["logits 1"])
    assert logits.shape == (203, 6)
    assert len(np.unique(logits.argmax(1))) > 1
    scale = np.abs(logits).max()
    for count in (1, 2, 8):
        assert seen[f"collectives {count}"] == []
        for way in ("logits", "floats"):
            np.testing.assert_allclose(seen[f"{way} {count}"], logits, rtol=0, atol=1e-6 * scale)
        streamed = [[index for _, _, index, _ in best] for best in seen[f"stream {count}"]]
        assert streamed == [[index for _, _, index, _ in best] for best in seen["stream 1"]]
        for row, first in zip(seen[f"classify {count}"], seen["classify 1"], strict=True):
            assert row["image"] == first["image"]
            for best, other in zip(row["predictions"], first["predictions"], strict=True):
                assert best["label"] == other["label"]
                assert best["probability"] == pytest.approx(other["probability"], abs=1e-6)
        for name in ("images", "top1", "top5"):
            assert seen[f"evaluate {count}"][0][name] == seen["evaluate 1"][0][name]


def start(words: Sequence[object], *, count: int, index: int, port: int) -> subprocess.Popen:
    """One of `count` processes of a command."""
    joined = ["--coordinator", f"127.0.0.1:{port}", "--processes", count, "--process-index", index]
    command = [sys.executable, "-m", "dpn_jax", *map(str, (*words, *joined))]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(words: Sequence[object] | Sequence[Sequence[object]], count: int) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each process."""
    port = free_port()
    each = words if isinstance(words[0], list) else [words] * count
    started = [start(each[index], count=count, index=index, port=port) for index in range(count)]
    outputs = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def alone(*words: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "dpn_jax", *map(str, words)]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return ended.returncode, ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("count", "images"), [(2, 203), (3, 203), (3, 17)])
def test_processes_print_what_one_prints(count: int, images: int, weights: Path, photos: Path, tmp_path: Path) -> None:
    """A broken image among them; of 17 images in batches of 16, the third process has none."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    files = sorted(photos.rglob("*.png"))[: images - 1]
    words = ["classify", *files[:9], broken, *files[9:], "--weights", weights, "--format", "json"]
    expected = alone(*words)
    assert expected[0] == 1
    assert len(expected[1].splitlines()) == images - 1
    ended = run(words, count)
    assert (ended[0][0], ended[0][1]) == expected
    assert ended[0][2].count("broken.png") == 1
    for code, out, err in ended[1:]:
        assert (code, out, "broken.png" in err) == (1, "", False)


@pytest.mark.slow
def test_processes_evaluate_together(weights: Path, photos: Path) -> None:
    words = ["evaluate", photos, "--weights", weights, "--format", "json"]
    code, out = alone(*words)
    ended = run(words, 2)
    assert [end[0] for end in ended] == [code, code] == [0, 0]
    rows = [json.loads(text) for text in (out, ended[0][1])]
    assert ended[1][1] == ""
    for name in ("images", "failed", "top1", "top5"):
        assert rows[0][name] == rows[1][name]


@pytest.mark.slow
def test_processes_with_other_files_are_refused(weights: Path, photos: Path) -> None:
    words = [["classify", photos / name, "--weights", weights] for name in ("a", "b")]
    for code, out, err in run(words, 2):
        assert (code, out) == (2, "")
        assert "process 0 has 68 images and process 1 has 68, or not the same ones" in err
    words = [["classify", photos, "--weights", path] for path in (weights, "missing.safetensors")]
    (code, _, err), (other, _, _) = run(words, 2)
    assert (code, other) == (2, 2)
    assert "process 1: missing.safetensors" in err


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_killed_process_ends_all(victim: int, weights: Path, photos: Path) -> None:
    words = ["classify", *[photos] * 40, "--weights", weights, "--format", "json", "--image-size", 64]
    port = free_port()
    processes = [start(words, count=2, index=index, port=port) for index in (0, 1)]
    assert processes[0].stdout.readline()  # in the middle
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, err = processes[1 - victim].communicate(timeout=90)
    assert time.monotonic() - killed < 60
    assert processes[1 - victim].returncode != 0
    assert "lost another process" in err or "another task died" in err  # ours, or JAX's if it notices first
    processes[victim].communicate()


def test_one_process_is_all_of_them() -> None:
    assert together(lambda: 3) == 3
    require_same(["a"], "images")
    assert list(merged(lambda indices: (index**2 for index in indices), 5, unit=2)) == [0, 1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        together(lambda: 1 // 0)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 100, 333])
def test_every_item_once_and_units_whole(processes: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes, one after the other: what each one does is recorded before the results are exchanged."""
    shares = []
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        monkeypatch.setattr("dpn_jax.multihost.gather", lambda value: [value])
        shares.append(list(merged(lambda indices: indices, count, unit=4)))
    assert sorted(index for share in shares for index in share) == list(range(count))
    for share in shares:
        whole = [share[first : first + 4] for first in range(0, len(share), 4)]
        assert all(part[0] % 4 == 0 and part == list(range(part[0], part[0] + len(part))) for part in whole)


def test_a_failure_elsewhere_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpn_jax.multihost.gather", lambda value: [value, "no space left"])
    with pytest.raises(RunError, match="process 1: no space left"):
        together(lambda: 1)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("some", "devices must be None, 'all', a device or several, got 'some'"),
        ((), "devices must be one or more, each once"),
        (jax.devices()[:1] * 2, "devices must be one or more, each once"),
        (["cpu"], "devices must be of jax.devices\\(\\), got 'cpu'"),
    ],
    ids=str,
)
def test_unfit_devices(devices: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_devices(devices)


def test_devices_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    with pytest.raises(ValueError, match=r"devices must be of this process \(3\), got .* of process 0"):
        find_devices(jax.devices()[:1])
