"""From files to models and back: `from_pretrained`, `load`, `save`, and conversion from file to file."""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpn_jax.checkpoint.files import FileStamp, LazyTensor, TensorFile, read_tensors, sha256, write_tensors
from dpn_jax.checkpoint.hub import locate, promised_sha256
from dpn_jax.checkpoint.names import Entry, check, infer_config, is_timm, table, to_flax, to_timm, with_ends_of
from dpn_jax.config import DPNConfig
from dpn_jax.errors import CheckpointError, reason
from dpn_jax.model import DPN
from dpn_jax.pretrained import Preprocessing, Provenance, get_config

logger = logging.getLogger("dpn_jax")

_FORMAT = "dpn_jax"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint whose names and shapes have been checked; the values are still on disk.

    Args:
      file: the tensors, under timm's names or ours.
      config: the architecture that they fit.
      provenance: where they come from.
    """

    file: TensorFile
    config: DPNConfig
    provenance: Provenance

    @property
    def is_timm(self) -> bool:
        """Whether names and layouts are timm's."""
        return is_timm(self.file)

    def name(self, entry: Entry) -> str:
        """What the file calls a tensor."""
        return entry.timm if self.is_timm else entry.flax

    def tensor(self, entry: Entry) -> LazyTensor | None:
        """One tensor in Flax's layout; None for a counter that the file does not have."""
        tensor = self.file.get(self.name(entry))
        if tensor is None or not self.is_timm:
            return tensor
        return LazyTensor(entry.flax_shape, tensor.dtype, lambda: to_flax(entry, tensor.read()))

    def verify_download(self) -> None:
        """Compares the file with the SHA-256 that the hub promised, where it did.

        Raises:
          CheckpointError: they differ.
        """
        for path in self.file.paths:
            promised = promised_sha256(path)
            if promised and sha256([path]) != promised:
                raise CheckpointError(
                    f"{path}: SHA-256 is not the hub's, the download is damaged; delete {path.resolve()}"
                )

    def check_values(self, dtype: np.dtype | None = None) -> None:
        """Reads every value.

        Args:
          dtype: what the values will be cast to.

        Raises:
          CheckpointError: NaN, infinity, a negative running variance; the message lists every tensor at fault.
        """
        problems = []
        for entry in table(self.config):
            if tensor := self.tensor(entry):
                kept = tensor.dtype if dtype is None or entry.is_counter else dtype
                if problem := _problem(entry, _cast(tensor.read(), kept)):
                    problems.append(f"{self.name(entry)}: {problem}")
        if problems:
            _raise_problems(self.file.paths[0], problems)


def open_checkpoint(
    source: str | Path, *, model: str | DPNConfig | None = None, revision: str | None = None
) -> Checkpoint:
    """Finds a checkpoint and checks its names and shapes.

    Args:
      source: as for `from_pretrained`.
      model: the architecture, when it should not be read from the file.
      revision: as for `from_pretrained`.

    Raises:
      CheckpointError: it cannot be had or read, or it does not fit.
      ValueError: an unknown name.
    """
    located = locate(source, revision=revision)
    file = read_tensors(located.weights)
    for note in file.notes:
        logger.warning("%s: %s", located.weights.name, note)
    try:
        if is_timm(file) or file.metadata.get("format") != _FORMAT:
            config = _timm_config(file, model or located.variant)
            if located.global_pool is not None and model is None:
                config = config.replace(global_pool=located.global_pool)
            sha256 = promised_sha256(located.weights)
            provenance = Provenance(located.source, sha256, located.preprocessing, located.class_names, file.stamps())
        else:
            config, provenance = _own_metadata(file)
            config = config if model is None else _named_config(model)
        check(config, file.shapes)
        _check_dtypes(file)
    except CheckpointError as error:
        raise CheckpointError(
            f"{located.weights}: {error}", missing=error.missing, unknown=error.unknown, misshaped=error.misshaped
        ) from None
    return Checkpoint(file, config, provenance)


