#!/usr/bin/env python3
"""DSKD-CMA-GA: distil a large language model into a small one that has another tokenizer.

Reference implementation of "Dual-Space Knowledge Distillation with Key-Query Matching for Large Language
Models with Vocabulary Mismatch" (Tsiapali, Do, Knill; ICASSP 2026; arXiv:2603.22056 v1), in one file.

    python dskd_ga.py --demo                                 # 2 CPU cores, minutes, no download
    python dskd_ga.py --div skl --ga                         # one GPU, the paper's setting
    torchrun --nproc_per_node=4 dskd_ga.py --div skl --ga    # the same run on four

Contents: 1 arguments, 2 data, 3 models, 4 divergences, 5 alignment, 6 key-query matching, 7 objective,
8 training, 9 evaluation and report, 10 alignment analysis, 11 demo, 12 main. Sections 4-7 are the paper, as
functions of tensors; the baselines stand beside the methods that they are compared with.

Departures from the paper (marked "NOT IN PAPER" where they happen)
  1. KD^{t->s} counts only positions where argmax q^{t->s} is the gold token, as in the authors' code;
     --all-positions gives eq. (8) to the letter.
  2. KD^{s->t} is forward KL whatever --div is, as in the authors' code; --s2t-div changes it.
  3. N_std is over each sequence's own real positions, so that a loss depends on neither padding nor batch.
  4. Chunks are built on target tokens, which are what the positions predict.
  5. D and the critic are trained, as eqs. (14) and (15) say, at the projectors' learning rate; L_KQ is a mean
     over the real positions of the optimiser step. In the authors' code they keep their random start, and
     L_KQ is divided by the token count once more: --released-kq.
  6. The rows of a batch are sorted by length before they are cut into micro-batches; an epoch's last,
     incomplete batch is left out.
  7. Prompts get the special tokens that their tokenizer puts in front (none for GPT-2 and Qwen); at
     evaluation, a prompt over the limit keeps its end.
  8. --normalise-queries gives queries the N_std that eq. (2) gives keys; off by default.
  9. MinED: a teacher token over two edits from every student token is mapped to none.

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
  c, phi              Critic         2 d_t -> unit vector  (15): critic and navigator
"""
import argparse, contextlib, hashlib, html, itertools, json, math, os, pathlib, pickle, random, re, resource
import shlex, shutil, signal, statistics, string, sys, time, unicodedata
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from huggingface_hub import hf_hub_download
from rouge_score import rouge_scorer
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

# 1. Arguments: the defaults are the paper's setting =========================================================
TEST_SETS = ["Dolly=MiniLLM/dolly/valid.jsonl", "SelfInst=MiniLLM/self-inst/valid.jsonl",
             "Vicuna=MiniLLM/Vicuna/valid.jsonl", "S-NI=MiniLLM/sinst/11_/valid.jsonl",
             "UnNI=MiniLLM/uinst/11_/valid.jsonl"]
ALIGNED, SAME_TOKENIZER = ("cma", "clp", "cla"), ("kd", "dskd")
DUAL_SPACE = (*ALIGNED, "dskd")
METHODS = (*DUAL_SPACE, "sft", "kd", "uld", "mined")
DEV_ALIGNED = 48  # development rows of the alignment analysis
# What an evaluation depends on; what may differ when a run is taken up again; what fine-tuning does not heed.
EVALUATION = ("tests", "eval_seeds", "eval_limit", "max_prompt", "max_new_tokens",
              "no_repeat_ngram")
NOT_IDENTITY = {"out", "name", "demo", "eval_only", "tests", "eval_seeds", "eval_limit", "no_repeat_ngram",
                "log_every", "save_every", "align", "report", "baseline", "cache_teacher",
                "eval_tokens", "fresh"}
TEACHER_ONLY = {"teacher", "teacher_ready", "teacher_epochs", "teacher_lr", "div", "ga", "ct", "released_kq",
                "kq_weight", "temperature", "skew", "all_positions", "s2t_div", "normalise_queries",
                "lr_projectors"}

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
    g.add_argument("--method", choices=METHODS, default="cma",
                   help="cma: attention, eq. (3); clp, cla: chunks, eqs. (12), (13); sft: no teacher; dskd, "
                        "kd: one tokenizer, no attention; uld, mined: logits by rank, by edit distance")
    g.add_argument("--ga", action="store_true", help="add the adversary on keys and queries, eq. (14)")
    g.add_argument("--ct", action="store_true", help="add conditional transport between them, eq. (15)")
    g.add_argument("--div", choices=DIVERGENCES, default="skl", help="f of KD^{t->s}; try srkl without --ga")
    g.add_argument("--demo", action="store_true",
                   help="other defaults: small tasks and models, made on the spot in --out, runs/demo")
    g.add_argument("--eval-only", metavar="MODEL", help="evaluate this folder or hub id, train nothing")
    g.add_argument("--align", metavar="N", type=int, default=0,
                   help="write alignment.html with N rows: of the run, or of those of --report side by side")
    g.add_argument("--report", metavar="RUN", nargs="+", help="print the table of finished runs' folders")
    g.add_argument("--baseline", metavar="NAME", help="with --report: differences to the runs of that name")
    g.add_argument("--out", metavar="FOLDER", default="runs", help="where runs go; they share a teacher")
    g.add_argument("--fresh", action="store_true", help="start over; the old run's folder gets another name")
    g.add_argument("--name", help="the run's folder in it; made of method, div and seed if not given")
    g = parser.add_argument_group("models: folders or hub ids of causal language models")
    g.add_argument("--student", default="openai-community/gpt2", help="the model to train")
    g.add_argument("--teacher", default="Qwen/Qwen1.5-1.8B", help="the model to learn from")
    g.add_argument("--teacher-ready", action="store_true", help="do not fine-tune it on --data first")
    g.add_argument("--cache-teacher", metavar="FOLDER",
                   help="keep its hidden states there, so that it reads the rows once (Dolly: 3.6 GB)")
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
    g.add_argument("--kq-weight", type=float, default=1.0, help="factor of L_KQ in eq. (16)")
    g.add_argument("--released-kq", action="store_true",
                   help="as in the authors' code: D or critic keeps its random start, L_KQ is divided twice")
    g.add_argument("--normalise-queries", action="store_true",
                   help="N_std(Q) as for K; try it: queries start some 14 times smaller than keys")
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
    g.add_argument("--seed", type=int, default=10,
                   help="of initialisation, row order, dropout, dev sampling; the teacher's own is always 10")
    g.add_argument("--save-every", type=int, default=500, help="steps between saves, besides one an epoch")
    g.add_argument("--log-every", type=int, default=10, help="steps whose log lines are written together")
    g = parser.add_argument_group("evaluation: sampling at temperature 1")
    g.add_argument("--tests", metavar="NAME=FILE", nargs="+", default=TEST_SETS,
                   help="local files or ORG/DATASET/FILE of the hub; OOD is the mean of all but the first")
    g.add_argument("--eval-seeds", type=int, nargs="+", default=[10, 20, 30, 40, 50], help="a sampling each")
    g.add_argument("--eval-limit", type=int, help="first rows of each test set only, for a quick look")
    g.add_argument("--eval-tokens", type=int, default=2 ** 15, help="at a time; fewer if memory is short")
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
    ids: list    # prompt, response, end of text; cut at the length limit, but not inside a character
    start: int   # where the response begins
    spans: list  # (start, end) of each response token in the response's characters; end of text: (-1, -1)
    chunk: list  # the number of each response token's chunk, eq. (10); negative: none

class Side(NamedTuple):
    """A padded batch for one model: B sequences with up to n response positions."""
    ids: torch.Tensor      # (B, L) what the trunk reads
    pos: torch.Tensor      # (B, n) where in it the response positions are
    mask: torch.Tensor     # (B, n) bool, True on real positions
    real: torch.Tensor     # (N,) where in the flattened mask it is True
    inputs: torch.Tensor   # (B, n) the token read there
    targets: torch.Tensor  # (B, n) the token predicted there, one of the response's
    chunk: torch.Tensor    # (B, n) the number of that token's chunk; negative: none

def fetch(source):
    """Path of a data file: a local file, or ORG/DATASET/FILE from the hub (downloaded once). InputError: the
    hub does not have it or cannot be reached."""
    parts = source.split("/", 2)
    if os.path.isfile(source) or len(parts) < 3 or os.path.isdir(os.path.dirname(source)):
        return source
    try:
        return hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{source}: found {reason[:300]}, expected a file, here or on the hub") from None

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
            raise InputError(f"{path}, line {number}, {field}: found {repr(found)[:80]}, expected {expected}")

    def is_text(value):  # half a surrogate pair is no character, and no tokenizer takes it
        return isinstance(value, str) and value and not re.search("[\ud800-\udfff]", value)

    rows, number = [], 1
    with open(path, "rb") as file:
        for number, line in enumerate(itertools.islice(file, limit), 1):
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: found {error}, expected a JSON object") from None
            check(isinstance(row, dict), "JSON", row, "an object")
            field = "prompt" if "prompt" in row else "instruction"
            text, context, output = row.get(field), row.get("input", ""), row.get("output")
            check(is_text(text), field, text, "a text of whole characters that is not empty")
            check(context == "" or is_text(context), "input", context, "a text of whole characters")
            references = output if isinstance(output, list) else [output]
            check(references and all(map(is_text, references)), "output", output,
                  "a text of whole characters that is not empty, or a list of such")
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
    for row, prompt, ids, spans in zip(rows, prompts, responses["input_ids"], responses["offset_mapping"]):
        text, start = row.references[0], len(lead + prompt)
        if not text.isascii():  # a letter and its combining marks are one: a tokenizer may join them
            ends = list(range(len(text) + 1))
            for i in reversed(range(len(text))):
                ends[i] = ends[i + 1] if unicodedata.combining(text[i]) else i
            spans = [(first, ends[last]) for first, last in spans]
        ids, spans = lead + prompt + ids + [tokenizer.eos_token_id], [*spans, (-1, -1)]
        room = min(len(spans), max(0, max_length - start))
        while 0 < room < len(spans) and 0 <= spans[room][0] < spans[room - 1][1]:
            room -= 1
        examples.append(Example(ids[:start + room], start, spans[:room], [-1] * room))
    return examples

def token_texts(tokenizer):
    """The text of each id, as MinED compares them: pieces of bytes or characters, spaces written alike."""
    return [text.replace("▁", "Ġ") for text in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]

