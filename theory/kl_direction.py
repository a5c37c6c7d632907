"""The direction of the KL is the guarantee: `python theory/kl_direction.py` plays exact MAGPO with both.

Learner first, KL(pi || mu), is the theorem's; guider first, KL(mu || pi), the official code's. It prints a
table, writes it to kl_direction.csv, and draws ten starts in kl_direction.png, both beside this file.
"""

import csv
import sys
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import envs
from theory import exact

GAMES = {"climbing": np.array(envs.CLIMBING), "penalty": np.array(envs.PENALTY)}


def curves(payoff, eta, starts, iterations, rng):
    """J of the learners, both directions from the same starts: direction -> (iterations + 1, starts)."""
    pi = exact.random_policy(rng, starts, np.shape(payoff))
    P, R = exact.copies(payoff, starts)
    J = {}
    for direction in ("guider_first", "learner_first"):
        path = exact.iterate(pi, P, R, 0.0, eta, iterations, direction)
        J[direction] = np.array([v for _, v in path])
    return J


def table(eta, starts, iterations, rng):
    """A row per game and direction: worst change of J in a step, share of starts that end at the optimum."""
    rows = []
    for game, payoff in GAMES.items():
        near_optimum = payoff.max() - 0.01 * np.ptp(payoff)
        for direction, J in curves(payoff, eta, starts, iterations, rng).items():
            worst, share = np.diff(J, axis=0).min(), np.mean(J[-1] > near_optimum)
            rows.append(
                dict(game=game, eta=eta, direction=direction, worst_change=worst, share_at_optimum=share)
            )
    return rows


def draw(path):
    """J of the learners per iteration, both directions from the same ten starts, into a picture."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for ax, (game, payoff) in zip(axes, GAMES.items(), strict=True):
        paths = curves(payoff, 1.0, 10, 30, np.random.default_rng(0))
        for (direction, J), color in zip(paths.items(), ("tab:red", "tab:blue"), strict=True):
            lines = ax.plot(J, color=color, lw=0.9)
            lines[0].set_label(direction.replace("_", " "))
        ax.set(title=f"{game}, eta = 1, exact", xlabel="iteration", ylabel="J of the learners")
        ax.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(path, dpi=110)
    plt.close()


def main():
    rows = []
    for eta, iterations in ((1.0, 200), (0.01, 3000)):
        rows += table(eta, 50, iterations, np.random.default_rng(0))
    here = Path(__file__)
    with open(here.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print("game      eta   direction      worst change of J  share at the optimum")
    for row in rows:
        start = f"{row['game']:8s}  {row['eta']:<4g}  {row['direction']:13s}"
        print(f"{start}  {row['worst_change']:17.2g}  {row['share_at_optimum']:20.2f}")
    draw(here.with_suffix(".png"))


if __name__ == "__main__":
    main()
