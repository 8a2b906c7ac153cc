"""What `save` and `convert` write, and where: nothing lost, whatever happens; no torch."""

import contextlib
import errno
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import dpn_jax
from dpn_jax import DPN, CheckpointError, DPNConfig, Preprocessing
from dpn_jax.checkpoint.files import LazyTensor
from dpn_jax.checkpoint.names import name_table
from dpn_jax.checkpoint.save import convert
from dpn_jax.checkpoint.write import write_tensors
from dpn_jax.errors import ExportError
from dpn_jax.pretrained import Provenance
from tests.support.damaged_files import refused
from tests.support.hub_server import CONFIG
from tests.support.models import TINY, assert_timms_weights, randomize

ROOT = Path(__file__).parents[2]


def test_an_existing_file_stays(tiny_file: Path, tmp_path: Path) -> None:
    model = dpn_jax.load(tiny_file)
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"precious")
    for write in (
        lambda **options: dpn_jax.save(model, path, **options),
        lambda **options: convert(tiny_file, path, **options),
    ):
        path.write_bytes(b"precious")
        with pytest.raises(CheckpointError, match="exists already"):
            write()
        assert path.read_bytes() == b"precious"
        write(overwrite=True)
        dpn_jax.load(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("alias", ["itself", "symlink", "hard link", "dots"])
def test_the_source_is_never_the_destination(alias: str, tiny_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    source.write_bytes(tiny_file.read_bytes())
    destination = tmp_path / "destination.safetensors"
    if alias == "itself":
        destination = source
    elif alias == "symlink":
        destination.symlink_to(source)
    elif alias == "hard link":
        destination.hardlink_to(source)
    else:
        destination = tmp_path / ".." / tmp_path.name / "source.safetensors"
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert(source, destination, overwrite=True)
    assert source.read_bytes() == tiny_file.read_bytes()


def test_destinations_that_cannot_be(tiny_file: Path, tmp_path: Path) -> None:
    model = dpn_jax.load(tiny_file)
    (tmp_path / "folder.safetensors").mkdir()
    for path in (
        tmp_path / "absent" / "a.safetensors",
        tmp_path / "folder.safetensors",
        tmp_path / f"{'x' * 300}.safetensors",
    ):
        for write in (
            lambda path=path: convert(tiny_file, path, overwrite=True),
            lambda path=path: dpn_jax.save(model, path, overwrite=True),
        ):
            with pytest.raises(CheckpointError, match=r"cannot be written|too long"):
                write()
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        convert(tiny_file, tmp_path / "a.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]


def test_a_reader_never_sees_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def log_fsync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append("folder to disk" if target == tmp_path else f"{target.stat().st_size} bytes to disk")
        fsync(descriptor)

    def log_replace(source: Path, target: Path) -> Path:
        assert path.read_bytes() == b"old"
        events.append("renamed")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "replace", log_replace)
    array = np.arange(1000, dtype=np.float32)
    write_tensors(path, {"a": LazyTensor(array.shape, array.dtype, lambda: array)}, {}, overwrite=True)
    assert events == [f"{path.stat().st_size} bytes to disk", "renamed", "folder to disk"]
    np.testing.assert_array_equal(safetensors.numpy.load_file(path)["a"], array)


def test_a_tensor_that_cannot_be_read_leaves_no_part(tmp_path: Path) -> None:
    def fail() -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "a.safetensors", {"a": LazyTensor((2,), np.dtype(np.float32), fail)}, {})
    assert not any(tmp_path.iterdir())


def run(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, check=False
    )


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from dpn_jax.checkpoint.files import LazyTensor
from dpn_jax.checkpoint.write import write_tensors
array = np.ones(1_000_000, np.float32)
tensors = {f"t{i}": LazyTensor(array.shape, array.dtype, lambda: array) for i in range(3)}
tensors["t3"] = LazyTensor(array.shape, array.dtype, lambda: os.kill(os.getpid(), signal.SIGKILL))
write_tensors(Path(sys.argv[1]), tensors, {}, overwrite=True)
"""


def test_killed_while_writing(tiny_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(tiny_file.read_bytes())
    assert run(KILLED, path).returncode == -signal.SIGKILL
    assert [left.suffix for left in tmp_path.iterdir() if left != path] == [".tmp"]  # it was writing
    assert path.read_bytes() == tiny_file.read_bytes()
    assert_timms_weights(dpn_jax.load(path), safetensors.numpy.load_file(tiny_file))


FULL_DISK = """
import resource, sys
import dpn_jax
from dpn_jax.checkpoint.save import convert
source, old, new = sys.argv[1:]
model = dpn_jax.load(source)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
for path in (old, new):
    for write in (lambda: convert(source, path, overwrite=True), lambda: dpn_jax.save(model, path, overwrite=True)):
        try:
            write()
        except dpn_jax.CheckpointError as error:
            print(error)
"""


def test_full_disk(tiny_file: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    old.write_bytes(b"precious")
    result = run(FULL_DISK, tiny_file, old, new)
    assert not result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert all("cannot be written" in line for line in lines)
    assert [str(path) in line for line, path in zip(lines, (old, old, new, new), strict=True)] == [True] * 4
    assert old.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [old]


# Where it may be written


def export(path: str | Path, *, overwrite: bool = False) -> None:
    model = dpn_jax.create_model(TINY)
    dpn_jax.export_model(model, path, platforms=["cpu"], image_size=32, fast=False, overwrite=overwrite)


@pytest.fixture
def writers(tiny_file: Path) -> dict[str, Callable[..., object]]:
    """Everything that writes a file."""
    return {
        "save": functools.partial(dpn_jax.save, dpn_jax.load(tiny_file)),
        "convert": functools.partial(convert, tiny_file),
        "export": export,
    }


WRITERS = pytest.mark.parametrize("writer", ["save", "convert", "export"])


@WRITERS
@pytest.mark.parametrize(
    "url",
    ["s3://bucket/run.safetensors", "gs://b/a.safetensors", "file:///tmp/a.safetensors", "hdfs+x://h:1/a.safetensors"],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_url_is_refused_before_anything_is_made(
    kind: type, url: str, writer: str, writers: dict[str, Callable[..., object]], tmp_path: Path
) -> None:
    with contextlib.chdir(tmp_path):
        with pytest.raises((CheckpointError, ExportError), match=r"a URL; only local files .* local path$") as caught:
            writers[writer](kind(url))
        assert str(caught.value).startswith(str(kind(url)))
        assert not any(tmp_path.iterdir())


def test_a_url_is_refused_before_the_source_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^s3://b/a.safetensors: a URL"):
        convert(tmp_path / "absent.pth", "s3://b/a.safetensors")


def test_names_that_are_no_urls(tiny_file: Path, tmp_path: Path) -> None:
    for name in ("a:b.safetensors", "3:/a.safetensors", "s3.safetensors"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with contextlib.chdir(tmp_path):
            convert(tiny_file, name)
            convert(tiny_file, Path(name), overwrite=True)
        dpn_jax.load(path)


@WRITERS
@pytest.mark.parametrize("special", ["/dev/full", "/dev/null", "fifo", "folder", "socket", "link to a fifo"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_only_a_regular_file_is_replaced(
    overwrite: bool, special: str, writer: str, writers: dict[str, Callable[..., object]], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    if special.startswith("/dev"):
        path.symlink_to(special)
    elif special.endswith("fifo"):
        os.mkfifo(target := path if special == "fifo" else tmp_path / "fifo")
        if target != path:
            path.symlink_to(target)
    elif special == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(tmp_path):
            listener.bind(path.name)
    before = path.stat()
    with pytest.raises((CheckpointError, ExportError), match=r"not a regular file\); name another file$"):
        writers[writer](path, overwrite=overwrite)
    assert path.stat().st_ino == before.st_ino
    assert path.stat().st_mode == before.st_mode


@WRITERS
@pytest.mark.parametrize("target", ["there", "not yet there", "through another link"])
def test_a_link_stays_and_its_target_is_written(
    target: str, writer: str, writers: dict[str, Callable[..., object]], tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    file, link = tmp_path / "store" / "file", tmp_path / "a.safetensors"
    link.symlink_to(Path("store", "file"))
    if target == "through another link":
        file, middle = tmp_path / "store" / "last", file
        middle.symlink_to("last")
    if target == "there":
        file.write_bytes(b"old")
        with pytest.raises((CheckpointError, ExportError), match="exists already"):
            writers[writer](link)
    writers[writer](link, overwrite=True)
    assert link.readlink() == Path("store", "file")
    assert not file.is_symlink()
    assert file.stat().st_size > 1000
    assert {path.name for path in (tmp_path / "store").iterdir()} <= {"file", "last"}


def test_a_circle_of_links(writers: dict[str, Callable[..., object]], tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "a.safetensors")
    for write in writers.values():
        with pytest.raises((CheckpointError, ExportError), match="cannot be written"):
            write(tmp_path / "a.safetensors", overwrite=True)


@WRITERS
@pytest.mark.parametrize("name", ["x" * 243, "é" * 121])
def test_the_longest_legal_name(
    name: str, writer: str, writers: dict[str, Callable[..., object]], tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.safetensors"
    assert 254 <= len(os.fsencode(path.name)) <= 255
    writers[writer](path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_folder_that_cannot_be_synced(
    call: str, tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CIFS, some FUSE file systems and Windows: the file is complete all the same."""
    real = getattr(os, call)

    def fail(target: object, *arguments: object) -> object:
        place = target if call == "open" else Path(f"/proc/self/fd/{target}").readlink()
        if place == tmp_path:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(target, *arguments)

    monkeypatch.setattr(os, call, fail)
    convert(tiny_file, tmp_path / "a.safetensors")
    monkeypatch.undo()
    dpn_jax.load(tmp_path / "a.safetensors")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_cannot_be_synced_is_not_written(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"cannot be written \(Input/output error\)"):
        convert(tiny_file, tmp_path / "a.safetensors")
    assert not any(tmp_path.iterdir())


# What may be written


def test_a_stock_models_tensors_must_be_readable(tiny_file: Path, tmp_path: Path) -> None:
    model = dpn_jax.load(tiny_file)
    model.stem.norm.scale.set_value(model.stem.norm.scale[...].astype(jnp.int32))
    with pytest.raises(CheckpointError, match=r"not floating-point \(first: stem\.norm\.scale: int32\)"):
        dpn_jax.save(model, tmp_path / "a.safetensors")
    assert not any(tmp_path.iterdir())


def test_another_shape_is_a_change_that_loading_names(tiny_file: Path, tmp_path: Path) -> None:
    model = dpn_jax.load(tiny_file)
    model.stem.norm.scale.set_value(jnp.ones(7))
    dpn_jax.save(model, tmp_path / "a.safetensors")
    with pytest.raises(
        CheckpointError, match=r"a changed model's file \(stem\.norm scale is a Param \[7\], not a Param \[8\]"
    ):
        dpn_jax.load(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"stem\.norm\.scale: \[7\], expected \[8\]"):
        dpn_jax.load(tmp_path / "a.safetensors", into=dpn_jax.load(tiny_file))


@pytest.mark.parametrize(
    "changes",
    [
        {"source": Path("a")},
        {"sha256": 5},
        {"class_names": "abcde"},
        {"class_names": [1, 2]},
        {"preprocessing": {"image_size": 224}},
        {"preprocessing": "center"},
    ],
)
def test_a_provenance_that_could_not_be_read_back(changes: dict[str, object], tiny_file: Path, tmp_path: Path) -> None:
    model = dpn_jax.load(tiny_file)
    model.provenance = model.provenance._replace(**changes)
    with pytest.raises(ValueError, match=r"^model\.provenance cannot be saved \("):
        dpn_jax.save(model, tmp_path / "a.safetensors")
    assert not any(tmp_path.iterdir())


# What is kept in timm's layout


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata()


PREPARED = Preprocessing(image_size=(64, 96), crop_mode="squash", mean=(0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("known", "config"),
    [
        ({"class_names": tuple("abcde")}, TINY),
        ({"preprocessing": PREPARED}, TINY),
        ({"class_names": tuple("abcde"), "preprocessing": PREPARED, "sha256": "ab" * 32}, TINY),
        ({}, TINY.replace(global_pool="avgmax", drop_rate=0.25)),
        ({}, TINY.replace(outer_activation="silu")),
    ],
)
def test_timms_layout_keeps_what_is_known(known: dict[str, object], config: DPNConfig, tmp_path: Path) -> None:
    model = randomize(DPN(config, rngs=None))
    model.provenance = Provenance(source="mine", **known)
    flax, timm, again = (tmp_path / f"{name}.safetensors" for name in ("flax", "timm", "again"))
    dpn_jax.save(model, flax)
    convert(flax, timm)
    with safetensors.safe_open(timm, framework="numpy") as file:
        assert file.metadata()["format"] == "pt"  # without which others refuse it
        assert set(file.keys()) == {entry.timm for entry in name_table(config)}
    loaded = dpn_jax.load(timm)
    assert (loaded.config, loaded.provenance) == (config, model.provenance)
    convert(timm, again)
    with (
        safetensors.safe_open(again, framework="numpy") as ours,
        safetensors.safe_open(flax, framework="numpy") as first,
    ):
        assert ours.metadata() == first.metadata()
    convert(again, timm, overwrite=True)
    assert dpn_jax.load(timm).provenance == model.provenance


def test_where_nothing_is_known_nothing_is_added(tiny_file: Path) -> None:
    assert metadata(tiny_file) == {"format": "pt"}


def test_config_json_goes_before_what_the_file_keeps(tmp_path: Path) -> None:
    model = randomize(DPN(TINY, rngs=None))
    model.provenance = Provenance(source="mine", class_names=tuple("abcde"), preprocessing=PREPARED)
    dpn_jax.save(model, tmp_path / "flax.safetensors")
    convert(tmp_path / "flax.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert dpn_jax.from_pretrained(tmp_path).provenance.class_names == ("ant", "bee", "cat", "dog", "eel")
    assert dpn_jax.load(tmp_path / "model.safetensors").provenance == model.provenance


@pytest.mark.parametrize("text", ["", "{", "5", "null", "[" * 100_000, "{}", '{"config": "{}"}', '{"config": 1}'])
def test_damaged_metadata_in_timms_layout(text: str, tiny_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    metadata = {"format": "pt", "dpn_jax": text}
    safetensors.numpy.save_file(safetensors.numpy.load_file(tiny_file), path, metadata=metadata)
    assert "damaged metadata" in refused(path)


def test_metadata_of_somebody_elses(tiny_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    metadata = {"format": "pt", "config": "x", "provenance": "y"}
    safetensors.numpy.save_file(safetensors.numpy.load_file(tiny_file), path, metadata=metadata)
    assert dpn_jax.load(path).config == TINY
