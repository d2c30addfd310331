"""The part of TensorRT's Python API that is used here: the same in TensorRT 10 and 11, and written down to be checked.

Every failure of TensorRT is a None or a False, with the reason in the logger only; a logger of our own keeps it.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any

from depthlm_ros.errors import MissingDependencyError

OLDEST = 10
INSTALL = "pip install tensorrt (on a Jetson: sudo apt install python3-libnvinfer, from its JetPack)"
_KEPT = 6

CONTRACT = {
    "Builder": {
        "__init__": "(self, logger) -> None",
        "create_network": "(self, flags) -> INetworkDefinition",
        "create_builder_config": "(self) -> IBuilderConfig",
        "build_serialized_network": "(self, network, config) -> IHostMemory",
    },
    "IBuilderConfig": {
        "set_memory_pool_limit": "(self, pool, pool_size) -> None",
        "clear_flag": "(self, flag) -> None",
    },
    "OnnxParser": {
        "__init__": "(self, network, logger) -> None",
        "parse_from_file": "(self, model) -> bool",
        "get_error": "(self, index) -> IParserError",
        "num_errors": "property",
    },
    "Runtime": {
        "__init__": "(self, logger) -> None",
        "deserialize_cuda_engine": "(self, serialized_engine) -> ICudaEngine",
    },
    "ICudaEngine": {
        "create_execution_context": "(self, strategy) -> IExecutionContext",
        "num_io_tensors": "property",
        "get_tensor_name": "(self, index) -> str",
        "get_tensor_mode": "(self, name) -> TensorIOMode",
        "get_tensor_shape": "(self, name) -> Dims",
        "get_tensor_dtype": "(self, name) -> DataType",
    },
    "IExecutionContext": {
        "set_tensor_address": "(self, name, memory) -> bool",
        "execute_async_v3": "(self, stream_handle) -> bool",
    },
    "ILogger": {"__init__": "(self) -> None", "log": "(self, severity, msg) -> None"},
}
"""What is called, by class and name: parameters and result, as the docstrings of tensorrt 10.13.3.9 and 11.4.0.106 have
them. Of overloaded names the overload that is called."""

CONTRACT_MEMBERS = {
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "MemoryPoolType": ("WORKSPACE",),
    "BuilderFlag": ("TF32",),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "DataType": ("UINT8", "FLOAT"),
    "ILogger.Severity": ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"),
}
"""Members of enumerations that are named here."""


def import_tensorrt() -> Any:
    """The package.

    Raises:
        MissingDependencyError: it isn't installed, or is too old.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise MissingDependencyError(
            f"tensorrt is not installed ({error}), engine tensorrt needs it; run: {INSTALL}"
        ) from error
    version = str(tensorrt.__version__)
    if int(re.match(r"\d*", version).group() or 0) < OLDEST:
        raise MissingDependencyError(f"tensorrt {version} is too old, {OLDEST}.0 is the oldest; run: {INSTALL}")
    return tensorrt


def new_logger(tensorrt: Any) -> Any:
    """A logger that keeps the last errors and warnings; `told(logger)` reads them."""

    class Kept(tensorrt.ILogger):
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=_KEPT)
            self.warnings: deque[str] = deque(maxlen=_KEPT)

        def log(self, severity: Any, msg: str) -> None:
            levels = tensorrt.ILogger.Severity
            if severity in (levels.INTERNAL_ERROR, levels.ERROR):
                self.errors.append(" ".join(msg.split()))
            elif severity == levels.WARNING:
                self.warnings.append(" ".join(msg.split()))

    return Kept()


def told(logger: Any) -> str:
    """What TensorRT said last, errors before warnings."""
    return "; ".join(logger.errors or logger.warnings) or "it gave no reason"


def made(maker: Any, *arguments: Any) -> Any:
    """What a constructor of TensorRT makes, None where it fails: the bindings raise TypeError for a null pointer."""
    try:
        return maker(*arguments)
    except TypeError as error:
        if "nullptr" not in str(error):
            raise
        return None
