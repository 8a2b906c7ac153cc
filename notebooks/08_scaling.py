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
# # Scaling: many devices, batch size, precision, packed data
#
# **You will learn** how one batch is shared among devices, in inference and in training, what a TPU's compiler says
# about the batch size, what bfloat16 does to the answers, and how to read images faster than they can be decoded.
#
# **It takes** about two minutes on two CPU cores, which play eight devices. Nothing here needs a TPU.
#
# **For your own data** set `MODEL` to `"dpn92.mx_in1k"` and `photos` to your files; on a TPU VM leave out the line
# that makes eight CPU devices.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)  # before anything else uses JAX

import json
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import dpn_jax
from dpn_jax import finetune
from dpn_jax.images.pack import pack
from dpn_jax.images.packed import PackedImages
from recipes import digits_folder

MODEL = "dpn_tiny.digits"
work = Path(tempfile.mkdtemp())
digits_folder.main(work / "digits")
validation = finetune.image_folder(work / "digits", split="val")
photos = list(validation.files)
print(len(jax.devices()), "devices,", len(photos), "images")

# %% [markdown]
# ## Inference: each device runs the program of one
#
# `devices="all"` copies the parameters to each device once and cuts every batch into equal parts. The devices send
# each other nothing, so the logits are those of one device, up to rounding of another batch size.

# %%
one = dpn_jax.Classifier.from_pretrained(MODEL, batch_size=64)
images = [one.transform.crop(photo) for photo in photos]
expected = one.logits(images)
differences = {}
for count in (1, 2, 4, 8):
    classifier = dpn_jax.Classifier.from_pretrained(MODEL, batch_size=64, devices=jax.devices()[:count])
    differences[count] = float(np.abs(classifier.logits(images) - expected).max())
print("largest difference of a logit, by devices:", differences)
assert max(differences.values()) < 1e-4

# %% [markdown]
# ## Training: the gradient is summed over the devices
#
# `data_mesh` has all devices in one axis. The state is copied to each (`replicate`), a batch is cut (`shard_batch`),
# and the same `train_step` computes what one device would: the norms' statistics and the gradients are sums over all
# images.

# %%
config = finetune.FinetuneConfig(batch_size=64, learning_rate=3e-3, flip=0.0, image_size=32, workers=0)
model = dpn_jax.from_pretrained(MODEL)
train = finetune.image_folder(work / "digits", split="train")
batch = next(finetune.batches(train, config, model.provenance.preprocessing, train=True))
state = finetune.TrainState.create(model, finetune.make_optimizer(config, model, steps=100), config)
mesh = finetune.data_mesh(jax.devices())
shared = finetune.shard_batch(batch, mesh)
jax.debug.visualize_array_sharding(shared["image"].reshape(64, -1))

losses = {}
for name, (state_there, batch_there) in {
    "one device": (jax.tree.map(jnp.copy, state), batch),
    "eight devices": (finetune.replicate(jax.tree.map(jnp.copy, state), mesh), shared),
}.items():
    losses[name] = []
    for _ in range(5):
        state_there, metrics = finetune.train_step(state_there, batch_there)
        losses[name].append(float(metrics["loss"] / metrics["count"]))
for name, values in losses.items():
    print(f"{name:<14}", *(f"{value:.6f}" for value in values))
np.testing.assert_allclose(losses["eight devices"], losses["one device"], rtol=1e-3)

# %% [markdown]
# ## What a TPU's compiler says
#
# The compiler runs without a TPU: `python -m benchmarks.tpu_compile --models dpn92 --forms fast --batches 32 64 128
# 256 --json notebooks/tpu_compile.json` made the file that this cell reads (an environment with the extra `tpu`;
# about ten minutes). A row has the cycles of the compiled schedule, each operation taking the longer of its
# instructions and its traffic with memory. That is an estimate: no chip has run it.

