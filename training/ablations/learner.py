"""The network of the ablations, how it learns, and how it is heard.

It is the demo's network in smaller, so that an arm of an ablation takes a minute or two on one core.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from depthlm_ros.errors import EngineError
from depthlm_training.ablations.scenery import Scenes
from depthlm_training.demo.dialogue import IGNORED, Dialogue, Rows
from depthlm_training.demo.model import DemoNet, Encoded, Size
from depthlm_training.demo.optim import Optimizer, Schedule
from depthlm_training.demo.text import answer_states
from depthlm_training.demo.vocabulary import build_tokenizer

SIZE = Size(
    vision_hidden=96, vision_layers=4, vision_heads=3, hidden=128, layers=4, heads=2, kv_heads=1, mlp=320,
    head_hidden=192,
)  # fmt: skip
LONGEST_ANSWER = 7  # tokens: the compact answer's own end or "12.34" and what follows it
_NUMBER = re.compile(r"\d+\.\d\d")


@dataclass(frozen=True)
class Rates:
    """Learning rates, those of the demo's stage of the same kind; down to zero over the last `decay` of the steps."""

    muon: float = 5e-3
    adamw: float = 1.5e-3
    decay: float = 0.4


class Learner(nn.Module):
    """The network and a read-out that training alone uses: log-depth off the state about to say a number."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        tokenizer = build_tokenizer()
        self.net = DemoNet(tokenizer, SIZE, seed=seed)
        self.dialogue = Dialogue(tokenizer)
        self.regressor = nn.Linear(SIZE.hidden, 1)
        self.locator = nn.Linear(SIZE.hidden, 2)

    def save(self, path: Path) -> None:
        """Writes all weights; replaced atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file({k: v.contiguous().clone() for k, v in self.state_dict().items()}, part)
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Reads what `save` wrote."""
        self.load_state_dict(load_file(path))


@dataclass(frozen=True)
class Effort:
    """What training took."""

    cpu_seconds: float
    steps: int


def fit(module: nn.Module, steps: int, loss_of: Callable[[int], torch.Tensor], rates: Rates, name: str) -> Effort:
    """Trains a module on the losses that `loss_of` returns for steps 0, 1, ...

    Raises:
        EngineError: a loss that isn't finite.
    """
    optimizer = Optimizer(module, Schedule(steps, decay=rates.decay), rates.muon, rates.adamw)
    began = time.process_time()
    with tqdm(range(steps), desc=name, mininterval=5, unit="step") as bar:
        for step in bar:
            loss = loss_of(step)
            if not math.isfinite(loss.item()):
                raise EngineError(f"{name}: the loss of step {step} is {loss.item()}; lower the learning rates {rates}")
            loss.backward()
            optimizer.step(step)
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return Effort(time.process_time() - began, steps)


def mirrored(images: np.ndarray, depths: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images (B, H, W, 3) and labels (B, H, W), half of them as a mirror shows them: as true as the others."""
    flip = rng.random(len(images)) < 0.5
    return (
        np.where(flip[:, None, None, None], images[:, :, ::-1], images),
        np.where(flip[:, None, None], depths[:, :, ::-1], depths).astype(np.float32),
    )


def map_loss(net: DemoNet, encoded: Encoded, depths: torch.Tensor, probe_weight: float = 0.3) -> torch.Tensor:
    """Mean absolute error of log-depth over labelled pixels, of the head and of the vision tower's probe.

    Unlike the demo's own loss it takes labels at any pixels, however few.

    Args:
        depths: (B, H, W) metres, NaN where unlabelled.
    """
    known = depths.isfinite()
    truth = depths[known].log()
    error = (net.log_depth(encoded).float()[known] - truth).abs().mean()
    coarse = net.probe_log_depth(encoded).float().repeat_interleave(4, 1).repeat_interleave(4, 2)
    return error + probe_weight * (coarse[known] - truth).abs().mean()


def text_loss(learner: Learner, encoded: Encoded, rows: Rows, depth_m: np.ndarray) -> torch.Tensor:
    """Cross entropy of the answers' tokens and, as in the demo's text stages, the read-out's error of log-depth.

    Digits alone say "wrong" with no direction; the read-out says how far off.

    Args:
        rows: what `Dialogue.rows` made of the questions and `depth_m`.
        depth_m: (P,) true depths.
    """
    states, _ = answer_states(learner.net, encoded, rows.ids, rows.shared)
    supervised = rows.labels[:, 1:] != IGNORED
    logits = learner.net.vlm.lm_head(states[:, :-1][supervised]).float()
    loss = nn.functional.cross_entropy(logits, rows.labels[:, 1:][supervised])
    felt = learner.regressor(states[rows.row, rows.before]).float()[:, 0]
    return loss + (felt - torch.from_numpy(depth_m).float().log()).abs().mean()


@torch.no_grad()
def say(learner: Learner, images: np.ndarray, questions: Sequence[str], opening: str = "") -> np.ndarray:
    """Asks and reads the greedily said number.

    Args:
        images: (B, H, W, 3) uint8.
        questions: an equal number about each image, image after image.
        opening: how every answer begins, up to its number.

    Returns:
        (R,) metres, NaN where no number was said.
    """
    tokenizer = learner.dialogue.tokenizer
    encoded = learner.net.encode(torch.from_numpy(images))
    begun = tokenizer(opening).input_ids if opening else []
    rows = [torch.tensor(ids + begun) for ids in learner.dialogue.prompts(list(questions))]
    lengths = torch.tensor([len(row) for row in rows])
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    ids = nn.functional.pad(ids, (0, LONGEST_ANSWER), value=tokenizer.pad_token_id)
    every = torch.arange(len(rows))
    for k in range(LONGEST_ANSWER):
        # Rows end at different places and attention is causal, so what stands behind a row's end is not seen.
        states, _ = answer_states(learner.net, encoded, ids[:, : int(lengths.max()) + k])
        ids[every, lengths + k] = learner.net.vlm.lm_head(states[every, lengths + k - 1]).argmax(-1)
    said = [ids[i, n : n + LONGEST_ANSWER] for i, n in enumerate(lengths.tolist())]
    numbers = [_NUMBER.match(tokenizer.decode(row, skip_special_tokens=False)) for row in said]
    return np.array([float(found.group()) if found else np.nan for found in numbers])


def ratio_within(guess: np.ndarray, truth: np.ndarray, factor: float = 1.25) -> np.ndarray:
    """Whether a guess is within a factor of the truth; what wasn't answered isn't."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.maximum(guess / truth, truth / guess) < factor


@torch.no_grad()
def map_delta1(net: DemoNet, scenes: Scenes) -> list[float]:
    """δ1 of the head's map over all labelled pixels, for each scene."""
    right = []
    for start in range(0, len(scenes), 25):
        truth = torch.from_numpy(scenes.depths[start : start + 25].astype(np.float32)).log()
        said = net.log_depth(net.encode(torch.from_numpy(scenes.images[start : start + 25]))).float()
        within = (said - truth).abs() < math.log(1.25)
        right += (within.sum((1, 2)) / truth.isfinite().sum((1, 2))).tolist()
    return right
