"""What a server is sent and what is read from its answers: fields of each dialect, images, guides, probabilities."""

from __future__ import annotations

import base64
import json
import math
import time

import cv2
import numpy as np
import pytest
from fault_server import LOGPROB, FaultServer

from depthlm_ros.cards import load_card
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.served.asking import retry_after
from depthlm_ros.engines.served.client import Response
from depthlm_ros.engines.served.dialects import DIALECTS, NoAnswer, WrongModel, read_answer, read_error
from depthlm_ros.engines.served.engine import load_served
from depthlm_ros.engines.served.images import MOST_PIXELS, Picture, pictures_of
from depthlm_ros.errors import ImageError

SENTENCE = "The point is around {number} meters away."
QUESTIONS = [f"how far is ({n}, 7)?" for n in range(40)]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (128, 160, 3), dtype=np.uint8)


@pytest.fixture
def load():
    """Engines for servers, closed at the end."""
    card, source = load_card("demo")
    made = []

    def make(*servers: FaultServer, **options):
        urls = tuple(server.url for server in servers)
        # However slow the machine is: no test here is about servers that are.
        options = {"server_timeout_s": 60.0, **options}
        made.append(load_served(source, card, EngineOptions(server_urls=urls, **options)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def together(server: FaultServer, count: int, alone: str = "") -> None:
    """Has every question wait until so many are under way at once; but for one."""
    say = server.say

    def said(images, text, guide) -> str:
        until = time.monotonic() + 20.0
        while text != alone and server.busiest < count and time.monotonic() < until:
            time.sleep(0.01)
        return say(images, text, guide)

    server.say = said


def expected(server: FaultServer, image: np.ndarray, text: str) -> str:
    return server.number(np.ascontiguousarray(image[..., ::-1]).tobytes(), text)


@pytest.mark.parametrize("dialect", ["trtllm-serve", "vllm", "edge-llm"])
def test_answers_keep_to_the_guide_and_come_in_the_order_of_the_questions(dialect, load, image):
    with FaultServer(dialect) as server:
        engine = load(server)
        answers = engine.answer_shared(image, QUESTIONS, 24, expects=SENTENCE)
        assert engine.complaints == ()
    said = [SENTENCE.replace("{number}", expected(server, image, text)) for text in QUESTIONS]
    assert [answer.text for answer in answers] == said
    assert len(set(said)) > 20
    # Four characters of a number, a token each, without the end of the answer.
    assert answers[0].confidence == pytest.approx(math.exp(4 * LOGPROB))
    assert engine.info.version.startswith(dialect) and engine.info.model == "small"
    assert not engine.info.dense and not engine.info.distributions


def test_a_server_without_guides_and_probabilities_answers_all_the_same(load, image):
    with FaultServer("transformers") as server:
        engine = load(server, server_model="small")
        answers = engine.answer_shared(image, QUESTIONS[:4], 24, expects=SENTENCE)
        assert server.busiest == 1, "it answers one question at a time; more would only wait there"
        assert engine.complaints == ()
    assert [answer.text for answer in answers] == [expected(server, image, text) for text in QUESTIONS[:4]]
    assert math.isnan(answers[0].confidence)


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_every_question_is_greedy_and_limited_and_shows_the_image_first(dialect, load, image):
    with FaultServer(dialect) as server:
        load(server, server_model="small").answer_shared(image, QUESTIONS[:3], 17, expects=SENTENCE)
    assert len(server.requests) > 3
    for asked in server.requests[-3:]:
        assert (asked["temperature"], asked["max_tokens"]) == (0, 17)
        assert "max_completion_tokens" not in asked and "stop" not in asked
        content = asked["messages"][-1]["content"]
        assert [item["type"] for item in content] == ["image_url", "text"]
        encoded = base64.b64decode(content[0]["image_url"]["url"].partition(",")[2])
        np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(encoded, np.uint8), 1)[..., ::-1], image)


def test_the_first_question_about_an_image_is_alone_and_the_rest_go_together(load, image):
    with FaultServer() as server:
        engine = load(server, server_concurrency=8)
        server.busiest = 0
        engine.answer_shared(image, QUESTIONS[:1], 8)
        assert server.busiest == 1
        before = len(server.requests)
        together(server, 8, QUESTIONS[0])
        engine.answer_shared(image, QUESTIONS[:17], 8)
        # The one ahead, then no more at once than allowed.
        assert server.prompts[before] == QUESTIONS[0]
        assert server.busiest == 8


