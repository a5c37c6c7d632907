"""train(), evaluate() and the networks of magpo.py, on an environment in which everything happens at random.

The oracles: single copies replayed step by step, numbers computed by hand, and PyTorch's own functions.
"""

import contextlib
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from gymnasium import spaces
from mpe2 import simple_spread_v3
from test_run import QUICK, rows
from torch.utils._python_dispatch import TorchDispatchMode

import envs
import magpo
from support import terminal
from test_magpo import assert_close, networks, randn

torch.set_num_threads(1)


def train(**options):
    """Rows of metrics.csv, without times, of a run."""
    return [{k: float(x) for k, x in row.items()} for row in rows(magpo.train(magpo.Args(**options)))]


# --- The networks' parts ------------------------------------------------------------------------------------


def test_networks_start_orthogonal_and_nearly_uniform():
    for shape, gain in (((6, 16), 5 / 3), ((16, 6), 0.1)):
        layer = magpo.linear(*shape, gain)
        weight = layer.weight.double() / gain
        weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
        torch.testing.assert_close(weight @ weight.T, torch.eye(6).double(), rtol=0, atol=1e-6)
        assert (layer.bias == 0).all()
    torch.manual_seed(0)
    sizes = 3, 6, 5
    guider, learner, obs = magpo.Guider(*sizes), magpo.Learner(*sizes), torch.randn(99, 3, 6)
    for policy in (guider(obs, torch.randint(5, (99, 3)))[0], learner(obs)):
        assert 1e-4 < (policy.probs - 0.2).abs().max() < 0.1


@pytest.mark.parametrize("causal", [False, True])
def test_block_is_pytorchs_attention(causal):
    block, x = magpo.Block(8).double(), randn(4, 8)
    q, k, v = block.qkv(block.norm_1(x)).chunk(3, -1)
    seen = x + block.proj(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal))
    assert_close(block(x, causal=causal)[0], seen + block.mlp(block.norm_2(seen)))


def test_memory_is_pytorchs_gru():
    encoder, gru = networks(recurrent=True)[0].obs_encoder, torch.nn.GRU(12, 12).double()
    for name, parameter in encoder.gru.named_parameters():
        getattr(gru, f"{name}_l0").data.copy_(parameter.data)
    obs, hidden = randn(5, 2, 4, 6), randn(2, 4, 3, 12)
    seen = encoder(obs, (hidden, torch.zeros(5, 2, dtype=torch.bool)))
    encoder.gru = None
    expected, _ = gru(encoder(obs).flatten(1, 2), hidden[:, :, 2].flatten(0, 1).unsqueeze(0).contiguous())
    assert_close(seen.flatten(1, 2), expected)


