"""What maps promise beside captum: completeness, their place in the photo, and that they depend on the network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dpn_jax
from dpn_jax import explain
from dpn_jax.images.transform import Transform
from dpn_jax.pretrained import Preprocessing
from tests.support.changed_models import CHANGED, changed_model
from tests.support.models import TINY, randomize
from tests.support.photos import skimage_photo

DIGITS = sorted((Path(__file__).parents[2] / "samples" / "digits").glob("*.png"))


@pytest.fixture(scope="module")
def digits() -> tuple[dpn_jax.DPN, np.ndarray]:
    transform = dpn_jax.preprocessing("dpn_tiny.digits")
    return dpn_jax.from_pretrained("dpn_tiny.digits"), np.stack([transform(path) for path in DIGITS])


@pytest.fixture(scope="module")
def tiny() -> dpn_jax.DPN:
    return randomize(dpn_jax.create_model(TINY, rngs=nnx.Rngs(0)))


@pytest.mark.slow
@pytest.mark.optimized
def test_attributions_sum_to_the_difference_of_the_logits(digits: tuple[dpn_jax.DPN, np.ndarray]) -> None:
    model, images = digits
    settings = dpn_jax.preprocessing("dpn_tiny.digits").preprocessing
    black = (-np.array(settings.mean) / settings.std).astype(np.float32)
    found = explain.integrated_gradients(model, images, baseline=black, steps=300)
    logits = nnx.jit(lambda model, images: model(images))(nnx.view(model, use_running_average=True), images)
    nothing = nnx.jit(lambda model, images: model(images))(
        nnx.view(model, use_running_average=True), jnp.broadcast_to(black, images.shape)
    )
    top = logits.argmax(-1)
    difference = np.take_along_axis(np.asarray(logits - nothing), np.asarray(top)[:, None], 1)[:, 0]
    assert found.error.max() < 0.01
    np.testing.assert_allclose(found.attributions.sum((1, 2, 3)), difference, rtol=0.01)
    assert explain.integrated_gradients(model, images, baseline=black, steps=1).error.max() > 0.1


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
    ("method", "most"),
    [
        (lambda model, images: explain.grad_cam(model, images, index=2), 0.2),  # 4 x 4 features
        (lambda model, images: explain.integrated_gradients(model, images).attributions.sum(-1), 0.2),
        (lambda model, images: explain.occlusion(model, images, window=8, stride=4), 0.2),
        # without a sign it shows the strokes, whatever the network has learned: 0.5 on these images
        (lambda model, images: explain.saliency(model, images, samples=8), 0.7),
    ],
    ids=["grad_cam", "integrated_gradients", "occlusion", "smooth_grad"],
)
def test_maps_depend_on_what_was_learned(
    method: Callable[..., jax.Array], most: float, digits: tuple[dpn_jax.DPN, np.ndarray]
) -> None:
    model, images = digits
    maps = method(model, images)
    np.testing.assert_allclose(explain.rank_correlation(maps, maps), 1)
    others = [method(explain.randomized(model, seed=seed), images) for seed in range(3)]
    correlations = np.stack([explain.rank_correlation(maps, other) for other in others])
    assert np.abs(np.nanmean(correlations)) < most, correlations


def test_randomized_forgets_from_the_end(tiny: dpn_jax.DPN) -> None:
    def changed(stages: int | None) -> set[str]:
        other = explain.randomized(tiny, stages=stages)
        pairs = zip(*(nnx.to_flat_state(nnx.state(model, nnx.Param)) for model in (tiny, other)), strict=True)
        return {path[0] if path[0] != "stages" else f"stage {path[1]}" for (path, a), (_, b) in pairs
                if not np.array_equal(a.get_value(), b.get_value())}  # fmt: skip

    assert changed(0) == {"classifier"}
    assert changed(1) == {"classifier", "stage 1"}
    assert changed(2) == {"classifier", "stage 0", "stage 1"}
    assert changed(None) == {"classifier", "stage 0", "stage 1", "stem"}
    kernel, shuffled = (model.classifier.kernel[...] for model in (tiny, explain.randomized(tiny)))
    np.testing.assert_array_equal(np.sort(kernel, axis=None), np.sort(shuffled, axis=None))


@pytest.mark.slow
@pytest.mark.optimized
def test_a_good_map_inserts_early_and_deletes_early(digits: tuple[dpn_jax.DPN, np.ndarray]) -> None:
    model, images = digits
    good = explain.occlusion(model, images, window=4, stride=2)
    inserted, worst = explain.insertion(model, images, good), explain.insertion(model, images, -good)
    deleted, spared = explain.deletion(model, images, good), explain.deletion(model, images, -good)
    assert inserted.area.mean() > worst.area.mean() + 0.2
    assert deleted.area.mean() < spared.area.mean() - 0.2
    # both ends are the image and the baseline
    np.testing.assert_allclose(inserted.probabilities[:, -1], deleted.probabilities[:, 0], rtol=1e-5)
    np.testing.assert_allclose(inserted.probabilities[:, 0], deleted.probabilities[:, -1], rtol=1e-5)
    np.testing.assert_array_equal(inserted.fractions[[0, -1]], [0, 1])
    halves = (inserted.probabilities[:, 1:] + inserted.probabilities[:, :-1]) / 2
    np.testing.assert_allclose(inserted.area, halves.mean(1), rtol=1e-5)


def test_features_lie_on_their_pixels(tiny: dpn_jax.DPN) -> None:
    """The gradient of a feature is centered on the pixel where `grad_cam` puts it."""
    images = np.random.default_rng(0).normal(size=(16, 96, 96, 3)).astype(np.float32)
    for index in (0, 1, 2, None):
        field = explain.receptive_field(tiny, images, index=index)
        assert abs(field.map.max() - 1) < 1e-6 and field.size > 1
        weights = np.asarray(field.map, np.float64) ** 2
        for axis, center in enumerate(field.center):
            mean = (weights.sum(1 - axis) * np.arange(96)).sum() / weights.sum()
            assert abs(mean - center) < 1, (index, axis, mean, center)
    assert explain.receptive_field(tiny, images, index=1, position=(3, 5)).center == (12, 20)


def test_a_map_lies_where_its_pixels_were(tmp_path: Path) -> None:
    """A white spot in a photo, found by its place in the network's input, and drawn back over the photo."""
    for preprocessing in (
        Preprocessing(image_size=96, crop_fraction=0.8),
        Preprocessing(image_size=(64, 96), crop_fraction=0.9),
        Preprocessing(image_size=96, crop_mode="squash"),
        Preprocessing(image_size=96, crop_mode="border", crop_fraction=1.0),
    ):
        color = np.rint(255 * np.array(preprocessing.mean)).astype(np.uint8)  # also that of borders
        photo = np.full((300, 421, 3), color)
        photo[150:158, 260:268] = 255
        transform = Transform(preprocessing)
        spot = transform(Image.fromarray(photo)).mean(-1)
        drawn = (
            np.asarray(explain.overlay(np.zeros_like(photo), np.maximum(spot - 0.1, 0), transform=transform))
            .sum(-1)
            .astype(float)
        )
        assert drawn.shape == photo.shape[:2]
        for axis, center in enumerate((153.5, 263.5)):
            weights = drawn.sum(1 - axis)
            mean = (weights * np.arange(len(weights))).sum() / weights.sum()
            scale = photo.shape[axis] / spot.shape[axis]
            assert abs(mean - center) < scale / 2, (preprocessing, axis, mean)  # half a pixel of the input


