"""How a question names its point: by an arrow in the image, by coordinates in the text, or not at all.

DepthLM (arXiv 2509.25413) finds markers better than text coordinates by about 0.15 δ1; VLM3 (arXiv 2605.30561), on a
newer base model and with normalised coordinates, finds both equal. Not naming the point is the floor: what the image
as a whole tells. One question an image, the published sentences, the same points, the same base. The base has read
neither arrows nor numbers.

    python -m depthlm_training.ablations.reference --seeds 3
"""

from __future__ import annotations

from dataclasses import dataclass

from depthlm_training.ablations.asked import SCORE, Lesson, teach
from depthlm_training.ablations.base import NAMELESS, Base
from depthlm_training.ablations.learner import Rates
from depthlm_training.ablations.study import Contrast, Study, main

MARKER, COORDINATES = "marker", "coordinates"


@dataclass(frozen=True)
class Settings:
    """What decides the result."""

    base: Base = Base()
    steps: int = 500
    images: int = 20
    rates: Rates = Rates(muon=2.5e-3, adamw=1e-3)


def study(settings: Settings | None = None) -> Study:
    """The ablation with its defaults or with other settings."""
    settings = settings or Settings()
    lessons = {
        arm: Lesson(arm, settings.images, 1, settings.steps, settings.rates) for arm in (MARKER, COORDINATES, NAMELESS)
    }
    return Study(
        "reference",
        "Does a question that names its point by an arrow teach more than one that names it in text, or not at all?",
        tuple(lessons),
        (
            Contrast("an arrow beats text coordinates (DepthLM; VLM3 finds them equal)", SCORE, MARKER, COORDINATES),
            Contrast("an arrow beats no reference", SCORE, MARKER, NAMELESS),
            Contrast("text coordinates beat no reference", SCORE, COORDINATES, NAMELESS),
        ),
        lambda task, seed, folder: {task: teach(lessons[task], settings.base, task, seed, folder)},
        settings,
    )


if __name__ == "__main__":
    main(study())