def test_images_of_their_own_wait_for_nobody_and_each_is_encoded_once(load, image, monkeypatch):
    encoded = []
    encode = Picture._encode
    monkeypatch.setattr(Picture, "_encode", lambda self: encoded.append(self) or encode(self))
    others = [np.roll(image, shift, axis=1) for shift in range(3)]
    with FaultServer() as server:
        engine = load(server)
        server.busiest = 0
        together(server, 3)
        encoded.clear()
        answers = engine.answer_each(others, QUESTIONS[:3], 8)
        assert server.busiest == 3 and len(encoded) == 3
        engine.answer_shared(image, QUESTIONS[:5], 8)
        assert len(encoded) == 4
    assert [answer.text for answer in answers] == [
        expected(server, *pair) for pair in zip(others, QUESTIONS[:3], strict=True)
    ]


def test_no_question_is_no_answer_and_no_request(load, image):
    with FaultServer() as server:
        engine = load(server)
        before = len(server.requests)
        # Not even an image's time is up.
        engine.deadline = 0.0
        assert engine._backend.ask([]) == []
        assert len(server.requests) == before


def test_several_images_are_shown_in_their_order(load, image):
    other = image[::-1].copy()
    with FaultServer() as server:
        answers = load(server).answer_about([image, other], QUESTIONS[:2], 8)
    shown = b"".join(np.ascontiguousarray(each[..., ::-1]).tobytes() for each in (image, other))
    assert [answer.text for answer in answers] == [server.number(shown, text) for text in QUESTIONS[:2]]


def test_jpeg_is_near_and_small(load, image):
    smooth = cv2.GaussianBlur(image, (0, 0), 8)
    with FaultServer() as server:
        load(server, server_image="jpeg").answer_shared(smooth, QUESTIONS[:1], 8)
    url = server.requests[-1]["messages"][-1]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    shown = cv2.imdecode(np.frombuffer(base64.b64decode(url.partition(",")[2]), np.uint8), 1)[..., ::-1]
    assert abs(shown.astype(int) - smooth).max() < 12


def test_an_image_too_large_for_a_server_is_refused_with_its_size():
    side = int(MOST_PIXELS**0.5) + 1
    [[picture]] = pictures_of([(np.zeros((side, side, 3), np.uint8),)], "png")
    with pytest.raises(ImageError, match=f"{side}x{side}"):
        _ = picture.url


def test_the_system_text_of_the_card_is_sent(image):
    from dataclasses import replace

    card, source = load_card("demo")
    text = "You measure."
    with FaultServer() as server:
        engine = load_served(source, replace(card, system_text=text), EngineOptions(server_urls=(server.url,)))
        engine.answer_shared(image, QUESTIONS[:1], 8)
        engine.close()
    assert server.requests[-1]["messages"][0] == {"role": "system", "content": text}


def test_a_question_with_quotes_backslashes_and_other_scripts_arrives_as_it_is(load, image):
    texts = ['"quoted"', "back\\slash\n", "Wie weit? \u8ddd\u79bb \U0001f600", "image-0"]
    with FaultServer() as server:
        load(server, server_concurrency=1).answer_shared(image, texts, 8)
    assert server.prompts[-4:] == texts


def test_a_guide_that_is_dropped_without_a_word_is_told_with_the_remedy(load, image):
    with FaultServer("trtllm-serve") as server:
        server.guides = False
        engine = load(server)
        assert any("guided_decoding_backend" in text and server.url in text for text in engine.complaints)
        answers = engine.answer_shared(image, QUESTIONS[:2], 8, expects=SENTENCE)
    assert [answer.text for answer in answers] == [expected(server, image, text) for text in QUESTIONS[:2]]


def test_a_guide_that_is_no_longer_kept_to_is_told_once(load, image):
    with FaultServer("edge-llm") as server:
        engine = load(server)
        assert engine.complaints == ()
        server.guides = False
        engine.answer_shared(image, QUESTIONS[:9], 8, expects=SENTENCE)
        assert len(engine.complaints) == 1 and "doesn't keep to the guide" in engine.complaints[0]


def test_a_field_that_is_refused_is_left_out_from_then_on(load, image):
    with FaultServer("edge-llm") as server:
        server.refuses = {"logprobs"}
        engine = load(server)
        answers = engine.answer_shared(image, QUESTIONS[:5], 8, expects=SENTENCE)
        assert "logprobs" not in server.requests[-1] and "guided_decoding" in server.requests[-1]
        assert math.isnan(answers[0].confidence) and answers[0].text.startswith("The point")
        assert engine.complaints == ()
        # Guides go while the engine runs: somebody has restarted the server with another engine.
        server.refuses = {"logprobs", "guided_decoding"}
        answers = engine.answer_shared(image, QUESTIONS[:30], 8, expects=SENTENCE)
        assert [answer.text for answer in answers] == [expected(server, image, text) for text in QUESTIONS[:30]]
        assert any("refuses guides" in text for text in engine.complaints)