def from_pretrained(
    source: str | Path,
    *,
    model: str | DPNConfig | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    global_pool: str | None = None,
    drop_rate: float | None = None,
    test_time_pool: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    revision: str | None = None,
    rngs: nnx.Rngs | None = None,
    allow_nonfinite: bool = False,
) -> DPN:
    """A DPN with trained weights, in eval mode.

    Args:
      source: a tag ('dpn92.mx_in1k'), a hub id ('timm/dpn92.mx_in1k', 'hf-hub:you/your-dpn'), timm's or our own file
        (.safetensors, the .index.json of a sharded one, .pth, .bin), or a folder with config.json and weights.
      model: the variant or config, when it should not be recognized from the file.
      num_classes: another number than the file's gets a freshly initialized classifier; 0 none.
      in_channels: another number than the file's adapts the first convolution by timm's rule: 1 sums the colors, N
        repeats them and scales by 3/N.
      global_pool, drop_rate, test_time_pool: see `DPNConfig`.
      dtype: dtype of the arithmetic.
      param_dtype: dtype of the parameters, whatever the file's is.
      remat: see `DPN`.
      revision: branch, tag or commit on the hub.
      rngs: streams `params` for a new classifier and `dropout`; `nnx.Rngs(0)` when left out.
      allow_nonfinite: take NaN, infinity and negative running variances.

    Raises:
      CheckpointError: the checkpoint cannot be had, is damaged, or does not fit.
      ValueError: an unknown name or an argument out of its range.

    Source: `timm.create_model(pretrained=True)`, `timm.models._builder.load_pretrained`.
    """
    checkpoint = open_checkpoint(source, model=model, revision=revision)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    requested = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "global_pool": global_pool,
        "drop_rate": drop_rate,
        "test_time_pool": test_time_pool,
    }
    config = checkpoint.config.replace(**{name: value for name, value in requested.items() if value is not None})
    fresh_head = _needs_fresh_head(checkpoint.config, config, explicit=num_classes is not None)
    body = config.replace(num_classes=0) if fresh_head else config
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as background:
        verified = background.submit(checkpoint.verify_download)
        try:
            arrays = _read_arrays(checkpoint, body, param_dtype, allow_nonfinite=allow_nonfinite)
        finally:
            verified.result()  # a damaged download explains every other complaint
    built = _assemble(body, arrays, jnp.dtype(dtype), jnp.dtype(param_dtype), remat)
    built.provenance = checkpoint.provenance
    if fresh_head:
        built.reset_classifier(config.num_classes, rngs=rngs)
    if config.drop_rate:
        built.dropout = nnx.Dropout(config.drop_rate, deterministic=True, rngs=rngs)
    return built


def load(path: str | Path, **options: object) -> DPN:
    """Reads a model from a file, never from the hub; otherwise as `from_pretrained`.

    Args:
      path: what `save` wrote, or timm's file.
      options: the keywords of `from_pretrained`.

    Raises:
      CheckpointError: the file is missing, damaged, or does not fit.
    """
    return from_pretrained(Path(path), **options)


def save(model: DPN, path: str | Path, *, overwrite: bool = False) -> None:
    """Writes a model into one safetensors file, with its architecture and provenance, atomically.

    Args:
      model: the model; its parameters keep their dtype.
      path: the file, usually `*.safetensors`.
      overwrite: replace an existing file.

    Raises:
      CheckpointError: the file exists and `overwrite` is not set, or cannot be written.
      ValueError: the model is abstract: it has no values.
    """
    variables = {entry.flax: _variable(model, entry.flax) for entry in table(model.config)}
    if abstract := next(
        (name for name, v in variables.items() if isinstance(v.get_value(), jax.ShapeDtypeStruct)), None
    ):
        raise ValueError(f"the model is abstract: {abstract} has no value to save")
    tensors = {
        name: LazyTensor(variable.shape, np.dtype(variable.dtype), functools.partial(np.asarray, variable.get_value()))
        for name, variable in variables.items()
    }
    write_tensors(Path(path), tensors, _metadata(model.config, model.provenance), overwrite=overwrite)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Literal["flax", "timm"] | None = None,
    model: str | DPNConfig | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> Checkpoint:
    """Rewrites a checkpoint in the other layout, a tensor at a time; no model is built and torch is not needed.

    timm -> Flax -> timm gives the same bytes, since values and dtypes stay as they are.

    Args:
      source: as for `from_pretrained`.
      destination: a `.safetensors` file.
      to: the layout to write; the other one than the source's when left out.
      model, revision, allow_nonfinite: as for `from_pretrained`.
      dtype: dtype to cast parameters and statistics to; kept when left out.
      overwrite: replace an existing file.

    Returns:
      The checkpoint that was read.

    Raises:
      CheckpointError: the source cannot be read or does not fit, or the destination exists or is the source.
      ValueError: an unknown name, or a destination that is not named `.safetensors`.
    """
    destination = Path(destination)
    if destination.suffix != ".safetensors":
        raise ValueError(f"{destination}: the name must end in .safetensors, which timm and dpn_jax both read")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating-point one, got {jnp.dtype(dtype)}")
    dtype = None if dtype is None else np.dtype(dtype)
    checkpoint = open_checkpoint(source, model=model, revision=revision)
    try:
        if any(destination.exists() and path.samefile(destination) for path in checkpoint.file.paths):
            raise CheckpointError(f"{destination}: is the source itself; name another file")
    except OSError as error:
        raise CheckpointError(f"{destination}: {reason(error)}") from error
    checkpoint.verify_download()
    if not allow_nonfinite:
        checkpoint.check_values(dtype)
    to = to or ("flax" if checkpoint.is_timm else "timm")
    tensors: dict[str, LazyTensor] = {}
    for entry in table(checkpoint.config):
        if (tensor := checkpoint.tensor(entry)) is None:
            continue
        kept = tensor.dtype if dtype is None or entry.is_counter else dtype
        if to == "flax":
            read = functools.partial(lambda tensor, kept: _cast(tensor.read(), kept), tensor, kept)
            tensors[entry.flax] = LazyTensor(entry.flax_shape, kept, read)
        else:
            kept = np.dtype(np.int64) if entry.is_counter else kept
            read = functools.partial(
                lambda entry, tensor, kept: to_timm(entry, _cast(tensor.read(), kept)), entry, tensor, kept
            )
            tensors[entry.timm] = LazyTensor(entry.timm_shape, kept, read)
    metadata = {"format": "pt"} if to == "timm" else _metadata(checkpoint.config, checkpoint.provenance)
    write_tensors(destination, tensors, metadata, overwrite=overwrite)
    return checkpoint


