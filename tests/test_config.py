import dataclasses
import math

import pytest

from dpn_jax import config, pretrained
from dpn_jax.checkpoint.names import name_table


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"),  # timm's published benchmark files; their GMACs count norms and pools too
    [
        ("dpn48b", 9.13, 1.69),
        ("dpn68", 12.61, 2.35),
        ("dpn68b", 12.61, 2.35),
        ("dpn92", 37.67, 6.54),
        ("dpn98", 61.57, 11.73),
        ("dpn131", 79.25, 16.09),
        ("dpn107", 86.92, 18.38),
    ],
)
def test_sizes_are_the_published_ones(name: str, millions: float, gmacs: float) -> None:
    variant = pretrained.get_config(name)
    parameters = sum(math.prod(entry.timm_shape) for entry in name_table(variant) if entry.is_parameter)
    assert round(parameters / 1e6, 2) == millions
    assert variant.multiply_adds() / 1e9 == pytest.approx(gmacs, rel=0.02)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("depths", ()),
        ("depths", (1, 0)),
        ("depths", (1,)),
        ("dense_increments", (1, 2, 3, -4)),
        ("bottleneck_width", 33),
        ("groups", 0),
        ("groups", True),
        ("residual_width", 2.0),
        ("stem_features", -1),
        ("stem_kernel", 4),
        ("outer_activation", "elu"),
        ("num_classes", -1),
        ("in_channels", 0),
        ("global_pool", "average"),
        ("drop_rate", 1.0),
        ("drop_rate", -0.1),
        ("test_time_pool", -7),
    ],
)
def test_fields_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        config.DPNConfig(**{field: value})


def test_catavgmax_cannot_be_pooled_at_test_time() -> None:
    with pytest.raises(ValueError, match="test_time_pool"):
        config.DPNConfig(global_pool="catavgmax", test_time_pool=7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 31),
        ("crop_fraction", 0.0),
        ("crop_fraction", 1.1),
        ("interpolation", "cubic"),
        ("std", (1, 0, 1)),
    ],
)
def test_preprocessing_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        pretrained.Preprocessing(**{field: value})


def test_configs_are_hashable_and_frozen() -> None:
    assert len(set(config.VARIANTS.values())) == len(config.VARIANTS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.VARIANTS["dpn92"].groups = 1


def test_lists_become_tuples() -> None:
    assert hash(config.DPNConfig(depths=[1, 2], dense_increments=[3, 4]))


@pytest.mark.parametrize(
    ("typed", "suggested"), [("dpn-92", "dpn92"), ("dpn68.mx", "dpn68.mx_in1k"), ("DPN107", "dpn107")]
)
def test_unknown_names_suggest_near_ones(typed: str, suggested: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown model '{typed}'.*{suggested}"):
        pretrained.get_config(typed)
