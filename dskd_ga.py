#!/usr/bin/env python3
"""DSKD-CMA-GA: distil a large language model into a small one that has another tokenizer.

Reference implementation of "Dual-Space Knowledge Distillation with Key-Query Matching for Large Language
Models with Vocabulary Mismatch" (Tsiapali, Do, Knill; ICASSP 2026; arXiv:2603.22056 v1), in one file.

    python dskd_ga.py --div skl --ga                         # the paper's best row, on one GPU
    torchrun --nproc_per_node=4 dskd_ga.py --div skl --ga    # the same run on four GPUs
    python dskd_ga.py --method sft                           # plain fine-tuning, without a teacher
    python dskd_ga.py --eval-only runs/cma-ga-skl-10/best    # evaluation of any checkpoint

The way of the data: text row -> two tokenisations of the same text -> the teacher reads each row once and its
last hidden states are kept -> padded batch, a `Side` for each model -> the student's trunk -> only response
positions -> one function of tensors for every term of eqs. (1)-(9), another for (14) -> one backward pass.
Tensors as wide as a vocabulary exist only at response positions, and only for a slice of them at a time.

Contents: 1 arguments, 2 data, 3 models, 4-7 the paper, 8 training, 9 evaluation, 10 main.
ROUGE-L, the paper's metric, sees only a-z and 0-9: it says nothing about responses in other scripts.

Departures from the paper, each marked NOT IN PAPER where it happens
  1. KD^{t->s} counts only where argmax q^{t->s} is gold, as in the authors' code; --all-positions: always.
  2. KD^{s->t} is forward KL whatever --div is, as in the authors' code; --s2t-div changes it.
  3. Eq. (8) prints f(p^s || q^{t->s}). As in the authors' code, f's first argument is the distribution that
     is learnt from: kl is KL(q^{t->s} || p^s) and KL(p^t || q^{s->t}).
  4. N_std is over each sequence's own real positions: a loss depends on neither padding nor batch.
  5. D is trained, as eq. (14) says, and L_KQ takes means over the step's real positions. In the authors' code
     D keeps its random start, and the means are over padding too.
  6. A step's rows are sorted by length into micro-batches; an epoch's last, incomplete step is left out.
  7. Prompts get the special tokens that their tokenizer puts in front. Evaluation keeps the end of long ones.
  8. --normalise-queries gives queries the N_std that eq. (2) gives keys; off by default.
  9. Texts are brought to Unicode's composed form (NFC), so that both tokenizers read the same characters.

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
import argparse, collections, contextlib, datetime, functools, hashlib, json, math, os, pathlib
import resource, shutil, sys, time, unicodedata
from typing import NamedTuple
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from rouge_score import rouge_scorer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

# 1. Arguments: the defaults are the paper's setting =========================================================
DIVERGENCES = ("kl", "rkl", "jsd", "skl", "srkl", "akl")
TEST_SETS = ["Dolly=MiniLLM/dolly/valid.jsonl", "SelfInst=MiniLLM/self-inst/valid.jsonl",
             "Vicuna=MiniLLM/Vicuna/valid.jsonl", "S-NI=MiniLLM/sinst/11_/valid.jsonl",
             "UnNI=MiniLLM/uinst/11_/valid.jsonl"]
MAY_BE_ZERO = ("skew", "kq_weight", "clip", "seed", "eval_seeds", "eval_temperature", "no_repeat_ngram")
class InputError(ValueError):
    """Bad settings, rows or models: `main` prints it in one line and ends with status 2."""
def check(ok, where, found, expected):
    """Refuses input that is not ok. where: a flag, a model, or file, line and field."""
    if not ok:
        raise InputError(f"{where}: found {str(found)[:300]}, expected {expected}")

def build_parser(methods=("cma", "sft")):
    """The command line as an argparse parser. methods: the choices of --method, the default first."""
    parser = argparse.ArgumentParser(
        description="Distil a language model into one with another tokenizer; the file's header says more.",
        epilog="A command that was stopped goes on from its last save when it is given again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("what to run").add_argument
    add("--method", choices=methods, default=methods[0], help="how to train; sft: without a teacher")
    add("--ga", action="store_true", help="add the adversary on keys and queries, eq. (14)")
    add("--div", choices=DIVERGENCES, default="skl", help="f of KD^{t->s}; skl suits --ga, srkl no --ga")
    add("--eval-only", metavar="MODEL", help="evaluate this folder or hub id, train nothing")
    add("--out", default="runs", help="folder of all runs; those in it share a fine-tuned teacher")
    add("--name", help="the run's folder in it: NAME-SEED, by default METHOD[-ga][-nq]-DIV-SEED")
    add = parser.add_argument_group("models and data: folders or hub ids").add_argument
    add("--student", default="openai-community/gpt2", help="the model to train")
    add("--teacher", default="Qwen/Qwen1.5-1.8B", help="its states take 3.6 GB of main memory a process")
    add("--teacher-ready", action="store_true", help="no fine-tuning of it (30 GB of GPU; the rest fits 24)")
    add("--teacher-epochs", type=float, default=10, help="length of its fine-tuning; fewer for many rows")
    add("--teacher-lr", type=float, default=2e-5, help="learning rate of that; higher for a small teacher")
    add("--data", default="MiniLLM/dolly", help="where raw.jsonl is: rows of instruction, input, output")
    add("--dev-rows", type=int, default=1000, help="first rows of --data, held out to choose the checkpoint")
    add("--max-prompt", type=int, default=256, help="training drops longer prompts, evaluation cuts them")
    add("--max-length", type=int, default=512, help="tokens of prompt and response; fewer if memory is short")
    add = parser.add_argument_group("objective").add_argument
    add("--temperature", type=float, default=2.0, help="tau, on both sides of the divergences")
    add("--skew", type=float, default=0.1, help="a of skl and srkl, 0 to 1; higher if training is unstable")
    add("--kq-weight", type=float, default=1.0, help="factor of L_KQ in eq. (16)")
    add("--normalise-queries", action="store_true", help="N_std(Q), as for K; if attention stays uniform")
    add("--all-positions", action="store_true", help="KD^{t->s} everywhere: eq. (8) to the letter")
    add("--s2t-div", choices=DIVERGENCES, default="kl", help="f of KD^{s->t}; in eq. (8) the same as --div")
    add = parser.add_argument_group("optimisation: AdamW with a cosine to 1e-7").add_argument
    add("--epochs", type=float, default=20, help="length of training, a fraction allowed")
    add("--batch-size", type=int, default=32, help="rows a step, over all processes")
    add("--micro-batch", type=int, default=4, help="rows at a time; fewer if memory is short")
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

def world():  # (rank, number of processes)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
def say(*words):  # on rank 0, without breaking a progress bar
    if world()[0] == 0:
        tqdm.write(" ".join(map(str, words)))
def progress(items, name):  # disable=None: no bar where there is no terminal
    return tqdm(items, desc=name, leave=False, disable=world()[0] > 0 or None)

# 2. Data: text row -> two tokenisations of the same text -> padded batch ====================================
class Row(NamedTuple):
    """A prompt and the responses that are right for it; training uses the first."""
    prompt: str
    references: list
class Example(NamedTuple):
    """A row as one model reads it, with n response tokens."""
    ids: list              # prompt, response, end of text; cut at the length limit
    start: int             # where the response begins in ids
    chunk: list = None     # n numbers, from a method's `annotate`
    hidden: Tensor = None  # (n, d) last hidden states at the response positions, from `read_once`
    @property
    def count(self):  # of response tokens
        return len(self.ids) - self.start
class Pair(NamedTuple):
    """A row as student and teacher read it; without a teacher (sft) t is None."""
    s: Example
    t: Example = None
class Side(NamedTuple):
    """A padded batch for one model: B sequences, up to n response positions, N of them real."""
    inputs: Tensor         # (B, n) the token that is read at a position
    targets: Tensor        # (B, n) the next token, which is predicted there
    mask: Tensor           # (B, n) bool, True on real positions
    ids: Tensor = None     # (B, L) what the trunk reads
    pos: Tensor = None     # (B, n) where in ids the response positions are
    hidden: Tensor = None  # (B, n, d) last hidden states there
    chunk: Tensor = None   # (B, n) the numbers of `annotate`; -1 on padding
    real: Tensor = None    # (N,) where the flattened mask is True, see `at_real`

def fetch(source):
    """Path of a data file: a local one or, for ORG/DATASET/FILE, one of the hub, downloaded once."""
    if os.path.exists(source) or source.count("/") < 2:
        return source
    org, dataset, file = source.split("/", 2)
    try:
        return hf_hub_download(f"{org}/{dataset}", file, repo_type="dataset")
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: found no such file here, nor on the hub ({error})") from error

def alpaca_prompt(instruction, context):
    """The Alpaca template, with or without a further context."""
    paired = ", paired with an input that provides further context" if context else ""
    middle = f"### Input:\n{context}\n\n" if context else ""
    return (f"Below is an instruction that describes a task{paired}. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n")

def composed(text, place):  # place: for the error
    check(isinstance(text, str) and text, place, repr(text), "a text that is not empty")
    return unicodedata.normalize("NFC", text)  # NOT IN PAPER (departure 9)

def read_rows(path, limit=None):
    """The `Row`s of a file of JSON lines: `prompt`, or `instruction` and `input`, and `output`, a text or a
    list of texts. InputError names line and field of a bad row."""
    lines = pathlib.Path(path).read_bytes().rstrip().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:limit], 1):
        place = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
            json.dumps(row, ensure_ascii=False).encode()  # fails on half a surrogate pair
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: found {error}, expected a JSON object") from error
        check(isinstance(row, dict), place, row, "a JSON object")
        field = "prompt" if "prompt" in row else "instruction"
        context, output = row.get("input"), row.get("output")
        prompt = composed(row.get(field), f"{place}, {field}")
        if field == "instruction":
            context = "" if context in (None, "") else composed(context, f"{place}, input")
            prompt = alpaca_prompt(prompt, context)
        references = output if output and isinstance(output, list) else [output]  # test sets have lists
        rows.append(Row(prompt, [composed(text, f"{place}, output") for text in references]))
    return rows

def prompt_ids(tokenizer, rows, limit=sys.maxsize):
    """The ids of each row's prompt. A prompt over the limit keeps its end."""
    # NOT IN PAPER: the special tokens that the tokenizer puts in front of a text, never twice (departure 7)
    probe = tokenizer("a", return_special_tokens_mask=True)
    lead = probe["input_ids"][:probe["special_tokens_mask"].index(0)]
    prompts = [row.prompt for row in rows]
    result = []
    for ids in tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]:
        body = ids[len(lead):] if ids[:len(lead)] == lead else ids
        body = body[max(0, len(lead) + len(body) - limit):]
        result.append((lead + body) or [tokenizer.eos_token_id])  # there must be a position to predict from
    return result

