"""The best weights of a run, measured on its validation images: a report in the run's folder."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from dpn_jax.errors import ImageError, shown
from dpn_jax.evaluation.evaluate import collect
from dpn_jax.evaluation.report import model_facts, write_report
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.finetune.interruption import Interruption
from dpn_jax.finetune.record import name_in
from dpn_jax.images.sources import Unlabeled, are_crops
from dpn_jax.images.splits import ImageFolder
from dpn_jax.inference.classifier import Classifier
from dpn_jax.model import DPN
from dpn_jax.multihost import on_first

REPORT = "report"
_PAGE, _RESULTS = "report.html", "results.json"


def report_best(
    output: Path,
    model: Callable[[], DPN],
    images: ImageFolder,
    config: FinetuneConfig,
    *,
    root: Path,
    step: int,
    interruption: Interruption,
    note: Callable[[str], None],
) -> None:
    """Evaluates the best weights and writes `report/`, unless that is there; all processes work on it.

    It has no times, so that an interrupted run writes the same bytes as one that was not.

    Args:
      output: the run's folder.
      model: makes the model.
      images: the validation images.
      config: the options.
      root: the images' folder, absolute; the report names them as `images.json` does.
      step: after which the weights are the best.
      interruption: asks to stop; the report is then left to a resumed run.
      note: called with each message, a line.
    """
    folder = output / REPORT
    if on_first(lambda: _step_of(folder)) == step:
        return
    images = images.select(set(range(len(images))) - images.skipped)
    best = model()
    classifier = Classifier(best, batch_size=config.batch_size, devices="all", workers=config.workers, fast=config.fast)
    prepared = are_crops(images, classifier.transform)
    with contextlib.closing(classifier.stream_logits_in_processes(Unlabeled(images), prepared=prepared)) as rows:
        try:
            result = collect(_until(rows, interruption), images, dict(enumerate(images.labels)), classifier)
        except InterruptedError:
            note(f"stopped before {shown(folder)} was written; the weights are")
            return
    if not len(result):
        note(f"{shown(folder)}: not written, none of the validation images can be read")
        return
    result = dataclasses.replace(result, files=tuple(name_in(root, file) for file in result.files))
    settings = classifier.transform.preprocessing
    size = sum(x.size for x in jax.tree.leaves(nnx.state(best, nnx.Param)))
    facts = model_facts(best.provenance.source, settings, config.dtype, size) | {"step": step}

    def write() -> None:
        (folder / _PAGE).unlink(missing_ok=True)  # it is written last, and says that the others are there
        title = "Validation images, with the weights of the best epoch"
        write_report(result, folder, source=images, facts=facts, title=title)

    on_first(write)
    note(f"{shown(folder / _PAGE)}: the validation images with these weights")


def _step_of(folder: Path) -> int | None:
    """The step whose weights a finished report is about."""
    try:
        return json.loads((folder / _RESULTS).read_bytes())["step"] if (folder / _PAGE).exists() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _until(rows: Iterator[np.ndarray | ImageError], interruption: Interruption) -> Iterator[np.ndarray | ImageError]:
    """The rows, until a signal asks to stop; all processes must take the same part in what they exchange."""
    alone = jax.process_count() == 1
    for row in rows:
        if alone and interruption.requested:
            raise InterruptedError
        yield row
