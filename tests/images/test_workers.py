"""Worker processes are started so that a Ctrl-C, which goes to all of a terminal's processes, does not reach them."""

import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dpn_jax.images.loading import crops
from dpn_jax.images.workers import prefetched


def held() -> bool:
    """Whether SIGINT waits in this thread."""
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


class Masks(Sequence[bool]):
    """What `held` says where an item is read."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> bool:
        return held()


def mask(path: Path) -> np.ndarray:
    return np.array(held())


@pytest.mark.slow
def test_an_interrupt_waits_in_workers_from_their_start_and_not_here() -> None:
    pytest.importorskip("grain")
    assert list(prefetched(Masks(), 2)) == [True] * 6
    assert [bool(found) for found in crops([Path("a")] * 20, mask, ahead=4, workers=2)] == [True] * 20
    assert not held()
    assert list(prefetched(Masks(), 0)) == [False] * 6
    assert [bool(found) for found in crops([Path("a")] * 20, mask, ahead=4)] == [False] * 20
