"""Multi-Agent Guided Policy Optimization (MAGPO) in one file of PyTorch. Read it top to bottom, beside the paper.

Li, Xie, Lu: "Multi-Agent Guided Policy Optimization", ICLR 2026, arXiv 2507.18059; official code (JAX):
github.com/liyheng/MAGPO, commit d2ac38b. Equation numbers are the paper's.

A team of N agents shares one reward. In training, a *guider* mu sees every agent's observation and chooses the actions
one agent after the other, each given the ones before it; what is deployed are N *learners* pi, each acting on its own
observation alone. Every iteration of train() makes the paper's four steps:

    1. data collection      roll out the guider mu
    2. guider update        improve mu by PPO, but hold it where pi can follow, |log mu/pi| <= log delta    (Eq. 9)
    3. learner update       pi imitates mu, and improves on the team's reward itself a little               (Eq. 10)
    4. guider backtracking  mu := pi, so that the next step starts from what the learners can do; in practice Eq. 9's bound
                            does it (to the letter: --backtracking reset)

Shapes: T steps, E environments, N agents, D features of one observation, A actions of one agent, S features of the global
state, C width of a layer. What stands between the ### markers is blank in TUTORIAL.md's course kit.

Where paper, official code and this file differ, TUTORIAL.md has the table. In short: attention instead of Sable's retention; a
fixed agent order, so that an unchanged guider's importance ratio is 1; time-outs bootstrap instead of counting as terminal;
and, as in Eq. 10 and the official code, KL(mu || pi), although Theorem 4.1 needs KL(pi || mu).
"""

import importlib
import math
import re
import sys
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch
import torch.nn as nn
import tyro
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence

from run import WORLD, Run, catch_signals, check_finite, gather, make_envs, read_checkpoint, share_gradients, validate

Distribution.set_default_validate_args(False)  # validation reads values back from the device at every call

PRESETS = {  # by the environment's family, the first word of its name; they win over the defaults of Args
    "mpe": dict(total_timesteps=2_048_000, num_envs=256, update_epochs=2, learning_rate=4.5e-3, delta=1.3, lam=3.0),
    "coordsum": dict(total_timesteps=320_000, learning_rate=2e-3, gamma=0.0, delta=1.3, lam=2.0),
    "matrix": dict(total_timesteps=40_960, num_steps=8, num_minibatches=2, update_epochs=4, learning_rate=4e-3, gamma=0.0,
                   max_grad_norm=0.5, delta=1.3, hidden_dim=64),
    "pettingzoo": dict(num_envs=32, num_minibatches=4, learning_rate=1e-3, eval_every=25, eval_episodes=256),
    "gym": dict(num_envs=32, num_steps=50, num_minibatches=8, learning_rate=1e-3, ent_coef=0.05, gamma=0.99, eval_episodes=256,
                delta=1.3, lam=3.0),
}  # fmt: skip


