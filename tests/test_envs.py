"""The batched environments against what they claim to be: mpe2 itself, rules written out, payoffs by hand."""

import copy
import itertools
import sys
import types
from statistics import NormalDist

import numpy as np
import pytest
import torch
from mpe2 import simple_spread_v3

import envs
from results import references

torch.set_num_threads(1)
COORDSUM = [name for name in envs.ENVS if name.startswith("coordsum")]
TARGETS = {"3x10": 30, "3x30": 50, "5x20": 80, "8x15": 100}
SPREAD = [  # id, options, mpe2's options
    ("mpe_spread", {}, {"N": 3}),
    ("mpe_spread_5ag", {"local_ratio": 0.2}, {"N": 5, "local_ratio": 0.2}),
    ("mpe_spread_10ag", {}, {"N": 10}),
    ("mpe_spread_continuous", {}, {"N": 3, "continuous_actions": True}),
    ("mpe_spread_3ag_paper", {}, {"N": 3, "continuous_actions": True, "max_cycles": 26}),
    ("mpe_spread_5ag_paper", {}, {"N": 5, "continuous_actions": True, "max_cycles": 26}),
    ("mpe_spread_10ag_paper", {}, {"N": 10, "continuous_actions": True, "max_cycles": 26}),
    ("mpe_spread_partial", {}, {"N": 3, "num_agent_neighbors": 1, "num_landmark_neighbors": 1}),
    ("mpe_spread_5ag", {"num_agent_neighbors": 2}, {"N": 5, "num_agent_neighbors": 2}),
    ("mpe_spread", {"num_landmark_neighbors": 2}, {"N": 3, "num_landmark_neighbors": 2}),
    ("mpe_spread", MANY := {"num_agent_neighbors": 7, "num_landmark_neighbors": 8}, {"N": 3} | MANY),
]


@pytest.mark.parametrize("env_id, options, real_options", SPREAD)
def test_simple_spread_is_mpe2(env_id, options, real_options):
    real = simple_spread_v3.parallel_env(**{"max_cycles": 25, "local_ratio": 0.5} | real_options)
    ours = envs.make(env_id, 1, dtype=torch.float64, **options)
    num_agents, num_features = ours.single_observation_space.shape
    rng, collisions = np.random.default_rng(num_agents), 0
    for episode in range(4):
        real.reset(seed=episode)
        ours.reset(seed=0)
        world, scenario = real.unwrapped.world, real.unwrapped.scenario
        for agent in world.agents:
            agent.state.p_pos *= (1.0, 0.1)[episode % 2]  # crowded, so that they collide
        ours.position = torch.tensor(np.array([[agent.state.p_pos for agent in world.agents]]))
        ours.landmarks = torch.tensor(np.array([[landmark.state.p_pos for landmark in world.landmarks]]))
        for step in range(1, ours.max_episode_steps + 1):
            actions = rng.integers(5, size=num_agents)
            if ours.continuous:  # exact where mpe2 subtracts in float32
                actions = (rng.integers(65, size=(num_agents, 5)) / 64).astype(np.float32)
            _, rewards, _, timeouts, _ = real.step(dict(zip(real.agents, actions, strict=True)))
            _, team_reward, terminations, truncations, infos = ours.step(torch.as_tensor(actions)[None])
            expected = np.array([scenario.observation(agent, world) for agent in world.agents])
            assert expected.shape == (num_agents, num_features)
            np.testing.assert_allclose(infos["final_obs"][0], expected, rtol=0, atol=1e-9)
            assert team_reward.item() == pytest.approx(np.mean(list(rewards.values())), abs=1e-9)
            assert truncations.item() == all(timeouts.values()) == (step == ours.max_episode_steps)
            assert not terminations.any()
            collisions += sum(scenario.is_collision(a, b) for a, b in itertools.combinations(world.agents, 2))
    assert collisions > 0


def test_thrusts_are_clipped_to_the_unit_box():
    env, thrusts = envs.make("mpe_spread_continuous", 4), 3 * torch.rand(4, 3, 5) - 1
    env.reset(seed=0)
    wild = env.step(thrusts)[0]
    env.reset(seed=0)
    assert torch.equal(env.step(thrusts.clamp(0, 1))[0], wild)


