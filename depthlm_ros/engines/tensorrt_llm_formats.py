"""Which number formats TensorRT-LLM runs Qwen's models in, by generation of the GPU, and what a folder is stored in.

Source: the hardware and model tables of docs/source/features/quantization.md of NVIDIA/TensorRT-LLM at
09d4c79ba941a5c2c62c878c3572c0dcc8b85efa, rows Qwen-2/2.5 and Qwen-3. INT8 is in neither table: it went with the engine
backend that upstream removed. Jetsons are no hardware of it at all (its page "Supported Hardware").
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from depthlm_ros.engines.checkpoint import read_json
from depthlm_ros.errors import ConfigError, ModelError

PLAIN = ("bfloat16", "float16")
"""Formats that any checkpoint can be stored in here."""

ALGORITHMS = {
    "FP8": "fp8",
    "FP8_BLOCK_SCALES": "fp8_block",
    "NVFP4": "nvfp4",
    "W4A16_AWQ": "int4_awq",
    "W4A8_AWQ": "w4a8_awq",
    "W4A16_GPTQ": "int4_gptq",
}
"""`quant_algo` of NVIDIA's Model Optimizer to our name of the format."""

QUANTISED = tuple(ALGORITHMS.values())
_OF_MODEL = {
    "qwen2_5_vl": ("fp8", "nvfp4", "int4_awq", "w4a8_awq", "int4_gptq"),
    "qwen3_vl": ("fp8", "nvfp4", "int4_awq", "int4_gptq"),
}
HOW_TO_QUANTISE = (
    "on a machine with a GPU: pip install nvidia-modelopt, then of its examples/llm_ptq: hf_ptq.py --pyt_ckpt_path "
    "CHECKPOINT --qformat {format} --export_path FOLDER"
)


@dataclass(frozen=True)
class Generation:
    """GPUs that run the same formats.

    Attributes:
        name: of the architecture.
        capabilities: compute capabilities, such as "8.9".
        formats: quantised formats that it runs; all run `PLAIN`.
        products: a regular expression of what its GPUs are called, in lower case without spaces and hyphens.
    """

    name: str
    capabilities: tuple[str, ...]
    formats: tuple[str, ...]
    products: str


GENERATIONS = (
    Generation(
        "ampere",
        ("8.0", "8.6"),
        ("int4_awq", "int4_gptq"),
        r"a100|a800|a30\b|a40\b|a10g?\b|a16\b|rtxa\d000|rtx30\d0(ti)?",
    ),
    Generation(
        "ada",
        ("8.9",),
        ("fp8", "int4_awq", "w4a8_awq", "int4_gptq"),
        r"l4\b|l20|l40s?|rtx\d000ada\w*|rtx40\d0(ti|super|tisuper|d)?",
    ),
    Generation(
        "hopper", ("9.0",), ("fp8", "fp8_block", "int4_awq", "w4a8_awq", "int4_gptq"), r"h100|h200|h800|h20\b|gh200"
    ),
    Generation("blackwell", ("10.0", "10.3"), ("nvfp4", "fp8", "fp8_block"), r"g?b200|g?b300"),
    Generation("blackwell-rtx", ("12.0", "12.1"), ("nvfp4", "fp8"), r"rtx50\d0(ti|d)?|rtxpro\d+\w*|gb10|dgxspark"),
)
_JETSONS = re.compile(r"jetson|orin|thor|xavier|sm_?(72|87|101|110)$|^(7\.2|8\.7|10\.1|11\.0)$")
_CAPABILITY = re.compile(r"(?:sm_?)?(\d{1,2})\.?(\d)[af]?")


def generation_of(gpu: str) -> Generation:
    """The generation of a GPU.

    Args:
        gpu: name of a product, of an architecture, or a compute capability: "H100", "ada", "sm89", "8.9".

    Raises:
        ConfigError: a Jetson, an older GPU, or none that is known.
    """
    said = re.sub(r"[\s-]", "", gpu.lower()).removeprefix("nvidia").removeprefix("geforce")
    if _JETSONS.search(said):
        raise ConfigError(
            f"gpu is {gpu!r}: TensorRT-LLM doesn't run on Jetson; export with --target edge-llm, which does (JetPack "
            "7.1 on Thor, 7.2 on Orin), or the dense dialect with --target onnx"
        )
    capability = _CAPABILITY.fullmatch(said)
    number = ".".join(capability.groups()) if capability else ""
    for generation in GENERATIONS:
        if number in generation.capabilities or said == generation.name.replace("-", ""):
            return generation
        if not number and re.match(generation.products, re.sub(r"(\d)(gb|sxm|pcie|nvl)\w*$", r"\1", said)):
            return generation
    known = "; ".join(f"{g.name} ({', '.join(g.capabilities)})" for g in GENERATIONS)
    raise ConfigError(
        f"gpu is {gpu!r}, which isn't known to run TensorRT-LLM; give the compute capability that `nvidia-smi "
        f"--query-gpu=compute_cap --format=csv` tells. Known: {known}"
    )


def is_known(capability: str) -> bool:
    """Whether a compute capability is of one of `GENERATIONS`; later GPUs aren't."""
    return any(capability in generation.capabilities for generation in GENERATIONS)


def check_format(name: str, architecture: str, gpu: str = "") -> None:
    """Makes sure that a model can run in a format.

    Args:
        name: one of `PLAIN` or `QUANTISED`.
        architecture: `model_type` of the checkpoint.
        gpu: as in `generation_of`; empty for any.

    Raises:
        ConfigError: an unknown format, or one that the model or the GPU doesn't run; those that do are named.
    """
    if name in PLAIN:
        if gpu:
            generation_of(gpu)
        return
    if name not in QUANTISED:
        told = "; INT8 and float32 are none of TensorRT-LLM's" if name in ("int8", "float32") else ""
        raise ConfigError(f"precision is {name!r}; choose one of {', '.join((*PLAIN, *QUANTISED))}{told}")
    runs = _OF_MODEL.get(architecture, ())
    if name not in runs:
        raise ConfigError(f"TensorRT-LLM doesn't run {architecture} in {name!r}; it runs {', '.join((*PLAIN, *runs))}")
    if not gpu:
        return
    generation = generation_of(gpu)
    if name not in generation.formats:
        good = [one for one in generation.formats if one in runs]
        raise ConfigError(
            f"gpu {gpu!r} ({generation.name}) doesn't run {name!r}; it runs {', '.join((*PLAIN, *good))}"
        )


def stored_format(folder: Path) -> str:
    """The quantised format of a checkpoint; "" where its weights are plain numbers.

    Raises:
        ModelError: a format that TensorRT-LLM isn't known to load, or a damaged file.
    """
    told = read_json(folder / "hf_quant_config.json").get("quantization") or read_json(folder / "config.json").get(
        "quantization_config"
    )
    if not told:
        return ""
    method, algorithm = told.get("quant_method", "modelopt"), told.get("quant_algo")
    if method == "fp8" and told.get("weight_block_size"):
        return "fp8_block"
    if method == "modelopt" and algorithm in ALGORITHMS:
        return ALGORITHMS[algorithm]
    raise ModelError(
        f"{folder} is quantised by {method!r} with {algorithm!r}, which TensorRT-LLM isn't known to load; quantise the "
        f"original with NVIDIA's Model Optimizer, {HOW_TO_QUANTISE.format(format='fp8')}"
    )
