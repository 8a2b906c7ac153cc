"""From photos to labels: a model, its preprocessing and its class names, compiled for a few batch sizes."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self, overload

import numpy as np

from dpn_jax.checkpoint.load import from_pretrained
from dpn_jax.config import DPNConfig
from dpn_jax.errors import ImageError
from dpn_jax.fast.forward import PlainForward, fast_forward
from dpn_jax.images.labels import named_classes
from dpn_jax.images.read import ImageSource
from dpn_jax.images.transform import Transform
from dpn_jax.inference.export import Artifact, read_artifact
from dpn_jax.inference.prediction import Prediction, most_probable
from dpn_jax.inference.program import Devices, Program, find_devices
from dpn_jax.inference.runner import Runner
from dpn_jax.model import DPN
from dpn_jax.pretrained import default_preprocessing


class Classifier(Runner):
    """Classifies photos.

    Args:
      model: the model; runs in eval mode. Later changes to it have no effect.
      transform: prepares an image; defaults to that of the weights, or of the architecture's default weights.
      labels: a name for each class; defaults to the model's class names, or ImageNet-1k's.
      batch_size: images in the largest batch, over all devices. Smaller ones are padded to a power of two, so that only
        a few sizes are compiled, and all to a multiple of the number of devices.
      devices: where to run: a device, several, which share each batch, or "all" of this process; defaults to JAX's
        default device. (A CPU has as many as `jax.config.update("jax_num_cpu_devices", 2)` says before its first use.)
      workers: processes that read and prepare images; defaults to 0, a thread for each CPU core.
      fast: run the backend's fast form; False runs the model as it is, which any changed model needs.
      donate: give the model's arrays away, see `fast_forward`.

    Attributes:
      labels: name of each class.
      synsets: WordNet id of each class, for ImageNet-1k; None elsewhere.
      config: the model's architecture; None for an exported one, which does not tell.

    Raises:
      ValueError: the model has no classifier, its number of channels is not the transform's, the number of labels is
        not that of the classes, the devices cannot work together (see `find_devices`), or the model is not stock (see
        `dpn_jax.stock`) and `fast` is set.

    Example:
      >>> import dpn_jax
      >>> model = dpn_jax.create_model("dpn_tiny", num_classes=3)
      >>> classifier = Classifier(model, labels=("cat", "dog", "bird"))
      >>> best, second = classifier(np.zeros((300, 300, 3), np.uint8), top_k=2)
      >>> best.probability >= second.probability
      True
    """

    def __init__(
        self,
        model: DPN,
        *,
        transform: Transform | None = None,
        labels: Sequence[str] | None = None,
        batch_size: int = 32,
        devices: Devices = None,
        workers: int = 0,
        fast: bool = True,
        donate: bool = False,
    ) -> None:
        config, provenance = model.config, model.provenance
        if not config.num_classes or not config.global_pool:
            raise ValueError("the model does not give one logit per class (num_classes is 0 or global_pool is '')")
        transform = transform or Transform(provenance.preprocessing or default_preprocessing(config))
        settings = transform.preprocessing
        if len(settings.mean) != config.in_channels:
            raise ValueError(
                f"the model reads {config.in_channels} channels, but the preprocessing gives {len(settings.mean)}"
            )
        chosen = find_devices(devices)
        names = provenance.class_names if labels is None else labels
        self.labels, self.synsets = named_classes(names, config.num_classes)
        forward = fast_forward(model, backend=chosen[0].platform, donate=donate) if fast else PlainForward(model)
        options = forward.compiler_options
        program = Program(forward.apply, forward.params, settings, chosen, compiler_options=options)
        forward.params = program.params  # which `forward.apply` keeps alive
        self.config: DPNConfig | None = config
        widths = config.num_classes, config.head_features
        super().__init__(program, transform, batch_size, workers, widths=widths, pre_logits=forward.pre_logits)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        transform: Transform | None = None,
        labels: Sequence[str] | None = None,
        batch_size: int = 32,
        devices: Devices = None,
        workers: int = 0,
        fast: bool = True,
        **options: object,
    ) -> Self:
        """Loads pretrained weights into a classifier.

        Args:
          source: as for `dpn_jax.from_pretrained`.
          transform, labels, batch_size, devices, workers, fast: as for `Classifier`.
          options: other keyword arguments of `dpn_jax.from_pretrained`, such as `dtype=jnp.bfloat16`.

        Raises:
          CheckpointError, ValueError: as `dpn_jax.from_pretrained` and `Classifier`.
        """
        model = from_pretrained(source, **options)
        return cls(
            model,
            transform=transform,
            labels=labels,
            batch_size=batch_size,
            devices=devices,
            workers=workers,
            fast=fast,
            donate=True,
        )

    @classmethod
    def from_exported(
        cls,
        source: str | Path | Artifact,
        *,
        transform: Transform | None = None,
        labels: Sequence[str] | None = None,
        batch_size: int = 32,
        devices: Devices = None,
        workers: int = 0,
    ) -> Self:
        """Reads a file of `export_model` as a classifier.

        Args:
          source: the file, or what `read_artifact` read.
          transform: prepares an image, with the preprocessing in the file, which is the default.
          labels: a name for each class; defaults to those in the file.
          batch_size, devices, workers: as for `Classifier`; a file for a fixed batch has it on each device.

        Raises:
          ExportError: the file cannot be read, was written by dpn_jax 0.1.0, or is for other platforms.
          ValueError: as for `Classifier`, or the transform has another preprocessing.
        """
        artifact = source if isinstance(source, Artifact) else read_artifact(source)
        transform = transform or Transform(artifact.preprocessing)
        if transform.preprocessing != artifact.preprocessing:
            raise ValueError(f"the exported model needs {artifact.preprocessing}, got {transform.preprocessing}")
        chosen = find_devices(devices)
        artifact.require(chosen[0].platform)
        images, logits = artifact.exported.in_avals[0], artifact.exported.out_avals[0]
        fixed = images.shape[0] if isinstance(images.shape[0], int) else None
        program = Program(
            lambda _, images: artifact.exported.call(images),
            (),
            artifact.preprocessing,
            chosen,
            raw=images.dtype == np.uint8,
            rows_each=fixed,
        )
        batch_size = program.rows(1) if fixed else batch_size
        names = (artifact.class_names, artifact.synsets) if labels is None else named_classes(labels, logits.shape[1])
        classifier = cls.__new__(cls)
        classifier.labels, classifier.synsets = names
        classifier.config = None
        Runner.__init__(classifier, program, transform, batch_size, workers, widths=(logits.shape[1], 0))
        return classifier

    @overload
    def __call__(self, images: ImageSource, *, top_k: int | None = None) -> list[Prediction]: ...

    @overload
    def __call__(self, images: Sequence[ImageSource], *, top_k: int | None = None) -> list[list[Prediction]]: ...

    def __call__(
        self, images: ImageSource | Sequence[ImageSource], *, top_k: int | None = None
    ) -> list[Prediction] | list[list[Prediction]]:
        """Classifies one image, or several.

        Args:
          images: what `read_image` accepts, such as a path, the bytes of a file, a PIL image or a uint8 array
            `[H, W, 3]`; or a list or tuple of these.
          top_k: number of classes to return, 1 to the number of classes; defaults to 5, or to all if there are fewer.

        Returns:
          The most probable classes, best first; for several images, a list of these lists.

        Raises:
          ImageError: an image cannot be read.
          ValueError: `top_k` is below 1 or above the number of classes.
        """
        several = isinstance(images, list | tuple)
        results = []
        for result in self.stream(images if several else [images], top_k=top_k):
            if isinstance(result, ImageError):
                raise result
            results.append(result)
        return results if several else results[0]

    def stream(
        self,
        images: Iterable[ImageSource],
        *,
        top_k: int | None = None,
        prepared: bool = False,
        total: int | None = None,
    ) -> Iterator[list[Prediction] | ImageError]:
        """Classifies any number of images as they come; one that cannot be read does not stop the others.

        Args:
          images: as for a call; only a few batches are read ahead.
          top_k: as for a call.
          prepared: the images are what `transform.crop` gives: uint8 `[height, width, C]`, resized and cropped.
          total: how many images there are; defaults to what comes. It decides how far the first batches are padded: a
            part of a list gets the very bits that the whole gets if it is given the length of the whole.

        Yields:
          For each image, in order, its most probable classes, or the error if it cannot be read.

        Raises:
          ValueError: `top_k` is below 1 or above the number of classes.
          DataError: a worker process died.
        """
        return self._predictions(self.stream_logits(images, prepared=prepared, total=total), self._checked(top_k))

    def stream_in_processes(
        self, images: Sequence[ImageSource], *, top_k: int | None = None, prepared: bool = False
    ) -> Iterator[list[Prediction] | ImageError]:
        """Classifies a list of images in all processes of `jax.distributed`: each takes its part of them.

        Every process must call this with the same list and read the result to its end. With one process it is `stream`.

        Args:
          images, top_k, prepared: as for `stream`.

        Yields:
          In every process, for each image of the whole list, in order, what `stream` yields; the very bits that one
          process computes alone if it has as many devices.

        Raises:
          RunError: another process failed; the message names it and says why.
          ValueError, DataError: as `stream`.
        """
        return self._predictions(self.stream_logits_in_processes(images, prepared=prepared), self._checked(top_k))

    def _checked(self, top_k: int | None) -> int:
        most = len(self.labels)
        if top_k is not None and not 1 <= top_k <= most:
            raise ValueError(f"top_k must be 1 to {most}, got {top_k}")
        return min(5, most) if top_k is None else top_k

    def _predictions(
        self, rows: Iterator[np.ndarray | ImageError], top_k: int
    ) -> Iterator[list[Prediction] | ImageError]:
        with contextlib.closing(rows):
            for row in rows:
                yield row if isinstance(row, ImageError) else most_probable(row, top_k, self.labels, self.synsets)
