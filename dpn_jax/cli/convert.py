"""`dpn-jax convert`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dpn_jax.checkpoint.load import from_pretrained
from dpn_jax.checkpoint.publish import save_pretrained
from dpn_jax.checkpoint.save import convert
from dpn_jax.cli.options import Command, Dtype, option
from dpn_jax.cli.output import DONE
from dpn_jax.config import variant_of
from dpn_jax.errors import printable
from dpn_jax.paths import is_url


@dataclasses.dataclass(frozen=True)
class Convert(Command):
    """Convert weights from timm's layout to Flax's, or back, or for the hub."""

    source: Annotated[str, tyro.conf.Positional, option("SOURCE")]
    """A file (.pth and .bin need torch), a folder with config.json and weights, a tag or a hub id."""
    destination: Annotated[str, tyro.conf.Positional, option("DESTINATION")]
    """The .safetensors file to write; or a folder, for timm's hub layout with a model card."""
    to: Annotated[Literal["flax", "timm"] | None, option("{flax,timm}", "the one that SOURCE is not in")] = None
    """The layout to write."""
    model: Annotated[str | None, option("VARIANT", "that of SOURCE")] = None
    """The architecture."""
    dtype: Annotated[Dtype | None, option("{float32,bfloat16,float16}", "that of SOURCE")] = None
    """Dtype of the weights to write."""
    revision: Annotated[str | None, option("REVISION")] = None
    """Branch, tag or commit on the hub."""
    force: bool = False
    """Overwrite an existing DESTINATION."""
    allow_nonfinite: bool = False
    """Accept weights with NaN, infinity or negative variances."""

    def run(self) -> int:
        """Converts and prints what was written."""
        if not Path(self.destination).suffix:
            return self._publish()
        read = convert(
            self.source,
            self.destination,
            to=self.to,
            model=self.model,
            dtype=self.dtype,
            revision=self.revision,
            overwrite=self.force,
            allow_nonfinite=self.allow_nonfinite,
        )
        layout = self.to or ("flax" if read.is_timm else "timm")
        variant = variant_of(read.config) or "a custom DPN"
        size = Path(self.destination).stat().st_size
        print(
            f"{printable(self.destination)}: {variant}, {len(read.tensors)} tensors in {layout} layout, {size:,} bytes"
        )
        return DONE

    def _publish(self) -> int:
        if self.to is not None:
            raise ValueError(f"--to has no meaning for a folder: it gets timm's layout; got --to {self.to}")
        options = {"model": self.model, "revision": self.revision, "allow_nonfinite": self.allow_nonfinite}
        model = from_pretrained(self.source, param_dtype=self.dtype or "float32", **options)
        facts = None
        if not is_url(self.source) and (Path(self.source) / "metrics.jsonl").is_file():  # a run, which needs optax
            from dpn_jax.finetune.report import run_facts

            facts = run_facts(Path(self.source))
        folder = save_pretrained(model, self.destination, facts=facts, overwrite=self.force)
        files = ", ".join(sorted(path.name for path in folder.iterdir()))
        print(f"{printable(folder)}: {variant_of(model.config) or 'a custom DPN'} in timm's hub layout: {files}")
        return DONE
