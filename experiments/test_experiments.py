"""Tests of experiments/: oracles that loop or are dense, hand-made cases, properties, short runs."""
import copy, itertools, json, math, pathlib, re, sys, unicodedata

import hypothesis
import hypothesis.strategies as st
import matplotlib.image
import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import baselines, chunks, demo, matching, pictures, report
import dskd_ga
from dskd_ga import Example
from test_dskd_ga import edit_json, fixed_seed, gradients, normal, padded, same

S_LENGTHS = [4, 2, 5]
T_LENGTHS = [3, 5, 1]
ROW = dskd_ga.Row("P", ["R"])
RUNS = ["clp-skl-10", "cla-ga-skl-10", "cma-nq-skl-10"]

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The demo's materials, and short runs of clp, of cla with the adversary, and of cma."""
    folder = tmp_path_factory.mktemp("demo")
    demo.main([str(folder), "--rows", "new"])
    (folder / "few").mkdir()
    lines = (folder / "raw.jsonl").read_text().splitlines()[:60]
    first = json.loads(lines[0])
    first["output"] = first["output"][0] + " <|endoftext|>\n"  # a mark, to be taken off
    lines[0] = json.dumps(first)
    (folder / "few/raw.jsonl").write_text("\n".join(lines))
    flags = (f"--data {folder}/few --student {folder}/student --teacher {folder}/teacher --out {folder} "
             f"--tests seen={folder}/seen.jsonl longer={folder}/longer.jsonl --eval-limit 3 --batch-size 8 "
             "--max-new-tokens 3 --dev-rows 12 --dev-samplings 1 --epochs 0.34 --teacher-ready").split()
    chunks.main([*flags, "--eval-seeds", "1", "2", "--method", "clp"])
    chunks.main([*flags, "--eval-seeds", "1", "2", "3", "--method", "cla", "--ga"])
    matching.main([*flags, "--eval-seeds", "1", "--match", "none", "--normalise-queries"])
    return folder

# ---- baselines.py
class Model(nn.Linear):
    """All of a model that a loss asks for: a head (V, d), and embeddings tied to it."""

    def get_output_embeddings(self):
        return self

    def get_input_embeddings(self):
        return self.weight

def distiller(cls, size_s, size_t, flags=""):
    """A method, in float64, for vocabularies of these sizes; the teacher's width is 3."""
    args = chunks.build_parser(("cma", "clp")).parse_args(flags.split())
    student = Model(4, size_s, bias=False)
    teacher = Model(3, size_t, bias=False).double()  # no part of what is trained
    return cls(args, student, teacher).double().eval()

def side(lengths, size, extra, numbers=None):
    """A batch with random tokens below size, extra positions of padding, and maybe chunk numbers."""
    tokens, mask = padded([torch.randint(size, (n,)) for n in lengths], -100, extra)
    if numbers:
        numbers, _ = padded(list(map(torch.tensor, numbers)), -1, extra)
    return dskd_ga.Side(inputs=tokens, targets=tokens, mask=mask, chunk=numbers)

def states(lengths, width, extra):
    """Rows of random states, and the batch of them, with nan under the padding."""
    rows = [normal(n, width, grad=True) for n in lengths]
    return rows, padded(rows, math.nan, extra)[0]

def agree(found, expected, leaves):
    """Two losses have one value and one gradient."""
    same(found, expected)
    same(gradients(found, leaves), gradients(expected, leaves))

def no_gradient(value, leaves):
    return not any(g.any() for g in gradients(value, leaves))

def ce(z, target):
    return F.cross_entropy(z, target, reduction="sum")

def kl(p, q):
    return F.kl_div(q.log(), p, reduction="sum")

def skl(z_s, z_t):
    p, q = (z_t / 1.5).softmax(1), (z_s / 1.5).softmax(1)
    return kl(p, 0.1 * p + 0.9 * q)

def slow_kd(z_s, z_t, gold, matched):
    size = min(z_s.shape[1], z_t.shape[1])
    return skl(z_s[:, :size], z_t[:, :size])

def slow_uld(z_s, z_t, gold, matched):
    total = 0
    for p, q in zip(z_s[matched].softmax(1), z_t[matched].softmax(1)):
        p, q = sorted(p, reverse=True), sorted(q, reverse=True)
        for a, b in itertools.zip_longest(p, q, fillvalue=0):
            total = total + abs(a - b)
    return total

def slow_mined(z_s, z_t, gold, matched):
    target = torch.zeros_like(z_s)
    carried = z_t[:, [0, 1, 4]]  # the first that map to 0, 3, 1
    target[:, [0, 3, 1]] = (carried / 1.5).softmax(1)
    target[~matched] = F.one_hot(gold[~matched], 5).double()
    return kl(target, (z_s / 1.5).softmax(1))

