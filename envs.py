"""Environments for magpo.py, all behind one contract: gymnasium's vector interface, with a team of N agents in every copy.

    envs = make("mpe_spread", num_envs=128, device="cpu")
    obs, infos = envs.reset(seed=1)                                    # (E, N, D)
    obs, rewards, terminations, truncations, infos = envs.step(actions)  # actions (E, N), or (E, N, A) when continuous

Shapes: E copies, N agents, D observation features of one agent, A actions (or action dimensions) of one agent.
`rewards` (E,) is the team's reward: the mean over agents. A copy whose episode ends is reset in the same step
(gymnasium's SAME_STEP autoreset); infos["final_obs"] (E, N, D) is the observation before any such reset: the last one of
an episode that just ended, and the same as `obs` wherever the episode goes on. Some environments tell more, of `obs`
and, under "final_" + the same name, of the observation before a reset. Reset's infos have the same keys:

    infos["action_mask"] (E, N, A) bool   the actions that are allowed; only where some may be forbidden
    infos["active"]      (E, N) bool      the agents that take part; only where some may leave early (pettingzoo:).
                                          At an episode's end final_active are those who could have gone on
    infos["state"]       (E, S)           privileged information for training; only on demand, make(..., state=True)

Attributes beyond gymnasium's: `references` (mean team returns of known policies), `state_dim` (S, or 0) and `note` (what
to tell the user, or "").

MatrixGame, CoordSum and SimpleSpread are batched: torch tensors in and out, on any device, with no Python loop over
copies or agents. Their episodes all have the same length, so that their copies start and end in step and a plain
Python integer counts the time (on a GPU, asking a tensor instead would stall the device at every step).

Other people's environments are adapted, through gymnasium's own Sync- or AsyncVectorEnv, one Python object per copy:
any cooperative PettingZoo parallel environment (pettingzoo:mpe2.simple_spread_v3), and any gymnasium environment whose
spaces are Tuples with one entry per agent (gym:Foraging-8x8-2p-2f-coop-v3, gym:rware-tiny-2ag-v2).

The last section, about a run's folder and processes, has nothing to do with environments: magpo.py's reader need not see it.
"""

import atexit
import csv
import importlib
import io
import json
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # its default arguments, read before there is a process group, do not keep that one alive
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


def check_shape(actions, action_space):
    """The same actions; ValueError unless they have the space's shape."""
    if actions.shape != action_space.shape:
        raise ValueError(f"Actions have shape {tuple(actions.shape)}; {action_space.shape} was expected.")
    return actions


class BatchedEnv(VectorEnv):
    """What the three batched environments share: spaces, seeding, the clock and the autoreset.

    A subclass defines `_start()` (draw new episodes), `_observe()` -> (E, N, D), `_advance(actions)` -> rewards (E,) and
    `EPISODE`, the names of its tensors that change within an episode.

    Args:
        num_envs: E, the number of copies.
        device: where every tensor lives.
        num_agents, num_features, num_actions: N, D and A.
        episode_length: steps per episode.
        continuous: actions are (E, N, A) in [0, 1] (clipped to it) instead of integers (E, N).
        terminal: the episode's end is a termination (the game is over) rather than a truncation (time is up).
        dtype: of observations and rewards.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    references: dict[str, float] = {}  # mean team return per episode of known policies
    state_dim, note = 0, ""

    def __init__(self, num_envs, device, num_agents, num_features, num_actions, episode_length, continuous, terminal, dtype):
        self.num_envs, self.device, self.dtype = num_envs, torch.device(device), dtype
        self.episode_length, self.continuous, self.terminal = episode_length, continuous, terminal
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (num_agents, num_features), np.float32)
        if continuous:
            self.single_action_space = spaces.Box(0.0, 1.0, (num_agents, num_actions), np.float32)
        else:
            self.single_action_space = spaces.MultiDiscrete([num_actions] * num_agents)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.generator = torch.Generator(self.device)
        self.time = 0
        never, always = torch.zeros(2, num_envs, dtype=torch.bool, device=self.device)
        self._over = (never, ~always)

    def reset(self, *, seed=None, options=None):
        """Start E new episodes -> observations (E, N, D), infos.

        Args:
            seed: makes all after it repeat.
            options: a state_dict() to go on from, instead of new episodes.
        """
        if seed is not None:
            self.generator.manual_seed(seed + 1)  # or a policy seeded alike would draw the numbers that placed the agents
        self.time = 0
        self._start()
        if options:
            self.generator.set_state(options["generator"].cpu())
            self.time = options["time"]
            vars(self).update({name: options[name].to(self.device) for name in self.EPISODE})
        obs = self._observe()
        return obs, {"final_obs": obs} | self._infos("state", "final_state")

    def step(self, actions):
        """Actions (E, N), or (E, N, A) if continuous -> observations, rewards, terminations, truncations, infos.

        Raises:
            ValueError: the actions have another shape.
        """
        actions = check_shape(torch.as_tensor(actions, device=self.device), self.action_space)
        rewards = self._advance(actions.clamp(0, 1) if self.continuous else actions)
        obs = self._observe()
        infos = {"final_obs": obs} | self._infos("state", "final_state")
        self.time += 1
        over = self.time == self.episode_length
        if over:
            self.time = 0
            self._start()
            obs = self._observe()
            infos |= self._infos("state")
        terminations, truncations = self._over[over and self.terminal], self._over[over and not self.terminal]
        return obs, rewards, terminations, truncations, infos

    def state_dict(self):
        """All that reset(options=...) needs to go on from here: tensors and numbers."""
        return {name: getattr(self, name) for name in ("time", *self.EPISODE)} | {"generator": self.generator.get_state()}

    def _infos(self, *names):
        return dict.fromkeys(names, self._state()) if self.state_dim else {}

    def _uniform(self, *shape):
        return torch.rand(shape, generator=self.generator, device=self.device, dtype=self.dtype)


class MatrixGame(BatchedEnv):
    """One joint action, one payoff, then the game is over. Observations are a constant 1.

    Args:
        payoff: tensor (A, ..., A) with one axis per agent, N of them: the team's reward for every joint action.
    """

    def __init__(self, num_envs, device="cpu", payoff=((1.0, 0.0), (0.0, 1.0)), dtype=torch.float32):
        self.payoff = torch.as_tensor(payoff, dtype=dtype, device=device)
        if self.payoff.dim() == 0 or len(set(self.payoff.shape)) != 1:
            raise ValueError(f"A payoff needs one axis of equal length per agent; this one is {tuple(self.payoff.shape)}.")
        num_agents, num_actions = self.payoff.dim(), self.payoff.shape[0]
        super().__init__(num_envs, device, num_agents, 1, num_actions, 1, False, True, dtype)
        self.references = {"random": self.payoff.mean().item(), "best": self.payoff.max().item()}
        self._ones = torch.ones(num_envs, num_agents, 1, dtype=dtype, device=device)

    EPISODE = ()

    def _start(self):
        pass

    def _observe(self):
        return self._ones

    def _advance(self, actions):
        return self.payoff[actions.unbind(-1)]


CLIMBING = ((11.0, -30.0, 0.0), (-30.0, 7.0, 6.0), (0.0, 0.0, 5.0))  # Claus and Boutilier (AAAI 1998)
PENALTY = ((-100.0, 0.0, 10.0), (0.0, 2.0, 0.0), (10.0, 0.0, -100.0))  # the same, with k = -100
XOR = ((0.0, 1.0), (1.0, 0.0))


def sum_game(num_agents=3, num_actions=10, total=10):
    """Payoff tensor (A,) * N of the paper's Figure 1: 1 where the named integers 0..A-1 add up to `total`, else 0."""
    return (sum(torch.meshgrid(*[torch.arange(num_actions)] * num_agents, indexing="ij")) == total).float()


