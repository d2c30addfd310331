"""The text stage: the network that sees depth learns to say it, asked by text coordinates or by a drawn arrow.

Only the answer is supervised (DepthLM's scripts supervise the question and a spurious header too). All questions about
an image share its prefix, exactly as at inference: the prefix runs once, each question is a row that attends to it.
Depth maps stay in the loss, so that what stage 1 taught is not lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from depthlm_ros.markers import MARGIN_PX
from depthlm_training.demo.bank import MONITOR, Batch, SceneBank, make_batch
from depthlm_training.demo.decoder import read
from depthlm_training.demo.dense import dense_delta1, finder_error_px, monitor_scenes, see
from depthlm_training.demo.dialogue import IGNORED, LEAST_M, Asked, Dialogue, Rows, ask, pick_points, questions_about
from depthlm_training.demo.loop import run_stage
from depthlm_training.demo.model import DemoNet, Encoded
from depthlm_training.demo.stages import TextStage
from depthlm_training.raycast import FAR_M


def answer_states(
    net: DemoNet, encoded: Encoded, ids: torch.Tensor, shared: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """States (R, L, C) of rows of ids, last and after the second layer; row i * N + j follows the prefix of image i.

    Args:
        ids: (R, L) rows, an equal number about each image.
        shared: ids between image and rows, the same for all, run once for each image.
    """
    model, past = net.vlm.model.language_model, encoded.past
    images, device = encoded.states.shape[0], encoded.states.device
    start = encoded.next_position + len(shared)
    if shared:
        constant = model.embed_tokens(torch.tensor(shared, device=device)).expand(images, -1, -1)
        past = read(model, constant, torch.arange(encoded.next_position, start, device=device).expand(3, -1), past).past
    positions = torch.arange(start, start + ids.shape[1], device=device).expand(3, -1)
    seen = read(model, model.embed_tokens(ids.to(device)), positions, past)
    return seen.states, seen.early


class Helpers(nn.Module):
    """Linear read-outs that only training uses; never saved with the model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.regressor = nn.Linear(width, 1)
        self.locator = nn.Linear(width, 2)


def text_loss(
    net: DemoNet,
    helpers: Helpers,
    encoded: Encoded,
    rows: Rows,
    target_m: np.ndarray,
    places: torch.Tensor,
    stage: TextStage,
) -> torch.Tensor:
    """Cross entropy of the answers' tokens, plus the helpers' errors.

    Args:
        rows: what `Dialogue.rows` made of the questions and `target_m`.
        target_m: (P,) depths that the answers state.
        places: (P, 2) where the points lie, for the location helper.
    """
    states, early = answer_states(net, encoded, rows.ids, rows.shared)
    labels = rows.labels[:, 1:].to(states.device)
    supervised = labels != IGNORED
    logits = net.vlm.lm_head(states[:, :-1][supervised]).float()
    loss = nn.functional.cross_entropy(logits, labels[supervised])
    about_to_say = rows.row.to(states.device), rows.before.to(states.device)
    said = torch.from_numpy(target_m).float().log().to(states.device)
    error = (helpers.regressor(states[about_to_say]).float()[:, 0] - said).abs().mean()
    off = location_loss(helpers.locator(early[about_to_say]), places, stage)
    return loss + stage.regression_weight * error + stage.location_weight * off


def location_loss(found: torch.Tensor, places: torch.Tensor, stage: TextStage) -> torch.Tensor:
    """Mean error of found places (P, 2), shares of the image's sides: absolute where far off, squared where near."""
    return nn.functional.smooth_l1_loss(found.float(), places.to(found.device), beta=stage.location_beta)


def drill_loss(
    net: DemoNet, helpers: Helpers, dialogue: Dialogue, stage: TextStage, asked: Asked, rng: np.random.Generator
) -> torch.Tensor:
    """Error of the places that random questions name, read where the last coordinate of each ends."""
    ids, row, ends, shares = (x.to(net.device) for x in dialogue.drill(stage.drill, asked.dialect, asked.each, rng))
    model = net.vlm.model.language_model
    positions = torch.arange(ids.shape[1], device=net.device).expand(3, -1)
    states = read(model, model.embed_tokens(ids), positions, layers=2).states
    return location_loss(helpers.locator(states[row, ends]), shares, stage)


