#!/usr/bin/env python3
"""DSKD-CMA-GA: distil a large language model into a small one that has another tokenizer.

Reference implementation of "Dual-Space Knowledge Distillation with Key-Query Matching for Large Language Models
with Vocabulary Mismatch" (Tsiapali, Do, Knill; ICASSP 2026; arXiv:2603.22056 v1), in one file: data, models,
objective, training on any number of processes, evaluation. Needs torch, transformers, rouge-score, numpy.

    python dskd_ga.py --demo                                      # 2 CPU cores, minutes, no download
    python dskd_ga.py --div skl --ga                              # one GPU, the paper's setting
    torchrun --nproc_per_node=4 dskd_ga.py --div skl --ga         # the same run on four

Contents: 1 arguments, 2 data, 3 models, 4 divergences, 5 alignment, 6 key-query matching, 7 objective,
8 training, 9 evaluation, 11 demo, 12 main. `grep '^# [0-9]' dskd_ga.py` gives the lines.

Departures from the paper's equations and settings (each marked "NOT IN PAPER" where it happens)
  1. KD^{t->s} counts only positions where argmax q^{t->s} is the gold token, as the authors' code does;
     --all-positions gives eq. (8) to the letter.
  2. KD^{s->t} is forward KL whatever --div is, as the authors' code does; --s2t-div changes it.
  3. N_std is taken over each sequence's own real positions, so that a loss depends on neither padding nor batch.
  4. Chunks are built on target tokens, which are what the positions predict.
  5. D is trained, as eq. (14) says (the authors' code leaves it at its random start), by the projectors' optimiser
     group; L_KQ is a mean over the real positions of the optimiser step, not divided again.
  6. The rows of a global batch are sorted by length before they are cut into micro-batches, and the last,
     incomplete batch of an epoch is left out.
  7. Prompts get the special tokens that their tokenizer puts in front (none for GPT-2 and Qwen); at evaluation,
     a prompt over the limit keeps its end.

Glossary (B sequences; S, T student and teacher response positions; V_s, V_t vocabularies)
  paper           code             shape               equation
  e^s, e^t        e_s_*, e_t_*     (B, S|T, d_s|d_t)   (1), (2): embeddings of the tokens read and predicted
  h^s, h^t        h_s, h_t         (B, S|T, d_s|d_t)   last hidden states, after the final norm
  Q, K            q, k             (B, S|T, 2 d_t)     (1), (2)
  P_Q             proj.query       2 d_s -> 2 d_t      (1)
  P^{s->t}        proj.s2t         d_s -> d_t          (4)
  P^{t->s}        proj.t2s         d_t -> d_s          (5)
  A^{t->s}        a_t2s            (B, S, T)           (3)
  A^{s->t}        a_s2t            (B, T, S)           (3)
  V               v_t2s, v_s2t     (B, T|S, d_s|d_t)   (5), (4)
  h^{t->s}        h_t2s            (B, S, d_s)         (6)
  h^{s->t}        h_s2t            (B, T, d_t)         (6)
  W^s, W^t        W_s, W_t         (V_s|V_t, d_s|d_t)  (7): prediction heads
  M^{t->s}        chunks           (B, S, T)           (11)
  D               Discriminator    2 d_t -> logit      (14)
"""
import argparse
import contextlib
import json
import math
import os
import pathlib
import platform
import random
import re
import resource
import shlex
import shutil
import statistics
import string
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from rouge_score import rouge_scorer
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

# ======================================================================================================
# 1. Arguments: the defaults are the paper's setting
# ======================================================================================================
TEST_SETS = ("Dolly=MiniLLM/dolly/valid.jsonl", "SelfInst=MiniLLM/self-inst/valid.jsonl",
             "Vicuna=MiniLLM/Vicuna/valid.jsonl", "S-NI=MiniLLM/sinst/11_/valid.jsonl",
             "UnNI=MiniLLM/uinst/11_/valid.jsonl")
# Settings that may differ between a run and its continuation; all others are the run's identity.
NOT_IDENTITY = {"out", "name", "teacher_ready", "tests", "eval_seeds", "eval_batch", "no_repeat_ngram", "eval_only", "eval_limit",
                "log_every", "save_every", "demo"}