class CoordSum(BatchedEnv):
    """The paper's own environment: name integers that add up to a target which everybody sees.

    Each step everybody gets 2 if the actions add up to the target, but 1 if agent 0's action is the one that it has
    played most often for this target in this episode (ties, and a target never seen before, resolve to the smallest
    action), and 0 if they do not add up. Targets are uniform and independent. Observations are the target, one-hot.
    The official code keeps one record row per action instead of per target, so that large targets share one: returns
    are not comparable one to one with the paper's.

    Args:
        num_agents, num_actions, num_targets: N, A (actions 0..A-1) and M (targets 0..M-1; observations have D = M).
    """

    def __init__(self, num_envs, device="cpu", num_agents=3, num_actions=10, num_targets=30, dtype=torch.float32):
        super().__init__(num_envs, device, num_agents, num_targets, num_actions, 100, False, False, dtype)
        names = ("random", "best without memory", "best with memory")
        scores = {
            (3, 10, 30): (6.4, 119.4, 180.9),
            (3, 30, 50): (2.6, 142.5, 198.0),
            (5, 20, 80): (2.4, 156.5, 198.8),
            (8, 15, 100): (1.9, 162.7, 199.0),
        }
        self.references = dict(zip(names, scores.get((num_agents, num_actions, num_targets), ())))
        self.num_actions, self.num_targets = num_actions, num_targets
        self._copies = torch.arange(num_envs, device=device)
        self._one_hot = torch.eye(num_targets, dtype=dtype, device=device)

    EPISODE = ("record", "target")

    def _start(self):
        self.record = torch.zeros(self.num_envs, self.num_targets, self.num_actions, device=self.device)  # agent 0's plays
        self._draw_targets()

    def _draw_targets(self):
        self.target = torch.randint(self.num_targets, (self.num_envs,), generator=self.generator, device=self.device)

    def _observe(self):
        num_agents = self.single_observation_space.shape[0]
        return self._one_hot[self.target].unsqueeze(1).expand(-1, num_agents, -1)  # (E, N, M)

    def _advance(self, actions):
        habit = self.record[self._copies, self.target].argmax(-1)  # (E,), the first of equals
        hit = actions.sum(-1) == self.target
        rewards = hit.to(self.dtype) * (2.0 - (actions[:, 0] == habit).to(self.dtype))
        self.record[self._copies, self.target, actions[:, 0]] += 1
        self._draw_targets()
        return rewards


