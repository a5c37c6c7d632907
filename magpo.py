"""Multi-Agent Guided Policy Optimization (MAGPO) in one file of PyTorch. Read it top to bottom, beside the paper.

Li, Xie, Lu: "Multi-Agent Guided Policy Optimization", ICLR 2026, arXiv 2507.18059; official code (JAX):
github.com/liyheng/MAGPO, commit d2ac38b. Equation numbers are the paper's.

A team of N agents shares one reward. In training, a *guider* mu sees every agent's observation and chooses the actions
one agent after the other, each given the ones before it; what is deployed are N *learners* pi, each acting on its own
observation alone. Every iteration of train() makes the paper's four steps:

    1. data collection      roll out the guider mu
    2. guider update        improve mu by PPO, but only as far as pi can follow: |log mu/pi| <= log delta   (Eq. 9)
    3. learner update       pi imitates mu, and improves on the team's reward itself a little               (Eq. 10)
    4. guider backtracking  mu goes back to pi, so that the next step starts from what the learners can do

Shapes: T steps, E environments, N agents, D features of one agent's observation, A actions of one agent.

Where this file departs from the paper or its official code: TUTORIAL.md has the table. In short: attention instead of
Sable's retention; the agent order is fixed, so that an unchanged guider's importance ratio is 1; time-outs bootstrap
from the episode's last observation instead of counting as terminal; values are normalised instead of value-clipped;
advantages are normalised over the whole rollout; the evaluation uses the parameters it is logged with.
"""

import argparse
import csv
import ctypes
import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import make

Distribution.set_default_validate_args(False)  # validation reads values back from the device at every call

# --- Options ----------------------------------------------------------------------------------------------------------

PRESETS = {  # by the environment's family, the first word of its name
    "mpe": dict(total_timesteps=1_600_000, num_minibatches=16, update_epochs=3, learning_rate=3e-3, gamma=0.95,
                gae_lambda=0.9, max_grad_norm=1.0, delta=2.0),
    "coordsum": dict(total_timesteps=800_000, learning_rate=2e-3, gamma=0.9, gae_lambda=0.9, delta=1.3, lam=2.0, embed_dim=32),
    "matrix": dict(total_timesteps=40_960, num_steps=8, num_minibatches=2, learning_rate=2e-3, gamma=0.0, delta=1.3,
                   embed_dim=32, hidden_dim=64),
}  # fmt: skip


@dataclass(init=False)
class Args:
    """MAGPO: train decentralized learners with an autoregressive guider. What you give wins over the environment's preset."""

    env: str = "mpe_spread"
    """environment, a name from envs.py; the preset of its family fills in what you do not give"""
    algo: Literal["magpo", "mappo", "ctds"] = "magpo"
    """mappo: the learners collect the data by themselves; ctds: delta = infinity and lambda = 0, a teacher that does not wait"""
    seed: int = 1
    """seed of everything random, environments included"""
    cuda: bool = False
    """train on the GPU, if there is one"""
    torch_deterministic: bool = True
    """let PyTorch use deterministic algorithms only"""
    torch_threads: int = 1
    """CPU threads of PyTorch; on networks this small a second one costs more than it gains"""
    runs_dir: str = "runs"
    """folder that receives this run's folder"""

    total_timesteps: int = 1_000_000
    """environment steps of training, all copies together"""
    num_envs: int = 128
    """E, parallel copies of the environment"""
    num_steps: int = 25
    """T, steps of each copy per iteration"""
    learning_rate: float = 1e-3
    """Adam's step size"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero"""
    anneal_ent: bool = True
    """lower ent_coef linearly to zero"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation (not the paper's lambda)"""
    num_minibatches: int = 4
    """minibatches per epoch, drawn from all T x E steps"""
    update_epochs: int = 4
    """passes over each rollout"""
    clip_coef: float = 0.2
    """epsilon of Eq. 9 and 10: the importance ratio's clip"""
    ent_coef: float = 0.01
    """c_ent of Eq. 9: the guider's entropy bonus"""
    vf_coef: float = 0.5
    """c_v of Eq. 9: the value loss's weight"""
    max_grad_norm: float = 0.5
    """gradient norm at which guider and learners are clipped, each for itself"""

    delta: float = 1.5
    """delta of Eq. 9, above 1: the guider keeps mu/pi within [1/delta, delta]; inf for no bound"""
    lam: float = 1.0
    """lambda of Eq. 10: weight of the learners' own RL loss"""
    backtracking: Literal["soft", "reset"] = "soft"
    """step 4: soft is Eq. 9's bound; reset sets mu = pi each iteration (Section 4), then delta = inf and lambda = 0"""
    residual: bool = False
    """the guider's logits are the learners' (as of the rollout) plus a learned correction; reset implies it"""

    embed_dim: int = 48
    """width of the guider"""
    num_heads: int = 1
    """attention heads of the guider"""
    hidden_dim: int = 128
    """width of the learners"""
    eval_every: int = 10
    """iterations between two evaluations of the learners"""
    eval_episodes: int = 1024
    """episodes behind each line of the final table"""

    def __init__(self, **given):
        known = {field.name: field.default for field in fields(self)}
        if unknown := given.keys() - known.keys():
            raise TypeError(f"Args has no option {', '.join(sorted(unknown))}")
        preset = PRESETS.get(given.get("env", self.env).split("_")[0], {})
        for name, value in (known | preset | given).items():
            setattr(self, name, value)
        if self.algo == "ctds" or self.backtracking == "reset":
            self.delta, self.lam = math.inf, 0.0
        self.residual |= self.backtracking == "reset"


