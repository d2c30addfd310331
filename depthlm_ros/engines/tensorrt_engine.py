"""Runs a plan that `depthlm build` made on this machine, in TensorRT 10 or 11."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from depthlm_ros.engines.graph_engine import INPUT, OUTPUT, GraphEngine, graph_info, graph_size
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.engines.tensorrt_api import import_tensorrt, made, new_logger, told
from depthlm_ros.errors import ConfigError, EngineError, MissingDependencyError, ModelError
from depthlm_ros.manifest import Manifest, check_built

PLAN_FILE = "model.plan"


def load_tensorrt(folder: Path, manifest: Manifest, options: EngineOptions) -> GraphEngine:
    """Loads a plan.

    Args:
        folder: of the export.
        manifest: of it, its files checked.
        options: `device` "auto", "cuda" or "cuda:N"; `dtype` can't change what the plan computes in.

    Raises:
        MissingDependencyError: tensorrt or torch isn't installed.
        ModelError: there is no plan, it was built elsewhere, or it is of another graph.
        ConfigError: another device, or a dtype that the plan wasn't built in.
        EngineError: TensorRT refuses the plan, or memory is short; the message has its reason.
    """
    plan = folder / PLAN_FILE
    if manifest.built is None or PLAN_FILE not in manifest.files or not plan.is_file():
        raise ModelError(f"{folder} has no plan for this machine; build it here: depthlm build {folder}")
    check_built(manifest)
    precision = manifest.built.get("precision", "")
    if options.dtype not in ("auto", precision):
        raise ConfigError(
            f"dtype is {options.dtype!r}, the plan was built in {precision}; leave dtype 'auto', or build it again: "
            f"depthlm build {folder} --precision ..."
        )
    tensorrt = import_tensorrt()
    device = _device(options.device)
    runner = PlanRunner(tensorrt, plan, graph_size(manifest), device)
    name = manifest.built.get("gpu", "") or "the GPU"
    reasons = [f"plan built here for {name}, products in {precision}"]
    version = f"TensorRT {tensorrt.__version__}"
    return GraphEngine(runner, graph_info("tensorrt", folder, manifest, device, version, precision, reasons), manifest)


class PlanRunner:
    """A `Runner` of a plan, with fixed buffers on one device.

    Args:
        tensorrt: the package.
        plan: the file.
        size: (width, height) of its image and map.
        device: a torch device, such as "cuda:0".

    Raises:
        EngineError: TensorRT refuses the plan, or memory is short.
        ModelError: its input and output are others than the manifest's.
    """

    def __init__(self, tensorrt: Any, plan: Path, size: tuple[int, int], device: str) -> None:
        import torch

        self._torch, self._device = torch, torch.device(device)
        self._logger = new_logger(tensorrt)
        width, height = size
        with self._on_device():
            # Kept, since the engine needs it alive.
            self._runtime = made(tensorrt.Runtime, self._logger)
            engine = None if self._runtime is None else self._runtime.deserialize_cuda_engine(plan.read_bytes())
            if engine is None:
                raise EngineError(
                    f"TensorRT {tensorrt.__version__} refuses {plan}: {told(self._logger)}; build it again: depthlm "
                    f"build {plan.parent}"
                )
            _check_tables(tensorrt, engine, size, plan)
            self._engine = engine
            self._context = engine.create_execution_context()
            if self._context is None:
                raise EngineError(
                    f"TensorRT has no memory for {plan}: {told(self._logger)}; end other programs, or export for a "
                    "smaller camera"
                )
            on_gpu = self._device.type == "cuda"
            try:
                self._host = torch.empty((height, width, 3), dtype=torch.uint8, pin_memory=on_gpu)
                self._image = torch.empty((height, width, 3), dtype=torch.uint8, device=device)
                self._depth = torch.empty((height, width), dtype=torch.float32, device=device)
                self._stream = torch.cuda.Stream(self._device) if on_gpu else None
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                raise EngineError(
                    f"no memory on {device} for the buffers of {plan}: {_first_line(error)}; end other programs, or "
                    "export for a smaller camera"
                ) from error
            for name, buffer in ((INPUT, self._image), (OUTPUT, self._depth)):
                if not self._context.set_tensor_address(name, buffer.data_ptr()):
                    raise EngineError(f"TensorRT refuses the buffer of {name!r}: {told(self._logger)}")

    def run(self, image: np.ndarray) -> np.ndarray:
        """See `Runner`."""
        torch = self._torch
        try:
            with self._on_device(), torch.cuda.stream(self._stream):
                np.copyto(self._host.numpy(), image)
                self._image.copy_(self._host, non_blocking=True)
                # A frame that isn't computed must not show the one before it.
                self._depth.fill_(float("nan"))
                handle = 0 if self._stream is None else self._stream.cuda_stream
                if not self._context.execute_async_v3(handle):
                    raise EngineError(f"TensorRT failed: {told(self._logger)}; restart the node")
                # On this stream, so that it waits for the map.
                return self._depth.to("cpu", copy=True).numpy()
        except RuntimeError as error:
            # A fault of the frame before may show in any of these calls.
            raise EngineError(f"TensorRT failed: {_first_line(error)}; restart the node") from error

    def close(self) -> None:
        """Gives back the buffers and the engine."""
        self._context = self._engine = self._runtime = self._host = self._image = self._depth = None

    def _on_device(self) -> Any:
        return self._torch.cuda.device(self._device if self._device.type == "cuda" else -1)


def _device(device: str) -> str:
    """The torch device that the options mean."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            f"torch is not installed ({error}), engine tensorrt keeps its buffers in it; run: pip install torch"
        ) from error
    name, _, number = device.partition(":")
    if name not in ("auto", "cuda") or (number and (not number.isdecimal() or name == "auto")):
        raise ConfigError(f"device is {device!r}; engine tensorrt knows 'auto', 'cuda' and 'cuda:N'")
    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        raise ConfigError(
            f"device is {device!r}, but torch sees {count} CUDA devices; install a torch with CUDA for this machine, "
            "or use engine onnxruntime on device 'cpu'"
        )
    return f"cuda:{int(number or 0)}"


def _check_tables(tensorrt: Any, engine: Any, size: tuple[int, int], plan: Path) -> None:
    """Makes sure that the plan's input and output are those that the manifest speaks of."""
    width, height = size
    mode, kind = tensorrt.TensorIOMode, tensorrt.DataType
    wanted = {
        INPUT: (mode.INPUT, (height, width, 3), kind.UINT8),
        OUTPUT: (mode.OUTPUT, (height, width), kind.FLOAT),
    }
    seen = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        seen[name] = engine.get_tensor_mode(name), tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name)
    if seen != wanted:
        raise ModelError(
            f"{plan} has {_told(seen)}, engine.json describes {_told(wanted)}; it is of another export: build it again"
        )


def _told(table: dict[str, tuple[Any, tuple[int, ...], Any]]) -> str:
    return ", ".join(f"{name} {kind} {list(shape)}" for name, (_, shape, kind) in table.items())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
