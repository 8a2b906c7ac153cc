"""The options of a fine-tuning run, as data (standard library only)."""

import dataclasses
from typing import Literal

Optimizer = Literal["sgd", "adamw", "lamb", "lion"]
Norms = Literal["train", "frozen"]
Sampling = Literal["shuffled", "balanced"]
ClassWeights = Literal["none", "balanced"]
Metric = Literal["accuracy", "loss"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The options of a fine-tuning run, saved with it; also those of `dpn-jax finetune`.

    Raises:
      ValueError: a field is out of its range; the message names it and the value.
    """

    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 32
    """Images per forward and backward pass, over all devices and hosts."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one update of the parameters; the rest of an epoch makes one too."""
    optimizer: Optimizer = "adamw"
    """Optimizer; sgd is torch's, without Nesterov momentum."""
    learning_rate: float = 1e-3
    """Peak learning rate, after the warmup and before the cosine decay."""
    final_learning_rate: float = 0.0
    """Learning rate at the end of the cosine decay."""
    warmup_epochs: float = 1.0
    """Epochs in which the learning rate rises linearly to its peak."""
    warmup_learning_rate: float = 1e-5
    """Learning rate at the start of the warmup, or the peak if that is lower."""
    momentum: float = 0.9
    """Momentum of sgd; beta1 of the other optimizers."""
    weight_decay: float = 0.05
    """Weight decay of kernels, not of norms and biases: added to the gradient for sgd, decoupled for the others."""
    layer_decay: float = 1.0
    """Factor on the learning rate per block of distance from the classifier, in (0, 1]; 1 is off."""
    clip_norm: float | None = None
    """Maximum norm of the gradient, beyond which it is scaled down. Defaults to no clipping."""
    label_smoothing: float = 0.1
    """Fraction of the target that is spread evenly over all classes, in [0, 1)."""
    class_weights: ClassWeights | tuple[float, ...] = "none"
    """Weights of the classes in the training loss: balanced is the inverse of their frequency, 1 in the mean over the
    images; or a positive number for each class, in the order of their names. Validation has no weights."""
    mixup: float = 0.0
    """Alpha of mixup's beta distribution; 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix's beta distribution; 0 is off. With mixup, each batch gets one of the two at random."""
    crop_scale: tuple[float, float] = (0.35, 1.0)
    """Range of the fraction of an image's area that a random crop takes; 1 1 uses timm's evaluation crop instead."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Range of the aspect ratio (width / height) of a random crop."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Maximum relative change of brightness, contrast and saturation, in [0, 1]."""
    randaugment: int = 0
    """Magnitude of RandAugment, 0 (off) to 10."""
    randaugment_layers: int = 2
    """Number of RandAugment operations per image."""
    drop_rate: float = 0.0
    """Dropout rate before the classifier, in [0, 1)."""
    ema_decay: float | None = None
    """Decay of a moving average of parameters and norm statistics, to evaluate and save. Defaults to no average."""
    ema_warmup: bool = True
    """Start the average at the first update and raise its decay to ema_decay, so that a short run has a useful one."""
    freeze: str = "none"
    """What is not trained: none, stem, stageN (everything up to stage N), backbone (all but the classifier), or weights
    (all but norms and the classifier)."""
    norms: Norms = "train"
    """train uses batch statistics and updates the running ones; frozen uses the running statistics and keeps them, as
    the norms of frozen layers always do."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the arithmetic; parameters are float32."""
    fast: bool = True
    """Train in the fast form of the backend. The plain form, without it, is for changed models."""
    remat: bool = False
    """Recompute blocks in the backward pass: less memory, more time."""
    image_size: int | None = None
    """Side of the images in pixels, at least 32. Defaults to that of the weights."""
    val_fraction: float | None = None
    """Fraction of each class to hold out for validation. Defaults to 0.2, or to nothing if the data has train/ and
    val/."""
    seed: int = 0
    """Seed of everything random: initial classifier, validation split, order, augmentation, dropout."""
    workers: int = 2
    """Processes that read and augment images; 0 uses threads instead."""
    skip_broken: bool = False
    """Do without images that cannot be read, and list them."""
    skip_check: bool = False
    """Do not read every image before the first epoch to find those that cannot be read."""
    sampling: Sampling = "shuffled"
    """shuffled takes each training image once an epoch; balanced draws as many, each class as often as any other."""
    metric: Metric = "accuracy"
    """Which validation is the best: the one with the highest accuracy, or with the lowest loss."""
    patience: int | None = None
    """Epochs without a better validation after which training ends. Defaults to training all epochs."""
    log_layers: bool = False
    """Write the gradient norm and the learning rate of each layer into the metrics too: of the stem, each block, the
    last norm and the classifier."""
    report: bool = True
    """Evaluate the best weights on the validation images at the end, and write a page with the worst mistakes, the
    predictions and the confusion matrix into report/ in the run's folder."""
    checkpoint_every: int | None = None
    """Updates between checkpoints. Defaults to one checkpoint at the end of each epoch."""
    keep: int = 2
    """Number of newest checkpoints to keep, besides the best."""

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "accumulate", "randaugment_layers", "keep")
        whole = (*positive, "randaugment", "workers", "seed")
        for name in whole:
            value = getattr(self, name)
            least = 1 if name in positive else 0
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name in ("checkpoint_every", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.image_size is not None and self.image_size < 32:
            raise ValueError(f"image_size must be at least 32 pixels, got {self.image_size!r}")
        ranges = {
            "learning_rate": (0, float("inf")), "final_learning_rate": (0, self.learning_rate),
            "warmup_learning_rate": (0, float("inf")), "warmup_epochs": (0, self.epochs), "momentum": (0, 1),
            "weight_decay": (0, float("inf")),
            "layer_decay": (0, 1), "clip_norm": (0, float("inf")), "label_smoothing": (0, 1),
            "mixup": (0, float("inf")), "cutmix": (0, float("inf")), "flip": (0, 1), "color_jitter": (0, 1),
            "randaugment": (0, 10), "drop_rate": (0, 1), "ema_decay": (0, 1), "val_fraction": (0, 1),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}")
        for name in ("learning_rate", "layer_decay", "clip_norm"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be more than 0")
        for name in ("drop_rate", "label_smoothing", "ema_decay", "val_fraction"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name} must be less than 1")
        for name, high in (("crop_scale", 1.0), ("crop_ratio", float("inf"))):
            low_value, high_value = getattr(self, name)
            if not 0 < low_value <= high_value <= high:
                raise ValueError(f"{name} must rise and be in (0, {high:g}], got {getattr(self, name)!r}")
        known = ("none", "stem", "backbone", "weights")
        if self.freeze not in known and not (self.freeze.startswith("stage") and self.freeze[5:].isdigit()):
            raise ValueError(f"freeze must be {', '.join(known)} or stage1, stage2, ..., got {self.freeze!r}")
        for name, choices in (
            ("optimizer", Optimizer), ("norms", Norms), ("sampling", Sampling), ("metric", Metric)
        ):  # fmt: skip
            if getattr(self, name) not in choices.__args__:
                raise ValueError(f"{name} must be one of {choices.__args__}, got {getattr(self, name)!r}")
        self._check_class_weights()

    def _check_class_weights(self) -> None:
        given, named = self.class_weights, ClassWeights.__args__
        if isinstance(given, str) and given not in named:
            raise ValueError(f"class_weights must be one of {named} or a number for each class, got {given!r}")
        if not isinstance(given, str):
            object.__setattr__(self, "class_weights", tuple(given))  # hashable, as the options of a step must be
            for weight in self.class_weights:
                if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                    raise ValueError(f"class_weights must be positive numbers, got {weight!r}")
        if given == "balanced" and self.sampling == "balanced":
            raise ValueError("class_weights='balanced' and sampling='balanced' make up for the same twice; choose one")
