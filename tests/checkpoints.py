"""Small random checkpoints of the architectures we run, complete enough for stock transformers.

Their answers vary with image and question, mostly in digits: weights are drawn wide, so that
attention outweighs the last token, and the language head leans towards digits, points and the end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText

HIDDEN = 64
HEAD_HIDDEN = 96
PATCH_PX = {"qwen3_vl": 32, "qwen2_5_vl": 28, "llava": 16}
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
CORPUS = (
    "Given this image, how far is the point at coordinates from the camera? The coordinates are in normalised format",
    "relative to image width and height. Output the thinking process in <think> </think> and final answer (the meter",
    "number only, without the unit) in <answer> </answer> tags. The point is around meters away from the camera.",
    "You are a helpful assistant. user system assistant",
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIXTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}{% else %}[INST]"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}[IMG]"
    "{% elif item['type'] == 'text' %}{{ item['content'] }}{% endif %}{% endfor %}[/INST]{% endif %}{% endfor %}"
)


def make_checkpoint(
    folder: Path | str,
    architecture: str = "qwen3_vl",
    *,
    seed: int = 0,
    dense_head: bool = True,
    feature_mode: str = "llm_last",
    head_output: str = "softplus",
    tie_word_embeddings: bool = False,
    says: str | None = None,
    words: Sequence[str] = (),
) -> Path:
    """Writes a checkpoint of a few hundred thousand random weights.

    Args:
        folder: made if it isn't there.
        architecture: "qwen3_vl", "qwen2_5_vl" or "llava" (Pixtral).
        seed: of the weights.
        dense_head: add an MLP depth head under DepthVLM's key names.
        feature_mode: what the head reads, "llm_last", "concat" or "sum".
        head_output: "softplus" or "exp".
        tie_word_embeddings: leave the language head out and share the embedding.
        says: the answer to whatever is asked about whatever images; None for answers that vary.
        words: texts that are a token each.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pixtral = architecture == "llava"
    whole = [*words, *([] if says is None else [says])]
    tokenizer = _write_tokenizer(folder, PIXTRAL_TOKENS if pixtral else QWEN_TOKENS, pixtral, whole)
    ids = tokenizer.get_vocab()
    config = (_llava_config if pixtral else _qwen_config)(architecture, ids, tokenizer.get_vocab_size())
    config["tie_word_embeddings"] = tie_word_embeddings
    if dense_head:
        config |= {
            "depth_head_type": "mlp",
            "depth_head_mlp_hidden": HEAD_HIDDEN,
            "depth_head_feature_mode": feature_mode,
            "depth_head_output": head_output,
        }
    _write_json(folder / "config.json", config)
    stop = ids["</s>" if pixtral else "<|im_end|>"]
    _write_json(folder / "generation_config.json", {"eos_token_id": stop, "pad_token_id": stop, "do_sample": False})
    _write_processor(folder, architecture)
    state = _weights(folder, tokenizer, stop, seed)
    if says is not None:
        _say(state, asked=tokenizer.encode("[/INST]" if pixtral else "\n").ids[-1], answer=ids[says], stop=stop)
    if dense_head:
        maps = 1 + len(config["vision_config"].get("deepstack_visual_indexes", ()))
        state |= _head_weights(HIDDEN * (maps if feature_mode == "concat" else 1), PATCH_PX[architecture], seed)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write_tokenizer(folder: Path, special: tuple[str, ...], pixtral: bool, whole: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False) for text in whole])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>" if pixtral else None,
            "eos_token": "</s>" if pixtral else "<|im_end|>",
            "pad_token": "</s>" if pixtral else "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
        },
    )
    return tokenizer


def _write_processor(folder: Path, architecture: str) -> None:
    if architecture == "llava":
        _write_json(folder / "chat_template.json", {"chat_template": PIXTRAL_TEMPLATE})
        _write_json(folder / "processor_config.json", {"processor_class": "PixtralProcessor", "patch_size": 16})
        _write_json(
            folder / "preprocessor_config.json",
            {
                "image_processor_type": "PixtralImageProcessor",
                "patch_size": {"height": 16, "width": 16},
                "size": {"longest_edge": 1024},
            },
        )
        return
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE, encoding="utf-8")
    new = architecture == "qwen3_vl"
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor" if new else "Qwen2_5_VLProcessor",
            "patch_size": 16 if new else 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "size": {"shortest_edge": 4096 if new else 3136, "longest_edge": 1048576},
        },
    )


