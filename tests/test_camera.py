"""From CameraInfo to rays and points; held against OpenCV's projections and image_geometry's rules."""

import copy
import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rosbags.typesys import Stores, get_typestore

from depthlm_ros.camera import Camera, Distortion, camera_from_info
from depthlm_ros.errors import CameraError, DistortionModelError, PixelError

PLUMB_BOB = Distortion("plumb_bob", (-0.28, 0.07, 2e-4, -1e-4, 0.01))
RATIONAL = Distortion("rational_polynomial", (0.65, -2.6, 7e-4, -3e-4, 1.6, 0.53, -2.4, 1.5))
EQUIDISTANT = Distortion("equidistant", (-0.013, 0.02, -0.012, 0.002))
LENSES = [PLUMB_BOB, RATIONAL, EQUIDISTANT]
each_lens = pytest.mark.parametrize("lens", LENSES, ids=lambda lens: lens.model)
either_kind = pytest.mark.parametrize("rectified", [True, False], ids=["rectified", "raw"])


def make_info(**changes):
    roi = SimpleNamespace(x_offset=0, y_offset=0, height=0, width=0, do_rectify=False)
    info = SimpleNamespace(
        width=640,
        height=480,
        distortion_model="plumb_bob",
        d=list(PLUMB_BOB.coefficients),
        k=[525.0, 0, 320.0, 0, 526.0, 241.0, 0, 0, 1],
        r=[1.0, 0, 0, 0, 1, 0, 0, 0, 1],
        p=[500.0, 0, 318.0, 0, 0, 501.0, 239.0, 0, 0, 0, 1, 0],
        binning_x=0,
        binning_y=0,
        roi=roi,
    )
    for name, value in changes.items():
        part = roi if name.startswith("roi_") else info
        setattr(part, name.removeprefix("roi_"), value)
    return info


def intrinsics(camera):
    return (camera.fx, camera.fy, camera.cx, camera.cy, camera.width, camera.height)


# --- CameraInfo -------------------------------------------------------------------------------------------------------


def test_a_rectified_image_is_described_by_p_and_has_no_distortion():
    camera = camera_from_info(make_info(), (640, 480), rectified=True)
    assert intrinsics(camera) == (500, 501, 318, 239, 640, 480)
    assert camera.distortion == Distortion()


@each_lens
def test_a_raw_image_is_described_by_k_and_d(lens):
    info = make_info(distortion_model=lens.model, d=list(lens.coefficients))
    camera = camera_from_info(info, (640, 480), rectified=False)
    assert intrinsics(camera) == (525, 526, 320, 241, 640, 480)
    assert camera.distortion == lens


def test_a_message_of_ros_serves_as_it_is():
    types = get_typestore(Stores.ROS2_KILTED).types
    time = types["builtin_interfaces/msg/Time"](0, 0)
    info = types["sensor_msgs/msg/CameraInfo"](
        header=types["std_msgs/msg/Header"](time, "camera"),
        roi=types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False),
        **{
            name: np.array(value, float) if isinstance(value, list) else value
            for name, value in vars(make_info()).items()
            if name != "roi"
        },
    )
    assert camera_from_info(info, (640, 480), rectified=False) == Camera(525, 526, 320, 241, 640, 480, PLUMB_BOB)


@either_kind
def test_region_of_interest_and_binning_scale_the_intrinsics_as_image_geometry_does(rectified):
    window = {"roi_x_offset": 100, "roi_y_offset": 60, "roi_width": 400, "roi_height": 300}
    whole = camera_from_info(make_info(), (640, 480), rectified)
    camera = camera_from_info(make_info(binning_x=2, binning_y=3, **window), (200, 100), rectified)
    expected = (whole.fx / 2, whole.fy / 3, (whole.cx - 100) / 2, (whole.cy - 60) / 3, 200, 100)
    assert intrinsics(camera) == pytest.approx(expected)


def test_a_window_of_the_sensor_sees_the_same_rays():
    whole = camera_from_info(make_info(), (640, 480), rectified=False)
    part = camera_from_info(
        make_info(roi_x_offset=100, roi_y_offset=60, roi_width=400, roi_height=300), (400, 300), rectified=False
    )
    pixels = np.array([[0.0, 0.0], [399, 299], [200.5, 17.25]])
    np.testing.assert_allclose(part.rays(pixels), whole.rays(pixels + (100, 60)), atol=1e-9)


