"""timm's side of the comparisons: its models with random norms, their files, and a second opinion on our names.

Needs torch and timm: a test module that imports it starts with `pytest.importorskip("tests.support.timm_models")`.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import safetensors.torch
import torch
from flax import nnx

import dpn_jax
from convert.timm_import import import_timm
from dpn_jax import DPN
from tests.support.models import TINY, values

timm = import_timm()

VARIANTS = tuple(name for name in dpn_jax.list_models() if timm.is_model(name))

_RENAMED = (  # a few substitutions here, a table of every tensor in checkpoint.names: they do not share mistakes
    (r"^features\.conv1_1\.", "stem."),
    (r"^features\.conv5_bn_ac\.bn\.", "norm."),
    (r"^features\.conv(\d+)_(\d+)\.", lambda found: f"stages.{int(found[1]) - 2}.{int(found[2]) - 1}."),
    (r"c1x1_w_s[12]\.", "shortcut."),
    (r"c1x1_a\.", "reduce."),
    (r"c3x3_b\.", "grouped."),
    (r"c1x1_c\.", "expand."),
    (r"c1x1_c1\.", "expand.residual."),
    (r"c1x1_c2\.", "expand.dense."),
    (r"\bbn\.", "norm."),
    (r"running_", ""),
    (r"num_batches_tracked$", "steps"),
)


def timm_dpn(timm: ModuleType, *, split: bool = False, seed: int = 0, **options: object) -> torch.nn.Module:
    """timm's DPN of the sizes of `TINY`, randomized; in eval mode."""
    sizes = {
        "k_sec": TINY.depths,
        "inc_sec": TINY.dense_increments,
        "k_r": TINY.bottleneck_width,
        "groups": TINY.groups,
        "num_init_features": TINY.stem_features,
        "num_classes": TINY.num_classes,
    }
    torch.manual_seed(seed)
    return randomize(timm.models.dpn.DPN(small=True, b=split, **sizes | options))


def randomized(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **options: object) -> torch.nn.Module:
    """timm's model of a variant, randomized; in eval mode."""
    torch.manual_seed(seed)
    return randomize(timm.create_model(name, **options).to(dtype))


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every norm random statistics and affine parameters, and a counter: fresh ones hide swapped tensors."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for number, norm in enumerate(norms, start=1):
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_(0, 0.2)
        norm.running_mean.normal_(0, 0.5)
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked.fill_(number)
    return model.eval()


def save_timm(model: torch.nn.Module, path: Path) -> Path:
    """Writes weights as timm publishes them."""
    safetensors.torch.save_file(model.state_dict(), path, metadata={"format": "pt"})
    return path


def flax_name(name: str, ndim: int) -> str:
    """Our name for timm's tensor."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"weight$", "kernel" if ndim == 4 else "scale", name)


def to_flax(state: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """timm's tensors under our names, in our layout."""
    return {
        flax_name(name, tensor.ndim): (tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor).numpy()
        for name, tensor in state.items()
    }


def assert_weights(model: DPN, state: Mapping[str, torch.Tensor]) -> None:
    """Every tensor of the model is timm's, to the bit."""
    ours, theirs = values(model), to_flax(state)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@functools.cache
def images(channels: int = 3) -> np.ndarray:
    """Two small images `[B, H, W, C]`."""
    return random_images((2, 48, 48, channels)).astype(np.float32)


def assert_logits(model: DPN, reference: torch.nn.Module, channels: int = 3) -> None:
    """Both compute the same, but for rounding."""
    with torch.inference_mode():
        theirs = reference(nchw(images(channels), torch.float32))
    ours = nnx.jit(lambda model, x: model(x))(model, images(channels))
    assert relative_error(ours, theirs) <= 1e-5


def random_images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
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
