"""`dpn-jax finetune`."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from dpn_jax.cli.output import DONE, note
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.finetune.multihost import connect, is_first
from dpn_jax.finetune.report import CURVES, EVENTS, METRICS, read_metrics, table
from dpn_jax.finetune.run import Finetuned, finetune


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune:
    """Train a model on a folder with one folder of images for each class."""

    folder: tyro.conf.Positional[str]
    """Holds train/CLASS/* and val/CLASS/*, or CLASS/* (then --val-fraction of each class is held out)."""
    output: str
    """The run's folder: checkpoints, metrics, and in the end model.safetensors."""
    model: str | None = None
    """A pretrained tag or hub id to start from, or a variant (dpn68b) for random weights; beside --weights, the
    architecture and preprocessing of that file."""
    weights: str | None = None
    """A file of weights to start from: timm's or ours."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    resume: bool = False
    """Go on from the newest checkpoint in --output; the other options must be the same."""
    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=FinetuneConfig)
    """How to train."""
    coordinator: str | None = None
    """Address and port of process 0, for training in several processes."""
    processes: int | None = None
    """How many processes there are."""
    process_index: int | None = None
    """Which of them this is, from 0; process 0 writes."""
    distributed: bool = False
    """Train in several processes and let the cluster (TPU, Slurm, Open MPI) say which."""

    def run(self) -> int:
        """Trains, and says how good the result is and how to use it."""
        if not self.model and not self.weights:
            raise ValueError("name what to start from: --model TAG (see dpn-jax models) or --weights FILE")
        if self.distributed or (self.coordinator, self.processes, self.process_index) != (None, None, None):
            connect(self.coordinator, self.processes, self.process_index)
        result = finetune(
            self.folder,
            self.output,
            self.config,
            source=Path(self.weights) if self.weights else self.model,
            model=self.model if self.weights else None,
            revision=self.revision,
            resume=self.resume,
            note=note,
        )
        if not is_first():
            return DONE
        if result.weights is None:
            words = [word for word in sys.argv[1:] if word != "--resume"]
            note(f"go on with: {shlex.join(['dpn-jax', *words, '--resume'])}")
            return DONE
        print_result(result)
        return DONE


def print_result(result: Finetuned) -> None:
    """The last table, and what can be done with the weights."""
    rows = [row for row in read_metrics(result.output / METRICS) if row["split"] == "val"]
    shown = [rows[-1]] if rows[-1] == result.best else [result.best, rows[-1]]
    head = ("validation", "epoch", "loss", "top-1", "top-5")
    body = [
        (
            "best" if row == result.best else "last",
            f"{row['epoch']:.0f}",
            f"{row['loss']:.4f}",
            f"{row['accuracy']:.2%}",
            f"{row['accuracy5']:.2%}",
        )
        for row in shown
    ]
    weights, output = shlex.quote(str(result.weights)), shlex.quote(str(result.output))
    print(table(head, body))
    print(f"curves: {shown(str(result.output / CURVES))}")
    print(f"dpn-jax classify PHOTO_OR_FOLDER --weights {weights}")
    print(f"dpn-jax evaluate FOLDER --weights {weights}")
    print(f"tensorboard --logdir {output}/{EVENTS}")
