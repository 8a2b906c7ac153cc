"""Data parallelism: the batch is split over a mesh's axis `data`, everything else is on every device."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"

Tree = TypeVar("Tree")


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, `data`.

    Processes on CPUs had better meet before their first step (`jax.experimental.multihost_utils.sync_global_devices`):
    at their first contact one that still compiles is waited for 30 s and no longer. Those of `dpn-jax finetune` have
    met by then.

    Args:
      devices: left out, all of them, those of other hosts included (`jax.distributed.initialize` comes first).
    """
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on its devices.

    Args:
      batch: arrays `[B / processes, ...]`; those of all processes, one after the other, are the global batch.
      mesh: from `data_mesh`.

    Returns:
      Global arrays `[B, ...]`, sharded along the first axis.

    Raises:
      ValueError: the images cannot be split evenly over this process's devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    devices = len(mesh.local_devices)
    for name, value in batch.items():
        if len(value) % devices:
            raise ValueError(f"a batch must be a multiple of the {devices} devices, got {len(value)} for {name!r}")
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Copies a tree of arrays, such as a `TrainState`, onto every device of a mesh.

    In a run of several processes each one brings the same values; nothing is sent.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.array(x)), tree)
