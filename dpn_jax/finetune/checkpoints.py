"""Checkpoints of a run: everything that it takes to go on as if nothing had happened, written by Orbax."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from dpn_jax.errors import RunError, reason

logger = logging.getLogger("dpn_jax")

_MOMENT = 0.2

State = TypeVar("State")


class Saved(NamedTuple):
    """What a checkpoint holds."""

    step: int
    """Batches seen."""
    state: Any
    """The training state, of NumPy arrays."""
    notes: dict[str, Any]
    """What else there is to remember, as JSON."""


class Checkpoints:
    """The checkpoints of one run: the newest few and the best.

    Only one process may use a folder. Orbax writes into a folder of another name and renames it when all is there, so
    that a checkpoint exists whole or not at all; a digest of its values tells what the disk damaged later.

    Saving blocks until it is done: a step of training takes longer than a DPN takes to write, and a full disk is
    noticed where it can be told.

    Args:
      folder: where they lie, each in a folder named by its step; made if need be.
      keep: how many of the newest are kept.

    Example:
      >>> import tempfile
      >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()), keep=2)
      >>> for step in range(4):
      ...     checkpoints.save(step, {"weight": np.full(3, step, np.float32)}, {"epoch": 0.5 * step}, best=0)
      >>> checkpoints.steps()
      [0, 2, 3]
      >>> checkpoints.newest({"weight": np.zeros(3, np.float32)})
      Saved(step=3, state={'weight': array([3., 3., 3.], dtype=float32)}, notes={'epoch': 1.5})
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        import orbax.checkpoint as ocp

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        self._kept = _Kept(newest=keep)
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
                preservation_policy=self._kept,
                multiprocessing_options=alone,
            ),
        )

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, oldest first; some may be damaged."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: State, notes: Mapping[str, Any], *, best: int | None = None) -> None:
        """Writes a checkpoint, then removes those that are neither among the newest nor the best.

        Args:
          step: its number; there must not be one yet.
          state: any pytree of arrays, none of them empty. Arrays of several hosts must be replicated.
          notes: JSON to go with it.
          best: the step of the best checkpoint so far, which is kept.

        Raises:
          RunError: it cannot be written; older ones are as they were.
        """
        import orbax.checkpoint as ocp

        arrays = {name: np.asarray(leaf) for name, leaf in _named(jax.device_get(state))}
        notes = dict(notes)
        self._kept.best = best
        contents = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays),
            notes=ocp.args.JsonSave({"notes": notes, "digest": _digest(arrays, notes)}),
        )
        try:
            with _quiet():
                self._manager.save(step, args=contents, force=True)
        except Exception as error:  # Orbax and TensorStore raise whatever the file system made of it
            raise RunError(
                f"{self.folder / str(step)}: the checkpoint cannot be written ({reason(error)}); "
                "make room and go on with --resume (resume=True)"
            ) from error

    def load(self, step: int, like: State) -> Saved:
        """Reads one checkpoint.

        Args:
          step: its number.
          like: a state of the same structure, shapes and dtypes; its values do not matter.

        Raises:
          RunError: it is damaged, or of another structure.
        """
        import orbax.checkpoint as ocp

        contents = ocp.args.Composite(state=ocp.args.PyTreeRestore(), notes=ocp.args.JsonRestore())
        try:
            with _quiet():
                read = self._manager.restore(step, args=contents)
            arrays, notes, digest = read.state, read.notes["notes"], read.notes["digest"]
            intact = digest == _digest(arrays, notes)
        except Exception as error:  # whatever a damaged file makes its reader stumble over
            raise RunError(f"{self.folder / str(step)}: the checkpoint cannot be read ({reason(error)})") from error
        if not intact:
            raise RunError(f"{self.folder / str(step)}: the checkpoint is damaged (its digest differs)")
        wanted = {name: (np.shape(leaf), np.dtype(leaf.dtype)) for name, leaf in _named(like)}
        if wanted != {name: (array.shape, array.dtype) for name, array in arrays.items()}:
            raise RunError(f"{self.folder / str(step)}: the checkpoint is of another model or optimizer")
        leaves = [arrays[name] for name, _ in _named(like)]
        return Saved(step, jax.tree.unflatten(jax.tree.structure(like), leaves), notes)

    def newest(self, like: State) -> Saved | None:
        """Reads the newest checkpoint that is whole; damaged newer ones are told of and moved aside.

        Args:
          like: as for `load`.

        Returns:
          The checkpoint, or None where there is none.

        Raises:
          RunError: there are some and all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                saved = self.load(step, like)
            except RunError as error:
                logger.warning("%s; trying the one before, this one is kept as damaged-%d", error, step)
                self._set_aside(step)
            else:
                return saved
        if steps:
            raise RunError(f"{self.folder}: every checkpoint is damaged; start again with another --output")
        return None

    def close(self) -> None:
        """Lets go of the folder."""
        self._manager.close()

    def _set_aside(self, step: int) -> None:
        """Frees the name: the run is going to pass this step again."""
        place = self.folder / f"damaged-{step}"
        number = 1
        while place.exists():
            number += 1
            place = self.folder / f"damaged-{step}-{number}"
        (self.folder / str(step)).rename(place)
        self._manager.reload()


@dataclasses.dataclass
class _Kept:
    """Orbax's preservation policy: the newest and the best."""

    newest: int
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """Tells for each checkpoint, oldest first, whether it stays."""
        old = len(checkpoints) - self.newest
        return [index >= old or checkpoint.step == self.best for index, checkpoint in enumerate(checkpoints)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from telling stderr of an error that is raised as well.

    It logs the traceback; and where one array cannot be read or written, the tasks of the others find their event loop
    closed, or fail too, which Python reports as exceptions that nobody can catch: now or, once the error and with it
    the tasks are forgotten, at any time later.
    """
    log, hook, tasks = logging.getLogger("absl"), sys.unraisablehook, logging.getLogger("asyncio")
    before, log.disabled = log.disabled, True
    sys.unraisablehook = lambda args: None if str(args.exc_value) == "Event loop is closed" else hook(args)
    tasks.addFilter(_is_no_lost_task)
    try:
        yield
        tasks.removeFilter(_is_no_lost_task)
    except Exception:
        time.sleep(_MOMENT)
        raise
    finally:
        sys.unraisablehook = hook
        log.disabled = before


def _is_no_lost_task(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Task exception was never retrieved")


def _named(state: State) -> Iterator[tuple[str, Any]]:
    """The leaves of a pytree by name, such as 'params/stem/conv/kernel'; independent of Orbax's view of its nodes."""
    for path, leaf in jax.tree.leaves_with_path(state):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _digest(arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
