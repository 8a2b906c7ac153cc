"""Which images are in a folder, and in class folders; `finetune/test_data.py` has the splits."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpn_jax.errors import DataError, ImageError
from dpn_jax.evaluation.classes import labeled_images
from dpn_jax.images.folders import class_folders, image_files
from dpn_jax.images.splits import image_folder, image_folders


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_image_files_are_found_by_suffix_and_sorted(tmp_path: Path) -> None:
    names = ["b/2.JPG", "b/10.jpeg", "a.png", "c/d/e.WebP", "z.tif", "y.gif", "x.bmp", "w.ppm"]
    paths = [touch(tmp_path / name) for name in names]
    for other in ("notes.txt", "b/labels.csv", "jpg", "a.png.part"):
        touch(tmp_path / other)
    (tmp_path / "folder.jpg").mkdir()
    assert image_files(tmp_path) == sorted(paths)
    assert image_files(str(tmp_path)) == sorted(paths)


def test_image_files_follow_links_but_no_loops(tmp_path: Path) -> None:
    photo = touch(tmp_path / "data" / "cat" / "1.jpg")
    (tmp_path / "data" / "cat" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "self").symlink_to(".")
    (tmp_path / "elsewhere").mkdir()
    touch(tmp_path / "elsewhere" / "2.jpg")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "broken.jpg").symlink_to("nowhere")  # listed, so that reading it says what is wrong
    data = tmp_path / "data"
    assert image_files(data) == sorted([photo, data / "dog" / "2.jpg", data / "broken.jpg"])


def test_image_files_with_odd_names(tmp_path: Path) -> None:
    names = [b"\xff.jpg", b"a\nb.jpg", b"c.jpg"]
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    assert sorted(os.fsencode(path.name) for path in image_files(tmp_path)) == sorted(names)


def test_image_files_of_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="none: No such file or directory"):
        image_files(tmp_path / "none")
    with pytest.raises(ImageError, match=r"a\.png: Not a directory"):
        image_files(touch(tmp_path / "a.png"))


def test_class_folders_in_natural_order_with_their_images_sorted(tmp_path: Path) -> None:
    for name in ("10/b.png", "10/a.png", "2/x.JPG", "2/deeper/y.png", "A/1.png", ".hidden/1.png", "2/notes.txt"):
        touch(tmp_path / name)
    touch(tmp_path / "loose.png")
    classes = class_folders(str(tmp_path))
    assert list(classes) == ["2", "10", "A"]
    assert classes["2"] == [tmp_path / "2" / "deeper" / "y.png", tmp_path / "2" / "x.JPG"]
    assert classes["10"] == [tmp_path / "10" / "a.png", tmp_path / "10" / "b.png"]


def test_class_folders_keep_a_relative_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data/ant/1.png", "data/bee/1.png"):
        touch(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert class_folders("data")["ant"] == [Path("data/ant/1.png")]
    absolute = tuple(str(tmp_path / "data" / name / "1.png") for name in ("ant", "bee"))
    assert image_folder("data", split="all").files == absolute
    monkeypatch.chdir(tmp_path / "data")
    assert class_folders(".")["ant"] == [Path("ant/1.png")]
    assert image_folder(".", split="all").files == absolute


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["elsewhere.png"], "data: no such folder"),
        (["data"], "data: is not a folder"),
        (["data/1.png", "data/.hidden/1.png"], "data: no class folders; expected .*data/<class>/<image>"),
        (["data/ant/1.png", "data/bee/notes.txt"], "bee: the class has no images"),
    ],
)
def test_training_and_evaluation_refuse_the_same_folders(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        touch(tmp_path / name)
    root = tmp_path / "data"
    with pytest.raises(ImageError, match=message):
        class_folders(root)
    with pytest.raises(ImageError, match=message):
        labeled_images(root, SimpleNamespace(labels=("ant", "bee"), synsets=(None, None)))
    with pytest.raises(DataError, match=message):
        image_folder(root, split="all")


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "ant" / "1.png")
    touch(tmp_path / "bee" / "1.png")
    listed = os.scandir

    def denied(folder: Path) -> object:  # not chmod: the tests may run as root
        if folder == refused:
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", denied)
    for refused in (tmp_path, tmp_path / "ant"):
        with pytest.raises(ImageError, match=f"{refused}: Permission denied"):
            class_folders(tmp_path)
        with pytest.raises(DataError, match=f"{refused}: Permission denied"):
            image_folder(tmp_path, split="all")


def test_what_systems_and_tools_leave_behind_is_passed_over_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    good = [touch(data / name) for name in ("ant/1.png", "ant/deep/2.png", "bee/1.png")]
    leftovers = [
        "ant/._1.png",
        "ant/.ipynb_checkpoints/1-checkpoint.png",
        "ant/deep/.thumbnails/2.png",
        "ant/@eaDir/1.png",
    ]
    leftovers += ["__MACOSX/ant/1.png", ".git/1.png", "$RECYCLE.BIN/1.png", "bee/__pycache__/1.png"]
    for name in (*leftovers, "ant/.DS_Store", ".hidden.txt"):
        touch(data / name)
    for name in ("curves.png", "config.json", "metrics.jsonl"):
        touch(data / "run" / name)
    count = f"data: {len(leftovers) + 1} passed over"

    def told() -> list[str]:
        lines = list(caplog.messages)
        caplog.clear()
        return [line for line in lines if count in line]

    assert image_files(data) == sorted(good)
    assert len(told()) == 1
    assert class_folders(data) == {"ant": sorted(good[:2]), "bee": good[2:]}
    assert len(told()) == 1
    assert len(labeled_images(data, SimpleNamespace(labels=("ant", "bee"), synsets=(None, None)))) == 3
    assert len(told()) == 1
    assert image_folder(data, split="all").class_names == ("ant", "bee")
    assert len(told()) == 1
    touch(data / "bee" / "2.png")
    train, val = image_folders(data)
    assert len(train) + len(val) == 4
    assert len(told()) == 1, "one walk"
    assert image_files(data / ".git"), "a folder that is named is looked into"


def test_formats_that_cannot_be_read_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.HEIC", "b/c.jxl", "d.png"):
        touch(tmp_path / name)
    assert image_files(tmp_path) == [tmp_path / "d.png"]
    assert "2 in formats that cannot be read; convert them to JPEG or PNG (a.HEIC, b/c.jxl)" in caplog.text


def test_a_level_too_many_is_refused(tmp_path: Path) -> None:
    for name in ("Train_set/ant/1.png", "Train_set/bee/1.png", "test/ant/1.png", "test/bee/1.png"):
        touch(tmp_path / name)
    for refuse in (class_folders, lambda root: image_folder(root, split="all")):
        with pytest.raises(ValueError, match=r"its folders \(Train_set/, test/\) hold no images, only folders"):
            refuse(tmp_path)
    touch(tmp_path / "test" / "1.png")
    assert list(class_folders(tmp_path)) == ["test", "Train_set"]


def test_class_names_are_printable_and_in_one_unicode_form(tmp_path: Path) -> None:
    composed, apart = "caf\u00e9", "cafe\u0301"
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "data") + b"/\xff"))
    for folder in (tmp_path / "data" / apart, odd):
        touch(folder / "1.png")
    names = image_folder(tmp_path / "data", split="all").class_names
    assert names == (r"\xff", composed)
    for labels in (names, (r"\xff", apart)):
        images = labeled_images(tmp_path / "data", SimpleNamespace(labels=labels, synsets=(None, None)))
        assert list(images.labels) == [0, 1]
    touch(tmp_path / "data" / composed / "2.png")
    with pytest.raises(ImageError, match="a second folder of this name, in another Unicode form"):
        class_folders(tmp_path / "data")


@pytest.mark.parametrize(("train", "val"), [("Train", "VAL"), ("training", "validation"), ("train", "valid")])
def test_splits_have_timms_names_in_either_case(tmp_path: Path, train: str, val: str) -> None:
    for name in (f"{train}/ant/1.png", f"{train}/bee/1.png", f"{val}/ant/2.png", f"{val}/bee/2.png", "test/x/1.png"):
        touch(tmp_path / name)
    for split, name in (("train", "1.png"), ("val", "2.png")):
        assert [Path(file).name for file in image_folder(tmp_path, split=split).files] == [name, name]
    with pytest.raises(DataError, match=rf"has {train}/ and {val}/; name one"):
        image_folder(tmp_path, split="all")
    with pytest.raises(DataError, match=rf"has {train}/ and {val}/, so --val-fraction .*0\.2.* does not apply"):
        image_folder(tmp_path, split="train", val_fraction=0.2)
    touch(tmp_path / "eval" / "ant" / "1.png")
    with pytest.raises(DataError, match=r"are both val; remove one"):
        image_folder(tmp_path, split="train")