def pairs(rows, tokenizers,  # the student's and, if there is a teacher, the teacher's
          max_prompt=256, max_length=512,
          annotate=None):    # (row, s, t, tokenizers) -> a list of numbers for s, and one for t
    """A `Pair` for each row with room for a response, if the student's prompt is within max_prompt."""
    columns = []
    for tokenizer in tokenizers:
        # a response ends in the end of text, once; special tokens spelt out inside it are plain text
        texts = [row.references[0].removesuffix(tokenizer.eos_token) for row in rows]
        responses = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        examples = []
        for prompt, response in zip(prompt_ids(tokenizer, rows), responses["input_ids"]):
            ids = prompt + response + [tokenizer.eos_token_id]
            examples.append(Example(ids[:max_length], len(prompt)))
        columns.append(examples)
    kept = []
    for row, *examples in zip(rows, *columns):
        if examples[0].start <= max_prompt and all(example.count > 0 for example in examples):
            numbers = (None, None) if annotate is None else annotate(row, *examples, tokenizers)
            kept.append(Pair(*[e._replace(chunk=chunk) for e, chunk in zip(examples, numbers)]))
    return kept

def plan_epoch(data, batch_size, micro_batch, seed, epoch):
    """The epoch's optimiser steps, each a list of micro-batches of `Pair`s; fixed by data, seed and epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(len(data))
    steps = []
    for start in range(0, len(data) - batch_size + 1, batch_size):
        rows = [data[row] for row in order[start:start + batch_size]]
        # NOT IN PAPER: rows of like length share a micro-batch, so that little is padded (departure 6)
        rows.sort(key=lambda pair: len(pair.s.ids))
        steps.append([rows[i:i + micro_batch] for i in range(0, batch_size, micro_batch)])
    return steps

def padded(sequences, value=0, side="right"):  # one tensor, as long as the longest; without sequences None
    if sequences[0] is not None:
        tensors = list(map(torch.as_tensor, sequences))
        return nn.utils.rnn.pad_sequence(tensors, True, value, padding_side=side)
def collate(examples, device):
    """The examples as a `Side` on the device."""
    ids, starts, chunk, hidden = zip(*examples)
    mask = padded([[True] * example.count for example in examples])
    pos = padded([torch.arange(start, len(x)) - 1 for x, start in zip(ids, starts)])  # before each token
    ids = padded(ids)
    side = Side(inputs=ids.gather(1, pos), targets=ids.gather(1, pos + 1), mask=mask,
                ids=ids[:, :-1].contiguous(), pos=pos, hidden=padded(hidden), chunk=padded(chunk, -1),
                real=mask.flatten().nonzero().squeeze(1))
    if device.type == "cuda":  # from pinned memory: the host does not wait for the copy
        side = Side(*[x if x is None else x.pin_memory().to(device, non_blocking=True) for x in side])
    return side

# 3. Models: trunk, head and embeddings of any causal language model =========================================
def precision(device):  # of matrix products and of the frozen teacher: bf16 on GPUs that have it
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32
def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == torch.bfloat16)
def full_precision(x):  # half precision to float32; float64, as in the tests, stays
    return x.to(torch.promote_types(x.dtype, torch.float32))
def at_real(x, side):
    """x (B, n, ...) at the side's N real positions, (N, ...). To find these on a GPU, the host must wait."""
    real = side.mask.flatten().nonzero().squeeze(1) if side.real is None else side.real
    return x.flatten(0, 1).index_select(0, real)
