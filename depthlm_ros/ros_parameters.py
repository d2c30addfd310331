"""The settings of config.py as ROS parameters: descriptors, declaration, refusal with a reason."""

from __future__ import annotations

from collections.abc import Sequence

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, ParameterType
from rclpy.node import Node
from rclpy.parameter import Parameter

from depthlm_ros.config import Parameters, Spec, belongs_to_ros, refuse_unknown, spec, specs
from depthlm_ros.errors import ConfigError

_ROS_TYPES = {
    bool: ParameterType.PARAMETER_BOOL,
    int: ParameterType.PARAMETER_INTEGER,
    float: ParameterType.PARAMETER_DOUBLE,
    str: ParameterType.PARAMETER_STRING,
}


def descriptor(s: Spec) -> ParameterDescriptor:
    """What `ros2 param describe` shows of a setting."""
    limits = {}
    if s.low is not None and s.high is not None:
        if s.type is int:
            limits["integer_range"] = [IntegerRange(from_value=s.low, to_value=s.high, step=0)]
        else:
            limits["floating_point_range"] = [FloatingPointRange(from_value=s.low, to_value=s.high, step=0.0)]
    constraints = [f"one of {s.allowed}"] if s.choices else []
    if not s.dynamic:
        constraints.append("can change only while the node is unconfigured")
    return ParameterDescriptor(
        name=s.name,
        type=_ROS_TYPES[s.type],
        description=s.description,
        additional_constraints="; ".join(constraints),
        **limits,
    )


def declare(node: Node) -> Parameters:
    """Declares all settings on a node made with `automatically_declare_parameters_from_overrides`.

    That flag is what makes a misspelt `-p` visible at all; rclpy would ignore it silently.

    Returns:
        The values given on the command line or in parameter files, defaults for the rest.

    Raises:
        ConfigError: an unknown name or a bad value.
    """
    given = {name: p.value for name, p in node.get_parameters_by_prefix("").items() if not belongs_to_ros(name)}
    parameters = Parameters.from_mapping(given)
    for name in given:
        node.undeclare_parameter(name)
    for s in specs():
        # ignore_override, because an integer given for a float has been turned into one above.
        node.declare_parameter(s.name, getattr(parameters, s.name), descriptor(s), ignore_override=True)
    return parameters


def changed(current: Parameters, updates: Sequence[Parameter], configured: bool) -> Parameters:
    """The settings after an update; parameters that belong to ROS itself are none of our business.

    Args:
        current: the settings so far.
        updates: what somebody wants to set.
        configured: whether a model is loaded, so that only dynamic settings may change.

    Raises:
        ConfigError: why not.
    """
    values = {p.name: p.value for p in updates if not belongs_to_ros(p.name)}
    refuse_unknown(values)
    for name, value in values.items():
        if configured and not spec(name).dynamic and value != getattr(current, name):
            raise ConfigError(
                f"{name} can change only while the node is unconfigured: "
                "deactivate and clean up first (ros2 lifecycle set <node> deactivate; ... cleanup), or restart"
            )
    return current.replaced(**values)
