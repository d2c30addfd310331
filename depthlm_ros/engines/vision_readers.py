"""Reads the vision towers of Qwen3-VL, Qwen2.5-VL and Pixtral out of loaded transformers models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from depthlm_ros.engines.linear import Linear
from depthlm_ros.engines.vision_blocks import (
    Layer,
    Projection,
    Rows,
    Turns,
    Windows,
    gated_mlp,
    layer_norm,
    plain_mlp,
    rms_norm,
)


@dataclass(frozen=True, eq=False)
class Grid:
    """What a tower needs to know of an image's size: all of it is made once for each size.

    It is a key by its identity: a recording that reads its tensors keeps them.

    Attributes:
        hw: rows and columns of patches.
        order: (N,) the processor's patches in the tower's order; None where they are the same.
        back: (N / merge^2,) the tower's image tokens in the language model's order; None likewise.
        position: (N, C) learned embedding of each place, or None.
        turns: rotary angles.
        windows: of layers that see a window only.
    """

    hw: tuple[int, int]
    order: torch.Tensor | None
    back: torch.Tensor | None
    position: torch.Tensor | None
    turns: Turns
    windows: tuple[Windows, ...] = ()

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return self.hw[0] * self.hw[1]


@dataclass(frozen=True)
class Architecture:
    """A tower's weights and what is special about it.

    Attributes:
        patches: the processor's `pixel_values` to (B * N, values of a patch).
        embed: those to (B * N, C), without the place's embedding.
        layers: from first to last.
        merge: (B * N, C) to (B * N / merge^2, C') image tokens.
        deepstack: the same by the number of the layer it follows.
        grid: (h, w) patches to what depends on them alone.
    """

    patches: Rows
    embed: Rows
    layers: Sequence[Layer]
    merge: Rows
    deepstack: dict[int, Rows]
    grid: Callable[[tuple[int, int]], Grid]


def read_tower(model: PreTrainedModel, architecture: str) -> Architecture:
    """The tower of a loaded model.

    Raises:
        AttributeError, ValueError: the model isn't built as this transformers version is known to build it.
    """
    return {"qwen3_vl": _qwen3, "qwen2_5_vl": _qwen2_5, "llava": _pixtral}[architecture](model)


def _qwen3(model: PreTrainedModel) -> Architecture:
    tower = model.model.visual
    config = tower.config
    merge = config.spatial_merge_size
    layers = [
        Layer(
            norm=layer_norm(block.norm1),
            project=Projection([block.attn.qkv.weight], [block.attn.qkv.bias], config.num_heads),
            output=Linear(block.attn.proj.weight, block.attn.proj.bias),
            mlp_norm=layer_norm(block.norm2),
            mlp=plain_mlp(block.mlp.linear_fc1, block.mlp.linear_fc2, config.hidden_act),
        )
        for block in tower.blocks
    ]
    table = tower.pos_embed.weight
    frequencies = tower.rotary_pos_emb.inv_freq.float()

    def grid(hw: tuple[int, int]) -> Grid:
        places = _places(hw, merge, table.device)
        position = _resampled(table, places, hw).to(table.dtype)
        return Grid(hw, None, None, position, Turns.of((places[..., None] * frequencies).flatten(1)))

    return Architecture(
        patches=_as_they_are,
        embed=_patch_embedding(tower.patch_embed.proj),
        layers=layers,
        merge=_qwen3_merger(tower.merger),
        deepstack={
            after: _qwen3_merger(merger)
            for after, merger in zip(tower.deepstack_visual_indexes, tower.deepstack_merger_list, strict=True)
        },
        grid=grid,
    )


def _qwen3_merger(merger: nn.Module) -> Rows:
    norm, mlp = layer_norm(merger.norm), plain_mlp(merger.linear_fc1, merger.linear_fc2, "gelu")
    width = merger.hidden_size
    if merger.use_postshuffle_norm:
        return lambda x: mlp(norm(x.view(-1, width)))
    return lambda x: mlp(norm(x).view(-1, width))


def _qwen2_5(model: PreTrainedModel) -> Architecture:
    tower = model.model.visual
    config = tower.config
    merge = config.spatial_merge_size
    side = config.window_size // merge // config.patch_size
    layers = [
        Layer(
            norm=rms_norm(block.norm1.weight, block.norm1.variance_epsilon),
            project=Projection([block.attn.qkv.weight], [block.attn.qkv.bias], config.num_heads),
            output=Linear(block.attn.proj.weight, block.attn.proj.bias),
            mlp_norm=rms_norm(block.norm2.weight, block.norm2.variance_epsilon),
            mlp=gated_mlp(block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj, config.hidden_act),
            windowed=number not in tower.fullatt_block_indexes,
        )
        for number, block in enumerate(tower.blocks)
    ]
    frequencies = tower.rotary_pos_emb.inv_freq.float()
    device = tower.patch_embed.proj.weight.device

    def grid(hw: tuple[int, int]) -> Grid:
        units, windows = _windows(hw[0] // merge, hw[1] // merge, side, merge * merge)
        units = units.to(device)
        order = (units[:, None] * merge * merge + torch.arange(merge * merge, device=device)).flatten()
        turns = Turns.of((_places(hw, merge, device)[order][..., None] * frequencies).flatten(1))
        return Grid(hw, order, units.argsort(), None, turns, windows)

    norm = rms_norm(tower.merger.ln_q.weight, tower.merger.ln_q.variance_epsilon)
    mlp = plain_mlp(tower.merger.mlp[0], tower.merger.mlp[2], "gelu")
    width = tower.merger.hidden_size
    embed = _patch_embedding(tower.patch_embed.proj)
    return Architecture(_as_they_are, embed, layers, lambda x: mlp(norm(x).view(-1, width)), {}, grid)


def _pixtral(model: PreTrainedModel) -> Architecture:
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    config = tower.config
    if model.config.vision_feature_layer != -1 or model.config.vision_feature_select_strategy != "full":
        raise ValueError("the image tokens aren't the last layer's, all of them")
    heads = config.num_attention_heads
    layers = [
        Layer(
            norm=rms_norm(block.attention_norm.weight, block.attention_norm.variance_epsilon),
            project=Projection(
                [getattr(block.attention, name).weight for name in ("q_proj", "k_proj", "v_proj")], None, heads
            ),
            output=Linear(block.attention.o_proj.weight, None),
            mlp_norm=rms_norm(block.ffn_norm.weight, block.ffn_norm.variance_epsilon),
            mlp=gated_mlp(
                block.feed_forward.gate_proj,
                block.feed_forward.up_proj,
                block.feed_forward.down_proj,
                config.hidden_act,
            ),
        )
        for block in tower.transformer.layers
    ]
    width = config.hidden_size // heads
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=tower.patch_conv.weight.device)
    frequencies = config.rope_parameters["rope_theta"] ** (-steps / width)

    def grid(hw: tuple[int, int]) -> Grid:
        places = _places(hw, 1, frequencies.device)
        angles = torch.cat([places[:, :1] * frequencies[0::2], places[:, 1:] * frequencies[1::2]], dim=1)
        return Grid(hw, None, None, None, Turns.of(angles))

    conv = tower.patch_conv
    first = Linear(conv.weight.flatten(1), conv.bias)
    norm = rms_norm(tower.ln_pre.weight, tower.ln_pre.variance_epsilon)
    side = config.patch_size

    def patches(pixels: torch.Tensor) -> torch.Tensor:
        cut = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, 3, h, side, w, side)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, conv.weight[0].numel())

    merge = plain_mlp(projector.linear_1, projector.linear_2, model.config.projector_hidden_act)
    return Architecture(patches, lambda x: norm(first(x)), layers, merge, {}, grid)


def _as_they_are(pixels: torch.Tensor) -> torch.Tensor:
    return pixels


def _patch_embedding(conv: nn.Conv3d) -> Rows:
    """Qwen's patches hold each pixel once for each of two time steps, which are the same in an image."""
    weight = conv.weight.detach()
    if weight.dtype != torch.float32:
        # A sum of two weights needs more digits than they have.
        return Linear(weight.flatten(1), conv.bias)
    channels, times = weight.shape[1:3]
    embed = Linear(weight.sum(2).flatten(1), conv.bias)
    return lambda patches: embed(patches.unflatten(1, (channels, times, -1))[:, :, 0].flatten(1))


def _places(hw: tuple[int, int], merge: int, device: torch.device) -> torch.Tensor:
    """(N, 2) row and column of each patch, in the order of the processor: merge x merge blocks after one another."""
    h, w = hw
    rows = torch.arange(h, device=device).view(-1, 1).expand(h, w)
    columns = torch.arange(w, device=device).view(1, -1).expand(h, w)
    both = torch.stack([rows, columns], dim=-1)
    return both.reshape(h // merge, merge, w // merge, merge, 2).transpose(1, 2).reshape(-1, 2)


def _resampled(table: torch.Tensor, places: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
    """(N, C) values of a square table of positions, stretched over the image bilinearly, corner on corner."""
    side = int(len(table) ** 0.5)
    size = torch.tensor(hw, dtype=torch.float32, device=places.device)
    at = places * (side - 1) / (size - 1).clamp(min=1)
    low = at.floor()
    share = at - low
    low = low.long()
    high = (low + 1).clamp(max=side - 1)
    total = 0
    for row, row_weight in ((low[:, 0], 1 - share[:, 0]), (high[:, 0], share[:, 0])):
        for column, column_weight in ((low[:, 1], 1 - share[:, 1]), (high[:, 1], share[:, 1])):
            total = total + table.detach()[row * side + column] * (row_weight * column_weight)[:, None]
    return total


def _windows(h: int, w: int, side: int, unit: int) -> tuple[torch.Tensor, tuple[Windows, ...]]:
    """Order of the merge units, windows of one shape together, and those windows.

    Args:
        h: rows of units.
        w: columns of units.
        side: rows and columns of a whole window; those at the right and lower border are smaller.
        unit: tokens of a unit.
    """
    at = torch.arange(h * w).view(h, w)
    whole_h, whole_w = h - h % side, w - w % side
    order, windows, start = [], [], 0
    for rows in (slice(0, whole_h), slice(whole_h, h)):
        for columns in (slice(0, whole_w), slice(whole_w, w)):
            part = at[rows, columns]
            if not part.numel():
                continue
            tall, wide = min(side, part.shape[0]), min(side, part.shape[1])
            cut = part.unflatten(1, (-1, wide)).unflatten(0, (-1, tall)).transpose(1, 2).reshape(-1, tall * wide)
            order.append(cut.flatten())
            windows.append(Windows(start, len(cut), tall * wide * unit))
            start += cut.numel() * unit
    return torch.cat(order), tuple(windows)
