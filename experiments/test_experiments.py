"""Tests of experiments/: oracles that loop, hand-made cases, properties, short runs."""
import functools, hashlib, itertools, json, math, pathlib, random, re, shutil, sys, unicodedata
from types import SimpleNamespace
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import matplotlib.image
import pytest
import tokenizers
import torch
import torch.nn as nn
import transformers
from rapidfuzz.distance import Levenshtein

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import baselines
import chunks
import demo
import matching
import pictures
import report
import dskd_ga, test_dskd_ga
from test_dskd_ga import fixed_seed, gradients, same

S_LENGTHS, T_LENGTHS = [4, 2, 5], [3, 5, 1]
NAN, MAP = float("nan"), torch.tensor([0, 3, -1, 3, 1, -1, 3])  # 7 teacher tokens onto some of 5
END = (-1, -1)
RUNS = ["clp-skl-10", "cla-ga-skl-10", "cma-nq-skl-10"]

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The demo's materials, and short runs of clp, of cla with the adversary, and of cma."""
    folder = tmp_path_factory.mktemp("demo")
    demo.main([str(folder), "--rows", "new"])
    (folder / "few").mkdir()
    lines = (folder / "raw.jsonl").read_text().splitlines(keepends=True)
    (folder / "few/raw.jsonl").write_text("".join(lines[:60]))
    flags = (f"--data {folder}/few --student {folder}/student --teacher {folder}/teacher --out {folder} "
             f"--tests seen={folder}/seen.jsonl longer={folder}/longer.jsonl --eval-limit 3 --batch-size 8 "
             "--max-new-tokens 3 --dev-rows 12 --dev-samplings 1 --epochs 0.34 --teacher-ready").split()
    chunks.main([*flags, "--eval-seeds", "1", "2", "--method", "clp"])
    chunks.main([*flags, "--eval-seeds", "1", "2", "3", "--method", "cla", "--ga"])
    dskd_ga.main([*flags, "--eval-seeds", "1", "--normalise-queries"])
    return folder

# ---- baselines.py and matching.py
normal = functools.partial(test_dskd_ga.normal, grad=True)
padded = lambda *rows: test_dskd_ga.padded(*rows)[0]

def no_gradient(value, leaves):
    return all((g == 0).all() for g in gradients(value, leaves))

def side(lengths, size, extra, chunk=None):
    """A batch with random targets below size."""
    targets = padded([torch.randint(size, (n,)) for n in lengths], -100, extra)
    chunk = padded(list(map(torch.tensor, chunk)), -1, extra) if chunk else None
    return dskd_ga.Side(inputs=targets, targets=targets, mask=targets >= 0, chunk=chunk)

class Headed(nn.Linear):
    """All of a student that a loss asks for."""
    def get_output_embeddings(self):
        return self

def distiller(cls, size_s, size_t, flags="", d_s=4, d_t=3):
    args = dskd_ga.build_parser().parse_args(flags.split())
    args.without = []
    teacher = SimpleNamespace(head=normal(size_t, d_t))
    return cls(Headed(d_s, size_s, bias=False), teacher, args).double().eval()

def slow_kl(p, q):
    return sum(a * (a / b).log() for a, b in zip(p, q) if a > 0)

def slow_skl(z_s, z_t, skew=0.1):
    p, q = (z_t / 1.5).softmax(0), (z_s / 1.5).softmax(0)
    return slow_kl(p, skew * p + (1 - skew) * q)

def slow_uld(z_s, z_t):
    sides = [sorted(z.exp() / z.exp().sum(), key=lambda x: -x.item()) for z in (z_s, z_t)]
    return sum(abs(a - b) for a, b in itertools.zip_longest(*sides, fillvalue=0.0))

def slow_mined(z_t, vocabulary, gold, matched, tau):
    """A target distribution over 5 tokens."""
    weights = torch.zeros(5, dtype=torch.float64)
    for token in set(vocabulary) - {-1}:
        weights[token] = (z_t[vocabulary.index(token)] / tau).exp()
    return weights / weights.sum() if matched else nn.functional.one_hot(gold, 5).double()

@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_mined_targets(tau):
    z_t, gold, matched = normal(4, 7), torch.tensor([0, 4, 2, 3]), torch.tensor([True, True, False, True])
    found = baselines.mined_targets(z_t, MAP, gold, matched, 5, tau)
    for row, *given in zip(found, z_t, gold, matched):
        same((row / tau).softmax(0), slow_mined(given[0], MAP.tolist(), *given[1:], tau))

# the teacher's position that each student position learns from
PARTNERS = dict(kd=[[0, 1, 2, 3], [0, 1], [0, 1, 2, 3, 4]], uld=[[0, 1, 2, -1], [0, 1], [0, -1, -1, -1, -1]],
                mined=[[2, -1, 0, 0], [-1, 4], [-1, -1, 0, -1, -1]])