def random_split(rng, target, num_agents, num_actions):
    """Actions that add up to the target, where this is possible: (N,)."""
    actions, rest = [], target
    for others in reversed(range(num_agents)):
        low, high = max(0, rest - others * (num_actions - 1)), min(num_actions - 1, rest)
        actions.append(int(rng.integers(low, high + 1)) if low <= high else num_actions - 1)
        rest -= actions[-1]
    return actions


@pytest.mark.parametrize("env_id", COORDSUM)
def test_coordsum_is_the_rules(env_id):
    E = 3
    env = envs.make(env_id, E)
    num_agents, num_targets = env.single_observation_space.shape
    num_actions = int(env.single_action_space.nvec[0])
    assert num_targets == TARGETS[env_id.split("_")[1]] == TARGETS[f"{num_agents}x{num_actions}"]
    rng, obs = np.random.default_rng(0), env.reset(seed=0)[0]
    scores, seen = set(), set()
    for _ in range(3):
        plays = {}  # (copy, target or the official row) -> agent 0's actions in this episode
        for step in range(100):
            targets = obs.argmax(-1)
            assert (obs.max(-1).values == 1).all() and (targets == targets[:, :1]).all()
            actions, expected = [], []
            for e, target in enumerate(targets[:, 0].tolist()):
                actions.append(random_split(rng, target, num_agents, num_actions))
                first = actions[-1][0]
                row = min(target, num_actions - 1) if env_id.endswith("official") else target
                played = plays.setdefault((e, row), [])
                habit = max(range(num_actions), key=lambda a, played=played: (played.count(a), -a))
                hit = sum(actions[-1]) == target
                expected.append(0.0 if not hit else 1.0 if first == habit else 2.0)
                played.append(first)
                seen.add(target)
            obs, rewards, terminations, truncations, _ = env.step(torch.tensor(actions))
            assert rewards.tolist() == expected
            assert (truncations == (step == 99)).all() and not terminations.any()
            scores.update(expected)
    assert {1.0, 2.0} <= scores <= {0.0, 1.0, 2.0}
    assert len(seen) > 0.8 * num_targets


def test_blur_shows_a_target_to_its_neighbours_and_leaves_the_game_alone():
    plain, blurred = envs.make("coordsum_3x10", 64, blur=0), envs.make("coordsum_3x10", 64)
    one_hot, obs = plain.reset(seed=0)[0], blurred.reset(seed=0)[0]
    assert (one_hot.sum(-1) == 1).all() and one_hot.unique().tolist() == [0, 1]
    for target, row in zip(one_hot.argmax(-1)[:, 0].tolist(), obs[:, 0], strict=True):
        bell = NormalDist(target, 2)
        expected = [bell.pdf(t) / bell.pdf(target) for t in range(30)]
        np.testing.assert_allclose(row, expected, atol=1e-6)
    actions = torch.randint(10, (64, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.step(actions)[1], blurred.step(actions)[1])


@pytest.mark.parametrize(
    "env_id, policy, tolerance",
    [
        ("coordsum_3x10", "random", 0.4),
        ("coordsum_3x10", "best without memory", 0.4),
        ("coordsum_3x10", "best with memory", 0.5),
        ("coordsum_3x10_official", "plain split", 0.3),
        ("coordsum_3x10_official", "best without memory", 0.4),
        ("coordsum_3x10_official", "best with memory", 0.5),
        ("mpe_spread", "heuristic", 0.5),
        ("mpe_spread_3ag_paper", "random", 0.5),
        ("mpe_spread_3ag_paper", "heuristic", 0.3),
    ],
)
def test_references_are_what_their_policies_earn(env_id, policy, tolerance):
    env = envs.make(env_id, 4096)
    returns = references.play(env, references.POLICIES[policy], seed=1)
    assert returns.mean().item() == pytest.approx(env.references[policy], abs=tolerance)


def test_references_are_of_the_ids_own_options():
    assert envs.make("mpe_spread", 1, state=True).references == {"random": -26.34, "heuristic": -7.63}
    assert envs.make("mpe_spread_partial", 1).references == {"random": -26.34}
    assert envs.make("mpe_spread", 1, max_cycles=50).references == {}


@pytest.mark.parametrize(
    "env_id, best, mean",
    [("climbing", 11, -31 / 9), ("penalty", 10, -178 / 9), ("xor", 1, 0.5), ("sum10", 1, 63 / 1000)],
)
def test_matrix_games_have_known_payoffs(env_id, best, mean):
    assert envs.make(f"matrix_{env_id}", 1).references == pytest.approx({"best": best, "random": mean})


def test_matrix_games_pay_once_and_end():
    env, actions = envs.make("matrix_sum10", 64), torch.randint(10, (64, 3))
    env.reset(seed=0)
    _, rewards, terminations, truncations, _ = env.step(actions)
    assert rewards.tolist() == [float(sum(joint) == 10) for joint in actions.tolist()]
    assert terminations.all() and not truncations.any()
    four = envs.MatrixGame(2, payoff=torch.arange(16.0).view(2, 2, 2, 2))
    assert four.step(torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]]))[1].tolist() == [11.0, 1.0]


