"""The metrics of each layer: what a step does to the parameters shows whether they are right."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import dpn_jax
from dpn_jax.finetune import FinetuneConfig, TrainState, finetune, make_optimizer, read_metrics, train_step
from dpn_jax.finetune.layerwise import layer_rates
from dpn_jax.finetune.metrics import Window
from dpn_jax.finetune.parameters import path_of
from tests.support.finetune_runs import write_images, write_weights
from tests.support.models import TINY, randomize

LAYERS = ["stem", "stages.0.0", "stages.0.1", "stages.1.0", "norm", "classifier"]
SGD = FinetuneConfig(
    optimizer="sgd", learning_rate=0.5, momentum=0, weight_decay=0, layer_decay=0.5, freeze="stem", log_layers=True
)


@pytest.mark.slow
def test_plain_sgd_moves_each_layer_by_its_rate_times_its_norm() -> None:
    """Which the parameters show themselves, layer by layer; what is frozen has neither."""
    model = randomize(dpn_jax.DPN(TINY, rngs=None))
    state = TrainState.create(model, make_optimizer(SGD, model), SGD)
    before = {path_of(path): np.array(leaf, np.float64) for path, leaf in jax.tree.leaves_with_path(state.params)}
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), np.array([0, 1, 2, 3])
    rates = layer_rates(SGD, state.params, TINY.depths)
    state, metrics = train_step(state, {"image": images, "label": labels})
    window = Window(rates)
    window.add(1, metrics)
    window.fetch()
    row = window.means()
    assert [name.partition("/")[2] for name in row if "/" in name] == LAYERS * 2, "in the order of the network"
    moved = dict.fromkeys(LAYERS, 0.0)
    for path, leaf in jax.tree.leaves_with_path(state.params):
        where = path_of(path)
        name = f"stages.{where[1]}.{where[2]}" if where[0] == "stages" else where[0]
        moved[name] += float(((np.array(leaf, np.float64) - before[where]) ** 2).sum())
    for name, squares in moved.items():
        rate, norm = row[f"learning_rate/{name}"], row[f"gradient_norm/{name}"]
        assert rate * norm == pytest.approx(np.sqrt(squares), rel=1e-3), name
    assert row["learning_rate/stem"] == row["gradient_norm/stem"] == 0
    assert [row[f"learning_rate/{name}"] for name in LAYERS[1:]] == [0.0625, 0.125, 0.25, 0.25, 0.5]
    whole = np.sqrt(sum(row[f"gradient_norm/{name}"] ** 2 for name in LAYERS))
    assert whole == pytest.approx(row["gradient_norm"], rel=1e-5)


@pytest.mark.slow
def test_a_run_writes_them_where_it_is_asked_to_and_trains_the_same(tmp_path: Path) -> None:
    images, weights = write_images(tmp_path / "images"), write_weights(tmp_path / "tiny.safetensors")
    config = FinetuneConfig(epochs=1, batch_size=6, workers=0, layer_decay=0.5, skip_check=True, report=False)
    logged = dataclasses.replace(config, log_layers=True)
    finetune(images, tmp_path / "layers", logged, source=weights, progress=False)
    finetune(images, tmp_path / "none", config, source=weights, progress=False)
    layers, none = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("layers", "none"))
    assert not any("/" in name for row in none for name in row)
    assert [{name: value for name, value in row.items() if "/" not in name} for row in layers] == none
    row = layers[-2]
    assert row["split"] == "train" and row["learning_rate/stages.0.0"] == row["learning_rate"] / 4
    events = b"".join(path.read_bytes() for path in (tmp_path / "layers" / "tensorboard").iterdir())
    assert b"train/gradient_norm/stages.1.0" in events
