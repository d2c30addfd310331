"""Makes `models/demo` again, from nothing: scenes, four stages, scores, card. One command:

    python -m depthlm_training.demo --run runs/demo --out models/demo

Interrupted, the same command goes on where it stopped; a run folder that holds the states of the first stages only goes
on with the next. `--smoke` runs every stage for a few steps, to see it work.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import torch

from depthlm_training.demo.bank import SHARD, SceneBank, render_bank
from depthlm_training.demo.dense import DenseStage, train_dense
from depthlm_training.demo.model import DemoNet
from depthlm_training.demo.optim import load_state
from depthlm_training.demo.score import MARKER_POINTS, POINTS, SCENES, score
from depthlm_training.demo.stages import ALL_SIZES, WITH_COMPACT, TextStage
from depthlm_training.demo.text import train_text
from depthlm_training.demo.vocabulary import build_tokenizer, save_processor


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the checkpoint becomes."""

    seed: int = 0
    scenes: int = 14_000
    dense: DenseStage = DenseStage()
    text: TextStage = TextStage()
    sizes: TextStage = ALL_SIZES
    compact: TextStage = WITH_COMPACT


_FEW = {"steps": 4, "images": 2, "questions": 4, "marked": 2, "points": 12, "save_every": 4}
SMOKE = Recipe(
    scenes=SHARD,
    dense=replace(DenseStage(), steps=4, batch=4, save_every=2),
    text=replace(TextStage(), **_FEW),
    sizes=replace(ALL_SIZES, **_FEW),
    compact=replace(WITH_COMPACT, **_FEW),
)


def make(recipe: Recipe, run: Path, out: Path) -> None:
    """Runs what is left to run of a recipe and writes the checkpoint.

    Args:
        run: holds scenes, states and the course of training; give the same folder to go on.
        out: the checkpoint's folder.
    """
    tokenizer = build_tokenizer()
    net = DemoNet(tokenizer, seed=recipe.seed)
    bank = SceneBank(render_bank(run / "scenes", recipe.scenes, recipe.seed), recipe.scenes)
    train_dense(net, bank, recipe.dense, run, recipe.seed)
    load_state(run / "dense.safetensors", net)
    train_text(net, tokenizer, bank, recipe.text, run, recipe.seed)
    earlier = recipe.text
    for seed, stage in ((recipe.seed + 100, recipe.sizes), (recipe.seed + 200, recipe.compact)):
        train_text(net, tokenizer, bank, stage, run, seed, start=run / f"{earlier.name}.safetensors")
        earlier = stage
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

    python -m depthlm_training.demo --run runs/demo --out models/demo

Seed {recipe.seed}; {recipe.scenes} rendered scenes. Stage 1 (dense): {recipe.dense.steps} steps of {recipe.dense.batch}
images, {dense_minutes:.0f} minutes. Stage 2 (text): {recipe.text.steps} steps of {recipe.text.images} images with
{recipe.text.questions} questions each, every third step {recipe.text.marked} marked images with one question each
instead, {text_minutes:.0f} minutes. Stage 3 (all image sizes): {recipe.sizes.steps} steps, every second one of marked
images, {sizes_minutes:.0f} minutes. Stage 4 (compact): {recipe.compact.steps} steps, every second one compact with
{recipe.compact.points} points an image, the others as in stage 3, {compact_minutes:.0f} minutes. Machine: {machine}.
It did other work at the same time, so the minutes are an upper bound.
`python -m depthlm_training.demo.score models/demo` measures the table again.
"""

ROW = "| {} | {:.3f} ({:.3f} to {:.3f}) | {:+.3f} | {:.3f} | {:.2f} | {} of {} |"


def write_card(recipe: Recipe, run: Path, out: Path, figures: dict) -> None:
    """Writes what was measured: the folder's README (for people), `scores.json`, the scores of its YAML card."""
    columns = ("delta1", "low", "high", "above_baselines", "abs_rel", "rmse_m", "answered", "asked")
    rows = []
    several = figures["several_points"]
    named = figures["dialects"] | {f"compact, {several['points_per_question']} points a question": several}
    for name, scores in named.items():
        scores = dict(zip(("low", "high"), scores["delta1_95"], strict=True)) | scores
        rows.append(ROW.format(name, *(scores[column] for column in columns)))
    card = CARD.format(
        parameters=figures["parameters"] / 1e6,
        scenes=SCENES,
        points=POINTS,
        marker_points=MARKER_POINTS,
        today=date.today().isoformat(),
        **figures["baselines"],
        rows="\n".join(rows),
        recipe=recipe,
        dense_minutes=seconds_spent(run / "dense.jsonl") / 60,
        text_minutes=seconds_spent(run / "text.jsonl") / 60,
        sizes_minutes=seconds_spent(run / "sizes.jsonl") / 60,
        compact_minutes=seconds_spent(run / "compact.jsonl") / 60,
        each=max(recipe.compact.each),
        machine=f"{platform.machine()}, {torch.get_num_threads()} cores, no GPU, torch {torch.__version__}",
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / "scores.json").write_text(json.dumps(figures | {"recipe": asdict(recipe)}, indent=2) + "\n")
    for_program = out.with_suffix(".yaml")
    if for_program.exists():
        head = for_program.read_text(encoding="utf-8").partition("\nscores:")[0]
        lines = [f"  {name}: {scores['delta1']:.3f}" for name, scores in figures["dialects"].items()]
        source = f"  source: delta1 on {SCENES} held-out rendered scenes, {out.name}/README.md"
        for_program.write_text("\n".join([head, "scores:", *lines, source]) + "\n", encoding="utf-8")


def declare_compact(card: Path, each: int) -> None:
    """Writes into the card for the program that the model speaks the compact dialect; what it says already stays."""
    text = card.read_text(encoding="utf-8")
    if not re.search(r"^dialects:.*\bcompact\b", text, re.MULTILINE):
        text = re.sub(r"^(dialects: \[.*)\]$", r"\1, compact]", text, flags=re.MULTILINE)
        text = re.sub(r"^(coordinate_range:.*)$", rf"\1\npoints_per_question: {each}", text, flags=re.MULTILINE)
        card.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the demonstration model again, from nothing.")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="scenes, states, course of training")
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="the checkpoint's folder")
    parser.add_argument("--smoke", action="store_true", help="a few steps of every stage, no scores")
    args = parser.parse_args()
    recipe = SMOKE if args.smoke else Recipe()
    began = time.time()
    make(recipe, args.run, args.out)
    if not args.smoke:
        if args.out.with_suffix(".yaml").exists():
            declare_compact(args.out.with_suffix(".yaml"), max(recipe.compact.each))
        write_card(recipe, args.run, args.out, score(str(args.out), recipe.seed))
    print(f"wrote {args.out} in {(time.time() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
