"""Tests of dskd_ga.py, in its order, and then of whole runs.

The method is compared, in value and gradient, with slow oracles in float64 that are written out here. They
know neither padding nor slices: they read one sequence at a time.
"""
import ast, fcntl, functools, hashlib, http.server, io, itertools, json, logging, math, multiprocessing, os
import pathlib, random, re, resource, runpy, shlex, shutil, signal, socket, subprocess, sys, threading, time
import types
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read it
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.distributed.run
import torch.nn.functional as F
import tqdm
import transformers as hf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dskd_ga
from dskd_ga import (
    Discriminator, Example, InputError, Pair, Projectors, Row, Side, cross_model_attention, divergence,
    dual_space_losses, ga_loss, load_model, pairs, read_rows, rouge_l, sliced_loss)

# runs are forked: this process stays without threads, and without a lock that a killed process keeps
os.environ["TOKENIZERS_PARALLELISM"] = "false"
tqdm.tqdm.monitor_interval = 0
tqdm.tqdm.set_lock(threading.RLock())
torch.set_num_threads(1)  # the tensors are tiny
HERE = pathlib.Path(dskd_ga.__file__).parent
SOURCE = pathlib.Path(dskd_ga.__file__).read_text()
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
    lengths = torch.tensor([len(row) for row in rows])
    length = max(lengths) + extra
    longest = rows[0].new_zeros(length, *rows[0].shape[1:])  # left out again
    block = nn.utils.rnn.pad_sequence([*rows, longest], True, fill)[:-1]
    return block, torch.arange(length) < lengths[:, None]

# ---- divergences
every_divergence = pytest.mark.parametrize("name", dskd_ga.DIVERGENCES)

def slow_kl(a, b):
    return (a * (a / b).log()).sum(-1)

def slow_akl(p, q, head_mass):  # (V,), (V,)
    gap, head, mass = (p - q).abs().detach(), [], 0
    for token in p.argsort(descending=True).tolist():
        if mass < head_mass:
            head.append(token)
        mass += p[token].item()
    share = gap[head].sum() / gap.sum()
    return share * slow_kl(p, q) + (1 - share) * slow_kl(q, p)

def slow_divergence(name, z_p, z_q, tau=2.0, skew=0.1, head_mass=0.5):
    """By the formulas, in float64. (n, V), (n, V) -> (n,)."""
    p, q = (z_p / tau).softmax(-1), (z_q / tau).softmax(-1)
    if name == "akl":
        return torch.stack([slow_akl(*row, head_mass) for row in zip(p, q)])
    middle = (p + q) / 2
    return dict(
        kl=slow_kl(p, q), rkl=slow_kl(q, p), jsd=slow_kl(p, middle) / 2 + slow_kl(q, middle) / 2,
        skl=slow_kl(p, skew * p + (1 - skew) * q), srkl=slow_kl(q, skew * q + (1 - skew) * p))[name]

@every_divergence
@pytest.mark.parametrize("options", [(), (1.0,), (2.0, 0.3, 0.9)])
def test_divergence(name, options):
    p, q = normal(7, 9, grad=True), normal(7, 9, grad=True)
    expected = slow_divergence(name, p, q, *options)
    same_with_gradients(divergence(name, p, q, *options), expected, [p, q])

@every_divergence
def test_divergence_of_extreme_logits(name):
    p, q, gone = normal(4, 9), normal(4, 9, grad=True), torch.arange(9) % 3 == 1
    less_p, less_q = p.masked_fill(gone, -INF), q.masked_fill(gone, -INF)
    # -inf on both sides: as if these tokens did not exist
    expected = slow_divergence(name, p[:, ~gone], q[:, ~gone])
    same_with_gradients(divergence(name, less_p, less_q), expected, [q])
    # on one side, or huge: finite
    huge_p, huge_q = 1e4 * torch.randint(-1, 2, (2, 4, 9))
    for a, b in ((p, less_q), (less_p, q), (huge_p, huge_q + 0 * q)):
        found = divergence(name, a.bfloat16(), b.float(), 1.0)
        (slope,) = gradients(found.sum(), [q])
        assert found.isfinite().all() and slope.isfinite().all()

def test_a_divergence_is_a_known_name_or_a_function():
    p, q = normal(4, 9), normal(4, 9, grad=True)
    reverse = lambda log_p, log_q: slow_kl(log_q.exp(), log_p.exp())
    same_with_gradients(divergence(reverse, p, q, 3.0), slow_divergence("rkl", p, q, 3.0), [q])
    with pytest.raises(ValueError, match="'lk'"):
        divergence("lk", p, q)

# ---- key-query matching
def test_ga_loss():
    disc = Discriminator(6, hidden=5, dropout=0.5).double()
    q, k = (9 * normal(3, 5, 6)).requires_grad_(), (9 * normal(3, 7, 6)).requires_grad_()
    assert not torch.equal(disc(q), disc(q))  # dropout
    disc.eval()
    s_mask, t_mask = torch.rand(3, 5) < 0.5, torch.rand(3, 7) < 0.5
    first, second, third = [layer for layer in disc.modules() if isinstance(layer, nn.Linear)]
    def D(x):
        gate = first(x).sigmoid()
        y = second(gate * first(x).clamp(min=0) + (1 - gate) * x)
        z = third(torch.where(y > 0, y, 0.1 * y))
        return 1 / (1 + (-z).exp())
    D_q, D_k = D(q[s_mask]), D(k[t_mask])
    expected = -D_q.log().mean() - (1 - D_k).log().mean()
    given = (disc, q.masked_fill(~s_mask[:, :, None], NAN), k.masked_fill(~t_mask[:, :, None], INF),
             s_mask, t_mask)
    found, terms = ga_loss(*given)
    same_with_gradients(found, expected, list(disc.parameters()))  # D descends
    same(gradients(found, [q]), gradients(-expected, [q]))         # P_Q ascends
    assert not gradients(found, [k])[0].any()                      # keys are constants
    for side, values, right in (("q", D_q, D_q > 0.5), ("k", D_k, D_k < 0.5)):
        same(terms[f"D_{side}"], values.detach().mean())
        same(terms[f"accuracy_{side}"], right.float().mean())
    half, _ = ga_loss(*given, 2 * s_mask.sum(), 2 * t_mask.sum())
    same(half, found / 2)

# ---- vocabulary products
def cross_entropy(z, target):
    return F.cross_entropy(z, target, reduction="sum")

def two_losses(z_1, z_2, target):
    """A loss of both sides, one of the first, and a count."""
    ce = cross_entropy(z_1, target)
    both = (z_1.mean(-1) * z_2.sin().sum(-1)).square().sum()
    return ce + both, ce, (z_1.argmax(-1) == target).sum()

@pytest.mark.parametrize("positions, size", [(7, 1), (7, 3), (7, 999), (0, 999)])
def test_sliced_loss(positions, size):
    leaves = [normal(n, 4, grad=True) for n in (positions, positions, 6, 5)]
    h_1, h_2, W_1, W_2 = leaves
    target, lengths = torch.randint(5, (positions,)), []
    def fn(*slices):
        lengths.append(len(slices[0]))
        return two_losses(*slices)
    found = sliced_loss(fn, [(h_1, W_1), (h_2, W_2)], [target], max_logits=6 * size + 5)
    expected = two_losses(h_1 @ W_1.T, h_2 @ W_2.T, target)
    same(torch.stack(found), torch.stack(expected))
    same(gradients(0.7 * found[0], leaves), gradients(0.7 * expected[0], leaves))
    # a slice at a time, and each once: the gradient was formed with the loss
    assert max(lengths) == min(size, positions) and sum(lengths) == positions

def test_sliced_loss_under_autocast():
    h, W = torch.randn(7, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    fn = lambda z_1, z_2: [(z_1 * z_2.sin()).sum()]
    with torch.autocast("cpu", torch.bfloat16):
        (first,) = sliced_loss(fn, [(h, W), (h, W)])
        later = F.linear(h, W).sum()  # autocast keeps its copies of weights: this one must have a gradient
    z = h @ W.T
    same(gradients(first, [h, W]), gradients(fn(z, z)[0], [h, W]), 0.1)
    same(gradients(later, [W]), gradients(z.sum(), [W]), 0.1)

# ---- objective
# Three rows: numbers of student and teacher tokens, as `annotate` gives them; the negative ones match none
S_CHUNK, T_CHUNK = [[0, 1, 1, -1], [0, 0], [0, 0, 0, -1, -1]], [[0, 0, 1], [0, 0, -2, -2, -2], [0]]

def by_chunk(q, k, s, t):
    """For `align`: attention where the numbers are equal, as a method's own alignment may be."""
    equal = s.chunk[:, :, None] == t.chunk[:, None, :]
    return cross_model_attention(q, k, equal & t.mask[:, None, :])

def slow_attention(q, k, allowed):
    """q (n, w), k (m, w), allowed (n, m): for each query, softmax over the keys that it may see."""
    weights = (q @ k.T / math.sqrt(q.shape[1])).exp() * allowed
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-99)

