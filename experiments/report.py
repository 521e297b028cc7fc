#!/usr/bin/env python3
"""Tables of finished runs, as Markdown.

    python experiments/report.py runs/{sft,cma-skl}-{10,20} --baseline sft
    python experiments/report.py --summary few.json many.json    # does the adversary help? A line a setting
    python experiments/report.py --tasks longer many.json        # the same, a line a task of a test set

A run is a folder NAME-SEED or NAME, or is in a FILE.json of --keep. Runs that differ only in the training
seed share a line; to its right are scores of NAME-greedy, the same students with --eval-temperature 0.
"""
import json, pathlib, re, sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import NamedTuple
import numpy as np
from scipy import stats
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from dskd_ga import InputError, check

NUMBERS = "mass", "mmd"  # see chunks.py
CURVES = "D_q D_k mass entropy norm_q mean_gap".split()  # of log.jsonl
COMPARED = {"CMA-GA less CMA": ("cma-ga-skl", "cma-skl"),
            "CMA-GA less CMA, greedy": ("cma-ga-skl-greedy", "cma-skl-greedy"),
            "CMA-GA less SFT": ("cma-ga-skl", "sft"),
            "CMA-GA less SFT, greedy": ("cma-ga-skl-greedy", "sft-greedy"),
            "CMA less SFT": ("cma-skl", "sft"),
            "CMA less SFT, greedy": ("cma-skl-greedy", "sft-greedy")}
PAPER = ("| the paper | OOD +0.37, where f of CMA is srkl; All 16.40 to 18.32, where f is kl | "
         " |  |  |  |  | not given |")
LOTTERY = 8  # points of standard deviation over training seeds
NOTE = """
Mean ± standard deviation over training seeds (over sampling seeds). A difference is of All and has its 95 %
t interval, over training seeds. k/n: over n seeds that both have, paired; k of them are ahead. n a, b: over a
and b seeds that are not the same. "rows": one of both has a single training run, so it is over test rows,
paired, and says nothing about another training seed. Ahead, behind: it excludes 0; level: it holds 0."""

class Run(NamedTuple):
    name: str
    seed: int | None    # None: the only run of that name
    rougeL: dict        # test set, OOD, All -> ROUGE-L in percent, a list with one mean a sampling seed
    rows: dict = {}     # test set -> each row's ROUGE-L, the mean over sampling seeds; the paper gives none
    numbers: dict = {}  # those of numbers.json
    curves: dict = {}   # of CURVES: [step, value] for each line of log.jsonl that is kept
    tasks: dict = {}    # test set -> task -> which rows are of it; in a file its first run has them

def load(path):  # its numbers as a table or a picture shows them
    return json.loads(path.read_text(), parse_float=lambda number: round(float(number), 3))

def read_folder(folder):
    name, seed = re.fullmatch(r"(.+?)(?:-(\d+))?", folder.resolve().name).groups()
    result = load(folder / "eval.json")
    run = Run(name, seed and int(seed), result["rougeL"], {}, {}, {}, {})
    seeds = result["args"]["eval_seeds"][:len(run.rougeL["All"])]  # greedily the first alone
    for test_set in sorted(run.rougeL.keys() - {"OOD", "All"}):
        found = [load(folder / f"predictions/{test_set}-{seed}.json") for seed in seeds]
        scores = [one["rougeL"] for one in found]
        run.rows[test_set] = np.mean(scores, 0).round(1).tolist()
        said, means = run.rougeL[test_set], np.mean(scores, 1).tolist()
        if not np.allclose(said, means, atol=0.002):
            raise ValueError(f"{test_set}: {said} in eval.json, {means} in predictions/")
        tasks = run.tasks[test_set] = {}  # named by the words before a number or a list
        for place, (prompt, *_) in enumerate(found[0]["rows"]):
            words = re.match(r"(?:Task: )?([^\d:]{0,40})", prompt)[1]
            tasks.setdefault(words.strip(" ,"), []).append(place)
    numbers, log = folder / "numbers.json", folder / "log.jsonl"
    if numbers.exists():
        run.numbers.update(load(numbers))
    lines = log.read_text().splitlines() if log.exists() else []
    for line in map(json.loads, lines):
        step = line["step"]
        for name in CURVES:
            if name in line and (step <= 100 or step % 100 == 0):
                run.curves.setdefault(name, []).append([step, round(line[name], 3)])
    return run

