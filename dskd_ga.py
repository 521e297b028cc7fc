#!/usr/bin/env python3
"""DSKD-CMA-GA: distil a large language model into a small one that has another tokenizer.

Reference implementation of "Dual-Space Knowledge Distillation with Key-Query Matching for Large Language
Models with Vocabulary Mismatch" (Tsiapali, Do, Knill; ICASSP 2026; arXiv:2603.22056 v1), for Linux.

    python dskd_ga.py --div skl --ga                         # the paper's best row, on one GPU
    torchrun --nproc_per_node=4 dskd_ga.py --div skl --ga    # the same run on four GPUs
    python dskd_ga.py --method sft                           # plain fine-tuning, without a teacher
    python dskd_ga.py --eval-only MODEL --name mine          # evaluation of any checkpoint

The method, which needs nothing but torch: 1 batches, 2 divergences, 3 attention, 4 adversary, 5 objective.
What runs it: 6 models, 7 data, 8 training, 9 evaluation, 10 command line.

Departures from the paper, each marked NOT IN PAPER where it happens
  1. KD^{t->s} counts only where argmax q^{t->s} is gold, as in the authors' code; --all-positions: always.
  2. KD^{s->t} is forward KL whatever --div is, as in the authors' code; --s2t-div changes it.
  3. Eq. (8) prints f(p^s || q^{t->s}). As in the authors' code, what is learnt from is f's first argument.
  4. N_std is over each sequence's own real positions: a loss depends on neither padding nor batch.
  5. D is trained, as eq. (14) says, L_KQ is a mean over real positions. The authors' D stays at random.
  6. A step's rows are sorted by length into micro-batches; an epoch's last, incomplete step is left out.
  7. Prompts get the special tokens that their tokenizer puts in front. Evaluation keeps the end of long ones.
  8. Texts are brought to Unicode's composed form (NFC), so that both tokenizers read the same characters.
     End-of-text marks that are spelt out at the end of an answer are taken off.

Glossary: B sequences; S and T student and teacher response positions; V_s and V_t vocabularies
  paper               code           shape                     equation
  h^s, h^t            h_s, h_t       (B, S|T, d_s|d_t)         (4), (5): last hidden states, normed
  Q, K                q, k           (B, S|T, 2 d_t)           (1), (2)
  P_Q                 proj.query     2 d_s -> 2 d_t            (1)
  A^{t->s}, A^{s->t}  a_t2s, a_s2t   (B, S, T), (B, T, S)      (3)
  P^{s->t}, P^{t->s}  proj.s2t, .t2s d_s -> d_t, d_t -> d_s    (4), (5)
  V^{s->t}, V^{t->s}  v_s2t, v_t2s   (B, S, d_t), (B, T, d_s)  (4), (5)
  h^{t->s}, h^{s->t}  h_t2s, h_s2t   (B, S, d_s), (B, T, d_t)  (6)
  W^s, W^t            W_s, W_t       (V_s|V_t, d_s|d_t)        (7): prediction heads
  p^s, q^{t->s}       z_s, z_t2s     (N, V_s)                  (7): as logits, at N real positions
  p^t, q^{s->t}       z_t, z_s2t     (N, V_t)                  (7)
  D                   Discriminator  2 d_t -> logit            (14)
"""
import argparse, datetime, fcntl, hashlib, json, math, os, re, shutil, sys, time, unicodedata, zipfile
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from rouge_score import rouge_scorer
from torch import Tensor, distributed as dist, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, logging
from transformers.utils.peft_utils import find_adapter_config_file

# 1. Batches =================================================================================================
class Side(NamedTuple):
    """A padded batch for one model: B sequences, up to n response positions, N of them real."""
    inputs: Tensor         # (B, n) the token that is read at a position
    targets: Tensor        # (B, n) the next token, which is predicted there
    mask: Tensor           # (B, n) bool, True on real positions
    ids: Tensor = None     # (B, L) what the trunk reads
    pos: Tensor = None     # (B, n) where in ids the response positions are
    hidden: Tensor = None  # (B, n, d) last hidden states there, of the teacher, see `read_once`
    chunk: Tensor = None   # (B, n) numbers from a method's `annotate`, of chunks, say; negative: none

def full_precision(x):  # half precision to float32; float64, as in tests, stays
    return x.to(torch.promote_types(x.dtype, torch.float32))

def zero_padding(x, mask):  # (B, n, d), (B, n) -> (B, n, d), 0 on padding whatever was there, nan included
    return x.masked_fill(~mask.unsqueeze(2), 0)

def embed(E, side):  # E: a table (V, d), or a module -> embeddings of inputs and targets, (B, n, d) each
    look_up = E.__getitem__ if torch.is_tensor(E) else E
    with torch.no_grad():  # constants; ids under padding may be anything: they become valid ones
        return [look_up(ids.where(side.mask, 0)) for ids in (side.inputs, side.targets)]

# 2. Divergences f(p || q): q learns from p ==================================================================
DIVERGENCES = ("kl", "rkl", "jsd", "skl", "srkl", "akl")  # skl, srkl: DistiLLM; akl: Wu et al. 2025

def kl(log_a, log_b):  # (..., V), (..., V) -> (...): KL(a || b)
    return (log_a.exp() * (log_a - log_b)).sum(-1)

def log_mix(weight, log_a, log_b):  # log(weight a + (1 - weight) b)
    return torch.logaddexp(log_a + math.log(weight + 1e-30), log_b + math.log(1 - weight + 1e-30))

@torch.no_grad()
def head_share(log_p, log_q, head_mass):  # (..., V), (..., V) -> (...)
    """akl's g_head / (g_head + g_tail): |p - q| over p's likeliest tokens up to head_mass, and over all."""
    p, order = log_p.exp().sort(-1, descending=True)
    q = log_q.exp().gather(-1, order)
    gap = (p - q).abs()
    in_head = (p.cumsum(-1) - p) < head_mass
    return (gap * in_head).sum(-1) / gap.sum(-1).clamp(min=1e-30)

def divergence(name, p, q, temperature=2.0, skew=0.1, head_mass=0.5):
    """f(p || q) of eq. (8): logits (..., V), (..., V) of what is learnt from and what learns -> (...).
    name: one of DIVERGENCES (else ValueError), or a function of (log p, log q). skew: a of skl, srkl."""
    # no factor tau^2; a finite floor, since 0 * (-inf - -inf) would be nan
    log_p, log_q = [(full_precision(z).clamp(min=-1e30) / temperature).log_softmax(-1) for z in (p, q)]
    if callable(name):
        return name(log_p, log_q)
    if name == "kl":
        return kl(log_p, log_q)
    if name == "rkl":
        return kl(log_q, log_p)
    if name == "skl":
        return kl(log_p, log_mix(skew, log_p, log_q))
    if name == "srkl":
        return kl(log_q, log_mix(skew, log_q, log_p))
    if name == "jsd":
        log_m = log_mix(0.5, log_p, log_q)
        return (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    if name == "akl":
        share = head_share(log_p, log_q, head_mass)
        return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)
    raise ValueError(f"divergence {name!r} is none of {DIVERGENCES}")

