"""Programs for TPUs that are not there, by the TPU's own compiler. Needs libtpu; see `benchmarks.tpu_compile`."""

import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from unittest.mock import patch

# read when libtpu is loaded: no TPU is asked for, no machine's metadata, and two processes may use the library
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpn_jax.config import DPNConfig
from dpn_jax.fast.forward import FastForward, PlainForward
from dpn_jax.fast.plan import PLANS, Plan
from dpn_jax.finetune import FinetuneConfig, TrainState, make_optimizer, train_step
from dpn_jax.inference.program import normalize, split_over
from dpn_jax.model import DPN
from dpn_jax.multihost import AXIS, data_mesh
from dpn_jax.pretrained import default_preprocessing

Form = Literal["fast", "plain"]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program."""

    text: str
    """Scheduled HLO, with layouts."""
    memory: int
    """Bytes a chip: parameters, images, results, temporary memory and code."""
    temporary: int
    """Bytes of it that are only needed while the program runs."""
    seconds: float
    """Time to compile."""


def mesh_of(topology: str, chips: int = 1) -> Mesh:
    """A mesh of so many chips of a topology, such as 'v5e:2x2', 'v5e:4x4' or 'v6e:2x2'."""
    return data_mesh(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:chips])


def inference(
    config: DPNConfig, mesh: Mesh, *, batch: int, size: int = 224, form: Form = "fast", plan: Plan = PLANS["tpu"]
) -> jax.stages.Lowered:
    """A classifier's program in bfloat16, from uint8 images.

    Args:
      config: the architecture.
      mesh: from `mesh_of`.
      batch: images a chip.
      size: their side, pixels.
      form: the fast one or the plain one.
      plan: of the fast form.
    """
    model = DPN(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    forward = FastForward(model, plan) if form == "fast" else PlainForward(model)
    settings = default_preprocessing(config)

    def dpn(params: object, images: jax.Array) -> jax.Array:
        return forward.apply(params, normalize(images, settings))

    params = _shapes(forward.params, NamedSharding(mesh, PartitionSpec()))
    return jax.jit(split_over(dpn, mesh)).lower(params, _images(config, mesh, batch, size))


def training(
    config: DPNConfig, mesh: Mesh, *, batch: int, size: int = 224, form: Form = "fast", remat: bool = False
) -> jax.stages.Lowered:
    """A training step in bfloat16 with AdamW, from uint8 images.

    Args:
      config, mesh, batch, size, form: as for `inference`.
      remat: see `DPN`.
    """
    options = FinetuneConfig(dtype="bfloat16", fast=form == "fast", remat=remat)
    model = DPN(config, dtype=jnp.bfloat16, remat=remat, rngs=nnx.Rngs(0))
    state = TrainState.create(model, make_optimizer(options, model), options)
    whole = NamedSharding(mesh, PartitionSpec())
    labels = jax.ShapeDtypeStruct((batch * mesh.size,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(AXIS)))
    step = jax.jit(train_step, out_shardings=whole, donate_argnums=0)
    with patch.object(jax, "default_backend", return_value="tpu"):  # whose plan the step follows
        return step.lower(_shapes(state, whole), {"image": _images(config, mesh, batch, size), "label": labels})


def compile_for(lowered: jax.stages.Lowered, options: Mapping[str, str | bool]) -> Compiled:
    """Compiles a program.

    Args:
      lowered: the program.
      options: the compiler's.
    """
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=dict(options))
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return Compiled(compiled.as_text(), total, memory.temp_size_in_bytes, seconds)


@functools.cache
def dump_folder() -> Path:
    """Where this process's compiler leaves the schedules of what it compiles; to be called before its first use."""
    folder = tempfile.mkdtemp(prefix="schedules-")
    passes = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={folder} {passes}"
    return Path(folder)


def _images(config: DPNConfig, mesh: Mesh, batch: int, size: int) -> jax.ShapeDtypeStruct:
    shape = (batch * mesh.size, size, size, config.in_channels)
    return jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=NamedSharding(mesh, PartitionSpec(AXIS)))


def _shapes(tree: object, sharding: NamedSharding) -> object:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
