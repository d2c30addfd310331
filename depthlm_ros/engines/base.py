"""What every engine offers: it gets images in their final size and questions, it gives answers.

An engine knows nothing of cameras, focal lengths or metres; the estimator does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from depthlm_ros.engines.digits import NumberDistribution


@dataclass(frozen=True)
class EngineInfo:
    """What was loaded and why so; printed at start and published in the diagnostics.

    Attributes:
        engine: name of the engine, such as "transformers".
        model: folder or hub id the weights came from.
        architecture: `model_type` of its config.json ("qwen3_vl", "qwen2_5_vl", "llava").
        device: such as "cpu" or "cuda:0".
        dtype: such as "float32".
        reasons: why this device and dtype, one sentence each.
        parameters: number of parameters.
        dense: whether it makes dense maps.
        words: whether it answers questions in words.
        distributions: whether it can tell how a number's belief is spread.
        version: of the program behind it, such as "onnxruntime 1.31.1 CPUExecutionProvider"; a parity record of
            another one doesn't count.
    """

    engine: str
    model: str
    architecture: str
    device: str
    dtype: str
    reasons: tuple[str, ...]
    parameters: int
    dense: bool
    words: bool = True
    distributions: bool = True
    version: str = ""


@dataclass(frozen=True)
class ImageGrid:
    """The sizes that the model's processor leaves alone.

    Attributes:
        multiple: width and height are whole multiples of this many pixels (patch times merge).
        min_pixels: smallest number of pixels that isn't scaled up.
        max_pixels: largest number of pixels that isn't scaled down.
        max_edge: longest side that isn't scaled down; None where only the area counts.
    """

    multiple: int
    min_pixels: int
    max_pixels: int
    max_edge: int | None = None


@dataclass(frozen=True)
class Answer:
    """One greedy answer.

    Attributes:
        text: decoded text without special tokens.
        token_ids: the generated ids, end-of-sequence included where it was reached.
        confidence: probability of the number in the answer: the product of the greedy probabilities of its tokens,
            in [0, 1]; of several numbers the least sure one, since one that is said again is sure to be the same;
            0 when there is no number; NaN where a server doesn't tell probabilities.
        confidences: the same of every number in the answer, in their order.
        numbers: what else each number could have been, where it was asked for; a number that only repeats the one
            before it is left out.
    """

    text: str
    token_ids: tuple[int, ...]
    confidence: float
    confidences: tuple[float, ...] = ()
    numbers: tuple[NumberDistribution, ...] = ()

    @property
    def number(self) -> NumberDistribution | None:
        """The distribution of the first number, None where there is none."""
        return self.numbers[0] if self.numbers else None


class Engine(Protocol):
    """Answers questions about images. Not re-entrant: one caller at a time.

    Attributes:
        info: what was loaded.
        grid: image sizes that are shown as they are.
        complaints: what is wrong now, a sentence each, for the diagnostics; may be read from any thread while the
            engine answers. Empty in engines that live in this process.
        deadline: when an answer is of no use any more, in seconds of `time.monotonic`; None for never. Engines that
            wait for others give up then; set before a call by whoever knows how old the image is.
    """

    info: EngineInfo
    grid: ImageGrid
    complaints: tuple[str, ...]
    deadline: float | None

    def answer_shared(
        self,
        image: np.ndarray,
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        expects: str | None = None,
        distribution: bool = False,
        guesses: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Answers many questions about one (H, W, 3) uint8 RGB image, encoded once.

        Args:
            image: what they are about.
            questions: texts.
            max_new_tokens: longest answer.
            expects: the sentence that the model was trained to answer with, "{number}" where each number stands and
                "{same}" where the one before is repeated. It may save time and changes no answer.
            distribution: also give the distribution of each answer's numbers.
            guesses: the number that each answer probably holds, "" for none. They may save time and change no answer.
        """

    def answer_about(
        self,
        images: Sequence[np.ndarray],
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        expects: str | None = None,
        distribution: bool = False,
        guesses: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Answers many questions about the same images of any sizes, shown in this order and encoded once."""

    def answer_each(
        self,
        images: Sequence[np.ndarray],
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        expects: str | None = None,
        distribution: bool = False,
    ) -> list[Answer]:
        """Answers question i about image i."""

    def answer_marked(
        self,
        image: np.ndarray,
        blocks: Sequence[tuple[int, int, np.ndarray]],
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        expects: str | None = None,
        distribution: bool = False,
    ) -> list[Answer]:
        """Answers question i about the image with block i pasted into it.

        Args:
            image: (H, W, 3) uint8 RGB.
            blocks: row and column of the upper left corner, and (h, w, 3) uint8 pixels, of each.
            questions: as many.
            max_new_tokens: longest answer.
            expects: as in `answer_shared`.
            distribution: as in `answer_shared`.
        """

    def encode_ahead(self, image: np.ndarray) -> bool:
        """Encodes the next frame's image beside what runs now, from any thread; False where that isn't worthwhile."""

    def depth_map(self, image: np.ndarray, question: str) -> np.ndarray:
        """The dense head's (H', W') float32 output in metres; H', W' = the processor's final size."""

    def close(self) -> None:
        """Gives back memory, threads and connections."""
