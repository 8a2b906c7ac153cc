"""The training loop: steps, measurements, validation, checkpoints, and going on from one."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from dpn_jax.errors import DivergedError, RunError
from dpn_jax.finetune.checkpoints import Checkpoints, Saved
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.finetune.data import BatchIterator, DataError
from dpn_jax.finetune.interrupt import Interruption
from dpn_jax.finetune.metrics import Row, Window, quality, validate
from dpn_jax.finetune.multihost import any_of, is_first, on_first, replicate, shard_batch, share_arrays
from dpn_jax.finetune.report import Log
from dpn_jax.finetune.step import TrainState, train_step

CHECKPOINTS = "checkpoints"
_LOGS_PER_EPOCH = 20
_STEPS_PER_LOG = 50


@dataclasses.dataclass(frozen=True)
class Plan:
    """When what is done, in batches."""

    per_epoch: int
    total: int
    log_every: int
    save_every: int

    @classmethod
    def of(cls, config: FinetuneConfig, per_epoch: int) -> Self:
        """The plan for epochs of so many batches."""
        log_every = min(max(per_epoch // _LOGS_PER_EPOCH, 1), _STEPS_PER_LOG)
        save_every = per_epoch if config.checkpoint_every is None else config.checkpoint_every * config.accumulate
        return cls(per_epoch, config.epochs * per_epoch, log_every, save_every)

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch is over after `step` batches."""
        return step > 0 and step % self.per_epoch == 0


