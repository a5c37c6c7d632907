"""Environments for magpo.py, behind one contract: gymnasium's vector interface, with a team in every copy.

    envs = make("mpe_spread", num_envs=128, device="cpu")
    obs, infos = envs.reset(seed=1)
    obs, rewards, terminations, truncations, infos = envs.step(actions)

For E copies, N agents, D features of one observation, A actions (or dimensions of one action):

    obs                        (E, N, D)  float
    actions                    (E, N)     integers 0..A-1; if continuous: (E, N, A), in [0, 1]
    rewards                    (E,)       the team's: the mean over agents; an episode's sum is its return
    terminations, truncations  (E,)       bool: the game is over; time is up

A copy whose episode ends starts a new one in the same step (gymnasium's SAME_STEP autoreset). infos has the
same keys after reset and after every step:

    "final_obs"                (E, N, D)  what the step led to, before such a start; elsewhere equal to obs
    "action_mask"              (E, N, A)  bool: what is allowed at obs; only where something may be forbidden
    "state", "final_state"     (E, S)     more than agents see, to train with; only if make(..., state=True)

An agent that has left observes zeros, and only action 0 is allowed to it. At an episode's end, final_obs is
what the agents that could have gone on saw last, and zeros for those that had left before. More attributes:

    max_episode_steps   int            the longest an episode can be; 1,000 where nobody knows
    references          dict           mean returns of known policies, by name
    win_return          float or None  an episode that returns more than this was won
    state_dim           int            S, or 0
    note                str            what to tell the user before training, or ""
    state_dict()        dict           for reset(options=...), to go on in mid-episode; {} if that cannot be

Options that cannot work end in a ValueError, an environment that breaks the contract in an EnvFailure.

MatrixGame, CoordSum and SimpleSpread are batched: torch tensors, no Python loop over copies or agents. A
Python integer counts the time of all copies: a GPU would stall at every look at a tensor.
"""

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space


class EnvFailure(RuntimeError):
    """An environment broke the contract while it ran: one sentence with environment, agent or copy, and step.
    Where it raised an exception of its own, that one is the __cause__."""


def check_shape(actions, action_space):
    """Return the same actions; ValueError unless they have the space's shape."""
    if actions.shape != action_space.shape:
        raise ValueError(f"Actions have shape {tuple(actions.shape)}; {action_space.shape} was expected.")
    return actions


def check_counts(least, **counts):
    """Raise ValueError for the first of the named options that is no whole number of at least `least`."""
    for name, count in counts.items():
        whole = isinstance(count, (int, np.integer)) and not isinstance(count, bool)
        if not whole or count < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, but is {count!r}.")


