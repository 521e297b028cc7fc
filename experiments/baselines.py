#!/usr/bin/env python3
"""Baselines: plain KD and same-tokenizer DSKD for models that share a tokenizer, ULD and MinED for others.

A method of your own is a subclass of `dskd_ga.Distiller` that replaces some of four methods:
    annotate(row, s, t, tokenizers)  once a row, before training: a number for each response token of either
                                     side, found by texts, ids or tokenizers; batches have s.chunk and t.chunk
    align(q, k, s, t)                attention maps (B, S, T) and (B, T, S), in place of eq. (3)
    distil(s, t, h_s, h_t)           a dict: `loss`, a sum over the batch's positions; detached sums to log
    match(q, k, s, t, n_s, n_t)      what --ga adds: a loss on queries and keys, and detached terms to log,
                                     both divided, sums over queries by n_s, sums over keys by n_t
`projectors` is the class of its projectors, called with (d_s, d_t), or None; `adversary` that of D, called
with 2 d_t. Every parameter that requires a gradient must get one in every step. METHODS, below, gives the
class its name; data, training, resuming and evaluation are dskd_ga.py's, and so are the flags:

    python experiments/baselines.py --method ot  # the worked example, `OptimalTransport`
    python experiments/baselines.py --method dskd --teacher MiniLLM/teacher-gpt2-1.5B --teacher-ready

A schedule reads self.progress, the share of the training that is done: 0 in the first step, at the end nearly
1. A divergence of your own is a function of log p and log q, (N, V) each -> (N,). `distil` may say both:

    return super().distil(s, t, h_s, h_t, div=function, weights=[0.5, 0.5, self.progress, 0.5])
"""
import pathlib, sys
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import dskd_ga
from dskd_ga import at_real, check, divergence, full_precision, head_of, sliced_loss, zero_padding

# A worked example ===========================================================================================
class OptimalTransport(dskd_ga.Distiller):
    """DSKD-CMA and one more term: entropic optimal transport of h^s to h^{t->s}, at a cost of 1 - cosine."""

    def distil(self, s, t, h_s, h_t):
        out = super().distil(s, t, h_s, h_t)
        h_s = F.normalize(full_precision(zero_padding(h_s, s.mask)), dim=2)
        h_t2s = F.normalize(full_precision(out["h_t2s"]), dim=2)
        with torch.autocast(h_s.device.type, enabled=False):  # bf16 would round cosines to steps of 1/256
            cost = 1 - h_s @ h_t2s.mT  # (B, S, S)
        real = s.mask.unsqueeze(2) & s.mask.unsqueeze(1)
        log_plan = -10 * cost.detach()  # the plan is constant: at its optimum it is the cost's derivative
        for _ in range(20):  # Sinkhorn's iterations
            for axis in (2, 1):  # each row sums to 1, then each column
                log_plan = log_plan.masked_fill(~real, -1e30).log_softmax(axis)
        ot = (log_plan.exp() * real * cost).sum()
        return out | dict(loss=out["loss"] + 0.5 * ot, ot=ot.detach())

# Losses on the two models' own logits =======================================================================
def same_tokens(row, s, t, tokenizers):
    """For `annotate`: each token's partner is the same token. InputError if a response has other tokens."""
    found = f"other tokens in the row that begins {row.prompt[:50]!r}"
    check(s.ids[s.start:] == t.ids[t.start:], "--teacher", found, "the student's, as kd and dskd need")
    return list(range(s.length)), None

class LogitDistiller(dskd_ga.Distiller):
    """CE and KD, by the first and third of --weights. KD is a function of the student's logits and of the
    teacher's at one position. Only the student is trained. A subclass has compare(z_s, z_t, target, matched)
    -> (N,), from logits (N, V_s) and (N, V_t) of N student positions and their partners; matched (N,): if
    there is a partner."""
    projectors = None

    def annotate(self, row, s, t, tokenizers):
        """A student token's number is the teacher's position that it learns from, -1 for none. Here, position
        by position from the first response token on, as far as the teacher's go."""
        return [i if i < t.length else -1 for i in range(s.length)], None

    def distil(self, s, t, h_s, h_t):
        index = s.chunk.clamp(min=0).unsqueeze(2)
        h_partner = h_t.detach().take_along_dim(index, 1)  # (B, S, d_t)
        student = at_real(h_s, s), head_of(self.student)
        teacher = at_real(h_partner, s), self.teacher.head.detach()
        rows = at_real(s.targets, s), at_real(s.chunk >= 0, s)
        w_ce, _, w_kd, _ = self.args.weights

        def losses(z_s, z_t, target, matched):
            ce = F.cross_entropy(z_s, target, reduction="sum")
            kd = self.compare(z_s, z_t, target, matched).sum()
            return w_ce * ce + w_kd * kd, ce, kd

        loss, ce, kd = sliced_loss(losses, [student, teacher], rows)
        return dict(loss=loss, ce=ce, kd=kd)

