"""What a model expects beside what it says, on held-out rendered scenes, and what its confidence is worth.

python -m depthlm_training.confidence models/demo --scenes 100 --seed 31
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from depthlm_ros.calibration import calibrated_elsewhere, reliability
from depthlm_ros.estimator import Estimator
from depthlm_ros.expectation import DEPTH_VALUES
from depthlm_ros.metrics import delta1_interval, depth_metrics, within_delta1
from depthlm_training.demo.score import held_out


def confidence(model: str, scenes: int, seed: int, points: int = 50, dialect: str = "coordinates") -> dict:
    """Scores each way of reading an answer: what was said, and each value of the distribution of the digits."""
    readings = [{}, *({"distribution": True, "depth_value": value} for value in DEPTH_VALUES)]
    answers: list[list] = [[] for _ in readings]
    truth = []
    with Estimator.load(model) as estimator:
        for index in tqdm(range(scenes), desc=dialect, unit="scene"):
            scene = held_out(index, seed, points=points)
            truth.append(scene.truth_m)
            for reading, kept in zip(readings, answers, strict=True):
                kept.append(estimator.estimate(scene.image, scene.camera, scene.pixels, dialect=dialect, **reading))
    true, frames = np.concatenate(truth), np.repeat(np.arange(scenes), points)
    names = ["said", *DEPTH_VALUES]
    figures = {name: _figures(kept, true, frames) for name, kept in zip(names, answers, strict=True)}
    return {"scenes": scenes, "seed": seed, "points": len(true), "dialect": dialect, "readings": figures}


def _figures(results: list, true: np.ndarray, frames: np.ndarray) -> dict:
    depth_m = np.concatenate([result.depth_m for result in results])
    known = np.isfinite(depth_m)
    said = np.concatenate([result.confidence for result in results])[known]
    right = within_delta1(depth_m, true)[known]
    scores = depth_metrics(depth_m, true)
    calibrated = calibrated_elsewhere(said, right, frames[known])
    return {
        "delta1": scores.delta1,
        "delta1_95": delta1_interval(depth_m, true, frames),
        "abs_rel": scores.abs_rel,
        "rmse_log": scores.rmse_log,
        "calibration_error": reliability(said, right).error,
        "calibration_error_calibrated": None if calibrated is None else reliability(calibrated, right).error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores expectations and confidences on held-out rendered scenes.")
    parser.add_argument("model", help="name of a card, or a folder")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=31)
    parser.add_argument("--dialect", default="coordinates")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    text = json.dumps(confidence(args.model, args.scenes, args.seed, dialect=args.dialect), indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
