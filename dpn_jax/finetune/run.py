"""A fine-tuning run, from a folder of class folders to a file of weights."""

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dpn_jax.checkpoint.load import from_pretrained
from dpn_jax.checkpoint.save import save
from dpn_jax.config import VARIANTS, DPNConfig, variant_of
from dpn_jax.errors import RunError, reason
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.finetune.data import BatchIterator, batches, find_broken
from dpn_jax.finetune.loop import Training, catch_interruption
from dpn_jax.finetune.metrics import Row
from dpn_jax.finetune.multihost import data_mesh, is_first, on_first, replicate
from dpn_jax.finetune.optimizer import make_optimizer
from dpn_jax.finetune.report import (
    CURVES,
    METRICS,
    RECORD,
    Record,
    check_record,
    plot_curves,
    read_config,
    read_metrics,
    read_record,
    start_record,
)
from dpn_jax.finetune.step import TrainState
from dpn_jax.images.folders import ImageFolder, image_folder
from dpn_jax.model import DPN, create_model
from dpn_jax.pretrained import PRETRAINED, Provenance, default_preprocessing

WEIGHTS = "model.safetensors"

logger = logging.getLogger("dpn_jax")


class Images(NamedTuple):
    """The images of a run, by split."""

    train: ImageFolder
    val: ImageFolder


class Finetuned(NamedTuple):
    """The result of a run."""

    output: Path
    """The run's folder."""
    weights: Path | None
    """The file of weights; None if the run was interrupted."""
    step: int
    """Batches seen."""
    steps: int
    """Batches in the whole run."""
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
    """Trains a model on a folder of class folders, as `dpn-jax finetune` does.

    Writes `config.json`, `metrics.jsonl`, TensorBoard's events, checkpoints and, at the end, `model.safetensors` (the
    state with the best validation accuracy; its moving average if `config.ema_decay` is set) and `curves.png`.
    SIGTERM and Ctrl-C save a checkpoint and stop. On CPU a resumed run is bit-identical to an uninterrupted one.

    Args:
      folder: `train/<class>/*` and `val/<class>/*`, or `<class>/*`, see `image_folder`.
      output: the run's folder, new or empty unless `resume` is set.
      config: the options; defaults to those of the resumed run, or to `FinetuneConfig()`.
      source: a tag, hub id or file of the initial weights; or a variant ('dpn68b') or an architecture for random
        weights.
      model, revision: as for `from_pretrained`.
      resume: continue from the newest checkpoint in `output`.
      progress: show a progress bar if stderr is a terminal.
      note: called with each message, a line.

    Returns:
      The files of the run and its best validation.

    Raises:
      RunError: `output` exists, or cannot be resumed or written; or training diverged (`DivergedError`).
      DataError: the images cannot be trained on.
      CheckpointError, ValueError: the model cannot be loaded, or does not fit the options.

    Example:
      Digits from random weights::

        run = finetune("digits", "run", FinetuneConfig(epochs=5, image_size=32), source="dpn68b")
        classifier = dpn_jax.Classifier.from_pretrained(run.weights)
    """
    _check_installed()
    folder, output = Path(folder), Path(output)
    if config is None:
        config = read_config(output) if resume else FinetuneConfig()
    say = note if is_first() else logger.debug
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(catch_interruption())
        images = _images(folder, config)
        start = initial_model(source, config, images.train.class_names, model=model, revision=revision, note=say)
        broken = on_first(lambda: _broken(folder, output, images, config, start, resume=resume))
        if broken:
            images = Images(*(split.without([str(folder.absolute() / file) for file in broken]) for split in images))
            for why in broken.values():
                say(f"skipped: {why}")
            say(f"{len(broken)} images cannot be read and are skipped; {output / RECORD} lists them")
        mesh = data_mesh()
        train, val = _batches(images, config, start, mesh)
        state = replicate(_initial_state(config, start, train), mesh)
        record = Record(
            config=config,
            source=start.provenance.source,
            architecture=start.config,
            preprocessing=start.provenance.preprocessing,
            class_names=images.train.class_names,
            images={
                "train": [len(images.train), train.get_state()["data"]],
                "val": [len(images.val), val.get_state()["data"]],
                "broken": broken,
            },
        )
        on_first(lambda: check_record(output, record) if resume else start_record(output, record))
        training = Training(output, config, state, mesh, train, val, interruption, say)
        stack.callback(training.close)
        stack.enter_context(_one_line_errors(training))
        say(
            f"{len(images.train)} training images of {len(images.train.class_names)} classes, {len(images.val)} "
            f"validation images; {training.steps.total} steps on {mesh.size} "
            f"{'device' if mesh.size == 1 else 'devices'}"
        )
        if resume:
            found = training.restore()
            say(f"resuming from step {training.step}" if found else "no checkpoint yet: starting from the beginning")
        if not training.run(progress=progress):
            say(f"stopped after step {training.step} of {training.steps.total}; checkpoint {training.saved} is saved")
            return Finetuned(output, None, training.step, training.steps.total, training.best)
        on_first(lambda: plot_curves(read_metrics(output / METRICS), output / CURVES))
        best, step = training.best_state()
        ema = config.ema_decay is not None
        on_first(lambda: save(best.model(ema=ema), output / WEIGHTS, overwrite=True))
        say(f"{output / WEIGHTS}: the {'moving average of the ' if ema else ''}weights after step {step}")
        return Finetuned(output, output / WEIGHTS, training.step, training.steps.total, training.best)