@pytest.mark.parametrize("method, size_t", [("kd", 5), ("uld", 7), ("uld", 3), ("mined", 7)])
@pytest.mark.parametrize("extra", [0, 2])
def test_losses_of_logits(method, size_t, extra):
    lengths = S_LENGTHS if method == "kd" else T_LENGTHS
    model = distiller(baselines.METHODS[method], 5, size_t, "--temperature 1.5")
    model.vocabulary = MAP
    rows_s, rows_t = [normal(n, 4) for n in S_LENGTHS], [normal(n, 3) for n in lengths]
    s, t = side(S_LENGTHS, 5, extra, PARTNERS["mined"]), side(lengths, 7, 2 - extra)
    out = model.distil(s, t, padded(rows_s, NAN, extra), padded(rows_t, NAN, 2 - extra))
    W_s, W_t, ce, kd = model.student.weight, model.teacher.head, 0, 0
    for b, row in enumerate(rows_s):
        for h, gold, j in zip(row, s.targets[b], PARTNERS[method][b]):
            z_s, z_t = W_s @ h, (W_t @ rows_t[b][j]).detach()
            ce = ce - z_s.log_softmax(0)[gold]
            if method == "mined":
                p = slow_mined(z_t, MAP.tolist(), gold, j >= 0, 1.5)
                kd = kd + slow_kl(p, (z_s / 1.5).softmax(0))
            elif j >= 0:
                kd = kd + (slow_uld(z_s, z_t) if method == "uld" else slow_skl(z_s, z_t))
    same([out["ce"], out["kd"], out["loss"]], [ce, kd, (ce + kd) / 2])
    same(gradients(out["loss"], [*rows_s, W_s]), gradients((ce + kd) / 2, [*rows_s, W_s]))
    assert no_gradient(out["loss"], [*rows_t, W_t])

def test_dskd():
    model = distiller(baselines.DSKD, 6, 5, "--temperature 1.5")
    rows_s, rows_t = [normal(n, 4) for n in S_LENGTHS], [normal(n, 3) for n in S_LENGTHS]
    s = side(S_LENGTHS, 6, 2)
    out = model.distil(s, side(S_LENGTHS, 5, 0), padded(rows_s, NAN, 2), padded(rows_t, NAN, 0))
    W_s, W_t, target = model.student.weight, model.teacher.head, s.targets[s.mask]
    h_s, h_t = torch.cat(rows_s), torch.cat(rows_t).detach()
    z_s, z_t2s = h_s @ W_s.T, model.proj.t2s(h_t) @ W_s.detach().T
    z_s2t, z_t = model.proj.s2t(h_s) @ W_t.detach().T, (h_t @ W_t.T).detach()
    terms = [-z.log_softmax(1)[range(len(target)), target].sum() for z in (z_s, z_t2s)]
    for z, fixed, skew in ((z_s, z_t2s.detach(), 0.1), (z_s2t, z_t, 0)):  # skl, kl
        terms.append(sum(slow_skl(*row, skew) for row in zip(z, fixed)))
    assert 0 < out["n_correct"] < len(target)  # so that counting only these would be noticed
    same([out[name] for name in ("ce", "ce_t2s", "kd_t2s", "kd_s2t")], terms)
    leaves = [*rows_s, W_s, *model.proj.parameters()]
    same(gradients(out["loss"], leaves), gradients(sum(terms) / 2, leaves))
    assert no_gradient(out["loss"], [*rows_t, W_t])

def test_token_map():
    rng = random.Random(0)
    texts = ["".join(rng.choices("abĠñ", k=i % 5)) for i in range(50)]
    s_texts, t_texts, expected = texts[:25], texts[25:], []
    for text in t_texts:
        distances = [Levenshtein.distance(text, other) for other in s_texts]
        expected.append(distances.index(min(distances)))
    assert baselines.token_map(s_texts, t_texts, block=3) == expected
    assert baselines.token_map(["", "x" * 310], ["x" * 260, "yyy"]) == [1, 0]  # distances over 255

def paths(n, m):
    """All warping paths of n x m pairs."""
    before = [shape for shape in ((n - 1, m - 1), (n - 1, m), (n, m - 1)) if min(shape)]
    return [path + [(n - 1, m - 1)] for shape in before for path in paths(*shape)] or [[(0, 0)]]

def test_warp():
    for n, m in [(1, 1), (1, 4), (4, 4), (3, 5), (5, 2)] * 5:
        cost = torch.rand(n, m).numpy()
        best = min(paths(n, m), key=lambda path: sum(cost[pair] for pair in path))
        assert sorted(zip(*baselines.warp(cost).nonzero())) == sorted(best)

class Pieces(list):
    """A tokenizer as far as `annotate` sees it."""
    def convert_ids_to_tokens(self, ids):
        return [self[i] for i in ids]

