#!/usr/bin/env python3
"""DSKD-CLP and DSKD-CLA, eqs. (10)-(13): attention inside chunks of text. And numbers of finished runs on
development rows: what they predict, and how attention, of CMA, CLP or CLA, aligns student and teacher.

    python experiments/chunks.py --method clp                        # trains; takes dskd_ga.py's flags
    python experiments/chunks.py runs/cma-skl-10 --figure heat.png   # writes numbers.json, and draws a row

Chunks, the smallest texts that begin and end between tokens of both sides, are of target tokens. Eqs. (12)
and (13) print a softmax of M and of M times the scores, which would leave weight outside the chunk. As in the
paper's text and the authors' code, there is none.
"""
import json, math, pathlib, sys
from types import SimpleNamespace
import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils.logging import disable_progress_bar
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import dskd_ga
from dskd_ga import (
    check, collate, cross_model_attention, head_of, load_model, response_hidden, std_normalise)

METHODS = ("clp", "cla")

# Chunks =====================================================================================================
def chunk_numbers(s_spans, t_spans, lengths):
    """The number of each target token's chunk, eq. (10), in a list for the student and one for the teacher.
    Spans are (start, end) characters of tokens, (-1, -1) for end of text; lengths: how many are kept.
    Tokens after the last common cut are in no chunk: -1 for the student's, -2 for the teacher's."""
    ends, cuts = [], []
    for spans, length in zip((s_spans, t_spans), lengths):
        start, end = np.where(np.less(spans, 0), np.inf, spans).T
        whole = end <= np.append(start[1:], np.inf)  # else the next token goes on inside its last character
        ends.append(end[:length])
        cuts.append(end[:length][whole[:length]])
    common = np.intersect1d(*cuts)
    result = []
    for end, none in zip(ends, (-1, -2)):
        number = np.searchsorted(common, end)  # the cuts before it: as many for all of a chunk
        result.append(np.where(number < len(common), number, none).tolist())
    return result

def annotate(row, s, t, tokenizers):  # the chunk numbers of a row, see `dskd_ga.pairs`
    spans = []
    for tokenizer in tokenizers:
        encoded = tokenizer(row.references[0], add_special_tokens=False, split_special_tokens=True,
                            verbose=False, return_offsets_mapping=True)
        spans.append(encoded["offset_mapping"] + [(-1, -1)])
    return chunk_numbers(*spans, (s.length, t.length))

def real_pairs(s, t):  # (B, S, T), bool: of two `Side`s
    return s.mask.unsqueeze(2) & t.mask.unsqueeze(1)

def same_chunk(s, t):  # M^{t->s} (B, S, T), bool: of two with chunk numbers
    return real_pairs(s, t) & (s.chunk.unsqueeze(2) == t.chunk.unsqueeze(1))                  # (11)

def align(method, q, k, s, t):
    """q (B, S, w), k (B, T, w), `Side`s with chunk numbers -> A^{t->s} (B, S, T), A^{s->t} (B, T, S) of clp,
    cla or, for any other method, CMA. Rows sum to 1; those of positions in no chunk are 0."""
    allowed = same_chunk(s, t) if method in METHODS else real_pairs(s, t)
    if method == "clp":
        m = allowed.to(q.dtype)
        return F.normalize(m, p=1, dim=2), F.normalize(m.mT, p=1, dim=2)                      # (12)
    return cross_model_attention(q, k, allowed)                                               # (3), (13)

class Chunks(dskd_ga.Distiller):  # CLP, CLA, or CMA with chunk numbers
    annotate = staticmethod(annotate)
    def __init__(self, args, student, teacher=None):
        super().__init__(args, student, teacher)
        if args.method == "clp":
            self.proj.query.requires_grad_(False)  # uniform weights ask nothing

    def queries(self, q, s):
        return std_normalise(q, s.mask) if self.args.normalise_queries else q

    def align(self, q, k, s, t):
        return align(self.args.method, self.queries(q, s), k, s, t)

    def distil(self, s, t, h_s, h_t):
        out = super().distil(s, t, h_s, h_t)
        q, a = self.queries(out["q"], s), out["a_t2s"]
        real_q, real_k = q.detach()[s.mask], out["k"][t.mask]
        gap = torch.dist(real_q.mean(0), real_k.mean(0))
        return out | dict(
            q=q,
            mass=(a * same_chunk(s, t)).sum(),  # of attention in the right chunk
            entropy=torch.special.entr(a).sum(),
            norm_q=real_q.norm(dim=1).sum(),
            mean_gap=len(real_q) * gap)  # a sum over positions, as the others

# Finished runs ==============================================================================================
def predictions(z, targets):  # (n, V), (n,) -> (n, 3): cross-entropy, entropy, if gold is the likeliest
    log_p = z.log_softmax(1)
    ce = F.nll_loss(log_p, targets, reduction="none")
    entropy = torch.special.entr(log_p.exp()).sum(1)
    return torch.stack([ce, entropy, z.argmax(1) == targets], 1)

def alignment_numbers(rows):
    """How well A^{t->s} finds the right chunk, and how far queries are from keys: a dict of numbers.
    rows: of each row q (n, w), k (m, w), a_t2s (n, m), and inside (n, m), True where a chunk is. `mass` of
    attention inside it is over the positions that have a chunk; `mmd`, of queries and keys, over at most 4096
    of each, evenly spaced."""
    queries, keys, *rest = zip(*rows)
    mass = [(a * inside).sum(1)[inside.any(1)] for a, inside in zip(*rest)]
    q, k = torch.cat(queries), torch.cat(keys)
    q, k = q[::math.ceil(len(q) / 4096)], k[::math.ceil(len(k) / 4096)]
    return dict(mass=torch.cat(mass).mean().item(), mmd=mmd(q, k).item())

