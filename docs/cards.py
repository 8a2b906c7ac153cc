"""Writes the model cards, `docs/models/*.md`: `python -m docs.cards`.

Figures come from the package: sizes from `config.py`, preprocessing and accuracy from `pretrained.py`, results from
`published.csv`. The prose and its sources are in `cards.toml`; a new tag needs a table there.
"""

import dataclasses
import functools
import importlib.resources
import math
import textwrap
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from dpn_jax.checkpoint.card import CITATION
from dpn_jax.checkpoint.names import name_table, parameter_count
from dpn_jax.evaluation.published import Published, published_for, published_results
from dpn_jax.pretrained import PRETRAINED, Preprocessing, PretrainedTag

FOLDER = Path(__file__).with_name("models")
_PROSE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
_NOTE = "<!-- written by docs/cards.py; do not edit -->"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What `cards.toml` tells of a tag."""

    what: str
    trained_on: str
    dataset: str
    """Its id on the hub."""
    evaluated_on: str
    """What the tag's `top1` and `top5` are of."""
    split: str = "validation"
    """Which part of the dataset that is."""
    example: str
    """A picture."""
    answer: str | None = None
    """Its class, checked where the card's example runs offline."""
    use: list[str]
    limits: list[str]
    data: list[str]
    procedure: list[str]
    license: list[str]
    provenance: list[str]
    citation: str = ""
    """BibTeX besides the paper's."""


def facts_of(name: str) -> Facts:
    """A tag's facts: its families' and its own; text replaces text, lists are joined and the tag's values filled in."""
    own = dict(_PROSE["tags"][name])
    values = own.pop("values", {})
    facts: dict[str, Any] = {}
    for table in (*(_PROSE["families"][family] for family in own.pop("families", ())), own):
        for key, value in table.items():
            joined = isinstance(value, list)
            facts[key] = [*facts.get(key, ()), *(item.format_map(values) for item in value)] if joined else value
    return Facts(**facts)


def render() -> dict[str, str]:
    """The text of every page, by file name."""
    return {"index.md": _index()} | {f"{name}.md": _card(name, tag, facts_of(name)) for name, tag in PRETRAINED.items()}


def weights_size(tag: PretrainedTag) -> str:
    """Size of the file that comes with the package, or of timm's: float32 tensors, and int64 counters of steps."""
    if tag.packaged:
        size = len(importlib.resources.files("dpn_jax.checkpoint").joinpath(tag.packaged).read_bytes())
    else:
        size = sum((8 if entry.is_counter else 4) * math.prod(entry.timm_shape) for entry in name_table(tag.config))
    return f"{size / 1e6:.1f} MB" if size < 1e7 else f"{size / 1e6:.0f} MB"


def _index() -> str:
    head = ("tag", "parameters", "GMACs", "image size", "top-1", "top-5", "weights", "trained on")
    rows = []
    for name, tag in PRETRAINED.items():
        accuracy = f"{tag.top1:.2f}%", f"{tag.top5:.2f}%"
        sizes = f"{_millions(tag)} M", _gmacs(tag), _square(tag.preprocessing)
        rows.append((f"[{name}]({name}.md)", *sizes, *accuracy, weights_size(tag), facts_of(name).trained_on))
    tree = "\n".join(("```{toctree}", ":hidden:", "", *PRETRAINED, "```"))
    return f"{_NOTE}\n# Models\n\n{_text(_PROSE['index'])}\n\n{_table(head, rows)}\n\n{tree}\n"


def _card(name: str, tag: PretrainedTag, facts: Facts) -> str:
    size = f"It has {_millions(tag)} million parameters and takes {_gmacs(tag)} billion multiply-adds for an image of"
    file = f"`{tag.packaged}`, comes with this package" if tag.packaged else f"`model.safetensors`, is at [timm/{name}]"
    sections = {
        "How to use": f"{_example(name, tag, facts)}\n\n{_text(_PROSE['see_also'])}",
        "Intended use": _list(facts.use),
        "Limits and bias": _list([*facts.limits, *_shifts(name, tag)]),
        "Training data": _list(facts.data),
        "Training procedure": _list(facts.procedure),
        "Preprocessing": _preprocessing(tag),
        "Evaluation results": _evaluation(name, tag, facts),
        "License": _list(facts.license),
        "Citation": f"```bibtex\n{CITATION}\n{facts.citation}```",
        "Provenance": _list([*facts.provenance, f"The file, {file}; {weights_size(tag)}."]),
    }
    body = "\n\n".join(
        [
            _text(f"{facts.what} {size} {_square(tag.preprocessing)} pixels. {_PROSE['block']}"),
            *(f"## {title}\n\n{text}" for title, text in sections.items()),
        ]
    )
    sources = _PROSE["sources"] | {f"timm/{name}": f"https://huggingface.co/timm/{name}"}
    unwrapped = " ".join(body.split())
    links = "\n".join(f"[{source}]: {url}" for source, url in sources.items() if f"[{source}]" in unwrapped)
    return f"---\n{_metadata(name, tag, facts).to_yaml()}\n---\n\n{_NOTE}\n# {name}\n\n{body}\n\n{links}\n"


