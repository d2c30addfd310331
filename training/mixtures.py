"""From the `data` list of a configuration to a mixture of sources.

data:
  - labels: argoverse/labels.jsonl
    depth_kind: euclidean
    range_m: argoverse
    weight: 0.21
  - dialogue: objects/labels.jsonl
    weight: 0.05
  - scenes: 20000
    split: train
    cameras: [[200, 200, 143.5, 95.5, 288, 192]]
    weight: 1
  - pairs: 5000
    task: pose
    seed: 0
    split: train
    cameras: [[200, 200, 143.5, 95.5, 288, 192]]
    weight: 0.1
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

from depthlm_ros.camera import Camera
from depthlm_ros.errors import ConfigError, unknown_choice
from depthlm_training.data import Mixture
from depthlm_training.scene_pairs import ScenePairSource
from depthlm_training.sources import DialogueSource, LabelledSource, SceneSource, Source

# The key that says what an entry is, with the argument that its value is for.
KINDS = {
    "labels": (LabelledSource, "path"),
    "dialogue": (DialogueSource, "path"),
    "scenes": (SceneSource, "count"),
    "pairs": (ScenePairSource, "count"),
}


def open_mixture(entries: Sequence[Mapping[str, object]], seed: int = 0, bad_rows: float = 0.01) -> Mixture:
    """Opens all sources of a configuration.

    Args:
        entries: each with one of the keys in `KINDS`, the other arguments of that source, and maybe a `weight`;
            without any weights each source counts by its rows.
        seed: of the draws.
        bad_rows: how many rows may be bad, below 1 a share of all.

    Raises:
        ConfigError: an unknown key, one that is missing, weights for some entries only.
        DatasetError: a file that can't be read.
    """
    weights = [entry["weight"] for entry in entries if "weight" in entry]
    if weights and len(weights) < len(entries):
        raise ConfigError(f"{len(weights)} of {len(entries)} data entries have a weight; give all of them one, or none")
    return Mixture([open_source(entry) for entry in entries], weights or None, seed, bad_rows)


def open_source(entry: Mapping[str, object]) -> Source:
    """Opens the source of one entry; raises as `open_mixture` does."""
    kinds = [kind for kind in KINDS if kind in entry]
    if len(kinds) != 1:
        raise ConfigError(f"a data entry has the keys {sorted(entry)}; it needs exactly one of {', '.join(KINDS)}")
    source, first = KINDS[kinds[0]]
    arguments = {key: value for key, value in entry.items() if key not in (kinds[0], "weight")}
    parameters = inspect.signature(source).parameters
    known = [kinds[0], "weight", *(name for name in parameters if name != first)]
    for key in arguments:
        if key not in known:
            raise ConfigError(f"data entry {kinds[0]}: " + unknown_choice("key", key, known))
    if "cameras" in arguments:
        arguments["cameras"] = [Camera(*values) for values in arguments["cameras"]]
    arguments[first] = entry[kinds[0]]
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in arguments:
            raise ConfigError(f"data entry {kinds[0]} lacks {name!r}; add it")
    return source(**arguments)
