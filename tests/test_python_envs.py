"""adapters/python_envs.py: other people's environments, against mpe2 itself and environments by hand."""

import os
import random
import signal
import subprocess
import sys
import types
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from pettingzoo import ParallelEnv

import envs
from envs import EnvFailure

torch.set_num_threads(1)
SPREAD, SPEAKER = "pettingzoo:mpe2.simple_spread_v3", "pettingzoo:mpe2.simple_speaker_listener_v4"
BOX = spaces.Box(-np.inf, np.inf, (2,), np.float32)


class Fake(ParallelEnv):
    """Agents count the steps, up to 20.

    leaves: {agent: (step, "terminated" or "truncated")}. forgetful: nobody is ever struck off the list.
    mask: (where, time -> mask). luck: agents see numbers of the three global generators.
    reward: (time, agent) -> reward. spoil: (self, results) -> results.
    """

    metadata = {}
    sees, acts, leaves, mask, luck, forgetful = {}, {}, {}, None, False, False

    def __init__(self, **options):
        self.possible_agents, self.agents, self.taken = list("abc"), [], []
        self.reward, self.spoil = lambda time, agent: 1.0, lambda env, results: results
        vars(self).update(options)

    def observation_space(self, agent):
        space = self.sees.get(agent, spaces.Box(-np.inf, np.inf, (3,)) if self.luck else BOX)
        masked = self.mask and self.mask[0] == "observation"
        return spaces.Dict({"observation": space, "action_mask": spaces.MultiBinary(3)}) if masked else space

    def action_space(self, agent):
        return self.acts.get(agent, spaces.Discrete(3))

    def look(self, agents):
        obs, infos = {}, {agent: {} for agent in agents}
        for agent in agents:
            space = self.sees.get(agent, BOX)
            obs[agent] = np.full(space.shape, self.time, space.dtype)
            if self.luck:
                obs[agent] = np.array([random.random(), np.random.rand(), torch.rand(1).item()])
            if self.mask and self.mask[0] == "observation":
                obs[agent] = {"observation": obs[agent], "action_mask": self.mask[1](self.time)}
            elif self.mask and self.mask[1](self.time) is not None:
                infos[agent]["action_mask"] = self.mask[1](self.time)
        return obs, infos

    def reset(self, seed=None, options=None):
        self.agents, self.time = list(self.possible_agents), 0
        return self.spoil(self, self.look(self.agents))

    def step(self, actions):
        assert actions.keys() == set(self.agents)
        self.taken.append(actions)
        self.time, before = self.time + 1, self.agents
        ends = {agent: self.leaves.get(agent, (20, "truncated")) for agent in before}
        flags = [{a: ends[a] == (self.time, kind) for a in before} for kind in ("terminated", "truncated")]
        self.agents = [agent for agent in before if self.forgetful or ends[agent][0] != self.time]
        obs, infos = self.look(before)
        return self.spoil(self, (obs, {a: self.reward(self.time, a) for a in before}, *flags, infos))


class FakeTuple(gymnasium.Env):
    """Two agents with 2 and 4 actions; `step`: time -> rewards, terminated, truncated, info."""

    def __init__(self, play=lambda time: (1.0, False, time == 5, {}), **attributes):
        self.observation_space = spaces.Tuple([spaces.Box(-9, 9, (2,)), spaces.Box(-9, 9, (3,))])
        self.action_space = spaces.Tuple([spaces.Discrete(2), spaces.Discrete(4)])
        self.play = play
        vars(self).update(attributes)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return (np.zeros(2), self.np_random.random(3)), self.play(0)[3]

    def step(self, actions):
        self.time += 1
        return (np.full(2, self.time), np.full(3, actions[1])), *self.play(self.time)


@pytest.fixture(autouse=True)
def names(monkeypatch):
    """The names pettingzoo:fake and gym:FakeTuple-v0."""
    monkeypatch.setitem(sys.modules, "fake", types.SimpleNamespace(parallel_env=Fake, __name__="fake"))
    spec = gymnasium.envs.registration.EnvSpec("FakeTuple-v0", entry_point=FakeTuple)
    monkeypatch.setitem(gymnasium.registry, "FakeTuple-v0", spec)


def fake(num_envs=2, **options):
    return envs.make("pettingzoo:fake", num_envs, **options)


def fake_tuple(**options):
    return envs.make("gym:FakeTuple-v0", 2, **options)


