"""What the node publishes, as ROS messages; of a measured frame only what somebody listens to is built."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import Point, PointStamped, Pose, PoseStamped, Quaternion
from sensor_msgs.msg import CameraInfo, Image, PointCloud2
from std_msgs.msg import Header, String

from depthlm_ros.camera import Camera
from depthlm_ros.depth import DepthResult, Frame
from depthlm_ros.messages import cloud_message, depth_message, header_stamp_ns, rgb_message
from depthlm_ros.monitor import Status
from depthlm_ros.overlay import overlay
from depthlm_ros.pose import RelativePose
from depthlm_ros.queries import Query, depth_image, places
from depthlm_ros.remember import remember

DEPTH_OUTPUTS = {"points": PointCloud2, "depth": Image, "depth/camera_info": CameraInfo, "overlay": Image}
POSE_OUTPUT = {"relative_pose": PoseStamped}
REPLIES = {"~/answer": String, "~/query/point": PointStamped}
_LEVELS = {"ok": DiagnosticStatus.OK, "warn": DiagnosticStatus.WARN, "error": DiagnosticStatus.ERROR}


def build_outputs(
    wanted: Collection[str],
    image: np.ndarray,
    camera: Camera,
    info: CameraInfo,
    header: Header,
    query: Query,
    result: DepthResult,
    depth_m: np.ndarray | None = None,
) -> dict[str, Any]:
    """Builds the messages of one frame.

    Args:
        wanted: names of topics among `DEPTH_OUTPUTS`; `depth/camera_info` comes with `depth`.
        image: (H, W, 3) uint8 RGB.
        camera: its intrinsics.
        info: the CameraInfo they were read from; it describes the depth image just as well.
        header: of the image; every output carries its stamp and its optical frame.
        query: what was asked.
        result: what was answered, one row for each of the query's pixels.
        depth_m: (H, W) the depth image; None takes the result's rows alone.

    Returns:
        Topic name to message.
    """
    stamp_ns, frame_id = header_stamp_ns(header), header.frame_id
    messages: dict[str, Any] = {}
    if "points" in wanted:
        messages["points"] = _cloud(image, camera, stamp_ns, frame_id, query, result)
    if "depth" in wanted:
        height, width = image.shape[:2]
        whole = depth_image(result, width, height) if depth_m is None else depth_m
        messages["depth"] = depth_message(whole, stamp_ns, frame_id)
        messages["depth/camera_info"] = copy.copy(info)
        messages["depth/camera_info"].header = header
    if "overlay" in wanted:
        messages["overlay"] = rgb_message(overlay(image, result.pixels, result.depth_m), stamp_ns, frame_id)
    return messages


def pose_message(first: Frame, pose: RelativePose) -> PoseStamped | None:
    """A relative pose as a message: the second camera in the first one's optical frame.

    Its header is the first image's, since a header says in which frame, and when, a pose is expressed: transformed
    with TF at that stamp it is the camera's place at the second image. There is no covariance, because the model says
    none.

    Returns:
        None where part of the pose couldn't be read.
    """
    turned = pose.quaternion_xyzw()
    # Where the camera stayed there is no direction to tell.
    moved = np.zeros(3) if pose.distance_m == 0 else pose.translation_m()
    if not (np.isfinite(turned).all() and np.isfinite(moved).all()):
        return None
    x, y, z = moved.tolist()
    qx, qy, qz, qw = turned.tolist()
    where = Pose(position=Point(x=x, y=y, z=z), orientation=Quaternion(x=qx, y=qy, z=qz, w=qw))
    return PoseStamped(header=_header(first.stamp_ns, first.frame_id), pose=where)


def point_message(frame: Frame, xyz_m: np.ndarray) -> PointStamped:
    """A point (3,) in metres in the optical frame, with the stamp of the image it was asked about."""
    x, y, z = xyz_m.tolist()
    return PointStamped(header=_header(frame.stamp_ns, frame.frame_id), point=Point(x=x, y=y, z=z))


def no_point_message(question: PointStamped) -> PointStamped:
    """What a point question gets that can't be answered: NaN, with the question's own header."""
    return PointStamped(header=question.header, point=Point(x=math.nan, y=math.nan, z=math.nan))


def diagnostics_message(stamp: Any, name: str, hardware_id: str, status: Status) -> DiagnosticArray:
    """Wraps a status for /diagnostics.

    Args:
        stamp: builtin_interfaces/Time.
        name: of the entry, by convention "node: what".
        hardware_id: what the entry is about; here the model.
        status: the content.
    """
    values = [KeyValue(key=key, value=value) for key, value in status.values.items()]
    entry = DiagnosticStatus(
        level=_LEVELS[status.level], name=name, message=status.message, hardware_id=hardware_id, values=values
    )
    return DiagnosticArray(header=Header(stamp=stamp), status=[entry])


def _header(stamp_ns: int, frame_id: str) -> Header:
    seconds, nanoseconds = divmod(stamp_ns, 1_000_000_000)
    return Header(stamp=Time(sec=seconds, nanosec=nanoseconds), frame_id=frame_id)


def _cloud(
    image: np.ndarray, camera: Camera, stamp_ns: int, frame_id: str, query: Query, result: DepthResult
) -> PointCloud2:
    rays, where = _cloud_geometry(camera, result.pixels, query.cloud_rows)
    depth_m, confidence, std_m = result.depth_m, result.confidence, result.std_m
    if query.cloud_rows is not None:
        depth_m, confidence, std_m = (_rows(values, query.cloud_rows) for values in (depth_m, confidence, std_m))
    known = np.isfinite(depth_m)
    if query.organised_shape is None and not known.all():
        rows = np.flatnonzero(known)
        rays, where = rays[:, rows], where[rows]
        depth_m, confidence, std_m = (_rows(values, rows) for values in (depth_m, confidence, std_m))
    # Column by column, as the message's fields are filled.
    points = (rays * depth_m).T
    rgb = np.ascontiguousarray(image).reshape(-1, 3).take(where, axis=0)
    return cloud_message(stamp_ns, frame_id, points, rgb, confidence, query.organised_shape, std_m)


def _rows(values: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if values is None else values[rows]


@remember(4)
def _cloud_geometry(camera: Camera, pixels: np.ndarray, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(3, N) float32 rays with z = 1 through the cloud's pixels, and (N,) where those lie in the flattened image."""
    if rows is not None:
        pixels = pixels[rows]
    return np.ascontiguousarray(camera.rays(pixels).T, np.float32), places(pixels, camera.width)
