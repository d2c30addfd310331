"""The language model on images and on questions about them, without copies of what questions share.

The stock forward pass repeats an image's keys and values for each question. Here questions about one image attend to
the same ones: the same numbers from the same weights in a part of the time and of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Read:
    """What a pass over B sequences left.

    Attributes:
        states: (B, L, C) last states after the final norm.
        early: (B, L, C) states after the second layer.
        past: of each layer the keys and values (B, kv heads, L, D), those before them included.
    """

    states: torch.Tensor
    early: torch.Tensor
    past: list[KeysValues]


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _attended(
    attention: nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, past: KeysValues | None
) -> tuple[torch.Tensor, KeysValues]:
    rows, length, _ = x.shape
    heads = (rows, length, -1, attention.head_dim)
    q = _turned(attention.q_norm(attention.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
    k = _turned(attention.k_norm(attention.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
    v = attention.v_proj(x).view(heads).transpose(1, 2)
    q, k = (q * attention.scaling).to(v.dtype), k.to(v.dtype)
    kv, size = k.shape[1], attention.head_dim
    q = q.reshape(rows, kv, -1, size)  # the queries of all heads that share a key, head after head
    group = q.shape[2] // length
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1).repeat(group, 1)
    scores = (q @ k.transpose(-1, -2)).masked_fill(later, -torch.inf)
    if past is None:
        out = scores.softmax(-1).to(v.dtype) @ v
        now = k, v
    else:
        before_k, before_v = past
        images, _, seen, _ = before_k.shape
        each = rows // images
        # (images, kv heads, rows of the image x heads x length, D): one product for all that share an image.
        together = q.reshape(images, each, kv, -1, size).transpose(1, 2).reshape(images, kv, -1, size)
        before = (together @ before_k.transpose(-1, -2)).reshape(images, kv, each, -1, seen)
        before = before.transpose(1, 2).reshape(rows, kv, -1, seen)
        weights = torch.cat([before, scores], -1).softmax(-1).to(v.dtype)
        on_past = weights[..., :seen].reshape(images, each, kv, -1, seen).transpose(1, 2).reshape(images, kv, -1, seen)
        out = (on_past @ before_v).reshape(images, kv, each, -1, size).transpose(1, 2).reshape(rows, kv, -1, size)
        out = out + weights[..., seen:] @ v
        now = (torch.cat([before_k, k], 2), torch.cat([before_v, v], 2)) if each == 1 else (k, v)
    out = out.reshape(rows, kv * group, length, size).transpose(1, 2).reshape(rows, length, -1)
    return attention.o_proj(out), now


def read(
    model: Qwen3VLTextModel,
    x: torch.Tensor,
    positions: torch.Tensor,
    past: Sequence[KeysValues] | None = None,
    stacked: Sequence[torch.Tensor] = (),
    layers: int | None = None,
) -> Read:
    """Runs sequences through the language model.

    Args:
        x: (R, L, C) embeddings.
        positions: (3, L) M-RoPE positions, the same for every sequence.
        past: keys and values of each layer for B images, R a multiple of B; sequence i * R / B + j continues image i.
            What is returned then holds them too, if R is B, and without them otherwise.
        stacked: DeepStack maps (R * N, C) for the last N places, added after the first layers.
        layers: run only so many; the final norm is left out then.
    """
    cos, sin = model.rotary_emb(x, positions[:, None])
    cos, sin = cos[:, None], sin[:, None]
    kept, early = [], x
    for i, layer in enumerate(model.layers[:layers]):
        attended, now = _attended(layer.self_attn, layer.input_layernorm(x), cos, sin, past[i] if past else None)
        x = x + attended
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        if i < len(stacked):
            maps = stacked[i].reshape(x.shape[0], -1, x.shape[-1])
            words = x.shape[1] - maps.shape[1]
            x = torch.cat([x[:, :words], x[:, words:] + maps.to(x.dtype)], 1)
        kept.append(now)
        if i == 1:
            early = x
    return Read(x if layers else model.norm(x), early, kept)
