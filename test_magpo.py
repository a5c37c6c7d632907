"""Tests: shapes, leaks, equations, environments, learning, command line. `pytest` runs the quick ones, `pytest -m slow` the others.

Wherever it can be had the oracle is independent of the code: mpe2 itself, brute force, hand-computed points, exact
expectations over all joint actions.
"""

import contextlib
import csv
import importlib.util
import itertools
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import urllib.parse
from collections import Counter
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from mpe2 import simple_spread_v3
from pettingzoo import ParallelEnv
from PIL import Image, ImageOps, ImageSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import envs
import magpo
from figures import details, kit, make, speed, theory, watch

HERE = Path(__file__).parent
torch.set_num_threads(1)


def networks(
    num_agents=4, obs_dim=6, action_dim=5, continuous=False, seed=0, dtype=torch.float64, recurrent=False, state_dim=0
):
    """A guider and a learner whose outputs are far from uniform, so that every dependence shows."""
    torch.manual_seed(seed)
    guider = magpo.Guider(num_agents, obs_dim, action_dim, continuous, 16, recurrent, state_dim).to(dtype)
    learner = magpo.Learner(num_agents, obs_dim, action_dim, continuous, 16, recurrent).to(dtype)
    for network in (guider, learner):
        torch.nn.init.normal_(network.policy_head.weight, std=0.5)
        torch.nn.init.normal_(network.features.agent_id)
    return guider, learner


# ----------------------------------------------------------------------------------------------------------------------
# Networks: shapes, and who sees what
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("lead", [(), (7,), (3, 7)])
def test_shapes(lead, continuous):
    guider, learner = networks(continuous=continuous)
    obs = torch.randn(*lead, 4, 6, dtype=torch.float64)
    actions, logprobs, values = guider.act(obs)
    assert actions.shape == ((*lead, 4, 5) if continuous else (*lead, 4))
    assert logprobs.shape == values.shape == (*lead, 4)
    mu, values = guider(obs, actions)
    pi = learner(obs)
    kl = magpo.kl_divergence(mu, pi)
    for tensor in (mu.log_prob(actions), pi.log_prob(actions), mu.entropy(), kl, values):
        assert tensor.shape == (*lead, 4)
    assert (kl > 0).all()


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_exercise_2_sampled_logprobs_equal_the_parallel_pass(continuous, residual):
    guider, learner = networks(continuous=continuous)
    obs = torch.randn(50, 4, 6, dtype=torch.float64)
    base = learner.params(obs) if residual else None
    actions, logprobs, values = guider.act(obs, base)
    mu, parallel_values = guider(obs, actions, base)
    torch.testing.assert_close(mu.log_prob(actions), logprobs, rtol=0, atol=1e-12)
    torch.testing.assert_close(parallel_values, values, rtol=0, atol=1e-12)


def test_exercise_2_act_samples_from_its_own_probabilities():
    guider = networks(num_agents=2, action_dim=3)[0].requires_grad_(False)
    obs = torch.randn(1, 2, 6, dtype=torch.float64).expand(40_000, -1, -1)
    torch.manual_seed(0)
    actions, _, _ = guider.act(obs)
    for joint in itertools.product(range(3), repeat=2):
        expected = guider(obs[:1], torch.tensor([joint]))[0].log_prob(torch.tensor([joint])).sum().exp()
        seen = (actions == torch.tensor(joint)).all(-1).double().mean()
        assert abs(seen - expected) < 5 * math.sqrt(expected * (1 - expected) / len(obs)) + 1e-9


def test_exercise_2_guider_is_causal():
    guider, _ = networks()
    obs, actions = torch.randn(9, 4, 6, dtype=torch.float64), torch.randint(5, (9, 4))
    logits = guider(obs, actions)[0].logits
    for j in range(4):
        changed = actions.clone()
        changed[:, j:] = (changed[:, j:] + 1) % 5
        moved = (guider(obs, changed)[0].logits - logits).abs().amax((0, 2))
        assert (moved[: j + 1] == 0).all() and (moved[j + 1 :] > 1e-6).all()


def test_exercise_2_guider_is_causal_by_gradient():
    guider, _ = networks(continuous=True)
    obs, actions = torch.randn(9, 4, 6, dtype=torch.float64), torch.rand(9, 4, 5, dtype=torch.float64, requires_grad=True)
    mean = guider(obs, actions)[0].base_dist.loc
    for j in range(4):
        (gradient,) = torch.autograd.grad(mean[:, j].sum(), actions, retain_graph=True)
        reached = gradient.abs().amax((0, 2))
        assert (reached[j:] == 0).all() and (reached[:j] > 1e-6).all()


def test_exercise_2_guider_sees_every_observation():
    guider, _ = networks()
    obs, actions = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True), torch.zeros(1, 4, dtype=torch.long)
    mu, values = guider(obs, actions)
    for output in (mu.logits[:, 0, 0], values[:, 0]):
        (gradient,) = torch.autograd.grad(output.sum(), obs, retain_graph=True)
        assert (gradient.abs().amax((0, 2)) > 0).all()


def test_learners_are_decentralized():
    _, learner = networks()
    obs = torch.randn(9, 4, 6, dtype=torch.float64, requires_grad=True)
    logits = learner(obs).logits
    for i in range(4):
        others = [j for j in range(4) if j != i]
        changed = obs.detach().clone()
        changed[:, others] += 1
        assert torch.equal(learner(changed).logits[:, i], logits[:, i])
        (gradient,) = torch.autograd.grad(logits[:, i].square().sum(), obs, retain_graph=True)
        assert (gradient[:, others] == 0).all() and (gradient[:, i] != 0).any()


def test_learners_know_who_they_are():
    _, learner = networks()
    logits = learner(torch.ones(4, 6, dtype=torch.float64)).logits
    assert (logits[0] - logits[1:]).abs().amax(-1).min() > 1e-3


def test_memory_over_a_rollout_equals_step_by_step():
    """One pass over sequences with episode starts inside is the same as acting step by step, for both networks."""
    guider, learner = networks(recurrent=True)
    T, B, N = 7, 5, 4
    obs, starts = torch.randn(T, B, N, 6, dtype=torch.float64), torch.rand(T, B) < 0.3
    hidden, actions = torch.randn(B, N, 16, dtype=torch.float64), torch.randint(5, (T, B, N))
    for call in (
        lambda x, a, memory: learner(x, memory=memory).logits,
        lambda x, a, memory: guider(x, a, memory=memory)[0].logits,
    ):
        unrolled, memory = [hidden, starts], [hidden, None]
        expected = call(obs, actions, unrolled)
        for t in range(T):
            memory[1] = starts[t]
            torch.testing.assert_close(call(obs[t], actions[t], memory), expected[t], rtol=0, atol=1e-12)
        torch.testing.assert_close(memory[0], unrolled[0], rtol=0, atol=1e-12)


def test_memory_ends_with_the_episode():
    _, learner = networks(recurrent=True)
    obs, hidden = torch.randn(6, 1, 4, 6, dtype=torch.float64), torch.randn(1, 4, 16, dtype=torch.float64)
    starts = torch.tensor([0, 0, 0, 1, 0, 0]).bool()[:, None]
    changed = obs.clone()
    changed[2] += 1
    logits, moved = (learner(x, memory=[hidden, starts]).logits for x in (obs, changed))
    assert torch.equal(logits[3:], moved[3:]) and not torch.equal(logits[2], moved[2])
    changed = obs.clone()
    changed[3] += 1
    assert (learner(changed, memory=[hidden, starts]).logits[5] - logits[5]).abs().max() > 1e-6  # it remembers within


def test_exercise_2_forbidden_actions_are_never_taken():
    guider, learner = networks()
    obs, mask = torch.randn(500, 4, 6, dtype=torch.float64), torch.rand(500, 4, 5) < 0.5
    mask[..., 2] = True
    actions, logprobs, _ = guider.act(obs, action_mask=mask)
    assert mask.gather(-1, actions[..., None]).all()
    mu, pi = guider(obs, actions, action_mask=mask)[0], learner(obs, mask)
    torch.testing.assert_close(mu.log_prob(actions), logprobs, rtol=0, atol=1e-12)
    for policy in (mu, pi):
        assert (policy.probs[~mask] == 0).all()
        allowed = torch.where(mask, policy.probs, 0).sum(-1)
        torch.testing.assert_close(allowed, torch.ones_like(allowed))
    kl = torch.where(mask, mu.probs * (mu.probs.clamp(min=1e-30) / pi.probs.clamp(min=1e-30)).log(), 0).sum(-1)
    torch.testing.assert_close(magpo.kl_divergence(mu, pi), kl)
    free = guider(obs, actions)[0].probs * mask
    torch.testing.assert_close(free / free.sum(-1, keepdim=True), mu.probs)  # the ratios of allowed actions do not change


def test_agents_that_left_are_not_attended_to():
    guider, _ = networks()
    obs, actions = torch.randn(9, 4, 6, dtype=torch.float64), torch.randint(5, (9, 4))
    active = torch.tensor([True, False, True, True]).expand(9, 4)
    changed = obs.clone()
    changed[:, 1] += 1
    other = actions.clone()
    other[:, 0] = (other[:, 0] + 1) % 5
    (mu, values), (moved, moved_values) = (guider(x, actions, active=active) for x in (obs, changed))
    here = [0, 2, 3]
    assert torch.equal(mu.logits[:, here], moved.logits[:, here]) and torch.equal(values[:, here], moved_values[:, here])
    assert not torch.equal(guider(obs, actions)[0].logits[:, here], mu.logits[:, here])
    assert not torch.equal(guider(obs, other, active=active)[0].logits[:, 2], mu.logits[:, 2])  # 0's action passes 1 by
    torch.manual_seed(0)
    sampled, logprobs, values = guider.act(obs, active=active)
    mu, parallel = guider(obs, sampled, active=active)
    torch.testing.assert_close(mu.log_prob(sampled), logprobs, rtol=0, atol=1e-12)
    torch.testing.assert_close(parallel, values, rtol=0, atol=1e-12)
    for key in ("logits", "probs"):
        assert getattr(guider(obs, actions, active=torch.zeros(9, 4).bool())[0], key).isfinite().all()


def test_the_global_state_reaches_the_guider_alone():
    guider, learner = networks(state_dim=3)
    obs, actions = torch.randn(9, 4, 6, dtype=torch.float64), torch.randint(5, (9, 4))
    state = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    mu, values = guider(obs, actions, state=state)
    for output in (mu.logits[:, 0, 0], values[:, 0]):
        (gradient,) = torch.autograd.grad(output.sum(), state, retain_graph=True)
        assert (gradient.abs().amax(0) > 0).all()
    with pytest.raises(TypeError):
        learner(obs, state=state)


