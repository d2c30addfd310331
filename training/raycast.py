"""A small vectorised ray caster with exact z-depth: boxes, spheres, upright cylinders, a room's shell or the ground.

World frame: x and y on the ground, z up, metres. Camera frame: optical (REP 103: x right, y down, z forward).
Rays are cast with unit z in the camera frame, so the ray parameter of a hit *is* its z-depth: ground truth is exact
by construction.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from depthlm_ros.camera import Camera

FAR_M = 80.0  # beyond this the sky begins: depth is NaN
BOX, SPHERE, CYLINDER = 0, 1, 2
PLAIN, CHECKER, PLANKS, TILES, MOTTLED = 0, 1, 2, 3, 4


@dataclass
class Scene:
    """Primitives with their materials, a shell (room) or a ground plane (street), one light.

    `shell` is (x0, y0, z0, x1, y1, z1) of the room that encloses everything, or None outdoors (ground at z = 0).
    Materials 0..5 belong to the shell's faces (-x, +x, -y, +y, floor, ceiling), 4 to the ground outdoors.
    """

    kind: str
    shell: np.ndarray | None
    light: np.ndarray
    ambient: float
    haze_per_m: float
    sky: np.ndarray
    shapes: list[tuple[int, np.ndarray, np.ndarray, float]] = field(default_factory=list)  # kind, centre, half, yaw
    materials: list[tuple[int, np.ndarray, np.ndarray, float]] = field(default_factory=list)  # pattern, c0, c1, size

    def add(self, kind: int, centre, half, yaw: float = 0.0, *, pattern: int = PLAIN, c0, c1=None, size: float = 1.0):
        """Adds a box, a sphere (half = radius thrice) or an upright cylinder (half = r, r, half height)."""
        self.shapes.append((kind, np.asarray(centre, np.float32), np.asarray(half, np.float32), float(yaw)))
        self.paint(pattern, c0, c1, size)

    def paint(self, pattern: int, c0, c1=None, size: float = 1.0) -> None:
        c0 = np.asarray(c0, np.float32)
        c1 = c0 * 0.72 if c1 is None else np.asarray(c1, np.float32)
        self.materials.append((pattern, c0, c1, float(size)))


@dataclass(frozen=True)
class Pose:
    """Camera in the world: metres and radians; yaw 0 looks along +y, left is positive; pitch is positive upwards."""

    position: tuple[float, float, float]
    yaw: float
    pitch: float = 0.0
    roll: float = 0.0

    def rotation(self) -> np.ndarray:
        """(3, 3) that takes optical-frame vectors to the world."""
        cy, sy, cp, sp, cr, sr = (f(a) for a in (self.yaw, self.pitch, self.roll) for f in (np.cos, np.sin))
        level = np.array([[cy, 0, -sy], [sy, 0, cy], [0, -1, 0]])  # columns: right, down, forward
        tilt = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        bank = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        return level @ tilt @ bank


def _intersect(
    kind: int, centre: np.ndarray, half: np.ndarray, yaw: float, origin: np.ndarray, rays: np.ndarray
) -> np.ndarray:
    """Ray parameter (N,) of the first hit in front, inf where there is none. `rays` is (3, N)."""
    o = origin - centre
    dx, dy, dz = rays
    if kind == BOX:
        if yaw:
            c, s = np.cos(yaw), np.sin(yaw)
            o = np.array([c * o[0] + s * o[1], c * o[1] - s * o[0], o[2]], np.float32)
            dx, dy = c * dx + s * dy, c * dy - s * dx
        near = np.full(dx.shape, 1e-3, np.float32)
        far = np.full(dx.shape, np.inf, np.float32)
        for d, p, h in zip((dx, dy, dz), o, half, strict=True):
            inverse = 1 / d
            mid, reach = -p * inverse, np.abs(inverse) * h
            np.maximum(near, mid - reach, out=near)
            np.minimum(far, mid + reach, out=far)
        return np.where((near < far) & (near > 1e-3), near, np.inf)
    if kind == SPHERE:
        a, b, c = dx * dx + dy * dy + dz * dz, o[0] * dx + o[1] * dy + o[2] * dz, o @ o - half[0] ** 2
        disc = b * b - a * c
        t = (-b - np.sqrt(np.maximum(disc, 0))) / a
        return np.where((disc > 0) & (t > 1e-3), t, np.inf)
    a, b, c = dx * dx + dy * dy, o[0] * dx + o[1] * dy, o[0] ** 2 + o[1] ** 2 - half[0] ** 2
    disc = b * b - a * c
    root = np.sqrt(np.maximum(disc, 0))
    inverse = 1 / dz
    mid, reach = -o[2] * inverse, np.abs(inverse) * half[2]
    near = np.maximum((-b - root) / a, mid - reach)
    far = np.minimum((-b + root) / a, mid + reach)
    return np.where((disc > 0) & (near < far) & (near > 1e-3), near, np.inf)


def _in_view(centre, half, position, rotation, camera: Camera, rays: np.ndarray):
    """Slice of image rows that the bounding sphere may touch (None where it is behind the camera)."""
    x, y, z = rotation.T @ (centre - position)
    r = float(np.linalg.norm(half)) * 1.01
    if z + r < 0.01:
        return None
    if z - r < 0.3:
        return slice(0, camera.height), slice(0, camera.width)
    reach_u, reach_v = r / (z - r) * camera.fx, r / (z - r) * camera.fy
    grow = 1.5 + abs(x / (z - r)) + abs(y / (z - r))  # the sphere's outline stretches off the axis
    u, v = camera.fx * x / z + camera.cx, camera.fy * y / z + camera.cy
    u0, u1 = int(max(0, u - reach_u * grow - 2)), int(min(camera.width, u + reach_u * grow + 3))
    v0, v1 = int(max(0, v - reach_v * grow - 2)), int(min(camera.height, v + reach_v * grow + 3))
    return None if u0 >= u1 or v0 >= v1 else (slice(v0, v1), slice(u0, u1))


def render(scene: Scene, camera: Camera, pose: Pose, supersample: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Renders one view.

    Args:
        camera: undistorted pinhole; integer pixel coordinates are pixel centres.
        supersample: rays a pixel side for colour; depth is always that of the ray through the pixel's centre.

    Returns:
        ((H, W, 3) uint8 RGB, (H, W) float32 z-depth in metres, NaN for sky).
    """
    colour, depth = _trace(scene, camera, pose)
    if supersample > 1:
        k = supersample
        fine = Camera(
            fx=camera.fx * k,
            fy=camera.fy * k,
            cx=(camera.cx + 0.5) * k - 0.5,
            cy=(camera.cy + 0.5) * k - 0.5,
            width=camera.width * k,
            height=camera.height * k,
        )
        colour = _trace(scene, fine, pose)[0].reshape(camera.height, k, camera.width, k, 3).mean((1, 3))
    return (np.clip(colour, 0, 1) * 255 + 0.5).astype(np.uint8), depth


