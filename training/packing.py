"""Images with their questions and answers to rows of token ids: what the language model reads in training.

An image is followed by all the questions about it, in one sequence:

    system, image, beginning of the questions | rest of question 1, answer 1 | rest of question 2, answer 2 | ...
    segment 0 (the shared prefix)               segment 1                      segment 2

A token sees the prefix and its own pair, causally, and pairs are placed as if each of them followed the prefix at once.
So a pair sees exactly what it will see when it is asked alone, and the image is encoded once for all of them.
Several sequences make a row, rows make a batch.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from depthlm_ros.engines.processor import ImageInputs
from depthlm_ros.errors import ConfigError, unknown_choice
from depthlm_training.asking import Asked
from depthlm_training.dialogues import DialogueProcessor

IGNORED = -100  # cross entropy's own default
PADDING = -1  # `sequence` of a token that pads a row
SUPERVISE = ("answers", "published")
_PIXELS = "pixel_values"


@dataclass(frozen=True)
class Packed:
    """Images and the questions about them with their answers, as one sequence of L tokens.

    Attributes:
        ids: (L,) int64.
        labels: (L,) int64, the ids themselves where they are supervised, `IGNORED` elsewhere.
        positions: (3, L) int64 M-RoPE positions, or (L,) where positions have one axis.
        segment: (L,) int64, 0 in the prefix, i in pair i.
        images: one for each image.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    segment: torch.Tensor
    images: tuple[ImageInputs, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def pairs(self) -> int:
        """Questions in it."""
        return int(self.segment.max())

    @property
    def seen(self) -> int:
        """Places that all tokens see together: the prefix, and of their own pair what stands before them."""
        prefix, *own = torch.bincount(self.segment).tolist()
        return prefix * (prefix + 1) // 2 + sum(length * prefix + length * (length + 1) // 2 for length in own)

    def some(self, first: int, last: int) -> Packed:
        """The prefix with the pairs from `first` to `last`, both included, counted from 1."""
        kept = (self.segment == 0) | ((self.segment >= first) & (self.segment <= last))
        segment = self.segment[kept]
        return Packed(
            self.ids[kept],
            self.labels[kept],
            self.positions[..., kept],
            torch.where(segment == 0, 0, segment - first + 1),
            self.images,
        )


@dataclass
class Batch:
    """R rows of L tokens, each holding whole sequences one after another.

    Attributes:
        ids: (R, L) int64.
        labels: (R, L) int64, `IGNORED` where unsupervised.
        positions: (3, R, L) or (R, L) int64.
        sequence: (R, L) int64, which sequence of its row a token belongs to, `PADDING` for none.
        segment: (R, L) int64 as in `Packed`.
        images: keyword arguments of the model, the images in the order of their placeholders.
        grids_hw: (h, w) image tokens of each image.
        pairs: questions with answers.
        seen: places that all tokens see together, in one layer.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    sequence: torch.Tensor
    segment: torch.Tensor
    images: dict[str, torch.Tensor]
    grids_hw: tuple[tuple[int, int], ...]
    pairs: int
    seen: int

    @property
    def units(self) -> int:
        """Supervised tokens."""
        return int((self.labels != IGNORED).sum())

    @property
    def image_count(self) -> int:
        """Images, those that are there twice counted twice."""
        return len(self.grids_hw)

    @property
    def tokens(self) -> int:
        """Tokens that aren't padding."""
        return int((self.sequence != PADDING).sum())

    @property
    def waste(self) -> float:
        """Share of the rows that is padding."""
        return 1 - self.tokens / self.ids.numel()

    def mask(self) -> torch.Tensor:
        """(R, 1, L, L) bool: which tokens (last axis) a token sees."""
        return visible(self.sequence, self.segment)

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        images = {name: tensor.to(device, non_blocking=True) for name, tensor in self.images.items()}
        return replace(self, **moved, images=images)


def pack(processor: DialogueProcessor, asked: Asked, supervise: str = "answers") -> Packed:
    """Makes one sequence of an image (or several) and the questions about it.

    Args:
        processor: of the checkpoint that is trained.
        asked: images as the processor takes them, questions and answers.
        supervise: "answers", the tokens of the answers and of their ends; or "published", what DepthLM's collator
            leaves: all but padding and image tokens, with an empty assistant's header at the end, one pair a sequence.

    Raises:
        ConfigError: an unknown `supervise`, or several pairs with "published".
        ImageError: an image that can't be prepared.
        EngineError: a question that holds an image's placeholder.
    """
    if supervise not in SUPERVISE:
        raise ConfigError(unknown_choice("supervise", supervise, SUPERVISE))
    images = tuple(processor.images([image]) for image in asked.images)
    grids = [image.grid_hw for image in images]
    if supervise == "published":
        return _published(processor, asked, images)
    prompts = processor.prompts([question for question, _ in asked.pairs], *grids)
    answers = processor.answers([answer for _, answer in asked.pairs])
    # What says the first token of an answer must belong to its pair, even where two questions are the same.
    shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    prefix = prompts[0][:shared]
    positions, start = rotary_positions(prefix, processor.image_token_id, grids, processor.mrope)
    ids, labels, segment, places = list(prefix), [IGNORED] * shared, [0] * shared, []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        own = prompt[shared:] + answer
        ids += own
        labels += [IGNORED] * (len(prompt) - shared) + answer
        segment += [number] * len(own)
        places += range(start, start + len(own))
    after = torch.tensor(places)
    return Packed(
        torch.tensor(ids),
        torch.tensor(labels),
        torch.cat([positions, after.expand(*positions.shape[:-1], -1)], dim=-1),
        torch.tensor(segment),
        images,
    )


def _published(processor: DialogueProcessor, asked: Asked, images: tuple[ImageInputs, ...]) -> Packed:
    if len(asked.pairs) != 1:
        raise ConfigError(f"supervise is 'published' with {len(asked.pairs)} points an image; DepthLM asks about 1")
    grids = [image.grid_hw for image in images]
    ids = torch.tensor(processor.published_dialogue(*asked.pairs[0], *grids))
    labels = ids.clone()
    labels[(ids == processor.image_token_id) | (ids == processor.tokenizer.pad_token_id)] = IGNORED
    # Nothing stands before it that could say it.
    labels[0] = IGNORED
    positions, _ = rotary_positions(ids.tolist(), processor.image_token_id, grids, processor.mrope)
    segment = torch.zeros_like(ids)
    segment[torch.nonzero(ids == processor.image_token_id)[-1] + 1 :] = 1
    return Packed(ids, labels, positions, segment, images)


def rotary_positions(
    ids: Sequence[int], image_token_id: int, grids_hw: Sequence[tuple[int, int]], mrope: bool
) -> tuple[torch.Tensor, int]:
    """Positions of a sequence as at inference, and the position of what follows it.

    In M-RoPE text counts on in all three axes (time, row, column), an image's tokens stay at one time and count rows
    and columns, and what follows goes on after the larger side (Qwen2-VL, arXiv 2409.12191, section 2.1).

    Args:
        ids: with one placeholder for each image token.
        image_token_id: the placeholder.
        grids_hw: (h, w) image tokens of each image.
        mrope: False for one axis, on which every token counts.

    Returns:
        (3, L) int64, or (L,) without `mrope`; and the next position.
    """
    if not mrope:
        return torch.arange(len(ids)), len(ids)
    parts, start, at = [], 0, 0
    for height, width in grids_hw:
        begin = ids.index(image_token_id, at)
        parts.append((start + torch.arange(begin - at)).expand(3, -1))
        start += begin - at
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        parts.append(start + torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1))
        start, at = start + max(height, width), begin + height * width
    parts.append((start + torch.arange(len(ids) - at)).expand(3, -1))
    return torch.cat(parts, dim=1), start + len(ids) - at


