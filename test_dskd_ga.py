"""Tests of dskd_ga.py: values and gradients against float64 oracles written out here, invariances, runs.

The oracles know neither padding nor slices: they loop over rows, positions or vocabulary, or are dense.
"""
import argparse
import contextlib
import functools
import hashlib
import http.server
import itertools
import json
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import xml.etree.ElementTree

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read it

import hypothesis
import hypothesis.strategies as st
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from torch import nn

import dskd_ga
from dskd_ga import (
    Critic, Discriminator, Head, Projectors, baseline_losses, chunk_alignment, chunk_projection,
    cross_model_attention, ct_loss, ct_terms, divergence, dual_space_losses, edit_distances, ga_loss, ga_terms,
    head_losses, matched_alone, mined_targets, rouge_l, std_normalise, token_map, uld_loss)

torch.set_num_threads(1)  # the tensors are tiny
INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def normal(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def same(found, expected, tol=1e-10):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def gradients(value, leaves):
    """d value / d leaf for each leaf, 0 where there is no path; the graph is kept."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


def same_with_gradients(found, expected, leaves, tol=1e-10):
    """Equal values, and equal gradients of a random linear combination of the entries."""
    same(found, expected, tol)
    weights = torch.randn_like(expected)
    same(gradients((found * weights).sum(), leaves), gradients((expected * weights).sum(), leaves), tol)


def padded(rows, fill, extra=0):
    """[(n, ...), ...] -> (B, longest n + extra, ...) with `fill` under the padding, and the mask."""
    length = max(len(row) for row in rows) + extra
    block = [torch.cat([row, row.new_full((length - len(row), *row.shape[1:]), fill)]) for row in rows]
    return torch.stack(block), torch.tensor([[i < len(row) for i in range(length)] for row in rows])


def padded_maps(maps, fill=0, extra=0):
    """[(n, m), ...] -> (B, longest n + extra, longest m + extra)."""
    n, m = (max(x.shape[axis] for x in maps) + extra for axis in (0, 1))
    pad = lambda x: nn.functional.pad(x, (0, m - x.shape[1], 0, n - x.shape[0]), value=fill)
    return torch.stack([pad(x) for x in maps])


def bools(*rows):
    return torch.tensor([[c == "1" for c in row] for row in rows], dtype=torch.bool)


# Three rows of different lengths, chunks of student tokens (down) and teacher tokens (across). Some tokens at
# the end are in no chunk, as when the other side is truncated.
CHUNKS = [bools("110", "001", "001", "000"), bools("11000", "11000"), bools("1", "1", "1", "0", "0")]
S_LENGTHS, T_LENGTHS = [len(m) for m in CHUNKS], [m.shape[1] for m in CHUNKS]


# ------------------------------------------------------------------------------ divergences
def slow_divergence(name, z_s, z_t, tau, skew=0.1, head_mass=0.5):
    p, q = ((z / tau).exp() / (z / tau).exp().sum(-1, keepdim=True) for z in (z_t, z_s))
    kl = lambda a, b: (a * (a / b).log()).sum(-1)
    if name != "akl":
        return {"kl": lambda: kl(p, q), "rkl": lambda: kl(q, p),
                "jsd": lambda: kl(p, (p + q) / 2) / 2 + kl(q, (p + q) / 2) / 2,
                "skl": lambda: kl(p, skew * p + (1 - skew) * q),
                "srkl": lambda: kl(q, (1 - skew) * p + skew * q)}[name]()
    values = []
    for p_i, q_i in zip(p.flatten(0, -2), q.flatten(0, -2)):
        gap, mass, g_head = (p_i - q_i).abs().detach(), 0.0, 0.0
        for v in sorted(range(len(p_i)), key=lambda v: -p_i[v].item()):
            if mass >= head_mass:
                break
            mass, g_head = mass + p_i[v].item(), g_head + gap[v]
        g_tail = gap.sum() - g_head
        values.append((g_head * kl(p_i, q_i) + g_tail * kl(q_i, p_i)) / (g_head + g_tail))
    return torch.stack(values).view(p.shape[:-1])


every_divergence = pytest.mark.parametrize("name", ["kl", "rkl", "jsd", "skl", "srkl", "akl"])


@every_divergence
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_divergence(name, tau):
    z_s, z_t = normal(3, 4, 9, grad=True), (3 * normal(3, 4, 9)).requires_grad_()
    same_with_gradients(divergence(name, z_s, z_t, tau), slow_divergence(name, z_s, z_t, tau), [z_s, z_t])
    same(divergence(name, z_s, z_t, tau, 0.3, 0.9), slow_divergence(name, z_s, z_t, tau, 0.3, 0.9))
    half_s, half_t = z_s.bfloat16(), z_t.bfloat16()
    same(divergence(name, half_s, half_t, tau),
         slow_divergence(name, half_s.double(), half_t.double(), tau).float(), 1e-5)


@every_divergence
def test_divergence_of_extreme_logits(name):
    z_s, z_t, gone = normal(4, 9, grad=True), normal(4, 9), torch.arange(9) % 3 == 1
    finite = lambda value: value.isfinite().all() and gradients(value.sum(), [z_s])[0].isfinite().all()
    # -inf on both sides: as if these vocabulary entries did not exist
    found = divergence(name, z_s.masked_fill(gone, -INF), z_t.masked_fill(gone, -INF))
    same_with_gradients(found, slow_divergence(name, z_s[:, ~gone], z_t[:, ~gone], 2.0), [z_s])
    # on one side: finite, and equal to the limit wherever the formula has a finite one
    for logits, infinite in ((lambda x: (z_s.masked_fill(gone, x), z_t), ("kl", "akl")),
                             (lambda x: (z_s, z_t.masked_fill(gone, x)), ("rkl", "akl"))):
        found = divergence(name, *logits(-INF))
        assert finite(found) and finite(divergence(name, *(z.float() for z in logits(-INF))))
        if name not in infinite:
            same_with_gradients(found, slow_divergence(name, *logits(-150.0), 2.0), [z_s])
    for dtype in (torch.float32, torch.bfloat16):
        huge_s, huge_t = 1e4 * torch.randint(-1, 2, (2, 4, 9))
        found = divergence(name, (huge_s + 0 * z_s).to(dtype), huge_t.to(dtype), 1.0)
        assert finite(found) and found.min() >= 0 and found.max() > 0


def test_divergence_properties():
    z_s, z_t = normal(5, 9), normal(5, 9)
    for name in ("kl", "rkl", "jsd", "skl", "srkl", "akl"):
        same(divergence(name, z_s, z_s), torch.zeros_like(z_s[:, 0]))
    same(divergence("jsd", z_s, z_t), divergence("jsd", z_t, z_s))
    same(divergence("skl", z_s, z_t, skew=0), divergence("kl", z_s, z_t))
    same(divergence("srkl", z_s, z_t, skew=0), divergence("rkl", z_s, z_t))
    with pytest.raises(ValueError, match="tvd"):
        divergence("tvd", z_s, z_t)
    with pytest.raises(ValueError, match="shape"):
        divergence("kl", z_s, z_t[:1])  # would broadcast


# ------------------------------------------------------------------------------ alignment
@pytest.mark.parametrize("garbage, extra", [(0.0, 0), (NAN, 1), (INF, 3), (1e30, 2)])
def test_std_normalise(garbage, extra):
    rows = [(n * normal(n, 5) + mean).requires_grad_() for n, mean in ((4, 3), (1, 0), (6, 9))]
    expected, _ = padded([row / row.std() for row in rows], 0, extra)
    same_with_gradients(std_normalise(*padded(rows, garbage, extra)), expected, rows)


@pytest.mark.parametrize("value", [0.0, 2.0, 0.1])
def test_std_normalise_leaves_equal_entries_as_they_are(value):
    x, mask = padded([torch.full((3, 7), value, requires_grad=True), torch.randn(5, 7)], NAN)
    found = std_normalise(x, mask)
    assert found.isfinite().all() and gradients(found.sum(), [x])[0].isfinite().all()
    same(found[0, :3], x[0, :3], 1e-6)


def slow_attention(q, k, chunks):
    """q (n, w), k (m, w), chunks (n, m): for each query, softmax over the keys in its chunk."""
    result = torch.zeros_like(chunks, dtype=torch.float64)
    for i, q_i in enumerate(q):
        keys = [j for j in range(len(k)) if chunks[i, j]]
        if keys:
            weights = [(sum(a * b for a, b in zip(q_i, k[j])) / math.sqrt(len(q_i))).exp() for j in keys]
            result[i, keys] = torch.stack(weights) / sum(weights)
    return result


@pytest.mark.parametrize("with_chunks", [False, True])
def test_cross_model_attention(with_chunks):
    q_rows, k_rows = ([normal(n, 4, grad=True) for n in lengths] for lengths in (S_LENGTHS, T_LENGTHS))
    allowed = CHUNKS if with_chunks else [torch.ones_like(m) for m in CHUNKS]
    expected = ([slow_attention(*row) for row in zip(q_rows, k_rows, allowed)],
                [slow_attention(k, q, m.T) for q, k, m in zip(q_rows, k_rows, allowed)])
    for garbage, extra in ((0.0, 0), (NAN, 2), (1e30, 1)):
        (q, s_mask), (k, t_mask) = padded(q_rows, garbage, extra), padded(k_rows, -garbage, extra)
        chunks = padded_maps(CHUNKS, True, extra) if with_chunks else None
        for found, reference in zip(cross_model_attention(q, k, s_mask, t_mask, chunks), expected):
            reference = padded_maps(reference, extra=extra)
            same_with_gradients(found, reference, q_rows + k_rows)
            assert (found[reference == 0] == 0).all()  # exactly: padding, and rows without a chunk
            same(found.sum(-1), (reference > 0).any(-1).double())
            assert all(g.isfinite().all() for g in gradients((found ** 2).sum(), [q, k]))


def test_chunk_projection():
    s_mask, t_mask = bools("1110"), bools("11110")
    chunks = bools("11000", "00000", "00111", "00111")[None]  # the last chunk reaches into the padding
    maps = chunk_projection(chunks, s_mask, t_mask)
    same(maps[0], torch.tensor([[[0.5, 0.5, 0, 0, 0], [0] * 5, [0, 0, 0.5, 0.5, 0], [0] * 5]]))
    same(maps[1], torch.tensor([[[1.0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0] * 4]]))


@pytest.mark.parametrize("case, s_text, t_text, expected", [  # "13" is the span (1, 3), "$" the end of text
    ("equal", "02 25 $", "02 25 $", "100 010 001"),
    ("one to many", "04 46", "01 14 46", "110 001"),
    ("many to many", "03 35 58", "02 25 58", "110 110 001"),
    ("space in no span", "03 47", "03 37", "10 01"),
    ("character split", "01 12 12", "01 12", "10 01 01"),
    ("character split on both sides", "01 12 12", "01 12 12", "100 011 011"),
    ("token ends inside a character", "02 24 34 45", "02 23 34 45", "1000 0110 0110 0001"),
    ("next token goes on in that character", "02 24 36", "02 24 46", "100 011 011"),
    ("end of text", "01 13 $", "03 $", "10 10 01"),
    ("end of text on one side", "02 23 $", "02 23", "10 01 00"),
    ("truncated inside a token", "02 24", "02 26 67 $", "1000 0000"),
    ("truncated between tokens", "02 24", "01 14 46 $", "1100 1100"),
    ("no common cut", "02", "03 $", "00"),
    ("one token", "05", "05", "1"),
    ("empty text", "$", "$", "1"),
    ("empty side", "", "02 $", ""),
    ("both empty", "", "", "")])
def test_chunk_alignment(case, s_text, t_text, expected):
    s_spans, t_spans = ([(-1, -1) if x == "$" else (int(x[0]), int(x[1])) for x in text.split()]
                        for text in (s_text, t_text))
    expected = bools(*expected.split()).view(len(s_spans), len(t_spans))
    assert torch.equal(chunk_alignment(s_spans, t_spans), expected)
    assert torch.equal(chunk_alignment(t_spans, s_spans), expected.T)


def chunk_walk(s_spans, t_spans):
    """The side that is behind moves on; where both sides end, but not inside a character, a chunk closes."""
    result = torch.zeros(len(s_spans), len(t_spans), dtype=torch.bool)
    s_text, t_text = ([span for span in spans if span != (-1, -1)] for spans in (s_spans, t_spans))
    inside = lambda text, n: n + 1 < len(text) and text[n + 1][0] < text[n][1]
    i = j = first_i = first_j = 0
    while i < len(s_text) and j < len(t_text):
        s_end, t_end = s_text[i][1], t_text[j][1]
        if s_end < t_end or s_end == t_end and inside(s_text, i):
            i += 1
        elif t_end < s_end or inside(t_text, j):
            j += 1
        else:
            result[first_i:i + 1, first_j:j + 1] = True
            i, j = first_i, first_j = i + 1, j + 1
    if (-1, -1) in s_spans and (-1, -1) in t_spans:
        result[-1, -1] = True
    return result


def test_chunk_alignment_is_the_chunk_walk():
    rng = random.Random(0)
    for _ in range(300):
        # tokens are runs of bytes, so they also end inside characters; some rows are truncated
        character_of_byte = [c for c in range(rng.randint(1, 12)) for _ in range(rng.choice((1, 1, 2, 3)))]
        n, sides = len(character_of_byte), []
        for _ in range(2):
            cuts = [0, *sorted(rng.sample(range(1, n), rng.randrange(n))), n]
            spans = [(character_of_byte[a], character_of_byte[b - 1] + 1) for a, b in zip(cuts, cuts[1:])]
            spans.append((-1, -1))
            sides.append(spans[:rng.randrange(len(spans))] if rng.random() < 0.3 else spans)
        assert torch.equal(chunk_alignment(*sides), chunk_walk(*sides)), sides


@functools.cache
def levenshtein(a, b):
    if not a or not b:
        return len(a) + len(b)
    longer = min(levenshtein(a[1:], b), levenshtein(a, b[1:])) + 1
    return min(longer, levenshtein(a[1:], b[1:]) + (a[0] != b[0]))


def random_texts(rng, most, longest):
    letters = rng.choice(["ab", "Ġabš😀"])
    return ["".join(rng.choices(letters, k=rng.randint(0, longest))) for _ in range(rng.randint(1, most))]


def test_edit_distances():
    rng = random.Random(0)
    cases = [([""], [""]), (["", "ab"], [""]), ([""], ["ab"]), (["kitten"], ["sitting"])]
    cases += [(random_texts(rng, 6, 7), random_texts(rng, 6, 7)) for _ in range(50)]
    for s_texts, t_texts in cases:
        t_texts.append(s_texts[0])
        expected = [[levenshtein(s, t) for t in t_texts] for s in s_texts]
        assert edit_distances(s_texts, t_texts).tolist() == expected, (s_texts, t_texts)


def slow_alone(s_texts, t_texts):
    """The map of the pairs matched alone on the warping path of the least summed distance."""
    total = {(0, 0): (0, [])}  # (i, j): cost and pairs of the best path through the first i and j tokens
    for i, s in enumerate(s_texts, 1):
        for j, t in enumerate(t_texts, 1):
            before = [total[at] for at in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if at in total]
            cost, path = min(before, key=lambda found: found[0])  # the first of equals
            path = path + [(i - 1, j - 1)]
            total[i, j] = cost + levenshtein(s, t), path
    rows, columns = zip(*path)
    alone = [(i, j) for i, j in path if rows.count(i) == columns.count(j) == 1]
    return torch.tensor([[(i, j) in alone for j in range(len(t_texts))] for i in range(len(s_texts))])


@pytest.mark.parametrize("case, s_text, t_text, expected", [
    ("equal", "a b c", "a b c", "100 010 001"),
    ("nearly equal", "ab cd", "abc c", "10 01"),
    ("one to many", "ab c", "a b c", "000 001"),
    ("many to one", "x aa aa y", "x aa y", "100 000 000 001"),
    ("one token", "a", "b", "1"),
    ("one student token", "a", "a b a", "000"),
    ("one teacher token", "a b", "b", "0 0"),
    ("repeated: the diagonal goes first", "a a b", "a a a b", "0000 0010 0001"),
    ("exchanged: the diagonal goes first", "a c", "c a", "10 01"),
    ("of up and left, up goes first", "c a c", "b b c a", "0000 0000 0000")])
def test_matched_alone(case, s_text, t_text, expected):
    s_texts, t_texts, expected = s_text.split(), t_text.split(), bools(*expected.split())
    s_number, t_number = matched_alone(s_texts, t_texts)
    assert torch.equal(s_number[:, None] == t_number, expected)
    assert torch.equal(slow_alone(s_texts, t_texts), expected)


def test_matched_alone_is_the_warping_path():
    rng = random.Random(0)
    for _ in range(300):
        vocabulary = random_texts(rng, 6, 3)  # so texts are repeated, and many paths equal in cost
        s_texts, t_texts = (rng.choices(vocabulary, k=rng.randint(1, 9)) for _ in range(2))
        (s_number, t_number), expected = matched_alone(s_texts, t_texts), slow_alone(s_texts, t_texts)
        assert torch.equal(s_number[:, None] == t_number, expected), (s_texts, t_texts)
        for number, matched, nowhere in ((s_number, expected.any(1), -1), (t_number, expected.any(0), -2)):
            assert number.dtype == torch.long and torch.equal(number == nowhere, ~matched)
            assert (number[matched] >= 0).all()


def test_token_map():
    rng = random.Random(0)
    cases = [(["b", "a"], ["ab", "", "c", "a"]), ([""], ["", "ab", "abc"]), (["abcd"], ["a", "ab", "badc"]),
             (["ba", "aab"], ["ab"]), (["naïve", "naive", "naive"], ["naive", "Naïve", "naif", "ñaîvé"])]
    cases += [(random_texts(rng, 30, 8), random_texts(rng, 30, 8)) for _ in range(60)]
    for s_texts, t_texts in cases:
        s_texts = s_texts + s_texts[:1]
        expected = []
        for t in t_texts:
            distances = [levenshtein(s, t) for s in s_texts]
            expected.append(distances.index(min(distances)) if min(distances) <= 2 else -1)
        assert token_map(s_texts, t_texts) == expected, (s_texts, t_texts)


# ------------------------------------------------------------------------------ key-query matching
def test_discriminator():
    disc, x = Discriminator(6, hidden=5, dropout=0.5).double(), normal(2, 3, 6, grad=True)
    assert not torch.equal(disc(x), disc(x))  # dropout
    first, last = disc.mlp[1], disc.mlp[3]
    z = x @ disc.highway.weight.T + disc.highway.bias
    g = 1 / (1 + (-z).exp())
    y = (g * z.clamp(min=0) + (1 - g) * x) @ first.weight.T + first.bias
    expected = torch.where(y > 0, y, 0.1 * y) @ last.weight[0] + last.bias
    same_with_gradients(disc.eval()(x), expected, [x, *disc.parameters()])


@pytest.mark.parametrize("garbage, extra", [(0.0, 0), (NAN, 2), (1e30, 1)])
def test_ga_loss(garbage, extra):
    disc = Discriminator(6, hidden=5).double().eval()
    q_rows, k_rows = ([normal(n, 6, grad=True) for n in lengths] for lengths in (S_LENGTHS, T_LENGTHS))
    d_q, d_k = (1 / (1 + (-disc(torch.cat(rows))).exp()) for rows in (q_rows, k_rows))
    plain = -d_q.log().mean() - (1 - d_k).log().mean()
    (q, s_mask), (k, t_mask) = padded(q_rows, garbage, extra), padded(k_rows, garbage, extra)
    found, weights = ga_loss(disc, q, k, s_mask, t_mask), list(disc.parameters())
    same(found.double(), plain, 1e-6)
    same(gradients(found, weights), gradients(plain, weights), 1e-6)                   # D descends
    same(gradients(found, q_rows), tuple(-g for g in gradients(plain, q_rows)), 1e-6)  # P_Q ascends
    assert all((g == 0).all() for g in gradients(found, k_rows))                       # keys are constants
    assert (gradients(found, [q])[0][~s_mask] == 0).all()
    expected = dict(ga_q=-d_q.log().sum(), ga_k=-(1 - d_k).log().sum(), d_q=d_q.sum(), d_k=d_k.sum(),
                    accuracy_q=(d_q > 0.5).sum(), accuracy_k=(d_k < 0.5).sum())
    terms = ga_terms(disc, q, k, s_mask, t_mask)
    for name, value in expected.items():
        same(terms[name].double(), value.double(), 1e-6)
    assert ga_loss(disc, q, k, s_mask & False, t_mask & False) == 0


def test_ga_training_moves_the_queries_until_the_discriminator_errs():
    query, disc = nn.Linear(8, 6), Discriminator(6, hidden=32)
    embeddings, held_out = torch.randn(2, 4, 64, 8)
    keys, held_out_keys = (nn.Parameter(0.5 * torch.randn(4, 48, 6) + 1) for _ in range(2))
    s_mask, t_mask = torch.ones(4, 64, dtype=torch.bool), torch.ones(4, 48, dtype=torch.bool)
    before = [tensor.detach().clone() for tensor in (keys, *query.parameters())]

    def accuracy_after(optimiser, steps):
        disc.train()
        for _ in range(steps):
            optimiser.zero_grad()
            ga_loss(disc, query(embeddings), keys, s_mask, t_mask).backward()
            optimiser.step()
        disc.eval()
        with torch.no_grad():
            return ((disc(query(held_out)) > 0).float().mean() + (disc(held_out_keys) < 0).float().mean()) / 2

    assert accuracy_after(torch.optim.Adam([*disc.parameters(), keys], lr=0.01), 60) > 0.9
    assert all(torch.equal(a, b) for a, b in zip(before, (keys, *query.parameters())))
    assert accuracy_after(torch.optim.SGD([*query.parameters(), keys], lr=0.2), 60) < 0.6
    assert torch.equal(keys, before[0])


def unit_vectors(network, x):
    y = x @ network[1].weight.T + network[1].bias
    z = torch.where(y > 0, y, 0.1 * y) @ network[3].weight.T + network[3].bias
    return z / z.pow(2).sum(-1, keepdim=True).sqrt()


def slow_ct(critic, q, k):
    """Eq. (15) for one row: sums over its queries, q (n, w), and over its keys, k (m, w)."""
    dots = [[[a @ b for b in unit_vectors(network, k)] for a in unit_vectors(network, q)]
            for network in (critic.critic, critic.navigator)]
    pairs = [[(1 - c, n.exp()) for c, n in zip(*rows)] for rows in zip(*dots)]  # cost, weight
    expected = lambda line: sum(cost * weight for cost, weight in line) / sum(weight for _, weight in line)
    return sum(map(expected, pairs)) / 2, sum(map(expected, zip(*pairs))) / 2


@pytest.mark.parametrize("garbage, extra", [(0.0, 0), (NAN, 2), (1e30, 1)])
def test_ct_loss(garbage, extra):
    critic, x = Critic(6, hidden=5).double(), normal(9, 6)
    for name in ("critic", "navigator"):
        assert not torch.equal(critic(x, name), critic(x, name))  # dropout
    critic.eval()
    q_rows, k_rows = ([normal(n, 6, grad=True) for n in lengths] for lengths in (S_LENGTHS, T_LENGTHS))
    rows = [slow_ct(critic, *row) for row in zip(q_rows, k_rows)]
    to_keys, to_queries = map(sum, zip(*rows))
    plain = to_keys / sum(S_LENGTHS) + to_queries / sum(T_LENGTHS)
    (q, s_mask), (k, t_mask) = padded(q_rows, garbage, extra), padded(k_rows, -garbage, extra)
    found, up = ct_loss(critic, q, k, s_mask, t_mask), list(critic.critic.parameters())
    down = [*q_rows, *critic.navigator.parameters()]
    same_with_gradients(found, plain, down)                                  # P_Q and the navigator descend
    same(gradients(found, up), tuple(-g for g in gradients(plain, up)))      # the critic ascends
    assert all((g == 0).all() for g in gradients(found, k_rows))             # keys are constants
    assert (gradients(found, [q])[0][~s_mask] == 0).all()
    for batch in ([0, 1, 2], [2, 0], [1]):
        found = ct_terms(critic, q[batch], k[batch], s_mask[batch], t_mask[batch])
        for name, expected in zip(("ct_q", "ct_k"), zip(*(rows[b] for b in batch))):
            same_with_gradients(found[name], sum(expected), down)
    assert ct_loss(critic, q, k, s_mask & False, t_mask & False) == 0


def test_ct_training_raises_the_cost_by_the_critic_and_lowers_it_by_the_queries():
    query, critic = nn.Linear(8, 6), Critic(6, hidden=32)
    embeddings, keys = torch.randn(4, 32, 8), nn.Parameter(0.5 * torch.randn(4, 24, 6) + 1)
    masks = torch.ones(4, 32, dtype=torch.bool), torch.ones(4, 24, dtype=torch.bool)
    before = [tensor.detach().clone() for tensor in (keys, *query.parameters())]

    def cost_after(moving, steps):
        critic.train()
        optimiser = torch.optim.Adam([*moving.parameters(), keys], lr=0.01)
        for _ in range(steps):
            optimiser.zero_grad()
            ct_loss(critic, query(embeddings), keys, *masks).backward()
            optimiser.step()
        with torch.no_grad():
            return ct_loss(critic.eval(), query(embeddings), keys, *masks)

    costs = [cost_after(query, 0), cost_after(critic.critic, 40)]
    assert all(torch.equal(a, b) for a, b in zip(before, (keys, *query.parameters())))
    costs.append(cost_after(query, 40))
    assert costs[1] > costs[0] + 0.3 and costs[2] < costs[1] - 0.3 and torch.equal(keys, before[0]), costs


# ------------------------------------------------------------------------------ vocabulary products
def dense_logits(h, head):
    z = h @ head.weight.T + (0 if head.bias is None else head.bias)
    return z if head.softcap is None else head.softcap * (z / head.softcap).tanh()


def three_losses(z_1, z_2, target):
    """One of the first side, one of both sides, and a count, which has no gradient."""
    ce = -z_1.log_softmax(-1).gather(-1, target[:, None]).sum()
    return ce, (z_1 * z_2.sin()).sum(-1).pow(2).sum(), (z_1.argmax(-1) == target).sum()


def two_sides(h_1, h_2, weight, bias, softcap):
    return [(h_1, Head(weight, bias, softcap)), (h_2, Head(weight, None, softcap))]  # they share the weight


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("positions, slice_length, piece", [
    (7, 1, 1), (7, 3, 1), (67, 65, 2), (7, None, 7), (0, None, 0)])
def test_head_losses(positions, slice_length, piece, softcap):
    leaves = [normal(*shape, grad=True) for shape in ((positions, 4), (positions, 4), (6, 4), (6,))]
    limit = dict(max_logits=6 * slice_length + 5) if slice_length else {}
    target, lengths, with_graph = torch.randint(6, (positions,)), [], []

    def fn(z_1, z_2, target):
        lengths.append(len(z_1))
        with_graph.append(z_1.requires_grad)
        return three_losses(z_1, z_2, target)

    found = head_losses(fn, two_sides(*leaves, softcap), (target,), **limit)
    assert max(lengths) == piece and sum(lengths) == positions
    expected = three_losses(*(dense_logits(h, head) for h, head in two_sides(*leaves, softcap)), target)
    assert found[2] == expected[2] and not found[2].requires_grad
    for a, b in ((1, 0), (0, 1), (1.3, -0.7)):
        total, reference = a * found[0] + b * found[1], a * expected[0] + b * expected[1]
        same(total, reference)
        for _ in range(2):  # the graph is kept: the second time gives the same
            same(gradients(total, leaves), gradients(reference, leaves))
    found = head_losses(fn, two_sides(*leaves, softcap), (target,), **limit)
    total, reference, calls = 0.7 * (found[0] + found[1]), 0.7 * (expected[0] + expected[1]), len(lengths)
    same(gradients(total, leaves), gradients(reference, leaves))
    assert len(lengths) == calls  # equal weights: the forward pass has formed this gradient
    losses = lambda *x: head_losses(three_losses, two_sides(*x, softcap), (target,), **limit)[:2]
    assert positions == 0 or torch.autograd.gradcheck(losses, leaves)
    with torch.no_grad():
        same(head_losses(fn, two_sides(*leaves, softcap), (target,), **limit), expected)
    assert with_graph[0] and not with_graph[-1]  # nor are gradients formed that nobody can ask for


def test_head_losses_under_autocast():
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((7, 4), (7, 4), (6, 4), (6,))]
    sides, target = two_sides(*leaves, None), torch.randint(6, (7,))
    with torch.autocast("cpu", torch.bfloat16):
        found = head_losses(three_losses, sides, (target,), max_logits=12)[0]
    expected = three_losses(*(dense_logits(h, head) for h, head in sides), target)[0]
    same_with_gradients(found, expected, leaves, 0.05)  # bfloat16 products, float32 results


# ------------------------------------------------------------------------------ objective
TERMS = ("ce", "ce_t2s", "kd_t2s", "kd_s2t")


class Problem:
    """Three rows with the lengths of CHUNKS or S_LENGTHS twice; `leaves` are all that may get a gradient."""

    def __init__(self, bias_and_softcap=False, scale=None, d_s=4, d_t=3, V_s=5, V_t=7, t_lengths=T_LENGTHS):
        torch.manual_seed(193)  # the argmax of q^{t->s} is right at some positions, also without a chunk
        self.proj, self.scale = Projectors(d_s, d_t).double(), scale
        self.h_s = [normal(n, d_s, grad=True) for n in S_LENGTHS]
        self.h_t = [3 * normal(n, d_t) for n in t_lengths]
        self.s_in, self.s_tgt = ([torch.randint(V_s, (n,)) for n in S_LENGTHS] for _ in range(2))
        self.t_in, self.t_tgt = ([torch.randint(V_t, (n,)) for n in t_lengths] for _ in range(2))
        self.E_s, self.E_t = normal(V_s, d_s), normal(V_t, d_t)
        self.W_s, self.W_t = Head(normal(V_s, d_s, grad=True)), Head(normal(V_t, d_t))
        if bias_and_softcap:
            self.W_s = Head(self.W_s.weight, normal(V_s, grad=True), 2.0)
            self.W_t = Head(self.W_t.weight, normal(V_t), 1.5)
        self.leaves = {f"h_s.{b}": h for b, h in enumerate(self.h_s)} | dict(self.proj.named_parameters())
        self.leaves |= {name: x for name, x in zip(("W_s", "b_s"), self.W_s) if x is not None}

    def losses(self, rows=(0, 1, 2), garbage=NAN, extra=1, **options):
        take = lambda name, fill: padded([getattr(self, name)[b] for b in rows], fill, extra)
        (self.h_block, s_mask), (h_t, t_mask) = take("h_s", garbage), take("h_t", garbage)
        ids = [take(name, -100)[0] for name in ("s_in", "s_tgt", "t_in", "t_tgt")]
        tables = [self.E_s, self.E_t]
        if self.scale is not None:  # as a model's own module that scales its table
            tables = [lambda ids, E=E: self.scale * E[ids] for E in tables]
        heads = [W.weight if W.bias is None else W for W in (self.W_s, self.W_t)]
        if options.get("align", "cma") != "cma":
            options.setdefault("chunks", padded_maps([CHUNKS[b] for b in rows], True, extra))
        return dual_space_losses(self.proj, self.h_block, h_t, *ids, s_mask, t_mask, *tables, *heads,
                                 **options)

    def oracle(self, b, align="cma", div="skl", temperature=2.0, skew=0.1, correct_only=True, s2t_div="kl",
               normalise_queries=False, max_logits=None):
        """Eqs. (1)-(9) for row b."""
        linear = lambda layer, x: x @ layer.weight.T + layer.bias
        embed = lambda table, ids: table[ids[b]] * (self.scale or 1)
        e_s_tgt, e_t_tgt = embed(self.E_s, self.s_tgt), embed(self.E_t, self.t_tgt)
        h_s, h_t, dskd = self.h_s[b], self.h_t[b], align == "dskd"
        chunks = (torch.eye(len(h_s)) if dskd else CHUNKS[b]).double()
        q = linear(self.proj.query, torch.cat([embed(self.E_s, self.s_in), e_s_tgt], 1))
        q = q / q.std() if normalise_queries else q
        k = torch.cat([embed(self.E_t, self.t_in), e_t_tgt], 1)
        k = k / k.std()
        v_s2t = linear(self.proj.s2t, h_s)
        v_t2s = linear(self.proj.t2s, h_t if dskd else h_t / h_t.std() + e_t_tgt / e_t_tgt.std())
        weights = (q @ k.T / math.sqrt(k.shape[1])).exp()
        weights = {"cma": weights, "cla": weights * chunks}.get(align, chunks)
        a_t2s, a_s2t = (a / a.sum(1, keepdim=True).clamp(min=1e-99) for a in (weights, weights.T))
        W_s_const = Head(*(x.detach() if torch.is_tensor(x) else x for x in self.W_s))
        z_s, z_t2s = dense_logits(h_s, self.W_s), dense_logits(a_t2s @ v_t2s, W_s_const)
        z_t, z_s2t = dense_logits(h_t, self.W_t), dense_logits(a_s2t @ v_s2t, self.W_t)
        f = lambda name, i, z_s, z_t: slow_divergence(name, z_s[[i]], z_t[[i]].detach(), temperature, skew)[0]
        out = dict.fromkeys(TERMS, 0 * z_s.sum()) | dict(q=q, k=k, a_t2s=a_t2s, a_s2t=a_s2t, n_correct=0)
        for i, gold in enumerate(self.s_tgt[b]):
            out["ce"] = out["ce"] - z_s[i].log_softmax(0)[gold]
            if a_t2s[i].sum() > 0:  # in a chunk
                correct = z_t2s[i].argmax().item() == gold.item()
                out["n_correct"] += correct
                out["ce_t2s"] = out["ce_t2s"] - z_t2s[i].log_softmax(0)[gold]
                out["kd_t2s"] = out["kd_t2s"] + (f(div, i, z_s, z_t2s) if correct or not correct_only else 0)
        for j in range(len(h_t)):
            out["kd_s2t"] = out["kd_s2t"] + (f(s2t_div, j, z_s2t, z_t) if a_s2t[j].sum() > 0 else 0)
        return out


every_model = pytest.mark.parametrize("model", [dict(), dict(bias_and_softcap=True, scale=1.7)], ids=str)


@pytest.mark.parametrize("options", [
    dict(), dict(align="clp"), dict(align="cla"), dict(correct_only=False), dict(div="akl"),
    dict(align="cla", correct_only=False), dict(s2t_div="skl", skew=0.3), dict(temperature=1.0),
    dict(max_logits=8), dict(normalise_queries=True), dict(align="cla", normalise_queries=True),
    dict(align="dskd"), dict(align="dskd", div="kl", correct_only=False)], ids=str)
@every_model
def test_dual_space_losses(model, options):
    problem = Problem(**model, t_lengths=S_LENGTHS if options.get("align") == "dskd" else T_LENGTHS)
    leaves, rows = list(problem.leaves.values()), [problem.oracle(b, **options) for b in range(3)]
    tol = 1e-6 if options.get("align") == "clp" else 1e-10  # its maps are float32
    for batch, garbage, extra in (([0, 1, 2], 0.0, 0), ([0, 1, 2], NAN, 3), ([0, 1, 2], 1e30, 1),
                                  ([0], NAN, 1), ([1], NAN, 1), ([2], NAN, 1)):
        found, expected = problem.losses(batch, garbage, extra, **options), [rows[b] for b in batch]
        for term in TERMS:
            total = sum(row[term] for row in expected)
            same(found[term], total, tol)
            same(gradients(found[term], leaves), gradients(total, leaves), tol)
            assert gradients(found[term], [problem.h_block])[0].isfinite().all()  # under the padding too
        same_with_gradients(found["q"], padded([row["q"] for row in expected], 0, extra)[0], leaves)
        same(found["k"], padded([row["k"] for row in expected], 0, extra)[0])
        for name in ("a_t2s", "a_s2t"):
            same(found[name].double(), padded_maps([row[name] for row in expected], extra=extra), tol)
        assert found["n_correct"] == sum(row["n_correct"] for row in expected)
        assert found["n_s"] == len(torch.cat([problem.h_s[b] for b in batch]))
        assert found["n_t"] == len(torch.cat([problem.h_t[b] for b in batch]))
    assert 0 < sum(row["n_correct"] for row in rows) < sum(S_LENGTHS) - 1


@every_model
def test_gradient_routing(model):
    problem = Problem(**model)
    constants = [*problem.h_t, problem.E_s, problem.E_t, *(x for x in problem.W_t if torch.is_tensor(x))]
    for tensor in constants:
        tensor.requires_grad_()
    found = problem.losses(correct_only=False)
    moved = {term: {name.split(".")[0] for name, leaf in problem.leaves.items()
                    if (gradients(found[term], [leaf])[0] != 0).any()} for term in TERMS}
    student = {"h_s", "W_s", "b_s"} & {name.split(".")[0] for name in problem.leaves}
    assert moved == dict(ce=student, ce_t2s={"query", "t2s"}, kd_t2s=student, kd_s2t={"h_s", "query", "s2t"})
    sum(found[name].sum() for name in (*TERMS, "q", "k", "a_t2s", "a_s2t")).backward()
    assert all(tensor.grad is None for tensor in constants)


def test_dual_space_losses_reject_what_they_cannot_align():
    for options, message in ((dict(align="dtw"), "dtw"), (dict(align="clp", chunks=None), "chunks"),
                             (dict(align="dskd"), "lengths")):
        with pytest.raises(ValueError, match=message):
            Problem().losses(**options)


# ------------------------------------------------------------------------------ baselines
def slow_uld(z_s, z_t):
    """One position: z_s (V_s,), z_t (V_t,)."""
    sides = [sorted(z.exp() / z.exp().sum(), key=lambda x: -x.item()) for z in (z_s, z_t)]
    return sum(abs(a - b) for a, b in itertools.zip_longest(*sides, fillvalue=0.0))


@pytest.mark.parametrize("V_s, V_t", [(5, 9), (9, 5), (7, 7)])
def test_uld_loss(V_s, V_t):
    z_s, z_t = normal(2, 3, V_s, grad=True), (3 * normal(2, 3, V_t)).requires_grad_()
    slow = lambda *sides: torch.stack([torch.stack(list(map(slow_uld, *rows))) for rows in zip(*sides)])
    same_with_gradients(uld_loss(z_s, z_t), slow(z_s, z_t), [z_s, z_t])
    half = z_s.bfloat16(), z_t.bfloat16()
    same(uld_loss(*half), slow(*(z.double() for z in half)).float(), 1e-5)
    same(uld_loss(z_s, torch.cat([z_s, torch.full_like(z_s, -INF)], -1)), torch.zeros(2, 3).double())


def slow_mined(z_t, vocabulary, gold, matched, size, tau):
    """One position's target distribution; z_t (V_t,)."""
    p = torch.zeros(size, dtype=torch.float64)
    for v, z in zip(vocabulary, z_t):
        if matched and v >= 0:
            p[v] += (z / tau).exp()
    return p / p.sum() if p.sum() > 0 else torch.eye(size, dtype=torch.float64)[gold]


MAP = torch.tensor([0, 3, -1, 3, 1, -1, 3])  # onto some of 5 ids


@pytest.mark.parametrize("vocabulary", [MAP, MAP.clamp(max=-1), MAP.clamp(min=2)])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_mined_targets(vocabulary, tau):
    z_t, gold, matched = 3 * normal(6, 7), torch.tensor([0, 4, 2, 3, 3, 1]), bools("110110")[0]
    z_t[1, MAP >= 0] = z_t[3, 3:] = -INF  # what is mapped has no mass at all, or has some
    for dtype, tol in ((torch.float64, 1e-10), (torch.bfloat16, 1e-5)):
        z, z_s = z_t.to(dtype), normal(6, 5).to(dtype).requires_grad_()
        found, expected = mined_targets(z, vocabulary, gold, matched, 5, tau), torch.stack([
            slow_mined(*row, 5, tau) for row in zip(z.double(), [vocabulary] * 6, gold, matched)])
        same((found / tau).softmax(-1).double(), expected, tol)
        loss, log_q = divergence("kl", z_s, found, tau), (z_s.double() / tau).log_softmax(-1)
        same(loss.double(), (expected * (expected.clamp(min=1e-99).log() - log_q)).sum(-1), tol)
        assert gradients(loss.sum(), [z_s])[0].isfinite().all()


MATCHES = [bools("100", "000", "010", "001"), bools("00010", "00000"), bools("0", "0", "1", "0", "0")]


def slow_baseline(problem, b, method, div="skl", temperature=2.0, skew=0.1, max_logits=None):
    """The sums over row b's positions."""
    ce, kd = 0, 0
    z_s, z_t = dense_logits(problem.h_s[b], problem.W_s), dense_logits(problem.h_t[b], problem.W_t)
    for i, gold in enumerate(problem.s_tgt[b]):
        ce = ce - z_s[i].log_softmax(0)[gold]
        if method == "kd":
            kd = kd + slow_divergence(div, z_s[[i]], z_t[[i]], temperature, skew)[0]
        if method == "uld" and i < len(z_t):
            kd = kd + slow_uld(z_s[i], z_t[i])
        if method == "mined":
            z, log_q = z_t[MATCHES[b][i].long().argmax()], (z_s[i] / temperature).log_softmax(0)
            p = slow_mined(z, MAP, gold, MATCHES[b][i].any(), 5, temperature)
            kd = kd + sum(p[v] * (p[v].log() - log_q[v]) for v in range(5) if p[v] > 0)
    return ce, kd


@pytest.mark.parametrize("options", [
    dict(method="kd"), dict(method="kd", div="srkl", skew=0.3, temperature=1.0, max_logits=8),
    dict(method="uld"), dict(method="uld", max_logits=8),
    dict(method="mined"), dict(method="mined", temperature=1.0, max_logits=8)], ids=str)
@every_model
def test_baseline_losses(model, options):
    kd, mined = (options["method"] == method for method in ("kd", "mined"))
    problem = Problem(**model, V_t=5 if kd else 7)
    problem.h_t = [(3 * normal(n, 3)).requires_grad_() for n in (S_LENGTHS if kd else T_LENGTHS)]
    leaves, constants = ([*h, *(x.requires_grad_() for x in W if torch.is_tensor(x))] for h, W in (
        (problem.h_s, problem.W_s), (problem.h_t, problem.W_t)))
    rows = [slow_baseline(problem, b, **options) for b in range(3)]
    for batch, garbage, extra in (([0, 1, 2], 0.0, 0), ([0, 1, 2], NAN, 3), ([2, 0], 1e30, 1), ([1], NAN, 1)):
        take = lambda name, fill: padded([getattr(problem, name)[b] for b in batch], fill, extra)
        (h_s, s_mask), (h_t, t_mask) = take("h_s", garbage), take("h_t", -garbage)
        chunks = padded_maps([MATCHES[b] for b in batch], True, extra) if mined else None
        heads = [W.weight if W.bias is None else W for W in (problem.W_s, problem.W_t)]
        found = baseline_losses(
            h_s=h_s, h_t=h_t, s_tgt=take("s_tgt", -100)[0], s_mask=s_mask, t_mask=t_mask, W_s=heads[0],
            W_t=heads[1], chunks=chunks, vocabulary=MAP, **options)
        for term, expected in zip(("ce", "kd"), (sum(terms) for terms in zip(*(rows[b] for b in batch)))):
            same(found[term], expected)
            same(gradients(found[term], leaves), gradients(expected, leaves))
            assert all((g == 0).all() for g in gradients(found[term], constants))
            assert (gradients(found[term], [h_s])[0][~s_mask] == 0).all()


def test_baseline_losses_reject_what_they_cannot_pair():
    h, target, mask = normal(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), bools("111", "110")
    for method, t_mask in (("rkd", mask), ("kd", mask[:, :2])):
        with pytest.raises(ValueError, match=f"found {method}, expected kd of equal lengths"):
            baseline_losses(method, h, h, target, mask, t_mask, normal(5, 4), normal(5, 4))


# ------------------------------------------------------------------------------ data
def write_lines(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def test_rows_take_their_prompt_or_the_template(tmp_path):
    path = write_lines(
        tmp_path / "rows.jsonl",
        '{"prompt": "P", "instruction": "I", "output": "a"}',
        '{"instruction": "I", "input": "", "output": ["a", "b"]}',
        '{"instruction": "I", "input": "C", "output": "a"}',
    )
    rows = dskd_ga.read_rows(path)
    assert rows[0] == ("P", ["a"])
    assert rows[1] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nI\n\n### Response:\n",
        ["a", "b"],
    )
    assert rows[2].prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nI\n\n"
        "### Input:\nC\n\n### Response:\n"
    )
    assert dskd_ga.read_rows(path, limit=2) == rows[:2]


