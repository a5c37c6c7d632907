"""The reference scores in envs.py, played again: `python figures/references.py` prints them and writes references.csv.

A score is a known policy's mean team return over seeded episodes with its 95 % confidence interval; matrix games are exact,
their episodes being the joint actions. Shapes: E episodes (copies of the environment), N agents, A actions, L = N landmarks.
"""

import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

import envs


def play(env, policy, seed):
    """One episode in every copy -> returns (E,). policy(env), called once it began, gives act() -> actions (E, N)."""
    env.reset(seed=seed)
    act = policy(env)
    return sum(env.step(act())[1].double() for _ in range(env.episode_length))


def uniform(env):
    """Every action equally likely, for all agents independently. A seed of its own: env's would tie actions to targets."""
    dice = torch.Generator().manual_seed(env.generator.initial_seed() + 1)
    if env.continuous:
        return lambda: torch.rand(env.action_space.shape, generator=dice)
    return lambda: torch.randint(int(env.single_action_space.nvec[0]), env.action_space.shape, generator=dice)


def add_up(env, memory=True):
    """CoordSum's best play: agent 0 names the largest action that can lead to the target, the others add what is missing.

    With memory, the smallest when the largest is its habit: a hit pays 2, save on targets 0 and N (A - 1), which only one
    joint action hits (a miss on purpose costs what it gains). Without, independent agents do best with one joint action
    per target: 2 at first, when the habit is 0, then 1 (a central player who draws agent 0's action at random gets more).
    """
    N, top, copies = env.action_space.shape[1], env.num_actions - 1, torch.arange(env.num_envs)

    def act():
        first = env.target.clamp(max=top)  # (E,), agent 0's
        if memory:
            smallest = (env.target - (N - 1) * top).clamp(0, top)  # at most top: some targets are out of reach
            first = torch.where(first == env.record[copies, env.target].argmax(-1), smallest, first)
        missing = (env.target - first).unsqueeze(1) - top * torch.arange(N - 1)  # each of the others adds all it can
        return torch.cat([first.unsqueeze(1), missing.clamp(0, top)], 1)

    return act


def assign(distance):
    """Landmark of each agent (E, N) with the least sum of distances (E, N, L), by Held and Karp's recursion (1962).

    cost[s] (E,) is the least sum with which the first |s| agents take the landmarks in s, a set written as an integer's
    bits: exact, with 1,024 sets for N = 10 instead of 3,628,800 permutations.
    """
    E, N, L = distance.shape
    cost, last = [torch.zeros(E)], torch.zeros(2**L, E, dtype=torch.long)  # last[s]: which of s agent |s| - 1 takes
    for s in range(1, 2**L):
        inside = [landmark for landmark in range(L) if s >> landmark & 1]
        sums = torch.stack([cost[s - 2**landmark] + distance[:, len(inside) - 1, landmark] for landmark in inside])
        cost.append(sums.amin(0))  # of (|s|, E)
        last[s] = torch.tensor(inside)[sums.argmin(0)]
    s, taken = torch.full((E,), 2**L - 1), []
    for _ in range(N):  # back from the full set, the last agent first
        taken.insert(0, last[s, torch.arange(E)])
        s = s - 2 ** taken[0]
    return torch.stack(taken, 1)


def cover(env, lookahead=4, roles=False):
    """SimpleSpread's heuristic: share out the landmarks once, at the start, then go there and mind no collision.

    An agent takes the action after which it will be nearest to its landmark `lookahead` steps on if it then coasts.
    roles: agent i takes landmark i instead of the nearest on the whole.
    """
    distance = torch.linalg.vector_norm(env.position.unsqueeze(2) - env.landmarks.unsqueeze(1), dim=-1)  # (E, N, L)
    mine = torch.arange(distance.shape[1]).expand(distance.shape[:2]) if roles else assign(distance)
    goal = env.landmarks.gather(1, mine.unsqueeze(-1).expand(-1, -1, 2)).unsqueeze(2)  # (E, N, 1, 2)

    def act():
        position, velocity, thrust = env.position.unsqueeze(2), env.velocity.unsqueeze(2), env._thrust  # _thrust: (A, 2)
        for _ in range(lookahead):
            position = position + velocity * env.TIME_STEP
            velocity = velocity * (1 - env.DAMPING) + env.SENSITIVITY * thrust * env.TIME_STEP
            thrust = 0.0  # it coasts; looking that far ahead makes it brake in time
        return torch.linalg.vector_norm(position - goal, dim=-1).argmin(-1)  # (E, N, A) -> (E, N)

    return act


def main(seed: int = 1, spread_episodes: int = 4096, coordsum_episodes: int = 2000):
    """Play every policy of every environment with `references`; print a table and write figures/references.csv."""
    torch.set_num_threads(1)
    policies = {"random": uniform, "heuristic": cover, "best with memory": add_up}
    policies["best without memory"] = lambda env: add_up(env, memory=False)
    rows = ["env,policy,mean,ci95,episodes,seed\n"]
    print("env              policy                   mean   ci95  envs.py difference")
    for env_id in envs.ENVS:
        env = envs.make(env_id, spread_episodes if "spread" in env_id else coordsum_episodes)
        for policy, constant in env.references.items():
            exact = isinstance(env, envs.MatrixGame)
            returns = env.payoff.double().flatten() if exact else play(env, policies[policy], seed)
            mean = (returns.max() if policy == "best" else returns.mean()).item()
            ci95 = 0.0 if exact else 1.96 * (returns.var() / len(returns)).sqrt().item()
            rows.append(f"{env_id},{policy},{mean:.6g},{ci95:.3g},{len(returns)},{seed}\n")
            print(f"{env_id:16s} {policy:20s} {mean:8.3f} {ci95:6.3f} {constant:8.2f} {mean - constant:+10.3f}", flush=True)
    Path(__file__).with_suffix(".csv").write_text("".join(rows))


if __name__ == "__main__":
    tyro.cli(main)