def _text_config(vocabulary: int, stop: int) -> dict:
    return {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": stop,
    }


def _qwen_config(architecture: str, ids: dict[str, int], vocabulary: int) -> dict:
    new = architecture == "qwen3_vl"
    # `rope_scaling` beside `rope_theta` is read by transformers 4.57 and 5 alike.
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2]} | ({"mrope_interleaved": True} if new else {})
    text = _text_config(vocabulary, ids["<|im_end|>"]) | {"rope_theta": 5000000.0, "rope_scaling": rope}
    vision = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_heads": 4,
        "patch_size": 16 if new else 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
    }
    if new:
        vision |= {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    else:
        vision |= {"depth": 2, "window_size": 112, "fullatt_block_indexes": [1]}
    name = "Qwen3VL" if new else "Qwen2_5_VL"
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": architecture,
        "dtype": "float32",
        "text_config": {"model_type": f"{architecture}_text"} | text,
        "vision_config": {"model_type": architecture} | vision,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _llava_config(architecture: str, ids: dict[str, int], vocabulary: int) -> dict:
    text = {"model_type": "mistral", "rope_theta": 1e9, "sliding_window": None, "rms_norm_eps": 1e-5}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": architecture,
        "dtype": "float32",
        "image_token_index": ids["[IMG]"],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": text | _text_config(vocabulary, ids["</s>"]),
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "head_dim": 16,
            "image_size": 1024,
            "patch_size": 16,
            "rope_theta": 10000.0,
        },
    }


def _weights(folder: Path, tokenizer: Tokenizer, stop: int, seed: int) -> dict[str, torch.Tensor]:
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in sorted(model.state_dict().items()):
        draw = torch.randn(value.shape, generator=generator)
        if name.endswith("bias"):
            state[name] = 0.02 * draw
        elif value.ndim == 1:
            state[name] = (1 + 0.1 * draw) * _gain(name)
        else:
            state[name] = draw * _gain(name) / math.sqrt(value[0].numel())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    else:
        likely = [tokenizer.token_to_id(c) for c in "0123456789."] + [stop]
        scale = torch.full((len(state["lm_head.weight"]), 1), 0.2)
        scale[likely] = 1.0
        scale[stop] = 1.2
        state["lm_head.weight"] = state["lm_head.weight"] * scale
    return {name: value.contiguous() for name, value in state.items()}


def _say(state: dict[str, torch.Tensor], asked: int, answer: int, stop: int) -> None:
    """Makes what follows depend on the last token alone: the prompt's end is followed by the answer, that by the stop.

    The language model's layers add nothing to the embedding any more, so that it reaches the language head as it is.
    """
    for name in state:
        if "language_model" in name and ("o_proj" in name or "down_proj" in name):
            state[name] = torch.zeros_like(state[name])
    embedding = next(value for name, value in state.items() if name.endswith("embed_tokens.weight"))
    head = torch.zeros_like(state["lm_head.weight"])
    for before, after in ((asked, answer), (answer, stop)):
        head[after] = 4 * embedding[before] / embedding[before].norm()
    state["lm_head.weight"] = head


def _gain(name: str) -> float:
    if "embed_tokens" in name:
        return 4.0
    if "q_norm" in name or "k_norm" in name:
        return 2.5
    if any(part in name for part in ("q_proj", "k_proj", "o_proj", "down_proj")) and "language_model" in name:
        return 3.0
    return 1.0


def _head_weights(width: int, patch_px: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    shapes = {
        "norm.weight": (width,),
        "norm.bias": (width,),
        "mlp.0.weight": (HEAD_HIDDEN, width),
        "mlp.0.bias": (HEAD_HIDDEN,),
        "mlp.2.weight": (patch_px * patch_px, HEAD_HIDDEN),
        "mlp.2.bias": (patch_px * patch_px,),
    }
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {
        f"depth_head.{name}": value / math.sqrt(value.shape[-1]) if value.ndim == 2 else 1 + 0.1 * value
        for name, value in drawn.items()
    }


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