@pytest.mark.parametrize(
    "line, named",
    [
        ('{"prompt": "P", "output": "a"', "line 2"),
        (b'{"prompt": "P", "output": "\xff"}', "line 2"),
        ("[" * 100000, "line 2"),
        ("", "line 2"),
        ('{"prompt": "P\\ud800", "output": "a"}', "line 2, prompt"),
        ('{"instruction": "I", "input": "\\udc00", "output": "a"}', "line 2, input"),
        ('{"prompt": "P", "output": "\\ud83d"}', "line 2, output"),
        ('{"prompt": "P", "output": ""}', "line 2, output"),
        ('{"prompt": "P", "output": ["a", ""]}', "line 2, output"),
        ("[1]", "line 2, JSON"),
        ('{"output": "a"}', "line 2, instruction"),
        ('{"prompt": "", "output": "a"}', "line 2, prompt"),
        ('{"prompt": 3, "output": "a"}', "line 2, prompt"),
        ('{"instruction": "I", "input": 3, "output": "a"}', "line 2, input"),
        ('{"prompt": "P"}', "line 2, output"),
        ('{"prompt": "P", "output": []}', "line 2, output"),
        ('{"prompt": "P", "output": ["a", 1]}', "line 2, output"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, named):
    path, line = tmp_path / "rows.jsonl", line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"prompt": "P", "output": "a"}\n' + line + b"\n")
    with pytest.raises(dskd_ga.InputError, match=f"{path}, {named}") as caught:
        dskd_ga.read_rows(path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_rows_with_odd_bytes_are_read_as_they_are(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = ["😀\0\u200f\u05d0", "x" * 2 ** 20, "\u2028 \r\n"]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(
        dict(prompt=text, output=text), ensure_ascii=i % 2 == 0).encode() for i, text in enumerate(texts)))
    assert dskd_ga.read_rows(path) == [(text, [text]) for text in texts]
    assert dskd_ga.read_rows(path)[0].references[0].encode()  # "\\ud83d\\ude00" in JSON is one character


def test_data_files_come_from_disk_or_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(dskd_ga, "hf_hub_download", lambda *args, **options: (args, options))
    monkeypatch.chdir(tmp_path)
    file, asked = "ORG/set/11_/valid.jsonl", (("ORG/set", "11_/valid.jsonl"), dict(repo_type="dataset"))
    assert dskd_ga.fetch(file) == asked
    (tmp_path / "ORG/set/11_").mkdir(parents=True)  # a local folder goes before the hub
    assert dskd_ga.fetch(file) == file
    with pytest.raises(OSError, match="valid.jsonl"):
        dskd_ga.read_rows(file)


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """The demo's rows, tokenizers and untrained models."""
    folder = tmp_path_factory.mktemp("case")
    dskd_ga.write_demo(folder, 3)
    return folder


fuzzed = lambda examples: hypothesis.settings(
    max_examples=examples, deadline=None, database=None, derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow])
