"""Every step from a recording to a node that answers with what was learnt, each for a few moments: does it all work?

    python -m depthlm_training.smoke --run runs/smoke

The steps are the commands that a user types, each in a process of its own; the first training is killed and resumed.
It starts from the demonstration model and says nothing about how well anything is learnt.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from depthlm_ros.errors import DepthLMError, TrainingError
from depthlm_training.states import found

STEPS = 6
_PATIENCE_S = 600.0
_DEPTHLM = (sys.executable, "-m", "depthlm_ros.cli")


class Smoke:
    """The steps, in a folder that is emptied first.

    Args:
        run: the folder.
        model: what is trained further.
    """

    def __init__(self, run: Path, model: str = "demo") -> None:
        self._run, self._model = run, model
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)

    def __call__(self) -> None:
        """Does all steps.

        Raises:
            TrainingError: one failed, or did not do what it should.
        """
        drive, labels, head, words = (str(self._run / name) for name in ("drive", "set", "head", "words"))
        render = ["--seconds", "5", "--fps", "2", "--width", "160", "--height", "120"]
        self._do("bag", "render", drive, *render)
        self._do("bag", "to-sft", drive, labels, "--points", "200", "--gap", "0")
        teach = ["finetune", labels, "--model", self._model, "--out", head, "--dialects", "dense"]
        stage = ["--steps", str(STEPS), "--set", "stage=head", "trained=[depth_head]", "train.checkpoint_every=2"]
        self._killed(Path(head), *teach, *stage)
        self._do(*teach, *stage, "--resume")
        self._resumed(Path(head))
        self._do("export", head, f"{head}_model")
        teach = ["finetune", labels, "--model", f"{head}_model", "--out", words]
        self._do(*teach, "--dialects", "coordinates", "--steps", str(STEPS), "--points", "5")
        scores = str(self._run / "scores")
        self._do("evaluate", f"{labels}/held_out.jsonl", "--model", words, "--out", scores, "--points", "20",
                 "--dialect", "coordinates")  # fmt: skip
        self._do("export", words, f"{words}_model", "--scores", f"{scores}/metrics.json", "--dtype", "bfloat16")
        self._do("replay", drive, "--model", f"{words}_model", "--frames", "3", "--out", str(self._run / "replay"))
        self._answered(self._run / "replay" / "metrics.json")

    def _do(self, *command: str) -> None:
        print(f"$ depthlm {' '.join(command)}", flush=True)
        began = time.monotonic()
        done = subprocess.run([*_DEPTHLM, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise TrainingError(f"depthlm {command[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        for line in done.stdout.splitlines():
            print(f"  {line}")
        print(f"  {time.monotonic() - began:.0f} s", flush=True)

    def _killed(self, run: Path, *command: str) -> None:
        """Starts a command and kills it after its first checkpoint."""
        print(f"$ depthlm {' '.join(command)}", flush=True)
        log = self._run / "killed.log"
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen([*_DEPTHLM, *command], stdout=output, stderr=output)
        until = time.monotonic() + _PATIENCE_S
        while not found(run) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not found(run):
            raise TrainingError(f"no checkpoint came within {_PATIENCE_S:g} s:\n{log.read_text(encoding='utf-8')}")
        print(f"  killed after {found(run)[-1].name}", flush=True)

    def _resumed(self, run: Path) -> None:
        rows = [json.loads(line) for line in (run / "course.jsonl").read_text(encoding="utf-8").splitlines()]
        if rows[-1]["step"] != STEPS:
            raise TrainingError(f"the resumed run ended at step {rows[-1]['step']} of {STEPS}")

    def _answered(self, metrics: Path) -> None:
        figures = json.loads(metrics.read_text(encoding="utf-8"))["run"]
        if not figures["frames_answered"]:
            raise TrainingError(f"the node answered none of {figures['frames_sent']} images; see {metrics.parent}/log")
        print(f"the node answered {figures['frames_answered']} of {figures['frames_sent']} images with what was learnt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all steps; 0 when each has done what it should, 1 with what the first failing one said."""
    parser = argparse.ArgumentParser(prog="python -m depthlm_training.smoke", description="Tries the whole pipeline.")
    parser.add_argument("--run", type=Path, default=Path("runs/smoke"), help="emptied first (default runs/smoke)")
    parser.add_argument("--model", default="demo", help="what is trained further (default demo)")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    began = time.monotonic()
    try:
        Smoke(options.run, options.model)()
    except DepthLMError as error:
        print(f"smoke: {error}", file=sys.stderr)
        return 1
    print(f"all done in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