def validate(args):
    """Raise ValueError, in one sentence, for options that cannot work."""
    positive = "total_timesteps num_envs num_steps num_minibatches update_epochs embed_dim num_heads hidden_dim"
    for name in f"{positive} eval_every eval_episodes torch_threads learning_rate clip_coef max_grad_norm".split():
        if not getattr(args, name) > 0:
            raise ValueError(f"{name} must be above 0, not {getattr(args, name)}.")
    for name in ("ent_coef", "vf_coef", "lam"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"{name} must not be negative, but is {getattr(args, name)}.")
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], but is {getattr(args, name)}.")
    if not args.delta > 1:
        raise ValueError(f"delta must be above 1 (the guider's distance from the learners), but is {args.delta}.")
    if args.num_envs * args.num_steps % args.num_minibatches:
        raise ValueError(f"num_envs x num_steps must be a multiple of num_minibatches ({args.num_minibatches}).")
    if args.embed_dim % args.num_heads:
        raise ValueError(f"embed_dim ({args.embed_dim}) must be a multiple of num_heads ({args.num_heads}).")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), but is {args.seed}.")
    if args.algo == "mappo" and args.residual:
        raise ValueError("mappo has no guider policy, so it knows neither residual nor reset.")
    if args.total_timesteps < args.num_envs * args.num_steps:
        raise ValueError(f"total_timesteps ({args.total_timesteps}) is below one rollout, num_envs x num_steps.")
    make(args.env, 1)


# --- Networks ---------------------------------------------------------------------------------------------------------


def distribution(params, continuous):
    """Policy of every agent from the network's output: Categorical from (..., N, A), or diagonal Gaussian from (..., N, 2 A)."""
    if not continuous:
        return Categorical(logits=params)
    mean, log_std = params.chunk(2, -1)
    return Independent(Normal(mean + 0.5, (log_std - 1).clamp(-4, 1).exp()), 1)  # starts in the middle of [0, 1]


