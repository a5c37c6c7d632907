"""Other people's environments in Python, behind envs.py's contract.

    pettingzoo:<module>   a module, or pettingzoo.<module>, whose parallel_env() has PettingZoo's interface
    gym:<id>              a gymnasium environment with Tuple spaces, one entry an agent; or gym:<module>:<id>

Every copy is one Python object, a Team; gymnasium's SyncVectorEnv or AsyncVectorEnv steps them. Nothing is
guessed from a trial: shapes, masks, rewards and ends are read and checked in every step.
"""

import importlib
import multiprocessing.connection
import os
import random
import re
import reprlib
import signal
import traceback
import warnings
from functools import partial

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorWrapper

from envs import EnvFailure, check_counts, check_shape

UNKNOWN_LIMIT = 1000  # steps of an episode, for an environment that does not say
TIME_LIMIT = re.compile(  # names under which environments do say it
    r"_*(episode_)?max_((episode|env|num|game)_)?"
    r"(steps?|time_?steps?|cycles?|iter(ation)?s?|frames|turns|ep_len(gth)?|len(gth)?)(_per_episode)?"
    r"|_*(episode|time|steps?)_limit|_*(episode|ep)_len(gth)?|_*horizon",
    re.IGNORECASE,
)
ZERO_SUM_STEPS = 5  # so many steps whose rewards cancel out, and none whose rewards do not, are a competition


class Breach(Exception):
    """What an environment did against its interface. Team makes an EnvFailure of it, with where and when."""


class WorkerError(Exception):
    """The traceback, as text, of what an environment raised in a worker process."""


class Generators:
    """Environments' own `random`, `np.random` and torch generators; in a `with`, in the process's place.

    So a seed repeats, whatever else draws numbers in between. Training notices neither the numbers that its
    environments draw nor those of an evaluation.
    """

    def __init__(self, seed):
        words = [int(word) for word in np.random.SeedSequence(seed).generate_state(3)]
        self.python = random.Random(words[0]).getstate()
        self.numpy = np.random.MT19937(words[1])
        self.torch = torch.Generator().manual_seed(words[2]).get_state()

    def swap(self, *_):
        """Exchange these generators and the process's."""
        theirs = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
        random.setstate(self.python)
        np.random.set_bit_generator(self.numpy)
        torch.set_rng_state(self.torch)
        self.python, self.numpy, self.torch = theirs

    __enter__ = __exit__ = swap


def one_line(value):
    """A value, or an exception's type and words, in one line."""
    text = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else reprlib.repr(value)
    return " ".join(text.split())


def number(value, what):
    """A plain number of a number or an array of size 1; Breach for all else."""
    if isinstance(value, (float, int)):
        return value
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf":
        raise Breach(f"{what} is {one_line(value)}, not a number")
    return array.item()


def unpack(results, count, function):
    """The same tuple; Breach unless it has that many entries."""
    if not isinstance(results, tuple) or len(results) != count:
        size = f"{len(results)} values" if isinstance(results, tuple) else f"a {type(results).__name__}"
        raise Breach(f"{function} returns {size} instead of a tuple of {count}")
    return results


