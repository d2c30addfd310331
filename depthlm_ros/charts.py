"""Figures of a report: SVG drawn by hand and pictures as data URLs, so that one HTML file holds everything."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from PIL import Image

from depthlm_ros.evaluate import DENSE_SHARE
from depthlm_ros.overlay import depth_colours, overlay

UNKNOWN = (38, 40, 48)
PALETTE_STEPS = 24


def data_url(image: np.ndarray, width: int = 480) -> str:
    """A JPEG data URL of (H, W, 3) uint8 RGB, scaled down to `width` pixels if it is wider."""
    picture = Image.fromarray(image)
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def paint_depth(depth_m: np.ndarray, image: np.ndarray, near_m: float, far_m: float) -> np.ndarray:
    """Colours a depth map; one with few known pixels is drawn as dots on the darkened image instead.

    Args:
        depth_m: (H, W) metres, NaN where unknown.
        image: (H, W, 3) uint8 RGB it belongs to.
        near_m: red end of the logarithmic scale.
        far_m: blue end of the scale.

    Returns:
        (H, W, 3) uint8 RGB; unknown pixels of a dense map are `UNKNOWN`.
    """
    known = np.isfinite(depth_m)
    if known.mean() >= DENSE_SHARE:
        colours = depth_colours(depth_m, near_m, far_m)
        colours[~known] = UNKNOWN
        return colours
    rows, columns = np.nonzero(known)
    grey = (image.mean(axis=2, keepdims=True) * 0.35 + 12).astype(np.uint8)
    pixels = np.stack([columns, rows], axis=1).astype(np.float32)
    backdrop = np.repeat(grey, 3, axis=2)
    return overlay(backdrop, pixels, depth_m[rows, columns], near_m=near_m, far_m=far_m)


def scale_bar(near_m: float, far_m: float) -> str:
    """SVG: the colour scale of `depth_colours` with its metres."""
    depths = np.geomspace(near_m, far_m, PALETTE_STEPS)
    colours = depth_colours(depths, near_m, far_m)
    width = 640
    step = width / PALETTE_STEPS
    boxes = "".join(
        f'<rect x="{i * step:.1f}" y="0" width="{step + 0.5:.1f}" height="12" fill="rgb({r},{g},{b})"/>'
        for i, (r, g, b) in enumerate(colours)
    )
    labels = "".join(
        f'<text x="{share * width:.0f}" y="28" text-anchor="{anchor}">{near_m * (far_m / near_m) ** share:.2g} m</text>'
        for share, anchor in ((0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1, "end"))
    )
    return _svg(width, 32, boxes + labels, "depth scale")


def error_histogram(predicted: np.ndarray, true: np.ndarray) -> str:
    """SVG: how often which ratio of predicted to true depth occurs, log axis from 1/4 to 4, δ1's band marked."""
    answered = np.isfinite(predicted)
    log_ratio = np.log2(predicted[answered] / true[answered])
    edges = np.linspace(-2, 2, 61)
    counts, _ = np.histogram(np.clip(log_ratio, -2, 2), edges)
    width, height, base = 640, 220, 190
    tallest = max(counts.max(initial=0), 1)

    def x(value: float) -> float:
        return (value + 2) / 4 * width

    limit = math.log2(1.25)
    band = f'<rect class="band" x="{x(-limit):.1f}" y="0" width="{x(limit) - x(-limit):.1f}" height="{base}"/>'
    bars = "".join(
        f'<rect class="{"good" if abs((low + high) / 2) < limit else "bad"}" x="{x(low) + 0.5:.1f}" '
        f'y="{base - base * 0.95 * count / tallest:.1f}" width="{x(high) - x(low) - 1:.1f}" '
        f'height="{base * 0.95 * count / tallest:.1f}"/>'
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    )
    marks = ((0.25, "≤ ¼"), (0.5, "½"), (0.8, "0.8"), (1, "1"), (1.25, "1.25"), (2, "2"), (4, "≥ 4"))
    labels = "".join(
        f'<text x="{x(math.log2(ratio)):.0f}" y="{base + 18}" text-anchor="{_anchor(ratio, 0.25, 4)}">{text}</text>'
        for ratio, text in marks
    )
    axis = f'<line class="axis" x1="0" y1="{base}" x2="{width}" y2="{base}"/>'
    centre = f'<line class="axis" x1="{x(0):.1f}" y1="0" x2="{x(0):.1f}" y2="{base}"/>'
    return _svg(width, height, band + bars + axis + centre + labels, "histogram of predicted over true depth")


def bars(rows: list[tuple[str, float, tuple[float, float] | None]]) -> str:
    """SVG: horizontal bars from 0 to 1 with their value, and an interval where there is one; the first stands out."""
    width, left, right, step = 640, 190, 60, 34
    span = width - left - right
    parts = []
    for index, (name, value, interval) in enumerate(rows):
        y = index * step + 6
        parts.append(f'<text x="{left - 10}" y="{y + 15}" text-anchor="end">{name}</text>')
        parts.append(f'<rect class="track" x="{left}" y="{y}" width="{span}" height="20" rx="3"/>')
        kind = "good" if index == 0 else "muted"
        parts.append(f'<rect class="{kind}" x="{left}" y="{y}" width="{span * value:.1f}" height="20" rx="3"/>')
        if interval is not None:
            low, high = (left + span * bound for bound in interval)
            parts.append(
                f'<path class="whisker" d="M{low:.1f} {y + 10}H{high:.1f}M{low:.1f} {y + 5}v10M{high:.1f} {y + 5}v10"/>'
            )
        parts.append(f'<text class="strong" x="{left + span + 8}" y="{y + 15}">{value:.3f}</text>')
    return _svg(width, len(rows) * step + 4, "".join(parts), "comparison with baselines")


