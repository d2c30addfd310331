"""TensorRT-LLM's LLM API as it is recorded, before transformers' own generation: no GPU, the real names.

Every class and method takes exactly what `depthlm_ros.engines.tensorrt_llm_contract` has recorded of upstream, and
refuses all else as upstream does. What a release may do otherwise is told by `Release`.
"""

from __future__ import annotations

import inspect
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import regex
import torch
from transformers import LogitsProcessor

from depthlm_ros.engines.tensorrt_llm_contract import MEMBERS, PARAMETERS
from depthlm_ros.engines.transformers_engine import TransformersEngine


@dataclass
class Release:
    """How one release, or one fault of it, differs.

    Attributes:
        without: names that it lacks, such as "LLM.preprocess" or "SamplingParams(top_k)".
        logprobs: "mappings" or "numbers".
        keeps_guides: whether guides hold.
        mixes_images: whether a reused prefix may be another image's.
        keeps_timeouts: whether `RequestOutput.result` gives up in time.
        fails_on: requests whose prompt holds this text fail; empty for none.
        seconds: that each request takes at least.
        together: nothing is answered before so many requests were under way at once; 0 waits for none.
        log: what happened, in order.
    """

    without: tuple[str, ...] = ()
    logprobs: str = "mappings"
    keeps_guides: bool = True
    mixes_images: bool = False
    keeps_timeouts: bool = True
    fails_on: str = ""
    seconds: float = 0.0
    together: int = 0
    log: list[tuple[str, Any]] = field(default_factory=list)

    def told(self, event: str) -> list[Any]:
        """What was logged of one kind."""
        return [what for kind, what in self.log if kind == event]


class RequestError(Exception):
    """A request that failed."""


def module(release: Release) -> dict[str, ModuleType]:
    """The modules to put into `sys.modules`."""
    package, api = ModuleType("tensorrt_llm"), ModuleType("tensorrt_llm.llmapi")
    package.__version__ = "1.2.1"
    package.llmapi = api
    for name in ("KvCacheConfig", "SamplingParams", "GuidedDecodingParams"):
        setattr(api, name, _settings_class(name, release))
    api.CompletionOutput = _outline("CompletionOutput", release)
    api.RequestOutput = _request_output(release)
    api.RequestError = RequestError
    api.TorchLlmArgs = SimpleNamespace(model_fields=dict.fromkeys(_taken("LLM", release)))
    api.LLM = _llm_class(release, api)
    return {"tensorrt_llm": package, "tensorrt_llm.llmapi": api}


def _taken(name: str, release: Release) -> list[str]:
    return [one for one in PARAMETERS[name].known if f"{name}({one})" not in release.without]


def _members(name: str, release: Release) -> list[str]:
    return [one for one in MEMBERS[name].known if f"{name}.{one}" not in release.without]


def _signature(names: Iterable[str], *, method: bool) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if method else inspect.Parameter.KEYWORD_ONLY
    own = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)] if method else []
    return inspect.Signature([*own, *(inspect.Parameter(one, kind, default=None) for one in names)])


def _settings_class(name: str, release: Release) -> type:
    signature = _signature(_taken(name, release), method=False)

    def __init__(self: Any, *args: Any, **told: Any) -> None:
        bound = signature.bind(*args, **told)
        bound.apply_defaults()
        self.__dict__.update(bound.arguments)

    return type(name, (), {"__init__": __init__, "__signature__": signature})


def _outline(name: str, release: Release) -> type:
    return type(name, (), {"__annotations__": dict.fromkeys(_members(name, release))})


def _strict(release: Release, name: str, function: Callable) -> Callable:
    """A method that takes what is recorded, by those names."""
    signature = _signature(_taken(name, release), method=True)

    def method(*args: Any, **told: Any) -> Any:
        bound = signature.bind(*args, **told)
        bound.apply_defaults()
        return function(**bound.arguments)

    method.__signature__ = signature
    return method


