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
import bisect, functools, json, math, pathlib, sys
from types import SimpleNamespace
import torch
import torch.nn.functional as F
from transformers.utils.logging import disable_progress_bar
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import dskd_ga
from dskd_ga import (InputError, check, collate, cross_model_attention, embed, load_model, response_hidden,
                     std_normalise)

METHODS = ("clp", "cla")
CPU = torch.device("cpu")
DEV_ROWS = 100  # read for a run's numbers, at most
MOST = 4096    # queries, and keys, that are compared each with each
load_teacher = functools.cache(load_model)  # once for all runs that are compared

# Chunks =====================================================================================================
def token_cuts(spans):
    """Where tokens end, unless they end inside a character, which the next token then goes on with."""
    spans = [span for span in spans if span[1] >= 0]
    starts = [start for start, _ in spans[1:]] + [math.inf]
    return {end for (_, end), start in zip(spans, starts) if start >= end}

def chunk_numbers(s_spans, t_spans):
    """The number of the chunk, eq. (10), of each target token of a row, in two lists. Spans are (start, end)
    characters of the student's and the teacher's tokens, end of text is (-1, -1). Tokens without a chunk, as
    those after the last common cut, have -1 on the student's side, -2 on the teacher's."""
    common = sorted(token_cuts(s_spans) & token_cuts(t_spans))
    result = []
    for spans, none in ((s_spans, -1), (t_spans, -2)):
        numbers = []
        for _, end in spans:
            number = bisect.bisect_left(common, end)  # the cuts before it: as many for all of a chunk
            if end < 0:
                number = len(common)  # end of text: a chunk of its own
            elif number == len(common):
                number = none
            numbers.append(number)
        result.append(numbers)
    return result

def annotate(row, s, t, tokenizers):
    """The chunk numbers of a row's response tokens on either side, see `dskd_ga.pairs`."""
    spans = []
    for tokenizer in tokenizers:
        text = row.references[0].removesuffix(tokenizer.eos_token)
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False,
                            return_offsets_mapping=True)
        spans.append(encoded["offset_mapping"] + [(-1, -1)])
    whole_row = chunk_numbers(*spans)
    # where a side was cut at the length limit, the chunks from there on have lost a part of their text
    counts = s.count, t.count
    lost = [number for numbers, count in zip(whole_row, counts) for number in numbers[count:] if number >= 0]
    first_lost = min(lost, default=math.inf)
    result = []
    for numbers, count, none in zip(whole_row, counts, (-1, -2)):
        result.append([number if number < first_lost else none for number in numbers[:count]])
    return result

def same_chunk(s, t):
    """M^{t->s} (B, S, T), bool, of two `Side`s with chunk numbers."""
    real = s.mask.unsqueeze(2) & t.mask.unsqueeze(1)
    return real & (s.chunk.unsqueeze(2) == t.chunk.unsqueeze(1))                              # (11)

def align(method, q, k, s, t):
    """A^{t->s} (B, S, T) and A^{s->t} (B, T, S) of clp or cla, for q (B, S, w), k (B, T, w) and `Side`s with
    chunk numbers. Rows sum to 1; those of positions in no chunk are 0."""
    allowed = same_chunk(s, t)
    if method == "cla":
        return cross_model_attention(q, k, allowed)                                           # (13)
    m = allowed.to(q.dtype)
    return F.normalize(m, p=1, dim=2), F.normalize(m.mT, p=1, dim=2)                          # (12)

class Chunks(dskd_ga.Distiller):
    annotate = staticmethod(annotate)
    def __init__(self, student, teacher, args):
        super().__init__(student, teacher, args)
        self.align = functools.partial(align, args.method)
        if args.method == "clp":
            self.proj.query.requires_grad_(False)  # uniform weights ask nothing

