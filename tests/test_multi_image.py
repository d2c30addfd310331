"""Two images shared by many questions: the same ids, positions and answers as stock transformers gives one by one."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_ros.engines.processor import PromptProcessor
from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.errors import EngineError, ImageError, ModelError

ARCHITECTURES = ["qwen3_vl", "qwen2_5_vl", "llava"]
NEW_TOKENS = 8
SYSTEM = "You are a helpful assistant."
QUESTION = "what pixel in the second image corresponds to pixel (17, 1948)?"
# No size is a multiple of 28, 32 and 16 at once, so each processor resamples some of these.
PAIRS = {
    "same size": [(112, 168), (112, 168)],
    "two sizes": [(96, 128), (224, 112)],
    "one is tiny": [(64, 64), (160, 192)],
}

# The layouts of the published checkpoints: Pixtral 12B's template adds the system text to other text and puts it into
# the last turn; Qwen2.5-VL's writes its default system text where none is given.
PIXTRAL_12B = (
    '{%- if messages[0]["role"] == "system" %}{%- set system = messages[0]["content"] %}{%- set turns = messages[1:] %}'
    "{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}{%- for turn in turns %}"
    '{%- if loop.last and system is defined %}{{- "[INST]" + system + "\\n\\n" }}{%- else %}{{- "[INST]" }}{%- endif %}'
    '{%- for chunk in turn["content"] %}{%- if chunk["type"] == "text" %}{{- chunk["content"] }}{%- else %}'
    '{{- "[IMG]" }}{%- endif %}{%- endfor %}{{- "[/INST]" }}{%- endfor %}'
)
QWEN2_5_VL = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def noise(seed, size):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def pair(name="two sizes"):
    return [noise(seed, size) for seed, size in enumerate(PAIRS[name])]


def questions(count=24):
    drawn = np.random.default_rng(1).integers(0, 1000, (count, 2))
    forms = ["Given these two images, what corresponds to pixel ({}, {})?", "Given these images, {} or {}?", "{} {}"]
    return [forms[min(i % 7, 2) if i % 7 > 4 else 0].format(*point) for i, point in enumerate(drawn)]


def stock_inputs(engine, images):
    """What a stock processor hands to the model for one row of several images."""
    tensors = [engine.processor.images([image]).tensors for image in images]
    if engine.info.architecture != "llava":
        return {name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}
    # PixtralProcessor pads a batch of images to the largest.
    height, width = (max(t["pixel_values"].shape[axis] for t in tensors) for axis in (2, 3))
    pixels = [t["pixel_values"] for t in tensors]
    padded = [torch.nn.functional.pad(p, (0, width - p.shape[3], 0, height - p.shape[2])) for p in pixels]
    return {"pixel_values": torch.cat(padded), "image_sizes": torch.cat([t["image_sizes"] for t in tensors])}


def prompt(engine, images, question):
    grids = [engine.processor.images([image]).grid_hw for image in images]
    return torch.tensor(engine.processor.prompts([question], *grids))


def plain(engine, images, question):
    """The ids that transformers' own greedy generation gives for one question about all images."""
    ids = prompt(engine, images, question)
    options = stock_inputs(engine, images)
    if engine.info.architecture != "llava":
        options["mm_token_type_ids"] = (ids == engine.processor.image_token_id).int()
    out = engine.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, **options
    )
    return tuple(out[0, ids.shape[1] :].tolist())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def engine(request):
    folder = request.getfixturevalue(f"{request.param}_checkpoint")
    return TransformersEngine.load(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("name", PAIRS)
def test_answers_about_two_images_equal_plain_generation_token_for_token(engine, name):
    asked = questions() if name == "two sizes" else questions(6)
    answers = engine.answer_about(pair(name), asked, NEW_TOKENS)
    expected = [plain(engine, pair(name), question) for question in asked]
    assert [answer.token_ids for answer in answers] == expected
    assert len(set(expected)) > len(asked) // 2


def test_both_images_and_their_order_matter(engine):
    first, second = pair()
    base, swapped, other_first, other_second = (
        [answer.token_ids for answer in engine.answer_about(images, questions(12), NEW_TOKENS)]
        for images in ([first, second], [second, first], [noise(7, PAIRS["two sizes"][0]), second],
                       [first, noise(8, PAIRS["two sizes"][1])])
    )  # fmt: skip
    for changed in (swapped, other_first, other_second):
        assert sum(a != b for a, b in zip(base, changed, strict=True)) > 4


def test_one_image_is_the_case_of_one(engine):
    image = pair()[0]
    about = engine.answer_about([image], questions(3), NEW_TOKENS)
    assert about == engine.answer_shared(image, questions(3), NEW_TOKENS)
    assert [answer.token_ids for answer in about] == [plain(engine, [image], question) for question in questions(3)]


def test_three_images_work_too(engine):
    images = [*pair(), noise(3, (128, 128))]
    answers = engine.answer_about(images, questions(3), NEW_TOKENS)
    assert [answer.token_ids for answer in answers] == [plain(engine, images, question) for question in questions(3)]


def with_plain_path(engine):
    return TransformersEngine(engine.model, engine.processor, engine.info, plain=True)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_changes_nothing(engine, batch_size):
    small = TransformersEngine(engine.model, engine.processor, engine.info, batch_size=batch_size)
    assert [answer.token_ids for answer in small.answer_about(pair(), questions(7), 4)] == [
        answer.token_ids for answer in engine.answer_about(pair(), questions(7), 4)
    ]


@pytest.mark.parametrize("name", PAIRS)
def test_positions_and_image_tokens_are_those_of_the_stock_path(engine, name):
    """What reaches the language model, position by position, when generate runs it and when we do."""
    seen = []
    hook = engine.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["inputs_embeds"], kwargs["position_ids"])), with_kwargs=True
    )
    try:
        with_plain_path(engine).answer_about(pair(name), [QUESTION], 1)
        plain_first = len(seen)
        plain(engine, pair(name), QUESTION)
    finally:
        hook.remove()
    ours = torch.cat([embeds for embeds, _ in seen[:plain_first]], dim=1)
    stock, stock_positions = seen[plain_first]
    assert ours.shape == stock.shape
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
    if engine.info.architecture != "llava":
        positions = torch.cat([positions for _, positions in seen[:plain_first]], dim=-1)
        # Newer versions of transformers put the text positions before the three of M-RoPE.
        assert torch.equal(positions, stock_positions[-3:])


@pytest.mark.parametrize("name", PAIRS)
def test_m_rope_positions_are_the_models_own(engine, name):
    if engine.info.architecture == "llava":
        pytest.skip("Pixtral counts tokens one by one")
    images = pair(name)
    ids = prompt(engine, images, QUESTION)
    expected, _ = engine.model.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == engine.processor.image_token_id).int(),
        image_grid_thw=stock_inputs(engine, images)["image_grid_thw"],
    )
    inputs = [engine.processor.images([image]) for image in images]
    prefix = engine.prefill(ids[0, :-3].tolist(), *inputs)
    assert prefix.next_position == int(expected[0, 0, -3])
    # Each image starts anew after the larger side of the one before, so positions fall behind the number of tokens.
    starts = [i for i in range(1, ids.shape[1]) if ids[0, i] == engine.processor.image_token_id != ids[0, i - 1]]
    assert len(starts) == 2
    first = inputs[0].grid_hw
    between = starts[1] - starts[0] - first[0] * first[1]
    assert int(expected[0, 0, starts[1]] - expected[0, 0, starts[0]]) == max(first) + between


def test_each_row_may_have_images_of_its_own(engine):
    """Rows of one batch: the second images must not be taken for the first images of other rows."""
    rows = [pair(), [noise(5, PAIRS["two sizes"][0]), noise(6, PAIRS["two sizes"][1])]]
    inputs = [engine.processor.images([row[k] for row in rows]) for k in range(2)]
    prompts = engine.processor.prompts(questions(2), *(i.grid_hw for i in inputs))
    expected = [plain(engine, row, question) for row, question in zip(rows, questions(2), strict=True)]
    for path in (engine, with_plain_path(engine)):
        with torch.inference_mode():
            answers = path._answer(inputs, prompts, NEW_TOKENS, None, False)
        assert [answer.token_ids for answer in answers] == expected


def test_both_images_are_encoded_once_for_all_questions(qwen3_vl_checkpoint):
    engine = TransformersEngine.load(qwen3_vl_checkpoint, batch_size=8)
    encoded = []
    tower = engine._images.tower
    engine._images.tower = lambda tensors, count: encoded.append(1) or tower(tensors, count)
    engine.answer_about(pair(), questions(), 3)
    engine.answer_about(pair(), questions(), 3)
    assert len(encoded) == 2


def test_without_images_or_questions(engine):
    assert engine.answer_about(pair(), [], NEW_TOKENS) == []
    with pytest.raises(EngineError, match="0 images"):
        engine.answer_about([], ["How far?"], NEW_TOKENS)


def test_an_image_of_another_kind_is_refused(engine):
    with pytest.raises(ImageError, match="uint8 RGB"):
        engine.answer_about([pair()[0], np.zeros((64, 64), np.uint8)], ["How far?"], NEW_TOKENS)


def test_a_question_that_holds_a_placeholder_is_refused(engine):
    with pytest.raises(EngineError, match="3 placeholders .* for 2 images; leave the text of the placeholder out"):
        engine.answer_about(pair(), [f"How far is {engine.processor.image_token}?"], NEW_TOKENS)


# ---------------------------------------------------------------- the prompt


def text(value):
    return {"type": "text", "text": value, "content": value}


def messages(images, system_text, *, plain_system=False):
    asked = [{"role": "user", "content": [{"type": "image"}] * images + [text(QUESTION)]}]
    if system_text is None:
        return asked
    return [{"role": "system", "content": system_text if plain_system else [text(system_text)]}] + asked


def with_template(folder, tmp_path, template):
    copy = shutil.copytree(folder, tmp_path / "model")
    for name in ("chat_template.json", "chat_template.jinja"):
        (copy / name).unlink(missing_ok=True)
    (copy / "chat_template.jinja").write_text(template, encoding="utf-8")
    return copy


def expected_ids(folder, asked, placeholders):
    """The tokenizer's own template and ids, each placeholder replaced by the tokens of its image."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)["input_ids"]
    image = placeholders[0][0]
    whole = []
    left = iter(placeholders)
    for token in ids:
        whole += next(left) if token == image else [token]
    return whole


def image_tokens(folder, architecture, grids):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if architecture != "llava":
        return [[tokenizer.convert_tokens_to_ids("<|image_pad|>")] * (h * w) for h, w in grids]
    image, line, end = tokenizer.convert_tokens_to_ids(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    return [([*[image] * w, line] * h)[:-1] + [end] for h, w in grids]


@pytest.mark.parametrize("grids", [[(3, 4)], [(3, 4), (5, 2)]], ids=["one image", "two images"])
@pytest.mark.parametrize("system_text", [None, SYSTEM], ids=["no system", "system"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ids_are_those_of_the_tokenizers_own_template(request, tmp_path, architecture, system_text, grids):
    folder = request.getfixturevalue(f"{architecture}_checkpoint")
    template = {"llava": PIXTRAL_12B, "qwen2_5_vl": QWEN2_5_VL}.get(architecture)
    if template:
        folder = with_template(folder, tmp_path, template)
    asked = messages(len(grids), system_text, plain_system=architecture == "llava")
    expected = expected_ids(folder, asked, image_tokens(folder, architecture, grids))
    assert PromptProcessor(open_checkpoint(folder), system_text).prompts([QUESTION], *grids) == [expected]


def test_qwen_prompt_with_two_images(qwen3_vl_checkpoint):
    processor = PromptProcessor(open_checkpoint(qwen3_vl_checkpoint))
    assert processor.expanded_text("Where?", (1, 2), (1, 1)) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
        "<|vision_start|><|image_pad|><|vision_end|>Where?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_pixtral_prompt_with_two_images_of_different_sizes(llava_checkpoint):
    processor = PromptProcessor(open_checkpoint(llava_checkpoint))
    first, second = "[IMG][IMG][IMG_BREAK][IMG][IMG][IMG_END]", "[IMG][IMG_BREAK][IMG][IMG_BREAK][IMG][IMG_END]"
    written = f"<s>[INST]{first}{second}Where?[/INST]"
    assert processor.expanded_text("Where?", (2, 2), (3, 1)) == written
    ids = processor.prompts(["Where?"], (2, 2), (3, 1))[0]
    assert processor.tokenizer.decode(ids) == written


def test_qwen2_5_vl_writes_its_default_system_text_only_where_none_is_given(qwen2_5_vl_checkpoint, tmp_path):
    folder = with_template(qwen2_5_vl_checkpoint, tmp_path, QWEN2_5_VL)
    without, with_system = (
        PromptProcessor(open_checkpoint(folder), system_text).expanded_text("Where?", (1, 1))
        for system_text in (None, SYSTEM)
    )
    assert without == with_system
    assert without.count(SYSTEM) == 1


def test_a_template_that_drops_the_system_text_is_refused(qwen3_vl_checkpoint, tmp_path):
    template = "{% for item in messages[-1]['content'] %}{{ item['text'] or '<|image_pad|>' }}{% endfor %}"
    folder = with_template(qwen3_vl_checkpoint, tmp_path, template)
    PromptProcessor(open_checkpoint(folder))
    with pytest.raises(ModelError, match="leaves out the system text 'You are a helpful assistant.'"):
        PromptProcessor(open_checkpoint(folder), SYSTEM)