def copies(env):
    """The environments behind an adapted one."""
    return [team.env for team in env.env.envs]


def play(env, steps, seed=0):
    """Reset and step with action 0 (the middle of a box) -> list of what each returned."""
    action = torch.zeros(env.action_space.shape, dtype=torch.long)
    action = action if len(env.single_action_space.shape) == 1 else action + 0.5
    return [env.reset(seed=seed), *(env.step(action) for _ in range(steps))]


@pytest.mark.parametrize("continuous", [False, True])
def test_adapted_spread_is_the_batched_one(continuous):
    env = envs.make(SPREAD, 2, continuous_actions=continuous, max_cycles=6, state=True)
    ours = envs.SimpleSpread(2, continuous=continuous, max_cycles=6, dtype=torch.float64)
    assert env.single_observation_space == ours.single_observation_space
    assert env.observation_space == ours.observation_space and env.action_space == ours.action_space
    assert env.single_action_space == ours.single_action_space and env.max_episode_steps == 6
    assert (env.references, env.win_return, env.state_dim, env.state_dict()) == ({}, None, 54, {})
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP and "mean over agents" in env.note
    obs, infos = env.reset(seed=1)
    ours.reset(seed=1)
    for step in range(15):
        names = {"final_obs", "state", "final_state"} | ({"action_mask"} - {continuous and "action_mask"})
        assert infos.keys() == names
        assert continuous or (infos["action_mask"].shape == (2, 3, 5) and infos["action_mask"].all())
        assert torch.equal(infos["state"], obs.flatten(1))  # mpe2's state is all observations
        assert torch.equal(infos["final_state"], infos["final_obs"].flatten(1))
        if step % 6 == 0:
            worlds = [copy.unwrapped.world for copy in copies(env)]
            agents, marks = ([getattr(world, what) for world in worlds] for what in ("agents", "landmarks"))
            ours.position = torch.tensor(np.array([[agent.state.p_pos for agent in team] for team in agents]))
            ours.landmarks = torch.tensor(np.array([[mark.state.p_pos for mark in some] for some in marks]))
            ours.velocity = torch.zeros_like(ours.position)
            torch.testing.assert_close(obs, ours._observe().float(), rtol=0, atol=1e-6)
        actions = torch.rand(2, 3, 5) * 2 - 0.5 if continuous else torch.randint(5, (2, 3))
        obs, rewards, terminations, truncations, infos = env.step(actions)
        _, team_reward, _, timeouts, batched_infos = ours.step(actions.double() if continuous else actions)
        torch.testing.assert_close(infos["final_obs"], batched_infos["final_obs"].float(), rtol=0, atol=1e-5)
        torch.testing.assert_close(rewards, team_reward.float(), rtol=0, atol=1e-5)
        assert not terminations.any() and torch.equal(truncations, timeouts)
        assert truncations.all() == (step % 6 == 5)
        assert torch.equal(infos["final_obs"], obs) != truncations.all()
    with pytest.raises(ValueError, match="shape"):
        env.step(actions[0])
    with pytest.raises(ValueError, match="without options"):
        env.reset(options={"time": 3})


