import copy
import gc
import io
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dpn_jax
from dpn_jax.errors import ImageError
from dpn_jax.fast.fold import Folded
from dpn_jax.images.transform import Transform
from dpn_jax.inference.pipeline import Pipeline
from dpn_jax.inference.throughput import Clock
from tests.support.models import TINY, randomize


@pytest.fixture(scope="module")
def classifier() -> dpn_jax.Classifier:
    model = dpn_jax.create_model(TINY, rngs=nnx.Rngs(0))
    transform = dpn_jax.preprocessing(dpn_jax.Preprocessing(image_size=32))
    return dpn_jax.Classifier(model, transform=transform, labels="abcde", batch_size=4)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8) for seed in range(11)]


def test_one_image_and_many_agree_whatever_the_padding(
    classifier: dpn_jax.Classifier, pictures: list[np.ndarray]
) -> None:
    together = classifier(pictures, top_k=5)
    assert len(together) == 11
    for picture, expected in zip(pictures, together, strict=True):
        alone = classifier(picture, top_k=5)
        assert [prediction.label for prediction in alone] == [prediction.label for prediction in expected]
        np.testing.assert_allclose([p.probability for p in alone], [p.probability for p in expected], rtol=1e-5)
        assert sum(p.probability for p in alone) == pytest.approx(1)
        assert [p.probability for p in alone] == sorted((p.probability for p in alone), reverse=True)
        assert all(p.label == "abcde"[p.index] for p in alone)


def test_probabilities_are_the_models(classifier: dpn_jax.Classifier, pictures: list[np.ndarray]) -> None:
    model = dpn_jax.create_model(TINY, rngs=nnx.Rngs(0))
    model.eval()
    logits = nnx.jit(lambda model, images: model(images))(model, classifier.transform(pictures[0])[None])
    expected = jax.nn.softmax(logits[0])
    got = {prediction.index: prediction.probability for prediction in classifier(pictures[0])}
    np.testing.assert_allclose([got[index] for index in range(5)], expected, rtol=1e-5)


