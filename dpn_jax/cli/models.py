"""`dpn-jax models`."""

import dataclasses
from collections.abc import Iterator

from dpn_jax.checkpoint.names import parameter_count
from dpn_jax.cli.options import Command
from dpn_jax.cli.output import DONE, Format, describe, print_rows, text_table
from dpn_jax.config import VARIANTS
from dpn_jax.pretrained import PRETRAINED, default_preprocessing

_HEAD = ("weights", "parameters", "GMACs", "top-1", "top-5", "data", "preprocessing")


@dataclasses.dataclass(frozen=True)
class Models(Command):
    """List the variants and their published weights."""

    format: Format = "table"
    """table for people; json (one object per line) or csv for programs."""

    def run(self) -> int:
        """Prints a row for each set of weights, and for each variant without any."""
        rows = [row for variant in VARIANTS for row in self._rows(variant)]
        print_rows(rows, self.format, text_table(_HEAD, map(self._cells, rows)))
        return DONE

    def _rows(self, variant: str) -> Iterator[dict[str, object]]:
        tags = [(name, tag) for name, tag in PRETRAINED.items() if tag.variant == variant]
        for name, tag in tags or [(None, None)]:
            config = tag.config if tag else VARIANTS[variant]
            settings = tag.preprocessing if tag else default_preprocessing(config)
            size = {
                "parameters": parameter_count(config),
                "gmacs": round(config.multiply_adds(settings.height, settings.width) / 1e9, 3),
            }
            accuracy = {key: getattr(tag, key) if tag else None for key in ("top1", "top5", "data")}
            yield {"weights": name, "variant": variant, **size, **accuracy, "preprocessing": describe(settings)}

    def _cells(self, row: dict[str, object]) -> tuple[str, ...]:
        top1, top5 = (f"{row[key]:.3f}" if row[key] else "-" for key in ("top1", "top5"))
        return (
            row["weights"] or f"{row['variant']} (none)",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['gmacs']:.3f}",
            top1,
            top5,
            row["data"] or "-",
            row["preprocessing"],
        )
