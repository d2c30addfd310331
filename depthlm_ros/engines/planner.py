"""How many questions go through the model at once.

Two sizes matter: how many continuations keep their keys at the same time (a group, bounded by
memory), and how many of them go through the layers together (a pass, bounded by memory on a GPU and
by the processor's caches on a CPU). Both are found once and remembered; when memory runs out all the
same, the pass is halved and the work goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")

# Tokens a pass on a CPU: the activations of one layer then stay in the second-level caches (measured on Zen 4:
# 1,300 tokens of a 256-wide model run at 190 GFLOP/s, 5,000 at 90).
CPU_PASS_BYTES = 30 << 20
# ... but a wide model's weights should not be read again for every few tokens.
CPU_PASS_TOKENS = 512
# Share of the free memory that a group may take; the rest is for what others allocate meanwhile.
MEMORY_SHARE = 0.6
# More rows bring nothing: the matrix products are long since wide enough.
LARGEST_GROUP = 1024
LARGEST_CPU_GROUP = 256
# Of torch's own allocator for CPUs, and of cuBLAS, cuDNN and cuSOLVER.
_NO_MEMORY = ("DefaultCPUAllocator", "STATUS_ALLOC_FAILED")


@dataclass
class Planner:
    """Remembers what fits.

    Args:
        device: where the model runs.
        token_bytes: keys and values of one token, all layers.
        activation_bytes: what one token needs while it goes through a layer.
        score_bytes: what the scores over the vocabulary of one token need.
        largest: never more questions in a group than this.
    """

    device: torch.device
    token_bytes: int
    activation_bytes: int
    score_bytes: int
    largest: int = LARGEST_GROUP
    _pass_tokens: dict[int, int] = field(default_factory=dict)
    _group_tokens: int = sys.maxsize

    def group(self, tokens: int) -> int:
        """How many continuations of so many tokens may keep their keys at the same time."""
        room = MEMORY_SHARE * free_bytes(self.device) / 2
        most = LARGEST_CPU_GROUP if self.device.type == "cpu" else LARGEST_GROUP
        fits = min(int(room / max(1, tokens * self.token_bytes)), self._group_tokens // tokens)
        return max(1, min(self.largest, most, fits))

    def rows(self, tokens: int, read: int) -> int:
        """How many continuations go through the layers together.

        Args:
            tokens: new tokens of each.
            read: how many of them are scored over the vocabulary.
        """
        key = _bucket(tokens)
        if key not in self._pass_tokens:
            if self.device.type == "cpu":
                room = CPU_PASS_BYTES
            else:
                room = MEMORY_SHARE * free_bytes(self.device) / 2
            each = self.activation_bytes + (0 if self.device.type == "cpu" else read * self.score_bytes / tokens)
            least = CPU_PASS_TOKENS if self.device.type == "cpu" else 1
            self._pass_tokens[key] = max(tokens, least, int(room / each))
        return max(1, self._pass_tokens[key] // tokens)

    def halve(self, tokens: int, tried: int) -> bool:
        """Makes passes half as large as one that didn't fit.

        Args:
            tokens: what `rows` was asked with.
            tried: continuations in that pass.

        Returns:
            False when one continuation is all there was.
        """
        if tried > 1:
            self._pass_tokens[_bucket(tokens)] = tried // 2 * tokens
        return tried > 1

    def halve_group(self, tokens: int, tried: int) -> bool:
        """`halve` for continuations that keep their keys at the same time; `tokens` as `group` was asked."""
        if tried > 1:
            self._group_tokens = tried // 2 * tokens
        return tried > 1


def attempt(work: Callable[[], T], halve: Callable[[], bool]) -> T | None:
    """Runs `work`; None when memory ran out and less is worth another try.

    Args:
        work: gives something that isn't None.
        halve: makes the next try smaller; False where it can't be.

    Raises:
        RuntimeError: that of `work`, where memory didn't run out or not even the smallest try fits.
    """
    try:
        return work()
    except RuntimeError as error:
        if not out_of_memory(error) or not halve():
            raise
    # Not before here: the error holds on to what was allocated.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; CPUs, and libraries on a GPU, raise a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on the device, what torch holds in reserve included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _bucket(tokens: int) -> int:
    """Lengths that differ little share what was found out about them."""
    return 1 << (tokens - 1).bit_length()
