#!/usr/bin/env python3
"""Draws runs that `report.py --keep` has written, a panel a FILE.json, into the folder of the first file.

    python experiments/pictures.py experiments/results/{new,few,many,pair}.json

differences.png: by how much each method is ahead of CMA with the same f: the mean, its 95 % interval, k/n as
in report.py, and each training seed as a stroke. discriminator.png: D(q) and D(k).
"""
import sys
from pathlib import Path
import numpy as np
from matplotlib import figure
import report

COLOURS = {"cma-ga-skl": "C1", "cma-early-skl": "C0", "cma-placebo-skl": "C2"}  # all others are grey

def draw_differences(axes, groups):
    found = []
    for name, group in groups.items():
        f = name.split("-")[-1]
        base = groups.get(f"cma-{f}", groups.get("cma-skl"))  # sft, uld and the like have no f
        if f == "greedy" or group is base or not base:
            continue
        gaps = report.gaps(group, base)
        if len(gaps) > 1:
            low, high, over = report.interval(group, base)
            found.append((np.mean(gaps), low, high, f"{name} {over}", gaps))
    found.sort()
    for place, (mean, low, high, label, gaps) in enumerate(found):
        colour = COLOURS.get(label.split()[0], "0.6")
        axes.plot([low, mean, high], [place] * 3, "o-", color=colour, markevery=[1])
        axes.plot(gaps, [place] * len(gaps), "|", color=colour)
    axes.set_yticks(range(len(found)), [label for *_, label, _ in found], fontsize=8)
    axes.axvline(0, color="black")
    axes.set_xlabel("ROUGE-L, All, less CMA's")

def draw_discriminator(axes, groups):
    for name in sorted(groups, key=COLOURS.__contains__):  # those of a colour over the others
        for number, style in (("D_q", "-"), ("D_k", "--")):
            curves = [run.curves[number] for run in groups[name] if number in run.curves]
            if curves:
                points = np.mean(list(zip(*curves)), 1)  # (n, 2), over training seeds
                label = name if name in COLOURS and number == "D_q" else None
                axes.plot(*points.T, style, color=COLOURS.get(name, "0.6"), label=label)
    axes.set(xscale="log", xlabel="step", ylabel="D(q); dashed: D(k)", ylim=(-0.02, 1.02))
    axes.legend(*axes.get_legend_handles_labels(), loc="center right")

def main(argv=None):
    files = [Path(file) for file in argv or sys.argv[1:]]
    rows = (len(files) + 1) // 2
    for name, draw in dict(differences=draw_differences, discriminator=draw_discriminator).items():
        page = figure.Figure((12, 5 * rows), layout="constrained")
        panels = page.subplots(rows, 2, sharex=True).ravel()
        for axes, file in zip(panels, files):
            axes.set_title(file.stem)
            draw(axes, report.by_name(report.read_runs(file)))
        for axes in panels:
            axes.set_visible(bool(axes.lines))
        page.savefig(files[0].parent / f"{name}.png", facecolor="white")  # to be read on any page

if __name__ == "__main__":
    main()