texts = st.one_of(st.text(max_size=30), st.text("a é\u0301😀你\u200f\u05d0\u0000\u2028\r\n0", max_size=30))
values = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.sampled_from(
    ["\ud800", "a\udfffb", "\ufeff"])), lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=2)), max_leaves=4)
objects = st.one_of(values, st.fixed_dictionaries({}, optional=dict(
    prompt=st.one_of(texts, values), instruction=st.one_of(texts, values), input=st.one_of(texts, values),
    output=st.one_of(texts, values, st.lists(texts, max_size=3)))))


@st.composite
def json_lines(draw):
    """Lines of bytes: JSON, some of it with bytes replaced, and now and then anything."""
    lines = []
    for value in draw(st.lists(objects, min_size=1, max_size=3)):
        line = bytearray(json.dumps(value, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass"))
        if line and draw(st.integers(0, 3)) == 0:
            start = draw(st.integers(0, len(line) - 1))
            line[start:start + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
        lines.append(bytes(line).replace(b"\n", b" "))
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + draw(st.sampled_from([b"\n", b"\r\n"])).join(lines)


def plain_row(line):
    """(prompt, references) of a line of bytes, or an exception of any kind if it is no row."""
    value = json.loads(line.decode("utf-8-sig"))
    prompt, output, context = value.get("prompt"), value["output"], value.get("input", "")
    if "prompt" not in value:
        prompt = value["instruction"]
        whole = dskd_ga.alpaca_prompt(prompt, context)
    references = output if isinstance(output, list) else [output]
    for text in (prompt, *references, context or "-"):
        assert isinstance(text, str) and text and references and isinstance(context, str)
        text.encode()  # fails for half a surrogate pair
    return (prompt if "prompt" in value else whole), references


@fuzzed(3000)
@hypothesis.given(json_lines())
def test_lines_of_any_bytes_are_read_or_named(tmp_path, content):
    path, expected, broken = tmp_path / "rows.jsonl", [], None
    path.write_bytes(content)
    for number, line in enumerate(content.split(b"\n"), 1):
        if line or number == 1:
            try:
                expected.append(plain_row(line))
            except Exception:
                broken = number
                break
    if broken is None:
        assert dskd_ga.read_rows(path) == expected
    else:
        with pytest.raises(dskd_ga.InputError, match=f"rows.jsonl, line {broken}[,:]") as caught:
            dskd_ga.read_rows(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.fixture(scope="session")
def pair(case):
    return [dskd_ga.load_tokenizer(str(case / name)) for name in ("student", "teacher")]


@fuzzed(1000)
@hypothesis.given(texts.filter(bool), texts.filter(bool), st.integers(1, 60))
def test_any_text_is_cut_into_tokens_and_chunks_of_itself(pair, prompt, output, max_length):
    normal = functools.partial(unicodedata.normalize, "NFC")  # as the teacher's tokenizer, Qwen2's, does
    sides, keep = dskd_ga.training_data([dskd_ga.Row(prompt, [output])], pair, 50, max_length)
    for tokenizer, (example,) in zip(pair, sides if keep else ()):
        assert len(example.ids) <= max_length
        assert normal(tokenizer.decode(example.ids[:example.start])) == normal(prompt)
        response = example.ids[example.start:]
        ended = response[-1] == tokenizer.eos_token_id
        text, whole = normal(tokenizer.decode(response[:-1] if ended else response)), normal(output)
        assert text == whole if ended else whole.startswith(text)
        assert len(example.spans) == len(example.chunk) == len(response)
        assert example.chunk == sorted(example.chunk, key=lambda number: (number < 0, number))
    if keep:
        extents = []
        for (example,) in sides:
            spans = {}
            for (start, end), number in zip(example.spans, example.chunk):
                old = spans.get(number, (start, end))
                spans[number] = min(start, old[0]), max(end, old[1])
            extents.append(spans)
        for number in extents[0].keys() & extents[1].keys():  # both sides read the same text there
            assert extents[0][number] == extents[1][number]


def test_examples_hold_the_text_and_end_in_end_of_text(case):
    tokenizers = [dskd_ga.load_tokenizer(str(case / name)) for name in ("student", "teacher")]
    rows = dskd_ga.read_rows(str(case / "seen.jsonl"), 30) + [
        dskd_ga.Row("P: é\n", ["naïve 😀 12 你好", "other"])
    ]
    for tokenizer in tokenizers:
        for row, example in zip(rows, dskd_ga.encode(tokenizer, rows, 512), strict=True):
            text, response = row.references[0], example.ids[example.start :]
            assert tokenizer.decode(example.ids) == row.prompt + text + "<|endoftext|>"
            assert len(response) == len(example.spans) and example.spans[-1] == (-1, -1)
            cuts = [
                end
                for (_, end), (start, _) in zip(example.spans, example.spans[1:])
                if start >= end or start < 0
            ]
            assert "".join(text[a:b] for a, b in zip([0, *cuts], cuts)) == text
    lengths = [[len(e.ids) for e in dskd_ga.encode(tokenizer, rows, 512)] for tokenizer in tokenizers]
    assert lengths[0] != lengths[1]
    cut = dskd_ga.encode(tokenizers[0], rows[:1], lengths[0][0] - 2)[0]
    assert len(cut.spans) == len(cut.ids) - cut.start and cut.spans[-1] != (-1, -1)
    sides, kept = dskd_ga.training_data(rows, tokenizers, 512, cut.start)
    assert [len(side) for side in sides] == [len(kept)] * 2 and 0 < len(kept) < len(rows)
    assert [tokenizers[0].decode(e.ids[:e.start]) for e in sides[0]] == [rows[i].prompt for i in kept]
    assert all(example.spans for side in sides for example in side)


def spans_as_text(spans):
    return " ".join("$" if span == (-1, -1) else f"{span[0]}{span[1]}" for span in spans)


def byte_level(*merges, normalizer=None):
    """A byte-level tokenizer with these merges, written as the bytes' printable stand-ins."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(merge.split()) for merge in merges]
    vocabulary = ["<|endoftext|>", *alphabet, *("".join(pair) for pair in pairs)]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(vocabulary)}, pairs))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if normalizer:
        bpe.normalizer = normalizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


PLAIN, NFC = byte_level(), byte_level(normalizer=tokenizers.normalizers.NFC())


@pytest.mark.parametrize("text, tokenizer, limit, spans", [
    ("a b", PLAIN, 99, "01 12 23 $"),
    ("é!", PLAIN, 99, "01 01 12 $"),                            # two bytes of one character
    ("😀", PLAIN, 99, "01 01 01 01 $"),
    ("你a", PLAIN, 99, "01 01 01 12 $"),
    ("e\u0301!", PLAIN, 99, "02 12 12 23 $"),                  # a combining mark belongs to its letter
    ("e\u0301!", NFC, 99, "02 02 23 $"),                       # also where the tokenizer joins the two
    ("e\u0301\u0323!", PLAIN, 99, "03 13 13 23 23 34 $"),
    ("", PLAIN, 99, "$"),
    ("a", PLAIN, 99, "01 $"),
    ("abc", PLAIN, 3, "01 12 23"),                              # truncated before the end of text
    ("a😀b", PLAIN, 3, "01"),                                   # never inside a character
    ("a😀b", PLAIN, 5, "01 12 12 12 12"),
    ("ae\u0301b", PLAIN, 3, "01"),
    ("😀", PLAIN, 2, ""),
    ("a", PLAIN, 0, "")])
def test_spans_of_response_tokens(text, tokenizer, limit, spans):
    example = dskd_ga.encode(tokenizer, [dskd_ga.Row("P", [text])], limit + 1)[0]
    assert spans_as_text(example.spans) == spans
    assert example.start == 1 and len(example.ids) == 1 + len(example.spans) == 1 + len(example.chunk)


@pytest.mark.parametrize("text, s, t, limit, s_chunk, t_chunk", [
    # tokens ab, three bytes of 😀, its last byte, c against single bytes
    ("ab😀c", byte_level("ð Ł", "ðŁ ĺ", "a b"), PLAIN, 99, [0, 1, 1, 2, 3], [0, 0, 1, 1, 1, 1, 2, 3]),
    # é as two bytes against a letter and a mark of two bytes
    ("e\u0301x", NFC, PLAIN, 99, [0, 0, 1, 2], [0, 0, 0, 1, 2]),
    ("", PLAIN, NFC, 99, [0], [0]),
    ("abcd", PLAIN, byte_level("a b"), 2, [0, 0], [0, -2]),  # truncated to two tokens: what only one side has
    ("abcd", PLAIN, byte_level("a b"), 3, [0, 0, 1], [0, 1, -2]),
    ("abcd", PLAIN, byte_level("a b", "c d"), 3, [0, 0, -1], [0, -2, 1]),
    ("a😀", PLAIN, byte_level("a ð"), 4, [-1], [-2] * 4)])   # a and the first of four bytes are one token
def test_rows_are_cut_into_chunks(text, s, t, limit, s_chunk, t_chunk):
    sides, _ = dskd_ga.training_data([dskd_ga.Row("P", [text])], (s, t), 9, limit + 1)
    assert [side[0].chunk for side in sides] == [s_chunk, t_chunk]
    batch = [dskd_ga.collate(side * 2, 0, torch.device("cpu")) for side in sides]
    expected = torch.tensor(s_chunk)[:, None] == torch.tensor(t_chunk)
    assert torch.equal(dskd_ga.chunks_of(*batch), torch.stack([expected] * 2))


def test_prompts_get_what_their_tokenizer_puts_in_front(case):
    tokenizer = dskd_ga.load_tokenizer(str(case / "student"))
    assert dskd_ga.leading_tokens(tokenizer) == []
    tokenizer._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    assert dskd_ga.leading_tokens(tokenizer) == [0]
    example = dskd_ga.encode(tokenizer, [dskd_ga.Row("P", ["a"])], 512)[0]
    assert example.ids == [
        0,
        *tokenizer.encode("P", add_special_tokens=False),
        *tokenizer.encode("a", add_special_tokens=False),
        0,
    ]


def test_an_epoch_is_a_partition_into_sorted_steps():
    lengths = random.Random(0).choices(range(5, 90), k=103)
    plan = dskd_ga.plan_epoch(lengths, 8, 2, seed=1, epoch=0)
    steps = [[i for micro_batch in step for i in micro_batch] for step in plan]
    assert len(plan) == 12 and all(len(micro_batch) == 2 for step in plan for micro_batch in step)
    assert len({i for step in steps for i in step}) == 96
    assert all([lengths[i] for i in step] == sorted(lengths[i] for i in step) for step in steps)
    assert plan == dskd_ga.plan_epoch(lengths, 8, 2, 1, 0) != dskd_ga.plan_epoch(lengths, 8, 2, 1, 1)
    coarse = dskd_ga.plan_epoch(lengths, 8, 8, 1, 0)
    assert [sorted(step[0]) for step in coarse] == [sorted(step) for step in steps]


def test_a_batch_reads_and_predicts_the_right_tokens():
    examples = [
        dskd_ga.Example([1, 2, 3, 4, 5], 2, [(0, 1), (1, 2), (-1, -1)], [0, 1, 2]),
        dskd_ga.Example([6, 7, 8], 1, [(0, 1)] * 2, [0, -1]),
    ]
    side = dskd_ga.collate(examples, 99, torch.device("cpu"))
    assert side.ids.tolist() == [[1, 2, 3, 4], [6, 7, 8, 99]]
    assert side.mask.tolist() == [[True] * 3, [True, True, False]]
    assert side.pos[0].tolist() == [1, 2, 3] and side.pos[1, :2].tolist() == [0, 1]
    assert side.inputs[0].tolist() == [2, 3, 4] and side.inputs[1, :2].tolist() == [6, 7]
    assert side.targets[0].tolist() == [3, 4, 5] and side.targets[1, :2].tolist() == [7, 8]
    assert side.chunk[0].tolist() == [0, 1, 2] and side.chunk[1, :2].tolist() == [0, -1]


# ------------------------------------------------------------------------------ models
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=60)
FAMILIES = dict(
    gpt2=lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60),
    llama=lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    qwen2=lambda: transformers.Qwen2Config(**SMALL, num_key_value_heads=1, tie_word_embeddings=True),
    gemma3=lambda: transformers.Gemma3TextConfig(
        **SMALL, num_key_value_heads=1, head_dim=16, final_logit_softcapping=1.0, sliding_window=8
    ),
    neox=lambda: transformers.GPTNeoXConfig(**SMALL),
    phi=lambda: transformers.PhiConfig(**SMALL),
)


def make_model(config):
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # a bias that is zero, or a head like its embeddings, would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_trunk_and_head_give_the_models_own_logits(family):
    model = make_model(FAMILIES[family]())
    examples = [
        dskd_ga.Example(torch.randint(1, 60, (n,)).tolist(), start, [(0, 0)] * (n - start), [0] * (n - start))
        for n, start in ((12, 5), (7, 1), (20, 18))
    ]
    side = dskd_ga.collate(examples, 0, torch.device("cpu"))
    with torch.no_grad():
        logits = dskd_ga.head_of(model)(dskd_ga.response_hidden(model, side))
        for row, example, mask in zip(logits, examples, side.mask):
            own = model(input_ids=torch.tensor([example.ids])).logits[0, example.start - 1 : -1]
            same(row[mask], own, 1e-4)
    assert family != "gemma3" or own.abs().max() <= 1
    assert family != "phi" or dskd_ga.head_of(model).bias is not None


def test_embeddings_are_those_that_enter_the_model():
    model, ids = make_model(FAMILIES["gemma3"]()), torch.arange(9)[None]
    first = model.get_decoder()(input_ids=ids, output_hidden_states=True).hidden_states[0]
    same(model.get_input_embeddings()(ids), first, 1e-6)
    assert not torch.allclose(model.get_input_embeddings().weight[ids], first)  # Gemma scales its table


def test_models_that_would_be_wrong_are_refused(case, tmp_path):
    tokenizer, cpu = dskd_ga.load_tokenizer(str(case / "teacher")), torch.device("cpu")
    small = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(dskd_ga.InputError, match=f"found 60 embeddings, expected {len(tokenizer)}"):
        dskd_ga.load_model(str(tmp_path / "small"), tokenizer, cpu)
    weights = safetensors.torch.load_file(case / "teacher" / "model.safetensors")
    whole = shutil.copytree(case / "teacher", tmp_path / "lacking")
    safetensors.torch.save_file({name: w for name, w in weights.items() if "layers.1.mlp" not in name},
                                whole / "model.safetensors", dict(format="pt"))
    with pytest.raises(dskd_ga.InputError, match="lacking: found no .*layers.1.mlp"):
        dskd_ga.load_model(str(whole), tokenizer, cpu)
    (whole / "model.safetensors").write_bytes((case / "teacher" / "model.safetensors").read_bytes()[:-99])
    with pytest.raises(dskd_ga.InputError, match="lacking: found .*incomplete"):
        dskd_ga.load_model(str(whole), tokenizer, cpu)
    (whole / "model.safetensors").unlink()
    torch.save(weights, whole / "pytorch_model.bin")  # a pickle of strangers is not read
    for source in (str(whole), str(tmp_path), "no-such-folder"):
        with pytest.raises(dskd_ga.InputError, match=f"{source}: found .*, expected what AutoModelForCausalLM|{source}: found .* AutoConfig"):
            dskd_ga.load_model(source, tokenizer, cpu)
    scaled = make_model(transformers.CohereConfig(**SMALL | dict(vocab_size=len(tokenizer)), logit_scale=0.5))
    scaled.save_pretrained(tmp_path / "scaled")
    with pytest.raises(dskd_ga.InputError, match="logits .* away from those of trunk and head"):
        dskd_ga.load_model(str(tmp_path / "scaled"), tokenizer, cpu)
    padded = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(
            n_embd=32, n_layer=1, n_head=2, vocab_size=len(tokenizer) + 30, bos_token_id=0, eos_token_id=0
        )
    )
    padded.save_pretrained(tmp_path / "padded")
    model = dskd_ga.load_model(str(tmp_path / "padded"), tokenizer, cpu, dropout=0.25)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.25}


# ------------------------------------------------------------------------------ training
def flags(case, out, **settings):
    """A short run on the demo's case; settings override."""
    base = dict(
        student=case / "student",
        teacher=case / "teacher",
        data=case,
        dev_rows=8,
        batch_size=8,
        micro_batch=4,
        tests=[f"seen={case}/seen.jsonl", f"longer={case}/longer.jsonl"],
        eval_limit=12,
        eval_tokens=300,
        eval_seeds=[1, 2],
        max_new_tokens=6,
        epochs=0.01,
        dropout=0.0,
        log_every=3,
        out=out,
    )
    found = []
    for name, value in (base | settings).items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        found += [f"--{name.replace('_', '-')}", *map(str, values)]
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run(case, out, processes=1, nodes=1, **settings):
    """The script on one process here, or by torchrun on several, of each of several nodes; returns the folder
    of its run."""
    arguments = flags(case, out, **settings)
    if processes * nodes == 1:
        dskd_ga.main(arguments)
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        launch += [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
        agents = [subprocess.Popen([*launch, dskd_ga.__file__, *arguments],
                                   env=os.environ | dict(OMP_NUM_THREADS="1")) for _ in range(nodes)]
        assert [agent.wait(timeout=300) for agent in agents] == [0] * nodes
    return next(path.parent for path in out.glob("*/eval.json"))


def two_processes(commands):
    """Two processes with the command lines one after the other, each with a meeting point of its own."""
    port = free_port()
    code = ("import json, os, sys, dskd_ga\n"
            "for n, command in enumerate(json.loads(sys.argv[1])):\n"
            "    os.environ['MASTER_PORT'] = str(int(sys.argv[2]) + n)\n"
            "    dskd_ga.main(command)")
    here = str(pathlib.Path(dskd_ga.__file__).parent)
    return [subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(commands), str(port)], env=os.environ | dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", OMP_NUM_THREADS="1",
            PYTHONPATH=here)) for rank in range(2)]


def log(folder):
    """The lines of optimiser steps, without what depends on the machine."""
    lines = [json.loads(line) for line in open(folder / "log.jsonl")]
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_s", "memory_gb", "padding")} for line in lines
    ]


@pytest.fixture(scope="session")
def reference_run(case, tmp_path_factory):
    return run(case, tmp_path_factory.mktemp("reference"), ga=True, teacher_ready=True)


@pytest.mark.parametrize("nodes, processes, micro_batch", [
    (1, 1, 8), (1, 1, 1), (1, 2, 4), (1, 4, 2), (2, 1, 4), (2, 2, 2)])
def test_the_cut_into_micro_batches_processes_and_nodes_changes_nothing(
    case, reference_run, tmp_path, nodes, processes, micro_batch
):
    folder = run(case, tmp_path, processes, nodes, micro_batch=micro_batch, ga=True, teacher_ready=True)
    expected, found = log(reference_run), log(folder)
    assert len(expected) == len(found) and [line["step"] for line in found if "loss" in line] == [
        1,
        2,
        3,
        4,
        5,
    ]
    for a, b in zip(expected, found):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    for name in ("predictions/seen-1.jsonl", "predictions/longer-2.jsonl"):
        assert (reference_run / name).read_text() == (folder / name).read_text()
    a, b = (json.loads((run_folder / "eval.json").read_text()) for run_folder in (reference_run, folder))
    assert a["alignment"] == pytest.approx(b["alignment"], rel=1e-4, abs=1e-4)
    same_keys = ("settings", "rougeL", "exact_match", "rows", "run", "seed")
    assert {key: a[key] for key in same_keys} == {key: b[key] for key in same_keys}


def test_a_run_writes_what_a_user_needs(case, reference_run):
    first = [line for line in log(reference_run) if "loss" in line][0]
    terms = (
        "ce",
        "ce_t2s",
        "kd_t2s",
        "kd_s2t",
        "ga_q",
        "ga_k",
        "d_q",
        "d_k",
        "accuracy_q",
        "accuracy_k",
        "grad_norm",
        "lr",
    )
    assert set(terms) < set(first)
    assert first["loss"] == pytest.approx(
        0.5 * sum(first[n] for n in terms[:4]) + first["ga_q"] + first["ga_k"], rel=1e-5
    )
    assert first["lr"] == 5e-4 and math.log(420) == pytest.approx(
        first["ce"], rel=0.05
    )  # an untrained student's
    assert json.loads((reference_run / "args.json").read_text())["finished"]
    student = transformers.AutoModelForCausalLM.from_pretrained(reference_run / "best")
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference_run / "best")
    assert len(tokenizer) == student.config.vocab_size
    scores = json.loads((reference_run / "eval.json").read_text())["rougeL"]
    assert list(scores) == ["seen", "longer", "OOD", "All"] and all(
        len(values) == 2 for values in scores.values()
    )
    args, model = dskd_ga.parse(flags(case, "unused")), student.eval()
    for name in ("seen", "longer"):
        rows = [json.loads(line) for line in open(reference_run / "predictions" / f"{name}-1.jsonl")]
        prompts, references, texts = zip(*(row.values() for row in rows))
        tested = dskd_ga.read_rows(case / f"{name}.jsonl", 12)
        assert list(zip(prompts, references)) == tested
        assert list(texts) == dskd_ga.generate(model, tokenizer, tested, 1, args, 6)[0]
        assert rouge_l(texts, references)["rougeL"] == scores[name][0]


