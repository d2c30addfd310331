"""DepthVLM's default dense head: a DPT decoder over four maps of the image's tokens.

Three maps come from the vision tower (DeepStack), the last from the language model. Each gets its own scale, and
from the coarsest on they are fused and doubled (Ranftl et al. 2021, arXiv 2103.13413; DepthVLM, arXiv 2605.15876).
Key names and order of operations are the published ones, so its checkpoints load and give its numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

# DepthVLM's figures; they aren't in its config.json, so a checkpoint's own shapes go before them.
WIDTHS = (256, 512, 1024, 1024)
FEATURES = 256
LAST_FEATURES = 32
MAPS = len(WIDTHS)


class DPTDepthHead(nn.Module):
    """Four maps of image tokens to metres.

    Args:
        in_features: width of a token's features, the same in all maps.
        widths: channels of each map once it is projected.
        features: channels of the decoder.
        last_features: channels before the last layer.
        patch_px: side of a token's square in pixels (vision patch times spatial merge).
    """

    def __init__(
        self,
        in_features: int,
        patch_px: int,
        widths: Sequence[int] = WIDTHS,
        features: int = FEATURES,
        last_features: int = LAST_FEATURES,
    ) -> None:
        super().__init__()
        self.patch_px = patch_px
        self.norm = nn.LayerNorm(in_features)
        self.projects = nn.ModuleList(nn.Conv2d(in_features, width, 1) for width in widths)
        steps = (8, 4, 2)
        self.resize_layers = nn.ModuleList(
            nn.ConvTranspose2d(width, width, step, stride=step) for width, step in zip(widths, steps, strict=False)
        )
        self.resize_layers.append(nn.Identity())
        self.scratch = _Decoder(widths, features, last_features)

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, Sequence[int]], in_features: int, patch_px: int) -> DPTDepthHead:
        """The head whose channels are those of stored weights; DepthVLM's where a weight is missing.

        Args:
            shapes: by name, without the `depth_head.` in front.
            in_features: width of a token's features.
            patch_px: side of a token's square in pixels.
        """

        def channels(name: str, default: int) -> int:
            return shapes[name][0] if name in shapes else default

        return cls(
            in_features,
            patch_px,
            [channels(f"projects.{i}.weight", width) for i, width in enumerate(WIDTHS)],
            channels("scratch.layer1_rn.weight", FEATURES),
            channels("scratch.output_conv2.0.weight", LAST_FEATURES),
        )

    def forward(self, maps: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        """One image.

        Args:
            maps: (4, N, C), row-major over the grid of tokens: the DeepStack maps, then the last states.
            grid_hw: (h, w) tokens, h * w = N.

        Returns:
            (patch_px * h, patch_px * w) metres.
        """
        return self.forward_batch(maps[None], grid_hw)[0]

    def forward_batch(self, maps: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        """Images of one size: (B, 4, N, C) to (B, patch_px * h, patch_px * w) metres."""
        h, w = grid_hw
        scales = []
        with _whole_float32():
            for features, project, resize in zip(maps.unbind(1), self.projects, self.resize_layers, strict=True):
                plane = self.norm(features).transpose(1, 2).unflatten(2, (h, w))
                scales.append(resize(project(plane)))
            raw = self.scratch(scales, (self.patch_px * h, self.patch_px * w))
        return functional.softplus(raw[:, 0])


class _Decoder(nn.Module):
    """Fuses the four scales from the coarsest to the finest."""

    def __init__(self, widths: Sequence[int], features: int, last_features: int) -> None:
        super().__init__()
        for level, width in enumerate(widths, 1):
            self.add_module(f"layer{level}_rn", nn.Conv2d(width, features, 3, padding=1, bias=False))
            self.add_module(f"refinenet{level}", _Fusion(features, skip=level < len(widths)))
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, last_features, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(last_features, 1, 1),
        )

    def forward(self, scales: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """Planes (B, C_i, 8h, 8w), (.., 4h, 4w), (.., 2h, 2w), (.., h, w) to (B, 1, *size) before the last function."""
        reduce = (self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn)
        one, two, three, four = (reduce_one(plane) for reduce_one, plane in zip(reduce, scales, strict=True))
        path = self.refinenet4(four, None, three.shape[2:])
        path = self.refinenet3(path, three, two.shape[2:])
        path = self.refinenet2(path, two, one.shape[2:])
        path = self.refinenet1(path, one, tuple(2 * side for side in one.shape[2:]))
        return self.output_conv2(_resample(self.output_conv1(path), size))


class _Fusion(nn.Module):
    """Adds what a finer scale knows, then resamples to the next one."""

    def __init__(self, features: int, skip: bool) -> None:
        super().__init__()
        if skip:
            self.resConfUnit1 = _Residual(features)
        self.resConfUnit2 = _Residual(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, path: torch.Tensor, skip: torch.Tensor | None, size: Sequence[int]) -> torch.Tensor:
        if skip is not None:
            path = path + self.resConfUnit1(skip)
        return self.out_conv(_resample(self.resConfUnit2(path), size))


class _Residual(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Not `x + ...`: the published code rectifies in place, so what it adds back is rectified too, and the
        # published weights have learnt that.
        x = functional.relu(x)
        return x + self.conv2(functional.relu(self.conv1(x)))


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Convolutions with all 24 bits: on a GPU torch's default is TF32, which keeps 11 of them."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    ):
        yield


def _resample(plane: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return functional.interpolate(plane, size=tuple(size), mode="bilinear", align_corners=True)
