"""A server with OpenAI's chat completions (vLLM, SGLang, TensorRT-LLM, llama.cpp ...) as a contender, by its URL.

The image comes first, as a data URL that is the same for every point, so that servers which keep prefixes and images
can do so; the round that isn't counted fills their caches.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import numpy as np

from depthlm_ros.bench.contenders import Frame
from depthlm_ros.errors import ConfigError, EngineError

TIMEOUT_S = 600.0


class Served:
    """Asks a server, a number of questions at a time.

    Args:
        url: such as http://localhost:8000 or http://localhost:8000/v1.
        model: the name that the server knows it by.
        concurrency: requests under way at once.
        limit: most points in a round.
        processes: of a server on this machine, stopped from the first answer on while it isn't asked: servers that
            wait by polling take a core from whoever is measured meanwhile. `wake` lets them run again.
    """

    def __init__(
        self, url: str, model: str, concurrency: int, limit: int | None, processes: Sequence[int] = ()
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"server {url!r} is no URL; give one like http://localhost:8000/v1")
        self.name = f"served, {concurrency} at once"
        self.limit = limit
        self.work: dict[str, int] = {}
        self.texts: list[str] = []
        self._model = model
        self._concurrency = concurrency
        self._processes = tuple(processes)
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        path = parts.path.rstrip("/")
        self._path = f"{path if path.endswith('/v1') else path + '/v1'}/chat/completions"
        self._local = threading.local()
        self._urls: dict[int, str] = {}

    def answer(self, frame: Frame) -> list[tuple[int, ...]]:
        """Asks all; the answers are in `texts`, since a server gives no token ids."""
        if frame.dialect == "dense":
            raise ConfigError("a server has no dense head; leave the dialect dense out for it")
        images = [self._data_url(frame.shown(row)) for row in range(len(frame))]
        bodies = [self._body(image, text, frame.longest) for image, text in zip(images, frame.questions, strict=True)]
        with self._awake(), ThreadPoolExecutor(self._concurrency) as pool:
            self.texts = list(pool.map(self._ask, bodies))
        return []

    def wake(self) -> None:
        """Lets the server's processes run."""
        self._send(signal.SIGCONT)

    @contextmanager
    def _awake(self) -> Iterator[None]:
        self.wake()
        try:
            yield
        finally:
            self._send(signal.SIGSTOP)

    def _send(self, what: signal.Signals) -> None:
        for process in self._processes:
            try:
                os.kill(process, what)
            except OSError as error:
                raise ConfigError(f"process {process} of the server: {error.strerror}; name those it has") from error

    def _data_url(self, image: np.ndarray) -> str:
        if id(image) not in self._urls:
            from PIL import Image

            file = io.BytesIO()
            Image.fromarray(image).save(file, "png", compress_level=1)
            self._urls[id(image)] = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
        return self._urls[id(image)]

    def _body(self, image: str, question: str, longest: int) -> bytes:
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        asked = {"model": self._model, "messages": [message], "temperature": 0, "max_tokens": longest}
        return json.dumps(asked).encode("utf-8")

    def _ask(self, body: bytes) -> str:
        connection = getattr(self._local, "connection", None)
        try:
            return self._post(connection or self._connect(), body)
        except (http.client.HTTPException, OSError) as error:
            self._local.connection = None
            if connection is None:
                raise EngineError(f"server {self._host}:{self._port} does not answer: {error}") from error
        return self._ask(body)  # a kept connection may have been closed meanwhile; a new one tells

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        self._local.connection = kind(self._host, self._port, timeout=TIMEOUT_S)
        return self._local.connection

    def _post(self, connection: http.client.HTTPConnection, body: bytes) -> str:
        connection.request("POST", self._path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        said = response.read()
        if response.status != 200:
            raise EngineError(
                f"server {self._host}:{self._port} says {response.status}: {said[:300].decode('utf-8', 'replace')}"
            )
        try:
            message = json.loads(said)["choices"][0]["message"]
        except (ValueError, LookupError, TypeError) as error:
            raise EngineError(f"server {self._host}:{self._port}: no chat completion: {said[:300]!r}") from error
        # Some servers take the thinking out of the answer.
        thought = message.get("reasoning_content")
        return (f"<think>{thought}</think>" if thought else "") + (message.get("content") or "")


def same_text(served: Sequence[str], plain: Sequence[str]) -> int:
    """How many answers have the same words, white space aside."""
    return sum(a.split() == b.split() for a, b in zip(served, plain, strict=True))
