"""Tests of dskd_ga.py: values and gradients against float64 oracles written out here, invariances, runs.

The oracles know neither padding nor slices: they loop over rows, positions or vocabulary, or are dense.
"""
import ast, functools, io, json, math, os, pathlib, random, re, runpy, shlex, sys
import tokenize, types, unicodedata

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read it

import hypothesis
import hypothesis.strategies as st
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

import dskd_ga
from dskd_ga import (
    Discriminator, Example, InputError, Projectors, Row, Side, cross_model_attention, divergence,
    dual_space_losses, ga_loss, pairs, rouge_l, sliced_loss, std_normalise)

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

def test_a_divergence_that_there_is_not_is_refused():
    with pytest.raises((ValueError, KeyError), match="tvd"):
        divergence("tvd", normal(2, 5), normal(2, 5))

# ---- attention
@every_padding
def test_std_normalise(garbage, extra):
    rows = [(n * normal(n, 5) + mean).requires_grad_() for n, mean in ((4, 3), (1, 0), (6, 9))]
    expected, _ = padded([row / row.std() for row in rows], 0, extra)
    same_with_gradients(std_normalise(*padded(rows, garbage, extra)), expected, rows)

@pytest.mark.parametrize("value", [0.0, 2.0, 0.1])
def test_std_normalise_of_equal_entries_is_finite(value):
    x, mask = padded([torch.full((3, 7), value, requires_grad=True), torch.randn(5, 7)], NAN)
    found = std_normalise(x, mask)
    assert found.isfinite().all() and gradients(found.sum(), [x])[0].isfinite().all()

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
        plain = re.sub(r"\$(\w+|@|\{.*?\})", "1", re.split(r" #|[;&|>]", command)[0])
        words = [word for word in shlex.split(plain) if word != "1"]
        if not {"-h", "--help"} & set(words):
            parser.parse_args(words)
    assert len(commands) > 5

def test_every_equation_is_in_the_code_by_its_number():
    body = SOURCE.split('"""', 2)[2]  # without the header's glossary
    assert [n for n in (*range(1, 10), 14, 16) if not re.search(rf"# .*\({n}\)", body)] == []

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
