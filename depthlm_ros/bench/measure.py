"""Puts it together: a model, its frames, the rounds, the floor."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch

from depthlm_ros.bench.ceilings import Ceilings
from depthlm_ros.bench.command import MARKED_TO_TEACH
from depthlm_ros.bench.contenders import Batched, Frame, Stock, make_contender, make_frame
from depthlm_ros.bench.floor import Counts, describe, frame_parts
from depthlm_ros.bench.pictures import synthetic_image
from depthlm_ros.bench.profiling import profile_frame
from depthlm_ros.bench.report import FrameFloor, Results, machine
from depthlm_ros.bench.rounds import Entry, compare, reference_answers, run_rounds
from depthlm_ros.bench.served import Served, same_text
from depthlm_ros.bench.shapes import find_shape, model_config
from depthlm_ros.bench.subject import Subject, build, load_subject, place
from depthlm_ros.bench.vocabulary import QWEN_TOKENS
from depthlm_ros.engines.answers import NUMBER
from depthlm_ros.markers import MARGIN_PX, draw_arrow
from depthlm_ros.sampling import sample_pixels

REFERENCE_SHAPE = "qwen3-vl-4b"


def prepare(plan: argparse.Namespace, folder: Path) -> Subject:
    """The model to measure.

    Args:
        plan: from `command.check`.
        folder: for files of a shape that isn't kept.

    Raises:
        ConfigError: a dialect that the model doesn't speak, or a device that isn't there.
        ModelError: the model can't be loaded.
    """
    if plan.threads:
        torch.set_num_threads(plan.threads)
    if plan.model is not None:
        subject = load_subject(plan.model, plan.device, plan.dtype)
    else:
        device, dtype = place(plan.device, plan.dtype)
        kept = plan.keep if plan.keep is not None else folder
        marked = _marked(plan) if "marker" in plan.dialects or plan.keep is not None else None
        built = build(plan.shape, kept, device=device, dtype=dtype, seed=plan.seed, marked=marked)
        if plan.keep is not None:
            built.save()
        subject = built.subject()
    for dialect in plan.dialects:
        subject.card.require_dialect(dialect)
    return subject


def _marked(plan: argparse.Namespace) -> list:
    image = synthetic_image(plan.width, plan.height, plan.seed)
    pixels = sample_pixels(plan.width, plan.height, MARKED_TO_TEACH, "random", 1, MARGIN_PX)
    return [draw_arrow(image, (int(u), int(v))) for u, v in pixels]


def measure(subject: Subject, plan: argparse.Namespace, said: Callable[[str], None] = lambda _: None) -> Results:
    """Runs everything that was asked for.

    Args:
        subject: the model.
        plan: from `command.check`.
        said: called with lines of progress.
    """
    image = synthetic_image(plan.width, plan.height, plan.seed)
    entries = make_entries(subject, plan, image)
    stock = Stock(subject)
    references = _references(entries, plan.check, stock, said)
    try:
        measured, answers = run_rounds(entries, plan.rounds, subject.device, said)
    finally:
        for entry in entries:
            if isinstance(entry.contender, Served):
                entry.contender.wake()
    results = Results(_header(subject, plan), measured)
    for entry, found, row in zip(entries, answers, measured, strict=True):
        if isinstance(entry.contender, Served):
            results.notes.append(_served_note(entry, references, subject))
        elif found and entry.frame.dialect in references:
            reference = references[entry.frame.dialect].get(len(entry.frame), {})
            results.comparisons.append(compare(entry, found, reference, stock))
        if isinstance(entry.contender, Batched):
            row.notes = f" ({entry.contender.batch(entry.frame.dialect)} at once)"
    for entry in entries if plan.profile else ():
        if entry.contender.name == "ours":
            said(f"profile: {entry.frame.dialect}, {len(entry.frame)} points")
            shares = profile_frame(partial(entry.contender.answer, entry.frame), subject.device)
            results.profiles[entry.frame.dialect, len(entry.frame)] = shares
    if any(entry.contender.name == "ours" for entry in entries):
        results.notes.append(subject.engine.attention)
    if not plan.no_floor:
        _add_floors(results, subject, entries, answers, said)
    return results


def make_entries(subject: Subject, plan: argparse.Namespace, image) -> list[Entry]:
    """Who answers what. Those who answer some points only are asked once a round and not for each number of points.

    Their rates don't hang on it, so one measurement stands beside all of ours.
    """
    limits = {"official": plan.official_points, "batched": plan.batched_points}
    contenders = {name: make_contender(name, subject, limits.get(name)) for name in plan.contenders}
    entries = []
    for dialect in plan.dialects:
        if dialect == "dense":
            some = [contenders["ours"]] if "ours" in contenders else []
            entries += [Entry(contender, make_frame(subject, dialect, image, 1)) for contender in some]
            continue
        for number, count in enumerate(plan.points):
            frame = make_frame(subject, dialect, image, count)
            who = [c for c in contenders.values() if number == 0 or c.limit is None]
            if plan.server and number == 0:
                url, name, most = plan.server, plan.server_model, plan.server_points
                who += [Served(url, name, together, most, plan.server_processes) for together in plan.concurrency]
            entries += [Entry(contender, frame) for contender in who]
    return entries


def _references(
    entries: Sequence[Entry], most: int, stock: Stock, said: Callable[[str], None]
) -> dict[str, dict[int, dict[int, tuple[int, ...]]]]:
    """Plain answers by dialect, number of points and row."""
    found: dict[str, dict[int, dict[int, tuple[int, ...]]]] = {}
    for entry in entries:
        frame = entry.frame
        if not most or frame.dialect == "dense" or len(frame) in found.get(frame.dialect, {}):
            continue
        rows = frame.rows(most)
        said(f"plain generate: {frame.dialect}, {len(rows)} of {len(frame)} points, untimed")
        found.setdefault(frame.dialect, {})[len(frame)] = reference_answers(stock, frame, rows)
    return found


def _served_note(entry: Entry, references, subject: Subject) -> str:
    frame = entry.frame
    rows = entry.frame.rows(entry.contender.limit)
    reference = references.get(frame.dialect, {}).get(len(frame), {})
    both = [(text, reference[row]) for row, text in zip(rows, entry.contender.texts, strict=True) if row in reference]
    decode = subject.engine.processor.tokenizer.decode
    plain = [decode(ids, skip_special_tokens=True) for _, ids in both]
    same = same_text([text for text, _ in both], plain)
    return f"answers, {frame.dialect}, {len(frame)} points, {entry.contender.name}: {same} of {len(both)} the same text"


def _header(subject: Subject, plan: argparse.Namespace) -> dict:
    return machine(subject.device, subject.engine.model.dtype) | {
        "command": plan.command,
        "subject": subject.name,
        "weights": subject.note,
        "parameters": subject.engine.info.parameters,
        "width": plan.width,
        "height": plan.height,
        "rounds": plan.rounds,
        "seed": plan.seed,
        "image_processor": "transformers' PIL one, for all",
    }


# ---------------------------------------------------------------- floor


def count_tokens(subject: Subject, frame: Frame, answers: Sequence[tuple[int, ...]]) -> Counts:
    """Tokens of a frame: of its prompts as the engine would cut them, and of the answers that were given."""
    processor = subject.engine.processor
    grid_hw = processor.images([frame.shown(0)]).grid_hw
    prompts = processor.prompts(frame.questions, grid_hw)
    if frame.dialect == "dense":
        last = max(at for at, token in enumerate(prompts[0]) if token == processor.image_token_id)
        return Counts(grid_hw, last + 1, 1, 0, 0, 0)
    if frame.marked:
        said, number = _said(subject, answers)
        return Counts(grid_hw, len(prompts[0]) - 1, len(frame), 1, said, number, images=len(frame))
    low, high = min(prompts), max(prompts)
    shared = next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low) - 1)
    suffix = round(median(len(ids) - shared for ids in prompts))
    said, number = _said(subject, answers)
    return Counts(grid_hw, shared, len(frame), suffix, said, number)


def _said(subject: Subject, answers: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Tokens of a usual answer, and of the first number in it."""
    tokenizer = subject.engine.processor.tokenizer
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    numbers = [match.group() for match in map(NUMBER.search, texts) if match]
    sizes = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in numbers]
    said = round(median(map(len, answers)))
    return said, round(median(sizes)) if sizes else said - 1


