"""Small timm models, their files, and a second opinion on what each of their tensors is called in Flax."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import safetensors.torch
import torch
from flax import nnx

from dpn_jax import DPN, DPNConfig

TINY = DPNConfig(
    depths=(1, 1, 1),
    dense_increments=(4, 4, 4),
    bottleneck_width=8,
    groups=4,
    residual_width=64,
    stem_features=8,
    stem_kernel=3,
    num_classes=5,
)

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
    """timm's DPN of the sizes of `TINY`, with random weights, statistics and counters; in eval mode."""
    sizes = {"k_sec": (1, 1, 1), "inc_sec": (4, 4, 4), "k_r": 8, "groups": 4, "num_init_features": 8, "num_classes": 5}
    torch.manual_seed(seed)
    return randomize(timm.models.dpn.DPN(small=True, b=split, **sizes | options))


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every norm its own statistics: fresh ones are all 0 and 1 and hide swapped tensors."""
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(int(torch.randint(1, 1000, ())))
        elif tensor.ndim == 1:
            tensor.uniform_(-1, 1)
    return model.eval()


def save_timm(model: torch.nn.Module, path: Path) -> Path:
    """Writes weights as timm does."""
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


def values(model: DPN) -> dict[str, np.ndarray]:
    """Every parameter, statistic and counter of a model by name."""
    state = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in state}


def assert_weights(model: DPN, state: Mapping[str, torch.Tensor]) -> None:
    """Every tensor of the model is timm's, to the bit."""
    ours, theirs = values(model), to_flax(state)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@functools.cache
def images(channels: int = 3) -> np.ndarray:
    """Two small images `[B, H, W, C]`."""
    return np.random.default_rng(0).standard_normal((2, 48, 48, channels), np.float32)


def assert_logits(model: DPN, reference: torch.nn.Module, channels: int = 3) -> None:
    """Both compute the same, but for rounding."""
    with torch.inference_mode():
        theirs = reference(torch.from_numpy(images(channels).transpose(0, 3, 1, 2).copy())).numpy()
    ours = np.asarray(nnx.jit(lambda model, x: model(x))(model, images(channels)))
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
