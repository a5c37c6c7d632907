"""The paper's own suites behind envs.py's contract: Jumanji's and JaxMARL's environments, written in JAX.

    lbf:2s-8x8-2p-2f-coop   Level-Based Foraging (Jumanji)    D = 3 (agents + food), A = 6, at most 100 steps
    rware:tiny-4ag-hard     Robotic Warehouse (Jumanji)       D = 66,                A = 5,            500
    connector:con-5x5x3a    Connector (Jumanji)               D = 54,                A = 5,            G^2
    smax:2s3z               SMAX, scripted enemies (JaxMARL)  D by the task,   A = 5 + enemies,        101

TASKS has all names. Settings, observations and team rewards are those of MAGPO's official code
(github.com/liyheng/MAGPO, commit d2ac38b: mava/configs/env, mava/wrappers).

A suite is two pure functions of one copy, which JAX compiles for E copies:

    start(key) -> state, view
    advance(key, state, actions (N,)) -> state, view, reward, terminated, truncated

where view is a dict of obs (N, D), action_mask (N, A) and, in SMAX, state (S,). Arrays become tensors without
a copy where both libraries use the same device.
"""

import contextlib
import io
import os
import re
import sys

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from adapters.published import published
from envs import check_shape

# XLA reads both when it starts. JAX would take three quarters of a GPU, of which torch needs its share.
# One thread does slightly more more steps per CPU-second, and leaves the other cores to torch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

MISSING = "lbf:, rware:, connector: and smax: need more packages: pip install -r requirements-jax.txt ({})."
try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise ValueError(MISSING.format(error)) from error

# Handing a small step to another thread costs more than it gives
jax.config.update("jax_cpu_enable_async_dispatch", False)

# Mean team returns of random allowed actions, in 512 episodes (`python -m tests.test_jax_envs` prints them)
# fmt: off
TASKS = {
    "lbf": {
        "8x8-2p-2f-coop": 0.011,
        "2s-8x8-2p-2f-coop": 0.011,
        "10x10-3p-3f": 0.159,
        "2s-10x10-3p-3f": 0.159,
        "15x15-3p-5f": 0.082,
        "15x15-4p-3f": 0.128,
        "15x15-4p-5f": 0.116,
    },
    "rware": {
        "tiny-2ag": 0.016,
        "tiny-2ag-hard": 0.004,
        "tiny-4ag": 0.014,
        "tiny-4ag-hard": 0.006,
        "small-4ag": 0.010,
        "small-4ag-hard": 0.008,
        "medium-4ag": 0.012,
        "medium-4ag-hard": 0.006,
        "medium-6ag": 0.008,
        "large-4ag": 0.002,
        "large-4ag-hard": 0.000,
        "large-8ag": 0.002,
        "large-8ag-hard": 0.002,
        "xlarge-4ag": 0.002,
        "xlarge-4ag-hard": 0.002,
    },
    "connector": {
        "con-5x5x3a": 0.06,
        "con-7x7x5a": -0.87,
        "con-10x10x10a": -3.41,
        "con-15x15x23a": -11.59,
    },
    "smax": {
        "2s3z": 0.208,
        "3s5z": 0.199,
        "5m_vs_6m": 0.142,
        "10m_vs_11m": 0.166,
        "27m_vs_30m": 0.196,
        "3s5z_vs_3s6z": 0.176,
        "3s_vs_5z": 0.225,
        "6h_vs_8z": 0.324,
        "smacv2_5_units": 0.260,
        "smacv2_10_units": 0.277,
    },
}
# fmt: on
NOTES = {
    "lbf": "the team's reward is the sum over agents",
    "rware": "the team's reward is the number of deliveries",
    "connector": "the team's reward is the sum over agents",
    "smax": "the team's reward is damage plus 1 for a win",
}


WAREHOUSES = {"tiny": (1, 3), "small": (2, 3), "medium": (2, 5), "large": (3, 5), "xlarge": (4, 5)}  # shelves