class Problem:
    """Three rows with the numbers S_CHUNK and T_CHUNK: what gets a gradient from them is in leaves."""
    def __init__(self):
        torch.manual_seed(193)  # the argmax of q^{t->s} is right at some positions and wrong at others
        self.proj = Projectors(4, 3).double()
        self.s, self.t = [self.row(5, 4, x) for x in S_CHUNK], [self.row(7, 3, x) for x in T_CHUNK]
        tables = [normal(*size, grad=True) for size in ((5, 4), (5, 4), (7, 3), (7, 3))]
        self.E_s, self.W_s, self.E_t, self.W_t = tables
        self.s[0].targets[3] = 0  # attends to nothing by chunk: that the argmax of zeros is 0 must not count
        self.leaves = [self.W_s, *self.proj.parameters(), *[row.hidden for row in self.s]]
        self.constants = [self.E_s, self.E_t, self.W_t, *[row.hidden for row in self.t]]

    def row(self, V, d, chunk):
        inputs, targets = torch.randint(V, (2, len(chunk)))
        hidden = (3 * normal(len(chunk), d)).requires_grad_()
        return types.SimpleNamespace(inputs=inputs, targets=targets, hidden=hidden, chunk=torch.tensor(chunk))

    def losses(self, batch, garbage, extra, **options):
        sides = []
        for rows in (self.s, self.t):
            fields = {}
            for name, fill in dict(inputs=10 ** 6, targets=10 ** 6, chunk=-1, hidden=garbage).items():
                fields[name], mask = padded([getattr(rows[b], name) for b in batch], fill, extra)
            sides.append(Side(mask=mask, **fields))
        tables = self.E_s, self.E_t, self.W_s, self.W_t
        return dual_space_losses(self.proj, *sides, sides[0].hidden, sides[1].hidden, *tables, **options)

    def oracle(self, b, align=None, div="skl", s2t_div="kl", temperature=2.0, skew=0.1, all_positions=False,
               weights=(0.5, 0.5, 0.5, 0.5)):
        """Eqs. (1)-(9) for row b."""
        s, t, proj = self.s[b], self.t[b], self.proj
        e_t = self.E_t[t.targets]
        q = proj.query(torch.cat([self.E_s[s.inputs], self.E_s[s.targets]], 1))
        k = torch.cat([self.E_t[t.inputs], e_t], 1)
        k = k / k.std()
        allowed = s.chunk[:, None] == t.chunk if align else torch.ones(len(q), len(k))
        a_t2s, a_s2t = slow_attention(q, k, allowed), slow_attention(k, q, allowed.T)
        h_t2s = a_t2s @ proj.t2s(t.hidden / t.hidden.std() + e_t / e_t.std())
        h_s2t = a_s2t @ proj.s2t(s.hidden)
        z_s, z_t2s = s.hidden @ self.W_s.T, h_t2s @ self.W_s.T.detach()
        z_t, z_s2t = t.hidden @ self.W_t.T, h_s2t @ self.W_t.T
        aligned = allowed.any(1)
        correct = aligned & (z_t2s.argmax(1) == s.targets)
        kd_t2s = slow_divergence(div, z_t2s.detach(), z_s, temperature, skew)
        kd_s2t = slow_divergence(s2t_div, z_t.detach(), z_s2t, temperature, skew)
        terms = dict(
            ce=cross_entropy(z_s, s.targets),
            ce_t2s=cross_entropy(z_t2s[aligned], s.targets[aligned]),
            kd_t2s=kd_t2s[aligned if all_positions else correct].sum(),
            kd_s2t=kd_s2t[allowed.any(0)].sum())
        loss = sum(weight * term for weight, term in zip(weights, terms.values()))
        return terms | dict(loss=loss, n_correct=correct.sum().double(), q=q, k=k, a_t2s=a_t2s, a_s2t=a_s2t,
                            h_t2s=h_t2s, h_s2t=h_s2t)

@pytest.mark.parametrize("options", [
    dict(), dict(div="akl", temperature=1.0), dict(div="srkl", s2t_div="skl", skew=0.3),
    dict(align=by_chunk), dict(align=by_chunk, all_positions=True, weights=(0.3, 0.7, 0.9, 0.4))])
def test_dual_space_losses(options, monkeypatch):
    # slices of two positions or three
    monkeypatch.setattr(dskd_ga, "sliced_loss", functools.partial(sliced_loss, max_logits=15))
    problem = Problem()
    rows = [problem.oracle(b, **options) for b in range(3)]
    assert 0 < sum(row["n_correct"] for row in rows) < 10
    for batch, garbage, extra in (([0, 1, 2], 0.0, 0), ([0, 1, 2], NAN, 3), ([2, 0], INF, 2), ([1], 1e30, 1)):
        found = problem.losses(batch, garbage, extra, **options)
        assert found.keys() == rows[0].keys()
        for name, value in found.items():
            expected = torch.zeros_like(value)
            for place, b in enumerate(batch):
                own = rows[b][name] if name in ("loss", "q") else rows[b][name].detach()
                where = (place, *map(slice, own.shape)) if own.ndim > 0 else ...
                expected[where] += own
            same_with_gradients(value, expected, problem.leaves)
            assert not any(slope.any() for slope in gradients(value.sum(), problem.constants))

def test_the_method_runs_alone_and_on_degenerate_batches():
    # its sections, copied into an empty file
    imports = ("import math, torch\nimport torch.nn.functional as F\n"
               "from torch import Tensor, nn\nfrom typing import NamedTuple\n")
    block = SOURCE[SOURCE.index("# 1. Batches"):SOURCE.index("# 6. Models")]
    method = types.ModuleType("method")
    exec(imports + block, vars(method))
    # a row of one token, a row of none; keys are equal everywhere, as are the teacher's logits
    proj, disc, sides = method.Projectors(4, 3), method.Discriminator(6), []
    for n in (2, 3):
        mask = torch.arange(n) < torch.tensor([[1], [0], [n]])
        ids = torch.zeros(3, n, dtype=torch.long)
        sides.append(method.Side(ids, ids, mask))
    s, t = sides
    h_s, W_s, ones = torch.randn(3, 2, 4, requires_grad=True), torch.randn(5, 4), torch.ones(7, 3)
    out = method.dual_space_losses(
        proj, s, t, h_s, torch.ones(3, 3, 3), torch.ones(5, 4), ones, W_s, ones, all_positions=True)
    kq, _ = method.ga_loss(disc, out["q"], out["k"], s.mask, t.mask)
    slopes = gradients(out["loss"] + kq, [h_s, *proj.parameters(), *disc.parameters()])
    assert slopes[0][2].any() and not slopes[0][1].any()
    assert all(slope.isfinite().all() for slope in slopes)

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

def rows_of(folder, *rows, **options):
    """What `read_rows` makes of a file of these dicts."""
    return read_rows(write_lines(folder / "rows.jsonl", "\n".join(map(json.dumps, rows))), **options)

def test_rows_take_their_prompt_or_the_template(tmp_path):
    rows = read_rows(write_lines(
        tmp_path / "rows.jsonl", b'\xef\xbb\xbf{"prompt": "P", "instruction": "I", "output": "a"}\r\n',
        '{"prompt": null, "instruction": "I", "input": null, "output": ["a", null, "b", ""]}\n',
        '{"prompt": "", "instruction": "I", "input": "C", "output": "\u2028 \\ud83d\\ude00\\u0000"}\n\n'))
    task = "Below is an instruction that describes a task"
    request = "Write a response that appropriately completes the request.\n\n### Instruction:\nI\n\n"
    paired = f"{task}, paired with an input that provides further context. {request}### Input:\nC\n\n"
    assert rows == [Row("P", ["a"]), Row(f"{task}. {request}### Response:\n", ["a", "b"]),
                    Row(f"{paired}### Response:\n", ["\u2028 😀\0"])]

def test_what_is_left_out_or_not_read_is_told_once(tmp_path, capsys):
    row = dict(prompt="P", output="a", teacher_prompt="e\u0301")  # texts are composed: é
    empty = [row | dict(output=output) for output in (None, "", " \n", "</s>", [], ["", None])]
    unread = [row | dict(input="I", system="S"), row | dict(system="S", history=None)]
    assert rows_of(tmp_path, *empty, *unread) == 2 * [Row("P", ["a"], "\u00e9")]
    assert re.fullmatch(r".*rows.jsonl.*\b6\b.*: input system\n", capsys.readouterr().out)
    assert rows_of(tmp_path, row) and capsys.readouterr().out == ""

@pytest.mark.parametrize("output, text", [
    ("warm<|endoftext|>\n", "warm"), ("warm \n </s>", "warm"), (" a </s>\t<stop></s> \n", " a"),
    ("a</s>b", "a</s>b"), ("</s>a\n", "</s>a\n"), ("a<go>", "a<go>")])
def test_end_marks_are_taken_off_the_ends_of_answers(tmp_path, output, text):
    row = dict(prompt="P</s>", output=["b", output])
    assert rows_of(tmp_path, row, marks=["<stop>"]) == [Row("P</s>", ["b", text])]

