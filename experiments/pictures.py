#!/usr/bin/env python3
"""Draws runs that `report.py --keep` has written, a panel a FILE.json, into the folder of the first file.

    python experiments/pictures.py experiments/results/{new,few,many,pair}.json

differences.png: by how much each method is ahead of CMA with the same f: the mean with its 95 % interval over
training seeds, k/n (see report.py), and each seed's difference as a stroke. discriminator.png: D(q) and D(k).
"""
import pathlib, sys
import numpy as np
from matplotlib import figure
import report

COLOURS = {"cma-ga-skl": "C1", "cma-early-skl": "C0", "cma-placebo-skl": "C2"}
GREY = "0.6"  # all others

def draw_differences(axes, groups):
    found = []
    for name, group in groups.items():
        f = name.split("-")[-1]
        base = groups.get(f"cma-{f}", groups.get("cma-skl"))  # sft, uld and the like have no f
        if f == "greedy" or group is base or base is None:
            continue
        low, high, over = report.interval(group, base)
        if "/" in over:
            ours, theirs = report.overall(group), report.overall(base)
            gaps = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            mean = (low + high) / 2
            found.append((mean, low, high, name, over, gaps))
    labels = []
    for place, (mean, low, high, name, over, gaps) in enumerate(sorted(found)):
        labels.append(f"{name} {over}")
        colour = COLOURS.get(name, GREY)
        axes.plot([low, mean, high], [place] * 3, "o-", color=colour, markevery=[1])
        axes.plot(gaps, [place] * len(gaps), "|", color=colour)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("ROUGE-L, All, less CMA's")

def draw_discriminator(axes, groups):
    for name in sorted(groups, key=COLOURS.__contains__):  # those of a colour over the others
        for number, style in (("D_q", "-"), ("D_k", "--")):
            points = {}  # of all training seeds, by step
            for run in groups[name]:
                for step, value in run.curves.get(number, []):
                    points.setdefault(step, []).append(value)
            means = [np.mean(values) for values in points.values()]
            label = name if name in COLOURS and number == "D_q" else None
            if points:
                axes.plot(list(points), means, style, color=COLOURS.get(name, GREY), label=label)
    axes.set(xscale="log", xlabel="step", ylabel="D(q); dashed: D(k)", ylim=(-0.02, 1.02))
    axes.legend(*axes.get_legend_handles_labels(), loc="center right")

def main(argv=None):
    files = [pathlib.Path(file) for file in argv or sys.argv[1:]]
    settings = [report.by_name(report.read_runs(file)) for file in files]
    columns = min(2, len(files))
    rows = -(-len(files) // columns)  # rounded up
    for name, draw in dict(differences=draw_differences, discriminator=draw_discriminator).items():
        page = figure.Figure((6 * columns, 5 * rows), layout="constrained")
        panels = page.subplots(rows, columns, sharex=True, squeeze=False).ravel()
        for axes, file, groups in zip(panels, files, settings):
            axes.set_title(file.stem)
            draw(axes, groups)
        for axes in panels:
            axes.set_visible(bool(axes.lines))
        page.savefig(files[0].parent / f"{name}.png", facecolor="white")  # to be read on any page

if __name__ == "__main__":
    main()