def connector_view(grid, num_agents):
    """The official vector observation of Connector: grid (G, G) -> (N, 54).

    On the grid agent i's path is 3 i + 1, its head 3 i + 2 and its target 3 i + 3. It sees where its head and
    its target are, over G^2 (not G; a target is at (0, 0) once it is reached). Two 5 x 5 windows around its
    head show heads as 1 and paths as -1, and its own target as 1 and others' as -1. Off the grid both show 1.
    """
    kind = jnp.where(grid > 0, (grid - 1) % 3, -1)  # 0 path, 1 head, 2 target
    blockers = jnp.where(kind == 1, 1, jnp.where(kind == 0, -1, 0))

    def view(agent):
        head = jnp.stack(jnp.unravel_index((grid == 3 * agent + 2).argmax(), grid.shape))
        target = jnp.stack(jnp.unravel_index((grid == 3 * agent + 3).argmax(), grid.shape))
        targets = jnp.where(grid == 3 * agent + 3, 1, jnp.where(kind == 2, -1, 0))
        around = [jnp.pad(layer, 2, constant_values=1) for layer in (blockers, targets)]
        windows = [jax.lax.dynamic_slice(layer, head, (5, 5)).ravel() for layer in around]
        return jnp.concatenate([head / grid.size, target / grid.size, *windows])

    return jax.vmap(view)(jnp.arange(num_agents))


def make_jumanji(suite, task, options):
    """An environment of Jumanji -> start, advance, the longest an episode can be."""
    from jumanji.environments import Connector, LevelBasedForaging, RobotWarehouse
    from jumanji.environments.routing.connector.generator import LegacyRandomWalkGenerator
    from jumanji.environments.routing.lbf.generator import RandomGenerator as ForestGenerator
    from jumanji.environments.routing.robot_warehouse.generator import RandomGenerator as WarehouseGenerator

    if suite == "lbf":
        size, agents, food = map(int, re.search(r"(\d+)x\d+-(\d+)p-(\d+)f", task).groups())
        sight = 2 if task.startswith("2s-") else size
        coop = task.endswith("-coop")
        generator = ForestGenerator(size, agents, food, sight, max_agent_level=2, force_coop=coop)
        env = LevelBasedForaging(generator, **{"time_limit": 100} | options)
    elif suite == "rware":
        size, agents = task.split("-")[0], int(re.search(r"-(\d+)ag", task)[1])
        rows, columns = WAREHOUSES[size]
        requests = agents // 2 if task.endswith("-hard") else agents
        generator = WarehouseGenerator(rows, columns, 8, agents, sensor_range=1, request_queue_size=requests)
        env = RobotWarehouse(generator, **{"time_limit": 500} | options)
    else:
        size, agents = map(int, re.fullmatch(r"con-(\d+)x\d+x(\d+)a", task).groups())
        generator = LegacyRandomWalkGenerator(size, agents)  # the paper's; the newer one draws other boards
        env = Connector(generator, **{"time_limit": size**2} | options)

    def view(seen):
        obs = connector_view(seen.grid, agents) if suite == "connector" else seen.agents_view
        return {"obs": obs.reshape(len(obs), -1), "action_mask": seen.action_mask}

    def start(key):
        state, timestep = env.reset(key)
        return state, view(timestep.observation)

    def advance(key, state, actions):
        state, timestep = env.step(state, actions)
        terminal = (timestep.discount == 0).all()
        if suite == "rware":  # its discount is 0 when time is up, too; an earlier end is a collision
            terminal &= state.step_count < env.time_limit
        over = timestep.last()
        return state, view(timestep.observation), timestep.reward.sum(), over & terminal, over & ~terminal

    return start, advance, int(env.time_limit)


def import_smax():
    """JaxMARL's smax package, without what importing it does to stdout and stderr."""
    # Its mabrax module needs brax, which hardly anybody has, and resets sys.stdout and sys.stderr
    hidden = "jaxmarl.environments.mabrax" not in sys.modules
    if hidden:
        sys.modules["jaxmarl.environments.mabrax"] = None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells what it imports
            from jaxmarl.environments import smax
    finally:
        if hidden:
            del sys.modules["jaxmarl.environments.mabrax"]
    return smax


