"""`examples/ray_classify.py`: what it says where Ray is missing; on a real cluster, one node of which is killed."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from dpn_jax import Classifier
from dpn_jax.errors import ImageError

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]
MODEL = "dpn_tiny.digits"
NODE = {"num_cpus": 2, "resources": {"TPU": 1}, "object_store_memory": 2**28}  # Ray is told of a chip: an actor a node

# Every batch is noted when it begins; the second one of an actor waits until the test has killed a node.
HELD = """
import json, sys, time, uuid
from pathlib import Path
import ray, tyro
from examples import ray_classify

notes = Path(sys.argv.pop(1))

class Held(ray_classify.PhotoClassifier):
    calls = 0

    def __call__(self, photos):
        self.calls += 1
        node = ray.get_runtime_context().get_node_id()
        note = {"node": node, "call": self.calls, "paths": photos["path"].to_pylist()}
        (notes / "part").mkdir(exist_ok=True)
        part = notes / "part" / uuid.uuid4().hex
        part.write_text(json.dumps(note))
        part.rename(notes / f"{part.name}.json")
        while self.calls > 1 and not (notes / "go").exists():
            time.sleep(0.05)
        return super().__call__(photos)

ray_classify.PhotoClassifier, ray_classify.READ_AHEAD = Held, 2
sys.exit(ray_classify.main(tyro.cli(ray_classify.Options)))
"""


def run(*words: object, code: str | None = None, **environment: str) -> subprocess.Popen:
    """Starts the example, or a program in its place; its output is one text."""
    command = [sys.executable, *(("-c", code) if code else ("-m", "examples.ray_classify")), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def until(condition: Callable[[], bool], job: subprocess.Popen, *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def test_an_example_is_short() -> None:
    for path, most in ((ROOT / "examples" / "ray_classify.py", 120), (ROOT / "examples" / "serve.py", 250)):
        assert path.read_text(encoding="utf-8").count("\n") <= most, path.name


def test_without_ray_it_says_what_to_install() -> None:
    blocked = (
        "import runpy, sys; sys.modules['ray'] = None; runpy.run_module('examples.ray_classify', run_name='__main__')"
    )
    job = run(code=blocked)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 1
    assert output.endswith(': pip install "dpn-jax[ray]"\n') and output.count("\n") == 1


@pytest.fixture(scope="module")
def cluster() -> Iterator["Cluster"]:
    """Two nodes, each with raylet, object store and workers of its own; `RAY_ADDRESS` is theirs."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # the sockets of Ray are in this folder: the names of pytest's own are too long for them
    short = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
    with short as folder, pytest.MonkeyPatch.context() as patch:
        environment = {"PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu", "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": 0}
        for name, value in environment.items():
            patch.setenv(name, str(value))  # for the workers, which the nodes start
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        cluster.add_node(**NODE)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 JPEG files of many sizes, parts of two photos; one of them is cut off."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("cat", "coffee"):
        (folder / name).mkdir()
        with Image.open(ROOT / "samples" / f"{name}.jpg") as photo:
            for number in range(60):
                left, upper = 3 * number, 2 * number
                photo.crop((left, upper, left + 60 + number, upper + 90)).save(folder / name / f"{number}.jpg")
    broken = folder / "cat" / "7.jpg"
    broken.write_bytes(broken.read_bytes()[:500])
    return folder


def expected(paths: list[Path]) -> dict[str, tuple[list[int], list[float]] | None]:
    """What a classifier says of each photo, without Ray; None if it cannot be read."""
    classifier = Classifier.from_pretrained(MODEL, batch_size=4)
    results = zip(paths, classifier.stream(paths), strict=True)
    return {
        str(path): None
        if isinstance(result, ImageError)
        else ([best.index for best in result], [best.probability for best in result])
        for path, result in results
    }


def assert_same(rows: list[dict], paths: list[Path]) -> None:
    """Every photo has one row, and it is right."""
    alone = expected(paths)
    assert sorted(row["path"] for row in rows) == sorted(alone)
    for row in rows:
        if alone[row["path"]] is None:
            assert row["error"] and row["labels"] is row["indices"] is row["probabilities"] is None
        else:
            indices, probabilities = alone[row["path"]]
            assert row["error"] is None
            assert row["indices"] == indices and row["labels"] == [str(index) for index in indices]
            assert row["probabilities"] == pytest.approx(probabilities, rel=1e-5)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray
def test_parquet_and_an_unknown_model(cluster: "Cluster", photos: Path, tmp_path: Path) -> None:
    import pyarrow.dataset
    import pyarrow.parquet

    paths = sorted(photos.rglob("?.jpg"))
    table = {"path": [str(path) for path in paths], "image": [path.read_bytes() for path in paths], "truth": range(20)}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "photos.parquet")
    source, results = tmp_path / "photos.parquet", tmp_path / "results"

    def finished(*words: object) -> tuple[int, str]:
        job = run(source, *words, "--column", "image", "--batch-size", 4, "--cpus", 2)
        output, _ = job.communicate(timeout=200)
        return job.returncode, output.strip().split("\n")[-1]

    code, line = finished(results, "--model", MODEL)
    assert (code, line) == (1, f"20 photos in {results}, 1 of them not readable: see the column error")
    rows = pyarrow.dataset.dataset(results).to_table().to_pylist()
    assert_same(rows, paths)
    assert {row["path"]: row["truth"] for row in rows} == {str(path): index for index, path in enumerate(paths)}

    code, line = finished(tmp_path / "new", "--model", "dpn93")
    assert code == 2 and line.startswith("dpn-jax: ValueError: unknown model 'dpn93'")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray
def test_what_is_refused_before_ray_starts(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    import pyarrow.parquet

    from examples.ray_classify import Options, main

    table = tmp_path / "photos.parquet"
    for columns in (["path", "image"], ["error", "bytes"]):
        pyarrow.parquet.write_table(pyarrow.table({name: ["a"] for name in columns}), table)
        with pytest.raises(ValueError, match=f"needs 'bytes' and .* has {re.escape(str(columns))}$"):
            main(Options(str(table), str(tmp_path / "new"), column="bytes"))
    with pytest.raises(ValueError, match=r"there are results already; name a new folder, or remove these$"):
        main(Options(str(table), str(tmp_path), column="image"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray
def test_nothing_is_lost_or_double_when_a_node_dies(cluster: "Cluster", photos: Path, tmp_path: Path) -> None:
    import pyarrow.dataset

    options = ("--model", MODEL, "--batch-size", 4, "--tpus", 1)
    job = run(tmp_path, photos, tmp_path / "results", *options, code=HELD)
    (doomed,) = cluster.worker_nodes

    def begun(*, doomed_node: bool) -> list[dict]:
        notes = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
        return [note for note in notes if (note["node"] == doomed.node_id) == doomed_node]

    until(lambda: any(note["call"] == 2 for note in begun(doomed_node=True)), job)
    cluster.remove_node(doomed, allow_graceful=False)
    begun_there = begun(doomed_node=True)
    (tmp_path / "go").touch()
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 1, output  # one photo is broken
    assert "120 photos" in output and "1 of them not readable" in output

    (held,) = (note for note in begun_there if note["call"] == 2)
    again = {path for note in begun(doomed_node=False) for path in note["paths"]}
    assert again >= set(held["paths"])  # the batch that died with its node was done again on another
    rows = pyarrow.dataset.dataset(tmp_path / "results").to_table().to_pylist()
    assert_same(rows, sorted(photos.rglob("*.jpg")))