DISTILLATION = {"teacher", "div", "ga", "ga_weight", "temperature", "skew", "all_positions", "s2t_div", "lr_projectors"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines and shows every default."""


def build_parser():
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="dskd_ga.py", formatter_class=HelpFormatter, description=__doc__.split("\n\nContents")[0],
        epilog="A sequence of text is MiniLLM's JSON lines: instruction, input, output (a string, or a list of\n"
               "references), and optionally prompt. Everything is written below --out; a command that was stopped\n"
               "goes on from its last save when it is given again.")
    yes_no = argparse.BooleanOptionalAction

    g = parser.add_argument_group("what to run")
    g.add_argument("--method", choices=("cma", "clp", "cla", "sft"), default="cma",
                   help="cma: cross-model attention, eq. (3); clp, cla: chunk alignment, eqs. (12), (13); "
                        "sft: no teacher, the baseline")
    g.add_argument("--ga", action=yes_no, default=False, help="add the generative adversary on keys and queries, eq. (14)")
    g.add_argument("--div", choices=DIVERGENCES, default="skl",
                   help="f of eq. (8) in KD^{t->s}. The paper's best: skl with --ga, srkl without")
    g.add_argument("--demo", action=yes_no, default=False,
                   help="write a small task set, tokenizers and models, and run everything on them (all other "
                        "settings but --out and --seed are the demo's own)")
    g.add_argument("--eval-only", metavar="MODEL", default=None,
                   help="evaluate this folder or hub id on the test sets and train nothing")
    g.add_argument("--out", metavar="FOLDER", default="runs", help="parent of all output; runs share a teacher in it")
    g.add_argument("--name", default=None, help="this run's folder below --out; made from the settings when not given")

    g = parser.add_argument_group("models (folders or hub ids of causal language models)")
    g.add_argument("--student", default="openai-community/gpt2", help="the model to train")
    g.add_argument("--teacher", default="Qwen/Qwen1.5-1.8B", help="the model to learn from")
    g.add_argument("--teacher-ready", action=yes_no, default=False,
                   help="the teacher knows the task: do not fine-tune it on --data first")
    g.add_argument("--teacher-epochs", type=float, default=10, help="length of the teacher's own fine-tuning")
    g.add_argument("--teacher-lr", type=float, default=2e-5, help="its learning rate")

    g = parser.add_argument_group("data")
    g.add_argument("--data", metavar="FOLDER_OR_ID", default="MiniLLM/dolly",
                   help="folder or hub dataset with raw.jsonl, for training and development")
    g.add_argument("--dev-rows", type=int, default=1000,
                   help="the first rows of raw.jsonl, kept for choosing the checkpoint; fewer when generation is slow")
    g.add_argument("--max-prompt", type=int, default=256,
                   help="longest prompt in the student's tokens; training drops rows over it")
    g.add_argument("--max-length", type=int, default=512,
                   help="longest prompt and response in either model's tokens; longer responses are cut")

    g = parser.add_argument_group("objective")
    g.add_argument("--temperature", type=float, default=2.0, help="tau of both distributions in the divergences")
    g.add_argument("--skew", type=float, default=0.1, help="a of skl and srkl")
    g.add_argument("--ga-weight", type=float, default=1.0, help="factor of L_KQ in eq. (16)")
    g.add_argument("--all-positions", action=yes_no, default=False,
                   help="KD^{t->s} on every position, eq. (8) to the letter, not only where argmax q^{t->s} is right")
    g.add_argument("--s2t-div", choices=DIVERGENCES, default="kl", help="f of KD^{s->t}; --div's for eq. (8) to the letter")

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=float, default=20, help="length of training; a fraction is allowed")
    g.add_argument("--batch-size", type=int, default=32, help="sequences an optimiser step, over all processes")
    g.add_argument("--micro-batch", type=int, default=4,
                   help="sequences at a time in one process; changes memory and speed, not the result")
    g.add_argument("--lr", type=float, default=5e-4, help="the student's peak learning rate; 2e-5 or so above 1B")
    g.add_argument("--lr-projectors", type=float, default=1e-3, help="the projectors' and the discriminator's")
    g.add_argument("--weight-decay", type=float, default=1e-2, help="AdamW's; none on biases and norms")
    g.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    g.add_argument("--dropout", type=float, default=None,
                   help="every dropout rate of student and discriminator; None keeps the student's own and 0.1")
    g.add_argument("--seed", type=int, default=10, help="fixes initialisation, order of rows, dropout and dev sampling")

    g = parser.add_argument_group("evaluation")
    g.add_argument("--tests", metavar="NAME=FILE", nargs="+", default=list(TEST_SETS),
                   help="test sets: local JSON-lines files, or ORG/DATASET/FILE on the hub. The first is the training "
                        "distribution, the others make the OOD average")
    g.add_argument("--eval-seeds", type=int, nargs="+", default=[10, 20, 30, 40, 50], help="one sampling each")
    g.add_argument("--eval-limit", type=int, default=None, help="only the first rows of each test set")
    g.add_argument("--eval-batch", type=int, default=64,
                   help="prompts at a time; fewer when memory is short (sampling depends on it)")
    g.add_argument("--max-new-tokens", type=int, default=256, help="longest generated response")
    g.add_argument("--no-repeat-ngram", type=int, default=6, help="no n-gram twice on the test sets; 0 allows it")

    g = parser.add_argument_group("bookkeeping")
    g.add_argument("--log-every", type=int, default=10,
                   help="steps between transfers of the log's numbers from the device (every step has its line)")
    g.add_argument("--save-every", type=int, default=500, help="steps between saves; every epoch saves too")
    return parser


# ======================================================================================================
# 2. Data: text row -> token ids and character spans -> padded batch
# ======================================================================================================
class Row(NamedTuple):
    """One instruction: the full prompt, and its responses (training uses the first)."""
    prompt: str
    references: list


class Example(NamedTuple):
    """A row as one model reads it."""
    ids: list    # prompt, response, end of text; cut at the length limit
    start: int   # index of the first response token
    spans: list  # (start, end) characters of each response token in the response; end of text is (-1, -1)


class Side(NamedTuple):
    """A padded batch for one model; n response positions."""
    ids: torch.Tensor      # (B, L) what the trunk reads
    pos: torch.Tensor      # (B, n) where in it the response positions are: they predict the response's tokens
    mask: torch.Tensor     # (B, n) bool, True on real positions
    inputs: torch.Tensor   # (B, n) token read there
    targets: torch.Tensor  # (B, n) token predicted there


def fetch(source):
    """Path of a data file: a local file, or ORG/DATASET/FILE downloaded from the hub."""
    if pathlib.Path(source).is_file():
        return source
    parts = source.split("/", 2)
    if len(parts) < 3 or pathlib.Path(source).parent.is_dir():
        raise ValueError(f"{source}: found no such file, expected a local file or ORG/DATASET/FILE on the hub")
    from huggingface_hub import hf_hub_download
    return hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset")


def read_rows(path, limit=None):
    """MiniLLM's JSON lines as a list of `Row`.

    A row without `prompt` gets the Alpaca template around `instruction` and `input`.

    Raises:
        ValueError: a line that is not an object, or a field that is missing or of the wrong kind; no row at all.
    """
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(rows) >= limit:
                break

            def fail(field, found, expected):
                raise ValueError(f"{path}, line {number}, {field}: found {found}, expected {expected}")

            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                fail("JSON", error, "one JSON object a line")
            if not isinstance(row, dict):
                fail("JSON", type(row).__name__, "an object")
            fields = ("prompt",) if "prompt" in row else ("instruction", "input") if row.get("input") else ("instruction",)
            for field in fields:
                if not isinstance(row.get(field), str) or not row[field]:
                    fail(field, repr(row.get(field)), "a text that is not empty")
            references = row.get("output") if isinstance(row.get("output"), list) else [row.get("output")]
            if not references or not all(isinstance(text, str) for text in references):
                fail("output", repr(row.get("output")), "a text or a list of texts")
            prompt = row["prompt"] if "prompt" in row else alpaca_prompt(row["instruction"], row.get("input"))
            rows.append(Row(prompt, references))
    if not rows:
        raise ValueError(f"{path}: found no row, expected one JSON object a line")
    return rows


def alpaca_prompt(instruction, context=None):
    """The Alpaca template, with or without a further context."""
    paired = ", paired with an input that provides further context" if context else ""
    middle = f"### Input:\n{context}\n\n" if context else ""
    return (f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes "
            f"the request.\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n")


def leading_special_tokens(tokenizer):
    """The ids that the tokenizer puts in front of a text: [BOS] for Gemma or Llama, [] for GPT-2 and Qwen."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    return encoded["input_ids"][:encoded["special_tokens_mask"].index(0)]


def encode(tokenizer, rows, max_length):
    """Each row as an `Example`; prompt and response are tokenised apart."""
    def call(texts, **options):
        return tokenizer(texts, add_special_tokens=False, verbose=False, **options)

    lead = leading_special_tokens(tokenizer)
    prompts = call([row.prompt for row in rows])["input_ids"]
    responses = call([row.references[0] for row in rows], return_offsets_mapping=True)
    examples = []
    for prompt, ids, spans in zip(prompts, responses["input_ids"], responses["offset_mapping"]):
        start = len(lead) + len(prompt)
        ids = (lead + prompt + ids + [tokenizer.eos_token_id])[:max_length]
        examples.append(Example(ids, start, [*spans, (-1, -1)][:max(0, len(ids) - start)]))
    return examples


def load_training_data(rows, tokenizers, max_prompt, max_length):
    """Examples of the rows that can be trained on, one list a tokenizer (the student's first), and the number dropped.

    Dropped are rows whose prompt is over the limit in the student's tokens, or leaves no room for a response.
    """
    sides = [encode(tokenizer, rows, max_length) for tokenizer in tokenizers]
    keep = [i for i in range(len(rows)) if sides[0][i].start <= max_prompt and all(side[i].spans for side in sides)]
    return [[side[i] for i in keep] for side in sides], len(rows) - len(keep)


def plan_epoch(lengths, batch_size, micro_batch, seed, epoch):
    """The epoch's optimiser steps, each a list of micro-batches of row indices; fixed by seed and epoch.

    Which rows share a step is random; within it, rows of like length share a micro-batch, so that little is padded.
    """
    # NOT IN PAPER: sorted micro-batches, no incomplete last batch (departure 6)
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths))
    steps = order[:len(order) // batch_size * batch_size].reshape(-1, batch_size)
    return [np.array(sorted(rows, key=lambda i: lengths[i])).reshape(-1, micro_batch).tolist() for rows in steps]


def collate(examples, pad, device):
    """A right-padded `Side`, as long as its longest row, on the device."""
    ids = torch.full((len(examples), max(len(e.ids) for e in examples)), pad)
    for row, example in zip(ids, examples):
        row[:len(example.ids)] = torch.tensor(example.ids)
    starts = torch.tensor([[e.start] for e in examples])
    counts = torch.tensor([[len(e.ids) - e.start] for e in examples])
    index = torch.arange(int(counts.max()))[None, :]
    mask = index < counts
    pos = (starts - 1 + index) * mask
    side = Side(ids[:, :-1], pos, mask, ids.gather(1, pos), ids.gather(1, pos + 1))
    if device.type == "cuda":
        return Side(*(x.pin_memory().to(device, non_blocking=True) for x in side))
    return side


def collate_chunks(students, teachers, device):
    """M^{t->s} of a batch, (B, S, T) bool, from the examples of both sides."""
    chunks = torch.zeros(len(students), max(len(e.spans) for e in students), max(len(e.spans) for e in teachers), dtype=torch.bool)
    for row, s, t in zip(chunks, students, teachers):
        row[:len(s.spans), :len(t.spans)] = chunk_alignment(s.spans, t.spans)
    return chunks.to(device)


# ======================================================================================================
# 3. Models: trunk, head and embeddings of any causal language model
# ======================================================================================================
def load_tokenizer(source):
    """A fast tokenizer with an end-of-text token.

    Raises:
        ValueError: no character offsets (a slow tokenizer), or no end-of-text token.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    if not tokenizer.is_fast:
        raise ValueError(f"{source}: found a tokenizer without character offsets, expected a fast one (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{source}: found no end-of-text token, expected eos_token in tokenizer_config.json")
    return tokenizer


def load_model(source, tokenizer, device, dtype=torch.float32, dropout=None):
    """A causal language model on the device, in evaluation mode, without sampling defaults of its own.

    Args:
        dropout: sets every dropout rate of the configuration; None keeps them.
    Raises:
        ValueError: no head, or fewer embeddings than the tokenizer has tokens.
    """
    config = AutoConfig.from_pretrained(source)
    for key, value in config.to_dict().items():
        if dropout is not None and "drop" in key and isinstance(value, float):
            setattr(config, key, dropout)
    model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype).to(device).eval()
    size = model.get_input_embeddings().weight.shape[0]
    if size < len(tokenizer):
        raise ValueError(f"{source}: found {size} embeddings, expected one for each of the tokenizer's {len(tokenizer)} tokens")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{source}: found no prediction head, expected a causal language model")
    check_head(model, source)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    return model


def head_of(model):
    """The model's prediction head, sharing its parameters."""
    module = model.get_output_embeddings()
    return Head(module.weight, module.bias, getattr(model.config, "final_logit_softcapping", None))


@torch.no_grad()
def check_head(model, source):
    """Raises a ValueError if the model's own logits are not what trunk and `Head` give."""
    ids = torch.arange(3, device=model.device)[None]
    own = model(input_ids=ids, use_cache=False).logits
    head = head_of(model)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    gap = (head.cap(F.linear(hidden, head.weight, head.bias)) - own).abs().max().item()
    if not gap <= 1e-2 * max(1.0, own.abs().max().item()):
        raise ValueError(f"{source}: found logits of {type(model).__name__} that differ by {gap:.3g} from trunk and head "
                         "alone, expected a head that is linear with at most final_logit_softcapping")


def response_hidden(model, side):
    """h: the last hidden states, after the final norm, at the response positions, (B, n, d)."""
    # Right padding and causal attention: no real position sees padding, so no mask is needed (and sdpa is faster).
    hidden = model.get_decoder()(input_ids=side.ids, use_cache=False).last_hidden_state
    return hidden.gather(1, side.pos[..., None].expand(-1, -1, hidden.shape[-1]))


# ======================================================================================================
# 4. Divergences f(p || q): p is the teacher's distribution, q the student's
# ======================================================================================================
DIVERGENCES = ("kl", "rkl", "jsd", "skl", "srkl", "akl")


def full_precision(x):
    """float32 at least: half-precision inputs are raised, float64 (the tests' oracle) stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def divergence(name, student_logits, teacher_logits, temperature=2.0, skew=0.1, head_mass=0.5):
    """f of eq. (8), one value per position, in float32 (float64 for float64 logits).

    Args:
        name: kl | rkl | jsd | skl | srkl (DistiLLM) | akl (Wu et al. 2025).
        student_logits, teacher_logits: (..., V). Entries of -inf count as probability 0.
        temperature: tau, divides both sides; no tau² factor.
        skew: a of skl and srkl.  head_mass: share of p that akl calls the head.
    Raises:
        ValueError: unknown name, or logits of different shapes.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"divergence: found {name!r}, expected one of {', '.join(DIVERGENCES)}")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"divergence: student logits {tuple(student_logits.shape)} and teacher logits "
                         f"{tuple(teacher_logits.shape)} must have one shape")

    def log_softmax(logits):  # -inf becomes a very small finite number: 0 * (-inf - -inf) would be nan
        return (full_precision(logits).clamp(min=-1e30) / temperature).log_softmax(-1)

    def kl(log_a, log_b):  # KL(a || b) = Σ a (log a - log b)
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    def mix(log_a, log_b, weight):  # log(weight a + (1 - weight) b)
        return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight)) if 0 < weight < 1 else (
            log_a if weight else log_b)

    log_p, log_q = log_softmax(teacher_logits), log_softmax(student_logits)
    if name == "kl":
        return kl(log_p, log_q)
    if name == "rkl":
        return kl(log_q, log_p)
    if name == "jsd":
        log_m = mix(log_p, log_q, 0.5)
        return 0.5 * kl(log_p, log_m) + 0.5 * kl(log_q, log_m)
    if name == "skl":
        return kl(log_p, mix(log_p, log_q, skew))
    if name == "srkl":
        return kl(log_q, mix(log_q, log_p, skew))
    with torch.no_grad():  # akl: the weights of the two directions are constants
        p, order = log_p.exp().sort(-1, descending=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        head = p.cumsum(-1) - p < head_mass  # the smallest prefix with mass >= head_mass
        g_head, g_tail = (gap * head).sum(-1), (gap * ~head).sum(-1)
        share = g_head / (g_head + g_tail).clamp(min=torch.finfo(gap.dtype).tiny)
    return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)


