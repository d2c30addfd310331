"""Focal-length unification: where a source pixel lands in the view, and whether the image agrees with it."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from depthlm_ros.camera import Camera, Distortion, UnifiedView, sample_map, unify
from depthlm_ros.engines.base import ImageGrid
from depthlm_ros.errors import CameraError, ConfigError, ImageError, PixelError

GRID = ImageGrid(multiple=32, min_pixels=65_536, max_pixels=16_777_216)
NO_LENS = Distortion()
LENSES = [
    Distortion("plumb_bob", (-0.28, 0.07, 2e-4, -1e-4, 0.01)),
    Distortion("rational_polynomial", (0.65, -2.6, 7e-4, -3e-4, 1.6, 0.53, -2.4, 1.5)),
    Distortion("equidistant", (-0.013, 0.02, -0.012, 0.002)),
]
each_lens = pytest.mark.parametrize("lens", LENSES, ids=lambda lens: lens.model)
any_lens = pytest.mark.parametrize("lens", [NO_LENS, *LENSES], ids=lambda lens: lens.model)
any_policy = pytest.mark.parametrize("policy", ["published", "exact"])


def make_camera(lens=NO_LENS, width=320, height=240):
    return Camera(262.5, 264.0, 158.3, 121.9, width, height, lens)


def blank(camera, value=0):
    return np.full((camera.height, camera.width, 3), value, np.uint8)


def blobs(camera, centres, sigma):
    """An image with a soft white spot around each centre."""
    v, u = np.mgrid[0 : camera.height, 0 : camera.width]
    light = sum(np.exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * sigma**2)) for x, y in centres)
    return np.repeat(np.rint(255 * light).astype(np.uint8)[..., None], 3, axis=2)


def centre_of_mass(image, near, radius):
    """Centre of the light within a window around `near`."""
    u0, v0 = np.rint(near).astype(int) - radius
    window = image[v0 : v0 + 2 * radius + 1, u0 : u0 + 2 * radius + 1, 0].astype(float)
    v, u = np.mgrid[v0 : v0 + 2 * radius + 1, u0 : u0 + 2 * radius + 1]
    return np.array([(u * window).sum(), (v * window).sum()]) / window.sum()


# --- exact: geometry --------------------------------------------------------------------------------------------------


@any_lens
def test_exact_has_the_asked_focal_length_on_both_axes_and_no_distortion(lens):
    view = unify(blank(make_camera(lens)), make_camera(lens), 200, "exact", GRID)
    assert (view.camera.fx, view.camera.fy, view.camera.distortion) == (200, 200, NO_LENS)
    assert view.image.shape == (view.camera.height, view.camera.width, 3)
    assert view.policy == "exact" and view.source == make_camera(lens)


def test_exact_maps_pixel_centres_by_areas():
    camera = make_camera()
    view = unify(blank(camera), camera, 200, "exact", GRID)
    pixels = np.array([[0, 0], [319, 239], [17.25, 200.5]])
    scale = np.array([200 / 262.5, 200 / 264.0])
    np.testing.assert_allclose(view.from_source(pixels), (pixels + 0.5) * scale - 0.5, atol=1e-9)


@any_lens
@any_policy
def test_the_view_camera_sees_the_ray_of_the_source_pixel(lens, policy):
    camera = make_camera(lens)
    view = unify(blank(camera), camera, 200, policy, GRID)
    pixels = np.random.default_rng(1).uniform((20, 20), (300, 220), (100, 2))
    slack = 1e-9 if policy == "exact" else 1.0 / 200  # one truncated pixel
    np.testing.assert_allclose(view.camera.rays(view.from_source(pixels)), camera.rays(pixels), atol=slack)


cameras = st.builds(
    lambda fx, ratio, cx, cy, width, height, lens: Camera(
        fx, fx * ratio, cx * (width - 1), cy * (height - 1), width, height, lens
    ),
    st.floats(150, 700), st.floats(0.9, 1.1), st.floats(0.4, 0.6), st.floats(0.4, 0.6),
    st.integers(16, 400), st.integers(16, 300), st.sampled_from([NO_LENS, *LENSES]),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(camera=cameras, focal=st.floats(60, 400), multiple=st.sampled_from([1, 16, 28, 32]))
def test_exact_covers_the_source_and_returns_to_it(camera, focal, multiple):
    view = unify(blank(camera), camera, focal, "exact", ImageGrid(multiple, 3136, 1 << 24))
    assert view.camera.width % multiple == 0 and view.camera.height % multiple == 0
    assert view.camera.width * view.camera.height >= 3136
    across, down = np.linspace(0, camera.width - 1, 9), np.linspace(0, camera.height - 1, 9)
    pixels = np.stack(np.meshgrid(across, down), axis=-1).reshape(-1, 2)
    rays = camera.rays(pixels)
    reachable = np.abs(rays[:, :2]).max(axis=1) < np.tan(np.radians(60))
    assert reachable.sum() > 0 if camera.distortion != NO_LENS else reachable.all()
    seen = view.from_source(pixels[reachable])
    assert view.inside(seen).all()
    tolerance = 1e-3 if camera.distortion == NO_LENS else 0.05
    np.testing.assert_allclose(view.to_source(seen), pixels[reachable], rtol=0, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(camera=cameras, focal=st.floats(60, 400))
def test_published_keeps_pixels_whole_and_within_one_of_their_ray(camera, focal):
    view = unify(blank(camera), camera, focal, "published")
    pixels = np.random.default_rng(0).uniform((0, 0), (camera.width - 1, camera.height - 1), (50, 2))
    seen = view.from_source(pixels)
    has_ray = np.isfinite(seen).all(axis=1)
    assert (seen[has_ray] == np.trunc(seen[has_ray])).all()
    untruncated = view.camera.project(camera.rays(pixels))
    assert (np.abs(untruncated - seen)[has_ray] < 1 + 1e-6).all()


def test_the_view_is_the_least_whole_multiple_that_holds_the_source():
    camera = Camera(525, 525, 319.5, 239.5, 640, 480)
    view = unify(blank(camera), camera, 200, "exact", ImageGrid(32, 3136, 1 << 24))
    assert (view.camera.width, view.camera.height) == (256, 192)  # of 243.8 x 182.9


def test_the_view_never_has_fewer_pixels_than_the_processor_wants():
    camera = Camera(100, 100, 31.5, 23.5, 64, 48)
    view = unify(blank(camera), camera, 100, "exact", GRID)
    assert (view.camera.width, view.camera.height) == (256, 256)


def test_what_is_left_over_repeats_the_last_column_and_row():
    camera = Camera(100, 100, 31.5, 23.5, 64, 48)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    view = unify(image, camera, 100, "exact", GRID)
    assert (view.image[:48, :64] == image).all()
    assert (view.image[:48, 64:] == image[:, -1:]).all()
    assert (view.image[48:, :64] == image[-1:]).all()


@pytest.mark.parametrize("policy", ["published", "exact"])
def test_an_image_at_the_models_focal_length_is_shown_byte_for_byte(policy):
    camera = Camera(200, 200, 31.5, 23.5, 64, 48)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    assert (unify(image, camera, 200, policy).image == image).all()


def test_too_many_pixels_for_the_model_is_an_error_with_a_remedy():
    camera = make_camera()
    with pytest.raises(CameraError, match=r"320x240 image with fx 262.5 px becomes 1248x928.*crop the image"):
        unify(blank(camera), camera, 1000, "exact", ImageGrid(32, 3136, 1_000_000))


@any_policy
def test_intrinsics_in_another_unit_do_not_fill_the_memory(policy):
    camera = Camera(0.0042, 0.0042, 0.003, 0.002, 640, 480)
    with pytest.raises(CameraError, match="Check the unit"):
        unify(blank(camera), camera, 1000, policy)


def test_published_refuses_a_view_without_pixels():
    camera = Camera(10_000, 10_000, 4, 4, 9, 9)
    with pytest.raises(CameraError, match="becomes 0x0"):
        unify(blank(camera), camera, 1000, "published")


def test_a_fisheye_is_shown_up_to_sixty_degrees_and_says_what_is_outside():
    camera = Camera(100, 100, 159.5, 119.5, 320, 240, Distortion("equidistant", (0.0,) * 4))
    view = unify(blank(camera), camera, 100, "exact", ImageGrid(1, 1, 1 << 24))
    reach = 100 * np.tan(np.radians(60))
    np.testing.assert_allclose([view.camera.width, view.camera.height], 2 * reach, atol=1)
    inside = view.inside(view.from_source([[159.5 + 100 * np.radians(a), 119.5] for a in (0, 59, 61, 85)]))
    assert inside.tolist() == [True, True, False, False]


# --- exact: the image agrees with the geometry ------------------------------------------------------------------------


@any_lens
@pytest.mark.parametrize("focal", [90, 200, 262.5, 400])
def test_a_spot_in_the_source_is_seen_where_its_pixel_is_said_to_land(lens, focal):
    camera = make_camera(lens)
    centres = np.array([[158.3, 121.9], [70.25, 60.5], [250.75, 180.0], [80.0, 170.6], [240.0, 50.4]])
    # Small, because a bent lens moves the centre of anything wide.
    sigma = 2.0
    view = unify(blobs(camera, centres, sigma), camera, focal, "exact", GRID)
    for centre, expected in zip(centres, view.from_source(centres), strict=True):
        radius = int(np.ceil(5 * sigma * focal / 262.5)) + 2
        found = centre_of_mass(view.image, expected, radius)
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.1, err_msg=f"spot at {centre}")


@any_lens
@pytest.mark.parametrize("focal", [40, 90, 200, 400])
@pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])
def test_a_gradient_read_at_a_view_pixel_is_the_source_pixels(lens, focal, axis):
    camera = make_camera(lens)
    start = 32 if axis == 0 else 0
    ramp = blank(camera)
    ramp[..., 0] = np.clip(np.indices(ramp.shape[:2])[1 - axis] - start, 0, 255)
    ramp[..., 1] = 255 - ramp[..., 0]
    view = unify(ramp, camera, focal, "exact", GRID)
    pixels = np.random.default_rng(2).uniform((45, 15), (275, 225), (1000, 2))
    seen = view.from_source(pixels)
    # One level is one pixel. Reducing, remapping and averaging each round by up to half a level, which the rising
    # and the falling ramp cancel on average only; a shift of the geometry moves the mean.
    rising, falling = sample_map(view.image[..., 0], seen), sample_map(view.image[..., 1], seen)
    error_px = (rising - falling + 255) / 2 + start - pixels[:, axis]
    assert abs(error_px.mean()) < 0.1
    assert np.abs(error_px).max() < 1.0


@any_lens
@pytest.mark.parametrize("focal", [200, 100, 50, 25])
def test_shrinking_does_not_alias(lens, focal):
    camera = make_camera(lens)
    checker = blank(camera)
    checker[::2, ::2] = checker[1::2, 1::2] = 255
    view = unify(checker, camera, focal, "exact", ImageGrid(1, 1, 1 << 24))
    down, across = view.camera.height // 4, view.camera.width // 4
    inner = view.image[down:-down, across:-across]
    naive = cv2.resize(checker, None, fx=0.31, fy=0.31, interpolation=cv2.INTER_NEAREST)
    assert abs(inner.mean() - 127.5) < 3
    assert inner.std() < 0.3 * naive.std()


@each_lens
def test_what_the_lens_did_not_see_is_black(lens):
    camera = make_camera(lens)
    view = unify(blank(camera, 255), camera, 200, "exact", ImageGrid(1, 1, 1 << 24))
    v, u = np.mgrid[0 : view.camera.height, 0 : view.camera.width]
    back = view.to_source(np.stack([u, v], axis=-1))
    well_inside = ((back > 1.5) & (back < (camera.width - 2.5, camera.height - 2.5))).all(axis=-1)
    well_outside = ~((back > -2.5) & (back < (camera.width + 1.5, camera.height + 1.5))).all(axis=-1)
    assert (view.image[well_inside] == 255).all()
    assert (view.image[well_outside] == 0).all()


# --- published on real lenses -----------------------------------------------------------------------------------------


@each_lens
def test_published_undistorts_first_with_unchanged_intrinsics(lens):
    camera = make_camera(lens)
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 2)
    matrix, coefficients = camera.matrix, np.array(lens.coefficients)
    if lens.model == "equidistant":
        flat = cv2.fisheye.undistortImage(image, matrix, coefficients, Knew=matrix)
    else:
        flat = cv2.undistort(image, matrix, coefficients)
    expected = unify(flat, make_camera(), 200, "published")
    view = unify(image, camera, 200, "published")
    assert view.camera == expected.camera
    difference = np.abs(view.image.astype(int) - expected.image)[4:-4, 4:-4]
    assert difference.mean() < 0.1 and np.percentile(difference, 99.9) <= 2


# From OpenCV 4.10 on the authors' step returns the image and, but for the last bit, K.
@pytest.mark.skipif(tuple(map(int, cv2.__version__.split(".")[:2])) < (4, 10), reason="scales K by (W - 1) / W")
@settings(max_examples=100, deadline=None)
@given(
    fx=st.floats(50, 1500), ratio=st.floats(0.8, 1.25), cx=st.floats(0.3, 0.7), cy=st.floats(0.3, 0.7),
    width=st.integers(16, 64), height=st.integers(16, 64), focal=st.sampled_from([250.0, 333.0, 750.0, 1000.0]),
)  # fmt: skip
def test_published_equals_the_authors_steps_done_with_opencv(fx, ratio, cx, cy, width, height, focal):
    camera = Camera(fx, fx * ratio, cx * width, cy * height, width, height)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    matrix, flat = camera.matrix, image
    if abs(camera.fx - camera.fy) > 1e-3:
        size, zeros = (width, height), np.zeros((4, 1))
        matrix, _ = cv2.getOptimalNewCameraMatrix(camera.matrix, zeros, size, 1, size)
        flat = cv2.undistort(image, camera.matrix, zeros, None, matrix)
    scale = focal / matrix[0, 0]
    view = unify(image, camera, focal, "published")
    expected = Image.fromarray(flat).resize((int(width * scale), int(height * scale)))
    assert (view.image == np.asarray(expected)).all()
    assert (view.camera.matrix[:2] == matrix[:2] * scale).all()


def test_published_on_a_lens_without_distortion_is_pillows_bicubic():
    camera = Camera(160, 160, 40, 30, 80, 60)
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    expected = Image.fromarray(image).resize((100, 75), Image.Resampling.BICUBIC)
    assert (unify(image, camera, 200, "published").image == np.asarray(expected)).all()


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_an_unknown_policy_is_named_with_the_nearest_known():
    with pytest.raises(ConfigError, match="unknown policy 'exakt'; did you mean 'exact'"):
        unify(blank(make_camera()), make_camera(), 200, "exakt")


@pytest.mark.parametrize("focal", [0, -5, float("nan"), float("inf")])
def test_a_focal_length_that_is_not_positive_is_refused(focal):
    with pytest.raises(ConfigError, match="focal length"):
        unify(blank(make_camera()), make_camera(), focal, "exact")


def test_the_camera_of_another_image_is_refused():
    with pytest.raises(CameraError, match="image is 320x240 but its camera is 640x480"):
        unify(blank(make_camera()), make_camera(width=640, height=480), 200, "exact")


@pytest.mark.parametrize("bad", [np.zeros((240, 320), np.uint8), np.zeros((240, 320, 3), np.float32)])
def test_an_image_that_is_not_rgb_is_refused(bad):
    with pytest.raises(ImageError, match="uint8 RGB"):
        unify(bad, make_camera(), 200, "exact")


@any_lens
@any_policy
def test_the_given_image_is_left_alone_and_may_be_read_only_or_strided(lens, policy):
    camera = make_camera(lens)
    wide = np.random.default_rng(0).integers(0, 256, (240, 330, 3), np.uint8)
    window = wide[:, 5:325]
    before = window.copy()
    window.flags.writeable = False
    expected = unify(before.copy(), camera, 200, policy).image
    assert (unify(window, camera, 200, policy).image == expected).all()
    assert (window == before).all()


# --- sample_map -------------------------------------------------------------------------------------------------------


def make_map():
    return np.array([[1.0, 2.0, 4.0], [5.0, np.nan, 8.0]], np.float32)


def test_bilinear_weighs_the_four_neighbours():
    flat = np.array([[1.0, 2.0], [5.0, 8.0]], np.float32)
    np.testing.assert_allclose(sample_map(flat, [[0, 0], [0.5, 0], [0.25, 0.5], [1, 1]]), [1, 1.5, 3.5, 8])


def test_bilinear_holds_the_last_value_within_the_border_pixels():
    np.testing.assert_allclose(sample_map(make_map(), [[-0.4, -0.4], [2.4, 0]]), [1, 4])


def test_bilinear_is_nan_where_a_weighed_value_is_nan_and_only_there():
    values = sample_map(make_map(), [[0.5, 0.5], [1, 0.5], [1, 0], [2, 1], [0, 0.5]])
    np.testing.assert_array_equal(np.isnan(values), [True, True, False, False, False])


def test_nearest_takes_the_pixel_that_holds_the_place():
    places = [[0.49, 0], [0.5, 0], [2.49, 1.49], [-0.5, -0.5]]
    np.testing.assert_array_equal(sample_map(make_map(), places, "nearest"), [1, 2, 8, 1])


@pytest.mark.parametrize("method", ["bilinear", "nearest"])
def test_off_the_map_there_is_nothing(method):
    places = [[-0.51, 0], [2.5, 0], [0, 1.5], [np.nan, 0], [np.inf, 0]]
    assert np.isnan(sample_map(make_map(), places, method)).all()


def test_no_pixels_give_no_values():
    assert sample_map(make_map(), np.empty((0, 2))).shape == (0,)


def test_wrong_arguments_of_sample_map_are_named():
    with pytest.raises(ConfigError, match="cubic"):
        sample_map(make_map(), [[0, 0]], "cubic")
    with pytest.raises(PixelError, match=r"\(2,\)"):
        sample_map(make_map(), [0, 0])


def test_a_view_can_be_made_by_hand():
    camera = make_camera()
    view = UnifiedView(blank(camera), camera, "exact", camera)
    np.testing.assert_allclose(view.from_source([[3.0, 4.0]]), [[3, 4]], atol=1e-12)