def head_of(model):  # W (V, d)
    return model.get_output_embeddings().weight

def response_hidden(model, side):
    """h: the last hidden states, after the final norm, at the response positions, (B, n, d)."""
    # Padding is on the right and attention is causal: no real position sees padding, so no mask is needed.
    hidden = model.get_decoder()(input_ids=side.ids, use_cache=False).last_hidden_state
    return hidden.take_along_dim(side.pos.unsqueeze(2), 1)

@torch.no_grad()
def load_model(source,  # a folder or hub id
               device, dtype=torch.float32):
    """A causal language model and its tokenizer. InputError says why, if one would fail or be wrong later."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        end = tokenizer.eos_token_id
        usable = tokenizer.is_fast and end is not None and len(tokenizer) > 1
        check(usable, "tokenizer", type(tokenizer).__name__, "a fast one that has an end of text")
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
        check(not info["missing_keys"], "weights", f"none for {info['missing_keys']}", "all")
        head = model.get_output_embeddings()
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        usable = not hasattr(model, "hf_quantizer") and head.bias is None and cap is None
        check(usable, "weights or head", "quantised ones, a bias or a cap", "float weights, a matrix alone")
        model = model.to(device).eval().requires_grad_(False)  # a vision tower, say, gets no gradient
        model.get_decoder().requires_grad_(True)
        head.requires_grad_(True)
        model.generation_config.update(  # the evaluation's sampling; saved with every checkpoint
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, eos_token_id=end, pad_token_id=end)
        # a test: the logits that it generates from behind padding are head times trunk without padding
        ids, mask = torch.tensor([[end, 1, 2], [0, 1, 1]], device=device).unsqueeze(1)
        hidden = model.get_decoder()(input_ids=ids[:, 1:], use_cache=False).last_hidden_state[0, -1]
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False,
                                   output_logits=True, return_dict_in_generate=True)
        wanted = head.weight @ hidden
        gap = torch.dist(generated.logits[0][0], wanted).item() / wanted.norm().item()
        check(gap <= 0.05, "logits", f"{gap:.2g} away", "head times trunk, with and without padding")
        return model, tokenizer
    except Exception as error:
        raise InputError(f"{source} is no usable causal language model: {error!r}") from error

def check_readable(model, sequences, more=0):
    """Refuses lists of ids that the model cannot read, each with `more` tokens after it."""
    longest = max(map(len, sequences), default=0) + more
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest
    check(longest <= limit, model.name_or_path, f"a row of {longest} tokens", f"its {limit} positions")
    size, highest = len(model.get_input_embeddings().weight), max(map(max, sequences), default=0)
    check(highest < size, model.name_or_path, f"the token {highest}", f"its {size} embeddings")

@torch.no_grad()
def read_once(teacher, data, device):
    """The `Pair`s with h^t at their response positions, read by the teacher's model, which is then freed."""
    model = teacher.model.requires_grad_(False)
    size = sum(pair.t.count for pair in data) * teacher.head[0].nbytes
    say("the teacher's states take", round(size / 1e9, 2), "GB of main memory in each process")
    # every process reads all rows, in batches that the rows alone decide: a restart gets the same numbers
    order = sorted(range(len(data)), key=lambda row: len(data[row].t.ids))
    result = list(data)
    for start in progress(range(0, len(order), 16), "the teacher reads the rows"):
        rows = order[start:start + 16]
        side = collate([data[row].t for row in rows], device)
        with autocast(device):
            hidden = response_hidden(model, side).to(model.dtype).cpu()
        check(hidden.isfinite().all(), "the teacher's states", "one that is not finite", "numbers")
        for row, h in zip(rows, hidden):
            s, t = data[row]
            result[row] = Pair(s, t._replace(hidden=h[:t.count].clone()))  # without the batch's padding
    teacher.model = None
    return result

