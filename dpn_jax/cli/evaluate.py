"""`dpn-jax evaluate`."""

import contextlib
import dataclasses
import importlib.util
from pathlib import Path
from typing import Annotated

import tyro

from dpn_jax.checkpoint.names import parameter_count
from dpn_jax.cli.options import DEFAULT_TAG, ClassifierOptions, option
from dpn_jax.cli.output import (
    DONE,
    NOTHING_DONE,
    SOME_FAILED,
    Format,
    note,
    note_once,
    note_throughput,
    print_rows,
    progress,
)
from dpn_jax.errors import DataError, shown
from dpn_jax.evaluation.classes import labeled_images, read_real_labels, read_valid_labels
from dpn_jax.evaluation.evaluate import collect
from dpn_jax.evaluation.metrics import Evaluation
from dpn_jax.evaluation.published import published_for
from dpn_jax.evaluation.report import Predictions, model_facts, require_new, summary, write_report
from dpn_jax.images.sources import Unlabeled, are_crops
from dpn_jax.inference.classifier import Classifier
from dpn_jax.multihost import is_first, require_same, together
from dpn_jax.paths import local_path
from dpn_jax.pretrained import PRETRAINED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(ClassifierOptions):
    """Measure accuracy and calibration on labeled images."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Holds one folder of images per class, named by label, WordNet synset or class index; or was written
    by `dpn-jax pack`; or is a file *.csv with columns image (paths) and label (such names)."""
    report: Annotated[str | None, option("FOLDER")] = None
    """Write a page with figures and the worst mistakes, and the predictions, there."""
    predictions: Predictions = "csv"
    """Write the predictions of the report as predictions.csv, or as predictions.parquet, which needs pyarrow."""
    force: bool = False
    """Write the report into a folder that is there already."""
    valid_labels: Annotated[str | None, option("FILE", "all classes")] = None
    """A text file of the classes to choose among, one per line, as for ImageNet-A."""
    real_labels: Annotated[str | None, option("FILE")] = None
    """The real.json of ImageNet-ReaL: the right answers of each validation image."""
    format: Format = "table"
    """table for people; json or csv for programs."""

    def run(self) -> int:
        """Classifies every image, then prints the figures and writes the report."""
        report = self._checked_report()
        self.check()
        classifier = together(self.classifier)
        images = together(lambda: labeled_images(self.data, classifier))
        require_same(list(images.files), "images")
        prepared = together(lambda: are_crops(images, classifier.transform))
        count, path = len(classifier.labels), self.valid_labels
        valid = together(lambda: read_valid_labels(path, classifier)) if path else None
        path = self.real_labels
        answers = together(lambda: read_real_labels(path, images.files, count)) if path else None
        alone = Unlabeled(images)
        with contextlib.closing(classifier.stream_logits_in_processes(alone, prepared=prepared)) as rows:
            shown_rows = progress(rows, len(images), "image")
            labels = dict(enumerate(images.labels))
            result = collect(shown_rows, images, labels, classifier, valid_labels=valid, answers=answers)
        for failure in result.failures:
            note_once(str(failure))
        if not len(result):
            return NOTHING_DONE
        result = dataclasses.replace(result, throughput=classifier.throughput)
        if is_first():
            self._print(result)
            if report is not None:
                title = f"{self._name()} on {shown(self.data)}"
                told = {"facts": self._facts(classifier), "title": title, "predictions": self.predictions}
                write_report(result, report, source=images, **told)
                note(f"the report is {shown(report / 'report.html')}")
        note_throughput(classifier.throughput)
        return SOME_FAILED if result.failures else DONE

    def _checked_report(self) -> Path | None:
        if self.report is None:
            if self.predictions != "csv":
                raise ValueError(f"--predictions {self.predictions} is of a report; name its folder: --report FOLDER")
            return None
        if importlib.util.find_spec("matplotlib") is None:
            raise DataError('--report draws figures with matplotlib: pip install "dpn-jax[explain]"')
        if self.predictions == "parquet" and importlib.util.find_spec("pyarrow") is None:
            raise DataError("--predictions parquet: pyarrow writes Parquet: pip install pyarrow, or --predictions csv")
        folder = local_path(self.report, error=DataError)
        require_new(folder, force=self.force)
        return folder

    def _name(self) -> str:
        return shown(self.exported or self.weights or self.model or DEFAULT_TAG)

    def _facts(self, classifier: Classifier) -> dict[str, object]:
        """What timm's results files have of a model, and what else decides the figures."""
        settings, published = classifier.transform.preprocessing, self._published()
        parameters = None if classifier.config is None else parameter_count(classifier.config)
        return model_facts(self._name(), settings, self.dtype, parameters) | {
            "data": self.data,
            "valid_labels": self.valid_labels,
            "real_labels": self.real_labels,
            "published": published and f"top-1 {published[0]:.3f}%, top-5 {published[1]:.3f}% ({published[2]})",
        }

    def _published(self) -> tuple[float, float, str] | None:
        """Top-1 and top-5 in percent that others have measured with these weights, and who on what."""
        tag = (self.model or DEFAULT_TAG).removeprefix("timm/")
        if self.exported or self.weights or self.valid_labels or tag not in PRETRAINED:
            return None
        known = PRETRAINED[tag]
        settings = (self.use_test_size and known.test_preprocessing) or known.preprocessing
        if found := published_for(tag, self.image_size or settings.height, test_time_pool=self.test_time_pool):
            return found.top1, found.top5, f"{found.source}, ImageNet-1k"
        if known.packaged and self.image_size in (None, settings.height):
            return known.top1, known.top5, f"of this package, {known.data}"
        return None

    def _print(self, result: Evaluation) -> None:
        row = summary(result)
        published = self._published()
        if published:
            row |= {"published_top1": published[0], "published_top5": published[1]}
        lines = [("images", f"{row['images']:,} ({row['failed']} failed)")]
        for name, key in (("top-1", "top1"), ("top-5", "top5")):
            beside = f"; published {published[key == 'top5']:.3f}%" if published else ""
            lines.append((name, f"{row[key]:.3f}% (95%: {row[f'{key}_low']:.3f} to {row[f'{key}_high']:.3f}{beside})"))
        lines += [
            ("balanced accuracy", f"{row['balanced_accuracy']:.3f}%"),
            ("macro F1", f"{row['macro_f1']:.3f}%"),
            ("loss", f"{row['loss']:.4f}"),
            ("calibration error", f"{row['calibration_error']:.3f}%"),
        ]
        if row["images_per_second"] is not None:
            lines.append(("images/s", f"{row['images_per_second']:.1f}"))
        print_rows([row], self.format, "\n".join(f"{name:<18} {value}" for name, value in lines))
        if published and self.format == "table":
            note(f"published: {published[2]}")