def visible(sequence: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """(R, 1, L, L) bool: a token sees the prefix and the segment that it belongs to, up to itself.

    Args:
        sequence: (R, L) which sequence a token belongs to; padding sees padding, so that no token sees nothing.
        segment: (R, L) which pair of it, 0 for the prefix.
    """
    length = sequence.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=sequence.device).tril()
    seen = seen & (sequence[:, :, None] == sequence[:, None, :])
    return (seen & ((segment[:, None, :] == 0) | (segment[:, :, None] == segment[:, None, :])))[:, None]


def collate(packed: Sequence[Packed], tokens_per_row: int) -> Batch:
    """Lays sequences into rows of at most `tokens_per_row` tokens.

    As few rows as do, about equally full, so that little is padded; one row is not padded at all. A sequence that is
    longer than a row is split between its pairs, each part with the images once more.

    Args:
        packed: in any order.
        tokens_per_row: bounds the memory of a step.

    Raises:
        ConfigError: a single pair with its image is longer than a row.
    """
    parts = [part for whole in packed for part in split(whole, tokens_per_row)]
    rows = filled_rows([len(part) for part in parts], tokens_per_row)
    length = max(sum(len(parts[i]) for i in row) for row in rows)

    def laid(values: Sequence[Sequence[torch.Tensor]], fill: int) -> torch.Tensor:
        joined = [torch.cat(list(row), dim=-1) for row in values]
        padded = [nn.functional.pad(row, (0, length - row.shape[-1]), value=fill) for row in joined]
        return torch.stack(padded, dim=-2)

    in_rows = [[parts[i] for i in row] for row in rows]
    numbers = [[torch.full((len(part),), n) for n, part in enumerate(row)] for row in in_rows]
    images = [image for row in in_rows for part in row for image in part.images]
    return Batch(
        ids=laid([[part.ids for part in row] for row in in_rows], 0),
        labels=laid([[part.labels for part in row] for row in in_rows], IGNORED),
        positions=laid([[part.positions for part in row] for row in in_rows], 0),
        sequence=laid(numbers, PADDING),
        segment=laid([[part.segment for part in row] for row in in_rows], 0),
        images=joined_images(images),
        grids_hw=tuple(image.grid_hw for image in images),
        pairs=sum(part.pairs for part in parts),
        seen=sum(part.seen for part in parts),
    )