def training_data(rows, tokenizers, max_prompt, max_length, method="cma"):
    """A list of `Example`s for each tokenizer, the student's first, with chunk numbers (mined: of single
    matches), without the rows whose prompt is over the limit (in the student's tokens) or leaves no room for
    a response; and which rows were kept. InputError: kd or dskd, and the tokenizers differ."""
    sides = [encode(tokenizer, rows, max_length) for tokenizer in tokenizers]
    keep = [i for i in range(len(rows))
            if sides[0][i].start <= max_prompt and all(side[i].spans for side in sides)]
    sides = [[side[i] for i in keep] for side in sides]
    if method in SAME_TOKENIZER and [e.ids for e in sides[0]] != [e.ids for e in sides[-1]]:
        raise InputError(f"--method {method}: found different tokens of one text, expected one tokenizer")
    texts = [token_texts(tokenizer) for tokenizer in tokenizers if method == "mined"]
    for i in range(len(keep) if len(sides) == 2 else 0):
        if method == "mined":
            numbers = matched_alone(*([text[token] for token in side[i].ids[side[i].start:]]
                                      for text, side in zip(texts, sides)))
        else:
            numbers = chunk_numbers(*(side[i].spans for side in sides))
        for side, chunk in zip(sides, numbers):
            side[i] = side[i]._replace(chunk=chunk.tolist())
    return sides, keep

def mined_vocabulary(tokenizers, size):
    """`token_map` from the second tokenizer, the teacher's, to the first, padded to the teacher's head."""
    ids = token_map(*map(token_texts, tokenizers))
    ids[tokenizers[1].eos_token_id] = tokenizers[0].eos_token_id  # however the two spell it
    return torch.tensor(ids + [-1] * (size - len(ids)))

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
    ids, chunk = (nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), True, value) for rows, value in (
        ([e.ids for e in examples], pad), ([e.chunk for e in examples], -1)))
    starts, counts = torch.tensor([(e.start, len(e.spans)) for e in examples])[:, :, None].unbind(1)
    index = torch.arange(int(counts.max()))[None]
    mask = index < counts
    pos = (starts - 1 + index) * mask
    side = Side(ids[:, :-1], pos, mask, real_positions(mask), ids.gather(1, pos), ids.gather(1, pos + 1),
                chunk)
    if device.type == "cuda":
        side = Side(*(x.pin_memory().to(device, non_blocking=True) for x in side))
    return side

def chunks_of(s, t):
    """M^{t->s} of eq. (11) for a batch's two `Side`s, (B, S, T) bool."""
    return (s.chunk[:, :, None] == t.chunk[:, None]) & s.mask[:, :, None] & t.mask[:, None]

# 3. Models: trunk, head and embeddings of any causal language model =========================================
class Head(NamedTuple):
    """A prediction head: logits = softcap(h W^T + bias), softcap(z) = c tanh(z / c)."""
    weight: torch.Tensor              # (V, d)
    bias: torch.Tensor | None = None  # (V,)
    softcap: float | None = None      # c; None: no cap

    def __call__(self, h):  # (..., d) -> (..., V)
        return capped(F.linear(h, self.weight, self.bias), self.softcap)

    def detach(self):
        return Head(self.weight.detach(), None if self.bias is None else self.bias.detach(), self.softcap)

def capped(logits, softcap):
    """The product's logits in float32, whatever it is computed in, with the cap if there is one."""
    logits = full_precision(logits)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)

def head_of(model):
    """The model's own `Head`, sharing its parameters."""
    module = model.get_output_embeddings()
    return Head(module.weight, module.bias, getattr(model.config, "final_logit_softcapping", None))

def response_hidden(model, side):
    """h: the last hidden states, after the final norm, at the response positions, (B, n, d)."""
    # Padding is on the right and attention is causal: no real position sees padding, so no mask is needed.
    hidden = model.get_decoder()(input_ids=side.ids, use_cache=False).last_hidden_state
    return hidden.gather(1, side.pos[..., None].expand(-1, -1, hidden.shape[-1]))

def load(kind, source, **options):
    """`kind.from_pretrained(source)`. InputError names the source if that fails; no code of it is run."""
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{source}: found {reason[:300]}, expected what {kind.__name__} loads") from None

def load_tokenizer(source):
    """A fast tokenizer with an end-of-text token; InputError for any other."""
    tokenizer = load(AutoTokenizer, source)
    if not tokenizer.is_fast:
        raise InputError(f"{source}: found a tokenizer without character offsets, expected a fast one")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{source}: found no end-of-text token, expected eos_token in tokenizer_config.json")
    return tokenizer

@torch.no_grad()
def load_model(source, tokenizer, device, dtype=None, dropout=None):
    """A causal language model in evaluation mode, in dtype (default: the device's `precision`), with
    every dropout rate set (default: its own). InputError if weights are missing, if it has fewer embeddings
    than the tokenizer has tokens, or if its own logits are not what its trunk and its `Head` give."""
    dtype = dtype or precision(device)
    config = load(AutoConfig, source)
    for key, value in config.to_dict().items():
        if dropout is not None and "drop" in key and isinstance(value, float):
            setattr(config, key, dropout)
    model, info = load(AutoModelForCausalLM, source, config=config, dtype=dtype, use_safetensors=True,
                       output_loading_info=True)
    model, size = model.to(device).eval(), len(model.get_input_embeddings().weight)
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing or model.get_output_embeddings() is None:
        raise InputError(f"{source}: found no {missing or 'head'}, expected a whole causal language model")
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

def real_positions(mask):
    """(N,) where in the flattened mask (B, n) it is True. To know N, a CUDA device must be waited for."""
    return mask.flatten().nonzero()[:, 0]

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

def align_positions(align, q, k, s_mask, t_mask, chunks=None):
    """A^{t->s}, A^{s->t} by name: cma, eq. (3) | clp, (12) | cla, (13) | dskd, position by position."""
    if align == "dskd":
        a = torch.diag_embed(s_mask.float())
        return a, a
    if align == "clp":
        return chunk_projection(chunks, s_mask, t_mask)
    return cross_model_attention(q, k, s_mask, t_mask, chunks if align == "cla" else None)

def chunk_numbers(s_spans, t_spans):
    """For the tokens of either side of one row, (n_s,) and (n_t,), the number of their chunk, eq. (10), the
    minimal span of text that begins and ends between tokens of both sides. Arguments of `chunk_alignment`."""
    def cuts(spans):  # where tokens end, but not inside a character: there, the next token starts before that
        text = [(start, end) for start, end in spans if end >= 0]
        return {end for (_, end), (after, _) in zip(text, text[1:] + [(math.inf, 0)]) if after >= end}

    def number(spans, nowhere):  # tokens of one chunk have equally many cuts before them
        ends = torch.tensor([end for _, end in spans], dtype=torch.long)
        ids = torch.searchsorted(common, ends)
        return torch.where(ends < 0, len(common), torch.where(ids < len(common), ids, nowhere))

    # NOT IN PAPER: target tokens (departure 4)
    common = torch.tensor(sorted(cuts(s_spans) & cuts(t_spans)), dtype=torch.long)
    return number(s_spans, -1), number(t_spans, -2)

def chunk_alignment(s_spans, t_spans):
    """M^{t->s} of eq. (11) for one row, bool (n_s, n_t): tokens in the same chunk.

    Spans are the (start, end) characters of a side's *target* tokens, in order; end of text is (-1, -1).
    Tokens after the last common cut (one side was truncated) are in no chunk.
    """
    s, t = chunk_numbers(s_spans, t_spans)
    return s[:, None] == t[None]

def edit_distances(s_texts, t_texts):
    """Levenshtein distances (n_s, n_t) of all pairs of the texts."""
    s_length, t_length = (np.array([len(text) for text in texts]) for texts in (s_texts, t_texts))
    s_codes, t_codes = (np.array([[ord(c) for c in text.ljust(length.max(), "\0")] for text in texts])
                        for texts, length in ((s_texts, s_length), (t_texts, t_length)))
    columns = np.arange(t_codes.shape[1] + 1, dtype=np.int16)
    row = np.tile(columns[:, None, None], (1, len(s_texts), len(t_texts)))
    result = np.empty_like(row[0])
    for i in range(s_codes.shape[1] + 1):  # row[j]: distances between the first i and the first j characters
        if i:
            last, row = row, np.full_like(row, i)
            for j in range(1, len(row)):
                replaced = last[j - 1] + (s_codes[:, i - 1, None] != t_codes[:, j - 1])
                row[j] = np.minimum(replaced, np.minimum(last[j], row[j - 1]) + 1)
        result[s_length == i] = row[t_length, :, range(len(t_texts))].T[s_length == i]
    return result

def matched_alone(s_texts, t_texts):
    """MinED's alignment of one row's tokens, by dynamic time warping with the edit distance as cost: chunk
    numbers, as of `chunk_numbers`, of the tokens that it matches with one token which has no other match."""
    n, m = len(s_texts), len(t_texts)
    (s_kinds, s_kind), (t_kinds, t_kind) = (np.unique(x, return_inverse=True) for x in (s_texts, t_texts))
    cost = edit_distances(s_kinds, t_kinds)[np.ix_(s_kind, t_kind)]
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0
    for diagonal in range(2, n + m + 1):  # its cells do not depend on each other
        i = np.arange(max(1, diagonal - m), min(n, diagonal - 1) + 1)
        j = diagonal - i
        total[i, j] = cost[i - 1, j - 1] + np.minimum.reduce(
            [total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]])
    i, j, path = n, m, []
    while i:  # both reach 0 together
        path.append((i - 1, j - 1))
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=total.__getitem__)
    matches = np.zeros((n, m), bool)
    matches[tuple(zip(*path))] = True
    alone = torch.from_numpy(matches & (matches.sum(1, keepdims=True) == 1) & (matches.sum(0) == 1))
    i, j = alone.nonzero(as_tuple=True)
    s_chunk, t_chunk = torch.full((n,), -1), torch.full((m,), -2)
    s_chunk[i] = t_chunk[j] = torch.arange(len(i))
    return s_chunk, t_chunk

def token_map(s_texts, t_texts):
    """MinED's map of vocabularies: for each teacher token (V_t texts) the student token (of V_s texts) at the
    least edit distance, the first of equals, as a list of V_t ids; -1 for tokens over two edits from any."""
    def variants(text, edits):  # (text with some characters missing or wildcards, how many are missing)
        reached = {(text, 0)}
        for _ in range(edits):
            reached |= {edited for old, missing in reached for i in range(len(old)) for edited in (
                (old[:i] + "\0" + old[i + 1:], missing), (old[:i] + old[i + 1:], missing + 1))}
        return reached

    # NOT IN PAPER: none over two edits (departure 9). Two texts are n edits apart if they become one by w
    # wildcards in both, x deletions in one and y in the other, w + x + y = n.
    first = [{}, {}, {}]  # first[y][variant]: the first student token that becomes it by y deletions
    for i, text in enumerate(s_texts):
        for variant, y in variants(text, 2):
            first[y].setdefault(variant, i)

    def nearest(text):
        for edits in range(3):
            found = [i for variant, x in variants(text, edits) if (y := edits - x - variant.count("\0")) >= 0
                     and (i := first[y].get(variant)) is not None]
            if found:
                return min(found)
        return -1

    return [nearest(text) for text in t_texts]

# 6. Key-query matching: generative adversary (GA), conditional transport (CT) ===============================
class Discriminator(nn.Module):
    """D of eq. (14), (..., width) -> (...): a logit per vector, high for "a query". Highway layer and MLP."""

    def __init__(self, width, hidden=768, dropout=0.1):
        super().__init__()
        self.highway = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, hidden), nn.LeakyReLU(0.1),
                                 nn.Linear(hidden, 1))

    def forward(self, x):
        z = self.highway(x).to(x.dtype)
        return self.mlp(torch.lerp(x, z.relu(), z.sigmoid())).squeeze(-1)  # g relu(z) + (1 - g) x

