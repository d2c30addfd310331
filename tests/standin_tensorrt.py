"""A package with the part of TensorRT's API that `tensorrt_api.CONTRACT` records, and nothing else.

Networks are ONNX files and plans are those with four bytes in front; onnxruntime computes them. It shows that calls are
made in the right order with the right arguments, and what becomes of every None and False; what TensorRT itself makes
of a graph it can't show.
"""

from __future__ import annotations

import ctypes
import enum
import types
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

MAGIC = b"PLAN"


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def log(self, severity, msg):
        raise NotImplementedError


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


BuilderFlag = enum.Enum("BuilderFlag", "TF32")
MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
DataType = enum.Enum("DataType", "UINT8 FLOAT HALF")
_KINDS = {onnx.TensorProto.UINT8: DataType.UINT8, onnx.TensorProto.FLOAT: DataType.FLOAT}


def make(version="10.13.3.9", fails=""):
    """A package.

    Args:
        version: its `__version__`.
        fails: what fails: "driver", "parse", "build", "load", "memory", "address" or "execute".
    """
    seen = []  # what was called, with what

    class Network:
        model = None

    class Builder:
        def __init__(self, logger):
            assert isinstance(logger, ILogger)
            self._logger = logger
            if fails == "driver":
                logger.log(Severity.ERROR, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")

        def create_network(self, flags=0):
            seen.append(("create_network", flags))
            return Network()

        def create_builder_config(self):
            return Config()

        def build_serialized_network(self, network, config):
            if fails == "build":
                self._logger.log(Severity.WARNING, "not this one")
                self._logger.log(Severity.ERROR, "[optimizer.cpp] Could not find\n any implementation for node X")
                return None
            return memoryview(MAGIC + network.model)

    class Config:
        def set_memory_pool_limit(self, pool, pool_size):
            seen.append(("set_memory_pool_limit", pool, pool_size))

        def clear_flag(self, flag):
            seen.append(("clear_flag", flag))

    class OnnxParser:
        num_errors = 1

        def __init__(self, network, logger):
            self._network = network

        def parse_from_file(self, model):
            assert isinstance(model, str)
            seen.append(("parse_from_file", model))
            self._network.model = Path(model).read_bytes()
            return fails != "parse"

        def get_error(self, index):
            return f"In node {index} (importLayer): UNSUPPORTED_NODE"

    class Runtime:
        def __init__(self, logger):
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine):
            if fails == "load" or serialized_engine[:4] != MAGIC:
                self._logger.log(Severity.ERROR, "Version tag does not match. Current Version: 228, Serialized: 237")
                return None
            return Engine(serialized_engine[4:], self._logger)

    class Engine:
        def __init__(self, model, logger):
            self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
            self._logger = logger
            graph = onnx.load_from_string(model).graph
            self._values = [(value, TensorIOMode.INPUT) for value in graph.input]
            self._values += [(value, TensorIOMode.OUTPUT) for value in graph.output]
            self.num_io_tensors = len(self._values)

        def create_execution_context(self):
            return None if fails == "memory" else Context(self._session, self._logger)

        def get_tensor_name(self, index):
            return self._values[index][0].name

        def _named(self, name):
            return next(pair for pair in self._values if pair[0].name == name)

        def get_tensor_mode(self, name):
            return self._named(name)[1]

        def get_tensor_shape(self, name):
            return [dim.dim_value for dim in self._named(name)[0].type.tensor_type.shape.dim]

        def get_tensor_dtype(self, name):
            return _KINDS[self._named(name)[0].type.tensor_type.elem_type]

    class Context:
        def __init__(self, session, logger):
            self._session, self._logger, self._at = session, logger, {}

        def set_tensor_address(self, name, memory):
            assert isinstance(memory, int)
            self._at[name] = memory
            return fails != "address"

        def execute_async_v3(self, stream_handle):
            assert isinstance(stream_handle, int)
            if fails == "execute":
                self._logger.log(Severity.ERROR, "an illegal memory access was encountered")
                return False
            (given,), (wanted,) = self._session.get_inputs(), self._session.get_outputs()
            size = int(np.prod(given.shape))
            image = np.frombuffer(ctypes.string_at(self._at[given.name], size), np.uint8).reshape(given.shape)
            (depth,) = self._session.run(None, {given.name: image})
            depth = np.ascontiguousarray(depth)
            if fails != "silent":
                ctypes.memmove(self._at[wanted.name], depth.ctypes.data, depth.nbytes)
            return True

    package = types.ModuleType("tensorrt")
    package.__version__ = version
    package.seen = seen
    for one in (Builder, OnnxParser, Runtime, ILogger, NetworkDefinitionCreationFlag, BuilderFlag, MemoryPoolType,
                TensorIOMode, DataType):  # fmt: skip
        setattr(package, one.__name__, one)
    package.IBuilderConfig, package.ICudaEngine, package.IExecutionContext = Config, Engine, Context
    return package
