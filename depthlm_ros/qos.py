"""Quality of service: what is asked for, and in words why a publisher and a subscription don't match."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    LivelinessPolicy,
    QoSPolicyKind,
    QoSProfile,
    ReliabilityPolicy,
    qos_profile_sensor_data,
)
from rclpy.qos_overriding_options import QoSOverridingOptions

# Weakest first; a publisher must offer at least what a subscription requests (DDS 1.4, 2.2.3: RxO).
_STRENGTH = {
    "reliability": (ReliabilityPolicy.BEST_EFFORT, ReliabilityPolicy.RELIABLE),
    "durability": (DurabilityPolicy.VOLATILE, DurabilityPolicy.TRANSIENT_LOCAL),
    "liveliness": (LivelinessPolicy.AUTOMATIC, LivelinessPolicy.MANUAL_BY_TOPIC),
}
# Maximum intervals: the publisher's may not be longer than the subscription's.
_INTERVALS = ("deadline", "liveliness_lease_duration")
_UNLIMITED_NS = 2**63 - 1


def sensor_qos() -> QoSProfile:
    """SensorDataQoS (best effort, volatile, the last five): takes images from any publisher of the usual kinds."""
    template = qos_profile_sensor_data
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=template.depth,
        reliability=template.reliability,
        durability=template.durability,
    )


def output_qos() -> QoSProfile:
    """Reliable, volatile, the last five: matches subscriptions of either reliability."""
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=5, reliability=ReliabilityPolicy.RELIABLE)


def question_qos() -> QoSProfile:
    """Reliable, volatile, the last hundred: neither a burst of questions nor their answers get lost unheard."""
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=100, reliability=ReliabilityPolicy.RELIABLE)


def overriding_options() -> QoSOverridingOptions:
    """Lets `qos_overrides.<topic>.<publisher|subscription>.<policy>` change history, depth, reliability, durability."""
    kinds = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
    return QoSOverridingOptions(policy_kinds=kinds)


def differences(offered: QoSProfile, requested: QoSProfile) -> dict[str, tuple[str, str]]:
    """Which settings keep a publisher's offer from matching a subscription's request.

    Returns:
        Setting name to (offered, requested), both as they are written in `qos_overrides`; empty when they match.
    """
    found = {}
    for name, order in _STRENGTH.items():
        offer, request = getattr(offered, name), getattr(requested, name)
        if offer in order and request in order and order.index(offer) < order.index(request):
            found[name] = (offer.name.lower(), request.name.lower())
    for name in _INTERVALS:
        offer, request = _nanoseconds(getattr(offered, name)), _nanoseconds(getattr(requested, name))
        if offer > request:
            found[name] = (_seconds(offer), _seconds(request))
    return found


def explain_subscription(topic: str, own: QoSProfile, publishers: Iterable[tuple[str, QoSProfile]]) -> list[str]:
    """One sentence for each publisher whose messages our subscription can't get, with what to set.

    Args:
        topic: full topic name.
        own: what our subscription requests.
        publishers: node name and offered profile of each publisher.
    """
    sentences = []
    for node, offered in publishers:
        for setting, (offer, request) in differences(offered, own).items():
            sentences.append(
                f"nothing arrives on {topic} from {node}: it offers {setting} {offer}, this node requests {request}. "
                f"Set -p qos_overrides.{topic}.subscription.{setting}:={offer} here, or {setting} {request} there"
            )
    return sentences


def explain_publisher(topic: str, own: QoSProfile, subscriptions: Iterable[tuple[str, QoSProfile]]) -> list[str]:
    """One sentence for each subscription that can't get our messages, with what to set.

    Args:
        topic: full topic name.
        own: what our publisher offers.
        subscriptions: node name and requested profile of each subscription.
    """
    sentences = []
    for node, requested in subscriptions:
        for setting, (offer, request) in differences(own, requested).items():
            sentences.append(
                f"{node} gets nothing on {topic}: it requests {setting} {request}, this node offers {offer}. "
                f"Set -p qos_overrides.{topic}.publisher.{setting}:={request} here, or {setting} {offer} there"
            )
    return sentences


class Mismatches:
    """Remembers which topics the middleware complained about, and turns that into sentences later.

    Later, because the graph may know a peer only after the event.
    """

    def __init__(self) -> None:
        self._topics: set[str] = set()
        self.sentences: list[str] = []

    def note(self, topic: str) -> None:
        """Notes a complaint about a topic, full name."""
        self._topics.add(topic)

    def explain(self, node: Node, subscriptions: Iterable[Any], publishers: Iterable[Any]) -> list[str]:
        """Brings `sentences` up to date; returns those that are new.

        Args:
            node: knows the graph.
            subscriptions: of this node, those that are there now.
            publishers: likewise.
        """
        sentences = []
        for own in subscriptions:
            if own.topic_name in self._topics:
                peers = [(p.node_name, p.qos_profile) for p in node.get_publishers_info_by_topic(own.topic_name)]
                sentences += explain_subscription(own.topic_name, own.qos_profile, peers)
        for own in publishers:
            if own.topic_name in self._topics:
                peers = [(p.node_name, p.qos_profile) for p in node.get_subscriptions_info_by_topic(own.topic_name)]
                sentences += explain_publisher(own.topic_name, own.qos_profile, peers)
        new = [sentence for sentence in sentences if sentence not in self.sentences]
        self.sentences = sentences
        return new


def _nanoseconds(duration: Duration) -> int:
    # Zero is how rmw writes "not set", which means no limit.
    return duration.nanoseconds or _UNLIMITED_NS


def _seconds(nanoseconds: int) -> str:
    return "unlimited" if nanoseconds >= _UNLIMITED_NS else f"{nanoseconds / 1e9:g} s"
