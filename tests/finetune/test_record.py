"""What a run keeps in its folder about itself, and what it may be continued with."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest

from dpn_jax.errors import RunError
from dpn_jax.finetune import FinetuneConfig, ImageFolder
from dpn_jax.finetune.record import (
    LOCK,
    RECORD,
    Record,
    find_images,
    opened,
    read_images,
    read_record,
    write_images,
    write_record,
)
from dpn_jax.pretrained import Preprocessing
from tests.support.models import TINY

START = {"source": "dpn68b", "model": None, "revision": None}
NAMES = ("cat", "d\udcffg")


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Written into `tmp_path`."""
    images = str(tmp_path / "images")
    record = Record(
        FinetuneConfig(epochs=3), images, START, "dpn68b", TINY, Preprocessing(image_size=64), ("cat", "dog")
    )
    write_record(tmp_path, record)
    return record


def test_a_record_comes_back(record: Record, tmp_path: Path) -> None:
    assert Record.from_json(tmp_path, read_record(tmp_path)) == record


def test_a_run_of_an_older_version_had_the_defaults_of_newer_options(record: Record, tmp_path: Path) -> None:
    saved = json.loads((tmp_path / RECORD).read_text())
    del saved["config"]["fast"]
    (tmp_path / RECORD).write_text(json.dumps(saved))
    assert Record.from_json(tmp_path, read_record(tmp_path)) == record


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json: damaged"),
        ("[]", "config.json: damaged, or written by another version"),
        ('{"config": {"epochs": 0}}', r"config.json: damaged, .*\(epochs must be"),
        ('{"config": {}, "folder": "x"}', r"config.json: damaged, .*\('start'\)"),
    ],
)
def test_a_damaged_record_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(RunError, match=message) as caught:
        Record.from_json(tmp_path, read_record(tmp_path))
    assert "\n" not in str(caught.value)


def test_what_does_not_change_the_result_may_differ_and_is_told(record: Record, tmp_path: Path) -> None:
    notes: list[str] = []
    asked = FinetuneConfig(
        epochs=5, workers=7, keep=9, checkpoint_every=3, skip_broken=True, skip_check=True, remat=True
    )
    assert record.continued(tmp_path, asked, START, notes.append) == asked
    assert "epochs was 3 and is 5 from here" in notes and "checkpoint_every was null and is 3 from here" in notes
    assert len(notes) == 7
    assert record.continued(tmp_path, None, {}, notes.append) == record.config
    assert len(notes) == 7


@pytest.mark.parametrize(
    ("options", "start", "difference"),
    [
        ({"learning_rate": 0.1, "seed": 1}, {}, r"learning_rate was 0.001, now 0.1; seed was 0, now 1$"),
        ({"fast": False}, {}, "fast was true, now false"),
        ({"val_fraction": 0.3}, {}, "val_fraction was null, now 0.3"),
        ({}, {"source": "dpn92.mx_in1k"}, r'source was "dpn68b", now "dpn92.mx_in1k"$'),
    ],
)
def test_what_changes_the_result_is_refused(
    record: Record, tmp_path: Path, options: dict[str, object], start: dict[str, str], difference: str
) -> None:
    with pytest.raises(RunError, match=f"cannot be resumed with other options: {difference}"):
        record.continued(tmp_path, dataclasses.replace(record.config, **options), start, print)


def test_one_process_at_a_time(record: Record, tmp_path: Path) -> None:
    first = opened(tmp_path, resume=True)
    with first, pytest.raises(RunError, match="another process is training in it"), opened(tmp_path, resume=True):
        pass
    with opened(tmp_path, resume=True):
        pass
    with pytest.raises(RunError, match="already exists; continue it with --resume"), opened(tmp_path, resume=False):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def acquire(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with opened(tmp_path / "run", resume=False):
        assert (tmp_path / "run").is_dir()


def test_a_run_that_does_not_start_leaves_nothing_behind(tmp_path: Path) -> None:
    for name in ("new", "deep/new"):
        with pytest.raises(KeyError), opened(tmp_path / name, resume=False):
            raise KeyError
        assert not (tmp_path / name).exists()
    (tmp_path / "empty").mkdir()
    with opened(tmp_path / "empty", resume=False):
        assert (tmp_path / "empty" / LOCK).exists()
    assert list((tmp_path / "empty").iterdir()) == []
    (tmp_path / "full" / "notes").mkdir(parents=True)
    with pytest.raises(RunError, match="full: already exists; choose another"), opened(tmp_path / "full", resume=False):
        pass
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes"]
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file: already exists"), opened(tmp_path / "file", resume=False):
        pass
    with pytest.raises(RunError, match="run: cannot be created"), opened(tmp_path / "file" / "run", resume=False):
        pass
    with pytest.raises(RunError, match="no run to resume"), opened(tmp_path / "none", resume=True):
        pass
    assert not (tmp_path / "none").exists()


def split(root: Path, *names: str) -> ImageFolder:
    files = tuple(str(root / name) for name in names)
    return ImageFolder(NAMES, files, tuple(NAMES.index(Path(name).parent.name) for name in names))


def test_images_are_found_again_in_their_order(tmp_path: Path) -> None:
    root = tmp_path / "images"
    train = split(root, *(f"cat/{number}.png" for number in range(10, 20)), f"{NAMES[1]}/\udcff\n.png")
    val = split(root, "cat/1.png", f"{NAMES[1]}/2.png")
    write_images(tmp_path, root, {"train": train, "val": val}, {str(root / "cat/0.png"): "no image"})
    everything = {*train.files, *val.files, str(root / "cat/0.png")}
    notes: list[str] = []
    listed = read_images(tmp_path)
    assert find_images(listed, root, everything, notes.append) == {"train": train, "val": val}
    assert notes == []
    moved = tmp_path / "moved"
    present = {file.replace(str(root), str(moved)) for file in everything}
    assert find_images(listed, moved, present, notes.append)["train"].files[0] == str(moved / "cat/10.png")
    found = find_images(listed, root, everything - {train.files[3]} | {str(root / "cat/9.png")}, notes.append)
    assert found["train"] == dataclasses.replace(train, skipped=frozenset({3}))
    assert found["val"] == val
    assert notes == [
        f"one training image fewer than the run has, such as {train.files[3]}: the next ones take their places",
        f"one image more than the run has, such as {root / 'cat/9.png'}: not used",
    ]
    with pytest.raises(RunError, match=r"images: 2 training images fewer than the run has.*name the run's own images"):
        find_images(listed, root, everything - set(train.files[:2]), notes.append)
    with pytest.raises(RunError, match="one validation image fewer"):
        find_images(listed, root, everything - {val.files[0]}, notes.append)
