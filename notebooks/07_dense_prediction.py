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
# # Dense prediction: a segmentation network on DPN's features
#
# **You will learn** what `forward_intermediates` and `feature_info` give to a network that answers for every pixel,
# how to build a small feature pyramid on them, and what `output_stride` 16 and 8 buy and cost.
#
# **It takes** about five minutes on two CPU cores.
#
# **For your own data** start from trained weights, `dpn_jax.from_pretrained("dpn92.mx_in1k", output_stride=8)`, and
# replace `draw_batch` by your images and masks. Here the backbone learns from nothing, on shapes that are drawn at
# random.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from PIL import Image, ImageDraw

import dpn_jax

SIZE = 64
NAMES = ("background", "disk", "square", "triangle")

# %% [markdown]
# ## Images and masks
#
# Up to three shapes of random, bright color on a noisy ground; where they overlap, the last one is seen.


# %%
def draw_image(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 [H, W, 3], and the class of each of its pixels, int32 [H, W]."""
    image = Image.fromarray(rng.integers(60, 120, (SIZE, SIZE, 3), np.uint8))
    mask = Image.new("L", (SIZE, SIZE))
    for _ in range(rng.integers(1, 4)):
        kind, color = int(rng.integers(1, 4)), tuple(rng.permutation((230, *rng.integers(0, 231, 2))).tolist())
        radius = int(rng.integers(8, 16))
        x, y = rng.integers(radius, SIZE - radius, 2).tolist()
        for canvas, fill in ((ImageDraw.Draw(image), color), (ImageDraw.Draw(mask), kind)):
            if kind == 1:
                canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
            elif kind == 2:
                canvas.rectangle((x - radius, y - radius, x + radius, y + radius), fill=fill)
            else:
                canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    noisy = np.asarray(image, np.int32) + rng.integers(-20, 21, (SIZE, SIZE, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8), np.asarray(mask, np.int32)


def draw_batch(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalized images, float32 [B, H, W, 3], and masks."""
    images, masks = zip(*(draw_image(rng) for _ in range(count)), strict=True)
    return np.stack(images).astype(np.float32) / 127.5 - 1, np.stack(masks)


images, masks = draw_batch(np.random.default_rng(0), 6)
figure, axes = plt.subplots(2, 6, figsize=(11, 3.9), layout="constrained")
for column, (image, mask) in enumerate(zip(images, masks, strict=True)):
    axes[0, column].imshow((image + 1) / 2)
    axes[1, column].imshow(mask, cmap="viridis", vmin=0, vmax=3)
for axis in axes.flat:
    axis.axis("off")
figure.suptitle("Images, and their masks: " + ", ".join(NAMES))
plt.show()

# %% [markdown]
# ## The features
#
# `feature_info` tells the channels and the reduction of each map, as in timm. With `output_stride=8` the last stages
# keep the resolution and dilate their kernels instead: the same parameters, finer maps.

# %%
for output_stride in (32, 16, 8):
    model = dpn_jax.create_model("dpn_tiny", num_classes=0, output_stride=output_stride)
    maps = model.forward_intermediates(jnp.zeros((1, SIZE, SIZE, 3)), intermediates_only=True)
    sizes = (f"{x.shape[1]}x{x.shape[2]}x{x.shape[3]}" for x in maps)
    print(f"output_stride={output_stride:<3}", *(f"{size:>10}" for size in sizes))
    assert [SIZE // info.reduction for info in model.feature_info] == [x.shape[1] for x in maps]

# %% [markdown]
# ## A feature pyramid
#
# From the coarsest map to the finest: a 1x1 convolution to a common width, enlarged and added to the next one (Lin et
# al., 2017). The last sum is classified at a quarter of the image's size and enlarged to it.


# %%
def enlarge(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinear."""
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "linear")


class Pyramid(nnx.Module):
    """Class scores for every pixel, from the features of a DPN.

    Args:
      backbone: made with `num_classes=0`.
      classes: their number.
      width: channels of the pyramid.
      rngs: source of the initial values.
    """

    def __init__(self, backbone: dpn_jax.DPN, classes: int, *, width: int = 32, rngs: nnx.Rngs) -> None:
        self.backbone = backbone
        stages = backbone.feature_info[1:]
        self.lateral = nnx.List(nnx.Conv(stage.channels, width, (1, 1), rngs=rngs) for stage in stages)
        self.smooth = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.classify = nnx.Conv(width, classes, (1, 1), rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """`[B, H, W, 3]` -> `[B, H, W, classes]`."""
        maps = self.backbone.forward_intermediates(images, indices=(1, 2, 3, 4), intermediates_only=True)
        total = None
        for lateral, features in reversed(list(zip(self.lateral, maps, strict=True))):
            projected = lateral(features)
            total = projected if total is None else projected + enlarge(total, projected.shape[1:3])
        return enlarge(self.classify(nnx.relu(self.smooth(total))), images.shape[1:3])


# %% [markdown]
# ## Training
#
# Each network sees the same 400 batches of 16 drawn images. A network built around a DPN is trained as any NNX
# module.

# %%
STEPS, BATCH = 400, 16


@nnx.jit
def step(model: Pyramid, optimizer: nnx.Optimizer, images: jax.Array, masks: jax.Array) -> jax.Array:
    """One update; the loss."""

    def mean_loss(model: Pyramid) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), masks).mean()

    loss, gradients = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, gradients)
    return loss


def evaluated(model: Pyramid, images: np.ndarray) -> np.ndarray:
    """The classes of the pixels."""
    view = nnx.view(model, use_running_average=True, deterministic=True, raise_if_not_found=False)
    return np.asarray(nnx.jit(lambda model, images: model(images).argmax(-1))(view, images))


def ious(predicted: np.ndarray, masks: np.ndarray) -> list[float]:
    """Intersection over union of each class."""
    both = [((predicted == c) & (masks == c)).sum() for c in range(len(NAMES))]
    return [b / ((predicted == c) | (masks == c)).sum() for c, b in enumerate(both)]


test_images, test_masks = draw_batch(np.random.default_rng(10_000), 200)
results, curves, shown = {}, {}, {}
for output_stride in (32, 16, 8):
    backbone = dpn_jax.create_model("dpn_tiny", num_classes=0, output_stride=output_stride, rngs=nnx.Rngs(0))
    model = Pyramid(backbone, len(NAMES), rngs=nnx.Rngs(1))
    schedule = optax.warmup_cosine_decay_schedule(1e-4, 8e-3, 40, STEPS)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=1e-4), wrt=nnx.Param)
    rng, losses, started = np.random.default_rng(1), [], time.perf_counter()
    for number in range(STEPS):
        losses.append(float(step(model, optimizer, *draw_batch(rng, BATCH))))
        if number == 0:
            started = time.perf_counter()  # compiled
    seconds = (time.perf_counter() - started) / (STEPS - 1)
    predicted = np.concatenate([evaluated(model, part) for part in np.split(test_images, 5)])
    results[output_stride] = (ious(predicted, test_masks), seconds, backbone.config.multiply_adds(SIZE, SIZE))
    curves[output_stride], shown[output_stride] = losses, predicted[:6]
    print(f"output_stride {output_stride}: mean IoU {np.mean(results[output_stride][0]):.3f}, {seconds:.2f} s a step")

# %%
figure, axes = plt.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
for output_stride, losses in curves.items():
    axes[0].semilogy(np.convolve(losses, np.ones(20) / 20, "valid"), label=f"output stride {output_stride}")
axes[0].set(xlabel="step", ylabel="cross-entropy", title="Training loss, mean of 20 steps")
axes[0].legend()
width = 0.27
for number, (output_stride, (values, _, _)) in enumerate(results.items()):
    axes[1].bar(np.arange(4) + (number - 1) * width, values, width, label=f"output stride {output_stride}")
axes[1].set_xticks(range(4), NAMES)
axes[1].set(ylabel="IoU", ylim=(0, 1), title="Intersection over union of 200 new images")
axes[2].bar([str(stride) for stride in results], [1000 * seconds for _, seconds, _ in results.values()])
for number, (_, seconds, operations) in enumerate(results.values()):
    axes[2].text(number, 1000 * seconds, f"{operations / 1e6:.0f} M multiply-adds", ha="center", va="bottom")
axes[2].set(xlabel="output stride", ylabel="ms", title="A training step of 16 images")
axes[2].margins(y=0.15)
plt.show()

# %%
figure, axes = plt.subplots(5, 6, figsize=(10, 8.6), layout="constrained")
rows = {"image": (test_images[:6] + 1) / 2, "mask": test_masks[:6]} | {f"stride {k}": v for k, v in shown.items()}
for line, (name, pictures) in zip(axes, rows.items(), strict=True):
    for axis, picture in zip(line, pictures, strict=True):
        axis.imshow(picture, vmin=0, vmax=3)
        axis.set_xticks([])
        axis.set_yticks([])
    line[0].set_ylabel(name)
figure.suptitle("New images, their masks, and what the three networks say")
plt.show()

# %% [markdown]
# The figures decide what the finer maps are worth. The pyramid takes the borders of shapes from the early stages,
# which are equally fine in all three networks; what `output_stride` changes is how finely the *late* stages, which
# know the kind of a shape, place it. Where shapes are small for the network's stride that helps; it always costs
# arithmetic.

# %%
means = {stride: float(np.mean(values)) for stride, (values, _, _) in results.items()}
assert min(means.values()) > 0.7
assert means[8] > means[32] + 0.02
assert results[8][2] > results[16][2] > results[32][2]
