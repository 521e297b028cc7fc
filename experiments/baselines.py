#!/usr/bin/env python3
"""Baselines: plain KD and same-tokenizer DSKD for models that share a tokenizer, ULD and MinED for others.

    python experiments/baselines.py --method ot  # the worked example, `OptimalTransport`
    python experiments/baselines.py --method dskd --teacher MiniLLM/teacher-gpt2-1.5B --teacher-ready

A method of your own is a `dskd_ga.Distiller` with a name in METHODS, below, that replaces some of
    annotate(row, s, t, tokenizers)  once a row: a number for each response token, for s.chunk and t.chunk
    align(q, k, s, t)                attention maps (B, S, T) and (B, T, S), in place of eq. (3)
    distil(s, t, h_s, h_t)           a dict: `loss`, a sum over the batch's positions; detached sums to log
    match(q, k, s, t, n_s, n_t)      with --ga: a loss on queries and keys, and detached terms to log; sums
                                     over queries are divided by n_s, over keys by n_t
and of the classes `projectors`, called with (d_s, d_t), or None, and `adversary`, called with 2 d_t. In each
step every parameter must get a gradient. A divergence may be a function of log p and log q, (N, V) -> (N,);
self.progress is the share of the training that is done. In `distil`, for example:
    return super().distil(s, t, h_s, h_t, div=function, weights=[0.5, 0.5, self.progress, 0.5])
"""
import pathlib, sys
from collections import defaultdict
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import dskd_ga
from dskd_ga import check, divergence, full_precision, head_of, sliced_loss, zero_padding

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
def same_tokens(row, s, t, tokenizers):  # for `annotate`: each token's partner is the same token
    found = f"other tokens in the row that begins {row.prompt[:50]!r}"
    check(s.ids[s.start:] == t.ids[t.start:], "--teacher", found, "the student's, as kd and dskd need")
    return list(range(s.length)), None

class LogitDistiller(dskd_ga.Distiller):
    """CE and KD, by the first and third of --weights, for the student alone. A subclass has the KD of N
    positions, compare(z_s, z_t, target, matched) -> (N,): logits (N, V_s), their partners' (N, V_t), and
    matched (N,), if there is a partner. `annotate` numbers the partners, -1 for none."""
    projectors = None
    def annotate(self, row, s, t, tokenizers):  # position by position, from the response on
        return [i if i < t.length else -1 for i in range(s.length)], None

    def distil(self, s, t, h_s, h_t):
        index = s.chunk.clamp(min=0).unsqueeze(2)
        h_partner = h_t.detach().take_along_dim(index, 1)  # (B, S, d_t)
        sides = (h_s[s.mask], head_of(self.student)), (h_partner[s.mask], self.teacher.head)
        w_ce, _, w_kd, _ = self.args.weights

        def losses(z_s, z_t, target, matched):
            ce = F.cross_entropy(z_s, target, reduction="sum")
            kd = self.compare(z_s, z_t, target, matched).sum()
            return w_ce * ce + w_kd * kd, ce, kd
        rows = s.targets[s.mask], (s.chunk >= 0)[s.mask]
        loss, ce, kd = sliced_loss(losses, sides, rows)
        return dict(loss=loss, ce=ce, kd=kd)

class KD(LogitDistiller):
    annotate = staticmethod(same_tokens)
    def compare(self, z_s, z_t, target, matched):
        size = min(z_s.shape[1], z_t.shape[1])  # one head may be padded with more tokens
        z_s, z_t = z_s[:, :size], z_t[:, :size]
        return divergence(self.args.div, z_t, z_s, self.args.temperature, self.args.skew)

def uld_loss(student_logits, teacher_logits):  # (..., V_s), (..., V_t) -> (...)
    """Boizard et al. 2024: the L1 distance of the sorted distributions, the shorter one padded with zeros."""
    larger, sides = max(student_logits.shape[-1], teacher_logits.shape[-1]), []
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
    def __init__(self, args, student, teacher=None):
        super().__init__(args, student, teacher)
        d_s, d_t = head_of(student).shape[1], self.teacher.head.shape[1]
        self.proj = nn.ModuleDict(dict(t2s=nn.Linear(d_t, d_s), s2t=nn.Linear(d_s, d_t)))

    def distil(self, s, t, h_s, h_t):
        h_s, h_t = h_s[s.mask], h_t.detach()[t.mask]   # (N, d_s), (N, d_t), of the same N tokens
        h_t2s, h_s2t = self.proj.t2s(h_t), self.proj.s2t(h_s)  # in place of eqs. (1)-(6)
        W_s, W_t = head_of(self.student), self.teacher.head
        w_ce, w_ce_t2s, w_kd_t2s, w_kd_s2t = self.args.weights
        smoothing = self.args.temperature, self.args.skew
        def student_space(z_s, z_t2s, target):  # logits (n, V_s)
            ce = F.cross_entropy(z_s, target, reduction="sum")
            ce_t2s = F.cross_entropy(z_t2s, target, reduction="sum")
            kd_t2s = divergence(self.args.div, z_t2s.detach(), z_s, *smoothing).sum()         # (8)
            return w_ce * ce + w_ce_t2s * ce_t2s + w_kd_t2s * kd_t2s, ce, ce_t2s, kd_t2s      # (9)

        def teacher_space(z_t, z_s2t):  # logits (n, V_t)
            kd_s2t = divergence(self.args.s2t_div, z_t, z_s2t, *smoothing).sum()              # (8)
            return w_kd_s2t * kd_s2t, kd_s2t                                                  # (9)
        sides = [(h_s, W_s), (h_t2s, W_s.detach())]
        loss_s, ce, ce_t2s, kd_t2s = sliced_loss(student_space, sides, [s.targets[s.mask]])
        loss_t, kd_s2t = sliced_loss(teacher_space, [(h_t, W_t), (h_s2t, W_t)])
        return dict(loss=loss_s + loss_t, ce=ce, ce_t2s=ce_t2s, kd_t2s=kd_t2s, kd_s2t=kd_s2t)