def test_the_gaussian_is_as_named():
    middle = magpo.distribution(torch.zeros(3, 4), continuous=True)
    torch.testing.assert_close(middle.mode, torch.full((3, 2), 0.5))
    x = torch.tensor([[0.7, 0.1]], dtype=torch.float64)
    pi = magpo.distribution(torch.tensor([[0.1, -0.2, 0.3, 0.4]], dtype=torch.float64), continuous=True)
    mean, std = pi.base_dist.loc, pi.base_dist.scale
    log_probs = -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    assert_close(pi.log_prob(x), log_probs.sum(-1))
    wild = torch.tensor([[10.0, -10.0, 10.0, -10.0]], requires_grad=True)
    far = magpo.distribution(wild, True)
    assert (far.base_dist.scale.log().abs() < 4.1).all()  # never needle sharp or flat
    (gradient,) = torch.autograd.grad(far.log_prob(torch.full((1, 2), 0.5)).sum(), wild)
    assert (gradient.abs() > 1e-4).all()  # and no dead zone, from which nothing leads back
    torch.manual_seed(0)
    seen = magpo.sample(magpo.distribution(torch.tensor([0.1, -0.2, 0.3, 0.4]).expand(100_000, -1), True))
    torch.testing.assert_close(seen.mean(0).double(), mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(seen.std(0).double(), std[0], atol=0.02, rtol=0)


def test_agents_that_have_left_drop_out_of_every_loss():
    """One allowed action: it is taken, and log-probability, entropy and KL are 0, without a gradient."""
    guider, learner = networks()
    obs, mask = randn(9, 4, 6), torch.ones(9, 4, 5, dtype=torch.bool)
    obs[:, 1], mask[:, 1] = 0, torch.arange(5) == 0
    actions, logprobs, _ = guider.act(obs, mask)
    mu, pi = guider(obs, actions, mask)[0], learner(obs, mask)
    parameters = [*guider.parameters(), *learner.parameters()]
    assert (actions[:, 1] == 0).all() and (logprobs[:, 1] == 0).all()
    for x in (mu.log_prob(actions), pi.log_prob(actions), mu.entropy(), magpo.kl_divergence(mu, pi)):
        assert (x[:, 1] == 0).all() and (x[:, 0] != 0).any()
        gradients = torch.autograd.grad(x[:, 1].sum(), parameters, retain_graph=True, allow_unused=True)
        assert all(g is None or (g == 0).all() for g in gradients)


@pytest.mark.parametrize("state", [False, True])
def test_the_global_state_reaches_the_guider_alone(state):
    args = magpo.Args(env="mpe_spread", state=state)
    env = magpo.make_envs(args, 9)
    guider, learner = magpo.build(args, env)
    obs, infos = env.reset(seed=0)
    assert (guider.state_token is not None) == ("state" in infos) == state
    if state:
        actions, seen = torch.zeros(9, 3, dtype=torch.long), infos["state"].requires_grad_()
        torch.nn.init.normal_(guider.correction_head.weight)
        mu, values = guider(obs, actions, state=seen)
        for output in (mu.logits[:, 0, 0], values[:, 0]):
            (gradient,) = torch.autograd.grad(output.sum(), seen, retain_graph=True)
            assert (gradient.abs().amax(0) > 0).all()
        with pytest.raises(TypeError):
            learner(obs, state=seen)


# --- ValueNorm, and units -----------------------------------------------------------------------------------


def test_value_norm_is_the_decaying_mean_and_deviation():
    norm, batches = magpo.ValueNorm(decay=0.9), torch.stack([randn(50) + 1, 3 * randn(50), randn(50) - 2])
    for x in batches:
        norm.update(x)
    weights = np.repeat([0.9**2, 0.9, 1.0], 50)
    mean, square = (np.average(x.flatten(), weights=weights) for x in (batches, batches**2))
    assert [x.item() for x in norm.stats()] == pytest.approx([mean, math.sqrt(square - mean**2)], abs=1e-12)


def test_value_norm_keeps_the_deviation_beside_a_large_mean():
    norm, x = magpo.ValueNorm(), 20_000 + torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    for returns in x:
        norm.update(returns)
    mean, std = norm.stats()
    assert abs(mean - 20_000) < 0.1 and 0.9 < std < 1.1
    assert ((x - mean) / std).dtype == torch.float32  # as the critic's targets must be


def payoffs(payoff):
    return dict(env="matrix_sum10", env_kwargs=json.dumps({"payoff": payoff.tolist()}))


def test_a_multiple_of_a_game_is_the_same_game(tmp_path):
    """Rewards times 2**-20 and 2**20, a millionth and a million: the same training, to rounding."""
    options = QUICK | dict(runs_dir=str(tmp_path))
    games = [train(**options, **payoffs(scale * envs.sum_game())) for scale in (1.0, 2.0**-20, 2.0**20)]
    for three in zip(*games, strict=True):
        for name in three[0].keys() - {"learner_return", "guider_return"}:
            first, *others = (row[name] for row in three)
            assert others == pytest.approx([first] * 2, rel=1e-3, abs=1e-5), name
    assert games[0][-1]["learner_grad_norm"] > 0.01


ONE_SAMPLE = dict(num_envs=1, num_steps=1, num_minibatches=1, total_timesteps=5)


@pytest.mark.parametrize(
    "payoff, more", [([[20_000.0] * 3] * 3, {}), ([[0.0] * 3] * 3, {}), ([1.0, 2.0], ONE_SAMPLE)]
)
def test_nothing_to_average_gives_no_nan(payoff, more, tmp_path, capsys, recwarn):
    options = QUICK | payoffs(torch.tensor(payoff)) | dict(eval_episodes=1, runs_dir=str(tmp_path))
    numbers = [row.items() for row in train(**options | more)]
    assert all(math.isfinite(x) for row in numbers for name, x in row if name != "learner_return")
    out = capsys.readouterr().out
    assert "(1 episodes)" in out and "nan" not in out  # the table shows no interval of one episode
    assert not [w for w in recwarn if "std()" in str(w.message)]


# --- train(), replayed --------------------------------------------------------------------------------------


class Chaos:
    """E copies that end at random, by termination or time-out; masks, agents that leave and states, too.

    Rewards depend on the actions; nothing else does. `log` keeps, per step, what was shown, done and paid.
    `made` keeps the instances.
    """

    single_observation_space = spaces.Box(-1, 1, (3, 2))
    single_action_space = spaces.MultiDiscrete([4] * 3)
    state_dim, references, win_return, note = 5, {}, None, ""
    max_episode_steps, end, made = 200, 0.15, []

    def __init__(self, args, num_envs, device="cpu"):
        self.num_envs, self.device, self.log, self.closed = num_envs, torch.device(device), [], False
        self.observation_space = spaces.Box(-1, 1, (num_envs, 3, 2))
        Chaos.made.append(self)

    def _look(self):
        E, rng = self.num_envs, self.rng
        obs, state = torch.randn(E, 3, 2, generator=rng), torch.randn(E, 5, generator=rng)
        mask, left = torch.rand(E, 3, 4, generator=rng) < 0.6, torch.rand(E, 3, generator=rng) < 0.3
        mask[..., 1] = True
        mask[left], obs[left] = torch.arange(4) == 0, 0.0
        return dict(obs=obs, action_mask=mask, state=state)

    def _infos(self, final):
        now = {k: self.now[k] for k in ("action_mask", "state")}
        return now | dict(final_obs=final["obs"], final_state=final["state"])

    def reset(self, *, seed, options=None):
        self.rng, self.seed = torch.Generator().manual_seed(seed), seed
        self.now = self._look()
        return self.now["obs"], self._infos(self.now)

    def step(self, actions):
        mask, E, rng = self.now["action_mask"], self.num_envs, self.rng
        assert mask.gather(-1, actions.unsqueeze(-1)).all(), "a forbidden action"
        rewards = (actions * torch.randn(E, 3, generator=rng)).sum(-1)
        terminations, truncations = (torch.rand(2, E, generator=rng) < self.end).unbind(0)
        truncations = truncations & ~terminations
        over = terminations | truncations
        final, new = self._look(), self._look()
        step = dict(actions=actions, rewards=rewards, terminations=terminations, truncations=truncations)
        self.log.append(self.now | step | dict(final_obs=final["obs"], final_state=final["state"]))
        self.now = {k: torch.where(over.view(-1, *[1] * (x.dim() - 1)), new[k], x) for k, x in final.items()}
        return self.now["obs"], rewards, terminations, truncations, self._infos(final)

    def state_dict(self):
        return {}

    def close(self):
        self.closed = True


@pytest.fixture
def chaos(monkeypatch, tmp_path):
    """A function that trains on Chaos -> dict of what the run was made of.

    compute_gae, guider_loss, learner_loss: calls: (inputs, output, does it move [guider, learners]).
    adam: steps: (learning rate, gradient norms of [guider, learners], did it move [guider, learners]).
    total: the losses of backward(). Beside them args, networks, rows (metrics.csv), log (Chaos's).
    """
    seen = dict(compute_gae=[], guider_loss=[], learner_loss=[], adam=[], total=[])

    def moves(x):
        loss, moved = x if torch.is_tensor(x) else x[0], []
        for network in seen["networks"] if loss.requires_grad else ():
            parameters = [p for p in network.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            moved.append(any(g is not None and (g.abs() > 1e-6).any() for g in gradients))
        return moved

    def spy(name):
        function = getattr(magpo, name)

        def call(*inputs):
            output = function(*inputs)
            seen[name].append((inputs, output, moves(output)))
            return output

        monkeypatch.setattr(magpo, name, call)

    class Adam(torch.optim.Adam):
        def step(self):
            parameters = [[*network.parameters()] for network in seen["networks"]]
            grads = [[p.grad for p in ps if p.grad is not None] for ps in parameters]
            norms = [torch.nn.utils.parameters_to_vector(gs).norm().item() for gs in grads]
            before = [torch.nn.utils.parameters_to_vector(ps) for ps in parameters]
            super().step()
            after = [torch.nn.utils.parameters_to_vector(ps) for ps in parameters]
            moved = [not torch.equal(*x) for x in zip(before, after, strict=True)]
            seen["adam"].append((self.param_groups[0]["lr"], norms, moved))

    def build(*args, build=magpo.build):
        seen["networks"] = guider, learner = build(*args)
        for head in (guider.own.policy_head, guider.correction_head, learner.policy_head):
            torch.nn.init.normal_(head.weight, std=0.3)
        return guider, learner

    def backward(loss, backward=torch.Tensor.backward):
        seen["total"].append(loss.item())
        backward(loss)

    def run(**options):
        monkeypatch.setattr(magpo, "make_envs", Chaos)
        monkeypatch.setattr(terminal, "make_envs", Chaos)
        monkeypatch.setattr(magpo, "build", build)
        for name in ("compute_gae", "guider_loss", "learner_loss"):
            spy(name)
        monkeypatch.setattr(torch.optim, "Adam", Adam)
        monkeypatch.setattr(torch.Tensor, "backward", backward)
        monkeypatch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n, device=device))
        Chaos.made.clear()
        base = dict(num_envs=5, num_steps=7, num_minibatches=1, update_epochs=1, total_timesteps=105)
        base |= dict(embed_dim=16, hidden_dim=16, state=True, gamma=0.8, eval_every=99, eval_episodes=5)
        options = base | dict(runs_dir=str(tmp_path)) | options
        seen["args"] = magpo.Args(**options)
        seen["rows"] = train(**options)
        seen["log"] = Chaos.made[0].log
        return seen

    return run