def test_workers_change_nothing_and_leave_the_process_alone():
    """Agents of different sizes, in one process and in several; the main process keeps its signals."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    pair = [envs.make(SPEAKER, 2, num_workers=workers, state=True, max_cycles=4) for workers in (0, 2)]
    assert [type(env.env).__name__ for env in pair] == ["SyncVectorEnv", "AsyncVectorEnv"]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    results = [play(env, 10, seed=5) for env in pair]
    for one, two in zip(*results, strict=True):
        assert all(map(torch.equal, one[:-1], two[:-1])) and one[-1].keys() == two[-1].keys()
        assert all(torch.equal(one[-1][name], two[-1][name]) for name in one[-1])
        assert one[0].shape == (2, 2, 11) and (one[0][:, 0, 3:] == 0).all() and (one[0][:, 1] != 0).any()
        assert one[-1]["action_mask"].tolist() == [[[True] * 3 + [False] * 2, [True] * 5]] * 2
    os.kill(pair[1].env.processes[0].pid, signal.SIGINT)  # a Ctrl-C for the whole group
    torch.testing.assert_close(*(env.step(torch.zeros(2, 2, dtype=torch.long))[0] for env in pair))
    pair[1].close()
    with pytest.raises(ValueError, match=r"num_workers must be 0 or num_envs \(2\)"):
        envs.make(SPEAKER, 2, num_workers=3)


def test_observations_become_vectors_on_the_device():
    sees = {"a": spaces.Box(0, 99, (3, 2)), "b": spaces.Discrete(30), "c": spaces.Box(0, 99, (5,), np.uint8)}
    obs = play(fake(sees=sees), 1)[1][0][0]
    assert obs.shape == (3, 30) and obs[0].tolist() == [1] * 6 + [0] * 24
    assert obs[1].tolist() == [0, 1] + [0] * 28 and obs[2].tolist() == [1] * 5 + [0] * 25
    (obs, infos), (*results, more) = play(fake(device="meta"), 1)  # meta stands for a GPU
    assert {x.device.type for x in (obs, *infos.values(), *results, *more.values())} == {"meta"}


# ---- Masks: what a step says counts at that step -----------------------------------------------------------
def forbid(time):
    """From step 7 on, one of three actions; in step 11 all."""
    return None if time < 7 else (np.arange(3) != time % 3).astype(np.int8) * (time != 11)


@pytest.mark.parametrize("where", ["observation", "info"])
def test_masks_belong_to_the_returned_observation(where):
    """Where nothing is allowed, action 0 is."""

    def full(time):
        return np.ones(3, np.int8) if time < 7 else forbid(time)

    for obs, *_, infos in play(fake(mask=(where, full if where == "observation" else forbid)), 45):
        time = int(obs[0, 0, 0])
        expected = [True, False, False] if time == 11 else full(time).astype(bool).tolist()
        assert infos["action_mask"].tolist() == [[expected] * 3] * 2


@pytest.mark.parametrize("as_array", [False, True])
def test_a_gymnasium_info_gives_masks(as_array):
    """Also late, and as an array, where the agent with two actions gets four columns."""
    masks = [np.array([0, 1]), [True, False, False, True]]
    infos = {"action_mask": np.array([[0, 1, 1, 1], [1, 0, 0, 1]]) if as_array else masks}
    env = fake_tuple(play=lambda time: ([1.0, 2.0], False, False, infos if time > 1 else None))
    free = [[True, True, False, False], [True] * 4]
    masked = [[False, True, False, False], [True, False, False, True]]
    seen = [infos["action_mask"][0].tolist() for *_, infos in play(env, 3)]
    assert seen == [free, free, masked, masked]


# ---- Ends of a team ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("forgetful", [False, True])
@pytest.mark.parametrize(
    "leaves, end, truncated, shown",  # shown: agents whose last observation final_obs has
    [
        ({}, 20, True, "abc"),
        ({"a": (2, "terminated"), "b": (4, "truncated"), "c": (6, "truncated")}, 6, True, "c"),
        ({"a": (2, "truncated"), "b": (3, "truncated"), "c": (6, "terminated")}, 6, False, "c"),
        ({"a": (6, "terminated"), "b": (6, "truncated"), "c": (4, "terminated")}, 6, True, "b"),
        ({agent: (6, "terminated") for agent in "abc"}, 6, False, "abc"),
    ],
)
def test_a_team_ends_as_the_last_of_it_do(leaves, end, truncated, shown, forgetful):
    pay = {"a": 1.0, "b": 2.0, "c": 6.0}
    env = fake(leaves=leaves, forgetful=forgetful, reward=lambda time, agent: pay[agent])
    for step, (obs, rewards, over, late, infos) in enumerate(play(env, 2 * end)[1:], 1):
        time = 1 + (step - 1) % end
        there = [agent for agent in "abc" if time == end or leaves.get(agent, (20,))[0] > time]
        assert over.all() == (time == end and not truncated) and late.all() == (time == end and truncated)
        if not forgetful:  # who left in an earlier step earns nothing, and is no longer asked
            acting = [agent for agent in "abc" if leaves.get(agent, (20,))[0] >= time]
            np.testing.assert_allclose(rewards, sum(pay[agent] for agent in acting) / 3, rtol=1e-6)
            assert list(copies(env)[0].taken[step - 1]) == acting
        final = [[time] * 2 if a in (shown if time == end else there) else [0, 0] for a in "abc"]
        assert infos["final_obs"].tolist() == [final] * 2
        assert obs.tolist() == [[[0, 0]] * 3] * 2 if time == end else torch.equal(obs, infos["final_obs"])
        allowed = [[True, a in there, a in there] for a in "abc"]
        assert infos["action_mask"].tolist() == [allowed] * 2


@pytest.mark.parametrize(
    "terminated, truncated, expected",
    [([True, False], [False, True], (False, True)), ([True, True], [False, False], (True, False)),
     (np.array([True]), False, (True, False)), ([False, True], False, (False, False))],
)  # fmt: skip
def test_the_flags_of_tuple_environments_count_per_agent(terminated, truncated, expected):
    env = fake_tuple(play=lambda time: (np.array([[1.0], [2.0]]), terminated, truncated, {}))
    _, rewards, *ends, _ = play(env, 1)[1]
    assert (rewards == 1.5).all() and tuple(end.all().item() for end in ends) == expected


@pytest.mark.parametrize(
    "name", ["max_steps", "_max_episode_steps", "max_cycles", "MAX_STEPS", "episode_limit", "horizon"]
)
@pytest.mark.parametrize("late", [False, True])
def test_an_end_at_the_environments_own_limit_is_a_truncation(name, late):
    """late: whether it sets both flags there. A termination before the limit is one."""
    env = fake_tuple(**{name: 4}, play=lambda time: (1.0, time == 4, late and time == 4, {}))
    assert env.max_episode_steps == 4
    *_, (_, _, over, timeout, infos) = play(env, 4)
    assert timeout.all() and not over.any() and (infos["final_obs"][:, 0, :2] == 4).all()
    for copy in copies(env):
        setattr(copy.env.unwrapped, name, 9)  # from one episode to the next
    over, timeout = play(env, 4)[-1][2:4]
    assert over.all() and not timeout.any()


def test_an_environment_that_tells_time_from_ends_is_believed():
    """One that has truncated before. A limit that is no number of steps is none."""
    ends = iter([(False, True), (True, False)])
    one_step = dict(max_steps=1, play=lambda time: (1.0, *next(ends), {}) if time else (None,) * 4)
    steps = play(envs.make("gym:FakeTuple-v0", 1, **one_step), 2)[1:]
    flags = [(over.item(), late.item()) for _, _, over, late, _ in steps]
    assert flags == [(False, True), (True, False)]
    assert fake_tuple(max_steps=None, horizon="far").max_episode_steps == fake().max_episode_steps == 1000


@pytest.mark.parametrize(
    "package, env_id, features, actions, limit",
    [("lbforaging", "Foraging-8x8-2p-2f-coop-v3", 12, 6, 50), ("rware", "rware-tiny-2ag-v2", 71, 5, 500)],
)
def test_foraging_and_warehouse(package, env_id, features, actions, limit):
    """Their time limits, which they report as terminations, are truncations; rware's is cut to 20 steps."""
    pytest.importorskip(package)
    assert envs.make(f"gym:{env_id}", 1).max_episode_steps == limit
    env = envs.make(f"gym:{env_id}", 2, **({"max_steps": 20} if package == "rware" else {}))
    limit = min(limit, env.max_episode_steps)
    assert env.single_action_space == spaces.MultiDiscrete([actions] * 2)
    first = play(env, limit, seed=1)
    assert first[0][0].shape == (2, 2, features) and first[-1][3].all() and not first[-1][2].any()
    for one, two in zip(first, play(envs.make(f"gym:{env_id}", 2), limit, seed=1), strict=True):
        assert torch.equal(one[-1]["final_obs"], two[-1]["final_obs"])