def _trace(scene: Scene, camera: Camera, pose: Pose) -> tuple[np.ndarray, np.ndarray]:
    height, width = camera.height, camera.width
    rotation, position = pose.rotation().astype(np.float32), np.asarray(pose.position, np.float32)
    x = ((np.arange(width, dtype=np.float32) - camera.cx) / camera.fx)[None, :]
    y = ((np.arange(height, dtype=np.float32) - camera.cy) / camera.fy)[:, None]
    rays = rotation[:, 0, None, None] * x + rotation[:, 1, None, None] * y + rotation[:, 2, None, None]
    rays = np.where(np.abs(rays) < 1e-6, np.float32(1e-6), rays)
    depth = np.full((height, width), np.inf, np.float32)
    owner = np.full((height, width), -1, np.int32)
    if scene.shell is None:
        with np.errstate(divide="ignore"):
            depth = np.where(rays[2] < 0, -position[2] / rays[2], np.float32(np.inf)).astype(np.float32)
        owner[np.isfinite(depth)] = 4
    else:
        low, high = scene.shell[:3], scene.shell[3:]
        for i, d in enumerate(rays):
            leaves = np.where(d > 0, high[i] - position[i], low[i] - position[i]) / d
            first = leaves < depth
            depth = np.where(first, leaves, depth)
            owner = np.where(first, 2 * i + (d > 0), owner)
    for i, (kind, centre, half, yaw) in enumerate(scene.shapes):
        window = _in_view(centre, half, position, rotation, camera, rays)
        if window is None:
            continue
        t = _intersect(kind, centre, half, yaw, position, rays[(slice(None), *window)])
        nearer = t < depth[window]
        depth[window] = np.where(nearer, t, depth[window])
        owner[window] = np.where(nearer, i + 6, owner[window])
    seen = (depth < FAR_M) & (owner >= 0)
    depth = np.where(seen, depth, np.float32(np.nan))
    return _shade(scene, camera, position, rays, depth, owner, seen), depth


