"""Bytes to a server and back: a pool of connections, time limits for whole answers, caps, a way to break them off."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from depthlm_ros.engines.served.address import EXAMPLE, Address, Key
from depthlm_ros.errors import ConfigError, MissingDependencyError

# An answer of a few numbers has 1 KB, with the probabilities of its tokens 20.
MOST_ANSWER_BYTES = 4 << 20
# Servers close idle connections after 5 s (uvicorn, trtllm-serve, vLLM). A request that is sent just then is lost.
IDLE_S = 2.0
CONNECT_S = 2.0
_QUOTED = 300


class Refused(Exception):
    """No connection, or one that was closed before anything came back: nothing has been answered.

    Args:
        reason: why, for a person.
        again: whether a new connection could do better at once.
    """

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


class TimedOut(Exception):
    """Sent, and not answered in time; the server may still be at it."""


class Broken(Exception):
    """An answer that isn't one: cut off, too long, in another encoding."""


@dataclass(frozen=True)
class Response:
    """What came back.

    Attributes:
        status: HTTP's.
        body: as sent.
        headers: names in small letters.
    """

    status: int
    body: bytes
    headers: dict[str, str]

    def json(self) -> Any:
        """The body as JSON; None where it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


def import_httpx() -> Any:
    """httpx2, or httpx where that isn't there: it needs Python 3.11.

    Raises:
        MissingDependencyError: neither is installed.
    """
    try:
        import httpx2 as httpx
    except ImportError:
        try:
            import httpx
        except ImportError as error:
            raise MissingDependencyError(
                'engine openai needs httpx2, or httpx with Python 3.10; run: pip install "httpx2>=2" (or "httpx>=0.27")'
            ) from error
    return httpx


class Client:
    """Talks to one server from many threads.

    Args:
        address: where.
        key: sent with every request.
        connections: most at once.

    Raises:
        ConfigError: no request can be sent to the address, or the proxy in the environment is none.
        MissingDependencyError: httpx isn't installed.
    """

    def __init__(self, address: Address, key: Key, connections: int) -> None:
        self.address = address
        self._key = key
        self._httpx = import_httpx()
        try:
            self._httpx.URL(address.base)
        except (self._httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"server_urls: {address.base!r} is no URL ({error}); give one like {EXAMPLE}") from error
        limits = self._httpx.Limits(
            max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=IDLE_S
        )
        # The system's authorities, or those of SSL_CERT_FILE and SSL_CERT_DIR.
        authorities = ssl.create_default_context()
        try:
            self._client = self._httpx.Client(
                # Packed answers could be of any size once unpacked.
                headers={"Accept": "application/json", "Accept-Encoding": "identity", **key.headers()},
                limits=limits,
                verify=authorities,
                trust_env=not address.private,
                follow_redirects=False,
            )
        except (ImportError, ValueError, self._httpx.InvalidURL) as error:
            # Its message may hold the proxy's password.
            raise ConfigError(
                f"{address.base} can't be asked through the proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names "
                f"({type(error).__name__}); give an http:// URL there, install what a SOCKS proxy needs with "
                "pip install socksio, or name the host in NO_PROXY"
            ) from None
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._cuts = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Client({self.address.base})"

    def get(self, path: str, timeout_s: float) -> Response:
        """Asks for a page; raises as `post`."""
        return self._ask("GET", path, None, time.monotonic() + timeout_s, self._cuts)

    @property
    def cuts(self) -> int:
        """How often everything was broken off."""
        return self._cuts

    def post(self, path: str, body: bytes, limit: float, cuts: int | None = None) -> Response:
        """Sends JSON and waits for the whole answer.

        Args:
            path: from "/" on.
            body: JSON.
            limit: latest end, in seconds of `time.monotonic`.
            cuts: `cuts` from when it was decided to ask; a request that was broken off since isn't sent. None: now.

        Raises:
            Refused, TimedOut, Broken: what went wrong; the message is for a person.
        """
        return self._ask("POST", path, body, limit, self._cuts if cuts is None else cuts)

    def cut(self) -> None:
        """Breaks every connection off, so that requests under way end at once, here and in the server."""
        with self._lock:
            self._cuts += 1
            open_ones = list(self._sockets)
            self._sockets.clear()
        for each in open_ones:
            _break(each)

    def close(self) -> None:
        """Gives the connections back."""
        self.cut()
        self._client.close()

    def hide(self, said: str) -> str:
        """What the server said, shortened, in one line, without the key."""
        text = " ".join(self._key.hide(said).split())
        return text if len(text) <= _QUOTED else text[:_QUOTED] + " ..."

    def _ask(self, method: str, path: str, body: bytes | None, limit: float, cuts: int) -> Response:
        try:
            return self._send(method, path, body, limit, cuts)
        except Refused as error:
            if not error.again or self._cuts != cuts:
                raise
        # A kept connection may have been closed just then; a new one tells.
        return self._send(method, path, body, limit, cuts)

    def _send(self, method: str, path: str, body: bytes | None, limit: float, cuts: int) -> Response:
        httpx, left = self._httpx, limit - time.monotonic()
        if self._cuts != cuts:
            raise Refused("was broken off before it was asked")
        if left <= 0:
            raise TimedOut("could not be asked in time")
        timeout = httpx.Timeout(connect=min(CONNECT_S, left), read=left, write=min(10.0, left), pool=left)
        headers = {} if body is None else {"Content-Type": "application/json"}
        answers = False
        try:
            with self._client.stream(
                method,
                self.address.base + path,
                content=body,
                headers=headers,
                timeout=timeout,
                extensions={"trace": lambda event, info: self._trace(event, info, cuts)},
            ) as response:
                answers = True
                answer = b"".join(self._read(response, limit))
                found = {name.lower(): value for name, value in response.headers.items()}
                return Response(response.status_code, answer, found)
        except httpx.ConnectTimeout as error:
            raise Refused(f"no connection within {timeout.connect:.1f} s") from error
        except httpx.PoolTimeout as error:
            raise TimedOut("had no connection free in time") from error
        except httpx.TimeoutException as error:
            raise TimedOut(f"did not answer within {left:.1f} s") from error
        except httpx.ConnectError as error:
            raise Refused(self.hide(str(error) or type(error).__name__)) from error
        except httpx.NetworkError as error:
            said = self.hide(str(error) or type(error).__name__)
            # Nothing came, or not all of it: only the first can be asked again without a thought.
            if answers:
                raise Broken(f"an answer that was broken off ({said})") from error
            raise Refused(said, again=True) from error
        except httpx.RemoteProtocolError as error:
            said = self.hide(str(error))
            if "without sending" in said:
                raise Refused(said, again=True) from error
            raise Broken(said) from error
        except httpx.HTTPError as error:
            raise Broken(self.hide(f"{type(error).__name__}: {error}")) from error
        except (RuntimeError, UnicodeError, httpx.InvalidURL) as error:
            # The client was closed under a request.
            raise Refused(self.hide(str(error))) from error

    def _read(self, response: Any, limit: float) -> Iterator[bytes]:
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise Broken(f"a body packed as {self.hide(response.headers['content-encoding'])}, which wasn't asked for")
        length = response.headers.get("content-length", "")
        if length.isdecimal() and int(length) > MOST_ANSWER_BYTES:
            raise Broken(f"a body of {length} bytes; an answer has at most {MOST_ANSWER_BYTES}")
        seen = 0
        for chunk in response.iter_raw():
            seen += len(chunk)
            if seen > MOST_ANSWER_BYTES:
                raise Broken(f"a body of more than {MOST_ANSWER_BYTES} bytes")
            # A time limit of the socket begins anew with every byte.
            if time.monotonic() > limit:
                raise TimedOut(f"sent only {seen} bytes of its answer in time")
            yield chunk

    def _trace(self, event: str, info: dict[str, Any], cuts: int) -> None:
        """Keeps the sockets that are opened, to break them off; those of requests that were are, at once."""
        if not event.endswith(("connect_tcp.complete", "start_tls.complete")):
            return
        opened = info["return_value"].get_extra_info("socket")
        if isinstance(opened, socket.socket):
            with self._lock:
                self._sockets.add(opened)
                late = self._cuts != cuts
            if late:
                _break(opened)


def _break(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # Closing wouldn't wake the thread that reads. An SSLSocket's own method isn't safe beside a read.
        socket.socket.shutdown(each, socket.SHUT_RDWR)
