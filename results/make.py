"""Every sweep and every picture of README.md and TUTORIAL.md.

    python figures/make.py sweep NAME [TEXT]   run what is missing of an experiment (of its commands that hold TEXT)
    python figures/make.py random       play other people's environments at random, for figures/random.csv
    python figures/make.py tables       print the tables of all CSVs, in Markdown
    python figures/make.py healthy RUN  print where a run's metrics lay, for the table of metrics
    python figures/make.py draw         redraw every picture from the CSVs
    python figures/make.py theory       recompute figures/kl_direction.csv (exact tables, seconds)

Rows go to figures/NAME.csv, a line per run is printed. A sweep can be stopped and started again: runs whose rows stand in the CSV are skipped. Returns are the learners'
(sampled) and the guider's, over fresh episodes with the parameters of the moment; cpu_seconds is the process's CPU time.
"""

import csv
import itertools
import math
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import envs  # noqa: E402
import magpo  # noqa: E402
from figures import theory  # noqa: E402

ALGOS = ("magpo", "mappo", "ctds")
DELTAS = (1.05, 1.2, 1.5, 2.0, 4.0, math.inf)

MPE2 = tuple(f"pettingzoo:mpe2.simple_{name}" for name in ("spread_v3", "reference_v3", "speaker_listener_v4"))
FORAGING = ("gym:Foraging-8x8-2p-2f-coop-v3", "gym:Foraging-2s-8x8-2p-2f-coop-v3")
REMEMBER = "pettingzoo:figures.remember"
OTHERS = (*MPE2, *FORAGING, "gym:rware-tiny-2ag-v2", "pettingzoo:butterfly.knights_archers_zombies_v11", REMEMBER)


def grid(seeds, **options):
    """All combinations of the options' values (a tuple is a list of values), for every seed -> list of dicts."""
    values = [value if isinstance(value, tuple) else (value,) for value in options.values()]
    return [dict(zip(options, chosen), seed=seed) for chosen in itertools.product(*values) for seed in seeds]


EXPERIMENTS = {
    "mpe_spread": grid((1, 2, 3, 4, 5), env="mpe_spread", algo=ALGOS),
    "coordsum": grid((1, 2, 3, 4, 5), env="coordsum_3x10", algo=ALGOS),
    "sum10": grid((1, 2, 3, 4, 5), env="matrix_sum10", algo=ALGOS),
    "matrix": grid((1, 2, 3, 4, 5), env=("matrix_climbing", "matrix_penalty", "matrix_xor", "matrix_sum10")),
    "delta_matrix": grid((1, 2, 3, 4, 5), env=("matrix_climbing", "matrix_sum10"), delta=DELTAS),
    "delta_coordsum": grid((1, 2), env="coordsum_3x10", delta=(1.05, 1.2, 1.5, 4.0, math.inf), total_timesteps=240_000),
    "delta_lambda": grid((1, 2, 3), env="matrix_sum10", delta=(1.05, 1.2, 1.5, 2.0, math.inf), lam=(0.0, 0.5, 2.0, 8.0)),
    "backtracking": grid((1, 2, 3), env="coordsum_3x10", backtracking=("soft", "reset"), residual=(False, True), total_timesteps=240_000)
    + grid((1, 2), env="mpe_spread", backtracking=("soft", "reset"), residual=(False, True), total_timesteps=832_000),
    "others": grid((1, 2, 3), env=MPE2, total_timesteps=120_000)
    + grid((1, 2, 3), env=FORAGING, total_timesteps=480_000)
    + grid((1, 2, 3), env=FORAGING[0], algo="mappo", total_timesteps=480_000),
    "continuous": grid((1, 2, 3), env="mpe_spread_continuous", total_timesteps=1_024_000),
    "memory": grid((1, 2, 3), env=REMEMBER, recurrent=(False, True), total_timesteps=40_000)
    + grid((1, 2), env="mpe_spread_partial", recurrent=(False, True), total_timesteps=1_024_000),
    "gamma": grid((1, 2, 3), env="coordsum_3x10", algo=("magpo", "mappo"), gamma=0.9),
    "team": grid((1, 2), env=("mpe_spread", "mpe_spread_5ag", "mpe_spread_10ag"), algo=("magpo", "mappo"), total_timesteps=1_024_000),
}
EXPERIMENTS["backtracking"] = [run for run in EXPERIMENTS["backtracking"] if run["residual"] or run["backtracking"] == "soft"]


