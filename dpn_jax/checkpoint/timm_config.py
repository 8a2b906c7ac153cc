"""timm's `config.json`, which lies beside a model's weights: each field read by its type, as timm would use it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpn_jax.config import VARIANTS, is_int
from dpn_jax.errors import CheckpointError, reason, shown
from dpn_jax.pretrained import Preprocessing

_MAX_CLASSES = 1_000_000
FIELDS = {
    "k_sec": "depths",
    "inc_sec": "dense_increments",
    "k_r": "bottleneck_width",
    "groups": "groups",
    "num_init_features": "stem_features",
    "b": "split_expand",
    "act_layer": "outer_activation",
    "global_pool": "global_pool",
    "drop_rate": "drop_rate",
}
"""`model_args` of timm's `DPN` and our fields; `small` is two of ours."""
_FIXED = {"output_stride": 32, "norm_layer": "batchnorm2d"}
_WITHOUT_EFFECT = ("fc_act_layer", "num_classes", "in_chans")  # the first in timm; the tensors tell the others


class Described(NamedTuple):
    """What is known about weights beside the file itself."""

    variant: str | None = None
    """The architecture's name."""
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    changes: Mapping[str, Any] = {}
    """Fields of the config that differ from the variant's, such as the pool that the weights were trained with."""


def read_timm_config(path: Path) -> Described:
    """Reads a `config.json`; a field that is missing has timm's default.

    Old ones have the fields of `pretrained_cfg` at the top.

    Returns:
      What it says; nothing if it is the record of a fine-tuning run, whose weights say more.

    Raises:
      CheckpointError: it is not a timm DPN's, or asks for what is not supported; one line that names the field.

    Source: `timm.models._hub._parse_model_cfg`, `timm.data.config.resolve_data_config`.
    """
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
        if config.keys() >= {"config", "source", "preprocessing", "class_names"}:  # dpn_jax.finetune.record.Record
            return Described()
        fields, args = _get(config, "pretrained_cfg", dict, config), _get(config, "model_args", dict, {})
        variant = _get(config, "architecture", str, None)
        if variant not in (None, *VARIANTS):
            raise ValueError(f"its architecture {variant!r} is not a DPN")
        if variant is None and fields is config and "input_size" not in config:
            raise ValueError("it has neither architecture nor pretrained_cfg")
        if _get(fields, "label_offset", int, 0):
            raise ValueError(f"label_offset {fields['label_offset']!r} is not supported")
        labels = config.get("label_names") or config.get("labels") or fields.get("label_names") or fields.get("labels")
        classes = [_get(part, "num_classes", int, None) for part in (args, config, fields)]
        changes = _changes(args)
        VARIANTS[variant or "dpn92"].replace(**changes)  # every field is in its range
        return Described(
            variant,
            _preprocessing(fields, _get(args, "in_chans", int, None)),
            _class_names(labels, next((number for number in classes if number is not None), None)) if labels else None,
            changes,
        )
    except (OSError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{shown(path)}: not the config.json of a timm DPN ({reason(error)})") from error


def _get(fields: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any) -> Any:
    """A field of one type; null is as good as missing."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"its {name} is {value!r}")
    return value


def _preprocessing(fields: Mapping[str, Any], in_channels: int | None) -> Preprocessing:
    number, default = (int, float), Preprocessing()
    size = _get(fields, "input_size", list, [3, 224, 224])
    if len(size) != 3 or not all(map(is_int, size)):
        raise ValueError(f"its input_size is {size!r}, expected [channels, height, width]")
    channels = in_channels or size[0]
    colors = {name: _get(fields, name, list, None) or getattr(default, name) for name in ("mean", "std")}
    for name, values in colors.items():
        if len(values) not in (1, channels):
            raise ValueError(f"its {name} has {len(values)} values for {channels} channels")
        colors[name] = tuple(values) * (channels if len(values) == 1 else 1)
    return Preprocessing(
        image_size=tuple(size[1:]),
        crop_fraction=_get(fields, "crop_pct", number, None) or default.crop_fraction,
        interpolation=_get(fields, "interpolation", str, None) or default.interpolation,
        crop_mode=_get(fields, "crop_mode", str, None) or default.crop_mode,
        **colors,
    )


def _changes(args: Mapping[str, Any]) -> dict[str, Any]:
    """timm's `model_args` as fields of our config."""
    changes: dict[str, Any] = {}
    for name, value in args.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name in _FIXED:
            if value != _FIXED[name]:
                raise ValueError(f"its {name} {value!r} is not supported, only {_FIXED[name]!r}")
        elif name == "small":
            small = _get(args, name, bool, False)
            changes |= {"stem_kernel": 3 if small else 7, "residual_width": 64 if small else 256}
        elif name in FIELDS:
            changes[FIELDS[name]] = _get(args, name, bool, None) if name == "b" else value
        else:
            raise ValueError(f"its model_args has {name!r}, which is not supported")
    return changes


def _class_names(labels: object, num_classes: int | None) -> tuple[str, ...]:
    """Names in a list, or by index in an object, which may lack some: `timm.data.CustomDatasetInfo`."""
    if isinstance(labels, dict):
        by_index: dict[int, object] = {}
        for key, name in labels.items():
            if not key.isdecimal() or int(key) in by_index:
                raise ValueError(f"its label_names has the index {key!r}, expected each once, from 0")
            by_index[int(key)] = name
        count = len(by_index) if num_classes is None else num_classes
        if not max(by_index) < count <= _MAX_CLASSES:
            raise ValueError(f"its label_names has the index {max(by_index)}, but there are {count} classes")
        labels = [by_index.get(index, f"<unmapped:{index}>") for index in range(count)]
    if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
        raise ValueError(f"its label_names is {labels!r}, expected names")
    return tuple(labels)