# MinED: positions and tokens of the two models are matched by the edit distance of their texts ==============
def token_texts(tokenizer, ids):  # the vocabulary's pieces, the two marks of a leading space written alike
    # None: an id that is not in use
    return [(piece or "").replace("▁", "Ġ") for piece in tokenizer.convert_ids_to_tokens(ids)]

def token_map(s_texts, t_texts, block=512):  # each teacher token's nearest student id in edit distance
    ids = []
    for start in range(0, len(t_texts), block):  # memory holds (block, V_s) distances
        texts = t_texts[start:start + block]
        distances = cdist(texts, s_texts, scorer=Levenshtein.distance, dtype=np.uint16, workers=-1)
        ids += distances.argmin(1).tolist()  # of equals the first
    return ids

def warp(cost):
    """Dynamic time warping, (n, m) -> bool (n, m): the pairs on the cheapest path from the first pair to the
    last, whose steps go on in one sequence or in both."""
    # by pair: the cost of the cheapest path up to it, and its last pair but one, of equals the first
    total, before = defaultdict(lambda: np.inf, {(-1, -1): 0}), {}
    for pair in np.ndindex(cost.shape):
        i, j = pair
        before[pair] = min((i - 1, j - 1), (i - 1, j), (i, j - 1), key=total.__getitem__)
        total[pair] = total[before[pair]] + cost[pair]
    path = np.zeros(cost.shape, bool)
    while pair in before:  # from the last one back
        path[pair] = True
        pair = before[pair]
    return path

def mined_targets(teacher_logits, vocabulary, gold, matched, size):
    """What MinED learns, as logits (N, size). teacher_logits (N, V_t): of the partners; vocabulary: the
    `token_map`; gold (N,); matched (N,) bool. Where matched, a student token gets the logit of the first
    teacher token that the map sends to it, or probability 0; elsewhere gold has probability 1."""
    count = len(vocabulary)
    teacher_ids = torch.arange(count, device=vocabulary.device)
    none = vocabulary.new_full((size,), count)
    first = none.scatter_reduce(0, vocabulary, teacher_ids, "amin")
    carried = teacher_logits[:, first.clamp(max=count - 1)]
    carried = carried.masked_fill(first == count, -torch.inf)
    one_hot = torch.full_like(carried, -torch.inf).scatter(1, gold[:, None], 0)
    return torch.where(matched[:, None], carried, one_hot)

class MinED(LogitDistiller):
    """Forward KL from `mined_targets`: FuseLLM's minimum edit distance, in the version of DSKD's authors."""
    vocabulary = None  # the `token_map`, of the tokens that a tokenizer and its model's head have
    def map_vocabulary(self, tokenizers):
        texts = []
        for tokenizer, head in zip(tokenizers, (head_of(self.student), self.teacher.head)):
            count = min(len(tokenizer), len(head))
            texts.append(token_texts(tokenizer, range(count)))
        dskd_ga.say("MinED: each teacher token looks for its nearest student token")
        self.vocabulary = torch.tensor(token_map(*texts), device=self.teacher.head.device)

    def annotate(self, row, s, t, tokenizers):
        """Matched are tokens that are read: where warping gives a student position exactly one partner and
        the vocabulary's map sends the partner's token to the student's. Others get -1 or -2."""
        if self.vocabulary is None:
            self.map_vocabulary(tokenizers)
        s_ids, t_ids = [example.ids[example.start - 1:-1] for example in (s, t)]
        texts = []
        for tokenizer, ids in zip(tokenizers, (s_ids, t_ids)):
            texts.append([piece.replace("Ġ", "") for piece in token_texts(tokenizer, ids)])
        path = warp(cdist(*texts, scorer=Levenshtein.distance))
        nearest = self.vocabulary[t_ids].tolist()
        s_numbers, t_numbers = [-1] * len(s_ids), [-2] * len(t_ids)
        for i, partners in enumerate(path):
            j = int(partners.argmax())
            if partners.sum() == 1 and nearest[j] == s_ids[i]:
                s_numbers[i] = t_numbers[j] = j
        return s_numbers, t_numbers

    def compare(self, z_s, z_t, target, matched):
        targets = mined_targets(z_t, self.vocabulary, target, matched, z_s.shape[1])
        return divergence("kl", targets, z_s, self.args.temperature)

METHODS = dict(kd=KD, dskd=DSKD, uld=ULD, mined=MinED, ot=OptimalTransport)

def main(argv=None):  # returns what eval.json holds
    parser = dskd_ga.build_parser(tuple(METHODS))
    args = parser.parse_args(argv)
    if args.method in ("uld", "mined") and not args.eval_only:
        parser.set_defaults(name=args.method)  # --div is not a part of these methods
    return dskd_ga.main(argv, parser, METHODS[args.method])

if __name__ == "__main__":
    main()