def _request_output(release: Release) -> type:
    def result(self: Any, timeout: float | None) -> Any:
        if not self._done.wait(timeout if release.keeps_timeouts else None):
            raise queue.Empty
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self

    def abort(self: Any) -> None:
        release.log.append(("abort", self.prompt))
        self._aborted.set()

    body = dict.fromkeys(_members("RequestOutput", release))
    body |= {"result": _strict(release, "RequestOutput.result", result), "abort": abort}
    return type("RequestOutput", (), {name: body[name] for name in _members("RequestOutput", release)})


def _llm_class(release: Release, api: ModuleType) -> type:
    def __init__(self: Any, model: Any = None, **told: Any) -> None:
        unknown = [name for name in told if name not in api.TorchLlmArgs.model_fields]
        if unknown:
            raise ValueError(f"LLM got invalid argument: {unknown[0]}")
        if not isinstance(told.get("kv_cache_config"), api.KvCacheConfig):
            raise ValueError("kv_cache_config: Input should be a valid KvCacheConfig")
        release.log.append(("LLM", {"model": model, **told}))
        self._reuse = bool(told["kv_cache_config"].enable_block_reuse)
        self._guides = release.keeps_guides and told.get("guided_decoding_backend") is not None
        self._runs = _Runs(Path(model), release, self._guides, self._reuse)

    def generate_async(self: Any, **told: Any) -> Any:
        assert threading.get_ident() == self.__dict__.setdefault("_thread", threading.get_ident()), "two threads"
        return self._runs.start(api.RequestOutput, **told)

    def preprocess(self: Any, inputs: Any, sampling_params: Any) -> Any:
        release.log.append(("preprocess", inputs["prompt"]))
        return SimpleNamespace(preprocessed=inputs)

    def shutdown(self: Any) -> None:
        release.log.append(("shutdown", None))
        self._runs.close()

    body = dict.fromkeys(_members("LLM", release))
    body |= {
        "generate_async": _strict(release, "LLM.generate_async", generate_async),
        "preprocess": _strict(release, "LLM.preprocess", preprocess),
        "shutdown": shutdown,
    }
    own = {name: body[name] for name in _members("LLM", release)}
    signature = inspect.Signature(
        [
            inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
        ]
    )
    return type("LLM", (), {**own, "__init__": __init__, "__signature__": signature})


