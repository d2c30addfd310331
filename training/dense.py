"""Dense depth: a head learns to read metres off the states of a vision-language model, then both learn together.

    python -m depthlm_training.dense recipe.yaml one_gpu.yaml run=runs/head [key=value ...] [--dry-run] [--resume]

Stage `head` trains the head alone. Stage `language` trains the language model with it, the vision tower frozen, and
mixes in real questions with answers, so that the model goes on talking; the loss of held-out dialogues before and after
says whether it does. (DepthVLM mixes in one constant reply, which keeps nothing alive; `published` does the same.)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from depthlm_ros.cards import CARD_FILE, load_card
from depthlm_ros.engines.checkpoint import Checkpoint, open_checkpoint
from depthlm_ros.modelcard import ModelCard, read_card
from depthlm_training.batches import TextBatches, dialogue_processor
from depthlm_training.command import run_command
from depthlm_training.config import as_yaml
from depthlm_training.dense_batches import DenseBatch, DenseBatches, Showing
from depthlm_training.dense_model import DenseModel, HeadWork, head_config, load_dense
from depthlm_training.dense_recipe import DenseRecipe, LossSettings
from depthlm_training.folders import save_folder
from depthlm_training.labels import Labels
from depthlm_training.losses import gradient_term, log_ratio, read_map, silog
from depthlm_training.mixtures import open_mixture
from depthlm_training.objective import Loss
from depthlm_training.parallel import DTYPES, end_process
from depthlm_training.parts import add_lora, merged_weights, passes, recompute_layers, train_only
from depthlm_training.rows import BadRows
from depthlm_training.sft import marked_text, text_batches
from depthlm_training.sft import trained_card as text_card
from depthlm_training.throughput import FROZEN, TRAINED, Work, training_flop
from depthlm_training.trainer import train

CLOSE = 1.25  # delta1's factor


class DenseObjective:
    """Depth of every pixel, and talk beside it, as the trainer minimises them.

    Args:
        model: its parts frozen or not.
        make: makes micro-batches.
        loss: what is minimised.
        talk_weight: of what is said.
        checkpoint: where the model came from.
        card: what the saved model is.
        dtype: of saved weights.

    Attributes:
        model: as given.
        make: as given.
        bad_rows: of all its mixtures.
    """

    def __init__(
        self,
        model: DenseModel,
        make: DenseBatches,
        loss: LossSettings,
        talk_weight: float,
        checkpoint: Checkpoint,
        card: ModelCard,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.make = make
        self.bad_rows: BadRows | None = make.mixture.bad_rows
        self._settings, self._talk_weight = loss, talk_weight
        self._checkpoint, self._card, self._dtype = checkpoint, card, dtype
        self._head_work = HeadWork(model.depth_head)

    def loss(self, batch: DenseBatch, device: torch.device) -> Loss:
        """Mean over images; text counts as its mean over the micro-batch's supervised tokens, as published."""
        talk = None if batch.talk is None else batch.talk.to(device)
        maps, said = self.model(batch.images.to(device), talk)
        errors = [depth_errors(each, labels, self._settings) for each, labels in zip(maps, batch.labels, strict=True)]
        sums = {name: torch.stack([error[name] for error in errors]).sum() for name in errors[0]}
        depth = sums["silog"] + self._settings.gradient * sums.get("edges", 0.0)
        total, units = self._settings.weight * depth, len(maps)
        parts = {name: (value.detach(), units) for name, value in sums.items()}
        if talk is not None:
            total = total + self._talk_weight * units * said / max(talk.units, 1)
            parts["text"] = (said.detach(), talk.units)
        work = needed_work(batch)
        head = sum(map(self._head_work, batch.images.grids_hw))
        if any(weight.requires_grad for weight in self.model.depth_head.parameters()):
            head *= TRAINED
        else:
            head *= FROZEN
        places = batch.images.ids.numel() + (0 if talk is None else talk.ids.numel())
        return Loss(
            total=total,
            units=units,
            parts=parts,
            tokens=work.tokens,
            images=len(work.grids),
            waste=1 - work.tokens / places,
            flop=training_flop(self._checkpoint.config, work, *passes(self.model)) + head,
        )

    def save(self, folder: Path) -> None:
        """Writes a checkpoint folder that the engine loads, with the card of what it has become."""
        save_dense(folder, self.model, self._checkpoint, self._dtype)
        name = folder.resolve().name
        (folder / CARD_FILE).write_text(as_yaml(replace(self._card, name=name, source=name)), encoding="utf-8")


