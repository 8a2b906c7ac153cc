"""Every variant against timm, stage by stage, from the same file of weights."""

import copy
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("tests.support.timm_models")
import torch

import dpn_jax
from dpn_jax.pretrained import get_config
from tests.support.timm_models import (
    VARIANTS,
    nchw,
    nhwc,
    random_images,
    randomized,
    relative_error,
    save_timm,
    timm,
    timm_dpn,
)

BOUNDS = {"float64": 1e-10, "float32": 1e-5}
INPUTS = [(3, 224, 224), (1, 193, 257), (4, 288, 288)]  # only the stem knows how many channels there are
# as users compile it, for one variant of each kind; it takes longer
OPTIMISED = [("dpn68b", *INPUTS[0]), ("dpn92", *INPUTS[0])]


def marks(name: str, shape: tuple[int, int, int]) -> list[pytest.MarkDecorator]:
    """Every variant at the usual shape, the most used ones at all shapes; the others' further shapes now and then."""
    often = shape == (3, 224, 224) or name in ("dpn68b", "dpn92")
    optimized = (name, *shape) in OPTIMISED
    return [pytest.mark.optimized] * optimized + [pytest.mark.exhaustive] * (not often)


CASES = [
    pytest.param((name, shape[0]), name, *shape, marks=marks(name, shape)) for name in VARIANTS for shape in INPUTS
]


@nnx.jit
def outputs(model: dpn_jax.DPN, images: jax.Array) -> dict[str, jax.Array]:
    """Everything that the model can show, under the names of `timm_outputs`."""
    features, stages = model.forward_intermediates(images)
    named = {f"stage {index}": stage for index, stage in enumerate(stages)}
    return named | {
        "features": features,
        "pre_logits": model.forward_head(features, pre_logits=True),
        "logits": model.forward_head(features),
    }


def timm_outputs(model: torch.nn.Module, images: torch.Tensor) -> dict[str, np.ndarray]:
    with torch.no_grad():
        features, stages = model.forward_intermediates(images)
        named = {f"stage {index}": stage for index, stage in enumerate(stages)} | {
            "features": features,
            "pre_logits": model.forward_head(features, pre_logits=True),
            "logits": model(images),
        }
    return {name: nhwc(value) for name, value in named.items()}


