"""magpo.py, checked against plain Python, brute force and exact tables. Read it beside the code.

    Who sees what    shapes; learners are decentralized; the guider is causal; memory; forbidden actions
    The equations    GAE, Eq. 9, Eq. 10, step 4, each against a few lines of plain Python
    The theorem      Theorem 4.1 in one game, by the exact tables of theory/exact.py
    Learning         the learners' exact payoff on the matrix games

`pytest test_magpo.py` runs the quick tests, `-m slow` the long ones. `-k exercise_1` runs those of exercise
1, and so on up to exercise_5, which needs exercise 2, too. `-k exercise_learning` runs the whole algorithm.
The maintainers' tests are in tests/.
"""

import itertools
import math
import random

import numpy as np
import pytest
import torch

import envs
import magpo
from theory import exact

torch.set_num_threads(1)


def networks(num_agents=4, obs_dim=6, action_dim=5, continuous=False, recurrent=False, state_dim=0):
    """A guider and learners in float64 whose outputs are far from uniform, so that every dependence shows."""
    torch.manual_seed(0)
    sizes = num_agents, obs_dim, action_dim, continuous
    more = dict(hidden_dim=12, recurrent=recurrent)
    guider = magpo.Guider(*sizes, embed_dim=16, state_dim=state_dim, **more).double()
    learner = magpo.Learner(*sizes, **more).double()
    for layer in (guider.own.policy_head, guider.correction_head, guider.action_token, learner.policy_head):
        torch.nn.init.normal_(layer.weight, std=0.5)
    for network in (guider, guider.own, learner):
        torch.nn.init.normal_(network.obs_encoder.agent_id)
    return guider, learner


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_close(x, y):
    torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


# --- Who sees what ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("lead", [(), (7,), (3, 7)])
def test_shapes(lead, continuous):
    guider, learner = networks(continuous=continuous)
    obs = randn(*lead, 4, 6)
    actions, logprobs, values = guider.act(obs)
    assert actions.shape == ((*lead, 4, 5) if continuous else (*lead, 4))
    assert logprobs.shape == values.shape == (*lead, 4)
    mu, values = guider(obs, actions)
    pi = learner(obs)
    kl = magpo.kl_divergence(mu, pi)
    for x in (mu.log_prob(actions), pi.log_prob(actions), mu.entropy(), kl, values):
        assert x.shape == (*lead, 4)
    assert (kl > 0).all()


def test_learners_are_decentralized():
    """Agent i's policy hangs on its own observation and on its own past, and on nothing else."""
    _, learner = networks(recurrent=True)
    obs = randn(3, 9, 4, 6).requires_grad_()  # three steps of nine copies
    hidden, starts = randn(9, 4, 3, 12).requires_grad_(), torch.zeros(3, 9, dtype=torch.bool)
    logits = learner(obs, memory=(hidden, starts)).logits
    for i in range(4):
        others = [j for j in range(4) if j != i]
        of_obs, of_past = torch.autograd.grad(logits[-1, :, i, 0].sum(), (obs, hidden), retain_graph=True)
        for of_agent in (of_obs.movedim(2, 0), of_past.movedim(1, 0)):
            assert (of_agent[others] == 0).all() and (of_agent[i] != 0).any()


def test_learners_know_who_they_are():
    _, learner = networks()
    logits = learner(torch.ones(4, 6, dtype=torch.float64)).logits
    assert (logits[0] - logits[1:]).abs().amax(-1).min() > 1e-3


