"""A fine-tuning run, from a folder of class folders to a file of weights."""

import contextlib
import importlib.util
import logging
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from dpn_jax.checkpoint.save import save
from dpn_jax.config import DPNConfig
from dpn_jax.errors import RunError, reason
from dpn_jax.finetune.best import report_best
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.finetune.data import BatchIterator, batches
from dpn_jax.finetune.interruption import catch_interruption
from dpn_jax.finetune.loop import Training
from dpn_jax.finetune.metrics import Row
from dpn_jax.finetune.optimizer import learning_rate, make_optimizer
from dpn_jax.finetune.record import opened, write_record
from dpn_jax.finetune.report import CURVES, METRICS, plot_curves, read_metrics
from dpn_jax.finetune.start import Given, Images, Start, new, resumed
from dpn_jax.finetune.step import TrainState
from dpn_jax.model import DPN
from dpn_jax.multihost import data_mesh, is_first, on_first, replicate
from dpn_jax.paths import local_path, readable_path

WEIGHTS = "model.safetensors"

logger = logging.getLogger("dpn_jax")


class Finetuned(NamedTuple):
    """The result of a run."""

    output: Path
    """The run's folder."""
    weights: Path | None
    """The file of weights; None if training was interrupted."""
    step: int
    """Batches seen."""
    steps: int
    """Batches in the whole run."""
    best: Row | None
    """The best validation: `step`, `epoch`, `loss`, `accuracy`, `accuracy5`."""
    signal: int | None = None
    """The number of the signal that interrupted the run."""


def finetune(
    folder: str | Path | None,
    output: str | Path,
    config: FinetuneConfig | None = None,
    *,
    source: str | Path | DPNConfig | None = None,
    model: str | DPN | None = None,
    revision: str | None = None,
    resume: bool = False,
    progress: bool = True,
    note: Callable[[str], None] = logger.info,
    callbacks: Sequence[Callable[[Row], None]] = (),
) -> Finetuned:
    """Trains a model on a folder of class folders, as `dpn-jax finetune` does.

    Writes `config.json`, `images.json`, `metrics.jsonl`, TensorBoard's events, checkpoints and, at the end,
    `model.safetensors` (the state with the best validation; its moving average if `config.ema_decay` is set),
    `curves.png`, and `report/`: how these weights do on the validation images (`report.html`, `confusion.csv`,
    `predictions.csv`, `results.json`), unless `config.report` is off. SIGTERM and Ctrl-C save a checkpoint and stop. On
    CPU a resumed run is bit-identical to an uninterrupted one.

    Args:
      folder: `train/<class>/*` and `val/<class>/*`, or `<class>/*`, see `image_folder`; each may be packed, and they
        may be in a bucket ('gs://bucket/photos'). A resumed run knows its own.
      output: the run's folder on this machine, new or empty unless `resume` is set.
      config: the options; defaults to those of the resumed run, or to `FinetuneConfig()`. A resumed run may have other
        `workers`, `keep`, `checkpoint_every`, `skip_broken`, `report` and `remat`, and more or fewer `epochs`: the
        learning rate then follows the schedule of their number from here.
      source: a tag, hub id or file of the initial weights; or a variant ('dpn68b') or an architecture for random
        weights. A resumed run knows its own.
      model: the model to start from, in place of a source; it is copied and not changed. A changed one (own blocks,
        norms, head) trains in the plain form, `FinetuneConfig(fast=False)`; its result is restored by
        `load(path, into=model)`. Its dropout becomes `config.drop_rate`. It keeps its classifier if it has as many
        classes and no other names for them. Or, with a source, the name of its architecture, as for `from_pretrained`.
        A resumed run needs the model again if it is changed, and where there is no checkpoint yet.
      revision: as for `from_pretrained`.
      resume: continue from the newest checkpoint in `output`.
      progress: show a progress bar if stderr is a terminal.
      note: called with each message, a line.
      callbacks: called in process 0 with each line of `metrics.jsonl`, a dict: `split`, `step`, `epoch`, `loss`,
        `accuracy`, ... What they raise ends the run, which `resume` continues.

    Returns:
      The files of the run and its best validation.

    Raises:
      RunError: `output` exists, is in use, or cannot be resumed or written; or training diverged (`DivergedError`).
      DataError: the images cannot be trained on.
      CheckpointError, ValueError: the model cannot be loaded, or does not fit the options.

    Example:
      Digits from random weights::

        run = finetune("digits", "run", FinetuneConfig(epochs=5, image_size=32), source="dpn68b")
        classifier = dpn_jax.Classifier.from_pretrained(run.weights)

      A model of one's own, with a block of one's own::

        model = dpn_jax.create_model("dpn68b", num_classes=10, block=MyBlock, rngs=nnx.Rngs(0))
        run = finetune("digits", "run", FinetuneConfig(fast=False, image_size=32), model=model)
        dpn_jax.load(run.weights, into=model)
    """
    _check_installed()
    if isinstance(model, DPN):
        if source is not None or revision is not None:
            name, value = ("revision", revision) if source is None else ("source", source)
            raise ValueError(f"model= is the model itself, with its weights; {name}={value!r} cannot be given with it")
        source, model = model, None
    elif not isinstance(model, str | None):
        raise ValueError(f"model must be a DPN or the name of an architecture, got a {type(model).__name__}")
    if not resume and (folder is None or source is None):
        raise ValueError("a new run needs a folder of images and a source of its weights (source= or model=)")
    output = local_path(output, error=RunError)
    say = note if is_first() else logger.debug
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(opened(output, resume=resume)))
        given = Given(folder, source, model, revision)
        start = (resumed if resume else new)(output, config, given, say)
        record, images, config, mesh = start.record, start.images, start.record.config, data_mesh()
        train, val = _batches(images, config, start.model, mesh)
        state = replicate(_initial_state(config, start.model, train, images.train.labels), mesh)
        if not resume:
            on_first(lambda: start.write(output))
        interruption = stack.enter_context(catch_interruption())
        training = Training(output, config, state, mesh, train, val, interruption, say, callbacks)
        stack.callback(training.close)
        stack.enter_context(_one_line_errors(training))
        updates = f", {training.steps.updates} updates" if config.accumulate > 1 else ""
        say(
            f"{len(images.train)} training images of {len(record.class_names)} classes, {len(images.val)} validation "
            f"images; {training.steps.total} steps{updates} on {mesh.size} {'device' if mesh.size == 1 else 'devices'}"
        )
        if resume:
            _restore(training, start, say)
        if not training.run(progress=progress):
            say(f"stopped after step {training.step} of {training.steps.total}; checkpoint {training.saved} is saved")
            by = interruption.signal or signal.SIGTERM  # which another process has got
            return Finetuned(output, None, training.step, training.steps.total, training.best, by)
        on_first(lambda: plot_curves(read_metrics(output / METRICS), output / CURVES))
        best, step = training.best_state()
        ema = config.ema_decay is not None
        on_first(lambda: save(best.model(ema=ema), output / WEIGHTS, overwrite=True))
        say(f"{output / WEIGHTS}: the {'moving average of the ' if ema else ''}weights after step {step}")
        if config.report:
            root = readable_path(record.folder)
            options = {"root": root, "step": step, "interruption": interruption, "note": say}
            report_best(output, lambda: best.model(ema=ema), images.val, config, **options)
        by = interruption.signal
        return Finetuned(output, output / WEIGHTS, training.step, training.steps.total, training.best, by)