@torch.no_grad()
def replay(networks, log, algo="magpo"):
    """mu, pi, V and V of what each step led to, (steps, E, N), from a whole run in one pass."""
    guider, learner = networks
    whole = {k: torch.stack([step[k] for step in log]) for k in log[0]}  # (steps, E, ...)
    obs, mask, state = whole["obs"], whole["action_mask"], whole["state"]
    over = whole["terminations"] | whole["truncations"]
    E = obs.shape[1]
    hidden = torch.zeros(E, 3, 3, 16 if learner.obs_encoder.gru else 0)
    starts = torch.cat([torch.ones(1, E, dtype=torch.bool), over[:-1]])
    pi = learner(obs, mask, (hidden, starts))
    mu, values = guider(obs, whole["actions"], mask, state, (hidden, starts))
    next_values = torch.empty_like(values)
    for t, e in itertools.product(range(len(obs)), range(E)):
        first = starts[: t + 1, e].nonzero().max()  # the episode so far, and then its last observation
        past = {}
        for k in ("obs", "state"):
            past[k] = torch.cat([whole[k][first : t + 1, e], whole[f"final_{k}"][t : t + 1, e]]).unsqueeze(1)
        begins = (torch.arange(len(past["obs"])) == 0).unsqueeze(1)
        _, v = guider.encode(**past, memory=(hidden[:1], begins))
        next_values[t, e] = v[-1, 0]
    return (pi if algo == "mappo" else mu), pi, values, next_values, whole


