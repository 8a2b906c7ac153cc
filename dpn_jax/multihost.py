"""Several devices and processes that train one model: sharding, and what process 0 does for all."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpn_jax.errors import RunError, reason

Value = TypeVar("Value")
Tree = TypeVar("Tree")

AXIS = "data"


def connect(coordinator: str | None = None, processes: int | None = None, index: int | None = None) -> None:
    """Joins the processes of one run; must come before anything else that uses JAX.

    Args:
      coordinator: address and port of process 0, 'host:port'.
      processes: their number.
      index: the index of this one, from 0. All three default to what the cluster says (TPU, Slurm, Open MPI).

    Raises:
      RunError: only some of the arguments are given, or the processes cannot connect.
    """
    given = (coordinator, processes, index)
    if None in given and given != (None, None, None):
        raise RunError("--coordinator, --processes and --process-index must be given together (or --distributed alone)")
    if processes is not None and index is not None and not 0 <= index < processes:
        raise RunError(f"--process-index must be 0 to {processes - 1}, got {index}")
    jax.config.update("jax_enable_preemption_service", False)  # the training loop handles SIGTERM itself
    try:
        jax.distributed.initialize(coordinator, processes, index)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes cannot connect ({reason(error)}); see jax.distributed") from error


def is_first() -> bool:
    """Whether this is process 0, the one that writes files and messages."""
    return jax.process_index() == 0


def broadcast(value: Value, *, source: int = 0) -> Value:
    """The value of one process, in every process.

    Args:
      value: anything JSON can hold; ignored in the other processes.
      source: the index of the process that has the value.
    """
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    has_it = jax.process_index() == source
    text = np.frombuffer(json.dumps(value).encode() if has_it else b"", np.uint8)
    size = int(broadcast_one_to_all(np.int32(text.size), is_source=has_it))
    text = broadcast_one_to_all(text if has_it else np.zeros(size, np.uint8), is_source=has_it)
    return json.loads(np.asarray(text, np.uint8).tobytes())


def gather(value: Value) -> list[Value]:
    """Every process's value, in every process: by index of the process.

    Args:
      value: anything JSON can hold.
    """
    return [broadcast(value, source=index) for index in range(jax.process_count())]


def broadcast_arrays(tree: Tree) -> Tree:
    """Process 0's pytree of arrays, in every process; the others pass one of the same shapes and dtypes."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return broadcast_one_to_all(tree)


def on_first(action: Callable[[], Any]) -> Any:
    """Calls a function in process 0 only; if it fails there, every process stops.

    Args:
      action: returns something JSON can hold.

    Returns:
      The result of `action`, in every process.

    Raises:
      RunError: in the other processes if `action` failed; process 0 raises the original exception.
    """
    outcome: dict[str, Any] = {}
    failure: Exception | None = None
    if is_first():
        try:
            outcome["value"] = action()
        except Exception as error:  # broadcast before it is raised: the others would wait forever
            failure, outcome["error"] = error, str(error)
    outcome = broadcast(outcome)
    if failure:
        raise failure
    if "error" in outcome:
        raise RunError(f"process 0: {outcome['error']}")
    return outcome["value"]


def any_of(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    return bool(np.any(process_allgather(np.asarray(flag))))


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, `data`.

    On CPUs, synchronize several processes before the first step (`jax.experimental.multihost_utils
    .sync_global_devices`): their first collective waits at most 30 s for a process that is still compiling.
    `dpn-jax finetune` does so.

    Args:
      devices: defaults to all devices, those of other hosts included (after `jax.distributed.initialize`).
    """
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,))


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's slice of a batch on its devices.

    Args:
      batch: arrays `[B / processes, ...]`; concatenated over the processes they are the global batch.
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

    With several processes, each passes the same values; nothing is sent.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.array(x)), tree)
