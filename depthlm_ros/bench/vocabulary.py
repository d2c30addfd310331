"""A tokenizer made on the spot that costs what Qwen's own costs, and the processor files beside it.

The published questions have 72 to 76 tokens after the image with Qwen's tokenizer, and a benchmark whose prompt is
shorter would flatter everybody. So text is split as Qwen2's tokenizer splits it (its public pattern): words with the
space before them, digits one by one, and the words of the questions are whole tokens. The demo's own tokenizer merges
whole sentences, about 20 tokens a question: it is no fair subject.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from depthlm_ros.bench.shapes import Shape
from depthlm_ros.prompts import (
    answer_text,
    compact_question,
    coordinates_question,
    dense_question,
    marker_question,
)

# Qwen2's pre-tokenizer (tokenizer.json of the published models).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PIXTRAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
# Tokens of their own in Qwen3's vocabulary, though not special ones.
THINKING = ("<think>", "</think>")
# Words that Qwen's vocabulary has in two pieces.
IN_PIECES = {" normalised": (" normal", "ised")}

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or part['type'] == 'image_url' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIXTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}{% else %}[INST]"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}[IMG]"
    "{% elif part['type'] == 'text' %}{{ part['text'] if part['text'] is defined else part['content'] }}"
    "{% endif %}{% endfor %}[/INST]{% endif %}{% endfor %}"
)


def build_tokenizer(shape: Shape) -> Tokenizer:
    """Trains the tokenizer; deterministic."""
    special = PIXTRAL_TOKENS if shape.architecture == "llava" else QWEN_TOKENS
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=620,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # One word at a time: a mark before a word ("<answer", "(the") stays a token of its own, as in Qwen's vocabulary.
    tokenizer.train_from_iterator(_words(split), trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINKING])
    return tokenizer


def _words(split: pre_tokenizers.PreTokenizer) -> list[str]:
    texts = [
        marker_question(),
        coordinates_question(1, 1),
        compact_question(1, 1),
        dense_question(),
        answer_text(1.0),
        "You are a helpful assistant.",
    ]
    words = ["user", "assistant", "system", "think", "answer", "\n\n"]
    for text in texts:
        for word, _ in split.pre_tokenize_str(text):
            if word.strip() and word[-1].isalpha():
                words += IN_PIECES.get(word, [word if word[0].isalpha() or word[0] == " " else word[1:]])
            elif word[0] == " " and len(word) > 1:
                words.append(word)
    return words * 2


def write_files(folder: Path, shape: Shape, tokenizer: Tokenizer) -> None:
    """Writes tokenizer, chat template, processor and generation settings, as stock programs read them."""
    pixtral = shape.architecture == "llava"
    ids = tokenizer.get_vocab()
    stop = "</s>" if pixtral else "<|im_end|>"
    pad = stop if pixtral else "<|endoftext|>"
    tokenizer.save(str(folder / "tokenizer.json"))
    template = PIXTRAL_TEMPLATE if pixtral else QWEN_TEMPLATE
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>" if pixtral else None,
        "eos_token": stop,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.text["max_position_embeddings"],
        "chat_template": template,
    }
    write_json(folder / "tokenizer_config.json", settings)
    generation = {"do_sample": False, "eos_token_id": ids[stop], "pad_token_id": ids[pad]}
    write_json(folder / "generation_config.json", generation)
    if pixtral:
        write_json(folder / "preprocessor_config.json", _pixtral_image(shape))
        tokens = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
        processor = {"processor_class": "PixtralProcessor", "patch_size": shape.image["patch_size"]} | tokens
        write_json(folder / "processor_config.json", processor)
        return
    image = _qwen_image(shape)
    write_json(folder / "preprocessor_config.json", image)
    video = {key: value for key, value in image.items() if key != "image_processor_type"}
    kind = "Qwen3VLVideoProcessor" if shape.architecture == "qwen3_vl" else "Qwen2VLVideoProcessor"
    write_json(folder / "video_preprocessor_config.json", video | {"video_processor_type": kind})


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _qwen_image(shape: Shape) -> dict[str, Any]:
    image = shape.image
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor" if shape.architecture == "qwen3_vl" else "Qwen2_5_VLProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": image["mean"],
        "image_std": image["std"],
        "rescale_factor": 1 / 255,
        "resample": 3,
        "patch_size": image["patch_size"],
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": image["shortest"], "longest_edge": image["longest"]},
    }


def _pixtral_image(shape: Shape) -> dict[str, Any]:
    image = shape.image
    return {
        "image_processor_type": "PixtralImageProcessor",
        "image_mean": image["mean"],
        "image_std": image["std"],
        "patch_size": {"height": image["patch_size"], "width": image["patch_size"]},
        "size": {"longest_edge": image["longest"]},
    }
