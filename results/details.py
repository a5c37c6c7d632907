"""What each detail is worth: `python figures/details.py` -> figures/details.csv and a table in Markdown.

Takes one detail at a time out of magpo.py (by replacing its text, so that magpo.py needs no option for it), or changes one
option, and trains mpe_spread with it. Runs whose rows stand in the CSV are skipped; about ten minutes on one core for a seed.
"""

import itertools
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from figures import make  # noqa: E402

SOURCE = (Path(__file__).parents[1] / "magpo.py").read_text()
SEEDS, STEPS = (1, 2), 512_000  # a quarter of the preset's budget, with the learning rate falling to zero within it
HEADS = "action_dim * (1 + continuous), 0.1)"
SCALED = "(advantages - all_advantages.mean()) / (all_advantages.std() + 1e-8)"
PICKED = 'log_mu, log_pi, log_old, adv, kl_mu, kl_pi = (x[live] for x in (*logprobs, b["advantages"], *kls))'
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
    "two threads": ([], dict(torch_threads=2)),
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


def run(detail, seed):
    """Train with one thing changed, append a row to the CSV and print it."""
    changes, options = DETAILS[detail]
    options = dict(env="mpe_spread", total_timesteps=STEPS, eval_every=10_000, seed=seed) | options
    _, metrics, final = make.train(changed(changes), options)
    numbers = dict(learners=final["learner"], guider=final["guider"], cpu_seconds=float(metrics[-1]["cpu_seconds"]))
    row = dict(detail=detail, seed=seed) | {name: f"{value:.5g}" for name, value in numbers.items()}
    make.append("details", [row])
    print(*row.values(), sep="  ", flush=True)


def table():
    """Print, for each detail, the learners' return with each seed, and the means of the guider's and of the CPU-seconds."""
    print("\n| changed | learners | guider | CPU-seconds |\n|---|---|---|---|")
    for detail in DETAILS:
        if rows := [row for row in make.read("details") if row["detail"] == detail]:
            guider, cpu = (sum(row[key] for row in rows) / len(rows) for key in ("guider", "cpu_seconds"))
            seeds = ", ".join(f"{row['learners']:.2f}" for row in rows)
            print(f"| {detail} | {seeds} | {guider:.2f} | {cpu:.0f} |")


if __name__ == "__main__":
    done = {(row["detail"], row["seed"]) for row in make.read("details")}
    for seed, detail in itertools.product(SEEDS, DETAILS):
        if (detail, seed) not in done:
            run(detail, seed)
    table()
