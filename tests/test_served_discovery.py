"""Who answers at a URL, by what it tells and by what it does; and the ways there: proxies, private authorities."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from fault_server import FaultServer, _Handler

from depthlm_ros.bench.served_overhead import compare, main
from depthlm_ros.cards import load_card
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.served.address import Address, Key
from depthlm_ros.engines.served.client import Client
from depthlm_ros.engines.served.discovery import FIRST_PAGE_S, PAGE_S
from depthlm_ros.engines.served.engine import load_served, open_served
from depthlm_ros.engines.served.servers import Server, Servers
from depthlm_ros.errors import EngineError, MissingDependencyError

IMAGE = np.zeros((64, 64, 3), np.uint8)


def load(url: str, **options):
    card, source = load_card("demo")
    # However slow the machine is: no test here is about servers that are.
    return load_served(source, card, EngineOptions(server_urls=(url,), **{"server_timeout_s": 60.0, **options}))


def version(server: FaultServer, **options) -> str:
    engine = load(server.url, **options)
    engine.close()
    return engine.info.version


@pytest.mark.parametrize(
    ("schema", "dialect"),
    [
        ({"info": {"title": "TensorRT Edge LLM Server"}, "paths": {}}, "edge-llm"),
        ({"paths": {"/health_generate": {}}}, "trtllm-serve"),
        ({"paths": {"/v1/chat/completions/batch": {}}}, "vllm"),
        ({"paths": {"/v1/systemone": {}}}, "transformers"),
        ({"paths": {"/v1/chat/completions": {}}}, "generic"),
        ({"paths": None, "info": []}, "generic"),
        (None, "generic"),
    ],
)
def test_a_server_that_does_not_name_itself_is_known_by_its_pages(schema, dialect):
    with FaultServer("generic") as server:
        server.schema = schema
        assert version(server, server_model="small").startswith(dialect)


def test_the_dialect_can_be_given():
    with FaultServer("trtllm-serve") as server:
        server.owner = "somebody"
        assert version(server, server_dialect="trtllm-serve") == "trtllm-serve 1.3.0"
        assert server.requests[-1]["response_format"]["type"] == "regex"


def test_an_older_vllm_gets_the_guide_that_it_knows():
    with FaultServer("vllm") as server:
        server.guide_field = "guided_regex"
        engine = load(server.url)
        assert engine.complaints == ()
        assert engine.answer_shared(IMAGE, ["?"], 8, expects="It is {number} m.")[0].text.startswith("It is ")
        engine.close()
    assert "guided_regex" in server.requests[-1]


def test_the_guide_of_an_unknown_server_is_found_by_trying():
    with FaultServer("generic") as server:
        server.guide_field = "guided_decoding"
        engine = load(server.url)
        assert engine.answer_shared(IMAGE, ["?"], 8, expects="It is {number} m.")[0].text.startswith("It is ")
        engine.close()
    assert any("guided_decoding" in reason for reason in engine.info.reasons)


def test_a_page_is_waited_for_longer_at_the_start_where_nobody_asks_again(monkeypatch):
    waits, get = [], Client.get
    monkeypatch.setattr(Client, "get", lambda self, path, wait_s: waits.append(wait_s) or get(self, path, wait_s))
    with FaultServer() as server:
        engine = load(server.url)
        assert set(waits) == {FIRST_PAGE_S}
        waits.clear()
        server.stop()
        with pytest.raises(EngineError, match="no server answers"):
            engine.answer_shared(IMAGE, ["?"], 8)
        server.start()
        began = time.monotonic()
        while engine.complaints:
            assert time.monotonic() - began < 20.0, engine.complaints
            time.sleep(0.02)
        engine.close()
        assert set(waits) == {PAGE_S}


def test_a_server_that_cannot_list_its_models_is_asked_by_the_name_given():
    with FaultServer("transformers") as server:
        server.lists = False
        assert version(server, server_model="small") == "transformers"
        with pytest.raises(EngineError, match="server_model"):
            load(server.url)


def test_a_name_that_is_not_listed_is_an_error_with_those_that_are():
    with FaultServer() as server, pytest.raises(EngineError, match="'other'; it lists small"):
        load(server.url, server_model="other")


@pytest.mark.parametrize("root", [{}, [], 7, None])
def test_a_root_that_is_no_text_says_nothing(root):
    with FaultServer() as server:
        server.card = {"root": root}
        assert version(server)


@pytest.mark.parametrize("where", ["model", "answer", "ending", "guide"])
def test_what_a_server_says_of_itself_is_shown_without_the_key_and_not_at_length(where, monkeypatch):
    key, long = "sk-very-secret-1234", "y" * 5000
    monkeypatch.setenv("THE_KEY", key)
    with FaultServer() as server:
        complete = _Handler._completion
        if where == "model":
            server.model = key + long
        elif where == "guide":
            server.guides = False
            server.number = lambda *_: "x" * 35 + key
        else:
            monkeypatch.setattr("fault_server._Handler._completion", lambda *given: complete(*given) | {
                "answer": {"model": key + long}, "ending": {"error": key + long}}[where])  # fmt: skip
        try:
            engine = load(server.url, server_key_variable="THE_KEY")
        except EngineError as error:
            shown = str(error)
        else:
            shown = " ".join([*engine.complaints, *engine.info.reasons, engine.info.model])
            engine.close()
    assert key[:5] not in shown and "**" in shown and len(shown) < 1500


def test_whatever_goes_wrong_while_a_server_is_asked_who_it_is_is_a_reason(monkeypatch):
    def fail(*_):
        raise KeyError("sk-secret")

    monkeypatch.setattr("depthlm_ros.engines.served.engine.discover", fail)
    with pytest.raises(EngineError, match="can't be asked: KeyError;?.*Start the server") as refused:
        load("http://localhost:1")
    assert "sk-secret" not in str(refused.value)


def test_a_server_that_comes_back_while_the_reasons_are_told_has_one():
    client = Client(Address.parse("http://localhost:1"), Key(), 1)
    server = Server(client, 1)
    servers = Servers([server], lambda *_: None, "", 1.0)

    # The watching lets it in after it was passed over.
    server.reason = lambda: ""
    with pytest.raises(EngineError, match="localhost:1 is back just now"):
        servers.choose({})
    client.close()


def test_no_more_at_once_than_the_server_has_room_for():
    with FaultServer("edge-llm") as server:
        server.most = 5
        engine = load(server.url, server_concurrency=32)
        server.delay_s = 0.05
        engine.answer_shared(IMAGE, [str(n) for n in range(24)], 8)
        assert engine.complaints == () and server.busiest <= 5
        engine.close()


def test_a_proxy_is_not_asked_about_a_neighbour(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with FaultServer() as server:
        assert version(server)


def test_without_httpx_the_line_that_installs_it_is_told(monkeypatch):
    for name in ("httpx2", "httpx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        load("http://localhost:1")


@pytest.fixture
def secure(tmp_path):
    """A server with a certificate that only an authority of its own vouches for; and the authority's file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl isn't there to make a certificate")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=robot",
            "-addext", "subjectAltName=IP:127.0.0.1"]  # fmt: skip
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with FaultServer() as server:
        server.secure(context)
        yield server, certificate


