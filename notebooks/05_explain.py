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
# # Explain an answer, and judge the explanation
#
# **You will learn** what Grad-CAM, integrated gradients and occlusion show, how they fail, and three ways to tell a
# map that explains the network from one that only looks as if it did.
#
# **It takes** about a minute on two CPU cores.
#
# **For your own data** change `TAG` and `photos`. With `"dpn92.mx_in1k"`, whose images have 224 pixels, `WINDOW = 32`
# and `STRIDE = 16` are sensible.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.ndimage import gaussian_filter

import dpn_jax
from dpn_jax import explain

TAG = "dpn_mini.cifar10"
WINDOW, STRIDE = 16, 4  # pixels, of occlusion
samples = next(folder for folder in (Path("samples"), Path("../samples")) if folder.is_dir())
photos = [samples / f"{name}.jpg" for name in ("cat", "dog", "horses", "kingfisher", "moose")]

classifier = dpn_jax.Classifier.from_pretrained(TAG)
model, transform = dpn_jax.from_pretrained(TAG), classifier.transform
images = np.stack([transform(photo) for photo in photos])
best = [result[0] for result in classifier(photos, top_k=1)]
for photo, top in zip(photos, best, strict=True):
    print(f"{photo.name:<15} {top.label} {top.probability:.1%}")

# %% [markdown]
# ## Three maps
#
# - **Grad-CAM** adds up feature maps, weighted by how much each speaks for the class. It is as coarse as the features.
# - **Integrated gradients** share the logit out among the pixels: what each contributes, compared with a baseline. The
#   baseline is part of the question; 0 after normalization is the mean color.
# - **Occlusion** covers a window and looks how far the logit falls. It asks the network itself, and is the slowest.
#
# Maps come back raw: one number a pixel. `overlay` scales them for display and lays them over the photo. Integrated
# gradients are single pixels, up and down; they are smoothed here, for the eye only.


# %%
def smooth(maps: object) -> np.ndarray:
    """Maps for display: the attributions of a pixel and its neighbors, added up."""
    return gaussian_filter(np.asarray(maps), sigma=(0, 2, 2))


integrated = explain.integrated_gradients(model, images, steps=200)
maps = {
    "Grad-CAM": explain.grad_cam(model, images),
    "integrated gradients": smooth(integrated.attributions.sum(axis=-1)),
    "occlusion": explain.occlusion(model, images, window=WINDOW, stride=STRIDE),
}


def show(rows: dict[str, object], title: str) -> None:
    """A row for each kind of map, a column for each photo."""
    figure, axes = plt.subplots(len(rows) + 1, len(photos), figsize=(11, 2.1 * len(rows) + 2.3), layout="constrained")
    for column, (photo, top) in enumerate(zip(photos, best, strict=True)):
        axes[0, column].imshow(transform.crop(photo))
        axes[0, column].set_title(f"{top.label}, {top.probability:.0%}")
        for axis, values in zip(axes[1:, column], rows.values(), strict=True):
            axis.imshow(explain.overlay(transform.crop(photo), np.asarray(values)[column]))
    for axis, name in zip(axes[:, 0], ("what it is given", *rows), strict=True):
        axis.set_ylabel(name)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.suptitle(title)
    plt.show()


show(maps, "Maps of the most probable class")

# %% [markdown]
# ## Check the sum
#
# Integrated gradients promise that the attributions add up to the difference between the logit of the image and that
# of the baseline. The integral is a sum of `steps` gradients; how far it is off, as a fraction of that difference,
# comes back with the map. Where the difference is small, as for the dog, so is the claim that the map makes.

# %%
rows = np.arange(len(photos))
logits, ground = (np.asarray(model(x))[rows, [top.index for top in best]] for x in (images, np.zeros_like(images)))
sums = np.asarray(integrated.attributions.sum(axis=(1, 2, 3)))
print("photo            logit   of the baseline   difference   sum of the map   error")
for values in zip(photos, logits, ground, logits - ground, sums, integrated.error, strict=True):
    print(
        f"{values[0].name:<15} {values[1]:6.2f} {values[2]:17.2f} {values[3]:12.2f} {values[4]:16.2f} {values[5]:7.1%}"
    )
assert np.abs(sums - (logits - ground)).max() < 0.05

# %% [markdown]
# ## Check against a network that has forgotten
#
# Shuffle the weights, from the last layers on, and explain again (Adebayo et al., 2018). A map that stays the same
# shows the image, not what the network makes of it: an edge detector does that too.

