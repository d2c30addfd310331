"""Questions about rendered scenes, and the rows of token ids that they and their answers become."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from depthlm_ros.markers import draw_arrow
from depthlm_ros.prompts import (
    COMPACT_RANGE,
    COORDINATE_RANGE,
    answer_text,
    compact_answer,
    compact_questions,
    coordinates_question,
    marker_question,
    normalise_pixel,
)
from depthlm_training.demo.bank import Batch
from depthlm_training.demo.stages import TextStage

IGNORED = -100
LEAST_M = 0.05  # nearer than any scene places a camera; keeps "0.00" out of the answers


@dataclass(frozen=True)
class Rows:
    """R questions with their answers, about P points in all.

    Attributes:
        shared: ids that stand before every row, after the image; run once for each image.
        ids: (R, L) what follows, padded on the right.
        labels: (R, L) the same where an answer stands, `IGNORED` elsewhere.
        row: (P,) the row that answers a point.
        before: (P,) the place in it of the state that is about to say the point's number.
    """

    shared: list[int]
    ids: torch.Tensor
    labels: torch.Tensor
    row: torch.Tensor
    before: torch.Tensor


class Dialogue:
    """Turns questions and depths into rows of token ids, with the labels beside them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.opening = tokenizer(answer_text(1.0).partition("1.00")[0]).input_ids
        # The token that ends the second coordinate: the first to see both numbers whole.
        self.closing = tokenizer(coordinates_question(1, 1).partition(", 1")[2]).input_ids[0]
        self.digits = {token: str(d) for d, token in enumerate(tokenizer.convert_tokens_to_ids(list("0123456789")))}
        # All of a compact question but its pixels, and what separates two of its numbers.
        constant = self.prompt(compact_questions([(0, 0)])[0]).partition("000,000")[0]
        self.constant = tokenizer(constant).input_ids
        self.pixel = len(tokenizer("000,000").input_ids)
        self.between = tokenizer(compact_answer([1, 1])).input_ids[4]

    def prompt(self, question: str) -> str:
        """What follows the image in the chat template, up to where the answer begins."""
        return f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"

    def prompts(self, questions: list[str]) -> list[list[int]]:
        """Their ids."""
        return self.tokenizer([self.prompt(question) for question in questions]).input_ids

    def rows(self, questions: list[str], depths: np.ndarray, whole: bool, dialect: str, each: int = 1) -> Rows:
        """Builds rows.

        Args:
            questions: R texts of one dialect.
            depths: (R * each,) metres to answer with.
            whole: supervise answers to their end, and not to their first number only; always so where the answer is
                nothing but numbers.
            dialect: of the questions.
            each: points a question.
        """
        compact = dialect == "compact"
        if compact:
            texts = [compact_answer(depths[i : i + each].tolist()) for i in range(0, len(depths), each)]
        else:
            texts = [answer_text(float(d)) for d in depths]
        if whole or compact:
            texts = [text + "<|im_end|>" for text in texts]
        else:
            texts = [text.partition(" meters")[0] for text in texts]
        asked, said = self.prompts(questions), self.tokenizer(texts).input_ids
        shared = self.constant if compact else []
        asked = [a[len(shared) :] for a in asked]
        length = max(len(a) + len(s) for a, s in zip(asked, said, strict=True))
        ids = torch.full((len(questions), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(questions), length), IGNORED)
        before = []
        for i, (a, s) in enumerate(zip(asked, said, strict=True)):
            ids[i, : len(a) + len(s)] = torch.tensor(a + s)
            labels[i, len(a) : len(a) + len(s)] = torch.tensor(s)
            if compact:
                before += [len(a) - 1, *(len(a) + at for at, token in enumerate(s) if token == self.between)]
            else:
                before.append(len(a) + len(self.opening) - 1)
        return Rows(shared, ids, labels, torch.arange(len(depths)) // each, torch.tensor(before))

    def drill(
        self, count: int, dialect: str, each: int, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random questions without an image, in the coordinates dialect unless `dialect` is "compact".

        Returns:
            (R, L) ids padded on the right; (P,) the row of a point; (P,) where in it the point's last coordinate has
            just ended; (P, 2) the point as shares of width and height.
        """
        if dialect == "compact":
            said = rng.integers(0, COMPACT_RANGE, (count // each * each, 2))
            asked = self.prompts(compact_questions(said.tolist(), each))
            ends = [len(self.constant) + self.pixel + i * (self.pixel + 1) for i in range(each)] * len(asked)
            shares = said / COMPACT_RANGE
            asked = [ids[: ends[-1] + 1] for ids in asked]
        else:
            each = 1
            said = rng.integers(0, COORDINATE_RANGE, (count, 2))
            asked = self.prompts([coordinates_question(x, y) for x, y in said.tolist()])
            ends = [ids.index(self.closing) for ids in asked]
            shares = said / COORDINATE_RANGE
            asked = [ids[: end + 1] for ids, end in zip(asked, ends, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(a) for a in asked], batch_first=True, padding_value=self.tokenizer.pad_token_id
        )
        return ids, torch.arange(len(said)) // each, torch.tensor(ends), torch.from_numpy(shares).float()


def pick_points(depths: np.ndarray, count: int, rng: np.random.Generator, margin: int = 0) -> np.ndarray:
    """(count, 2) pixels `(u, v)` with ground truth, uniformly; with replacement where there are few.

    Args:
        depths: (H, W) metres, NaN where unknown.
        margin: pixels at the border that are left out.
    """
    height, width = depths.shape
    inner = depths[margin : height - margin, margin : width - margin]
    places = np.flatnonzero(inner > LEAST_M)
    if len(places) == 0:
        return np.empty((0, 2), int)
    v, u = np.divmod(rng.choice(places, count, replace=len(places) < count), inner.shape[1])
    return np.stack([u, v], 1) + margin


def questions_about(image: np.ndarray, points: np.ndarray, dialect: str, each: int = 1) -> tuple[np.ndarray, list[str]]:
    """The image as it is shown, and the questions about points of it; one point in the marker dialect."""
    if dialect == "marker":
        return draw_arrow(image, tuple(points[0])), [marker_question()]
    height, width = image.shape[:2]
    if dialect == "compact":
        return image, compact_questions(normalise_pixel(points, width, height, COMPACT_RANGE).tolist(), each)
    return image, [coordinates_question(x, y) for x, y in normalise_pixel(points, width, height).tolist()]


@dataclass
class Asked:
    """Questions of one dialect about some images of a batch: P points, an equal number about each of B images.

    Attributes:
        dialect: of all questions.
        each: points a question.
        images: (B,) which images of the batch.
        questions: P / each texts.
        points: (P, 2) `(u, v)`.
        places: (P, 2) the points as shares of width and height.
    """

    dialect: str
    each: int
    images: np.ndarray
    questions: list[str]
    points: np.ndarray
    places: torch.Tensor

    def read(self, depths: torch.Tensor) -> np.ndarray:
        """(P,) values at the points of the maps (B, H, W) of these images."""
        image = np.repeat(np.arange(len(self.images)), len(self.points) // len(self.images))
        return depths.float().cpu().numpy()[image, self.points[:, 1], self.points[:, 0]]


def _asked(batch: Batch, dialect: str, each: int, images: list[int], points: list[np.ndarray]) -> list[Asked]:
    if not images:
        return []
    height, width = batch.depths.shape[1:]
    pairs = zip(images, points, strict=True)
    if dialect == "marker":
        questions = [marker_question()] * len(images)
    else:
        questions = [q for i, p in pairs for q in questions_about(batch.images[i], p, dialect, each)[1]]
    whole = np.concatenate(points)
    places = torch.from_numpy(whole).float() / torch.tensor([width, height])
    return [Asked(dialect, each, np.array(images), questions, whole, places)]


def ask(batch: Batch, stage: TextStage, seed: int, step: int) -> list[Asked]:
    """What is asked about a step's batch: the same however often the run was interrupted."""
    rng = np.random.default_rng([seed, 11, step])
    dialect = stage.turns[step % len(stage.turns)]
    each = int(rng.choice(stage.each)) if dialect == "compact" else 1
    count = stage.points if dialect == "compact" else stage.questions
    marked, plain, points = [], [], []
    for i, ((u, v), depths) in enumerate(zip(batch.marks[:, 0], batch.depths, strict=True)):
        if u >= 0:
            if depths[v, u] > LEAST_M:
                marked.append(i)
        elif len(plain) < stage.images and len(picked := pick_points(depths, count, rng)):
            plain.append(i)
            points.append(picked)
    return [
        *_asked(batch, "marker", 1, marked, [batch.marks[i] for i in marked]),
        *_asked(batch, dialect, each, plain, points),
    ]