class SimpleSpread(BatchedEnv):
    """mpe2's simple_spread_v3, number for number: N agents cover N landmarks without bumping into each other.

    Observation of one agent, D = 6 N: its velocity and position, the landmarks and then the other agents relative to
    it, and the others' (always silent) communication. Actions: 0 stay, 1 left, 2 right, 3 down, 4 up; or, continuous,
    five thrusts in [0, 1] in the same order. Source: mpe2 1.1.1, simple_spread.py and _mpe_utils/. The state, S = 6 N:
    all positions, velocities and landmarks (no agent sees the others' velocities).

    Args:
        num_agents: N, of agents and of landmarks; at least 2.
        continuous: five thrusts instead of five actions.
        max_cycles: steps per episode.
        local_ratio: weight in [0, 1] of an agent's own collisions against the landmarks' distances.
        num_agent_neighbors, num_landmark_neighbors: an agent sees this many others and landmarks, the nearest ones,
            nearest first (zeros where there are fewer): D = 4 + 4 others + 2 landmarks. None: all, in a fixed order.
        state: give the state in infos.
    """

    SENSITIVITY, TIME_STEP, DAMPING = 5.0, 0.1, 0.25
    CONTACT_FORCE, CONTACT_MARGIN, CONTACT_DISTANCE = 100.0, 1e-3, 0.3  # two agents of size 0.15 touch at 0.3

    def __init__(
        self,
        num_envs,
        device="cpu",
        num_agents=3,
        continuous=False,
        max_cycles=25,
        local_ratio=0.5,
        num_agent_neighbors=None,
        num_landmark_neighbors=None,
        state=False,
        dtype=torch.float32,
    ):
        if num_agents < 2:
            raise ValueError(f"SimpleSpread needs at least 2 agents, not {num_agents}.")
        seen = self.seen = num_agent_neighbors, num_landmark_neighbors
        if any(count is not None and count < 1 for count in seen):
            raise ValueError(f"An agent sees at least 1 neighbor and 1 landmark (or None: all), not {seen}.")
        others, landmarks = (all_ if count is None else count for count, all_ in zip(seen, (num_agents - 1, num_agents)))
        num_features = 4 + 4 * others + 2 * landmarks
        super().__init__(num_envs, device, num_agents, num_features, 5, max_cycles, continuous, False, dtype)
        self.num_agents, self.local_ratio, self.state_dim = num_agents, local_ratio, 6 * num_agents * state
        if (max_cycles, local_ratio) == (25, 0.5):
            scores = {3: (-26.34, -7.63), 5: (-35.92, -11.54), 10: (-54.5, -23.3)}
            scores = {3: (-25.40,), 5: (-33.39,), 10: (-51.84,)} if continuous else scores
            names = ("random", "heuristic") if seen == (None, None) else ("random",)  # the heuristic sees everything
            self.references = dict(zip(names, scores.get(num_agents, ())))
        ids = torch.arange(num_agents, device=device)
        self._others = ids.expand(num_agents, -1)[ids != ids.unsqueeze(1)].view(num_agents, -1)  # (N, N - 1)
        self._thrust = torch.tensor([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], dtype=dtype, device=device)  # (5, 2)
        self._silence = torch.zeros(num_envs, num_agents, 2 * others, dtype=dtype, device=device)

    EPISODE = ("position", "velocity", "landmarks")

    def _start(self):
        self.position, self.landmarks = (2 * self._uniform(2, self.num_envs, self.num_agents, 2) - 1).unbind(0)  # (E, N, 2)
        self.velocity = torch.zeros_like(self.position)

    def _to_others(self):
        offset = self.position[:, self._others] - self.position.unsqueeze(2)  # (E, N, N - 1, 2)
        return offset, torch.linalg.vector_norm(offset, dim=-1)

    def _observe(self):
        to_others, to_landmarks = self._to_others()[0], self.landmarks.unsqueeze(1) - self.position.unsqueeze(2)
        to_others, to_landmarks = (self._nearest(*pair) for pair in zip((to_others, to_landmarks), self.seen))
        return torch.cat([self.velocity, self.position, to_landmarks, to_others, self._silence], -1)

    @staticmethod
    def _nearest(offset, count):
        """Offsets (E, N, M, 2) -> the `count` nearest, zeros where there are fewer: (E, N, 2 count). None: all M."""
        if count is None:
            return offset.flatten(2)
        nearest = torch.linalg.vector_norm(offset, dim=-1).topk(min(count, offset.shape[2]), largest=False).indices
        chosen = offset.take_along_dim(nearest.unsqueeze(-1), 2).flatten(2)
        return torch.nn.functional.pad(chosen, (0, 2 * count - chosen.shape[-1]))

    def _state(self):
        return torch.cat([self.position, self.velocity, self.landmarks], -1).flatten(1)  # (E, 6 N)

    def _advance(self, actions):
        thrust = actions.to(self.dtype) @ self._thrust if self.continuous else self._thrust[actions]  # (E, N, 2)
        offset, distance = self._to_others()
        depth = self.CONTACT_MARGIN * torch.nn.functional.softplus(
            (self.CONTACT_DISTANCE - distance) / self.CONTACT_MARGIN, threshold=40
        )
        push = (self.CONTACT_FORCE * depth / distance).unsqueeze(-1) * offset  # what the others feel, so minus it here
        force = self.SENSITIVITY * thrust - push.sum(2)
        self.position = self.position + self.velocity * self.TIME_STEP
        self.velocity = self.velocity * (1 - self.DAMPING) + force * self.TIME_STEP
        to_landmarks = torch.linalg.vector_norm(self.position.unsqueeze(1) - self.landmarks.unsqueeze(2), dim=-1)
        uncovered = to_landmarks.amin(-1).sum(-1)  # (E, L, N) -> (E,)
        collisions = (self._to_others()[1] < self.CONTACT_DISTANCE).sum((1, 2)).to(self.dtype) / self.num_agents
        return -(1 - self.local_ratio) * uncovered - self.local_ratio * collisions


