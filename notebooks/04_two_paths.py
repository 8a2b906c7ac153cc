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
# # Two paths: the idea of the paper, made visible
#
# **You will learn** what a Dual Path Network's residual and dense path each contribute, on trained weights: how the
# channels grow, what the blocks read, what is lost without a path, how far the features see, and which stages are
# alike.
#
# **It takes** about a minute on two CPU cores.
#
# **For your own data** change `TAG` and `photos`; a few dozen images give steady figures.
#
# Two small networks that come with the package are looked at, one of photos and one of digits. What is seen here is
# seen on these two. Whether it holds for DPN-92 is for you to try, with `TAG = "dpn92.mx_in1k"`.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import dpn_jax
from dpn_jax import explain
from dpn_jax.config import VARIANTS
from recipes import digits_folder

TAG = "dpn_mini.cifar10"
samples = next(folder for folder in (Path("samples"), Path("../samples")) if folder.is_dir())

photo_model = dpn_jax.from_pretrained(TAG)
transform = dpn_jax.preprocessing(TAG)
size = transform.preprocessing.image_size
photos = []  # eight crops, and their mirror images, of each photo
rng = np.random.default_rng(0)
for name in ("cat", "dog", "horses", "kingfisher", "moose"):
    photo = Image.open(samples / f"{name}.jpg").convert("RGB")
    for _ in range(8):
        side = int(min(photo.size) * rng.uniform(0.8, 1))
        left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
        crop = np.asarray(photo.resize((size, size), box=(left, top, left + side, top + side), resample=3))
        photos += [transform(crop), transform(crop[:, ::-1])]
photos = np.stack(photos)

digits = dpn_jax.from_pretrained("dpn_tiny.digits")
with tempfile.TemporaryDirectory() as folder:
    digits_folder.main(Path(folder) / "digits")
    files = sorted((Path(folder) / "digits" / "val").glob("*/*.png"))
    prepare = dpn_jax.preprocessing("dpn_tiny.digits")
    drawn, labels = np.stack([prepare(file) for file in files]), np.array([int(file.parent.name) for file in files])
print(f"{len(photos)} crops of photos, {len(drawn)} digits that were held out")

# %% [markdown]
# ## The channels
#
# Each block reads both paths. It **adds** to the residual path, whose width stays the same within a stage, and
# **appends** to the dense path, which grows with each block. What was appended is never changed again: every later
# block of the stage reads it as it is.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
for axis, (name, config) in zip(axes, {TAG: photo_model.config, "DPN-92": VARIANTS["dpn92"]}.items(), strict=True):
    residual, dense, starts = [], [], []
    for stage in config.stages:
        starts.append(len(residual))
        for block in range(stage.depth):
            residual.append(stage.residual)
            dense.append(stage.increment * (block + 3))
    blocks = np.arange(len(residual))
    axis.bar(blocks, residual, label="residual path", color="#4C72B0")
    axis.bar(blocks, dense, bottom=residual, label="dense path", color="#DD8452")
    for start in starts[1:]:
        axis.axvline(start - 0.5, color="gray", linewidth=0.8)
    axis.set(xlabel="block (lines: a new stage)", ylabel="channels after it", title=name)
axes[0].legend()
figure.suptitle("Channel growth")
plt.show()

# %% [markdown]
# ## What the blocks read
#
# `path_shares` splits three things up between the paths: the squared norm of what a block reads, the variance of what
# its first convolution makes of it, and the gradient of the loss. Both paths go through the same norm and the same
# convolution, so that the shares say what the block *uses*, not only what is there. A path that works against the
# other has a negative share of the variance, and the other then more than 100%.


# %%
def share_of_channels(config: dpn_jax.DPNConfig, share: explain.PathShares) -> float:
    """The dense path's share of the channels that a block reads; a stage's first block reads the stage before."""
    stage = config.stages[share.stage if share.block else share.stage - 1]
    read = stage.block_in_channels(share.block or stage.depth)
    return 1 - stage.residual / read


networks = {"photos": (photo_model, photos), "digits": (digits, drawn)}
kinds = {"input": "squared norm", "preactivation": "variance of the first convolution", "gradient": "gradient"}
figure, axes = plt.subplots(2, 3, figsize=(12, 5.6), sharey=True, layout="constrained")
for row, (name, (model, images)) in zip(axes, networks.items(), strict=True):
    shares = explain.path_shares(model, images)
    places = [f"{share.stage + 1}.{share.block + 1}" for share in shares]
    for axis, (kind, words) in zip(row, kinds.items(), strict=True):
        dense = np.array([getattr(share, kind).dense for share in shares])
        channels = np.array([share_of_channels(model.config, share) for share in shares])
        if kind != "preactivation":
            assert np.all(dense < channels) if kind == "input" else np.all(dense > channels)
        axis.bar(places, 100 * dense, color="#DD8452", label="dense path's share")
        axis.plot(places, 100 * channels, "k_", markersize=16, label="its share of the channels")
        axis.set(title=f"{name}: {words}", xlabel="stage.block")
    row[0].set_ylabel("%")
axes[0, 0].legend(fontsize=8)
figure.suptitle("The dense path's share of what each block reads; the rest is the residual path's")
plt.show()

