"""What `write_report` writes is what the evaluation says."""

import base64
import csv
import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from dpn_jax.errors import DataError, ImageError
from dpn_jax.evaluation.metrics import Evaluation
from dpn_jax.evaluation.report import require_new, summary, write_report
from tests.evaluation.test_metrics import random_result

FACTS = {"model": "dpn_tiny", "param_count": 0.46, "img_size": 32, "crop_pct": 1.0, "interpolation": "bicubic"}


@pytest.fixture
def source() -> list[tuple[Image.Image, int]]:
    """A photo of its own color for each image of `random_result`."""
    return [(Image.new("RGB", (50, 40), (n % 256, 100, 200 - n % 200)), 0) for n in range(300)]


def test_tables_and_json(tmp_path: Path, source: list) -> None:
    result = random_result(0)
    write_report(result, tmp_path / "report", source=source, facts=FACTS)
    rows = list(csv.DictReader((tmp_path / "report" / "predictions.csv").read_text().splitlines()))
    assert [row["file"] for row in rows] == list(result.files)
    right = [row["label"] == row["prediction"] for row in rows]
    assert [row["correct"] for row in rows] == [str(int(correct)) for correct in right]
    assert sum(right) == result.top1.count and sum(int(row["label_rank"]) <= 5 for row in rows) == result.top5.count
    np.testing.assert_allclose([float(row["probability"]) for row in rows], result.confidences, atol=1e-6)
    np.testing.assert_allclose(
        -np.log([float(row["label_probability"]) for row in rows]).mean(), result.loss, rtol=1e-3
    )
    names, *lines = csv.reader((tmp_path / "report" / "confusion.csv").read_text().splitlines())
    assert names[1:] == [line[0] for line in lines] == list(result.class_names)
    np.testing.assert_array_equal([[int(cell) for cell in line[1:]] for line in lines], result.confusion)
    found = json.loads((tmp_path / "report" / "results.json").read_text())
    assert found.items() >= (FACTS | summary(result)).items()
    assert (found["top1_err"], found["temperature"]) == (pytest.approx(100 - found["top1"]), result.temperature)


def test_predictions_as_parquet_are_those_of_the_csv_file(tmp_path: Path, source: list) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    result, folder = random_result(0), tmp_path / "report"
    write_report(result, folder, source=source, facts=FACTS)
    expected = list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))
    write_report(result, folder, source=source, facts=FACTS, predictions="parquet")
    assert not (folder / "predictions.csv").exists(), "it would be of an earlier report"
    table = parquet.read_table(folder / "predictions.parquet")
    assert table.column_names == list(expected[0])
    types = {name: str(table.schema.field(name).type) for name in ("file", "correct", "probability", "label_rank")}
    assert types == {"file": "string", "correct": "bool", "probability": "double", "label_rank": "int64"}
    for row, line in zip(table.to_pylist(), expected, strict=True):
        assert {name: line[name] for name in ("file", "label", "prediction")}.items() <= row.items()
        assert (str(int(row["correct"])), str(row["label_rank"])) == (line["correct"], line["label_rank"])
        for name in ("probability", "label_probability"):
            assert f"{row[name]:.6f}" == line[name]
    np.testing.assert_array_equal(table["probability"].to_numpy(), result.confidences)
    write_report(result, folder, source=source, facts=FACTS)
    assert not (folder / "predictions.parquet").exists()


def test_the_page_shows_the_worst_mistakes(tmp_path: Path, source: list) -> None:
    result = random_result(1)
    hostile = Evaluation(
        ("<b>ant</b>", *result.class_names[1:]),
        ("a&b\n.png", *result.files[1:]),
        result.labels,
        result.logits,
        indices=np.arange(300)[::-1],
        failures=(ImageError("<broken>.png: damaged"),),
    )
    write_report(hostile, tmp_path, source=source, facts=FACTS, title="A <title>")
    page = (tmp_path / "report.html").read_text()
    assert "<b>ant</b>" not in page and "&lt;b&gt;ant&lt;/b&gt;" in page and "A &lt;title&gt;" in page
    assert "&lt;broken&gt;.png: damaged" in page and "$" not in page
    assert "http" not in re.sub(r"base64,[^\"]*", "", page), "nothing is fetched"
    pictures = re.findall(r'<img alt="" src="data:image/jpeg;base64,([^"]*)"', page)
    worst = hostile.mistakes(24)
    assert len(pictures) == len(worst) == 24
    for picture, row in zip(pictures, worst, strict=True):  # of its own image, though the data stands in reverse
        color = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))).mean(axis=(0, 1))
        np.testing.assert_allclose(color, source[299 - row][0].getpixel((0, 0)), atol=4)
    assert page.count("data:image/svg+xml") == 3
    assert page.index(f"{100 * hostile.confidences[worst[0]]:.1f}%") < page.index(
        f"{100 * hostile.confidences[worst[9]]:.1f}%"
    )


@pytest.mark.parametrize("case", ["many classes", "one class", "no mistakes", "files that have gone"])
def test_unusual_evaluations_have_a_page(tmp_path: Path, source: list, case: str) -> None:
    result = random_result(0, 60)
    if case == "many classes":
        result = random_result(0, 300, 60)
    elif case == "one class":
        result = Evaluation(("ant",), ("a.png",), np.array([0]), np.ones((1, 1), np.float32))
    elif case == "no mistakes":
        result = dataclasses.replace(result, labels=result.predictions)
        assert result.top1.value == 1
    else:
        source = [(tmp_path / "gone.png", 0)] * 60
    write_report(result, tmp_path, source=source, facts=FACTS)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/svg+xml") == (2 if case == "many classes" else 3)
    assert ("<p>None.</p>" in page) == (case in ("one class", "no mistakes"))


def test_a_folder_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    require_new(tmp_path / "new", force=False)
    require_new(tmp_path, force=True)
    with pytest.raises(DataError, match="is there already; --force writes the report over it"):
        require_new(tmp_path, force=False)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: is there already$"):
        require_new(tmp_path / "file", force=True)
