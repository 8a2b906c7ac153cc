"""The package's types, as a user's type checker sees them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_users_script_over_the_public_face_is_typed(tmp_path: Path) -> None:
    """Each `assert_type` in the script holds: no `Any` where a type is known."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path, "tests/support/user_script.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stdout