def make_smax(suite, task, options):
    """A task of SMAX -> start, advance, the longest an episode can be."""
    smax = import_smax()
    env = smax.HeuristicEnemySMAX(scenario=smax.map_name_to_scenario(task), **options)
    if env.action_type != "discrete":
        raise ValueError("only discrete actions are adapted")

    def stack(by_agent):
        return jnp.stack([by_agent[agent] for agent in env.agents])

    def view(obs, state):
        mask = stack(env.get_avail_actions(state)).astype(bool)
        return {"obs": stack(obs), "action_mask": mask, "state": obs["world_state"]}

    def start(key):
        obs, state = env.reset(key)
        return state, view(obs, state)

    def advance(key, state, actions):
        actions = dict(zip(env.agents, actions, strict=True))
        obs, state, rewards, dones, _ = env.step_env(key, state, actions)  # step() would also reset
        allies, enemies = jnp.split(state.state.unit_alive, [len(env.agents)])
        terminal = ~(allies.any() & enemies.any())  # else time is up
        over = dones["__all__"]
        return state, view(obs, state), stack(rewards).mean(), over & terminal, over & ~terminal

    return start, advance, int(env.max_steps) + 1  # it looks at the clock before it moves it on


SUITES = {"lbf": make_jumanji, "rware": make_jumanji, "connector": make_jumanji, "smax": make_smax}


