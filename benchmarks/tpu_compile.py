"""What the TPU's own compiler says, ahead of time and without a TPU: `python -m benchmarks.tpu_compile`.

Needs libtpu, in an environment of its own: `pip install -e ".[tpu]" -c constraints.txt`. The compiler annotates every
operation with estimated cycles: a heuristic of its search, about twice too high and no ranking of formulations (see
docs/performance.md). Bytes and temporary memory come from the compiled program too.
"""

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Literal

import tyro

# read when libtpu is loaded: no TPU is asked for, and no machine's metadata
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
)

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import dpn_jax
from benchmarks.report import print_setting
from dpn_jax.config import DPNConfig
from dpn_jax.fast.forward import FastForward
from dpn_jax.fast.plan import PLANS


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    models: tuple[str, ...] = ("dpn92",)
    """Variants."""
    topologies: tuple[str, ...] = ("v5e:2x2",)
    """TPU topologies: v5e:2x2, v5e:4x4, v6e:2x2, v5p:2x2x1, v4:2x2x1."""
    batches: tuple[int, ...] = (128,)
    """Images a chip."""
    chips: tuple[int, ...] = (1,)
    """Chips of the topology to use, data-parallel."""
    forms: tuple[Literal["fast", "plain"], ...] = ("fast", "plain")
    """The fast formulation, the plain one."""
    size: int = 224
    """Side of the images, pixels."""
    operations: int = 0
    """Print so many of the costliest operations."""
    json: Path | None = None
    """Write the figures into this file too."""


def main(options: Options) -> None:
    """Prints a row for each program."""
    report = {"setting": print_setting("benchmarks.tpu_compile"), "rows": []}
    print(f"bfloat16, {options.size} pixels\n")
    print(
        f"{'model':<8}{'topology':<11}{'chips':>6}{'batch':>7}  {'form':<6}{'M cycles':>10}{'cycles/image':>14}"
        f"{'GB moved':>10}{'temp MB':>9}{'compile s':>11}"
    )
    for name in options.models:
        for topology in options.topologies:
            for chips in options.chips:
                for batch in options.batches:
                    for form in options.forms:
                        row = compile_one(dpn_jax.pretrained.get_config(name), topology, chips, batch, form, options)
                        report["rows"].append({"model": name, **row})
                        print(
                            f"{name:<8}{topology:<11}{chips:>6}{batch:>7}  {form:<6}{row['cycles'] / 1e6:>10.1f}"
                            f"{row['cycles'] / batch:>14,.0f}{row['bytes'] / 1e9:>10.1f}{row['temp_bytes'] / 1e6:>9.0f}"
                            f"{row['compile_s']:>11.0f}",
                            flush=True,
                        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


def compile_one(
    config: DPNConfig, topology: str, chips: int, batch: int, form: str, options: Options
) -> dict[str, object]:
    """Compiles one forward pass for `chips` chips, the images split between them, and reads what the compiler wrote."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:chips]
    mesh = Mesh(np.array(devices), ("data",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    shape = (batch * chips, options.size, options.size, config.in_channels)
    images = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split)
    apply, params = forward(config, form)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), params)
    start = time.perf_counter()
    compiler_options = dict(PLANS["tpu"].compiler_options) if form == "fast" else {}
    compiled = jax.jit(apply).lower(params, images).compile(compiler_options=compiler_options)
    taken = time.perf_counter() - start
    text = compiled.as_text()
    if options.operations:
        print_operations(text, options.operations)
    return {
        "topology": topology,
        "chips": chips,
        "batch": batch,
        "form": form,
        "cycles": sum(int(cycles) for cycles in re.findall(r'"estimated_cycles":"(\d+)"', text)),
        "bytes": compiled.cost_analysis()["bytes accessed"],
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_s": taken,
    }


def forward(config: DPNConfig, form: str) -> tuple[object, object]:
    """A pure function of parameters and images, and the parameters' shapes."""
    if form == "plain":
        model = dpn_jax.DPN(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=None)
        model.eval()
        structure, state = nnx.split(model)
        return (lambda state, images: nnx.merge(structure, state)(images)), state
    model = dpn_jax.DPN(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    fast = FastForward(model, PLANS["tpu"])
    return fast.apply, fast.params


def print_operations(text: str, count: int) -> None:
    """The costliest operations of a compiled program."""
    found = re.findall(r'^ *(?:ROOT )?(%\S+) = (\S+) .*?"estimated_cycles":"(\d+)"', text, re.MULTILINE)
    for name, shape, cycles in sorted(found, key=lambda item: -int(item[2]))[:count]:
        print(f"  {int(cycles):>10,}  {name:<45} {shape}")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