# %% [markdown]
# The same in both networks, in every block: the dense path has less of the norm than of the channels, about as much of
# the variance, and more of the gradient. Its features are small and well used, and they are where the loss reaches
# the early layers: what was appended once is read by every later block of the stage.
#
# ## Without a path
#
# `ablate` gives the network in which no block reads one of the paths any more, or no dense features older than a
# number of blocks; what is left out is replaced by its mean. Nothing is trained again: this shows what the trained
# network relies on, not what another could have learned. The digits have labels; for the photos the whole network's
# answer is the measure.

# %%
changes = {
    "whole": {},
    "no dense features\nolder than 1 block": {"older_than": 1},
    "no dense path": {"path": "dense"},
    "no residual path": {"path": "residual"},
}
answers = np.asarray(photo_model(photos)).argmax(axis=1)
kept = {"photos: same answer as the whole network": [], "digits: right": []}
for options in changes.values():
    for (model, images), truth, values in zip(networks.values(), (answers, labels), kept.values(), strict=True):
        changed = explain.ablate(model, **options) if options else model
        values.append(np.mean(np.asarray(changed(images)).argmax(axis=1) == truth))
figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
for offset, (name, values) in zip((-0.2, 0.2), kept.items(), strict=True):
    bars = axis.bar(np.arange(len(changes)) + offset, 100 * np.array(values), 0.4, label=name)
    axis.bar_label(bars, fmt="%.0f")
axis.axhline(10, color="gray", linestyle="--", linewidth=0.8, label="chance")
axis.set_xticks(range(len(changes)), changes)
axis.set(ylabel="images, %", title="What is left without a path", ylim=(0, 115))
axis.legend(fontsize=8, ncols=3)
plt.show()

assert all(values[2] < 0.5 and values[3] < 0.5 for values in kept.values())

# %% [markdown]
# Neither path does without the other: without one of them, either network is lost. The photo network needs the older
# dense features too. In that of the digits there are hardly any: its stages have one or two blocks.
#
# ## Stage by stage, in numbers
#
# For each stage: how much of what it hands on and keeps is dense, how much of that its readers use (means over the
# blocks that read it; the head, which reads the last stage too, has no convolution and is not among them), and what
# is left when the features that one path has made in this stage are gone.

# %%
for name, truth in (("photos", answers), ("digits", labels)):
    model, images = networks[name]
    shares = explain.path_shares(model, images)
    print(f"{name}: the dense path's share of       kept, %, without what this stage made of")
    print("stage    channels   variance   gradient        the dense path     the residual one")
    for index, stage in enumerate(model.config.stages):
        read = [share for share in shares if (share.stage if share.block else share.stage - 1) == index]
        means = [[getattr(share, kind).dense for share in read] for kind in ("preactivation", "gradient")]
        used = [f"{np.mean(values):.0%}" if values else "-" for values in means]
        left = [
            np.mean(np.asarray(explain.ablate(model, path=path, stages=[index])(images)).argmax(axis=1) == truth)
            for path in ("dense", "residual")
        ]
        channels = 1 - stage.residual / stage.out_channels
        print(f"{index + 1:<8} {channels:8.0%} {used[0]:>10} {used[1]:>10} {left[0]:21.0%} {left[1]:20.0%}")
    print()

# %% [markdown]
# The dense path matters most in stage 1, where it is a third of the channels: without its features half of the answers
# are others. It matters least in the last stage, where hardly anybody is left to read them. What the residual path
# hands on is missed in every stage.
#
# ## How far the features see
#
# The receptive field that a feature *has* is what its pixels can reach; the one that it *uses* is found by gradients
# (Luo et al., 2016). It is measured on images twice as large as those that the network was trained on, so that there
# is room for it.

# %%
large = np.stack([np.kron(image, np.ones((2, 2, 1), np.float32)) for image in photos[::4]])
stages = range(1, len(photo_model.config.stages) + 1)
figure, axes = plt.subplots(1, len(stages), figsize=(3.4 * len(stages), 3.4), layout="constrained")
sizes = []
for axis, index in zip(axes, stages, strict=True):
    field = explain.receptive_field(photo_model, large, index=index)
    sizes.append(field.size)
    axis.imshow(np.sqrt(field.map), cmap="inferno")
    axis.set(title=f"stage {index}: {field.size:.0f} pixels", xlabel="pixels")
figure.suptitle("Effective receptive field of a feature in the middle (square root of the gradient's size)")
plt.show()
assert sizes == sorted(sizes)

# %% [markdown]
# ## Which stages are alike
#
# Centered kernel alignment compares what two layers make of the same images: 1 if the one is the other, turned and
# scaled (Kornblith et al., 2019; the unbiased form). The photos are crops of five, which makes everything more alike
# than five dozen different photos would; the digits are 355 different ones.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for axis, (name, (model, images)) in zip(axes, networks.items(), strict=True):
    _, maps = model.forward_intermediates(images)
    names = ["stem", *(f"stage {index}" for index in range(1, len(maps)))]
    table = np.array([[explain.cka(np.asarray(a), np.asarray(b)) for b in maps] for a in maps])
    picture = axis.imshow(table, vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    for (row, column), value in np.ndenumerate(table):
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
    axis.set_title(name)
figure.colorbar(picture, ax=axes, label="CKA")
figure.suptitle("How alike the stages are")
plt.show()

# %% [markdown]
# Neighbors are the most alike, and the digits' stages are the less alike the more blocks lie between them.
