"""Stage 2: the network that sees depth learns to say it, asked by text coordinates or by a drawn arrow.

Only the answer is supervised (DepthLM's scripts supervise the question and a spurious header too). All questions about
an image share its prefix, exactly as at inference: the prefix runs once, each question is a row that attends to it.
Depth maps stay in the loss, so that what stage 1 taught is not lost.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from depthlm_ros.markers import draw_arrow, drawable
from depthlm_ros.prompts import COORDINATE_RANGE, answer_text, coordinates_question, marker_question, normalise_pixel
from depthlm_training.data import ALL_CANVASES, CANVASES, MONITOR, Canvases, SceneBank, make_batch
from depthlm_training.dense import dense_delta1, dense_loss
from depthlm_training.model import DemoNet, Encoded
from depthlm_training.optim import Optimizer, Schedule, load_state, save_state
from depthlm_training.raycast import FAR_M

IGNORED = -100
_LEAST_M = 0.05  # nearer than any scene places a camera; keeps "0.00" out of the answers


@dataclass(frozen=True)
class TextStage:
    """What stage 2 is run with.

    Attributes:
        name: of the files that hold its state and its course.
        canvases: sizes of the images, with their shares.
        narrower: share of the images that don't fill their canvas.
        decay: share of the steps over which the learning rates go down.
        images: images of a coordinates step.
        questions: questions about each of them.
        marked: marked images of a marker step, one question each.
        marker_every: every how many steps a marker step comes.
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
    images: int = 6
    questions: int = 16
    marked: int = 16
    marker_every: int = 3
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
    marker_every=2,
    whole_after=0,
    muon_lr=1.5e-3,
    adamw_lr=6e-4,
    save_every=100,
    canvases=ALL_CANVASES,
    narrower=0.7,
    decay=0.9,
)


class Dialogue:
    """Turns questions and depths into rows of token ids, with the labels beside them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.opening = tokenizer(answer_text(1.0).partition("1.00")[0]).input_ids
        # The token that ends the second coordinate: the first to see both numbers whole.
        self.closing = tokenizer(coordinates_question(1, 1).partition(", 1")[2]).input_ids[0]
        self.digits = {token: str(d) for d, token in enumerate(tokenizer.convert_tokens_to_ids(list("0123456789")))}

    def prompt(self, question: str) -> str:
        """What follows the image in the chat template, up to where the answer begins."""
        return f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"

    def rows(
        self, questions: list[str], depths: np.ndarray, whole: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids and labels (R, L), right-padded, and (R,) the place of the state that is about to say the number."""
        texts = [answer_text(float(d)) for d in depths]
        if not whole:
            texts = [text.partition(" meters")[0] for text in texts]
        else:
            texts = [text + "<|im_end|>" for text in texts]
        asked = self.tokenizer([self.prompt(q) for q in questions]).input_ids
        said = self.tokenizer(texts).input_ids
        length = max(len(a) + len(s) for a, s in zip(asked, said, strict=True))
        ids = torch.full((len(questions), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(questions), length), IGNORED)
        before = torch.empty(len(questions), dtype=torch.long)
        for i, (a, s) in enumerate(zip(asked, said, strict=True)):
            ids[i, : len(a) + len(s)] = torch.tensor(a + s)
            labels[i, len(a) : len(a) + len(s)] = torch.tensor(s)
            before[i] = len(a) + len(self.opening) - 1
        return ids, labels, before


