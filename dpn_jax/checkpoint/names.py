"""timm's parameter names and layouts and ours, side by side: an explicit, bijective table made from the config.

numpy and `dpn_jax.config` only. timm keeps the names of its first release (`features.conv3_1.c1x1_w_s2.bn.weight`),
where stages are counted from 2 and a projection's name contains its stride; ours are the attributes of `dpn_jax.model`.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dpn_jax.config import VARIANTS, DPNConfig, variant_of
from dpn_jax.errors import CheckpointError, shown

Shape = tuple[int, ...]


class Entry(NamedTuple):
    """One tensor of the model under both names.

    `timm_shape` is `[O, I, H, W]` for kernels, which are `[H, W, I, O]` in Flax, and the same on both sides otherwise.
    """

    timm: str
    flax: str
    timm_shape: Shape

    @property
    def is_kernel(self) -> bool:
        """Whether the layouts differ."""
        return len(self.timm_shape) == 4

    @property
    def is_counter(self) -> bool:
        """Whether it is torch's count of training steps: int64 in timm, absent from files older than torch 0.4.1."""
        return not self.timm_shape

    @property
    def is_parameter(self) -> bool:
        """Whether it is trained, unlike running statistics."""
        return self.flax.rsplit(".", 1)[1] in ("kernel", "scale", "bias")

    @property
    def flax_shape(self) -> Shape:
        """The shape in Flax."""
        if not self.is_kernel:
            return self.timm_shape
        out_channels, in_channels, height, width = self.timm_shape
        return (height, width, in_channels, out_channels)


@functools.lru_cache(maxsize=16)
def name_table(config: DPNConfig) -> tuple[Entry, ...]:
    """Every tensor of a model, in timm's order.

    Args:
      config: the architecture.

    Returns:
      Entries whose timm names and Flax names are both unique.

    Example:
      >>> from dpn_jax.pretrained import get_config
      >>> name_table(get_config("dpn92"))[0]
      Entry(timm='features.conv1_1.conv.weight', flax='stem.conv.kernel', timm_shape=(64, 3, 7, 7))

    Source: `timm.models.dpn.DPN.__init__`.
    """
    return tuple(_entries(config))


def parameter_count(config: DPNConfig) -> int:
    """Parameters of an architecture, the norms' running statistics not among them.

    Example:
      >>> from dpn_jax.config import VARIANTS
      >>> parameter_count(VARIANTS["dpn92"])
      37668392
    """
    return sum(math.prod(entry.timm_shape) for entry in name_table(config) if entry.is_parameter)


