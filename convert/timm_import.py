"""Imports timm, and creates its model of one of our architectures."""

import sys
from typing import TYPE_CHECKING

from dpn_jax.config import DPNConfig, variant_of

if TYPE_CHECKING:
    from types import ModuleType

    import torch

_KEEP_ALIVE: list[object] = []


def import_timm() -> "ModuleType":
    """Imports and returns `timm`, after declaring torchvision's missing operators if they keep it from importing.

    On import torchvision registers shape functions for its compiled operators. If the compiled library cannot be loaded
    (a CUDA build on a machine without CUDA), this fails with `operator torchvision::nms does not exist`, although timm
    needs none of these operators. If torchvision imports, this only imports timm.

    Returns:
      The module `timm`.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        import torch

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEEP_ALIVE.append(library)  # the operators are removed when the library object is
    import timm

    return timm


def create_timm_model(config: DPNConfig) -> "torch.nn.Module":
    """Creates timm's model of an architecture, randomly initialized, in eval mode.

    Args:
      config: that of a variant, with any head and input, or a custom one that timm's `DPN` can express.

    Returns:
      The `timm.models.dpn.DPN`.

    Raises:
      ValueError: timm's `DPN` cannot express it.
    """
    timm = import_timm()
    if config.output_stride != 32:
        raise ValueError(f"timm's DPN has an output stride of 32 only, got output_stride={config.output_stride}")
    head = {"num_classes": config.num_classes, "in_chans": config.in_channels, "global_pool": config.global_pool}
    variant = variant_of(config)
    if variant and timm.is_model(variant):
        return timm.create_model(variant, **head).eval()
    small = config.residual_width == 64
    if len(config.depths) > 4 or config.stem_kernel != (3 if small else 7) or config.residual_width not in (64, 256):
        raise ValueError(
            "timm's DPN has at most 4 stages, and either 64 residual channels and a 3x3 stem or 256 and a 7x7; "
            f"got {config}"
        )
    return timm.models.dpn.DPN(
        k_sec=config.depths,
        inc_sec=config.dense_increments,
        k_r=config.bottleneck_width,
        groups=config.groups,
        small=small,
        num_init_features=config.stem_features,
        b=config.split_expand,
        act_layer=config.outer_activation,
        **head,
    ).eval()