def test_policy_of_a_continuous_action_is_the_named_gaussian():
    params = torch.tensor([[0.1, -0.2, 0.3, 0.4]], dtype=torch.float64)  # two means, two log deviations
    pi = magpo.distribution(params, continuous=True)
    x = torch.tensor([[0.7, 0.1]], dtype=torch.float64)
    expected = 0
    for value, mean, log_std in zip(x[0], params[0, :2] + 0.5, params[0, 2:] - 1):
        expected += -0.5 * ((value - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(pi.log_prob(x)[0], expected)


# ----------------------------------------------------------------------------------------------------------------------
# Equations
# ----------------------------------------------------------------------------------------------------------------------


def test_exercise_1_gae_against_brute_force():
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
    flags = torch.as_tensor(kind)[..., None]
    advantages, returns = magpo.compute_gae(
        *map(torch.as_tensor, (rewards[..., None], values, next_values)), flags == 1, flags == 2, gamma, gae_lambda
    )
    wrong = "".join(f"  {name}: {(abs(advantages.numpy() - expected)[kind == k] > 1e-6).mean():.0%}" for k, name in enumerate(
        ("steps that go on", "steps that terminate", "steps that time out")))  # fmt: skip
    # Not to the last bit: a float times a bool tensor is float32, and no mistake
    np.testing.assert_allclose(advantages, expected, atol=1e-6, err_msg=f"share that is wrong:{wrong}")
    np.testing.assert_allclose(returns, expected + values, atol=1e-6)


# mu_old = 0.25, clip 0.2, delta 1.5. Columns: mu, pi, A, the loss by hand, whether mu still feels a gradient, the mask m.
DOUBLE_CLIP = {
    "on the learner, good action": (0.25, 0.25, 1.0, -1.0, True, 0),
    "within both clips": (0.28, 0.25, 1.0, -1.12, True, 0),
    "too far above the learner, good action: no further": (0.29, 0.18, 1.0, -1.5 * 0.18 / 0.25, False, 1),
    "too far above the learner, bad action: may come back": (0.29, 0.18, -1.0, 1.16, True, 1),
    "too far below the learner, bad action: no further": (0.20, 0.40, -1.0, 0.4 / 1.5 / 0.25, False, 1),
    "too far below the learner, good action: may come back": (0.20, 0.40, 1.0, -0.8, True, 1),
    "beyond the outer clip, good action": (0.40, 0.40, 1.0, -1.2, False, 0),
    "beyond the outer clip, bad action": (0.15, 0.15, -1.0, 0.8, False, 0),
    "beyond the outer clip on the wrong side": (0.40, 0.40, -1.0, 1.6, True, 0),
}


@pytest.mark.parametrize("case", DOUBLE_CLIP)
def test_exercise_3_guider_loss_by_hand(case):
    mu, pi, advantage, expected, moves, mask = DOUBLE_CLIP[case]
    log_mu = torch.tensor([math.log(mu)], dtype=torch.float64, requires_grad=True)
    log_pi = torch.tensor([math.log(pi)], dtype=torch.float64, requires_grad=True)
    old, advantage = torch.tensor([math.log(0.25)], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    kl = torch.tensor([0.125], dtype=torch.float64, requires_grad=True)
    loss, mask_frac, _ = magpo.guider_loss(log_mu, log_pi, old, advantage, kl, clip_coef=0.2, delta=1.5)
    assert loss.item() == pytest.approx(expected + mask * 0.125, abs=1e-12)
    assert mask_frac.item() == mask
    loss.backward()
    assert kl.grad.item() == mask, "the KL pulls mu back where it is outside the bound, and only there"
    assert (abs(log_mu.grad.item()) > 0.1) == moves
    assert log_pi.grad is None


def test_exercise_3_the_tutorials_example():
    rows = re.findall(r"^\| ([+-]1) \|(.*)\|[^|]*\|$", (HERE / "TUTORIAL.md").read_text(), re.M)
    assert len(rows) == 5
    for sign, numbers in rows:
        mu, pi, ratio, gap, objective, mask, push = map(float, numbers.split("|"))
        log_mu = torch.tensor(math.log(mu), requires_grad=True)
        others = (torch.tensor(x) for x in (math.log(pi), math.log(0.25), float(sign), 0.0))
        loss, m, _ = magpo.guider_loss(log_mu, *others, 0.2, 1.5)
        loss.backward()
        shown = (mu / 0.25, mu / pi, -loss.item(), m.item(), log_mu.grad.item())
        assert shown == pytest.approx((ratio, gap, objective, mask, push), abs=0.0051)


def test_exercise_3_guider_loss_without_bound_is_ppo():
    log_mu, log_pi, old, advantages = torch.randn(4, 100, dtype=torch.float64)
    ratio = (log_mu - old).exp()
    ppo = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    loss, mask, _ = magpo.guider_loss(log_mu, log_pi, old, advantages, torch.ones(100), 0.2, math.inf)
    assert loss.item() == pytest.approx(ppo.item(), abs=1e-12) and mask == 0


@pytest.mark.parametrize(
    "pi, advantage, surrogate", [(0.28, 1, 1.12), (0.4, 1, 1.2), (0.4, -1, -1.6), (0.1, -1, -0.8), (0.1, 1, 0.4)]
)
def test_exercise_4_learner_loss_by_hand(pi, advantage, surrogate):
    log_pi, old = torch.tensor([math.log(pi)]), torch.tensor([math.log(0.25)])
    loss = magpo.learner_loss(log_pi, old, torch.tensor([float(advantage)]), torch.tensor([0.3]), clip_coef=0.2, lam=2.0)
    assert loss.item() == pytest.approx(0.3 - 2 * surrogate, abs=1e-6)


def clip(x, low, high):
    return max(low, min(x, high))


def test_exercise_3_guider_loss_is_eq_9_sample_by_sample():
    rng, eps, delta, (T, E, N) = random.Random(0), 0.2, 1.3, (4, 5, 3)
    samples = [[rng.uniform(0.2, 0.6) for _ in range(3)] + [rng.gauss(0, 1), rng.random()] for _ in range(T * E * N)]
    expected = masked = 0
    for mu, pi, old, A, kl in samples:
        rho = clip(clip(mu / pi, 1 / delta, delta) * pi / old, 1 - eps, 1 + eps)
        m = not 1 / delta <= mu / pi <= delta
        expected += (-min(mu / old * A, rho * A) + m * kl) / len(samples)
        masked += m / len(samples)
    mu, pi, old, A, kl = torch.tensor(samples, dtype=torch.float64).T.reshape(5, T, E, N)
    loss, mask, _ = magpo.guider_loss(mu.log(), pi.log(), old.log(), A, kl, eps, delta)
    assert 0.2 < masked < 0.8 and (loss.item(), mask.item()) == pytest.approx((expected, masked), abs=1e-12)


def test_exercise_4_learner_loss_is_eq_10_sample_by_sample():
    rng, eps, lam, (T, E, N) = random.Random(0), 0.2, 1.7, (4, 5, 3)
    samples = [[rng.uniform(0.2, 0.6), rng.uniform(0.2, 0.6), rng.gauss(0, 1), rng.random()] for _ in range(T * E * N)]
    terms = [kl - lam * min(pi / old * A, clip(pi / old, 1 - eps, 1 + eps) * A) for pi, old, A, kl in samples]
    pi, old, A, kl = torch.tensor(samples, dtype=torch.float64).T.reshape(4, T, E, N)
    loss = magpo.learner_loss(pi.log(), old.log(), A, kl, eps, lam)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-12)


def test_each_loss_moves_only_its_own_network():
    guider, learner = networks()
    obs = torch.randn(30, 4, 6, dtype=torch.float64)
    actions, old, _ = guider.act(obs)
    advantages = torch.randn_like(old)
    mu, pi = guider(obs, actions)[0], learner(obs)
    kl = magpo.kl_divergence(mu, magpo.detached(pi))
    magpo.guider_loss(mu.log_prob(actions), pi.log_prob(actions), old, advantages, kl, 0.2, 1.1)[0].backward()
    assert all(p.grad is None for p in learner.parameters()) and guider.policy_head.weight.grad.abs().sum() > 0
    guider.zero_grad(set_to_none=True)
    mu, pi = guider(obs, actions)[0], learner(obs)
    kl = magpo.kl_divergence(magpo.detached(mu), pi)
    magpo.learner_loss(pi.log_prob(actions), old, advantages, kl, 0.2, 1.0).backward()
    assert all(p.grad is None for p in guider.parameters()) and learner.policy_head.weight.grad.abs().sum() > 0


def test_ratio_of_an_unchanged_guider_is_one():
    """Fixed agent order: before the first step mu/mu_old is 1 to rounding (the official code's shuffling breaks this)."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        guider, _ = networks(dtype=dtype)
        obs = torch.randn(25, 8, 4, 6, dtype=dtype)
        actions, logprobs, _ = guider.act(obs)
        ratio = (guider(obs, actions)[0].log_prob(actions) - logprobs).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=tolerance)


def test_exercise_5_backtracking_makes_the_guider_the_learner_to_the_last_bit():
    guider, learner = networks()
    torch.nn.init.normal_(guider.policy_head.bias)
    magpo.backtrack(guider)
    obs, actions = torch.randn(20, 4, 6, dtype=torch.float64), torch.randint(5, (20, 4))
    assert torch.equal(guider(obs, actions, learner.params(obs))[0].logits, learner(obs).logits)


def test_value_norm():
    norm, x = magpo.ValueNorm(decay=0.75).double(), 3 + 2 * torch.randn(2, 1000, dtype=torch.float64)
    norm.update(x[0]), norm.update(x[1])
    expected, square = (3 * x[0].mean() + 4 * x[1].mean()) / 7, (3 * x[0].square().mean() + 4 * x[1].square().mean()) / 7
    mean, std = norm.stats()
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(std, (square - expected**2).sqrt())


def test_value_norm_keeps_the_deviation_beside_a_large_mean():
    norm, x = magpo.ValueNorm(), 20_000 + torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    for returns in x:
        norm.update(returns)
    mean, std = norm.stats()
    assert abs(mean - 20_000) < 0.1 and 0.9 < std < 1.1
    assert ((x - mean) / std).dtype == torch.float32  # as the critic's targets must be


# ----------------------------------------------------------------------------------------------------------------------
# Environments
# ----------------------------------------------------------------------------------------------------------------------


def mpe2_spread(num_agents, continuous=False):
    from mpe2 import simple_spread_v3

    return simple_spread_v3.parallel_env(N=num_agents, continuous_actions=continuous, max_cycles=25, local_ratio=0.5)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("num_agents", [3, 5, 10])
def test_simple_spread_is_mpe2(num_agents, continuous):
    real, rng, collisions = mpe2_spread(num_agents, continuous), np.random.default_rng(num_agents), 0
    for episode in range(4):
        real.reset(seed=episode)
        world, scenario = real.unwrapped.world, real.unwrapped.scenario
        ours = envs.SimpleSpread(1, num_agents=num_agents, continuous=continuous, dtype=torch.float64)
        ours.reset(seed=0)
        for agent in world.agents:
            agent.state.p_pos *= (1.0, 0.1)[episode % 2]  # crowded, so that they collide
        ours.position = torch.tensor(np.array([[agent.state.p_pos for agent in world.agents]]))
        ours.landmarks = torch.tensor(np.array([[landmark.state.p_pos for landmark in world.landmarks]]))
        for step in range(25):
            if continuous:
                actions = (rng.integers(65, size=(num_agents, 5)) / 64).astype(
                    np.float32
                )  # exact where mpe2 subtracts in float32
            else:
                actions = rng.integers(5, size=num_agents)
            _, rewards, _, timeouts, _ = real.step(dict(zip(real.agents, actions)))
            _, team_reward, terminations, truncations, infos = ours.step(torch.as_tensor(actions)[None])
            expected = np.array([scenario.observation(agent, world) for agent in world.agents])
            np.testing.assert_allclose(infos["final_obs"][0], expected, rtol=0, atol=1e-9)
            assert team_reward.item() == pytest.approx(np.mean(list(rewards.values())), abs=1e-9)
            assert truncations.item() == all(timeouts.values()) == (step == 24) and not terminations.any()
            collisions += sum(scenario.is_collision(a, b) for a, b in itertools.combinations(world.agents, 2))
    assert collisions > 5


@pytest.mark.parametrize("env_id", [name for name in envs.ENVS if name.startswith("coordsum")])
def test_coordsum_is_the_rules(env_id):
    E = 3
    env = envs.make(env_id, E)
    num_agents, num_targets = env.single_observation_space.shape
    num_actions = int(env.single_action_space.nvec[0])
    rng, obs = np.random.default_rng(0), env.reset(seed=0)[0]
    scores, target_counts = set(), np.zeros(num_targets)
    for _ in range(3):
        plays = [[[] for _ in range(num_targets)] for _ in range(E)]  # agent 0's, per copy and target
        for step in range(100):
            targets = obs.argmax(-1)
            assert (obs.sum(-1) == 1).all() and (targets == targets[:, :1]).all()
            actions = np.zeros((E, num_agents), dtype=int)
            expected = []
            for e in range(E):
                target = int(targets[e, 0])
                target_counts[target] += 1
                rest = target
                for i in range(num_agents):  # random splits of the target, so that most of them hit
                    low = max(0, rest - (num_agents - 1 - i) * (num_actions - 1))
                    high = min(num_actions - 1, rest)
                    actions[e, i] = (
                        rng.integers(low, high + 1) if low <= high and i < num_agents - 1 else min(rest, num_actions - 1)
                    )
                    rest -= actions[e, i]
                counts = [plays[e][target].count(a) for a in range(num_actions)]
                habit = counts.index(max(counts))
                hit = actions[e].sum() == target
                expected.append(0.0 if not hit else 1.0 if actions[e, 0] == habit else 2.0)
                plays[e][target].append(actions[e, 0])
            obs, rewards, terminations, truncations, _ = env.step(torch.as_tensor(actions))
            assert rewards.tolist() == expected
            assert (truncations == (step == 99)).all() and not terminations.any()
            scores.update(expected)
    assert {1.0, 2.0} <= scores <= {0.0, 1.0, 2.0}
    assert (target_counts > 0).mean() > 0.8


def test_matrix_games():
    for env_id, best, mean in (("climbing", 11, -31 / 9), ("penalty", 10, -178 / 9), ("xor", 1, 0.5), ("sum10", 1, 63 / 1000)):
        env = envs.make(f"matrix_{env_id}", 64)
        assert env.references == pytest.approx({"best": best, "random": mean})
    obs, _ = env.reset(seed=0)
    assert obs.shape == (64, 3, 1)
    actions = torch.randint(10, (64, 3))
    _, rewards, terminations, truncations, _ = env.step(actions)
    assert rewards.tolist() == [float(sum(joint) == 10) for joint in actions.tolist()]
    assert terminations.all() and not truncations.any()
    four = envs.MatrixGame(2, payoff=torch.arange(16.0).view(2, 2, 2, 2))
    assert four.step(torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]]))[1].tolist() == [11.0, 1.0]


@pytest.mark.parametrize("env_id", envs.ENVS)
def test_vector_interface(env_id):
    env = envs.make(env_id, 5)
    assert env.metadata["autoreset_mode"] == envs.AutoresetMode.SAME_STEP
    obs, _ = env.reset(seed=3)
    env.action_space.seed(0)
    for step in range(env.episode_length):
        assert env.observation_space.contains(obs.numpy())
        last = obs
        obs, rewards, terminations, truncations, infos = env.step(env.action_space.sample())
        assert rewards.shape == terminations.shape == truncations.shape == (5,)
        ended = terminations | truncations
        assert ended.all() == (step == env.episode_length - 1)
        if not ended.any():
            assert torch.equal(infos["final_obs"], obs)
    if env_id.startswith("mpe"):  # the episode's last observation, not the next one's first
        assert not torch.equal(infos["final_obs"], obs)
        assert (infos["final_obs"][..., 2:4] - last[..., 2:4]).abs().max() < 0.5 and (obs[..., :2] == 0).all()
    with pytest.raises(ValueError, match="shape"):
        env.step(torch.zeros(5, 1))


def test_environment_seeds():
    def play(seed):
        env = envs.make("mpe_spread", 8)
        return torch.stack([env.reset(seed=seed)[0]] + [env.step(torch.ones(8, 3, dtype=torch.long))[0] for _ in range(30)])

    assert torch.equal(play(1), play(1)) and not torch.equal(play(1), play(2))


def test_actions_are_not_tied_to_the_environments_numbers():
    """With one seed for both, PyTorch would make a policy's noise from the very numbers that placed the agents."""
    env = envs.make("coordsum_3x10", 4096)
    targets = env.reset(seed=3)[0][:, 0].argmax(-1)
    torch.manual_seed(3)
    assert (torch.randint(30, (4096,)) == targets).float().mean() < 0.1
    env = envs.make("mpe_spread_continuous", 4096)
    obs, _ = env.reset(seed=3)
    torch.manual_seed(3)
    noise = torch.randn(4096 * 3).view(4096, 3)
    position = (obs[..., 2:4].flatten() + 1) / 2
    made = (-2 * (1 - position).log()).sqrt()  # Box-Muller's radius
    assert abs(np.corrcoef(made[: 4096 * 3 // 2].abs(), noise.flatten()[: 4096 * 3 // 2].abs())[0, 1]) < 0.1


def test_samples_are_those_of_the_policy():
    torch.manual_seed(0)
    logits = torch.tensor([0.2, 0.5, 0.3, 0.0]).log().expand(100_000, -1)
    seen = magpo.sample(magpo.distribution(logits, False)).bincount(minlength=4) / 100_000
    torch.testing.assert_close(seen, logits[0].exp(), atol=0.01, rtol=0)
    x = magpo.sample(magpo.distribution(torch.tensor([0.1, -0.2, 0.3, 0.4]).expand(100_000, -1), True))
    torch.testing.assert_close(x.mean(0), torch.tensor([0.6, 0.3]), atol=0.02, rtol=0)
    torch.testing.assert_close(x.std(0).log(), torch.tensor([-0.7, -0.6]), atol=0.02, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Other people's environments: PettingZoo and gymnasium adapters, partial observations
# ----------------------------------------------------------------------------------------------------------------------


class Fake(ParallelEnv):
    """Agents count the steps.

    leaves: {agent: (step, "terminated" or "truncated")}. masks: None, "observation", "info" or "nothing allowed".
    entropy: where a reset has no seed, ask the operating system for one. forgetful: agents are never struck off the list.
    """

    metadata = {}

    def __init__(self, names="abc", sees=None, acts=None, leaves=None, masks=None, rewards=None, stranger=None, **options):
        self.possible_agents = list(names)
        self.sees, self.acts = sees or {}, acts or {}
        self.leaves, self.masks, self.rewards, self.stranger = leaves or {}, masks, rewards or {}, stranger
        self.entropy, self.forgetful = options.get("entropy"), options.get("forgetful")
        self.taken = []

    def observation_space(self, agent):
        space = self.sees.get(agent, spaces.Box(-np.inf, np.inf, (2,), np.float32))
        if self.masks != "observation":
            return space
        return spaces.Dict({"observation": space, "action_mask": spaces.MultiBinary(int(self.action_space(agent).n))})

    def action_space(self, agent):
        return self.acts.get(agent, spaces.Discrete(3))

    def look(self, agents):
        obs, infos = {}, {agent: {} for agent in agents}
        for agent in agents:
            space = self.sees.get(agent, spaces.Box(-np.inf, np.inf, (2,), np.float32))
            obs[agent] = np.full(space.shape, self.time + self.luck, space.dtype)
            mask = np.arange(int(getattr(self.action_space(agent), "n", 0))) != self.time % 3  # one action is forbidden
            if self.masks == "observation":
                obs[agent] = {"observation": obs[agent], "action_mask": mask.astype(np.int8)}
            if self.masks in ("info", "nothing allowed"):
                infos[agent]["action_mask"] = mask & (self.masks == "info")
        return obs, infos

    def reset(self, seed=None, options=None):
        if seed is not None or self.entropy:
            self.rng = np.random.default_rng(seed)
        self.agents, self.time, self.luck = list(self.possible_agents), 0, self.rng.random() if self.entropy else 0.0
        random.random(), np.random.rand(), torch.rand(1)  # global random numbers that the probe has to put back
        return self.look(self.agents)

    def step(self, actions):
        assert actions.keys() == set(self.agents)
        self.taken.append(actions)
        self.time += 1
        before = self.agents
        flags = [
            {a: self.leaves.get(a, (20, "truncated")) == (self.time, kind) for a in before}
            for kind in ("terminated", "truncated")
        ]
        self.agents = [agent for agent in before if self.forgetful or not (flags[0][agent] or flags[1][agent])]
        if self.stranger and self.time == 5:
            self.agents.append(self.stranger)
        obs, infos = self.look([agent for agent in before if agent in self.possible_agents])
        return obs, {agent: self.rewards.get(agent, 1.0) for agent in before}, *flags, infos


@pytest.fixture
def fake(monkeypatch):
    """A function that makes `pettingzoo:fake` with Fake's options."""
    module = types.ModuleType("fake")
    module.parallel_env = Fake
    monkeypatch.setitem(sys.modules, "fake", module)
    return lambda num_envs=2, state=False, **kwargs: envs.make("pettingzoo:fake", num_envs, state=state, **kwargs)


def copies(env):
    """The PettingZoo environments behind an adapted one."""
    return [team.env for team in env.env.envs]


def zeros(env):
    return torch.zeros(env.action_space.shape, dtype=torch.long)


# ----------------------------------------------------------------------------------------------------------------------
# Adapters
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("continuous", [False, True])
def test_adapted_spread_is_the_batched_one(continuous):
    env = envs.make("pettingzoo:mpe2.simple_spread_v3", 2, continuous_actions=continuous, max_cycles=6)
    ours = envs.SimpleSpread(2, continuous=continuous, max_cycles=6, dtype=torch.float64)
    assert env.single_observation_space == ours.single_observation_space
    assert env.single_action_space == ours.single_action_space and env.action_space == ours.action_space
    assert env.observation_space == ours.observation_space
    assert (env.num_envs, env.references, env.state_dim, ours.note) == (2, {}, 0, "") and "mean over agents" in env.note
    assert env.metadata["autoreset_mode"] == envs.AutoresetMode.SAME_STEP
    obs, infos = env.reset(seed=1)
    ours.reset(seed=1)
    for step in range(15):
        if step % 6 == 0:
            worlds = [copy.unwrapped.world for copy in copies(env)]
            ours.position = torch.tensor(np.array([[agent.state.p_pos for agent in world.agents] for world in worlds]))
            ours.landmarks = torch.tensor(np.array([[mark.state.p_pos for mark in world.landmarks] for world in worlds]))
            ours.velocity = torch.zeros_like(ours.position)
            torch.testing.assert_close(obs, ours._observe().float(), rtol=0, atol=1e-6)
        actions = torch.rand(2, 3, 5) * 2 - 0.5 if continuous else torch.randint(5, (2, 3))
        obs, rewards, terminations, truncations, infos = env.step(actions)
        expected, team_reward, _, timeouts, batched_infos = ours.step(actions.double() if continuous else actions)
        torch.testing.assert_close(infos["final_obs"], batched_infos["final_obs"].float(), rtol=0, atol=1e-5)
        torch.testing.assert_close(rewards, team_reward.float(), rtol=0, atol=1e-5)
        assert not terminations.any() and torch.equal(truncations, timeouts) and truncations.all() == (step % 6 == 5)
        assert torch.equal(infos["final_obs"], obs) != truncations.all()
        assert infos.keys() == {"final_obs", "active", "final_active"}
        assert infos["active"].all() and infos["final_active"].all() and infos["active"].dtype == torch.bool
        assert (obs.shape, obs.dtype, rewards.shape, rewards.dtype) == ((2, 3, 18), torch.float32, (2,), torch.float32)
    with pytest.raises(ValueError, match="shape"):
        env.step(actions[0])


def test_agents_of_different_sizes_are_padded():
    env = envs.make("pettingzoo:mpe2.simple_speaker_listener_v4", 3)
    obs, infos = env.reset(seed=0)
    assert obs.shape == (3, 2, 11) and env.single_action_space == spaces.MultiDiscrete([5, 5])
    for _ in range(30):
        assert infos.keys() == {f"{when}{key}" for key in ("obs", "active", "action_mask") for when in ("", "final_")} - {"obs"}
        assert (obs[:, 0, 3:] == 0).all() and (obs[:, 1] != 0).any() and (infos["final_obs"][:, 0, 3:] == 0).all()
        assert infos["action_mask"].tolist() == [[[True] * 3 + [False] * 2, [True] * 5]] * 3
        speaker = [copy.aec_env.observe("speaker_0") for copy in copies(env)]
        np.testing.assert_allclose(obs[:, 0, :3], speaker)
        obs, _, _, _, infos = env.step(torch.multinomial(infos["action_mask"].flatten(0, 1).float(), 1).view(3, 2))


def test_agents_of_equal_sizes_need_no_mask():
    env = envs.make("pettingzoo:mpe2.simple_reference_v3", 2)
    obs, infos = env.reset(seed=0)
    assert obs.shape == (2, 2, 21) and env.single_action_space == spaces.MultiDiscrete([50, 50])
    assert "action_mask" not in infos and "action_mask" not in env.step(zeros(env))[4]


@pytest.mark.parametrize("masks", ["observation", "info"])
def test_masks_belong_to_the_returned_observation(fake, masks):
    env = fake(masks=masks)
    obs, infos = env.reset(seed=0)
    for step in range(1, 45):
        forbidden = int(obs[0, 0, 0]) % 3
        assert torch.equal(infos["action_mask"], (torch.arange(3) != forbidden).expand(2, 3, 3))
        obs, _, _, truncations, infos = env.step(torch.full((2, 3), (forbidden + 1) % 3))
        assert (obs == step % 20).all() and truncations.all() == (step % 20 == 0)
        last = 20 if truncations.all() else step % 20
        assert (infos["final_obs"] == last).all()
        assert torch.equal(infos["final_action_mask"][0, 0], torch.arange(3) != last % 3)


def test_agents_leave_early_and_the_rest_time_out(fake):
    env = fake(
        leaves={"a": (2, "terminated"), "b": (4, "truncated"), "c": (6, "truncated")},
        rewards={"a": 3.0, "b": 6.0},
        masks="info",
    )
    _, infos = env.reset(seed=0)
    assert infos["active"].all()
    active, paid = {1: "abc", 2: "bc", 3: "bc", 4: "c", 5: "c", 6: "c"}, {1: 10, 2: 10, 3: 7, 4: 7, 5: 1, 6: 1}
    for step in range(1, 13):
        time = 1 + (step - 1) % 6
        obs, rewards, terminations, truncations, infos = env.step(torch.full((2, 3), time % 3))  # of the left: ignored
        np.testing.assert_allclose(rewards, paid[time] / 3, rtol=1e-6)
        assert not terminations.any() and truncations.all() == (time == 6)
        assert infos["final_active"].tolist() == [[name in active[time] for name in "abc"]] * 2
        assert infos["active"].tolist() == ([[True] * 3] * 2 if time == 6 else infos["final_active"].tolist())
        left = [i for i, name in enumerate("abc") if name not in active[time]]
        assert (infos["final_action_mask"][:, left] == torch.tensor([True, False, False])).all()
        assert infos["final_action_mask"][0, 2].tolist() == [time % 3 != a for a in range(3)]
        assert (infos["final_obs"][0, 0] == (time if time <= 2 else 0)).all() and (infos["final_obs"][0, 2] == time).all()
    assert copies(env)[0].taken[3].keys() == set("bc")


def test_all_agents_dead_is_a_termination(fake):
    env = fake(names="ab", leaves={"a": (2, "terminated"), "b": (3, "terminated")})
    env.reset(seed=0)
    ends = [env.step(zeros(env))[2:] for _ in range(3)]
    assert [(over.all().item(), late.any().item()) for over, late, _ in ends] == [(False, False), (False, False), (True, False)]
    assert not ends[2][2]["final_active"].any() and ends[2][2]["active"].all()
    assert (ends[2][2]["final_obs"][:, 1] == 3).all()


def test_all_tensors_are_on_the_device(fake):
    env = fake(masks="info", device="meta")  # stands for a GPU
    obs, infos = env.reset(seed=0)
    *results, more = env.step(zeros(env))
    assert {tensor.device.type for tensor in (obs, *infos.values(), *results, *more.values())} == {"meta"}


@pytest.mark.parametrize("a, b", [("truncated", "terminated"), ("terminated", "truncated")])
def test_a_team_ends_as_the_last_of_it_do(a, b, fake):
    """With nobody left who could have gone on, there is no observation to bootstrap from."""
    env = fake(names="ab", leaves={"a": (2, a), "b": (3, b)})
    env.reset(seed=0)
    ends = [env.step(zeros(env))[2:] for _ in range(3)]
    assert not any(flag.any() for *flags, _ in ends[:2] for flag in flags)
    over, late, infos = ends[2]
    assert over.all() == (b == "terminated") and late.all() == (b == "truncated")
    assert ends[1][2]["active"].tolist() == [[False, True]] * 2
    assert infos["final_active"].tolist() == [[False, b == "truncated"]] * 2


def test_an_episode_ends_by_its_flags_too(fake):
    env = fake(forgetful=True)
    env.reset(seed=0)
    for step in range(1, 41):
        obs, _, _, truncations, infos = env.step(zeros(env))
        assert truncations.all() == (step % 20 == 0) and (obs == step % 20).all() and infos["active"].all()


def test_where_nothing_is_allowed_action_0_is(fake):
    env = fake(masks="nothing allowed")
    assert env.reset(seed=0)[1]["action_mask"].tolist() == [[[True, False, False]] * 3] * 2


def test_continuous_actions_in_the_unit_box_are_stretched_to_the_space(fake):
    space = spaces.Box(np.array([[-2.0], [0.0]]), np.array([[3.0], [1.0]]), dtype=np.float64)
    env = fake(acts=dict.fromkeys("abc", space))
    assert env.single_action_space.shape == (3, 2) and "action_mask" not in env.reset(seed=0)[1]
    assert (env.single_action_space.low == 0).all() and (env.single_action_space.high == 1).all()
    env.step(torch.tensor([[[9.0, -9.0]] * 3, [[0.6, 0.5]] * 3]))
    taken = [copy.taken[-1]["b"] for copy in copies(env)]
    assert (
        taken[0].tolist() == [[3], [0]]
        and taken[1] == pytest.approx(np.array([[1], [0.5]]), abs=1e-6)
        and taken[0].dtype == np.float64
    )


def test_discrete_actions_that_do_not_start_at_zero(fake):
    env = fake(acts={"b": spaces.Discrete(2, start=5)})
    _, infos = env.reset(seed=0)
    assert infos["action_mask"][0].tolist() == [[True] * 3, [True, True, False], [True] * 3]
    env.step(torch.tensor([[2, 1, 0]] * 2))
    assert copies(env)[0].taken[-1] == {"a": 2, "b": 6, "c": 0}


def test_observations_become_vectors(fake):
    env = fake(sees={"a": spaces.Box(0, 99, (3, 2)), "b": spaces.Discrete(30), "c": spaces.Box(0, 99, (5,), np.uint8)})
    env.reset(seed=0)
    obs = env.step(zeros(env))[0][0]
    assert obs.shape == (3, 30) and obs[0].tolist() == [1] * 6 + [0] * 24
    assert obs[1].tolist() == [0, 1] + [0] * 28 and obs[2].tolist() == [1] * 5 + [0] * 25


def test_seeds_repeat(fake):
    def play(env, seed):
        torch.manual_seed(0)
        actions = torch.randint(3, (40, *env.action_space.shape))
        return torch.stack([env.reset(seed=seed)[0]] + [env.step(a)[0] for a in actions])

    for build in (lambda: envs.make("pettingzoo:mpe2.simple_spread_v3", 2), lambda: fake(entropy=True)):
        env = build()
        first = play(env, 3)
        assert torch.equal(play(build(), 3), first) and torch.equal(play(env, 3), first)
        assert not torch.equal(play(env, 4)[0, 0], first[0, 1])  # copies of runs with neighbouring seeds are different ones
        assert not torch.equal(play(env, None)[0], first[0]) and not torch.equal(play(env, None)[0], play(env, None)[0])


def test_worker_processes_change_nothing():
    env_id = "pettingzoo:mpe2.simple_speaker_listener_v4"
    pair = [envs.make(env_id, 2, num_workers=workers, state=True, max_cycles=4) for workers in (0, 2)]
    assert [type(env.env).__name__ for env in pair] == ["SyncVectorEnv", "AsyncVectorEnv"]
    results = [env.reset(seed=5) for env in pair]
    for step in range(10):
        for one, two in zip(*results):
            assert one.keys() == two.keys() if isinstance(one, dict) else torch.equal(one, two)
        infos = [result[-1] for result in results]
        assert all(torch.equal(infos[0][key], infos[1][key]) for key in infos[0])
        results = [env.step(torch.full((2, 2), step % 3)) for env in pair]
    assert results[0][3].dtype == torch.bool
    pair[1].close()
    with pytest.raises(ValueError, match=r"num_workers must be 0 or num_envs \(2\)"):
        envs.make(env_id, 2, num_workers=3)
    with pytest.raises(ValueError, match="leave num_workers at 0"):
        envs.make("mpe_spread", 2, num_workers=2)


def test_state(fake):
    env = envs.make("pettingzoo:mpe2.simple_spread_v3", 2, state=True, max_cycles=3)
    obs, infos = env.reset(seed=0)
    assert env.state_dim == 54 and infos["state"].shape == (2, 54) and infos["state"].dtype == torch.float32
    for step in range(1, 5):  # mpe2's state is all observations
        assert torch.equal(infos["state"], obs.flatten(1)) and torch.equal(infos["final_state"], infos["final_obs"].flatten(1))
        assert torch.equal(infos["state"], infos["final_state"]) == (step != 4)
        obs, _, _, _, infos = env.step(zeros(env))
    with pytest.raises(ValueError, match=r"has no state\(\)"):
        fake(state=True)


def test_probing_starts_again_when_an_episode_ends(fake, monkeypatch):
    seeds, reset = [], Fake.reset
    monkeypatch.setattr(Fake, "reset", lambda self, seed=None: seeds.append(seed) or reset(self, seed))
    fake()
    assert len(seeds) == len(set(seeds)) == 1 + 200 // 20


def test_probing_draws_no_global_random_numbers(fake):
    def numbers():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = numbers()
    seed()
    fake()
    assert numbers() == expected
    seed()
    with pytest.raises(ValueError, match="shared goal"):
        fake(rewards={"a": -1.0})
    assert numbers() == expected


BOX = spaces.Box(0, 1, (2,))
REFUSED = [
    ("pettingzoo:mpe2.simple_sprd_v3", {}, "No module named 'mpe2.simple_sprd_v3'.*correct the name, or pip install"),
    ("pettingzoo:needs_a_library", {}, "needs_a_library: No module named 'a_library'.*pip install"),
    ("pettingzoo:classic.tictactoe_v3", {}, "no parallel_env.*not in turns"),
    ("pettingzoo:mpe2.simple_spread_v3", {"agents": 4}, "cannot be made with the options {'agents': 4}"),
    ("pettingzoo:mpe2.simple_tag_v3", {}, "shared goal"),
    ("pettingzoo:classic.rps_v2", {}, "shared goal"),
    ("gym:CartPole-v1", {}, "spaces are Tuples"),
    ("gym:NoSuchGame-v1", {}, "NoSuchGame"),
    ("gym:Foraging-8x8-2p-2f-v3", {}, "lbforaging.*pip install"),
    ("gym:rware-tiny-2ag-v2", {}, "rware.*pip install"),
    ("pettingzoo:fake", {"acts": {"a": BOX}}, "all Discrete or all Box"),
    ("pettingzoo:fake", {"acts": {"a": spaces.MultiBinary(2)}}, "all Discrete or all Box"),
    ("pettingzoo:fake", {"acts": {"a": BOX, "b": BOX, "c": spaces.Box(0, 1, (3,))}}, "several sizes"),
    ("pettingzoo:fake", {"sees": {"a": spaces.Box(0, 255, (4, 4), np.uint8)}}, "not images"),
    ("pettingzoo:fake", {"sees": {"a": spaces.Box(0, 1, (4, 4, 3))}}, "not images"),
    ("pettingzoo:fake", {"sees": {"a": spaces.Dict({"eyes": BOX})}}, "not images or Dicts"),
    ("pettingzoo:fake", {"stranger": "z"}, "lets in {'z'}"),
    ("matrix_xor", {"state": True}, "matrix_xor has no state"),
]


@pytest.mark.parametrize("env_id, kwargs, sentence", REFUSED)
def test_refused_in_one_sentence(env_id, kwargs, sentence, fake, monkeypatch, tmp_path):
    (tmp_path / "needs_a_library.py").write_text("import a_library")
    monkeypatch.syspath_prepend(tmp_path)
    for package in ("lbforaging", "rware"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ValueError, match=sentence) as error:
        envs.make(env_id, 2, **kwargs)
    assert "\n" not in str(error.value) and env_id in str(error.value)


class FakeTuple(gymnasium.Env):
    """Two agents of different sizes; one reward for both, where `shared`."""

    def __init__(self, shared=False):
        self.observation_space = spaces.Tuple([spaces.Box(-9, 9, (2,)), spaces.Box(-9, 9, (3,))])
        self.action_space = spaces.Tuple([spaces.Discrete(2), spaces.Discrete(4)])
        self.shared = shared

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return (np.ones(2), self.np_random.random(3)), {}

    def step(self, actions):
        self.time += 1
        rewards = float(sum(actions)) if self.shared else [float(action) for action in actions]
        return (np.full(2, self.time), np.full(3, actions[1])), rewards, self.time == 3, [self.time == 5] * 2, {}


@pytest.mark.parametrize("shared", [False, True])
def test_tuple_environments(shared, monkeypatch):
    spec = gymnasium.envs.registration.EnvSpec("FakeTuple-v0", entry_point=FakeTuple)
    monkeypatch.setitem(gymnasium.registry, "FakeTuple-v0", spec)
    env = envs.make("gym:FakeTuple-v0", 3, shared=shared)
    obs, infos = env.reset(seed=0)
    assert obs.shape == (3, 2, 3) and env.single_action_space == spaces.MultiDiscrete([4, 4]) and (obs[:, 0, 2] == 0).all()
    assert infos.keys() == {"final_obs", "action_mask", "final_action_mask"}
    assert infos["action_mask"].tolist() == [[[True, True, False, False], [True] * 4]] * 3
    for step in range(1, 7):
        obs, rewards, terminations, truncations, infos = env.step(torch.tensor([[1, 2]] * 3))
        assert (rewards == (3.0 if shared else 1.5)).all()
        assert terminations.all() == (step % 3 == 0) and not truncations.any()
        assert (infos["final_obs"][:, 0, :2] == 1 + (step - 1) % 3).all() and (infos["final_obs"][:, 1] == 2).all()
        assert "active" not in infos and not env.references and env.note
    assert torch.equal(env.reset(seed=1)[0], env.reset(seed=1)[0]) and not torch.equal(
        env.reset(seed=0)[0], env.reset(seed=1)[0]
    )
    with pytest.raises(ValueError, match=r"has no state\(\)"):
        envs.make("gym:FakeTuple-v0", 3, state=True)


@pytest.mark.parametrize(
    "package, env_id, num_features, num_actions",
    [
        ("lbforaging", "gym:Foraging-8x8-2p-2f-coop-v3", 12, 6),
        ("lbforaging", "gym:Foraging-2s-8x8-2p-2f-coop-v3", 12, 6),
        ("rware", "gym:rware-tiny-2ag-v2", 71, 5),
    ],
)
def test_foraging_and_warehouse(package, env_id, num_features, num_actions):
    pytest.importorskip(package)

    def play():
        env = envs.make(env_id, 2)
        assert env.single_action_space == spaces.MultiDiscrete([num_actions] * 2)
        env.action_space.seed(0)
        steps = [env.reset(seed=1)[0]]
        for _ in range(60):
            obs, rewards, _, _, infos = env.step(torch.as_tensor(env.action_space.sample()))
            assert infos.keys() == {"final_obs"} and rewards.shape == (2,)
            steps.append(obs)
        return torch.stack(steps)

    first = play()
    assert first.shape == (61, 2, 2, num_features) and torch.equal(first, play()) and first.std() > 0


# ----------------------------------------------------------------------------------------------------------------------
# SimpleSpread: partial observations, state
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbors, landmarks", [(1, 1), (2, None), (None, 2), (7, 8)])
def test_partial_spread_is_mpe2(neighbors, landmarks):
    from mpe2 import simple_spread_v3

    options = dict(num_agent_neighbors=neighbors, num_landmark_neighbors=landmarks)
    real, rng = simple_spread_v3.parallel_env(N=4, **options), np.random.default_rng(0)
    for episode in range(2):
        real.reset(seed=episode)
        world, scenario = real.unwrapped.world, real.unwrapped.scenario
        ours = envs.SimpleSpread(1, num_agents=4, dtype=torch.float64, **options)
        ours.reset(seed=0)
        ours.position = torch.tensor(np.array([[agent.state.p_pos for agent in world.agents]]))
        ours.landmarks = torch.tensor(np.array([[landmark.state.p_pos for landmark in world.landmarks]]))
        for _ in range(25):
            actions = rng.integers(5, size=4)
            real.step(dict(zip(real.agents, actions)))
            infos = ours.step(torch.as_tensor(actions)[None])[4]
            expected = np.array([scenario.observation(agent, world) for agent in world.agents])
            assert ours.single_observation_space.shape == expected.shape
            np.testing.assert_allclose(infos["final_obs"][0], expected, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="at least 1 neighbor"):
        envs.SimpleSpread(1, num_landmark_neighbors=0)


def test_partial_spread_by_name():
    env = envs.make("mpe_spread_partial", 2)
    assert env.reset(seed=0)[0].shape == (2, 3, 10) and env.references == {"random": -26.34}


def test_state_of_the_batched_spread():
    env = envs.make("mpe_spread_partial", 2, state=True)
    assert env.state_dim == 18 and envs.make("mpe_spread", 2).state_dim == envs.make("matrix_xor", 2).state_dim == 0
    assert "state" not in envs.make("mpe_spread", 2).reset(seed=0)[1]

    def state():
        return torch.cat([env.position, env.velocity, env.landmarks], -1).view(2, 18)

    _, infos = env.reset(seed=0)
    assert torch.equal(infos["state"], state()) and torch.equal(infos["final_state"], state())
    for step in range(1, 26):
        last = infos["state"]
        infos = env.step(torch.ones(2, 3, dtype=torch.long))[4]
        assert torch.equal(infos["state"], state()) and torch.equal(infos["state"], infos["final_state"]) == (step < 25)
    moved = (infos["final_state"] - last).view(2, 3, 6)
    assert (moved[..., 4:] == 0).all() and (moved[..., :2] != 0).any() and moved[..., :2].abs().max() < 0.5


# ----------------------------------------------------------------------------------------------------------------------
# The theorem, its corollary and its edges, in exact tables (figures/theory.py)
# ----------------------------------------------------------------------------------------------------------------------

GAMES = {
    "climbing": np.array(envs.CLIMBING),
    "penalty": np.array(envs.PENALTY),
    "xor": np.array(envs.XOR),
    "sum10": envs.sum_game().numpy().astype(float),
}
ETAS = [0.01, 0.1, 1, 10, 100]


# oracles


def brute_joint(pi):
    """Probabilities (S, A_1, ..., A_N), one joint action at a time."""
    out = np.empty((len(pi[0]), *(p.shape[1] for p in pi)))
    for s, *a in itertools.product(*map(range, out.shape)):
        out[(s, *a)] = np.exp(sum(p[s, a_i] for p, a_i in zip(pi, a)))
    return out


def brute_expect(x, pi_of, i):
    """E[x(s, a) | a^i] with agent j drawn from pi_of[j], one joint action at a time: (S, A_i)."""
    out = np.zeros((x.shape[0], x.shape[i + 1]))
    for s, *a in itertools.product(*map(range, x.shape)):
        out[s, a[i]] += x[(s, *a)] * np.prod([np.exp(pi_of[j][s, a_j]) for j, a_j in enumerate(a) if j != i])
    return out


def kl(p, q):
    """KL(p || q) per state, of log-probabilities: (S,)."""
    return (np.exp(p) * (p - q)).reshape(len(p), -1).sum(1)


def brute_values(mu, P, R, gamma, sweeps=400):
    """V and Q by repeated backups: shares nothing with the linear solve."""
    V = np.zeros(len(R))
    for _ in range(sweeps):
        Q = R + gamma * np.einsum("s...t,t->s...", P, V)
        V = (np.exp(mu) * Q).reshape(len(R), -1).sum(1)
    return V, Q


def softmax(x):
    return np.log(np.exp(x - x.max(1, keepdims=True)) / np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))


def perturbed(rng, table, scale):
    """A normalised neighbour of log-probabilities (S, ...)."""
    noisy = (table + scale * rng.normal(size=table.shape)).reshape(len(table), -1)
    return softmax(noisy).reshape(table.shape)


def draw(seed, states, sizes, gamma_zero=False):
    rng = np.random.default_rng(seed)
    P, R = theory.random_markov_game(rng, states, sizes)
    return P, R, theory.random_policy(rng, states, sizes)


def values(pi, P, R, gamma, eta, iterations, **options):
    """V of every product policy on the way: (iterations + 1, S)."""
    return np.array([v for _, v in theory.iterate(pi, P, R, gamma, eta, iterations, **options)])


def own_states(S):
    """No aliasing, equal weights."""
    return np.arange(S), np.ones(S)


# the building blocks against brute force


def test_joint_is_the_product_of_the_learners():
    pi = draw(0, 3, (2, 3, 4))[2]
    np.testing.assert_allclose(np.exp(theory.joint(pi)), brute_joint(pi), rtol=1e-12)


def test_exact_values_equal_repeated_backups():
    P, R, pi = draw(1, 4, (2, 3))
    mu = theory.guider_update(theory.joint(pi), R, 1.0)  # correlated, so that no product shortcut can pass
    V, Q = brute_values(mu, P, R, 0.9)
    np.testing.assert_allclose(theory.exact_v(mu, P, R, 0.9), V, atol=1e-10)
    np.testing.assert_allclose(theory.exact_q(mu, P, R, 0.9), Q, atol=1e-10)


def test_visitation_equals_the_discounted_sum_over_time():
    P, R, pi = draw(2, 4, (2, 3))
    at_t, visits = np.full(4, 1 / 4), np.zeros(4)
    for t in range(400):
        visits += 0.1 * 0.9**t * at_t
        at_t = np.einsum("s,sab,sabt->t", at_t, brute_joint(pi), P)
    np.testing.assert_allclose(theory.visitation(theory.joint(pi), P, 0.9), visits, atol=1e-10)


@pytest.mark.parametrize("eta", ETAS)
def test_guider_update_is_the_argmax_of_eq_2(eta):
    P, Q, pi = draw(3, 3, (2, 3))
    mu, rng = theory.joint(pi), np.random.default_rng(0)
    mu_hat = theory.guider_update(mu, Q, eta)

    def objective(candidate):
        return (eta * np.exp(candidate) * Q).reshape(3, -1).sum(1) - kl(candidate, mu)

    np.testing.assert_allclose(np.exp(mu_hat).reshape(3, -1).sum(1), 1)
    for scale in (1e-3, 1e-1, 1, 10):
        for _ in range(50):
            assert np.all(objective(perturbed(rng, mu_hat, scale)) <= objective(mu_hat) + 1e-10)


def test_guider_update_brings_back_actions_whose_probability_underflowed():
    mu = theory.joint(theory.random_policy(np.random.default_rng(0), 1, (3, 3)))
    gone = theory.guider_update(mu, GAMES["penalty"][None], 100.0)
    assert np.exp(gone[0, 0, 0]) == 0 and np.all(np.isfinite(gone))
    np.testing.assert_allclose(theory.guider_update(gone, -GAMES["penalty"][None], 100.0), mu, atol=1e-9)


@pytest.mark.parametrize("sizes", [(2, 3), (2, 2, 2)])
def test_learner_first_projection_is_a_minimum_of_the_kl_no_higher_than_its_start(sizes):
    P, Q, pi = draw(4, 3, sizes)
    mu_hat, rng = theory.guider_update(theory.joint(pi), Q, 3.0), np.random.default_rng(0)
    new = theory.project_learner_first(pi, mu_hat, *own_states(3))
    reached = kl(np.log(brute_joint(new)), mu_hat)
    assert np.all(reached <= kl(np.log(brute_joint(pi)), mu_hat))
    for _ in range(200):
        near = kl(np.log(brute_joint([perturbed(rng, p, 0.05) for p in new])), mu_hat)
        assert np.all(near >= reached - 1e-12)


@pytest.mark.parametrize("sizes", [(2, 3), (2, 2, 2)])
def test_guider_first_projection_is_the_minimum_of_the_kl(sizes):
    P, Q, pi = draw(5, 3, sizes)
    mu_hat, rng = theory.guider_update(theory.joint(pi), Q, 3.0), np.random.default_rng(0)
    new = theory.project_guider_first(mu_hat, *own_states(3))
    reached = kl(mu_hat, np.log(brute_joint(new)))
    for scale in (0.01, 0.1, 1):
        for _ in range(50):
            near = kl(mu_hat, np.log(brute_joint([perturbed(rng, p, scale) for p in new])))
            assert np.all(near >= reached - 1e-12)


@pytest.mark.parametrize("direction", ["learner_first", "guider_first"])
def test_aliased_projections_share_rows_and_minimise_the_weighted_kl(direction):
    obs, weights = np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4])
    P, Q, pi = draw(6, 4, (2, 3))
    pi, rng = [p[obs] for p in pi], np.random.default_rng(0)
    mu_hat = theory.guider_update(theory.joint(pi), Q, 1.0)

    def weighted_kl(candidate):
        both = np.log(brute_joint(candidate)), mu_hat
        return weights @ (kl(*both) if direction == "learner_first" else kl(*both[::-1]))

    if direction == "learner_first":
        new = theory.project_learner_first(pi, mu_hat, obs, weights)
    else:
        new = theory.project_guider_first(mu_hat, obs, weights)
    for p in new:
        np.testing.assert_allclose(p, p[obs], atol=1e-14)
    for _ in range(200):
        assert weighted_kl([perturbed(rng, p[:2], 0.05)[obs] for p in new]) >= weighted_kl(new) - 1e-12


# Theorem 4.1: V(pi_{k+1}) >= V(pi_k)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("game", [*GAMES, (3, 4), (2, 3, 2), (2, 2, 2, 2)], ids=str)
def test_theorem_single_state_games_never_get_worse(game, eta):
    rng, starts = np.random.default_rng(0), 10
    payoff = GAMES[game] if game in GAMES else 10 * theory.random_game(rng, game)
    pi = theory.random_policy(rng, starts, payoff.shape)
    J = values(pi, *theory.copies(payoff, starts), 0.0, eta, 15)
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


# what the theorem needs, one counterexample each


@pytest.mark.parametrize("game", ["climbing", "penalty"])
def test_edge_guider_first_gets_worse_and_learner_first_does_not(game):
    guider_first, learner_first = theory.kl_directions(
        {game: GAMES[game]}, [1.0], starts=50, iterations=60, rng=np.random.default_rng(0)
    )
    assert (guider_first["direction"], learner_first["direction"]) == ("guider_first", "learner_first")
    assert guider_first["worst_change"] < {"climbing": -5, "penalty": -25}[game]
    assert learner_first["worst_change"] > -1e-10
    assert guider_first["share_at_optimum"] > 0.9 > 0.75 > learner_first["share_at_optimum"] > 0.1


def test_edge_without_backtracking_a_markov_game_gets_worse():
    P, R, pi = draw(141, 4, (3, 3))
    assert np.diff(values(pi, P, R, 0.9, 1.0, 30), axis=0).min() > -1e-10
    assert np.diff(values(pi, P, R, 0.9, 1.0, 30, backtracking=False), axis=0).min() < -0.1


def test_edge_without_backtracking_even_the_global_projection_gets_worse():
    """Agent 0 chooses in state 0: 5.5 at once (then state 2, nothing) or state 1, xor for ever. The guider correlates
    its actions in state 1 and values it above 5.5; the best product policy is still uniform there, worth 0.9 * 5."""
    P, R = np.zeros((3, 2, 2, 3)), np.zeros((3, 2, 2))
    R[0, 0], R[1] = 5.5, GAMES["xor"]
    P[0, 0, :, 2] = P[0, 1, :, 1] = P[1, :, :, 1] = P[2, :, :, 2] = 1
    pi, eta = [np.full((3, 2), -np.log(2.0))] * 2, 0.9
    path = list(theory.iterate(pi, P, R, 0.9, eta, 2, backtracking=False))

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
    """The weighted KL is minimised under the visits of mu_k; where eta moves pi far, its own visits are others."""
    obs = np.array([0, 0])
    P, R, pi = draw(26, 2, (3, 3))
    pi = [p[obs] for p in pi]
    for eta, low, high in [(0.1, -1e-10, np.inf), (10.0, -np.inf, -5)]:
        J = values(pi, P, R, 0.9, eta, 25, obs=obs).mean(1)
        assert low < np.diff(J).min() < high
        assert np.diff(values(pi, P, R, 0.9, eta, 25), axis=0).min() > -1e-10  # the same game, states told apart


def test_edge_without_backtracking_a_single_state_game_can_get_worse():
    """mu^_k is then mu_0 exp(k eta R) and its *global* projections never get worse (two optimality inequalities,
    added), but block-coordinate descent follows a local minimum, and drops where this one ceases to exist."""
    rng = np.random.default_rng(48)
    payoff = 10 * theory.random_game(rng, (4, 4))
    pi = [p[17:18] for p in theory.random_policy(rng, 20, (4, 4))]
    game = theory.copies(payoff)
    assert np.diff(values(pi, *game, 0.0, 1.0, 15), axis=0).min() > -1e-10
    assert np.diff(values(pi, *game, 0.0, 1.0, 15, backtracking=False), axis=0).min() < -0.1


def test_without_backtracking_small_single_state_games_keep_improving():
    rng = np.random.default_rng(0)
    for sizes in [(2, 2), (3, 3), (2, 2, 2)]:
        payoff = theory.random_game(rng, sizes)
        pi = theory.random_policy(rng, 20, sizes)
        J = values(pi, *theory.copies(payoff, 20), 0.0, 1.0, 15, backtracking=False)
        assert np.diff(J, axis=0).min() > -1e-10


def test_edge_two_directions_agree_to_first_order_in_eta():
    P, R, pi = draw(7, 3, (2, 3))

    def gap(eta):
        (_, _), (one, _) = theory.iterate(pi, P, R, 0.9, eta, 1, "learner_first")
        (_, _), (two, _) = theory.iterate(pi, P, R, 0.9, eta, 1, "guider_first")
        return max(np.abs(np.exp(a) - np.exp(b)).max() for a, b in zip(one, two))

    for eta in (0.02, 0.01, 0.005):
        assert gap(eta) > 1e-8
        assert gap(eta) / gap(eta / 2) == pytest.approx(4, rel=0.1)


# Corollary 4.2: the learner update is the sequential, agent-by-agent one


@pytest.mark.parametrize("sizes", [(3, 3), (2, 3, 2)], ids=str)
def test_corollary_fixed_point_is_every_agents_best_answer_to_the_new_others(sizes):
    P, R, pi = draw(8, 3, sizes)
    Q, eta = brute_values(theory.joint(pi), P, R, 0.9)[1], 1.0
    (_, _), (new, _) = theory.iterate(pi, P, R, 0.9, eta, 1)
    for i in range(len(sizes)):
        best = softmax(pi[i] + eta * brute_expect(Q, new, i))
        np.testing.assert_allclose(np.exp(new[i]), np.exp(best), atol=1e-10)


@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_corollary_first_sweep_is_the_argmax_of_the_sequential_objective(eta):
    sizes, S = (2, 3, 2), 2
    P, R, pi = draw(9, S, sizes)
    Q = brute_values(theory.joint(pi), P, R, 0.9)[1]
    mu_hat = theory.guider_update(theory.joint(pi), Q, eta)
    new = theory.project_learner_first(pi, mu_hat, *own_states(S), sweeps=1)
    for j, size in enumerate(sizes):
        advantage = np.zeros((S, size))  # E_{a^1:j-1 ~ new}[A^j(s, a^1:j-1, a^j)], the later agents still at pi_k
        for s, *a in itertools.product(range(S), *map(range, sizes)):
            before = np.prod([np.exp(new[m][s, a[m]]) for m in range(j)])
            later = np.prod([np.exp(pi[m][s, a[m]]) for m in range(j + 1, len(sizes))])
            advantage[s, a[j]] += before * later * Q[(s, *a)]
            advantage[s] -= before * later * np.exp(pi[j][s, a[j]]) * Q[(s, *a)]
        steps = 2000 if size == 2 else 200
        grid = np.array([p for p in itertools.product(range(1, steps), repeat=size - 1) if sum(p) < steps]) / steps
        grid = np.concatenate([grid, 1 - grid.sum(1, keepdims=True)], 1)  # the whole simplex, (points, A_j)
        for s in range(S):

            def objective(p):
                return p @ advantage[s] - (p * (np.log(p) - pi[j][s])).sum(-1) / eta

            scores = objective(grid)
            assert objective(np.exp(new[j][s])) >= scores.max() - 1e-12
            np.testing.assert_allclose(grid[scores.argmax()], np.exp(new[j][s]), atol=1.5 / steps)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------

QUICK = dict(num_envs=8, num_steps=5, num_minibatches=4, total_timesteps=120, eval_episodes=256, eval_every=2)


def read_metrics(run_dir):
    with open(run_dir / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_everything_behind(tmp_path, capsys):
    run_dir = magpo.train(magpo.Args(env="mpe_spread", runs_dir=str(tmp_path), **QUICK))
    assert re.fullmatch(r"mpe_spread__magpo__1__[\d.]+", run_dir.name)
    names = {path.name for path in run_dir.iterdir()}
    assert {"checkpoint.pt", "metrics.csv"} < names and any(name.startswith("events") for name in names)
    printed = capsys.readouterr().out
    for line in (
        r"learner +-\d+\.\d+ \+- \d",
        r"learner_greedy +-\d",
        r"guider +-\d",
        r"\(random\) +-26.34",
        r"\(heuristic\) +-7.63",
    ):
        assert re.search(line, printed)
    assert [row["step"] for row in read_metrics(run_dir)] == ["40", "80", "120"]
    args, guider, learner = magpo.load(run_dir / "checkpoint.pt")
    assert args == magpo.Args(env="mpe_spread", runs_dir=str(tmp_path), **QUICK)
    again = magpo.evaluate(args, guider, learner, "learner", 256, args.seed + 2)
    assert f"{again.mean():.2f}" in printed


def test_seeds_repeat_and_differ(tmp_path):
    def numbers(seed, env):
        rows = read_metrics(magpo.train(magpo.Args(env=env, seed=seed, runs_dir=str(tmp_path), **QUICK | {"eval_episodes": 8})))
        return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]

    for env in ("mpe_spread", "coordsum_3x10"):
        first = numbers(1, env)
        assert first == numbers(1, env) and first != numbers(2, env)


@pytest.mark.parametrize("recurrent", [False, True])
def test_the_update_starts_from_ratio_one_in_every_iteration(recurrent, tmp_path):
    """With one step per iteration the ratio stays 1, so that Eq. 9's loss is minus the mean normalised advantage: zero.

    A hidden state that is not the rollout's would show here from the second iteration on.
    """
    once = dict(env="coordsum_3x10", algo="ctds", update_epochs=1, num_minibatches=1, learning_rate=0.02, eval_episodes=8)
    args = magpo.Args(**QUICK | once, recurrent=recurrent, runs_dir=str(tmp_path))
    rows = read_metrics(magpo.train(args))
    assert all(abs(float(row["guider_loss"])) < 1e-5 and row["clip_frac"] == "0.0" for row in rows)
    assert float(rows[-1]["kl"]) > 2 * float(rows[0]["kl"])  # while the networks did move


def test_evaluation_plays_equally_many_episodes_in_every_copy():
    args = magpo.Args(env="coordsum_3x10", num_envs=6)
    guider, learner = magpo.build(args, envs.make(args.env, 1))
    few, many = (magpo.evaluate(args, guider, learner, "learner", episodes, 5) for episodes in (6, 13))
    assert few.shape == (6,) and many.shape == (18,) and torch.equal(many[:6], few)


def test_presets_yield_to_the_user():
    preset = magpo.PRESETS["coordsum"]
    assert magpo.Args(env="coordsum_3x10").gamma == preset["gamma"] != magpo.Args.gamma
    assert magpo.Args(env="coordsum_3x10", gamma=magpo.Args.gamma).gamma == magpo.Args.gamma
    assert magpo.PRESETS.keys() == {name.split("_")[0] for name in envs.ENVS} | {"pettingzoo", "gym"}
    assert magpo.Args(env="pettingzoo:mpe2.simple_spread_v3").num_envs == magpo.PRESETS["pettingzoo"]["num_envs"]


def product_policy(learner):
    """Action probabilities (N, A) of the learners in a matrix game."""
    return learner(torch.ones(learner.features.agent_id.shape[0], 1)).probs.detach().double()


def expected_payoff(payoff, probs):
    for p in reversed(probs):
        payoff = payoff @ p
    return payoff.item()


def is_equilibrium(payoff, joint):
    for i, _ in enumerate(joint):
        others = tuple(slice(None) if k == i else a for k, a in enumerate(joint))
        if payoff[joint] < payoff[others].max():
            return False
    return True


TRAINED_GAMES = list(itertools.product(["climbing", "penalty", "xor", "sum10"], [1, 2, 3, 4, 5]))
QUICKLY = {("sum10", 1)}  # the others are for CI


@pytest.mark.parametrize(
    "game, seed", [pytest.param(*g, marks=[] if g in QUICKLY else pytest.mark.slow) for g in TRAINED_GAMES]
)
def test_exercise_learning_improvement_on_matrix_games(game, seed, tmp_path):
    """Exact expected payoff of the learners' product policy: above its start, and at an optimum or a pure equilibrium."""
    args = magpo.Args(env=f"matrix_{game}", seed=seed, runs_dir=str(tmp_path), eval_episodes=256, eval_every=1000)
    env = envs.make(args.env, 1)
    payoff = env.payoff.double()
    torch.manual_seed(args.seed)
    start = expected_payoff(payoff, product_policy(magpo.build(args, env)[1]))
    probs = product_policy(magpo.load(magpo.train(args) / "checkpoint.pt")[2])
    end, joint = expected_payoff(payoff, probs), tuple(probs.argmax(-1).tolist())
    assert end > start
    assert is_equilibrium(payoff, joint)
    spread = (payoff.max() - payoff.min()).item()
    assert end > payoff[joint].item() - 0.02 * spread
    if game in ("xor", "sum10"):
        assert payoff[joint] == payoff.max()


def test_exercise_5_reset_changes_the_correction_alone(tmp_path, monkeypatch):
    """At a learning rate of nearly nothing, what a run with reset changes is the guider's last layer: not its critic, not pi."""
    build, started = magpo.build, []

    def built(*args):
        nets = build(*args)
        torch.nn.init.normal_(nets[0].policy_head.weight)
        started.append([{name: x.clone() for name, x in net.state_dict().items()} for net in nets])
        return nets

    monkeypatch.setattr(magpo, "build", built)
    options = QUICK | dict(env="matrix_sum10", backtracking="reset", learning_rate=1e-30, runs_dir=str(tmp_path))
    _, *nets = magpo.load(magpo.train(magpo.Args(**options)) / "checkpoint.pt")
    moved = [
        [name for name, x in net.state_dict().items() if (x - old[name]).abs().max() > 1e-9]
        for net, old in zip(nets, started[0])
    ]
    assert moved == [["policy_head.weight"], []]


def test_exercise_5_the_last_iteration_ends_with_step_4_too(tmp_path):
    """What is kept, evaluated and put into the table is mu_{k+1} = pi_{k+1}, not pi_{k+1} plus what Eq. 9 added to pi_k."""
    options = QUICK | dict(env="coordsum_3x10", backtracking="reset", learning_rate=0.05, runs_dir=str(tmp_path))
    args, guider, learner = magpo.load(magpo.train(magpo.Args(**options)))
    obs, actions = torch.eye(30)[:, None].expand(-1, 3, -1), torch.arange(90).view(30, 3) % 10
    assert torch.equal(guider(obs, actions, base=learner.params(obs))[0].logits, learner(obs).logits)


@pytest.mark.slow
def test_exercise_learning_hard_backtracking_finds_sum10(tmp_path):
    args = magpo.Args(env="matrix_sum10", backtracking="reset", runs_dir=str(tmp_path), eval_episodes=256, eval_every=1000)
    probs = product_policy(magpo.load(magpo.train(args) / "checkpoint.pt")[2])
    assert expected_payoff(envs.make(args.env, 1).payoff.double(), probs) > 0.9


def test_logged_returns_are_of_the_updated_learners(tmp_path):
    """The last row's learner_return is what the checkpoint plays, not what the learners of before the update did."""
    options = QUICK | dict(env="mpe_spread", eval_episodes=8, learning_rate=0.02, runs_dir=str(tmp_path))
    run_dir = magpo.train(magpo.Args(**options))
    args, guider, learner = magpo.load(run_dir / "checkpoint.pt")
    played = magpo.evaluate(args, guider, learner, "learner", args.num_envs, args.seed + 1).mean().item()
    assert float(read_metrics(run_dir)[-1]["learner_return"]) == played


@pytest.mark.slow
def test_learners_score_the_same_on_mpe2(tmp_path):
    """Train briefly on the batched environment, then act from the same starts in both, each agent on its own observation."""
    args = magpo.Args(env="mpe_spread", runs_dir=str(tmp_path), total_timesteps=64_000, num_envs=128, eval_episodes=256)
    _, _, learner = magpo.load(magpo.train(args) / "checkpoint.pt")
    learner.requires_grad_(False)
    real, episodes, starts, theirs = mpe2_spread(3), 200, [], []
    torch.manual_seed(0)
    for episode in range(episodes):
        obs, _ = real.reset(seed=episode)
        world, total = real.unwrapped.world, 0.0
        starts.append([[entity.state.p_pos.copy() for entity in group] for group in (world.agents, world.landmarks)])
        while real.agents:
            actions = learner(torch.as_tensor(np.stack([obs[agent] for agent in real.agents]))).sample()
            obs, rewards, *_ = real.step(dict(zip(real.agents, actions.tolist())))
            total += np.mean(list(rewards.values()))
        theirs.append(total)
    ours, env = np.zeros(episodes), envs.SimpleSpread(episodes)
    env.reset(seed=0)
    env.position, env.landmarks = torch.tensor(np.array(starts), dtype=torch.float32).unbind(1)
    obs = env._observe()
    for _ in range(25):
        obs, rewards, *_ = env.step(learner(obs).sample())
        ours += rewards.numpy()
    difference = ours - theirs
    assert np.mean(theirs) > -24  # well above random, -26.3
    assert abs(difference.mean()) < 2.5 * difference.std() / math.sqrt(episodes) < 1.0


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------

WRONG = {
    "--env mpe_sprad": "There is no environment 'mpe_sprad'; choose one of matrix_climbing,",
    "--num-envs 10 --num-minibatches 7": "num_minibatches must divide num_envs x num_steps, or num_envs if recurrent.",
    "--recurrent --num-envs 10 --num-minibatches 4": "num_minibatches must divide num_envs x num_steps, or num_envs if recurrent.",
    "--embed-dim 0": "embed_dim must be above 0",
    "--delta 1.0": "delta must be above 1",
    "--delta nan": "delta must be above 0",
    "--lam -1": "lam must not be negative",
    "--ent-coef -0.1": "ent_coef must not be negative",
    "--learning-rate 0": "learning_rate must be above 0",
    "--gamma 1.5": "gamma and gae_lambda must lie in [0, 1]",
    "--total-timesteps 10": "total_timesteps is below one rollout",
    "--seed -1": "seed must not be negative",
    "--algo mappo --residual": "mappo has no guider policy",
    "--num-steps 0": "num_steps must be above 0",
    "--render out.gif": "render needs eval",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_input_is_one_sentence(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["magpo.py", *options.split()])
    with pytest.raises(SystemExit) as stop:
        magpo.main()
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and WRONG[options] in printed


def run(command, cwd, more_env=()):
    options = dict(cwd=cwd, capture_output=True, text=True, env=os.environ | dict(more_env))
    return subprocess.run([sys.executable, *shlex.split(command)[1:]], **options)


def test_wrong_input_from_the_shell(tmp_path):
    result = run(f"python {HERE / 'magpo.py'} --delta 0.5", tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr and not list(tmp_path.iterdir())


def test_help_explains_every_option(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["magpo.py", "--help"])
    with pytest.raises(SystemExit):
        magpo.main()
    printed = capsys.readouterr().out
    for field in magpo.fields(magpo.Args):
        assert "--" + field.name.replace("_", "-") in printed
    assert "CPU threads of PyTorch" in printed and "delta of Eq. 9" in printed


def commands(document):
    """The `python magpo.py ...` commands in a document's code blocks, and those in its running text that name an environment."""
    text = (HERE / document).read_text()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    found = [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("python magpo.py")]
    return [*dict.fromkeys(found + re.findall(r"`(python magpo.py --env [^`:]*)`", text))]


README, TUTORIAL = commands("README.md"), commands("TUTORIAL.md")
SNIPPETS = re.findall(r"```python\n(.*?)```", (HERE / "TUTORIAL.md").read_text(), re.S)


@pytest.mark.parametrize("command", [*README, *(pytest.param(line, marks=pytest.mark.slow) for line in TUTORIAL)])
def test_documented_commands_run(command, tmp_path):
    episodes = 8 if "gym:" in command else 256  # 256 of rware's, of 500 steps each, take minutes
    small = f"--total-timesteps 240 --num-envs 8 --num-steps 10 --eval-episodes {episodes}"
    result = run(f"{command.replace('magpo.py', str(HERE / 'magpo.py'))} {small}", tmp_path)
    if "No module named 'lbforaging'" in result.stderr or "No module named 'rware'" in result.stderr:
        pytest.skip("an optional package is not installed")
    assert result.returncode == 0, result.stderr
    assert "learner_greedy" in result.stdout
    if "--cuda" in command and not torch.cuda.is_available():
        assert "--cuda: PyTorch sees no GPU here; training on the CPU." in result.stdout


@pytest.mark.slow
def test_the_documented_torchrun_runs(tmp_path):
    (command,) = re.findall(r"^torchrun .*", (HERE / "TUTORIAL.md").read_text(), re.M)
    command = command.replace("torchrun", "python -m torch.distributed.run").replace("magpo.py", str(HERE / "magpo.py"))
    result = run(f"{command} --total-timesteps 320 --num-envs 16 --num-steps 10 --eval-episodes 16", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("learner_greedy") == 1 and len(list(tmp_path.glob("runs/*"))) == 1


SMALL = {  # what repeats the figures, at a reduced budget
    "make.py tables": "make.py tables",
    "make.py draw": "make.py draw",
    "make.py theory": "make.py theory",
    "references.py": "references.py --spread-episodes 16 --coordsum-episodes 16",
    "imitation.py": "imitation.py --episodes 16 --updates 3",
}


@pytest.mark.slow
@pytest.mark.parametrize("command", SMALL)
def test_documented_figures_run(command, tmp_path):
    assert any(f"python figures/{command}`" in (HERE / document).read_text() for document in ("README.md", "TUTORIAL.md"))
    shutil.copytree(HERE, tmp_path / "tree", ignore=shutil.ignore_patterns(".git", "runs"))
    assert run(f"python figures/{SMALL[command]}", tmp_path / "tree").returncode == 0


RUN_BY = {  # the tests that run what else the documents name
    "python figures/make.py sweep": "test_sweeps_go_on_where_they_stopped_and_tables_and_pictures_follow",
    "python figures/make.py healthy": "test_healthy_ranges_hold_nine_of_ten_values",
    "python figures/make.py random": "test_random_play_is_written_down",
    "python figures/details.py": "test_details_are_still_there",
    "python figures/speed.py throughput": "test_throughput_takes_ratios_within_a_round",
    "python figures/speed.py profile": "test_profile_adds_up",
    "python figures/speed.py growth": "test_growth_and_its_picture",
    "python figures/speed.py draw": "test_growth_and_its_picture",
    "python figures/speed.py quality": "test_quality_reads_the_first_step_at_which_a_score_stands",
    "python figures/speed.py gpu": "test_gpu_benchmark_on_the_cpu",
    "python figures/bugs/symptoms.py": "test_symptoms_are_shown_clean_and_bugged",
    "python figures/kit.py": "test_the_kits_commands_run_as_written",
    "pytest": "test_the_kits_commands_run_as_written",
    "torchrun": "test_the_documented_torchrun_runs",
    "python magpo.py --resume": "test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit",
    "python magpo.py --eval": "test_eval_prints_the_table_of_the_run",
    "python magpo.py --env pettingzoo:my_team": "test_the_tutorials_own_environment_is_learned",
    "python magpo.py --help": "test_help_explains_every_option",
}  # fmt: skip


def test_every_documented_command_has_a_test():
    """Commands in code blocks and in running text; those of `commands` run in test_documented_commands_run."""
    texts = [(HERE / document).read_text() for document in ("README.md", "TUTORIAL.md")]
    blocks = [line for text in texts for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    running = re.sub(r"```.*?```", "", "".join(texts), flags=re.S)
    spans = re.findall(r"`((?:python|pytest|torchrun) [^`]*)`", running)
    known = {*README, *TUTORIAL, *(f"python figures/{name}" for name in SMALL)}
    for line in [part.split("#")[0].strip() for line in blocks + spans for part in line.split("&&")]:
        tests = [test for start, test in RUN_BY.items() if line.startswith(start)]
        ran = line in known or "pip install" in line or line.startswith("cd ") or not line
        assert ran or any(test in globals() for test in tests), line


def test_code_in_the_tutorial_stands_in_magpo():
    blocks = [block for block in SNIPPETS if "import" not in block]
    assert all(block in (HERE / "magpo.py").read_text() for block in blocks) and len(blocks) in (0, 2)  # 0 in the hand-out


def test_random_play_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "HERE", tmp_path)
    monkeypatch.setattr(make, "OTHERS", ("pettingzoo:figures.remember",))
    make.random_returns()
    (row,) = csv.DictReader((tmp_path / "random.csv").read_text().splitlines())
    assert abs(float(row["mean"]) - 1 / 9) < 3 * float(row["ci95"])  # two agents, three numbers


def test_details_are_still_there(tmp_path, monkeypatch, capsys):
    """Every text that figures/details.py takes out stands in magpo.py, and one of them trains."""
    monkeypatch.setitem(sys.modules, "magpo", magpo)
    for changes, options in details.DETAILS.values():
        details.changed(changes).Args(**options)
    monkeypatch.setattr(make, "HERE", tmp_path), monkeypatch.setattr(details, "STEPS", 6400)
    details.run("time-outs count as ends", 1)
    details.table()
    assert "| time-outs count as ends | -2" in capsys.readouterr().out


@pytest.mark.slow
def test_sweeps_go_on_where_they_stopped_and_tables_and_pictures_follow(tmp_path, monkeypatch, capsys):
    """The experiments of the documents exist, and a sweep runs what is missing only."""
    documents = (HERE / "README.md").read_text() + (HERE / "TUTORIAL.md").read_text()
    assert set(re.findall(r"sweep ([a-z]\w+)", documents)) - {"rows"} <= make.EXPERIMENTS.keys()
    runs = make.grid((1, 2), env="matrix_xor", total_timesteps=2048, eval_episodes=128)
    monkeypatch.setattr(make, "HERE", tmp_path), monkeypatch.setattr(make, "EXPERIMENTS", {"tiny": runs})
    make.sweep("tiny", "seed 2"), make.sweep("tiny")
    last = [row["seed"] for row in make.read("tiny") if row["final"] == 1]
    assert last == [2, 1] and capsys.readouterr().out.count("cpu-s") == 2
    shutil.copy(HERE / "figures" / "random.csv", tmp_path)
    make.tables()
    assert "learners" in capsys.readouterr().out


def test_the_tutorials_own_environment_is_learned(tmp_path):
    """The example of TUTORIAL.md as it stands there: two agents learn to name a number."""
    (code,) = [block for block in SNIPPETS if "class" in block]
    (tmp_path / "my_team.py").write_text(code)
    result = run(
        f"python {HERE / 'magpo.py'} --env pettingzoo:my_team --total-timesteps 20000",
        tmp_path,
        {"PYTHONPATH": "."},
    )
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"learner +([\d.]+)", result.stdout)[1]) > 0.9  # random: 1 / 9


@pytest.mark.slow
def test_memory_pays_where_something_must_be_remembered(tmp_path):
    options = "--num-envs 16 --total-timesteps 16000 --eval-episodes 256"
    result = run(f"python {HERE / 'magpo.py'} --env pettingzoo:figures.remember --recurrent {options}", tmp_path)
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"learner +([\d.]+)", result.stdout)[1]) > 0.9  # without memory 1 / 3 at best


OTHERS = (
    "mpe2.simple_spread_v3",
    "mpe2.simple_reference_v3",
    "mpe2.simple_speaker_listener_v4",
    "butterfly.knights_archers_zombies_v11",
)
OTHERS = [f"pettingzoo:{name}" for name in OTHERS]
OTHERS += [f"gym:{name}" for name in ("Foraging-8x8-2p-2f-coop-v3", "Foraging-2s-8x8-2p-2f-coop-v3", "rware-tiny-2ag-v2")]


@pytest.mark.slow
def test_the_critic_counts_what_the_team_earns_after_an_agent_left(tmp_path, fake, monkeypatch):
    """Agent b leaves in step 5 of 20, the others go on to earn 1 per step; b's value must hold its share of that."""
    leaves = {agent: (5 if agent == "b" else 20, "terminated") for agent in "abc"}
    monkeypatch.setattr(sys.modules["fake"], "parallel_env", lambda: Fake(leaves=leaves, rewards=dict.fromkeys("abc", 1.0)))
    options = dict(
        num_steps=20, total_timesteps=160 * 100, learning_rate=1e-3, eval_every=1000, eval_episodes=8, max_grad_norm=9.0
    )
    seen = []
    monkeypatch.setattr(magpo, "compute_gae", lambda *inputs, gae=magpo.compute_gae: seen.append(inputs) or gae(*inputs))
    magpo.train(magpo.Args(env="pettingzoo:fake", runs_dir=str(tmp_path), **options))
    values = seen[-1][1].mean(1)  # (T, N), in units of the reward
    for t in (0, 4):
        truth = sum(0.95 ** (k - t) * (1 if k < 5 else 2 / 3) for k in range(t, 20))  # b itself earns nothing from step 5 on
        assert values[t, 1] == pytest.approx(truth, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("env", OTHERS)
def test_other_peoples_environments_train_without_a_warning(env, tmp_path):
    try:
        envs.make(env, 1)
    except ValueError as error:
        pytest.skip(str(error))  # an optional package is not installed
    result = run(f"python {HERE / 'magpo.py'} --env {env} --total-timesteps 20000 --eval-episodes 8", tmp_path)
    assert result.returncode == 0 and "learner_greedy" in result.stdout, result.stderr
    assert "Warning" not in result.stdout + result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Networks by hand: what survived when lines of magpo.py were broken one by one
# ----------------------------------------------------------------------------------------------------------------------


def test_networks_start_orthogonal_and_nearly_uniform():
    guider, learner = magpo.Guider(3, 6, 5, dim=16), magpo.Learner(3, 6, 5, dim=16)
    for layer, gain in (
        (guider.features.hidden, 5 / 3),
        (learner.features.obs_in, 3),
        (learner.features.out, 5 / 3),
        (guider.features.out, 5 / 3),
        (learner.policy_head, 0.1),
    ):
        weight = layer.weight.double() / gain
        product = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(product, torch.eye(len(product)).double(), rtol=0, atol=1e-6)
        assert (layer.bias == 0).all()


def test_memory_is_pytorchs_gru():
    features, gru = networks(recurrent=True)[0].features, torch.nn.GRU(16, 16).double()
    for name, parameter in features.gru.named_parameters():
        getattr(gru, f"{name}_l0").data.copy_(parameter.data)
    obs, hidden = torch.randn(5, 2, 4, 6, dtype=torch.float64), torch.randn(2, 4, 16, dtype=torch.float64)
    seen = features(obs, [hidden, torch.zeros(5, 2).bool()])
    features.gru = None
    expected = gru(features(obs).flatten(1, 2), hidden.flatten(0, 1)[None])[0]
    torch.testing.assert_close(seen.flatten(1, 2), expected)


def test_block_is_attention_by_hand():
    torch.manual_seed(0)
    block, x = magpo.Block(8).double(), torch.randn(4, 8, dtype=torch.float64)
    q, k, v = block.qkv(x).chunk(3, -1)
    here = torch.tensor([True, False, True, False])  # agents that others attend to; each sees itself
    for options, seen in (
        ({}, torch.ones(4, 4)),
        (dict(causal=True), torch.ones(4, 4).tril()),
        (dict(active=here), (here.expand(4, 4) | torch.eye(4).bool())),
    ):
        after = x + block.proj((q @ k.T / math.sqrt(8)).masked_fill(seen == 0, -math.inf).softmax(-1) @ v)
        torch.testing.assert_close(block(x, **options), after + block.mlp(after))


def test_exercise_2_acting_with_everything_equals_the_parallel_pass():
    """Masks, agents that left, state, memory and base at once: act() uses what forward() uses, and moves the memory on."""
    guider, learner = networks(recurrent=True, state_dim=3)
    obs, state = torch.randn(9, 4, 6, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    mask, active = torch.rand(9, 4, 5) < 0.7, torch.rand(9, 4) < 0.7
    mask[..., 0] = True
    hidden, starts = torch.randn(9, 4, 16, dtype=torch.float64), torch.rand(9) < 0.5
    inputs = dict(base=torch.randn(9, 4, 5, dtype=torch.float64), action_mask=mask, active=active, state=state)
    memory, again = [hidden, starts], [hidden, starts]
    actions, logprobs, values = guider.act(obs, **inputs, memory=memory)
    mu, parallel = guider(obs, actions, **inputs, memory=again)
    torch.testing.assert_close(mu.log_prob(actions), logprobs, rtol=0, atol=1e-12)
    torch.testing.assert_close(parallel, values, rtol=0, atol=1e-12)
    assert torch.equal(memory[0], again[0]) and not torch.equal(memory[0], hidden)


def test_exercise_2_the_base_is_added():
    guider, _ = networks()
    obs, actions, base = (
        torch.randn(9, 4, 6, dtype=torch.float64),
        torch.randint(5, (9, 4)),
        torch.randn(9, 4, 5, dtype=torch.float64),
    )
    plain, based = (guider(obs, actions, b)[0].logits for b in (None, base))
    torch.testing.assert_close(based, (plain + base).log_softmax(-1))


def test_a_gaussian_never_gets_needle_sharp_or_flat():
    params = torch.tensor([[0.0, 0.0, -50.0, 50.0]])
    torch.testing.assert_close(magpo.distribution(params, True).base_dist.scale[0].log(), torch.tensor([-4.0, 1.0]))


def test_exercise_3_clip_frac_counts_both_sides():
    mu = torch.log(torch.tensor([0.25, 0.28, 0.40, 0.15]))
    one = torch.ones(4)
    for pi in (mu, math.log(0.25) * one):  # of mu/mu_old, wherever pi is
        assert magpo.guider_loss(mu, pi, math.log(0.25) * one, one, one, 0.2, 1.1)[2] == 0.5


def test_value_norm_forgets_at_its_decay():
    """test_value_norm with a decay other than 1/2, at which old and new weigh the same either way."""
    norm = magpo.ValueNorm(decay=0.9).double()
    for x in (1.0, 4.0):
        norm.update(torch.tensor([x - 2, x + 2], dtype=torch.float64))
    mean, std = norm.stats()
    assert mean.item() == pytest.approx((0.9 * 1 + 4) / 1.9)
    assert std.item() == pytest.approx(math.sqrt((0.9 * 5 + 20) / 1.9 - mean.item() ** 2))


@pytest.mark.parametrize("continuous", [False, True])
def test_detached_is_the_same_policy_as_a_constant(continuous):
    _, learner = networks(continuous=continuous)
    pi = learner(torch.randn(3, 4, 6, dtype=torch.float64))
    constant = magpo.detached(pi)
    assert magpo.kl_divergence(pi, constant).abs().max() < 1e-12
    assert not constant.log_prob(pi.sample()).requires_grad and not constant.entropy().requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# train() and evaluate(), on an environment in which everything happens
# ----------------------------------------------------------------------------------------------------------------------


class Chaos:
    """E copies that end at random, by termination or time-out; masks, agents that leave and states at random, too.

    `log` keeps, per step, all that was shown, done and paid. Rewards depend on the actions; nothing else does.
    """

    single_observation_space, single_action_space = spaces.Box(-1, 1, (3, 2)), spaces.MultiDiscrete([4] * 3)
    state_dim, references, note, made = 5, {}, "", []

    def __init__(self, args, num_envs, device="cpu"):
        self.num_envs, self.log = num_envs, []
        Chaos.made.append(self)

    def _look(self):
        E, rng = self.num_envs, self.rng
        mask, active = torch.rand(E, 3, 4, generator=rng) < 0.6, torch.rand(E, 3, generator=rng) < 0.7
        mask[..., 1] = active[:, 0] = True
        return dict(
            obs=torch.randn(E, 3, 2, generator=rng), action_mask=mask, active=active, state=torch.randn(E, 5, generator=rng)
        )

    def _infos(self, final):
        return {k: x for k, x in self.now.items() if k != "obs"} | {f"final_{k}": x for k, x in final.items()}

    def reset(self, seed, options=None):
        self.rng, self.seed = torch.Generator().manual_seed(seed), seed
        self.now = self._look()
        return self.now["obs"], self._infos(self.now)

    def step(self, actions):
        mask = self.now["action_mask"]
        assert mask.gather(-1, actions[..., None]).all(), "a forbidden action"
        E, rng = self.num_envs, self.rng
        rewards = (actions * torch.randn(E, 3, generator=rng)).sum(-1)
        terminations, truncations = (torch.rand(2, E, generator=rng) < 0.15).unbind(0)
        truncations = truncations & ~terminations
        ended = terminations | truncations
        final, next_ = self._look(), self._look()
        next_ = {k: torch.where(ended.view(-1, *[1] * (x.dim() - 1)), next_[k], x) for k, x in final.items()}
        step = dict(actions=actions, rewards=rewards, terminations=terminations, truncations=truncations, final=final)
        self.log.append(self.now | step)
        self.now = next_
        return next_["obs"], rewards, terminations, truncations, self._infos(final)

    def state_dict(self):
        return {}

    def close(self):
        pass


@pytest.fixture
def chaos(monkeypatch, tmp_path):
    """A function that trains on Chaos -> what the run was made of: calls of the losses, steps of Adam, networks, rows."""

    def train(**options):
        seen = dict(gae=[], guider=[], learner=[], adam=[], total=[])
        build, gae, guider_loss, learner_loss = magpo.build, magpo.compute_gae, magpo.guider_loss, magpo.learner_loss
        Adam, backward = torch.optim.Adam, torch.Tensor.backward

        class Spy(Adam):
            def step(self):
                norms = [
                    torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm() for net in seen["nets"]
                ]
                before = [[p.detach().clone() for p in net.parameters()] for net in seen["nets"]]
                super().step()
                moved = [any((p != q).any() for p, q in zip(net.parameters(), old)) for net, old in zip(seen["nets"], before)]
                seen["adam"].append((self.param_groups[0]["lr"], norms, moved))

        def spy(name, function):
            def call(*args):
                out = function(*args)
                if name != "gae":  # which networks would this loss move?
                    loss = out if torch.is_tensor(out) else out[0]
                    seen[name].append((args, [moves(loss, net) for net in seen["nets"]]))
                else:
                    seen[name].append((args, out))
                return out

            return call

        def moves(loss, net):
            grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)
            return any(g is not None and (g != 0).any() for g in grads)

        def built(*args):
            seen["nets"] = build(*args)
            for net in seen["nets"]:
                torch.nn.init.normal_(net.policy_head.weight, std=0.3)
            return seen["nets"]

        monkeypatch.setattr(magpo, "make_envs", Chaos)
        monkeypatch.setattr(magpo, "build", built)
        monkeypatch.setattr(magpo, "compute_gae", spy("gae", gae))
        monkeypatch.setattr(magpo, "guider_loss", spy("guider", guider_loss))
        monkeypatch.setattr(magpo, "learner_loss", spy("learner", learner_loss))
        monkeypatch.setattr(torch.optim, "Adam", Spy)
        monkeypatch.setattr(torch.Tensor, "backward", lambda x: seen["total"].append(x.item()) or backward(x))
        monkeypatch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n, device=device))
        Chaos.made.clear()
        base = dict(num_envs=5, num_steps=7, num_minibatches=1, update_epochs=1, total_timesteps=105, eval_episodes=5, eval_every=99,
                    embed_dim=16, hidden_dim=16, state=True, runs_dir=str(tmp_path))  # fmt: skip
        seen["args"] = magpo.Args(**base | options)
        seen["rows"] = [{k: float(x) for k, x in row.items()} for row in read_metrics(magpo.train(seen["args"]))]
        seen["log"] = Chaos.made[0].log
        return seen

    return train


def replay(seen):
    """log mu, log pi, V (raw) and V of where each step led, (T, E, N) each: every copy by itself, one step at a time."""
    (guider, learner), args, rows = seen["nets"], seen["args"], []
    for e in range(args.num_envs):
        mu_hidden, pi_hidden = torch.zeros(2, 1, 3, 16).unbind(0)
        for step in seen["log"]:
            here, last = ({k: x[e : e + 1] for k, x in part.items() if k != "final"} for part in (step, step["final"]))
            on = torch.zeros(1, dtype=torch.bool)
            memories = [[mu_hidden, on], [pi_hidden, on]]
            base = learner.params(here["obs"], memories[1])
            pi = magpo.distribution(base, False, here["action_mask"])
            inputs = dict(active=here["active"], state=here["state"])
            options = dict(base=base if args.residual else None, action_mask=here["action_mask"])
            mu, value = guider(here["obs"], here["actions"], **options, **inputs, memory=memories[0])
            (mu_hidden, _), (pi_hidden, _) = memories
            after = guider.encode(last["obs"], last["active"], last["state"], [mu_hidden, on])[1]
            mu = pi if args.algo == "mappo" else mu
            rows.append(
                [
                    mu.log_prob(here["actions"]),
                    pi.log_prob(here["actions"]),
                    value,
                    after,
                    mu.entropy(),
                    magpo.kl_divergence(mu, pi),
                ]
            )
            if here["terminations"] | here["truncations"]:
                mu_hidden, pi_hidden = torch.zeros(2, 1, 3, 16).unbind(0)
    stacked = (torch.cat(x).detach().view(args.num_envs, -1, 3).transpose(0, 1) for x in zip(*rows))
    return [x.unflatten(0, (-1, args.num_steps)) for x in stacked]  # (iterations, T, E, N)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("algo", ["magpo", "residual", "mappo"])
def test_training_on_what_was_seen(algo, recurrent, chaos):
    """Networks held still: what reaches the equations is what single steps of single copies give, in every iteration."""
    options = dict(algo="magpo", residual=True) if algo == "residual" else dict(algo=algo)
    seen = chaos(**options, recurrent=recurrent, learning_rate=1e-30)
    log, args = seen["log"], seen["args"]
    mu, pi, V, after, entropy, kl = replay(seen)
    active, rewards, *ended = (
        torch.stack([step[name] for step in log]).unflatten(0, (-1, 7))
        for name in ("active", "rewards", "terminations", "truncations")
    )
    assert all(x.any() for x in ended)
    close = lambda x, y: torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)  # noqa: E731
    all_returns, total = [], torch.zeros(5)
    for k in range(3):
        if k == 0:
            mean, std = 0.0, 0.001
        (given, (advantages, returns)), live = seen["gae"][k], active[k]
        close(given[0], rewards[k][..., None].expand_as(given[0]))
        close(given[1], V[k] * std + mean)
        goes_on = ~ended[0][k]
        close(given[2][goes_on], (after[k] * std + mean)[goes_on])
        assert torch.equal(given[3][..., 0], ended[0][k]) and torch.equal(given[4][..., 0], ended[1][k])
        assert given[5:] == (args.gamma, args.gae_lambda)
        unexplained = (returns - given[1])[live].var() / returns[live].var()
        row = seen["rows"][k]
        assert row["explained_variance"] == pytest.approx(1 - unexplained.item(), abs=1e-3)
        all_returns.append(returns)  # of all agents: values of those that left are bootstrapped from
        weights = [0.99 ** (k - i) for i in range(k + 1)]
        mean, square = (
            sum(w * f(x) for w, x in zip(weights, all_returns)) / sum(weights)
            for f in (torch.mean, lambda x: x.square().mean())
        )
        std = (square - mean**2).sqrt()
        targets = (returns - mean) / std
        normal = (advantages - advantages[live].mean()) / advantages[live].std()

        (args_mu, _), (args_pi, _) = seen["guider"][k], seen["learner"][k]
        flat = lambda x: x[live] if recurrent else x.flatten(0, 1)[live.flatten(0, 1)]  # noqa: E731
        for x, expected in zip(args_mu[:5], (mu[k], pi[k], mu[k], normal, kl[k])):
            close(x.detach().flatten(), flat(expected))
        for x, expected in zip(args_pi[:4], (pi[k], mu[k], normal, kl[k])):
            close(x.detach().flatten(), flat(expected))
        assert args_mu[5:] == (args.clip_coef, args.delta) and args_pi[4:] == (args.clip_coef, args.lam)
        loss_v = 0.5 * (V[k] - targets).square().mean().item()
        for name, expected in (
            ("value_loss", loss_v),
            ("entropy", entropy[k][live].mean().item()),
            ("kl", kl[k][live].mean().item()),
        ):
            assert row[name] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        done = []
        for t in range(7):
            total = total + rewards[k][t]
            over = ended[0][k][t] | ended[1][k][t]
            done += total[over].tolist()
            total = total * ~over
        assert row["guider_return"] == pytest.approx(np.mean(done), rel=1e-4)