# Finished runs ==============================================================================================
PREDICTION = [name + model for model in ("_s", "_t2s") for name in ("ce", "entropy", "correct")]
def predictions(z, targets):
    """Of logits (n, V) and gold tokens (n,), (n, 3): cross-entropy, entropy, and if gold has the highest."""
    log_p = z.log_softmax(1)
    entropy = torch.special.entr(log_p.exp()).sum(1)
    return torch.stack([-log_p[range(len(z)), targets], entropy, z.argmax(1) == targets], 1)

def alignment_numbers(rows):
    """How well A^{t->s} finds the right chunk, and how far queries are from keys: a dict of numbers.
    rows: of each row q (n, w), k (m, w), a_t2s (n, m), inside (n, m), True where a chunk is, and the
    student's targets (n,). Means over the student's positions that have a chunk, and over those whose token
    comes `_once` or is `_repeated` in its response: `mass` of attention inside the chunk; `top`, the share
    whose strongest key is in it; `entropy`, in nats. Of queries and keys: `mean_gap` |mean q - mean k|, mean
    `norm_q` and `norm_k`, `mmd`, and `probe`, fitted on the even rows and tested on the odd ones."""
    queries, keys, tables = [], [], []
    for q, k, a, inside, targets in rows:
        queries.append(q)
        keys.append(k)
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
            mass, top, entropy, _ = part.mean(0).tolist()
            numbers |= {"mass" + split: mass, "top" + split: top, "entropy" + split: entropy}
    x, y = some(queries), some(keys)
    numbers |= dict(mmd=mmd(x, y).item(), mean_gap=torch.dist(x.mean(0), y.mean(0)).item(),
                    norm_q=x.norm(dim=1).mean().item(), norm_k=y.norm(dim=1).mean().item())
    if len(queries) > 1:
        halves = queries[::2], keys[::2], queries[1::2], keys[1::2]
        numbers["probe"] = probe(*map(some, halves))
    return numbers
def some(rows):  # their vectors; of more than MOST, evenly spaced ones
    vectors = torch.cat(rows)
    return vectors[::math.ceil(len(vectors) / MOST)]
def mmd(x, y):
    """The squared MMD of x (n, w), y (m, w), unbiased; kernel: exp(-|a - b|^2 / median of all |a - b|^2)."""
    n, m = len(x), len(y)
    z = torch.cat([x, y])
    distance = torch.cdist(z, z).square()
    kernel = torch.exp(-distance / distance.detach().median())  # whose width is a constant
    kernel = kernel - torch.diag(kernel.diagonal())
    within_x = kernel[:n, :n].sum() / max(1, n * (n - 1))
    within_y = kernel[n:, n:].sum() / max(1, m * (m - 1))
    return within_x + within_y - 2 * kernel[:n, n:].mean()
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
    return (x_right.double().mean() + y_right.double().mean()).item() / 2

