"""Worker processes that never use an accelerator, end with their parent and report their death; Grain's prefetching."""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from dpn_jax.errors import DataError

_THREADS = 4


def prefetched(source: Sequence[Any], workers: int, *, start: int = 0) -> Iterator[Any]:
    """The items of `source` in order, prefetched by worker processes, or by threads of this one if `workers` is 0.

    Grain spawns the processes, so none is a fork of one that runs JAX. They start with the first item and end when the
    iterator is closed.

    Args:
      source: picklable, with `len` and items by index.
      workers: number of processes.
      start: index of the first item.

    Raises:
      DataError: a worker died. Exceptions of `source` are raised here.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain 0.2.18 reads a flag that nobody parsed: google/grain issue 1355
        flags.FLAGS.mark_as_parsed()
    threads = 0 if workers else min(_THREADS, os.cpu_count() or 1)
    with contextlib.ExitStack() as until_closed:
        if workers:
            source = until_closed.enter_context(_in_a_file(source))
        data = grain.MapDataset.source(source).slice(slice(start, None))
        if workers:
            data = data.map(pickle.dumps)  # Grain sends arrays in shared memory, which an interrupted run would leak
        data = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        if workers:
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
            data = data.mp_prefetch(options, worker_init_fn=_start_worker)
        try:
            with interrupts_held(workers):
                iterator = iter(data)
                until_closed.callback(iterator.close)
                first = list(itertools.islice(iterator, 1))
            for item in itertools.chain(first, iterator):
                yield pickle.loads(item) if workers else item
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            code = str(error).partition("exit code ")[2].split(".")[0]
            raise DataError(death(code)) from error


@dataclasses.dataclass
class _FileSource(Sequence[Any]):
    """A source that each process reads from a file when it needs the first item."""

    path: str
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self._source[index]

    @functools.cached_property
    def _source(self) -> Sequence[Any]:
        return pickle.loads(Path(self.path).read_bytes())


@contextlib.contextmanager
def _in_a_file(source: Sequence[Any]) -> Iterator[_FileSource]:
    """The source, not in the pipe to a worker: what does not fit into one waits forever if the worker dies starting."""
    import cloudpickle  # what Grain uses: a notebook's classes travel too

    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        file.write(cloudpickle.dumps(source))
        file.flush()
        yield _FileSource(file.name, len(source))


@contextlib.contextmanager
def interrupts_held(workers: int) -> Iterator[None]:
    """Ctrl-C does not reach processes that are started here, ever: it would end them with a traceback while they start.

    This process has it afterwards, or at once where another thread can take it. Without workers nothing is held.
    """
    if not workers or not hasattr(signal, "pthread_sigmask"):  # Windows has none
        yield
        return
    resource_tracker.ensure_running()  # or the first process would start it, which lets SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(index: int, count: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to the whole group: the run saves, then ends the workers
    start_worker()


def start_worker() -> None:
    """To be called first in a worker process."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # imported with dpn_jax, before the variable was set
        sys.modules["jax"].config.update("jax_platforms", "cpu")  # the accelerator belongs to the main process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent to the whole group: the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exits when the main process dies, which could not end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def death(code: int | str | None) -> str:
    """What a message says of a worker that died with this exit code."""
    reasons = {
        "-9": "killed, perhaps for lack of memory: lower --workers or --batch-size",
        "1": "see its message above; a script must keep its code under: if __name__ == '__main__'",
    }
    return f"a worker process that reads images died (exit code {code}): {reasons.get(str(code), 'try --workers 0')}"


def refuse_in_starting_worker() -> None:
    """Raises DataError in a worker that is starting: it runs the main script again, which must not start workers."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise DataError("the script runs again in a worker process: put its code under: if __name__ == '__main__'")
