"""Runs the pages' Python blocks, one namespace a page: `python -m pytest -m docs docs` (needs the extra `docs`)."""

from pathlib import Path

import pytest

collect_ignore = ["notebooks", "recipes", "conf.py", "pictures.py"]  # copies, and scripts with needs of their own
pytest_collect_file = None
try:
    from sybil import Sybil
    from sybil.parsers.myst import PythonCodeBlockParser, SkipParser
except ImportError:
    pass
else:
    pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["*.md", "**/*.md"]).pytest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks them."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.docs)
