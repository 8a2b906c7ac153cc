"""An evaluation as files: a page for people, tables and JSON for programs."""

import base64
import csv
import html
import importlib.resources
import io
import json
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dpn_jax.checkpoint.write import write_atomically
from dpn_jax.errors import DataError, ImageError, printable, shown
from dpn_jax.evaluation.metrics import Evaluation, Proportion, most_confused
from dpn_jax.images.read import read_image
from dpn_jax.images.sources import LabeledImages, labeled_image
from dpn_jax.pretrained import Preprocessing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Predictions = Literal["csv", "parquet"]

_NAMED = 40
"""Classes that a figure names one by one; of more, it shows the distribution."""
_MISTAKES = 24
_THUMBNAIL = 160  # pixels


def summary(result: Evaluation) -> dict[str, float | int | None]:
    """The figures of an evaluation in a row; accuracies in percent, with the ends of their 95% intervals.

    Example:
      >>> result = Evaluation(("cat", "dog"), ("a", "b"), np.array([0, 1]), np.eye(2, dtype=np.float32))
      >>> summary(result)["top1"], summary(result)["top1_low"]
      (100.0, 34.238)
    """

    def percent(value: float) -> float:
        return round(100 * value, 3)

    row: dict[str, float | int | None] = {"images": len(result), "failed": len(result.failures)}
    for name, accuracy in (("top1", result.top1), ("top5", result.top5)):
        low, high = accuracy.interval
        row |= {name: percent(accuracy.value), f"{name}_low": percent(low), f"{name}_high": percent(high)}
    return row | {
        "balanced_accuracy": percent(result.balanced_accuracy),
        "macro_f1": percent(result.macro_f1),
        "loss": round(result.loss, 4),
        "calibration_error": percent(result.calibration().error),
        "images_per_second": None if result.throughput is None else round(result.throughput.rate, 2),
    }


def model_facts(name: str | None, settings: Preprocessing, dtype: str, parameters: int | None) -> dict[str, object]:
    """What timm's results files have of a model, for `write_report`."""
    counted = {} if parameters is None else {"param_count": round(parameters / 1e6, 2)}
    prepared = {"crop_pct": settings.crop_fraction, "interpolation": settings.interpolation}
    return {"model": name, **counted, "img_size": settings.height, **prepared, "dtype": dtype}


def require_new(folder: Path, *, force: bool) -> None:
    """Refuses a folder that is there already, before anything is computed.

    Raises:
      DataError: it is there, and not `force`; or it is a file.
    """
    if folder.exists() and not (force and folder.is_dir()):
        way_out = "; --force writes the report over it" if folder.is_dir() else ""
        raise DataError(f"{shown(folder)}: is there already{way_out}")


