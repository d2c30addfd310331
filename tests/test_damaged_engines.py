"""Exports that load, run, and are wrong: the start refuses every one of them.

Each is the demo model's real export with one thing damaged, as exporters, runtimes and people damage them. Its sha256
in `engine.json` is the damaged file's own, so that nothing but the answers tells that it is wrong.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from depthlm_ros.camera import Camera
from depthlm_ros.engines import onnxruntime_engine
from depthlm_ros.engines.graph_engine import GRAPH_FILE, INPUT, OUTPUT
from depthlm_ros.errors import EngineError, ModelError
from depthlm_ros.estimator import Estimator
from depthlm_ros.manifest import read_manifest, sha256_of, write_manifest
from depthlm_training.export_targets import export_target

CAMERA = Camera(fx=228.5, fy=228.5, cx=159.5, cy=119.5, width=320, height=240)
PATCH_PX = 16


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The demo model's export for a 320x240 camera."""
    folder = tmp_path_factory.mktemp("damaged") / "demo-onnx"
    export_target("demo", folder, "onnx", CAMERA)
    return folder


class Graph:
    """A graph that is edited."""

    def __init__(self, model) -> None:
        self.model = model
        self._made = 0

    def weight(self, name: str) -> np.ndarray:
        """A constant's values."""
        return numpy_helper.to_array(self._tensor(name)).copy()

    def set_weight(self, name: str, values: np.ndarray) -> None:
        """Changes them."""
        tensor = self._tensor(name)
        assert list(values.shape) == list(tensor.dims)
        assert not np.array_equal(values, numpy_helper.to_array(tensor))
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))

    def constant(self, values: np.ndarray) -> str:
        """A new constant's name."""
        self._made += 1
        self.model.graph.initializer.append(numpy_helper.from_array(values, f"damage_{self._made}"))
        return f"damage_{self._made}"

    def before(self, *steps) -> None:
        """Puts nodes between the input and what reads it; a step is an operator, its other inputs, its attributes."""
        nodes = self.model.graph.node
        readers = [node for node in nodes if INPUT in node.input]
        made, last = self._chain(INPUT, steps)
        for node in readers:
            for place, name in enumerate(node.input):
                if name == INPUT:
                    node.input[place] = last
        kept = list(nodes)
        del nodes[:]
        nodes.extend([*made, *kept])

    def after(self, *steps) -> None:
        """Puts nodes between the result and the output."""
        nodes = self.model.graph.node
        writer = next(node for node in nodes if OUTPUT in node.output)
        writer.output[0] = "clean"
        made, last = self._chain("clean", steps)
        made[-1].output[0] = OUTPUT
        nodes.extend(made)

    def _chain(self, first: str, steps) -> tuple[list, str]:
        made, last = [], first
        for operator, others, attributes in steps:
            self._made += 1
            made.append(helper.make_node(operator, [last, *others], [f"damaged_{self._made}"], **attributes))
            last = f"damaged_{self._made}"
        return made, last

    def _tensor(self, name: str):
        return next(tensor for tensor in self.model.graph.initializer if tensor.name == name)


# ---------------------------------------------------------------- the damages


def one_weight_scaled(graph: Graph) -> None:
    """As by a scale that was lost."""
    name = "language.layers.2.down_proj.weight"
    graph.set_weight(name, 1.5 * graph.weight(name))


def normalisation_of_another_model(graph: Graph) -> None:
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    graph.set_weight("scale", 1 / (255 * std))
    graph.set_weight("offset", -mean / std)


def bytes_not_brought_to_one(graph: Graph) -> None:
    graph.set_weight("scale", 255 * graph.weight("scale"))


def red_and_blue_swapped(graph: Graph) -> None:
    graph.before(("Gather", [graph.constant(np.array([2, 1, 0]))], {"axis": 2}))


def transposed_output(graph: Graph) -> None:
    """Rows and columns mistaken for each other, in a map of the right size."""
    size = numpy_size(graph)
    graph.after(("Transpose", [], {"perm": [1, 0]}), ("Reshape", [graph.constant(np.array(size))], {}))


def mirrored_output(graph: Graph) -> None:
    _, width = numpy_size(graph)
    graph.after(("Gather", [graph.constant(np.arange(width)[::-1].copy())], {"axis": 1}))


def upside_down_output(graph: Graph) -> None:
    height, _ = numpy_size(graph)
    graph.after(("Gather", [graph.constant(np.arange(height)[::-1].copy())], {"axis": 0}))


def millimetres(graph: Graph) -> None:
    graph.after(("Mul", [graph.constant(np.float32(1000))], {}))


def feet(graph: Graph) -> None:
    graph.after(("Mul", [graph.constant(np.float32(3.2808))], {}))


def inverse_depth(graph: Graph) -> None:
    graph.after(("Reciprocal", [], {}))