# ---- Actions and bounds ------------------------------------------------------------------------------------
RNG = np.random.default_rng(0)
EDGES = np.sort(RNG.normal(size=(2, 300)) * 10.0 ** RNG.integers(-30, 30, 300), 0)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-2.0, 0.2, (1,), np.float32),
        spaces.Box(-3e38, 3e38, (2, 1), np.float32),
        spaces.Box(0.1, 0.1, (), np.float64),
        *(spaces.Box(*EDGES.astype(dtype), dtype=dtype) for dtype in (np.float32, np.float64)),
        spaces.Box(-0.1, 0.7, (3,), np.float16),
        spaces.Box(np.array([-1, 0]), np.array([1, 4]), dtype=np.int32),
        spaces.Box(0, 255, (1,), np.uint8),
        spaces.Box(-128, 127, (1,), np.int8),
    ],
    ids=str,
)  # fmt: skip
def test_every_action_lies_in_its_space(space):
    env = fake(1, acts=dict.fromkeys("abc", space))
    size = env.single_action_space.shape[1]
    assert (env.single_action_space.low == 0).all() and (env.single_action_space.high == 1).all()
    assert "action_mask" not in env.reset(seed=0)[1]
    for share in (-9.0, 0.0, 0.1, 0.3, 0.5, 0.9999999, 1.0, 9.0):
        env.step(torch.full((1, 3, size), share))
        action = copies(env)[0].taken[-1]["b"]
        assert space.contains(action) and action.dtype == space.dtype
        share = float(np.clip(np.float32(share), 0, 1))
        low, high = space.low.astype(np.longdouble), space.high.astype(np.longdouble)
        if space.dtype.kind == "f":
            error = abs(action - (low + share * (high - low)))
            assert (error <= 4 * np.finfo(space.dtype).eps * np.maximum(abs(low), abs(high))).all()
        if share in (0, 1):
            assert np.array_equal(action, (space.low, space.high)[int(share)])


