"""`depthlm bench`: models without a download that answer like trained ones, fair counts, and a run from end to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from depthlm_ros.bench import floor as floors
from depthlm_ros.bench import measure
from depthlm_ros.bench.ceilings import Ceilings
from depthlm_ros.bench.contenders import Batched, Frame, Official, Ours, Stock, make_frame
from depthlm_ros.bench.pictures import synthetic_image
from depthlm_ros.bench.profiling import kind_of, shares
from depthlm_ros.bench.rounds import Entry, Measured, compare, ratio, reference_answers, run_rounds
from depthlm_ros.bench.served import Served, same_text
from depthlm_ros.bench.shapes import SHAPES, find_shape, model_config
from depthlm_ros.bench.subject import build, load_subject
from depthlm_ros.bench.vocabulary import QWEN_TOKENS, build_tokenizer
from depthlm_ros.cli import main
from depthlm_ros.errors import ConfigError, EngineError
from depthlm_ros.markers import draw_arrow
from depthlm_ros.prompts import answer_text, compact_question, coordinates_question, parse_compact, parse_depth
from depthlm_ros.sampling import sample_pixels

WIDTH, HEIGHT = 128, 96


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The small shape, in memory and on disk."""
    image = synthetic_image(WIDTH, HEIGHT)
    marked = [draw_arrow(image, (int(u), int(v))) for u, v in sample_pixels(WIDTH, HEIGHT, 24, "random", 1, 5)]
    small = build(
        find_shape("small"),
        tmp_path_factory.mktemp("small"),
        device=torch.device("cpu"),
        dtype=torch.float32,
        marked=marked,
    )
    small.save()
    return small


@pytest.fixture(scope="module")
def subject(built):
    return built.subject()


def texts(subject, answers):
    return [subject.engine.processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


# ---------------------------------------------------------------- tokens


def test_the_published_question_costs_what_it_costs_with_qwens_tokenizer():
    tokenizer = build_tokenizer(find_shape("small"))
    question = coordinates_question(1234, 567)
    ids = tokenizer.encode(question[question.index("1234") :] + "<|im_end|>\n<|im_start|>assistant\n").ids
    assert 72 <= len(ids) <= 76


def test_the_compact_question_costs_twelve_tokens_a_point():
    tokenizer = build_tokenizer(find_shape("small"))
    question = compact_question(512, 34)
    assert len(tokenizer.encode(question[question.index("512") :] + "<|im_end|>\n<|im_start|>assistant\n").ids) == 12


def test_digits_are_tokens_of_their_own_and_text_survives():
    tokenizer = build_tokenizer(find_shape("small"))
    encoded = tokenizer.encode("1948.07")
    assert encoded.tokens == list("1948.07")
    text = answer_text(12.42) + " Anything else, such as ångström?"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("dialect", ["coordinates", "compact"])
def test_random_weights_answer_in_the_published_form_and_differ_from_point_to_point(subject, dialect):
    asked = make_frame(subject, dialect, synthetic_image(640, 480), 256)
    frame = replace(asked, image=synthetic_image(WIDTH, HEIGHT))  # the questions of a large image about a small one
    said = texts(subject, Ours("ours", subject).answer(frame))
    read = [(parse_compact if dialect == "compact" else parse_depth)(text) for text in said]
    good = [depth for depth in read if depth is not None]
    assert len(good) >= 0.95 * 256
    assert len(set(good)) >= 150
    if dialect == "coordinates":
        numbers = [re.findall(r"\d+\.\d\d", text) for text in said]
        assert sum(len(n) == 2 and n[0] == n[1] for n in numbers) >= 0.95 * 256


def test_answers_to_the_marker_question_differ_from_image_to_image(subject):
    frame = make_frame(subject, "marker", synthetic_image(WIDTH, HEIGHT), 24)
    said = texts(subject, Ours("ours", subject).answer(frame))
    assert sum(parse_depth(text) is not None for text in said) >= 0.9 * 24
    assert len(set(said)) >= 15


def test_all_contenders_give_the_tokens_of_plain_generate(subject):
    stock = Stock(subject)
    for dialect, points in (("coordinates", 5), ("compact", 5), ("marker", 3)):
        frame = make_frame(subject, dialect, synthetic_image(WIDTH, HEIGHT), points)
        reference = reference_answers(stock, frame, range(points))
        for contender in (Ours("ours", subject), Ours("plain", subject), Batched(subject, None), Official(subject, 2)):
            entry = Entry(contender, frame)
            found = compare(entry, contender.answer(entry.asked), reference, stock)
            assert (found.compared, found.identical) == (len(entry.asked), len(entry.asked)), contender.name


def test_a_kept_shape_is_a_checkpoint_that_answers_the_same(built, subject):
    loaded = load_subject(str(built.folder), "cpu", "float32")
    assert loaded.card.dialects == ("dense", "coordinates", "marker", "compact")
    frame = make_frame(subject, "coordinates", synthetic_image(WIDTH, HEIGHT), 6)
    assert Ours("ours", loaded).answer(frame) == Ours("ours", subject).answer(frame)
    assert loaded.engine.depth_map(frame.image, "").shape == (HEIGHT, WIDTH)


def reduced(name):
    """A published shape with few and narrow layers."""
    shape = SHAPES[name]
    size = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 640}
    text = dict(shape.text) | size | {"num_attention_heads": 4, "num_key_value_heads": 2}
    vision = dict(shape.vision) | {"hidden_size": 96, "intermediate_size": 96, "out_hidden_size": 256, "num_heads": 3}
    if name == "pixtral-12b":
        vision = dict(shape.vision) | {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 3, "head_dim": 32}
    elif name.startswith("qwen2.5"):
        vision |= {"depth": 2, "fullatt_block_indexes": [1]}
        text["rope_scaling"] = text["rope_scaling"] | {"mrope_section": [8, 12, 12]}
    image = dict(shape.image) | {"shortest": 3136}
    return replace(shape, text=text, vision=vision, image=image)


