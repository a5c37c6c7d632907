"""Every sweep, table and picture of README.md and RESULTS.md.

    python results/make.py sweep NAME [TEXT]   run what is missing of an experiment (of commands with TEXT)
                   --jobs K --minutes M        K runs at once; no run starts after M minutes
    python results/make.py random              play other people's environments at random -> random.csv
    python results/make.py tables [NAME]       print the tables of all CSVs, or of NAME (paper_* for several)
    python results/make.py halfway NAME        steps to half of MAPPO's best final return, by seed
    python results/make.py draw                redraw every picture from the CSVs
    python results/make.py record [--add]      print the table of records, or first measure this commit
    python results/make.py healthy RUN         print where a run's metrics lay, for the table of metrics

Rows go to results/NAME.csv, and a line per run is printed. A sweep may be stopped and started again: runs
whose rows stand in the CSV are skipped. Returns are the learners' (sampled) and the guider's over fresh
episodes, with the parameters of the moment. cpu_seconds is CPU time of one thread in a process of its own,
evaluations and the compiling of JAX's environments included.
"""

import argparse
import contextlib
import csv
import fnmatch
import io
import math
import multiprocessing
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import envs
import magpo
from adapters.published import METHODS, published
from results import compare
from results.experiments import ALGOS, EXPERIMENTS, RANDOM, command

HERE = Path(__file__).parent
TEXT_COLUMNS = ("command", "env", "algo", "detail", "machine", "date", "commit")
COLUMNS = ("step", *compare.COLUMNS[1:], "final", "won", "algo", "env", "seed", "delta", "lam", "machine",
           "command")  # fmt: skip


# --- Rows -----------------------------------------------------------------------------------------------


def read(name):
    """Rows of results/NAME.csv, numbers as floats -> list of dicts; none if there is no such file."""
    path = HERE / f"{name}.csv"
    if not path.exists():
        return []
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return [{k: v if k in TEXT_COLUMNS else float(v) for k, v in row.items()} for row in rows]


def append(name, rows):
    """Append rows, dicts with the same keys, to results/NAME.csv."""
    path = HERE / f"{name}.csv"
    new = not path.exists()
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        if new:
            table.writeheader()
        table.writerows(rows)


def wanted(name):
    """Rows of an experiment's CSV that are of its present runs: options may have been tuned since."""
    commands = {command(options) for options in EXPERIMENTS[name]}
    return [row for row in read(name) if row["command"] in commands]


def machine(cuda=False):
    """The processor's model, PyTorch's version and the device, in one string."""
    try:
        model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)[1]
    except (OSError, TypeError):
        model = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if cuda and torch.cuda.is_available() else "cpu"
    return f"{model}; torch {torch.__version__}; {device}"


# --- Runs -----------------------------------------------------------------------------------------------


def train(**options):
    """Train -> Args, the points of its curve (see compare.py), and how it ends, a dict.

    That holds each policy's mean return, and "won": the learners' share of won episodes, or nan.
    """
    final = {}

    def play_all(args, guider, learner, evaluate, stop=()):
        copies = magpo.make_envs(args, 1)
        copies.close()
        for policy in ("learner", "learner_greedy", "guider")[: 2 if args.algo == "mappo" else 3]:
            returns = evaluate(args, guider, learner, policy, args.eval_episodes, args.seed + 2)
            final[policy] = returns.mean().item()
            if policy == "learner":
                won = math.nan if copies.win_return is None else returns > copies.win_return
                final["won"] = torch.as_tensor(won, dtype=torch.float).mean().item()

    args = magpo.Args(**options)
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(magpo, "print_table", play_all), quiet:
        args.runs_dir = folder
        _, points = compare.read_run(magpo.train(args))
    return args, points, final


def run(options):
    """Train -> rows for a CSV: one an evaluation, and a last one over args.eval_episodes."""
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(io.StringIO()):  # the bars of several runs would write over each other
        args, points, final = train(**options)
    same = {key: getattr(args, key) for key in ("algo", "env", "seed", "delta", "lam")}
    same |= dict(machine=machine(args.cuda), command=command(options))
    last = points[-1] | dict(guider_return=final.get("guider", math.nan), learner_return=final["learner"])
    curve = [point | dict(final=0, won=math.nan) for point in points]
    rows = [*curve, last | dict(final=1, won=final["won"])]
    return [{key: f"{x:.6g}" for key, x in row.items()} | same for row in rows]