def reliability_chart(curves: list[tuple[str, list[float], list[float]]]) -> str:
    """SVG: share of right depths over confidence, a line for each (name, confidences, shares); the last stands out."""
    side, left = 300, 46
    parts = [f'<path class="axis" d="M{left} 10V{side + 10}H{left + side}" fill="none"/>']
    parts.append(f'<path class="whisker faint" d="M{left} {side + 10}L{left + side} 10"/>')
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = left + side * tick, 10 + side * (1 - tick)
        parts.append(f'<text x="{x:.0f}" y="{side + 28}" text-anchor="middle">{tick:g}</text>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{tick:g}</text>')
    for index, (name, confidences, shares) in enumerate(curves):
        kind = "good" if index == len(curves) - 1 else "muted"
        dots = [(left + side * c, 10 + side * (1 - s)) for c, s in zip(confidences, shares, strict=True)]
        parts.append(f'<path class="line {kind}" d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in dots)}"/>')
        parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in dots]
        parts.append(f'<circle class="{kind}" cx="{left + side + 30}" cy="{30 + 24 * index}" r="4"/>')
        parts.append(f'<text x="{left + side + 42}" y="{35 + 24 * index}">{name}</text>')
    parts.append(f'<text x="{left + side + 24}" y="{side + 10}">confidence →, share right ↑</text>')
    return _svg(640, side + 34, "".join(parts), "share of right depths over confidence")


def strip(values: list[float | None], top: float, unit: str) -> str:
    """SVG: one bar for each frame, from 0 to `top`; frames without a value are left empty."""
    width, height = 640, 90
    step = width / max(len(values), 1)
    parts = [
        f'<rect class="good" x="{i * step + 0.5:.1f}" y="{height - height * min(value / top, 1):.1f}" '
        f'width="{max(step - 1, 0.5):.1f}" height="{height * min(value / top, 1):.1f}"/>'
        for i, value in enumerate(values)
        if value is not None
    ]
    axis = f'<line class="axis" x1="0" y1="{height}" x2="{width}" y2="{height}"/>'
    label = f'<text x="{width}" y="10" text-anchor="end">top: {top:.3g}{unit}</text>'
    ends = f'<text x="0" y="{height + 16}">frame 1</text>'
    ends += f'<text x="{width}" y="{height + 16}" text-anchor="end">{len(values)}</text>'
    return _svg(width, height + 20, "".join(parts) + axis + label + ends, "value of each frame")


def view_cloud(points_m: np.ndarray, rgb: np.ndarray, size: tuple[int, int], turn_deg: float = 28.0) -> np.ndarray:
    """Draws a cloud as seen from the side and above of where the camera stood.

    Args:
        points_m: (N, 3) in the camera's optical frame.
        rgb: (N, 3) uint8.
        size: (width, height) of the picture.
        turn_deg: how far to the side.

    Returns:
        (height, width, 3) uint8 RGB.
    """
    width, height = size
    picture = np.full((height, width, 3), UNKNOWN, np.uint8)
    known = np.isfinite(points_m).all(axis=1)
    points, rgb = points_m[known].astype(np.float64), rgb[known]
    if not len(points):
        return picture
    # What lies beyond the far end of the bulk would shrink the rest to a speck.
    near_enough = points[:, 2] <= np.percentile(points[:, 2], 97)
    points, rgb = points[near_enough], rgb[near_enough]
    centre = np.median(points, axis=0)
    yaw, pitch = math.radians(turn_deg), math.radians(18)
    turn = np.array([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
    tilt = np.array([[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)], [0, math.sin(pitch), math.cos(pitch)]])
    seen = (points - centre) @ turn.T @ tilt.T
    low, high = np.percentile(seen[:, :2], (1, 99), axis=0)
    pixels_per_metre = 0.9 * min(width / max(high[0] - low[0], 1e-3), height / max(high[1] - low[1], 1e-3))
    at = (seen[:, :2] - (low + high) / 2) * pixels_per_metre + np.array([width, height]) / 2
    reach = max(1, round(0.7 * math.sqrt(width * height / len(points))))
    far_first = np.argsort(-seen[:, 2], kind="stable")
    span = np.arange(-(reach // 2), reach - reach // 2)
    offsets = np.stack(np.meshgrid(span, span), axis=-1).reshape(-1, 2)
    cells = (at[far_first, None, :].astype(int) + offsets).reshape(-1, 2)
    colours = np.repeat(rgb[far_first], len(offsets), axis=0)
    inside = ((cells >= 0) & (cells < (width, height))).all(axis=1)
    picture[cells[inside, 1], cells[inside, 0]] = colours[inside]
    return picture


def _anchor(value: float, first: float, last: float) -> str:
    return "start" if value == first else "end" if value == last else "middle"


def _svg(width: int, height: int, content: str, title: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{content}</svg>'
