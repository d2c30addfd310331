"""Attention of packed rows by their layout instead of by a mask of all against all.

A row of one image with 32 questions is mostly what no token sees: pairs don't see each other. A kernel with a mask
works all of it out and throws it away. Here each prefix attends to itself, and its pairs, as a batch, to the prefix and
to themselves, both causally: the same sums over the places that are seen. On a GPU in bfloat16 both are what the flash
kernels do without any mask. What it costs is memory: the prefix's keys and values once for each pair in each layer,
kept for the backward pass unless layers are computed again (`checkpointing`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from depthlm_training.packing import Batch

ATTENTION = "depthlm_packed"  # its name in transformers' registry


@dataclass(frozen=True)
class Whole:
    """One sequence in its row.

    Attributes:
        row: of the batch.
        begin: where in the row its prefix begins; its pairs follow, one after another.
        prefix: tokens of the prefix, and of the only pair where there is one.
        pairs: tokens of each of several pairs; those of very different lengths waste work, since all are padded to
            the longest.
    """

    row: int
    begin: int
    prefix: int
    pairs: tuple[int, ...]


def attend_packed(model: PreTrainedModel) -> None:
    """Lets a model's language layers take what `layout` gives; without it they work as `sdpa` does."""
    model.config.get_text_config()._attn_implementation = ATTENTION


def seen_by(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """What goes to a model as its `attention_mask`: the layout after `attend_packed`, else the mask."""
    packed = model.config.get_text_config()._attn_implementation == ATTENTION
    return layout(batch.sequence, batch.segment) if packed else batch.mask()


def layout(sequence: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """(R, 1, 2, L) int64 of a batch; models hand on whatever mask has four axes.

    Args:
        sequence: (R, L), as in `Batch`.
        segment: (R, L), as in `Batch`.
    """
    return torch.stack([sequence, segment], dim=1)[:, None]


def wholes(seen: torch.Tensor) -> list[Whole]:
    """The sequences of a layout in their order; padding is one without pairs."""
    found = []
    for row, (sequence, segment) in enumerate(seen[:, 0].tolist()):
        runs: list[tuple[int, int, int]] = []  # sequence, segment, where it begins
        for place, key in enumerate(zip(sequence, segment, strict=True)):
            if not runs or runs[-1][:2] != key:
                runs.append((*key, place))
        ends = [begin for _, _, begin in runs[1:]] + [len(sequence)]
        parts: dict[int, list[int]] = {}
        begins: dict[int, int] = {}
        for (number, _, begin), end in zip(runs, ends, strict=True):
            begins.setdefault(number, begin)
            parts.setdefault(number, []).append(end - begin)
        for number, lengths in parts.items():
            # One pair and its prefix are a plain causal sequence.
            prefix, *pairs = lengths if len(lengths) != 2 else [sum(lengths)]
            found.append(Whole(row, begins[number], prefix, tuple(pairs)))
    return found


class _Known:
    """The sequences of the last layout: all layers of a pass are given the same one."""

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, list[Whole]] | None = None

    def __call__(self, seen: torch.Tensor) -> list[Whole]:
        last = self._last
        if last is None or last[0] is not seen:
            self._last = last = seen, wholes(seen)
        return last[1]


_known = _Known()


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the layer's.
        query: (R, H, L, D).
        key: (R, K, L, D), K a divisor of H.
        value: (R, K, L, D).
        attention_mask: a `layout`; anything else goes to transformers' own `sdpa`.
        dropout: share of the weights that is dropped.
        scaling: of the scores.
        **options: of transformers' own.

    Returns:
        (R, L, H, D), and no weights.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    # Under autocast rotation leaves float32, which the products would turn back one by one.
    query, key = query.to(value.dtype), key.to(value.dtype)
    shared = query.shape[1] != key.shape[1]
    if shared and query.is_cuda and query.dtype == torch.float32:
        # The one kernel for float32 there that needs no room for all scores takes no grouped heads.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        shared = False
    rows: list[list[torch.Tensor]] = [[] for _ in range(len(query))]
    for whole in _known(attention_mask):
        at, end = whole.begin, whole.begin + whole.prefix
        q, k, v = (x[whole.row, :, at:end] for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=shared
        )
        rows[whole.row].append(out[0].transpose(0, 1))
        if whole.pairs:
            own_q, own_k, own_v = (_pairs(x[whole.row, :, end:], whole.pairs) for x in (query, key, value))
            keys, values = (
                torch.cat([prefix.expand(len(whole.pairs), *prefix.shape), own], dim=2)
                for prefix, own in ((k, own_k), (v, own_v))
            )
            # Pairs are padded behind their last token, where causal attention doesn't look.
            bias = causal_lower_right(own_q.shape[2], keys.shape[2])
            out = F.scaled_dot_product_attention(
                own_q, keys, values, attn_mask=bias, dropout_p=dropout, scale=scaling, enable_gqa=shared
            )
            rows[whole.row] += [each[:, :length].transpose(0, 1) for each, length in zip(out, whole.pairs, strict=True)]
    return torch.stack([torch.cat(parts) for parts in rows]), None


def _pairs(states: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """(N, H, P, D), padded behind, of (H, L, D) that begins with N pairs."""
    own = states[:, : sum(lengths)].transpose(0, 1)
    if len(set(lengths)) == 1:
        return own.unflatten(0, (len(lengths), -1)).transpose(1, 2)
    return pad_sequence(list(own.split(lengths)), batch_first=True).transpose(1, 2)


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
