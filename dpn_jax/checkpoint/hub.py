"""Finds a model's files: on the Hugging Face hub, through its own client and cache, or in a folder laid out like one.

Nothing is imported or contacted before a file is asked for; `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HOME` and the rest of
the client's environment variables work as everywhere.
"""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from dpn_jax.checkpoint.timm_config import Described, read_timm_config
from dpn_jax.config import VARIANTS, unknown_name_message
from dpn_jax.errors import CheckpointError, reason, shown
from dpn_jax.paths import is_url, local_copy
from dpn_jax.pretrained import PRETRAINED

logger = logging.getLogger("dpn_jax")

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # timm's order of preference
_CONFIG = "config.json"
_HUB, _LOCAL = ("hf-hub:", "hf_hub:"), "local-dir:"  # timm's prefixes
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class Located(NamedTuple):
    """A checkpoint's file and what is known about it."""

    weights: Path
    """The file to read, safetensors or PyTorch's."""
    source: str
    """The tag, hub id with its commit, or file name: what a reader of a saved model wants to know."""
    described: Described = Described()
    """What a tag or a `config.json` says."""


def locate(source: str | Path, *, revision: str | None = None) -> Located:
    """Finds the file that a user names, downloading it where needed.

    Args:
      source: a pretrained tag ('dpn92.mx_in1k'; 'dpn_tiny.digits' comes with this package), a hub id
        ('timm/dpn92.mx_in1k', 'hf-hub:julien-c/timm-dpn92'), a file, or a folder ('local-dir:folder' too) with the
        weights and timm's `config.json`, or of a finished fine-tuning run; both also in a bucket ('gs://bucket/run'),
        from which they are copied. Where a folder with weights has the name of
        a tag or hub id, it is the folder.
      revision: branch, tag or commit on the hub.

    Raises:
      CheckpointError: there is no such file, or the hub or the network does not give it.
      ValueError: the name is neither a file nor a tag nor a hub id: the right or the nearest tags are suggested; or
        `revision` is given for what is not on the hub.
    """
    if str(source).startswith(_LOCAL):
        source = Path(str(source).removeprefix(_LOCAL))
    if is_url(source):
        source = local_copy(source, error=CheckpointError, files=_to_read)
    path, name = Path(source), str(source)
    for prefix in _HUB:
        name = name.removeprefix(prefix)
    is_hub_id = name != str(source)
    is_file_name = isinstance(source, Path) or (not is_hub_id and _looks_like_file(name))
    could_be_remote = not is_file_name and (name in PRETRAINED or bool(_REPOSITORY.fullmatch(name)))
    packaged = PRETRAINED[name].packaged if name in PRETRAINED else None
    try:
        found = None if is_hub_id else _find_locally(path, is_file_name, could_be_remote)
    except OSError as error:  # such as a name that is too long
        raise CheckpointError(f"{shown(path)}: {reason(error)}") from error
    if revision is not None and (found or packaged):
        raise ValueError(f"{shown(name)}: is local, where --revision (revision={revision!r}) has no meaning; drop it")
    if found:
        if not is_file_name and name.removeprefix("timm/") in PRETRAINED:
            logger.warning("%s: took the local %s; hf-hub:%s would be the published weights", name, found.weights, name)
        return found
    if packaged:
        return Located(Path(__file__).with_name(packaged), source=name)
    if name in PRETRAINED:
        name = f"timm/{name}"
    if name in VARIANTS:
        tags = [tag for tag, pretrained in PRETRAINED.items() if pretrained.variant == name]
        weights = f"its weights are {' or '.join(tags)}" if tags else "no weights are published for it"
        raise ValueError(f"{name!r} is an architecture; {weights}")
    if not _REPOSITORY.fullmatch(name):
        raise ValueError(unknown_name_message(str(source), PRETRAINED))
    try:
        return _download(name, revision)
    except CheckpointError as error:
        if not is_hub_id and path.is_dir():
            raise CheckpointError(f"{error}; the folder of that name here has no {' or '.join(_WEIGHTS)}") from error
        raise