def test_exercise_2_guider_sees_every_observation():
    guider, _ = networks()
    obs, actions = randn(9, 4, 6).requires_grad_(), torch.zeros(9, 4, dtype=torch.long)
    mu, values = guider(obs, actions)
    for output in (mu.logits[:, 0, 0], values[:, 0]):
        (gradient,) = torch.autograd.grad(output.sum(), obs, retain_graph=True)
        assert (gradient.abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize("continuous", [False, True])
def test_exercise_2_guider_is_causal(continuous):
    """Agent j's policy hangs on the actions of agents 1..j-1, and on no other."""
    guider, _ = networks(continuous=continuous)
    obs = randn(9, 4, 6)
    actions = torch.rand(9, 4, 5, dtype=torch.float64) if continuous else torch.randint(5, (9, 4))

    def outputs(actions):
        mu, _ = guider(obs, actions)
        return mu.base_dist.loc if continuous else mu.logits

    for j in range(4):
        changed = actions.clone()
        changed[:, j] = changed[:, j] + 0.5 if continuous else (changed[:, j] + 1) % 5
        moved = (outputs(changed) - outputs(actions)).abs().amax((0, 2))
        assert (moved[: j + 1] == 0).all(), f"agent {j + 1}'s action reaches itself or an agent before it"
        assert (moved[j + 1 :] > 1e-6).all(), f"agent {j + 1}'s action does not reach all agents after it"


@pytest.mark.parametrize("continuous", [False, True])
def test_exercise_2_sampled_logprobs_equal_the_parallel_pass(continuous):
    """With all optional inputs. So mu/mu_old is 1 until the first step: the ratio of an unchanged guider.

    The official code's shuffled order of agents breaks this.
    """
    guider, _ = networks(continuous=continuous, recurrent=True, state_dim=3)
    obs, mask = randn(50, 4, 6), torch.rand(50, 4, 5) < 0.7
    mask[..., 2] = True
    inputs = dict(state=randn(50, 3), memory=(randn(50, 4, 3, 12), torch.rand(50) < 0.5))
    inputs |= {} if continuous else dict(action_mask=mask)
    actions, logprobs, values = guider.act(obs, **inputs)
    mu, parallel_values = guider(obs, actions, **inputs)
    assert_close(mu.log_prob(actions), logprobs)
    assert_close(parallel_values, values)


def test_exercise_2_act_samples_from_its_own_probabilities():
    guider, _ = networks(num_agents=2, action_dim=3)
    obs = randn(1, 2, 6).expand(40_000, -1, -1)
    actions, _, _ = guider.act(obs)
    for joint in itertools.product(range(3), repeat=2):
        joint = torch.tensor([joint])
        expected = guider(obs[:1], joint)[0].log_prob(joint).sum().exp().item()
        seen = (actions == joint).all(-1).double().mean().item()
        assert abs(seen - expected) < 5 * math.sqrt(expected * (1 - expected) / len(obs)) + 1e-9


def test_exercise_2_forbidden_actions_are_never_taken():
    guider, learner = networks()
    obs, mask = randn(500, 4, 6), torch.rand(500, 4, 5) < 0.5
    mask[..., 2] = True
    actions, _, _ = guider.act(obs, mask)
    assert mask.gather(-1, actions.unsqueeze(-1)).all()
    free, masked = (guider(obs, actions, m)[0].probs for m in (None, mask))
    free_pi, masked_pi = (learner(obs, m).probs for m in (None, mask))
    for before, after in ((free, masked), (free_pi, masked_pi)):  # allowed actions keep their ratios
        assert_close(after, before * mask / (before * mask).sum(-1, keepdim=True))


def test_memory_over_a_rollout_equals_step_by_step():
    """The update's one pass over sequences, with starts of episodes inside, is what acting was."""
    guider, learner = networks(recurrent=True)
    T, E = 7, 5
    obs, actions, starts = randn(T, E, 4, 6), torch.randint(5, (T, E, 4)), torch.rand(T, E) < 0.3
    hidden = randn(E, 4, 3, 12)
    pi = learner(obs, memory=(hidden, starts))
    mu, values = guider(obs, actions, memory=(hidden, starts))
    for t in range(T):
        memory = hidden, starts[t]
        pi_t = learner(obs[t], memory=memory)
        mu_t, values_t = guider(obs[t], actions[t], memory=memory)
        assert_close(pi_t.logits, pi.logits[t])
        assert_close(mu_t.logits, mu.logits[t])
        assert_close(values_t, values[t])
        hidden = magpo.next_hidden(guider, learner, obs[t], memory)


def test_memory_lasts_within_an_episode_and_ends_with_it():
    _, learner = networks(recurrent=True)
    obs, hidden = randn(6, 1, 4, 6), randn(1, 4, 3, 12)
    starts = torch.tensor([False, False, False, True, False, False]).unsqueeze(1)
    logits = learner(obs, memory=(hidden, starts)).logits
    for changed_step, reached in ((1, [1, 2]), (3, [3, 4, 5])):
        changed = obs.clone()
        changed[changed_step] += 1
        moved = (learner(changed, memory=(hidden, starts)).logits - logits).abs().amax((1, 2, 3))
        assert (moved > 0).nonzero().flatten().tolist() == reached


# --- The equations ------------------------------------------------------------------------------------------


def test_exercise_1_gae_against_brute_force():
    """Every advantage as a sum of its own over the rest of the episode."""
    rng = np.random.default_rng(0)
    T, E, N, gamma, gae_lambda = 12, 40, 2, 0.9, 0.8
    rewards = rng.normal(size=(T, E))
    values, next_values = rng.normal(size=(2, T, E, N))
    kind = rng.choice(3, size=(T, E), p=[0.7, 0.15, 0.15])  # goes on, terminated, timed out
    for t, e in itertools.product(range(T - 1), range(E)):
        if kind[t, e] == 0:
            next_values[t, e] = values[t + 1, e]
    expected = np.zeros((T, E, N))
    for t, e, n in itertools.product(range(T), range(E), range(N)):
        weight = 1.0
        for k in range(t, T):
            bootstrap = 0.0 if kind[k, e] == 1 else next_values[k, e, n]
            expected[t, e, n] += weight * (rewards[k, e] + gamma * bootstrap - values[k, e, n])
            weight *= gamma * gae_lambda
            if kind[k, e] != 0:
                break
    given = [torch.as_tensor(x) for x in (rewards[..., None], values, next_values)]
    ends = torch.as_tensor(kind)[..., None]
    advantages, returns = magpo.compute_gae(*given, ends == 1, ends == 2, gamma, gae_lambda)
    # Not to the last bit: a float times a bool tensor is float32, and no mistake
    wrong = np.abs(advantages.numpy() - expected) > 1e-6
    for k, name in enumerate(("go on", "terminate", "time out")):
        assert not wrong[kind == k].any(), f"{wrong[kind == k].mean():.0%} of the steps that {name} are wrong"
    np.testing.assert_allclose(returns, expected + values, atol=1e-6)


def clip(x, low, high):
    return max(low, min(x, high))


@pytest.mark.parametrize("delta", [1.3, math.inf])  # inf: no inner clip, no mask, and Eq. 9 is PPO
def test_exercise_3_guider_loss_is_eq_9_sample_by_sample(delta):
    rng, eps, shape = random.Random(0), 0.2, (4, 5, 3)
    samples = [
        (rng.uniform(0.2, 0.6), rng.uniform(0.2, 0.6), rng.uniform(0.2, 0.6), rng.gauss(0, 1), rng.random())
        for _ in range(math.prod(shape))
    ]
    losses, masked, clipped = [], [], []
    for mu, pi, mu_old, A, kl in samples:
        r = mu / mu_old
        rho = clip(clip(mu / pi, 1 / delta, delta) * pi / mu_old, 1 - eps, 1 + eps)
        m = not 1 / delta <= mu / pi <= delta
        losses.append(-min(r * A, rho * A) + m * kl)
        masked.append(m)
        clipped.append(not 1 - eps <= r <= 1 + eps)
    mu, pi, mu_old, A, kl = torch.tensor(samples, dtype=torch.float64).T.reshape(5, *shape)
    seen = magpo.guider_loss(mu.log(), pi.log(), mu_old.log(), A, kl, eps, delta)
    expected = [sum(x) / len(x) for x in (losses, masked, clipped)]
    assert [x.item() for x in seen] == pytest.approx(expected, abs=1e-6)  # the fractions may be float32


# mu_old = 0.25, eps = 0.2, delta = 1.5. Columns: mu, pi, A, whether A still pushes mu, the mask m
PUSHES = {
    "on the learner, good action": (0.25, 0.25, 1, True, 0),
    "within both clips": (0.28, 0.25, 1, True, 0),
    "too far above the learner, good action: no further": (0.29, 0.18, 1, False, 1),
    "too far above the learner, bad action: may come back": (0.29, 0.18, -1, True, 1),
    "too far below the learner, bad action: no further": (0.20, 0.40, -1, False, 1),
    "too far below the learner, good action: may come back": (0.20, 0.40, 1, True, 1),
    "beyond the outer clip, good action": (0.40, 0.40, 1, False, 0),
    "beyond the outer clip, bad action": (0.15, 0.15, -1, False, 0),
    "beyond the outer clip on the wrong side": (0.40, 0.40, -1, True, 0),
}


@pytest.mark.parametrize("case", PUSHES)
def test_exercise_3_where_the_push_ends(case):
    mu, pi, advantage, pushes, mask = PUSHES[case]
    log_mu, log_pi, log_mu_old = (torch.tensor(x, dtype=torch.float64).log() for x in (mu, pi, 0.25))
    kl, advantage = torch.tensor([0.125, advantage], dtype=torch.float64)
    for x in (log_mu, log_pi, kl):
        x.requires_grad_()
    loss, _, _ = magpo.guider_loss(log_mu, log_pi, log_mu_old, advantage, kl, clip_coef=0.2, delta=1.5)
    loss.backward()
    assert log_mu.grad.item() == pytest.approx(-pushes * advantage.item() * mu / 0.25)
    assert kl.grad.item() == mask, "the KL pulls mu back where it is outside the bound, and only there"
    assert log_pi.grad is None, "pi is a constant in Eq. 9"


@pytest.mark.parametrize("lam", [0.0, 1.7])
def test_exercise_4_learner_loss_is_eq_10_sample_by_sample(lam):
    rng, eps, shape = random.Random(0), 0.2, (4, 5, 3)
    samples = [
        (rng.uniform(0.2, 0.6), rng.uniform(0.2, 0.6), rng.gauss(0, 1), rng.random())
        for _ in range(math.prod(shape))
    ]
    losses = []
    for pi, mu_old, A, kl in samples:
        r_pi = pi / mu_old
        losses.append(kl - lam * min(r_pi * A, clip(r_pi, 1 - eps, 1 + eps) * A))
    pi, mu_old, A, kl = torch.tensor(samples, dtype=torch.float64).T.reshape(4, *shape)
    loss = magpo.learner_loss(pi.log(), mu_old.log(), A, kl, eps, lam)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-12)