# the teacher's position that each student position learns from
PARTNERS = dict(kd=[[0, 1, 2, 3], [0, 1], [0, 1, 2, 3, 4]], uld=[[0, 1, 2, -1], [0, 1], [0, -1, -1, -1, -1]],
                mined=[[2, -1, 0, 0], [-1, 4], [-1, -1, 0, -1, -1]])

@pytest.mark.parametrize("method, size_t, slow", [
    ("kd", 5, slow_kd), ("kd", 7, slow_kd), ("kd", 3, slow_kd),  # heads may be padded to other sizes
    ("uld", 7, slow_uld), ("uld", 3, slow_uld), ("mined", 7, slow_mined)])
def test_losses_of_logits(method, size_t, slow):
    model = distiller(baselines.METHODS[method], 5, size_t, "--temperature 1.5 --weights 0.7 9 0.2 9")
    model.vocabulary = torch.tensor([0, 3, 3, 0, 1, 3])  # mined's map, of fewer tokens than the head has
    partners = PARTNERS[method]
    t_lengths = S_LENGTHS if method == "kd" else T_LENGTHS
    rows_s, h_s = states(S_LENGTHS, 4, 2)
    rows_t, h_t = states(t_lengths, 3, 0)
    s = side(S_LENGTHS, 5, 2, partners)
    out = model.distil(s, side(t_lengths, 5, 0), h_s, h_t)
    learnt = []
    for row, numbers in zip(rows_t, partners):
        learnt += [row[j] for j in numbers]
        if method != "mined":  # counted from the response on: the prompts may differ
            s_row = Example([8, *range(len(numbers))], 1)
            t_row = Example([9, 9, *range(len(row))], 2)
            assert model.annotate(ROW, s_row, t_row, None) == (numbers, None)
    W_s, gold = model.student.weight, s.targets[s.mask]
    matched = s.chunk[s.mask] >= 0
    z_s = torch.cat(rows_s) @ W_s.T
    z_t = torch.stack(learnt) @ model.teacher.head.T
    kd = slow(z_s, z_t.detach(), gold, matched)
    same(out["kd"], kd)
    agree(out["loss"], 0.7 * ce(z_s, gold) + 0.2 * kd, [*rows_s, W_s])
    assert no_gradient(out["loss"], [*rows_t, model.teacher.embeddings])

def test_dskd():
    model = distiller(baselines.DSKD, 6, 5, "--temperature 1.5 --weights 0.1 0.2 0.3 0.4")
    rows_s, h_s = states(S_LENGTHS, 4, 2)
    rows_t, h_t = states(S_LENGTHS, 3, 0)
    s = side(S_LENGTHS, 6, 2)
    out = model.distil(s, side(S_LENGTHS, 5, 0), h_s, h_t)
    W_s, target = model.student.weight, s.targets[s.mask]
    W_t = model.teacher.head
    h_s, h_t = torch.cat(rows_s), torch.cat(rows_t).detach()
    z_s = h_s @ W_s.T
    z_t2s = model.proj.t2s(h_t) @ W_s.detach().T
    p_t = (h_t @ W_t.T / 1.5).softmax(1)
    q_s2t = (model.proj.s2t(h_s) @ W_t.T / 1.5).softmax(1)
    kd_t2s, kd_s2t = skl(z_s, z_t2s.detach()), kl(p_t, q_s2t)
    same([out["kd_t2s"], out["kd_s2t"]], [kd_t2s, kd_s2t])
    loss = 0.1 * ce(z_s, target) + 0.2 * ce(z_t2s, target) + 0.3 * kd_t2s + 0.4 * kd_s2t
    agree(out["loss"], loss, [*rows_s, W_s, *model.proj.parameters()])
    assert no_gradient(out["loss"], [*rows_t, model.teacher.embeddings])

def batch():
    """Rows of states, and what a method that attends gets."""
    s = side(S_LENGTHS, 5, 2, PARTNERS["uld"])  # any numbers will do
    t = side(T_LENGTHS, 7, 1, [[0, 1, 1], [0, 0, 1, -2, -2], [0]])
    rows, h_s = states(S_LENGTHS, 4, 2)
    _, h_t = states(T_LENGTHS, 3, 1)
    return rows, (s, t, h_s, h_t)

class Pieces(list):
    """A tokenizer as far as `annotate` sees it."""

    def convert_ids_to_tokens(self, ids):
        return [self[i] for i in ids]

