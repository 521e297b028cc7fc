#!/usr/bin/env python3
"""Tables of finished runs, as Markdown.

    python experiments/report.py runs/sft-10 runs/sft-20 runs/cma-skl-10 runs/cma-skl-20 --baseline sft
    python experiments/report.py --summary few.json many.json    # does the adversary help? A line a setting
    python experiments/report.py --tasks longer many.json        # the same, a line a task of a test set

Without these two it is the form of the paper's Table 1. A run is a folder NAME-SEED or NAME. Runs that differ
only in the training seed share a line; to its right are scores of NAME-greedy, the same students evaluated
with --eval-temperature 0. Of a folder it reads eval.json, predictions/, log.jsonl and, if chunks.py has
written it, numbers.json. --keep writes FILE.json, for later.
"""
import json, pathlib, re, sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import NamedTuple
import numpy as np
from scipy import stats
HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from dskd_ga import InputError, check

ALIGNMENT = "mass mass_once mass_repeated top mmd probe".split()  # see chunks.py
GREEDY, CURVES = "-greedy", "dev_rougeL ce D_q D_k mass".split()  # of log.jsonl
COMPARED = {"CMA-GA less CMA": ("cma-ga-skl", "cma-skl"),
            "CMA-GA less CMA, greedy": ("cma-ga-skl-greedy", "cma-skl-greedy"),
            "CMA-GA less SFT": ("cma-ga-skl", "sft"),
            "CMA less SFT": ("cma-skl", "sft")}
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
    tasks: dict = {}    # test set -> task -> which rows are of it

def load(path):  # its numbers as a table or a picture shows them
    return json.loads(path.read_text(), parse_float=lambda number: round(float(number), 3))

def read_folder(path):
    result = load(path / "eval.json")
    settings, rougeL = result["args"], result["rougeL"]
    rows, numbers, curves, tasks = {}, {}, {}, {}
    seeds = settings["eval_seeds"] if settings["eval_temperature"] else settings["eval_seeds"][:1]
    for test_set in sorted(rougeL.keys() - {"OOD", "All"}):
        found = [load(path / f"predictions/{test_set}-{seed}.json") for seed in seeds]
        scores = [one["rougeL"] for one in found]
        said = rougeL[test_set]
        means = np.mean(scores, 1)
        if not np.allclose(said, means, atol=0.002):
            raise ValueError(f"{test_set}: {said} in eval.json, {means.tolist()} in predictions/")
        rows[test_set] = np.mean(scores, 0).round(1).tolist()
        tasks[test_set] = {}  # named by the words before a number or a list
        for place, (prompt, *_) in enumerate(found[0]["rows"]):
            task = re.match(r"(?:Task: )?([^\d:]{0,40})", prompt)[1].strip(" ,")
            tasks[test_set].setdefault(task, []).append(place)
    if (path / "numbers.json").exists():
        numbers = load(path / "numbers.json")
    if (path / "log.jsonl").exists():
        for line in map(json.loads, (path / "log.jsonl").read_text().splitlines()):
            step = line["step"]
            if step > 100 and step % 100 and "dev_rougeL" not in line:
                continue
            for name in CURVES:
                if name in line:
                    curves.setdefault(name, []).append([step, round(line[name], 3)])
    name, seed = re.fullmatch(r"(.+?)(?:-(\d+))?", path.resolve().name).groups()
    return Run(name, seed and int(seed), rougeL, rows, numbers, curves, tasks)

