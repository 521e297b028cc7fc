"""Tests of dskd_ga.py: values and gradients against float64 oracles written out here, invariances, runs.

The oracles know neither padding nor slices: they loop over rows, positions or vocabulary, or are dense.
"""
import ast, functools, hashlib, http.server, io, itertools, json, logging, math, multiprocessing, os, pathlib
import random, re, resource, runpy, shlex, shutil, signal, socket, subprocess, sys, threading, time
import tokenize, types, unicodedata
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read it

import hypothesis
import hypothesis.strategies as st
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.distributed.run
import torch.nn.functional as F
import tqdm
import transformers
import transformers as hf
from torch import nn

import dskd_ga
from dskd_ga import (
    Discriminator, Example, InputError, Projectors, Row, Side, cross_model_attention, divergence,
    dual_space_losses, ga_loss, pairs, rouge_l, sliced_loss, std_normalise)

# runs are forked: this process stays without threads, and without a lock that a killed process keeps
os.environ["TOKENIZERS_PARALLELISM"] = "false"
tqdm.tqdm.monitor_interval = 0
tqdm.tqdm.set_lock(threading.RLock())
torch.set_num_threads(1)  # the tensors are tiny
HERE = pathlib.Path(dskd_ga.__file__).parent
CPU, INF, NAN = torch.device("cpu"), math.inf, math.nan

@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)

@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """The demo's rows, tokenizers and untrained models, in a folder."""
    sys.path.insert(0, str(HERE / "experiments"))
    import demo
    folder = tmp_path_factory.mktemp("case")
    demo.write_demo(folder)
    return folder

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
    mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
    return torch.stack(block), mask

def slow_divergence(name, z_s, z_t, tau=2.0, skew=0.1, head_mass=0.5):
    """By the formulas; akl position by position. z (..., V) float64 -> (...)."""
    p, q = (z_t / tau).softmax(-1), (z_s / tau).softmax(-1)
    m, kl = (p + q) / 2, lambda a, b: (a * (a / b).log()).sum(-1)
    if name != "akl":
        return dict(kl=kl(p, q), rkl=kl(q, p), jsd=kl(p, m) / 2 + kl(q, m) / 2,
                    skl=kl(p, skew * p + (1 - skew) * q), srkl=kl(q, (1 - skew) * p + skew * q))[name]
    values = []
    for p_i, q_i in zip(p.flatten(0, -2), q.flatten(0, -2)):
        gap, mass, g_head = (p_i - q_i).abs().detach(), 0.0, 0.0
        for v in p_i.argsort(descending=True).tolist():
            if mass >= head_mass:
                break
            mass, g_head = mass + p_i[v].item(), g_head + gap[v]
        g_tail = gap.sum() - g_head
        values.append((g_head * kl(p_i, q_i) + g_tail * kl(q_i, p_i)) / (g_head + g_tail))
    return torch.stack(values).view(p.shape[:-1])

def padded_maps(maps, extra=0):
    """[(n, m), ...] -> (B, longest n + extra, longest m + extra), 0 under the padding."""
    n, m = (max(x.shape[axis] for x in maps) + extra for axis in (0, 1))
    return torch.stack([F.pad(x, (0, m - x.shape[1], 0, n - x.shape[0])) for x in maps])

# Three rows: numbers of student and teacher tokens, as `annotate` gives them; the negative ones match none.
S_CHUNK, T_CHUNK = [[0, 1, 1, -1], [0, 0], [0, 0, 0, -1, -1]], [[0, 0, 1], [0, 0, -2, -2, -2], [0]]
S_LENGTHS, T_LENGTHS = [len(row) for row in S_CHUNK], [len(row) for row in T_CHUNK]
CHUNKS = [torch.tensor(s)[:, None] == torch.tensor(t) for s, t in zip(S_CHUNK, T_CHUNK)]
every_padding = pytest.mark.parametrize("garbage, extra", [(0.0, 0), (NAN, 1), (INF, 3), (1e30, 2)])

# ---- divergences
every_divergence = pytest.mark.parametrize("name", ["kl", "rkl", "jsd", "skl", "srkl", "akl"])

@every_divergence
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_divergence(name, tau):
    z_s, z_t = normal(3, 4, 9, grad=True), (3 * normal(3, 4, 9)).requires_grad_()
    same_with_gradients(divergence(name, z_s, z_t, tau), slow_divergence(name, z_s, z_t, tau), [z_s, z_t])
    same(divergence(name, z_s, z_t, tau, 0.3, 0.9), slow_divergence(name, z_s, z_t, tau, 0.3, 0.9))
    same(divergence(name, z_s, z_s), torch.zeros_like(z_s[..., 0]))
    half_s, half_t = z_s.bfloat16(), z_t.bfloat16()
    expected = slow_divergence(name, half_s.double(), half_t.double(), tau)
    same(divergence(name, half_s, half_t, tau), expected.float(), 1e-5)

@every_divergence
def test_divergence_of_extreme_logits(name):
    z_s, z_t, gone = normal(4, 9, grad=True), normal(4, 9), torch.arange(9) % 3 == 1
    finite = lambda value: value.isfinite().all() and gradients(value.sum(), [z_s])[0].isfinite().all()
    # -inf on both sides: as if these vocabulary entries did not exist
    found = divergence(name, z_s.masked_fill(gone, -INF), z_t.masked_fill(gone, -INF))
    same_with_gradients(found, slow_divergence(name, z_s[:, ~gone], z_t[:, ~gone]), [z_s])
    # on one side: finite, and equal to the limit wherever the formula has a finite one
    for logits, infinite in ((lambda x: (z_s.masked_fill(gone, x), z_t), ("kl", "akl")),
                             (lambda x: (z_s, z_t.masked_fill(gone, x)), ("rkl", "akl"))):
        found = divergence(name, *logits(-INF))
        assert finite(found) and finite(divergence(name, *(z.float() for z in logits(-INF))))
        if name not in infinite:
            same_with_gradients(found, slow_divergence(name, *logits(-150.0)), [z_s])
    huge_s, huge_t = 1e4 * torch.randint(-1, 2, (2, 4, 9))
    found = divergence(name, (huge_s + 0 * z_s).float(), huge_t.bfloat16(), 1.0)
    assert finite(found) and found.min() >= 0 and found.max() > 0

# ---- attention
@every_padding
def test_std_normalise(garbage, extra):
    rows = [(n * normal(n, 5) + mean).requires_grad_() for n, mean in ((4, 3), (1, 0), (6, 9))]
    expected, _ = padded([row / row.std() for row in rows], 0, extra)
    same_with_gradients(std_normalise(*padded(rows, garbage, extra)), expected, rows)

def slow_attention(q, k, allowed):
    """q (n, w), k (m, w), allowed (n, m): for each query, softmax over the keys that it may see."""
    weights = (q @ k.T / math.sqrt(q.shape[1])).exp() * allowed
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-99)

@pytest.mark.parametrize("allowed", [[torch.ones_like(m) for m in CHUNKS], CHUNKS], ids=["all", "chunks"])
def test_cross_model_attention(allowed):
    q_rows, k_rows = ([normal(n, 4, grad=True) for n in lengths] for lengths in (S_LENGTHS, T_LENGTHS))
    expected = ([slow_attention(*row) for row in zip(q_rows, k_rows, allowed)],
                [slow_attention(k, q, m.T) for q, k, m in zip(q_rows, k_rows, allowed)])
    for garbage, extra in ((0.0, 0), (NAN, 2), (INF, 1)):
        (q, _), (k, _) = padded(q_rows, garbage, extra), padded(k_rows, -garbage, extra)
        for found, rows in zip(cross_model_attention(q, k, padded_maps(allowed, extra)), expected):
            reference = padded_maps(rows, extra)
            same_with_gradients(found, reference, q_rows + k_rows)
            assert (found[reference == 0] == 0).all()  # exactly: padding, and rows with nothing allowed
            assert all(g.isfinite().all() for g in gradients((found ** 2).sum(), [q, k]))

# ---- key-query matching
def test_discriminator():
    disc, x = Discriminator(6, hidden=5, dropout=0.5).double(), normal(2, 3, 6, grad=True)
    assert not torch.equal(disc(x), disc(x))  # dropout
    linears = [module for module in disc.modules() if isinstance(module, nn.Linear)]
    assert [tuple(linear.weight.shape) for linear in linears] == [(6, 6), (5, 6), (1, 5)]
    apply = lambda linear, x: x @ linear.weight.T + linear.bias
    z = apply(linears[0], x)
    gate = 1 / (1 + (-z).exp())
    y = apply(linears[1], gate * z.clamp(min=0) + (1 - gate) * x)
    expected = apply(linears[2], torch.where(y > 0, y, 0.1 * y))[..., 0]
    same_with_gradients(disc.eval()(x), expected, [x, *disc.parameters()])

