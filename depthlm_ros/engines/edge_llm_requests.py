"""What TensorRT Edge-LLM's `llm_inference` reads and writes, as plain values.

Names were read in the documentation of 0.10 and 0.11 (user guide, input format) and in the sources of 0.9.1 and of a
version with guides and context caches (examples/utils/requestFileParser.cpp, examples/llm/llm_inference.cpp), which
leave out fields that they don't know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthlm_ros.engines.worded import Ask, Reply
from depthlm_ros.errors import EngineError

# Limits of cpp/common/inputLimits.h: what is larger is refused there with a message in the log only.
MOST_ITEMS = 18
MOST_TEXT_BYTES = 128 * 1024
MOST_GUIDE_BYTES = 128 * 1024
# Entries a token. One would do without a guide; under one, the token that was taken needn't be the likeliest.
LOGPROBS = 5

# Names of cpp/runtime/streaming.cpp; those of an answer are "end-of-sequence", "max-length" and "stop-words".
FAILED = ("error", "cancelled", "not-finished", "?", "")


@dataclass(frozen=True)
class Limits:
    """What the engines were built for, from `builder_config` of their config.json.

    Attributes:
        input_tokens: longest prompt.
        capacity: prompt and answer together.
        batch: requests answered together.
        least_image: fewest tokens of an image.
        most_image: most tokens of an image.
        most_images: most tokens of all images of a batch.
        pixels: side of one image token's square.
    """

    input_tokens: int
    capacity: int
    batch: int
    least_image: int
    most_image: int
    most_images: int
    pixels: int

    def check(self, asks: Sequence[Ask]) -> None:
        """Makes sure that the runtime would neither resize an image nor refuse a question.

        Raises:
            EngineError: names what doesn't fit.
        """
        for image in {id(image): image for ask in asks for image in ask.images}.values():
            self._check_image(image)
        for ask in asks:
            tokens = self.tokens_of(ask)
            if tokens > self.most_images:
                raise EngineError(
                    f"a question has {len(ask.images)} images of together {tokens} tokens; the engine was built for "
                    f"{self.most_images} tokens of images together. Export the model with a task of two images in its "
                    "card"
                )
            if tokens + ask.max_new_tokens >= self.capacity or tokens >= self.input_tokens:
                raise EngineError(
                    f"{len(ask.images)} images of together {tokens} tokens and an answer of {ask.max_new_tokens} don't "
                    f"fit: the engine was built for {self.input_tokens} tokens of prompt, {self.capacity} in all; "
                    "export it for this camera, with more answer_tokens where that is what lacks"
                )
            if len(ask.images) >= MOST_ITEMS:
                raise EngineError(f"a question has {len(ask.images)} images; Edge-LLM takes {MOST_ITEMS - 1}")
            if len(ask.question.encode()) > MOST_TEXT_BYTES or len(ask.guide.encode()) > MOST_GUIDE_BYTES:
                raise EngineError(f"a question or its guide is longer than Edge-LLM's {MOST_TEXT_BYTES} bytes")

    def tokens(self, image: np.ndarray) -> int:
        """Image tokens of an (H, W, 3) image."""
        return image.shape[0] * image.shape[1] // self.pixels**2

    def tokens_of(self, ask: Ask) -> int:
        """Image tokens of a question."""
        return sum(self.tokens(image) for image in ask.images)

    def together(self, asks: Sequence[Ask], asked: int) -> int:
        """How many of these questions fit into a batch, at most `asked` where that isn't 0."""
        largest = max((self.tokens_of(ask) for ask in asks), default=0)
        fit = self.most_images // largest if largest else self.batch
        return max(1, min(self.batch, fit, asked or self.batch))

    def _check_image(self, image: np.ndarray) -> None:
        height, width = image.shape[:2]
        tokens = self.tokens(image)
        if height % self.pixels or width % self.pixels or not self.least_image <= tokens <= self.most_image:
            raise EngineError(
                f"an image of {width}x{height} pixels has {tokens} tokens; the engine was built for {self.least_image} "
                f"to {self.most_image} tokens of {self.pixels}x{self.pixels} pixels and would resize it, which changes "
                "every depth. Export the model for this camera"
            )


