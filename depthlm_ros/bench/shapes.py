"""Shapes of published models, written down, so that nothing is downloaded to measure speed.

Speed hangs on shapes and number format alone, so random weights measure what trained ones would. The numbers are those
of the models' public config.json. One thing differs: the language head is a matrix of its own also where the published
one is the embedding, since it has to be taught (`taught.py`); that costs memory and no time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from depthlm_ros.errors import ConfigError, unknown_choice

_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        name: what `--shape` is given.
        architecture: `model_type` of its config.json.
        text: the language model's part of config.json.
        vision: the vision tower's part.
        image: settings of its image processor.
        source: whose sizes these are.
    """

    name: str
    architecture: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    image: Mapping[str, Any]
    source: str


def _qwen3(**text: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": text.pop("sections"), "mrope_interleaved": True}
    return {"model_type": "qwen3_vl_text", "rms_norm_eps": 1e-6, "rope_scaling": rope} | text


def _qwen2_5(**text: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24]}
    fixed = {"rope_theta": 1e6, "rope_scaling": rope, "rms_norm_eps": 1e-6, "max_position_embeddings": 128000}
    return {"model_type": "qwen2_5_vl_text"} | fixed | text


def _qwen2_5_vision(out_hidden_size: int) -> dict[str, Any]:
    return {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": out_hidden_size,
    }


_QWEN3_IMAGE = {"patch_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3, "shortest": 65536, "longest": 16777216}
_QWEN2_5_IMAGE = {"patch_size": 14, "mean": _CLIP_MEAN, "std": _CLIP_STD, "shortest": 3136, "longest": 12845056}

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="small",
            architecture="qwen3_vl",
            text=_qwen3(
                vocab_size=640,
                hidden_size=256,
                intermediate_size=640,
                num_hidden_layers=5,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=64,
                rope_theta=10000.0,
                sections=[12, 10, 10],
                max_position_embeddings=4096,
            ),
            vision={
                "depth": 5,
                "hidden_size": 192,
                "intermediate_size": 768,
                "num_heads": 6,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "num_position_embeddings": 256,
                "out_hidden_size": 256,
                "deepstack_visual_indexes": [1, 3],
            },
            image=_QWEN3_IMAGE | {"shortest": 4096, "longest": 1048576},
            source="the demo that ships with this package",
        ),
        Shape(
            name="qwen3-vl-4b",
            architecture="qwen3_vl",
            text=_qwen3(
                vocab_size=151936,
                hidden_size=2560,
                intermediate_size=9728,
                num_hidden_layers=36,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                rope_theta=5000000.0,
                sections=[24, 20, 20],
                max_position_embeddings=262144,
            ),
            vision={
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_heads": 16,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "num_position_embeddings": 2304,
                "out_hidden_size": 2560,
                "deepstack_visual_indexes": [5, 11, 17],
            },
            image=_QWEN3_IMAGE,
            source="Qwen/Qwen3-VL-4B-Instruct, config.json; VLM3 and DepthVLM-4B are of this shape",
        ),
        Shape(
            name="qwen2.5-vl-3b",
            architecture="qwen2_5_vl",
            text=_qwen2_5(
                vocab_size=151936,
                hidden_size=2048,
                intermediate_size=11008,
                num_hidden_layers=36,
                num_attention_heads=16,
                num_key_value_heads=2,
            ),
            vision=_qwen2_5_vision(2048),
            image=_QWEN2_5_IMAGE,
            source="Qwen/Qwen2.5-VL-3B-Instruct, config.json; DepthLM 3B is of this shape",
        ),
        Shape(
            name="qwen2.5-vl-7b",
            architecture="qwen2_5_vl",
            text=_qwen2_5(
                vocab_size=152064,
                hidden_size=3584,
                intermediate_size=18944,
                num_hidden_layers=28,
                num_attention_heads=28,
                num_key_value_heads=4,
            ),
            vision=_qwen2_5_vision(3584),
            image=_QWEN2_5_IMAGE,
            source="Qwen/Qwen2.5-VL-7B-Instruct, config.json; DepthLM 7B is of this shape",
        ),
        Shape(
            name="pixtral-12b",
            architecture="llava",
            text={
                "model_type": "mistral",
                "vocab_size": 131072,
                "hidden_size": 5120,
                "intermediate_size": 14336,
                "num_hidden_layers": 40,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "rope_theta": 1e9,
                "rms_norm_eps": 1e-5,
                "sliding_window": None,
                "max_position_embeddings": 1024000,
            },
            vision={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "head_dim": 64,
                "image_size": 1024,
                "patch_size": 16,
                "rope_theta": 10000.0,
            },
            image={"patch_size": 16, "mean": _CLIP_MEAN, "std": _CLIP_STD, "longest": 1024},
            source="mistral-community/pixtral-12b, config.json; DepthLM 12B is of this shape",
        ),
    )
}


def find_shape(name: str) -> Shape:
    """The shape of that name.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    if name not in SHAPES:
        raise ConfigError(unknown_choice("shape", name, SHAPES))
    return SHAPES[name]


def model_config(shape: Shape, ids: Mapping[str, int], stop: int, dtype: str) -> dict[str, Any]:
    """config.json of a model of this shape.

    Args:
        shape: the sizes.
        ids: of the special tokens, by their text.
        stop: the end-of-sequence token.
        dtype: number format of the weights, such as "float32".
    """
    text = dict(shape.text) | {"bos_token_id": None, "eos_token_id": stop, "tie_word_embeddings": False}
    config = {"model_type": shape.architecture, "dtype": dtype, "tie_word_embeddings": False, "text_config": text}
    if shape.architecture == "llava":
        return config | {
            "architectures": ["LlavaForConditionalGeneration"],
            "vision_config": {"model_type": "pixtral"} | shape.vision,
            "image_token_index": ids["[IMG]"],
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        }
    name = {"qwen3_vl": "Qwen3VL", "qwen2_5_vl": "Qwen2_5_VL"}[shape.architecture]
    return config | {
        "architectures": [f"{name}ForConditionalGeneration"],
        "vision_config": {"model_type": shape.architecture} | shape.vision,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
