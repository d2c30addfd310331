"""Keys and values: of what questions share, of what follows it, and where new tokens find and leave them.

Shapes: R rows of a prefix (1 or B), B continuations, P keys of the prefix, S of a continuation, K heads of size D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from depthlm_ros.engines.decoder import Decoder


@dataclass(frozen=True)
class Prefix:
    """What one or several images, and the beginning of the questions, have been turned into.

    Attributes:
        keys: of each layer, (R, P, K, D); R = 1, or a row for each continuation.
        values: likewise.
        token_ids: the P prefilled ids, the same for every row.
        next_position: rotary position of the first token that follows.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    token_ids: tuple[int, ...]
    next_position: int

    @property
    def rows(self) -> int:
        """1, or the number of continuations."""
        return len(self.keys[0])

    @property
    def bytes(self) -> int:
        """Memory of keys and values."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    def select(self, rows: slice | torch.Tensor) -> Prefix:
        """The prefix of some continuations; itself where it is shared."""
        if self.rows == 1:
            return self
        keys, values = (tuple(x[rows] for x in kv) for kv in (self.keys, self.values))
        return Prefix(keys, values, self.token_ids, self.next_position)


class Continuations:
    """Keys and values of what follows the prefix, (B, S, K, D) in each layer; grows when it must."""

    def __init__(self, decoder: Decoder, rows: int, capacity: int) -> None:
        shape = (rows, capacity, decoder.groups, decoder.head_size)
        # Zeros, since what is masked is multiplied by nought all the same, and that must not be a NaN.
        self.keys = [decoder.new_zeros(shape) for _ in decoder.layers]
        self.values = [decoder.new_zeros(shape) for _ in decoder.layers]

    @property
    def rows(self) -> int:
        """Continuations that there is room for."""
        return len(self.keys[0])

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        # What grows last counts, since memory may run out on the way.
        return self.values[-1].shape[1]

    @property
    def bytes(self) -> int:
        """Memory of keys and values."""
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))

    def reserve(self, capacity: int) -> None:
        """Makes room for at least so many tokens a row."""
        if capacity > self.capacity:
            wanted = max(capacity, self.capacity + self.capacity // 2)
            for kept in (self.keys, self.values):
                for layer, x in enumerate(kept):
                    kept[layer] = F.pad(x, (0, 0, 0, 0, 0, wanted - x.shape[1]))


@dataclass(frozen=True)
class Places:
    """Where new tokens of continuations go, and what they see.

    Attributes:
        slots: (B, T) where their keys are stored.
        turned: (B, T) their rotary positions, counted from the end of the prefix.
        seen: (B, T, S) bool, the stored keys that each of them sees, itself included.
    """

    slots: torch.Tensor
    turned: torch.Tensor
    seen: torch.Tensor

    @classmethod
    def following(cls, held: Sequence[int], length: int, device: torch.device) -> Places:
        """`length` new tokens after the tokens that each row holds."""
        slots = torch.tensor(held, device=device)[:, None] + torch.arange(length, device=device)
        seen = torch.arange(max(held) + length, device=device) <= slots[..., None]
        return cls(slots, slots, seen)
