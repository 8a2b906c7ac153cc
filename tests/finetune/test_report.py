"""What a run leaves in its folder."""

import dataclasses
import json
from pathlib import Path

import pytest

from dpn_jax.errors import RunError
from dpn_jax.finetune import FinetuneConfig
from dpn_jax.finetune.report import RECORD, Record, check_record, start_record
from dpn_jax.pretrained import Preprocessing
from tests.support.models import TINY


def test_a_run_of_an_older_version_had_the_defaults_of_newer_options(tmp_path: Path) -> None:
    record = Record(FinetuneConfig(), "dpn68b", TINY, Preprocessing(), ("cat", "dog"), {"train": [2, "a"]})
    start_record(tmp_path / "run", record)
    path = tmp_path / "run" / RECORD
    saved = json.loads(path.read_text())
    del saved["config"]["fast"], saved["preprocessing"]["crop_mode"]
    path.write_text(json.dumps(saved))
    check_record(tmp_path / "run", record)
    plain = dataclasses.replace(record, config=FinetuneConfig(fast=False))
    with pytest.raises(RunError, match="cannot be resumed: different fast \\(fast was true, now false\\)"):
        check_record(tmp_path / "run", plain)
    squashed = dataclasses.replace(record, preprocessing=Preprocessing(crop_mode="squash"))
    with pytest.raises(RunError, match="cannot be resumed: different preprocessing"):
        check_record(tmp_path / "run", squashed)
