"""The model cards say what the package's data says, and the hub's client reads them."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from docs import cards
from dpn_jax.pretrained import PRETRAINED, list_pretrained

SITE = cards.FOLDER.parent
PLANNED = {"start/install.md", "guides/inference.md", "guides/finetune.md", "equal_to_timm.md", "network.md"}
SECTIONS = [
    "How to use",
    "Intended use",
    "Limits and bias",
    "Training data",
    "Training procedure",
    "Preprocessing",
    "Evaluation results",
    "License",
    "Citation",
    "Provenance",
]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """What `docs/cards.py` writes."""
    return cards.render()


def test_the_files_are_what_is_rendered(pages: dict[str, str]) -> None:
    assert {path.name: path.read_text("utf-8") for path in cards.FOLDER.iterdir()} == pages, "python -m docs.cards"


def test_every_tag_has_a_card_and_a_row(pages: dict[str, str]) -> None:
    assert set(pages) == {"index.md", *(f"{name}.md" for name in list_pretrained())}
    assert [line for line in pages["index.md"].splitlines() if line in PRETRAINED] == list_pretrained()
    assert all(f"[{name}]({name}.md)" in pages["index.md"] for name in PRETRAINED)


@pytest.mark.parametrize("name", PRETRAINED)
def test_the_hub_reads_a_card(name: str) -> None:
    tag, card = PRETRAINED[name], ModelCard.load(cards.FOLDER / f"{name}.md")
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert (results["top-1 accuracy"], results["top-5 accuracy"]) == (tag.top1, tag.top5)
    assert card.data.model_name == name and card.data.pipeline_tag == "image-classification"
    assert card.data.license and card.data.library_name and card.data.datasets
    assert re.findall(r"^## (.*)$", card.text, re.M) == SECTIONS


def test_accuracy_at_timms_test_size_is_told() -> None:
    card = ModelCard.load(cards.FOLDER / "dpn68b.ra_in1k.md")
    assert [result.metric_value for result in card.data.eval_results][2:] == [79.342, 94.43]
    assert "| center crop | 224 x 224 pixels (crop 0.95) | 288 x 288 pixels (crop 1) |" in card.text


def test_errors_of_the_authors_are_those_of_their_readme_and_this_cards_are_bold(pages: dict[str, str]) -> None:
    rows = [line for line in pages["dpn131.mx_in1k.md"].splitlines() if line.startswith(("| DPN-92 ", "| **"))]
    assert rows == [
        "| DPN-92 | 20.73% / 5.37% | 19.34% / 4.66% | 19.04% / 4.53% |",
        "| **DPN-131** | **19.93% / 5.12%** | **18.62% / 4.23%** | **18.55% / 4.16%** |",
    ]
    assert "| **DPN-107\\*** | " in pages["dpn107.mx_in1k.md"]
    assert "DPN-107" not in pages["dpn68b.ra_in1k.md"]


def test_weights_are_as_large_as_on_the_hub() -> None:
    sizes = {
        name: cards.weights_size(PRETRAINED[name]) for name in ("dpn68b.ra_in1k", "dpn98.mx_in1k", "dpn107.mx_in1k")
    }
    assert list(sizes.values()) == ["51 MB", "247 MB", "349 MB"]


@pytest.mark.parametrize("name", ["index", *PRETRAINED])
def test_a_page_of_the_site(pages: dict[str, str], name: str) -> None:
    text = pages[f"{name}.md"]
    assert not [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
    links = re.findall(r"\]\(([^)]+\.md)\)", text)
    there = {(cards.FOLDER / link).resolve().relative_to(SITE.resolve()).as_posix() for link in links}
    assert {link for link in there if not (SITE / link).is_file()} <= PLANNED
    unwrapped = " ".join(text.split())
    named = set(re.findall(r"\(\[([^]]+)\]|\[(paper)\]", unwrapped))
    assert {a or b for a, b in named} <= set(re.findall(r"^\[(.+)\]: http", text, re.M))


def test_a_card_is_skipped_offline_unless_the_weights_come_with_the_package(pages: dict[str, str]) -> None:
    skipped = {name for name in PRETRAINED if '% skip: next "needs the hub"\n\n```python' in pages[f"{name}.md"]}
    assert skipped == {name for name, tag in PRETRAINED.items() if not tag.packaged}


def test_what_no_tag_uses_is_no_fact() -> None:
    prose = cards._PROSE
    families = [family for tag in prose["tags"].values() for family in tag.get("families", ())]
    assert set(prose["tags"]) == set(PRETRAINED) and set(prose["families"]) == set(families)
    text = " ".join(Path(cards.__file__).with_suffix(".toml").read_text("utf-8").split())
    assert all(f"[{source}]" in text for source in prose["sources"])
