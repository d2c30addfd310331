"""The text stages: the network that sees depth learns to say it, asked by text coordinates or by a drawn arrow.

Only the answer is supervised (DepthLM's scripts supervise the question and a spurious header too). All questions about
an image share its prefix, exactly as at inference: the prefix runs once, each question is a row that attends to it.
Depth maps stay in the loss, so that what stage 1 taught is not lost.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from depthlm_training.demo.bank import MONITOR, SceneBank
from depthlm_training.demo.dense import dense_delta1, dense_loss
from depthlm_training.demo.dialogue import IGNORED, LEAST_M, Asked, Dialogue, Rows, ask, pick_points, questions_about
from depthlm_training.demo.model import DemoNet, Encoded
from depthlm_training.demo.optim import Optimizer, Schedule, load_state, save_state
from depthlm_training.demo.stages import TextStage
from depthlm_training.raycast import FAR_M


def answer_states(
    net: DemoNet, encoded: Encoded, ids: torch.Tensor, shared: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """States (R, L, C) of rows of ids, last and after the second layer; row i * N + j follows the prefix of image i.

    Args:
        encoded: the images; its cache grows.
        ids: (R, L) rows, an equal number about each image.
        shared: ids between image and rows, the same for all, run once for each image.
    """
    cache, images = encoded.cache, encoded.states.shape[0]
    start = encoded.next_position + len(shared)
    if shared:
        positions = torch.arange(encoded.next_position, start).expand(3, images, -1)
        net.vlm.model.language_model(
            input_ids=torch.tensor(shared).expand(images, -1),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
    if ids.shape[0] > images:
        cache.batch_repeat_interleave(ids.shape[0] // images)
    positions = (start + torch.arange(ids.shape[1])).expand(3, ids.shape[0], -1)
    out = net.vlm.model.language_model(
        input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, output_hidden_states=True
    )
    return out.last_hidden_state, out.hidden_states[2]


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
    places: torch.Tensor | None,
    stage: TextStage,
) -> torch.Tensor:
    """Cross entropy of the answers' tokens, plus the helpers' errors.

    Args:
        rows: what `Dialogue.rows` made of the questions and `target_m`.
        target_m: (P,) depths that the answers state.
        places: (P, 2) where the points lie, for the location helper; None leaves it out.
    """
    states, early = answer_states(net, encoded, rows.ids, rows.shared)
    supervised = rows.labels[:, 1:] != IGNORED
    logits = net.vlm.lm_head(states[:, :-1][supervised]).float()
    loss = nn.functional.cross_entropy(logits, rows.labels[:, 1:][supervised])
    about_to_say = rows.row, rows.before
    error = helpers.regressor(states[about_to_say]).float()[:, 0] - torch.from_numpy(target_m).float().log()
    loss = loss + stage.regression_weight * error.abs().mean()
    if places is not None:
        loss = loss + stage.location_weight * (helpers.locator(early[about_to_say]).float() - places).abs().mean()
    return loss


def drill_loss(
    net: DemoNet, helpers: Helpers, dialogue: Dialogue, stage: TextStage, asked: Asked, rng: np.random.Generator
) -> torch.Tensor:
    """Error of the places that random questions name, read where the last coordinate of each ends."""
    ids, row, ends, shares = dialogue.drill(stage.drill, asked.dialect, asked.each, rng)
    model = net.vlm.model.language_model
    states = model.embed_tokens(ids)
    angles = model.rotary_emb(states, torch.arange(ids.shape[1]).expand(3, len(ids), -1))
    for layer in model.layers[:2]:
        states = layer(states, attention_mask=None, position_embeddings=angles)
    return (helpers.locator(states[row, ends]).float() - shares).abs().mean()


@torch.no_grad()
def text_delta1(
    net: DemoNet, dialogue: Dialogue, bank: SceneBank, dialect: str, scenes: int = 128, each: int = 4
) -> float:
    """δ1 of greedily said first numbers on monitor scenes; a row that says no number counts as wrong."""
    rng = np.random.default_rng(5)
    good = total = 0
    each = 1 if dialect == "marker" else each
    for start in range(len(bank) - MONITOR, len(bank) - MONITOR + scenes, 8):
        images, questions, truth = [], [], []
        for image, depth in (bank[i] for i in range(start, start + 8)):
            image, depth = image[:, 16:272], depth[:, 16:272].astype(np.float32)
            points = pick_points(depth, each, rng, margin=5)
            shown, texts = questions_about(image, points, dialect)
            images.append(shown)
            questions += texts
            truth.append(depth[points[:, 1], points[:, 0]])
        with torch.autocast("cpu", torch.bfloat16):
            opening = [] if dialect == "compact" else dialogue.opening
            said = _say(net, dialogue, net.encode(torch.from_numpy(np.stack(images))), questions, opening)
        ratio = said / np.concatenate(truth)
        good += int((np.maximum(ratio, 1 / ratio) < 1.25).sum())
        total += len(ratio)
    return good / total


def _say(net: DemoNet, dialogue: Dialogue, encoded: Encoded, questions: list[str], opening: list[int]) -> np.ndarray:
    texts = [""] * len(questions)
    rows = [prompt + opening for prompt in dialogue.prompts(questions)]
    encoded.cache.batch_repeat_interleave(len(questions) // encoded.states.shape[0])
    names = dialogue.digits | {dialogue.tokenizer.convert_tokens_to_ids("."): "."}
    for _ in range(5):
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(r) for r in rows], batch_first=True, padding_value=dialogue.tokenizer.pad_token_id
        )
        positions = (encoded.next_position + torch.arange(ids.shape[1])).expand(3, ids.shape[0], -1)
        states = net.vlm.model.language_model(
            input_ids=ids, position_ids=positions, past_key_values=encoded.cache, use_cache=True
        ).last_hidden_state
        encoded.cache.crop(-ids.shape[1])
        last = torch.tensor([len(r) - 1 for r in rows])
        for i, token in enumerate(net.vlm.lm_head(states[torch.arange(len(rows)), last]).argmax(-1).tolist()):
            rows[i].append(token)
            texts[i] += names.get(token, " ")
    numbers = [t.split(" ")[0] for t in texts]
    return np.array([float(n) if n.replace(".", "", 1).isdigit() else np.nan for n in numbers])


def train_text(
    net: DemoNet,
    tokenizer: PreTrainedTokenizerFast,
    bank: SceneBank,
    stage: TextStage,
    run: Path,
    seed: int,
    start: Path | None = None,
) -> None:
    """Runs or resumes a text stage; `run/NAME.safetensors` holds its state, `run/NAME.jsonl` its course.

    Args:
        start: state of an earlier text stage to begin with.
    """
    state = run / f"{stage.name}.safetensors"
    helpers = Helpers(net.size.hidden)
    whole = nn.ModuleDict({"net": net, "helpers": helpers})
    optimizer = Optimizer(whole, Schedule(stage.steps, decay=stage.decay), stage.muon_lr, stage.adamw_lr)
    if start is not None and not state.exists():
        load_state(start, whole)
    done = load_state(state, whole, optimizer) if state.exists() else 0
    dialogue = Dialogue(tokenizer)
    run.mkdir(parents=True, exist_ok=True)
    losses, began = [], time.time()
    with (
        (run / f"{stage.name}.jsonl").open("a") as log,
        tqdm(total=stage.steps, initial=done, desc=stage.name, mininterval=5) as bar,
    ):
        for step in range(done, stage.steps):
            asked = ask(bank, stage, seed, step)
            guided = step >= stage.guided_from
            with torch.autocast("cpu", torch.bfloat16):
                encoded = net.encode(asked.images)
                dense = dense_loss(net, encoded, asked.depths, stage.probe_weight)
                target_m = asked.read(asked.depths)
                if guided:
                    with torch.no_grad():
                        target_m = asked.read(net.log_depth(encoded).float().exp()).clip(LEAST_M, FAR_M)
                whole_answers = step >= stage.whole_after * stage.steps
                rows = dialogue.rows(asked.questions, target_m, whole_answers, asked.dialect, asked.each)
                loss = text_loss(net, helpers, encoded, rows, target_m, asked.places if guided else None, stage)
                if step >= stage.drill_from:
                    rng = np.random.default_rng([seed, 13, step])
                    loss = loss + stage.location_weight * drill_loss(net, helpers, dialogue, stage, asked, rng)
            (loss + stage.dense_weight * dense).backward()
            optimizer.step(step)
            losses.append(loss.item())
            bar.update()
            if (step + 1) % stage.save_every == 0 or step + 1 == stage.steps:
                save_state(state, whole, optimizer, step + 1)
                row = {
                    "step": step + 1,
                    "loss": float(np.mean(losses)),
                    "seconds": time.time() - began,
                    **{name: text_delta1(net, dialogue, bank, name) for name in sorted(set(stage.turns))},
                    "dense": dense_delta1(net, bank),
                }
                losses.clear()
                log.write(json.dumps(row) + "\n")
                log.flush()
                shown = ("loss", "dense", *stage.turns)
                bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k in shown})