def test_mined_matches_what_the_map_sends_to_the_very_token():
    student = Pieces([":", "▁there", "12345", "▁abcd", "efgh", "-----", "▁x", None, "end"])
    teacher = Pieces([".", "Ġthere", "123", "45", "Ġabcdefgh", "-----", "y", "them", "last"])
    model = distiller(baselines.MinED, 9, 11)  # the teacher's head is larger than its tokenizer
    def numbers(s_read, t_read):
        s, t = dskd_ga.Example([8, *s_read, 8], 2), dskd_ga.Example([8, 8, *t_read, 8], 3)
        return model.annotate(None, s, t, [student, teacher])
    # read are  ":"  "12345"     "▁there"  "▁abcd" "efgh"  "-----" "-----"  "▁x"
    # partners  "."  "123" "45"  "Ġthere"  "Ġabcdefgh"     "-----"          "y"
    # of equals the first: the map sends "." and "y" to ":". The one partner of "efgh" goes to "▁abcd".
    found = numbers([0, 2, 1, 3, 4, 5, 5, 6], [0, 2, 3, 1, 4, 5, 6])
    assert found == ([0, -1, 3, 4, -1, 5, 5, -1], [0, -2, -2, 3, 4, 5, -2])
    # "▁abcd" "-----" "efgh" and "45" "." "." "-----": were the mark a letter, nothing would be matched
    assert numbers([3, 5, 4], [3, 0, 0, 5]) == ([-1, 3, -1], [-2, -2, -2, 3])
    assert model.vocabulary.tolist() == model.nearest == [0, 1, 2, 0, 3, 5, 0, 1, 0, -1, -1]

def slow_ct(critic, q, k):
    """The halves of eq. (15) for one sequence, sums over its queries and over its keys."""
    cost = 1 - critic.critic(q) @ critic.critic(k).T
    weight = (critic.navigator(q) @ critic.navigator(k).T).exp()
    to_keys, to_queries = [(cost * weight).sum(axis) / weight.sum(axis) for axis in (1, 0)]
    return to_keys.sum() / 2, to_queries.sum() / 2

@pytest.mark.parametrize("counts", [(10, 20), ()])
def test_ct_loss(counts):
    critic = matching.Critic(6, hidden=5).double().eval()
    q, k = [normal(n, 6) for n in S_LENGTHS], [normal(n, 6) for n in T_LENGTHS]
    batch = padded(q, NAN, 2), padded(k, NAN, 0), side(S_LENGTHS, 2, 2).mask, side(T_LENGTHS, 2, 0).mask
    found, terms = matching.ct_loss(critic, *batch, *counts)
    ct_q, ct_k = map(sum, zip(*map(slow_ct, [critic] * 3, q, k)))
    n_s, n_t = counts or (sum(S_LENGTHS), sum(T_LENGTHS))
    expected = ct_q / n_s + ct_k / n_t
    same([found, terms["ct_q"], terms["ct_k"]], [expected, ct_q, ct_k])
    down, up = [*q, *critic.navigator.parameters()], list(critic.critic.parameters())
    same(gradients(found, down), gradients(expected, down))  # P_Q and the navigator descend
    same(gradients(-found, up), gradients(expected, up))     # the critic ascends
    assert no_gradient(found, k)

def test_unsaturated_leaves_d_its_loss_and_gives_p_q_the_other_one():
    model = distiller(matching.Unsaturated, 5, 7, "--ga")
    s, t, q, k = side([2, 5], 5, 1), side([3, 4], 7, 0), normal(2, 6, 6), normal(2, 4, 6)
    loss, terms = model.match(q, k, s, t, 28, 60)
    eq14, expected = dskd_ga.ga_loss(model.disc, q, k, s.mask, t.mask, 28, 60)
    weights = list(model.disc.parameters())
    same(terms, expected)
    same(gradients(loss, weights), gradients(eq14, weights))
    # -log(1 - D(q)) of each real query, by hand: log of 1 + e^z
    fooled = sum(torch.log1p(model.disc(q[b, i]).exp()) for b, i in s.mask.nonzero().tolist()) / 28
    same(gradients(loss, [q]), gradients(fooled, [q]))
    assert no_gradient(loss, [k])

def test_mmd_moves_queries_to_keys():
    model = distiller(matching.MMD, 5, 7, "--ga")
    s, t, q, k = side([2, 5], 5, 1), side([3, 4], 7, 0), normal(2, 6, 6), normal(2, 4, 6)
    loss, terms = model.match(q + 3, k, s, t, 28, 60)
    same(loss, chunks.mmd((q + 3)[s.mask], k[t.mask]) * 7 / 28)
    same(terms["mmd_q"], loss.detach() * 28)
    (gradient,) = gradients(loss, [q])
    assert gradient[s.mask].sum() > 0 and not gradient[~s.mask].any() and no_gradient(loss, [k])

