"""The TPU's own compiler on whole networks, without a TPU: `.ci/run` runs this where libtpu is installed."""

import collections
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

pytest.importorskip("libtpu")

import dpn_jax
from benchmarks.tpu.compile import Compiled, compile_for, inference, mesh_of, training
from benchmarks.tpu.cycles import CHIPS
from benchmarks.tpu.program import Program
from dpn_jax.config import DPNConfig
from dpn_jax.fast.plan import PLANS
from dpn_jax.inference.export import export_model, load_exported
from dpn_jax.multihost import AXIS
from dpn_jax.pretrained import get_config

pytestmark = [pytest.mark.slow, pytest.mark.optimized]

OPTIONS = dict(PLANS["tpu"].compiler_options)


def expected_sums(config: DPNConfig) -> dict[str, int]:
    """How many arrays a training step sums over the chips.

    For each norm and each path that it reads, two sums over the pixels and two of their gradient, in float32; the
    gradient of each kernel, one for each path, and of the classifier's bias, in bfloat16; the loss and two counts.
    """
    norms, kernels = 1 + 2, 1 + 2  # the stem's and the last one; the stem's and the classifier's
    for number, stage in enumerate(config.stages):
        for block in range(stage.depth):
            reading = (1 if number == block == 0 else 2) * (2 if block == 0 else 1)  # `reduce`, and `shortcut`
            norms, kernels = norms + reading + 2, kernels + reading + 3
    return {"f32": 4 * norms + 3, "bf16": kernels}


def sums(compiled: Compiled) -> collections.Counter[str]:
    program = Program.parse(compiled.text)
    assert program.collectives().keys() == {"all-reduce"}
    operations = (operation for body in program.computations.values() for operation in body)
    reduced = (operation for operation in operations if operation.opcode in ("all-reduce", "all-reduce-start"))
    return collections.Counter(array.dtype for operation in reduced for array in operation.outputs)


@pytest.mark.parametrize(("name", "topology", "chips"), [("dpn92", "v5e:4x4", 8), ("dpn68b", "v6e:4x4", 16)])
def test_a_training_step_sums_each_gradient_once(name: str, topology: str, chips: int) -> None:
    config = get_config(name).replace(depths=(1, 2, 1, 1))  # compiling a whole one takes ten minutes
    compiled = compile_for(training(config, mesh_of(topology, chips), batch=8, size=64), OPTIONS)
    assert sums(compiled) == expected_sums(config)
    assert compiled.memory < CHIPS[topology[:3]].hbm


# the v6e's with the plan's options take twice as long, twelve minutes for DPN-92
@pytest.mark.parametrize(
    ("name", "topology", "chips", "options"),
    [("dpn92", "v5e:4x4", 16, OPTIONS), ("dpn92", "v6e:2x2", 1, {}), ("dpn68b", "v6e:4x4", 8, {})],
)
def test_a_batch_of_128_a_chip_fits_and_no_chip_waits_for_another(
    name: str, topology: str, chips: int, options: dict[str, str]
) -> None:
    compiled = compile_for(inference(get_config(name), mesh_of(topology, chips), batch=128), options)
    assert compiled.memory < CHIPS[topology[:3]].hbm / 8
    assert not Program.parse(compiled.text).collectives()


def test_an_exported_file_compiles(tmp_path: Path) -> None:
    model = dpn_jax.create_model("dpn68b", dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    export_model(model, tmp_path / "dpn68b.jaxexport", platforms=["tpu"], image_size=64, uint8=True)
    run = load_exported(tmp_path / "dpn68b.jaxexport").call
    sharding = NamedSharding(mesh_of("v5e:2x2"), PartitionSpec(AXIS))
    images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.uint8, sharding=sharding)
    compiled = compile_for(jax.jit(run).lower(images), OPTIONS)
    assert not Program.parse(compiled.text).collectives()


def test_the_benchmark_prints_rows_and_keeps_what_it_read(tmp_path: Path) -> None:
    report, kept = tmp_path / "report.json", tmp_path / "kept"
    command = [sys.executable, "-m", "benchmarks.tpu_compile", "--models", "dpn_tiny", "--size", "32", "--batches", "8"]
    command += ["--tasks", "inference", "training", "--forms", "fast", "--operations", "1"]
    command += ["--keep", str(kept), "--json", str(report)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = {row["task"]: row for row in json.loads(report.read_text())["rows"]}
    for task, row in rows.items():
        assert 0 < row["compute"] <= row["cycles"] < 1e6 and row["memory"] > row["temporary"]
        assert f"{row['compile_s']:.0f}" in done.stdout
        assert (kept / f"dpn_tiny-{task}-v5e_2x2-1-8-fast" / "program.hlo").exists()
    assert rows["training"]["cycles"] > rows["inference"]["cycles"]
