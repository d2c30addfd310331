"""What each kind of server wants to be told and says: fields of a question, the shape of an answer.

    server               guide                                        unknown fields   probabilities
    trtllm-serve         response_format {"type": "regex", "regex"}   400              of each token
    vLLM                 structured_outputs {"regex"}; before 0.12    left out         of each token
                         guided_regex
    TensorRT Edge-LLM    guided_decoding {"regex"}                    400              only among top_logprobs
    transformers serve   none                                         422              none

All take `max_tokens`, `temperature` and OpenAI's image parts. None is sent `stop`: one matches tokens, one text, one
fails. Read in the sources of trtllm-serve 1.3, vLLM 0.32, tensorrt-edgellm 0.11 and transformers 5.23.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from depthlm_ros.engines.served.images import Picture
from depthlm_ros.engines.worded import Reply

# Stands for an image while the rest is made into JSON; no question can hold it by chance.
_PLACE = f"image-{secrets.token_hex(16)}-"
# Most characters of white space and ends that the tokens of an answer may have beyond its text.
_SPACE = 64


class NoAnswer(Exception):
    """A body that is no answer to what was asked."""


class WrongModel(Exception):
    """Another model has answered."""


@dataclass(frozen=True)
class Dialect:
    """How one server is asked.

    Attributes:
        name: one of `options.SERVER_DIALECTS`, without "auto".
        guide: name of the guide's form in `GUIDES`; empty where there is none.
        logprobs: fields that ask for probabilities; empty where they aren't told.
        limit: name of the field with the longest answer.
        extras: what else is sent with every question.
        image_extras: what else is sent with every image.
        parallel: whether it answers more than one question at a time.
        loads: whether the model is only loaded once it is asked.
        lists: whether it lists the model that it serves.
        refused: fields that it has refused, so that they aren't sent again.
    """

    name: str
    guide: str = ""
    logprobs: dict[str, Any] = field(default_factory=dict)
    limit: str = "max_tokens"
    extras: dict[str, Any] = field(default_factory=dict)
    image_extras: dict[str, Any] = field(default_factory=dict)
    parallel: bool = True
    loads: bool = False
    lists: bool = True
    refused: frozenset[str] = frozenset()

    def body(
        self, model: str, system: str | None, pictures: Sequence[Picture], text: str, longest: int, guide: str
    ) -> bytes:
        """A question as JSON: the images first, so that what questions share comes first.

        Args:
            model: the name that the server knows it by.
            system: text of the system message; None for none.
            pictures: images, in this order.
            text: the question.
            longest: most tokens of the answer.
            guide: regular expression of the answer; empty for none.

        Raises:
            ImageError: an image is too large.
        """
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"{_PLACE}{at}"}, **self.image_extras}
            for at in range(len(pictures))
        ]
        content.append({"type": "text", "text": text})
        messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": content})
        asked = {"model": model, "messages": messages, "temperature": 0, self.limit: longest}
        asked |= self.extras | self.logprobs
        if guide and self.guide:
            asked |= GUIDES[self.guide](guide)
        raw = json.dumps(asked, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        # The URL has nothing that JSON escapes, and 300 kB of it would be looked through again for each question.
        for at, picture in enumerate(pictures):
            raw = raw.replace(f'"{_PLACE}{at}"'.encode(), b'"' + picture.url + b'"', 1)
        return raw

    def without(self, complaint: str) -> Dialect | None:
        """The dialect without the optional field that a refusal names; None if it names none that was sent."""
        said = complaint.lower()
        if self.limit == "max_tokens" and "max_completion_tokens" in said:
            return replace(self, limit="max_completion_tokens", refused=self.refused | {"max_tokens"})
        if self.guide and any(name in said for name in ("guide", "regex", "grammar", "structured", "response_format")):
            return replace(self, guide="", refused=self.refused | {"guide"})
        if self.logprobs and "logprob" in said:
            return replace(self, logprobs={}, refused=self.refused | {"logprobs"})
        for name in self.extras:
            if name in said:
                left = {key: value for key, value in self.extras.items() if key != name}
                return replace(self, extras=left, refused=self.refused | {name})
        return None


GUIDES = {
    "response_format": lambda regex: {"response_format": {"type": "regex", "regex": regex}},
    "structured_outputs": lambda regex: {"structured_outputs": {"regex": regex}},
    "guided_regex": lambda regex: {"guided_regex": regex},
    "guided_decoding": lambda regex: {"guided_decoding": {"regex": regex}},
}
"""How a regular expression is sent."""

DIALECTS = {
    "trtllm-serve": Dialect("trtllm-serve", "response_format", {"logprobs": True, "top_logprobs": 1}),
    "vllm": Dialect("vllm", "structured_outputs", {"logprobs": True, "top_logprobs": 1}),
    # Edge-LLM tells a token's probability only where it is among the most probable, and its default for top_k is 50.
    # Its context reuse is left as the server has it: whether it tells two images apart is not documented.
    # An image beyond its limit of tokens is an error then, and not shrunk: with it the focal length would be.
    "edge-llm": Dialect(
        "edge-llm",
        "guided_decoding",
        {"logprobs": True, "top_logprobs": 1},
        extras={"top_k": 1},
        image_extras={"do_resize": False},
    ),
    "transformers": Dialect("transformers", parallel=False, loads=True, lists=False),
    "generic": Dialect("generic", "", {"logprobs": True, "top_logprobs": 1}),
}


def read_error(status: int, body: Any, text: str) -> str:
    """What a server says is wrong, in any of their shapes.

    Args:
        status: of HTTP.
        body: the body's JSON; None where it is none.
        text: the body.
    """
    said: Any = body
    for name in ("error", "detail", "message", "reason"):
        if isinstance(said, dict) and said.get(name):
            said = said[name]
    if isinstance(said, list | dict):
        said = json.dumps(said, ensure_ascii=False)
    return f"says {status}: {said or text or 'nothing more'}"


def read_answer(body: Any, models: frozenset[str], exact: bool = True) -> tuple[Reply, str | None]:
    """An answer and why it ended ("stop", "length" or None where the server doesn't tell).

    Args:
        body: the JSON of a 200.
        models: names that the model may have in it.
        exact: whether another name is an error.

    Raises:
        NoAnswer: it isn't one.
        WrongModel: it is another model's.
    """
    if not isinstance(body, dict):
        raise NoAnswer(f"an answer that is {'null' if body is None else 'no JSON object'}")
    if body.get("error"):
        raise NoAnswer(read_error(200, body, ""))
    named = body.get("model")
    if exact and isinstance(named, str) and named and named not in models:
        raise WrongModel(f"answers as model {named!r}, where {' or '.join(sorted(models))} was asked")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise NoAnswer("an answer without choices")
    choice = choices[0]
    message = choice.get("message")
    if not isinstance(message, dict):
        raise NoAnswer("a choice without a message")
    ended = choice.get("finish_reason")
    if ended not in ("stop", "length", None):
        raise NoAnswer(f"an answer that ended with {str(ended)[:40]!r}")
    content = message.get("content")
    # Some servers take the thinking out of the answer.
    thought = message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(content, str) and not (content is None and isinstance(thought, str)):
        raise NoAnswer("a message without a text")
    text = (f"<think>{thought}</think>" if isinstance(thought, str) and thought else "") + (content or "")
    pieces, logprobs = _read_logprobs(choice.get("logprobs"), text)
    return Reply(text, pieces, logprobs), ended


def _read_logprobs(told: Any, text: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Tokens that make up `text`, and how probable they were; empty where the two don't fit together."""
    content = told.get("content") if isinstance(told, dict) else None
    if not isinstance(content, list):
        return (), ()
    wanted = text.strip()
    pieces: list[str] = []
    logprobs: list[float] = []
    length = 0
    for token in content:
        # The end of the answer is a token too, and not part of its text. White space at the ends is kept by some
        # servers and cut off by others.
        if length >= len(wanted) and "".join(pieces).strip() == wanted:
            return tuple(pieces), tuple(logprobs)
        piece = token.get("token") if isinstance(token, dict) else None
        value = token.get("logprob") if isinstance(token, dict) else None
        if not isinstance(piece, str) or not isinstance(value, int | float) or not -1e6 < value < 1:
            return (), ()
        pieces.append(piece)
        logprobs.append(float(value))
        length += len(piece)
        if length > len(text) + _SPACE:
            return (), ()
    return (tuple(pieces), tuple(logprobs)) if "".join(pieces).strip() == wanted else ((), ())