def compile_suite(start, advance, num_envs):
    """One copy's functions -> advance_all and restart, compiled when first called, and E blank copies.

    Copies are a pair (states, views), with E in front of every shape.
    """
    one = jax.eval_shape(start, jax.random.PRNGKey(0))
    blank = jax.tree.map(lambda x: np.zeros((num_envs, *x.shape), x.dtype), one)
    blank[1]["obs"] = blank[1]["obs"].astype(np.float32)
    few = max(1, num_envs // 16)

    def typed(copies):  # Python numbers within have "weak" types, for which JAX would compile all of it again
        return jax.tree.map(lambda x, like: jax.lax.convert_element_type(x, like.dtype), copies, blank)

    @jax.jit
    def advance_all(key, states, actions):
        key, use = jax.random.split(key)
        keys = jax.random.split(use, num_envs)
        states, views, rewards, terminated, truncated = jax.vmap(advance)(keys, states, actions)
        return key, typed((states, views)), rewards.astype(jnp.float32), terminated, truncated

    @jax.jit
    def restart(key, copies, over):
        """New episodes where over (E,); a few copies at a time, as a start may cost more than a step."""

        def restart_few(carry):
            key, copies, over = carry
            key, use = jax.random.split(key)
            chosen = jnp.nonzero(over, size=few, fill_value=num_envs)[0]  # num_envs is out of range: dropped

            def put(x, y):
                return x.at[chosen].set(y.astype(x.dtype), mode="drop")

            fresh = jax.vmap(start)(jax.random.split(use, few))
            return key, jax.tree.map(put, copies, fresh), put(over, jnp.zeros(few, bool))

        return jax.lax.while_loop(lambda carry: carry[2].any(), restart_few, (key, copies, over))[:2]

    return advance_all, restart, blank


COMPILED = {}  # by id, E and options: compiling takes seconds, and every evaluation makes its copies anew


class JaxEnv(VectorEnv):
    """E copies of one task.

    What it returns is JAX's memory, not to be written into. A dead SMAX unit sees zeros and may only stop
    (action 4).

    Args:
        env_id: "lbf:<task>", "rware:<task>", "connector:<task>" or "smax:<task>".
        num_envs: E.
        device: where the tensors go.
        state: give infos["state"] (SMAX only): all units, whoever sees them.
        **options: of the environment's own constructor, such as time_limit.

    Raises:
        ValueError: JAX or a package is missing, there is no such task, or not with these options.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, env_id, num_envs, device="cpu", state=False, **options):
        suite, _, task = env_id.partition(":")
        if task not in TASKS[suite]:
            raise ValueError(f"{suite}: has no task {task!r}; choose one of {', '.join(TASKS[suite])}.")
        if state and suite != "smax":
            raise ValueError(f"{env_id} has no state beyond its observations: leave state=True away.")
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, but is {num_envs}.")
        key = (env_id, num_envs, repr(sorted(options.items())))
        try:
            if key not in COMPILED:
                start, advance, max_episode_steps = SUITES[suite](suite, task, options)
                COMPILED[key] = *compile_suite(start, advance, num_envs), max_episode_steps
        except ImportError as error:
            raise ValueError(MISSING.format(error)) from error
        except Exception as error:  # the packages raise many kinds
            raise ValueError(f"{env_id} cannot be made with the options {options}: {error}") from error
        self._advance, self._restart, blank, self.max_episode_steps = COMPILED[key]

        views = blank[1]
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.state_dim = views["state"].shape[1] if state else 0
        scores = published(env_id)
        known = {f"{method}, published, 20 M steps": scores[method] for method in ("MAPPO", "Sable")}
        self.references = {} if options else {"random": TASKS[suite][task]} | known
        # All damage adds up to 1, and a win adds 1
        self.win_return = 1.5 if suite == "smax" and not options else None
        self.note = f"{NOTES[suite]}; the first steps compile it, which takes about ten seconds"
        _, num_agents, num_actions = views["action_mask"].shape
        self.single_observation_space = spaces.Box(-np.inf, np.inf, views["obs"].shape[1:], np.float32)
        self.single_action_space = spaces.MultiDiscrete([num_actions] * num_agents)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self._place = jax.devices("cpu")[0]
        if self.device.type == "cuda":
            if jax.default_backend() == "gpu":
                self._place = jax.devices()[self.device.index or 0]
            else:
                self.note += "; this JAX has no CUDA, so that everything goes through the CPU"
        self._blank = jax.device_put(blank, self._place)
        self._key = jax.device_put(jax.random.PRNGKey(0), self._place)

    def reset(self, *, seed=None, options=None):
        """Start E new episodes -> observations (E, N, D), infos.

        Args:
            seed: makes all that follows repeat. Without one, the random numbers go on.
            options: a state_dict() to go on from, instead of new episodes.
        """
        if options:
            leaves = [jax.device_put(leaf.cpu().numpy(), self._place) for leaf in options["leaves"]]
            self._key = leaves[0]
            self._copies = jax.tree.unflatten(jax.tree.structure(self._blank), leaves[1:])
        else:
            if seed is not None:
                self._key = jax.device_put(jax.random.PRNGKey(seed), self._place)
            everywhere = jax.device_put(np.ones(self.num_envs, bool), self._place)
            self._key, self._copies = self._restart(self._key, self._blank, everywhere)
        return self._tensors(self._copies[1], self._copies[1])

    def state_dict(self):
        """All that reset(options=...) needs to go on from here: a list of tensors."""
        leaves = (self._key, *jax.tree.leaves(self._copies))
        return {"leaves": [torch.from_numpy(np.array(leaf)) for leaf in leaves]}

    def step(self, actions):
        """Actions (E, N) -> observations, rewards, terminations, truncations, infos.

        Raises:
            ValueError: the actions have another shape.
        """
        actions = check_shape(torch.as_tensor(actions), self.action_space)
        actions = actions.to("cpu" if self._place.platform == "cpu" else self.device, torch.int32)
        actions = jax.dlpack.from_dlpack(actions.contiguous())
        self._key, copies, rewards, terminated, truncated = self._advance(self._key, self._copies[0], actions)
        self._key, self._copies = self._restart(self._key, copies, terminated | truncated)
        obs, infos = self._tensors(self._copies[1], copies[1])
        return obs, *map(self._tensor, (rewards, terminated, truncated)), infos

    def _tensor(self, array):
        return torch.from_dlpack(array).to(self.device)

    def _tensors(self, view, final):
        infos = {"final_obs": self._tensor(final["obs"]), "action_mask": self._tensor(view["action_mask"])}
        if self.state_dim:
            infos |= {"state": self._tensor(view["state"]), "final_state": self._tensor(final["state"])}
        return self._tensor(view["obs"]), infos
