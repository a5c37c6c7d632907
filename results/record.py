"""The table of records: how soon the learners reach a score, a row for each commit that was measured.

    python results/make.py record         print the table from record.csv
    python results/make.py record --add   measure this commit: three seeds a task by preset; append a row

Goals are reached at an evaluation, so that steps and CPU-seconds are as fine as those. Figures are medians.
"""

import datetime
import math
import statistics
import subprocess

from results import make, speed

SEEDS = (1, 2, 3)
GOALS = {  # name -> task, the score to reach, how a row is scored
    "mpe_spread 0.60": ("mpe_spread", 0.60, speed.score_of),
    "mpe_spread 0.90": ("mpe_spread", 0.90, speed.score_of),
    "lbf 0.95": ("lbf:8x8-2p-2f-coop", 0.95, lambda row: row["learner_return"]),
}


def medians(curves):
    """CPU-seconds and steps to each goal, a row; inf: never. curves: task -> its seeds' lists of rows."""
    row = {}
    for name, (env, goal, score) in GOALS.items():
        for key in ("cpu_seconds", "step"):
            reached = [speed.first_reached(curve, goal, key, score) for curve in curves[env]]
            row[f"{name} {key}"] = f"{statistics.median(reached):.7g}"
    return row


def commit():
    """Hash of the present commit, with a mark if any code differs from it."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=make.HERE, capture_output=True, text=True)

    changed = git("diff", "--quiet", "HEAD", "--", ":/*.py").returncode
    return git("rev-parse", "--short", "HEAD").stdout.strip() + ("-dirty" if changed else "")


def add():
    """Measure and append a row. One run after the other, as a busy core is slower by the CPU's clock, too."""
    same = dict(date=datetime.date.today().isoformat(), commit=commit(), machine=make.machine())
    curves = {env: [] for env, *_ in GOALS.values()}
    runs = [dict(env=env, seed=seed) for seed in SEEDS for env in curves]
    for options, future in make.side_by_side(runs):
        rows = [{key: float(row[key]) for key in make.COLUMNS[:5]} for row in future.result()]
        curves[options["env"]].append([row for row in rows if row["final"] == 0])
        print(f"{rows[-1]['learner_return']:9.3f} {make.command(options)}", flush=True)
    make.append("record", [same | medians(curves)])


def table():
    """Print record.csv in Markdown."""
    make.print_heads("date", "commit", *GOALS, "machine")
    for row in make.read("record"):
        cells = []
        for name in GOALS:
            seconds, steps = row[f"{name} cpu_seconds"], row[f"{name} step"]
            cells.append(f"{seconds:.0f} s, {steps:,.0f} steps" if math.isfinite(steps) else "not reached")
        make.print_row(row["date"], row["commit"], *cells, row["machine"])
    print(f"\nCPU-seconds on one core and environment steps, medians of seeds {', '.join(map(str, SEEDS))}.")