def write_report(
    result: Evaluation,
    folder: Path,
    *,
    source: LabeledImages,
    facts: Mapping[str, Any],
    title: str = "Evaluation",
    predictions: Predictions = "csv",
) -> None:
    """Writes `report.html`, `predictions.csv`, `confusion.csv` and `results.json`; needs matplotlib.

    Args:
      result: of at least one image.
      folder: where to; made if it is missing. Files of these names are replaced.
      source: the images, for the thumbnails of the worst mistakes.
      facts: what was evaluated, in timm's words: 'model', 'param_count' (M), 'img_size', 'crop_pct', 'interpolation';
        and anything else that JSON can hold.
      title: of the page.
      predictions: 'parquet' writes `predictions.parquet` in place of `predictions.csv`, with the same columns, whole
        probabilities and `correct` as true and false; needs pyarrow. Of an earlier report the other one is removed.

    Raises:
      OSError: something cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = summary(result)
    accuracies = {name: figures[name] for name in ("top1", "top5")}
    timms = {key: value for name, top in accuracies.items() for key, value in ((name, top), (f"{name}_err", 100 - top))}
    calibrated = {"temperature": result.temperature}
    calibrated["calibrated_error"] = round(100 * result.calibration(result.temperature).error, 3)
    row = {"model": facts.get("model"), **{key: round(value, 3) for key, value in timms.items()}, **facts}
    text = json.dumps({**row, **figures, **calibrated}, indent=2)
    _write(folder / "results.json", text + "\n")
    columns = _predictions(result)
    if predictions == "parquet":
        write_atomically(folder / "predictions.parquet", [_parquet(columns)])
    else:
        rows = (map(_written, row) for row in zip(*columns.values(), strict=True))
        _write(folder / "predictions.csv", _csv([tuple(columns), *rows]))
    (folder / f"predictions.{'csv' if predictions == 'parquet' else 'parquet'}").unlink(missing_ok=True)
    names = result.class_names
    _write(folder / "confusion.csv", _csv([("label", *names), *zip(names, *result.confusion.T.tolist(), strict=True)]))
    _write(folder / "report.html", _page(result, source, {**facts, **figures, **calibrated}, title))


def _write(path: Path, text: str) -> None:
    write_atomically(path, [text.encode("utf-8")])


def _csv(rows: Iterable[Sequence[object]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def _predictions(result: Evaluation) -> dict[str, list[Any]]:
    """The columns of the table of predictions: a row for each image."""
    names = result.class_names
    return {
        "file": [printable(file) for file in result.files],
        "label": [names[label] for label in result.labels],
        "prediction": [names[best] for best in result.predictions],
        "correct": (result.ranks == 0).tolist(),
        "probability": result.confidences.tolist(),
        "label_probability": np.exp(-result.losses).tolist(),
        "label_rank": (result.ranks + 1).tolist(),
    }


def _written(value: object) -> object:
    """How a CSV file has a value."""
    return int(value) if isinstance(value, bool) else f"{value:.6f}" if isinstance(value, float) else value


def _parquet(columns: Mapping[str, list[Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), content)
    return content.getvalue()


def _page(result: Evaluation, source: LabeledImages, facts: Mapping[str, Any], title: str) -> str:
    template = string.Template(importlib.resources.files(__package__).joinpath("report.html").read_text("utf-8"))
    low, high = result.top1.interval
    parts = {
        "title": html.escape(title),
        "top1": f"{100 * result.top1.value:.2f}%",
        "interval": f"{100 * low:.2f} to {100 * high:.2f}%",
        "count": f"{result.top1.count:,} of {result.top1.total:,} images",
        "facts": "\n".join(_facts(result, facts)),
        "classes": _image(_classes_figure(result), "Accuracy of each class"),
        "confusion": _image(_confusion_figure(result), "Confusion matrix") if len(result.class_names) <= _NAMED else "",
        "confused": _table(("true class", "answered", "images"), most_confused(result, 15)),
        "calibration": _image(_calibration_figure(result), "Reliability diagram"),
        "temperature": f"{result.temperature:.3f}",
        "mistakes": "\n".join(_mistake(result, source, row) for row in result.mistakes(_MISTAKES)) or "<p>None.</p>",
        "failures": _failures(result.failures),
    }
    return template.substitute(parts)


_NAMES = {  # of facts and of `summary`; the others are as they are
    "param_count": "parameters, M",
    "img_size": "image size, pixels",
    "crop_pct": "crop, fraction of the image",
    "balanced_accuracy": "balanced accuracy, %",
    "macro_f1": "macro F1, %",
    "loss": "loss, nats",
    "calibration_error": "calibration error, %",
    "temperature": "temperature that lowers the loss most",
    "calibrated_error": "calibration error with it, %",
    "images_per_second": "images/s",
}


def _facts(result: Evaluation, facts: Mapping[str, Any]) -> Iterator[str]:
    """The rows of the table."""
    tops = {"top1": ("top-1", result.top1), "top5": ("top-5", result.top5)}
    for key, value in facts.items():
        if value is None or key.endswith(("_low", "_high")):
            continue
        name, text = _NAMES.get(key, key.replace("_", " ")), f"{value:g}" if isinstance(value, float) else str(value)
        if key in tops:
            name, text = f"{tops[key][0]}, % (95% interval)", interval_text(tops[key][1])
        yield f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"


def _failures(failures: Sequence[ImageError]) -> str:
    if not failures:
        return ""
    lines = "".join(f"<li>{html.escape(str(failure))}</li>" for failure in failures[:100])
    more = f"<p>and {len(failures) - 100} more</p>" if len(failures) > 100 else ""
    return f"<h2>Images that could not be read</h2><ul>{lines}</ul>{more}"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><tr>{titles}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>" if cells else "<p>None.</p>"


def _mistake(result: Evaluation, source: LabeledImages, row: int) -> str:
    index = row if result.indices is None else int(result.indices[row])
    names, label, best = result.class_names, int(result.labels[row]), int(result.predictions[row])
    words = (
        f"<b>{html.escape(names[best])}</b> {100 * result.confidences[row]:.1f}%<br>truly {html.escape(names[label])} "
        f"({100 * np.exp(-result.losses[row]):.1f}%)<br><small>{html.escape(printable(result.files[row]))}</small>"
    )
    return f'<figure><img alt="" src="{_thumbnail(source, index)}"><figcaption>{words}</figcaption></figure>'


def _thumbnail(source: LabeledImages, index: int) -> str:
    """A data URL; of an image that has gone since, of nothing."""
    try:
        image = read_image(labeled_image(source, index)[0], mode="RGB", at_least=_THUMBNAIL)
    except ImageError:
        return "data:,"
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return _data_url("image/jpeg", file.getvalue())


def _image(figure: "Figure", words: str) -> str:
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "dpn_jax"}):  # the same figure, the same bytes
        figure.savefig(file, format="svg", metadata={"Date": None})
    return f'<img class="figure" alt="{html.escape(words)}" src="{_data_url("image/svg+xml", file.getvalue())}">'


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and may need a display

    return Figure(figsize=(width, height), layout="constrained")


def _classes_figure(result: Evaluation) -> "Figure":
    """Bars with 95% intervals, the worst class on top; of many classes, how many have which accuracy."""
    classes = sorted((row for row in result.per_class if row.images), key=lambda row: row.recall.value, reverse=True)
    values = [100 * row.recall.value for row in classes]
    if len(classes) > _NAMED:
        figure = _figure(7, 3.2)
        axes = figure.subplots()
        axes.hist(values, bins=20, range=(0, 100))
        axes.set(xlabel="accuracy of the class, %", ylabel="classes", title=f"{len(classes)} classes")
        return figure
    figure = _figure(7, 1.3 + 0.28 * len(classes))
    axes = figure.subplots()
    ends = np.clip([[100 * abs(end - row.recall.value) for end in row.recall.interval] for row in classes], 0, None).T
    axes.barh([f"{_short(row.name)} ({row.images})" for row in classes], values, xerr=ends, capsize=2)
    axes.set(xlabel="accuracy, %, with 95% intervals", xlim=(0, 100), title="Accuracy of each class (images)")
    return figure


def _confusion_figure(result: Evaluation) -> "Figure":
    """Fractions of each true class, with the counts of the images."""
    counts, names = result.confusion, [_short(name) for name in result.class_names]
    side = 2.5 + 0.42 * len(names)
    figure = _figure(side, side)
    axes = figure.subplots()
    axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    for (true, taken), count in np.ndenumerate(counts):
        if count:
            light = count > counts[true].sum() / 2
            axes.text(taken, true, count, ha="center", va="center", fontsize=8, color="white" if light else "black")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="answered", ylabel="true class", title="Images by true class and answer")
    return figure


def _calibration_figure(result: Evaluation) -> "Figure":
    """The accuracy of the images that got a probability, beside the diagonal where they are equal."""
    figure = _figure(9, 3.8)
    named = {"as it is": 1.0, f"divided by {result.temperature:.3g}": result.temperature}
    for axes, (name, temperature) in zip(figure.subplots(1, 2, sharey=True), named.items(), strict=True):
        found = result.calibration(temperature)
        edges = np.linspace(0, 1, len(found.counts) + 1)
        axes.bar(edges[:-1], found.counts / found.counts.sum(), edges[1] - edges[0], align="edge", color="lightgray")
        axes.plot([0, 1], [0, 1], ":", color="gray")
        axes.plot(found.confidences, found.accuracies, "o-")
        axes.set(xlabel="probability of the answer", xlim=(0, 1), ylim=(0, 1))
        axes.set_title(f"Logits {name}: calibration error {100 * found.error:.1f}%", fontsize=10)
    figure.axes[0].set_ylabel("accuracy (gray: share of the images)")
    return figure


def _short(name: str) -> str:
    first = name.split(",")[0]
    return first if len(first) <= 24 else f"{first[:22]}..."


def interval_text(accuracy: Proportion) -> str:
    """An accuracy and its 95% interval, in percent.

    Example:
      >>> interval_text(Proportion(19, 20))
      '95.000 (76.387 to 99.112)'
    """
    low, high = accuracy.interval
    return f"{100 * accuracy.value:.3f} ({100 * low:.3f} to {100 * high:.3f})"
