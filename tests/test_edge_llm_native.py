"""Engine edge_llm in process, on a module with the names of the wheel's bindings."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from edge_llm_bindings import BINDINGS, Runtime, bindings

from depthlm_ros.engines.edge_llm_native import NAMES, NativeBackend
from depthlm_ros.engines.edge_llm_requests import Limits
from depthlm_ros.engines.worded import Ask
from depthlm_ros.errors import EngineError

LIMITS = Limits(input_tokens=384, capacity=512, batch=4, least_image=4, most_image=12, most_images=48, pixels=32)


def image(red: int, width: int = 128, height: int = 96) -> np.ndarray:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = red
    return pixels


def native(**options):
    module = bindings()
    made: list[Runtime] = []
    module.LLMRuntime = lambda *arguments: made.append(Runtime(module, *arguments)) or made[-1]
    return NativeBackend(module, Path("/engines"), LIMITS, "Be brief.", **options), made[0], module


def test_the_names_that_are_used_are_among_those_of_the_wheel():
    assert set(NAMES) <= set(BINDINGS["classes"]) | set(BINDINGS["functions"])


def test_the_runtime_in_process_is_asked_once_ahead_and_then_in_batches():
    backend, runtime, module = native()
    shown = image(12)
    asks = [Ask((shown,), "a" * n, 16, "[0-9]+") for n in range(1, 8)]
    replies = backend.ask(asks)
    assert [reply.text for reply in replies] == [f"{n}.12" for n in range(1, 8)]
    assert replies[0].pieces == ("1", ".", "1", "2") and replies[0].logprobs == (-0.5,) * 4
    assert [len(request.requests) for request in runtime.requests] == [1, 4, 2]
    first = runtime.requests[0]
    assert (first.top_k, first.temperature, first.max_generate_length) == (1, 1.0, 16)
    assert first.context_cache_lookup_policy == module.ContextCacheLookupPolicy.USE_CACHE
    assert first.requests[0].guided_decoding.type == module.GuideType.REGEX
    assert [message.role for message in first.requests[0].messages] == ["system", "user"]
    engines, media, adapters, checkpoint, cache = runtime.arguments
    assert (engines, media, adapters, checkpoint, cache.enabled) == ("/engines", "/engines", {}, "", True)


def test_without_reuse_nothing_is_asked_ahead():
    backend, runtime, module = native(reuse=False, batch=3)
    backend.ask([Ask((image(1),), "a", 16)] * 4)
    assert [len(request.requests) for request in runtime.requests] == [3, 1]
    assert runtime.requests[0].context_cache_lookup_policy == module.ContextCacheLookupPolicy.BYPASS


def test_what_the_runtime_does_wrong_is_an_error():
    backend, runtime, module = native()
    asks = [Ask((image(1),), "a", 16)] * 2
    for reason in (module.FinishReason.ERROR, module.FinishReason.CANCELLED):
        runtime.reason = reason
        with pytest.raises(EngineError, match="couldn't answer"):
            backend.ask(asks)
    runtime.handle_request = lambda request: (_ for _ in ()).throw(RuntimeError("EDGELLM_INPUT_TOO_LONG"))
    with pytest.raises(EngineError, match="EDGELLM_INPUT_TOO_LONG"):
        backend.ask(asks)
    backend.deadline = time.monotonic() - 1
    with pytest.raises(EngineError, match="deadline passed after 0 of 2"):
        backend.ask(asks)
    backend.close()
    with pytest.raises(EngineError, match="closed"):
        backend.ask(asks)


@pytest.mark.parametrize(
    "odd",
    [
        {"logprobs": [[[SimpleNamespace(piece=None, logprob=-1.0)]]]},
        {"logprobs": [[[SimpleNamespace(piece=b"1", logprob="much")]]]},
        {"logprobs": [[], []]},
        {"logprobs": 5},
        {"output_texts": None},
        {"finish_reasons": None},
    ],
)
def test_odd_values_of_the_runtime_are_an_error_of_the_engine(odd):
    backend, runtime, module = native()
    whole = {"output_texts": ["1"], "finish_reasons": [module.FinishReason.END_ID], "logprobs": []}
    runtime.handle_request = lambda request: SimpleNamespace(**{**whole, **odd})
    with pytest.raises(EngineError, match="TensorRT Edge-LLM failed: "):
        backend.ask([Ask((image(1),), "a", 16)])


def test_nothing_asked_is_nothing_answered():
    backend, runtime, _ = native()
    assert backend.ask([]) == [] and runtime.requests == []


def test_engines_that_do_not_load_name_the_remedy():
    def fails(*arguments):
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(EngineError, match="out of memory.*build_on_device.sh"):
        NativeBackend(bindings(LLMRuntime=fails), Path("/engines"), LIMITS, None)