def ga_terms(disc, q, k, s_mask, t_mask, real=None):
    """Sums behind `ga_loss` and the log, scalars: `ga_q`, `ga_k` (cross-entropies), `d_q`, `d_k` (D's
    probability of "a query"), `accuracy_q`, `accuracy_k` (how many vectors D names rightly). real: see
    `dual_space_losses`."""
    # One backward pass for max_D and min_{P_Q}: D descends its cross-entropy; the queries pass through the
    # identity 2 sg(q) - q, whose gradient is -1, so that P_Q ascends it. The keys are constants.
    s_real, t_real = real or (real_positions(s_mask), real_positions(t_mask))
    q, k = q.flatten(0, 1)[s_real], k.detach().flatten(0, 1)[t_real]
    z_q, z_k = full_precision(disc(2 * q.detach() - q)), full_precision(disc(k))
    terms = dict(ga_q=F.softplus(-z_q), d_q=z_q.detach().sigmoid(), accuracy_q=z_q > 0,    # -log D(q)
                 ga_k=F.softplus(z_k), d_k=z_k.detach().sigmoid(), accuracy_k=z_k <= 0)    # -log(1 - D(k))
    return {name: term.sum() for name, term in terms.items()}

def ga_loss(disc, q, k, s_mask, t_mask):
    """L_KQ, eq. (14), as cross-entropy: D(q) -> 1, D(k) -> 0, each a mean over its side's real positions.

    Minimising it trains D; the gradient that reaches q (B, S, w) is reversed, k (B, T, w) gets none.
    disc maps (..., w) to logits (...); s_mask (B, S) and t_mask (B, T) are True on real positions.
    """
    terms = ga_terms(disc, q, k, s_mask, t_mask)
    return terms["ga_q"] / s_mask.sum().clamp(min=1) + terms["ga_k"] / t_mask.sum().clamp(min=1)

class Critic(nn.Module):
    """The critic's and the navigator's networks of eq. (15): (..., width) -> (..., hidden), of norm 1."""

    def __init__(self, width, hidden=768, dropout=0.1):
        super().__init__()
        self.critic, self.navigator = (
            nn.Sequential(nn.Dropout(dropout), nn.Linear(width, hidden), nn.LeakyReLU(0.1),
                          nn.Linear(hidden, hidden)) for _ in range(2))

    def forward(self, x, name):  # name: critic | navigator
        network = getattr(self, name)
        if name == "critic":  # it ascends what all others descend: 2 sg(w) - w has the gradient -1
            weights = {key: 2 * weight.detach() - weight for key, weight in network.named_parameters()}
            return F.normalize(full_precision(torch.func.functional_call(network, weights, x)), dim=-1)
        return F.normalize(full_precision(network(x)), dim=-1)

def ct_terms(critic, q, k, s_mask, t_mask):
    """Sums behind `ct_loss`, scalars: the halves of eq. (15) over queries, `ct_q`, and over keys, `ct_k`."""
    q, k = zero_padding(q, s_mask), zero_padding(k.detach(), t_mask)
    (c_q, c_k), (n_q, n_k) = ((critic(q, name), critic(k, name)) for name in ("critic", "navigator"))
    with torch.autocast(q.device.type, enabled=False):  # bf16 would round cosines near 1 to steps of 1/256
        cost, nearness = 1 - c_q @ c_k.mT, n_q @ n_k.mT  # (B, S, T); the cost is the cosine distance
    to_keys, to_queries = ((nearness + mask).softmax(axis) for axis, mask in (
        (2, -1e4 * ~t_mask[:, None]), (1, -1e4 * ~s_mask[:, :, None])))
    return dict(ct_q=0.5 * ((to_keys * cost).sum(2) * s_mask).sum(),
                ct_k=0.5 * ((to_queries * cost).sum(1) * t_mask).sum())

def ct_loss(critic, q, k, s_mask, t_mask):
    """Eq. (15), conditional transport between each sequence's queries and keys: half the mean over queries of
    the cost of reaching the keys that the navigator finds near, and half the same the other way round.

    Minimising it trains P_Q and the navigator; the critic's gradient is reversed. Arguments as of `ga_loss`,
    critic: `Critic`.
    """
    terms = ct_terms(critic, q, k, s_mask, t_mask)
    return terms["ct_q"] / s_mask.sum().clamp(min=1) + terms["ct_k"] / t_mask.sum().clamp(min=1)

