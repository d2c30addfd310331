"""How many questions a second are learnt: this package's packed sequences beside plain `trl.SFTTrainer`.

    python -m depthlm_training.beside_trl --model FOLDER --rounds 5

Both train the same weights on the same images and questions, with the same optimiser and as many questions a step, in
float32 on the CPU. `SFTTrainer` reads one question a sequence, as the published scripts give it, at its fastest batch
size, a step's batches accumulated; this package reads an image with all its questions. That it is the same work is
checked: the loss of the first step's questions must be the same for both before anything is learnt, and the loss after
the last step is reported beside it. Rounds alternate, each from the weights in the folder. Both begin with images that
are in memory, and prepare them and make their batches within the time that is measured. Needs `pip install trl`, which
nothing else here does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from depthlm_ros.bench.rounds import spread
from depthlm_ros.errors import ConfigError, DepthLMError, MissingDependencyError, TrainingError
from depthlm_training import sft
from depthlm_training.asking import Asked
from depthlm_training.batches import TextBatches, dialogue_processor
from depthlm_training.objective import TrainSettings
from depthlm_training.packing import IGNORED, Batch, collate, joined_images, pack
from depthlm_training.progress import rows
from depthlm_training.trainer import train

# Losses of the same questions further apart than this, relatively, aren't the same work in float32.
SAME_LOSS = 1e-5
CAMERA = (500, 500, 319.5, 239.5, 640, 480)


@dataclass(frozen=True)
class Run:
    """One training of one of the two.

    Attributes:
        seconds: of its steps.
        losses: mean loss of the first step's questions before the first step and after the last; None if not asked for.
    """

    seconds: float
    losses: tuple[float, float] | None = None


@dataclass(frozen=True)
class Compared:
    """Both with so many questions an image; spreads are median, least and most over the rounds.

    Attributes:
        points: questions about an image.
        questions: of a run, all steps together.
        batch: sequences in a batch of `SFTTrainer`.
        packed: questions a second of this package.
        trl: questions a second of `SFTTrainer`.
        ratio: the first over the second, within a round.
        losses_packed: before and after.
        losses_trl: before and after.
    """

    points: int
    questions: int
    batch: int
    packed: dict[str, float]
    trl: dict[str, float]
    ratio: dict[str, float]
    losses_packed: tuple[float, float]
    losses_trl: tuple[float, float]

    def __str__(self) -> str:
        def shown(values: dict[str, float]) -> str:
            return f"{values['median']:.3g} ({values['min']:.3g} to {values['max']:.3g})"

        before, after = (abs(a - b) / b for a, b in zip(self.losses_packed, self.losses_trl, strict=True))
        return (
            f"| {self.points} | {shown(self.packed)} | {shown(self.trl)} | {self.batch} | {shown(self.ratio)} | "
            f"{self.losses_packed[0]:.6f}, {before:.1e} | {self.losses_packed[1]:.6f}, {after:.1e} |"
        )


HEADING = """| questions an image | packed, questions/s | trl.SFTTrainer, questions/s | its batch | ratio | \
loss before, apart | loss after, apart |
|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class InMemory:
    """Makes micro-batch k from questions that are there already; otherwise as `TextBatches`."""

    asked: tuple[tuple[Asked, ...], ...]
    like: TextBatches

    def __call__(self, k: int) -> Batch:
        """All questions of step k."""
        processor = dialogue_processor(self.like.folder, self.like.system_text)
        packed = [pack(processor, each, self.like.supervise) for each in self.asked[k]]
        return collate(packed, self.like.tokens_per_row)