def answer_states(net: DemoNet, encoded: Encoded, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States (R, L, C) of rows of ids, last and after the second layer; row i * N + j follows the prefix of image i."""
    repeats = ids.shape[0] // encoded.states.shape[0]
    cache = encoded.cache
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
    positions = (encoded.next_position + torch.arange(ids.shape[1])).expand(3, ids.shape[0], -1)
    out = net.vlm.model.language_model(
        input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, output_hidden_states=True
    )
    return out.last_hidden_state, out.hidden_states[2]


def pick_points(depths: np.ndarray, count: int, rng: np.random.Generator, margin: int = 0) -> np.ndarray:
    """(count, 2) pixels `(u, v)` with ground truth, uniformly; with replacement where there are few."""
    known = np.isfinite(depths) & (depths > _LEAST_M)
    if margin:
        v, u = np.mgrid[: depths.shape[0], : depths.shape[1]]
        known &= drawable(np.stack([u.ravel(), v.ravel()], 1), depths.shape[1], depths.shape[0]).reshape(depths.shape)
    places = np.flatnonzero(known)
    if len(places) == 0:
        return np.empty((0, 2), int)
    v, u = np.divmod(rng.choice(places, count, replace=len(places) < count), depths.shape[1])
    return np.stack([u, v], 1)


@dataclass
class Asked:
    """A training step: P points, an equal number about each of B images.

    Attributes:
        images: (B, H, W, 3) uint8.
        depths: (B, H, W) metres, NaN where unknown.
        questions: P texts.
        image_of: (P,) which image.
        points: (P, 2) `(u, v)`.
    """

    images: torch.Tensor
    depths: torch.Tensor
    questions: list[str]
    image_of: np.ndarray
    points: np.ndarray

    def read(self, depth: torch.Tensor) -> np.ndarray:
        """(P,) values of a (B, H, W) map at the points."""
        return depth[self.image_of, self.points[:, 1], self.points[:, 0]].float().numpy()

    @property
    def places(self) -> torch.Tensor:
        """(P, 2) the points as shares of width and height."""
        height, width = self.depths.shape[1:]
        return torch.from_numpy(self.points).float() / torch.tensor([width, height])


def ask(bank: SceneBank, stage: TextStage, seed: int, step: int) -> Asked:
    """What is asked in a step: the same however often the run was interrupted."""
    rng = np.random.default_rng([seed, 11, step])
    marker = step % stage.marker_every == stage.marker_every - 1
    size = stage.marked if marker else stage.images
    batch = make_batch(bank, size, seed + 1, step, stage.canvases, stage.narrower)
    images, depths, questions, asked = [], [], [], []
    for image, depth in zip(batch.images, batch.depths, strict=True):
        points = pick_points(depth, 1 if marker else stage.questions, rng, margin=5 if marker else 0)
        if len(points) == 0:
            continue
        if marker:
            image = draw_arrow(image, tuple(points[0]))
            questions.append(marker_question())
        else:
            said = normalise_pixel(points, image.shape[1], image.shape[0])
            questions += [coordinates_question(x, y) for x, y in said.tolist()]
        images.append(image)
        depths.append(depth)
        asked.append(points)
    return Asked(
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.stack(depths)),
        questions,
        np.repeat(np.arange(len(images)), len(asked[0])),
        np.concatenate(asked),
    )


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
    rows,
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
    ids, labels, before = rows
    states, early = answer_states(net, encoded, ids)
    supervised = labels[:, 1:] != IGNORED
    logits = net.vlm.lm_head(states[:, :-1][supervised]).float()
    loss = nn.functional.cross_entropy(logits, labels[:, 1:][supervised])
    about_to_say = torch.arange(len(ids)), before
    error = helpers.regressor(states[about_to_say]).float()[:, 0] - torch.from_numpy(target_m).float().log()
    loss = loss + stage.regression_weight * error.abs().mean()
    if places is not None:
        loss = loss + stage.location_weight * (helpers.locator(early[about_to_say]).float() - places).abs().mean()
    return loss


def drill_loss(
    net: DemoNet, helpers: Helpers, dialogue: Dialogue, count: int, rng: np.random.Generator
) -> torch.Tensor:
    """Error of the places that `count` random questions name, read where their second coordinate ends."""
    said = rng.integers(0, COORDINATE_RANGE, (count, 2))
    asked = dialogue.tokenizer([dialogue.prompt(coordinates_question(x, y)) for x, y in said.tolist()]).input_ids
    asked = [torch.tensor(ids[: ids.index(dialogue.closing) + 1]) for ids in asked]
    ids = nn.utils.rnn.pad_sequence(asked, batch_first=True, padding_value=dialogue.tokenizer.pad_token_id)
    model = net.vlm.model.language_model
    states = model.embed_tokens(ids)
    angles = model.rotary_emb(states, torch.arange(ids.shape[1]).expand(3, count, -1))
    for layer in model.layers[:2]:
        states = layer(states, attention_mask=None, position_embeddings=angles)
    ends = states[torch.arange(count), torch.tensor([len(a) - 1 for a in asked])]
    return (helpers.locator(ends).float() - torch.from_numpy(said).float() / COORDINATE_RANGE).abs().mean()


@torch.no_grad()
def text_delta1(
    net: DemoNet, dialogue: Dialogue, bank: SceneBank, marker: bool, scenes: int = 128, each: int = 4
) -> float:
    """δ1 of greedily said first numbers on monitor scenes; a row that says no number counts as wrong."""
    rng = np.random.default_rng(5)
    good = total = 0
    each = 1 if marker else each
    for start in range(len(bank) - MONITOR, len(bank) - MONITOR + scenes, 8):
        images, questions, truth = [], [], []
        for image, depth in (bank[i] for i in range(start, start + 8)):
            image, depth = image[:, 16:272], depth[:, 16:272].astype(np.float32)
            points = pick_points(depth, each, rng, margin=5)
            images.append(draw_arrow(image, tuple(points[0])) if marker else image)
            questions += (
                [marker_question()]
                if marker
                else [coordinates_question(x, y) for x, y in normalise_pixel(points, 256, 192).tolist()]
            )
            truth.append(depth[points[:, 1], points[:, 0]])
        with torch.autocast("cpu", torch.bfloat16):
            said = _say(net, dialogue, net.encode(torch.from_numpy(np.stack(images))), questions)
        ratio = said / np.concatenate(truth)
        good += int((np.maximum(ratio, 1 / ratio) < 1.25).sum())
        total += len(ratio)
    return good / total


def _say(net: DemoNet, dialogue: Dialogue, encoded: Encoded, questions: list[str]) -> np.ndarray:
    prompts = dialogue.tokenizer([dialogue.prompt(q) for q in questions]).input_ids
    texts = [""] * len(questions)
    rows = [p + dialogue.opening for p in prompts]
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
                        target_m = asked.read(net.log_depth(encoded).float().exp()).clip(_LEAST_M, FAR_M)
                rows = dialogue.rows(asked.questions, target_m, whole=step >= stage.whole_after * stage.steps)
                loss = text_loss(net, helpers, encoded, rows, target_m, asked.places if guided else None, stage)
                if step >= stage.drill_from:
                    rng = np.random.default_rng([seed, 13, step])
                    loss = loss + stage.location_weight * drill_loss(net, helpers, dialogue, stage.drill, rng)
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
                    "coordinates": text_delta1(net, dialogue, bank, marker=False),
                    "marker": text_delta1(net, dialogue, bank, marker=True),
                    "dense": dense_delta1(net, bank),
                }
                losses.clear()
                log.write(json.dumps(row) + "\n")
                log.flush()
                shown = ("loss", "coordinates", "marker", "dense")
                bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k in shown})
