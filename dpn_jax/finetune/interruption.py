"""Signals that ask a run to stop."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@dataclasses.dataclass
class Interruption:
    """Whether a signal has asked the run to stop."""

    signal: int | None = None
    """Its number."""

    @property
    def requested(self) -> bool:
        """Whether there was one."""
        return self.signal is not None


@contextlib.contextmanager
def catch_interruption() -> Iterator[Interruption]:
    """Turns SIGTERM and Ctrl-C into a request, so that the loop can save; a second Ctrl-C stops at once.

    Only in the main thread: Python handles signals in no other.

    Example:
      >>> with catch_interruption() as interruption:
      ...     signal.raise_signal(signal.SIGTERM)
      ...     interruption.requested
      True
    """
    interruption = Interruption()

    def handle(number: int, frame: FrameType | None) -> None:
        if interruption.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        interruption.signal = number

    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT) if in_main}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
