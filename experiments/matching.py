#!/usr/bin/env python3
"""Other ways than the adversary of eq. (14) to bring queries and keys together, and eq. (9) without some of
its terms. They take dskd_ga.py's flags, and log `mass`, the share of A^{t->s} in the right chunk, if any.

    python experiments/matching.py --match ct --div kl            # conditional transport, eq. (15)
    python experiments/matching.py --match none --without kd_t2s  # plain CMA, less a term

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
import chunks
import dskd_ga
from dskd_ga import at_real, full_precision, reverse, zero_padding

TERMS = ("ce", "ce_t2s", "kd_t2s", "kd_s2t")  # of eq. (9)
class UnitNetwork(nn.Sequential):  # (..., width) -> (..., hidden), vectors of norm 1
    def forward(self, x):
        return F.normalize(full_precision(super().forward(x)), dim=-1)
class Critic(nn.Module):
    """The networks of eq. (15): the critic, which ascends the cost, and the navigator, which descends it."""
    def __init__(self, width, hidden=768, dropout=0.1):
        super().__init__()
        for name in ("critic", "navigator"):
            self.add_module(name, UnitNetwork(nn.Dropout(dropout), nn.Linear(width, hidden),
                                              nn.LeakyReLU(0.1), nn.Linear(hidden, hidden)))

def ct_loss(critic, q, k, s_mask, t_mask, n_s=None, n_t=None):
    """L_KQ of eq. (15), and detached sums for the log: its halves over queries, `ct_q`, and keys, `ct_k`.
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
    ct_q = 0.5 * ((to_keys * cost).sum(2) * s_mask).sum()
    ct_k = 0.5 * ((to_queries * cost).sum(1) * t_mask).sum()
    loss = ct_q / n_s + ct_k / n_t                                             # (15)
    return loss, dict(ct_q=ct_q.detach(), ct_k=ct_k.detach())

class CMA(dskd_ga.Distiller):
    """DSKD-CMA, with GA if args.ga, less the terms of args.without; logs the attention in the right chunk."""
    annotate = staticmethod(chunks.annotate)
    def __init__(self, student, teacher, args):
        super().__init__(student, teacher, args)
        self.weights = [0.5 * (term not in args.without) for term in TERMS]
    def distil(self, s, t, h_s, h_t):
        out = super().distil(s, t, h_s, h_t)
        out["mass"] = (out["a_t2s"] * chunks.same_chunk(s, t)).sum()
        return out

class ConditionalTransport(CMA):
    adversary = Critic
    def match(self, q, k, s, t, n_s, n_t):
        return ct_loss(self.disc, q, k, s.mask, t.mask, n_s, n_t)

class Unsaturated(CMA):
    """GA where P_Q descends -log(1 - D(q)) instead of ascending -log D(q): the surer D is, the larger is the
    gradient, which vanishes in eq. (14). D learns as there, and from P_Q's loss nothing."""
    def match(self, q, k, s, t, n_s, n_t):
        loss, terms = dskd_ga.ga_loss(self.disc, q.detach(), k, s.mask, t.mask, n_s, n_t)
        fixed = {name: weight.detach() for name, weight in self.disc.named_parameters()}
        z_q = torch.func.functional_call(self.disc, fixed, zero_padding(q, s.mask))
        return loss + (F.softplus(z_q) * s.mask).sum() / n_s, terms

class MMD(CMA):
    """Descends the squared maximum mean discrepancy of a micro-batch's queries and keys, without a network.
    It compares vectors of different rows, and so depends on the cut into micro-batches."""
    adversary = nn.Identity  # no weights
    def match(self, q, k, s, t, n_s, n_t):
        real_q, real_k = at_real(q, s), at_real(k.detach(), t)
        mmd_q = chunks.mmd(real_q, real_k) * len(real_q)  # a sum over queries
        return mmd_q / n_s, dict(mmd_q=mmd_q.detach())

MATCHES = dict(none=CMA, ga=CMA, ct=ConditionalTransport, unsaturated=Unsaturated, mmd=MMD)

def main(argv=None):
    """Runs a command line; returns what eval.json holds."""
    parser = dskd_ga.build_parser(("cma",))
    parser.add_argument("--match", choices=tuple(MATCHES), default="ct", help="what L_KQ is")
    parser.add_argument("--without", choices=TERMS[1:], nargs="+", default=[], help="terms with weight 0")
    args = parser.parse_args(argv)
    if args.ga and args.match == "none":
        parser.error("--ga: give --match ga")
    parser.set_defaults(ga=args.match != "none")
    if not args.eval_only:
        parts = ["cma", *[args.match] * (args.match != "none"), *["nq"] * args.normalise_queries]
        parser.set_defaults(name="-".join([*parts, *[f"no_{term}" for term in args.without], args.div]))
    return dskd_ga.main(argv, parser, MATCHES[args.match])

if __name__ == "__main__":
    main()
