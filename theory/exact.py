"""MAGPO's theory (Section 4 of arXiv 2507.18059) in exact tables: four steps, no sampling, no networks.

Legend:  S states, N agents, A_i actions of agent i.
    pi       a product policy: list of N arrays (S, A_i) of log-probabilities, the learners
    mu       a joint policy: one array (S, A_1, ..., A_N) of log-probabilities, the guider
    P, R     a Markov game: transition probabilities (S, A_1, ..., A_N, S), team reward (S, A_1, ..., A_N)
    obs      (S,) labels: learners cannot tell states with equal labels apart, and share a row among them;
             the guider sees the state

Policies are log-probabilities everywhere: with eta * Q near -10,000 a probability underflows to 0. An action
at exactly 0 could never come back, although Eq. 2 brings it back once its Q rises.
"""

import numpy as np


def normalize(log_p):
    """Make every state's table sum to one: (S, ...) -> (S, ...)."""
    return log_p - np.logaddexp.reduce(log_p, axis=tuple(range(1, log_p.ndim)), keepdims=True)


def joint(pi):
    """pi(a|s) = prod_i pi^i(a^i|s): N x (S, A_i) -> (S, A_1, ..., A_N).

    So backtracking, mu := pi, is always possible: a product policy is a joint policy.
    """
    log_p = 0.0
    for i, pi_i in enumerate(pi):
        others = [1 + j for j in range(len(pi)) if j != i]
        log_p = log_p + np.expand_dims(pi_i, others)
    return log_p


def expect_others(x, pi, i):
    """E_{a^-i ~ pi^-i(.|s)}[x(s, a)]: (S, A_1, ..., A_N) -> (S, A_i)."""
    others = []
    for j, pi_j in enumerate(pi):
        if j != i:
            others += [np.exp(pi_j), [0, j + 1]]
    return np.einsum(x, list(range(x.ndim)), *others, [0, i + 1])


# --- the value of a policy, exactly: the theorem speaks of Q itself, not of an estimate ---------------------


def chain(mu, P):
    """State-to-state transition matrix under mu: (S, S)."""
    S = len(mu)
    return (np.exp(mu).reshape(S, 1, -1) @ P.reshape(S, -1, S))[:, 0]


def exact_v(mu, P, R, gamma):
    """V_mu = (I - gamma P_mu)^-1 R_mu: (S,)."""
    R_mu = (np.exp(mu) * R).reshape(len(mu), -1).sum(1)
    return np.linalg.solve(np.eye(len(mu)) - gamma * chain(mu, P), R_mu)


def exact_q(mu, P, R, gamma):
    """Q_mu(s, a) = R(s, a) + gamma E_{s'}[V_mu(s')]: (S, A_1, ..., A_N)."""
    return R + gamma * P @ exact_v(mu, P, R, gamma)


def visitation(mu, P, gamma):
    """Discounted share of time in each state when every state is as likely to be the first: (S,)."""
    S = len(mu)
    return (1 - gamma) * np.linalg.solve(np.eye(S) - gamma * chain(mu, P).T, np.full(S, 1 / S))


# --- the four steps -----------------------------------------------------------------------------------------


def guider_update(mu, q, eta):
    """Eq. 2, argmax_mu' eta <q, mu'> - KL(mu' || mu): mu' ~ mu exp(eta q), (S, A_1, ..., A_N)."""
    return normalize(mu + eta * q)


def project_learner_first(pi, mu_hat, obs, weights, sweeps=1000, tolerance=1e-13):
    """Learner update, argmin_pi sum_s weights(s) KL(pi(.|s) || mu_hat(.|s)).

    Block-coordinate descent from pi: with the other agents fixed, agent i's exact minimiser is
    pi^i ~ exp(E_{pi^-i}[log mu_hat]), where the mean is also over the states that it cannot tell apart. No
    step raises the KL. So Theorem 4.1 holds after any number of sweeps: it rests on the start at pi_k. The
    first sweep is the sequential update of Corollary 4.2.
    """
    pi = list(pi)
    share = weights * (obs[:, None] == obs)  # (S, S)
    share = share / share.sum(1, keepdims=True)
    for _ in range(sweeps):
        before = list(pi)
        for i in range(len(pi)):
            pi[i] = normalize(share @ expect_others(mu_hat, pi, i))
        change = max(np.abs(np.exp(new) - np.exp(old)).max() for new, old in zip(pi, before, strict=True))
        if change < tolerance:
            break
    return pi


def project_guider_first(mu_hat, obs, weights):
    """The official code's direction: argmin_pi sum_s weights(s) KL(mu_hat(.|s) || pi(.|s)), the marginals."""
    N = mu_hat.ndim - 1
    same = (obs[:, None] == obs)[:, :, None]  # (S, S, 1)
    pi = []
    for i in range(N):
        others = tuple(1 + j for j in range(N) if j != i)
        marginal = np.logaddexp.reduce(mu_hat, axis=others)  # (S, A_i)
        weighted = marginal + np.log(weights)[:, None]
        pi.append(normalize(np.logaddexp.reduce(np.where(same, weighted, -np.inf), axis=1)))
    return pi


def iterate(pi, P, R, gamma, eta, iterations, direction="learner_first", backtracking=True, obs=None):
    """Yield (pi_k, V of pi_k (S,)) for k = 0..iterations.

    Without backtracking the guider goes on from mu_hat_k with its own Q, as in CTDS, and the learners follow
    as they can. Where obs is equal, the rows of the first pi must be equal.
    """
    obs = np.arange(len(R)) if obs is None else obs
    mu = joint(pi)
    yield pi, exact_v(mu, P, R, gamma)
    for _ in range(iterations):
        mu_hat = guider_update(mu, exact_q(mu, P, R, gamma), eta)
        weights = visitation(mu, P, gamma)  # the guider collects the data: its visits weigh the KL
        if direction == "learner_first":
            pi = project_learner_first(pi, mu_hat, obs, weights)
        elif direction == "guider_first":
            pi = project_guider_first(mu_hat, obs, weights)
        else:
            raise ValueError(f"direction must be learner_first or guider_first, not {direction!r}")
        mu = joint(pi) if backtracking else mu_hat
        yield pi, exact_v(joint(pi), P, R, gamma)


# --- games and starting points ------------------------------------------------------------------------------


def copies(payoff, S=1):
    """S copies of a single-state game that never meet, as P and R: S starts at once, with gamma = 0."""
    payoff = np.asarray(payoff, dtype=float)
    P = np.broadcast_to(np.eye(S).reshape(S, *[1] * payoff.ndim, S), (S, *payoff.shape, S))
    return P, np.broadcast_to(payoff, (S, *payoff.shape))


def random_game(rng, sizes):
    """Standard normal payoffs: (A_1, ..., A_N)."""
    return rng.normal(size=sizes)


def random_markov_game(rng, states, sizes):
    """P with rows uniform on the simplex and standard normal R."""
    return rng.dirichlet(np.ones(states), size=(states, *sizes)), rng.normal(size=(states, *sizes))


def random_policy(rng, states, sizes):
    """Every row uniform on the simplex: list of N arrays (S, A_i) of log-probabilities."""
    return [np.log(rng.dirichlet(np.ones(size), size=states)) for size in sizes]
