"""Servers that fail: what is repeated, what isn't, who takes over, what is said meanwhile, what is left behind."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from fault_server import FAULTS, HUGE_BLOCKS, FaultServer

from depthlm_ros.cards import load_card
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.served import frame, servers
from depthlm_ros.engines.served.address import Address, Key
from depthlm_ros.engines.served.client import MOST_ANSWER_BYTES, Broken, Client, Refused
from depthlm_ros.engines.served.engine import load_served
from depthlm_ros.engines.served.images import Picture
from depthlm_ros.errors import ConfigError, EngineError

IMAGE = np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)
QUESTIONS = [f"how far is ({n}, 5)?" for n in range(12)]
# What the node promises: said within 4 s, answering within 10 s of a server's return.
TOLD_S, BACK_S = 4.0, 10.0
# Nothing that is right takes so long, and whatever would be waited for wrongly takes longer.
SOON_S, LONG_S = 20.0, 60.0
# As long as a server of which nothing comes is asked.
SHORT_S = 2.5
KEY = "sk-very-secret-1234"


def load(*servers: FaultServer, **options):
    card, source = load_card("demo")
    options = {"server_timeout_s": LONG_S, **options}
    return load_served(source, card, EngineOptions(server_urls=tuple(s.url for s in servers), **options))


@pytest.fixture
def server():
    with FaultServer() as running:
        yield running


@pytest.fixture
def other():
    with FaultServer() as running:
        yield running


@pytest.fixture
def engine(server):
    loaded = load(server)
    yield loaded
    loaded.close()


def texts(engine) -> list[str]:
    return [answer.text for answer in engine.answer_shared(IMAGE, QUESTIONS, 8)]


def truth(server: FaultServer) -> list[str]:
    shown = np.ascontiguousarray(IMAGE[..., ::-1]).tobytes()
    return [server.number(shown, text) for text in QUESTIONS]


def wait(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Waits for so many seconds of this process: those that it stood still are no fault of what is waited for."""
    ran, seen = 0.0, time.monotonic()
    while not condition():
        assert ran < seconds, f"waited {seconds} s for {what}"
        time.sleep(0.02)
        now = time.monotonic()
        ran, seen = ran + min(now - seen, 0.1), now


class Asking:
    """Asks in a thread of its own.

    Attributes:
        said: what came of it, a list of answers or an exception; None before.
    """

    def __init__(self, engine) -> None:
        self.said: list[str] | Exception | None = None
        self._engine = engine
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def end(self, seconds: float = SOON_S) -> list[str] | Exception | None:
        wait(lambda: self.over, seconds, "the frame to end")
        return self.said

    def _run(self) -> None:
        try:
            self.said = texts(self._engine)
        except Exception as error:
            self.said = error


def after_questions(server: FaultServer, count: int, act: Callable[[], object]) -> None:
    """Does something while the server works on the question of that number from now on, before it answers."""
    say, lock, left = server.say, threading.Lock(), count

    def said(*given) -> str:
        nonlocal left
        with lock:
            left -= 1
            now = left == 0
        if now:
            act()
        return say(*given)

    server.say = said


def complains_of(engine, name: str) -> bool:
    return any(name in text for text in engine.complaints)


