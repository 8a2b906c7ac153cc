"""The cycles of a whole program: for each operation the larger of its schedule and its traffic with HBM."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.tpu.bundles import Loop, parse
from benchmarks.tpu.program import Operation, Program


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a kind of TPU can do."""

    clock: float
    """Cycles a second."""
    hbm_rate: float
    """Bytes a second."""
    hbm: int
    """Bytes that a program may use."""
    matrix_speed: int = 1
    """How much faster the matrix units are than a v5e's."""


CHIPS = {
    "v5e": Chip(clock=1.5e9, hbm_rate=819e9, hbm=int(15.75 * 2**30)),
    "v6e": Chip(clock=1.75e9, hbm_rate=1640e9, hbm=int(31.25 * 2**30), matrix_speed=2),  # the clock is an assumption
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one operation takes."""

    operation: Operation
    compute: float
    """Cycles of its schedule."""
    bytes: int
    """To and from HBM."""
    traffic: float
    """Cycles of those bytes at HBM's full rate."""
    unknown: int
    """Loops whose number of trips is unknown, each counted as one trip."""

    @property
    def cycles(self) -> float:
        """The larger of both: the transfers of a scheduled operation run beside its arithmetic."""
        return max(self.compute, self.traffic)


def costs(program: Program, schedules: Mapping[str, Loop], chip: Chip) -> list[Cost]:
    """The cost of each operation that the program runs, asynchronous transfers aside.

    Args:
      program: the program.
      schedules: an operation's code, by its name; of equal operations one is enough.
      chip: what it was compiled for.

    Raises:
      ValueError: an operation has no schedule, nor has an equal one.
    """
    run = [each for each in program.operations if not (each.is_free or each.is_transfer or program.is_scalar(each))]
    of_equals = {program.signature(each): schedules[each.name] for each in run if each.name in schedules}
    result, missing = [], []
    for operation in run:
        schedule = schedules.get(operation.name) or of_equals.get(program.signature(operation))
        if schedule is None:
            missing.append(operation)
            continue
        size = program.bytes(operation)
        compute = schedule.cycles(matrix_speed=chip.matrix_speed)
        result.append(Cost(operation, compute, size, size * chip.clock / chip.hbm_rate, schedule.unknown()))
    if missing:
        names = ", ".join(f"{operation.name} ({operation.opcode})" for operation in missing[:3])
        raise ValueError(f"{len(missing)} of {len(run)} operations have no schedule, among them {names}")
    return result


def transferred(program: Program) -> int:
    """The bytes that asynchronous transfers move between HBM and VMEM, beside the other operations."""
    starts = (operation for operation in program.operations if operation.is_transfer)
    return sum(min(array.bytes for array in each.outputs[:2]) for each in starts)  # of a slice, not of the whole


def read_schedules(folder: Path) -> dict[str, Loop]:
    """What the compiler has dumped into a folder: each operation's code, by the operation's name."""
    schedules = {}
    for path in folder.glob("*-final_bundles.txt"):
        if found := re.fullmatch(r"\d+-(.+)-\d+-final_bundles\.txt", path.name):
            schedules[found[1]] = parse(path.read_text(errors="replace"))
    return schedules