# ======================================================================================================
# 5. Alignment: cross-model attention (CMA), chunks (CLP, CLA)
# ======================================================================================================
def zero_padding(x, mask):
    """x (B, n, d) with whatever lies under padding, nan included, replaced by 0."""
    return x.masked_fill(~mask[..., None], 0)


def std_normalise(x, mask):
    """N_std of eqs. (2) and (5): x / std(x) over each sequence's own real positions and features.

    Args:
        x: (B, n, d).  mask: (B, n) bool, True on real positions.
    Returns:
        (B, n, d), 0 on padding; a sequence whose entries are all equal is left as it is.
    """
    # NOT IN PAPER: per sequence (departure 3), so that neither padding nor the rest of the batch matters.
    x = zero_padding(full_precision(x), mask)
    count = (mask.sum(1) * x.shape[-1]).view(-1, 1, 1)
    mean = x.sum((1, 2), keepdim=True) / count.clamp(min=1)
    variance = zero_padding((x - mean) ** 2, mask).sum((1, 2), keepdim=True) / (count - 1).clamp(min=1)
    return x / torch.where(variance > 0, variance, 1).sqrt()


class Projectors(nn.Module):
    """P_Q of eq. (1), P^{t->s} of eq. (5) and P^{s->t} of eq. (4): single linear layers with bias.

    Args:
        d_s, d_t: hidden widths of the student and of the teacher.
    """

    def __init__(self, d_s, d_t):
        super().__init__()
        self.query = nn.Linear(2 * d_s, 2 * d_t)
        self.t2s = nn.Linear(d_t, d_s)
        self.s2t = nn.Linear(d_s, d_t)


def cross_model_attention(q, k, s_mask, t_mask, chunks=None):
    """A^{t->s} and A^{s->t} of eq. (3), in float32; with `chunks`, CLA's of eq. (13).

    Args:
        q: (B, S, w) queries.  k: (B, T, w) keys.  s_mask: (B, S), t_mask: (B, T) bool, True on real positions.
        chunks: (B, S, T) bool, M^{t->s} of eq. (11): attention stays inside the chunk.
    Returns:
        (B, S, T) and (B, T, S). Rows sum to 1; rows of padding and rows without a chunk are 0.
    """
    allowed = s_mask[:, :, None] & t_mask[:, None, :]
    allowed = allowed if chunks is None else allowed & chunks
    q, k = zero_padding(full_precision(q), s_mask), zero_padding(full_precision(k), t_mask)
    with torch.autocast(q.device.type, enabled=False):  # bf16 has 8 bits for scores that reach the hundreds
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, torch.finfo(q.dtype).min)
    return scores.softmax(-1) * allowed, scores.mT.softmax(-1) * allowed.mT


