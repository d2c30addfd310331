"""The command line of `depthlm bench`. What is heavy is imported when it runs."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import tempfile
from pathlib import Path

from depthlm_ros.errors import ConfigError, unknown_choice

DIALECTS = ("coordinates", "compact", "marker", "dense")
CONTENDERS = ("official", "batched", "plain", "ours")
# Images with a marker that a shape's model learns to tell apart.
MARKED_TO_TEACH = 48


def add_command(commands) -> None:
    """Adds `bench` to the commands of `depthlm`."""
    parser = commands.add_parser(
        "bench",
        help="how fast points are answered, beside the published loops and the machine's limits",
        description="Measures points a second of our engine beside the published per-point loop and batched generate, "
        "in interleaved rounds with the same weights; compares the answers token for token; sets all of it beside the "
        "time that the operations need at the rates this device was measured to reach.",
    )
    what = parser.add_argument_group("model").add_mutually_exclusive_group()
    what.add_argument("--shape", help="random weights in the shape of small (default), qwen3-vl-4b, qwen2.5-vl-3b, "
                      "qwen2.5-vl-7b or pixtral-12b; nothing is downloaded")  # fmt: skip
    what.add_argument("--model", metavar="CARD", help="a card, a folder of weights or a hub id instead")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the shape's model there, for other programs "
                        "too; with --rounds 0 nothing is measured")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to torch")
    parser.add_argument("--seed", type=int, default=0, help="of weights and image (default 0)")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--dialects", default="coordinates", help=f"of {', '.join(DIALECTS)} (default coordinates)")
    asked.add_argument("--points", default="256", help="one or several, such as 64,256,1024,4096 (default 256)")
    asked.add_argument("--width", type=int, default=640, help="of the image (default 640)")
    asked.add_argument("--height", type=int, default=480, help="of the image (default 480)")
    who = parser.add_argument_group("who answers")
    who.add_argument("--contenders", default="official,batched,ours", help=f"of {', '.join(CONTENDERS)} "
                     "(default official,batched,ours)")  # fmt: skip
    who.add_argument("--rounds", type=int, default=5, help="interleaved, after one that isn't counted (default 5)")
    who.add_argument("--official-points", type=int, default=16, help="points of a round that the published loop "
                     "answers; its rate is per point (default 16)")  # fmt: skip
    who.add_argument("--batched-points", type=int, default=64, help="the same for batched generate (default 64)")
    who.add_argument("--check", type=int, default=256, help="answers of each dialect that are compared with plain "
                     "generate, untimed; 0 for none (default 256)")  # fmt: skip
    who.add_argument("--server", metavar="URL", help="also a server with OpenAI's chat completions")
    who.add_argument("--server-model", metavar="NAME", help="the name that the server knows the model by")
    who.add_argument(
        "--server-processes", default="", metavar="IDS", help="its processes here, stopped while others are measured"
    )
    who.add_argument("--concurrency", default="1,8,32", help="requests to the server at once (default 1,8,32)")
    who.add_argument("--server-points", type=int, default=256, help="points of a round that it answers (default 256)")
    more = parser.add_argument_group("more")
    more.add_argument("--no-floor", action="store_true", help="leave out the ceilings and the floor")
    more.add_argument("--profile", action="store_true", help="shares of matmul, attention and the rest in a frame")
    more.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Checks the arguments, measures, prints the table.

    Raises:
        ConfigError: a value that has no meaning; nothing has been loaded then.
    """
    plan = check(arguments)
    from depthlm_ros.engines import require_versions

    require_versions()
    from depthlm_ros.bench.measure import measure, prepare
    from depthlm_ros.bench.report import as_text, write_json

    with tempfile.TemporaryDirectory(prefix="depthlm-bench-") as folder:
        subject = prepare(plan, Path(folder))
        if plan.rounds == 0:
            print(f"wrote {plan.keep}")
            return 0
        results = measure(subject, plan, said=lambda line: print(line, file=sys.stderr))
    print(as_text(results))
    if plan.json is not None:
        write_json(plan.json, results)
        print(f"wrote {plan.json}")
    return 0


def check(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments with lists taken apart.

    Raises:
        ConfigError: an unknown name or a value out of range.
    """
    plan = argparse.Namespace(**vars(arguments))
    plan.dialects = _names("dialect", arguments.dialects, DIALECTS)
    plan.contenders = _names("contender", arguments.contenders, CONTENDERS)
    plan.points = _numbers("points", arguments.points)
    plan.concurrency = _numbers("concurrency", arguments.concurrency)
    plan.server_processes = _numbers("server-processes", plan.server_processes) if plan.server_processes else ()
    plan.command = shlex.join(["depthlm", "bench", *_given(arguments)])
    for name, least in (
        ("rounds", 0),
        ("official_points", 1),
        ("batched_points", 1),
        ("server_points", 1),
        ("check", 0),
        ("threads", 0),
        ("width", 64),
        ("height", 64),
    ):
        value = getattr(arguments, name)
        if value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; give at least {least}")
    if plan.rounds == 0 and plan.keep is None:
        raise ConfigError("--rounds is 0, so nothing would be measured; give a number, or a folder with --keep")
    if plan.keep is not None and plan.model is not None:
        raise ConfigError(f"--keep {plan.keep} writes a shape's model, but --model {plan.model} has one; use --shape")
    if plan.dialects == ("dense",) and "ours" not in plan.contenders:
        raise ConfigError(f"only ours has the dense dialect, not {arguments.contenders}; name ours, or another dialect")
    if bool(plan.server) != bool(plan.server_model):
        raise ConfigError("--server and --server-model belong together; give both")
    if plan.model is None:
        from depthlm_ros.bench.shapes import find_shape

        plan.shape = find_shape(plan.shape or "small")
    return plan


def _names(kind: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise ConfigError(unknown_choice(kind, name, known))
    if not names:
        raise ConfigError(f"no {kind} was named; choose of {', '.join(known)}")
    return names


def _numbers(kind: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise ConfigError(f"--{kind} {text!r} isn't a list of whole numbers; write it like 64,256") from error
    if min(numbers) < 1:
        raise ConfigError(f"--{kind} holds {min(numbers)}; give at least 1")
    return numbers


def _given(arguments: argparse.Namespace) -> list[str]:
    """The options that aren't at their defaults, as they are written."""
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    usual = vars(parser.parse_args(["bench"]))
    written = []
    for name, value in vars(arguments).items():
        if name == "run" or value == usual.get(name, math.nan):
            continue
        option = f"--{name.replace('_', '-')}"
        written += [option] if value is True else [option, str(value)]
    return written
