"""The demo network: Qwen3-VL's architecture in small, with the dense head on the same weights.

It is the stock `Qwen3VLForConditionalGeneration`; nothing here replaces any of its parts, so what is trained here
loads anywhere that Qwen3-VL loads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from depthlm_ros.engines.dense_head import MLPDepthHead
from depthlm_training.demo.decoder import KeysValues, read
from depthlm_training.demo.tower import MERGE, PATCH, TOKEN_PX, look


@dataclass(frozen=True)
class Size:
    """The dials of the network; the defaults make 8.9M parameters, 18 MB in bfloat16."""

    vision_hidden: int = 192
    vision_layers: int = 5
    vision_heads: int = 6
    hidden: int = 256
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 640
    head_hidden: int = 256


def build_config(tokenizer: PreTrainedTokenizerFast, size: Size) -> Qwen3VLConfig:
    """The configuration of a Qwen3-VL of this size that speaks the tokenizer's vocabulary."""
    token = tokenizer.convert_tokens_to_ids
    vocab = -(-len(tokenizer) // 64) * 64
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config={
            "vocab_size": vocab,
            "hidden_size": size.hidden,
            "intermediate_size": size.mlp,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            "rope_parameters": rope,
            "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "intermediate_size": 4 * size.vision_hidden,
            "num_heads": size.vision_heads,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": size.hidden,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [1, size.vision_layers - 2],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


@dataclass
class Encoded:
    """A batch of images after the prefix pass.

    Attributes:
        states: (B, N, C) the language model's last states at the image tokens, after its final norm.
        merged: (B, N, C) what the vision tower handed to the language model.
        past: keys and values of the prefix, of each layer.
        next_position: the M-RoPE position of the token after the prefix.
        grid: (h, w) tokens.
    """

    states: torch.Tensor
    merged: torch.Tensor
    past: list[KeysValues]
    next_position: int
    grid: tuple[int, int]

    def part(self, images: torch.Tensor) -> Encoded:
        """Only these images (N,) of it."""
        past = [(k[images], v[images]) for k, v in self.past]
        return Encoded(self.states[images], self.merged[images], past, self.next_position, self.grid)


class DemoNet(nn.Module):
    """The stock model and the dense head.

    `probe` and `finder` are helpers of training alone, linear read-outs of what the vision tower hands over, never
    saved. The probe reads coarse log-depth: so depth is available to the language model's first layers, where question
    tokens can look it up. The finder reads a drawn arrow: whether it points into a token's square, where in it, and at
    which log-depth. A text answer about an arrow is one number an image and teaches the tower nothing about arrows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: Size | None = None, seed: int = 0) -> None:
        super().__init__()
        size = size or Size()
        torch.manual_seed(seed)
        self.vlm = Qwen3VLForConditionalGeneration(build_config(tokenizer, size))
        self.head = MLPDepthHead(size.hidden, size.head_hidden, TOKEN_PX, output="exp")
        self.probe = nn.Linear(size.hidden, 64)
        self.finder = nn.Linear(size.hidden, 4)
        self.size = size
        self.header = tokenizer("<|im_start|>user\n<|vision_start|>").input_ids
        with torch.no_grad():
            # The default initial positions (std 0.02) vanish beside the patches; sines and cosines don't.
            grid = self.vlm.model.visual.pos_embed
            grid.weight.copy_(_sin_cos(int(grid.num_embeddings**0.5), size.vision_hidden))
            self.head.mlp[2].bias.fill_(1.2)  # exp(1.2) = 3.3 m, the median of the scenes

    @property
    def device(self) -> torch.device:
        return self.probe.weight.device

    def encode(self, images: torch.Tensor) -> Encoded:
        """Runs chat header and image, which is all that depth needs, since attention is causal.

        Args:
            images: (B, H, W, 3) uint8, H and W multiples of 32.
        """
        b, height, width, _ = images.shape
        h, w = height // TOKEN_PX, width // TOKEN_PX
        model = self.vlm.model
        device = images.device
        merged, stacked = look(model.visual, images)
        words = model.get_input_embeddings()(torch.tensor(self.header, device=device)).expand(b, -1, -1)
        start = len(self.header)
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        image_positions = start + torch.stack(
            [torch.zeros(h * w, dtype=torch.long), rows.reshape(-1), columns.reshape(-1)]
        )
        positions = torch.cat([torch.arange(start).expand(3, -1), image_positions], 1).to(device)
        seen = read(model.language_model, torch.cat([words.to(merged.dtype), merged], 1), positions, stacked=stacked)
        return Encoded(seen.states[:, start:], merged, seen.past, start + max(h, w), (h, w))

    def log_depth(self, encoded: Encoded) -> torch.Tensor:
        """(B, H, W) natural logarithm of z-depth in metres."""
        return self.head.raw_batch(encoded.states, encoded.grid)

    def probe_log_depth(self, encoded: Encoded) -> torch.Tensor:
        """(B, H / 4, W / 4) coarse log-depth from the vision tower alone."""
        h, w = encoded.grid
        return self.probe(encoded.merged).reshape(-1, h, w, 8, 8).permute(0, 1, 3, 2, 4).reshape(-1, 8 * h, 8 * w)

    def found(self, encoded: Encoded) -> torch.Tensor:
        """(B, N, 4) of each token: score of being pointed at, where in its square (shares of it), log-depth there."""
        return self.finder(encoded.merged)

    def load(self, folder: Path) -> None:
        """Takes the weights of a checkpoint that `save` wrote; the helpers stay as they are."""
        tensors = load_file(folder / "model.safetensors")
        head = {k.removeprefix("depth_head."): v for k, v in tensors.items() if k.startswith("depth_head.")}
        self.head.load_state_dict(head)
        rest = {k: v for k, v in tensors.items() if not k.startswith("depth_head.")}
        # The language model's head is the embedding.
        self.vlm.load_state_dict(rest | {"lm_head.weight": rest["model.language_model.embed_tokens.weight"]})

    def save(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Writes one safetensors file that stock transformers loads; the head rides along as `depth_head.*`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v for k, v in self.vlm.state_dict().items() if k != "lm_head.weight"}  # tied to the embedding
        tensors |= {f"depth_head.{k}": v for k, v in self.head.state_dict().items()}
        save_file(
            {k: v.detach().to(dtype).cpu().contiguous() for k, v in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        (folder / "model.safetensors").chmod(0o644)  # safetensors writes for its owner alone
        config = self.vlm.config.to_dict()
        text = config["text_config"]
        rope = text.pop("rope_parameters")
        # transformers 4.57 reads these two keys and 5.x reads them too; 4.57 can't read `rope_parameters`.
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope
        config |= {
            "depth_head_type": "mlp",
            "depth_head_mlp_hidden": self.size.head_hidden,
            "depth_head_feature_mode": "llm_last",
            "depth_head_output": "exp",
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "dtype": str(dtype).removeprefix("torch."),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (folder / "generation_config.json").write_text(
            json.dumps(
                {"do_sample": False, "eos_token_id": text["eos_token_id"], "pad_token_id": text["pad_token_id"]},
                indent=2,
            )
            + "\n"
        )


def _sin_cos(side: int, width: int) -> torch.Tensor:
    """(side * side, width) sines and cosines of row and column at geometric frequencies."""
    frequencies = torch.tensor(np.geomspace(0.5, side, width // 4), dtype=torch.float32)
    angles = torch.linspace(0, 1, side)[:, None] * frequencies * torch.pi
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return 0.3 * torch.cat([rows, columns], -1).reshape(side * side, -1)
