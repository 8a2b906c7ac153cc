"""A CSV file of images and the names of their classes, and everything that is wrong with it, told at once."""

import csv
import dataclasses
import io
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dpn_jax.errors import ImageError, reason, shown
from dpn_jax.paths import entries, forget, is_url, kind, read_bytes, readable_path

_COLUMNS = {"image", "label"}
_MOST = 20
"""Problems that one message tells."""


class Row(NamedTuple):
    """A line of a table."""

    line: int
    image: str
    label: str


class Problem(NamedTuple):
    """What is wrong in a line."""

    line: int
    why: str


@dataclasses.dataclass(frozen=True)
class Table:
    """The complete lines of a CSV file, and what is wrong with the others."""

    path: Path
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]

    def check(self, more: Iterable[Problem] = (), *, hint: str = "") -> None:
        """Refuses a table with problems.

        Args:
          more: problems that others have found.
          hint: ends the message.

        Raises:
          ImageError: the message is one line with the first 20 problems, by their lines.
        """
        found = sorted({*self.problems, *more})
        told = "; ".join(f"line {line}: {why}" for line, why in found[:_MOST])
        if found:
            count = f"{len(found)} problems: " if len(found) > 1 else ""
            more_told = f"; ... and {len(found) - _MOST} more" if len(found) > _MOST else ""
            raise ImageError(f"{shown(self.path)}: {count}{told}{more_told}{hint}")
        if not self.rows:
            raise ImageError(f"{shown(self.path)}: no images; expected a line for each after image,label")

    def missing(self) -> Iterator[Problem]:
        """The rows whose images are not there; a folder of a bucket is listed in one request."""
        listed: dict[str, set[str]] = {}
        for line, image, _ in self.rows:
            try:
                path = readable_path(image, error=ImageError)
                if not is_url(image):
                    found = kind(path) == "file"
                else:
                    if (folder := str(path.parent)) not in listed:
                        forget(path.parent)
                        listed[folder] = {name for name, is_folder in entries(path.parent) if not is_folder}
                    found = path.name in listed[folder]
            except FileNotFoundError:
                listed[folder], found = set(), False
            except (OSError, ImageError) as error:
                yield Problem(line, str(error) if isinstance(error, ImageError) else f"{shown(image)}: {reason(error)}")
                continue
            if not found:
                yield Problem(line, f"no such file {shown(image)}")


def is_table(path: Path) -> bool:
    """Whether a path is that of a CSV file, there or not."""
    return path.suffix.lower() == ".csv" and kind(path) != "folder"


def read_table(path: Path) -> Table:
    r"""Reads a CSV file with the columns `image` and `label`.

    Lines that are not complete, or name an image again, are problems, and so is another delimiter than a comma.

    Args:
      path: the file, also in a bucket.

    Returns:
      Its rows; images are URLs or paths from the file's folder.

    Raises:
      ImageError: the file cannot be read, is no CSV in UTF-8, or has no such columns.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "cats.csv"
      >>> _ = path.write_text("image;label\na.jpg;cat\nb.jpg\n")
      >>> [line for line, _ in read_table(path).problems]
      [1, 3]
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    first: dict[str, Row] = {}
    try:
        text = read_bytes(path).decode("utf-8-sig")
        delimiter = _delimiter(text)
        if delimiter != ",":
            problems.append(Problem(1, f"columns separated by {delimiter!r}, expected commas"))
        lines = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        if missing := _COLUMNS - set(lines.fieldnames or ()):
            raise ImageError(
                f"{shown(path)}: no column {', '.join(sorted(missing))} in its first line; expected image,label"
            )
        for fields in lines:
            number = lines.line_num
            if not fields["image"] or not fields["label"]:
                problems.append(Problem(number, "an image and a label expected"))
            elif None in fields:
                problems.append(Problem(number, "more columns than the first line has; a comma in a name needs quotes"))
            else:
                image = fields["image"] if is_url(fields["image"]) else str(path.parent / fields["image"])
                row = Row(number, image, unicodedata.normalize("NFC", fields["label"]))
                if (before := first.setdefault(image, row)) is not row:
                    other = "" if row.label == before.label else f", as {row.label!r}, not {before.label!r}"
                    problems.append(Problem(number, f"{shown(image)} again, as in line {before.line}{other}"))
                rows.append(row)
    except OSError as error:
        raise ImageError(f"{shown(path)}: cannot be read ({reason(error)})") from error
    except (csv.Error, UnicodeError) as error:
        raise ImageError(f"{shown(path)}: not a CSV file in UTF-8 ({reason(error)})") from error
    return Table(path, tuple(rows), tuple(problems))


def _delimiter(text: str) -> str:
    """What separates the columns of the first line, where it has the right ones; else a comma."""
    head = text.partition("\n")[0].strip()
    return next((sign for sign in ",;\t|" if {name.strip('"') for name in head.split(sign)} >= _COLUMNS), ",")
