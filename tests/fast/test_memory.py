"""Real processes, whose page faults the system counts."""

import subprocess
import sys

import pytest

import dpn_jax

CHILD = """
import resource
import dpn_jax
if {keep}:
    assert dpn_jax.keep_freed_memory()
import jax, jax.numpy as jnp
# the product is temporary: 64 MB
run = jax.jit(lambda x: jnp.sin(x @ x.T) @ x)
x = jnp.ones((4096, 16))
run(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    run(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    script = CHILD.format(keep=keep)
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems' C libraries differ")
def test_temporary_memory_is_kept() -> None:
    pages = 30 * 64 * 2**20 // 4096
    assert faults(keep=False) > 0.9 * pages
    assert faults(keep=True) < 0.5 * pages  # a small block in the middle of what was freed asks for a new one, at times


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not dpn_jax.keep_freed_memory()