@torch.no_grad()
def text_delta1(
    net: DemoNet, dialogue: Dialogue, bank: SceneBank, dialect: str, scenes: int = MONITOR, each: int = 4
) -> float:
    """δ1 of greedily said first numbers on monitor scenes; a row that says no number counts as wrong."""
    rng = np.random.default_rng(5)
    good = total = 0
    each = 1 if dialect == "marker" else each
    opening = [] if dialect == "compact" else dialogue.opening
    for images, depths in monitor_scenes(bank, scenes):
        shown, questions, truth = [], [], []
        for image, depth in zip(images, depths, strict=True):
            points = pick_points(depth, each, rng, margin=MARGIN_PX)
            image, texts = questions_about(image, points, dialect)
            shown.append(image)
            questions += texts
            truth.append(depth[points[:, 1], points[:, 0]])
        with torch.autocast(net.device.type, torch.bfloat16):
            encoded = net.encode(torch.from_numpy(np.stack(shown)).to(net.device))
            said = _say(net, dialogue, encoded, questions, opening)
        ratio = said / np.concatenate(truth)
        good += int((np.maximum(ratio, 1 / ratio) < 1.25).sum())
        total += len(ratio)
    return good / total


def _say(net: DemoNet, dialogue: Dialogue, encoded: Encoded, questions: list[str], opening: list[int]) -> np.ndarray:
    texts = [""] * len(questions)
    rows = [prompt + opening for prompt in dialogue.prompts(questions)]
    names = dialogue.digits | {dialogue.tokenizer.convert_tokens_to_ids("."): "."}
    for _ in range(5):
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(r) for r in rows], batch_first=True, padding_value=dialogue.tokenizer.pad_token_id
        )
        states, _ = answer_states(net, encoded, ids)
        last = [len(r) - 1 for r in rows]
        for i, token in enumerate(net.vlm.lm_head(states[range(len(rows)), last]).argmax(-1).tolist()):
            rows[i].append(token)
            texts[i] += names.get(token, " ")
    numbers = [t.split(" ")[0] for t in texts]
    return np.array([float(n) if n.replace(".", "", 1).isdigit() else np.nan for n in numbers])


def train_text(
    net: DemoNet,
    helpers: Helpers,
    tokenizer: PreTrainedTokenizerFast,
    bank: SceneBank,
    stage: TextStage,
    run: Path,
    seed: int,
    workers: int = 0,
) -> None:
    """Runs or resumes a stage with questions."""
    dialogue = Dialogue(tokenizer)

    def make(step: int) -> tuple[Batch, list[Asked]]:
        batch = make_batch(bank, stage, seed + 1, step)
        return batch, ask(batch, stage, seed, step)

    def loss(made: tuple[Batch, list[Asked]], step: int) -> torch.Tensor:
        batch, groups = made
        with torch.autocast(net.device.type, torch.bfloat16):
            encoded, _, total = see(net, batch, stage)
            for asked in groups:
                part = encoded.part(torch.from_numpy(asked.images).to(net.device))
                with torch.no_grad():
                    target_m = asked.read(net.log_depth(part).float().exp()).clip(LEAST_M, FAR_M)
                whole = step % stage.whole_every == 0
                rows = dialogue.rows(asked.questions, target_m, whole, asked.dialect, asked.each)
                total = total + text_loss(net, helpers, part, rows, target_m, asked.places, stage)
            rng = np.random.default_rng([seed, 13, step])
            return total + stage.location_weight * drill_loss(net, helpers, dialogue, stage, groups[-1], rng)

    def measure() -> dict[str, float]:
        dialects = sorted({"marker", *stage.turns})
        return {"dense": dense_delta1(net, bank), "finder_px": finder_error_px(net, bank)} | {
            name: text_delta1(net, dialogue, bank, name) for name in dialects
        }

    run_stage(stage, nn.ModuleDict({"net": net, "helpers": helpers}), make, loss, measure, run, workers)
