"""Which images are in a folder, and in class folders; `finetune/test_data.py` has the splits."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpn_jax.errors import DataError, ImageError
from dpn_jax.images.folders import class_folders, image_files, image_folder
from dpn_jax.inference.evaluation import labeled_images


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
    listed = Path.iterdir

    def denied(folder: Path) -> object:  # not chmod: the tests may run as root
        if folder == refused:
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", denied)
    for refused in (tmp_path, tmp_path / "ant"):
        with pytest.raises(ImageError, match=f"{refused}: Permission denied"):
            class_folders(tmp_path)
        with pytest.raises(DataError, match=f"{refused}: Permission denied"):
            image_folder(tmp_path, split="all")
