"""Every setting lives once; what is made from it can't drift and what isn't one is refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from depthlm_ros import config
from depthlm_ros.config import Parameters
from depthlm_ros.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
NAMES = [s.name for s in config.specs()]


def test_every_setting_has_a_description_and_a_default_that_is_allowed():
    for s in config.specs():
        assert s.description.endswith((".", ")")), s.name
        assert s.check(s.default) == s.default


def test_numbers_have_a_range():
    assert [s.name for s in config.specs() if s.type in (int, float) and not s.allowed] == []


def test_the_shipped_yaml_says_what_config_says():
    shipped = (ROOT / "config" / "depthlm.yaml").read_text(encoding="utf-8")
    assert shipped.endswith(config.yaml_text()), "config/depthlm.yaml has drifted; write config.yaml_text() into it"
    assert Parameters.from_yaml(ROOT / "config" / "depthlm.yaml") == Parameters()


def test_the_table_has_a_row_for_every_setting():
    rows = config.markdown_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == NAMES
    assert all(row.count(" | ") == 4 for row in rows)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("pionts", "points"), ("max_depth", "max_depth_m"), ("model_name", "model"), ("Stride", "stride")],
)
def test_an_unknown_name_is_answered_with_the_nearest_one(wrong, nearest):
    with pytest.raises(ConfigError, match=f"unknown parameter '{wrong}'; did you mean '{nearest}'"):
        Parameters.from_mapping({wrong: 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"points": -1}, "points is -1; choose a value of 0 to 1000000"),
        ({"stride": 0}, "stride is 0; choose a value of 1 to 64"),
        ({"points": "many"}, "points is 'many', which is of type str; give a whole number"),
        ({"points": True}, "points is True, which is of type bool"),
        ({"max_depth_m": float("nan")}, "max_depth_m is nan; give a finite number"),
        ({"dialect": "denes"}, r"dialect is 'denes' \(did you mean dense\?\); choose one of"),
        ({"rectified": 1}, "rectified is 1, which is of type int"),
    ],
)
def test_a_bad_value_is_refused_with_the_value_and_the_remedy(values, message):
    with pytest.raises(ConfigError, match=message):
        Parameters(**values)


def test_a_whole_number_will_do_for_a_float():
    assert Parameters(max_depth_m=20).max_depth_m == 20.0
    assert isinstance(Parameters(max_depth_m=20).max_depth_m, float)


def test_replaced_refuses_what_the_constructor_refuses():
    with pytest.raises(ConfigError, match="did you mean 'points'"):
        Parameters().replaced(point=3)
    assert Parameters().replaced(points=3).points == 3


def parse(*arguments: str) -> Parameters:
    parser = argparse.ArgumentParser()
    config.add_arguments(parser, NAMES)
    return config.from_arguments(parser.parse_args(arguments))


def test_the_command_line_has_the_same_defaults():
    assert parse() == Parameters()


def test_the_command_line_reads_every_type():
    read = parse("--points", "9", "--max-depth-m", "1e1", "--rectified", "--no-autostart", "--model", "some/folder")
    assert read == Parameters(points=9, max_depth_m=10.0, rectified=True, autostart=False, model="some/folder")


def test_the_command_line_refuses_with_the_reason(capsys):
    with pytest.raises(SystemExit):
        parse("--stride", "0")
    assert "stride is 0; choose a value of 1 to 64" in capsys.readouterr().err


def test_help_tells_range_and_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "[1 to 64] Default: 4." in text


def write(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_parameter_file_may_hold_what_belongs_to_ros(tmp_path):
    section = {"points": 7, "use_sim_time": True, "qos_overrides": {"/image": {"subscription": {"depth": 1}}}}
    path = write(
        tmp_path / "p.yaml", {"/**": {"ros__parameters": {"stride": 2}}, "depth_node": {"ros__parameters": section}}
    )
    assert Parameters.from_yaml(path) == Parameters(points=7, stride=2)


@pytest.mark.parametrize("content", [{}, {"other_node": {}}, {"depth_node": {"points": 3}}, ["points"], "points"])
def test_a_parameter_file_of_another_form_is_refused(tmp_path, content):
    with pytest.raises(ConfigError, match="ros__parameters"):
        Parameters.from_yaml(write(tmp_path / "p.yaml", content))


def test_a_missing_parameter_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        Parameters.from_yaml(tmp_path / "nowhere.yaml")
