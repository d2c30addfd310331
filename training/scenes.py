"""Rooms, corridors and streets without end, and cameras in them.

What makes depth from a single image possible at all is built in as it is in the real world: floors with tiles of one
size, doors, storeys, people and cars of known sizes, cameras at a height that a robot or a hand has.

    python -m depthlm_training.scenes --out scenes.png --seed 0      # a contact sheet to look at
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from depthlm_ros.camera import Camera
from depthlm_training.raycast import (
    BOX,
    CHECKER,
    CYLINDER,
    FAR_M,
    MOTTLED,
    PLAIN,
    PLANKS,
    SPHERE,
    TILES,
    Pose,
    Scene,
    render,
)

KINDS = ("room", "corridor", "street")


def _tint(rng: np.random.Generator, base, spread: float = 0.08) -> np.ndarray:
    return np.clip(np.asarray(base, np.float32) + rng.normal(0, spread, 3) + rng.normal(0, spread), 0.05, 0.98)


def _furnish(scene: Scene, rng: np.random.Generator, place, count: int) -> None:
    """Things of the sizes they have in the world, so that size in the image tells distance."""
    for _ in range(count):
        x, y = place()
        yaw = rng.uniform(0, np.pi)
        thing = rng.choice(
            ["crate", "table", "person", "ball", "pillar", "cabinet"], p=[0.3, 0.17, 0.18, 0.12, 0.1, 0.13]
        )
        if thing == "crate":
            h = rng.choice([0.15, 0.25, 0.4]) * rng.uniform(0.9, 1.1)
            scene.add(BOX, (x, y, h), (h, h, h), yaw, pattern=PLANKS, c0=_tint(rng, (0.62, 0.43, 0.22), 0.04), size=0.1)
        elif thing == "table":
            scene.add(BOX, (x, y, 0.37), (rng.uniform(0.4, 0.8), 0.4, 0.37), yaw, c0=_tint(rng, (0.75, 0.72, 0.68)))
        elif thing == "person":
            scene.add(CYLINDER, (x, y, 0.42), (0.19, 0.19, 0.42), c0=_tint(rng, (0.15, 0.17, 0.35), 0.05))
            scene.add(CYLINDER, (x, y, 1.13), (0.23, 0.23, 0.29), c0=_tint(rng, (0.55, 0.4, 0.4), 0.2))
            scene.add(SPHERE, (x, y, 1.58), (0.14, 0.14, 0.14), c0=_tint(rng, (0.8, 0.6, 0.48), 0.06))
        elif thing == "ball":
            scene.add(
                SPHERE,
                (x, y, 0.2),
                (0.2, 0.2, 0.2),
                pattern=CHECKER,
                c0=_tint(rng, (0.9, 0.45, 0.1)),
                c1=(0.95, 0.95, 0.95),
                size=0.15,
            )
        elif thing == "pillar":
            top = 1.4 if scene.shell is None else scene.shell[5] / 2
            scene.add(CYLINDER, (x, y, top), (0.2, 0.2, top), c0=_tint(rng, (0.8, 0.8, 0.76)))
        else:
            scene.add(
                BOX, (x, y, 0.95), (0.5, 0.25, 0.95), yaw, pattern=TILES, c0=_tint(rng, (0.35, 0.5, 0.5)), size=0.45
            )


def _interior(rng: np.random.Generator, kind: str) -> Scene:
    height = rng.uniform(2.4, 3.0)
    wide, long = (
        (rng.uniform(3, 8), rng.uniform(3.5, 10)) if kind == "room" else (rng.uniform(1.5, 3.0), rng.uniform(8, 26))
    )
    shell = np.array([-wide / 2, -long / 2, 0, wide / 2, long / 2, height], np.float32)
    light = np.array([rng.uniform(-0.3, 0.3) * wide, rng.uniform(-0.3, 0.3) * long, height - 0.25], np.float32)
    scene = Scene(kind, shell, light, rng.uniform(0.3, 0.55), 0.0, np.zeros(3, np.float32))
    wall = _tint(rng, (0.75, 0.72, 0.66), 0.1)
    for _ in range(4):
        scene.paint(
            rng.choice([PLAIN, PLAIN, MOTTLED, TILES]), np.clip(wall + rng.normal(0, 0.03, 3), 0.1, 1), wall * 0.85, 1.0
        )
    floor = _tint(rng, (0.52, 0.45, 0.4), 0.12)
    pattern = rng.choice([CHECKER, TILES, PLANKS, MOTTLED], p=[0.35, 0.3, 0.25, 0.1])
    scene.paint(pattern, floor, floor * rng.uniform(0.55, 0.8), {PLANKS: 0.2, MOTTLED: 0.5}.get(pattern, 0.5))
    scene.paint(rng.choice([PLAIN, TILES]), _tint(rng, (0.88, 0.88, 0.86), 0.04), None, 0.6)
    x0, y0, _, x1, y1, _ = shell
    for _ in range(
        rng.integers(2, 6 if kind == "room" else 9)
    ):  # doors 0.9 x 2.0 m and windows 1.2 x 1.2 m in the walls
        side, along_x = rng.integers(2), rng.random() < wide / (wide + long)
        door = rng.random() < 0.65
        half, z = ((0.45, 1.0), 1.0) if door else ((0.6, 0.6), 1.5)
        colour = _tint(rng, (0.45, 0.3, 0.18), 0.06) if door else _tint(rng, (0.7, 0.85, 0.95), 0.03)
        if along_x:
            scene.add(BOX, (rng.uniform(x0 + 0.6, x1 - 0.6), (y0, y1)[side], z), (half[0], 0.04, half[1]), c0=colour)
        else:
            scene.add(BOX, ((x0, x1)[side], rng.uniform(y0 + 0.6, y1 - 0.6), z), (0.04, half[0], half[1]), c0=colour)
    density = rng.integers(2, 9) if kind == "room" else rng.integers(1, 7)
    margin = 0.45
    _furnish(
        scene, rng, lambda: (rng.uniform(x0 + margin, x1 - margin), rng.uniform(y0 + margin, y1 - margin)), density
    )
    return scene


def _street(rng: np.random.Generator) -> Scene:
    azimuth, elevation = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 1.2)
    sun = 90 * np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    scene = Scene(
        "street",
        None,
        sun.astype(np.float32),
        rng.uniform(0.35, 0.55),
        rng.uniform(0.002, 0.012),
        _tint(rng, (0.65, 0.78, 0.92), 0.06),
    )
    ground = _tint(rng, rng.choice([(0.42, 0.42, 0.43), (0.35, 0.48, 0.25), (0.55, 0.48, 0.4)]), 0.06)
    for _ in range(4):
        scene.paint(PLAIN, ground)  # the faces a street doesn't have; keeps the numbering of the shell
    scene.paint(rng.choice([TILES, MOTTLED, CHECKER], p=[0.5, 0.3, 0.2]), ground, ground * 0.78, 1.0)
    scene.paint(PLAIN, ground)
    half_road = rng.uniform(3.5, 9)
    for side in (-1, 1):
        y = -32.0
        while y < 60:
            w, d = rng.uniform(3, 8), rng.uniform(2, 5)
            if rng.random() < 0.72:
                scene.add(
                    BOX,
                    (side * (half_road + d), y + w, (storeys := rng.integers(1, 5)) * 1.5),
                    (d, w * 0.96, storeys * 1.5),
                    pattern=TILES,
                    c0=_tint(rng, rng.choice([(0.7, 0.5, 0.4), (0.8, 0.75, 0.65), (0.6, 0.62, 0.66)]), 0.06),
                    size=3.0,
                )
            y += 2 * w
    for _ in range(rng.integers(2, 8)):
        x, y = rng.choice([-1, 1]) * (half_road - rng.uniform(0.3, 1.2)), rng.uniform(-20, 40)
        thing = rng.choice(["car", "tree", "lamp"])
        if thing == "car":
            paint = _tint(rng, rng.uniform(0.1, 0.9, 3), 0.02)
            scene.add(BOX, (x * 0.75, y, 0.55), (0.88, 2.1, 0.4), c0=paint)
            scene.add(BOX, (x * 0.75, y, 1.17), (0.78, 1.1, 0.25), c0=(0.2, 0.24, 0.28))
        elif thing == "tree":
            scene.add(CYLINDER, (x, y, 1.0), (0.16, 0.16, 1.0), c0=_tint(rng, (0.35, 0.25, 0.15), 0.03))
            scene.add(
                SPHERE, (x, y, 3.0), (1.3, 1.3, 1.3), pattern=MOTTLED, c0=_tint(rng, (0.2, 0.42, 0.16), 0.05), size=0.3
            )
        else:
            scene.add(CYLINDER, (x, y, 2.0), (0.07, 0.07, 2.0), c0=(0.3, 0.32, 0.33))
    _furnish(scene, rng, lambda: (rng.uniform(-0.9, 0.9) * half_road, rng.uniform(-12, 18)), rng.integers(1, 7))
    return scene


def random_scene(rng: np.random.Generator, kind: str | None = None) -> Scene:
    """A room (40 %), a corridor (25 %) or a street (35 %)."""
    kind = kind or str(rng.choice(KINDS, p=[0.4, 0.25, 0.35]))
    if kind not in KINDS:
        raise ValueError(f"unknown kind of scene {kind!r}; choose one of {', '.join(KINDS)}")
    return _street(rng) if kind == "street" else _interior(rng, kind)


def _free(scene: Scene, x: float, y: float, radius: float = 0.55) -> bool:
    return all(
        np.hypot(c[0] - x, c[1] - y) > radius + np.hypot(h[0], h[1]) or c[2] - h[2] > 1.9 for _, c, h, _ in scene.shapes
    )


def random_pose(rng: np.random.Generator, scene: Scene) -> Pose:
    """A free place at 0.8-1.5 m height, looking roughly level."""
    for _ in range(40):
        if scene.shell is None:
            x, y = rng.uniform(-2.5, 2.5), rng.uniform(-12, 6)
            yaw = rng.normal(0, 0.45)
        else:
            x0, y0, _, x1, y1, _ = scene.shell
            x, y = rng.uniform(x0 + 0.5, x1 - 0.5), rng.uniform(y0 + 0.5, y1 - 0.5)
            if scene.kind == "room":  # a robot looks where there is room to go: at a point of the opposite half
                ahead = -np.sign(x) * rng.uniform(0, 0.8) * x1 - x, -np.sign(y) * rng.uniform(0, 0.8) * y1 - y
                yaw = np.arctan2(-ahead[0], ahead[1]) + rng.normal(0, 0.25)
            else:
                yaw = rng.normal(0, 0.2) + (np.pi if y > 0 else 0)
        if _free(scene, x, y):
            break
    return Pose((x, y, rng.uniform(0.8, 1.5)), yaw, rng.normal(-0.08, 0.12), rng.normal(0, 0.025))


def render_drive(
    frames: int, *, width: int, height: int, focal_px: float, seed: int = 0, fps: float = 5.0, supersample: int = 2
) -> Iterator[tuple[np.ndarray, np.ndarray, Camera]]:
    """A camera that drives through three scenes, one after the other, at about 0.8 m/s.

    Yields:
        ((H, W, 3) uint8 RGB, (H, W) float32 z-depth with NaN for sky, Camera) for each frame.
    """
    rng = np.random.default_rng([seed, 0xD21])
    camera = Camera(fx=focal_px, fy=focal_px, cx=(width - 1) / 2, cy=(height - 1) / 2, width=width, height=height)
    legs = np.array_split(np.arange(frames), min(3, frames))
    for leg, kind in zip(legs, ("room", "corridor", "street"), strict=False):
        while True:
            scene = random_scene(rng, kind)
            start = random_pose(rng, scene)
            step, turn = 0.8 / fps, rng.normal(0, 0.25) / max(len(leg), 1)
            path = []
            x, y, yaw = start.position[0], start.position[1], start.yaw
            for _ in leg:
                path.append(Pose((x, y, start.position[2]), yaw, start.pitch, start.roll))
                x, y, yaw = x - np.sin(yaw) * step, y + np.cos(yaw) * step, yaw + turn
            if all(_free(scene, *p.position[:2]) and _inside(scene, p) for p in path):
                break
        for pose in path:
            yield (*render(scene, camera, pose, supersample), camera)


def _inside(scene: Scene, pose: Pose, margin: float = 0.7) -> bool:
    if scene.shell is None:
        return True
    x, y, _ = pose.position
    x0, y0, _, x1, y1, _ = scene.shell
    return x0 + margin < x < x1 - margin and y0 + margin < y < y1 - margin


def main() -> None:
    from PIL import Image

    parser = argparse.ArgumentParser(description="Renders a contact sheet of random scenes and their depth.")
    parser.add_argument("--out", default="scenes.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=12)
    args = parser.parse_args()
    camera = Camera(fx=200, fy=200, cx=127.5, cy=95.5, width=256, height=192)
    rows = []
    for i in range(args.count):
        rng = np.random.default_rng([args.seed, i])
        scene = random_scene(rng)
        image, depth = render(scene, camera, random_pose(rng, scene))
        shade = (
            np.nan_to_num(255 * (1 - np.log(depth / 0.3) / np.log(FAR_M / 0.3)), nan=0).clip(0, 255).astype(np.uint8)
        )
        rows.append(np.vstack([image, np.repeat(shade[..., None], 3, 2)]))
    columns = 4
    sheet = np.vstack([np.hstack(rows[i : i + columns]) for i in range(0, len(rows) - columns + 1, columns)])
    Image.fromarray(sheet).save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
