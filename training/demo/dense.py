"""Stage 1: every pixel is a label. The whole network learns log-depth through the dense head.

A dense map teaches thousands of depths an image where a text answer teaches one; text is taught afterwards, to a
network that already sees depth (`sft.py`).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from depthlm_training.demo.bank import MONITOR, SceneBank, make_batch
from depthlm_training.demo.model import DemoNet, Encoded
from depthlm_training.demo.optim import Optimizer, Schedule, load_state, save_state


@dataclass(frozen=True)
class DenseStage:
    """What stage 1 is run with."""

    steps: int = 800
    batch: int = 16
    muon_lr: float = 5e-3
    adamw_lr: float = 1.5e-3
    probe_weight: float = 0.3
    save_every: int = 200


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


@torch.no_grad()
def dense_delta1(net: DemoNet, bank: SceneBank) -> float:
    """Share of pixels within a factor 1.25, on the monitor scenes of the bank at its own resolution."""
    good = total = 0
    with torch.autocast("cpu", torch.bfloat16):
        for i in range(len(bank) - MONITOR, len(bank), 8):
            pairs = [bank[j] for j in range(i, min(i + 8, len(bank)))]
            images = torch.from_numpy(np.stack([p[0][:, 16:272] for p in pairs]))
            truth = torch.from_numpy(np.stack([p[1][:, 16:272] for p in pairs]).astype(np.float32)).log()
            error = (net.log_depth(net.encode(images)).float() - truth).abs()
            good += int((error < np.log(1.25)).sum())
            total += int(truth.isfinite().sum())
    return good / total


def train_dense(net: DemoNet, bank: SceneBank, stage: DenseStage, run: Path, seed: int) -> None:
    """Runs or resumes stage 1; `run/dense.safetensors` holds its state, `run/dense.jsonl` its course."""
    state = run / "dense.safetensors"
    optimizer = Optimizer(net, Schedule(stage.steps, decay=0), stage.muon_lr, stage.adamw_lr)
    done = load_state(state, net, optimizer) if state.exists() else 0
    run.mkdir(parents=True, exist_ok=True)
    losses, began = [], time.time()
    with (
        (run / "dense.jsonl").open("a") as log,
        tqdm(total=stage.steps, initial=done, desc="dense", mininterval=5) as bar,
    ):
        for step in range(done, stage.steps):
            batch = make_batch(bank, stage.batch, seed, step)
            with torch.autocast("cpu", torch.bfloat16):
                encoded = net.encode(torch.from_numpy(batch.images))
                loss = dense_loss(net, encoded, torch.from_numpy(batch.depths), stage.probe_weight)
            loss.backward()
            norm = optimizer.step(step)
            losses.append(loss.item())
            bar.update()
            if (step + 1) % stage.save_every == 0 or step + 1 == stage.steps:
                save_state(state, net, optimizer, step + 1)
                row = {
                    "step": step + 1,
                    "loss": float(np.mean(losses)),
                    "norm": norm,
                    "seconds": time.time() - began,
                    "delta1": dense_delta1(net, bank),
                }
                losses.clear()
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{row['loss']:.3f}", delta1=f"{row['delta1']:.3f}")
