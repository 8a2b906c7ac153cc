from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """float64 is available, and float32 products are not shortened."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield
