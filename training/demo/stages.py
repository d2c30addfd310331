"""What the stages are run with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """What all stages have.

    Attributes:
        name: of the files that hold its state and its course.
        batch: images of a step.
        marked: share of the images that arrows are drawn on.
        arrows: how many at most.
        largest: they are drawn up to so many times their size. Nine pixels among fifty thousand are noticed by a
            network that has noticed large ones, and not for a long time by one that hasn't.
        dense_weight: weight of the depth maps' loss. Its gradient is small beside those of the text stage's many
            losses; with a weight of 1 there, δ1 of the maps fell from 0.85 to 0.80 in 500 steps.
        probe_weight: weight of the probe, which reads depth off what the vision tower hands over.
        finder_weight: weight of the finder, which reads the arrow's place off it.
        average: after how many steps a step's weights count half in the averaged ones, which are what the stage makes.
        decay: share of the steps over which the learning rates go down.
    """

    name: str
    steps: int
    batch: int = 32
    muon_lr: float = 2.5e-3
    adamw_lr: float = 1e-3
    marked: float = 0.4
    arrows: int = 1
    largest: int = 1
    dense_weight: float = 1.0
    probe_weight: float = 0.2
    finder_weight: float = 0.2
    average: float = 150
    decay: float = 0.0
    save_every: int = 100


@dataclass(frozen=True)
class TextStage(Stage):
    """What the text stage has beside that.

    The answers are the dense head's own depths instead of the true ones. True depths carry what no image tells; digits
    trained on them spread, and the most probable digit of a spread is a poor answer (measured early in training: text
    0.40, the regression helper 0.50, dense 0.55 on the same points). What the head says is a function of the image, so
    digits get sharp.

    Attributes:
        turns: the dialects of the steps, over and over. Each step asks about its arrows too.
        images: how many of the other images a step asks about.
        questions: questions about each of them in the coordinates dialect.
        points: points of each image in the compact dialect, a multiple of every one of `each`.
        each: how many points a question of the compact dialect asks about, drawn for each step.
        whole_every: every so many steps answers are supervised to their end. In the others they stop after the first
            number: attention is causal, so that number's loss is the same and a third of the tokens is saved.
        drill: questions without an image, run through the first two layers alone, that must show the place they name
            where their last coordinate ends. It is cheap, and finding the place was what held the answers back.
        regression_weight: weight of the helper that reads log-depth off the state which is about to say the number.
            Digits alone say "wrong" with no direction; this says how far off.
        location_weight: weight of the helper that reads the asked place off the second layer's state, for text
            coordinates and arrows alike: the layers above then know where to look.
        location_beta: share of the image's side below which the locations' error counts by its square, so that its
            gradient, the largest of all at first, fades once places are found.
    """

    turns: tuple[str, ...] = ("coordinates", "compact")
    images: int = 5
    questions: int = 12
    points: int = 24
    each: tuple[int, ...] = (1, 1, 1, 2, 3, 4)
    whole_every: int = 8
    drill: int = 192
    regression_weight: float = 1.0
    location_weight: float = 1.0
    location_beta: float = 0.1


DENSE = Stage(name="dense", steps=2400, arrows=6, largest=4)
# At a constant rate, until places are found; what it says then is nearly what the head sees.
TEXT = TextStage(name="text", steps=1350, largest=2, dense_weight=8.0, finder_weight=0.1, save_every=150)
# Mostly depth maps again, with as many questions as keep the answers up with them.
POLISH = TextStage(
    name="polish", steps=2300, dense_weight=16.0, finder_weight=0.1, marked=0.25, images=3, questions=8, points=12,
    drill=96, decay=0.4, save_every=250,
)  # fmt: skip