def _entries(config: DPNConfig) -> Iterator[Entry]:
    kernel = config.stem_kernel
    yield _conv("features.conv1_1.conv", "stem.conv", config.stem_features, config.in_channels, kernel)
    yield from _norm("features.conv1_1.bn", "stem.norm", config.stem_features)
    for s, stage in enumerate(config.stages):
        for b in range(stage.depth):
            timm, flax = f"features.conv{s + 2}_{b + 1}", f"stages.{s}.{b}"
            channels, width = stage.block_in_channels(b), stage.bottleneck
            if b == 0:
                shortcut, out = f"{timm}.c1x1_w_s{min(s, 1) + 1}", stage.residual + 2 * stage.increment
                yield from _norm(f"{shortcut}.bn", f"{flax}.shortcut.norm", channels)
                yield _conv(f"{shortcut}.conv", f"{flax}.shortcut.conv", out, channels)
            yield from _norm(f"{timm}.c1x1_a.bn", f"{flax}.reduce.norm", channels)
            yield _conv(f"{timm}.c1x1_a.conv", f"{flax}.reduce.conv", width, channels)
            yield from _norm(f"{timm}.c3x3_b.bn", f"{flax}.grouped.norm", width)
            yield _conv(f"{timm}.c3x3_b.conv", f"{flax}.grouped.conv", width, width // stage.groups, 3)
            yield from _norm(f"{timm}.c1x1_c.bn", f"{flax}.expand.norm", width)
            if config.split_expand:
                yield _conv(f"{timm}.c1x1_c1", f"{flax}.expand.residual", stage.residual, width)
                yield _conv(f"{timm}.c1x1_c2", f"{flax}.expand.dense", stage.increment, width)
            else:
                yield _conv(f"{timm}.c1x1_c.conv", f"{flax}.expand.conv", stage.residual + stage.increment, width)
    yield from _norm("features.conv5_bn_ac.bn", "norm", config.num_features)
    if config.num_classes:
        yield _conv("classifier", "classifier", config.num_classes, config.head_features)
        yield Entry("classifier.bias", "classifier.bias", (config.num_classes,))


def _conv(timm: str, flax: str, out_channels: int, in_channels: int, kernel_size: int = 1) -> Entry:
    return Entry(f"{timm}.weight", f"{flax}.kernel", (out_channels, in_channels, kernel_size, kernel_size))


def _norm(timm: str, flax: str, channels: int) -> Iterator[Entry]:
    yield Entry(f"{timm}.weight", f"{flax}.scale", (channels,))
    yield Entry(f"{timm}.bias", f"{flax}.bias", (channels,))
    yield Entry(f"{timm}.running_mean", f"{flax}.mean", (channels,))
    yield Entry(f"{timm}.running_var", f"{flax}.var", (channels,))
    yield Entry(f"{timm}.num_batches_tracked", f"{flax}.steps", ())


def to_flax(entry: Entry, array: np.ndarray) -> np.ndarray:
    """Transposes one tensor from timm's layout to Flax's; a view. A 2-D classifier is accepted."""
    if not entry.is_kernel:
        return array
    return array.reshape(entry.timm_shape).transpose(2, 3, 1, 0)


def to_timm(entry: Entry, array: np.ndarray) -> np.ndarray:
    """Transposes one tensor from Flax's layout to timm's; a view, except for counters, which timm keeps in int64."""
    if entry.is_counter:
        return array.astype(np.int64, copy=False)
    return array.transpose(3, 2, 0, 1) if entry.is_kernel else array


def is_timm(names: Mapping[str, object]) -> bool:
    """Whether the names are timm's rather than ours."""
    return any(name.startswith("features.conv") for name in names)


def check(config: DPNConfig, shapes: Mapping[str, Shape]) -> None:
    """Compares a checkpoint's tensors, under either naming, with what an architecture needs.

    Args:
      config: the architecture.
      shapes: shape by name. Counters may be missing; a classifier's kernel may be 2-D in timm's layout.

    Raises:
      CheckpointError: anything is missing, unknown or misshaped; the message lists all of it and guesses the variant.
    """
    missing, unknown, misshaped = differences = _differences(config, shapes)
    if any(differences):
        variant, share = likely_variant(shapes)
        is_other = share > 0.5 and variant != variant_of(config)
        hint = f"; the file looks like {variant}'s weights" if is_other else ""
        listed = {"missing": missing, "unknown": unknown, "misshaped": misshaped}
        raise CheckpointError(
            f"the tensors do not fit the architecture: {list_differences(listed, hint)}",
            missing=missing,
            unknown=unknown,
            misshaped=misshaped,
        )


def list_differences(differences: Mapping[str, Sequence[str]], hint: str = "") -> str:
    """Words differences: one line with their numbers and the first of each kind, then all of them.

    Args:
      differences: by kind.
      hint: ends the first line.

    Example:
      >>> print(list_differences({"missing": ["a", "b"], "unknown": []}))
      2 missing (first: a)
      missing:
        a
        b
    """
    found = {kind: [shown(name[:200]) for name in names] for kind, names in differences.items() if names}
    counts = ", ".join(f"{len(names)} {kind} (first: {names[0]})" for kind, names in found.items())
    details = "".join(f"\n{kind}:\n  " + "\n  ".join(names) for kind, names in found.items())
    return f"{counts}{hint}{details}"


def _differences(config: DPNConfig, shapes: Mapping[str, Shape]) -> tuple[tuple[str, ...], ...]:
    """The tensors that are missing, unknown, and misshaped, sorted."""
    expected = _expected_shapes(config, timm=is_timm(shapes))
    optional = {name for name, shape in expected.items() if shape == ()}
    missing = sorted(expected.keys() - shapes.keys() - optional)
    unknown = sorted(shapes.keys() - expected.keys())
    misshaped = sorted(
        f"{name}: {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) not in (shape, _flat_classifier(name, shape))
    )
    return tuple(missing), tuple(unknown), tuple(misshaped)


def likely_variant(shapes: Mapping[str, Shape]) -> tuple[str, float]:
    """The variant that shares most names and shapes with a checkpoint.

    Returns:
      Its name, and the share of tensors in common, 0 to 1.
    """
    given = {name: tuple(shape) for name, shape in shapes.items()}.items()

    def share(variant: str) -> float:
        expected = _expected_shapes(VARIANTS[variant], timm=is_timm(shapes)).items()
        return len(given & expected) / max(len(given | expected), 1)

    best = max(VARIANTS, key=share)
    return best, share(best)


def infer_config(shapes: Mapping[str, Shape]) -> DPNConfig:
    """Recovers the architecture from the names and shapes of timm's tensors.

    A variant is recognized whatever its classifier and input channels are. For other architectures the activation of
    the stem and the final norm, which leaves no trace, is taken to be ReLU. For a damaged file it is the most similar
    variant, so that `check` can say in full what is wrong.

    Args:
      shapes: timm's shape by timm's name.

    Raises:
      CheckpointError: what is there is no DPN.

    Example:
      >>> from dpn_jax.pretrained import get_config
      >>> shapes = {entry.timm: entry.timm_shape for entry in name_table(get_config("dpn107"))}
      >>> infer_config(shapes) == get_config("dpn107")
      True
    """
    config, problem = None, ""
    try:
        config = _recover(shapes)
        if not any(_differences(config, shapes)):
            return config
    except (ValueError, ArithmeticError) as error:
        problem = str(error)
    variant, share = likely_variant(shapes)
    if share > 0.5:
        return match_input_and_head(VARIANTS[variant], shapes)
    if config is None:
        raise CheckpointError(f"these are not the tensors of a DPN: {problem}")
    return config


def match_input_and_head(config: DPNConfig, shapes: Mapping[str, Shape]) -> DPNConfig:
    """`config` with the input channels, the classes and the pool's width of a checkpoint (timm's names and shapes)."""
    changes: dict[str, object] = {}
    if len(stem := shapes.get("features.conv1_1.conv.weight", ())) == 4 and stem[1]:
        changes["in_channels"] = stem[1]
    classifier = shapes.get("classifier.weight", ())
    has_classifier = "classifier.weight" in shapes or "classifier.bias" in shapes
    if not has_classifier:
        changes["num_classes"] = 0
    elif len(classifier) in (2, 4):
        changes["num_classes"] = classifier[0]
        if classifier[1] == 2 * config.num_features:
            changes["global_pool"] = "catavgmax"
    return config.replace(**changes)


def _recover(shapes: Mapping[str, Shape]) -> DPNConfig:
    """Reads the sizes off the first blocks; `check` compares the rest."""

    def shape(name: str) -> Shape:
        if len(shapes.get(f"features.{name}.weight", ())) != 4:
            raise ValueError(f"no convolution 'features.{name}.weight'")
        return tuple(shapes[f"features.{name}.weight"])

    def depth(stage: int) -> int:
        return next(b for b in itertools.count() if f"features.conv{stage}_{b + 1}.c1x1_a.conv.weight" not in shapes)

    shape("conv2_1.c1x1_a.conv")  # there is at least one block
    stages = range(2, next(s for s in itertools.count(2) if not depth(s)))
    split = "features.conv2_1.c1x1_c1.weight" in shapes
    increments, residuals = [], []
    for s in stages:
        if split:
            residual, increment = shape(f"conv{s}_1.c1x1_c1")[0], shape(f"conv{s}_1.c1x1_c2")[0]
        else:  # the projection gives residual + 2 increments, the last convolution residual + 1
            expand = shape(f"conv{s}_1.c1x1_c.conv")[0]
            increment = shape(f"conv{s}_1.c1x1_w_s{1 if s == 2 else 2}.conv")[0] - expand
            residual = expand - increment
        increments.append(increment)
        residuals.append(residual)
    width, channels_a_group = shape("conv2_1.c3x3_b.conv")[:2]
    stem_features, _, stem_kernel, _ = shape("conv1_1.conv")
    config = DPNConfig(
        depths=tuple(depth(s) for s in stages),
        dense_increments=tuple(increments),
        bottleneck_width=width,
        groups=width // channels_a_group,
        residual_width=residuals[0],
        stem_features=stem_features,
        stem_kernel=stem_kernel,
        split_expand=split,
    )
    silu = config.replace(outer_activation="silu")
    return match_input_and_head(silu if variant_of(silu) else config, shapes)


def _expected_shapes(config: DPNConfig, *, timm: bool) -> dict[str, Shape]:
    return (
        {e.timm: e.timm_shape for e in name_table(config)}
        if timm
        else {e.flax: e.flax_shape for e in name_table(config)}
    )


def _flat_classifier(name: str, shape: Shape) -> Shape:
    """The other shape that timm's classifier may have: it is 2-D in old checkpoints."""
    return shape[:2] if name == "classifier.weight" else shape
