"""What the engine `openai` costs beside the server: the same questions through it, and by bare HTTP, in turns.

    python -m depthlm_ros.bench.served_overhead http://localhost:8000 --model FOLDER
    python -m depthlm_ros.bench.served_overhead --loopback 20      # a stand-in that answers after 20 ms

Both sides encode the image once and send the same bytes, as many at once. A round asks each of them about an image that
the server hasn't seen; who begins changes from round to round. The rate of the engine over the rate of bare HTTP is
what is told: 1 costs nothing.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np

from depthlm_ros.bench.pictures import synthetic_image
from depthlm_ros.cards import ModelCard, load_card
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.served.engine import Served, open_served
from depthlm_ros.engines.served.images import Picture
from depthlm_ros.engines.worded import WordedEngine, guide_regex
from depthlm_ros.errors import DepthLMError, EngineError
from depthlm_ros.prompts import coordinates_question, normalise_pixel
from depthlm_ros.sampling import sample_pixels

_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Overhead:
    """What was measured.

    Attributes:
        engine_rates: questions a second through the engine, a round each.
        direct_rates: the same by bare HTTP.
    """

    engine_rates: tuple[float, ...]
    direct_rates: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Engine over bare HTTP, a round each."""
        return tuple(a / b for a, b in zip(self.engine_rates, self.direct_rates, strict=True))

    def __str__(self) -> str:
        """Medians, and the spread of the ratio."""
        ratios = self.ratios
        return (
            f"engine {statistics.median(self.engine_rates):.1f}/s, bare HTTP {statistics.median(self.direct_rates):.1f}"
            f"/s, ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} rounds)"
        )


class Bare:
    """Sends bodies that are ready, and does nothing with the answers but count them.

    Args:
        url: of the server.
        concurrency: requests under way at once.
    """

    def __init__(self, url: str, concurrency: int) -> None:
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/") + "/v1/chat/completions"
        self._threads = ThreadPoolExecutor(concurrency)
        self._local = threading.local()

    def send(self, bodies: Sequence[bytes]) -> None:
        """Sends all of them.

        Raises:
            EngineError: another status than 200.
        """
        list(self._threads.map(self._post, bodies))

    def close(self) -> None:
        """Ends the threads and their connections."""
        self._threads.shutdown()

    def _post(self, body: bytes) -> None:
        if not hasattr(self._local, "connection"):
            kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
            self._local.connection = kind(self._host, self._port, timeout=_TIMEOUT_S)
        try:
            self._request(body)
        except (http.client.HTTPException, OSError):
            # Kept for too long; a new one is opened by itself.
            self._local.connection.close()
            self._request(body)

    def _request(self, body: bytes) -> None:
        self._local.connection.request("POST", self._path, body, {"Content-Type": "application/json"})
        response = self._local.connection.getresponse()
        said = response.read()
        if response.status != 200:
            raise EngineError(f"{self._host}:{self._port} says {response.status}: {said[:300]!r}")


def compare(
    served: Served, card: ModelCard, url: str, points: int, rounds: int, size: tuple[int, int], concurrency: int
) -> Overhead:
    """Measures both sides.

    Args:
        served: asks the server at `url` with as many requests at once as `concurrency`.
        card: of its model.
        url: of the server.
        points: questions a round.
        rounds: that count; one before them doesn't.
        size: width and height of the images.
        concurrency: requests at once.

    Raises:
        EngineError: the server fails.
    """
    engine = WordedEngine(served.backend, served.info, served.sizes)
    peer = served.backend.server.require_peer()
    expects = card.answer_template("coordinates")
    guide = guide_regex(expects) if expects and peer.dialect.guide else ""
    pixels = sample_pixels(*size, points, "blue_noise")
    asked = normalise_pixel(pixels, *size, card.coordinate_range).tolist()
    questions = [coordinates_question(*pixel, card.coordinate_range) for pixel in asked]
    bare = Bare(url, concurrency)
    rates: dict[str, list[float]] = {"engine": [], "direct": []}

    def through_engine(image: np.ndarray) -> float:
        began = time.perf_counter()
        engine.answer_shared(image, questions, card.max_new_tokens, expects=expects)
        return points / (time.perf_counter() - began)

    def directly(image: np.ndarray) -> float:
        began = time.perf_counter()
        picture = Picture(image, "png")
        bodies = [
            peer.dialect.body(peer.model, card.system_text, [picture], text, card.max_new_tokens, guide)
            for text in questions
        ]
        bare.send(bodies)
        return points / (time.perf_counter() - began)

    sides = [("engine", through_engine), ("direct", directly)]
    try:
        for number in range(rounds + 1):
            for at, (name, run) in enumerate(sides if number % 2 else reversed(sides)):
                image = served.sizes.shown(synthetic_image(*size, seed=2 * number + at))
                rate = run(image)
                if number:
                    rates[name].append(rate)
    finally:
        bare.close()
    return Overhead(tuple(rates["engine"]), tuple(rates["direct"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m depthlm_ros.bench.served_overhead", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("url", nargs="?", help="of the server")
    parser.add_argument("--model", default="demo", help="card, folder or hub id of the model that it serves")
    parser.add_argument("--name", default="", help="the name that the server knows the model by")
    parser.add_argument("--concurrency", type=int, default=16, help="requests under way at once (default 16)")
    parser.add_argument("--points", type=int, default=64, help="questions a round (default 64)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default 7)")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--loopback", type=float, metavar="MS", help="ask a stand-in that answers after this long")
    parser.add_argument("--stand-in", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stand_in is not None:
        _stand_in(options.stand_in / 1000)
        return 0
    if (options.url is None) == (options.loopback is None):
        parser.error("give the URL of a server, or --loopback")
    process, url = _start_stand_in(options.loopback) if options.url is None else (None, options.url)
    try:
        card, source = load_card(options.model)
        served = open_served(
            source,
            card,
            EngineOptions(
                server_urls=(url,),
                server_model=options.name,
                server_concurrency=options.concurrency,
                server_timeout_s=_TIMEOUT_S,
            ),
        )
        try:
            print(f"{served.info.version}, {options.points} questions a round, {options.concurrency} at once")
            size = tuple(options.size)
            print(compare(served, card, url, options.points, options.rounds, size, options.concurrency))
        finally:
            served.backend.close()
    except DepthLMError as error:
        print(f"served_overhead: {error}", file=sys.stderr)
        return 1
    finally:
        if process is not None:
            process.terminate()
            process.wait()
    return 0


def _start_stand_in(delay_ms: float) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-m", "depthlm_ros.bench.served_overhead", "--stand-in", str(delay_ms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def _stand_in(delay_s: float) -> None:
    """A server in this process that always says the same; prints its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            """Nothing."""

        def do_GET(self) -> None:
            """The list of models."""
            self._say({"data": [{"id": "stand-in", "owned_by": "stand-in"}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            """An answer."""
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(delay_s)
            tokens = [{"token": c, "logprob": -0.1} for c in "1.00"]
            choice = {"message": {"content": "1.00"}, "finish_reason": "stop", "logprobs": {"content": tokens}}
            self._say({"model": "stand-in", "choices": [choice]})

        def _say(self, body: dict) -> None:
            raw = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    class Server(ThreadingHTTPServer):
        request_queue_size = 512

    server = Server(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
