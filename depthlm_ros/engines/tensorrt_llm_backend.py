"""Questions to TensorRT-LLM's LLM API and its answers back, many under way at once."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from PIL import Image

from depthlm_ros.engines.tensorrt_llm_contract import parameters
from depthlm_ros.engines.worded import Ask, Reply
from depthlm_ros.errors import EngineError

if TYPE_CHECKING:
    from depthlm_ros.engines.processor import PromptProcessor

_LOG = logging.getLogger(__name__)
# As many as trtllm-serve takes (`--num_input_processor_workers`).
_PREPARERS = 8
# Longest time without any answer where nothing else limits it: a process of the LLM that has ended says nothing.
STALL_S = 120.0
# How long a request may take to end that was told to.
_GRACE_S = 2.0


@dataclass(frozen=True)
class _Job:
    """A question on its way: its place among all of them, and what the LLM API is told."""

    index: int
    inputs: dict[str, Any]
    sampling: Any
    shapes: str


class LlmBackend:
    """A `worded.Backend` on an `LLM` of this process. One caller at a time.

    Args:
        llm: an `LLM`.
        api: `tensorrt_llm.llmapi`.
        processor: of the model, for prompts and tokens.
        stop_ids: tokens that end an answer.
        repetition_penalty: of the checkpoint's generation_config.json.
        reuse: whether blocks of the cache are reused, so that the first question about an image goes ahead.
        in_flight: most requests under way.
    """

    def __init__(
        self,
        llm: Any,
        api: ModuleType,
        processor: PromptProcessor,
        *,
        stop_ids: Sequence[int],
        repetition_penalty: float = 1.0,
        reuse: bool = True,
        in_flight: int = 64,
    ) -> None:
        self.complaints: tuple[str, ...] = ()
        self.deadline: float | None = None
        self._llm = llm
        self._api = api
        self._processor = processor
        self._stop_ids = tuple(stop_ids)
        self._penalty = repetition_penalty
        self._reuse = reuse
        self._in_flight = max(1, in_flight)
        self._sampling_names = parameters(api, "SamplingParams")
        started = parameters(api, "LLM.generate_async")
        self._salted = started is not None and "cache_salt" in started
        self._special = frozenset(processor.tokenizer.all_special_ids)
        self._pieces: dict[int, str] = {}
        self._pool: ThreadPoolExecutor | None = None
        if hasattr(llm, "preprocess"):
            # Otherwise every request's image is processed and hashed in this thread, one after the other.
            self._pool = ThreadPoolExecutor(_PREPARERS, thread_name_prefix="tensorrt_llm")

    def ask(self, asks: Sequence[Ask], salt: str = "") -> list[Reply]:
        """As `worded.Backend.ask`.

        Args:
            asks: the questions.
            salt: requests with another salt share no blocks of the cache with these.
        """
        shown = {id(image): image for one in asks for image in one.images}
        pictures = {key: Image.fromarray(image) for key, image in shown.items()}
        texts = self._texts(asks)
        jobs, leads, seen = [], set(), set()
        for index, one in enumerate(asks):
            group = tuple(id(image) for image in one.images)
            inputs: dict[str, Any] = {"prompt": texts[index]}
            if group:
                inputs["multi_modal_data"] = {"image": [pictures[key] for key in group]}
            jobs.append(_Job(index, inputs, self._sampling(one), salt + _shapes(one)))
            if group not in seen:
                seen.add(group)
                leads.add(index)
        replies: list[Reply | None] = [None] * len(jobs)
        if self._reuse and len(leads) < len(jobs):
            # The first about each image fills the blocks that the others then find.
            self._run([job for job in jobs if job.index in leads], replies)
            self._run([job for job in jobs if job.index not in leads], replies)
        else:
            self._run(jobs, replies)
        return [reply for reply in replies if reply is not None]

    def close(self) -> None:
        """Ends the LLM and its processes; a second time does nothing."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if self._llm is not None:
            llm, self._llm = self._llm, None
            llm.shutdown()

    def _texts(self, asks: Sequence[Ask]) -> list[str]:
        """The prompt of each, by the checkpoint's chat template."""
        texts = [""] * len(asks)
        for count in {len(one.images) for one in asks}:
            rows = [index for index, one in enumerate(asks) if len(one.images) == count]
            written = self._processor.prompt_texts([asks[row].question for row in rows], count)
            for row, text in zip(rows, written, strict=True):
                texts[row] = text
        return texts

    def _sampling(self, ask: Ask) -> Any:
        told: dict[str, Any] = {
            "max_tokens": ask.max_new_tokens,
            "temperature": 0.0,
            "top_k": 1,
            # Of 0, which means the token that was said, early releases make none.
            "logprobs": 1,
            # The chat template has written them.
            "add_special_tokens": False,
            "stop_token_ids": list(self._stop_ids),
        }
        if self._penalty != 1.0:
            told["repetition_penalty"] = self._penalty
        if ask.guide and hasattr(self._api, "GuidedDecodingParams"):
            told["guided_decoding"] = self._api.GuidedDecodingParams(regex=ask.guide)
        names = self._sampling_names
        return self._api.SamplingParams(**{key: value for key, value in told.items() if names and key in names})

    def _run(self, jobs: Sequence[_Job], replies: list[Reply | None]) -> None:
        """Answers jobs, several at once; the results are collected in a thread of their own.

        In several releases `RequestOutput.result` doesn't keep to its timeout, so this thread never calls it.
        """
        if not jobs:
            return
        started: queue.SimpleQueue = queue.SimpleQueue()
        answered: queue.SimpleQueue = queue.SimpleQueue()
        over = threading.Event()
        threading.Thread(target=_collect, args=(started, answered, self.deadline, over), daemon=True).start()
        waiting, prepared = deque(jobs), deque()
        under_way: dict[int, Any] = {}
        left = len(jobs)
        try:
            while left:
                while waiting and len(prepared) < 2 * _PREPARERS:
                    job = waiting.popleft()
                    prepared.append((job, self._prepare(job)))
                while prepared and len(under_way) < self._in_flight:
                    job, inputs = prepared.popleft()
                    under_way[job.index] = running = self._start(job, inputs)
                    started.put((job.index, running))
                index, outcome = answered.get(timeout=self._patience())
                del under_way[index]
                replies[index] = self._reply(outcome, index)
                left -= 1
        except (queue.Empty, FutureTimeout, TimeoutError) as error:
            when, remedy = "by the deadline", "Ask about fewer points, or allow answers to be older"
            if self.deadline is None:
                when = f"and then nothing for {STALL_S:g} s"
                remedy = "Look at its log; a process of it may have ended: configure the node again"
            raise EngineError(
                f"TensorRT-LLM has answered {len(jobs) - left} of {len(jobs)} questions {when}; the others were "
                f"stopped. {remedy}"
            ) from error
        finally:
            over.set()
            started.put(None)
            _abort(under_way.values())
            for _, inputs in prepared:
                if isinstance(inputs, Future):
                    inputs.cancel()

    def _prepare(self, job: _Job) -> Any:
        return job.inputs if self._pool is None else self._pool.submit(self._llm.preprocess, job.inputs, job.sampling)

    def _start(self, job: _Job, inputs: Any) -> Any:
        left = self._patience()
        if left == 0:
            raise TimeoutError
        if self._llm is None:
            raise EngineError("TensorRT-LLM was closed; configure the node again")
        more = {"cache_salt": job.shapes} if self._salted else {}
        try:
            if isinstance(inputs, Future):
                inputs = inputs.result(timeout=left)
            return self._llm.generate_async(inputs, sampling_params=job.sampling, **more)
        except CancelledError as error:
            raise EngineError("TensorRT-LLM was closed while it was asked") from error
        except (FutureTimeout, TimeoutError):
            raise
        except Exception as error:
            raise self._failed(job.index, error) from error

    def _patience(self) -> float:
        """Seconds to wait for the next answer."""
        return STALL_S if self.deadline is None else min(STALL_S, max(0.0, self.deadline - time.monotonic()))

    def _reply(self, outcome: Any, index: int) -> Reply:
        if isinstance(outcome, (queue.Empty, TimeoutError)):
            raise outcome
        if isinstance(outcome, BaseException):
            raise self._failed(index, outcome) from outcome
        if getattr(outcome, "error", None):
            raise self._failed(index, outcome.error)
        said = outcome.outputs[0]
        if said.finish_reason in ("cancelled", "timeout"):
            raise self._failed(index, f"the request was {said.finish_reason}")
        ids = list(said.token_ids or ())
        ends = [at for at, token in enumerate(ids) if token in self._stop_ids]
        chances = read_logprobs(said.logprobs, ids)
        ids = ids[: ends[0] + 1] if ends else ids
        tokenizer = self._processor.tokenizer
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if chances is None:
            return Reply(text)
        return Reply(text, tuple(self._piece(token) for token in ids), tuple(chances[: len(ids)]))

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            tokenizer = self._processor.tokenizer
            shown = tokenizer.decode([token], clean_up_tokenization_spaces=False)
            self._pieces[token] = "" if token in self._special else shown
        return self._pieces[token]

    @staticmethod
    def _failed(index: int, error: BaseException | str) -> EngineError:
        kind = f"{type(error).__name__}: " if isinstance(error, BaseException) else ""
        first = (str(error).splitlines() or [""])[0]
        return EngineError(
            f"TensorRT-LLM can't answer question {index + 1}: {kind}{first}. Where a prompt is too long, raise "
            "max_seq_len in llm_api.yaml"
        )