class TupleEnv:
    """A gymnasium environment with Tuple spaces, one entry per agent, as a PettingZoo parallel one."""

    def __init__(self, env):
        self.env, self.close = env, env.close
        self.agents = self.possible_agents = list(range(len(env.action_space)))
        self.observation_space = env.observation_space.__getitem__
        self.action_space = env.action_space.__getitem__

    def reset(self, seed=None):
        obs, info = unpack(self.env.reset(seed=seed), 2, "reset")
        return self._by_agent(obs, "observations"), self._infos(info)

    def step(self, actions):
        obs, *values, info = unpack(self.env.step(tuple(actions.values())), 5, "step")
        names = ("rewards", "terminations", "truncations")
        values = [self._by_agent(value, name, shared=True) for value, name in zip(values, names, strict=True)]
        return self._by_agent(obs, "observations"), *values, self._infos(info)

    def state(self):
        raise NotImplementedError  # as PettingZoo's do

    def _by_agent(self, values, what, shared=False):
        """A tuple, list or array as a dict by agent. If shared, one value may stand for all agents."""
        values = values if isinstance(values, (tuple, list)) else np.atleast_1d(values)
        if shared and len(values) == 1:
            values = list(values) * len(self.agents)
        if len(values) != len(self.agents):
            raise Breach(f"there are {len(values)} {what} for {len(self.agents)} agents")
        return dict(enumerate(values))

    def _infos(self, info):
        if isinstance(info, (tuple, list)):
            return self._by_agent(info, "infos")
        if not isinstance(info, dict) or info.get("action_mask") is None:
            return None
        masks = self._by_agent(info["action_mask"], "action masks")
        return {agent: {"action_mask": mask} for agent, mask in masks.items()}


def find_module(name):
    """Import a module by its name, or by its name within pettingzoo."""
    for full_name in (name, f"pettingzoo.{name}"):
        try:
            return importlib.import_module(full_name)
        except ModuleNotFoundError as error:
            # The module may be there, but not what it needs itself
            if not f"{full_name}.".startswith(f"{error.name}."):
                raise
    raise ModuleNotFoundError(f"No module named {name!r} or 'pettingzoo.{name}'")


def attempt(env_id, kwargs, function, *args):
    """What the function returns for these options; ValueError in one sentence for whatever it raises."""
    try:
        return function(*args, **kwargs)
    except ImportError as error:
        reason = one_line(error)
        raise ValueError(f"{env_id}: {reason}; correct the name, or pip install what is missing.") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{env_id} cannot be made with the options {kwargs}: {one_line(error)}") from error


def parallel_env(env_id, kwargs):
    """One environment with PettingZoo's parallel interface; ValueError if it cannot be made so."""
    kind, _, name = env_id.partition(":")
    if kind == "pettingzoo":
        if not all(name.split(".")):
            raise ValueError(f"{env_id} names no module, as pettingzoo:mpe2.simple_spread_v3 does.")
        module = attempt(env_id, {}, find_module, name)
        in_turns = hasattr(module, "env") or hasattr(module, "raw_env")
        if not in_turns and not hasattr(module, "parallel_env"):
            raise ValueError(f"{env_id} is no environment: the module {module.__name__} has no parallel_env.")
        if hasattr(module, "parallel_env"):
            env = attempt(env_id, kwargs, module.parallel_env)
            in_turns = hasattr(env, "agent_iter")
        if in_turns:
            why = "no parallel_env: choose one where agents act at once, not in turns (AEC)"
            raise ValueError(f"{env_id} has {why}.")
        return env
    for prefix, package in (("Foraging", "lbforaging"), ("rware", "rware")):
        if name.startswith(prefix):
            attempt(env_id, {}, importlib.import_module, package)  # it registers its environments
    env = attempt(env_id, kwargs, partial(gymnasium.make, name, disable_env_checker=True))
    tuples = [isinstance(space, spaces.Tuple) for space in (env.observation_space, env.action_space)]
    if not all(tuples) or len(env.observation_space) != len(env.action_space):
        raise ValueError(f"{env_id} is for a single agent: its spaces must be Tuples, one entry per agent.")
    return TupleEnv(env)