ENVS = {
    "matrix_climbing": (MatrixGame, {"payoff": CLIMBING}),
    "matrix_penalty": (MatrixGame, {"payoff": PENALTY}),
    "matrix_xor": (MatrixGame, {"payoff": XOR}),
    "matrix_sum10": (MatrixGame, {"payoff": sum_game()}),
    "coordsum_3x10": (CoordSum, {}),
    "coordsum_3x30": (CoordSum, {"num_actions": 30, "num_targets": 50}),
    "coordsum_5x20": (CoordSum, {"num_agents": 5, "num_actions": 20, "num_targets": 80}),
    "coordsum_8x15": (CoordSum, {"num_agents": 8, "num_actions": 15, "num_targets": 100}),
    "mpe_spread": (SimpleSpread, {}),
    "mpe_spread_5ag": (SimpleSpread, {"num_agents": 5}),
    "mpe_spread_10ag": (SimpleSpread, {"num_agents": 10}),
    "mpe_spread_partial": (SimpleSpread, {"num_agent_neighbors": 1, "num_landmark_neighbors": 1}),
    "mpe_spread_continuous": (SimpleSpread, {"continuous": True}),
    "mpe_spread_5ag_continuous": (SimpleSpread, {"num_agents": 5, "continuous": True}),
    "mpe_spread_10ag_continuous": (SimpleSpread, {"num_agents": 10, "continuous": True}),
}

# --- Adapters: other people's environments ----------------------------------------------------------------------------


class TupleEnv:
    """A gymnasium environment with Tuple spaces, one entry per agent, as a PettingZoo parallel one that nobody leaves early."""

    def __init__(self, env):
        self.env, self.close = env, env.close
        self.agents = self.possible_agents = list(range(len(env.action_space)))
        self.observation_space, self.action_space = env.observation_space.__getitem__, env.action_space.__getitem__

    def reset(self, seed=None):
        return dict(enumerate(self.env.reset(seed=seed)[0])), {}

    def step(self, actions):
        obs, rewards, *over, _ = self.env.step(tuple(actions.values()))
        rewards = np.broadcast_to(rewards, len(self.agents))  # some environments give one for all
        over = (dict.fromkeys(self.agents, bool(np.all(flags))) for flags in over)
        return dict(enumerate(obs)), dict(enumerate(rewards)), *over, {}

    def state(self):
        raise NotImplementedError  # as PettingZoo's do


def find_module(name):
    """Import a module by its name, or by its name within pettingzoo."""
    for full_name in (name, f"pettingzoo.{name}"):
        try:
            return importlib.import_module(full_name)
        except ModuleNotFoundError as error:
            if not f"{full_name}.".startswith(f"{error.name}."):  # the module is there, but not what it needs itself
                raise
    raise ModuleNotFoundError(f"No module named {name!r} or 'pettingzoo.{name}'")


def parallel_env(env_id, kwargs):
    """One environment with PettingZoo's parallel interface; ValueError if there is none, or not with these arguments."""
    kind, _, name = env_id.partition(":")
    try:
        if kind == "pettingzoo":
            module = find_module(name)
            if not hasattr(module, "parallel_env"):
                raise ValueError(f"{env_id} has no parallel_env: choose one where agents act at once, not in turns (AEC).")
            return module.parallel_env(**kwargs)
        for prefix, package in (("Foraging", "lbforaging"), ("rware", "rware")):
            if name.startswith(prefix):
                importlib.import_module(package)  # it registers its environments
        env = gymnasium.make(name, disable_env_checker=True, **kwargs)
    except ImportError as error:
        raise ValueError(f"{env_id}: {error}; correct the name, or pip install what is missing.") from error
    except (TypeError, AssertionError, gymnasium.error.Error) as error:
        raise ValueError(f"{env_id} cannot be made with the options {kwargs}: {error}") from error
    if not all(isinstance(space, spaces.Tuple) for space in (env.observation_space, env.action_space)):
        raise ValueError(f"{env_id} is for a single agent: choose one whose spaces are Tuples with one entry per agent.")
    return TupleEnv(env)


