"""Against timm on this machine's CPU: `python -m benchmarks.cpu`.

Ours and timm's (eager, channels_last, `torch.compile`) take turns in one run, after warm-up, with the same batch,
precision (float32) and threads; the figures are medians. A training step is forward, backward and plain SGD in training
mode.
"""

import dataclasses
import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

import dpn_jax
from benchmarks.contenders import CALLS, Task, ours, race, timms
from benchmarks.report import print_setting


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    models: tuple[str, ...] = ("dpn68", "dpn92")
    """Variants."""
    batches: tuple[int, ...] = (1, 8)
    """Batch sizes for inference."""
    training_batches: tuple[int, ...] = (8,)
    """Batch sizes for a training step."""
    size: int = 224
    """Side of the images, pixels."""
    rounds: int = 5
    """Timed turns of each contender, `contenders.CALLS` calls each."""
    plain: bool = False
    """Time our plain form too."""
    skip_compile: bool = False
    """Leave out torch.compile, which takes a minute or more a case."""
    keep_memory: bool = True
    """Keep freed memory for the next call, as `dpn-jax` does; of both sides, which share the process."""
    json: Path | None = None
    """Write the figures into this file too."""


def main(options: Options) -> None:
    """Prints a table of images a second."""
    kept = options.keep_memory and dpn_jax.keep_freed_memory()
    report = {"setting": print_setting("benchmarks.cpu"), "torch_threads": torch.get_num_threads(), "rows": []}
    threads = f"torch threads {torch.get_num_threads()}, freed memory kept: {kept}"
    print(f"float32, {options.size} pixels, {options.rounds} rounds of {CALLS} calls, {threads}\n")
    print(
        f"{'model':<9}{'task':<11}{'batch':>6}  {'contender':<22}{'median ms':>10}{'images/s':>10}{'first call s':>14}"
    )
    for name in options.models:
        for task, batches in (("inference", options.batches), ("training", options.training_batches)):
            for batch in batches:
                report["rows"] += measure(name, task, batch, options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


def measure(name: str, task: Task, batch: int, options: Options) -> list[dict[str, object]]:
    """One case: every contender in turn."""
    images = np.random.default_rng(0).normal(size=(batch, options.size, options.size, 3)).astype(np.float32)
    contenders = ours(name, task, images, plain=options.plain)
    contenders |= timms(name, task, images, compile_modes=() if options.skip_compile else ("default",))
    rows = []
    for label, timing in race(contenders, options.rounds).items():
        rows.append(
            {"model": name, "task": task, "batch": batch, "contender": label, "median_ms": 1e3 * timing.median_s,
             "images_per_second": batch / timing.median_s, "first_call_s": timing.first_s}
        )  # fmt: skip
        figures = f"{1e3 * timing.median_s:>10.1f}{batch / timing.median_s:>10.2f}{timing.first_s:>14.1f}"
        print(f"{name:<9}{task:<11}{batch:>6}  {label:<22}{figures}")
    rate = {row["contender"]: row["images_per_second"] for row in rows}
    best = max(value for label, value in rate.items() if label.startswith("timm"))
    print(f"{name:<9}{task:<11}{batch:>6}  ours / the best of timm's: {rate['dpn_jax'] / best:.2f}\n", flush=True)
    del contenders
    gc.collect()
    return rows


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