def save_dense(folder: Path, model: DenseModel, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Writes model and head as a checkpoint folder, adapters merged; arguments as `save_folder`."""
    weights = {name.removeprefix("vlm."): value for name, value in merged_weights(model).items()}
    save_folder(folder, weights, checkpoint, dtype, config=head_config(model.depth_head, model.mode))


def needed_work(batch: DenseBatch) -> Work:
    """What the model has to compute for a micro-batch, without its dense head."""
    lengths, talk = batch.images.lengths, batch.talk
    grids, tokens, pairs = batch.images.grids_hw, sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    if talk is None:
        return Work(grids, tokens, pairs, 0)
    return Work((*grids, *talk.grids_hw), tokens + talk.tokens, pairs + talk.seen, talk.units)


def depth_errors(depth_map: torch.Tensor, labels: Labels, settings: LossSettings) -> dict[str, torch.Tensor]:
    """SILog, the gradient term where it counts, and the share of labels within a factor 1.25, of one image."""
    device = depth_map.device
    places, depth_m = torch.from_numpy(labels.places).to(device), torch.from_numpy(labels.depth_m).to(device)
    ratio, good = log_ratio(read_map(depth_map, places), depth_m)
    errors = {"silog": silog(ratio, good, settings.lam)}
    if settings.gradient:
        grid = torch.from_numpy(labels.grid).to(device)
        errors["edges"] = gradient_term(ratio, good, grid, settings.scales)
    close = (ratio.detach().abs() < math.log(CLOSE)) & good
    return errors | {"delta1": close.float().mean()}


def open_objective(recipe: DenseRecipe) -> DenseObjective:
    """Loads the model and opens the data.

    Raises:
        ModelError: the model can't be found or loaded, or can't have this head.
        ConfigError: settings that don't fit each other or the model.
        DatasetError: a file of rows that can't be read.
    """
    checkpoint, card = opened(recipe)
    make = dense_batches(recipe, checkpoint, card)
    patch_px = dialogue_processor(checkpoint.folder, card.system_text).patch_px
    model = load_dense(checkpoint, patch_px, recipe.head)
    train_only(model, recipe.parts)
    if recipe.lora.rank:
        add_lora(model, recipe.lora)
    if recipe.checkpointing:
        recompute_layers(model.vlm)
    dtype = DTYPES[recipe.train.dtype]
    trained = trained_card(card, make)
    return DenseObjective(model, make, recipe.loss, recipe.talk.weight, checkpoint, trained, dtype)


def dense_batches(recipe: DenseRecipe, checkpoint: Checkpoint, card: ModelCard) -> DenseBatches:
    """What makes the micro-batches of a recipe; raises as `open_objective` does."""
    processor = dialogue_processor(checkpoint.folder, card.system_text)
    policy = recipe.policy or card.policy
    readout = "published" if recipe.published else "exact"
    language = recipe.stage == "language"
    mixture, talk = open_mixture(recipe.data, recipe.train.seed, recipe.train.bad_rows), None
    if language and not recipe.published and recipe.talk.images:
        talk = text_batches(recipe.talk.recipe(recipe, recipe.talk.data, recipe.talk.images), checkpoint, card)
        # One count for both.
        mixture.bad_rows = BadRows(recipe.train.bad_rows, len(mixture) + len(talk.mixture))
        talk.mixture.bad_rows = mixture.bad_rows
    return DenseBatches(
        mixture=mixture,
        showing=Showing(card, policy, processor.grid, readout, recipe.labels, recipe.max_edge_px),
        folder=checkpoint.folder,
        images=recipe.images,
        seed=recipe.train.seed,
        talk=talk,
        reply=language and recipe.published,
        tokens_per_row=recipe.talk.tokens_per_row,
    )


def trained_card(card: ModelCard, make: DenseBatches) -> ModelCard:
    """The card of the trained model: it speaks the dense dialect, and no score is known of it yet."""
    if make.talk is not None:
        card = text_card(card, make.talk)
    return replace(
        card,
        sha256={},
        revision=None,
        released=True,
        tasks=tuple(dict.fromkeys((*card.tasks, "depth"))),
        dialects=tuple(dict.fromkeys((*card.dialects, "dense"))),
        default_dialect="dense",
        policy=make.showing.policy,
        depth_kind=card.depth_kind or "z",
        scores={},
    )


@torch.no_grad()
def language_loss(
    model: DenseModel, make: TextBatches, images: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> float:
    """Mean cross entropy in nats of the answers' tokens about the first images of a mixture, products in `dtype`."""
    total = units = 0
    for k in range(-(-images // make.images)):
        batch = make(k).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            total += float(model(talk=batch)[1])
        units += batch.units
    return total / max(units, 1)


def opened(recipe: DenseRecipe) -> tuple[Checkpoint, ModelCard]:
    """The checkpoint to begin with, and the card of what it is to become; raises as `open_objective` does."""
    card, source = load_card(recipe.model)
    checkpoint = open_checkpoint(source, card.revision)
    return checkpoint, card if recipe.card is None else read_card(recipe.card)


def held_out_talk(recipe: DenseRecipe, checkpoint: Checkpoint, card: ModelCard) -> TextBatches | None:
    """Makes the held-out dialogues of a recipe; None where it names none."""
    if not recipe.talk.held_out:
        return None
    return text_batches(recipe.talk.recipe(recipe, recipe.talk.held_out, 1), checkpoint, card)


def teach(recipe: DenseRecipe, resume: bool = False) -> None:
    """Runs a recipe, and measures the loss of held-out dialogues before and after where one process does it all.

    `language.json` in the run's folder holds both. Raises as `open_objective` and `train` do.
    """
    objective = open_objective(recipe)
    held_out = held_out_talk(recipe, *opened(recipe))
    measured = recipe.run / "language.json"

    def measure(when: str) -> None:
        known = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else {}
        device = next(objective.model.parameters()).device
        known[when] = language_loss(
            objective.model, held_out, recipe.talk.held_out_images, device, DTYPES[recipe.train.dtype]
        )
        measured.parent.mkdir(parents=True, exist_ok=True)
        measured.write_text(json.dumps(known) + "\n", encoding="utf-8")
        print(f"held-out dialogues, {when}: {known[when]:.4f} nats a token")

    alone = held_out is not None and int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone and not (resume and measured.is_file()):
        measure("before")
    train(objective, recipe.train, recipe.run, resume)
    if alone:
        measure("after")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a recipe; 0 when it has ended well, 1 with one line on standard error when it couldn't."""
    return run_command(
        DenseRecipe,
        open_objective,
        dry_run,
        prog="python -m depthlm_training.dense",
        description="Teaches dense depth, and keeps language alive.",
        teach=teach,
        arguments=arguments,
    )


def dry_run(recipe: DenseRecipe) -> str:
    """All settings and the first micro-batch in words; raises as `open_objective` does, and loads no weights."""
    checkpoint, card = opened(recipe)
    make = dense_batches(recipe, checkpoint, card)
    processor = dialogue_processor(checkpoint.folder, card.system_text)
    batch = make(0)
    told = []
    for (h, w), labels in zip(batch.images.grids_hw, batch.labels, strict=True):
        size = f"{w * processor.patch_px}x{h * processor.patch_px}"
        told.append(
            f"map of {size} pixels, {h * w} image tokens, {len(labels)} labels from {labels.depth_m.min():.2f} to "
            f"{labels.depth_m.max():.2f} m"
        )
    if batch.talk is not None:
        told += [
            f"{batch.talk.pairs} questions about {batch.talk.image_count} images, {batch.talk.units} tokens to say:",
            marked_text(processor, batch.talk),
        ]
    return "\n".join([as_yaml(recipe), f"trained: {', '.join(recipe.parts)}", *told])


if __name__ == "__main__":
    end_process(main())
