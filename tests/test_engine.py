"""The engine answers what plain one-at-a-time generation answers, and says clearly what it can't load."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file

from depthlm_ros.cards import load_card
from depthlm_ros.engines import load_engine
from depthlm_ros.engines.answers import NUMBER
from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.errors import EngineError, ImageError, ModelError

ARCHITECTURES = ["qwen3_vl", "qwen2_5_vl", "llava"]
SIZE = (112, 168)  # (height, width) that no processor here resamples away: it is a multiple of 28
NEW_TOKENS = 12


def noise(seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def questions(count=48):
    """Texts of several lengths with a common beginning, and a few with none."""
    drawn = np.random.default_rng(1).integers(0, 2000, (count, 2))
    forms = ["Given this image, how far is ({}, {})?", "Given this image, {} and {}: which is nearer?", "{} {}"]
    return [forms[min(i % 7, 2) if i % 7 > 4 else 0].format(*point) for i, point in enumerate(drawn)]


def plain(engine, image, question, new_tokens=NEW_TOKENS, **options):
    """transformers' own greedy generation for one question: its output object and the answer's ids."""
    inputs = engine.processor.images([image])
    ids = torch.tensor(engine.processor.prompts([question], inputs.grid_hw))
    if engine.info.architecture != "llava":
        options["mm_token_type_ids"] = (ids == engine.processor.image_token_id).int()
    out = engine.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
        output_logits=True,
        **inputs.tensors,
        **options,
    )
    return out, tuple(out.sequences[0, ids.shape[1] :].tolist())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request):
    """An engine, and the plain answers to `questions()` about `noise()`."""
    folder = request.getfixturevalue(f"{request.param}_checkpoint")
    engine = TransformersEngine.load(folder, device="cpu", dtype="float32", system_text="You are a helpful assistant.")
    return engine, [plain(engine, noise(), question)[1] for question in questions()]


def with_batch_size(engine, batch_size):
    return TransformersEngine(engine.model, engine.processor, engine.info, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_shared_answers_equal_plain_generation_token_for_token(loaded, batch_size):
    engine, expected = loaded
    answers = with_batch_size(engine, batch_size).answer_shared(noise(), questions(), NEW_TOKENS)
    assert [answer.token_ids for answer in answers] == expected


def test_the_plain_answers_vary_in_text_and_length(loaded):
    _, expected = loaded
    assert len(set(expected)) > 20
    assert len({len(answer) for answer in expected}) > 3


def test_answers_depend_on_the_image(loaded):
    engine, expected = loaded
    other = engine.answer_shared(noise(seed=5), questions(), NEW_TOKENS)
    assert sum(a.token_ids != b for a, b in zip(other, expected, strict=True)) > 10


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_one_image_a_question_equals_plain_generation(loaded, batch_size):
    engine, _ = loaded
    images = [noise(seed) for seed in range(12)]
    asked = ["How far is the red arrow?"] * 6 + questions(6)
    answers = with_batch_size(engine, batch_size).answer_each(images, asked, NEW_TOKENS)
    expected = [plain(engine, image, question)[1] for image, question in zip(images, asked, strict=True)]
    assert [answer.token_ids for answer in answers] == expected
    assert len(set(expected)) > 5


def test_images_of_several_sizes_keep_their_order(loaded):
    engine, _ = loaded
    images = [noise(0, (112, 112)), noise(1, (112, 224)), noise(2, (112, 112)), noise(3, (224, 112))]
    asked = questions(4)
    answers = engine.answer_each(images, asked, NEW_TOKENS)
    expected = [plain(engine, image, question)[1] for image, question in zip(images, asked, strict=True)]
    assert [answer.token_ids for answer in answers] == expected


@pytest.mark.parametrize(
    "asked", [["How far?"], ["How far?"] * 3, ["", "How far is the point?"], ["abc", "xyz"]], ids=str
)
def test_questions_that_share_all_or_nothing_are_answered_too(loaded, asked):
    engine, _ = loaded
    answers = engine.answer_shared(noise(), asked, NEW_TOKENS)
    assert [answer.token_ids for answer in answers] == [plain(engine, noise(), question)[1] for question in asked]


def test_no_questions_give_no_answers(loaded):
    engine, _ = loaded
    assert engine.answer_shared(noise(), [], NEW_TOKENS) == []
    assert engine.answer_each([], [], NEW_TOKENS) == []


def test_confidence_is_the_probability_of_the_tokens_of_the_least_sure_number(loaded):
    engine, _ = loaded
    tokenizer = engine.processor.tokenizer
    checked = 0
    for question, answer in zip(questions(), engine.answer_shared(noise(), questions(), NEW_TOKENS), strict=True):
        pieces = [tokenizer.decode([token], skip_special_tokens=True) for token in answer.token_ids]
        numbers = list(NUMBER.finditer("".join(pieces)))
        if not numbers or any(len(piece) != 1 for piece in pieces[:-1]) or checked == 8:
            continue
        logits = plain(engine, noise(), question)[0].logits
        chances = [math.exp(step[0].log_softmax(-1)[t]) for step, t in zip(logits, answer.token_ids, strict=True)]
        expected = min(math.prod(chances[number.start() : number.end()]) for number in numbers)
        assert answer.confidence == pytest.approx(expected, rel=1e-3)
        checked += 1
    assert checked >= 4


def test_an_answer_without_a_number_has_no_confidence(loaded):
    engine, _ = loaded
    answers = engine.answer_shared(noise(), questions(), NEW_TOKENS)
    assert all(a.confidence == 0 for a in answers if not NUMBER.search(a.text))
    assert all(0 <= a.confidence <= 1 for a in answers)
    assert any(a.confidence > 0 for a in answers)


def test_texts_hold_no_special_tokens(loaded):
    engine, _ = loaded
    answers = engine.answer_shared(noise(), questions(), NEW_TOKENS)
    ended = [a for a in answers if a.token_ids[-1] == engine.processor.tokenizer.eos_token_id]
    assert ended
    assert not any("<|im_end|>" in a.text or "</s>" in a.text for a in ended)


def test_the_image_is_encoded_and_its_prefix_read_once_a_frame(qwen3_vl_checkpoint):
    engine = TransformersEngine.load(qwen3_vl_checkpoint, batch_size=16, plain=True)
    encoded, read = [], []
    engine.model.model.visual.register_forward_pre_hook(lambda module, args: encoded.append(1))
    engine.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    asked = [f"Given this image, how far is the point at ({x}, 7)?" for x in range(100, 148)]
    engine.answer_shared(noise(size=(96, 128)), asked, 3)
    prompts = engine.processor.prompts(asked, (3, 4))
    assert len(encoded) == 1
    assert read[0] == (1, prompts[0].index(engine.processor.tokenizer.convert_tokens_to_ids("1"), 20) + 1)
    assert [shape for shape in read if shape[1] > 1][1:] == [(16, len(prompts[0]) - read[0][1])] * 3


def test_rows_that_have_ended_leave_the_batch(qwen2_5_vl_checkpoint):
    engine = TransformersEngine.load(qwen2_5_vl_checkpoint)
    rows = []
    engine.model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    answers = engine.answer_shared(noise(), questions(), 40)
    longest = max(len(answer.token_ids) for answer in answers)
    assert rows[0] == len(answers)
    assert rows[-1] <= len(answers) // 2
    assert len(rows) == longest


def test_a_repetition_penalty_of_the_checkpoint_is_kept(loaded):
    engine, without = loaded
    engine.model.generation_config.repetition_penalty = 1.3
    try:
        answers = with_batch_size(engine, 7).answer_shared(noise(), questions(14), NEW_TOKENS)
        expected = [plain(engine, noise(), question)[1] for question in questions(14)]
    finally:
        engine.model.generation_config.repetition_penalty = 1.0
    assert [answer.token_ids for answer in answers] == expected
    assert expected != without[:14]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tied_embeddings_load_and_equal_plain_generation(tmp_path, architecture):
    engine = TransformersEngine.load(make_checkpoint(tmp_path / "tied", architecture, tie_word_embeddings=True))
    answers = engine.answer_shared(noise(), questions(5), 6)
    assert [answer.token_ids for answer in answers] == [plain(engine, noise(), q, 6)[1] for q in questions(5)]


def test_questions_in_either_order_get_the_same_answers(loaded):
    engine, expected = loaded
    answers = engine.answer_shared(noise(), questions()[::-1], NEW_TOKENS)
    assert [answer.token_ids for answer in answers[::-1]] == expected


def test_info_says_what_was_loaded_and_why(qwen3_vl_checkpoint):
    info = TransformersEngine.load(qwen3_vl_checkpoint, device="cpu", dtype="bfloat16").info
    assert (info.engine, info.architecture, info.device, info.dtype) == ("transformers", "qwen3_vl", "cpu", "bfloat16")
    assert info.model == str(qwen3_vl_checkpoint)
    assert all("asked for" in reason for reason in info.reasons[:2])
    assert "vision tower: lean, within" in info.reasons[2] and "lean decoder, its scores within" in info.reasons[3]
    assert info.dense and info.parameters > 100_000


def test_loading_and_answering_leave_global_settings_alone(qwen3_vl_checkpoint):
    def settings():
        return torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.random.initial_seed()

    before = settings()
    random = torch.random.get_rng_state()
    engine = TransformersEngine.load(qwen3_vl_checkpoint)
    engine.answer_shared(noise(), ["How far?"], 2)
    assert settings() == before
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_warm_up_runs_both_dialects_and_a_closed_engine_frees_its_model(qwen3_vl_checkpoint):
    engine = TransformersEngine.load(qwen3_vl_checkpoint)
    engine.warm_up(128, 96)
    engine.close()
    with pytest.raises(AttributeError):
        _ = engine.model


def test_images_and_questions_must_pair_up(loaded):
    engine, _ = loaded
    with pytest.raises(EngineError, match="2 images and 1 questions"):
        engine.answer_each([noise(), noise()], ["How far?"], 2)


def test_an_image_of_another_kind_is_refused(loaded):
    engine, _ = loaded
    with pytest.raises(ImageError, match="uint8 RGB"):
        engine.answer_shared(np.zeros((112, 112), np.uint8), ["How far?"], 2)


def test_running_out_of_memory_names_the_remedy(qwen3_vl_checkpoint):
    engine = TransformersEngine.load(qwen3_vl_checkpoint)

    def fail(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine.model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(EngineError, match="lower batch_size"):
        engine.answer_shared(noise(), ["How far?"], 2)


@pytest.fixture
def folder(qwen3_vl_checkpoint, tmp_path):
    """A checkpoint to damage."""
    return shutil.copytree(qwen3_vl_checkpoint, tmp_path / "model")


def test_a_folder_without_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no \\*.safetensors"):
        TransformersEngine.load(folder)


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\)"):
        TransformersEngine.load(folder)


def test_weights_of_another_layout_are_named(folder):
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(ModelError, match="consolidated.safetensors but no model.safetensors"):
        TransformersEngine.load(folder)


def test_an_unknown_architecture_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "paligemma"}))
    with pytest.raises(ModelError, match="model_type 'paligemma' is not supported; known are qwen3_vl"):
        TransformersEngine.load(folder)


def test_llava_with_a_tower_other_than_pixtral_is_named(llava_checkpoint, tmp_path):
    folder = shutil.copytree(llava_checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["model_type"] = "clip_vision_model"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="clip_vision_model"):
        TransformersEngine.load(folder)


def test_a_missing_weight_is_named_instead_of_drawn_at_random(folder):
    state = load_file(folder / "model.safetensors")
    del state["model.language_model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weights, such as model.language_model.norm.weight"):
        TransformersEngine.load(folder)


def test_a_weight_of_another_shape_is_named(folder):
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["lm_head.weight"][:-1].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head.weight has shape \(359, 64\), config.json asks for \(360, 64\)"):
        TransformersEngine.load(folder)


@pytest.mark.parametrize("keep", [100, 200_000])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model.safetensors .*not a whole safetensors file"):
        TransformersEngine.load(folder)


def test_a_git_lfs_pointer_is_refused_with_the_remedy(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        TransformersEngine.load(folder)


def test_shards_are_read_through_their_index(folder):
    expected = TransformersEngine.load(folder).answer_shared(noise(), questions(3), 6)
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    parts = {"model-1.safetensors": names[:40], "model-2.safetensors": names[40:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    engine = TransformersEngine.load(folder)
    assert engine.answer_shared(noise(), questions(3), 6) == expected
    assert engine.info.dense
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks 1 of the 2 shards"):
        TransformersEngine.load(folder)


def test_code_that_comes_with_a_checkpoint_is_not_run(folder, tmp_path):
    proof = tmp_path / "ran"
    (folder / "custom.py").write_text(f"open({str(proof)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "custom.C", "AutoModelForImageTextToText": "custom.M", "AutoProcessor": "custom.P"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    engine = TransformersEngine.load(folder)
    assert type(engine.model).__module__.startswith("transformers.")
    assert not proof.exists()


@pytest.mark.parametrize("source", ["/no/such/folder", "not a hub id", "no-such-organisation/no-such-model"])
def test_what_is_neither_folder_nor_repository_is_named(source):
    with pytest.raises(ModelError, match=source):
        open_checkpoint(source)


def test_load_engine_takes_the_system_text_from_the_card(qwen3_vl_checkpoint):
    card, path = load_card(str(qwen3_vl_checkpoint))
    asked = [
        load_engine(path, dataclasses.replace(card, system_text=text), options=EngineOptions("cpu")).processor.prompts(
            ["How far?"], (1, 1)
        )
        for text in (None, "You are a helpful assistant.")
    ]
    assert len(asked[1][0]) > len(asked[0][0])
