"""The text of a compiled TPU program: its operations, in order, and the bytes each moves to and from HBM."""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator

FREE = frozenset({"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id"})
"""Opcodes that nothing is run for."""

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_HEADER = re.compile(r"^(ENTRY )?%(\S+) \(")
_OPERATION = re.compile(r"^\s+(ROOT )?%(\S+) = ")
_CALLED = re.compile(r"\b(?:calls|to_apply)=%([^\s,]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array as the compiler lays it out."""

    text: str
    dtype: str
    shape: tuple[int, ...]
    layout: tuple[int, ...]
    """Dimensions, from the fastest moving one."""
    tile: tuple[int, ...]
    """Sides of the outermost tile, the lanes last; empty without tiles."""
    in_hbm: bool

    @property
    def bytes(self) -> int:
        """Size in memory, padded to whole tiles."""
        sides = list(self.shape)
        for dimension, side in zip(self.layout, reversed(self.tile), strict=False):
            sides[dimension] = -(-sides[dimension] // side) * side
        bits = _BITS.get(self.dtype) or int(re.search(r"\d+", self.dtype)[0])
        return math.prod(sides) * bits // 8


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a computation."""

    name: str
    opcode: str
    outputs: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def calls(self) -> str | None:
        """The computation that a fusion runs."""
        found = re.search(r"\bcalls=%([^\s,]+)", self.attributes)
        return found and found[1]

    @property
    def is_free(self) -> bool:
        """Whether nothing is run for it: a name for something else, or the end of a transfer."""
        return (
            self.opcode in FREE
            or self.opcode.endswith("-done")
            or 'custom_call_target="ConcatBitcast"' in self.attributes
        )

    @property
    def is_transfer(self) -> bool:
        """Whether it only starts an asynchronous transfer between HBM and VMEM, which runs beside the others."""
        return self.opcode in ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: the operations of each computation, and the name of the one that runs them all."""

    computations: dict[str, tuple[Operation, ...]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Reads what `jax.stages.Compiled.as_text` returns.

        Args:
          text: scheduled HLO, with layouts.

        Raises:
          ValueError: it has no entry computation.
        """
        computations: dict[str, list[Operation]] = {}
        entry, current = None, None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            elif (found := _OPERATION.match(line)) and current is not None:
                current.append(_operation(found[2], line[found.end() :], is_root=found[1] is not None))
        if entry is None:
            raise ValueError("the text of the program has no ENTRY computation")
        return cls({name: tuple(operations) for name, operations in computations.items()}, entry)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The operations that the program runs, in order."""
        return self.computations[self.entry]

    @functools.cached_property
    def arrays(self) -> dict[str, tuple[Array, ...]]:
        """What each operation of the program gives, by name."""
        return {operation.name: operation.outputs for operation in self.operations}

    def collectives(self) -> collections.Counter[str]:
        """How many of each kind of collective the program has, fused or not."""
        names = (operation.opcode.removesuffix("-start") for body in self.computations.values() for operation in body)
        return collections.Counter(name for name in names if name in COLLECTIVES)

    def bytes(self, operation: Operation) -> int:
        """The bytes that an operation moves to and from HBM, tiles and all; of what it slices, the slice."""
        reads = sum(self._read(operation, number) for number in range(len(operation.operands)))
        return reads + sum(self._written(operation))

    def signature(self, operation: Operation) -> tuple[object, ...]:
        """The same for operations that share one piece of code: the compiler dumps it once."""
        operands = tuple(tuple(array.text for array in self.arrays[name]) for name in operation.operands)
        window = re.search(r'"window_config":\{.*?\}', operation.attributes)
        body = "\n".join(self._body(operation))
        return operation.opcode, tuple(array.text for array in operation.outputs), operands, window and window[0], body

    def is_scalar(self, operation: Operation) -> bool:
        """Whether an operation is arithmetic on single numbers, which the program's own code does by the way."""
        arrays = itertools.chain(operation.outputs, *(self.arrays[name] for name in operation.operands))
        return operation.calls is None and all(array.shape == () for array in arrays)

    def _body(self, operation: Operation) -> Iterator[str]:
        """What an operation computes, names aside."""
        attributes = operation.attributes.partition(", backend_config")[0]
        attributes = re.sub(r", metadata=\{[^}]*\}", "", attributes)
        called = re.findall(_CALLED, attributes)
        yield f"{operation.opcode} {[array.text for array in operation.outputs]} {re.sub(_CALLED, '', attributes)}"
        for inner in itertools.chain.from_iterable(self.computations[name] for name in called):
            yield from self._body(inner)

    def _read(self, operation: Operation, number: int) -> int:
        arrays = [array for array in self.arrays[operation.operands[number]] if array.in_hbm]
        if not arrays:
            return 0
        whole = sum(array.bytes for array in arrays)
        return min(whole, self._read_of(operation, number, whole))

    def _read_of(self, operation: Operation, number: int, whole: int) -> int:
        """What an operation reads of the operand with this number, of which there are `whole` bytes."""
        if operation.opcode in ("slice", "dynamic-slice", "gather") and number == 0:
            return sum(array.bytes for array in operation.outputs)
        if operation.opcode == "dynamic-update-slice" and number == 0:
            return 0
        if operation.calls is None:
            return whole
        body = self.computations[operation.calls]
        names = {inner.name for inner in body if inner.opcode == "parameter" and inner.operands == (str(number),)}
        total = 0
        for inner in body:
            if inner.opcode == "bitcast" and names & set(inner.operands):
                names.add(inner.name)
                continue
            total += sum(self._read_of(inner, at, whole) for at, name in enumerate(inner.operands) if name in names)
        return total

    def _written(self, operation: Operation) -> Iterator[int]:
        outputs = [self._updated(operation, number) for number in range(len(operation.outputs))]
        for array, update in zip(operation.outputs, outputs, strict=True):
            if array.in_hbm:
                yield array.bytes if update is None else update

    def _updated(self, operation: Operation, number: int) -> int | None:
        """The size of what is written into an existing array, if an output is that."""
        if operation.opcode == "dynamic-update-slice":
            return sum(array.bytes for array in self.arrays[operation.operands[1]])
        if operation.calls is None:
            return None
        body = self.computations[operation.calls]
        by_name = {inner.name: inner for inner in body}
        root = next(inner for inner in body if inner.is_root)
        if root.opcode == "tuple":
            root, number = by_name[root.operands[number]], 0
        while root.opcode == "bitcast":
            root = by_name[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return sum(array.bytes for array in by_name[root.operands[1]].outputs)
        return self._updated(root, number) if root.opcode == "fusion" else None


def _operation(name: str, text: str, *, is_root: bool) -> Operation:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].strip().partition("(")
    close = _closing("(" + rest) - 2
    operands = re.findall(r"%([^\s,()]+)", rest[:close]) or ([rest[:close]] if opcode == "parameter" else [])
    return Operation(
        name, opcode, tuple(map(_array, _ARRAY.finditer(text[:end]))), tuple(operands), rest[close + 1 :], is_root
    )


def _array(found: re.Match[str]) -> Array:
    numbers = (tuple(int(number) for number in (group or "").split(",") if number) for group in found.group(2, 3))
    memory = found[4] or ""
    tile = re.search(r"T\(([\d,]+)\)", memory)
    sides = tuple(int(side) for side in tile[1].split(",")) if tile else ()
    return Array(found[0], found[1], *numbers, sides, "S(" not in memory)


def _closing(text: str) -> int:
    """Where the parenthesis that `text` starts with is closed, one past it."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index + 1
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")
