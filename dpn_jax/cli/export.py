"""`dpn-jax export`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dpn_jax.checkpoint.write import writable_path
from dpn_jax.cli.options import ModelOptions, option
from dpn_jax.cli.output import DONE, describe
from dpn_jax.errors import ExportError, printable
from dpn_jax.inference.export import Platform, export_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(ModelOptions):
    """Export a model and its weights as one file that JAX runs without dpn_jax."""

    destination: Annotated[str, tyro.conf.Positional, option("DESTINATION")]
    """The file to write, usually *.jaxexport."""
    platforms: tuple[Platform, ...] = ("tpu", "cuda", "cpu")
    """Where the file will run: one platform gets its fast form, several get a portable one."""
    batch_size: int | Literal["symbolic"] = "symbolic"
    """Images per batch; symbolic means any number."""
    uint8: bool = False
    """Take uint8 images, resized and cropped, and normalize them in the program."""
    force: bool = False
    """Overwrite an existing DESTINATION."""

    def run(self) -> int:
        """Exports and prints what was written."""
        writable_path(self.destination, overwrite=self.force, error=ExportError)  # before a download
        model, settings = self.load()
        exported = export_model(
            model,
            self.destination,
            platforms=self.platforms,
            batch_size=None if self.batch_size == "symbolic" else self.batch_size,
            image_size=settings.image_size,
            uint8=self.uint8,
            overwrite=self.force,
        )
        (images,), (logits,) = exported.in_avals, exported.out_avals
        where, size = ", ".join(exported.platforms), Path(self.destination).stat().st_size
        what = f"{images.str_short()} to {logits.str_short()} on {where}, {size:,} bytes"
        print(f"{printable(self.destination)}: {what}; prepare images with {describe(settings)}")
        return DONE