def initial_model(
    source: str | Path | DPNConfig,
    config: FinetuneConfig,
    class_names: tuple[str, ...],
    *,
    model: str | None = None,
    revision: str | None = None,
    note: Callable[[str], None],
) -> DPN:
    """The model that a run starts from, with pretrained or random weights.

    Args:
      source: a tag, hub id or file of weights, as for `from_pretrained`; or a variant ('dpn68b') or an architecture for
        random weights, initialized from `config.seed`.
      config: the options; `dtype`, `remat`, `seed` and `image_size` are used.
      class_names: the classes. Weights of exactly these classes keep their classifier, others get a new one.
      model, revision: as for `from_pretrained`.
      note: called with a line about the weights.

    Returns:
      The model; its provenance has the class names and the preprocessing.

    Raises:
      CheckpointError, ValueError: as `from_pretrained`.
    """
    options = {"dtype": jnp.dtype(config.dtype), "remat": config.remat}
    rngs = nnx.Rngs(config.seed)
    if isinstance(source, DPNConfig) or (isinstance(source, str) and source in VARIANTS):
        built = create_model(source, num_classes=len(class_names), rngs=rngs, **options)
        name = source if isinstance(source, str) else variant_of(source) or "a DPN"
        note(f"{name} starts from random weights (seed {config.seed})")
    else:
        built = from_pretrained(source, model=model, revision=revision, rngs=rngs, **options)
        name = built.provenance.source or Path(source).name
        if built.config.num_classes == len(class_names) and built.provenance.class_names == class_names:
            note(f"{name} has these {len(class_names)} classes: its classifier is kept")
        else:
            built.reset_classifier(len(class_names), rngs=rngs)
            note(f"{name} gets a new classifier for {len(class_names)} classes")
    tag = PRETRAINED.get((model or "").removeprefix("timm/"))
    preprocessing = tag.preprocessing if tag else built.provenance.preprocessing or default_preprocessing(built.config)
    if config.image_size is not None:
        preprocessing = dataclasses.replace(preprocessing, image_size=config.image_size)
    # neither hash nor file, which describe the initial weights only
    built.provenance = Provenance(source=name, preprocessing=preprocessing, class_names=class_names)
    return built


def _check_installed() -> None:
    missing = [name for name in ("grain", "orbax", "tensorboardX", "matplotlib") if not importlib.util.find_spec(name)]
    if missing:
        raise RunError(f'fine-tuning needs {", ".join(missing)}: pip install "dpn-jax[finetune]"')


def _images(folder: Path, config: FinetuneConfig) -> Images:
    read = functools.partial(image_folder, folder, val_fraction=config.val_fraction, seed=config.seed)
    return Images(read(split="train"), read(split="val"))


def _broken(
    folder: Path, output: Path, images: Images, config: FinetuneConfig, model: DPN, *, resume: bool
) -> dict[str, str]:
    """The reason for each image that cannot be read, by its path in the folder; a resumed run skips the same."""
    if not config.skip_broken:
        return {}
    if resume:
        return read_record(output)["images"]["broken"]
    found: dict[str, str] = {}
    for split in images:
        found |= find_broken(split, config, model.provenance.preprocessing)
    return {os.path.relpath(file, folder.absolute()): why for file, why in found.items()}


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


def _initial_state(config: FinetuneConfig, model: DPN, train: BatchIterator) -> TrainState:
    updates = max(config.epochs * train.per_epoch // config.accumulate, 1)
    tx = make_optimizer(config, model, steps=updates, steps_per_epoch=train.per_epoch / config.accumulate)
    return TrainState.create(model, tx, config)


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
            hint = "lower --batch-size (and raise --accumulate), or try --remat"
        raise RunError(f"{training.output}: step {training.step} failed ({why}); {hint}") from error
