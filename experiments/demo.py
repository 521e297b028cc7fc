#!/usr/bin/env python3
"""Writes what the demo needs, without network, the same each time: rows, tokenizers and untrained models.

    python experiments/demo.py runs/demo/data

In the folder:
  raw.jsonl      4,100 rows to train on and to choose a checkpoint by, of `prompt` and `output`
  seen.jsonl     200 test rows like them
  longer.jsonl   200 test rows with longer lists and larger numbers (out of distribution)
  student/       a GPT-2 of 2 layers and width 64
  teacher/       a Qwen2 of 4 layers and width 160, with another tokenizer
  teacher-same/  a GPT-2 of 4 layers and width 160, with the student's tokenizer
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

def train_tokenizer(rows, size, single_digits):
    """A byte-level BPE tokenizer of `size` tokens, made from the rows' texts."""
    cuts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if single_digits:
        cuts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    bpe.decoder = decoders.ByteLevel()
    texts = [text for row in rows for text in row.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)

def write_demo(folder):
    """Writes rows, tokenizers and models into the folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, rng = {}, random.Random(SEED)  # one generator for the three files, in this order
    for name, count in (("raw", 4100), ("seen", 200), ("longer", 200)):
        rows[name] = [demo_row(rng, longer=name == "longer") for _ in range(count)]
        lines = [json.dumps(row) + "\n" for row in rows[name]]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    student = transformers.GPT2Config(n_positions=256, n_embd=64, n_layer=2, n_head=4, initializer_range=0.08)
    same = transformers.GPT2Config(n_positions=256, n_embd=160, n_layer=4, n_head=5, initializer_range=0.05)
    teacher = transformers.Qwen2Config(
        max_position_embeddings=256, hidden_size=160, intermediate_size=480, num_hidden_layers=4,
        num_attention_heads=5, num_key_value_heads=5, initializer_range=0.05)
    # the student's tokenizer cuts up words and keeps numbers, the teacher's keeps words and cuts up numbers
    made = ("student", student, 420), ("teacher", teacher, 700), ("teacher-same", same, 420)
    for name, config, size in made:
        tokenizer = train_tokenizer(rows["raw"], size, single_digits=name == "teacher")
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
    folder = parser.parse_args(argv).folder
    transformers.utils.logging.disable_progress_bar()
    try:
        write_demo(folder)
    except OSError as error:
        print(f"demo.py: {error}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