def test_a_private_authority_is_trusted_where_it_is_named_and_nowhere_else(secure, monkeypatch):
    server, certificate = secure
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(EngineError, match="(?i)certificate"):
        load(server.url)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    engine = load(server.url)
    said: list[Exception] = []

    def ask() -> None:
        try:
            engine.answer_shared(IMAGE, [str(n) for n in range(8)], 8)
        except EngineError as error:
            said.append(error)

    try:
        assert engine.answer_shared(IMAGE, ["?"], 8)[0].text
        # Breaking off wakes a read over TLS, too: each would wait for a minute.
        server.fault, before = "hang", server.posts
        asking = threading.Thread(target=ask)
        asking.start()
        began = time.monotonic()
        while server.posts == before:
            assert time.monotonic() - began < 20.0, "no question came"
            time.sleep(0.02)
    finally:
        engine.close()
    asking.join(20.0)
    assert len(said) == 1
    began = time.monotonic()
    while [thread for thread in threading.enumerate() if thread.name.startswith("served")]:
        assert time.monotonic() - began < 20.0, "a thread of the engine outlives it"
        time.sleep(0.02)


def test_the_overhead_is_measured_in_turns():
    card, source = load_card("demo")
    with FaultServer() as server:
        server.delay_s = 0.02
        options = EngineOptions(server_urls=(server.url,), server_concurrency=4, server_timeout_s=60.0)
        served = open_served(source, card, options)
        try:
            before = len(server.requests)
            found = compare(served, card, server.url, points=12, rounds=2, size=(96, 64), concurrency=4)
        finally:
            served.backend.close()
        assert len(server.requests) - before == 3 * 2 * 12
    # Twelve questions, four at once, 20 ms each: none can be faster than 200 a second.
    assert all(0 < rate <= 200 for rate in (*found.engine_rates, *found.direct_rates))
    assert len(found.ratios) == 2 and "ratio" in str(found)
    # Both sides had sent the very same bytes but for the image and the order.
    last = server.requests[before:]
    assert {frozenset(asked) for asked in last} == {frozenset(last[0])}


def test_the_command_says_why_it_cannot_measure(capsys):
    assert main(["http://127.0.0.1:9", "--rounds", "1"]) == 1
    assert "127.0.0.1:9" in capsys.readouterr().err


def test_a_robot_that_only_asks_needs_no_weights(tmp_path):
    from checkpoints import make_checkpoint

    from depthlm_ros.errors import ModelError
    from depthlm_ros.estimator import Estimator

    folder = make_checkpoint(tmp_path / "small", "qwen3_vl", dense_head=False)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with FaultServer("vllm") as server:
        options = EngineOptions(server_urls=(server.url,), server_timeout_s=60.0)
        with Estimator.load(str(folder), engine="openai", options=options) as estimator:
            assert estimator.engine.info.engine == "openai"
            assert "unproven" in estimator.complaints[0]
    with pytest.raises(ModelError, match="safetensors"):
        Estimator.load(str(folder), device="cpu")
