"""Compare trained runs: `python results/compare.py RUN RUN ... [--out FILE.png]`.

A RUN is a run's folder. Runs that differ in nothing but their seed form a group. It prints a table of the
last evaluations (mean over seeds, 95 % bootstrap interval) and draws learning curves with bands over seeds.

make.py draws RESULTS.md's curves with the same functions. Here a run is a dict: label, seed, env, algo, and
points, a list of dicts (step, cpu_seconds, guider_return, learner_return), one for each evaluation.
"""

import argparse
import csv
import itertools
import json
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

plt.switch_backend("agg")  # no window, no screen needed
COLUMNS = ("step", "cpu_seconds", "guider_return", "learner_return")
NOT_SETTINGS = (
    "seed",
    "runs_dir",
    "resume",
    "eval",
    "track",
)  # what does not make two runs different experiments


def read_run(folder):
    """Options (a dict) and points of a run's folder; ValueError if it is none, or nothing was evaluated."""
    try:
        options = json.loads((Path(folder) / "args.json").read_text())
        with open(Path(folder) / "metrics.csv") as file:
            rows = [{key: float(row[key]) for key in COLUMNS} for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} is not the folder of a run of magpo.py ({reason}).") from None
    points = [row for row in rows if not math.isnan(row["learner_return"])]
    if not points:
        raise ValueError(f"{folder} has no evaluation yet: let it train a little longer.")
    return options, points


def read_runs(folders):
    """Runs, labelled by the options in which they differ; ValueError if they cannot be compared."""
    found = [read_run(folder) for folder in folders]
    if len({options["env"] for options, _ in found}) > 1:
        raise ValueError("These runs are of several environments: compare runs of one.")
    differ = []  # options that tell these experiments apart; lam, say, is no more than algo tells
    for name in [name for name in found[0][0] if name not in NOT_SETTINGS]:
        before, after = (
            {str([o.get(n) for n in names]) for o, _ in found} for names in (differ, [*differ, name])
        )
        differ += [name] if len(after) > len(before) else []
    return [
        dict(
            label=", ".join(f"{name} {options.get(name)}" for name in differ) or options["algo"],
            points=points,
            **{name: options[name] for name in ("seed", "env", "algo")},
        )
        for options, points in found
    ]


def groups(runs):
    """Label -> its runs, in the order in which labels come first."""
    return {
        label: [run for run in runs if run["label"] == label]
        for label in dict.fromkeys(r["label"] for r in runs)
    }


def interval(values):
    """Mean, and the 95 % bootstrap interval of the mean over seeds."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (10_000, len(values))).mean(1)
    return np.mean(values), *np.quantile(means, (0.025, 0.975))


def print_table(runs):
    """Print each group's last evaluation: mean over seeds, 95 % interval, every seed."""
    print("| runs | learners | each seed | guider | steps | CPU-seconds |\n" + "|---" * 6 + "|")
    for label, group in groups(runs).items():
        last = [run["points"][-1] for run in group]
        mean, low, high = interval([point["learner_return"] for point in last])
        seeds = ", ".join(f"{point['learner_return']:.2f}" for point in last)
        guider, step, cpu = (
            np.mean([point[key] for point in last]) for key in ("guider_return", *COLUMNS[:2])
        )
        learners = f"**{mean:.2f}** [{low:.2f}, {high:.2f}]"
        guider = "" if group[0]["algo"] == "mappo" else f"{guider:.2f}"
        print(f"| {label} | {learners} | {seeds} | {guider} | {step:.0f} | {cpu:.0f} |")


def draw_curve(axes, group, x, key, **style):
    """Mean of a column over seeds against another, with a 95 % band; as far as all seeds have come."""
    count = min(len(run["points"]) for run in group)
    xs = [np.mean([run["points"][i][x] for run in group]) for i in range(count)]
    values = [[run["points"][i][key] for run in group] for i in range(count)]
    kept = [i for i in range(count) if not np.isnan(values[i]).any()]  # nan: no episode ended there
    band = np.array([interval(values[i]) for i in kept]).reshape(-1, 3)
    xs = [xs[i] for i in kept]
    axes.plot(xs, band[:, 0], **style)
    if len(group) > 1:
        axes.fill_between(xs, band[:, 1], band[:, 2], color=style["color"], alpha=0.2, lw=0)


def draw(runs, path, references=()):
    """Draw learners over steps and over CPU-seconds, and the gap between guider and learners.

    references: (name, return) of known policies, drawn as lines.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.8), sharey=True)
    colors = itertools.cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"])
    for (label, group), color in zip(groups(runs).items(), colors, strict=False):
        style = dict(color=color, label=f"{label} ({len(group)})")
        draw_curve(left, group, "step", "learner_return", **style)
        draw_curve(middle, group, "cpu_seconds", "learner_return", **style)
        if group[0]["algo"] != "mappo":
            draw_curve(right, group, "step", "learner_return", **style)
            draw_curve(right, group, "step", "guider_return", color=color, ls=":")
    for name, score in references:
        left.axhline(score, color="gray", lw=0.8, ls="--")
        left.text(0, score, name, fontsize=7, va="bottom", color="gray")
    titles = (
        "learners, 95 % band (number of seeds)",
        "the same, over CPU time",
        "guider (dotted) and learners",
    )
    for axes, x, title in zip((left, middle, right), ("steps", "CPU-seconds", "steps"), titles, strict=True):
        axes.set(xlabel=f"environment {x}" if x == "steps" else x)
        axes.set_title(f"{runs[0]['env']}: {title}", fontsize=9)
    left.set_ylabel("mean team return")
    left.legend(fontsize=7)
    save(figure, path)


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", default="compare.png", help="picture to write [compare.png]")
    given = parser.parse_args()
    try:
        runs = read_runs(given.runs)
        print_table(runs)
        draw(runs, given.out)
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"The curves are in {given.out}")


if __name__ == "__main__":
    main()
