"""What engines other than `transformers` are told; each takes what is meant for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

SERVER_DIALECTS = ("auto", "trtllm-serve", "vllm", "edge-llm", "transformers", "generic")


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine; the node's parameters of the same names hold their meaning and their ranges.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto", "float32", "bfloat16" or "float16".
        batch_size: most questions answered together; 0 leaves it to the engine.
        server_urls: of servers that know the same model, the preferred one first.
        server_model: the name that they know it by; empty: the only one that they list.
        server_dialect: one of `SERVER_DIALECTS`.
        server_key_variable: environment variable that holds the key; empty: none is sent.
        server_concurrency: requests under way at once.
        server_timeout_s: longest wait for an answer.
        server_image: how images are sent, "png" or "jpeg".
        guided: whether numbers are held to their sentence by a guide, where the engine has guides.
        prefix_reuse: whether the engine may keep what questions about an image share.
        cpu_threads: for inference on a CPU; 0 leaves it to the engine.
    """

    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 0
    server_urls: tuple[str, ...] = ()
    server_model: str = ""
    server_dialect: str = "auto"
    server_key_variable: str = ""
    server_concurrency: int = 16
    server_timeout_s: float = 5.0
    server_image: str = "png"
    guided: bool = True
    prefix_reuse: bool = True
    cpu_threads: int = 0

    def variant(self) -> str:
        """What a parity record has to have been made with: everything that may change an answer."""
        told = (self.device, self.dtype, self.batch_size, self.server_image, self.guided, self.prefix_reuse)
        return " ".join(map(str, told))

    def only(self, url: str) -> EngineOptions:
        """The same with one server."""
        return replace(self, server_urls=(url,))