@pytest.fixture(scope="module")
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A variant with so many input channels, float64, and its file; made once for all sizes."""
    name, channels = request.param
    theirs = randomized(name, in_chans=channels)
    return theirs, save_timm(theirs, tmp_path_factory.mktemp(name) / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "name", "channels", "height", "width"), CASES, indirect=["variant"])
def test_every_stage_equals_timm(
    variant: tuple[torch.nn.Module, Path], name: str, channels: int, height: int, width: int
) -> None:
    theirs, path = variant
    images = random_images((1, height, width, channels))
    for dtype, bound in BOUNDS.items():
        ours = dpn_jax.load(path, dtype=dtype, param_dtype=dtype)
        assert ours.config == get_config(name).replace(in_channels=channels)
        got = outputs(ours, jnp.asarray(images, dtype))
        torch_dtype = getattr(torch, dtype)
        expected = timm_outputs(copy.deepcopy(theirs).to(torch_dtype), nchw(images, torch_dtype))
        assert got.keys() == expected.keys()
        errors = {key: relative_error(got[key], expected[key]) for key in expected}
        assert max(errors.values()) <= bound, errors
        assert all(value.dtype == dtype for value in got.values())


@pytest.fixture(
    scope="module", params=["dpn68b", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dpn92", "dpn107"))]
)
def pooled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    yield request.param, tmp_path_factory.mktemp("pools")


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", ""])
def test_every_pool_equals_timm(pooled: tuple[str, Path], pool: str) -> None:
    name, folder = pooled
    theirs = randomized(name, global_pool=pool, num_classes=11)
    path = save_timm(theirs, folder / f"{pool}.safetensors")
    features = random_images((2, 5, 7, theirs.num_features))
    for dtype, bound in BOUNDS.items():
        ours = dpn_jax.load(path, global_pool=pool, dtype=dtype, param_dtype=dtype)
        theirs = theirs.to(getattr(torch, dtype))
        for pre_logits in (False, True):
            with torch.no_grad():
                expected = theirs.forward_head(nchw(features, getattr(torch, dtype)), pre_logits=pre_logits)
            got = ours.forward_head(jnp.asarray(features, dtype), pre_logits=pre_logits)
            assert relative_error(got, nhwc(expected)) <= bound


def test_catavgmax_is_recognized_from_the_classifier(tmp_path: Path) -> None:
    theirs = randomized("dpn68", global_pool="catavgmax", num_classes=7)
    ours = dpn_jax.load(save_timm(theirs, tmp_path / "model.safetensors"))
    assert (ours.config.global_pool, ours.config.num_classes) == ("catavgmax", 7)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(256, 321), (320, 320)])
def test_test_time_pooling_equals_timm(size: tuple[int, int], tmp_path: Path) -> None:
    from timm.layers.test_time_pool import TestTimePoolHead

    theirs = randomized("dpn48b")
    path = save_timm(theirs, tmp_path / "model.safetensors")
    images = random_images((1, *size, 3))
    with torch.no_grad():
        expected = TestTimePoolHead(theirs, original_pool=7)(nchw(images, torch.float64))
    ours = dpn_jax.load(path, test_time_pool=7, dtype="float64", param_dtype="float64")
    got = nnx.jit(lambda model, x: model(x))(ours, jnp.asarray(images))
    assert relative_error(got, nhwc(expected)) <= 1e-10


@pytest.mark.parametrize("indices", [None, 2, [0], [1, 3], [-1], [4, 0, -2]])
@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_forward_intermediates_has_timms_meaning(
    indices: int | list[int] | None, stop_early: bool, norm: bool, tiny: tuple[torch.nn.Module, dpn_jax.DPN]
) -> None:
    theirs, ours = tiny
    images = random_images((2, 48, 64, 3))
    options = {"indices": indices, "norm": norm, "stop_early": stop_early}
    with torch.no_grad():
        features, stages = theirs.forward_intermediates(nchw(images, torch.float64), **options)
    got_features, got_stages = ours.forward_intermediates(jnp.asarray(images), **options)
    only = ours.forward_intermediates(jnp.asarray(images), **options, intermediates_only=True)
    assert len(got_stages) == len(stages) == len(only)
    for got, again, expected in zip(got_stages, only, stages, strict=True):
        assert relative_error(got, nhwc(expected)) <= 1e-10
        np.testing.assert_array_equal(got, again)
    assert relative_error(got_features, nhwc(features)) <= 1e-10


@pytest.mark.parametrize("indices", [0, 6, -1, [5], [-6], [0, 7]])
def test_forward_intermediates_refuses_what_timm_refuses(
    indices: int | list[int], tiny: tuple[torch.nn.Module, dpn_jax.DPN]
) -> None:
    theirs, ours = tiny
    images = random_images((1, 32, 32, 3))
    with pytest.raises(AssertionError):
        theirs.forward_intermediates(nchw(images, torch.float64), indices=indices)
    with pytest.raises(ValueError, match="indices"):
        ours.forward_intermediates(jnp.asarray(images), indices=indices)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[torch.nn.Module, dpn_jax.DPN]]:
    theirs = timm_dpn(timm, split=True, k_sec=(1, 1, 1, 1), inc_sec=(4, 4, 8, 4)).double()
    path = save_timm(theirs, tmp_path_factory.mktemp("tiny") / "tiny.safetensors")
    with jax.enable_x64(True):
        yield theirs, dpn_jax.load(path, dtype="float64", param_dtype="float64")


@pytest.mark.parametrize("name", ["dpn68b", "dpn92"])
def test_feature_info_is_timms(name: str) -> None:
    theirs = timm.create_model(name, features_only=True).feature_info
    ours = dpn_jax.DPN(get_config(name), rngs=None).feature_info
    assert [info.channels for info in ours] == theirs.channels()
    assert [info.reduction for info in ours] == theirs.reduction()
    assert [info.index for info in ours] == [0, 1, 2, 3, 4]
