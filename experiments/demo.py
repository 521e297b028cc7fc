#!/usr/bin/env python3
"""Writes what the demo needs, without network, the same each time: rows, tokenizers and untrained models.

    python experiments/demo.py runs/few/data --rows few

--rows many: 400 rows to train on, of tasks with many right answers; few: of tasks with one right answer; new:
4,000 of these, for models from nothing. In the folder:
  raw.jsonl           100 rows to choose a checkpoint by, then those to train on
  seen, longer.jsonl  200 test rows like them; 200 with longer lists and larger numbers
  student, teacher    a GPT-2 of width 64; a Qwen2 of 160 with another tokenizer
  teacher-same        a GPT-2 of 160 with the student's tokenizer
  before-*            2,000 and 8,000 other rows, to train student and teachers on before; not with new
"""
import json, pathlib, random
from argparse import ArgumentParser, RawDescriptionHelpFormatter
import torch, transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
SEED = 11122205338535051451  # of the models' weights
# each noun's adjective stands at the same place
NOUNS = "apple basket candle dragon engine forest garden hammer island jacket kettle ladder mirror".split()
ADJECTIVES = "red brown white green grey dark lush heavy remote warm hot tall shiny".split()

def draw_words(rng, longer):  # some nouns, and the range of a task's numbers
    nouns = rng.sample(NOUNS, rng.randint(5, 6) if longer else rng.randint(2, 4))
    return nouns, range(100, 200) if longer else range(10, 100)

def describe(noun, shift=0):  # with its adjective, or with one beside that
    place = (NOUNS.index(noun) + shift) % len(NOUNS)
    return f"{ADJECTIVES[place]} {noun}"

def demo_row(rng, longer, draws):  # a task, from recalling a fact to adding numbers, and its one answer
    nouns, numbers = draw_words(rng, longer)
    a, b = rng.choice(numbers), rng.choice(numbers)
    words = " ".join(nouns)
    numbered = [f"{number} {noun}" for number, noun in enumerate(nouns, a)]
    following = range(a + 1, a + len(nouns) + 2)
    tasks = [
        (f"Describe: {words}", " and ".join(map(describe, nouns))),
        (f"Repeat twice: {words}", f"{words} {words}"),
        (f"Say in reverse: {words}", " ".join(reversed(nouns))),
        (f"Number from {a}: {words}", " ".join(numbered)),
        (f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}"),
        (f"Count on from {a}", " ".join(map(str, following))),
        (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}")]
    task, answer = rng.choice(tasks)
    return task, [answer]

def open_row(rng, longer, draws):  # a task with many right answers, and those of `draws` that differ
    nouns, numbers = draw_words(rng, longer)
    a, b = sorted(rng.sample(numbers, 2))
    words, outputs = " ".join(nouns), {}
    tasks = (
        f"Describe: {words}", f"Say in any order: {words}", f"Leave one out: {words}",
        f"Count on from {a} in any steps", f"Say a number from {a} to {b}", f"Compare {a} and {b}")
    kind = rng.randrange(len(tasks))
    for _ in range(draws):
        # mostly the adjective at a noun's place, less often the next, least the one before
        shifts = rng.choices((0, 1, -1), (6, 3, 1), k=len(nouns))
        mixed = rng.sample(nouns, len(nouns))
        step = rng.choice((1, 2, 5, 10))
        counted = range(a + step, a + step * (len(nouns) + 2), step)
        answers = (
            " and ".join(map(describe, nouns, shifts)),
            " ".join(mixed),
            " ".join(noun for noun in nouns if noun != mixed[0]),
            " ".join(map(str, counted)),
            f"{rng.randint(a, b)} lies between {a} and {b}",
            rng.choice((f"{b} is larger than {a}", f"{a} is smaller than {b}")))
        outputs[answers[kind]] = None
    return tasks[kind], list(outputs)

def train_tokenizer(texts, size, single_digits):  # byte-level BPE of `size` tokens
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], show_progress=False,
                                  initial_alphabet=byte_level.alphabet())
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)

def write_demo(folder, kind="new"):
    """Writes rows, tokenizers and models into the folder, made if need be. kind: many, few or new."""
    files = dict(raw=4100, seen=200, longer=200)
    if kind != "new":
        files |= {"raw": 500, "before-student/raw": 2100, "before-teacher/raw": 8100}
    draw_row = open_row if kind == "many" else demo_row
    rng, most = random.Random(10), []  # one generator for all files, in this order
    for name, count in files.items():
        path, texts = folder / f"{name}.jsonl", []
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            for number in range(count):
                draws = 1 if "raw" in name and number >= 100 else 8  # rows to train on have one answer
                task, outputs = draw_row(rng, name == "longer", draws)
                prompt = f"Task: {task}\nAnswer:\n"
                texts += [prompt, outputs[0]]
                output = outputs if len(outputs) > 1 else outputs[0]
                print(json.dumps(dict(prompt=prompt, output=output)), file=file)
        most = max(most, texts, key=len)

    # the student's tokenizer cuts up words and keeps numbers, the teacher's keeps words and cuts up numbers
    common = dict(max_position_embeddings=256, initializer_range=0.05)
    large = common | dict(hidden_size=160, num_hidden_layers=4, num_attention_heads=5)
    small = common | dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.08)
    teacher = transformers.Qwen2Config(**large, intermediate_size=480, num_key_value_heads=5)
    made = (
        ("student", transformers.GPT2Config(**small), 420),
        ("teacher", teacher, 700),
        ("teacher-same", transformers.GPT2Config(**large), 420))
    for name, config, size in made:
        tokenizer = train_tokenizer(most, size, single_digits=name == "teacher")
        config.vocab_size = len(tokenizer)
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        torch.manual_seed(SEED)
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
