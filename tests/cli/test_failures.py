"""Whatever goes wrong in a command is one line on stderr and an exit code, never a traceback."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dpn_jax
from convert.command import run as run_script
from dpn_jax.cli.classify import print_predictions
from dpn_jax.cli.main import guarded, main
from dpn_jax.cli.models import Models
from dpn_jax.cli.options import find_devices
from dpn_jax.cli.output import note, print_rows, progress
from dpn_jax.cli.words import COMMANDS, TIMM_OPTIONS
from dpn_jax.inference.prediction import Prediction
from tests.support.models import TINY

COMMAND = [sys.executable, "-m", "dpn_jax"]
DIGIT = Path(__file__).parents[2] / "samples" / "digits" / "0.png"
JAX_HAS_NO_CUDA = (
    "Unable to initialize backend 'cuda': Backend 'cuda' is not in the list of known backends: ['cpu', 'tpu']. "
    "(set JAX_PLATFORMS='' to automatically choose an available backend)"
)


def failing(error: BaseException) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise error

    return fail


FAILURES = [
    (KeyError("stem"), "unexpected KeyError: 'stem'; please report what --traceback prints"),
    (AssertionError(), "unexpected AssertionError: AssertionError; please report what --traceback prints"),
    (TypeError("two\nlines\x1b[31m"), r"unexpected TypeError: 'two lines\x1b[31m'; please report"),
    (MemoryError("Unable to allocate 3 TiB"), "out of memory (Unable to allocate 3 TiB); free some, or use a smaller"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "out of memory (RESOURCE_EXHAUSTED: Out of mem"),
    (jax.errors.JaxRuntimeError("INTERNAL: a bug"), "unexpected JaxRuntimeError: INTERNAL: a bug; please report"),
    (RuntimeError(JAX_HAS_NO_CUDA), "JAX finds no device (Unable to initialize backend 'cuda': "),
    (PermissionError(13, "Permission denied", "a\nb"), r"'a\nb': Permission denied"),
    (OSError(28, "No space left on device"), "output: No space left on device"),
    (TimeoutError("the hub does not answer"), "TimeoutError: the hub does not answer"),
    (ValueError("x" * 353_469), "xxxx"),
]


@pytest.mark.parametrize(("error", "line"), FAILURES, ids=lambda value: type(value).__name__)
def test_every_exception_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    monkeypatch.setattr("dpn_jax.cli.main.abandon_stdout", lambda: None)  # pytest's
    monkeypatch.setattr(Models, "run", failing(error))
    assert main(["models"]) == 2
    short = capsys.readouterr().err
    assert short.startswith(f"dpn-jax: {line}") and short.endswith("\n")
    assert short[:-1].isprintable() and len(short) < 1100
    for words in (["--traceback", "models"], ["models", "--traceback", "--format", "json"]):
        assert main(words) == 2
        full = capsys.readouterr().err
        assert full.startswith("Traceback") and full.endswith(short) and "in fail" in full


def test_scripts_have_the_same_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(failing(KeyError("stem")), []) == 2
    assert capsys.readouterr().err.startswith("dpn-jax: unexpected KeyError")
    assert run_script(lambda: failing(KeyError("stem"))(), ["--traceback"]) == 2
    assert capsys.readouterr().err.startswith("Traceback")


def test_memory_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda _: jnp.zeros(1 << 50, jnp.uint8).block_until_ready(), []) == 2
    assert capsys.readouterr().err.startswith("dpn-jax: out of memory (RESOURCE_EXHAUSTED")


@pytest.mark.slow
def test_a_backend_that_is_not_there(tmp_path: Path) -> None:
    def classify(platforms: str) -> subprocess.CompletedProcess[str]:
        words = ["classify", str(DIGIT), "--model", "dpn_tiny.digits", "--format", "json"]
        environment = {**os.environ, "JAX_PLATFORMS": platforms}
        return subprocess.run([*COMMAND, *words], env=environment, capture_output=True, text=True, timeout=120)

    ended = classify("cuda")
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("dpn-jax: JAX finds no device (")
    assert ended.stderr.endswith("; set JAX_PLATFORMS=cpu to run on the CPU\n")
    ended = classify("cpu")
    assert ended.returncode == 0 and json.loads(ended.stdout)["predictions"][0]["label"] == "0"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "Expected one of {classify, evaluate, embed, finetune, convert, export, pack, models}; For full helptext"),
        (["clasify", "x.jpg"], "Unrecognized options: clasify, x.jpg; Available subcommands: classify, "),
        (["classify", "x.jpg", "--top-q", "5"], "Unrecognized options: --top-q, 5; Perhaps you meant: --top-k K "),
        (["classify", "x.jpg", "--top-k"], "Missing value for argument '--top-k'"),
        (["classify", "x.jpg", ""], "the name of a photo or folder is empty"),
        (["models", "--format", "xml"], "invalid choice 'xml' for argument '--format'"),
        (["finetune", "x", "--output", "run", "--epochs", "0"], "epochs must be an integer of at least 1, got 0"),
        (["finetune", "x", "--output", "run", "--lr=0.1"], "timm's --lr is --learning-rate here; Unrecognized options"),
        (["finetune", "x", "--output", "run", "-b", "8"], "timm's -b is --batch-size here; Unrecognized options: -b"),
    ],
)
def test_wrong_words_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    assert main(words) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert line in printed.err


def test_what_is_suggested_for_timms_options_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert "--traceback" in text
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    options = {word.strip(",|") for word in capsys.readouterr().out.split() if word.startswith("-")}
    assert {suggestion.split()[0] for suggestion in TIMM_OPTIONS.values()} <= options
    assert not TIMM_OPTIONS.keys() & options


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("utf-8", "100.00%  Käse → \U0001f9c0 \udce9"),
        ("cp1252", "100.00%  Käse \\u2192 \\U0001f9c0 \udce9"),
        ("ascii", "100.00%  K\\xe4se \\u2192 \\U0001f9c0 \udce9"),
    ],
)
def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch, encoding: str, printed: str) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
    row = {"label": "Käse → \U0001f9c0 \udce9"}  # and a byte of a file name that is not UTF-8

    def command(_: list[str]) -> int:
        print_rows([row], "csv", "")
        print(f"100.00%  {row['label']}")
        return 0

    assert guarded(command, []) == 0
    assert buffer.getvalue().splitlines()[-1] == printed.encode(encoding, "surrogateescape")


def test_json_never_holds_nan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    model = dpn_jax.create_model(TINY, rngs=nnx.Rngs(0))
    model.classifier.bias.set_value(jnp.full(5, jnp.nan))
    classifier = dpn_jax.Classifier(model, transform=dpn_jax.preprocessing(dpn_jax.Preprocessing(image_size=32)))
    print_predictions("a.png", classifier(np.zeros((40, 40, 3), np.uint8)), "json")
    print_predictions("a.png", [Prediction("ant", float("inf"), 0)], "json")
    print_rows([{"top1": float("nan"), "images": 3}], "json", "")
    lines = [json.loads(line, parse_constant=refuse) for line in capsys.readouterr().out.splitlines()]
    assert [prediction["probability"] for prediction in lines[0]["predictions"]] == [None] * 5
    assert lines[2] == {"top1": None, "images": 3}


def test_closed_outputs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["models"]) == 2
    assert capsys.readouterr().err == "dpn-jax: standard output is closed; send it to a file, or to /dev/null\n"
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stderr", None)
    note("lost")
    assert list(progress([1, 2], 2, "image")) == [1, 2]
    assert capsys.readouterr().out == ""


TOUCHES = """
import jax
from jax._src import xla_bridge
from dpn_jax.cli.options import find_devices

touched = []
xla_bridge.register_backend_factory("other", lambda: touched.append(1), priority=500)
print(find_devices("cpu")[0].platform, jax.numpy.zeros(1), touched)
"""


def test_a_device_that_is_asked_for_is_the_only_one_that_is_initialized() -> None:
    ended = subprocess.run([sys.executable, "-c", TOUCHES], capture_output=True, text=True, timeout=120)
    assert (ended.stdout, ended.stderr) == ("cpu [0.] []\n", "")


def test_a_device_kind_that_is_not_there_leaves_the_choice_as_it_was() -> None:
    before = jax.config.jax_platforms
    with pytest.raises(ValueError, match="--device abacus: there is no such device here, only cpu"):
        find_devices("abacus")
    assert jax.config.jax_platforms == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_ctrl_c_while_jax_is_imported() -> None:
    with subprocess.Popen([*COMMAND, "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        maps = Path(f"/proc/{child.pid}/maps")
        while child.poll() is None and b"numpy" not in maps.read_bytes():
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, b"", b"")
