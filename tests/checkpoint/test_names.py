"""The table of timm's names and ours, by itself: `test_load` compares it with timm. No torch."""

import numpy as np
import pytest
from flax import nnx

import dpn_jax
from dpn_jax import CheckpointError, DPNConfig
from dpn_jax.checkpoint.names import check, infer_config, name_table, to_timm
from dpn_jax.checkpoint.names import to_flax as entry_to_flax
from dpn_jax.config import VARIANTS
from dpn_jax.pretrained import PRETRAINED, get_config
from tests.support.models import TINY


@pytest.mark.parametrize("variant", VARIANTS)
def test_table_is_the_models_own_names(variant: str) -> None:
    model = nnx.eval_shape(lambda: dpn_jax.create_model(variant))
    ours = {
        ".".join(map(str, path)): variable.get_value().shape
        for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    }
    assert {entry.flax: entry.flax_shape for entry in name_table(get_config(variant))} == ours


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ends", [{}, {"num_classes": 0}, {"num_classes": 7, "in_channels": 1}])
def test_a_variant_is_recognized_by_its_tensors(variant: str, ends: dict[str, int]) -> None:
    config = get_config(variant).replace(**ends)
    assert infer_config({entry.timm: entry.timm_shape for entry in name_table(config)}) == config


@pytest.mark.parametrize("model", [None, TINY])
def test_any_one_tensor_missing_or_misshaped(model: dpn_jax.DPNConfig | None) -> None:
    whole = {entry.timm: entry.timm_shape for entry in name_table(TINY)}
    assert infer_config(whole) == TINY
    for entry in name_table(TINY):
        faulty = [{name: shape for name, shape in whole.items() if name != entry.timm}] * (not entry.is_counter)
        faulty += [whole | {entry.timm: (*entry.timm_shape, 2)}, whole | {entry.timm: (9999,)}]
        for shapes in faulty:
            with pytest.raises(CheckpointError):
                check(infer_config(shapes) if model is None else model, shapes)


@pytest.mark.parametrize("named", VARIANTS)
@pytest.mark.parametrize("is_timm", [True, False])
def test_another_variants_weights_are_recognized(named: str, is_timm: bool) -> None:
    for variant in VARIANTS:
        entries = name_table(get_config(variant))
        shapes = {e.timm: e.timm_shape for e in entries} if is_timm else {e.flax: e.flax_shape for e in entries}
        if {variant, named} == {"dpn48b"} or variant == named:
            check(get_config(named), shapes)
            continue
        with pytest.raises(CheckpointError) as caught:
            check(get_config(named), shapes)
        line = str(caught.value).split("\n")[0]
        assert f"looks like {variant}'s weights" in line
        assert len(line) < 400


def test_every_tag_is_a_variant() -> None:
    assert {tag.variant for tag in PRETRAINED.values()} <= VARIANTS.keys()


def random_configs(count: int) -> list[DPNConfig]:
    """Architectures of small sizes."""
    rng = np.random.default_rng(0)

    def draw(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    configs = []
    for _ in range(count):
        stages, groups = draw(1, 4), draw(1, 4)
        configs.append(
            DPNConfig(
                depths=tuple(draw(1, 3) for _ in range(stages)),
                dense_increments=tuple(draw(1, 9) for _ in range(stages)),
                bottleneck_width=groups * draw(1, 5),
                groups=groups,
                residual_width=draw(1, 20),
                stem_features=draw(1, 9),
                stem_kernel=2 * draw(0, 3) + 1,
                split_expand=bool(draw(0, 1)),
                num_classes=draw(0, 9),
                in_channels=draw(1, 5),
                global_pool=("avg", "catavgmax")[draw(0, 1)],
            )
        )
    return configs


def test_table_is_bijective_and_tells_the_architecture() -> None:
    for config in random_configs(100):
        entries = name_table(config)
        shapes = {entry.timm: entry.timm_shape for entry in entries}
        assert len(entries) == len(shapes) == len({entry.flax for entry in entries})
        # without a classifier nothing tells one pool from another
        expected = config if config.num_classes else config.replace(global_pool="avg")
        assert infer_config(shapes) == expected
        for entry in entries[:: max(1, len(entries) // 9)]:
            array = np.arange(np.prod(entry.timm_shape)).reshape(entry.timm_shape)
            assert entry_to_flax(entry, array).shape == entry.flax_shape
            np.testing.assert_array_equal(to_timm(entry, entry_to_flax(entry, array)), array)