def request_file(
    asks: Sequence[Ask],
    place: Callable[[np.ndarray], str],
    *,
    batch: int,
    system: str | None,
    reuse: bool | None,
) -> dict[str, Any]:
    """The input file of `llm_inference`.

    Args:
        asks: questions, in the order of the answers.
        place: path of an image's file.
        batch: requests answered together; consecutive ones.
        system: text of the system message; None for none.
        reuse: whether what questions share is kept; None where the program knows no such thing.
    """
    told: dict[str, Any] = {
        "batch_size": batch,
        # The likeliest token, and nothing to divide by: 1 leaves logits as they are in every version.
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 1,
        "max_generate_length": max((ask.max_new_tokens for ask in asks), default=1),
        "num_logprobs": LOGPROBS,
        "apply_chat_template": True,
        "add_generation_prompt": True,
        "enable_thinking": False,
        "requests": [_request(ask, place, system) for ask in asks],
    }
    if reuse is not None:
        told["context_cache_lookup_policy"] = "use_cache" if reuse else "bypass"
        # The answers are never continued.
        told["context_cache_commit_policy"] = "prefill_state_only"
    return told


def messages_of(ask: Ask, place: Callable[[np.ndarray], str], system: str | None) -> list[dict[str, Any]]:
    """A question as messages: the images first, as they are, so that what questions share comes first."""
    content: list[dict[str, Any]] = [
        {"type": "image", "image": place(image), "do_resize": False} for image in ask.images
    ]
    content.append({"type": "text", "text": ask.question})
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": content}]


def read_replies(output: Any, count: int) -> list[Reply]:
    """Answers from the output file of `llm_inference`.

    Args:
        output: its JSON.
        count: of the requests.

    Raises:
        EngineError: it isn't such a file, answers are missing, or a request failed.
    """
    responses = output.get("responses") if isinstance(output, Mapping) else None
    if not isinstance(responses, list) or not all(isinstance(response, Mapping) for response in responses):
        raise EngineError("the output of llm_inference has no list of responses; is it of TensorRT Edge-LLM 0.11?")
    by_index = {response.get("request_idx"): response for response in responses}
    if len(responses) != count or set(by_index) != set(range(count)):
        raise EngineError(
            f"llm_inference answered {len(responses)} of {count} requests, with indices "
            f"{sorted(map(str, by_index))[:8]}; is it of TensorRT Edge-LLM 0.11?"
        )
    return [_reply(by_index[index], index) for index in range(count)]


def chosen_tokens(text: str, steps: Sequence[Sequence[tuple[str, float]]]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Which of the likeliest tokens of each step were taken: those whose texts make up the answer.

    Args:
        text: the answer.
        steps: (text, logprob) of the likeliest tokens of each step, in any order; tokens at the end that have no part
            in the answer are left out.

    Returns:
        Texts and logprobs of as many tokens; nothing where no choice makes up the answer.
    """
    ranked = [sorted(step, key=lambda entry: -entry[1]) for step in steps]
    if not text:
        return (), ()
    # Depth first and without recursion, since an answer may have thousands of tokens. Of each step: where its token
    # begins in the text, and which one was taken.
    seen: set[tuple[int, int]] = set()
    path = [(0, -1)]
    while path:
        step, (at, entry) = len(path) - 1, path.pop()
        if at == len(text):
            taken = [ranked[i][entry] for i, (_, entry) in enumerate(path)]
            return tuple(piece for piece, _ in taken), tuple(logprob for _, logprob in taken)
        if step == len(ranked) or (entry < 0 and (step, at) in seen):
            continue
        seen.add((step, at))
        for following in range(entry + 1, len(ranked[step])):
            piece = ranked[step][following][0]
            if piece and text.startswith(piece, at):
                path += [(at, following), (at + len(piece), -1)]
                break
    return (), ()


def _request(ask: Ask, place: Callable[[np.ndarray], str], system: str | None) -> dict[str, Any]:
    request: dict[str, Any] = {"messages": messages_of(ask, place, system)}
    if ask.guide:
        request["guided_decoding"] = {"regex": ask.guide}
    return request


def _reply(response: Mapping[str, Any], index: int) -> Reply:
    text, reason = response.get("output_text"), str(response.get("finish_reason") or "")
    if not isinstance(text, str) or reason in FAILED:
        raise EngineError(
            f"llm_inference couldn't answer request {index}: finish_reason {reason!r}, {str(text)[:200]!r}; its log "
            "says why"
        )
    steps = []
    for step in response.get("logprobs") or ():
        try:
            steps.append([(str(entry["token"]), float(entry["logprob"])) for entry in step])
        except (TypeError, KeyError, ValueError):
            return Reply(text)
    return Reply(text, *chosen_tokens(text, steps))
