"""JAX's persistent compilation cache, so that the next run of the command compiles nothing again."""

import os
import warnings
from pathlib import Path

import jax


def keep_compiled() -> None:
    """Switches JAX's persistent compilation cache on, in the user's cache folder.

    The environment takes precedence: `JAX_COMPILATION_CACHE_DIR`, or `JAX_ENABLE_COMPILATION_CACHE=0` for no cache. If
    the folder cannot be written, the command runs without a cache. JAX stores what took at least a second to compile.
    """
    # an entry that cannot be read or written costs one compilation, which needs no warning
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpn-jax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only home, or none
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