@pytest.mark.parametrize("line, named", [
    ('{"prompt": "P", "output": "a"', ""), (b'{"prompt": "P", "output": "\xff"}', ""), ("[" * 100000, ""),
    ("\n{}", ""), ('{"prompt": "P", "output": "\\ud83d"}', ""), ("[1]", ""),
    ('{"output": "a"}', "instruction: found"), ('{"prompt": 3, "output": "a"}', "prompt: found"),
    ('{"instruction": "I", "input": false, "output": "a"}', "input: found"),
    ('{"prompt": "P", "teacher_prompt": 0, "output": "a"}', "teacher_prompt: found"),
    ('{"prompt": "P", "output": ["a", 0]}', "output: found")], ids=lambda x: x[:50])
def test_a_bad_row_is_named(tmp_path, line, named):
    path = write_lines(tmp_path / "rows.jsonl", '{"prompt": "P", "output": "a"}\n', line, "\n")
    with pytest.raises(InputError, match=f"^{path}, line 2: {named}[^\n]{{,400}}$"):
        read_rows(path)
    assert read_rows(path, limit=1) == [Row("P", ["a"])]  # rows that are not wanted are not judged
    with pytest.raises(InputError, match=path):
        rows_of(tmp_path, dict(prompt="P"))  # no answer at all

def test_pairs_are_the_rows_within_the_limits_as_each_model_reads_them():
    bytes_of = lambda text: PLAIN.convert_tokens_to_ids([*text])
    leading, asked = byte_level(front="<s>"), []
    rows = [Row("P", ["a<|endoftext|><s>"]),                       # in a response these are plain text
            Row("<s>P", ["a"]),                                    # what comes in front is there already
            Row(20 * "P", ["a"]), Row(21 * "P", ["a"]),            # the student's prompt is too long
            Row("P", ["a"], 28 * "T"), Row("P", ["a"], 29 * "T"),  # no room for a response
            Row("P", [50 * "a"])]
    def annotate(row, s, t, tokenizers):
        asked.append(row)
        return s.length * [1], t.length * [2]
    found = pairs(rows, [PLAIN, leading], 20, 30, annotate)
    assert asked == [rows[i] for i in (0, 1, 2, 4, 6)]
    for row, pair in zip(asked, found, strict=True):
        answer = bytes_of(row.references[0]) + [0]
        t_prompt = (row.teacher_prompt or row.prompt).removeprefix("<s>")
        t_prompt = [leading.convert_tokens_to_ids("<s>"), *bytes_of(t_prompt)]
        for prompt, (ids, start, chunk, _), number in zip((bytes_of(row.prompt), t_prompt), pair, (1, 2)):
            assert ids == (prompt + answer)[:30] and start == len(prompt)
            assert chunk == [number] * (len(ids) - start)
    assert pairs(rows[:1], [PLAIN])[0].t is None
    with pytest.raises(InputError, match="^some: cannot read 'P'"):
        pairs(rows, [mock.Mock(side_effect=Exception, name_or_path="some")])

def test_an_epoch_reads_each_row_once_in_sorted_steps():
    data = [Pair(Example([row] * (row * 37 % 90 + 5), 1)) for row in range(103)]
    epochs = []
    for start in (1, 13):  # 12 steps of 8 rows; 7 rows are left out
        rows = []
        for step in range(start, start + 12):
            first, second, rest = dskd_ga.step_rows(data, 8, 3, 0, step)
            batch = first + second + rest
            assert len(rest) == 2 and batch == sorted(batch, key=lambda pair: len(pair.s.ids))
            rows += [pair.s.ids[0] for pair in batch]
        assert len(set(rows)) == 96
        epochs.append(rows)
    assert epochs[0] != epochs[1]

def test_a_batch_reads_and_predicts_the_right_tokens():
    long, short, hidden = [*range(9)], [*range(20, 26)], normal(3, 2)
    examples = [Example(long, 4, 5 * [1], normal(5, 2)), Example(short, 3, 3 * [2], hidden)]
    side = dskd_ga.collate(examples, CPU)
    assert side.inputs[side.mask].tolist() == long[3:-1] + short[2:-1]
    assert side.targets[side.mask].tolist() == long[4:] + short[3:]
    assert side.chunk.tolist() == [5 * [1], 3 * [2] + 2 * [-1]]
    assert torch.equal(side.hidden[1, :3], hidden)

# ---- models
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=260)
GROUPED = SMALL | dict(num_key_value_heads=1)
GEMMA = GROUPED | dict(head_dim=16, sliding_window=8)
FAMILIES = dict(
    gpt2=lambda: hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=260),
    qwen2=lambda: hf.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    one_id_more=lambda: hf.Qwen2Config(**GROUPED | dict(vocab_size=len(PLAIN) - 1)),  # in the tokenizer
    gemma3=lambda: hf.Gemma3TextConfig(**GEMMA),
    vision=lambda: hf.Gemma3Config(
        text_config=GEMMA, mm_tokens_per_image=4, image_token_index=257, vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
            patch_size=14)),
    mpt=lambda: hf.MptConfig(d_model=32, n_layers=2, n_heads=2, vocab_size=260, max_seq_len=64),
    mamba=lambda: hf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=260),
    lfm2=lambda: hf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"], block_multiple_of=8))

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
    model = load_model(write_model(tmp_path, FAMILIES[family]()), CPU)
    examples = [Example([*range(12)], 5), Example([*range(99, 106)], 1), Example([*range(50, 70)], 18)]
    side = dskd_ga.collate(examples, CPU)
    logits = dskd_ga.response_hidden(model, side) @ dskd_ga.head_of(model).T
    for row, (ids, start, *_), mask in zip(logits, examples, side.mask):
        own = model(input_ids=torch.tensor([ids])).logits[0, start - 1:-1]
        assert torch.dist(row[mask], own) < 1e-3 * own.norm()
    # everything that is trained gets a gradient: several processes need that. A vision tower is not trained
    logits[side.mask].square().sum().backward()
    for name, parameter in model.named_parameters():
        trained = "vision_tower" not in name and "multi_modal_projector" not in name
        assert (parameter.grad is not None) == parameter.requires_grad == trained, name

WRONG = dict(  # models that are not what the equations need, and what the refusal says
    bias=(lambda: hf.PhiConfig(**SMALL), "bias"),
    cap=(lambda: hf.Gemma2Config(**GROUPED, head_dim=16), "cap"),
    scale=(lambda: hf.CohereConfig(**SMALL, logit_scale=0.5), "logits"),
    trunk_elsewhere=(lambda: hf.ModernBertDecoderConfig(**SMALL, decoder_bias=False), ""),
    looks_ahead=(lambda: hf.Qwen2Config(**GROUPED, is_causal=False), "later_tokens"),
    gemma_ahead=(lambda: hf.Gemma3TextConfig(**GEMMA, use_bidirectional_attention=True), "later_tokens"),
    padding_counts=(lambda: hf.RwkvConfig(**SMALL | dict(attention_hidden_size=32)), "padd|alone"))
EDITS = dict(shapes=dict(vocab_size=9),  # of config.json
    missing=dict(num_hidden_layers=3, layer_types=3 * ["full_attention"]), nan=dict(rms_norm_eps=NAN),
    quanti=dict(quantization_config=dict(quant_method="awq", bits=4, group_size=32)))

def spoil(folder, how):
    if how == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "random_tokens":
        text = (folder / "tokenizer.json").read_text()
        write_lines(folder / "tokenizer.json", text.replace('"dropout": null', '"dropout": 0.3'))
    elif how == "safetensors":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif how == "adapter":
        write_lines(folder / "adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    else:
        edit_json(folder / "config.json", **EDITS[how])

@pytest.mark.parametrize("kind", [*WRONG, "tokenizer", "random_tokens", "safetensors", "adapter", *EDITS])
def test_models_that_would_fail_or_be_wrong_are_refused(kind, tmp_path, monkeypatch):
    config, reason = WRONG.get(kind, (FAMILIES["gpt2" if kind == "random_tokens" else "qwen2"], kind))
    source = write_model(tmp_path / "model", config())
    if kind not in WRONG:
        spoil(tmp_path / "model", kind)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("a stranger's pickle was read"))
    with pytest.raises(InputError, match=rf"^{source}\b.*({reason})"):
        load_model(source, CPU)

# settings of generation that may stand in a model's folder; transformers would follow them
ODD = dict(
    repetition_penalty=3.0, min_new_tokens=16, suppress_tokens=[*range(9, 200)], forced_eos_token_id=7,
    num_beams=3, return_dict_in_generate=True, top_k=2, top_p=0.5, temperature=0.3, no_repeat_ngram_size=1,
    use_cache=False, bad_words_ids=[[9]], stop_strings=["a"], max_new_tokens=2, guidance_scale=2.0)

