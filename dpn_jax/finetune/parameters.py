"""Which parameters are trained, which decay, and how far they are from the classifier, by their paths."""

from typing import TypeVar

import jax
from flax import nnx
from jax.tree_util import KeyPath

from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.model import DPN

Path = tuple[str | int, ...]
"""The path of a parameter, such as `("stages", 0, 2, "reduce", "conv", "kernel")`."""

Tree = TypeVar("Tree")


def trainable(config: FinetuneConfig, params: Tree) -> Tree:
    """Which parameters are trained, that is, not frozen by `config.freeze`.

    Args:
      config: the options.
      params: `nnx.state(model, nnx.Param)`, any tree with the same paths, or a part of it.

    Returns:
      A tree of booleans of the same structure.
    """
    return jax.tree.map_with_path(lambda path, _: _is_trainable(config.freeze, path_of(path)), params)


def decayed(params: Tree) -> Tree:
    """Which parameters have weight decay: kernels, not norms or biases. Arguments as for `trainable`."""
    return jax.tree.map_with_path(lambda path, _: path_of(path)[-1] == "kernel", params)


def frozen_norms(config: FinetuneConfig, model: DPN) -> tuple[str, ...]:
    """The norms that use their running statistics in training and do not update them.

    All of them for `norms="frozen"`; otherwise those whose parameters `freeze` does not train. A norm is any module
    with statistics (`nnx.BatchStat`) of its own.

    Args:
      config: its `freeze` and `norms`.
      model: the model, stock or changed.

    Raises:
      ValueError: `config.freeze` does not fit the model, or a norm that must be frozen has no `use_running_average`,
        or is found by no name where the name decides what is trained.

    Example:
      >>> from dpn_jax import create_model
      >>> model = create_model("dpn68", num_classes=10, depths=(1,), dense_increments=(8,))
      >>> frozen_norms(FinetuneConfig(freeze="stage1"), model)[:3]
      ('stem.norm', 'stages.0.0.shortcut.norm', 'stages.0.0.reduce.norm')
    """
    check_freeze(config, model)
    norms = {path: module for path, module in nnx.iter_modules(model) if _is_norm(module)}
    for path in norms:
        if config.freeze == "weights" and not _is_trainable(config.freeze, (*path, "scale")):
            raise ValueError(
                f"freeze='weights' finds norms by the name 'norm'; give it to {_dotted(path)}, in its block"
            )
    paths = sorted(norms, key=_order)
    frozen = [p for p in paths if config.norms == "frozen" or not _is_trainable(config.freeze, (*p, "scale"))]
    for path in frozen:
        if not hasattr(norms[path], "use_running_average"):
            name = type(norms[path]).__name__
            raise ValueError(f"{_dotted(path)}, a {name}, cannot be frozen: it has no use_running_average to set")
    return tuple(map(_dotted, frozen))


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _is_norm(module: nnx.Module) -> bool:
    return any(isinstance(value, nnx.BatchStat) for value in vars(module).values())


def training_mode(model: DPN, config: FinetuneConfig) -> tuple[nnx.GraphDef[DPN], nnx.State, nnx.State]:
    """Splits a copy of a model in training mode, with the dropout of `config`; frozen norms stay in eval mode.

    Raises:
      ValueError: as `frozen_norms`, or it has variables of other types than parameters and statistics.
    """
    frozen = frozen_norms(config, model)
    model = nnx.clone(model)
    model.config = model.config.replace(drop_rate=config.drop_rate)
    model.dropout = nnx.Dropout(config.drop_rate)  # each step sets its random key
    model.train()
    for path, module in nnx.iter_modules(model):
        if _dotted(path) in frozen:
            module.use_running_average = True
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Not((nnx.Param, nnx.BatchStat)))):
        kinds = "parameters (nnx.Param) and norm statistics (nnx.BatchStat)"
        raise ValueError(f"training moves {kinds} only, but {_dotted(path)} is a {type(variable).__name__}")
    graphdef, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, nnx.as_pure(params), nnx.as_pure(statistics)


def check_freeze(config: FinetuneConfig, model: DPN) -> None:
    """Checks that `config.freeze` names stages that the model has and leaves something to train.

    Raises:
      ValueError: it does not; the message names the value and what is possible.
    """
    stages = len(model.config.depths)
    if _stage(config.freeze) > stages:
        raise ValueError(f"freeze must be stage1 to stage{stages} for this model, got {config.freeze!r}")
    if not any(jax.tree.leaves(trainable(config, nnx.state(model, nnx.Param)))):
        raise ValueError(f"freeze={config.freeze!r} leaves nothing to train in a model without a classifier")


def layer_distance(path: Path, depths: tuple[int, ...]) -> int:
    """Number of blocks from the classifier (0) to a parameter.

    The last block and the final norm are at 1, as in timm; the stem is the farthest.

    Args:
      path: the path of the parameter.
      depths: blocks in each stage.

    Source: `timm.optim.param_groups_layer_decay` with `timm.models.dpn.DPN.group_matcher`.

    Example:
      >>> layer_distance(("stages", 1, 0, "reduce", "conv", "kernel"), (2, 3))
      3
    """
    match path:
        case ("classifier", *_):
            return 0
        case ("stages", int(stage), int(block), *_):
            return sum(depths[stage:]) - block
        case ("stem", *_):
            return sum(depths) + 1
    return 1


def path_of(path: KeyPath) -> Path:
    """A path of `jax.tree_util` as plain names and numbers, with or without NNX variables as leaves."""
    keys = tuple(getattr(entry, "key", None) for entry in path)
    return keys[:-1] if keys[-1] is None else keys  # the value of an NNX variable is an attribute, which has no key


def _is_trainable(freeze: str, path: Path) -> bool:
    part = path[0]
    match freeze:
        case "none":
            return True
        case "backbone":
            return part == "classifier"
        case "weights":
            return part == "classifier" or "norm" in path
    return part not in ("stem", "stages") or (part == "stages" and path[1] >= _stage(freeze))


def _stage(freeze: str) -> int:
    """Number of frozen stages, from the first."""
    return int(freeze.removeprefix("stage")) if freeze.startswith("stage") else 0


def _order(path: Path) -> tuple[int, ...]:
    """Sort key: the order of the modules in the network."""
    names = ("stem", "stages", "norm", "shortcut", "reduce", "grouped", "expand")
    return tuple(names.index(key) if key in names else len(names) if isinstance(key, str) else key for key in path)