# 7. Objective: the dual-space loss, and the baselines' ======================================================
class HeadLosses(torch.autograd.Function):
    """Behind `head_losses`: forms the gradient of the sums' total slice by slice in the forward pass, while
    the logits are there, so that no product with a head is computed twice. The backward pass scales it if all
    sums have the same weight in the loss, as in eq. (9), and repeats the slices with the weights if not."""

    @staticmethod
    def forward(ctx, fn, step, softcaps, rows, *tensors):  # tensors: h_1, weight_1, bias_1, h_2, ...
        wanted, kind = [n for n, need in enumerate(ctx.needs_input_grad[4:]) if need], tensors[0].device.type
        ctx.call = fn, step, softcaps, rows, wanted
        ctx.autocast = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.save_for_backward(*tensors)
        sums, ctx.grads, ctx.trained = HeadLosses.slices(*ctx.call, tensors)
        return sums

    @staticmethod
    def slices(fn, step, softcaps, rows, wanted, tensors, weights=None):
        """The sums, the gradient of their weighted total by number of tensor, which of them have one."""
        kind, sides = tensors[0].device.type, range(len(softcaps))
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        compute = [t if t is None else t.to(dtype or t.dtype) for t in tensors]  # weights: once, not a slice
        learns = [any(n // 3 == j for n in wanted) for j in sides]
        groups, grads, sums, trained = {}, {n: torch.zeros_like(tensors[n]) for n in wanted}, [], []
        for j in sides:  # sides with one head share a product: its weight is read once
            key = tuple(t is not None and (t.data_ptr(), t.shape) for t in tensors[3 * j + 1:3 * j + 3])
            groups.setdefault(key, []).append(j)

        def losses(logits, *rows):  # of a piece of a slice, whose logits make way for their gradients
            leaves = [z.detach().requires_grad_(learn) for z, learn in zip(logits, learns)]
            with torch.enable_grad():
                values = fn(*map(capped, leaves, softcaps), *rows)
                trained[:] = [i for i, value in enumerate(values) if value.requires_grad]
                total = sum(values[i] * (weights[i] if weights else 1) for i in trained)
            sums.append([value.detach() for value in values])
            if trained:
                asked = [j for j in sides if learns[j]]
                found = torch.autograd.grad(total, [leaves[j] for j in asked], materialize_grads=True)
                for j, grad in zip(asked, found):
                    logits[j].copy_(grad)

        def add_slice(part):  # a function, so that one slice's logits are gone when the next one's come
            logits = {}
            for group in groups.values():
                weight, bias = compute[3 * group[0] + 1:][:2]
                product = F.linear(torch.stack([compute[3 * j][part] for j in group]), weight, bias)
                logits |= zip(group, product)
            logits = [logits[j] for j in sides]
            piece = max(1, step // 32)
            for pieces in zip(*(x.split(piece) for x in (*logits, *(row[part] for row in rows)))):
                losses(pieces[:len(sides)], *pieces[len(sides):])
            for n in wanted if trained else ():
                dz, h, weight = logits[n // 3], *compute[n // 3 * 3:][:2]
                if n % 3 == 0:
                    grads[n][part] = dz @ weight
                elif n % 3 == 2:
                    grads[n] += dz.sum(0)
                elif dz.dtype == grads[n].dtype:
                    grads[n].addmm_(dz.mT, h[part])  # in place: there is no second (V, d)
                else:
                    grads[n] += dz.mT @ h[part]

        for start in range(0, max(len(tensors[0]), 1), step):
            add_slice(slice(start, start + step))
        return tuple(map(sum, zip(*sums))), grads, trained

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        grads, scale = ctx.grads, upstream[ctx.trained[0]]
        ctx.grads = None  # given away: kept, they would be a second (V, d) until the graph is gone
        if grads is None or any(upstream[i].data_ptr() != scale.data_ptr() for i in ctx.trained):
            with torch.autocast(scale.device.type, *ctx.autocast):
                _, grads, _ = HeadLosses.slices(*ctx.call, ctx.saved_tensors, upstream)
        else:
            for grad in grads.values():
                grad *= scale
        return (None,) * 4 + tuple(map(grads.get, range(len(ctx.saved_tensors))))

def head_losses(fn, sides, rows=(), max_logits=2 ** 24):
    """Sums over N positions of losses of logits, with the logits of only a slice of the positions at a time.

    fn: (logits_1, ..., logits_J, *rows) -> tuple of scalars, each a sum over the positions it is given.
    sides: J pairs of hidden states (N, d_j) and `Head`. rows: further tensors (N, ...), sliced likewise.
    max_logits: how many logits of one side may exist at a time, the losses' own tensors for 1/32 of
        them; it changes no result but rounding.
    """
    step = max(1, max_logits // max(len(head.weight) for _, head in sides))
    tensors = [t for h, head in sides for t in (h, head.weight, head.bias)]
    if not torch.is_grad_enabled():
        tensors = [t if t is None else t.detach() for t in tensors]
    return HeadLosses.apply(fn, step, [head.softcap for _, head in sides], rows, *tensors)

def cross_entropy_sum(logits, targets):
    """CE of eq. (9), for `head_losses`."""
    return (F.cross_entropy(logits, targets, reduction="sum"),)

def keys_and_queries(proj, s_in, s_tgt, t_in, t_tgt, s_mask, t_mask, E_s, E_t, normalise_queries=False):
    """Q (B, S, 2 d_t), K (B, T, 2 d_t) of eqs. (1) and (2), and e^t_target (B, T, d_t). Arguments as of
    `dual_space_losses`."""
    with torch.no_grad():  # embeddings are constants for the distillation terms
        e_s_in, e_s_tgt, e_t_in, e_t_tgt = (
            F.embedding(ids.masked_fill(~mask, 0), E) if torch.is_tensor(E) else E(ids.masked_fill(~mask, 0))
            for ids, mask, E in ((s_in, s_mask, E_s), (s_tgt, s_mask, E_s), (t_in, t_mask, E_t),
                                 (t_tgt, t_mask, E_t)))
        k = std_normalise(torch.cat([e_t_in, e_t_tgt], -1), t_mask)                     # (2)
    q = zero_padding(proj.query(torch.cat([e_s_in, e_s_tgt], -1)), s_mask)              # (1)
    # NOT IN PAPER: N_std(Q), if asked for (departure 8)
    return std_normalise(q, s_mask) if normalise_queries else q, k, e_t_tgt

def dual_space_losses(proj, h_s, h_t, s_in, s_tgt, t_in, t_tgt, s_mask, t_mask, E_s, E_t, W_s, W_t, *,
                      align="cma", chunks=None, div="skl", temperature=2.0, skew=0.1, correct_only=True,
                      s2t_div="kl", normalise_queries=False, real=None, max_logits=2 ** 24):
    """Every term of eqs. (1)-(9), as sums over positions.

    Args:
        proj: `Projectors(d_s, d_t)`.
        h_s: (B, S, d_s), h_t: (B, T, d_t) last hidden states at the response positions.
        s_in, s_tgt: (B, S), t_in, t_tgt: (B, T) ids of the tokens that these positions read and predict.
        s_mask: (B, S), t_mask: (B, T) bool, True on real positions; padding is on the right.
        E_s, E_t: input embeddings, a table (V, d) or the model's own module (which may scale its table).
        W_s, W_t: prediction heads, a weight (V, d) or a `Head`.
        align: cma, eqs. (1)-(3) | clp, eq. (12) | cla, eq. (13) | dskd, position by position, for models with
            one tokenizer. clp and cla need chunks: (B, S, T) bool.
        div, temperature, skew: f, see `divergence`.  s2t_div: f of KD^{s->t}.
        correct_only: KD^{t->s} counts only positions where argmax q^{t->s} is the gold token.
        normalise_queries: N_std(Q) in place of Q.
        real: `real_positions` of s_mask and t_mask, if known: then no CUDA device is waited for.
        max_logits: see `head_losses`.
    Returns:
        dict of sums `ce`, `ce_t2s`, `kd_t2s`, `kd_s2t`; `q` (B, S, 2 d_t), `k` (B, T, 2 d_t), `a_t2s`,
        `a_s2t`, see `cross_model_attention`; counts `n_s`, `n_t` of real positions, `n_correct` of right
        argmax q^{t->s}. ValueError: unknown align, chunks missing, dskd of sequences that differ in length.
    """
    if align not in ("cma", "clp", "cla", "dskd") or align in ("clp", "cla") and chunks is None:
        raise ValueError(f"dual_space_losses: found align={align!r}, chunks={chunks}; clp, cla need chunks")
    s_real, t_real = real or (real_positions(s_mask), real_positions(t_mask))
    if align == "dskd" and (s_mask.shape, len(s_real)) != (t_mask.shape, len(t_real)):
        raise ValueError("dual_space_losses: found different lengths, expected one tokenization for dskd")
    W_s, W_t = (W if isinstance(W, Head) else Head(W) for W in (W_s, W_t))
    h_s, h_t = zero_padding(h_s, s_mask), zero_padding(h_t.detach(), t_mask)
    s_tgt = s_tgt.masked_fill(~s_mask, 0)
    q, k, e_t_tgt = keys_and_queries(
        proj, s_in, s_tgt, t_in, t_tgt, s_mask, t_mask, E_s, E_t, normalise_queries)
    a_t2s, a_s2t = align_positions(align, q, k, s_mask, t_mask, chunks)                 # (3), (12), (13)
    v_in = h_t if align == "dskd" else std_normalise(h_t, t_mask) + std_normalise(e_t_tgt, t_mask)
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

    h_s, h_t2s, s_tgt, s_aligned = (x.flatten(0, 1)[s_real] for x in (h_s, h_t2s, s_tgt, (a_t2s > 0).any(-1)))
    h_t, h_s2t, t_aligned = (x.flatten(0, 1)[t_real] for x in (h_t, h_s2t, (a_s2t > 0).any(-1)))
    ce, ce_t2s, kd_t2s, n_correct = head_losses(  # aligned: not without a chunk
        student_space, [(h_s, W_s), (h_t2s, W_s.detach())], (s_tgt, s_aligned), max_logits)
    (kd_s2t,) = head_losses(
        teacher_space, [(h_s2t, W_t.detach()), (h_t, W_t.detach())], (t_aligned,), max_logits)
    return dict(ce=ce, ce_t2s=ce_t2s, kd_t2s=kd_t2s, kd_s2t=kd_s2t, q=q, k=k, a_t2s=a_t2s, a_s2t=a_s2t,
                n_s=s_mask.sum(), n_t=t_mask.sum(), n_correct=n_correct)

def uld_loss(student_logits, teacher_logits):
    """Universal logit distillation: the L1 distance of the two distributions, each sorted, the shorter padded
    with zeros; (..., V_s), (..., V_t) -> (...)."""
    p, q = (full_precision(z).softmax(-1).sort(-1, descending=True).values
            for z in (teacher_logits, student_logits))
    size = max(p.shape[-1], q.shape[-1])
    return (F.pad(p, (0, size - p.shape[-1])) - F.pad(q, (0, size - q.shape[-1]))).abs().sum(-1)

def mined_targets(teacher_logits, vocabulary, gold, matched, size, temperature=2.0):
    """MinED's target distributions over the student's vocabulary of that size, (N, size), as logits at the
    temperature: the teacher's, carried over by the map of vocabularies; elsewhere one-hot.

    teacher_logits: (N, V_t). vocabulary: (V_t,) ids as of `token_map`. gold: (N,) student ids. matched: (N,)
    bool, True where the teacher's position is the only match of the student's, see `matched_alone`.
    """
    p = (full_precision(teacher_logits) / temperature).softmax(-1) * (vocabulary >= 0)
    carried = p.new_zeros(len(p), size).index_add_(1, vocabulary.clamp(min=0), p)
    mass = carried.sum(-1, keepdim=True)
    one_hot = torch.zeros_like(carried).scatter_(1, gold[:, None], 1)
    return temperature * torch.where(matched[:, None] & (mass > 0), carried, one_hot).log()

def baseline_losses(method, h_s, h_t, s_tgt, s_mask, t_mask, W_s, W_t, *, chunks=None, vocabulary=None,
                    div="skl", temperature=2.0, skew=0.1, real=None, max_logits=2 ** 24):
    """Sums `ce` and `kd` over positions, for losses on the teacher's own logits.

    method: kd, f of both models' distributions over one vocabulary | uld, `uld_loss`, both position by
    position | mined, KL from `mined_targets`: chunks (B, S, T) hold the single matches, vocabulary is the
    `token_map` (V_t,). Other arguments as of `dual_space_losses`. ValueError: unknown method, kd of sequences
    that differ in length.
    """
    s_real, t_real = real or (real_positions(s_mask), real_positions(t_mask))
    same = (s_mask.shape, len(s_real)) == (t_mask.shape, len(t_real))
    if method not in ("kd", "uld", "mined") or method == "kd" and not same:
        raise ValueError(f"baseline_losses: found {method}, expected kd of equal lengths, uld or mined")
    W_s, W_t = (W if isinstance(W, Head) else Head(W) for W in (W_s, W_t))
    h_t = zero_padding(h_t.detach(), t_mask)
    if method == "mined":
        chunks = chunks & t_mask[:, None]
        h_t, matched = chunks.to(h_t.dtype) @ h_t, chunks.any(-1)
    else:
        longer = h_s.shape[1] - h_t.shape[1]
        h_t, matched = F.pad(h_t, (0, 0, 0, longer)), F.pad(t_mask, (0, longer))

    def student_space(z_s, z_t, target, matched):
        if method == "uld":
            kd = uld_loss(z_s, z_t) * matched
        elif method == "kd":
            kd = divergence(div, z_s, z_t, temperature, skew) * matched
        else:
            z_t = mined_targets(z_t, vocabulary, target, matched, z_s.shape[-1], temperature)
            kd = divergence("kl", z_s, z_t, temperature)
        return *cross_entropy_sum(z_s, target), kd.sum()

    h_s, h_t, s_tgt, matched = (x.flatten(0, 1)[s_real] for x in (h_s, h_t, s_tgt, matched))
    ce, kd = head_losses(student_space, [(h_s, W_s), (h_t, W_t.detach())], (s_tgt, matched), max_logits)
    return dict(ce=ce, kd=kd)

# 8. Training ================================================================================================
def world():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def seed_torch(*numbers):
    """Seeds torch by what is computed (step and micro-batch), not by what ran before: neither a restart nor
    the number of processes changes dropout."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes milliseconds where there is no GPU
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)

def precision(device):
    """bf16 on CUDA, fp16 on GPUs without it; float32 on the CPU, where halves are far slower."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

def autocast(device):
    """Products in the device's `precision`."""
    return torch.autocast(device.type, precision(device), enabled=precision(device) != torch.float32)

class Distiller(nn.Module):
    """Everything that is trained: the student and, if the method has them, projectors and adversary."""

    def __init__(self, student, teacher, args, vocabulary=None):
        super().__init__()
        self.student, self.args, self.proj, self.adversary = student, args, None, None
        self.register_buffer("vocabulary", vocabulary, persistent=False)
        if args.method in DUAL_SPACE:
            d_s, d_t = (model.get_input_embeddings().weight.shape[1] for model in (student, teacher))
            self.proj = Projectors(d_s, d_t)
            self.proj.query.requires_grad_(args.method in ("cma", "cla"))  # others use no query
            if args.ga or args.ct:
                rate = 0.1 if args.dropout is None else args.dropout
                self.adversary = (Discriminator if args.ga else Critic)(2 * d_t, dropout=rate)
                self.adversary.requires_grad_(not args.released_kq)

    def forward(self, s, t, teacher, n_s, n_t, h_t=None):
        """One micro-batch's share of L_train, eq. (16), and its sums for the log.

        s, t: the student's and the teacher's `Side`. teacher: the frozen model, or None, like t, for plain
        training. n_s, n_t: response tokens of the *whole* optimiser step. h_t: from a `TeacherCache`.
        """
        args, W_s, h_s = self.args, head_of(self.student), response_hidden(self.student, s)
        if teacher is None:
            h_s, targets = (x.flatten(0, 1)[s.real] for x in (h_s, s.targets))
            (ce,) = head_losses(cross_entropy_sum, [(h_s, W_s)], (targets,))
            return ce / n_s, dict(ce=ce.detach())
        if h_t is None:
            with torch.no_grad():
                h_t = response_hidden(teacher, t)
        shared = dict(div=args.div, temperature=args.temperature, skew=args.skew, real=(s.real, t.real),
                      chunks=chunks_of(s, t) if args.method in ("clp", "cla", "mined") else None)
        if args.method not in DUAL_SPACE:
            terms = baseline_losses(args.method, h_s, h_t, s.targets, s.mask, t.mask, W_s, head_of(teacher),
                                    vocabulary=self.vocabulary, **shared)
            loss = 0.5 * (terms["ce"] + terms["kd"]) / n_s
            return loss, {name: term.detach() for name, term in terms.items()}
        out = dual_space_losses(
            self.proj, h_s, h_t, s.inputs, s.targets, t.inputs, t.targets, s.mask, t.mask,
            self.student.get_input_embeddings(), teacher.get_input_embeddings(), W_s, head_of(teacher),
            align=args.method, correct_only=not args.all_positions, s2t_div=args.s2t_div,
            normalise_queries=args.normalise_queries, **shared)
        loss = 0.5 * (out["ce"] + out["kd_s2t"] + out["kd_t2s"] + out["ce_t2s"]) / n_s      # (9)
        terms = {name: out[name] for name in ("ce", "ce_t2s", "kd_t2s", "kd_s2t", "n_correct")}
        if self.adversary is not None:
            name, given = "ga" if args.ga else "ct", (self.adversary, out["q"], out["k"], s.mask, t.mask)
            terms |= ga_terms(*given, shared["real"]) if args.ga else ct_terms(*given)
            # the authors' code divides by the tokens of their micro-batch, of 4 rows, once more
            weight = args.kq_weight / (4 * n_s / args.batch_size if args.released_kq else 1)
            loss = loss + weight * (terms[f"{name}_q"] / n_s + terms[f"{name}_k"] / n_t)    # (14)-(16)
        return loss, {name: term.detach() for name, term in terms.items()}

class TeacherCache:
    """The teacher's last hidden states at the response positions of all rows, in a folder that processes and
    later runs share. What it does not hold yet is computed when it is made.

    examples: the teacher's. InputError: the folder is of other weights, rows or dtype.
    """

    def __init__(self, folder, teacher, examples, pad, batch_size, device):
        rank, processes = world()
        folder, self.ends = pathlib.Path(folder), np.cumsum([0] + [len(e.spans) for e in examples])
        self.dtype, width = teacher.dtype, head_of(teacher).weight.shape[1]
        weights, rows = hashlib.sha256(), json.dumps([(example.ids, example.start) for example in examples])
        for name, tensor in teacher.state_dict().items():
            weights.update(name.encode() + tensor.flatten().cpu().view(torch.uint8).numpy().tobytes())
        key = dict(weights=weights.hexdigest(), rows=hashlib.sha256(rows.encode()).hexdigest(),
                   dtype=str(self.dtype))
        sizes = dict(hidden=int(self.ends[-1]) * width * self.dtype.itemsize, done=len(examples))
        if rank == 0 and not folder.exists():  # it appears whole: other runs may start at the same time
            fresh = folder.with_name(f"{folder.name}.{os.getpid()}")
            fresh.mkdir(parents=True)
            for name, size in sizes.items():
                with open(fresh / name, "wb") as file:
                    file.truncate(size)  # zeros; the disk fills as rows come
            write_json(fresh / "key.json", key)
            if folder.exists():
                shutil.rmtree(fresh)
            else:
                fresh.rename(folder)
        if processes > 1:
            dist.barrier()
        found = json.loads((folder / "key.json").read_text())
        other = [name for name in key if found[name] != key[name]]
        other += [name for name in sizes if (folder / name).stat().st_size != sizes[name]]
        if other:
            raise InputError(f"{folder}: found a cache with other {', '.join(other)}, expected this run's")
        self.hidden, done = (np.memmap(folder / name, np.uint8, "r+") for name in sizes)
        self.hidden = self.hidden.reshape(-1, width * self.dtype.itemsize)
        order = sorted(np.flatnonzero(done == 0), key=lambda i: len(examples[i].ids))
        batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)][rank::processes]
        for batch in tqdm(batches, desc=f"fill {folder}", disable=None if rank == 0 else True):
            side = collate([examples[i] for i in batch], pad, device)
            with torch.no_grad(), autocast(device):
                h_t = response_hidden(teacher, side).to(self.dtype).cpu()
            for i, h in zip(batch, h_t):
                start, end = self.ends[i:i + 2]
                self.hidden[start:end] = h[:end - start].contiguous().view(torch.uint8).numpy()
            self.hidden.flush()
            done[batch] = 1  # only what is on disk counts as done
        if processes > 1:
            dist.barrier()

    def __call__(self, rows, device):  # -> (B, T, d_t), right-padded
        parts = (np.array(self.hidden[self.ends[i]:self.ends[i + 1]]) for i in rows)
        h_t = nn.utils.rnn.pad_sequence([torch.from_numpy(part).view(self.dtype) for part in parts], True)
        return (h_t.pin_memory() if device.type == "cuda" else h_t).to(device, non_blocking=True)

def parameter_groups(model, args):
    """AdamW's groups: each trainable parameter is in exactly one; biases and norms are not decayed."""
    groups = {}
    for name, parameter in model.named_parameters():  # lists a tied weight once
        if not parameter.requires_grad:
            continue
        lr = args.lr if name.startswith("student.") else args.lr_projectors
        groups.setdefault((lr, args.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [dict(params=params, lr=lr, weight_decay=decay) for (lr, decay), params in groups.items()]

def write_atomically(path, write):
    """`write(file)` into a temporary file, which replaces the path once it is on disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        try:
            write(file)
        except RuntimeError as error:  # torch.save's own, which hides what the disk has said
            raise error.__context__ if isinstance(error.__context__, OSError) else error
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

def write_json(path, value):
    """The value as JSON, atomically."""
    write_atomically(path, lambda file: file.write(json.dumps(value, indent=1).encode()))

def save_model(model, tokenizer, folder, alignment=None):
    """Writes a folder that transformers' `from_pretrained` reads; alignment: what `--align` needs besides."""
    fresh = folder.with_name(folder.name + ".new")
    try:
        model.save_pretrained(fresh)
    except SafetensorError as error:
        raise OSError(f"{fresh}: {error}") from None
    tokenizer.save_pretrained(fresh)
    if alignment:
        torch.save(alignment, fresh / "alignment.pt")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)

def open_run(folder, args):
    """What the folder's args.json holds, which is made if need be. InputError: it has other settings.
    With --fresh, a folder that is there gets another name first."""
    if args.fresh and folder.exists() and world()[0] == 0:
        number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}.{number}"))
    if args.fresh and dist.is_initialized():
        dist.barrier()
    path, skip = folder / "args.json", NOT_IDENTITY | (TEACHER_ONLY if args.method == "sft" else set())
    settings = {name: value for name, value in sorted(vars(args).items()) if name not in skip}
    if path.exists():
        run = json.loads(path.read_text())
        old = run["settings"]
        differing = "; ".join(f"{name} was {old.get(name)}, is {value}" for name, value in settings.items()
                              if old.get(name) != value)
        if differing:
            raise InputError(f"{path}: found a run with other settings ({differing}), expected the same; "
                             "--fresh starts over")
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

class Stopped(Exception):
    """Training ended on a signal, whose number is `args[0]`, after a step that is saved."""

@contextlib.contextmanager
def signals_collected():
    """The SIGTERMs and SIGINTs that come meanwhile; they do nothing else."""
    caught, numbers = [], (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, frame: caught.append(number)) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)

def trim_log(path, done):
    """Drops the lines of steps that will be done again, and one that was not written to its end."""
    lines = [line for line in open(path) if line.endswith("\n")] if done else []
    kept = [line for line in lines if json.loads(line)["step"] <= done]
    write_atomically(path, lambda file: file.write("".join(kept).encode()))

def check_finite(lines, data_lines):
    """FloatingPointError if a value in the log's lines is not finite. data_lines: of raw.jsonl, by step."""
    for line in lines:
        names = [name for name, value in line.items() if not math.isfinite(value)]
        if names:
            raise FloatingPointError(
                f"step {line['step']}: found {', '.join(names)} not finite, of lines "
                f"{data_lines(line['step'])} of raw.jsonl; step {lines[-1]['step']} is saved, without the "
                "updates of such steps")

def load_state(path, parts, device):
    """Puts a saved state into the parts, by name; returns its step and best score. InputError: damaged."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state["step"], state["best"]
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: found a damaged file ({reason}), expected what a run has saved; "
                         "--fresh starts over") from None

def check_same_weights(model):
    """RuntimeError if the processes hold different weights."""
    sums = torch.stack([parameter.detach().double().sum() for parameter in model.parameters()])
    low, high = sums.clone(), sums.clone()
    if dist.is_initialized():
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
    other = [name for (name, _), same in zip(model.named_parameters(), (low == high).tolist()) if not same]
    if other:
        raise RuntimeError(f"found different weights {', '.join(other[:5])} in processes, expected the same")

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
        if line.get("loss_scale", 0) > 1 and not math.isfinite(line["grad_norm"]):
            line["grad_norm"] = 0.0  # an overflow of fp16: the step was left out, the scale is halved
    return [line for line, _, _ in steps]

def backward_passes(model, teacher, data, pads, micro_batches, step, args, device, scaler, cache=None):
    """Leaves an optimiser step's gradient in the parameters; returns numbers and device sums for the log.

    data: lists of `Example`s, the student's and (with a teacher) the teacher's. pads: their padding ids.
    micro_batches: lists of row indices, of which this process takes its share. scaler: `GradScaler`, of the
    gradient if precision is fp16. cache: `TeacherCache`.
    """
    rank, processes = world()
    counts = [sum(len(side[i].spans) for rows in micro_batches for i in rows) for side in data]
    sums, padded, read = {}, 0, 0
    for m in range(rank, len(micro_batches), processes):
        examples = [[side[i] for i in micro_batches[m]] for side in data]
        s, t = ([collate(rows, pad, device) for rows, pad in zip(examples, pads)] + [None])[:2]
        padded += sum(side.ids.numel() for side in (s, t) if side)
        read += sum(len(example.ids) - 1 for rows in examples for example in rows)
        seed_torch(args.seed, step, m)
        # gradients are exchanged once a step, in the backward pass of the process's last micro-batch
        wait = processes > 1 and m + processes < len(micro_batches)
        with model.no_sync() if wait else contextlib.nullcontext():
            with autocast(device):
                h_t = cache(micro_batches[m], device) if cache else None
                loss, terms = model(s, t, teacher, counts[0], counts[-1], h_t)
            # DistributedDataParallel takes the mean over processes; the counts are global
            scaler.scale(loss * processes).backward()
        for name, value in (terms | dict(loss=loss.detach() * counts[0])).items():
            sums[name] = sums.get(name, 0) + value
    return dict(tokens=counts[0], teacher_tokens=counts[-1], padding=1 - read / padded), sums

def train(args, folder, device, teacher_source=None):
    """Trains args.student with the teacher (None: plain fine-tuning); returns its best checkpoint's path.

    Writes args.json, log.jsonl, best/ and state.pt into the folder, and goes on from state.pt if it is there.
    InputError: sizes that do not divide, too few rows, a damaged state. FloatingPointError: a term is not
    finite. Stopped: by SIGTERM or SIGINT.
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
    limits = args.max_prompt, args.max_length, args.method
    data, kept_rows = training_data(rows[args.dev_rows:], tokenizers, *limits)
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
    mined = args.method == "mined"
    vocabulary = mined_vocabulary(tokenizers, len(head_of(teacher).weight)) if mined else None
    model = Distiller(student, teacher, args, vocabulary).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps, eta_min=1e-7)
    scaler = torch.amp.GradScaler(device.type, enabled=precision(device) == torch.float16)
    parts = dict(model=model, optimizer=optimizer, schedule=schedule) | (
        dict(scaler=scaler) if scaler.is_enabled() else {})
    state_path, log_path = folder / "state.pt", folder / "log.jsonl"
    done, best = load_state(state_path, parts, device) if state_path.exists() else (0, -1.0)
    if rank == 0:
        trim_log(log_path, done)
    parallel, cache = model, None
    if teacher and args.cache_teacher:
        cache = TeacherCache(args.cache_teacher, teacher, data[1], pads[1], args.micro_batch, device)
        for part in teacher.get_decoder().children():
            if isinstance(part, nn.ModuleList):
                part.to("meta")  # its layers have no more to do: their memory goes back
    if processes > 1:
        parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    dev_pairs = None
    if args.method in ALIGNED:
        dev_pairs, _ = training_data(dev_rows[:DEV_ALIGNED], tokenizers, *limits)

    def validate(step):
        """Logs dev loss and ROUGE-L; keeps the student if it is the best so far that was trained."""
        nonlocal best
        model.eval()
        _, scores = generate(student, tokenizers[0], dev_rows, args.seed, args)
        scores = {name: statistics.fmean(values) for name, values in scores.items()}
        loss = dev_loss(model, [example for example in dev if example.spans], device, args.micro_batch)
        alignment = None
        if dev_pairs:
            batch = [collate(side, pad, device) for side, pad in zip(dev_pairs, pads)]
            numbers = alignment_numbers(*align_batch(args, model.proj, student, teacher, *batch), *batch)
            scores |= {f"align_{name}": value for name, value in numbers.items()}
            alignment = dict(teacher=teacher_source, method=args.method, proj=model.proj.state_dict(),
                             normalise_queries=args.normalise_queries, numbers=numbers)
        append_log(log_path, [dict(step=step, dev_loss=loss) | {f"dev_{k}": v for k, v in scores.items()}])
        if step and scores["rougeL"] > best:
            best = scores["rougeL"]
            if rank == 0:
                save_model(student, tokenizers[0], folder / "best", alignment)

    if done == 0:
        dropped = len(rows) - args.dev_rows - len(kept_rows)
        append_log(log_path, [dict(step=0, steps=total_steps, rows=len(kept_rows), dropped=dropped)])
        validate(0)

    def plan(first):
        """The micro-batches of step `first` and those after it."""
        sizes = lengths, args.batch_size, args.micro_batch, args.seed
        epochs = (plan_epoch(*sizes, epoch) for epoch in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(epochs), first - 1, total_steps)

    def data_lines(step):
        return sorted(args.dev_rows + kept_rows[i] + 1 for rows in next(plan(step)) for i in rows)

    bar = tqdm(plan(done + 1), desc=folder.name, total=total_steps, initial=done,
               disable=None if rank == 0 else True)
    pending, since = [], time.perf_counter()
    check_same_weights(model)
    with signals_collected() as signals:
        for step, micro_batches in enumerate(bar, done + 1):
            model.train()
            line, sums = backward_passes(
                parallel, teacher, data, pads, micro_batches, step, args, device, scaler, cache)
            if scaler.is_enabled():
                line["loss_scale"] = scaler.get_scale()
            scaler.unscale_(optimizer)
            norm, lr = nn.utils.clip_grad_norm_(model.parameters(), args.clip), schedule.get_last_lr()[0]
            optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()  # 1: weights stay
            optimizer.step()
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
            pending.append((dict(step=step, epoch=step / epoch_steps, lr=lr) | line, sums, norm))
            epoch_ends = step % epoch_steps == 0 or step == total_steps
            saves = epoch_ends or step % args.save_every == 0
            if not (saves or step % args.log_every == 0 or signals and processes == 1):
                continue
            stop = torch.tensor(max(signals, default=0), device=device)
            if processes > 1:  # all stop at the same step
                dist.all_reduce(stop, dist.ReduceOp.MAX)
            lines, pending = log_lines(pending, time.perf_counter() - since), []
            append_log(log_path, lines)
            if rank == 0 and bar.disable:
                print(folder.name, *(f"{name} {x:.4g}" for name, x in lines[-1].items()), flush=True)
            broken = not all(math.isfinite(value) for line in lines for value in line.values())
            if epoch_ends and not broken:
                validate(step)
            if saves or stop or broken:
                check_same_weights(model)
                state = {name: part.state_dict() for name, part in parts.items()} | dict(step=step, best=best)
                if rank == 0:
                    write_atomically(state_path, lambda file: torch.save(state, file))
            check_finite(lines, data_lines)
            if stop:
                raise Stopped(int(stop), f"stopped by {signal.Signals(int(stop)).name} after step {step} of "
                                         f"{total_steps}, which is saved; the same command goes on")
            since = time.perf_counter()
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
            total += torch.stack([model(side, None, None, 1, 1)[0], side.mask.sum()])
    if processes > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()

# 9. Evaluation ==============================================================================================
@torch.no_grad()
def sample(model, prompts, uniforms, end, no_repeat_ngram=0):
    """Token ids that follow each prompt (a list of ids) up to the end token, without it, or to the limit.

    uniforms: (rows, limit) in [0, 1); number t of a row picks its token t from the cumulated probabilities.
    no_repeat_ngram: no n-gram of that size comes twice in prompt and response; 0: no such rule.
    """
    size, device, texts = no_repeat_ngram, model.device, [list(prompt) for prompt in prompts]

    def read(ids, mask, cache):  # -> the last position's hidden states
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        with autocast(device):
            return model.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=positions,
                                       past_key_values=cache, use_cache=True).last_hidden_state[:, -1]

    parts, layers = [], DynamicCache(config=model.config).layers
    few = 8 if all(isinstance(layer, DynamicLayer) for layer in layers) else len(prompts)
    for start in range(0, len(prompts), few):  # read apart, so that less is padded; their caches are joined
        some = prompts[start:start + few]
        gaps = [max(map(len, some)) - len(prompt) for prompt in some]
        ids = torch.tensor([[end] * gap + prompt for gap, prompt in zip(gaps, some)], device=device)
        mask = torch.tensor([[0] * gap + [1] * len(prompt) for gap, prompt in zip(gaps, some)], device=device)
        cache = DynamicCache(config=model.config)
        parts.append((read(ids, mask, cache), mask, cache))
    hidden, masks, caches = zip(*parts)
    hidden, cache = torch.cat(hidden), max(caches, key=lambda cache: cache.get_seq_length())
    mask = torch.cat([F.pad(mask, (max(map(len, prompts)) - mask.shape[1], 0)) for mask in masks])
    for layer, layers in zip(cache.layers, list(zip(*(x.layers for x in caches))) if len(caches) > 1 else ()):
        count = layer.keys.shape[2]
        layer.keys, layer.values = (torch.cat([F.pad(x, (0, 0, count - x.shape[2], 0)) for x in states])
                                    for states in zip(*((x.keys, x.values) for x in layers)))
    parts, caches, alive = None, None, list(range(len(prompts)))  # only the joined cache stays
    for t in range(uniforms.shape[1]):
        with autocast(device):
            logits = head_of(model)(hidden)
        for row, i in enumerate(alive if size else ()):
            text, places = texts[i], range(len(texts[i]) - size + 1)
            tail = text[len(text) - size + 1:]
            logits[row, [text[k + size - 1] for k in places if text[k:k + size - 1] == tail]] = -math.inf
        below = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
        target = torch.from_numpy(uniforms[alive, t]).to(device) * below[:, -1]
        tokens = torch.searchsorted(below, target[:, None], right=True)[:, 0].tolist()
        going = [row for row, token in enumerate(tokens) if token != end]
        if not going:
            break
        if len(going) < len(alive):  # rows that have ended cost nothing more
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            mask, alive, tokens = mask[kept], [alive[row] for row in going], [tokens[row] for row in going]
        for i, token in zip(alive, tokens):
            texts[i].append(token)
        if t + 1 < uniforms.shape[1]:
            mask = F.pad(mask, (0, 1), value=1)
            hidden = read(torch.tensor(tokens, device=device)[:, None], mask, cache)
    return [text[len(prompt):] for text, prompt in zip(texts, prompts)]

def generate(model, tokenizer, rows, seed, args, no_repeat_ngram=0):
    """A response to each `Row`, sampled at temperature 1, and the rows' scores by name. What a row gets
    depends on seed and place in the list, neither on its batch (but for rounding) nor on processes."""
    rank, processes = world()
    lead, end = leading_tokens(tokenizer), tokenizer.eos_token_id
    encoded = tokenizer([row.prompt for row in rows], add_special_tokens=False, verbose=False)["input_ids"]
    # NOT IN PAPER: a prompt over the limit keeps its end, where the cue for the response is (departure 7)
    encoded = [lead + ids[max(0, len(ids) + len(lead) - args.max_prompt):] for ids in encoded]
    order, batches, shares = sorted(range(len(rows)), key=lambda i: -len(encoded[i])), [], [None] * processes
    while order:  # as many rows as fit the budget of tokens
        count = max(1, args.eval_tokens // (len(encoded[order[0]]) + args.max_new_tokens))
        batches.append(order[:count])
        order = order[count:]
    mine = []
    for batch in batches[rank::processes]:
        uniforms = np.stack([np.random.default_rng((seed, i)).random(args.max_new_tokens) for i in batch])
        ids = sample(model, [encoded[i] for i in batch], uniforms, end, no_repeat_ngram)
        mine += zip(batch, tokenizer.batch_decode(ids, skip_special_tokens=True))
    spare = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    helpers = min(spare, len(mine) // 128)  # with fewer rows each, starting them takes longer than they save
    options = dict(num_workers=helpers, multiprocessing_context="fork") if helpers > 1 else {}
    scored = itertools.chain.from_iterable(DataLoader(
        [(text, rows[i].references) for i, text in mine], batch_size=16, collate_fn=score_pairs, **options))
    mine = [(*pair, *scores) for pair, scores in zip(mine, scored)]
    if processes > 1:
        dist.all_gather_object(shares, mine)
    _, texts, rouge, exact = zip(*sorted(itertools.chain(*shares) if processes > 1 else mine))
    return list(texts), dict(rougeL=list(rouge), exact_match=list(exact))

def score_pairs(pairs):
    """ROUGE-L and exact match, in percent, of each (prediction, references), see `rouge_l`."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)

    def normal(text):
        return text.lower().translate(str.maketrans("", "", string.punctuation)).split()

    return [(100 * max(scorer.score(reference, text)["rougeL"].fmeasure for reference in references),
             100 * any(normal(reference) == normal(text) for reference in references))
            for text, references in pairs]

def rouge_l(predictions, references):
    """ROUGE-L F1 with Porter's stemmer, exact match of lower-case text without punctuation, as in MiniLLM.

    predictions: N texts; references: N lists of texts, of which the best counts. Returns `rougeL` and
    `exact_match`, means in percent. ValueError: the two differ in number.
    """
    rouge, exact = zip(*score_pairs(zip(predictions, references, strict=True)))
    return dict(rougeL=statistics.fmean(rouge), exact_match=statistics.fmean(exact))

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
    """Samples and scores each test set once a seed; writes predictions/ and eval.json into the folder, and
    returns what is in eval.json: metric -> test set, OOD and All (means over sets) -> percentages, one a
    sampling seed; `rows` -> test set -> each row's mean ROUGE-L. A finished evaluation is not repeated."""
    rank, path, sets = world()[0], folder / "eval.json", read_test_sets(args)
    settings = {name: getattr(args, name) for name in EVALUATION}
    settings["rows"] = hashlib.sha256(json.dumps(sets).encode()).hexdigest()
    result = dict(run=run_name(args), seed=args.seed, model=source, settings=settings)
    checkpoint = pathlib.Path(source)
    if path.exists() and (old := json.loads(path.read_text())) == old | result and all(
            path.stat().st_mtime > file.stat().st_mtime for file in checkpoint.glob("*.safetensors")):
        return old
    (folder / "predictions").mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(source)
    model, alignment, rows = load_model(source, tokenizer, device), checkpoint / "alignment.pt", {}
    result |= dict(rougeL={}, exact_match={}, alignment=None)
    if alignment.exists():
        result["alignment"] = torch.load(alignment, map_location="cpu", weights_only=True)["numbers"]
    jobs = [(name, seed) for name in sets for seed in args.eval_seeds]
    for name, seed in tqdm(jobs, desc=f"evaluate {folder.name}", disable=None if rank == 0 else True):
        texts, scores = generate(model, tokenizer, sets[name], seed, args, args.no_repeat_ngram)
        rows.setdefault(name, []).append(scores["rougeL"])
        for metric, values in scores.items():
            result[metric].setdefault(name, []).append(statistics.fmean(values))
        if rank == 0:
            with open(folder / "predictions" / f"{name}-{seed}.jsonl", "w") as file:
                file.writelines(json.dumps(row._asdict() | dict(prediction=text)) + "\n"
                                for row, text in zip(sets[name], texts))
    for metric in ("rougeL", "exact_match"):
        result[metric] |= averages(result[metric])
    result["rows"] = {name: np.mean(values, 0).round(2).tolist() for name, values in rows.items()}
    if rank == 0:
        write_json(path, result)
    return result

# Table 1 of the paper: Dolly, SelfInst, Vicuna, S-NI, UnNI; it does not say which f dskd, clp and cla have
PAPER = {
    "untrained": (6.39, 4.72, 10.18, 4.49, 4.64), "teacher": (27.45, 19.42, 20.93, 34.74, 35.98),
    "teacher-gpt2-xl": (27.07, 14.65, 16.24, 27.12, 31.41), "dskd": (25.98, 10.58, 15.54, 19.22, 22.13),
    "sft": (22.83, 9.49, 14.66, 13.55, 16.06), "mined": (21.69, 9.78, 15.59, 14.98, 17.25),
    "uld": (21.73, 9.28, 14.85, 15.17, 17.15), "cma-srkl": (24.64, 11.50, 16.21, 18.40, 21.69),
    "clp": (24.52, 11.35, 15.28, 19.26, 22.12), "cla": (24.20, 11.44, 14.93, 18.53, 21.32),
    "cma-ga-skl": (24.79, 11.82, 15.95, 19.44, 22.05), "cma-ct-kl": (24.63, 10.83, 16.08, 17.87, 21.07),
    "cma-kl": (24.13, 9.73, 15.20, 15.14, 17.78), "cma-ga-kl": (24.92, 11.17, 15.84, 18.19, 21.50)}

def averages(by_set):
    """OOD, the mean over all sets but the first, and All, over every set, from name -> values of seeds."""
    columns = list(by_set.values())
    return {name: [statistics.fmean(values) for values in zip(*part)]
            for name, part in (("OOD", columns[1:]), ("All", columns)) if part}

def bootstrap(group, base, replicates=1000):
    """95 % interval of how much higher a group of training runs scores than the base group, in ROUGE-L over
    all test sets. Each replicate draws test rows, the same for both (paired), and training runs, those of the
    same training seeds if both groups have the same: these share initialisation and row order."""
    rng, gaps = np.random.default_rng(0), []
    group, base = (sorted(runs, key=lambda run: run["seed"]) for runs in (group, base))
    picks = [rng.integers(len(runs), size=(len(runs), replicates)) for runs in (group, base)]
    if [run["seed"] for run in group] == [run["seed"] for run in base]:
        picks[1] = picks[0]
    for name, rows in base[0]["rows"].items():
        shares = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), replicates).T / len(rows)
        scores = (np.array([run["rows"][name] for run in runs]) @ shares for runs in (group, base))
        gaps.append(np.subtract(*(np.take_along_axis(*pair, 0).mean(0) for pair in zip(scores, picks))))
    return np.quantile(np.mean(gaps, 0), (0.025, 0.975))

