"""The TPU's own compiler on whole networks, without a TPU: `.ci/run` runs this where libtpu is installed."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

pytest.importorskip("libtpu")

import dpn_jax
from benchmarks.tpu.compile import compile_for, inference, mesh_of, training
from benchmarks.tpu.cycles import CHIPS
from benchmarks.tpu.program import Program
from dpn_jax.fast.plan import PLANS
from dpn_jax.inference.export import export_model, load_exported
from dpn_jax.multihost import AXIS
from dpn_jax.pretrained import get_config

pytestmark = [pytest.mark.slow, pytest.mark.optimized]

OPTIONS = dict(PLANS["tpu"].compiler_options)


@pytest.mark.parametrize(
    ("name", "topology", "chips"), [("dpn92", "v5e:4x4", 16), ("dpn92", "v6e:2x2", 1), ("dpn68b", "v6e:4x4", 8)]
)
def test_a_batch_of_128_a_chip_fits_and_no_chip_waits_for_another(name: str, topology: str, chips: int) -> None:
    compiled = compile_for(inference(get_config(name), mesh_of(topology, chips), batch=128), OPTIONS)
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
