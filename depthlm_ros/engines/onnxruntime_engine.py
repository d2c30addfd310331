"""Runs an exported graph with onnxruntime: on any CPU with numpy alone, on a GPU where its provider is installed."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from depthlm_ros.engines.graph_engine import INPUT, OUTPUT, GraphEngine, graph_file, graph_info, graph_size
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.errors import ConfigError, EngineError, MissingDependencyError, ModelError
from depthlm_ros.machine import this_machine
from depthlm_ros.manifest import Manifest

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_INSTALL = {
    CPU: "pip install onnxruntime",
    CUDA: "pip install onnxruntime-gpu (on a Jetson: the wheel built for its JetPack)",
    TENSORRT: "pip install onnxruntime-gpu tensorrt (on a Jetson: the wheel built for its JetPack)",
}
_TYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32"}


def load_onnxruntime(folder: Path, manifest: Manifest, options: EngineOptions) -> GraphEngine:
    """Loads an export into onnxruntime.

    `options.device` chooses the provider: "cpu"; "cuda" or "cuda:N"; "tensorrt" or "tensorrt:N", which builds an engine
    at the first start and keeps it in the user's cache, where that can be written; "auto" takes CUDA where it loads,
    else the CPU. TensorRT is never taken unasked: building takes minutes. `options.dtype` can't change what the graph
    computes in. `options.cpu_threads` 0 takes as many threads as OMP_NUM_THREADS says, else all cores.

    Raises:
        MissingDependencyError: onnxruntime isn't installed, or has no such provider.
        ModelError: the graph can't be read, or isn't the one that the manifest describes.
        ConfigError: an unknown device, or a dtype that the export doesn't have.
        EngineError: the provider is there but doesn't load.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"onnxruntime is not installed ({error}), engine onnxruntime needs it; run: {_INSTALL[CPU]}"
        ) from error
    _check_dtype(options.dtype, manifest)
    path = graph_file(folder)
    present = onnxruntime.get_available_providers()
    wanted, number = _provider(options.device, present)
    told, why = _provider_options(wanted, number, manifest)
    try:
        session = _session(path, wanted, told, options.cpu_threads)
    except EngineError:
        if options.device != "auto" or wanted == CPU:
            raise
        # Compiled in is not installed: without the libraries of CUDA "auto" still has the CPU.
        wanted = CPU
        session = _session(path, wanted, {}, options.cpu_threads)
    _check_tables(session, graph_size(manifest), path)
    reasons = [
        f"device {options.device!r}: {wanted}; this onnxruntime has {', '.join(present)}",
        products(wanted, manifest.precision),
        *why,
    ]
    device = "cpu" if wanted == CPU else f"cuda:{number}"
    version = f"onnxruntime {onnxruntime.__version__} {wanted}"
    if wanted == TENSORRT and _tf32_is_off():
        # Another engine than with TF32, which has to prove itself.
        version += " without TF32"
    info = graph_info("onnxruntime", folder, manifest, device, version, manifest.precision, reasons)
    return GraphEngine(_Session(session), info, manifest)


class _Session:
    """A `Runner` of a session."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def run(self, image: np.ndarray) -> np.ndarray:
        try:
            return self._session.run([OUTPUT], {INPUT: image})[0]
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise EngineError(
                f"onnxruntime failed: {_first_line(error)}; where memory ran out use device 'cpu' or a smaller camera"
            ) from error

    def close(self) -> None:
        self._session = None


def _check_dtype(dtype: str, manifest: Manifest) -> None:
    if dtype not in ("auto", manifest.precision):
        raise ConfigError(
            f"dtype is {dtype!r}, the graph was exported in {manifest.precision}; leave dtype 'auto', or export with "
            f"--precision {dtype}"
        )


def _provider(device: str, present: Sequence[str]) -> tuple[str, int]:
    """The provider of a device and the GPU's number."""
    name, _, number = device.partition(":")
    known = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT, "auto": CUDA if CUDA in present else CPU}
    if name not in known or (number and (not number.isdecimal() or name in ("cpu", "auto"))):
        raise ConfigError(
            f"device is {device!r}; engine onnxruntime knows 'auto', 'cpu', 'cuda', 'cuda:N', 'tensorrt' and "
            "'tensorrt:N'"
        )
    if known[name] not in present:
        raise MissingDependencyError(
            f"device is {device!r}, but this onnxruntime has no {known[name]}, only {', '.join(present)}; run: "
            f"{_INSTALL[known[name]]}"
        )
    return known[name], int(number or 0)