@every_padding
def test_ga_loss(garbage, extra):
    disc = Discriminator(6, hidden=5).double().eval()
    q_rows, k_rows = ([normal(n, 6, grad=True) for n in lengths] for lengths in (S_LENGTHS, T_LENGTHS))
    d_q, d_k = (1 / (1 + (-disc(torch.cat(rows))).exp()) for rows in (q_rows, k_rows))
    (q, s_mask), (k, t_mask) = padded(q_rows, garbage, extra), padded(k_rows, garbage, extra)
    weights = list(disc.parameters())
    for counts in ((), (40, 50)):
        n_s, n_t = counts or (sum(S_LENGTHS), sum(T_LENGTHS))
        plain = -d_q.log().sum() / n_s - (1 - d_k).log().sum() / n_t
        found, terms = ga_loss(disc, q, k, s_mask, t_mask, *counts)
        same(found, plain)
        same(gradients(found, weights), gradients(plain, weights))                   # D descends
        same(gradients(found, q_rows), tuple(-g for g in gradients(plain, q_rows)))  # P_Q ascends
        assert all((g == 0).all() for g in gradients(found, k_rows))                 # keys are constants
        assert (gradients(found, [q])[0][~s_mask] == 0).all()
    expected = dict(D_q=d_q.sum(), D_k=d_k.sum(), accuracy_q=(d_q > 0.5).sum(), accuracy_k=(d_k < 0.5).sum())
    assert not any(term.requires_grad for term in terms.values()) and terms.keys() == expected.keys()
    for name, value in expected.items():
        same(terms[name].double(), value.detach().double())

# ---- vocabulary products
def two_losses(z_1, z_2, target):
    """A loss of both sides, one of the first, and a count."""
    ce = F.cross_entropy(z_1, target, reduction="sum")
    both = (z_1.mean(-1) * z_2.sin().sum(-1)).square().sum()
    return ce + both, ce, (z_1.argmax(-1) == target).sum()

@pytest.mark.parametrize("heads", ["two", "one constant", "one for both", "constants"])
@pytest.mark.parametrize("positions, size", [(7, 1), (7, 3), (67, 65), (7, 999), (0, 999)])
def test_sliced_loss(positions, size, heads):
    leaves = [normal(*shape, grad=True) for shape in ((positions, 4), (positions, 4), (6, 4), (5, 4))]
    h_1, h_2, W_1, W_2 = leaves
    W_2 = W_1 if heads == "one for both" else W_2 if heads == "two" else W_2.detach()
    W_1 = W_1.detach() if heads == "constants" else W_1
    target, lengths = torch.randint(5, (positions,)), []
    def fn(*slices):
        lengths.append(len(slices[0]))
        return two_losses(*slices)
    found = sliced_loss(fn, [(h_1, W_1), (h_2, W_2)], (target,), max_logits=6 * size + 5)
    expected = two_losses(h_1 @ W_1.T, h_2 @ W_2.T, target)
    assert max(lengths) == min(size, positions)
    same([value.double() for value in found], [value.double() for value in expected])
    assert found[0].requires_grad and not any(term.requires_grad for term in found[1:])
    same(gradients(0.7 * found[0], leaves), gradients(0.7 * expected[0], leaves))
    assert sum(lengths) == positions  # still: the gradient was formed with the loss, no product comes twice

def test_sliced_loss_of_a_large_vocabulary_goes_piece_by_piece():
    h, W, target = normal(5, 2, grad=True), normal(2 ** 21, 2, grad=True), torch.tensor([3, 1, 4, 1, 5])
    lengths = []
    def fn(logits, target):
        lengths.append(len(target))
        return [F.cross_entropy(logits, target, reduction="sum")]
    (found,) = sliced_loss(fn, [(h, W)], [target])
    assert lengths == [2, 2, 1]  # all in one slice: its product is not cut
    same_with_gradients(found, F.cross_entropy(h @ W.T, target, reduction="sum"), [h, W])

# ---- objective
TERMS = ("ce", "ce_t2s", "kd_t2s", "kd_s2t")

def by_chunk(q, k, s, t):
    """For `align`: attention where the numbers are equal, as a method's own alignment may be."""
    equal = s.chunk[:, :, None] == t.chunk[:, None, :]
    return cross_model_attention(q, k, equal & s.mask[:, :, None] & t.mask[:, None, :])

class Problem:
    """Three rows with the lengths of CHUNKS. `leaves` are all that may get a gradient."""
    def __init__(self, scale=None, d_s=4, d_t=3, V_s=5, V_t=7):
        torch.manual_seed(193)  # the argmax of q^{t->s} is right at some positions and wrong at others
        self.proj, self.scale = Projectors(d_s, d_t).double(), scale
        self.s, self.t = (dict(
            inputs=[torch.randint(V, (len(row),)) for row in chunk],
            targets=[torch.randint(V, (len(row),)) for row in chunk],
            hidden=[3 * normal(len(row), d) for row in chunk], chunk=[torch.tensor(row) for row in chunk])
            for V, d, chunk in ((V_s, d_s, S_CHUNK), (V_t, d_t, T_CHUNK)))
        self.E_s, self.E_t, self.W_s, self.W_t = (normal(V, d) for V, d in ((V_s, d_s), (V_t, d_t)) * 2)
        self.leaves = dict(self.proj.named_parameters(), W_s=self.W_s.requires_grad_())
        self.leaves |= {f"h_s.{b}": h.requires_grad_() for b, h in enumerate(self.s["hidden"])}
    def losses(self, rows=(0, 1, 2), garbage=NAN, extra=1, **options):
        sides, hidden = [], []
        for lists in (self.s, self.t):
            fields = {}
            for name, fill in (("inputs", 10 ** 6), ("targets", 10 ** 6), ("chunk", -1), ("hidden", garbage)):
                fields[name], mask = padded([lists[name][b] for b in rows], fill, extra)
            hidden.append(fields.pop("hidden"))
            real = mask.flatten().nonzero()[:, 0] if extra % 2 else None  # known already, or not
            sides.append(Side(mask=mask, real=real, **fields))
        self.h_block, self.s_mask, self.t_mask = hidden[0], sides[0].mask, sides[1].mask
        tables = [self.E_s, self.E_t]
        if self.scale is not None:  # as a model's own module that scales its table
            tables = [lambda ids, E=E: self.scale * E[ids] for E in tables]
        return dual_space_losses(self.proj, *sides, *hidden, *tables, self.W_s, self.W_t, **options)
    def oracle(self, b, align=None, div="skl", s2t_div="kl", temperature=2.0, skew=0.1, all_positions=False,
               normalise_queries=False, weights=(0.5, 0.5, 0.5, 0.5)):
        """Eqs. (1)-(9) for row b."""
        linear = lambda layer, x: x @ layer.weight.T + layer.bias
        embed = lambda table, ids: table[ids[b]] * (self.scale or 1)
        e_s_target, e_t_target = embed(self.E_s, self.s["targets"]), embed(self.E_t, self.t["targets"])
        h_s, h_t = self.s["hidden"][b], self.t["hidden"][b]
        q = linear(self.proj.query, torch.cat([embed(self.E_s, self.s["inputs"]), e_s_target], 1))
        q = q / q.std() if normalise_queries else q
        k = torch.cat([embed(self.E_t, self.t["inputs"]), e_t_target], 1)
        k, v_s2t = k / k.std(), linear(self.proj.s2t, h_s)
        v_t2s = linear(self.proj.t2s, h_t / h_t.std() + e_t_target / e_t_target.std())
        allowed = CHUNKS[b] if align else torch.ones_like(CHUNKS[b])
        a_t2s, a_s2t = slow_attention(q, k, allowed), slow_attention(k, q, allowed.T)
        z_s, z_t2s = h_s @ self.W_s.T, a_t2s @ v_t2s @ self.W_s.T.detach()
        z_t, z_s2t = h_t @ self.W_t.T, a_s2t @ v_s2t @ self.W_t.T
        f = lambda name, i, z_s, z_t: slow_divergence(name, z_s[[i]], z_t[[i]].detach(), temperature, skew)[0]
        out = dict.fromkeys(TERMS, 0 * z_s.sum()) | dict(q=q, k=k, a_t2s=a_t2s, a_s2t=a_s2t, n_correct=0)
        for i, gold in enumerate(self.s["targets"][b]):
            out["ce"] = out["ce"] - z_s[i].log_softmax(0)[gold]
            if allowed[i].any():
                first, second = z_t2s[i].topk(2).values
                assert first - second > 1e-3  # no near-tie, which another machine could see otherwise
                correct = z_t2s[i].argmax().item() == gold.item()
                out["n_correct"] += correct
                out["ce_t2s"] = out["ce_t2s"] - z_t2s[i].log_softmax(0)[gold]
                if correct or all_positions:
                    out["kd_t2s"] = out["kd_t2s"] + f(div, i, z_s, z_t2s)
        for j in range(len(h_t)):
            if allowed[:, j].any():
                out["kd_s2t"] = out["kd_s2t"] + f(s2t_div, j, z_s2t, z_t)
        out["loss"] = sum(weight * out[term] for weight, term in zip(weights, TERMS))
        return out

@pytest.mark.parametrize("scale", [None, 1.7])
@pytest.mark.parametrize("options", [
    dict(), dict(weights=(0.3, 0.7, 0.9, 0.4)), dict(align=by_chunk, normalise_queries=True),
    dict(align=by_chunk, all_positions=True), dict(div="akl", temperature=1.0, all_positions=True),
    dict(div="srkl", s2t_div="skl", skew=0.3), dict(max_logits=15)], ids=str)
