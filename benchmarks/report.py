"""What every benchmark says about where and with what it ran."""

import importlib.metadata
import os
import platform
import shlex
import sys

PACKAGES = ("jax", "flax", "numpy", "torch", "timm")


def setting(module: str) -> dict[str, object]:
    """The command, the machine and the versions.

    Args:
      module: the benchmark's name, as in `python -m benchmarks.cpu`.
    """
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "processor": platform.processor() or platform.machine(),
        "threads": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def print_setting(module: str) -> dict[str, object]:
    """Prints `setting(module)` in two lines, and returns it."""
    fields = setting(module)
    print(f"$ {fields['command']}")
    print(", ".join(f"{name} {value}" for name, value in fields.items() if name != "command"), flush=True)
    return fields


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
