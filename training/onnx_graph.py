"""The dense pass as one static graph: bytes of an image to metres, for `torch.onnx.export`.

It computes what `TransformersEngine.depth_map` computes, from the same loaded weights, for one image size. Everything
that doesn't depend on the pixels is a constant: what precedes the image in the prompt, positions, rotary angles, the
causal mask. Normalisation and patches are in the graph, so that nobody outside can do them in another way.

Weights lie as (in, out), so that each product is one MatMul whose weight keeps its name in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from depthlm_ros.engines.dense_head import MLPDepthHead, head_features
from depthlm_ros.engines.dpt_head import DPTDepthHead
from depthlm_ros.engines.linear import ACTIVATIONS
from depthlm_ros.engines.vision_readers import read_tower


@dataclass(frozen=True)
class Constants:
    """What the graph knows before it sees an image.

    Attributes:
        scale: (3,) value of a byte in each channel.
        offset: (3,) value of byte 0.
        header: (P, C) embeddings of what precedes the image.
        cos: (P + N, D / 2) of the language model's rotary angles.
        sin: likewise.
    """

    scale: torch.Tensor
    offset: torch.Tensor
    header: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class DenseGraph(nn.Module):
    """(H, W, 3) uint8 RGB to (H, W) float32 metres, for one size.

    Args:
        model: a loaded Qwen3-VL model in float32.
        head: its dense head.
        mode: what the head reads, see `head_features`.
        size: (height, width) in pixels, whole multiples of an image token's side.
        constants: made for this size.
    """

    def __init__(
        self,
        model: nn.Module,
        head: MLPDepthHead | DPTDepthHead,
        mode: str,
        size: tuple[int, int],
        constants: Constants,
    ) -> None:
        super().__init__()
        vision = model.config.vision_config
        self._side, self._merge = vision.patch_size, vision.spatial_merge_size
        self._hw = (size[0] // (self._side * self._merge), size[1] // (self._side * self._merge))
        self._header_tokens = len(constants.header)
        self._mode = mode
        for name in ("scale", "offset", "header"):
            self.register_buffer(name, getattr(constants, name))
        self.vision = _Tower(model, (size[0] // self._side, size[1] // self._side))
        self.language = _Decoder(model, constants.cos, constants.sin)
        self.head = _MLPHead(head) if isinstance(head, MLPDepthHead) else _DPTHead(head)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The map of one image."""
        tokens, maps = self.vision(self._patches(image))
        # Added as zeros where the text is: no runtime disagrees about an addition, as they do about scattering.
        padded = [torch.cat([torch.zeros_like(self.header), one]) for one in maps]
        last = self.language(torch.cat([self.header, tokens]), padded)[self._header_tokens :]
        return self.head(head_features(self._mode, maps, last), self._hw)

    def _patches(self, image: torch.Tensor) -> torch.Tensor:
        """(N, 3 * side * side), merge x merge blocks after one another, as the processor orders them."""
        (h, w), side, merge = self._hw, self._side, self._merge
        values = image.to(torch.float32) * self.scale + self.offset
        cut = values.reshape(h, merge, side, w, merge, side, 3).permute(0, 3, 1, 4, 6, 2, 5)
        return cut.reshape(h * w * merge * merge, 3 * side * side)


