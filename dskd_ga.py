#!/usr/bin/env python3
"""DSKD-CMA-GA: distil a large language model into a small one that has another tokenizer.

Reference implementation of "Dual-Space Knowledge Distillation with Key-Query Matching for Large Language
Models with Vocabulary Mismatch" (Tsiapali, Do, Knill; ICASSP 2026; arXiv:2603.22056 v1), in one file.

    python dskd_ga.py --demo                                 # 2 CPU cores, minutes, no download
    python dskd_ga.py --div skl --ga                         # one GPU, the paper's setting
    torchrun --nproc_per_node=4 dskd_ga.py --div skl --ga    # the same run on four

Contents: 1 arguments, 2 data, 3 models, 4 divergences, 5 alignment, 6 key-query matching, 7 objective,
8 training, 9 evaluation, 10 demo, 11 main. Sections 4-7 are the paper, as functions of tensors.
Not here: key-query matching by conditional transport, eq. (15), and the baselines ULD and MinED.

Departures from the paper (marked "NOT IN PAPER" where they happen)
  1. KD^{t->s} counts only positions where argmax q^{t->s} is the gold token, as in the authors' code;
     --all-positions gives eq. (8) to the letter.
  2. KD^{s->t} is forward KL whatever --div is, as in the authors' code; --s2t-div changes it.
  3. N_std is over each sequence's own real positions, so that a loss depends on neither padding nor batch.
  4. Chunks are built on target tokens, which are what the positions predict.
  5. D is trained, as eq. (14) says (the authors' code leaves it at its random start), at the projectors'
     learning rate; L_KQ is a mean over the real positions of the optimiser step, and is not divided again.
  6. The rows of a batch are sorted by length before they are cut into micro-batches; an epoch's last,
     incomplete batch is left out.
  7. Prompts get the special tokens that their tokenizer puts in front (none for GPT-2 and Qwen); at
     evaluation, a prompt over the limit keeps its end.

Glossary: B sequences, S and T student and teacher response positions, V_s and V_t vocabularies
  paper               code           shape                 equation
  e^s, e^t            e_s_*, e_t_*   (B, S|T, d_s|d_t)     (1), (2): embeddings of tokens read and predicted
  h^s, h^t            h_s, h_t       (B, S|T, d_s|d_t)     (4), (5): last hidden states, after the final norm
  Q, K                q, k           (B, S|T, 2 d_t)       (1), (2)
  P_Q                 proj.query     2 d_s -> 2 d_t        (1)
  A^{t->s}, A^{s->t}  a_t2s, a_s2t   (B, S, T), (B, T, S)  (3); CLP (12), CLA (13)
  P^{s->t}, P^{t->s}  proj.s2t, .t2s d_s -> d_t, d_t -> d_s  (4), (5)
  V^{s->t}, V^{t->s}  v_s2t, v_t2s   (B, S|T, d_t|d_s)     (4), (5)
  h^{t->s}, h^{s->t}  h_t2s, h_s2t   (B, S|T, d_s|d_t)     (6)
  W^s, W^t            W_s, W_t       (V_s|V_t, d_s|d_t)    (7): prediction heads
  M^{t->s}            chunks         (B, S, T)             (10), (11)
  D                   Discriminator  2 d_t -> logit        (14)
"""
import argparse, contextlib, itertools, json, math, os, pathlib, random, re, resource, shlex, shutil
import statistics, string, sys, time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from huggingface_hub import hf_hub_download
from rouge_score import rouge_scorer
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

# 1. Arguments: the defaults are the paper's setting =========================================================
TEST_SETS = ["Dolly=MiniLLM/dolly/valid.jsonl", "SelfInst=MiniLLM/self-inst/valid.jsonl",
             "Vicuna=MiniLLM/Vicuna/valid.jsonl", "S-NI=MiniLLM/sinst/11_/valid.jsonl",
             "UnNI=MiniLLM/uinst/11_/valid.jsonl"]
# What may differ when a run is taken up again, and what plain fine-tuning does not depend on.
NOT_IDENTITY = {"out", "name", "demo", "eval_only", "tests", "eval_seeds", "eval_limit", "no_repeat_ngram",
                "log_every", "save_every"}
TEACHER_ONLY = {"teacher", "teacher_ready", "teacher_epochs", "teacher_lr", "div", "ga", "ga_weight",
                "temperature", "skew", "all_positions", "s2t_div", "lr_projectors"}