def chunk_projection(chunks, s_mask, t_mask):
    """CLP, eq. (12): uniform weights within the chunk. Arguments and result as in `cross_model_attention`."""
    m = (chunks & s_mask[:, :, None] & t_mask[:, None, :]).float()
    return m / m.sum(-1, keepdim=True).clamp(min=1), m.mT / m.mT.sum(-1, keepdim=True).clamp(min=1)


def chunk_alignment(s_spans, t_spans):
    """M^{t->s} of eq. (11) for one row: tokens in the same minimal run of text that both sides cut out exactly.

    Args:
        s_spans, t_spans: (start, end) characters of each side's *target* tokens in order, end-of-text (-1, -1).
    Returns:
        bool (n_s, n_t). Tokens after the last common cut (one side was truncated) are in no chunk.
    """
    def cuts(spans):  # a token that ends inside a character (the next one starts before its end) is no cut
        text = [span for span in spans if span != (-1, -1)]
        return {end for (_, end), after in zip(text, text[1:] + [(math.inf, 0)]) if after[0] >= end}

    common = torch.tensor(sorted(cuts(list(map(tuple, s_spans))) & cuts(list(map(tuple, t_spans)))))

    def chunk_ids(spans, nowhere):
        ends = torch.tensor([end for _, end in spans])
        ids = torch.searchsorted(common, ends)  # tokens of one chunk have the same number of cuts before them
        ids = torch.where(ids < len(common), ids, nowhere)
        return torch.where(ends < 0, len(common), ids)  # end-of-text tokens form a chunk of their own

    return chunk_ids(s_spans, -1)[:, None] == chunk_ids(t_spans, -2)[None, :]


# ======================================================================================================
# 6. Key-query matching: the generative adversary (GA)
# ======================================================================================================
class Discriminator(nn.Module):
    """D of eq. (14): one logit per vector, high for "a query". Highway layer, then a two-layer MLP.

    Args:
        width: 2 d_t, the width of keys and queries.
    """

    def __init__(self, width, hidden=768, dropout=0.1):
        super().__init__()
        self.highway = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, hidden), nn.LeakyReLU(0.1),
                                 nn.Linear(hidden, 1))

    def forward(self, x):  # (..., width) -> (...)
        z = self.highway(x)
        gate = z.sigmoid()
        return self.mlp(gate * z.relu() + (1 - gate) * x).squeeze(-1)


def ga_terms(disc, q, k, s_mask, t_mask):
    """The sums that `ga_loss` divides, and what the log shows of D.

    Returns:
        dict of scalars: `ga_q`, `ga_k` (sums of binary cross-entropies, differentiable), `d_q`, `d_k` (sums of
        D's probability of "a query"), `hit_q`, `hit_k` (how many of each D names rightly).
    """
    # One joint backward pass for max_D and min_{P_Q}: D descends its cross-entropy; q passes through the
    # identity 2 sg(q) - q, whose gradient is -1, so that P_Q ascends it. The keys are constants.
    z_q, z_k = disc((2 * q.detach() - q)[s_mask]).float(), disc(k.detach()[t_mask]).float()
    return dict(ga_q=F.softplus(-z_q).sum(), ga_k=F.softplus(z_k).sum(),  # -log D(q), -log(1 - D(k))
                d_q=z_q.detach().sigmoid().sum(), d_k=z_k.detach().sigmoid().sum(),
                hit_q=(z_q > 0).sum(), hit_k=(z_k <= 0).sum())


def ga_loss(disc, q, k, s_mask, t_mask):
    """Eq. (14) as binary cross-entropy, D(q) -> 1 and D(k) -> 0, each side a mean over its real positions.

    Minimising it trains D; the gradient that reaches q is reversed; k gets none.

    Args:
        disc: a module from (N, w) to (N,) logits.  q: (B, S, w).  k: (B, T, w).  s_mask, t_mask: bool (B, S), (B, T).
    """
    terms = ga_terms(disc, q, k, s_mask, t_mask)
    return terms["ga_q"] / s_mask.sum().clamp(min=1) + terms["ga_k"] / t_mask.sum().clamp(min=1)