class Team(gymnasium.Env):
    """One copy of an adapted environment, with arrays for the team in place of dicts by agent.

    Observations are a Dict: obs (N, D), active (N,), action_mask (N, A) if actions are discrete, state (S,) if S > 0.
    Smaller observations are padded with zeros; actions that an agent does not have are masked. An agent that has left is
    not active, may choose only action 0 where there are masks (nobody executes it) and counts as reward 0 in the mean. An
    episode ends when the last agent does, and is truncated if for one of those who were there to the end time ran out.
    """

    def __init__(self, env_id, kwargs, state_dim=0):
        self.env_id, self.env, self.state_dim = env_id, parallel_env(env_id, kwargs), state_dim
        self.ids = list(self.env.possible_agents)
        sees = [self.env.observation_space(agent) for agent in self.ids]
        # PettingZoo's convention for masks: a Dict of "observation" and "action_mask"
        self.sees = [s.spaces.get("observation", s) if isinstance(s, spaces.Dict) else s for s in sees]
        self.acts = [self.env.action_space(agent) for agent in self.ids]
        self.discrete = all(isinstance(space, spaces.Discrete) for space in self.acts)
        self._check_spaces()
        num_agents, num_features = len(self.ids), max(map(spaces.flatdim, self.sees))
        parts = {"obs": spaces.Box(-np.inf, np.inf, (num_agents, num_features)), "active": spaces.MultiBinary(num_agents)}
        if self.discrete:
            sizes = [int(space.n) for space in self.acts]
            self.action_space = spaces.MultiDiscrete([max(sizes)] * num_agents)
            parts["action_mask"] = spaces.MultiBinary((num_agents, max(sizes)))
        else:
            bounds = ([getattr(space, side).ravel() for space in self.acts] for side in ("low", "high"))
            self.low, self.high = (np.stack(bound, dtype=np.float32) for bound in bounds)  # (N, A)
            if not np.isfinite(self.high - self.low).all():
                raise ValueError(f"{self.env_id} has actions without bounds: wrap it so that they lie in a finite box.")
            self.action_space = spaces.Box(0.0, 1.0, self.low.shape, np.float32)  # stands for [low, high]
        if state_dim:
            parts["state"] = spaces.Box(-np.inf, np.inf, (state_dim,))
        self.observation_space = spaces.Dict(parts)
        self.masked = self.discrete and min(sizes) < max(sizes)  # may actions be forbidden?

    def _check_spaces(self):
        vectors = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
        for space in self.sees:
            if not isinstance(space, vectors) or len(space.shape) > (1 if space.dtype == np.uint8 else 2):
                raise ValueError(f"{self.env_id} shows its agents {space}: choose vectors, not images or Dicts.")
        if not self.discrete and not all(isinstance(space, spaces.Box) for space in self.acts):
            raise ValueError(f"{self.env_id} has the actions {self.acts}: choose options that make all Discrete or all Box.")
        if not self.discrete and len({space.shape for space in self.acts}) > 1:
            raise ValueError(f"{self.env_id} has continuous actions of several sizes, {self.acts}: choose discrete ones.")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is None:  # never passed on, because some environments then ask the operating system for a seed
            seed = int(self.np_random.integers(2**31))
        obs, infos = self.env.reset(seed=seed)
        self.present = set(self.env.agents)
        return self._arrays(obs, infos, self.present), {}

    def step(self, actions):
        if self.discrete:
            actions = [int(action) + int(space.start) for action, space in zip(actions, self.acts)]
        else:
            actions = self.low + np.clip(actions, 0, 1) * (self.high - self.low)
            actions = [action.reshape(space.shape).astype(space.dtype) for action, space in zip(actions, self.acts)]
        actions = {agent: action for agent, action in zip(self.ids, actions) if agent in self.env.agents}
        obs, self.rewards, terminated, truncated, infos = self.env.step(actions)
        before = self.present
        self.present = {agent for agent in self.env.agents if not (terminated.get(agent) or truncated.get(agent))}
        out_of_time = {agent for agent in before - self.present if not terminated.get(agent)}
        over = not self.present
        arrays = self._arrays(obs, infos, out_of_time if over else self.present)  # active: those who could go on
        reward = sum(map(float, self.rewards.values())) / len(self.ids)
        return arrays, reward, over and not out_of_time, over and bool(out_of_time), {}

    def _arrays(self, obs, infos, active):
        if strangers := set(self.env.agents) - set(self.ids):
            raise ValueError(f"{self.env_id} lets in {strangers}: choose one where all agents are in its possible_agents.")
        arrays = {key: np.zeros(space.shape, space.dtype) for key, space in self.observation_space.items()}
        for i, agent in enumerate(self.ids):
            arrays["active"][i] = agent in active
            if agent in obs:
                seen, mask = obs[agent], infos.get(agent, {}).get("action_mask")
                if isinstance(seen, dict):
                    seen, mask = seen["observation"], seen.get("action_mask", mask)
                seen = spaces.flatten(self.sees[i], seen)
                arrays["obs"][i, : len(seen)] = seen
                if self.discrete and agent in active:
                    self.masked |= mask is not None
                    arrays["action_mask"][i, : self.acts[i].n] = 1 if mask is None else mask
        if self.discrete:  # something must be allowed, where the agent has left or may do nothing
            arrays["action_mask"][~arrays["action_mask"].any(1), 0] = 1
        if self.state_dim:
            arrays["state"][:] = np.ravel(self.env.state())
        return arrays

    def close(self):
        self.env.close()


