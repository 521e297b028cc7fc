#!/usr/bin/env python3
"""Writes what the demo needs, without network, the same each time: rows, tokenizers and untrained models.

    python experiments/demo.py runs/demo/data             # models start from nothing and learn from 4,000 rows
    python experiments/demo.py runs/few/data --rows few   # models trained before learn from 400 rows
    python experiments/demo.py runs/many/data --rows many # the same, and a task has many right answers

In the folder:
  raw.jsonl      100 rows to choose a checkpoint by, then those to train on, of `prompt` and `output`
  seen.jsonl     200 test rows like them
  longer.jsonl   200 test rows with longer lists and larger numbers (out of distribution)
  student/       a GPT-2 of 2 layers and width 64
  teacher/       a Qwen2 of 4 layers and width 160, with another tokenizer
  teacher-same/  a GPT-2 of 4 layers and width 160, with the student's tokenizer
and with `few` and `many`, as the models are still untrained:
  before-student/, before-teacher/   raw.jsonl of 2,000 and of 8,000 other rows, to train them on before
"""
import argparse
import json
import pathlib
import random
import sys

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import dskd_ga

END = "<|endoftext|>"
SEED = 10
DEV_ROWS = 100
# each noun's adjective stands at the same place
NOUNS = "apple basket candle dragon engine forest garden hammer island jacket kettle ladder mirror".split()
ADJECTIVES = "red brown white green grey dark lush heavy remote warm hot tall shiny".split()

def demo_row(rng, longer):
    """One task, from recalling a fact (easy) to adding numbers (hard); out of distribution if longer."""
    nouns = rng.sample(NOUNS, rng.randint(5, 6) if longer else rng.randint(2, 4))
    low, high = (100, 199) if longer else (10, 99)
    a, b = rng.randint(low, high), rng.randint(low, high)
    words = " ".join(nouns)
    described = [f"{ADJECTIVES[NOUNS.index(noun)]} {noun}" for noun in nouns]
    numbered = [f"{number} {noun}" for number, noun in enumerate(nouns, a)]
    following = [str(a + i) for i in range(1, len(nouns) + 2)]
    task, output = rng.choice([
        (f"Describe: {words}", " and ".join(described)),
        (f"Repeat twice: {words}", f"{words} {words}"),
        (f"Say in reverse: {words}", " ".join(reversed(nouns))),
        (f"Number from {a}: {words}", " ".join(numbered)),
        (f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}"),
        (f"Count on from {a}", " ".join(following)),
        (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}"),
    ])
    return dict(prompt=f"Task: {task}\nAnswer:\n", output=output)

def open_row(rng, longer, draws):
    """A task with many right answers, of which `draws` are drawn; `output` lists those that differ."""
    nouns = rng.sample(NOUNS, rng.randint(5, 6) if longer else rng.randint(2, 4))
    low, high = (100, 199) if longer else (10, 99)
    a, b = sorted(rng.sample(range(low, high + 1), 2))
    words = " ".join(nouns)
    prompts = (f"Describe: {words}", f"Say in any order: {words}", f"Leave one out: {words}",
               f"Count on from {a} in any steps", f"Say a number from {a} to {b}", f"Compare {a} and {b}")
    task = rng.randrange(len(prompts))
    outputs = {}  # a set in the order of the draws
    for _ in range(draws):
        described = []
        for noun in nouns:  # its adjective stands at its place, a rarer one after it, the rarest before it
            (shift,) = rng.choices((0, 1, -1), (6, 3, 1))
            described.append(f"{ADJECTIVES[(NOUNS.index(noun) + shift) % len(NOUNS)]} {noun}")
        mixed = rng.sample(nouns, len(nouns))
        step = rng.choice((1, 2, 5, 10))
        counted = [str(a + step * i) for i in range(1, len(nouns) + 2)]
        answers = (" and ".join(described), " ".join(mixed), " ".join(n for n in nouns if n != mixed[0]),
                   " ".join(counted), f"{rng.randint(a, b)} lies between {a} and {b}",
                   rng.choice((f"{b} is larger than {a}", f"{a} is smaller than {b}")))
        outputs[answers[task]] = True
    return dict(prompt=f"Task: {prompts[task]}\nAnswer:\n", output=list(outputs))

def train_tokenizer(texts, size, single_digits):
    """A byte-level BPE tokenizer of `size` tokens, made from the texts."""
    cuts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if single_digits:
        cuts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)

def write_demo(folder, kind="new"):
    """Writes rows, tokenizers and models into the folder, which is made if need be. kind: new, few or many."""
    files = dict(raw=DEV_ROWS + 4000, seen=200, longer=200)
    if kind != "new":
        files |= {"raw": DEV_ROWS + 400, "before-student/raw": DEV_ROWS + 2000, "before-teacher/raw": DEV_ROWS + 8000}
    rows, rng = {}, random.Random(SEED)  # one generator for all files, in this order
    for name, count in files.items():
        rows[name] = []
        for number in range(count):
            longer, to_train = name == "longer", "raw" in name and number >= DEV_ROWS
            row = open_row(rng, longer, 1 if to_train else 8) if kind == "many" else demo_row(rng, longer)
            rows[name].append(row)
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join([json.dumps(row) + "\n" for row in rows[name]]))
    texts = []  # of the most rows
    for row in max(rows.values(), key=len):
        texts += [row["prompt"], row["output"] if kind != "many" else row["output"][0]]
    student = transformers.GPT2Config(n_positions=256, n_embd=64, n_layer=2, n_head=4, initializer_range=0.08)
    same = transformers.GPT2Config(n_positions=256, n_embd=160, n_layer=4, n_head=5, initializer_range=0.05)
    teacher = transformers.Qwen2Config(
        max_position_embeddings=256, hidden_size=160, intermediate_size=480, num_hidden_layers=4,
        num_attention_heads=5, num_key_value_heads=5, initializer_range=0.05)
    # the student's tokenizer cuts up words and keeps numbers, the teacher's keeps words and cuts up numbers
    made = ("student", student, 420), ("teacher", teacher, 700), ("teacher-same", same, 420)
    for name, config, size in made:
        tokenizer = train_tokenizer(texts, size, single_digits=name == "teacher")
        config.vocab_size = len(tokenizer)
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        dskd_ga.seed_torch(SEED)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

def main(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("folder", metavar="FOLDER", type=pathlib.Path, help="where to write, made if need be")
    parser.add_argument("--rows", choices=("new", "few", "many"), default="new",
                        help="new: 4,000 rows for new models; few, many: 400 for trained ones")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        write_demo(args.folder, args.rows)
    except OSError as error:
        print(f"demo.py: {error}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