class KD(LogitDistiller):
    """f of --div, over the tokens that both heads have: one may be padded with more of them."""
    annotate = staticmethod(same_tokens)

    def compare(self, z_s, z_t, target, matched):
        size = min(z_s.shape[1], z_t.shape[1])
        z_s, z_t = z_s[:, :size], z_t[:, :size]
        return divergence(self.args.div, z_t, z_s, self.args.temperature, self.args.skew)

def uld_loss(student_logits, teacher_logits):
    """Universal logit distillation (Boizard et al. 2024), (..., V_s), (..., V_t) -> (...): the L1 distance of
    the two distributions, each sorted, the shorter one padded with zeros."""
    larger = max(student_logits.shape[-1], teacher_logits.shape[-1])
    sides = []
    for logits in (student_logits, teacher_logits):
        p, _ = full_precision(logits).softmax(-1).sort(-1, descending=True)
        sides.append(F.pad(p, (0, larger - p.shape[-1])))
    return (sides[0] - sides[1]).abs().sum(-1)

class ULD(LogitDistiller):
    def compare(self, z_s, z_t, target, matched):
        return uld_loss(z_s, z_t) * matched

class DSKD(dskd_ga.Distiller):
    """Dual-space distillation (arXiv:2406.17328) without attention: position i of one model is position i of
    the other. V^{t->s} holds no embedding of the gold token, so KD^{t->s} counts at every position."""
    projectors = None  # but its own, without P_Q
    annotate = staticmethod(same_tokens)

    def __init__(self, student, teacher, args):
        super().__init__(student, teacher, args)
        d_s, d_t = head_of(student).shape[1], teacher.head.shape[1]
        maps = dict(t2s=nn.Linear(d_t, d_s), s2t=nn.Linear(d_s, d_t))
        self.proj = nn.ModuleDict(maps)

    def distil(self, s, t, h_s, h_t):
        h_s, h_t = at_real(h_s, s), at_real(h_t.detach(), t)   # (N, d_s), (N, d_t), of the same N tokens
        h_t2s, h_s2t = self.proj.t2s(h_t), self.proj.s2t(h_s)  # in place of eqs. (1)-(6)
        target = at_real(s.targets, s)
        aligned = torch.ones_like(target, dtype=torch.bool)
        args = self.args
        return dskd_ga.vocabulary_losses(
            h_s, h_t2s, head_of(self.student), h_t, h_s2t, self.teacher.head, target, aligned, aligned,
            div=args.div, s2t_div=args.s2t_div, temperature=args.temperature, skew=args.skew,
            all_positions=True, weights=args.weights)

# MinED: positions and tokens of the two models are matched by the edit distance of their texts ==============
def token_texts(tokenizer, ids):
    """The vocabulary's own piece of each id, the two marks of a leading space written alike. Pieces of bytes
    have a character for each byte, so that a part of a character is a text, too."""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    return [(piece or "").replace("▁", "Ġ") for piece in pieces]  # None: an id that is not in use

def token_map(s_texts, t_texts, block=512):
    """For each of V_t teacher tokens the student token whose text is nearest in edit distance, of equals the
    first: a list of V_t ids. Exact, without a limit."""
    ids = []
    for start in range(0, len(t_texts), block):  # memory holds (block, V_s) distances
        texts = t_texts[start:start + block]
        distances = cdist(texts, s_texts, scorer=Levenshtein.distance, dtype=np.uint16, workers=-1)
        ids += distances.argmin(1).tolist()
    return ids

