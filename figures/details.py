"""What each detail is worth: `python figures/details.py` -> figures/details.csv and a table in Markdown.

Takes one detail at a time out of magpo.py (by replacing its text, so that magpo.py needs no option for it), or changes one
option, and trains mpe_spread with it. Runs whose rows stand in the CSV are skipped; twelve minutes on one core for a seed.
"""

import csv
import itertools
import sys
import tempfile
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

SOURCE = (Path(__file__).parents[1] / "magpo.py").read_text()
CSV = Path(__file__).with_suffix(".csv")
SEEDS, STEPS = (1,), 512_000  # a quarter of the preset's budget, with the learning rate falling to zero within it
HEADS = "action_dim * (1 + continuous), 0.1)"
SCALED = "(advantages - all_advantages.mean()) / (all_advantages.std() + 1e-8)"
PICKED = "log_mu, log_pi, log_old, adv, kl_mu, kl_pi = (x[live] for x in (*logprobs, b[\"advantages\"], *kls))"
DETAILS = {  # what is changed: (texts and their replacements, options)
    "nothing": ([], {}),
    "time-outs count as ends": ([("next_values, *ended,", "next_values, ended[0] | ended[1], ended[1],")], {}),
    "returns not normalised": ([("return mean, (square - mean.square()).clamp(min=1e-6).sqrt()", "return mean * 0, mean * 0 + 1")], {}),
    "advantages not normalised": ([(SCALED, "advantages")], {}),
    "advantages normalised per minibatch": ([(PICKED, PICKED + "; adv = (adv - adv.mean()) / (adv.std() + 1e-8)")], {}),
    "policy heads start with gain 1": ([(HEADS, HEADS.replace("0.1", "1.0"))], {}),
    "ReLU for every tanh": ([(".tanh()", ".relu()"), ("nn.Tanh()", "nn.ReLU()")], {}),
    "the guider's features as narrow as its blocks": ([("obs_dim, 4 * dim, dim", "obs_dim, dim, dim")], {}),
    "no annealing": ([], dict(anneal_lr=False)),
    "no entropy bonus": ([], dict(ent_coef=0.0)),
    "lambda 0": ([], dict(lam=0.0)),
    "half as many minibatches, learning rate 6e-3": ([], dict(num_minibatches=8, learning_rate=6e-3)),
    "one epoch": ([], dict(update_epochs=1)),
    "128 copies, 8 minibatches": ([], dict(num_envs=128, num_minibatches=8)),
}  # fmt: skip


def changed(changes):
    """The module magpo with its text changed; ValueError if a text is no longer there."""
    source = SOURCE
    for old, new in changes:
        if old not in source:
            raise ValueError(f"magpo.py has no {old!r} any more; change figures/details.py, too.")
        source = source.replace(old, new)
    module = sys.modules["magpo"] = types.ModuleType("magpo")  # where dataclasses look for it
    exec(compile(source, "magpo.py", "exec"), module.__dict__)
    return module


def read():
    """Rows of the CSV; none if there is no such file."""
    return list(csv.DictReader(CSV.read_text().splitlines())) if CSV.exists() else []


def run(detail, seed):
    """Train with one thing changed, append a row to the CSV and print it."""
    changes, options = DETAILS[detail]
    magpo = changed(changes)
    with tempfile.TemporaryDirectory() as folder:
        args = magpo.Args(env="mpe_spread", total_timesteps=STEPS, eval_every=10_000, seed=seed, runs_dir=folder, **options)
        path = magpo.train(args)
        last = list(csv.DictReader((path / "metrics.csv").read_text().splitlines()))[-1]
        args, guider, learner = magpo.load(path / "checkpoint.pt")
    final = {p: magpo.evaluate(args, guider, learner, p, args.eval_episodes, seed + 2).mean().item() for p in ("learner", "guider")}
    row = dict(detail=detail, seed=seed, learners=f"{final['learner']:.5g}", guider=f"{final['guider']:.5g}")
    row["cpu_seconds"] = f"{float(last['cpu_seconds']):.4g}"
    new = not CSV.exists()
    with open(CSV, "a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        writer.writeheader() if new else None
        writer.writerow(row)
    print(*row.values(), sep="  ", flush=True)


def table():
    """Print the returns of the learners, each seed, and the means of the guider's and of the CPU-seconds."""
    print("\n| changed | learners | guider | CPU-seconds |\n|---|---|---|---|")
    for detail, rows in itertools.groupby(sorted(read(), key=lambda row: [*DETAILS].index(row["detail"])), lambda row: row["detail"]):
        rows = list(rows)
        guider, cpu = (sum(float(row[key]) for row in rows) / len(rows) for key in ("guider", "cpu_seconds"))
        seeds = ", ".join(f"{float(row['learners']):.2f}" for row in rows)
        print(f"| {detail} | {seeds} | {guider:.2f} | {cpu:.0f} |")


if __name__ == "__main__":
    done = {(row["detail"], int(row["seed"])) for row in read()}
    for seed, detail in itertools.product(SEEDS, DETAILS):
        if (detail, seed) not in done:
            run(detail, seed)
    table()