# ======================================================================================================
# 7. Objective: the dual-space loss
# ======================================================================================================
class Head(NamedTuple):
    """A prediction head: logits = softcap(h W^T + bias), softcap(z) = c tanh(z / c)."""
    weight: torch.Tensor              # (V, d)
    bias: torch.Tensor | None = None  # (V,)
    softcap: float | None = None      # c; None: no cap

    def cap(self, logits):
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class HeadLosses(torch.autograd.Function):
    """Sums of losses of vocabulary logits, holding the logits of a slice of positions at a time.

    `fn(logits_1, ..., logits_J, *rows)` returns a tuple of scalars, each a sum over the positions given to it;
    logits_j = head_j(h_j). The gradient of each scalar is formed while its logits are there, so no product
    is computed twice; the backward pass only weighs and adds.
    """

    @staticmethod
    def forward(ctx, fn, step, softcaps, rows, *tensors):  # tensors: h_1, W_1, b_1, h_2, W_2, b_2, ...
        sides = [(tensors[i:i + 3], ctx.needs_input_grad[4 + i:7 + i], Head(*tensors[i + 1:i + 3], cap))
                 for i, cap in zip(range(0, len(tensors), 3), softcaps)]
        device = tensors[0].device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else tensors[0].dtype
        weights = [head.weight.to(dtype) for _, _, head in sides]  # cast once, not once a slice
        totals, grads = None, {}                             # grads[loss, tensor]: d loss / d tensor
        with torch.autocast(device, enabled=False):
            for start in range(0, max(len(tensors[0]), 1), step):
                part = slice(start, start + step)
                hidden = [h[part].to(dtype) for (h, _, _), _, _ in sides]
                logits = [full_precision(F.linear(h, w, None if head.bias is None else head.bias.to(dtype)))
                          .requires_grad_(any(needs)) for h, w, (_, needs, head) in zip(hidden, weights, sides)]
                with torch.enable_grad():
                    losses = fn(*(head.cap(z) for z, (_, _, head) in zip(logits, sides)), *(r[part] for r in rows))
                totals = [loss.detach() + (totals[i] if totals else 0) for i, loss in enumerate(losses)]
                for i, loss in enumerate(losses):
                    inputs = [j for j, z in enumerate(logits) if z.requires_grad]
                    if not loss.requires_grad:
                        continue
                    found = torch.autograd.grad(loss, [logits[j] for j in inputs], retain_graph=True, allow_unused=True)
                    for j, dz in zip(inputs, found):
                        if dz is not None:
                            HeadLosses.accumulate(grads, i, j, part, dz.to(dtype), hidden[j], weights[j], *sides[j][:2])
        ctx.grads, ctx.count = grads, len(tensors)
        return tuple(totals)

    @staticmethod
    def accumulate(grads, i, j, part, dz, hidden, weight, tensors, needs):
        """Adds one slice's products to d loss_i / d (h_j, W_j, b_j)."""
        for n, (tensor, need) in enumerate(zip(tensors, needs)):
            if need and (i, 3 * j + n) not in grads:
                grads[i, 3 * j + n] = torch.zeros_like(tensor)
        if needs[0]:
            grads[i, 3 * j][part] = dz @ weight
        if needs[1] and dz.dtype == tensors[1].dtype:
            grads[i, 3 * j + 1].addmm_(dz.mT, hidden)
        elif needs[1]:
            grads[i, 3 * j + 1] += dz.mT @ hidden             # half-precision product, float32 sum
        if needs[2]:
            grads[i, 3 * j + 2] += dz.sum(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        result = [None] * ctx.count
        for (i, n), grad in ctx.grads.items():
            result[n] = upstream[i] * grad if result[n] is None else result[n] + upstream[i] * grad
        return (None, None, None, None, *result)


def head_losses(fn, sides, rows=(), max_logits=2 ** 23):
    """`HeadLosses` on pairs (h (N, d), Head): at most `max_logits` logits of a side exist at a time."""
    step = max(1, max_logits // max(head.weight.shape[0] for _, head in sides))
    tensors = [t for h, head in sides for t in (h, head.weight, head.bias)]
    return HeadLosses.apply(fn, step, [head.softcap for _, head in sides], rows, *tensors)


def dual_space_losses(proj, h_s, h_t, s_in, s_tgt, t_in, t_tgt, s_mask, t_mask, E_s, E_t, W_s, W_t, *,
                      align="cma", chunks=None, div="skl", temperature=2.0, skew=0.1,
                      correct_only=True, s2t_div="kl", max_logits=2 ** 23):
    """Every term of eqs. (1)-(9), as sums over positions.

    Args:
        proj: `Projectors(d_s, d_t)`.
        h_s: (B, S, d_s), h_t: (B, T, d_t) last hidden states at the response positions.
        s_in, s_tgt: (B, S), t_in, t_tgt: (B, T) token ids that the positions read and predict.
        s_mask: (B, S), t_mask: (B, T) bool, True on real positions (right-padded).
        E_s, E_t: input embeddings: a table (V, d), or the model's own module (which may scale its table).
        W_s, W_t: prediction heads: a weight (V, d), or a `Head`.
        align: cma, eqs. (1)-(3) | clp, eq. (12) | cla, eq. (13); the last two need chunks (B, S, T) bool.
        div, temperature, skew: f and its parameters, see `divergence`.
        correct_only: KD^{t->s} counts only positions where argmax q^{t->s} is the gold token.
        s2t_div: f of KD^{s->t}.
        max_logits: how many logits of one side may exist at a time; changes no result.
    Returns:
        dict of sums `ce`, `ce_t2s`, `kd_t2s`, `kd_s2t`; `q` (B, S, 2 d_t), `k` (B, T, 2 d_t), `a_t2s` (B, S, T),
        `a_s2t` (B, T, S); counts `n_s`, `n_t` of real positions and `n_correct` of right argmax q^{t->s}.
    Raises:
        ValueError: unknown `align`, or chunks missing where they are needed.
    """
    if align not in ("cma", "clp", "cla") or (align != "cma" and chunks is None):
        raise ValueError(f"dual_space_losses: align is {align!r} and chunks {'missing' if chunks is None else 'given'}; "
                         "expected cma, or clp or cla with chunks")
    W_s, W_t = (W if isinstance(W, Head) else Head(W) for W in (W_s, W_t))
    W_s_const, W_t_const = (Head(*(t.detach() if torch.is_tensor(t) else t for t in W)) for W in (W_s, W_t))
    h_s, h_t = zero_padding(h_s, s_mask), zero_padding(h_t.detach(), t_mask)
    s_in, s_tgt = s_in.masked_fill(~s_mask, 0), s_tgt.masked_fill(~s_mask, 0)
    t_in, t_tgt = t_in.masked_fill(~t_mask, 0), t_tgt.masked_fill(~t_mask, 0)
    with torch.no_grad():  # embeddings are constants for the distillation terms
        e_s_in, e_s_tgt, e_t_in, e_t_tgt = (
            F.embedding(ids, E) if torch.is_tensor(E) else E(ids)
            for E, ids in ((E_s, s_in), (E_s, s_tgt), (E_t, t_in), (E_t, t_tgt)))
        k = std_normalise(torch.cat([e_t_in, e_t_tgt], -1), t_mask)               # (2)
        v_in = std_normalise(h_t, t_mask) + std_normalise(e_t_tgt, t_mask)
    q = zero_padding(proj.query(torch.cat([e_s_in, e_s_tgt], -1)), s_mask)        # (1)
    if align == "clp":
        a_t2s, a_s2t = chunk_projection(chunks, s_mask, t_mask)                   # (12)
    else:
        a_t2s, a_s2t = cross_model_attention(q, k, s_mask, t_mask, chunks if align == "cla" else None)  # (3), (13)
    v_s2t = proj.s2t(h_s)                                                         # (4)
    v_t2s = proj.t2s(v_in)                                                        # (5)
    h_t2s = a_t2s.to(v_t2s.dtype) @ v_t2s                                         # (6)
    h_s2t = a_s2t.to(v_s2t.dtype) @ v_s2t

    def student_space(z_s, z_t2s, target, aligned):
        teacher = z_t2s.detach()  # constant inside KD^{t->s}: CE^{t->s} alone trains P^{t->s}
        correct = (teacher.argmax(-1) == target) & aligned
        # NOT IN PAPER: correct positions only (departure 1)
        kd = divergence(div, z_s, teacher, temperature, skew) * (correct if correct_only else aligned)  # (7), (8)
        ce_t2s = F.cross_entropy(z_t2s, target, reduction="none") * aligned
        return F.cross_entropy(z_s, target, reduction="sum"), ce_t2s.sum(), kd.sum(), correct.sum()

    def teacher_space(z_s2t, z_t, aligned):
        return ((divergence(s2t_div, z_s2t, z_t, temperature, skew) * aligned).sum(),)  # (7), (8)

    aligned_s, aligned_t = a_t2s.detach().sum(-1) > 0.5, a_s2t.detach().sum(-1) > 0.5  # False: no chunk
    ce, ce_t2s, kd_t2s, n_correct = head_losses(
        student_space, [(h_s[s_mask], W_s), (h_t2s[s_mask], W_s_const)], (s_tgt[s_mask], aligned_s[s_mask]), max_logits)
    (kd_s2t,) = head_losses(
        teacher_space, [(h_s2t[t_mask], W_t_const), (h_t[t_mask], W_t_const)], (aligned_t[t_mask],), max_logits)
    return dict(ce=ce, ce_t2s=ce_t2s, kd_t2s=kd_t2s, kd_s2t=kd_s2t, q=q, k=k, a_t2s=a_t2s, a_s2t=a_s2t,
                n_s=s_mask.sum(), n_t=t_mask.sum(), n_correct=n_correct)


class Distiller(nn.Module):
    """Everything that is trained: the student and, for distillation, projectors and discriminator."""

    def __init__(self, student, teacher, args):
        super().__init__()
        self.student, self.args = student, args
        self.proj = self.disc = None
        if teacher is not None:
            d_s, d_t = (head_of(model).weight.shape[1] for model in (student, teacher))
            self.proj = Projectors(d_s, d_t)
            self.disc = Discriminator(2 * d_t, dropout=0.1 if args.dropout is None else args.dropout) if args.ga else None

    def forward(self, s, t, chunks, h_t, teacher, n_s, n_t):
        """One micro-batch's share of L_train, eq. (16), and its sums for the log.

        Args:
            s, t: the student's and the teacher's `Side` (t None without a teacher).  chunks: (B, S, T) bool or None.
            h_t: (B, T, d_t).  teacher: (embedding module, `Head`).
            n_s, n_t: response tokens of the *whole* optimiser step, over all micro-batches and processes.
        """
        args, W_s = self.args, head_of(self.student)
        h_s = response_hidden(self.student, s)
        if self.proj is None:
            (ce,) = head_losses(lambda z, target: (F.cross_entropy(z, target, reduction="sum"),),
                                [(h_s[s.mask], W_s)], (s.targets[s.mask],))
            return ce / n_s, dict(ce=ce.detach())
        out = dual_space_losses(
            self.proj, h_s, h_t, s.inputs, s.targets, t.inputs, t.targets, s.mask, t.mask,
            self.student.get_input_embeddings(), teacher[0], W_s, teacher[1], align=args.method, chunks=chunks,
            div=args.div, temperature=args.temperature, skew=args.skew, correct_only=not args.all_positions,
            s2t_div=args.s2t_div)
        loss = 0.5 * (out["ce"] + out["kd_s2t"] + out["kd_t2s"] + out["ce_t2s"]) / n_s   # (9)
        sums = {key: out[key].detach() for key in ("ce", "ce_t2s", "kd_t2s", "kd_s2t", "n_correct")}
        if self.disc is not None:
            terms = ga_terms(self.disc, out["q"], out["k"], s.mask, t.mask)
            loss = loss + args.ga_weight * (terms["ga_q"] / n_s + terms["ga_k"] / n_t)   # (16)
            sums |= {key: value.detach() for key, value in terms.items()}
        return loss, sums


# ======================================================================================================
# 8. Training
# ======================================================================================================
def world():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total_over_processes(tensor):
    """The tensor summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def seed_everything(*numbers):
    """Seeds torch from the numbers. Dropout and sampling are seeded by *what* is computed (step and micro-batch, or
    seed and batch), never by what ran before, so that neither a restart nor the number of processes changes them."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def autocast(device):
    """bf16 products on CUDA; float32 on the CPU, where bf16 products are far slower."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def parameter_groups(model, args):
    """AdamW's groups: each trainable parameter is in exactly one; biases and norms are not decayed."""
    groups = {}
    for name, parameter in model.named_parameters():  # a tied weight is listed once
        lr = args.lr if name.startswith("student.") else args.lr_projectors
        decay = args.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    return [dict(params=params, lr=lr, weight_decay=decay) for (lr, decay), params in groups.items()]


def write_atomically(path, write):
    """`write(file)` into a temporary file, flushed to disk and renamed: the old file stays whole until then."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def identity(args):
    """The settings that decide what a training computes."""
    skip = NOT_IDENTITY | (DISTILLATION if args.method == "sft" else set())
    return {key: value for key, value in sorted(vars(args).items()) if key not in skip}


def open_run(folder, args):
    """Creates the run's folder with args.json, or checks that what is there was begun with the same settings.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    path, mine = folder / "args.json", identity(args)
    if path.exists():
        theirs = json.loads(path.read_text())["settings"]
        differing = [f"{key}: found {theirs.get(key)!r}, expected {mine.get(key)!r}"
                     for key in sorted(mine.keys() | theirs.keys()) if theirs.get(key) != mine.get(key)]
        if differing:
            raise ValueError(f"{path}: found a run with other settings ({'; '.join(differing)}); expected the same, or another --name")
    elif world()[0] == 0:
        versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)
        about = dict(command=shlex.join(sys.argv), settings=mine, versions=versions)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(json.dumps(about, indent=1).encode()))