def test_outside_the_crop_the_photo_is_as_it_was() -> None:
    photo = skimage_photo("chelsea.png")
    transform = Transform(Preprocessing(image_size=64))
    image = np.asarray(Image.open(photo))
    drawn = np.asarray(explain.overlay(photo, np.ones((64, 64)), transform=transform))
    left, top, right, bottom = transform.region(image.shape[1], image.shape[0])
    inside = np.zeros(image.shape[:2], bool)
    inside[int(top + 0.5) : int(bottom + 0.5), int(left + 0.5) : int(right + 0.5)] = True
    np.testing.assert_array_equal(drawn[~inside], image[~inside])
    assert (drawn[inside] != image[inside]).any(-1).all()


def test_a_zero_map_stays_zero(tiny: dpn_jax.DPN) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    for map in (np.zeros((8, 8)), -np.ones((8, 8))):
        np.testing.assert_array_equal(explain.overlay(photo, map), photo)
    constant = nnx.clone(tiny)
    constant.classifier.kernel.set_value(jnp.zeros_like(constant.classifier.kernel[...]))
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    for method in (explain.saliency, explain.grad_cam, explain.grad_cam_plus_plus, explain.occlusion):
        np.testing.assert_array_equal(method(constant, images), 0)
    found = explain.integrated_gradients(constant, images)
    np.testing.assert_array_equal(found.attributions, 0)
    np.testing.assert_array_equal(found.error, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*CHANGED[:2], *(pytest.param(name, marks=pytest.mark.exhaustive) for name in CHANGED[2:])]
)
def test_a_changed_model_is_explained_as_it_is(name: str) -> None:
    model = changed_model(name)
    images = np.random.default_rng(0).normal(size=(4, 32, 48, 3)).astype(np.float32)
    model.train()
    for method in (explain.saliency, explain.grad_cam, explain.occlusion):
        maps = method(model, images, 1)
        assert maps.shape == (4, 32, 48) and np.isfinite(maps).all()
        assert np.ptp(maps) > 0 or method is explain.grad_cam  # all its features may speak against the class
    assert not model.norm.use_running_average  # as it was
    evaluated = nnx.view(model, use_running_average=True, deterministic=True)
    gradient = jax.grad(lambda images: evaluated(images)[:, 1].sum())(jnp.asarray(images))
    np.testing.assert_allclose(explain.saliency(model, images, 1), jnp.abs(gradient).max(-1), rtol=1e-3, atol=1e-6)
    explain.path_shares(model, images)
    explain.receptive_field(model, images)


