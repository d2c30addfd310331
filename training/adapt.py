"""Does fine-tuning on a robot's own recording help? A camera that the model hasn't seen, half to learn, half to score.

    python -m depthlm_training.adapt --run runs/adapt

Renders drives with a wide-angle camera (110 degrees; the demonstration model was trained on 54 to 70), records them,
makes a training set of the first half of the time, fine-tunes, and scores the model before and after on the other half.
Drives of the two halves share no scene. The interval is over scenes, paired: the same scenes before and after.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from depthlm_ros.bag_labels import HELD_OUT_FILE, LabelSettings, make_set
from depthlm_ros.bags import START_NS, RecordedFrame, write_bag
from depthlm_ros.cli_inputs import focal_px
from depthlm_ros.datasets import LabelledImages
from depthlm_ros.depth import Frame
from depthlm_ros.errors import ConfigError, DepthLMError
from depthlm_ros.estimator import Estimator
from depthlm_ros.evaluate import progress
from depthlm_ros.metrics import within_delta1
from depthlm_training.finetune import FinetuneOptions, finetune, finetune_recipe
from depthlm_training.scenes import KINDS, render_drive

_STEP_NS = 10**9
_DRAWS = 10_000


@dataclass(frozen=True)
class Adaptation:
    """One experiment.

    Attributes:
        model: what is fine-tuned.
        drives: recorded one after the other, each through three scenes; an even number.
        frames: of a drive.
        width: of the image in pixels.
        height: of the image in pixels.
        fov_deg: horizontal field of view.
        labels: of an image, to learn from and to score.
        dialects: what is taught and scored.
        steps: of the fine-tuning.
        lr: of the fine-tuning; None for its default.
        images: of a step.
        seed: of the drives.
    """

    model: str = "demo"
    drives: int = 20
    frames: int = 9
    width: int = 480
    height: int = 240
    fov_deg: float = 110.0
    labels: int = 300
    dialects: tuple[str, ...] = ("dense",)
    steps: int = 200
    lr: float | None = None
    images: int = 4
    seed: int = 1000

    def __post_init__(self) -> None:
        if self.drives < 2 or self.drives % 2 or self.frames < len(KINDS):
            raise ConfigError(
                f"{self.drives} drives of {self.frames} frames can't be halved; give an even number, of at least "
                f"{len(KINDS)} frames each"
            )


@dataclass(frozen=True)
class Gain:
    """δ1 on the half that wasn't learnt from.

    Attributes:
        dialect: how the model was asked.
        before: mean over scenes.
        after: the same of the fine-tuned model.
        gain: after less before.
        interval_95: of the gain, over draws of scenes.
        scenes: number of them.
        points: number of labels scored.
    """

    dialect: str
    before: float
    after: float
    gain: float
    interval_95: tuple[float, float]
    scenes: int
    points: int


def adapt(settings: Adaptation, run: Path) -> list[Gain]:
    """Runs the experiment; what `run` holds already is used again.

    Raises:
        DepthLMError: the model can't be loaded or trained.
    """
    bag, labels, tuned = run / "drives", run / "set", run / "tuned"
    if not bag.exists():
        record(settings, bag)
    if not labels.exists():
        make_set(bag, labels, LabelSettings(points=settings.labels, held_out=0.5, gap_s=0), progress=progress)
    options = FinetuneOptions(
        dialects=settings.dialects, steps=settings.steps, lr=settings.lr, images=settings.images, lora=0
    )
    finetune(finetune_recipe(labels, settings.model, tuned, options), resume=True)
    held_out = LabelledImages(labels / HELD_OUT_FILE)
    scenes = scenes_of(labels / HELD_OUT_FILE, settings)
    gains = []
    for dialect in settings.dialects:
        before, after = (rights(model, held_out, dialect) for model in (settings.model, str(tuned)))
        gains.append(gain(dialect, before, after, scenes))
    (run / "gain.json").write_text(
        json.dumps({"settings": asdict(settings), "gains": [asdict(each) for each in gains]}, indent=2) + "\n",
        encoding="utf-8",
    )
    return gains


def record(settings: Adaptation, bag: Path) -> None:
    """Renders the drives into one recording, a frame a second."""
    focal = focal_px(settings.fov_deg, settings.width)

    def frames() -> Iterator[RecordedFrame]:
        for drive in range(settings.drives):
            views = render_drive(
                settings.frames,
                width=settings.width,
                height=settings.height,
                focal_px=focal,
                seed=settings.seed + drive,
                fps=1.0,
                supersample=1,
            )
            for index, (image, depth_m, camera) in enumerate(views):
                stamp_ns = START_NS + (drive * settings.frames + index) * _STEP_NS
                yield RecordedFrame(Frame(image, camera, stamp_ns), depth_m)

    count = settings.drives * settings.frames
    write_bag(bag, progress(frames(), count, "render"), notes={"source": "rendered, not a photograph"})


def scenes_of(labels: Path, settings: Adaptation) -> np.ndarray:
    """(images,) which scene each row of a labels file shows."""
    stamps = [json.loads(line)["stamp_ns"] for line in labels.read_text(encoding="utf-8").splitlines()]
    drive, frame = np.divmod((np.array(stamps, np.int64) - START_NS) // _STEP_NS, settings.frames)
    legs = np.concatenate(
        [np.full(len(part), leg) for leg, part in enumerate(np.array_split(np.arange(settings.frames), len(KINDS)))]
    )
    return drive * len(KINDS) + legs[frame]


def rights(model: str, rows: LabelledImages, dialect: str) -> list[np.ndarray]:
    """(labels,) bool for each image: which answers are within a factor 1.25; one that isn't understood is wrong."""
    right = []
    with Estimator.load(model, dialect=dialect) as estimator:
        for row in progress(rows, len(rows), f"{dialect}, {Path(model).name}"):
            result = estimator.estimate(row.image, row.camera, row.pixels, dialect=dialect)
            right.append(within_delta1(result.depth_m, row.depth_m))
    return right


