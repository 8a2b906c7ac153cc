"""The process's memory: what XLA frees on a CPU is kept for its next call."""

import ctypes
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets the C library keep freed memory for the next request instead of giving it back to the system.

    XLA asks for a program's temporary memory anew in each call. On a CPU that is `malloc`, and glibc has blocks of that
    size mapped, zeroed page by page and unmapped each time: 227,000 page faults in a training step of DPN-68, batch 8,
    and a sixth of its time. After this call there are next to none. The process's memory stays at its peak.

    Call it before JAX makes its first array, because threads that exist already keep their own memory. The `dpn-jax`
    command does so; for a process of another program the environment does the same:
    `GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=-1:glibc.malloc.arena_max=1`.

    Returns:
      Whether the C library has agreed; False where it is not glibc.

    Example:
      >>> import dpn_jax
      >>> kept = dpn_jax.keep_freed_memory()

    Source: mallopt(3); docs/performance.md, "A training step".
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has neither this nor mallopt
        return False
    # one arena: large requests of another arena's thread are mapped whatever the limit of mappings is
    choices = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    return all(library.mallopt(parameter, value) for parameter, value in choices)
