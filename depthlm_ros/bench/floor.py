"""The floor: operations and bytes that a frame needs, however cleverly it is computed.

A frame is the vision tower's pass over the image, a prefix (chat header, image tokens, the question up to the pixel)
whose keys and values are stored once, for each point the rest of the question against that prefix, and for each point
the answer's tokens. A multiplication and an addition are two operations (FLOP). The language head counts only where a
word is chosen: once for each word of an answer. Attention counts the pairs that the mask leaves. Bytes are the weights,
once for each pass that can't be avoided (image, prefix, suffixes, and each token of the number), and the stored keys
and values. Norms, activations and rotations are left out; they are less than a hundredth.

For Qwen3-VL-4B, whose language model has 3.63 billion weights in its layers (7.27 GFLOP a token) and 0.39 billion in
its head, at 1,000 points. Published: VLM3's question, of which 17 tokens around the image are shared and 74 follow from
the pixel on, and its answer of 31 words, 4 of them the number. Compact: 12 tokens from the pixel on, 5 for the answer.

    image      image tokens  vision tower  prefix      shared      a point, published  a point, compact
    640x480    300           0.936 TFLOP   2.33 TFLOP  3.27 TFLOP  0.803 TFLOP         0.123 TFLOP
    1000x750   713           2.69 TFLOP    5.46 TFLOP  8.15 TFLOP  0.828 TFLOP         0.127 TFLOP
    1024x1024  1024          4.36 TFLOP    7.88 TFLOP  12.2 TFLOP  0.847 TFLOP         0.13 TFLOP

The stored prefix takes 147 kB a token. Published loops do the shared part again for every point, which at 640x480 is
four times what a point needs; a GPU that does 700 TFLOP a second can't answer 1,000 published questions in less than
1.15 s, and 1,000 compact ones in less than 0.18 s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Product:
    """`count` times a matrix product (m, k) x (k, n), with weights of k x n."""

    name: str
    m: int
    k: int
    n: int
    count: int

    @property
    def flop(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.k * self.n * self.count

    @property
    def weights(self) -> int:
        """Weights that are read."""
        return self.k * self.n * self.count


@dataclass(frozen=True)
class Attention:
    """`count` times attention of queries to keys: scores, and the values' average.

    Attributes:
        name: where.
        queries: how many look.
        keys: how many each may look at, at most.
        pairs: query-key pairs that the mask leaves.
        heads: query heads.
        groups: key heads.
        size: channels of a head.
        count: how often (layers).
    """

    name: str
    queries: int
    keys: int
    pairs: int
    heads: int
    groups: int
    size: int
    count: int

    @property
    def flop(self) -> int:
        """Of the pairs that the mask leaves."""
        return 4 * self.pairs * self.heads * self.size * self.count


@dataclass(frozen=True)
class Part:
    """One stage of a frame.

    Attributes:
        name: vision, prefix, suffix or answer.
        products: its matrix products.
        attention: its attention.
        elements: weights, keys and values that have to be moved, each as often as a pass needs it.
    """

    name: str
    products: tuple[Product, ...]
    attention: tuple[Attention, ...]
    elements: int

    @property
    def matmul_flop(self) -> int:
        """Operations of the products."""
        return sum(product.flop for product in self.products)

    @property
    def attention_flop(self) -> int:
        """Operations of attention."""
        return sum(attention.flop for attention in self.attention)

    @property
    def flop(self) -> int:
        """All operations."""
        return self.matmul_flop + self.attention_flop


@dataclass(frozen=True)
class Counts:
    """Tokens of a frame.

    Attributes:
        grid_hw: image tokens along each side.
        prefix: tokens that all points share, the image's included.
        points: points asked about.
        suffix: further tokens of each question.
        answer: tokens of each answer, its end included; 0 where none is said.
        number: of these, the tokens of the number, which are found one after another.
        images: images that are encoded, each with a prefix of its own: one, or one for each point.
    """

    grid_hw: tuple[int, int]
    prefix: int
    points: int
    suffix: int
    answer: int
    number: int
    images: int = 1


def frame_parts(config: Mapping[str, Any], counts: Counts) -> tuple[Part, ...]:
    """What one frame needs.

    Args:
        config: config.json of the model.
        counts: tokens of the frame.
    """
    parts = [vision_part(config, counts.grid_hw, counts.images), prefix_part(config, counts.prefix, counts.images)]
    if counts.answer:
        parts += [_suffix_part(config, counts), _answer_part(config, counts)]
    return tuple(parts)


def vision_part(config: Mapping[str, Any], grid_hw: tuple[int, int], images: int = 1) -> Part:
    """The vision tower's pass over images of one size."""
    vision = config["vision_config"]
    tokens = grid_hw[0] * grid_hw[1]
    if config["model_type"] == "llava":
        products, attention = _pixtral_tower(vision, config["text_config"], tokens)
    else:
        products, attention = _qwen_tower(config["model_type"], vision, grid_hw)
    products = [replace(product, m=product.m * images) for product in products]
    attention = [replace(a, queries=a.queries * images, pairs=a.pairs * images) for a in attention]
    return Part("vision", tuple(products), tuple(attention), sum(product.weights for product in products))