def test_terms_are_left_out(data, tmp_path):
    left = ["ce_t2s", "kd_s2t"]
    more = ["--match", "none", "--without", *left, "--div", "kl", "--lr", "1e-9", "--lr-projectors", "1e-9"]
    matching.main([*flags(data, tmp_path, "teacher"), *more])
    line = json.loads((tmp_path / "cma-no_ce_t2s-no_kd_s2t-kl-10/log.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx((line["ce"] + line["kd_t2s"]) / 2, abs=1e-5)
    assert 0 < line["mass"] < 1 and line["ce_t2s"] > 1 and "D_q" not in line

def flags(data, out, teacher):
    models = f"--student {data}/student --teacher {data}/{teacher} --teacher-ready"
    return f"""{models} --data {data}/few --out {out} --tests seen={data}/seen.jsonl --div srkl --dev-rows 8
        --batch-size 8 --micro-batch 4 --epochs 0.34 --lr 1e-3 --dev-samplings 1 --eval-seeds 1 --eval-limit 2
        --max-new-tokens 2""".split()

@pytest.mark.parametrize("method, name", [
    ("kd", "kd-srkl"), ("dskd", "dskd-srkl"), ("uld", "uld"), ("mined", "mined"), ("none", "cma-srkl"),
    ("ct", "cma-ct-srkl"), ("unsaturated", "cma-unsaturated-srkl"), ("mmd", "cma-mmd-srkl")])
def test_a_step(data, tmp_path, monkeypatch, method, name):
    module, classes, flag = matching, matching.MATCHES, "--match"
    if method in baselines.METHODS:
        module, classes, flag = baselines, baselines.METHODS, "--method"
    starts = []
    class Watched(classes[method]):
        def __init__(self, *args):
            super().__init__(*args)
            starts.append((self, [parameter.detach().clone() for parameter in self.parameters()]))

    monkeypatch.setitem(classes, method, Watched)
    module.main([flag, method, *flags(data, tmp_path, "teacher-same" if "kd" in method else "teacher")])
    for (key, parameter), before in zip(starts[0][0].named_parameters(), starts[0][1]):
        assert not torch.equal(parameter, before), key
    line = json.loads((tmp_path / f"{name}-10" / "log.jsonl").read_text().splitlines()[0])
    terms = [line[term] for term in ("ce", "kd", "ce_t2s", "kd_t2s", "kd_s2t") if term in line]
    assert len(terms) == (2 if method in ("kd", "uld", "mined") else 4)
    kq = sum(line.get(name, 0) for name in ("ct_q", "ct_k", "mmd_q"))
    assert method == "unsaturated" or line["loss"] == pytest.approx(sum(terms) / 2 + kq, abs=1e-4)

@pytest.mark.parametrize("method, teacher, more, message", [
    ("kd", "teacher", [], "--teacher, tokens of its head: found 4"),
    ("dskd", "teacher", [], "--teacher: found other tokens in the row"),
    ("dskd", "teacher-same", ["--ga"], "--ga"),
    ("uld", "teacher", ["--normalise-queries"], "--normalise-queries")])
def test_refusals(data, tmp_path, capsys, method, teacher, more, message):
    with pytest.raises(SystemExit) as error:
        baselines.main(["--method", method, *flags(data, tmp_path, teacher), *more])
    printed = capsys.readouterr().err
    assert error.value.code == 2 and message in printed and printed.count("\n") == 1

# ---- chunks.py, report.py and demo.py
def chunk_walk(s_spans, t_spans):
    """The side that is behind moves on; where both sides end, but not inside a character, a chunk closes."""
    result = torch.zeros(len(s_spans), len(t_spans), dtype=torch.bool)
    s_text, t_text = [span for span in s_spans if span != END], [span for span in t_spans if span != END]
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
    if END in s_spans and END in t_spans:
        result[-1, -1] = True
    return result

def test_chunk_numbers_are_the_chunk_walk():
    rng = random.Random(0)
    for _ in range(300):
        # of each byte, its character: tokens are runs of bytes, so they also end inside characters
        character = [c for c in range(rng.randint(1, 12)) for _ in range(rng.choice((1, 1, 2, 3)))]
        n, sides = len(character), []
        for _ in range(2):
            cuts = [0, *sorted(rng.sample(range(1, n), rng.randrange(n))), n]
            spans = [(character[a], character[b - 1] + 1) for a, b in zip(cuts, cuts[1:])] + [END]
            sides.append(spans[:rng.randrange(1, len(spans))] if rng.random() < 0.3 else spans)
        s, t = chunks.chunk_numbers(*sides)
        assert torch.equal(torch.tensor(s)[:, None] == torch.tensor(t), chunk_walk(*sides)), sides
        assert min(s) >= -1 and -1 not in t

@pytest.mark.parametrize("s_text, s_count, t_text, t_count, s_chunk, t_chunk", [
    ("03 35 58", 4, "02 25 58", 4, [0, 0, 1, 2], [0, 0, 1, 2]),          # many to many
    ("01 12 12", 4, "01 12 12", 4, [0, 1, 1, 2], [0, 1, 1, 2]),          # a character that both sides split
    ("02 24 36", 4, "02 24 46", 4, [0, 1, 1, 2], [0, 1, 1, 2]),          # a token goes on in that character
    ("03 47", 3, "03 37", 3, [0, 1, 2], [0, 1, 2]),                      # a space that is in no span
    ("01 12 23 34", 3, "02 23 34", 3, [0, 0, 1], [0, 1, -2]),            # truncated: one side has lost text
    ("01 12 23 34", 3, "02 24", 3, [0, 0, -1], [0, -2, -2]),
    ("01 12 12 12 23", 3, "01 12 12 23", 3, [0, -1, -1], [0, -2, -2])])  # truncated inside a character
def test_rows_are_cut_into_chunks(s_text, s_count, t_text, t_count, s_chunk, t_chunk):
    spans = []  # "13" is the span (1, 3)
    for text in (s_text, t_text):
        spans.append(dict(offset_mapping=[(int(start), int(end)) for start, end in text.split()]))
    tokenizer = mock.Mock(eos_token="<end>", side_effect=spans)
    sides = [mock.Mock(count=count) for count in (s_count, t_count)]
    assert chunks.annotate(dskd_ga.Row("P", ["abcd<end>"]), *sides, [tokenizer] * 2) == [s_chunk, t_chunk]
    assert tokenizer.call_args.args == ("abcd",)

def chunk_texts(path, output, sides, limit):
    """The text of all chunks of a row, and their number; of each, the text is the same on both sides."""
    path.write_text(json.dumps(dict(prompt="P", output=output)))
    rows, texts = dskd_ga.read_rows(path), []
    for example, tokenizer in zip(dskd_ga.pairs(rows, sides, 9, limit, chunks.annotate)[0], sides):
        ids_of = {}
        for token, number in zip(example.ids[example.start:], example.chunk, strict=True):
            ids_of.setdefault(number, []).append(token)
        texts.append({number: tokenizer.decode(ids) for number, ids in ids_of.items() if number >= 0})
    assert texts[0] == texts[1] and list(texts[0]) == sorted(texts[0])
    return "".join(texts[0].values()), len(texts[0])

WORDS = ["한국어", "naïve café", "ṩ", "你好，世界", "😀👍🏽", "a\u0323\u0301b", "ﬁ", "हिन्दी", "1 12\n", "\u1100\u1161"]
ROWS = [dict(text=" ".join(words)) for words in (WORDS, WORDS[::-1], demo.NOUNS)] * 3
TRAINED = demo.train_tokenizer(ROWS, 300, False), demo.train_tokenizer(ROWS, 360, True)
TRAINED[1].backend_tokenizer.normalizer = tokenizers.normalizers.NFC()  # as Qwen's tokenizers have

@hypothesis.settings(max_examples=150, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    words=st.lists(st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"])), min_size=1),
    form=st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]), limit=st.sampled_from([5, 12, 30, 9999]))
def test_any_text_in_any_normal_form_has_chunks_of_one_text(tmp_path_factory, words, form, limit):
    text = unicodedata.normalize(form, "|".join(words)) or "|"
    found, _ = chunk_texts(tmp_path_factory.getbasetemp() / "row.jsonl", text, TRAINED, limit)
    whole = unicodedata.normalize("NFC", text) + "<|endoftext|>"
    assert whole.startswith(found) and (found == whole or limit < 999)

def test_attention_stays_inside_chunks():
    sides, vectors = [], []
    for n, chunk in ((4, [[0, 0, 1, -1, 0], [0] * 5]), (2, [[0, 1, 1, 1, 0], [0, 0, 0, -2, -2]])):
        mask = torch.arange(5) < torch.tensor([[n], [7 - n]])
        x = torch.randn(*mask.shape, 3, dtype=torch.float64)
        vectors.append(x.masked_fill(~mask[:, :, None], math.nan))
        sides.append(dskd_ga.Side(inputs=mask, targets=mask, mask=mask, chunk=torch.tensor(chunk)))
    for method in ("clp", "cla"):
        maps = chunks.align(method, *vectors, *sides)
        for a, (x, y), (left, right) in zip(maps, (vectors, vectors[::-1]), (sides, sides[::-1])):
            expected = torch.zeros_like(a)
            for b, i in left.mask.nonzero().tolist():
                allowed = right.mask[b] & (right.chunk[b] == left.chunk[b, i])
                scores = (y[b, allowed] @ x[b, i] / math.sqrt(3)) * (method == "cla")
                expected[b, i, allowed] = scores.softmax(0)
            torch.testing.assert_close(a, expected, rtol=1e-12, atol=1e-12)

def test_alignment_numbers_by_hand():
    torch.manual_seed(0)
    q, k = torch.randn(7, 3), torch.randn(3, 3)
    chunk = lambda *rows: torch.tensor(rows) > 0
    a = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]])
    first = q[:3], k[:2], a, chunk([1, 0], [0, 1], [0, 1]), torch.tensor([5, 5, 6])
    second = q[3:], k[2:], torch.ones(4, 1), chunk([1], [1], [1], [0]), torch.tensor([7, 8, 8, 8])
    entropy = 1.5 * math.log(2) + 0.75 * math.log(4 / 3)  # of (3/4, 1/4) and of (1/2, 1/2)
    square = torch.cat([q, k]).double().unsqueeze(1).sub(torch.cat([q, k])).square().sum(2)
    kernel = torch.exp(-square / square.median())
    mmd = (kernel[:7, :7].sum() - 7) / 42 + (kernel[7:, 7:].sum() - 3) / 6 - 2 * kernel[:7, 7:].mean()
    numbers = chunks.alignment_numbers(iter([first, second]))  # the last position is in no chunk
    assert 0 <= numbers.pop("probe") <= 1 and "probe" not in chunks.alignment_numbers([first])
    assert numbers == pytest.approx(dict(
        mass=(0.75 + 0.5 + 1 + 3) / 6, mass_repeated=(0.75 + 0.5 + 1 + 1) / 4, mass_once=1.0,
        top=(1 + 0 + 1 + 3) / 6, top_once=1.0, top_repeated=3 / 4,
        entropy=entropy / 6, entropy_once=0.0, entropy_repeated=entropy / 4, mmd=mmd.item(),
        norm_q=sum(map(torch.norm, q)).item() / 7, norm_k=sum(map(torch.norm, k)).item() / 3,
        mean_gap=(q.mean(0) - k.mean(0)).norm().item()), rel=1e-4)

