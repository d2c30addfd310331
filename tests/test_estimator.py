"""Image + camera + pixels -> metric depth, over real (small, random) checkpoints of each architecture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from depthlm_ros.camera import Camera, Distortion, unify
from depthlm_ros.cards import load_card
from depthlm_ros.depth import EuclideanDistance
from depthlm_ros.engines import load_engine
from depthlm_ros.engines.base import Answer, EngineInfo, ImageGrid
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.errors import CameraError, ConfigError, DialectError, LicenceError, PixelError
from depthlm_ros.estimator import Estimator
from depthlm_ros.markers import draw_arrow, paste
from depthlm_ros.prompts import answer_template, answer_text, coordinates_question, normalise_pixel

CAMERA = Camera(fx=150.0, fy=148.0, cx=63.2, cy=47.1, width=128, height=96)
PIXELS = np.array([[64, 48], [20, 30], [110, 80], [5, 90]], np.float32)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def speaker(qwen3_vl_checkpoint):
    """A Qwen3-VL with a depth head whose card lets it speak all three dialects."""
    card, source = load_card(str(qwen3_vl_checkpoint))
    card = replace(card, dialects=("dense", "coordinates", "marker"), focal_px=160.0, policy="exact", max_new_tokens=12)
    return Estimator(card, load_engine(source, card, options=EngineOptions("cpu", "float32")))


class Parrot:
    """An engine that answers with given texts and remembers what it was shown."""

    info = EngineInfo("parrot", "none", "qwen3_vl", "cpu", "float32", ("a test",), 0, False)
    grid = ImageGrid(multiple=32, min_pixels=1, max_pixels=1 << 20)

    def __init__(self, *texts: str) -> None:
        self.texts, self.images, self.questions, self.expected = texts, [], [], []

    def answer_shared(self, image, questions, max_new_tokens, *, expects=None):
        return self.answer_each([image], questions, max_new_tokens, expects=expects)

    def answer_marked(self, image, blocks, questions, max_new_tokens, **options):
        return self.answer_each([paste(image, block) for block in blocks], questions, max_new_tokens, **options)

    def answer_each(self, images, questions, max_new_tokens, *, expects=None):
        self.expected.append(expects)
        self.images += images
        self.questions += questions
        return [Answer(self.texts[i % len(self.texts)], (), 0.5) for i in range(len(questions))]

    def close(self):
        pass


def parrot(*texts: str, card: str = "vlm3-depth", **changes) -> Estimator:
    """An estimator with a parrot for an engine, z-depth answers and a focal length of 160 px."""
    changes = {"depth_kind": "z", "focal_px": 160.0, "policy": "exact"} | changes
    return Estimator(replace(load_card(card)[0], **changes), Parrot(*texts))


def marker_parrot() -> Estimator:
    return parrot(answer_text(2.0), card="depthlm-12b", policy="published")


def test_dense_reads_the_heads_map_where_the_source_pixel_lies(speaker, image):
    result = speaker.estimate(image, CAMERA, PIXELS, dialect="dense")
    view = unify(image, CAMERA, 160.0, "exact", speaker.engine.grid)
    depth = speaker.engine.depth_map(view.image)
    u, v = (PIXELS[0] + 0.5) * (160 / 150, 160 / 148) - 0.5
    low_u, low_v = int(u), int(v)
    square = depth[low_v : low_v + 2, low_u : low_u + 2]
    weights = np.outer([1 - (v - low_v), v - low_v], [1 - (u - low_u), u - low_u])
    assert result.depth_m[0] == pytest.approx((square * weights).sum(), rel=1e-5)
    assert result.valid.all() and result.answers == ()


def test_dense_without_pixels_answers_every_pixel(speaker, image):
    result = speaker.estimate(image, CAMERA, dialect="dense")
    assert len(result) == 96 * 128
    assert (result.confidence[result.valid] <= 1).all() and (result.confidence >= 0).all()


@pytest.mark.parametrize("dialect", ["coordinates", "marker"])
def test_many_points_are_answered_as_each_would_be_alone(speaker, image, dialect):
    together = speaker.estimate(image, CAMERA, PIXELS, dialect=dialect)
    alone = [speaker.estimate(image, CAMERA, PIXELS[i : i + 1], dialect=dialect) for i in range(len(PIXELS))]
    assert together.answers == tuple(one.answers[0] for one in alone)
    assert together.asked.tolist() == [bool(one.asked[0]) for one in alone]


@pytest.mark.parametrize("fixture", ["qwen2_5_vl_checkpoint", "llava_checkpoint"])
def test_every_architecture_answers_or_says_why_not(request, image, fixture):
    with Estimator.load(str(request.getfixturevalue(fixture)), device="cpu") as estimator:
        result = estimator.estimate(image, CAMERA, PIXELS)
    assert len(result) == len(result.answers) == len(PIXELS)
    assert np.isfinite(result.depth_m[result.valid]).all() and (result.depth_m[result.valid] > 0).all()
    assert any("assumed" in line for line in estimator.describe())


def test_coordinates_are_those_of_the_image_that_the_model_sees(image):
    estimator = parrot(answer_text(2.0))
    estimator.estimate(image, CAMERA, PIXELS, dialect="coordinates")
    shown = estimator.engine.images[0]
    view = unify(image, CAMERA, 160.0, "exact", Parrot.grid)
    np.testing.assert_array_equal(shown, view.image)
    said = normalise_pixel(view.from_source(PIXELS), shown.shape[1], shown.shape[0])
    assert estimator.engine.questions == [coordinates_question(x, y) for x, y in said.tolist()]


@pytest.mark.parametrize(("card", "dialect"), [("vlm3-depth", "coordinates"), ("depthlm-12b", "marker")])
def test_the_engine_is_told_the_sentence_that_the_model_was_trained_to_say(image, card, dialect):
    estimator = parrot(answer_text(2.0), card=card)
    estimator.estimate(image, CAMERA, PIXELS, dialect=dialect)
    assert estimator.engine.expected == [answer_template(dialect)]
    own = parrot(answer_text(2.0), card=card, answer="{number} metres")
    own.estimate(image, CAMERA, PIXELS, dialect=dialect)
    assert own.engine.expected == ["{number} metres"]


def test_the_marker_is_drawn_at_the_published_pixel(image):
    estimator = marker_parrot()
    estimator.estimate(image, CAMERA, PIXELS[:1])
    view = unify(image, CAMERA, 160.0, "published")
    u, v = view.from_source(PIXELS[:1])[0].astype(int).tolist()
    np.testing.assert_array_equal(estimator.engine.images[0], draw_arrow(view.image, (u, v)))


def test_points_that_the_border_rule_forbids_stay_as_not_asked(image):
    estimator = marker_parrot()
    result = estimator.estimate(image, CAMERA, np.array([[64, 48], [1, 1], [127, 95]], np.float32))
    assert result.asked.tolist() == [True, False, False]
    assert np.isnan(result.depth_m[1:]).all() and (result.confidence[1:] == 0).all()
    assert len(estimator.engine.images) == 1


def test_points_too_near_the_border_may_be_asked_at_the_nearest_pixel_that_carries_the_arrow(image):
    estimator = marker_parrot()
    pixels = np.array([[64, 48], [0, 0], [127, 95], [1, 40]], np.float32)
    result = estimator.estimate(image, CAMERA, pixels, undrawable="shift")
    assert result.shifted.tolist() == [False, True, True, True]
    assert result.asked.all() and result.valid.all()
    np.testing.assert_array_equal(result.pixels, pixels)
    view = unify(image, CAMERA, 160.0, "published")
    width, height = view.camera.width, view.camera.height
    nearest = [(5, 5), (width - 6, height - 6), (5, int(view.from_source(pixels)[3, 1]))]
    for shown, place in zip(estimator.engine.images[1:], nearest, strict=True):
        np.testing.assert_array_equal(shown, draw_arrow(view.image, place))


def test_a_distance_is_turned_into_depth_along_the_ray_of_the_pixel_that_was_marked(image):
    estimator = parrot(answer_text(2.0), card="depthlm-12b", policy="exact", depth_kind="euclidean")
    result = estimator.estimate(image, CAMERA, np.array([[0, 0]], np.float32), undrawable="shift")
    ray = unify(image, CAMERA, 160.0, "exact", Parrot.grid).camera.rays(np.array([5.0, 5.0]))
    assert result.depth_m[0] == pytest.approx(2.0 / np.linalg.norm(ray), rel=1e-6)


def test_nothing_is_shifted_unless_wanted_and_never_far(image):
    estimator, corner = marker_parrot(), np.array([[0, 0]], np.float32)
    assert not estimator.estimate(image, CAMERA, corner).shifted.any()
    bent = replace(CAMERA, distortion=Distortion("plumb_bob", (-0.3, 0.0, 0.0, 0.0, 0.0)))
    assert (unify(image, bent, 160.0, "published").from_source(corner) < -1).any()
    far = estimator.estimate(image, bent, corner, undrawable="shift")
    assert not far.shifted.any() and not far.asked.any()
    with pytest.raises(ConfigError, match="unknown undrawable 'shfit'; did you mean 'shift'"):
        estimator.estimate(image, CAMERA, corner, undrawable="shfit")


def test_euclidean_answers_become_z_depth(image):
    corner = np.array([[0, 0], [63, 47]], np.float32)
    z = parrot(answer_text(5.0)).estimate(image, CAMERA, corner, dialect="coordinates")
    ray = parrot(answer_text(5.0), depth_kind="euclidean").estimate(image, CAMERA, corner, dialect="coordinates")
    np.testing.assert_allclose(z.depth_m, 5.0)
    np.testing.assert_allclose(np.linalg.norm(CAMERA.unproject(corner, ray.depth_m), axis=1), 5.0, rtol=1e-6)
    assert ray.depth_m[0] == pytest.approx(EuclideanDistance(np.float32([5.0])).to_z(CAMERA.rays(corner[:1])).metres[0])


def test_an_answer_without_a_number_is_no_depth(image):
    result = parrot("I can't tell.", answer_text(3.25)).estimate(image, CAMERA, PIXELS[:2], dialect="coordinates")
    assert np.isnan(result.depth_m[0]) and result.depth_m[1] == np.float32(3.25)
    assert result.confidence.tolist() == [0, 0.5]
    assert result.asked.all() and result.answers[0] == "I can't tell."


def test_points_that_the_lens_hides_are_not_asked(image):
    from depthlm_ros.camera import Distortion

    wide = replace(CAMERA, fx=40.0, fy=40.0, distortion=Distortion("equidistant", (0.0, 0.0, 0.0, 0.0)))
    result = parrot(answer_text(1.0)).estimate(
        image, wide, np.array([[64, 48], [0, 0]], np.float32), dialect="coordinates"
    )
    assert result.asked.tolist() == [True, False]


def test_progress_counts_every_asked_point(image):
    seen = []
    estimator = marker_parrot()
    inner = np.stack(np.meshgrid(np.arange(20, 100, 4), np.arange(20, 80, 4)), -1).reshape(-1, 2).astype(np.float32)
    estimator.estimate(image, CAMERA, inner, progress=seen.append)
    assert sum(seen) == len(inner) == 300 and len(seen) > 1


@pytest.mark.parametrize(
    ("pixels", "error", "words"),
    [
        ([[1.0, 2.0, 3.0]], PixelError, r"\(1, 3\)"),
        ([[128.0, 5.0]], PixelError, r"128, 5\).*128x96"),
        ([[np.nan, 5.0]], PixelError, "nan"),
    ],
)
def test_pixels_that_can_not_be_asked_are_named(speaker, image, pixels, error, words):
    with pytest.raises(error, match=words):
        speaker.estimate(image, CAMERA, np.array(pixels))


def test_a_camera_of_another_size_is_refused(speaker, image):
    with pytest.raises(CameraError, match="128x96"):
        speaker.estimate(image, replace(CAMERA, width=640), PIXELS)


def test_a_dialect_that_the_model_does_not_speak_is_refused(llava_checkpoint, image):
    with pytest.raises(DialectError, match="marker"):
        Estimator.load(str(llava_checkpoint), dialect="dense")


def test_a_model_that_is_not_for_depth_loads_and_says_so_when_asked(image):
    estimator = parrot("Correct.", tasks=("object",), dialects=(), default_dialect=None, depth_kind=None)
    assert estimator.default_dialect is None
    assert "answers no depth questions; it is for object" in estimator.describe()
    with pytest.raises(DialectError, match="was not trained for depth, it is for object"):
        estimator.estimate(image, CAMERA, PIXELS)
    with pytest.raises(DialectError, match="was not trained for depth"):
        Estimator(estimator.card, estimator.engine, dialect="dense")


def test_a_licence_that_forbids_commercial_use_is_refused_before_anything_is_loaded():
    with pytest.raises(LicenceError, match="may not be used commercially"):
        Estimator.load("vlm3-depth", commercial_use=True)
