"""What was measured, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from depthlm_ros.bench.ceilings import PartFloor
from depthlm_ros.bench.floor import amount
from depthlm_ros.bench.profiling import Shares
from depthlm_ros.bench.rounds import TIE, Comparison, Measured, ratio

PACKAGES = ("torch", "transformers", "numpy")
MIB = 2**20


@dataclass
class FrameFloor:
    """The floor of one dialect and number of points.

    Attributes:
        dialect: how it was asked.
        points: points of the frame.
        tokens: of the frame, by name.
        parts: least time of each stage.
        lines: operations, for people.
        other: the same for Qwen3-VL-4B with these tokens.
    """

    dialect: str
    points: int
    tokens: dict[str, Any]
    parts: list[PartFloor]
    lines: list[str]
    other: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Least time of the frame."""
        return sum(part.seconds for part in self.parts)

    def part(self, name: str) -> PartFloor | None:
        """The stage of that name."""
        return next((part for part in self.parts if part.name == name), None)


@dataclass
class Results:
    """One run of `depthlm bench`.

    Attributes:
        header: machine, model, command, date.
        measured: each contender with each number of points.
        comparisons: answers beside plain `generate`.
        floors: least times; empty where they weren't asked for.
        rates: measured ceilings, FLOP a second by shape, and bytes a second.
        profiles: shares of a frame's time, by dialect and points.
        notes: what else there is to say.
    """

    header: dict[str, Any]
    measured: list[Measured]
    comparisons: list[Comparison] = field(default_factory=list)
    floors: list[FrameFloor] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    profiles: dict[tuple[str, int], Shares] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def floor(self, dialect: str, points: int) -> FrameFloor | None:
        """The floor of a dialect and number of points."""
        return next((f for f in self.floors if (f.dialect, f.points) == (dialect, points)), None)


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where it ran and with what."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": gpu,
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def ratios(results: Results) -> list[dict[str, Any]]:
    """How many times more points a second than others, within each round.

    Ours in its dialect beside each other contender in the same dialect, and in the compact dialect also beside the
    published loop with the published question, which is what a compact model replaces.
    """
    found = []
    for ours in (m for m in results.measured if m.contender == "ours"):
        for theirs in results.measured:
            if theirs.contender == "ours" or not theirs.seconds or not ours.seconds:
                continue
            across = ours.dialect == "compact" and theirs.dialect == "coordinates" and theirs.contender == "official"
            if theirs.dialect != ours.dialect and not across:
                continue
            if theirs.contender == "plain" and theirs.points != ours.points:
                continue
            found.append(
                {
                    "dialect": ours.dialect,
                    "points": ours.points,
                    "beside": theirs.contender + (", published question" if across else ""),
                    **ratio(ours, theirs),
                }
            )
    return found


def marginal(results: Results) -> list[dict[str, Any]]:
    """What a further point costs, from two numbers of points in one run, beside the floor."""
    found = []
    ours = [m for m in results.measured if m.contender == "ours" and m.dialect != "dense"]
    for few, many in zip(ours, ours[1:], strict=False):
        if few.dialect != many.dialect or few.points >= many.points:
            continue
        least, most = results.floor(few.dialect, few.points), results.floor(many.dialect, many.points)
        a, b = few.summary()["ms_per_frame"]["median"], many.summary()["ms_per_frame"]["median"]
        each = (b - a) / (many.points - few.points)
        row = {
            "dialect": few.dialect,
            "from": few.points,
            "to": many.points,
            "ms_per_point": each,
            "cost_of_a_point_beside_fewer": ratio(few, many),
        }
        if least and most and each > 0:
            floor_ms = 1e3 * (most.seconds - least.seconds) / (many.points - few.points)
            row |= {"floor_ms_per_point": floor_ms, "fraction_of_floor": floor_ms / each}
        found.append(row)
    return found


def as_json(results: Results) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "header": results.header,
        "measured": [_with_floor(results, m) for m in results.measured],
        "ratios": ratios(results),
        "marginal": marginal(results),
        "answers": [comparison.summary() for comparison in results.comparisons],
        "floors": [
            {
                "dialect": f.dialect,
                "points": f.points,
                "seconds": f.seconds,
                "tokens": f.tokens,
                "parts": [asdict(part) | {"seconds": part.seconds} for part in f.parts],
                "operations": f.lines,
                "qwen3_vl_4b_operations": f.other,
            }
            for f in results.floors
        ],
        "ceilings": results.rates,
        "profiles": [
            {"dialect": dialect, "points": points} | asdict(shares)
            for (dialect, points), shares in results.profiles.items()
        ],
        "notes": results.notes,
    }


def _with_floor(results: Results, measured: Measured) -> dict[str, Any]:
    row = measured.summary()
    floor = results.floor(measured.dialect, measured.points)
    if floor is not None:
        row["fraction_of_floor"] = 1e3 * floor.seconds / row["ms_per_frame"]["median"]
    return row


