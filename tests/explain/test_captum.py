"""Maps against captum's, on timm's network with the same weights, in float64."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tests.support.timm_models")
pytest.importorskip("captum")
import torch
from captum import attr as captum

import dpn_jax
from dpn_jax import explain
from tests.support.timm_models import nchw, nhwc, random_images, relative_error, save_timm, timm, timm_dpn

SIZES = [(40, 56), (47, 33), (36, 64)]
"""Three images that are not square, with a target each."""
CLASSES = [2, 7, 11]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[torch.nn.Module, dpn_jax.DPN]]:
    theirs = timm_dpn(timm, num_classes=12).double()
    path = save_timm(theirs, tmp_path_factory.mktemp("captum") / "timm.safetensors")
    with jax.enable_x64(True):
        yield theirs, dpn_jax.load(path, dtype="float64", param_dtype="float64")


@pytest.fixture(params=range(3))
def image(request: pytest.FixtureRequest) -> tuple[np.ndarray, int]:
    return random_images((1, *SIZES[request.param], 3), seed=request.param), CLASSES[request.param]


def test_saliency(both: tuple[torch.nn.Module, dpn_jax.DPN], image: tuple[np.ndarray, int]) -> None:
    (theirs, ours), (pixels, index) = both, image
    expected = captum.Saliency(theirs).attribute(nchw(pixels, torch.float64).requires_grad_(), target=index)
    assert relative_error(explain.saliency(ours, pixels, index), nhwc(expected).max(-1)) <= 1e-9


def test_integrated_gradients(both: tuple[torch.nn.Module, dpn_jax.DPN], image: tuple[np.ndarray, int]) -> None:
    (theirs, ours), (pixels, index) = both, image
    method, baseline = captum.IntegratedGradients(theirs), np.full_like(pixels, 0.3)
    expected, delta = method.attribute(
        nchw(pixels, torch.float64), nchw(baseline, torch.float64), index, n_steps=20, return_convergence_delta=True
    )
    got = explain.integrated_gradients(ours, pixels, index, baseline=0.3, steps=20)
    assert relative_error(got.attributions, nhwc(expected)) <= 1e-6
    logits = [theirs(nchw(array, torch.float64))[0, index].item() for array in (pixels, baseline)]
    np.testing.assert_allclose(got.error, np.abs(delta.numpy()) / abs(logits[0] - logits[1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (15, 7), (9, 8)])
def test_occlusion(
    both: tuple[torch.nn.Module, dpn_jax.DPN], image: tuple[np.ndarray, int], window: int, stride: int
) -> None:
    (theirs, ours), (pixels, index) = both, image
    expected = captum.Occlusion(theirs).attribute(
        nchw(pixels, torch.float64), (3, window, window), strides=(3, stride, stride), baselines=0.2, target=index
    )
    got = explain.occlusion(ours, pixels, index, window=window, stride=stride, baseline=0.2)
    assert relative_error(got, nhwc(expected)[..., 0]) <= 1e-6
    assert np.abs(got)[:, [0, -1]].min() > 0  # the border, too


def interpolated(maps: np.ndarray, reduction: int, size: tuple[int, int]) -> np.ndarray:
    """Each feature at its own pixel, a multiple of the reduction, and nothing new beyond the last ones."""
    for axis, pixels in enumerate(size, start=1):
        places = np.arange(maps.shape[axis]) * reduction
        maps = np.apply_along_axis(lambda line, at=places, new=pixels: np.interp(np.arange(new), at, line), axis, maps)
    return maps


def test_grad_cam(both: tuple[torch.nn.Module, dpn_jax.DPN], image: tuple[np.ndarray, int]) -> None:
    (theirs, ours), (pixels, index) = both, image
    method = captum.LayerGradCam(theirs, theirs.features.conv5_bn_ac)
    expected = method.attribute(nchw(pixels, torch.float64), index, relu_attributions=True)
    reduction = ours.feature_info[-1].reduction
    assert expected.shape[-1] == -(-pixels.shape[2] // reduction)
    expected = interpolated(nhwc(expected)[..., 0], reduction, pixels.shape[1:3])
    assert relative_error(explain.grad_cam(ours, pixels, index), expected) <= 1e-6


@pytest.mark.parametrize("index", [0, 1, -1])
def test_grad_cam_of_intermediates(
    both: tuple[torch.nn.Module, dpn_jax.DPN], image: tuple[np.ndarray, int], index: int
) -> None:
    """captum takes layers with one output only: torch's own gradients of what timm's blocks return."""
    (theirs, ours), (pixels, target) = both, image
    info = ours.feature_info[index]
    last = {0: "conv1_1", 1: "conv2_2", 2: "conv3_1"}[info.index]
    outputs = []
    handle = getattr(theirs.features, last).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    logit = theirs(nchw(pixels, torch.float64))[0, target]
    handle.remove()
    maps = outputs[0] if isinstance(outputs[0], tuple) else (outputs[0],)
    gradients = torch.autograd.grad(logit, maps)
    features, gradients = (nhwc(torch.cat(tuple(parts), 1)) for parts in (maps, gradients))
    weights = gradients.mean((1, 2), keepdims=True)
    expected = interpolated(np.maximum((weights * features).sum(-1), 0), info.reduction, pixels.shape[1:3])
    assert relative_error(explain.grad_cam(ours, pixels, target, index=index), expected) <= 1e-6

    with np.errstate(invalid="ignore"):  # 0 / 0
        alphas = gradients**2 / (2 * gradients**2 + features.sum((1, 2), keepdims=True) * gradients**3)
    weights = (np.nan_to_num(alphas) * np.maximum(gradients, 0)).sum((1, 2), keepdims=True)
    expected = interpolated(np.maximum((weights * features).sum(-1), 0), info.reduction, pixels.shape[1:3])
    assert relative_error(explain.grad_cam_plus_plus(ours, pixels, target, index=index), expected) <= 1e-6


def test_batches_of_images_with_different_targets(both: tuple[torch.nn.Module, dpn_jax.DPN]) -> None:
    _, ours = both
    pixels = jnp.asarray(random_images((3, 40, 56, 3)))
    top = np.asarray(ours(pixels).argmax(-1))
    methods = {
        "saliency": explain.saliency,
        "grad_cam": explain.grad_cam,
        "occlusion": explain.occlusion,
        "integrated_gradients": lambda *given: explain.integrated_gradients(*given, steps=5).attributions,
    }
    for name, method in methods.items():
        together = method(ours, pixels, CLASSES)
        for number, index in enumerate(CLASSES):
            alone = method(ours, pixels[number : number + 1], index)
            np.testing.assert_allclose(together[number], alone[0], rtol=1e-8, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(method(ours, pixels), method(ours, pixels, top), rtol=1e-10, err_msg=name)
