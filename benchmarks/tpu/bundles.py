"""The cycles of one operation's code, from the VLIW bundles that the TPU's compiler has scheduled for it.

A bundle issues in one cycle, unless what it asks of a matrix unit has to wait. So a loop takes, each time round, as
many cycles as it has bundles or as its busiest matrix unit is occupied, whichever is more.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+ +([A-Z]{2})? *: (>*) ?\{")
_EXIT = re.compile(r"scmp\.\w+\.s32\.totalorder %\w+, (\d+) /\* loop exit test \*/")
_STAGE = re.compile(r"iteration index, stage = (\d+)")
_MATRIX = re.compile(r"(vmatmul|vmatpush)([\w.]*)\.mxu(\d)")

OVERHEAD = 1.0625
"""What a matrix unit takes above the occupancy of its products: calibrated on the compiler's static profile."""


@dataclasses.dataclass
class Loop:
    """A loop of an operation's code, or the code around all of them."""

    depth: int
    bundles: int = 0
    trips: int | None = None
    """How often it goes round; None where the code finds that out when it runs."""
    stages: int = 0
    """Trips that only fill and drain its software pipeline."""
    products: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Cycles that the products occupy each matrix unit, each time round, on a v5e."""
    pushes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """The same of loading the matrices, which runs beside the products."""
    inner: list["Loop"] = dataclasses.field(default_factory=list)

    def cycles(self, *, matrix_speed: int = 1) -> float:
        """The cycles of the loop, those inside it included.

        Args:
          matrix_speed: how much faster the matrix units are than a v5e's.
        """
        products, pushes = (max(unit.values(), default=0) / matrix_speed for unit in (self.products, self.pushes))
        once = max(self.bundles, OVERHEAD * products, pushes)
        trips = 1 if self.trips is None else max(1, self.trips - self.stages)
        return trips * (once + sum(loop.cycles(matrix_speed=matrix_speed) for loop in self.inner))

    def unknown(self) -> int:
        """How many of the loops have an unknown number of trips, each counted as one."""
        return (self.trips is None) + sum(loop.unknown() for loop in self.inner)


def parse(text: str) -> Loop:
    """Reads the dump of one operation, `*-final_bundles.txt`.

    Returns:
      The code around all loops, as a loop of one trip.

    Raises:
      ValueError: there are no bundles in it.
    """
    code = Loop(depth=0, trips=1)
    open_loops = [code]
    for tag, depth, bundle in _bundles(text):
        if tag == "LB":
            while open_loops[-1].depth >= depth:
                open_loops.pop()
            loop = Loop(depth)
            open_loops[-1].inner.append(loop)
            open_loops.append(loop)
        # not the innermost one at once: a branch's delay slots inside a loop are marked as if they were outside
        _add(next(loop for loop in reversed(open_loops) if loop.depth <= depth), bundle)
    if not code.bundles and not code.inner:
        raise ValueError("the dump has no bundles")
    return code


def _bundles(text: str) -> Iterator[tuple[str | None, int, str]]:
    """The tag of each bundle, such as LB for a loop's body, how many loops it is in, and what it does."""
    current: tuple[str | None, int, list[str]] | None = None
    for line in text.splitlines():
        if found := _BUNDLE.match(line):
            if current:
                yield current[0], current[1], "\n".join(current[2])
            current = found[1], len(found[2]), [line]
        elif current:
            current[2].append(line)
    if current:
        yield current[0], current[1], "\n".join(current[2])


def _add(loop: Loop, bundle: str) -> None:
    loop.bundles += 1
    for kind, form, unit in _MATRIX.findall(bundle):
        packed = "bf16" in form and not ("lmr" in form and form.endswith(".16"))
        if kind == "vmatmul":
            loop.products[unit] += 16 if packed else 8
        else:
            loop.pushes[unit] += 4 if "bf16" in form else 2
    if found := _EXIT.search(bundle):
        loop.trips = int(found[1])
    loop.stages = max([loop.stages, *map(int, _STAGE.findall(bundle))])
