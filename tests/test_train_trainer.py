"""The training loop: the same steps however they are shared, interrupted or resumed."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_training
from conftest import ROOT
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from toy_training import Make, ToyObjective, settings

from depthlm_ros.errors import ConfigError, DatasetError, TrainingError
from depthlm_training import config
from depthlm_training.command import null_step, run_command
from depthlm_training.objective import Loss, TrainSettings
from depthlm_training.optimizer import rate
from depthlm_training.progress import COURSE, rows
from depthlm_training.states import OPTIMIZER, WEIGHTS, found, load_weights
from depthlm_training.throughput import FROZEN_FIRST, Meter, Work, training_flop
from depthlm_training.trainer import train

TOY = [sys.executable, toy_training.__file__]
# Without what depends on the process (dropout) or on the number of steps (the schedule).
ALIKE = ("schedule=constant", "dropout=0")


def state(run: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of a run's last checkpoint."""
    return {**load_file(found(run)[-1] / WEIGHTS), **load_file(found(run)[-1] / OPTIMIZER)}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def losses(run: Path) -> list[float]:
    """The course's loss."""
    return [row["loss"] for row in rows(run)]


# What a step is


def test_a_step_weighs_micro_batches_by_their_units(tmp_path):
    """Micro-batches of 1, 2, 3, 4 rows are as one of all ten, for the loss, the gradient and what comes of it."""

    @dataclass(frozen=True)
    class Joined(Make):
        def __call__(self, k):
            each = [Make()(4 * k + i) for i in range(4)]
            return tuple(np.concatenate(part) for part in zip(*each, strict=True))

    train(ToyObjective(dropout=0), settings(), tmp_path / "parts")
    train(ToyObjective(Joined(), dropout=0), settings(micro_batches=1), tmp_path / "joined")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "joined"), rel=1e-5)
    a, b = state(tmp_path / "parts"), state(tmp_path / "joined")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(ToyObjective(), settings(seed=seed, steps=3), tmp_path / name)
    assert_same(state(tmp_path / "a"), state(tmp_path / "b"))
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_frozen_weights_stay_and_are_not_stored(tmp_path):
    objective = ToyObjective()
    before = objective.model.frozen.weight.clone()
    train(objective, settings(), tmp_path)
    assert torch.equal(objective.model.frozen.weight, before)
    assert not any(name.startswith("frozen") for name in state(tmp_path))


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
def test_frozen_weights_have_the_format_of_products_and_trained_ones_are_float32(tmp_path, loaded):
    objective = ToyObjective()
    objective.model.to(loaded)
    train(objective, settings(dtype="bfloat16"), tmp_path)
    assert {weight.dtype for weight in objective.model.layers.parameters()} == {torch.float32}
    assert objective.model.frozen.weight.dtype == torch.bfloat16
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_the_rate_rises_linearly_and_falls_as_a_cosine():
    how = TrainSettings(steps=100, lr=2.0, warmup=0.1)
    assert [rate(how, step) for step in (0, 4, 9, 10, 55)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 1.0])
    assert 0 < rate(how, 99) < 0.01
    assert rate(TrainSettings(steps=100, lr=2.0, warmup=0.1, schedule="constant"), 99) == 2.0


def test_the_gradient_is_clipped_to_the_norm(tmp_path):
    """AdamW's first moment after one step is a tenth of the gradient that it was given."""
    train(ToyObjective(), settings(steps=1, clip=0.02), tmp_path)
    moments = [value for name, value in state(tmp_path).items() if name.endswith("exp_avg")]
    assert torch.cat([m.flatten() for m in moments]).norm() * 10 == pytest.approx(0.02, rel=1e-3)
    assert rows(tmp_path)[0]["gradient"] > 0.02


# Several processes


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory) -> Path:
    """Runs of two processes, each way; that of fsdp2 is stopped after three steps, and goes on."""
    folder = tmp_path_factory.mktemp("shared")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, toy_training.__file__, str(folder), "ways=ddp,fsdp2:3,fsdp2,hybrid", *ALIKE]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2", "hybrid"])
def test_two_processes_do_what_one_does(shared_runs, way, tmp_path):
    train(ToyObjective(dropout=0), settings(schedule="constant"), tmp_path)
    assert losses(shared_runs / way) == pytest.approx(losses(tmp_path), rel=1e-5)
    assert [row["gradient"] for row in rows(shared_runs / way)] == pytest.approx(
        [row["gradient"] for row in rows(tmp_path)], rel=1e-4
    )
    ours, theirs = state(tmp_path), state(shared_runs / way)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_one_process_goes_on_with_a_checkpoint_of_two_shards(shared_runs, tmp_path):
    model = ToyObjective().model
    load_weights(found(shared_runs / "fsdp2")[-1], model)
    stored = state(shared_runs / "fsdp2")
    assert torch.equal(model.head.weight, stored["head.weight"])
    train(ToyObjective(dropout=0), settings(steps=8), shared_runs / "fsdp2", resume=True)
    assert [row["step"] for row in rows(shared_runs / "fsdp2")] == list(range(1, 9))


