#!/usr/bin/env python3
"""Writes what the demo needs, without network, the same each time: rows, tokenizers and untrained models.

    python experiments/demo.py runs/demo/data            # tasks with many right answers, 400 rows to train on
    python experiments/demo.py runs/few/data --rows few  # tasks with one right answer, 400 rows to train on
    python experiments/demo.py runs/new/data --rows new  # the same, 4,000 rows, for models from nothing

In the folder:
  raw.jsonl           100 rows to choose a checkpoint by, then those to train on
  seen, longer.jsonl  200 test rows like them; 200 with longer lists and larger numbers
  student, teacher    a GPT-2 of 2 layers and width 64; a Qwen2 of 4 and 160 with another tokenizer;
  teacher-same        a GPT-2 of 4 and 160 with the student's
  before-*            2,000 and 8,000 other rows, to train student and teachers on before; not with new
"""
import json, pathlib, random, sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import dskd_ga

END, SEED, DEV_ROWS = "<|endoftext|>", 10, 100
# each noun's adjective stands at the same place
NOUNS = "apple basket candle dragon engine forest garden hammer island jacket kettle ladder mirror".split()
ADJECTIVES = "red brown white green grey dark lush heavy remote warm hot tall shiny".split()

def demo_row(rng, longer, draws):
    """A task, from recalling a fact (easy) to adding numbers (hard), and the list of its one answer."""
    nouns = rng.sample(NOUNS, rng.randint(5, 6) if longer else rng.randint(2, 4))
    low, high = (100, 199) if longer else (10, 99)
    a, b = rng.randint(low, high), rng.randint(low, high)
    words, kind = " ".join(nouns), rng.randrange(7)
    if kind == 0:
        described = [f"{ADJECTIVES[NOUNS.index(noun)]} {noun}" for noun in nouns]
        return f"Describe: {words}", [" and ".join(described)]
    if kind == 1:
        return f"Repeat twice: {words}", [f"{words} {words}"]
    if kind == 2:
        return f"Say in reverse: {words}", [" ".join(reversed(nouns))]
    if kind == 3:
        numbered = [f"{number} {noun}" for number, noun in enumerate(nouns, a)]
        return f"Number from {a}: {words}", [" ".join(numbered)]
    if kind == 4:
        return f"Which is larger, {a} or {b}?", [f"{max(a, b)} is larger than {min(a, b)}"]
    if kind == 5:
        following = range(a + 1, a + len(nouns) + 2)
        return f"Count on from {a}", [" ".join(map(str, following))]
    return f"What is {a} plus {b}?", [f"{a} plus {b} is {a + b}"]

def open_row(rng, longer, draws):
    """A task with many right answers, and those of `draws` that differ."""
    nouns = rng.sample(NOUNS, rng.randint(5, 6) if longer else rng.randint(2, 4))
    a, b = sorted(rng.sample(range(100, 200) if longer else range(10, 100), 2))
    words, kind, outputs = " ".join(nouns), rng.randrange(6), []
    tasks = (f"Describe: {words}", f"Say in any order: {words}", f"Leave one out: {words}",
             f"Count on from {a} in any steps", f"Say a number from {a} to {b}", f"Compare {a} and {b}")
    for _ in range(draws):
        described = []
        for noun in nouns:  # mostly the adjective at its place, less often the next, least the one before
            (shift,) = rng.choices((0, 1, -1), (6, 3, 1))
            adjective = ADJECTIVES[(NOUNS.index(noun) + shift) % len(NOUNS)]
            described.append(f"{adjective} {noun}")
        mixed, step = rng.sample(nouns, len(nouns)), rng.choice((1, 2, 5, 10))
        rest = [noun for noun in nouns if noun != mixed[0]]
        counted = range(a + step, a + step * (len(nouns) + 2), step)
        between = f"{rng.randint(a, b)} lies between {a} and {b}"
        compared = rng.choice((f"{b} is larger than {a}", f"{a} is smaller than {b}"))
        answers = (" and ".join(described), " ".join(mixed), " ".join(rest), " ".join(map(str, counted)),
                   between, compared)
        outputs.append(answers[kind])
    return tasks[kind], list(dict.fromkeys(outputs))

def train_tokenizer(texts, size, single_digits):
    """A byte-level BPE tokenizer of `size` tokens, made from the texts."""
    cuts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if single_digits:
        cuts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)

def write_rows(path, count, row, rng, longer, draws):
    """Writes rows, of which the first DEV_ROWS have up to 8 answers, and returns their texts."""
    texts, lines = [], []
    for number in range(count):
        task, outputs = row(rng, longer, 8 if number < DEV_ROWS else draws)
        prompt = f"Task: {task}\nAnswer:\n"
        texts += [prompt, outputs[0]]
        output = outputs if len(outputs) > 1 else outputs[0]
        lines.append(json.dumps(dict(prompt=prompt, output=output)) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    return texts

def write_demo(folder, kind="new"):
    """Writes rows, tokenizers and models into the folder, made if need be. kind: many, few or new."""
    files = dict(raw=4100, seen=200, longer=200)
    if kind != "new":
        files |= {"raw": 500, "before-student/raw": 2100, "before-teacher/raw": 8100}
    row = open_row if kind == "many" else demo_row
    rng, most = random.Random(SEED), []  # one generator for all files, in this order
    for name, count in files.items():
        draws = 1 if "raw" in name else 8
        texts = write_rows(folder / f"{name}.jsonl", count, row, rng, name == "longer", draws)
        most = max(most, texts, key=len)

    student = transformers.GPT2Config(
        n_positions=256, n_embd=64, n_layer=2, n_head=4,
        initializer_range=0.08)
    same = transformers.GPT2Config(
        n_positions=256, n_embd=160, n_layer=4, n_head=5,
        initializer_range=0.05)
    teacher = transformers.Qwen2Config(
        max_position_embeddings=256, hidden_size=160, intermediate_size=480, num_hidden_layers=4,
        num_attention_heads=5, num_key_value_heads=5,
        initializer_range=0.05)

    # the student's tokenizer cuts up words and keeps numbers, the teacher's keeps words and cuts up numbers
    made = ("student", student, 420), ("teacher", teacher, 700), ("teacher-same", same, 420)
    for name, config, size in made:
        tokenizer = train_tokenizer(most, size, single_digits=name == "teacher")
        config.vocab_size = len(tokenizer)
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        dskd_ga.seed_torch(SEED)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=pathlib.Path, help="where to write, made if need be")
    parser.add_argument("--rows", choices=("many", "few", "new"), default="many", help="see above")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        write_demo(args.folder, args.rows)
    except OSError as error:
        parser.exit(2, f"demo.py: {error}\n")

if __name__ == "__main__":
    main()
