"""Every public class, function, method and parameter is explained; how a docstring is written is ruff's business."""

import ast
import functools
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator

import pytest

import dpn_jax
from dpn_jax import explain, finetune

ENTRY = re.compile(r"^ +(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*): ", re.MULTILINE)


def public() -> Iterator[tuple[str, type | object]]:
    """What the packages offer, and the public members of its classes."""
    for package in (dpn_jax, explain, finetune):
        for name, thing in vars(package).items():
            if name.startswith("_") or not getattr(thing, "__module__", "").startswith("dpn_jax"):
                continue
            yield f"{package.__name__}.{name}", thing
            for member, value in vars(thing).items() if inspect.isclass(thing) else ():
                value = function_of(value)
                if not member.startswith("_") and inspect.isfunction(value):
                    yield f"{package.__name__}.{name}.{member}", value


def function_of(member: object) -> object:
    match member:
        case property():
            return member.fget
        case functools.cached_property():
            return member.func
        case classmethod() | staticmethod():
            return member.__func__
    return member


def parameters(thing: type | object) -> set[str]:
    if inspect.isclass(thing):
        if issubclass(thing, Exception) or (thing.__init__ is object.__init__ and not issubclass(thing, tuple)):
            return set()
        thing = thing.__new__ if issubclass(thing, tuple) else thing.__init__
    return set(inspect.signature(thing).parameters) - {"self", "cls", "_cls"}


def explained(thing: type | object) -> set[str]:
    """The names under Args, and those of a class whose fields have a docstring or a comment of their own."""
    names = {
        name.strip("* ") for entry in ENTRY.finditer(inspect.getdoc(thing) or "") for name in entry["names"].split(",")
    }
    if inspect.isclass(thing):
        body = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0].body
        names |= {
            field.target.id
            for field, after in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        }
    return names


@pytest.mark.parametrize(("name", "thing"), list(public()), ids=lambda value: value if isinstance(value, str) else "")
def test_it_is_explained(name: str, thing: type | object) -> None:
    assert (thing.__doc__ or "").strip(), f"{name} has no docstring"
    assert parameters(thing) - explained(thing) == set()
