# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune with optax
#
# **You will learn** to write a training loop by hand and that the library's computes the same; and to fine-tune a
# network that knows five digits to recognize all ten, training the classifier only or everything, with live or frozen
# norm statistics. `dpn-jax finetune FOLDER --model TAG --output RUN` does all of this in one command, with
# checkpoints and exact resume; this notebook shows its parts.
#
# **It takes** about three minutes on two CPU cores: the network is `dpn_tiny` with one block in each of three stages,
# at 32 pixels. It needs a checkout installed with `pip install -e ".[finetune]"`, and scikit-learn.
#
# **For your own data** make folders `train/CLASS` and `val/CLASS` of your images in place of the digits, and start
# from `initial_model("dpn92.mx_in1k", ...)` in place of `architecture`.

# %%
import collections
import contextlib
import dataclasses
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from PIL import Image
from sklearn.metrics import ConfusionMatrixDisplay

import dpn_jax
from dpn_jax import finetune
from dpn_jax.pretrained import get_config
from recipes import digits_folder

work = Path(tempfile.mkdtemp())
architecture = get_config("dpn_tiny").replace(depths=(1, 1, 1), dense_increments=(8, 8, 8))

# %% [markdown]
# ## Data: one folder per class
#
# scikit-learn's handwritten digits, in `train/<digit>/` and `val/<digit>/`, and a copy that lacks the digits 5 to 9.

# %%
with contextlib.chdir(work):
    digits_folder.main(Path("digits"))
    shutil.copytree("digits", "low", ignore=shutil.ignore_patterns(*"56789"))

low, digits = (
    {split: finetune.image_folder(work / name, split=split) for split in ("train", "val")} for name in ("low", "digits")
)
for images in (low, digits):
    print(images["train"].class_names, {split: len(folder) for split, folder in images.items()})

# %% [markdown]
# `FinetuneConfig` holds every hyperparameter. `batches` reads a folder and yields uint8 images, labels, and weights,
# which are 0 for padding. Training batches are shuffled and randomly cropped, determined by the seed.

# %%
config = finetune.FinetuneConfig(
    epochs=8, batch_size=32, learning_rate=3e-3, crop_scale=(0.6, 1.0), flip=0.0, image_size=32, workers=0
)
preprocessing = dpn_jax.preprocessing("dpn_tiny.digits").preprocessing
batch = next(finetune.batches(digits["train"], config, preprocessing, train=True))
print({name: (array.dtype.name, array.shape) for name, array in batch.items()})

names, files, labels = digits["train"].class_names, digits["train"].files, digits["train"].labels
figure, axes = plt.subplots(2, 10, figsize=(12, 3.2), layout="constrained")
for digit, (above, below) in enumerate(axes.T):
    above.imshow(Image.open(files[labels.index(digit)]), cmap="gray")
    above.set_title(f"file: {names[digit]}")
    below.imshow(batch["image"][digit])
    below.set_title(f"batch: {names[batch['label'][digit]]}")
for axis in axes.flat:
    axis.axis("off")
plt.show()

# %% [markdown]
# ## A loop by hand and the library's: the same losses
#
# A model is an NNX module, so a training loop takes ten lines of Flax and optax. `train_step` does the same with
# `dpn_jax.fast_apply(model, images)`: `model(images)` in the formulation that suits the backend, which takes longer
# to compile but less time per step.
#
# Both loops get the same weights and the same batches for one epoch, in float64, so that rounding cannot hide a
# difference. Floating-point images are taken as already normalized.

# %%
plain = dataclasses.replace(
    config,
    batch_size=64,
    optimizer="sgd",
    learning_rate=0.01,
    weight_decay=0.0,
    label_smoothing=0.0,
    crop_scale=(1.0, 1.0),
)
mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
epoch = [
    batch | {"image": (batch["image"] / 255 - mean) / std}
    for batch in finetune.batches(low["train"], plain, preprocessing, train=True, epochs=1)
]


@nnx.jit
def step(model: dpn_jax.DPN, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
    def mean_loss(model: dpn_jax.DPN) -> jax.Array:
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, gradients)
    return loss


with jax.enable_x64(True):
    model = dpn_jax.create_model(architecture, num_classes=5, dtype=jnp.float64, param_dtype=jnp.float64)
    state = finetune.TrainState.create(model, finetune.make_optimizer(plain, model), plain)

    optimizer = nnx.Optimizer(model, optax.sgd(0.01, momentum=0.9), wrt=nnx.Param)
    by_hand = [float(step(model, optimizer, batch["image"], batch["label"])) for batch in epoch]

    by_library = []
    for batch in epoch:
        state, metrics = finetune.train_step(state, batch)
        by_library.append(float(metrics["loss"] / metrics["count"]))

figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
axis.plot(by_hand, linewidth=5, alpha=0.4, label="by hand")
axis.plot(by_library, "k--", label="train_step")
axis.set(xlabel="step", ylabel="cross-entropy", title="The same losses, by hand and by train_step")
axis.legend()
plt.show()
print(f"largest difference: {np.abs(np.subtract(by_hand, by_library)).max():.1e}")
np.testing.assert_allclose(by_library, by_hand, atol=1e-6)

# %% [markdown]
# ## The training loop used below
#
# `train_step` and `eval_step` are pure functions of a `TrainState`. They return sums, so that batches can be added
# up. `train_step` returns the loss that is minimized, with label smoothing; `eval_step` returns it without.


