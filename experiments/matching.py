#!/usr/bin/env python3
"""Other ways than GA, the adversary of eq. (14), to bring queries and keys together, and GA less some of it.
They take dskd_ga.py's flags, and log `mass`, the share of attention A^{t->s} that is in the right chunk.

    python experiments/matching.py --match ct --div kl  # conditional transport, eq. (15)
    python experiments/matching.py --match early        # GA for the first fifth of the training

CT, from Alignment Attention (arXiv:2110.12567, eq. 4), of a sequence's n_s queries q and n_t keys k:
    pi(k|q) ∝ exp(phi(q)·phi(k)),  c(q,k) = 1 - c(q)·c(k)
    min_{P_Q, phi} max_c  1/2 E_q E_{pi(k|q)} c(q,k) + 1/2 E_k E_{pi(q|k)} c(q,k)                (15)
The critic c and the navigator phi are networks with outputs of norm 1; the keys are constants.

The authors' code, which is not followed, has Euclidean distances of the unit vectors (half their square is
our cost), a highway layer in the critic, no dropout in the navigator, and one more term, a transposed one.
"""
import pathlib, sys
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import chunks, dskd_ga
from chunks import Chunks
from dskd_ga import at_real, collate, embed, full_precision, reverse, std_normalise, zero_padding

class UnitNetwork(nn.Sequential):  # (..., width) -> (..., hidden), vectors of norm 1
    def forward(self, x):
        return F.normalize(full_precision(super().forward(x)), dim=-1)

class Critic(nn.Module):
    """The networks of eq. (15): the critic, which ascends the cost, and the navigator, which descends it."""

    def __init__(self, width, hidden=768, dropout=0.1):
        super().__init__()
        for name in ("critic", "navigator"):
            layers = nn.Linear(width, hidden), nn.LeakyReLU(0.1), nn.Linear(hidden, hidden)
            self.add_module(name, UnitNetwork(nn.Dropout(dropout), *layers))

def ct_loss(critic, q, k, s_mask, t_mask, n_s=None, n_t=None):
    """L_KQ of eq. (15), and its detached halves for the log, over queries, `ct_q`, and over keys, `ct_k`.
    critic: `Critic`; the other arguments as of `dskd_ga.ga_loss`. One backward pass serves all players: P_Q
    and the navigator descend this loss, the critic ascends it."""
    n_s = s_mask.sum() if n_s is None else n_s
    n_t = t_mask.sum() if n_t is None else n_t
    q, k = zero_padding(q, s_mask), zero_padding(k.detach(), t_mask)
    # the outer `reverse` turns the critic's gradient; the inner one turns back what goes on to the queries
    c_q, c_k = reverse(critic.critic(reverse(q))), reverse(critic.critic(k))
    phi_q, phi_k = critic.navigator(q), critic.navigator(k)
    with torch.autocast(q.device.type, enabled=False):  # bf16 would round cosines near 1 to steps of 1/256
        cost = 1 - c_q @ c_k.mT  # (B, S, T)
        nearness = phi_q @ phi_k.mT
    lowest = torch.finfo(nearness.dtype).min
    to_keys = nearness.masked_fill(~t_mask[:, None, :], lowest).softmax(2)     # pi(k|q)
    to_queries = nearness.masked_fill(~s_mask[:, :, None], lowest).softmax(1)  # pi(q|k)
    ct_q = 0.5 * ((to_keys * cost).sum(2) * s_mask).sum() / n_s
    ct_k = 0.5 * ((to_queries * cost).sum(1) * t_mask).sum() / n_t
    return ct_q + ct_k, dict(ct_q=ct_q.detach(), ct_k=ct_k.detach())           # (15)

class ConditionalTransport(Chunks):
    adversary = Critic

    def match(self, q, k, s, t, n_s, n_t):
        return ct_loss(self.disc, q, k, s.mask, t.mask, n_s, n_t)

class Unsaturated(Chunks):
    """GA where P_Q descends -log(1 - D(q)) instead of ascending -log D(q): the surer D is, the larger is the
    gradient, which vanishes in eq. (14). D learns as there, and from P_Q's loss nothing."""

    def match(self, q, k, s, t, n_s, n_t):
        loss, terms = super().match(q.detach(), k, s, t, n_s, n_t)
        fixed = {name: weight.detach() for name, weight in self.disc.named_parameters()}
        z_q = torch.func.functional_call(self.disc, fixed, at_real(q, s))
        return loss + F.softplus(z_q).sum() / n_s, terms