def test_a_checkpoint_alone_is_evaluated_as_in_its_run(case, reference_run, tmp_path):
    folder = run(case, tmp_path, eval_only=reference_run / "best", eval_seeds=[2, 1])
    found, expected = (json.loads((f / "eval.json").read_text())["rougeL"] for f in (folder, reference_run))
    assert found == {name: values[::-1] for name, values in expected.items()}
    assert not (folder / "log.jsonl").exists()


def test_a_stopped_run_goes_on_to_the_same_weights(case, tmp_path, monkeypatch):
    settings = dict(ga=True, teacher_ready=True, save_every=2, log_every=1, dropout=0.2)
    whole = run(case, tmp_path / "whole", **settings)
    backward_passes = dskd_ga.backward_passes

    def stop_at_step_4(model, teacher, data, pads, micro_batches, step, *rest):
        if step == 4:  # after step 3 was logged, but not saved
            raise KeyboardInterrupt
        return backward_passes(model, teacher, data, pads, micro_batches, step, *rest)

    monkeypatch.setattr(dskd_ga, "backward_passes", stop_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        run(case, tmp_path / "stopped", **settings)
    monkeypatch.undo()
    resumed = run(case, tmp_path / "stopped", **settings)
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (whole, resumed)]
    assert states[0]["step"] == states[1]["step"] == 5 and states[0]["best"] == states[1]["best"]
    assert all(torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items())
    assert log(whole) == log(resumed)
    with pytest.raises(dskd_ga.InputError, match="lr was 0.0005, is 0.001"):
        run(case, tmp_path / "stopped", **settings | dict(lr=1e-3))


