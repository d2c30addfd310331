"""Text answers and heads at depth edges.

A head that draws a map draws its edges wide (third parties saw steps of about 15 pixels in maps of DepthVLM,
arXiv 2605.15876), and what it says inside of them lies between the two surfaces, in the air: flying points. A text
answer is one number for one pixel and could jump. Here one network learns both at once, so all read-outs have seen the
same images through the same eyes: compact text; the head with the mean absolute error of log-depth; a second head with
SILog, the published loss.

    python -m depthlm_training.ablations.edges --seeds 3
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from depthlm_ros.engines.dense_head import MLPDepthHead
from depthlm_training.ablations.base import Base, begin, question
from depthlm_training.ablations.learner import (
    SIZE,
    Learner,
    Rates,
    fit,
    map_loss,
    mirrored,
    ratio_within,
    say,
    text_loss,
)
from depthlm_training.ablations.scenery import Scenes
from depthlm_training.ablations.study import Contrast, Outcome, Study, main
from depthlm_training.demo.dialogue import LEAST_M
from depthlm_training.demo.model import TOKEN_PX
from depthlm_training.losses import silog
from depthlm_training.raycast import FAR_M

TEXT, HEAD, SILOG = "text", "head", "head, SILog"
FLYING, ON_EDGE, OFF_EDGE = "flying share at edges", "δ1 at edges", "δ1 elsewhere"
REACH_PX = 2  # a pixel is at an edge if both surfaces are within this distance


@dataclass(frozen=True)
class Settings:
    """What decides the result.

    Attributes:
        step_ratio: far over near from which on two surfaces make an edge; the square of δ1's factor is 1.56, so between
            them is room for an answer that is wrong about both.
        scored_points: pixels of a held-out scene that are asked about, half of them at edges.
    """

    base: Base = Base()
    steps: int = 500
    images: int = 12
    questions: int = 8
    step_ratio: float = 2.0
    scored_points: int = 24
    rates: Rates = Rates(muon=2.5e-3, adamw=1e-3)


def surfaces(depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest and furthest depth within `REACH_PX` of each pixel of a map (H, W); sky doesn't count."""
    side = 2 * REACH_PX + 1
    near, far = (
        np.lib.stride_tricks.sliding_window_view(
            np.pad(np.where(np.isfinite(depth), depth, unknown), REACH_PX, constant_values=unknown), (side, side)
        )
        for unknown in (np.inf, -np.inf)
    )
    return near.min((2, 3)), far.max((2, 3))


def flying(said_m: np.ndarray, near_m: np.ndarray, far_m: np.ndarray) -> np.ndarray:
    """Whether a depth lies between two surfaces and further than δ1's factor from both."""
    return (said_m > near_m * 1.25) & (said_m < far_m / 1.25)