@dataclass(frozen=True)
class OneByOne:
    """A collator for `SFTTrainer`: a question with its image each, padded on the right."""

    questions: tuple[Asked, ...]
    like: TextBatches

    def __call__(self, chosen: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
        """Keyword arguments of the stock model."""
        processor = dialogue_processor(self.like.folder, self.like.system_text)
        packed = [pack(processor, self.questions[row["question"]], self.like.supervise) for row in chosen]

        def padded(tensors: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
            return nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=fill)

        ids = padded([each.ids for each in packed], processor.tokenizer.pad_token_id)
        types = {"mm_token_type_ids": (ids == processor.image_token_id).int()} if processor.mrope else {}
        return {
            "input_ids": ids,
            "labels": padded([each.labels for each in packed], IGNORED),
            "attention_mask": padded([torch.ones_like(each.ids) for each in packed], 0),
            **types,
            **joined_images([image for each in packed for image in each.images]),
        }


def run_packed(recipe: sft.TextRecipe, asked: tuple[tuple[Asked, ...], ...], scored: bool = False) -> Run:
    """Trains with this package; raises as `sft.open_objective` and `train`."""
    objective = sft.open_objective(recipe)
    make = InMemory(asked, objective.make)
    objective.make, first = make, make(0)

    def loss() -> float:
        with torch.no_grad():
            return float(objective.loss(first, torch.device("cpu")).total) / first.units

    before = loss() if scored else None
    with tempfile.TemporaryDirectory() as folder:
        train(objective, recipe.train, Path(folder))
        seconds = sum(row["seconds"] for row in rows(Path(folder)))
    return Run(seconds, (before, loss()) if before is not None else None)


def run_trl(recipe: sft.TextRecipe, asked: tuple[tuple[Asked, ...], ...], batch: int, scored: bool = False) -> Run:
    """Trains with `SFTTrainer`, `batch` sequences at a time.

    Raises:
        MissingDependencyError: trl isn't installed.
        ConfigError: a step can't be divided into such batches.
    """
    try:
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise MissingDependencyError("the comparison needs trl; run: pip install trl") from error

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.end = time.perf_counter()

    settings, objective, watch = recipe.train, sft.open_objective(recipe), Watch()
    questions = tuple(Asked(each.images, (pair,)) for step in asked for each in step for pair in each.pairs)
    a_step, left = divmod(len(questions), len(asked))
    if left or a_step % batch:
        raise ConfigError(f"{a_step} questions a step can't be divided into batches of {batch}")
    collator = OneByOne(questions, objective.make)
    objective.model.config.get_text_config()._attn_implementation = "sdpa"  # as it is loaded without this package
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, max_steps=settings.steps, per_device_train_batch_size=batch,
            gradient_accumulation_steps=a_step // batch, learning_rate=settings.lr, max_grad_norm=settings.clip,
            lr_scheduler_type=settings.schedule, warmup_steps=0, weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0], adam_beta2=settings.betas[1], optim="adamw_torch", use_cpu=True, bf16=False,
            gradient_checkpointing=False, max_length=None, train_sampling_strategy="sequential", seed=settings.seed,
            remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=objective.model, args=config, data_collator=collator, callbacks=[watch],
            train_dataset=Dataset.from_dict({"question": list(range(len(questions)))}),
            processing_class=dialogue_processor(objective.make.folder, objective.make.system_text).tokenizer,
        )  # fmt: skip

        def loss() -> float:
            batches = [collator([{"question": i} for i in range(at, at + batch)]) for at in range(0, a_step, batch)]
            units = sum(int((each["labels"] != IGNORED).sum()) for each in batches)
            with torch.no_grad():
                return sum(float(trainer.compute_loss(trainer.model, x, num_items_in_batch=units)) for x in batches)

        before = loss() if scored else None
        trainer.train()
        return Run(watch.end - watch.begin, (before, loss()) if before is not None else None)


def compare(recipe: sft.TextRecipe, rounds: int, batches: Sequence[int]) -> Compared:
    """Trains with both in turn, `rounds` times after one round that isn't counted and chooses the batch size.

    Raises:
        TrainingError: the two don't compute the same loss.
        ConfigError: no batch size divides a step.
        DepthLMError: as `run_packed` and `run_trl`.
    """
    checkpoint, card = sft.opened(recipe)
    make, images = sft.text_batches(recipe, checkpoint, card), recipe.images
    asked = tuple(tuple(make.asked(k * images + i) for i in range(images)) for k in range(recipe.train.steps))
    fitting = [batch for batch in batches if images * recipe.points % batch == 0]
    if not fitting:
        raise ConfigError(f"none of the batches {list(batches)} divides a step's {images * recipe.points} questions")
    ours = run_packed(recipe, asked, scored=True).losses
    trials = {batch: run_trl(recipe, asked, batch, scored=batch == fitting[0]) for batch in fitting}
    theirs = trials[fitting[0]].losses
    if abs(ours[0] - theirs[0]) > SAME_LOSS * theirs[0]:
        raise TrainingError(f"the loss is {ours[0]} packed and {theirs[0]} with trl; it isn't the same work")
    best = min(fitting, key=lambda batch: trials[batch].seconds)
    said = ", ".join(f"{batch}: {trial.seconds:.3g} s" for batch, trial in trials.items())
    print(f"trl with batches of {said}", file=sys.stderr)
    times = []
    for number in range(1, rounds + 1):
        times.append((run_packed(recipe, asked).seconds, run_trl(recipe, asked, best).seconds))
        print(f"round {number}: {times[-1][0]:.3g} s packed, {times[-1][1]:.3g} s with trl", file=sys.stderr)
    count = sum(len(each.pairs) for step in asked for each in step)
    return Compared(
        points=recipe.points,
        questions=count,
        batch=best,
        packed=spread([count / a for a, _ in times]),
        trl=spread([count / b for _, b in times]),
        ratio=spread([b / a for a, b in times]),
        losses_packed=ours,
        losses_trl=theirs,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table; 0 when it went well."""
    parser = argparse.ArgumentParser(prog="python -m depthlm_training.beside_trl", description="Speed beside trl.")
    parser.add_argument("--model", required=True, help="card, folder or hub id")
    parser.add_argument("--rounds", type=int, default=5, help="that are counted")
    parser.add_argument("--points", type=int, nargs="+", default=[10, 32], help="questions about an image")
    parser.add_argument("--images", type=int, default=1, help="of a step")
    parser.add_argument("--steps", type=int, default=2, help="of a run")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 5, 8, 10, 16], help="tried with SFTTrainer")
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    options = parser.parse_args(arguments)
    scenes = {"scenes": options.images * options.steps, "seed": 0, "split": "train", "cameras": [list(CAMERA)]}
    settings = TrainSettings(steps=options.steps, schedule="constant", warmup=0, log_every=1, device="cpu")
    recipe = sft.TextRecipe(options.model, (scenes,), images=options.images, train=settings)
    try:
        found = []
        print(HEADING, flush=True)
        for points in options.points:
            found.append(compare(replace(recipe, points=points), options.rounds, options.batches))
            print(found[-1], flush=True)
        if options.out:
            options.out.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n", encoding="utf-8")
    except DepthLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
