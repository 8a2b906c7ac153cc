"""`finetune(..., model=)`: runs that start from a model itself, stock or changed by a researcher."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dpn_jax
from dpn_jax import Preprocessing
from dpn_jax.finetune import FinetuneConfig, Finetuned, RunError, TrainState, finetune, frozen_norms, make_optimizer
from dpn_jax.finetune import loop as loop_module
from tests.support import models
from tests.support.changed_models import Halved, SqueezeExciteAfter
from tests.support.finetune_runs import COLORS, contents
from tests.support.models import values

TINY = models.TINY.replace(depths=(1,), dense_increments=(4,), num_classes=3)
CONFIG = FinetuneConfig(
    epochs=2,
    batch_size=8,
    workers=0,
    optimizer="sgd",
    learning_rate=0.05,
    warmup_epochs=0,
    skip_check=True,
    report=False,
)
PLAIN = dataclasses.replace(CONFIG, fast=False)


def stock(seed: int = 5, **changes: Any) -> dpn_jax.DPN:
    return small(dpn_jax.create_model(TINY, rngs=nnx.Rngs(seed), **changes))


def gated(seed: int = 5, **changes: Any) -> dpn_jax.DPN:
    """With a block of one's own."""
    return small(dpn_jax.create_model(TINY, block=SqueezeExciteAfter, rngs=nnx.Rngs(seed), **changes))


def small(model: dpn_jax.DPN) -> dpn_jax.DPN:
    model.provenance = model.provenance._replace(preprocessing=Preprocessing(image_size=32))
    return model