class InputError(ValueError):
    """Bad input, named in one line: main prints it and exits with status 2."""

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines and shows the defaults."""

def build_parser():
    """The command line as an argparse parser."""
    parser = argparse.ArgumentParser(
        prog="dskd_ga.py", formatter_class=lambda prog: HelpFormatter(prog, width=110, max_help_position=30),
        description=__doc__.split("\n\nContents")[0], usage="dskd_ga.py [--flag value ...]",
        epilog="A command that was stopped goes on from its last save when it is given again.")
    g = parser.add_argument_group("what to run")
    g.add_argument("--method", choices=("cma", "clp", "cla", "sft"), default="cma",
                   help="cma: attention, eq. (3); clp, cla: chunks, eqs. (12), (13); sft: no teacher")
    g.add_argument("--ga", action="store_true", help="add the adversary on keys and queries, eq. (14)")
    g.add_argument("--div", choices=DIVERGENCES, default="skl", help="f of KD^{t->s}; try srkl without --ga")
    g.add_argument("--demo", action="store_true",
                   help="make small tasks, tokenizers and models, and run them; heeds --out and --seed only")
    g.add_argument("--eval-only", metavar="MODEL", help="evaluate this folder or hub id, train nothing")
    g.add_argument("--out", metavar="FOLDER", default="runs", help="where runs go; they share a teacher")
    g.add_argument("--name", help="the run's folder in it; made of method, div and seed if not given")
    g = parser.add_argument_group("models: folders or hub ids of causal language models")
    g.add_argument("--student", default="openai-community/gpt2", help="the model to train")
    g.add_argument("--teacher", default="Qwen/Qwen1.5-1.8B", help="the model to learn from")
    g.add_argument("--teacher-ready", action="store_true", help="do not fine-tune it on --data first")
    g.add_argument("--teacher-epochs", type=float, default=10, help="length of the teacher's fine-tuning")
    g.add_argument("--teacher-lr", type=float, default=2e-5, help="its learning rate there")
    g = parser.add_argument_group("data: JSON lines of instruction, input, output, or of prompt, output")
    g.add_argument("--data", metavar="SOURCE", default="MiniLLM/dolly", help="folder or hub id of raw.jsonl")
    g.add_argument("--dev-rows", type=int, default=1000, help="first rows, held out to choose the checkpoint")
    g.add_argument("--max-prompt", type=int, default=256, help="training drops prompts over it")
    g.add_argument("--max-length", type=int, default=512, help="tokens of prompt and response in all")
    g = parser.add_argument_group("objective")
    g.add_argument("--temperature", type=float, default=2.0, help="tau, on both sides of the divergences")
    g.add_argument("--skew", type=float, default=0.1, help="a of skl and srkl")
    g.add_argument("--ga-weight", type=float, default=1.0, help="factor of L_KQ in eq. (16)")
    g.add_argument("--all-positions", action="store_true",
                   help="KD^{t->s} everywhere, eq. (8) to the letter, not only where argmax q^{t->s} is gold")
    g.add_argument("--s2t-div", choices=DIVERGENCES, default="kl", help="f of KD^{s->t}; eq. (8) has --div's")
    g = parser.add_argument_group("optimisation: AdamW with a cosine to 1e-7")
    g.add_argument("--epochs", type=float, default=20, help="length of training, a fraction allowed")
    g.add_argument("--batch-size", type=int, default=32, help="sequences a step, over all processes")
    g.add_argument("--micro-batch", type=int, default=4, help="sequences at a time; fewer if memory is short")
    g.add_argument("--lr", type=float, default=5e-4, help="the student's peak rate; lower for a larger one")
    g.add_argument("--lr-projectors", type=float, default=1e-3, help="that of projectors and discriminator")
    g.add_argument("--weight-decay", type=float, default=1e-2, help="none on biases and norms")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    g.add_argument("--dropout", type=float, help="every rate, instead of the student's own and D's 0.1")
    g.add_argument("--seed", type=int, default=10, help="of initialisation, row order, dropout, dev sampling")
    g.add_argument("--save-every", type=int, default=500, help="steps between saves, besides one an epoch")
    g.add_argument("--log-every", type=int, default=10, help="steps whose log lines are written together")
    g = parser.add_argument_group("evaluation: sampling at temperature 1")
    g.add_argument("--tests", metavar="NAME=FILE", nargs="+", default=TEST_SETS,
                   help="local files or ORG/DATASET/FILE of the hub; OOD is the mean of all but the first")
    g.add_argument("--eval-seeds", type=int, nargs="+", default=[10, 20, 30, 40, 50], help="a sampling each")
    g.add_argument("--eval-limit", type=int, help="first rows of each test set only, for a quick look")
    g.add_argument("--eval-batch", type=int, default=64, help="prompts at a time; the samples depend on it")
    g.add_argument("--max-new-tokens", type=int, default=256, help="longest response")
    g.add_argument("--no-repeat-ngram", type=int, default=6, help="tests repeat no n-gram; 0 lets them")
    return parser

# 2. Data: text row -> token ids and character spans -> padded batch =========================================
class Row(NamedTuple):
    """One instruction."""
    prompt: str
    references: list  # alternative responses; training uses the first

class Example(NamedTuple):
    """A row as one model reads it."""
    ids: list    # prompt, response, end of text; cut at the length limit
    start: int   # where the response begins
    spans: list  # (start, end) of each response token in the response's characters; end of text: (-1, -1)

class Side(NamedTuple):
    """A padded batch for one model: B sequences with up to n response positions."""
    ids: torch.Tensor      # (B, L) what the trunk reads
    pos: torch.Tensor      # (B, n) where in it the response positions are
    mask: torch.Tensor     # (B, n) bool, True on real positions
    inputs: torch.Tensor   # (B, n) the token read there
    targets: torch.Tensor  # (B, n) the token predicted there, one of the response's

def fetch(source):
    """Path of a data file: a local file, or ORG/DATASET/FILE from the hub (downloaded once)."""
    parts = source.split("/", 2)
    if os.path.isfile(source) or len(parts) < 3 or os.path.isdir(os.path.dirname(source)):
        return source
    return hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset")

def alpaca_prompt(instruction, context):
    """The Alpaca template, with or without a further context."""
    paired = ", paired with an input that provides further context" if context else ""
    middle = f"### Input:\n{context}\n\n" if context else ""
    return (f"Below is an instruction that describes a task{paired}. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n")

def read_rows(path, limit=None):
    """MiniLLM's JSON lines as `Row`s; one without `prompt` gets the Alpaca template. InputError names the
    line."""
    def check(ok, field, found, expected):
        if not ok:
            raise InputError(f"{path}, line {number}, {field}: found {found!r}, expected {expected}")

    rows, number = [], 1
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(itertools.islice(file, limit), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: found {error}, expected a JSON object") from None
            check(isinstance(row, dict), "JSON", row, "an object")
            field = "prompt" if "prompt" in row else "instruction"
            text, context, output = row.get(field), row.get("input", ""), row.get("output")
            check(isinstance(text, str) and text, field, text, "a text that is not empty")
            check(isinstance(context, str), "input", context, "a text")
            references = output if isinstance(output, list) else [output]
            check(references and all(isinstance(item, str) for item in references), "output", output,
                  "a text or a list of texts")
            rows.append(Row(text if field == "prompt" else alpaca_prompt(text, context), references))
    check(rows, "row", None, "at least one")
    return rows

def leading_tokens(tokenizer):
    """The special tokens that the tokenizer itself puts in front of a text: [BOS] for Llama, [] for GPT-2."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    return encoded["input_ids"][:encoded["special_tokens_mask"].index(0)]

def encode(tokenizer, rows, max_length):
    """The rows as `Example`s; prompt and response are tokenised apart, only prompts get special tokens."""
    options, lead = dict(add_special_tokens=False, verbose=False), leading_tokens(tokenizer)
    prompts = tokenizer([row.prompt for row in rows], **options)["input_ids"]
    responses = tokenizer([row.references[0] for row in rows], return_offsets_mapping=True, **options)
    examples = []
    for prompt, ids, spans in zip(prompts, responses["input_ids"], responses["offset_mapping"]):
        start, ids = len(lead + prompt), (lead + prompt + ids + [tokenizer.eos_token_id])[:max_length]
        examples.append(Example(ids, start, [*spans, (-1, -1)][:max(0, len(ids) - start)]))
    return examples

def training_data(rows, tokenizers, max_prompt, max_length):
    """A list of `Example`s for each tokenizer, the student's first, without the rows whose prompt is over the
    limit (in the student's tokens) or leaves no room for a response; and how many rows that were."""
    sides = [encode(tokenizer, rows, max_length) for tokenizer in tokenizers]
    keep = [i for i in range(len(rows))
            if sides[0][i].start <= max_prompt and all(side[i].spans for side in sides)]
    return [[side[i] for i in keep] for side in sides], len(rows) - len(keep)

