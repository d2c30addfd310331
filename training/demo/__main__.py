"""Makes `models/demo` again: scenes, three stages, scores, card. One command:

    python -m depthlm_training.demo --run runs/demo --out models/demo

Interrupted, the same command goes on where it stopped; a run folder that holds the state of the first stage only goes
on with the second. `--start models/demo` begins with weights that are there instead of with random ones. `--smoke` runs
every stage for a few steps, to see it work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import torch

from depthlm_training.demo.bank import SHARD, SceneBank, render_bank
from depthlm_training.demo.dense import train_dense
from depthlm_training.demo.model import DemoNet
from depthlm_training.demo.score import MARKER_POINTS, POINTS, SCENES, score
from depthlm_training.demo.stages import DENSE, POLISH, TEXT, Stage, TextStage
from depthlm_training.demo.text import Helpers, train_text
from depthlm_training.demo.vocabulary import build_tokenizer, save_processor


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the checkpoint becomes, but for the weights it begins with."""

    seed: int = 0
    scenes: int = 24_000
    dense: Stage = DENSE
    text: TextStage = TEXT
    polish: TextStage = POLISH


_FEW = {"steps": 4, "batch": 4, "save_every": 2}
SMOKE = Recipe(
    scenes=SHARD,
    dense=replace(DENSE, **_FEW),
    text=replace(TEXT, images=2, questions=4, points=12, drill=24, **_FEW),
    polish=replace(POLISH, images=2, questions=4, points=12, drill=24, **_FEW),
)


def make(recipe: Recipe, run: Path, out: Path, start: Path | None, device: str, workers: int) -> None:
    """Runs what is left to run of a recipe and writes the checkpoint.

    Args:
        run: holds scenes, states and the course of training; give the same folder to go on.
        out: the checkpoint's folder.
        start: checkpoint folder with the weights to begin with; None begins with random ones.
        device: as torch names it.
        workers: processes that make batches ahead.
    """
    tokenizer = build_tokenizer()
    net = DemoNet(tokenizer, seed=recipe.seed)
    if start is not None:
        net.load(start)
    net.to(device)
    bank = SceneBank(render_bank(run / "scenes", recipe.scenes, recipe.seed), recipe.scenes)
    train_dense(net, bank, recipe.dense, run, recipe.seed, workers)
    helpers = Helpers(net.size.hidden).to(device)
    # Seeds apart, so that the third stage sees other crops and questions than the second.
    for stage, seed in ((recipe.text, recipe.seed), (recipe.polish, recipe.seed + 100)):
        train_text(net, helpers, tokenizer, bank, stage, run, seed, workers)
    net.save(out)
    save_processor(out, tokenizer)


def seconds_spent(course: Path) -> float:
    """Seconds of a stage from its log, over all its interruptions."""
    rows = [json.loads(line) for line in course.read_text().splitlines()]
    total, last = 0.0, 0.0
    for row in rows:
        if row["seconds"] < last:
            total += last
        last = row["seconds"]
    return total + last


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# The demonstration model

A Qwen3-VL in small ({parameters:.1f}M parameters with its dense depth head, bfloat16) that measures metric z-depth in
images which this project renders itself. **It is a demonstration, not for robots**: it has seen rendered rooms,
corridors and streets and no photograph.

It speaks four dialects: `dense` (the default; one forward pass, one depth a pixel), `coordinates`, `marker` and
`compact` (answers in text; `compact` in the fewest tokens, and about up to {each} points a question). Images are
brought to a focal length of 200 px (policy `exact`).

## Scores

{scenes} held-out scenes, {points} random points each ({marker_points} for `marker`), cameras of four sizes with 54 to
70 degrees field of view, measured {today} through the estimator that the node runs. δ1 is the share of points within a
factor of 1.25. What knows no image reaches: best constant **{best_constant:.3f}**, mean depth of the image row
**{row_mean:.3f}** (with the value that is best for δ1 in each row instead of the mean: {row_best:.3f}).

| dialect | δ1 (95 % interval over scenes) | above the better of constant and row mean | AbsRel | RMSE [m] | answered |
|---|---|---|---|---|---|
{rows}

## Made by

    python -m depthlm_training.demo --run runs/demo --out models/demo{start}

