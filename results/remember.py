"""The smallest task that needs memory: `python magpo.py --env pettingzoo:results.remember --recurrent`."""

import numpy as np
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv


class parallel_env(ParallelEnv):
    """Two agents see a number once, at the start. In the fifth step both must name it."""

    metadata = {}
    possible_agents = ["left", "right"]

    def observation_space(self, agent):
        return Box(0, 1, (3,), np.float32)

    def action_space(self, agent):
        return Discrete(3)

    def reset(self, seed=None, options=None):
        self.agents = self.possible_agents
        self.time = 0
        self.number = np.random.default_rng(seed).integers(3)
        number = np.eye(3, dtype=np.float32)[self.number]
        return dict.fromkeys(self.agents, number), {agent: {} for agent in self.agents}

    def step(self, actions):
        self.time += 1
        over = self.time == 5
        paid = float(over and all(action == self.number for action in actions.values()))
        self.agents = [] if over else self.agents
        obs, infos = dict.fromkeys(actions, np.zeros(3, np.float32)), {agent: {} for agent in actions}
        rewards, terminated = dict.fromkeys(actions, paid), dict.fromkeys(actions, over)
        return obs, rewards, terminated, dict.fromkeys(actions, False), infos
