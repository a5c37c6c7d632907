"""Multi-Agent Guided Policy Optimization (MAGPO) in one file of PyTorch. Read it from top to bottom.

Li, Xie, Lu: "Multi-Agent Guided Policy Optimization", ICLR 2026, arXiv 2507.18059. Equation numbers are the
paper's. Its official code, in JAX, is github.com/liyheng/MAGPO, commit d2ac38b. TUTORIAL.md has a table of
where paper, official code and this file differ.

A team of N agents shares one reward. Two policies are trained together:

    guider    mu(a|s) = prod_j mu(a^j | s, a^1..a^{j-1})  sees all observations, acts in turn; for training
    learners  pi(a|o) = prod_i pi(a^i | o^i)              each sees its own observation; to deploy

Each iteration of train() takes the paper's four steps. Steps 2 and 3 share each minibatch:

    1. data collection      roll out the guider mu
    2. guider update        PPO on mu, held back from leaving 1/delta <= mu/pi <= delta               (Eq. 9)
    3. learner update       pi imitates mu, and also improves on the team's reward by itself          (Eq. 10)
    4. guider backtracking  mu := pi. In practice Eq. 9's bound stands for it; --backtracking reset does it

mu/pi, the KL and the entropy are those of one agent, given the actions before its own.

Shapes: T steps, E environments, N agents, D numbers of an observation, S of a global state, A actions of an
agent, H features of an observation, C width of the attention. "..." stands for any leading dimensions. In
the equations A is the advantage.
"""

import math
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from run import Run
from support.checkpoint import Checkpoint
from support.machine import average_gradients, gather
from support.options import apply_preset, fix, make_envs
from support.policies import constant, sample
from support.returns import ValueNorm, explained_variance, play
from support.terminal import command_line, print_table


# The comments inside are also the text of --help
@dataclass(kw_only=True)
class Args:
    """Train decentralized learners with an autoregressive guider. None: the environment's preset decides."""

    # Environment
    env: str = "mpe_spread"  # name of an environment, see envs.py
    env_kwargs: str = "{}"  # options of the environment's constructor, as JSON, such as '{"num_agents": 5}'
    num_envs: int | None = None  # E, parallel copies of the environment
    num_workers: int = 0  # processes of a pettingzoo or gym environment: 0, or num_envs for one per copy
    state: bool = False  # show the environment's global state to the guider, and to it alone
    # PPO, under CleanRL's names
    total_timesteps: int | None = None  # environment steps of training, all copies together
    num_steps: int | None = None  # T, steps of each copy per iteration
    learning_rate: float | None = None  # Adam's step size
    anneal_lr: bool = True  # lower the learning rate and the entropy bonus linearly to zero
    gamma: float | None = None  # discount factor
    gae_lambda: float | None = None  # lambda of generalized advantage estimation (not the paper's lambda)
    num_minibatches: int | None = None  # per epoch; they split steps, or whole sequences if recurrent
    update_epochs: int | None = None  # passes over each rollout
    clip_coef: float = 0.2  # epsilon of Eq. 9 and 10: the importance ratio's clip
    ent_coef: float | None = None  # c_ent of Eq. 9: weight of the entropy bonus at the start
    vf_coef: float = 0.5  # c_v of Eq. 9: weight of the value loss
    max_grad_norm: float | None = None  # limit of the gradient's norm, of guider and of learners apart
    # MAGPO
    algo: Literal["magpo", "mappo", "ctds"] = "magpo"  # mappo: PPO on the learners; ctds: delta inf and lam 0
    delta: float | None = None  # delta of Eq. 9, above 1: 1/delta <= mu/pi <= delta; inf: none, as with reset
    lam: float | None = None  # lambda of Eq. 10: weight of the learners' own RL loss
    backtracking: Literal["soft", "reset"] = "soft"  # step 4: soft is the bound, reset the theory's mu := pi
    recurrent: bool = False  # give guider and learners a memory, a GRU over time
    embed_dim: int = 32  # width of the guider's and the critic's attention
    action_std: float | None = None  # std of the guider's action embeddings at first; 1 with reset
    hidden_dim: int = 64  # H, features of an observation; the two layers before them are twice as wide
    # Run
    seed: int = 1  # seed of everything random, environments included
    cuda: bool = False  # train on the GPU, if there is one
    torch_deterministic: bool = True  # PyTorch's deterministic algorithms; a warning where there is none
    torch_threads: int = 1  # CPU threads of PyTorch; networks this small are slower with a second one
    compile: bool = False  # torch.compile the networks' forward(); for GPUs
    runs_dir: str = "runs"  # folder that receives this run's folder
    save_every: int = 25  # iterations between two checkpoints
    eval_every: int | None = None  # iterations between two evaluations of the learners
    eval_episodes: int | None = None  # episodes behind each line of the final table, at most
    track: bool = False  # log to Weights & Biases, too
    resume: str = ""  # run folder of a run to go on with, by its own options
    eval: str = ""  # run folder to evaluate instead of training; --env may name another environment

    def __post_init__(self):
        apply_preset(self)
        reset = self.backtracking == "reset"
        if self.algo != "magpo" or reset:  # baselines and theory: no bound; Eq. 9 with mu = pi is PPO already
            fix(self, delta=math.inf, lam=0.0)
        if self.algo == "mappo" or reset:  # the actions' embeddings are not used, or get no gradient
            fix(self, action_std=1.0)


