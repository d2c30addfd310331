"""A server on loopback that speaks chat completions as four kinds of servers do, and fails in whichever way it is told.

Its answers depend on image and question alone. It takes and refuses the fields that the server of its dialect takes and
refuses, so that a client that sends one too many is noticed.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import math
import re
import select
import socket
import ssl
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import cv2
import numpy as np

HUGE_BLOCKS = 4096
NUMBER_OF_GUIDE = r"[0-9]{1,5}(\.[0-9]{1,4})?"
LOGPROB = math.log(0.9)
FAULTS = (
    "hang", "reset", "429", "500", "503", "drip", "drip_headers", "truncated", "cut_json", "wrong_json", "html",
    "wrong_model", "empty_choices", "null", "huge", "packed", "no_text", "cancelled",
)  # fmt: skip
_COMMON = {"model", "messages", "temperature", "max_tokens", "max_completion_tokens", "top_p", "seed", "logprobs",
           "top_logprobs", "stop", "n", "stream", "logit_bias", "response_format"}  # fmt: skip
_FIELDS = {
    "trtllm-serve": _COMMON | {"repetition_penalty", "top_k", "mm_processor_kwargs", "cache_salt", "stop_token_ids"},
    "edge-llm": _COMMON | {"top_k", "guided_decoding", "reuse_context", "enable_thinking"},
    "transformers": _COMMON | {"generation_config", "chat_template_kwargs"},
}
_GUIDE_FIELDS = {"trtllm-serve": "response_format", "vllm": "structured_outputs", "edge-llm": "guided_decoding"}
_OWNERS = {"trtllm-serve": "tensorrt_llm", "vllm": "vllm", "edge-llm": "tensorrt-edgellm", "generic": "somebody"}


class FaultServer:
    """Starts with the `with` statement.

    Attributes:
        dialect: whose server it pretends to be.
        model: the name that it lists.
        fault: one of `FAULTS`, "" for none; may be changed at any time.
        times: how often it fails, after which it is well; None for ever.
        everywhere: whether the fault is in every page and not only in the answers to questions.
        retry_after: what a 429 says in its header; None for nothing.
        guides: whether guides are kept to; a server without a guided-decoding backend takes and drops them.
        tells: whether it tells probabilities.
        refuses: fields that get a 400 although the dialect has them.
        delay_s: seconds that an answer takes.
        owner: what it says of a model's owner; None for what servers of its dialect say.
        lists: whether it can list its models.
        card: what else it lists of its model.
        guide_field: name of the field that it takes a guide from; None for that of its dialect.
        schema: what it says on /openapi.json; None for nothing.
        key: that is wanted; None for none.
        most: questions it has room for, the next gets a 429; None for any number.
        requests: what it was asked, in order: the JSON of each question.
        sent_away: how many got a 429 for want of room.
        prompts: the text of each.
        said: the answer to each.
        busiest: most questions that were under way at once.
        pages: GETs that were asked.
        posts: how many POSTs came.
        blocks: of 64 KiB that it has sent of huge answers.
    """

    def __init__(self, dialect: str = "vllm", model: str = "small") -> None:
        self.dialect, self.model = dialect, model
        self.fault, self.everywhere = "", False
        self.times: int | None = None
        self.retry_after: float | None = 1.0
        self.guides = self.tells = True
        self.refuses: set[str] = set()
        self.owner: str | None = None
        self.lists = True
        self.card: dict = {}
        self.guide_field: str | None = None
        self.schema: dict | None = None
        self.delay_s = 0.0
        self.key: str | None = None
        self.most: int | None = None
        self.requests: list[dict] = []
        self.prompts: list[str] = []
        self.said: list[str] = []
        self.pages: list[str] = []
        self.under_way = self.busiest = self.sent_away = self.posts = self.blocks = 0
        self.lock = threading.Lock()
        self._port = 0
        self._place: socket.socket | None = None
        self._scheme = "http"
        self._http: ThreadingHTTPServer | None = None
        self._open: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._port}"

    def start(self) -> FaultServer:
        """Listens; on the same port as before."""
        owner = self
        if self._place is None:
            # Bound and not listening: connections are refused while it is stopped, and nobody else gets the port.
            self._place = socket.socket()
            self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._place.bind(("127.0.0.1", 0))
            self._port = self._place.getsockname()[1]

        class Handler(_Handler):
            server_side = owner

        class Http(ThreadingHTTPServer):
            allow_reuse_address = True
            daemon_threads = True
            request_queue_size = 128

            def get_request(self):
                # Here and not in the handler's thread, which may begin when the server has been stopped.
                connection, address = super().get_request()
                owner.track(connection, True)
                return connection, address

            def shutdown_request(self, request):
                owner.track(request, False)
                super().shutdown_request(request)

            def handle_error(self, request, client_address):
                """A client that has gone is what many tests are about."""

        self._http = Http(("127.0.0.1", self._port), Handler)
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def secure(self, context: ssl.SSLContext) -> None:
        """Speaks TLS from now on."""
        self._scheme = "https"
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)

    def stop(self) -> None:
        """Stops listening and drops every connection, as a process does that is killed."""
        with self.lock:
            http, self._http = self._http, None
        if http is None:
            return
        http.shutdown()
        http.server_close()
        with self.lock:
            left = list(self._open)
        for connection in left:
            reset(connection)

    def __enter__(self) -> FaultServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._place.close()

    @property
    def connections(self) -> int:
        """How many are open."""
        with self.lock:
            return len(self._open)

    @property
    def running(self) -> bool:
        return self._http is not None

    def number(self, image: bytes, text: str) -> str:
        """The number it says: of its own for each image and question."""
        return f"{1 + zlib.crc32(image + text.encode()) % 900 / 100:.2f}"

    def say(self, images: list[bytes], text: str, guide: str) -> str:
        """Its answer."""
        number = self.number(b"".join(images), text)
        if not guide:
            return number
        said = guide.replace(NUMBER_OF_GUIDE, number)
        return re.sub(r"\\(.)", r"\1", said)

    def track(self, connection: socket.socket, is_open: bool) -> None:
        with self.lock:
            (self._open.add if is_open else self._open.discard)(connection)


def reset(connection: socket.socket) -> None:
    """Ends a connection so that the peer sees a reset."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        connection.close()


