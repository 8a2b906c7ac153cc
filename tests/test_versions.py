"""The versions that `pyproject.toml` declares agree with the other files; `.ci/versions` tries them."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dpn_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINNED = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
}
LOWEST = {
    canonicalize_name(requirement.name): requirement
    for requirement in map(Requirement, [*PROJECT["dependencies"], *EXTRAS["finetune"], *EXTRAS["ray"]])
}


@pytest.mark.parametrize("name", LOWEST)
def test_a_constraint_is_a_version_that_is_allowed(name: str) -> None:
    assert LOWEST[name].specifier.contains(PINNED[name])


@pytest.mark.parametrize("name", LOWEST)
def test_a_lowest_version_is_declared(name: str) -> None:
    assert any(bound.operator == ">=" for bound in LOWEST[name].specifier)


@pytest.mark.parametrize("extra", ["tpu", "cuda"])
def test_jax_is_the_same_for_every_accelerator(extra: str) -> None:
    (requirement,) = map(Requirement, EXTRAS[extra])
    assert (requirement.name, requirement.specifier) == ("jax", LOWEST["jax"].specifier)


def test_the_oldest_and_the_newest_python_are_tried() -> None:
    named = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.M)
    tried = re.findall(r"^run (?:lowest-direct|highest) (\S+)", (ROOT / ".ci" / "versions").read_text(), re.M)
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert tried == [named[0], named[-1]]


def test_the_files_of_a_release_agree() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", text, re.M)[0]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert version == dpn_jax.__version__
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation
