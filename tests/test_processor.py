"""The processor writes what the models were trained on, with or without torchvision."""

from __future__ import annotations

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

from depthlm_ros.engines.checkpoint import open_checkpoint
from depthlm_ros.engines.processor import PromptProcessor
from depthlm_ros.errors import ImageError, ModelError

ARCHITECTURES = ["qwen3_vl", "qwen2_5_vl", "llava"]
# OpenAI's CLIP for Pixtral; the Qwen checkpoints of these tests name 0.5.
IMAGE_STATISTICS = {
    "llava": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "qwen": ([0.5] * 3, [0.5] * 3),
}
QUESTION = "How far is the point at coordinates (16, 1061) from the camera?"
SYSTEM = "You are a helpful assistant."


@pytest.fixture
def folder(request):
    """The checkpoint of the architecture that the test is parametrised with."""
    return request.getfixturevalue(f"{request.param}_checkpoint")


def processor_of(folder, system_text=None):
    return PromptProcessor(open_checkpoint(folder), system_text)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def messages(system_text=None):
    def text(value):
        return {"type": "text", "text": value, "content": value}

    asked = [{"role": "user", "content": [{"type": "image"}, text(QUESTION)]}]
    return ([{"role": "system", "content": [text(system_text)]}] if system_text else []) + asked


