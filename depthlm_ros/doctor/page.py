"""What `depthlm doctor` found, and how it is shown: sections of lines, each with a status and, if need be, a remedy."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

OK, NOTE, WARN, FAIL = "ok", "note", "warn", "FAIL"
WIDTH = 100
_COLOURS = {OK: "32", NOTE: "36", WARN: "33", FAIL: "31;1"}
_INDENT = " " * 8


@dataclass(frozen=True)
class Finding:
    """One line of the page.

    Attributes:
        status: OK; NOTE for what is good to know; WARN for what often leads to faults; FAIL for what keeps the node
            from working.
        text: what was seen.
        remedy: what to do about it; never empty beside WARN and FAIL.
    """

    status: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Section:
    """Lines that belong together."""

    title: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Page:
    """The whole result.

    Attributes:
        sections: in the order in which they are shown.
        machine: `Machine.as_dict` of where it was made, for reports.
    """

    sections: tuple[Section, ...]
    machine: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether any line says FAIL."""
        return self.count(FAIL) > 0

    def count(self, status: str) -> int:
        """How many lines have this status."""
        return sum(finding.status == status for section in self.sections for finding in section.findings)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        sections = [asdict(section) for section in self.sections]
        return {"failed": self.failed, "machine": dict(self.machine), "sections": sections}


def ok(text: str) -> Finding:
    """A line for what is as it should be."""
    return Finding(OK, text)


def note(text: str, remedy: str = "") -> Finding:
    """A line for what is good to know."""
    return Finding(NOTE, text, remedy)


def warn(text: str, remedy: str) -> Finding:
    """A line for what often leads to faults, and how to avoid them."""
    return Finding(WARN, text, remedy)


def fail(text: str, remedy: str) -> Finding:
    """A line for what keeps the node from working, and how to mend it."""
    return Finding(FAIL, text, remedy)


def section(title: str, checks: Iterable[tuple[str, Callable[[], Iterable[Finding]]]]) -> Section:
    """Runs checks; one that breaks becomes a line and ends neither the section nor the page.

    Args:
        title: of the section.
        checks: what each checks, in words, and the function that does.
    """
    findings: list[Finding] = []
    for what, check in checks:
        try:
            findings += check()
        except Exception as error:  # noqa: BLE001 - a page for broken machines must not break on one
            findings.append(
                warn(
                    f"{what} could not be checked ({type(error).__name__}: {error})",
                    "the other lines stand; please report this one with the output of depthlm doctor --json",
                )
            )
    return Section(title, tuple(findings))


def render(page: Page, colour: bool = False, width: int = WIDTH) -> str:
    """The page as text.

    Args:
        page: what was found.
        colour: with ANSI colours, for a terminal.
        width: longest line; words that are longer (paths, URLs) are broken.
    """
    lines = []
    for part in page.sections:
        lines += [part.title, *(line for finding in part.findings for line in _lines(finding, colour, width)), ""]
    failed, warned = page.count(FAIL), page.count(WARN)
    told = f"{_counted(failed, 'failure')}, {_counted(warned, 'warning')}"
    return "\n".join([*lines, f"{told}." if failed or warned else "No failures and no warnings."]) + "\n"


def _lines(finding: Finding, colour: bool, width: int) -> list[str]:
    status = f"{finding.status:<6}"
    if colour:
        status = f"\033[{_COLOURS[finding.status]}m{status}\033[0m"
    first, *rest = textwrap.wrap(finding.text, width - len(_INDENT), break_on_hyphens=False) or [""]
    lines = [f"  {status}{first}", *(_INDENT + line for line in rest)]
    if finding.remedy:
        lines += textwrap.wrap(
            finding.remedy, width, initial_indent=f"{_INDENT}-> ", subsequent_indent=f"{_INDENT}   ",
            break_on_hyphens=False,
        )  # fmt: skip
    return lines


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
