"""Against timm on a CUDA card: `python -m benchmarks.gpu`.

Ours and timm's (eager and `torch.compile`, channels_last, bfloat16) take turns in one run, after warm-up, with the same
batch; the figures are medians. In training both keep float32 parameters. Beside images a second stand the share of the
card's own matrix-product rate (6.5 G multiply-adds an image for dpn92, three times that in training) and of its memory
bandwidth, both measured first, the most memory taken, and the first call, which compiles.
"""

import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import tyro

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory on the same card

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.contenders import CALLS, Task, ours, race, timms
from benchmarks.report import print_setting
from dpn_jax.pretrained import get_config


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    models: tuple[str, ...] = ("dpn92", "dpn98")
    """Variants."""
    batches: tuple[int, ...] = (1, 32, 256)
    """Batch sizes."""
    tasks: tuple[Task, ...] = ("inference", "training")
    """What to time."""
    compile_modes: tuple[str, ...] = ("default", "max-autotune")
    """Modes of torch.compile; ours is held against the best."""
    size: int = 224
    """Side of the images, pixels."""
    rounds: int = 20
    """Timed turns of each contender, `contenders.CALLS` calls each."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu is there to try the script out."""
    probe: int = 8192
    """Side of the square matrices that measure the card's rate."""
    json: Path | None = None
    """Write the figures into this file too."""


def main(options: Options) -> int:
    """Prints a table; 2 where there is no such device."""
    backend = {"cuda": "gpu"}.get(options.device, options.device)
    if jax.default_backend() != backend or (options.device == "cuda" and not torch.cuda.is_available()):
        print(f"benchmarks.gpu: JAX runs on {jax.default_backend()}; no {options.device} for both", file=sys.stderr)
        return 2
    setting = print_setting("benchmarks.gpu")
    rate, bandwidth = matmul_rate(options.probe), memory_bandwidth(options.probe)
    device = str(jax.devices()[0])
    print(f"{device}: bfloat16 matrix product {rate / 1e12:.1f} TFLOP/s, memory {bandwidth / 1e9:.0f} GB/s")
    print(f"bfloat16, {options.size} pixels, {options.rounds} rounds of {CALLS} calls\n")
    print(
        f"{'model':<9}{'task':<11}{'batch':>6}  {'contender':<27}{'median ms':>10}{'images/s':>10}{'of matmul':>11}"
        f"{'of memory':>11}{'peak MB':>9}{'first call s':>14}"
    )
    report = {"setting": setting, "device": device, "flops": rate, "bandwidth": bandwidth, "rows": []}
    for name in options.models:
        for task in options.tasks:
            for batch in options.batches:
                report["rows"] += measure(name, task, batch, options, rate, bandwidth)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))
    return 0


def measure(
    name: str, task: Task, batch: int, options: Options, rate: float, bandwidth: float
) -> list[dict[str, object]]:
    """One case: every contender in turn."""
    images = np.random.default_rng(0).normal(size=(batch, options.size, options.size, 3)).astype(np.float32)
    contenders = ours(name, task, images, dtype="bfloat16")
    contenders |= timms(
        name, task, images, device=options.device, dtype="bfloat16",
        formats=("channels_last",), compile_modes=options.compile_modes,
    )  # fmt: skip
    operations = 2 * get_config(name).multiply_adds(options.size, options.size) * (3 if task == "training" else 1)
    rows = []
    for label, timing in race(contenders, options.rounds).items():
        cost = contenders[label].cost()
        row = {
            "model": name, "task": task, "batch": batch, "contender": label, "median_ms": 1e3 * timing.median_s,
            "images_per_second": batch / timing.median_s, "of_matmul": batch * operations / timing.median_s / rate,
            "of_memory": cost.get("bytes", float("nan")) / timing.median_s / bandwidth,
            "peak_bytes": cost.get("peak"), "first_call_s": timing.first_s,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:<9}{task:<11}{batch:>6}  {label:<27}{row['median_ms']:>10.2f}{row['images_per_second']:>10.1f}"
            f"{row['of_matmul']:>11.1%}{row['of_memory']:>11.1%}{cost.get('peak', float('nan')) / 1e6:>9.0f}"
            f"{timing.first_s:>14.1f}"
        )
    speed = {row["contender"]: row["images_per_second"] for row in rows}
    best = max(value for label, value in speed.items() if label.startswith("timm"))
    print(f"{name:<9}{task:<11}{batch:>6}  ours / the best of timm's: {speed['dpn_jax'] / best:.2f}\n", flush=True)
    del contenders
    gc.collect()
    return rows


def matmul_rate(side: int) -> float:
    """Operations a second of a square bfloat16 matrix product."""
    a = jnp.ones((side, side), jnp.bfloat16)
    return 2 * side**3 / fastest(jax.jit(lambda a: a @ a), a)


def memory_bandwidth(side: int) -> float:
    """Bytes a second, read and written, of an addition."""
    a = jnp.ones((side, side), jnp.float32)
    return 2 * a.nbytes / fastest(jax.jit(lambda a: a + 1), a)


def fastest(run: Callable[[jax.Array], jax.Array], a: jax.Array) -> float:
    """Seconds of the fastest of ten calls."""
    jax.block_until_ready(run(a))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(run(a))
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
