"""Commands on the pages: options exist, and what a `console` block prints is what the command prints."""

import doctest
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpn_jax.cli.words import parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").glob("*.md"))]
PAGES = [page for page in PAGES if page.parent not in (ROOT / "docs" / "notebooks", ROOT / "docs" / "recipes")]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[list[str]]:
    """The words after each `dpn-jax` in the shell blocks of a page."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for quoted in [word for word in words if word.startswith("dpn-jax ")]:  # --command "dpn-jax ..."
                yield shlex.split(quoted)[1:]
            while "dpn-jax" in words:
                words = words[words.index("dpn-jax") + 1 :]
                yield list(itertools.takewhile(lambda word: word not in (">", "&&", "|"), words))


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=lambda page: page.stem)
def test_documented_options_exist(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options.json").write_text("{}")
    for words in commands(page):
        if words != ["--version"]:
            parse(words)


def test_an_option_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(ValueError, match="--colour"):
        parse(["classify", "photo.jpg", "--colour", "red"])


@pytest.mark.docs
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "console")], ids=lambda page: page.stem)
def test_a_console_block_prints_what_it_shows(page: Path, tmp_path: Path) -> None:
    """Runs the commands of a page one after another; `...` stands for anything, as in doctest."""
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    folder = Path(sys.executable).parent
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    for block in blocks(page, "console"):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, expected = step.partition("\n")
            done = subprocess.run(
                command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
            )
            assert not done.returncode, done.stderr
            same = doctest.OutputChecker().check_output(
                expected, done.stdout, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            )
            assert same, f"$ {command}\n{done.stdout}"
