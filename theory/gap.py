"""The imitation gap, exactly: `python theory/gap.py` prints it in a second. No sampling, no networks.

Three agents each name an integer from 0 to 9, and earn 1 if the integers add up to 10: the paper's Figure 1.
The guider is a joint policy, improved by Eq. 2 with eta = 1. The learners copy its marginals: the product
policy with the least KL(mu || pi). With backtracking the guider goes on from them, without it from itself.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from theory import exact

SUM10 = (np.indices((10, 10, 10)).sum(0) == 10).astype(float)  # payoff (A, A, A)
ETA = 1.0


def returns(seed, backtracking, iterations):
    """Expected rewards of guider and learners after each iteration, from a random start: (iterations, 2)."""
    pi = exact.random_policy(np.random.default_rng(seed), 1, SUM10.shape)
    mu = exact.joint(pi)
    rows = []
    for _ in range(iterations):
        mu_hat = exact.guider_update(mu, SUM10, ETA)
        pi = exact.project_guider_first(mu_hat, np.zeros(1), np.ones(1))
        rows.append([(np.exp(policy) * SUM10).sum() for policy in (mu_hat, exact.joint(pi))])
        mu = exact.joint(pi) if backtracking else mu_hat
    return np.array(rows)


def main():
    print("Expected reward on sum10 (at most 1), after so many iterations from each of three random starts\n")
    print("backtracking  iterations  guider          learners")
    for backtracking in (False, True):
        paths = [returns(seed, backtracking, 100) for seed in (0, 1, 2)]
        for k in (1, 10, 30, 100):
            guider, learners = (" ".join(f"{path[k - 1, i]:.2f}" for path in paths) for i in (0, 1))
            print(f"{'yes' if backtracking else 'no':12s}  {k:10d}  {guider}  {learners}")


if __name__ == "__main__":
    main()
