#!/usr/bin/env python3
"""The table of finished runs, in the form of the paper's Table 1, as Markdown.

    python experiments/report.py runs/sft-10 runs/sft-20 runs/cma-skl-10 runs/cma-skl-20 --baseline sft

A run is a folder NAME-SEED or NAME. Runs that differ only in the training seed share a line; to its right are
scores of NAME-greedy, the same students evaluated with --eval-temperature 0. Of a folder it reads eval.json,
predictions/, log.jsonl and, if chunks.py has written it, numbers.json. --keep writes FILE.json, for later.
"""
import json, pathlib, re, sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import NamedTuple
import numpy as np
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from dskd_ga import InputError, check

ALIGNMENT = ("mass", "mass_once", "mass_repeated", "top", "mmd", "probe")  # see chunks.py
GREEDY, CURVES = "-greedy", ("dev_rougeL", "ce", "D_q", "D_k", "mass")  # of log.jsonl
short = lambda number: round(float(number), 3)  # what a table or a picture shows of it

class Run(NamedTuple):
    name: str
    seed: int | None    # None: the only run of that name
    rougeL: dict        # test set, OOD, All -> ROUGE-L in percent, a list with one mean a sampling seed
    rows: dict = {}     # test set -> each row's ROUGE-L, the mean over sampling seeds; the paper gives none
    numbers: dict = {}  # those of numbers.json
    curves: dict = {}   # of CURVES: [step, value] for each line of log.jsonl that is kept

def read_runs(path):
    """The `Run`s of a file, or the one of a folder. InputError: it has not all that belongs there."""
    log, numbers = path / "log.jsonl", path / "numbers.json"
    try:
        if path.suffix == ".json":
            return [Run(**run) for run in json.loads(path.read_text())]
        result, rows, curves = json.loads((path / "eval.json").read_text(), parse_float=short), {}, {}
        for test_set in [name for name in result["rougeL"] if name not in ("OOD", "All")]:
            seeds = result["args"]["eval_seeds"][:len(result["rougeL"][test_set])]  # without sampling one
            files = [path / "predictions" / f"{test_set}-{seed}.json" for seed in seeds]
            scores = [json.loads(file.read_text())["rougeL"] for file in files]
            rows[test_set] = np.mean(scores, 0).round(1).tolist()
        for line in log.read_text().splitlines() if log.exists() else ():
            found = json.loads(line, parse_float=short)
            step = found["step"]
            for name in CURVES:
                if name in found and (name == "dev_rougeL" or step <= 100 or step % 100 == 0):
                    curves.setdefault(name, []).append([step, found[name]])
        numbers = json.loads(numbers.read_text(), parse_float=short) if numbers.exists() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: found {error!r}, expected a finished run") from error
    name, seed = re.fullmatch(r"(.+?)(?:-(\d+))?", path.resolve().name).groups()
    return [Run(name, seed and int(seed), result["rougeL"], rows, numbers, curves)]

def bootstrap(group, base, replicates=1000):
    """The 95 % interval of how much higher a group of training runs scores than another, in ROUGE-L over all
    test sets. group, base: lists of `Run`s. Each replicate draws test rows, the same for both (paired), and
    training runs: those of equal seeds if both have the same, as these share initialisation and row order."""
    rng = np.random.default_rng(0)
    group, base = [sorted(runs, key=lambda run: run.seed or 0) for runs in (group, base)]
    group_picks = rng.integers(len(group), size=(len(group), replicates))
    base_picks = rng.integers(len(base), size=(len(base), replicates))
    if [run.seed for run in group] == [run.seed for run in base]:
        base_picks = group_picks
    gaps = []
    for test_set, rows in base[0].rows.items():
        draws = rng.multinomial(len(rows), [1 / len(rows)] * len(rows), replicates).T  # (rows, replicates)
        means = []
        for runs, picks in ((group, group_picks), (base, base_picks)):
            scores = [run.rows[test_set] for run in runs] @ draws / len(rows)  # (runs, replicates)
            means.append(np.take_along_axis(scores, picks, 0).mean(0))
        gaps.append(means[0] - means[1])
    return np.quantile(np.mean(gaps, 0), (0.025, 0.975))