# 3. Cross-model attention (CMA) =============================================================================
class Projectors(nn.Module):  # the linear maps between a student of width d_s and a teacher of width d_t
    def __init__(self, d_s, d_t):
        super().__init__()
        self.query = nn.Linear(2 * d_s, 2 * d_t)  # P_Q of eq. (1)
        self.t2s = nn.Linear(d_t, d_s)            # P^{t->s} of eq. (5)
        self.s2t = nn.Linear(d_s, d_t)            # P^{s->t} of eq. (4)

def std_normalise(x, mask):
    """N_std of eqs. (2), (5), x over its standard deviation: (B, n, d), (B, n) -> (B, n, d), 0 on padding."""
    x = zero_padding(full_precision(x), mask)  # NOT IN PAPER: each sequence's own positions (departure 4)
    variance = torch.masked.var(x, (1, 2), unbiased=True, keepdim=True, mask=mask.unsqueeze(2))
    return x / variance.nan_to_num().clamp(min=1e-12).sqrt()  # nan: of a sequence without positions

def cross_model_attention(q, k, allowed):  # (B, S, w), (B, T, w), (B, S, T) bool: which pairs may meet
    """-> A^{t->s} (B, S, T), A^{s->t} (B, T, S) of eq. (3). Rows sum to 1, or to 0 with nothing allowed."""
    q = zero_padding(full_precision(q), allowed.any(2))
    k = zero_padding(full_precision(k), allowed.any(1))
    with torch.autocast(q.device.type, enabled=False):  # bf16 is too coarse for scores in the hundreds
        scores = q @ k.mT / math.sqrt(q.shape[2])
    scores = scores.masked_fill(~allowed, -1e30)
    a_t2s = scores.softmax(-1) * allowed                                                      # (3)
    a_s2t = scores.mT.softmax(-1) * allowed.mT                                                # (3)
    return a_t2s, a_s2t

# 4. Key-query matching: the generative adversary (GA) =======================================================
class Discriminator(nn.Module):
    """D of eq. (14), (..., width) -> (...): a logit per vector, high for "a query". Highway layer and MLP."""
    def __init__(self, width, hidden=768, dropout=0.1):
        super().__init__()
        self.highway = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(width, hidden), nn.LeakyReLU(0.1), nn.Linear(hidden, 1))

    def forward(self, x):
        z = self.highway(x)
        gate = z.sigmoid()
        mixed = gate * z.relu() + (1 - gate) * x
        return full_precision(self.mlp(mixed).squeeze(-1))

def reverse(x):  # x itself, but the gradient that goes back through it has the other sign
    return 2 * x.detach() - x

def ga_loss(disc, q, k, s_mask, t_mask,  # D; (B, S, w), (B, T, w); (B, S), (B, T): True on real positions
            n_s=None, n_t=None):         # divisors of the sums over these; None: their counts
    """L_KQ, D's cross-entropy: minus the value of eq. (14); and what to log, detached. One backward pass
    serves both players: D descends this loss; P_Q, behind `reverse`, ascends it. Keys are constants."""
    n_s = s_mask.sum() if n_s is None else n_s
    n_t = t_mask.sum() if n_t is None else n_t
    z_q = disc(reverse(q[s_mask]))  # (N,). NOT IN PAPER: of real positions (departure 5)
    z_k = disc(k[t_mask].detach())
    loss_q = F.softplus(-z_q).sum() / n_s  # mean of -log D(q)                                  (14)
    loss_k = F.softplus(z_k).sum() / n_t   # mean of -log(1 - D(k))                             (14)
    terms = dict(D_q=z_q.detach().sigmoid().sum() / n_s, accuracy_q=(z_q > 0).sum() / n_s,
                 D_k=z_k.detach().sigmoid().sum() / n_t, accuracy_k=(z_k <= 0).sum() / n_t)
    return loss_q + loss_k, terms

