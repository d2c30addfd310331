"""Stage 1: every pixel is a label. The whole network learns log-depth through the dense head.

A dense map teaches thousands of depths an image where a text answer teaches one; text is taught afterwards, to a
network that already sees depth (`text.py`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from depthlm_ros.markers import MARGIN_PX, draw_arrow
from depthlm_training.demo.bank import MONITOR, Batch, SceneBank, make_batch
from depthlm_training.demo.loop import run_stage
from depthlm_training.demo.model import DemoNet, Encoded
from depthlm_training.demo.stages import Stage
from depthlm_training.demo.tower import TOKEN_PX

_AT_ONCE = 8  # monitor scenes


def dense_loss(net: DemoNet, encoded: Encoded, depths: torch.Tensor, probe_weight: float) -> torch.Tensor:
    """Mean absolute error of log-depth over pixels with ground truth, of the head and of the probe.

    Args:
        depths: (B, H, W) metres, NaN where unknown.
    """
    truth = depths.log()
    known = truth.isfinite()
    truth = torch.where(known, truth, 0.0)
    error = (net.log_depth(encoded).float() - truth).abs()
    loss = (error * known).sum() / known.sum()
    coarse = slice(1, None, 4)
    near = (net.probe_log_depth(encoded).float() - truth[:, coarse, coarse]).abs()
    return loss + probe_weight * (near * known[:, coarse, coarse]).sum() / known[:, coarse, coarse].sum()


def finder_loss(net: DemoNet, encoded: Encoded, marks: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
    """Mean errors of the finder over arrows: which token (cross entropy), where in it, and log-depth there.

    Args:
        marks: (B, A, 2) whole `(u, v)`, -1 where no arrow is drawn.
        depths: (B, H, W) metres, NaN where unknown.
    """
    image, which = (marks[..., 0] >= 0).nonzero().unbind(1)
    if len(image) == 0:
        return encoded.merged.new_zeros(())
    u, v = marks[image, which].unbind(1)
    token = v // TOKEN_PX * encoded.grid[1] + u // TOKEN_PX
    found = net.found(encoded).float()
    loss = nn.functional.cross_entropy(found[image][..., 0], token)
    there = found[image, token]
    within = torch.stack([u, v], 1) % TOKEN_PX / TOKEN_PX
    loss = loss + (there[:, 1:3] - within).abs().mean()
    truth = depths[image, v, u].log()
    return loss + torch.where(truth.isfinite(), (there[:, 3] - truth).abs(), 0.0).mean()


def see(net: DemoNet, batch: Batch, stage: Stage) -> tuple[Encoded, torch.Tensor, torch.Tensor]:
    """Runs a batch; returns it encoded, its depths (B, H, W) where the network is, and what seeing costs."""
    images, depths, marks = (torch.from_numpy(x).to(net.device) for x in (batch.images, batch.depths, batch.marks))
    encoded = net.encode(images)
    loss = stage.dense_weight * dense_loss(net, encoded, depths, stage.probe_weight)
    return encoded, depths, loss + stage.finder_weight * finder_loss(net, encoded, marks, depths)


def monitor_scenes(bank: SceneBank, scenes: int = MONITOR) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scenes that are never trained on, a few at once: (B, 192, 256, 3) uint8 and (B, 192, 256) metres."""
    rows, columns = slice(16, 208), slice(16, 272)
    batches = []
    for start in range(0, scenes, _AT_ONCE):
        pairs = [bank[i] for i in range(start, start + _AT_ONCE)]
        images, depths = (np.stack([pair[k][rows, columns] for pair in pairs]) for k in (0, 1))
        batches.append((images, depths.astype(np.float32)))
    return batches


@torch.no_grad()
def dense_delta1(net: DemoNet, bank: SceneBank) -> float:
    """Share of pixels within a factor 1.25, on the monitor scenes."""
    good = total = 0
    for images, depths in monitor_scenes(bank):
        truth = torch.from_numpy(depths).log()
        with torch.autocast(net.device.type, torch.bfloat16):
            said = net.log_depth(net.encode(torch.from_numpy(images).to(net.device)))
        good += int(((said.float().cpu() - truth).abs() < np.log(1.25)).sum())
        total += int(truth.isfinite().sum())
    return good / total


@torch.no_grad()
def finder_error_px(net: DemoNet, bank: SceneBank, seed: int = 3) -> float:
    """Median distance in pixels between arrows on monitor scenes and where the finder sees them."""
    rng, errors = np.random.default_rng(seed), []
    for images, _ in monitor_scenes(bank):
        count, height, width, _ = images.shape
        marks = rng.integers(MARGIN_PX, (width - MARGIN_PX, height - MARGIN_PX), (count, 2))
        marked = np.stack([draw_arrow(image, mark) for image, mark in zip(images, marks, strict=True)])
        with torch.autocast(net.device.type, torch.bfloat16):
            encoded = net.encode(torch.from_numpy(marked).to(net.device))
            found = net.found(encoded).float().cpu()
        token = found[..., 0].argmax(1)
        corner = torch.stack([token % encoded.grid[1], token // encoded.grid[1]], 1)
        place = (corner + found[torch.arange(count), token, 1:3]) * TOKEN_PX
        errors.append((place - torch.from_numpy(marks)).norm(dim=1))
    return float(torch.cat(errors).median())


def train_dense(net: DemoNet, bank: SceneBank, stage: Stage, run: Path, seed: int, workers: int = 0) -> None:
    """Runs or resumes stage 1."""

    def loss(batch: Batch, step: int) -> torch.Tensor:
        with torch.autocast(net.device.type, torch.bfloat16):
            return see(net, batch, stage)[2]

    def measure() -> dict[str, float]:
        return {"dense": dense_delta1(net, bank), "finder_px": finder_error_px(net, bank)}

    make = partial(make_batch, bank, stage, seed)
    run_stage(stage, net, make, loss, measure, run, workers)