# --- Networks -----------------------------------------------------------------------------------------------
def linear(inputs, outputs, gain):
    """Orthogonal weights at first, bias zero. Gain 5/3 suits tanh; with 0.1 outputs start near zero."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def distribution(logits, continuous, action_mask=None):
    """Policy of every agent: Categorical from (..., N, A), or diagonal Gaussian from (..., N, 2 A)."""
    if not continuous:  # -1e9 is minus infinity enough: masked actions leave entropy and KL finite
        return Categorical(logits=logits if action_mask is None else logits.masked_fill(~action_mask, -1e9))
    # Environments clip actions to [0, 1]. Softsign is a bound with a gradient everywhere, which leads back
    shift, width = nn.functional.softsign(logits).chunk(2, -1)  # both in (-1, 1); mean in (-0.5, 1.5)
    return Independent(Normal(0.5 + shift, (2.5 * width - 1.5).exp()), 1)


def new_memory(args, envs):
    """`memory` of every network, at the start of an episode in all copies -> hidden, starts.

    hidden: (E, N, 3, H), or (E, N, 3, 0) if not recurrent: GRU states, one for each `slot` of an ObsEncoder.
    starts: (E,) bool, or (T, E) of T steps, the observations that begin an episode: their state is zero.
    """
    E, N, _ = envs.observation_space.shape
    hidden = torch.zeros(E, N, 3, args.hidden_dim if args.recurrent else 0, device=envs.device)
    return hidden, torch.ones(E, dtype=torch.bool, device=envs.device)


def next_hidden(guider, learner, obs, memory):
    """Hidden states (E, N, 3, H) after obs (E, N, D). Encodes anew, so that no policy need return them."""
    if learner.obs_encoder.gru is None:
        return memory[0]
    encoders = learner.obs_encoder, guider.own.obs_encoder, guider.obs_encoder
    return torch.stack([encoder(obs, memory) for encoder in encoders], -2)


class ObsEncoder(nn.Module):
    """Each agent's observation and id, and if recurrent its past -> features.

    slot: its place in memory, 0 for the learners, 1 for the guider's own policy, 2 for attention and critic.
    """

    def __init__(self, num_agents, obs_dim, hidden_dim, recurrent=False, slot=0):
        super().__init__()
        self.slot = slot
        self.agent_id = nn.Parameter(0.2 * torch.randn(num_agents, 2 * hidden_dim))
        self.obs_in = linear(obs_dim, 2 * hidden_dim, 3.0)
        self.middle = linear(2 * hidden_dim, 2 * hidden_dim, 5 / 3)
        self.out = linear(2 * hidden_dim, hidden_dim, 5 / 3)
        self.gru = nn.GRUCell(hidden_dim, hidden_dim) if recurrent else None

    def forward(self, obs, memory=None):
        """obs (..., N, D), memory before it -> features (..., N, H): if recurrent, the GRU's new state."""
        x = torch.tanh(self.obs_in(obs) + self.agent_id)  # as if a one-hot id were appended to obs
        x = torch.tanh(self.middle(x))
        x = torch.tanh(self.out(x))
        if self.gru is None:
            return x
        hidden, starts = memory[0][..., self.slot, :], memory[1]
        outputs = []
        # One step, if starts has the leading dimensions of hidden; with one dimension more, T steps
        for x_t, start in zip(x.view(-1, *hidden.shape), starts.view(-1, *hidden.shape[:-2]), strict=True):
            hidden = hidden * ~start[..., None, None]
            hidden = self.gru(x_t.flatten(0, -2), hidden.flatten(0, -2)).view_as(hidden)
            outputs.append(hidden)
        return torch.stack(outputs).view_as(x)


