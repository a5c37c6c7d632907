"""Which layers let a learner tell where to go? `python results/imitation.py` -> a table, and imitation.csv.

No reinforcement here. Learners copy the heuristic of references.py by plain supervised learning, and then
play mpe_spread alone. (The heuristic shares out the landmarks anew at every step, so the observation says
what to do.) What cannot be copied in this way cannot be found by trial either. That is how magpo.py's layers
were chosen. The last row copies fixed roles, agent i to landmark i: strong agent ids lead no further.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributions import Categorical

sys.path.insert(0, str(Path(__file__).parents[1]))

import envs
import magpo
from results import references


class Net(nn.Module):
    """Layers of width C on each agent's observation and id: (E, N, D) -> policy (E, N). scale: of the ids."""

    def __init__(self, act, depth, gain, first_gain, scale, dim=128, num_agents=3, obs_dim=18, num_actions=5):
        super().__init__()
        gains = [first_gain] + [gain] * (depth - 1)  # None: PyTorch's own start
        widths = [obs_dim] + [dim] * (depth - 1)
        layers = [
            magpo.linear(w, dim, g) if g else nn.Linear(w, dim) for w, g in zip(widths, gains, strict=True)
        ]
        self.layers = nn.ModuleList(layers)
        self.agent_id, self.act = nn.Parameter(scale * torch.randn(num_agents, dim)), act
        self.head = magpo.linear(dim, num_actions, 0.1)

    def forward(self, x):
        x = self.act(self.layers[0](x) + self.agent_id)
        for layer in self.layers[1:]:
            x = self.act(layer(x))
        return Categorical(logits=self.head(x))


RELU, TANH = partial(Net, torch.relu), partial(Net, torch.tanh)
NETS = {  # network, whether it copies fixed roles
    "2 x ReLU, PyTorch's start, ids of std 0.2": (partial(RELU, 2, None, None, 0.2), False),
    "2 x ReLU, orthogonal start, ids of std 0.2": (partial(RELU, 2, 2**0.5, 2**0.5, 0.2), False),
    "2 x ReLU, first gain 3, ids of std 2": (partial(RELU, 2, None, 3.0, 2.0), False),
    "3 x ReLU, orthogonal start, ids of std 0.2": (partial(RELU, 3, 2**0.5, 2**0.5, 0.2), False),
    "2 x tanh, orthogonal start, ids of std 0.2": (partial(TANH, 2, 5 / 3, 5 / 3, 0.2), False),
    "magpo.py's Learner": (partial(magpo.Learner, 3, 18, 5), False),
    "fixed roles: 2 x ReLU, first gain 3, ids of std 2": (partial(RELU, 2, None, 3.0, 2.0), True),
}


def imitate(net, roles, seed, updates, num_envs=512):
    """Copy the heuristic for so many batches, each a step of E copies; 70 % of them are the heuristic's."""
    env = envs.make("mpe_spread", num_envs)
    obs, _ = env.reset(seed=seed)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, updates)
    for _ in range(updates):
        target = references.cover(env, 3, roles)()
        policy = net(obs)
        loss = -policy.log_prob(target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        obs = env.step(torch.where(torch.rand(num_envs, 1) < 0.7, target, policy.sample()))[0]
    return loss.item()


@torch.no_grad()
def play(net, episodes, seed):
    """Returns (episodes,) of a network's own, sampled play."""
    env = envs.make("mpe_spread", episodes)
    obs, _ = env.reset(seed=seed)
    returns = torch.zeros(episodes)
    for _ in range(env.max_episode_steps):
        obs, rewards, *_ = env.step(net(obs).sample())
        returns += rewards
    return returns


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in dict(seed=1, episodes=4096, updates=2000).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = ["network,cross_entropy,mean,ci95,cpu_seconds,seed\n"]
    for name, (build, roles) in NETS.items():
        torch.manual_seed(args.seed)
        net = build()
        start = time.process_time()
        loss = imitate(net, roles, args.seed, args.updates)
        seconds = time.process_time() - start
        returns = play(net, args.episodes, args.seed + 1)
        mean, ci95 = returns.mean(), 1.96 * (returns.var() / args.episodes).sqrt()
        rows.append(f'"{name}",{loss:.3f},{mean:.2f},{ci95:.2f},{seconds:.0f},{args.seed}\n')
        print(f"| {name} | {loss:.3f} | {mean:.2f} +- {ci95:.2f} | {seconds:.0f} |", flush=True)
    Path(__file__).with_suffix(".csv").write_text("".join(rows))


if __name__ == "__main__":
    main()
