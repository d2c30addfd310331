"""Attention to a prefix and to oneself, merged, is one softmax over all keys, whoever computes it."""

from __future__ import annotations

import pytest
import torch

from depthlm_ros.engines import cascade
from depthlm_ros.engines.cascade import Measured, backends, cuda_flash_attention, matmul_attention, merge

CPU = torch.device("cpu")
# (rows, tokens, keys, query heads, key heads, head size)
SHAPES = [(1, 1, 1, 4, 4, 16), (3, 5, 5, 4, 2, 16), (2, 7, 33, 8, 2, 64), (1, 90, 300, 6, 2, 24), (2, 40, 40, 4, 1, 80)]
# What rounding to the format explains, of outputs and of log-sum-exps.
ROUNDING = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (3e-3, 3e-3)}
ATTENTIONS = {**backends(CPU), "cuda_flash": cuda_flash_attention}


def one_softmax(query, key, value, mask, causal):
    """Attention as the formula says, in float64: (N, T, H, D) and (N, T, H, 1)."""
    share = query.shape[2] // key.shape[2]
    query, key, value = (x.double().transpose(1, 2) for x in (query, key, value))
    scores = query @ key.repeat_interleave(share, 1).transpose(2, 3) / query.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    output = scores.softmax(-1) @ value.repeat_interleave(share, 1)
    return output.transpose(1, 2), scores.logsumexp(-1, keepdim=True).transpose(1, 2)


def drawn(shape, dtype=torch.float32, seed=0):
    rows, tokens, keys, heads, groups, size = shape
    random = torch.Generator().manual_seed(seed)
    sizes = ((tokens, heads), (keys, groups), (keys, groups))
    return [torch.randn(rows, *some, size, generator=random).to(dtype) for some in sizes]