@dataclass(init=False)
class Args:
    """MAGPO: train decentralized learners with an autoregressive guider. What you give wins over the environment's preset."""

    env: str = "mpe_spread"  # environment, a name from envs.py; the preset of its family fills in what you do not give
    env_kwargs: str = "{}"  # options of the environment's constructor, as JSON, such as '{"num_agents": 5}'
    num_workers: int = 0  # of pettingzoo: and gym: environments; 0 for none, else num_envs, a process per copy
    algo: Literal["magpo", "mappo", "ctds"] = "magpo"  # mappo: PPO on the learners; ctds: imitation alone, delta inf and lam 0
    seed: int = 1  # seed of everything random, environments included
    cuda: bool = False  # train on the GPU, if there is one
    torch_deterministic: bool = True  # PyTorch's deterministic algorithms; a warning where there is none
    compile: bool = False  # torch.compile of the update's networks: for GPUs (as CUDA graphs); on CPUs it does not pay
    torch_threads: int = 1  # CPU threads of PyTorch; on networks this small a second one costs more than it gains
    runs_dir: str = "runs"  # folder that receives this run's folder

    total_timesteps: int = 1_000_000  # environment steps of training, all copies together
    num_envs: int = 128  # E, parallel copies of the environment
    num_steps: int = 25  # T, steps of each copy per iteration
    learning_rate: float = 3e-3  # Adam's step size
    anneal_lr: bool = True  # lower the learning rate and the entropy bonus linearly to zero
    gamma: float = 0.95  # discount factor
    gae_lambda: float = 0.9  # lambda of generalized advantage estimation (not the paper's lambda)
    num_minibatches: int = 16  # minibatches per epoch, of single steps; with memory, of whole sequences
    update_epochs: int = 3  # passes over each rollout
    clip_coef: float = 0.2  # epsilon of Eq. 9 and 10: the importance ratio's clip
    ent_coef: float = 0.01  # c_ent of Eq. 9: the guider's entropy bonus at the start
    vf_coef: float = 0.5  # c_v of Eq. 9: the value loss's weight
    max_grad_norm: float = 1.0  # gradient norm at which guider and learners are clipped, each for itself

    delta: float = 2.0  # delta of Eq. 9, above 1: the guider keeps mu/pi within [1/delta, delta]; inf for no bound
    lam: float = 1.0  # lambda of Eq. 10: weight of the learners' own RL loss
    backtracking: Literal["soft", "reset"] = "soft"  # step 4: Eq. 9's bound, or mu := pi (with delta inf and lam 0)
    residual: bool = False  # mu's logits are pi's, as of the rollout, plus a learned correction; implied by reset
    recurrent: bool = False  # give the learners and the guider a memory, a GRU over time
    state: bool = False  # show the environment's global state to the guider, and to it alone
    embed_dim: int = 32  # width of the guider; four times that in front
    hidden_dim: int = 128  # width of the learners
    eval_every: int = 10  # iterations between two evaluations of the learners
    eval_episodes: int = 1024  # episodes behind each line of the final table
    save_every: int = 25  # iterations between two checkpoints
    resume: str = ""  # run folder of a run to go on with, by its own options
    eval: str = ""  # checkpoint to evaluate, on the CPU, instead of training; --env may name another one of the same shape
    render: str = ""  # with --eval: picture of the learners, a .gif of mpe_spread and pettingzoo:, else a .png

    def __init__(self, **given):
        known = {field.name: field.default for field in fields(self)}
        if unknown := given.keys() - known.keys():
            raise TypeError(f"Args has no option {', '.join(sorted(unknown))}")
        preset = PRESETS.get(re.split("[_:]", given.get("env", self.env))[0], {})
        if given.get("resume") and given.keys() != known.keys():  # from Python; the command line gives all
            preset = read_checkpoint(given["resume"])["args"]
        for name, value in (known | preset | given).items():
            setattr(self, name, type(known[name])(value))
        self.residual |= self.backtracking == "reset"
        if self.algo == "ctds" or self.backtracking == "reset":
            self.delta = math.inf
        if self.algo != "magpo" or self.backtracking == "reset":
            self.lam = 0.0


# --- Networks ---------------------------------------------------------------------------------------------------------
def distribution(params, continuous, action_mask=None):
    """Policy of every agent: Categorical over allowed actions from (..., N, A), or diagonal Gaussian from (..., N, 2 A)."""
    if not continuous:
        return Categorical(logits=params if action_mask is None else params.masked_fill(~action_mask, -1e9))
    mean, log_std = params.chunk(2, -1)
    return Independent(Normal(mean + 0.5, (log_std - 1).clamp(-4, 1).exp()), 1)  # starts in the middle of [0, 1]


def sample(policy):
    """Actions (..., N) or (..., N, A), as policy.sample() draws them, but without its checks, for which a GPU has to wait."""
    if policy.has_rsample:
        return policy.rsample()
    return (policy.logits - torch.empty_like(policy.logits).exponential_().log()).argmax(-1)  # Gumbel's trick


