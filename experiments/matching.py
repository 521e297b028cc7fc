#!/usr/bin/env python3
"""Another way than GA, eq. (14), to bring queries and keys together, and GA less some of it, as controls.
They take dskd_ga.py's flags. Beside its terms they log, as means over student positions, `mass` of attention
A^{t->s} in the right chunk, its `entropy` in nats, `norm_q` of queries, and `mean_gap`, |mean q - mean k|.

    python experiments/matching.py --match ct --div kl  # conditional transport, eq. (15)
    python experiments/matching.py --match early        # GA for the first fifth of the training

CT, from Alignment Attention (arXiv:2110.12567, eq. 4), of a sequence's n_s queries q and n_t keys k:
    pi(k|q) ∝ exp(phi(q)·phi(k)),  c(q,k) = 1 - c(q)·c(k)
    min_{P_Q, phi} max_c  1/2 E_q E_{pi(k|q)} c(q,k) + 1/2 E_k E_{pi(q|k)} c(q,k)                (15)
The critic c and the navigator phi are networks with outputs of norm 1; the keys are constants. Unlike here,
the authors' code has distances (half their square is our cost), a highway layer in the critic, no dropout in
the navigator, and one more term, a transposed one.
"""
import torch
import torch.nn.functional as F
from torch import nn
import chunks  # which finds dskd_ga.py
import dskd_ga
from dskd_ga import full_precision, reverse, zero_padding

class UnitNetwork(nn.Sequential):  # (..., width) -> (..., hidden), vectors of norm 1
    def forward(self, x):
        return F.normalize(full_precision(super().forward(x)), dim=-1)

class Critic(nn.Module):  # c and phi of eq. (15)
    def __init__(self, width, hidden=768, dropout=0.1):
        super().__init__()
        for name in ("critic", "navigator"):
            layers = nn.Linear(width, hidden), nn.LeakyReLU(0.1), nn.Linear(hidden, hidden)
            self.add_module(name, UnitNetwork(nn.Dropout(dropout), *layers))

def ct_loss(critic, q, k, s_mask, t_mask, n_s=None, n_t=None):
    """L_KQ of eq. (15) and, for the log, its detached halves. critic: `Critic`; the rest as in `ga_loss`. One
    backward pass serves all players: P_Q and the navigator descend this loss, the critic ascends it."""
    n_s = s_mask.sum() if n_s is None else n_s
    n_t = t_mask.sum() if n_t is None else n_t
    q, k = zero_padding(q, s_mask), zero_padding(k.detach(), t_mask)
    # the outer `reverse` turns the critic's gradient; the inner one turns back what goes on to the queries
    c_q, c_k = reverse(critic.critic(reverse(q))), reverse(critic.critic(k))
    phi_q, phi_k = critic.navigator(q), critic.navigator(k)
    with torch.autocast(q.device.type, enabled=False):  # bf16 would round cosines near 1 to steps of 1/256
        cost = 1 - c_q @ c_k.mT  # (B, S, T)
        nearness = phi_q @ phi_k.mT
    to_keys = nearness.masked_fill(~t_mask[:, None, :], -1e30).softmax(2)     # pi(k|q)
    to_queries = nearness.masked_fill(~s_mask[:, :, None], -1e30).softmax(1)  # pi(q|k)
    ct_q = 0.5 * ((to_keys * cost).sum(2) * s_mask).sum() / n_s
    ct_k = 0.5 * ((to_queries * cost).sum(1) * t_mask).sum() / n_t
    return ct_q + ct_k, dict(ct_q=ct_q.detach(), ct_k=ct_k.detach())           # (15)

class ConditionalTransport(chunks.Chunks):
    adversary = Critic
    def match(self, q, k, s, t, n_s, n_t):
        return ct_loss(self.disc, q, k, s.mask, t.mask, n_s, n_t)

class Early(chunks.Chunks):
    """GA whose P_Q gets nothing from D after a first share of the training, --until; placebo: never."""
    def match(self, q, k, s, t, n_s, n_t):
        reached = self.args.match == "early" and self.progress < self.args.until
        return super().match(q if reached else q.detach(), k, s, t, n_s, n_t)

MATCHES = dict(none=chunks.Chunks, ga=chunks.Chunks, ct=ConditionalTransport, placebo=Early, early=Early)

def main(argv=None):  # returns what eval.json holds
    parser = chunks.build_parser(("cma",))
    parser.add_argument("--match", choices=tuple(MATCHES), default="ct", help="what L_KQ is")
    parser.add_argument("--until", metavar="SHARE", type=float, default=0.2, help="of training, for early")
    args = parser.parse_args(argv)
    if args.ga and args.match == "none":
        parser.error("--ga: give --match ga")
    parser.set_defaults(ga=args.match != "none")
    if not args.eval_only:
        match = f"-{args.match}" * (args.match != "none")
        parser.set_defaults(name="cma" + match + "-nq" * args.normalise_queries + f"-{args.div}")
    return dskd_ga.main(argv, parser, MATCHES[args.match])

if __name__ == "__main__":
    main()
