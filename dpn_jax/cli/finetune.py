"""`dpn-jax finetune`."""

import dataclasses
import importlib.util
import itertools
import json
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from dpn_jax.cli.options import ProcessOptions
from dpn_jax.cli.output import DONE, INTERRUPTED, TERMINATED, note, text_table
from dpn_jax.errors import DataError, RunError, reason, shown
from dpn_jax.finetune.best import REPORT
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.finetune.record import Record, config_from_json, read_record
from dpn_jax.finetune.report import CURVES, EVENTS, METRICS, read_metrics
from dpn_jax.finetune.run import Finetuned, finetune
from dpn_jax.multihost import is_first, meet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(ProcessOptions):
    """Fine-tune a model on a folder that has one folder of images per class."""

    folder: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA", help_behavior_hint="")] = None
    """Holds train/CLASS/* and val/CLASS/*, or CLASS/*, of which --val-fraction is held out for validation; or what
    `dpn-jax pack` has written in place of these folders."""
    output: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """The run's folder: checkpoints, metrics and, at the end, model.safetensors."""
    model: Annotated[str | None, tyro.conf.arg(metavar="TAG", help_behavior_hint="")] = None
    """A pretrained tag or hub id to start from, or a variant (dpn68b) for random weights; with --weights, the
    architecture and preprocessing of FILE."""
    weights: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """A file of weights to start from, timm's or ours."""
    revision: Annotated[str | None, tyro.conf.arg(metavar="REVISION", help_behavior_hint="")] = None
    """Branch, tag or commit on the hub."""
    resume: bool = False
    """Continue from the newest checkpoint in RUN, with its own DATA and options; those that do not change the result,
    such as --workers, may be others, and so may --epochs."""
    options: Annotated[str | None, tyro.conf.arg(name="config", metavar="FILE", help_behavior_hint="")] = None
    """A JSON file with options, whose place those of the command line take; config.json of a run is one."""
    print_config: bool = False
    """Print the options, as --config reads them, and do nothing."""
    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=FinetuneConfig)
    """How to train."""

    def run(self) -> int:
        """Trains, and prints how good the result is and how to use it."""
        if self.print_config:
            print(json.dumps(dataclasses.asdict(self.config), indent=2))
            return DONE
        if not self.resume and self.folder is None:
            raise ValueError("name the folder of images: dpn-jax finetune DATA --output RUN")
        if not self.resume and not self.model and not self.weights:
            raise ValueError("choose what to start from: --model TAG (see dpn-jax models) or --weights FILE")
        self.join()
        meet()
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
        if result.signal is not None:
            if is_first():
                note(f"continue with: {shlex.join(['dpn-jax', 'finetune', '--output', self.output, '--resume'])}")
            return INTERRUPTED if result.signal == signal.SIGINT else TERMINATED
        if is_first():
            print_result(result)
        return DONE


def finetune_command(words: Sequence[str]) -> type[Finetune]:
    """The command, whose options default to those of the run that it is asked to resume, or of the file it names.

    Args:
      words: the arguments of `dpn-jax`.

    Raises:
      DataError: the file cannot be read.
    """
    if file := _last(words, "--config"):
        config = read_options(Path(file))
    elif (output := _last(words, "--output")) and "--resume" in words:
        try:
            config = Record.from_json(Path(output), read_record(Path(output))).config
        except RunError:  # without a run, or none that can be read: said when it is resumed
            return Finetune
    else:
        return Finetune

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WithDefaults(Finetune):
        __doc__ = Finetune.__doc__
        config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=lambda: config)
        """How to train."""

    return WithDefaults


def _last(words: Sequence[str], option: str) -> str | None:
    """The value of an option, as far as it is there."""
    values = [after for before, after in itertools.pairwise(words) if before == option]
    values += [word.removeprefix(f"{option}=") for word in words if word.startswith(f"{option}=")]
    return values[-1] if values else None


def read_options(path: Path) -> FinetuneConfig:
    """The options in a JSON file: an object of them, some or all, or the `config.json` of a run.

    Raises:
      DataError: it cannot be read, or has an option that does not exist or is out of its range.
    """
    try:
        fields = json.loads(path.read_bytes())
        fields = fields.get("config", fields)
        return config_from_json(fields)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{shown(path)}: not the options of a run ({reason(error)})") from error


def print_result(result: Finetuned) -> None:
    """Prints the best and the last validation, and commands that use the result."""
    rows = [row for row in read_metrics(result.output / METRICS) if row["split"] == "val"]
    chosen = [rows[-1]] if rows[-1] == result.best else [result.best, rows[-1]]
    head = ("validation", "epoch", "loss", "top-1", "top-5")
    body = [
        (
            "best" if row == result.best else "last",
            f"{row['epoch']:.0f}",
            f"{row['loss']:.4f}",
            f"{row['accuracy']:.2%}",
            f"{row['accuracy5']:.2%}",
        )
        for row in chosen
    ]
    weights, output = shlex.quote(str(result.weights)), shlex.quote(str(result.output))
    print(text_table(head, body))
    print(f"curves: {shown(str(result.output / CURVES))}")
    if (page := result.output / REPORT / "report.html").exists():
        print(f"report: {shown(str(page))}")
    print(f"dpn-jax classify PHOTO_OR_FOLDER --weights {weights}")
    print(f"dpn-jax evaluate FOLDER --weights {weights}")
    hint = "" if importlib.util.find_spec("tensorboard") else "  # pip install tensorboard"
    print(f"tensorboard --logdir {output}/{EVENTS}{hint}")