def linear(inputs, outputs, gain):
    """Linear layer that starts with orthogonal weights and a bias of zero."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Features(nn.Module):
    """Features (..., N, C) of each agent's own observation (..., N, D) and id; guider and learners have one each.

    Three tanh layers, two of `width` units: where to go is a smooth function of positions; ReLUs, fewer layers or units were slow
    to learn it. Row i of `agent_id` is what a one-hot id appended to the observation would add. If recurrent, a GRU over
    time follows. `memory` is then a list of the hidden state of B copies, (B, N, C), replaced by the new one, and of `starts`,
    (B,) or for sequences (T, B) bool: where an episode begins, with a hidden state of zero.
    """

    def __init__(self, num_agents, obs_dim, width, dim, recurrent=False):
        super().__init__()
        self.agent_id = nn.Parameter(0.2 * torch.randn(num_agents, width))
        sizes = (obs_dim, width, 3.0), (width, width, 5 / 3), (width, dim, 5 / 3)
        self.obs_in, self.hidden, self.out = (linear(*size) for size in sizes)
        self.gru = nn.GRUCell(dim, dim) if recurrent else None

    def forward(self, obs, memory=None):
        x = self.out(self.hidden((self.obs_in(obs) + self.agent_id).tanh()).tanh()).tanh()
        if self.gru is None:
            return x
        hidden, starts = memory
        outputs = []
        for x_t, start in zip(x.view(-1, *hidden.shape), starts.view(-1, len(hidden))):  # (B, N, C), (B,)
            hidden = self.gru(x_t.flatten(0, 1), (hidden * ~start[:, None, None]).flatten(0, 1)).view_as(hidden)
            outputs.append(hidden)
        memory[0] = hidden
        return torch.stack(outputs).view_as(x)


class Block(nn.Module):
    """Transformer block over the agents' axis, of width C; small enough for one head and no norms."""

    def __init__(self, dim):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(linear(dim, 2 * dim, 5 / 3), nn.Tanh(), nn.Linear(2 * dim, dim))

    def forward(self, x, active=None, causal=False, cache=None):
        """x (..., N, C) -> (..., N, C). causal: agent j attends to agents 1..j only.

        active: (..., N) bool, agents that others attend to (the encoder's); None for all.
        cache: a list that holds keys and values of the agents before; x is then the next agent alone, and is added to it.
        """
        q, k, v = self.qkv(x).view(-1, 1, x.shape[-2], 3 * x.shape[-1]).chunk(3, -1)  # each (batch, 1 head, N, C)
        if cache is not None:
            cache.append((k, v))
            k, v = (torch.cat(tensors, 2) for tensors in zip(*cache))  # (batch, 1, agents so far, C)
        seen = None
        if active is not None:  # each agent sees itself, as a row of nothing would be nan
            itself = torch.eye(x.shape[-2], dtype=torch.bool, device=x.device)
            seen = active.reshape(-1, 1, 1, x.shape[-2]) | itself  # (batch, 1, N, N)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, seen, is_causal=causal)
        x = x + self.proj(attended.reshape(x.shape))
        return x + self.mlp(x)


class Guider(nn.Module):
    """Autoregressive joint policy mu(a|s) = prod_j mu(a^j | s, a^1..a^{j-1}), and one value per agent.

    An encoder block attends over all agents' features; a causal decoder block attends over the actions chosen so far.
    Leading dimensions are free; the last two are (N, D). Optional inputs, the same everywhere:
        base: (..., N, A), the learners' policy parameters, to which the guider's own are added (the residual form).
        action_mask: (..., N, A) bool, the allowed actions. active: (..., N) bool, agents that are still there.
        state: (..., S), global state that no learner sees. memory: of Features, if recurrent.
    """

    def __init__(self, num_agents, obs_dim, action_dim, continuous=False, dim=32, recurrent=False, state_dim=0):
        super().__init__()
        self.continuous = continuous
        self.features = Features(num_agents, obs_dim, 4 * dim, dim, recurrent)
        self.state_in = nn.Linear(state_dim, dim) if state_dim else None
        self.encoder, self.decoder = Block(dim), Block(dim)
        self.value_head = nn.Linear(dim, 1)
        self.action_in = nn.Linear(action_dim, dim) if continuous else nn.Embedding(action_dim, dim)
        self.start = nn.Parameter(0.02 * torch.randn(1, dim))  # stands for "no action yet"
        self.policy_head = linear(dim, action_dim * (1 + continuous), 0.1)

    def encode(self, obs, active=None, state=None, memory=None):
        """obs (..., N, D) -> encoded (..., N, C), values (..., N)."""
        x = self.features(obs, memory)
        encoded = self.encoder(x if self.state_in is None else x + self.state_in(state).unsqueeze(-2), active)
        values = self.value_head(encoded).squeeze(-1)
        return encoded if active is None else encoded * active.unsqueeze(-1), values  # zeros for those that left

    def policy(self, tokens, base, action_mask, **attention):
        """tokens (..., K, C) -> mu of K agents: of all, with causal=True, or of the next one alone, with Block's cache."""
        params = self.policy_head(self.decoder(tokens, **attention)) + (0 if base is None else base)
        return distribution(params, self.continuous, action_mask)

    def forward(self, obs, actions, base=None, action_mask=None, active=None, state=None, memory=None):
        """obs (..., N, D), actions (..., N[, A]) -> mu at every agent given the actions before it, values (..., N)."""
        encoded, values = self.encode(obs, active, state, memory)
        ### BEGIN SOLUTION
        before = self.action_in(actions)[..., :-1, :]  # (..., N - 1, C): agent j sees actions 1..j-1
        before = torch.cat([self.start.expand(*before.shape[:-2], 1, -1), before], -2)  # (..., N, C)
        # All tokens are attended to, since j's also carries the action of j-1, who may still be there when j has left
        return self.policy(encoded + before, base, action_mask, causal=True), values
        ### END SOLUTION

    @torch.no_grad()
    def act(self, obs, base=None, action_mask=None, active=None, state=None, memory=None):
        """obs (..., N, D) -> actions (..., N) or (..., N, A), logprobs (..., N), values (..., N); samples agent by agent."""
        encoded, values = self.encode(obs, active, state, memory)
        ### BEGIN SOLUTION
        before, cache, actions, logprobs = self.start, [], [], []
        for j in range(obs.shape[-2]):
            now = [None if x is None else x[..., j : j + 1, :] for x in (base, action_mask)]
            mu = self.policy(encoded[..., j : j + 1, :] + before, *now, cache=cache)
            actions.append(sample(mu))
            logprobs.append(mu.log_prob(actions[-1]))
            before = self.action_in(actions[-1])
        return torch.cat(actions, obs.dim() - 2), torch.cat(logprobs, obs.dim() - 2), values
        ### END SOLUTION