def read_logprobs(logprobs: Any, ids: Sequence[int]) -> list[float] | None:
    """Logarithm of each generated token's probability, of either form in which releases tell it; None where it isn't.

    Args:
        logprobs: a number for each token, or a mapping of token ids to something with `logprob`.
        ids: the generated tokens.
    """
    if not logprobs or len(logprobs) < len(ids):
        return None
    read = []
    for token, told in zip(ids, logprobs, strict=False):
        if isinstance(told, dict):
            if token not in told:
                return None
            told = told[token]
        read.append(float(getattr(told, "logprob", told)))
    return read


def _collect(
    started: queue.SimpleQueue, answered: queue.SimpleQueue, deadline: float | None, over: threading.Event
) -> None:
    """Waits for each request in turn and hands on what came of it, up to the first None or until it is over."""
    while (item := started.get()) is not None and not over.is_set():
        index, running = item
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) + _GRACE_S
        try:
            outcome: Any = running.result(timeout=left)
        except BaseException as error:
            # Of asyncio's cancellation too, which is no Exception: somebody waits for a word about this request.
            outcome = error
        answered.put((index, outcome))


def _abort(requests: Any) -> None:
    for running in requests:
        try:
            running.abort()
        except Exception as error:
            _LOG.warning("a request of TensorRT-LLM can't be stopped: %s", error)


def _shapes(ask: Ask) -> str:
    """Sizes of a question's images: TensorRT-LLM tells images apart by their bytes alone, whatever their shape."""
    return ",".join(f"{image.shape[1]}x{image.shape[0]}" for image in ask.images)
