"""`dpn-jax models`."""

import csv
import dataclasses
import json
import math
import sys
from collections.abc import Iterator

from dpn_jax.checkpoint.names import name_table
from dpn_jax.cli.output import DONE, Format, describe
from dpn_jax.config import VARIANTS
from dpn_jax.pretrained import PRETRAINED, default_preprocessing


@dataclasses.dataclass(frozen=True)
class Models:
    """List the variants and the published weights."""

    format: Format = "table"
    """table for people; json (one object a line) or csv for programs."""

    def run(self) -> int:
        """Prints a row for each set of weights, and for each variant without any."""
        rows = [row for variant in VARIANTS for row in self._rows(variant)]
        if self.format == "json":
            for row in rows:
                print(json.dumps(row))
        elif self.format == "csv":
            writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        else:
            print(f"{'weights':<16}{'parameters':>12}{'GMACs':>8}{'top-1':>9}{'top-5':>9}  {'of':<12} preprocessing")
            for row in rows:
                top1, top5 = (f"{row[key]:.3f}" if row[key] else "-" for key in ("top1", "top5"))
                print(
                    f"{row['weights'] or row['variant'] + ' (none)':<16}{row['parameters'] / 1e6:>10.2f} M"
                    f"{row['gmacs']:>8.2f}{top1:>9}{top5:>9}  {row['data'] or '-':<12} {row['preprocessing']}"
                )
        return DONE

    def _rows(self, variant: str) -> Iterator[dict[str, object]]:
        tags = [(name, tag) for name, tag in PRETRAINED.items() if tag.variant == variant]
        for name, tag in tags or [(None, None)]:
            config = tag.config if tag else VARIANTS[variant]
            settings = tag.preprocessing if tag else default_preprocessing(config)
            size = {
                "parameters": sum(math.prod(entry.timm_shape) for entry in name_table(config) if entry.is_parameter),
                "gmacs": round(config.multiply_adds(settings.image_size, settings.image_size) / 1e9, 3),
            }
            accuracy = {key: getattr(tag, key) if tag else None for key in ("top1", "top5", "data")}
            yield {"weights": name, "variant": variant, **size, **accuracy, "preprocessing": describe(settings)}