def test_dual_space_losses(options, scale, monkeypatch):
    problem, options = Problem(scale), dict(options)
    if "max_logits" in options:  # slices of two positions
        sliced = lambda *args, max_logits=options.pop("max_logits"): sliced_loss(*args, max_logits=max_logits)
        monkeypatch.setattr(dskd_ga, "sliced_loss", sliced)
    leaves, rows = list(problem.leaves.values()), [problem.oracle(b, **options) for b in range(3)]
    assert 0 < sum(row["n_correct"] for row in rows) < sum(S_LENGTHS) - 1
    for batch, garbage, extra in (([0, 1, 2], 0.0, 0), ([0, 1, 2], NAN, 3), ([2, 0], INF, 2), ([1], 1e30, 1)):
        found, expected = problem.losses(batch, garbage, extra, **options), [rows[b] for b in batch]
        for name in ("loss", *TERMS, "n_correct"):
            total = torch.as_tensor(sum(row[name] for row in expected))
            same(found[name].double(), total.double())
            assert found[name].requires_grad == (name == "loss")
        loss = sum(row["loss"] for row in expected)
        *grads, block_grad = gradients(found["loss"], [*leaves, problem.h_block])
        same(tuple(grads), gradients(loss, leaves))
        assert (block_grad[~problem.s_mask] == 0).all()
        same_with_gradients(found["q"], padded([row["q"] for row in expected], 0, extra)[0], leaves)
        same(found["k"], padded([row["k"] for row in expected], 0, extra)[0])
        for name in ("a_t2s", "a_s2t"):
            same(found[name], padded_maps([row[name].detach() for row in expected], extra))
            assert not found[name].requires_grad

def test_gradient_routing():
    problem, disc = Problem(), Discriminator(6, hidden=5).double()
    constants = [x.requires_grad_() for x in (*problem.t["hidden"], problem.E_s, problem.E_t, problem.W_t)]
    leaves = problem.leaves | {f"D.{name}": p for name, p in disc.named_parameters()}
    student, routes = {"h_s", "W_s"}, {}
    for term, weights in zip(TERMS, torch.eye(4).tolist()):
        routes[term] = problem.losses(all_positions=True, weights=weights)["loss"]
    out, moved = problem.losses(), {}
    routes["ga"], _ = ga_loss(disc, out["q"], out["k"], problem.s_mask, problem.t_mask)
    for term, loss in routes.items():
        grads = gradients(loss, list(leaves.values()))
        moved[term] = {name.split(".")[0] for name, grad in zip(leaves, grads) if grad.any()}
    assert moved == dict(ce=student, ce_t2s={"query", "t2s"}, kd_t2s=student, kd_s2t={"h_s", "query", "s2t"},
                         ga={"query", "D"})
    (out["loss"] + out["q"].sum()).backward()
    assert not out["k"].requires_grad and all(tensor.grad is None for tensor in constants)

@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("align", [None, by_chunk])
def test_degenerate_batches_give_finite_gradients(align, autocast):
    # a row of one token, a row of none, equal keys everywhere; the teacher's logits are all equal as well
    proj, disc = Projectors(4, 3), Discriminator(6)
    s_mask, t_mask = (torch.arange(n) < torch.tensor([[1], [0], [n]]) for n in (2, 3))
    s, t = (Side(inputs=0 * mask.long(), targets=0 * mask.long(), mask=mask, chunk=number + 0 * mask.long())
            for mask, number in ((s_mask, -1), (t_mask, -2)))  # and no chunk at all
    h_s, W_s = torch.randn(3, 2, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    h_t = torch.ones(3, 3, 3, dtype=torch.bfloat16 if autocast else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = dual_space_losses(proj, s, t, h_s, h_t, torch.ones(5, 4), torch.ones(7, 3), W_s,
                                torch.ones(7, 3), align=align, all_positions=True)
        loss = out["loss"] + ga_loss(disc, out["q"], out["k"], s_mask, t_mask)[0]
    loss.backward()
    assert loss.isfinite() and h_s.grad[1].eq(0).all()
    for leaf in (h_s, W_s, *proj.parameters(), *disc.parameters()):
        assert leaf.grad is None or leaf.grad.isfinite().all()

# ---- data
def byte_level(front=""):
    """A tokenizer of single bytes; end of text is its id 0; it puts the special token `front` in front."""
    end, alphabet = "<|endoftext|>", sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([end, *alphabet])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(ids, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    if front:
        bpe.add_special_tokens([front])
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{front} $A {end}", special_tokens=[(front, bpe.token_to_id(front)), (end, 0)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end)

PLAIN = byte_level()

def write_lines(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return str(path)

def test_rows_take_their_prompt_or_the_template(tmp_path):
    rows = dskd_ga.read_rows(write_lines(
        tmp_path / "rows.jsonl", b"\xef\xbb\xbf",
        '{"prompt": "P", "instruction": "I", "output": "a"}\r\n',
        '{"instruction": "I", "input": null, "output": ["a", "b"]}\n',
        '{"instruction": "I", "input": "C", "output": "\u2028 \\ud83d\\ude00\\u0000"}\n', "\n"))
    task = "Below is an instruction that describes a task"
    request = "Write a response that appropriately completes the request.\n\n### Instruction:\nI\n\n"
    paired = f"{task}, paired with an input that provides further context. {request}### Input:\nC\n\n"
    assert rows == [("P", ["a"]), (f"{task}. {request}### Response:\n", ["a", "b"]),
                    (f"{paired}### Response:\n", ["\u2028 😀\0"])]

def test_texts_are_composed_where_rows_are_read(tmp_path):
    fields = dict(instruction="한국 é", input="が", output=["한국어", "ñ ½"])
    line = json.dumps(fields, ensure_ascii=False)
    loose = unicodedata.normalize("NFD", line)
    rows = dskd_ga.read_rows(write_lines(tmp_path / "rows.jsonl", line, "\n", loose))
    assert loose != line and rows[0] == rows[1] and rows[0].references == fields["output"]

@pytest.mark.parametrize("line, named", [
    ('{"prompt": "P", "output": "a"', "line 2"), (b'{"prompt": "P", "output": "\xff"}', "line 2"),
    ("[" * 100000, "line 2"), ("\n{}", "line 2"), ('{"prompt": "P", "output": "\\ud83d"}', "line 2"),
    ("[1]", "line 2"), ('{"output": "a"}', "line 2, instruction"),
    ('{"prompt": "", "output": "a"}', "line 2, prompt"), ('{"prompt": 3, "output": "a"}', "line 2, prompt"),
    ('{"instruction": "I", "input": 3, "output": "a"}', "line 2, input"),
    ('{"instruction": "I", "input": false, "output": "a"}', "line 2, input"),
    ('{"prompt": "P"}', "line 2, output"), ('{"prompt": "P", "output": []}', "line 2, output"),
    ('{"prompt": "P", "output": ["a", ""]}', "line 2, output"),
    ('{"prompt": "P", "output": ["a", 1]}', "line 2, output")], ids=lambda x: str(x)[:50])
def test_a_bad_row_is_named(tmp_path, line, named):
    path = write_lines(tmp_path / "rows.jsonl", '{"prompt": "P", "output": "a"}\n', line, "\n")
    with pytest.raises(InputError, match=f"{path}, {named}") as caught:
        dskd_ga.read_rows(path)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    assert dskd_ga.read_rows(path, limit=1) == [("P", ["a"])]  # rows that are not wanted are not judged
    with pytest.raises(InputError, match=path):
        dskd_ga.read_rows(write_lines(tmp_path / "rows.jsonl", "\n"))  # a file without a row

@pytest.fixture(scope="session")
def two_tokenizers(case):
    return [hf.AutoTokenizer.from_pretrained(case / name) for name in ("student", "teacher")]

letters = st.one_of(st.characters(codec="utf-8"), st.sampled_from("a é\u0301😀你\u200f\0\u2028\r\n0"))
texts = st.text(letters, min_size=1, max_size=30).map(functools.partial(unicodedata.normalize, "NFC"))

@hypothesis.settings(max_examples=100, deadline=None, database=None, derandomize=True)
@hypothesis.given(texts, texts, st.integers(1, 60))
def test_any_text_is_cut_into_tokens_of_itself(two_tokenizers, prompt, output, max_length):
    for pair in pairs([Row(prompt, [output])], two_tokenizers, 50, max_length):
        for tokenizer, example in zip(two_tokenizers, pair):
            assert example.start < len(example.ids) <= max_length
            assert tokenizer.decode(example.ids[:example.start]) == prompt
            text = tokenizer.decode(example.ids[example.start:])
            cut = output.startswith(text.rstrip("\ufffd")) and len(example.ids) == max_length
            assert text == output + "<|endoftext|>" or cut

def test_pairs_are_the_rows_within_the_limits(two_tokenizers, case):
    two_tokenizers = [hf.AutoTokenizer.from_pretrained(tok.name_or_path) for tok in two_tokenizers]  # unused
    state = lambda: [(tok.backend_tokenizer.to_str(), tok.padding_side) for tok in two_tokenizers]
    before, asked, rows = state(), [], dskd_ga.read_rows(str(case / "seen.jsonl"), 40)
    sizes = [[len(tok(row.prompt)["input_ids"]) for tok in two_tokenizers] for row in rows]
    max_prompt = sorted(s for s, _ in sizes)[20]
    max_length = max_prompt + 3
    fitting = [row for row, (s, t) in zip(rows, sizes) if s <= max_prompt and max(s, t) < max_length]
    def annotate(row, s, t, given):
        assert given == two_tokenizers
        asked.append(row)
        return [[len(asked)] * (len(example.ids) - example.start) for example in (s, t)]
    found = pairs(rows, two_tokenizers, max_prompt, max_length, annotate)
    assert asked == fitting and 0 < len(found) == len(fitting) < len(rows)
    for number, (row, pair) in enumerate(zip(fitting, found), 1):
        for tokenizer, example in zip(two_tokenizers, pair):
            prompt, response = (tokenizer(text)["input_ids"] for text in (row.prompt, row.references[0]))
            ids = [*prompt, *response, tokenizer.eos_token_id][:max_length]
            assert example[:3] == (ids, len(prompt), [number] * (len(ids) - len(prompt)))
    assert all(pair.t is None and pair.s.chunk is None for pair in pairs(rows, two_tokenizers[:1]))
    assert state() == before  # no truncation or padding of ours is left in a tokenizer

def test_special_tokens_come_once_and_only_from_the_tokenizer():
    leading = byte_level(front="<s>")
    bos, end = leading.convert_tokens_to_ids("<s>"), "<|endoftext|>"
    byte = lambda text: [PLAIN.convert_tokens_to_ids(letter) for letter in text]
    for tokenizer, prompt, output, ids, start in (
            (PLAIN, "P", f"a{end}", byte("Pa"), 1),                # the end of text is there already
            (PLAIN, "P", f"a{end}b", byte(f"Pa{end}b"), 1),        # within a response it is plain text
            (leading, "P", "a", [bos, *byte("Pa")], 2),            # none in front of the response
            (leading, "<s>P", "a<s>", [bos, *byte("Pa<s>")], 2)):  # the prompt has it already
        (pair,) = pairs([Row(prompt, [output])], [tokenizer])
        assert (pair.s.ids, pair.s.start) == ([*ids, 0], start), (prompt, output)

def test_an_epoch_is_a_partition_into_sorted_steps():
    lengths = random.Random(0).choices(range(5, 90), k=103)
    data = [dskd_ga.Pair(Example([row] * length, 1)) for row, length in enumerate(lengths)]
    plan_epoch = functools.partial(dskd_ga.plan_epoch, data, 8)
    plan, coarse = plan_epoch(2, 1, 0), plan_epoch(8, 1, 0)
    steps = [[pair.s.ids for pair in sum(step, [])] for step in plan]
    assert [len(step) for step in plan] == [4] * 12 and len({ids[0] for ids in sum(steps, [])}) == 96
    assert all(step == sorted(step, key=len) for step in steps)
    assert plan == plan_epoch(2, 1, 0) and plan not in (plan_epoch(2, 1, 1), plan_epoch(2, 2, 0))
    assert [[pair.s.ids for pair in step[0]] for step in coarse] == steps

def test_a_batch_reads_and_predicts_the_right_tokens():
    hidden = [torch.ones(3, 2), 2 * torch.ones(2, 2)]
    examples = [Example([1, 2, 3, 4, 5], 2, [0, 1, 2], hidden[0]), Example([6, 7, 8], 1, [0, -1], hidden[1])]
    side = dskd_ga.collate(examples, CPU)
    assert side.ids[0].tolist() == [1, 2, 3, 4] and side.ids[1, :3].tolist() == [6, 7, 8]
    assert side.mask.tolist() == [[True] * 3, [True, True, False]]
    expected = dict(pos=[1, 2, 3, 0, 1], inputs=[2, 3, 4, 6, 7], targets=[3, 4, 5, 7, 8],
                    chunk=[0, 1, 2, 0, -1])
    for known in (side, side._replace(real=None)):
        for name, values in expected.items():
            assert dskd_ga.at_real(getattr(side, name), known).tolist() == values
        assert torch.equal(dskd_ga.at_real(side.hidden, known), torch.cat(hidden))
    assert side.chunk[1, 2] < 0
    bare = dskd_ga.collate([Example(example.ids, example.start) for example in examples], CPU)
    assert bare.chunk is None and bare.hidden is None

# ---- models
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=260)
GROUPED = SMALL | dict(num_key_value_heads=1)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
              linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"])
FAMILIES = dict(
    gpt2=lambda: hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=260),
    llama=lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=False),
    qwen2=lambda: hf.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    one_id_more=lambda: hf.Qwen2Config(**GROUPED | dict(vocab_size=len(PLAIN) - 1)),  # in the tokenizer
    gemma3=lambda: hf.Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=8),
    vision=lambda: hf.Gemma3Config(
        text_config=GROUPED | dict(head_dim=16, sliding_window=8), mm_tokens_per_image=4,
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                           image_size=28, patch_size=14), image_token_index=257),
    neox=lambda: hf.GPTNeoXConfig(**SMALL),
    opt=lambda: hf.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32),
    bloom=lambda: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=260),
    mamba=lambda: hf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=260),
    jamba=lambda: hf.JambaConfig(**GROUPED, mamba_d_state=8, num_experts=2, num_experts_per_tok=1,
                                 attn_layer_period=2, attn_layer_offset=1),
    lfm2=lambda: hf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"], block_multiple_of=8),
    qwen3_5=lambda: hf.Qwen3_5TextConfig(**GROUPED, **LINEAR, head_dim=16))