def plan_epoch(lengths, batch_size, micro_batch, seed, epoch):
    """The epoch's optimiser steps, each a list of micro-batches of row indices; fixed by seed and epoch."""
    # NOT IN PAPER: no incomplete last step; in a step, whose rows are random, those of like length share a
    # micro-batch, so that little is padded (departure 6)
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths))
    steps = order[:len(order) // batch_size * batch_size].reshape(-1, batch_size)
    sort = (sorted(rows, key=lengths.__getitem__) for rows in steps.tolist())
    return [[rows[i:i + micro_batch] for i in range(0, batch_size, micro_batch)] for rows in sort]

def collate(examples, pad, device):
    """The examples as a `Side` on the device, right-padded to the longest of them."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(e.ids) for e in examples], True, pad)
    starts, counts = torch.tensor([(e.start, len(e.spans)) for e in examples])[:, :, None].unbind(1)
    index = torch.arange(int(counts.max()))[None]
    mask = index < counts
    pos = (starts - 1 + index) * mask
    side = Side(ids[:, :-1], pos, mask, ids.gather(1, pos), ids.gather(1, pos + 1))
    if device.type == "cuda":
        side = Side(*(x.pin_memory().to(device, non_blocking=True) for x in side))
    return side

def collate_chunks(students, teachers, device):
    """M^{t->s} of eq. (11) for a batch, (B, S, T) bool, from both sides' examples."""
    s, t = (max(len(e.spans) for e in side) for side in (students, teachers))
    chunks = [chunk_alignment(a.spans, b.spans) for a, b in zip(students, teachers)]
    return torch.stack([F.pad(c, (0, t - c.shape[1], 0, s - c.shape[0])) for c in chunks]).to(device)

# 3. Models: trunk, head and embeddings of any causal language model =========================================
class Head(NamedTuple):
    """A prediction head: logits = softcap(h W^T + bias), softcap(z) = c tanh(z / c)."""
    weight: torch.Tensor              # (V, d)
    bias: torch.Tensor | None = None  # (V,)
    softcap: float | None = None      # c; None: no cap

    def __call__(self, h):  # (..., d) -> (..., V), in float32 whatever the product is computed in
        logits = full_precision(F.linear(h, self.weight, self.bias))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def detach(self):
        return Head(self.weight.detach(), None if self.bias is None else self.bias.detach(), self.softcap)

def head_of(model):
    """The model's own `Head`, sharing its parameters."""
    module = model.get_output_embeddings()
    return Head(module.weight, module.bias, getattr(model.config, "final_logit_softcapping", None))

def response_hidden(model, side):
    """h: the last hidden states, after the final norm, at the response positions, (B, n, d)."""
    # Padding is on the right and attention is causal: no real position sees padding, so no mask is needed.
    hidden = model.get_decoder()(input_ids=side.ids, use_cache=False).last_hidden_state
    return hidden.gather(1, side.pos[..., None].expand(-1, -1, hidden.shape[-1]))

def load_tokenizer(source):
    """A fast tokenizer with an end-of-text token; InputError for any other."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    if not tokenizer.is_fast:
        raise InputError(f"{source}: found a tokenizer without character offsets, expected a fast one")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{source}: found no end-of-text token, expected eos_token in tokenizer_config.json")
    return tokenizer

@torch.no_grad()
def load_model(source, tokenizer, device, dtype=None, dropout=None):
    """A causal language model in evaluation mode, in dtype (default: bf16 on CUDA, float32 on the CPU), with
    every dropout rate set (default: its own). InputError if it has fewer embeddings than the tokenizer has
    tokens, or if its own logits are not what its trunk and its `Head` give."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    config = AutoConfig.from_pretrained(source)
    for key, value in config.to_dict().items():
        if dropout is not None and "drop" in key and isinstance(value, float):
            setattr(config, key, dropout)
    model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype).to(device).eval()
    size = len(model.get_input_embeddings().weight)
    if size < len(tokenizer):
        raise InputError(f"{source}: found {size} embeddings, expected {len(tokenizer)}, one a token")
    ids = torch.arange(3, device=device)[None]
    own = model(input_ids=ids, use_cache=False).logits
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    gap = (head_of(model)(hidden) - own).abs().max().item()
    if gap > 0.01 * own.abs().max().item():
        raise InputError(f"{source}: found logits {gap:.3g} away from those of trunk and head, expected that "
                         f"{type(model).__name__} has a linear head, with at most a final_logit_softcapping")
    model.generation_config = GenerationConfig()  # without sampling defaults of its own
    return model

# 4. Divergences f(p || q), p the teacher's distribution and q the student's ================================
DIVERGENCES = ("kl", "rkl", "jsd", "skl", "srkl", "akl")