# 4. Divergences f(p || q): q learns from p ==================================================================
def divergence(
        name,                            # kl | rkl | jsd | skl, srkl (DistiLLM) | akl (Wu et al. 2025)
        student_logits, teacher_logits,  # (..., V): of q, which learns, and of p; -inf is probability 0
        temperature=2.0,                 # tau, on both sides, without a factor tau^2
        skew=0.1, head_mass=0.5):        # a of skl and srkl; the part of p that is akl's head
    """f of eq. (8) for each position, (...)."""
    def log_softmax(logits):  # a finite floor: 0 * (-inf - -inf) would be nan
        return (full_precision(logits).clamp(min=-1e30) / temperature).log_softmax(-1)
    def kl(log_a, log_b):  # KL(a || b)
        return (log_a.exp() * (log_a - log_b)).sum(-1)
    def mix(log_a, log_b, weight):  # log(weight a + (1 - weight) b)
        return torch.logaddexp(log_a + math.log(weight + 1e-30), log_b + math.log(1 - weight + 1e-30))

    log_p, log_q = log_softmax(teacher_logits), log_softmax(student_logits)  # NOT IN PAPER (departure 3)
    if name == "kl":
        return kl(log_p, log_q)
    if name == "rkl":
        return kl(log_q, log_p)
    if name == "jsd":
        log_m = mix(log_p, log_q, 0.5)
        return (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    if name == "skl":
        return kl(log_p, mix(log_p, log_q, skew))
    if name == "srkl":
        return kl(log_q, mix(log_q, log_p, skew))
    check(name == "akl", "divergence", name, DIVERGENCES)
    # akl's head is p's most probable tokens up to head_mass; the weights of the two directions are constants
    with torch.no_grad():
        p, order = log_p.exp().sort(-1, descending=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        in_head = (p.cumsum(-1) - p) < head_mass
        share = (gap * in_head).sum(-1) / gap.sum(-1).clamp(min=1e-30)  # g_head / (g_head + g_tail)
    return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)

# 5. Cross-model attention (CMA) =============================================================================
class Projectors(nn.Module):
    """The three linear maps between a student of width d_s and a teacher of width d_t."""
    def __init__(self, d_s, d_t):
        super().__init__()
        self.query = nn.Linear(2 * d_s, 2 * d_t)  # P_Q of eq. (1)
        self.t2s = nn.Linear(d_t, d_s)            # P^{t->s} of eq. (5)
        self.s2t = nn.Linear(d_s, d_t)            # P^{s->t} of eq. (4)

def zero_padding(x, mask):  # x (B, n, d) with 0 where mask (B, n) is False, whatever was there, nan included
    return x.masked_fill(~mask.unsqueeze(2), 0)

def std_normalise(x, mask):
    """N_std of eqs. (2) and (5): x (B, n, d) over its standard deviation. Padding becomes 0."""
    x = zero_padding(full_precision(x), mask)  # NOT IN PAPER: each sequence's own positions (departure 4)
    count = mask.sum(1)[:, None, None] * x.shape[2]  # (B, 1, 1): entries at real positions
    mean = x.sum((1, 2), keepdim=True) / count.clamp(min=1)
    square = zero_padding((x - mean) ** 2, mask).sum((1, 2), keepdim=True)
    variance = square / (count - 1).clamp(min=1)
    return x / variance.clamp(min=1e-12).sqrt()

def cross_model_attention(q, k, allowed):  # (B, S, w), (B, T, w), (B, S, T) bool: which pairs may meet
    """A^{t->s} (B, S, T), A^{s->t} (B, T, S) of eq. (3). Rows sum to 1; those with nothing allowed are 0."""
    q = zero_padding(full_precision(q), allowed.any(2))
    k = zero_padding(full_precision(k), allowed.any(1))
    with torch.autocast(q.device.type, enabled=False):  # bf16 is too coarse for scores in the hundreds
        scores = q @ k.mT / math.sqrt(q.shape[2])
    scores = scores.masked_fill(~allowed, -1e30)
    return scores.softmax(-1) * allowed, scores.mT.softmax(-1) * allowed.mT                   # (3)

# 6. Key-query matching: the generative adversary (GA) =======================================================
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
        return full_precision(self.mlp(gate * z.relu() + (1 - gate) * x).squeeze(-1))

def reverse(x):  # x with its gradient's sign turned: what x comes from ascends what all else descends
    return 2 * x.detach() - x

def ga_loss(disc, q, k,           # D; (B, S, w), (B, T, w)
            s_mask, t_mask,       # (B, S), (B, T): True on real positions
            n_s=None, n_t=None):  # divisors of the sums over these; None: their counts
    """L_KQ of eq. (14) as cross-entropy, D(q) -> 1 and D(k) -> 0; and detached sums for the log. One backward
    pass serves both players: D descends this loss; P_Q, behind `reverse`, ascends it. Keys are constants."""
    n_s = s_mask.sum() if n_s is None else n_s
    n_t = t_mask.sum() if n_t is None else n_t
    z_q = disc(reverse(zero_padding(q, s_mask)))                                              # (B, S)
    z_k = disc(zero_padding(k, t_mask).detach())                                              # (B, T)
    loss_q = (F.softplus(-z_q) * s_mask).sum() / n_s  # of -log D(q)
    loss_k = (F.softplus(z_k) * t_mask).sum() / n_t   # of -log(1 - D(k))
    D_q, D_k = z_q.detach().sigmoid() * s_mask, z_k.detach().sigmoid() * t_mask
    terms = dict(D_q=D_q.sum(), accuracy_q=(D_q > 0.5).sum(),
                 D_k=D_k.sum(), accuracy_k=(t_mask & (D_k <= 0.5)).sum())
    return loss_q + loss_k, terms  # NOT IN PAPER: means over real positions (departure 5)      (14)

# 7. Objective ===============================================================================================
def sliced_loss(fn,       # (logits_1, ..., logits_J, *rows) -> (loss, *terms), sums over some positions
                sides,    # J pairs of hidden states (N, d_j) and heads (V_j, d_j)
                rows=(),  # further tensors (N, ...)
                max_logits=2 ** 25):
    """(loss, *terms), sums over N positions, with the logits of only a slice of these at a time. A slice's
    part of the loss's gradient is formed while its logits exist: no head product is computed twice."""
    hidden, heads = zip(*sides)
    leaves = [h.detach().requires_grad_(h.requires_grad) for h in hidden]  # a slice's backward pass ends here
    trained = [W for W in dict.fromkeys(heads) if W.requires_grad]  # one head may serve two sides
    wanted = [h for h in leaves if h.requires_grad] + trained
    widest = max(map(len, heads))
    size, piece = max(1, max_logits // widest), max(1, 2 ** 22 // widest)
    grads, totals = [], 0
    for start in range(0, max(1, len(leaves[0])), size):
        part = slice(start, start + size)
        outputs, slopes = [], []
        with torch.enable_grad():
            columns = [full_precision(F.linear(h[part], W)) for h, W in zip(leaves, heads)]
            columns += [row[part] for row in rows]
            for pieces in zip(*[column.split(piece) for column in columns]):
                sums = fn(*pieces)  # of so few positions that they stay in the processor's cache
                totals = totals + torch.stack([value.detach().double() for value in sums])
                if wanted:
                    trainable = [z for z in pieces if z.requires_grad]
                    outputs += trainable
                    slopes += torch.autograd.grad(sums[0], trainable, materialize_grads=True)
        if wanted:  # through the head products
            found = torch.autograd.grad(outputs, wanted, slopes)
            grads = [grad.add_(new) for grad, new in zip(grads, found)] if grads else list(found)
            del found  # as large as the heads
    loss, *terms = totals.unbind()
    for x, grad in zip([h for h in hidden if h.requires_grad] + trained, grads):
        linear = torch.dot(full_precision(x).flatten(), full_precision(grad).flatten())
        loss = loss + (linear - linear.detach())  # adds 0, whose gradient on x is grad
    return loss, *terms

def student_space(
        z_s, z_t2s,       # (N, V_s): logits of p^s and q^{t->s}
        target, aligned,  # (N,): gold ids; False where the position attends to nothing
        *, weights, div, temperature, skew, all_positions):
    """Eq. (9) over the student's vocabulary: the weighted sum of its terms, each term, the correct ones."""
    fixed_t2s = z_t2s.detach()  # q^{t->s} is constant inside KD^{t->s}: CE^{t->s} alone trains P^{t->s}
    correct = (fixed_t2s.argmax(-1) == target) & aligned
    counted = aligned if all_positions else correct  # NOT IN PAPER: correct positions only (departure 1)
    ce = F.cross_entropy(z_s, target, reduction="sum")
    ce_t2s = (F.cross_entropy(z_t2s, target, reduction="none") * aligned).sum()
    kd_t2s = (divergence(div, z_s, fixed_t2s, temperature, skew) * counted).sum()             # (8)
    loss = weights[0] * ce + weights[1] * ce_t2s + weights[2] * kd_t2s                        # (9)
    return loss, ce, ce_t2s, kd_t2s, correct.sum()

def teacher_space(z_s2t, z_t, aligned, *, weights, div, temperature, skew):
    """KD^{s->t}, weighted and not. z_s2t, z_t (N, V_t): logits of q^{s->t} and p^t. aligned (N,) bool."""
    kd_s2t = (divergence(div, z_s2t, z_t, temperature, skew) * aligned).sum()                 # (8)
    return weights[3] * kd_s2t, kd_s2t                                                        # (9)

def embed(E, side):
    """Embeddings (B, n, d) of a side's inputs and targets, constants. E: a table (V, d) or a module."""
    table = functools.partial(F.embedding, weight=E) if torch.is_tensor(E) else E
    with torch.no_grad():  # ids under padding may be anything: they become valid ones
        return [table(ids.masked_fill(~side.mask, 0)) for ids in (side.inputs, side.targets)]

def dual_space_losses(
        proj, s, t,   # `Projectors(d_s, d_t)`; the `Side`s of student and teacher
        h_s, h_t,     # (B, S, d_s), (B, T, d_t): last hidden states at the response positions
        E_s, E_t,     # embeddings: a table (V, d) or a module
        W_s, W_t, *,  # (V_s, d_s), (V_t, d_t): prediction heads
        align=None,   # (q, k, s, t) -> (a_t2s, a_s2t); None: eq. (3)
        div="skl", s2t_div="kl", temperature=2.0, skew=0.1, all_positions=False, normalise_queries=False,
        weights=(0.5, 0.5, 0.5, 0.5)):  # of CE, CE^{t->s}, KD^{t->s}, KD^{s->t}
    """Eqs. (1)-(9) for a batch, as a dict. `loss`, eq. (9) summed over positions, and `q` have a gradient;
    the sums `ce`, `ce_t2s`, `kd_t2s`, `kd_s2t`, `n_correct` and `k`, `a_t2s`, `a_s2t` have none."""
    fixed_W_s, fixed_W_t = W_s.detach(), W_t.detach()  # W^s learns through p^s alone: from CE and KD^{t->s}
    h_s, h_t = zero_padding(h_s, s.mask), zero_padding(h_t.detach(), t.mask)
    e_t_input, e_t_target = embed(E_t, t)  # of the tokens that a position reads and predicts
    q = zero_padding(proj.query(torch.cat(embed(E_s, s), -1)), s.mask)                        # (1)
    if normalise_queries:  # NOT IN PAPER: as the keys (departure 8)
        q = std_normalise(q, s.mask)
    k = std_normalise(torch.cat([e_t_input, e_t_target], -1), t.mask)                         # (2)
    if align is None:
        a_t2s, a_s2t = cross_model_attention(q, k, s.mask.unsqueeze(2) & t.mask.unsqueeze(1))  # (3)
    else:
        a_t2s, a_s2t = align(q, k, s, t)
    v_s2t = proj.s2t(h_s)                                                                     # (4)
    v_t2s = proj.t2s(std_normalise(h_t, t.mask) + std_normalise(e_t_target, t.mask))          # (5)
    h_t2s, h_s2t = a_t2s @ v_t2s, a_s2t @ v_s2t                                               # (6)
    # the losses over either vocabulary, a slice of the real positions at a time; with eq. (3) all are aligned
    s_aligned, t_aligned = at_real((a_t2s > 0).any(2), s), at_real((a_s2t > 0).any(2), t)
    shared = dict(weights=weights, temperature=temperature, skew=skew)
    loss_s, ce, ce_t2s, kd_t2s, n_correct = sliced_loss(
        functools.partial(student_space, div=div, all_positions=all_positions, **shared),
        [(at_real(h_s, s), W_s), (at_real(h_t2s, s), fixed_W_s)],                             # (7)
        [at_real(s.targets, s), s_aligned])
    loss_t, kd_s2t = sliced_loss(
        functools.partial(teacher_space, div=s2t_div, **shared),  # NOT IN PAPER: its own f (departure 2)
        [(at_real(h_s2t, t), fixed_W_t), (at_real(h_t, t), fixed_W_t)], [t_aligned])          # (7)
    return dict(loss=loss_s + loss_t, ce=ce, ce_t2s=ce_t2s, kd_t2s=kd_t2s, kd_s2t=kd_s2t, n_correct=n_correct,
                q=q, k=k, a_t2s=a_t2s.detach(), a_s2t=a_s2t.detach())

class Distiller(nn.Module):
    """What is trained: the student and, with a teacher, projectors and discriminator. A subclass is another
    method: it overrides annotate, align, distil or match, or sets projectors to None."""
    projectors, adversary, weights = Projectors, Discriminator, (0.5, 0.5, 0.5, 0.5)
    annotate = align = None  # or methods; these and weights: see `pairs` and `dual_space_losses`
    def __init__(self, student, teacher, args):
        super().__init__()
        self.student, self.args = student, args
        self.teacher = teacher  # a Namespace of model, embeddings, head, no module: not trained; or None
        self.proj = self.disc = None
        if teacher is not None and self.projectors is not None:
            d_s, d_t = head_of(student).shape[1], teacher.head.shape[1]
            self.proj = self.projectors(d_s, d_t)
            self.disc = self.adversary(2 * d_t) if args.ga else None
        ok = self.proj is not None or not (args.ga or args.normalise_queries)
        check(ok, "--ga, --normalise-queries", f"--method {args.method}", "a method with queries and keys")
    def distil(self, s, t, h_s, h_t):
        """A dict: `loss`, a sum over the batch's positions, detached sums for the log, what `match` needs."""
        names = ("div", "s2t_div", "temperature", "skew", "all_positions", "normalise_queries")
        return dual_space_losses(
            self.proj, s, t, h_s, h_t, self.student.get_input_embeddings(), self.teacher.embeddings,
            head_of(self.student), self.teacher.head, align=self.align, weights=self.weights,
            **{name: getattr(self.args, name) for name in names})
    def match(self, q, k, s, t, n_s, n_t):
        """With --ga: L_KQ and detached sums for the log."""
        return ga_loss(self.disc, q, k, s.mask, t.mask, n_s, n_t)
    def forward(self, s, t, n_s, n_t):
        """A micro-batch's share of eq. (16) and of the log's means. n_s, n_t: response tokens of the step."""
        h_s = response_hidden(self.student, s)
        if t is None:  # sft
            cross_entropy = lambda z, target: [F.cross_entropy(z, target, reduction="sum")]  # no terms
            product = at_real(h_s, s), head_of(self.student)
            (loss,) = sliced_loss(cross_entropy, [product], [at_real(s.targets, s)])
            return loss / n_s, dict(ce=loss.detach() / n_s)
        out = self.distil(s, t, h_s, t.hidden)  # the teacher has read its rows once, before training
        loss = out["loss"] / n_s  # the one divisor, also of KD^{s->t}'s sum over the teacher's positions
        terms = {name: x / n_s for name, x in out.items() if name != "loss" and x.ndim == 0}
        if self.args.ga:
            kq, kq_terms = self.match(out["q"], out["k"], s, t, n_s, n_t)
            loss = loss + self.args.kq_weight * kq                                            # (16)
            for name, x in kq_terms.items():
                terms[name] = x / (n_t if name.endswith("_k") else n_s)  # _k: a sum over keys
        return loss, terms

# 8. Training ================================================================================================
LOG_EVERY = 10  # steps whose means are one line of the log
SFT_SETTINGS = ("dev_rows", "dev_samplings", "max_new_tokens", "max_prompt", "max_length", "epochs",
                "batch_size", "lr", "clip", "seed")  # what decides a run without a teacher
# settings outside a run's identity; rows and models are in it by their contents, not by their names
NO_IDENTITY = {"out", "name", "eval_only", "student", "teacher", "teacher_ready", "teacher_epochs",
               "teacher_lr", "data", "micro_batch", "save_every", "tests", "eval_seeds", "eval_limit",
               "eval_batch", "eval_temperature", "no_repeat_ngram"}
def seed_torch(*numbers):  # by what is computed next: a restart draws the same numbers
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))

