"""What each detail is worth: `python results/details.py` -> details.csv and a table in Markdown.

Each experiment trains mpe_spread with one thing changed: an option, or a part of magpo.py that is replaced
while it trains. Runs whose rows stand in the CSV are skipped.
"""

import contextlib
import itertools
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import magpo
from results import make

SEEDS = 1, 2
STEPS = 512_000  # a quarter of the preset's budget, the learning rate falling to zero within it
BASE = {name: getattr(magpo, name) for name in ("linear", "compute_gae", "estimate_advantages", "Guider")}


def time_outs_are_ends(rewards, values, next_values, terminations, truncations, *rest):
    return BASE["compute_gae"](rewards, values, next_values, terminations | truncations, truncations, *rest)


def raw_returns(_):
    """In place of ValueNorm.stats."""
    return torch.zeros(()), torch.ones(())


def raw_advantages(buffer, guider, value_norm, args):
    """Advantages in units of the returns' deviation, neither centered nor scaled."""
    mean, std = value_norm.stats()
    values = buffer["values"] * std + mean
    _, returns, explained_variance = BASE["estimate_advantages"](buffer, guider, value_norm, args)
    mean, std = value_norm.stats()
    return (returns - (values - mean) / std).float(), returns, explained_variance


def per_minibatch(loss, position):
    """The same loss, with its advantages normalized once more."""

    def changed(*args):
        args = list(args)
        advantages = args[position]
        args[position] = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        return loss(*args)

    return changed


def loud_heads(inputs, outputs, gain):
    return BASE["linear"](inputs, outputs, 1.0 if gain == 0.1 else gain)


def loud_actions(*args):
    """A guider whose action embeddings start with a deviation of 1, PyTorch's own."""
    guider = BASE["Guider"](*args)
    nn.init.normal_(guider.action_token.weight)
    return guider


def no_own_policy(*args):
    """A guider whose logits come from attention alone."""
    guider = BASE["Guider"](*args)
    own_logits = guider.own.logits
    guider.own.logits = lambda *inputs: 0 * own_logits(*inputs)
    return guider


def shared_trunk(*args):
    """A guider whose own policy reads the features of critic and attention."""
    guider = BASE["Guider"](*args)
    guider.own.obs_encoder = guider.obs_encoder
    return guider


MINIBATCH = [
    (magpo, "guider_loss", per_minibatch(magpo.guider_loss, 3)),
    (magpo, "learner_loss", per_minibatch(magpo.learner_loss, 2)),
]
DETAILS = {  # what is changed: (owner, name, replacement) of each replaced part; options
    "nothing": ([], {}),
    "time-outs count as ends": ([(magpo, "compute_gae", time_outs_are_ends)], {}),
    "returns not normalized": ([(magpo.ValueNorm, "stats", raw_returns)], {}),
    "advantages not normalized": ([(magpo, "estimate_advantages", raw_advantages)], {}),
    "advantages normalized per minibatch": (MINIBATCH, {}),
    "policy heads start with gain 1": ([(magpo, "linear", loud_heads)], {}),
    "ReLU for every tanh": ([(torch, "tanh", torch.relu), (nn, "Tanh", nn.ReLU)], {}),
    "no LayerNorm": ([(nn, "LayerNorm", nn.Identity)], {}),
    "action embeddings of deviation 1": ([(magpo, "Guider", loud_actions)], {}),
    "guider without a policy of its own": ([(magpo, "Guider", no_own_policy)], {}),
    "own policy shares the critic's features": ([(magpo, "Guider", shared_trunk)], {}),
    "attention of width 64": ([], dict(embed_dim=64)),
    "features twice as wide": ([], dict(hidden_dim=128)),
    "no annealing": ([], dict(anneal_lr=False)),
    "no entropy bonus": ([], dict(ent_coef=0.0)),
    "lambda 0": ([], dict(lam=0.0)),
    "half as many minibatches": ([], dict(num_minibatches=8)),
    "one epoch": ([], dict(update_epochs=1)),
}


def run(detail, seed):
    """Train with one thing changed, append a row to the CSV and print it."""
    replaced, options = DETAILS[detail]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in replaced:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        options = dict(env="mpe_spread", total_timesteps=STEPS, eval_every=10_000, seed=seed) | options
        _, points, final = make.train(**options)
    numbers = dict(learners=final["learner"], guider=final["guider"], cpu_seconds=points[-1]["cpu_seconds"])
    row = dict(detail=detail, seed=seed) | {name: f"{value:.5g}" for name, value in numbers.items()}
    make.append("details", [row])
    print(*row.values(), sep="  ", flush=True)


def table():
    """Print each detail's returns of the learners by seed, and the guider's and the CPU-seconds' means."""
    print("\n| changed | learners | guider | CPU-seconds |\n|---|---|---|---|")
    found = make.read("details")
    for detail in dict.fromkeys(row["detail"] for row in found):
        rows = [row for row in found if row["detail"] == detail]
        guider, cpu = (sum(row[key] for row in rows) / len(rows) for key in ("guider", "cpu_seconds"))
        seeds = ", ".join(f"{row['learners']:.2f}" for row in rows)
        print(f"| {detail} | {seeds} | {guider:.2f} | {cpu:.0f} |")


if __name__ == "__main__":
    done = {(row["detail"], row["seed"]) for row in make.read("details")}
    for seed, detail in itertools.product(SEEDS, DETAILS):
        if (detail, seed) not in done:
            run(detail, seed)
    table()
