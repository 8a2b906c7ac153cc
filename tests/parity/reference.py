"""timm's side of the comparisons."""

from pathlib import Path

import numpy as np
import safetensors.torch
import torch

import dpn_jax
from convert.timm_import import import_timm

timm = import_timm()

VARIANTS = tuple(name for name in dpn_jax.list_models() if timm.is_model(name))


def randomized(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **options: object) -> torch.nn.Module:
    """A timm model in eval mode whose norms have random statistics and affine parameters.

    Fresh norms are all (1, 0, 0, 1): they would hide swapped tensors.
    """
    torch.manual_seed(seed)
    model = timm.create_model(name, **options).to(dtype).eval()
    randomize_norms(model)
    return model


def randomize_norms(model: torch.nn.Module) -> None:
    """Fills every norm with random statistics and affine parameters."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)


def write(model: torch.nn.Module, path: Path) -> Path:
    """Saves a timm model's tensors as timm publishes them."""
    safetensors.torch.save_file(model.state_dict(), path, metadata={"format": "pt"})
    return path


def images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random float64 images `[B, H, W, C]`."""
    return np.random.default_rng(seed).normal(size=shape)


def nchw(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """`[B, H, W, C]` for torch."""
    return torch.from_numpy(array).permute(0, 3, 1, 2).to(dtype)


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    """Back from torch."""
    return (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).detach().numpy()


def relative_error(ours: object, theirs: object) -> float:
    """The norm of the difference, divided by the norm of timm's."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{ours.shape} is not {theirs.shape}"
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