class _Refuse(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server_side: FaultServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    _counted = False

    def finish(self):
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_):
        pass

    def do_GET(self):
        side = self.server_side
        with side.lock:
            side.pages.append(self.path)
        if side.everywhere and side.fault and self._fail():
            return
        if self.path.startswith("/v1") and not self._may_enter():
            return
        if self.path == "/v1/models" and not side.lists:
            self._send(500, b"Internal Server Error", "text/plain")
            return
        page = self._page()
        self._json(200 if page is not None else 404, page if page is not None else {"detail": "Not Found"})

    def do_POST(self):
        side = self.server_side
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        with side.lock:
            side.posts += 1
        if not self._may_enter():
            return
        with side.lock:
            self._counted = True
            side.under_way += 1
            side.busiest = max(side.busiest, side.under_way)
            full = side.most is not None and side.under_way > side.most
            side.sent_away += full
        try:
            if full:
                self._json(429, self._error(429, "server overloaded"), {"Retry-After": "1"})
            elif side.fault and self._fail():
                pass
            elif self.path != "/v1/chat/completions":
                self._json(404, {"detail": "Not Found"})
            else:
                self._answer(json.loads(raw))
        finally:
            self._count_off()

    def _count_off(self) -> None:
        """The question isn't under way any more."""
        side = self.server_side
        with side.lock:
            side.under_way -= self._counted
            self._counted = False

    # What it says

    def _page(self) -> Any:
        side = self.server_side
        owner = side.owner if side.owner is not None else _OWNERS.get(side.dialect)
        if self.path == "/openapi.json":
            return side.schema
        if self.path == "/v1/models":
            # transformers serve lists what lies in the hub's cache.
            card = {"id": side.model, "object": "model", "created": 1, "owned_by": owner, **side.card}
            return {"object": "list", "data": [card] if owner else []}
        if self.path == "/version" and side.dialect in ("vllm", "trtllm-serve"):
            return {"version": "0.32.0" if side.dialect == "vllm" else "1.3.0"}
        if self.path == "/health":
            if side.dialect == "edge-llm":
                return {"status": "ok", "capabilities": {"max_batch_size": 4, "in_flight_batching": True}}
            return {"status": "ok"} if side.dialect == "transformers" else ""
        return None

    def _answer(self, asked: dict) -> None:
        side = self.server_side
        try:
            images, text, guide = self._read(asked)
        except _Refuse as error:
            self._json(error.status, self._error(error.status, str(error)))
            return
        said = side.say(images, text, guide)
        with side.lock:
            side.requests.append(asked)
            side.prompts.append(text)
            side.said.append(said)
        if side.delay_s and not self._rest(side.delay_s):
            return
        self._json(200, self._completion(said, asked))

    def _completion(self, said: str, asked: dict) -> dict:
        side = self.server_side
        tokens = None
        if side.tells and asked.get("logprobs") and side.dialect != "transformers":
            # The end of the answer is a token of its own.
            tokens = {"content": [{"token": c, "logprob": LOGPROB, "bytes": None} for c in [*said, "<|im_end|>"]]}
        longest = asked.get("max_tokens", asked.get("max_completion_tokens", 16))
        ended = "stop" if len(said) <= longest * 8 else "length"
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": ended,
                  "logprobs": tokens}  # fmt: skip
        model = f"{side.model}@main" if side.dialect == "transformers" else side.model
        return {"id": "1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}  # fmt: skip

    def _read(self, asked: dict) -> tuple[list[bytes], str, str]:
        """Images, text and guide of a question, after the checks of the dialect."""
        side = self.server_side
        known = _FIELDS.get(side.dialect)
        unknown = sorted((set(asked) - known if known else set()) | (set(asked) & side.refuses))
        if unknown:
            refused = 422 if side.dialect == "transformers" else 400
            raise _Refuse(refused, f"Extra inputs are not permitted: {', '.join(unknown)}")
        if "max_tokens" in asked and "max_completion_tokens" in asked:
            raise _Refuse(400, "both max_tokens and max_completion_tokens")
        if asked.get("model") != side.model and side.dialect in ("vllm", "edge-llm"):
            raise _Refuse(404, f"The model `{asked.get('model')}` does not exist.")
        if "top_logprobs" in asked and not asked.get("logprobs"):
            raise _Refuse(400, "top_logprobs requires logprobs")
        form = asked.get("response_format")
        if form and (form.get("type") != "regex" or side.dialect != "trtllm-serve"):
            raise _Refuse(400, "response_format: unknown type")
        field = side.guide_field or _GUIDE_FIELDS.get(side.dialect, "")
        guide = asked.get(field, "")
        guide = guide.get("regex", "") if isinstance(guide, dict) else guide
        images, texts = [], []
        for message in asked["messages"]:
            content = message["content"]
            for item in [] if isinstance(content, str) else content:
                if item["type"] == "image_url":
                    images.append(self._image(item["image_url"]["url"]))
                else:
                    texts.append(item["text"])
        return images, "\n".join(texts), guide if side.guides else ""

    @staticmethod
    def _image(url: str) -> bytes:
        found = re.fullmatch(r"data:image/(?:png|jpeg);base64,([A-Za-z0-9+/=]+)", url)
        if not found:
            raise _Refuse(400, "image_url must be a base64 data URL")
        try:
            data = base64.b64decode(found[1], validate=True)
        except binascii.Error as error:
            raise _Refuse(400, str(error)) from error
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise _Refuse(400, "not an image")
        return image.tobytes()

    def _error(self, status: int, text: str) -> dict:
        dialect = self.server_side.dialect
        if dialect == "trtllm-serve":
            return {"error": text}
        if dialect == "transformers":
            return {"detail": text}
        return {"error": {"message": text, "type": "error", "param": None, "code": status}}

    def _may_enter(self) -> bool:
        key = self.server_side.key
        sent = self.headers.get("Authorization", "")
        if key is None or sent == f"Bearer {key}":
            return True
        self._json(401, {"error": f"Unauthorized: {sent}"})
        return False

    def _json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(body).encode(), "application/json", headers)

    def _send(self, status: int, raw: bytes, kind: str, headers: dict[str, str] | None = None, cut: int = 0) -> None:
        # Before it is said: who hears it asks the next question at once.
        self._count_off()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        if self.server_side.dialect == "transformers":
            self.send_header("x-request-id", "1")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw[: len(raw) - cut])

    # How it fails

    def _fail(self) -> bool:
        """Fails as it was told; False where that fault is gone again."""
        side = self.server_side
        good = self._completion("1.00", {"logprobs": True})
        with side.lock:
            fault = side.fault
            if fault and side.times is not None:
                side.times -= 1
                side.fault = fault if side.times > 0 else ""
        if fault == "hang":
            self._rest(3600.0)
            self.close_connection = True
        elif fault == "reset":
            self.close_connection = True
            reset(self.connection)
        elif fault in ("429", "500", "503"):
            told = {} if side.retry_after is None or fault != "429" else {"Retry-After": str(side.retry_after)}
            self._json(int(fault), self._error(int(fault), "as told"), told)
        elif fault in ("drip", "drip_headers"):
            self._drip(json.dumps(good).encode(), fault == "drip_headers")
        elif fault in ("truncated", "cut_json"):
            raw = json.dumps(good).encode()
            if fault == "truncated":
                self._send(200, raw, "application/json", cut=len(raw) // 2)
                self.close_connection = True
            else:
                self._send(200, raw[: len(raw) // 2], "application/json")
        elif fault == "huge":
            self._huge()
        elif fault == "packed":
            self._send(200, b"\x1f\x8b", "application/json", {"Content-Encoding": "gzip"})
        elif fault == "html":
            self._send(200, b"<html><body>It works!</body></html>", "text/html")
        elif fault:
            self._json(200, {
                "wrong_json": {"hello": [1, 2]},
                "wrong_model": good | {"model": "another"},
                "empty_choices": good | {"choices": []},
                "null": None,
                "no_text": good | {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]},
                "cancelled": good | {"choices": [{"message": {"content": "1"}, "finish_reason": "cancelled"}]},
            }[fault])  # fmt: skip
        else:
            return False
        return True

    def _rest(self, seconds: float) -> bool:
        """Waits; False when the client has gone or the fault has changed meanwhile."""
        side, until, fault = self.server_side, time.monotonic() + seconds, self.server_side.fault
        while (left := until - time.monotonic()) > 0:
            readable, _, _ = select.select([self.connection], [], [], min(left, 0.02))
            if (readable and not self.connection.recv(1, socket.MSG_PEEK)) or side.fault != fault:
                self.close_connection = True
                return False
        return True

    def _drip(self, raw: bytes, headers: bool) -> None:
        if headers:
            raw = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
        for byte in raw:
            self.wfile.write(bytes([byte]))
            if not self._rest(0.25):
                return

    def _huge(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.close_connection = True
        block = b'"' + b"x" * (1 << 16)
        for _ in range(HUGE_BLOCKS):
            self.wfile.write(block)
            self.server_side.blocks += 1
