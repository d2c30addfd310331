"""How much goes at once is planned from what is free; when memory runs out all the same, no answer is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from depthlm_ros.engines import answering, planner
from depthlm_ros.engines.decoder import Decoder
from depthlm_ros.engines.keys import Continuations
from depthlm_ros.engines.planner import Planner, attempt, free_bytes, out_of_memory
from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.errors import EngineError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NEW_TOKENS = 8
SHORTAGES = {
    "of a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "of a CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you"),
    "of a library": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


def noise(seed=0, size=(112, 112)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def questions(count=30):
    return [f"How far is ({at}, {7 * at})" + "?" * (1 + at % 3) for at in range(count)]


@pytest.fixture(params=SHORTAGES)
def shortage(request):
    return SHORTAGES[request.param]


@pytest.fixture(scope="module")
def shared_engine(qwen3_vl_checkpoint):
    return TransformersEngine.load(qwen3_vl_checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def engine(shared_engine):
    """With a planner of its own, that has found out nothing yet."""
    return TransformersEngine(shared_engine.model, shared_engine.processor, shared_engine.info)


class Short:
    """Makes a method fail where it is given too much.

    Attributes:
        given: the sizes that it was called with.
        failures: how often it failed.
    """

    def __init__(self, monkeypatch, owner, name, size, most, error, *, late=False):
        self.given, self.failures = [], 0
        method = getattr(owner, name)

        def wrapped(*args, **options):
            self.given.append(size(*args, **options))
            result = method(*args, **options) if late else None
            if self.given[-1] > most:
                self.failures += 1
                raise error
            return result if late else method(*args, **options)

        monkeypatch.setattr(owner, name, wrapped)


def rows_of(decoder, ids, *_):
    return len(ids)


# ---------------------------------------------------------------- planning


def a_planner(monkeypatch, device=CUDA, free=1 << 30, **options):
    monkeypatch.setattr(planner, "free_bytes", lambda device: free)
    sizes = {"token_bytes": 1 << 10, "activation_bytes": 1 << 14, "score_bytes": 1 << 16}
    return Planner(device, **(sizes | options))


def test_groups_fit_into_a_share_of_what_is_free(monkeypatch):
    some = a_planner(monkeypatch, free=100 << 20)
    assert some.group(100) == int(0.3 * (100 << 20) / (100 << 10))
    assert some.group(1000) * 10 <= some.group(100)
    assert a_planner(monkeypatch, free=1 << 50).group(100) == planner.LARGEST_GROUP
    assert a_planner(monkeypatch, CPU, free=1 << 50).group(100) == planner.LARGEST_CPU_GROUP
    assert a_planner(monkeypatch, free=0).group(100) == 1
    assert a_planner(monkeypatch, largest=7).group(100) == 7


def test_passes_fit_with_what_is_scored(monkeypatch):
    some = a_planner(monkeypatch, free=1 << 30)
    rows = some.rows(64, 8)
    assert rows * (64 * (1 << 14) + 8 * (1 << 16)) <= 0.3 * (1 << 30)
    assert a_planner(monkeypatch, free=0).rows(64, 8) == 1


def test_passes_on_a_cpu_are_as_its_caches(monkeypatch):
    some = a_planner(monkeypatch, CPU, free=1)
    assert some.rows(64, 8) * 64 * (1 << 14) <= planner.CPU_PASS_BYTES
    wide = a_planner(monkeypatch, CPU, activation_bytes=1 << 20)
    assert wide.rows(64, 8) * 64 == planner.CPU_PASS_TOKENS


def test_what_was_found_once_is_remembered(monkeypatch):
    some = a_planner(monkeypatch, free=1 << 30)
    found = some.rows(64, 8), some.rows(60, 8)
    monkeypatch.setattr(planner, "free_bytes", lambda device: 1 << 20)
    assert (some.rows(64, 8), some.rows(60, 8)) == found
    assert some.rows(30, 8) < found[0]


def test_a_pass_that_did_not_fit_is_half_as_large(monkeypatch):
    some = a_planner(monkeypatch)
    assert some.halve(60, 20) and some.rows(60, 1) == 10
    assert some.halve(60, 10) and some.rows(60, 1) == 5 and some.rows(50, 1) == 6
    assert some.halve(60, 5) and some.halve(60, 2) and some.rows(60, 1) == 1
    assert not some.halve(60, 1) and some.rows(60, 1) == 1


def test_a_group_that_did_not_fit_is_half_as_large(monkeypatch):
    some = a_planner(monkeypatch)
    assert some.halve_group(100, 40) and some.group(100) == 20
    assert some.group(50) == 40, "shorter ones are as many more"
    assert not some.halve_group(100, 1)


def test_memory_that_ran_out_is_known_by_its_errors(shortage):
    assert out_of_memory(shortage)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of range"))


def test_only_memory_is_tried_again(shortage):
    tried = []

    def fails(error):
        tried.append(error)
        raise error

    assert attempt(lambda: 5, lambda: pytest.fail("nothing ran out")) == 5
    assert attempt(lambda: fails(shortage), lambda: True) is None
    with pytest.raises(RuntimeError) as raised:
        attempt(lambda: fails(shortage), lambda: False)
    assert raised.value is shortage
    with pytest.raises(RuntimeError, match="shapes"):
        attempt(lambda: fails(RuntimeError("shapes")), lambda: pytest.fail("it isn't the memory"))
    assert len(tried) == 3


def test_what_is_free_is_known_and_plausible():
    assert 1 << 20 < free_bytes(CPU) < 1 << 50


# ---------------------------------------------------------------- running out


@pytest.mark.parametrize("late", [False, True], ids=["before it starts", "after its keys are stored"])
def test_a_pass_that_runs_out_is_halved_and_no_answer_lost(engine, shared_engine, monkeypatch, shortage, late):
    expected = shared_engine.answer_shared(noise(), questions(), NEW_TOKENS)
    short = Short(monkeypatch, Decoder, "extend", rows_of, 4, shortage, late=late)
    answers = engine.answer_shared(noise(), questions(), NEW_TOKENS)
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert [a.confidence for a in answers] == pytest.approx([a.confidence for a in expected], rel=1e-3)
    assert short.failures and max(short.given) == len(questions())
    # 30, 15, 7 and then 3 in each pass; what was found out is kept for the next frame.
    failures = short.failures
    assert failures <= 8
    engine.answer_shared(noise(1), questions(), NEW_TOKENS)
    assert short.failures == failures


def test_rows_of_several_lengths_are_halved_whatever_the_first_one_has(engine, shared_engine, monkeypatch, shortage):
    """Their lengths lie on both sides of what is remembered together."""
    asked = [f"How far is {at}" + " and so on" * (at // 2) for at in range(12)]
    expected = shared_engine.answer_shared(noise(), asked, NEW_TOKENS)
    short = Short(monkeypatch, Decoder, "extend", rows_of, 2, shortage)
    answers = engine.answer_shared(noise(), asked, NEW_TOKENS)
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert short.failures


def test_one_question_that_does_not_fit_is_an_error_with_the_remedy(engine, monkeypatch, shortage):
    Short(monkeypatch, Decoder, "extend", rows_of, 0, shortage)
    with pytest.raises(EngineError, match="ran out of memory .* ask for smaller images") as raised:
        engine.answer_shared(noise(), questions(3), NEW_TOKENS)
    assert raised.value.__cause__ is shortage


def test_after_an_error_the_engine_answers_again(engine, shared_engine, monkeypatch, shortage):
    with monkeypatch.context() as patch:
        Short(patch, Decoder, "extend", rows_of, 0, shortage)
        with pytest.raises(EngineError):
            engine.answer_shared(noise(), questions(), NEW_TOKENS)
    expected = shared_engine.answer_shared(noise(), questions(), NEW_TOKENS)
    answers = engine.answer_shared(noise(), questions(), NEW_TOKENS)
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]


def test_other_errors_are_not_taken_for_a_lack_of_memory(engine, monkeypatch):
    Short(monkeypatch, Decoder, "extend", rows_of, 0, RuntimeError("a kernel is missing"))
    with pytest.raises(RuntimeError, match="a kernel is missing"):
        engine.answer_shared(noise(), questions(), NEW_TOKENS)


def test_groups_whose_keys_find_no_room_are_halved(engine, shared_engine, monkeypatch, shortage):
    expected = shared_engine.answer_shared(noise(), questions(), NEW_TOKENS)
    rooms = []

    def room(decoder, rows, capacity):
        rooms.append(rows)
        if rows > 8:
            raise shortage
        return Continuations(decoder, rows, capacity)

    monkeypatch.setattr(answering, "Continuations", room)
    answers = engine.answer_shared(noise(), questions(), NEW_TOKENS)
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert rooms[:3] == [30, 15, 7]
    engine.answer_shared(noise(), questions(), NEW_TOKENS)
    assert max(rooms[3:]) == 7


# ---------------------------------------------------------------- images


def images_of(decoder, embeds, *_, **__):
    return len(embeds)


def blocks(count):
    random = np.random.default_rng(3)
    return [(8 * at, 4 * at, random.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for at in range(count)]


def marked(engine):
    return engine.answer_marked(noise(), blocks(7), ["How far is the arrow?"] * 7, NEW_TOKENS)


def each(engine):
    images = [noise(seed) for seed in range(6)] + [noise(9, (112, 224))]
    return engine.answer_each(images, questions(7), NEW_TOKENS)


@pytest.mark.parametrize("ask", [marked, each])
def test_images_that_do_not_fit_together_go_in_smaller_parts(engine, shared_engine, monkeypatch, shortage, ask):
    expected = ask(shared_engine)
    short = Short(monkeypatch, Decoder, "prefill", images_of, 2, shortage)
    assert [a.token_ids for a in ask(engine)] == [a.token_ids for a in expected]
    assert 0 < short.failures <= 2 and max(short.given) >= 6
    failures = short.failures
    ask(engine)
    assert short.failures == failures, "what fits is remembered"


@pytest.mark.parametrize("ask", [marked, each])
def test_the_work_of_all_parts_is_counted(engine, monkeypatch, shortage, ask):
    ask(engine)
    together = engine.work
    Short(monkeypatch, Decoder, "prefill", images_of, 2, shortage)
    ask(engine)
    assert engine.work.passes > together.passes and engine.work.fed >= engine.work.passes
    assert 0 < engine.work.kept_bytes <= together.kept_bytes


@pytest.mark.parametrize("ask", [marked, each])
def test_the_plain_path_takes_smaller_parts_too(shared_engine, monkeypatch, shortage, ask):
    expected = ask(shared_engine)
    plain = TransformersEngine(shared_engine.model, shared_engine.processor, shared_engine.info, plain=True)
    short = Short(monkeypatch, plain._plain, "forward", lambda embeds, *_: len(embeds), 3, shortage)
    assert [a.token_ids for a in ask(plain)] == [a.token_ids for a in expected]
    assert short.failures


@pytest.mark.parametrize("ask", [marked, each])
def test_one_image_that_does_not_fit_is_an_error_with_the_remedy(engine, monkeypatch, shortage, ask):
    with monkeypatch.context() as patch:
        Short(patch, Decoder, "prefill", images_of, 0, shortage)
        with pytest.raises(EngineError, match="ran out of memory"):
            ask(engine)
    assert len(ask(engine)) == 7


def test_an_image_of_many_questions_that_does_not_fit_is_an_error_with_the_remedy(engine, monkeypatch, shortage):
    Short(monkeypatch, Decoder, "prefill", images_of, 0, shortage)
    with pytest.raises(EngineError, match="ran out of memory"):
        engine.answer_shared(noise(), questions(3), NEW_TOKENS)