@torch.no_grad()
def read_run(folder):
    """A finished run: `name`, `tokenizers`, `numbers`, which it writes, and the `pairs` of its first dev rows
    with their `maps`, A^{t->s} (n, m). Without queries, as in sft, the numbers are only those of p^s."""
    (folder / "eval.json").stat()  # OSError: it is not finished
    args = SimpleNamespace(**json.loads((folder / "args.json").read_text())["args"])
    student, *tokenizers = load_model(str(folder / "best"), CPU)
    W_s, E_s = dskd_ga.head_of(student).detach(), student.get_input_embeddings()
    path = folder / "best/projectors.pt"
    weights = torch.load(path, map_location=CPU, weights_only=True) if path.exists() else {}
    aligned = "query.weight" in weights
    if aligned:
        teacher, t_tokenizer = load_teacher(args.teacher, CPU)
        tokenizers.append(t_tokenizer)
        W_t, E_t = dskd_ga.head_of(teacher), teacher.get_input_embeddings()
        attend = functools.partial(align, args.method) if args.method in METHODS else None
        proj = dskd_ga.Projectors(*weights["t2s.weight"].shape)  # (d_s, d_t)
        proj.load_state_dict(weights)
    rows = dskd_ga.read_rows(dskd_ga.fetch(f"{args.data}/raw.jsonl"), min(args.dev_rows, DEV_ROWS))
    pairs = dskd_ga.pairs(rows, tokenizers, args.max_prompt, args.max_length, annotate if aligned else None)
    check(pairs, folder, "no dev row within its limits", "at least one")
    tables, alignment = [], []
    for pair in pairs:
        s, t = [example and collate([example], CPU) for example in pair]
        h_s, targets = response_hidden(student, s), s.targets[0]
        columns = [predictions(h_s[0] @ W_s.mT, targets)]  # of p^s
        if aligned:
            h_t, e_t = response_hidden(teacher, t), embed(E_t, t)[1]
            out = dskd_ga.dual_space_losses(proj, s, t, h_s, h_t, E_s, E_t, W_s, W_t, align=attend,
                                            normalise_queries=args.normalise_queries)
            v_t2s = proj.t2s(std_normalise(h_t, t.mask) + std_normalise(e_t, t.mask))         # (5)
            q_t2s = predictions((out["a_t2s"] @ v_t2s)[0] @ W_s.mT, targets)                  # (6), (7)
            columns.append(q_t2s.where(out["a_t2s"][0].any(1, keepdim=True), math.nan))  # not without a chunk
            alignment.append([x[0] for x in (out["q"], out["k"], out["a_t2s"], same_chunk(s, t), s.targets)])
        tables.append(torch.cat(columns, 1))
    numbers = dict(zip(PREDICTION, torch.cat(tables).nanmean(0).tolist()))
    if aligned:
        numbers |= alignment_numbers(alignment)
    (folder / "numbers.json").write_text(json.dumps(numbers))
    return SimpleNamespace(name=folder.resolve().name, pairs=pairs, tokenizers=tokenizers, numbers=numbers,
                           maps=[row[2] for row in alignment])

def draw(path, runs):
    """Writes a picture of A^{t->s} on the first dev row, by each of the runs, with its chunks."""
    from matplotlib import figure, patches  # training needs no matplotlib
    s, t = runs[0].pairs[0]
    size = len(runs) * (1.8 + 0.16 * t.count), 1.5 + 0.16 * s.count  # in inches
    page = figure.Figure(size, facecolor="white", layout="constrained")  # to be read on any page
    panels = page.subplots(1, len(runs), squeeze=False)[0]
    for axes, run in zip(panels, runs):
        s, t = run.pairs[0]
        image = axes.imshow(run.maps[0].numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set(title=run.name, xlabel="teacher's tokens", ylabel="student's tokens")
        for axis, example, tokenizer in zip((axes.yaxis, axes.xaxis), (s, t), run.tokenizers):
            tokens = map(tokenizer.decode, example.ids[example.start:])
            labels = [token.replace(" ", "·").replace("\n", "↵") for token in tokens]
            axis.set_ticks(range(example.count), labels, fontsize=8, parse_math=False)
        axes.tick_params("x", rotation=90)
        for chunk in set(s.chunk) & set(t.chunk):
            corner = t.chunk.index(chunk) - 0.5, s.chunk.index(chunk) - 0.5
            width, height = t.chunk.count(chunk), s.chunk.count(chunk)
            axes.add_patch(patches.Rectangle(corner, width, height, fill=False, edgecolor="C1"))
    page.colorbar(image, ax=panels, label="weight")
    page.savefig(path, dpi=150)

def main(argv=None):
    """Trains, and returns what eval.json holds; or, where runs are named, analyses these."""
    parser = dskd_ga.build_parser(METHODS)
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
            runs.append(read_run(folder))
            print(folder, *[f"{name} {x:.3f}" for name, x in runs[-1].numbers.items()], sep=" | ")
            check(runs[-1].maps or not args.figure, folder, "no queries", "a run of cma, clp or cla to draw")
        if args.figure:
            draw(args.figure, runs)
    except (InputError, OSError) as error:
        parser.exit(2, f"chunks.py: {' '.join(str(error).split())}\n")
    return None if runs else dskd_ga.main(argv, dskd_ga.build_parser(METHODS), Chunks)

if __name__ == "__main__":
    main()