class Log:
    """log.jsonl: one line a step. Sums stay on the device until `flush`, which moves an interval's at once."""

    def __init__(self, folder, first_step, total):
        self.path, self.rank, self.total = folder / "log.jsonl", world()[0], total
        self.steps, self.start = [], time.perf_counter()
        if self.rank == 0:
            kept = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in kept if json.loads(line)["step"] <= first_step]  # later steps are done again
            write_atomically(self.path, lambda file: file.write("".join(f"{line}\n" for line in kept).encode()))
        self.bar = tqdm(total=total, initial=first_step, desc=folder.name, disable=None if self.rank == 0 else True)

    def add(self, host, sums, grad_norm):
        """Host numbers, this process's device sums, and the gradient norm (the same in all processes) of one step."""
        self.steps.append((host, sums, grad_norm))

    def flush(self):
        """Sums over processes, divides once, writes the lines.

        Raises:
            FloatingPointError: a term or the gradient norm is not finite.
        """
        if not self.steps:
            return
        names = list(self.steps[0][1])
        table = torch.stack([torch.stack([sums[n].float() for n in names] + [norm]) for _, sums, norm in self.steps])
        total_over_processes(table[:, :-1])
        seconds = (time.perf_counter() - self.start) / len(self.steps)
        lines = []
        for (host, _, _), values in zip(self.steps, table.tolist()):
            by_name = dict(zip(names, values))
            n_s, n_t = host["tokens"], host.pop("teacher_tokens")
            line = {n: by_name[n] / (n_t if n in ("ga_k", "d_k") else n_s) for n in names if not n.startswith("hit_")}
            if "hit_q" in by_name:
                line["d_accuracy"] = 0.5 * by_name["hit_q"] / n_s + 0.5 * by_name["hit_k"] / n_t
            lines.append(host | line | dict(grad_norm=values[-1], tokens_per_s=n_s / seconds, memory_gb=peak_memory()))
            broken = [name for name, value in lines[-1].items() if not math.isfinite(value)]
            if broken:
                raise FloatingPointError(f"step {host['step']}: {', '.join(broken)} not finite in {lines[-1]}")
        self.write(*lines)
        self.bar.update(len(lines))
        if self.bar.disable and self.rank == 0:
            shown = ("loss", "ce", "ce_t2s", "kd_t2s", "kd_s2t", "d_q", "d_k", "tokens_per_s")
            print(f"{self.path.parent.name}: step {lines[-1]['step']}/{self.total} "
                  + " ".join(f"{n} {lines[-1][n]:.4g}" for n in shown if n in lines[-1]), flush=True)
        self.steps, self.start = [], time.perf_counter()

    def write(self, *lines):
        """Appends the dicts as they are."""
        if self.rank == 0:
            with open(self.path, "a") as file:
                file.write("".join(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()})
                                   + "\n" for line in lines))
        self.start = time.perf_counter()


