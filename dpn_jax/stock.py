"""Whether a model is *stock*: its modules are exactly this package's, as `DPN(config)` builds them.

What assumes the stock structure (the fast forms, conversion to timm) asks here first, so that a changed model is
refused in one line and never silently wrong. What is patched in a class itself, for all models, cannot be seen here.
"""

import functools
import re
import types
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from dpn_jax.config import DPNConfig
from dpn_jax.model import DPN

_MODE = {"use_running_average", "deterministic"}  # what `train`, `eval` and `nnx.view` switch
_IGNORED_AT_ROOT = {"config", "provenance", "dtype", "param_dtype", "remat"}


def changes(model: nnx.Module) -> dict[str, str]:
    """How a model differs from what `DPN(model.config)` builds.

    Types are compared exactly, then variables (their type and shape, none in two places), then every other attribute,
    such as an activation or an epsilon. Modes (`train`, `eval`) and the model's own dtypes are ignored, and so is
    everything about dropout but that it is Flax's.

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
    if not isinstance(model, DPN):
        return {"": f"is a {type(model).__name__}, not a DPN"}
    expected, found = _stock(model.config, model.dtype, model.param_dtype, model.remat), _described(model)
    differences = {}
    for path, (kind, attributes) in found.items():
        if path not in expected:
            if not _is_inside(path, differences):
                differences[path] = f"is a {kind.__name__}, which no stock DPN has"
        elif kind is not expected[path][0]:
            differences[path] = f"is a {kind.__name__}, not a {expected[path][0].__name__}"
        elif difference := _difference(attributes, expected[path][1]):
            differences[path] = difference
    for path in expected:
        if path not in found and not _is_inside(path, differences):
            differences[path] = "is missing"
    return differences or _tied(model)


def require_stock(model: nnx.Module, action: str, instead: str) -> None:
    """Refuses a changed model.

    Args:
      model: any module.
      action: what cannot be done, such as 'fast_forward'.
      instead: what to do.

    Raises:
      ValueError: the model is not stock; one line that names the first changed module and `instead`.
    """
    if differences := changes(model):
        path, difference = next(iter(differences.items()))
        more = f" (and {len(differences) - 1} more changes)" if len(differences) > 1 else ""
        raise ValueError(f"{action} needs a stock DPN, but {path or 'the model'} {difference}{more}; {instead}")


def refuse_bound_methods(model: nnx.Module) -> None:
    """Refuses methods that were set on an instance: Flax's copies of it would call the original.

    Raises:
      ValueError: one line that names the module and the method.
    """
    for path, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if isinstance(value, types.MethodType):
                where = ".".join(map(str, path)) or "the model"
                raise ValueError(
                    f"{where} has a method {name!r} that was set on it and would not be copied; subclass it"
                )


def refuse_unknown_features(model: nnx.Module) -> None:
    """Refuses a model whose logits come from another `__call__` than its features: they would be its parent's.

    Raises:
      ValueError: its class overrides `__call__`, and neither `forward_features` nor `forward_head` with it.
    """
    names = ("__call__", "forward_features", "forward_head")
    call, *parts = (next(kind for kind in type(model).__mro__ if name in vars(kind)) for name in names)
    if not any(issubclass(part, call) for part in parts):
        raise ValueError(
            f"{call.__name__} overrides __call__, which does not tell its features; override forward_features"
            " or forward_head instead"
        )


def split_in_eval_mode(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State]:
    """A model as a pure function has it: its structure, in eval mode and hashable, and its arrays, the same ones.

    Raises:
      ValueError: as `refuse_bound_methods`.

    Example:
      >>> import dpn_jax
      >>> structure, state = split_in_eval_mode(dpn_jax.create_model("dpn_tiny", num_classes=3))
      >>> nnx.merge(structure, state).norm.use_running_average
      True
    """
    refuse_bound_methods(model)
    model = nnx.merge(*nnx.split(model))  # another object, whose mode is its own
    model.eval()
    return nnx.split(model)


@functools.lru_cache(maxsize=8)
def abstract_model(config: DPNConfig, dtype: np.dtype, param_dtype: np.dtype, remat: bool) -> DPN:
    """The stock model in eval mode, without values, built once: for a DPN-92 that takes a third of loading it.

    Everybody gets the same object: do not change it.
    """
    with jax.ensure_compile_time_eval():  # it may be asked for first while a step is traced, which it outlives
        model = DPN(config, dtype=dtype, param_dtype=param_dtype, remat=remat, rngs=None)
    model.eval()
    return model


@functools.lru_cache(maxsize=8)
def _stock(
    config: DPNConfig, dtype: np.dtype, param_dtype: np.dtype, remat: bool
) -> dict[str, tuple[type, dict[str, Any]]]:
    return _described(abstract_model(config, dtype, param_dtype, remat))


def _described(model: DPN) -> dict[str, tuple[type, dict[str, Any]]]:
    """Each module's path, type and attributes, parents first; of variables their type and shape."""
    described = []
    for path, module in nnx.iter_modules(model):
        if path[:1] == ("dropout",):
            attributes = {}
        elif isinstance(module, nnx.List):
            attributes = {"length": len(module)}
        else:
            names = {name for name in vars(module) if not name.startswith("_pytree")} - _MODE
            names -= set() if path else _IGNORED_AT_ROOT
            attributes = {name: _described_value(getattr(module, name)) for name in names}
            if "dtype" in attributes:
                attributes["dtype"] = "the model's" if attributes["dtype"] == model.dtype else str(attributes["dtype"])
        if len(path) < 2 or path[0] != "dropout":
            described.append((".".join(map(str, path)), (type(module), attributes)))
    return dict(sorted(described, key=lambda item: item[0].count(".") + bool(item[0])))


def _described_value(value: object) -> object:
    if isinstance(value, nnx.Variable):
        return type(value), tuple(value.shape), *sorted(name for name in value.get_metadata() if name.startswith("on_"))
    return "a module" if isinstance(value, nnx.Module) else value


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """All differences of two modules of one type."""
    differences = []
    for name in sorted(found.keys() | expected.keys()):
        if name not in expected:
            differences.append(f"has an attribute {name!r} that a stock one lacks")
        elif name not in found:
            differences.append(f"lacks the attribute {name!r}")
        elif found[name] is not expected[name] and not _equal(found[name], expected[name]):
            differences.append(f"{name} is {_worded(found[name])}, not {_worded(expected[name])}")
    return "; ".join(differences)


def _tied(model: DPN) -> dict[str, str]:
    """Variables that are in two places: what rearranges parameters would do it twice."""
    places: dict[int, str] = {}
    found = {}
    for path, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            place = ".".join(map(str, (*path, name)))
            if isinstance(value, nnx.Variable) and (first := places.setdefault(id(value), place)) != place:
                found[".".join(map(str, path))] = f"{name} is the variable of {first}, not its own"
    return found


def _equal(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) or hasattr(one, "__jax_array__"):
        return False
    return type(one) is type(other) and bool(one == other)


def _worded(value: object) -> str:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], type):
        return f"a {value[0].__name__} {list(value[1])}"
    return getattr(value, "__qualname__", None) or " ".join(re.sub(r" at 0x\w+", "", repr(value)).split())[:60]


def _is_inside(path: str, others: Iterable[str]) -> bool:
    """Whether a module is inside one of the others."""
    return any(path.startswith(f"{other}.") for other in others)
