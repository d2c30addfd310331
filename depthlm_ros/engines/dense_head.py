"""Dense heads: a depth for each pixel from what the model makes of the image's tokens.

DepthVLM (arXiv 2605.15876) has two. The DPT head is in `dpt_head.py`. The MLP head is here: LayerNorm, Linear,
GELU, Linear to one value for each pixel of a token's square, Softplus. Key names are the published ones, so
its checkpoints load. Both compute in float32, whatever the format of the model (the original: the model's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from depthlm_ros.engines.dpt_head import MAPS, DPTDepthHead
from depthlm_ros.errors import ModelError

if TYPE_CHECKING:
    from depthlm_ros.engines.checkpoint import Checkpoint

OUTPUTS = ("softplus", "exp")
HEADS = ("dpt", "mlp")
FEATURE_MODES = ("llm_last", "concat", "sum")
EACH = "each"  # the feature mode of a DPT head, which isn't named in config.json
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
        mode: "llm_last", "concat" (..., N, 4 C), "sum", or "each" (..., 4, N, C) for the DPT head.
        deepstack: (..., N, C) each; empty for architectures without DeepStack.
        last: (..., N, C) after the final norm.
    """
    if mode == "llm_last":
        return last
    maps = [*deepstack, last]
    if mode == EACH:
        return torch.stack(maps, dim=-3)
    return torch.cat(maps, dim=-1) if mode == "concat" else torch.stack(maps).sum(dim=0)


def head_kind(checkpoint: Checkpoint) -> str:
    """The `depth_head_type` of a checkpoint with a head.

    One that doesn't name it is told by its weights: only the DPT variant has `scratch`.
    """
    by_weights = "dpt" if any(name.startswith("depth_head.scratch.") for name in checkpoint.shapes) else "mlp"
    return checkpoint.config.get("depth_head_type") or by_weights


def unsupported_head(checkpoint: Checkpoint) -> str | None:
    """Says why the checkpoint's head can't be run, or None if it can."""
    kind = head_kind(checkpoint)
    if kind in HEADS:
        return None
    return f"{checkpoint.name}: depth_head_type {kind!r} is unknown; known are {', '.join(HEADS)}"


def load_head(
    checkpoint: Checkpoint, in_features: int, deepstack_maps: int, patch_px: int
) -> tuple[MLPDepthHead | DPTDepthHead, str]:
    """Builds the head that the checkpoint holds, in float32.

    Args:
        checkpoint: one with `depth_head.*` weights.
        in_features: hidden size of the language model.
        deepstack_maps: number of DeepStack maps, which "concat" and the DPT head read too.
        patch_px: side of a token's square in pixels.

    Returns:
        The head and its feature mode.

    Raises:
        ModelError: an unknown head or key value, or weights of another shape.
    """
    problem = unsupported_head(checkpoint)
    if problem:
        raise ModelError(problem)
    weights = checkpoint.tensors("depth_head.")
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        if head_kind(checkpoint) == "dpt":
            head, mode = _dpt_head(checkpoint, weights, in_features, deepstack_maps, patch_px), EACH
        else:
            head, mode = _mlp_head(checkpoint, in_features, deepstack_maps, patch_px)
    _load_weights(head, weights, checkpoint.name)
    return head.float().eval(), mode


def _dpt_head(
    checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor], in_features: int, deepstack_maps: int, patch_px: int
) -> DPTDepthHead:
    if deepstack_maps + 1 != MAPS:
        raise ModelError(
            f"{checkpoint.name}: a DPT head reads {MAPS - 1} DeepStack maps and the last states, but "
            f"deepstack_visual_indexes of config.json name {deepstack_maps}; one of the two is of another model"
        )
    return DPTDepthHead.of_shapes({key: tuple(value.shape) for key, value in weights.items()}, in_features, patch_px)


def _mlp_head(
    checkpoint: Checkpoint, in_features: int, deepstack_maps: int, patch_px: int
) -> tuple[MLPDepthHead, str]:
    config = checkpoint.config
    # Checkpoints with a head of the other kind carry these keys with null.
    mode = config.get("depth_head_feature_mode") or FEATURE_MODES[0]
    if mode not in FEATURE_MODES:
        raise ModelError(
            f"{checkpoint.name}: depth_head_feature_mode {mode!r} is unknown; known are {', '.join(FEATURE_MODES)}"
        )
    width = in_features * (deepstack_maps + 1 if mode == "concat" else 1)
    hidden = config.get("depth_head_mlp_hidden") or DEFAULT_HIDDEN
    return MLPDepthHead(width, hidden, patch_px, config.get("depth_head_output") or OUTPUTS[0]), mode


def _load_weights(head: nn.Module, weights: Mapping[str, torch.Tensor], name: str) -> None:
    expected = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    seen = {key: tuple(value.shape) for key, value in weights.items()}
    for key in sorted(expected | seen):
        if expected.get(key) != seen.get(key):
            raise ModelError(
                f"{name}: depth_head.{key} has shape {seen.get(key)}, config.json asks for {expected.get(key)}; check "
                "the depth_head_* keys of config.json, or fetch the weights again"
            )
    head.load_state_dict(weights, assign=True)