class Learner(nn.Module):
    """Decentralized policies pi(a|o) = prod_i pi(a^i | o^i): shared weights, agent i sees obs[..., i, :] and its id only."""

    def __init__(self, num_agents, obs_dim, action_dim, continuous=False, dim=128, recurrent=False):
        super().__init__()
        self.continuous = continuous
        self.features = Features(num_agents, obs_dim, dim, dim, recurrent)
        self.policy_head = linear(dim, action_dim * (1 + continuous), 0.1)

    def params(self, obs, memory=None):
        """obs (..., N, D) -> the policy's parameters (..., N, A), or (..., N, 2 A) if continuous."""
        return self.policy_head(self.features(obs, memory))

    def forward(self, obs, action_mask=None, memory=None):
        """obs (..., N, D) -> pi's distribution at every agent, over its allowed actions (..., N, A)."""
        return distribution(self.params(obs, memory), self.continuous, action_mask)


class ValueNorm(nn.Module):
    """Running mean and deviation of the returns, so that the critic learns targets of order 1 (Yu et al. 2022, MAPPO)."""

    def __init__(self, decay=0.99):
        super().__init__()
        self.decay = decay
        # Running averages of 1 (to undo the start at zero), x and x^2; in float32 a large mean would drown the deviation
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))

    def update(self, x):
        self.moments.lerp_(torch.stack([(x.double() ** power).mean() for power in (0, 1, 2)]), 1 - self.decay)

    def stats(self):
        """Mean and deviation; 0 and 0.001 before the first update."""
        mean, square = self.moments[1:] / self.moments[0].clamp(min=1e-8)
        return mean, (square - mean.square()).clamp(min=1e-6).sqrt()