def full_precision(x):
    """float32 at least: half precision is raised, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def divergence(name, student_logits, teacher_logits, temperature=2.0, skew=0.1, head_mass=0.5):
    """f of eq. (8): one value per position, in float32 (float64 for float64 logits).

    name: kl | rkl | jsd | skl, srkl (DistiLLM, a = skew) | akl (Wu et al. 2025, with the head's share of p).
    student_logits, teacher_logits: (..., V), where -inf counts as probability 0. temperature: tau, on both
    sides, without a factor tau^2. ValueError: unknown name, logits of different shapes.
    """
    if name not in DIVERGENCES or student_logits.shape != teacher_logits.shape:
        raise ValueError(f"divergence: found {name!r} of logits {tuple(student_logits.shape)} and "
                         f"{tuple(teacher_logits.shape)}, expected one of {DIVERGENCES} and one shape")

    def log_softmax(logits):  # -inf becomes very small but finite: 0 * (-inf - -inf) would be nan
        return (full_precision(logits).clamp(min=-1e30) / temperature).log_softmax(-1)

    def kl(log_a, log_b):  # KL(a || b)
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    def mix(log_a, log_b, weight):  # log(weight a + (1 - weight) b)
        low, high = (math.log(w) if w > 0 else -math.inf for w in (weight, 1 - weight))
        return torch.logaddexp(log_a + low, log_b + high)

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
        head = p.cumsum(-1) - p < head_mass  # the smallest prefix with at least that mass
        g_head, g_tail = (gap * head).sum(-1), (gap * ~head).sum(-1)
        share = g_head / (g_head + g_tail).clamp(min=torch.finfo(gap.dtype).tiny)
    return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)

# 5. Alignment: cross-model attention (CMA), chunks (CLP, CLA) ===============================================
def zero_padding(x, mask):
    """x (B, n, d) with whatever lies under padding, nan included, replaced by 0."""
    return x.masked_fill(~mask[..., None], 0)

def std_normalise(x, mask):
    """N_std of eqs. (2) and (5): x (B, n, d) over its standard deviation across each sequence's own features
    and real positions (mask (B, n) True). Padding becomes 0; a sequence of equal entries stays."""
    # NOT IN PAPER: per sequence (departure 3)
    x = zero_padding(full_precision(x), mask)
    count = (mask.sum(1) * x.shape[-1]).view(-1, 1, 1)
    mean = x.sum((1, 2), keepdim=True) / count.clamp(min=1)
    variance = zero_padding((x - mean) ** 2, mask).sum((1, 2), keepdim=True) / (count - 1).clamp(min=1)
    return x / torch.where(variance > (1e-6 * mean) ** 2, variance, 1).sqrt()  # less is rounding

class Projectors(nn.Module):
    """P_Q of eq. (1), P^{t->s} of eq. (5) and P^{s->t} of eq. (4), for hidden widths d_s and d_t."""

    def __init__(self, d_s, d_t):
        super().__init__()
        self.query, self.t2s, self.s2t = nn.Linear(2 * d_s, 2 * d_t), nn.Linear(d_t, d_s), nn.Linear(d_s, d_t)

def cross_model_attention(q, k, s_mask, t_mask, chunks=None):
    """A^{t->s} (B, S, T) and A^{s->t} (B, T, S) of eq. (3), in float32; with `chunks` those of CLA, eq. (13).

    q: (B, S, w), k: (B, T, w), s_mask: (B, S) and t_mask: (B, T) bool, True on real positions; chunks: (B, S,
    T) bool, M^{t->s} of eq. (11). Rows sum to 1; rows of padding and rows without a chunk are 0.
    """
    allowed = s_mask[:, :, None] & t_mask[:, None, :] & (True if chunks is None else chunks)
    q, k = zero_padding(full_precision(q), s_mask), zero_padding(full_precision(k), t_mask)
    with torch.autocast(q.device.type, enabled=False):  # bf16's 8 bits are too few for scores in the hundreds
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, torch.finfo(q.dtype).min)
    return scores.softmax(-1) * allowed, scores.mT.softmax(-1) * allowed.mT

def chunk_projection(chunks, s_mask, t_mask):
    """CLP, eq. (12): uniform weights within the chunk. Arguments and result as of `cross_model_attention`."""
    m = (chunks & s_mask[:, :, None] & t_mask[:, None, :]).float()
    return m / m.sum(-1, keepdim=True).clamp(min=1), m.mT / m.mT.sum(-1, keepdim=True).clamp(min=1)

def chunk_alignment(s_spans, t_spans):
    """M^{t->s} of eq. (11) for one row, bool (n_s, n_t): tokens in the same minimal chunk of text, eq. (10).

    Spans are the (start, end) characters of a side's *target* tokens, in order; end of text is (-1, -1).
    Tokens after the last common cut (one side was truncated) are in no chunk.
    """
    def cuts(spans):  # where tokens end, but not inside a character: there, the next token starts before that
        text = [(start, end) for start, end in spans if end >= 0]
        return {end for (_, end), (after, _) in zip(text, text[1:] + [(math.inf, 0)]) if after >= end}

    def chunk_ids(spans, nowhere):  # tokens of one chunk have equally many cuts before them
        ends = torch.tensor([end for _, end in spans], dtype=torch.long)
        ids = torch.searchsorted(common, ends)
        return torch.where(ends < 0, len(common), torch.where(ids < len(common), ids, nowhere))

    # NOT IN PAPER: target tokens (departure 4)
    common = torch.tensor(sorted(cuts(s_spans) & cuts(t_spans)), dtype=torch.long)
    return chunk_ids(s_spans, -1)[:, None] == chunk_ids(t_spans, -2)[None]

# 6. Key-query matching: the generative adversary (GA) =======================================================
class Discriminator(nn.Module):
    """D of eq. (14), (..., width) -> (...): a logit per vector, high for "a query". Highway layer and MLP."""

    def __init__(self, width, hidden=768, dropout=0.1):
        super().__init__()
        self.highway = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, hidden), nn.LeakyReLU(0.1),
                                 nn.Linear(hidden, 1))

    def forward(self, x):
        z = self.highway(x)
        g = z.sigmoid()
        return self.mlp(g * z.relu() + (1 - g) * x).squeeze(-1)

def ga_terms(disc, q, k, s_mask, t_mask):
    """Sums behind `ga_loss` and the log, scalars: `ga_q`, `ga_k` (cross-entropies), `d_q`, `d_k` (D's
    probability of "a query"), `accuracy_q`, `accuracy_k` (how many vectors D names rightly)."""
    # One backward pass for max_D and min_{P_Q}: D descends its cross-entropy; the queries pass through the
    # identity 2 sg(q) - q, whose gradient is -1, so that P_Q ascends it. The keys are constants.
    z_q, z_k = (full_precision(disc(x)) for x in ((2 * q.detach() - q)[s_mask], k.detach()[t_mask]))
    return dict(ga_q=F.softplus(-z_q).sum(), ga_k=F.softplus(z_k).sum(),  # -log D(q), -log(1 - D(k))
                d_q=z_q.detach().sigmoid().sum(), d_k=z_k.detach().sigmoid().sum(),
                accuracy_q=(z_q > 0).sum(), accuracy_k=(z_k <= 0).sum())

def ga_loss(disc, q, k, s_mask, t_mask):
    """L_KQ, eq. (14), as cross-entropy: D(q) -> 1, D(k) -> 0, each a mean over its side's real positions.

    Minimising it trains D; the gradient that reaches q (B, S, w) is reversed, k (B, T, w) gets none.
    disc maps (N, w) to N logits; s_mask (B, S) and t_mask (B, T) are True on real positions.
    """
    terms = ga_terms(disc, q, k, s_mask, t_mask)
    return terms["ga_q"] / s_mask.sum().clamp(min=1) + terms["ga_k"] / t_mask.sum().clamp(min=1)

# 7. Objective: the dual-space loss ==========================================================================
class HeadLosses(torch.autograd.Function):
    """Behind `head_losses`: forms each sum's gradient in the sum's own slice, while the logits are there, so
    that no product with a head is computed twice; the backward pass only weighs these gradients."""

    @staticmethod
    def forward(ctx, fn, step, softcaps, rows, *tensors):  # tensors: h_1, weight_1, bias_1, h_2, ...
        ctx.count, ctx.grads = len(tensors), {}  # grads[i, n]: gradient of sum i with respect to tensor n
        wanted = [n for n, need in enumerate(ctx.needs_input_grad[4:]) if need]
        tensors = [t if t is None else t.detach().requires_grad_(n in wanted) for n, t in enumerate(tensors)]
        sides = [(tensors[3 * j], Head(*tensors[3 * j + 1:3 * j + 3], c)) for j, c in enumerate(softcaps)]

        def one_slice(part):  # a function, so that a slice's logits are gone before the next one's come
            with torch.enable_grad():
                losses = fn(*(head(h[part]) for h, head in sides), *(row[part] for row in rows))
            for i, loss in enumerate(losses):
                if loss.requires_grad:
                    for n, grad in zip(wanted, torch.autograd.grad(
                            loss, [tensors[n] for n in wanted], retain_graph=True, allow_unused=True)):
                        if grad is not None:
                            ctx.grads[i, n] = ctx.grads[i, n].add_(grad) if (i, n) in ctx.grads else grad
            return [loss.detach() for loss in losses]

        slices = [one_slice(slice(start, start + step)) for start in range(0, max(len(tensors[0]), 1), step)]
        return tuple(sum(parts) for parts in zip(*slices))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        result = [None] * ctx.count
        for (i, n), grad in ctx.grads.items():
            result[n] = upstream[i] * grad if result[n] is None else result[n] + upstream[i] * grad
        return (None, None, None, None, *result)

def head_losses(fn, sides, rows=(), max_logits=2 ** 23):
    """Sums over N positions of losses of logits, with the logits of only a slice of the positions at a time.

    fn: (logits_1, ..., logits_J, *rows) -> tuple of scalars, each a sum over the positions it is given.
    sides: J pairs of hidden states (N, d_j) and `Head`. rows: further tensors (N, ...), sliced likewise.
    max_logits: how many logits of one side may exist at a time; it changes no result.
    """
    step = max(1, max_logits // max(len(head.weight) for _, head in sides))
    tensors = [t for h, head in sides for t in (h, head.weight, head.bias)]
    if not torch.is_grad_enabled():
        tensors = [t if t is None else t.detach() for t in tensors]
    return HeadLosses.apply(fn, step, [head.softcap for _, head in sides], rows, *tensors)

def cross_entropy_sum(logits, targets):
    """CE of eq. (9), for `head_losses`."""
    return (F.cross_entropy(logits, targets, reduction="sum"),)

def dual_space_losses(proj, h_s, h_t, s_in, s_tgt, t_in, t_tgt, s_mask, t_mask, E_s, E_t, W_s, W_t, *,
                      align="cma", chunks=None, div="skl", temperature=2.0, skew=0.1, correct_only=True,
                      s2t_div="kl", max_logits=2 ** 23):
    """Every term of eqs. (1)-(9), as sums over positions.

    Args:
        proj: `Projectors(d_s, d_t)`.
        h_s: (B, S, d_s), h_t: (B, T, d_t) last hidden states at the response positions.
        s_in, s_tgt: (B, S), t_in, t_tgt: (B, T) ids of the tokens that these positions read and predict.
        s_mask: (B, S), t_mask: (B, T) bool, True on real positions; padding is on the right.
        E_s, E_t: input embeddings, a table (V, d) or the model's own module (which may scale its table).
        W_s, W_t: prediction heads, a weight (V, d) or a `Head`.
        align: cma, eqs. (1)-(3) | clp, eq. (12) | cla, eq. (13); the last two need chunks: (B, S, T) bool.
        div, temperature, skew: f, see `divergence`.  s2t_div: f of KD^{s->t}.
        correct_only: KD^{t->s} counts only positions where argmax q^{t->s} is the gold token.
        max_logits: see `head_losses`.
    Returns:
        dict of sums `ce`, `ce_t2s`, `kd_t2s`, `kd_s2t`; `q` (B, S, 2 d_t), `k` (B, T, 2 d_t), `a_t2s`,
        `a_s2t`, see `cross_model_attention`; counts `n_s`, `n_t` of real positions, `n_correct` of right
        argmax q^{t->s}. ValueError: unknown align, or chunks missing.
    """
    if align not in ("cma", "clp", "cla") or align != "cma" and chunks is None:
        raise ValueError(f"dual_space_losses: found align={align!r}, chunks={chunks}; clp, cla need chunks")
    W_s, W_t = (W if isinstance(W, Head) else Head(W) for W in (W_s, W_t))
    s_in, s_tgt, t_in, t_tgt = (ids.masked_fill(~mask, 0) for ids, mask in (
        (s_in, s_mask), (s_tgt, s_mask), (t_in, t_mask), (t_tgt, t_mask)))
    h_s, h_t = zero_padding(h_s, s_mask), zero_padding(h_t.detach(), t_mask)
    with torch.no_grad():  # embeddings and all of the teacher are constants for the distillation terms
        e_s_in, e_s_tgt, e_t_in, e_t_tgt = (
            F.embedding(ids, E) if torch.is_tensor(E) else E(ids)
            for ids, E in ((s_in, E_s), (s_tgt, E_s), (t_in, E_t), (t_tgt, E_t)))
        k = std_normalise(torch.cat([e_t_in, e_t_tgt], -1), t_mask)                     # (2)
        v_in = std_normalise(h_t, t_mask) + std_normalise(e_t_tgt, t_mask)
    q = zero_padding(proj.query(torch.cat([e_s_in, e_s_tgt], -1)), s_mask)              # (1)
    if align == "clp":
        a_t2s, a_s2t = chunk_projection(chunks, s_mask, t_mask)                         # (12)
    else:
        inside = chunks if align == "cla" else None
        a_t2s, a_s2t = cross_model_attention(q, k, s_mask, t_mask, inside)              # (3), (13)
    v_s2t, v_t2s = proj.s2t(h_s), proj.t2s(v_in)                                        # (4), (5)
    h_t2s, h_s2t = a_t2s.to(v_t2s.dtype) @ v_t2s, a_s2t.to(v_s2t.dtype) @ v_s2t         # (6)

    def student_space(z_s, z_t2s, target, aligned):  # (7), (8) in the student's vocabulary
        constant = z_t2s.detach()  # CE^{t->s} alone trains P^{t->s}
        correct = (constant.argmax(-1) == target) & aligned
        # NOT IN PAPER: correct positions only (departure 1)
        kd = divergence(div, z_s, constant, temperature, skew) * (correct if correct_only else aligned)
        ce_t2s = F.cross_entropy(z_t2s, target, reduction="none") * aligned
        return *cross_entropy_sum(z_s, target), ce_t2s.sum(), kd.sum(), correct.sum()

    def teacher_space(z_s2t, z_t, aligned):  # (7), (8) in the teacher's vocabulary
        # NOT IN PAPER: forward KL by default (departure 2)
        return ((divergence(s2t_div, z_s2t, z_t, temperature, skew) * aligned).sum(),)

    rows_s = s_tgt[s_mask], (a_t2s > 0).any(-1)[s_mask]  # aligned: not without a chunk
    rows_t = ((a_s2t > 0).any(-1)[t_mask],)
    ce, ce_t2s, kd_t2s, n_correct = head_losses(
        student_space, [(h_s[s_mask], W_s), (h_t2s[s_mask], W_s.detach())], rows_s, max_logits)
    (kd_s2t,) = head_losses(
        teacher_space, [(h_s2t[t_mask], W_t.detach()), (h_t[t_mask], W_t.detach())], rows_t, max_logits)
    return dict(ce=ce, ce_t2s=ce_t2s, kd_t2s=kd_t2s, kd_s2t=kd_s2t, q=q, k=k, a_t2s=a_t2s, a_s2t=a_s2t,
                n_s=s_mask.sum(), n_t=t_mask.sum(), n_correct=n_correct)

# 8. Training ================================================================================================
def world():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def seed_torch(*numbers):
    """Seeds torch by what is computed (step and micro-batch; sampling seed and batch), not by what ran
    before: neither a restart nor the number of processes changes dropout or samples."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))

def autocast(device):
    """bf16 products on CUDA; float32 on the CPU, where bf16 is far slower."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

class Distiller(nn.Module):
    """Everything that is trained: the student and, with a teacher, projectors and discriminator."""

    def __init__(self, student, teacher, args):
        super().__init__()
        self.student, self.args, self.proj, self.disc = student, args, None, None
        if teacher is not None:
            d_s, d_t = (model.get_input_embeddings().weight.shape[1] for model in (student, teacher))
            self.proj = Projectors(d_s, d_t)
            if args.ga:
                self.disc = Discriminator(2 * d_t, dropout=0.1 if args.dropout is None else args.dropout)

    def forward(self, s, t, chunks, teacher, n_s, n_t):
        """One micro-batch's share of L_train, eq. (16), and its sums for the log.

        s, t: the student's and the teacher's `Side`. chunks: (B, S, T) bool or None. teacher: the frozen
        model, or None, like t, for plain training. n_s, n_t: response tokens of the *whole* optimiser step.
        """
        args, W_s, h_s = self.args, head_of(self.student), response_hidden(self.student, s)
        if teacher is None:
            (ce,) = head_losses(cross_entropy_sum, [(h_s[s.mask], W_s)], (s.targets[s.mask],))
            return ce / n_s, dict(ce=ce.detach())
        with torch.no_grad():
            h_t = response_hidden(teacher, t)
        out = dual_space_losses(
            self.proj, h_s, h_t, s.inputs, s.targets, t.inputs, t.targets, s.mask, t.mask,
            self.student.get_input_embeddings(), teacher.get_input_embeddings(), W_s, head_of(teacher),
            align=args.method, chunks=chunks, div=args.div, temperature=args.temperature, skew=args.skew,
            correct_only=not args.all_positions, s2t_div=args.s2t_div)
        loss = 0.5 * (out["ce"] + out["kd_s2t"] + out["kd_t2s"] + out["ce_t2s"]) / n_s      # (9)
        terms = {name: out[name] for name in ("ce", "ce_t2s", "kd_t2s", "kd_s2t", "n_correct")}
        if self.disc is not None:
            terms |= ga_terms(self.disc, out["q"], out["k"], s.mask, t.mask)
            loss = loss + args.ga_weight * (terms["ga_q"] / n_s + terms["ga_k"] / n_t)      # (14), (16)
        return loss, {name: term.detach() for name, term in terms.items()}

def parameter_groups(model, args):
    """AdamW's groups: each trainable parameter is in exactly one; biases and norms are not decayed."""
    groups = {}
    for name, parameter in model.named_parameters():  # lists a tied weight once
        lr = args.lr if name.startswith("student.") else args.lr_projectors
        groups.setdefault((lr, args.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [dict(params=params, lr=lr, weight_decay=decay) for (lr, decay), params in groups.items()]

def write_atomically(path, write):
    """`write(file)` into a temporary file, which replaces the path once it is on disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

def write_json(path, value):
    """The value as JSON, atomically."""
    write_atomically(path, lambda file: file.write(json.dumps(value, indent=1).encode()))

def save_model(model, tokenizer, folder):
    """Writes a folder that transformers' `from_pretrained` reads."""
    fresh = folder.with_name(folder.name + ".new")
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)

def open_run(folder, args):
    """What the folder's args.json holds, which is made if need be. InputError: it has other settings."""
    path, skip = folder / "args.json", NOT_IDENTITY | (TEACHER_ONLY if args.method == "sft" else set())
    settings = {name: value for name, value in sorted(vars(args).items()) if name not in skip}
    if path.exists():
        run = json.loads(path.read_text())
        old = run["settings"]
        differing = "; ".join(f"{name} was {old.get(name)}, is {value}" for name, value in settings.items()
                              if old.get(name) != value)
        if differing:
            raise InputError(f"{path}: found a run with other settings ({differing}), expected the same")
        return run
    run = dict(command=shlex.join(sys.argv), settings=settings, processes=world()[1], finished=False,
               torch=torch.__version__, transformers=transformers.__version__, python=sys.version)
    if world()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, run)
    return run

def append_log(path, lines):
    """Adds the dicts to a JSON-lines file, on rank 0."""
    if world()[0] == 0:
        with open(path, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

def log_lines(steps, seconds):
    """The log's lines from each step's (line, this process's sums on the device, gradient norm). Sums are
    added over processes and divided once, by student tokens (where the name ends in _k, by teacher
    tokens)."""
    names = list(steps[0][1])
    sums = torch.stack([torch.stack([mine[name].float() for name in names]) for _, mine, _ in steps])
    if dist.is_initialized():
        dist.all_reduce(sums)
    peak = (torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)  # kilobytes on Linux
    for (line, _, norm), values in zip(steps, sums.tolist()):
        n_s, n_t = line["tokens"], line.pop("teacher_tokens")
        line |= {name: value / (n_t if name.endswith("_k") else n_s) for name, value in zip(names, values)}
        line |= dict(grad_norm=norm.item(), tokens_per_s=n_s * len(steps) / seconds, memory_gb=peak)
    return [line for line, _, _ in steps]

def backward_passes(model, teacher, data, pads, micro_batches, step, args, device):
    """Leaves an optimiser step's gradient in the parameters; returns numbers and device sums for the log.

    data: lists of `Example`s, the student's and (with a teacher) the teacher's. pads: their padding ids.
    micro_batches: lists of row indices, of which this process takes its share.
    """
    rank, processes = world()
    counts = [sum(len(side[i].spans) for rows in micro_batches for i in rows) for side in data]
    sums, padded, read = {}, 0, 0
    for m in range(rank, len(micro_batches), processes):
        examples = [[side[i] for i in micro_batches[m]] for side in data]
        s, t = ([collate(rows, pad, device) for rows, pad in zip(examples, pads)] + [None])[:2]
        chunks = collate_chunks(*examples, device) if args.method in ("clp", "cla") else None
        padded, read = padded + s.ids.numel(), read + sum(len(example.ids) - 1 for example in examples[0])
        seed_torch(args.seed, step, m)
        # gradients are exchanged once a step, in the backward pass of the process's last micro-batch
        wait = processes > 1 and m + processes < len(micro_batches)
        with model.no_sync() if wait else contextlib.nullcontext():
            with autocast(device):
                loss, terms = model(s, t, chunks, teacher, counts[0], counts[-1])
            (loss * processes).backward()  # DistributedDataParallel takes the mean; the counts are global
        for name, value in (terms | dict(loss=loss.detach() * counts[0])).items():
            sums[name] = sums.get(name, 0) + value
    return dict(tokens=counts[0], teacher_tokens=counts[-1], padding=1 - read / padded), sums

def train(args, folder, device, teacher_source=None):
    """Trains args.student with the teacher (None: plain fine-tuning); returns its best checkpoint's path.

    Writes args.json, log.jsonl, best/ and state.pt into the folder, and goes on from state.pt if it is there.
    InputError: sizes that do not divide, too few rows. FloatingPointError: a term is not finite.
    """
    rank, processes = world()
    if args.batch_size % (args.micro_batch * processes):
        raise InputError(f"--batch-size: found {args.batch_size}, expected a multiple of --micro-batch times "
                         f"processes, {args.micro_batch} x {processes}")
    run = open_run(folder, args)
    if run["finished"]:
        return folder / "best"
    tokenizers = [load_tokenizer(source) for source in (args.student, teacher_source) if source]
    rows = read_rows(fetch(f"{args.data}/raw.jsonl"))
    dev_rows, dev = rows[:args.dev_rows], encode(tokenizers[0], rows[:args.dev_rows], args.max_length)
    data, dropped = training_data(rows[args.dev_rows:], tokenizers, args.max_prompt, args.max_length)
    if len(data[0]) < args.batch_size:
        raise InputError(f"{args.data}/raw.jsonl: found {len(data[0])} training rows within the limits, "
                         f"expected at least {args.batch_size}, --batch-size")
    lengths = [sum(len(example.ids) for example in pair) for pair in zip(*data)]
    pads = [tokenizer.eos_token_id for tokenizer in tokenizers]
    epoch_steps = len(data[0]) // args.batch_size
    total_steps = max(1, round(args.epochs * epoch_steps))

    seed_torch(args.seed)
    student, teacher = load_model(args.student, tokenizers[0], device, torch.float32, args.dropout), None
    if teacher_source:
        teacher = load_model(teacher_source, tokenizers[1], device).requires_grad_(False)
    model = Distiller(student, teacher, args).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps, eta_min=1e-7)
    parts = dict(model=model, optimizer=optimizer, schedule=schedule)
    done, best, state_path, log_path = 0, -1.0, folder / "state.pt", folder / "log.jsonl"
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done, best = state["step"], state["best"]
    if rank == 0:  # the lines of steps that will be done again go
        kept = [line for line in open(log_path) if json.loads(line)["step"] <= done] if done else []
        write_atomically(log_path, lambda file: file.write("".join(kept).encode()))
    parallel = nn.parallel.DistributedDataParallel(model) if processes > 1 else model

    def validate(step):
        """Logs dev loss and ROUGE-L; keeps the student if it is the best so far."""
        nonlocal best
        model.eval()
        texts = generate(student, tokenizers[0], [row.prompt for row in dev_rows], args.seed, args)
        scores = rouge_l(texts, [row.references for row in dev_rows])
        loss = dev_loss(model, [example for example in dev if example.spans], device, args.micro_batch)
        append_log(log_path, [dict(step=step, dev_loss=loss) | {f"dev_{k}": v for k, v in scores.items()}])
        if rank == 0 and scores["rougeL"] > best:
            save_model(student, tokenizers[0], folder / "best")
        best = max(best, scores["rougeL"])

    if done == 0:
        append_log(log_path, [dict(step=0, steps=total_steps, rows=len(data[0]), dropped=dropped)])
        validate(0)
    sizes = lengths, args.batch_size, args.micro_batch, args.seed
    plan = itertools.chain.from_iterable(plan_epoch(*sizes, epoch) for epoch in itertools.count())
    bar = tqdm(itertools.islice(plan, done, total_steps), desc=folder.name, total=total_steps, initial=done,
               disable=None if rank == 0 else True)
    pending, since = [], time.perf_counter()
    for step, micro_batches in enumerate(bar, done + 1):
        model.train()
        line, sums = backward_passes(parallel, teacher, data, pads, micro_batches, step, args, device)
        norm, lr = nn.utils.clip_grad_norm_(model.parameters(), args.clip), schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        pending.append((dict(step=step, epoch=step / epoch_steps, lr=lr) | line, sums, norm))
        epoch_ends = step % epoch_steps == 0 or step == total_steps
        saves = epoch_ends or step % args.save_every == 0
        if saves or step % args.log_every == 0:
            lines = log_lines(pending, time.perf_counter() - since)
            append_log(log_path, lines)
            if rank == 0 and bar.disable:
                print(folder.name, *(f"{name} {x:.4g}" for name, x in lines[-1].items()), flush=True)
            broken = {name: line["step"] for line in lines for name in line if not math.isfinite(line[name])}
            if broken:
                raise FloatingPointError(f"{log_path}: found terms that are not finite, at steps {broken}")
        if epoch_ends:
            validate(step)
        if saves and rank == 0:
            state = {name: part.state_dict() for name, part in parts.items()} | dict(step=step, best=best)
            write_atomically(state_path, lambda file: torch.save(state, file))
        if saves or step % args.log_every == 0:
            pending, since = [], time.perf_counter()
    if rank == 0:
        write_json(folder / "args.json", run | dict(finished=True))
    if processes > 1:
        dist.barrier()
    return folder / "best"

@torch.no_grad()
def dev_loss(model, examples, device, batch_size):
    """The student's cross-entropy a response token, over all processes. model: `Distiller`."""
    rank, processes = world()
    order, total = sorted(examples, key=lambda example: len(example.ids)), torch.zeros(2, device=device)
    for start in range(rank * batch_size, len(order), processes * batch_size):
        side = collate(order[start:start + batch_size], 0, device)
        with autocast(device):
            total += torch.stack([model(side, None, None, None, 1, 1)[0], side.mask.sum()])
    if processes > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()

# 9. Evaluation ==============================================================================================
@torch.no_grad()
def generate(model, tokenizer, prompts, seed, args, no_repeat_ngram=0):
    """A response to each prompt, sampled at temperature 1; the same for any number of processes."""
    rank, processes = world()
    lead, end = leading_tokens(tokenizer), tokenizer.eos_token_id
    encoded = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    # NOT IN PAPER: a prompt over the limit keeps its end, where the cue for the response is (departure 7)
    encoded = [lead + ids[max(0, len(ids) + len(lead) - args.max_prompt):] for ids in encoded]
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    batches = [order[i:i + args.eval_batch] for i in range(0, len(order), args.eval_batch)]
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, eos_token_id=end, pad_token_id=end,
        max_new_tokens=args.max_new_tokens, no_repeat_ngram_size=no_repeat_ngram)
    texts = []
    for b in range(rank, len(batches), processes):
        width = len(encoded[batches[b][0]])
        gaps = [width - len(encoded[i]) for i in batches[b]]
        ids = torch.tensor([[end] * gap + encoded[i] for gap, i in zip(gaps, batches[b])])
        mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
        seed_torch(seed, b)
        with autocast(model.device):
            out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                                 generation_config=config)
        texts += zip(batches[b], tokenizer.batch_decode(out[:, width:], skip_special_tokens=True))
    if processes > 1:
        shares = [None] * processes
        dist.all_gather_object(shares, texts)
        texts = itertools.chain(*shares)
    return [text for _, text in sorted(texts)]