# %%
def total(metrics: list[dict[str, jax.Array]]) -> dict[str, float]:
    sums = {name: sum(float(one[name]) for one in metrics) for name in ("loss", "correct", "count")}
    return {"loss": sums["loss"] / sums["count"], "accuracy": sums["correct"] / sums["count"]}


def validate(state: finetune.TrainState, images: finetune.ImageFolder) -> dict[str, float]:
    setup = state.setup
    data = finetune.batches(images, setup.config, setup.preprocessing, train=False)
    return total([finetune.eval_step(state, batch) for batch in data])


def fit(
    model: dpn_jax.DPN, images: dict[str, finetune.ImageFolder], config: finetune.FinetuneConfig
) -> tuple[finetune.TrainState, dict[str, list[float]]]:
    data = finetune.batches(images["train"], config, model.provenance.preprocessing, train=True)
    tx = finetune.make_optimizer(config, model, batches_per_epoch=data.per_epoch)
    state = finetune.TrainState.create(model, tx, config)
    history = collections.defaultdict(list)
    for _ in range(config.epochs):
        measured = []
        for _ in range(data.per_epoch):
            state, metrics = finetune.train_step(state, next(data))
            measured.append(metrics)
        for split, means in (("train", total(measured)), ("val", validate(state, images["val"]))):
            for name, value in means.items():
                history[f"{split} {name}"].append(value)
    return state, history


# %% [markdown]
# First, train a network on the digits 0 to 4 only, from random weights.

# %%
model = finetune.initial_model(architecture, config, low["train"].class_names, note=print)
state, history = fit(model, low, config)
print(f"validation accuracy on 0 to 4: {history['val accuracy'][-1]:.1%}")
dpn_jax.save(state.model(), work / "low.safetensors")

# %% [markdown]
# ## Freezing: train the classifier only, or everything
#
# Starting from these weights, train on all ten digits; five of the classes are new. `freeze="backbone"` trains the
# classifier only and also keeps the statistics of frozen norms. `norms="frozen"` trains everything, but normalizes
# with the running statistics of the initial weights.

# %%
choices = {
    "classifier alone": {"freeze": "backbone"},
    "everything, live norms": {},
    "everything, frozen norms": {"norms": "frozen"},
}
states, histories = {}, {}
for name, change in choices.items():
    chosen = dataclasses.replace(config, **change)
    model = finetune.initial_model(work / "low.safetensors", chosen, digits["train"].class_names, note=print)
    start = nnx.state(model, nnx.BatchStat)
    states[name], histories[name] = fit(model, digits, chosen)
    moved = [
        float(np.abs(new - old).max())
        for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(states[name].statistics), strict=True)
        if jnp.issubdtype(old.dtype, jnp.floating)
    ]
    print(f"{name}: validation accuracy {histories[name]['val accuracy'][-1]:.1%}")
    print(f"{name}: a running statistic has moved by at most {max(moved):.3g}")


# %%
def draw(names: tuple[str, str]) -> None:
    _, axes = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
    for axis, measure in zip(axes, ("loss", "accuracy"), strict=True):
        for name, color in zip(names, ("tab:orange", "tab:blue"), strict=True):
            for split, style in (("train", "--"), ("val", "-")):
                values = histories[name][f"{split} {measure}"]
                axis.plot(range(1, len(values) + 1), values, style, color=color, label=f"{name}: {split}")
        axis.set(xlabel="epoch", ylabel=measure, title={"loss": "Cross-entropy", "accuracy": "Accuracy"}[measure])
        axis.grid(alpha=0.3)
    axes[1].legend()
    plt.show()


draw(("classifier alone", "everything, live norms"))

# %% [markdown]
# Features learned from 0 to 4 also separate the new digits, but not well: training everything is more accurate.

# %%
final = {name: history["val accuracy"][-1] for name, history in histories.items()}
assert 0.7 < final["classifier alone"] < final["everything, live norms"] - 0.03

# %% [markdown]
# ## Norm statistics: live or frozen
#
# Live norms normalize with the statistics of the batch. Their running statistics, which validation uses, have changed
# (printed above). Frozen norms use the running statistics of 0 to 4 throughout. Here both are about equally accurate.

# %%
draw(("everything, live norms", "everything, frozen norms"))
assert abs(final["everything, live norms"] - final["everything, frozen norms"]) < 0.03

# %% [markdown]
# ## Save, and classify
#
# The file also contains the class names and the preprocessing, so `dpn-jax classify --weights FILE IMAGE` can use it.
# The network whose classifier alone was trained mostly confuses the new digits.

# %%
confusions = {}
for name in ("classifier alone", "everything, live norms"):
    file = work / f"{name.split(',')[0]}.safetensors"
    dpn_jax.save(states[name].model(), file)
    classifier = dpn_jax.Classifier.from_pretrained(file)
    confusions[name] = [best.label for (best,) in classifier(digits["val"].files, top_k=1)]

truth = [digits["val"].class_names[label] for label in digits["val"].labels]
figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
for (name, found), axis in zip(confusions.items(), axes, strict=True):
    ConfusionMatrixDisplay.from_predictions(truth, found, ax=axis, cmap="Blues", colorbar=False)
    axis.set_title(f"{name}: {np.mean(np.equal(truth, found)):.1%}")
plt.show()

wrong = [int(digit) for digit, found in zip(truth, confusions["classifier alone"], strict=True) if digit != found]
print(f"classifier alone: {len(wrong)} wrong, {sum(digit >= 5 for digit in wrong)} of them new digits")
assert sum(digit >= 5 for digit in wrong) > len(wrong) / 2

# %%
classifier(digits["val"].files[-1], top_k=3)
