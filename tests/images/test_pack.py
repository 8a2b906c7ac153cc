"""Packing: interrupted and continued, repaired, refused; a full disk; images that cannot be read."""

import errno
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
from PIL import Image

from dpn_jax.cli.options import DEFAULT_TAG
from dpn_jax.errors import ImageError, PackError
from dpn_jax.images.pack import pack
from dpn_jax.images.packed import PackedImages
from dpn_jax.images.records import MANIFEST, PLAN, Record, array_record
from dpn_jax.images.transform import preprocessing
from tests.support.finetune_runs import wait_for
from tests.support.packs import CROPS, packed, write_classes

pytest.importorskip("array_record")

KILLS = int(os.environ.get("KILLS", "4"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of seven images."""
    return write_classes(tmp_path / "photos")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a packed folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ages(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}


def rewritten(folder: Path, before: dict[str, int]) -> list[str]:
    """Numbers of the shards that have been written since."""
    return sorted(name[:5] for name, age in ages(folder).items() if before.get(name) != age)


def names(folder: Path) -> list[str]:
    """The names in all records of all shards, as array_record reads them."""
    found = []
    for path in sorted(folder.glob("*.array_record")):
        reader = array_record().reader(str(path))
        found += [Record.from_bytes(record).name for record in reader.read_all()]
        reader.close()
    return found


@pytest.mark.parametrize("crops", [None, CROPS])
def test_what_is_there_is_kept_and_the_rest_is_packed(photos: Path, tmp_path: Path, crops: object) -> None:
    whole = packed(photos, tmp_path / "whole", crops=crops).folder
    expected = contents(whole)
    (whole / MANIFEST).rename(whole / "kept")
    (whole / PLAN).write_text(json.dumps(json.loads(expected[MANIFEST])["plan"]))
    (whole / "kept").unlink()
    (whole / "00004-of-00006.array_record").unlink()
    (whole / ".00004-of-00006.array_record-0123.tmp").write_bytes(b"half")
    before = ages(whole)
    packed(photos, whole, crops=crops)
    assert rewritten(whole, before) == ["00004"]
    assert contents(whole) == expected


def test_a_damaged_shard_is_repaired(photos: Path, tmp_path: Path) -> None:
    folder = packed(photos, tmp_path / "packed").folder
    expected = contents(folder)
    for number, change in enumerate((lambda whole: whole[:-1000], lambda whole: whole[:70] + b"\1" + whole[71:])):
        shard = folder / f"0000{2 * number}-of-00006.array_record"
        shard.write_bytes(change(shard.read_bytes()))
    (folder / MANIFEST).write_text("{")
    before = ages(folder)
    packed(photos, folder)
    assert rewritten(folder, before) == ["00000", "00002"]
    assert contents(folder) == expected


def test_an_image_that_cannot_be_read_is_listed_until_it_can(photos: Path, tmp_path: Path) -> None:
    good = (photos / "bee" / "0.png").read_bytes()
    (photos / "bee" / "0.png").write_bytes(b"no image")
    (photos / "cat" / "6.png").write_bytes(good[:200])
    folder = tmp_path / "packed"
    done = pack(photos, folder, shard_size=4, workers=0)
    assert (done.images, done.shards) == (19, 5), "the last shard would be empty"
    assert [reason.partition(": ")[0] for reason in done.broken] == [
        str(photos / "bee" / "0.png"),
        str(photos / "cat" / "6.png"),
    ]
    images = PackedImages(folder)
    assert sorted(images.broken) == ["bee/0.png", "cat/6.png"]
    assert len(images) == 19 and images[7][1] == 1
    before = ages(folder)
    assert pack(photos, folder, shard_size=4, workers=0) == done
    assert rewritten(folder, before) == []
    (photos / "bee" / "0.png").write_bytes(good)
    assert pack(photos, folder, shard_size=4, workers=0).images == 20
    assert rewritten(folder, before) == ["00001"]
    assert PackedImages(folder)[7][0] == good


def test_an_image_that_has_changed_is_packed_again(photos: Path, tmp_path: Path) -> None:
    folder = packed(photos, tmp_path / "packed", crops=CROPS).folder
    before = ages(folder)
    Image.new("RGB", (40, 40), "red").save(photos / "ant" / "5.png")
    images = packed(photos, folder, crops=CROPS)
    assert rewritten(folder, before) == ["00001"]
    assert (images[5][0] == (255, 0, 0)).all()
    (photos / "ant" / "3.png").write_bytes(b"no image")
    assert len(packed(photos, folder, crops=CROPS)) == 20
    assert "ant/3.png" not in names(folder), "the last of its shard"


def test_another_pack_is_refused(photos: Path, tmp_path: Path) -> None:
    folder = packed(photos, tmp_path / "packed").folder
    expected = contents(folder)
    other = Path(shutil.copytree(photos, tmp_path / "other"))
    for data, options, what in (
        (other, {}, "images"),
        (photos, {"crops": CROPS}, "--crops"),
        (photos, {"shard_size": 5}, "--shard-size"),
        (other, {"shard_size": 5}, "images and --shard-size"),
    ):
        with pytest.raises(PackError, match=f"packed: was packed with other {what}; choose another DESTINATION, or re"):
            packed(data, folder, **options)
    (photos / "ant" / "0.png").rename(photos / "ant" / "new.png")
    with pytest.raises(PackError, match="other images"):
        packed(photos, folder)
    assert contents(folder) == expected


def test_a_destination_with_something_else_in_it(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PackError, match="file: not a folder; choose another DESTINATION"):
        packed(photos, tmp_path / "file")
    with pytest.raises(PackError, match="other: not empty, and not packed images"):
        packed(photos, Path(shutil.copytree(photos, tmp_path / "other")))
    for inside in (photos, photos / "packed"):
        with pytest.raises(PackError, match="lies in DATA, whose folders are classes; choose another DESTINATION"):
            packed(photos, inside)
    with pytest.raises(PackError, match=r"cannot be written \(Not a directory\)"):
        packed(photos, tmp_path / "file" / "packed")
    (tmp_path / "empty").mkdir()
    assert len(packed(photos, tmp_path / "empty")) == 21


def test_one_process_at_a_time(photos: Path, tmp_path: Path) -> None:
    folder = packed(photos, tmp_path / "packed").folder
    with (
        filelock.FileLock(folder / ".lock"),
        pytest.raises(PackError, match="packed: another process packs into it; wait"),
    ):
        packed(photos, folder)


def test_a_file_system_without_locks(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    assert len(packed(photos, tmp_path / "packed")) == 21


def test_odd_names(photos: Path, tmp_path: Path) -> None:
    (photos / "ant" / "0.png").rename(photos / "ant" / os.fsdecode(b"line\nbreak \xff.png"))
    (photos / "bee").rename(photos / "bée")
    images = packed(photos, tmp_path / "packed")
    assert images.class_names == ("ant", "bée", "cat")
    assert images.files[6] == str(images.folder / "ant" / os.fsdecode(b"line\nbreak \xff.png"))
    (images.folder / "00001-of-00006.array_record").unlink()
    with pytest.raises(ImageError, match="record 2") as caught:
        images[6]
    assert str(caught.value).isprintable()


def test_bad_arguments_and_nothing_to_pack(photos: Path, tmp_path: Path) -> None:
    for options in ({"shard_size": 0}, {"workers": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least"):
            pack(photos, tmp_path / "packed", **options)
    with pytest.raises(ImageError, match="none: no such folder"):
        pack(tmp_path / "none", tmp_path / "packed")
    for file in photos.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(PackError, match=r"photos: no image can be read; .*ant/0\.png: "):
        packed(photos, tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("*.array_record"))


def test_packed_photos_are_packed_as_crops(photos: Path, tmp_path: Path) -> None:
    files = packed(photos, tmp_path / "files").folder
    again = packed(files, tmp_path / "again", crops=CROPS)
    direct = packed(photos, tmp_path / "direct", crops=CROPS)
    assert again.labels == direct.labels
    assert all(np.array_equal(again[index][0], direct[index][0]) for index in range(21))
    with pytest.raises(PackError, match="again: holds crops already"):
        packed(again.folder, tmp_path / "more")


def test_rows_of_a_csv_file_keep_their_order(photos: Path, tmp_path: Path) -> None:
    rows = [("photos/cat/1.png", "b"), (photos / "ant" / "2.png", "a"), ("photos/bee/0.png", "b"), ("gone.png", "a")]
    table = tmp_path / "table.csv"
    table.write_text("image,label\n" + "".join(f"{image},{label}\n" for image, label in rows))
    assert pack(table, tmp_path / "packed", shard_size=2, workers=0).images == 3
    images = PackedImages(tmp_path / "packed")
    assert images.labels == (1, 0, 1) and images.class_names == ("a", "b")
    assert names(images.folder) == ["photos/cat/1.png", "photos/ant/2.png", "photos/bee/0.png"]
    assert images[1][0] == (photos / "ant" / "2.png").read_bytes()


def more_shards(folder: Path, before: int) -> bool:
    return len(ages(folder)) > before


def command(*words: object, **options: object) -> subprocess.Popen[str]:
    """Starts `dpn-jax pack` in a process group of its own."""
    words = [sys.executable, "-m", "dpn_jax", "pack", *map(str, words)]
    return subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_leaves_no_half_shard(photos: Path, tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "packed"
    process = command(photos, folder, "--shard-size", 15, "--workers", workers)
    # long before it writes; not in preexec_fn, whose fork JAX warns of. A shard of seven is larger, one of four is not
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    assert err.count("\n") == 1 and "00000-of-00002.array_record: cannot be written (File too large)" in err
    assert sorted(path.name for path in folder.iterdir()) == [".lock", PLAN]
    process = command(photos, folder, "--shard-size", 15, "--workers", workers)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "") and out.startswith(f"{folder}: 21 photos in 2 shards, ")
    assert names(folder) == [str(Path(file).relative_to(folder)) for file in PackedImages(folder).files]


@pytest.mark.slow
def test_the_command_skips_counts_and_names(photos: Path, tmp_path: Path) -> None:
    (photos / "bee" / "0.png").write_bytes(b"no image")
    process = command(photos, tmp_path / "packed", "--crops", "--image-size", 32)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert out.startswith(f"{tmp_path / 'packed'}: 20 crops of 32 x 32 pixels in one shard, ")
    assert err.startswith(f"dpn-jax: skipped: {photos / 'bee' / '0.png'}: not an image") and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGINT, 130, "dpn-jax: interrupted\n"), (15, 143, "")])
def test_a_signal_to_all_ends_it_quietly(tmp_path: Path, number: int, code: int, said: str) -> None:
    photos = write_classes(tmp_path / "photos", 1)
    for label in ("ant", "bee"):
        Image.effect_noise((1500, 1000), 50).save(photos / label / "0.png")
        for copy in range(1, 100):
            os.link(photos / label / "0.png", photos / label / f"{copy}.png")
    process = command(photos, tmp_path / "packed", "--shard-size", 2, start_new_session=True)
    assert wait_for(functools.partial(more_shards, tmp_path / "packed", 3), process)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", said)
    assert not [path.name for path in (tmp_path / "packed").iterdir() if path.name.endswith(".tmp")]
    assert not (tmp_path / "packed" / MANIFEST).exists() and (tmp_path / "packed" / PLAN).exists()


@pytest.mark.slow
def test_killed_and_restarted_every_image_is_there_once(tmp_path: Path) -> None:
    """Set KILLS to kill more often than four times; `.ci/exhaustive` does so ten times."""
    photos = write_classes(tmp_path / "photos", 40 + 10 * KILLS)
    big = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
    for file in photos.rglob("*.png"):  # slow enough that there are moments to be killed in
        with Image.open(file) as image:
            Image.fromarray(np.maximum(big, np.asarray(image.resize((200, 150))))).resize((800, 600)).save(file)
    folder, options = tmp_path / "packed", ("--crops", "--image-size", 32, "--shard-size", 3, "--workers", 2)
    moments = random.Random(time.time_ns())
    killed = 0
    while killed < KILLS:
        before = len(ages(folder))
        process = command(photos, folder, *options, start_new_session=True)
        if moments.random() < 0.7:  # in the middle, and not while it starts
            wait_for(functools.partial(more_shards, folder, before), process)
        time.sleep(moments.uniform(0, 1.5))
        ended = process.poll() is not None
        only_first = moments.random() < 0.5  # the workers end by themselves, or are killed too
        process.kill() if only_first else os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if ended:
            shutil.rmtree(folder)
        else:
            killed += 1
            print(f"killed {'alone' if only_first else 'with its workers'}, with {len(ages(folder))} shards done")
    process = command(photos, folder, *options)
    out, err = process.communicate(timeout=400)
    assert (process.returncode, err) == (0, ""), out
    files = sorted(file.relative_to(photos).as_posix() for file in photos.rglob("*.png"))
    assert sorted(names(folder)) == files, "each once"
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]
    crops = preprocessing(DEFAULT_TAG, image_size=32).preprocessing
    uninterrupted = packed(photos, tmp_path / "uninterrupted", crops=crops, shard_size=3).folder
    assert contents(uninterrupted) == contents(folder)
