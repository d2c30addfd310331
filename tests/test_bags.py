"""Recordings come back as they were written, and broken ones say what is wrong with them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from recordings import CAMERA, STEP_NS, drive, floor_depth, picture
from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from depthlm_ros import bags
from depthlm_ros.bags import RecordedFrame, bag_info, read_frames, require_truth, rounded_mantissa, write_bag
from depthlm_ros.camera import Camera, Distortion
from depthlm_ros.depth import Frame
from depthlm_ros.errors import BagError


@pytest.fixture
def bag(tmp_path):
    write_bag(tmp_path / "bag", drive(3), notes={"source": "test"})
    return tmp_path / "bag"


@pytest.mark.parametrize("compression", [None, "png"])
def test_frames_come_back_unchanged(tmp_path, compression):
    write_bag(tmp_path / "bag", drive(3), compression=compression)
    for written, read in zip(drive(3), read_frames(tmp_path / "bag"), strict=True):
        assert np.array_equal(read.frame.image, written.frame.image)
        assert np.array_equal(read.truth_m, written.truth_m, equal_nan=True)
        assert read.frame.camera == CAMERA
        assert (read.frame.stamp_ns, read.frame.frame_id) == (written.frame.stamp_ns, "front_optical_frame")


def test_jpeg_comes_back_nearly_unchanged_and_smaller(tmp_path):
    small = write_bag(tmp_path / "jpeg", drive(3), compression="jpeg:90")
    large = write_bag(tmp_path / "raw", drive(3))
    read = next(read_frames(tmp_path / "jpeg"))
    error = np.abs(read.frame.image.astype(int) - picture(0))
    assert error.mean() < 6
    assert small.size_bytes < large.size_bytes


def test_distortion_is_recorded(tmp_path):
    lens = Camera(60, 60, 31, 24, 64, 48, Distortion("plumb_bob", (0.1, -0.02, 0.001, 0.0, 0.0)))
    write_bag(tmp_path / "bag", [RecordedFrame(Frame(picture(), lens, 1))])
    assert next(read_frames(tmp_path / "bag")).frame.camera == lens


def test_the_same_frames_make_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_bag(tmp_path / name / "bag", drive(2))
    first, second = ((tmp_path / name / "bag" / "bag.mcap").read_bytes() for name in ("a", "b"))
    assert first == second


def test_topics_and_types_are_the_standard_ones(bag):
    with AnyReader([bag]) as reader:
        topics = {connection.topic: connection.msgtype for connection in reader.connections}
        depth = next(
            reader.deserialize(raw, connection.msgtype)
            for connection, _, raw in reader.messages()
            if connection.topic == bags.TRUTH_TOPIC
        )
    assert topics == {
        "/camera/image_raw": "sensor_msgs/msg/Image",
        "/camera/camera_info": "sensor_msgs/msg/CameraInfo",
        "/camera/depth/ground_truth": "sensor_msgs/msg/Image",
    }
    assert (depth.encoding, depth.height, depth.width, depth.step) == ("32FC1", 48, 64, 256)


def test_info_says_what_is_inside(bag):
    info = bag_info(bag)
    assert info.count(info.image_topic) == info.count(info.truth_topic) == 3
    assert info.duration_s == pytest.approx(2 * STEP_NS / 1e9)
    assert info.notes == {"source": "test"}
    assert not info.compressed


def test_a_recording_without_truth_is_read_but_not_scored(tmp_path):
    info = write_bag(tmp_path / "bag", drive(2, truth=False))
    assert [frame.truth_m for frame in read_frames(tmp_path / "bag")] == [None, None]
    with pytest.raises(BagError, match="no ground truth: no /camera/depth/ground_truth"):
        require_truth(info)


def test_existing_recordings_are_not_overwritten(bag):
    before = (bag / "bag.mcap").read_bytes()
    with pytest.raises(BagError, match="exists already"):
        write_bag(bag, drive(1))
    assert (bag / "bag.mcap").read_bytes() == before


def test_a_writer_that_breaks_off_leaves_nothing(tmp_path):
    def frames():
        yield from drive(1)
        raise RuntimeError("the renderer failed")

    with pytest.raises(RuntimeError):
        write_bag(tmp_path / "bag", frames())
    assert list(tmp_path.iterdir()) == []


def test_no_frames_make_no_recording(tmp_path):
    with pytest.raises(BagError, match="no frames"):
        write_bag(tmp_path / "bag", [])
    assert not (tmp_path / "bag").exists()


@pytest.mark.parametrize("compression", ["gif", "jpeg:0", "jpeg:fine", "png:3"])
def test_unknown_compression_is_named(tmp_path, compression):
    with pytest.raises(BagError, match=compression):
        write_bag(tmp_path / "bag", drive(1), compression=compression)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_truncated_recording_is_named_with_its_size(bag, share):
    file = bag / "bag.mcap"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(BagError, match=r"bytes\) can't be read: .*copy it again"):
        list(read_frames(bag))


def test_a_damaged_recording_is_refused(bag):
    file = bag / "bag.mcap"
    raw = bytearray(file.read_bytes())
    middle = len(raw) // 3
    raw[middle : middle + 200] = bytes(200)
    file.write_bytes(bytes(raw))
    with pytest.raises(BagError, match="can't be read"):
        list(read_frames(bag))


def test_metadata_that_is_no_yaml_is_refused(bag):
    (bag / "metadata.yaml").write_text("{{{")
    with pytest.raises(BagError, match="can't be read"):
        bag_info(bag)


def test_missing_recordings_say_what_to_give(tmp_path):
    with pytest.raises(BagError, match="does not exist"):
        bag_info(tmp_path / "none")
    with pytest.raises(BagError, match="no metadata.yaml"):
        bag_info(tmp_path)


def test_an_mcap_file_alone_is_read(bag):
    assert len(list(read_frames(bag / "bag.mcap"))) == 3


def write_raw(path, messages, storage=StoragePlugin.MCAP):
    """Writes (topic, type, message, stamp) as they are."""
    store = get_typestore(Stores.ROS2_KILTED)
    with Writer(path, version=9, storage_plugin=storage) as writer:
        connections = {}
        for topic, kind, message, stamp_ns in messages:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=store)
            writer.write(connections[topic], stamp_ns, bytes(store.serialize_cdr(message, kind)))


def image_at(topic, stamp_ns, image=None):
    image = picture() if image is None else image
    return topic, bags.IMAGE_TYPE, bags._image_message(bags._header(stamp_ns, "f"), image), stamp_ns


def info_at(topic, stamp_ns):
    return topic, bags.INFO_TYPE, bags._info_message(bags._header(stamp_ns, "f"), CAMERA), stamp_ns


def truth_at(stamp_ns, depth):
    return bags.TRUTH_TOPIC, bags.IMAGE_TYPE, bags._depth_message(bags._header(stamp_ns, "f"), depth), stamp_ns


def test_missing_camera_info_is_named(tmp_path):
    write_raw(tmp_path / "bag", [image_at("/front/image", 1)])
    with pytest.raises(BagError, match=r"no CameraInfo on /front/camera_info for /front/image.*/front/image \(1\)"):
        list(read_frames(tmp_path / "bag"))


def test_missing_images_are_named(tmp_path):
    write_raw(tmp_path / "bag", [info_at("/front/camera_info", 1)])
    with pytest.raises(BagError, match=r"has no images.*/front/camera_info \(1\)"):
        list(read_frames(tmp_path / "bag"))


def test_an_image_topic_that_is_not_there_is_named(bag):
    with pytest.raises(BagError, match="no images on '/rear/image'.*/camera/image_raw"):
        bag_info(bag, "/rear/image")


@pytest.mark.parametrize("storage", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_somebody_elses_recording_is_understood(tmp_path, storage):
    messages = [image_at("/front/depth", 5), info_at("/front/camera_info", 8), image_at("/front/image", 9)]
    write_raw(tmp_path / "bag", messages, storage)
    frames = list(read_frames(tmp_path / "bag"))
    assert bag_info(tmp_path / "bag").image_topic == "/front/image"
    assert [frame.frame.stamp_ns for frame in frames] == [9]


def test_camera_info_recorded_after_its_image_is_found(tmp_path):
    write_raw(tmp_path / "bag", [image_at("/c/image_raw", 10), info_at("/c/camera_info", 11)])
    assert next(read_frames(tmp_path / "bag")).frame.camera == CAMERA


def test_truth_of_another_time_is_not_taken(tmp_path):
    second = 10**9
    messages = [info_at("/c/camera_info", 0), image_at("/c/image_raw", 0), truth_at(second, floor_depth())]
    write_raw(tmp_path / "bag", messages)
    assert next(read_frames(tmp_path / "bag")).truth_m is None


def test_truth_of_another_size_is_refused(tmp_path):
    messages = [info_at("/c/camera_info", 0), image_at("/c/image_raw", 0), truth_at(0, floor_depth(32, 24))]
    write_raw(tmp_path / "bag", messages)
    with pytest.raises(BagError, match="ground truth is 32x24 but the image is 64x48"):
        list(read_frames(tmp_path / "bag"))


depths = arrays.arrays(np.float32, (7,), elements=st.floats(0.015625, 65536, width=32) | st.just(float("nan")))


@given(depths, st.integers(8, 23))
def test_rounding_keeps_the_promised_precision(values, bits):
    rounded = rounded_mantissa(values, bits)
    known = np.isfinite(values)
    assert np.array_equal(np.isfinite(rounded), known)
    assert (np.abs(rounded[known] - values[known]) <= values[known] * 2.0 ** -(bits + 1)).all()
    assert not (rounded[known].view(np.uint32) & ((1 << (23 - bits)) - 1)).any()


def test_rounded_depth_of_a_surface_takes_half_the_room(tmp_path):
    v, u = np.mgrid[0:240, 0:320]
    plane = (300 / (60 + 0.31 * u + 0.77 * v)).astype(np.float32)
    camera = Camera(200, 200, 160, 120, 320, 240)
    black = Frame(np.zeros((240, 320, 3), np.uint8), camera, 1)
    exact = write_bag(tmp_path / "exact", [RecordedFrame(black, plane)])
    rounded = write_bag(tmp_path / "rounded", [RecordedFrame(black, plane)], depth_bits=12)
    assert rounded.size_bytes < 0.5 * exact.size_bytes