def rouge_l(predictions, references):
    """ROUGE-L F1 with Porter's stemmer, exact match of lower-case text without punctuation, as in MiniLLM.

    predictions: N texts; references: N lists of texts, of which the best counts. Returns `rougeL` and
    `exact_match`, means in percent. ValueError: the two differ in number.
    """
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)

    def normal(text):
        return text.lower().translate(str.maketrans("", "", string.punctuation)).split()

    pairs = list(zip(predictions, references, strict=True))
    rouge = [max(scorer.score(ref, text)["rougeL"].fmeasure for ref in refs) for text, refs in pairs]
    exact = [any(normal(ref) == normal(text) for ref in refs) for text, refs in pairs]
    return dict(rougeL=100 * statistics.fmean(rouge), exact_match=100 * statistics.fmean(exact))

def read_test_sets(args):
    """The rows of each test set, by name. InputError for what is not NAME=FILE."""
    sets = {}
    for item in args.tests:
        name, _, source = item.partition("=")
        if not re.fullmatch(r"[\w-]+", name) or not source:
            raise InputError(f"--tests: found {item!r}, expected NAME=FILE, NAME of letters, digits, - and _")
        sets[name] = read_rows(fetch(source), args.eval_limit)
    return sets

def evaluate(args, source, folder, device):
    """Samples and scores each test set once a seed; writes predictions/ and eval.json into the folder.
    Returns metric -> test set, OOD and All (means over sets) -> percentages, one a seed."""
    rank, sets, tokenizer = world()[0], read_test_sets(args), load_tokenizer(source)
    model, result = load_model(source, tokenizer, device), dict(rougeL={}, exact_match={})
    jobs = [(name, seed) for name in sets for seed in args.eval_seeds]
    for name, seed in tqdm(jobs, desc=f"evaluate {folder.name}", disable=None if rank == 0 else True):
        prompts, references = zip(*sets[name])
        texts = generate(model, tokenizer, list(prompts), seed, args, args.no_repeat_ngram)
        for metric, value in rouge_l(texts, references).items():
            result[metric].setdefault(name, []).append(value)
        if rank == 0:
            (folder / "predictions").mkdir(parents=True, exist_ok=True)
            with open(folder / "predictions" / f"{name}-{seed}.jsonl", "w") as file:
                file.writelines(json.dumps(row._asdict() | dict(prediction=text)) + "\n"
                                for row, text in zip(sets[name], texts))
    for by_set in result.values():
        by_set |= averages(by_set)
    if rank == 0:
        write_json(folder / "eval.json", dict(model=source, seeds=args.eval_seeds) | result)
    return result