def split(packed: Packed, tokens: int) -> list[Packed]:
    """Parts of at most so many tokens, each with the prefix and at least one pair.

    Raises:
        ConfigError: the prefix with one pair is longer.
    """
    if len(packed) <= tokens:
        return [packed]
    lengths = torch.bincount(packed.segment).tolist()
    prefix, pairs = lengths[0], lengths[1:]
    if prefix + max(pairs) > tokens:
        raise ConfigError(
            f"an image with one question has {prefix + max(pairs)} tokens and tokens_per_row is {tokens}; raise it, or "
            "show smaller images"
        )
    parts, first, held = [], 1, prefix
    for number, length in enumerate(pairs, 1):
        if held + length > tokens:
            parts.append(packed.some(first, number - 1))
            first, held = number, prefix
        held += length
    return [*parts, packed.some(first, len(pairs))]


def filled_rows(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which sequences go into which row: longest first into the emptiest row, with one more row until all fit."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for count in range(-(-sum(lengths) // most), len(lengths) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        held = [0] * count
        for i in order:
            emptiest = held.index(min(held))
            rows[emptiest].append(i)
            held[emptiest] += lengths[i]
        if max(held) <= most:
            break
    return [sorted(row) for row in rows]


def joined_images(images: Sequence[ImageInputs]) -> dict[str, torch.Tensor]:
    """One set of keyword arguments for all images; Pixtral's are padded to one size, which its tower cuts off again."""
    joined = {
        name: torch.cat([image.tensors[name] for image in images]) for name in images[0].tensors if name != _PIXELS
    }
    pixels = [image.tensors[_PIXELS] for image in images]
    if pixels[0].ndim == 4:
        height, width = (max(p.shape[axis] for p in pixels) for axis in (2, 3))
        pixels = [nn.functional.pad(p, (0, width - p.shape[3], 0, height - p.shape[2])) for p in pixels]
    return joined | {_PIXELS: torch.cat(pixels)}
