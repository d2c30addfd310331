"""What the device does at best, measured: matrix products at the model's own shapes, attention's products, and copies.

On a CPU there are two ways to multiply, torch's own and oneDNN's with weights packed once; the faster one counts.
A device's advertised rate says little about a product of 18,000 x 256 by 256 x 1,280. So each product of the floor is
timed alone, with nothing around it, at its own sizes; the floor's time is their sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from depthlm_ros.bench.floor import Attention, Part, Product

LARGEST = 1 << 28  # elements of a timed product's largest matrix; rates hardly change beyond
COPY_BYTES = 1 << 28
MIN_SECONDS = 0.1


@dataclass(frozen=True)
class PartFloor:
    """The least time of a part of a frame.

    Attributes:
        name: of the part.
        flop: its operations.
        products_s: its matrix products at their measured rates.
        attention_s: its attention's products at their measured rates.
        memory_s: its weights, keys and values at the measured bandwidth.
    """

    name: str
    flop: int
    products_s: float
    attention_s: float
    memory_s: float

    @property
    def seconds(self) -> float:
        """What can't be undercut: arithmetic or memory, whichever is slower."""
        return max(self.products_s + self.attention_s, self.memory_s)


class Ceilings:
    """Measures rates once each.

    Args:
        device: where.
        dtype: number format of the weights.
        seconds: least time that a measurement takes.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, seconds: float = MIN_SECONDS) -> None:
        self.device = device
        self.dtype = dtype
        self.rates: dict[str, float] = {}
        self._seconds = seconds
        self._bandwidth = 0.0

    def floor(self, part: Part) -> PartFloor:
        """The least time of a part."""
        products = sum(product.flop / self.product_rate(product) for product in part.products)
        attention = sum(attention.flop / self.attention_rate(attention) for attention in part.attention)
        memory = part.elements * self.dtype.itemsize / self.bandwidth()
        return PartFloor(part.name, part.flop, products, attention, memory)

    def product_rate(self, product: Product) -> float:
        """FLOP a second of `x @ w.T`, with x of (m, k) and w of (n, k), the best way there is."""
        m = max(1, min(product.m, LARGEST // max(product.k, product.n)))
        name = f"{m} x {product.k} x {product.n}"
        if name not in self.rates:
            x, w = self._matrix(m, product.k), self._matrix(product.n, product.k)
            seconds = min(self._time(run) for run in self._products(x, w))
            self.rates[name] = 2 * m * product.k * product.n / seconds
        return self.rates[name]

    def attention_rate(self, attention: Attention) -> float:
        """FLOP a second of the two products of attention, as batched products over the key heads."""
        a = attention
        rows = max(1, min(a.queries * a.heads // a.groups, LARGEST // (a.groups * max(a.keys, a.size))))
        if a.pairs < a.queries * a.keys:  # many short sequences, or a causal one: products of their size
            rows = min(rows, a.keys * a.heads // a.groups)
        batch = max(
            1, min(a.groups * a.queries * a.heads // (a.groups * rows), LARGEST // (rows * max(a.keys, a.size)))
        )
        name = f"attention {batch} x {rows} x {a.size} x {a.keys}"
        if name not in self.rates:
            query, key = self._matrix(batch, rows, a.size), self._matrix(batch, a.keys, a.size)
            seconds = self._time(lambda: torch.bmm(torch.bmm(query, key.transpose(1, 2)), key))
            self.rates[name] = 4 * batch * rows * a.size * a.keys / seconds
        return self.rates[name]

    def bandwidth(self) -> float:
        """Bytes a second that a copy reads and writes together."""
        if not self._bandwidth:
            source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            self._bandwidth = 2 * COPY_BYTES / self._time(lambda: target.copy_(source))
        return self._bandwidth

    def _products(self, x: torch.Tensor, w: torch.Tensor) -> list[Callable[[], object]]:
        """The ways to multiply here; the faster one is the ceiling."""
        ways: list[Callable[[], object]] = [lambda: functional.linear(x, w)]
        packs = x.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()
        if x.device.type == "cpu" and packs:
            packed = torch.ops.mkldnn._reorder_linear_weight(w)
            ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
        return ways

    def _matrix(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype) / 8

    def _time(self, run: Callable[[], object]) -> float:
        """The median of at least three runs that together take the least time, after one that isn't counted."""
        run()
        self._wait()
        taken: list[float] = []
        while len(taken) < 3 or (sum(taken) < self._seconds and len(taken) < 200):
            start = time.perf_counter()
            run()
            self._wait()
            taken.append(time.perf_counter() - start)
        return sorted(taken)[len(taken) // 2]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