def peak_memory():
    """Peak memory of this process in GB: the device's on CUDA, resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def train(args, folder, device):
    """Trains args.student (with args.teacher, unless args.method is sft), and keeps the best checkpoint.

    Writes args.json, log.jsonl, best/ and state.pt into the folder; goes on from state.pt if it is there.

    Returns:
        the path of best/.
    Raises:
        ValueError: the folder's run has other settings; sizes that do not divide; too few rows.
    """
    rank, processes = world()
    if args.batch_size % (args.micro_batch * processes):
        raise ValueError(f"--batch-size: found {args.batch_size}, expected a multiple of --micro-batch x processes = "
                         f"{args.micro_batch} x {processes}")
    open_run(folder, args)
    tokenizers = [load_tokenizer(name) for name in ([args.student] if args.method == "sft" else [args.student, args.teacher])]
    rows = read_rows(fetch(f"{args.data}/raw.jsonl"))
    data, dropped = load_training_data(rows[args.dev_rows:], tokenizers, args.max_prompt, args.max_length)
    dev_rows = rows[:args.dev_rows]
    dev = load_training_data(dev_rows, tokenizers[:1], args.max_prompt, args.max_length)[0][0]
    if len(data[0]) < args.batch_size or not dev:
        raise ValueError(f"{args.data}/raw.jsonl: found {len(data[0])} training and {len(dev)} dev rows within the limits, "
                         f"expected at least --batch-size {args.batch_size} and 1")
    lengths = [sum(len(example.ids) for example in pair) for pair in zip(*data)]
    steps_an_epoch = len(data[0]) // args.batch_size
    total = round(args.epochs * steps_an_epoch)

    seed_everything(args.seed)
    student = load_model(args.student, tokenizers[0], device, dropout=args.dropout)
    teacher = teacher_parts = None
    if args.method != "sft":
        teacher = load_model(args.teacher, tokenizers[1], device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        teacher.requires_grad_(False)
        teacher_parts = teacher.get_input_embeddings(), head_of(teacher)
    model = Distiller(student, teacher, args).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, total), eta_min=1e-7)
    step, best, state_path = 0, -1.0, folder / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step, best = state["step"], state["best"]
    parallel = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    log = Log(folder, step, total)

    def validate():
        """Dev loss and ROUGE-L; keeps the student if it is the best yet."""
        nonlocal best
        log.flush()
        student.eval()
        texts = generate(student, tokenizers[0], [row.prompt for row in dev_rows], args.seed, args)
        scores = rouge_l(texts, [row.references for row in dev_rows])
        log.write(dict(step=step, dev_loss=dev_loss(student, dev, device, args.micro_batch), dev_rougeL=scores["rougeL"],
                       dev_exact_match=scores["exact_match"]))
        if scores["rougeL"] > best:
            best = scores["rougeL"]
            if rank == 0:
                save_model(student, tokenizers[0], folder / "best")

    def save():
        if rank == 0:
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict(),
                         step=step, best=best)
            write_atomically(state_path, lambda file: torch.save(state, file))
        if dist.is_initialized():
            dist.barrier()

    if step == 0:
        log.write(dict(step=0, rows=len(data[0]), dropped=dropped, dev_rows=len(dev), steps=total))
        validate()
    epoch_planned = None
    while step < total:
        epoch, index = divmod(step, steps_an_epoch)
        if epoch != epoch_planned:
            plan, epoch_planned = plan_epoch(lengths, args.batch_size, args.micro_batch, args.seed, epoch), epoch
        micro_batches = plan[index]
        counts = [sum(len(side[i].spans) for rows in micro_batches for i in rows) for side in data]
        sums, padded, read = {}, 0, 0
        model.train()
        for m in range(rank, len(micro_batches), processes):
            sides = [[side[i] for i in micro_batches[m]] for side in data]
            s, *t = (collate(examples, tok.eos_token_id, device) for examples, tok in zip(sides, tokenizers))
            padded, read = padded + s.ids.numel(), read + sum(len(e.ids) - 1 for e in sides[0])
            chunks = collate_chunks(*sides, device) if args.method in ("clp", "cla") else None
            # gradients are exchanged once a step, in the last micro-batch's backward pass
            last = m + processes >= len(micro_batches)
            seed_everything(args.seed, step, m)
            with contextlib.nullcontext() if last or processes == 1 else parallel.no_sync():
                with autocast(device):
                    with torch.no_grad():
                        h_t = response_hidden(teacher, t[0]) if t else None
                    loss, terms = parallel(s, t[0] if t else None, chunks, h_t, teacher_parts, counts[0], counts[-1])
                (loss * processes).backward()  # DistributedDataParallel takes the mean over processes, counts are global
            terms["loss"] = loss.detach() * counts[0]
            sums = {name: value + sums.get(name, 0) for name, value in terms.items()}
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        lr = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        log.add(dict(step=step, epoch=step / steps_an_epoch, lr=lr, tokens=counts[0], teacher_tokens=counts[-1],
                     padding=1 - read / padded), sums, norm)
        if step % args.log_every == 0:
            log.flush()
        if step % steps_an_epoch == 0 or step == total:
            validate()
        if step % steps_an_epoch == 0 or step == total or step % args.save_every == 0:
            log.flush()
            save()
    log.bar.close()
    return folder / "best"


def save_model(model, tokenizer, folder):
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read."""
    fresh = folder.with_name(folder.name + ".new")
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


@torch.no_grad()
def dev_loss(model, examples, device, batch):
    """Cross-entropy a response token, over all processes."""
    rank, processes = world()
    order = sorted(examples, key=lambda example: len(example.ids))
    total = torch.zeros(2, device=device)
    for start in range(rank * batch, len(order), processes * batch):
        side = collate(order[start:start + batch], 0, device)
        with autocast(device):
            hidden = response_hidden(model, side)[side.mask]
            (ce,) = head_losses(lambda z, target: (F.cross_entropy(z, target, reduction="sum"),),
                                [(hidden, head_of(model))], (side.targets[side.mask],))
        total += torch.stack([ce, side.mask.sum()])
    ce, count = total_over_processes(total).tolist()
    return ce / count


# ======================================================================================================
# 9. Evaluation
# ======================================================================================================
@torch.no_grad()
def generate(model, tokenizer, prompts, seed, args, no_repeat_ngram=0):
    """One sampled response a prompt (temperature 1, the whole distribution), the same for any number of processes."""
    rank, processes = world()
    lead = leading_special_tokens(tokenizer)
    encoded = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    encoded = [lead + ids[max(0, len(ids) - args.max_prompt + len(lead)):] for ids in encoded]  # (departure 7)
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    batches = [order[i:i + args.eval_batch] for i in range(0, len(order), args.eval_batch)]
    config = GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=args.max_new_tokens,
                              no_repeat_ngram_size=no_repeat_ngram, eos_token_id=tokenizer.eos_token_id,
                              pad_token_id=tokenizer.eos_token_id)
    mine = []
    for b in range(rank, len(batches), processes):
        width = len(encoded[batches[b][0]])
        ids = torch.tensor([[tokenizer.eos_token_id] * (width - len(encoded[i])) + encoded[i] for i in batches[b]])
        mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in batches[b]])
        seed_everything(seed, b)
        with autocast(model.device):
            out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config)
        mine += zip(batches[b], tokenizer.batch_decode(out[:, width:], skip_special_tokens=True))
    everyone = [mine]
    if processes > 1:
        everyone = [None] * processes
        dist.all_gather_object(everyone, mine)
    return [text for _, text in sorted(pair for part in everyone for pair in part)]


def rouge_l(predictions, references):
    """ROUGE-L F1 (Porter stemmer) and exact match (after lower case, no punctuation, single spaces), as MiniLLM has them.

    Args:
        predictions: texts.  references: for each, a list of texts; the best counts.
    Returns:
        dict with `rougeL` and `exact_match`, means in percent.
    """
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)

    def normal(text):
        return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())

    rouge = [max(scorer.score(ref, text)["rougeL"].fmeasure for ref in refs) for text, refs in zip(predictions, references, strict=True)]
    exact = [any(normal(ref) == normal(text) for ref in refs) for text, refs in zip(predictions, references)]
    return dict(rougeL=100 * statistics.fmean(rouge), exact_match=100 * statistics.fmean(exact))


def evaluate(args, source, folder, device):
    """Samples and scores every test set once a seed; writes predictions/ and eval.json into the folder.

    Returns:
        the content of eval.json: metric -> set (and OOD, All) -> list of values, one a seed.
    """
    tokenizer = load_tokenizer(str(source))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(str(source), tokenizer, device, dtype)
    result = dict(rougeL={}, exact_match={})
    if world()[0] == 0:
        (folder / "predictions").mkdir(parents=True, exist_ok=True)
    sets = test_sets(args)
    with tqdm(total=len(sets) * len(args.eval_seeds), desc=f"evaluate {source}", disable=None if world()[0] == 0 else True) as bar:
        for name, rows in sets.items():
            references = [row.references for row in rows]
            for seed in args.eval_seeds:
                texts = generate(model, tokenizer, [row.prompt for row in rows], seed, args, args.no_repeat_ngram)
                scores = rouge_l(texts, references)
                for metric, value in scores.items():
                    result[metric].setdefault(name, []).append(value)
                if world()[0] == 0:
                    lines = [json.dumps(dict(prompt=row.prompt, prediction=text, references=row.references)) + "\n"
                             for row, text in zip(rows, texts)]
                    (folder / "predictions" / f"{name}-{seed}.jsonl").write_text("".join(lines))
                bar.update()
    for values in result.values():
        by_set = list(values.values())
        if len(by_set) > 1:
            values["OOD"] = [statistics.fmean(column) for column in zip(*by_set[1:])]
        values["All"] = [statistics.fmean(column) for column in zip(*by_set)]
    if world()[0] == 0:
        write_atomically(folder / "eval.json", lambda file: file.write(json.dumps(result, indent=1).encode()))
    return result


def test_sets(args):
    """The rows of each test set, by name.

    Raises:
        ValueError: not NAME=FILE, or a name that cannot be a file's.
    """
    sets = {}
    for item in args.tests:
        name, _, source = item.partition("=")
        if not re.fullmatch(r"[\w-]+", name) or not source:
            raise ValueError(f"--tests: found {item!r}, expected NAME=FILE with a name of letters, digits, - and _")
        sets[name] = read_rows(fetch(source), args.eval_limit)
    return sets


