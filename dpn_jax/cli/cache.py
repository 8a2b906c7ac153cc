"""What JAX compiles is kept for the next run of the command."""

import os
import warnings
from pathlib import Path

import jax


def keep_compiled() -> None:
    """Switches JAX's persistent compilation cache on, in the user's cache folder.

    The environment's own choice stays: `JAX_COMPILATION_CACHE_DIR`, or `JAX_ENABLE_COMPILATION_CACHE=0` for none. Where
    the folder cannot be written, everything works as without it. JAX keeps what took a second to compile.
    """
    # an entry that cannot be read or written costs a compilation, and is not worth two lines of warning
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpn-jax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only home, or none
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