def write_model(folder, config):
    """A folder of a model with these settings, and of the tokenizer of bytes."""
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # a bias that is zero, or a head like its embeddings, would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    PLAIN.save_pretrained(folder)
    return str(folder)

@pytest.mark.parametrize("family", FAMILIES)
def test_trunk_and_head_give_the_models_own_logits(family, tmp_path):
    model, _ = dskd_ga.load_model(write_model(tmp_path, FAMILIES[family]()), CPU)
    examples = [Example(torch.randint(256, (n,)).tolist(), start) for n, start in ((12, 5), (7, 1), (20, 18))]
    side = dskd_ga.collate(examples, CPU)
    logits = dskd_ga.response_hidden(model, side) @ dskd_ga.head_of(model).T
    for row, example, mask in zip(logits, examples, side.mask):
        own = model(input_ids=torch.tensor([example.ids])).logits[0, example.start - 1:-1]
        assert (row[mask] - own).abs().max() < 1e-3 * own.abs().max()
    # everything that is trained gets a gradient: several processes need that. A vision tower is not trained
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(logits[side.mask].square().sum(), list(trained.values()), allow_unused=True)
    assert [name for name, grad in zip(trained, grads) if grad is None] == []
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"vision_tower", "multi_modal_projector"} if family == "vision" else set())

WRONG = {  # models that are not what the equations need, and what the refusal says
    "bias": (lambda: hf.PhiConfig(**SMALL), "bias"),
    "cap": (lambda: hf.Gemma2Config(**GROUPED, head_dim=16), "cap|logits"),
    "scale": (lambda: hf.CohereConfig(**SMALL, logit_scale=0.5), "logits"),
    "trunk elsewhere": (lambda: hf.ModernBertDecoderConfig(**SMALL, decoder_bias=False), None),
    "padded rows differ": (lambda: hf.RwkvConfig(
        hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, vocab_size=260), "padd|alone"),
    "padded rows differ, again": (lambda: hf.RecurrentGemmaConfig(
        **GROUPED, lru_width=32, block_types=["recurrent", "attention"]), "padd|alone")}
SPOILT = dict(tokenizer="tokenizer", pickle=None, cut=None, missing="layers.1.mlp", nan="nan",
              awq="(?i)awq|quanti", gptq="(?i)gptq|quanti", fp8="(?i)fp8|quanti")

def spoil(folder, how):
    path, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    weights = safetensors.torch.load_file(path)
    if how == "tokenizer":
        for file in folder.glob("token*"):
            file.unlink()
    elif how == "pickle":
        torch.save(weights, folder / "pytorch_model.bin")
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-99])
    elif how in ("missing", "nan"):
        changed = weights.pop("model.layers.1.mlp.up_proj.weight")
        if how == "nan":
            weights["model.layers.1.mlp.up_proj.weight"] = changed * NAN
        safetensors.torch.save_file(weights, path, dict(format="pt"))
    else:
        config["quantization_config"] = dict(quant_method=how, bits=4, group_size=32)
        (folder / "config.json").write_text(json.dumps(config))

@pytest.mark.parametrize("kind", [*WRONG, *SPOILT])
def test_models_that_would_fail_or_be_wrong_are_refused(kind, tmp_path, monkeypatch):
    config, reason = WRONG[kind] if kind in WRONG else (FAMILIES["qwen2"], SPOILT[kind])
    source = write_model(tmp_path / "model", config())
    if kind in SPOILT:
        spoil(tmp_path / "model", kind)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("a stranger's pickle was read"))
    with pytest.raises(InputError, match=reason) as caught:
        dskd_ga.load_model(source, CPU)
    assert source in str(caught.value)

def test_a_loaded_model_samples_as_evaluated_and_keeps_its_own_settings(tmp_path):
    source = write_model(tmp_path / "model", FAMILIES["gpt2"]())
    own = dict(temperature=0.6, top_k=20, top_p=0.9, repetition_penalty=1.3, eos_token_id=[5, 6])
    write_lines(tmp_path / "model/generation_config.json", json.dumps(own))
    model, _ = dskd_ga.load_model(source, CPU)
    model.save_pretrained(tmp_path / "best")
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "best").generation_config
    assert found.do_sample is True and (found.temperature, found.top_p, found.top_k) == (1.0, 1.0, 0)
    assert found.eos_token_id in (0, [0]) and found.repetition_penalty == 1.3

# ---- the model that is trained
def distiller(case, *flags):
    """`Distiller` of the demo's models, in float64, without dropout; and the tokenizers."""
    student, s_tokenizer = dskd_ga.load_model(str(case / "student"), CPU)
    teacher, t_tokenizer = dskd_ga.load_model(str(case / "teacher"), CPU)
    teacher, args = teacher.double().requires_grad_(False), dskd_ga.build_parser().parse_args(flags)
    parts = types.SimpleNamespace(
        embeddings=teacher.get_input_embeddings(), head=dskd_ga.head_of(teacher), model=teacher)
    model = dskd_ga.Distiller(student, None if args.method == "sft" else parts, args)
    return model.double().eval(), [s_tokenizer, t_tokenizer]