def report(results, baseline=None):
    """Table 1's form in Markdown from the contents of eval.json files. Runs that differ only in their
    training seed share a line; the paper's scores and the alignment numbers of checkpoints stand beside them.
    InputError: no run has the baseline's name, or the runs were tested on different rows."""
    names, runs, sizes = list(results[0]["rougeL"]), {}, set()
    for result in results:
        runs.setdefault(result["run"], []).append(result)
        sizes.add(str({name: len(rows) for name, rows in result["rows"].items()}))
    if len(sizes) > 1 or baseline and baseline not in runs:
        raise InputError(f"--report: found rows {' and '.join(sorted(sizes))}, baseline {baseline}; expected "
                         f"the same rows in all runs, and a baseline among {', '.join(runs)}")

    def cell(values):  # (training seeds, sampling seeds)
        values = np.array(values)
        return (f"{values.mean():.2f}" + (f" ± {values.mean(1).std(ddof=1):.2f}" if len(values) > 1 else "")
                + (f" ({values.var(1, ddof=1).mean() ** 0.5:.2f})" if values.shape[1] > 1 else ""))

    numbers = ("mass", "mass_once", "mass_repeated", "top", "mmd", "probe")
    numbers = numbers * any(result["alignment"] for result in results)
    lines = [["ROUGE-L", "seeds", *names, *[f"All less {baseline}"] * bool(baseline), *numbers]]
    lines.append(["---"] * len(lines[0]))
    for run, group in runs.items():
        scores = {name: [result["rougeL"][name] for result in group] for name in names}
        line = [run, str(len(group)), *map(cell, scores.values())]
        paper = PAPER.get(re.sub("^(dskd|clp|cla)-[a-z]+$", r"\1", run))
        if paper and names[:-2] == [item.partition("=")[0] for item in TEST_SETS]:
            paper = {name: [value] for name, value in zip(names, paper)}
            for n, (value,) in enumerate((paper | averages(paper)).values(), 2):
                line[n] += f", paper {value:.2f}"
        if baseline:
            gap = np.mean(scores["All"]) - np.mean([result["rougeL"]["All"] for result in runs[baseline]])
            low, high = bootstrap(group, runs[baseline])
            line.append("" if run == baseline else f"{gap:+.2f} [{low:+.2f}, {high:+.2f}]")
        found = [result["alignment"] or {} for result in group]
        line += [cell([[x[n]] for x in found]) if all(n in x for x in found) else "" for n in numbers]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + (
        "\n\nMean over training and sampling seeds ± standard deviation over training seeds (over sampling "
        "seeds, within a run)" + ("; [95 % interval of the difference]." if baseline else "."))

