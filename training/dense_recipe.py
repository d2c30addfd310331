"""What a dense head is taught on, by which loss, and what is talked about meanwhile: the settings of `dense`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from depthlm_ros.errors import ConfigError
from depthlm_training.dense_model import HeadSettings
from depthlm_training.losses import GRADIENT_SCALES, SILOG_LAMBDA
from depthlm_training.objective import TrainSettings
from depthlm_training.parts import Lora
from depthlm_training.sft import TextRecipe

STAGES = {"head": ("depth_head",), "language": ("embeddings", "language", "lm_head", "depth_head")}


@dataclass(frozen=True)
class LossSettings:
    """What is minimised: text + weight * (SILog + gradient * gradient term).

    Attributes:
        lam: how much of a common error of scale SILog forgives.
        gradient: weight of the gradient term; published: 0.
        scales: of the gradient term.
        weight: of depth beside text; DepthVLM's `depth_loss_weight`.
    """

    lam: float = SILOG_LAMBDA
    gradient: float = 0.0
    scales: int = GRADIENT_SCALES
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise ConfigError(f"lam is {self.lam}; give a share from 0 to 1")
        if not (self.gradient >= 0 and self.weight >= 0 and self.scales >= 1):
            raise ConfigError("gradient and weight must be at least 0, and scales at least 1")


@dataclass(frozen=True)
class Talk:
    """Questions with answers that keep the language model talking.

    Attributes:
        data: entries of `mixtures.open_mixture`, as in `sft`.
        ask: share of each dialect among the questions about labelled points, for entries without `ask`.
        points: questions about an image.
        each: points a question of the compact dialect.
        images: images that are talked about beside those of a micro-batch whose depth is learnt; 0 for no talk.
        tokens_per_row: longest row.
        weight: of what is said beside depth.
        held_out: entries whose loss is measured before and after.
        held_out_images: how many of their images.
    """

    data: tuple[dict[str, Any], ...] = ()
    ask: dict[str, float] = field(default_factory=lambda: {"coordinates": 1.0})
    points: int = 10
    each: int = 1
    images: int = 1
    tokens_per_row: int = 8192
    weight: float = 1.0
    held_out: tuple[dict[str, Any], ...] = ()
    held_out_images: int = 64

    def recipe(self, whole: DenseRecipe, data: tuple[dict[str, Any], ...], images: int) -> TextRecipe:
        """The text recipe that makes these micro-batches."""
        return TextRecipe(
            model=whole.model, data=data, card=whole.card, ask=self.ask, points=self.points, each=self.each,
            policy=whole.policy, images=images, tokens_per_row=self.tokens_per_row, train=whole.train,
        )  # fmt: skip


@dataclass(frozen=True)
class DenseRecipe:
    """What a dense head is taught on, and how the training is run.

    Attributes:
        model: name of a card, folder or hub id; for stage `language` what stage `head` has made.
        data: entries of `mixtures.open_mixture`; `range_m` says for each which depths count.
        card: file of the card of what the model is to become; None keeps its own.
        run: folder of the run.
        stage: `head` trains the head alone, `language` the language model with it.
        images: of a micro-batch.
        labels: most labels of an image; 0 for all.
        max_edge_px: longest side of what is shown; 0 for no limit.
        policy: how images are brought to the card's focal length; None takes the card's.
        published: labels on whole pixels of the canonical image, and in stage `language` the constant reply instead of
            talk, as DepthVLM trains.
        head: of a model that has none.
        loss: what is minimised.
        talk: what is mixed into stage `language`.
        trained: parts of the model that are trained, instead of those of the stage (`parts`).
        lora: adapters instead of, or beside, what is trained.
        checkpointing: layers' activations are computed again instead of kept.
        train: how the training is run.
    """

    model: str
    data: tuple[dict[str, Any], ...]
    card: Path | None = None
    run: Path = Path("runs/dense")
    stage: Literal["head", "language"] = "head"
    images: int = 4
    labels: int = 0
    max_edge_px: int = 0
    policy: Literal["published", "exact"] | None = None
    published: bool = False
    head: HeadSettings = HeadSettings()
    loss: LossSettings = LossSettings()
    talk: Talk = Talk()
    trained: tuple[str, ...] = ()
    lora: Lora = Lora()
    checkpointing: bool = False
    train: TrainSettings = TrainSettings()

    def __post_init__(self) -> None:
        if self.images < 1 or self.labels < 0 or self.max_edge_px < 0:
            raise ConfigError("images must be at least 1, labels and max_edge_px at least 0")
        if not self.data:
            raise ConfigError("data is empty; name at least one source of labelled images")
        if self.stage == "language" and not self.published and self.talk.images and not self.talk.data:
            raise ConfigError(
                "talk.data is empty: a language model that learns depth alone forgets how to talk. Name dialogues, or "
                "set talk.images to 0 if it needn't"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """What is trained; the language head only where something is said."""
        says = self.published or self.talk.images > 0
        return self.trained or tuple(part for part in STAGES[self.stage] if says or part != "lm_head")