def _qwen_tower(kind: str, vision: Mapping[str, Any], grid_hw: tuple[int, int]) -> tuple[list, list]:
    merge = vision.get("spatial_merge_size", 2) ** 2
    tokens = grid_hw[0] * grid_hw[1]
    patches, width, inner, depth = tokens * merge, vision["hidden_size"], vision["intermediate_size"], vision["depth"]
    heads = vision["num_heads"]
    pixels = vision.get("in_channels", 3) * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    gated = 2 if kind == "qwen2_5_vl" else 1
    maps = 1 + len(vision.get("deepstack_visual_indexes") or ())
    products = [
        Product("patches", patches, pixels, width, 1),
        Product("qkv", patches, width, 3 * width, depth),
        Product("out", patches, width, width, depth),
        Product("up", patches, width, gated * inner, depth),
        Product("down", patches, inner, width, depth),
        Product("merge", tokens, merge * width, merge * width, maps),
        Product("to text", tokens, merge * width, vision["out_hidden_size"], maps),
    ]
    full = len(vision["fullatt_block_indexes"]) if kind == "qwen2_5_vl" else depth
    size = width // heads
    attention = [Attention("whole image", patches, patches, patches * patches, heads, heads, size, full)]
    if full < depth:
        side = vision["window_size"] // vision["patch_size"] // vision.get("spatial_merge_size", 2)
        areas = [
            merge * min(side, grid_hw[0] - y) * min(side, grid_hw[1] - x)
            for y in range(0, grid_hw[0], side)
            for x in range(0, grid_hw[1], side)
        ]
        pairs = sum(area * area for area in areas)
        attention.append(Attention("windows", patches, max(areas), pairs, heads, heads, size, depth - full))
    return products, attention