# 10. Alignment analysis =====================================================================================
def align_batch(args, proj, student, teacher, s, t):
    """Q, K, A^{t->s} and M^{t->s} of a batch of two `Side`s; args: method, normalise_queries."""
    with torch.no_grad(), autocast(s.ids.device):
        q, k, _ = keys_and_queries(
            proj, s.inputs, s.targets, t.inputs, t.targets, s.mask, t.mask, student.get_input_embeddings(),
            teacher.get_input_embeddings(), args.normalise_queries)
        chunks = chunks_of(s, t)
        return q, k, align_positions(args.method, q, k, s.mask, t.mask, chunks)[0], chunks

def alignment_numbers(q, k, a, chunks, s, t):
    """How well A^{t->s} (B, S, T) finds the right chunk, and how far queries are from keys, by name.

    For all student positions that have a chunk, and for those whose token occurs once or repeats in its
    response: `mass` of attention inside the chunk; `top`, the share whose strongest key is in it; `entropy`,
    in nats. Of Q and K: `mean_gap` |mean q - mean k|, `norm_q`, `norm_k`, `mmd` (the squared maximum mean
    discrepancy, unbiased, with the kernel exp(-|x - y|^2 / m), m the median of |x - y|^2), and `probe`, the
    balanced accuracy of a linear probe (ridge regression, fitted on the even rows, tested on the odd ones).
    CLP has no use for queries; its are those of the random start.
    """
    numbers, placed = {}, chunks.any(-1)
    same = (s.targets[:, :, None] == s.targets[:, None]) & s.mask[:, None]
    repeated = same.sum(-1) > 1
    values = dict(mass=(a * chunks).sum(-1), entropy=torch.special.entr(a).sum(-1),
                  top=chunks.gather(-1, a.argmax(-1, keepdim=True))[..., 0].float())
    for split, where in (("", placed), ("_once", placed & ~repeated), ("_repeated", placed & repeated)):
        numbers |= {name + split: value[where].mean().item() for name, value in values.items() if where.any()}
    x, y = full_precision(q[s.mask]), full_precision(k[t.mask])
    z, n = torch.cat([x, y]), len(x)
    distance = torch.cdist(z, z) ** 2
    kernel = torch.exp(-distance / distance.median()).fill_diagonal_(0)
    own = [part.sum() / (len(part) * (len(part) - 1)) for part in (kernel[:n, :n], kernel[n:, n:])]
    numbers |= dict(mean_gap=(x.mean(0) - y.mean(0)).norm().item(), norm_q=x.norm(dim=-1).mean().item(),
                    norm_k=y.norm(dim=-1).mean().item(), mmd=(sum(own) - 2 * kernel[:n, n:].mean()).item())
    rows = torch.cat([mask.nonzero()[:, 0] for mask in (s.mask, t.mask)])
    even, label = rows % 2 == 0, torch.ones_like(z[:, 0])
    label[n:] = -1
    z, middle = z - z[even].mean(0), label[even].mean()
    gram = z[even] @ z[even].mT
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), device=z.device)
    score = z @ z[even].mT @ torch.linalg.solve(gram + ridge, label[even] - middle) + middle
    right = [(score * label > 0)[~even & (label == side)].float() for side in (1, -1)]
    if all(map(len, right)):  # there are odd rows
        numbers["probe"] = sum(side.mean().item() for side in right) / 2
    return numbers

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Alignment</title><style>
:root { color-scheme: light dark; --heat: light-dark(#0b5cad, #79c0ff); --edge: light-dark(#c2410c, #ffa657) }
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem } pre { white-space: pre-wrap }
section { display: flex; gap: 2rem; overflow-x: auto } figure { margin: 0 } figcaption { font-weight: 600 }
svg { font: 11px ui-monospace, monospace; fill: currentColor } rect { fill: var(--heat) }
rect:hover { stroke: currentColor } .chunk { fill: none; stroke: var(--edge); pointer-events: none }
table { border-collapse: collapse } th, td { padding: 0 .6rem; text-align: right; border: 1px solid #8886 }
</style><h1>Alignment of student and teacher</h1><p>The weight with which each student position (down) reads
each teacher position (across); point at a cell for its value. Outlines are chunks, the smallest spans of text
that begin and end between tokens of both sides. The labels are the tokens that the positions predict.</p>"""

def heatmap(name, a, chunks, labels):
    """An SVG figure of one row's A^{t->s}, a (S, T). chunks, labels: chunk numbers and texts of the student's
    tokens (down) and the teacher's (across)."""
    cell, margin = 15, 95
    down, across = ([html.escape(text[:13] + "…" * (len(text) > 13)) for text in texts] for texts in labels)

    def box(j, i, width, height, more):
        return (f'<rect x="{margin + cell * j}" y="{margin + cell * i}" width="{cell * width}" '
                f'height="{cell * height}" {more}</rect>')

    shapes = [f'<text x="{margin - 4}" y="{margin + cell * i + 11}" text-anchor="end">{text}</text>'
              for i, text in enumerate(down)]
    shapes += [f'<text transform="translate({margin + cell * j + 11},{margin - 4}) rotate(-90)">{text}</text>'
               for j, text in enumerate(across)]
    shapes += [box(j, i, 1, 1, f'fill-opacity="{a[i][j]:.2f}"><title>{s} from {t}: {a[i][j]:.3f}</title>')
               for i, s in enumerate(down) for j, t in enumerate(across)]
    for chunk in sorted(set(chunks[0]) & set(chunks[1])):
        (i, height), (j, width) = ((numbers.index(chunk), numbers.count(chunk)) for numbers in chunks)
        shapes.append(box(j, i, width, height, 'class="chunk">'))
    size = f'width="{margin + cell * len(across) + 1}" height="{margin + cell * len(down) + 1}"'
    return f"<figure><figcaption>{html.escape(name)}</figcaption><svg {size}>{''.join(shapes)}</svg></figure>"

def write_alignment(args, checkpoints, path, device):
    """One page with, for each checkpoint side by side, the alignment's numbers on development rows and a
    heatmap of the first --align of them. InputError: a checkpoint without alignment.pt."""
    rows = read_rows(fetch(f"{args.data}/raw.jsonl"), min(args.dev_rows, DEV_ALIGNED))
    columns, figures = {}, {}
    if not checkpoints or not all((checkpoint / "alignment.pt").exists() for checkpoint in checkpoints):
        raise InputError(f"--align: found no alignment.pt in {', '.join(map(str, checkpoints)) or 'a run'}; "
                         "expected checkpoints of cma, clp or cla")
    for checkpoint in checkpoints:
        saved = torch.load(checkpoint / "alignment.pt", map_location=device, weights_only=True)
        sources, name = (str(checkpoint), saved["teacher"]), checkpoint.resolve().parent.name
        tokenizers = [load_tokenizer(source) for source in sources]
        models = [load_model(*pair, device) for pair in zip(sources, tokenizers)]
        proj = Projectors(*(model.get_input_embeddings().weight.shape[1] for model in models)).to(device)
        proj.load_state_dict(saved["proj"])
        sides, _ = training_data(rows, tokenizers, args.max_prompt, args.max_length)
        batch = [collate(side, tok.eos_token_id, device) for side, tok in zip(sides, tokenizers)]
        q, k, a, chunks = align_batch(argparse.Namespace(**saved), proj, *models, *batch)
        columns[name] = alignment_numbers(q, k, a, chunks, *batch)
        for weights, *pair in list(zip(a, *sides))[:args.align]:
            labels = [[tok.decode([token]).replace(" ", "·").replace("\n", "↵")
                       for token in example.ids[example.start:]] for tok, example in zip(tokenizers, pair)]
            figures.setdefault(tokenizers[0].decode(pair[0].ids), []).append(
                heatmap(name, weights.tolist(), [example.chunk for example in pair], labels))
    cells = [["", *columns]] + [[name, *(f"{column.get(name, math.nan):.3f}" for column in columns.values())]
                                for name in columns[name]]
    table = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in cells)
    body = "".join(f"<h2>Row {n}</h2><pre>{html.escape(text)}</pre><section>{''.join(maps)}</section>"
                   for n, (text, maps) in enumerate(figures.items(), 1))
    write_atomically(path, lambda file: file.write(f"{PAGE}<table>{table}</table>{body}</html>".encode()))
    print(f"The alignment is in {path.resolve()}")

# 11. Demo: tasks, tokenizers and models made here ===========================================================
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

def write_demo(folder, seed=10):
    """Writes the demo's rows, two byte-level BPE tokenizers and three untrained models: a student, a teacher
    with another tokenizer and one with the student's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    rng = random.Random(seed)
    rows = {name: [demo_row(rng, name == "longer") for _ in range(count)]
            for name, count in (("raw", 4100), ("seen", 200), ("longer", 200))}
    folder.mkdir(parents=True, exist_ok=True)
    for name in rows:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    # The student's tokenizer cuts up words and keeps numbers; the teacher's keeps words and cuts up numbers.
    student = transformers.GPT2Config(n_positions=256, n_embd=64, n_layer=2, n_head=4, initializer_range=0.08)
    same = transformers.GPT2Config(n_positions=256, n_embd=160, n_layer=4, n_head=5, initializer_range=0.05)
    teacher = transformers.Qwen2Config(
        max_position_embeddings=256, hidden_size=160, intermediate_size=480, num_hidden_layers=4,
        num_attention_heads=5, num_key_value_heads=5, initializer_range=0.05)
    cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    for name, config, size, cut in (("student", student, 420, cuts[1:]), ("teacher", teacher, 700, cuts),
                                    ("teacher-same", same, 420, cuts[1:])):
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

def demo_settings(args):
    """The defaults of a demo's run."""
    data = pathlib.Path(args.out) / "data"
    return dict(
        data=str(data), student=str(data / "student"),
        tests=[f"{name}={data / name}.jsonl" for name in ("seen", "longer")],
        teacher=str(data / ("teacher-same" if args.method in SAME_TOKENIZER else "teacher")), dev_rows=100,
        eval_seeds=[10, 20, 30], max_new_tokens=40, no_repeat_ngram=0, log_every=25,
        micro_batch=16, teacher_epochs=8, teacher_lr=2e-3, epochs=4, lr=2e-3, lr_projectors=2e-3)

# 12. Main ===================================================================================================
def run_name(args):
    """What a run is called in tables."""
    if args.name or args.eval_only:
        return args.name or "-".join(pathlib.Path(args.eval_only).parts[-2:])
    return "-".join([args.method, *["ga"] * args.ga, *["ct"] * args.ct, *["released"] * args.released_kq,
                     *["nq"] * args.normalise_queries, *[args.div] * (args.method in (*DUAL_SPACE, "kd"))])

def parse(argv=None):
    """The settings of a command line. InputError: flags that exclude each other."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.demo:
        parser.set_defaults(out="runs/demo")
        parser.set_defaults(**demo_settings(parser.parse_args(argv)))
        args = parser.parse_args(argv)
    queries, matches = args.method in ("cma", "cla"), args.ga or args.ct
    for flag, wrong, expected in (
            ("--ga or --ct", matches and not queries, "--method cma or cla"),
            ("--normalise-queries", args.normalise_queries and not queries, "--method cma or cla"),
            ("--ga", args.ga and args.ct, "no --ct beside it"),
            ("--released-kq", args.released_kq and not matches, "--ga or --ct"),
            ("--baseline", args.baseline and not args.report, "--report"),
            ("--align", args.align and not (args.report or args.eval_only or args.method in ALIGNED),
             "--method cma, clp or cla")):
        if wrong:
            raise InputError(f"{flag}: found --method {args.method}, expected {expected}")
    return args

def check_pair(args):
    """InputError if the method cannot work on the pair: kd, dskd want one tokenizer, kd heads of one size."""
    sources = args.student, args.teacher
    tokenizers = [load_tokenizer(source) for source in sources]
    sizes = [load(AutoConfig, source).get_text_config().vocab_size for source in sources]
    rows = read_rows(fetch(f"{args.data}/raw.jsonl"), 100)
    same = tokenizers[0].get_vocab() == tokenizers[1].get_vocab() and [
        e.ids for e in encode(tokenizers[0], rows, args.max_length)] == [
        e.ids for e in encode(tokenizers[1], rows, args.max_length)]
    if args.method in SAME_TOKENIZER and not same:
        raise InputError(f"--method {args.method}: found different tokenizers in {' and '.join(sources)}, "
                         "expected one; cma, clp, cla, uld and mined work with two")
    if args.method == "kd" and sizes[0] != sizes[1]:
        raise InputError(f"--method kd: found heads of {sizes[0]} and {sizes[1]} tokens, expected one size")

def experiment(args, device):
    """The scores of one run: fine-tunes the teacher if need be, trains, evaluates the best checkpoint."""
    out, source, teacher = pathlib.Path(args.out), args.eval_only, None
    folder = out / (run_name(args) if args.name or source else f"{run_name(args)}-{args.seed}")
    read_test_sets(args)  # a wrong file is told now, not after hours of training
    if not source and args.method != "sft":
        check_pair(args)
        teacher = args.teacher
        if not args.teacher_ready:  # one teacher for all runs, whatever their seed
            load_model(args.student, load_tokenizer(args.student), device)  # a wrong one is told now
            tuning = dict(method="sft", student=teacher, epochs=args.teacher_epochs, lr=args.teacher_lr,
                          seed=10, fresh=False)
            teacher = str(train(argparse.Namespace(**vars(args) | tuning),
                                out / f"{pathlib.Path(teacher).name}-tuned", device))
    source = source or str(train(args, folder, device, teacher))
    result = evaluate(args, source, folder, device)
    if args.align and world()[0] == 0:
        write_alignment(args, [pathlib.Path(source)], folder / "alignment.html", device)
    return result

def main(argv=None):
    """Runs the command line; returns the contents of eval.json, or of those reported on."""
    args = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--nproc_per_node: found process {device.index + 1}, expected no more than the "
                             f"{torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(device)
    if args.report:
        paths = [pathlib.Path(run) / "eval.json" for run in args.report]
        results = [json.loads(path.read_text()) for path in paths]
        print(report(results, args.baseline))
        if args.align:
            aligned = [path.parent / "best" for path, result in zip(paths, results) if result["alignment"]]
            write_alignment(args, aligned, pathlib.Path(args.out) / "alignment.html", device)
        return results
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        made = pathlib.Path(args.out) / "data"
        if args.demo and world()[0] == 0 and not (made / "teacher-same").exists():
            write_demo(made)
        if dist.is_initialized():
            dist.barrier()
        result = experiment(args, device)
        if dist.is_initialized():
            dist.barrier()  # none leaves while another still needs it
        if world()[0] == 0:
            print(report([result]))
            print(f"Checkpoints, logs, predictions and scores are in {pathlib.Path(args.out).resolve()}")
        return result
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError, FloatingPointError) as error:
        print(f"dskd_ga.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except Stopped as stopped:
        print(f"dskd_ga.py: {stopped.args[1]}", file=sys.stderr)
        sys.exit(128 + stopped.args[0])
