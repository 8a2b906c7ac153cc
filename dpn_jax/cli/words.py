"""From the words of the command line to a command with its options."""

import contextlib
import io
import re
from collections.abc import Sequence

import tyro

from dpn_jax.cli.classify import Classify
from dpn_jax.cli.convert import Convert
from dpn_jax.cli.embed import Embed
from dpn_jax.cli.evaluate import Evaluate
from dpn_jax.cli.export import Export
from dpn_jax.cli.finetune import Finetune, finetune_command
from dpn_jax.cli.models import Models
from dpn_jax.cli.options import Command
from dpn_jax.cli.pack import Pack

COMMANDS = {
    "classify": Classify,
    "evaluate": Evaluate,
    "embed": Embed,
    "finetune": Finetune,
    "convert": Convert,
    "export": Export,
    "pack": Pack,
    "models": Models,
}

TIMM_OPTIONS = {
    "-b": "--batch-size", "-j": "--workers", "--aa": "--randaugment", "--amp": "--dtype bfloat16",
    "--checkpoint-hist": "--keep", "--clip-grad": "--clip-norm", "--drop": "--drop-rate",
    "--grad-accum-steps": "--accumulate", "--grad-checkpointing": "--remat", "--hflip": "--flip",
    "--img-size": "--image-size", "--initial-checkpoint": "--weights", "--lr": "--learning-rate",
    "--min-lr": "--final-learning-rate", "--model-ema": "--ema-decay", "--model-ema-decay": "--ema-decay",
    "--opt": "--optimizer", "--pretrained": "--model", "--ratio": "--crop-ratio", "--scale": "--crop-scale",
    "--sched": "--warmup-epochs", "--smoothing": "--label-smoothing", "--wd": "--weight-decay",
}  # fmt: skip
"""What options of timm's train.py are called in `dpn-jax finetune`."""


def parse(words: Sequence[str]) -> Command:
    """Reads the words after `dpn-jax`; prints what `--help` asks for.

    Raises:
      ValueError: the words are wrong; one line that says which and where the help is.
      SystemExit: help was asked for and has been printed.
    """
    said = io.StringIO()
    # options of finetune are both: a file of --config may have either
    flags = () if words[:1] == ["finetune"] else (tyro.conf.FlagCreatePairsOff,)
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS | {"finetune": finetune_command(words)},
                prog="dpn-jax",
                description="Dual Path Networks in JAX; `dpn-jax --version` prints the versions.",
                args=words,
                config=flags,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    message = unboxed(said.getvalue())
    names = [word.split("=")[0] for word in words[1:]] if words[:1] == ["finetune"] else []
    hints = [f"timm's {name} is {TIMM_OPTIONS[name]} here" for name in names if name in TIMM_OPTIONS]
    raise ValueError("; ".join([*hints, message]))


def unboxed(box: str) -> str:
    r"""The text in a box of tyro's on one line, whose first line is a title and whose sections are divided by rules.

    Example:
      >>> print(unboxed("╭─ Wrong ─────╮\n│ No --lr.    │\n│ ─────────── │\n│ See --help. │\n╰─────────────╯"))
      No --lr; See --help
    """
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip(" │|╭╮╰╯") for line in box.splitlines()[1:]]
    sections = "\n".join("\n" if re.fullmatch("[─-]*", line) else line for line in lines).split("\n\n")
    return "; ".join(" ".join(section.split()).rstrip(".") for section in sections if section.strip())
