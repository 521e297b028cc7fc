#!/usr/bin/env python3
"""DSKD-CLP and DSKD-CLA, eqs. (10)-(13): attention inside chunks of text. And what finished runs predict on
development rows, and how attention, of CMA, CLP or CLA, aligns student and teacher, in numbers and pictures.

    python experiments/chunks.py --method clp                        # trains; takes dskd_ga.py's flags
    python experiments/chunks.py runs/cma-skl-10 --figure heat.png   # writes numbers.json, and draws a row

Departures from the paper
  1. Chunks, the smallest texts that begin and end between tokens of both sides, are made of target tokens,
     which are what the positions predict.
  2. Eqs. (12) and (13) print a softmax of M and of M times the scores, elementwise, which would leave weight
     outside the chunk. As in the paper's text and the authors' code, there is none.
"""
import functools, json, math, pathlib, sys
from types import SimpleNamespace
import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import dskd_ga
from dskd_ga import (InputError, check, collate, cross_model_attention, end_marks, head_of, load_model,
                     read_rows, response_hidden, std_normalise)

METHODS = ("clp", "cla")
CPU = torch.device("cpu")
DEV_ROWS = 100  # read for a run's numbers, at most
MOST = 4096     # queries, and keys, that are compared each with each
load_teacher = functools.cache(load_model)  # once for all runs that are compared

# Chunks =====================================================================================================
def chunk_numbers(s_spans, t_spans, lengths=(None, None)):
    """The number of the chunk, eq. (10), of each target token of a row, in two lists. Spans are (start, end)
    characters of the student's and the teacher's tokens, end of text is (-1, -1); lengths: how many of them
    either side has kept. Tokens without a chunk, as those after the last common cut, have -1 on the student's
    side, -2 on the teacher's."""
    ends, cuts = [], []
    for spans, length in zip((s_spans, t_spans), lengths):
        spans = np.array(spans, float)
        spans[spans < 0] = np.inf
        start, end = spans.T
        following = np.append(start[1:], np.inf)[:length]
        end = end[:length]
        cuts.append(end[following >= end])  # not inside a character, which the next token goes on with
        ends.append(end)
    common = np.intersect1d(*cuts)
    result = []
    for end, none in zip(ends, (-1, -2)):
        number = np.searchsorted(common, end)  # the cuts before it: as many for all of a chunk
        result.append(np.where(number < len(common), number, none).tolist())
    return result

def annotate(row, s, t, tokenizers):
    """The chunk numbers of a row's response tokens on either side, see `dskd_ga.pairs`."""
    spans = []
    for tokenizer in tokenizers:
        encoded = tokenizer(row.references[0], add_special_tokens=False, split_special_tokens=True,
                            verbose=False, return_offsets_mapping=True)
        spans.append(encoded["offset_mapping"] + [(-1, -1)])
    return chunk_numbers(*spans, (s.length, t.length))

def real_pairs(s, t):  # (B, S, T), bool: of two `Side`s
    return s.mask.unsqueeze(2) & t.mask.unsqueeze(1)

def same_chunk(s, t):
    """M^{t->s} (B, S, T), bool, of two `Side`s with chunk numbers."""
    return real_pairs(s, t) & (s.chunk.unsqueeze(2) == t.chunk.unsqueeze(1))                  # (11)

def align(method, q, k, s, t):
    """A^{t->s} (B, S, T) and A^{s->t} (B, T, S) of clp or cla, for q (B, S, w), k (B, T, w) and `Side`s with
    chunk numbers; of CMA for any other method. Rows sum to 1; those of positions in no chunk are 0."""
    if method not in METHODS:
        return cross_model_attention(q, k, real_pairs(s, t))                                  # (3)
    allowed = same_chunk(s, t)
    if method == "cla":
        return cross_model_attention(q, k, allowed)                                           # (13)
    m = allowed.to(q.dtype)
    return F.normalize(m, p=1, dim=2), F.normalize(m.mT, p=1, dim=2)                          # (12)

class Chunks(dskd_ga.Distiller):
    """CLP, CLA, or CMA with chunk numbers; with --normalise-queries N_std(Q) stands in place of Q."""
    annotate = staticmethod(annotate)

    def __init__(self, student, teacher, args):
        super().__init__(student, teacher, args)
        if args.method == "clp":
            self.proj.query.requires_grad_(False)  # uniform weights ask nothing

    def queries(self, q, s):
        return std_normalise(q, s.mask) if self.args.normalise_queries else q

    def align(self, q, k, s, t):
        return align(self.args.method, self.queries(q, s), k, s, t)

    def distil(self, s, t, h_s, h_t):
        out = super().distil(s, t, h_s, h_t)
        mass = (out["a_t2s"] * same_chunk(s, t)).sum()  # of attention in the right chunk
        return out | dict(q=self.queries(out["q"], s), mass=mass)

# Finished runs ==============================================================================================
PREDICTION = [name + model for model in ("_s", "_t2s") for name in ("ce", "entropy", "correct")]

