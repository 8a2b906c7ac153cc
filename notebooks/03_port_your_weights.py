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
# # Port your weights, and prove it
#
# **You will learn** how a timm checkpoint becomes a Flax one, how to see that the two networks are equal stage by
# stage, and what the usual mistakes of a port look like, so that you recognize yours.
#
# **It takes** about a minute on two CPU cores.
#
# **For your own data** set `CHECKPOINT` to your file (`.safetensors`, `.pth`) or, online, to a tag such as
# `"dpn92.mx_in1k"`. Here timm's untrained DPN-68b stands in, with random norm statistics: fresh ones (mean 0,
# variance 1) hide half of all mistakes.

# %%
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import safetensors.torch
import torch
from flax import nnx

import dpn_jax
from convert.timm_import import import_timm
from convert.verify import compare
from dpn_jax.checkpoint.save import convert
from dpn_jax.layers import ACTIVATIONS, NormAct
from dpn_jax.operations import PLAIN

CHECKPOINT = None  # your file, or a tag
work = Path(tempfile.mkdtemp())
samples = next(folder for folder in (Path("samples"), Path("../samples")) if folder.is_dir())

# %% [markdown]
# ## The checkpoint
#
# Skip this cell's body if you have one.

# %%
if CHECKPOINT is None:
    torch.manual_seed(0)
    stand_in = import_timm().create_model("dpn68b", num_classes=10)
    for module in stand_in.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
    CHECKPOINT = work / "timm.safetensors"
    safetensors.torch.save_file(stand_in.state_dict(), CHECKPOINT, metadata={"format": "pt"})

# %% [markdown]
# ## Convert
#
# On the command line: `dpn-jax convert timm.safetensors flax.safetensors`. Every tensor has an entry in a table that
# is made from the architecture; what does not fit is listed, nothing is skipped. `load` reads both layouts, so
# converting is a matter of taste.

# %%
convert(CHECKPOINT, work / "flax.safetensors")
model = dpn_jax.load(work / "flax.safetensors")
print(dpn_jax.config.variant_of(model.config), model.config.num_classes, "classes")

# %% [markdown]
# ## The error of each stage
#
# Both networks run on a photo. In float64 the difference is rounding alone; in float32 it grows a little from stage
# to stage. A mistake would lift a curve by many orders of magnitude, from the stage where it is on.

# %%
transform = dpn_jax.preprocessing(dpn_jax.Preprocessing(image_size=96))
image = transform(samples / "cat.jpg")[None]
figure, axis = plt.subplots(figsize=(8, 3.5), layout="constrained")
for dtype in ("float64", "float32"):
    rows = [row for row in compare(work / "flax.safetensors", image, dtype) if not row.name.startswith("top")]
    axis.semilogy([row.name for row in rows], [max(row.relative, 1e-17) for row in rows], "o-", label=dtype)
    assert all(row.within({"float64": 1e-10, "float32": 1e-5}[dtype]) for row in rows)
axis.set_title("The port against timm: rounding, nothing else")
axis.set_ylabel("relative error (norm of the difference)")
axis.set_ylim(1e-17, 1)
axis.legend()
plt.show()

# %% [markdown]
# ## There and back
#
# Nothing is lost: the way back gives timm's tensors to the bit.

# %%
convert(work / "flax.safetensors", work / "back.safetensors")
before, after = (safetensors.torch.load_file(path) for path in (CHECKPOINT, work / "back.safetensors"))
assert before.keys() == after.keys()
assert all(torch.equal(before[name], after[name]) for name in before)
print(len(before), "tensors, all equal")

# %% [markdown]
# ## Break it on purpose
#
# Five mistakes that ports of DPN make. Each runs through without an error, and some even leave the top-1 as it was.
# `operations=` replaces what the layers compute with; the others change a copy of the model.

# %%
Mistake = Callable[[dpn_jax.DPN], dpn_jax.DPN]


def norms(model: dpn_jax.DPN) -> list[NormAct]:
    """Every norm of a model."""
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, NormAct)]


def elu_at_the_end(model: dpn_jax.DPN) -> dpn_jax.DPN:
    """timm's code asks for ELU after the last norm (`fc_act_layer="elu"`), but the network it builds has ReLU."""
    ACTIVATIONS["elu"] = nnx.elu
    model.norm.activation = "elu"
    return model


def same_padding(model: dpn_jax.DPN) -> dpn_jax.DPN:
    """At stride 2, "SAME" pads the other side."""

    def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1, groups: int = 1) -> jax.Array:
        x = jnp.concatenate(jax.tree.leaves(x), axis=-1)
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=layout, feature_group_count=groups
        )

    return nnx.view(model, operations=dataclasses.replace(PLAIN, convolve=convolve))


def usual_epsilon(model: dpn_jax.DPN) -> dpn_jax.DPN:
    """DPN's is 1e-3, most networks' is 1e-5."""
    for norm in norms(model):
        norm.epsilon = 1e-5
    return model


def swapped_statistics(model: dpn_jax.DPN) -> dpn_jax.DPN:
    """Mean and variance have the same shape."""
    for norm in norms(model):
        mean, variance = norm.mean[...], norm.var[...]
        norm.mean.set_value(variance)
        norm.var.set_value(jnp.abs(mean))
    return model


def wrong_last_norm(model: dpn_jax.DPN) -> dpn_jax.DPN:
    """The last norm's scale and bias are swapped."""
    scale, bias = model.norm.scale[...], model.norm.bias[...]
    model.norm.scale.set_value(bias)
    model.norm.bias.set_value(scale)
    return model


mistakes: dict[str, Mistake] = {
    "ELU for ReLU at the end": elu_at_the_end,
    "SAME padding": same_padding,
    "eps 1e-5 for 1e-3": usual_epsilon,
    "mean and variance swapped": swapped_statistics,
    "scale and bias of the last norm swapped": wrong_last_norm,
}

# %%
names = ["stem", *(f"stage {index}" for index in range(1, 5)), "features", "logits"]


@nnx.jit
def outputs(model: dpn_jax.DPN, images: jax.Array) -> list[jax.Array]:
    """The stem's output, the stages', the features, the logits."""
    features, stages = model.forward_intermediates(images)
    return [*stages, features, model.forward_head(features)]


right = outputs(model, image)
errors = []
for mistake in mistakes.values():
    wrong = outputs(mistake(nnx.clone(model)), image)
    errors.append([float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(wrong, right, strict=True)])

# %% [markdown]
# The first stage with a color is the place to look at. ELU and the swapped last norm show only after the last stage.
# Padding and epsilon are there from the stem on, and an epsilon is the one that hides best: a thousand times less
# than swapped statistics, and still a thousand times more than rounding.

# %%
figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
shown = np.log10(np.maximum(errors, 1e-7))
picture = axis.imshow(shown, cmap="magma", vmin=-7, vmax=0.5, aspect="auto")
axis.set_xticks(range(len(names)), names)
axis.set_yticks(range(len(mistakes)), mistakes)
for row, values in enumerate(errors):
    for column, value in enumerate(values):
        color = "white" if shown[row, column] < -3 else "black"
        axis.text(column, row, f"{value:.0e}" if value else "0", ha="center", va="center", color=color, fontsize=8)
axis.set_title("Relative error of each stage, by mistake")
figure.colorbar(picture, label="log10 of the relative error")
plt.show()

# %% [markdown]
# `python -m convert.verify yours.pth photo.jpg` prints the table of this notebook for your file, in float64 and
# float32, and exits with 1 where the two networks differ.
