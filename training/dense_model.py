"""A vision-language model with a dense head, as it is trained: the engine's dense pass, with gradients.

The engine reads the head off chat header and image tokens alone, since nothing that follows an image can change its
states. So does training: no question, no language head, and images of several sizes are rows of one causal pass, padded
behind their last token, where nothing looks.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from depthlm_ros.engines.checkpoint import Checkpoint
from depthlm_ros.engines.dense_head import (
    DEFAULT_HIDDEN,
    EACH,
    FEATURE_MODES,
    HEADS,
    MLPDepthHead,
    head_features,
    load_head,
)
from depthlm_ros.engines.devices import choose_placement
from depthlm_ros.engines.dpt_head import MAPS, DPTDepthHead
from depthlm_ros.engines.loading import load_model
from depthlm_ros.errors import ConfigError, ModelError, unknown_choice
from depthlm_training.packed_attention import attend_packed
from depthlm_training.packing import Batch
from depthlm_training.sft import answer_loss


@dataclass(frozen=True)
class HeadSettings:
    """The head that a checkpoint without one gets; one that has a head keeps it.

    Attributes:
        kind: "dpt", DepthVLM's default, or "mlp".
        output: "softplus" as published, or "exp" for the MLP head.
        feature_mode: what the MLP head reads: "llm_last", "concat" or "sum".
        hidden: width of the MLP head.
        start_m: what it predicts before it has learnt anything; 0 leaves that to chance, as published.
        seed: of its weights.
    """

    kind: str = "dpt"
    output: str = "softplus"
    feature_mode: str = "llm_last"
    hidden: int = DEFAULT_HIDDEN
    start_m: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in HEADS:
            raise ConfigError(unknown_choice("head", self.kind, HEADS))
        if self.feature_mode not in FEATURE_MODES:
            raise ConfigError(unknown_choice("feature_mode", self.feature_mode, FEATURE_MODES))
        if self.kind == "dpt" and self.output != "softplus":
            raise ConfigError(f"output {self.output!r} of a DPT head, whose output is softplus; choose the MLP head")
        if not 0 <= self.start_m < math.inf:
            raise ConfigError(f"start_m is {self.start_m}; give metres, or 0 to leave it to chance")


@dataclass
class Images:
    """Chat headers and images as rows of one pass.

    Attributes:
        ids: (B, P) int64; what pads a row follows its image.
        positions: (3, B, P) or (B, P) int64.
        is_image: (B, P) bool.
        pixels: keyword arguments of the model's `get_image_features`.
        grids_hw: (h, w) image tokens of each.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    is_image: torch.Tensor
    pixels: dict[str, torch.Tensor]
    grids_hw: tuple[tuple[int, int], ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row without padding; an image's last token is the last that its row has."""
        return [int(row.nonzero()[-1]) + 1 for row in self.is_image]

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        pixels = {name: value.to(device, non_blocking=True) for name, value in self.pixels.items()}
        ids, positions, is_image = (
            value.to(device, non_blocking=True) for value in (self.ids, self.positions, self.is_image)
        )
        return Images(ids, positions, is_image, pixels, self.grids_hw)


class DenseModel(nn.Module):
    """The stock model and its dense head.

    Args:
        vlm: the stock model.
        head: reads its states.
        mode: what the head reads, see `head_features`.
    """

    def __init__(self, vlm: PreTrainedModel, head: MLPDepthHead | DPTDepthHead, mode: str) -> None:
        super().__init__()
        self.vlm = vlm
        self.depth_head = head
        self.mode = mode

    def forward(
        self, images: Images | None = None, talk: Batch | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Both in one call, so that whatever wraps the model sees one forward a micro-batch.

        Args:
            images: whose depth is asked for.
            talk: questions with their answers, about whatever images.

        Returns:
            A map (H', W') float32 in metres for each image, H', W' = the processor's final size; and the summed cross
            entropy of the supervised tokens, None without `talk`.
        """
        maps = [] if images is None else self.maps(*self.states(images), images)
        return maps, None if talk is None else answer_loss(self.vlm, talk)

    def states(self, images: Images) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The language model's last states (B, P, C) after its norm, and the DeepStack maps (sum of N_b, C)."""
        core = self.vlm.model
        seen = core.get_image_features(**images.pixels)
        # One tensor for all images or one for each, as the version of transformers has it.
        tokens = torch.cat(list(seen.pooler_output))
        maps = seen.deepstack_features if self.vlm.config.model_type == "qwen3_vl" else []
        deepstack = [m if isinstance(m, torch.Tensor) else torch.cat(m) for m in maps]
        embeds = self.vlm.get_input_embeddings()(images.ids)
        embeds = embeds.masked_scatter(images.is_image[..., None], tokens.to(embeds.dtype))
        options = {"visual_pos_masks": images.is_image, "deepstack_visual_embeds": deepstack} if deepstack else {}
        out = core.language_model(
            inputs_embeds=embeds, position_ids=images.positions, use_cache=False, attention_mask=None, **options
        )
        return out.last_hidden_state, deepstack

    def maps(self, hidden: torch.Tensor, deepstack: list[torch.Tensor], images: Images) -> list[torch.Tensor]:
        """What the head makes of the states, in float32 whatever the format of the products elsewhere."""
        # But where its weights are gathered from other processes in the products' format.
        dtype = self.depth_head.norm.weight.dtype
        counts = [h * w for h, w in images.grids_hw]
        last = hidden[images.is_image].split(counts)
        layers = [m.split(counts) for m in deepstack]
        maps = []
        with torch.autocast(hidden.device.type, enabled=False):
            for i, grid_hw in enumerate(images.grids_hw):
                features = head_features(self.mode, [layer[i] for layer in layers], last[i])
                maps.append(self.depth_head(features.to(dtype), grid_hw).float())
        return maps


class HeadWork:
    """Multiplications and additions of a head's forward pass, as torch counts them on a copy that holds no numbers.

    Args:
        head: before anything wraps it or shards it.
    """

    def __init__(self, head: MLPDepthHead | DPTDepthHead) -> None:
        self._head = copy.deepcopy(head).to("meta")
        self._known: dict[tuple[int, int], int] = {}

    def __call__(self, grid_hw: tuple[int, int]) -> int:
        """Of an image of (h, w) tokens."""
        if grid_hw not in self._known:
            shape = (math.prod(grid_hw), *self._head.norm.weight.shape)
            if isinstance(self._head, DPTDepthHead):
                shape = MAPS, *shape
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                self._head(torch.empty(shape, device="meta"), grid_hw)
            self._known[grid_hw] = counter.get_total_flops()
        return self._known[grid_hw]


def load_dense(checkpoint: Checkpoint, patch_px: int, settings: HeadSettings) -> DenseModel:
    """Loads a checkpoint in float32 on the CPU, with its own head or a new one.

    Args:
        checkpoint: with or without a head.
        patch_px: side of an image token's square in pixels.
        settings: of a new head.

    Raises:
        ModelError: weights that don't fit, or an architecture that the head can't read.
    """
    vlm = load_model(checkpoint, choose_placement("cpu", "float32"))
    attend_packed(vlm)
    width = vlm.config.get_text_config().hidden_size
    maps = len(checkpoint.config["vision_config"].get("deepstack_visual_indexes", ()))
    if checkpoint.has_dense_head:
        return DenseModel(vlm, *load_head(checkpoint, width, maps, patch_px))
    head, mode = new_head(settings, width, maps, patch_px)
    return DenseModel(vlm, head, mode)


def new_head(
    settings: HeadSettings, width: int, deepstack_maps: int, patch_px: int
) -> tuple[MLPDepthHead | DPTDepthHead, str]:
    """An untrained head and its feature mode.

    Args:
        settings: which.
        width: hidden size of the language model.
        deepstack_maps: maps of the vision tower.
        patch_px: side of an image token's square in pixels.

    Raises:
        ModelError: a DPT head for a model without the maps that it reads.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.kind == "dpt":
            if deepstack_maps + 1 != MAPS:
                raise ModelError(
                    f"a DPT head reads {MAPS - 1} DeepStack maps and this model has {deepstack_maps}; choose kind: mlp"
                )
            head: MLPDepthHead | DPTDepthHead = DPTDepthHead(width, patch_px)
            mode, last = EACH, head.scratch.output_conv2[2]
        else:
            mode = settings.feature_mode
            features = width * (deepstack_maps + 1 if mode == "concat" else 1)
            head = MLPDepthHead(features, settings.hidden, patch_px, settings.output)
            last = head.mlp[2]
    if settings.start_m:
        inverse = math.log(settings.start_m) if settings.output == "exp" else math.log(math.expm1(settings.start_m))
        nn.init.constant_(last.bias, inverse)
    return head, mode


def head_config(head: MLPDepthHead | DPTDepthHead, mode: str) -> dict[str, str | int | None]:
    """The keys of config.json that `load_head` reads; DepthVLM's own, and `depth_head_output`."""
    if isinstance(head, DPTDepthHead):
        return {"depth_head_type": "dpt", "depth_head_mlp_hidden": None, "depth_head_feature_mode": None}
    return {
        "depth_head_type": "mlp",
        "depth_head_mlp_hidden": head.mlp[0].out_features,
        "depth_head_feature_mode": mode,
        "depth_head_output": head.output,
    }