# Table 1 of the paper: Dolly, SelfInst, Vicuna, S-NI, UnNI
PAPER = {
    "untrained": (6.39, 4.72, 10.18, 4.49, 4.64), "teacher": (27.45, 19.42, 20.93, 34.74, 35.98),
    "sft": (22.83, 9.49, 14.66, 13.55, 16.06), "cma-srkl": (24.64, 11.50, 16.21, 18.40, 21.69),
    "cma-kl": (24.13, 9.73, 15.20, 15.14, 17.78), "cma-ga-kl": (24.92, 11.17, 15.84, 18.19, 21.50),
    "cma-ga-skl": (24.79, 11.82, 15.95, 19.44, 22.05)}

def averages(by_set):
    """OOD, the mean over all sets but the first, and All, over every set, from name -> values of seeds."""
    columns = list(by_set.values())
    return {name: [statistics.fmean(values) for values in zip(*part)]
            for name, part in (("OOD", columns[1:]), ("All", columns)) if part}

def results_table(results):
    """ROUGE-L in Markdown: a row a run, mean ± standard deviation over sampling seeds; the paper's below."""
    names = list(next(iter(results.values()))["rougeL"])
    rows = [["ROUGE-L", *names], ["---"] * (len(names) + 1)]
    for run, result in results.items():
        rows.append([run] + [f"{np.mean(v):.2f}" + (f" ± {np.std(v, ddof=1):.2f}" if len(v) > 1 else "")
                             for v in result["rougeL"].values()])
        if run in PAPER and names[:-2] == [item.partition("=")[0] for item in TEST_SETS]:
            paper = {name: [value] for name, value in zip(names, PAPER[run])}
            rows.append([f"{run} (paper)"] + [f"{v[0]:.2f}" for v in (paper | averages(paper)).values()])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