def check_flags(**flags):
    """Raise ValueError for the first of the named options that is neither True nor False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be true or false, but is {flag!r}.")


class BatchedEnv(VectorEnv):
    """What the three batched environments share: spaces, seeds, the clock and the autoreset.

    A subclass defines `_start()`, which draws new episodes, `_observe()` -> (E, N, D), `_advance(actions)` ->
    rewards (E,), and EPISODE, the names of its tensors that change within an episode.

    Args:
        num_envs, num_agents, num_features, num_actions: E, N, D and A.
        device: where every tensor lives.
        max_episode_steps: the length of every episode.
        continuous: actions are (E, N, A), clipped to [0, 1], instead of integers (E, N).
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    EPISODE: tuple[str, ...] = ()
    TERMINAL = False  # does an episode's end mean that the game is over, rather than time?
    references: dict[str, float] = {}
    win_return = None
    state_dim = 0
    note = ""

    def __init__(
        self, num_envs, device, num_agents, num_features, num_actions, max_episode_steps, continuous=False
    ):
        check_counts(1, num_envs=num_envs)
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.max_episode_steps = max_episode_steps
        self.continuous = continuous
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (num_agents, num_features), np.float32)
        if continuous:
            self.single_action_space = spaces.Box(0.0, 1.0, (num_agents, num_actions), np.float32)
        else:
            self.single_action_space = spaces.MultiDiscrete([num_actions] * num_agents)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.generator = torch.Generator(self.device)
        self.time = 0

    def reset(self, *, seed=None, options=None):
        """Start E new episodes -> observations (E, N, D), infos.

        Args:
            seed: makes all that follows repeat. Without one, the random numbers go on.
            options: a state_dict() to go on from, instead of new episodes.
        """
        if seed is not None:
            # A policy with the same seed would otherwise draw the very numbers that placed the agents
            self.generator.manual_seed(seed + 1)
        self.time = 0
        self._start()
        if options:
            self.generator.set_state(options["generator"].cpu())
            self.time = options["time"]
            for name in self.EPISODE:
                setattr(self, name, options[name].to(self.device))
        obs = self._observe()
        return obs, self._infos(obs)

    def step(self, actions):
        """Actions (E, N[, A]) -> obs, rewards, terminations, truncations, infos; ValueError: wrong shape."""
        actions = check_shape(torch.as_tensor(actions, device=self.device), self.action_space)
        if self.continuous:
            actions = actions.clamp(0, 1)
        rewards = self._advance(actions)
        obs = self._observe()
        infos = self._infos(obs)
        self.time += 1
        over = self.time == self.max_episode_steps
        if over:
            self.time = 0
            self._start()
            obs = self._observe()
            if self.state_dim:
                infos["state"] = self._state()
        terminations = torch.full((self.num_envs,), over and self.TERMINAL, device=self.device)
        truncations = torch.full((self.num_envs,), over and not self.TERMINAL, device=self.device)
        return obs, rewards, terminations, truncations, infos

    def _infos(self, final_obs):
        infos = {"final_obs": final_obs}
        if self.state_dim:
            infos["state"] = infos["final_state"] = self._state()
        return infos

    def state_dict(self):
        """What reset(options=...) needs to go on from here: tensors and numbers."""
        episode = {name: getattr(self, name) for name in self.EPISODE}
        return {"time": self.time, "generator": self.generator.get_state()} | episode


class MatrixGame(BatchedEnv):
    """One joint action, one payoff, then the game is over. Observations are a constant 1.

    Args:
        payoff: (A, ..., A), one axis per agent: the team's reward for every joint action.
    """

    TERMINAL = True

    def __init__(self, num_envs, device="cpu", payoff=((1.0, 0.0), (0.0, 1.0))):
        payoff = torch.as_tensor(payoff, dtype=torch.float64)
        if payoff.numel() == 0 or len(set(payoff.shape)) != 1:
            raise ValueError(f"payoff needs one axis of equal length per agent, not {tuple(payoff.shape)}.")
        num_agents, num_actions = payoff.dim(), len(payoff)
        super().__init__(num_envs, device, num_agents, 1, num_actions, 1)
        self.payoff = payoff.float().to(self.device)
        self.references = {"random": payoff.mean().item(), "best": payoff.max().item()}

    def _start(self):
        pass

    def _observe(self):
        return torch.ones(self.observation_space.shape, device=self.device)

    def _advance(self, actions):
        return self.payoff[actions.unbind(-1)]


CLIMBING = ((11.0, -30.0, 0.0), (-30.0, 7.0, 6.0), (0.0, 0.0, 5.0))  # Claus and Boutilier (AAAI 1998)
PENALTY = ((-100.0, 0.0, 10.0), (0.0, 2.0, 0.0), (10.0, 0.0, -100.0))  # the same, with k = -100
XOR = ((0.0, 1.0), (1.0, 0.0))


def sum_game(num_agents=3, num_actions=10, total=10):
    """Payoff (A, ..., A) of the paper's Figure 1: 1 where integers 0..A-1 add up to `total`, else 0."""
    sums = sum(torch.meshgrid(*[torch.arange(num_actions)] * num_agents, indexing="ij"))
    return (sums == total).float()


