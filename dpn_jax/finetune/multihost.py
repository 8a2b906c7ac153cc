"""Several processes that train one model: who writes, and how the others hear of it."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpn_jax.errors import RunError, reason

Value = TypeVar("Value")
Tree = TypeVar("Tree")


def connect(coordinator: str | None = None, processes: int | None = None, index: int | None = None) -> None:
    """Makes this process one of several; before anything else is done with JAX.

    Args:
      coordinator: address and port of process 0, 'host:port'.
      processes: how many there are.
      index: which one this is, from 0. With all three left out, JAX asks the cluster (TPU, Slurm, Open MPI).

    Raises:
      RunError: not all or none of the arguments are given, or the processes do not find each other.
    """
    given = (coordinator, processes, index)
    if None in given and given != (None, None, None):
        raise RunError("--coordinator, --processes and --process-index belong together (or --distributed alone)")
    if processes is not None and index is not None and not 0 <= index < processes:
        raise RunError(f"--process-index must be 0 to {processes - 1}, got {index}")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is the training loop's
    try:
        jax.distributed.initialize(coordinator, processes, index)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes do not find each other ({reason(error)}); see jax.distributed") from error


def is_first() -> bool:
    """Whether this is the process that writes and talks."""
    return jax.process_index() == 0


def share(value: Value) -> Value:
    """What process 0 has, for all.

    Args:
      value: anything that JSON can hold; only that of process 0 counts.
    """
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = np.frombuffer(json.dumps(value).encode() if is_first() else b"", np.uint8)
    size = int(broadcast_one_to_all(np.int32(text.size)))
    text = broadcast_one_to_all(text if is_first() else np.zeros(size, np.uint8))
    return json.loads(np.asarray(text, np.uint8).tobytes())


def share_arrays(tree: Tree) -> Tree:
    """A pytree of arrays as process 0 has it, for all; the others give one of the same shapes and dtypes."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return broadcast_one_to_all(tree)


def on_first(action: Callable[[], Any]) -> Any:
    """Does something in process 0 alone; if it fails there, every process stops.

    Args:
      action: gives something that JSON can hold.

    Returns:
      What `action` gave, in every process.

    Raises:
      RunError: in the other processes, when it failed. In process 0 whatever it raised.
    """
    outcome: dict[str, Any] = {}
    failure: Exception | None = None
    if is_first():
        try:
            outcome["value"] = action()
        except Exception as error:  # told to all before it is raised: they would wait for ever
            failure, outcome["error"] = error, str(error)
    outcome = share(outcome)
    if failure:
        raise failure
    if "error" in outcome:
        raise RunError(f"process 0: {outcome['error']}")
    return outcome["value"]


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    return bool(np.any(process_allgather(np.asarray(flag))))


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
