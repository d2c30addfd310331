"""What the plain path decodes: one prefix that questions share, and the rows of a batch that continue it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache


@dataclass(frozen=True)
class PlainPrefix:
    """What one or several images have been turned into; questions attend to it.

    Attributes:
        cache: keys and values, one row for each image.
        token_ids: the prefilled ids, the same for every row.
        next_position: rotary position of the first token that follows.
    """

    cache: DynamicCache
    token_ids: tuple[int, ...]
    next_position: int

    @property
    def device(self) -> torch.device:
        """Where the cache lies."""
        return self.cache.layers[0].keys.device

    def rows(self, count: int) -> DynamicCache:
        """A cache of `count` rows of its own, which decoding may grow."""
        layers = self.cache.layers
        return DynamicCache([(kv.keys.expand(count, -1, -1, -1), kv.values.expand(count, -1, -1, -1)) for kv in layers])


class Batch:
    """Rows that are being decoded: what goes into the next forward pass.

    Suffixes are padded on the left, between prefix and suffix, so that all rows end together; the
    padding is masked, and positions skip it.
    """

    def __init__(self, prefix: PlainPrefix, suffixes: Sequence[Sequence[int]], device: torch.device) -> None:
        width = max(map(len, suffixes))
        padding = torch.tensor([width - len(suffix) for suffix in suffixes], device=device)[:, None]
        self.rows = torch.arange(len(suffixes), device=device)
        self.cache = prefix.rows(len(suffixes))
        self.input_ids = torch.tensor([[0] * (width - len(s)) + list(s) for s in suffixes], device=device)
        offsets = torch.arange(width, device=device) - padding
        self.positions = prefix.next_position + offsets.clamp(min=0)
        self.mask = None
        if padding.any():
            ones = torch.ones(len(suffixes), len(prefix.token_ids), dtype=torch.bool, device=device)
            self.mask = torch.cat([ones, offsets >= 0], dim=1)

    def advance(self, chosen: torch.Tensor, running: Sequence[int]) -> None:
        """Makes the chosen tokens the next input; copies the cache once half of the rows have ended."""
        self.input_ids = chosen[:, None]
        self.positions = self.positions[:, -1:] + 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        if 2 * len(running) <= len(self.rows):
            keep = torch.tensor(running, device=self.rows.device)
            self.cache.batch_select_indices(keep)
            self.rows, self.input_ids, self.positions = self.rows[keep], self.input_ids[keep], self.positions[keep]
            self.mask = None if self.mask is None else self.mask[keep]


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest common token prefix that leaves each prompt at least one token."""
    shortest, longest = min(prompts), max(prompts)
    common = next((i for i, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b), len(shortest))
    return min(common, min(map(len, prompts)) - 1)