def counts(data):
    return [sum(len(example.ids) - example.start for example in side) for side in zip(*data)]

def test_padding_and_the_cut_into_micro_batches_change_nothing(case):
    model, toks = distiller(case, "--ga", "--kq-weight", "0.7")
    student, teacher = model.student, model.teacher.model
    rows = pairs(dskd_ga.read_rows(str(case / "raw.jsonl"), 20), toks)
    data = dskd_ga.read_once(model.teacher, rows, CPU)
    assert model.teacher.model is None and [pair.s for pair in data] == [pair.s for pair in rows]
    for pair in data:  # what the trunk gives on each row alone
        alone = teacher.model(input_ids=torch.tensor([pair.t.ids])).last_hidden_state[0]
        same(pair.t.hidden, alone[pair.t.start - 1:-1])
    n_s, n_t = counts(data[:6])
    results = []
    for micro_batches in ([range(6)], [[3, 0], [5, 4], [2, 1]], [[i] for i in range(6)]):
        model.zero_grad()
        total = torch.zeros(())
        for rows in micro_batches:
            s = dskd_ga.collate([data[row].s for row in rows], CPU)
            t = dskd_ga.collate([data[row].t for row in rows], CPU)
            loss, terms = model(s, t, n_s, n_t)
            loss.backward()
            total = total + loss.detach()
        results.append([total, *(p.grad for p in model.parameters())])
    same(results[1:], results[:1] * 2, 1e-9)
    # eq. (16), of a step of which the last row is one of six
    out = dual_space_losses(
        model.proj, s, t, dskd_ga.response_hidden(student, s), t.hidden, student.get_input_embeddings(),
        model.teacher.embeddings, dskd_ga.head_of(student), model.teacher.head)
    kq, kq_terms = ga_loss(model.disc, out["q"], out["k"], s.mask, t.mask, n_s, n_t)
    same(loss, out["loss"] / n_s + 0.7 * kq)
    for name in (*TERMS, "n_correct"):
        same(terms[name], out[name] / n_s)
    for name, value in kq_terms.items():
        same(terms[name], value / (n_t if name.endswith("_k") else n_s))

def test_sft_is_the_cross_entropy_of_the_responses(case):
    model, toks = distiller(case, "--method", "sft")
    data = pairs(dskd_ga.read_rows(str(case / "raw.jsonl"), 3), toks[:1])
    (n_s,), expected = counts([[pair.s] for pair in data]), 0
    for pair in data:
        log_p = model.student(input_ids=torch.tensor([pair.s.ids])).logits[0].log_softmax(-1)
        expected -= sum(log_p[i - 1, pair.s.ids[i]] for i in range(pair.s.start, len(pair.s.ids))) / n_s
    loss, _ = model(dskd_ga.collate([pair.s for pair in data], CPU), None, n_s, 0)
    same_with_gradients(loss, expected, list(model.parameters()))

def test_every_parameter_is_in_one_group_and_moves(case):
    model, toks = distiller(case, "--ga", "--lr", "0.02", "--lr-projectors", "0.03")
    optimizer = dskd_ga.optimizer_for(model, model.args)
    for name, p in model.named_parameters():
        (group,) = [group for group in optimizer.param_groups if any(p is other for other in group["params"])]
        assert group["weight_decay"] == (0.01 if p.ndim > 1 else 0)
        group["lr"] = group["peak"]
        assert group["peak"] == (0.02 if name.startswith("student.") else 0.03)
    before = [p.detach().clone() for p in model.parameters()]
    data = pairs(dskd_ga.read_rows(str(case / "raw.jsonl"), 4), toks)
    s, t = (dskd_ga.collate(side, CPU) for side in zip(*data))
    t = t._replace(hidden=dskd_ga.response_hidden(model.teacher.model, t))
    model(s, t, *counts(data))[0].backward()
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before):
        assert p.grad.any() and not torch.equal(p, old), name
    assert all(p.grad is None for p in model.teacher.model.parameters())

# ---- evaluation
def test_rouge_l_by_hand():
    # longest common subsequence "the cat" (stemmed): precision 2/3, recall 2/4, F1 4/7
    predictions = ["the cats ran", "A, b!", ""]
    found = rouge_l(predictions, [["nothing", "the cat sat down"], ["a b"], ["text"]])
    assert isinstance(found, list) and found == pytest.approx([400 / 7, 100, 0])
    with pytest.raises(ValueError):
        rouge_l(["a"], [["a"], ["b"]])

# ---- documents
SOURCE = pathlib.Path(dskd_ga.__file__).read_text()

def test_documented_commands_parse():
    parser, commands = dskd_ga.build_parser(), []
    for text in (dskd_ga.__doc__, (HERE / "README.md").read_text(), (HERE / "run.sh").read_text()):
        commands += re.findall(r"(?:python|torchrun)\b.* dskd_ga\.py( .*)$", text.replace("\\\n", " "), re.M)
    for command in commands:
        plain = re.sub(r"\$(\w+|@|\{.*?\}|\(.*?\))", "1", re.split(r" #|[;&|>]", command)[0])
        words = shlex.split(plain)  # a 1 is a flag's value, or flags that are not shown
        words = [word for last, word in zip(["", *words], words) if word != "1" or last.startswith("--")]
        if not {"-h", "--help"} & set(words):
            parser.parse_args(words)
    assert len(commands) > 5

def test_the_file_keeps_its_shape():
    lines, tree = SOURCE.splitlines(), ast.parse(SOURCE)
    assert len(lines) <= 900 and max(map(len, lines)) <= 110
    comprehensions = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
    docs = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 90, node.name
        if isinstance(node, comprehensions):
            inner = [x for x in ast.walk(node) if isinstance(x, comprehensions)]
            assert inner == [node], f"line {node.lineno}: a comprehension in another"
    tokens = tokenize.generate_tokens(io.StringIO(SOURCE).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    code = {n for n, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#")}
    expressions = sum(isinstance(node, ast.expr) for node in ast.walk(tree))
    assert expressions / len(code - docs) <= 7.0 and len(comments) >= 0.12 * len(lines)

def test_importing_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dskd_ga.py", "--nonsense"])
    state = lambda: (random.getstate(), torch.get_rng_state().tolist(), torch.get_default_dtype(),
                     torch.distributed.is_initialized(), dict(os.environ))
    before = state()
    runpy.run_path(dskd_ga.__file__, run_name="imported")
    assert state() == before and capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())

# ---- runs
def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

@pytest.fixture(scope="session")
def small(case, tmp_path_factory):
    """The demo's models and 40 of its rows. The student has dropout and settings of its own, `still` none."""
    folder = tmp_path_factory.mktemp("small") / "small"
    shutil.copytree(case, folder)
    shutil.copytree(case / "student", folder / "still")
    (folder / "raw.jsonl").write_text("".join(open(case / "raw.jsonl").readlines()[:40]))
    edit_json(folder / "student" / "config.json", resid_pdrop=0.2, attn_pdrop=0.2)
    edit_json(folder / "student" / "generation_config.json", repetition_penalty=1.2, do_sample=True, top_k=7)
    edit_json(folder / "still" / "config.json", resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
    return folder

def flags(small, folder, /, **settings):
    """The command line of a run of 8 steps; settings override, None leaves a flag out."""
    base = dict(student=small / "student", teacher=small / "teacher", teacher_ready=True, teacher_epochs=1,
                data=small, dev_rows=8, batch_size=8, micro_batch=4, epochs=2, save_every=3, dev_samplings=1,
                tests=[f"{name}={small}/{name}.jsonl" for name in ("seen", "longer")], eval_limit=4,
                eval_batch=2, eval_seeds=[10, 20], max_new_tokens=8, out=folder)
    words = []
    for name, value in (base | settings).items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [] if value is None else ["--" + name.replace("_", "-"), *map(str, values)]
    return words

def run(small, out, **settings):
    """Runs it in this process; returns the run's folder."""
    return pathlib.Path(dskd_ga.main(flags(small, out, **settings))["model"]).parent
def log(folder):
    """The lines of its log, which are JSON (nan is none), without what depends on the machine."""
    lines = [json.loads(line, parse_constant=pytest.fail) for line in open(folder / "log.jsonl")]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "memory_gb")} for line in lines]
steps = lambda folder: [line["step"] for line in log(folder) if "loss" in line]
state_of = lambda folder: torch.load(folder / "state.pt", weights_only=True)
def scores(folder):
    """Means by set and sampling seed, and each row's scores."""
    rows = {path.name: json.loads(path.read_text())["rougeL"] for path in (folder / "predictions").iterdir()}
    return json.loads((folder / "eval.json").read_text())["rougeL"], rows

def weights(folder, **changes):
    """A model's weights by name; those with other entries are written: name=(index, change)."""
    found = safetensors.torch.load_file(folder / "model.safetensors")
    for name, (index, change) in changes.items():
        found[name][index] += change
        safetensors.torch.save_file(found, folder / "model.safetensors", dict(format="pt"))
    return found