# --- The equations ----------------------------------------------------------------------------------------------------
def compute_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016) -> advantages (T, E, N), returns (T, E, N).

    Args:
        rewards: (T, E, 1) or (T, E, N), reward of each step.
        values: (T, E, N), V of the observation that the step started from.
        next_values: (T, E, N), V of the observation that it led to; of the episode's last one where it ended.
        terminations: (T, E, 1) bool, the step ended its episode for good: nothing is worth anything after it.
        truncations: (T, E, 1) bool, time ran out: the return goes on with next_values, the sum over steps does not.
    """
    ### BEGIN SOLUTION
    over = terminations | truncations
    advantages = rewards + gamma * next_values * ~terminations - values  # each step's own error so far, (T, E, N)
    for t in reversed(range(len(advantages) - 1)):
        advantages[t] += gamma * gae_lambda * advantages[t + 1] * ~over[t]
    return advantages, advantages + values
    ### END SOLUTION


def guider_loss(guider_logprobs, learner_logprobs, old_logprobs, advantages, kl, clip_coef, delta):
    """Policy part of Eq. 9 -> mean loss, fraction of m = 1, fraction of mu/mu_old beyond 1 +- epsilon (scalars).

    PPO with a double clip: the inner one takes away the gradient that would push mu further from pi than delta; the mask m
    lets the KL pull it back from where it is already further. Together they are the backtracking (step 4) in practice.

    Args:
        guider_logprobs, learner_logprobs, old_logprobs: log mu, log pi (no gradient may reach it) and log mu_old of the action.
        advantages, kl: A and KL(mu || pi), of the same shape.
        clip_coef, delta: epsilon, and the bound above 1 (inf for none).
    """
    ### BEGIN SOLUTION
    bound = math.log(delta)
    gap = guider_logprobs - learner_logprobs.detach()  # log mu/pi
    ratio = (guider_logprobs - old_logprobs).exp()
    inner = (gap.clamp(-bound, bound) + learner_logprobs.detach() - old_logprobs).exp()
    clipped = inner.clamp(1 - clip_coef, 1 + clip_coef)
    mask = (gap.abs() > bound).to(kl.dtype)
    loss = -torch.min(ratio * advantages, clipped * advantages) + mask * kl
    return loss.mean(), mask.mean(), ((ratio - 1).abs() > clip_coef).to(kl.dtype).mean()
    ### END SOLUTION


def learner_loss(learner_logprobs, old_logprobs, advantages, kl, clip_coef, lam):
    """Eq. 10: imitate the guider, and improve on the reward directly (the RL auxiliary loss) -> loss (scalar).

    Args:
        learner_logprobs, old_logprobs: log pi and log mu_old of the action taken; the data is nearly on-policy for pi,
            because mu is held close to it.
        advantages, kl: A and KL(mu || pi) with mu a constant, of the same shape.
        clip_coef, lam: epsilon and lambda.
    """
    ### BEGIN SOLUTION
    ratio = (learner_logprobs - old_logprobs).exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)
    return (kl - lam * surrogate).mean()
    ### END SOLUTION


# --- Training ---------------------------------------------------------------------------------------------------------
def detached(policy):
    """The same distribution as a constant (stop-gradient)."""
    if isinstance(policy, Categorical):
        return Categorical(logits=policy.logits.detach())
    return Independent(Normal(policy.base_dist.loc.detach(), policy.base_dist.scale.detach()), 1)


def build(args, envs):
    """Untrained guider and learner for an environment -> Guider, Learner."""
    space = envs.single_action_space
    continuous = len(space.shape) == 2
    sizes = *envs.single_observation_space.shape, space.shape[1] if continuous else int(space.nvec[0]), continuous
    guider = Guider(*sizes, args.embed_dim, recurrent=args.recurrent, state_dim=envs.state_dim if args.state else 0)
    return guider, Learner(*sizes, args.hidden_dim, args.recurrent)


def backtrack(guider):
    """Step 4 to the letter: mu := pi. The guider's own part of the logits becomes zero; its critic stays as it is."""
    ### BEGIN SOLUTION
    nn.init.zeros_(guider.policy_head.weight)
    nn.init.zeros_(guider.policy_head.bias)
    ### END SOLUTION


def pick(inputs, *names):
    """Those of the named inputs that this environment or algorithm has."""
    return {name: inputs[name] for name in names if name in inputs}


def empty_memories(args, envs, device):
    """Memories of guider and learner at the start of an episode in all copies, as Features takes them."""
    E, N = envs.num_envs, envs.single_observation_space.shape[0]
    starts = torch.ones(E, dtype=torch.bool, device=device)
    return [[torch.zeros(E, N, dim, device=device), starts] for dim in (args.embed_dim, args.hidden_dim)]