def silog_loss(log_depth: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
    """DepthVLM's loss of maps (B, H, W) of log-depth; labels (B, H, W) in metres, NaN where unknown."""
    known = depths.isfinite()
    ratio = torch.where(known, log_depth - torch.where(known, depths, 1.0).log(), 0.0)
    return torch.stack([silog(d[k], k[k]) for d, k in zip(ratio, known, strict=True)]).mean()


class TwoHeads(nn.Module):
    """A learner with a second head on the same states."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner
        self.second = MLPDepthHead(SIZE.hidden, SIZE.head_hidden, TOKEN_PX, output="exp")
        self.second.load_state_dict(learner.net.head.state_dict())  # both begin as the base's head


def run(settings: Settings, seed: int, folder: Path) -> dict[str, Outcome]:
    """Trains the network of a seed and scores its three read-outs."""
    train = settings.base.scenes(folder, seed, "train")
    both = TwoHeads(begin(settings.base, seed, folder))
    learner = both.learner

    def loss_of(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 4, step])
        pick = train.pick(rng, settings.images)
        images, depths = mirrored(train.images[pick], train.depths[pick], rng)
        asked = question(images, depths, "compact", settings.questions, rng)
        rows = learner.dialogue.rows(asked.texts, asked.depth_m, whole=True, dialect="compact")
        encoded = learner.net.encode(torch.from_numpy(images))
        truth = torch.from_numpy(depths)
        loss = map_loss(learner.net, encoded, truth)
        loss = loss + silog_loss(both.second.raw_batch(encoded.states, encoded.grid).float(), truth)
        return loss + text_loss(learner, encoded, rows, asked.depth_m)

    effort = fit(both, settings.steps, loss_of, settings.rates, f"text and heads, seed {seed}")
    took = {"cpu_seconds": effort.cpu_seconds, "images": settings.steps * settings.images}
    scores = _scores(settings, both, settings.base.scenes(folder, seed, "held_out"), seed)
    return {arm: Outcome(metrics, took) for arm, metrics in scores.items()}


def _picked(depth: np.ndarray, settings: Settings, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) pixels, the first half of them at edges where there are any, and which are."""
    near, far = surfaces(depth)
    edge = (far > near * settings.step_ratio) & np.isfinite(depth)
    places = [np.flatnonzero(edge), np.flatnonzero(~edge & np.isfinite(depth))]
    half = settings.scored_points // 2
    kinds = [0 if len(places[0]) else 1] * half + [1] * half
    chosen = np.array([rng.choice(places[kind]) for kind in kinds])
    v, u = np.divmod(chosen, depth.shape[1])
    return np.stack([u, v], 1), np.array(kinds) == 0


@torch.no_grad()
def _scores(settings: Settings, both: TwoHeads, scenes: Scenes, seed: int) -> dict[str, dict[str, list[float]]]:
    result = {arm: {FLYING: [], ON_EDGE: [], OFF_EDGE: []} for arm in (TEXT, HEAD, SILOG)}
    rng = np.random.default_rng([seed, 5])
    for start in range(0, len(scenes), 20):
        images, depths = scenes.images[start : start + 20], scenes.depths[start : start + 20].astype(np.float32)
        picked = [_picked(depth, settings, rng) for depth in depths]
        asked = question(images, depths, "compact", settings.scored_points, rng, [points for points, _ in picked])
        encoded = both.learner.net.encode(torch.from_numpy(images))
        maps = {
            HEAD: both.learner.net.log_depth(encoded).exp().numpy(),
            SILOG: both.second.raw_batch(encoded.states, encoded.grid).exp().numpy(),
        }
        said = say(both.learner, images, asked.texts).reshape(len(images), -1)
        for i, (points, edge) in enumerate(picked):
            u, v = points.T
            near, far = (limit[v, u] for limit in surfaces(depths[i]))
            truth = depths[i][v, u].clip(LEAST_M, FAR_M)
            for arm, metrics in result.items():
                guess = said[i] if arm == TEXT else maps[arm][i, v, u]
                right = ratio_within(guess, truth)
                metrics[FLYING].append(_share(flying(guess, near, far), edge))
                metrics[ON_EDGE].append(_share(right, edge))
                metrics[OFF_EDGE].append(_share(right, ~edge))
    return result


def _share(what: np.ndarray, of: np.ndarray) -> float:
    return float(what[of].mean()) if of.any() else float("nan")


def study(settings: Settings | None = None) -> Study:
    """The ablation with its defaults or with other settings."""
    settings = settings or Settings()
    contrasts = (
        Contrast("the published head leaves more flying points than text", FLYING, SILOG, TEXT),
        Contrast("a head with absolute errors leaves more flying points than text", FLYING, HEAD, TEXT),
        Contrast("SILog leaves more flying points than absolute errors", FLYING, SILOG, HEAD),
        Contrast("text is right at edges more often than the published head", ON_EDGE, TEXT, SILOG),
        Contrast("the published head is right elsewhere more often than text", OFF_EDGE, SILOG, TEXT),
    )
    return Study(
        "edges",
        "Do text answers leave fewer points in the air at depth edges than heads do?",
        ("text-and-heads",),
        contrasts,
        lambda task, seed, folder: run(settings, seed, folder),
        settings,
    )


if __name__ == "__main__":
    main(study())
