"""Reading ahead with Grain: worker processes that never hold an accelerator, outlive nothing and fail aloud."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from dpn_jax.errors import DataError

_THREADS = 4


def prefetched(source: Sequence[Any], workers: int, *, start: int = 0) -> Iterator[Any]:
    """The items of `source` in order, read ahead by processes, or by threads of this one where `workers` is 0.

    Grain starts the processes anew ('spawn'), which never copies one that holds JAX. Nothing starts before the first
    item is asked for; closing the iterator ends what was started.

    Args:
      source: picklable, with `len` and items by index.
      workers: how many processes.
      start: index of the first item.

    Raises:
      DataError: a worker died. What `source` raises is raised here.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain 0.2.18 reads one of its flags all the same: google/grain issue 1355
        flags.FLAGS.mark_as_parsed()
    threads = 0 if workers else min(_THREADS, os.cpu_count() or 1)
    data = grain.MapDataset.source(source).slice(slice(start, None))
    if workers:
        data = data.map(pickle.dumps)  # arrays would travel in shared memory, which an interrupted run leaves behind
    data = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        data = data.mp_prefetch(options, worker_init_fn=_begin_worker)
    iterator = iter(data)
    try:
        for item in iterator:
            yield pickle.loads(item) if workers else item
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise DataError(_death(str(error))) from error
    finally:
        iterator.close()


def _begin_worker(index: int, count: int) -> None:
    """Runs first in a worker process."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # importing dpn_jax has brought it, and has read the environment
        sys.modules["jax"].config.update("jax_platforms", "cpu")  # no worker may ever hold the accelerator
    for stop in (signal.SIGINT, signal.SIGTERM):  # sent to all: the run ends the workers when it has saved
        signal.signal(stop, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A run that was killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _death(message: str) -> str:
    code = message.partition("exit code ")[2].split(".")[0]
    reasons = {
        "-9": "killed, perhaps because memory was short: lower --workers or --batch-size",
        "1": "its message stands above; a script's code must stand under: if __name__ == '__main__'",
    }
    return f"a worker process that reads images died (exit code {code}): {reasons.get(code, 'try --workers 0')}"


def refuse_in_starting_worker() -> None:
    """A worker process first runs the main script again, which must not start workers of its own."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise DataError("the script runs again in a worker process: put its code under: if __name__ == '__main__'")