@pytest.mark.parametrize("env_id", envs.ENVS)
def test_vector_interface(env_id):
    env = envs.make(env_id, 5)
    assert env.metadata["autoreset_mode"] == envs.AutoresetMode.SAME_STEP
    assert env.win_return is None and env.note == "" and env.state_dim == 0
    obs, infos = env.reset(seed=3)
    assert infos.keys() == {"final_obs"} and torch.equal(infos["final_obs"], obs)
    env.action_space.seed(0)
    for step in range(1, env.max_episode_steps + 1):
        assert obs.dtype == torch.float32 and env.observation_space.contains(obs.numpy())
        last = obs
        obs, rewards, terminations, truncations, infos = env.step(env.action_space.sample())
        assert infos.keys() == {"final_obs"}
        assert rewards.shape == terminations.shape == truncations.shape == (5,)
        assert rewards.dtype == torch.float32 and terminations.dtype == truncations.dtype == torch.bool
        ended = terminations | truncations
        assert ended.all() == ended.any() == (step == env.max_episode_steps)
        assert ended.any() or torch.equal(infos["final_obs"], obs)
    if env_id.startswith("mpe"):  # the episode's last observation, not the next one's first
        assert not torch.equal(infos["final_obs"], obs)
        assert (infos["final_obs"][..., 2:4] - last[..., 2:4]).abs().max() < 0.5
        assert (obs[..., :2] == 0).all()
    with pytest.raises(ValueError, match="shape"):
        env.step(torch.zeros(5, 1))


@pytest.mark.parametrize("env_id", ["mpe_spread", "coordsum_3x10_official"])
def test_seeds_repeat_and_a_state_goes_on_where_it_was_saved(env_id):
    def play(env, steps):
        return torch.stack([torch.cat([x.flatten() for x in env.step(actions)[:2]]) for _ in range(steps)])

    env, other = envs.make(env_id, 8), envs.make(env_id, 8)
    actions = torch.ones(8, 3, dtype=torch.long)
    first = env.reset(seed=1)[0]
    assert not torch.equal(other.reset(seed=2)[0], first) and torch.equal(other.reset(seed=1)[0], first)
    assert torch.equal(play(env, 60), play(other, 60))
    saved = copy.deepcopy(env.state_dict())
    ahead = play(env, 120)
    obs = other.reset(options=saved)[0]
    assert torch.equal(play(other, 120), ahead)
    assert torch.equal(other.reset(options=saved)[0], obs)
    assert not torch.equal(env.reset()[0], first)  # without a seed the numbers go on


def test_actions_are_not_tied_to_the_environments_numbers():
    """With one seed for both, PyTorch would make a policy's noise from the numbers that placed the agents."""
    env = envs.make("coordsum_3x10", 4096)
    targets = env.reset(seed=3)[0][:, 0].argmax(-1)
    torch.manual_seed(3)
    assert (torch.randint(30, (4096,)) == targets).float().mean() < 0.1