@pytest.mark.parametrize("everywhere", [False, True], ids=["questions", "everything"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_told_in_time_ends_the_frame_and_is_forgotten_when_it_is_mended(
    fault, everywhere, engine, server, monkeypatch
):
    assert texts(engine) == truth(server)
    monkeypatch.setattr(engine._backend, "_timeout_s", SHORT_S)
    server.fault, server.everywhere = fault, everywhere
    asking = Asking(engine)
    wait(lambda: complains_of(engine, server.url), TOLD_S, "the complaint")
    said = asking.end()
    assert isinstance(said, EngineError) and server.url in str(said)
    wait(lambda: server.under_way <= 1, 5.0, "what was under way to be broken off, but for the watching")
    server.fault = ""
    wait(lambda: not engine.complaints, BACK_S, "the complaints to end")
    monkeypatch.setattr(engine._backend, "_timeout_s", LONG_S)
    assert texts(engine) == truth(server)
    assert engine.complaints == ()


def test_a_server_that_is_gone_is_not_waited_for_and_is_asked_when_it_is_back(engine, server, monkeypatch):
    server.stop()
    with pytest.raises(EngineError, match=server.url):
        texts(engine)
    posts, post = [], Client.post
    # The watching begins with another page.
    monkeypatch.setattr(Client, "post", lambda *given: posts.append(given) or post(*given))
    for _ in range(20):
        with pytest.raises(EngineError, match="as soon as it does"):
            texts(engine)
    assert not posts, "frames wait for a server that is known to be gone"
    assert complains_of(engine, server.url)
    server.start()
    wait(lambda: not engine.complaints, BACK_S, "the server to be found again")
    assert texts(engine) == truth(server)


def test_the_complaint_comes_while_the_question_waits_and_goes_with_the_answer(server):
    engine = load(server)
    try:
        server.fault = "hang"
        asking = Asking(engine)
        wait(lambda: complains_of(engine, "has not answered for "), TOLD_S, "the complaint")
        assert not asking.over
        # It drops the connections that hang, and answers when it is asked again.
        server.fault = ""
        assert asking.end(BACK_S) == truth(server)
        assert engine.complaints == ()
    finally:
        engine.close()


def test_a_slow_server_keeps_no_question_of_a_frame_that_was_given_up(engine, server, monkeypatch):
    # A machine that stands still for a second makes no frame of it that was asked for long enough.
    monkeypatch.setattr(servers, "SHORT_S", LONG_S)
    after_questions(server, 1, lambda: setattr(server, "delay_s", LONG_S))
    engine.deadline = time.monotonic() + 0.5
    with pytest.raises(EngineError, match="too old"):
        texts(engine)
    wait(lambda: server.under_way == 0, SOON_S, "the rest of the frame to be broken off")
    engine.deadline, server.delay_s = None, 0.0
    # It was asked for too much; nothing is wrong with it.
    assert engine.complaints == ()
    assert texts(engine) == truth(server)


def test_what_a_server_did_not_answer_in_time_is_counted_from_when_it_was_asked(server, monkeypatch):
    engine = load(server, server_concurrency=1, server_timeout_s=30.0)
    skipped_s = 0.0

    def skip(seconds: float) -> None:
        nonlocal skipped_s
        skipped_s += seconds

    try:
        # The frame's clock, which the test moves on: 120 s for six answers, then one that does not come.
        monkeypatch.setattr(frame, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + skipped_s))
        for count in range(1, 7):
            after_questions(server, count, lambda: skip(20.0))
        after_questions(server, 6, lambda: setattr(server, "fault", "drip_headers"))
        asking, before = Asking(engine), server.posts
        wait(lambda: server.posts == before + 7, SOON_S, "the seventh")
        skip(31.0)
        waited = re.search(r"did not answer within (\d+)\.\d s", str(asking.end()))
        assert waited and 31 <= int(waited[1]) < 100
    finally:
        engine.close()


def test_no_answer_comes_after_the_deadline(engine, server, monkeypatch):
    server.fault = "hang"
    monkeypatch.setattr(servers, "SHORT_S", LONG_S)
    for complains in (False, True):
        # A frame may have had no time; a second one in a row is no accident.
        began = time.monotonic()
        engine.deadline = began + 1.0
        with pytest.raises(EngineError, match=server.url):
            texts(engine)
        assert time.monotonic() - began < SOON_S
        assert complains_of(engine, server.url) == complains
    engine.deadline = time.monotonic() - 1.0
    asked = len(server.requests)
    with pytest.raises(EngineError, match="too old"):
        texts(engine)
    assert len(server.requests) == asked


def test_another_server_takes_over_at_once_and_gives_back(server, other):
    engine = load(server, other)
    try:
        assert texts(engine) == truth(server)
        asked = len(other.requests)
        server.stop()
        began = time.monotonic()
        assert texts(engine) == truth(other)
        assert time.monotonic() - began < SOON_S
        assert len(other.requests) == asked + len(QUESTIONS)
        assert complains_of(engine, server.url) and complains_of(engine, f"{other.url} is asked instead")
        server.start()
        wait(lambda: not engine.complaints, BACK_S, "the preferred server to be found again")
        asked = len(other.requests)
        assert texts(engine) == truth(server)
        assert len(other.requests) == asked
    finally:
        engine.close()


def test_what_was_answered_before_a_fail_over_is_not_asked_again(server, other):
    engine = load(server, other, server_concurrency=1)
    try:
        before = len(other.requests)
        after_questions(server, 7, server.stop)
        assert texts(engine) == truth(server)
        assert len(other.requests) - before == len(QUESTIONS) - 6
    finally:
        engine.close()


def test_a_server_that_comes_back_with_another_model_is_not_used(server, other):
    engine = load(server, other)
    try:
        server.stop()
        assert texts(engine) == truth(other)
        server.model = "another"
        server.start()
        wait(lambda: complains_of(engine, "doesn't serve 'small'"), BACK_S, "the other model to be noticed")
        asked = len(server.requests)
        assert texts(engine) == truth(other)
        assert len(server.requests) == asked
    finally:
        engine.close()


def test_the_second_server_is_enough_to_start(server, other):
    server.stop()
    engine = load(server, other)
    try:
        assert texts(engine) == truth(other)
        assert complains_of(engine, server.url)
        server.start()
        wait(lambda: not engine.complaints, BACK_S, "the preferred server to be found")
        asked = len(other.requests)
        assert texts(engine) == truth(server)
        assert len(other.requests) == asked
    finally:
        engine.close()


def test_no_server_at_start_is_an_error_with_url_and_remedy(server):
    server.stop()
    with pytest.raises(EngineError, match=rf"{server.url}.*[Ss]tart the server"):
        load(server)


def test_an_overloaded_server_gets_fewer_questions_and_no_complaint_in_the_end(server):
    engine = load(server, server_concurrency=8)
    try:
        server.most, server.delay_s = 2, 0.05
        assert texts(engine) == truth(server)
        assert engine.complaints == ()
        # It learnt how many there is room for.
        before = server.sent_away
        assert before > 0
        assert texts(engine) == truth(server)
        assert server.sent_away == before
    finally:
        engine.close()


def test_retry_after_is_kept_to(engine, server):
    server.fault, server.retry_after, server.times = "429", 1.0, 1
    began = time.monotonic()
    assert texts(engine) == truth(server)
    assert time.monotonic() - began >= 1.0


def test_a_failure_of_the_moment_is_asked_once_more(engine, server):
    server.fault, server.times = "500", 1
    assert texts(engine) == truth(server)
    assert engine.complaints == ()


def test_a_refused_question_does_not_take_the_server_out_of_use(engine, server):
    server.refuses = {"temperature"}
    with pytest.raises(EngineError, match="says 400.*temperature"):
        texts(engine)
    assert complains_of(engine, "says 400")
    server.refuses = set()
    assert texts(engine) == truth(server)
    assert engine.complaints == ()


def test_a_server_that_refuses_what_it_took_before_is_left_for_another(server, other):
    engine = load(server, other)
    try:
        assert texts(engine) == truth(server)
        server.refuses = {"temperature"}
        asked = len(other.requests)
        assert texts(engine) == truth(other)
        assert len(other.requests) == asked + len(QUESTIONS)
        assert complains_of(engine, f"{server.url} has been out of use")
    finally:
        engine.close()


def test_a_busy_server_is_told_by_what_it_says_and_not_as_silent(engine, server):
    server.fault, server.retry_after = "429", 0.2
    asking = Asking(engine)
    wait(lambda: complains_of(engine, "says 429"), TOLD_S, "the complaint")
    time.sleep(2.1)

    def told() -> bool:
        said = engine.complaints
        return any("says 429" in text for text in said) and not any("has not answered" in text for text in said)

    # Whoever stands still for a while is silent as long; the next 429 ends that.
    wait(told, SOON_S, "the complaint to be of the 429")
    assert not asking.over
    server.fault = ""
    assert asking.end() == truth(server)


def test_a_huge_body_is_given_up_after_four_mebibytes(engine, server):
    assert MOST_ANSWER_BYTES == 4 << 20
    server.fault = "huge"
    with pytest.raises(EngineError, match=f"more than {4 << 20} bytes"):
        texts(engine)
    server.fault = ""
    wait(lambda: server.under_way == 0, SOON_S, "the server to give up")
    # Of every question that was put, the watching's, too.
    assert server.blocks < HUGE_BLOCKS // 2


def test_closing_ends_the_watching_and_the_connections(server):
    engine = load(server)
    server.fault, server.everywhere = "500", True
    with pytest.raises(EngineError):
        texts(engine)
    engine.close()
    watching = f"watching {server.url}"
    wait(lambda: watching not in [t.name for t in threading.enumerate()], SOON_S, "the watching to end")
    wait(lambda: server.connections == 0, SOON_S, "the connections to end")
    seen = len(server.pages)
    time.sleep(1.2)
    assert len(server.pages) == seen


def test_an_idle_connection_that_the_server_closed_is_not_taken_for_a_failure(engine, server):
    assert texts(engine) == truth(server)
    server.stop()
    server.start()
    assert texts(engine) == truth(server)
    assert engine.complaints == ()


# What one request does


class OneWord:
    """Says the same bytes on every connection and resets it.

    Attributes:
        asked: how many requests came.
        heard: what was said has been read; a reset takes back what hasn't.
    """

    def __init__(self, said: bytes) -> None:
        self.asked = 0
        self.heard = threading.Event()
        self._said = said
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> OneWord:
        return self

    def __exit__(self, *_: object) -> None:
        # Closing alone leaves the thread in accept(), which a process that stands still begins anew when it goes on:
        # with the descriptor of whichever server has got the same number.
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join(SOON_S)
        assert not self._thread.is_alive()
        self._listening.close()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                connection.recv(1 << 16)
                self.asked += 1
                connection.sendall(self._said)
                if self._said:
                    self.heard.wait(SOON_S)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def client_of(url: str) -> Client:
    return Client(Address.parse(url), Key(), 4)


@pytest.mark.parametrize(
    ("said", "error", "asked"),
    [
        (b"", Refused, 2),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", Broken, 1),
    ],
    ids=["nothing came", "half of it came"],
)
def test_only_what_was_not_answered_is_asked_twice(said, error, asked, monkeypatch):
    with OneWord(said) as server:
        client, read = client_of(server.url), Client._read
        monkeypatch.setattr(Client, "_read", lambda *given: server.heard.set() or read(*given))
        with pytest.raises(error):
            client.post("/", b"{}", time.monotonic() + LONG_S)
        assert server.asked == asked
        client.close()


def test_a_request_of_a_frame_that_was_broken_off_is_not_sent(server):
    client = client_of(server.url)
    cuts = client.cuts
    client.cut()
    with pytest.raises(Refused, match="broken off"):
        client.post("/v1/chat/completions", b"{}", time.monotonic() + LONG_S, cuts)
    assert not server.posts
    client.post("/v1/chat/completions", b'{"messages": []}', time.monotonic() + LONG_S)
    assert server.posts == 1
    client.close()


def test_a_thread_that_is_late_sends_nothing_of_a_frame_that_is_over(engine, server, monkeypatch):
    encode, pictures, done = Picture._encode, [], threading.Event()
    post, refused = Client.post, []

    def slowly(self):
        pictures.append(self)
        if len(pictures) == 1:
            done.wait(LONG_S)
        return encode(self)

    def posted(*given):
        try:
            return post(*given)
        except Refused as error:
            refused.append(str(error))
            raise

    before = server.posts
    monkeypatch.setattr(Picture, "_encode", slowly)
    monkeypatch.setattr(Client, "post", posted)
    # The other question's failure ends the frame; the watching gets no further than the list of models.
    server.key = KEY
    with pytest.raises(EngineError, match="says 401"):
        engine.answer_each([IMAGE, IMAGE[::-1]], QUESTIONS[:2], 8)
    assert server.posts == before + 1
    done.set()
    wait(lambda: bool(refused), SOON_S, "the late thread")
    assert refused == ["was broken off before it was asked"]
    assert server.posts == before + 1


def test_a_server_whose_name_nobody_knows_keeps_no_thread_from_another(server, other, monkeypatch):
    engine = load(server, other, server_concurrency=1, server_timeout_s=5.0)
    hanging, look_up = threading.Event(), socket.getaddrinfo

    def hang(host, port, *rest, **named):
        if int(port) == int(server.url.rpartition(":")[2]):
            hanging.wait(LONG_S)
        return look_up(host, port, *rest, **named)

    try:
        server.stop()
        server.start()
        monkeypatch.setattr(socket, "getaddrinfo", hang)
        began = time.monotonic()
        assert texts(engine) == truth(other)
        assert time.monotonic() - began < SOON_S
    finally:
        hanging.set()
        engine.close()


@pytest.mark.parametrize("fault", ["hang", "429", "drip_headers"])
def test_an_engine_that_is_closed_while_it_is_asked_says_so(fault, server):
    engine = load(server, server_concurrency=2)
    server.fault = fault
    before, asking = server.posts, Asking(engine)
    wait(lambda: server.posts > before, SOON_S, "a question")
    engine.close()
    said = asking.end()
    assert (type(said), str(said)) == (EngineError, "the engine was closed while it was asked")
    with pytest.raises(EngineError, match="closed"):
        texts(engine)


@pytest.mark.parametrize("error", ["ConnectError", "ConnectTimeout"])
def test_a_connection_that_is_not_made_is_not_tried_twice(error, monkeypatch):
    client = client_of("http://127.0.0.1:1")
    tries = []

    def stream(*_, **__):
        tries.append(1)
        raise getattr(client._httpx, error)("no way")

    monkeypatch.setattr(client._client, "stream", stream)
    said = {"ConnectError": "no way", "ConnectTimeout": r"no connection within 2\.0 s"}[error]
    with pytest.raises(Refused, match=said):
        client.post("/", b"{}", time.monotonic() + LONG_S)
    assert len(tries) == 1
    client.close()


# The key


def test_the_key_is_sent_and_appears_nowhere(server, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("THE_KEY", KEY)
    server.key = KEY
    engine = load(server, server_key_variable="THE_KEY")
    try:
        assert texts(engine) == truth(server)
        seen = [repr(engine.info), repr(vars(engine)), repr(vars(engine._backend))]
        # The server repeats what it was sent.
        server.key = "another"
        with pytest.raises(EngineError, match=r"says 401.*\*\*\*.*a key") as refused:
            texts(engine)
        seen += [str(refused.value), repr(refused.value), *engine.complaints]
    finally:
        engine.close()
    seen += [record.getMessage() for record in caplog.records]
    assert not [text for text in seen if KEY in text]


def test_a_missing_key_is_named_at_start(server, monkeypatch):
    monkeypatch.delenv("THE_KEY", raising=False)
    server.key = KEY
    with pytest.raises(EngineError, match="says 401.*wants a key"):
        load(server, server_key_variable="THE_KEY")


def test_a_key_is_not_sent_unencrypted_to_a_public_host(monkeypatch):
    monkeypatch.setenv("THE_KEY", KEY)
    key = Key.read("THE_KEY")
    for url in ("http://localhost:8000", "http://192.168.1.7:8000/v1", "http://robot.local", "https://example.com"):
        key.check(Address.parse(url))
    for url in ("http://example.com", "http://8.8.8.8:8000"):
        with pytest.raises(ConfigError, match="unencrypted") as refused:
            key.check(Address.parse(url))
        assert KEY not in str(refused.value)
    assert KEY not in repr(key)
    monkeypatch.setenv("THE_KEY", f"{KEY}\nX: 1")
    with pytest.raises(ConfigError) as refused:
        Key.read("THE_KEY")
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "base", "private"),
    [
        ("http://localhost:8000", "http://localhost:8000", True),
        ("http://localhost:8000/v1/", "http://localhost:8000", True),
        ("https://example.com/llm/v1", "https://example.com/llm", False),
        ("http://[::1]:8000", "http://[::1]:8000", True),
        ("http://10.0.0.5", "http://10.0.0.5", True),
        ("http://trtllm:8000", "http://trtllm:8000", True),
        ("http://134744072", "http://134744072", False),
        ("http://0x8080808", "http://0x8080808", False),
        ("http://example\u3002com", "http://example\u3002com", False),
    ],
)
def test_urls(url, base, private):
    address = Address.parse(url)
    assert (address.base, address.private) == (base, private)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "http://a b/", "http://host/?q=1", ""]
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ConfigError, match="server_urls.*http://localhost:8000"):
        Address.parse(url)