def test_queries_like_keys_have_no_mmd_and_cannot_be_told_apart(monkeypatch):
    torch.manual_seed(0)
    sets = [(torch.randn(9, 5), torch.randn(7, 5)) for _ in range(40)]
    rest = torch.ones(9, 7) / 7, torch.ones(9, 7) > 0, torch.ones(9)
    same = chunks.alignment_numbers((q, k, *rest) for q, k in sets)
    apart = chunks.alignment_numbers((q + 3, k, *rest) for q, k in sets)
    assert abs(same["mmd"]) < 0.01 and abs(same["probe"] - 0.5) < 0.1 and "mass_once" not in same
    assert apart["mmd"] > 0.3 and apart["probe"] > 0.95
    column = lambda *values: torch.tensor(values)[:, None]
    # by hand: the line crosses 0 at 2.0, as the mean of +1, +1, -1 is not 0
    assert chunks.probe(column(4.0, 4.0), column(0.0), column(2.1, 1.9, 3, 3), column(1.9, 0)) == 0.875
    monkeypatch.setattr(chunks, "MOST", 100)  # beyond the cap, evenly spaced vectors stand for all
    assert torch.equal(chunks.some([torch.arange(250), torch.arange(250, 401)]), torch.arange(0, 401, 5))

def test_the_demo_has_its_rows_and_clp_its_chunks(data):
    rows = [(data / f"{name}.jsonl").read_bytes() for name in ("raw", "seen", "longer")]
    assert hashlib.sha256(b"".join(rows)).hexdigest()[:8] == "2721a43d"
    sources = [str(data / name) for name in ("student", "teacher", "teacher-same")]
    models, toks = zip(*[dskd_ga.load_model(source, chunks.CPU) for source in sources])
    student, teacher, same = [tokenizer.get_vocab() for tokenizer in toks]
    assert student == same and "12" in "".join(student) and not re.search(r"\d\d", " ".join(teacher))
    teacher = mock.Mock(embeddings=models[1].get_input_embeddings(), head=dskd_ga.head_of(models[1]))
    model = chunks.Chunks(models[0], teacher, dskd_ga.build_parser(chunks.METHODS).parse_args([]))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"proj.query.weight", "proj.query.bias"}
    pairs = dskd_ga.pairs(dskd_ga.read_rows(data / "raw.jsonl", 3), toks[:2], annotate=model.annotate)
    s, t = [dskd_ga.collate(side, chunks.CPU) for side in zip(*pairs)]
    out = model.distil(s, t, torch.randn(*s.mask.shape, 64), torch.randn(*t.mask.shape, 160))
    inside = (s.chunk[:, :, None] == t.chunk[:, None]) & s.mask[:, :, None] & t.mask[:, None]
    assert torch.equal(out["a_t2s"] > 0, inside) and torch.equal(out["a_s2t"] > 0, inside.mT)

