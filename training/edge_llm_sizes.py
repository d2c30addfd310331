"""How large the questions about a camera's images are, and what TensorRT Edge-LLM's builders must be told for them.

The builders' defaults don't fit: at most 512 tokens an image. A larger one is refused, or shrunk without a word where
that isn't forbidden, and with it the focal length that the model relies on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from depthlm_ros.camera import Camera
from depthlm_ros.correspondence import long_edge_view
from depthlm_ros.engines.checkpoint import open_processor
from depthlm_ros.engines.processor import PromptProcessor
from depthlm_ros.errors import ConfigError
from depthlm_ros.estimator import Estimator
from depthlm_ros.modelcard import ModelCard
from depthlm_ros.prompts import (
    LONGEST_NUMBER,
    compact_questions,
    coordinates_question,
    marker_question,
)

# Tokens of a free question, or of a task's question with its list of choices.
QUESTION_TOKENS = 256
# TensorRT 10.13.3.9 (JetPack 7.0 and 7.1) miscompiles these models at batch size 1 (Edge-LLM issues 105 and 151); more
# than llm_build's own default of 4 costs memory that small boards don't have.
BATCH = 4
MOST_BATCH = 16
"""Of one request file: cpp/common/inputLimits.h of Edge-LLM 0.9.1."""
_PAGE = 128  # tokens of a page of the KV cache
_TWO_IMAGES = {"correspondence", "pose", "motion"}


@dataclass(frozen=True)
class Sizes:
    """Sizes that the engines are built for.

    Attributes:
        width: of the image that the model sees, in pixels.
        height: likewise.
        image_tokens: of one image.
        images: most images in a question.
        prompt_tokens: of the longest question, images included.
        answer_tokens: of the longest answer.
        max_input_len: `llm_build --maxInputLen`.
        max_kv_cache_capacity: `llm_build --maxKVCacheCapacity`, whole pages.
        max_batch_size: `llm_build --maxBatchSize`.
        min_image_tokens: `visual_build --minImageTokens`.
        max_image_tokens: `visual_build --maxImageTokens`: of all images of a batch, which go through the tower at once.
        max_image_tokens_per_image: `visual_build --maxImageTokensPerImage`.
        max_kv_pool_pages: `llm_build --maxKVPoolPages`, where it knows that: a page is 128 tokens. By default there are
            just enough for a batch, and nothing that questions share outlives it; here is room for one prompt more.
    """

    width: int
    height: int
    image_tokens: int
    images: int
    prompt_tokens: int
    answer_tokens: int
    max_input_len: int
    max_kv_cache_capacity: int
    max_batch_size: int
    min_image_tokens: int
    max_image_tokens: int
    max_image_tokens_per_image: int
    max_kv_pool_pages: int

    def as_dict(self) -> dict[str, int]:
        """By name, for the manifest."""
        return asdict(self)


def plan_sizes(
    estimator: Estimator,
    source: Path,
    camera: Camera,
    dialects: tuple[str, ...],
    *,
    batch: int = BATCH,
    question_tokens: int = QUESTION_TOKENS,
    answer_tokens: int | None = None,
) -> Sizes:
    """Works them out from real questions about an image of the camera.

    Args:
        estimator: prepares the image as it does every frame.
        source: folder with the checkpoint's processor.
        camera: of the images.
        dialects: of depth that will be asked; none for a model of other tasks.
        batch: questions answered together.
        question_tokens: room for free questions.
        answer_tokens: of the longest answer; None takes the card's, and the compact dialect's where that is longer.

    Raises:
        ConfigError: a batch outside [1, 16], no room, or questions that are longer than the model can read.
    """
    if not 1 <= batch <= MOST_BATCH:
        raise ConfigError(f"batch is {batch}; choose 1 to {MOST_BATCH}, 2 or more for JetPack 7.0 and 7.1")
    if question_tokens < 0:
        raise ConfigError(f"question_tokens is {question_tokens}; choose 0 or more")
    if answer_tokens is not None and answer_tokens < 1:
        raise ConfigError(f"answer_tokens is {answer_tokens}; choose 1 or more")
    card = estimator.card
    checkpoint = open_processor(source)
    processor = PromptProcessor(checkpoint, card.system_text)
    image = np.zeros((camera.height, camera.width, 3), np.uint8)
    if card.focal_px is None:
        # Correspondence alone asks for no focal length.
        view = long_edge_view(image, estimator.policy, estimator.engine.grid).image
    else:
        view = estimator.prepare(image, camera).image
    shown = processor.shown(view)
    grid = processor.images([shown]).grid_hw
    tokens = grid[0] * grid[1]
    images = 2 if _TWO_IMAGES & set(card.tasks) else 1
    grids = [grid] * images
    # A model of tasks alone speaks no dialect of depth; then there are free questions only.
    bare, *asked = (len(ids) for ids in processor.prompts(["", *_longest(card, dialects)], *grids))
    prompt = max([bare + question_tokens, *asked])
    if answer_tokens is None:
        answer_tokens = max(card.max_new_tokens, card.points_per_question * LONGEST_NUMBER)
    text = checkpoint.config.get("text_config", checkpoint.config)
    most = int(text.get("max_position_embeddings", 1 << 30))
    if prompt + answer_tokens > most:
        raise ConfigError(
            f"a question about an image of {shown.shape[1]}x{shown.shape[0]} pixels has {prompt} tokens and its answer "
            f"up to {answer_tokens}, the model reads {most}; export for a camera with fewer pixels"
        )
    input_len = _up(prompt, 64)
    capacity = _up(input_len + answer_tokens, _PAGE)
    return Sizes(
        width=shown.shape[1],
        height=shown.shape[0],
        image_tokens=tokens,
        images=images,
        prompt_tokens=prompt,
        answer_tokens=answer_tokens,
        max_input_len=input_len,
        max_kv_cache_capacity=capacity,
        max_batch_size=batch,
        # Smaller pictures than the camera's can be asked about as well, larger ones not.
        min_image_tokens=max(4, tokens // 4),
        max_image_tokens=max(tokens * images * batch, 8),
        max_image_tokens_per_image=max(tokens, 4),
        max_kv_pool_pages=(batch + 1) * capacity // _PAGE,
    )


def _longest(card: ModelCard, dialects: tuple[str, ...]) -> list[str]:
    """The longest question of each dialect."""
    last, compact = card.coordinate_range - 1, card.compact_range - 1
    questions = {
        "coordinates": lambda: coordinates_question(last, last, card.coordinate_range),
        "marker": marker_question,
        "compact": lambda: compact_questions(
            [(compact, compact)] * card.points_per_question, card.points_per_question, card.compact_range
        )[0],
    }
    return [questions[dialect]() for dialect in dialects]


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
