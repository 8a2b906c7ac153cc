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
# # Quickstart: a Dual Path Network on your photos
#
# **You will learn** how to classify photos, see what the network is given and where it looks, take its features, and
# check that it computes what timm's network computes.
#
# **It takes** a minute on two CPU cores, without internet access.
#
# **For your own photos** change `photos`. With internet access set `TAG = "dpn92.mx_in1k"`: the weights that timm
# publishes, with ImageNet's 1,000 classes. Here a small network that comes with the package stands in. It has learned
# CIFAR-10's ten classes from photos of 32x32 pixels.

# %%
import dataclasses
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import dpn_jax
from convert.verify import compare
from dpn_jax.images.transform import Transform

TAG = "dpn_mini.cifar10"
# the notebook may run from its folder or from the checkout
samples = next(folder for folder in (Path("samples"), Path("../samples")) if folder.is_dir())
photos = [samples / f"{name}.jpg" for name in ("cat", "dog", "horses", "kingfisher", "moose")]

# %% [markdown]
# ## Classify
#
# A `Classifier` has the weights, their transform and the names of their classes. It reads files, arrays and PIL
# images, in batches, and compiles the network once.

# %%
classifier = dpn_jax.Classifier.from_pretrained(TAG)
results = classifier(photos, top_k=3)
figure, axes = plt.subplots(2, len(photos), figsize=(13, 4.2), height_ratios=(2, 1), layout="constrained")
for photo, result, (above, below) in zip(photos, results, axes.T, strict=True):
    above.imshow(Image.open(photo))
    above.axis("off")
    above.set_title(photo.name)
    below.barh([best.label for best in result][::-1], [100 * best.probability for best in result][::-1])
    below.set(xlim=(0, 100), xlabel="probability, %")
figure.suptitle("The three most probable of ten classes")
plt.show()

# %% [markdown]
# The labels are the dataset's: a kingfisher is a bird, a moose a deer. The dog is taken for a cat; why, the next figure
# shows. The probability says how sure the network is, not how right: a photo that shows none of the ten classes gets
# one of them all the same.

# %%
(coffee,) = classifier([samples / "coffee.jpg"], top_k=3)
for best in coffee:
    print(f"coffee.jpg: {best.label} {best.probability:.1%}")

# %% [markdown]
# ## What the network is given
#
# The transform equals timm's bit for bit: resize the shorter side, crop the center, normalize. What is outside of the
# crop is not seen: half of the dog's head, for example.

# %%
transform = classifier.transform
print(transform.preprocessing)
size = transform.preprocessing.image_size
figure, axes = plt.subplots(1, len(photos), figsize=(13, 2.9), layout="constrained")
for photo, axis in zip(photos, axes, strict=True):
    axis.imshow(transform.crop(photo))
    axis.axis("off")
    axis.set_title(photo.name)
figure.suptitle(f"Resized and cropped to {size}x{size} pixels")
plt.show()

# %% [markdown]
# `crop_mode="squash"` resizes both sides, so that nothing is cut off. Objects are then out of shape, which matters less
# here.

# %%
whole = dataclasses.replace(transform.preprocessing, crop_mode="squash", crop_fraction=1.0)
squashed = dpn_jax.Classifier.from_pretrained(TAG, transform=Transform(whole))
for photo, (center,), (squash,) in zip(photos, classifier(photos, top_k=1), squashed(photos, top_k=1), strict=True):
    print(
        f"{photo.name:<15} center {center.label:<6} {center.probability:4.0%}, "
        f"squash {squash.label:<6} {squash.probability:4.0%}"
    )

# %% [markdown]
# ## Where it looks
#
# Grad-CAM marks the features that speak for the class. The notebook `05_explain` has more maps, and says when to
# believe them.

# %%
model = dpn_jax.from_pretrained(TAG)
images = np.stack([transform(photo) for photo in photos])
maps = dpn_jax.explain.grad_cam(model, images)
figure, axes = plt.subplots(1, len(photos), figsize=(13, 2.6), layout="constrained")
for photo, heat, result, axis in zip(photos, maps, results, axes, strict=True):
    axis.imshow(dpn_jax.explain.overlay(photo, heat, transform=transform))
    axis.axis("off")
    axis.set_title(f"for {result[0].label}")
figure.suptitle("Grad-CAM of the most probable class")
plt.show()

# %% [markdown]
# ## Features
#
# `forward_intermediates` returns the maps of the stem and of each stage too. `forward_features` returns the last map,
# `forward_head` makes logits of it. Between two blocks the two paths are apart; here they are joined, the residual
# path first.

# %%
features, stages = model.forward_intermediates(images)
for info, stage in zip(model.feature_info, stages, strict=True):
    print(f"{info.index}: {stage.shape}, one feature for {info.reduction}x{info.reduction} pixels")
print(f"features {features.shape}, logits {model.forward_head(features).shape}")

# %% [markdown]
# ## Compiled
#
# `fast_forward` is the network as the backend likes it best: fused, reordered and compiled, for batches of any size.
# The plain form, `model(images)`, is the reference that it is tested against.

# %%
fast = dpn_jax.fast_forward(model)
logits, plain = fast(images), model(images)
print(f"{jax.default_backend()}: {logits.shape}, largest difference {np.abs(logits - plain).max():.1e}")
assert np.allclose(logits, plain, atol=1e-4)

# %% [markdown]
# ## Equal to timm
#
# The same weights in timm's network, stage by stage. `python -m convert.verify FILE` prints this table for any
# checkpoint; the notebook `03_port_your_weights` shows what it looks like when something is wrong.

# %%
with tempfile.TemporaryDirectory() as folder:
    dpn_jax.save(model, Path(folder) / "weights.safetensors")
    rows = compare(Path(folder) / "weights.safetensors", images, "float32")
for row in rows:
    print(f"{row.name:<10} {row.shape!s:<18} relative error {row.relative:.1e}")
assert all(row.within(1e-5) for row in rows)

# %% [markdown]
# ## From here
#
# - `02_finetune_with_optax`: your own classes;
# - `04_two_paths`: what the two paths of the network do;
# - `05_explain`: more maps, and when to believe them;
# - `06_change_the_block`: another block, norm or head.
