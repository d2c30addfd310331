"""Engine tensorrt_llm on the recorded LLM API answers what transformers answers, and copes with what releases do."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import time

import numpy as np
import pytest
import recorded_llm_api
from recorded_llm_api import Release

from depthlm_ros.cards import load_card
from depthlm_ros.engines import load_engine
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.tensorrt_llm_backend import read_logprobs
from depthlm_ros.engines.tensorrt_llm_contract import MEMBERS, MODULE, PARAMETERS, check_contract
from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.engines.worded import GUIDED_NUMBER
from depthlm_ros.errors import ConfigError, DialectError, EngineError, MissingDependencyError, ModelError
from depthlm_ros.machine import Machine

SIZE = (112, 168)
NEW_TOKENS = 10
QUESTIONS = [f"how far is ({17 * i}, {23 * i})?" for i in range(9)]
ARCHITECTURES = ["qwen3_vl", "qwen2_5_vl"]


def noise(seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture
def installed(monkeypatch):
    """Installs a release of the recorded API; returns what it tells of itself."""

    def install(**told):
        release = Release(**told)
        for name, module in recorded_llm_api.module(release).items():
            monkeypatch.setitem(sys.modules, name, module)
        return release

    return install


@pytest.fixture(params=ARCHITECTURES)
def folder(request):
    return request.getfixturevalue(f"{request.param}_checkpoint")


def load(folder, **options):
    return load_engine(folder, load_card(folder)[0], engine="tensorrt_llm", options=EngineOptions(**options))


def reference(folder):
    return TransformersEngine.load(folder, device="cpu", dtype="float32", system_text=load_card(folder)[0].system_text)


def test_answers_about_one_image_and_two_equal_those_of_transformers(folder, installed):
    installed()
    engine, own = load(folder), reference(folder)
    for images in ([noise()], [noise(1), noise(2, (84 * 4, 112))]):
        ours = own.answer_about(images, QUESTIONS, NEW_TOKENS)
        answers = engine.answer_about(images, QUESTIONS, NEW_TOKENS)
        assert [answer.text for answer in answers] == [answer.text for answer in ours]
        assert [answer.confidence for answer in answers] == pytest.approx([a.confidence for a in ours], abs=1e-4)
    assert len({answer.text for answer in answers}) > 3
    assert engine.complaints == ()
    engine.close()


def test_each_and_marked_images_keep_their_order(folder, installed):
    installed()
    engine, own = load(folder), reference(folder)
    images = [noise(seed, (112, 168 - 28 * seed)) for seed in range(3)]
    asked = [images[i % 3] for i in range(6)]
    said = engine.answer_each(asked, QUESTIONS[:6], NEW_TOKENS)
    assert [a.text for a in said] == [a.text for a in own.answer_each(asked, QUESTIONS[:6], NEW_TOKENS)]
    blocks = [(8 * i, 8 * i, np.full((16, 16, 3), 40 * i, np.uint8)) for i in range(4)]
    said = engine.answer_marked(noise(), blocks, QUESTIONS[:4], NEW_TOKENS)
    assert [a.text for a in said] == [a.text for a in own.answer_marked(noise(), blocks, QUESTIONS[:4], NEW_TOKENS)]
    engine.close()


def test_the_first_question_about_an_image_is_answered_before_the_others_start(qwen3_vl_checkpoint, installed):
    release = installed()
    engine = load(qwen3_vl_checkpoint)
    release.log.clear()
    image, other = noise(), noise(1)
    engine.answer_each([image, image, other, image, other], QUESTIONS[:5], NEW_TOKENS)
    events = [(kind, what[0] if kind == "start" else what) for kind, what in release.log if kind in ("start", "done")]
    place = {(kind, i): at for at, (kind, what) in enumerate(events) for i in range(5) if QUESTIONS[i] in what}
    led = max(place["done", 0], place["done", 2])
    assert all(place["start", i] > led for i in (1, 3, 4))
    engine.close()


def test_without_reuse_nothing_waits_and_the_llm_is_told(qwen3_vl_checkpoint, installed):
    release = installed()
    engine = load(qwen3_vl_checkpoint, prefix_reuse=False)
    assert release.told("LLM")[0]["kv_cache_config"].enable_block_reuse is False
    release.log.clear()
    release.together = len(QUESTIONS)
    engine.answer_shared(noise(), QUESTIONS, 2)
    assert max(release.told("under way")) == len(QUESTIONS)
    engine.close()


def test_no_more_requests_are_under_way_than_are_allowed(qwen3_vl_checkpoint, installed):
    release = installed()
    engine = load(qwen3_vl_checkpoint, batch_size=3, prefix_reuse=False)
    release.together = 3
    engine.answer_shared(noise(), QUESTIONS, 2)
    assert max(release.told("under way")) == 3
    engine.close()


def test_the_llm_is_told_its_limits_and_a_guided_decoding_backend(qwen3_vl_checkpoint, installed):
    release = installed()
    load(qwen3_vl_checkpoint, dtype="bfloat16").close()
    told = release.told("LLM")[0]
    assert told["guided_decoding_backend"] == "xgrammar"
    assert told["dtype"] == "bfloat16"
    assert told["trust_remote_code"] is False
    assert told["max_seq_len"] <= told["max_num_tokens"]
    assert 0 < told["kv_cache_config"].free_gpu_memory_fraction < 0.9
    assert release.told("shutdown") == [None]


def test_numbers_are_held_to_their_sentence(folder, installed):
    installed()
    engine = load(folder)
    answers = engine.answer_shared(noise(), QUESTIONS, 24, expects="It is {number} m.")
    pattern = rf"It is {GUIDED_NUMBER} m\."
    assert all(re.fullmatch(pattern, answer.text) for answer in answers)
    assert all(answer.confidences and 0 <= answer.confidence <= 1 for answer in answers)
    free = load(folder, guided=False)
    said = free.answer_shared(noise(), QUESTIONS, 24, expects="It is {number} m.")
    assert not any(answer.text.startswith("It is") for answer in said)
    assert free.complaints == ()
    engine.close()
    free.close()


@pytest.mark.parametrize("told", [{"keeps_guides": False}, {"without": ("SamplingParams(guided_decoding)",)}])
def test_guides_that_do_not_hold_are_left_out_with_a_complaint(qwen3_vl_checkpoint, installed, told):
    installed(**told)
    engine, own = load(qwen3_vl_checkpoint), reference(qwen3_vl_checkpoint)
    assert len(engine.complaints) == 1 and "xgrammar" in engine.complaints[0]
    said = engine.answer_shared(noise(), QUESTIONS[:3], NEW_TOKENS, expects="It is {number} m.")
    assert [a.text for a in said] == [a.text for a in own.answer_shared(noise(), QUESTIONS[:3], NEW_TOKENS)]
    engine.close()


@pytest.mark.parametrize(
    "without", [("LLM.preprocess",), ("LLM.generate_async(cache_salt)",), ("SamplingParams(stop_token_ids)",)]
)
def test_a_release_without_something_optional_answers_the_same(qwen3_vl_checkpoint, installed, without):
    release = installed(without=without)
    engine, own = load(qwen3_vl_checkpoint), reference(qwen3_vl_checkpoint)
    said = engine.answer_shared(noise(), QUESTIONS, NEW_TOKENS)
    assert [a.text for a in said] == [a.text for a in own.answer_shared(noise(), QUESTIONS, NEW_TOKENS)]
    assert bool(release.told("preprocess")) == (without != ("LLM.preprocess",))
    engine.close()


def test_images_that_could_be_taken_for_each_other_get_salts_or_no_reuse(qwen3_vl_checkpoint, installed):
    release = installed()
    engine = load(qwen3_vl_checkpoint)
    release.log.clear()
    flat = np.full((112, 168, 3), 90, np.uint8)
    engine.answer_each([flat, flat.reshape(168, 112, 3)], QUESTIONS[:2], 2)
    assert len({salt for _, salt in release.told("start")}) == 2
    engine.close()
    release = installed(without=("LLM.generate_async(cache_salt)",))
    engine = load(qwen3_vl_checkpoint)
    assert [told["kv_cache_config"].enable_block_reuse for told in release.told("LLM")] == [False]
    assert any("no reuse" in reason for reason in engine.info.reasons)
    engine.close()


def test_reuse_that_mixes_images_is_found_and_switched_off(qwen3_vl_checkpoint, installed):
    release = installed(mixes_images=True)
    engine, own = load(qwen3_vl_checkpoint), reference(qwen3_vl_checkpoint)
    assert [told["kv_cache_config"].enable_block_reuse for told in release.told("LLM")] == [True, False]
    assert release.told("shutdown") == [None]
    first, second = noise(), noise()
    second[56:] = 255 - second[56:]
    said = [engine.answer_shared(image, QUESTIONS[:2], NEW_TOKENS)[0].text for image in (first, second)]
    assert said == [own.answer_shared(image, QUESTIONS[:2], NEW_TOKENS)[0].text for image in (first, second)]
    engine.close()


@pytest.mark.parametrize("keeps_timeouts", [True, False])
def test_requests_are_stopped_at_the_deadline_whatever_result_does(qwen3_vl_checkpoint, installed, keeps_timeouts):
    release = installed(keeps_timeouts=keeps_timeouts)
    engine = load(qwen3_vl_checkpoint)
    release.seconds = 300.0
    release.log.clear()
    engine.deadline = time.monotonic() + 2.0
    with pytest.raises(EngineError, match="0 of 9 questions by the deadline"):
        engine.answer_each([noise(i) for i in range(9)], QUESTIONS, NEW_TOKENS)
    assert time.monotonic() - engine.deadline < 60
    # On a slow machine not all have been started by then.
    assert len(release.told("abort")) == len(release.told("start")) > 0
    release.seconds, engine.deadline = 0.0, None
    own = reference(qwen3_vl_checkpoint)
    said = engine.answer_shared(noise(), QUESTIONS[:2], NEW_TOKENS)
    assert [a.text for a in said] == [a.text for a in own.answer_shared(noise(), QUESTIONS[:2], NEW_TOKENS)]
    engine.close()


def test_a_deadline_that_has_passed_starts_nothing(qwen3_vl_checkpoint, installed):
    release = installed()
    engine = load(qwen3_vl_checkpoint)
    release.log.clear()
    engine.deadline = time.monotonic() - 1
    with pytest.raises(EngineError, match="deadline"):
        engine.answer_shared(noise(), QUESTIONS, NEW_TOKENS)
    assert release.told("start") == []
    engine.close()


def test_a_request_that_fails_stops_the_others_and_says_why(qwen3_vl_checkpoint, installed):
    release = installed(fails_on="(34, 46)")
    engine = load(qwen3_vl_checkpoint)
    release.seconds = 0.05
    with pytest.raises(EngineError, match=r"question 3: RequestError: prompt length 5000.*max_seq_len"):
        engine.answer_shared(noise(), QUESTIONS, 2)
    assert release.told("abort")
    release.fails_on = ""
    assert len(engine.answer_shared(noise(), QUESTIONS, 2)) == len(QUESTIONS)
    engine.close()


def test_a_model_that_answers_nothing_is_not_loaded(qwen3_vl_checkpoint, installed):
    release = installed(fails_on="How far")
    with pytest.raises(EngineError, match="RequestError"):
        load(qwen3_vl_checkpoint)
    assert len(release.told("shutdown")) == len(release.told("LLM")) == 2


def test_both_forms_of_logprobs_are_read(qwen3_vl_checkpoint, installed):
    confidences = []
    for form in ("mappings", "numbers"):
        installed(logprobs=form)
        engine = load(qwen3_vl_checkpoint)
        confidences.append([a.confidences for a in engine.answer_shared(noise(), QUESTIONS, NEW_TOKENS)])
        engine.close()
    assert confidences[0] == confidences[1]
    assert any(confidences[0])
    assert read_logprobs([-0.5], [7, 8]) is None
    assert read_logprobs([{9: -0.5}], [7]) is None
    assert read_logprobs(None, [7]) is None


def test_there_are_no_maps_and_no_distributions(qwen3_vl_checkpoint, installed):
    installed()
    engine = load(qwen3_vl_checkpoint)
    assert not engine.info.dense and engine.info.words and engine.info.version == "tensorrt_llm 1.2.1"
    with pytest.raises(DialectError, match="no dense maps"):
        engine.depth_map(noise(), "")
    with pytest.raises(ConfigError, match="distribution"):
        engine.answer_shared(noise(), QUESTIONS[:1], 4, distribution=True)
    engine.close()
    engine.close()


def test_an_llm_that_does_not_start_is_told_with_a_remedy(qwen3_vl_checkpoint, installed, tmp_path):
    release = installed()
    bad = tmp_path / "model"
    shutil.copytree(qwen3_vl_checkpoint, bad)
    (bad / "llm_api.yaml").write_text("max_batch_sise: 4\nmax_seq_len: 512\n", encoding="utf-8")
    with pytest.raises(ModelError, match="invalid argument: max_batch_sise"):
        load(bad)
    (bad / "llm_api.yaml").write_text("max_seq_len: 512\ntrust_remote_code: true\n", encoding="utf-8")
    load(bad).close()
    assert release.told("LLM")[-1]["trust_remote_code"] is False
    (bad / "llm_api.yaml").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(ModelError, match="no mapping"):
        load(bad)


def test_what_it_cannot_run_is_refused_with_a_remedy(llava_checkpoint, qwen3_vl_checkpoint, installed, monkeypatch):
    installed()
    with pytest.raises(ModelError, match="no model for Pixtral"):
        load(llava_checkpoint)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        load(qwen3_vl_checkpoint, device="cpu")
    with pytest.raises(ConfigError, match="float32"):
        load(qwen3_vl_checkpoint, dtype="float32")
    jetson = Machine(board="NVIDIA Jetson AGX Orin", l4t="36.4.3")
    monkeypatch.setattr("depthlm_ros.engines.tensorrt_llm_engine.this_machine", lambda: jetson)
    with pytest.raises(ModelError, match="AGX Orin.*edge-llm"):
        load(qwen3_vl_checkpoint)


def test_a_format_that_this_gpu_does_not_run_is_refused(qwen3_vl_checkpoint, installed, tmp_path, monkeypatch):
    installed()
    folder = tmp_path / "fp8"
    shutil.copytree(qwen3_vl_checkpoint, folder)
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}', encoding="utf-8")
    for capability, runs in (("8.6", False), ("8.9", True), ("13.0", True), ("", True)):
        here = Machine(gpu="some", compute_capability=capability)
        monkeypatch.setattr("depthlm_ros.engines.tensorrt_llm_engine.this_machine", lambda here=here: here)
        if runs:
            engine = load(folder)
            assert engine.info.dtype == "fp8"
            engine.close()
        else:
            with pytest.raises(ConfigError, match="8.6.*int4_awq"):
                load(folder)


def test_without_the_package_the_message_has_the_line_that_installs_it(qwen3_vl_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(MissingDependencyError, match="pip install tensorrt_llm.*serve.sh"):
        load(qwen3_vl_checkpoint)


@pytest.mark.parametrize(
    "name", ["LLM(max_seq_len)", "SamplingParams(logprobs)", "RequestOutput.abort", "LLM.generate_async"]
)
def test_a_release_without_something_needed_is_named_at_load(qwen3_vl_checkpoint, installed, name):
    installed(without=(name,))
    with pytest.raises(MissingDependencyError) as error:
        load(qwen3_vl_checkpoint)
    assert name in str(error.value) and "1.2.1" in str(error.value)


def test_the_recorded_names_fit_themselves(installed):
    installed()
    assert check_contract(sys.modules[MODULE]) == []
    for recorded in (*PARAMETERS.values(), *MEMBERS.values()):
        assert {*recorded.needed, *recorded.wanted} <= set(recorded.known)


def test_the_installed_package_has_what_is_needed():
    pytest.importorskip("tensorrt_llm")
    assert check_contract(importlib.import_module(MODULE)) == []


@pytest.mark.parametrize("name", ["model", "tokenizer", "revision"])
def test_options_beside_a_checkpoint_name_no_other_one(name):
    from depthlm_ros.engines.tensorrt_llm_settings import llm_arguments

    with pytest.raises(ModelError, match=f"sets {name}"):
        llm_arguments(None, "here", {name: "somebody/else"}, reuse=True)


def test_an_engine_that_says_nothing_any_more_is_given_up(monkeypatch):
    import threading
    from types import SimpleNamespace

    from depthlm_ros.engines import tensorrt_llm_backend
    from depthlm_ros.engines.worded import Ask

    aborted = []
    never = threading.Event()

    class Request:
        def result(self, timeout=None):
            never.wait(20)
            raise TimeoutError

        def abort(self):
            aborted.append(self)

    llm = SimpleNamespace(generate_async=lambda inputs, sampling_params: Request(), shutdown=lambda: None)
    api = SimpleNamespace(SamplingParams=lambda **told: told)
    tokenizer = SimpleNamespace(all_special_ids=[])
    processor = SimpleNamespace(tokenizer=tokenizer, prompt_texts=lambda questions, count: list(questions))
    monkeypatch.setattr(tensorrt_llm_backend, "STALL_S", 0.2)
    backend = tensorrt_llm_backend.LlmBackend(llm, api, processor, stop_ids=[0])
    with pytest.raises(EngineError, match="0 of 1 questions and then nothing for 0.2 s"):
        backend.ask([Ask((), "how far?", 8), Ask((), "how near?", 8)])
    assert aborted
    never.set()
    backend.close()
    with pytest.raises(EngineError, match="was closed"):
        backend.ask([Ask((), "how far?", 8)])