def read_runs(path):
    """The `Run`s of a file, or the one of a folder. InputError: it has not all that belongs there."""
    try:
        if path.suffix == ".json":
            return [Run(**run) for run in json.loads(path.read_text())]
        return [read_folder(path)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: found {found}, expected a finished run") from error

def by_name(runs):
    """The runs by name, in lists. InputError: one comes twice, or some were tested on other rows."""
    groups, expected = {}, {}
    for run in runs:
        sizes = {name: len(rows) for name, rows in run.rows.items()}
        expected = expected or sizes  # the paper's have no rows
        usable = sizes in ({}, expected) and run.rougeL.keys() == runs[0].rougeL.keys()
        check(usable, f"test rows of {run.name}", sizes, f"{expected}, as others have")
        group = groups.setdefault(run.name, [])
        check(run.seed not in [other.seed for other in group], run.name, f"seed {run.seed} twice", "once")
        group.append(run)
    return groups

def overall(runs):  # one score a training run
    return {run.seed: np.mean(run.rougeL["All"]) for run in runs}

def interval(group, base):
    """By how much the `Run`s of one list score higher in All than those of another: (low, high) of the 95 % t
    interval, whose middle is the mean, and what it is over, in the words of NOTE."""
    a, b = overall(group), overall(base)
    shared = [seed for seed in a if seed in b]  # these share initialisation and the order of rows
    if len(shared) > 1:
        a, b = [a[seed] for seed in shared], [b[seed] for seed in shared]
        return *stats.ttest_rel(a, b).confidence_interval(), f"{np.greater(a, b).sum()}/{len(a)}"
    if len(a) > 1 and len(b) > 1:
        a, b = list(a.values()), list(b.values())
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
        word = "ahead" if low > 0 else "level"
        text += " behind" if high < 0 else f" {word}"
    return text

def cell(group, column):
    """The text of the runs' scores on a test set, or of one of their numbers."""
    found = [run.numbers | run.rougeL for run in group]
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

def table(runs, *baselines, numbers=ALIGNMENT):
    """Table 1's form in Markdown, of `Run`s. baselines: names to compare with. numbers: names to show."""
    groups, scores = by_name(runs), list(runs[0].rougeL)
    for baseline in baselines:
        check(baseline in groups, "--baseline", baseline, f"one of {', '.join(groups)}")
    if len(scores) < 5 and "OOD" in scores:  # it is of one set
        scores.remove("OOD")
    names = list(dict.fromkeys(name.removesuffix(GREEDY) for name in groups))
    columns = {"ROUGE-L": names, "seeds": [str(len(groups.get(name, []))) for name in names]}
    for decoding in ("", GREEDY):
        end = decoding.replace("-", ", ")
        here = [groups.get(name + decoding, []) for name in names]
        if any(here):
            for score in scores:
                columns[score + end] = [cell(group, score) for group in here]
            for name in baselines:
                base = groups.get(name + decoding)
                columns[f"less {name}{end}"] = [difference(group, base) for group in here]
    for number in numbers:
        if any(number in run.numbers for run in runs):
            columns[number] = [cell(groups.get(name, []), number) for name in names]
    return markdown(columns)

def spread(groups):
    """The text of the largest standard deviation over training seeds."""
    most = 0
    for name in ("sft", "cma-skl", "cma-ga-skl"):
        scores = list(overall(groups.get(name, [])).values())
        if len(scores) > 1:
            most = max(most, np.std(scores, ddof=1))
    if most > LOTTERY:
        return f"{most:.1f}, a lottery"
    return f"{most:.1f}" if most else ""

def summary(settings):
    """Whether the adversary helps, in Markdown. settings: pairs of a line's name and `Run`s."""
    groups = [by_name(runs) for _, runs in settings]
    columns = {"All, f is skl": [name for name, _ in settings]}
    for title, (name, base) in COMPARED.items():
        columns[title] = [difference(one.get(name), one.get(base), verdict=True) for one in groups]
    columns["largest ±"] = [spread(one) for one in groups]
    return markdown(columns)

def paper_line():  # the last one of a summary: what the paper reports
    paper = {run.name: run.rougeL for run in read_runs(HERE / "results/paper.json")}
    (srkl,), (ga_skl,) = paper["paper: cma-srkl"]["OOD"], paper["paper: cma-ga-skl"]["OOD"]
    (kl,), (ga_kl,) = paper["paper: cma-kl"]["All"], paper["paper: cma-ga-kl"]["All"]
    return (f"| the paper | OOD {ga_skl - srkl:+.2f}, where f of CMA is srkl; "
            f"All {kl:.2f} to {ga_kl:.2f}, where f is kl |  |  |  | not given |")

def of_tasks(runs, test_set):
    """For `summary`: of each task of a test set the runs, with their scores on its rows alone."""
    found = {}
    for run in runs:
        for task, places in run.tasks.get(test_set, {}).items():
            scores = [run.rows[test_set][place] for place in places]
            part = run._replace(rougeL=dict(All=[np.mean(scores)]), rows={task: scores})
            found.setdefault(f"{task} ({len(places)} rows)", []).append(part)
    check(found, "--tasks", test_set, "a test set of runs that were kept with their tasks")
    return found.items()

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=pathlib.Path, help="folder of a finished run, or FILE.json")
    add("--baseline", metavar="NAME", nargs="+", default=[], help="also print differences to these runs")
    add("--numbers", metavar="NUMBER", nargs="+", default=ALIGNMENT, help="of numbers.json, to show")
    add("--summary", action="store_true", help="print whether the adversary helps, a line a FILE.json")
    add("--tasks", metavar="SET", help="print that, a line a task of this test set")
    add("--keep", metavar="FILE", type=pathlib.Path, help="write what tables and pictures need")
    args = parser.parse_args(argv)
    try:
        settings = [(path.stem, read_runs(path)) for path in args.runs]
        runs = sum([found for _, found in settings], [])
        if args.summary:
            text = f"{summary(settings)}\n{paper_line()}"
        elif args.tasks:
            text = summary(of_tasks(runs, args.tasks))
        else:
            text = table(runs, *args.baseline, numbers=args.numbers)
        print(text, NOTE, sep="\n")
        if args.keep:
            kept = [json.dumps(run._asdict()) for run in runs]
            args.keep.write_text("[" + ",\n".join(kept) + "]\n")
    except (InputError, OSError) as error:
        parser.exit(2, f"report.py: {' '.join(str(error).split())}\n")

if __name__ == "__main__":
    main()
