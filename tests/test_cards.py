"""Cards are read strictly, models are found by name, folder and hub id, and nothing unsafe is called a model."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from depthlm_ros import cards
from depthlm_ros.cards import load_card, models_dir, shipped_cards
from depthlm_ros.errors import ConfigError, DialectError, LicenceError, ModelError
from depthlm_ros.modelcard import ModelCard, read_card
from depthlm_ros.prompts import SYSTEM_TEXT, answer_template

CARD = {
    "name": "toy",
    "source": "toy",
    "licence": "Apache-2.0",
    "commercial_use": True,
    "architecture": "qwen3_vl",
    "dialects": ["coordinates", "marker"],
    "default_dialect": "coordinates",
    "focal_px": 200,
    "policy": "exact",
    "depth_kind": "z",
    "max_new_tokens": 48,
    "description": "A toy.",
}


def write_card(path: Path, **changes: object) -> Path:
    values = {key: value for key, value in (CARD | changes).items() if value is not ...}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def write_model(folder: Path, config: dict | None = None, tensor: str = "lm_head.weight") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "qwen3_vl"}), encoding="utf-8")
    save_file({tensor: np.zeros(2, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """A models folder of our own in place of the shipped one."""
    folder = tmp_path / "models"
    folder.mkdir()
    write_card(folder / "toy.yaml")
    monkeypatch.setattr(cards, "models_dir", lambda: folder)
    return folder


def test_every_shipped_card_is_valid_and_named_like_its_file():
    found = {name: read_card(path).name for name, path in shipped_cards().items()}
    assert set(found) == {"demo", "depthlm-3b", "depthlm-7b", "depthlm-12b", "vlm3-depth", "vlm3-object", "vlm3-corr",
                          "vlm3-pose", "depthvlm-4b", "depthvlm-8b"}  # fmt: skip
    assert all(name == key for key, name in found.items())


@pytest.mark.parametrize(
    ("name", "architecture", "system", "tasks", "dialects", "focal_px", "kind", "system_text"),
    [
        ("depthlm-12b", "llava", "depthlm", ("depth",), ("marker",), 750, "euclidean", None),
        ("depthlm-3b", "qwen2_5_vl", "depthlm", ("depth",), ("marker",), 1000, "euclidean", SYSTEM_TEXT),
        ("depthlm-7b", "qwen2_5_vl", "depthlm", ("depth", "motion"), ("marker",), 1000, "euclidean", SYSTEM_TEXT),
        ("vlm3-depth", "qwen3_vl", "vlm3", ("depth",), ("coordinates",), 1000, "euclidean", None),
        ("vlm3-object", "qwen3_vl", "vlm3", ("object",), (), 1000, None, None),
        ("vlm3-corr", "qwen3_vl", "vlm3", ("correspondence",), (), None, None, None),
        ("vlm3-pose", "qwen3_vl", "vlm3", ("pose",), (), 750, None, None),
        ("depthvlm-4b", "qwen3_vl", "depthvlm", ("depth",), ("dense",), 1000, "z", SYSTEM_TEXT),
        ("depthvlm-8b", "qwen3_vl", "depthvlm", ("depth",), ("dense",), 1000, "z", SYSTEM_TEXT),
    ],
)
def test_published_systems_are_shown_and_asked_what_they_learnt(
    name, architecture, system, tasks, dialects, focal_px, kind, system_text
):
    card = read_card(shipped_cards()[name])
    assert (card.architecture, card.system, card.tasks, card.dialects) == (architecture, system, tasks, dialects)
    assert (card.focal_px, card.depth_kind, card.system_text) == (focal_px, kind, system_text)
    assert card.policy == "published" and card.chat and card.processor and card.scores["source"]


def test_only_the_demo_and_depthvlm_may_be_used_commercially():
    free = {name for name, path in shipped_cards().items() if read_card(path).commercial_use}
    assert free == {"demo", "depthvlm-4b"}
    for name in shipped_cards().keys() - {"demo", "depthvlm-4b"}:
        with pytest.raises(LicenceError, match=f"{name}.*licence is .*(CC-BY-NC|expected).*(demo, depthvlm-4b)"):
            load_card(name, commercial_use=True)


def test_depthvlm_is_pinned_to_the_revision_that_is_known():
    card, source = load_card("depthvlm-4b", commercial_use=True)
    assert (source, card.revision) == ("JonnyYu828/DepthVLM-4B", "2b2d02fcfe0c89c8aa7d541055e5a078930077c9")


@pytest.mark.parametrize("name", ["depthlm-3b", "depthlm-7b", "depthvlm-8b"])
def test_models_that_are_not_released_say_so(name):
    assert not read_card(shipped_cards()[name]).released
    with pytest.raises(ModelError, match=f"{name}' have not been released; to use weights of your own"):
        load_card(name)


def test_a_model_that_is_not_for_depth_says_what_it_is_for():
    card = read_card(shipped_cards()["vlm3-pose"])
    assert card.require_task("pose") == "pose"
    for asked in (card.require_dialect, lambda: card.require_dialect("marker"), lambda: card.require_task("depth")):
        with pytest.raises(DialectError, match="'vlm3-pose' was not trained for depth, it is for pose"):
            asked()
    with pytest.raises(ConfigError, match="unknown task 'posen'; did you mean 'pose'"):
        card.require_task("posen")


def test_weights_of_which_no_licence_is_known_are_not_for_commercial_use(models, tmp_path):
    folder = write_model(tmp_path / "found")
    with pytest.raises(LicenceError, match="without a card.*write licence and commercial_use into a depthlm_card.yaml"):
        load_card(folder, commercial_use=True)
    write_card(folder / "depthlm_card.yaml", name="found", commercial_use=False, licence="CC-BY-NC")
    with pytest.raises(LicenceError, match="'found' may not be used commercially: its licence is CC-BY-NC.*(toy)"):
        load_card(folder, commercial_use=True)
    write_card(folder / "depthlm_card.yaml", name="found")
    assert load_card(folder, commercial_use=True)[0].name == "found"


def test_files_are_checked_against_the_cards_digests(models):
    folder = write_model(models / "toy")
    right = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    write_card(models / "toy.yaml", sha256={"model.safetensors": right})
    assert load_card("toy")[1] == folder
    write_card(models / "toy.yaml", sha256={"model.safetensors": "0" * 64})
    with pytest.raises(ModelError, match=f"model.safetensors has sha256 {right} but its card says 0000"):
        load_card("toy")
    write_card(models / "toy.yaml", sha256={"other.safetensors": right})
    with pytest.raises(ModelError, match="lacks other.safetensors, whose sha256 its card names"):
        load_card("toy")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"patch_size": 16, "size": {"longest_edge": 2048}}, None),
        ({"patch_size": {"height": 16}, "size": {"longest_edge": 1024}}, "longest_edge is 1024, published 2048"),
        ({"patch_size": 14, "max_pixels": 999}, "longest_edge is 999, published 2048; patch_size is 14, published 16"),
    ],
)  # fmt: skip
def test_an_image_processor_other_than_the_published_one_is_told(models, config, told):
    folder = write_model(models / "toy")
    (folder / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_card(models / "toy.yaml", processor={"patch_size": 16, "longest_edge": 2048})
    assumed = " | ".join(load_card("toy")[0].assumptions)
    assert (told in assumed) if told else assumed == ""


def test_the_demo_may_be_used_by_anyone_and_speaks_all_dialects():
    card = read_card(models_dir() / "demo.yaml")
    assert (card.licence, card.commercial_use) == ("Apache-2.0", True)
    assert (card.dialects, card.default_dialect) == (("dense", "coordinates", "marker", "compact"), "dense")
    assert (card.focal_px, card.policy, card.depth_kind, card.system_text) == (200.0, "exact", "z", None)


@pytest.mark.parametrize(("name", "focal_px", "dialect"), [("depthlm-12b", 750, "marker"),
                                                           ("vlm3-depth", 1000, "coordinates")])  # fmt: skip
def test_published_models_keep_their_focal_length_and_question_and_forbid_commercial_use(name, focal_px, dialect):
    card, source = load_card(name)
    assert (card.focal_px, card.dialects, card.policy) == (focal_px, (dialect,), "published")
    assert not card.commercial_use
    assert source == card.source
    sets = [value for key, value in card.scores["delta1"].items() if key != "average"]
    assert np.mean(sets) == pytest.approx(card.scores["delta1"]["average"], abs=6e-4)


def test_a_card_is_frozen(tmp_path):
    with pytest.raises(FrozenInstanceError):
        read_card(write_card(tmp_path / "card.yaml")).focal_px = 3.0


def test_an_unknown_key_names_the_nearest_one(tmp_path):
    with pytest.raises(ConfigError, match="unknown key 'focal_pix'; did you mean 'focal_px'"):
        read_card(write_card(tmp_path / "card.yaml", focal_pix=3))


def test_missing_keys_are_named(tmp_path):
    with pytest.raises(ConfigError, match="lacks architecture, focal_px"):
        read_card(write_card(tmp_path / "card.yaml", focal_px=..., architecture=...))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", 12, "name is 12"),
        ("name", "", "name is ''"),
        ("revision", 1234567, "in quotes if it looks like a number"),
        ("commercial_use", "no", "commercial_use is 'no'; it must be true or false"),
        ("architecture", "qwen3vl", "did you mean 'qwen3_vl'"),
        ("dialects", "marker", "dialects is 'marker'; it must be a list"),
        ("dialects", [], "must be a list"),
        ("dialects", ["marker", "marker"], "each dialect once"),
        ("dialects", ["cordinates"], "did you mean 'coordinates'"),
        ("default_dialect", "dense", "unknown default_dialect 'dense'"),
        ("focal_px", 0, "focal_px is 0"),
        ("focal_px", True, "focal_px is True"),
        ("focal_px", "1e3", "focal_px is '1e3'"),
        ("focal_px", float("nan"), "focal_px is nan"),
        ("policy", "exactly", "did you mean 'exact'"),
        ("depth_kind", "range", "known: z, euclidean"),
        ("coordinate_range", 2000.0, "coordinate_range is 2000.0"),
        ("compact_range", 1, "compact_range is 1; it must be a whole number of at least 2"),
        ("points_per_question", 0, "points_per_question is 0"),
        ("answer", "3.42", "answer is '3.42'; it must be a text with {number} where"),
        ("max_new_tokens", 0, "max_new_tokens is 0"),
        ("system_text", ["a"], "system_text is"),
        ("assumptions", "one", "assumptions is 'one'"),
        ("scores", [0.9], "scores is"),
        ("scores", {"delta1": 0.9}, "no 'source'"),
        ("system", "deptvlm", "did you mean 'depthvlm'"),
        ("tasks", [], "tasks is \\(\\)"),
        ("tasks", ["depth", "depth"], "each task once"),
        ("tasks", ["dept"], "did you mean 'depth'"),
        ("tasks", ["pose"], "an empty list, since the tasks don't include depth"),
        ("depth_kind", ..., "unknown depth_kind 'None'"),
        ("default_dialect", ..., "unknown default_dialect 'None'"),
        ("focal_px", None, "focal_px is None"),
        ("released", "no", "released is 'no'"),
        ("chat", {"order": 3}, "chat is"),
        ("sha256", {"a": "12"}, "sha256 of a is '12'; it must be 64 hex digits"),
    ],
)
def test_a_faulty_value_is_named_with_its_file_and_what_is_wanted(tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_card(write_card(tmp_path / "card.yaml", **{key: value}))
    assert "card.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- a\n- b", "", "!!python/object/apply:os.getcwd []"])
def test_what_is_no_card_is_refused(tmp_path, text):
    (tmp_path / "card.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="card.yaml"):
        read_card(tmp_path / "card.yaml")


def test_require_dialect_gives_the_default_and_lists_what_is_spoken():
    card = ModelCard(**CARD)
    assert card.require_dialect() == "coordinates"
    assert card.require_dialect("marker") == "marker"
    with pytest.raises(DialectError, match="'toy': unknown dialect 'dense'.*known: coordinates, marker"):
        card.require_dialect("dense")


def test_a_named_card_gives_its_folder(models):
    folder = write_model(models / "toy")
    card, source = load_card("toy")
    assert (card.name, source) == ("toy", folder)


def test_the_hub_id_of_a_shipped_card_gives_that_card():
    card, source = load_card("facebook/DepthLM")
    assert (card.name, source) == ("depthlm-12b", "facebook/DepthLM")


def test_a_folder_is_read_with_the_card_inside_it(models, tmp_path):
    folder = write_model(tmp_path / "mine")
    write_card(folder / "depthlm_card.yaml", name="mine", focal_px=321)
    card, source = load_card(folder)
    assert (card.name, card.focal_px, card.assumptions, source) == ("mine", 321.0, (), folder)


def test_the_folder_of_a_named_model_keeps_the_card_beside_it(models):
    write_model(models / "toy")
    assert load_card(str(models / "toy"))[0].name == "toy"


def test_a_model_that_does_not_exist_names_the_nearest_card(models):
    with pytest.raises(ModelError, match="unknown model 'tooy'; did you mean 'toy'"):
        load_card("tooy")


def test_a_folder_that_does_not_exist_is_named(models, tmp_path):
    with pytest.raises(ModelError, match="nowhere doesn't exist"):
        load_card(tmp_path / "nowhere")


def test_a_card_whose_folder_is_missing_says_so(models):
    with pytest.raises(ModelError, match="toy doesn't exist"):
        load_card("toy")


def test_a_hub_model_that_cannot_be_fetched_says_what_to_do(models, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="nobody/nothing.*download it and pass the folder"):
        load_card("nobody/nothing")


def test_a_folder_without_weights_says_so(models):
    folder = write_model(models / "toy")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*.safetensors; copy or train"):
        load_card("toy")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_with_the_way_out(models, name):
    folder = write_model(models / "toy")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError, match=f"{name}.*convert them to safetensors"):
        load_card("toy")


def test_a_missing_shard_is_named(models):
    folder = write_model(models / "toy")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match="lacks 1 of the 2 shards.*model-00002-of-00002"):
        load_card("toy")


def test_a_folder_without_config_is_refused(models, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no config.json"):
        load_card(tmp_path / "empty")


def test_a_card_that_contradicts_its_folder_is_refused(models):
    write_model(models / "toy", {"model_type": "qwen2_5_vl"})
    with pytest.raises(ModelError, match="model_type 'qwen2_5_vl' but its card says 'qwen3_vl'"):
        load_card("toy")


@pytest.mark.parametrize(
    ("config", "tensor", "dialect", "focal_px", "policy", "kind", "system_text"),
    [
        ({"model_type": "qwen3_vl"}, "lm_head.weight", "coordinates", 1000, "published", "euclidean", None),
        ({"model_type": "qwen3_vl"}, "depth_head.norm.weight", "dense", 1000, "published", "z",
         "You are a helpful assistant."),
        ({"model_type": "qwen3_vl", "depth_head_type": "mlp"}, "depth_head.mlp.0.weight", "dense", 1000, "published",
         "z", "You are a helpful assistant."),
        ({"model_type": "qwen2_5_vl"}, "lm_head.weight", "marker", 1000, "published", "euclidean",
         "You are a helpful assistant."),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, "lm_head.weight", "marker", 750,
         "published", "euclidean", None),
    ],
)  # fmt: skip
def test_a_folder_without_card_is_recognised_and_the_assumptions_are_told(
    models, tmp_path, config, tensor, dialect, focal_px, policy, kind, system_text
):
    card, source = load_card(write_model(tmp_path / "found", config, tensor))
    assert (card.dialects, card.default_dialect, card.focal_px) == ((dialect,), dialect, focal_px)
    assert (card.policy, card.depth_kind, card.system_text) == (policy, kind, system_text)
    assert (card.name, source, card.commercial_use) == ("found", tmp_path / "found", False)
    told = " | ".join(card.assumptions)
    for what in (config["model_type"], dialect, f"{focal_px} px", policy, "licence"):
        assert what in told


@pytest.mark.parametrize(
    ("config", "seen"),
    [({"model_type": "bert"}, "'bert'"), ({}, "'qwen3'"), ({"model_type": "llava"}, "'llava' with vision None")],
)
def test_an_unknown_architecture_is_named(models, tmp_path, config, seen):
    folder = write_model(tmp_path / "found", config or {"model_type": "qwen3"})
    with pytest.raises(ModelError, match=f"model_type {seen} isn't known; known: qwen3_vl"):
        load_card(folder)


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\n", b"", b"\x08\0\0\0\0\0\0\0not json"]
)
def test_a_file_that_is_not_safetensors_is_refused(models, tmp_path, content):
    folder = write_model(tmp_path / "found")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="isn't a whole safetensors file"):
        load_card(folder)


def test_a_broken_config_is_refused(models, tmp_path):
    folder = write_model(tmp_path / "found")
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="isn't valid JSON"):
        load_card(folder)


def test_a_recognised_card_can_be_written_into_its_folder_and_read_back(models, tmp_path):
    folder = write_model(tmp_path / "found")
    card, _ = load_card(folder)
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(card).items()}
    write_card(folder / "depthlm_card.yaml", **values)
    assert load_card(folder)[0] == card


@pytest.mark.parametrize(
    ("config", "tensor", "system", "tasks", "told"),
    [
        ({"model_type": "qwen3_vl"}, "depth_head.mlp.0.weight", "depthvlm", ("depth",), "depth head is present: mlp"),
        ({"model_type": "qwen3_vl"}, "depth_head.projects.0.weight", "depthvlm", ("depth",), "head is present: dpt"),
        ({"model_type": "qwen3_vl"}, "lm_head.weight", "vlm3", ("depth", "object", "correspondence", "pose"),
         "asked about depth, object, correspondence, pose: which of them it learnt can't be seen"),
        ({"model_type": "qwen2_5_vl"}, "lm_head.weight", "depthlm", ("depth", "motion"), "about depth, motion"),
    ],
)  # fmt: skip
def test_a_folder_without_card_is_taken_for_one_of_the_published_systems(
    models, tmp_path, config, tensor, system, tasks, told
):
    card, _ = load_card(write_model(tmp_path / "found", config, tensor))
    assert (card.system, card.tasks) == (system, tasks)
    assert told in " | ".join(card.assumptions)


def test_a_card_can_be_changed_only_into_a_valid_one():
    with pytest.raises(ConfigError, match="policy 'other'"):
        replace(ModelCard(**CARD), policy="other")


def install(prefix: Path, package: Path) -> Path:
    """Copies cards.py and the cards as an installation would lie there; returns its models folder."""
    package.mkdir(parents=True)
    shutil.copy(cards.__file__, package)
    folder = prefix / "share" / "depthlm_ros" / "models"
    folder.mkdir(parents=True)
    write_card(folder / "demo.yaml")
    return folder


def test_an_installed_package_finds_the_cards_of_its_own_prefix(tmp_path, monkeypatch):
    package = tmp_path / "a" / "lib" / "python3.12" / "site-packages" / "depthlm_ros"
    folder = install(tmp_path / "a", package)
    other = install(tmp_path / "b", tmp_path / "b" / "depthlm_ros")
    monkeypatch.setattr(cards, "__file__", str(package / "cards.py"))
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(other.parents[2]))
    assert models_dir() == folder


def test_cards_are_found_by_ament_prefix_where_the_package_lies_elsewhere(tmp_path, monkeypatch):
    folder = install(tmp_path / "ws", tmp_path / "elsewhere" / "depthlm_ros")
    monkeypatch.setattr(cards, "__file__", str(tmp_path / "elsewhere" / "depthlm_ros" / "cards.py"))
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"{tmp_path / 'other'}:{tmp_path / 'ws'}")
    assert models_dir() == folder


def test_no_cards_at_all_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "__file__", str(tmp_path / "depthlm_ros" / "cards.py"))
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.delenv("AMENT_PREFIX_PATH", raising=False)
    with pytest.raises(ModelError, match="install the package with its data files"):
        models_dir()


def test_an_answer_of_the_models_own_stands_for_the_published_sentence_and_not_for_the_bare_number(tmp_path):
    speaks = {"dialects": ["coordinates", "compact"], "points_per_question": 3}
    own = read_card(write_card(tmp_path / "own.yaml", answer="It is {number} m.", **speaks))
    assert own.answer_template("coordinates") == "It is {number} m."
    assert own.answer_template("compact", 3) == "{number} {number} {number}"
    card = read_card(write_card(tmp_path / "card.yaml", **speaks))
    assert card.answer_template("coordinates") == answer_template("coordinates")
    with pytest.raises(ConfigError, match="points_per_question is 4; model 'toy' answers at most 3"):
        card.answer_template("compact", 4)