def test_integer_boxes_give_every_value_its_share():
    env = fake(1, acts=dict.fromkeys("abc", spaces.Box(np.array([-1, 0]), np.array([1, 4]), dtype=np.int64)))
    env.reset(seed=0)
    for share in (torch.arange(15) + 0.5) / 15:
        env.step(share.expand(1, 3, 2))
    taken = np.array([actions["a"] for actions in copies(env)[0].taken])
    assert taken[:, 0].tolist() == sorted([-1, 0, 1] * 5)
    assert taken[:, 1].tolist() == sorted([0, 1, 2, 3, 4] * 3)


def test_discrete_actions_that_do_not_start_at_zero():
    env = fake(acts={"b": spaces.Discrete(2, start=5)})
    _, infos = env.reset(seed=0)
    assert infos["action_mask"][0].tolist() == [[True] * 3, [True, True, False], [True] * 3]
    env.step(torch.tensor([[2, 1, 0]] * 2))
    assert copies(env)[0].taken[-1] == {"a": 2, "b": 6, "c": 0}


# ---- Random numbers that are not ours ----------------------------------------------------------------------
@pytest.mark.parametrize("num_workers", [0, 2])
def test_environments_draw_their_own_numbers_from_all_three_generators(num_workers):
    """The seed repeats, copies differ; neither the process's generators nor other environments take part."""

    def numbers(env, seed=None):
        if seed is not None:
            env.reset(seed=seed)
        return torch.stack([env.step(torch.zeros(2, 3, dtype=torch.long))[0] for _ in range(3)])

    def process():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before, options = process(), dict(luck=True, num_workers=num_workers)
    first, other = fake(**options), fake(**options)
    drawn = numbers(first, seed=3)
    numbers(other, seed=4)
    more = numbers(first)
    assert process() == before
    random.random(), np.random.rand(), torch.rand(1)
    assert torch.equal(numbers(other, seed=3), drawn) and torch.equal(numbers(other), more)
    everything = torch.stack([drawn, more, numbers(other, seed=4), numbers(other)])
    for kind in range(3):  # random, np.random, torch
        assert len(everything[..., kind].unique()) == everything[..., kind].numel()
    torch.set_num_threads(2)
    fresh = fake(**options, reward=lambda time, agent: float(torch.get_num_threads()))
    one, two = fresh.reset()[0].flatten(1)  # without any seed
    assert not torch.isin(one, two).any()
    assert not num_workers or (fresh.step(torch.zeros(2, 3, dtype=torch.long))[1] == 1).all()
    torch.set_num_threads(1)
    first.close(), other.close(), fresh.close()


def test_seeds_repeat_and_neighbours_share_no_copies():
    first, again, next_seed = (play(envs.make(SPREAD, 2, max_cycles=3), 7, seed)[::4] for seed in (3, 3, 4))
    for one, two, three in zip(first, again, next_seed, strict=True):  # after reset, and after an autoreset
        assert torch.equal(one[0], two[0]) and not torch.equal(one[0][1], three[0][0])
    env = envs.make(SPREAD, 2)
    assert not torch.equal(env.reset()[0], env.reset()[0])


