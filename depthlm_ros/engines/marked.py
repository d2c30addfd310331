"""Images that are one image with a few pixels changed each, such as an arrow at the point asked for.

Where the processor doesn't resample, only the patches under the changed pixels differ: the image is prepared and
embedded once, and of each marked image only those patches. What the tower's first layers make of the rest is shared
too (`SharedStart`). Where it does resample, each image is drawn and prepared as a whole, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from depthlm_ros.engines.processor import ImageInputs, PromptProcessor
from depthlm_ros.engines.vision_blocks import attention
from depthlm_ros.engines.vision_readers import Architecture, Grid
from depthlm_ros.errors import ImageError
from depthlm_ros.markers import paste

Block = tuple[int, int, np.ndarray]

# A softmax is corrected for its changed keys while what remains of it is this large a share; rounding grows with its
# inverse, so rows beyond are computed anew.
LEAST_SHARE = 1 / 16
MOST_SHARE = 1e4
# Beyond this share of changed patches there is nothing to gain.
FEW = 1 / 8


@dataclass(frozen=True)
class MarkedInputs:
    """Images that differ from a base in some patches, prepared.

    Attributes:
        base: the image without marks.
        rows: (B, P) places of each image's changed patches in the order of the processor; where an image has fewer
            than P, its first one again.
        patches: (B, P, values of a patch).
    """

    base: ImageInputs
    rows: torch.Tensor
    patches: torch.Tensor

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.rows)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """(h, w) image tokens of each image."""
        return self.base.grid_hw

    def to(self, device: torch.device, dtype: torch.dtype) -> MarkedInputs:
        """Rows and patches on a device."""
        return replace(
            self,
            rows=self.rows.to(device, non_blocking=True),
            patches=self.patches.to(device, dtype, non_blocking=True),
        )

    def written_out(self) -> ImageInputs:
        """The same images as the processor prepares them when they are drawn."""
        tensors = {name: value.repeat(self.count, *[1] * (value.ndim - 1)) for name, value in self.base.tensors.items()}
        pixels = tensors["pixel_values"]
        image = torch.arange(self.count)[:, None]
        if pixels.ndim == 2:
            pixels.view(self.count, -1, pixels.shape[1])[image, self.rows] = self.patches
        else:
            side = round((self.patches.shape[-1] / 3) ** 0.5)
            places = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
            w = places.shape[2]
            places[image, self.rows // w, self.rows % w] = self.patches.unflatten(-1, (3, side, side))
        return ImageInputs(tensors, self.grid_hw, self.count)


class MarkedImages:
    """One image and what is pasted into it, one paste for each marked image.

    Args:
        processor: of the checkpoint.
        image: (H, W, 3) uint8 RGB.
        blocks: (top, left, pixels) of each marked image, pixels (h, w, 3) uint8; all of it inside of the image.

    Attributes:
        shared: whether the processor leaves the image's size alone, so that changed patches are all there is to do.

    Raises:
        ImageError: a block that isn't uint8 RGB or reaches beyond the image.
    """

    def __init__(self, processor: PromptProcessor, image: np.ndarray, blocks: Sequence[Block]) -> None:
        self._processor = processor
        self._image = image
        self._blocks = list(blocks)
        for top, left, block in self._blocks:
            inside = block.ndim == 3 and 0 <= top <= image.shape[0] - len(block)
            if not inside or not 0 <= left <= image.shape[1] - block.shape[1] or not block.size:
                raise ImageError(
                    f"a block of shape {block.shape} at row {top}, column {left} isn't inside of the image of shape "
                    f"{image.shape}"
                )
        self.shared = processor.keeps(*image.shape[:2])
        self._base = processor.images([image]) if self.shared else None

    def __len__(self) -> int:
        return len(self._blocks)

    def part(self, start: int, stop: int) -> MarkedInputs | ImageInputs:
        """Marked images `start` to `stop`, prepared: shared with their base, or each as a whole."""
        blocks = self._blocks[start:stop]
        if self._base is None:
            return self._processor.images([paste(self._image, block) for block in blocks])
        side = self._processor.vision_patch_px
        squares, rows = [], []
        for top, left, block in blocks:
            down, across = top // side, left // side
            bottom, right = -(-(top + len(block)) // side), -(-(left + block.shape[1]) // side)
            region = self._image[down * side : bottom * side, across * side : right * side].copy()
            region[top - down * side :, left - across * side :][: len(block), : block.shape[1]] = block
            cut = region.reshape(bottom - down, side, right - across, side, 3).swapaxes(1, 2)
            squares.append(cut.reshape(-1, side, side, 3))
            places = [(row, column) for row in range(down, bottom) for column in range(across, right)]
            rows.append([self._processor.patch_row(*place, self._image.shape[1]) for place in places])
        most = max(map(len, rows))
        filled = [list(range(len(own))) + [0] * (most - len(own)) for own in rows]
        stacked = np.concatenate([square[fill] for square, fill in zip(squares, filled, strict=True)])
        return MarkedInputs(
            self._base,
            torch.tensor([[own[at] for at in fill] for own, fill in zip(rows, filled, strict=True)]),
            self._processor.patch_values(stacked).unflatten(0, (len(blocks), most)),
        )


class SharedStart:
    """What a tower makes of a base image as far as marked images have it in common.

    Layers that see a window only: windows without a mark are the base's. A first layer that sees the whole image:
    queries, keys and values of unchanged patches are the base's, and what they attend to is the base's, corrected for
    the few keys that changed (on a CPU, where it pays: a fifth of such a layer is left, and towers there are shallow).

    Args:
        tower: weights.
        base: the image without marks.
        grid: of its size.
        embed: `VisionTower.embed`.
    """

    def __init__(self, tower: Architecture, base: ImageInputs, grid: Grid, embed: Callable) -> None:
        self.base = base
        self.grid = grid
        self._tower = tower
        self._x = embed(base.tensors, grid)[0]
        self._at = None if grid.order is None else grid.order.argsort()
        self._windowed = next((n for n, layer in enumerate(tower.layers) if not layer.windowed), len(tower.layers))
        if not grid.windows:
            self._windowed = 0
        self._deep = self._x
        for layer in tower.layers[: self._windowed]:
            self._deep = layer(self._deep, 1, grid.turns, grid.windows)
        self._attended: torch.Tensor | None = None
        if self._windowed:
            self._members, self._there, self._window_of = _members(grid, self._x.device)
            self._uneven = len({some.length for some in grid.windows}) > 1
        elif self._x.device.type == "cpu" and self._x.dtype == torch.float32:
            layer = tower.layers[0]
            self._q, self._k, self._v = layer.project(layer.norm(self._x), 1, grid.turns)
            attended, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(x.transpose(1, 2) for x in (self._q, self._k, self._v))
            )
            self._attended, self._sums = attended[0], sums[0].float()

    def start(self, marked: MarkedInputs) -> tuple[torch.Tensor, int]:
        """The tokens of marked images after the layers that share something.

        Args:
            marked: on the tower's device.

        Returns:
            (B * N, C) tokens, and how many layers they have passed.
        """
        tokens = marked.rows if self._at is None else self._at[marked.rows]
        changed = self._tower.embed(marked.patches.flatten(0, 1)).unflatten(0, tokens.shape)
        if self.grid.position is not None:
            changed = changed + self.grid.position[tokens]
        if self._windowed:
            return self._changed_windows(tokens, changed), self._windowed
        x = _written(self._x, tokens, changed)
        if self._attended is None or tokens.shape[1] > FEW * self.grid.tokens:
            return x.flatten(0, 1), 0
        return self._first_layer(x, tokens, changed), 1

    def _changed_windows(self, tokens: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
        windows = _distinct(self._window_of[tokens])
        members = self._members[windows]
        batch, count, length = members.shape
        image = torch.arange(batch, device=tokens.device)[:, None, None]
        inside = _written(self._x, tokens, changed)[image, members].view(batch * count * length, -1)
        seen = self._there[windows].view(batch * count, 1, 1, length) if self._uneven else None
        turns = self.grid.turns.at(members.flatten(0, 1))
        for layer in self._tower.layers[: self._windowed]:
            inside = layer(inside, batch * count, turns, (), seen)
        deep = self._deep.expand(batch, -1, -1).clone(memory_format=torch.contiguous_format)
        # A token that comes several times, as a stand-in for those that a smaller window lacks, comes out the same.
        deep[image, members] = inside.view(batch, count, length, -1)
        return deep.flatten(0, 1)

    def _first_layer(self, x: torch.Tensor, tokens: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
        layer = self._tower.layers[0]
        batch, patches = tokens.shape
        turns = self.grid.turns.at(tokens.flatten())
        q, k, v = (
            part[0].unflatten(0, (batch, patches))
            for part in layer.project(layer.norm(changed.flatten(0, 1)), 1, turns)
        )
        heads, width = q.shape[2:]
        keys = torch.cat([self._k[0, tokens], k], dim=1)  # (B, 2 P, H, D): those that went, those that came
        values = torch.cat([self._v[0, tokens], v], dim=1)
        first = torch.ones_like(tokens, dtype=torch.bool)
        first[:, 1:] = tokens[:, 1:] != tokens[:, :1]
        sign = torch.cat([-first.float(), first.float()], dim=1)
        # (H, N, D) x (H, D, B * 2 P)
        scores = self._q[0].transpose(0, 1) @ keys.permute(2, 3, 0, 1).flatten(2)
        shares = (scores.mul_(width**-0.5) - self._sums[..., None]).exp_().unflatten(2, (batch, -1)).mul_(sign)
        left = 1 + shares.sum(-1)  # (H, N, B)
        moved = shares.permute(2, 0, 1, 3) @ values.transpose(1, 2)
        attended = torch.empty(batch, self.grid.tokens, heads, width, dtype=x.dtype)
        torch.div(moved.add_(self._attended), left.permute(2, 0, 1)[..., None], out=attended.transpose(1, 2))
        anew = ((left < LEAST_SHARE) | ~(left < MOST_SHARE)).any(0)  # (N, B)
        anew[tokens.T, torch.arange(batch)] = False
        for image in range(batch):
            places = anew[:, image].nonzero()[:, 0]
            own = tokens[image, None]
            key, value = _written(self._k[0], own, k[image, None]), _written(self._v[0], own, v[image, None])
            query = torch.cat([self._q[:, places], q[image, None]], dim=1)
            attended[image, torch.cat([places, own[0]])] = attention(query, key, value)[0]
        return layer.finish(x.flatten(0, 1), attended)


def _written(base: torch.Tensor, tokens: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """(B, N, ...): a copy of the base (N, ...) for each image, with its changed tokens (B, P, ...) in place."""
    out = base.expand(len(tokens), *base.shape).clone(memory_format=torch.contiguous_format)
    out[torch.arange(len(tokens), device=tokens.device)[:, None], tokens] = changed
    return out


def _members(grid: Grid, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (W, longest) of each window, which of them there are, and (N,) each token's window."""
    longest = max(some.length for some in grid.windows)
    members, there, number = [], [], []
    for some in grid.windows:
        own = some.start + torch.arange(some.count * some.length).view(some.count, -1)
        members.append(torch.cat([own, own[:, :1].expand(-1, longest - some.length)], dim=1))
        there.append((torch.arange(longest) < some.length).expand(some.count, -1))
        number.append(torch.full((some.count,), some.length))
    window_of = torch.arange(sum(map(len, members))).repeat_interleave(torch.cat(number))
    return torch.cat(members).to(device), torch.cat(there).to(device), window_of.to(device)


def _distinct(windows: torch.Tensor) -> torch.Tensor:
    """(B, most) windows of each image, its first one again where it has fewer; all of them on a GPU, not to wait."""
    if windows.is_cuda:
        return windows
    own = [list(dict.fromkeys(row)) for row in windows.tolist()]
    most = max(map(len, own))
    return torch.tensor([row + row[:1] * (most - len(row)) for row in own])