class MMD(Chunks):
    """Descends the squared maximum mean discrepancy of a micro-batch's queries and keys, without a network.
    It compares vectors of different rows, and so depends on the cut into micro-batches."""
    adversary = nn.Identity  # no weights

    def match(self, q, k, s, t, n_s, n_t):
        real_q, real_k = at_real(q, s), at_real(k.detach(), t)
        mmd_q = chunks.mmd(real_q, real_k) * len(real_q) / n_s
        return mmd_q, dict(mmd_q=mmd_q.detach())

class Early(Chunks):
    """GA for a first share of the training, --until; from then on D is trained as by GA, and P_Q gets nothing
    from it. With --match placebo P_Q gets nothing from the first step on."""

    def match(self, q, k, s, t, n_s, n_t):
        reached = self.args.match == "early" and self.progress < self.args.until
        return super().match(q if reached else q.detach(), k, s, t, n_s, n_t)

class Start(Chunks):
    """CMA whose P_Q is set once: queries start with the keys' mean in each feature and, by one factor, with
    the keys' variance, summed over features. Queries and keys depend on tokens alone: `annotate`, which sees
    each row before training, measures them on the first 100 batches' rows; each row counts alike. The first
    forward pass sets P_Q, if it is one of step 1, where alone progress is 0: a run that goes on has its P_Q
    from state.pt. Every process measures the same rows, and so sets the same P_Q."""
    rows, sums = 0, 0  # of queries and keys: each row's means of the vectors, and of their squared norms

    @torch.no_grad()
    def annotate(self, row, s, t, tokenizers):
        numbers = chunks.annotate(row, s, t, tokenizers)
        if self.rows < 100 * self.args.batch_size:
            E_s, E_t = self.student.get_input_embeddings(), self.teacher.embeddings
            s, t = [collate([example], self.teacher.head.device) for example in (s, t)]
            q = self.proj.query(torch.cat(embed(E_s, s), -1))                                 # (1)
            k = std_normalise(torch.cat(embed(E_t, t), -1), t.mask)                           # (2)
            means = []
            for x in (q, k):  # (1, n, 2 d_t)
                squares = x.square().sum(2, keepdim=True)
                means.append(torch.cat([x, squares], 2).mean(1))
            self.sums = self.sums + torch.cat(means).double()  # (2, 2 d_t + 1)
            self.rows += 1
        return numbers

    def distil(self, s, t, h_s, h_t):
        if self.rows and self.progress == 0:
            with torch.no_grad():
                query, means = self.proj.query, self.sums / self.rows
                mean, square = means.split(query.out_features, 1)
                variance = square[:, 0] - mean.square().sum(1)
                factor = (variance[1] / variance[0]).sqrt()
                bias = (query.bias - mean[0]) * factor + mean[1]
                query.bias.copy_(bias)
                query.weight.mul_(factor)
        self.rows = 0
        return super().distil(s, t, h_s, h_t)

MATCHES = dict(none=Chunks, ga=Chunks, ct=ConditionalTransport, unsaturated=Unsaturated, mmd=MMD,
               placebo=Early, early=Early, start=Start)

def main(argv=None):
    """Runs a command line; returns what eval.json holds."""
    parser = chunks.build_parser(("cma",))
    parser.add_argument("--match", choices=tuple(MATCHES), default="ct", help="what L_KQ is")
    parser.add_argument("--until", metavar="SHARE", type=float, default=0.2, help="of training, for early")
    args = parser.parse_args(argv)
    adversarial = args.match not in ("none", "start")
    if args.ga and not adversarial:
        parser.error("--ga: give --match ga")
    parser.set_defaults(ga=adversarial)
    if not args.eval_only:
        match = f"-{args.match}" * (args.match != "none")
        parser.set_defaults(name="cma" + match + "-nq" * args.normalise_queries + f"-{args.div}")
    return dskd_ga.main(argv, parser, MATCHES[args.match])

if __name__ == "__main__":
    main()
