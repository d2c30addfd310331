"""What is measured: a model built from a shape, or a checkpoint; one set of weights for all who are compared.

A shape becomes a folder with everything but the weights, which are drawn where they will be used. `Built.save` adds
them, and then any other program can load the folder too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from depthlm_ros.bench.shapes import Shape, model_config
from depthlm_ros.bench.taught import teach
from depthlm_ros.bench.vocabulary import PIXTRAL_TOKENS, build_tokenizer, write_files, write_json
from depthlm_ros.cards import CARD_FILE, load_card
from depthlm_ros.engines import load_engine
from depthlm_ros.engines.base import EngineInfo
from depthlm_ros.engines.checkpoint import Checkpoint, open_checkpoint
from depthlm_ros.engines.dense_head import MLPDepthHead
from depthlm_ros.engines.devices import choose_placement
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.processor import PromptProcessor
from depthlm_ros.engines.transformers_engine import TransformersEngine
from depthlm_ros.modelcard import ModelCard, read_card
from depthlm_ros.weights import folder_config

SHARD_BYTES = 4 * 10**9
DENSE_HIDDEN = 256


@dataclass(frozen=True)
class Subject:
    """One model, as everybody who is measured gets it.

    Attributes:
        name: of the shape or card.
        card: what it is asked and what it answers.
        engine: ours, fast.
        plain: ours, on the plain path.
        folder: its files; config.json, tokenizer and processor at least.
        config: its config.json.
        note: what the weights are.
    """

    name: str
    card: ModelCard
    engine: TransformersEngine
    plain: TransformersEngine
    folder: Path
    config: dict
    note: str

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.engine.model.lm_head.weight.device


@dataclass(frozen=True)
class Built:
    """A model made from a shape.

    Attributes:
        shape: its sizes.
        folder: its files; complete once `save` has written the weights.
        model: on its device, in evaluation mode.
        head: of the dense dialect.
        checkpoint: what the engine's processor reads.
        processor: images and questions to tensors.
    """

    shape: Shape
    folder: Path
    model: PreTrainedModel
    head: MLPDepthHead
    checkpoint: Checkpoint
    processor: PromptProcessor

    def save(self) -> None:
        """Writes the weights, so that any program can load the folder."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
        state |= {f"depth_head.{name}": value.cpu().contiguous() for name, value in self.head.state_dict().items()}
        shards = _shards(state)
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
            size = sum(value.numel() * value.element_size() for value in state.values())
            places = {key: name for name, part in zip(names, shards, strict=True) for key in part}
            index = {"metadata": {"total_size": size}, "weight_map": places}
            write_json(self.folder / "model.safetensors.index.json", index)
        for name, part in zip(names, shards, strict=True):
            save_file(part, self.folder / name, metadata={"format": "pt"})

    def subject(self) -> Subject:
        """What contenders are given; all share these weights."""
        weight = self.model.lm_head.weight
        info = EngineInfo(
            engine="transformers",
            model=str(self.folder),
            architecture=self.shape.architecture,
            device=str(weight.device),
            dtype=str(weight.dtype).removeprefix("torch."),
            reasons=("drawn there",),
            parameters=sum(value.numel() for value in self.model.parameters()),
            dense=True,
        )
        plain = TransformersEngine(self.model, self.processor, info, head=self.head, plain=True)
        engine = TransformersEngine(self.model, self.processor, info, head=self.head)
        note = f"random weights in the shape of {self.shape.name} ({self.shape.source})"
        card = read_card(self.folder / CARD_FILE)
        return Subject(self.shape.name, card, engine, plain, self.folder, self.checkpoint.config, note)


def load_subject(model: str, device: str, dtype: str) -> Subject:
    """A checkpoint by card, folder or hub id; arguments and errors as in `load_card` and `load_engine`."""
    card, source = load_card(model)
    engine = load_engine(source, card, options=EngineOptions(device, dtype))
    folder = open_checkpoint(source, card.revision).folder
    plain = TransformersEngine(engine.model, engine.processor, engine.info, plain=True)
    return Subject(card.name, card, engine, plain, folder, folder_config(folder), card.about)