def test_predictions_by_hand():
    z = torch.tensor([[0.25, 0.25, 0.5], [0.9, 0.05, 0.05]], dtype=torch.float64).log() + 7
    entropies = [1.5 * math.log(2), -0.9 * math.log(0.9) - 0.1 * math.log(0.05)]
    expected = [[math.log(4), entropies[0], 0], [-math.log(0.9), entropies[1], 1]]
    same(chunks.predictions(z, torch.tensor([0, 0])), torch.tensor(expected, dtype=torch.float64))

def test_finished_runs_are_analysed(data, capsys, monkeypatch):
    outs, losses = [], dskd_ga.dual_space_losses
    record = lambda *args, **options: outs.append(losses(*args, **options)) or outs[-1]
    monkeypatch.setattr(dskd_ga, "dual_space_losses", record)
    chunks.main([*[str(data / name) for name in RUNS], "--figure", str(data / "heat.png")])
    lines = capsys.readouterr().out.splitlines()
    numbers = [json.loads((data / name / "numbers.json").read_text()) for name in RUNS]
    assert [line.split(" | ")[0] for line in lines] == [str(data / name) for name in RUNS]
    for line, found in zip(lines, numbers):
        assert f"mmd {found['mmd']:.3f}" in line.split(" | ")
    assert [x["mass"] for x in numbers[:2]] == pytest.approx([1, 1]) and numbers[2]["mass"] < 0.7
    assert numbers[2]["norm_q"] == pytest.approx(numbers[2]["norm_k"], rel=0.05)  # --normalise-queries
    # the dev rows' 12 responses of the last run, by transformers' own loss and by the training objective
    tokens = transformers.AutoTokenizer.from_pretrained(data / RUNS[2] / "best")
    model = transformers.AutoModelForCausalLM.from_pretrained(data / RUNS[2] / "best").eval()
    count, total = 0, 0.0
    for row in dskd_ga.read_rows(data / "few/raw.jsonl", 12):
        prompt, response = tokens(row.prompt)["input_ids"], tokens(row.references[0])["input_ids"] + [0]
        labels = torch.tensor([[-100] * len(prompt) + response])
        total += model(torch.tensor([prompt + response]), labels=labels).loss.item() * len(response)
        count += len(response)
    assert numbers[2]["ce_s"] == pytest.approx(total / count, rel=1e-4)
    for name, sums in (("ce_t2s", "ce_t2s"), ("correct_t2s", "n_correct")):
        total = sum(out[sums].item() for out in outs[-12:])
        assert numbers[2][name] == pytest.approx(total / count, rel=1e-4)
    picture = matplotlib.image.imread(data / "heat.png")[:, :, :3]
    assert (picture[0, 0] == 1).all() and picture.mean() > 0.7  # dark on white
    assert (abs(picture - (1, 0.498, 0.055)).max(2) < 0.02).sum() > 500  # the chunks' outlines