def episodes_of(log):
    """The last step and the return of each episode that ended: list of a list for each copy."""
    finished, total = [[] for _ in log[0]["rewards"]], torch.zeros(len(log[0]["rewards"]))
    for t, step in enumerate(log):
        total = total + step["rewards"]
        for e in (step["terminations"] | step["truncations"]).nonzero().flatten().tolist():
            finished[e].append((t, total[e].item()))
            total[e] = 0
    return finished


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize(
    "algo, bound, weight", [("magpo", 1.3, 0.7), ("mappo", math.inf, 0.0), ("ctds", math.inf, 0.0)]
)
def test_training_on_what_was_seen(algo, bound, weight, recurrent, chaos):
    """Networks held still: in every iteration the equations get what a replay of the run gives."""
    options = dict(delta=1.3, lam=0.7) if algo == "magpo" else {}
    seen = chaos(algo=algo, recurrent=recurrent, learning_rate=1e-30, gae_lambda=0.95, **options)
    args = seen["args"]
    mu, pi, values, next_values, whole = replay(seen["networks"], seen["log"], algo)
    log_mu, log_pi = mu.log_prob(whole["actions"]), pi.log_prob(whole["actions"])
    kl = magpo.kl_divergence(mu, pi)
    parts = [log_mu, log_pi, values, next_values, kl, mu.entropy()]
    parts += [whole[k].unsqueeze(-1) for k in ("rewards", "terminations", "truncations")]
    assert whole["terminations"].any() and whole["truncations"].any()
    assert (whole["actions"] != mu.mode).any()  # they were sampled
    norm, episodes = magpo.ValueNorm(decay=0.99), sum(episodes_of(seen["log"]), [])

    def close(x, expected):
        torch.testing.assert_close(x.detach().flatten(), expected.flatten().to(x.dtype), rtol=1e-3, atol=1e-5)

    for k, row in enumerate(seen["rows"]):
        mine = [x[7 * k : 7 * k + 7] for x in parts]
        log_mu, log_pi, V, V_next, kl, entropy, rewards, terminations, truncations = mine
        mean, std = norm.stats()
        given, (advantages, returns), _ = seen["compute_gae"][k]
        for x, expected in zip(given[:3], (rewards, V * std + mean, V_next * std + mean), strict=True):
            close(x, expected)
        assert torch.equal(given[3], terminations) and torch.equal(given[4], truncations)
        assert given[5:] == (0.8, 0.95)
        explained = 1 - (returns - given[1]).var(correction=0) / returns.var(correction=0)
        assert row["explained_variance"] == pytest.approx(explained.item(), abs=1e-3)
        norm.update(returns)
        mean, std = norm.stats()
        loss_v = 0.5 * (V - (returns - mean) / std).square()
        normal = (advantages - advantages.mean()) / advantages.std(correction=0)

        inputs_mu, inputs_pi = seen["guider_loss"][k][0], seen["learner_loss"][k][0]
        for x, expected in zip(inputs_mu[:5], (log_mu, log_pi, log_mu, normal, kl), strict=True):
            close(x, expected)
        for x, expected in zip(inputs_pi[:4], (log_pi, log_mu, normal, kl), strict=True):
            close(x, expected)
        assert inputs_mu[5:] == (args.clip_coef, bound) and inputs_pi[4:] == (args.clip_coef, weight)
        for name, expected in (("entropy", entropy), ("kl", kl), ("value_loss", loss_v)):
            assert row[name] == pytest.approx(expected.mean().item(), rel=1e-3, abs=1e-5)

        finished = [total for t, total in episodes if t // 7 == k]
        assert row["guider_return"] == pytest.approx(np.mean(finished), rel=1e-4)


@pytest.mark.parametrize("anneal_lr", [False, True])
@pytest.mark.parametrize("algo", ["magpo", "mappo"])
def test_a_step_of_both_networks(algo, anneal_lr, chaos):
    """Each loss moves its own network, each is clipped alone, rate and entropy bonus go down in step."""
    options = dict(max_grad_norm=1e-3, learning_rate=1e-3, ent_coef=0.3, vf_coef=0.7)
    options |= dict(delta=1.01) if algo == "magpo" else {}
    seen = chaos(algo=algo, anneal_lr=anneal_lr, **options)
    remaining = [1, 2 / 3, 1 / 3] if anneal_lr else [1, 1, 1]
    for k, (row, (lr, norms, moved)) in enumerate(zip(seen["rows"], seen["adam"], strict=True)):
        assert lr == pytest.approx(1e-3 * remaining[k])
        assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2) and moved == [True, True]
        assert min(row["guider_grad_norm"], row["learner_grad_norm"]) > 1e-3  # as they were before
        total = row["guider_loss"] + row["learner_loss"] + 0.7 * row["value_loss"]
        total -= 0.3 * remaining[k] * row["entropy"]
        assert seen["total"][k] == pytest.approx(total, rel=1e-5)
        loss, mask_frac, clip_frac = (x.item() for x in seen["guider_loss"][k][1])
        expected = dict(guider_loss=loss, mask_frac=mask_frac, clip_frac=clip_frac)
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert row["learner_loss"] == pytest.approx(seen["learner_loss"][k][1].item())
        assert seen["guider_loss"][k][2] == ([False, True] if algo == "mappo" else [True, False])
        assert seen["learner_loss"][k][2] == [False, algo == "magpo"]
    assert (seen["rows"][0]["mask_frac"] > 0) == (algo == "magpo")


