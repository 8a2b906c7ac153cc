"""Checkpoints of a run: everything needed to resume as if nothing had happened, written by Orbax."""

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from dpn_jax.errors import RunError, reason

logger = logging.getLogger("dpn_jax")

Tree = TypeVar("Tree")


class Saved(NamedTuple):
    """The contents of a checkpoint."""

    step: int
    """Batches seen."""
    state: Any
    """The training state, as NumPy arrays."""
    notes: dict[str, Any]
    """Anything else to remember, as JSON."""


class Checkpoints:
    """The checkpoints of one run: the newest few and the best, which `loop.py` chooses.

    Only one process may use a folder. Orbax writes into a temporary folder and renames it at the end, so a checkpoint
    is complete or absent; a digest of its values detects later damage.

    Saving blocks until it is done: writing a DPN takes less time than a training step, and a full disk is reported at
    the step where it happens.

    Args:
      folder: holds one folder per checkpoint, named by its step; created if missing.
      keep: how many of the newest to keep.

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
        self._newest = ocp.checkpoint_managers.LatestN(keep)
        self._policy = ocp.checkpoint_managers.AnyPreservationPolicy([self._newest])
        index = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
                preservation_policy=self._policy,
                multiprocessing_options=alone,
            ),
        )

    def steps(self) -> list[int]:
        """The steps of the existing checkpoints, oldest first; some may be damaged."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Tree, notes: Mapping[str, Any], *, best: int | None = None) -> None:
        """Writes a checkpoint, then removes those that are neither among the newest nor the best.

        Args:
          step: its number, which must be new.
          state: any pytree of arrays, none of them empty. Arrays of several hosts must be replicated.
          notes: JSON stored with it.
          best: the step of the best checkpoint so far, which is kept.

        Raises:
          RunError: it cannot be written; the older ones are unchanged.
        """
        import orbax.checkpoint as ocp

        arrays = {name: np.asarray(leaf) for name, leaf in _named(jax.device_get(state))}
        notes = dict(notes)
        # not Orbax's BestN: it ranks by metrics saved with a checkpoint, and ours are validated after they are written
        best_so_far = ocp.checkpoint_managers.CustomSteps([] if best is None else [best])
        self._policy.policies = [self._newest, best_so_far]
        contents = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays),
            notes=ocp.args.JsonSave({"notes": notes, "digest": digest_of(arrays, notes)}),
        )
        try:
            with _errors_printed_once():
                self._manager.save(step, args=contents, force=True)
        except Exception as error:  # Orbax and TensorStore raise many types
            raise RunError(
                f"{self.folder / str(step)}: the checkpoint cannot be written ({reason(error)}); "
                "make room and continue with --resume (resume=True)"
            ) from error

    def load(self, step: int, like: Tree) -> Saved:
        """Reads one checkpoint.

        Args:
          step: its number.
          like: a pytree of the same structure, shapes and dtypes; its values are ignored.

        Raises:
          RunError: it is damaged, or of another structure.
        """
        import orbax.checkpoint as ocp

        contents = ocp.args.Composite(state=ocp.args.PyTreeRestore(), notes=ocp.args.JsonRestore())
        try:
            with _errors_printed_once():
                read = self._manager.restore(step, args=contents)
            arrays, notes, digest = read.state, read.notes["notes"], read.notes["digest"]
            intact = digest == digest_of(arrays, notes)
        except Exception as error:  # a damaged file raises any type
            raise RunError(f"{self.folder / str(step)}: the checkpoint cannot be read ({reason(error)})") from error
        if not intact:
            raise RunError(f"{self.folder / str(step)}: the checkpoint is damaged (wrong digest)")
        wanted = {name: (np.shape(leaf), np.dtype(leaf.dtype)) for name, leaf in _named(like)}
        if wanted != {name: (array.shape, array.dtype) for name, array in arrays.items()}:
            raise RunError(f"{self.folder / str(step)}: the checkpoint is of another model or optimizer")
        leaves = [arrays[name] for name, _ in _named(like)]
        return Saved(step, jax.tree.unflatten(jax.tree.structure(like), leaves), notes)

    def newest(self, like: Tree) -> Saved | None:
        """Reads the newest intact checkpoint; damaged newer ones are reported and moved aside.

        Args:
          like: as for `load`.

        Returns:
          The checkpoint, or None if there are none.

        Raises:
          RunError: all of them are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                saved = self.load(step, like)
            except RunError as error:
                logger.warning("%s; trying the one before; this one is kept as damaged-%d", error, step)
                self._set_aside(step)
            else:
                return saved
        if steps:
            raise RunError(f"{self.folder}: every checkpoint is damaged; start again with another --output")
        return None

    def close(self) -> None:
        """Releases the folder."""
        self._manager.close()

    def _set_aside(self, step: int) -> None:
        """Frees the name, which the resumed run needs when it reaches this step again."""
        place = self.folder / f"damaged-{step}"
        number = 1
        while place.exists():
            number += 1
            place = self.folder / f"damaged-{step}-{number}"
        (self.folder / str(step)).rename(place)
        self._manager.reload()


@contextlib.contextmanager
def _errors_printed_once() -> Iterator[None]:
    """Hides what Orbax prints about an error that it raises as well.

    When one array cannot be written or read, Orbax logs the traceback and closes its event loop. TensorStore's threads
    then find the loop closed for each of the other arrays: exceptions that nobody can catch, at any later time.
    """
    hook, loggers = sys.unraisablehook, [logging.getLogger(name) for name in ("absl", "asyncio")]
    sys.unraisablehook = lambda lost: None if str(lost.exc_value) == "Event loop is closed" else hook(lost)
    for log in loggers:
        log.addFilter(_is_not_orbax)
    yield  # not in try: after an error this must last, since no event tells when the last thread has ended
    sys.unraisablehook = hook
    for log in loggers:
        log.removeFilter(_is_not_orbax)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    lost_task = "exception was never retrieved" in record.getMessage()  # of a Task, Future or _GatheringFuture
    return not lost_task and "orbax" not in Path(record.pathname).parts


def _named(tree: Tree) -> Iterator[tuple[str, Any]]:
    """The leaves of a pytree by name, such as 'params/stem/conv/kernel', however Orbax would name them."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def digest_of(arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> str:
    """SHA-256 of arrays, with their names, dtypes and shapes, and of JSON."""
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
