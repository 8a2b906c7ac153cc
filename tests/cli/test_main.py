"""The `dpn-jax` command, in this process or, where signals and exits are tested, in another."""

import csv
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import flax
import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dpn_jax
from dpn_jax.cli.cache import keep_compiled
from dpn_jax.cli.main import main
from dpn_jax.images.folders import image_files
from dpn_jax.inference.export import load_exported
from dpn_jax.inference.pipeline import Pipeline
from tests.support.models import TINY

COMMAND = [sys.executable, "-m", "dpn_jax"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model = dpn_jax.create_model(TINY, rngs=nnx.Rngs(0))
    model.provenance = model.provenance._replace(
        preprocessing=dpn_jax.Preprocessing(image_size=32), class_names=("ant", "bee", "cat", "dog", "eel")
    )
    dpn_jax.save(model, path)
    return path


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that these tests start leave nothing in the user's cache folder."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.jpg", "more/c.png"]):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command; returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


Run = Callable[..., tuple[int, str, str]]


def test_table_names_every_photo_of_a_folder(run: Run, weights: Path, photos: Path) -> None:
    code, out, err = run("classify", photos, "--weights", weights, "--top-k", 2)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        str(photos / n) for n in ("a.png", "b.jpg", "more/c.png")
    ]
    assert len(lines) == 9
    assert all(
        line.split()[0].endswith("%") and line.split()[1] in "ant bee cat dog eel" for line in lines if line[0] == " "
    )


