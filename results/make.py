"""Every sweep, table and picture of README.md and RESULTS.md.

    python results/make.py sweep NAME [TEXT]   run what is missing of an experiment (of commands with TEXT)
    python results/make.py random              play other people's environments at random -> random.csv
    python results/make.py tables [NAME]       print the tables of all CSVs, or of one, in Markdown
    python results/make.py healthy RUN         print where a run's metrics lay, for the table of metrics
    python results/make.py draw                redraw every picture from the CSVs

Rows go to results/NAME.csv, and a line per run is printed. A sweep may be stopped and started again: runs
whose rows stand in the CSV are skipped. Returns are the learners' (sampled) and the guider's over fresh
episodes, with the parameters of the moment. cpu_seconds is CPU time, evaluations included.
"""

import contextlib
import csv
import io
import itertools
import math
import sys
import tempfile
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import envs
import magpo
from results import compare

HERE = Path(__file__).parent
ALGOS = ("magpo", "mappo", "ctds")
DELTAS = (1.05, 1.2, 1.5, 2.0, 4.0, math.inf)
MATRIX = tuple(f"matrix_{name}" for name in ("climbing", "penalty", "xor", "sum10"))
MPE2 = tuple(
    f"pettingzoo:mpe2.simple_{name}" for name in ("spread_v3", "reference_v3", "speaker_listener_v4")
)
FORAGING = ("gym:Foraging-8x8-2p-2f-coop-v3", "gym:Foraging-2s-8x8-2p-2f-coop-v3")
REMEMBER = "pettingzoo:results.remember"
SUITES = ("lbf:8x8-2p-2f-coop", "connector:con-5x5x3a", "smax:2s3z", "rware:tiny-2ag")  # each one's smallest
LONG = ("gym:rware-tiny-2ag-v2", "pettingzoo:butterfly.knights_archers_zombies_v11")
RANDOM = dict.fromkeys((*MPE2, *FORAGING, REMEMBER, *SUITES), 512) | dict.fromkeys(
    LONG, 32
)  # episodes of random play
TEXT_COLUMNS = ("command", "env", "algo", "detail")


def grid(seeds, **options):
    """All combinations of the options' values (a tuple holds several), for every seed -> list of dicts."""
    values = [value if isinstance(value, tuple) else (value,) for value in options.values()]
    chosen = itertools.product(*values)
    return [dict(zip(options, choice, strict=True), seed=seed) for choice in chosen for seed in seeds]


THREE, FIVE = (1, 2, 3), (1, 2, 3, 4, 5)  # seeds
EXPERIMENTS = {
    "mpe_spread": grid(FIVE, env="mpe_spread", algo=ALGOS),
    "coordsum": grid(FIVE, env="coordsum_3x10", algo=ALGOS),
    "sum10": grid(FIVE, env="matrix_sum10", algo=ALGOS),
    "matrix": grid(FIVE, env=MATRIX, algo=("magpo", "mappo")),
    "delta_matrix": grid(FIVE, env=("matrix_climbing", "matrix_sum10"), delta=DELTAS),
    "delta_coordsum": grid(FIVE, env="coordsum_3x10", delta=DELTAS, total_timesteps=240_000),
    "delta_lambda": grid(THREE, env="matrix_sum10", delta=(*DELTAS[:4], math.inf), lam=(0.0, 0.5, 2.0, 8.0)),
    "backtracking": grid(THREE, env="coordsum_3x10", backtracking=("soft", "reset"), total_timesteps=240_000)
    + grid(THREE, env="mpe_spread", backtracking=("soft", "reset"), total_timesteps=832_000),
    "others": grid(THREE, env=MPE2, total_timesteps=120_000)
    + grid(THREE, env=FORAGING, algo=("magpo", "mappo"), total_timesteps=480_000),
    "continuous": grid(
        THREE, env="mpe_spread_continuous", algo=("magpo", "mappo"), total_timesteps=1_024_000
    ),
    "memory": grid(THREE, env=REMEMBER, recurrent=(False, True), total_timesteps=40_000)
    + grid(THREE, env="mpe_spread_partial", recurrent=(False, True), total_timesteps=1_024_000),
    "gamma": grid(THREE, env="coordsum_3x10", algo=("magpo", "mappo"), gamma=0.9),
    "team": grid(
        THREE,
        env=("mpe_spread", "mpe_spread_5ag", "mpe_spread_10ag"),
        algo=("magpo", "mappo"),
        total_timesteps=1_024_000,
    ),
    "suites": grid((1, 2), env=SUITES, algo=("magpo", "mappo")),
}


# --- Rows -----------------------------------------------------------------------------------------------


def command(options):
    """The command line that repeats a run."""
    words = ["python magpo.py"]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if type(value) is bool:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag} {value}")
    return " ".join(words)


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