def forked(command, patience, number=signal.SIGKILL):
    """Runs the command line in a copy of this process, sends it the signal after so many seconds and returns
    its exit status, or the negative number of the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            dskd_ga.main(command)
            status = 0
        except dskd_ga.Stopped as stopped:
            status = 128 + stopped.args[0]
        finally:
            os._exit(status)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.01)
    try:
        os.kill(pid, number)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except (ProcessLookupError, ChildProcessError):
        return 0


def same_end(whole, other):
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (whole, other)]
    assert states[0]["step"] == states[1]["step"] and states[0]["best"] == states[1]["best"]
    assert all(torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items())
    assert log(whole) == log(other)
    for name in ("best/model.safetensors", "eval.json"):
        a, b = ((folder / name).read_bytes().replace(str(folder).encode(), b"") for folder in (whole, other))
        assert a == b


@pytest.mark.parametrize("settings", [dict(ga=True, dropout=0.2)], ids=str)
def test_a_run_killed_at_random_moments_ends_in_the_same_weights(case, tmp_path, settings):
    settings |= dict(teacher_ready=True, save_every=2, log_every=1, epochs=0.04, eval_limit=2, eval_seeds=[1])
    start = time.monotonic()
    whole, rng = run(case, tmp_path / "whole", **settings), random.Random(0)
    seconds = time.monotonic() - start
    kills = 0
    for _ in range(100):
        status = forked(flags(case, tmp_path / "killed", **settings), rng.uniform(0.1, 1.2) * seconds / 2)
        kills += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL)
        if kills == 20:
            break
    same_end(whole, run(case, tmp_path / "killed", **settings))
    assert kills == 20


def test_when_one_of_two_processes_is_killed_the_other_ends_and_the_run_goes_on(case, tmp_path):
    settings = dict(method="sft", save_every=2, log_every=1, epochs=0.1, eval_limit=2, eval_seeds=[1])
    folders = [tmp_path / name / "sft-10" for name in ("whole", "killed")]
    commands = [flags(case, folder.parent, **settings) for folder in folders]
    assert [process.wait(timeout=300) for process in two_processes(commands[:1])] == [0, 0]
    for victim, step in ((1, 5), (0, 20)):
        pair, log_path = two_processes(commands[1:]), folders[1] / "log.jsonl"
        while not log_path.exists() or f'"step": {step},' not in log_path.read_text():
            assert [process.poll() for process in pair] == [None, None]
            time.sleep(0.05)
        pair[victim].kill()
        assert pair[1 - victim].wait(timeout=120) != 0
    assert [process.wait(timeout=300) for process in two_processes(commands[1:])] == [0, 0]
    same_end(*folders)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step(case, tmp_path, number):
    settings = dict(method="sft", save_every=1000, log_every=1000, epochs=0.2, eval_limit=2, eval_seeds=[1])
    whole = run(case, tmp_path / "whole", **settings)
    status, tries = 0, 0
    while status != 128 + number and tries < 20:  # before training, the signal ends it at once
        tries += 1
        status = forked(flags(case, tmp_path / "stopped", fresh=True, **settings), 1 + 0.2 * tries, number)
    folder = tmp_path / "stopped" / "sft-10"
    state = torch.load(folder / "state.pt", weights_only=True)
    assert status == 128 + number and 0 < state["step"] < 100
    assert [line["step"] for line in log(folder)][-1] == state["step"]
    run(case, tmp_path / "stopped", **settings)
    same_end(whole, folder)


def test_a_term_that_is_not_finite_ends_the_run_and_leaves_the_weights(case, tmp_path, monkeypatch):
    settings = dict(method="sft", log_every=2, epochs=0.02, eval_limit=2, eval_seeds=[1])
    backward_passes = dskd_ga.backward_passes

    def broken(model, teacher, data, pads, micro_batches, step, *rest):
        result = backward_passes(model, teacher, data, pads, micro_batches, step, *rest)
        if step == 3:
            next(model.parameters()).grad[0, 0] = NAN
            rows.append(sorted(i for rows in micro_batches for i in rows))
        return result

    rows = []
    monkeypatch.setattr(dskd_ga, "backward_passes", broken)
    with pytest.raises(FloatingPointError, match="step 3: found grad_norm not finite, of lines") as caught:
        run(case, tmp_path, **settings)
    lines = json.loads(re.search(r"of lines (\[.*?\])", str(caught.value))[1])
    texts = [dskd_ga.read_rows(case / "raw.jsonl")[line - 1].prompt for line in lines]
    data = dskd_ga.read_rows(case / "raw.jsonl")[8:]
    assert texts == [data[i].prompt for i in rows[0]]  # no row of the case is dropped
    state = torch.load(tmp_path / "sft-10" / "state.pt", weights_only=True)
    assert state["step"] == 4 and all(w.isfinite().all() for w in state["model"].values())


@pytest.fixture
def small_disk(tmp_path):
    """An empty file system of 12 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill_disk(ballast, spare):
    """Fills the disk with a file, but for so many bytes."""
    with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while file.write(bytes(4096)):
            pass
    os.truncate(ballast, ballast.stat().st_size - spare)