def place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Resolves "auto", as the engine does.

    Raises:
        ConfigError: an unknown name, or a device that isn't there.
    """
    placement = choose_placement(device, dtype)
    return placement.device, placement.dtype


def build(
    shape: Shape,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    marked: list[np.ndarray] | None = None,
) -> Built:
    """Makes a model of random weights that answers as a trained one would; nothing is downloaded.

    Args:
        shape: its sizes.
        folder: where its files go; made if it isn't there.
        device: where the weights are drawn.
        dtype: their number format.
        seed: of the weights.
        marked: images with markers, so that answers to the marker question differ among such images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(shape)
    ids = tokenizer.get_vocab()
    stop = ids["</s>" if shape.architecture == "llava" else "<|im_end|>"]
    config = model_config(shape, ids, stop, str(dtype).removeprefix("torch."))
    # The head of the dense dialect: two layers on the language model's last states, as DepthVLM's.
    config |= {
        "depth_head_type": "mlp",
        "depth_head_mlp_hidden": DENSE_HIDDEN,
        "depth_head_feature_mode": "llm_last",
        "depth_head_output": "exp",
    }
    write_json(folder / "config.json", config)
    write_files(folder, shape, tokenizer)
    (folder / CARD_FILE).write_text(_card(shape, folder), encoding="utf-8")
    checkpoint = Checkpoint(folder, str(folder), config, {}, {})
    processor = PromptProcessor(checkpoint)
    model = draw_model(folder, device, dtype, seed)
    pixtral = shape.architecture == "llava"
    landmark, sink = ("[/INST]", "[INST]") if pixtral else ("assistant", "user")
    spare = [ids[token] for token in PIXTRAL_TOKENS[:3]] if pixtral else [ids["<|endoftext|>"]]
    teach(
        model,
        processor,
        stop=stop,
        landmark=ids[landmark],
        sink=ids[sink],
        padding=spare[0],
        seed=seed,
        marked=marked,
    )
    head = _draw_head(config, processor.patch_px, seed).to(device)
    return Built(shape, folder, model, head, checkpoint, processor)


def draw_model(folder: Path, device: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Draws the weights of the folder's config.json where they will be used, in evaluation mode."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim > 1:
                deviation = _gain(name) / math.sqrt(1 if "embed" in name and weight.ndim == 2 else weight[0].numel())
                weight.normal_(0, deviation, generator=generator)
            elif name.endswith("bias"):
                weight.normal_(0, 0.02, generator=generator)
            else:
                weight.normal_(1, 0.1, generator=generator)
    stop = config.get_text_config().eos_token_id
    model.generation_config.eos_token_id = stop
    model.generation_config.pad_token_id = stop
    return model.eval().requires_grad_(False)


def _gain(name: str) -> float:
    """How wide weights are drawn: what layers write stays smaller than what they read, however many there are."""
    if any(part in name for part in ("o_proj", "down_proj")) and "visual" not in name and "vision" not in name:
        return 0.3
    return 1.0


def _draw_head(config: dict, patch_px: int, seed: int) -> MLPDepthHead:
    head = MLPDepthHead(config["text_config"]["hidden_size"], DENSE_HIDDEN, patch_px, "exp").requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for weight in head.parameters():
        if weight.ndim == 2:
            weight.normal_(0, 1 / math.sqrt(weight.shape[1]), generator=generator)
    return head.eval()


def _shards(state: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, value in state.items():
        size += value.numel() * value.element_size()
        if shards[-1] and size > SHARD_BYTES:
            shards.append({})
            size = value.numel() * value.element_size()
        shards[-1][name] = value
    return shards


def _card(shape: Shape, folder: Path) -> str:
    return (
        "# Random weights, made by `depthlm bench` to measure speed. Its numbers mean nothing.\n"
        f"name: bench-{shape.name}\nsource: {folder.resolve()}\nlicence: Apache-2.0\ncommercial_use: true\n"
        f"architecture: {shape.architecture}\nsystem: own\ntasks: [depth]\n"
        "dialects: [dense, coordinates, marker, compact]\ndefault_dialect: coordinates\nfocal_px: 500\n"
        "policy: exact\ndepth_kind: z\nsystem_text: null\nmax_new_tokens: 48\n"
        f"description: Random weights in the shape of {shape.name} that answer in the published form; for speed.\n"
    )