class _Runs:
    """Requests one after the other in a thread, answered by transformers' own greedy generation."""

    def __init__(self, folder: Path, release: Release, guides: bool, reuse: bool) -> None:
        self._release, self._guides, self._reuse = release, guides, reuse
        self._engine = TransformersEngine.load(folder, device="cpu", dtype="float32", plain=True)
        self._pool = ThreadPoolExecutor(1)
        self._first: dict[tuple, list[int]] = {}
        self._under_way = self._most = 0
        self._lock, self._made = threading.Lock(), time.monotonic()

    def start(
        self, kind: type, inputs: Any, sampling_params: Any, cache_salt: str | None = None, **rest: Any
    ) -> Any:
        assert not any(rest.values()), rest
        inputs = getattr(inputs, "preprocessed", inputs)
        running = kind.__new__(kind)
        running.prompt, running._outcome = inputs["prompt"], None
        running._done, running._aborted = threading.Event(), threading.Event()
        with self._lock:
            self._under_way += 1
            self._most = max(self._most, self._under_way)
            self._release.log.append(("under way", self._under_way))
        self._release.log.append(("start", (inputs["prompt"], cache_salt)))
        self._pool.submit(self._run, running, inputs, sampling_params, cache_salt)
        return running

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, running: Any, inputs: dict, sampling: Any, salt: str | None) -> None:
        try:
            until = time.monotonic() + self._release.seconds
            while (time.monotonic() < until or self._few()) and not running._aborted.is_set():
                time.sleep(0.005)
            if running._aborted.is_set():
                running.outputs = [SimpleNamespace(text="", token_ids=[], finish_reason="cancelled", logprobs=None)]
            elif self._release.fails_on and self._release.fails_on in inputs["prompt"]:
                raise RequestError("prompt length 5000 exceeds max_seq_len 4096")
            else:
                running.outputs = [self._answer(inputs, sampling, salt)]
        except Exception as error:
            running._outcome = error
        finally:
            with self._lock:
                self._under_way -= 1
            self._release.log.append(("done", inputs["prompt"]))
            running._done.set()

    def _few(self) -> bool:
        """Whether fewer than are waited for were under way at once; not for ever, so that a test can say so."""
        return self._most < self._release.together and time.monotonic() < self._made + 120

    def _answer(self, inputs: dict, sampling: Any, salt: str | None) -> Any:
        images = [np.array(image) for image in inputs.get("multi_modal_data", {}).get("image", ())]
        # What a cache of blocks that looks at the beginning alone would take for the same.
        key = (inputs["prompt"], salt, images[0][: len(images[0]) // 2].tobytes() if images else b"")
        ids, logits = self._generate(inputs["prompt"], images, sampling)
        if self._release.mixes_images and self._reuse:
            ids = self._first.setdefault(key, ids)
        logprobs = torch.log_softmax(logits.float(), -1)
        chances = [float(row[token]) for row, token in zip(logprobs, ids, strict=False)]
        if self._release.logprobs == "mappings":
            best = logprobs.argmax(-1).tolist()
            told = [
                {other: _logprob(row[other]), token: _logprob(chance)}
                for token, chance, other, row in zip(ids, chances, best, logprobs, strict=False)
            ]
        else:
            told = chances
        told = told if sampling.logprobs else None
        return SimpleNamespace(index=0, text=None, token_ids=ids, finish_reason="stop", logprobs=told)

    @torch.inference_mode()
    def _generate(self, prompt: str, images: Sequence[np.ndarray], sampling: Any) -> tuple[list[int], torch.Tensor]:
        assert sampling.temperature == 0 and sampling.top_k == 1, "not greedy"
        stops, guided = getattr(sampling, "stop_token_ids", []), getattr(sampling, "guided_decoding", None)
        processor, model = self._engine.processor, self._engine.model
        prepared = [processor.images([image]) for image in images]
        ids = processor.tokenizer(prompt, add_special_tokens=bool(sampling.add_special_tokens))["input_ids"]
        placeholders = [processor._placeholders(one.grid_hw) for one in prepared]
        whole = torch.tensor([processor._expand(ids, placeholders)])
        tensors = {name: torch.cat([one.tensors[name] for one in prepared]) for name in prepared[0].tensors}
        guides = []
        if guided and self._guides:
            guides = [_Guide(guided.regex, processor.tokenizer, stops, whole.shape[1])]
        out = model.generate(
            input_ids=whole,
            attention_mask=torch.ones_like(whole),
            mm_token_type_ids=(whole == processor.image_token_id).int(),
            do_sample=False,
            max_new_tokens=sampling.max_tokens,
            return_dict_in_generate=True,
            output_logits=True,
            logits_processor=guides,
            **tensors,
        )
        return out.sequences[0, whole.shape[1] :].tolist(), torch.cat(out.logits)


def _logprob(value: Any) -> SimpleNamespace:
    return SimpleNamespace(logprob=float(value), rank=1)


class _Guide(LogitsProcessor):
    """Only what can still become a match of the whole regular expression; its end where it is one."""

    def __init__(self, pattern: str, tokenizer: Any, stops: Sequence[int], start: int) -> None:
        self._pattern, self._tokenizer, self._stops, self._start = pattern, tokenizer, list(stops), start
        self._special = set(tokenizer.all_special_ids)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = self._tokenizer.decode(ids[0, self._start :], clean_up_tokenization_spaces=False)
        allowed = torch.full_like(scores, -torch.inf)
        if regex.fullmatch(self._pattern, said):
            allowed[0, self._stops] = scores[0, self._stops]
        for token in range(scores.shape[1]):
            piece = "" if token in self._special else self._tokenizer.decode([token])
            if piece and regex.fullmatch(self._pattern, said + piece, partial=True):
                allowed[0, token] = scores[0, token]
        return allowed
