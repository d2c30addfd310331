"""Fewer bits for the matrix products of an exported graph, as strongly typed runtimes want it: written into the graph.

Only products and convolutions are computed in the lower format. Norms, softmax, rotary angles, sums of residuals and
the dense head stay in float32, where halves overflow or lose depth; input and output stay as they are. Weights are
stored in the lower format, so that the file is half as large.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from depthlm_ros.errors import ConfigError, MissingDependencyError

PRECISIONS = ("float32", "float16", "bfloat16")
HEAD = "head."
"""What the names of the dense head's weights begin with."""

_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_EMBEDDED_BYTES = 1_500_000_000


def lower_precision(source: Path, out: Path, precision: str) -> None:
    """Writes a graph whose products are computed in another format.

    Args:
        source: a float32 graph; its external data lies beside it.
        out: to write; may be `source`.
        precision: "float16" or "bfloat16".

    Raises:
        MissingDependencyError: onnx isn't installed.
        ConfigError: an unknown precision, or weights beyond the range of float16.
    """
    if precision not in PRECISIONS[1:]:
        raise ConfigError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS[1:])}")
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise MissingDependencyError(
            f"onnx is not installed, a graph in {precision} needs it; run: pip install onnx"
        ) from error
    low = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[precision]
    model = onnx.load(str(source))
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    dense_head = _of_head(graph)
    nodes, lowered = [], {}
    for node in graph.node:
        if node.op_type not in _PRODUCTS or node.name in dense_head:
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            if not name:
                continue
            if name not in lowered:
                lowered[name] = f"{name}.{precision}"
                if name in weights and weights[name].data_type == TensorProto.FLOAT:
                    values = numpy_helper.to_array(weights[name])
                    _check_range(values, name, precision)
                    graph.initializer.append(_tensor(values, lowered[name], low, helper))
                else:
                    nodes.append(helper.make_node("Cast", [name], [lowered[name]], f"{name}.to", to=low))
            node.input[place] = lowered[name]
        result = node.output[0]
        node.output[0] = f"{result}.{precision}"
        nodes += [node, helper.make_node("Cast", [node.output[0]], [result], f"{result}.back", to=TensorProto.FLOAT)]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input} | {tensor.name for tensor in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    data = out.with_name(f"{out.name}.data")
    data.unlink(missing_ok=True)  # onnx would append to it
    large = sum(len(tensor.raw_data) for tensor in graph.initializer) > _EMBEDDED_BYTES
    external = {"save_as_external_data": True, "all_tensors_to_one_file": True, "location": data.name} if large else {}
    onnx.save_model(model, str(out), **external)


def _of_head(graph) -> set[str]:
    """Names of the nodes that the dense head's weights go into, directly or through shapes of theirs."""
    names = {tensor.name for tensor in graph.initializer if tensor.name.startswith(HEAD)}
    return {node.name for node in graph.node if any(name in names for name in node.input)}


def _tensor(values: np.ndarray, name: str, kind: int, helper):
    if kind == helper.np_dtype_to_tensor_dtype(np.dtype(np.float16)):
        return helper.make_tensor(name, kind, values.shape, values.astype(np.float16).tobytes(), raw=True)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # To the nearest, halves to even.
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return helper.make_tensor(name, kind, values.shape, rounded.tobytes(), raw=True)


def _check_range(values: np.ndarray, name: str, precision: str) -> None:
    most = float(np.abs(values).max(initial=0.0))
    if precision == "float16" and not most <= float(np.finfo(np.float16).max):
        raise ConfigError(f"{name} reaches {most:g}, beyond the range of float16; take bfloat16 or float32")