def test_rematerialized_models_too(tiny: dpn_jax.DPN) -> None:
    images = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    other = randomize(dpn_jax.create_model(TINY, remat=True, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(explain.grad_cam(other, images), explain.grad_cam(tiny, images), rtol=1e-4, atol=1e-6)
    assert len(explain.path_shares(other, images)) == len(explain.path_shares(tiny, images))


def test_any_module_with_logits() -> None:
    class Mean(nnx.Module):
        def __call__(self, images: jax.Array) -> jax.Array:
            return images.mean((1, 2)) * jnp.asarray([1.0, 2.0, 4.0])

    images = np.ones((2, 8, 10, 3), np.float32)
    np.testing.assert_allclose(explain.saliency(Mean(), images), 4 / 80, rtol=1e-6)
    covered = explain.occlusion(Mean(), images, 0, window=4, stride=4)
    np.testing.assert_allclose(covered[..., :8], 16 / 80, rtol=1e-5)
    np.testing.assert_allclose(covered[..., 8:], 8 / 80, rtol=1e-5)  # the last windows are half as wide
    with pytest.raises(ValueError, match="model must be a DPN, whose features are known, got a Mean"):
        explain.grad_cam(Mean(), images)


IMAGES = np.zeros((2, 32, 48, 3), np.float32)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda model: explain.grad_cam(model, IMAGES, index=3), r"index must be None or in -3 to 2, got 3"),
        (lambda model: explain.grad_cam(model, IMAGES, index=True), r"index must be None or in -3 to 2, got True"),
        (lambda model: explain.grad_cam(model, IMAGES[:, :8, :8]), r"index None gives a single feature for .* 8 x 8"),
        (lambda model: explain.saliency(model, IMAGES, 5), r"classes must be in 0 to 4, got 5"),
        (lambda model: explain.saliency(model, IMAGES, [0, -1]), r"classes must be in 0 to 4, got -1"),
        (lambda model: explain.saliency(model, IMAGES, [0, 1, 2]), r"classes must be None, an integer, or 2 of them"),
        (lambda model: explain.saliency(model, IMAGES, 1.5), r"classes must be None, an integer.*got 1.5"),
        (lambda model: explain.saliency(model, IMAGES, samples=0), r"samples must be at least 1 .* got 0"),
        (lambda model: explain.saliency(model, IMAGES[..., :1]), r"images must be \[B, H, W, 3\], got"),
        (lambda model: explain.saliency(model, IMAGES[0]), r"images must be \[B, H, W, 3\]"),
        (lambda model: explain.saliency(model, IMAGES.astype(np.uint8)), r"images must be normalized floats"),
        (lambda model: explain.saliency("dpn92", IMAGES), r"model must be a module such as a DPN, got 'dpn92'"),
        (lambda model: explain.integrated_gradients(model, IMAGES, steps=0), r"steps must be at least 1, got 0"),
        (lambda model: explain.integrated_gradients(model, IMAGES, baseline=np.zeros(5)), r"baseline must broadcast"),
        (lambda model: explain.occlusion(model, IMAGES, window=33), r"window must be in 1 to 32, .*got 33"),
        (lambda model: explain.occlusion(model, IMAGES, window=8, stride=9), r"stride must be in 1 to 8, .*got 9"),
        (lambda model: explain.insertion(model, IMAGES, np.zeros((2, 32, 32))), r"maps must be \[2, 32, 48\]"),
        (lambda model: explain.deletion(model, IMAGES, IMAGES[..., 0], steps=0), r"steps must be in 1 to 1536"),
        (lambda model: explain.randomized(model, stages=3), r"stages must be None or in 0 to 2, got 3"),
        (lambda model: explain.rank_correlation(np.zeros((1, 2, 2)), np.zeros((1, 2, 3))), r"a and b must be maps"),
        (lambda model: explain.receptive_field(model, IMAGES, position=(4, 6)), r"position must be .*got \(4, 6\)"),
        (lambda model: explain.overlay(IMAGES[0].astype(np.uint8), IMAGES[..., 0]), r"map must be .*got \[2, 32, 48\]"),
        (lambda model: explain.overlay(IMAGES[0].astype(np.uint8), np.full((2, 2), np.nan)), r"map must be finite"),
        (lambda model: explain.overlay(IMAGES[0].astype(np.uint8), np.eye(2), color_map="jett"), r"color_map must be"),
        (lambda model: explain.overlay(IMAGES[0].astype(np.uint8), np.eye(2), opacity=2), r"opacity must be in"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(run: Callable[[dpn_jax.DPN], Any], message: str, tiny: dpn_jax.DPN) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        run(tiny)
    assert "\n" not in str(caught.value)


def test_maps_of_logits_are_refused(tiny: dpn_jax.DPN) -> None:
    model = dpn_jax.create_model(TINY, global_pool="")
    with pytest.raises(ValueError, match=r"one row of logits for each image, got \[2, 4, 6, 5\]"):
        explain.saliency(model, IMAGES)
