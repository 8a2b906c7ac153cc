"""URLs: photos, weights and packed images read from a bucket of a local emulator, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dpn_jax
from dpn_jax.checkpoint.save import convert
from dpn_jax.errors import ExportError, ImageError
from dpn_jax.evaluation.evaluate import evaluate
from dpn_jax.images.folders import class_folders, image_files
from dpn_jax.images.labels import read_labels
from dpn_jax.images.packed import PackedImages
from dpn_jax.images.read import read_image
from dpn_jax.images.splits import list_images
from dpn_jax.paths import entries, kind, local_copy, readable_path, size
from tests.support.bucket import bucket, put, upload
from tests.support.finetune_runs import Runs, contents, finish
from tests.support.models import TINY, values
from tests.support.packs import packed, write_classes

COMMAND = [sys.executable, "-W", "error", "-m", "dpn_jax"]
CLASSES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with bucket(tmp_path_factory.mktemp("bucket")) as url:
        yield url


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, url: str) -> tuple[Path, str]:
    """Class folders here, and the same in the bucket."""
    folder = write_classes(tmp_path_factory.mktemp("photos") / "photos", 2, classes=CLASSES)
    (folder / "ant" / "deeper").mkdir()
    shutil.copy(folder / "ant" / "0.png", folder / "ant" / "deeper" / "a b#c%20?é.PNG")
    upload(folder, f"{url}/photos")
    return folder, f"{url}/photos"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    model = dpn_jax.create_model(TINY, rngs=nnx.Rngs(0))
    model.provenance = model.provenance._replace(
        preprocessing=dpn_jax.Preprocessing(image_size=32), class_names=CLASSES
    )
    dpn_jax.save(model, path)
    return path


def names(files: list[os.PathLike], root: os.PathLike | str) -> list[str]:
    assert all(os.fspath(file).startswith(f"{root}/") for file in files)
    return [os.fspath(file).removeprefix(f"{root}/") for file in files]


def test_a_bucket_is_listed_as_a_folder_is(photos: tuple[Path, str]) -> None:
    here, there = photos
    assert names(image_files(there), there) == names(image_files(here), here)
    assert len(image_files(there)) == 11
    local, remote = class_folders(here), class_folders(there)
    assert {name: names(files, there) for name, files in remote.items()} == {
        name: names(files, here) for name, files in local.items()
    }


def test_what_is_left_behind_is_passed_over_in_a_bucket_too(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (
        "__MACOSX/x.png",
        ".hidden/x.png",
        "run/metrics.jsonl",
        "run/config.json",
        "run/curves.png",
        "a/b.HEIC",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    shutil.copy(tmp_path / "a" / "b.HEIC", tmp_path / "a" / "1.jpg~")
    shutil.copy(tmp_path / "a" / "b.HEIC", tmp_path / "a" / "1.jpg")
    upload(tmp_path, f"{url}/left")
    assert names(image_files(f"{url}/left"), f"{url}/left") == ["a/1.jpg"]
    assert ": 3 passed over" in caplog.messages[0] and caplog.messages[0].endswith("(.hidden, __MACOSX, run)")
    assert ": 1 in formats that cannot be read" in caplog.messages[1]


def test_what_is_added_is_seen(url: str) -> None:
    for count, name in enumerate(("a/1.png", "a/b/1.png", "c/1.png", "a/2.png"), start=1):
        put(f"{url}/growing/{name}", b"x")
        assert len(image_files(f"{url}/growing")) == count


def test_a_folder_that_a_console_made(url: str) -> None:
    put(f"{url}/made/", b"")
    put(f"{url}/made/cat/1.png", b"x")
    assert list(entries(readable_path(f"{url}/made"))) == [("cat", True)]
    assert names(image_files(f"{url}/made"), f"{url}/made") == ["cat/1.png"]


def test_what_is_not_there(url: str, photos: tuple[Path, str], weights: Path) -> None:
    there = photos[1]
    for wrong in (f"{url}/none", "gs://no-such-bucket", "gs://no-such-bucket/none"):
        with pytest.raises(ImageError, match=f"^{wrong}: No such file or directory$"):
            image_files(wrong)
        with pytest.raises(ImageError, match=f"^{wrong}: no such folder$"):
            class_folders(wrong)
        with pytest.raises(ImageError, match=f"^{wrong}/a.png: No such file or directory$"):
            read_image(f"{wrong}/a.png")
        with pytest.raises(dpn_jax.CheckpointError, match=f"^{wrong}/model.bin: No such file or directory$"):
            dpn_jax.from_pretrained(f"{wrong}/model.bin")
        with pytest.raises(ImageError, match=f"^{wrong}/a.csv: cannot be read .No such file or directory.$"):
            list_images(f"{wrong}/a.csv")
    with pytest.raises(ImageError, match=f"^{there}/ant/0.png: is not a folder$"):
        class_folders(f"{there}/ant/0.png")


def test_a_photo_is_read_from_a_bucket(photos: tuple[Path, str], url: str, tmp_path: Path) -> None:
    here, there = photos
    for file, remote in zip(image_files(here), image_files(there), strict=True):
        expected = np.asarray(read_image(file))
        for source in (remote, str(remote)):
            np.testing.assert_array_equal(np.asarray(read_image(source)), expected)
    (tmp_path / "broken.png").write_bytes((here / "ant" / "0.png").read_bytes()[:300])
    (tmp_path / "empty.png").touch()
    upload(tmp_path, f"{url}/damaged")
    with pytest.raises(ImageError, match=f"^{url}/damaged/broken.png: image file is truncated"):
        read_image(f"{url}/damaged/broken.png")
    with pytest.raises(ImageError, match=rf"^{url}/damaged/empty.png: the file is empty \(0 bytes\)$"):
        read_image(f"{url}/damaged/empty.png")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_accuracy_on_a_bucket_is_that_on_a_folder(
    photos: tuple[Path, str], weights: Path, url: str, workers: int
) -> None:
    here, there = photos
    upload(weights, f"{url}/run/model.safetensors")
    local = dpn_jax.Classifier.from_pretrained(weights, batch_size=8)
    classifier = dpn_jax.Classifier.from_pretrained(f"{url}/run", batch_size=8, workers=workers)
    assert classifier.labels == CLASSES
    np.testing.assert_array_equal(evaluate(classifier, there).logits, evaluate(local, here).logits)
    assert classifier([f"{there}/bee/0.png"]) == local([here / "bee" / "0.png"])


def test_a_csv_file_names_photos_of_a_bucket(photos: tuple[Path, str], url: str, tmp_path: Path) -> None:
    there = photos[1]
    (tmp_path / "list.csv").write_text(f"image,label\nphotos/ant/0.png,ant\n{there}/bee/1.png,bee\n", "utf-8-sig")
    upload(tmp_path / "list.csv", f"{url}/list.csv")
    assert list_images(f"{url}/list.csv").files == (f"{there}/ant/0.png", f"{there}/bee/1.png")
    assert list_images(tmp_path / "list.csv").files == (str(tmp_path / "photos/ant/0.png"), f"{there}/bee/1.png")


def test_labels_are_read_from_a_bucket(url: str, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes("\ufeffant\r\nbée\n\n".encode())
    upload(tmp_path / "labels.txt", f"{url}/labels.txt")
    assert read_labels(f"{url}/labels.txt", 2) == read_labels(tmp_path / "labels.txt", 2) == ("ant", "bée")
    assert kind(readable_path(f"{url}/labels.txt")) == "file" and f"{url}/labels.txt" not in map(str, image_files(url))
    put(f"{url}/labels.txt", b"wasp\nhornet of the longest name")  # longer than what has been listed
    assert read_labels(f"{url}/labels.txt", 2) == ("wasp", "hornet of the longest name")
    with pytest.raises(ValueError, match=f"^{url}/none.txt: no such label file$"):
        read_labels(f"{url}/none.txt", 2)


def test_weights_are_copied_from_a_bucket(weights: Path, url: str, tmp_path: Path) -> None:
    folder = shutil.copytree(weights.parent, tmp_path / "folder")
    (folder / "notes").mkdir()
    (folder / "notes" / "much.bin").write_bytes(b"x")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    upload(folder, f"{url}/weights")
    expected = values(dpn_jax.load(weights))
    for source in (f"{url}/weights", f"{url}/weights/model.safetensors", Path(f"{url}/weights")):
        jax.tree.map(np.testing.assert_array_equal, values(dpn_jax.from_pretrained(source)), expected)
        jax.tree.map(np.testing.assert_array_equal, values(dpn_jax.load(source)), expected)
    convert(f"{url}/weights", tmp_path / "converted.safetensors")
    jax.tree.map(np.testing.assert_array_equal, values(dpn_jax.load(tmp_path / "converted.safetensors")), expected)
    copy = local_copy(f"{url}/weights", files=lambda names: ["model.safetensors"])
    assert [file.name for file in copy.iterdir()] == ["model.safetensors"]
    with pytest.raises(dpn_jax.CheckpointError, match=r"bucket/weights/notes: no model\.safetensors"):
        dpn_jax.from_pretrained(f"{url}/weights/notes")


def test_a_copy_ends_with_its_process(weights: Path, url: str) -> None:
    upload(weights, f"{url}/once.safetensors")
    script = f"from dpn_jax.paths import local_copy; path = local_copy({f'{url}/once.safetensors'!r}); print(path)"
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], check=True, timeout=60, stdout=subprocess.PIPE
    )
    copy = Path(process.stdout.decode().strip())
    assert copy.parts[-3:] == ("gs", "bucket", "once.safetensors")
    assert copy.parts[-4].startswith("dpn_jax-") and not copy.parents[2].exists()


def test_an_exported_model_is_read_from_a_bucket(weights: Path, url: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.jaxexport"
    dpn_jax.export_model(dpn_jax.load(weights), path, platforms=["cpu"], batch_size=1, fast=False)
    upload(path, f"{url}/tiny.jaxexport")
    there = dpn_jax.Classifier.from_exported(f"{url}/tiny.jaxexport")
    photo = np.zeros((40, 40, 3), np.uint8)
    assert there(photo) == dpn_jax.Classifier.from_exported(path)(photo)
    with pytest.raises(ExportError, match=f"^{url}/none.jaxexport: No such file or directory$"):
        dpn_jax.load_exported(f"{url}/none.jaxexport")


def test_packed_images_are_read_from_a_bucket(photos: tuple[Path, str], url: str, tmp_path: Path) -> None:
    here = packed(photos[0], tmp_path / "packed")
    upload(tmp_path / "packed", f"{url}/packed")
    there = PackedImages(f"{url}/packed")
    assert names(there.files, f"{url}/packed") == names(here.files, tmp_path / "packed")
    assert there[3] == here[3] and there.__getitems__([0, 9]) == here.__getitems__([0, 9])
    assert list_images(f"{url}/packed").packed is not None
    shard = next((tmp_path / "packed").glob("*.array_record"))
    shard.write_bytes(shard.read_bytes()[:100])
    upload(shard, f"{url}/packed/{shard.name}")
    with pytest.raises(ImageError, match=rf"^{url}/packed/{shard.name}: record 0 .*: the shard is truncated: 100 of"):
        PackedImages(f"{url}/packed")[0]


@pytest.mark.slow
def test_a_run_on_a_bucket_is_that_on_a_folder(url: str, tmp_path: Path) -> None:
    pytest.importorskip("orbax.checkpoint")
    runs = Runs(tmp_path)
    upload(runs.images, f"{url}/train")
    upload(runs.weights, f"{url}/weights/tiny.safetensors")
    options = ["--workers", 2, "--epochs", 1, "--checkpoint-every", 2]
    code, _, err = runs.run(tmp_path / "here", *options)
    assert code == 0, err
    words = runs.words(tmp_path / "there", *options)
    words[words.index(str(runs.images))] = f"{url}/train"
    words[words.index(str(runs.weights))] = f"{url}/weights/tiny.safetensors"
    code, _, err = finish(runs.call(words))
    assert code == 0, err
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    assert (config["folder"], config["start"]["source"]) == (
        f"{url}/train",
        f"{url}/weights/tiny.safetensors",
    )
    assert (tmp_path / "there" / "images.json").read_bytes() == (tmp_path / "here" / "images.json").read_bytes()
    code, _, err = finish(runs.call(["finetune", "--output", str(tmp_path / "there"), "--resume", "--epochs", "2"]))
    assert code == 0, err


@pytest.mark.slow
def test_the_command_reads_from_a_bucket(photos: tuple[Path, str], weights: Path, url: str, tmp_path: Path) -> None:
    there = photos[1]
    upload(weights, f"{url}/command.safetensors")
    arguments = ["--weights", f"{url}/command.safetensors", "--format", "csv"]

    def run(*words: str) -> tuple[int, str, str]:
        process = subprocess.run([*COMMAND, *words, *arguments], capture_output=True, text=True, timeout=300)
        return process.returncode, process.stdout, process.stderr

    code, out, err = run("classify", f"{there}/ant", f"{there}/bee/1.png", f"{url}/none.png", "--top-k", "1")
    assert [line.split(",")[0] for line in out.splitlines()[1:]] == [
        *(f"{there}/ant/{name}" for name in ("0.png", "1.png", "deeper/a b#c%20?é.PNG")),
        f"{there}/bee/1.png",
    ]
    assert (code, err) == (1, f"dpn-jax: {url}/none.png: No such file or directory\n")
    packed(photos[0], tmp_path / "packed")
    upload(tmp_path / "packed", f"{url}/command")
    code, out, err = run("classify", f"{url}/command", "--top-k", "1")
    assert (code, err) == (0, "") and out.splitlines()[1].startswith(f"{url}/command/ant/0.png,1,")
    code, out, err = run("evaluate", there)
    assert (code, err) == (0, "") and out.splitlines()[1].startswith("11,0,")


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_one_line() -> None:
    script = "from dpn_jax.images.read import read_image; read_image('gs://bucket/a.png')"
    environment = os.environ | {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:9"}
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=environment
    )
    assert process.stderr.splitlines()[-1].startswith("dpn_jax.errors.ImageError: gs://bucket/a.png: ")


@pytest.mark.parametrize("missing", ["etils", "gcsfs"])
def test_what_is_missing_is_said(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else name)
    with pytest.raises(ImageError, match=r'^gs://b/a\.png: a URL, which gcsfs reads: pip install "dpn-jax\[gcs\]"$'):
        readable_path("gs://b/a.png", error=ImageError)


@pytest.mark.parametrize("source", ["s3://b/a", "https://host/a", Path("s3://b/a"), "file:///a"])
def test_other_urls_are_refused(source: str | Path) -> None:
    said = r"a URL; only local files and gs:// can be read: copy it to a local path$"
    for read in (read_image, image_files, class_folders, list_images, PackedImages):
        with pytest.raises(ImageError, match=said):
            read(source)
    for read in (dpn_jax.from_pretrained, dpn_jax.load):
        with pytest.raises(dpn_jax.CheckpointError, match=said):
            read(source)
    with pytest.raises(ExportError, match=said):
        dpn_jax.load_exported(source)


def test_local_paths_import_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "1.png")
    script = (
        "import sys, dpn_jax.cli.main\n"
        "from dpn_jax.images.folders import image_files\n"
        "from dpn_jax.images.read import read_image\n"
        f"read_image(image_files({str(tmp_path)!r})[0])\n"
        "assert not {'fsspec', 'gcsfs'} & set(sys.modules)  # jax imports etils where there is one\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_local_paths(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert (kind(tmp_path), kind(tmp_path / "a"), kind(tmp_path / "b")) == ("folder", "file", None)
    assert size(tmp_path / "a") == 3
    assert local_copy(tmp_path / "a") == tmp_path / "a"
    assert readable_path(os.fsencode(tmp_path / "a")) == tmp_path / "a"