def train(args, stop=()):
    """Train a team -> Path of the run's folder (checkpoint.pt, metrics.csv, TensorBoard events).

    stop: a list; once something is in it, training ends after the iteration, to be resumed.
    Raises ValueError (options), FloatingPointError (a number that is not finite) and OSError (a file cannot be written).
    """
    validate(args)
    run = Run(asdict(args))  # its folder, checkpoints, processes, device, threads and seed: envs.py
    T, E, device = args.num_steps, args.num_envs // WORLD, run.device
    envs = make_envs(args, E, device)
    guider, learner = run.place(*build(args, envs))
    parameters = share_gradients([*guider.parameters(), *learner.parameters()])  # one Adam: it treats each by itself
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=1e-5, fused=True)
    value_norm = ValueNorm().to(device)
    parts = dict(guider=guider, learner=learner, optimizer=optimizer, value_norm=value_norm)
    here = run.restore(parts)  # where the episodes of a resumed run stood; empty at a start
    obs, infos = envs.reset(seed=run.seed, options=here.get("envs"))
    # memories: the guider's and the learners', of what their recurrent layers saw so far
    memories, returns_so_far = here.get("air") or (empty_memories(args, envs, device), torch.zeros(E, device=device))
    guider_inputs, critic_inputs = ("base", "action_mask", "active", "state"), ("active", "state")
    if args.backtracking == "reset":
        backtrack(guider)  # the first rollout, too, is pi's
    for iteration in run.iterations(envs.note, stop):
        if run.iteration % args.save_every == 0:  # run.iteration counts those that are done
            run.save(parts, envs, (memories, returns_so_far))
        remaining = 1 - (iteration - 1) / run.num_iterations if args.anneal_lr else 1.0
        optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

        # Step 1, data collection: roll out the guider mu
        steps, first_hidden = [], [hidden for hidden, _ in memories]
        with torch.no_grad():
            for _ in range(T):
                step = dict(obs=obs, starts=memories[0][1]) | pick(infos, *guider_inputs)
                if args.residual or args.recurrent or args.algo == "mappo":  # to be the base, to act, or for their memory
                    params = learner.params(obs, memories[1])
                    step |= dict(base=params) if args.residual else {}
                if args.algo == "mappo":
                    pi = distribution(params, learner.continuous, step.get("action_mask"))
                    actions, values = sample(pi), guider.encode(obs, **pick(step, *critic_inputs), memory=memories[0])[1]
                    logprobs = pi.log_prob(actions)
                else:
                    actions, logprobs, values = guider.act(obs, **pick(step, *guider_inputs), memory=memories[0])
                obs, rewards, terminations, truncations, infos = envs.step(actions)
                if device.type == "cpu" or ":" in args.env:  # our own environments need no check that would stall a GPU
                    check_finite(iteration, args.env, dict(observation=obs, reward=rewards) | pick(infos, "final_obs", "state"))
                memories[0][1] = memories[1][1] = starts = terminations | truncations  # (E,), where obs is an episode's first
                returns_so_far = returns_so_far + rewards
                step |= dict(actions=actions, logprobs=logprobs, values=values, hidden=memories[0][0], rewards=rewards)
                step |= dict(terminations=terminations, truncations=truncations, episode_returns=returns_so_far)
                steps.append(step | pick(infos, "final_obs", "final_active", "final_state"))
                returns_so_far = returns_so_far * ~starts
            # Each (T, E, ...); popped, since both copies at once would double the memory
            buffer = {name: torch.stack([step.pop(name) for step in steps]) for name in [*steps[0]]}

            mean, std = value_norm.stats()
            values = buffer["values"] * std + mean  # (T, E, N)
            # V of the observation that each step led to: the next row's, but where an episode or the rollout ends final_obs's
            next_values, last = values.roll(-1, 0), buffer["terminations"] | buffer["truncations"]  # last: (T, E)
            last[-1] = True
            final = {name.removeprefix("final_"): x[last] for name, x in buffer.items() if name.startswith("final_")}
            goes_on = [buffer["hidden"][last], torch.zeros(len(final["obs"]), dtype=torch.bool, device=device)]
            next_values[last] = guider.encode(**final, memory=goes_on)[1] * std + mean
            rewards, *ended = (buffer[name][..., None] for name in ("rewards", "terminations", "truncations"))  # (T, E, 1)
            advantages, returns = compute_gae(rewards, values, next_values, *ended, args.gamma, args.gae_lambda)
            # Statistics are over all processes. Agents that have left count in the returns' alone; `...` selects all agents
            stayed = gather(buffer["active"]) if "active" in buffer else ...
            errors, all_returns, all_advantages = gather(returns - values)[stayed], gather(returns), gather(advantages)[stayed]
            explained_variance = 1 - errors.var() / all_returns[stayed].var().clamp(min=1e-8)
            value_norm.update(all_returns)
            mean, std = value_norm.stats()
            buffer["returns"] = (returns - mean) / std
            buffer["advantages"] = (advantages - all_advantages.mean()) / (all_advantages.std() + 1e-8)

        # Minibatches index axis 1: T x E single steps as (1, T E, ...), or with memory E whole sequences as (T, E, ...)
        batch = pick(buffer, "obs", "starts", "actions", "logprobs", "advantages", "returns", *guider_inputs)
        batch = {name: x if args.recurrent else x.flatten(0, 1)[None] for name, x in batch.items()}
        losses = []
        for _ in range(args.update_epochs):
            for index in torch.randperm(batch["obs"].shape[1], device=device).chunk(args.num_minibatches):
                b = {name: x[:, index] for name, x in batch.items()}
                past = [[hidden[index], b["starts"]] if args.recurrent else None for hidden in first_hidden]
                live = b.get("active", ...)  # agents that have left count in neither policy loss
                # Both losses are computed at the same parameters, then both networks step; neither loss moves the other's
                pi = learner(b["obs"], b.get("action_mask"), past[1])
                if args.algo == "mappo":  # mu = pi: inner clip, mask and KL vanish, and Eq. 9 is PPO
                    mu, new_values = pi, guider.encode(b["obs"], **pick(b, *critic_inputs), memory=past[0])[1]
                else:
                    mu, new_values = guider(b["obs"], b["actions"], **pick(b, *guider_inputs), memory=past[0])
                logprobs = mu.log_prob(b["actions"]), pi.log_prob(b["actions"]), b["logprobs"]  # each (., batch, N)
                kls = kl_divergence(mu, detached(pi)), kl_divergence(detached(mu), pi)  # equal; one moves mu, one pi
                log_mu, log_pi, log_old, adv, kl_mu, kl_pi = (x[live] for x in (*logprobs, b["advantages"], *kls))

                # Step 2, guider update (Eq. 9)
                loss_mu, mask, clipped = guider_loss(log_mu, log_pi, log_old, adv, kl_mu, args.clip_coef, args.delta)
                entropy = mu.entropy()[live].mean()
                loss_v = 0.5 * (new_values - b["returns"]).square().mean()  # also of those that left: earlier values rest on it

                # Step 3, learner update (Eq. 10)
                loss_pi = learner_loss(log_pi, log_old, adv, kl_pi, args.clip_coef, args.lam)

                optimizer.zero_grad()
                (loss_mu - args.ent_coef * remaining * entropy + args.vf_coef * loss_v + loss_pi).backward()
                norms = [nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm) for net in (guider, learner)]
                optimizer.step()
                losses.append(torch.stack([loss_mu, loss_pi, loss_v, kl_pi.mean(), entropy, mask, clipped, *norms]).detach())

        # Step 4, guider backtracking: mu := pi. If soft, nothing is left to do, as Eq. 9 kept mu near pi
        if args.backtracking == "reset":
            backtrack(guider)

        names = "guider_loss learner_loss value_loss kl entropy mask_frac clip_frac guider_grad_norm learner_grad_norm".split()
        losses = torch.stack(losses)  # (minibatches, names)
        check_finite(iteration, "too high a learning rate", dict(zip(names, losses.unbind(1))))
        finished = gather(buffer["episode_returns"])[gather(buffer["terminations"] | buffer["truncations"])]
        row = dict(guider_return=finished.mean().item(), learner_return=math.nan)  # nan: no episode ended
        row |= dict(zip(names, gather(losses[None]).mean((0, 1)).tolist()), explained_variance=explained_variance.item())
        if run.leads and (iteration % args.eval_every == 0 or iteration in (1, run.num_iterations)):
            row["learner_return"] = evaluate(args, guider, learner, "learner", args.num_envs, args.seed + 1).mean().item()
        run.log(iteration, row)

    run.save(parts, envs, (memories, returns_so_far))
    envs.close()
    if run.leads:
        print_table(args, guider, learner)
        run.close()
    return run.path


