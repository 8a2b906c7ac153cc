"""Exported models: read where dpn_jax is not, they give the model's logits."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dpn_jax
from dpn_jax import Classifier
from dpn_jax.errors import ExportError
from dpn_jax.inference.export import BACKENDS, METADATA, export_model, load_exported, read_artifact
from dpn_jax.pretrained import Provenance
from tests.support.models import TINY, randomize

READER = """
import json, sys
from pathlib import Path
import jax, jax.export
import numpy as np

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"dpn_jax", "flax"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
images = np.load(sys.argv[1])
for name in sys.argv[2:]:
    exported = jax.export.deserialize(bytearray(Path(name).read_bytes()))
    print(json.dumps([jax.jit(exported.call)(images[:size]).tolist() for size in (1, 3)]))
"""


@pytest.mark.slow
def test_a_process_without_dpn_jax_gets_the_same_logits(tmp_path: Path) -> None:
    model = randomize(dpn_jax.create_model(TINY))
    images = np.random.default_rng(0).standard_normal((3, 32, 32, 3), np.float32)
    expected = model(jnp.asarray(images))
    np.save(tmp_path / "images.npy", images)
    several = export_model(model, tmp_path / "several.jaxexport", image_size=32)
    assert several.platforms == ("tpu", "cuda", "cpu")
    one = export_model(model, tmp_path / "one.jaxexport", platforms=["cpu"], image_size=32)
    assert len(one.mlir_module()) > len(several.mlir_module())  # the CPU's own form is longer
    words = [sys.executable, "-c", READER, "images.npy", "several.jaxexport", "one.jaxexport"]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 2
    for line in ended.stdout.splitlines():
        alone, together = json.loads(line)
        np.testing.assert_allclose(alone, expected[:1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(together, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("platform", BACKENDS)
def test_every_platform_with_any_batch(platform: str, tmp_path: Path) -> None:
    model = dpn_jax.create_model(TINY, in_channels=1, dtype="bfloat16")
    export_model(model, tmp_path / "x", platforms=[platform], image_size=48)
    exported = load_exported(tmp_path / "x")
    assert exported.platforms == (platform,)
    assert [aval.str_short() for aval in (*exported.in_avals, *exported.out_avals)] == [
        "float32[b,48,48,1]",
        "float32[b,5]",
    ]


@pytest.mark.slow
def test_a_fixed_batch_and_the_weights_own_size(tmp_path: Path) -> None:
    model = dpn_jax.create_model(TINY)
    model.provenance = model.provenance._replace(preprocessing=dpn_jax.Preprocessing(image_size=40))
    model.train()  # exported in eval mode all the same
    exported = export_model(model, tmp_path / "x", platforms=["cpu"], batch_size=2)
    assert exported.in_avals[0].shape == (2, 40, 40, 3)
    model.eval()
    images = jax.random.normal(jax.random.key(0), (2, 40, 40, 3))
    np.testing.assert_allclose(exported.call(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"platforms": ["cpu", "gpu"]}, "platforms must be of tpu, cuda, rocm, cpu, got 'gpu'"),
        ({"platforms": []}, "platforms must be one or more, without repeats, got"),
        ({"platforms": ["cpu", "cpu"]}, "platforms must be one or more, without repeats, got"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"image_size": 31}, "image_size must be an integer.* of at least 32 pixels, got 31"),
    ],
    ids=str,
)
def test_unfit_arguments(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_model(dpn_jax.create_model(TINY), tmp_path / "x", **options)
    assert not list(tmp_path.iterdir())


def test_a_file_is_kept_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    path, options = tmp_path / "x", {"platforms": ["cpu"], "image_size": 32}
    path.write_text("precious")
    model = dpn_jax.create_model(TINY)
    with pytest.raises(ExportError, match=r"x: exists already; overwrite it with --force"):
        export_model(model, path, **options)
    assert path.read_text() == "precious"
    export_model(model, path, overwrite=True, **options)
    assert load_exported(path).platforms == ("cpu",)
    with pytest.raises(ExportError, match="cannot be written"):
        export_model(model, tmp_path / "no" / "such" / "folder", **options)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_damaged_files_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    export_model(dpn_jax.create_model(TINY), path, platforms=["cpu"], image_size=32)
    whole = path.read_bytes()
    for damaged in (b"", b"not exported", whole[:10], whole[:-4000], bytes(len(whole))):
        path.write_bytes(damaged)
        with pytest.raises(ExportError, match="x: not an exported model, damaged"):
            load_exported(path)


def test_images_that_are_not_square(tmp_path: Path) -> None:
    model = dpn_jax.create_model(TINY)
    model.provenance = model.provenance._replace(preprocessing=dpn_jax.Preprocessing(image_size=(32, 64)))
    written = export_model(model, tmp_path / "a", platforms=["cpu"], fast=False)
    assert written.in_avals[0].str_short() == "float32[b,32,64,3]"
    written = export_model(model, tmp_path / "b", platforms=["cpu"], fast=False, image_size=(64, 32))
    assert written.in_avals[0].str_short() == "float32[b,64,32,3]"


NAMES = ("ant", "bee", "cät", "dog", "eel")
METADATA_READER = """
import io, json, sys, zipfile
from pathlib import Path
import jax.export
import numpy as np
from PIL import Image