def linear(inputs, outputs, gain):
    """Linear layer with orthogonal weights and no bias at the start."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain), nn.init.zeros_(layer.bias)
    return layer


class Features(nn.Module):
    """Two tanh layers on each agent's own observation and id: (..., N, D) -> (..., N, C). Guider and learners have one each.

    Adding row i of `agent_id` is what a one-hot id of agent i, appended to its observation, would do.
    """

    def __init__(self, num_agents, obs_dim, dim):
        super().__init__()
        self.obs_in, self.hidden = linear(obs_dim, dim, 3.0), linear(dim, dim, 5 / 3)
        self.agent_id = nn.Parameter(0.2 * torch.randn(num_agents, dim))

    def forward(self, obs):
        return self.hidden((self.obs_in(obs) + self.agent_id).tanh()).tanh()


class Block(nn.Module):
    """Transformer block over the agents' axis, of width C with H heads; two of them are shallow enough to need no norms."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(linear(dim, 2 * dim, 2**0.5), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, x, causal=False, cache=None):
        """x (..., N, C) -> (..., N, C). causal: agent j attends to agents 1..j only.

        cache: a list that holds keys and values of the agents before; x is then the next agent alone, and is added to it.
        """
        qkv = self.qkv(x).view(-1, x.shape[-2], 3, self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each (batch, H, N, C/H)
        if cache is not None:
            cache.append((k, v))
            k, v = (torch.cat(tensors, 2) for tensors in zip(*cache))  # (batch, H, agents so far, C/H)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.proj(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(x)


class Guider(nn.Module):
    """Autoregressive joint policy mu(a|s) = prod_j mu(a^j | s, a^1..a^{j-1}), and one value per agent.

    An encoder block attends over all agents' observations; a causal decoder block attends over the actions chosen so
    far. Leading dimensions are free; the last two are (N, D). `base`, where given, are the learners' policy parameters
    (..., N, A) that the guider's own output is added to (the residual form).
    """

    def __init__(self, num_agents, obs_dim, action_dim, continuous=False, dim=64, num_heads=1):
        super().__init__()
        self.continuous = continuous
        self.features = Features(num_agents, obs_dim, dim)
        self.encoder, self.decoder = Block(dim, num_heads), Block(dim, num_heads)
        self.value_head = nn.Linear(dim, 1)
        self.action_in = nn.Linear(action_dim, dim) if continuous else nn.Embedding(action_dim, dim)
        self.start = nn.Parameter(0.02 * torch.randn(1, dim))  # stands for "no action yet"
        self.policy_head = linear(dim, action_dim * (1 + continuous), 0.1)

    def encode(self, obs):
        """obs (..., N, D) -> features (..., N, C), values (..., N)."""
        features = self.encoder(self.features(obs))
        return features, self.value_head(features).squeeze(-1)

    def policy(self, tokens, base, **attention):
        params = self.policy_head(self.decoder(tokens, **attention))
        return distribution(params if base is None else params + base, self.continuous)

    def forward(self, obs, actions, base=None):
        """obs (..., N, D), actions (..., N) -> mu's distribution at every agent given the actions before it, values (..., N)."""
        features, values = self.encode(obs)
        before = self.action_in(actions)[..., :-1, :]  # (..., N - 1, C): agent j sees actions 1..j-1
        before = torch.cat([self.start.expand(*before.shape[:-2], 1, -1), before], -2)  # (..., N, C)
        return self.policy(features + before, base, causal=True), values

    @torch.no_grad()
    def act(self, obs, base=None):
        """obs (..., N, D) -> actions (..., N), their logprobs (..., N), values (..., N); samples agent by agent."""
        features, values = self.encode(obs)
        before, cache, actions, logprobs = self.start, [], [], []
        for j in range(obs.shape[-2]):
            agent = (..., slice(j, j + 1), slice(None))
            mu = self.policy(features[agent] + before, None if base is None else base[agent], cache=cache)
            actions.append(mu.sample())
            logprobs.append(mu.log_prob(actions[-1]))
            before = self.action_in(actions[-1])
        agents_axis = obs.dim() - 2
        return torch.cat(actions, agents_axis), torch.cat(logprobs, agents_axis), values


class Learner(nn.Module):
    """Decentralized policies pi(a|o) = prod_i pi(a^i | o^i): shared weights, agent i sees obs[..., i, :] and its id, no more."""

    def __init__(self, num_agents, obs_dim, action_dim, continuous=False, dim=128):
        super().__init__()
        self.continuous = continuous
        self.features, self.hidden = Features(num_agents, obs_dim, dim), linear(dim, dim, 5 / 3)
        self.policy_head = linear(dim, action_dim * (1 + continuous), 0.1)

    def params(self, obs):
        """obs (..., N, D) -> the policy's parameters (..., N, A), or (..., N, 2 A) if continuous."""
        return self.policy_head(self.hidden(self.features(obs)).tanh())

    def forward(self, obs):
        """obs (..., N, D) -> pi's distribution at every agent."""
        return distribution(self.params(obs), self.continuous)


class ValueNorm(nn.Module):
    """Running mean and deviation of the returns, so that the critic learns targets of order 1 (Yu et al. 2022, MAPPO)."""

    def __init__(self, decay=0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("moments", torch.zeros(3))  # running averages of 1 (to undo the start at zero), x and x^2

    def update(self, x):
        self.moments.lerp_(torch.stack([torch.ones_like(x.mean()), x.mean(), x.square().mean()]), 1 - self.decay)

    def stats(self):
        """Mean and deviation; 0 and 0.001 before the first update."""
        weight, mean, square = self.moments
        mean, square = mean / weight.clamp(min=1e-8), square / weight.clamp(min=1e-8)
        return mean, (square - mean.square()).clamp(min=1e-6).sqrt()


# --- The equations ----------------------------------------------------------------------------------------------------


def compute_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016), with time-outs told apart from terminations.

    Args:
        rewards: (T, E, 1) or (T, E, N), reward of each step.
        values: (T, E, N), V of the observation that the step started from.
        next_values: (T, E, N), V of the observation that it led to; of the episode's last one where it ended.
        terminations: (T, E, 1) bool, the step ended its episode for good: nothing is worth anything after it.
        truncations: (T, E, 1) bool, time ran out: the return goes on with next_values, the sum over steps does not.

    Returns:
        advantages (T, E, N) and returns (T, E, N), the critic's targets.
    """
    errors = rewards + gamma * next_values * ~terminations - values  # (T, E, N)
    carry_on = gamma * gae_lambda * (~(terminations | truncations)).to(values.dtype)  # (T, E, 1)
    advantages = torch.empty_like(errors)
    advantage = torch.zeros_like(errors[0])
    for t in reversed(range(len(errors))):
        advantages[t] = advantage = errors[t] + carry_on[t] * advantage
    return advantages, advantages + values


def guider_loss(guider_logprobs, learner_logprobs, old_logprobs, advantages, kl, clip_coef, delta):
    """Policy part of Eq. 9: PPO with a double clip, and the KL where the guider has left the learners' reach.

    The inner clip takes away the gradient that would push mu further from pi than delta; the mask m lets the KL pull it
    back from where it is already further. Together they are the backtracking (step 4) in practice.

    Args:
        guider_logprobs, learner_logprobs, old_logprobs: log mu, log pi (a constant) and log mu_old of the action taken.
        advantages: A.
        kl: KL(mu || pi), same shape.
        clip_coef, delta: epsilon, and the bound above 1 (inf for none).

    Returns:
        loss (scalar), fraction of m = 1 (scalar), fraction of ratios beyond 1 +- epsilon (scalar).
    """
    bound = math.log(delta)
    gap = guider_logprobs - learner_logprobs.detach()  # log mu/pi
    ratio = (guider_logprobs - old_logprobs).exp()
    inner = (gap.clamp(-bound, bound) + learner_logprobs.detach() - old_logprobs).exp()
    clipped = inner.clamp(1 - clip_coef, 1 + clip_coef)
    mask = (gap.abs() > bound).to(kl.dtype)
    loss = -torch.min(ratio * advantages, clipped * advantages) + mask * kl
    return loss.mean(), mask.mean(), ((ratio - 1).abs() > clip_coef).to(kl.dtype).mean()


def learner_loss(learner_logprobs, old_logprobs, advantages, kl, clip_coef, lam):
    """Eq. 10: imitate the guider, and improve on the reward directly (the RL auxiliary loss).

    Args:
        learner_logprobs, old_logprobs: log pi and log mu_old of the action taken; the data is nearly on-policy for pi,
            because mu is held close to it.
        advantages: A.
        kl: KL(mu || pi) with mu a constant, same shape.
        clip_coef, lam: epsilon and lambda.

    Returns:
        loss (scalar).
    """
    ratio = (learner_logprobs - old_logprobs).exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)
    return (kl - lam * surrogate).mean()


# --- Training ---------------------------------------------------------------------------------------------------------


def detached(policy):
    """The same distribution as a constant (stop-gradient)."""
    if isinstance(policy, Categorical):
        return Categorical(logits=policy.logits.detach())
    return Independent(Normal(policy.base_dist.loc.detach(), policy.base_dist.scale.detach()), 1)


def build(args, envs):
    """Untrained guider and learner for an environment -> Guider, Learner."""
    num_agents, obs_dim = envs.single_observation_space.shape
    continuous = len(envs.single_action_space.shape) == 2
    action_dim = envs.single_action_space.shape[1] if continuous else int(envs.single_action_space.nvec[0])
    sizes = num_agents, obs_dim, action_dim, continuous
    return Guider(*sizes, args.embed_dim, args.num_heads), Learner(*sizes, args.hidden_dim)


def train(args):
    """Train a team -> Path of the run's folder (checkpoint.pt, metrics.csv, TensorBoard events, curve.png).

    Raises:
        ValueError: an option that cannot work.
    """
    validate(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.cuda and device.type == "cpu":
        print("--cuda: PyTorch sees no GPU here; training on the CPU.")
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.set_num_threads(args.torch_threads)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # else every larger tensor is a fresh mmap, with its page faults
        libc.mallopt(-1, 2**30), libc.mallopt(-3, 2**25)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD

    envs = make(args.env, args.num_envs, device)
    guider, learner = (network.to(device) for network in build(args, envs))
    guider_optimizer = torch.optim.Adam(guider.parameters(), args.learning_rate, eps=1e-5, fused=True)
    learner_optimizer = torch.optim.Adam(learner.parameters(), args.learning_rate, eps=1e-5, fused=True)
    value_norm = ValueNorm().to(device)
    run_dir = Path(args.runs_dir) / f"{args.env}__{args.algo}__{args.seed}__{time.time():.2f}"
    run_dir.mkdir(parents=True)
    writer, log = SummaryWriter(run_dir), open(run_dir / "metrics.csv", "w", newline="")

    T, E, (N, D) = args.num_steps, args.num_envs, envs.single_observation_space.shape
    next_obs, _ = envs.reset(seed=args.seed)
    obs = torch.zeros(T, E, N, D, device=device)
    final_obs = torch.zeros_like(obs)
    actions = torch.zeros(T, *envs.action_space.shape, device=device, dtype=torch.float if guider.continuous else torch.long)
    logprobs, values = torch.zeros(2, T, E, N, device=device)
    rewards, episode_returns = torch.zeros(2, T, E, device=device)
    terminations, truncations = torch.zeros(2, T, E, dtype=torch.bool, device=device)
    base = learner.params(obs).detach() if args.residual else None  # (T, E, N, A), the learners' logits in the rollout
    returns_so_far = torch.zeros(E, device=device)

    start, start_cpu, rows = time.time(), time.process_time(), []
    num_iterations = args.total_timesteps // (T * E)
    if num_iterations * T * E < args.total_timesteps:
        print(f"total_timesteps is cut to {num_iterations * T * E}, a multiple of num_envs x num_steps.")
    if args.algo == "ctds" or args.backtracking == "reset":
        print("ctds and reset set delta = inf and lambda = 0, whatever was given.")
    for iteration in (progress := tqdm(range(1, num_iterations + 1), unit_scale=T * E, unit="step")):
        remaining = 1 - (iteration - 1) / num_iterations
        ent_coef = args.ent_coef * (remaining if args.anneal_ent else 1.0)
        for group in guider_optimizer.param_groups + learner_optimizer.param_groups:
            group["lr"] = args.learning_rate * (remaining if args.anneal_lr else 1.0)
        if args.backtracking == "reset":
            # Step 4 of the iteration before, to the letter: a correction of zero is mu = pi
            nn.init.zeros_(guider.policy_head.weight), nn.init.zeros_(guider.policy_head.bias)

        # Step 1, data collection: roll out the guider mu
        with torch.no_grad():
            for t in range(T):
                obs[t] = next_obs
                if args.residual:
                    base[t] = learner.params(next_obs)
                if args.algo == "mappo":
                    pi = learner(next_obs)
                    actions[t] = pi.sample()
                    logprobs[t], values[t] = pi.log_prob(actions[t]), guider.encode(next_obs)[1]
                else:
                    actions[t], logprobs[t], values[t] = guider.act(next_obs, base[t] if args.residual else None)
                next_obs, rewards[t], terminations[t], truncations[t], infos = envs.step(actions[t])
                final_obs[t] = infos["final_obs"]
                returns_so_far += rewards[t]
                episode_returns[t] = returns_so_far
                returns_so_far *= ~(terminations[t] | truncations[t])

            mean, std = value_norm.stats()
            values = values * std + mean
            next_values = torch.cat([values[1:], guider.encode(next_obs)[1][None] * std + mean])  # (T, E, N)
            if truncations.any():  # the values just taken belong to the next episode: take the last observation's
                next_values[truncations] = guider.encode(final_obs[truncations])[1] * std + mean
            ended = (terminations[..., None], truncations[..., None])  # (T, E, 1)
            advantages, returns = compute_gae(rewards[..., None], values, next_values, *ended, args.gamma, args.gae_lambda)
            explained_variance = 1 - (returns - values).var() / returns.var().clamp(min=1e-8)
            value_norm.update(returns)
            mean, std = value_norm.stats()
            returns = (returns - mean) / std
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

        # Any step of any environment may share a minibatch: of whole episodes fewer samples would be independent
        batch = [x.flatten(0, 1) for x in (obs, actions, logprobs, advantages, returns) + ((base,) if args.residual else ())]
        losses = []
        for _ in range(args.update_epochs):
            for b in torch.randperm(T * E, device=device).chunk(args.num_minibatches):
                b_obs, b_actions, b_logprobs, b_advantages, b_returns, *b_base = (x[b] for x in batch)  # (batch, N, ...)
                # Both losses are computed at the same parameters, then both networks step; neither loss moves the other's
                pi = learner(b_obs)
                pi_logprobs = pi.log_prob(b_actions)  # (batch, N)
                if args.algo == "mappo":  # no guider policy: PPO on the learners, with the guider's critic
                    new_values = guider.encode(b_obs)[1]
                    loss_mu = mask = clipped = kl = torch.zeros((), device=device)
                    entropy = pi.entropy().mean()
                    loss_pi = learner_loss(pi_logprobs, b_logprobs, b_advantages, kl, args.clip_coef, 1.0) - ent_coef * entropy
                else:
                    mu, new_values = guider(b_obs, b_actions, *b_base)
                    mu_logprobs, entropy = mu.log_prob(b_actions), mu.entropy().mean()

                    # Step 2, guider update (Eq. 9); its bound delta is at the same time step 4, the backtracking, in practice
                    kl = kl_divergence(mu, detached(pi))
                    loss_mu, mask, clipped = guider_loss(
                        mu_logprobs, pi_logprobs, b_logprobs, b_advantages, kl, args.clip_coef, args.delta
                    )
                    loss_mu = loss_mu - ent_coef * entropy

                    # Step 3, learner update (Eq. 10)
                    kl = kl_divergence(detached(mu), pi)
                    loss_pi = learner_loss(pi_logprobs, b_logprobs, b_advantages, kl, args.clip_coef, args.lam)

                loss_v = 0.5 * (new_values - b_returns).square().mean()
                guider_optimizer.zero_grad(), learner_optimizer.zero_grad()
                (loss_mu + args.vf_coef * loss_v + loss_pi).backward()
                norms = [nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm) for net in (guider, learner)]
                guider_optimizer.step(), learner_optimizer.step()
                losses.append(torch.stack([loss_mu, loss_pi, loss_v, kl.mean(), entropy, mask, clipped, *norms]).detach())

        ended = terminations | truncations
        names = "guider_loss learner_loss value_loss kl entropy mask_frac clip_frac guider_grad_norm learner_grad_norm".split()
        row = dict(step=iteration * T * E, seconds=time.time() - start, cpu_seconds=time.process_time() - start_cpu)
        row |= dict(guider_return=episode_returns[ended].mean().item(), learner_return=math.nan)  # nan: no episode ended
        if iteration % args.eval_every == 0 or iteration in (1, num_iterations):
            row["learner_return"] = evaluate(args, guider, learner, "learner", args.num_envs, args.seed + 1).mean().item()
            progress.set_postfix(guider=f"{row['guider_return']:.2f}", learners=f"{row['learner_return']:.2f}")
        row |= dict(zip(names, torch.stack(losses).mean(0).tolist()), explained_variance=explained_variance.item())
        rows.append(row)
        if iteration == 1:
            table = csv.DictWriter(log, row.keys())
            table.writeheader()
        table.writerow(row), log.flush()
        for name, value in row.items():
            writer.add_scalar(name, value, row["step"])

    torch.save(dict(args=asdict(args), guider=guider.state_dict(), learner=learner.state_dict()), run_dir / "checkpoint.pt")
    print_table(args, guider, learner, envs.references)
    draw_curve(run_dir / "curve.png", args, rows)
    log.close(), writer.close()
    print(f"Everything is in {run_dir}")
    return run_dir


@torch.no_grad()
def evaluate(args, guider, learner, policy, episodes, seed):
    """Team return of `episodes` fresh episodes -> (episodes,) tensor. Does not disturb the random numbers of training.

    Args:
        policy: "guider" (sampled), "learner" (sampled) or "learner_greedy"; learners act from their own observations alone.
        seed: of environments and sampling.
    """
    device = next(learner.parameters()).device
    envs = make(args.env, episodes, device)
    total, running = torch.zeros(episodes, device=device), torch.ones(episodes, device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        while running.any():
            if policy == "guider":
                actions = guider.act(obs, learner.params(obs) if args.residual else None)[0]
            else:
                actions = learner(obs).sample() if policy == "learner" else learner(obs).mode
            obs, rewards, terminations, truncations, _ = envs.step(actions)
            total += running * rewards
            running *= ~(terminations | truncations)
    return total


def print_table(args, guider, learner, references):
    """Print mean team return and 95 % confidence interval of guider and learners, beside the environment's references."""
    print(f"{args.env}, {args.algo}, seed {args.seed}: mean team return over {args.eval_episodes} episodes")
    for policy in ("learner", "learner_greedy", "guider"):
        if policy != "guider" or args.algo != "mappo":
            total = evaluate(args, guider, learner, policy, args.eval_episodes, args.seed + 2)
            print(f"  {policy:22s} {total.mean():9.2f} +- {1.96 * total.std() / math.sqrt(len(total)):.2f}")
    for name, score in references.items():
        print(f"  {f'({name})':22s} {score:9.2f}")


def draw_curve(path, args, rows):
    """Draw both returns over the environment steps."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    for name in ("guider_return", "learner_return"):
        points = [(row["step"], row[name]) for row in rows if not math.isnan(row[name])]
        plt.plot(*zip(*points), label=name.replace("_", " "))
    plt.xlabel("environment steps"), plt.ylabel("mean team return"), plt.title(f"{args.env}, {args.algo}, seed {args.seed}")
    plt.legend(), plt.savefig(path, dpi=120), plt.close()


def load(path):
    """Read a checkpoint -> Args, Guider, Learner (on the CPU)."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    args = Args(**checkpoint["args"])
    guider, learner = build(args, make(args.env, 1))
    guider.load_state_dict(checkpoint["guider"]), learner.load_state_dict(checkpoint["learner"])
    return args, guider, learner


def main():
    """The command line: options as in Args; wrong ones end in one sentence and exit code 2."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env", default=Args.env)
    args = tyro.cli(Args, default=Args(env=first.parse_known_args()[0].env))  # so that --help shows the preset too
    try:
        validate(args)
    except ValueError as error:
        sys.exit(print(f"magpo.py: {error}", file=sys.stderr) or 2)
    train(args)


if __name__ == "__main__":
    main()
