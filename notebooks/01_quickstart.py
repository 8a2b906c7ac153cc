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
# # Quickstart: DPN in JAX, from timm's weights
#
# Load a Dual Path Network, look at its input, classify photos, and compare every stage with timm.
#
# With internet access, set `TAG = "dpn92.mx_in1k"` and `ONLINE = True`. Otherwise timm's random initial weights stand
# in for the published ones: the labels are then arbitrary, but still exactly those that timm predicts.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import dpn_jax
from dpn_jax.checkpoint.save import convert

ONLINE = False
TAG = "dpn68b.ra_in1k"
# the notebook may run from its folder or from the checkout
samples = next(folder for folder in (Path("samples"), Path("../samples")) if folder.is_dir())
photos = sorted(samples.glob("*.jpg"))
work = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Weights
#
# `from_pretrained` takes a tag, a hub id, or a file in timm's layout or ours. `convert` translates timm's layout to
# ours, and back byte for byte, without torch. Here torch is needed only to create the stand-in weights.

# %%
if ONLINE:
    convert(TAG, work / "flax.safetensors")
else:
    import safetensors.torch
    import torch

    from convert.timm_import import import_timm

    torch.manual_seed(0)
    stand_in = import_timm().create_model(TAG, pretrained=False)
    safetensors.torch.save_file(stand_in.state_dict(), work / "timm.safetensors", metadata={"format": "pt"})
    convert(work / "timm.safetensors", work / "flax.safetensors")

model = dpn_jax.load(work / "flax.safetensors")
model.config

# %% [markdown]
# ## The network's input
#
# The transform equals timm's bit for bit: resize the shorter side, crop the center, normalize.

# %%
transform = dpn_jax.preprocessing(TAG)
figure, axes = plt.subplots(2, len(photos), figsize=(4 * len(photos), 7))
for photo, (above, below) in zip(photos, axes.T, strict=True):
    above.imshow(Image.open(photo))
    above.set_title(photo.name)
    below.imshow(transform.crop(photo))
    below.set_title(f"resized and cropped to {transform.preprocessing.image_size} pixels")
for axis in axes.flat:
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Top-5

# %%
classifier = dpn_jax.Classifier(model, transform=transform)
results = classifier(photos, top_k=5)
figure, axes = plt.subplots(1, len(photos), figsize=(6 * len(photos), 2.5), layout="constrained")
for photo, result, axis in zip(photos, results, axes, strict=True):
    axis.barh([best.label.split(",")[0] for best in result][::-1], [best.probability for best in result][::-1])
    axis.set_title(photo.name)
    axis.set_xlabel("probability")
plt.show()

# %% [markdown]
# ## Features
#
# `forward_intermediates` also returns the feature maps of the stem and of each stage. `forward_features` returns the
# last map, and `forward_head` turns it into logits.

# %%
images = np.stack([transform(photo) for photo in photos])
features, stages = model.forward_intermediates(images)
for index, stage in enumerate(stages):
    print(index, stage.shape)

# %% [markdown]
# ## Comparison with timm
#
# `python -m convert.verify FILE` prints this table for any checkpoint.

# %%
from convert.verify import compare

rows = compare(work / "flax.safetensors", images, "float32")
for row in rows:
    print(f"{row.name:<10} {row.shape!s:<22} relative error {row.relative:.1e}")
assert all(row.within(1e-5) for row in rows)

# %% [markdown]
# ## Changing the network
#
# `block=` takes a class of your own. This one adds squeeze-and-excitation to the residual path. The trained weights go
# in by name, only the gates are new and start at 1; three training steps, a file, and a classifier follow. Whatever
# assumes the stock network refuses a changed one in one line: `fast=False` runs it as it is.

# %%
import jax
from flax import nnx

from dpn_jax import finetune
from dpn_jax.blocks import DualPath, DualPathBlock
from dpn_jax.stock import changes


class SqueezeExciteBlock(DualPathBlock):
    """A dual-path block whose residual path is gated by the image's mean features."""

    def __init__(self, stage, index, *, rngs, **options):  # noqa: ANN001, ANN003, ANN204
        super().__init__(stage, index, rngs=rngs, **options)
        self.squeeze = nnx.Linear(stage.residual, stage.residual // 16, rngs=rngs)
        self.excite = nnx.Linear(stage.residual // 16, stage.residual, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x):  # noqa: ANN001, ANN204
        residual, dense = super().__call__(x)
        gates = 2 * nnx.sigmoid(self.excite(nnx.relu(self.squeeze(residual.mean(axis=(1, 2))))))
        return DualPath(residual * gates[:, None, None], dense)


def squeeze_excite() -> dpn_jax.DPN:
    """A DPN of the new blocks, with fresh weights."""
    return dpn_jax.create_model("dpn_tiny", num_classes=10, block=SqueezeExciteBlock)


digits = sorted((samples / "digits").glob("*.png"))
pretrained = dpn_jax.from_pretrained("dpn_tiny.digits")
changed = squeeze_excite()
nnx.update(changed, nnx.state(pretrained))
changed.provenance = pretrained.provenance
print(next(iter(changes(changed).items())))

transform = dpn_jax.preprocessing("dpn_tiny.digits")
batch = {"image": np.stack([transform.crop(digit) for digit in digits]), "label": np.arange(10)}
config = finetune.FinetuneConfig(optimizer="sgd", learning_rate=0.02, fast=False)
state = finetune.TrainState.create(changed, finetune.make_optimizer(config, changed), config)
for _ in range(3):
    state, metrics = finetune.train_step(state, batch)
    print(f"loss {metrics['loss'] / metrics['count']:.3f}")

# %%
trained = state.model()
dpn_jax.save(trained, work / "squeeze_excite.safetensors")
restored = dpn_jax.load(work / "squeeze_excite.safetensors", into=squeeze_excite())
classifier = dpn_jax.Classifier(restored, fast=False)

inputs = np.stack([transform(digit) for digit in digits])
expected = np.asarray(nnx.jit(lambda model, images: model(images))(trained, inputs))
np.testing.assert_allclose(classifier.logits(inputs), expected, rtol=1e-5, atol=1e-5)
probabilities = jax.nn.softmax(expected)
for index, (best,) in enumerate(classifier(digits, top_k=1)):
    assert abs(best.probability - probabilities[index].max()) < 1e-5
    print(f"{digits[index].name}: {best.label} ({best.probability:.1%})")
