"""The reference scores in envs.py, played again: `python results/references.py` writes references.csv.

A score is a known policy's mean return over seeded episodes, with a 95 % confidence interval. Matrix games
are exact: their episodes are the joint actions. E episodes (copies of the environment), N agents, A actions,
M targets, L = N landmarks.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import envs


def play(env, policy, seed):
    """One episode in every copy -> returns (E,). policy(env), called at its start, gives act()."""
    env.reset(seed=seed)
    act = policy(env)
    returns = torch.zeros(env.num_envs, dtype=torch.float64)
    for _ in range(env.max_episode_steps):
        returns += env.step(act())[1]
    return returns


def uniform(env):
    """Every action equally likely, for all agents independently."""
    # With the environment's own seed, actions would follow the targets
    dice = torch.Generator().manual_seed(env.generator.initial_seed() + 1)
    if env.continuous:
        return lambda: torch.rand(env.action_space.shape, generator=dice)
    num_actions = int(env.single_action_space.nvec[0])
    return lambda: torch.randint(num_actions, env.action_space.shape, generator=dice)


def bounds(env):
    """Agent 0's smallest and largest action that leads to each target; is the target in reach? Each (M,)."""
    top = env.num_actions - 1
    num_agents = env.single_action_space.shape[0]
    targets = torch.arange(env.num_targets)
    smallest = (targets - (num_agents - 1) * top).clamp(0, top)
    return smallest, targets.clamp(max=top), targets <= num_agents * top


def fill_up(env, first):
    """Agent 0's actions (E,) -> joint (E, N): the others, in turn, add what they can of what is missing."""
    top = env.num_actions - 1
    others = torch.arange(env.single_action_space.shape[0] - 1)
    missing = (env.target - first).unsqueeze(1) - top * others
    return torch.cat([first.unsqueeze(1), missing.clamp(0, top)], 1)


def without_memory(env):
    """CoordSum's best play with one joint action per target: 2 until agent 0's action is its habit, then 1.

    If each target has a record row of its own, agent 0 names the largest action: a habit from its second
    play. Targets that share a row (the official rule) share a habit. It costs least if their actions differ:
    each takes the action that the fewest have, those with the least choice first. Targets out of reach take
    action 0, to keep it the habit. We found no better one, and no proof that there is none. (On 3x10, no
    change of a single action helps.)
    """
    smallest, first, in_reach = bounds(env)
    users = torch.zeros(env.num_actions)
    first[~in_reach] = 0
    shared = torch.arange(env.num_rows - 1, env.num_targets)  # one target, if each has its own row
    for target in shared[in_reach[shared]].flip(0):
        choice = range(smallest[target], first[target] + 1)
        first[target] = min(reversed(choice), key=lambda action: users[action])
        users[first[target]] += 1
    return lambda: fill_up(env, first[env.target])


def with_memory(env):
    """CoordSum's best play: agent 0 names its smallest action that leads to the target and is not its habit.

    So a hit pays 2, save on targets 0 and N (A - 1), which only one joint action hits. Where the target is
    out of reach, it names the habit: if targets share a row (the official rule), A - 1 does not become the
    habit.
    """
    smallest, largest, in_reach = bounds(env)
    copies = torch.arange(env.num_envs)

    def act():
        row = env.target.clamp(max=env.num_rows - 1)
        habit = env.record[copies, row].argmax(-1)
        first = smallest[env.target]
        first = torch.where(first == habit, first + 1, first).minimum(largest[env.target])
        return fill_up(env, torch.where(in_reach[env.target], first, habit))

    return act


