"""Which layers let a learner tell where to go? `python figures/imitation.py` prints a table and writes imitation.csv.

No reinforcement here: learners copy the heuristic of references.py (landmarks shared out anew at every step, so that what
to do follows from the observation) by plain supervised learning, and then play mpe_spread alone. What cannot be copied
in this way cannot be found by trial either; that is how magpo.py's layers were chosen. The last row copies a team with fixed
roles, agent i to landmark i, which are easy to learn: it is the score that strong agent ids lead to, and stop at.
"""

import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import tyro

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import envs
import magpo
import references


class Net(nn.Module):
    """Layers of width C on each agent's observation and id: (E, N, D) -> logits (E, N, A). `scale`: of the ids at the start."""

    def __init__(self, act, depth, gain, first_gain, scale, dim=128, num_agents=3, obs_dim=18, num_actions=5):
        super().__init__()
        gains = [first_gain] + [gain] * (depth - 1)  # None: PyTorch's own start
        sizes = zip([obs_dim] + [dim] * (depth - 1), gains)
        self.layers = nn.ModuleList(magpo.linear(size, dim, gain) if gain else nn.Linear(size, dim) for size, gain in sizes)
        self.agent_id, self.act = nn.Parameter(scale * torch.randn(num_agents, dim)), act
        self.head = magpo.linear(dim, num_actions, 0.1)

    def params(self, x):
        x = self.act(self.layers[0](x) + self.agent_id)
        for layer in self.layers[1:]:
            x = self.act(layer(x))
        return self.head(x)


def imitate(net, roles, seed, updates, num_envs=512):
    """Copy the heuristic for `updates` batches of one step of E copies; 70 % of the steps are the heuristic's."""
    env = envs.make("mpe_spread", num_envs)
    obs, _ = env.reset(seed=seed)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, updates)
    for _ in range(updates):
        target, logits = references.cover(env, 3, roles)(), net.params(obs)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
        own = torch.distributions.Categorical(logits=logits.detach()).sample()
        obs = env.step(torch.where(torch.rand(num_envs, 1) < 0.7, target, own))[0]
    return loss.item()


NETS = {
    "2 x ReLU, PyTorch's start, ids of std 0.2": (partial(Net, torch.relu, 2, None, None, 0.2), False),
    "2 x ReLU, orthogonal start, ids of std 0.2": (partial(Net, torch.relu, 2, 2**0.5, 2**0.5, 0.2), False),
    "2 x ReLU, first gain 3, ids of std 2": (partial(Net, torch.relu, 2, None, 3.0, 2.0), False),
    "3 x ReLU, orthogonal start, ids of std 0.2": (partial(Net, torch.relu, 3, 2**0.5, 2**0.5, 0.2), False),
    "2 x tanh, orthogonal start, ids of std 0.2": (partial(Net, torch.tanh, 2, 5 / 3, 5 / 3, 0.2), False),
    "magpo.py's Learner: 3 x tanh, first gain 3, ids of std 0.2": (partial(magpo.Learner, 3, 18, 5), False),
    "fixed roles: 2 x ReLU, first gain 3, ids of std 2": (partial(Net, torch.relu, 2, None, 3.0, 2.0), True),
}


def main(seed: int = 1, episodes: int = 4096, updates: int = 2000):
    """Train every network of NETS by imitation, let it play, print a table and write figures/imitation.csv."""
    torch.set_num_threads(1)
    rows = ["network,cross_entropy,mean,ci95,cpu_seconds,seed\n"]
    for name, (build, roles) in NETS.items():
        torch.manual_seed(seed)
        net, start = build(), time.process_time()
        loss, seconds = imitate(net, roles, seed, updates), time.process_time() - start
        with torch.no_grad():
            env = envs.make("mpe_spread", episodes)
            obs, _ = env.reset(seed=seed + 1)
            returns = 0.0
            for _ in range(env.max_episode_steps):
                obs, rewards, *_ = env.step(torch.distributions.Categorical(logits=net.params(obs)).sample())
                returns = returns + rewards
        mean, ci95 = returns.mean().item(), 1.96 * (returns.var() / episodes).sqrt().item()
        rows.append(f'"{name}",{loss:.3f},{mean:.2f},{ci95:.2f},{seconds:.0f},{seed}\n')
        print(f"{name:50s} cross-entropy {loss:.3f}  return {mean:6.2f} +- {ci95:.2f}  {seconds:3.0f} cpu-s", flush=True)
    Path(__file__).with_suffix(".csv").write_text("".join(rows))


if __name__ == "__main__":
    tyro.cli(main)