name, photo = sys.argv[1:]
fields = json.loads(zipfile.ZipFile(name).read("dpn_jax.json"))
settings = fields["preprocessing"]
side = settings["image_size"]
pixels = np.asarray(Image.open(photo).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
(logits,) = jax.export.deserialize(bytearray(Path(name).read_bytes())).call(pixels[None])
assert not [module for module in sys.modules if module.startswith(("dpn_jax", "flax"))]
print(json.dumps([fields["class_names"][int(logits.argmax())], fields["source"], fields["images"]]))
"""


def named(image_size: int = 32) -> dpn_jax.DPN:
    model = randomize(dpn_jax.create_model(TINY))
    settings = dpn_jax.Preprocessing(image_size=image_size, crop_fraction=1.0)
    model.provenance = Provenance("you/your-dpn", None, settings, NAMES)
    return model


@pytest.mark.slow
def test_pixels_in_and_names_out_without_dpn_jax(tmp_path: Path) -> None:
    model = named()
    export_model(model, tmp_path / "x.jaxexport", platforms=["cpu"], uint8=True)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    words = [sys.executable, "-c", METADATA_READER, "x.jaxexport", "x.png"]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    label = dpn_jax.Classifier(model)(pixels)[0].label
    assert json.loads(ended.stdout) == [label, "you/your-dpn", "uint8[b,32,32,3]"]


@pytest.mark.parametrize(("uint8", "batch_size"), [(True, None), (False, None), (True, 4), (False, 4)])
def test_an_exported_file_classifies_as_its_model(uint8: bool, batch_size: int | None, tmp_path: Path) -> None:
    model, path = named(), tmp_path / "x"
    export_model(model, path, platforms=["cpu", "tpu"], uint8=uint8, batch_size=batch_size)
    pictures = [np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8) for seed in range(7)]
    exported = Classifier.from_exported(path, batch_size=3)
    assert exported.batch_size == (batch_size or 3)
    for best, expected in zip(exported(pictures), Classifier(model)(pictures), strict=True):
        assert [prediction.label for prediction in best] == [prediction.label for prediction in expected]
        np.testing.assert_allclose([p.probability for p in best], [p.probability for p in expected], atol=1e-6)
    with pytest.raises(ValueError, match=r"the exported model needs Preprocessing\(image_size=32.*, got .*=40"):
        Classifier.from_exported(path, transform=dpn_jax.preprocessing(dpn_jax.Preprocessing(image_size=40)))
    renamed = Classifier.from_exported(path, labels="abcde")
    assert renamed(pictures[0])[0].label == "abcde"[exported(pictures[0])[0].index]


def test_imagenet_names_are_in_the_file(tmp_path: Path) -> None:
    export_model(dpn_jax.create_model(TINY, num_classes=1000), tmp_path / "x", platforms=["cpu"], image_size=32)
    classifier = Classifier.from_exported(tmp_path / "x")
    assert (classifier.labels[281], classifier.synsets[281]) == ("tabby, tabby cat", "n02123045")


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        export_model(named(), tmp_path / name, platforms=["cpu"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_files_that_do_not_say_enough(tmp_path: Path) -> None:
    path = tmp_path / "x"
    export_model(named(), path, platforms=["tpu"])
    with pytest.raises(ExportError, match="x: exported for tpu, not for cpu; export it again"):
        Classifier.from_exported(path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        text = archive.read(METADATA)
        program = whole[: archive.infolist()[0].header_offset]
    path.write_bytes(program)  # as dpn_jax 0.1.0 wrote it
    with pytest.raises(ExportError, match=r"x: does not say how to prepare images \(File is not a zip file\)"):
        read_artifact(path)
    for old, new in ((b"bicubic", b"cubic"), (b'"mean"', b'"men"'), (b"class_names", b"names"), (b"{", b"[")):
        assert old in text
        path.write_bytes(rewritten(program, text, old, new))
        with pytest.raises(ExportError, match="x: does not say how to prepare images"):
            read_artifact(path)
    for old, new in ((b'"image_size": 32', b'"image_size": 64'), (b'"ant",', b"")):
        path.write_bytes(rewritten(program, text, old, new))
        with pytest.raises(ExportError, match="x: its program and what it says of it do not agree"):
            read_artifact(path)
    for end in range(len(program), len(whole), 101):
        path.write_bytes(whole[:end])
        with pytest.raises(ExportError):
            read_artifact(path)


def rewritten(program: bytes, text: bytes, old: bytes, new: bytes) -> bytes:
    file = io.BytesIO()
    file.write(program)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(METADATA, text.replace(old, new))
    return file.getvalue()