def gain(dialect: str, before: list[np.ndarray], after: list[np.ndarray], scenes: np.ndarray) -> Gain:
    """The difference of two models on the same labels, with an interval over scenes."""
    means = np.array(
        [
            [np.concatenate([each for each, of in zip(model, scenes, strict=True) if of == scene]).mean()
             for scene in np.unique(scenes)]
            for model in (before, after)
        ]
    )  # fmt: skip
    differences = means[1] - means[0]
    rng = np.random.default_rng(0)
    draws = differences[rng.integers(0, len(differences), (_DRAWS, len(differences)))].mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Gain(
        dialect=dialect,
        before=float(means[0].mean()),
        after=float(means[1].mean()),
        gain=float(differences.mean()),
        interval_95=(float(low), float(high)),
        scenes=len(differences),
        points=sum(map(len, before)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment; 0 when it has ended well, 1 with one line on standard error when it couldn't."""
    default = Adaptation()
    parser = argparse.ArgumentParser(
        prog="python -m depthlm_training.adapt",
        description="Fine-tunes on half of a rendered recording of another camera and scores on the other half.",
    )
    parser.add_argument("--run", type=Path, default=Path("runs/adapt"), help="recording, set and run (%(default)s)")
    parser.add_argument("--model", default=default.model, help="what is fine-tuned (%(default)s)")
    parser.add_argument("--dialects", default=",".join(default.dialects), help="taught and scored (%(default)s)")
    parser.add_argument("--drives", type=int, default=default.drives, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=default.steps, help="of the fine-tuning (%(default)s)")
    parser.add_argument("--lr", type=float, default=default.lr, help="largest learning rate (default: finetune's)")
    options = parser.parse_args(arguments)
    began = time.time()
    try:
        settings = Adaptation(
            model=options.model,
            drives=options.drives,
            dialects=tuple(options.dialects.split(",")),
            steps=options.steps,
            lr=options.lr,
        )
        gains = adapt(settings, options.run)
    except DepthLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for each in gains:
        low, high = each.interval_95
        print(
            f"{each.dialect}: delta1 {each.before:.3f} -> {each.after:.3f}, gain {each.gain:+.3f} (95 % over "
            f"{each.scenes} scenes: {low:+.3f} to {high:+.3f}), {each.points} points"
        )
    print(f"{(time.time() - began) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
