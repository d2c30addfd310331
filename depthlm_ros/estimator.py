"""Image + camera + pixels -> metric depth. The whole pipeline without ROS.

estimator = Estimator.load("demo")
result = estimator.estimate(image, camera, pixels)
points = camera.unproject(result.pixels, result.depth_m)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from depthlm_ros.calibration import Calibration, Kind
from depthlm_ros.camera import Camera, UnifiedView, unify
from depthlm_ros.cards import ModelCard, load_card
from depthlm_ros.config import POINTS_IN_WORDS
from depthlm_ros.depth import DEPTH_KINDS, DepthResult, ZDepth
from depthlm_ros.dialects import Clock, PixelQuestions, Progress, marker_places
from depthlm_ros.engines import load_engine
from depthlm_ros.engines.base import Engine, EngineInfo
from depthlm_ros.engines.options import EngineOptions
from depthlm_ros.errors import ConfigError, DialectError, PixelError, unknown_choice
from depthlm_ros.expectation import check_distribution
from depthlm_ros.guesses import LastAnswers
from depthlm_ros.markers import drawable
from depthlm_ros.proof import Proof, load_proved
from depthlm_ros.published import readout_pixels
from depthlm_ros.remember import remember
from depthlm_ros.sampling import sample_pixels, stride_pixels
from depthlm_ros.unify import undistorted_pixels

READOUTS = ("exact", "published")
UNDRAWABLE = ("report", "shift")


class Estimator:
    """A loaded model that measures depth in images of any camera. Not re-entrant: one caller at a time.

    Attributes:
        card: what the model was trained to see and to say.
        engine: who answers.
        policy: how images are brought to the model's focal length.
        default_dialect: spoken when `estimate` isn't told another; None where the model isn't asked for depth.
        calibration: what confidences are worth; None leaves them as the model states them.
        proof: how far the engine is known to answer as its reference.
    """

    def __init__(
        self,
        card: ModelCard,
        engine: Engine,
        policy: str | None = None,
        dialect: str | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.card = card
        self.engine = engine
        self.policy = policy or card.policy
        self.default_dialect = _dialect(card, dialect)
        self._last_answers = LastAnswers()
        self.calibration = calibration
        self.proof = Proof()

    @classmethod
    def load(
        cls,
        model: str = "demo",
        *,
        device: str = "auto",
        dtype: str = "auto",
        policy: str | None = None,
        dialect: str | None = None,
        batch_size: int = 0,
        commercial_use: bool = False,
        depth_kind: str | None = None,
        calibration: str | Path | None = None,
        engine: str = "transformers",
        options: EngineOptions | None = None,
        reference: str | Path | None = None,
        accept_unproven: bool = False,
        check_parity: bool = True,
    ) -> Estimator:
        """Loads a model.

        Args:
            model: name of a card, a folder of weights, or a hub id.
            device: "auto", "cpu", "cuda" or "cuda:N".
            dtype: "auto", "float32", "bfloat16" or "float16".
            policy: "published" or "exact"; None takes the card's.
            dialect: spoken when `estimate` isn't told another; None takes the card's.
            batch_size: most questions decoded together; 0 for as many as fit and help.
            commercial_use: whether the answers serve a commercial purpose.
            depth_kind: what the answers are taken for, "z" or "euclidean"; None takes the card's, which for a model
                that learnt from both is a choice.
            calibration: a file that `depthlm evaluate` wrote, so that confidences are shares of right depths.
            engine: one of `engines.ENGINES`; every other than transformers has to prove itself (`proof.prove`).
            options: of the engine; `device`, `dtype` and `batch_size` are a short way to three of them.
            reference: folder of reference answers; None takes those in the model's folder.
            accept_unproven: go on with an engine that answers otherwise than its reference, and complain.
            check_parity: False for who compares by himself.

        Raises:
            LicenceError: `commercial_use` of a model whose licence forbids it.
            ModelError: the model can't be found or loaded.
            DialectError: it doesn't speak the dialect.
            ConfigError: an unknown value, or an engine that was made for another focal length or policy.
            ParityError: the engine answers otherwise than its reference.
            EngineError: no server answers.
            MissingDependencyError: the engine's package isn't there.
        """
        card, source = load_card(model, commercial_use=commercial_use, weights=engine != "openai")
        if depth_kind is not None:
            # A wrong one is told before the model is loaded.
            replace(card, depth_kind=depth_kind)
        _dialect(card, dialect)
        curve = Calibration.load(calibration) if calibration else None
        options = options or EngineOptions(device=device, dtype=dtype, batch_size=batch_size)

        def loaded(options: EngineOptions) -> Estimator:
            made = load_engine(source, card, engine=engine, options=options)
            try:
                spoken = _spoken_by(card, made.info)
                return cls(spoken, made, policy, _dialect(spoken, dialect), curve)
            except BaseException:
                made.close()
                raise

        if check_parity:
            estimator = load_proved(loaded, Path(source), engine, options, reference, accept_unproven)
        else:
            estimator = loaded(options)
        compared = estimator.proof.dialects
        if compared is not None and not accept_unproven:
            spoken = tuple(name for name in estimator.card.dialects if name in compared)
            estimator.card = replace(estimator.card, dialects=spoken, default_dialect=estimator.default_dialect)
        if depth_kind is not None:
            # Afterwards: the reference's answers are what the card says.
            estimator.card = replace(estimator.card, depth_kind=depth_kind)
        return estimator

    @property
    def dialects(self) -> tuple[str, ...]:
        """The dialects that the model speaks and the engine can ask in."""
        return self.card.dialects

    @property
    def complaints(self) -> tuple[str, ...]:
        """What is wrong now, a sentence each; from any thread."""
        return (*((self.proof.complaint,) if self.proof.complaint else ()), *self.engine.complaints)

    def describe(self) -> list[str]:
        """What was loaded, where it runs and why, and what had to be assumed; a line each."""
        info = self.engine.info
        return [
            f"model {self.card.name} ({info.model}): {info.architecture}, {info.parameters / 1e6:.1f}M parameters, "
            f"licence {self.card.licence}",
            self._describe_depth(),
            f"engine {info.engine} on {info.device} in {info.dtype}: {'; '.join(info.reasons)}",
            *filter(None, [self.proof.sentence]),
            self.card.about,
            *(f"assumed: {assumption}" for assumption in self.card.assumptions),
            *([] if self.calibration is None else [f"confidences calibrated {self.calibration.about}"]),
        ]

    def _describe_depth(self) -> str:
        card = self.card
        if not self.dialects:
            return f"answers no depth questions; it is for {', '.join(card.tasks)}"
        kind = "z-depth" if card.depth_kind == "z" else "Euclidean distance, converted to z-depth"
        speaks = f"speaks {', '.join(self.dialects)}; focal length {card.focal_px:g} px, policy {self.policy}"
        return f"{speaks}, answers are {kind}"

    def encode_ahead(self, view: UnifiedView) -> None:
        """Has a prepared frame's image encoded beside what the model does now, where the device has room for both.

        May be called from another thread; the next `estimate` with this view finds the encoding.
        """
        if self.default_dialect != "marker":
            self.engine.encode_ahead(view.image)

    def prepare(self, image: np.ndarray, camera: Camera) -> UnifiedView:
        """Makes what the model will see of an image, for `estimate`; may run in another thread beside it.

        Args:
            image: (H, W, 3) uint8 RGB.
            camera: intrinsics of `image`.

        Raises:
            ImageError, CameraError: as `unify`.
        """
        return unify(image, camera, self.card.focal_px, self.policy, self.engine.grid, self.card.system)

    def estimate(
        self,
        image: np.ndarray,
        camera: Camera,
        pixels: np.ndarray | None = None,
        *,
        dialect: str | None = None,
        progress: Progress | None = None,
        readout: str = "exact",
        undrawable: str = "report",
        points_per_question: int = 1,
        view: UnifiedView | None = None,
        distribution: bool = False,
        depth_value: str = "greedy",
    ) -> DepthResult:
        """Measures z-depth at pixels of one image.

        Args:
            image: (H, W, 3) uint8 RGB.
            camera: intrinsics of `image`.
            pixels: (N, 2) `(u, v)` of `image`; None asks every pixel in the dense dialect and a grid of 256 otherwise.
            dialect: one of `dialects`; None takes the default.
            progress: called with the number of points that were just answered.
            readout: where a dense map is read: "exact", at the pixel itself between its neighbours, or "published",
                where DepthVLM's evaluation reads it (`published.readout_pixels`), for comparing scores.
            undrawable: what becomes of points too close to the view's border for the marker: "report" leaves them
                unasked, "shift" asks the nearest pixel that can carry it, at most 6 px of the view away in each
                direction, and says so in `shifted`.
            points_per_question: points that a question of the compact dialect asks about; the last one may have
                fewer. An answer that can't be read loses all of its points. The other dialects ask about one.
            view: what `prepare` made of this image and camera; None has it made here.
            distribution: also ask how the model's belief is spread over numbers, which costs about 15 more short
                passes a point, at most 25 (`engines.digits`).
            depth_value: what `depth_m` is: "greedy", the number that was said, or "median" or "mean" of the
                distribution, which are better guesses and need it.

        Returns:
            A row for each pixel, in their order; pixels that the dialect can't refer to have `asked` False.
            Confidence is the probability of the number that was said in the text dialects, or with the distribution
            the probability that it gives to depths within a factor 1.25 of `depth_m`; in the dense dialect it
            is how flat the map is around the pixel (1 - relative spread of its four neighbours), which is no
            probability but falls where a point would fly between two surfaces. With a `calibration` of
            confidences of this kind it is the share of depths that were right.

        Raises:
            ImageError, CameraError, PixelError: bad input.
            DialectError: the model doesn't speak the dialect.
            ConfigError: a `readout` that this model, policy or dialect doesn't have, an unknown `undrawable`, more
                `points_per_question` than the model was trained on, or a `distribution` where there is none.
            EngineError: the engine failed.
        """
        dialect = self.card.require_dialect(dialect or self.default_dialect)
        self._check_readout(readout, dialect)
        if undrawable not in UNDRAWABLE:
            raise ConfigError(unknown_choice("undrawable", undrawable, UNDRAWABLE))
        if dialect == "compact":
            self.card.answer_template(dialect, points_per_question)
        check_distribution(distribution, depth_value, dialect, points_per_question)
        if pixels is None:
            whole = dialect == "dense"
            pixels = stride_pixels(camera.width, camera.height, 1) if whole else sample_pixels(
                camera.width, camera.height, POINTS_IN_WORDS)  # fmt: skip
        pixels = _checked_pixels(pixels, camera)
        clock = Clock()
        if view is None:
            with clock("unify"):
                view = self.prepare(image, camera)
        with clock("geometry"):
            at = view.from_source(pixels)
            asked = view.inside(at)
            shifted = np.zeros(len(pixels), bool)
            if dialect == "marker":
                at, asked, shifted = marker_places(view, at, asked, undrawable)
        questions = PixelQuestions(
            self.engine, self.card, self._last_answers, view, at, asked, clock, progress or _no_progress
        )
        if dialect == "dense":
            on_map = None
            if readout == "published":
                on_map = readout_pixels(undistorted_pixels(camera, pixels), camera, self.card.focal_px)
            said = questions.dense(on_map)
        elif dialect == "coordinates":
            said = questions.coordinates(distribution)
        elif dialect == "marker":
            said = questions.marker(distribution)
        else:
            said = questions.compact(points_per_question, distribution)
        with clock("geometry"):
            kind = DEPTH_KINDS[self.card.depth_kind]
            rays = None if kind is ZDepth else _rays(camera, view, pixels, at, shifted)

            def to_z(values: np.ndarray) -> np.ndarray:
                return kind(values).to_z(rays).metres

            expected = said.expected
            depth_m = to_z(said.metres if expected is None else expected.depth(said.metres, depth_value))
            good = np.isfinite(depth_m) & said.asked
            confidence = said.confidence if expected is None else expected.near[depth_value]
            stated = Kind(self.card.name, dialect, depth_value, distribution)
            if self.calibration is not None and self.calibration.fits(stated):
                confidence = self.calibration.apply(confidence)
        return DepthResult(
            pixels=pixels,
            depth_m=np.where(good, depth_m, np.nan).astype(np.float32),
            confidence=np.where(good, confidence, 0).astype(np.float32),
            asked=said.asked,
            dialect=dialect,
            answers=said.texts,
            timing_s=clock.seconds,
            shifted=shifted,
            **({} if expected is None else expected.fields(said.metres, to_z, good)),
        )

    def askable(
        self, image: np.ndarray, camera: Camera, pixels: np.ndarray, *, dialect: str | None = None
    ) -> np.ndarray:
        """(N,) bool: pixels that `estimate` would put a question about, without asking any.

        Pixels that are not on the image are not askable, where `estimate` refuses them.

        Args:
            image: (H, W, 3) uint8 RGB.
            camera: intrinsics of `image`.
            pixels: (N, 2) `(u, v)`.
            dialect: one of `dialects`; None takes the default.
        """
        dialect = self.card.require_dialect(dialect or self.default_dialect)
        view = self.prepare(image, camera)
        at = view.from_source(pixels)
        asked = camera.contains(pixels) & view.inside(at)
        return asked & drawable(np.rint(at), view.camera.width, view.camera.height) if dialect == "marker" else asked

    def close(self) -> None:
        """Frees the model's memory."""
        self.engine.close()

    def __enter__(self) -> Estimator:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check_readout(self, readout: str, dialect: str) -> None:
        if readout not in READOUTS:
            raise ConfigError(unknown_choice("readout", readout, READOUTS))
        seen = (self.card.system, self.policy, dialect)
        if readout == "published" and seen != ("depthvlm", "published", "dense"):
            raise ConfigError(
                f"readout 'published' is DepthVLM's, of its own preprocessing; this is system {seen[0]!r} with policy "
                f"{seen[1]!r} in dialect {seen[2]!r}. Use readout 'exact'"
            )


