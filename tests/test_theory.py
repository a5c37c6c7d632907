"""The theorem, its corollary and what they need, in theory/'s exact tables, against brute force."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest

import envs
from theory import exact, gap, kl_direction

GAMES = kl_direction.GAMES | {"xor": np.array(envs.XOR), "sum10": envs.sum_game().numpy().astype(float)}
ETAS = [0.01, 1, 100]
SIZES = [(2, 3), (2, 2, 2)]


# --- oracles ------------------------------------------------------------------------------------------------


def brute_joint(pi):
    """Probabilities (S, A_1, ..., A_N), one joint action at a time."""
    out = np.empty((len(pi[0]), *(p.shape[1] for p in pi)))
    for s, *a in itertools.product(*map(range, out.shape)):
        out[(s, *a)] = np.exp(sum(p[s, a_i] for p, a_i in zip(pi, a, strict=True)))
    return out


def brute_expect(x, pi_of, i):
    """E[x(s, a) | a^i] with agent j drawn from pi_of[j], one joint action at a time: (S, A_i)."""
    out = np.zeros((x.shape[0], x.shape[i + 1]))
    for s, *a in itertools.product(*map(range, x.shape)):
        others = [np.exp(pi_of[j][s, a_j]) for j, a_j in enumerate(a) if j != i]
        out[s, a[i]] += x[(s, *a)] * np.prod(others)
    return out


def brute_values(mu, P, R, gamma, sweeps=400):
    """V and Q by repeated backups: shares nothing with the linear solve."""
    V = np.zeros(len(R))
    for _ in range(sweeps):
        Q = R + gamma * np.einsum("s...t,t->s...", P, V)
        V = (np.exp(mu) * Q).reshape(len(R), -1).sum(1)
    return V, Q


def kl(p, q):
    """KL(p || q) per state, of log-probabilities: (S,)."""
    return (np.exp(p) * (p - q)).reshape(len(p), -1).sum(1)


def softmax(x):
    """Log-probabilities (S, A) from logits."""
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def perturbed(rng, table, scale):
    """A normalised neighbour of log-probabilities (S, ...)."""
    noisy = (table + scale * rng.normal(size=table.shape)).reshape(len(table), -1)
    return softmax(noisy).reshape(table.shape)


def draw(seed, states, sizes):
    """A random Markov game and a random product policy."""
    rng = np.random.default_rng(seed)
    P, R = exact.random_markov_game(rng, states, sizes)
    return P, R, exact.random_policy(rng, states, sizes)


def values(pi, P, R, gamma, eta, iterations, **options):
    """V of every product policy on the way: (iterations + 1, S)."""
    return np.array([v for _, v in exact.iterate(pi, P, R, gamma, eta, iterations, **options)])


# --- the building blocks ------------------------------------------------------------------------------------


def test_values_and_visits_are_those_of_repeated_backups():
    P, R, pi = draw(1, 4, (2, 3))
    mu = exact.guider_update(exact.joint(pi), R, 1.0)  # correlated, so that no product shortcut can pass
    V, Q = brute_values(mu, P, R, 0.9)
    np.testing.assert_allclose(exact.exact_v(mu, P, R, 0.9), V, atol=1e-10)
    np.testing.assert_allclose(exact.exact_q(mu, P, R, 0.9), Q, atol=1e-10)
    at_t, visits = np.full(4, 1 / 4), np.zeros(4)
    for t in range(400):
        visits += 0.1 * 0.9**t * at_t
        at_t = np.einsum("s,sab,sabt->t", at_t, np.exp(mu), P)
    np.testing.assert_allclose(exact.visitation(mu, P, 0.9), visits, atol=1e-10)


@pytest.mark.parametrize("eta", ETAS)
def test_guider_update_is_the_argmax_of_eq_2(eta):
    P, Q, pi = draw(3, 3, (2, 3))
    mu, rng = exact.joint(pi), np.random.default_rng(0)
    mu_hat = exact.guider_update(mu, Q, eta)

    def objective(candidate):
        return (eta * np.exp(candidate) * Q).reshape(3, -1).sum(1) - kl(candidate, mu)

    np.testing.assert_allclose(np.exp(mu_hat).reshape(3, -1).sum(1), 1)
    for scale in (1e-3, 1e-1, 1, 10):
        for _ in range(50):
            assert np.all(objective(perturbed(rng, mu_hat, scale)) <= objective(mu_hat) + 1e-10)


def test_guider_update_brings_back_actions_whose_probability_underflowed():
    mu = exact.joint(exact.random_policy(np.random.default_rng(0), 1, (3, 3)))
    gone = exact.guider_update(mu, GAMES["penalty"][None], 100.0)
    assert np.exp(gone[0, 0, 0]) == 0 and np.all(np.isfinite(gone))
    np.testing.assert_allclose(exact.guider_update(gone, -GAMES["penalty"][None], 100.0), mu, atol=1e-9)


@pytest.mark.parametrize("obs", [[0, 1, 2, 3], [0, 1, 0, 1]], ids=["states", "aliased"])
@pytest.mark.parametrize("direction", ["learner_first", "guider_first"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_projections_minimise_the_weighted_kl_and_share_rows(sizes, direction, obs):
    obs, weights = np.array(obs), np.array([0.1, 0.2, 0.3, 0.4])
    P, Q, pi = draw(6, 4, sizes)
    pi, rng = [p[obs] for p in pi], np.random.default_rng(0)
    mu_hat = exact.guider_update(exact.joint(pi), Q, 3.0)

    def weighted_kl(candidate):
        both = np.log(brute_joint(candidate)), mu_hat
        return weights @ (kl(*both) if direction == "learner_first" else kl(*both[::-1]))

    if direction == "learner_first":
        new = exact.project_learner_first(pi, mu_hat, obs, weights)
        assert weighted_kl(new) <= weighted_kl(pi)  # what the theorem needs: no higher than at its start
    else:
        new = exact.project_guider_first(mu_hat, obs, weights)
    for p in new:
        np.testing.assert_allclose(p, p[obs], atol=1e-14)
    for scale in (0.01, 0.1):
        for _ in range(100):
            near = [perturbed(rng, p[: obs.max() + 1], scale)[obs] for p in new]
            assert weighted_kl(near) >= weighted_kl(new) - 1e-12


# --- Theorem 4.1: V(pi_{k+1}) >= V(pi_k) --------------------------------------------------------------------


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("game", [*GAMES, (3, 4), (2, 2, 2, 2)], ids=str)
def test_theorem_single_state_games_never_get_worse(game, eta):
    rng, starts = np.random.default_rng(0), 10
    payoff = GAMES[game] if game in GAMES else 10 * exact.random_game(rng, game)
    pi = exact.random_policy(rng, starts, payoff.shape)
    J = values(pi, *exact.copies(payoff, starts), 0.0, eta, 15)
    assert np.all(np.diff(J, axis=0) >= -1e-10)
    assert np.all(J[-1] > J[0] + 1e-6)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("sizes", [(3, 3), (2, 2, 2)], ids=str)
def test_theorem_markov_games_never_get_worse_in_any_state(sizes, eta):
    for seed in range(5):
        P, R, pi = draw(seed, 4, sizes)
        V = values(pi, P, R, 0.9, eta, 15)
        assert np.all(np.diff(V, axis=0) >= -1e-10)
        assert np.all(V[-1] > V[0])


# --- what the theorem needs, one counterexample each --------------------------------------------------------


def test_edge_guider_first_gets_worse_and_learner_first_does_not():
    rows = kl_direction.table(1.0, starts=50, iterations=60, rng=np.random.default_rng(0))
    drops = {"climbing": -5, "penalty": -25}
    for guider_first, learner_first in zip(rows[::2], rows[1::2], strict=True):
        assert (guider_first["direction"], learner_first["direction"]) == ("guider_first", "learner_first")
        assert guider_first["worst_change"] < drops[guider_first["game"]]
        assert learner_first["worst_change"] > -1e-10
        assert guider_first["share_at_optimum"] > 0.9 > 0.75 > learner_first["share_at_optimum"] > 0.1


@pytest.mark.parametrize("states", [1, 4])
def test_edge_without_backtracking_games_can_get_worse(states):
    """In a single state, mu^_k is mu_0 exp(k eta R), and its *global* projections never get worse: add two
    optimality inequalities. Block-coordinate descent follows a local minimum, and drops where this one ends.
    """
    P, R, pi = draw(141, 4, (3, 3))
    gamma = 0.9
    if states == 1:
        rng = np.random.default_rng(48)
        (P, R), gamma = exact.copies(10 * exact.random_game(rng, (4, 4))), 0.0
        pi = [p[17:18] for p in exact.random_policy(rng, 20, (4, 4))]
    assert np.diff(values(pi, P, R, gamma, 1.0, 30), axis=0).min() > -1e-10
    assert np.diff(values(pi, P, R, gamma, 1.0, 30, backtracking=False), axis=0).min() < -0.1


def test_edge_without_backtracking_even_the_global_projection_gets_worse():
    """Agent 0 chooses in state 0: 5.5 at once (then state 2, nothing), or state 1, xor for ever.

    The guider correlates its actions in state 1 and values it above 5.5. The best product policy is still
    uniform there, worth 0.9 * 5.
    """
    P, R = np.zeros((3, 2, 2, 3)), np.zeros((3, 2, 2))
    R[0, 0], R[1] = 5.5, GAMES["xor"]
    P[0, 0, :, 2] = P[0, 1, :, 1] = P[1, :, :, 1] = P[2, :, :, 2] = 1
    pi, eta = [np.full((3, 2), -np.log(2.0))] * 2, 0.9
    path = list(exact.iterate(pi, P, R, 0.9, eta, 2, backtracking=False))

    t = np.exp(2 * eta * GAMES["xor"])
    mu_hat = t / t.sum()  # in state 1, after two guider updates
    p = np.linspace(0.01, 0.99, 99)
    row = np.stack([p, 1 - p], 1)
    candidates = row[:, None, :, None] * row[None, :, None, :]  # (99, 99, 2, 2)
    kls = (candidates * np.log(candidates / mu_hat)).sum((2, 3))
    assert np.unravel_index(kls.argmin(), kls.shape) == (49, 49)  # the uniform policy is the global minimiser
    np.testing.assert_allclose([np.exp(x[1]) for x in path[2][0]], 0.5, atol=1e-6)

    worth = 9 * np.array([0.5, 1 / (1 + np.exp(-eta))])  # of state 1 to mu_0 and mu_1, discounted once
    go = 1 / (1 + np.exp(-eta * np.cumsum(worth - 5.5)))
    by_hand = (1 - go) * 5.5 + go * 4.5
    np.testing.assert_allclose([path[1][1][0], path[2][1][0]], by_hand, atol=1e-6)
    assert by_hand[1] - by_hand[0] < -0.15
    assert np.diff(values(pi, P, R, 0.9, eta, 30), axis=0).min() > -1e-10


def test_edge_aliased_states_get_worse_at_large_eta_only():
    """The weighted KL is minimised under the visits of mu_k; where eta moves pi far, its visits differ."""
    obs = np.array([0, 0])
    P, R, pi = draw(26, 2, (3, 3))
    pi = [p[obs] for p in pi]
    for eta, low, high in [(0.1, -1e-10, np.inf), (10.0, -np.inf, -5)]:
        J = values(pi, P, R, 0.9, eta, 25, obs=obs).mean(1)
        assert low < np.diff(J).min() < high
        assert np.diff(values(pi, P, R, 0.9, eta, 25), axis=0).min() > -1e-10  # the states told apart


def test_edge_two_directions_agree_to_first_order_in_eta():
    P, R, pi = draw(7, 3, (2, 3))

    def difference(eta):
        (_, _), (one, _) = exact.iterate(pi, P, R, 0.9, eta, 1, "learner_first")
        (_, _), (two, _) = exact.iterate(pi, P, R, 0.9, eta, 1, "guider_first")
        return max(np.abs(np.exp(a) - np.exp(b)).max() for a, b in zip(one, two, strict=True))

    for eta in (0.02, 0.01, 0.005):
        assert difference(eta) > 1e-8
        assert difference(eta) / difference(eta / 2) == pytest.approx(4, rel=0.1)


# --- Corollary 4.2: the learner update is the sequential, agent-by-agent one --------------------------------


@pytest.mark.parametrize("sizes", [(3, 3), (2, 3, 2)], ids=str)
def test_corollary_fixed_point_is_every_agents_best_answer_to_the_new_others(sizes):
    P, R, pi = draw(8, 3, sizes)
    Q, eta = brute_values(exact.joint(pi), P, R, 0.9)[1], 1.0
    (_, _), (new, _) = exact.iterate(pi, P, R, 0.9, eta, 1)
    for i in range(len(sizes)):
        best = softmax(pi[i] + eta * brute_expect(Q, new, i))
        np.testing.assert_allclose(np.exp(new[i]), np.exp(best), atol=1e-10)


@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_corollary_first_sweep_is_the_argmax_of_the_sequential_objective(eta):
    sizes, S = (2, 3, 2), 2
    P, R, pi = draw(9, S, sizes)
    Q = brute_values(exact.joint(pi), P, R, 0.9)[1]
    mu_hat = exact.guider_update(exact.joint(pi), Q, eta)
    new = exact.project_learner_first(pi, mu_hat, np.arange(S), np.ones(S), sweeps=1)
    for j, size in enumerate(sizes):
        # E_{a^1:j-1 ~ new}[A^j(s, a^1:j-1, a^j)], the later agents still at pi_k
        advantage = brute_expect(Q, [*new[: j + 1], *pi[j + 1 :]], j)  # (S, A_j)
        advantage -= (np.exp(pi[j]) * advantage).sum(1, keepdims=True)
        steps = 2000 if size == 2 else 200
        grid = [p for p in itertools.product(range(1, steps), repeat=size - 1) if sum(p) < steps]
        grid = np.array(grid) / steps
        grid = np.concatenate([grid, 1 - grid.sum(1, keepdims=True)], 1)  # the whole simplex, (points, A_j)
        for s in range(S):
            points = np.concatenate([grid, np.exp(new[j][s : s + 1])])
            *scores, score = points @ advantage[s] - (points * (np.log(points) - pi[j][s])).sum(-1) / eta
            assert score >= max(scores) - 1e-12
            np.testing.assert_allclose(grid[np.argmax(scores)], points[-1], atol=1.5 / steps)


# --- the commands -------------------------------------------------------------------------------------------


def test_the_imitation_gap_is_what_the_tutorial_says(capsys):
    np.testing.assert_array_equal(gap.SUM10, GAMES["sum10"])
    gap.main()
    table = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    rows = {(backtracking, int(k)): np.array(x, float) for backtracking, k, *x in table}
    assert rows.keys() == set(itertools.product(("no", "yes"), (1, 10, 30, 100)))
    assert rows["no", 30].tolist() == [1, 1, 1, 0.10, 0.19, 0.11]
    assert (rows["no", 100][3:] < 0.2).all() and (rows["yes", 100] == 1).all()
    assert rows["yes", 30][3:].tolist() == [0.99, 1.00, 0.78]
    # The same path, by the general code
    P, R = exact.copies(GAMES["sum10"])
    pi = exact.random_policy(np.random.default_rng(0), 1, R.shape[1:])
    for backtracking in (False, True):
        J = values(pi, P, R, 0.0, 1.0, 30, direction="guider_first", backtracking=backtracking)
        np.testing.assert_allclose(gap.returns(0, backtracking, 30)[:, 1], J[1:, 0], atol=1e-12)


@pytest.mark.slow
def test_the_kl_table_and_picture_regenerate(tmp_path, monkeypatch):
    path = Path(kl_direction.__file__).with_suffix(".csv")
    committed = list(csv.DictReader(path.read_text().splitlines()))
    monkeypatch.setattr(kl_direction, "__file__", str(tmp_path / "kl_direction.py"))
    kl_direction.main()
    assert (tmp_path / "kl_direction.png").stat().st_size > 10_000
    again = list(csv.DictReader((tmp_path / "kl_direction.csv").read_text().splitlines()))
    for a, b in zip(committed, again, strict=True):
        for key, error in (("worst_change", 1e-6), ("share_at_optimum", 0.03)):
            assert float(a.pop(key)) == pytest.approx(float(b.pop(key)), abs=error)
        assert a == b