@pytest.mark.parametrize("folder", ARCHITECTURES, indirect=True)
@pytest.mark.parametrize("system_text", [None, SYSTEM])
def test_ids_are_those_of_the_written_out_prompt(folder, system_text):
    processor = processor_of(folder, system_text)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = processor.expanded_text(QUESTION, (3, 4))
    assert processor.prompts([QUESTION], (3, 4)) == [tokenizer(text, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("folder", ["qwen3_vl", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("system_text", [None, SYSTEM])
def test_qwen_prompts_are_the_tokenizers_own_template_with_the_image_token_repeated(folder, system_text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = tokenizer.apply_chat_template(messages(system_text), tokenize=True, add_generation_prompt=True)["input_ids"]
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    at = plain.index(image)
    expected = plain[:at] + [image] * 12 + plain[at + 1 :]
    assert processor_of(folder, system_text).prompts([QUESTION], (3, 4)) == [expected]


def test_qwen_prompt_reads_header_image_question_answer_header(qwen3_vl_checkpoint):
    text = processor_of(qwen3_vl_checkpoint, SYSTEM).expanded_text("How far?", (1, 2))
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>How far?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_pixtral_prompt_breaks_each_row_of_image_tokens(llava_checkpoint):
    text = processor_of(llava_checkpoint).expanded_text("How far?", (2, 3))
    assert text == "<s>[INST][IMG][IMG][IMG][IMG_BREAK][IMG][IMG][IMG][IMG_END]How far?[/INST]"


def test_a_beginning_of_sequence_that_the_template_writes_is_not_written_twice(llava_checkpoint):
    processor = processor_of(llava_checkpoint)
    ids = processor.prompts([QUESTION], (2, 3))[0]
    assert ids.count(processor.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("folder", ARCHITECTURES, indirect=True)
def test_digits_are_single_tokens_so_coordinates_split_exactly(folder):
    processor = processor_of(folder)
    first, second = processor.prompts(["at (1948, 7)", "at (1948, 8)"], (2, 2))
    different = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    assert len(different) == 1


@pytest.mark.parametrize(
    ("folder", "size", "grid_hw"),
    [("qwen3_vl", (96, 128), (3, 4)), ("qwen2_5_vl", (84, 112), (3, 4)), ("llava", (96, 128), (6, 8))],
    indirect=["folder"],
)
def test_an_image_of_whole_multiples_is_not_resampled(folder, size, grid_hw):
    processor = processor_of(folder)
    image = noise(*size)
    inputs = processor.images([image])
    assert inputs.grid_hw == grid_hw
    assert all(side % processor.grid.multiple == 0 for side in size)
    values = np.sort(inputs.tensors["pixel_values"].numpy().ravel())
    mean, std = IMAGE_STATISTICS["llava" if "[IMG]" == processor.image_token else "qwen"]
    expected = np.sort(((image / 255 - mean) / std).ravel())
    repeats = len(values) // len(expected)  # Qwen's patches hold each pixel once for each of two time steps
    np.testing.assert_allclose(values, np.repeat(expected, repeats), atol=1e-6)


@pytest.mark.parametrize(
    ("folder", "size"),
    [("qwen3_vl", (96, 160)), ("qwen2_5_vl", (84, 140)), ("llava", (48, 80))],
    indirect=["folder"],
)
def test_images_of_the_grid_are_prepared_bit_for_bit_as_by_the_checkpoints_processor(folder, size):
    processor = processor_of(folder)
    images = [noise(*size, seed) for seed in range(3)]
    ours, theirs = processor.images(images), processor._stock(images)
    assert processor.keeps(*size) and ours.grid_hw == theirs.grid_hw
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, value in theirs.tensors.items():
        assert ours.tensors[name].dtype == value.dtype and torch.equal(ours.tensors[name], value)


@pytest.mark.parametrize("folder", ARCHITECTURES, indirect=True)
@pytest.mark.parametrize("size", [(90, 140), (32, 32), (1024, 1056), (112, 22624)])
def test_images_of_other_sizes_go_the_checkpoints_own_way(folder, size):
    processor = processor_of(folder)
    resampled = size != (32, 32) if "llava" in str(folder) else True
    assert processor.keeps(*size) != resampled


def test_a_processor_that_does_more_to_an_image_is_not_replaced(qwen3_vl_checkpoint, tmp_path):
    folder = shutil.copytree(qwen3_vl_checkpoint, tmp_path / "model")
    path = folder / "preprocessor_config.json"
    own = json.loads(path.read_text()) | {"do_rescale": False, "do_normalize": False}
    path.write_text(json.dumps(own))
    processor = processor_of(folder)
    images = [noise(96, 160)]
    assert torch.equal(
        processor.images(images).tensors["pixel_values"], processor._stock(images).tensors["pixel_values"]
    )


@pytest.mark.parametrize(
    ("folder", "size", "grid_hw"),
    [("qwen3_vl", (90, 140), (3, 4)), ("qwen2_5_vl", (90, 140), (3, 5)), ("llava", (90, 140), (6, 9))],
    indirect=["folder"],
)
def test_other_sizes_are_snapped_as_the_model_family_does(folder, size, grid_hw):
    assert processor_of(folder).images([noise(*size)]).grid_hw == grid_hw


def test_the_grid_tells_the_limits_of_the_processor(qwen3_vl_checkpoint, llava_checkpoint):
    qwen, pixtral = processor_of(qwen3_vl_checkpoint).grid, processor_of(llava_checkpoint).grid
    assert (qwen.multiple, qwen.min_pixels, qwen.max_pixels, qwen.max_edge) == (32, 4096, 1048576, None)
    assert (pixtral.multiple, pixtral.max_edge) == (16, 1024)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="the stock processors need torchvision")
@pytest.mark.parametrize("folder", ARCHITECTURES, indirect=True)
def test_ids_and_pixels_equal_the_stock_processors(folder):
    from PIL import Image

    image = noise(168, 224)
    stock = AutoProcessor.from_pretrained(folder)
    asked = messages(SYSTEM)
    asked[1]["content"][0]["image"] = Image.fromarray(image)
    expected = stock.apply_chat_template(
        asked, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    processor = processor_of(folder, SYSTEM)
    inputs = processor.images([image])
    assert processor.prompts([QUESTION], inputs.grid_hw) == expected["input_ids"].tolist()
    for name, value in inputs.tensors.items():
        # One grey level: where 168x224 is resampled, PIL and torchvision round differently.
        np.testing.assert_allclose(value, expected[name], atol=1.01 / 255 / 0.26)


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 3), np.float32)]
)
def test_an_image_that_is_not_rgb_bytes_is_refused(qwen3_vl_checkpoint, image):
    with pytest.raises(ImageError, match=r"pass \(H, W, 3\) uint8 RGB"):
        processor_of(qwen3_vl_checkpoint).images([image])


def test_a_strip_beyond_the_models_aspect_ratio_is_refused(qwen3_vl_checkpoint):
    with pytest.raises(ImageError, match="6464x32"):
        processor_of(qwen3_vl_checkpoint).images([noise(32, 6464)])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("no image here {{ messages }}", "image_pad"),
        ("<|image_pad|> and no question", "and the question"),
        ("{{ messages[0]['content'][1]['text'] }}<|image_pad|>", "question before the image"),
    ],
)
def test_a_template_that_the_engine_could_not_use_is_refused(qwen3_vl_checkpoint, tmp_path, template, words):
    folder = shutil.copytree(qwen3_vl_checkpoint, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(ModelError, match=words):
        processor_of(folder)


def test_a_folder_without_a_template_is_refused(qwen3_vl_checkpoint, tmp_path):
    folder = shutil.copytree(qwen3_vl_checkpoint, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        processor_of(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_a_folder_without_its_processor_files_is_refused(qwen3_vl_checkpoint, tmp_path, name):
    folder = shutil.copytree(qwen3_vl_checkpoint, tmp_path / "model")
    (folder / name).unlink()
    with pytest.raises(ModelError, match="can't be loaded"):
        processor_of(folder)


def test_pixel_limits_of_older_files_are_read(qwen2_5_vl_checkpoint, tmp_path):
    folder = shutil.copytree(qwen2_5_vl_checkpoint, tmp_path / "model")
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    del settings["size"]
    path.write_text(json.dumps(settings | {"min_pixels": 3136, "max_pixels": 12845056}))
    grid = processor_of(folder).grid
    assert (grid.min_pixels, grid.max_pixels) == (3136, 12845056)