def apart(options):
    """run() in a process of its own: else what JAX compiles for one run would be free for the next."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, options).result()


def side_by_side(waiting, jobs=1, minutes=math.inf):
    """Start runs in their order, `jobs` at once -> (options, future of their rows), as they end.

    After so many minutes no run starts, and those that have started come to their end.
    """
    waiting, running, begin = list(waiting), {}, time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            # Neither the clock nor Ctrl-C could stop what waits in the pool: hand in what can start
            while waiting and len(running) < jobs and time.monotonic() - begin < 60 * minutes:
                options = waiting.pop(0)
                running[pool.submit(apart, options)] = options
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future


def sweep(name, text="", jobs=1, minutes=math.inf):
    """Run what is missing of an experiment, and append its rows -> the number of runs that failed."""
    runs, rows, failed = EXPERIMENTS[name], read(name), 0
    if rows and tuple(rows[0]) != COLUMNS:
        sys.exit(f"results/{name}.csv has the columns of an earlier version: delete it.")
    done = {row["command"] for row in rows}
    print(f"{len(done)} runs are in results/{name}.csv; delete it to repeat them.")
    left = [options for options in runs if command(options) not in done and text in command(options)]
    for options, future in side_by_side(left, jobs, minutes):
        number = f"[{runs.index(options) + 1}/{len(runs)}]"
        try:
            rows = future.result()
        except Exception as error:  # hours of other runs need not end with this one
            failed += 1
            print(number, f"failed: {command(options)}\n{type(error).__name__}: {error}", flush=True)
            continue
        append(name, rows)
        last = {key: float(rows[-1][key]) for key in ("learner_return", "cpu_seconds")}
        seconds = f"{last['cpu_seconds']:.0f} cpu-s"
        print(f"{number} {last['learner_return']:9.3f} {seconds:>10s}  {command(options)}", flush=True)
    return failed


def random_returns():
    """Write random.csv: returns of uniformly random play, that of learners whose last layer is zero."""
    rows = ["env,mean,ci95,episodes,command\n"]
    for env, episodes in RANDOM.items():
        args = magpo.Args(env=env, num_envs=8)
        copies = magpo.make_envs(args, 1)
        guider, learner = magpo.build(args, copies)
        copies.close()
        torch.nn.init.zeros_(learner.policy_head.weight)
        returns = magpo.evaluate(args, guider, learner, "learner", episodes, 0)
        ci95 = 1.96 * returns.std().item() / math.sqrt(len(returns))
        rows.append(f"{env},{returns.mean():.4g},{ci95:.2g},{len(returns)},python results/make.py random\n")
        print(rows[-1], end="", flush=True)
    (HERE / "random.csv").write_text("".join(rows))


# --- Tables ---------------------------------------------------------------------------------------------


def experiment(row):
    """What a row's run shares with those of other seeds: its options."""
    return row["command"].split(" --seed ")[0].removeprefix("python magpo.py ")


def estimate(values):
    """Mean and 95 % bootstrap interval, in Markdown."""
    mean, low, high = compare.interval(values)
    return f"**{mean:.2f}** [{low:.2f}, {high:.2f}]"


def print_row(*cells):
    print(f"| {' | '.join(cells)} |")


def print_heads(*heads):
    print()
    print_row(*heads)
    print("|---" * len(heads) + "|")


def random_score(env):
    """Random play's mean return, as text: measured where it is other people's environment."""
    if env in envs.ENVS:
        return f"{envs.make(env, 1).references['random']:.3g}"
    with open(HERE / "random.csv") as file:
        known = {row["env"]: f"{float(row['mean']):.3g} +- {row['ci95']}" for row in csv.DictReader(file)}
    return known.get(env, "")


def print_runs(name, last):
    """A row for all seeds of a command."""
    print_heads(f"`sweep {name}`", "random", "learners", "each seed", "guider", "steps", "CPU-seconds")
    groups = {}
    for row in last:
        groups.setdefault(experiment(row), []).append(row)
    for title, runs in groups.items():
        seeds = ", ".join(f"{row['learner_return']:.2f}" for row in runs)
        guider, cpu = (np.mean([row[key] for row in runs]) for key in ("guider_return", "cpu_seconds"))
        learners = estimate([row["learner_return"] for row in runs])
        guider = "" if np.isnan(guider) else f"{guider:.2f}"
        steps = f"{runs[0]['step'] / 1e6:.2f} M"
        print_row(f"`{title}`", random_score(runs[0]["env"]), learners, seeds, guider, steps, f"{cpu:.0f}")


