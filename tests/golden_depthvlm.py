"""DepthVLM's own small models, rebuilt as checkpoints from the rule that their weights were made by."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from depthlm_ros.engines.processor import ImageInputs

GOLDEN = Path(__file__).parent / "golden" / "depthvlm"
EMBEDDING = "model.language_model.embed_tokens.weight"
# Every model in the folder, so that another one is tested by putting its two files there; more.json holds several.
GOLDEN_CASES = sorted(path.stem for path in GOLDEN.glob("*.npz") if path.stem != "more")
SPECIAL = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
# Words are numbers, so that prompts of the golden files can be said: header, image, then the question.
TEMPLATE = (
    " {% for message in messages %}{% for item in message['content'] %}{% if item['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def golden_case(kind: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The description of a golden model of `GOLDEN_CASES`, and its inputs and outputs."""
    return json.loads((GOLDEN / f"{kind}.json").read_text()), dict(np.load(GOLDEN / f"{kind}.npz"))


def more_cases() -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """Further models: other widths, depths, grids, feature modes, batches of several sizes, untied language heads.

    Made with DepthVLM's program (commit 940a9ba, transformers 5.2, torch 2.13 on a CPU, float32), weights by the same
    rule, images drawn from `RandomState(1000 + i)`; rows of a batch were padded on the left and masked. `ids` and
    `thw` hold a row each, the arrays are named `case.depth0`, `case.depth1`, `case.logits` (last position).
    """
    return json.loads((GOLDEN / "more.json").read_text()), dict(np.load(GOLDEN / "more.npz"))


def golden_weight(name: str, shape: list[int] | tuple[int, ...]) -> torch.Tensor:
    """A weight by name, the rule of the golden files."""
    generator = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    drawn = torch.from_numpy(generator.standard_normal(int(np.prod(shape))).astype(np.float32)).reshape(shape)
    if name.endswith("bias"):
        return 0.02 * drawn
    return 1 + 0.1 * drawn if len(shape) == 1 else drawn / float(np.sqrt(np.prod(shape[1:])))


def write_golden(
    folder: Path, kind: str, *, weights: Mapping[str, torch.Tensor] | None = None, config: dict | None = None
) -> Path:
    """Writes a golden model as a checkpoint that `load_engine` takes.

    Args:
        folder: made if it isn't there.
        kind: of `GOLDEN_CASES`; its prompt's beginning becomes the header of the chat template.
        weights: instead of the golden ones; their names are stored as they are.
        config: keys to change in config.json.
    """
    case, arrays = golden_case(kind)
    folder.mkdir(parents=True, exist_ok=True)
    head = {key: case[key] for key in ("depth_head_type", "depth_head_mlp_hidden", "depth_head_feature_mode")}
    config = case["config"] | {"model_type": "qwen3_vl"} | head | (config or {})
    _write_json(folder / "config.json", config)
    if weights is None:
        weights = {name: golden_weight(name, shape) for name, shape in case["shapes"].items()}
        # The two share their storage there, and the language head was filled last.
        weights[EMBEDDING] = weights["lm_head.weight"].clone()
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    ids = arrays["input_ids"][0].tolist()
    _write_tokenizer(folder, config, header=ids[: ids.index(case["config"]["vision_start_token_id"])])
    size = {"shortest_edge": 4096, "longest_edge": 1048576}
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    vision = config["vision_config"]
    patches = {"patch_size": vision["patch_size"], "merge_size": vision["spatial_merge_size"], "temporal_patch_size": 2}
    _write_json(
        folder / "preprocessor_config.json",
        {"image_processor_type": "Qwen2VLImageProcessorFast", "size": size} | statistics | patches,
    )
    _write_json(folder / "generation_config.json", {"eos_token_id": 0, "do_sample": False})
    return folder


def drawn_inputs(row: int, thw: list[int]) -> ImageInputs:
    """The image of one row of `more_cases`, for a vision tower with 16-pixel patches merged 2 x 2."""
    shape = (thw[1] * thw[2], 3 * 2 * 16 * 16)
    pixels = np.random.RandomState(1000 + row).standard_normal(shape).astype(np.float32)
    return golden_inputs({"pixel_values": pixels, "image_grid_thw": np.array([thw])})


def golden_inputs(arrays: Mapping[str, np.ndarray], merge: int = 2) -> ImageInputs:
    """The image of a golden file, as its processor left it."""
    grid = arrays["image_grid_thw"][0]
    tensors = {name: torch.from_numpy(arrays[name]) for name in ("pixel_values", "image_grid_thw")}
    return ImageInputs(tensors, (int(grid[1]) // merge, int(grid[2]) // merge), 1)


def words(ids: list[int]) -> str:
    """The text that the tokenizer reads as these ids."""
    return " ".join(f"w{number}" for number in ids)


def _write_tokenizer(folder: Path, config: dict, header: list[int]) -> None:
    special = {config[name]: token for name, token in SPECIAL.items()}
    count = config["text_config"]["vocab_size"]
    vocabulary = {special.get(number, f"w{number}"): number for number in range(count)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w0", "pad_token": "w0"}
    _write_json(folder / "tokenizer_config.json", settings | {"clean_up_tokenization_spaces": False})
    (folder / "chat_template.jinja").write_text(words(header) + TEMPLATE, encoding="utf-8")


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
