#!/usr/bin/env python3
"""Draws runs that `report.py --keep` has written to FILE.json, into FILE.png: what students score, with 95 %
intervals over test rows and training seeds, and, by step, what the log says.

    python experiments/pictures.py experiments/results/few.json experiments/results/many.json
"""
import pathlib, sys
import numpy as np
from matplotlib import figure
import report

PANELS = dict(dev_rougeL="dev ROUGE-L", ce="CE of training rows", mass="attention in the right chunk",
              D_q="D(q)", D_k="D(k)")

def draw_scores(axes, groups):
    names = [name for name in groups if name + report.GREEDY in groups and "no_" not in name]
    for place, name in enumerate(names):
        for end, style in (("", "C0o"), (report.GREEDY, "C1s")):
            runs = groups[name + end]
            zeros = {test_set: [0] * len(rows) for test_set, rows in runs[0].rows.items()}
            low, high = report.bootstrap(runs, [run._replace(rows=zeros) for run in runs])
            mean = report.overall(runs)
            axes.errorbar(mean, place + 0.2 * bool(end), None, np.abs([[mean - low], [high - mean]]), style)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="ROUGE-L; circles: temperature 1, squares: greedy", ylim=(len(names), -1))

def draw_steps(axes, groups, number):
    names = [n for n in groups if n[:3] in ("sft", "uld", "cma") and groups[n][0].curves and "no_" not in n]
    for place, name in enumerate(names):  # no other: they are much like these
        points = {}  # of all training seeds, by step
        for run in groups[name]:
            for step, value in run.curves.get(number, []):
                points.setdefault(step, []).append(value)
        if points:
            axes.plot(list(points), [np.mean(values) for values in points.values()], f"C{place}", label=name)
    axes.set(xlabel="step", ylabel=PANELS[number], visible=bool(axes.lines))  # some log less
    axes.legend(*axes.get_legend_handles_labels(), fontsize=7)

def main(argv=None):
    for file in map(pathlib.Path, argv or sys.argv[1:]):
        groups = report.by_name(report.read_runs(file))
        page = figure.Figure((13, 8), layout="constrained")
        panels = page.subplots(2, 3).flat
        draw_scores(panels[0], groups)
        for axes, number in zip(panels[1:], PANELS):
            draw_steps(axes, groups, number)
        page.savefig(file.with_suffix(".png"), facecolor="white")  # to be read on any page

if __name__ == "__main__":
    main()