# 5. Objective ===============================================================================================
def sliced_loss(fn, sides, rows=(), max_logits=2 ** 24):
    """(loss, *terms), sums over N positions, whose logits exist only a slice at a time: a fused linear loss,
    in torch. The gradient is formed while a slice's logits exist, so that no head product is computed twice;
    the backward pass only scales it. fn: (logits_1, ..., logits_J, *rows) -> (loss, *terms), sums over
    its positions. sides: J pairs of hidden states (N, d_j) and heads (V_j, d_j). rows: (N, ...)."""
    hidden, heads = zip(*sides)
    # copies, at which a slice's backward pass ends
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in (*hidden, *heads)]
    J, totals = len(sides), 0
    size = max(1, max_logits // max(map(len, heads)))
    slices = [x.split(size) for x in (*leaves[:J], *rows)]
    for part in zip(*slices):
        logits = [full_precision(F.linear(h, W)) for h, W in zip(part, leaves[J:])]
        sums = fn(*logits, *part[J:])
        if sums[0].requires_grad:
            sums[0].backward()
        totals = totals + torch.stack([x.detach().double() for x in sums])
        del logits, sums  # before the next ones are made
    loss, *terms = totals.unbind()
    linear = torch.zeros_like(loss)  # in hidden and heads; its gradient is the one that is known
    for x, leaf in zip((*hidden, *heads), leaves):
        if leaf.grad is not None:
            linear = linear + torch.dot(x.flatten(), leaf.grad.flatten())
    return loss + (linear - linear.detach()), *terms  # the loss's value, linear's gradient

def dual_space_losses(
        proj, s, t,   # `Projectors(d_s, d_t)`; the `Side`s of student and teacher
        h_s, h_t,     # (B, S, d_s), (B, T, d_t): last hidden states at the response positions
        E_s, E_t,     # embeddings: a table (V, d) or a module
        W_s, W_t, *,  # (V_s, d_s), (V_t, d_t): prediction heads
        align=None,   # (q, k, s, t) -> (a_t2s, a_s2t); None: eq. (3)
        div="skl", s2t_div="kl", temperature=2.0, skew=0.1, all_positions=False,
        weights=(0.5, 0.5, 0.5, 0.5)):  # of CE, CE^{t->s}, KD^{t->s}, KD^{s->t}
    """Eqs. (1)-(9) for a batch, as a dict. `loss`, eq. (9) summed over positions, and `q` have a gradient.
    The sums `ce`, `ce_t2s`, `kd_t2s`, `kd_s2t`, `n_correct` have none, nor have `k`, `a_t2s`, `a_s2t`,
    `h_t2s`, `h_s2t`."""
    # queries, keys, attention
    h_s, h_t = zero_padding(h_s, s.mask), h_t.detach()
    e_s = torch.cat(embed(E_s, s), -1)  # (B, S, 2 d_s): of the tokens that a position reads and predicts
    e_t_input, e_t_target = embed(E_t, t)
    q = zero_padding(proj.query(e_s), s.mask)                                                 # (1)
    k = std_normalise(torch.cat([e_t_input, e_t_target], -1), t.mask)                         # (2)
    if align is None:
        a_t2s, a_s2t = cross_model_attention(q, k, s.mask.unsqueeze(2) & t.mask.unsqueeze(1))  # (3)
    else:
        a_t2s, a_s2t = align(q, k, s, t)

    # each model's states in the other's space
    v_s2t = proj.s2t(h_s)                                                                     # (4)
    v_t2s = proj.t2s(std_normalise(h_t, t.mask) + std_normalise(e_t_target, t.mask))          # (5)
    h_t2s, h_s2t = a_t2s @ v_t2s, a_s2t @ v_s2t                                               # (6)

    # what is learnt there; `aligned` is False where a position attends to nothing
    w_ce, w_ce_t2s, w_kd_t2s, w_kd_s2t = weights

    def student_space(z_s, z_t2s, target, aligned):  # logits (n, V_s) twice, (n,), (n,)
        fixed_t2s = z_t2s.detach()  # q^{t->s} is constant inside KD^{t->s}: CE^{t->s} alone trains P^{t->s}
        correct = (fixed_t2s.argmax(-1) == target) & aligned
        counted = aligned if all_positions else correct  # NOT IN PAPER: correct positions only (departure 1)
        ce = F.cross_entropy(z_s, target, reduction="sum")
        ce_t2s = (F.cross_entropy(z_t2s, target, reduction="none") * aligned).sum()
        # NOT IN PAPER: what is learnt from is f's first argument (departure 3)
        kd_t2s = (divergence(div, fixed_t2s, z_s, temperature, skew) * counted).sum()         # (8)
        loss = w_ce * ce + w_ce_t2s * ce_t2s + w_kd_t2s * kd_t2s                              # (9)
        return loss, ce, ce_t2s, kd_t2s, correct.sum()

    def teacher_space(z_t, z_s2t, aligned):  # logits (n, V_t) twice, (n,)
        # NOT IN PAPER: its own f (departure 2)
        kd_s2t = (divergence(s2t_div, z_t, z_s2t, temperature, skew) * aligned).sum()         # (8)
        return w_kd_s2t * kd_s2t, kd_s2t                                                      # (9)

    # the heads of eq. (7): W^s learns through p^s alone, from CE and KD^{t->s}; the others are constant
    W_t = W_t.detach()
    loss_s, ce, ce_t2s, kd_t2s, n_correct = sliced_loss(
        student_space, [(h_s[s.mask], W_s), (h_t2s[s.mask], W_s.detach())],                   # (7)
        [s.targets[s.mask], a_t2s.any(2)[s.mask]])
    loss_t, kd_s2t = sliced_loss(
        teacher_space, [(h_t[t.mask], W_t), (h_s2t[t.mask], W_t)], [a_s2t.any(2)[t.mask]])
    return dict(loss=loss_s + loss_t, ce=ce, ce_t2s=ce_t2s, kd_t2s=kd_t2s, kd_s2t=kd_s2t, n_correct=n_correct,
                q=q, k=k, a_t2s=a_t2s.detach(), a_s2t=a_s2t.detach(),
                h_t2s=h_t2s.detach(), h_s2t=h_s2t.detach())

# 6. Models: trunk, head and embeddings of any causal language model =========================================
class InputError(ValueError):
    """Bad settings, rows, models, disks: `main` prints it in one line and ends with status 2."""

def check(ok, where, found, expected):  # where: a flag, a model, or a file, its line and field
    if not ok:
        raise InputError(f"{where}: found {str(found)[:300]}, expected {expected}")

@contextmanager
def told(where):  # whatever fails in the block ends in one line, which begins with `where`
    try:
        yield
    except Exception as error:
        raise InputError(f"{where}: {error}") from error

def rank():  # of this process
    return dist.get_rank() if dist.is_initialized() else 0

def processes():  # their number
    return dist.get_world_size() if dist.is_initialized() else 1

def gather(x=None):  # what each process has, in a list; every one waits here for the last
    found = [x] * processes()
    if dist.is_initialized():
        dist.all_gather_object(found, x)
    return found

def say(*words):  # on rank 0, without breaking a progress bar
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)))

def bar(items, name):  # disable=None: no bar where there is no terminal
    return tqdm(items, desc=name, leave=False, disable=rank() > 0 or None)

def batches(sequences, size):  # lists of row numbers, `size` at a time, of like length
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
    return [order[start:start + size] for start in range(0, len(order), size)]

def has_bf16(device):  # then matrix products are in it, and so is the frozen teacher
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))

def head_of(model):  # W (V, d)
    return model.get_output_embeddings().weight

def trunk(model, ids):  # (B, L) -> (B, L, d): the last hidden states, after the final norm
    return model.get_decoder()(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state

def response_hidden(model, side):  # h, (B, n, d), at the response positions
    # Padding is on the right and attention is causal: no real position sees padding, so no mask is needed.
    return trunk(model, side.ids).take_along_dim(side.pos.unsqueeze(2), 1)

def decoding(ends, pad, temperature=1.0, no_repeat_ngram=0):  # ends: the ids that stop it
    """All settings by which responses are generated. It replaces the model's own, so that nothing else in
    its folder changes a score. temperature 0: the likeliest tokens."""
    sampling = dict(temperature=temperature, top_k=0, top_p=1.0) if temperature > 0 else {}
    return GenerationConfig(do_sample=temperature > 0, no_repeat_ngram_size=no_repeat_ngram,
                            eos_token_id=ends, pad_token_id=pad, **sampling)

@torch.no_grad()
def load_model(source, device, frozen=False):  # source: a folder or hub id; frozen: not to be trained
    """A causal language model, with `tokenizer`. InputError says why, if one would fail or be wrong later."""
    try:
        dtype = torch.bfloat16 if frozen and has_bf16(device) else torch.float32
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        end = tokenizer.eos_token_id
        check(end is not None, "tokenizer", "no end of text", "one")
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True)  # they are refused below, by name
        model = model.to(device).requires_grad_(False)  # a vision tower, say, gets no gradient
        model.get_decoder().requires_grad_(True)
        head = model.get_output_embeddings().requires_grad_(True)
        own = model.generation_config.eos_token_id
        # a single stop id may be a mere default of the config: it counts only if it is an added token
        ends = own if isinstance(own, list) else {own} & tokenizer.added_tokens_decoder.keys()
        # try what all else relies on: equal up to 5 %, for bf16, and no nan
        ids = torch.tensor([20 * [end] + 8 * [1, 2] + 9 * [end]], device=device)
        (hidden,), (longer,) = trunk(model, ids[:, 20:36]), trunk(model, ids[:, 20:])
        model.generation_config = decoding(sorted({end, *ends}), end)  # as evaluated; saved with `best`
        mask = torch.arange(36, device=device) >= 20  # what is before it is padding
        generated = model.generate(ids[:, :36], attention_mask=mask[None].long(), max_new_tokens=1,
                                   output_logits=True, return_dict_in_generate=True)
        logits = head.weight @ hidden[-1]
        causal = torch.dist(longer[:16], hidden) <= 0.05 * hidden.norm()
        equal = torch.dist(generated.logits[0][0], logits) <= 0.05 * logits.norm()
        wrong = dict(
            slow_tokenizer=not tokenizer.is_fast, empty_tokenizer=len(tokenizer) < 2,
            random_tokens=tokenizer.is_fast and getattr(tokenizer.backend_tokenizer.model, "dropout", None),
            missing_weights=info["missing_keys"], weights_of_other_shapes=info["mismatched_keys"],
            adapter=find_adapter_config_file(str(source)),
            quantised_weights=hasattr(model, "hf_quantizer"), bias_of_head=head.bias is not None,
            cap_of_logits=getattr(model.config.get_text_config(), "final_logit_softcapping", None),
            states_that_later_tokens_change=not causal, padded_logits_other_than_head_times_trunk=not equal)
        for name, value in wrong.items():
            check(not value, name, value, "none")
        model.tokenizer = tokenizer
        return model
    except Exception as error:
        raise InputError(f"{source}: {error!r}") from error