@pytest.mark.parametrize("anneal_lr", [False, True])
@pytest.mark.parametrize("algo", ["magpo", "mappo"])
def test_a_step_of_both_networks(algo, anneal_lr, chaos):
    """Each loss moves its own network, gradients are clipped network by network, rate and entropy bonus go down in step."""
    seen = chaos(algo=algo, anneal_lr=anneal_lr, delta=1.01, max_grad_norm=1e-3, learning_rate=1e-3, ent_coef=0.3, vf_coef=0.7)
    remaining = [1, 2 / 3, 1 / 3] if anneal_lr else [1, 1, 1]
    for k, (row, (lr, norms, moved)) in enumerate(zip(seen["rows"], seen["adam"], strict=True)):
        assert lr == pytest.approx(1e-3 * remaining[k])
        assert [x.item() for x in norms] == pytest.approx([1e-3, 1e-3], rel=1e-2) and moved == [True, True]
        total = row["guider_loss"] - 0.3 * remaining[k] * row["entropy"] + 0.7 * row["value_loss"] + row["learner_loss"]
        assert seen["total"][k] == pytest.approx(total, rel=1e-5)
    if algo == "magpo":
        assert seen["rows"][0]["mask_frac"] > 0
        assert all(call[1] == [True, False] for call in seen["guider"]) and all(
            call[1] == [False, True] for call in seen["learner"]
        )
    else:
        assert all(call[1] == [False, True] for call in seen["guider"])