def different(a, b):
    """Names of tensors that are not the same, bit by bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]

def same_end(found, whole):
    """Both runs have ended in the same weights, and have said the same on the way."""
    a, b = state_of(found), state_of(whole)
    assert a["reached"][:2] == b["reached"][:2] and not different(a["model"], b["model"])
    assert not different(weights(found / "best"), weights(whole / "best"))
    assert log(found) == log(whole) and scores(found) == scores(whole)
    assert sorted(os.listdir(found)) == sorted(os.listdir(whole))

class Child(multiprocessing.get_context("fork").Process):
    """A copy of this process that runs a command line, after `prepare` has broken something in it."""
    def __init__(self, command, prepare=bool, main=dskd_ga.main, **environment):
        super().__init__(daemon=True)
        self.command, self.prepare, self.main, self.environment = command, prepare, main, environment
        reading, self.writing = os.pipe()
        self.start()
        os.close(self.writing)
        self.errors = os.fdopen(reading)

    def run(self):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(self.writing, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(self.environment)
        self.prepare()
        self.main(self.command)

    def wait(self, seconds=60):
        """Its exit status, negative if a signal has ended it."""
        self.join(seconds)
        assert not self.is_alive(), f"it runs for more than {seconds} s"
        return self.exitcode

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])
def pair(command, prepare=(bool, bool)):
    """Two `Child`ren that run it together, as two processes of torchrun."""
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    return [Child(command, prepare[n], RANK=str(n), LOCAL_RANK=str(n), **shared) for n in (0, 1)]

def broken(owner, name, call, action, after=False):
    """For `prepare`: the owner's function does the action before its call of this number, or after it."""
    function, calls = getattr(owner, name), itertools.count(1)
    def wrapper(*args, **settings):
        now = next(calls) == call
        if now and not after:
            action(*args)
        result = function(*args, **settings)
        if now and after:
            action(*args)
        return result
    return mock.patch.object(owner, name, wrapper).start

die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cut_and_die = lambda _, file: (os.truncate(file.name, 1000), die())  # a part of the file has been written
spoil_gradient = lambda model, *_: next(model.parameters()).grad.fill_(NAN)
disk_is_full = lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # no file gets longer

def refused(capsys, command):
    """What is said of a command that is refused: one line."""
    handler = logging.getLogger("transformers").handlers[0]  # it would write beside what is captured
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped, mock.patch.object(handler, "stream", sys.stderr):
        dskd_ga.main(command)
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and re.fullmatch("dskd_ga.py: .*\n", errors), errors
    return errors

TORCHRUN = dict(main=torch.distributed.run.main, OMP_NUM_THREADS="1")
GA = dict(ga=True, all_positions=True)  # without the choice of positions by argmax, which may be a near-tie
# a line a step, and dev scores that are all equal
steady = mock.patch.multiple(dskd_ga, LOG_EVERY=1, rouge_l=lambda texts, references: [50.0] * len(texts))
# with models without dropout: whatever is cut otherwise computes the same
still = mock.patch.object(
    dskd_ga.Distiller, "adversary", functools.partial(dskd_ga.Discriminator, dropout=0.0))

@pytest.fixture(scope="session")
def runs(small, tmp_path_factory):
    """The folders of three whole runs."""
    folder = tmp_path_factory.mktemp("runs")
    found = types.SimpleNamespace(plain=run(small, folder / "plain", **GA))
    with steady:
        found.steady = run(small, folder / "steady", **GA)
    with still:
        found.still = run(small, folder / "still", student=small / "still", save_every=1, **GA)
    return found

def same_log(found, expected, tolerance=1e-5, ties=0.02):
    """ties: what counts of near-ties, which may fall to either side, may differ by."""
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for a, b in zip(found, expected):
        for name in a.keys() - {"dev_rougeL"}:
            slack = ties if name in ("n_correct", "accuracy_q", "accuracy_k") else 0
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=slack), (a["step"], name)

@pytest.mark.parametrize("micro_batch", [8, 1])
@still
def test_the_cut_into_micro_batches_changes_nothing(small, runs, tmp_path, micro_batch):
    settings = dict(student=small / "still", save_every=1, micro_batch=micro_batch, **GA)
    same_log(log(run(small, tmp_path, **settings)), log(runs.still))