def test_a_bad_image_does_not_stop_the_others(
    classifier: dpn_jax.Classifier, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    good = tmp_path / "good.png"
    Image.fromarray(pictures[0]).save(good)
    sources = [good, tmp_path / "missing.jpg", *pictures[1:5], tmp_path / "missing too.jpg", good]
    results = list(classifier.stream(sources))
    assert [isinstance(result, ImageError) for result in results] == [False, True, *[False] * 4, True, False]
    for result in (results[-1], classifier(str(good))):
        np.testing.assert_allclose([p.probability for p in result], [p.probability for p in results[0]], rtol=1e-5)
    with pytest.raises(ImageError, match=r"missing\.jpg"):
        classifier(sources)


def test_a_batch_of_bad_images_only(classifier: dpn_jax.Classifier) -> None:
    assert all(
        isinstance(result, ImageError) for result in classifier.stream(["no", "none", "nothing", "nowhere", "x"])
    )
    assert classifier([]) == []


def test_few_sizes_are_compiled(pictures: list[np.ndarray]) -> None:
    model = dpn_jax.create_model(TINY, rngs=nnx.Rngs(0))
    classifier = dpn_jax.Classifier(
        model, transform=dpn_jax.preprocessing(dpn_jax.Preprocessing(image_size=32)), batch_size=4
    )
    for count in (1, 2, 3, 4, 5, 7, 11):
        classifier(pictures[:count])
    assert classifier._pipeline.program.jitted._cache_size() == 3  # 1, 2 and 4


def test_two_classes_with_the_defaults(pictures: list[np.ndarray]) -> None:
    classifier = dpn_jax.Classifier(dpn_jax.create_model(TINY, num_classes=2, rngs=nnx.Rngs(0)))
    both = classifier(pictures[0])
    assert len(both) == 2
    assert dpn_jax.evaluate(classifier, [(pictures[0], 0), (pictures[0], 1)]).top5 == (2, 2)


def test_an_encoded_image_is_the_file(
    classifier: dpn_jax.Classifier, pictures: list[np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(pictures[0]).save(path)
    data = path.read_bytes()
    results = [classifier(data), *classifier([path, data, memoryview(data), io.BytesIO(data)])]
    for result in results:
        np.testing.assert_allclose([p.probability for p in result], [p.probability for p in results[0]], rtol=1e-5)
    with pytest.raises(ImageError, match="bytes: not an image") as caught:
        classifier(b"\xff" * 353_469)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("top_k", [0, -1, 6])
def test_top_k_out_of_range(classifier: dpn_jax.Classifier, pictures: list[np.ndarray], top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k must be 1 to 5, got {top_k}"):
        classifier(pictures[0], top_k=top_k)


def test_unfit_arguments() -> None:
    model = dpn_jax.create_model(TINY, rngs=nnx.Rngs(0))
    for options, message in [
        ({"labels": ["a", "b"]}, "5 classes, but there are 2 labels"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"transform": dpn_jax.preprocessing(dpn_jax.Preprocessing(mean=(0.5,), std=(0.5,)))}, "reads 3 channels"),
    ]:
        with pytest.raises(ValueError, match=message):
            dpn_jax.Classifier(model, **options)
    for changes in ({"num_classes": 0}, {"global_pool": ""}):
        with pytest.raises(ValueError, match="one logit per class"):
            dpn_jax.Classifier(dpn_jax.create_model(TINY, **changes, rngs=nnx.Rngs(0)))


def test_imagenet_labels_come_with_1000_classes() -> None:
    classifier = dpn_jax.Classifier(dpn_jax.create_model(TINY, num_classes=1000, rngs=nnx.Rngs(0)))
    assert classifier.labels[281] == "tabby, tabby cat"
    assert classifier.synsets[281] == "n02123045"


def test_gray_images_for_one_channel(pictures: list[np.ndarray]) -> None:
    classifier = dpn_jax.Classifier(dpn_jax.create_model(TINY, in_channels=1, rngs=nnx.Rngs(0)))
    assert classifier.transform(pictures[0]).shape == (224, 224, 1)
    assert len(classifier(pictures[0])) == 5


def test_a_smaller_last_batch_compiles_nothing(pictures: list[np.ndarray]) -> None:
    model = dpn_jax.create_model(TINY, rngs=nnx.Rngs(0))
    classifier = dpn_jax.Classifier(
        model, transform=dpn_jax.preprocessing(dpn_jax.Preprocessing(image_size=32)), batch_size=4
    )
    assert len(list(classifier.stream(["broken", *pictures[:8], "broken", "broken"]))) == 11
    assert classifier._pipeline.program.jitted._cache_size() == 1


@pytest.mark.parametrize(("reading", "computing", "limit"), [(0.05, 0.0, "host"), (0.0, 0.05, "device")])
def test_the_slower_side_is_named(
    classifier: dpn_jax.Classifier,
    pictures: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    reading: float,
    computing: float,
    limit: str,
) -> None:
    pipeline = classifier._pipeline
    jitted = pipeline.program.jitted

    class Slow(Transform):
        def crop(self, source: np.ndarray) -> np.ndarray:
            time.sleep(reading)
            return super().crop(source)

    def slow_device(params: Folded, images: jax.Array) -> jax.Array:
        time.sleep(computing)
        return jitted(params, images)

    monkeypatch.setattr(pipeline, "transform", Slow(classifier.transform.preprocessing))
    monkeypatch.setattr(pipeline.program, "jitted", slow_device)
    monkeypatch.setattr(pipeline, "batch_size", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    list(classifier.stream(pictures))
    throughput = classifier.throughput
    assert throughput.limit == limit
    slower, faster = sorted((throughput.host, throughput.device))
    assert slower <= 1 / 0.05 < faster
    assert throughput.rate == pytest.approx(slower, rel=0.4)  # on a busy machine
    list(classifier.stream(pictures[:3]))
    assert classifier.throughput is None  # all of these were ready while the first was compiled


def test_threads_count_together() -> None:
    clock = Clock(workers=4, read_ahead=0)
    for seconds in (0.25, 0.75):
        clock.count_prepared(1, seconds)
    assert clock.throughput() is None
    for compiles in (True, False):
        rows = clock.wait(jnp.ones((8, 2)), time.perf_counter() - 2, 5, compiles=compiles)
        assert rows.shape == (5, 2)
    throughput = clock.throughput()
    assert throughput.host == 8
    assert throughput.device == throughput.rate > 5 / 2  # the second batch is not charged for the time of the first


def test_pixels_are_normalized_in_the_program(classifier: dpn_jax.Classifier, pictures: list[np.ndarray]) -> None:
    crops = np.stack([classifier.transform.crop(picture) for picture in pictures])
    assert crops.dtype == np.uint8
    expected = classifier.logits(classifier.transform.normalize(crops))
    np.testing.assert_allclose(classifier.logits(crops), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda classifier: pickle.loads(pickle.dumps(classifier))])
def test_a_copy_classifies_alike(
    classifier: dpn_jax.Classifier, pictures: list[np.ndarray], duplicate: Callable[..., dpn_jax.Classifier]
) -> None:
    expected = classifier(pictures)
    copied = duplicate(classifier)
    assert copied(pictures) == expected
    assert copied.devices == classifier.devices


def test_parameters_are_on_a_device_once(pictures: list[np.ndarray]) -> None:
    before = sum(array.nbytes for array in jax.live_arrays())
    model = dpn_jax.create_model(TINY, rngs=nnx.Rngs(0))
    size = sum(array.nbytes for array in jax.live_arrays()) - before
    classifier = dpn_jax.Classifier(model, donate=True, devices=jax.devices()[:1])
    del model
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 1.2 * size
    assert classifier(pictures[0])


@pytest.mark.parametrize("batch_size", [1, 3, 6, 10, 16])
def test_padding_never_comes_back(pictures: list[np.ndarray], batch_size: int) -> None:
    model = randomize(dpn_jax.create_model(TINY))
    transform = dpn_jax.preprocessing(dpn_jax.Preprocessing(image_size=32))
    classifier = dpn_jax.Classifier(model, transform=transform, batch_size=batch_size)
    crops = np.stack([transform.crop(picture) for picture in pictures])
    expected = np.concatenate([classifier.logits(crop[None]) for crop in crops])
    for count in (0, 1, 5, 11):
        logits = classifier.logits(crops[:count])
        assert logits.shape == (count, 5)
        np.testing.assert_allclose(logits, expected[:count], rtol=1e-4, atol=1e-5)
    streamed = list(classifier.stream(pictures, top_k=1))
    assert [best.index for (best,) in streamed] == expected.argmax(1).tolist()


def test_prepared_images_are_taken_as_they_are(classifier: dpn_jax.Classifier, pictures: list[np.ndarray]) -> None:
    crops = [classifier.transform.crop(picture) for picture in pictures]
    strange = [pictures[0], crops[0].astype(np.float32), "photo.jpg", ImageError("broken")]
    results = list(classifier.stream([*crops, *strange], prepared=True))
    assert results[:11] == list(classifier.stream(pictures))
    assert [str(result) for result in results[11:]] == [
        "a prepared image must be uint8 [32, 32, 3], got uint8 [40, 50, 3]",
        "a prepared image must be uint8 [32, 32, 3], got float32 [32, 32, 3]",
        "a prepared image must be uint8 [32, 32, 3], got str",
        "broken",
    ]


def test_a_part_of_a_list_gets_the_bits_of_the_whole(
    pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, dispatch = [], Pipeline._dispatch
    monkeypatch.setattr(
        Pipeline, "_dispatch", lambda self, images, size: sizes.append(size) or dispatch(self, images, size)
    )
    classifier = dpn_jax.Classifier(randomize(dpn_jax.create_model(TINY)), batch_size=8)
    whole = list(classifier.stream(pictures))
    assert list(classifier.stream(pictures[8:], total=11)) == whole[8:]
    assert list(classifier.stream(pictures[8:], total=3)) != []
    assert sizes == [8, 8, 8, 4]  # another size is another program, which may round otherwise


@pytest.mark.slow
def test_worker_processes_change_nothing(tmp_path: Path, pictures: list[np.ndarray]) -> None:
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    files = [*sorted(tmp_path.iterdir()), tmp_path / "missing.png"]
    model = randomize(dpn_jax.create_model(TINY))
    *some, missing = dpn_jax.Classifier(model, workers=2).stream(files)
    assert some == dpn_jax.Classifier(model)(files[:-1])
    assert isinstance(missing, ImageError)


@pytest.mark.parametrize("fast", [True, False])
def test_features_are_what_the_head_reads(pictures: list[np.ndarray], fast: bool) -> None:
    model = randomize(dpn_jax.DPN(TINY, rngs=None))
    transform = dpn_jax.preprocessing(dpn_jax.Preprocessing(image_size=32))
    classifier = dpn_jax.Classifier(model, transform=transform, batch_size=4, fast=fast, labels=tuple("abcde"))
    features = classifier.features(pictures[:5])
    assert features.shape == (5, TINY.num_features) and features.dtype == np.float32
    images = np.stack([transform(picture) for picture in pictures[:5]])
    plain = nnx.jit(lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True))(model, images)
    np.testing.assert_allclose(features, plain, rtol=1e-4, atol=1e-4)
    again = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(again.features(pictures[:5]), features)
    assert classifier.features([]).shape == (0, TINY.num_features)
    assert classifier.logits(images[:0]).shape == (0, 5)
    with pytest.raises(ImageError, match=r"gone\.png"):
        classifier.features([pictures[0], "gone.png"])


def test_features_of_changed_models_are_their_own_or_refused(pictures: list[np.ndarray]) -> None:
    class Brighter(dpn_jax.DPN):
        def __call__(self, images: jax.Array) -> jax.Array:
            return super().__call__(images + 1)

    class BrighterWithin(Brighter):
        def forward_features(self, images: jax.Array) -> jax.Array:
            return super().forward_features(images + 1)

    settings = {"transform": dpn_jax.preprocessing(dpn_jax.Preprocessing(image_size=32)), "fast": False}
    classifier = dpn_jax.Classifier(randomize(Brighter(TINY, rngs=None)), **settings)
    with pytest.raises(ValueError, match="Brighter overrides __call__, which does not tell its features"):
        classifier.features(pictures[:2])
    model = randomize(BrighterWithin(TINY, rngs=None))
    images = np.stack([settings["transform"](picture) for picture in pictures[:2]])
    expected = nnx.jit(lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True))(model, images)
    got = dpn_jax.Classifier(model, **settings).features(pictures[:2])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