def products(provider: str, precision: str) -> str:
    """In which number format a provider multiplies, as a sentence for the log.

    Args:
        provider: such as "CPUExecutionProvider".
        precision: of the graph.
    """
    if provider == CPU and precision != "float32":
        return (
            f"weights in {precision}, but products in float32 where {CPU} has no kernel for {precision}, as on x86: "
            "no faster than a float32 export"
        )
    if provider == TENSORRT and precision == "float32" and not _tf32_is_off():
        # The provider has no option for it; TensorRT allows it unless told otherwise.
        return (
            "products in TF32 (factors of 11 bits) wherever TensorRT finds that faster; set NVIDIA_TF32_OVERRIDE=0 "
            "before the start for float32"
        )
    return f"products in {precision}"


def _tf32_is_off() -> bool:
    """Whether NVIDIA's libraries leave TF32 alone in the whole process."""
    return os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"


def _session(path: Path, provider: str, told: dict[str, str], threads: int) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    # As many as the caller's other libraries are told to take; idle threads sleep instead of turning.
    others = os.environ.get("OMP_NUM_THREADS", "")
    settings.intra_op_num_threads = threads or (int(others) if others.isdecimal() else 0)
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 3
    providers: list[Any] = [(provider, told)]
    if provider == TENSORRT:
        # For what TensorRT leaves over.
        providers.append((CUDA, _cuda_options(int(told["device_id"]))))
    if provider != CPU:
        providers.append(CPU)
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=providers)
    except Exception as error:
        told = _first_line(error)
        if provider == CPU:
            raise ModelError(f"onnxruntime can't load {path}: {told}; export again, or install a newer onnxruntime") \
                from error  # fmt: skip
        raise EngineError(f"{provider} doesn't load: {told}; use device 'cpu', or {_INSTALL[provider]}") from error
    # A provider that doesn't load is left out with a line in the log, and the CPU computes.
    loaded = session.get_providers()
    if loaded[0] != provider:
        raise EngineError(
            f"{provider} is in this onnxruntime but doesn't load, only {', '.join(loaded)} do; install the CUDA and "
            "cuDNN (for TensorRT: and TensorRT) versions that it was built for, or use device 'cpu'"
        )
    return session


def _cuda_options(number: int) -> dict[str, str]:
    # By default products are rounded to TF32's 11 bits.
    return {"device_id": str(number), "use_tf32": "0"}


def _provider_options(provider: str, number: int, manifest: Manifest) -> tuple[dict[str, str], list[str]]:
    """What a provider is told, and sentences for the log."""
    if provider == CPU:
        return {}, []
    if provider == CUDA:
        return _cuda_options(number), []
    try:
        cache = cache_folder(manifest, this_machine().as_dict())
        cache.mkdir(parents=True, exist_ok=True)
        # A folder that was made once may be on a disk that is read-only by now.
        tempfile.TemporaryFile(dir=cache).close()
    except (OSError, RuntimeError) as error:  # the latter of a user without a home
        return {"device_id": str(number)}, [
            f"every start builds TensorRT's engine again, since it can't be kept ({error}); set XDG_CACHE_HOME to a "
            "folder that can be written"
        ]
    return {
        "device_id": str(number),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
    }, [f"TensorRT's engine is kept in {cache}"]


def cache_folder(manifest: Manifest, machine: Mapping[str, str]) -> Path:
    """Where TensorRT's engines of these files, this onnxruntime and this machine are kept.

    onnxruntime itself never finds out that a cached engine is another graph's or another TensorRT's, or that it was
    built with TF32.

    Raises:
        RuntimeError: the user has no home, and XDG_CACHE_HOME isn't set.
    """
    version = "unknown"
    for package in ("onnxruntime-gpu", "onnxruntime"):
        try:
            version = metadata.version(package)
            break
        except metadata.PackageNotFoundError:
            continue
    told = repr((manifest.digest, version, sorted(machine.items()), _tf32_is_off()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "depthlm_ros" / "onnxruntime" / hashlib.sha256(told.encode()).hexdigest()[:32]


def _check_tables(session: Any, size: tuple[int, int], path: Path) -> None:
    """Makes sure that the graph's input and output are those that the manifest speaks of."""
    seen = {
        "input": [(value.name, value.type, list(value.shape)) for value in session.get_inputs()],
        "output": [(value.name, value.type, list(value.shape)) for value in session.get_outputs()],
    }
    width, height = size
    wanted = {
        "input": [(INPUT, "tensor(uint8)", [height, width, 3])],
        "output": [(OUTPUT, "tensor(float)", [height, width])],
    }
    for which, value in wanted.items():
        if seen[which] != value:
            raise ModelError(
                f"{path} has {which} {_told(seen[which])}, engine.json describes {_told(value)}; the two are of "
                "different exports: export again"
            )


def _told(table: Sequence[tuple[str, str, list]]) -> str:
    return ", ".join(f"{name} {_TYPES.get(kind, kind)} {shape}" for name, kind, shape in table) or "nothing"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