def test_the_new_name_of_the_longest_answer_is_taken_where_the_old_one_is_refused():
    said = "Unsupported parameter: 'max_tokens'; use 'max_completion_tokens' instead."
    body = json.loads(DIALECTS["generic"].without(said).body("m", None, (), "?", 5, ""))
    assert body["max_completion_tokens"] == 5 and "max_tokens" not in body


def test_guides_are_not_sent_where_they_are_not_wanted(load, image):
    with FaultServer("vllm") as server:
        load(server, guided=False).answer_shared(image, QUESTIONS[:2], 8, expects=SENTENCE)
    assert all("structured_outputs" not in asked for asked in server.requests)


def answer(**changes) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": "5.2"}, "finish_reason": "stop"}
    return {"model": "m", "choices": [choice | changes]}


@pytest.mark.parametrize(
    "body",
    [
        None, [], {}, 7, {"choices": []}, {"choices": [None]}, {"choices": [{}]}, {"choices": {"0": 1}},
        answer(message=None), answer(message={"content": None}), answer(message={"content": 5}),
        answer(finish_reason="error"), answer(finish_reason=["stop"]), {"error": {"message": "no"}, **answer()},
    ],
)  # fmt: skip
def test_what_is_no_answer_is_not_taken_for_one(body):
    with pytest.raises(NoAnswer):
        read_answer(body, frozenset({"m"}))


def test_another_models_answer_is_refused_and_an_alias_is_not():
    with pytest.raises(WrongModel, match="'m'"):
        read_answer(answer(), frozenset({"n"}))
    assert read_answer(answer(), frozenset({"n", "m"}))[0].text == "5.2"
    assert read_answer(answer(), frozenset({"n"}), exact=False)[0].text == "5.2"


def test_thinking_that_a_server_took_out_is_put_back():
    said = answer(message={"content": "<answer>5</answer>", "reasoning_content": "far"})
    assert read_answer(said, frozenset({"m"}))[0].text == "<think>far</think><answer>5</answer>"


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        ([("5", -0.1), (".2", -0.2)], ("5", ".2")),
        ([("5", -0.1), (".2", -0.2), ("<|im_end|>", 0.0)], ("5", ".2")),
        ([(" ", -0.1), ("5.2", -0.2), ("</s>", 0.0)], (" ", "5.2")),
        ([("6", -0.1), (".2", -0.2)], ()),
        ([("5.2", None)], ()),
        ([("5.2", float("nan"))], ()),
        ([("5.2", 10**400)], ()),
        ([("", -0.1)] * 5, ()),
        ([(None, -0.1)], ()),
    ],
)
def test_probabilities_are_taken_only_where_they_fit_the_text(tokens, pieces):
    told = {"content": [{"token": token, "logprob": value} for token, value in tokens]}
    reply, _ = read_answer(answer(logprobs=told), frozenset({"m"}))
    assert reply.pieces == pieces and len(reply.logprobs) == len(pieces)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "too long", "type": "x"}}, {"error": "too long"}, {"detail": "too long"},
        {"object": "error", "message": "too long"}, {"detail": [{"msg": "too long"}]},
    ],
)  # fmt: skip
def test_refusals_of_every_shape_are_read(body):
    assert "says 400" in read_error(400, body, "") and "too long" in read_error(400, body, "")


def test_a_refusal_without_json_is_quoted():
    assert "Internal Server Error" in read_error(500, None, "Internal Server Error")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "86400"}, None),
        ({"retry-after": "soon"}, None),
        # By the server's clock, whatever ours says.
        ({"retry-after": "Sat, 01 Mar 2031 10:00:07 GMT", "date": "Sat, 01 Mar 2031 10:00:00 GMT"}, 7.0),
        ({"retry-after": "Sat, 01 Mar 2031 10:00:07 -0000", "date": "Sat, 01 Mar 2031 10:00:00 GMT"}, 7.0),
        ({"retry-after": "Sat, 01 Mar 2031 10:00:00 GMT", "date": "Sat, 01 Mar 2031 10:00:07 GMT"}, None),
        ({"retry-after": "Sun, 02 Mar 2031 10:00:00 GMT", "date": "Sat, 01 Mar 2031 10:00:00 GMT"}, None),
        ({"retry-after": "Sat, 01 Mar 2003 10:00:00 GMT", "date": "a moment ago"}, None),
        ({"retry-after": "Wed, 21 Oct 99999999999 07:28:00 GMT"}, None),
        ({"retry-after": "soon", "date": "Wed, 21 Oct 99999999999 07:28:00 GMT"}, None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(headers, seconds):
    assert retry_after(Response(503, b"", headers)) == seconds