def replace(path, save):
    """save(fresh) writes a file or folder, on rank 0; it takes the path's place once it is whole."""
    if world()[0] > 0:
        return
    fresh = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save(fresh)
    except Exception as error:  # torch and safetensors wrap the disk's error: show it
        raise OSError(f"{fresh} cannot be written ({error.__context__ or error})") from error
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(fresh, path)
def write_json(path, content):
    replace(path, lambda fresh: fresh.write_text(json.dumps(content, indent=1)))
def save_best(model, tokenizer, folder):  # for transformers' `from_pretrained`; and the projectors
    model.student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if model.proj is not None:
        torch.save(model.proj.state_dict(), folder / "projectors.pt")

def fingerprint(content, tensors=()):  # 16 digits that tell contents apart
    digest = hashlib.sha256(json.dumps(content, default=str).encode())
    for tensor in tensors:
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
def model_fingerprint(model):
    config = model.config.to_dict() | dict(_name_or_path=None, transformers_version=None)
    return fingerprint(config, model.state_dict().values())

def optimizer_for(model, args):
    """AdamW. Each trainable parameter is in exactly one group; biases and norms are not decayed."""
    groups = {}
    for name, parameter in model.named_parameters():  # a tied weight comes once
        peak = args.lr if name.startswith("student.") else args.lr_projectors
        decay = 1e-2 if parameter.ndim > 1 else 0.0
        if parameter.requires_grad:
            group = groups.setdefault((peak, decay), dict(params=[], peak=peak, weight_decay=decay))
            group["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), fused=True)

def gradient(model, micro_batches,  # lists of `Pair`s, all those of an optimiser step
             step, args, device):
    """Leaves the step's gradient in the parameters; returns this process's share of the log's means."""
    rank, processes = world()
    rows = sum(micro_batches, [])  # all: the cut into micro-batches and processes changes at most dropout
    n_s = sum(pair.s.count for pair in rows)
    n_t = sum(pair.t.count for pair in rows if pair.t is not None)
    shares = collections.Counter()
    for m in range(rank, len(micro_batches), processes):
        s = collate([pair.s for pair in micro_batches[m]], device)
        t = None if rows[0].t is None else collate([pair.t for pair in micro_batches[m]], device)
        seed_torch(args.seed, step, m)
        # processes exchange gradients once a step, in the backward pass of their last micro-batch
        postponed = processes > 1 and m + processes < len(micro_batches)
        with model.no_sync() if postponed else contextlib.nullcontext():
            with autocast(device):
                loss, terms = model(s, t, n_s, n_t)
            (loss * processes).backward()  # DistributedDataParallel takes the mean over processes
        shares.update(terms, loss=loss.detach(), tokens=s.mask.sum())  # Counter.update adds
    return shares

def set_up(args, folder, device, distiller):
    """Checks a run and writes args.json; what is trained, the student's tokenizer, `Pair`s, dev `Row`s."""
    rows = read_rows(fetch(f"{args.data}/raw.jsonl"))
    dev, rest = rows[:args.dev_rows], rows[args.dev_rows:]
    student, tokenizer = load_model(args.student, device)
    check_readable(student, prompt_ids(tokenizer, dev, args.max_prompt), args.max_new_tokens)
    readers, tokenizers, teacher, names = [student], [tokenizer], None, SFT_SETTINGS
    if args.method != "sft":
        full, teacher_tokenizer = load_model(args.teacher, device, precision(device))
        readers.append(full)
        tokenizers.append(teacher_tokenizer)
        teacher = argparse.Namespace(model=full, embeddings=full.get_input_embeddings(), head=head_of(full))
        names = vars(args).keys() - NO_IDENTITY
    seed_torch(args.seed)
    model = distiller(student, teacher, args).to(device)
    data = pairs(rest, tokenizers, args.max_prompt, args.max_length, model.annotate)
    check(len(data) >= args.batch_size, "rows within the limits", len(data), "at least --batch-size")
    for reader, examples in zip(readers, zip(*data)):
        check_readable(reader, [example.ids for example in examples])
    say(folder, "has", len(data), "rows to train on;", len(rest) - len(data), "are too long")
    # a run goes on only with equal rows, tokens, weights and settings
    identity = dict(zip(("student weights", "teacher weights"), map(model_fingerprint, readers)))
    identity |= {"rows": fingerprint([rows, data])} | {name: getattr(args, name) for name in sorted(names)}
    path = folder / "args.json"
    if path.exists():
        found = json.loads(path.read_text()).get("identity", {})
        changed = [name for name in identity if found.get(name) != identity[name]]
        check(not changed, path, f"other {changed}", "this run's; remove the folder or give another --out")
    else:
        write_json(path, dict(identity=identity, command=sys.argv, args=vars(args)))
    return model, tokenizer, data, dev

def train(args, folder, device, distiller=Distiller):
    """Trains args.student in the folder, from its state.pt on if it is there; returns the best's folder."""
    rank, processes = world()
    model, tokenizer, data, dev = set_up(args, folder, device, distiller)
    steps_per_epoch = len(data) // args.batch_size
    total_steps = max(1, round(args.epochs * steps_per_epoch))
    optimizer = optimizer_for(model, args)
    say(sum(x.numel() for x in model.parameters() if x.requires_grad), "parameters to train,",
        sum(len(pair.s.ids) for pair in data), "tokens an epoch,", total_steps, "steps, each in",
        args.batch_size // args.micro_batch // processes, "micro-batches a process")
    done, best_score, log_size = 0, -1.0, 0  # resume
    state_path, log_path = folder / "state.pt", folder / "log.jsonl"
    if state_path.exists():
        state = torch.load(state_path, map_location="cpu", weights_only=True)
        done, best_score, log_size = state["reached"]
        model.load_state_dict(state["model"])
        if state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
        del state  # of a teacher, 22 GB
        say("goes on after step", done)
    log = open(log_path if rank == 0 else os.devnull, "a")
    if rank == 0:
        log.truncate(log_size)  # without lines of steps that will be done again
    # the teacher reads each row once; from then on only its embeddings and head are needed
    if model.teacher and done < total_steps:
        data = read_once(model.teacher, data, device)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True) if processes > 1 else model
    plan = []
    while len(plan) < total_steps:
        plan += plan_epoch(data, args.batch_size, args.micro_batch, args.seed, len(plan) // steps_per_epoch)
    shares, logged, since = collections.Counter(), done, time.perf_counter()
    for step in progress(range(done + 1, total_steps + 1), folder.name):
        # one step, at a rate that falls as a cosine
        model.train()
        cosine = (1 + math.cos(math.pi * (step - 1) / total_steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-7 + (group["peak"] - 1e-7) * cosine
        shares.update(gradient(parallel, plan[step - 1], step, args, device))
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # DistributedDataParallel's buckets hold them
        # log means since the last line; with a number that is not finite the run ends, and saves nothing
        epoch_ends = step % steps_per_epoch == 0 or step == total_steps
        saves = epoch_ends or step % args.save_every == 0
        if saves or step % LOG_EVERY == 0:
            values = torch.stack(list(shares.values())) / (step - logged)
            if processes > 1:
                dist.all_reduce(values)
            terms = dict(zip(shares, values.tolist()))
            speed = terms["tokens"] * (step - logged) / (time.perf_counter() - since)
            memory = torch.cuda.max_memory_allocated() or 1024 * resource.getrusage(0).ru_maxrss  # KiB
            line = dict(step=step, **terms, lr=optimizer.param_groups[0]["lr"], grad_norm=norm.item(),
                        tokens_per_s=speed, memory_gb=memory / 1e9)
            broken = [name for name, value in line.items() if not math.isfinite(value)]
            check(not broken, f"step {step}", broken, "finite numbers; what was saved last is whole")
            print(json.dumps(line), file=log, flush=True)
            say("step", step, *[f"{name} {value:.3g}" for name, value in terms.items()])
            shares, logged, since = collections.Counter(), step, time.perf_counter()
        # keep the student with the best ROUGE-L on the dev rows, the later of equals
        if epoch_ends:
            seeds = range(args.seed, args.seed + args.dev_samplings)
            score = float(np.mean([respond(model.student, tokenizer, dev, seed, args)[1] for seed in seeds]))
            say("dev ROUGE-L", round(score, 2))
            print(json.dumps(dict(step=step, dev_rougeL=score)), file=log, flush=True)
            if score >= best_score or not (folder / "best").exists():
                best_score = score
                replace(folder / "best", lambda fresh: save_best(model, tokenizer, fresh))
        # save what the next step depends on
        if saves:
            state = dict(model=model.state_dict(), reached=(step, best_score, log_path.stat().st_size))
            state["optimizer"] = optimizer.state_dict() if step < total_steps else None  # no step is left
            replace(state_path, lambda fresh: torch.save(state, open(fresh, "wb")))
            since = time.perf_counter()
    if processes > 1:
        dist.barrier()  # the first process may still be writing
    return folder / "best"

# 9. Evaluation: sampling, ROUGE-L ===========================================================================
def rouge_l(predictions, references):
    """Each row's ROUGE-L F1 with Porter's stemmer, in percent, of the best of its references."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return [100 * scorer.score_multi(texts, prediction)["rougeL"].fmeasure
            for prediction, texts in zip(predictions, references, strict=True)]

@torch.no_grad()
def respond(model, tokenizer, rows, seed, args):
    """A response to each row, and its ROUGE-L. Batches and seeds do not depend on the processes."""
    rank, processes = world()
    model.eval()
    end, device, size = tokenizer.eos_token_id, model.device, args.eval_batch
    prompts = prompt_ids(tokenizer, rows, args.max_prompt)  # NOT IN PAPER: a long one's end (departure 7)
    order = sorted(range(len(rows)), key=lambda row: len(prompts[row]))
    found = []
    for start in progress(range(rank * size, len(rows), processes * size), "responses"):
        batch = order[start:start + size]
        ids = padded([prompts[row] for row in batch], end, "left").to(device)
        mask = padded([[1] * len(prompts[row]) for row in batch], 0, "left").to(device)
        seed_torch(seed, start)
        with autocast(device):  # the rest is in the generation_config, set by `load_model`
            whole = model.generate(ids, attention_mask=mask, max_new_tokens=args.max_new_tokens)
        texts = tokenizer.batch_decode(whole[:, ids.shape[1]:], skip_special_tokens=True)
        found += zip(batch, texts, rouge_l(texts, [rows[row].references for row in batch]))
    if processes > 1:
        parts = [None] * processes
        dist.all_gather_object(parts, found)
        found = sum(parts, [])
    _, texts, scores = zip(*sorted(found))  # in the order of rows
    say("for example:", rows[0].prompt[-300:], texts[0])
    return texts, scores

def read_tests(args, device):
    """The rows of each test set, by name. Rows that the model cannot read are refused before any training."""
    sources = {}
    for item in args.tests:
        name, _, source = item.partition("=")
        usable = name and source and "/" not in name and name not in ("OOD", "All", *sources)
        check(usable, "--tests", item, "NAME=FILE; names differ, have no / and are not OOD or All")
        sources[name] = source
    tests = {name: read_rows(fetch(source), args.eval_limit) for name, source in sources.items()}
    model, tokenizer = load_model(args.eval_only or args.student, device)
    for rows in tests.values():
        check_readable(model, prompt_ids(tokenizer, rows, args.max_prompt), args.max_new_tokens)
    if not args.eval_only:  # before a teacher is fine-tuned
        rows = read_rows(fetch(f"{args.data}/raw.jsonl"))[args.dev_rows:]
        check(rows, args.data, "no rows to train on", "more than --dev-rows")
        kept = pairs(rows, [tokenizer], args.max_prompt, args.max_length)
        check_readable(model, [pair.s.ids for pair in kept])
    return tests

def evaluate(args, source, folder, tests, device):
    """Samples and scores each test set once a seed; writes predictions/ and eval.json into the folder."""
    model, tokenizer = load_model(source, device)
    temperature = args.eval_temperature
    seeds = args.eval_seeds if temperature else args.eval_seeds[:1]  # without sampling all are alike
    model.generation_config.update(do_sample=temperature > 0, temperature=temperature or 1.0,
                                   no_repeat_ngram_size=args.no_repeat_ngram)
    means = {name: [] for name in tests}  # of each set, one a seed
    for name, rows in tests.items():
        for seed in seeds:
            texts, scores = respond(model, tokenizer, rows, seed, args)
            means[name].append(float(np.mean(scores)))
            write_json(folder / f"predictions/{name}-{seed}.json",
                       dict(rows=rows, texts=texts, rougeL=scores))
    sets = list(means.values())
    for name, part in (("OOD", sets[1:]), ("All", sets)):
        if part:
            means[name] = np.mean(part, 0).tolist()
    result = dict(model=str(source), args=vars(args), rougeL=means)
    write_json(folder / "eval.json", result)
    say(folder, "has ROUGE-L, mean and standard deviation over sampling seeds:")
    for name, values in means.items():
        spread = np.std(values, ddof=1) if len(values) > 1 else 0
        say(f"  {name:12s} {np.mean(values):6.2f} ± {spread:.2f}")
    return result

# 10. Main ===================================================================================================
def experiment(args, device, distiller):
    """Fine-tunes the teacher if need be, trains, evaluates the best; returns what eval.json holds."""
    out, tests = pathlib.Path(args.out), read_tests(args, device)
    if args.eval_only:
        name = args.name or "-".join(pathlib.Path(args.eval_only).resolve().parts[1:][-2:])
        return evaluate(args, args.eval_only, out / name, tests, device)
    at_once = args.micro_batch * world()[1]
    check(args.batch_size % at_once == 0, "--batch-size", args.batch_size, f"a multiple of {at_once}")
    name = args.method + "-ga" * args.ga + "-nq" * args.normalise_queries
    name += f"-{args.div}" * (args.method != "sft")
    if args.method != "sft" and not args.teacher_ready:
        tuning = vars(args) | dict(method="sft", ga=False, normalise_queries=False, student=args.teacher,
                                   epochs=args.teacher_epochs, lr=args.teacher_lr, seed=10)
        tuned = out / f"{pathlib.Path(args.teacher).name}-tuned"  # one for all runs in the folder
        args.teacher = str(train(argparse.Namespace(**tuning), tuned, device))
    folder = out / f"{args.name or name}-{args.seed}"
    return evaluate(args, train(args, folder, device, distiller), folder, tests, device)

def main(argv=None, parser=None, distiller=Distiller):
    """Runs a command line; returns what eval.json holds. parser, distiller: those of another method."""
    args = (parser or build_parser()).parse_args(argv)
    logging.disable_progress_bar()  # transformers' own
    try:
        for name, value in vars(args).items():
            for number in value if isinstance(value, list) else [value]:
                if type(number) in (int, float):  # neither a text nor a switch
                    usable = 0 < number < math.inf or (number == 0 and name in MAY_BE_ZERO)
                    check(usable, "--" + name.replace("_", "-"), number,
                          "a finite number over 0, or 0 where that has a meaning")
        check(args.skew <= 1, "--skew", args.skew, "0 to 1")
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if "RANK" in os.environ:  # set by torchrun; the first process may save while the others wait
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))
        result = experiment(args, device, distiller)
    except (InputError, OSError) as error:
        print(f"dskd_ga.py: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(2)  # at once: the other processes may be waiting for this one
        sys.exit(2)
    if dist.is_initialized():
        dist.barrier()  # no process leaves while another still needs it
        dist.destroy_process_group()
    return result

if __name__ == "__main__":
    main()
