"""What a run starts from, new or resumed: its record, its images and its model."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpn_jax.checkpoint.load import dotted, from_pretrained, saved_values
from dpn_jax.config import VARIANTS, DPNConfig, variant_of
from dpn_jax.errors import DataError, RunError, shown
from dpn_jax.finetune.checkpoints import digest_of
from dpn_jax.finetune.checks import find_broken
from dpn_jax.finetune.config import FinetuneConfig
from dpn_jax.finetune.loop import CHECKPOINTS
from dpn_jax.finetune.record import (
    IMAGES,
    Instance,
    Record,
    config_from_json,
    find_images,
    read_images,
    read_record,
    write_images,
    write_record,
)
from dpn_jax.images.splits import ImageFolder, image_folders
from dpn_jax.layers import Conv
from dpn_jax.model import DPN, create_model
from dpn_jax.multihost import gather, on_first, require_same
from dpn_jax.paths import absolute, readable_path
from dpn_jax.pretrained import PRETRAINED, Preprocessing, Provenance, default_preprocessing
from dpn_jax.stock import changes, refuse_bound_methods, require_stock

logger = logging.getLogger("dpn_jax")


class Images(NamedTuple):
    """The images of a run, by split."""

    train: ImageFolder
    val: ImageFolder


class Given(NamedTuple):
    """What a run starts from, as the user gives it."""

    folder: str | Path | None
    source: str | Path | DPNConfig | DPN | None
    model: str | None
    revision: str | None

    @property
    def start(self) -> dict[str, str | None]:
        """What the record says of it; an architecture and an instance have places of their own there."""
        source = str(absolute(readable_path(self.source))) if isinstance(self.source, Path) else self.source
        return {
            "source": source if isinstance(source, str) else None,
            "model": self.model,
            "revision": self.revision,
        }


class Start(NamedTuple):
    """What a run starts from, as it is used."""

    record: Record
    images: Images
    model: DPN
    broken: Mapping[str, str] = MappingProxyType({})
    """The reason for each file that is left out of a new run because it cannot be read."""
    before: Record | None = None
    """The record of a resumed run as it was."""

    def write(self, output: Path) -> None:
        """Writes the record and the images of a new run.

        Raises:
          RunError: they cannot be written.
        """
        write_images(output, readable_path(self.record.folder), self.images._asdict(), self.broken)
        write_record(output, self.record)


def new(output: Path, config: FinetuneConfig | None, given: Given, say: Callable[[str], None]) -> Start:
    """A new run; nothing is written yet.

    Raises:
      DataError: the images cannot be trained on.
      CheckpointError, ValueError: the model cannot be loaded.
    """
    config = config or FinetuneConfig()
    root = readable_path(given.folder, error=DataError)
    images = Images(*image_folders(root, val_fraction=config.val_fraction, seed=config.seed))
    names = images.train.class_names
    start = initial_model(given.source, config, names, model=given.model, revision=given.revision, note=say)
    broken = {} if config.skip_check else _find_broken(images, config, start.provenance.preprocessing)
    if broken and not config.skip_broken:
        raise DataError(
            f"{shown(root)}: {len(broken)} of {sum(map(len, images))} images cannot be read, such as "
            f"{next(iter(broken.values()))}; repair or remove them, or do without them with --skip-broken"
        )
    if broken:
        images = Images(*(split.without(broken) for split in images))
        for why in broken.values():
            say(f"skipped: {why}")
        say(f"{len(broken)} images cannot be read and are skipped; {output / IMAGES} lists them")
    record = Record(
        config=config,
        folder=str(absolute(root)),
        start=given.start,
        source=start.provenance.source,
        architecture=start.config,
        preprocessing=start.provenance.preprocessing,
        class_names=names,
        instance=instance_of(start) if isinstance(given.source, DPN) else None,
    )
    return Start(record, images, start, broken)


def resumed(output: Path, config: FinetuneConfig | None, given: Given, say: Callable[[str], None]) -> Start:
    """A run that is resumed, with the options from here on, and a model to restore a checkpoint into.

    Raises:
      RunError: there is no such run, or what is asked for would change its result.
    """
    saved = Record.from_json(output, on_first(lambda: read_record(output)))
    # process 0's options count for all: perhaps only it sees the run's folder
    config = config_from_json(on_first(lambda: dataclasses.asdict(saved.continued(output, config, given.start, say))))
    root = absolute(readable_path(given.folder or saved.folder, error=DataError))
    now = Images(*image_folders(root, val_fraction=config.val_fraction, seed=config.seed))
    present = {file for split in now for file in split.files}
    found = find_images(on_first(lambda: read_images(output)), root, present, say)
    images = Images(*(dataclasses.replace(found[name], packed=split.packed) for name, split in now._asdict().items()))
    has_checkpoint = on_first(lambda: any(path.name.isdigit() for path in (output / CHECKPOINTS).glob("*")))
    start = initial_model(
        _source_again(output, saved, given.source, has_checkpoint=has_checkpoint),
        config,
        saved.class_names,
        model=saved.start["model"],
        revision=saved.start["revision"],
        note=logger.debug,
    )
    if isinstance(given.source, DPN):
        _require_same_instance(output, saved, start, has_checkpoint=has_checkpoint)
    start.provenance = Provenance(saved.source, None, saved.preprocessing, saved.class_names)
    return Start(dataclasses.replace(saved, config=config, folder=str(root)), images, start, before=saved)


def _source_again(
    output: Path, saved: Record, given: str | Path | DPNConfig | DPN | None, *, has_checkpoint: bool
) -> str | Path | DPNConfig | DPN:
    """What the model of a resumed run is built from: without a checkpoint it starts anew, from the same weights.

    Raises:
      RunError: that must be given again, or must not be given.
    """
    if saved.instance is None:
        if isinstance(given, DPN):
            raise RunError(f"{shown(output)}: did not start from a model instance, so none can be given; drop model=")
        return saved.architecture if has_checkpoint else given or saved.start["source"] or saved.architecture
    if isinstance(given, DPN):
        return given
    again = "give it again, in Python: finetune(None, output, model=..., resume=True)"
    if changed := saved.instance.changes:
        path, change = next(iter(changed.items()))
        raise RunError(f"{shown(output)}: started from a changed model ({path or 'the model'} {change}); {again}")
    if not has_checkpoint:
        raise RunError(f"{shown(output)}: no checkpoint yet, and it started from a model instance; {again}")
    return saved.architecture


def instance_of(model: DPN) -> Instance:
    """What the record of a run says of the model that it was given itself, the same in all processes."""
    digest = digest_of({dotted(path): np.asarray(value) for path, value in saved_values(model).items()}, {})
    require_same([digest], "initial model")
    return Instance(digest, changes(model))


def _require_same_instance(output: Path, saved: Record, model: DPN, *, has_checkpoint: bool) -> None:
    """Compares the model that a resumed run is given with the run's; its values count where no checkpoint has them.

    Raises:
      RunError: they differ.
    """
    now, before = instance_of(model), saved.instance
    differences = [
        f"{path or 'the model'} {new}; in the run it {old}"
        for path in before.changes | now.changes
        if (new := now.changes.get(path, "is stock")) != (old := before.changes.get(path, "is stock"))
    ]
    differences += [
        f"its {field.name} is {new!r}; in the run it is {old!r}"
        for field in dataclasses.fields(DPNConfig)
        if field.name != "drop_rate"  # which training takes from its options
        and (new := getattr(model.config, field.name)) != (old := getattr(saved.architecture, field.name))
    ]
    if not has_checkpoint and now.digest != before.digest:
        differences.append("its initial values are others, and there is no checkpoint yet")
    if differences:
        raise RunError(f"{shown(output)}: cannot be resumed with another model=: {differences[0]}")


def initial_model(
    source: str | Path | DPNConfig | DPN,
    config: FinetuneConfig,
    class_names: tuple[str, ...],
    *,
    model: str | None = None,
    revision: str | None = None,
    note: Callable[[str], None],
) -> DPN:
    """The model that a run starts from, with pretrained or random weights.

    Args:
      source: a tag, hub id or file of weights, as for `from_pretrained`; or a variant ('dpn68b') or an architecture for
        random weights, initialized from `config.seed`; or a model, which is copied.
      config: the options; `dtype`, `remat`, `seed` and `image_size` are used.
      class_names: the classes. Weights of exactly these classes keep their classifier, others get a new one; a model
        keeps it too where it has as many classes without names.
      model, revision: as for `from_pretrained`.
      note: called with a line about the weights.

    Returns:
      The model; its provenance has the class names and the preprocessing.

    Raises:
      CheckpointError, ValueError: as `from_pretrained`.
    """
    options = {"dtype": jnp.dtype(config.dtype), "remat": config.remat}
    rngs = nnx.Rngs(config.seed)
    if isinstance(source, DPNConfig) or (isinstance(source, str) and source in VARIANTS):
        built = create_model(source, num_classes=len(class_names), rngs=rngs, **options)
        name = source if isinstance(source, str) else variant_of(source) or "a DPN"
        note(f"{name} starts from random weights (seed {config.seed})")
    else:
        if isinstance(source, DPN):
            built, kept = _copied(source, config, len(class_names)), (class_names, None)
            name = built.provenance.source or "the given model"
        else:
            built, kept = from_pretrained(source, model=model, revision=revision, rngs=rngs, **options), (class_names,)
            name = built.provenance.source or Path(source).name
        if built.config.num_classes == len(class_names) and built.provenance.class_names in kept:
            note(f"{name} has these {len(class_names)} classes: its classifier is kept")
        else:
            built.reset_classifier(len(class_names), rngs=rngs)
            note(f"{name} gets a new classifier for {len(class_names)} classes")
    tag = PRETRAINED.get((model or "").removeprefix("timm/"))
    preprocessing = tag.preprocessing if tag else built.provenance.preprocessing or default_preprocessing(built.config)
    if config.image_size is not None:
        preprocessing = dataclasses.replace(preprocessing, image_size=config.image_size)
    # neither hash nor file, which describe the initial weights only
    built.provenance = Provenance(source=name, preprocessing=preprocessing, class_names=class_names)
    return built


def _copied(model: DPN, config: FinetuneConfig, classes: int) -> DPN:
    """A copy of a model that is given itself.

    Raises:
      ValueError: it does not fit the options or the classes; one line that says what to do.
    """
    refuse_bound_methods(model)
    if config.fast:
        require_stock(model, "training in the fast form", "run the plain form: FinetuneConfig(fast=False)")
    for name, wanted, way_out in (
        (
            "dtype",
            config.dtype,
            f"make it with dtype={config.dtype!r}, or set FinetuneConfig(dtype={model.dtype.name!r})",
        ),
        ("param_dtype", "float32", "make it with param_dtype='float32'; the arithmetic has its own dtype"),
    ):
        if getattr(model, name) != jnp.dtype(wanted):
            raise ValueError(f"model= has {name} {getattr(model, name).name}, but training wants {wanted}: {way_out}")
    if any(isinstance(value, jax.ShapeDtypeStruct) for value in saved_values(model).values()):
        raise ValueError("model= is abstract, it has no values; make it with rngs=nnx.Rngs(0), or load it")
    own = type(model.classifier)
    if model.config.num_classes not in (0, classes) and own is not Conv:
        raise ValueError(
            f"model= has {model.config.num_classes} classes and a classifier of its own ({own.__name__}), but the "
            f"images have {classes}: make it with num_classes={classes}"
        )
    copy = nnx.clone(model)
    copy.remat = copy.remat or config.remat
    return copy


def _find_broken(images: Images, config: FinetuneConfig, preprocessing: Preprocessing) -> dict[str, str]:
    """The reason for each file that cannot be read; each process reads a part of the files."""
    found: dict[str, str] = {}
    for split in images:
        mine = dataclasses.replace(
            split,
            files=split.files[jax.process_index() :: jax.process_count()],
            labels=split.labels[jax.process_index() :: jax.process_count()],
        )
        for part in gather(find_broken(mine, config, preprocessing)):
            found |= part
    return found
