"""A module with the names of the native runtime of tensorrt-edgellm 0.11.0, and no others.

`golden/edge_llm_bindings_0_11_0.json` was read from the wheel's own module (its x86_64 payload, imported with empty
libraries in the place of TensorRT's and the driver's): classes, their attributes, and the names of arguments.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np

BINDINGS = json.loads(Path(__file__).with_name("golden").joinpath("edge_llm_bindings_0_11_0.json").read_text())


class _Strict:
    """An object with the recorded attributes and no others."""

    _names: tuple[str, ...] = ()

    def __init__(self, *values, **named):
        told = {**dict(zip(self._signature, values, strict=False)), **named}
        assert len(values) <= len(self._signature) and set(told) <= set(self._signature)
        for name, value in told.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name, value):
        assert name in self._names, f"{type(self).__name__} has no {name}"
        object.__setattr__(self, name, value)


def bindings(**changed) -> ModuleType:
    """A module with the names that were read from the wheel's runtime."""
    module = ModuleType("_edgellm_runtime")
    for name, names in BINDINGS["classes"].items():
        signature = tuple(BINDINGS["signatures"].get(name, ()))
        members = {m: f"{name}.{m}" for m in names if m.isupper()}
        kind = type(name, (_Strict,), {"_names": tuple(names), "_signature": signature, **members})
        setattr(module, name, kind)
    module.load_image_from_bytes = lambda data: _loaded(module, data)
    for name, value in changed.items():
        setattr(module, name, value)
    return module


def _loaded(module, data):
    loaded = module.ImageData()
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    loaded.height, loaded.width = pixels.shape[:2]
    object.__setattr__(loaded, "red", int(pixels[0, 0, 2]))
    return loaded


class Runtime:
    """Answers with the question's length and the red of the image's first pixel."""

    def __init__(self, module, *arguments):
        assert len(arguments) == len(BINDINGS["signatures"]["LLMRuntime"])
        self.module, self.arguments, self.requests = module, arguments, []
        self.reason = module.FinishReason.END_ID

    def capture_decoding_cuda_graph(self):
        return True

    def handle_request(self, request):
        self.requests.append(request)
        response = self.module.LLMGenerationResponse()
        texts = []
        for one in request.requests:
            question = one.messages[-1].contents[-1]
            assert [c.type for c in one.messages[-1].contents] == ["image", "text"]
            assert all(i.do_resize is False for i in one.image_buffers)
            texts.append(f"{len(question.content)}.{one.image_buffers[0].red:02d}")
        response.output_texts = texts
        response.finish_reasons = [self.reason] * len(texts)
        response.logprobs = [[[SimpleNamespace(piece=c.encode(), logprob=-0.5)] for c in text] for text in texts]
        return response