def command(options):
    """The command line that repeats a run."""
    flags = (f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in options.items() if value is not False)
    return "python magpo.py " + " ".join(flags)


def read(name):
    """Rows of figures/NAME.csv, numbers as floats -> list of dicts; none if there is no such file."""
    path = HERE / f"{name}.csv"
    if not path.exists():
        return []
    with open(path) as file:
        return [{k: v if k in ("command", "env", "algo", "detail") else float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def append(name, rows):
    """Append rows, dicts with the same keys, to figures/NAME.csv."""
    path = HERE / f"{name}.csv"
    new = not path.exists()
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        table.writeheader() if new else None
        table.writerows(rows)


def train(magpo, options):
    """Train with a module magpo -> Args, the rows of metrics.csv at its evaluations, mean return of each policy at the end."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = magpo.train(magpo.Args(**options, runs_dir=folder))
        with open(run_dir / "metrics.csv") as file:
            metrics = [row for row in csv.DictReader(file) if row["learner_return"] != "nan"]
        args, guider, learner = magpo.load(run_dir / "checkpoint.pt")
    policies = ("learner", "learner_greedy") + ("guider",) * (args.algo != "mappo")
    final = {p: magpo.evaluate(args, guider, learner, p, args.eval_episodes, args.seed + 2).mean().item() for p in policies}
    return args, metrics, final


def sweep(name, text=""):
    """Run what is missing of an experiment; one CSV row per evaluation, the last one of a run over args.eval_episodes."""
    runs, done = EXPERIMENTS[name], {row["command"] for row in read(name)}
    print(f"{len(done)} runs are in figures/{name}.csv; delete it to repeat them.")
    for number, options in enumerate(runs, 1):
        if command(options) in done or text not in command(options):
            continue
        args, metrics, final = train(magpo, options)
        keys = ("step", "cpu_seconds", "guider_return", "learner_return")
        rows = [{key: f"{float(row[key]):.6g}" for key in keys} for row in metrics]
        extra = {"algo": args.algo, "env": args.env, "seed": args.seed, "delta": args.delta, "lam": args.lam, "command": command(options)}
        rows = [row | {"final": 0} | extra for row in rows]
        last = {"guider_return": f"{final.get('guider', math.nan):.6g}", "learner_return": f"{final['learner']:.6g}", "final": 1}
        rows.append(rows[-1] | last)
        append(name, rows)
        print(f"[{number}/{len(runs)}] {final['learner']:9.3f} {rows[-1]['cpu_seconds']:>6s} cpu-s  {command(options)}", flush=True)


def random_returns():
    """Write figures/random.csv: returns of uniformly random play, which are those of learners whose last layer is zero."""
    rows = ["env,mean,ci95,episodes,command\n"]
    for env in OTHERS:
        args = magpo.Args(env=env, num_envs=8)
        episodes = 32 if "rware" in env or "knights" in env else 512  # those are long
        guider, learner = magpo.build(args, copies := magpo.make_envs(args, 1))
        copies.close(), learner.policy_head.weight.data.zero_()
        returns = magpo.evaluate(args, guider, learner, "learner", episodes, 0)
        ci95 = 1.96 * returns.std().item() / math.sqrt(len(returns))
        rows.append(f"{env},{returns.mean():.4g},{ci95:.2g},{len(returns)},python figures/make.py random\n")
        print(rows[-1], end="", flush=True)
    (HERE / "random.csv").write_text("".join(rows))


def without_seed(run):
    return run["command"].split(" --seed ")[0]


def interval(values):
    """Mean and the 95 % bootstrap interval of the mean over seeds."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (10_000, len(values))).mean(1)
    return np.mean(values), *np.quantile(means, (0.025, 0.975))


def tables():
    """Print, for every experiment that has run, the final returns over seeds: mean, 95 % bootstrap interval, each seed."""
    with open(HERE / "random.csv") as file:
        randoms = {row["env"]: f"{float(row['mean']):.3g} +- {row['ci95']}" for row in csv.DictReader(file)}
    for name in EXPERIMENTS:
        last = [row for row in read(name) if row["final"] == 1]
        if last:
            print(f"\n| `sweep {name}` | random | learners | each seed | guider | steps | CPU-seconds |\n" + "|---" * 7 + "|")
        for title in dict.fromkeys(map(without_seed, last)):
            runs = [row for row in last if without_seed(row) == title]
            mean, low, high = interval([row["learner_return"] for row in runs])
            seeds = ", ".join(f"{row['learner_return']:.2f}" for row in runs)
            guider, cpu = (np.mean([row[key] for row in runs]) for key in ("guider_return", "cpu_seconds"))
            guider, env, steps = "" if np.isnan(guider) else f"{guider:.2f}", runs[0]["env"], runs[0]["step"] / 1e6
            random = randoms.get(env) or f"{envs.make(env, 1).references['random']:.3g}"
            options = title.removeprefix("python magpo.py ")
            print(f"| `{options}` | {random} | **{mean:.2f}** [{low:.2f}, {high:.2f}] | {seeds} | {guider} | {steps:.2f} M | {cpu:.0f} |")


def healthy(run_dir):
    """Print where nine of ten values of every metric lie after a run's first tenth."""
    with open(Path(run_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for name in rows[0]:
        low, high = np.nanquantile([float(row[name]) for row in rows[len(rows) // 10 :]], (0.05, 0.95))
        print(f"{name:22s} {low:8.3g} to {high:.3g}")


def savefig(name):
    plt.tight_layout()
    plt.savefig(HERE / f"{name}.png", dpi=110)
    plt.close()


# Scores on mpe_spread, and after how many steps: given to the project, one seed each, not measured by it
PEERS = {"MAT (PyTorch)": (0.59, 0.57e6), "JaxMARL MAPPO": (0.62, 1.0e6), "CleanMARL MAPPO": (0.24, 0.3e6)}
COLORS = {"magpo": "tab:blue", "mappo": "tab:orange", "ctds": "tab:green"}


def draw_curves(name):
    """Learning curves with 95 % bootstrap bands (left), and guider against learners (right)."""
    rows = [row for row in read(name) if row["final"] == 0]
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    for algo in ALGOS:
        steps = sorted({row["step"] for row in rows if row["algo"] == algo})
        for axes, key, style in ((left, "learner_return", "-"), (right, "learner_return", "-"), (right, "guider_return", ":")):
            if algo == "mappo" and key == "guider_return" or not steps:
                continue
            points = {step: [r[key] for r in rows if r["algo"] == algo and r["step"] == step] for step in steps}
            points = {step: values for step, values in points.items() if not np.isnan(values).any()}  # no episode ended there
            band = np.array([interval(values) for values in points.values()])
            axes.plot(points.keys(), band[:, 0], style, color=COLORS[algo], label=f"{algo} {key.split('_')[0]}")
            if axes is left:
                axes.fill_between(points.keys(), band[:, 1], band[:, 2], color=COLORS[algo], alpha=0.2, lw=0)
    env = rows[0]["env"]
    for reference, score in envs.make(env, 1).references.items():
        left.axhline(score, color="gray", lw=0.8, ls="--")
        left.text(0, score, reference, fontsize=7, va="bottom", color="gray")
    if env == "mpe_spread":
        random, heuristic = envs.make(env, 1).references.values()
        for peer, (score, step) in PEERS.items():
            left.plot(step, random + score * (heuristic - random), "k^", ms=5)
            left.text(step, random + score * (heuristic - random) - 0.4, peer, fontsize=7, va="top")
    for axes, title in ((left, "learners, 95 % bootstrap band over seeds"), (right, "the imitation gap: guider (dotted), learners")):
        axes.set(xlabel="environment steps", ylabel="mean team return", title=f"{env}: {title}")
        axes.title.set_fontsize(9), axes.legend(fontsize=7)
    savefig(name)


def draw_delta():
    """Final return of the learners against delta; infinity is drawn at the right end."""
    runs = [row for name in ("delta_matrix", "delta_coordsum") for row in read(name) if row["final"] == 1]
    names = list(dict.fromkeys(row["env"] for row in runs))
    _, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.4), squeeze=False)
    for ax, env in zip(axes[0], names):
        deltas = sorted({row["delta"] for row in runs if row["env"] == env})
        band = np.array([interval([r["learner_return"] for r in runs if r["env"] == env and r["delta"] == d]) for d in deltas])
        ax.errorbar(range(len(deltas)), band[:, 0], np.abs(band[:, 1:] - band[:, :1]).T, marker="o", capsize=3)
        ax.set_xticks(range(len(deltas)), [f"{d:g}" for d in deltas])
        ax.set(title=env, xlabel="delta", ylabel="learners' return")
    savefig("delta")


def draw_delta_lambda():
    """Mean final return of the learners on sum10 for each delta and lambda."""
    runs = [row for row in read("delta_lambda") if row["final"] == 1]
    deltas, lams = (sorted({row[key] for row in runs}) for key in ("delta", "lam"))
    cells = [[np.mean([r["learner_return"] for r in runs if (r["delta"], r["lam"]) == (d, lam)] or [math.nan]) for d in deltas] for lam in lams]
    plt.figure(figsize=(5, 3.4))
    plt.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    for (i, lam), (j, d) in itertools.product(enumerate(lams), enumerate(deltas)):
        plt.text(j, i, f"{cells[i][j]:.2f}", ha="center", va="center", color="w" if cells[i][j] < 0.6 else "k")
    plt.xticks(range(len(deltas)), [f"{d:g}" for d in deltas]), plt.yticks(range(len(lams)), [f"{lam:g}" for lam in lams])
    plt.xlabel("delta"), plt.ylabel("lambda"), plt.title("matrix_sum10: learners' return", fontsize=9)
    savefig("delta_lambda")


GAMES = {"climbing": envs.CLIMBING, "penalty": envs.PENALTY}


def kl_direction():
    """Write figures/kl_direction.csv: exact MAGPO with both directions of the KL, 50 random starts (Dirichlet(1)), seed 0."""
    rows = []
    for eta, iterations in ((1.0, 200), (0.01, 3000)):
        rows += theory.kl_directions(GAMES, [eta], 50, iterations, np.random.default_rng(0))
    with open(HERE / "kl_direction.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        table.writeheader(), table.writerows(rows)
    for row in rows:
        print({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()})


def draw_kl_direction():
    """Exact J of the learners per iteration, both directions of the KL from the same ten starts."""
    _, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for ax, (game, payoff) in zip(axes, GAMES.items()):
        for (direction, J), color in zip(theory.curves(payoff, 1.0, 10, 30, np.random.default_rng(0)).items(), ("tab:red", "tab:blue")):
            ax.plot(J, color=color, lw=0.9)
            ax.plot([], [], color=color, label=direction.replace("_", " "))
        ax.set(title=f"{game}, eta = 1, exact", xlabel="iteration", ylabel="J of the learners")
        ax.legend(fontsize=8)
    savefig("kl_direction")


def draw_clip():
    """Eq. 9's objective for one sample against mu/pi, with the bound delta and without it (PPO), for both signs of A."""
    gap = torch.linspace(math.log(0.25), math.log(4), 400)  # log mu/pi
    zero = torch.zeros(1)
    _, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for ax, sign, pi in zip(axes, (1.0, -1.0), (0.6, 1.6)):  # pi is behind mu_old, then beyond it: the inner clip binds first
        pi_over_old = math.log(pi)
        for delta, style in ((math.inf, "k:"), (1.5, "tab:blue")):
            points = ((pi_over_old + g, torch.tensor(pi_over_old), zero, torch.tensor(sign), zero) for g in gap)
            ax.plot(gap.exp(), [-magpo.guider_loss(*p, 0.2, delta)[0] for p in points], style, label=f"delta = {delta:g}")
        for bound in (1 / 1.5, 1.5):
            ax.axvline(bound, color="gray", lw=0.8, ls="--")
        ax.set(xlabel="mu/pi", ylabel="objective, min(r A, rho A)", title=f"A = {sign:+.0f}, pi/mu_old = {pi}, epsilon = 0.2", xscale="log")
        ax.set_xticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"]), ax.minorticks_off(), ax.legend(fontsize=8)
    savefig("clip")


def draw():
    for name in ("mpe_spread", "coordsum", "sum10"):
        if read(name):
            draw_curves(name)
    if read("delta_matrix"):
        draw_delta()
    if read("delta_lambda"):
        draw_delta_lambda()
    draw_kl_direction()
    draw_clip()


if __name__ == "__main__":
    actions = {"sweep": sweep, "tables": tables, "draw": draw, "theory": kl_direction, "random": random_returns, "healthy": healthy}
    if len(sys.argv) < 2 or sys.argv[1] not in actions or (sys.argv[1] == "sweep" and sys.argv[2:3] != [n for n in EXPERIMENTS if n in sys.argv[2:3]]):
        sys.exit(__doc__ + f"\nexperiments: {', '.join(EXPERIMENTS)}")
    actions[sys.argv[1]](*sys.argv[2:])