def plain_split(env):
    """CoordSum's first idea: agent 0 takes its equal share of the target, rounded down."""
    share = env.single_action_space.shape[0]
    top = env.num_actions - 1
    return lambda: fill_up(env, (env.target // share).clamp(max=top))


def assign(distance):
    """Landmark of each agent (E, N) with the least sum of distances (E, N, L).

    Held and Karp's recursion (1962): cost[s] (E,) is the least sum with which the first |s| agents take the
    landmarks in s, a set written as an integer's bits. It is exact, with 1,024 sets for N = 10 instead of
    3,628,800 permutations.
    """
    E, N, L = distance.shape
    cost, last = [torch.zeros(E)], torch.zeros(2**L, E, dtype=torch.long)  # last[s]: what agent |s| - 1 takes
    for s in range(1, 2**L):
        inside = [landmark for landmark in range(L) if s >> landmark & 1]
        sums = [cost[s - 2**landmark] + distance[:, len(inside) - 1, landmark] for landmark in inside]
        sums = torch.stack(sums)  # (|s|, E)
        cost.append(sums.amin(0))
        last[s] = torch.tensor(inside)[sums.argmin(0)]
    s, taken = torch.full((E,), 2**L - 1), []
    for _ in range(N):  # back from the full set, the last agent first
        taken.insert(0, last[s, torch.arange(E)])
        s = s - 2 ** taken[0]
    return torch.stack(taken, 1)


def cover(env, lookahead=None, roles=False):
    """SimpleSpread's heuristic: share out the landmarks once, at the start, then go there and heed nobody.

    An agent acts so as to be nearest to its landmark `lookahead` steps on, if it coasts after this one.
    Looking so far ahead makes it brake in time: 4 steps, or 3 with continuous thrusts, which are finer.
    roles: agent i takes landmark i instead of the nearest on the whole.
    """
    lookahead = lookahead or (3 if env.continuous else 4)
    offset = env.position.unsqueeze(2) - env.landmarks.unsqueeze(1)
    distance = torch.linalg.vector_norm(offset, dim=-1)  # (E, N, L)
    mine = torch.arange(distance.shape[1]).expand(distance.shape[:2]) if roles else assign(distance)
    goal = env.landmarks.gather(1, mine.unsqueeze(-1).expand(-1, -1, 2))  # (E, N, 2)
    keep = 1 - env.DAMPING
    coast = env.TIME_STEP * sum(keep**k for k in range(lookahead))  # way per velocity
    push = env.TIME_STEP**2 * env.SENSITIVITY * sum(keep**k for k in range(lookahead - 1))  # way per thrust

    def act():
        missing = goal - env.position - coast * env.velocity  # (E, N, 2)
        if not env.continuous:
            left = missing.unsqueeze(2) - push * env._thrust  # (E, N, A, 2)
            return torch.linalg.vector_norm(left, dim=-1).argmin(-1)
        right, up = (missing / push).clamp(-1, 1).unbind(-1)
        thrusts = [torch.zeros_like(up), -right, right, -up, up]  # the environment clips them to [0, 1]
        return torch.stack(thrusts, -1)

    return act


POLICIES = {
    "random": uniform,
    "best without memory": without_memory,
    "best with memory": with_memory,
    "plain split": plain_split,
    "heuristic": cover,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--episodes", type=int, default=4096, help="of every policy in every environment")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = ["env,policy,mean,ci95,episodes,seed\n"]
    print(f"{'env':27s} {'policy':20s} {'mean':>8s} {'ci95':>6s} {'envs.py':>8s} {'difference':>10s}")
    for env_id in envs.ENVS:
        env = envs.make(env_id, args.episodes)
        for policy, constant in env.references.items():
            exact = isinstance(env, envs.MatrixGame)
            returns = env.payoff.double().flatten() if exact else play(env, POLICIES[policy], args.seed)
            mean = (returns.max() if policy == "best" else returns.mean()).item()
            ci95 = 0.0 if exact else 1.96 * (returns.var() / len(returns)).sqrt().item()
            rows.append(f"{env_id},{policy},{mean:.6g},{ci95:.3g},{len(returns)},{args.seed}\n")
            line = (
                f"{env_id:27s} {policy:20s} {mean:8.3f} {ci95:6.3f} {constant:8.2f} {mean - constant:+10.3f}"
            )
            print(line, flush=True)
    Path(__file__).with_suffix(".csv").write_text("".join(rows))


if __name__ == "__main__":
    main()
