"""An engine made of anything that can answer one question about images in words: a server, a runtime of another maker.

Such a backend has its own tokenizer, its own batching and its own cache of what questions share. What is left to do
here is the same for all of them: show images of sizes that the processor keeps, so that the backend resamples nothing
and a pixel means there what it means here; put the images first and ask once before the rest; guide numbers; read how
sure the model was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from depthlm_ros.engines.answers import NUMBER, number_confidences
from depthlm_ros.engines.base import Answer, EngineInfo, ImageGrid
from depthlm_ros.errors import ConfigError, DialectError
from depthlm_ros.markers import paste

if TYPE_CHECKING:
    from depthlm_ros.engines.image_sizes import ImageSizes

# What a guided number may look like; the longest that a model was trained to say has six places.
GUIDED_NUMBER = r"[0-9]{1,5}(\.[0-9]{1,4})?"
# No more is escaped: the guides of others don't know "\ " and "\,".
_META = re.compile(r"[.^$*+?{}\[\]\\|()]")


@dataclass(frozen=True)
class Ask:
    """One question.

    Attributes:
        images: (H, W, 3) uint8 RGB each, shown in this order before the text; questions about the same images hold
            the very same arrays.
        question: the text.
        max_new_tokens: longest answer.
        guide: regular expression that the whole answer matches, without look-around and back-references; empty for
            none. A backend that has no guides leaves it out.
    """

    images: tuple[np.ndarray, ...]
    question: str
    max_new_tokens: int
    guide: str = ""


@dataclass(frozen=True)
class Reply:
    """What a backend said to one question.

    Attributes:
        text: the answer, without special tokens.
        pieces: text of each generated token; empty where the backend doesn't tell.
        logprobs: natural logarithm of each token's probability; as many as `pieces`.
    """

    text: str
    pieces: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()


class Backend(Protocol):
    """Who answers.

    Attributes:
        complaints: as in `Engine`.
        deadline: as in `Engine`.
    """

    complaints: tuple[str, ...]
    deadline: float | None

    def ask(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answers all of them, in their order, greedily.

        Questions about the same images come one after the other; the first of them is to be answered, or at least
        prefilled, before the rest, where the backend caches prefixes.

        Raises:
            EngineError: it couldn't answer; nothing of this call is of use.
        """

    def close(self) -> None:
        """Gives back connections and memory."""


class WordedEngine:
    """Asks a backend; an `Engine` without dense maps and without distributions.

    Args:
        backend: who answers.
        info: what it is; `words` true, `dense` and `distributions` false.
        sizes: that the model's processor keeps.
        guided: whether answers whose sentence is known are held to it by a guide.
    """

    def __init__(self, backend: Backend, info: EngineInfo, sizes: ImageSizes, guided: bool = True) -> None:
        self.info = info
        self.grid: ImageGrid = sizes.grid
        self._sizes = sizes
        self._backend = backend
        self._guided = guided

    @property
    def complaints(self) -> tuple[str, ...]:
        """The backend's."""
        return self._backend.complaints

    @property
    def deadline(self) -> float | None:
        """The backend's."""
        return self._backend.deadline

    @deadline.setter
    def deadline(self, value: float | None) -> None:
        self._backend.deadline = value

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
        """Answers many questions about one image; as `Engine.answer_shared`."""
        return self.answer_about([image], questions, max_new_tokens, expects=expects, distribution=distribution)

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
        """Answers many questions about the same images; as `Engine.answer_about`. Guesses are of no use here."""
        shown = tuple(images)
        return self._answers([shown] * len(questions), questions, max_new_tokens, expects, distribution)

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
        return self._answers([(image,) for image in images], questions, max_new_tokens, expects, distribution)

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
        """Answers question i about the image with block i pasted into it; each is an image of its own here."""
        marked = [(paste(image, block),) for block in blocks]
        return self._answers(marked, questions, max_new_tokens, expects, distribution)

    def encode_ahead(self, image: np.ndarray) -> bool:
        """Nothing is encoded here."""
        return False

    def depth_map(self, image: np.ndarray, question: str) -> np.ndarray:
        """There are no dense maps.

        Raises:
            DialectError: always.
        """
        raise DialectError(
            f"engine {self.info.engine} answers in words and makes no dense maps; choose another dialect, or engine "
            "onnxruntime, tensorrt or transformers"
        )

    def leave_out(self, urls: Sequence[str]) -> None:
        """Has a backend with several servers never ask these."""
        self._backend.leave_out(urls)

    def close(self) -> None:
        """Gives back the backend's connections and memory."""
        self._backend.close()

    def _answers(
        self,
        images: Sequence[tuple[np.ndarray, ...]],
        questions: Sequence[str],
        max_new_tokens: int,
        expects: str | None,
        distribution: bool,
    ) -> list[Answer]:
        if distribution:
            raise ConfigError(
                f"engine {self.info.engine} doesn't tell how the belief in a number is spread; set distribution to "
                "false, or take engine transformers"
            )
        # The very same arrays stay the very same: a backend encodes each once.
        kept = {id(image): self._sizes.shown(image) for shown in images for image in shown}
        guide = guide_regex(expects) if expects and self._guided else ""
        asks = [
            Ask(tuple(kept[id(image)] for image in shown), question, max_new_tokens, guide)
            for shown, question in zip(images, questions, strict=True)
        ]
        return [read_reply(reply) for reply in self._backend.ask(asks)] if asks else []


def read_reply(reply: Reply) -> Answer:
    """An answer with its confidences: NaN where the backend told no probabilities."""
    if reply.pieces:
        confidences = number_confidences(reply.pieces, [math.exp(min(0.0, value)) for value in reply.logprobs])
    else:
        confidences = tuple(math.nan for _ in NUMBER.finditer(reply.text))
    return Answer(reply.text, (), min(confidences, default=0.0), confidences)


def guide_regex(expects: str) -> str:
    """The regular expression of a sentence with "{number}" and "{same}", in what all guides understand.

    A number that is said again is any number here: no guide has back-references.
    """
    parts = re.split(r"(\{number\}|\{same\})", expects)
    return "".join(GUIDED_NUMBER if part in ("{number}", "{same}") else _META.sub(r"\\\g<0>", part) for part in parts)