@pytest.mark.parametrize("spare", [0, 300_000])  # bytes: no room for the log's lines; for part of the state
def test_a_full_disk_leaves_the_last_good_state(case, tmp_path, small_disk, monkeypatch, spare):
    settings = dict(method="sft", save_every=2, log_every=2, epochs=0.02, eval_limit=2, eval_seeds=[1])
    whole, ballast = run(case, tmp_path / "whole", **settings), small_disk / "ballast"
    backward_passes = dskd_ga.backward_passes

    def fill(model, teacher, data, pads, micro_batches, step, *rest):
        if step == 4:
            fill_disk(ballast, spare)
        return backward_passes(model, teacher, data, pads, micro_batches, step, *rest)

    monkeypatch.setattr(dskd_ga, "backward_passes", fill)
    with pytest.raises(OSError, match="No space"):
        run(case, small_disk, **settings)
    monkeypatch.undo()
    assert torch.load(small_disk / "sft-10" / "state.pt", weights_only=True)["step"] == 2
    ballast.unlink()
    same_end(whole, run(case, small_disk, **settings))


def test_a_full_disk_leaves_the_old_checkpoint(case, small_disk):
    tokenizer = dskd_ga.load_tokenizer(str(case / "student"))
    model = dskd_ga.load_model(str(case / "student"), tokenizer, torch.device("cpu"))
    dskd_ga.save_model(model, tokenizer, small_disk / "best")
    before = (small_disk / "best" / "model.safetensors").read_bytes()
    fill_disk(small_disk / "ballast", 100_000)
    with pytest.raises(OSError, match="best.new: .*No space"):
        dskd_ga.save_model(model, tokenizer, small_disk / "best")
    assert (small_disk / "best" / "model.safetensors").read_bytes() == before


def test_the_same_command_gives_the_same_run(case, reference_run, tmp_path):
    same_end(reference_run, run(case, tmp_path, ga=True, teacher_ready=True))


def test_an_unusable_output_folder_is_named(case, tmp_path):
    (tmp_path / "file").write_text("no folder")
    command = flags(case, tmp_path / "file", method="sft")
    done = subprocess.run([sys.executable, dskd_ga.__file__, *command], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(tmp_path / "file") in done.stderr


def test_a_student_without_weights_is_told_before_the_teacher_is_fine_tuned(case, tmp_path):
    bare = shutil.copytree(case / "student", tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(dskd_ga.InputError, match="bare: found "):
        run(case, tmp_path / "out", student=bare, teacher_epochs=1)
    assert not (tmp_path / "out").exists()


def test_more_processes_than_gpus_are_refused(case, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(dskd_ga.InputError, match="--nproc_per_node: found process 3, expected .* 2 GPUs"):
        run(case, tmp_path, method="sft")


@pytest.mark.parametrize("align", ["cma", "cla", "clp"])
@pytest.mark.parametrize("matching", [ga_terms, ct_terms])
@pytest.mark.parametrize("autocast", [False, True])
def test_degenerate_batches_give_finite_gradients(align, matching, autocast):
    # a row of one token, a row of none, equal keys everywhere; the teacher's logits are all equal as well
    proj, adversary = Projectors(4, 3), (Discriminator if matching is ga_terms else Critic)(6)
    s_mask, t_mask = bools("10", "00", "11"), bools("100", "000", "111")
    h_s, W_s = torch.randn(3, 2, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    zeros = [torch.zeros(mask.shape, dtype=torch.long) for mask in (s_mask, s_mask, t_mask, t_mask)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = dual_space_losses(
            proj, h_s, torch.ones(3, 3, 3), *zeros, s_mask, t_mask, torch.ones(5, 4), torch.ones(7, 3), W_s,
            torch.ones(7, 3), align=align, chunks=torch.zeros(3, 2, 3, dtype=torch.bool), correct_only=False)
        terms = matching(adversary, out["q"], out["k"], s_mask, t_mask)
    loss = out["ce"] + out["ce_t2s"] + out["kd_t2s"] + out["kd_s2t"]
    loss = loss + sum(term for term in terms.values() if term.requires_grad)
    loss.backward()
    assert loss.isfinite() and h_s.grad[1].eq(0).all()
    for leaf in (h_s, W_s, *proj.parameters(), *adversary.parameters()):
        assert leaf.grad is None or leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [dict(ga=True), dict(ct=True, div="srkl"), dict(method="uld")], ids=str)
def test_half_precision_trains_as_float32_does(case, tmp_path, monkeypatch, dtype, settings):
    settings = dict(teacher_ready=True, eval_limit=2, eval_seeds=[1], lr=1e-3) | settings
    expected = log(run(case, tmp_path / "float32", **settings))
    monkeypatch.setattr(dskd_ga, "precision", lambda device: dtype)
    found = log(run(case, tmp_path / "half", **settings))
    assert found[-1] != expected[-1]  # the products were done in halves
    for a, b in zip(expected, found, strict=True):
        for name in {"loss", "ce", "kd_t2s", "kd_s2t", "grad_norm", "dev_loss"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=0.1 if name == "grad_norm" else 0.03), name


def test_an_overflow_of_fp16_leaves_the_step_out_and_halves_the_scale(case, tmp_path, monkeypatch):
    settings = dict(method="sft", epochs=0.02, eval_limit=2, eval_seeds=[1], save_every=4, log_every=1)
    monkeypatch.setattr(dskd_ga, "precision", lambda device: torch.float16)
    backward_passes, weights = dskd_ga.backward_passes, {}

    def overflow(model, teacher, data, pads, micro_batches, step, *rest):
        weights[step] = next(model.parameters()).detach().clone()
        result = backward_passes(model, teacher, data, pads, micro_batches, step, *rest)
        if step in (3, 5):
            next(model.parameters()).grad[0, 0] = INF
        if step == 6 and stops:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(dskd_ga, "backward_passes", overflow)
    stops = False
    whole = run(case, tmp_path / "whole", **settings)
    scales = {line["step"]: line["loss_scale"] for line in log(whole) if "loss_scale" in line}
    assert [scales[step] for step in range(1, 8)] == [2 ** 16] * 3 + [2 ** 15] * 2 + [2 ** 14] * 2
    assert torch.equal(weights[3], weights[4]) and not torch.equal(weights[4], weights[5])
    stops = True
    with pytest.raises(KeyboardInterrupt):
        run(case, tmp_path / "stopped", **settings)
    stops = False
    same_end(whole, run(case, tmp_path / "stopped", **settings))


def test_the_best_trained_student_is_kept_not_the_untrained_one(case, tmp_path, monkeypatch):
    scores, generate = iter([50.0, 30.0, 40.0, 20.0]), dskd_ga.generate

    def scored(model, tokenizer, rows, *rest):
        texts, found = generate(model, tokenizer, rows, *rest)
        score = next(scores, 0.0)
        kept.append(model.lm_head.weight.detach().clone())
        return texts, {name: [score] * len(rows) for name in found}

    kept = []
    monkeypatch.setattr(dskd_ga, "generate", scored)
    short = write_lines(tmp_path / "raw.jsonl", *open(case / "raw.jsonl").read().splitlines()[:24])
    folder = run(case, tmp_path / "out", method="sft", data=pathlib.Path(short).parent, epochs=3, eval_limit=2,
                 eval_seeds=[1])
    best = safetensors.torch.load_file(folder / "best" / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(best, kept[2]) and len(kept) == 6  # untrained, three epochs, two test sets
    assert torch.load(folder / "state.pt", weights_only=True)["best"] == 40


def test_fresh_starts_over_and_keeps_the_old_run(case, tmp_path):
    short = dict(method="sft", eval_limit=2, eval_seeds=[1])
    run(case, tmp_path, **short)
    dskd_ga.main(flags(case, tmp_path, fresh=True, lr=1e-3, **short))
    dskd_ga.main(flags(case, tmp_path, fresh=True, **short))
    losses = [[line["loss"] for line in log(tmp_path / name) if "loss" in line] for name in ("sft-10.1", "sft-10.2", "sft-10")]
    assert losses[0] == losses[2] != losses[1]


def test_a_damaged_state_is_named_and_a_broken_log_line_dropped(case, tmp_path):
    settings = dict(method="sft", eval_limit=2, eval_seeds=[1])
    folder = run(case, tmp_path, **settings)
    whole, args, state = log(folder), json.loads((folder / "args.json").read_text()), folder / "state.pt"
    (folder / "args.json").write_text(json.dumps(args | dict(finished=False)))
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # the process was killed while it wrote
    dskd_ga.main(flags(case, tmp_path, **settings))
    assert log(folder) == whole
    (folder / "args.json").write_text(json.dumps(args | dict(finished=False)))
    for damaged in (state.read_bytes()[:-500], b"no state", b""):
        state.write_bytes(damaged)
        with pytest.raises(dskd_ga.InputError, match="state.pt: found a damaged file .* --fresh"):
            dskd_ga.main(flags(case, tmp_path, **settings))


def test_the_teacher_is_fine_tuned_once(case, tmp_path):
    run(case, tmp_path, teacher_epochs=0.01)
    tuned = (tmp_path / "teacher-tuned" / "best" / "model.safetensors").stat()
    assert [line["step"] for line in log(tmp_path / "teacher-tuned") if "loss" in line] == [1, 2, 3, 4, 5]
    run(case, tmp_path, teacher_epochs=0.01, div="kl", ga=True)
    assert (tmp_path / "teacher-tuned" / "best" / "model.safetensors").stat() == tuned


@pytest.mark.parametrize("processes", [1, 2])
def test_a_cached_teacher_gives_the_same_losses(case, reference_run, tmp_path, processes, monkeypatch):
    settings = dict(ga=True, teacher_ready=True, cache_teacher=tmp_path / "cache")

    def check(folder):
        found = log(folder)
        for a, b in zip(found, log(reference_run), strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
        return found

    if processes == 1:  # what is not on disk is not marked as done
        calls, response_hidden = [], dskd_ga.response_hidden

        def stops(model, side):
            calls.append(len(side.ids))
            if len(calls) == 3 and "Qwen" in type(model).__name__:
                raise KeyboardInterrupt
            return response_hidden(model, side)

        monkeypatch.setattr(dskd_ga, "response_hidden", stops)
        with pytest.raises(KeyboardInterrupt):
            run(case, tmp_path / "first", **settings)
        monkeypatch.undo()
        assert sum((tmp_path / "cache" / "done").read_bytes()) == sum(calls[:2])
    found = check(run(case, tmp_path / "first", processes, **settings))
    done, hidden = ((tmp_path / "cache" / name).read_bytes() for name in ("done", "hidden"))
    assert set(done) == {1} and len(done) == found[0]["rows"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "first"]
    if processes == 1:  # half-written: rows that are not marked as done are computed, the others are trusted
        (tmp_path / "cache" / "done").write_bytes(done[:3000] + bytes(len(done) - 3000))
        lost = len(hidden) // 5  # of rows after the 3000th of 4092
        (tmp_path / "cache" / "hidden").write_bytes(hidden[:-lost] + bytes(lost))
        read, response_hidden = [], dskd_ga.response_hidden
        monkeypatch.setattr(dskd_ga, "response_hidden", lambda model, side: read.append(
            len(side.ids) if "Qwen" in type(model).__name__ else 0) or response_hidden(model, side))
        freed, backward_passes = [], dskd_ga.backward_passes
        monkeypatch.setattr(dskd_ga, "backward_passes", lambda model, teacher, *rest: freed.append(all(
            weight.is_meta for weight in teacher.get_decoder().layers.parameters())) or backward_passes(
            model, teacher, *rest))
        check(run(case, tmp_path / "second", **settings))
        assert freed and all(freed)
        assert sum(read) == len(done) - 3000
        mended = (tmp_path / "cache" / "hidden").read_bytes()
        same(*(torch.frombuffer(bytearray(x), dtype=torch.float32) for x in (mended, hidden)), 1e-5)
        with pytest.raises(dskd_ga.InputError, match="cache with other rows"):
            run(case, tmp_path / "third", **settings | dict(dev_rows=9))
        with pytest.raises(dskd_ga.InputError, match="cache with other weights, rows"):
            run(case, tmp_path / "fourth", **settings | dict(teacher=case / "teacher-same"))


def test_every_parameter_is_in_one_group_and_moves(case):
    args = dskd_ga.parse(flags(case, "unused", ga=True))
    names, cpu = ("student", "teacher"), torch.device("cpu")
    tokenizers = [dskd_ga.load_tokenizer(str(case / name)) for name in names]
    student, teacher = (
        dskd_ga.load_model(str(case / name), tok, cpu) for name, tok in zip(names, tokenizers)
    )
    model = dskd_ga.Distiller(student, teacher.requires_grad_(False), args)
    groups = dskd_ga.parameter_groups(model, args)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters()})
    assert any(
        p is model.adversary.highway.weight for group in groups for p in group["params"] if group["lr"] == 1e-3
    )
    assert all((group["weight_decay"] > 0) == (p.ndim > 1) for group in groups for p in group["params"])
    before = [{name: p.detach().clone() for name, p in m.named_parameters()} for m in (model, teacher)]
    data, _ = dskd_ga.training_data(dskd_ga.read_rows(str(case / "raw.jsonl"), 8), tokenizers, 256, 512)
    line, sums = dskd_ga.backward_passes(
        model, teacher, data, [0, 0], [[0, 1, 2, 3], [4, 5, 6, 7]], 0, args, cpu,
        torch.amp.GradScaler("cpu", enabled=False)
    )
    assert line["tokens"] == sum(len(example.spans) for example in data[0])
    torch.optim.AdamW(groups).step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[0][name])] == []
    assert all(p.grad is None and torch.equal(p, before[1][name]) for name, p in teacher.named_parameters())


METHODS = [  # with what a run's name says besides
    (dict(method="clp"), "clp-skl"), (dict(method="cla", ct=True), "cla-ct-skl"), (dict(method="sft"), "sft"),
    (dict(method="dskd", div="kl"), "dskd-kl"), (dict(method="kd", div="jsd"), "kd-jsd"),
    (dict(method="uld"), "uld"), (dict(method="mined"), "mined"), (dict(ct=True, div="kl"), "cma-ct-kl"),
    (dict(ga=True, normalise_queries=True), "cma-ga-nq-skl"), (dict(ga=True, released_kq=True), "cma-ga-released-skl")]


@pytest.fixture(scope="session")
def method_runs(case, tmp_path_factory):
    """Folders by number of processes and run name."""
    found = {}
    for processes in (1, 2):
        out = tmp_path_factory.mktemp(f"methods-{processes}")
        commands = [flags(case, out, **method_settings(case, settings)) for settings, _ in METHODS]
        for command in commands if processes == 1 else ():
            dskd_ga.main(command)
        if processes == 2:
            assert [process.wait(timeout=600) for process in two_processes(commands)] == [0, 0]
        found[processes] = {name: out / f"{name}-10" for _, name in METHODS}
    return found


def method_settings(case, settings):
    teacher = "teacher-same" if settings.get("method") in ("kd", "dskd") else "teacher"
    return settings | dict(teacher=case / teacher, teacher_ready=True, eval_limit=2, eval_seeds=[1])


@pytest.mark.parametrize("settings, name", METHODS, ids=str)
def test_every_method_trains_and_the_number_of_processes_changes_nothing(case, method_runs, settings, name):
    folders = [method_runs[processes][name] for processes in (1, 2)]
    one, two = ([line for line in log(folder) if "loss" in line] for folder in folders)
    assert len(one) == 5 and one[-1]["ce"] < one[0]["ce"]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    kq = one[0]["loss"] - 0.5 * sum(one[0].get(term, 0) for term in (*TERMS, "kd"))
    if "ct" in settings:
        assert kq == pytest.approx(one[0]["ct_q"] + one[0]["ct_k"], rel=1e-4)
    if "released_kq" in settings:  # over the tokens of four of the step's eight rows
        assert kq == pytest.approx((one[0]["ga_q"] + one[0]["ga_k"]) * 8 / (4 * one[0]["tokens"]), rel=1e-2)
        state = torch.load(folders[0] / "state.pt", weights_only=True)["model"]
        for key, start in fresh_distiller(case, method_settings(case, settings)).adversary.state_dict().items():
            assert torch.equal(state[f"adversary.{key}"], start)


def fresh_distiller(case, settings):
    """As `train` makes it."""
    args, cpu = dskd_ga.parse(flags(case, "unused", **settings)), torch.device("cpu")
    dskd_ga.seed_torch(args.seed)
    pair = [(name, dskd_ga.load_tokenizer(name)) for name in (args.student, args.teacher)]
    return dskd_ga.Distiller(*(dskd_ga.load_model(*x, cpu, torch.float32, args.dropout) for x in pair), args)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(batch_size=8, micro_batch=3), "--batch-size: found 8, expected a multiple of"),
        (dict(batch_size=8000), "raw.jsonl"),
        (dict(tests=["seen"]), "--tests: found 'seen'"),
        (dict(tests=["../a=b"]), "--tests"),
        (dict(method="sft", ga=True), "--ga"),
        (dict(method="clp", normalise_queries=True), "--normalise-queries"),
        (dict(ga=True, ct=True), "--ga: .* expected no --ct"),
        (dict(released_kq=True), "--released-kq"),
        (dict(method="sft", align=3), "--align"),
        (dict(baseline="sft"), "--baseline"),
        (dict(method="kd"), "--method kd: found different tokenizers in .*student and .*teacher"),
        (dict(method="dskd"), "--method dskd: found different tokenizers"),
    ],
)
def test_settings_that_cannot_work_are_named(case, tmp_path, settings, message):
    with pytest.raises(dskd_ga.InputError, match=message):
        run(case, tmp_path, teacher_ready=True, **settings)


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects operations for which the host would wait for a CUDA device."""
    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1])
        if by_mask or name in self.NAMES:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings, name", METHODS, ids=str)
def test_a_step_does_not_wait_for_the_device_beyond_the_trunks(case, settings, name):
    settings, cpu = method_settings(case, settings), torch.device("cpu")
    args = dskd_ga.parse(flags(case, "unused", **settings))
    pair = [dskd_ga.load_tokenizer(source) for source in (args.student, args.teacher)]
    student, teacher = (dskd_ga.load_model(*x, cpu) for x in zip((args.student, args.teacher), pair))
    teacher = None if args.method == "sft" else teacher.requires_grad_(False)
    model = dskd_ga.Distiller(student, teacher, args, torch.zeros(len(pair[1]), dtype=torch.long))
    rows = dskd_ga.read_rows(case / "raw.jsonl", 4)
    sides, _ = dskd_ga.training_data(rows, pair, 256, 512, args.method)
    s, t = (dskd_ga.collate(side, 0, cpu) for side in sides)
    optimizer = torch.optim.AdamW(dskd_ga.parameter_groups(model, args), fused=True)
    with Waits() as waits:
        loss, _ = model(s, t, teacher, 9, 9)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # transformers itself waits once a trunk, to see whether rows are packed sequences
    assert waits.found == ["_local_scalar_dense"] * (1 if teacher is None else 2)


def test_kd_wants_heads_of_one_size(case, tmp_path):
    config = transformers.AutoConfig.from_pretrained(case / "teacher-same", vocab_size=500)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    transformers.AutoTokenizer.from_pretrained(case / "teacher-same").save_pretrained(tmp_path / "wide")
    with pytest.raises(dskd_ga.InputError, match="--method kd: found heads of 420 and 500"):
        run(case, tmp_path / "out", method="kd", teacher=tmp_path / "wide", teacher_ready=True)
    assert not (tmp_path / "out").exists()  # nothing was trained
    dskd_ga.check_pair(dskd_ga.parse(flags(case, "", method="dskd", teacher=tmp_path / "wide")))


class Hub(http.server.BaseHTTPRequestHandler):
    """A stand-in of the hub: files of its server's `folder` as ORG/NAME/FILE, under one commit."""
    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self):
        self.server.asked.append(f"{self.command} {self.path}")
        path = re.sub("^/(api/)?(datasets/|models/)?", "", self.path).split("/")
        repo, rest = self.server.folder.joinpath(*path[:2]), path[2:]
        file = repo.joinpath(*rest[2:])  # after resolve/REVISION
        found = rest[:1] == ["resolve"] and file.is_file()
        body = file.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        if found:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound" if repo.is_dir() else "RepoNotFound")
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def do_GET(self):
        self.wfile.write(self.do_HEAD())

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(case, tmp_path):
    """A running `Hub` with two models and the five data sets under their real names; it collects requests."""
    folder = tmp_path / "served"
    for name in ("student", "teacher"):
        shutil.copytree(case / name, folder / "tiny" / name)
    for source in dskd_ga.TEST_SETS:
        file = folder / source.partition("=")[2]
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(case / "seen.jsonl", file)
    shutil.copy(case / "raw.jsonl", folder / "MiniLLM" / "dolly")
    server = http.server.ThreadingHTTPServer(("localhost", 0), Hub)
    server.folder, server.asked = folder, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def from_hub(hub, tmp_path, offline=False, **settings):
    """The script, with models and data by id, in a process that knows no other hub."""
    base = dict(student="tiny/student", teacher="tiny/teacher", teacher_ready=True, dev_rows=8, batch_size=8,
                epochs=0.004, eval_limit=2, eval_seeds=[1], max_new_tokens=4, out=tmp_path / "out")
    command = []
    for name, value in (base | settings).items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        command += [f"--{name.replace('_', '-')}", *map(str, values)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= dict(HF_ENDPOINT=f"http://localhost:{hub.server_port}", HF_HOME=str(tmp_path / "home"),
                        HF_HUB_OFFLINE=str(int(offline)), OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, dskd_ga.__file__, *command], env=environment, capture_output=True,
                          text=True, timeout=100)