# ---- Broken contracts --------------------------------------------------------------------------------------
def without(place, agent="b"):
    def spoil(results):
        return tuple({k: v for k, v in x.items() if i != place or k != agent} for i, x in enumerate(results))

    return spoil


def change(place, value, agent="b"):
    return lambda results: tuple(x | {agent: value} if i == place else x for i, x in enumerate(results))


BROKEN = [
    (without(0), "agent 'b' has no observation"),
    (change(0, None), "agent 'b' has no observation"),
    (change(0, np.zeros(1)), r"observation of agent 'b' has the shape \(1,\), but its space has \(2,\)"),
    (change(0, np.zeros((1, 2))), r"the shape \(1, 2\)"),
    (change(0, "far"), "is 'far', not an array of numbers"),
    (change(0, np.zeros(2), "z"), "observations of {'z'}, who is not in its possible_agents"),
    (without(1), "agent 'b' has no reward"),
    (lambda results: (results[0], {}, *results[2:]), "agent 'a' has no reward"),
    (lambda results: (results[0], 1.0, *results[2:]), "the rewards are 1.0, not a dict"),
    (change(1, None), "reward of agent 'b' is None, not a number"),
    (change(1, np.ones(2)), "reward of agent 'b' is array"),
    (without(2), "agent 'b' has no termination"),
    (change(3, None), "truncation of agent 'b' is None"),
    (change(4, {"action_mask": np.ones(2)}), "action mask of agent 'b' is array.*not 3 times 0 or 1"),
    (change(4, {"action_mask": np.full(3, -np.inf)}), "not 3 times 0 or 1"),
    (lambda results: (*results[:4], [{}]), r"the infos are \[{}\]"),
    (lambda results: results[:4], "step returns 4 values instead of a tuple of 5"),
    (lambda results: list(results), "step returns a list instead"),
]


@pytest.mark.parametrize("spoil, sentence", BROKEN)
def test_a_broken_contract_is_one_sentence(spoil, sentence):
    env = fake(spoil=lambda env, results: spoil(results) if env.time == 3 else results)
    with pytest.raises(EnvFailure, match=f"^pettingzoo:fake, step 3 of copy 0: .*{sentence}") as error:
        play(env, 3)
    assert "\n" not in str(error.value) and str(error.value).endswith(".") and error.value.__cause__ is None


BOXES = dict.fromkeys("abc", spaces.Box(0, 1, (2,)))


def tuple_gives(*results):
    return lambda: fake_tuple(play=lambda time: results)


BROKEN_OTHERWISE = [
    (lambda: fake(spoil=lambda env, results: results[0]), "reset of copy 0: reset returns a dict instead"),
    (lambda: fake(spoil=lambda env, results: ({}, {})), "reset of copy 0: agent 'a' has no observation"),
    (lambda: fake(spoil=lambda env, got: env.agents.append("z") or got), "it lets in {'z'}, who is not in"),
    (lambda: fake(leaves={"b": (2, "terminated")}, acts=BOXES), "step 2 .*'b' leaves .*cannot be masked"),
    (lambda: fake(acts=BOXES, spoil=lambda env, got: env.agents.remove("b") or got), "{'b'} are not there"),
    (tuple_gives(None, False, False, {}), "step 1 .*reward of agent 0 is None"),
    (tuple_gives([1, 2, 3], False, False, {}), "step 1 .*3 rewards for 2 agents"),
    (tuple_gives(1, False, False, {"action_mask": [1]}), "1 action masks for 2 agents"),
    (tuple_gives(1, False, {}, {}), "step 1 .*the truncation of agent 0 is {}, not a number"),
]


@pytest.mark.parametrize("make, sentence", BROKEN_OTHERWISE)
def test_broken_resets_teams_and_tuples_are_one_sentence(make, sentence):
    with pytest.raises(EnvFailure, match=sentence):
        play(make(), 3)


def test_one_may_come_late():
    def arrive(env, results):
        if env.time == 0:
            env.agents.remove("b")
        if env.time == 3:
            env.agents.append("b")
            results[0]["b"] = np.full(2, 3.0)
        return results

    for time, (obs, *_, infos) in enumerate(play(fake(spoil=arrive), 4)):
        there = time >= 3
        assert obs[0, 1].tolist() == [time * there] * 2 and obs[0, 0].tolist() == [time] * 2
        assert infos["action_mask"][0, 1].tolist() == [True, there, there]


