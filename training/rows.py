"""Rows of data sets: read one by one when asked for, and counted by cause where they can't be trained on."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from depthlm_ros.errors import ConfigError, DatasetError

MISSING_IMAGE = "missing image"
TRUNCATED_IMAGE = "truncated image"
MISSING_DEPTH_MAP = "missing depth map"
TRUNCATED_DEPTH_MAP = "truncated depth map"
POINT_OUTSIDE = "point outside"
NON_FINITE_DEPTH = "non-finite depth"
NON_POSITIVE_DEPTH = "non-positive depth"
ZERO_FOCAL = "zero focal"
UNUSABLE_CAMERA = "unusable camera"
ESCAPES = "path escapes folder"
NOT_JSON = "not json"
MALFORMED = "malformed row"
NO_LABELS = "no labels"
CAUSES = (
    MISSING_IMAGE,
    TRUNCATED_IMAGE,
    MISSING_DEPTH_MAP,
    TRUNCATED_DEPTH_MAP,
    POINT_OUTSIDE,
    NON_FINITE_DEPTH,
    NON_POSITIVE_DEPTH,
    ZERO_FOCAL,
    UNUSABLE_CAMERA,
    ESCAPES,
    NOT_JSON,
    MALFORMED,
    NO_LABELS,
)

# Rows that a list names for each cause; the others are counted.
NAMED = 10


class BadRow(DatasetError):
    """A row that can't be trained on.

    Attributes:
        row: file and line.
        cause: one of `CAUSES`.
        what: the value that was seen.
    """

    def __init__(self, row: str, cause: str, what: str) -> None:
        super().__init__(row, cause, what)
        self.row, self.cause, self.what = row, cause, what

    def __str__(self) -> str:
        return f"{self.row}: {self.what}"


class BadRows:
    """The bad rows that a run has met; a row counts once, however often it is drawn.

    Args:
        limit: how many rows may be bad: below 1 a share of all `rows`, else a number.
        rows: rows of all data sets together.

    Raises:
        ConfigError: a negative limit.
    """

    def __init__(self, limit: float, rows: int) -> None:
        if not limit >= 0:
            raise ConfigError(f"the limit of bad rows is {limit}; give a share below 1 or a number of rows")
        self.allowed = int(limit * rows if limit < 1 else limit)
        self.rows = rows
        self._causes: dict[str, str] = {}
        self._untold: list[tuple[str, str]] = []

    def add(self, row: str, cause: str) -> None:
        """Counts a row.

        Raises:
            DatasetError: more rows are bad than allowed; the message lists them by cause.
        """
        if row in self._causes:
            return
        self._causes[row] = cause
        self._untold.append((row, cause))
        if len(self._causes) > self.allowed:
            raise DatasetError(
                f"{len(self._causes)} of {self.rows} rows can't be trained on, more than the {self.allowed} allowed; "
                f"mend them or raise the limit of bad rows:\n{self.report()}"
            )

    def take(self) -> tuple[tuple[str, str], ...]:
        """`(row, cause)` of what was found since the last call, to be merged by another process."""
        found, self._untold = tuple(self._untold), []
        return found

    def merge(self, found: Iterable[tuple[str, str]]) -> None:
        """Counts what another process found; raises as `add` does."""
        for row, cause in found:
            self.add(row, cause)

    def counts(self) -> dict[str, int]:
        """Rows by cause, those that occurred, the commonest first."""
        return dict(Counter(self._causes.values()).most_common())

    def report(self) -> str:
        """A line for each cause with the first rows' names; empty where all rows were good."""
        return "\n".join(f"  {cause}: {count} ({self._names(cause)})" for cause, count in self.counts().items())

    def __len__(self) -> int:
        return len(self._causes)

    def _names(self, cause: str) -> str:
        rows = [row for row, its in self._causes.items() if its == cause]
        return ", ".join(rows[:NAMED]) + (", ..." if len(rows) > NAMED else "")


class JsonLines:
    """The rows of a .jsonl file; only where each begins is held in memory, eight bytes a row.

    Args:
        path: one JSON object a line; empty lines are left out.

    Raises:
        DatasetError: there is no such file, or nothing in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DatasetError(f"file {self.path} does not exist; give the path of a .jsonl file")
        self._starts = array("q")
        start = 0
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.isspace():
                    self._starts.append(start)
                start += len(line)
        if not self._starts:
            raise DatasetError(f"{self.path} is empty; each line is one JSON object")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict:
        """Reads a row.

        Raises:
            BadRow: the line isn't a JSON object.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self.path.open("rb") as lines:
            lines.seek(self._starts[index])
            line = lines.readline()
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRow(self.name(index), NOT_JSON, f"the line is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise BadRow(self.name(index), NOT_JSON, f"the line holds a {type(row).__name__}, not an object")
        # As DepthLM's script for Matterport3D writes it.
        return {"image": row.pop("image_path"), **row} if "image" not in row and "image_path" in row else row

    def name(self, index: int) -> str:
        """File and line, as messages name a row."""
        return f"{self.path}:{index + 1}"


class Folders:
    """Where the files that rows name may lie, and nowhere else.

    Args:
        given: the folder, where one was named.
        beside: else this one,
        usual: or these within it.
        missing: the cause of a row whose file isn't there.
    """

    def __init__(self, given: str | Path | None, beside: Path, usual: Sequence[str], missing: str) -> None:
        self._root = Path(given) if given else beside
        self.places = [self._root] if given else [beside / name for name in usual]
        self._missing = missing

    def find(self, file: str, row: str) -> Path:
        """The path of a file that a row names.

        Links inside the folder are the owner's own and are followed.

        Raises:
            BadRow: it isn't there, or not below the folder.
        """
        if os.pardir in file.split("/"):
            raise BadRow(row, ESCAPES, f"{file!r} may lead out of {self._root} by its '..'")
        if os.path.isabs(file) and os.path.isfile(file):
            if not Path(file).is_relative_to(os.path.abspath(self._root)):
                raise BadRow(row, ESCAPES, f"{file!r} lies outside {self._root}")
            return Path(file)
        for place in self.places:
            # A slash in front of a name means the folder all the same, as DepthLM's readers take it.
            if os.path.isfile(path := place / file.lstrip("/")):
                return path
        raise BadRow(row, self._missing, f"file {file!r} was not found in {', '.join(map(str, self.places))}")


def part_of(rows: int, part: Sequence[float], name: str) -> range:
    """The rows of a part given as two shares of a file.

    Raises:
        ConfigError: there are none.
    """
    first, end = (int(rows * share) for share in part)
    if not 0 <= first < end <= rows:
        raise ConfigError(f"part {part} of the {rows} rows of {name} holds none; give two shares between 0 and 1")
    return range(first, end)