class _Product(nn.Module):
    """`x W + b`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().t())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class _LayerNorm(nn.Module):
    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.register_buffer("weight", norm.weight.detach())
        self.register_buffer("bias", norm.bias.detach())
        self._eps = norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self._eps)


class _RMSNorm(nn.Module):
    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self._eps) * self.weight


class _Tower(nn.Module):
    """Patches to image tokens and the DeepStack maps, each (N / merge^2, C')."""

    def __init__(self, model: nn.Module, grid_hw: tuple[int, int]) -> None:
        super().__init__()
        tower = model.model.visual
        grid = read_tower(model, "qwen3_vl").grid(grid_hw)
        conv = tower.patch_embed.proj
        # An image's two time steps are the same.
        self.patch = _Product(conv.weight.detach().sum(2).flatten(1), conv.bias)
        self.register_buffer("position", grid.position.detach())
        self.register_buffer("cos", grid.turns.cos[:, 0].contiguous())
        self.register_buffer("sin", grid.turns.sin[:, 0].contiguous())
        self.blocks = nn.ModuleList(_VisionBlock(block, tower.config) for block in tower.blocks)
        self.merger = _Merger(tower.merger)
        self.deepstack = nn.ModuleList(_Merger(merger) for merger in tower.deepstack_merger_list)
        self._after = list(tower.deepstack_visual_indexes)

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = self.patch(patches) + self.position
        maps = []
        for number, block in enumerate(self.blocks):
            x = block(x, self.cos, self.sin)
            if number in self._after:
                maps.append(self.deepstack[self._after.index(number)](x))
        return self.merger(x), maps


class _VisionBlock(nn.Module):
    def __init__(self, block: nn.Module, config: object) -> None:
        super().__init__()
        self.norm1, self.norm2 = _LayerNorm(block.norm1), _LayerNorm(block.norm2)
        self.qkv = _Product(block.attn.qkv.weight, block.attn.qkv.bias)
        self.proj = _Product(block.attn.proj.weight, block.attn.proj.bias)
        self.up = _Product(block.mlp.linear_fc1.weight, block.mlp.linear_fc1.bias)
        self.down = _Product(block.mlp.linear_fc2.weight, block.mlp.linear_fc2.bias)
        self._heads, self._activation = config.num_heads, config.hidden_act

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(tokens, 3, self._heads, width // self._heads).unbind(1)
        q, k, v = (part.transpose(0, 1) for part in (_turned(q, cos, sin), _turned(k, cos, sin), v))
        x = x + self.proj(_attention(q, k, v).transpose(0, 1).reshape(tokens, width))
        return x + self.down(_activated(self.up(self.norm2(x)), self._activation))


class _Merger(nn.Module):
    def __init__(self, merger: nn.Module) -> None:
        super().__init__()
        self.norm = _LayerNorm(merger.norm)
        self.up = _Product(merger.linear_fc1.weight, merger.linear_fc1.bias)
        self.down = _Product(merger.linear_fc2.weight, merger.linear_fc2.bias)
        self._width, self._post = merger.hidden_size, merger.use_postshuffle_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = self.norm(x.reshape(-1, self._width)) if self._post else self.norm(x).reshape(-1, self._width)
        return self.down(F.gelu(self.up(joined)))


class _Decoder(nn.Module):
    """The language model's layers: (T, C) to normed last states (T, C)."""

    def __init__(self, model: nn.Module, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().__init__()
        text, config = model.model.language_model, model.config.get_text_config()
        self.register_buffer("cos", cos[:, None].contiguous())
        self.register_buffer("sin", sin[:, None].contiguous())
        # As a sum, which no runtime reads in two ways; the least float32 would overflow where scores are added to it.
        place = torch.arange(len(cos))
        self.register_buffer("unseen", torch.where(place[:, None] >= place, 0.0, -1e9).to(torch.float32))
        self.layers = nn.ModuleList(_DecoderLayer(layer, config) for layer in text.layers)
        self.norm = _RMSNorm(text.norm.weight, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, self.cos, self.sin, self.unseen)
            if number < len(maps):
                x = x + maps[number]
        return self.norm(x)


class _DecoderLayer(nn.Module):
    def __init__(self, layer: nn.Module, config: object) -> None:
        super().__init__()
        attention, mlp, eps = layer.self_attn, layer.mlp, config.rms_norm_eps
        self.norm1 = _RMSNorm(layer.input_layernorm.weight, eps)
        self.norm2 = _RMSNorm(layer.post_attention_layernorm.weight, eps)
        self.q_norm, self.k_norm = _RMSNorm(attention.q_norm.weight, eps), _RMSNorm(attention.k_norm.weight, eps)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, _Product(getattr(attention, name).weight, getattr(attention, name).bias))
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.add_module(name, _Product(getattr(mlp, name).weight, getattr(mlp, name).bias))
        self._heads, self._groups = config.num_attention_heads, config.num_key_value_heads
        self._activation = config.hidden_act

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unseen: torch.Tensor) -> torch.Tensor:
        tokens, groups, each = x.shape[0], self._groups, self._heads // self._groups
        normed = self.norm1(x)
        q = self.q_norm(self.q_proj(normed).reshape(tokens, self._heads, -1))
        k = self.k_norm(self.k_proj(normed).reshape(tokens, groups, -1))
        v = self.v_proj(normed).reshape(tokens, 1, groups, -1)
        q = _turned(q, cos, sin).reshape(tokens, groups, each, -1).permute(1, 2, 0, 3)
        k, v = (part.reshape(tokens, groups, 1, -1).permute(1, 2, 0, 3) for part in (_turned(k, cos, sin), v))
        attended = _attention(q, k, v, unseen).permute(2, 0, 1, 3).reshape(tokens, -1)
        x = x + self.o_proj(attended)
        normed = self.norm2(x)
        return x + self.down_proj(_activated(self.gate_proj(normed), self._activation) * self.up_proj(normed))


class _MLPHead(nn.Module):
    """`MLPDepthHead` of one image."""

    def __init__(self, head: MLPDepthHead) -> None:
        super().__init__()
        self.norm = _LayerNorm(head.norm)
        self.up = _Product(head.mlp[0].weight, head.mlp[0].bias)
        self.down = _Product(head.mlp[2].weight, head.mlp[2].bias)
        self._patch_px, self._output = head.patch_px, head.output

    def forward(self, features: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        (h, w), p = grid_hw, self._patch_px
        raw = self.down(F.gelu(self.up(self.norm(features))))
        raw = raw.reshape(h, w, p, p).permute(0, 2, 1, 3).reshape(h * p, w * p)
        return raw.exp() if self._output == "exp" else F.softplus(raw)


class _DPTHead(nn.Module):
    """`DPTDepthHead` of one image, without its switch of cuDNN's formats, which a graph can't hold."""

    def __init__(self, head: DPTDepthHead) -> None:
        super().__init__()
        self.norm, self.projects, self.resize_layers = _LayerNorm(head.norm), head.projects, head.resize_layers
        self.scratch = head.scratch
        self._patch_px = head.patch_px

    def forward(self, features: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        h, w = grid_hw
        scales = []
        for one, project, resize in zip(features.unbind(0), self.projects, self.resize_layers, strict=True):
            plane = self.norm(one).transpose(0, 1).reshape(1, -1, h, w)
            scales.append(resize(project(plane)))
        return F.softplus(self.scratch(scales, (self._patch_px * h, self._patch_px * w))[0, 0])


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, unseen: torch.Tensor | None = None
) -> torch.Tensor:
    """(..., T, D) to the same; `unseen` (T, T) is added to the scores."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores if unseen is None else scores + unseen, -1), v)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (T, heads, D) by (T, 1, D / 2) angles."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _activated(x: torch.Tensor, name: str) -> torch.Tensor:
    return F.silu(x) if name == "silu" else F.gelu(x, approximate=ACTIVATIONS[name][1])
