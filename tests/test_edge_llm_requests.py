"""What llm_inference of TensorRT Edge-LLM is told and what is read from it, as plain values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from depthlm_ros.engines.edge_llm_requests import Limits, chosen_tokens, read_replies, request_file
from depthlm_ros.engines.worded import Ask
from depthlm_ros.errors import EngineError

LIMITS = Limits(input_tokens=512, capacity=640, batch=4, least_image=4, most_image=80, most_images=320, pixels=32)


def picture(width: int = 320, height: int = 256, value: int = 0) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def answer(index: int, text: str = "1.50", **more) -> dict:
    return {"output_text": text, "request_idx": index, "batch_idx": 0, "finish_reason": "end-of-sequence", **more}


def test_a_request_file_says_all_that_the_defaults_would_get_wrong():
    first, second = picture(), picture(value=9)
    asks = [Ask((first,), "a?", 16, "[0-9]+"), Ask((first, second), "b?", 24)]
    paths = {id(first): "/x/0.png", id(second): "/x/1.png"}
    told = request_file(asks, lambda image: paths[id(image)], batch=2, system="Be brief.", reuse=True)
    assert (told["top_k"], told["temperature"], told["top_p"]) == (1, 1.0, 1.0)
    assert told["batch_size"] == 2 and told["max_generate_length"] == 24 and told["num_logprobs"] > 0
    assert told["enable_thinking"] is False and told["apply_chat_template"] is True
    assert told["context_cache_lookup_policy"] == "use_cache"
    assert told["context_cache_commit_policy"] == "prefill_state_only"
    one, two = told["requests"]
    assert one["guided_decoding"] == {"regex": "[0-9]+"} and "guided_decoding" not in two
    assert one["messages"] == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "/x/0.png", "do_resize": False},
                {"type": "text", "text": "a?"},
            ],
        },
    ]
    assert [item.get("image") for item in two["messages"][1]["content"]] == ["/x/0.png", "/x/1.png", None]
    assert "stop" not in one


def test_without_a_system_text_there_is_no_system_message_and_an_old_program_hears_of_no_cache():
    told = request_file([Ask((picture(),), "a?", 16)], lambda image: "/x", batch=1, system=None, reuse=None)
    assert [message["role"] for message in told["requests"][0]["messages"]] == ["user"]
    assert not [name for name in told if name.startswith("context_cache")]
    bypass = request_file([Ask((), "a?", 16)], lambda image: "/x", batch=1, system=None, reuse=False)
    assert bypass["context_cache_lookup_policy"] == "bypass"


def test_answers_are_sorted_by_their_index():
    output = {"responses": [answer(1, "2.00"), answer(0, "1.00")]}
    assert [reply.text for reply in read_replies(output, 2)] == ["1.00", "2.00"]


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ([], "no list of responses"),
        ({"responses": "none"}, "no list of responses"),
        ({"responses": [answer(0)]}, "answered 1 of 2"),
        ({"responses": [answer(0), answer(0)]}, "answered 2 of 2"),
        ({"responses": [answer(0), answer(1, finish_reason="error")]}, "request 1: finish_reason 'error'"),
        ({"responses": [answer(0), answer(1, finish_reason="not-finished")]}, "not-finished"),
        ({"responses": [answer(0), answer(1, finish_reason=None)]}, "request 1"),
        ({"responses": [answer(0), {"request_idx": 1, "output_text": 5, "finish_reason": "max-length"}]}, "request 1"),
    ],
)
def test_what_is_no_answer_is_refused(output, told):
    with pytest.raises(EngineError, match=told):
        read_replies(output, 2)


def test_probabilities_are_those_of_the_tokens_that_were_taken():
    def step(*entries):
        return [{"token_id": 7, "token": token, "bytes": [], "logprob": logprob} for token, logprob in entries]

    steps = [step(("1", -0.1), ("2", -3.0)), step(("7", -0.2), (".", -0.9)), step(("5", -0.3)), step(("<end>", -0.01))]
    (reply,) = read_replies({"responses": [answer(0, "1.5", logprobs=steps)]}, 1)
    # A guide took the point, which wasn't the likeliest.
    assert reply.pieces == ("1", ".", "5") and reply.logprobs == (-0.1, -0.9, -0.3)
    (reply,) = read_replies({"responses": [answer(0, "1.5", logprobs=[[{"token": "1"}]])]}, 1)
    assert (reply.text, reply.pieces) == ("1.5", ())


def test_a_choice_that_leads_nowhere_is_taken_back():
    steps = [[("12", -0.1), ("1", -0.5)], [("2", -0.2)], [(".", -0.1)], [("5", -0.1)]]
    # "12" is likelier, but then the second step has nothing to go on with.
    assert chosen_tokens("12.5", steps) == (("1", "2", ".", "5"), (-0.5, -0.2, -0.1, -0.1))
    assert chosen_tokens("9", steps) == ((), ())
    assert chosen_tokens("12.50", steps) == ((), ())
    assert chosen_tokens("", steps) == ((), ())


def test_the_search_for_the_tokens_stays_quick():
    steps = [[("a", -0.1), ("aa", -0.2), ("aaa", -0.3)]] * 200
    assert chosen_tokens("a" * 150 + "b", steps) == ((), ())


def test_an_answer_of_thousands_of_tokens_is_read():
    steps = [[("b", -0.1), ("aa", -0.2), ("a", -0.5)]] * 5000
    pieces, logprobs = chosen_tokens("a" * 5000 + "b", steps)
    assert "".join(pieces) == "a" * 5000 + "b" and len(pieces) == len(logprobs)
    told = answer(0, "a" * 5000, logprobs=[[{"token": "a", "logprob": -1}]] * 5000)
    (reply,) = read_replies({"responses": [told]}, 1)
    assert reply.pieces == ("a",) * 5000


def test_images_that_would_be_resized_are_refused():
    LIMITS.check([Ask((picture(),), "a?", 16)])
    for width, height in ((330, 256), (640, 480), (32, 32)):
        with pytest.raises(EngineError, match=f"{width}x{height}.*would resize it"):
            LIMITS.check([Ask((picture(width, height),), "a?", 16)])


def test_questions_that_do_not_fit_are_refused():
    with pytest.raises(EngineError, match="answer of 600 don't fit"):
        LIMITS.check([Ask((picture(),), "a?", 600)])
    with pytest.raises(EngineError, match="7 images of together 560 tokens.*built for 512 tokens of prompt"):
        replace(LIMITS, most_images=1000).check([Ask((picture(),) * 7, "a?", 16)])
    with pytest.raises(EngineError, match="2 images of together 160 tokens; the engine was built for 80"):
        replace(LIMITS, most_images=80).check([Ask((picture(), picture()), "a?", 16)])
    with pytest.raises(EngineError, match="has 18 images"):
        LIMITS.check([Ask((picture(64, 64),) * 18, "a?", 16)])
    with pytest.raises(EngineError, match="131072 bytes"):
        LIMITS.check([Ask((picture(),), "a" * 140_000, 16)])


def test_a_batch_holds_as_many_images_as_the_tower_was_built_for():
    one, two = Ask((picture(),), "a?", 16), Ask((picture(), picture()), "a?", 16)
    assert LIMITS.together([one], 0) == 4
    assert LIMITS.together([one], 3) == 3
    assert LIMITS.together([one], 99) == 4
    assert LIMITS.together([one, two], 0) == 2
    assert LIMITS.together([Ask((), "a?", 16)], 0) == LIMITS.together([], 0) == 4