class Block(nn.Module):
    """Transformer block over the agents: one head, LayerNorm before attention and MLP."""

    def __init__(self, dim):
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(linear(dim, 2 * dim, 5 / 3), nn.Tanh(), nn.Linear(2 * dim, dim))

    def forward(self, x, causal=False, cache=None):
        """x (..., N, C) -> x (..., N, C), (keys, values).

        causal: agent j attends to agents 1..j only.
        cache: keys and values of the agents before x, which is then the next agent alone.
        """
        q, k, v = self.qkv(self.norm_1(x)).chunk(3, -1)  # each (..., N, C)
        if cache is not None:
            k = torch.cat([cache[0], k], -2)  # (..., agents so far, C)
            v = torch.cat([cache[1], v], -2)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., N, agents)
        if causal:
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        x = x + self.proj(scores.softmax(-1) @ v)
        x = x + self.mlp(self.norm_2(x))
        return x, (k, v)


class Learner(nn.Module):
    """Decentralized policies pi(a|o) = prod_i pi(a^i | o^i), sharing weights. Agent i sees obs[..., i, :]."""

    def __init__(
        self, num_agents, obs_dim, action_dim, continuous=False, hidden_dim=64, recurrent=False, slot=0
    ):
        super().__init__()
        self.continuous = continuous
        self.obs_encoder = ObsEncoder(num_agents, obs_dim, hidden_dim, recurrent, slot)
        self.policy_head = linear(hidden_dim, 2 * action_dim if continuous else action_dim, 0.1)

    def logits(self, obs, memory=None):
        """obs (..., N, D) -> logits (..., N, A), or (..., N, 2 A) for a Gaussian; see distribution()."""
        return self.policy_head(self.obs_encoder(obs, memory))

    def forward(self, obs, action_mask=None, memory=None):
        """obs (..., N, D) -> pi of every agent, over its allowed actions. Inputs as the guider's."""
        return distribution(self.logits(obs, memory), self.continuous, action_mask)