def test_mined_matches_what_the_map_sends_to_the_very_token():
    student = Pieces([":", "▁there", "12345", "▁abcd", "efgh", "-----", "▁x", None, "end"])
    teacher = Pieces([".", "Ġthere", "123", "45", "Ġabcdefgh", "-----", "y", "them", "last"])
    model = distiller(baselines.MinED, 9, 11)  # the teacher's head is larger than its tokenizer

    def numbers(s_read, t_read):
        s_ids = list(map(int, s_read))
        t_ids = list(map(int, t_read))
        s = Example([8, *s_ids, 8], 2)
        t = Example([8, 8, *t_ids, 8], 3)
        return model.annotate(None, s, t, [student, teacher])

    # read are  ":"  "12345"     "▁there"  "▁abcd" "efgh"  "-----" "-----"  "▁x"
    # partners  "."  "123" "45"  "Ġthere"  "Ġabcdefgh"     "-----"          "y"
    # of equals the first: the map sends "." and "y" to ":". The one partner of "efgh" goes to "▁abcd".
    assert numbers("02134556", "0231456") == ([0, -1, 3, 4, -1, 5, 5, -1], [0, -2, -2, 3, 4, 5, -2])
    # "▁abcd" "-----" "efgh" and "45" "." "." "-----": were the mark a letter, nothing would be matched
    assert numbers("354", "3005") == ([-1, 3, -1], [-2, -2, -2, 3])
    assert model.vocabulary.tolist() == [0, 1, 2, 0, 3, 5, 0, 1, 0]
    assert baselines.token_map(["", "x" * 310], ["x" * 260, "yyy"], block=1) == [1, 0]  # distances over 255

# ---- matching.py
def test_ct_loss():
    critic = matching.Critic(6, hidden=5).double().eval()
    masks = side(S_LENGTHS, 2, 2).mask, side(T_LENGTHS, 2, 0).mask
    rows_q, q = states(S_LENGTHS, 6, 2)
    rows_k, k = states(T_LENGTHS, 6, 0)
    found, terms = matching.ct_loss(critic, q, k, *masks, 10, 20)
    ct_q = ct_k = 0
    for q_row, k_row in zip(rows_q, rows_k):
        cost = 1 - critic.critic(q_row) @ critic.critic(k_row).T
        nearness = critic.navigator(q_row) @ critic.navigator(k_row).T
        ct_q = ct_q + 0.5 * (cost * nearness.softmax(1)).sum()
        ct_k = ct_k + 0.5 * (cost * nearness.softmax(0)).sum()
    expected = ct_q / 10 + ct_k / 20
    same([terms["ct_q"], terms["ct_k"]], [ct_q / 10, ct_k / 20])
    descend = [*rows_q, *critic.navigator.parameters()]
    ascend = list(critic.critic.parameters())
    agree(found, expected, descend)
    same(gradients(-found, ascend), gradients(expected, ascend))
    assert no_gradient(found, rows_k)

@pytest.mark.parametrize("match, progress, reached", [
    ("early", 0.0, 1), ("early", 0.29, 1), ("early", 0.3, 0), ("placebo", 0.0, 0)])
def test_variants_of_ga_leave_d_its_loss(match, progress, reached):
    model = distiller(matching.MATCHES[match], 5, 7, "--ga")
    model.args.match, model.args.until, model.progress = match, 0.3, progress
    s, t = side([2, 5], 5, 1), side([3, 4], 7, 0)
    q, k = normal(2, 6, 6, grad=True), normal(2, 4, 6, grad=True)
    loss, terms = model.match(q, k, s, t, 28, 60)
    eq14, expected = dskd_ga.ga_loss(model.disc, q, k, s.mask, t.mask, 28, 60)
    weights = list(model.disc.parameters())
    same(terms, expected)
    same(gradients(loss, weights), gradients(eq14, weights))
    same(gradients(loss, [q]), gradients(eq14 * reached, [q]))
    assert no_gradient(loss, [k])

def test_normalised_queries_are_those_that_attend_and_that_are_matched():
    model = distiller(chunks.Chunks, 5, 7, "--normalise-queries")
    _, given = batch()
    s, t, *_ = given
    out = model.distil(*given)
    e_input, e_target = dskd_ga.embed(model.student.weight, s)
    q = model.proj.query(torch.cat([e_input, e_target], -1))
    q = dskd_ga.std_normalise(q, s.mask)
    allowed = s.mask.unsqueeze(2) & t.mask.unsqueeze(1)
    a_t2s, _ = dskd_ga.cross_model_attention(q, out["k"], allowed)
    same([out["q"], out["a_t2s"]], [q, a_t2s.detach()])
    # what is logged, summed over positions
    q, k, a = q[s.mask].detach(), out["k"][t.mask], out["a_t2s"]
    same(out["mass"], a[chunks.same_chunk(s, t)].sum())
    same(out["entropy"], -(a[a > 0] * a[a > 0].log()).sum())
    same(out["norm_q"], sum(map(torch.linalg.norm, q)))
    same(out["mean_gap"], len(q) * (q.mean(0) - k.mean(0)).norm())

