"""The training loop: steps, metrics, validation, checkpoints, stopping on a signal, resuming."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from dpn_jax.errors import DataError, DivergedError, RunError
from dpn_jax.finetune.checkpoints import Checkpoints, Saved
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.finetune.data import BatchIterator
from dpn_jax.finetune.interruption import Interruption
from dpn_jax.finetune.layerwise import layer_rates
from dpn_jax.finetune.metrics import Row, Window, quality, validate
from dpn_jax.finetune.optimizer import StepCounts
from dpn_jax.finetune.report import Log
from dpn_jax.finetune.step import TrainState, train_step
from dpn_jax.multihost import any_of, broadcast_arrays, is_first, on_first, replicate, shard_batch

CHECKPOINTS = "checkpoints"
_LOGS_PER_EPOCH = 20
_STEPS_PER_LOG = 50


class Training:
    """A run in progress.

    The checkpoint at the end of an epoch is written before the validation, and a resumed run repeats that validation:
    so all checkpoints hold the same things, and a signal during a long validation loses nothing.

    Args:
      output: the run's folder.
      config: the options.
      state: the initial state, on every device of `mesh`.
      mesh: the devices.
      train, val: the data; `val` goes over all images once per epoch.
      interruption: asks the run to stop.
      note: called with each message, a line.
      callbacks: called in process 0 with each line of the log.
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
        callbacks: Sequence[Callable[[Row], None]] = (),
    ) -> None:
        self.output = output
        self.config = config
        self.state = state
        self.steps = StepCounts(config, train.per_epoch)
        self._log_every = min(max(train.per_epoch // _LOGS_PER_EPOCH, 1), _STEPS_PER_LOG)
        self.step = 0
        self.saved: int | None = None
        """The step of the newest checkpoint."""
        self.best: Row | None = None
        """The best validation by `config.metric`."""
        self._mesh = mesh
        self._train = train
        self._val = val
        self._interruption = interruption
        self._note = note
        self._callbacks = callbacks
        depths = state.setup.architecture.depths
        self._window = Window(layer_rates(config, state.params, depths) if config.log_layers else {})
        self._since = time.monotonic()
        self._checkpoints: Checkpoints | None = None  # in process 0 only, as the log

        def open_folder() -> None:
            self._checkpoints = Checkpoints(output / CHECKPOINTS, keep=config.keep)

        on_first(open_folder)

    def restore(self) -> bool:
        """Restores the newest checkpoint.

        Returns:
          False if there is none.

        Raises:
          RunError: there are checkpoints, but none can be used.
        """
        saved: Saved | None = None

        def read() -> dict[str, Any] | None:
            nonlocal saved
            saved = self._checkpoints.newest(self.state)
            return saved and {"step": saved.step, "notes": saved.notes}

        found = on_first(read)
        if found is None:
            return False
        self._set_state(saved)
        self.step = self.saved = found["step"]
        self.best, self._window.sums = found["notes"]["best"], found["notes"]["window"]
        self._train.set_state(found["notes"]["iterator"])
        return True

    def run(self, *, progress: bool) -> bool:
        """Trains to the end, or until asked to stop, and saves.

        Args:
          progress: show a progress bar if stderr is a terminal.

        Returns:
          Whether training is complete.

        Raises:
          RunError: a checkpoint cannot be written, or training has diverged.
          DataError: an image cannot be read.
        """
        opened: list[Log] = []  # in process 0 only
        on_first(lambda: opened.append(Log(self.output, step=self.step)))
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(contextlib.closing(opened[0])) if opened else None
            bar = stack.enter_context(self._bar(progress))
            try:
                return self._run(log, bar)
            except DivergedError as error:
                good = "no checkpoint was written" if self.saved is None else f"checkpoint {self.saved} is kept"
                raise DivergedError(
                    f"{self.output}: training has diverged: {error}; {good}; "
                    "start again with a lower --learning-rate, or --clip-norm 1, and another --output"
                ) from error

    def best_state(self) -> tuple[TrainState, int]:
        """The state of the best validation, and its step; the last state if that checkpoint cannot be read."""
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
            self._note(f"{problem}; using the last state instead of the best")
            return self.state, self.step
        self._set_state(saved)
        return self.state, self.best["step"]

    def close(self) -> None:
        """Ends the worker processes and closes the checkpoints."""
        self._train.close()
        self._val.close()
        if self._checkpoints:
            self._checkpoints.close()

    def _run(self, log: Log | None, bar: tqdm.tqdm) -> bool:
        while True:
            if self.steps.ends_epoch(self.step) and not self._validate(log):
                return False
            if self.step == self.steps.total or self._is_out_of_patience():
                return True
            if self._asked_to_stop() or not self._train_batch(bar):
                self._save()
                return False
            ended = self.steps.ends_epoch(self.step)
            if ended or self.step % self._log_every == 0:
                self._report(log, bar)
            if self.steps.saves(self.step):
                self._save()

    def _train_batch(self, bar: tqdm.tqdm) -> bool:
        """Starts one step; False if the signal that asks this process to stop has killed a worker."""
        try:
            batch = next(self._train)
        except DataError:
            if self._interruption.requested:
                return False
            raise
        self.state, metrics = train_step(self.state, shard_batch(batch, self._mesh))
        self.step += 1
        self._window.add(self.step, metrics)
        bar.update(self.config.batch_size)
        return True

    def _report(self, log: Log | None, bar: tqdm.tqdm) -> None:
        """Logs the steps since the last line of the log."""
        self._window.fetch()
        images = self._window.sums["count"]
        row = self._row("train", self._window.means())
        now = time.monotonic()
        rate, self._since = images / (now - self._since), now
        bar.set_postfix({"epoch": f"{row['epoch']:.1f}", "loss": row["loss"], "accuracy": f"{row['accuracy']:.1%}"})
        on_first(lambda: self._tell(log, row, images_per_second=rate))

    def _validate(self, log: Log | None) -> bool:
        """Measures the state on the validation images; False if asked to stop meanwhile."""
        batches = (shard_batch(next(self._val), self._mesh) for _ in range(self._val.per_epoch))
        alone = jax.process_count() == 1  # all hosts must run the same steps
        try:
            means = validate(
                self.state,
                batches,
                ema=self.config.ema_decay is not None,
                stop=lambda: alone and self._interruption.requested,
            )
        except DataError:
            if self._interruption.requested:  # the signal has killed the worker
                return False
            raise
        if means is None:
            return False
        row = self._row("val", means)
        metric = self.config.metric
        if self.best is None or quality(row, metric) > quality(self.best, metric):
            self.best = row
        on_first(lambda: self._tell(log, row))
        self._note(
            f"epoch {row['epoch']:.0f} of {self.config.epochs}: validation loss {row['loss']:.4f}, "
            f"accuracy {row['accuracy']:.2%}{', the best so far' if self.best is row else ''}"
        )
        self._since = time.monotonic()
        return True

    def _is_out_of_patience(self) -> bool:
        """Whether the best validation is too many epochs ago; told once."""
        patience = self.config.patience
        if patience is None or self.best is None or not self.steps.ends_epoch(self.step):
            return False
        waited = (self.step - self.best["step"]) // self.steps.per_epoch
        if waited >= patience:
            self._note(f"no better validation for {waited} epochs: training ends (patience {patience})")
        return waited >= patience

    def _tell(self, log: Log, row: Row, **for_tensorboard: float) -> None:
        """In process 0; where a callback fails, all processes hear of it."""
        log.write(row, **for_tensorboard)
        for callback in self._callbacks:
            callback(dict(row))

    def _row(self, split: str, means: dict[str, float]) -> Row:
        return {"split": split, "step": self.step, "epoch": self.step / self.steps.per_epoch, **means}

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
            return self._interruption.requested
        # all processes must stop at the same step, and asking them takes time
        return self.step % self._log_every == 0 and any_of(self._interruption.requested)

    def _set_state(self, saved: Saved | None) -> None:
        """Takes the state that process 0 has read."""
        arrays = saved.state if saved else jax.device_get(self.state)  # the others only need the shapes
        self.state = replicate(broadcast_arrays(arrays), self._mesh)

    def _bar(self, wanted: bool) -> tqdm.tqdm:
        return tqdm.tqdm(
            total=self.steps.total * self.config.batch_size,
            initial=self.step * self.config.batch_size,
            unit="image",
            unit_scale=True,
            disable=None if wanted and is_first() else True,
        )