def test_every_epoch_takes_every_minibatch_with_fresh_gradients(chaos):
    seen = chaos(num_minibatches=5, update_epochs=2, max_grad_norm=1e9, learning_rate=1e-30, total_timesteps=35)
    norms = torch.tensor([step[1] for step in seen["adam"]])
    assert norms.shape == (10, 2) and len(norms[:, 0].round(decimals=6).unique()) == 5  # five minibatches, differing
    torch.testing.assert_close(norms[:5], norms[5:])


@pytest.mark.parametrize("recurrent", [False, True])
def test_exercise_5_after_reset_every_rollout_is_the_learners(recurrent, chaos):
    seen = chaos(backtracking="reset", recurrent=recurrent, learning_rate=0.05)
    for (mu, pi, old, *_), _ in seen["guider"]:
        assert (mu - pi).abs().max() < 1e-6, "mu is not pi when a rollout starts (the last layer's weight, and its bias?)"
        torch.testing.assert_close(old, pi, rtol=0, atol=1e-5)
    assert all(step[2] == [True, True] for step in seen["adam"])  # while both networks did move


@pytest.mark.parametrize("policy", ["guider", "learner", "learner_greedy"])
def test_evaluation_by_hand(policy, monkeypatch):
    """With nearly deterministic policies, what was played is what single steps of single copies would play."""
    monkeypatch.setattr(magpo, "make_envs", Chaos)
    args = magpo.Args(num_envs=4, recurrent=True, residual=True, state=True, embed_dim=16, hidden_dim=16, num_steps=1)
    torch.manual_seed(0)
    guider, learner = magpo.build(args, Chaos)
    for net, std in ((learner, 300), (guider, 300)):
        torch.nn.init.normal_(net.policy_head.weight, std=std)
    before = torch.get_rng_state()
    returns = magpo.evaluate(args, guider, learner, policy, 10, seed=3)
    assert torch.equal(torch.get_rng_state(), before)  # training's random numbers go on as if nothing had been
    log = Chaos.made[-1].log
    assert Chaos.made[-1].seed == 3
    mu, pi = (x.squeeze(1) for x in replay(dict(nets=(guider, learner), args=args, log=log))[:2])
    assert (mu if policy == "guider" else pi).exp().mean() > 0.98
    assert (pi if policy == "guider" else mu).exp().mean() < 0.9
    expected = [[], [], [], []]
    for e in range(4):
        total = 0
        for step in log:
            total += step["rewards"][e].item()
            if step["terminations"][e] | step["truncations"][e]:
                expected[e].append(total)
                total = 0
    torch.testing.assert_close(returns.view(3, 4), torch.tensor([x[:3] for x in expected]).T)
    assert min(map(len, expected)) == 3  # and then it stopped