def test_a_window_that_leaves_the_sensor_is_refused():
    with pytest.raises(CameraError, match=r"\(500, 0\).*640x480"):
        camera_from_info(make_info(roi_x_offset=500, roi_width=200, roi_height=480), (200, 480), rectified=True)


@either_kind
def test_an_uncalibrated_camera_is_named_so(rectified):
    with pytest.raises(CameraError, match=r"uncalibrated.*K\[0\] is 0.*calibrate"):
        camera_from_info(make_info(k=[0.0] * 9), (640, 480), rectified)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@either_kind
def test_non_finite_intrinsics_are_refused(rectified, bad):
    info = make_info()
    (info.p if rectified else info.k)[2] = bad
    with pytest.raises(CameraError, match="non-finite.*" + str(bad)):
        camera_from_info(info, (640, 480), rectified)


@either_kind
def test_nan_in_the_first_element_of_k_is_refused(rectified):
    info = make_info()
    info.k[0] = math.nan
    if rectified:
        assert camera_from_info(info, (640, 480), rectified).fx == 500
    else:
        with pytest.raises(CameraError, match="non-finite"):
            camera_from_info(info, (640, 480), rectified)


@pytest.mark.parametrize("focal", [-525.0, 0.0])
def test_a_vertical_focal_length_that_is_not_positive_is_refused(focal):
    info = make_info()
    info.k[4] = focal
    with pytest.raises(CameraError, match="above zero"):
        camera_from_info(info, (640, 480), rectified=False)


def test_an_empty_p_names_the_setting_for_raw_images():
    with pytest.raises(CameraError, match="CameraInfo.P.*rectified: false"):
        camera_from_info(make_info(p=[0.0] * 12), (640, 480), rectified=True)


@either_kind
def test_another_size_than_the_images_is_named_with_both_sizes(rectified):
    with pytest.raises(CameraError, match="image is 320x240 but CameraInfo describes 640x480"):
        camera_from_info(make_info(), (320, 240), rectified)


@pytest.mark.parametrize(
    ("model", "remedy"),
    [("fisheye", "equidistant"), ("plum_bob", "plumb_bob"), ("radtan", "plumb_bob"), ("x", "Rectify the image")],
)
def test_an_unknown_lens_model_is_named_with_the_nearest_known(model, remedy):
    with pytest.raises(DistortionModelError, match=f"unknown distortion model '{model}'.*{remedy}"):
        camera_from_info(make_info(distortion_model=model), (640, 480), rectified=False)


def test_the_lens_model_of_a_rectified_image_is_not_read():
    camera = camera_from_info(make_info(distortion_model="omnidirectional"), (640, 480), rectified=True)
    assert camera.distortion == Distortion()


@pytest.mark.parametrize(
    ("model", "count"), [("plumb_bob", 3), ("plumb_bob", 8), ("rational_polynomial", 5), ("equidistant", 0)]
)
def test_a_wrong_number_of_coefficients_is_named(model, count):
    with pytest.raises(DistortionModelError, match=f"'{model}' has .* coefficients, got {count}"):
        camera_from_info(make_info(distortion_model=model, d=[0.1] * count), (640, 480), rectified=False)


def test_non_finite_coefficients_are_refused():
    with pytest.raises(DistortionModelError, match="not all finite"):
        camera_from_info(make_info(d=[math.nan, 0, 0, 0, 0]), (640, 480), rectified=False)


def test_coefficients_without_a_model_are_refused():
    with pytest.raises(DistortionModelError, match="distortion_model is empty"):
        camera_from_info(make_info(distortion_model=""), (640, 480), rectified=False)


@pytest.mark.parametrize(("model", "d"), [("plumb_bob", []), ("plumb_bob", [0.0] * 5), ("", []), ("", [0.0] * 5)])
def test_a_simulated_perfect_lens_is_a_pinhole(model, d):
    camera = camera_from_info(make_info(distortion_model=model, d=d), (640, 480), rectified=False)
    assert camera.distortion == Distortion()


def test_a_fisheye_with_zeros_stays_a_fisheye():
    info = make_info(distortion_model="equidistant", d=[0.0] * 4)
    assert camera_from_info(info, (640, 480), rectified=False).distortion.model == "equidistant"


@pytest.mark.parametrize("name", ["k", "p"])
def test_a_matrix_of_another_length_is_named(name):
    with pytest.raises(CameraError, match=f"{name.upper()} has 8 numbers"):
        camera_from_info(make_info(**{name: [1.0] * 8}), (640, 480), rectified=True)


