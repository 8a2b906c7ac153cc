"""How a message prints names and reasons: on one line, printable, bounded."""

import pytest

import dpn_jax
from dpn_jax.errors import printable, reason, shown


@pytest.mark.parametrize("name", ["a" * 400_000, "\0" * 400_000, b"\xff" * 400_000, "a/" * 200 + "photo.jpg"])
def test_long_names_and_reasons_are_shortened_in_the_middle(name: str | bytes) -> None:
    for text in (shown(name), reason(ValueError(name)), reason(OSError(5, str(name)))):
        assert len(text) <= 200 and text.isprintable() and "..." in text
    start, end = shown(name).split("...")
    assert printable(name).startswith(start) and printable(name).endswith(end) and len(end) > 90


def test_an_unknown_model_with_a_long_name_is_a_short_line() -> None:
    with pytest.raises(ValueError, match="unknown model") as caught:
        dpn_jax.create_model("dpn" * 100_000)
    assert len(str(caught.value)) < 500