def train(**options):
    """Train -> Args, the points of its curve (see compare.py), each policy's mean return at the end."""
    final = {}

    def play_all(args, guider, learner, stop=()):
        for policy in ("learner", "learner_greedy", "guider")[: 2 if args.algo == "mappo" else 3]:
            returns = magpo.evaluate(args, guider, learner, policy, args.eval_episodes, args.seed + 2)
            final[policy] = returns.mean().item()

    args = magpo.Args(**options)
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(magpo, "print_table", play_all), quiet:
        args.runs_dir = folder
        _, points = compare.read_run(magpo.train(args))
    return args, points, final


def sweep(name, text=""):
    """Run what is missing of an experiment: a row per evaluation, the last one over args.eval_episodes."""
    runs, done = EXPERIMENTS[name], {row["command"] for row in read(name)}
    print(f"{len(done)} runs are in results/{name}.csv; delete it to repeat them.")
    for number, options in enumerate(runs, 1):
        if command(options) in done or text not in command(options):
            continue
        args, points, final = train(**options)
        same = {key: getattr(args, key) for key in ("algo", "env", "seed", "delta", "lam")}
        same["command"] = command(options)
        last = points[-1] | dict(guider_return=final.get("guider", math.nan), learner_return=final["learner"])
        rows = [{key: f"{x:.6g}" for key, x in point.items()} for point in (*points, last)]
        append(name, [row | dict(final=int(row is rows[-1])) | same for row in rows])
        seconds = f"{last['cpu_seconds']:.0f} cpu-s"
        print(
            f"[{number}/{len(runs)}] {final['learner']:9.3f} {seconds:>10s}  {command(options)}", flush=True
        )


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


def tables(only=None):
    """Print each experiment's final returns over seeds: mean, 95 % bootstrap interval, each seed."""
    with open(HERE / "random.csv") as file:
        randoms = {row["env"]: f"{float(row['mean']):.3g} +- {row['ci95']}" for row in csv.DictReader(file)}
    for name in [only] if only else EXPERIMENTS:
        last = [row for row in read(name) if row["final"] == 1]
        if last:
            heads = ("random", "learners", "each seed", "guider", "steps", "CPU-seconds")
            print(f"\n| `sweep {name}` | {' | '.join(heads)} |\n" + "|---" * 7 + "|")
        for title in dict.fromkeys(map(experiment, last)):
            runs = [row for row in last if experiment(row) == title]
            mean, low, high = compare.interval([row["learner_return"] for row in runs])
            seeds = ", ".join(f"{row['learner_return']:.2f}" for row in runs)
            guider, cpu = (np.mean([row[key] for row in runs]) for key in ("guider_return", "cpu_seconds"))
            env, steps = runs[0]["env"], f"{runs[0]['step'] / 1e6:.2f} M"
            random = randoms.get(env) or f"{envs.make(env, 1).references['random']:.3g}"
            learners, guider = (
                f"**{mean:.2f}** [{low:.2f}, {high:.2f}]",
                "" if np.isnan(guider) else f"{guider:.2f}",
            )
            print(f"| `{title}` | {random} | {learners} | {seeds} | {guider} | {steps} | {cpu:.0f} |")


def healthy(run):
    """Print where nine of ten values of every metric lie after a run's first tenth."""
    with open(Path(run) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for name in rows[0]:
        low, high = np.nanquantile([float(row[name]) for row in rows[len(rows) // 10 :]], (0.05, 0.95))
        print(f"{name:22s} {low:8.3g} to {high:.3g}")


# --- Pictures -------------------------------------------------------------------------------------------


def draw_curves(name):
    """Learning curves of an experiment, and the imitation gap."""
    rows = read(name)
    runs = []
    for text in dict.fromkeys(row["command"] for row in rows):
        points = [row for row in rows if row["command"] == text and row["final"] == 0]
        same = {key: points[0][key] for key in ("seed", "env", "algo")}
        runs.append(dict(label=same["algo"], points=points, **same))
    references = envs.make(runs[0]["env"], 1).references
    compare.draw(runs, HERE / f"{name}.png", references.items())


def draw_delta():
    """Final return of the learners against delta; infinity is drawn at the right end."""
    runs = [row for name in ("delta_matrix", "delta_coordsum") for row in read(name) if row["final"] == 1]
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
    compare.save(figure, HERE / "delta.png")


def draw_delta_lambda():
    """Mean final return of the learners on sum10 for each delta and lambda."""
    runs = [row for row in read("delta_lambda") if row["final"] == 1]
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
    compare.save(figure, HERE / "delta_lambda.png")


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
    compare.save(figure, HERE / "clip.png")


def draw():
    for name in ("mpe_spread", "coordsum", "sum10"):
        if read(name):
            draw_curves(name)
    if read("delta_matrix"):
        draw_delta()
    if read("delta_lambda"):
        draw_delta_lambda()
    draw_clip()


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["sweep", name, *text] if name in EXPERIMENTS and len(text) < 2:
            sweep(name, *text)
        case ["tables", *name] if len(name) < 2:
            tables(*name)
        case ["healthy", run]:
            healthy(run)
        case ["random"]:
            random_returns()
        case ["draw"]:
            draw()
        case _:
            sys.exit(f"{__doc__}\nNames of experiments: {', '.join(EXPERIMENTS)}")
