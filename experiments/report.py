#!/usr/bin/env python3
"""The table of finished runs, in the form of the paper's Table 1, as Markdown.

    python experiments/report.py runs/sft-10 runs/sft-20 runs/cma-ga-skl-10 runs/cma-ga-skl-20 --baseline sft

A run's folder is NAME-SEED. Runs that differ only in the training seed share a line; a folder without a
number at its end, like `untrained`, is a run of its own. It reads RUN/eval.json, RUN/predictions/ and, if
chunks.py has written it, RUN/alignment.json; --keep FOLDER writes there what the table needs of each run. On the paper's five test sets, the paper's numbers stand beside those of its methods.
"""
import json
import pathlib
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from dskd_ga import InputError, check

# the paper's ROUGE-L; it does not say which f dskd, clp and cla have
PAPER_SETS = ["Dolly", "SelfInst", "Vicuna", "S-NI", "UnNI"]
TABLE_1 = """\
untrained        6.39  4.72 10.18  4.49  4.64
teacher-gpt2-xl 27.07 14.65 16.24 27.12 31.41
dskd            25.98 10.58 15.54 19.22 22.13
teacher         27.45 19.42 20.93 34.74 35.98
sft             22.83  9.49 14.66 13.55 16.06
mined           21.69  9.78 15.59 14.98 17.25
uld             21.73  9.28 14.85 15.17 17.15
cma-srkl        24.64 11.50 16.21 18.40 21.69
clp             24.52 11.35 15.28 19.26 22.12
cla             24.20 11.44 14.93 18.53 21.32
cma-ga-skl      24.79 11.82 15.95 19.44 22.05
cma-ct-kl       24.63 10.83 16.08 17.87 21.07
cma-kl          24.13  9.73 15.20 15.14 17.78
cma-ga-kl       24.92 11.17 15.84 18.19 21.50"""
PAPER = {name: list(map(float, scores)) for name, *scores in map(str.split, TABLE_1.splitlines())}
ALIGNMENT = ("mass", "mass_once", "mass_repeated", "top", "mmd", "probe")  # see chunks.py

class Run(NamedTuple):
    name: str
    seed: int | None  # None: the only run of that name
    rougeL: dict      # test set, OOD, All -> ROUGE-L in percent, a list with one mean a sampling seed
    rows: dict        # test set -> each row's ROUGE-L, the mean over sampling seeds
    alignment: dict   # the numbers of alignment.json; empty: there is none

def row_scores(folder, result):
    """Test set -> each row's ROUGE-L, the mean over sampling seeds. result: eval.json's; it has them if --keep
    has written it, otherwise they are in predictions/."""
    if "rows" in result:
        return result["rows"]
    rows = {}
    for test_set in [name for name in result["rougeL"] if name not in ("OOD", "All")]:
        scores = []
        for seed in result["args"]["eval_seeds"]:
            path = folder / "predictions" / f"{test_set}-{seed}.json"
            scores.append(json.loads(path.read_text())["rougeL"])
        rows[test_set] = np.mean(scores, 0).round(2).tolist()
    return rows

def read_run(folder):
    """The `Run` of a folder. InputError: it has no eval.json, or not all that belongs there."""
    name, seed = folder.resolve().name, None
    if parts := re.fullmatch(r"(.+)-(\d+)", name):
        name, seed = parts[1], int(parts[2])
    path = folder / "alignment.json"
    try:
        scores = json.loads((folder / "eval.json").read_text())
        numbers = json.loads(path.read_text()) if path.exists() else {}
        return Run(name, seed, scores["rougeL"], row_scores(folder, scores), numbers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: found {error!r}, expected a finished run") from error

def bootstrap(group, base, replicates=1000):
    """The 95 % interval of how much higher a group of training runs scores than another, in ROUGE-L over all
    test sets. group, base: lists of `Run`s. Each replicate draws test rows, the same for both (paired), and
    training runs: those of equal seeds if both have the same, as these share initialisation and row order."""
    rng = np.random.default_rng(0)
    group = sorted(group, key=lambda run: run.seed)
    base = sorted(base, key=lambda run: run.seed)
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
    text = f"{np.mean(means):.2f}"
    if len(means) > 1:
        text += f" ± {np.std(means, ddof=1):.2f}"
    # runs may have different numbers of sampling seeds: their variances are pooled
    squares = sum(len(scores) * np.var(scores) for scores in values)
    if freedom := sum(len(scores) - 1 for scores in values):
        text += f" ({np.sqrt(squares / freedom):.2f})"
    return text

def overall(group):  # each run counts alike
    return np.mean([np.mean(run.rougeL["All"]) for run in group])

def by_name(runs):
    """The runs by name, in lists. InputError: one comes twice, or some were tested on other rows."""
    groups, expected = {}, {name: len(rows) for name, rows in runs[0].rows.items()}
    for run in runs:
        sizes = {name: len(rows) for name, rows in run.rows.items()}
        check(sizes == expected, f"test rows of {run.name}", sizes, f"{expected}, as in {runs[0].name}")
        group = groups.setdefault(run.name, [])
        check(run.seed not in [other.seed for other in group], run.name, f"seed {run.seed} twice", "once")
        group.append(run)
    return groups

def table(runs, baseline=None):
    """Table 1's form in Markdown, of `Run`s. baseline: the name of those that all are compared with."""
    groups = by_name(runs)
    check(baseline is None or baseline in groups, "--baseline", baseline, f"one of {', '.join(groups)}")
    columns = list(runs[0].rougeL)
    numbers = ALIGNMENT if any(run.alignment for run in runs) else ()
    compared = [f"All less {baseline}"] if baseline else []
    lines = [["ROUGE-L", "seeds", *columns, *compared, *numbers]]
    lines.append(["---"] * len(lines[0]))
    for name, group in groups.items():
        line = [name, str(len(group))]
        paper = PAPER.get(re.sub("^(dskd|clp|cla|mined|uld)-[a-z]+$", r"\1", name))
        for n, column in enumerate(columns):
            line.append(cell([run.rougeL[column] for run in group]))
            if paper and columns[:-2] == PAPER_SETS:
                score = [*paper, np.mean(paper[1:]), np.mean(paper)][n]  # OOD and All are the last
                line[-1] += f", paper {score:.2f}"
        if baseline:
            gap = overall(group) - overall(groups[baseline])
            low, high = bootstrap(group, groups[baseline])
            line.append("" if name == baseline else f"{gap:+.2f} [{low:+.2f}, {high:+.2f}]")
        for number in numbers:
            found = [[run.alignment[number]] for run in group if number in run.alignment]
            line.append(cell(found) if found else "")
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

def keep(run, folder):
    """Writes what the table needs of the run into a folder, which `read_run` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.json").write_text(json.dumps(dict(rougeL=run.rougeL, rows=run.rows)))
    if run.alignment:
        (folder / "alignment.json").write_text(json.dumps(run.alignment))

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=pathlib.Path, help="folder of a finished run")
    parser.add_argument("--baseline", metavar="NAME", help="also print differences to the runs NAME-SEED")
    parser.add_argument("--keep", metavar="FOLDER", type=pathlib.Path, help="write the table's numbers there")
    args = parser.parse_args(argv)
    try:
        runs = [read_run(folder) for folder in args.runs]
        print(table(runs, args.baseline))
    except InputError as error:
        print(f"report.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print("\nMean over training and sampling seeds ± standard deviation over training seeds (over sampling "
          "seeds, within a run); [95 % interval of a difference].")
    if args.keep:
        for run, folder in zip(runs, args.runs):
            keep(run, args.keep / folder.resolve().name)

if __name__ == "__main__":
    main()
