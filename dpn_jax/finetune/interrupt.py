"""SIGTERM and Ctrl-C as a request, which the training loop grants where it can save."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interruption:
    """Whether somebody wants the run to stop.

    Example:
      >>> with catch_interruption() as interruption:
      ...     signal.raise_signal(signal.SIGTERM)
      ...     interruption.wanted
      'SIGTERM'
    """

    def __init__(self) -> None:
        self.wanted: str | None = None
        """The signal's name, once one came."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal; the second Ctrl-C stops at once, without saving."""
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.wanted = signal.Signals(number).name


@contextlib.contextmanager
def catch_interruption() -> Iterator[Interruption]:
    """Catches SIGTERM and SIGINT meanwhile; in the main thread only, since Python gives signals to no other."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.signal(number, interruption) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