@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_of_a_models_settings_of_generation_only_its_stop_tokens_count(file, tmp_path):
    source, found = write_model(tmp_path / "model", FAMILIES["gpt2"]()), []
    path = tmp_path / "model" / file
    byte_level(front="<turn>").save_pretrained(source)
    own = json.loads(path.read_text()) | dict(eos_token_id=[257, 5])
    (tmp_path / "model/generation_config.json").unlink()
    for settings in (own, own | ODD):
        write_lines(path, json.dumps(settings))
        load_model(source, CPU).save_pretrained(tmp_path / "saved")
        saved = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        torch.manual_seed(0)
        found.append(saved.generate(torch.tensor([[9, 6, 7]]), max_length=20).tolist())
    assert found[0] == found[1] and saved.generation_config.top_k == 0
    assert dskd_ga.stop_marks(load_model(source, CPU)) == ("<|endoftext|>", PLAIN.decode(5), "<turn>")
    saved.transformer.ln_f.weight.data.zero_()
    for stop in (0, 5, 257):
        saved.transformer.ln_f.bias.data = 99 * saved.lm_head.weight.data[stop]  # it says nothing else now
        assert saved.generate(torch.tensor([[9]]), max_new_tokens=3).tolist() == [[9, stop]]

def test_rows_that_a_model_cannot_read_are_refused(tmp_path):
    model = load_model(write_model(tmp_path, FAMILIES["mpt"]()), CPU)  # its limit is max_seq_len
    rows = [[1] * 9, [1] * 60]
    dskd_ga.check_readable(model, rows, "--max-length", 4)
    with pytest.raises(InputError, match=f"^{tmp_path}: .*65 tokens.* 64 positions.* lower --max-length"):
        dskd_ga.check_readable(model, rows, "--max-length", 5)

def kept_for_backward(model):
    """GB that the trunk keeps of 4 x 511 tokens for its backward pass under autocast, weights left out."""
    ids, kept = torch.zeros(4, 511, dtype=torch.long), {}
    pack = lambda tensor: kept.setdefault(tensor.untyped_storage()._cdata, tensor)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            dskd_ga.trunk(model, ids)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 1e9

def test_memory_is_what_the_readme_says():
    config = hf.Qwen2Config(  # Qwen1.5-1.8B
        hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=151936, tie_word_embeddings=False)
    with FakeTensorMode():  # sizes without contents
        teacher = hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
        trained = 16 * sum(p.numel() for p in teacher.parameters()) / 1e9  # weights, gradients, AdamW
        found = [trained, kept_for_backward(teacher)]
        teacher.activation_checkpointing_enable()
        found.append(kept_for_backward(teacher))
    assert found == pytest.approx([29.4, 8.1, 0.4], rel=0.1)

# ---- the model that is trained
def distiller(case, *flags):
    """`Distiller` of the demo's models, in float64, without dropout; `Pair`s of 20 rows; the teacher."""
    args = dskd_ga.build_parser().parse_args(flags)
    student, teacher = load_model(case / "student", CPU), load_model(case / "teacher", CPU).double()
    rows = pairs(read_rows(case / "raw.jsonl", 20), [student.tokenizer, teacher.tokenizer])
    return dskd_ga.Distiller(args, student, teacher).double().eval(), rows, teacher

def sides(data):
    return [dskd_ga.collate(side, CPU) for side in zip(*data)]

def test_padding_and_the_cut_into_micro_batches_change_nothing(case, tmp_path, monkeypatch):
    model, rows, teacher = distiller(
        case, "--ga", "--kq-weight=0.7", "--all-positions", "--div=jsd", "--s2t-div=srkl", "--skew=0.2",
        "--temperature=3", "--weights", "1", "2", "3", "4")
    student, W_t = model.student, model.teacher.head
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # of several nodes: what another removes is not mapped
        monkeypatch.setenv(name, "2")
        data = dskd_ga.read_once(teacher, rows, tmp_path, CPU)
        assert ("states.tmp" in pathlib.Path("/proc/self/maps").read_text()) == (name[0] == "L")
    for row, pair in zip(rows, data, strict=True):
        alone = teacher.model(input_ids=torch.tensor([row.t.ids])).last_hidden_state[0]
        same(pair.t.hidden, alone[row.t.start - 1:-1])
    results = []
    for size in (6, 2, 1):
        model.zero_grad()
        total = 0
        for start in range(0, 6, size):
            s, t = sides(data[start:start + size])
            loss, terms = model(s, t, 50, 60)
            loss.backward()
            total += loss.detach()
        results.append([total, *[p.grad for p in model.parameters()]])
    same(results[1:], 2 * results[:1], 1e-9)
    # eq. (16) of the last one, and plain fine-tuning on it
    out = dual_space_losses(
        model.proj, s, t, dskd_ga.response_hidden(student, s), t.hidden, student.get_input_embeddings(),
        teacher.get_input_embeddings(), dskd_ga.head_of(student), W_t, all_positions=True, div="jsd",
        s2t_div="srkl", skew=0.2, temperature=3, weights=(1, 2, 3, 4))
    kq, kq_terms = ga_loss(model.disc, out["q"], out["k"], s.mask, t.mask, 50, 60)
    same(loss, out["loss"] / 50 + 0.7 * kq)
    for name in ("ce", "ce_t2s", "kd_t2s", "kd_s2t", "n_correct"):
        kq_terms[name] = out[name] / 50
    same(terms, kq_terms)
    model.args.ga = False
    logits = dskd_ga.response_hidden(student, s)[s.mask] @ dskd_ga.head_of(student).T
    expected = cross_entropy(logits, s.targets[s.mask]) / 50
    same_with_gradients(model(s, None, 50, 0)[0], expected, list(student.parameters()))

