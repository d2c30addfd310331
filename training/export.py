"""From a run to a model folder: weights with adapters merged, processor, card; and the proof that they are the run's.

    depthlm export RUN FOLDER [--scores METRICS.json] [--dtype bfloat16]

The folder is a model like any other: `depthlm evaluate --model FOLDER`, the node's parameter `model`, `Estimator.load`.
It appears only when what it answers was compared with what the run's weights answer.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from depthlm_ros.cards import CARD_FILE
from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_ros.engines.devices import choose_placement
from depthlm_ros.engines.loading import load_model
from depthlm_ros.errors import ConfigError, TrainingError
from depthlm_ros.estimator import Estimator
from depthlm_ros.modelcard import ModelCard, read_card
from depthlm_training import dense, sft
from depthlm_training.batches import dialogue_processor
from depthlm_training.config import as_yaml, load
from depthlm_training.dense import DenseObjective
from depthlm_training.dense_batches import DenseBatch
from depthlm_training.dense_model import HeadSettings, load_dense
from depthlm_training.dense_recipe import DenseRecipe
from depthlm_training.packed_attention import seen_by
from depthlm_training.packing import IGNORED, Batch
from depthlm_training.recipes import recipe_file
from depthlm_training.sft import TextObjective, TextRecipe
from depthlm_training.states import POSITION, found, load_weights

# Root mean square of the difference over that of the values. Float32 leaves rounding of merged adapters, bfloat16 its
# 8 bits of each weight through all layers.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.05}
_CPU = torch.device("cpu")
_OPENS = {TextRecipe: sft.open_objective, DenseRecipe: dense.open_objective}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: the model.
        step: of the run's checkpoint.
        difference: root mean square between the answers of run and folder, as a share of their own.
        card: of the model.
    """

    folder: Path
    step: int
    difference: float
    card: ModelCard


def export(
    run: Path, folder: Path, *, step: int | None = None, dtype: str = "float32", scores: Sequence[Path] = ()
) -> Exported:
    """Writes the model of a run.

    Args:
        run: the folder of a training that kept its recipe.
        folder: to make; must not exist.
        step: of the checkpoint; None for the newest.
        dtype: of the stored weights, "float32" or "bfloat16".
        scores: metrics.json of evaluations of this model, one for each dialect.

    Raises:
        ConfigError: `run` is no run, `folder` exists, scores that aren't.
        TrainingError: no checkpoint, or the folder doesn't answer as the run does.
        ModelError, DatasetError: the recipe's model or data are no longer there.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists already; delete it or name another folder")
    if dtype not in TOLERANCES:
        raise ConfigError(f"dtype is {dtype!r}; choose one of {', '.join(TOLERANCES)}")
    measured = read_scores(scores)
    recipe = kept_recipe(run)
    checkpoint = checkpoint_of(run, step)
    objective = open_recipe(replace(recipe, train=replace(recipe.train, dtype=dtype)))
    load_weights(checkpoint, objective.model)
    position = json.loads((checkpoint / POSITION).read_text(encoding="utf-8"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / folder.name
        objective.save(made)
        difference = compared(objective, made)
        if not difference <= TOLERANCES[dtype]:
            raise TrainingError(
                f"what was saved of {checkpoint} answers {difference:.2%} differently from the run, more than "
                f"{TOLERANCES[dtype]:.1%} of {dtype}; nothing was written"
            )
        card = write_card(made, recipe, position["step"], measured)
        check_answers(made, objective)
        shutil.move(made, folder)
    return Exported(folder, position["step"], difference, card)


def kept_recipe(run: Path) -> TextRecipe | DenseRecipe:
    """The recipe of a run.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    files = {kind: recipe_file(run, kind) for kind in _OPENS}
    for kind, path in files.items():
        if path.is_file():
            return load(kind, [str(path)])
    names = " or ".join(path.name for path in files.values())
    raise ConfigError(f"{run} holds no {names}, so it is no run; give the folder of a training")


def open_recipe(recipe: TextRecipe | DenseRecipe) -> TextObjective | DenseObjective:
    """What a recipe trains, before any step; raises as the `open_objective` of its kind."""
    return _OPENS[type(recipe)](recipe)


def checkpoint_of(run: Path, step: int | None = None) -> Path:
    """The folder of a checkpoint, the newest by default.

    Raises:
        TrainingError: there is none, or none of that step.
    """
    checkpoints = {int(path.name.rpartition("-")[2]): path for path in found(run)}
    if not checkpoints:
        raise TrainingError(f"{run} holds no checkpoint yet; train first")
    if step is not None and step not in checkpoints:
        raise TrainingError(f"{run} has no checkpoint of step {step}; there are {', '.join(map(str, checkpoints))}")
    return checkpoints[max(checkpoints) if step is None else step]