def test_reading_leaves_the_message_alone():
    info = make_info(binning_x=2, binning_y=2)
    before = copy.deepcopy(info)
    camera_from_info(info, (320, 240), rectified=False)
    assert info == before


# --- Camera -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [(0, 1, 0, 0, 4, 4), (1, -1, 0, 0, 4, 4), (1, 1, math.nan, 0, 4, 4), (1, 1, 0, 0, 0, 4), (1, 1, 0, 0, 4, 2.5)],
)
def test_a_camera_that_cannot_be_is_refused(values):
    with pytest.raises(CameraError):
        Camera(*values)


def test_integer_coordinates_are_pixel_centres():
    camera = Camera(100, 200, 31.5, 23.5, 64, 48)
    points = camera.unproject(np.array([[31.5, 23.5], [81.5, 23.5]]), [2.0, 4.0])
    np.testing.assert_allclose(points, [[0, 0, 2], [2, 0, 4]])
    assert camera.contains(np.array([[-0.5, -0.5], [63.49, 47.49], [63.5, 0], [-0.51, 0], [np.nan, 0]])).tolist() == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_a_cropped_camera_sees_the_same_ray_at_the_shifted_pixel():
    camera = Camera(100, 110, 31.5, 23.5, 64, 48, PLUMB_BOB)
    np.testing.assert_allclose(camera.cropped(7, 5, 30, 20).rays([[3.0, 4.0]]), camera.rays([[10.0, 9.0]]))


def test_a_crop_outside_of_the_image_is_refused():
    with pytest.raises(CameraError, match="leaves the 64x48 image"):
        Camera(100, 110, 31.5, 23.5, 64, 48).cropped(60, 0, 5, 5)


def test_a_scaled_camera_keeps_pixel_areas():
    camera = Camera(100, 110, 31.5, 23.5, 64, 48)
    half = camera.scaled(0.5, 0.25)
    assert (half.width, half.height) == (32, 12)
    # The outer corner of the image is the outer corner of the scaled image.
    np.testing.assert_allclose(half.rays([[31.5, 11.5]]), camera.rays([[63.5, 47.5]]))
    np.testing.assert_allclose(half.rays([[-0.5, -0.5]]), camera.rays([[-0.5, -0.5]]))


def test_points_behind_the_camera_have_no_pixel():
    assert np.isnan(Camera(100, 100, 32, 24, 64, 48).project([[0.0, 0, -1], [0, 0, 0]])).all()


def test_whole_maps_of_pixels_are_taken_too():
    assert Camera(100, 100, 32, 24, 64, 48, PLUMB_BOB).rays(np.zeros((4, 5, 2))).shape == (4, 5, 3)


def test_pixels_of_another_shape_are_named():
    with pytest.raises(PixelError, match=r"\(4, 3\)"):
        Camera(100, 100, 32, 24, 64, 48).rays(np.zeros((4, 3)))


# --- lenses -----------------------------------------------------------------------------------------------------------


def points_before(camera, tangent, count=500):
    rng = np.random.default_rng(0)
    z = rng.uniform(0.3, 40, count)
    return np.column_stack([rng.uniform(-tangent, tangent, (count, 2)) * z[:, None], z])


@each_lens
def test_projection_equals_opencvs(lens):
    camera = Camera(525, 526, 320, 241, 640, 480, lens)
    points = points_before(camera, tangent=0.6)
    if lens.model == "equidistant":
        coefficients = np.array(lens.coefficients)
        expected = cv2.fisheye.projectPoints(points[:, None], np.zeros(3), np.zeros(3), camera.matrix, coefficients)[0]
    else:
        coefficients = np.array(lens.coefficients)
        expected = cv2.projectPoints(points, np.zeros(3), np.zeros(3), camera.matrix, coefficients)[0]
    np.testing.assert_allclose(camera.project(points), expected.reshape(-1, 2), atol=1e-6)


@each_lens
def test_every_pixel_of_a_usual_camera_has_a_ray(lens):
    camera = Camera(525, 526, 320, 241, 640, 480, lens)
    pixels = np.stack(np.meshgrid(np.arange(0, 640, 7.0), np.arange(0, 480, 7.0)), axis=-1)
    np.testing.assert_allclose(camera.project(camera.rays(pixels)), pixels, atol=1e-4)


