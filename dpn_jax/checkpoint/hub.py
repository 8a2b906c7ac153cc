"""Finds a model's files: on the Hugging Face hub, through its own client and cache, or in a folder laid out like one.

Nothing is imported or contacted before a file is asked for; `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HOME` and the rest of
the client's environment variables work as everywhere.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from dpn_jax.config import POOLS, VARIANTS, unknown_name_message
from dpn_jax.errors import CheckpointError, reason
from dpn_jax.pretrained import PRETRAINED, Preprocessing

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # timm's order of preference
_PREFIXES = ("hf-hub:", "hf_hub:")


class Located(NamedTuple):
    """A checkpoint's file and what is known about it."""

    weights: Path
    """The file to read, safetensors or PyTorch's."""
    source: str
    """The tag, hub id with its commit, or file name: what a reader of a saved model wants to know."""
    variant: str | None = None
    """The architecture's name, where the source gives it."""
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    global_pool: str | None = None
    """The pool that the weights were trained with, where the source gives it."""


def locate(source: str | Path, *, revision: str | None = None) -> Located:
    """Finds the file that a user names, downloading it where needed.

    Args:
      source: a pretrained tag ('dpn92.mx_in1k'; 'dpn_tiny.digits' comes with this package), a hub id
        ('timm/dpn92.mx_in1k', 'hf-hub:julien-c/timm-dpn92'), a file,
        or a folder with `config.json` and the weights.
      revision: branch, tag or commit on the hub.

    Raises:
      CheckpointError: there is no such file, or the hub or the network does not give it.
      ValueError: the name is neither a file nor a tag nor a hub id; the right or the nearest tags are suggested.
    """
    name = str(source)
    path = Path(source)
    is_hub_id = name.startswith(_PREFIXES)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    try:
        if isinstance(source, Path) or (not is_hub_id and (path.exists() or _looks_like_file(name))):
            return _local_folder(path) if path.is_dir() else Located(path, source=path.name)
    except OSError as error:  # such as a name that is too long
        raise CheckpointError(f"{path}: {reason(error)}") from error
    if name in PRETRAINED:
        if packaged := PRETRAINED[name].packaged:
            return Located(Path(__file__).with_name(packaged), source=name)
        name = f"timm/{name}"
    if name in VARIANTS:
        tags = [tag for tag, pretrained in PRETRAINED.items() if pretrained.variant == name]
        weights = f"its weights are {' or '.join(tags)}" if tags else "no weights are published for it"
        raise ValueError(f"{name!r} is an architecture; {weights}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(unknown_name_message(str(source), PRETRAINED))
    return _download(name, revision)


def promised_sha256(path: Path) -> str | None:
    """What the hub promised for a file in its client's cache: the SHA-256 of a large file, None for a small one."""
    # .../snapshots/<commit>/<file> -> ../../blobs/<SHA-256>, which may itself link to a store under another hash
    blob = path.readlink() if path.is_symlink() else path
    return blob.name if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) else None


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

    unreachable: Exception | None = None

    def fetch(filename: str) -> Path | None:
        """None where there is no such file; after a hub that did not answer, only the cache is asked."""
        nonlocal unreachable
        only_cache = unreachable is not None
        try:
            path = huggingface_hub.hf_hub_download(repository, filename, revision=revision, local_files_only=only_cache)
        except errors.LocalEntryNotFoundError as error:
            unreachable = unreachable or error
        except errors.EntryNotFoundError:
            pass
        else:
            return Path(path)
        return None

    try:
        if tag := PRETRAINED.get(repository.removeprefix("timm/")):
            described = {"variant": tag.variant, "preprocessing": tag.preprocessing}
        else:  # before the weights, since it may say that they are not a DPN's; our own files need none
            config = fetch("config.json")
            described = _read_config(config) if config else {}
        weights = next((path for name in _WEIGHTS if (path := fetch(name))), None)
        if weights is None:
            raise unreachable or CheckpointError(f"{repository}: has none of {', '.join(_WEIGHTS)} on the hub")
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
        raise CheckpointError(f"{repository}: the download failed: {reason(error)}") from error
    commit = weights.parent.name  # .../snapshots/<commit>/<file>
    return Located(weights, source=f"{repository}@{commit}", **described)


def _read_config(path: Path) -> dict[str, object]:
    """The fields of timm's `config.json`; old ones have those of `pretrained_cfg` at the top."""
    try:
        config = json.loads(path.read_bytes())
        fields = config.get("pretrained_cfg", config)
        architecture, pool = config.get("architecture"), config.get("model_args", {}).get("global_pool")
        if architecture not in (None, *VARIANTS):
            raise ValueError(f"its architecture {architecture!r} is not a DPN")
        if pool not in (None, *POOLS):
            raise ValueError(f"its global_pool {pool!r} is none of {POOLS}")
        labels = config.get("label_names") or config.get("labels") or fields.get("label_names")
        fraction = fields.get("crop_pct")
        return {
            "variant": architecture,
            "global_pool": pool,
            "preprocessing": Preprocessing(
                image_size=fields["input_size"][-1],
                crop_fraction=0.875 if fraction is None else fraction,
                interpolation=fields["interpolation"],
                mean=tuple(fields["mean"]),
                std=tuple(fields["std"]),
            ),
            "class_names": tuple(str(label) for label in labels) if labels else None,
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the config.json of a timm DPN ({type(error).__name__}: {error})") from error