def test_models_and_data_come_from_the_hub_once(hub, tmp_path):
    first = from_hub(hub, tmp_path)
    assert first.returncode == 0, first.stderr
    got = sorted(request.rpartition("/")[2] for request in hub.asked if request.startswith("GET"))
    assert got.count("model.safetensors") == 2 and got.count("valid.jsonl") == 5 and got.count("raw.jsonl") == 1
    hub.asked.clear()
    again = from_hub(hub, tmp_path, offline=True, seed=11)
    assert again.returncode == 0, again.stderr
    scores = [json.loads((tmp_path / "out" / f"cma-skl-{seed}" / "eval.json").read_text()) for seed in (10, 11)]
    assert all(list(score["rougeL"]) == ["Dolly", "SelfInst", "Vicuna", "S-NI", "UnNI", "OOD", "All"]
               for score in scores)
    unknown = from_hub(hub, tmp_path, offline=True, tests=["own=MiniLLM/dolly/other.jsonl"])
    assert unknown.returncode == 2 and unknown.stderr.count("\n") == 1 and "other.jsonl" in unknown.stderr
    assert not hub.asked


@pytest.mark.parametrize("settings, wanted", [
    (dict(student="tiny/nothing"), "tiny/nothing"), (dict(data="tiny/nothing"), "raw.jsonl"),
    (dict(tests=["own=MiniLLM/dolly/nothing.jsonl"]), "nothing.jsonl")], ids=str)
def test_what_the_hub_does_not_have_is_named(hub, tmp_path, settings, wanted):
    done = from_hub(hub, tmp_path, **settings)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and wanted in done.stderr, done.stderr


def test_bad_input_is_one_line_and_status_2(tmp_path):
    broken = write_lines(tmp_path / "broken.jsonl", "{")
    for path, named in ((broken, "broken.jsonl, line 1"), (tmp_path / "missing.jsonl", "missing.jsonl")):
        command = [sys.executable, dskd_ga.__file__, "--tests", f"a={path}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr


def test_importing_does_nothing(tmp_path):
    code = (
        "import torch, random; torch.manual_seed(5); random.seed(5); state = random.getstate(); "
        "import dskd_ga; "
        "assert torch.initial_seed() == 5 and random.getstate() == state; "
        "assert not torch.distributed.is_initialized()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--nonsense"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(pathlib.Path(dskd_ga.__file__).parent)),
    )
    assert done.returncode == 0 and done.stdout == "" and not list(tmp_path.iterdir()), done.stderr


# ------------------------------------------------------------------------------ evaluation
def test_rouge_l_by_hand():
    # longest common subsequence "the cat" (stemmed): precision 2/3, recall 2/4, F1 4/7
    scores = rouge_l(["the cats ran", "A, b!"], [["the cat sat down", "nothing"], ["a b"]])
    assert scores == pytest.approx(dict(rougeL=100 * (4 / 7 + 1) / 2, exact_match=50.0))
    assert rouge_l([""], [["text"]]) == dict(rougeL=0, exact_match=0)
    with pytest.raises(ValueError):
        rouge_l(["a"], [["a"], ["b"]])


class PickedByNumbers(transformers.LogitsProcessor):
    """For transformers' own generate: leaves each row the token that its number picks."""

    def __init__(self, uniforms):
        self.uniforms, self.step = uniforms, 0

    def __call__(self, ids, scores):
        below = scores.double().softmax(-1).cumsum(-1)
        numbers = torch.from_numpy(self.uniforms[:, self.step]) * below[:, -1]
        self.step += 1
        picked = torch.stack([(row > number).nonzero()[0, 0] for row, number in zip(below, numbers)])
        return torch.full_like(scores, -INF).scatter(1, picked[:, None], 0.0)


@pytest.mark.parametrize("size", [0, 1, 2, 6])
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma3", "neox"])
def test_samples_are_those_of_transformers_generate(family, size):
    model, rng = make_model(FAMILIES[family]()), random.Random(size)
    prompts = [rng.choices(range(1, 60), k=n) for n in (1, 9, 4, 20, 4, 2, 9, 5, 30, 1, 7)]  # read in two parts
    uniforms = dskd_ga.np.random.default_rng(0).random((11, 30))
    longest = dskd_ga.sample(model, prompts, uniforms, 59, size)
    for end in (59, longest[1][4]):  # the second ends some rows early
        config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=end, pad_token_id=0, max_new_tokens=30, no_repeat_ngram_size=size)
        expected, found = [], dskd_ga.sample(model, prompts, uniforms, end, size)
        for prompt, numbers in zip(prompts, uniforms):  # one at a time, so there is no padding
            out = model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                                 generation_config=config, logits_processor=[PickedByNumbers(numbers[None])])
            text = out[0, len(prompt):].tolist()
            expected.append(text[:text.index(end)] if end in text else text)
        assert found == expected
    assert len(found[1]) <= 4 and max(map(len, found)) > 4
    first = dskd_ga.sample(model, [[0, 1, 2]], 0 * uniforms[:1, :1], 59, 1)  # 0 to 2 have come and are forbidden
    assert first == [[3]]


def test_a_sample_depends_on_seed_and_row_alone(case):
    tokenizer = dskd_ga.load_tokenizer(str(case / "student"))
    model = dskd_ga.load_model(str(case / "student"), tokenizer, torch.device("cpu"))
    rows = [dskd_ga.Row(prompt, ["a"]) for prompt in ("Task: Count on from 7", "a", "Task: What is 12 plus 30? " * 9)]
    limits = dict(max_prompt=20, max_new_tokens=8)
    texts = {(tokens, seed): dskd_ga.generate(model, tokenizer, rows, seed, argparse.Namespace(
        eval_tokens=tokens, **limits)) for tokens in (1, 60, 999) for seed in (1, 2)}
    assert texts[1, 1] == texts[60, 1] == texts[999, 1] and texts[1, 2] == texts[999, 2] != texts[1, 1]
    scores = dskd_ga.score_pairs((text, row.references) for text, row in zip(texts[1, 1][0], rows))
    assert list(zip(*texts[1, 1][1].values())) == scores
    end_only = dskd_ga.Row(tokenizer.decode(tokenizer.encode(rows[2].prompt)[-20:]), ["a"])
    one = dskd_ga.generate(model, tokenizer, [rows[0], rows[1], end_only], 1, argparse.Namespace(eval_tokens=999, **limits))
    assert one == texts[1, 1]  # of a long prompt the end counts


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_many_rows_are_scored_in_parallel_processes(case, monkeypatch):
    tokenizer = dskd_ga.load_tokenizer(str(case / "student"))
    model = dskd_ga.load_model(str(case / "student"), tokenizer, torch.device("cpu"))
    rows = [dskd_ga.Row(f"What is {n} plus {n}?", [f"{n} plus {n}", "1 2 3"]) for n in range(260)]
    args = argparse.Namespace(max_prompt=20, max_new_tokens=6, eval_tokens=999)
    texts, scores = dskd_ga.generate(model, tokenizer, rows, 1, args)
    assert list(zip(*scores.values())) == dskd_ga.score_pairs(zip(texts, [row.references for row in rows]))
    assert len(set(scores["rougeL"])) > 3
    monkeypatch.setattr(dskd_ga, "score_pairs", lambda pairs: [(os.getpid(), len(pairs))] * len(pairs))
    _, scores = dskd_ga.generate(model, tokenizer, rows, 1, args)
    assert os.getpid() not in scores["rougeL"] and len(set(scores["rougeL"])) == 2
    assert max(scores["exact_match"]) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")  # processes of one machine share its cores
    assert set(dskd_ga.generate(model, tokenizer, rows, 1, args)[1]["rougeL"]) == {os.getpid()}


def test_averages_and_the_papers_rows():
    averages = dskd_ga.averages(dict(first=[1, 2], second=[3, 4], third=[5, 8]))
    assert averages == dict(OOD=[4, 6], All=[3, 14 / 3])
    printed = {
        "untrained": (6.01, 6.08), "teacher-gpt2-xl": (22.36, 23.30), "dskd": (16.87, 18.69), "sft": (13.44, 15.32),
        "teacher": (27.77, 27.70), "mined": (14.40, 15.86), "uld": (14.11, 15.64), "cma-srkl": (16.95, 18.49),
        "clp": (17.00, 18.51), "cla": (16.55, 18.08), "cma-ga-skl": (17.32, 18.81), "cma-ct-kl": (16.46, 18.10),
        "cma-kl": (14.46, 16.40), "cma-ga-kl": (16.68, 18.32)}
    assert dskd_ga.PAPER.keys() == printed.keys()
    for run_name, values in dskd_ga.PAPER.items():
        found = dskd_ga.averages({str(i): [value] for i, value in enumerate(values)})
        assert (found["OOD"][0], found["All"][0]) == pytest.approx(printed[run_name], abs=0.011)


def fake_result(run, seed, scores, rows, **more):
    """scores: a list of sampling seeds by test set; rows: a list of rows by test set."""
    by_set = {name: list(values) for name, values in scores.items()}
    return dict(run=run, seed=seed, rougeL=by_set | dskd_ga.averages(by_set), rows=rows, alignment=None) | more