@still
def test_half_precision_trains_as_float32_does(small, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(dskd_ga, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    settings = dict(student=small / "still", save_every=1, **GA)
    found, expected = log(run(small, tmp_path, **settings)), log(runs.still)
    assert found[0]["ce"] != expected[0]["ce"]  # the products were done in halves
    same_log(found, expected, 0.05, 0.1)

def test_processes_on_two_nodes_change_nothing(small, runs, tmp_path):
    # two processes on one node: see the runs that are killed. A micro-batch has its dropout wherever it is.
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
    command = ["--nnodes=2", "--nproc_per_node=1", *meeting, dskd_ga.__file__, *flags(small, tmp_path, **GA)]
    nodes = [Child(command, **TORCHRUN) for _ in range(2)]
    assert [node.wait(120) for node in nodes] == [0, 0], nodes[0].errors.read()
    same_log(log(tmp_path / "cma-ga-skl-10"), log(runs.plain))

# ---- what a run writes
def test_a_run_writes_what_a_user_needs(small, runs):
    files = sorted(os.listdir(runs.plain))
    assert files == ["args.json", "best", "eval.json", "log.jsonl", "predictions", "state.pt"]
    args = json.loads((runs.plain / "args.json").read_text())
    assert args["args"]["teacher"] == str(small / "teacher") and args["identity"]["lr"] == 5e-4
    lines = [line for line in log(runs.plain) if "loss" in line]
    assert [line["step"] for line in lines] == [3, 4, 6, 8] and len(log(runs.plain)) == 6  # two of dev scores
    terms = ("ce", "ce_t2s", "kd_t2s", "kd_s2t", "D_q", "D_k", "accuracy_q", "accuracy_k", "n_correct")
    for line in lines:
        assert line.keys() == {"step", "loss", "lr", "grad_norm", "tokens", *terms}
        share = (1 + math.cos(math.pi * (line["step"] - 1) / 8)) / 2
        assert line["lr"] == pytest.approx(1e-7 + (5e-4 - 1e-7) * share)
        assert all(0 <= line[name] <= 1 for name in terms[4:])
        kq = line["loss"] - 0.5 * sum(line[name] for name in terms[:4])
        assert 0.5 < kq < 1.7  # -log D(q) - log(1 - D(k)), which starts near 2 log 2
    assert {"tokens_per_s", "memory_gb"} < json.loads(open(runs.plain / "log.jsonl").readline()).keys()
    # a line is the mean of the steps since the last one: `steady` is the same run with a line a step
    each = [line for line in log(runs.steady) if "loss" in line]
    for name in ("ce", "kd_s2t", "loss", "D_k", "tokens"):
        assert lines[0][name] == pytest.approx(sum(line[name] for line in each[:3]) / 3)
        assert lines[1][name] == each[3][name]
    # students with and without dropout read the same rows at step 1
    assert each[0]["ce"] != pytest.approx(log(runs.still)[0]["ce"], rel=1e-4)
    state = state_of(runs.plain)
    assert state["optimizer"] is None and state["reached"][0] == 8
    assert not different(state["model"], state_of(runs.steady)["model"])

def test_best_is_used_as_it_was_evaluated(small, runs):
    best = runs.plain / "best"
    model, tokenizer = (kind.from_pretrained(best) for kind in (
        transformers.AutoModelForCausalLM, transformers.AutoTokenizer))
    settings, end = model.generation_config, tokenizer.eos_token_id
    assert (settings.do_sample, settings.temperature, settings.top_p, settings.top_k) == (True, 1.0, 1.0, 0)
    assert settings.repetition_penalty == 1.2  # the student's own
    for name in ("tokenizer.json", "tokenizer_config.json"):
        found, own = (json.loads((folder / name).read_text()) for folder in (best, small / "student"))
        for key in ("truncation", "padding", "truncation_side", "padding_side", "pad_token"):
            assert found.get(key) == own.get(key), key
    dskd_ga.Projectors(64, 160).load_state_dict(torch.load(best / "projectors.pt", weights_only=True))
    # it stops at the end of text: after three tokens, where all others are forbidden
    calls, others = itertools.count(), torch.arange(len(tokenizer)) != end
    forced = lambda ids, logits: logits if next(calls) < 3 else logits.masked_fill(others, -INF)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = pipe("Task: Count on from 5\nAnswer:\n", logits_processor=[forced], return_tensors=True)
    assert next(calls) <= 4 and found[0]["generated_token_ids"][-1] == end

def test_scores_are_those_of_the_predictions(small, runs):
    means, rows = scores(runs.plain)
    assert list(means) == ["seen", "longer", "OOD", "All"] and len(rows) == 4
    for name in ("seen", "longer"):
        tested = dskd_ga.read_rows(small / f"{name}.jsonl", 4)
        for seed, mean in zip((10, 20), means[name], strict=True):
            found = json.loads((runs.plain / "predictions" / f"{name}-{seed}.json").read_text())
            assert [dskd_ga.Row(*row) for row in found["rows"]] == tested
            by_row = dskd_ga.rouge_l(found["texts"], [row.references for row in tested])
            assert found["rougeL"] == by_row and mean == pytest.approx(sum(by_row) / 4)

@pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's
def test_a_checkpoint_alone_is_evaluated_as_in_its_run(small, runs, tmp_path, monkeypatch, capsys):
    command = dict(eval_only=runs.plain / "best")
    dskd_ga.main(flags(small, tmp_path / "one", **command))
    assert [child.wait() for child in pair(flags(small, tmp_path / "two", **command))] == [0, 0]
    for name in ("one", "two"):
        assert scores(tmp_path / name / "cma-ga-skl-10-best") == scores(runs.plain)
    # without sampling: once, and what transformers finds
    greedy = dict(eval_temperature=0, eval_batch=1, no_repeat_ngram=0, **command)
    dskd_ga.main(flags(small, tmp_path / "greedy", **greedy))
    means, rows = scores(tmp_path / "greedy/cma-ga-skl-10-best")
    assert list(rows) == ["longer-10.json", "seen-10.json"] and {len(values) for values in means.values()} == {1}
    texts = json.loads((tmp_path / "greedy/cma-ga-skl-10-best/predictions/seen-10.json").read_text())["texts"]
    model, tokenizer = dskd_ga.load_model(runs.plain / "best", CPU)
    for row, text in zip(dskd_ga.read_rows(small / "seen.jsonl", 4), texts, strict=True):
        ids = tokenizer(row.prompt, return_tensors="pt")["input_ids"]
        (found,) = model.generate(ids, do_sample=False, max_new_tokens=8)
        assert tokenizer.decode(found[ids.shape[1]:], skip_special_tokens=True) == text
    # means over sets by hand; one sampling has no spread, and says so without a warning
    def number_of_rows(model, tokenizer, rows, *_):
        settings = model.generation_config
        assert (settings.do_sample, settings.temperature, settings.no_repeat_ngram_size) == (True, 0.5, 6)
        return [""] * len(rows), [len(rows)] * len(rows)
    monkeypatch.setattr(dskd_ga, "respond", number_of_rows)
    for n in (1, 2, 6):
        (tmp_path / str(n)).write_text('{"prompt": "a", "output": "b"}\n' * n)
    command |= dict(eval_temperature=0.5, eval_seeds=5, tests=[f"t{n}={tmp_path}/{n}" for n in (1, 2, 6)], eval_limit=None)
    capsys.readouterr()
    result = dskd_ga.main(flags(small, tmp_path, **command))
    assert result["rougeL"] == dict(t1=[1], t2=[2], t6=[6], OOD=[4], All=[3])
    assert capsys.readouterr().out.count("± 0.00") == 5

def test_dev_rows_over_the_limit_of_prompts_are_evaluated(small, tmp_path):
    rows = [json.loads(line) for line in open(small / "raw.jsonl")]
    for row in rows[:8]:
        row["prompt"] *= 9
    (tmp_path / "raw.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = run(small, tmp_path, method="sft", data=tmp_path, max_prompt=60, epochs=1, clip=0)
    (score,) = [line["dev_rougeL"] for line in log(folder) if "dev_rougeL" in line]
    assert 0 <= score <= 100 and steps(folder) == [3, 4]
    assert weights(folder / "best")["transformer.ln_f.bias"].any()  # --clip 0 does not stop the training

# ---- killed, and gone on with
@steady
def test_a_run_killed_at_any_moment_ends_in_the_same_weights(small, runs, tmp_path):
    for step, *moment in (  # the step of its state then; each goes on from the one before
            (0, dskd_ga, "response_hidden", 2, die),   # the teacher reads its second batch
            (0, torch, "save", 1, cut_and_die, True),  # the state of step 3 is written in part
            (0, os, "replace", 1, die),                # it is whole, but has not taken its place
            (3, dskd_ga, "gradient", 4, die),
            (3, os, "replace", 1, die, True),          # best/ is that of step 4, the state that of step 3
            (3, shutil, "rmtree", 1, die, True),       # the old best/ is gone, the new one not in its place
            (6, dskd_ga, "gradient", 4, die),
            (8, dskd_ga, "respond", 3, die)):          # evaluation
        child = Child(flags(small, tmp_path / "chosen", **GA), broken(*moment))
        assert child.wait() == -signal.SIGKILL, (moment, child.errors.read())
        folder = tmp_path / "chosen" / "cma-ga-skl-10"
        assert (state_of(folder)["reached"][0] if (folder / "state.pt").exists() else 0) == step, moment
    rng = random.Random(0)
    for delay in sorted(rng.uniform(0.05, 0.8) for _ in range(7)):
        child = Child(flags(small, tmp_path / "random", **GA))
        time.sleep(delay)
        child.kill()
        assert child.wait() in (0, -signal.SIGKILL), child.errors.read()
    for name in ("chosen", "random"):
        same_end(run(small, tmp_path / name, **GA), runs.steady)
    assert steps(runs.steady) == list(range(1, 9))
    # of equal dev scores the later one is kept: best/ is what the last state has
    kept = {f"student.{name}": value for name, value in weights(runs.steady / "best").items()}
    for name, value in torch.load(runs.steady / "best" / "projectors.pt", weights_only=True).items():
        kept[f"proj.{name}"] = value
    last = state_of(runs.steady)["model"]
    assert len(kept) > 20 and not different(kept, {name: last[name] for name in kept})

@steady
def test_a_worse_epoch_after_a_stop_does_not_become_the_best(small, tmp_path, monkeypatch):
    folder = tmp_path / "cma-skl-10"
    assert Child(flags(small, tmp_path), broken(dskd_ga, "gradient", 6, die)).wait() == -signal.SIGKILL
    best = weights(folder / "best")
    monkeypatch.setattr(dskd_ga, "rouge_l", lambda texts, references: [40.0] * len(texts))
    run(small, tmp_path)
    assert state_of(folder)["reached"][1] == 50 and not different(weights(folder / "best"), best)

@steady
def test_when_one_of_two_processes_is_killed_the_other_ends_and_the_run_goes_on(small, runs, tmp_path):
    folders = [tmp_path / name / "cma-ga-skl-10" for name in ("two", "killed")]
    commands = [flags(small, folder.parent, **GA) for folder in folders]
    assert [child.wait() for child in pair(commands[0])] == [0, 0]
    same_log(log(folders[0]), log(runs.steady))  # the number of processes changes nothing
    for victim, moment in ((1, (dskd_ga, "gradient", 5, die)), (0, (torch, "save", 1, cut_and_die, True))):
        prepare = [bool, bool]
        prepare[victim] = broken(*moment)
        children = pair(commands[1], prepare)
        assert children[victim].wait() == -signal.SIGKILL and children[1 - victim].wait(20) > 0
    assert [child.wait() for child in pair(commands[1])] == [0, 0]
    same_end(folders[1], folders[0])

# ---- contents decide
def test_the_teacher_is_fine_tuned_once_and_reads_each_row_once(small, tmp_path, monkeypatch):
    tuned, read, response_hidden = [], [], dskd_ga.response_hidden
    def counted(model, side):
        if "Qwen" in type(model).__name__:
            (tuned if torch.is_grad_enabled() else read).append(len(side.ids))
        return response_hidden(model, side)
    monkeypatch.setattr(dskd_ga, "response_hidden", counted)
    for n, settings in enumerate([dict(ga=True), dict(div="kl")], 1):
        folder = run(small, tmp_path, teacher_ready=None, **settings)
        assert sum(tuned) == 32 and sum(read) == 32 * n  # in two epochs
        teacher = json.loads((folder / "args.json").read_text())["args"]["teacher"]
        assert teacher == str(tmp_path / "teacher-tuned" / "best")
    assert "lm_head.weight" in different(weights(pathlib.Path(teacher)), weights(small / "teacher"))

def test_contents_decide_whether_it_is_the_same_run(small, tmp_path, capsys):
    mine, kept, out = (tmp_path / name for name in ("mine", "kept", "out"))
    shutil.copytree(small, mine)
    base, tuned, distilled = dict(teacher_ready=None, eval_limit=1), "teacher-tuned", "cma-skl-10"
    ready = dict(teacher_ready=True, teacher=out / tuned / "best")
    folder = run(mine, out, **base)
    text = lambda file, *change: file.write_text(file.read_text().replace(*change))
    weight = lambda model, name: weights(model, **{name: (7, 1e-3)})
    # other contents at the same place, other settings
    for (change, source, *details), settings, where, other in (
            ((text, "raw.jsonl", "apple", "apples"), {}, tuned, ["rows"]),
            ((text, "raw.jsonl", "apple", "apples"), ready, distilled, ["rows"]),
            ((text, "student/tokenizer.json", '_space": false', '_space": true'), {}, distilled, ["rows"]),
            ((text, "student/config.json", "0.2", "0.3"), {}, distilled, ["student weights"]),
            ((weight, "student", "transformer.wte.weight"), {}, distilled, ["student weights"]),
            ((weight, "teacher", "lm_head.weight"), {}, tuned, ["student weights"]),
            ((bool, "."), dict(lr=1e-3), distilled, ["lr"]),
            ((bool, "."), dict(teacher_lr=1e-3), tuned, ["lr"]),
            ((bool, "."), dict(dev_rows=7), tuned, ["rows", "dev_rows"]),
            ((bool, "."), ready | dict(teacher=mine / "teacher"), distilled, ["teacher weights"]),
            ((bool, "."), ready | dict(max_new_tokens=9), distilled, ["max_new_tokens"])):
        shutil.copytree(mine, kept)
        change(mine / source, *details)
        message = refused(capsys, flags(mine, out, **base | settings))
        assert f"{out}/{where}/args.json: found other {other}, " in message
        shutil.rmtree(mine)
        kept.rename(mine)
    # the same contents elsewhere, of other times, and what is no part of a run: nothing is trained again
    shutil.copytree(mine, kept, copy_function=shutil.copyfile)
    with mock.patch.object(dskd_ga, "gradient", None):
        for settings in ({}, ready, dict(micro_batch=2, eval_batch=1, eval_seeds=2, save_every=99)):
            assert run(kept, out, **base | settings) == folder
    # what the messages say helps
    text(mine / "raw.jsonl", "apple", "apples")
    for name in (tuned, distilled):
        message = refused(capsys, flags(mine, out, **base))
        assert message.startswith(f"dskd_ga.py: {out / name}/args.json: ") and "remove the folder" in message
        shutil.rmtree(out / name)
    assert steps(run(mine, out, **base | dict(micro_batch=2))) == [3, 4, 6, 8]

# ---- full disk, numbers that are none
@pytest.mark.parametrize("moment, last", [
    ((torch, "save", 4, disk_is_full), 4),  # the state of step 6; the second and third are step 4's
    ((dskd_ga, "save_best", 2, disk_is_full), 6),
    ((dskd_ga, "gradient", 6, disk_is_full), 4)], ids=["state", "best", "log"])
@steady
def test_a_full_disk_is_told_and_leaves_the_last_save(small, runs, tmp_path, moment, last):
    child, folder = Child(flags(small, tmp_path, **GA), broken(*moment)), tmp_path / "cma-ga-skl-10"
    said = child.wait(), child.errors.read()
    assert said[0] == 2 and re.fullmatch("dskd_ga.py: .*File too large.*\n", said[1])
    assert state_of(folder)["reached"][0] == last and weights(folder / "best")
    same_end(run(small, tmp_path, **GA), runs.steady)

def test_a_step_that_is_not_finite_ends_the_run_and_is_not_saved(small, tmp_path):
    child = Child(flags(small, tmp_path, save_every=2), broken(dskd_ga, "gradient", 7, spoil_gradient, True))
    folder = tmp_path / "cma-skl-10"
    assert child.wait() == 2
    assert re.fullmatch(r"dskd_ga.py: step 8: found .*grad_norm.*\n", child.errors.read())
    state = state_of(folder)
    assert state["reached"][0] == steps(folder)[-1] == 6
    for value in (*state["model"].values(), *weights(folder / "best").values()):
        assert value.isfinite().all()

@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("token", [" apple", "<|endoftext|>"])  # the second is predicted, never read
def test_a_teacher_that_is_not_finite_trains_nobody(small, tmp_path, capsys, value, token):
    teacher = shutil.copytree(small / "teacher", tmp_path / "teacher")
    (row,) = transformers.AutoTokenizer.from_pretrained(teacher)(token)["input_ids"]
    weights(teacher, **{"model.embed_tokens.weight": (row, value)})
    assert "teacher" in refused(capsys, flags(small, tmp_path, teacher=teacher))
    assert not list(tmp_path.glob("*/state.pt"))
    assert not [path for path in tmp_path.glob("*/log.jsonl") if path.read_text()]

# ---- bad input
BAD = dict(clip=-1, skew=2, epochs=-1, batch_size=0, temperature=0, eval_seeds=-1, lr="nan", kq_weight="inf")
BAD = [({name: value}, f"--{name.replace('_', '-')}: found {value}") for name, value in BAD.items()]
BAD += [(dict(tests=value), f"--tests: found {value}, ") for value in ("OOD=x", "All=x", "seen", "../a=x")]
BAD += [({name: "/no/such"}, "/no/such") for name in ("student", "teacher", "data", "eval_only")]
BAD += [  # settings, and what the line says
    (dict(tests=["a=x", "a=y"]), "--tests: found a=y, "), (dict(tests="a=/no/such"), "/no/such"),
    (dict(tests=f"a={__file__}"), f"{__file__}, line 1: "), (dict(out=__file__), __file__),
    (dict(out="/proc/none"), "/proc/none"), (dict(micro_batch=3), "--batch-size: found 8, .* multiple of 3"),
    (dict(dev_rows=39, batch_size=4), ": found 1, "), (dict(max_prompt=2), ": found 0, "),
    (dict(method="sft", ga=True), "--ga"), (dict(method="sft", normalise_queries=True), "--normalise-q"),
    (dict(max_new_tokens=250, teacher_ready=None), r"student: found a row of 2[5-9]\d .* 256 positions")]

@pytest.mark.parametrize("settings, said", BAD, ids=str)
def test_settings_that_cannot_work_are_told_in_one_line(small, tmp_path, capsys, settings, said):
    assert re.search(said, refused(capsys, flags(small, tmp_path, **settings)))
    assert not list(tmp_path.glob("**/state.pt"))

@pytest.mark.parametrize("which", ["student", "teacher"])
def test_rows_that_a_model_cannot_read_are_told_first(small, tmp_path, capsys, which):
    models = dict(student=small / "student", teacher=small / "teacher-same")  # with the same tokenizer
    tokenizer, ready = transformers.AutoTokenizer.from_pretrained(models[which]), which == "teacher" or None
    rows = dskd_ga.pairs(dskd_ga.read_rows(small / "raw.jsonl")[8:], [tokenizer])
    longest, highest = (max(size(row.s.ids) for row in rows) for size in (len, max))
    for name, sizes, said in (
            ("short", dict(n_positions=longest - 1), f"a row of {longest} .* its {longest - 1} positions"),
            ("narrow", dict(vocab_size=highest), f"the token {highest}, expected its {highest} embeddings"),
            ("enough", dict(n_positions=longest, vocab_size=highest + 1), None)):
        folder = shutil.copytree(models[which], tmp_path / name)
        config = transformers.AutoConfig.from_pretrained(folder, **sizes)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        command = flags(small, tmp_path / "out", teacher_ready=ready, epochs=0.25, eval_limit=1,
                        max_new_tokens=1, tests=f"seen={small}/seen.jsonl", **models | {which: folder})
        if said:
            assert re.search(f"{folder}: found {said}", refused(capsys, command))
            assert not list(tmp_path.glob("out/**/state.pt"))
    dskd_ga.main(command)

# ---- in processes of their own
def test_torchrun_tells_bad_input_in_one_line_and_ends(small, tmp_path):
    command = [dskd_ga.__file__, *flags(small, tmp_path, batch_size=40, micro_batch=20)]
    torchrun = Child(["--nproc_per_node=2", "--master-port", free_port(), *command], **TORCHRUN)
    assert torchrun.wait() > 0
    errors = torchrun.errors.read()
    lines = re.findall("^dskd_ga.py: .*", errors, re.M)
    assert lines and all("found 32, expected at least --batch-size" in line for line in lines), errors
    assert f'File "{dskd_ga.__file__}"' not in errors  # torchrun's own traceback there is

class Hub(http.server.SimpleHTTPRequestHandler):
    """A stand-in of the hub: files ORG/NAME/FILE of its server's folder."""
    def translate_path(self, path):
        self.server.asked.append(f"{self.command} {path}")
        return str(self.server.folder) + re.sub("^(/datasets)?(/.*)/resolve/[^/]*", r"\2", path)

    def end_headers(self):
        self.send_header("ETag", hashlib.sha1(self.path.encode()).hexdigest())
        self.send_header("X-Repo-Commit", 40 * "0")
        self.send_header("X-Error-Code", "RepoNotFound" if "nobody" in self.path else "EntryNotFound")
        super().end_headers()

# runs command lines one after the other, each with a file of its own for what it writes to stderr
ONE_BY_ONE = """import huggingface_hub, json, os, sys, dskd_ga
for number, (offline, command) in enumerate(json.loads(sys.argv[1])):
    os.dup2(os.open(f"stderr-{number}", os.O_WRONLY | os.O_CREAT), 2)
    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    try:
        dskd_ga.main(command)
    except SystemExit as stopped:
        print("status", stopped.code, file=sys.stderr)
"""

def test_models_and_data_come_from_the_hub_once(small, tmp_path):
    served = tmp_path / "served"
    shutil.copytree(small, served / "tiny")
    for source in dskd_ga.TEST_SETS:
        file = served / source.partition("=")[2]
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(small / "seen.jsonl", file)
    shutil.copy(small / "raw.jsonl", served / "MiniLLM" / "dolly")
    nothing = dict(tests="own=MiniLLM/dolly/nothing.jsonl")
    wanted = [(False, {}, ""), (False, dict(student="nobody/none"), "nobody/none"),
              (False, dict(data="nobody/none"), "nobody/none/raw.jsonl"), (False, nothing, "nothing.jsonl"),
              (True, dict(seed=11), ""), (True, nothing, "nothing.jsonl")]  # offline, settings, what is said
    base = dict(student="tiny/student", teacher="tiny/teacher", data=None, tests=None, eval_limit=2)
    commands = [(offline, flags(small, tmp_path, **base | settings)) for offline, settings, _ in wanted]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.folder, server.asked = served, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | dict(
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path / "home"),
            HF_HUB_OFFLINE="0", OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
        process = [sys.executable, "-c", ONE_BY_ONE, json.dumps(commands)]
        subprocess.run(process, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, timeout=100)
        server.shutdown()
    got = [request.rpartition("/")[2] for request in server.asked if request.startswith("GET")]
    assert [got.count(name) for name in ("model.safetensors", "valid.jsonl", "raw.jsonl")] == [2, 5, 1]
    for number, (_, _, named) in enumerate(wanted):
        expected = f"dskd_ga.py: .*{named}.*\nstatus 2\n" if named else ""
        assert re.fullmatch(expected, (tmp_path / f"stderr-{number}").read_text()), named
    assert server.asked[-1].endswith("/nothing.jsonl")  # nothing was asked for offline
    for seed in (10, 11):
        assert " ".join(scores(tmp_path / f"cma-skl-{seed}")[0]) == "Dolly SelfInst Vicuna S-NI UnNI OOD All"
