"""Does an engine answer as the model does that it was made from? Asked before a node activates it.

An export keeps frames and what the original model answered about them. A check asks the engine the same, through the
same estimator as every frame, and compares (`parity.py`). What passed is remembered for these files, this version of
the engine and this machine; everything else is checked again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from depthlm_ros.errors import ConfigError, EngineError, ImageError, ParityError, PixelError
from depthlm_ros.machine import this_machine
from depthlm_ros.manifest import REFERENCE_FOLDER, Manifest, check_built, check_card, read_manifest
from depthlm_ros.parity_records import ParityRecord, add_record, known_record

if TYPE_CHECKING:
    from depthlm_ros.engines.options import EngineOptions
    from depthlm_ros.estimator import Estimator

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proof:
    """How far an engine is known to answer as its reference.

    Attributes:
        sentence: for the log; empty where there is nothing to prove.
        complaint: for the log and the diagnostics, while something isn't proved; empty else.
        dialects: that it has been compared in; None where it wasn't compared.
        accepted: whether it failed and is used all the same.
        absent: servers that couldn't be compared, since they didn't answer.
    """

    sentence: str = ""
    complaint: str = ""
    dialects: tuple[str, ...] | None = None
    accepted: bool = False
    absent: tuple[str, ...] = ()


def load_proved(
    load: Callable[[EngineOptions], Estimator],
    source: Path,
    engine: str,
    options: EngineOptions,
    reference: str | Path | None,
    accept_unproven: bool,
) -> Estimator:
    """Loads an estimator whose engine, or each of whose servers, answers as its reference does.

    Args:
        load: loads one with these options, unproved.
        source: as in `prove`.
        engine: name of the engine.
        options: of the engine.
        reference: as in `prove`.
        accept_unproven: as in `prove`.

    Returns:
        The estimator with its `proof`; servers that couldn't be compared are left out, unless `accept_unproven`.

    Raises:
        ParityError, ModelError, ConfigError: as `prove`.
        EngineError: as `prove_each`.
    """

    def proved(options: EngineOptions) -> Estimator:
        estimator = load(options)
        try:
            estimator.proof = prove(estimator, source, reference, accept_unproven, options.variant())
        except BaseException:
            estimator.close()
            raise
        return estimator

    if engine != "openai" or len(options.server_urls) < 2:
        return proved(options)
    proof = prove_each(options.server_urls, lambda url: proved(options.only(url)))
    estimator = load(options)
    estimator.proof = proof
    if proof.absent and not accept_unproven:
        estimator.engine.leave_out(proof.absent)
    return estimator


def prove(
    estimator: Estimator, source: Path, reference: str | Path | None, accept_unproven: bool, variant: str = ""
) -> Proof:
    """Makes sure that an engine answers as its reference does.

    Args:
        estimator: with the engine.
        source: the model's folder, or a hub id.
        reference: folder of reference answers; None takes those beside the engine.
        accept_unproven: go on although it doesn't, and say so for ever.
        variant: how the engine was set up; a check of another one doesn't count.

    Raises:
        ParityError: it doesn't, or hasn't been compared in the dialect that it is asked in; with the figures.
        ModelError, ConfigError: a damaged manifest or reference, an engine or a reference made for something else.
    """
    info = estimator.engine.info
    if info.engine == "transformers" and reference is None:
        return Proof()
    manifest = read_manifest(source) if source.is_dir() else None
    if manifest is not None and info.engine != "transformers":
        check_card(manifest, estimator.card.focal_px, estimator.policy)
        if info.engine == "tensorrt":
            # The graph beside a plan runs anywhere.
            check_built(manifest)
    folder = Path(reference).expanduser() if reference is not None else source / REFERENCE_FOLDER
    if reference is None and not folder.is_dir():
        told = (
            f"engine {info.engine} is unproven: there are no reference answers of {estimator.card.name} to compare its "
            "own with; make them where the checkpoint runs (depthlm parity MODEL --record FOLDER) and set reference"
        )
        return Proof(told, told)
    if reference is not None:
        manifest = None
    variant = f"{info.device} {info.dtype} {variant}".strip()
    # A server may have changed since, and on a machine that isn't this one.
    if manifest is not None and info.engine != "openai":
        record = known_record(manifest, info.engine, info.version, variant)
        if record is not None and record.passed:
            told = f"parity was checked here on {record.date[:10]}: {_told(record)}"
            return _covered(estimator, Proof(told, dialects=manifest.dialects), accept_unproven)
    return _covered(estimator, _checked(estimator, folder, manifest, source, accept_unproven, variant), accept_unproven)


def prove_each(servers: Sequence[str], load: Callable[[str], Estimator]) -> Proof:
    """Proves servers one by one, since each of them may answer when the others are down.

    Args:
        servers: their URLs.
        load: loads an estimator that knows this server only, and proves it.

    Raises:
        ParityError: one of them answers otherwise.
        EngineError: none of them can be asked.
    """
    proofs: list[Proof] = []
    absent: dict[str, str] = {}
    for url in servers:
        try:
            with load(url) as estimator:
                proofs.append(estimator.proof)
        except ParityError:
            raise
        except EngineError as error:
            absent[url] = str(error)
    if not proofs:
        raise EngineError("; ".join(absent.values()))
    complaints = [proof.complaint for proof in proofs if proof.complaint]
    compared = [proof.dialects for proof in proofs if proof.dialects is not None]
    if compared:
        complaints += [
            f"{url} didn't answer at start, so it was not compared with the reference and is not asked; configure "
            f"again once it does ({why})"
            for url, why in absent.items()
        ]
    return Proof(
        "; ".join(dict.fromkeys(proof.sentence for proof in proofs)),
        "; ".join(dict.fromkeys(complaints)),
        compared[0] if compared else None,
        any(proof.accepted for proof in proofs),
        tuple(absent) if compared else (),
    )


def _checked(
    estimator: Estimator, folder: Path, manifest: Manifest | None, source: Path, accept_unproven: bool, variant: str
) -> Proof:
    from depthlm_ros.parity import check
    from depthlm_ros.references import read_reference

    info = estimator.engine.info
    reference = read_reference(folder)
    try:
        verdict = check(estimator, reference)
    except (ImageError, PixelError) as error:
        camera = reference.frames[0].camera
        raise ConfigError(
            f"the reference in {folder} is of a camera with {camera.width}x{camera.height} pixels and fx "
            f"{camera.fx:g}, which this engine can't be asked about ({error}); record one of its own camera: depthlm "
            "parity MODEL --record FOLDER --camera CALIBRATION.yaml"
        ) from error
    if manifest is not None:
        record = ParityRecord(
            engine=info.engine,
            version=info.version,
            machine=this_machine().as_dict(),
            files=manifest.digest,
            passed=verdict.passed,
            figures=verdict.figures,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            variant=variant,
        )
        try:
            add_record(source, record)
        except OSError as error:
            _LOG.warning("the parity check can't be kept (%s); it is made again at the next start", error)
    if verdict.passed:
        return Proof(f"parity with the reference: {verdict}", dialects=verdict.dialects)
    told = f"engine {info.engine} does not answer as {estimator.card.name}: {verdict}"
    if not accept_unproven:
        raise ParityError(
            f"{told}. It is refused: export and build it again, with another precision or version, or set "
            "accept_unproven to use it all the same"
        )
    return Proof(f"ACCEPTED ALTHOUGH IT FAILED: {told}", told, verdict.dialects, accepted=True)


def _covered(estimator: Estimator, proof: Proof, accept_unproven: bool) -> Proof:
    """Keeps the estimator to the dialects that were compared.

    Raises:
        ParityError: the one that it is to speak wasn't.
    """
    left = [dialect for dialect in estimator.dialects if dialect not in (proof.dialects or ())]
    if not left:
        return proof
    told = (
        f"engine {estimator.engine.info.engine} has not been compared in {', '.join(left)}: the reference has answers "
        f"in {', '.join(proof.dialects or ())} only"
    )
    if accept_unproven:
        return replace(proof, complaint="; ".join(filter(None, [proof.complaint, told])))
    if estimator.default_dialect in left:
        raise ParityError(
            f"{told}, and it is to be asked in {estimator.default_dialect}; record a reference in it (depthlm parity "
            f"MODEL --record FOLDER --dialects {estimator.default_dialect}), or set accept_unproven"
        )
    return replace(proof, sentence=f"{proof.sentence}; {told}, so it isn't asked in them")


def _told(record: ParityRecord) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in record.figures.items() if isinstance(value, float))