@pytest.mark.parametrize("recurrent", [False, True])
def test_every_epoch_takes_every_minibatch_with_fresh_gradients(recurrent, chaos):
    """Of single steps, or with memory of whole sequences."""
    options = dict(num_minibatches=5, update_epochs=2, max_grad_norm=1e9, total_timesteps=35)
    seen = chaos(recurrent=recurrent, learning_rate=1e-30, **options)
    norms = torch.tensor([step[1] for step in seen["adam"]])
    assert norms.shape == (10, 2) and len(norms[:, 0].round(decimals=6).unique()) == 5
    torch.testing.assert_close(norms[:5], norms[5:])
    shapes = {tuple(inputs[0].shape) for inputs, *_ in seen["guider_loss"]}
    assert shapes == ({(7, 1, 3)} if recurrent else {(1, 7, 3)})


def test_the_old_policy_is_the_rollouts_in_every_epoch(chaos):
    seen = chaos(update_epochs=3, learning_rate=0.01, total_timesteps=35)
    first, _, last = [inputs for inputs, *_ in seen["guider_loss"]]
    assert torch.equal(last[2], first[2]) and (last[0] - last[2]).abs().max() > 1e-3
    assert all(torch.equal(inputs[1], first[2]) for inputs, *_ in seen["learner_loss"])


