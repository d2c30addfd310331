"""Loads a checkpoint's weights into the architecture's own class, and lets nothing go missing in silence."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from depthlm_ros.engines.checkpoint import HEAD_PREFIX, Checkpoint
from depthlm_ros.engines.devices import Placement
from depthlm_ros.errors import ModelError


def load_model(checkpoint: Checkpoint, placement: Placement, attn: str = "sdpa") -> PreTrainedModel:
    """Loads the weights where `placement` says, in evaluation mode.

    Raises:
        ModelError: weights are missing, don't fit config.json or don't fit the device.
    """
    try:
        with _silent_report():
            model, report = AutoModelForImageTextToText.from_pretrained(
                checkpoint.folder,
                dtype=placement.dtype,
                attn_implementation=attn,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"{checkpoint.name} can't be loaded: {type(error).__name__}: {error}") from error
    _check_report(checkpoint.name, report)
    try:
        return model.eval().to(placement.device)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{placement.device} has no room for the {checkpoint.parameters / 1e9:.1f} billion weights of "
            f"{checkpoint.name} in {placement.dtype_name}; use a smaller model or device 'cpu'"
        ) from error


def _check_report(name: str, report: dict) -> None:
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if missing:
        raise ModelError(f"{name} lacks {len(missing)} weights, such as {missing[0]}; fetch its files again")
    if mismatched:
        key, stored, wanted = mismatched[0]
        raise ModelError(
            f"{name}: {key} has shape {tuple(stored)}, config.json asks for {tuple(wanted)}; "
            "one of the two is of another model"
        )
    unknown = sorted(key for key in report["unexpected_keys"] if not key.startswith(HEAD_PREFIX))
    if unknown:
        logging.getLogger(__name__).warning(
            "%s holds %d weights that are not used, such as %s", name, len(unknown), unknown[0]
        )


@contextmanager
def _silent_report() -> Iterator[None]:
    """Keeps transformers from listing the head's weights as unexpected; `_check_report` says what matters."""
    logger = logging.getLogger("transformers.modeling_utils")

    def no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(no_report)
    try:
        yield
    finally:
        logger.removeFilter(no_report)