@pytest.mark.parametrize("name", ["qwen2.5-vl-3b", "pixtral-12b"])
def test_other_architectures_learn_the_sentence_too(tmp_path, name):
    subject = build(reduced(name), tmp_path, device=torch.device("cpu"), dtype=torch.float32).subject()
    frame = make_frame(subject, "coordinates", synthetic_image(112, 112), 12)
    stock = Stock(subject)
    plain = reference_answers(stock, frame, range(12))
    assert sum(parse_depth(text) is not None for text in texts(subject, plain.values())) >= 11
    assert Ours("ours", subject).answer(frame) == list(plain.values())


# ---------------------------------------------------------------- comparing


class Scripted:
    """Answers from a list, and takes as long as its clock says."""

    name, limit, work = "scripted", None, {}

    def __init__(self, answers):
        self.answers = answers

    def answer(self, frame):
        return self.answers


def test_a_different_answer_is_found_with_its_place_and_gap(subject):
    stock = Stock(subject)
    frame = make_frame(subject, "compact", synthetic_image(WIDTH, HEIGHT), 3)
    reference = reference_answers(stock, frame, range(3))
    wrong = [list(ids) for ids in reference.values()]
    wrong[1][0] = wrong[1][0] + 1 if wrong[1][0] + 1 < 640 else 0
    wrong = [tuple(ids) for ids in wrong]
    found = compare(Entry(Scripted(wrong), frame), wrong, reference, stock)
    assert (found.compared, found.identical) == (3, 2)
    (difference,) = found.differences
    assert (difference.row, difference.at) == (1, 0)
    assert difference.gap > 1e-5
    assert found.summary()["ties"] == 0


def test_rounds_are_interleaved_and_the_first_is_not_counted():
    order = []

    class Noted(Scripted):
        def answer(self, frame):
            order.append(self.name)
            return []

    first, second = Noted([]), Noted([])
    first.name, second.name = "a", "b"
    frame = Frame("compact", np.zeros((8, 8, 3), np.uint8), ("?",) * 4, (), None, 4)
    measured, _ = run_rounds([Entry(first, frame), Entry(second, frame)], 2, torch.device("cpu"))
    assert order == ["a", "b"] * 3
    assert [len(row.seconds) for row in measured] == [2, 2]