class Guider(nn.Module):
    """Autoregressive joint policy mu(a|s) = prod_j mu(a^j | s, a^1..a^{j-1}); and the critic.

    mu's logits = the logits of `own`, a policy like the learners', + a correction by attention. The encoder
    attends to all agents' observations, the causal decoder to the actions chosen so far.
    Optional inputs, the same everywhere:
        action_mask: (..., N, A) bool, the allowed actions.
        state: (..., S), global state that no learner sees.
        memory: needed if recurrent; see new_memory().
    """

    def __init__(
        self, num_agents, obs_dim, action_dim, continuous=False, embed_dim=32, hidden_dim=64,
        recurrent=False, state_dim=0, action_std=0.1,
    ):  # fmt: skip
        super().__init__()
        self.continuous = continuous
        self.own = Learner(num_agents, obs_dim, action_dim, continuous, hidden_dim, recurrent, slot=1)
        self.obs_encoder = ObsEncoder(num_agents, obs_dim, hidden_dim, recurrent, slot=2)
        self.obs_token = nn.Linear(hidden_dim, embed_dim)
        self.state_token = nn.Linear(state_dim, embed_dim) if state_dim else None
        self.encoder = Block(embed_dim)
        self.value_head = nn.Linear(embed_dim, 1)
        self.no_action = nn.Parameter(0.02 * torch.randn(1, embed_dim))  # what the first agent sees
        token_layer = nn.Linear if continuous else nn.Embedding
        self.action_token = token_layer(action_dim, embed_dim)
        nn.init.normal_(self.action_token.weight, std=action_std)
        self.decoder = Block(embed_dim)
        self.correction_head = linear(embed_dim, self.own.policy_head.out_features, 0.1)

    def encode(self, obs, state=None, memory=None):
        """obs (..., N, D) -> encoded (..., N, C), values (..., N) in units of ValueNorm."""
        tokens = self.obs_token(self.obs_encoder(obs, memory))
        if self.state_token is not None:
            tokens = tokens + self.state_token(state).unsqueeze(-2)
        encoded, _ = self.encoder(tokens)
        return encoded, self.value_head(encoded).squeeze(-1)

    def forward(self, obs, actions, action_mask=None, state=None, memory=None):
        """obs (..., N, D), actions (..., N[, A]) -> mu (each given the actions before), values (..., N)."""
        encoded, values = self.encode(obs, state, memory)
        before = self.action_token(actions)[..., :-1, :]  # (..., N - 1, C)
        first = self.no_action.expand(*before.shape[:-2], 1, -1)
        before = torch.cat([first, before], -2)  # (..., N, C): agent j gets the action of j - 1
        decoded, _ = self.decoder(encoded + before, causal=True)
        logits = self.own.logits(obs, memory) + self.correction_head(decoded)
        return distribution(logits, self.continuous, action_mask), values

    @torch.no_grad()
    def act(self, obs, action_mask=None, state=None, memory=None):
        """Sample, agent by agent: obs (..., N, D) -> actions (..., N[, A]), logprobs, values (..., N)."""
        encoded, values = self.encode(obs, state, memory)
        own_logits = self.own.logits(obs, memory)
        previous, cache, actions, logprobs = self.no_action, None, [], []
        for j in range(obs.shape[-2]):
            decoded, cache = self.decoder(encoded[..., j : j + 1, :] + previous, cache=cache)
            logits = own_logits[..., j : j + 1, :] + self.correction_head(decoded)  # (..., 1, A)
            mask = None if action_mask is None else action_mask[..., j : j + 1, :]
            mu_j = distribution(logits, self.continuous, mask)
            actions.append(sample(mu_j))  # (..., 1[, A])
            logprobs.append(mu_j.log_prob(actions[-1]))
            previous = self.action_token(actions[-1])
        agents_axis = obs.dim() - 2
        return torch.cat(actions, agents_axis), torch.cat(logprobs, agents_axis), values