def mmd(x, y):  # (n, w), (m, w): squared, unbiased; kernel exp(-|a - b|^2 / median of all |a - b|^2)
    n = len(x)
    z = torch.cat([x, y])
    distance = torch.cdist(z, z).square()
    kernel = torch.exp(-distance / distance.median())
    between = kernel[:n, n:].mean()
    within = 0
    for block in (kernel[:n, :n], kernel[n:, n:]):
        pairs = block.numel() - len(block)  # but for those of a vector with itself
        within += (block.sum() - block.trace()) / max(1, pairs)
    return within - 2 * between

@torch.no_grad()
def read_run(folder):
    """A finished run: `name`, `tokenizers`, `numbers`, which it writes, and its first dev row's `pair` and
    `map`, A^{t->s} (n, m). Without queries, as in sft, there is no map, and the numbers are those of p^s."""
    # 1. models; settings that an older run did not have get their defaults
    found = json.loads((folder / "eval.json").read_text())["args"]  # OSError: it is not finished
    args = build_parser(METHODS).parse_args([], SimpleNamespace(**found))
    models, model = [load_model(str(folder / "best"), "cpu")], None
    path = folder / "best/projectors.pt"
    weights = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    if "query.weight" in weights:
        models.append(load_model(args.teacher, "cpu"))
        model = Chunks(args, *models).eval()
        model.proj.load_state_dict(weights)

    # 2. at most 100 rows
    marks = sum(map(dskd_ga.stop_marks, models), ())
    tokenizers = [one.tokenizer for one in models]
    rows = dskd_ga.read_rows(dskd_ga.fetch(f"{args.data}/raw.jsonl"), min(args.dev_rows, 100), marks)
    pairs = dskd_ga.pairs(rows, tokenizers, args.max_prompt, args.max_length, model and annotate)
    check(pairs, folder, "no dev row within its limits", "at least one")

    # 3. numbers
    tables, alignment = [], []
    for pair in pairs:
        s = collate([pair.s], "cpu")
        h_s = response_hidden(models[0], s)
        tables.append(predictions(h_s[0] @ head_of(models[0]).mT, s.targets[0]))
        if model:
            t = collate([pair.t], "cpu")
            out = model.distil(s, t, h_s, response_hidden(models[1], t))
            q, k, a = [out[name][0] for name in ("q", "k", "a_t2s")]
            alignment.append((q, k, a, same_chunk(s, t)[0]))
    numbers = dict(zip(("ce_s", "entropy_s", "correct_s"), torch.cat(tables).mean(0).tolist()))
    if model:
        numbers |= alignment_numbers(alignment)
    (folder / "numbers.json").write_text(json.dumps(numbers))
    return SimpleNamespace(name=folder.name, pair=pairs[0], tokenizers=tokenizers, numbers=numbers,
                           map=alignment[0][2] if model else None)

def draw(path, runs):  # A^{t->s} of each run on the first dev row, with its chunks
    from matplotlib import figure, patches  # training needs no matplotlib
    s, t = runs[0].pair
    inches = len(runs) * (1.8 + 0.16 * t.length), 1.5 + 0.16 * s.length
    page = figure.Figure(inches, facecolor="white", layout="constrained")  # to be read on any page
    panels = page.subplots(1, len(runs), squeeze=False)[0]
    for axes, run in zip(panels, runs):
        image = axes.imshow(run.map.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set(title=run.name, xlabel="teacher's tokens", ylabel="student's tokens")
        for axis, example, tokenizer in zip((axes.yaxis, axes.xaxis), run.pair, run.tokenizers):
            response = example.ids[example.start:]
            labels = [tokenizer.decode(token).replace(" ", "·") for token in response]
            axis.set_ticks(range(example.length), labels, fontsize=8, parse_math=False)
        axes.tick_params("x", rotation=90)
        s, t = [example.chunk for example in run.pair]
        for chunk in set(s) & set(t):
            corner = t.index(chunk) - 0.5, s.index(chunk) - 0.5
            box = patches.Rectangle(corner, t.count(chunk), s.count(chunk), fill=False, edgecolor="C1")
            axes.add_patch(box)
    page.colorbar(image, ax=panels, label="weight")
    page.savefig(path, dpi=150)

def build_parser(methods):  # of dskd_ga.py's flags and one more
    parser = dskd_ga.build_parser(methods)
    parser.add_argument("--normalise-queries", action="store_true", help="N_std(Q) in place of Q, as for K")
    return parser

def main(argv=None):  # trains, and returns what eval.json holds; or analyses the runs that are named
    parser = build_parser(METHODS)
    add = parser.add_argument_group("analysis: no training, no other flag counts").add_argument
    add("runs", metavar="RUN", nargs="*", type=pathlib.Path, help="folders of finished runs, cma's too")
    add("--figure", metavar="FILE", help="draw attention on the first dev row, as .png or .svg")
    args = parser.parse_args(argv)
    disable_progress_bar()
    runs = []
    try:
        queries = args.ga or args.normalise_queries
        check(args.method != "clp" or not queries, "--ga or --normalise-queries", "clp", "cla or cma")
        for folder in args.runs:
            run = read_run(folder)
            runs.append(run)
            print(folder, *[f"{name} {x:.3f}" for name, x in run.numbers.items()], sep=" | ")
        if args.figure:
            mapped = [run for run in runs if run.map is not None]
            check(mapped, "--figure", "no RUN with queries", "finished runs of cma, clp or cla")
            draw(args.figure, mapped)
    except (dskd_ga.InputError, OSError) as error:
        parser.exit(2, f"chunks.py: {' '.join(str(error).split())}\n")
    return None if runs else dskd_ga.main(argv, build_parser(METHODS), Chunks)

if __name__ == "__main__":
    main()