def test_torchrun_without_a_way_to_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes, but train.parallel is none"):
        train(ToyObjective(), settings(), tmp_path)


# Interruptions


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """Killed by SIGKILL in the middle of a step, after a checkpoint; weights, moments and course are the same."""
    arguments = ["steps=12", "checkpoint_every=3", "log_every=5"]
    train(ToyObjective(), settings(*arguments), tmp_path / "whole")
    process = subprocess.Popen([*TOY, str(tmp_path / "killed"), *arguments, "slow_from=17"], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 600
    while not found(tmp_path / "killed") and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = int(found(tmp_path / "killed")[-1].name.removeprefix("step-"))
    assert done == 3
    train(ToyObjective(), settings(*arguments), tmp_path / "killed", resume=True)
    assert_same(state(tmp_path / "killed"), state(tmp_path / "whole"))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "killed")] == [5, 10, 12]


def test_a_finished_run_resumes_to_nothing_and_is_not_overwritten(tmp_path):
    train(ToyObjective(), settings(), tmp_path)
    before = state(tmp_path)
    train(ToyObjective(), settings(), tmp_path, resume=True)
    assert_same(state(tmp_path), before)
    with pytest.raises(ConfigError, match="step-00000006 already; pass --resume"):
        train(ToyObjective(), settings(), tmp_path)


def test_resuming_says_which_settings_changed(tmp_path, capsys):
    train(ToyObjective(), settings(), tmp_path)
    train(ToyObjective(), settings(steps=7), tmp_path, resume=True)
    assert "changed since: steps 6 -> 7" in capsys.readouterr().err


def test_only_the_newest_checkpoints_are_kept_and_halves_are_removed(tmp_path):
    (tmp_path / ".unfinished-step-00000001").mkdir()
    train(ToyObjective(), settings(checkpoint_every=1, keep=2), tmp_path)
    assert [path.name for path in found(tmp_path)] == ["step-00000005", "step-00000006"]
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(ToyObjective(), settings(), tmp_path)
    other = ToyObjective()
    other.model.head.requires_grad_(False)
    with pytest.raises(TrainingError, match="another choice of trained parts: 2 tensors .* head.bias among them"):
        train(other, settings(steps=7), tmp_path, resume=True)


# Failures: each names the last good checkpoint


def test_nan_ends_with_the_last_good_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"step 5: the loss is nan.*micro-batches 16 to 19\n.*step-00000004; --res"):
        train(ToyObjective(Make(nan_from=18)), settings(checkpoint_every=2), tmp_path)
    assert all(bool(torch.isfinite(value).all()) for value in state(tmp_path).values())


def test_a_disk_that_takes_no_more_ends_with_the_last_good_checkpoint(tmp_path):
    """The kernel refuses to let files grow beyond 256 bytes, after the first checkpoint."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Filling(ToyObjective):
        def loss(self, batch, device):
            if len(found(tmp_path)) == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (256, limits[1]))
            return super().loss(batch, device)

    try:
        with pytest.raises(TrainingError, match=r"could not be written(.|\n)*last good checkpoint is .*step-00000002"):
            train(Filling(), settings(checkpoint_every=2, log_every=100), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in found(tmp_path)] == ["step-00000002"]
    assert not list(tmp_path.glob(".unfinished*"))


@dataclass(frozen=True)
class Killing(Make):
    """Its maker is killed when it comes to micro-batch 10, as the kernel does when memory runs out."""

    def __call__(self, k):
        if k == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(k)


@pytest.mark.slow
def test_a_killed_worker_ends_with_the_last_good_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"worker(.|\n)*step-00000002"):
        train(ToyObjective(Killing()), settings(checkpoint_every=1, workers=1), tmp_path)


def test_a_failure_before_the_first_checkpoint_says_so(tmp_path):
    with pytest.raises(TrainingError, match="no checkpoint had been written"):
        train(ToyObjective(Make(nan_from=0)), settings(), tmp_path)


def test_nothing_supervised_is_an_error_rather_than_a_division_by_zero(tmp_path):
    class Silent(ToyObjective):
        def loss(self, batch, device):
            loss = super().loss(batch, device)
            return Loss(loss.total * 0, 0)

    with pytest.raises(TrainingError, match="nothing is supervised"):
        train(Silent(), settings(), tmp_path)


# What is shown


def test_the_course_counts_all_that_was_done(tmp_path):
    train(ToyObjective(), settings(log_every=4), tmp_path)
    first, last = rows(tmp_path)
    assert (first["step"], last["step"]) == (4, 6)
    assert {"loss", "absolute", "lr", "gradient", "tokens/s", "images/s", "padding", "waiting", "mfu"} <= first.keys()
    assert first["padding"] == pytest.approx(0.25)
    assert first["images/s"] * first["seconds"] == pytest.approx(16)
    assert first["tokens/s"] * first["seconds"] == pytest.approx(sum(1 + k % 5 for k in range(16)))
    assert 0 < first["waiting"] < 1


def test_tensorboard_shows_the_course(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(ToyObjective(), settings(), tmp_path)
    board = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(losses(tmp_path))


def test_without_tensorboard_the_course_is_in_its_file_alone(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    train(ToyObjective(), settings(), tmp_path)
    assert "pip install 'depthlm_ros[train]'" in capsys.readouterr().err
    assert len(losses(tmp_path)) == 6


def test_utilisation_is_what_was_needed_of_what_the_device_can_do():
    meter = Meter()
    meter.add(tokens=80, images=1, waste=0.2, flop=600)
    meter.seconds, meter.waiting = 2.0, 0.5
    both = [2 * count for count in meter.counts()]
    shown = Meter.rates(both, size=2, peak=1000)
    assert shown["mfu"] == pytest.approx(0.3)  # each did 300 a second of 1000
    assert (shown["tokens/s"], shown["images/s"]) == (80, 1)
    assert (shown["padding"], shown["waiting"]) == pytest.approx((0.2, 0.25))


def test_operations_are_those_that_torch_counts(qwen3_vl_checkpoint):
    """Text alone, every query looking at every key, since torch counts attention whatever the mask."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        qwen3_vl_checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.arange(1, 41)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 40, 40, dtype=torch.bool))
    description = json.loads((qwen3_vl_checkpoint / "config.json").read_text())
    work = Work(grids=(), tokens=40, pairs=1600, words=40)
    assert training_flop(description, work, FROZEN_FIRST, FROZEN_FIRST) == counter.get_total_flops()