def predictions(z, targets):
    """Of logits (n, V) and gold tokens (n,), (n, 3): cross-entropy, entropy, and if gold has the highest."""
    log_p = z.log_softmax(1)
    ce = F.nll_loss(log_p, targets, reduction="none")
    entropy = torch.special.entr(log_p.exp()).sum(1)
    return torch.stack([ce, entropy, z.argmax(1) == targets], 1)

def alignment_numbers(rows):
    """How well A^{t->s} finds the right chunk, and how far queries are from keys: a dict of numbers.
    rows: of each row q (n, w), k (m, w), a_t2s (n, m), inside (n, m), True where a chunk is, and the
    student's targets (n,). Means over the student's positions that have a chunk, and over those whose token
    comes `_once` or is `_repeated` in its response: `mass` of attention inside the chunk; `top`, the share
    whose strongest key is in it; `entropy`, in nats. Of queries and keys: `mean_gap` |mean q - mean k|, mean
    `norm_q` and `norm_k`, `mmd`, and `probe`, fitted on the even rows and tested on the odd ones."""
    queries, keys, *rest = zip(*rows)
    tables = []
    for a, inside, targets in zip(*rest):
        mass = (a * inside).sum(1)
        top = inside[range(len(a)), a.argmax(1)]
        entropy = torch.special.entr(a).sum(1)
        repeated = (targets.unsqueeze(1) == targets).sum(1) > 1
        table = torch.stack([mass, top, entropy, repeated], 1)
        tables.append(table[inside.any(1)])
    table = torch.cat(tables)
    repeated = table[:, 3] > 0
    splits = {"": table, "_once": table[~repeated], "_repeated": table[repeated]}
    numbers = {}
    for split, part in splits.items():
        if len(part):
            mass, top, entropy, _ = part.mean(0)
            numbers |= {"mass" + split: mass, "top" + split: top, "entropy" + split: entropy}
    q, k = some(queries), some(keys)
    mean_gap = torch.dist(q.mean(0), k.mean(0))
    norm_q, norm_k = q.norm(dim=1).mean(), k.norm(dim=1).mean()
    numbers |= dict(mmd=mmd(q, k), mean_gap=mean_gap, norm_q=norm_q, norm_k=norm_k)
    if len(queries) > 1:
        halves = queries[::2], keys[::2], queries[1::2], keys[1::2]
        numbers["probe"] = probe(*map(some, halves))
    return {name: float(number) for name, number in numbers.items()}

def some(rows):  # their vectors; of more than MOST, evenly spaced ones
    vectors = torch.cat(rows)
    return vectors[::math.ceil(len(vectors) / MOST)]

def mmd(x, y):
    """The squared MMD of x (n, w), y (m, w), unbiased; kernel: exp(-|a - b|^2 / median of all |a - b|^2)."""
    n = len(x)
    z = torch.cat([x, y])
    distance = torch.cdist(z, z).square()
    kernel = torch.exp(-distance / distance.detach().median())  # whose width is a constant
    between = kernel[:n, n:].mean()
    within = 0
    for block in (kernel[:n, :n], kernel[n:, n:]):
        pairs = block.numel() - len(block)  # but for those of a vector with itself
        within = within + (block.sum() - block.trace()) / max(1, pairs)
    return within - 2 * between

def probe(x, y, x_test, y_test):
    """Balanced accuracy, on others, of the ridge regression that tells x (n, w) from y (m, w)."""
    z = torch.cat([x, y]).double()
    label = torch.ones_like(z[:, 0])
    label[len(x):] = -1
    mean, middle = z.mean(0), label.mean()
    z -= mean
    covariance = z.mT @ z
    covariance.diagonal().add_(1e-3 * covariance.trace() / len(z))
    direction = torch.linalg.solve(covariance, z.mT @ label)
    x_right = (x_test - mean) @ direction > -middle
    y_right = (y_test - mean) @ direction < -middle
    shares = x_right.double().mean(), y_right.double().mean()
    return sum(shares).item() / 2