@pytest.mark.parametrize("recurrent", [False, True])
def test_after_reset_every_rollout_is_the_learners(recurrent, chaos):
    """And what is kept in the end, and evaluated, is mu = pi, too."""
    seen = chaos(backtracking="reset", recurrent=recurrent, learning_rate=0.05)
    for (log_mu, log_pi, log_mu_old, *_, delta), _, _ in seen["guider_loss"]:
        assert (log_mu - log_pi).abs().max() < 1e-6, "mu is not pi when a rollout starts"
        torch.testing.assert_close(log_mu_old, log_pi, rtol=0, atol=1e-5)
        assert delta == math.inf
    assert all(inputs[-1] == 0 for inputs, *_ in seen["learner_loss"])  # lam
    assert all(step[2] == [True, True] for step in seen["adam"])  # while both networks did move
    mu, pi, *_ = replay(seen["networks"], seen["log"])
    assert_close(mu.logits, pi.logits)


def test_environments_are_seeded_and_closed_and_evaluations_come_in_time(chaos):
    seen = chaos(eval_every=2, total_timesteps=140, seed=5)
    first, *others = Chaos.made
    assert first.seed == 5 and 5 not in [made.seed for made in others if made.log]
    assert all(made.closed for made in Chaos.made)
    assert [math.isnan(row["learner_return"]) for row in seen["rows"]] == [False, False, True, False]
    assert [row["step"] for row in seen["rows"]] == [35, 70, 105, 140]


# --- evaluate() ---------------------------------------------------------------------------------------------


def untrained(monkeypatch, **options):
    """Args and networks on Chaos; nearly deterministic, so that a replay tells what was played."""
    monkeypatch.setattr(magpo, "make_envs", Chaos)
    monkeypatch.setattr(terminal, "make_envs", Chaos)
    args = magpo.Args(num_envs=4, state=True, embed_dim=16, hidden_dim=16, **options)
    torch.manual_seed(0)
    guider, learner = magpo.build(args, Chaos)
    for head in (guider.own.policy_head, guider.correction_head, learner.policy_head):
        torch.nn.init.normal_(head.weight, std=300)
    return args, guider, learner