def _normals(scene: Scene, segments: list[tuple[int, slice]], points: np.ndarray) -> np.ndarray:
    """Outward normals (3, N) of points (3, N) in segments of one owner each; inward ones of the shell."""
    normals = np.zeros_like(points)
    for who, mine in segments:
        if who < 6:
            normals[who // 2, mine] = 1 if who % 2 == 0 else -1
            continue
        kind, centre, half, yaw = scene.shapes[who - 6]
        p = points[:, mine] - centre[:, None]
        c, s = np.cos(yaw), np.sin(yaw)
        if kind == SPHERE:
            n = p / half[0]
        elif kind == CYLINDER:
            cap = np.abs(p[2]) > half[2] * 0.999
            n = np.where(cap, np.stack([p[0] * 0, p[1] * 0, np.sign(p[2])]), np.stack([p[0], p[1], p[2] * 0]) / half[0])
        else:
            q = np.stack([c * p[0] + s * p[1], c * p[1] - s * p[0], p[2]]) / half[:, None]
            axis = np.abs(q).argmax(0)
            n = np.zeros_like(q)
            np.put_along_axis(n, axis[None], np.sign(np.take_along_axis(q, axis[None], 0)), 0)
            n = np.stack([c * n[0] - s * n[1], s * n[0] + c * n[1], n[2]])
        normals[:, mine] = n
    return normals


def _hash(x, y, z) -> np.ndarray:
    x, y, z = (np.asarray(a).astype(np.int64) for a in (x, y, z))
    h = (x * 73856093) ^ (y * 19349663) ^ (z * 83492791)
    return ((h * 2654435761 >> 8) & 1023).astype(np.float32) / 1023


def _mix(pattern: int, q: np.ndarray, normals: np.ndarray) -> np.ndarray | float:
    """Which of its two colours a material shows at (3, N) places in units of its pattern: 0 the first, 1 the second."""
    if pattern == PLAIN:
        return 0.0
    if pattern == PLANKS:
        return _hash(np.floor(np.where(np.abs(normals[2]) > 0.5, q[0], q[2])), 0, 0)
    flat = np.abs(normals) > 0.95
    if pattern == MOTTLED:
        return _hash(*np.where(flat, 0, np.floor(q * 3)))
    cells = np.floor(q)
    if pattern == CHECKER:
        x, y, z = np.where(flat, 0, cells).astype(np.int32)
        return ((x + y + z) & 1).astype(np.float32)
    x, y, z = np.where(flat, np.float32(0.5), q - cells)
    near, far = np.minimum(np.minimum(x, y), z) < 0.07, np.maximum(np.maximum(x, y), z) > 0.95
    return (near | far).astype(np.float32)


def _albedo(
    scene: Scene, segments: list[tuple[int, slice]], points: np.ndarray, normals: np.ndarray, footprint: np.ndarray
) -> np.ndarray:
    """Solid textures with their contrast faded where a pixel covers more than the pattern resolves."""
    albedo = np.empty_like(points)
    for who, mine in segments:
        pattern, c0, c1, size = scene.materials[who]
        size = np.float32(size)
        mix = _mix(pattern, (points[:, mine] + np.float32(0.013)) / size, normals[:, mine])
        fade = np.clip(1.4 - 1.6 * footprint[mine] / size, 0, 1)
        mean = np.float32(0.18 if pattern == TILES else 0.5)
        albedo[:, mine] = c0[:, None] + (c1 - c0)[:, None] * (mean + (mix - mean) * fade)
    return albedo


def _length(vectors: np.ndarray) -> np.ndarray:
    x, y, z = vectors
    return np.sqrt(x * x + y * y + z * z)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _shadow(scene: Scene, rays: np.ndarray) -> np.ndarray:
    """Whether a shape stands on the way (N,) along (3, N) rays from the light to the points."""
    rays = np.where(np.abs(rays) < 1e-6, np.float32(1e-6), rays)
    length = _length(rays)
    shadow = np.zeros(length.shape, bool)
    for kind, centre, half, yaw in scene.shapes:
        if scene.shell is not None and half.min() < 0.05 and kind == BOX:
            continue  # doors and windows lie in the walls
        way = centre - scene.light
        outside = way @ way - (1.01 * np.linalg.norm(half)) ** 2
        # Only rays within the cone around the shape's bounding sphere can meet it.
        near = np.flatnonzero(_dot(rays, way) > length * np.sqrt(outside)) if outside > 0 else np.arange(len(length))
        if len(near):
            shadow[near] |= _intersect(kind, centre, half, yaw, scene.light, rays[:, near]) < 0.995
    return shadow


def _shade(scene, camera, position, rays, depth, owner, seen) -> np.ndarray:
    colour = np.broadcast_to(scene.sky, (*depth.shape, 3)).copy()
    if scene.shell is None:  # a paler horizon
        up = np.clip(rays[2] / _length(rays), 0, 1)[..., None]
        colour = colour * (0.6 + 0.4 * up) + (1 - up) * 0.32
    places = np.flatnonzero(seen)
    if len(places) == 0:
        return colour
    who = owner.ravel()[places].astype(np.int16)
    order = np.argsort(who, kind="stable")  # pixels of one shape stand together from here on
    places, who = places[order], who[order]
    edges = [0, *(np.flatnonzero(np.diff(who)) + 1).tolist(), len(who)]
    segments = [(int(who[a]), slice(a, b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    t, rays = depth.ravel()[places], rays.reshape(3, -1)[:, places]
    points = position[:, None] + rays * t
    normals = _normals(scene, segments, points)
    slant = np.abs(_dot(normals, rays)) / _length(rays)
    albedo = _albedo(scene, segments, points, normals, t / camera.fx / np.maximum(slant, 0.15))
    to_light = scene.light[:, None] - points
    distance = _length(to_light)
    lambert = np.clip(_dot(normals, to_light) / distance, 0, 1)
    lit = np.flatnonzero(lambert)
    lambert[lit[_shadow(scene, normals[:, lit] * np.float32(0.02) - to_light[:, lit])]] = 0
    if scene.shell is not None:
        lambert *= np.minimum(2.2, 9 / (3 + distance**2) + 0.35)
    shaded = (albedo * (scene.ambient + (1 - scene.ambient) * lambert)).T
    if scene.haze_per_m:
        veil = np.exp(-scene.haze_per_m * t)[:, None]
        shaded = shaded * veil + (scene.sky * 0.6 + 0.32) * (1 - veil)
    colour.reshape(-1, 3)[places] = shaded
    return colour