def in_worker(*args):
    """A Team in a process of its own, which a Ctrl-C meant for the whole group shall not stop in the middle of a step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return Team(*args)


def probe(env_id, kwargs, state):
    """Play 200 random, allowed steps on a copy of its own -> keys that infos will have, state_dim.

    ValueError if the agents compete, or there is no state. Global random numbers are left as they were.
    """
    saved, state_dim = (random.getstate(), np.random.get_state()), 0
    try:
        with torch.random.fork_rng(devices=[]):
            team = Team(env_id, kwargs)
            arrays, _ = team.reset(seed=6)  # where the two sides of mpe2's simple_tag soon meet, as they rarely do at random
            if state:
                try:
                    state_dim = np.size(team.env.state())
                except NotImplementedError:  # PettingZoo's own answer where an environment has none
                    raise ValueError(f"{env_id} has no state(): leave state=True away.") from None
            team.action_space.seed(6)
            for _ in range(200):
                mask = tuple(arrays["action_mask"]) if team.discrete else None
                arrays, _, terminated, truncated, _ = team.step(team.action_space.sample(mask))
                rewards = team.rewards.values()
                if min(rewards, default=0) < 0 < max(rewards, default=0):
                    raise ValueError(
                        f"{env_id} rewards one agent while it punishes another, but MAGPO needs a shared goal: "
                        "choose a cooperative environment, or its option for a shared reward."
                    )
                if terminated or truncated:
                    arrays, _ = team.reset()
            team.close()
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
    given = {"action_mask": team.masked, "active": env_id.startswith("pettingzoo:"), "state": state}
    return [key for key in given if given[key]], state_dim


class AdaptedEnv(VectorWrapper):
    """E Teams in gymnasium's SyncVectorEnv or AsyncVectorEnv: torch tensors in and out, and the infos promised above.

    Arguments and errors are those of `make`.
    """

    references: dict[str, float] = {}
    note = "the team's reward is the mean over agents"

    def __init__(self, env_id, num_envs, device="cpu", num_workers=0, state=False, **kwargs):
        if num_workers not in (0, num_envs):
            raise ValueError(f"num_workers must be 0 or num_envs ({num_envs}): gymnasium runs one process per copy.")
        self.device = torch.device(device)
        self.keys, self.state_dim = probe(env_id, kwargs, state)
        vector_env = AsyncVectorEnv if num_workers else SyncVectorEnv
        copies = [partial(in_worker if num_workers else Team, env_id, kwargs, self.state_dim)] * num_envs
        super().__init__(vector_env(copies, autoreset_mode=AutoresetMode.SAME_STEP))
        self.observation_space = self.env.observation_space["obs"]
        self.single_observation_space = self.env.single_observation_space["obs"]

    def reset(self, *, seed=None, options=None):
        """Start E new episodes -> observations (E, N, D), infos. Without a seed the generators go on."""
        if seed is not None:  # gymnasium's own seed + i would let runs with neighbouring seeds share most of their copies
            seed = [int(word) for word in np.random.SeedSequence(seed).generate_state(self.num_envs)]
        arrays, _ = self.env.reset(seed=seed, options=options)
        return self._tensors(arrays, arrays)

    def state_dict(self):
        """Nothing: other people's environments cannot be saved."""
        return {}

    def step(self, actions):
        """Actions (E, N), or (E, N, A) if continuous -> observations, rewards, terminations, truncations, infos.

        Raises:
            ValueError: the actions have another shape.
        """
        actions = check_shape(torch.as_tensor(actions).cpu().numpy(), self.action_space)
        arrays, rewards, terminations, truncations, infos = self.env.step(actions)
        final = {key: array.copy() for key, array in arrays.items()}
        for i in np.flatnonzero(terminations | truncations):
            for key, value in infos["final_obs"][i].items():
                final[key][i] = value
        obs, infos = self._tensors(arrays, final)
        rewards = torch.as_tensor(rewards, dtype=torch.float32, device=self.device)
        return obs, rewards, *(torch.as_tensor(x, device=self.device) for x in (terminations, truncations)), infos

    def _tensors(self, arrays, final):
        arrays = {key: arrays[key] for key in ("obs", *self.keys)} | {f"final_{key}": final[key] for key in ("obs", *self.keys)}
        tensors = {key: torch.as_tensor(array, device=self.device) for key, array in arrays.items()}
        tensors = {key: x.bool() if x.dtype == torch.int8 else x for key, x in tensors.items()}
        return tensors.pop("obs"), tensors


def make(env_id, num_envs, device="cpu", num_workers=0, state=False, **kwargs):
    """Build E copies of an environment as one gymnasium.vector.VectorEnv.

    Args:
        env_id: a key of ENVS, "pettingzoo:<module>" or "gym:<id>".
        num_envs: E.
        device: where the tensors live.
        num_workers: of an adapted environment: 0 steps its copies one after the other, E gives each a process of its own.
        state: give infos["state"], where the environment has a state.
        **kwargs: passed on to the environment's constructor, over the table's.

    Raises:
        ValueError: there is no such environment, or it does not fit; the sentence says why.
    """
    if env_id.startswith(("pettingzoo:", "gym:")):
        return AdaptedEnv(env_id, num_envs, device, num_workers, state, **kwargs)
    if env_id not in ENVS:
        raise ValueError(f"There is no environment {env_id!r}; choose one of {', '.join(ENVS)}, pettingzoo:<module>, gym:<id>.")
    env_class, defaults = ENVS[env_id]
    if num_workers:
        raise ValueError(f"{env_id} computes all its copies at once: leave num_workers at 0.")
    if state:
        if env_class is not SimpleSpread:
            raise ValueError(f"{env_id} has no state beyond its observations: leave state=True away.")
        kwargs["state"] = True
    try:
        return env_class(num_envs, device, **{**defaults, **kwargs})
    except TypeError as error:
        raise ValueError(f"{env_id} cannot be made with the options {kwargs}: {error}") from error


# --- Around a run: its folder, its processes --------------------------------------------------------------------------

VERSION = 1  # of checkpoints
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's: this process, how many


