"""The first half of loading: `open_checkpoint` locates a file, reads its header, translates and checks it, once.

What it gives has Flax's names and layouts, whoever wrote the file; the values are still on disk.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dpn_jax.checkpoint.files import FORMAT, LazyTensor, TensorFile
from dpn_jax.checkpoint.hub import Located, locate, promised_sha256
from dpn_jax.checkpoint.names import Entry, check, infer_config, is_timm, match_input_and_head, name_table, to_flax
from dpn_jax.checkpoint.read import read_tensors
from dpn_jax.checkpoint.timm_config import Described
from dpn_jax.config import DPNConfig
from dpn_jax.errors import CheckpointError, reason, shown
from dpn_jax.pretrained import Preprocessing, Provenance, get_config

logger = logging.getLogger("dpn_jax")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint whose names and shapes have been checked; the values are still on disk.

    Args:
      path: the file.
      tensors: by Flax's name, in Flax's layout; counters may be missing.
      config: the architecture.
      provenance: where the weights come from.
      is_timm: whether the file has timm's names and layouts.
      changes: what was changed in the model that was saved, see `dpn_jax.stock.changes`; empty for a stock model.
    """

    path: Path
    tensors: dict[str, LazyTensor]
    config: DPNConfig
    provenance: Provenance
    is_timm: bool = False
    changes: dict[str, str] = dataclasses.field(default_factory=dict)

    def require_stock(self, reason: str = "") -> None:
        """Refuses a changed model's file.

        Args:
          reason: why, where there is more to say.

        Raises:
          CheckpointError: the model was changed; one line that names the first changed module and what to do.
        """
        if self.changes:
            path, change = map(shown, next(iter(self.changes.items())))
            more = f" and {len(self.changes) - 1} more changes" if len(self.changes) > 1 else ""
            raise CheckpointError(
                f"{shown(self.path)}: a changed model's file ({path or 'the model'} {change}{more}); {reason}"
                "restore it into a model changed in the same way with load(path, into=model)"
            )

    def verify_download(self) -> None:
        """Compares the file with the SHA-256 that the hub promised, where it did.

        Raises:
          CheckpointError: they differ.
        """
        if (promised := promised_sha256(self.path)) is None:
            return
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != promised:
            raise CheckpointError(
                f"{shown(self.path)}: SHA-256 is not the hub's, the download is damaged; "
                f"delete {shown(self.path.resolve())}"
            )

    def read(
        self, dtypes: Mapping[str, np.dtype], *, allow_nonfinite: bool = False
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Reads tensors one at a time.

        Args:
          dtypes: what to cast each to, by Flax's name; a counter that is missing in the file is 0.
          allow_nonfinite: accept any values.

        Yields:
          Names and arrays.

        Raises:
          CheckpointError: NaN, infinity, a negative running variance; after the last tensor, to list all at fault.
        """
        problems = []
        for name, dtype in dtypes.items():
            tensor = self.tensors.get(name)
            array = np.zeros((), dtype) if tensor is None else tensor.read()
            if jnp.issubdtype(dtype, jnp.floating):
                array = cast(array, dtype)  # before the check: what does not fit becomes infinite
            if not allow_nonfinite and (problem := _problem(name, array)):
                problems.append(f"{tensor.file_name or name}: {problem}")
            yield name, cast(array, dtype)
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            details = "".join(f"\n  {problem}" for problem in problems)
            advice = "--allow-nonfinite (allow_nonfinite=True) accepts it"
            raise CheckpointError(f"{shown(self.path)}: {problems[0]}{more}; {advice}{details}")

    def read_all(self, dtypes: Mapping[str, np.dtype], *, allow_nonfinite: bool) -> dict[str, np.ndarray]:
        """As `read`, all in memory, while a second thread verifies the download."""
        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as background:
            verified = background.submit(self.verify_download)
            try:
                return {name: _owned(array) for name, array in self.read(dtypes, allow_nonfinite=allow_nonfinite)}
            finally:
                verified.result()  # a damaged download explains every other complaint


def open_checkpoint(
    source: str | Path, *, model: str | DPNConfig | None = None, revision: str | None = None
) -> Checkpoint:
    """Finds a checkpoint, translates its tensors to Flax's names and layouts, and checks them.

    Args:
      source: as for `from_pretrained`.
      model: the architecture; defaults to what the file says or its tensors tell.
      revision: as for `from_pretrained`.

    Raises:
      CheckpointError: it cannot be obtained or read, or does not fit.
      ValueError: an unknown name.
    """
    located = locate(source, revision=revision)
    file = read_tensors(located.weights)
    for note in file.notes:
        logger.warning("%s: %s", shown(file.path.name), note)
    from_timm = is_timm(file.tensors)
    try:
        if file.metadata.get("format") == FORMAT and not from_timm:
            config, provenance, changed = read_metadata(file.metadata, len(file.tensors))
            config = config if model is None else _named_config(model)
        elif FORMAT in file.metadata and located.described == Described():
            config, provenance, changed = read_metadata(file.metadata[FORMAT], len(file.tensors))
            config = config if model is None else _find_config(file, located, model)
        else:
            config, changed, described = _find_config(file, located, model), {}, located.described
            sha256 = promised_sha256(file.path)
            provenance = Provenance(located.source, sha256, described.preprocessing, described.class_names)
        if not changed:  # which tensors a changed model has, only an instance can tell
            check(config, file.shapes)
            check_dtypes(file.tensors)
    except CheckpointError as error:
        raise CheckpointError(
            f"{shown(file.path)}: {error}", missing=error.missing, unknown=error.unknown, misshaped=error.misshaped
        ) from None
    tensors = _translate(file.tensors, config) if from_timm else file.tensors
    return Checkpoint(file.path, tensors, config, provenance, from_timm, changed)


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` in another dtype; what does not fit becomes infinite."""
    with np.errstate(all="ignore"):
        return array.astype(dtype, copy=False)


def _find_config(file: TensorFile, located: Located, model: str | DPNConfig | None) -> DPNConfig:
    """The architecture of a file without our metadata."""
    described = located.described if model is None else Described(model)
    if described.variant is not None:
        config = _named_config(described.variant).replace(**described.changes)
        if is_timm(file.tensors):
            config = match_input_and_head(config, file.shapes)
    elif "stem.conv.kernel" in file.tensors:
        raise CheckpointError("has dpn_jax's tensors without its metadata; name the architecture with model=")
    else:
        config = infer_config(file.shapes)
    return config.replace(**described.changes)


def _named_config(model: str | DPNConfig) -> DPNConfig:
    return model if isinstance(model, DPNConfig) else get_config(model)


def read_metadata(metadata: Mapping[str, str] | str, tensors: int) -> tuple[DPNConfig, Provenance, dict[str, str]]:
    """The architecture, the provenance and the changes that one of our files tells.

    Args:
      metadata: what `metadata_of` wrote, or that as JSON.
      tensors: how many the file has.

    Raises:
      CheckpointError: it is damaged.
    """
    try:
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
        config = DPNConfig(**json.loads(metadata["config"]))
        if sum(config.depths) > tensors:  # building it would take forever
            raise ValueError(f"depths={config.depths} for {tensors} tensors")
        fields = json.loads(metadata["provenance"])
        preprocessing, class_names = fields["preprocessing"], fields["class_names"]
        provenance = Provenance(
            source=_text(fields["source"]),
            sha256=_text(fields["sha256"]),
            preprocessing=None if preprocessing is None else Preprocessing(**preprocessing),
            class_names=None if class_names is None else tuple(map(_text, _list(class_names))),
        )
        changed = json.loads(metadata.get("changes", "{}"))
        return config, provenance, {path: _text(change) for path, change in changed.items()}
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"damaged metadata, or written by a newer dpn_jax ({reason(error)})") from error