# --- The equations ------------------------------------------------------------------------------------------
def compute_gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016) -> advantages, returns, both (T, E, N).

    rewards: (T, E, 1), the team's.
    values: (T, E, N), V of the observation that a step started from.
    next_values: (T, E, N), V of the next observation; at an episode's end, of its last one.
    terminations: (T, E, 1) bool, the game was over. Nothing is worth anything after it.
    truncations: (T, E, 1) bool, time ran out. The step bootstraps; the sum over lambda ends here.
    """
    td_errors = rewards + gamma * next_values * ~terminations - values
    over = terminations | truncations
    advantages = torch.zeros_like(td_errors)
    advantage = 0.0
    for t in reversed(range(len(td_errors))):
        advantage = td_errors[t] + gamma * gae_lambda * advantage * ~over[t]
        advantages[t] = advantage
    return advantages, advantages + values


def guider_loss(log_mu, log_pi, log_mu_old, advantages, kl, clip_coef, delta):
    """Eq. 9 without entropy and value loss -> loss, fraction of m = 1, fraction of clipped r (scalars).

        r    = mu / mu_old
        rho  = clip( clip(mu/pi, 1/delta, delta) * pi/mu_old,  1 - eps, 1 + eps )        the double clip
        L_mu = -min(r A, rho A) + m KL(mu || pi),        m = 1 where mu/pi is outside [1/delta, delta]

    The inner clip takes away the push that would carry mu further from pi than delta, unless pi is so far
    from mu_old that the outer clip wins. The masked KL pulls mu back where it is further already. Together
    they stand for step 4. pi is a constant: of the KL only mu may have a gradient.

    log_mu, log_pi, log_mu_old: log-probabilities of the action taken, each (1 or T, batch, N).
    advantages, kl: A and KL(mu || pi), in the same shape.
    clip_coef, delta: eps, and the bound above 1 (inf: none).
    """
    log_pi = log_pi.detach()
    bound = math.log(delta)
    log_gap = log_mu - log_pi
    r = (log_mu - log_mu_old).exp()
    inner = (log_gap.clamp(-bound, bound) + log_pi - log_mu_old).exp()
    rho = inner.clamp(1 - clip_coef, 1 + clip_coef)
    m = (log_gap.abs() > bound).to(kl.dtype)
    loss = -torch.min(r * advantages, rho * advantages) + m * kl
    clipped = ((r - 1).abs() > clip_coef).to(kl.dtype)
    return loss.mean(), m.mean(), clipped.mean()


def learner_loss(log_pi, log_mu_old, advantages, kl, clip_coef, lam):
    """Eq. 10: imitate the guider, and improve on the reward directly -> mean loss (scalar).

        r_pi = pi / mu_old
        L_pi = KL(mu || pi) - lambda min(r_pi A, clip(r_pi, 1 - eps, 1 + eps) A)

    The data is nearly on-policy for pi, because mu is held close to it. Arguments as in guider_loss, but of
    the KL only pi may have a gradient. Theorem 4.1 needs KL(pi || mu); the paper's practice has this one.
    """
    r_pi = (log_pi - log_mu_old).exp()
    rho_pi = r_pi.clamp(1 - clip_coef, 1 + clip_coef)
    surrogate = torch.min(r_pi * advantages, rho_pi * advantages)
    return (kl - lam * surrogate).mean()


def backtrack(guider, learner):
    """Step 4, mu := pi: the guider's own policy becomes the learners', its correction zero. Adam goes on.

    `own` is frozen for the whole run: the correction alone moves mu away from pi, and their memories agree.
    """
    guider.own.load_state_dict(learner.state_dict())
    guider.own.requires_grad_(False)
    nn.init.zeros_(guider.correction_head.weight)
    nn.init.zeros_(guider.correction_head.bias)


# --- Training -----------------------------------------------------------------------------------------------
def build(args, envs):
    """Untrained Guider and Learner for an environment."""
    space = envs.single_action_space
    continuous = len(space.shape) == 2
    action_dim = space.shape[1] if continuous else int(space.nvec[0])
    sizes = *envs.single_observation_space.shape, action_dim, continuous  # N, D, A
    state_dim = envs.state_dim if args.state else 0
    guider = Guider(*sizes, args.embed_dim, args.hidden_dim, args.recurrent, state_dim, args.action_std)
    return guider, Learner(*sizes, args.hidden_dim, args.recurrent)


@torch.no_grad()
def estimate_advantages(buffer, guider, value_norm, args):
    """Rollout (T, E, ...) -> normalized advantages and returns (T, E, N), the critic's explained variance.

    Updates value_norm. Statistics are those of all processes.
    """
    values = value_norm.denormalize(buffer["values"])
    memory = buffer["final_hidden"], torch.zeros_like(buffer["starts"])  # final_obs begins no episode
    _, next_values = guider.encode(buffer["final_obs"], buffer.get("final_state"), memory)
    next_values = value_norm.denormalize(next_values)
    rewards, ends = buffer["rewards"], (buffer["terminations"], buffer["truncations"])
    advantages, returns = compute_gae(rewards, values, next_values, *ends, args.gamma, args.gae_lambda)
    all_advantages, all_returns = gather(advantages), gather(returns)  # of all copies
    critic_fit = explained_variance(all_returns, all_advantages)  # its errors are returns - values
    value_norm.update(all_returns)
    center, spread = all_advantages.mean(), all_advantages.std(correction=0)
    least = 1e-8 * value_norm.stats()[1]  # of the returns' deviation: no division by zero, in any unit
    return (advantages - center) / (spread + least), value_norm.normalize(returns), critic_fit


def train(args, stop=()):
    """Train a team -> Path of the run's folder (checkpoint.pt, metrics.csv, args.json, TensorBoard events).

    stop: a list, filled by Ctrl-C. Once something is in it, training ends after the iteration.
    Raises ValueError (options), FloatingPointError (numbers), EnvFailure (environment) and OSError (files).
    """
    run = Run(args)  # its folder, checkpoints, processes, device and seed: see run.py
    args, device = run.args, run.device  # a resumed run has its own options
    envs = make_envs(args, run.num_envs, device)  # run.num_envs: this process's share of E
    guider, learner = run.networks(build, envs)
    parameters = [*guider.parameters(), *learner.parameters()]
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=1e-5, fused=True)
    value_norm = ValueNorm().to(device)
    if args.backtracking == "reset":
        backtrack(guider, learner)  # the first rollout, too, is pi's
    parts = dict(guider=guider, learner=learner, optimizer=optimizer, value_norm=value_norm)
    resume_at, memory = run.open(envs, new_memory(args, envs), **parts)  # None, or a resumed run's
    obs, infos = envs.reset(seed=run.seed, options=resume_at)

    for iteration in run.iterations(envs, stop):
        remaining = 1 - (iteration - 1) / run.num_iterations if args.anneal_lr else 1.0
        optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

        # Step 1, data collection: roll out the guider mu
        steps = []
        with torch.no_grad():
            for _ in range(args.num_steps):
                allowed, state = infos.get("action_mask"), infos.get("state")
                if args.algo == "mappo":
                    pi = learner(obs, allowed, memory)
                    actions = sample(pi)
                    logprobs = pi.log_prob(actions)
                    _, values = guider.encode(obs, state, memory)
                else:
                    actions, logprobs, values = guider.act(obs, allowed, state, memory)
                hidden = next_hidden(guider, learner, obs, memory)
                # Where an episode is over, next_obs begins a new one; final_obs is what each step led to
                next_obs, rewards, terminations, truncations, infos = envs.step(actions)
                over = terminations | truncations
                steps.append(dict(
                    obs=obs, action_mask=allowed, state=state, hidden=memory[0], starts=memory[1],
                    actions=actions, logprobs=logprobs, values=values,
                    rewards=rewards[:, None],
                    terminations=terminations[:, None], truncations=truncations[:, None],
                    final_obs=infos["final_obs"], final_state=infos.get("final_state"), final_hidden=hidden,
                    episode_return=run.ended_returns(rewards, over),  # sums up; nan where none ends
                ))  # fmt: skip
                obs, memory = next_obs, (hidden, over)
            # The rollout buffer, each (T, E, ...)
            buffer = {k: torch.stack([s[k] for s in steps]) for k, x in steps[0].items() if x is not None}
            advantages, returns, critic_fit = estimate_advantages(buffer, guider, value_norm, args)
            buffer |= dict(advantages=advantages, returns=returns)
            run.check_finite(iteration, buffer)

        # Minibatches split axis 1: with memory E sequences (T, E, ...), else T E steps (1, T E, ...)
        batch = buffer if args.recurrent else {k: x.flatten(0, 1).unsqueeze(0) for k, x in buffer.items()}
        metrics = []
        for _ in range(args.update_epochs):
            for index in torch.randperm(batch["obs"].shape[1], device=device).chunk(args.num_minibatches):
                b = {k: x[:, index] for k, x in batch.items()}
                allowed, state = b.get("action_mask"), b.get("state")
                start_memory = b["hidden"][0], b["starts"]

                # Both losses are computed at the same parameters, then both networks take their step
                pi = learner(b["obs"], allowed, start_memory)
                if args.algo == "mappo":  # mu = pi: inner clip, m and the KLs vanish, and Eq. 9 is PPO
                    mu = pi
                    _, new_values = guider.encode(b["obs"], state, start_memory)
                else:
                    mu, new_values = guider(b["obs"], b["actions"], allowed, state, start_memory)
                log_mu, log_pi = mu.log_prob(b["actions"]), pi.log_prob(b["actions"])  # (1 or T, batch, N)
                log_mu_old, advantages = b["logprobs"], b["advantages"]

                # Step 2, guider update (Eq. 9): pi is a constant
                kl_mu = kl_divergence(mu, constant(pi))
                loss_mu, m_frac, clip_frac = guider_loss(
                    log_mu, log_pi, log_mu_old, advantages, kl_mu, args.clip_coef, args.delta
                )
                entropy = mu.entropy().mean()
                loss_v = 0.5 * (new_values - b["returns"]).square().mean()

                # Step 3, learner update (Eq. 10): mu is a constant
                kl_pi = kl_divergence(constant(mu), pi)
                loss_pi = learner_loss(log_pi, log_mu_old, advantages, kl_pi, args.clip_coef, args.lam)

                optimizer.zero_grad()
                (loss_mu - args.ent_coef * remaining * entropy + args.vf_coef * loss_v + loss_pi).backward()
                average_gradients(parameters)
                norm_mu = nn.utils.clip_grad_norm_(guider.parameters(), args.max_grad_norm)
                norm_pi = nn.utils.clip_grad_norm_(learner.parameters(), args.max_grad_norm)
                optimizer.step()
                metrics.append(dict(
                    guider_loss=loss_mu, learner_loss=loss_pi, value_loss=loss_v, kl=kl_pi.mean(),
                    entropy=entropy, mask_frac=m_frac, clip_frac=clip_frac,
                    guider_grad_norm=norm_mu, learner_grad_norm=norm_pi,
                ))  # fmt: skip

        # Step 4, guider backtracking: mu := pi. If soft, nothing is left to do: Eq. 9's bound stands for it
        if args.backtracking == "reset":
            backtrack(guider, learner)

        row = dict(guider_return=gather(buffer["episode_return"]).nanmean().item(), learner_return=math.nan)
        row |= run.mean(iteration, metrics) | dict(explained_variance=critic_fit)
        if run.evaluates(iteration):
            team_returns = evaluate(args, guider, learner, "learner", run.episodes(envs), args.seed + 1, stop)
            row["learner_return"] = math.nan if stop else team_returns.mean().item()
        run.log(iteration, row)
        if iteration % args.save_every == 0:
            run.save(envs, memory)

    run.save(envs, memory)
    envs.close()
    if run.leads and not stop:
        print_table(args, guider, learner, evaluate, stop)
    return run.close()


def evaluate(args, guider, learner, policy, episodes, seed, stop=()):
    """Team returns (episodes,) of fresh episodes, equally many of every copy, so rounded up.

    policy: "guider" (sampled), "learner" (sampled) or "learner_greedy".
    seed: of environments and sampling. Training's random numbers stay as they were. stop: see train().
    """
    if policy not in ("guider", "learner", "learner_greedy"):
        raise ValueError(f"policy must be guider, learner or learner_greedy, but is {policy!r}.")

    def act(obs, infos, memory):
        allowed, state = infos.get("action_mask"), infos.get("state")
        hidden = next_hidden(guider, learner, obs, memory)
        if policy == "guider":
            return guider.act(obs, allowed, state, memory)[0], hidden
        pi = learner(obs, allowed, memory)
        return (sample(pi) if policy == "learner" else pi.mode), hidden

    device = next(learner.parameters()).device
    with closing(make_envs(args, min(episodes, args.num_envs), device)) as envs:
        return play(envs, act, new_memory(args, envs), episodes, seed, policy, stop)


def load(path, **changes):
    """Read a run's folder or checkpoint -> Args, Guider, Learner, on the CPU.

    changes: options that replace the run's. For a pettingzoo: or gym: environment env must be among them: no
    file decides which code is imported. Raises ValueError if it cannot be read or does not fit.
    """
    return Checkpoint(path).load(Args, build, **changes)


if __name__ == "__main__":
    command_line(Args, train, load, evaluate)
