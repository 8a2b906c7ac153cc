"""Against timm on this machine's CPU: `python -m benchmarks.cpu`.

Ours and timm's (eager, channels_last, `torch.compile`) take turns in one run, after warm-up, with the same batch,
precision (float32) and threads; the figures are medians. A training step is forward, backward and plain SGD in training
mode.
"""

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from flax import nnx

import dpn_jax
from benchmarks.report import print_setting
from convert.timm_import import import_timm

timm = import_timm()

Task = Literal["inference", "training"]


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
    rounds: int = 10
    """Timed turns of each contender."""
    skip_compile: bool = False
    """Leave out torch.compile, which takes a minute or more a case."""
    json: Path | None = None
    """Write the figures into this file too."""


def main(options: Options) -> None:
    """Prints a table of images a second."""
    report = {"setting": print_setting("benchmarks.cpu"), "torch_threads": torch.get_num_threads(), "rows": []}
    print(f"float32, {options.size} pixels, {options.rounds} rounds, torch threads {torch.get_num_threads()}\n")
    print(
        f"{'model':<8}{'task':<11}{'batch':>6}  {'contender':<22}{'median ms':>10}{'images/s':>10}{'first call s':>14}"
    )
    for name in options.models:
        for task, batches in (("inference", options.batches), ("training", options.training_batches)):
            for batch in batches:
                report["rows"] += measure(name, task, batch, options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


def measure(name: str, task: Task, batch: int, options: Options) -> list[dict[str, object]]:
    """One case: every contender in turn, so that what else the machine does meets all of them alike."""
    images = np.random.default_rng(0).normal(size=(batch, options.size, options.size, 3)).astype(np.float32)
    contenders = ours(name, task, images) | timms(name, task, images, compiled=not options.skip_compile)
    first, times = {}, {label: [] for label in contenders}
    for label, call in contenders.items():
        first[label] = timed(call)
        timed(call)
    for _ in range(options.rounds):
        for label, call in contenders.items():
            times[label].append(timed(call))
    rows = []
    for label, taken in times.items():
        median = float(np.median(taken))
        rows.append(
            {"model": name, "task": task, "batch": batch, "contender": label, "median_ms": 1e3 * median,
             "images_per_second": batch / median, "first_call_s": first[label]}
        )  # fmt: skip
        figures = f"{1e3 * median:>10.1f}{batch / median:>10.2f}{first[label]:>14.1f}"
        print(f"{name:<8}{task:<11}{batch:>6}  {label:<22}{figures}")
    rate = {row["contender"]: row["images_per_second"] for row in rows}
    best = max(value for label, value in rate.items() if label.startswith("timm"))
    print(f"{name:<8}{task:<11}{batch:>6}  ours / the best of timm's: {rate['dpn_jax'] / best:.2f}\n", flush=True)
    del contenders
    gc.collect()
    return rows


def ours(name: str, task: Task, images: np.ndarray) -> dict[str, Callable[[], object]]:
    """Our side: the fast formulation, and for inference the plain one beside it."""
    model = dpn_jax.create_model(name, rngs=nnx.Rngs(0))
    x = jnp.asarray(images)
    if task == "inference":
        model.eval()
        fast, plain = dpn_jax.fast_forward(model), nnx.jit(lambda model, x: model(x))
        return {
            "dpn_jax": lambda: jax.block_until_ready(fast(x)),
            "dpn_jax plain": lambda: jax.block_until_ready(plain(model, x)),
        }
    labels = jnp.zeros(len(images), jnp.int32)

    def loss(model: dpn_jax.DPN) -> jax.Array:
        return -jax.nn.log_softmax(model(x))[jnp.arange(len(images)), labels].mean()

    @nnx.jit
    def step(model: dpn_jax.DPN) -> jax.Array:
        value, gradients = nnx.value_and_grad(loss)(model)
        parameters = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 1e-3 * g, parameters, gradients))
        return value

    return {"dpn_jax": lambda: jax.block_until_ready((step(model), nnx.state(model)))}


def timms(name: str, task: Task, images: np.ndarray, *, compiled: bool) -> dict[str, Callable[[], object]]:
    """timm's side: eager, channels_last, and torch.compile in the better memory format of the two for it."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    formats = {"timm eager": torch.contiguous_format, "timm channels_last": torch.channels_last}
    calls = {}
    for label, memory_format in formats.items():
        model = timm.create_model(name).to(memory_format=memory_format)
        calls[label] = timm_call(model, task, x.contiguous(memory_format=memory_format))
    if compiled:
        model = timm.create_model(name)
        calls["timm torch.compile"] = timm_call(model, task, x.contiguous(), compiled=True)
    return calls


def timm_call(model: torch.nn.Module, task: Task, x: torch.Tensor, *, compiled: bool = False) -> Callable[[], object]:
    """One forward pass in eval mode, or one training step."""
    model = model.eval() if task == "inference" else model.train()
    run = torch.compile(model) if compiled else model
    if task == "inference":

        def call() -> object:
            with torch.inference_mode():
                return run(x)

        return call
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    labels = torch.zeros(len(x), dtype=torch.long)

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(run(x), labels).backward()
        return optimizer.step()

    return step


def timed(call: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