def test_a_ratio_is_made_within_each_round():
    ours = Measured("ours", "compact", 100, 100, [1.0, 2.0, 4.0])
    theirs = Measured("official", "compact", 100, 10, [1.0, 2.0, 8.0])
    assert ratio(ours, theirs) == {"median": 10.0, "min": 10.0, "max": 20.0}


def test_a_slow_contender_answers_points_that_are_spread_over_the_frame():
    frame = Frame("compact", np.zeros((8, 8, 3), np.uint8), tuple("abcdefgh"), (), None, 4)
    assert frame.some(4).questions == ("b", "d", "f", "h")
    assert frame.some(None).questions == frame.questions


# ---------------------------------------------------------------- floor


def counted(model, run):
    """FLOP that torch counts: of matrix products, and of batched ones, which attention by hand consists of."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run()
    model.set_attn_implementation("sdpa")
    kinds = {"attention": 0, "matmul": 0}
    for operator, flop in counter.get_flop_counts()["Global"].items():
        kinds["attention" if "bmm" in str(operator) else "matmul"] += flop
    return kinds


def test_the_floor_of_the_vision_tower_is_what_torch_counts(built):
    inputs = built.processor.images([synthetic_image(WIDTH, HEIGHT)])
    part = floors.vision_part(built.checkpoint.config, inputs.grid_hw)
    seen = counted(built.model, lambda: built.model.model.get_image_features(**inputs.tensors))
    assert part.matmul_flop == pytest.approx(seen["matmul"], rel=0.002)
    assert part.attention_flop == pytest.approx(seen["attention"], rel=0.002)


def test_the_floor_of_the_prefix_is_what_torch_counts(built):
    tokens = 40
    part = floors.prefix_part(built.checkpoint.config, tokens)
    embeds = torch.zeros(1, tokens, 256)
    seen = counted(built.model, lambda: built.model.model.language_model(inputs_embeds=embeds, use_cache=False))
    assert part.matmul_flop == pytest.approx(seen["matmul"], rel=0.001)
    # torch counts the pairs that the mask leaves out too, and the angles of the positions.
    assert part.attention_flop == pytest.approx(seen["attention"] * (tokens + 1) / (2 * tokens), rel=0.005)


def test_the_floor_of_whole_points_is_what_a_forward_of_their_tokens_takes(built):
    config = built.checkpoint.config
    counts = floors.Counts((3, 4), 12, points=1, suffix=20, answer=9, number=4)
    parts = floors.frame_parts(config, counts)
    total = 12 + 20 + 8
    embeds = torch.zeros(1, total, 256)
    seen = counted(built.model, lambda: built.model.model.language_model(inputs_embeds=embeds, use_cache=False))
    head = 2 * 9 * 256 * 640
    assert sum(part.matmul_flop for part in parts[1:]) == pytest.approx(seen["matmul"] + head, rel=0.001)
    pairs = sum(a.pairs for part in parts[1:] for a in part.attention)
    assert pairs == total * (total + 1) // 2


def test_qwen2_5_windows_count_their_own_pairs_only():
    vision = SHAPES["qwen2.5-vl-3b"].vision
    config = {"model_type": "qwen2_5_vl", "vision_config": vision, "text_config": SHAPES["qwen2.5-vl-3b"].text}
    windows = next(a for a in floors.vision_part(config, (6, 4)).attention if a.name == "windows")
    assert windows.pairs == 4 * 4 * (16 * 16 + 8 * 8)
    assert windows.count == 28


def test_the_docstring_states_the_floor_of_qwen3_vl_4b():
    config = model_config(find_shape("qwen3-vl-4b"), dict.fromkeys(QWEN_TOKENS, 0), 0, "bfloat16")
    for name, grid in (("640x480", (15, 20)), ("1000x750", (23, 31)), ("1024x1024", (32, 32))):
        tokens = grid[0] * grid[1]
        published = floors.frame_parts(config, floors.Counts(grid, tokens + 17, 1000, 74, 31, 4))
        compact = floors.frame_parts(config, floors.Counts(grid, tokens + 37, 1000, 12, 5, 4))
        shared = published[0].flop + published[1].flop
        each = [sum(part.flop for part in parts[2:]) / 1000 for parts in (published, compact)]
        wanted = [floors.amount(flop) for flop in (published[0].flop, published[1].flop, shared, *each)]
        (line,) = [line for line in floors.__doc__.splitlines() if line.split()[:1] == [name]]
        assert re.split(r"\s{2,}", line.strip()) == [name, str(tokens), *wanted]
    layers = sum(product.weights for product in floors.text_products(config, 1))
    assert f"{layers / 1e9:.3g} billion" in floors.__doc__


def test_the_least_time_is_arithmetic_or_memory_whichever_is_slower():
    ceilings = Ceilings(torch.device("cpu"), torch.float32, seconds=0.0)
    product = floors.Product("p", 64, 32, 48, 3)
    attention = floors.Attention("a", 16, 32, 512, 4, 2, 16, 2)
    part = ceilings.floor(floors.Part("part", (product,), (attention,), 10**9))
    assert part.products_s == pytest.approx(product.flop / ceilings.product_rate(product))
    assert part.attention_s == pytest.approx(attention.flop / ceilings.attention_rate(attention))
    assert part.seconds == part.memory_s == pytest.approx(4e9 / ceilings.bandwidth())


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::mm", "matmul"),
        ("mkldnn::_linear_pointwise", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::bmm", "attention"),
        ("aten::_softmax", "attention"),
        ("aten::mul", "rest"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matmul"),
        ("void at::native::elementwise_kernel<128, 4, mul>", "rest"),
    ],
)
def test_operators_are_sorted_by_their_names(name, kind):
    assert kind_of(name) == kind


def test_shares_sum_to_one():
    found = shares({"aten::mm": 60.0, "aten::bmm": 30.0, "aten::mul": 6.0, "aten::copy_": 4.0})
    assert (found.matmul, found.attention, found.rest) == pytest.approx((0.6, 0.3, 0.1))
    assert found.largest[0] == ("aten::mul", pytest.approx(0.06))


# ---------------------------------------------------------------- server


@pytest.fixture
def server():
    """A server that answers with the question's last words, and keeps what it was sent."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, asked))
            good = asked["model"] == "bench"
            said = {"choices": [{"message": {"content": asked["messages"][0]["content"][1]["text"][-7:]}}]}
            body = json.dumps(said if good else {"error": "no such model"}).encode()
            self.send_response(200 if good else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}", seen
    served.shutdown()
    served.server_close()
    thread.join()


