"""A LiDAR's clouds and TF label images: geometry by hand, what the camera doesn't see left out."""

import json
import math

import numpy as np
import pytest
from recordings import picture
from rosbags.rosbag2 import StoragePlugin, Writer

from depthlm_ros import bags
from depthlm_ros.bag_labels import LabelSettings, make_set
from depthlm_ros.bags import START_NS
from depthlm_ros.camera import Camera
from depthlm_ros.cli import main
from depthlm_ros.datasets import LabelledImages
from depthlm_ros.errors import BagError, ConfigError, TransformError
from depthlm_ros.lidar import LidarSettings, visible
from depthlm_ros.transforms import TransformTree

CAMERA = Camera(60, 60, 31.5, 23.5, 64, 48)
# A camera that looks along the LiDAR's x axis: its x is the LiDAR's -y, its y the LiDAR's -z (REP 103).
OPTICAL = (-0.5, 0.5, -0.5, 0.5)
STEP_NS = 100_000_000


def types(name):
    return bags._store().types[name]


def header(stamp_ns, frame_id):
    return bags._header(stamp_ns, frame_id)


def transform(parent, child, stamp_ns, at, turned=(0, 0, 0, 1)):
    vector, quaternion = types("geometry_msgs/msg/Vector3")(*map(float, at)), types("geometry_msgs/msg/Quaternion")
    one = types("geometry_msgs/msg/Transform")(vector, quaternion(*map(float, turned)))
    stamped = types("geometry_msgs/msg/TransformStamped")(header(stamp_ns, parent), child, one)
    return types("tf2_msgs/msg/TFMessage")([stamped])


def cloud(stamp_ns, points, times=None, frame_id="lidar"):
    """A PointCloud2 as drivers write it: padding between x, y, z and a ring, NaN where nothing came back."""
    names, formats, offsets = ["x", "y", "z", "ring"], ["<f4", "<f4", "<f4", "<u2"], [0, 4, 8, 16]
    if times is not None:
        names, formats, offsets = [*names, "time"], [*formats, "<f4"], [*offsets, 20]
    rows = np.zeros(len(points), np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": 32}))
    rows["x"], rows["y"], rows["z"] = np.asarray(points, np.float32).T
    if times is not None:
        rows["time"] = times
    kinds = {"<f4": 7, "<u2": 4}
    field = types("sensor_msgs/msg/PointField")
    fields = [field(n, o, kinds[f], 1) for n, f, o in zip(names, formats, offsets, strict=True)]
    data = rows.view(np.uint8).reshape(-1)
    kind = types(bags.CLOUD_TYPE)
    return kind(header(stamp_ns, frame_id), 1, len(rows), fields, False, 32, len(data), data, False)


def write(path, clouds, moving=(), images=1, frame_id="camera_optical"):
    """A recording: LiDAR on the robot, camera 0.2 m ahead of it and 0.1 m lower; `moving` are /tf messages."""
    store = bags._store()
    static = [
        transform("base", "lidar", 0, (0, 0, 1.0)),
        transform("base", "camera_optical", 0, (0.2, 0, 0.9), OPTICAL),
    ]
    said = [("/tf_static", START_NS, message) for message in static]
    said += [("/tf", message.transforms[0].header.stamp.sec * 10**9, message) for message in moving]
    said += [("/lidar/points", START_NS, message) for message in clouds]
    for index in range(images):
        stamp_ns = START_NS + index * STEP_NS
        said.append((bags.INFO_TOPIC, stamp_ns, bags._info_message(header(stamp_ns, frame_id), CAMERA)))
        said.append((bags.IMAGE_TOPIC, stamp_ns, bags._image_message(header(stamp_ns, frame_id), picture(index))))
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {}
        for topic, stamp_ns, message in said:
            kind = message.__msgtype__
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=store)
            writer.write(connections[topic], stamp_ns, bytes(store.serialize_cdr(message, kind)))
    return path


def labels_of(folder):
    (row,) = LabelledImages(folder / "train.jsonl")
    return {tuple(map(int, pixel)): float(z) for pixel, z in zip(row.pixels, row.depth_m, strict=True)}


ALL = LabelSettings(points=0, held_out=0)


