"""Small checkpoints that say a sentence with numbers in it, as trained ones do; the numbers hang on image and question.

"<think> The point is around 4.58 or 4.57 meters": which kind of word comes next hangs on the last one alone, and which
of several on everything before it, such as whether another "or" follows.
"""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

HEAD = ("<think>", " The point", " is around ")
AGAIN, TAIL = " or ", " meters"
SENTENCE = "".join(HEAD) + "{number}" + TAIL
TWICE = "".join(HEAD) + "{number}" + AGAIN + "{same}" + TAIL
# What may follow each word; digits by their place: "4.58", and "40.58" now and then.
SUCCESSORS = {
    **{before: (after,) for before, after in zip(HEAD, HEAD[1:], strict=False)},
    **dict.fromkeys((HEAD[-1], AGAIN), tuple("1234")),
    **dict.fromkeys("1234", (".", "0")),
    "0": (".",),
    ".": tuple("56"),
    **dict.fromkeys("56", tuple("789")),
    **dict.fromkeys("789", (TAIL, AGAIN)),
}
# Share of what the layers add, beside what the last word alone decides; and how much words that may follow differ.
CONTEXT, TASTE = 0.08, 0.4


def make_speaker(folder: Path | str, architecture: str, seed: int = 0) -> Path:
    """Writes the checkpoint.

    Args:
        folder: made if it isn't there.
        architecture: as in `make_checkpoint`.
        seed: of the weights.
    """
    words = (*HEAD, AGAIN, TAIL)
    folder = make_checkpoint(folder, architecture, seed=seed, dense_head=False, words=words)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in (*words, *"0123456789.")}
    asked = tokenizer("[/INST]" if architecture == "llava" else "\n", add_special_tokens=False)["input_ids"][-1]
    follows = {ids[before]: [ids[word] for word in after] for before, after in SUCCESSORS.items()}
    follows |= {asked: [ids[HEAD[0]]], ids[TAIL]: [tokenizer.eos_token_id]}
    for name in state:
        if "language_model" in name and ("o_proj" in name or "down_proj" in name):
            state[name] *= CONTEXT
    embedding = next(value for name, value in state.items() if name.endswith("embed_tokens.weight"))
    head = torch.zeros_like(state["lm_head.weight"])
    generator = torch.Generator().manual_seed(seed)
    for before, after in follows.items():
        for token in after:
            head[token] += 4 * embedding[before] / embedding[before].norm()
    spoken = list(ids.values())
    head[spoken] += TASTE * torch.randn(len(spoken), head.shape[1], generator=generator)
    state["lm_head.weight"] = head
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
