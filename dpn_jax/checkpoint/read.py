"""Opens a file of named tensors, safetensors or PyTorch's; these as trainers write them, running nothing in them."""

import importlib
import pickle
import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import ml_dtypes

from dpn_jax.checkpoint.files import DTYPES, FORMAT, LazyTensor, TensorFile, read_safetensors
from dpn_jax.errors import CheckpointError, reason, shown

# timm's order, the average first; then what PyTorch's tutorial writes
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")

# What trainers keep beside the tensors: options, paths, dates, versions, numbers of NumPy's and random states. None of
# it is looked at, so a blank is read in its place, and neither these classes nor NumPy's pickle code is ever called.
_KEPT_BESIDE = {
    "argparse": "Namespace",
    "builtins": "dict float int list object slice str tuple",
    "datetime": "date datetime time timedelta timezone",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "AnyNode BooleanNode FloatNode IntegerNode StringNode",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "torch.torch_version": "TorchVersion",
    "types": "SimpleNamespace",
    "typing": "Any",
}
_DICTS = {  # filled by item, which torch only allows for its own
    "collections": "defaultdict",
    "easydict": "EasyDict",
    "lightning.fabric.utilities.data": "AttributeDict",
    "lightning.pytorch.utilities.parsing": "AttributeDict",
    "lightning_fabric.utilities.data": "AttributeDict",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
    "yacs.config": "CfgNode",
}
_reading = threading.Lock()
"""What torch is told to read holds for the whole process: one file at a time."""


class _Blank:
    """In the place of an object that is not a tensor."""

    def __new__(cls, *_: object) -> "_Blank":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Leaves it as it is."""


class _BlankDict:
    """In the place of a dict of another class."""

    def __new__(cls, *_: object) -> OrderedDict:
        return OrderedDict()


def _named(table: Mapping[str, str], stand_in: type) -> Iterator[tuple[type, str]]:
    for module, names in table.items():
        for name in names.split():
            yield stand_in, f"{module}.{name}"


# pairs, which cannot be confused with what the user has allowed
_STAND_INS = [*_named(_KEPT_BESIDE, _Blank), *_named(_DICTS, _BlankDict)]


def read_tensors(path: Path) -> TensorFile:
    """Opens a file of tensors; the format is told from the content, not from the name.

    Args:
      path: a safetensors file, or a `.pth`/`.bin` file, which needs torch: tensors by name, or what timm's `train.py`,
        torchvision's, Lightning and others wrap around them. `torch.load(weights_only=True)` runs no code in it.

    Returns:
      The tensors, without what wrappers put before every name.

    Raises:
      CheckpointError: the file is missing, damaged, malicious or of another kind.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{shown(path)}: {'is not a file' if path.exists() else 'no such file'}")
        if path.suffix == ".json":
            raise CheckpointError(
                f"{shown(path)}: holds no weights, and sharded checkpoints (.index.json) are not supported; "
                "pass all weights as one .safetensors or .pth file"
            )
        with path.open("rb") as file:
            start = file.read(9)
        # safetensors begin with 8 bytes of length, which may look like anything, and a brace
        is_pickle = start.startswith((b"\x80", b"PK")) and not start.endswith(b"{")
        return _strip_prefix(_read_torch(path) if is_pickle else read_safetensors(path))
    except OSError as error:
        raise CheckpointError(f"{shown(path)}: {reason(error)}") from error


def _strip_prefix(file: TensorFile) -> TensorFile:
    tensors = {name: tensor for name, tensor in file.tensors.items() if name != "n_averaged"}  # torch's AveragedModel
    prefix = find_prefix(tensors)
    if not prefix or file.metadata.get("format") == FORMAT:
        return file
    stripped = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return file._replace(tensors=stripped, notes=(*file.notes, f"stripped {prefix!r} from every name"))


def find_prefix(names: Iterable[str]) -> str:
    """What wrappers put before a DPN's names: DistributedDataParallel, torch.compile, Lightning, transformers.

    Args:
      names: all names of a file, timm's or ours.

    Returns:
      What all of them begin with; "" if that differs.

    Example:
      >>> find_prefix(["model._orig_mod.features.conv1_1.bn.bias", "model._orig_mod.classifier.bias"])
      'model._orig_mod.'
    """
    names = list(names)
    found = next(filter(None, (re.match(r"(.*?)(features\.conv\d|stem\.|stages\.)", name) for name in names)), None)
    return found[1] if found and all(name.startswith(found[1]) for name in names) else ""


def _read_torch(path: Path) -> TensorFile:
    """A `.pth` or `.bin` file: tensors by name, or what a trainer wrapped around them."""
    try:
        torch = importlib.import_module("torch")  # only here, only when asked for
    except ImportError as error:
        raise CheckpointError(f'{shown(path)}: PyTorch files need torch; pip install "dpn-jax[convert]"') from error
    try:
        content, notes = _load(torch, path), []
        for _ in range(2):  # a pickle can contain itself
            wrappers = _WRAPPERS if isinstance(content, Mapping) else ()
            if (key := next((key for key in wrappers if content.get(key) is not None), None)) is None:
                break
            content = content[key]
            notes.append(f"took the tensors under {key!r}")
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{shown(path)}: holds {type(content).__name__}, not tensors by name")
        if strange := [name for name, value in content.items() if not isinstance(value, torch.Tensor)]:
            raise CheckpointError(f"{shown(path)}: {str(strange[0])[:200]!r} is not a tensor")
        tensors = {str(name): _lazy_tensor(path, str(name), value) for name, value in content.items()}
    except CheckpointError:
        raise
    except Exception as error:  # torch's readers raise whatever a damaged file makes them stumble over
        raise CheckpointError(f"{shown(path)}: not a readable PyTorch file ({reason(error)})") from error
    return TensorFile(path, tensors, {}, tuple(notes))


def _load(torch: ModuleType, path: Path) -> object:
    mmap = zipfile.is_zipfile(path) and path.suffix != ".safetensors"  # torch would go by that name
    try:
        with _reading, torch.serialization.safe_globals(_STAND_INS), path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error says it all
            return torch.load(path if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        # torch's text has a page of advice, in bold, around the name
        if found := re.search(r"GLOBAL (.+?) (?:was not an allowed global|whose module)", str(error)):
            raise CheckpointError(
                f"{shown(path)}: refused: {shown(found[1][:200])} is in it, and reading that could run code; where the "
                "file was written, save the tensors alone: torch.save(model.state_dict(), 'weights.pth')"
            ) from error
        why = str(error).rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
        raise CheckpointError(
            f"{shown(path)}: refused: more than tensors in it, or damaged ({reason(ValueError(why))})"
        ) from error


def _lazy_tensor(path: Path, name: str, tensor: object) -> LazyTensor:
    code = str(tensor.dtype).removeprefix("torch.")
    dtypes = {dtype.name: dtype for dtype in DTYPES}
    if code not in dtypes:
        raise CheckpointError(
            f"{shown(path)}: {shown(name[:200])} has dtype {code}; expected one of {', '.join(dtypes)}"
        )
    tensor = tensor.detach()
    if code == "bfloat16":  # numpy() does not know it: hand over the bits
        array = tensor.view(importlib.import_module("torch").int16).numpy().view(ml_dtypes.bfloat16)
    else:
        array = tensor.numpy()  # a view of the mapped file
    return LazyTensor(array.shape, array.dtype, lambda: array)