def test_a_report_keeps_training_and_sampling_seeds_apart():
    rows = dict(seen=[1.0, 2.0], longer=[3.0])
    results = [fake_result("a", 1, dict(seen=[1, 3], longer=[6, 6]), rows),
               fake_result("a", 2, dict(seen=[5, 7], longer=[6, 8]), rows, alignment=None),
               fake_result("b", 1, dict(seen=[4, 4], longer=[2, 4]), rows, alignment=dict(mass=0.25, top=0.5))]
    lines = dskd_ga.report(results).splitlines()
    # a on `seen`: runs of mean 2 and 6, each with a sampling deviation of sqrt(2)
    assert lines[2].startswith(
        "| a | 2 | 4.00 ± 2.83 (1.41) | 6.50 ± 0.71 (1.00) | 6.50 ± 0.71 (1.00) | 5.25 ± 1.77 (1.12) |")
    assert lines[3].startswith("| b | 1 | 4.00 (0.00) | 3.00 (1.41) | 3.00 (1.41) | 3.50 (0.71) |")
    assert not any("less" in line or "paper" in line for line in lines)
    lines = dskd_ga.report(results, "b").splitlines()
    assert lines[0] == ("| ROUGE-L | seeds | seen | longer | OOD | All | All less b | mass | mass_once | mass_repeated "
                        "| top | mmd | probe |")
    assert lines[3].endswith("| 3.50 (0.71) |  | 0.25 |  |  | 0.50 |  |  |")
    low, high = dskd_ga.bootstrap(results[:2], results[2:])
    assert lines[2].endswith(f"| 5.25 ± 1.77 (1.12) | +1.75 [{low:+.2f}, {high:+.2f}] |  |  |  |  |  |  |")
    with pytest.raises(dskd_ga.InputError, match="baseline c; expected .* among a, b"):
        dskd_ga.report(results, "c")
    with pytest.raises(dskd_ga.InputError, match="'longer': 2"):
        dskd_ga.report([*results, fake_result("c", 1, dict(seen=[1], longer=[1]), dict(seen=[1, 1], longer=[1, 1]))])


def test_a_report_puts_the_paper_beside_its_rows():
    names = [item.partition("=")[0] for item in dskd_ga.TEST_SETS]
    run = lambda name: fake_result(name, 10, {n: [1.0] for n in names}, {n: [1.0] for n in names})
    lines = dskd_ga.report([run(name) for name in ("sft", "clp-srkl", "cma-skl", "cma-ga-kl")]).splitlines()
    assert lines[2] == ("| sft | 1 | 1.00, paper 22.83 | 1.00, paper 9.49 | 1.00, paper 14.66 | 1.00, paper 13.55 | "
                        "1.00, paper 16.06 | 1.00, paper 13.44 | 1.00, paper 15.32 |")
    assert [("paper" in line) for line in lines[2:6]] == [True, True, False, True]
    assert "24.52" in lines[3] and "24.92" in lines[5]  # the paper names no f for clp


def test_bootstrap_intervals():
    rng = random.Random(1)
    rows = [rng.gauss(40, 20) for _ in range(400)]
    shift = lambda run, by, noise=0: fake_result(run, 1, dict(s=[0]), dict(s=[r + by + noise * rng.gauss(0, 1) for r in rows]))
    # paired: what both share cancels, so a shift of every row is certain
    assert dskd_ga.bootstrap([shift("a", 2)], [shift("b", 0)]) == pytest.approx([2, 2])
    # over rows: of independent noise the interval is that of a mean
    low, high = dskd_ga.bootstrap([shift("a", 0, 5)], [shift("b", 0, 5)])
    assert high - low == pytest.approx(2 * 1.96 * 5 * math.sqrt(2 / 400), rel=0.15)
    # over runs: means of two draws out of two runs 6 apart are 0, 3 or 6 off
    low, high = dskd_ga.bootstrap([shift("a", 0), shift("a", 6)], [shift("b", 1)])
    assert (low, high) == pytest.approx((-1, 5))
    pair = lambda run, by: [shift(run, by) | dict(seed=10), shift(run, by + 6) | dict(seed=20)]
    assert dskd_ga.bootstrap(pair("a", 2)[::-1], pair("b", 0)) == pytest.approx([2, 2])  # paired by seed
    # over test sets: the mean of both
    two = lambda run, *by: fake_result(run, 1, dict(s=[0], t=[0]), dict(s=[by[0]] * 9, t=[by[1]] * 2))
    assert dskd_ga.bootstrap([two("a", 1, 5)], [two("b", 1, 1)]) == pytest.approx([2, 2])


# ------------------------------------------------------------------------------ alignment analysis
def side_of(targets, mask):
    targets, mask = torch.tensor(targets), bools(*mask)
    return dskd_ga.Side(targets, targets, mask, dskd_ga.real_positions(mask), targets, targets, targets)


def test_alignment_numbers_by_hand():
    s = side_of([[5, 5, 6, 6], [7, 8, 8, 8]], ["1110", "1111"])
    t = side_of([[1, 1], [1, 1]], ["11", "10"])
    a = torch.tensor([[[0.75, 0.25], [0.5, 0.5], [0.0, 1.0], [0, 0]], [[1.0, 0], [1, 0], [1, 0], [1, 0]]])
    chunks = torch.stack([bools("10", "01", "01", "00"), bools("10", "10", "10", "00")])  # the last has none
    q, k = torch.randn(2, 4, 3), torch.randn(2, 2, 3)
    numbers = dskd_ga.alignment_numbers(q, k, a, chunks, s, t)
    h = lambda *p: -sum(x * math.log(x) for x in p)
    expected = dict(
        mass=(0.75 + 0.5 + 1 + 3) / 6, mass_repeated=(0.75 + 0.5 + 1 + 1) / 4, mass_once=1.0,
        top=(1 + 0 + 1 + 3) / 6, top_once=1.0, top_repeated=3 / 4,
        entropy=(h(0.75, 0.25) + h(0.5, 0.5)) / 6, entropy_once=0.0,
        entropy_repeated=(h(0.75, 0.25) + h(0.5, 0.5)) / 4)
    assert {name: numbers[name] for name in expected} == pytest.approx(expected)
    x, y = q[s.mask], k[t.mask]
    assert numbers["norm_q"] == pytest.approx(sum(map(torch.norm, x)).item() / 7, rel=1e-5)
    assert numbers["norm_k"] == pytest.approx(sum(map(torch.norm, y)).item() / 3, rel=1e-5)
    assert numbers["mean_gap"] == pytest.approx((x.mean(0) - y.mean(0)).norm().item(), rel=1e-5)
    both = torch.cat([x, y])
    median = torch.tensor([((a - b) ** 2).sum() for a in both for b in both]).median()
    mean = lambda pairs: sum(math.exp(-((a - b) ** 2).sum() / median) for a, b in pairs) / len(pairs)
    others = lambda z: [(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]
    mmd = mean(others(x)) + mean(others(y)) - 2 * mean([(a, b) for a in x for b in y])
    assert numbers["mmd"] == pytest.approx(mmd, rel=1e-4)


def test_queries_that_are_like_keys_have_no_mmd_and_cannot_be_told_apart():
    s, t = (side_of([[1] * n] * 40, ["1" * n] * 40) for n in (9, 7))
    q, k, a, chunks = torch.randn(40, 9, 5), torch.randn(40, 7, 5), torch.ones(40, 9, 7) / 7, torch.ones(40, 9, 7) > 0
    same, apart = (dskd_ga.alignment_numbers(q + shift, k, a, chunks, s, t) for shift in (0, 3))
    assert abs(same["mmd"]) < 0.01 and abs(same["probe"] - 0.5) < 0.1
    assert apart["mmd"] > 0.3 and apart["probe"] > 0.95
    one = dskd_ga.alignment_numbers(q[:1], k[:1], a[:1], chunks[:1], *(
        dskd_ga.Side(*(x[:1] for x in side)) for side in (s, t)))
    assert "probe" not in one and "mass_once" not in one  # no held-out row, no such token


def test_the_alignment_page_shows_several_runs_side_by_side(case, tmp_path):
    short = dict(out=tmp_path, teacher_ready=True, eval_limit=2, eval_seeds=[1])
    dskd_ga.main(flags(case, align=2, **short))
    own = (tmp_path / "cma-skl-10" / "alignment.html").read_text()
    dskd_ga.main(flags(case, method="clp", **short))
    folders = [tmp_path / "cma-skl-10", tmp_path / "clp-skl-10"]
    dskd_ga.main(flags(case, report=folders, align=3, **{"out": tmp_path}))
    page = (tmp_path / "alignment.html").read_text()
    assert own.count("<svg") == 2 and page.count("<svg") == 6 and "://" not in page.replace("www.w3.org", "")
    dom = xml.etree.ElementTree.fromstring(re.search(r"<section>(.*?)</section>", page, re.S)[0])
    cma, clp = dom.findall("figure")
    assert [f.find("figcaption").text for f in (cma, clp)] == ["cma-skl-10", "clp-skl-10"]
    row = dskd_ga.read_rows(case / "raw.jsonl", 1)
    pair = [dskd_ga.load_tokenizer(str(case / name)) for name in ("student", "teacher")]
    (s,), (t,) = dskd_ga.training_data(row, pair, 256, 512)[0]
    for figure in (cma, clp):
        cells = [r for r in figure.iter("rect") if r.get("class") is None]
        values = torch.tensor([float(r.find("title").text.rpartition(" ")[2]) for r in cells])
        assert values.view(len(s.spans), len(t.spans)).sum(1).tolist() == pytest.approx([1] * len(s.spans), abs=0.02)
    expected, _ = chunk_projection(chunk_alignment(s.spans, t.spans)[None], *(
        torch.ones(1, len(side.spans), dtype=torch.bool) for side in (s, t)))
    same(values.view_as(expected[0]), expected[0], 1e-3)
    boxes = [[int(r.get(n)) // 15 for n in ("height", "width")] for r in clp.iter("rect") if r.get("class") == "chunk"]
    assert boxes == [[side.chunk.count(n) for side in (s, t)] for n in sorted(set(s.chunk))]
    truncated = dskd_ga.heatmap("<a>", [[1, 0], [0, 1]], [[0, -1], [0, -2]], [["x", "<"], ["y" * 20, "&"]])
    assert truncated.count('class="chunk"') == 1 and ">x from yyyyyyyyyyyyy…: 1.000<" in truncated
    xml.etree.ElementTree.fromstring(truncated)
    with pytest.raises(dskd_ga.InputError, match="found no alignment.pt"):
        dskd_ga.main(flags(case, eval_only=case / "student", align=1, **short))


def test_dev_lines_hold_alignment_numbers_and_so_does_the_evaluation(reference_run):
    lines = [line for line in log(reference_run) if "dev_rougeL" in line]
    assert all({"dev_align_mass", "dev_align_probe", "dev_align_mmd"} < set(line) for line in lines)
    best = max(lines[1:], key=lambda line: line["dev_rougeL"])  # without the untrained one
    found = json.loads((reference_run / "eval.json").read_text())["alignment"]
    assert found == pytest.approx({k[10:]: v for k, v in best.items() if k.startswith("dev_align_")})


def test_a_finished_evaluation_is_not_repeated(case, reference_run, tmp_path, monkeypatch):
    settings = dict(eval_only=reference_run / "best", eval_seeds=[1])
    folder = run(case, tmp_path, **settings)
    scored = json.loads((folder / "eval.json").read_text())
    rows = {name: [json.loads(line) for line in open(folder / "predictions" / f"{name}-1.jsonl")] for name in scored["rows"]}
    for name, lines in rows.items():
        assert scored["rows"][name] == pytest.approx(
            [rouge_l([line["prediction"]], [line["references"]])["rougeL"] for line in lines], abs=0.01)
    monkeypatch.setattr(dskd_ga, "generate", None)
    assert json.loads((run(case, tmp_path, **settings) / "eval.json").read_text()) == scored
    with pytest.raises(TypeError):
        run(case, tmp_path, **settings | dict(eval_seeds=[2]))
    rows = (case / "seen.jsonl").read_text().splitlines()
    changed = dict(settings, tests=[f"seen={write_lines(tmp_path / 'seen.jsonl', *rows[:12])}"])
    monkeypatch.undo()
    run(case, tmp_path, **changed)
    monkeypatch.setattr(dskd_ga, "generate", None)
    run(case, tmp_path, **changed)
    write_lines(tmp_path / "seen.jsonl", *rows[1:13])  # the same file, other rows
    with pytest.raises(TypeError):
        run(case, tmp_path, **changed)
    monkeypatch.undo()
    run(case, tmp_path, **settings)
    monkeypatch.setattr(dskd_ga, "generate", None)
    weights, later = reference_run / "best" / "model.safetensors", (folder / "eval.json").stat().st_mtime + 1
    before = weights.stat().st_mtime
    os.utime(weights, (later, later))
    with pytest.raises(TypeError):
        run(case, tmp_path, **settings)
    os.utime(weights, (before, before))


# ------------------------------------------------------------------------------ documents
def test_documented_commands_parse():
    here, commands = pathlib.Path(dskd_ga.__file__).parent, []
    for text in (dskd_ga.__doc__, (here / "README.md").read_text()):
        commands += re.findall(
            r"^ *(?:\S*python|\S*torchrun).* dskd_ga\.py(.*?)(?:#.*)?$", text.replace("\\\n", " "), re.M
        )
    commands += re.findall(r"^ +row (--.*?)(?: ;;| +#.*)?$", (here / "run.sh").read_text(), re.M)
    assert len(commands) > 12
    for command in commands:
        words = shlex.split(command)
        with pytest.raises(SystemExit, match="^0$") if "-h" in words else contextlib.nullcontext():
            dskd_ga.parse(words)


def test_every_equation_is_in_the_code_by_its_number():
    body = pathlib.Path(dskd_ga.__file__).read_text().split('"""', 2)[2]  # without the header's glossary
    assert [n for n in range(1, 17) if f"({n})" not in body] == []


SHARED = pathlib.Path(__file__).resolve().parent.parent / "shared"


@pytest.mark.skipif(not (SHARED / "tokenizers").is_dir(), reason="needs GPT-2's and Qwen1.5's tokenizers")
def test_the_papers_tokenizers_on_real_rows(tmp_path):
    qwen = SMALL | dict(vocab_size=151936, num_key_value_heads=2, layer_types=["full_attention"] * 2)
    for name, config in (("gpt2", dict(n_embd=32, n_layer=1, n_head=2)), ("qwen1.5", qwen)):
        source, target = SHARED / "tokenizers" / name, tmp_path / name
        config = transformers.AutoConfig.from_pretrained(source, **config)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(target)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(target)
    (tmp_path / "raw.jsonl").write_text("".join(open(SHARED / "data/dolly/dev.jsonl").readlines()[:40]))
    dskd_ga.main(
        flags(
            tmp_path,
            tmp_path / "out",
            student=tmp_path / "gpt2",
            teacher=tmp_path / "qwen1.5",
            ga=True,
            teacher_ready=True,
            dev_rows=2,
            batch_size=2,
            micro_batch=1,
            epochs=3 / 17,
            eval_limit=2,
            tests=[f"Vicuna={SHARED}/data/vicuna/test.jsonl"],
            eval_seeds=[1],
        )
    )
    lines = [line for line in log(tmp_path / "out" / "cma-ga-skl-10") if "loss" in line]
    assert len(lines) == 3 and lines[0]["ce"] == pytest.approx(math.log(50257), rel=0.1)