class CoordSum(BatchedEnv):
    """The paper's own environment: name integers that add up to a target which everybody sees.

    If the actions add up, everybody gets 2, but only 1 if agent 0's action is its habit: the one that it has
    played most often for this target in this episode. Ties, and a target never seen before, resolve to the
    smallest action. If they do not add up, everybody gets 0. Each of 100 steps draws a target, uniformly.

    Args:
        num_agents, num_actions, num_targets: N, A (actions 0..A-1) and M (targets 0..M-1; D = M).
        official: take the habit from a record like the official code's, with a row per action, not per
            target: all targets from A - 1 up share the last row. The paper's returns are of this kind.
        blur: deviation of the bell that shows the target, so that neighbours look alike; 0 for one-hot.
    """

    EPISODE = ("record", "target")
    POLICIES = ("random", "best without memory", "best with memory", "plain split")

    def __init__(
        self, num_envs, device="cpu", num_agents=3, num_actions=10, num_targets=30, official=False, blur=2
    ):
        check_counts(1, num_agents=num_agents, num_actions=num_actions, num_targets=num_targets)
        check_counts(0, blur=blur)
        check_flags(official=official)
        super().__init__(num_envs, device, num_agents, num_targets, num_actions, 100)
        self.num_actions = num_actions
        self.num_targets = num_targets
        self.num_rows = num_actions if official else num_targets
        self._copies = torch.arange(num_envs, device=device)
        place = torch.arange(num_targets, device=device)
        distance = place - place[:, None]  # (M, M)
        self.codes = (-0.5 * (distance / blur).square()).exp() if blur else (distance == 0).float()

    def _start(self):
        shape = (self.num_envs, self.num_rows, self.num_actions)
        self.record = torch.zeros(shape, device=self.device)  # how often agent 0 has played what
        self._draw_targets()

    def _draw_targets(self):
        shape = (self.num_envs,)
        self.target = torch.randint(self.num_targets, shape, generator=self.generator, device=self.device)

    def _observe(self):
        return self.codes[self.target].unsqueeze(1).expand(self.observation_space.shape)  # (E, N, M)

    def _advance(self, actions):
        first = actions[:, 0]
        row = self.target.clamp(max=self.num_rows - 1)
        habit = self.record[self._copies, row].argmax(-1)  # (E,), the first of equals
        hit = actions.sum(-1) == self.target
        rewards = hit * (2.0 - (first == habit).float())
        self.record[self._copies, row, first] += 1
        self._draw_targets()
        return rewards