def make_envs(args, num_envs, device="cpu"):
    """E copies of the environment that magpo.Args name -> gymnasium.vector.VectorEnv; ValueError if they cannot be made."""
    if args.num_workers not in (0, args.num_envs):
        raise ValueError("num_workers must be 0 or num_envs: gymnasium runs one process per copy.")
    workers = num_envs if args.num_workers and num_envs > 1 else 0
    try:
        kwargs = dict(**json.loads(args.env_kwargs))
    except (ValueError, TypeError):
        raise ValueError(f"env_kwargs must be a JSON object such as '{{\"N\": 5}}', not {args.env_kwargs!r}.") from None
    return make(args.env, num_envs, device, workers, args.state, **kwargs)


def validate(args):
    """Raise ValueError, in one sentence, for options (magpo.Args) that cannot work."""
    may_be_zero = {"seed", "gamma", "gae_lambda", "ent_coef", "vf_coef", "lam", "num_workers"}
    for name, value in vars(args).items():
        if type(value) in (int, float) and not (value > 0 or value == 0 and name in may_be_zero):
            raise ValueError(f"{name} must {'not be negative' if name in may_be_zero else 'be above 0'}, but is {value}.")
    samples = args.num_envs // WORLD * (1 if args.recurrent else args.num_steps)
    for good, message in (
        (args.algo in ("magpo", "mappo", "ctds"), f"algo must be magpo, mappo or ctds, but is {args.algo!r}."),
        (args.backtracking in ("soft", "reset"), f"backtracking must be soft or reset, but is {args.backtracking!r}."),
        (max(args.gamma, args.gae_lambda) <= 1, "gamma and gae_lambda must lie in [0, 1]."),
        (args.delta > 1, f"delta must be above 1 (the guider's distance from the learners), but is {args.delta}."),
        (samples % args.num_minibatches == 0, "num_minibatches must divide num_envs x num_steps, or num_envs if recurrent."),
        (args.seed < 2**32, f"seed must lie in [0, 2**32), but is {args.seed}."),
        (not (args.algo == "mappo" and args.residual), "mappo has no guider policy, so it knows neither residual nor reset."),
        (args.eval or not args.render, "render needs eval: it shows the learners of a checkpoint."),
        (args.num_envs % WORLD == 0, f"num_envs must be a multiple of torchrun's processes, {WORLD}."),
        (args.total_timesteps >= args.num_envs * args.num_steps, "total_timesteps is below one rollout, num_envs x num_steps."),
    ):
        if not good:
            raise ValueError(message)
    make_envs(args, 1).close()


def gather(x):
    """(T, E, ...) of this process -> (T, K E, ...) of all K processes of torchrun; x itself if there is one."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, 1)


def share_gradients(parameters):
    """The same list; from now on a backward pass leaves, in each parameter, the mean of all processes' gradients."""

    def mean(gradient):
        dist.all_reduce(gradient := gradient / WORLD)
        return gradient

    for parameter in parameters if WORLD > 1 else ():
        parameter.register_hook(mean)
    return parameters


def check_finite(iteration, cause, quantities):
    """Raise FloatingPointError for the quantity (of a dict of tensors) in whose first axis nan or infinity comes first."""
    bad = {name: ~x.reshape(len(x), -1).isfinite().all(1) for name, x in quantities.items()}
    first = {name: x.int().argmax().item() for name, x in bad.items() if x.any()}
    if first:
        name = min(first, key=first.get)
        raise FloatingPointError(f"iteration {iteration}: {name} is not finite; likely cause: {cause}")


