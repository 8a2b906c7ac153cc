"""Whether a model is *stock*: its modules are exactly this package's, as `DPN(config)` builds them.

What assumes the stock structure (the fast forms, conversion to timm) asks here first, so that a changed model is
refused in one line and never silently wrong.
"""

import functools
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax import nnx

from dpn_jax.config import DPNConfig
from dpn_jax.model import DPN

_MODE = {"use_running_average", "deterministic"}  # what `train`, `eval` and `nnx.view` switch
_OF_ONE_MODEL = {"config", "provenance", "dtype", "param_dtype", "remat", "dropout"}


def changes(model: nnx.Module) -> dict[str, str]:
    """What of a model is not as `DPN(model.config)` builds it.

    Types are compared exactly, then names and shapes of variables, then every other attribute, such as an activation or
    an epsilon. Modes (`train`, `eval`), dtypes and dropout make no difference.

    Args:
      model: any module.

    Returns:
      In words, by the module's dotted path ('' is the model itself), in the model's order; empty for a stock model.

    Example:
      >>> import dpn_jax
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3)
      >>> changes(model)
      {}
      >>> model.norm.activation = "silu"
      >>> changes(model)
      {'norm': "activation is 'silu', not 'relu'"}
    """
    if type(model) is not DPN:
        return {"": f"is a {type(model).__name__}, not a DPN"}
    expected, found = dict(_stock(model.config)), dict(_described(model))
    differences = {}
    for path, (kind, attributes) in found.items():
        if path not in expected:
            if not _within(path, differences):
                differences[path] = f"is a {kind.__name__}, which no stock DPN has"
        elif kind is not expected[path][0]:
            differences[path] = f"is a {kind.__name__}, not a {expected[path][0].__name__}"
        elif difference := _difference(attributes, expected[path][1]):
            differences[path] = difference
    for path in expected:
        if path not in found and not _within(path, differences):
            differences[path] = "is missing"
    return differences


def require_stock(model: nnx.Module, action: str, instead: str) -> None:
    """Refuses a changed model.

    Args:
      model: any module.
      action: what cannot be done, such as 'fast_forward'.
      instead: the way out.

    Raises:
      ValueError: the model is not stock; one line that names the first changed module and `instead`.
    """
    if differences := changes(model):
        path, difference = next(iter(differences.items()))
        more = f" (and {len(differences) - 1} more changes)" if len(differences) > 1 else ""
        raise ValueError(f"{action} needs a stock DPN, but {path or 'the model'} {difference}{more}; {instead}")


@functools.lru_cache(maxsize=8)
def _stock(config: DPNConfig) -> list[tuple[str, tuple[type, dict[str, Any]]]]:
    return _described(DPN(config, rngs=None))


def _described(model: DPN) -> list[tuple[str, tuple[type, dict[str, Any]]]]:
    """Each module's path, type and attributes, parents first; of variables their type and shape."""
    described = []
    for path, module in nnx.iter_modules(model):
        if path and path[0] == "dropout":
            continue
        if isinstance(module, nnx.List):
            attributes = {"length": len(module)}
        else:
            names = (name for name in vars(module) if not name.startswith("_pytree"))
            attributes = {name: _described_value(getattr(module, name)) for name in names}
        if not path:
            attributes = {name: value for name, value in attributes.items() if name not in _OF_ONE_MODEL}
        described.append((".".join(map(str, path)), (type(module), attributes)))
    return sorted(described, key=lambda item: item[0].count(".") + bool(item[0]))


def _described_value(value: object) -> object:
    if isinstance(value, nnx.Variable):
        return type(value), tuple(value.shape)
    if isinstance(value, nnx.Module):
        return "a module"
    return value


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    for name in sorted((found.keys() | expected.keys()) - _MODE - {"dtype"}):
        if name not in expected:
            return f"has an attribute {name!r} that a stock one lacks"
        if name not in found:
            return f"lacks the attribute {name!r}"
        if found[name] is not expected[name] and not _equal(found[name], expected[name]):
            return f"{name} is {_worded(found[name])}, not {_worded(expected[name])}"
    return None


def _equal(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) or hasattr(one, "__jax_array__"):
        return False
    return type(one) is type(other) and bool(one == other)


def _worded(value: object) -> str:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], type):
        return f"a {value[0].__name__} {list(value[1])}"
    return getattr(value, "__qualname__", None) or " ".join(re.sub(r" at 0x\w+", "", repr(value)).split())[:60]


def _within(path: str, others: Iterable[str]) -> bool:
    """Whether a module is inside one of the others."""
    return any(path.startswith(f"{other}.") for other in others)