def masks(kind, rows, tokens, keys):
    """Random masks under which every token sees the first key."""
    if kind == "none":
        return None
    mask = torch.rand(rows if kind == "each row" else 1, tokens, keys, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[..., 0] = True
    return mask


def assert_close(found, expected, dtype):
    for ours, theirs, most in zip(found, expected, ROUNDING[dtype], strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, rtol=most, atol=most)


@pytest.mark.parametrize("mask", ["none", "one for all", "each row"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_backend_is_one_softmax(name, dtype, mask):
    for shape in SHAPES:
        query, key, value = drawn(shape, dtype)
        seen = masks(mask, *shape[:3])
        if name == "cuda_flash" and seen is None and dtype != torch.float32:
            continue  # that is the kernel for CUDA itself
        output, total = ATTENTIONS[name](query, key, value, seen, False)
        assert (output.dtype, total.dtype) == (dtype, torch.float32)
        assert_close((output, total), one_softmax(query, key, value, seen, False), dtype)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_causal_attention_sees_no_token_that_follows(name):
    for shape in (shape for shape in SHAPES if shape[1] == shape[2]):
        operands = drawn(shape)
        found = ATTENTIONS[name](*operands, None, True)
        assert_close(found, one_softmax(*operands, None, True), torch.float32)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_causal_attention_may_be_masked_too(name):
    query, key, value = drawn((2, 12, 12, 4, 2, 16))
    seen = torch.arange(12) > torch.arange(12)[:, None] - 5  # a sliding window
    found = ATTENTIONS[name](query, key, value, seen[None], True)
    assert_close(found, one_softmax(query, key, value, seen[None], True), torch.float32)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_operands_may_be_views_that_skip_memory(name):
    """Projections are slices of one product, stored keys slices of a larger buffer."""
    both = torch.randn(3, 9, 8, 16)
    query, key, value = both.split((4, 2, 2), dim=2)
    found = ATTENTIONS[name](query, key[:, :7], value[:, :7], None, False)
    assert_close(found, one_softmax(query, key[:, :7], value[:, :7], None, False), torch.float32)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_token_that_sees_nothing_weighs_nothing(name):
    """A sliding window may have left a whole prefix behind."""
    query, key, value = drawn((2, 3, 5, 4, 2, 16))
    seen = torch.ones(2, 3, 5, dtype=torch.bool)
    seen[0, 1] = False
    output, total = ATTENTIONS[name](query, key, value, seen, False)
    assert (total[0, 1] == -torch.inf).all() and total.isfinite().sum() == total.numel() - total[0, 1].numel()
    own = one_softmax(*drawn((2, 3, 4, 4, 2, 16), seed=2), None, False)
    own = (own[0].float(), own[1].float())
    joined = merge(own, (output, total))
    assert joined.isfinite().all()
    assert torch.equal(joined[0, 1], own[0][0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", backends(CPU))
def test_parts_merge_into_one_softmax_over_all_keys(name, dtype):
    attention = backends(CPU)[name]
    query, key, value = drawn((3, 6, 50, 8, 2, 32), dtype)
    own, prefix = (slice(44, None), slice(0, 44))
    ours = attention(query, key[:, own], value[:, own], None, True)
    theirs = attention(query, key[:, prefix], value[:, prefix], None, False)
    seen = torch.cat([torch.ones(6, 44, dtype=torch.bool), torch.ones(6, 6, dtype=torch.bool).tril()], dim=1)
    expected, _ = one_softmax(query, key, value, seen[None], False)
    torch.testing.assert_close(merge(ours, theirs).double(), expected, rtol=0, atol=ROUNDING[dtype][0])


def test_merging_is_exact_however_unequal_the_parts():
    """One part may outweigh the other by more than exp can write."""
    random = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 3, 4, 16, generator=random) for _ in range(2))
    for apart in (0.0, 3.0, 30.0, 300.0, -300.0):
        totals = torch.zeros(2, 3, 4, 1), torch.full((2, 3, 4, 1), apart)
        shares = torch.softmax(torch.stack(totals).double(), 0)
        expected = shares[0] * one.double() + shares[1] * other.double()
        found = merge((one, totals[0]), (other, totals[1]))
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_a_shared_prefix_is_read_as_one_long_row():
    """What the decoder relies on: the rows of all continuations after one another are one row to the prefix."""
    query, key, value = drawn((5, 7, 30, 4, 2, 16))
    key, value = key[:1], value[:1]
    for attention in backends(CPU).values():
        long, total = attention(query.reshape(1, 35, 4, 16), key, value, None, False)
        each, totals = one_softmax(query, key.expand(5, -1, -1, -1), value.expand(5, -1, -1, -1), None, False)
        assert_close((long.view(5, 7, 4, 16), total.view(5, 7, 4, 1)), (each, totals), torch.float32)


def test_large_scores_do_not_overflow():
    query, key, value = drawn((1, 4, 9, 4, 2, 16))
    for attention in backends(CPU).values():
        found = attention(200 * query, 5 * key, value, None, False)
        expected = one_softmax(200 * query, 5 * key, value, None, False)
        torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=0)


def test_plain_attention_is_the_same_without_the_sums():
    for shape in ((3, 9, 9, 4, 2, 16), (3, 9, 9, 4, 4, 16)):
        operands = drawn(shape)
        torch.testing.assert_close(
            cascade.plain_attention(*operands, True).double(), one_softmax(*operands, None, True)[0], rtol=0, atol=1e-5
        )


# ---------------------------------------------------------------- the choice


def measured(monkeypatch, **known):
    monkeypatch.setattr(cascade, "backends", lambda device: known)
    return Measured(CPU)


def test_the_fastest_is_chosen_when_a_shape_first_comes_and_kept(monkeypatch):
    ran = []
    times = {"slow": 2.0, "quick": 1.0}

    def backend(name):
        def attention(*operands):
            ran.append(name)
            return matmul_attention(*operands)

        attention.name = name
        return attention

    monkeypatch.setattr(cascade, "_seconds", lambda attention, *_: times[attention.name])
    attention = measured(monkeypatch, slow=backend("slow"), quick=backend("quick"))
    operands = drawn((3, 8, 8, 4, 2, 16))
    expected = matmul_attention(*operands, None, True)
    for output, wanted in zip(attention(*operands, None, True), expected, strict=True):
        torch.testing.assert_close(output, wanted)
    assert ran == ["quick"] and set(attention.chosen.values()) == {"quick"}
    times["quick"] = 3.0
    attention(*operands, None, True)
    assert ran == ["quick", "quick"], "measured once"
    attention(*drawn((3, 1, 8, 4, 2, 16)), None, False)
    assert ran[-1] == "slow", "another shape is measured anew"


def test_what_was_measured_is_told():
    attention = Measured(CPU)
    attention(*drawn((3, 8, 8, 4, 2, 16)), None, True)
    told = attention.told()
    assert "4x8x8: " in told and "matmul" in told and "flash" in told and " ms" in told


def fails(*_):
    raise RuntimeError("no kernel for this")


def test_a_backend_that_cannot_run_is_left_out(monkeypatch):
    attention = measured(monkeypatch, matmul=matmul_attention, flash=fails)
    attention(*drawn((3, 8, 8, 4, 2, 16)), None, True)
    assert set(attention.chosen.values()) == {"matmul"}


def test_where_nothing_runs_now_the_plain_one_is_left(monkeypatch):
    """Its error is that of the pass, which then is made smaller."""
    attention = measured(monkeypatch, matmul=fails, flash=fails)
    with pytest.raises(RuntimeError, match="no kernel for this"):
        attention(*drawn((3, 8, 8, 4, 2, 16)), None, True)
    assert set(attention.chosen.values()) == {"matmul"}


@pytest.mark.parametrize("mask", ["none", "one for all", "each row"])
def test_the_fastest_is_one_softmax_as_well(mask):
    """Masked shapes are measured apart, since a kernel may be slow with masks or not take them."""
    attention = Measured(CPU)
    for shape in SHAPES:
        operands, seen = drawn(shape), masks(mask, *shape[:3])
        assert_close(attention(*operands, seen, False), one_softmax(*operands, seen, False), torch.float32)
    before = len(attention.chosen)
    attention(*drawn(SHAPES[2]), masks("each row" if mask == "none" else "none", *SHAPES[2][:3]), False)
    assert len(attention.chosen) == before + 1


def test_each_device_has_the_backend_that_takes_everything():
    for device in ("cpu", "cuda", "meta"):
        assert backends(torch.device(device))["matmul"] is matmul_attention
    assert backends(torch.device("cuda"))["flash"] is cuda_flash_attention