def test_what_is_merely_unusual_is_accepted():
    """Arrays of size 1 for numbers, None for infos, size-1 observations, one reward for a Tuple's agents."""

    def unusual(env, results):
        if not env.time:
            return results[0], None
        obs, rewards, *flags, _ = results
        flags = [{agent: np.array([flag]) for agent, flag in each.items()} for each in flags]
        return obs | {"b": 7}, {agent: np.array([[2.0]]) for agent in rewards}, *flags, {"a": None}

    for obs, rewards, *_ in play(fake(spoil=unusual, sees={"b": spaces.Box(0, 9, (1,))}), 19)[1:]:
        assert (rewards == 2).all() and obs[0, 1].tolist() == [7, 0]
    assert (play(fake_tuple(play=lambda time: (np.array([3.0]), False, False, None)), 1)[1][1] == 3).all()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("error", [KeyError("no\nkey"), SystemExit("bye")])
def test_an_environments_own_exception_keeps_its_traceback(error, num_workers):
    def spoil(env, results):
        if env.time == 3:
            raise error
        return results

    env = fake(spoil=spoil, num_workers=num_workers)
    sentence = f"pettingzoo:fake raised {type(error).__name__} in step 3 of copy 0: "
    with pytest.raises(EnvFailure, match=sentence) as caught:
        play(env, 3)
    cause = caught.value.__cause__
    assert "\n" not in str(caught.value)
    traced = "in spoil\n" in str(cause) and type(error).__name__ in str(cause)
    assert traced if num_workers else cause is error
    env.close()


def test_a_worker_that_dies_is_one_sentence():
    env = fake(num_workers=2, spoil=lambda env, results: os._exit(3) if env.time == 2 else results)
    sentence = r"the worker process of copy [01].* \(exit code 3\).* died in step 2"
    with pytest.raises(EnvFailure, match=sentence) as error:
        play(env, 3)
    assert "\n" not in str(error.value) and not any(process.is_alive() for process in env.env.processes)
    env.close()


def test_a_state_of_those_present_alone_is_one_sentence(monkeypatch):
    monkeypatch.setattr(Fake, "state", lambda self: np.zeros(2 * len(self.agents)), raising=False)
    env = fake(state=True, leaves={"a": (2, "terminated")})
    assert env.state_dim == 6
    with pytest.raises(EnvFailure, match=r"step 2 .*its state\(\) has 4 numbers, but 6 at first"):
        play(env, 2)


# ---- Competition -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("start", [1, 30])
@pytest.mark.parametrize("scale", [1e-9, 1e9 / 9])
def test_zero_sum_rewards_are_refused_whenever_they_start(start, scale):
    share = {"a": 0.1, "b": 0.7, "c": -0.8}  # rounded, these add up to nearly zero
    env = fake(reward=lambda time, agent: share[agent] * scale * (len(copies(env)[0].taken) >= start))
    play(env, start + 3)
    with pytest.raises(EnvFailure, match="MAGPO needs a shared goal"):
        env.step(torch.zeros(2, 3, dtype=torch.long))


def test_opposite_signs_alone_are_said_once():
    """As soon as a step shows that they are no competition; here the third does."""
    share = {"a": 1.0, "b": -0.1, "c": -0.9}
    env = fake(reward=lambda time, agent: 3.0 if len(copies(env)[0].taken) == 3 else share[agent])
    with warnings.catch_warnings(action="error"):
        play(env, 2)
    sentence = "pettingzoo:fake rewards some agents while it punishes others"
    with pytest.warns(UserWarning, match=sentence) as said:
        rewards = [env.step(torch.zeros(2, 3, dtype=torch.long))[1] for _ in range(45)]
    assert len(said) == 1 and torch.allclose(torch.stack(rewards)[:, 0], torch.tensor([3.0] + [0.0] * 44))