class SimpleSpread(BatchedEnv):
    """mpe2's simple_spread_v3, number for number: N agents cover N landmarks and avoid each other.

    An agent observes (D = 6 N) its velocity and position; the landmarks and then the other agents, relative
    to itself; and the others' communication, always silent. Actions: 0 stay, 1 left, 2 right, 3 down, 4 up;
    or, continuous, five thrusts in this order. The state (S = 6 N) is all positions, velocities and
    landmarks: no agent sees the others' velocities. Source: mpe2 1.1.1, simple_spread.py and _mpe_utils/.

    Args:
        num_agents: N, of agents and of landmarks; at least 2.
        continuous: five thrusts instead of five actions.
        max_cycles: steps per episode.
        local_ratio: weight in [0, 1] of an agent's own collisions against the landmarks' distances.
        num_agent_neighbors, num_landmark_neighbors: how many others and landmarks an agent sees, the nearest
            first, zeros where there are fewer: D = 4 + 4 others + 2 landmarks. None: all, in a fixed order.
        state: give the state in infos.
        dtype: of all numbers, torch.float32 or torch.float64.
    """

    EPISODE = ("position", "velocity", "landmarks")
    POLICIES = ("random", "heuristic")
    SENSITIVITY, TIME_STEP, DAMPING = 5.0, 0.1, 0.25
    CONTACT_FORCE, CONTACT_MARGIN, CONTACT_DISTANCE = 100.0, 1e-3, 0.3  # two agents of size 0.15 touch at 0.3

    def __init__(
        self, num_envs, device="cpu", num_agents=3, continuous=False, max_cycles=25, local_ratio=0.5,
        num_agent_neighbors=None, num_landmark_neighbors=None, state=False, dtype=torch.float32,
    ):  # fmt: skip
        check_counts(2, num_agents=num_agents)
        others = num_agents - 1 if num_agent_neighbors is None else num_agent_neighbors
        landmarks = num_agents if num_landmark_neighbors is None else num_landmark_neighbors
        check_counts(1, max_cycles=max_cycles, num_agent_neighbors=others, num_landmark_neighbors=landmarks)
        check_flags(continuous=continuous, state=state)
        if type(local_ratio) not in (int, float) or not 0 <= local_ratio <= 1:
            raise ValueError(f"local_ratio must be a number in [0, 1], but is {local_ratio!r}.")
        num_features = 4 + 4 * others + 2 * landmarks
        super().__init__(num_envs, device, num_agents, num_features, 5, max_cycles, continuous)
        self.num_agents = num_agents
        self.local_ratio = local_ratio
        self.dtype = dtype
        self.seen = num_agent_neighbors, num_landmark_neighbors
        self.state_dim = 6 * num_agents if state else 0
        ids = range(num_agents)
        self._others = torch.tensor([[j for j in ids if j != i] for i in ids], device=device)  # (N, N - 1)
        self._thrust = torch.tensor([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]], dtype=dtype, device=device)
        self._silence = torch.zeros(num_envs, num_agents, 2 * others, dtype=dtype, device=device)

    def _start(self):
        shape = (2, self.num_envs, self.num_agents, 2)
        drawn = torch.rand(shape, generator=self.generator, device=self.device, dtype=self.dtype)
        self.position, self.landmarks = 2 * drawn - 1  # each (E, N, 2)
        self.velocity = torch.zeros_like(self.position)

    def _to_others(self):
        offset = self.position[:, self._others] - self.position.unsqueeze(2)  # (E, N, N - 1, 2)
        return offset, torch.linalg.vector_norm(offset, dim=-1)

    def _observe(self):
        to_others, _ = self._to_others()
        to_landmarks = self.landmarks.unsqueeze(1) - self.position.unsqueeze(2)  # (E, N, N, 2)
        others, landmarks = self.seen
        around = self._nearest(to_landmarks, landmarks), self._nearest(to_others, others)
        return torch.cat([self.velocity, self.position, *around, self._silence], -1)

    @staticmethod
    def _nearest(offset, count):
        """Offsets (E, N, M, 2) -> (E, N, 2 count): the nearest, zeros where there are fewer. None: all M."""
        if count is None:
            return offset.flatten(2)
        distance = torch.linalg.vector_norm(offset, dim=-1)
        nearest = distance.topk(min(count, offset.shape[2]), largest=False).indices
        chosen = offset.take_along_dim(nearest.unsqueeze(-1), 2).flatten(2)
        return torch.nn.functional.pad(chosen, (0, 2 * count - chosen.shape[-1]))

    def _state(self):
        return torch.cat([self.position, self.velocity, self.landmarks], -1).flatten(1)  # (E, 6 N)

    def _advance(self, actions):
        thrust = actions.to(self.dtype) @ self._thrust if self.continuous else self._thrust[actions]
        offset, distance = self._to_others()
        overlap = (self.CONTACT_DISTANCE - distance) / self.CONTACT_MARGIN
        depth = self.CONTACT_MARGIN * torch.nn.functional.softplus(overlap, threshold=40)
        push = (self.CONTACT_FORCE * depth / distance).unsqueeze(-1) * offset  # what the others feel
        force = self.SENSITIVITY * thrust - push.sum(2)
        self.position = self.position + self.velocity * self.TIME_STEP
        self.velocity = self.velocity * (1 - self.DAMPING) + force * self.TIME_STEP

        offset = self.position.unsqueeze(1) - self.landmarks.unsqueeze(2)  # (E, landmarks, agents, 2)
        uncovered = torch.linalg.vector_norm(offset, dim=-1).amin(-1).sum(-1)  # (E,)
        touching = self._to_others()[1] < self.CONTACT_DISTANCE  # (E, N, N - 1)
        collisions = touching.sum((1, 2)).to(self.dtype) / self.num_agents  # of one agent, on average
        return -(1 - self.local_ratio) * uncovered - self.local_ratio * collisions