# ---- runs of baselines.py and matching.py
def flags(data, out, teacher="teacher"):
    models = f"--student {data}/student --teacher {data}/{teacher} --teacher-ready"
    return f"""{models} --data {data}/few --out {out} --tests seen={data}/seen.jsonl --div srkl --dev-rows 8
        --batch-size 8 --micro-batch 4 --epochs 0.34 --lr 1e-3 --dev-samplings 1 --eval-seeds 1 --eval-limit 2
        --max-new-tokens 2""".split()

@pytest.mark.parametrize("method, name, term", [
    ("kd", "kd-srkl", "kd"), ("dskd", "dskd-srkl", "kd_s2t"), ("uld", "uld", "kd"), ("mined", "mined", "kd"),
    ("ot", "ot-srkl", "ot"), ("none", "cma-srkl", "mass"), ("ct", "cma-ct-srkl", "ct_k"),
    ("placebo", "cma-placebo-srkl", "D_q"), ("early", "cma-early-srkl", "D_q")])
def test_a_step_moves_every_parameter(data, tmp_path, monkeypatch, method, name, term):
    module, classes, flag = matching, matching.MATCHES, "--match"
    if method in baselines.METHODS:
        module, classes, flag = baselines, baselines.METHODS, "--method"
    teacher = "teacher-same" if "kd" in method else "teacher"
    starts = []

    class Watched(classes[method]):
        def __init__(self, *args):
            super().__init__(*args)
            starts.append((self, copy.deepcopy(self.state_dict())))

    monkeypatch.setitem(classes, method, Watched)
    monkeypatch.setattr(dskd_ga, "has_bf16", lambda device: True)  # as on a GPU
    module.main([flag, method, *flags(data, tmp_path, teacher)])
    (model, before), = starts
    for key, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[key]), key
    log = (tmp_path / f"{name}-10" / "log.jsonl").read_text()
    line = json.loads(log.splitlines()[0])
    assert line[term] > 0 and ("D_q" in line) == (term == "D_q")

@pytest.mark.parametrize("main, command, message", [
    (baselines.main, "--method kd", "--teacher: found other tokens in the row"),
    (baselines.main, "--method dskd", "--teacher: found other tokens in the row"),
    (baselines.main, "--method dskd --ga", "--ga: found dskd"),
    (chunks.main, "--method clp --ga", "--ga or --normalise-queries: found clp"),
    (chunks.main, "--normalise-queries", "--ga or --normalise-queries: found clp"),
    (chunks.main, "--figure x", "--figure: found no RUN"), (chunks.main, "none", "none/eval.json")])
def test_bad_input_is_one_line(data, tmp_path, capsys, main, command, message):
    given = command.split() + flags(data, tmp_path)
    with pytest.raises(SystemExit, match="^2$"):
        main(given)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1

# ---- chunks.py and demo.py
@pytest.mark.parametrize("s_text, s_length, t_text, t_length, s_chunk, t_chunk", [
    ("03 35 58", 4, "02 25 58", 4, "0 0 1 2", "0 0 1 2"),          # many to many
    ("01 12 12", 4, "01 12 12", 4, "0 1 1 2", "0 1 1 2"),          # a character that both sides split
    ("02 24 36", 4, "02 24 46", 4, "0 1 1 2", "0 1 1 2"),          # a token goes on in that character
    ("03 47", 3, "03 37", 3, "0 1 2", "0 1 2"),                    # a space that is in no span
    ("01 12 23 34", 3, "02 23 34", 3, "0 0 1", "0 1 -2"),          # truncated: one side has lost text
    ("01 12 23 34", 3, "02 24", 3, "0 0 -1", "0 -2 -2"),
    ("01 12 12 12 23", 3, "01 12 12 23", 3, "0 -1 -1", "0 -2 -2")])  # truncated inside a character
def test_chunks_by_hand(s_text, s_length, t_text, t_length, s_chunk, t_chunk):
    sides = []
    for text in (s_text, t_text):
        spans = [list(map(int, span)) for span in text.split()]  # "13" is the span from 1 to 3
        sides.append([*spans, (-1, -1)])
    numbers = chunks.chunk_numbers(*sides, (s_length, t_length))
    for found, expected in zip(numbers, (s_chunk, t_chunk)):
        assert found == list(map(int, expected.split()))