def check_readable(model, sequences, flags, more=0):  # lists of ids, `more` tokens after each; flags to lower
    longest, highest = max(map(len, sequences)) + more, max(map(max, sequences))
    size = len(model.get_input_embeddings().weight)
    check(highest < size, model.name_or_path, f"the token {highest}", f"its {size} embeddings")
    config = model.config.get_text_config()  # all but MPT's have one name for this
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", longest)
    check(longest <= limit, model.name_or_path, f"a row of {longest} tokens",
          f"its {limit} positions: lower {flags}")

# 7. Data: text row -> two tokenisations of the same text -> padded batch ====================================
class Row(NamedTuple):
    prompt: str
    references: list            # the responses that are right; training uses the first
    teacher_prompt: str = None  # what the teacher reads in place of the prompt, if that is another

class Example(NamedTuple):  # a row as one model reads it, with n response tokens
    ids: list              # prompt, response, end of text; cut at the length limit
    start: int             # where the response begins in ids
    chunk: list = None     # n numbers, from a method's `annotate`
    hidden: Tensor = None  # (n, d) last hidden states at the response positions, from `read_once`

    @property
    def length(self):  # n
        return len(self.ids) - self.start

class Pair(NamedTuple):  # a row as student and teacher read it; without a teacher (sft) t is None
    s: Example
    t: Example = None

# taken off besides the stop tokens of both models, so that runs of other models mostly learn the same texts
END_MARKS = "<|endoftext|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"

def fetch(source):  # a local path, or ORG/DATASET/FILE of the hub, which is downloaded once
    if os.path.exists(source):
        return source
    with told(f"{source}: found no such file here, nor on the hub"):
        org, dataset, file = source.split("/", 2)
        return hf_hub_download(f"{org}/{dataset}", file, repo_type="dataset")

def alpaca_prompt(instruction, context):  # with or without a further context
    paired = ", paired with an input that provides further context" if context else ""
    middle = f"### Input:\n{context}\n\n" if context else ""
    return (f"Below is an instruction that describes a task{paired}. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n")

def clean(text, field):  # a text of a row, composed
    check(isinstance(text, str), field, repr(text), "a text")
    text.encode()  # fails on half a surrogate pair
    return unicodedata.normalize("NFC", text)  # NOT IN PAPER (departure 8)

def stop_marks(model):  # the texts of the tokens that end a response
    return tuple(filter(str.strip, map(model.tokenizer.decode, model.generation_config.eos_token_id)))

def without_marks(text, marks):  # at its end, and the white space before them
    while (end := text.rstrip()).endswith(marks):
        for mark in marks:
            end = end.removesuffix(mark)
        text = end.rstrip()
    return text

def read_rows(path, limit=None, marks=()):
    """The `Row`s of a file of JSON lines: `prompt`, or `instruction` and maybe `input`; `output`, a text or a
    list of texts, which lose END_MARKS and marks at their ends; maybe `teacher_prompt`. null and "" are as if
    absent; a row without output is left out. InputError names line and field of a bad row."""
    marks = (*END_MARKS, *marks)
    rows, unread = [], set()
    lines = Path(path).read_bytes().rstrip().split(b"\n")[:limit]
    for number, line in enumerate(lines, 1):
        with told(f"{path}, line {number}"):
            fields = {name: value for name, value in json.loads(line).items() if value not in (None, "")}
            take = lambda name, default=None: clean(fields.pop(name, default), name)  # what is left is unread
            output = fields.pop("output", [])
            output = output if isinstance(output, list) else [output]  # test sets have lists
            texts = [without_marks(clean(text, "output"), marks) for text in output if text is not None]
            prompt = take("prompt", "") or alpaca_prompt(take("instruction"), take("input", ""))
            teacher_prompt = take("teacher_prompt", "") or None
        texts = list(filter(str.strip, texts))
        if texts:
            rows.append(Row(prompt, texts, teacher_prompt))
        unread |= fields.keys()
    if unread or len(rows) < len(lines):
        say(path, "- rows without output:", len(lines) - len(rows), "- fields not read:", *sorted(unread))
    check(rows, path, "no row with an output", "at least one")
    return rows

def tokenize(tokenizer, text, **options):  # -> ids; for each, whether the tokenizer added it
    with told(f"{tokenizer.name_or_path}: cannot read {text[:50]!r}"):  # not all have an unknown token
        found = tokenizer(text, return_special_tokens_mask=True, verbose=False, **options)
        return found["input_ids"], found["special_tokens_mask"]

def prompt_ids(tokenizer, prompt, limit=sys.maxsize):  # one that is longer than limit loses its beginning
    # NOT IN PAPER: the special tokens that the tokenizer puts in front of a text, never twice (departure 7)
    ids, added = tokenize(tokenizer, prompt)
    lead = ids[:[*added, 0].index(0)]
    body = [token for token, mark in zip(ids, added) if not mark]
    if body[:len(lead)] == lead:
        body = body[len(lead):]
    body = body[max(0, len(lead) + len(body) - limit):]
    return (lead + body) or [tokenizer.eos_token_id]  # there must be a position to predict from

def pairs(rows, tokenizers, max_prompt=256, max_length=512,  # the student's tokenizer and maybe the teacher's
          annotate=None):  # (row, s, t, tokenizers) -> a list for s and one for t: a number a response token
    """A `Pair` for each row with room for a response, if the student's prompt is within max_prompt tokens."""
    plain = dict(add_special_tokens=False, split_special_tokens=True)  # those that an answer spells are text
    kept = []
    for row in rows:
        sides = []
        for tokenizer, prompt in zip(tokenizers, (row.prompt, row.teacher_prompt or row.prompt)):
            asked = prompt_ids(tokenizer, prompt)
            answer, _ = tokenize(tokenizer, row.references[0], **plain)
            ids = asked + answer + [tokenizer.eos_token_id]
            sides.append(Example(ids[:max_length], len(asked)))
        if sides[0].start <= max_prompt and all(side.length > 0 for side in sides):
            numbers = annotate(row, *sides, tokenizers) if annotate else (None, None)
            kept.append(Pair(*[side._replace(chunk=chunk) for side, chunk in zip(sides, numbers)]))
    return kept