def _pixtral_tower(vision: Mapping[str, Any], text: Mapping[str, Any], tokens: int) -> tuple[list, list]:
    width, inner, depth = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
    heads = vision["num_attention_heads"]
    products = [
        Product("patches", tokens, 3 * vision["patch_size"] ** 2, width, 1),
        Product("qkv", tokens, width, 3 * width, depth),
        Product("out", tokens, width, width, depth),
        Product("up", tokens, width, 2 * inner, depth),
        Product("down", tokens, inner, width, depth),
        Product("project", tokens, width, text["hidden_size"], 1),
        Product("to text", tokens, text["hidden_size"], text["hidden_size"], 1),
    ]
    return products, [Attention("whole image", tokens, tokens, tokens**2, heads, heads, width // heads, depth)]


def text_products(config: Mapping[str, Any], rows: int, passes: int = 1) -> tuple[Product, ...]:
    """The language model's layers for `rows` tokens at a time, `passes` times, without its head."""
    text = config["text_config"]
    width, inner, layers = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    heads, groups, size = _heads(text)
    count = layers * passes
    return (
        Product("qkv", rows, width, (heads + 2 * groups) * size, count),
        Product("out", rows, heads * size, width, count),
        Product("gate and up", rows, width, 2 * inner, count),
        Product("down", rows, inner, width, count),
    )


def _heads(text: Mapping[str, Any]) -> tuple[int, int, int]:
    heads = text["num_attention_heads"]
    return heads, text["num_key_value_heads"], text.get("head_dim") or text["hidden_size"] // heads


def _attention(config: Mapping[str, Any], name: str, queries: int, keys: int, pairs: int) -> Attention:
    heads, groups, size = _heads(config["text_config"])
    return Attention(name, queries, keys, pairs, heads, groups, size, config["text_config"]["num_hidden_layers"])


def _kept(config: Mapping[str, Any], tokens: int) -> int:
    """Keys and values of tokens, in all layers."""
    _, groups, size = _heads(config["text_config"])
    return 2 * groups * size * tokens * config["text_config"]["num_hidden_layers"]


def prefix_part(config: Mapping[str, Any], tokens: int, images: int = 1) -> Part:
    """The language model's pass over what all points share, once for each image."""
    products = text_products(config, tokens * images)
    attention = _attention(config, "causal", tokens * images, tokens, images * tokens * (tokens + 1) // 2)
    return Part("prefix", products, (attention,), sum(p.weights for p in products) + _kept(config, tokens * images))


def _suffix_part(config: Mapping[str, Any], counts: Counts) -> Part:
    n, s = counts.points, counts.suffix
    products = text_products(config, n * s)
    attention = (
        _attention(config, "to the prefix", n * s, counts.prefix, n * s * counts.prefix),
        _attention(config, "to themselves", n * s, s, n * s * (s + 1) // 2),
    )
    elements = sum(p.weights for p in products) + _kept(config, counts.images * counts.prefix + n * s)
    return Part("suffix", products, attention, elements)


def _answer_part(config: Mapping[str, Any], counts: Counts) -> Part:
    text = config["text_config"]
    n, said = counts.points, counts.answer - 1  # the end is chosen, but nothing follows it
    digits = min(counts.number, said)
    drafts = said - digits
    products = text_products(config, n, digits)
    if drafts:
        products += text_products(config, n * drafts)
    products += (Product("head", n * counts.answer, text["hidden_size"], text["vocab_size"], 1),)
    own = n * sum(counts.suffix + at + 1 for at in range(said))
    attention = (
        _attention(config, "to the prefix", n * said, counts.prefix, n * said * counts.prefix),
        _attention(config, "to themselves", n * said, counts.suffix + said, own),
    )
    # Drafts ride along with other passes; each token of the number needs one of its own.
    weights = digits * sum(p.weights for p in text_products(config, n))
    head = (1 + digits) * text["hidden_size"] * text["vocab_size"]
    read = digits * _kept(config, counts.images * counts.prefix + n * (counts.suffix + said))
    return Part("answer", products, attention, weights + head + read)


def describe(parts: tuple[Part, ...], points: int) -> list[str]:
    """A line for each part and one for each point, in TFLOP or GFLOP."""
    lines = [
        f"{part.name}: {amount(part.flop)} (matmul {amount(part.matmul_flop)}, attention {amount(part.attention_flop)})"
        for part in parts
    ]
    shared = sum(part.flop for part in parts[:2])
    rest = sum(part.flop for part in parts[2:])
    each = f"; each point {amount(rest / points)}" if rest else ""
    return [*lines, f"shared by all points {amount(shared)}{each}"]


def amount(flop: float) -> str:
    """Operations for people: 0.761 TFLOP."""
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flop >= 0.1 * size:
            return f"{flop / size:.3g} {unit}"
    return f"{flop / 1e6:.3g} MFLOP"
