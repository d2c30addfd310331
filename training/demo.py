"""Makes `models/demo` again, from nothing: scenes, stage 1 (dense), stage 2 (text), scores, card. One command:

    python -m depthlm_training.demo --run runs/demo --out models/demo

Interrupted, the same command goes on where it stopped. `--smoke` runs every stage for a few steps, to see it work.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import torch

from depthlm_training.data import SHARD, SceneBank, render_bank
from depthlm_training.dense import DenseStage, train_dense
from depthlm_training.model import DemoNet
from depthlm_training.optim import load_state
from depthlm_training.score import score
from depthlm_training.sft import TextStage, train_text
from depthlm_training.vocabulary import build_tokenizer, save_processor


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the checkpoint becomes."""

    seed: int = 0
    scenes: int = 14_000
    dense: DenseStage = DenseStage()
    text: TextStage = TextStage()


SMOKE = Recipe(scenes=SHARD, dense=replace(DenseStage(), steps=4, batch=4, save_every=2),
               text=replace(TextStage(), steps=4, images=2, questions=4, marked=2, save_every=4))


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


def write_card(recipe: Recipe, run: Path, out: Path, figures: dict) -> None:
    """Writes the folder's README (the card for people) from what was measured."""
    minutes = {stage: seconds_spent(run / f"{stage}.jsonl") / 60 for stage in ("dense", "text")}
    base = figures["baselines"]
    rows = "\n".join(
        f"| {name} | {d['delta1']:.3f} ({d['delta1_95'][0]:.3f} to {d['delta1_95'][1]:.3f}) | {d['above_baselines']:+.3f} "
        f"| {d['abs_rel']:.3f} | {d['rmse_m']:.2f} | {d['answered']} of {d['asked']} |"
        for name, d in figures["dialects"].items())
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    (out / "README.md").write_text(f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# The demonstration model

A Qwen3-VL in small (8.9M parameters with its dense depth head, bfloat16) that measures metric z-depth in images which
this project renders itself. **It is a demonstration, not for robots**: it has seen rendered rooms, corridors and streets
and no photograph.

It speaks three dialects: `dense` (the default; one forward pass, one depth a pixel), `coordinates` and `marker` (answers in
text). Images are brought to a focal length of 200 px (policy `exact`).

## Scores

{figures['scenes']} held-out scenes, 50 random points each (10 for `marker`), cameras of four sizes with 54 to 70 degrees field of view,
measured {date.today().isoformat()} through the estimator that the node runs. δ1 is the share of points within a factor of 1.25.
What knows no image reaches: best constant {base['best_constant']:.3f}, mean depth of the image row {base['row_mean']:.3f} (the
value that is best for δ1 in each row instead of the mean: {base['row_best']:.3f}).

| dialect | δ1 (95 % interval over scenes) | above the better of constant and row mean | AbsRel | RMSE [m] | answered |
|---|---|---|---|---|---|
{rows}

## Made by

    python -m depthlm_training.demo --run runs/demo --out models/demo

seed {recipe.seed}; {recipe.scenes} scenes; stage 1 (dense) {recipe.dense.steps} steps of {recipe.dense.batch} images in {minutes['dense']:.0f} minutes; stage 2
(text) {recipe.text.steps} steps of {recipe.text.images} images with {recipe.text.questions} questions each, every {recipe.text.marker_every}rd step {recipe.text.marked} marked images instead, in {minutes['text']:.0f} minutes.
Machine: {machine}; it did other work at the same time, so the minutes are an upper bound.
`training/score.py` measures the table again.
""")
    (out / "scores.json").write_text(json.dumps(figures | {"recipe": asdict(recipe)}, indent=2) + "\n")


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
        write_card(recipe, args.run, args.out, score(str(args.out), recipe.seed))
    print(f"wrote {args.out} in {(time.time() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