@pytest.mark.parametrize(
    "url", ["http://a..b", "http://999.1.1.1:80", "http://a\x01b", "http://h/\x01", "http://" + 70 * "a"]
)
def test_a_url_that_nothing_can_be_sent_to_is_refused_at_load(url):
    card, source = load_card("demo")
    with pytest.raises(ConfigError, match="server_urls.*http://localhost:8000"):
        load_served(source, card, EngineOptions(server_urls=("http://localhost:1", url)))


@pytest.mark.parametrize("proxy", ["socks5://me:hunter2@proxy:1", "gopher://me:hunter2@proxy:1", "http://999.1.1.1"])
def test_a_proxy_that_is_none_is_refused_and_leaves_no_client_behind(proxy, monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    closed = []
    monkeypatch.setattr(Client, "close", lambda self: closed.append(self.address.base))
    card, source = load_card("demo")
    with pytest.raises(ConfigError, match="https://example.com.*ALL_PROXY") as refused:
        load_served(source, card, EngineOptions(server_urls=("http://localhost:1", "https://example.com")))
    assert "hunter2" not in str(refused.value) and closed == ["http://localhost:1"]


def test_a_password_in_a_url_is_refused_without_being_shown():
    with pytest.raises(ConfigError) as refused:
        Address.parse("https://me:hunter2@example.com")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("urls", [(), ("http://localhost:1", "http://localhost:1/v1")])
def test_no_url_and_the_same_twice_are_refused(urls):
    card, source = load_card("demo")
    with pytest.raises(ConfigError, match="server_urls"):
        load_served(source, card, EngineOptions(server_urls=urls))


def test_several_models_want_a_name(server, monkeypatch):
    monkeypatch.setattr("fault_server._OWNERS", {})
    with pytest.raises(EngineError, match="lists 0 models.*server_model"):
        load(server)
