"""A model as the Hugging Face hub and timm have it: `config.json`, `model.safetensors` and a model card."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from flax import nnx

from dpn_jax.checkpoint.card import CardFacts, model_card
from dpn_jax.checkpoint.hub import hub_id
from dpn_jax.checkpoint.save import convert, save
from dpn_jax.checkpoint.timm_config import FIELDS
from dpn_jax.checkpoint.write import write_atomically
from dpn_jax.config import OWN_VARIANTS, VARIANTS, DPNConfig, variant_of
from dpn_jax.errors import CheckpointError, shown
from dpn_jax.model import DPN
from dpn_jax.paths import local_path
from dpn_jax.pretrained import Preprocessing, Provenance, default_preprocessing
from dpn_jax.stock import require_stock

_WEIGHTS, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"
_STEMS = {(3, 64): True, (7, 256): False}
"""timm's `small`, by the stem's kernel and the residual width."""


def save_pretrained(
    model: DPN, folder: str | os.PathLike, *, facts: CardFacts | None = None, overwrite: bool = False
) -> Path:
    """Writes a model so that timm and this package both read the folder.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` and `dpn_jax.from_pretrained(FOLDER)` give the same logits,
    class names and preprocessing. A `README.md` that is there stays as it is. Of where the weights come from, only what
    is on the hub is written: no path of this machine.

    Args:
      model: a stock `DPN` whose architecture timm's `DPN` can express.
      folder: made if it is missing.
      facts: for the model card.
      overwrite: replace an existing `config.json` and `model.safetensors`.

    Returns:
      The folder.

    Raises:
      CheckpointError: files are there and `overwrite` is not set, or cannot be written.
      ValueError: timm cannot build the model; the message says why.

    Source: `timm.models._hub.save_for_hf`.
    """
    folder = local_path(folder, error=CheckpointError)
    name = folder.resolve().name
    require_stock(model, "timm's layout", "save it with dpn_jax.save")
    facts = facts or CardFacts()
    base = facts.base_model or hub_id(model.provenance.source)
    preprocessing = model.provenance.preprocessing or default_preprocessing(model.config)
    config = timm_config(model.config, preprocessing, model.provenance.class_names)
    there = [path for path in (folder / _CONFIG, folder / _WEIGHTS) if path.exists()]
    if there and not overwrite:
        raise CheckpointError(f"{shown(there[0])}: exists already; choose another folder, or overwrite=True (--force)")
    published = nnx.clone(model)
    source = model.provenance.source if hub_id(model.provenance.source) else None
    published.provenance = Provenance(source, None, preprocessing, model.provenance.class_names)
    labels = len(model.provenance.class_names or ())
    card = model_card(name, model.config, preprocessing, dataclasses.replace(facts, base_model=base), labels=labels)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            save(published, Path(scratch) / _WEIGHTS)
            convert(Path(scratch) / _WEIGHTS, folder / _WEIGHTS, to="timm", overwrite=overwrite)
        write_atomically(folder / _CONFIG, [json.dumps(config, indent=2).encode() + b"\n"])
        if not (folder / _CARD).exists():
            write_atomically(folder / _CARD, [card.encode("utf-8")])
    except OSError as error:
        raise CheckpointError(f"{shown(folder)}: cannot be written ({error.strerror or error})") from error
    return folder


def push_to_hub(
    model: DPN,
    repository: str,
    *,
    facts: CardFacts | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a model with dpn_jax",
    token: str | None = None,
) -> str:
    """Uploads what `save_pretrained` writes to the Hugging Face hub; the repository is created if it is missing.

    A `README.md` that the repository has stays as it is.

    Args:
      model, facts: as for `save_pretrained`.
      repository: 'you/your-dpn'.
      private: of a new repository; defaults to what your account or organization has set.
      revision: branch to upload to; defaults to the main one.
      create_pr: open a pull request instead.
      commit_message: its title.
      token: defaults to that of `hf auth login`.

    Returns:
      The address of the commit, or of the pull request.

    Raises:
      ValueError: as `save_pretrained`.
      huggingface_hub.errors.HfHubHTTPError: the hub refuses.

    Source: `timm.models._hub.push_to_hf_hub`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="dpn_jax")
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_pretrained(model, Path(scratch) / repository.rpartition("/")[2], facts=facts)
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if api.file_exists(repository, _CARD, revision=revision):
            (folder / _CARD).unlink()
        else:
            text = (folder / _CARD).read_text("utf-8").replace("REPOSITORY", repository)
            (folder / _CARD).write_text(text, "utf-8")
        info = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
    return info.pr_url or info.commit_url


def timm_config(
    config: DPNConfig, preprocessing: Preprocessing, class_names: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """timm's `config.json` of a model.

    An architecture that timm has no name for is one of its variants with other `model_args`.

    Args:
      config: the architecture.
      preprocessing: of its images.
      class_names: what the logits mean, where that is not ImageNet-1k.

    Raises:
      ValueError: timm's `DPN` cannot be built like this; the message names the field.

    Example:
      >>> timm_config(VARIANTS["dpn92"], Preprocessing())["architecture"]
      'dpn92'

    Source: `timm.models._hub.save_config_for_hf`.
    """
    small = _STEMS.get((config.stem_kernel, config.residual_width))
    if small is None:
        sizes = " or ".join(f"{kernel} and {width}" for kernel, width in _STEMS)
        got = f"{config.stem_kernel} and {config.residual_width}"
        raise ValueError(f"timm's DPN has stem_kernel and residual_width {sizes}, got {got}")
    for name, only in (("output_stride", 32), ("test_time_pool", 0)):
        if getattr(config, name) != only:
            raise ValueError(f"timm's DPN has no {name} {getattr(config, name)}; the same weights work with {only}")
    if len(config.depths) > 4:
        raise ValueError(f"timm's DPN has at most 4 stages, got {len(config.depths)}")
    variant = variant_of(config)
    known = variant is not None and variant not in OWN_VARIANTS
    args: dict[str, Any] = {}
    if not known:
        variant = "dpn68b" if config.split_expand else "dpn92"
        args = {"small": small}
    # whatever differs from the variant, which only a custom architecture does in its body
    base = VARIANTS[variant]
    args |= {
        name: getattr(config, ours) for name, ours in FIELDS.items() if getattr(config, ours) != getattr(base, ours)
    }
    if config.in_channels != 3:
        args["in_chans"] = config.in_channels
    size = preprocessing.height, preprocessing.width
    found = {
        "architecture": variant,
        "num_classes": config.num_classes,
        "num_features": config.num_features,
        "global_pool": config.global_pool,
        **({"model_args": args} if args else {}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [config.in_channels, *size],
            "fixed_input_size": False,
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.crop_fraction,
            "crop_mode": preprocessing.crop_mode,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": config.num_classes,
            "pool_size": [-(-side // 32) for side in size],
            "first_conv": "features.conv1_1.conv",
            "classifier": "classifier",
        },
    }
    return found | ({"label_names": list(class_names)} if class_names else {})