PAPER_MPE = dict(continuous=True, max_cycles=26)
SIZE_3X30 = dict(num_actions=30, num_targets=50)
SIZE_5X20 = dict(num_agents=5, num_actions=20, num_targets=80)
SIZE_8X15 = dict(num_agents=8, num_actions=15, num_targets=100)
# fmt: off
ENVS = {  # id -> class, mean returns of its POLICIES (results/references.py plays them again), options
    "matrix_climbing": (MatrixGame, (), dict(payoff=CLIMBING)),
    "matrix_penalty": (MatrixGame, (), dict(payoff=PENALTY)),
    "matrix_xor": (MatrixGame, (), dict(payoff=XOR)),
    "matrix_sum10": (MatrixGame, (), dict(payoff=sum_game())),
    "coordsum_3x10": (CoordSum, (6.4, 119.4, 180.9), dict()),
    "coordsum_3x30": (CoordSum, (2.6, 142.5, 198.0), SIZE_3X30),
    "coordsum_5x20": (CoordSum, (2.4, 156.5, 198.8), SIZE_5X20),
    "coordsum_8x15": (CoordSum, (1.9, 162.7, 199.0), SIZE_8X15),
    "mpe_spread": (SimpleSpread, (-26.34, -7.63), dict()),
    "mpe_spread_5ag": (SimpleSpread, (-35.92, -11.54), dict(num_agents=5)),
    "mpe_spread_10ag": (SimpleSpread, (-54.5, -23.3), dict(num_agents=10)),
    "mpe_spread_partial": (SimpleSpread, (-26.34,), dict(num_agent_neighbors=1, num_landmark_neighbors=1)),
    "mpe_spread_continuous": (SimpleSpread, (-25.40, -6.03), dict(continuous=True)),
    "mpe_spread_5ag_continuous": (SimpleSpread, (-33.39, -8.85), dict(num_agents=5, continuous=True)),
    "mpe_spread_10ag_continuous": (SimpleSpread, (-51.84, -18.99), dict(num_agents=10, continuous=True)),
    # The paper's tasks as the official code has them
    "coordsum_3x10_official": (CoordSum, (6.3, 159.0, 183.1, 153.3), dict(official=True)),
    "coordsum_3x30_official": (CoordSum, (2.5, 164.4, 198.0, 158.9), dict(SIZE_3X30, official=True)),
    "coordsum_5x20_official": (CoordSum, (2.4, 185.3, 198.7, 180.1), dict(SIZE_5X20, official=True)),
    "coordsum_8x15_official": (CoordSum, (1.9, 188.5, 199.0, 182.1), dict(SIZE_8X15, official=True)),
    "mpe_spread_3ag_paper": (SimpleSpread, (-26.47, -6.08), PAPER_MPE),
    "mpe_spread_5ag_paper": (SimpleSpread, (-34.81, -8.97), dict(PAPER_MPE, num_agents=5)),
    "mpe_spread_10ag_paper": (SimpleSpread, (-54.18, -19.45), dict(PAPER_MPE, num_agents=10)),
}
ELSEWHERE = "pettingzoo:<module>, gym:<id>, lbf:<task>, rware:<task>, connector:<task>, smax:<task>"
# fmt: on


def make(env_id, num_envs, device="cpu", num_workers=0, state=False, **kwargs):
    """Build E copies of an environment as one gymnasium.vector.VectorEnv.

    Args:
        env_id: a key of ENVS, or one of ELSEWHERE.
        num_envs, device: E, and where the tensors live.
        num_workers: for pettingzoo: and gym:. 0 steps one copy after the other, E gives each its own process.
        state: give infos["state"], where the environment has a state.
        **kwargs: the environment's own options, over those in ENVS.

    Raises ValueError if there is no such environment, or not with these options; one sentence says why.
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
        raise ValueError(f"There is no environment {env_id!r}; choose one of {', '.join(ENVS)}, {ELSEWHERE}.")

    env_class, scores, options = ENVS[env_id]
    if state:
        if env_class is not SimpleSpread:
            raise ValueError(f"{env_id} has no state beyond its observations: leave state=True away.")
        kwargs["state"] = True
    try:
        env = env_class(num_envs, device, **options | kwargs)
    except Exception as error:  # an unknown name, a payoff of words, more than fits the memory: many kinds
        raise ValueError(f"{env_id} cannot be made with the options {kwargs}: {error}") from error
    if scores and kwargs.keys() <= {"state"}:
        env.references = dict(zip(env_class.POLICIES, scores, strict=False))
    return env
