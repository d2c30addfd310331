"""The demo model's own tokenizer: byte-level BPE whose digits stand alone.

Digits are never merged, so a number costs one token a digit and `coordinates (` ends on a token boundary. Everything
between digits is one run for the merges, so the fixed sentences of the dialects become a handful of tokens: a question
costs about 25 tokens and not 75. Any other text still works, byte by byte in the worst case.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from depthlm_ros.prompts import SYSTEM_TEXT, answer_text, coordinates_question, dense_question, marker_question

# Qwen's names, so that stock processors and servers find the tokens they look for.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "yes",
    "no",
    "near",
    "far",
    "left",
    "right",
    "above",
    "below",
    "room",
    "corridor",
    "street",
    "wall",
    "floor",
    "door",
    "window",
    "person",
    "ball",
    "crate",
    "table",
    "pillar",
    "cabinet",
    "car",
    "tree",
    "building",
)


def corpus() -> list[str]:
    """Every sentence that the published dialects are made of, with the seams where tokens end.

    The compact dialect's is made of pieces of them; it was added to a model whose tokenizer could no longer change, and
    what differs between its questions is digits and separators, which are tokens of their own.
    """
    texts = [
        marker_question(),
        coordinates_question(1, 1),
        dense_question(),
        answer_text(1.0),
        "user\n",
        "assistant\n",
        "system\n",
        SYSTEM_TEXT,
        "\n",
    ]
    return texts * 20 + [f" {w}" for w in WORDS] * 2


def build_tokenizer(vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Trains the tokenizer; deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(s, special=True) for s in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def save_processor(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes tokenizer and processor configuration as the stock Qwen3-VL processor reads them."""
    tokenizer.save_pretrained(folder)
    # Qwen3-VL's own least size, 65,536 pixels, would blow up the demo's 256 x 192 and change its focal length.
    size = {"shortest_edge": 4_096, "longest_edge": 1_048_576}
    image = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
        "resample": 3,
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": size,
    }
    video = {**image, "video_processor_type": "Qwen3VLVideoProcessor"}
    del video["image_processor_type"]
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")
