"""The tables and the drawing of docs/network.md say what the code says."""

import dataclasses
import re
from pathlib import Path

from dpn_jax.blocks import DualPath, DualPathBlock
from dpn_jax.checkpoint.names import parameter_count
from dpn_jax.config import VARIANTS, DPNConfig, StageConfig

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = DualPathBlock(VARIANTS["dpn_tiny"].stages[0], 0, split_expand=False, rngs=None)


def table(first_column: str) -> list[list[str]]:
    """The cells of the table whose header begins so, without the header."""
    page = (DOCS / "network.md").read_text(encoding="utf-8")
    _, found, rest = page.partition(f"\n| {first_column} |")
    assert found, first_column
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def row(name: str, config: DPNConfig) -> list[str]:
    depths, increments = (", ".join(map(str, sizes)) for sizes in (config.depths, config.dense_increments))
    widths = map(str, (config.bottleneck_width, config.groups, config.residual_width))
    stem = f"{config.stem_kernel}x{config.stem_kernel}, {config.stem_features}"
    size = (f"{parameter_count(config) / 1e6:.2f} M", f"{config.multiply_adds() / 1e9:.2f}")
    return [name, depths, increments, *widths, stem, *size]


def test_the_variants() -> None:
    assert table("variant") == [row(name, config) for name, config in VARIANTS.items()]
    assert all(config.split_expand == name.endswith("b") for name, config in VARIANTS.items())


def test_the_growth_of_dpn92() -> None:
    expected = []
    for number, stage in enumerate(VARIANTS["dpn92"].stages, start=1):
        dense = stage.out_channels - stage.residual
        sizes = (number, stage.depth, stage.residual, stage.increment, stage.in_channels, stage.block_in_channels(1))
        share = f"{dense} ({dense / stage.out_channels:.0%})"
        expected.append([*map(str, sizes), str(stage.out_channels), share])
    assert table("stage") == expected


def test_the_shapes_of_dpn92() -> None:
    rows = {cells[0]: cells[1:] for cells in table("part")}
    for index, stage in enumerate(VARIANTS["dpn92"].stages):
        side = 224 // stage.reduction
        assert rows[f"`stages[{index}]`"] == [
            str(stage.depth),
            f"[{side}, {side}, {stage.out_channels}]",
            f"{stage.residual} + {stage.out_channels - stage.residual}",
            f"{stage.bottleneck}, {stage.bottleneck // stage.groups}",
        ]


def test_the_drawing_has_the_names_of_the_code() -> None:
    drawing = (DOCS / "images" / "dual_path_block.svg").read_text(encoding="utf-8")
    names = re.findall(r'<text class="code name[^>]*>(\w+)</text>', drawing)
    assert {name for name in names if not hasattr(BLOCK, name)} == set(DualPath._fields)
    assert set(names) == {"shortcut", "reduce", "grouped", "expand", *DualPath._fields}
    fields = set(re.findall(r"= stage\.(\w+)", drawing))
    assert fields == {"residual", "increment", "bottleneck", "groups"}
    assert fields <= {field.name for field in dataclasses.fields(StageConfig)}