def head_activation_left_out(graph: Graph) -> None:
    nodes = graph.model.graph.node
    last = next(node for node in nodes if OUTPUT in node.output)
    assert last.op_type == "Exp"
    last.op_type = "Identity"


def image_shifted_by_a_patch(graph: Graph) -> None:
    _, width = numpy_size(graph)
    graph.before(("Gather", [graph.constant(np.maximum(np.arange(width) - PATCH_PX, 0))], {"axis": 1}))


def map_shifted_by_a_patch(graph: Graph) -> None:
    height, _ = numpy_size(graph)
    graph.after(("Gather", [graph.constant(np.maximum(np.arange(height) - PATCH_PX, 0))], {"axis": 0}))


def decoder_layer_left_out(graph: Graph) -> None:
    """A layer that adds nothing to the stream is one that isn't there."""
    for name in ("o_proj", "down_proj"):
        graph.set_weight(f"language.layers.2.{name}.weight", 0 * graph.weight(f"language.layers.2.{name}.weight"))


def vision_block_left_out(graph: Graph) -> None:
    for name in ("proj", "down"):
        for part in ("weight", "bias"):
            graph.set_weight(f"vision.blocks.2.{name}.{part}", 0 * graph.weight(f"vision.blocks.2.{name}.{part}"))


def deepstack_left_out(graph: Graph) -> None:
    for number in range(2):
        for part in ("weight", "bias"):
            name = f"vision.deepstack.{number}.down.{part}"
            graph.set_weight(name, 0 * graph.weight(name))


def deepstack_maps_swapped(graph: Graph) -> None:
    for part in ("norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias"):
        names = [f"vision.deepstack.{number}.{part}" for number in range(2)]
        first, second = map(graph.weight, names)
        graph.set_weight(names[0], second)
        graph.set_weight(names[1], first)


def positions_permuted(graph: Graph) -> None:
    values = graph.weight("vision.position")
    graph.set_weight("vision.position", values[np.random.default_rng(0).permutation(len(values))])


