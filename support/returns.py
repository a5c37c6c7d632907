"""What episodes earn: running moments for the critic, the critic's fit, and the returns of fresh episodes."""

import math

import torch
import torch.nn as nn
from tqdm import tqdm

from support.machine import seeded


class ValueNorm(nn.Module):
    """Running mean and deviation of the returns: the critic learns targets of order 1 (Yu et al. 2022)."""

    def __init__(self, decay=0.99):
        super().__init__()
        self.decay = decay
        # Averages of x^0 (corrects the start at 0, as in Adam), x^1 and x^2; float32 is too coarse for these
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))

    def update(self, returns):
        new = torch.stack([(returns.double() ** power).mean() for power in (0, 1, 2)])
        self.moments.lerp_(new, 1 - self.decay)

    def stats(self):
        """Mean and deviation. Both are about 0 before the first update: an untrained critic counts for 0."""
        mean, square = self.moments[1:] / self.moments[0].clamp(min=1e-8)
        least = 1e-12 * square + 1e-30  # relative to the returns, so that the rewards' unit does not matter
        return mean, torch.maximum(square - mean.square(), least).sqrt()

    def normalize(self, returns):
        mean, std = self.stats()
        return (returns - mean) / std

    def denormalize(self, values):
        mean, std = self.stats()
        return values * std + mean


def explained_variance(returns, errors):
    """1 - Var(errors) / Var(returns) -> float: 1 for a critic that knows the returns, 0 for a constant."""
    variance = returns.var(correction=0) + 1e-8 * returns.square().mean() + 1e-30  # for constant returns
    return (1 - errors.var(correction=0) / variance).item()


@torch.no_grad()
def play(envs, act, memory, episodes, seed, title, stop):
    """Team returns (episodes,) of fresh episodes, equally many of every copy, so rounded up.

    act(obs, infos, memory) -> actions, and the hidden states after obs. memory: at an episode's start.
    seed: of environments and sampling; random numbers outside stay as they were. stop: once something is in
    this list, it ends with what was played so far.
    """
    rounds = math.ceil(episodes / envs.num_envs)
    played, total = torch.zeros(2, envs.num_envs, device=envs.device)  # episodes so far, the present return
    returns = [total[:0]]  # none so far
    with seeded(seed, envs.device):
        obs, infos = envs.reset(seed=seed)
        for _ in tqdm(range(rounds * (envs.max_episode_steps + 1)), title, leave=False, delay=3):
            if stop:
                break
            actions, hidden = act(obs, infos, memory)
            obs, rewards, terminations, truncations, infos = envs.step(actions)
            over = terminations | truncations
            memory = hidden, over
            total = total + rewards
            returns.append(total[over & (played < rounds)])
            total, played = total * ~over, played + over
            if (played >= rounds).all():
                break
    return torch.cat(returns)