def write_json(path: Path, results: Results) -> None:
    """Writes everything; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(results), indent=2, default=str) + "\n", encoding="utf-8")


def as_text(results: Results) -> str:
    """Tables in Markdown, ready for a README."""
    head = results.header
    where = head["gpu"] or f"{head['threads']} of {head['cores']} cores of {head['cpu']}"
    lines = [
        f"{head['subject']}: {head['weights']}",
        f"{where}, {head['dtype']}, {head['width']}x{head['height']}, {head['rounds']} interleaved rounds, "
        f"torch {head['torch']}, transformers {head['transformers']}, {head['date']}",
        f"`{head['command']}`",
        "",
    ]
    lines += _rates_table(results)
    lines += _ratio_lines(results)
    lines += [_work_line(measured) for measured in results.measured if measured.work.get("passes")]
    lines += _answer_lines(results.comparisons)
    lines += _floor_lines(results)
    lines += _profile_lines(results)
    return "\n".join(lines + results.notes)


def _rates_table(results: Results) -> list[str]:
    lines = [
        "| dialect | points | contender | points/s, median (min to max) | ms a point | ms a frame | of the floor "
        "| peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for measured in results.measured:
        row = _with_floor(results, measured)
        rate, frame = row["points_per_s"], row["ms_per_frame"]["median"]
        partial = "" if measured.asked == measured.points else f" (from {measured.asked} points)"
        fraction = f"{row['fraction_of_floor']:.1%}" if "fraction_of_floor" in row else ""
        lines.append(
            f"| {measured.dialect} | {measured.points} | {measured.contender}{measured.notes} "
            f"| {rate['median']:.4g} ({rate['min']:.4g} to {rate['max']:.4g}) | {row['ms_per_point']['median']:.3g} "
            f"| {frame:.4g}{partial} | {fraction} | {measured.peak_bytes / MIB:.0f} MiB |"
        )
    return [*lines, ""]


def _ratio_lines(results: Results) -> list[str]:
    return [
        f"{row['dialect']}, {row['points']} points: ours gives {row['median']:.3g} times the points a second of "
        f"{row['beside']} (rounds: {row['min']:.3g} to {row['max']:.3g})"
        for row in ratios(results)
    ] + [_marginal_line(row) for row in marginal(results)]


def _marginal_line(row: dict[str, Any]) -> str:
    between = f"{row['dialect']}: a further point between {row['from']} and {row['to']}"
    beside = row["cost_of_a_point_beside_fewer"]
    line = (
        f"{between} costs {row['ms_per_point']:.3g} ms; a point of {row['to']} costs {beside['median']:.3g} times one"
    )
    line += f" of {row['from']} (rounds: {beside['min']:.3g} to {beside['max']:.3g})"
    if "fraction_of_floor" not in row:
        return line
    share = f"{row['floor_ms_per_point']:.3g} ms ({row['fraction_of_floor']:.1%})"
    return f"{line}, its operations at the measured ceilings {share}"


def _work_line(measured: Measured) -> str:
    work = measured.work
    return (
        f"work, {measured.dialect}, {measured.points} points, {measured.contender}: "
        f"{work['fed'] / measured.asked:.4g} tokens a point after the prefix, in {work['passes']} passes; "
        f"{work['accepted']} of {work['proposed']} drafts accepted; keys and values of the points "
        f"{work['kept_bytes'] / MIB:.4g} MiB"
    )


def _answer_lines(comparisons: Sequence[Comparison]) -> list[str]:
    lines = []
    for c in comparisons:
        line = (
            f"answers, {c.dialect}, {c.points} points, {c.contender}: {c.identical} of {c.compared} the same tokens as "
            "plain generate"
        )
        if c.differences:
            ties = sum(difference.gap <= TIE for difference in c.differences)
            gaps = ", ".join(f"{difference.gap:.2g}" for difference in c.differences[:8])
            line += f"; {ties} of {len(c.differences)} differences are ties within {TIE:g}; logits apart: {gaps}"
        lines.append(line)
    return lines


def _floor_lines(results: Results) -> list[str]:
    if not results.floors:
        return []
    stages = ("vision", "prefix", "suffix", "answer")
    lines = [
        "",
        "Least time of a frame, its operations at the rates measured at these very shapes, in ms:",
        "",
        f"| dialect | points | tokens | {' | '.join(stages)} | frame |",
        f"|---|---|---|{'---|' * len(stages)}---|",
    ]
    for floor in results.floors:
        times = [f"{1e3 * part.seconds:.3g}" if (part := floor.part(name)) else "" for name in stages]
        tokens = ", ".join(f"{name} {value}" for name, value in floor.tokens.items())
        whole = f"{1e3 * floor.seconds:.4g}"
        lines.append(f"| {floor.dialect} | {floor.points} | {tokens} | {' | '.join(times)} | {whole} |")
    lines.append("")
    for floor in {floor.dialect: floor for floor in reversed(results.floors)}.values():
        lines.append(f"operations, {floor.dialect}, {floor.points} points: {'; '.join(floor.lines)}")
        lines += floor.other
    products = {name: rate for name, rate in results.rates.items() if not name.startswith(("copy", "attention"))}
    if products:
        best, worst = max(products, key=products.get), min(products, key=products.get)
        lines.append(
            f"ceilings: matmul from {amount(products[worst])}/s ({worst}) to {amount(products[best])}/s ({best}), "
            f"copy {results.rates['copy, bytes a second'] / 1e9:.4g} GB/s"
        )
    return lines


def _profile_lines(results: Results) -> list[str]:
    lines = []
    for (dialect, points), shares in results.profiles.items():
        largest = ", ".join(f"{key.removeprefix('aten::')} {share:.1%}" for key, share in shares.largest[:4])
        low, high = shares.rest_spread
        kinds = f"matmul {shares.matmul:.1%}, attention {shares.attention:.1%}, rest {shares.rest:.1%}"
        kinds += f" (frames: {low:.1%} to {high:.1%})" if high else ""
        line = f"time of a frame, {dialect}, {points} points: {kinds} ({largest})"
        floor = results.floor(dialect, points)
        if floor is not None and shares.matmul:
            least = sum(part.products_s for part in floor.parts)
            line += f"; its matmuls run at {least / (shares.matmul * shares.seconds):.1%} of their ceiling"
        lines.append(line)
    return lines