def test_json_and_csv_tell_the_same(run: Run, weights: Path, photos: Path) -> None:
    options = ("classify", photos, "--weights", weights, "--batch-size", 2, "--format")
    code, out, _ = run(*options, "json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(rows) == 3
    assert {p["label"] for p in rows[0]["predictions"]} == {"ant", "bee", "cat", "dog", "eel"}
    code, out, _ = run(*options, "csv")
    table = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and len(table) == 15
    assert [(row["image"], row["label"]) for row in table] == [
        (row["image"], prediction["label"]) for row in rows for prediction in row["predictions"]
    ]
    probabilities = [p["probability"] for row in rows for p in row["predictions"]]
    np.testing.assert_allclose([float(row["probability"]) for row in table], probabilities, atol=1e-6)


def test_batches_are_as_large_as_asked(run: Run, weights: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, dispatch = [], Pipeline._dispatch
    monkeypatch.setattr(
        Pipeline,
        "_dispatch",
        lambda self, images, size: sizes.append((len(images), size)) or dispatch(self, images, size),
    )
    assert run("classify", photos, "--weights", weights, "--batch-size", 2)[0] == 0
    assert sizes == [(2, 2), (1, 2)]


def test_the_rest_of_a_batch_is_done(run: Run, weights: Path, photos: Path) -> None:
    (photos / "b.jpg").write_bytes((photos / "b.jpg").read_bytes()[:300])
    (photos / "empty").mkdir()
    arguments = ("classify", photos, photos / "no.jpg", photos / "empty", "--weights", weights, "--format", "json")
    code, out, err = run(*arguments)
    assert code == 1
    assert [Path(json.loads(line)["image"]).name for line in out.splitlines()] == ["a.png", "c.png"]
    assert len(err.splitlines()) == 3
    assert all(line.startswith("dpn-jax: ") for line in err.splitlines())
    assert "b.jpg" in err and "no.jpg" in err and "empty: no images" in err


def test_file_names_that_are_hard_to_print(run: Run, weights: Path, tmp_path: Path) -> None:
    names = ["two\nlines.png", os.fsdecode(b"caf\xe9.png")]
    for name in names:
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    found = [tmp_path / name for name in names]
    code, out, _ = run("classify", *found, "--weights", weights, "--top-k", 1)
    assert code == 0 and len(out.splitlines()) == 4
    code, out, _ = run("classify", *found, "--weights", weights, "--top-k", 1, "--format", "json")
    assert [json.loads(line)["image"] for line in out.splitlines()] == [str(path) for path in found]
    for path in found:
        path.write_bytes(b"")
    code, out, err = run("classify", *found, "--weights", weights)
    assert (code, out, len(err.splitlines())) == (2, "", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", "0"], "--top-k must be at least 1, got 0"),
        (["--top-k", "6"], "top_k must be 1 to 5, got 6"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--image-size", "31"], "at least 32 pixels, got 31"),
        (["--device", "tpu"], "--device tpu: there is no such device here"),
        (["--devices", "9"], "--devices must be all or 1 to 1 here (cpu), got 9"),
        (["--devices", "0"], "--devices must be all or 1 to 1 here (cpu), got 0"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--exported", "x"], "--weights has no effect with --exported, whose model is complete"),
        (["--processes", "2"], "--coordinator, --processes and --process-index must be given together"),
        (["--labels", "LABELS"], "2 labels"),
        (["--model", "dpn29"], "unknown model 'dpn29'; did you mean dpn98 or dpn92"),
        (["--test-time-pool"], "test_time_pool is 7 but the features are only"),
    ],
)
def test_bad_options_are_one_line(
    run: Run, weights: Path, photos: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "LABELS").write_text("cat\ndog\n")
    options = [str(tmp_path / word) if word == "LABELS" else word for word in options]
    code, out, err = run("classify", photos, "--weights", weights, *options)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


def test_version(run: Run) -> None:
    expected = f"dpn_jax {dpn_jax.__version__} (jax {jax.__version__}, flax {flax.__version__})\n"
    assert run("--version") == (0, expected, "")
    ended = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, expected, "")


def test_the_module_is_the_same_command(run: Run) -> None:
    for words in (["--help"], ["models"], ["models", "--no-such-option"]):
        ended = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=120)
        assert (ended.returncode, ended.stdout, ended.stderr) == run(*words)


@pytest.mark.parametrize(
    ("command", "positionals"),
    [
        ("classify", "IMAGE_OR_FOLDER..."),
        ("evaluate", "DATA"),
        ("embed", "IMAGE_OR_FOLDER..."),
        ("convert", "SOURCE DESTINATION"),
        ("export", "DESTINATION"),
        ("pack", "DATA DESTINATION"),
        ("models", ""),
    ],
)
def test_help_names_positionals_and_fits_80_columns(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, positionals: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].endswith(f"] {positionals}".rstrip())
    assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize("words", [[], ["classify"], ["clasify", "x.jpg"], ["classify", "x.jpg", "--top-q", "5"]])
def test_wrong_words_exit_with_2(run: Run, words: list[str]) -> None:
    code, out, err = run(*words)
    assert code == 2 and not out and "Traceback" not in err and err


def test_nothing_to_do(run: Run, weights: Path, tmp_path: Path) -> None:
    code, out, err = run("classify", tmp_path / "no.jpg", "--weights", weights)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    code, _, err = run("classify", tmp_path / "no.jpg", "--weights", tmp_path / "no.safetensors")
    assert code == 2 and len(err.splitlines()) == 1


def test_labels_and_preprocessing_can_be_given(run: Run, weights: Path, photos: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("eins\nzwei\ndrei\nvier\nfünf\n", encoding="utf-8")
    code, out, err = run(
        "classify", photos / "a.png", "--weights", weights, "--labels", labels, "--image-size", 64, "--top-k", 5
    )
    assert (code, err) == (0, "")
    assert sorted(line.split()[1] for line in out.splitlines()[1:]) == ["drei", "eins", "fünf", "vier", "zwei"]


def test_weights_without_preprocessing_are_announced(run: Run, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    dpn_jax.save(dpn_jax.create_model(TINY, rngs=nnx.Rngs(0)), path)
    code, _, err = run("classify", photos / "a.png", "--weights", path)
    assert code == 0 and len(err.splitlines()) == 1 and "has no preprocessing; using 224 pixels" in err


def test_models_lists_every_variant_and_tag(run: Run) -> None:
    code, out, err = run("models")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:]] == [
        "dpn48b",
        *sorted(dpn_jax.list_pretrained(), key=_order),
    ]
    _, out, _ = run("models", "--format", "json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows[4]["weights"] == "dpn92.mx_in1k" and rows[4]["parameters"] == 37668392
    _, out, _ = run("models", "--format", "csv")
    assert [row["variant"] for row in csv.DictReader(io.StringIO(out))] == [row["variant"] for row in rows]


def _order(tag: str) -> tuple[int, str]:
    return dpn_jax.list_models().index(tag.split(".")[0]), tag


def test_convert_there_and_back(run: Run, tiny_timm_file: Path, tmp_path: Path) -> None:
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    code, out, err = run("convert", tiny_timm_file, ours)
    assert (code, err) == (0, "") and "flax layout" in out
    code, out, _ = run("convert", ours, back)
    assert code == 0 and "timm layout" in out
    assert back.read_bytes() == tiny_timm_file.read_bytes()
    code, out, err = run("convert", tiny_timm_file, ours)
    assert code == 2 and "exists already" in err and "--force" in err and len(err.splitlines()) == 1
    assert run("convert", tiny_timm_file, ours, "--force")[0] == 0
    code, _, err = run("convert", tiny_timm_file, tmp_path / "x.pth")
    assert code == 2 and ".safetensors" in err


def test_a_longer_run_says_how_fast_it_was(run: Run, weights: Path, photos: Path) -> None:
    options = ("classify", *[photos / "a.png"] * 5, "--weights", weights, "--format", "json", "--batch-size", 1)
    code, out, err = run(*options)
    assert (code, len(out.splitlines())) == (0, 5)
    assert re.fullmatch(
        r"dpn-jax: [\d.]+ images/s; the (host|device) was the limit \(the (?!\1)(host|device) could do [\d.]+\)\n", err
    )


@pytest.fixture
def classes(photos: Path) -> Path:
    """The same photos in class folders."""
    (photos / "a.png").rename(photos / "more" / "a.png")
    (photos / "bee").mkdir()
    (photos / "b.jpg").rename(photos / "bee" / "b.jpg")
    (photos / "more").rename(photos / "ant")
    return photos


def test_evaluate_counts_what_classify_says(run: Run, weights: Path, classes: Path) -> None:
    _, out, _ = run("classify", classes, "--weights", weights, "--format", "json")
    rows = [json.loads(line) for line in out.splitlines()]
    right = sum(Path(row["image"]).parent.name == row["predictions"][0]["label"] for row in rows)
    code, out, err = run("evaluate", classes, "--weights", weights, "--format", "json", "--batch-size", 2)
    assert (code, err) == (0, "")
    expected = {"images": 3, "failed": 0, "top1": round(100 * right / 3, 3), "top5": 100.0, "images_per_second": None}
    assert json.loads(out).items() >= expected.items()


def test_an_exported_file_is_classified_with(run: Run, weights: Path, classes: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.jaxexport"
    code, out, _ = run("export", path, "--weights", weights, "--platforms", "cpu", "--uint8")
    assert code == 0 and "uint8[b,32,32,3] to float32[b,5] on cpu" in out
    ways = [("--exported", path, "--batch-size", 2), ("--weights", weights)]
    exported, ours = (run("classify", classes, *way, "--format", "json")[1].splitlines() for way in ways)
    for row, expected in zip(map(json.loads, exported), map(json.loads, ours), strict=True):
        assert [best["label"] for best in row["predictions"]] == [best["label"] for best in expected["predictions"]]
    assert run("evaluate", classes, *ways[0]) == run("evaluate", classes, *ways[1])
    labels = tmp_path / "labels.txt"
    labels.write_text("1\n2\n3\n4\n5\n")
    assert run("classify", classes, *ways[0], "--labels", labels, "--top-k", 1)[1].split()[-1] in "12345"
    code, out, err = run("classify", classes, "--exported", weights)
    assert (code, out) == (2, "") and "not an exported model" in err


@pytest.mark.slow
def test_workers_and_all_devices_give_the_same(weights: Path, classes: Path) -> None:
    """In a process of its own, which may have as many CPU devices as it likes."""
    options = [(), ("--workers", "2"), ("--devices", "all")]
    command = [*COMMAND, "classify", classes, "--weights", weights, "--format", "json"]
    plain, worked, everywhere = (
        subprocess.run([*command, *words], capture_output=True, text=True, timeout=300, check=True).stdout
        for words in options
    )
    assert worked == plain
    for row, expected in zip(everywhere.splitlines(), plain.splitlines(), strict=True):
        values, others = ([best["probability"] for best in json.loads(line)["predictions"]] for line in (row, expected))
        np.testing.assert_allclose(values, others, atol=1e-6)


def test_packed_images_are_classified(run: Run, weights: Path, classes: Path, tmp_path: Path) -> None:
    pytest.importorskip("array_record")
    packed = tmp_path / "packed"
    crops = ("--crops", "--model", "dpn68b.mx_in1k", "--image-size", 32)
    for name, words in ("photos", ()), ("crops", crops):
        assert run("pack", classes, packed / name, *words, "--workers", 0)[0] == 0
    options = ("--weights", weights, "--format", "json")
    expected = [json.loads(line) for line in run("classify", classes, *options)[1].splitlines()]
    for name in ("photos", "crops"):
        code, out, err = run("classify", packed / name, *options)
        assert (code, err) == (0, "")
        rows = [json.loads(line) for line in out.splitlines()]
        assert [row["predictions"] for row in rows] == [row["predictions"] for row in expected]
        assert [Path(row["image"]).relative_to(packed / name) for row in rows] == [
            Path(row["image"]).relative_to(classes) for row in expected
        ]
    code, out, err = run("classify", packed / "crops", classes, *options)
    assert (code, out) == (2, "") and "packed crops and photos cannot be classified in one run" in err
    (shard,) = (packed / "photos").glob("*.array_record")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    code, out, err = run("classify", packed / "photos", *options)
    assert code == 2 and all("truncated" in line for line in err.splitlines())


def test_an_evaluation_is_a_row_of_figures(run: Run, weights: Path, classes: Path) -> None:
    code, out, err = run("evaluate", classes, "--weights", weights, "--format", "json")
    row = json.loads(out)
    assert (code, err, row["images"], row["failed"], row["top5"]) == (0, "", 3, 0, 100)
    assert row["top1_low"] < row["top1"] < row["top1_high"] or row["top1"] in (0, 100)
    assert {"balanced_accuracy", "macro_f1", "loss", "calibration_error", "images_per_second"} <= row.keys()
    _, out, _ = run("evaluate", classes, "--weights", weights, "--format", "csv")
    assert out.splitlines()[0].split(",") == list(row)
    _, out, _ = run("evaluate", classes, "--weights", weights)
    assert out.startswith("images             3 (0 failed)\ntop-1 ") and "calibration error" in out
    assert "published" not in out, "these weights are nobody's"


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_embed_writes_what_the_classifier_reads(
    run: Run, weights: Path, classes: Path, tmp_path: Path, ending: str
) -> None:
    broken = classes / "bee" / "broken.png"
    broken.write_bytes(b"no image")
    output, words = tmp_path / f"features.{ending}", ("embed", classes, "--weights", weights, "--output")
    if ending == "parquet":
        pq = pytest.importorskip("pyarrow.parquet")
    code, out, err = run(*words, output)
    assert code == 1 and err.startswith(f"dpn-jax: {broken}: not an image")
    model = dpn_jax.load(weights)
    assert out == f"{output}: features of 3 images, {model.config.num_features} each\n"
    if ending == "npz":
        with np.load(output) as arrays:
            files, features = arrays["files"].tolist(), arrays["features"]
    else:
        table = pq.read_table(output).to_pydict()
        files, features = table["file"], np.array(table["features"], np.float32)
    assert files == [str(file) for file in image_files(classes) if "broken" not in str(file)]
    transform = dpn_jax.preprocessing(model.provenance.preprocessing)
    images = np.stack([transform(file) for file in files])
    run_plain = nnx.jit(lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True))
    np.testing.assert_allclose(features, run_plain(model, images), rtol=1e-4, atol=1e-4)
    kernel, bias = model.classifier.kernel[...][0, 0], model.classifier.bias[...]
    expected = dpn_jax.Classifier.from_pretrained(weights).logits(images)
    np.testing.assert_allclose(features @ kernel + bias, expected, rtol=1e-4, atol=1e-4)
    code, out, err = run(*words, output)
    assert (code, out) == (2, "") and "exists already" in err
    for name, message in (("features.csv", "the name must end in .npz or .parquet"), ("gone/x.npz", "gone")):
        code, out, err = run(*words, tmp_path / name)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_options_of_a_run_come_from_a_file(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("optax")
    words = ("finetune", "--output", tmp_path / "run", "--print-config")
    code, out, err = run(*words, "--epochs", 3, "--crop-scale", 0.5, 1)
    assert (code, err, json.loads(out)["epochs"]) == (0, "", 3)
    file = tmp_path / "options.json"
    for content in (out, json.dumps({"config": json.loads(out), "folder": "photos"}), '{"epochs": 3}'):
        file.write_text(content)
        code, again, err = run(*words, "--config", file, "--seed", 4)
        assert (code, err) == (0, "")
        found = json.loads(again)
        assert (found["epochs"], found["seed"]) == (3, 4)
        assert found["crop_scale"] == ([0.35, 1.0] if content == '{"epochs": 3}' else [0.5, 1.0])
    file.write_text('{"fast": false, "remat": true}')
    for flags, expected in (
        ((), [False, True]),
        (("--no-fast", "--remat"), [False, True]),
        (("--fast",), [True, True]),
    ):
        code, out, err = run(*words, "--config", file, *flags)
        assert (code, err, [json.loads(out)[key] for key in ("fast", "remat")]) == (0, "", expected)
    assert not (tmp_path / "run").exists()
    for content, message in (('{"epochz": 3}', "epochz"), ("[]", "options.json"), ('{"epochs": 0}', "epochs must be")):
        file.write_text(content)
        code, out, err = run(*words, f"--config={file}")
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_a_report_of_an_evaluation(
    run: Run, weights: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("pyarrow")
    folder, words = tmp_path / "report", ("evaluate", classes, "--weights", weights, "--format", "json")
    code, out, err = run(*words, "--report", folder)
    assert code == 0 and f"dpn-jax: the report is {folder / 'report.html'}" in err.splitlines()
    assert {path.name for path in folder.iterdir()} == {
        "report.html", "predictions.csv", "confusion.csv", "results.json"
    }  # fmt: skip
    found = json.loads((folder / "results.json").read_text())
    row = json.loads(out)
    assert found.items() >= (row | {"images_per_second": found["images_per_second"]}).items()
    assert (found["model"], found["img_size"], found["data"]) == (str(weights), 32, str(classes))
    code, out, err = run(*words, "--report", folder)
    assert (code, out) == (2, "") and err == f"dpn-jax: {folder}: is there already; --force writes the report over it\n"
    assert run(*words, "--report", folder, "--force")[0] == 0
    assert run(*words, "--report", folder, "--force", "--predictions", "parquet")[0] == 0
    assert not (folder / "predictions.csv").exists() and (folder / "predictions.parquet").exists()
    code, out, err = run(*words, "--predictions", "parquet")
    assert (code, out) == (2, "") and "--predictions parquet is of a report; name its folder: --report FOLDER" in err
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pyarrow" else find_spec(name))
    code, out, err = run(*words, "--report", tmp_path / "new", "--predictions", "parquet")
    assert (code, out, (tmp_path / "new").exists()) == (2, "", False)
    assert err == "dpn-jax: --predictions parquet: pyarrow writes Parquet: pip install pyarrow, or --predictions csv\n"
    (folder / "classes.txt").write_text("ant\ncat\n")
    code, out, err = run(*words, "--valid-labels", folder / "classes.txt")
    assert (code, out) == (2, "") and "its class, 'bee', is not among valid_labels" in err
    (folder / "classes.txt").write_text("ant\nbee\n")
    code, out, err = run(*words, "--valid-labels", folder / "classes.txt")
    assert code == 0 and json.loads(out)["top5"] == 100 and json.loads(out)["top1"] >= row["top1"]
    (folder / "real.json").write_text("[[0]]")
    code, out, err = run(*words, "--real-labels", folder / "real.json")
    assert (code, out) == (2, "") and "must be named ILSVRC2012_val_NUMBER, NUMBER from 1 to 1" in err


def test_pack_then_evaluate(run: Run, weights: Path, classes: Path, tmp_path: Path) -> None:
    pytest.importorskip("array_record")
    _, expected, _ = run("evaluate", classes, "--weights", weights, "--format", "json")
    broken = classes / "bee" / "broken.png"
    broken.write_bytes(b"no image")
    crops = ("--crops", "--model", "dpn68b.mx_in1k", "--image-size", 32)  # only the geometry counts
    for words, what in ((), "photos"), (crops, "crops of 32 x 32 pixels"):
        folder = tmp_path / "packed" / what.split()[0]
        for _ in range(2):  # the second time, what is there is kept
            code, out, err = run("pack", classes, folder, *words, "--workers", 0, "--shard-size", 2)
            assert code == 1 and out.startswith(f"{folder}: 3 {what} in 2 shards, ")
            assert err.startswith(f"dpn-jax: skipped: {broken}: not an image") and err.count("\n") == 1
        assert run("evaluate", folder, "--weights", weights, "--format", "json") == (0, expected, "")
    code, out, err = run("evaluate", folder, "--weights", weights, "--image-size", 40)
    assert (code, out) == (2, "") and "crops: its crops have image_size 32, but image_size 40 is needed" in err
    assert err.count("\n") == 1
    shard = folder / "00001-of-00002.array_record"
    shard.write_bytes(shard.read_bytes()[:1000])
    code, out, err = run("evaluate", folder, "--weights", weights, "--format", "json")
    assert (code, json.loads(out)["images"], json.loads(out)["failed"]) == (1, 2, 1)
    assert "00001-of-00002.array_record: record 0 (bee/b.jpg): the shard is truncated" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none", "packed"), "none: no such folder"),
        (("photos/b.jpg", "packed"), "b.jpg: is not a folder"),
        (("photos", "photos"), "photos: lies in DATA, whose folders are classes; choose another DESTINATION"),
        (
            ("photos", "packed", "--image-size", "32"),
            "--model, --image-size and --use-test-size say how to crop: add -",
        ),
        (("photos", "packed", "--crops", "--model", "dpn68"), "dpn68"),
        (("photos", "packed", "--shard-size", "0"), "shard_size must be at least 1, got 0"),
        (("photos", "s3://bucket/packed"), "s3://bucket/packed: a URL"),
    ],
)
def test_what_cannot_be_packed_is_one_line(
    run: Run, classes: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("array_record")
    (classes / "b.jpg").touch()
    monkeypatch.chdir(classes.parent)
    code, out, err = run("pack", *words, "--workers", "0")
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    assert not Path("packed").exists()


def test_evaluate_lists_broken_images(run: Run, weights: Path, classes: Path) -> None:
    (classes / "bee" / "b.jpg").write_bytes(b"no image")
    code, out, err = run("evaluate", classes, "--weights", weights, "--format", "json")
    assert (code, json.loads(out)["images"], json.loads(out)["failed"]) == (1, 2, 1)
    assert len(err.splitlines()) == 1 and "b.jpg: not an image" in err
    for path in classes.rglob("*.png"):
        path.write_bytes(b"")
    code, out, err = run("evaluate", classes, "--weights", weights)
    assert (code, out, len(err.splitlines())) == (2, "", 3)
    (classes / "bee").rename(classes / "wasp")
    code, out, err = run("evaluate", classes, "--weights", weights)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and "'wasp'; its classes are 'ant', 'bee'" in err


def test_export_writes_one_file(run: Run, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.jaxexport"
    command = ("export", path, "--weights", weights, "--platforms", "cpu", "cuda")
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert out.startswith(f"{path}: float32[b,32,32,3] to float32[b,5] on cpu, cuda, {path.stat().st_size:,} bytes; ")
    assert "crop 0.875" in out
    code, out, err = run(*command)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and "exists already; overwrite it with --force" in err
    assert run(*command, "--force", "--batch-size", 3, "--image-size", 64)[0] == 0
    assert load_exported(path).in_avals[0].shape == (3, 64, 64, 3)
    code, out, err = run("export", path, "--weights", weights, "--platforms", "abacus")
    assert code == 2 and not out and "abacus" in err


def test_the_cache_folder_is_the_users(
    compiled_once: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    def chosen(before: str | None = None) -> str | None:
        jax.config.update("jax_compilation_cache_dir", before)
        with warnings.catch_warnings():
            keep_compiled()
        return jax.config.jax_compilation_cache_dir

    assert jax.config.jax_compilation_cache_dir == compiled_once, "main([...]) has set it"
    request.addfinalizer(lambda: jax.config.update("jax_compilation_cache_dir", compiled_once))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert chosen() == str(tmp_path / "cache" / "dpn-jax" / "xla")
    assert (tmp_path / "cache" / "dpn-jax" / "xla").is_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert chosen() == str(tmp_path / ".cache" / "dpn-jax" / "xla")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert chosen() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert chosen(before="elsewhere") == "elsewhere"


@pytest.mark.slow
def test_what_is_compiled_is_kept_for_the_next_process(weights: Path, photos: Path, tmp_path: Path) -> None:
    def classify(**environment: object) -> None:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
        ended = subprocess.run(
            [*COMMAND, "classify", photos, "--weights", weights],
            env=inherited
            | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            | {key: str(value) for key, value in environment.items()},
            capture_output=True,
            timeout=120,
        )
        assert (ended.returncode, ended.stderr) == (0, b"")

    def kept(folder: Path) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    classify(XDG_CACHE_HOME=tmp_path)
    first = kept(tmp_path / "dpn-jax" / "xla")
    assert any("apply" in name for name in first)
    classify(XDG_CACHE_HOME=tmp_path)
    assert kept(tmp_path / "dpn-jax" / "xla") == first
    classify(XDG_CACHE_HOME=tmp_path, JAX_COMPILATION_CACHE_DIR=tmp_path / "other")
    assert kept(tmp_path / "dpn-jax" / "xla") == first
    assert len(kept(tmp_path / "other")) == len(first)
    for path in (tmp_path / "other").iterdir():
        path.write_bytes(b"damaged")
    classify(JAX_COMPILATION_CACHE_DIR=tmp_path / "other")
    classify(JAX_COMPILATION_CACHE_DIR=weights)  # a file
    classify(XDG_CACHE_HOME=weights)


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_quietly(weights: Path, photos: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [*COMMAND, "classify", photos, "--weights", weights], stdout=write, stderr=subprocess.PIPE, timeout=120
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.slow
def test_a_full_disk_is_one_line(weights: Path, photos: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [*COMMAND, "classify", photos, "--weights", weights], stdout=full, stderr=subprocess.PIPE, timeout=120
        )
    assert ended.returncode == 2
    assert ended.stderr.decode().splitlines() == ["dpn-jax: output: No space left on device"]


@pytest.mark.slow
def test_ctrl_c_ends_it_cleanly(weights: Path, photos: Path) -> None:
    many = [str(photos / "a.png")] * 5_000
    with subprocess.Popen(
        [*COMMAND, "classify", *many, "--weights", weights], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        child.stdout.readline()  # it is at work
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err.decode()
    assert err.decode().splitlines() == ["dpn-jax: interrupted"]


def test_ctrl_c_during_a_collection_is_not_lost() -> None:
    script = """
import gc, signal, sys, time
from dpn_jax.cli.main import guarded

def interrupt(phase, info):  # JAX has such a hook; what it raises is dropped
    if phase == "start":
        signal.raise_signal(signal.SIGINT)

def command(words):
    gc.callbacks.append(interrupt)
    gc.collect()
    gc.callbacks.remove(interrupt)
    time.sleep(30)
    return 0

sys.exit(guarded(command))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, "dpn-jax: interrupted\n")
