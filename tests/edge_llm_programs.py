"""Programs with the arguments and files of TensorRT Edge-LLM's own, for tests; each is a Python script.

Arguments, files and fields as in the sources of 0.9.1 and the documentation of 0.11: what these programs don't know is
an error here, although the real ones would leave out an unknown field.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path


class Patient(subprocess.Popen):
    """A program whose time-out begins once `began` is there, however long it takes to start."""

    began: Path

    def communicate(self, *given, **named):
        until = time.monotonic() + 60.0
        while not self.began.exists() and time.monotonic() < until:
            time.sleep(0.01)
        return super().communicate(*given, **named)


HELP = """Usage: llm_inference [--help] [--engineDir=<path>] [--multimodalEngineDir=<path>] [--inputFile=<path>]
  --outputFile          Path to output JSON file
  --batchSize           Override batch size from input file
"""

_INFERENCE = r'''
import argparse, json, os, sys, time
from pathlib import Path

MODE, LOG = {mode!r}, {log!r}
parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
parser.add_argument("--help", action="store_true")
for name in ("engineDir", "multimodalEngineDir", "inputFile", "outputFile"):
    parser.add_argument("--" + name)
if {reuse!r}:
    parser.add_argument("--enableContextReuse", action="store_true")
args = parser.parse_args()
if args.help:
    if MODE == "broken":
        sys.exit("error while loading shared libraries: libnvinfer.so.10")
    print({help!r} + ("  --enableContextReuse\n" if {reuse!r} else ""), file=sys.stderr)
    sys.exit(0)
if MODE == "hang":
    print("[INFO] Loading engine", flush=True)
    Path(LOG).touch()
    child = os.fork()
    time.sleep(600)
if MODE == "fail":
    print("[INFO] args.inputFile\n[ERROR] Failed to initialize runtime: no CUDA device")
    sys.exit(1)
assert (Path(args.engineDir) / "llm.engine").is_file()
assert (Path(args.multimodalEngineDir) / "visual" / "visual.engine").is_file()
told = json.loads(Path(args.inputFile).read_text())
known = dict(batch_size=int, temperature=float, top_p=float, top_k=int, max_generate_length=int, num_logprobs=int,
    apply_chat_template=bool, add_generation_prompt=bool, enable_thinking=bool, requests=list,
    context_cache_lookup_policy=str, context_cache_commit_policy=str)
for name, value in told.items():
    assert isinstance(value, known[name]), name
responses = []
import cv2
for index, request in enumerate(told["requests"]):
    assert set(request) <= {{"messages", "guided_decoding", "stop"}}
    seen = []
    for message in request["messages"]:
        assert set(message) == {{"role", "content"}}
        for item in message["content"] if isinstance(message["content"], list) else []:
            assert set(item) == ({{"type", "text"}} if item["type"] == "text" else {{"type", "image", "do_resize"}})
            if item["type"] == "image":
                pixels = cv2.imread(item["image"])
                assert pixels is not None and pixels.shape[0] % 32 == pixels.shape[1] % 32 == 0
                seen.append((item["image"], [int(v) for v in pixels[0, 0, ::-1]]))
            else:
                question = item["text"]
    # The colour of the first pixel and the question come back as a number: 2.<red> metres and so on.
    text = "%d.%02d" % (len(question), seen[0][1][0])
    steps = [[dict(token_id=1, token=c, bytes=[ord(c)], logprob=-0.5), dict(token_id=2, token="x", bytes=[0],
        logprob=-0.1)] for c in text] + [[dict(token_id=0, token="", bytes=[], logprob=-0.01)]]
    responses.append(dict(output_text=text, request_idx=index, batch_idx=index % told["batch_size"],
        finish_reason="end-of-sequence", messages=request["messages"], formatted_system_prompt="",
        formatted_complete_request="", logprobs=steps))
if MODE == "error":
    responses[-1].update(output_text="TensorRT Edge LLM cannot handle this request. Fails.", finish_reason="error")
    print("[ERROR] *** FAILED *** Request 0 failed to process!")
if MODE == "short":
    responses.pop()
text = "{{" if MODE == "garbage" else json.dumps(dict(input_file=args.inputFile, responses=responses))
if MODE != "silent":
    Path(args.outputFile).write_text(text)
with open(LOG, "a") as log:
    log.write(json.dumps(dict(args=sys.argv[1:], plugin=os.environ.get("EDGELLM_PLUGIN_PATH"), told=told,
        mode=oct(os.stat(Path(args.inputFile).parent).st_mode))) + "\n")
'''


def write_program(path: Path, text: str) -> Path:
    """Writes a Python script that can be executed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
    path.chmod(0o755)
    return path


def llm_inference(path: Path, mode: str = "well", reuse: bool = True, log: Path | None = None) -> Path:
    """A program that answers each question with its length and the red of its image's first pixel.

    Args:
        path: to write.
        mode: "well", or how it fails: "broken", "hang", "fail", "error", "short", "garbage", "silent".
        reuse: whether it knows --enableContextReuse.
        log: file that each run adds a line to: arguments, plugin, input.
    """
    log = log or path.with_suffix(".log")
    return write_program(path, _INFERENCE.format(mode=mode, log=str(log), reuse=reuse, help=HELP))
