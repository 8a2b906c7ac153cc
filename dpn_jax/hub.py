"""Finds a model's files: on the Hugging Face hub, through its own client and cache, or in a folder laid out like one.

Nothing is imported or contacted before a file is asked for; `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HOME` and the rest of
the client's environment variables work as everywhere.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from dpn_jax.config import PRETRAINED, VARIANTS, Preprocessing, unknown_name_message
from dpn_jax.weights import CheckpointError

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")  # timm's order of preference
_PREFIXES = ("hf-hub:", "hf_hub:")


class Located(NamedTuple):
    """A checkpoint's file and what is known about it."""

    weights: Path
    """The file to read: safetensors, the index of a sharded one, or PyTorch's."""
    source: str
    """The tag, hub id with its commit, or file name: what a reader of a saved model wants to know."""
    variant: str | None = None
    """The architecture's name, where the source tells it."""
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    sha256: str | None = None
    """What the file's SHA-256 must be, where the hub tells it."""


def locate(source: str | Path, *, revision: str | None = None) -> Located:
    """Turns what a user names into a file on this machine, downloading it where needed.

    Args:
      source: a pretrained tag ('dpn92.mx_in1k'), a hub id ('timm/dpn92.mx_in1k', 'hf-hub:julien-c/timm-dpn92'), a file, or a
        folder with `config.json` and the weights.
      revision: branch, tag or commit on the hub.

    Raises:
      CheckpointError: there is no such file, or the hub or the network does not give it.
      ValueError: the name is neither a file nor a tag nor a hub id; the nearest tags are suggested.
    """
    name = str(source)
    path = Path(source)
    is_hub_id = name.startswith(_PREFIXES)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if isinstance(source, Path) or (not is_hub_id and (path.exists() or _looks_like_file(name))):
        return _local_folder(path) if path.is_dir() else Located(path, source=path.name)
    if name in PRETRAINED:
        name = f"timm/{name}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(unknown_name_message(str(source), [*PRETRAINED, *VARIANTS]))
    return _download(name, revision)


def _looks_like_file(name: str) -> bool:
    return name.endswith((".safetensors", ".json", ".pth", ".pt", ".bin", ".tar")) or name.startswith(
        ("/", "./", "../")
    )


def _local_folder(folder: Path) -> Located:
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder}: no {', '.join(_WEIGHTS)} in this folder")
    config = folder / "config.json"
    described = _read_config(config) if config.is_file() else {}
    return Located(weights, source=folder.name, **described)


def _download(repository: str, revision: str | None) -> Located:
    import huggingface_hub  # slow to import, and not needed for local files
    from huggingface_hub import errors

    def fetch(filename: str, *, cached: bool = False) -> Path:
        return Path(huggingface_hub.hf_hub_download(repository, filename, revision=revision, local_files_only=cached))

    def fetch_weights() -> Path:
        first_error = None
        for filename in _WEIGHTS:
            try:
                # once the hub did not answer, only the cache is asked for the other names
                return fetch(filename, cached=isinstance(first_error, errors.LocalEntryNotFoundError))
            except errors.EntryNotFoundError as error:
                first_error = first_error or error
        if isinstance(first_error, errors.LocalEntryNotFoundError):
            raise first_error
        raise CheckpointError(f"{repository}: has none of {', '.join(_WEIGHTS)} on the hub")

    try:
        weights = fetch_weights()
        if weights.name.endswith(".index.json"):
            for shard in sorted(set(json.loads(weights.read_bytes())["weight_map"].values())):
                fetch(shard)
        tag = PRETRAINED.get(repository.removeprefix("timm/"))
        described = (
            {"variant": tag.variant, "preprocessing": tag.preprocessing} if tag else _read_config(fetch("config.json"))
        )
    except CheckpointError:
        raise
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: not in the local cache and the hub cannot be reached; "
            "download its weights where there is a network and pass the file with --weights"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repository}: no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{repository}: no such repository on the hub, or a private one") from error
    except Exception as error:  # whatever the client or the HTTP library below it (three so far) lets through
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{repository}: the download failed: {reason[:200]}") from error
    commit = weights.parent.name  # .../snapshots/<commit>/<file> -> ../../blobs/<SHA-256 of a large file>
    blob = weights.resolve().name
    sha256 = blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None
    return Located(weights, source=f"{repository}@{commit}", sha256=sha256, **described)


def _read_config(path: Path) -> dict[str, object]:
    """What timm's `config.json` tells; old ones have the fields of `pretrained_cfg` at the top."""
    try:
        config = json.loads(path.read_bytes())
        fields = config.get("pretrained_cfg", config)
        labels = config.get("label_names") or config.get("labels") or fields.get("label_names")
        fraction = fields.get("crop_pct")
        return {
            "variant": config.get("architecture"),
            "preprocessing": Preprocessing(
                image_size=fields["input_size"][-1],
                crop_fraction=0.875 if fraction is None else fraction,
                interpolation=fields["interpolation"],
                mean=tuple(fields["mean"]),
                std=tuple(fields["std"]),
            ),
            "class_names": tuple(str(label) for label in labels) if labels else None,
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not the config.json of a timm model ({type(error).__name__}: {error})"
        ) from error
