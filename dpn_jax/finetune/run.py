"""Fine-tuning from a folder of class folders to a file of weights."""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from dpn_jax.checkpoint.save import save
from dpn_jax.config import DPNConfig
from dpn_jax.errors import RunError, reason
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.finetune.data import BatchIterator, batches, find_broken
from dpn_jax.finetune.initial import initial_model
from dpn_jax.finetune.interrupt import catch_interruption
from dpn_jax.finetune.loop import Training
from dpn_jax.finetune.metrics import Row
from dpn_jax.finetune.multihost import data_mesh, is_first, on_first, replicate
from dpn_jax.finetune.optimizer import make_optimizer
from dpn_jax.finetune.record import RECORD, Record, begin, check_same, read_record
from dpn_jax.finetune.report import CURVES, METRICS, plot_curves, read_metrics
from dpn_jax.finetune.step import TrainState
from dpn_jax.images.folders import ImageFolder, image_folder
from dpn_jax.model import DPN

WEIGHTS = "model.safetensors"

logger = logging.getLogger("dpn_jax")


class Images(NamedTuple):
    """The two splits."""

    train: ImageFolder
    val: ImageFolder


class Finetuned(NamedTuple):
    """What came of a run."""

    output: Path
    """The run's folder."""
    weights: Path | None
    """The file of weights; None where the run was interrupted."""
    step: int
    """Batches seen."""
    steps: int
    """Batches to see."""
    best: Row | None
    """The best validation: `step`, `epoch`, `loss`, `accuracy`, `accuracy5`."""


def finetune(
    folder: str | Path,
    output: str | Path,
    config: FinetuneConfig | None = None,
    *,
    source: str | Path | DPNConfig,
    model: str | None = None,
    revision: str | None = None,
    resume: bool = False,
    progress: bool = True,
    note: Callable[[str], None] = logger.info,
) -> Finetuned:
    """Trains a model on a folder of class folders: what `dpn-jax finetune` does.

    The run's folder gets `config.json`, `metrics.jsonl`, TensorBoard's events, checkpoints and, in the end,
    `model.safetensors` (the state with the best validation accuracy; its moving average where `config.ema_decay` is
    set) and `curves.png`. SIGTERM and Ctrl-C stop the run where it can be resumed. On CPU a resumed run ends with the
    same bits as one that was not interrupted.

    Args:
      folder: `train/<class>/*` and `val/<class>/*`, or `<class>/*`, see `image_folder`.
      output: the run's folder; new, or empty, unless `resume` is set.
      config: the choices; left out, those of the run that is resumed, or the defaults.
      source: a tag, hub id or file whose weights to start from; or a variant ('dpn68b') or an architecture to start
        from random weights.
      model, revision: as for `from_pretrained`.
      resume: go on from the newest checkpoint in `output`.
      progress: show a progress bar, where stderr is a terminal.
      note: told what there is to tell, in lines.

    Returns:
      Where the result is, and how good.

    Raises:
      RunError: `output` exists, or cannot be resumed, or written; training diverged (`DivergedError`).
      DataError: the images cannot be trained on.
      CheckpointError, ValueError: the model cannot be loaded, or does not fit the choices.

    Example:
      Digits from scratch, on any machine::

        run = finetune("digits", "run", FinetuneConfig(epochs=5, image_size=32), source="dpn68b")
        classifier = dpn_jax.Classifier.from_pretrained(run.weights)
    """
    _check_installed()
    folder, output = Path(folder), Path(output)
    if config is None:
        config = _saved_config(output) if resume else FinetuneConfig()
    say = note if is_first() else logger.debug
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(catch_interruption())
        images = _images(folder, config)
        start = initial_model(source, config, images.train.class_names, model=model, revision=revision, note=say)
        broken = on_first(lambda: _broken(folder, output, images, config, start, resume=resume))
        if broken:
            images = Images(*(split.without([str(folder.absolute() / file) for file in broken]) for split in images))
            for reason in broken.values():
                say(f"left out: {reason}")
            say(f"{len(broken)} images cannot be read and are left out; {output / RECORD} lists them")
        mesh = data_mesh()
        train, val = _batches(images, config, start, mesh)
        state = replicate(_initial_state(config, start, train), mesh)
        on_first(lambda: _open(output, _record(config, start, train, val, images, broken), resume=resume))
        training = Training(output, config, state, mesh, train, val, interruption, say)
        stack.callback(training.close)
        stack.enter_context(_explained(training))
        say(
            f"{len(images.train)} images of {len(images.train.class_names)} classes to train on, {len(images.val)} to "
            f"validate with; {training.plan.total} steps on {mesh.size} {'device' if mesh.size == 1 else 'devices'}"
        )
        if resume:
            found = training.restore()
            say(f"going on from step {training.step}" if found else "no checkpoint yet: beginning again")
        if not training.run(progress=progress):
            say(f"stopped after step {training.step} of {training.plan.total}; checkpoint {training.saved} is saved")
            return Finetuned(output, None, training.step, training.plan.total, training.best)
        on_first(lambda: plot_curves(read_metrics(output / METRICS), output / CURVES))
        best, step = training.best_state()
        ema = config.ema_decay is not None
        on_first(lambda: save(best.model(ema=ema), output / WEIGHTS, overwrite=True))
        say(f"{output / WEIGHTS}: the {'moving average of the ' if ema else ''}weights after step {step}")
        return Finetuned(output, output / WEIGHTS, training.step, training.plan.total, training.best)