# %%
methods = {
    "Grad-CAM": lambda network: explain.grad_cam(network, images, classes),
    "integrated gradients": lambda network: explain.integrated_gradients(network, images, classes).attributions.sum(-1),
    "occlusion": lambda network: explain.occlusion(network, images, classes, window=WINDOW, stride=STRIDE),
    "gradient, without sign": lambda network: explain.saliency(network, images, classes),
}
classes = np.asarray(model(images)).argmax(axis=1)
depths = {"classifier": 0, "and last stage": 1, "and the one before": 2, "all": None}
networks = {name: explain.randomized(model, stages=stages) for name, stages in depths.items()}
trained = {name: method(model) for name, method in methods.items()}
forgotten = {
    name: [explain.rank_correlation(trained[name], method(network)) for network in networks.values()]
    for name, method in methods.items()
}

figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
for name, rows in forgotten.items():
    axis.plot(list(depths), [np.nanmean(row) for row in rows], "o-", label=name)
axis.axhline(0, color="gray", linewidth=0.8)
axis.set(xlabel="layers whose weights are shuffled", ylabel="rank correlation of the maps", ylim=(-0.3, 1))
axis.set_title("How much of a map is left when the network has forgotten")
axis.legend()
plt.show()

left = {name: np.nanmean(rows[-1]) for name, rows in forgotten.items()}
assert left.pop("gradient, without sign") > 0.3 and max(np.abs(list(left.values()))) < 0.2

# %% [markdown]
# Integrated gradients and occlusion know nothing of the old map as soon as the classifier is shuffled. Grad-CAM
# follows when the features behind it are gone. The size of the gradient stays alike to the end: it shows edges, which
# are in the photo whatever the network thinks. With every layer shuffled:

# %%
shuffled = {name: method(networks["all"]) for name, method in list(methods.items())[:3]}
shuffled["integrated gradients"] = smooth(shuffled["integrated gradients"])
show(shuffled, "Maps of the same classes from a network with shuffled weights")

# %% [markdown]
# ## Check by deleting
#
# Take the pixels away in the map's order, the most important first, and follow the probability of the class (Petsiuk
# et al., 2018). A good map makes it fall early: a small area under the curve. A random order is the yardstick.

# %%
random = np.random.default_rng(0).random(images.shape[:3])
curves = {name: explain.deletion(model, images, trained[name], classes) for name in trained}
curves["random order"] = explain.deletion(model, images, random, classes)
figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
for name, curve in curves.items():
    mean = np.asarray(curve.probabilities).mean(axis=0)
    style = "k--" if name == "random order" else "-"
    axis.plot(100 * curve.fractions, 100 * mean, style, label=f"{name}: area {float(curve.area.mean()):.2f}")
axis.set(xlabel="pixels taken away, %", ylabel="probability of the class, %")
axis.set_title(f"Deletion, mean of {len(photos)} photos")
axis.legend()
plt.show()

areas = {name: float(curve.area.mean()) for name, curve in curves.items()}
assert areas["integrated gradients"] < areas["occlusion"] < areas["random order"] < areas["gradient, without sign"]

# %% [markdown]
# Integrated gradients find the pixels that matter first, occlusion follows. The size of the gradient is worse than a
# random order: it is large where the photo has edges, and what it says is not whether a pixel speaks for the class or
# against it.
#
# Deleting has a weakness of its own: scattered holes are an image that the network has never seen, and can make the
# probability fall without saying anything about the class. Read the three checks together.
#
# ## On digits
#
# The same on a network whose classes everybody can check. Its images have 32 pixels, where the last features are a
# single cell, so that Grad-CAM takes an earlier map by `index=`.

# %%
digits = dpn_jax.from_pretrained("dpn_tiny.digits")
prepare = dpn_jax.preprocessing("dpn_tiny.digits")
files = [samples / "digits" / f"{digit}.png" for digit in range(10)]
inputs = np.stack([prepare(file) for file in files])
rows = {
    "Grad-CAM": explain.grad_cam(digits, inputs, index=2),
    "integrated\ngradients": smooth(explain.integrated_gradients(digits, inputs).attributions.sum(axis=-1)),
    "occlusion": explain.occlusion(digits, inputs, window=8, stride=2),
}
figure, axes = plt.subplots(len(rows), 10, figsize=(12, 4), layout="constrained")
for axis_row, (name, values) in zip(axes, rows.items(), strict=True):
    axis_row[0].set_ylabel(name)
    for axis, file, heat in zip(axis_row, files, values, strict=True):
        axis.imshow(explain.overlay(prepare.crop(file), heat))
        axis.set(xticks=[], yticks=[])
figure.suptitle("Maps of the most probable digit")
plt.show()

# %% [markdown]
# What is *not* there counts as well: for the three, the seven and the nine, integrated gradients and occlusion mark
# empty ground where another digit would have a stroke.