def test_a_server_is_asked_with_the_image_first_and_answers_keep_their_order(server):
    url, seen = server
    questions = tuple(compact_question(at, 999 - at) for at in range(6))
    frame = Frame("compact", synthetic_image(16, 16), questions, (), None, 12)
    contender = Served(url, "bench", 3, None)
    contender.answer(frame)
    assert contender.texts == [question[-7:] for question in questions]
    path, asked = seen[0]
    assert path == "/v1/chat/completions"
    assert (asked["temperature"], asked["max_tokens"]) == (0, 12)
    image, text = asked["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["type"] == "text"
    assert len({json.dumps(a["messages"][0]["content"][0]) for _, a in seen}) == 1


def test_a_server_that_refuses_is_quoted(server):
    url, _ = server
    frame = Frame("compact", synthetic_image(16, 16), ("?",), (), None, 4)
    with pytest.raises(EngineError, match="404.*no such model"):
        Served(f"{url}/v1", "other", 1, None).answer(frame)
    with pytest.raises(EngineError, match="does not answer"):
        Served("http://127.0.0.1:9", "bench", 1, None).answer(frame)
    with pytest.raises(ConfigError, match="is no URL"):
        Served("localhost:8000", "bench", 1, None)


def test_a_server_rests_while_others_are_measured(server):
    url, _ = server
    frame = Frame("compact", synthetic_image(16, 16), (compact_question(1, 2),), (), None, 4)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as polling:
        state = Path(f"/proc/{polling.pid}/stat")
        contender = Served(url, "bench", 1, None, (polling.pid,))
        contender.answer(frame)
        os.waitpid(polling.pid, os.WUNTRACED)
        assert state.read_text().rpartition(")")[2].split()[0] == "T"
        contender.wake()
        os.waitpid(polling.pid, os.WCONTINUED)
        assert state.read_text().rpartition(")")[2].split()[0] != "T"
        polling.kill()
    with pytest.raises(ConfigError, match="No such process"):
        contender.answer(frame)


def test_texts_are_the_same_where_only_white_space_differs():
    assert (
        same_text(["<think> a </think>\n\n<answer> 1 </answer>", "b"], ["<think> a </think> <answer> 1 </answer>", "c"])
        == 1
    )


# ---------------------------------------------------------------- command


@pytest.mark.parametrize(
    "options, said",
    [
        (["--shape", "qwen3-vl-5b"], "did you mean 'qwen3-vl-4b'"),
        (["--dialects", "coordinate"], "did you mean 'coordinates'"),
        (["--contenders", "officiel"], "did you mean 'official'"),
        (["--points", "64,many"], "isn't a list of whole numbers"),
        (["--points", "0"], "--points holds 0"),
        (["--rounds", "0"], "nothing would be measured"),
        (["--official-points", "0"], "--official-points is 0"),
        (["--server", "http://localhost:1"], "belong together"),
        (["--model", "demo", "--keep", "x"], "use --shape"),
        (["--dialects", "dense", "--contenders", "official"], "only ours has the dense dialect, not official"),
        (["--device", "tpu"], "device 'tpu'"),
    ],
)
def test_options_without_meaning_are_refused_with_a_remedy(capsys, options, said):
    assert main(["bench", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("depthlm: ConfigError") and said in error


def test_a_run_from_end_to_end_writes_the_table_and_the_figures(built, tmp_path, capsys, server, monkeypatch):
    monkeypatch.setattr(measure, "Ceilings", partial(Ceilings, seconds=0.0))
    url, _ = server
    file = tmp_path / "figures" / "bench.json"
    options = (
        f"--width {WIDTH} --height {HEIGHT} --points 4,8 --rounds 2 --official-points 1 --batched-points 2 --check 3"
    )
    chosen = [
        "--dialects",
        "coordinates,compact,dense",
        "--server",
        url,
        "--server-model",
        "bench",
        "--concurrency",
        "2",
    ]
    command = ["bench", "--model", str(built.folder), *options.split(), *chosen, "--profile", "--json", str(file)]
    assert main([*command, "--device", "cpu", "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "| compact | 8 | ours |" in said and "`depthlm bench --model" in said
    assert "3 of 3 the same tokens as plain generate" in said
    found = json.loads(file.read_text())
    assert found["header"]["dtype"] == "float32" and "--profile" in found["header"]["command"]
    rows = {(row["dialect"], row["points"], row["contender"]): row for row in found["measured"]}
    assert {("coordinates", 4, "official"), ("coordinates", 8, "ours"), ("dense", 1, "ours")} <= set(rows)
    assert ("coordinates", 4, "served, 2 at once") in rows
    row = rows["coordinates", 8, "ours"]
    assert len(row["seconds"]) == 2 and row["peak_bytes"] > 0 and row["fraction_of_floor"] > 0
    assert rows["coordinates", 4, "official"]["asked"] == 1
    assert {r["beside"] for r in found["ratios"] if r["dialect"] == "compact"} >= {
        "official, published question",
        "batched",
    }
    (floor,) = [f for f in found["floors"] if (f["dialect"], f["points"]) == ("coordinates", 8)]
    assert [part["name"] for part in floor["parts"]] == ["vision", "prefix", "suffix", "answer"]
    assert floor["tokens"]["image"] == 12 and 68 <= floor["tokens"]["suffix"] <= 74
    assert all(a["identical"] == a["compared"] for a in found["answers"])
    assert found["profiles"][0]["matmul"] > 0


def test_the_help_answers_without_torch(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--help"])
    assert ended.value.code == 0
    assert "--official-points" in capsys.readouterr().out