def run(name, seed, scores, rows, **numbers):  # scores: of sampling seeds, by test set
    *_, last = scores.values()
    return report.Run(name, seed, scores | dict(OOD=last, All=last), rows, numbers)

def test_a_report_keeps_training_and_sampling_seeds_apart():
    rows = dict(seen=[1.0, 2.0], longer=[3.0])
    runs = [run("sft", 1, dict(seen=[1, 3], longer=[6, 6]), rows),
            run("sft", 2, dict(seen=[5, 6, 7], longer=[6, 8, 7]), rows),  # one sampling more
            run("b", 1, dict(seen=[4, 4], longer=[2, 4]), rows, mass=0.25, top=0.5)]
    low, high = report.bootstrap(runs[:2], runs[2:])
    # sft on `seen`: runs of mean 2 and 6, of variance 2 and 1
    assert report.table(runs, "b").splitlines() == [
        "| ROUGE-L | seeds | seen | longer | All | less b | mass | top |", "|" + " --- |" * 8,
        "| sft | 2 | 4.00 ± 2.83 (1.22) | 6.50 ± 0.71 (0.71) | 6.50 ± 0.71 (0.71) | "
        f"+3.50 [{low:+.2f}, {high:+.2f}] |  |  |",
        "| b | 1 | 4.00 (0.00) | 3.00 (1.41) | 3.00 (1.41) |  | 0.25 | 0.50 |"]
    # to the right of it the same without sampling, where there is any, against the same
    runs.append(run("a", 1, dict(seen=[1], longer=[1]), rows))
    for name, score in (("b", 7), ("a", 5)):
        runs.append(run(f"{name}-greedy", 1, dict(seen=[score], longer=[1]), rows))
    cells = [line.split(" | ") for line in report.table(runs, "b", numbers=["top"]).splitlines()]
    assert cells[0][6:] == ["seen, greedy", "longer, greedy", "All, greedy", "less b, greedy", "top |"]
    assert [line[0][2:] for line in cells[2:]] == ["sft", "b", "a"] and {len(line) for line in cells} == {11}
    assert cells[2][6:] == ["", "", "", "", " |"] and cells[3][6:] == ["7.00", "1.00", "1.00", "", "0.50 |"]
    assert cells[4][6:9] == ["5.00", "1.00", "1.00"] and cells[4][9].startswith("+0.00 [")
    with pytest.raises(dskd_ga.InputError, match="sft: found seed 1 twice"):
        report.table([*runs, runs[0]])
    with pytest.raises(dskd_ga.InputError, match="rows of c: found"):
        report.table([*runs, run("c", 1, dict(t=[1]), dict(t=[1]))])

def test_the_papers_numbers_are_a_file_of_runs():
    ood = (6.01, 22.36, 16.87, 27.77, 13.44, 14.40, 14.11, 16.95, 17.00, 16.55, 17.32, 16.46, 14.46, 16.68)
    paper = report.read_runs(pathlib.Path(report.__file__).parent / "results/paper.json")
    assert [x.rougeL["OOD"][0] for x in paper] == pytest.approx(ood, abs=0.011)
    one = {name: [1.0] for name in paper[0].rougeL if name not in ("OOD", "All")}
    cma = run("cma-kl", None, one, one)
    header, _, mine, *lines = report.table([cma, *paper], "cma-kl").splitlines()
    assert header == "| ROUGE-L | seeds | Dolly | SelfInst | Vicuna | S-NI | UnNI | OOD | All | less cma-kl |"
    assert mine.startswith("| cma-kl | 1 | 1.00 |") and len(lines) == 14
    assert lines[-1] == "| paper: cma-ga-kl | 1 | 24.92 | 11.17 | 15.84 | 18.19 | 21.50 | 16.68 | 18.32 |  |"