# ---- Names -------------------------------------------------------------------------------------------------
REFUSED = [
    ("pettingzoo:mpe2.simple_sprd_v3", {}, "No module named 'mpe2.simple_sprd_v3'.*pip install"),
    ("pettingzoo:needs_a_library", {}, "needs_a_library: .*No module named 'a_library'.*pip install"),
    ("pettingzoo:does_not_parse", {}, "cannot be made .*SyntaxError"),
    ("pettingzoo:leaves", {}, "cannot be made .*SystemExit: bye"),
    ("pettingzoo:in_turns", {}, "not in turns"),
    ("pettingzoo:classic.tictactoe_v3", {}, "no parallel_env.*not in turns"),
    ("pettingzoo:os", {}, "os is no environment"),
    ("pettingzoo:", {}, "names no module"),
    ("pettingzoo:mpe2.", {}, "names no module"),
    (SPREAD, {"agents": 4}, "cannot be made with the options {'agents': 4}"),
    (SPREAD, {"N": "many"}, "cannot be made with the options {'N': 'many'}"),
    ("gym:CartPole-v1", {}, "spaces must be Tuples"),
    ("gym:NoSuchGame-v1", {}, "NoSuchGame"),
    ("gym:", {}, "cannot be made"),
    ("gym:no_module:Game-v0", {}, "no_module.*pip install"),
    ("gym:FakeTuple-v0", {"id": "CartPole-v1"}, "cannot be made"),
    ("gym:Foraging-8x8-2p-2f-v3", {}, "lbforaging.*pip install"),
    ("gym:rware-tiny-2ag-v2", {}, "rware.*pip install"),
    ("pettingzoo:fake", {"acts": {"a": BOX}}, "all Discrete or all Box"),
    ("pettingzoo:fake", {"acts": {"a": spaces.MultiBinary(2)}}, "all Discrete or all Box"),
    ("pettingzoo:fake", {"acts": BOXES | {"c": spaces.Box(0, 1, (3,))}}, "several sizes"),
    ("pettingzoo:fake", {"acts": dict.fromkeys("abc", BOX)}, "without bounds"),
    ("pettingzoo:fake", {"acts": dict.fromkeys("abc", spaces.Box(0, 2**62, (1,), int))}, "without bounds"),
    ("pettingzoo:fake", {"sees": {"a": spaces.Box(0, 255, (4, 4), np.uint8)}}, "not images"),
    ("pettingzoo:fake", {"sees": {"a": spaces.Box(0, 1, (4, 4, 3))}}, "not images"),
    ("pettingzoo:fake", {"sees": {"a": spaces.Dict({"observation": BOX, "map": BOX})}}, "images or Dicts"),
    ("pettingzoo:fake", {"state": True}, r"has no state\(\)"),
    ("gym:FakeTuple-v0", {"state": True}, r"has no state\(\)"),
    ("pettingzoo:nobody", {}, "lacks possible_agents.*no attribute 'possible_agents'"),
]  # fmt: skip


@pytest.mark.parametrize("env_id, kwargs, sentence", REFUSED)
def test_refused_in_one_sentence(env_id, kwargs, sentence, monkeypatch, tmp_path):
    (tmp_path / "needs_a_library.py").write_text("import a_library")
    (tmp_path / "does_not_parse.py").write_text("def")
    (tmp_path / "leaves.py").write_text("raise SystemExit('bye')")
    monkeypatch.syspath_prepend(tmp_path)
    for name, made in (("in_turns", types.SimpleNamespace(agent_iter=None)), ("nobody", None)):
        module = types.SimpleNamespace(parallel_env=lambda made=made: made)
        monkeypatch.setitem(sys.modules, name, module)
    for package in ("lbforaging", "rware"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ValueError, match=sentence) as error:
        envs.make(env_id, 2, **kwargs)
    assert "\n" not in str(error.value) and env_id in str(error.value)


@pytest.mark.slow
def test_a_spawned_worker_finds_what_a_module_registers(tmp_path):
    """And says so in one sentence, where only the main script does."""
    game = "import gymnasium\nfrom tests.test_python_envs import FakeTuple\n"
    (tmp_path / "game.py").write_text(f"{game}gymnasium.register('Game-v0', FakeTuple)")
    script = f"""
import multiprocessing, sys
sys.path[:0] = {[str(tmp_path), os.getcwd()]}
import envs
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    env = envs.make("gym:game:Game-v0", 2, num_workers=2)
    print(env.reset(seed=0)[0].shape, flush=True)
    env.close()
    try:
        envs.make("gym:Game-v0", 2, num_workers=2)
    except ValueError as error:
        print(error)
"""
    (tmp_path / "main.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("torch.Size([2, 2, 3])\ngym:Game-v0 cannot be made in a worker process")
    assert "gym:module:Id" in done.stdout and "In a worker: gym:Game-v0" in done.stderr
