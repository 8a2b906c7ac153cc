"""The model card of a published model, as the Hugging Face hub reads it."""

import dataclasses
from collections.abc import Mapping

from dpn_jax.config import DPNConfig, variant_of
from dpn_jax.pretrained import Preprocessing

CITATION = """@inproceedings{chen2017dual,
  title={Dual Path Networks},
  author={Chen, Yunpeng and Li, Jianan and Xiao, Huaxin and Jin, Xiaojie and Yan, Shuicheng and Feng, Jiashi},
  booktitle={Advances in Neural Information Processing Systems},
  year={2017},
  note={arXiv:1707.01629}
}"""
_METRICS = {  # keys of `dpn_jax.evaluation.report.summary` and their names; percent where the name has no unit
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "calibration_error": "expected calibration error",
}
_UNKNOWN = "Not stated."


@dataclasses.dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card says that the model does not tell.

    Args:
      base_model: hub id of the model that was fine-tuned; defaults to where the model's weights come from, as far as
        that is on the hub.
      license: of the weights, as the hub names it.
      description: what the model is.
      intended_use: what it is for, and what not.
      data: what it was trained on.
      procedure: how it was trained.
      limits: where it fails, and whom that harms.
      evaluated_on: the data of `metrics`.
      metrics: figures such as `dpn_jax.evaluation.report.summary` gives: `top1`, `top5`, `balanced_accuracy`,
        `macro_f1` and `calibration_error` in percent, and the number of `images`.
    """

    base_model: str | None = None
    license: str = "apache-2.0"
    description: str | None = None
    intended_use: str | None = None
    data: str | None = None
    procedure: str | None = None
    limits: str | None = None
    evaluated_on: str | None = None
    metrics: Mapping[str, object] | None = None


def model_card(name: str, config: DPNConfig, preprocessing: Preprocessing, facts: CardFacts, *, labels: int) -> str:
    """The text of a `README.md`: metadata in YAML, then Markdown.

    Args:
      name: of the model.
      config: its architecture.
      preprocessing: of its images.
      facts: what else is known; what is not is said to be not stated.
      labels: number of its class names, 0 for none.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="timm",
        license=facts.license,
        base_model=facts.base_model,
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "jax", "flax", "dpn"],
    )
    settings = preprocessing
    size = f"{settings.height} x {settings.width}"
    classes = f"{config.num_classes} classes" + (", named in `config.json`" if labels else "")
    return f"""---
{data.to_yaml()}
---

# {name}

{facts.description or f"A Dual Path Network that tells {config.num_classes} classes of images apart."}

| | |
|---|---|
| architecture | {variant_of(config) or "DPN of custom sizes"} |
| size | {config.multiply_adds(settings.height, settings.width) / 1e9:.3g} GMACs at {size} pixels |
| answers | {classes} |
| images | {size} pixels, {config.in_channels} channels, crop {settings.crop_fraction:g}, {settings.interpolation} |
| base model | {facts.base_model or _UNKNOWN} |

## Use

```python
import dpn_jax  # JAX and Flax
dpn_jax.Classifier.from_pretrained("REPOSITORY")("photo.jpg")

import timm  # PyTorch
timm.create_model("hf-hub:REPOSITORY", pretrained=True)
```

## Intended use

{facts.intended_use or _UNKNOWN}

## Training data

{facts.data or _UNKNOWN}

## Training procedure

{facts.procedure or _UNKNOWN}

## Evaluation

{_evaluation(facts)}

## Limits and bias

{facts.limits or _UNKNOWN}

## License

{facts.license}

## Citation

```bibtex
{CITATION}
```
"""


def _evaluation(facts: CardFacts) -> str:
    metrics = facts.metrics or {}
    rows = [f"| {title} | {metrics[key]:.3f}% |" for key, title in _METRICS.items() if key in metrics]
    if not rows:
        return _UNKNOWN
    images = f", {metrics['images']} images" if "images" in metrics else ""
    return "\n".join([f"| {facts.evaluated_on or 'data not stated'}{images} | |", "|---|---|", *rows])