@pytest.fixture(scope="module")
def run_gated(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Finetuned:
    """A run from a changed model; do not change it."""
    return finetune(images, tmp_path_factory.mktemp("runs") / "gated", PLAIN, model=gated(), progress=False)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run fails before it trains the batch of this number, from 0."""
    step_once = loop_module.train_step

    def failing(state: TrainState, batch: object) -> object:
        if int(state.step) == step:
            raise KeyError("power cut")
        return step_once(state, batch)

    monkeypatch.setattr(loop_module, "train_step", failing)


@pytest.mark.slow
def test_a_run_from_a_stock_instance_equals_the_run_from_its_file(images: Path, tmp_path: Path) -> None:
    """The instance is not changed, and its run is one that everything reads."""
    model = stock(num_classes=5)
    dpn_jax.save(model, tmp_path / "start.safetensors")
    before = values(model)
    run = finetune(images, tmp_path / "instance", CONFIG, model=model, progress=False)
    finetune(images, tmp_path / "file", CONFIG, source=tmp_path / "start.safetensors", progress=False)
    assert (run.output / "metrics.jsonl").read_bytes() == (tmp_path / "file" / "metrics.jsonl").read_bytes()
    assert model.config.num_classes == 5 and model.provenance.class_names is None
    for name, value in values(model).items():
        assert np.array_equal(value, before[name]), name
    ours, theirs = dpn_jax.from_pretrained(run.output), dpn_jax.from_pretrained(tmp_path / "file")
    assert ours.provenance.class_names == COLORS
    for name, value in values(ours).items():
        assert np.array_equal(value, values(theirs)[name]), name
    finetune(None, run.output, resume=True)


@pytest.mark.slow
def test_a_changed_model_trains_and_is_restored(run_gated: Finetuned, images: Path) -> None:
    record = json.loads((run_gated.output / "config.json").read_text())
    assert record["start"] == {"source": None, "model": None, "revision": None}
    assert "SqueezeExciteAfter" in record["instance"]["changes"]["stages.0.0"]
    restored = dpn_jax.load(run_gated.weights, into=gated(seed=9))
    start, end = values(gated()), values(restored)
    name = "stages.0.0.gate.squeeze.kernel"
    assert not np.array_equal(start[name], end[name]), "the researcher's own parameters are trained"
    with pytest.raises(ValueError, match="a changed model's file"):
        dpn_jax.from_pretrained(run_gated.output)
    classifier = dpn_jax.Classifier(restored, fast=False)
    right = [classifier(images / color / f"{n}.png", top_k=1)[0].label == color for color in COLORS for n in range(10)]
    assert np.mean(right) > 0.5


@pytest.mark.slow
def test_a_changed_run_resumes_with_the_model_given_again(
    run_gated: Finetuned, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    interrupt_at(4, monkeypatch)
    with pytest.raises(KeyError, match="power cut"):
        finetune(images, output, PLAIN, model=gated(), progress=False)
    monkeypatch.undo()
    with pytest.raises(
        RunError, match=r"changed model \(stages.0.0 is a SqueezeExciteAfter.*give it again.*model="
    ) as e:
        finetune(None, output, resume=True)
    assert "\n" not in str(e.value)
    for other, message in (
        (stock(), "another model=: stages.0.0 is stock; in the run it is a SqueezeExciteAfter"),
        (gated(global_pool="max"), "its global_pool is 'max'; in the run it is 'avg'"),
    ):
        with pytest.raises(RunError, match=message):
            finetune(None, output, model=other, resume=True)
    # the checkpoint has the values: those of the instance do not count
    finetune(None, output, model=gated(seed=77), resume=True, progress=False)
    assert contents(output) == contents(run_gated.output)


@pytest.mark.slow
def test_without_a_checkpoint_the_very_same_values_are_asked_for(
    run_gated: Finetuned, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(0, monkeypatch)
    for name, model, config in (("stock", stock(), CONFIG), ("gated", gated(), PLAIN)):
        with pytest.raises(KeyError, match="power cut"):
            finetune(images, tmp_path / name, config, model=model, progress=False)
    monkeypatch.undo()
    with pytest.raises(RunError, match="no checkpoint yet, and it started from a model instance; give it again"):
        finetune(None, tmp_path / "stock", resume=True)
    with pytest.raises(RunError, match="its initial values are others, and there is no checkpoint yet"):
        finetune(None, tmp_path / "gated", model=gated(seed=6), resume=True)
    finetune(None, tmp_path / "gated", model=gated(), resume=True, progress=False)
    assert contents(tmp_path / "gated") == contents(run_gated.output)


@pytest.mark.slow
def test_only_a_run_from_an_instance_takes_one_again(run_gated: Finetuned, tmp_path: Path) -> None:
    output = shutil.copytree(run_gated.output, tmp_path / "copy")
    record = json.loads((output / "config.json").read_text())
    del record["instance"]  # as older runs have it
    (output / "config.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="did not start from a model instance, so none can be given; drop model="):
        finetune(None, output, model=gated(), resume=True)


class WithState(Halved):
    """Counts its calls, in a variable that is neither a parameter nor a statistic."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.calls = nnx.Cache(jnp.zeros(()))


def bound() -> dpn_jax.DPN:
    model = stock()
    model.norm.running_statistics = model.norm.running_statistics
    return model


def linear(classes: int) -> dpn_jax.DPN:
    model = stock(num_classes=classes)
    model.classifier = nnx.Linear(TINY.num_features, classes, rngs=nnx.Rngs(0))
    return model


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (gated, CONFIG, r"needs a stock DPN, but stages.0.0 is a SqueezeExciteAfter.*FinetuneConfig\(fast=False\)"),
        (bound, PLAIN, "norm has a method 'running_statistics' that was set on it"),
        (lambda: linear(5), PLAIN, r"5 classes and a classifier of its own \(Linear\).*make it with num_classes=3"),
        (
            lambda: stock(dtype=jnp.bfloat16),
            CONFIG,
            r"dtype bfloat16, but training wants float32: make it with dtype='f",
        ),
        (lambda: stock(param_dtype=jnp.bfloat16), CONFIG, "make it with param_dtype='float32'"),
        (lambda: dpn_jax.DPN(TINY, rngs=None), CONFIG, r"model= is abstract, it has no values; make it with rngs="),
        (lambda: stock(norm=WithState), PLAIN, r"statistics \(nnx.BatchStat\) only, but .*norm.calls is a Cache"),
        (lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(0)), PLAIN, "model must be a DPN or the name of .*, got a Linear"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_in_one_line(
    images: Path, tmp_path: Path, make: Callable[[], nnx.Module], config: FinetuneConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        finetune(images, tmp_path / "run", config, model=make(), progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [{"source": "dpn68b"}, {"revision": "main"}])
def test_an_instance_has_no_other_source(images: Path, tmp_path: Path, given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(given))}='.*' cannot be given with it"):
        finetune(images, tmp_path / "run", CONFIG, model=stock(), **given)


class OwnNorm(nnx.Module):
    """Not a subclass of the package's norm."""

    def __init__(self, channels: int, *, activation: str = "relu", rngs: nnx.Rngs, **_: Any) -> None:
        self.inner = nnx.BatchNorm(channels, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Of one array, or of the two paths."""
        joined = nnx.relu(self.inner(jnp.concatenate(jax.tree.leaves(x), axis=-1)))
        widths = [part.shape[-1] for part in jax.tree.leaves(x)]
        return jax.tree.unflatten(jax.tree.structure(x), jnp.split(joined, np.cumsum(widths)[:-1].tolist(), axis=-1))


def test_norms_of_ones_own_are_frozen_too() -> None:
    model = stock(norm=OwnNorm)
    config = dataclasses.replace(PLAIN, norms="frozen")
    assert "stages.0.0.expand.norm.inner" in frozen_norms(config, model)
    state = TrainState.create(model, make_optimizer(config, model), config)
    modules = dict(nnx.iter_modules(nnx.merge(state.setup.graphdef, state.params, state.statistics)))
    assert all(module.use_running_average for module in modules.values() if isinstance(module, nnx.BatchNorm))
    del model.stages[0][0].expand.norm.inner.use_running_average
    with pytest.raises(ValueError, match=r"expand.norm.inner, a BatchNorm, cannot be frozen: it has no use_running_a"):
        frozen_norms(config, model)


def test_norms_that_have_another_name_are_not_frozen_silently() -> None:
    model = stock()
    model.stages[0][0].extra = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"finds norms by the name 'norm'; give it to stages.0.0.extra"):
        frozen_norms(dataclasses.replace(PLAIN, freeze="weights"), model)
