"""Who is measured. Each answers the same questions about the same frame with the same weights.

    official   the published loops: for every point the image is prepared and encoded again, `generate` with batch 1
    batched    `generate` with the image repeated and prompts padded on the left, at its best batch size
    plain      our engine's reference path: prefix shared, transformers' own forward, no drafts
    ours       our engine
    served     any server with OpenAI's chat completions, by URL (`served.py`)

The published loops are those of DepthLM and VLM3: `processor(image, text)` and `model.generate` for each question.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from depthlm_ros.bench.subject import Subject
from depthlm_ros.engines.marked import Block
from depthlm_ros.errors import ConfigError, unknown_choice
from depthlm_ros.markers import MARGIN_PX, arrow_patch, paste
from depthlm_ros.prompts import (
    COMPACT_RANGE,
    compact_question,
    coordinates_question,
    dense_question,
    marker_question,
    normalise_pixel,
)
from depthlm_ros.sampling import sample_pixels

CONTENDERS = ("official", "batched", "plain", "ours")
BATCHES = (8, 32, 64)


@dataclass(frozen=True)
class Frame:
    """What is asked about one image.

    Attributes:
        dialect: how.
        image: (H, W, 3) uint8 RGB.
        questions: a text for each point.
        marked: the image with a marker for each point, in the marker dialect; else empty.
        expects: the sentence that trained models answer with.
        longest: most tokens of an answer.
        blocks: the markers alone, where each is pasted.
    """

    dialect: str
    image: np.ndarray
    questions: tuple[str, ...]
    marked: tuple[np.ndarray, ...]
    expects: str | None
    longest: int
    blocks: tuple[Block, ...] = ()

    def __len__(self) -> int:
        return len(self.questions)

    def some(self, count: int | None) -> Frame:
        """`count` of its points, evenly spread; all for None."""
        keep = self.rows(count)
        marked = tuple(self.marked[row] for row in keep) if self.marked else ()
        questions = tuple(self.questions[row] for row in keep)
        blocks = tuple(self.blocks[row] for row in keep) if self.blocks else ()
        return Frame(self.dialect, self.image, questions, marked, self.expects, self.longest, blocks)

    def rows(self, count: int | None) -> list[int]:
        """Which points `some` keeps."""
        if count is None or count >= len(self):
            return list(range(len(self)))
        return [int(at) for at in (np.arange(count) + 0.5) * len(self) / count]

    def shown(self, row: int) -> np.ndarray:
        """The image that a question goes with."""
        return self.marked[row] if self.marked else self.image


def make_frame(subject: Subject, dialect: str, image: np.ndarray, points: int) -> Frame:
    """Asks about points with even spacing, no two in one row or column as on a grid: their texts differ more.

    Args:
        subject: whose questions.
        dialect: "coordinates", "compact", "marker" or "dense".
        image: (H, W, 3) uint8 RGB.
        points: how many; one in the dense dialect.
    """
    longest = subject.card.max_new_tokens
    if dialect == "dense":
        return Frame(dialect, image, (dense_question(),), (), None, 0)
    height, width = image.shape[:2]
    margin = MARGIN_PX if dialect == "marker" else 0
    pixels = sample_pixels(width, height, points, "blue_noise", margin_px=margin)
    expects = subject.card.answer_template(dialect)
    marked: tuple[np.ndarray, ...] = ()
    blocks: tuple[Block, ...] = ()
    if dialect == "marker":
        questions = (marker_question(),) * points
        blocks = tuple(arrow_patch(image, (int(u), int(v))) for u, v in pixels)
        marked = tuple(paste(image, block) for block in blocks)
    elif dialect == "compact":
        questions = tuple(compact_question(*p) for p in normalise_pixel(pixels, width, height, COMPACT_RANGE).tolist())
    else:
        steps = subject.card.coordinate_range
        asked = normalise_pixel(pixels, width, height, steps).tolist()
        questions = tuple(coordinates_question(*p, steps) for p in asked)
    return Frame(dialect, image, questions, marked, expects, longest, blocks)


class Contender(Protocol):
    """Somebody who answers.

    Attributes:
        name: in the table.
        limit: most points asked in a round; None for all. Rates are per point, so a slow one needn't answer all.
        work: what it counts of its own about the last frame: tokens fed, drafts accepted, bytes kept.
    """

    name: str
    limit: int | None
    work: dict[str, int]

    def answer(self, frame: Frame) -> list[tuple[int, ...]]:
        """Token ids of each answer, end-of-sequence included; none in the dense dialect."""


def make_contender(name: str, subject: Subject, limit: int | None) -> Contender:
    """The contender of that name.

    Raises:
        ConfigError: there is none.
    """
    if name == "official":
        return Official(subject, limit)
    if name == "batched":
        return Batched(subject, limit)
    if name in ("plain", "ours"):
        return Ours(name, subject)
    raise ConfigError(unknown_choice("contender", name, CONTENDERS))


class Ours:
    """Our engine, on one of its two paths."""

    limit = None

    def __init__(self, name: str, subject: Subject) -> None:
        self.name = name
        self._engine = subject.engine if name == "ours" else subject.plain

    @property
    def work(self) -> dict[str, int]:
        """What the engine counted: tokens fed after the prefix, drafts, passes, bytes of keys and values."""
        return asdict(self._engine.work)

    def answer(self, frame: Frame) -> list[tuple[int, ...]]:
        engine, questions = self._engine, frame.questions
        # Every frame is a new one for it, as for the others.
        engine.forget()
        if frame.dialect == "dense":
            engine.depth_map(frame.image, questions[0])
            return []
        if frame.marked:
            answers = engine.answer_marked(
                frame.image, frame.blocks, questions, frame.longest, expects=frame.expects
            )
        else:
            answers = engine.answer_shared(frame.image, questions, frame.longest, expects=frame.expects)
        return [answer.token_ids for answer in answers]


class Stock:
    """transformers' own image processor, tokenizer and `generate`.

    Its own processor class needs torchvision for videos that nobody sends; this is the rest of it.
    """

    def __init__(self, subject: Subject) -> None:
        folder = subject.folder
        self._subject = subject
        self._pixtral = subject.config["model_type"] == "llava"
        kind = PixtralImageProcessorPil if self._pixtral else Qwen2VLImageProcessorPil
        self._image_processor = kind.from_pretrained(folder, local_files_only=True)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._ours = subject.engine.processor
        self._stops = subject.engine.model.generation_config.eos_token_id

    @property
    def stops(self) -> frozenset[int]:
        """What ends an answer."""
        return frozenset(self._stops if isinstance(self._stops, list) else [self._stops])

    def inputs(self, images: Sequence[np.ndarray], questions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Arguments of `generate` for a question about each image, padded on the left."""
        tensors = self._image_processor(images=list(images), return_tensors="pt", input_data_format="channels_last")
        tensors = {name: tensors[name] for name in self._image_processor.model_input_names}
        rows = self._ours.prompts(questions, self._grid_hw(tensors))
        longest = max(map(len, rows))
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        found = {"input_ids": ids, "attention_mask": mask} | tensors
        if not self._pixtral:
            found["mm_token_type_ids"] = (ids == self._ours.image_token_id).int()
        return {name: value.to(self._subject.device) for name, value in found.items()}

    def _grid_hw(self, tensors) -> tuple[int, int]:
        if self._pixtral:
            return tuple(int(n) // self._ours.patch_px for n in tensors["image_sizes"][0])
        return tuple(int(n) // self._image_processor.merge_size for n in tensors["image_grid_thw"][0][1:])

    @torch.inference_mode()
    def generate(self, images: Sequence[np.ndarray], questions: Sequence[str], longest: int, **options):
        """`model.generate`'s output, and the length of the prompt; options go to `generate`."""
        inputs = self.inputs(images, questions)
        model = self._subject.engine.model
        out = model.generate(**inputs, do_sample=False, use_cache=True, max_new_tokens=longest, **options)
        return out, inputs["input_ids"].shape[1]

    def answers(self, images: Sequence[np.ndarray], questions: Sequence[str], longest: int) -> list[tuple[int, ...]]:
        """Token ids of each answer, end-of-sequence included where it came."""
        out, start = self.generate(images, questions, longest)
        return [self._ended(ids) for ids in out[:, start:].tolist()]

    def _ended(self, ids: list[int]) -> tuple[int, ...]:
        ends = [at for at, token in enumerate(ids) if token in self.stops]
        return tuple(ids[: ends[0] + 1] if ends else ids)


class Official:
    """The published loop: one question at a time, the whole image each time."""

    name = "official"

    def __init__(self, subject: Subject, limit: int | None) -> None:
        self.limit = limit
        self.work: dict[str, int] = {}
        self._stock = Stock(subject)

    def answer(self, frame: Frame) -> list[tuple[int, ...]]:
        asked = enumerate(frame.questions)
        return [self._stock.answers([frame.shown(row)], [text], frame.longest)[0] for row, text in asked]


class Batched:
    """`generate` with the image repeated, at the batch size that was fastest when it was first asked."""

    name = "batched"

    def __init__(self, subject: Subject, limit: int | None) -> None:
        self.limit = limit
        self.work: dict[str, int] = {}
        self._stock = Stock(subject)
        self._batch: dict[str, int] = {}

    def answer(self, frame: Frame) -> list[tuple[int, ...]]:
        if frame.dialect not in self._batch:
            self._batch[frame.dialect] = self._fastest(frame)
        return self._answer(frame, self._batch[frame.dialect])

    def batch(self, dialect: str) -> int | None:
        """The size that was chosen."""
        return self._batch.get(dialect)

    def _fastest(self, frame: Frame) -> int:
        rates: dict[int, float] = {}
        for size in sorted({min(size, len(frame)) for size in BATCHES}):
            start = time.perf_counter()
            try:
                self._answer(frame.some(size), size)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            rates[size] = size / (time.perf_counter() - start)
        return max(rates, key=rates.get, default=1)

    def _answer(self, frame: Frame, size: int) -> list[tuple[int, ...]]:
        answers = []
        for start in range(0, len(frame), size):
            rows = range(start, min(start + size, len(frame)))
            images = [frame.shown(row) for row in rows]
            answers += self._stock.answers(images, [frame.questions[row] for row in rows], frame.longest)
        return answers