def is_count(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value > 0


def time_limits(env):
    """Where an environment, or what it wraps, keeps its time limit -> list of (object, attribute's name)."""
    found = []
    for _ in range(20):  # enough for all wrappers, and no trap if one leads back to itself
        names = filter(TIME_LIMIT.fullmatch, dir(env))
        found += [(env, name) for name in names if is_count(getattr(env, name, None))]
        inner = getattr(env, "aec_env", None)
        env = getattr(env, "env", None) if inner is None else inner
    return found


class Team(gymnasium.Env):
    """One copy of an adapted environment, with arrays for the team in place of dicts by agent.

    Observations are a Dict: obs (N, D), action_mask (N, A) if actions are discrete, state (S,) on demand.
    Smaller observations are padded with zeros. Actions that an agent does not have are masked. Who has left,
    or has not come yet, observes zeros, may choose only action 0, and counts as reward 0 in the mean.

    An episode is over when all have left. It is truncated if time ran out for one who was there to the end.
    Some packages report their time limit as a termination. So an end at the environment's own limit is a
    truncation, too, unless this environment has shown that it tells the two apart.

    What the environment does wrong is not raised, but returned as info["failure"], an EnvFailure: from a
    worker process the user's own exception could not be sent. info["mixed"]: it gave rewards of both signs.

    Args:
        env_id, kwargs, state: as in `make`.
        copy: number of this copy.

    Raises:
        ValueError: it cannot be made, or does not fit.
    """

    alone = False  # does it have a process of its own, whose generators it seeds?

    def __init__(self, env_id, kwargs, state, copy):
        self.env_id, self.copy = env_id, copy
        self.env = parallel_env(env_id, kwargs)
        try:
            self.ids = list(self.env.possible_agents)
            sees = [self.env.observation_space(agent) for agent in self.ids]
            self.acts = [self.env.action_space(agent) for agent in self.ids]
        except Exception as error:
            raise ValueError(f"{env_id} lacks possible_agents, or their spaces: {one_line(error)}") from error
        # PettingZoo's convention for masks: a Dict of "observation" and "action_mask"
        masked = [isinstance(s, spaces.Dict) and {*s} == {"observation", "action_mask"} for s in sees]
        self.sees = [s["observation"] if inside else s for s, inside in zip(sees, masked, strict=True)]
        self.discrete = all(isinstance(space, spaces.Discrete) for space in self.acts)
        self._check_spaces()
        self.known, self.sizes = set(self.ids), [spaces.flatdim(space) for space in self.sees]
        self.limits, self.tells_time = time_limits(self.env), False
        self.limit = self._limit()
        self.paid = self.cancelled = 0  # steps with rewards; of these, steps whose rewards added up to zero
        self.mixed = self.said = False
        self.state_dim = self._count_state() if state else 0

        parts = {"obs": spaces.Box(-np.inf, np.inf, (len(self.ids), max(self.sizes)))}
        if self.discrete:
            counts = np.array([space.n for space in self.acts])
            self.action_space = spaces.MultiDiscrete([counts.max()] * len(self.ids))
            self.all_allowed = (np.arange(counts.max()) < counts[:, None]).astype(np.int8)  # (N, A)
            parts["action_mask"] = spaces.MultiBinary(self.all_allowed.shape)
        else:
            num_actions = spaces.flatdim(self.acts[0])
            self.action_space = spaces.Box(0.0, 1.0, (len(self.ids), num_actions), np.float32)
        if state:
            parts["state"] = spaces.Box(-np.inf, np.inf, (self.state_dim,))
        self.observation_space = spaces.Dict(parts)
        self.shapes = [(name, space.shape, space.dtype) for name, space in parts.items()]

    def _check_spaces(self):
        vectors = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
        wrong = None if self.ids else "has no possible_agents"
        for space in self.sees:
            if not isinstance(space, vectors) or len(space.shape) > (1 if space.dtype == np.uint8 else 2):
                wrong = f"shows its agents {space}: choose vectors, not images or Dicts"
        if not self.discrete and not all(isinstance(space, spaces.Box) for space in self.acts):
            wrong = f"has the actions {self.acts}: choose options that make all Discrete or all Box"
        elif not self.discrete and len({space.shape for space in self.acts}) > 1:
            wrong = f"has continuous actions of several sizes, {self.acts}: choose discrete ones"
        elif not self.discrete:
            for space in self.acts:
                most = (
                    np.finfo(space.dtype).max if space.dtype.kind == "f" else 2**52
                )  # float64 counts so far
                if (np.abs(np.float64([space.low, space.high])) > most).any():
                    wrong = "has actions without bounds: wrap it so that they lie in a finite box"
        if wrong:
            raise ValueError(f"{self.env_id} {wrong}.")

    def _count_state(self):
        try:
            self.env.reset(seed=0)
            return np.size(self.env.state())
        except NotImplementedError:  # PettingZoo's own answer where there is none
            raise ValueError(f"{self.env_id} has no state(): leave state=True away.") from None
        except Exception as error:
            raise ValueError(f"{self.env_id} cannot show its state(): {one_line(error)}") from error

    def _limit(self):
        """The environment's own time limit; 0 if it has none."""
        return min(filter(is_count, (getattr(*place) for place in self.limits)), default=0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None and self.alone:
            Generators(seed).swap()
        if seed is None:
            # Not passed on, because some environments then ask the operating system for a seed
            seed = int(self.np_random.integers(2**31))
        self.time, self.left, self.present = 0, set(), set()
        (arrays, *_), info = self._attempt(self._reset, seed)
        return arrays, info

    def step(self, actions):
        self.time += 1
        results, info = self._attempt(self._step, actions)
        return *results, info

    def _attempt(self, function, argument):
        """What the function returns: (arrays, reward, terminated, truncated), info."""
        where = f"step {self.time} of copy {self.copy}" if self.time else f"reset of copy {self.copy}"
        try:
            return function(argument)
        except Breach as error:
            failure = EnvFailure(f"{self.env_id}, {where}: {error}.")
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split())
            failure = EnvFailure(f"{self.env_id} raised {type(error).__name__} in {where}: {text}")
            failure.__cause__ = error
            failure.trace = traceback.format_exc()  # a cause does not survive the way out of a worker
        return (self._zeros(), 0.0, False, False), {"failure": failure}

    def _zeros(self):
        return {name: np.zeros(shape, dtype) for name, shape, dtype in self.shapes}

    def _reset(self, seed):
        obs, infos = unpack(self.env.reset(seed=seed), 2, "reset")
        self.limit, self.present = self._limit(), self._listed()
        if not self.present or (self.present != self.known and not self.discrete):
            raise Breach(f"the agents {one_line(self.known - self.present)} are not there")
        return (self._arrays(self._by_agent(obs, "observations"), infos, self.present), 0.0, False, False), {}

    def _step(self, actions):
        listed = set(self.env.agents)  # also those who have left, if the environment keeps them on its list
        team = zip(self.ids, self.acts, actions, strict=True)
        actions = {agent: self._act(space, action) for agent, space, action in team if agent in listed}
        obs, rewards, terminated, truncated, infos = unpack(self.env.step(actions), 5, "step")
        obs, reward = self._by_agent(obs, "observations"), self._reward(rewards)
        over, out_of_time, gone = self._leave(terminated, truncated)
        # An episode's end shows those whom time stopped, for what they miss; without such, all who were there
        shown = (out_of_time or gone & obs.keys()) if over else self.present
        arrays, info = self._arrays(obs, infos, shown), {}
        if self.mixed and self.cancelled < self.paid and not (self.said or over):
            self.said, info = True, {"mixed": True}
        return (arrays, reward, over and not out_of_time, over and bool(out_of_time)), info

    def _listed(self):
        """The agents on the environment's list, without those who have left."""
        listed = set(self.env.agents)
        if not listed <= self.known:
            raise Breach(f"it lets in {one_line(listed - self.known)}, who is not in its possible_agents")
        return listed - self.left

    def _by_agent(self, values, what):
        """The same dict by agent; Breach if it is none."""
        if not isinstance(values, dict):
            raise Breach(f"the {what} are {one_line(values)}, not a dict by agent")
        if not values.keys() <= self.known:
            strangers = one_line(values.keys() - self.known)
            raise Breach(f"there are {what} of {strangers}, who is not in its possible_agents")
        return values

    def _act(self, space, action):
        """The environment's own action of an integer, or of numbers in [0, 1], one for each dimension."""
        if self.discrete:
            return int(action) + int(space.start)
        share = np.clip(action.astype(np.float64), 0, 1).reshape(space.shape)
        if space.dtype.kind in "iub":  # every integer has an equal part of [0, 1]
            low, high = space.low.astype(np.int64), space.high.astype(np.int64)
            action = np.minimum(low + np.floor(share * (high - low + 1)).astype(np.int64), high)
        else:  # rounding may leave the box
            action = np.clip(space.low * (1 - share) + space.high * share, space.low, space.high)
        return np.asarray(action, space.dtype)

    def _reward(self, rewards):
        """Check the rewards -> their mean over all agents; Breach if the agents compete."""
        rewards = self._by_agent(rewards, "rewards")
        values = [number(reward, f"the reward of agent {agent!r}") for agent, reward in rewards.items()]
        if missing := self.present - rewards.keys():
            raise Breach(f"agent {min(missing, key=self.ids.index)!r} has no reward")
        total, size = sum(values), sum(map(abs, values))
        if size > 0:
            self.paid += 1
            self.cancelled += abs(total) <= 1e-6 * size
            self.mixed = self.mixed or min(values) < 0 < max(values)
        if self.paid == self.cancelled >= ZERO_SUM_STEPS:
            raise Breach(
                "what one agent gains, others lose, but MAGPO needs a shared goal: "
                "choose a cooperative environment, or its option for a shared reward"
            )
        return total / len(self.ids)

    def _leave(self, terminated, truncated):
        """Strike off who leaves -> is the episode over, for whom did time run out, who has just left."""
        listed = self._listed()
        dead = self._flagged(terminated, "termination", listed)
        late = self._flagged(truncated, "truncation", listed) - dead
        gone = dead | late | (self.present - listed)
        self.left |= gone
        self.present = listed - gone
        over, out_of_time = not self.present, gone - dead
        self.tells_time = self.tells_time or bool(late)
        if over and 0 < self.limit <= self.time and not self.tells_time:
            out_of_time = gone
        if gone and not over and not self.discrete:
            agent = min(gone, key=self.ids.index)
            raise Breach(
                f"agent {agent!r} leaves before the others, but continuous actions cannot be masked: "
                "choose discrete ones, or an option that keeps all agents to the end"
            )
        return over, out_of_time, gone

    def _flagged(self, flags, what, listed):
        """Those of the agents that were there whose flag is set."""
        flags, found = self._by_agent(flags, f"{what}s"), set()
        for agent in self.present:
            if agent in flags:
                if number(flags[agent], f"the {what} of agent {agent!r}"):
                    found.add(agent)
            elif agent in listed:
                raise Breach(f"agent {agent!r} has no {what}")
        return found

    def _arrays(self, obs, infos, shown):
        """Arrays of what the agents in `shown` observe and may do."""
        if not isinstance(infos, dict | None):
            raise Breach(f"the infos are {one_line(infos)}, not a dict by agent")
        arrays = self._zeros()
        for i, agent in enumerate(self.ids):
            if agent in shown:
                seen, info = obs.get(agent), infos and infos.get(agent)
                mask = info.get("action_mask") if isinstance(info, dict) else None
                if isinstance(seen, dict):
                    seen, mask = seen.get("observation"), seen.get("action_mask", mask)
                arrays["obs"][i, : self.sizes[i]] = self._see(i, seen)
                if self.discrete:
                    arrays["action_mask"][i] = self.all_allowed[i] if mask is None else self._allowed(i, mask)
            elif self.discrete:
                arrays["action_mask"][i, 0] = 1
        if self.state_dim:
            state = np.ravel(self.env.state())
            if state.size != self.state_dim:
                raise Breach(
                    f"its state() has {state.size} numbers, but {self.state_dim} at first: it must show all "
                    "possible_agents, those that have left, too; or leave state=True away"
                )
            arrays["state"][:] = state
        return arrays

    def _see(self, i, seen):
        """One agent's observation as a vector."""
        space, what = self.sees[i], f"the observation of agent {self.ids[i]!r}"
        if seen is None:
            raise Breach(f"agent {self.ids[i]!r} has no observation")
        if isinstance(space, spaces.Discrete):
            seen = int(number(seen, what))
        else:
            try:
                seen = np.asarray(seen, np.float32 if isinstance(space, spaces.Box) else space.dtype)
            except (TypeError, ValueError):
                raise Breach(f"{what} is {one_line(seen)}, not an array of numbers") from None
            if seen.shape != space.shape and (seen.size, self.sizes[i]) != (1, 1):
                raise Breach(f"{what} has the shape {seen.shape}, but its space has {space.shape}")
        if isinstance(space, spaces.Box):
            return seen.ravel()
        if not space.contains(seen):
            raise Breach(f"{what} is {one_line(seen)}, which is not in {space}")
        return spaces.flatten(space, seen)

    def _allowed(self, i, mask):
        """One agent's row (A,) of the action mask. Who may do nothing at all may choose action 0."""
        mask, row, size = np.asarray(mask), self.all_allowed[i].copy(), int(self.acts[i].n)
        if mask.shape not in ((size,), row.shape) or not ((mask == 0) | (mask == 1)).all():
            what = f"the action mask of agent {self.ids[i]!r}"
            raise Breach(f"{what} is {one_line(mask)}, not {size} times 0 or 1")
        row[: len(mask)] *= mask.astype(bool)
        row[0] |= not row.any()
        return row

    def close(self):
        self.env.close()


def in_worker(main, env_id, kwargs, state, copy):
    """A Team in a process of its own, which a Ctrl-C for the whole group shall not stop within a step."""
    if os.getpid() == main:  # gymnasium makes one there, too, to look at its spaces
        return Team(env_id, kwargs, state, copy)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    Generators(copy).swap()  # or all copies that were forked would draw the same numbers
    try:
        team = Team(env_id, kwargs, state, copy)
    except ValueError as error:
        # A text goes to stderr, and one is enough
        raise SystemExit(1 if copy else f"In a worker: {error}") from None
    team.alone = True
    return team


class AdaptedEnv(VectorWrapper):
    """E Teams in gymnasium's SyncVectorEnv or AsyncVectorEnv, with the tensors and infos of envs.py.

    Arguments and errors are those of `make`.
    """

    references: dict[str, float] = {}
    win_return = None
    note = "the team's reward is the mean over agents"

    def __init__(self, env_id, num_envs, device="cpu", num_workers=0, state=False, **kwargs):
        check_counts(1, num_envs=num_envs)
        if num_workers not in (0, num_envs):
            raise ValueError(f"num_workers must be 0 or num_envs ({num_envs}): a process for each copy.")
        self.env_id, self.device, self.time, self.generators = env_id, torch.device(device), 0, Generators(0)
        maker = partial(in_worker, os.getpid()) if num_workers else Team
        copies = [partial(maker, env_id, kwargs, state, copy) for copy in range(num_envs)]
        vector_env = AsyncVectorEnv if num_workers else SyncVectorEnv
        try:
            with self.generators:
                super().__init__(vector_env(copies, copy=False, autoreset_mode=AutoresetMode.SAME_STEP))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise ValueError(
                f"{env_id} cannot be made in a worker process, which does not see what only the main script "
                "defines: name the module that registers it, as in gym:module:Id, or leave num_workers at 0."
            ) from None
        except OSError as error:
            raise ValueError(f"{env_id}: {num_workers} workers cannot be started: {error}") from error
        self.observation_space = self.env.observation_space["obs"]
        self.single_observation_space = self.env.single_observation_space["obs"]
        self.state_dim = self.env.get_attr("state_dim")[0]
        self.max_episode_steps = int(self.env.get_attr("limit")[0] or UNKNOWN_LIMIT)

    def reset(self, *, seed=None, options=None):
        """Start E new episodes -> observations (E, N, D), infos. Without a seed the generators go on.

        Raises:
            ValueError: there are options, but these environments have no state_dict() to go on from.
            EnvFailure: the environment broke its contract, or raised an exception.
        """
        if options:
            raise ValueError(f"{self.env_id} cannot be saved in mid-episode: reset it without options.")
        if seed is not None:
            # gymnasium's seed + i would let runs with neighbouring seeds share most of their copies
            words = np.random.SeedSequence(seed).generate_state(self.num_envs + 1)
            *seed, last = map(int, words)
            self.generators = Generators(last)
        self.time = 0
        arrays, _ = self._call(self.env.reset, seed=seed)
        return self._results(arrays, {})

    def state_dict(self):
        """Nothing: other people's environments cannot be saved."""
        return {}

    def step(self, actions):
        """Actions (E, N), or (E, N, A) if continuous -> obs, rewards, terminations, truncations, infos.

        Raises:
            ValueError: the actions have another shape.
            EnvFailure: the environment broke its contract, or raised an exception.
        """
        actions = check_shape(torch.as_tensor(actions).cpu().numpy(), self.action_space)
        self.time += 1
        arrays, rewards, *ends, infos = self._call(self.env.step, actions)
        last = {i: infos["final_obs"][i] for i in np.flatnonzero(ends[0] | ends[1])}
        obs, infos = self._results(arrays, last)
        rewards = torch.as_tensor(rewards, dtype=torch.float32, device=self.device)
        return obs, rewards, *(torch.as_tensor(x, device=self.device) for x in ends), infos

    def _call(self, function, *args, **kwargs):
        """What the vector environment's function returns; EnvFailure if a copy failed."""
        try:
            with self.generators:
                results = function(*args, **kwargs)
        except (EOFError, OSError):  # the pipe to a worker; what an environment raises comes in the infos
            raise self._dead_worker() from None
        infos = results[-1]
        for failure in filter(None, infos.get("failure", ())):
            trace = getattr(failure, "trace", "")
            raise failure from failure.__cause__ or (WorkerError(f"\n{trace}") if trace else None)
        if "mixed" in infos:
            words = "rewards some agents while it punishes others: MAGPO trains on the mean"
            warnings.warn(f"{self.env_id} {words}.", stacklevel=1)  # Python shows it once
        return results

    def _dead_worker(self):
        """EnvFailure that names the worker; the others are ended, since gymnasium cannot go on without it."""
        processes = self.env.processes
        dead = multiprocessing.connection.wait([process.sentinel for process in processes], timeout=5)
        copies = [i for i, process in enumerate(processes) if process.sentinel in dead]
        for process in processes:
            process.terminate()
            process.join()
        self.env.closed = True
        names = ", ".join(f"{i} (exit code {processes[i].exitcode})" for i in copies)
        return EnvFailure(f"{self.env_id}: the worker process of copy {names} died in step {self.time}.")

    def _results(self, arrays, last):
        """Arrays by name, and for copies whose episode ended those before the reset -> obs, infos."""
        infos = {}
        for name in ("obs", "state") if self.state_dim else ("obs",):
            infos[name] = infos[f"final_{name}"] = self._tensor(arrays[name])
            if last:
                final = arrays[name].copy()
                for i, before in last.items():
                    final[i] = before[name]
                infos[f"final_{name}"] = self._tensor(final)
        if "action_mask" in arrays:
            infos["action_mask"] = self._tensor(arrays["action_mask"]).bool()
        return infos.pop("obs"), infos

    def _tensor(self, array):
        return torch.tensor(array, device=self.device)  # a copy: gymnasium overwrites the array