@pytest.mark.parametrize("continuous", [False, True])
def test_each_loss_moves_only_its_own_network(continuous):
    guider, learner = networks(continuous=continuous)
    obs = randn(30, 4, 6)
    actions, old, _ = guider.act(obs)
    advantages = torch.randn_like(old)

    def moved(loss):
        loss.backward()
        out = [any(p.grad is not None for p in network.parameters()) for network in (guider, learner)]
        guider.zero_grad()
        learner.zero_grad()
        return out

    mu, pi = guider(obs, actions)[0], learner(obs)
    kl_mu, kl_pi = (magpo.kl_divergence(*x) for x in ((mu, magpo.constant(pi)), (magpo.constant(mu), pi)))
    assert_close(kl_mu, kl_pi)  # one number, two gradients
    log_mu, log_pi = mu.log_prob(actions), pi.log_prob(actions)
    assert moved(magpo.guider_loss(log_mu, log_pi, old, advantages, kl_mu, 0.2, 1.1)[0]) == [True, False]
    assert moved(magpo.learner_loss(log_pi, old, advantages, kl_pi, 0.2, 1.0)) == [False, True]


@pytest.mark.parametrize("continuous", [False, True])
def test_exercise_5_backtracking_makes_the_guider_the_learner_to_the_last_bit(continuous):
    """And leaves its critic as it was, and the learners."""
    guider, learner = networks(continuous=continuous)
    for head in (guider.own.policy_head, guider.correction_head, learner.policy_head):
        torch.nn.init.normal_(head.bias)
    kept = [module.state_dict() for module in (guider.encoder, guider.value_head, learner)]
    kept = [{name: x.clone() for name, x in state.items()} for state in kept]
    magpo.backtrack(guider, learner)
    for state, module in zip(kept, (guider.encoder, guider.value_head, learner), strict=True):
        assert all(torch.equal(x, state[name]) for name, x in module.state_dict().items())
    obs = randn(20, 4, 6)
    actions = torch.rand(20, 4, 5, dtype=torch.float64) if continuous else torch.randint(5, (20, 4))
    mu, pi = guider(obs, actions)[0], learner(obs)
    assert torch.equal(mu.log_prob(actions), pi.log_prob(actions)) and torch.equal(mu.mode, pi.mode)
    assert not any(p.requires_grad for p in guider.own.parameters()), "the correction alone goes on"
    assert not {id(p) for p in guider.parameters()} & {id(p) for p in learner.parameters()}, (
        "a copy, not shared"
    )


