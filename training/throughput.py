"""How fast a training runs, and how much of the device's arithmetic that is.

Model-FLOP utilisation counts what the model needs, by the same counts as the floor of an answer
(`depthlm_ros.bench.floor`), against the rate of a large matrix product measured on the same device; padding and what
gradient checkpointing computes twice count as nothing. A dense head, which computes in float32, counts like the rest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from depthlm_ros.bench.ceilings import Ceilings
from depthlm_ros.bench.floor import Product, text_products, vision_part

# Passes over a part of the model: forward, the gradient of what went in, the gradient of the weights.
FROZEN_FIRST, FROZEN, TRAINED = 1, 2, 3
# Side of the product that is timed; larger ones are hardly faster.
_SIDE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Work:
    """What the model has to compute for a micro-batch.

    Attributes:
        grids: (rows, columns) of image tokens of each image.
        tokens: through the language model, padding left out.
        pairs: query-key pairs that the mask leaves, of one layer.
        words: places where the language head chooses among all words.
    """

    grids: Sequence[tuple[int, int]]
    tokens: int
    pairs: int
    words: int


def training_flop(config: Mapping[str, Any], work: Work, vision: int, language: int) -> int:
    """Multiplications and additions of a forward and backward pass.

    Args:
        config: config.json of the model.
        work: of the micro-batch.
        vision: passes over the vision tower: FROZEN_FIRST where it is frozen, since no gradient has to go through it,
            TRAINED where it is trained.
        language: passes over the language model: TRAINED; FROZEN for adapters in a frozen one; FROZEN_FIRST where only
            a head behind it is trained.
    """
    text = config["text_config"]
    size = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    seen = sum(vision_part(config, grid).flop for grid in work.grids)
    read = sum(product.flop for product in text_products(config, work.tokens))
    read += 4 * work.pairs * text["num_attention_heads"] * size * text["num_hidden_layers"]
    read += 2 * work.words * text["hidden_size"] * text["vocab_size"]
    return vision * seen + language * read


def peak_flop(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a large matrix product, measured."""
    side = _SIDE[device.type]
    return Ceilings(device, dtype).product_rate(Product("peak", side, side, side, 1))


@dataclass
class Meter:
    """Counts what was done and how long it took; the same sums on every process, added up when they are read.

    Attributes:
        seconds: of the steps.
        waiting: of these, for the loader.
        tokens: without padding.
        slots: with padding.
        images: encoded.
        flop: needed.
    """

    seconds: float = 0.0
    waiting: float = 0.0
    tokens: float = 0.0
    slots: float = 0.0
    images: float = 0.0
    flop: float = 0.0

    def add(self, tokens: int, images: int, waste: float, flop: int) -> None:
        """Counts a micro-batch of which `waste` is padding."""
        self.tokens += tokens
        self.slots += tokens / (1 - waste)
        self.images += images
        self.flop += flop

    @staticmethod
    def rates(totals: Sequence[float], size: int, peak: float) -> dict[str, float]:
        """What is shown.

        Args:
            totals: `counts` of all processes, added up.
            size: how many processes.
            peak: FLOP a second of one of them; 0 leaves utilisation out.
        """
        seconds, waiting, tokens, slots, images, flop = totals
        seconds = seconds / size or float("nan")
        shown = {"seconds": seconds, "images/s": images / seconds, "waiting": waiting / size / seconds}
        if tokens:
            shown |= {"tokens/s": tokens / seconds, "padding": 1 - tokens / slots}
        if flop and peak:
            shown["mfu"] = flop / seconds / size / peak
        return shown

    def counts(self) -> list[float]:
        """What is added up over processes before `rates`."""
        return [self.seconds, self.waiting, self.tokens, self.slots, self.images, self.flop]


class Stopwatch:
    """Seconds since the last look."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        since, self._since = self._since, time.perf_counter()
        return self._since - since