def hub_id(source: str | None) -> str | None:
    """The repository that weights come from, if their source is on the hub; None of a file, or of this package.

    Args:
      source: of a `Provenance`.

    Example:
      >>> hub_id("dpn92.mx_in1k"), hub_id("you/your-dpn@" + 40 * "0"), hub_id("photos/model.safetensors")
      ('timm/dpn92.mx_in1k', 'you/your-dpn', None)
    """
    if source is None:
        return None
    name, _, commit = source.partition("@")
    tag = PRETRAINED.get(name.removeprefix("timm/"))
    if tag is not None:
        return None if tag.packaged else f"timm/{name.removeprefix('timm/')}"
    return name if _REPOSITORY.fullmatch(name) and re.fullmatch(r"[0-9a-f]{40}", commit) else None


def promised_sha256(path: Path) -> str | None:
    """What the hub promised for a file in its client's cache: the SHA-256 of a large file, None for a small one."""
    # .../snapshots/<commit>/<file> -> ../../blobs/<SHA-256>, which may itself link to a store under another hash
    blob = path.readlink() if path.is_symlink() else path
    return blob.name if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) else None


def _to_read(names: list[str]) -> list[str]:
    """What is read of a folder with these files."""
    return [name for name in names if name == _CONFIG] + [name for name in _WEIGHTS if name in names][:1]


def _looks_like_file(name: str) -> bool:
    return name.endswith((".safetensors", ".json", ".pth", ".pt", ".bin", ".ckpt", ".tar")) or name.startswith(
        ("/", "./", "../")
    )


def _find_locally(path: Path, is_file_name: bool, could_be_remote: bool) -> Located | None:
    """A file, or the weights in a folder; a folder without any does not stand in the way of a tag or a hub id."""
    if not path.is_dir():
        return Located(path, source=path.name) if is_file_name or path.exists() else None
    config = path / _CONFIG
    if weights := next((path / name for name in _WEIGHTS if (path / name).is_file()), None):
        return Located(weights, path.name, read_timm_config(config) if config.is_file() else Described())
    if config.is_file() and (path / "checkpoints").is_dir():
        raise CheckpointError(
            f"{shown(path)}: an unfinished fine-tuning run; finish it: dpn-jax finetune --output {shown(path)} --resume"
        )
    if not could_be_remote:
        raise CheckpointError(f"{shown(path)}: no {', '.join(_WEIGHTS)} in this folder")
    return None


class _RetriesToldOnce(logging.Filter):
    """Passes over what the client says of each attempt, up to a dozen lines a file, after a line at the first."""

    loggers = ("huggingface_hub.utils._http", "huggingface_hub.file_download")

    def __init__(self, repository: str) -> None:
        super().__init__()
        self._line = f"{repository}: the hub does not answer; trying again"

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the client may say it."""
        if not re.search(r"thrown while requesting|Error while downloading|\[Retry \d", record.getMessage()):
            return True
        if self._line:
            logger.warning(self._line)
        self._line = ""
        return False

    def __enter__(self) -> None:
        for name in self.loggers:
            logging.getLogger(name).addFilter(self)

    def __exit__(self, *_: object) -> None:
        for name in self.loggers:
            logging.getLogger(name).removeFilter(self)


def _download(repository: str, revision: str | None) -> Located:
    import huggingface_hub  # slow to import, and not needed for local files
    from huggingface_hub import errors

    unreachable: Exception | None = None
    told_once = _RetriesToldOnce(repository)

    def fetch(filename: str) -> Path | None:
        """None where there is no such file; after a hub that did not answer, only the cache is asked."""
        nonlocal unreachable
        only_cache = unreachable is not None
        try:
            with told_once:
                path = huggingface_hub.hf_hub_download(
                    repository, filename, revision=revision, local_files_only=only_cache
                )
        except errors.LocalEntryNotFoundError as error:
            unreachable = unreachable or error
        except errors.EntryNotFoundError:
            pass
        else:
            return Path(path)
        return None

    try:
        if tag := PRETRAINED.get(repository.removeprefix("timm/")):
            described = Described(tag.variant, tag.preprocessing)
        else:  # before the weights, since it may say that they are not a DPN's; our own files need none
            config = fetch(_CONFIG)
            described = read_timm_config(config) if config else Described()
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
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repository}: gated; ask for access on its page on the hub, then log in: hf auth login (or set HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{repository}: no such repository on the hub, or a private one") from error
    except Exception as error:  # whatever the client or the HTTP library below it (three so far) lets through
        raise CheckpointError(f"{repository}: the download failed: {reason(error)}") from error
    commit = weights.parent.name  # .../snapshots/<commit>/<file>
    return Located(weights, f"{repository}@{commit}", described)