@remember(4)
def _pixel_rays(camera: Camera, pixels: np.ndarray) -> np.ndarray:
    return camera.rays(pixels)


def _rays(camera: Camera, view: UnifiedView, pixels: np.ndarray, at: np.ndarray, shifted: np.ndarray) -> np.ndarray:
    """(N, 3) rays along which distances were measured: of the pixels that were marked where they aren't the asked."""
    rays = _pixel_rays(camera, pixels)
    if shifted.any():
        rays = rays.copy()
        rays[shifted] = view.camera.rays(at[shifted])
    return rays


def _no_progress(_: int) -> None:
    return None


def _dialect(card: ModelCard, dialect: str | None) -> str | None:
    """The dialect to speak where none is asked; None for a model that isn't for depth and wasn't asked to be."""
    return card.require_dialect(dialect) if card.dialects or dialect is not None else None


def _spoken_by(card: ModelCard, info: EngineInfo) -> ModelCard:
    """The card with the dialects that an engine can ask in; transformers says itself what a checkpoint lacks."""
    if info.engine == "transformers":
        return card
    spoken = tuple(dialect for dialect in card.dialects if (info.dense if dialect == "dense" else info.words))
    if card.dialects and not spoken:
        kinds = "dense maps" if info.dense else "answers in words"
        raise DialectError(
            f"engine {info.engine} makes {kinds}, model {card.name!r} speaks {', '.join(card.dialects)}; choose "
            "another engine"
        )
    default = card.default_dialect if card.default_dialect in spoken else next(iter(spoken), None)
    return replace(card, dialects=spoken, default_dialect=default)


def _checked_pixels(pixels: np.ndarray, camera: Camera) -> np.ndarray:
    pixels = np.asarray(pixels, np.float32)
    if pixels.ndim != 2 or pixels.shape[1] != 2:
        raise PixelError(f"pixels have shape {pixels.shape}; pass an (N, 2) array of (u, v)")
    outside = ~camera.contains(pixels)
    if outside.any():
        u, v = pixels[np.flatnonzero(outside)[0]]
        raise PixelError(
            f"pixel ({u:g}, {v:g}) is outside of the {camera.width}x{camera.height} image; {outside.sum()} of "
            f"{len(pixels)} are; leave them out"
        )
    return pixels
