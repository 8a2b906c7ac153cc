"""Damage to files, and what it must lead to: one `CheckpointError`, the same from `load` and `convert`. No torch."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import dpn_jax
from dpn_jax import CheckpointError
from dpn_jax.checkpoint.save import convert


def forge(header: bytes | dict[str, object], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def refused(path: Path, **options: object) -> str:
    """The message's first line, the same from `load` and `convert`, which leaves nothing behind."""
    with pytest.raises(CheckpointError) as loading:
        dpn_jax.load(path, **options)
    before = set(path.parent.iterdir())
    with pytest.raises(CheckpointError) as converting:
        convert(path, path.with_name("converted.safetensors"), **options)
    assert set(path.parent.iterdir()) == before
    assert str(loading.value) == str(converting.value)
    line = str(loading.value).split("\n")[0]
    assert len(line) < 500
    assert str(path.parent) in line
    return line


def mutations(content: bytes, head: int, count: int, seed: int) -> Iterator[bytes]:
    """Damaged copies; the first `head` bytes, where the structure is, get most of it."""
    rng = random.Random(seed)
    for _ in range(count):
        mutated = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 5])):
            end = head if rng.random() < 0.9 else len(mutated)
            start = rng.randrange(max(1, min(end, len(mutated))))
            match rng.randrange(6):
                case 0:
                    mutated[start : start + 1] = bytes([rng.randrange(256)])
                case 1:
                    del mutated[start : start + rng.choice([1, 4, 50])]
                case 2:
                    mutated[start:start] = rng.choice([b"0", b"9", b'"', b"]", b"null", b"-", b"\0", b"\xff", b"1e999"])
                case 3:
                    mutated[start:start] = mutated[start : start + rng.choice([1, 8, 80])]
                case 4:
                    mutated[start : start + 1] = b"%d" % rng.randrange(10)
                case 5:
                    mutated[start : start + 8] = rng.choice([bytes(8), b"\xff" * 8, (2**63).to_bytes(8, "little")])
        yield bytes(mutated)


def attempt(path: Path) -> bool:
    """Whether it loads; any exception but one fails the test."""
    outcomes = set()
    destination = path.with_name("converted.safetensors")
    for call in (lambda: dpn_jax.load(path), lambda: convert(path, destination, overwrite=True)):
        try:
            call()
            outcomes.add(True)
        except CheckpointError as error:
            assert str(path.parent) in str(error)
            outcomes.add(False)
    assert len(outcomes) == 1
    return outcomes.pop()