WORDS = ["한국어", "naïve café", "ṩ", "你好，世界", "😀👍🏽", "a\u0323\u0301b", "ﬁ", "हिन्दी", "1 12\n", "\u1100\u1161"]
TEXTS = [" ".join(words) for words in (WORDS, WORDS[::-1], demo.NOUNS)] * 3
TRAINED = demo.train_tokenizer(TEXTS, 300, False), demo.train_tokenizer(TEXTS, 360, True)
TRAINED[1].backend_tokenizer.normalizer = tokenizers.normalizers.NFC()  # as Qwen's tokenizers have

@hypothesis.settings(max_examples=150, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    words=st.lists(st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"])), min_size=1),
    form=st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]), limit=st.sampled_from([5, 12, 30, 9999]))
def test_any_text_in_any_normal_form_has_chunks_of_one_text(tmp_path_factory, words, form, limit):
    path = tmp_path_factory.getbasetemp() / "row.jsonl"
    text = unicodedata.normalize(form, "|".join(words)) + "|"
    path.write_text(json.dumps(dict(prompt="P", output=text)))
    rows, sides = dskd_ga.read_rows(path), []
    (pair,) = dskd_ga.pairs(rows, TRAINED, 9, limit, chunks.annotate)
    for example, tokenizer in zip(pair, TRAINED):
        tokens = {}
        response = example.ids[example.start:]
        for token, number in zip(response, example.chunk, strict=True):
            if number >= 0:
                tokens.setdefault(number, []).append(token)
        sides.append({number: tokenizer.decode(ids) for number, ids in tokens.items()})
    left, right = sides
    assert left == right and list(left) == sorted(left)
    found = "".join(left.values())
    whole = unicodedata.normalize("NFC", text) + "<|endoftext|>"
    assert whole.startswith(found) and (found == whole or limit < 999)

def test_attention_stays_inside_chunks():
    _, (s, t, *_) = batch()
    rows_q, q = states(S_LENGTHS, 3, 2)
    rows_k, k = states(T_LENGTHS, 3, 1)
    for method, b in itertools.product(chunks.METHODS, (0, 1, 2)):
        n, m = S_LENGTHS[b], T_LENGTHS[b]
        apart = s.chunk[b, :n].unsqueeze(1) != t.chunk[b, :m]
        scores = rows_q[b] @ rows_k[b].T / math.sqrt(3)
        if method == "clp":
            scores = 0 * scores
        scores = scores.masked_fill(apart, -math.inf)
        a_t2s, a_s2t = chunks.align(method, q, k, s, t)
        same(a_t2s[b, :n, :m], scores.softmax(1).nan_to_num())
        same(a_s2t[b, :m, :n], scores.T.softmax(1).nan_to_num())
        assert not a_t2s[b, n:].any() and not a_s2t[b, m:].any()
    clp = distiller(chunks.Chunks, 5, 7, "--method clp")  # asks nothing: several processes need to know that
    assert not clp.proj.query.weight.requires_grad and clp.proj.t2s.weight.requires_grad

def test_alignment_numbers_by_hand():
    q, k = torch.randn(7, 2), torch.randn(4, 2)
    a = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]])
    inside = torch.tensor([[1, 0], [0, 1], [0, 1]]) > 0
    first = q[:3], k[:2], a, inside
    a = torch.ones(4, 2) / 2
    inside = torch.tensor([[1, 1], [1, 1], [1, 1], [0, 0]]) > 0
    second = q[3:], k[2:], a, inside  # the last position is in no chunk
    numbers = chunks.alignment_numbers([first, second])
    expected = dict(mass=5.25 / 6, mmd=float(chunks.mmd(q, k)))
    assert numbers == pytest.approx(expected, rel=1e-5)
    # squared distances 0, 4, 1, of median 1
    mmd = chunks.mmd(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]])).item()
    assert mmd == pytest.approx(math.exp(-4) - 2 * math.exp(-1))
    z = torch.tensor([[0.5, 0.25, 0.25]]).log() + 7
    same(chunks.predictions(z, torch.tensor([1])), torch.tensor([[math.log(4), 1.5 * math.log(2), 0]]), 1e-5)

