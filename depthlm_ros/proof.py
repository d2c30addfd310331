"""Does an engine answer as the model does that it was made from? Asked before a node activates it.

An export keeps frames and what the original model answered about them. A check asks the engine the same, through the
same estimator as every frame, and compares (`parity.py`). What passed is remembered for these files, this version of
the engine and this machine; everything else is checked again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from depthlm_ros.errors import EngineError, ParityError
from depthlm_ros.machine import this_machine
from depthlm_ros.manifest import (
    REFERENCE_FOLDER,
    Manifest,
    ParityRecord,
    add_record,
    check_built,
    check_card,
    known_record,
    read_manifest,
)

if TYPE_CHECKING:
    from depthlm_ros.estimator import Estimator

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proof:
    """How far an engine is known to answer as its reference.

    Attributes:
        sentence: for the log; empty where there is nothing to prove.
        complaint: for the diagnostics, while the engine isn't proved; empty else.
    """

    sentence: str = ""
    complaint: str = ""


def prove(estimator: Estimator, source: Path, reference: str | Path | None, accept_unproven: bool) -> Proof:
    """Makes sure that an engine answers as its reference does.

    Args:
        estimator: with the engine.
        source: the model's folder, or a hub id.
        reference: folder of reference answers; None takes those beside the engine.
        accept_unproven: go on although it doesn't, and say so for ever.

    Raises:
        ParityError: it doesn't; the message holds the figures.
        ModelError, ConfigError: a damaged manifest or reference, an engine made for something else.
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
    folder = Path(reference) if reference is not None else source / REFERENCE_FOLDER
    if reference is None and not folder.is_dir():
        told = (
            f"engine {info.engine} is unproven: there are no reference answers of {estimator.card.name} to compare its "
            "own with; make them where the checkpoint runs (depthlm parity MODEL --record FOLDER) and set reference"
        )
        return Proof(told, told)
    if manifest is not None and reference is None:
        # A server may have changed since, and on a machine that isn't this one.
        record = None if info.engine == "openai" else known_record(manifest, info.engine, info.version)
        if record is not None and record.passed:
            return Proof(f"parity was checked here on {record.date[:10]}: {_told(record)}")
    return _checked(estimator, folder, manifest if reference is None else None, source, accept_unproven)


def prove_each(servers: Sequence[str], load: Callable[[str], Estimator]) -> Proof:
    """Proves servers one by one, since each of them may answer when the others are down.

    Args:
        servers: their URLs.
        load: loads an estimator that knows this server only, and proves it.

    Raises:
        ParityError: one of them answers otherwise.
        EngineError: none of them can be asked.
    """
    proofs, absent = [], []
    for url in servers:
        try:
            with load(url) as estimator:
                proofs.append(estimator.proof)
        except ParityError:
            raise
        except EngineError as error:
            absent.append(f"{url} was not compared with its reference, since it can't be asked ({error})")
    if not proofs:
        raise EngineError("; ".join(absent))
    complaints = [proof.complaint for proof in proofs if proof.complaint] + absent
    return Proof("; ".join(dict.fromkeys(proof.sentence for proof in proofs)), "; ".join(dict.fromkeys(complaints)))


def _checked(
    estimator: Estimator, folder: Path, manifest: Manifest | None, source: Path, accept_unproven: bool
) -> Proof:
    from depthlm_ros.parity import check, read_reference

    info = estimator.engine.info
    verdict = check(estimator, read_reference(folder))
    if manifest is not None:
        record = ParityRecord(
            engine=info.engine,
            version=info.version,
            machine=this_machine().as_dict(),
            files=manifest.digest,
            passed=verdict.passed,
            figures=verdict.figures,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        try:
            add_record(source, record)
        except OSError as error:
            _LOG.warning("the parity check can't be kept (%s); it is made again at the next start", error)
    if verdict.passed:
        return Proof(f"parity with the reference: {verdict}")
    told = f"engine {info.engine} does not answer as {estimator.card.name}: {verdict}"
    if not accept_unproven:
        raise ParityError(
            f"{told}. It is refused: export and build it again, with another precision or version, or set "
            "accept_unproven to use it all the same"
        )
    _LOG.error("%s; ACCEPTED because accept_unproven is true", told)
    return Proof(f"ACCEPTED ALTHOUGH UNPROVEN: {told}", told)


def _told(record: ParityRecord) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in record.figures.items() if isinstance(value, float))