def warp(cost):
    """Dynamic time warping. cost (n, m) -> bool (n, m), True for the pairs on the cheapest path from the
    first pair to the last; a step of the path goes on in one sequence or in both."""
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf).tolist()  # of the cheapest path up to a pair
    total[0][0] = 0
    for i, row in enumerate(cost.tolist()):
        for j, x in enumerate(row):
            total[i + 1][j + 1] = x + min(total[i][j], total[i][j + 1], total[i + 1][j])
    path = np.zeros((n, m), bool)
    i, j = n, m
    while i > 0:  # both reach 0 in the same step
        path[i - 1, j - 1] = True
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = min(steps, key=lambda pair: total[pair[0]][pair[1]])  # of equals the first
    return path

def mined_targets(teacher_logits, vocabulary, gold, matched, size, temperature=2.0):
    """What MinED learns, (N, size): logits z over the student's vocabulary; softmax(z / temperature) is the
    target, whatever the temperature. teacher_logits (N, V_t): of each position's partner. vocabulary (V_t,):
    the `token_map`, negative for none. gold (N,), matched (N,) bool. Where matched, a student token gets the
    logit of the first teacher token that the map sends to it, or probability 0; elsewhere gold has 1."""
    count = len(vocabulary)
    teacher_ids = torch.arange(count, device=vocabulary.device)
    slots = vocabulary.masked_fill(vocabulary < 0, size)  # one slot more, which is cut off
    none = slots.new_full((size + 1,), count)
    first = none.scatter_reduce(0, slots, teacher_ids, "amin")[:size]
    carried = teacher_logits[:, first.clamp(max=count - 1)]
    carried = carried.masked_fill(first == count, -torch.inf)
    one_hot = torch.full_like(carried, -torch.inf).scatter(1, gold[:, None], 0)
    return torch.where(matched[:, None], carried, one_hot)

class MinED(LogitDistiller):
    """Forward KL from `mined_targets`: FuseLLM's minimum edit distance, in the version of DSKD's authors."""
    nearest = vocabulary = None  # the `token_map`, made when the tokenizers are known, as a list and a tensor

    def map_vocabulary(self, tokenizers):
        """Makes the map for all tokens that tokenizers and heads have."""
        heads = [head_of(self.student), self.teacher.head]
        texts = []
        for tokenizer, head in zip(tokenizers, heads):
            count = min(len(tokenizer), len(head))  # either may be the larger
            texts.append(token_texts(tokenizer, range(count)))
        dskd_ga.say("MinED: each teacher token looks for its nearest student token")
        unused = len(heads[1]) - len(texts[1])
        self.nearest = token_map(*texts) + [-1] * unused
        self.vocabulary = torch.tensor(self.nearest, device=heads[1].device)

    def annotate(self, row, s, t, tokenizers):
        """The number of a matched token is the teacher's position, on both sides; that of others is -1 or -2.
        Matched are tokens that are read, not those predicted: where warping gives a student position exactly
        one partner, and the vocabulary's map sends the partner's token to the student's at this position."""
        if self.nearest is None:
            self.map_vocabulary(tokenizers)
        s_ids, t_ids = [example.ids[example.start - 1:-1] for example in (s, t)]
        texts = []
        for tokenizer, ids in zip(tokenizers, (s_ids, t_ids)):
            pieces = token_texts(tokenizer, ids)
            texts.append([piece.replace("Ġ", "") for piece in pieces])
        distances = cdist(*texts, scorer=Levenshtein.distance)
        path = warp(distances)
        s_numbers, t_numbers = [-1] * len(s_ids), [-2] * len(t_ids)
        for i, partners in enumerate(path):
            j = int(partners.argmax())
            if partners.sum() == 1 and self.nearest[t_ids[j]] == s_ids[i]:
                s_numbers[i] = t_numbers[j] = j
        return s_numbers, t_numbers

    def compare(self, z_s, z_t, target, matched):
        tau = self.args.temperature
        targets = mined_targets(z_t, self.vocabulary, target, matched, z_s.shape[1], tau)
        return divergence("kl", targets, z_s, tau)

METHODS = dict(kd=KD, dskd=DSKD, uld=ULD, mined=MinED, ot=OptimalTransport)

def main(argv=None):
    """Runs a command line; returns what eval.json holds."""
    parser = dskd_ga.build_parser(tuple(METHODS))
    args = parser.parse_args(argv)
    if args.method in ("uld", "mined") and not args.eval_only:
        parser.set_defaults(name=args.method)  # --div is not a part of these methods
    return dskd_ga.main(argv, parser, METHODS[args.method])

if __name__ == "__main__":
    main()