def print_paper(name, last):
    """A row a task: the three methods, and what others have published."""
    others = [f"{method}, published" for method in METHODS]
    print_heads(f"`sweep {name}`", "random", *ALGOS, "seeds", "steps", "CPU-seconds", *others)
    for env in dict.fromkeys(row["env"] for row in last):
        cells, cpu, seeds = [], [], []
        for algo in ALGOS:
            runs = [row for row in last if (row["env"], row["algo"]) == (env, algo)]
            won, guider = (
                np.mean([row[key] for row in runs] or math.nan) for key in ("won", "guider_return")
            )
            cell = estimate([row["learner_return"] for row in runs]) if runs else ""
            cell += "" if np.isnan(won) else f", {won:.0%} won"
            cells.append(cell if np.isnan(guider) else f"{cell}, guider {guider:.2f}")
            cpu.append(f"{np.mean([row['cpu_seconds'] for row in runs]):.0f}" if runs else "")
            seeds.append(f"{len(runs)}")
        steps = " / ".join(
            f"{x / 1e6:.2f} M" for x in sorted({row["step"] for row in last if row["env"] == env})
        )
        scores = [published(env).get(method, "") for method in METHODS]
        print_row(
            f"`{env}`", random_score(env), *cells, " / ".join(dict.fromkeys(seeds)), steps, " / ".join(cpu),
            *(f"{score:g}" if isinstance(score, float) else score for score in scores),
        )  # fmt: skip
    print(f"\nCPU-seconds of {' / '.join(ALGOS)}. Published: 20 M steps, the best parameters on the way.")


def tables(pattern="*"):
    """Print each experiment's final returns over seeds: mean, 95 % bootstrap interval, and more."""
    for name in fnmatch.filter(EXPERIMENTS, pattern):
        rows = wanted(name) if name.startswith("paper_") else read(name)
        last = [row for row in rows if row["final"] == 1]
        if last:
            (print_paper if name.startswith("paper_") else print_runs)(name, last)
        machines = Counter(row["machine"] for row in last if "machine" in row)
        if len(machines) > 1:
            counts = ", ".join(f"{count} of {machine}" for machine, count in machines.items())
            print(f"\nThe CPU-seconds are not of one machine; runs: {counts}.")


def halfway(name):
    """Per task, the steps at which each run first stands at half of what MAPPO's best setting ends with.

    The policy meant is the learners, of CTDS the guider. Seeds in their order; nan: not reached.
    """
    print_heads("half", "options", "policy", "thousands of steps, by seed")
    for env in dict.fromkeys(row["env"] for row in wanted(name)):
        rows, groups, finals = [row for row in wanted(name) if row["env"] == env], {}, {}
        for row in rows:
            groups.setdefault(experiment(row), {}).setdefault(row["seed"], []).append(row)
            if row["final"] == 1 and row["algo"] == "mappo":
                finals.setdefault(experiment(row), []).append(row["learner_return"])
        half = max(np.mean(returns) for returns in finals.values()) / 2
        for options, seeds in groups.items():
            policy = "guider" if "--algo ctds" in options else "learner"
            steps = []
            for _, curve in sorted(seeds.items()):
                there = [row["step"] for row in curve if row[f"{policy}_return"] >= half]
                steps.append(f"{there[0] / 1000:.0f}" if there else "nan")
            print_row(f"{half:.1f}", f"`{options}`", policy, ", ".join(steps))


def healthy(run):
    """Print where nine of ten values of every metric lie after a run's first tenth."""
    with open(Path(run) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for name in rows[0]:
        low, high = np.nanquantile([float(row[name]) for row in rows[len(rows) // 10 :]], (0.05, 0.95))
        print(f"{name:22s} {low:8.3g} to {high:.3g}")


def main():
    how = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(**how, epilog=f"Names of experiments: {', '.join(EXPERIMENTS)}")
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    words = commands.add_parser("sweep")
    words.add_argument("name", choices=EXPERIMENTS, metavar="NAME")
    words.add_argument("text", nargs="?", default="", metavar="TEXT")
    words.add_argument("--jobs", type=int, default=1)
    words.add_argument("--minutes", type=float, default=math.inf)
    commands.add_parser("tables").add_argument("name", nargs="?", default="*", metavar="NAME")
    commands.add_parser("record").add_argument("--add", action="store_true")
    commands.add_parser("halfway").add_argument("name", choices=EXPERIMENTS, metavar="NAME")
    commands.add_parser("healthy").add_argument("run", metavar="RUN")
    commands.add_parser("random")
    commands.add_parser("draw")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "sweep":
        if given.jobs < 1:
            parser.error("--jobs must be at least 1.")
        try:
            sys.exit(sweep(given.name, given.text, given.jobs, given.minutes) > 0)
        except KeyboardInterrupt:
            sys.exit(f"Stopped. What had ended is in results/{given.name}.csv.")
    elif given.what == "tables":
        tables(given.name)
    elif given.what == "record":
        from results import record  # it needs this module

        if given.add:
            record.add()
        record.table()
    elif given.what == "halfway":
        halfway(given.name)
    elif given.what == "healthy":
        healthy(given.run)
    elif given.what == "random":
        random_returns()
    else:
        from results import draw  # as above

        draw.draw()


if __name__ == "__main__":
    main()