def test_state_of_the_batched_spread():
    env = envs.make("mpe_spread_partial", 2, state=True)
    assert env.state_dim == 18

    def state():
        return torch.cat([env.position, env.velocity, env.landmarks], -1).view(2, 18)

    _, infos = env.reset(seed=0)
    assert torch.equal(infos["state"], state()) and torch.equal(infos["final_state"], state())
    for step in range(1, 26):
        last = infos["state"]
        infos = env.step(torch.ones(2, 3, dtype=torch.long))[4]
        assert torch.equal(infos["state"], state())
        assert torch.equal(infos["state"], infos["final_state"]) == (step < 25)
    moved = (infos["final_state"] - last).view(2, 3, 6)
    assert (moved[..., 4:] == 0).all() and (moved[..., :2] != 0).any() and moved[..., :2].abs().max() < 0.5


REFUSED = [
    ("mpe_spread", {"continuous": "maybe"}, "continuous must be true or false, but is 'maybe'"),
    ("mpe_spread", {"max_cycles": "a"}, "max_cycles must be a whole number of at least 1, but is 'a'"),
    ("mpe_spread", {"max_cycles": 0}, "max_cycles must be a whole number of at least 1"),
    ("mpe_spread", {"max_cycles": True}, "max_cycles must be a whole number"),
    ("mpe_spread", {"num_agents": 1}, "num_agents must be a whole number of at least 2"),
    ("mpe_spread", {"num_agent_neighbors": 0}, "num_agent_neighbors must be"),
    ("mpe_spread", {"num_landmark_neighbors": 1.5}, "num_landmark_neighbors must be"),
    ("mpe_spread", {"local_ratio": "a"}, r"local_ratio must be a number in \[0, 1\]"),
    ("mpe_spread", {"local_ratio": float("nan")}, "local_ratio must be"),
    ("coordsum_3x10", {"blur": -1}, "blur must be a whole number of at least 0"),
    ("mpe_spread", {"agents": 4}, "cannot be made with the options {'agents': 4}"),
    ("coordsum_3x10", {"num_targets": 0}, "num_targets must be"),
    ("coordsum_3x10", {"num_actions": None}, "num_actions must be"),
    ("coordsum_3x10", {"official": "yes"}, "official must be true or false"),
    ("coordsum_3x10", {"num_targets": 10**18}, "cannot be made"),  # in no memory
    ("matrix_xor", {"payoff": [[1, 2], [3]]}, "cannot be made"),
    ("matrix_xor", {"payoff": [[1, 2]]}, "one axis of equal length per agent"),
    ("matrix_xor", {"payoff": []}, "one axis of equal length per agent"),
    ("matrix_xor", {"state": True}, "has no state"),
    ("matrix_xor", {"num_workers": 2}, "leave num_workers at 0"),
    ("smax:2s3z", {"num_workers": 2}, "leave num_workers at 0"),
    ("matrix_xro", {}, "one of matrix_climbing, .*, pettingzoo:<module>, gym:<id>, lbf:<task>, .*smax:"),
]


@pytest.mark.parametrize("env_id, kwargs, sentence", REFUSED)
def test_wrong_options_are_one_sentence(env_id, kwargs, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        envs.make(env_id, 2, **kwargs)
    assert "\n" not in str(error.value) and env_id in str(error.value)


def test_other_peoples_environments_get_makes_arguments(monkeypatch):
    for module, name in (("python_envs", "AdaptedEnv"), ("jax_envs", "JaxEnv")):
        stub = types.SimpleNamespace(**{name: lambda *args, **kwargs: [*args, kwargs]})
        monkeypatch.setitem(sys.modules, f"adapters.{module}", stub)
    for env_id in ("pettingzoo:x", "gym:x"):
        assert envs.make(env_id, 4, "cuda", 4, True, n=1) == [env_id, 4, "cuda", 4, True, {"n": 1}]
    for env_id in ("lbf:x", "rware:x", "connector:x", "smax:x"):
        assert envs.make(env_id, 4, "cuda", 0, True, n=1) == [env_id, 4, "cuda", True, {"n": 1}]