def test_finished_runs_are_analysed(data, capsys, monkeypatch):
    path = data / RUNS[0] / "eval.json"
    content = json.loads(path.read_text())
    del content["args"]["normalise_queries"], content["args"]["weights"]  # an older run
    path.write_text(json.dumps(content))
    outs, losses = [], dskd_ga.dual_space_losses

    def recorded(proj, *args, **options):
        outs.append(losses(proj, *args, **options) | dict(proj=proj.state_dict()))
        return outs[-1]

    monkeypatch.setattr(dskd_ga, "dual_space_losses", recorded)
    folders = [str(data / name) for name in RUNS]
    chunks.main([*folders, "--figure", str(data / "heat.png")])
    numbers = []
    for folder, line in zip(folders, capsys.readouterr().out.splitlines(), strict=True):
        found = json.loads(pathlib.Path(folder, "numbers.json").read_text())
        assert line.startswith(f"{folder} | ") and line.endswith(f" | mmd {found['mmd']:.3f}")
        numbers.append(found)
    clp, cla, cma = numbers
    assert clp["mass"] == pytest.approx(1) == cla["mass"] and cma["mass"] < 0.7
    same(dict(outs[-1]["proj"]), torch.load(data / RUNS[2] / "best/projectors.pt"))
    ce = sum(out["ce"] for out in outs[-12:])  # of cma's dev rows
    count = sum(out["a_t2s"].sum() for out in outs[-12:])
    assert cma["ce_s"] == pytest.approx(float(ce / count), rel=1e-4)
    run = chunks.read_run(data / RUNS[0])
    assert "endoftext" not in run.tokenizers[0].decode(run.pair.s.ids[:-1])  # the row's mark is off
    picture = matplotlib.image.imread(data / "heat.png")[:, :, :3]
    distance = abs(picture - (1, 0.498, 0.055)).max(2)
    orange = distance < 0.02
    assert orange.sum() > 500 and picture.mean() > 0.7  # the chunks' outlines, on white

# ---- report.py and pictures.py
def run(name, seed, score, rows=(1, 2), **more):  # score: All, the mean of two samplings
    return report.Run(name, seed, dict(s=[0], All=[score - 1, score + 1]), dict(s=rows), **more)

def runs(*texts):  # "sft 1:2.5 3:4": All of sft by training seed
    found = []
    for text in texts:
        name, *scores = text.split()
        found += [run(name, *map(float, score.split(":"))) for score in scores]
    return found

def keep(path, found):
    path.write_text(json.dumps([one._asdict() for one in found]))
    return str(path)

def printed(capsys, *argv):
    report.main(list(map(str, argv)))
    return [line[2:-2] for line in capsys.readouterr().out.splitlines()]

def refused(capsys, message, *argv):
    with pytest.raises(SystemExit, match="^2$"):
        printed(capsys, *argv)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1

T_1, T_2 = 12.706, 4.303  # Student's t from a table: 97.5 %, one and two degrees of freedom
SHARED = T_2 / math.sqrt(3)  # half the interval of 1, 2, 3
APART = T_2 * math.sqrt(2)  # of two pairs that are 2 apart each: two degrees of freedom

@pytest.mark.parametrize("ours, theirs, mean, half, over", [
    ("1:1 2:12 3:23", "3:20 2:10 1:0", 2, SHARED, "3/3"),  # by seed, not by place
    ("1:-1 2:11 3:23", "1:0 2:10 3:20", 1, 2 * SHARED, "2/3"),
    ("1:1 2:13", "1:0 2:10", 2, T_1, "2/2"),
    ("1:99 2:1 3:13", "2:0 3:10 4:-99", 2, T_1, "2/2"),  # they share a part of their seeds
    ("1:1 2:3", "2:4 4:6", -3, APART, "n 2, 2"),  # a single pair has no spread
    ("1:1 2:3", "3:4.999 4:5 5:5.001", -3, T_1, "n 2, 3")])  # Welch's: nearly all spread is of the two
def test_intervals_over_training_seeds_by_hand(ours, theirs, mean, half, over):
    low, high, found = report.interval(runs("a " + ours), runs("b " + theirs))
    assert [low, high] == pytest.approx([mean - half, mean + half], abs=0.01) and found == over

def test_with_one_training_run_the_interval_is_over_test_rows():
    one = run("a", 1, 50, (11, 32, 53))
    two = [run("b", 1, 0, (10, 20, 50)), run("b", 2, 0, (10, 40, 50))]
    low, high, over = report.interval([one], two)  # 1, 2, 3 ahead of the mean over both
    assert [low, high] == pytest.approx([2 - SHARED, 2 + SHARED], abs=0.001) and over == "rows"
    for other in (one, *two):  # a second set, with 5 and 7 ahead, counts as much as the first
        other.rows["t"] = [5, 7] if other is one else [0, 0]
    (low, high, _), half = report.interval(two, [one]), math.hypot(SHARED, T_1) / 2
    assert [low, high] == pytest.approx([-4 - half, -4 + half], abs=0.001)

