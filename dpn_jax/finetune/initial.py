"""The model that a run starts from."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from dpn_jax.checkpoint.load import from_pretrained
from dpn_jax.config import VARIANTS, DPNConfig, variant_of
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.model import DPN, create_model
from dpn_jax.pretrained import PRETRAINED, Provenance, default_preprocessing


def initial_model(
    source: str | Path | DPNConfig,
    config: FinetuneConfig,
    class_names: tuple[str, ...],
    *,
    model: str | None = None,
    revision: str | None = None,
    note: Callable[[str], None],
) -> DPN:
    """A model for some classes, with trained weights or drawn ones.

    Args:
      source: whose weights to take, as for `from_pretrained`; or a variant ('dpn68b') or an architecture, whose
        weights are drawn from `config.seed`.
      config: the choices; `dtype`, `remat`, `seed` and `image_size` are read.
      class_names: the classes. Weights of exactly these keep their classifier, others get a fresh one.
      model, revision: as for `from_pretrained`.
      note: told what was done.

    Returns:
      The model; its provenance has the class names and how images are prepared.

    Raises:
      CheckpointError, ValueError: as `from_pretrained`.
    """
    options = {"dtype": jnp.dtype(config.dtype), "remat": config.remat}
    rngs = nnx.Rngs(config.seed)
    if isinstance(source, DPNConfig) or (isinstance(source, str) and source in VARIANTS):
        built = create_model(source, num_classes=len(class_names), rngs=rngs, **options)
        name = source if isinstance(source, str) else variant_of(source) or "a DPN"
        note(f"{name} starts from random weights, drawn from seed {config.seed}")
    else:
        built = from_pretrained(source, model=model, revision=revision, rngs=rngs, **options)
        name = built.provenance.source or Path(source).name
        if built.config.num_classes == len(class_names) and built.provenance.class_names == class_names:
            note(f"{name} knows these {len(class_names)} classes: its classifier is kept")
        else:
            built.reset_classifier(len(class_names), rngs=rngs)
            note(f"{name} gets a new classifier for {len(class_names)} classes")
    tag = PRETRAINED.get((model or "").removeprefix("timm/"))
    preprocessing = tag.preprocessing if tag else built.provenance.preprocessing or default_preprocessing(built.config)
    if config.image_size is not None:
        preprocessing = dataclasses.replace(preprocessing, image_size=config.image_size)
    # neither hash nor file: the weights that will be saved are others
    built.provenance = Provenance(source=name, preprocessing=preprocessing, class_names=class_names)
    return built