@torch.no_grad()
def evaluate(args, guider, learner, policy, episodes, seed):
    """Team returns (episodes,) of fresh episodes, rounded up so that every copy plays equally many (else short ones win).

    policy: "guider" (sampled), "learner" (sampled) or "learner_greedy"; learners act from their own observations alone.
    seed: of environments and sampling, apart from training's; one for all of a run, so that only the parameters differ.
    """
    device = next(learner.parameters()).device
    copies = min(episodes, args.num_envs)
    envs, rounds = make_envs(args, copies, device), math.ceil(episodes / copies)
    done, copy = torch.zeros(copies, dtype=torch.long, device=device), torch.arange(copies, device=device)
    total = torch.zeros(rounds + 1, copies, device=device)  # the last row takes what comes after a copy's last episode
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        obs, infos = envs.reset(seed=seed)
        memories = empty_memories(args, envs, device)
        while (done < rounds).any():
            params = learner.params(obs, memories[1])
            if policy == "guider":
                inputs = pick(infos, "action_mask", "active", "state") | (dict(base=params) if args.residual else {})
                actions = guider.act(obs, **inputs, memory=memories[0])[0]
            else:
                pi = distribution(params, learner.continuous, infos.get("action_mask"))
                actions = sample(pi) if policy == "learner" else pi.mode
            obs, rewards, terminations, truncations, infos = envs.step(actions)
            total[done, copy] += rewards
            done = (done + (terminations | truncations)).clamp(max=rounds)
            memories[0][1] = memories[1][1] = terminations | truncations
    envs.close()
    return total[:-1].flatten()