def adapt_input_channels(kernel: np.ndarray, in_channels: int) -> np.ndarray:
    """Changes how many channels the first convolution reads, keeping the scale of what it puts out.

    Args:
      kernel: `[H, W, 3, O]`.
      in_channels: 1 sums the colors; N repeats them in order, cut off at N, and scales by 3/N.

    Returns:
      `[H, W, in_channels, O]`, of the same dtype.

    Raises:
      ValueError: the kernel does not read 3 channels.

    Source: `timm.models._manipulate.adapt_input_conv`.
    """
    colors = kernel.shape[2]
    if colors == in_channels:
        return kernel
    if colors != 3:
        raise ValueError(f"in_channels={in_channels} can be adapted from 3 channels, but the weights read {colors}")
    wide = kernel.astype(np.promote_types(kernel.dtype, np.float32) if kernel.dtype.kind == "f" else np.float32)
    if in_channels == 1:
        adapted = wide.sum(axis=2, keepdims=True)
    else:
        adapted = wide[:, :, np.arange(in_channels) % 3] * np.asarray(3 / in_channels, wide.dtype)
    return adapted.astype(kernel.dtype)


def _timm_config(file: TensorFile, model: str | DPNConfig | None) -> DPNConfig:
    if model is None:
        if "stem.conv.kernel" in file:
            raise CheckpointError("has dpn_jax's tensors without its metadata; name the architecture with model=")
        return infer_config(file.shapes)
    return with_ends_of(_named_config(model), file.shapes) if is_timm(file) else _named_config(model)


def _named_config(model: str | DPNConfig) -> DPNConfig:
    return model if isinstance(model, DPNConfig) else get_config(model)


def _metadata(config: DPNConfig, provenance: Provenance) -> dict[str, str]:
    fields = provenance._asdict()
    files = fields.pop("files")
    if (
        provenance.sha256 is None
        and files
        and all(Path(file[0]).exists() and FileStamp.of(file[0]) == file for file in files)
    ):
        fields["sha256"] = sha256(path for path, _, _ in files)  # only now: it takes as long as loading
    fields["preprocessing"] = provenance.preprocessing and dataclasses.asdict(provenance.preprocessing)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "safetensors")}
    return {
        "format": _FORMAT,
        "config": json.dumps(dataclasses.asdict(config)),
        "provenance": json.dumps(fields),
        "versions": json.dumps(versions),
    }


def _check_dtypes(file: TensorFile) -> None:
    strange = tuple(
        sorted(
            f"{name}: {t.dtype}" for name, t in file.items() if t.shape and not jnp.issubdtype(t.dtype, jnp.floating)
        )
    )
    if strange:
        details = "".join(f"\n  {name}" for name in strange)
        raise CheckpointError(f"{len(strange)} tensors are not floating-point (first: {strange[0]}){details}")