@torch.no_grad()
def compared(objective: TextObjective | DenseObjective, folder: Path) -> float:
    """How far a saved folder's answers are from those of the model in memory.

    Both see the first micro-batch: logits of all supervised tokens, or logarithms of all maps of depth.

    Returns:
        Root mean square of the difference over the standard deviation of the values.
    """
    batch = objective.make(0)
    checkpoint = open_checkpoint(folder)
    if isinstance(objective, DenseObjective):
        patch_px = dialogue_processor(checkpoint.folder, read_card(folder / CARD_FILE).system_text).patch_px
        saved: Any = load_dense(checkpoint, patch_px, HeadSettings())
        values = [_log_maps(model.eval(), batch) for model in (objective.model, saved)]
    else:
        saved = load_model(checkpoint, choose_placement("cpu", "float32"))
        values = [_logits(model.eval(), batch) for model in (objective.model, saved)]
    before, after = values
    return float((after - before).square().mean().sqrt() / before.std().clamp_min(1e-6))


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    """(supervised tokens, vocabulary) float32."""
    batch = batch.to(_CPU)
    states = model.model(
        input_ids=batch.ids,
        attention_mask=seen_by(model, batch),
        position_ids=batch.positions,
        use_cache=False,
        **batch.images,
    ).last_hidden_state
    return model.lm_head(states[:, :-1][batch.labels[:, 1:] != IGNORED]).float()


def _log_maps(model: Any, batch: DenseBatch) -> torch.Tensor:
    maps, _ = model(batch.images.to(_CPU))
    return torch.cat([each.float().clamp_min(1e-6).log().reshape(-1) for each in maps])


def check_answers(folder: Path, objective: TextObjective | DenseObjective) -> None:
    """Asks the folder as the node does, about one labelled pixel of the training data, in each of its dialects.

    Raises:
        DepthLMError: the engine can't load it, or fails while it answers.
    """
    example = objective.make.mixture.example(0)
    if example.cameras[0] is None or not len(example.pixels):
        return
    with Estimator.load(str(folder), device="cpu", dtype="float32") as estimator:
        for dialect in estimator.card.dialects:
            estimator.estimate(example.images[0], example.cameras[0], example.pixels[:1], dialect=dialect)


def read_scores(files: Sequence[Path]) -> dict[str, Any]:
    """Scores for a card from what `depthlm evaluate` wrote: δ1 by dialect, and where they come from.

    Raises:
        ConfigError: a file that isn't a metrics.json with scores.
    """
    scores: dict[str, Any] = {}
    sources = []
    for path in files:
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
            scores[metrics["environment"]["dialect"]] = round(metrics["depth"]["delta1"], 4)
            sources.append(f"{metrics['title']}, {metrics['compared']} points")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{path} holds no scores ({type(error).__name__}: {error}); give a metrics.json of depthlm evaluate"
            ) from error
    return scores | {"source": "delta1: " + "; ".join(dict.fromkeys(sources))} if scores else {}


README = """---
library_name: transformers
pipeline_tag: image-text-to-text
---

# {card.name}

{card.description}

Trained from `{recipe.model}` for {step} steps ({date}). It speaks {dialects}; images are brought to a focal length of
{card.focal_px:g} px (policy `{card.policy}`). Licence: {card.licence}.

{scores}

## Recipe

```yaml
{settings}```
"""


def write_card(folder: Path, recipe: TextRecipe | DenseRecipe, step: int, scores: dict[str, Any]) -> ModelCard:
    """Completes the card that the training saved, and writes the folder's README with recipe and scores."""
    card = read_card(folder / CARD_FILE)
    told = " ".join(card.description.split())
    origin = f"Trained further from {Path(recipe.model).name}: {step} steps."
    card = replace(card, description=told if origin in told else f"{told} {origin}".strip(), scores=scores)
    (folder / CARD_FILE).write_text(as_yaml(card), encoding="utf-8")
    lines = [f"| {dialect} | {value:.3f} |" for dialect, value in scores.items() if dialect != "source"]
    table = ["| dialect | δ1 |", "|---|---|", *lines, "", f"Measured: {scores['source']}."] if scores else []
    text = README.format(
        card=card,
        recipe=recipe,
        step=step,
        date=date.today().isoformat(),
        dialects=", ".join(card.dialects) or "no depth dialect",
        scores="\n".join(table) or "No scores were measured.",
        settings=as_yaml(recipe),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    return card
