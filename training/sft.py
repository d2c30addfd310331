"""Supervised fine-tuning: a vision-language model learns to say depth, and whatever else is asked of it.

    python -m depthlm_training.sft recipe.yaml one_gpu.yaml run=runs/mine [key=value ...] [--dry-run] [--resume]

`--dry-run` prints all settings and one row of what the model would read, with what it is to say marked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import PreTrainedModel

from depthlm_ros.cards import CARD_FILE, ModelCard, load_card
from depthlm_ros.engines.base import ImageGrid
from depthlm_ros.engines.checkpoint import Checkpoint, open_checkpoint
from depthlm_ros.engines.devices import choose_placement
from depthlm_ros.engines.loading import load_model
from depthlm_ros.errors import ConfigError
from depthlm_ros.modelcard import read_card
from depthlm_training.asking import DEPTH, MOTION, SINGLE, Asking
from depthlm_training.batches import TextBatches, Way, dialogue_processor, marked_text
from depthlm_training.command import run_command
from depthlm_training.config import as_yaml
from depthlm_training.folders import save_folder
from depthlm_training.mixtures import open_mixture
from depthlm_training.objective import Loss, TrainSettings
from depthlm_training.packed_attention import attend_packed, seen_by
from depthlm_training.packing import IGNORED, Batch
from depthlm_training.parallel import DTYPES, end_process
from depthlm_training.parts import Lora, add_lora, merged_weights, passes, recompute_layers, train_only
from depthlm_training.rows import BadRows
from depthlm_training.throughput import Work, training_flop

# What is asked about the tasks of scene pairs.
_TOLD = {"pose": "pose", "correspondence": "correspondence", "moved": "dialogue"}
# Supervised tokens that are scored over the vocabulary at the same time.
SCORED_TOKENS = 1024


@dataclass(frozen=True)
class TextRecipe:
    """What is taught in words, to which model, and how the training is run.

    Attributes:
        model: name of a card, folder or hub id.
        card: file of the card of what the model is to become; None keeps its own.
        data: entries of `mixtures.open_mixture`; each may say in `ask` what is asked about its rows.
        run: folder of the run.
        ask: share of each dialect among the questions about labelled points, for entries without `ask`.
        points: questions about an image; about a marked image it is always one.
        each: points a question of the compact dialect.
        policy: how images are brought to the card's focal length; None takes the card's.
        crops: "centred" or "stretched" as DepthLM's loader does, or "none"; an entry of `data` may have its own.
        supervise: "answers", or "published": everything but images, one pair a sequence (DepthLM's collator).
        images: in a micro-batch.
        tokens_per_row: longest row; a micro-batch that has more tokens becomes several rows.
        trained: parts of the model, or patterns of weights' names, that are trained (`parts`).
        lora: adapters instead of, or beside, what is `trained`.
        checkpointing: layers' activations are computed again instead of kept.
        train: how the training is run.
    """

    model: str
    data: tuple[dict[str, Any], ...]
    card: Path | None = None
    run: Path = Path("runs/sft")
    ask: dict[str, float] = field(default_factory=lambda: {"coordinates": 1.0})
    points: int = 10
    each: int = 1
    policy: Literal["published", "exact"] | None = None
    crops: Literal["none", "centred", "stretched"] = "none"
    supervise: Literal["answers", "published"] = "answers"
    images: int = 1
    tokens_per_row: int = 8192
    trained: tuple[str, ...] = ("vision", "merger", "embeddings", "language", "lm_head")
    lora: Lora = Lora()
    checkpointing: bool = False
    train: TrainSettings = TrainSettings()

    def __post_init__(self) -> None:
        for name in ("points", "each", "images", "tokens_per_row"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")
        if not self.data:
            raise ConfigError("data is empty; name at least one source of examples")


class TextObjective:
    """What is said about images, as the trainer minimises it.

    Args:
        model: the stock model, its parts frozen or not, adapters in place.
        make: makes micro-batches.
        checkpoint: where the model came from.
        card: what the saved model is.
        dtype: of saved weights.

    Attributes:
        model: as given.
        make: as given.
        bad_rows: of the data.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        make: TextBatches,
        checkpoint: Checkpoint,
        card: ModelCard,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model: nn.Module = model
        self.make = make
        self.bad_rows: BadRows = make.mixture.bad_rows
        self._checkpoint, self._card, self._dtype = checkpoint, card, dtype

    def loss(self, batch: Batch, device: torch.device) -> Loss:
        """Sum of the cross entropy over the supervised tokens."""
        work = Work(batch.grids_hw, batch.tokens, batch.seen, batch.units)
        vision, language = passes(self.model)
        total = answer_loss(self.model, batch.to(device))
        return Loss(
            total=total,
            units=batch.units,
            parts={"text": (total.detach(), batch.units)},
            tokens=batch.tokens,
            images=batch.image_count,
            waste=batch.waste,
            flop=training_flop(self._checkpoint.config, work, vision, language),
        )

    def save(self, folder: Path) -> None:
        """Writes a checkpoint folder that the engine loads, adapters merged, with the card of what it has become."""
        save_folder(folder, merged_weights(self.model), self._checkpoint, self._dtype)
        card = replace(self._card, name=folder.resolve().name, source=folder.resolve().name)
        (folder / CARD_FILE).write_text(as_yaml(card), encoding="utf-8")


def open_objective(recipe: TextRecipe) -> TextObjective:
    """Loads the model and opens the data.

    Raises:
        ModelError: the model can't be found or loaded.
        ConfigError: settings that don't fit each other or the model.
        DatasetError: a file of rows that can't be read.
    """
    checkpoint, card = opened(recipe)
    make = text_batches(recipe, checkpoint, card)
    model = load_model(checkpoint, choose_placement("cpu", "float32"))
    attend_packed(model)
    train_only(model, recipe.trained)
    if recipe.lora.rank:
        add_lora(model, recipe.lora)
    if recipe.checkpointing:
        recompute_layers(model)
    return TextObjective(model, make, checkpoint, trained_card(card, make), DTYPES[recipe.train.dtype])


def opened(recipe: TextRecipe) -> tuple[Checkpoint, ModelCard]:
    """The checkpoint that a recipe begins with, and the card of what it is to become."""
    card, source = load_card(recipe.model)
    checkpoint = open_checkpoint(source, card.revision)
    return checkpoint, card if recipe.card is None else read_card(recipe.card)


def text_batches(recipe: TextRecipe, checkpoint: Checkpoint, card: ModelCard) -> TextBatches:
    """What makes the micro-batches of a recipe; raises as `open_objective` does."""
    grid = dialogue_processor(checkpoint.folder, card.system_text).grid
    entries = [{key: value for key, value in entry.items() if key not in ("ask", "crops")} for entry in recipe.data]
    return TextBatches(
        mixture=open_mixture(entries, recipe.train.seed, recipe.train.bad_rows),
        ways=tuple(_ways(entry, recipe, card, grid) for entry in recipe.data),
        folder=checkpoint.folder,
        system_text=card.system_text,
        images=recipe.images,
        tokens_per_row=recipe.tokens_per_row,
        supervise=recipe.supervise,
        seed=recipe.train.seed,
    )


def trained_card(card: ModelCard, make: TextBatches) -> ModelCard:
    """The card of the trained model: it may be asked what it has learnt, and no score is known of it yet."""
    policies = {way.asking.policy for ways in make.ways for way in ways}
    taught = {way.asking.dialect for ways in make.ways for way in ways}
    dialects = tuple(dict.fromkeys((*card.dialects, *(d for d in DEPTH if d in taught))))
    learnt = [task for task in ("object", "correspondence", "pose") if task in taught]
    learnt += ["depth"] * bool(taught & set(DEPTH)) + ["motion"] * bool(taught & set(MOTION))
    each = max(way.asking.each for ways in make.ways for way in ways)
    return replace(
        card,
        sha256={},
        revision=None,
        released=True,
        tasks=tuple(dict.fromkeys((*card.tasks, *learnt))),
        dialects=dialects,
        default_dialect=card.default_dialect or next(iter(dialects), None),
        policy=policies.pop(),
        points_per_question=max(card.points_per_question, each),
        scores={},
    )


def answer_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """() float32 sum of the cross entropy over the supervised tokens of a batch.

    The language head runs at those tokens only, some at a time: over a vocabulary of 150,000 all of a row's scores
    would take more memory than the model.
    """
    states = model.model(
        input_ids=batch.ids,
        attention_mask=seen_by(model, batch),
        position_ids=batch.positions,
        use_cache=False,
        **batch.images,
    ).last_hidden_state
    supervised = batch.labels[:, 1:] != IGNORED
    states, labels = states[:, :-1][supervised], batch.labels[:, 1:][supervised]
    sums = [
        recomputed(_scored, model.lm_head, *some, use_reentrant=False)
        for some in zip(states.split(SCORED_TOKENS), labels.split(SCORED_TOKENS), strict=True)
    ]
    return torch.stack(sums).sum()


def _scored(head: nn.Module, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = head(states)
    with torch.autocast(logits.device.type, enabled=False):
        return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a recipe; 0 when it has ended well, 1 with one line on standard error when it couldn't."""
    return run_command(
        TextRecipe,
        open_objective,
        dry_run,
        prog="python -m depthlm_training.sft",
        description="Teaches a model to say depth.",
        arguments=arguments,
    )


def dry_run(recipe: TextRecipe) -> str:
    """All settings and the first row of tokens; raises as `open_objective` does, and loads no weights."""
    checkpoint, card = opened(recipe)
    make = text_batches(recipe, checkpoint, card)
    batch = make(0)
    told = (
        f"{batch.pairs} questions about {batch.image_count} images: {batch.tokens} tokens in {len(batch.ids)} rows, "
        f"{batch.units} of them supervised, {batch.waste:.1%} padding"
    )
    return "\n".join([as_yaml(recipe), told, marked_text(dialogue_processor(make.folder, make.system_text), batch)])


def _ways(entry: dict[str, Any], recipe: TextRecipe, card: ModelCard, grid: ImageGrid) -> tuple[Way, ...]:
    told = "dialogue" if "dialogue" in entry else _TOLD.get(str(entry.get("task")))
    shares = entry.get("ask", {told: 1.0} if told else recipe.ask)
    if not isinstance(shares, dict) or not shares or not all(share > 0 for share in shares.values()):
        raise ConfigError(f"ask is {shares!r}; give dialects with their shares, such as {{coordinates: 1, marker: 1}}")
    one = recipe.supervise == "published"
    return tuple(
        Way(
            Asking(
                dialect=dialect,
                card=card,
                policy=recipe.policy or card.policy,
                points=1 if one or dialect in SINGLE else recipe.points,
                crops=entry.get("crops", recipe.crops),
                each=recipe.each if dialect == "compact" else 1,
                grid=grid,
            ),
            float(share),
        )
        for dialect, share in shares.items()
    )


if __name__ == "__main__":
    end_process(main())