def rotary_angles_row_by_row(graph: Graph) -> None:
    """The vision tower's patches counted along rows, where they come in blocks of two by two."""
    height, width = (side // PATCH_PX for side in numpy_size(graph))
    for name in ("vision.cos", "vision.sin"):
        values = graph.weight(name)
        blocks = values.reshape(height // 2, width // 2, 2, 2, -1).swapaxes(1, 2)
        graph.set_weight(name, blocks.reshape(values.shape))


def rotary_angles_of_text(graph: Graph) -> None:
    """Image tokens counted one after another, as if they were words."""
    cos, sin = graph.weight("language.cos"), graph.weight("language.sin")
    rate = np.arctan2(sin[1, 0], cos[1, 0])  # token 1 is text at place 1
    angles = np.arange(len(cos))[:, None, None] * rate
    graph.set_weight("language.cos", np.cos(angles))
    graph.set_weight("language.sin", np.sin(angles))


def causal_mask_left_out(graph: Graph) -> None:
    graph.set_weight("language.unseen", 0 * graph.weight("language.unseen"))


def constant_output(graph: Graph) -> None:
    graph.after(("Mul", [graph.constant(np.float32(0))], {}), ("Add", [graph.constant(np.float32(3))], {}))


def nan_in_part(graph: Graph) -> None:
    height, width = numpy_size(graph)
    lost = np.ones((height, width), np.float32)
    lost[: height // 4, : width // 4] = np.nan
    graph.after(("Mul", [graph.constant(lost)], {}))


def scale_varies_from_frame_to_frame(graph: Graph) -> None:
    """With the brightness of the image: right on average, wrong in each frame."""
    nodes = graph.model.graph.node
    axes = graph.constant(np.array([0, 1, 2]))
    float_ = onnx.TensorProto.FLOAT
    nodes.extend(
        [
            helper.make_node("Cast", [INPUT], ["bytes"], to=float_),
            helper.make_node("ReduceMean", ["bytes", axes], ["brightness"], keepdims=0),
            helper.make_node("Div", ["brightness", graph.constant(np.float32(110))], ["share"]),
        ]
    )
    graph.after(("Mul", ["share"], {}))


def one_frame_in_darkness_is_off(graph: Graph) -> None:
    """Eight per cent too far where the image is dark, right elsewhere."""
    scale_varies_from_frame_to_frame(graph)
    nodes = graph.model.graph.node
    share = next(node for node in nodes if "share" in node.output)
    share.output[0] = "ratio"
    one, more = graph.constant(np.float32(1)), graph.constant(np.float32(1.08))
    at = list(nodes).index(share) + 1
    nodes.insert(at, helper.make_node("Less", ["ratio", one], ["dark"]))
    nodes.insert(at + 1, helper.make_node("Where", ["dark", more, one], ["share"]))


def weights_rounded_to_three_bits(graph: Graph) -> None:
    """As a quantisation that nobody calibrated."""
    for tensor in list(graph.model.graph.initializer):
        if tensor.name.endswith("weight") and len(tensor.dims) == 2 and tensor.name.startswith("language.layers"):
            values = numpy_helper.to_array(tensor)
            step = np.abs(values).max() / 3
            graph.set_weight(tensor.name, np.round(values / step) * step)


def numpy_size(graph: Graph) -> tuple[int, int]:
    """(height, width) of the map."""
    shape = graph.model.graph.output[0].type.tensor_type.shape.dim
    return shape[0].dim_value, shape[1].dim_value


DAMAGES = (
    one_weight_scaled,
    normalisation_of_another_model,
    bytes_not_brought_to_one,
    red_and_blue_swapped,
    transposed_output,
    mirrored_output,
    upside_down_output,
    millimetres,
    feet,
    inverse_depth,
    head_activation_left_out,
    image_shifted_by_a_patch,
    map_shifted_by_a_patch,
    decoder_layer_left_out,
    vision_block_left_out,
    deepstack_left_out,
    deepstack_maps_swapped,
    positions_permuted,
    rotary_angles_row_by_row,
    rotary_angles_of_text,
    causal_mask_left_out,
    constant_output,
    nan_in_part,
    scale_varies_from_frame_to_frame,
    one_frame_in_darkness_is_off,
    weights_rounded_to_three_bits,
)


def damaged(export: Path, folder: Path, damage: Callable[[Graph], None]) -> Path:
    """A copy of the export with one damage, whose manifest knows the damaged file."""
    shutil.copytree(export, folder, ignore=shutil.ignore_patterns(GRAPH_FILE))
    model = onnx.load(str(export / GRAPH_FILE))
    damage(Graph(model))
    onnx.checker.check_model(model)
    onnx.save_model(model, str(folder / GRAPH_FILE))
    manifest = read_manifest(folder)
    assert manifest is not None
    files = {**manifest.files, GRAPH_FILE: sha256_of(folder / GRAPH_FILE)}
    assert files != manifest.files
    write_manifest(folder, replace(manifest, files=files, parity=()))
    return folder


def load(folder: Path, **options) -> Estimator:
    return Estimator.load(str(folder), engine="onnxruntime", device="cpu", **options)


# ---------------------------------------------------------------- the tests


def test_the_export_itself_is_accepted_and_remembered(export, tmp_path):
    folder = tmp_path / "whole"
    shutil.copytree(export, folder)
    with load(folder) as estimator:
        assert estimator.proof.sentence.startswith("parity with the reference")
        assert estimator.complaints == ()
    manifest = read_manifest(folder)
    assert manifest is not None
    assert [record.passed for record in manifest.parity] == [True]
    with load(folder) as estimator:
        assert estimator.proof.sentence.startswith("parity was checked here on")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_export_is_refused(export, tmp_path, damage):
    folder = damaged(export, tmp_path / "damaged", damage)
    with pytest.raises(EngineError) as refusal:
        load(folder)
    assert any(character.isdigit() for character in str(refusal.value))


def test_a_runtime_that_gives_the_frame_before_is_refused(export, tmp_path, monkeypatch):
    folder = tmp_path / "stale"
    shutil.copytree(export, folder)
    run = onnxruntime_engine._Session.run
    last: list[np.ndarray] = []

    def stale(self, image):
        last.append(run(self, image))
        return last[-2] if len(last) > 1 else last[-1]

    monkeypatch.setattr(onnxruntime_engine._Session, "run", stale)
    with pytest.raises(EngineError, match="does not answer as demo"):
        load(folder)
    assert len(last) > 2


def test_a_damaged_export_can_be_accepted_and_goes_on_complaining(export, tmp_path):
    folder = damaged(export, tmp_path / "feet", feet)
    with load(folder, accept_unproven=True) as estimator:
        assert "3.28" in estimator.complaints[0]
        result = estimator.estimate(np.zeros((240, 320, 3), np.uint8), CAMERA, np.array([[10.0, 10.0]]))
        assert math.isfinite(result.depth_m[0])
    # It is the verdict that is remembered, not the permission.
    with pytest.raises(EngineError, match="scale"):
        load(folder)


@pytest.mark.parametrize("how", ["a bit", "cut", "gone", "swapped"])
def test_a_file_that_is_not_the_exported_one_is_refused_by_name(export, tmp_path, how):
    folder = tmp_path / "files"
    shutil.copytree(export, folder)
    graph = folder / GRAPH_FILE
    whole = bytearray(graph.read_bytes())
    if how == "a bit":
        whole[len(whole) // 2] ^= 1
        graph.write_bytes(whole)
    elif how == "cut":
        graph.write_bytes(whole[: len(whole) // 2])
    elif how == "gone":
        graph.unlink()
    else:
        (folder / "reference" / "frame_0.png").write_bytes((folder / "reference" / "frame_1.png").read_bytes())
    with pytest.raises(ModelError, match="frame_0.png" if how == "swapped" else GRAPH_FILE):
        load(folder)