def _own_metadata(file: TensorFile) -> tuple[DPNConfig, Provenance]:
    try:
        config = DPNConfig(**json.loads(file.metadata["config"]))
        if sum(config.depths) > len(file):  # a network that would never be done
            raise ValueError(f"depths={config.depths} for {len(file)} tensors")
        fields = json.loads(file.metadata["provenance"])
        preprocessing, class_names = fields["preprocessing"], fields["class_names"]
        provenance = Provenance(
            source=_text(fields["source"]),
            sha256=_text(fields["sha256"]),
            preprocessing=None if preprocessing is None else Preprocessing(**preprocessing),
            class_names=None if class_names is None else tuple(map(_text, class_names)),
        )
        return config, provenance
    except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"damaged metadata, or written by a newer dpn_jax ({error})") from error


def _text(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise TypeError(f"expected text, got {value!r}")
    return value


def _needs_fresh_head(given: DPNConfig, wanted: DPNConfig, *, explicit: bool) -> bool:
    if not wanted.num_classes:
        return False
    if given.num_classes == wanted.num_classes and given.head_features == wanted.head_features:
        return False
    if not explicit:
        raise ValueError(
            f"global_pool={wanted.global_pool!r} gives the classifier {wanted.head_features} features, but the "
            f"checkpoint's reads {given.head_features}; pass num_classes to start a new one"
        )
    return True


def _read_arrays(
    checkpoint: Checkpoint, config: DPNConfig, param_dtype: jax.typing.DTypeLike, *, allow_nonfinite: bool
) -> dict[str, jax.Array]:
    """Every parameter and statistic of `config` in Flax's layout, by Flax's name."""
    given = {entry.flax: entry for entry in table(checkpoint.config)}
    arrays, problems = {}, []
    for entry in table(config):
        tensor = checkpoint.tensor(given[entry.flax])
        array = np.zeros((), np.int32) if tensor is None else tensor.read()
        if entry.flax == "stem.conv.kernel":
            array = adapt_input_channels(array, config.in_channels)
        if not entry.is_counter:
            array = _cast(array, np.dtype(param_dtype))
        if problem := None if allow_nonfinite else _problem(entry, array):
            problems.append(f"{checkpoint.name(entry)}: {problem}")
        array = _cast(array, np.dtype(np.int32)) if entry.is_counter else array
        # JAX would use an aligned array where it lies (may_alias=False or not), and a mapped file may change
        is_view = array.flags.c_contiguous and not array.flags.owndata
        arrays[entry.flax] = array.copy() if is_view else array
    if problems:
        _raise_problems(checkpoint.file.paths[0], problems)
    return dict(zip(arrays, jax.block_until_ready(jax.device_put(list(arrays.values()))), strict=True))


def _assemble(
    config: DPNConfig, arrays: Mapping[str, jax.Array], dtype: np.dtype, param_dtype: np.dtype, remat: bool
) -> DPN:
    structure, abstract = _abstract(config, dtype, param_dtype, remat)
    state = {path: variable.replace(arrays[".".join(map(str, path))]) for path, variable in abstract}
    return nnx.merge(structure, nnx.from_flat_state(state))


@functools.lru_cache(maxsize=8)
def _abstract(
    config: DPNConfig, dtype: np.dtype, param_dtype: np.dtype, remat: bool
) -> tuple[nnx.GraphDef, list[tuple[tuple[str | int, ...], nnx.Variable]]]:
    """A model in eval mode without values; building one takes a third of the time that loading does."""
    model = DPN(config, dtype=dtype, param_dtype=param_dtype, remat=remat, rngs=None)
    model.eval()
    structure, state = nnx.split(model)
    return structure, list(nnx.to_flat_state(state))


def _problem(entry: Entry, array: np.ndarray) -> str | None:
    """What makes a tensor's values unusable."""
    with np.errstate(all="ignore"):
        # a finite sum has no NaN or infinity in it; only where it overflowed is every value looked at
        total = np.sum(array, dtype=np.float64 if array.itemsize < 4 else None)
        if not np.isfinite(total) and not np.isfinite(array).all():
            return "NaN or infinity"
    if entry.flax.endswith(".var") and (array < 0).any():
        return "a negative running variance"
    return None


def _raise_problems(path: Path, problems: list[str]) -> None:
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    details = "".join(f"\n  {problem}" for problem in problems)
    raise CheckpointError(f"{path}: {problems[0]}{more}; --allow-nonfinite (allow_nonfinite=True) takes it{details}")


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(all="ignore"):  # what does not fit becomes infinite
        return array.astype(dtype, copy=False)


def _variable(model: DPN, name: str) -> nnx.Variable:
    """The variable at a dotted path such as 'stages.0.1.reduce.conv.kernel'."""

    def step(node: object, key: str) -> object:
        return node[int(key)] if key.isdigit() else getattr(node, key)

    return functools.reduce(step, name.split("."), model)
