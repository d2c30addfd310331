"""The vision tower on a batch of images of one size, in a few large operations.

The stock forward pass attends to each image alone and convolves each patch with both copies of its only frame. Images
of one size are a batch, and a frame that is shown twice meets the sum of the kernel's two halves: the same numbers from
the same weights, several times as fast on a CPU.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

PATCH, MERGE = 16, 2
TOKEN_PX = PATCH * MERGE  # an image token covers 32 x 32 pixels, as in the published Qwen3-VL


def patches(images: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8, H and W multiples of 32, to (B, H/16 * W/16, 3 * 16 * 16) in [-1, 1], in merge order."""
    b, height, width, _ = images.shape
    x = images.reshape(b, height // TOKEN_PX, MERGE, PATCH, width // TOKEN_PX, MERGE, PATCH, 3)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)  # b, rows, columns, merge y, merge x, channel, y, x
    return x.reshape(b, -1, 3 * PATCH * PATCH).float() / 127.5 - 1


@cache
def _places(rows: int, columns: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the patches of one image: indices (N, 4) and weights (N, 4) of learned positions, ids (N, 2) for rotation."""
    grid = torch.tensor([[1, rows, columns]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid, num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=MERGE
    )
    return indices, weights, get_vision_position_ids(grid, MERGE)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _attended(attention: nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    b, n, _ = x.shape
    q, k, v = attention.qkv(x).reshape(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = _turned(q, cos, sin).to(v.dtype), _turned(k, cos, sin).to(v.dtype)
    scores = (q * attention.scaling) @ k.transpose(-1, -2)
    return attention.proj((scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(b, n, -1))


def look(tower: Qwen3VLVisionModel, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the tower hands to the language model.

    Args:
        images: (B, H, W, 3) uint8, H and W multiples of 32.

    Returns:
        (B, N, C) and the DeepStack maps, each (B * N, C).
    """
    height, width = images.shape[1:3]
    device = images.device
    indices, weights, ids = (x.to(device) for x in _places(height // PATCH, width // PATCH, tower.num_grid_per_side))
    kernel = tower.patch_embed.proj.weight.sum(2).flatten(1)
    x = nn.functional.linear(patches(images), kernel, tower.patch_embed.proj.bias)
    x = x + (tower.pos_embed(indices) * weights[:, :, None]).sum(1).to(x.dtype)
    cos, sin = tower.rotary_pos_emb(x, ids)
    stacked = []
    for i, block in enumerate(tower.blocks):
        x = x + _attended(block.attn, block.norm1(x), cos, sin)
        x = x + block.mlp(block.norm2(x))
        if i in tower.deepstack_visual_indexes:
            merger = tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(i)]
            stacked.append(merger(x.reshape(-1, x.shape[-1])))
    return tower.merger(x.reshape(-1, x.shape[-1])).reshape(len(images), -1, stacked[0].shape[-1]), stacked