def test_learners_sample_unless_greedy():
    args = magpo.Args(env="matrix_sum10", num_envs=64)
    guider, learner = magpo.build(args, magpo.make_envs(args, 1))
    greedy, sampled = (magpo.evaluate(args, guider, learner, policy, 512, 1) for policy in ("learner_greedy", "learner"))
    assert greedy.std() == 0 and sampled.std() > 0
    assert torch.equal(sampled, magpo.evaluate(args, guider, learner, "learner", 512, 1))
    assert not torch.equal(sampled, magpo.evaluate(args, guider, learner, "learner", 512, 2))


# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------


def test_variants_are_set_up_as_named():
    expected = {  # delta, lam, residual
        (): (1.7, 3.0, False),
        ("ctds",): (math.inf, 0.0, False),
        ("mappo",): (1.7, 0.0, False),
        ("magpo", "reset"): (math.inf, 0.0, True),
    }
    for names, options in expected.items():
        args = magpo.Args(delta=1.7, lam=3.0, **dict(zip(("algo", "backtracking"), names)))
        assert (args.delta, args.lam, args.residual) == options
    with pytest.raises(TypeError, match="no option speed"):
        magpo.Args(speed=1)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(gae_lambda=1.5), "gamma and gae_lambda"),
        (dict(seed=2**32), "seed must lie"),
        (dict(env="gym:x", num_workers=3, num_envs=8), "one process per copy"),
        (dict(env_kwargs="[[1]]"), "must be a JSON object"),
        (dict(env_kwargs="3"), "must be a JSON object"),
        (dict(env_kwargs="{"), "must be a JSON object"),
        (dict(env="coordsum_3x10", state=True), "no state"),
        (dict(algo="mapo"), "algo must be"),
        (dict(backtracking="Reset"), "backtracking must be"),
    ],
)
def test_validate_refuses(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        magpo.validate(magpo.Args(**options))


def test_help_shows_the_preset_of_the_environment(monkeypatch, capsys):
    for words in (["--env", "coordsum_3x10"], ["--env=coordsum_3x10"]):
        monkeypatch.setattr("sys.argv", ["magpo.py", *words, "--help"])
        with pytest.raises(SystemExit):
            magpo.main()
        assert f"default: {magpo.PRESETS['coordsum']['total_timesteps']}" in " ".join(capsys.readouterr().out.split())


def test_state_is_given_on_demand_only():
    for state in (False, True):
        args = magpo.Args(env="mpe_spread", state=state)
        env = magpo.make_envs(args, 2)
        guider, _ = magpo.build(args, env)
        assert (guider.state_in is not None) == ("state" in env.reset(seed=0)[1]) == state


# ----------------------------------------------------------------------------------------------------------------------
# A run that can be trusted: resume, stop, fail well, several processes
# ----------------------------------------------------------------------------------------------------------------------


class After(list):
    """A list that something is put into when it has been asked for its length so many times, once per iteration."""

    def __init__(self, iterations):
        super().__init__([None] * (1 - iterations) if iterations < 1 else [])
        self.left = iterations

    def __len__(self):
        self.left -= 1
        return int(self.left <= 0)


def without_times(rows):
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


RESUMED = [
    dict(env="mpe_spread", algo="mappo"),
    dict(env="mpe_spread_partial", recurrent=True, state=True),
    dict(env="coordsum_3x10", recurrent=True, num_steps=7, total_timesteps=8 * 7 * 5),
    dict(env="matrix_sum10", backtracking="reset"),
]


@pytest.mark.parametrize("options", RESUMED, ids=lambda options: options["env"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(options, tmp_path, capsys):
    args = QUICK | dict(total_timesteps=200, eval_episodes=8, save_every=4, runs_dir=str(tmp_path), seed=3) | options
    whole = magpo.train(magpo.Args(**args))
    part = magpo.train(magpo.Args(**args), After(2))
    assert f"Stopped after iteration 2. To go on: python magpo.py --resume {part}" in capsys.readouterr().out
    assert len(read_metrics(part)) == 2
    torch.rand(5)  # what else drew random numbers meanwhile does not matter
    assert magpo.train(magpo.Args(resume=str(part / "checkpoint.pt"))) == part
    assert without_times(read_metrics(part)) == without_times(read_metrics(whole))
    ours, theirs = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (part, whole))
    assert ours["iteration"] == theirs["iteration"] == 5
    for name in ("guider", "learner", "value_norm"):
        assert all(torch.equal(x, y) for x, y in zip(ours[name].values(), theirs[name].values(), strict=True))
    assert all(
        torch.equal(x, y) for x, y in zip(ours["here"]["envs"].values(), theirs["here"]["envs"].values()) if torch.is_tensor(x)
    )
    seconds = [float(row["seconds"]) for row in read_metrics(part)]
    assert seconds == sorted(seconds)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    options = QUICK | dict(eval_episodes=np.int64(8), runs_dir=tmp_path)  # of types that a checkpoint could not hold
    run_dir = magpo.train(magpo.Args(env="matrix_xor", **options))
    before = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    magpo.train(magpo.Args(resume=str(run_dir)))
    after = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert before["iteration"] == after["iteration"] == 3 and len(read_metrics(run_dir)) == 3
    assert all(torch.equal(before["learner"][name], after["learner"][name]) for name in before["learner"])


def test_environments_that_cannot_be_saved_start_anew(tmp_path, capsys):
    args = QUICK | dict(
        env="pettingzoo:mpe2.simple_spread_v3", num_envs=2, num_minibatches=2, eval_episodes=2, total_timesteps=40
    )
    run_dir = magpo.train(magpo.Args(**args, runs_dir=str(tmp_path)), After(2))
    magpo.train(magpo.Args(resume=str(run_dir)))
    assert "Episodes start anew: these environments cannot be saved" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(run_dir)] == ["10", "20", "30", "40"]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def damaged(kind, path, good):
    """Write a file that is no checkpoint."""
    content = {"empty": b"", "cut": good.read_bytes()[:-200], "foreign": b"Dear checkpoint,\nhow are you?\n"}.get(kind)
    if kind == "malicious":
        torch.save(dict(version=1, args=Malicious(path.with_name("pwned"))), path)
    elif kind == "old":
        torch.save(torch.load(good, weights_only=True) | {"version": 0}, path)
    elif kind == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind != "missing":
        path.write_bytes(content)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run folder of a very short training on mpe_spread, and what it printed."""
    printed = types.SimpleNamespace(text="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "builtins.print", lambda *words, **_: setattr(printed, "text", printed.text + " ".join(map(str, words)) + "\n")
        )
        args = magpo.Args(
            env="mpe_spread", seed=5, **QUICK | dict(eval_episodes=16), runs_dir=str(tmp_path_factory.mktemp("runs"))
        )
        return magpo.train(args), printed.text


@pytest.mark.parametrize("option", ["--eval", "--resume"])
@pytest.mark.parametrize("kind", ["empty", "cut", "foreign", "malicious", "old", "other", "missing"])
def test_what_is_no_checkpoint_is_refused_in_one_sentence(kind, option, trained, tmp_path, monkeypatch, capsys):
    path = tmp_path / "checkpoint.pt"
    damaged(kind, path, trained[0] / "checkpoint.pt")
    monkeypatch.setattr(sys, "argv", ["magpo.py", option, str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        magpo.main()
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and f"{path} cannot be read as a checkpoint" in printed
    assert not (tmp_path / "pwned").exists()
    if kind == "malicious":  # the same file does run code where it is trusted
        with pytest.raises(AttributeError):
            torch.load(path, weights_only=False)["args"].keys()
        assert (tmp_path / "pwned").exists()


def test_eval_prints_the_table_of_the_run(trained, monkeypatch, capsys):
    run_dir, printed = trained
    monkeypatch.setattr(sys, "argv", ["magpo.py", "--eval", str(run_dir / "checkpoint.pt")])
    torch.set_num_threads(2)
    magpo.main()
    table = capsys.readouterr().out
    assert "(heuristic)" in table and table in printed and torch.get_num_threads() == 1


def test_healthy_ranges_hold_nine_of_ten_values(trained, capsys):
    make.healthy(trained[0])
    values = [float(row["kl"]) for row in read_metrics(trained[0])]
    low, high = map(float, re.search(r"^kl +(\S+) to (\S+)", capsys.readouterr().out, re.M).groups())
    assert min(values) * 0.99 <= low <= high <= max(values) * 1.01


def test_resuming_from_python_keeps_the_runs_options(trained):
    run_dir, _ = trained
    resumed = magpo.Args(resume=str(run_dir), total_timesteps=400)
    assert (resumed.seed, resumed.num_envs, resumed.total_timesteps) == (5, QUICK["num_envs"], 400)


def test_eval_on_another_compatible_environment(trained, monkeypatch, capsys):
    """The table's returns on mpe2 are those of mpe2 stepped by hand: see test_learners_score_the_same_on_mpe2."""
    words = ["--eval", str(trained[0]), "--env", "pettingzoo:mpe2.simple_spread_v3", "--eval-episodes", "4", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["magpo.py", *words])
    magpo.main()
    table = capsys.readouterr().out
    args, guider, learner = magpo.load(trained[0], env="pettingzoo:mpe2.simple_spread_v3", seed=1)
    assert "pettingzoo:mpe2.simple_spread_v3, magpo, seed 1: mean team return over 4 episodes" in table
    assert f"learner {magpo.evaluate(args, guider, learner, 'learner', 4, 3).mean():24.2f}" in table


def test_the_table_says_how_many_episodes_it_played_and_closes_its_environments(trained, monkeypatch, capsys):
    make_envs, opened = magpo.make_envs, []

    def watched(*args):
        opened.append(make_envs(*args))
        return opened[-1]

    monkeypatch.setattr(magpo, "make_envs", watched)
    args, guider, learner = magpo.load(trained[0], eval_episodes=QUICK["num_envs"] + 1)
    magpo.print_table(args, guider, learner)
    assert f"over {2 * QUICK['num_envs']} episodes" in capsys.readouterr().out  # every copy plays equally many
    assert len(opened) == 5 and all(env.closed for env in opened)


@pytest.mark.parametrize("env", ["mpe_spread_5ag", "mpe_spread_continuous", "coordsum_3x10"])
def test_eval_refuses_an_environment_of_another_shape(env, trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["magpo.py", "--eval", str(trained[0]), "--env", env])
    with pytest.raises(SystemExit) as stop:
        magpo.main()
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and f"does not fit {env}" in printed


def test_eval_takes_the_options_of_the_run(trained, monkeypatch, capsys):
    words = ["--eval", str(trained[0]), "--env-kwargs", '{"max_cycles": 3}', "--eval-episodes", "8", "--seed", "5"]
    monkeypatch.setattr(sys, "argv", ["magpo.py", *words])
    magpo.main()
    table = capsys.readouterr().out
    assert "mpe_spread, magpo, seed 5: mean team return over 8 episodes" in table and "heuristic" not in table  # of 3 steps


@pytest.mark.parametrize("option", ['--env-kwargs {"num_targets":30}', "--num-envs 0"])
def test_eval_refuses_wrong_options(option, trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["magpo.py", "--eval", str(trained[0]), *option.split()])
    with pytest.raises(SystemExit) as stop:
        magpo.main()
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and ("num_targets" in printed or "num_envs must be" in printed)


@pytest.mark.parametrize("option", ["--env mpe_spread", "--seed=1", "--no-anneal-lr", "--num_envs 8"])
def test_resume_takes_no_other_options(option, trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["magpo.py", "--resume", str(trained[0]), *option.split()])
    with pytest.raises(SystemExit) as stop:
        magpo.main()
    assert stop.value.code == 2 and "by the run's own options: give no others" in capsys.readouterr().err


def test_values_of_options_are_not_options(trained, tmp_path, monkeypatch):
    shutil.copytree(trained[0], tmp_path / "seed")  # a run's folder may have any name
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["magpo.py", "--resume", "seed"])
    with pytest.raises(SystemExit) as stop:
        magpo.main()
    assert stop.value.code == 0


