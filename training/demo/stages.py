"""What the text stages are run with."""

from __future__ import annotations

from dataclasses import dataclass

from depthlm_training.demo.bank import ALL_CANVASES, CANVASES, Canvases


@dataclass(frozen=True)
class TextStage:
    """What a text stage is run with; the defaults are stage 2.

    Attributes:
        name: of the files that hold its state and its course.
        canvases: sizes of the images, with their shares.
        narrower: share of the images that don't fill their canvas.
        decay: share of the steps over which the learning rates go down.
        turns: the dialects of the steps, over and over.
        images: images of a step, but for the marker dialect.
        questions: questions about each of them in the coordinates dialect.
        marked: marked images of a marker step, one question each.
        points: points of each image in the compact dialect, a multiple of every one of `each`.
        each: how many points a question of the compact dialect asks about, drawn for each step.
        whole_after: share of the steps after which answers are supervised to their end. Before, they stop after the
            first number: attention is causal, so that number's loss is the same and a third of the tokens is saved.
        guided_from: from this step on the answers are the dense head's own depths instead of the true ones, and the
            location helper is at work. True depths carry what no image tells; digits trained on them spread, and the
            most probable digit of a spread is a poor answer (measured at step 800: text 0.40, the regression helper
            0.50, dense 0.55 on the same points). What the head says is a function of the image, so digits get sharp.
        drill_from: from this step on each step also drills reading numbers: `drill` questions without an image, run
            through the first two layers alone, must show the place they name where their last coordinate ends. It
            is cheap, and finding the place was what held the answers back (measured at step 1400: places read with
            an error of a tenth of the width and a fifth of the height).
        location_weight: weight of the helper that reads the asked place off the second layer's state, for text
            coordinates and arrows alike: the layers above then know where to look.
        regression_weight: weight of the helper that reads log-depth off the state which is about to say the number.
            Digits alone say "wrong" with no direction; this says how far off.
    """

    name: str = "text"
    steps: int = 2600
    guided_from: int = 1000
    drill_from: int = 1400
    drill: int = 384
    turns: tuple[str, ...] = ("coordinates", "coordinates", "marker")
    images: int = 6
    questions: int = 16
    marked: int = 16
    points: int = 24
    each: tuple[int, ...] = (1,)
    whole_after: float = 0.75
    muon_lr: float = 2.5e-3
    adamw_lr: float = 1e-3
    dense_weight: float = 1.0
    probe_weight: float = 0.2
    regression_weight: float = 1.0
    location_weight: float = 1.0
    save_every: int = 200
    canvases: Canvases = CANVASES
    narrower: float = 0.3
    decay: float = 0.4


# Every size that a camera's images come in, arrows as often as coordinates. Measured before it on cameras of all sizes:
# dense 0.620, coordinates 0.526, marker 0.283, although 0.725, 0.613, 0.406 on the one size that stage 2 saw most.
ALL_SIZES = TextStage(
    name="sizes",
    steps=700,
    guided_from=0,
    drill_from=0,
    turns=("coordinates", "marker"),
    whole_after=0,
    muon_lr=1.5e-3,
    adamw_lr=6e-4,
    save_every=100,
    canvases=ALL_CANVASES,
    narrower=0.7,
    decay=0.9,
)

# The bare number after the shortest question, every second step; the others keep what they know. A row of it has half
# of the tokens, so there are more of them; half of its steps ask about several points at once, up to four.
WITH_COMPACT = TextStage(
    name="compact",
    steps=600,
    guided_from=0,
    drill_from=0,
    turns=("compact", "coordinates", "compact", "marker"),
    each=(1, 1, 1, 2, 3, 4),
    whole_after=0,
    muon_lr=1.5e-3,
    adamw_lr=6e-4,
    save_every=100,
    canvases=ALL_CANVASES,
    narrower=0.7,
    decay=0.9,
)
