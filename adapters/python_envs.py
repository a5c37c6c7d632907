"""Other people's environments in Python behind envs.py's contract: PettingZoo's parallel ones, gymnasium's with Tuple spaces."""

import importlib
import random
import signal
from functools import partial

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorWrapper

from envs import check_shape


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