def test_points_land_where_geometry_puts_them(tmp_path):
    # 5.2 m ahead, 1.1 m to the left and 1 m up in the LiDAR's frame: for the camera 5 m ahead, 1.1 m left, 1.1 m up.
    points = [(5.2, 1.1, 1.0), (10.2, -2.0, -1.1), (np.nan, np.nan, np.nan), (0, 0, 0), (-4, 0, 0), (5.2, 40, 0)]
    bag = write(tmp_path / "bag", [cloud(START_NS, points)])
    made = make_set(bag, tmp_path / "set", ALL)
    expected = {
        (round(31.5 - 60 * 1.1 / 5), round(23.5 - 60 * 1.1 / 5)): 5.0,
        (round(31.5 + 60 * 2 / 10), round(23.5 + 60 * 1 / 10)): 10.0,
    }
    assert labels_of(tmp_path / "set") == pytest.approx(expected)
    assert made.source == "/lidar/points"
    assert made.dropped["out of view"] == 2


def test_a_robot_that_moves_between_cloud_and_image_is_compensated(tmp_path):
    # 2 m/s ahead in odom: in the 50 ms between cloud and image the wall comes 0.1 m nearer.
    moving = [transform("odom", "base", START_NS + k * STEP_NS, (2.0 * k * 0.1, 0, 0)) for k in (-1, 0, 1)]
    bag = write(tmp_path / "bag", [cloud(START_NS - STEP_NS // 2, [(5.2, 0, -0.1)])], moving)
    made = make_set(bag, tmp_path / "set", ALL)
    assert list(labels_of(tmp_path / "set").values()) == pytest.approx([4.9], abs=1e-4)
    assert "stood still" in made.notes[0]


def test_each_point_of_a_sweep_is_taken_at_its_own_time(tmp_path):
    moving = [transform("odom", "base", START_NS + k * STEP_NS, (2.0 * k * 0.1, 0, 0)) for k in (-1, 0, 1)]
    sweep = cloud(START_NS - STEP_NS, [(5.2, 1, -0.1), (5.2, -1, -0.1)], times=[0.0, 0.1])
    make_set(write(tmp_path / "bag", [sweep], moving), tmp_path / "set", ALL)
    assert sorted(labels_of(tmp_path / "set").values()) == pytest.approx([4.8, 5.0], abs=1e-4)


def test_without_odometry_the_assumption_is_told(tmp_path):
    made = make_set(write(tmp_path / "bag", [cloud(START_NS, [(5, 0, 0)])]), tmp_path / "set", ALL)
    assert "one moment" in made.notes[0]


def test_images_without_a_cloud_or_a_transform_of_their_time_are_counted(tmp_path):
    moving = [transform("odom", "base", START_NS + k * STEP_NS, (0, 0, 0)) for k in (0, 3)]
    clouds = [cloud(START_NS + k * STEP_NS, [(5, 0, 0)]) for k in (0, 1, 4)]
    bag = write(tmp_path / "bag", clouds, moving, images=8)
    made = make_set(bag, tmp_path / "set", ALL, lidar=LidarSettings(max_age_s=0.15))
    assert made.train == 3
    assert made.left_out == {"no transform of its time": 3, "no cloud within 0.15 s": 2}


def wall(x_m, half_m, step_m):
    """Points of a square wall across the LiDAR's x axis."""
    y, z = np.meshgrid(*[np.arange(-half_m, half_m + step_m / 2, step_m)] * 2)
    return np.stack([np.full(y.size, x_m), y.ravel(), z.ravel() - 0.1], axis=1)


def test_a_surface_behind_another_is_no_label(tmp_path):
    # From the LiDAR above, a wall at 8 m is seen over a board that covers it for the camera.
    board, behind = wall(3.2, 0.5, 0.1), wall(8.2, 2.0, 0.1)
    bag = write(tmp_path / "bag", [cloud(START_NS, np.concatenate([board, behind]))])
    made = make_set(bag, tmp_path / "set", ALL)
    assert made.dropped["hidden by a nearer surface"] > 0
    for (u, v), z in labels_of(tmp_path / "set").items():
        covered = abs(u - 31.5) < 8 and abs(v - 23.5) < 8
        assert not covered or z == pytest.approx(3, abs=1e-3)
    far = [pixel for pixel, z in labels_of(tmp_path / "set").items() if z > 7]
    assert len(far) > 500, "the wall beside the board stays"


def test_rings_on_a_floor_are_all_seen():
    # 16 beams from 1 m above: each ring is more than a tenth farther than the last, and none hides another.
    azimuth = np.radians(np.arange(-20, 20, 0.4))
    rings = [1 / math.tan(math.radians(elevation)) for elevation in range(3, 17, 2)]
    points = np.array([(r * math.sin(a), 1.0, r * math.cos(a)) for r in rings for a in azimuth])
    assert visible(points, Camera(500, 500, 319.5, 239.5, 640, 480), beam_deg=2.0).all()


def test_unconnected_frames_are_an_error_that_names_them(tmp_path):
    bag = write(tmp_path / "bag", [cloud(START_NS, [(5, 0, 0)])], frame_id="other_camera")
    with pytest.raises(TransformError, match="'other_camera' hangs below 'other_camera', 'lidar' hangs below 'base'"):
        make_set(bag, tmp_path / "set", ALL)


def test_a_wrong_topic_is_named(tmp_path):
    bag = write(tmp_path / "bag", [cloud(START_NS, [(5, 0, 0)])])
    with pytest.raises(BagError, match="no clouds on '/points'.*/lidar/points"):
        make_set(bag, tmp_path / "set", ALL, cloud_topic="/points")
    with pytest.raises(ConfigError, match="name one of the two"):
        make_set(bag, tmp_path / "set", ALL, cloud_topic="/lidar/points", depth_topic="/depth")


def test_the_command_takes_a_lidar(tmp_path, capsys):
    bag = write(tmp_path / "bag", [cloud(START_NS, [(5, 0, 0), (6, 1, 0)])], images=2)
    command = ["bag", "to-sft", str(bag), str(tmp_path / "set"), "--cloud", "/lidar/points", "--beam-deg", "0.4"]
    assert main([*command, "--held-out", "0"]) == 0
    printed = capsys.readouterr().out
    assert "4 labels from /lidar/points" in printed and "note: no transform moves" in printed
    assert json.loads((tmp_path / "set" / "about.json").read_text())["notes"]


def tree(*messages, static=False):
    made = TransformTree()
    made.add((message, static) for message in messages)
    return made


def test_rotations_are_interpolated_along_the_shorter_way():
    quarter = (0, 0, math.sin(math.pi / 4), math.cos(math.pi / 4))
    negated = tuple(-value for value in quarter)
    for end in (quarter, negated):
        turning = tree(transform("odom", "base", 0, (0, 0, 0)), transform("odom", "base", 100, (1, 0, 0), end))
        pose = turning.between("odom", 50, "base", 50)
        assert pose[:3, 0] == pytest.approx((math.sqrt(0.5), math.sqrt(0.5), 0))
        assert pose[:3, 3] == pytest.approx((0.5, 0, 0))


def test_a_frame_above_the_fixed_one_may_jump():
    # The map frame corrects itself by 10 m between the two times; odometry knows of no such move.
    said = [transform("map", "odom", 0, (0, 0, 0)), transform("map", "odom", 100, (10, 0, 0))]
    said += [transform("odom", "base", 0, (0, 0, 0)), transform("odom", "base", 100, (1, 0, 0))]
    both = tree(*said)
    assert both.between("base", 100, "base", 0, fixed="odom")[:3, 3] == pytest.approx((-1, 0, 0))
    assert both.between("base", 100, "base", 0)[:3, 3] == pytest.approx((-11, 0, 0))


def test_an_inverted_odometry_tree_works_too():
    said = [transform("base", "odom", 0, (0, 0, 0)), transform("base", "odom", 100, (-1, 0, 0))]
    assert tree(*said).between("base", 100, "base", 0, fixed="odom")[:3, 3] == pytest.approx((-1, 0, 0))


def test_time_is_not_extrapolated():
    with pytest.raises(TransformError, match="known from 0 to 100 ns"):
        tree(transform("odom", "base", 0, (0, 0, 0)), transform("odom", "base", 100, (1, 0, 0))).between(
            "odom", 101, "base", 101
        )


def test_rotations_and_trees_that_cannot_be_are_refused():
    with pytest.raises(TransformError, match="is no rotation"):
        tree(transform("odom", "base", 0, (0, 0, 0), (0, 0, 0, 0)))
    with pytest.raises(TransformError, match="own ancestor"):
        tree(transform("a", "b", 0, (0, 0, 0)), transform("b", "a", 0, (0, 0, 0)))