def test_every_parameter_is_in_one_group_and_moves(case):
    model, data, teacher = distiller(case, "--ga", "--lr=0.02", "--lr-projectors=0.03")
    optimizer, where = dskd_ga.optimizer_for(model, model.args), {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
        for parameter in group["params"]:
            assert where.setdefault(parameter, group) is group
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    s, t = sides(data[:4])
    t = t._replace(hidden=dskd_ga.response_hidden(teacher, t).detach())
    model(s, t, 50, 60)[0].backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any() and not torch.equal(parameter, before[name]), name
        assert where[parameter]["weight_decay"] == (0.01 if parameter.ndim > 1 else 0)
        assert where[parameter]["peak"] == (0.02 if name.startswith("student.") else 0.03)

# ---- evaluation
def test_rouge_l_by_hand():
    # longest common subsequence "the cat" (stemmed): precision 2/3, recall 2/4, F1 4/7
    references = ["nothing", "the cat sat down"], ["a b"], ["text"]
    found = rouge_l(["the cats ran", "A, b!", ""], references)
    assert isinstance(found, list) and found == pytest.approx([400 / 7, 100, 0])
    with pytest.raises(ValueError):
        rouge_l(["a"], [["a"], ["b"]])

# ---- documents
def test_documented_commands_parse():
    commands = []
    for text in (dskd_ga.__doc__, (HERE / "README.md").read_text(), (HERE / "run.sh").read_text()):
        text = text.replace("\\\n", " ")
        commands += re.findall(r"(?:python|torchrun|train)\b.* dskd_ga\.py( .*)$", text, re.M)
    for command in commands:
        plain = re.sub(r"\$(\w+|@|\{.*?\}|\(.*?\))", "1", re.split(r" #|[;&|>`]", command)[0])
        words = shlex.split(plain)  # a 1 is a flag's value, or flags that are not shown
        words = [word for last, word in zip(["", *words], words) if word != "1" or last.startswith("--")]
        if not {"-h", "--help"} & set(words):
            dskd_ga.build_parser().parse_args(words)
    assert len(commands) > 5
COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
TESTS = HERE / "test_dskd_ga.py", HERE / "experiments/test_experiments.py"
OTHERS = set(HERE.glob("experiments/*.py")) - {*TESTS}

def shape(path):
    """A file's lines, expressions a line of code, longest line and function, and nested comprehensions."""
    lines = path.read_text().splitlines()
    nodes = list(ast.walk(ast.parse(path.read_text())))
    code = {n for n, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"}
    longest, nested = 0, []
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef):
            longest = max(longest, node.end_lineno - node.lineno + 1)
        if isinstance(node, COMPREHENSIONS):
            inner = [x.lineno for x in ast.walk(node) if isinstance(x, COMPREHENSIONS)]
            nested += inner[1:]
    density = sum(isinstance(node, ast.expr) for node in nodes) / len(code)
    return len(lines), density, max(map(len, lines)), longest, nested

@pytest.mark.parametrize("paths, most, densest", [
    ([HERE / "dskd_ga.py"], 985, 6.8), (TESTS, 1900, 8.5), (OTHERS, 930, 7.2)])
def test_files_are_short_and_plain(paths, most, densest):
    total = 0
    for path in paths:
        lines, density, widest, longest, nested = shape(path)
        assert density <= densest and widest <= 110 and longest <= 80 and nested == [], path
        total += lines
    assert total <= most

def test_the_file_has_air_and_comments_and_its_equations_come_early():
    lines = SOURCE.splitlines()
    comments = sum(line.startswith("#") or " # " in line for line in lines)
    assert comments >= 0.14 * len(lines) and lines.count("") >= 0.08 * len(lines)
    assert SOURCE[:SOURCE.index("\n# 2. Divergences")].count("\n") < 109

def test_importing_does_nothing(capsys):
    before = random.getstate(), torch.get_rng_state().tolist(), dict(os.environ)
    runpy.run_path(dskd_ga.__file__, run_name="imported")
    assert before == (random.getstate(), torch.get_rng_state().tolist(), dict(os.environ))
    assert capsys.readouterr() == ("", "")

# ---- runs
FORK = multiprocessing.get_context("fork")
STRANGE = dict(  # settings in a student's folder that are no part of an evaluation, but for the stop tokens
    repetition_penalty=1.3, do_sample=True, top_k=7, num_beams=2, num_return_sequences=2, min_new_tokens=5,
    suppress_tokens=[5], return_dict_in_generate=True, eos_token_id=[0, 7])

def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

def edit_rows(path, change):
    """Each row of a file becomes what change(row) leaves of it."""
    rows = [json.loads(line) for line in open(path)]
    for row in rows:
        change(row)
    path.write_text("\n".join(map(json.dumps, rows)))

@pytest.fixture(scope="session")
def small(case, tmp_path_factory):
    """The demo's models and 40 of its rows. The student has dropout and strange settings, `still` has not."""
    folder = tmp_path_factory.mktemp("small") / "small"
    shutil.copytree(case, folder)
    shutil.copytree(case / "student", folder / "still")
    write_lines(folder / "raw.jsonl", *open(case / "raw.jsonl").readlines()[:40])
    edit_json(folder / "student" / "config.json", resid_pdrop=0.2, attn_pdrop=0.2)
    edit_json(folder / "student" / "generation_config.json", **STRANGE)
    edit_json(folder / "still" / "config.json", resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
    return folder

def flags(small, folder, /, **settings):
    """The command line of a run of 8 steps; settings override, None leaves a flag out."""
    tests = [f"{name}={small}/{name}.jsonl" for name in ("seen", "longer")]
    base = dict(student=small / "student", teacher=small / "teacher", teacher_ready=True, teacher_epochs=1,
                data=small, dev_rows=8, batch_size=8, micro_batch=4, epochs=2, save_every=3, dev_samplings=1,
                tests=tests, eval_limit=5, eval_batch=4, eval_seeds=[10, 20], max_new_tokens=5, out=folder)
    words = []
    for name, value in (base | settings).items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += ["--" + name.replace("_", "-"), *[str(x) for x in values if x is not True]]
    return words

def run(small, out, **settings):
    """Runs it in this process; returns the run's folder."""
    result = dskd_ga.main(flags(small, out, **settings))
    return pathlib.Path(result["model"]).parent

def log(folder):
    """The lines of its log, which are JSON (nan is none), without what depends on the machine."""
    lines = [json.loads(line, parse_constant=pytest.fail) for line in open(folder / "log.jsonl")]
    for line in lines:
        line.pop("tokens_per_s", None)
    return lines

def state_of(folder):
    return torch.load(folder / "state.pt", weights_only=True)

def scores(folder):
    """Means by set and sampling seed, and each row's scores."""
    rows = {}
    for path in (folder / "predictions").iterdir():
        rows[path.name] = json.loads(path.read_text())["rougeL"]
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
    assert (a["step"], a["best_score"]) == (b["step"], b["best_score"])
    assert not different(a["model"], b["model"])
    assert not different(weights(found / "best"), weights(whole / "best"))
    assert log(found) == log(whole) and scores(found) == scores(whole)
    assert sorted(os.listdir(found)) == sorted(os.listdir(whole))
    assert json.loads((found / "args.json").read_text())["identity"] == a["identity"]

class Child(FORK.Process):
    """A copy of this process that runs a command line, after `prepare` has broken something in it."""

    def __init__(self, command, prepare=bool, main=dskd_ga.main, **environment):
        super().__init__(daemon=True)
        self.command, self.prepare, self.main, self.environment = command, prepare, main, environment
        self.pipes = os.pipe(), os.pipe()
        self.start()
        for _, writing in self.pipes:
            os.close(writing)

    def run(self):
        for number, (_, writing) in enumerate(self.pipes, 1):
            os.dup2(writing, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(self.environment)
        self.prepare()
        self.main(self.command)

    def wait(self, seconds=60):
        """Its exit status, negative if a signal has ended it; `out` and `errors` are then what it said."""
        self.join(seconds)
        assert not self.is_alive(), f"it runs for more than {seconds} s"
        self.out, self.errors = [os.fdopen(reading).read() for reading, _ in self.pipes]
        return self.exitcode

def pair(command, other=None, prepare=(bool, bool)):
    """Two `Child`ren, as torchrun's processes on one machine, which run it together."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    shared = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    words = command, other or command
    return [Child(words[n], prepare[n], RANK=str(n), LOCAL_RANK=str(n), **shared) for n in (0, 1)]

def all_end(children):
    for child in children:
        assert child.wait() == 0, child.errors

def broken(owner, name, call, action, after=False, of=""):
    """For `prepare`: an action before or after this call, of those whose last argument ends in `of`."""
    function, calls = getattr(owner, name), itertools.count(1)
    def wrapper(*args, **settings):
        now = str(args[-1]).endswith(of) and next(calls) == call
        if now and not after:
            action(*args)
        result = function(*args, **settings)
        if now and after:
            action(*args)
        return result
    return mock.patch.object(owner, name, wrapper).start

cut = lambda path: os.truncate(path, os.path.getsize(path) // 2)
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cut_and_die = lambda path, _: (cut(path), die())
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

def others(message):
    """The state that a refusal is about, and the settings that it names."""
    return message.split()[1], sorted(re.findall(r"'other ([\w ]+)'", message))

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

@pytest.mark.parametrize("micro_batch, recompute, computed", [(8, None, 1), (3, None, 3), (4, True, 4)])
@still
def test_what_saves_memory_changes_nothing(small, runs, tmp_path, micro_batch, recompute, computed):
    layer, trained = hf.models.gpt2.modeling_gpt2.GPT2MLP, []
    forward = layer.forward
    def counted(self, x):
        trained.append(torch.is_grad_enabled())
        return forward(self, x)
    settings = dict(student=small / "still", save_every=1, micro_batch=micro_batch, recompute=recompute, **GA)
    with mock.patch.object(layer, "forward", counted):
        same_log(log(run(small, tmp_path, **settings)), log(runs.still))
    assert sum(trained) == 8 * 2 * computed  # steps, layers, micro-batches: of two, each twice

@still
def test_half_precision_trains_as_float32_does(small, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(dskd_ga, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    settings = dict(student=small / "still", save_every=1, **GA)
    found, expected = log(run(small, tmp_path, **settings)), log(runs.still)
    assert found[0]["ce"] != expected[0]["ce"]  # the products were done in halves
    same_log(found, expected, 0.05, 0.1)

def test_torchrun_changes_nothing(small, runs, tmp_path):
    command = ["--standalone", dskd_ga.__file__, *flags(small, tmp_path, **GA)]
    all_end([Child(command, main=torch.distributed.run.main, OMP_NUM_THREADS="1")])
    same_log(log(tmp_path / "cma-ga-skl-10"), log(runs.plain))

# ---- what a run writes
def test_a_run_writes_what_a_user_needs(small, runs):
    files = sorted(os.listdir(runs.plain))
    assert files == ["args.json", "best", "eval.json", "lock", "log.jsonl", "predictions", "state.pt"]
    args = json.loads((runs.plain / "args.json").read_text())
    assert args["args"]["teacher"] == str(small / "teacher") and args["identity"]["lr"] == 5e-4
    lines = log(runs.plain)
    assert [line["step"] for line in lines] == [3, 4, 6, 8]
    assert [line.pop("dev_rougeL") >= 0 for line in (lines[1], lines[3])] == [True, True]  # of two epochs
    terms = ("ce", "ce_t2s", "kd_t2s", "kd_s2t", "D_q", "D_k", "accuracy_q", "accuracy_k", "n_correct")
    for line in lines:
        assert line.keys() == {"step", "loss", "lr", "grad_norm", "tokens", *terms}
        share = (1 + math.cos(math.pi * (line["step"] - 1) / 8)) / 2
        assert line["lr"] == pytest.approx(1e-7 + (5e-4 - 1e-7) * share)
        assert all(0 <= line[name] <= 1 for name in terms[4:])
        kq = line["loss"] - 0.5 * sum(line[name] for name in terms[:4])
        assert 0.5 < kq < 1.7  # -log D(q) - log(1 - D(k)), which starts near 2 log 2
    # a line is the mean of the steps since the last one: `steady` is the same run with a line a step
    each = log(runs.steady)
    for name in ("ce", "kd_s2t", "loss", "D_k", "tokens"):
        assert lines[0][name] == pytest.approx(sum(line[name] for line in each[:3]) / 3)
        assert lines[1][name] == each[3][name]
    assert each[0]["ce"] != pytest.approx(log(runs.still)[0]["ce"], rel=1e-4)  # one of them has dropout
    state = state_of(runs.plain)
    assert state["log"] == [json.loads(line) for line in open(runs.plain / "log.jsonl")]
    assert state["log"][0]["tokens_per_s"] > 0 and state["optimizer"] is None
    assert not different(state["model"], state_of(runs.steady)["model"])
    # best/ has the projectors, and the tokenizer as it was: nothing of ours is left in it
    dskd_ga.Projectors(64, 160).load_state_dict(torch.load(runs.plain / "best/projectors.pt"))
    assert (runs.plain / "best/tokenizer.json").read_text() == (small / "student/tokenizer.json").read_text()

def test_of_a_students_settings_only_the_stop_tokens_count(small, runs, tmp_path):
    bare = shutil.copytree(small / "student", tmp_path / "student")
    write_lines(bare / "generation_config.json", '{"eos_token_id": 7}')
    same_end(run(small, tmp_path, student=bare, **GA), runs.plain)
    settings = json.loads((runs.plain / "best" / "generation_config.json").read_text())
    meant = dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, eos_token_id=[0, 7], pad_token_id=0)
    assert settings.pop("transformers_version") and settings == meant | dict(no_repeat_ngram_size=0)

def test_end_marks_in_answers_change_nothing(small, runs, tmp_path):
    mine = shutil.copytree(small, tmp_path / "mine")
    tokenizer = hf.AutoTokenizer.from_pretrained(mine / "teacher")
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<stop>"]))  # it stops the teacher, too
    tokenizer.save_pretrained(mine / "teacher")
    edit_json(mine / "teacher" / "generation_config.json", eos_token_id=[0, len(tokenizer) - 1])
    ends = itertools.cycle(["<|endoftext|>\n", " <stop>", "<stop>\n</s> ", ""])
    def mark(row):
        texts = row["output"] if isinstance(row["output"], list) else [row["output"]]
        row["output"] = [text + next(ends) for text in texts]
    for name in ("raw", "seen", "longer"):
        edit_rows(mine / f"{name}.jsonl", mark)
    same_end(run(mine, tmp_path, **GA), runs.plain)

@pytest.mark.parametrize("stdout", [io.StringIO(), io.TextIOWrapper(io.BytesIO(), "ascii")], ids=type)
def test_dev_rows_of_any_length_and_terminals_of_any_kind_will_do(small, tmp_path, monkeypatch, stdout):
    mine, numbers = shutil.copytree(small, tmp_path / "mine"), itertools.count()
    def lengthen(row):  # the dev rows
        row["prompt"] = "Größe? " * 40 if next(numbers) < 8 else row["prompt"]
    edit_rows(mine / "raw.jsonl", lengthen)
    monkeypatch.setattr(sys, "stdout", stdout)
    folder = run(mine, tmp_path, method="sft", max_prompt=60, epochs=0.5, eval_limit=1, clip=0)
    stdout.seek(0)
    assert re.search("for example: .*Gr(öß|[?]{2})e[?]", stdout.read())
    assert weights(folder / "best")["transformer.ln_f.bias"].any()  # --clip 0 does not stop the training

# ---- evaluation
def test_scores_are_those_of_the_predictions(small, runs):
    means, rows = scores(runs.plain)
    assert list(means) == ["seen", "longer", "OOD", "All"] and len(rows) == 4
    for name in ("seen", "longer"):
        tested = dskd_ga.read_rows(small / f"{name}.jsonl", 5)
        for seed, mean in zip((10, 20), means[name], strict=True):
            found = json.loads((runs.plain / "predictions" / f"{name}-{seed}.json").read_text())
            assert [dskd_ga.Row(*row) for row in found["rows"]] == tested
            by_row = dskd_ga.rouge_l(found["texts"], [row.references for row in tested])
            assert found["rougeL"] == by_row and mean == pytest.approx(sum(by_row) / 5)

def test_without_sampling_it_says_what_transformers_finds(small, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(small / "still")
    tokenizer, answers = hf.AutoTokenizer.from_pretrained(small / "still"), []
    for row in dskd_ga.read_rows(small / "seen.jsonl", 5):
        ids = tokenizer(row.prompt, return_tensors="pt")["input_ids"]
        (found,) = model.generate(ids, do_sample=False, max_new_tokens=5)
        answers.append(found[ids.shape[1]:].tolist())
    # a further stop token in the model's folder ends responses before it, and is no text
    stopped, stop = shutil.copytree(small / "still", tmp_path / "still"), answers[0][3]
    edit_json(stopped / "generation_config.json", eos_token_id=[0, stop])
    greedy = dict(eval_temperature=0, eval_batch=1, no_repeat_ngram=0)
    for name, source, stops in (("own", small / "still", [0]), ("stopped", stopped, [0, stop])):
        dskd_ga.main(flags(small, tmp_path, eval_only=source, name=name, **greedy))
        assert sorted(os.listdir(tmp_path / name / "predictions")) == ["longer-10.json", "seen-10.json"]
        texts = json.loads((tmp_path / name / "predictions/seen-10.json").read_text())["texts"]
        for text, answer in zip(texts, answers, strict=True):
            assert text == tokenizer.decode(list(itertools.takewhile(lambda x: x not in stops, answer)))

@pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's
def test_means_over_sets_by_hand(small, tmp_path, monkeypatch, capsys):
    def number_of_rows(model, rows, *_):
        settings = model.generation_config
        assert (settings.do_sample, settings.temperature, settings.no_repeat_ngram_size) == (True, 0.5, 6)
        return [""] * len(rows), [len(rows)] * len(rows)
    monkeypatch.setattr(dskd_ga, "respond", number_of_rows)
    for n in (1, 2, 6):
        (tmp_path / str(n)).write_text('{"prompt": "a", "output": "b"}\n' * n)
    tests = [f"t{n}={tmp_path}/{n}" for n in (1, 2, 6)]
    settings = dict(eval_temperature=0.5, eval_seeds=5, eval_limit=None, tests=tests)
    result = dskd_ga.main(flags(small, tmp_path, eval_only=small / "student", name="mine", **settings))
    assert result["rougeL"] == dict(t1=[1], t2=[2], t6=[6], OOD=[4], All=[3])
    assert capsys.readouterr().out.count("± 0.00") == 5  # one sampling has no spread, and no warning

def test_a_folder_holds_one_evaluation_as_in_the_models_run(small, runs, tmp_path, capsys):
    folder = tmp_path / "mine-10"
    command = flags(small, tmp_path, eval_only=runs.plain / "best", name=folder.name)
    # one that is stopped half way has no eval.json: the same command goes on, also in two processes
    stopped = Child(command, broken(dskd_ga, "respond", 3, die))
    assert stopped.wait() == -signal.SIGKILL and not (folder / "eval.json").exists()
    write_lines(folder / "predictions" / "old-10.json", "{}")  # it is of no test set of these
    all_end(pair(command))
    assert scores(folder) == scores(runs.plain)
    # a second evaluation, or a training run, does not take its place; nor does it that of a training run
    trained = shutil.copytree(runs.plain, tmp_path / "run-10")
    begun = shutil.copytree(runs.plain, tmp_path / "begun-10", ignore=lambda *_: ["eval.json", "best"])
    for settings, where, held in (
            (dict(eval_only=small / "student", name=folder.name), folder, "['eval.json']"),
            (dict(name="mine", **GA), folder, "['eval.json']"),
            (dict(eval_only=small / "student", name="run-10"), trained, "['state.pt', 'best', 'eval.json']"),
            (dict(eval_only=small / "student", name="begun-10"), begun, "['state.pt']")):
        before = sorted(where.rglob("*"))
        assert f"{where}: found {held}, expected" in refused(capsys, flags(small, tmp_path, **settings))
        assert sorted(where.rglob("*")) in (before, sorted([*before, where / "lock"]))
    assert scores(folder) == scores(trained) == scores(runs.plain)

# ---- killed, and gone on with
@steady
def test_a_run_killed_at_any_moment_ends_in_the_same_weights(small, runs, tmp_path):
    folder = tmp_path / "chosen" / "cma-ga-skl-10"
    for step, *moment in (  # the step of its state then; each goes on from the one before
            (None, os, "replace", 1, cut_and_die),     # the first state has been written in part
            (0, dskd_ga, "response_hidden", 2, die),   # the teacher reads its second batch
            (0, shutil, "rmtree", 1, die),             # it has read all
            (0, os, "replace", 1, cut_and_die, False, "state.pt"),  # the state of step 3, in part
            (3, dskd_ga, "gradient", 4, die),
            (3, os, "replace", 1, die, True, "best"),  # best/ is that of step 4, the state that of step 3
            (3, shutil, "rmtree", 2, die, True),       # the old best/ is gone, the new one not in its place
            (6, dskd_ga, "gradient", 4, die),
            (8, dskd_ga, "respond", 3, die)):          # evaluation
        child = Child(flags(small, tmp_path / "chosen", **GA), broken(*moment))
        assert child.wait() == -signal.SIGKILL, (moment, child.errors)
        found = state_of(folder)["step"] if (folder / "state.pt").exists() else None
        assert found == step, moment
    for delay in (0.1, 0.2, 0.35, 0.5, 0.7):
        child = Child(flags(small, tmp_path / "timed", **GA))
        time.sleep(delay)
        child.kill()
        assert child.wait() in (0, -signal.SIGKILL), child.errors
    for name in ("chosen", "timed"):
        same_end(run(small, tmp_path / name, **GA), runs.steady)
    # of equal dev scores the later one is kept: best/ is what the last state has
    last, projectors = state_of(runs.steady)["model"], torch.load(runs.steady / "best" / "projectors.pt")
    kept = {f"student.{name}": value for name, value in weights(runs.steady / "best").items()}
    kept |= {f"proj.{name}": value for name, value in projectors.items()}
    assert len(kept) > 20 and not different(kept, {name: last[name] for name in kept})

@steady
def test_the_state_alone_says_where_a_run_is(small, runs, tmp_path, capsys):
    command, folder = flags(small, tmp_path, **GA), tmp_path / "cma-ga-skl-10"
    assert Child(command, broken(dskd_ga, "gradient", 6, die)).wait() == -signal.SIGKILL
    killed, state = shutil.copytree(folder, tmp_path / "killed"), folder / "state.pt"
    # a state that is cut, written over in part, or none
    spoil = lambda path: os.pwrite(os.open(path, os.O_WRONLY), b"?" * 99, os.path.getsize(path) // 2)
    for damage in (cut, spoil, lambda path: torch.save([1], path)):
        shutil.copy(killed / "state.pt", state)
        damage(state)
        assert refused(capsys, command).startswith(f"dskd_ga.py: {state}")
    other = torch.load(killed / "state.pt")
    other["identity"]["match"] = "ct"  # of another method
    torch.save(other, state)
    assert others(refused(capsys, command)) == (f"{state}:", ["match"])
    state.unlink()
    assert f"{folder}: found ['best'], expected none of another run" in refused(capsys, command)
    # the files for people are cut or lost: they are whole again in the end
    for damage in (os.unlink, cut):
        shutil.copytree(killed, folder, dirs_exist_ok=True)
        for name in ("args.json", "log.jsonl"):
            damage(folder / name)
        assert others(refused(capsys, command + ["--clip", "0.5"])) == (f"{state}:", ["clip"])
        same_end(run(small, tmp_path, **GA), runs.steady)
    # a worse epoch after the stop is neither kept nor evaluated, unless the best is lost
    with mock.patch.object(dskd_ga, "rouge_l", lambda texts, references: [40.0] * len(texts)):
        for lost in (False, True):
            shutil.copytree(killed, folder, dirs_exist_ok=True)
            if lost:
                shutil.rmtree(folder / "best")
            run(small, tmp_path, **GA)
            assert bool(different(weights(folder / "best"), weights(killed / "best"))) == lost
            dskd_ga.main(flags(small, tmp_path, eval_only=folder / "best", name=f"best-{lost}"))
            for path in folder.glob("predictions/*"):
                assert path.read_text() == (tmp_path / f"best-{lost}" / "predictions" / path.name).read_text()

@steady
def test_two_processes_give_the_same_run_also_when_one_is_killed(small, runs, tmp_path):
    shared, twice, killed = [tmp_path / str(number) / "cma-ga-skl-10" for number in range(3)]
    all_end(pair(flags(small, shared.parent, **GA)))  # each reads half of the rows for both
    same_log(log(shared), log(runs.steady))
    all_end(pair(flags(small, twice.parent, recompute=True, **GA)))  # with the same dropout
    same_log(log(twice), log(shared))
    command = flags(small, killed.parent, **GA)
    for victim, *moment in ((1, dskd_ga, "gradient", 5, die), (0, os, "replace", 1, die, False, "state.pt")):
        prepare = [bool, bool]
        prepare[victim] = broken(*moment)
        children = pair(command, prepare=prepare)
        assert children[victim].wait() == -signal.SIGKILL and children[1 - victim].wait(20) > 0
    all_end(pair(command))
    same_end(killed, shared)

def test_processes_that_are_started_wrongly_train_nothing(small, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    said = "dskd_ga.py: .*(state.pt: found .*FileNotFound|RANK|found .*'other lr').*\n"
    mixed = flags(small, tmp_path / "mixed"), flags(small, tmp_path / "mixed", lr=1e-3)
    alone = Child(flags(small, here), RANK="0")
    for child in (*pair(flags(small, here), flags(small, there)), *pair(*mixed), alone):
        assert child.wait() == 2 and re.fullmatch(said, child.errors), child.errors
    assert not list(tmp_path.glob("**/best"))

# ---- contents decide
def test_the_teacher_is_fine_tuned_once_and_reads_each_row_once(small, tmp_path, capsys):
    mine = shutil.copytree(small, tmp_path / "mine")
    response_hidden, gradient = dskd_ga.response_hidden, dskd_ga.gradient
    edit_rows(mine / "raw.jsonl", lambda row: row.update(teacher_prompt="Ask" + row["prompt"]))
    tuned, read, shares, first = [], [], [], dict(GPT2LMHeadModel=set(), Qwen2ForCausalLM=set())
    def counted(model, side):
        first[type(model).__name__] |= set(side.ids[:, 0].tolist())
        if "Qwen" in type(model).__name__:
            (tuned if torch.is_grad_enabled() else read).append(len(side.ids))
        return response_hidden(model, side)
    def noted(model, *rest):
        shares.append(model.progress)
        return gradient(model, *rest)
    with mock.patch.multiple(dskd_ga, response_hidden=counted, gradient=noted):
        for n, settings in enumerate([dict(ga=True), dict(div="kl")], 1):
            run(mine, tmp_path, teacher_ready=None, **settings)
            assert sum(tuned) == 32 and sum(read) == 32 * n
    assert "lm_head.weight" in different(weights(tmp_path / "teacher-tuned/best"), weights(small / "teacher"))
    # the teacher reads its own prompts, the student does not
    for kind, source, word in ("GPT2LMHeadModel", "student", "Task"), ("Qwen2ForCausalLM", "teacher", "Ask"):
        tokenizer = hf.AutoTokenizer.from_pretrained(small / source)
        assert first[kind] == {tokenizer(word)["input_ids"][0]}
    assert capsys.readouterr().out.count("for example: Ask") == 3  # samplings of dev rows, the default
    assert shares == [0.0] + 2 * [step / 8 for step in range(8)]  # of the training, for schedules

def test_commands_that_are_started_together_share_a_teacher(small, tmp_path):
    tuning, waiting, tuned, gradient = FORK.Event(), FORK.Event(), FORK.Value("i"), dskd_ga.gradient
    def held(model, *rest):
        if model.teacher is None:
            tuned.value += 1
            tuning.set()
            waiting.wait(30)
        return gradient(model, *rest)
    with mock.patch.object(dskd_ga, "gradient", held):
        first = Child(flags(small, tmp_path, teacher_ready=None))
        assert tuning.wait(60)
        waits = broken(fcntl, "flock", 2, lambda *_: waiting.set())
        second = Child(flags(small, tmp_path, teacher_ready=None, div="kl"), waits)
        all_end([first, second])
    assert tuned.value == 1  # one step, of one of them
    assert [child.out.count("waits for another command") for child in (first, second)] == [0, 1]

def test_contents_decide_whether_it_is_the_same_run(small, tmp_path, capsys):
    mine, kept, out = [tmp_path / name for name in ("mine", "kept", "out")]
    shutil.copytree(small, mine)
    base, tuned, distilled = dict(teacher_ready=None, eval_limit=1), "teacher-tuned", "cma-skl-10"
    ready = dict(teacher_ready=True, teacher=out / tuned / "best")
    folder = run(mine, out, **base)
    text = lambda file, *change: file.write_text(file.read_text().replace(*change))
    weight = lambda model, name: weights(model, **{name: (7, 1e-3)})
    # other contents at the same place, other settings
    teachers = dict(teacher_lr=1e-3, teacher_epochs=2, dev_rows=7, max_prompt=99, max_length=199)
    students = dict(teacher_ready=True, teacher=mine / "teacher", lr=1e-3, max_new_tokens=9)
    for (change, source, *details), settings, where, other in (
            ((text, "raw.jsonl", "apple", "apples"), {}, tuned, ["rows"]),
            ((text, "raw.jsonl", "apple", "apples"), ready, distilled, ["rows"]),
            ((text, "student/tokenizer.json", '_space": false', '_space": true'), {}, distilled, ["rows"]),
            ((text, "student/config.json", "0.2", "0.3"), {}, distilled, ["student weights"]),
            ((weight, "student", "transformer.wte.weight"), {}, distilled, ["student weights"]),
            ((weight, "teacher", "lm_head.weight"), {}, tuned, ["student weights"]),
            ((bool, "."), teachers, tuned, ["dev_rows", "epochs", "lr", "max_length", "max_prompt", "rows"]),
            ((bool, "."), students, distilled, ["lr", "max_new_tokens", "teacher weights"])):
        shutil.copytree(mine, kept)
        change(mine / source, *details)
        message = refused(capsys, flags(mine, out, **base | settings))
        assert others(message) == (f"{out}/{where}/state.pt:", other)
        shutil.rmtree(mine)
        kept.rename(mine)
    # the same contents elsewhere, of other times, and what is no part of a run: nothing is trained again
    shutil.copytree(mine, kept, copy_function=shutil.copyfile)
    nothing = dict(micro_batch=2, eval_batch=1, eval_seeds=2, save_every=99, recompute=True)
    with mock.patch.object(dskd_ga, "gradient", None):
        for settings in (ready, nothing):
            assert run(kept, out, **base | settings) == folder
    # what is another student's alone leaves the teacher as it is
    files = [out / tuned / "state.pt", *(out / tuned / "best").iterdir()]
    times = [file.stat().st_mtime_ns for file in files]
    another = dict(clip=0.5, batch_size=99, dev_samplings=2, seed=11, weights=[1, 0, 0, 1], div="kl", lr=1e-3)
    assert state_of(run(mine, out, **base | another))["step"] == 2  # of all rows
    assert [file.stat().st_mtime_ns for file in files] == times

# ---- full disk, numbers that are none
@pytest.mark.parametrize("moment, last", [
    ((dskd_ga, "read_once", 1, disk_is_full), 0),
    ((torch, "save", 4, disk_is_full, False, "state.pt.tmp"), 4),  # the state of step 6
    ((dskd_ga, "save_best", 2, disk_is_full), 6),
    ((dskd_ga, "gradient", 6, disk_is_full), 4)], ids=["states", "state", "best", "log"])
@steady
def test_a_full_disk_is_told_and_leaves_the_last_save(small, runs, tmp_path, moment, last):
    child, folder = Child(flags(small, tmp_path, **GA), broken(*moment)), tmp_path / "cma-ga-skl-10"
    said = "dskd_ga.py: .*(File too large|cannot be written).*\n"
    assert child.wait() == 2 and re.fullmatch(said, child.errors), child.errors
    assert state_of(folder)["step"] == last and (last == 0 or weights(folder / "best"))
    assert not (folder / "states.tmp").exists()
    same_end(run(small, tmp_path, **GA), runs.steady)

def test_a_step_that_is_not_finite_ends_the_run_and_is_not_saved(small, tmp_path):
    child = Child(flags(small, tmp_path, save_every=2), broken(dskd_ga, "gradient", 7, spoil_gradient, True))
    folder = tmp_path / "cma-skl-10"
    assert child.wait() == 2 and re.fullmatch(r"dskd_ga.py: step 8: found .*grad_norm.*\n", child.errors)
    state = state_of(folder)
    assert state["step"] == log(folder)[-1]["step"] == 6
    for value in (*state["model"].values(), *weights(folder / "best").values()):
        assert value.isfinite().all()

@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("token", [" apple", "<|endoftext|>"])  # the second is predicted, never read
def test_a_teacher_that_is_not_finite_trains_nobody(small, tmp_path, capsys, value, token):
    teacher = shutil.copytree(small / "teacher", tmp_path / "teacher")
    (row,) = hf.AutoTokenizer.from_pretrained(teacher)(token)["input_ids"]
    weights(teacher, **{"model.embed_tokens.weight": (row, value)})
    assert "teacher" in refused(capsys, flags(small, tmp_path, teacher=teacher))
    assert not list(tmp_path.glob("*/best"))

# ---- bad input
NUMBERS = dict(clip=-1, skew=1, epochs=-1, batch_size=0, temperature=0, lr="nan", kq_weight="inf",
               eval_temperature=1e-40, no_repeat_ngram=1)
BAD = [({name: value}, f"--{name.replace('_', '-')}: found {value}") for name, value in NUMBERS.items()]
BAD += [(dict(tests=value), f"--tests: found {value}, ") for value in ("OOD=x", "All=x", "seen", "../a=x")]
BAD += [({name: "/no/such"}, "/no/such") for name in ("student", "teacher", "data")]
BAD += [  # settings, and what the line says
    (dict(weights=[0, 0, 0, 0]), "--weights: found "), (dict(eval_seeds=-1), "--eval-seeds: found "),
    (dict(eval_only="/no/such", name="a"), "/no/such"),
    (dict(dev_samplings=-2 ** 70), "--dev-samplings: found "),
    (dict(eval_only="/no/such"), "--name: found None, .*--eval-only"), (dict(method="sft", ga=True), "--ga"),
    (dict(tests=[f"a={__file__}", "a=y"]), "--tests: found a=y, "), (dict(tests="a=/no/such"), "/no/such"),
    (dict(tests=f"a={__file__}"), f"{__file__}, line 1: "), (dict(out=__file__), __file__),
    (dict(out="/proc/none"), "/proc/none"), (dict(name="a/b"), "--name: found a/b, "),
    (dict(max_prompt=2), "rows a step: found .*of 0 rows"), (dict(max_new_tokens=240, teacher_ready=None),
     r"student: found a row of 257 .* 256 positions.*lower --max-prompt or --max-new-tokens")]

@pytest.mark.parametrize("settings, said", BAD, ids=str)
def test_settings_that_cannot_work_are_told_in_one_line(small, tmp_path, capsys, settings, said):
    assert re.search(said, refused(capsys, flags(small, tmp_path, **settings)))
    assert not list(tmp_path.glob("**/state.pt"))

def test_each_parameter_needs_a_gradient_in_several_processes(small, tmp_path):
    prepare = mock.patch.object(Discriminator, "forward", lambda disc, x: disc.mlp(x).squeeze(-1)).start
    for child in pair(flags(small, tmp_path, epochs=0.25, **GA), prepare=(prepare, prepare)):
        assert child.wait() == 2 and "found ['disc.highway.weight', " in child.errors

def test_each_process_needs_a_row_of_every_step(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dskd_ga, "processes", lambda: 9)
    said = "rows a step: found --batch-size 8, of 32 rows, expected"
    assert said in refused(capsys, flags(small, tmp_path))

@pytest.mark.parametrize("which", ["student", "teacher"])
def test_rows_that_a_model_cannot_read_are_told_first(small, tmp_path, capsys, which):
    models = dict(student=small / "student", teacher=small / "teacher-same")  # with the same tokenizer
    tokenizer, ready = hf.AutoTokenizer.from_pretrained(models[which]), which == "teacher" or None
    rows = dskd_ga.pairs(dskd_ga.read_rows(small / "raw.jsonl")[8:], [tokenizer])
    longest, highest = max(len(row.s.ids) for row in rows), max(max(row.s.ids) for row in rows)
    for name, sizes, said in (
            ("short", dict(n_positions=longest - 1), f"a row of {longest} .* positions.*lower --max-length"),
            ("narrow", dict(vocab_size=highest), f"the token {highest}, expected its {highest} embeddings"),
            ("enough", dict(n_positions=longest, vocab_size=highest + 1), None)):
        folder = shutil.copytree(models[which], tmp_path / name)
        config = hf.AutoConfig.from_pretrained(folder, **sizes)
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        command = flags(small, tmp_path / "out", teacher_ready=ready, epochs=0.25, eval_limit=1,
                        max_new_tokens=1, tests=f"seen={small}/seen.jsonl", **models | {which: folder})
        if said:
            assert re.search(f"{folder}: found {said}", refused(capsys, command))
            assert not list(tmp_path.glob("out/**/state.pt"))
    dskd_ga.main(command)

# ---- in a process of its own
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

ONE_BY_ONE = """import contextlib, huggingface_hub, json, sys, dskd_ga
for offline, command in json.loads(sys.argv[1]):
    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    with contextlib.suppress(SystemExit):
        dskd_ga.main(command)
"""

def test_models_and_data_come_from_the_hub_once(small, tmp_path):
    served = shutil.copytree(small, tmp_path / "served" / "tiny").parent
    for source in dskd_ga.TEST_SETS:
        file = served / source.partition("=")[2]
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(small / "seen.jsonl", file)
    shutil.copy(small / "raw.jsonl", served / "MiniLLM" / "dolly")
    nothing = dict(tests="own=MiniLLM/dolly/nothing.jsonl")
    wanted = [  # offline, settings, what is said
        (False, {}, None), (False, dict(student="nobody/none"), "nobody/none"),
        (False, dict(data="nobody/none"), "nobody/none/raw.jsonl"), (False, nothing, "nothing.jsonl"),
        (True, dict(seed=11), None), (True, nothing, "nothing.jsonl")]
    base = dict(student="tiny/student", teacher="tiny/teacher", data=None, tests=None, eval_limit=1, epochs=1)
    commands = [(offline, flags(small, tmp_path, **base | settings)) for offline, settings, _ in wanted]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.folder, server.asked = served, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | dict(
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path / "home"),
            HF_HUB_OFFLINE="0", OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
        process = [sys.executable, "-c", ONE_BY_ONE, json.dumps(commands)]
        ended = subprocess.run(process, cwd=tmp_path, env=environment, capture_output=True, timeout=100)
        server.shutdown()
    got = [request.rpartition("/")[2] for request in server.asked if request.startswith("GET")]
    assert [got.count(name) for name in ("model.safetensors", "valid.jsonl", "raw.jsonl")] == [2, 5, 1]
    said = [named for _, _, named in wanted if named]
    for line, named in zip(ended.stderr.decode().splitlines(), said, strict=True):
        assert line.startswith("dskd_ga.py: ") and named in line
    assert server.asked[-1].endswith("/nothing.jsonl")  # nothing was asked for offline
