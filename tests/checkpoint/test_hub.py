"""`from_pretrained` through the real Hugging Face client, in a process of its own, against a hub on this machine."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("tests.support.timm_models")
import torch

import dpn_jax
from dpn_jax.checkpoint.hub import promised_sha256
from dpn_jax.checkpoint.save import convert
from dpn_jax.pretrained import DPN_MEAN, PRETRAINED
from tests.support.hub_server import CONFIG, FLAT_CONFIG, Hub
from tests.support.timm_models import randomize, save_timm, timm_dpn, to_flax

pytestmark = pytest.mark.slow

# Runs `from_pretrained` for each line of its input, in order. The client reads its environment when it is imported,
# hence a process; its waits between attempts, 23 s in all, are skipped.
CHILD = """
import hashlib, json, os, sys, time
import numpy as np
from flax import nnx
import dpn_jax
assert not {"huggingface_hub", "torch", "timm"} & set(sys.modules), "imported before they are needed"
time.sleep = lambda seconds: None
for line in sys.stdin:
    name, source, options, remove = json.loads(line)
    if remove:
        os.remove(remove)
    try:
        model = dpn_jax.from_pretrained(source, **options)
    except Exception as error:
        answer = {"error": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
    else:
        values = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
        digests = {".".join(map(str, path)): hashlib.sha1(np.asarray(value.get_value()).tobytes()).hexdigest()
                   for path, value in values}
        provenance = model.provenance
        answer = {"weights": digests, "source": provenance.source, "sha256": provenance.sha256,
                  "classes": provenance.class_names, "pool": model.config.global_pool,
                  "mean": provenance.preprocessing and provenance.preprocessing.mean}
    print(json.dumps([name, answer]), flush=True)
"""


class Step(NamedTuple):
    """One call in the other process."""

    name: str
    source: str
    options: dict[str, object] = {}  # noqa: RUF012
    remove: str | None = None


def run(steps: list[Step], home: Path, **environment: str) -> dict[str, Any]:
    """What each call gave, by the step's name."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    variables |= {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "error"}
    variables |= {"HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "5", "no_proxy": "127.0.0.1,localhost"}
    result = subprocess.run(
        [sys.executable, "-c", CHILD],
        input="".join(json.dumps(step) + "\n" for step in steps),
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "[Retry " not in result.stderr  # the client's own lines, up to a dozen a file
    return dict(json.loads(line) for line in result.stdout.splitlines())


def digests(model: torch.nn.Module) -> dict[str, str]:
    """What the other process should have loaded; counters are int32 in Flax."""
    tensors = to_flax(model.state_dict())
    return {
        name: hashlib.sha1(np.asarray(value, np.float32 if value.ndim else np.int32).tobytes()).hexdigest()
        for name, value in tensors.items()
    }


def message(answer: dict[str, Any], kind: str = "CheckpointError") -> str:
    """The error's message, which must be one line of a reasonable length."""
    assert answer.get("error", [])[:1] == [kind], answer
    assert "\n" not in answer["message"]
    assert len(answer["message"]) < 400
    return answer["message"]


class Session(NamedTuple):
    """A hub, what was loaded from it, and the client's cache afterwards."""

    hub: Hub
    answers: dict[str, Any]
    home: Path
    models: dict[str, torch.nn.Module]
    commits: dict[str, str]


@pytest.fixture(scope="module")
def session(timm: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    models = {name: timm_dpn(timm, seed=seed) for seed, name in enumerate(("tiny", "dev"))}
    models["dpn68"] = randomize(timm.create_model("dpn68"))
    files = {name: save_timm(model, folder / f"{name}.safetensors") for name, model in models.items()}
    torch.save(models["dpn68"].state_dict(), folder / "dpn68.bin")
    own = dpn_jax.load(files["tiny"])
    dpn_jax.save(own, folder / "own.safetensors")

    config = json.dumps(CONFIG).encode()
    tiny = {"config.json": config, "model.safetensors": files["tiny"]}
    with Hub() as hub:
        hub.add("timm/dpn68.mx_in1k", {"config.json": config, "model.safetensors": files["dpn68"]})
        hub.add(
            "julien-c/timm-dpn68",
            {"config.json": json.dumps(FLAT_CONFIG).encode(), "pytorch_model.bin": folder / "dpn68.bin"},
        )
        hub.add("someone/their-dpn", tiny)
        hub.add("someone/shared", tiny)
        hub.add("someone/own", {"model.safetensors": folder / "own.safetensors"})
        pooled = json.dumps(CONFIG | {"model_args": {"global_pool": "avgmax", "num_classes": 5}}).encode()
        hub.add("someone/pooled", tiny | {"config.json": pooled})
        commits = {"main": hub.add("someone/branches", tiny)}
        commits["dev"] = hub.add("someone/branches", tiny | {"model.safetensors": files["dev"]}, branch="dev")
        hub.add("someone/empty", {"config.json": config})
        hub.add("someone/resnet", tiny | {"config.json": json.dumps(CONFIG | {"architecture": "resnet50"}).encode()})
        hub.add("someone/damaged-config", tiny | {"config.json": config[:-9]})
        hub.add("someone/bad-mean", tiny | {"config.json": b'{"architecture": "dpn92", "mean": 5}'})
        hub.add("someone/list-config", tiny | {"config.json": b'{"architecture": ["dpn92"], "mean": []}'})
        hub.add(
            "someone/wrong-variant", tiny | {"config.json": json.dumps(CONFIG | {"architecture": "dpn92"}).encode()}
        )
        for fault in ("truncated", "stuck", "short", "corrupt", "reset", "error"):
            hub.add(f"someone/{fault}", tiny)
            hub.fail(f"someone/{fault}", "model.safetensors", fault, times=20 if fault == "stuck" else 1)
        for fault in ("reset", "error"):
            hub.add(f"someone/metadata-{fault}", tiny)
            hub.fail(f"someone/metadata-{fault}", "model.safetensors", fault, times=20, on_metadata=True)
        hub.add("someone/gated", tiny)
        hub.gated.add("someone/gated")
        hub.add("someone/flaky", tiny)
        hub.fail("someone/flaky", "model.safetensors", "error", times=2, on_metadata=True)
        hub.fail("julien-c/timm-dpn68", "pytorch_model.bin", "truncated")  # the client keeps whole parts of 10 MB

        home = tmp_path_factory.mktemp("hf")
        repositories = sorted(name for name in hub.repositories if name.startswith("someone/"))
        steps = [
            Step("tag", "dpn68.mx_in1k"),
            Step("timm/tag", "timm/dpn68.mx_in1k"),
            Step("flat", "hf-hub:julien-c/timm-dpn68"),
            *(Step(name.removeprefix("someone/"), f"hf-hub:{name}") for name in repositories),
            *(Step(f"{name} again", f"hf_hub:someone/{name}") for name in ("corrupt", "their-dpn", "reset", "stuck")),
            Step("dev", "someone/branches", {"revision": "dev"}),
            Step("commit", "someone/branches", {"revision": commits["main"]}),
            Step("no revision", "someone/branches", {"revision": "v9"}),
            Step("no repository", "someone/nothing"),
            Step("bad name", "someone/.."),
        ]
        answers = run(steps, home, HF_ENDPOINT=hub.endpoint)
        yield Session(hub, answers, home, models, commits)


# What is loaded


@pytest.mark.parametrize(
    ("step", "model"),
    [
        ("tag", "dpn68"),
        ("timm/tag", "dpn68"),
        ("flat", "dpn68"),
        ("their-dpn", "tiny"),
        ("their-dpn again", "tiny"),
        ("own", "tiny"),
        ("pooled", "tiny"),
        ("branches", "tiny"),
        ("dev", "dev"),
        ("commit", "tiny"),
        ("flaky", "tiny"),
        ("truncated", "tiny"),
        ("reset again", "tiny"),
    ],
)
def test_weights_are_timms(session: Session, step: str, model: str) -> None:
    assert "error" not in session.answers[step], session.answers[step]
    assert session.answers[step]["weights"] == digests(session.models[model])


def test_a_tag_brings_its_own_preprocessing_and_asks_for_the_weights_alone(session: Session) -> None:
    assert session.answers["tag"]["mean"] == list(PRETRAINED["dpn68.mx_in1k"].preprocessing.mean)
    assert {request.file for request in session.hub.requests["timm/dpn68.mx_in1k"]} == {"model.safetensors"}


def test_a_second_call_downloads_nothing(session: Session) -> None:
    assert session.hub.downloads("timm/dpn68.mx_in1k") == ["model.safetensors"]
    assert session.hub.downloads("someone/their-dpn") == ["model.safetensors"]


def test_config_json_tells_preprocessing_and_classes(session: Session) -> None:
    assert session.answers["their-dpn"]["mean"] == [0.5, 0.4, 0.3]
    assert session.answers["their-dpn"]["classes"] == ["ant", "bee", "cat", "dog", "eel"]


def test_old_flat_config_json(session: Session) -> None:
    assert session.answers["flat"]["mean"] == list(DPN_MEAN)
    assert session.answers["flat"]["classes"] is None


def test_the_pool_that_the_weights_were_trained_with(session: Session) -> None:
    assert session.answers["pooled"]["pool"] == "avgmax"
    assert session.answers["their-dpn"]["pool"] == "avg"


def test_provenance_names_the_commit_and_the_hash(session: Session) -> None:
    answers, commits = session.answers, session.commits
    assert [answers[name]["source"] for name in ("branches", "dev", "commit")] == [
        f"someone/branches@{commits[name]}" for name in ("main", "dev", "main")
    ]
    blob = next(session.home.glob("hub/models--someone--branches/snapshots/*/model.safetensors"))
    hashes = {answers[name]["sha256"] for name in ("branches", "commit")}
    assert hashes == {hashlib.sha256((blob.parents[1] / commits["main"] / blob.name).read_bytes()).hexdigest()}


def test_our_own_file_needs_no_config_json(session: Session) -> None:
    assert session.answers["own"]["source"] == "tiny.safetensors"


def test_an_interrupted_download_is_resumed(session: Session) -> None:
    first, second = (request.start for request in session.hub.requests["julien-c/timm-dpn68"] if request.is_body)
    assert first == 0 < second


# What fails


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("no repository", "no such repository"),
        ("no revision", "no revision 'v9'"),
        ("bad name", "someone/.."),
        ("gated", "gated; ask for access"),
        ("empty", "has none of model.safetensors"),
        ("resnet", "'resnet50' is not a DPN"),
        ("damaged-config", "config.json"),
        ("bad-mean", "config.json"),
        ("list-config", "config.json"),
        ("stuck", "the download failed"),
        ("stuck again", "the download failed"),
        ("short", "size"),
        ("reset", "the download failed"),
        ("error", "the download failed"),
        ("metadata-reset", "the download failed"),
        ("metadata-error", "--weights"),
        ("corrupt", "SHA-256 is not the hub's"),
        ("corrupt again", "SHA-256 is not the hub's"),
    ],
)
def test_every_failure_is_one_line(session: Session, step: str, said: str) -> None:
    text = message(session.answers[step])
    assert said in text
    if step not in ("no repository", "no revision", "bad name"):
        assert step.removesuffix(" again") in text  # names the repository, or the file in its cache


def test_weights_of_another_variant_than_config_json_says(session: Session) -> None:
    answer = session.answers["wrong-variant"]
    assert answer["error"][0] == "CheckpointError"
    assert "do not fit the architecture" in answer["message"].split("\n")[0]


def test_no_weights_are_downloaded_for_another_architecture(session: Session) -> None:
    assert session.hub.downloads("someone/resnet") == []


def test_a_damaged_download_is_not_converted_either(session: Session, tmp_path: Path) -> None:
    damaged = next(session.home.glob("hub/models--someone--corrupt/snapshots/*/model.safetensors"))
    with pytest.raises(dpn_jax.CheckpointError, match="SHA-256 is not the hub's"):
        convert(damaged, tmp_path / "a.safetensors")
    assert not any(tmp_path.iterdir())


def test_deleting_what_the_message_names_repairs_a_damaged_download(session: Session) -> None:
    path = message(session.answers["corrupt"]).rpartition("delete ")[2]
    steps = [Step("repaired", "someone/corrupt", remove=path)]
    assert run(steps, session.home, HF_ENDPOINT=session.hub.endpoint)["repaired"]["weights"]
    assert session.hub.downloads("someone/corrupt") == ["model.safetensors"] * 2


def test_a_hub_that_does_not_answer_is_not_asked_for_other_files(session: Session) -> None:
    asked = [request.file for request in session.hub.requests["someone/metadata-error"]]
    assert list(dict.fromkeys(asked)) == ["config.json", "model.safetensors"]


# Without a network


@pytest.fixture(scope="module")
def shared_blob(session: Session) -> Path:
    """A blob as the client keeps it after a Xet download: a link into a store, where another hash names it."""
    cache = session.home / "hub"
    pointer = next(cache.glob("models--someone--shared/snapshots/*/model.safetensors"))
    blob = pointer.parent / pointer.readlink()
    stored = cache / "blobs" / "ab" / ("ab" * 32)
    stored.parent.mkdir(parents=True)
    blob.resolve().rename(stored)
    blob.symlink_to(Path(os.path.relpath(stored, blob.parent)))
    return pointer


@pytest.fixture(scope="module", params=["offline", "unreachable"])
def cut_off(request: pytest.FixtureRequest, session: Session, shared_blob: Path) -> dict[str, Any]:
    """The answers with a filled cache where the hub is not to be asked, or does not answer."""
    with socket.socket() as unused:  # a port that nobody listens to
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
        names = ("tag", "flat", "shared", "own", "corrupt", "empty")
        sources = ["dpn68.mx_in1k", "julien-c/timm-dpn68", *(f"someone/{name}" for name in names[2:])]
        steps = [Step(name, source) for name, source in zip(names, sources, strict=True)]
        steps.append(Step("other tag", "dpn92.mx_in1k"))
        steps.append(Step("commit", "someone/branches", {"revision": session.commits["dev"]}))
        offline = {"HF_HUB_OFFLINE": "1"} if request.param == "offline" else {}
        return run(steps, session.home, HF_ENDPOINT=closed, **offline)


def test_a_filled_cache_is_enough(session: Session, cut_off: dict[str, Any]) -> None:
    models = {"tag": "dpn68", "flat": "dpn68", "shared": "tiny", "own": "tiny", "commit": "dev"}
    for step, model in models.items():
        assert "error" not in cut_off[step], cut_off[step]
        assert cut_off[step]["weights"] == digests(session.models[model])


def test_an_empty_cache_is_one_line_that_says_what_to_do(cut_off: dict[str, Any]) -> None:
    for step, repository in (("other tag", "timm/dpn92.mx_in1k"), ("empty", "someone/empty")):
        assert message(cut_off[step]).startswith(f"{repository}: not in the local cache")
        assert "--weights" in message(cut_off[step])


def test_the_stores_hash_is_not_mistaken_for_the_promised_one(session: Session, shared_blob: Path) -> None:
    assert promised_sha256(shared_blob) == hashlib.sha256(shared_blob.read_bytes()).hexdigest()
    assert promised_sha256(shared_blob) == session.answers["shared"]["sha256"]
