"""The DPN architectures and their published weights, as data (standard library only)."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import NamedTuple

OUTPUT_STRIDES = (32, 16, 8)
POOLS = ("avg", "max", "avgmax", "catavgmax", "")
ACTIVATIONS = ("relu", "silu")


def is_int(value: object) -> bool:
    """Whether a value is an integer, and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


class FeatureInfo(NamedTuple):
    """What `forward_intermediates` gives at an index, as timm's `feature_info` tells it."""

    index: int
    channels: int
    reduction: int
    """Pixels of the image from one feature to the next."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The sizes of one stage (a row of the paper's Table 1), derived from a `DPNConfig`.

    `reduction` is that of its outputs. `stride` and `entry_dilation` are the first block's, see `block_steps`.
    """

    depth: int
    stride: int
    reduction: int
    entry_dilation: int
    dilation: int
    in_channels: int
    bottleneck: int
    residual: int
    increment: int
    groups: int

    def block_steps(self, block: int) -> tuple[int, int]:
        """Stride and dilation of the 3x3 convolution of block number `block` (from 0)."""
        return (self.stride, self.entry_dilation) if block == 0 else (1, self.dilation)

    def block_in_channels(self, block: int) -> int:
        """Channels, residual and dense together, that block number `block` (from 0) reads."""
        if block == 0:
            return self.in_channels
        return self.residual + (2 + block) * self.increment

    @property
    def out_channels(self) -> int:
        """Channels, residual and dense together, that the stage hands on."""
        return self.block_in_channels(self.depth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPNConfig:
    """A Dual Path Network's architecture; hashable, and enough to rebuild the model.

    Args:
      depths: blocks in each stage; there are as many stages as entries.
      dense_increments: channels that each block of a stage appends to the dense path (the paper's `k` in `+k`).
      bottleneck_width: channels of the first stage's 3x3 convolutions (`k_r` in timm); doubles each stage.
      groups: groups of the 3x3 convolutions (the paper's `G`).
      residual_width: channels of the first stage's residual path; doubles each stage.
      stem_features: channels of the stem.
      stem_kernel: size of the stem's kernel, odd.
      split_expand: a block ends with one norm and two separate 1x1 convolutions (timm's `b`), not with one that is
        split.
      outer_activation: 'relu' or 'silu', of the stem and the final norm; inside the blocks it is always ReLU.
      num_classes: width of the classifier; 0 leaves it out.
      in_channels: channels of the images.
      global_pool: 'avg', 'max', 'avgmax' (their mean), 'catavgmax' (both, concatenated) or '' (none: a map of logits).
      drop_rate: dropout before the classifier, in [0, 1).
      output_stride: 32, or 16 or 8 for finer features: from that reduction on, stages keep the resolution and dilate
        their 3x3 convolutions instead, which read what they read before, with the same weights. The features of the
        stride-32 network are among them, at every second (or fourth) place.
      test_time_pool: 0, or the window of timm's test-time pooling (7 for 224-pixel training): average over the window
        at stride 1, classify every place, then the mean of the average and the maximum. The paper's mean-max pooling.

    Raises:
      ValueError: a field is out of its range; the message names it and the value.

    Source: paper Table 1; `timm.models.dpn.DPN.__init__`.
    """

    depths: tuple[int, ...] = (3, 4, 20, 3)
    dense_increments: tuple[int, ...] = (16, 32, 24, 128)
    bottleneck_width: int = 96
    groups: int = 32
    residual_width: int = 256
    stem_features: int = 64
    stem_kernel: int = 7
    split_expand: bool = False
    outer_activation: str = "relu"
    num_classes: int = 1000
    in_channels: int = 3
    global_pool: str = "avg"
    drop_rate: float = 0.0
    output_stride: int = 32
    test_time_pool: int = 0

    def __post_init__(self) -> None:
        for name in ("depths", "dense_increments"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value))
            if not value or not all(is_int(item) and item > 0 for item in value):
                raise ValueError(f"{name} must be positive integers, one a stage, got {value!r}")
        if len(self.depths) != len(self.dense_increments):
            raise ValueError(
                f"depths and dense_increments must be equally long, got {self.depths!r} and {self.dense_increments!r}"
            )
        for name in ("bottleneck_width", "groups", "residual_width", "stem_features", "in_channels"):
            value = getattr(self, name)
            if not is_int(value) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.bottleneck_width % self.groups:
            raise ValueError(
                f"bottleneck_width must be a multiple of groups, got {self.bottleneck_width} and {self.groups}"
            )
        if not is_int(self.stem_kernel) or self.stem_kernel < 1 or self.stem_kernel % 2 == 0:
            raise ValueError(f"stem_kernel must be an odd positive integer, got {self.stem_kernel!r}")
        for name in ("num_classes", "test_time_pool"):
            value = getattr(self, name)
            if not is_int(value) or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
        if not isinstance(self.split_expand, bool):
            raise ValueError(f"split_expand must be True or False, got {self.split_expand!r}")
        if self.outer_activation not in ACTIVATIONS:
            raise ValueError(f"outer_activation must be one of {ACTIVATIONS}, got {self.outer_activation!r}")
        if self.global_pool not in POOLS:
            raise ValueError(f"global_pool must be one of {POOLS}, got {self.global_pool!r}")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate must be in [0, 1), got {self.drop_rate!r}")
        if not is_int(self.output_stride) or self.output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride must be one of {OUTPUT_STRIDES}, got {self.output_stride!r}")
        if self.test_time_pool and self.global_pool == "catavgmax":
            raise ValueError("test_time_pool classifies single places and cannot feed a 'catavgmax' classifier")

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """The sizes of each stage."""
        stages: list[StageConfig] = []
        reduction, dilation = 4, 1  # of the stem and its pool
        for i, (depth, increment) in enumerate(zip(self.depths, self.dense_increments, strict=True)):
            stride, entry_dilation = 1 if i == 0 else 2, dilation
            if stride == 2 and reduction == self.output_stride != 32:
                stride, dilation = 1, 2 * dilation
            reduction *= stride
            stage = StageConfig(
                depth=depth,
                stride=stride,
                reduction=reduction,
                entry_dilation=entry_dilation,
                dilation=dilation,
                in_channels=stages[-1].out_channels if stages else self.stem_features,
                bottleneck=self.bottleneck_width * 2**i,
                residual=self.residual_width * 2**i,
                increment=increment,
                groups=self.groups,
            )
            stages.append(stage)
        return tuple(stages)

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """What `DPN.forward_intermediates` gives: the stem, before its max-pool, and each stage.

        Example:
          >>> VARIANTS["dpn92"].feature_info[-1]
          FeatureInfo(index=4, channels=2688, reduction=32)
          >>> [info.reduction for info in VARIANTS["dpn92"].replace(output_stride=8).feature_info]
          [2, 4, 8, 8, 8]

        Source: `timm.models._features.FeatureInfo`.
        """
        stages = (FeatureInfo(i, stage.out_channels, stage.reduction) for i, stage in enumerate(self.stages, start=1))
        return (FeatureInfo(0, self.stem_features, 2), *stages)

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`."""
        return self.stages[-1].out_channels

    @property
    def head_features(self) -> int:
        """Channels that the classifier reads: `num_features`, doubled by 'catavgmax'."""
        return self.num_features * (2 if self.global_pool == "catavgmax" else 1)

    def replace(self, **changes: object) -> "DPNConfig":
        """A copy with some fields changed, checked like a new one.

        Args:
          changes: fields and their new values.
        """
        return dataclasses.replace(self, **changes)

    def check_images(self, shape: tuple[int, ...], dtype: object) -> None:
        """Refuses what is no batch of images for this architecture.

        Args:
          shape: of the images.
          dtype: of their values.

        Raises:
          ValueError: the shape is not `[B, H, W, in_channels]`, or the values are not floats.
        """
        if len(shape) != 4 or shape[-1] != self.in_channels or 0 in shape:
            raise ValueError(f"images must be [B, H, W, {self.in_channels}], got {list(shape)}")
        if "float" not in str(dtype):
            raise ValueError(f"images must be normalized floats (see dpn_jax.preprocessing), got {dtype}")

    def multiply_adds(self, height: int = 224, width: int = 224) -> int:
        """Multiply-adds of every convolution for one image (what the field reports as MACs).

        Args:
          height, width: the image's size, pixels.
        """

        def halve(size: tuple[int, int]) -> tuple[int, int]:  # every stride-2 layer here pads k // 2
            return (size[0] + 1) // 2, (size[1] + 1) // 2

        size = halve((height, width))
        total = size[0] * size[1] * self.stem_kernel**2 * self.in_channels * self.stem_features
        size = halve(size)
        for stage in self.stages:
            for block in range(stage.depth):
                read = stage.block_in_channels(block)
                pixels = size[0] * size[1]
                total += pixels * read * stage.bottleneck
                if block == 0:
                    size = halve(size) if stage.stride == 2 else size
                    pixels = size[0] * size[1]
                    total += pixels * read * (stage.residual + 2 * stage.increment)
                total += pixels * 9 * stage.bottleneck**2 // stage.groups
                total += pixels * stage.bottleneck * (stage.residual + stage.increment)
        pixels = 1 if self.global_pool else size[0] * size[1]
        return total + pixels * self.head_features * self.num_classes


_SMALL = DPNConfig(
    depths=(3, 4, 12, 3),
    dense_increments=(16, 32, 32, 64),
    bottleneck_width=128,
    residual_width=64,
    stem_features=10,
    stem_kernel=3,
)

VARIANTS: dict[str, DPNConfig] = {
    "dpn48b": _SMALL.replace(depths=(3, 4, 6, 3), split_expand=True, outer_activation="silu"),
    "dpn68": _SMALL,
    "dpn68b": _SMALL.replace(split_expand=True),
    "dpn92": DPNConfig(),
    "dpn98": DPNConfig(
        depths=(3, 6, 20, 3), dense_increments=(16, 32, 32, 128), bottleneck_width=160, groups=40, stem_features=96
    ),
    "dpn131": DPNConfig(
        depths=(4, 8, 28, 3), dense_increments=(16, 32, 32, 128), bottleneck_width=160, groups=40, stem_features=128
    ),
    "dpn107": DPNConfig(
        depths=(4, 8, 20, 3), dense_increments=(20, 64, 64, 128), bottleneck_width=200, groups=50, stem_features=128
    ),
    # OWN_VARIANTS: small enough to come with the package, and trained in minutes; dpn_mini, for photos, in an hour
    "dpn_tiny": DPNConfig(
        depths=(1, 2, 2, 1),
        dense_increments=(8, 8, 8, 8),
        bottleneck_width=16,
        groups=4,
        residual_width=64,
        stem_features=16,
        stem_kernel=3,
    ),
    "dpn_mini": DPNConfig(
        depths=(2, 3, 3),
        dense_increments=(8, 12, 12),
        bottleneck_width=32,
        groups=4,
        residual_width=64,
        stem_features=16,
        stem_kernel=3,
    ),
}

OWN_VARIANTS = frozenset({"dpn_tiny", "dpn_mini"})
"""Those that timm does not have."""


def list_models() -> list[str]:
    """Names of the architectures that `create_model` knows.

    Example:
      >>> list_models()
      ['dpn48b', 'dpn68', 'dpn68b', 'dpn92', 'dpn98', 'dpn131', 'dpn107', 'dpn_tiny', 'dpn_mini']
    """
    return list(VARIANTS)


def variant_of(config: DPNConfig) -> str | None:
    """The variant that an architecture is, up to input, output stride, pooling and classifier; None for a custom one.

    Example:
      >>> variant_of(VARIANTS["dpn92"].replace(num_classes=5, in_channels=1))
      'dpn92'
    """
    ends = ("num_classes", "in_channels", "global_pool", "drop_rate", "output_stride", "test_time_pool")
    body = config.replace(**{name: getattr(VARIANTS["dpn92"], name) for name in ends})
    return next((name for name, variant in VARIANTS.items() if variant == body), None)


def unknown_name_message(name: object, known: Iterable[str]) -> str:
    """One line that says a model's name is not known and which names are near it."""
    known = list(known)
    name = name if len(str(name)) <= 100 else f"{str(name)[:100]}..."
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return f"unknown model {name!r}; {hint}"