def _add_floors(
    results: Results, subject: Subject, entries: Sequence[Entry], answers: Sequence, said: Callable[[str], None]
) -> None:
    ceilings = Ceilings(subject.device, subject.engine.model.dtype)
    other = find_shape(REFERENCE_SHAPE)
    reference = model_config(other, dict.fromkeys(QWEN_TOKENS, 0), 0, "bfloat16")
    for entry, found in zip(entries, answers, strict=True):
        frame = entry.frame
        if results.floor(frame.dialect, len(frame)) or entry.contender.name != "ours":
            continue
        said(f"floor: {frame.dialect}, {len(frame)} points")
        counts = count_tokens(subject, frame, found)
        parts = frame_parts(subject.config, counts)
        least = [ceilings.floor(part) for part in parts]
        tokens = {
            "image": counts.grid_hw[0] * counts.grid_hw[1],
            "prefix": counts.prefix,
            "suffix": counts.suffix,
            "answer": counts.answer,
            "number": counts.number,
        }
        floor = FrameFloor(frame.dialect, len(frame), tokens, least, describe(parts, len(frame)))
        if subject.name != REFERENCE_SHAPE:
            same = describe(frame_parts(reference, counts), len(frame))
            floor.other.append(f"Qwen3-VL-4B with these tokens: {'; '.join(same)}")
        results.floors.append(floor)
    results.rates = dict(ceilings.rates) | {"copy, bytes a second": ceilings.bandwidth()}