class Training:
    """A run in progress.

    A checkpoint at the end of an epoch is written before the validation, which a resumed run makes again: so every
    checkpoint tells the same, and a signal during a long validation loses nothing.

    Args:
      output: the run's folder.
      config: the choices.
      state: where to begin, on every device of `mesh`.
      mesh: the devices.
      train, val: the data; `val` goes over all images once for every epoch.
      interruption: asks the run to stop.
      note: told what there is to tell.
    """

    def __init__(
        self,
        output: Path,
        config: FinetuneConfig,
        state: TrainState,
        mesh: Mesh,
        train: BatchIterator,
        val: BatchIterator,
        interruption: Interruption,
        note: Callable[[str], None],
    ) -> None:
        self.output = output
        self.config = config
        self.state = state
        self.plan = Plan.of(config, train.per_epoch)
        self.step = 0
        self.saved: int | None = None
        """The step of the newest checkpoint."""
        self.best: Row | None = None
        """The validation with the highest accuracy, of equal ones the lowest loss."""
        self._mesh = mesh
        self._train = train
        self._val = val
        self._interruption = interruption
        self._note = note
        self._window = Window()
        self._since = time.monotonic()
        self._checkpoints: Checkpoints | None = None
        if is_first():
            self._checkpoints = Checkpoints(output / CHECKPOINTS, keep=config.keep)

    def restore(self) -> bool:
        """Goes to where the newest checkpoint was written.

        Returns:
          False where there is none.

        Raises:
          RunError: there are some and none can be used.
        """
        saved: Saved | None = None

        def read() -> dict[str, Any] | None:
            nonlocal saved
            saved = self._checkpoints.newest(self.state)
            return saved and {"step": saved.step, "notes": saved.notes}

        found = on_first(read)
        if found is None:
            return False
        self._put(saved.state if saved else None)
        self.step = self.saved = found["step"]
        self.best, self._window.sums = found["notes"]["best"], found["notes"]["window"]
        self._train.set_state(found["notes"]["iterator"])
        return True

    def run(self, *, progress: bool) -> bool:
        """Trains until the end, or until it is asked to stop, and saves.

        Args:
          progress: show a bar, where stderr is a terminal.

        Returns:
          Whether it came to the end.

        Raises:
          RunError: a checkpoint cannot be written, or training has diverged.
          DataError: an image cannot be read.
        """
        log = _log(self.output, self.step)
        with contextlib.closing(log) if log else contextlib.nullcontext(), self._bar(progress) as bar:
            try:
                return self._run(log, bar)
            except DivergedError as error:
                good = "no checkpoint was written" if self.saved is None else f"checkpoint {self.saved} is kept"
                raise DivergedError(
                    f"{self.output}: training has diverged: {error}; {good}; "
                    "begin again with a lower --learning-rate, or --clip-norm 1, and another --output"
                ) from error

    def best_state(self) -> tuple[TrainState, int]:
        """The state of the best validation, and its step; the current one where that cannot be read any more."""
        if self.best is None or self.best["step"] == self.step:
            return self.state, self.step
        saved: Saved | None = None

        def read() -> str | None:
            nonlocal saved
            try:
                saved = self._checkpoints.load(self.best["step"], self.state)
            except RunError as error:
                return str(error)
            return None

        if problem := on_first(read):
            self._note(f"{problem}; the last state is taken instead of the best")
            return self.state, self.step
        self._put(saved.state if saved else None)
        return self.state, self.best["step"]

    def close(self) -> None:
        """Ends the workers and lets go of the checkpoints."""
        self._train.close()
        self._val.close()
        if self._checkpoints:
            self._checkpoints.close()

    def _run(self, log: Log | None, bar: tqdm.tqdm) -> bool:
        while True:
            if self.plan.ends_epoch(self.step) and not self._validate(log):
                return False
            if self.step == self.plan.total:
                return True
            if self._asked_to_stop() or not self._advance(bar):
                self._save()
                return False
            ended = self.plan.ends_epoch(self.step)
            if ended or self.step % self.plan.log_every == 0:
                self._report(log, bar)
            if ended or self.step % self.plan.save_every == 0:
                self._save()

    def _advance(self, bar: tqdm.tqdm) -> bool:
        """Starts one step; False where a worker died of the signal that asks this process to stop."""
        try:
            batch = next(self._train)
        except DataError:
            if self._interruption.wanted:
                return False
            raise
        self.state, metrics = train_step(self.state, shard_batch(batch, self._mesh))
        self.step += 1
        self._window.add(self.step, metrics)
        bar.update(self.config.batch_size)
        return True

    def _report(self, log: Log | None, bar: tqdm.tqdm) -> None:
        """Writes a line on the steps since the last one."""
        self._window.fetch()
        images = self._window.sums["count"]
        row = self._row("train", self._window.means())
        now = time.monotonic()
        rate, self._since = images / (now - self._since), now
        bar.set_postfix({"epoch": f"{row['epoch']:.1f}", "loss": row["loss"], "accuracy": f"{row['accuracy']:.1%}"})
        if log:
            log.write(row, images_per_second=rate)

    def _validate(self, log: Log | None) -> bool:
        """Goes over the validation images; False where it was asked to stop meanwhile."""
        batches = (shard_batch(next(self._val), self._mesh) for _ in range(self._val.per_epoch))
        alone = jax.process_count() == 1  # of several hosts, none may leave the others behind
        try:
            means = validate(
                self.state,
                batches,
                ema=self.config.ema_decay is not None,
                stop=lambda: alone and self._interruption.wanted is not None,
            )
        except DataError:
            if self._interruption.wanted:  # the worker died of it
                return False
            raise
        if means is None:
            return False
        row = self._row("val", means)
        if self.best is None or quality(row) > quality(self.best):
            self.best = row
        if log:
            log.write(row)
        self._note(
            f"epoch {row['epoch']:.0f} of {self.config.epochs}: validation loss {row['loss']:.4f}, "
            f"accuracy {row['accuracy']:.2%}{', the best so far' if self.best is row else ''}"
        )
        self._since = time.monotonic()
        return True

    def _row(self, split: str, means: dict[str, float]) -> Row:
        return {"split": split, "step": self.step, "epoch": self.step / self.plan.per_epoch, **means}

    def _save(self) -> None:
        """Writes a checkpoint of this step, unless there is one."""
        if self.saved == self.step:
            return
        self._window.fetch()
        notes = {"iterator": self._train.get_state(), "window": self._window.sums, "best": self.best}
        best = self.best and self.best["step"]

        def write() -> None:
            state = jax.device_get(self.state)
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
                raise DivergedError(f"a parameter is not finite after step {self.step}")
            self._checkpoints.save(self.step, state, notes, best=best)

        on_first(write)
        self.saved = self.step
        self._since = time.monotonic()

    def _asked_to_stop(self) -> bool:
        if jax.process_count() == 1:
            return self._interruption.wanted is not None
        # all have to stop at one step, and asking the others takes time
        return self.step % self.plan.log_every == 0 and any_of(self._interruption.wanted is not None)

    def _put(self, arrays: TrainState | None) -> None:
        """Takes the state that process 0 has read."""
        if arrays is None:
            arrays = jax.device_get(self.state)  # of the right shapes
        self.state = replicate(share_arrays(arrays), self._mesh)

    @contextlib.contextmanager
    def _bar(self, wanted: bool) -> Iterator[tqdm.tqdm]:
        with tqdm.tqdm(
            total=self.plan.total * self.config.batch_size,
            initial=self.step * self.config.batch_size,
            unit="image",
            unit_scale=True,
            disable=None if wanted and is_first() else True,
        ) as bar:
            yield bar


def _log(output: Path, step: int) -> Log | None:
    """A log in process 0, None in the others."""
    made: list[Log] = []
    on_first(lambda: made.append(Log(output, step=step)))
    return made[0] if made else None
