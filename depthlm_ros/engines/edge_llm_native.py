"""Questions to TensorRT Edge-LLM in this process, through the native runtime of the wheel `tensorrt-edgellm`.

The model is loaded once. The wheel holds runtimes for Jetson Orin (JetPack 7.2) and Thor and a few desktop GPUs, each
tied to one CUDA and one TensorRT; `tensorrt_edgellm.runtime.load()` picks the one that fits, or says why none does.

The names below are those that `experimental/server/runtime/engine.py` of the wheel 0.11.0 uses, which is the only
documentation of these bindings.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from depthlm_ros.engines.edge_llm_requests import LOGPROBS, Limits, chosen_tokens
from depthlm_ros.engines.worded import Ask, Reply
from depthlm_ros.errors import EngineError, MissingDependencyError

PACKAGE = "tensorrt-edgellm"
# What this file reads of the bindings; a version that lacks one is refused at start and not in mid-flight.
NAMES = (
    "ContextCacheCommitPolicy",
    "ContextCacheConfig",
    "ContextCacheLookupPolicy",
    "FinishReason",
    "GuideType",
    "GuidedDecodingParams",
    "LLMGenerationRequest",
    "LLMRuntime",
    "Message",
    "MessageContent",
    "Request",
    "load_image_from_bytes",
)
# Images and their prefixes that are remembered; a camera's next image takes the place of the oldest.
_RECORDS = 64


def load_bindings() -> tuple[Any, str]:
    """The native runtime's module, and its version.

    Raises:
        MissingDependencyError: the wheel isn't installed.
        EngineError: it has no runtime for this machine, or one with other names.
    """
    try:
        version = metadata.version(PACKAGE)
        from tensorrt_edgellm import runtime
    except (metadata.PackageNotFoundError, ImportError) as error:
        raise MissingDependencyError(
            f'{PACKAGE} is not installed ({error}); run: pip install "{PACKAGE}==0.11.0", beside a TensorRT'
        ) from error
    try:
        bindings = runtime.load()
    except (ImportError, RuntimeError, OSError) as error:
        raise EngineError(
            f"{PACKAGE} {version} has no runtime for this machine ({type(error).__name__}: {error})"
        ) from error
    missing = [name for name in NAMES if not hasattr(bindings, name)]
    if missing:
        raise EngineError(f"the runtime of {PACKAGE} {version} lacks {', '.join(missing)}; install {PACKAGE}==0.11.0")
    return bindings, version


class NativeBackend:
    """A `Backend` in this process.

    Args:
        bindings: `load_bindings`.
        engines: folder with `llm.engine` and `visual/visual.engine`.
        limits: of these engines.
        system: text of the system message; None for none.
        batch: most questions answered together; 0 for as many as the engine takes.
        reuse: whether what questions about an image share may be kept.

    Raises:
        EngineError: the engines can't be loaded.
    """

    def __init__(
        self, bindings: Any, engines: Path, limits: Limits, system: str | None, batch: int = 0, reuse: bool = True
    ) -> None:
        self.complaints: tuple[str, ...] = ()
        self.deadline: float | None = None
        self._rt, self._limits, self._system = bindings, limits, system
        self._batch, self._reuse = batch, reuse
        cache = bindings.ContextCacheConfig()
        cache.enabled = reuse
        cache.max_records = _RECORDS
        try:
            # No adapters, and no checkpoint: the engines were built from graphs and hold their weights.
            self._runtime = bindings.LLMRuntime(str(engines), str(engines), {}, "", cache)
            self._runtime.capture_decoding_cuda_graph()
        except (RuntimeError, TypeError, ValueError) as error:
            raise EngineError(
                f"TensorRT Edge-LLM can't load {engines} ({error}); build the engines on this device "
                "(build_on_device.sh), and see that the model fits into its memory"
            ) from error

    def ask(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answers all questions, the first one alone so that the others find what they share.

        Raises:
            EngineError: the runtime failed, or the deadline passed between two batches.
        """
        if self._runtime is None:
            raise EngineError("the engine is closed")
        if not asks:
            return []
        self._limits.check(asks)
        each = self._limits.together(asks, self._batch)
        encoded: dict[int, bytes] = {}
        replies: list[Reply] = []
        while len(replies) < len(asks):
            if self.deadline is not None and time.monotonic() >= self.deadline:
                raise EngineError(f"the deadline passed after {len(replies)} of {len(asks)} answers")
            ahead = self._reuse and not replies and len(asks) > each
            some = asks[len(replies) : len(replies) + (1 if ahead else each)]
            replies += self._answer(some, encoded)
        return replies

    def close(self) -> None:
        """Gives back the device's memory."""
        self._runtime = None

    def _answer(self, asks: Sequence[Ask], encoded: dict[int, bytes]) -> list[Reply]:
        rt = self._rt
        failed = (rt.FinishReason.ERROR, rt.FinishReason.CANCELLED, rt.FinishReason.NOT_FINISHED)
        try:
            response = self._runtime.handle_request(self._requests(asks, encoded))
            texts, reasons = [str(text) for text in response.output_texts], list(response.finish_reasons)
            if not len(texts) == len(reasons) == len(asks):
                raise EngineError(f"TensorRT Edge-LLM gave {len(texts)} answers to {len(asks)} questions")
            for text, reason in zip(texts, reasons, strict=True):
                if reason in failed:
                    raise EngineError(f"TensorRT Edge-LLM couldn't answer: {reason}, {text[:200]!r}")
            told = list(response.logprobs) or [()] * len(asks)
            return [_reply(text, steps) for text, steps in zip(texts, told, strict=True)]
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise EngineError(f"TensorRT Edge-LLM failed: {type(error).__name__}: {error}") from error

    def _requests(self, asks: Sequence[Ask], encoded: dict[int, bytes]) -> Any:
        request = self._rt.LLMGenerationRequest()
        request.requests = [self._request(ask, encoded) for ask in asks]
        # The likeliest token; logprobs are those of temperature 1 whatever is asked.
        request.temperature, request.top_p, request.top_k = 1.0, 1.0, 1
        request.max_generate_length = max(ask.max_new_tokens for ask in asks)
        request.apply_chat_template = True
        request.add_generation_prompt = True
        request.enable_thinking = False
        request.num_logprobs = LOGPROBS
        lookup, commit = self._rt.ContextCacheLookupPolicy, self._rt.ContextCacheCommitPolicy
        request.context_cache_lookup_policy = lookup.USE_CACHE if self._reuse else lookup.BYPASS
        request.context_cache_commit_policy = commit.PREFILL_STATE_ONLY
        return request

    def _request(self, ask: Ask, encoded: dict[int, bytes]) -> Any:
        rt = self._rt
        contents = [rt.MessageContent("image", "") for _ in ask.images] + [rt.MessageContent("text", ask.question)]
        messages = [] if self._system is None else [self._message("system", [rt.MessageContent("text", self._system)])]
        request = rt.Request(messages=[*messages, self._message("user", contents)])
        images = []
        for image in ask.images:
            if id(image) not in encoded:
                encoded[id(image)] = _png(image)
            loaded = rt.load_image_from_bytes(encoded[id(image)])
            loaded.do_resize = False
            images.append(loaded)
        request.image_buffers = images
        if ask.guide:
            request.guided_decoding = rt.GuidedDecodingParams(rt.GuideType.REGEX, ask.guide)
        return request

    def _message(self, role: str, contents: list[Any]) -> Any:
        message = self._rt.Message()
        message.role = role
        message.has_content = True
        # A system message is a text to every template, a question a list of parts.
        message.content_is_array = role != "system"
        message.contents = contents
        return message


def _reply(text: str, steps: Sequence[Any]) -> Reply:
    told = [[(entry.piece.decode("utf-8", "replace"), float(entry.logprob)) for entry in step] for step in steps]
    return Reply(text, *chosen_tokens(text, told))


def _png(image: np.ndarray) -> bytes:
    # Decoded anew for every question, so it isn't compressed at all.
    done, encoded = cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 0])
    if not done:
        raise EngineError(f"an image of shape {image.shape} can't be encoded")
    return encoded.tobytes()
