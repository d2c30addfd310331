"""One question an image or many, in a training step.

VLM3 (arXiv 2605.30561) trains on ten questions with their answers after one image, DepthLM (arXiv 2509.25413) on one.
Here many questions share their image's prefix and don't see each other. Three arms from the same base and with as many
steps: one question about each of many images; ten about each of a tenth of the images, so as many answers; ten about
each of many images, so as many images.

    python -m depthlm_training.ablations.questions --seeds 3
"""

from __future__ import annotations

from dataclasses import dataclass

from depthlm_training.ablations.asked import SCORE, Lesson, teach
from depthlm_training.ablations.base import Base
from depthlm_training.ablations.learner import Rates
from depthlm_training.ablations.study import Contrast, Study, main


@dataclass(frozen=True)
class Settings:
    """What decides the result."""

    base: Base = Base()
    steps: int = 400
    images: int = 20
    questions: int = 10
    rates: Rates = Rates(muon=2.5e-3, adamw=1e-3)


def lessons(settings: Settings) -> dict[str, Lesson]:
    """The arms: images and questions of a step."""
    few = settings.images // settings.questions
    shapes = ((settings.images, 1), (few, settings.questions), (settings.images, settings.questions))
    return {
        f"{images} x {each}": Lesson("compact", images, each, settings.steps, settings.rates) for images, each in shapes
    }


def study(settings: Settings | None = None) -> Study:
    """The ablation with its defaults or with other settings."""
    settings = settings or Settings()
    arms = lessons(settings)
    one, same_answers, same_images = arms
    return Study(
        "questions",
        "Do many questions about an image teach more than one, for the same images and for the same answers?",
        tuple(arms),
        (
            Contrast("for the same images, many questions beat one", SCORE, same_images, one),
            Contrast("for the same answers, more images beat more questions", SCORE, one, same_answers),
        ),
        lambda task, seed, folder: {task: teach(arms[task], settings.base, task, seed, folder)},
        settings,
    )


if __name__ == "__main__":
    main(study())