# Table 1 of the paper: Dolly, SelfInst, Vicuna, S-NI, UnNI, OOD, All
PAPER = {
    "student, untrained": (6.39, 4.72, 10.18, 4.49, 4.64, 6.01, 6.08),
    "teacher": (27.45, 19.42, 20.93, 34.74, 35.98, 27.77, 28.30),
    "sft": (22.83, 9.49, 14.66, 13.55, 16.06, 13.44, 15.32),
    "cma-srkl": (24.64, 11.50, 16.21, 18.40, 21.69, 16.95, 18.49),
    "cma-kl": (24.13, 9.73, 15.20, 15.14, 17.78, 14.46, 16.40),
    "cma-ga-skl": (24.79, 11.82, 15.95, 19.44, 22.05, 17.32, 18.81),
    "cma-ga-kl": (24.92, 11.17, 15.84, 18.19, 21.50, 16.68, 18.32),
}


def results_table(results):
    """ROUGE-L as a Markdown table: a row a run, mean ± standard deviation over sampling seeds."""
    columns = list(next(iter(results.values()))["rougeL"])
    paper_has_them = columns[:5] == [item.partition("=")[0] for item in TEST_SETS]
    lines = ["| ROUGE-L | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for run, result in results.items():
        cells = [f"{statistics.fmean(v):.2f} ± {statistics.stdev(v) if len(v) > 1 else math.nan:.2f}"
                 for v in result["rougeL"].values()]
        lines.append(f"| {run} | " + " | ".join(cells) + " |")
        if run in PAPER and paper_has_them:
            lines.append("| ... in the paper | " + " | ".join(f"{value:.2f}" for value in PAPER[run]) + " |")
    return "\n".join(lines)


# ======================================================================================================
# 11. Demo: everything above, on tasks, tokenizers and models made here
# ======================================================================================================
WORDS = ("apple basket candle dragon engine forest garden hammer island jacket kettle ladder mirror needle orange "
         "pencil rabbit saddle temple umbrella violin window yellow zebra").split()
FACTS = dict(zip(WORDS, "red brown white green grey dark lush heavy remote warm hot tall shiny sharp juicy "
                        "wooden quick worn ancient wet polished open bright striped".split()))


def demo_row(rng, longer):
    """One instruction of the demo, from looking up a fact (easy) to adding numbers (hard); `longer` ones are OOD."""
    words = rng.sample(WORDS, rng.randint(5, 6) if longer else rng.randint(2, 4))
    a, b = (rng.randint(100, 199) if longer else rng.randint(10, 99) for _ in "ab")
    listed = " ".join(words)
    instruction, output = rng.choice([
        (f"Describe: {listed}", " and ".join(f"{FACTS[word]} {word}" for word in words)),
        (f"Repeat twice: {listed}", f"{listed} {listed}"),
        (f"Say in reverse: {listed}", " ".join(reversed(words))),
        (f"Number the words: {listed}", " ".join(f"{i} {word}" for i, word in enumerate(words, a))
         ),
        (f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}"),
        (f"Count on from {a}:", " ".join(str(a + i) for i in range(1, len(words) + 2))),
        (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}"),
    ])
    return dict(instruction=instruction, input="", output=output, prompt=f"Task: {instruction}\nAnswer:\n")


def write_demo(folder, seed):
    """Writes the demo's rows, two byte-level BPE tokenizers and two untrained models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    rng = random.Random(seed)
    files = dict(raw=[demo_row(rng, False) for _ in range(4100)], seen=[demo_row(rng, False) for _ in range(200)],
                 longer=[demo_row(rng, True) for _ in range(200)])
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = [row[field] for row in files["raw"] for field in ("prompt", "output")]
    # The student's vocabulary is small and cuts words up, but keeps numbers together; the teacher's has whole words, but
    # single digits. So both "one to many" and "many to one" occur.
    common = dict(max_position_embeddings=256, initializer_range=0.05)
    for name, size, digits, config in (
            ("student", 420, [], transformers.GPT2Config(n_positions=256, n_embd=64, n_layer=2, n_head=4)),
            ("teacher", 700, [pre_tokenizers.Digits(individual_digits=True)], transformers.Qwen2Config(
                hidden_size=160, intermediate_size=480, num_hidden_layers=4, num_attention_heads=5,
                num_key_value_heads=5, tie_word_embeddings=True, **common))):
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        bpe.decoder = decoders.ByteLevel()
        bpe.train_from_iterator(text, trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<|endoftext|>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
        config.vocab_size, config.bos_token_id, config.eos_token_id = len(tokenizer), 0, 0
        seed_everything(seed)
        save_model(AutoModelForCausalLM.from_config(config), tokenizer, folder / name)


def demo(args, device):
    """Teacher, SFT student, CMA and CMA-GA on the demo's tasks, by the same code as the paper's runs; prints a table."""
    folder = pathlib.Path(args.out) / "demo"
    if world()[0] == 0 and not (folder / "teacher").exists():
        write_demo(folder, args.seed)
    if dist.is_initialized():
        dist.barrier()
    own = dict(demo=False, data=str(folder), dev_rows=100, student=str(folder / "student"), teacher=str(folder / "teacher"),
               tests=[f"{name}={folder}/{name}.jsonl" for name in ("seen", "longer")], eval_seeds=[10, 20, 30],
               max_new_tokens=40, no_repeat_ngram=0, eval_batch=200, micro_batch=16, out=str(folder),
               teacher_epochs=8, teacher_lr=2e-3, epochs=3, lr=2e-3, lr_projectors=2e-3, log_every=25)
    base = argparse.Namespace(**vars(args) | own)
    results = {}
    for label, settings in (("student, untrained", dict(eval_only=base.student)), ("sft", dict(method="sft", ga=False)),
                            ("cma", dict(method="cma", ga=False)), ("cma-ga", dict(method="cma", ga=True))):
        results[label] = experiment(argparse.Namespace(**vars(base) | settings), device)
    results["teacher"] = experiment(argparse.Namespace(**vars(base) | dict(eval_only=str(folder / "teacher-sft" / "best"))), device)
    return results


# ======================================================================================================
# 12. Main
# ======================================================================================================
def run_name(args):
    """The folder of a run, from its settings."""
    if args.name:
        return args.name
    if args.eval_only:
        return "eval-" + "-".join(pathlib.Path(args.eval_only).parts[-2:])
    if args.method == "sft":
        return f"sft-{args.seed}"
    return "-".join([args.method, *["ga"] * args.ga, args.div, str(args.seed)])


def experiment(args, device):
    """One row of the table: fine-tunes the teacher if need be, trains, evaluates the best checkpoint. Returns its scores."""
    out = pathlib.Path(args.out)
    folder, source = out / run_name(args), args.eval_only
    if source is None:
        if args.method != "sft" and not args.teacher_ready:
            own = dict(method="sft", ga=False, student=args.teacher, epochs=args.teacher_epochs, lr=args.teacher_lr)
            teacher = train(argparse.Namespace(**vars(args) | own), out / "teacher-sft", device)
            args = argparse.Namespace(**vars(args) | dict(teacher=str(teacher)))
        source = train(args, folder, device)
    return evaluate(args, source, folder, device)


def main(argv=None):
    """Runs the command line; returns the results by run."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.ga and args.method == "sft":
        parser.error("--ga: found --method sft, expected a method with a teacher")
    local, processes = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if world()[0] == 0:
        print(f"{processes} process(es) on {device.type}, output in {args.out}", flush=True)
    try:
        results = demo(args, device) if args.demo else {run_name(args): experiment(args, device)}
        if world()[0] == 0:
            print(results_table(results))
            print(f"Checkpoints, logs, predictions and scores: {pathlib.Path(args.out).resolve()}")
        return results
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
