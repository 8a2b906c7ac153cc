"""Several devices and processes that work on one thing: sharding, and what processes tell each other."""

import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpn_jax.errors import ProcessLostError, RunError, reason

Value = TypeVar("Value")
Tree = TypeVar("Tree")

AXIS = "data"

_UNITS_IN_EXCHANGE = 8
_HEARTBEAT = 30
"""Seconds without a sign of life after which a process is given up, and with it all others."""


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
        jax.distributed.initialize(coordinator, processes, index, heartbeat_timeout_seconds=_HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the processes cannot connect ({reason(error)}); see jax.distributed") from error


def meet() -> None:
    """Waits for the other processes, after the devices are chosen: the first exchange of the processes of one run.

    On CPUs the library that exchanges data greets on stdout, where only results belong.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental.multihost_utils import sync_global_devices

    with _stdout_to_stderr():
        sync_global_devices("dpn_jax")


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Sends to stderr what native code prints to stdout."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def is_first() -> bool:
    """Whether this is process 0, the one that writes files and messages."""
    return jax.process_index() == 0


def broadcast(value: Value) -> Value:
    """The value of process 0, in every process.

    Args:
      value: anything JSON can hold; ignored in the other processes.
    """
    if jax.process_count() == 1:
        return value
    return gather(value if is_first() else None)[0]


def gather(value: Value) -> list[Value]:
    """Every process's value, in every process: by index of the process.

    Args:
      value: anything JSON can hold.

    Raises:
      ProcessLostError: another process has ended.
    """
    if jax.process_count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    try:
        sizes = process_allgather(np.int32(text.size))
        padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # few sizes, for each of which JAX compiles
        padded[: text.size] = text
        rows = process_allgather(padded)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ProcessLostError(f"lost another process ({reason(error)}); see what it printed last") from error
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


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


def together(action: Callable[[], Value]) -> Value:
    """Calls a function in every process; if it fails in one of them, every process stops.

    Returns:
      The result of this process.

    Raises:
      RunError: in the other processes if `action` failed in one; that one raises the original exception.
    """
    value: Value | None = None
    failure: Exception | None = None
    try:
        value = action()
    except Exception as error:  # told before it is raised: the others would wait forever
        failure = error
    told = gather(None if failure is None else str(failure))
    if failure:
        raise failure
    for index, error in enumerate(told):
        if error is not None:
            raise RunError(f"process {index}: {error}")
    return value


def require_same(names: Sequence[str], what: str) -> None:
    """Checks that every process has the same list.

    Raises:
      RunError: they differ; in every process.
    """
    digest = hashlib.blake2b(json.dumps(list(names)).encode(), digest_size=16).hexdigest()
    seen = gather((len(names), digest))
    for index, other in enumerate(seen):
        if other != seen[0]:
            raise RunError(
                f"process 0 has {seen[0][0]} {what} and process {index} has {other[0]}, or not the same ones; "
                "give every process the same arguments and the same files"
            )


def merged(work: Callable[[Iterator[int]], Iterable[Value]], count: int, *, unit: int) -> Iterator[Value]:
    """Shares out `count` items over the processes, and yields the results of all of them, in order, in every process.

    Every process takes part in every exchange, whether it has items or not, and tells there if it failed.

    Args:
      work: called once, with the indices of this process's items; gives a result for each, in order,
        that JSON can hold.
      count: number of items, the same in every process.
      unit: items that stay together: each process takes the items of whole units, eight between two exchanges.

    Raises:
      RunError: `work` failed in another process. If it failed in this one, its exception.
    """
    processes, this = jax.process_count(), jax.process_index()
    if processes == 1:  # each result as it comes
        yield from work(iter(range(count)))
        return
    most = _UNITS_IN_EXCHANGE * unit * processes
    firsts = range(0, count, most)

    def part(first: int) -> range:
        last = min(first + most, count)
        size = -(-(last - first) // (processes * unit)) * unit
        return range(min(first + this * size, last), min(first + (this + 1) * size, last))

    results = iter(work(itertools.chain.from_iterable(part(first) for first in firsts)))
    with contextlib.closing(results) if hasattr(results, "close") else contextlib.nullcontext():
        for first in firsts:
            mine = together(lambda first=first: list(itertools.islice(results, len(part(first)))))
            for theirs in gather(mine):
                yield from theirs


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

    Args:
      tree: of arrays.
      mesh: whose devices get it, such as `data_mesh()`.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.array(x)), tree)