def test_a_table_keeps_training_and_sampling_seeds_apart(tmp_path, capsys):
    def one(name, seed, seen, longer, **numbers):
        scores = dict(seen=seen, longer=longer, OOD=longer, All=longer)
        return report.Run(name, seed, scores, dict(seen=[1, 2], longer=[3, 4]), numbers)

    found = [one("sft", 1, [1, 3], [6, 6]), one("sft", 2, [5, 6, 7], [6, 8, 7]),
             one("b", 1, [4, 4], [2, 4], mass=0.25, top=0.5), one("b", 2, [4, 4], [2, 5], top=0.75),
             one("b-greedy", 1, [7], [1])]
    kept = keep(tmp_path / "x.json", found)
    lines = printed(capsys, kept, "--baseline", "b", "--numbers", "top")
    assert lines[0] == ("ROUGE-L | seeds | seen | longer | All | less b | "
                        "seen, greedy | longer, greedy | All, greedy | top")
    # sft on `seen`: runs of mean 2 and 6, of variance 2 and 1; on All 3 and 3.5 ahead, so 3.25 ± t / 4
    assert lines[2] == ("sft | 2 | 4.00 ± 2.83 (1.22) | 6.50 ± 0.71 (0.71) | 6.50 ± 0.71 (0.71) | "
                        "+3.25 [+0.07, +6.43] 2/2 |  |  |  | ")
    assert lines[3].endswith("3.25 ± 0.35 (1.80) |  | 7.00 | 1.00 | 1.00 | 0.62 ± 0.18")
    refused(capsys, "--baseline: found x, expected one of sft, b, b-greedy", kept, "--baseline", "x")
    refused(capsys, "sft: found seed 1 twice", kept, kept)
    other = found[0]._replace(name="c", rows=dict(seen=[1], longer=[3, 4]))
    refused(capsys, "rows of c: found", kept, keep(tmp_path / "c.json", [other]))
    refused(capsys, "none: found FileNotFoundError", "none")

def test_a_summary_has_a_line_a_setting_and_what_the_paper_reports(tmp_path, capsys):
    found = runs("cma-ga-skl 1:3 2:5 3:4", "cma-skl 1:2 2:4.1 3:2.9", "sft 1:9 2:13 3:11",
                 "cma-ga-skl-greedy 1:1 2:5", "cma-skl-greedy 1:0 2:2")
    single = [run("cma-ga-skl", 1, 3, (2, 5)), run("cma-skl", 1, 2, (1, 3))]
    files = keep(tmp_path / "new.json", found), keep(tmp_path / "demo.json", single)
    lines = printed(capsys, "--summary", *files)
    assert lines[0].startswith("All, f is skl | CMA-GA less CMA | CMA-GA less CMA, greedy | CMA-GA less SFT")
    assert lines[2:5] == [  # 1, 0.9, 1.1 ahead, greedily 1 and 3; 6, 8, 7 and 7, 8.9, 8.1 behind
        "new | +1.00 [+0.75, +1.25] 3/3 ahead | +2.00 [-10.71, +14.71] 2/2 level | "
        "-7.00 [-9.48, -4.52] 0/3 behind |  | -8.00 [-10.37, -5.63] 0/3 behind |  | 2.0",
        "demo | +1.50 [-4.85, +7.85] rows |  |  |  |  |  | ",  # one training run has no verdict
        "the paper | OOD +0.37, where f of CMA is srkl; All 16.40 to 18.32, where f is kl |  |  |  |  |  | "
        "not given"]
    paper = pathlib.Path(report.__file__).parent / "results/paper.json"
    known = {one.name: one.rougeL for one in report.read_runs(paper)}
    for name, said in (("cma-kl", "All 16.40"), ("cma-ga-kl", "to 18.32")):
        assert said in lines[4] and said.endswith(f"{known['paper: ' + name]['All'][0]:.2f}")