# 10. Demo: everything above, on tasks, tokenizers and models made here ====================================
NOUNS = "apple basket candle dragon engine forest garden hammer island jacket kettle ladder mirror".split()
ADJECTIVES = "red brown white green grey dark lush heavy remote warm hot tall shiny".split()

def demo_row(rng, longer):
    """One task, from recalling a fact (easy) to adding numbers (hard); out of distribution if longer."""
    nouns = rng.sample(NOUNS, rng.randint(5, 6) if longer else rng.randint(2, 4))
    a, b = (rng.randint(100, 199) if longer else rng.randint(10, 99) for _ in range(2))
    words = " ".join(nouns)
    task, output = rng.choice([
        (f"Describe: {words}", " and ".join(f"{ADJECTIVES[NOUNS.index(noun)]} {noun}" for noun in nouns)),
        (f"Repeat twice: {words}", f"{words} {words}"),
        (f"Say in reverse: {words}", " ".join(reversed(nouns))),
        (f"Number from {a}: {words}", " ".join(f"{n} {noun}" for n, noun in enumerate(nouns, a))),
        (f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}"),
        (f"Count on from {a}", " ".join(str(a + i) for i in range(1, len(nouns) + 2))),
        (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}")])
    return dict(prompt=f"Task: {task}\nAnswer:\n", output=output)

def write_demo(folder, seed):
    """Writes the demo's rows, two byte-level BPE tokenizers and two untrained models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    rng = random.Random(seed)
    rows = {name: [demo_row(rng, name == "longer") for _ in range(count)]
            for name, count in (("raw", 4100), ("seen", 200), ("longer", 200))}
    folder.mkdir(parents=True, exist_ok=True)
    for name in rows:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    # The student's tokenizer cuts up words and keeps numbers; the teacher's keeps words and cuts up numbers.
    student = transformers.GPT2Config(n_positions=256, n_embd=64, n_layer=2, n_head=4)
    teacher = transformers.Qwen2Config(
        max_position_embeddings=256, hidden_size=160, intermediate_size=480, num_hidden_layers=4,
        num_attention_heads=5, num_key_value_heads=5, initializer_range=0.05)
    cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    for name, config, size, cut in (("student", student, 420, cuts[1:]), ("teacher", teacher, 700, cuts)):
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(cut)
        bpe.decoder = decoders.ByteLevel()
        bpe.train_from_iterator((text for row in rows["raw"] for text in row.values()), trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<|endoftext|>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
        config.vocab_size, config.bos_token_id, config.eos_token_id = len(tokenizer), 0, 0
        seed_torch(seed)
        save_model(AutoModelForCausalLM.from_config(config), tokenizer, folder / name)

def demo(args, device):
    """The scores of untrained and SFT student, CMA, CMA-GA and teacher, by the code of the paper's runs."""
    folder = pathlib.Path(args.out) / "demo"
    if world()[0] == 0 and not (folder / "teacher").exists():
        write_demo(folder, args.seed)
    if dist.is_initialized():
        dist.barrier()
    base = vars(args) | dict(
        data=str(folder), student=str(folder / "student"), teacher=str(folder / "teacher"),
        out=str(folder / "runs"), tests=[f"{name}={folder / name}.jsonl" for name in ("seen", "longer")],
        dev_rows=100, eval_seeds=[10, 20, 30], max_new_tokens=40, no_repeat_ngram=0, eval_batch=200,
        log_every=25, micro_batch=16, teacher_epochs=8, teacher_lr=2e-3, epochs=4, lr=2e-3,
        lr_projectors=2e-3)
    runs = {"untrained": dict(eval_only=base["student"]), "sft": dict(method="sft"), "cma-skl": dict(),
            "cma-ga-skl": dict(ga=True), "teacher": dict(eval_only=str(folder / "runs" / "teacher" / "best"))}
    return {run: experiment(argparse.Namespace(**base | settings), device) for run, settings in runs.items()}

# 11. Main ===================================================================================================
def run_name(args):
    """What a run is called in tables."""
    if args.name or args.eval_only or args.method == "sft":
        return args.name or (args.eval_only and "-".join(pathlib.Path(args.eval_only).parts[-2:])) or "sft"
    return "-".join([args.method, *["ga"] * args.ga, args.div])

def experiment(args, device):
    """The scores of one run: fine-tunes the teacher if need be, trains, evaluates the best checkpoint."""
    out, source, teacher = pathlib.Path(args.out), args.eval_only, None
    folder = out / (run_name(args) if args.name or source else f"{run_name(args)}-{args.seed}")
    read_test_sets(args)  # a wrong file is told now, not after hours of training
    if not source and args.method != "sft":
        teacher = args.teacher
        if not args.teacher_ready:
            tuning = dict(method="sft", student=teacher, epochs=args.teacher_epochs, lr=args.teacher_lr)
            teacher = str(train(argparse.Namespace(**vars(args) | tuning), out / "teacher", device))
    return evaluate(args, source or str(train(args, folder, device, teacher)), folder, device)

def main(argv=None):
    """Runs the command line; returns the scores by run."""
    args = build_parser().parse_args(argv)
    if args.ga and args.method == "sft":
        raise InputError("--ga: found --method sft, expected a method with a teacher")
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        results = demo(args, device) if args.demo else {run_name(args): experiment(args, device)}
        if world()[0] == 0:
            print(results_table(results))
            print(f"Checkpoints, logs, predictions and scores are in {pathlib.Path(args.out).resolve()}")
        return results
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"dskd_ga.py: {error}", file=sys.stderr)
        sys.exit(2)