def test_a_null_step_measures_the_loader_beside_the_run(tmp_path):
    train(ToyObjective(), settings(), tmp_path)
    said = null_step(ToyObjective(), settings(), rows(tmp_path))
    assert "micro-batches a second (1 x 0 workers)" in said
    assert "waiting for them" in said


# Settings


@dataclass(frozen=True)
class Recipe:
    """A recipe's settings."""

    model: str
    run: Path = Path("runs/toy")
    train: TrainSettings = TrainSettings()
    shares: dict[str, float] | None = None


def test_later_arguments_win_and_small_numbers_are_numbers(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: demo\ntrain: {lr: 1e-3, steps: 7}\n")
    read = config.load(Recipe, [str(tmp_path / "recipe.yaml"), "train.lr=5.5e-5", "shares.marker=2"])
    assert (read.train.lr, read.train.steps, read.shares) == (5.5e-5, 7, {"marker": 2.0})


def test_settings_survive_being_written(tmp_path):
    read = config.load(Recipe, ["model=demo", "train.betas=[0.9, 0.95]", "run=runs/other"])
    (tmp_path / "resolved.yaml").write_text(config.as_yaml(read))
    assert config.load(Recipe, [str(tmp_path / "resolved.yaml")]) == read


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.lrr=1", "unknown key in train 'lrr'; did you mean 'lr'?"),
        ("train.parallel=fsdp", "train.parallel: unknown value 'fsdp'; did you mean 'fsdp2'?"),
        ("train.steps=few", "train.steps is 'few', of type str; give a whole number"),
        ("train.steps=0", "steps is 0; give at least 1"),
        ("train=1", "train is 1; it is a section"),
        ("train.betas=[0.9]", "train.betas is [0.9]; give 2 values"),
        ("model=[", "model=[ is not YAML"),
        ("nowhere.yaml", "no file nowhere.yaml; give a YAML file, one of the shipped ones (cpu.yaml"),
    ],
)
def test_a_wrong_setting_names_itself_and_the_remedy(argument, message):
    with pytest.raises(ConfigError) as error:
        config.load(Recipe, ["model=demo", argument])
    assert message in str(error.value)


def test_what_must_be_given_is_asked_for():
    with pytest.raises(ConfigError, match="model is missing; .* model="):
        config.load(Recipe, [])


@pytest.mark.parametrize("path", sorted((ROOT / "config" / "train").glob("*.yaml")), ids=lambda path: path.name)
def test_each_shipped_size_of_machine_can_be_read_by_its_bare_name(path):
    read = config.load(Recipe, ["model=demo", path.name]).train
    processes = {"eight_gpus.yaml": 8, "several_hosts.yaml": 32}.get(path.name, 1)
    assert read.micro_batches % processes == 0
    assert (read.parallel == "none") == (processes == 1)


def test_a_command_ends_with_one_message_and_no_traceback(tmp_path, capsys):
    def fails(recipe):
        raise DatasetError("rows.jsonl is empty")

    code = run_command(Recipe, fails, str, prog="p", description="d", arguments=["model=demo", f"run={tmp_path}"])
    assert (code, capsys.readouterr().err) == (1, "error: rows.jsonl is empty\n")


def test_a_command_trains_and_leaves_a_course(tmp_path):
    arguments = ["model=demo", f"run={tmp_path}", "train.steps=2", "train.device=cpu"]
    assert run_command(Recipe, lambda _: ToyObjective(), str, prog="p", description="d", arguments=arguments) == 0
    assert (tmp_path / COURSE).is_file()