Seed {recipe.seed}; {recipe.scenes} rendered scenes, begun with {begun}. Stage 1 (dense):
{recipe.dense.steps} steps of {recipe.dense.batch} images, {minutes[dense]:.0f} minutes. {text} {polish}
Machine: {machine}.
It did other work at the same time, so the minutes are an upper bound.
`python -m depthlm_training.demo.score models/demo` measures the table again.
"""

STAGE = """Stage {number} ({stage.name}):
{stage.steps} steps of {stage.batch} images, {marked:.0f} % of them with an arrow and a question about it,
{stage.images} others with {stage.questions} questions in text coordinates or {stage.points} compact points each,
{minutes:.0f} minutes."""

ROW = "| {} | {:.3f} ({:.3f} to {:.3f}) | {:+.3f} | {:.3f} | {:.2f} | {} of {} |"


def write_card(recipe: Recipe, run: Path, out: Path, figures: dict, start: Path | None, device: str) -> None:
    """Writes what was measured: the folder's README (for people), `scores.json`, the scores of its YAML card."""
    columns = ("delta1", "low", "high", "above_baselines", "abs_rel", "rmse_m", "answered", "asked")
    rows = []
    several = figures["several_points"]
    named = figures["dialects"] | {f"compact, {several['points_per_question']} points a question": several}
    for name, scores in named.items():
        scores = dict(zip(("low", "high"), scores["delta1_95"], strict=True)) | scores
        rows.append(ROW.format(name, *(scores[column] for column in columns)))
    if torch.device(device).type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{len(os.sched_getaffinity(0))} core(s), no GPU"
    minutes = {name: seconds_spent(run / f"{name}.jsonl") / 60 for name in ("dense", "text", "polish")}
    card = CARD.format(
        parameters=figures["parameters"] / 1e6,
        scenes=SCENES,
        points=POINTS,
        marker_points=MARKER_POINTS,
        today=date.today().isoformat(),
        **figures["baselines"],
        rows="\n".join(rows),
        recipe=recipe,
        minutes=minutes,
        **{
            stage.name: STAGE.format(number=number, stage=stage, marked=100 * stage.marked, minutes=minutes[stage.name])
            for number, stage in ((2, recipe.text), (3, recipe.polish))
        },
        start=f" --start {start.parent.name}/{start.name}" if start else "",
        begun=_begun(start),
        each=max(recipe.text.each),
        machine=f"{platform.machine()}, {machine}, torch {torch.__version__}",
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / "scores.json").write_text(json.dumps(figures | {"recipe": asdict(recipe)}, indent=2) + "\n")
    for_program = out.with_suffix(".yaml")
    if for_program.exists():
        head = for_program.read_text(encoding="utf-8").partition("\nscores:")[0]
        lines = [f"  {name}: {scores['delta1']:.3f}" for name, scores in figures["dialects"].items()]
        source = f"  source: delta1 on {SCENES} held-out rendered scenes, {out.name}/README.md"
        for_program.write_text("\n".join([head, "scores:", *lines, source]) + "\n", encoding="utf-8")


def _begun(start: Path | None) -> str:
    if start is None:
        return "random weights"
    scores = json.loads((start / "scores.json").read_text())
    delta1 = scores["dialects"]["dense"]["delta1"]
    return f"earlier weights of this model (dense δ1 {delta1:.3f})"


def declare_compact(card: Path, each: int) -> None:
    """Writes into the card for the program that the model speaks the compact dialect; what it says already stays."""
    text = card.read_text(encoding="utf-8")
    if not re.search(r"^dialects:.*\bcompact\b", text, re.MULTILINE):
        text = re.sub(r"^(dialects: \[.*)\]$", r"\1, compact]", text, flags=re.MULTILINE)
        text = re.sub(r"^(coordinate_range:.*)$", rf"\1\npoints_per_question: {each}", text, flags=re.MULTILINE)
        card.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the demonstration model again.")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="scenes, states, course of training")
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="the checkpoint's folder")
    parser.add_argument("--start", type=Path, help="checkpoint folder with the weights to begin with")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches ahead; some for a GPU")
    parser.add_argument("--smoke", action="store_true", help="a few steps of every stage, no scores")
    args = parser.parse_args()
    recipe = SMOKE if args.smoke else Recipe()
    began = time.time()
    make(recipe, args.run, args.out, args.start, args.device, args.workers)
    if not args.smoke:
        if args.out.with_suffix(".yaml").exists():
            declare_compact(args.out.with_suffix(".yaml"), max(recipe.text.each))
        write_card(recipe, args.run, args.out, score(str(args.out), recipe.seed), args.start, args.device)
    print(f"wrote {args.out} in {(time.time() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