def cell(values):
    """The text of a list with, for each training run, a list of its scores, one a sampling seed."""
    means = [np.mean(scores) for scores in values]
    text = f"{np.mean(means):.2f}" if means else ""
    if len(means) > 1:
        text += f" ± {np.std(means, ddof=1):.2f}"
    variances = [np.var(scores, ddof=1) for scores in values if len(scores) > 1]
    if variances:
        text += f" ({np.sqrt(np.mean(variances)):.2f})"
    return text
def overall(group):  # each run counts alike
    return np.mean([np.mean(run.rougeL["All"]) for run in group])
def difference(group, base):
    """The text of how much higher a group of runs scores than another."""
    if group is base or not (group and base and group[0].rows and base[0].rows):
        return ""
    gap = overall(group) - overall(base)
    low, high = bootstrap(group, base)
    return f"{gap:+.2f} [{low:+.2f}, {high:+.2f}]"

def by_name(runs):
    """The runs by name, in lists. InputError: one comes twice, or some were tested on other rows."""
    sizes = lambda run: {name: len(rows) for name, rows in run.rows.items()}
    groups, first = {}, max(runs, key=lambda run: len(run.rows))  # the paper's have no rows
    for run in runs:
        usable = sizes(run) in ({}, sizes(first)) and run.rougeL.keys() == first.rougeL.keys()
        check(usable, f"test rows of {run.name}", sizes(run), f"{sizes(first)}, as in {first.name}")
        group = groups.setdefault(run.name, [])
        check(run.seed not in [other.seed for other in group], run.name, f"seed {run.seed} twice", "once")
        group.append(run)
    return groups

def table(runs, *baselines, numbers=ALIGNMENT):
    """Table 1's form in Markdown, of `Run`s. baselines: names to compare with. numbers: names to show."""
    groups = by_name(runs)
    for baseline in baselines:
        check(baseline in groups, "--baseline", baseline, f"one of {', '.join(groups)}")
    columns = [name for name in runs[0].rougeL if name != "OOD" or len(runs[0].rougeL) > 4]  # not of one set
    numbers = [number for number in numbers if any(number in run.numbers for run in runs)]
    decodings = ["", GREEDY] if any(name.endswith(GREEDY) for name in groups) else [""]
    header = ["ROUGE-L", "seeds"]
    for decoding in decodings:
        names = columns + [f"less {baseline}" for baseline in baselines]
        header += [name + decoding.replace("-", ", ") for name in names]
    lines = [header + numbers, ["---"] * len(header + numbers)]
    for name in dict.fromkeys(name.removesuffix(GREEDY) for name in groups):
        line = [name, str(len(groups.get(name, [])))]
        for decoding in decodings:
            group = groups.get(name + decoding, [])
            line += [cell([run.rougeL[column] for run in group]) for column in columns]
            line += [difference(group, groups.get(base + decoding)) for base in baselines]
        for number in numbers:
            found = [[run.numbers[number]] for run in groups.get(name, []) if number in run.numbers]
            line.append(cell(found))
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=pathlib.Path, help="folder of a finished run, or FILE.json")
    add("--baseline", metavar="NAME", nargs="+", default=[], help="also print differences to these runs")
    add("--numbers", metavar="NUMBER", nargs="+", default=ALIGNMENT, help="of numbers.json, to show")
    add("--keep", metavar="FILE", type=pathlib.Path, help="write what tables and pictures need")
    args = parser.parse_args(argv)
    try:
        runs = [run for path in args.runs for run in read_runs(path)]
        print(table(runs, *args.baseline, numbers=args.numbers))
        print("\nMean ± standard deviation over training seeds (over sampling seeds); [95 % interval].")
        if args.keep:
            args.keep.write_text("[" + ",\n".join(json.dumps(run._asdict()) for run in runs) + "]\n")
    except (InputError, OSError) as error:
        parser.exit(2, f"report.py: {' '.join(str(error).split())}\n")

if __name__ == "__main__":
    main()