def _text(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise TypeError(f"expected text, got {value!r}")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {value!r}")
    return value


def check_dtypes(tensors: Mapping[str, LazyTensor]) -> None:
    """Refuses a stock model's tensors, counters aside, that are not floating-point.

    Raises:
      CheckpointError: the message lists all of them.
    """
    if strange := sorted(
        f"{name}: {tensor.dtype}"
        for name, tensor in tensors.items()
        if tensor.shape and not jnp.issubdtype(tensor.dtype, jnp.floating)
    ):
        details = "".join(f"\n  {name}" for name in strange)
        raise CheckpointError(f"{len(strange)} tensors are not floating-point (first: {strange[0]}){details}")


def _translate(tensors: Mapping[str, LazyTensor], config: DPNConfig) -> dict[str, LazyTensor]:
    """timm's tensors under Flax's names and in Flax's layout."""
    return {
        entry.flax: LazyTensor(
            entry.flax_shape, tensor.dtype, functools.partial(_read_translated, entry, tensor), entry.timm
        )
        for entry in name_table(config)
        if (tensor := tensors.get(entry.timm))
    }


def _read_translated(entry: Entry, tensor: LazyTensor) -> np.ndarray:
    return to_flax(entry, tensor.read())


def _owned(array: np.ndarray) -> np.ndarray:
    """A copy of a view that JAX would otherwise use in place (may_alias=False or not): a mapped file may change."""
    return array.copy() if array.flags.c_contiguous and not array.flags.owndata else array


def _problem(name: str, array: np.ndarray) -> str | None:
    """What makes a tensor's values unusable."""
    with np.errstate(all="ignore"):
        # a finite sum has no NaN or infinity in it; only where it overflowed is every value looked at
        total = np.sum(array, dtype=np.float64 if array.itemsize < 4 else None)
        if not np.isfinite(total) and not np.isfinite(array).all():
            return "NaN or infinity"
    return "a negative running variance" if name.endswith(".var") and (array < 0).any() else None