# --- The theorem --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [1, 10])
def test_theorem_4_1_in_one_game(eta):
    """Figure 1's game, smaller: three agents name 0..3, and the sum must be 5. Exact tables, no sampling.

    The proof's inequality: eta (E_new[Q] - E_old[Q]) >= KL(new || old) >= 0, in every iteration.
    """
    P, R = exact.copies(envs.sum_game(num_agents=3, num_actions=4, total=5))
    pi = exact.random_policy(np.random.default_rng(0), 1, (4, 4, 4))
    for _ in range(30):
        mu = exact.joint(pi)  # steps 4 and 1: the guider is the learners, and its Q is known
        q = exact.exact_q(mu, P, R, gamma=0.0)
        mu_hat = exact.guider_update(mu, q, eta)  # step 2
        pi = exact.project_learner_first(pi, mu_hat, obs=np.zeros(1), weights=np.ones(1))  # step 3
        new = exact.joint(pi)
        gain = ((np.exp(new) - np.exp(mu)) * q).sum()
        kl = (np.exp(new) * (new - mu)).sum()
        assert eta * gain >= kl - 1e-12 and kl > -1e-12
    assert (np.exp(new) * R).sum() > 0.99


# --- Learning -----------------------------------------------------------------------------------------------


def product_policy(learner):
    """Action probabilities (N, A) of the learners in a matrix game."""
    num_agents = len(learner.obs_encoder.agent_id)
    return learner(torch.ones(num_agents, 1)).probs.detach().double()