# %%
folder = next(folder for folder in (Path("notebooks"), Path()) if (folder / "tpu_compile.json").exists())
report = json.loads((folder / "tpu_compile.json").read_text())
rows = report["rows"]
batches = [row["batch"] for row in rows]
figure, axes = plt.subplots(1, 3, figsize=(12, 3.3), layout="constrained")
axes[0].plot(batches, [row["cycles"] / row["batch"] / 1e3 for row in rows], "o-", label="compiled schedule")
axes[0].plot(batches, [row["compute"] / row["batch"] / 1e3 for row in rows], "s--", label="without waiting for memory")
axes[0].set(ylabel="thousand cycles an image", title="Time an image")
axes[0].legend()
axes[1].plot(batches, [row["bytes"] / row["batch"] / 1e6 for row in rows], "o-")
axes[1].set(ylabel="MB an image", title="Traffic with memory")
axes[2].plot(batches, [row["memory"] / 1e9 for row in rows], "o-")
axes[2].set(ylabel="GB", title="Memory, of a chip's 16")
for axis in axes:
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, batches)
    axis.set_xlabel("images a chip")
    axis.set_ylim(bottom=0)
figure.suptitle("DPN-92 in bfloat16 on one v5e chip, 224 pixels, as its compiler plans it")
plt.show()
best = min(rows, key=lambda row: row["cycles"] / row["batch"])
print(f"best: {best['batch']} images a chip, {1.5e9 * best['batch'] / best['cycles']:,.0f} images/s at 1.5 GHz at most")

# %% [markdown]
# An image costs 332 thousand cycles in batches of 32 and 190 thousand in batches of 128: small maps fill the chip's
# matrix unit only if there are enough of them. 256 gains another 3%, and takes as long again to answer. Memory is no
# limit to inference. The traffic does not fall with the batch: the compiler keeps other things in fast memory.
#
# ## Precision
#
# `dtype=jnp.bfloat16` halves the memory and doubles the speed of a TPU; parameters in a file stay float32. What it
# does to the answers is measured on images, not guessed: the largest change of a probability, and how often the best
# class is another one.

# %%
probabilities = {}
for name, dtype in (("float32", jnp.float32), ("bfloat16", jnp.bfloat16)):
    classifier = dpn_jax.Classifier.from_pretrained(MODEL, dtype=dtype, batch_size=64)
    probabilities[name] = jax.nn.softmax(classifier.logits(images).astype(np.float32))
change = np.abs(probabilities["bfloat16"] - probabilities["float32"]).max(axis=1)
same = float((probabilities["bfloat16"].argmax(1) == probabilities["float32"].argmax(1)).mean())
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
axis.hist(100 * change, bins=40)
axis.set(xlabel="largest change of a probability, percentage points", ylabel="images", yscale="log")
axis.set_title(f"bfloat16 against float32, {len(photos)} images: the best class is the same for {same:.1%}")
plt.show()
assert same > 0.98

# %% [markdown]
# ## Packed data
#
# Decoding a photo of 500 x 375 pixels takes a core several milliseconds; a v5e chip wants one every 0.13 ms. `pack`
# decodes once and for all: `dpn-jax pack PHOTOS/val packed --crops --model TAG`. These digits are tiny, so the gain
# here is small; for photos it was 36 to 40 times (`docs/tpu.md`).

# %%
pack(work / "digits" / "val", work / "packed", crops=one.transform.preprocessing)
packed = PackedImages(work / "packed")
rates = {}
for name, read in (
    ("PNG files, decoded", lambda: [one.transform.crop(photo) for photo in photos]),
    ("packed crops", lambda: [packed[index][0] for index in range(len(packed))]),
):
    read()
    started = time.perf_counter()
    read()
    rates[name] = len(photos) / (time.perf_counter() - started)
    print(f"{name:<20} {rates[name]:8,.0f} images/s on one core")
accuracy = [
    dpn_jax.evaluate(dpn_jax.Classifier.from_pretrained(MODEL), source).top1.value
    for source in (work / "digits" / "val", packed)
]
print("accuracy on the files and on the packed crops:", *accuracy)
assert accuracy[0] == accuracy[1]
