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
"""

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space


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
        from adapters.python_envs import AdaptedEnv

        return AdaptedEnv(env_id, num_envs, device, num_workers, state, **kwargs)
    if num_workers:
        raise ValueError(f"{env_id} computes all its copies at once: leave num_workers at 0.")
    if env_id.startswith(("lbf:", "rware:", "connector:", "smax:")):
        from adapters.jax_envs import JaxEnv

        return JaxEnv(env_id, num_envs, device, state, **kwargs)
    if env_id not in ENVS:
        raise ValueError(f"There is no environment {env_id!r}; choose one of {', '.join(ENVS)}, pettingzoo:<module>, gym:<id>.")
    env_class, defaults = ENVS[env_id]
    if state:
        if env_class is not SimpleSpread:
            raise ValueError(f"{env_id} has no state beyond its observations: leave state=True away.")
        kwargs["state"] = True
    try:
        return env_class(num_envs, device, **{**defaults, **kwargs})
    except TypeError as error:
        raise ValueError(f"{env_id} cannot be made with the options {kwargs}: {error}") from error
