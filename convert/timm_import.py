"""Imports timm where torchvision is installed but cannot load its compiled half."""

import sys
from types import ModuleType

_KEEP_ALIVE: list[object] = []


def import_timm() -> ModuleType:
    """Imports and returns `timm`, declaring torchvision's missing operators first where that is what stops it.

    torchvision registers shape functions for its compiled operators when it is imported; where the compiled half cannot be
    loaded (a CUDA build on a machine without CUDA) that fails with `operator torchvision::nms does not exist`, although timm
    needs none of them. Where torchvision imports, this only imports timm.

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
        _KEEP_ALIVE.append(library)  # the operators vanish with the library object
    import timm

    return timm
