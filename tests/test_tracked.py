"""What is tracked names nothing of the machine that it was made on."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_no_paths_of_a_machine_and_no_registry() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    # written backwards, so that this file does not name them
    private = re.compile(
        "|".join(word[::-1] for word in ("vnev/pmt/", "segakcap-etis", "/toor/", "detsohnohtyp.selif", "gro.\\ipyp"))
    )
    found = [
        name
        for name in listed.stdout.split("\0")
        if name and (ROOT / name).is_file() and private.search((ROOT / name).read_bytes().decode("utf-8", "ignore"))
    ]
    assert not found