def _restore(training: Training, start: Start, say: Callable[[str], None]) -> None:
    """Restores the newest checkpoint of a run and writes down its options from here on."""
    found = training.restore()
    done, steps, config = training.step, training.steps, start.record.config
    if done > steps.total:
        epochs = math.ceil(done / steps.per_epoch)
        raise RunError(f"{training.output}: {epochs} epochs are done already; --epochs must be at least {epochs}")
    on_first(lambda: write_record(training.output, start.record))
    say(f"resuming from step {done}" if found else "no checkpoint yet: starting from the beginning")
    if config.epochs != start.before.config.epochs and done < steps.total:
        rate = learning_rate(config, steps_per_epoch=steps.updates_per_epoch)(steps.updates_at(done))
        say(f"the learning rate follows the schedule of {config.epochs} epochs: it is {float(rate):.3g} here")


def _check_installed() -> None:
    missing = [
        name
        for name in ("filelock", "grain", "orbax", "tensorboardX", "matplotlib")
        if not importlib.util.find_spec(name)
    ]
    if missing:
        raise RunError(f'fine-tuning needs {", ".join(missing)}: pip install "dpn-jax[finetune]"')


def _batches(images: Images, config: FinetuneConfig, model: DPN, mesh: Mesh) -> tuple[BatchIterator, BatchIterator]:
    if config.batch_size % mesh.size:
        raise RunError(f"batch_size must be a multiple of the {mesh.size} devices, got {config.batch_size}")
    hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    preprocessing = model.provenance.preprocessing
    # both for all epochs, so that their workers start only once
    return (
        batches(images.train, config, preprocessing, train=True, epochs=config.epochs, **hosts),
        batches(images.val, config, preprocessing, train=False, epochs=config.epochs, **hosts),
    )


def _initial_state(config: FinetuneConfig, model: DPN, train: BatchIterator, labels: Sequence[int]) -> TrainState:
    tx = make_optimizer(config, model, batches_per_epoch=train.per_epoch)
    return TrainState.create(model, tx, config, labels=labels)


@contextlib.contextmanager
def _one_line_errors(training: Training) -> Iterator[None]:
    """Turns errors of the disk and of the devices into one line that says how to continue."""
    try:
        yield
    except OSError as error:
        place = error.filename or training.output
        raise RunError(
            f"{place}: {reason(error)} at step {training.step}; fix this and continue with --resume"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        why, hint = reason(error), "continue with --resume"
        if "RESOURCE_EXHAUSTED" in why:
            hint = "continue with --resume --remat, or start again with a lower --batch-size (and --accumulate)"
        raise RunError(f"{training.output}: step {training.step} failed ({why}); {hint}") from error