def _check_installed() -> None:
    missing = [name for name in ("grain", "orbax", "tensorboardX", "matplotlib") if not importlib.util.find_spec(name)]
    if missing:
        raise RunError(f'fine-tuning needs {", ".join(missing)}: pip install "dpn-jax[finetune]"')


def _saved_config(output: Path) -> FinetuneConfig:
    try:
        return FinetuneConfig(
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in read_record(output)["config"].items()
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{output / RECORD}: damaged, or written by another dpn_jax ({error})") from error


def _images(folder: Path, config: FinetuneConfig) -> Images:
    read = functools.partial(image_folder, folder, val_fraction=config.val_fraction, seed=config.seed)
    return Images(read(split="train"), read(split="val"))


def _broken(
    folder: Path, output: Path, images: Images, config: FinetuneConfig, model: DPN, *, resume: bool
) -> dict[str, str]:
    """The images that cannot be read, by their path in the folder; a resumed run leaves out the same."""
    if not config.skip_broken:
        return {}
    if resume:
        return read_record(output)["images"]["broken"]
    found: dict[str, str] = {}
    for split in images:
        found |= find_broken(split, config, model.provenance.preprocessing)
    return {os.path.relpath(file, folder.absolute()): reason for file, reason in found.items()}


def _batches(images: Images, config: FinetuneConfig, model: DPN, mesh: Mesh) -> tuple[BatchIterator, BatchIterator]:
    if config.batch_size % mesh.size:
        raise RunError(f"batch_size must be a multiple of the {mesh.size} devices, got {config.batch_size}")
    hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    preprocessing = model.provenance.preprocessing
    # both for all epochs, so that their workers start but once
    return (
        batches(images.train, config, preprocessing, train=True, epochs=config.epochs, **hosts),
        batches(images.val, config, preprocessing, train=False, epochs=config.epochs, **hosts),
    )


def _initial_state(config: FinetuneConfig, model: DPN, train: BatchIterator) -> TrainState:
    updates = max(config.epochs * train.per_epoch // config.accumulate, 1)
    tx = make_optimizer(config, model, steps=updates, steps_per_epoch=train.per_epoch / config.accumulate)
    return TrainState.create(model, tx, config)


def _record(
    config: FinetuneConfig,
    model: DPN,
    train: BatchIterator,
    val: BatchIterator,
    images: Images,
    broken: dict[str, str],
) -> Record:
    return Record(
        config=config,
        source=model.provenance.source,
        architecture=model.config,
        preprocessing=model.provenance.preprocessing,
        class_names=images.train.class_names,
        images={
            "train": [len(images.train), train.get_state()["data"]],
            "val": [len(images.val), val.get_state()["data"]],
            "broken": broken,
        },
    )


def _open(output: Path, record: Record, *, resume: bool) -> None:
    if resume:
        check_same(output, record)
    else:
        begin(output, record)


@contextlib.contextmanager
def _explained(training: Training) -> Iterator[None]:
    """Gives what the disk and the devices complain of in one line."""
    try:
        yield
    except OSError as error:
        place = error.filename or training.output
        raise RunError(
            f"{place}: {reason(error)} at step {training.step}; mend that and go on with --resume"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        why = reason(error)
        hint = (
            "lower --batch-size (and raise --accumulate), or try --remat"
            if "RESOURCE_EXHAUSTED" in why
            else ("go on with --resume")
        )
        raise RunError(f"{training.output}: step {training.step} failed ({why}); {hint}") from error