@torch.no_grad()
def read_run(folder):
    """A finished run: `name`, `tokenizers`, `numbers`, which it writes, and its first dev row's `pair` and
    `map`, A^{t->s} (n, m). Without queries, as in sft, there is no map, and the numbers are those of p^s."""
    # 1. models; settings that an older run did not have get their defaults
    (folder / "eval.json").stat()  # OSError: it is not finished
    found = json.loads((folder / "args.json").read_text())["args"]
    args = build_parser(METHODS).parse_args([], SimpleNamespace(**found))
    loaded = [load_model(str(folder / "best"), CPU)]
    if args.method != "sft":
        loaded.append(load_teacher(args.teacher, CPU))
    (student, *teacher), tokenizers = zip(*loaded)
    model, path = None, folder / "best/projectors.pt"
    weights = torch.load(path, map_location=CPU, weights_only=True) if path.exists() else {}
    if "query.weight" in weights:
        head, embeddings = head_of(*teacher), teacher[0].get_input_embeddings()
        model = Chunks(student, SimpleNamespace(head=head, embeddings=embeddings), args).eval()
        model.proj.load_state_dict(weights)

    # 2. rows
    marks = [mark for pair in loaded for mark in end_marks(*pair)]
    source = dskd_ga.fetch(f"{args.data}/raw.jsonl")
    rows = read_rows(source, min(args.dev_rows, DEV_ROWS), marks)
    pairs = dskd_ga.pairs(rows, tokenizers, args.max_prompt, args.max_length, model and annotate)
    check(pairs, folder, "no dev row within its limits", "at least one")

    # 3. numbers
    W_s = head_of(student)
    tables, alignment = [], []
    for pair in pairs:
        s, t = [example and collate([example], CPU) for example in pair]
        h_s, targets = response_hidden(student, s), s.targets[0]
        columns = [predictions(h_s[0] @ W_s.mT, targets)]  # of p^s
        if model:
            out = model.distil(s, t, h_s, response_hidden(*teacher, t))
            q, k, a, h_t2s = [out[name][0] for name in ("q", "k", "a_t2s", "h_t2s")]
            q_t2s = predictions(h_t2s @ W_s.mT, targets)
            columns.append(q_t2s.where(a.any(1, keepdim=True), math.nan))  # not without a chunk
            alignment.append((q, k, a, same_chunk(s, t)[0], targets))
        tables.append(torch.cat(columns, 1))
    means = torch.cat(tables).nanmean(0).tolist()
    numbers = dict(zip(PREDICTION, means))
    if model:
        numbers |= alignment_numbers(alignment)
    (folder / "numbers.json").write_text(json.dumps(numbers))
    return SimpleNamespace(name=folder.resolve().name, pair=pairs[0], tokenizers=tokenizers, numbers=numbers,
                           map=alignment[0][2] if model else None)

def draw(path, runs):
    """Writes a picture of A^{t->s} on the first dev row, by each of the runs, with its chunks."""
    from matplotlib import figure, patches  # training needs no matplotlib
    s, t = runs[0].pair
    width = len(runs) * (1.8 + 0.16 * t.length)  # in inches
    height = 1.5 + 0.16 * s.length
    page = figure.Figure((width, height), facecolor="white", layout="constrained")  # to be read on any page
    panels = page.subplots(1, len(runs), squeeze=False)[0]
    for axes, run in zip(panels, runs):
        image = axes.imshow(run.map.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set(title=run.name, xlabel="teacher's tokens", ylabel="student's tokens")
        for axis, example, tokenizer in zip((axes.yaxis, axes.xaxis), run.pair, run.tokenizers):
            tokens = map(tokenizer.decode, example.ids[example.start:])
            labels = [token.replace(" ", "·").replace("\n", "↵") for token in tokens]
            axis.set_ticks(range(example.length), labels, fontsize=8, parse_math=False)
        axes.tick_params("x", rotation=90)
        s, t = [example.chunk for example in run.pair]
        for chunk in set(s) & set(t):
            corner = t.index(chunk) - 0.5, s.index(chunk) - 0.5
            size = t.count(chunk), s.count(chunk)
            box = patches.Rectangle(corner, *size, fill=False, edgecolor="C1")
            axes.add_patch(box)
    page.colorbar(image, ax=panels, label="weight")
    page.savefig(path, dpi=150)

def build_parser(methods):
    """dskd_ga.py's command line, and --normalise-queries."""
    parser = dskd_ga.build_parser(methods)
    parser.add_argument("--normalise-queries", action="store_true", help="N_std(Q) in place of Q, as for K")
    return parser

def main(argv=None):
    """Trains, and returns what eval.json holds; or, where runs are named, analyses these."""
    parser = build_parser(METHODS)
    add = parser.add_argument_group("analysis: no training, no other flag counts").add_argument
    add("runs", metavar="RUN", nargs="*", type=pathlib.Path, help="folders of finished runs, cma's too")
    add("--figure", metavar="FILE", help="draw attention on the first dev row, as .png or .svg")
    args = parser.parse_args(argv)
    disable_progress_bar()
    try:
        queries = args.ga or args.normalise_queries
        check(args.method != "clp" or not queries, "--ga or --normalise-queries", "clp", "cla or cma")
        check(args.runs or not args.figure, "--figure", "no RUN", "the folders of finished runs")
        runs = []
        for folder in args.runs:
            run = read_run(folder)
            print(folder, *[f"{name} {x:.3f}" for name, x in run.numbers.items()], sep=" | ")
            check(run.map is not None or not args.figure, folder, "no queries", "a run of cma, clp or cla")
            runs.append(run)
        if args.figure:
            draw(args.figure, runs)
    except (InputError, OSError) as error:
        parser.exit(2, f"chunks.py: {' '.join(str(error).split())}\n")
    return None if runs else dskd_ga.main(argv, build_parser(METHODS), Chunks)

if __name__ == "__main__":
    main()