def step_rows(data, batch_size, micro_batch, seed, step):  # step: 1, 2, ...
    """The micro-batches, lists of `Pair`s, of an optimiser step, fixed by data, seed and step."""
    # NOT IN PAPER: whole steps only; rows of like length together, so that little is padded (departure 6)
    epoch, number = divmod(step - 1, len(data) // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(len(data))
    rows = [data[row] for row in order[number * batch_size:][:batch_size]]
    rows.sort(key=lambda pair: len(pair.s.ids))
    return [rows[i:i + micro_batch] for i in range(0, batch_size, micro_batch)]

def padded(sequences, device, value=0, side="right"):  # one tensor, as long as the longest; of None: None
    if sequences[0] is not None:
        tensors = list(map(torch.as_tensor, sequences))
        return nn.utils.rnn.pad_sequence(tensors, True, value, padding_side=side).to(device)

def collate(examples, device):  # the examples as a `Side`
    ids, starts, chunk, hidden = zip(*examples)
    pos = [range(start - 1, len(x) - 1) for x, start in zip(ids, starts)]  # before each token
    pos, ids = padded(pos, device, -1), padded(ids, device)
    mask, pos = pos >= 0, pos.clamp(min=0)
    return Side(inputs=ids.gather(1, pos), targets=ids.gather(1, pos + 1), mask=mask, ids=ids[:, :-1],
                pos=pos, hidden=padded(hidden, device), chunk=padded(chunk, device, -1))

# 8. Training ================================================================================================
class Distiller(nn.Module):
    """What is trained: the student and, with a teacher, projectors and discriminator. A subclass is another
    method: it overrides annotate, align, distil or match, or names other projectors (or None)."""
    projectors, adversary = Projectors, Discriminator
    annotate = align = None  # or methods: see `pairs` and `dual_space_losses`
    progress = 0.0           # the share of the training that is done, for schedules

    def __init__(self, args, student, teacher=None):
        super().__init__()
        self.student, self.args = student, args
        self.teacher = self.proj = self.disc = None
        if teacher is not None:
            W_t = head_of(teacher).detach()
            # all that stays of it after `read_once`; no submodule, so not trained
            self.teacher = argparse.Namespace(embeddings=teacher.get_input_embeddings(), head=W_t)
            if self.projectors is not None:
                self.proj = self.projectors(head_of(student).shape[1], W_t.shape[1])
                self.disc = self.adversary(2 * W_t.shape[1]) if args.ga else None
        check(self.proj or not args.ga, "--ga", args.method, "a method with queries and keys")

    def distil(self, s, t, h_s, h_t, **options):  # options: of `dual_space_losses`, over the command line's
        """A dict: `loss`, a sum over the batch's positions, detached sums for the log, what `match` needs."""
        names = "div", "s2t_div", "temperature", "skew", "all_positions", "weights"
        options = {name: getattr(self.args, name) for name in names} | options
        return dual_space_losses(
            self.proj, s, t, h_s, h_t, self.student.get_input_embeddings(), self.teacher.embeddings,
            head_of(self.student), self.teacher.head, align=self.align, **options)

    def match(self, q, k, s, t, n_s, n_t):  # with --ga: L_KQ, and what to log of it
        return ga_loss(self.disc, q, k, s.mask, t.mask, n_s, n_t)

    def forward(self, s, t, n_s, n_t):
        """A micro-batch's share of eq. (16) and of the log's means. n_s, n_t: response tokens of the step."""
        h_s = response_hidden(self.student, s)
        if t is None:  # sft
            ce = lambda z, target: [F.cross_entropy(z, target, reduction="sum")]
            (loss,) = sliced_loss(ce, [(h_s[s.mask], head_of(self.student))], [s.targets[s.mask]])
            out = dict(loss=loss, ce=loss.detach())
        else:
            out = self.distil(s, t, h_s, t.hidden)
        # n_s is the one divisor, also of KD^{s->t}'s sum over the teacher's positions
        terms = {name: x / n_s for name, x in out.items() if x.ndim == 0}
        loss = terms.pop("loss")
        if self.args.ga:
            kq, kq_terms = self.match(out["q"], out["k"], s, t, n_s, n_t)
            loss = loss + self.args.kq_weight * kq                                            # (16)
            terms |= kq_terms
        return loss, terms

LOG_EVERY = 10  # steps whose means are one line of the log
# settings that may change between a stop and a restart: names of rows and models, whose contents are
# compared; those of the evaluation, which is done anew; what changes only rounding and random draws
NO_IDENTITY = """out name eval_only student teacher teacher_ready teacher_epochs teacher_lr data micro_batch
    recompute save_every tests eval_seeds eval_limit eval_batch eval_temperature no_repeat_ngram""".split()

def seed_torch(*numbers):  # by what is computed next: a restart draws the same numbers
    torch.manual_seed(np.random.SeedSequence(numbers).generate_state(1, np.uint64).item())

def replace(path, save, content, writer=0):  # save(content, ...) writes beside path, then takes its place
    if rank() == writer:
        fresh = path.with_name(path.name + ".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        with told(f"{path} cannot be written"):  # torch and safetensors have errors of their own
            save(content, fresh)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(fresh, path)

def write_json(path, *contents, indent=1):  # several: one after the other
    text = "\n".join([json.dumps(content, indent=indent) for content in contents])
    replace(path, lambda text, fresh: fresh.write_text(text), text)

def save_best(model, folder):  # for transformers' `from_pretrained`; and the projectors
    model.student.save_pretrained(folder)
    model.student.tokenizer.save_pretrained(folder)
    if model.proj is not None:
        torch.save(model.proj.state_dict(), folder / "projectors.pt")

def lock(folder):
    """Makes the folder, and locks it until the returned file is closed. Another command waits here."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        if rank() == 0:  # it holds it for all processes
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("waits for another command that works in", folder)
        fcntl.flock(file, fcntl.LOCK_EX)
    gather()  # all processes wait with the first
    return file

def fingerprint(content, tensors=()):  # digits that are equal if all of these are
    digest = hashlib.sha256(json.dumps(content, default=str).encode())
    for tensor in tensors:
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

def check_free(folder, *names):
    held = [name for name in names if (folder / name).exists()]
    check(not held, folder, held, "none of another run: remove it, or give another --out or --name")

def open_state(folder, identity):  # identity: a dict
    """The folder's state.pt, which alone says which run the folder is of, and how far it is; a new folder
    gets one. InputError, in every process: one of them cannot read it, or it is of another identity."""
    path = folder / "state.pt"
    if not path.exists():
        check_free(folder, "best", "eval.json")
        new = dict(identity=identity, step=0, best_score=-1.0, log=[], model=None, optimizer=None)
        replace(path, torch.save, new)
    gather()
    try:  # mmap: the processes of a node share the file's pages; testzip reads the checksums
        state = torch.load(path, "cpu", weights_only=True, mmap=True)
        known = state["identity"]
        other = [f"other {name}" for name in known | identity if known.get(name) != identity.get(name)]
        wrong = zipfile.ZipFile(path).testzip() or other
    except Exception as error:
        wrong = repr(error)
    wrong = list(filter(None, gather(wrong)))
    check(not wrong, path, wrong, "this run's, whole, seen by all: remove it, or give other --out, --name")
    return state

def optimizer_for(model, args):  # AdamW; biases and norms are not decayed
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():  # a tied weight comes once
        if parameter.requires_grad:
            peak = args.lr if name.startswith("student.") else args.lr_projectors
            groups[peak, 1e-2 if parameter.ndim > 1 else 0.0].append(parameter)
    settings = [dict(params=x, peak=peak, weight_decay=decay) for (peak, decay), x in groups.items()]
    return torch.optim.AdamW(settings, fused=True)

@torch.no_grad()
def read_once(teacher, data, folder, device):
    """The `Pair`s with h^t at their response positions, as the teacher, a model, reads them. Each process
    reads a share of the batches into files that all load: one node maps them, and keeps one copy."""
    examples, states, home = [pair.t for pair in data], {}, folder / "states.tmp"
    size = sum(example.length for example in examples) * head_of(teacher)[0].nbytes
    say("the teacher's states take", size / 1e9, "GB of memory or disk")
    # a mapped file that is removed stays readable on one node alone
    one_node = os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE")  # by torchrun's words
    # batches depend on the rows alone: a restart computes the same numbers
    plan = batches([example.ids for example in examples], 16)
    try:
        for numbers in bar(plan[rank()::processes()], "the teacher reads the rows"):
            side = collate([examples[row] for row in numbers], device)
            h = response_hidden(teacher, side)[side.mask].cpu()  # in the dtype of its weights
            check(h.isfinite().all(), "the teacher's states", "one that is not finite", "numbers")
            part = dict(zip(numbers, h.split([examples[row].length for row in numbers])))
            replace(home / f"{numbers[0]}.pt", torch.save, part, rank())
        gather()
        for numbers in plan:
            states |= torch.load(home / f"{numbers[0]}.pt", mmap=one_node)
        gather()
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return [Pair(s, t._replace(hidden=states[row])) for row, (s, t) in enumerate(data)]

def gradient(model, micro_batches, step, args, device):  # lists of `Pair`s, of all processes
    """Leaves a step's gradient in the parameters; returns this process's share of the log's means."""
    rows = sum(micro_batches, [])  # how they are cut changes dropout and rounding alone
    n_s = sum(pair.s.length for pair in rows)
    n_t = sum(pair.t.length for pair in rows if pair.t)
    shares = Counter()
    for m in range(rank(), len(micro_batches), processes()):
        s, t = [collate(side, device) if side[0] else None for side in zip(*micro_batches[m])]
        seed_torch(args.seed, step, m)
        # DistributedDataParallel exchanges gradients once a step, in a process's last backward pass
        model.require_backward_grad_sync = m + processes() >= len(micro_batches)
        with autocast(device):
            loss, terms = model(s, t, n_s, n_t)
        (loss * processes()).backward()  # the exchange takes the mean over processes
        shares.update(terms, loss=loss.detach(), tokens=s.mask.sum())  # Counter.update adds
    return shares

def set_up(args, rows, models, distiller):  # models: the student and, but for sft, the teacher
    """What is trained, its `Pair`s, the run's identity. InputError: rows cannot be read, or are too few."""
    # 1. models
    student, tokenizers = models[0], [model.tokenizer for model in models]
    seed_torch(args.seed)
    model = distiller(args, *models).to(student.device)
    if args.recompute:
        check(student.supports_gradient_checkpointing, "--recompute", type(student), "a model that can")
        student.activation_checkpointing_enable()
    # 2. rows
    prompts_of(student, rows[:args.dev_rows], args)  # a prompt without room is told now
    kept = rows[args.dev_rows:]
    data = pairs(kept, tokenizers, args.max_prompt, args.max_length, model.annotate)
    say(len(data), "rows to train on,", len(kept) - len(data), "are too long")
    check(min(args.batch_size, len(data)) >= processes(), "rows a step",
          f"--batch-size {args.batch_size}, of {len(data)} rows", "one a process, after --dev-rows, limits")
    # 3. identity: a run goes on only with equal rows, tokens, weights and settings
    identity = {name: value for name, value in vars(args).items() if name not in NO_IDENTITY}
    identity["rows"] = fingerprint([rows, data])
    for name, reader, examples in zip(("student weights", "teacher weights"), models, zip(*data)):
        check_readable(reader, [example.ids for example in examples], "--max-length")
        config = reader.config.to_dict() | dict(_name_or_path=None, transformers_version=None)
        settings = config, reader.generation_config.eos_token_id
        identity[name] = fingerprint(settings, reader.state_dict().values())
    return model, data, identity

def train(args, rows, folder, models, distiller=Distiller):
    """Trains in the folder, from its state.pt on; returns the folder of the best checkpoint. rows: `Row`s,
    the first --dev-rows to choose it by; models: the student and, but for sft, the teacher."""
    # 1. what is trained, and from where on
    model, data, identity = set_up(args, rows, models, distiller)
    student, optimizer, best = models[0], optimizer_for(model, args), folder / "best"
    state = open_state(folder, identity)
    if state["optimizer"]:  # neither at the start nor when all steps are done
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    batch_size = min(args.batch_size, len(data))
    steps_per_epoch = len(data) // batch_size
    total_steps = max(1, round(args.epochs * steps_per_epoch))
    micro_batch = min(args.micro_batch, batch_size // processes())  # each process gets one
    say(folder, "- steps:", total_steps, "done:", state["step"], "rows at a time:", micro_batch,
        "the student's parameters:", student.num_parameters(only_trainable=True))
    # both are for people: state.pt has what they say
    write_json(folder / "log.jsonl", *state["log"], indent=None)
    write_json(folder / "args.json", dict(identity=identity, command=sys.argv, args=vars(args)))

    # 2. the teacher reads each row once; from then on only its embeddings and head are needed
    if model.teacher and state["step"] < total_steps:
        data = read_once(models.pop(), data, folder, student.device)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True) if processes() > 1 else model

    # 3. steps
    shares, last, since = Counter(), state["step"], time.perf_counter()  # since the last line of the log
    for step in bar(range(last + 1, total_steps + 1), folder.name):
        model.train()
        model.progress = (step - 1) / total_steps
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * model.progress)) / 2
            group["lr"] = 1e-7 + (group["peak"] - 1e-7) * cosine
        micro_batches = step_rows(data, batch_size, micro_batch, args.seed, step)
        shares.update(gradient(parallel, micro_batches, step, args, student.device))
        if processes() > 1:  # if one is missing, DistributedDataParallel leaves others unexchanged
            idle = [name for name, x in model.named_parameters() if x.requires_grad and x.grad is None]
            check(not idle, f"step {step}, in several processes", idle, "a gradient of every parameter")
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # DistributedDataParallel's buckets hold them

        # means since the last line; if one of them is not finite, the run ends and saves nothing
        epoch_ends = step % steps_per_epoch == 0 or step == total_steps
        saves = epoch_ends or step % args.save_every == 0
        if not saves and step % LOG_EVERY > 0:
            continue
        sums = np.sum(gather(torch.stack([*shares.values()]).tolist()), 0)
        means = (sums / (step - last)).tolist()
        line = dict(zip(shares, means), step=step, grad_norm=norm.item(), lr=optimizer.param_groups[0]["lr"])
        broken = [name for name, value in line.items() if not math.isfinite(value)]
        check(not broken, f"step {step}", broken, "finite numbers; what was saved last is whole")
        line["tokens_per_s"] = line["tokens"] * (step - last) / (time.perf_counter() - since)
        if student.device.type == "cuda":
            line["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9

        # keep the student with the best ROUGE-L on the dev rows, the later of equals
        if epoch_ends:
            seeds = range(args.seed, args.seed + args.dev_samplings)
            scores = [respond(student, rows[:args.dev_rows], seed, args)[1] for seed in seeds]
            score = line["dev_rougeL"] = np.mean(scores).item()
            if score >= state["best_score"] or not best.exists():
                state["best_score"] = score
                replace(best, save_best, model)

        # tell, and save what the next step depends on; after the last one, no optimiser
        say(*[f"{name} {value:.4g}" for name, value in line.items()])
        state["log"].append(line)
        write_json(folder / "log.jsonl", *state["log"], indent=None)
        if saves:
            moments = optimizer.state_dict() if step < total_steps else None
            state |= dict(step=step, model=model.state_dict(), optimizer=moments)
            replace(folder / "state.pt", torch.save, state)
        shares, last, since = Counter(), step, time.perf_counter()
    gather()  # the first process may still be writing
    return best

# 9. Evaluation: sampling, ROUGE-L ===========================================================================
def rouge_l(predictions, references):
    """Each row's ROUGE-L F1 with Porter's stemmer, in percent, of the best of its references."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return [100 * scorer.score_multi(texts, prediction)["rougeL"].fmeasure
            for prediction, texts in zip(predictions, references, strict=True)]

def prompts_of(model, rows, args):  # as ids; InputError: no room for prompt and response
    # NOT IN PAPER: a long prompt keeps its end (departure 7)
    prompts = [prompt_ids(model.tokenizer, row.prompt, args.max_prompt) for row in rows]
    check_readable(model, prompts, "--max-prompt or --max-new-tokens", args.max_new_tokens)
    return prompts

@torch.no_grad()
def respond(model, rows, seed, args):
    """A response to each row, and its ROUGE-L. Batches and seeds are the same for any number of processes."""
    model.eval()
    prompts, end, found = prompts_of(model, rows, args), model.tokenizer.eos_token_id, []
    for batch in bar(batches(prompts, args.eval_batch)[rank()::processes()], "responses"):
        asked = padded([prompts[row] for row in batch], model.device, -1, "left")
        seed_torch(seed, batch[0])
        with autocast(model.device):  # the rest is in the generation_config, see `decoding`
            whole = model.generate(asked.where(asked >= 0, end), attention_mask=(asked >= 0).long(),
                                   max_new_tokens=args.max_new_tokens)
        new = whole[:, asked.shape[1]:]
        for stop in model.generation_config.eos_token_id:  # which is no text
            new = new.where(new != stop, end)
        texts = model.tokenizer.batch_decode(new, skip_special_tokens=True)
        found += zip(batch, texts, rouge_l(texts, [rows[row].references for row in batch]))
    _, texts, scores = zip(*sorted(sum(gather(found), [])))  # in the order of rows
    say("for example:", rows[0].prompt[-300:], texts[0])
    return texts, scores

def evaluate(args, source, model, tests, folder):
    """Samples and scores each test set once a seed; writes predictions/ and eval.json into the folder."""
    seeds = args.eval_seeds if args.eval_temperature else args.eval_seeds[:1]  # else all are alike
    model.generation_config = decoding(model.generation_config.eos_token_id, model.tokenizer.eos_token_id,
                                       args.eval_temperature, args.no_repeat_ngram)
    (folder / "eval.json").unlink(missing_ok=True)  # it is of the old predictions
    shutil.rmtree(folder / "predictions", ignore_errors=True)
    means = {}  # of each set, one a seed
    for name, rows in tests.items():
        for seed in dict.fromkeys(seeds):  # each once
            texts, scores = respond(model, rows, seed, args)
            means.setdefault(name, []).append(np.mean(scores).item())
            predictions = dict(rows=rows, texts=texts, rougeL=scores)
            write_json(folder / f"predictions/{name}-{seed}.json", predictions)
    sets = list(means.values())
    if len(sets) > 1:
        means["OOD"] = np.mean(sets[1:], 0).tolist()
    means["All"] = np.mean(sets, 0).tolist()
    result = dict(model=str(source), args=vars(args), rougeL=means)
    write_json(folder / "eval.json", result)
    say(source, "- ROUGE-L, mean and standard deviation over sampling seeds:")
    for name, values in means.items():
        spread = np.std(values, ddof=int(len(values) > 1))
        say("  %-12s %6.2f ± %.2f" % (name, np.mean(values), spread))
    return result

# 10. Command line: the defaults are the paper's setting =====================================================
TEST_SETS = ["Dolly=MiniLLM/dolly/valid.jsonl", "SelfInst=MiniLLM/self-inst/valid.jsonl",
             "Vicuna=MiniLLM/Vicuna/valid.jsonl", "S-NI=MiniLLM/sinst/11_/valid.jsonl",
             "UnNI=MiniLLM/uinst/11_/valid.jsonl"]
MAY_BE_ZERO = "skew weights kq_weight clip seed eval_seeds eval_temperature no_repeat_ngram".split()

def build_parser(methods=("cma", "sft")):
    """The command line as an argparse parser. methods: the choices of --method, the default first."""
    parser = argparse.ArgumentParser(
        description="See the file's header. Training that was stopped goes on by the same command.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("what to run").add_argument
    add("--method", choices=methods, default=methods[0], help="how to train; sft: without a teacher")
    add("--ga", action="store_true", help="add the adversary on keys and queries, eq. (14)")
    add("--div", choices=DIVERGENCES, default="skl", help="f of KD^{t->s}; skl suits --ga, srkl no --ga")
    add("--eval-only", metavar="MODEL", help="evaluate this folder or hub id, train nothing; with --name")
    add("--out", default="runs", help="folder of all runs; those in it share a fine-tuned teacher")
    add("--name", help="a run is in NAME-SEED, by default METHOD[-ga]-DIV or sft; an evaluation in NAME")
    add = parser.add_argument_group("models and data: folders or hub ids").add_argument
    add("--student", default="openai-community/gpt2", help="the model to train")
    add("--teacher", default="Qwen/Qwen1.5-1.8B", help="to learn from; its states take 3.6 GB a node")
    add("--teacher-ready", action="store_true", help="take it as it is; its fine-tuning needs 38 GB of GPU")
    add("--teacher-epochs", type=float, default=10, help="length of its fine-tuning; fewer for many rows")
    add("--teacher-lr", type=float, default=2e-5, help="learning rate of that; higher for a small teacher")
    add("--data", default="MiniLLM/dolly", help="where raw.jsonl is: rows of instruction, input, output")
    add("--dev-rows", type=int, default=1000, help="first rows of --data, held out to choose the checkpoint")
    add("--max-prompt", type=int, default=256, help="training drops longer prompts, evaluation cuts them")
    add("--max-length", type=int, default=512, help="tokens of prompt and response; fewer if memory is short")
    add = parser.add_argument_group("objective").add_argument
    add("--weights", type=float, nargs=4, default=4 * [0.5], help="of CE, CE_T2S, KD_T2S, KD_S2T in (9)")
    add("--temperature", type=float, default=2.0, help="tau, on both sides of the divergences")
    add("--skew", type=float, default=0.1, help="a of skl and srkl, below 1; higher if training is unstable")
    add("--kq-weight", type=float, default=1.0, help="factor of L_KQ in eq. (16)")
    add("--all-positions", action="store_true", help="KD^{t->s} at every position, as in eq. (8)")
    add("--s2t-div", choices=DIVERGENCES, default="kl", help="f of KD^{s->t}; in eq. (8) the same as --div")
    add = parser.add_argument_group("optimisation: AdamW with a cosine to 1e-7").add_argument
    add("--epochs", type=float, default=20, help="length of training, a fraction allowed")
    add("--batch-size", type=int, default=32, help="rows a step, over all processes; at most all rows")
    add("--micro-batch", type=int, default=4, help="rows at a time, at most; fewer if memory is short")
    add("--recompute", action="store_true", help="activations are computed twice; if memory is still short")
    add("--lr", type=float, default=5e-4, help="the student's peak rate; lower for a larger one")
    add("--lr-projectors", type=float, default=1e-3, help="peak rate of projectors and discriminator")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    add("--seed", type=int, default=10, help="of initialisation, row order, dropout, dev sampling")
    add("--save-every", type=int, default=500, help="steps between saves, besides one an epoch")
    add = parser.add_argument_group("evaluation by sampling").add_argument
    add("--dev-samplings", type=int, default=3, help="of dev rows; their mean chooses `best`; 1 is faster")
    add("--tests", metavar="NAME=FILE", nargs="+", default=TEST_SETS, help="OOD: mean of all but the first")
    add("--eval-seeds", type=int, nargs="+", default=[10, 20, 30, 40, 50], help="one sampling each")
    add("--eval-temperature", type=float, default=1.0, help="of test sets; 0: the likeliest tokens, one seed")
    add("--eval-limit", type=int, default=10000, help="first rows of each test set; fewer for a quick look")
    add("--eval-batch", type=int, default=64, help="rows sampled at a time; fewer if memory is short")
    add("--max-new-tokens", type=int, default=256, help="longest response; fewer for short answers")
    add("--no-repeat-ngram", type=int, default=6, help="n-grams that no test row has twice; 0: no rule")
    return parser

def check_settings(args):  # what argparse lets through
    for name, value in vars(args).items():
        for number in np.ravel(value).tolist():  # of a list, each
            if type(number) in (int, float):  # no text, no switch
                usable = 1e-30 < number < 1e15 or number == 0 and name in MAY_BE_ZERO
                check(usable, "--" + name.replace("_", "-"), number, "0, if sensible, or over 0 to 1e15")
    check(args.skew < 1, "--skew", args.skew, "0 to below 1")
    check(any(args.weights), "--weights", args.weights, "one that is not 0")
    check(args.no_repeat_ngram != 1, "--no-repeat-ngram", 1, "0, or 2 or more: padding would count")
    usable = re.fullmatch(r"\w[^/]*", args.name or "x") and (args.name or not args.eval_only)
    check(usable, "--name", args.name, "a folder's name, without a path; --eval-only needs one")

def experiment(args, device, distiller):
    """Fine-tunes the teacher if need be, trains, evaluates the best; returns what eval.json holds."""
    # 1. models, and rows without their end marks
    out, tests = Path(args.out), {}
    taught = args.method != "sft" and not args.eval_only
    for item in args.tests:
        name, _, source = item.partition("=")
        usable = source and "/" not in name and name not in ("", "OOD", "All", *tests)
        check(usable, "--tests", item, "NAME=FILE; names differ, have no / and are not OOD or All")
        tests[name] = fetch(source)
    source = None if args.eval_only else fetch(f"{args.data}/raw.jsonl")
    models = [load_model(args.eval_only or args.student, device)]
    if taught:
        models.append(load_model(args.teacher, device, args.teacher_ready))
    marks = sum(map(stop_marks, models), ())
    for name, path in tests.items():
        tests[name] = read_rows(path, args.eval_limit, marks)
        prompts_of(models[0], tests[name], args)  # a prompt without room is told now

    # 2. a checkpoint
    if args.eval_only:
        folder = out / args.name
        with lock(folder):
            check_free(folder, "state.pt", "best", "eval.json")
            return evaluate(args, args.eval_only, models[0], tests, folder)

    # 3. the teacher, one for all runs in --out: what concerns the student alone is set to its default
    rows = read_rows(source, marks=marks)
    if taught and not args.teacher_ready:
        set_up(args, rows, models, distiller)  # raises what the student's training would, but now
        also_its = *NO_IDENTITY, "dev_rows", "max_prompt", "max_length", "max_new_tokens"
        settings = {name: getattr(args, name) for name in also_its}
        settings |= dict(method="sft", epochs=args.teacher_epochs, lr=args.teacher_lr)
        settings = build_parser().parse_args([], argparse.Namespace(**settings))
        teacher_rows = [row._replace(prompt=row.teacher_prompt or row.prompt) for row in rows]
        folder = out / f"{Path(args.teacher).resolve().name}-tuned"
        with lock(folder):
            args.teacher = str(train(settings, teacher_rows, folder, models[1:]))
        models[1] = load_model(args.teacher, device, frozen=True)

    # 4. the student
    name = args.method + "-ga" * args.ga + f"-{args.div}" * taught
    folder = out / f"{args.name or name}-{args.seed}"
    with lock(folder):
        best = train(args, rows, folder, models, distiller)
        return evaluate(args, best, load_model(best, device), tests, folder)

def main(argv=None, parser=None, distiller=Distiller):
    """Runs a command line; returns what eval.json holds. parser, distiller: those of another method."""
    args = (parser or build_parser()).parse_args(argv)
    logging.disable_progress_bar()  # transformers' own; and its warnings: what matters is refused
    logging.set_verbosity_error()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # not every terminal knows them all
    try:
        check_settings(args)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if "RANK" in os.environ:
            with told("RANK is set, but not as torchrun sets it"):
                dist.init_process_group(timeout=datetime.timedelta(hours=12))  # the first may save for long
        result = experiment(args, device, distiller)
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        print(f"dskd_ga.py: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(2)  # at once: the other processes may be waiting for this one
        sys.exit(2)
    if dist.is_initialized():
        gather()  # no process leaves while another still needs it
        dist.destroy_process_group()
    return result

if __name__ == "__main__":
    main()