def _metadata(name: str, tag: PretrainedTag, facts: Facts) -> ModelCardData:
    """The card's front matter, as the hub reads it."""
    rows = [("", tag.top1, tag.top5)]
    if (test := tag.test_preprocessing) and (found := published_for(name, test.height)):
        rows.append((f", {found.image_size} pixels", found.top1, found.top5))
    by_timm = bool(_results(name))
    result = functools.partial(
        EvalResult,
        task_type="image-classification",
        dataset_type=facts.dataset,
        dataset_name=facts.evaluated_on,
        dataset_split=facts.split,
        metric_type="accuracy",
        source_name=_results(name)[0].source if by_timm else None,
        source_url=_PROSE["sources"]["timm"] if by_timm else None,
    )
    return ModelCardData(
        license="apache-2.0",
        library_name="dpn_jax" if tag.packaged else "timm",
        pipeline_tag="image-classification",
        tags=["image-classification", *(() if tag.packaged else ("timm",)), "jax", "flax", "dpn"],
        datasets=[facts.dataset],
        model_name=name,
        eval_results=[
            result(metric_name=f"top-{k} accuracy{at}", metric_value=value)
            for at, *values in rows
            for k, value in zip((1, 5), values, strict=True)
        ],
    )


def _example(name: str, tag: PretrainedTag, facts: Facts) -> str:
    settings, last = tag.preprocessing, tag.config.feature_info[-1]
    shape = (1, math.ceil(settings.height / last.reduction), math.ceil(settings.width / last.reduction), last.channels)
    code = f"""```python
import dpn_jax

classifier = dpn_jax.Classifier.from_pretrained("{name}")
predictions = classifier("{facts.example}", top_k=5)  # labels and probabilities, the best first

model = dpn_jax.from_pretrained("{name}")
image = dpn_jax.preprocessing("{name}")("{facts.example}")  # float32 [{settings.height}, {settings.width}, 3]
features = model.forward_features(image[None])  # {list(shape)}
"""
    if tag.packaged:
        answer = f'predictions[0].label == "{facts.answer}" and ' if facts.answer else ""
        return f"{code}assert {answer}features.shape == {shape}\n```"
    same = f'The same in timm: `timm.create_model("{name}", pretrained=True)`.'
    return f'% skip: next "needs the hub"\n\n{code}```\n\n{same}'


def _shifts(name: str, tag: PretrainedTag) -> list[str]:
    """How accuracy falls on photos of other kinds, as far as that is published."""
    size = tag.preprocessing.height
    found = {row.dataset: f"{row.top1:.1f}%" for row in _results(name) if row.image_size == size}
    return [_PROSE["shifts"].format_map(found)] if found else []


def _preprocessing(tag: PretrainedTag) -> str:
    columns = {"evaluation": tag.preprocessing, "timm's test size": tag.test_preprocessing}
    cells = [
        (
            title,
            f"{int(settings.height / settings.crop_fraction)} pixels",
            settings.interpolation,
            f"{_square(settings)} pixels (crop {settings.crop_fraction:g})",
            *(", ".join(f"{value:.4g}" for value in values) for values in (settings.mean, settings.std)),
        )
        for title, settings in columns.items()
        if settings
    ]
    head, *rows = zip(
        (
            "",
            "shorter side resized to",
            "interpolation",
            "center crop",
            "mean, of RGB in [0, 1]",
            "standard deviation",
        ),
        *cells,
        strict=True,
    )
    return _table(head, rows)


def _evaluation(name: str, tag: PretrainedTag, facts: Facts) -> str:
    settings, datasets, results = tag.preprocessing, _PROSE["datasets"], _results(name)
    rows = [(datasets[row.dataset], row.image_size, row.crop_fraction, row.top1, row.top5) for row in results]
    rows = rows or [(facts.evaluated_on, settings.height, settings.crop_fraction, tag.top1, tag.top5)]
    cells = [(data, str(size), f"{crop:g}", f"{top1:.3f}%", f"{top5:.3f}%") for data, size, crop, top1, top5 in rows]
    parts = [_table(("data", "pixels", "crop", "top-1", "top-5"), cells)]
    if results:
        parts = [_text(_PROSE["by_timm"]), *parts, _text(_PROSE["equal"])]
    if own := published_for(name, 320, test_time_pool=True):
        parts += [_text(_PROSE["by_authors"]), _authors_table(own)]
    return "\n\n".join(parts)


def _authors_table(own: Published) -> str:
    """Every error that the authors published, this card's in bold."""
    columns = {(224, "avg"): "224 pixels", (320, "avg"): "320 pixels", (320, "avgmax"): "320 pixels, mean-max pooling"}
    authors = [row for row in published_results() if row.source.startswith("cypw/DPNs")]
    published = {(row.model, row.image_size, row.pooling): row for row in authors}
    rows = []
    for model in dict.fromkeys(model for model, _, _ in published):
        found = [published[model, *column] for column in columns]
        cells = [model.replace("*", "\\*"), *(f"{100 - row.top1:.2f}% / {100 - row.top5:.2f}%" for row in found)]
        rows.append([f"**{cell}**" for cell in cells] if model == own.model else cells)
    return _table(("network", *columns.values()), rows)


def _results(name: str) -> list[Published]:
    """What timm published of these weights."""
    return [row for row in published_results() if row.model == name]


def _millions(tag: PretrainedTag) -> str:
    return f"{parameter_count(tag.config) / 1e6:.2f}"


def _gmacs(tag: PretrainedTag) -> str:
    gmacs = tag.config.multiply_adds(tag.preprocessing.height, tag.preprocessing.width) / 1e9
    return f"{gmacs:.2f}" if gmacs >= 0.1 else f"{gmacs:.1g}"


def _square(settings: Preprocessing) -> str:
    return f"{settings.height} x {settings.width}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _text(text: str, bullet: str = "") -> str:
    """A paragraph, or the item of a list, in lines of at most 120 characters."""
    text, indent = " ".join(text.split()), " " * len(bullet)
    return textwrap.fill(
        text, 120, initial_indent=bullet, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _list(items: Iterable[str]) -> str:
    return "\n".join(_text(item, "- ") for item in items)


def main() -> None:
    """Writes the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in render().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