def catch_signals():
    """A list that will hold the number of the first Ctrl-C or SIGTERM; a second one ends the process at once."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def catch(number, _):
        caught.append(number)
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nStopping after this iteration.\n")  # print may be in the middle of something

    for number in numbers:
        signal.signal(number, catch)
    return caught


def read_checkpoint(path, device="cpu"):
    """Read a checkpoint, or that of a run's folder -> dict; ValueError if it cannot be read.

    It runs no code of the file's; but the environment it names is imported, by whoever uses it.
    """
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        contents = torch.load(path, map_location=device, weights_only=True)
        if contents["version"] == VERSION and {"args", "iteration", "rows", "here", "guider", "learner"} <= contents.keys():
            return contents
        reason = f"its version is {contents['version']}, not {VERSION}, or it is not whole"
    except Exception as error:  # torch.load raises many kinds for missing, empty, cut, foreign and malicious files
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
    raise ValueError(f"{path} cannot be read as a checkpoint of magpo.py: {reason}")


class Run:
    """A run's device and folder: metrics.csv, TensorBoard events and checkpoint.pt. Of torchrun's processes, rank 0 writes.

    Args:
        args: magpo.Args, asdict'ed; "resume" is empty, or the run to go on with.

    Attributes:
        device: where to train. path: the folder. seed: of this process's environments and sampling.
        iteration, num_iterations: how many are behind us, and in all. leads: whether this process writes and prints.

    Raises:
        ValueError: no checkpoint to go on from. OSError: the folder cannot be written.
    """

    def __init__(self, args):
        self.args = args
        cuda = self.args["cuda"] and torch.cuda.is_available()
        self.leads = RANK == 0
        sys.stdout = sys.stdout if self.leads else open(os.devnull, "w")
        if self.args["cuda"] and not cuda:
            print("--cuda: PyTorch sees no GPU here; training on the CPU.")
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with one of these
        self.saved = read_checkpoint(args["resume"], self.device) if args["resume"] else {}
        if WORLD > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
            atexit.register(dist.destroy_process_group)
        torch.manual_seed(self.args["seed"])
        torch.use_deterministic_algorithms(self.args["torch_deterministic"], warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it costs 2 %, and everything here is initialized
        torch.set_num_threads(self.args["torch_threads"])
        self.iteration, self.rows = self.saved.get("iteration", 0), self.saved.get("rows", [])
        self.generator = torch.cuda.default_generators[self.device.index] if cuda else torch.default_generator
        self.samples = self.args["num_envs"] * self.args["num_steps"]
        self.num_iterations = self.args["total_timesteps"] // self.samples
        self.seed = self.args["seed"]
        if RANK or self.iteration:  # PyTorch's generators on the CPU heed 32 bits of a seed only, so that adding will not do
            self.seed = int(np.random.SeedSequence((self.seed, RANK, self.iteration)).generate_state(1)[0])
        name = "{env}__{algo}__{seed}__".format(**self.args).replace(":", "_") + f"{time.time():.2f}"
        self.file = self.table = None
        self.path = Path(args["resume"] or Path(args["runs_dir"]) / name)
        self.path = self.path.parent if self.path.is_file() and self.saved else self.path
        if self.leads:
            self.path.mkdir(parents=True, exist_ok=bool(self.saved))
            self.writer = SummaryWriter(self.path, purge_step=self.iteration * self.samples + 1)
        before = self.rows[-1] if self.rows else {"seconds": 0, "cpu_seconds": 0}
        self.start = time.time() - before["seconds"], time.process_time() - before["cpu_seconds"]

    def place(self, *networks):
        """The same networks on the run's device; their forward passes, and so the updates, compiled if --compile asks for it.

        On a GPU as CUDA graphs: what a call returns is overwritten by the next one.
        """
        for network in networks:
            network.to(self.device)
            if self.args["compile"]:
                network.compile(mode="reduce-overhead" if self.device.type == "cuda" else "default")
        return networks

    def iterations(self, note, stop):
        """Numbers, from 1, of the iterations still to go, until a process has something in its list `stop`; with a progress bar.

        Says first what of the options does not count.
        """
        print(note, end="\n" if note else "")
        if self.num_iterations * self.samples < self.args["total_timesteps"]:
            print(f"total_timesteps is cut to {self.num_iterations * self.samples}, a multiple of num_envs x num_steps.")
        if (self.args["algo"], self.args["backtracking"]) != ("magpo", "soft"):
            bound = "" if self.args["algo"] == "mappo" else f", delta {self.args['delta']}"
            print("{algo}, {backtracking} backtracking: lambda is {lam}".format(**self.args) + f"{bound}, by definition.")
        bar = dict(
            unit="step", unit_scale=self.samples, initial=self.iteration, total=self.num_iterations, disable=not self.leads
        )
        self.bar = tqdm(range(self.iteration + 1, self.num_iterations + 1), **bar)
        for iteration in self.bar:
            yield iteration
            if gather(torch.full((1, 1), len(stop), device=self.device)).any():
                break

    def restore(self, parts):
        """Load what has a state_dict -> what else was saved "here": empty at a start, or if the episodes start anew."""
        for name, part in parts.items() if self.saved else ():
            part.load_state_dict(self.saved[name])
        here = self.saved.get("here", {})
        if WORLD == 1 and here.get("device") == self.device.type:
            self.generator.set_state(here["generator"].cpu())
            return here
        if self.saved:
            print("Episodes start anew: these environments cannot be saved, or not from this device or number of processes.")
        if self.seed != self.args["seed"]:
            torch.manual_seed(self.seed)
        return {}

    def save(self, parts, envs, air):
        """Replace the checkpoint at once: whoever is killed meanwhile, or finds the disk full, leaves the old one whole."""
        if not self.leads:
            return
        here = dict(envs=envs.state_dict(), air=air, generator=self.generator.get_state(), device=self.device.type)
        contents = dict(version=VERSION, args=self.args | {"resume": ""}, iteration=self.iteration, rows=self.rows)
        contents |= {name: part.state_dict() for name, part in parts.items()}
        memory = io.BytesIO()  # so that a full disk is an OSError, and nothing is computed while the file is open
        torch.save(contents | {"here": here if here["envs"] and WORLD == 1 else {}}, memory)
        with open(self.path / "checkpoint.tmp", "wb") as file:
            file.write(memory.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.path / "checkpoint.pt")
        self.writer.flush()

    def log(self, iteration, row):
        """Count an iteration as done, and add its row, behind the step and the times so far, to metrics.csv and TensorBoard."""
        self.iteration, step = iteration, iteration * self.samples
        if not self.leads:
            return
        row = dict(step=step, seconds=time.time() - self.start[0], cpu_seconds=time.process_time() - self.start[1]) | row
        if self.table is None:
            self.file = open(self.path / "metrics.csv", "w", newline="")
            self.table = csv.DictWriter(self.file, row)
            self.table.writeheader()
            self.table.writerows(self.rows)
        self.rows.append(row)
        self.table.writerow(row)
        self.file.flush()
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        if row["learner_return"] == row["learner_return"]:  # there was an evaluation
            self.bar.set_postfix({name: f"{row[name]:.2f}" for name in ("guider_return", "learner_return")})

    def close(self):
        """Close the files, and say where they are."""
        self.writer.close()
        if self.file:  # a finished run may be resumed, to no effect
            self.file.close()
        print(f"Everything is in {self.path}")
        if self.iteration < self.num_iterations:
            print(f"Stopped after iteration {self.iteration}. To go on: python magpo.py --resume {self.path}")
