"""Parts of a model by name: which of them are trained, and LoRA beside those that aren't.

| part | Qwen2.5-VL, Qwen3-VL | Pixtral |
|---|---|---|
| vision | the tower without its mergers | the tower |
| merger | the merger, and DeepStack's | the projector |
| embeddings | token embeddings | the same |
| language | the language model's layers and last norm | the same |
| lm_head | scores over the vocabulary; the embeddings themselves where they are tied | the same |
| depth_head | the dense head | - |

Wherever a part can be named, so can weights, by a pattern such as "model.language_model.layers.1?.*".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers import PreTrainedModel

from depthlm_ros.errors import ConfigError, MissingDependencyError, unknown_choice
from depthlm_training.throughput import FROZEN, FROZEN_FIRST, TRAINED

# The first pattern that fits says whose a weight is.
_PATTERNS = (
    ("merger", ("*visual.merger.*", "*visual.deepstack_merger_list.*", "*multi_modal_projector.*")),
    ("vision", ("*visual.*", "*vision_tower.*")),
    ("embeddings", ("*embed_tokens.*",)),
    ("language", ("*language_model.*",)),
    ("lm_head", ("*lm_head.*",)),
    ("depth_head", ("*depth_head.*",)),
)
PARTS = tuple(part for part, _ in _PATTERNS)
# How peft names what it wraps and what it adds.
_WRAPPED, _ADDED, _ADAPTER = ".base_layer", ".lora_", "default"


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (LoRA, arXiv 2106.09685).

    Attributes:
        rank: of each adapter; 0 for none.
        alpha: the adapters' product counts alpha / rank.
        dropout: of what goes into an adapter.
        parts: whose linear layers get one, parts or patterns.
        seed: of the adapters' first values.
    """

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    parts: tuple[str, ...] = ("language",)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 0 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"lora has rank {self.rank}, alpha {self.alpha:g} and dropout {self.dropout:g}; give a rank of at "
                "least 0, an alpha above 0 and a share below 1"
            )


def part_of(name: str) -> str | None:
    """The part that a weight of this name belongs to."""
    return next((part for part, patterns in _PATTERNS if any(fnmatchcase(f".{name}", p) for p in patterns)), None)


def train_only(model: nn.Module, wanted: Sequence[str]) -> None:
    """Sets `requires_grad` of these parts or patterns, and of nothing else.

    Raises:
        ConfigError: a name that fits no weight of this model.
    """
    named = list(_named_weights(model))
    chosen = _chosen([name for name, _ in named], wanted)
    model.requires_grad_(False)
    for name, weight in named:
        # A tied weight has two names; either will do.
        if name in chosen:
            weight.requires_grad_(True)


def recompute_layers(model: PreTrainedModel) -> None:
    """Keeps no activations of the layers; the backward pass computes them again (gradient checkpointing)."""
    # transformers 5.23 has another name for it, and warns of the old one.
    new = "activation_checkpointing_enable"
    enable = getattr(model, new) if hasattr(model, new) else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def add_lora(model: nn.Module, lora: Lora) -> None:
    """Adds adapters, which are trained, to linear layers, which no longer are; everything else stays as it is.

    Raises:
        ConfigError: no linear layer fits.
        MissingDependencyError: peft isn't installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingDependencyError("LoRA needs peft; run: pip install peft") from error
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    chosen = _chosen([f"{name}.weight" for name in linear], lora.parts)
    targets = [name for name in linear if f"{name}.weight" in chosen]
    trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none"
    )
    with torch.random.fork_rng():
        torch.manual_seed(lora.seed)
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    for name, weight in model.named_parameters():
        weight.requires_grad_(_ADDED in name or (_WRAPPED not in name and id(weight) in trained))


def merged_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the names they had before `add_lora`, adapters added in; copies where there were any."""
    state = model.state_dict()
    adapted = {name.partition(_ADDED)[0] for name in state if _ADDED in name}
    merged = {}
    for name, weight in state.items():
        if _ADDED in name:
            continue
        module, wrapped, which = name.partition(_WRAPPED)
        if module in adapted and which == ".weight":
            weight = weight + model.get_submodule(module).get_delta_weight(_ADAPTER).to(weight.dtype)
        merged[module + which] = weight
    return merged


def passes(model: nn.Module) -> tuple[int, int]:
    """Passes over the vision tower and over the language model that a step needs (`throughput.training_flop`)."""
    trained = {part_of(name) for name, weight in _named_weights(model) if weight.requires_grad and _ADDED not in name}
    adapted = {part_of(name) for name, _ in _named_weights(model) if _ADDED in name}
    vision = TRAINED if "vision" in trained else FROZEN if "vision" in adapted else FROZEN_FIRST
    if "language" in trained:
        return vision, TRAINED
    return vision, FROZEN if (trained | adapted) - {"lm_head", "depth_head"} else FROZEN_FIRST


def _named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, weight in model.named_parameters(remove_duplicate=False):
        yield name.replace(_WRAPPED, ""), weight


def _chosen(names: Sequence[str], wanted: Sequence[str]) -> set[str]:
    chosen: set[str] = set()
    for want in wanted:
        if want in PARTS:
            fits = {name for name in names if part_of(name) == want}
        else:
            fits = {name for name in names if fnmatchcase(name, want)}
        if not fits:
            present = [part for part in PARTS if any(part_of(name) == part for name in names)]
            raise ConfigError(f"{unknown_choice('part', want, present)}; or a pattern of weights' names")
        chosen |= fits
    return chosen
