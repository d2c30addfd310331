"""Questions about rendered scenes, and the rows of token ids that they and their answers become."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from depthlm_ros.markers import draw_arrow, drawable
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
from depthlm_training.demo.bank import SceneBank, make_batch
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
    """(count, 2) pixels `(u, v)` with ground truth, uniformly; with replacement where there are few."""
    known = np.isfinite(depths) & (depths > LEAST_M)
    if margin:
        v, u = np.mgrid[: depths.shape[0], : depths.shape[1]]
        known &= drawable(np.stack([u.ravel(), v.ravel()], 1), depths.shape[1], depths.shape[0]).reshape(depths.shape)
    places = np.flatnonzero(known)
    if len(places) == 0:
        return np.empty((0, 2), int)
    v, u = np.divmod(rng.choice(places, count, replace=len(places) < count), depths.shape[1])
    return np.stack([u, v], 1)


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
    """A training step: P points, an equal number about each of B images.

    Attributes:
        dialect: of all questions.
        each: points a question.
        images: (B, H, W, 3) uint8.
        depths: (B, H, W) metres, NaN where unknown.
        questions: P / each texts.
        image_of: (P,) which image.
        points: (P, 2) `(u, v)`.
    """

    dialect: str
    each: int
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
    dialect = stage.turns[step % len(stage.turns)]
    marker, each = dialect == "marker", 1
    count = 1 if marker else stage.questions
    if dialect == "compact":
        count, each = stage.points, int(rng.choice(stage.each))
    batch = make_batch(bank, stage.marked if marker else stage.images, seed + 1, step, stage.canvases, stage.narrower)
    images, depths, questions, asked = [], [], [], []
    for image, depth in zip(batch.images, batch.depths, strict=True):
        points = pick_points(depth, count, rng, margin=5 if marker else 0)
        if len(points) == 0:
            continue
        image, texts = questions_about(image, points, dialect, each)
        questions += texts
        images.append(image)
        depths.append(depth)
        asked.append(points)
    return Asked(
        dialect,
        each,
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.stack(depths)),
        questions,
        np.repeat(np.arange(len(images)), len(asked[0])),
        np.concatenate(asked),
    )