def read_runs(path):  # the `Run`s of a file, or the one of a folder
    try:
        if path.suffix == ".json":
            return [Run(**run) for run in json.loads(path.read_text())]
        return [read_folder(path)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: found {type(error).__name__}: {error}, expected a finished run") from error

def overall(runs):  # one score a training run, by its seed
    return {run.seed: np.mean(run.rougeL["All"]) for run in runs}

def by_name(runs):
    """The runs by name, in lists. InputError: one comes twice, or some were tested on other rows."""
    groups, expected = {}, {}
    for run in runs:
        sizes = {test_set: len(scores) for test_set, scores in run.rows.items()}
        expected = expected or sizes  # the paper's have no rows
        check(sizes in ({}, expected), f"test rows of {run.name}", sizes, f"{expected}, as others have")
        group = groups.setdefault(run.name, [])
        check(run.seed not in overall(group), run.name, f"seed {run.seed} twice", "once")
        group.append(run)
    return groups

def gaps(group, base):
    """By how much the `Run`s of one list are ahead of another's in All, for each training seed of both."""
    a, b = overall(group), overall(base)
    return [a[seed] - b[seed] for seed in a if seed in b]

def interval(group, base):
    """Of that the 95 % t interval, low and high, with the mean in the middle; what it is over, see NOTE."""
    paired = gaps(group, base)
    if len(paired) > 1:
        over = f"{np.greater(paired, 0).sum()}/{len(paired)}"
        return *stats.ttest_1samp(paired, 0).confidence_interval(), over
    if len(group) > 1 and len(base) > 1:  # Welch's
        a, b = [list(overall(runs).values()) for runs in (group, base)]
        return *stats.ttest_ind(a, b, equal_var=False).confidence_interval(), f"n {len(a)}, {len(b)}"
    ends = []
    for test_set in base[0].rows:
        ours = np.mean([run.rows[test_set] for run in group], 0)
        theirs = np.mean([run.rows[test_set] for run in base], 0)
        ends.append(stats.ttest_rel(ours, theirs).confidence_interval())
    half = np.linalg.norm(np.diff(ends)) / 2 / len(ends)  # test sets count alike, whatever their sizes
    return np.mean(ends) - half, np.mean(ends) + half, "rows"

def difference(group, base, verdict=False):
    """The text of `interval`, or "" where there is nothing to compare; verdict: and what NOTE calls it."""
    if not group or not base or group is base or not group[0].rows or not base[0].rows:
        return ""
    low, high, over = interval(group, base)
    text = f"{(low + high) / 2:+.2f} [{low:+.2f}, {high:+.2f}] {over}"
    if verdict and over != "rows":
        text += " ahead" if low > 0 else " behind" if high < 0 else " level"
    return text

def cell(group, column):  # the text of the runs' scores on a test set, or of one of their numbers
    found = []
    for run in group:
        curves = {f"{name}@{step}": x for name, points in run.curves.items() for step, x in points}
        found.append(run.numbers | run.rougeL | curves)
    values = [numbers[column] for numbers in found if column in numbers]
    means = [np.mean(scores) for scores in values]
    text = f"{np.mean(means):.2f}" if means else ""
    if len(means) > 1:
        text += f" ± {np.std(means, ddof=1):.2f}"
    variances = [np.var(scores, ddof=1) for scores in values if np.size(scores) > 1]
    if variances:
        text += f" ({np.sqrt(np.mean(variances)):.2f})"
    return text

def markdown(columns):  # title -> texts
    lines = [columns, ["---"] * len(columns), *zip(*columns.values())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

def table(runs, *baselines, numbers=NUMBERS):
    """The form of the paper's Table 1. baselines: names to compare with. numbers: names to show."""
    groups, scores = by_name(runs), list(runs[0].rougeL)
    for baseline in baselines:
        check(baseline in groups, "--baseline", baseline, f"one of {', '.join(groups)}")
    if len(scores) < 5 and "OOD" in scores:  # it is of one set
        scores.remove("OOD")
    names = list(dict.fromkeys(name.removesuffix("-greedy") for name in groups))
    columns = {"ROUGE-L": names, "seeds": [str(len(groups.get(name, []))) for name in names]}
    for end in ("", "-greedy"):
        here = [groups.get(name + end, []) for name in names]
        for score in scores:
            columns[score + end] = [cell(group, score) for group in here]
        for baseline in baselines:
            base = groups.get(baseline + end)
            columns[f"less {baseline}{end}"] = [difference(group, base) for group in here]
    for number in numbers:
        columns[number] = [cell(groups.get(name, []), number) for name in names]
    return markdown({title.replace("-greedy", ", greedy"): texts
                     for title, texts in columns.items() if any(texts)})

def spread(groups):  # the text of the largest standard deviation over training seeds
    most = 0
    for name in ("sft", "cma-skl", "cma-ga-skl"):
        scores = list(overall(groups.get(name, [])).values())
        if len(scores) > 1:
            most = max(most, np.std(scores, ddof=1))
    if most > LOTTERY:
        return f"{most:.1f}, a lottery"
    return f"{most:.1f}" if most else ""

def summary(settings):  # pairs of a line's name and its `Run`s
    groups = [by_name(runs) for _, runs in settings]
    columns = {"All, f is skl": [name for name, _ in settings]}
    for title, (name, base) in COMPARED.items():
        columns[title] = [difference(one.get(name), one.get(base), verdict=True) for one in groups]
    columns["largest ±"] = [spread(one) for one in groups]
    return markdown(columns)

def of_tasks(runs, test_set):  # for `summary`: each task and the runs, with their scores on its rows alone
    by_name(runs)  # raises if some were tested on other rows
    tasks = runs[0].tasks.get(test_set)
    check(tasks, "--tasks", test_set, "a test set of runs that were kept with their tasks")
    for task, places in tasks.items():
        parts = []
        for run in runs:
            scores = [run.rows[test_set][place] for place in places]
            parts.append(run._replace(rougeL=dict(All=[np.mean(scores)]), rows={task: scores}))
        yield f"{task} ({len(places)} rows)", parts

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=pathlib.Path, help="folder of a finished run, or FILE.json")
    add("--baseline", metavar="NAME", nargs="+", default=[], help="also print differences to these runs")
    add("--numbers", metavar="NUMBER", nargs="+", default=NUMBERS, help="of numbers.json, or CURVE@STEP")
    add("--summary", action="store_true", help="print whether the adversary helps, a line a FILE.json")
    add("--tasks", metavar="SET", help="print that, a line a task of this test set")
    add("--keep", metavar="FILE", type=pathlib.Path, help="write what tables and pictures need")
    args = parser.parse_args(argv)
    try:
        settings = [(path.stem, read_runs(path)) for path in args.runs]
        runs = sum([found for _, found in settings], [])
        if args.summary:
            text = f"{summary(settings)}\n{PAPER}"
        elif args.tasks:
            text = summary(list(of_tasks(runs, args.tasks)))
        else:
            text = table(runs, *args.baseline, numbers=args.numbers)
        print(text, NOTE, sep="\n")
        if args.keep:
            runs[1:] = [run._replace(tasks={}) for run in runs[1:]]
            kept = [json.dumps(run._asdict()) for run in runs]
            args.keep.write_text("[" + ",\n".join(kept) + "]\n")
    except (InputError, OSError) as error:
        parser.exit(2, f"report.py: {' '.join(str(error).split())}\n")

if __name__ == "__main__":
    main()