def write_run(folder, *scores):
    """A finished run on a test set of four rows; scores: of each sampling seed."""
    prompts = ["Compare 12 and 13", "Which is larger, 1 or 2?", "Compare 5 and 6", "Say in reverse: lake"]
    rows = [[f"Task: {prompt}\nAnswer:\n", ["x"], None] for prompt in prompts]
    (folder / "predictions").mkdir(parents=True)
    for seed, values in enumerate(scores):
        dskd_ga.write_json(folder / f"predictions/s-{seed}.json", dict(rows=rows, rougeL=values))
    means = np.mean(scores, 1).tolist()
    result = dict(args=dict(eval_seeds=[0, 1]), rougeL=dict(s=means, All=means))
    dskd_ga.write_json(folder / "eval.json", result)
    log = [dict(step=100, D_q=0.12345, D_k=0), dict(step=110, D_q=1, D_k=1), dict(step=200, D_q=0.5, ce=1)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    return folder

def test_tasks_and_curves_are_kept(tmp_path, capsys):
    folders, kept = [], tmp_path / "kept.json"
    for seed, first in ((1, 10), (2, 34)):  # in the mean over samplings; so "Compare" is 5 and 17 ahead
        folders.append(write_run(tmp_path / f"cma-skl-{seed}", [1, 20, 3, 0], [3, 20, 5, 0]))
        ours = [first, 20, 3, seed], [first + 4, 20 + seed, 5, seed]
        folders.append(write_run(tmp_path / f"cma-ga-skl-{seed}", *ours))
    printed(capsys, *folders, "--keep", kept)
    assert printed(capsys, "--tasks", "s", kept)[2:5] == [
        "Compare (2 rows) | +11.00 [-65.24, +87.24] 2/2 level |  |  |  |  |  | 8.5, a lottery",
        "Which is larger (1 rows) | +0.75 [-2.43, +3.93] 2/2 level |  |  |  |  |  | 0.4",
        "Say in reverse (1 rows) | +1.50 [-4.85, +7.85] 2/2 level |  |  |  |  |  | 0.7"]
    assert report.read_runs(kept)[0].curves == dict(D_q=[[100, 0.123], [200, 0.5]], D_k=[[100, 0]])
    lines = printed(capsys, kept, "--numbers", "D_q@200", "D_k@200", "D_k@100")
    assert lines[0].endswith(" | D_q@200 | D_k@100") and lines[2].endswith(" | 0.50 ± 0.00 | 0.00 ± 0.00")
    greedy = write_run(tmp_path / "sft-greedy-1", [1, 2, 2, 3])  # one of two seeds
    assert report.read_runs(greedy)[0].rows == dict(s=[1, 2, 2, 3])
    edit_json(greedy / "eval.json", rougeL=dict(s=[2.1], All=[2.1]))  # the mean is 2
    refused(capsys, "s: [2.1] in eval.json, [2.0] in predictions/", greedy)
    (greedy / "predictions/s-0.json").unlink()
    refused(capsys, "sft-greedy-1/predictions/s-0.json", greedy)
    keep(kept, runs("sft 1:1 2:2"))  # as former versions did, without tasks
    refused(capsys, "--tasks: found s, expected", kept, "--tasks", "s")

def test_kept_runs_have_the_table_of_the_finished_ones(data, tmp_path, capsys):
    kept = tmp_path / "kept.json"
    lines = printed(capsys, *[data / name for name in RUNS], "--baseline", "clp-skl", "--keep", kept)
    assert lines[2].startswith("clp-skl | 1 | ") and " rows" in lines[3]
    assert printed(capsys, kept, "--baseline", "clp-skl") == lines

def test_the_page_has_the_tables_that_its_commands_print(capsys, monkeypatch):
    folder = pathlib.Path(report.__file__).parent
    found = re.findall(r"`\.\./report\.py (.+?)`.*\n\n((?:\|.*\n)+)", (folder / "README.md").read_text())
    monkeypatch.chdir(folder / "results")
    for command, table in found:
        report.main(command.split())
        assert capsys.readouterr().out.startswith(table), command
    assert len(found) > 8

def test_pictures(tmp_path):
    found = runs("cma-skl 1:1 2:2 3:3", "cma-kl 1:-1 2:-1", "teacher 1:50", "sft 1:0 2:3 3:3",
                 "cma-ga-kl 1:3 2:5", "sft-greedy 1:9 2:9")
    for seed in (1, 2, 3):
        curves = dict(D_q=[[10, seed / 4], [100, 1]], D_k=[[10, 0.25]])
        found.append(run("cma-ga-skl", seed, 3 * seed, curves=curves))
    found.append(run("cma-mmd-skl", 4, 0, curves=dict(D_q=[[10, 0.75]])))
    panel, curves = pictures.figure.Figure().subplots(2)
    pictures.draw_differences(panel, report.by_name(found))
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == ["sft 1/3", "cma-ga-skl 3/3", "cma-ga-kl 2/2"]  # each less CMA of its f, sorted
    bar, seeds = [line.get_xdata() for line in panel.lines[2:4]]
    assert list(bar) == pytest.approx([4 - 2 * SHARED, 4, 4 + 2 * SHARED], abs=0.001)
    assert list(seeds) == [2, 4, 6]
    pictures.draw_discriminator(curves, report.by_name(found))
    points = [line.get_xydata().tolist() for line in curves.lines]
    assert points == [[[10, 0.75]], [[10, 0.5], [100, 1]], [[10, 0.25]]]  # means over seeds
    colours = [line.get_color() for line in [*panel.lines[1:3], *curves.lines]]
    assert colours == ["0.6", "C1", "0.6", "C1", "C1"] and curves.get_xscale() == "log"
    pictures.main([keep(tmp_path / "new.json", found), keep(tmp_path / "few.json", found[:3])])
    assert (tmp_path / "discriminator.png").exists() and (tmp_path / "differences.png").exists()
