"""The dense head: one depth a pixel from the language model's last states at the image's tokens.

The MLP variant of DepthVLM (arXiv 2605.15876): LayerNorm, Linear, GELU, Linear to one value for each
pixel of a token's square, Softplus. Key names are the published ones, so its checkpoints load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from depthlm_ros.errors import ModelError

if TYPE_CHECKING:
    from depthlm_ros.engines.checkpoint import Checkpoint

OUTPUTS = ("softplus", "exp")
FEATURE_MODES = ("llm_last", "concat", "sum")
DEFAULT_HIDDEN = 1024  # DepthVLM's depth_head_mlp_hidden


class MLPDepthHead(nn.Module):
    """Features of image tokens to metres, a square of `patch_px` pixels for each token.

    Args:
        in_features: width of a token's features.
        hidden: width between the two layers.
        patch_px: side of a token's square in pixels (vision patch times spatial merge).
        output: "softplus" as published, or "exp": metres = exp(x), for heads that learn log-depth.
    """

    def __init__(self, in_features: int, hidden: int, patch_px: int, output: str = "softplus") -> None:
        super().__init__()
        if output not in OUTPUTS:
            raise ModelError(f"depth_head_output {output!r} is unknown; choose {' or '.join(OUTPUTS)}")
        self.patch_px = patch_px
        self.output = output
        self.norm = nn.LayerNorm(in_features)
        self.mlp = nn.Sequential(nn.Linear(in_features, hidden), nn.GELU(), nn.Linear(hidden, patch_px * patch_px))

    def forward(self, features: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        """One image.

        Args:
            features: (N, C), row-major over the grid of tokens.
            grid_hw: (h, w) tokens, h * w = N.

        Returns:
            (patch_px * h, patch_px * w) metres.
        """
        return self.forward_batch(features[None], grid_hw)[0]

    def forward_batch(self, features: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        """Images of one size: (B, N, C) to (B, patch_px * h, patch_px * w) metres."""
        raw = self.raw_batch(features, grid_hw)
        return raw.exp() if self.output == "exp" else nn.functional.softplus(raw)

    def raw_batch(self, features: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        """The map before its output function; for "exp" this is log-depth, which a loss can use."""
        h, w = grid_hw
        p = self.patch_px
        values = self.mlp(self.norm(features)).reshape(-1, h, w, p, p)
        return values.permute(0, 1, 3, 2, 4).reshape(-1, h * p, w * p)


def head_features(mode: str, deepstack: Sequence[torch.Tensor], last: torch.Tensor) -> torch.Tensor:
    """Joins the maps in the published order [deepstack..., last state of the language model].

    Args:
        mode: "llm_last", "concat" or "sum".
        deepstack: (..., C) each; empty for architectures without DeepStack.
        last: (..., C) after the final norm.
    """
    if mode == "llm_last":
        return last
    maps = [*deepstack, last]
    return torch.cat(maps, dim=-1) if mode == "concat" else torch.stack(maps).sum(dim=0)


def unsupported_head(checkpoint: Checkpoint) -> str | None:
    """Says why the checkpoint's head can't be run, or None if it can.

    A checkpoint that doesn't name its head is told by its weights: only the DPT variant has `scratch`.
    """
    by_weights = "dpt" if "depth_head.scratch.layer1_rn.weight" in checkpoint.shapes else "mlp"
    kind = checkpoint.config.get("depth_head_type", by_weights)
    if kind == "mlp":
        return None
    return f"{checkpoint.name}: depth_head_type {kind!r} can't be run yet, only 'mlp' can; use a text dialect of it"


def load_head(checkpoint: Checkpoint, in_features: int, deepstack_maps: int, patch_px: int) -> tuple[MLPDepthHead, str]:
    """Builds the head that the checkpoint holds, in float32.

    Args:
        checkpoint: one with `depth_head.*` weights.
        in_features: hidden size of the language model.
        deepstack_maps: number of DeepStack maps, which "concat" appends.
        patch_px: side of a token's square in pixels.

    Returns:
        The head and its feature mode.

    Raises:
        ModelError: the DPT variant, an unknown key value, or weights of another shape.
    """
    problem = unsupported_head(checkpoint)
    if problem:
        raise ModelError(problem)
    config = checkpoint.config
    mode = config.get("depth_head_feature_mode", "llm_last")
    if mode not in FEATURE_MODES:
        raise ModelError(
            f"{checkpoint.name}: depth_head_feature_mode {mode!r} is unknown; known are {', '.join(FEATURE_MODES)}"
        )
    width = in_features * (deepstack_maps + 1 if mode == "concat" else 1)
    hidden = config.get("depth_head_mlp_hidden", DEFAULT_HIDDEN)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        head = MLPDepthHead(width, hidden, patch_px, config.get("depth_head_output", "softplus"))
    _load_weights(head, checkpoint.tensors("depth_head."), checkpoint.name)
    return head.float().eval(), mode


def _load_weights(head: MLPDepthHead, weights: Mapping[str, torch.Tensor], name: str) -> None:
    expected = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    seen = {key: tuple(value.shape) for key, value in weights.items()}
    for key in sorted(expected | seen):
        if expected.get(key) != seen.get(key):
            raise ModelError(
                f"{name}: depth_head.{key} has shape {seen.get(key)}, config.json asks for {expected.get(key)}; "
                "check depth_head_mlp_hidden and depth_head_feature_mode"
            )
    head.load_state_dict(weights, assign=True)
