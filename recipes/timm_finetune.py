"""The same fine-tuning run with timm and torch: `python -m recipes.timm_finetune DATA RUN`.

Reads the configuration of a run of `dpn-jax finetune` from RUN/config.json and repeats it: timm's network with the
run's initial values, the same batches in the same order, torch's AdamW, the same learning rate at each update. What
differs is who computes. Needs the extras `convert` and `finetune`.
"""

import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import tyro

import dpn_jax
from convert.timm_import import create_timm_model
from dpn_jax.checkpoint.save import convert
from dpn_jax.finetune import batches, image_folder, initial_model, learning_rate
from dpn_jax.finetune.data import Batch
from dpn_jax.finetune.record import Record, read_record
from dpn_jax.images.transform import Transform

SUPPORTED = {"optimizer": "adamw", "accumulate": 1, "layer_decay": 1.0, "mixup": 0.0, "cutmix": 0.0, "clip_norm": None}
SUPPORTED |= {"ema_decay": None, "freeze": "none", "norms": "train", "drop_rate": 0.0, "dtype": "float32"}


def main(
    data: tyro.conf.Positional[Path], run: tyro.conf.Positional[Path], /, *, seed: int | None = None
) -> list[float]:
    """Train, and print the accuracy on the validation images after each epoch.

    Args:
      data: the folder that the run was trained on.
      run: the run's folder.
      seed: another seed than the run's.

    Returns:
      The accuracies, each in [0, 1].
    """
    record = Record.from_json(run, read_record(run))
    config = record.config if seed is None else dataclasses.replace(record.config, seed=seed)
    if other := [name for name, value in SUPPORTED.items() if getattr(config, name) != value]:
        raise SystemExit(f"{run}: {other[0]}={getattr(config, other[0])!r} is not written here")
    splits = [
        image_folder(data, split=name, val_fraction=config.val_fraction, seed=config.seed) for name in ("train", "val")
    ]
    source = record.start["source"] or record.architecture
    ours = initial_model(source, config, splits[0].class_names, note=print)
    preprocessing = ours.provenance.preprocessing
    if config.image_size:
        preprocessing = dataclasses.replace(preprocessing, image_size=config.image_size)
    model = as_timm(ours)
    kernels = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.momentum, 0.999))
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    transform, update, accuracies = Transform(preprocessing), 0, []
    stream = batches(splits[0], config, preprocessing, train=True)
    schedule = learning_rate(config, steps_per_epoch=stream.per_epoch)
    for epoch in range(config.epochs):
        started, losses = time.perf_counter(), []
        model.train()
        for _ in range(stream.per_epoch):
            batch = next(stream)
            for group in optimizer.param_groups:
                group["lr"] = float(schedule(update))
            loss = loss_of(model(tensor(batch, transform)), torch.from_numpy(batch["label"]).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            update += 1
        accuracies.append(accuracy(model, batches(splits[1], config, preprocessing, train=False), transform))
        seconds = time.perf_counter() - started
        print(
            f"epoch {epoch + 1}: loss {np.mean(losses):.4f}, accuracy {accuracies[-1]:.2%}, {seconds:.0f} s", flush=True
        )
    return accuracies


def as_timm(model: dpn_jax.DPN) -> torch.nn.Module:
    """timm's network with the same values."""
    with tempfile.TemporaryDirectory() as folder:
        flax, timm = Path(folder) / "flax.safetensors", Path(folder) / "timm.safetensors"
        dpn_jax.save(model, flax)
        convert(flax, timm)
        theirs = create_timm_model(model.config)
        theirs.load_state_dict(safetensors.torch.load_file(timm))
    return theirs


def tensor(batch: Batch, transform: Transform) -> torch.Tensor:
    """Normalized `[B, C, H, W]`."""
    return torch.from_numpy(transform.normalize(batch["image"])).permute(0, 3, 1, 2)


def accuracy(model: torch.nn.Module, stream: "dpn_jax.finetune.BatchIterator", transform: Transform) -> float:
    """The fraction of the images that the model gets right."""
    model.eval()
    correct, count = 0.0, 0.0
    with torch.inference_mode():
        for batch in stream:
            right = model(tensor(batch, transform)).argmax(-1).numpy() == batch["label"]
            correct, count = correct + (right * batch["weight"]).sum(), count + batch["weight"].sum()
    return float(correct / count)


if __name__ == "__main__":
    tyro.cli(main)
