"""The pictures of RESULTS.md, from the CSVs: `python results/make.py draw`."""

import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import torch

import envs
import magpo
from adapters.published import published
from results import compare, make
from results.experiments import PAPER

COLORS = dict(magpo="tab:blue", mappo="tab:orange", ctds="tab:green")
PUBLISHED = dict(MAPPO="tab:orange", MAT="tab:purple", Sable="tab:red", MAGPO="tab:blue")


def draw_curves(name):
    """Learning curves of an experiment, and the imitation gap."""
    rows = make.read(name)
    runs = []
    for text in dict.fromkeys(row["command"] for row in rows):
        points = [row for row in rows if row["command"] == text and row["final"] == 0]
        same = {key: points[0][key] for key in ("seed", "env", "algo")}
        runs.append(dict(label=same["algo"], points=points, **same))
    references = envs.make(runs[0]["env"], 1).references
    compare.draw(runs, make.HERE / f"{name}.png", references.items())


def draw_delta():
    """Final return of the learners against delta; infinity is drawn at the right end."""
    runs = [
        row for name in ("delta_matrix", "delta_coordsum") for row in make.read(name) if row["final"] == 1
    ]
    names = list(dict.fromkeys(row["env"] for row in runs))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.4), squeeze=False)
    for ax, env in zip(axes[0], names, strict=True):
        deltas = sorted({row["delta"] for row in runs if row["env"] == env})
        returns = [[r["learner_return"] for r in runs if (r["env"], r["delta"]) == (env, d)] for d in deltas]
        band = np.array([compare.interval(values) for values in returns])
        ax.errorbar(
            range(len(deltas)), band[:, 0], np.abs(band[:, 1:] - band[:, :1]).T, marker="o", capsize=3
        )
        ax.set_xticks(range(len(deltas)), [f"{d:g}" for d in deltas])
        ax.set(title=env, xlabel="delta", ylabel="learners' return")
    compare.save(figure, make.HERE / "delta.png")


def draw_delta_lambda():
    """Mean final return of the learners on sum10 for each delta and lambda."""
    runs = [row for row in make.read("delta_lambda") if row["final"] == 1]
    deltas, lams = (sorted({row[key] for row in runs}) for key in ("delta", "lam"))
    figure, axes = plt.subplots(figsize=(5, 3.4))
    cells = np.full((len(lams), len(deltas)), math.nan)
    for (i, lam), (j, delta) in itertools.product(enumerate(lams), enumerate(deltas)):
        cells[i, j] = np.mean([r["learner_return"] for r in runs if (r["delta"], r["lam"]) == (delta, lam)])
        color = "w" if cells[i, j] < 0.6 else "k"
        axes.text(j, i, f"{cells[i, j]:.2f}", ha="center", va="center", color=color)
    axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    axes.set_xticks(range(len(deltas)), [f"{d:g}" for d in deltas])
    axes.set_yticks(range(len(lams)), [f"{lam:g}" for lam in lams])
    axes.set(xlabel="delta", ylabel="lambda", title="matrix_sum10: learners' return")
    compare.save(figure, make.HERE / "delta_lambda.png")


def draw_clip():
    """Eq. 9's objective for one sample against mu/pi, with the bound delta and without it, which is PPO."""
    log_gaps = torch.linspace(math.log(0.25), math.log(4), 400)  # log mu/pi
    zero = torch.zeros(1)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    # pi is behind mu_old, then beyond it: the inner clip binds first
    for ax, sign, pi in zip(axes, (1.0, -1.0), (0.6, 1.6), strict=True):
        log_pi, advantage = torch.tensor(math.log(pi)), torch.tensor(sign)
        for delta, style in ((math.inf, "k:"), (1.5, "tab:blue")):
            losses = [
                magpo.guider_loss(log_pi + gap, log_pi, zero, advantage, zero, 0.2, delta)[0]
                for gap in log_gaps
            ]
            ax.plot(log_gaps.exp(), [-loss for loss in losses], style, label=f"delta = {delta:g}")
        for bound in (1 / 1.5, 1.5):
            ax.axvline(bound, color="gray", lw=0.8, ls="--")
        title = f"A = {sign:+.0f}, pi/mu_old = {pi}, epsilon = 0.2"
        ax.set(xlabel="mu/pi", ylabel="objective, min(r A, rho A)", title=title, xscale="log")
        ax.set_xticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
        ax.minorticks_off()
        ax.legend(fontsize=8)
    compare.save(figure, make.HERE / "clip.png")


def draw_paper(suite):
    """Learning curves of a suite of the paper, a column a task, beside what has been published.

    Above they are drawn over steps, below over CPU-seconds.
    """
    rows = make.wanted(f"paper_{suite}")
    tasks = list(dict.fromkeys(row["env"] for row in rows))
    shape, size = (2, len(tasks)), (max(2 * len(tasks), 5), 4.4)
    figure, axes = plt.subplots(*shape, figsize=size, sharey="col", squeeze=False, layout="constrained")
    for column, task in zip(axes.T, tasks, strict=True):
        for algo, color in COLORS.items():
            curves = [row for row in rows if (row["env"], row["algo"], row["final"]) == (task, algo, 0)]
            texts = dict.fromkeys(row["command"] for row in curves)
            group = [dict(points=[row for row in curves if row["command"] == text]) for text in texts]
            for ax, x in zip(column, ("step", "cpu_seconds"), strict=True):
                if group:
                    compare.draw_curve(ax, group, x, "learner_return", color=color, lw=1.2, label=algo)
        for method, score in published(task).items():
            for ax in column:
                if not isinstance(score, str):
                    style = dict(color=PUBLISHED[method], lw=0.8, ls="--", label=f"{method}, published")
                    ax.axhline(score, **style)
        column[0].set_title(task.removeprefix(f"{suite}:"), fontsize=8)
        for ax, label in zip(column, ("steps, millions", "CPU-seconds"), strict=True):
            ax.set_xlabel(label, fontsize=7)
            ax.tick_params(labelsize=7)
        column[0].xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}")
    for ax in axes[:, 0]:
        ax.set_ylabel("learners' return", fontsize=7)
    lines = {line.get_label(): line for ax in axes.flat for line in ax.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=max(3, len(tasks)), fontsize=7)
    figure.savefig(make.HERE / f"paper_{suite}.png", dpi=110)  # a tight layout would cut off the legend
    plt.close(figure)


def draw():
    for suite in PAPER:
        if make.wanted(f"paper_{suite}"):
            draw_paper(suite)
    for name in ("mpe_spread", "sum10"):
        if make.read(name):
            draw_curves(name)
    if make.read("delta_matrix"):
        draw_delta()
    if make.read("delta_lambda"):
        draw_delta_lambda()
    draw_clip()