def test_curves_and_pictures(data, tmp_path):
    for seed, end in itertools.product((1, 2), ("", "-greedy")):
        folder = shutil.copytree(data / RUNS[2], tmp_path / f"cma-skl{end}-{seed}")
        lines = [dict(step=step, loss=1, ce=seed * step / 8, D_q=1, D_k=0) for step in (10, 20, 110, 200)]
        lines.insert(3, dict(step=111, dev_rougeL=50.12345))
        (folder / "log.jsonl").write_text("" if end else "\n".join(map(json.dumps, lines)))
    report.main([*map(str, tmp_path.iterdir()), "--keep", str(tmp_path / "kept.json")])
    page = pictures.figure.Figure
    with mock.patch.object(page, "savefig", autospec=True, side_effect=page.savefig) as save:
        pictures.main([str(tmp_path / "kept.json")])
    page = save.call_args.args[0]  # its panels: scores; dev ROUGE-L, CE, nothing as none is logged, D(q), D(k)
    points = [[line.get_xydata().tolist() for line in axes.lines] for axes in page.axes[1:4]]
    assert points == [[[[111, 50.123]]], [[[10, 1.875], [20, 3.75], [200, 37.5]]], []]  # of both seeds
    assert [axes.get_visible() for axes in page.axes] == [True, True, True, False, True, True]
    assert matplotlib.image.imread(tmp_path / "kept.png").mean() > 0.9

def test_bootstrap_intervals():
    rng = random.Random(1)
    base = [rng.gauss(40, 20) for _ in range(400)]
    def one(seed, by, noise=0):
        return run("x", seed, dict(s=[0]), dict(s=[score + by + noise * rng.gauss(0, 1) for score in base]))
    # what both share cancels, so a shift of every row is certain: paired by row, and by seed
    assert report.bootstrap([one(2, 8), one(1, 2)], [one(1, 0), one(2, 6)]) == pytest.approx([2, 2])
    low, high = report.bootstrap([one(1, 0, 5)], [one(1, 0, 5)])  # of independent noise: as of a mean
    assert high - low == pytest.approx(2 * 1.96 * 5 * math.sqrt(2 / 400), rel=0.1)
    # means of two draws out of two runs 6 apart are 0, 3 or 6 off
    assert report.bootstrap([one(1, 0), one(2, 6)], [one(1, 1)]) == pytest.approx((-1, 5))
    low, high = [run("x", 1, dict(t=[0]), dict(s=[1] * 9, t=[b] * 2)) for b in (1, 5)]
    assert report.bootstrap([high], [low]) == pytest.approx([2, 2])  # sets count alike, whatever their sizes

def test_finished_runs_are_reported_and_bad_input_is_one_line(data, tmp_path, capsys):
    kept = tmp_path / "kept.json"  # has the table's numbers without the predictions
    report.main([*[str(data / name) for name in RUNS], "--baseline", "clp-skl", "--keep", str(kept)])
    printed = capsys.readouterr().out
    report.main([str(kept), "--baseline", "clp-skl"])
    assert capsys.readouterr().out == printed
    found = report.read_runs(kept)[1]  # the mean over its seeds, row by row and of all rows
    for test_set, rows in found.rows.items():
        files = (data / RUNS[1] / "predictions").glob(f"{test_set}-*.json")
        seeds = [json.loads(path.read_text())["rougeL"] for path in files]
        assert len(seeds) == 3 and rows == pytest.approx([sum(row) / 3 for row in zip(*seeds)], abs=0.051)
        assert sum(rows) / len(rows) == pytest.approx(sum(found.rougeL[test_set]) / 3, abs=0.051)
    assert re.search(r"^\| clp-skl \| 1 \| .*\n\| cla-ga-skl \| 1 \| ", printed, re.M)
    (tmp_path / "eval.json").write_text("{}")
    for main, flags, message in (
            (report.main, [tmp_path], "'rougeL'"), (report.main, ["none"], "none: found FileNotFoundError"),
            (report.main, [data / RUNS[0], "--baseline", "x"], "--baseline: found x, expected one of clp"),
            (chunks.main, ["--method", "clp", "--ga"], "--ga or --normalise-queries: found clp"),
            (chunks.main, ["--normalise-queries"], "--ga or --normalise-queries: found clp"),
            (chunks.main, ["--figure", "x"], "--figure: found no RUN"),
            (chunks.main, ["none"], "none/eval.json"), (demo.main, [tmp_path / "eval.json"], "File exists")):
        with pytest.raises(SystemExit, match="^2$"):
            main(list(map(str, flags)))
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