def expected_payoff(payoff, probs):
    """Exact mean payoff of independent agents: payoff (A, ..., A), probs (N, A)."""
    for p in reversed(probs):
        payoff = payoff @ p
    return payoff.item()


def is_equilibrium(payoff, joint):
    """Does no agent gain by changing its action alone?"""
    others = [tuple(slice(None) if k == i else a for k, a in enumerate(joint)) for i in range(len(joint))]
    return all(payoff[joint] >= payoff[line].max() for line in others)


TRAINED_GAMES = [
    pytest.param(game, seed, marks=[] if (game, seed) == ("sum10", 1) else pytest.mark.slow)
    for game in ("penalty", "xor", "sum10")
    for seed in (1, 2, 3, 4, 5)
]


def trained(game, seed, tmp_path):
    """Payoff table of a game; the learners' exact payoff at the start and the end; their likeliest action."""
    args = magpo.Args(env=f"matrix_{game}", seed=seed, runs_dir=str(tmp_path), eval_episodes=8, eval_every=99)
    env = envs.make(args.env, 1)
    payoff = env.payoff.double()
    torch.manual_seed(args.seed)
    start = expected_payoff(payoff, product_policy(magpo.build(args, env)[1]))
    _, _, learner = magpo.load(magpo.train(args))
    probs = product_policy(learner)
    return payoff, start, expected_payoff(payoff, probs), tuple(probs.argmax(-1).tolist())


@pytest.mark.parametrize("game, seed", TRAINED_GAMES)
def test_exercise_learning_improvement_on_matrix_games(game, seed, tmp_path):
    """Exact payoff of the learners: above its start, and that of an optimum or a pure equilibrium."""
    payoff, start, end, joint = trained(game, seed, tmp_path)
    assert end > start and is_equilibrium(payoff, joint)
    assert end > payoff[joint].item() - 0.02 * (payoff.max() - payoff.min()).item()
    if game in ("xor", "sum10"):
        assert payoff[joint] == payoff.max()


@pytest.mark.slow
def test_exercise_learning_climbs(tmp_path):
    """Every seed of climbing rises; four of five end in an equilibrium, and one may stop beside it."""
    ends = [trained("climbing", seed, tmp_path) for seed in (1, 2, 3, 4, 5)]
    assert all(end > start for _, start, end, _ in ends)
    assert (
        sum(is_equilibrium(payoff, joint) and end > payoff[joint] - 0.8 for payoff, _, end, joint in ends) > 3
    )


@pytest.mark.slow
def test_exercise_learning_reset_finds_sum10(tmp_path):
    """Two seeds of three, at least."""
    options = dict(backtracking="reset", ent_coef=0.01, eval_episodes=8, eval_every=99)
    payoff, ends = envs.make("matrix_sum10", 1).payoff.double(), []
    for seed in (1, 2, 3):
        args = magpo.Args(env="matrix_sum10", seed=seed, runs_dir=str(tmp_path), **options)
        _, _, learner = magpo.load(magpo.train(args))
        ends.append(expected_payoff(payoff, product_policy(learner)))
    assert sum(end > 0.9 for end in ends) > 1