small = st.floats(-0.002, 0.002)
lenses = st.one_of(
    st.builds(
        lambda k1, k2, p1, p2, k3: Distortion("plumb_bob", (k1, k2, p1, p2, k3)),
        st.floats(-0.4, 0.4), st.floats(-0.2, 0.2), small, small, st.floats(-0.05, 0.05),
    ),
    st.builds(
        lambda ks, p1, p2: Distortion("rational_polynomial", (*ks[:2], p1, p2, *ks[2:])),
        st.tuples(*[st.floats(-0.3, 0.3)] * 6), small, small,
    ),
    st.builds(lambda ks: Distortion("equidistant", ks), st.tuples(*[st.floats(-0.05, 0.05)] * 4)),
)  # fmt: skip


def field_radius(lens):
    """How far from the axis the lens stays one-to-one, found by walking outwards; at most tan 60 degrees."""
    radii = np.linspace(0, math.tan(math.radians(60)), 400)
    bent = lens.distort(np.column_stack([radii, np.zeros_like(radii)]))[:, 0]
    falling = np.flatnonzero(~(np.diff(bent) > 0))
    return radii[falling[0]] if len(falling) else radii[-1]


@settings(max_examples=150, deadline=None)
@given(lens=lenses, reach=st.floats(0, 0.85), angle=st.floats(0, 2 * math.pi), z=st.floats(0.05, 200))
def test_projecting_undoes_unprojecting_in_the_valid_field(lens, reach, angle, z):
    camera = Camera(525, 526, 320, 241, 640, 480, lens)
    radius = reach * field_radius(lens)
    point = np.array([[radius * math.cos(angle), radius * math.sin(angle), 1.0]]) * z
    pixel = camera.project(point)
    assert np.isfinite(pixel).all()
    back = camera.unproject(pixel, [z])
    np.testing.assert_allclose(back, point, rtol=0, atol=1e-5 * z)
    np.testing.assert_allclose(camera.project(back), pixel, rtol=0, atol=1e-3)


@settings(max_examples=100, deadline=None)
@given(lens=lenses, u=st.floats(-2000, 3000), v=st.floats(-2000, 3000))
def test_a_pixel_either_has_a_ray_that_comes_back_or_none_at_all(lens, u, v):
    camera = Camera(525, 526, 320, 241, 640, 480, lens)
    ray = camera.rays([[u, v]])
    assert np.isnan(ray).all() or np.allclose(camera.project(ray), [[u, v]], rtol=0, atol=1e-3)


def test_beyond_the_fold_of_a_barrel_lens_there_is_nothing():
    lens = Distortion("plumb_bob", (-0.3, 0, 0, 0, 0))
    # r (1 - 0.3 r²) rises up to r = 1 / sqrt(0.9), where it is 0.7027.
    assert np.isfinite(lens.undistort([[0.70, 0.0]])).all()
    assert np.isnan(lens.undistort([[0.71, 0.0]])).all()
    assert np.isfinite(lens.distort([[1.05, 0.0]])).all()
    assert np.isnan(lens.distort([[1.06, 0.0]])).all()


def test_a_lens_with_a_pole_is_inverted_right_up_to_it():
    lens = Distortion("rational_polynomial", (0, 0, 0, 0, 0, 0, -0.25, 0))  # 1 / (1 - r⁴ / 4): pole at r = sqrt(2)
    ideal = np.column_stack([np.linspace(0, 1.4, 50), np.zeros(50)])
    np.testing.assert_allclose(lens.undistort(lens.distort(ideal)), ideal, atol=1e-6)


def test_coefficients_next_to_nothing_do_no_harm():
    np.testing.assert_allclose(Distortion("equidistant", (0, 0, 0, 5e-324)).distort([[1.0, 0]]), [[math.pi / 4, 0]])


def test_a_fisheye_has_no_ray_at_right_angles_to_the_axis():
    lens = Distortion("equidistant", (0, 0, 0, 0))
    rays = lens.undistort([[math.radians(80), 0.0], [math.radians(90), 0.0], [math.radians(120), 0.0]])
    np.testing.assert_allclose(rays[0], [math.tan(math.radians(80)), 0])
    assert np.isnan(rays[1:]).all()


@each_lens
def test_the_axis_itself_is_unbent(lens):
    assert lens.distort([[0.0, 0.0]]).tolist() == [[0, 0]]
    assert lens.undistort([[0.0, 0.0]]).tolist() == [[0, 0]]
