"""Programs that engine edge_llm runs: what is left of them when the node ends without a clean-up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ENDS = """
import os, sys, threading, time
from pathlib import Path
from depthlm_ros.engines.edge_llm_command import end_all, private_folder, run_command

def ask():
    with private_folder("depthlm-edge-llm-") as folder:
        (folder / "0.png").write_text("camera")
        print(folder, flush=True)
        code = "import os, time; open('started', 'w').write(str(os.getpid())); os.fork(); time.sleep(100)"
        run_command([sys.executable, "-c", code], os.environ, 90)

threading.Thread(target=ask).start()
while not Path("started").is_file() or not Path("started").read_text():
    time.sleep(0.01)
end_all()
try:
    run_command(["true"], os.environ, 5)
except OSError as error:
    print(error, flush=True)
assert "numpy" not in sys.modules and "torch" not in sys.modules
os._exit(7)
"""


def test_a_process_that_ends_at_once_leaves_no_program_and_no_image(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ENDS], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    folder, told = done.stdout.splitlines()
    assert told == "this process is ending" and not Path(folder).exists()
    group = (tmp_path / "started").read_text()
    deadline = time.monotonic() + 30
    while alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(group)


def alive(group: str) -> list[str]:
    """Processes of a group, but for those that only wait to be counted."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if its == group and state not in "ZX":
            found.append(path.parent.name)
    return found


@pytest.mark.parametrize("module", ["interrupt.py", "node.py"])
def test_whatever_ends_the_node_at_once_ends_the_program_first(module):
    lines = [line.strip() for line in (ROOT / "depthlm_ros" / module).read_text().splitlines()]
    ends = [i for i, line in enumerate(lines) if line.startswith("os._exit(")]
    assert ends and all(lines[i - 1] == "end_all()" for i in ends)
