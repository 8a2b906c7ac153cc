"""A short training on several devices or in several processes: `python -m tests.support.data_parallel`."""

import re
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from dpn_jax import create_model
from dpn_jax.finetune import (
    FinetuneConfig,
    TrainState,
    data_mesh,
    eval_step,
    make_optimizer,
    replicate,
    shard_batch,
    train_step,
)
from tests.support.models import TINY

CONFIG = FinetuneConfig(
    optimizer="sgd",
    learning_rate=0.05,
    mixup=0.5,
    cutmix=0.5,
    drop_rate=0.2,
    ema_decay=0.9,
    clip_norm=1.0,
    class_weights=(0.2, 1, 5, 2, 0.7),
)
BATCH = 16


def train(mesh: Mesh | None = None, *, index: int = 0, count: int = 1) -> dict[str, np.ndarray]:
    """Three steps with live norms, mixing and dropout, then an evaluation with padding.

    Args:
      mesh: the devices; None for one, without a mesh.
      index, count: index of this process and number of processes.

    Returns:
      Every array of the state, and the metrics.
    """
    state = _start() if mesh is None else replicate(_start(), mesh)
    seen = {}
    for number in range(3):
        batch = _process_batch(number, index, count)
        state, metrics = train_step(state, batch if mesh is None else shard_batch(batch, mesh))
        seen |= {f"{name}.{number}": value for name, value in metrics.items()}
    batch["weight"] = _slice(np.arange(BATCH) < BATCH - 3, index, count).astype(np.float32)
    seen |= eval_step(state, batch if mesh is None else shard_batch(batch, mesh), ema=True)
    seen |= {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
    seen["logits"] = state.model()(np.ones((2, 32, 32, 3), np.float32))
    if mesh is not None:
        assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state)), "not replicated"
    return {name: np.asarray(value) for name, value in seen.items()}


def collectives(mesh: Mesh) -> tuple[int, int]:
    """Number of collectives in the main computation of a compiled step, and in the computations that it calls."""
    batch = shard_batch(_process_batch(0, 0, jax.process_count()), mesh)
    text = jax.jit(train_step).lower(replicate(_start(), mesh), batch).compile().as_text()
    called, main = text.split("\nENTRY ")
    counts = [len(re.findall(r" (?:all-|reduce-scatter|collective-)[a-z-]*\(", part)) for part in (main, called)]
    return counts[0], counts[1]


def _start() -> TrainState:
    model = create_model(TINY.replace(depths=(1, 1)))  # compiled by every process
    return TrainState.create(model, make_optimizer(CONFIG, model, steps=4), CONFIG)


def _process_batch(number: int, index: int, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    images = rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, TINY.num_classes, BATCH, dtype=np.int32)
    return {"image": _slice(images, index, count), "label": _slice(labels, index, count)}


def _slice(values: np.ndarray, index: int, count: int) -> np.ndarray:
    return np.split(values, count)[index]


def main(output: Path, index: int, count: int, coordinator: str, explicit: bool) -> None:
    """Runs one of `count` processes; writes its results to `output`. The axis of the mesh may be explicit."""
    if count > 1:
        jax.distributed.initialize(coordinator, num_processes=count, process_id=index)
    mesh = jax.make_mesh((jax.device_count(),), ("data",)) if explicit else data_mesh()
    seen = train(mesh, index=index, count=count)
    np.savez(output, devices=jax.device_count(), collectives=collectives(mesh), **seen)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5] == "explicit")