def print_table(args, guider, learner):
    """Print mean team return and 95 % confidence interval of guider and learners, beside the environment's references."""
    policies = ("learner", "learner_greedy") if args.algo == "mappo" else ("learner", "learner_greedy", "guider")
    totals = {policy: evaluate(args, guider, learner, policy, args.eval_episodes, args.seed + 2) for policy in policies}
    print(f"{args.env}, {args.algo}, seed {args.seed}: mean team return over {len(totals['learner'])} episodes")
    for policy, total in totals.items():
        print(f"  {policy:22s} {total.mean():9.2f} +- {1.96 * total.std() / math.sqrt(len(total)):.2f}")
    envs = make_envs(args, 1)
    for name, score in envs.references.items():
        print(f"  {f'({name})':22s} {score:9.2f}")
    envs.close()


def load(path, **changes):
    """Read a checkpoint -> Args with changes, Guider, Learner (on the CPU); ValueError if it cannot be read or does not fit."""
    checkpoint = read_checkpoint(path)
    args = Args(**checkpoint["args"] | changes)
    envs = make_envs(args, 1)
    guider, learner = build(args, envs)
    envs.close()
    try:
        guider.load_state_dict(checkpoint["guider"])
        learner.load_state_dict(checkpoint["learner"])
    except RuntimeError:
        raise ValueError(f"{path} does not fit {args.env}: other agents, observations, actions or networks.") from None
    return args, guider, learner


def main():
    """The command line: options as in Args; wrong ones end in one sentence and exit code 2, what stops a run in 1, 130, 143."""
    env = re.findall(r"--env[ =](\S+)", " ".join(sys.argv))
    args = tyro.cli(Args, default=Args(env=env[-1] if env else Args.env))  # so that --help shows the preset, too
    words = {re.sub("^--(no-)?", "", word).split("=")[0].replace("-", "_") for word in sys.argv if word.startswith("--")}
    given = {name: value for name, value in asdict(args).items() if name in words}
    try:
        if args.resume and len(given) > 1:
            raise ValueError("--resume goes on by the run's own options: give no others.")
        args = Args(resume=args.resume) if args.resume else args
        if args.eval:
            args, guider, learner = load(args.eval, **given)
            torch.set_num_threads(args.torch_threads)
        validate(args)
        if args.eval:
            print_table(args, guider, learner)
            if args.render:
                importlib.import_module("figures.watch").render(args, learner, args.render)  # loads what only pictures need
            return
    except (ValueError, OSError) as error:
        print(f"magpo.py: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        train(args, stop := catch_signals())
    except (OSError, FloatingPointError) as error:
        sys.exit(f"magpo.py: {error}; a checkpoint from before is as it was.")
    sys.exit(128 + stop[0] if stop else 0)


if __name__ == "__main__":
    main()