@pytest.mark.parametrize("number, code", [(2, 130), pytest.param(15, 143, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_after_its_iteration(number, code, tmp_path):
    command = f"{sys.executable} {HERE / 'magpo.py'} --env coordsum_3x10 --eval-episodes 8 --total-timesteps 100000000"
    with subprocess.Popen(
        command.split(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        for _ in range(600):
            if list(tmp_path.glob("runs/*/metrics.csv")):
                break
            time.sleep(0.1)
        process.send_signal(number)
        printed = process.communicate(timeout=60)[0]
    (run_dir,) = tmp_path.glob("runs/*")
    assert process.returncode == code and "learner_greedy" in printed
    assert f"To go on: python magpo.py --resume {run_dir.relative_to(tmp_path)}" in printed
    assert magpo.read_checkpoint(run_dir)["iteration"] == len(read_metrics(run_dir))


@pytest.mark.slow
def test_fifty_kills_leave_a_checkpoint_that_loads(tmp_path):
    """kill -9 after random times, from 0 to 2 s; each process goes on from what the one before it left."""
    options = dict(env="coordsum_3x10", num_envs=8, num_steps=10, num_minibatches=4, eval_episodes=8, save_every=1)
    run_dir = magpo.train(magpo.Args(**options, runs_dir=str(tmp_path), total_timesteps=10**8), After(1))  # imports all, too
    rng, process_of, iterations = random.Random(0), multiprocessing.get_context("fork").Process, []
    for _ in range(50):
        process = process_of(target=magpo.train, args=(magpo.Args(resume=str(run_dir)),))
        process.start()
        process.join(rng.uniform(0, 2))
        process.kill(), process.join()
        iterations.append(magpo.read_checkpoint(run_dir)["iteration"])
        assert len(read_metrics(run_dir)) - iterations[-1] <= 1
    assert iterations == sorted(iterations) and iterations[-1] > 5


@pytest.mark.parametrize("part", ["observation", "reward", "final_obs"])
def test_numbers_of_the_environment_that_are_not_finite_stop_the_run(part, tmp_path, fake, monkeypatch):
    step, calls = Fake.step, []

    def breaks(self, actions):
        obs, rewards, *rest = step(self, actions)
        calls.append(0)
        if len(calls) > 2 * 200 + 2 * 8 * 5:  # after two probes and two iterations of 8 copies
            broken = dict.fromkeys("abc", math.nan)
            if part == "reward":
                rewards = broken
            elif part == "observation" or all(rest[1].values()):
                obs = {agent: math.nan * x for agent, x in obs.items()}
        return obs, rewards, *rest

    monkeypatch.setattr(Fake, "step", breaks)
    args = magpo.Args(
        env="pettingzoo:fake", **QUICK | dict(eval_every=99, save_every=1, total_timesteps=200), runs_dir=str(tmp_path)
    )
    monkeypatch.setattr(magpo, "evaluate", lambda *_: torch.zeros(1))
    with pytest.raises(FloatingPointError, match=f"iteration [2-5]: {part} is not finite; likely cause: pettingzoo:fake"):
        magpo.train(args)
    (path,) = tmp_path.glob("*/checkpoint.pt")
    assert magpo.read_checkpoint(path)["iteration"] >= 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    calls, loss = [], magpo.learner_loss
    monkeypatch.setattr(magpo, "learner_loss", lambda *x: calls.append(0) or loss(*x) * (math.inf if len(calls) == 30 else 1))
    words = "--env coordsum_3x10 --num-envs 8 --num-steps 5 --num-minibatches 4 --total-timesteps 400 --save-every 1 --runs-dir"
    monkeypatch.setattr(sys, "argv", ["magpo.py", *words.split(), str(tmp_path)])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stop:
        magpo.main()
    signal.signal(signal.SIGINT, handlers[0]), signal.signal(signal.SIGTERM, handlers[1])
    assert re.search("iteration 3: learner_loss is not finite; likely cause: too high a learning rate", stop.value.code)
    (path,) = tmp_path.glob("*/checkpoint.pt")
    saved = magpo.read_checkpoint(path)
    assert saved["iteration"] == 2 and all(x.isfinite().all() for x in saved["learner"].values())


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    calls, fsync = [], os.fsync

    def full(file):
        calls.append(0)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        magpo.train(magpo.Args(env="matrix_xor", **QUICK | dict(save_every=1), runs_dir=str(tmp_path)))
    (path,) = tmp_path.glob("*/checkpoint.pt")
    assert magpo.read_checkpoint(path)["iteration"] == 1


def test_a_folder_that_cannot_be_written_is_one_sentence_before_training(tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("a file, not a folder")
    result = run(f"python {HERE / 'magpo.py'} --env matrix_xor", tmp_path)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "magpo.py: [Errno" in result.stderr


TORCHRUN = """
import atexit, glob, sys
def threads_left():
    print("threads:", [open(name).read().strip() for name in glob.glob("/proc/self/task/*/comm")], file=sys.stderr)
atexit.register(threads_left)  # first in, last out
import torch, magpo
from envs import RANK, WORLD
folder, mode, saved = sys.argv[1], sys.argv[2], {}
build = magpo.build
magpo.build = lambda *x: saved.setdefault("nets", build(*x))
options = dict(env="mpe_spread", num_envs=8, num_steps=5, num_minibatches=4, total_timesteps=120, eval_episodes=8, runs_dir=folder)
if mode == "first_step":  # the same data in one process as in two: copies, actions and their order fixed
    options |= dict(num_minibatches=1, update_epochs=1, total_timesteps=40, max_grad_norm=1e9)
    make = magpo.make_envs
    class Half:
        def __init__(self, args, num_envs, device="cpu"):
            self.envs, self.num_envs = make(args, 8, device), num_envs
            self.mine = slice(RANK * num_envs, (RANK + 1) * num_envs)
        def __getattr__(self, name):
            return getattr(self.envs, name)
        def cut(self, x):
            return {k: self.cut(v) for k, v in x.items()} if isinstance(x, dict) else x[self.mine]
        def reset(self, seed, options=None):
            return map(self.cut, self.envs.reset(seed=1))
        def step(self, actions):
            everyone = torch.zeros(8, 3, dtype=torch.long)
            everyone[self.mine] = actions
            return map(self.cut, self.envs.step(everyone))
    magpo.make_envs, magpo.evaluate = Half, lambda *_: torch.zeros(2)
    magpo.sample = lambda policy: policy.logits.argmax(-1)
magpo.train(magpo.Args(**options))
nets = saved["nets"]
parameters = [x for net in nets for x in net.parameters()]
torch.save([[x.data for x in parameters], [x.grad for x in parameters], torch.rand(3)], f"{folder}/{WORLD}{RANK}.pt")
"""


def torchrun(processes, mode, folder):
    (folder / "script.py").write_text(TORCHRUN)
    command = (
        f"python -m torch.distributed.run --standalone --nproc-per-node {processes} {folder / 'script.py'} {folder} {mode}"
    )
    result = run(command, folder, {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    # A thread of gloo's that outlives the process group aborts its process now and then, when the interpreter ends
    assert result.stderr.count("threads:") == processes
    assert not re.search("threads:.*gloo", result.stderr)
    return result.stdout, [torch.load(folder / f"{processes}{rank}.pt") for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_stay_equal(tmp_path):
    printed, (first, second) = torchrun(2, "train", tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(first[0], second[0], strict=True))
    assert not torch.equal(first[2], second[2])  # while each drew random numbers of its own
    (run_dir,) = tmp_path.glob("mpe_spread*")  # one folder, one table: rank 0's
    assert printed.count("learner_greedy") == 1 and [row["step"] for row in read_metrics(run_dir)] == ["40", "80", "120"]


def test_ranks_have_seeds_of_their_own(monkeypatch, tmp_path):
    """PyTorch's generator heeds 32 bits of a seed only, so that ranks are told apart by their first random numbers."""
    args = magpo.asdict(magpo.Args(env="matrix_xor", runs_dir=str(tmp_path)))
    drawn = {}
    for rank in range(3):
        monkeypatch.setattr(envs, "RANK", rank)
        run = envs.Run(args)
        run.restore({})
        drawn[rank] = (*torch.rand(2).tolist(), *envs.make("mpe_spread", 1).reset(seed=run.seed)[0][0, 0, :6].tolist())
    sys.stdout = sys.__stdout__
    assert len(set(drawn.values())) == 3


def test_episodes_of_one_process_are_not_shared_among_several(monkeypatch, tmp_path, capsys):
    run_dir = magpo.train(magpo.Args(env="coordsum_3x10", **QUICK | dict(eval_episodes=8), runs_dir=str(tmp_path)), After(1))
    run = envs.Run(magpo.asdict(magpo.Args(resume=str(run_dir))))
    monkeypatch.setattr(envs, "WORLD", 2)
    assert run.restore({}) == {} and "Episodes start anew" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    """Actions that do not move (all copies and their order fixed): gradients of two halves average to that of the whole."""
    ((_, one, _),) = torchrun(1, "first_step", tmp_path)[1]
    for _, gradients, _ in torchrun(2, "first_step", tmp_path)[1]:
        assert sum(x.abs().sum() for x in one) > 0.1
        for x, y in zip(one, gradients, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: figures/watch.py
# ----------------------------------------------------------------------------------------------------------------------


def untrained(env, **options):
    """Args, and a learner that no training has touched, but far from uniform."""
    args = magpo.Args(env=env, **options)
    copies = magpo.make_envs(args, 1)
    torch.manual_seed(3)
    learner = magpo.build(args, copies)[1]
    copies.close()
    torch.nn.init.normal_(learner.policy_head.weight, std=0.3)
    return args, learner


SPREADS = (
    ("mpe_spread", {}, {}),
    (
        "mpe_spread",
        {"recurrent": True, "env_kwargs": '{"max_cycles": 7, "local_ratio": 0.2}'},
        {"max_cycles": 7, "local_ratio": 0.2},
    ),
    ("mpe_spread_continuous", {"env_kwargs": '{"max_cycles": 7}'}, {"continuous_actions": True, "max_cycles": 7}),
    (
        "mpe_spread_partial",
        {"env_kwargs": '{"max_cycles": 7}'},
        {"max_cycles": 7, "num_agent_neighbors": 1, "num_landmark_neighbors": 1},
    ),
    ("mpe_spread_10ag", {"env_kwargs": '{"max_cycles": 7}'}, {"N": 10, "max_cycles": 7}),
    ("pettingzoo:mpe2.simple_spread_v3", {"env_kwargs": '{"max_cycles": 7}'}, {"max_cycles": 7}),
)


@pytest.mark.parametrize(
    "env, options, mpe2_options", [SPREADS[1], *(pytest.param(*x, marks=pytest.mark.slow) for x in (SPREADS[0], *SPREADS[2:]))]
)
@torch.no_grad()
def test_render_shows_what_the_learners_do_in_mpe2(env, options, mpe2_options, tmp_path):
    """Three episodes by hand: every agent is asked alone, the others' observations are nan, a memory is its whole past."""
    (args, learner), seed, path = untrained(env, **options), 5, tmp_path / "play.gif"
    before = torch.get_rng_state()
    returns = watch.render(args, learner, path, seed)
    assert torch.equal(torch.get_rng_state(), before)

    by_hand, pictures = [], []
    game = simple_spread_v3.parallel_env(render_mode="rgb_array", **mpe2_options)
    torch.manual_seed(seed)
    for episode in range(3):
        seen, _ = game.reset(seed=seed + episode)
        past, total = [], 0.0
        pictures.append(game.render())
        while game.agents:
            past.append(torch.tensor(np.stack([seen[agent] for agent in game.agents]))[None])  # (1, N, D)
            T, N = len(past), len(game.agents)
            first = torch.arange(T)[:, None] == 0
            params = []
            for i in range(N):
                alone = torch.full((T, 1, N, past[0].shape[-1]), torch.nan)
                alone[:, :, i] = torch.stack(past)[:, :, i]
                memory = [torch.full((1, N, args.hidden_dim), 9.0), first]
                params.append(learner.params(alone, memory)[-1, :, i])
            actions = magpo.distribution(torch.stack(params, 1), learner.continuous).sample()[0].numpy()  # (N,), or (N, A)
            actions = actions.clip(0, 1) if learner.continuous else actions
            seen, rewards, *_ = game.step(dict(zip(game.agents, actions)))
            total += sum(rewards.values()) / N
            pictures.append(game.render())
        by_hand.append(total)
    game.close()
    assert returns == pytest.approx(by_hand, abs=1e-4) and len(set(returns)) == 3

    with Image.open(path) as gif:
        assert gif.format == "GIF"
        frames = [np.asarray(frame.convert("RGB"), float) for frame in ImageSequence.Iterator(gif)]
    assert len(frames) == len(pictures) and path.stat().st_size < 300_000
    assert all((a != b).any() for a, b in itertools.pairwise(frames))
    for frame, picture in zip(frames, pictures):
        expected = np.asarray(ImageOps.contain(Image.fromarray(picture), (watch.SIZE, watch.SIZE)), float)
        assert np.abs(frame[watch.LINE :] - expected).mean() < 0.5


@pytest.mark.slow
def test_render_long_episodes(tmp_path, monkeypatch):
    """A first episode that fills the film is the only one; of its frames only some are kept, the last one among them."""
    monkeypatch.setattr(watch, "MAX_FRAMES", 8)
    args, learner = untrained("pettingzoo:mpe2.simple_v3", env_kwargs='{"max_cycles": 20}')
    assert len(watch.render(args, learner, tmp_path / "play.gif")) == 1
    with Image.open(tmp_path / "play.gif") as gif:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
    assert durations == [100] * 7 + [1500]  # the start, then what steps 3, 6, ..., 18 led to, and step 20


@pytest.mark.parametrize("recurrent, num_targets", [(False, 30), (True, 30), (False, 20)])
@torch.no_grad()
def test_render_coordsum(recurrent, num_targets, tmp_path):
    args, learner = untrained("coordsum_3x10", recurrent=recurrent, env_kwargs=f'{{"num_targets": {num_targets}}}')
    env = envs.make("coordsum_3x10", num_targets, num_targets=num_targets)
    env.reset(seed=1)
    env.target = torch.arange(num_targets)
    memory = magpo.empty_memories(args, env, "cpu")[1]
    probs = learner(env._observe(), None, memory).probs.numpy()  # (M, N, A)
    joint = np.einsum("mi,mj,mk->mijk", *probs.transpose(1, 0, 2))
    named = np.add.outer(np.add.outer(np.arange(10), np.arange(10)), np.arange(10))
    hits = [joint[target][named == target].sum() for target in range(num_targets)]

    assert watch.render(args, learner, tmp_path / "policy.PNG") == pytest.approx([np.mean(hits)], abs=1e-6)
    with Image.open(tmp_path / "policy.PNG") as image:
        assert image.format == "PNG"
    figure = watch.draw_coordsum(args, learner, env)[1]
    for i, ax in enumerate(figure.axes[:3]):
        np.testing.assert_allclose(ax.images[0].get_array(), probs[:, i].T, atol=1e-6)
    np.testing.assert_allclose([bar.get_height() for bar in figure.axes[3].patches], hits, atol=1e-6)
    assert ("at an episode's start" in figure.get_suptitle()) == recurrent
    assert f"hit rate {np.mean(hits):.3f}" in figure.get_suptitle()


@pytest.mark.parametrize("env", ["matrix_climbing", "matrix_sum10"])
@torch.no_grad()
def test_render_matrix(env, tmp_path):
    args, learner = untrained(env)
    game = envs.make(env, 1)
    probs = learner(game.reset()[0]).probs[0].numpy()  # (N, A)
    joint = {actions: np.prod([p[a] for p, a in zip(probs, actions)]) for actions in np.ndindex(*game.payoff.shape)}
    expected = sum(p * game.payoff[actions].item() for actions, p in joint.items())

    assert watch.render(args, learner, tmp_path / "policy.png") == pytest.approx([expected], abs=1e-5)
    with Image.open(tmp_path / "policy.png") as image:
        assert image.format == "PNG"
    figure = watch.draw_matrix(args, learner, game)[1]
    np.testing.assert_allclose([bar.get_height() for bar in figure.axes[0].patches], probs.ravel(), atol=1e-6)
    assert f"expected payoff {expected:.3f}, best" in figure.get_suptitle()
    if len(probs) == 2:
        heat = figure.axes[1].images[0].get_array()
        payoffs = {tuple(map(int, text.get_position()))[::-1]: float(text.get_text()) for text in figure.axes[1].texts}
        for actions, p in joint.items():
            assert heat[actions] == pytest.approx(p, abs=1e-6) and payoffs[actions] == game.payoff[actions]


@pytest.mark.parametrize(
    "env, path, sentence",
    [
        ("mpe_spread", "play.png", "mpe_spread is rendered to a .gif file"),
        ("pettingzoo:blind", "play.png", "rendered to a .gif file"),
        ("coordsum_3x10", "policy.gif", "coordsum_3x10 is rendered to a .png file"),
        ("matrix_xor", "policy", "matrix_xor is rendered to a .png file"),
        ("mpe_spread", "nowhere/play.gif", "in a folder that exists"),
        ("gym:Foraging-8x8-2p-2f-coop-v3", "play.gif", "only mpe_spread, coordsum, matrix and pettingzoo: environments"),
        ("pettingzoo:blind", "play.gif", "its pictures do not come as an rgb_array"),
        ("pettingzoo:picky", "play.gif", "cannot be made with the options {'render_mode': 'rgb_array'}"),
    ],
)
def test_render_refuses(env, path, sentence, tmp_path, monkeypatch):
    module = types.ModuleType("blind")
    module.parallel_env = Fake
    monkeypatch.setitem(sys.modules, "blind", module)
    monkeypatch.setitem(sys.modules, "picky", types.ModuleType("picky"))
    sys.modules["picky"].parallel_env = lambda: Fake()
    with pytest.raises(ValueError, match=sentence) as error:
        watch.render(magpo.Args(env=env), None, tmp_path / path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_the_tutorials_snippet_acts_as_the_learners_do(trained):
    (code,) = [block for block in SNIPPETS if "def act(" in block]
    names = {}
    exec(code.replace("runs/my_run", str(trained[0])), names)
    learner, obs = names["learner"], torch.randn(3, 18)
    torch.nn.init.normal_(learner.policy_head.weight, std=3.0)
    for agent in range(3):
        torch.manual_seed(agent)
        chosen = [names["act"](agent, obs[agent].numpy()) for _ in range(400)]
        seen = torch.bincount(torch.tensor(chosen), minlength=5) / 400
        torch.testing.assert_close(seen, learner(obs).probs[agent].detach(), atol=0.1, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring speed: figures/speed.py
# ----------------------------------------------------------------------------------------------------------------------

TINY = dict(num_envs=4, num_steps=5, num_minibatches=2, update_epochs=1)


@pytest.fixture
def speed_csvs(tmp_path, monkeypatch):
    """speed.py writes into a folder of the test's own -> function that reads one of its CSVs."""
    monkeypatch.setattr(speed, "HERE", tmp_path)
    return speed.read


def test_products_are_counted_as_by_hand_and_as_by_torch():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(7, 5), torch.randn(11, 7, requires_grad=True)
    with FlopCounterMode(display=False) as by_torch, speed.Products() as products:
        layer(x).sum().backward()  # forward, the weight's gradient, the input's: 11 x 7 x 5 multiply-adds each
    assert sum(products.counts.values()) == 3
    assert speed.multiply_adds(products.counts) == by_torch.get_total_flops() == 3 * 2 * 11 * 7 * 5
    assert speed.alone(products.counts, repeats=2) > 0


def test_products_of_training_are_those_of_its_layers():
    with speed.Products() as products:
        speed.train(**TINY, total_timesteps=20)
    with speed.Products() as longer:
        speed.train(**TINY | dict(update_epochs=2), total_timesteps=20)
    args = magpo.Args(**TINY)
    networks = magpo.build(args, magpo.make_envs(args, 1))
    layers = [layer.weight for network in networks for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = [networks[0].features.obs_in.weight, networks[1].features.obs_in.weight]  # no gradient goes on to the observations
    rows = args.num_envs * args.num_steps * 3
    epoch = 2 * rows * (3 * sum(weight.numel() for weight in layers) - sum(weight.numel() for weight in inputs))
    assert speed.multiply_adds(longer.counts) - speed.multiply_adds(products.counts) == epoch


def busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_clock_gives_every_cpu_second_to_one_name():
    """Slow one function of each phase down by a known time: its name receives it, whole and alone."""
    plain, slow = Counter(), Counter()
    for times, wait in ((plain, 0.0), (slow, 0.02)):
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            for owner, name in ((magpo.Guider, "act"), (speed.envs.BatchedEnv, "step"), (magpo, "learner_loss")):
                function = getattr(owner, name)
                patch.setattr(owner, name, lambda *a, function=function, wait=wait, **k: (busy(wait), function(*a, **k))[1])
            stack.enter_context(speed.clock(times))
            rows = speed.train(**TINY, total_timesteps=60)
        assert times["iterations"] == 2
        measured = rows[-1]["cpu_seconds"] - rows[0]["cpu_seconds"]
        assert sum(times.values()) - times["iterations"] == pytest.approx(measured, abs=0.05)
    extra = {name: (slow[name] - plain[name]) / 0.02 / 2 for name in slow if name != "iterations"}
    for name, calls in (("rollout: guider", 5), ("rollout: environment", 5), ("update: losses", 2)):
        assert extra.pop(name) == pytest.approx(calls, abs=1)
    assert all(abs(calls) < 1 for calls in extra.values()), extra


def test_clock_leaves_everything_as_it_was():
    before = (
        magpo.Guider.act,
        magpo.Guider.forward,
        torch.Tensor.backward,
        torch.randperm,
        speed.tqdm.__iter__,
        speed.SummaryWriter.add_scalar,
    )
    args = dict(**TINY, total_timesteps=60, seed=3)
    plain, times = speed.train(**args), Counter()
    with speed.clock(times):
        timed = speed.train(**args)
    assert before == (
        magpo.Guider.act,
        magpo.Guider.forward,
        torch.Tensor.backward,
        torch.randperm,
        speed.tqdm.__iter__,
        speed.SummaryWriter.add_scalar,
    )
    for a, b in zip(plain, timed, strict=True):
        assert all(a[key] == b[key] or math.isnan(a[key]) for key in a if "seconds" not in key)


class ReadsBack(TorchDispatchMode):
    """While `on`, an error at every operation that makes a GPU's host wait, as far as a CPU shows them."""

    WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "multinomial", "normal", "masked_select", "equal", "_unique2"}
    on = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        # One number from the host, put where a mask says, is a masked_fill_ in PyTorch: nothing waits
        by_mask = name == "index" or name == "index_put_" and args[2].dim() > 0
        by_mask = by_mask and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not (self.on and (name in self.WAITS or by_mask)), f"{name} reads values back"
        return func(*args, **(kwargs or {}))

    def switch(self, on):
        self.on = on


class Synchronizes(contextlib.nullcontext):
    """The same on a GPU, by PyTorch's own word."""

    def switch(self, on):
        torch.cuda.set_sync_debug_mode("error" if on else "default")


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("algo", ["magpo", "mappo"])
@pytest.mark.parametrize("env", ["mpe_spread", "mpe_spread_continuous", "coordsum_3x10", "matrix_sum10"])
def test_the_host_never_waits_in_the_rollout_or_a_minibatch(env, algo, device, tmp_path, monkeypatch):
    guard, seen = ReadsBack() if device == "cpu" else Synchronizes(), Counter()

    def switching(owner, name, *states):
        """Switch the guard to states[0] before the function is called, and to states[1] after it."""
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            seen[name] += 1
            guard.switch(states[0])
            try:
                return function(*args, **kwargs)
            finally:
                guard.switch(states[-1])

        monkeypatch.setattr(owner, name, wrapped)

    switching(magpo.Guider, "act", True), switching(magpo.Learner, "params", True)  # one of them begins a rollout's step
    switching(magpo.ValueNorm, "stats", False)  # the rollout is over; finding where episodes ended waits, once
    switching(magpo, "compute_gae", True, False)
    switching(torch, "randperm", False, True)
    switching(magpo, "gather", False)  # of what is logged
    monkeypatch.setattr(magpo, "check_finite", lambda *_: None)  # on a GPU, not called in the rollout
    monkeypatch.setattr(magpo, "evaluate", lambda *_: torch.zeros(2))
    options = QUICK | dict(num_envs=16, num_steps=30, num_minibatches=4, total_timesteps=960)
    with guard:
        magpo.train(magpo.Args(env=env, algo=algo, cuda=device == "cuda", runs_dir=str(tmp_path), **options))
    assert min(seen[name] for name in ("params", "stats", "compute_gae", "randperm", "gather")) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_training_is_the_plain_one(device, tmp_path):
    options = QUICK | dict(num_steps=25, total_timesteps=600, runs_dir=str(tmp_path), cuda=device == "cuda")
    plain, compiled = (read_metrics(magpo.train(magpo.Args(**options, compile=compile))) for compile in (False, True))
    for row, other in zip(plain, compiled, strict=True):
        for name in row.keys() - {"seconds", "cpu_seconds", "guider_return", "learner_return"}:
            assert float(other[name]) == pytest.approx(float(row[name]), rel=1e-2, abs=1e-4), name


@pytest.mark.slow
def test_profile_adds_up(speed_csvs, capsys):
    speed.profile(3, **TINY)
    rows = {row["what"]: row for row in speed_csvs("profile")}
    parts = [row for what, row in rows.items() if what not in ("one iteration", "matrix products alone")]
    assert {row["what"].split(":")[0] for row in parts} == {"rollout", "update", "logging"}
    assert sum(float(row["cpu_seconds"]) for row in parts) == pytest.approx(
        float(rows["one iteration"]["cpu_seconds"]), rel=1e-2
    )
    assert sum(float(row["share"]) for row in parts) == pytest.approx(1, abs=1e-2)
    assert 0 < float(rows["matrix products alone"]["cpu_seconds"]) < float(rows["one iteration"]["cpu_seconds"])
    assert "20 steps per iteration" in capsys.readouterr().out


@pytest.mark.slow
def test_throughput_takes_ratios_within_a_round(speed_csvs, monkeypatch):
    rates = iter([(10.0, 4000.0, 20.0), (20.0, 4000.0, 60.0), (40.0, 4000.0, 80.0)])
    now = []
    monkeypatch.setattr(speed, "mpe2_rate", lambda _: now.append(next(rates)) or now[-1][0])
    monkeypatch.setattr(speed, "spread_rate", lambda _: now[-1][1])
    monkeypatch.setattr(speed, "training_rate", lambda _: now[-1][2])
    speed.throughput(3)
    rows = {row["what"]: [float(row[key]) for key in ("median", "lowest", "highest")] for row in speed_csvs("throughput")}
    assert rows["training / mpe2"] == [2, 2, 3]
    assert rows["SimpleSpread, 2,048 copies / mpe2"] == [200, 100, 400]
    assert rows["training"] == [60, 20, 80]


def test_rates_are_rates():
    assert 100 < speed.mpe2_rate(100) < 1e6
    assert speed.spread_rate(3, copies=16) > 100
    assert speed.training_rate(4, **TINY) > 1


@pytest.mark.slow
def test_growth_and_its_picture(speed_csvs, tmp_path):
    speed.growth(sizes=(2, 3), iterations=2, memory_sizes=())
    rows = speed_csvs("growth")
    assert [row["num_agents"] for row in rows] == ["2", "3"]
    assert all(0 < float(row[key]) < 1e5 for row in rows for key in ("act_us", "update_us"))
    speed.draw()
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_quality_reads_the_first_step_at_which_a_score_stands(speed_csvs, tmp_path, capsys):
    returns = {"a": (-26.0, -15.0, -9.0), "b": (-26.0, -16.0, -15.0), "c": (-10.0, -9.4, -9.6)}  # 0.60 is -15.11, 0.90 is -9.50
    lines = [
        f"{10 * (i + 1)},{value},0,magpo,mpe_spread,{name}" for name, row in returns.items() for i, value in enumerate(row)
    ]
    lines.append("99,-7.0,1,magpo,mpe_spread,b")  # a final row is not of the curve
    (tmp_path / "mpe_spread.csv").write_text("\n".join(["cpu_seconds,learner_return,final,algo,env,command", *lines]) + "\n")
    speed.quality()
    out = capsys.readouterr().out.splitlines()
    assert [line.split() for line in out] == [
        ["magpo", "0.60", "median", "20", "seeds", "20", "30", "10"],
        ["magpo", "0.90", "median", "30", "seeds", "30", "inf", "20"],
        ["magpo", "final", "score", "1.03"],  # (-7.0 + 26.34) / (26.34 - 7.63)
    ]


def test_gpu_without_one_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        speed.gpu()
    assert end.value.code == 2
    assert capsys.readouterr().err == "speed.py: gpu needs a GPU that PyTorch can use; there is none here.\n"


@pytest.mark.slow
def test_gpu_benchmark_on_the_cpu(speed_csvs, monkeypatch):
    """All of it but the profiler, in whose place stand 3 kernels of 0.01 s in all, and what must not be counted with them."""
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [(cuda, False, 4e3), (cuda, False, 5e3), (cuda, False, 1e3), (cuda, True, 9e3), (cpu, False, 4e3)]
    names = "device_type", "is_user_annotation", "self_device_time_total"
    events = [types.SimpleNamespace(**dict(zip(names, event))) for event in events]
    profiled = types.SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(profiled))
    train, trained = speed.train, []
    monkeypatch.setattr(speed, "train", lambda **options: trained.append(train(**options)) or trained[-1])
    speed.bench(magpo.Args(**TINY, total_timesteps=120, eval_every=4, eval_episodes=4), device="CPU")
    (row,) = speed_csvs("gpu")
    assert (row["device"], row["steps"]) == ("CPU", "120")
    assert float(row["kernel_share"]) == pytest.approx(0.01 / trained[-1][-1]["seconds"], rel=1e-3)
    assert (len(trained[0]), len(trained[1])) == (6, 5)
    assert float(row["steps_per_second"]) > 1
    assert row["seconds_to_0.9"] == "inf" and float(row["seconds"]) > 0


# ----------------------------------------------------------------------------------------------------------------------
# Course kit
# ----------------------------------------------------------------------------------------------------------------------


needs_kit = pytest.mark.skipif(not kit.BUGS, reason="a hand-out has neither solutions nor bugs")


def outcomes(folder, expression):
    """Run the tests that the expression selects in a tree -> set of (outcome, exercise)."""
    result = run(f"python -m pytest -q --tb=no -rA -k '{expression}'", folder)
    return set(re.findall(r"^(PASSED|FAILED|ERROR) test_magpo.py::test_exercise_([^_]+)", result.stdout, re.M))


@needs_kit
@pytest.mark.slow
def test_hand_out_lacks_the_solutions_and_nothing_else(tmp_path):
    folder = tmp_path / "course"
    kit.handout(folder)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    tracked = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True, check=True).stdout.split("\n")
    assert names == {name for name in tracked if name and not name.startswith("figures/bugs/")}  # no .git either
    texts = {name: (folder / name).read_bytes() for name in names}
    assert {name for name in names if texts[name] != (HERE / name).read_bytes()} == {"magpo.py", "TUTORIAL.md", "test_magpo.py"}
    bodies = "".join(body[0] for body in kit.SOLUTION.finditer((HERE / "magpo.py").read_text()))
    long = [line.strip().encode() for line in bodies.splitlines() if len(line.strip()) > 30]
    assert len(long) > 20 and not [(line, name) for line in long for name in names if line in texts[name]]
    assert texts["magpo.py"].count(b"raise NotImplementedError") == 6 and b"details>" not in texts["TUTORIAL.md"]
    assert b"\nCAUGHT" not in texts["test_magpo.py"]

    assert run("python magpo.py --help", folder).returncode == 0  # imports envs.py, too
    assert outcomes(folder, "exercise") == {("FAILED", name) for name in ("1", "2", "3", "4", "5", "learning")}


@needs_kit
@pytest.mark.slow
@pytest.mark.parametrize("solved", [1, 2, 3, 4])
def test_exercise_needs_only_those_before_it(solved, tmp_path):
    kit.handout(tmp_path / "course")
    exercise = iter([2, 2, 1, 3, 4, 5])  # in the file's order
    source = kit.SOLUTION.sub(
        lambda body: body[0] if next(exercise) <= solved else f"{body[1]}raise NotImplementedError\n",
        (HERE / "magpo.py").read_text(),
    )
    (tmp_path / "course" / "magpo.py").write_text(source)
    expected = {("PASSED" if number <= solved else "FAILED", str(number)) for number in range(1, 6)}
    assert outcomes(tmp_path / "course", "exercise and not learning") == expected


@needs_kit
@pytest.mark.slow
def test_the_kits_commands_run_as_written(tmp_path):
    """With a folder of the test's own in place of the one beside the project; each pytest line selects something."""
    kit_text = (HERE / "TUTORIAL.md").read_text().split("## Course kit")[1]
    makes, tests = (block.splitlines() for block in re.findall(r"```bash\n(.*?)```", kit_text, re.S)[:2])
    for line in makes:
        assert run(line.split("#")[0].replace("../", f"{tmp_path}/"), HERE).returncode == 0, line
    assert (tmp_path / "bugged" / "magpo.py").exists()
    for line in tests:
        result = run(f"python -m {line.split('#')[0]} --collect-only -q", tmp_path / "course")
        assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("words", ["", "handout", "handout .", "bug 0 x", "bug 6 x", "bug x"])
def test_kit_refuses_in_one_sentence(words, tmp_path):
    result = run(f"python {HERE / 'figures' / 'kit.py'} {words}", tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "source",
    ["x = 1\n", "### BEGIN SOLUTION\nx = 1\n", "    ### BEGIN SOLUTION\n    x\n    ### END SOLUTION\n### END SOLUTION\n"],
)
def test_kit_refuses_markers_without_partners(source):
    with pytest.raises(ValueError, match="no solutions to cut"):
        kit.without_solutions(source)


### BEGIN HIDDEN TESTS
CAUGHT = {  # the test that finds each bug of figures/bugs
    "1": lambda *_: test_exercise_2_sampled_logprobs_equal_the_parallel_pass(False, False),
    "2": lambda *_: test_exercise_1_gae_against_brute_force(),
    "3": lambda chaos, _: test_training_on_what_was_seen("magpo", True, chaos),
    "4": lambda _, folder: test_logged_returns_are_of_the_updated_learners(folder),
    "5": lambda *_: test_exercise_2_guider_is_causal(),
}


@needs_kit
@pytest.mark.parametrize("number", CAUGHT)
def test_bugs_apply_import_and_are_caught(number, chaos, tmp_path, monkeypatch):
    assert len(kit.BUGS) == len(CAUGHT)
    CAUGHT[number](chaos, tmp_path)
    kit.bug(number, tmp_path / "bug")
    spec = importlib.util.spec_from_file_location("magpo", tmp_path / "bug" / "magpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    monkeypatch.setattr(sys.modules[__name__], "magpo", module)
    with pytest.raises(AssertionError):
        CAUGHT[number](chaos, tmp_path)


@needs_kit
@pytest.mark.slow
def test_the_hunts_symptoms_are_of_runs_that_symptoms_py_repeats():
    fold = (HERE / "TUTORIAL.md").read_text().split("<details>\n<summary>The five bugs")[1].split("</details>")[0]
    told = {" ".join(options.split()) for options in re.findall(r"`(--(?:env|algo)[^`]*)`", fold)}
    repeated = {frozenset(options.split()) for _, options, _ in load_symptoms().RUNS}
    assert len(told) == 7 and {frozenset(options.split()) for options in told} <= repeated


def load_symptoms():
    spec = importlib.util.spec_from_file_location("symptoms", HERE / "figures" / "bugs" / "symptoms.py")
    symptoms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(symptoms)
    return symptoms


@needs_kit
@pytest.mark.slow
def test_symptoms_are_shown_clean_and_bugged(tmp_path, monkeypatch):
    symptoms = load_symptoms()
    monkeypatch.setattr(symptoms, "__file__", str(tmp_path / "symptoms.py"))
    monkeypatch.setattr(
        symptoms, "RUNS", [(5, f"--env matrix_sum10 --total-timesteps 8192 {symptoms.ONE_STEP}", ["clip_frac"])]
    )
    symptoms.main()
    with open(tmp_path / "symptoms.csv") as file:
        clean, bugged = csv.DictReader(file)
    assert (clean["tree"], float(clean["largest"])) == ("clean", 0) and float(bugged["largest"]) > 0.1


### END HIDDEN TESTS
# ----------------------------------------------------------------------------------------------------------------------
# Documents
# ----------------------------------------------------------------------------------------------------------------------


def anchors(document):
    """Anchors of a Markdown file, as GitHub makes them from its headings, and those it sets itself."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    headings = re.findall(r"^#+ +(.+)$", text, re.M)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return slugs + re.findall(r'<a (?:id|name)="([^"]+)"', text)


@pytest.mark.parametrize("document", ["README.md", "TUTORIAL.md"])
def test_documents_point_at_what_exists(document):
    """Links of a document lead to files and anchors that exist; names and options between backticks are in the code."""
    text = re.sub(r"```.*?```", "", (HERE / document).read_text(), flags=re.S)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]*)\)", text) + re.findall(r'(?:src|href)="([^"]*)"', text):
        if ":" in target:  # the web; only its form, as CI may be without it
            url = urllib.parse.urlsplit(target)
            good = url.scheme == "https" and "." in url.netloc
        else:
            path, _, anchor = target.partition("#")
            file = HERE / (path or document)
            good = file.exists() and (not anchor or anchor in anchors(file))
        wrong += [] if good else [target]

    code = "\n".join(file.read_text() for file in [*HERE.glob("*.py"), *HERE.glob("figures/*.py")])
    options = {"help"} | {field.name.replace("_", "-") for field in magpo.fields(magpo.Args)}
    for span in re.findall(r"`([^`\n]+)`", text):
        if span.startswith(("--", "python magpo.py")):
            good = all(
                option in options or option.removeprefix("no-") in options for option in re.findall(r"--([a-z][a-z-]*)", span)
            )
        elif re.fullmatch(r"test_\w*\*?", span):
            good = any(name == span or span.endswith("*") and name.startswith(span[:-1]) for name in globals())
        elif re.fullmatch(r"[\w./]+\.(py|md|txt|csv|png|ini)", span) and "/" in span:
            good = (HERE / span).exists()
        elif re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", span):
            good = all(re.search(rf"{part}\b", code) for part in span.removesuffix("()").split("."))
        else:
            continue
        wrong += [] if good else [span]
    assert not wrong