@pytest.mark.parametrize("policy", ["guider", "learner", "learner_greedy"])
def test_evaluation_by_hand(policy, monkeypatch):
    """Equally many episodes of every copy, by the right policy, and training's random numbers untouched."""
    args, *nets = untrained(monkeypatch, recurrent=True)
    before = torch.get_rng_state()
    returns = magpo.evaluate(args, *nets, policy, 10, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    env = Chaos.made[-1]
    assert env.seed == 3 and env.closed and env.num_envs == 4
    mu, pi, *_, whole = replay(nets, env.log)
    log_mu, log_pi = (x.log_prob(whole["actions"]).exp().mean() for x in (mu, pi))
    assert (log_mu if policy == "guider" else log_pi) > 0.98
    assert (log_pi if policy == "guider" else log_mu) < 0.9
    finished = episodes_of(env.log)
    expected = [x for copy in finished for _, x in copy[:3]]
    assert sorted(returns.tolist()) == pytest.approx(sorted(expected), abs=1e-5)
    assert min(map(len, finished)) == 3  # and then it stopped


def test_learners_sample_unless_greedy():
    args = magpo.Args(env="matrix_sum10", num_envs=64)
    guider, learner = magpo.build(args, magpo.make_envs(args, 1))

    def play(policy, seed, episodes=512):
        return magpo.evaluate(args, guider, learner, policy, episodes, seed)

    assert play("learner_greedy", 1).std() == 0 and play("learner", 1).std() > 0
    assert torch.equal(play("learner", 1), play("learner", 1))
    assert not torch.equal(play("learner", 1), play("learner", 2))
    assert [len(play("learner", 1, episodes)) for episodes in (3, 64, 65)] == [3, 64, 128]
    with pytest.raises(ValueError, match="guider, learner or learner_greedy, but is 'lerner'"):
        play("lerner", 1)


@pytest.mark.parametrize("end, stop_at", [(0.0, 99), (0.15, 99), (0.15, 9)])
def test_evaluation_ends_in_time_and_counts_what_has_finished(end, stop_at, monkeypatch):
    """After so many steps as all episodes can take, or when something is in `stop`."""
    args, *nets = untrained(monkeypatch)
    monkeypatch.setattr(Chaos, "end", end)
    monkeypatch.setattr(Chaos, "max_episode_steps", 5)
    stop, step = [], Chaos.step

    def count(self, actions):
        stop.extend([2] * (len(self.log) + 1 == stop_at))
        return step(self, actions)

    monkeypatch.setattr(Chaos, "step", count)
    returns = magpo.evaluate(args, *nets, "learner", 10, seed=3, stop=stop)
    log = Chaos.made[-1].log
    assert min(3 * 5, stop_at) <= len(log) <= min(3 * 6, stop_at)
    expected = [x for copy in episodes_of(log) for _, x in copy[:3]]
    assert sorted(returns.tolist()) == pytest.approx(sorted(expected), abs=1e-5)
    assert (len(returns) == 0) == (end == 0.0) and returns.mean().isnan() == (end == 0.0)


def test_the_table_shows_what_was_played(monkeypatch, capsys):
    args, *nets = untrained(monkeypatch, eval_episodes=8, total_timesteps=10**6)
    monkeypatch.setattr(Chaos, "win_return", 1.0)
    monkeypatch.setattr(Chaos, "references", {"random": -1.25})
    magpo.print_table(args, *nets, magpo.evaluate)
    first, *lines, last = capsys.readouterr().out.strip().split("\n")
    assert first.startswith("mpe_spread, magpo, seed 1:") and last.split() == ["(random)", "-1.25"]
    for policy, line in zip(("learner", "learner_greedy", "guider"), lines, strict=True):
        x = magpo.evaluate(args, *nets, policy, 8, args.seed + 2)
        shown = f"{x.mean():.2f} +- {1.96 * x.std() / math.sqrt(8):.2f} (8 episodes"
        assert line.split()[0] == policy and shown in line and f"{(x > 1).float().mean():.0%} won" in line
    args.algo = "mappo"
    magpo.print_table(args, *nets, magpo.evaluate)
    assert "guider " not in capsys.readouterr().out  # it has no policy
    played, stop = len(Chaos.made), []
    magpo.print_table(args, *nets, lambda *x: stop.append(2) or magpo.evaluate(*x), stop)
    assert not any(made.log for made in Chaos.made[played:])  # nobody plays on after Ctrl-C
    assert len(stop) == 1 and "episodes" not in capsys.readouterr().out  # and no line says so


@pytest.mark.slow
def test_learners_score_the_same_on_mpe2(tmp_path):
    """Train briefly on the batched environment, then act from the same starts in both."""
    options = dict(num_envs=128, total_timesteps=64_000, eval_episodes=8, runs_dir=str(tmp_path))
    _, _, learner = magpo.load(magpo.train(magpo.Args(env="mpe_spread", **options)))
    learner.requires_grad_(False)
    real, episodes, starts, theirs = simple_spread_v3.parallel_env(N=3, max_cycles=25), 200, [], []
    torch.manual_seed(0)
    for episode in range(episodes):
        obs, _ = real.reset(seed=episode)
        world, total = real.unwrapped.world, 0.0
        starts.append([[x.state.p_pos.copy() for x in group] for group in (world.agents, world.landmarks)])
        while real.agents:
            actions = learner(torch.as_tensor(np.stack([obs[agent] for agent in real.agents]))).sample()
            obs, rewards, *_ = real.step(dict(zip(real.agents, actions.tolist(), strict=True)))
            total += np.mean(list(rewards.values()))
        theirs.append(total)
    env, ours = envs.make("mpe_spread", episodes), np.zeros(episodes)
    env.reset(seed=0)
    env.position, env.landmarks = torch.tensor(np.array(starts), dtype=torch.float32).unbind(1)
    obs = env._observe()
    for _ in range(25):
        obs, rewards, *_ = env.step(learner(obs).sample())
        ours += rewards.numpy()
    difference = ours - theirs
    assert np.mean(theirs) > -24  # well above random, -26.3
    assert abs(difference.mean()) < 2.5 * difference.std() / math.sqrt(episodes) < 1.0


# --- GPUs ---------------------------------------------------------------------------------------------------


class ReadsBack(TorchDispatchMode):
    """While `on`, an error at every operation that makes a GPU's host wait, as far as a CPU shows them."""

    WAITS = "_local_scalar_dense is_nonzero nonzero multinomial normal masked_select equal _unique2".split()
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


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_GPU)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("algo", ["magpo", "mappo"])
@pytest.mark.parametrize("env", ["mpe_spread", "mpe_spread_continuous", "coordsum_3x10", "matrix_sum10"])
def test_the_host_never_waits_in_the_rollout_or_a_minibatch(env, algo, device, tmp_path, monkeypatch):
    guard, seen = ReadsBack() if device == "cpu" else Synchronizes(), Counter()

    def switching(owner, name, *states):
        """Switch the guard to states[0] before the function is called, and to states[-1] after it."""
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            seen[name] += 1
            guard.switch(states[0])
            try:
                return function(*args, **kwargs)
            finally:
                guard.switch(states[-1])

        monkeypatch.setattr(owner, name, wrapped)

    switching(magpo.Guider, "act", True)  # one of the two begins a rollout's step
    switching(magpo.Learner, "forward", True)
    switching(magpo, "compute_gae", True, False)  # what follows waits, once per rollout, for what is logged
    switching(torch, "randperm", False, True)
    switching(magpo, "gather", False)
    switching(magpo.Run, "mean", False)
    monkeypatch.setattr(magpo, "evaluate", lambda *_: torch.zeros(2))
    options = QUICK | dict(num_envs=16, num_steps=30, total_timesteps=960)
    with guard:
        magpo.train(magpo.Args(env=env, algo=algo, cuda=device == "cuda", runs_dir=str(tmp_path), **options))
    assert min(seen[name] for name in ("forward", "compute_gae", "randperm", "mean")) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_training_is_the_plain_one(device, tmp_path, monkeypatch):
    # No pool of compiling processes: forked beside the threads of JAX, it once never came back
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    options = QUICK | dict(env="mpe_spread", num_steps=25, total_timesteps=600, cuda=device == "cuda")
    options |= dict(runs_dir=str(tmp_path))
    plain, compiled = (train(**options, compile=compile) for compile in (False, True))
    for row, other in zip(plain, compiled, strict=True):
        for name in row.keys() - {"guider_return", "learner_return"}:
            assert other[name] == pytest.approx(row[name], rel=1e-2, abs=1e-4), name


@pytest.mark.parametrize(
    "std, options",
    [(0.1, dict(env="mpe_spread")), (0.3, dict(env="matrix_sum10")), (0.7, dict(action_std=0.7))]
    + [(1.0, dict(env="matrix_sum10", backtracking="reset"))],
)
def test_a_guider_starts_as_loud_as_asked(std, options):
    args = magpo.Args(**options)
    torch.manual_seed(0)
    guider, _ = magpo.build(args, envs.make(args.env, 1))
    assert guider.action_token.weight.std().item() == pytest.approx(std, rel=0.25)
