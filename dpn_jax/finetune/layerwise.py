"""Gradient norms and learning rates of each layer: the stem, each block, the last norm, the classifier."""

import jax
import optax

from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.finetune.parameters import Path, layer_distance, path_of, trainable


def layer_rates(config: FinetuneConfig, params: optax.Params, depths: tuple[int, ...]) -> dict[str, float]:
    """The factor on the learning rate of each layer, by `layer_decay`; 0 where nothing is trained.

    Args:
      config: `layer_decay` and `freeze` are used.
      params: `nnx.state(model, nnx.Param)`, or any tree with the same paths.
      depths: blocks in each stage.

    Returns:
      By the layer's name, in the order of the network.

    Example:
      >>> import dpn_jax
      >>> from flax import nnx
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3, depths=(1, 1), dense_increments=(4, 8))
      >>> layer_rates(FinetuneConfig(layer_decay=0.5), nnx.state(model, nnx.Param), model.config.depths)
      {'stem': 0.125, 'stages.0.0': 0.25, 'stages.1.0': 0.5, 'norm': 0.5, 'classifier': 1.0}
    """
    rates: dict[str, float] = {}
    trained = {path_of(path): flag for path, flag in jax.tree.leaves_with_path(trainable(config, params))}
    for path in sorted(trained, key=_order):
        rate = config.layer_decay ** layer_distance(path, depths) if trained[path] else 0.0
        rates[_layer(path)] = max(rates.get(_layer(path), 0.0), rate)
    return rates


def layer_norms(gradients: optax.Updates) -> dict[str, jax.Array]:
    """The norm of the gradient of each layer, by its name."""
    layers: dict[str, list[jax.Array]] = {}
    for path, gradient in jax.tree.leaves_with_path(gradients):
        layers.setdefault(_layer(path_of(path)), []).append(gradient)
    return {name: optax.tree.norm(found) for name, found in layers.items()}


def _layer(path: Path) -> str:
    """The layer of a parameter: a block is one, whatever is in it."""
    return ".".join(map(str, path[:3] if path[0] == "stages" else path[:1]))


def _order(path: Path) -> tuple[int, ...]:
    """Sort key: the order of the layers in the network; a changed model's own come last."""
    match path:
        case ("stages", int(stage), int(block), *_):
            return 1, stage, block
    names = ("stem", "stages", "norm", "classifier")
    return (names.index(path[0]) if path[0] in names else len(names),)
