"""The names of TensorRT-LLM's LLM API that the engine leans on, recorded from where its makers promise them.

Upstream keeps them in files that its own tests compare the code with, `tests/unittest/api_stability/` of
NVIDIA/TensorRT-LLM. Recorded here:

- references_committed/llm.yaml at e00a186697ae7eb457187120db5b993327491c82 (releases 1.1 and 1.2) and at
  029c15cbff10692cf7e9df552d92450dd92a3125 (1.3 series); references/llm.yaml at
  ea35fd6735a7f08fa93289e07b953a2d8a37a2cf (`cache_salt`, `shutdown`)
- references_committed/sampling_params.yaml at 020a73933022051ee7e9973a12dc83d9073c9476
- references/guided_decoding_params.yaml at a6532d61e12ce7149d7e8f021d880d225221b7f5
- references_committed/request_output.yaml at 224469b0966fe633902b9e58591722cc5bfb2d3c;
  references/request_output.yaml at 26eface3a13843581383c5049fd832577ed0c177 (`abort`)
- references_committed/completion_output.yaml at 0c6a62a1d7ca643ceeaa3413b6833e164d324667
- references/trtllm_serve_cli.yaml at 029e223d527d2ff453062555f7aef86517a2847c
- `KvCacheConfig` and `LLM.preprocess` are in no such file; they stand as `tensorrt_llm/llmapi/llm_args.py` and `llm.py`
  of the 1.2 and 1.3 series have them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

MODULE = "tensorrt_llm.llmapi"
RECORDED_FOR = "1.2 and 1.3"


@dataclass(frozen=True)
class Recorded:
    """Names that belong to one class, or that one of its methods takes.

    Attributes:
        known: what upstream's files name.
        needed: those of them that the engine can't do without.
        wanted: those that it uses where they are.
    """

    known: tuple[str, ...]
    needed: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()


PARAMETERS = {
    "LLM": Recorded(
        (
            "model tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code tensor_parallel_size dtype revision "
            "tokenizer_revision pipeline_parallel_size context_parallel_size moe_tensor_parallel_size "
            "moe_expert_parallel_size enable_lora lora_config batched_logits_processor guided_decoding_backend "
            "speculative_config max_batch_size max_input_len max_seq_len max_beam_width max_num_tokens load_format "
            "enable_chunked_prefill kv_cache_config stream_interval"
        ).split(),
        needed=("model", "kv_cache_config", "max_batch_size", "max_seq_len", "max_num_tokens"),
        wanted=(
            "dtype",
            "trust_remote_code",
            "revision",
            "tensor_parallel_size",
            "guided_decoding_backend",
            "enable_chunked_prefill",
            "max_beam_width",
        ),
    ),
    "LLM.generate_async": Recorded(
        ("inputs", "sampling_params", "lora_request", "prompt_adapter_request", "streaming", "cache_salt"),
        needed=("inputs", "sampling_params"),
        wanted=("cache_salt",),
    ),
    "KvCacheConfig": Recorded(
        ("enable_block_reuse", "max_tokens", "free_gpu_memory_fraction", "enable_partial_reuse", "dtype"),
        needed=("enable_block_reuse", "free_gpu_memory_fraction"),
        wanted=("dtype",),
    ),
    "SamplingParams": Recorded(
        (
            "n best_of use_beam_search beam_search_diversity_rate early_stopping max_tokens min_tokens end_id pad_id "
            "seed temperature top_k top_p top_p_decay top_p_min top_p_reset_ids min_p repetition_penalty "
            "presence_penalty frequency_penalty length_penalty no_repeat_ngram_size stop stop_token_ids "
            "include_stop_str_in_output bad bad_token_ids logits_processor apply_batched_logits_processor "
            "guided_decoding embedding_bias lookahead_config ignore_eos detokenize add_special_tokens "
            "truncate_prompt_tokens skip_special_tokens spaces_between_special_tokens return_log_probs logprobs "
            "prompt_logprobs return_context_logits return_generation_logits exclude_input_from_output "
            "return_encoder_output"
        ).split(),
        needed=("max_tokens", "temperature", "top_k", "logprobs"),
        wanted=("guided_decoding", "stop_token_ids", "add_special_tokens", "repetition_penalty"),
    ),
    "GuidedDecodingParams": Recorded(("grammar", "json", "json_object", "regex"), wanted=("regex",)),
    "RequestOutput.result": Recorded(("timeout",), needed=("timeout",)),
    "LLM.preprocess": Recorded(("inputs", "sampling_params"), wanted=("inputs", "sampling_params")),
}
"""Parameters by class, of its constructor, or by method."""

MEMBERS = {
    "LLM": Recorded(
        ("generate", "generate_async", "preprocess", "shutdown", "tokenizer"),
        needed=("generate_async", "shutdown"),
        wanted=("preprocess",),
    ),
    "RequestOutput": Recorded(
        (
            "result",
            "aresult",
            "abort",
            "aborted",
            "request_id",
            "prompt",
            "prompt_token_ids",
            "outputs",
            "context_logits",
            "finished",
        ),
        needed=("result", "abort", "outputs"),
    ),
    "CompletionOutput": Recorded(
        (
            "index",
            "text",
            "token_ids",
            "finish_reason",
            "stop_reason",
            "generation_logits",
            "logprobs",
            "prompt_logprobs",
        ),
        needed=("text", "token_ids", "finish_reason", "logprobs"),
    ),
}
"""Methods, properties and fields by class."""


SERVE_OPTIONS = ("--host", "--port", "--config", "--extra_llm_api_options", "--no-telemetry", "--log_level")
"""Of `trtllm-serve`, as far as they are of use here; 1.2 is certain to know `--extra_llm_api_options`."""


def check_contract(module: ModuleType) -> list[str]:
    """What an installed LLM API lacks of what the engine needs, a name each; nothing where it fits.

    Args:
        module: `tensorrt_llm.llmapi`, or one like it.
    """
    missing = []
    for name, recorded in PARAMETERS.items():
        taken = parameters(module, name)
        if taken is not None:
            missing += [f"{name}({wanted})" for wanted in recorded.needed if wanted not in taken]
        elif recorded.needed and "." not in name:
            missing.append(name)
    for name, recorded in MEMBERS.items():
        owner = getattr(module, name, None)
        if owner is None:
            missing.append(name)
        else:
            missing += [f"{name}.{wanted}" for wanted in recorded.needed if wanted not in _members(owner)]
    return list(dict.fromkeys(missing))


def parameters(module: ModuleType, name: str) -> Names | None:
    """What a class's constructor, or a method, takes by keyword; None where there is no such thing.

    Args:
        module: as in `check_contract`.
        name: a key of `PARAMETERS`.
    """
    owner, _, method = name.partition(".")
    seen: Any = getattr(module, owner, None)
    seen = getattr(seen, method, None) if method else seen
    if seen is None:
        return None
    fields = getattr(seen, "model_fields", None)
    if isinstance(fields, dict):
        return Names(fields)
    try:
        taken = inspect.signature(seen).parameters
    except (TypeError, ValueError):
        return Names((), open_ended=True)
    names = [key for key, value in taken.items() if value.kind not in (value.VAR_KEYWORD, value.VAR_POSITIONAL)]
    if not any(value.kind == value.VAR_KEYWORD for value in taken.values()):
        return Names(names)
    # The constructor hands the rest to a class of arguments, which refuses what it doesn't know.
    arguments = getattr(module, "TorchLlmArgs", None) or getattr(module, "LlmArgs", None)
    rest = getattr(arguments, "model_fields", None) if name == "LLM" else None
    return Names([*names, *rest]) if isinstance(rest, dict) else Names(names, open_ended=True)


class Names(frozenset):
    """Names that are taken; all of them where it can't be seen which."""

    open_ended: bool

    def __new__(cls, names: Iterable[str], open_ended: bool = False) -> Names:
        made = super().__new__(cls, names)
        made.open_ended = open_ended
        return made

    def __contains__(self, name: object) -> bool:
        return self.open_ended or super().__contains__(name)


def _members(owner: type) -> frozenset[str]:
    """Attributes of a class and fields of its instances."""
    names = set(dir(owner)) | set(getattr(owner, "__dataclass_fields__", ()))
    for base in owner.__mro__:
        names |= set(getattr(base, "__annotations__", ()))
    return frozenset(names)
