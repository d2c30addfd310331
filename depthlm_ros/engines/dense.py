"""The dense dialect's pass: image tokens to metres, with no question, no language head and nothing decoded.

The language model computes in the model's format, the dense head in float32. On a GPU both are one CUDA graph for each
image size.
"""

from __future__ import annotations

import torch

from depthlm_ros.engines.decoder import Decoder
from depthlm_ros.engines.dense_head import MLPDepthHead, head_features
from depthlm_ros.engines.dpt_head import DPTDepthHead
from depthlm_ros.engines.graphs import Graphed, Recorder
from depthlm_ros.engines.images import Composed


class DensePass:
    """Chat header and image tokens to a depth for each pixel.

    Args:
        decoder: the language model.
        head: in float32, on the decoder's device.
        mode: what the head reads, see `head_features`.
        record: what records the pass; None for CUDA graphs on a GPU and nothing elsewhere.
    """

    def __init__(
        self, decoder: Decoder, head: MLPDepthHead | DPTDepthHead, mode: str, record: Recorder | None = None
    ) -> None:
        self._decoder = decoder
        self._head = head
        self._mode = mode
        self._graphs = Graphed(self._pass, record=record)

    @property
    def reason(self) -> str | None:
        """Why there are no CUDA graphs although there is a GPU, or None."""
        return self._graphs.reason

    def __call__(self, frame: Composed, grid_hw: tuple[int, int]) -> torch.Tensor:
        """(H', W') float32 metres; H', W' = the processor's final size.

        Args:
            frame: one image, without what follows it.
            grid_hw: (h, w) image tokens.
        """
        return self._graphs(grid_hw, frame.embeds, frame.positions, frame.image_places, *frame.deepstack)[0]

    def _pass(
        self,
        grid_hw: tuple[int, int],
        embeds: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        *deepstack: torch.Tensor,
    ) -> tuple[torch.Tensor]:
        _, hidden = self._decoder.prefill(embeds, positions, (), deepstack, places, hidden=True)
        features = head_features(self._mode, deepstack, hidden[:, places])
        return (self._head(features[0].float(), grid_hw),)
