"""The paper's suites behind the contract: their rules, worked out again in numpy from the packages' state."""

import csv
import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import envs

pytest.importorskip("jax", reason="JAX is missing: pip install -r requirements-jax.txt")
pytest.importorskip("jumanji", reason="Jumanji is missing: pip install -r requirements-jax.txt")

import jax  # noqa: E402

from adapters.jax_envs import COMPILED, TASKS  # noqa: E402

# A short time limit, so that both kinds of ends come up in few steps: (id, options, longest episode, steps)
SMALLEST = [
    ("connector:con-5x5x3a", {"time_limit": 8}, 8, 40),
    ("lbf:2s-8x8-2p-2f-coop", {"time_limit": 60}, 60, 200),
    ("rware:tiny-2ag", {"time_limit": 60}, 60, 200),
    ("smax:2s3z", {"max_steps": 20}, 21, 70),
]
EACH = pytest.mark.parametrize(
    "env_id, options, longest, steps",
    [pytest.param(*case, marks=[pytest.mark.slow] if i else []) for i, case in enumerate(SMALLEST)],
)
E = 16


def random_actions(infos, dice):
    """Allowed actions (E, N); the last one, which loads in LBF and attacks in SMAX, is preferred."""
    weights = infos["action_mask"].float()
    weights[..., -1] *= 4
    return torch.multinomial(weights.flatten(0, 1), 1, generator=dice).view(weights.shape[:2])


def arrays(tree):
    return jax.tree.map(np.array, tree)


# For each suite: (states before, actions, states after, copy) -> obs (N, D), mask (N, A), team reward, end
def connector_rules(before, actions, after, e):
    grid, agents, size = after.grid[e], after.agents, len(after.grid[e])
    obs, masks, reward = [], [], 0
    for i, (row, column) in enumerate(agents.position[e]):
        target = tuple(agents.target[e, i])
        was, now = (tuple(states.agents.position[e, i]) == target for states in (before, after))
        reward += (now and not was) - 0.03 * (not was)
        heads, targets = np.ones((2, 5, 5))
        for y, x in np.ndindex(5, 5):
            cell = (row + y - 2, column + x - 2)
            if min(cell) >= 0 and max(cell) < size:
                whose, what = divmod(grid[cell] - 1, 3) if grid[cell] else (None, None)
                heads[y, x] = {0: -1, 1: 1}.get(what, 0)
                targets[y, x] = (1 if whose == i else -1) if what == 2 else 0
        place = np.array([row, column, *((0, 0) if now else target)]) / size**2
        obs.append(np.concatenate([place, heads.ravel(), targets.ravel()]))
        cells = [(row - 1, column), (row, column + 1), (row + 1, column), (row, column - 1)]
        inside = [min(cell) >= 0 and max(cell) < size for cell in cells]
        free = [
            ok and not now and grid[cell] in (0, 3 * i + 3) for ok, cell in zip(inside, cells, strict=True)
        ]
        masks.append([True, *free])
    return obs, masks, reward, not np.any(np.array(masks)[:, 1:])


def lbf_rules(before, actions, after, e):
    position, level = after.agents.position[e], after.agents.level[e]
    place, food = after.food_items.position[e], after.food_items.level[e]
    near = np.abs(place[:, None] - position).sum(-1) == 1  # (food, N)
    uneaten = ~before.food_items.eaten[e]
    loading = near & (actions[e] == 5)
    eaten = uneaten & (loading @ level >= food) & loading.any(1)
    left = uneaten & ~eaten
    if e >= E // 2:  # not made easy: -coop means that it takes both
        assert (food == level.sum()).all()

    def seen(here, what, levels, there):  # from the corner of a window of sight 2, which the grid's edge cuts
        rows = np.column_stack([what - here + np.minimum(here, 2), levels])
        return np.where((there & (np.abs(what - here).max(1) <= 2))[:, None], rows, (-1, -1, 0))

    obs, masks = [], []
    for i, here in enumerate(position):
        team = seen(here, position, level, True)[[i, 1 - i]]
        obs.append(np.concatenate([seen(here, place, food, left), team]).ravel())
        taken = {tuple(cell) for cell in (*place[left], *position)}
        cells = [tuple(here + move) for move in ((-1, 0), (1, 0), (0, -1), (0, 1))]
        free = [min(cell) >= 0 and max(cell) < 8 and cell not in taken for cell in cells]
        masks.append([True, *free, (near[:, i] & left).any()])
    return obs, masks, (eaten * food).sum() / food.sum(), not left.any()


def rware_rules(before, actions, after, e):
    goals = after.grid[e, 0, -1, 4:6]  # shelves' numbers from 1, in the two middle cells of the last row
    place = after.agents.position
    crash = len(set(zip(place.x[e], place.y[e], strict=True))) < 2
    reward = np.isin(goals, before.request_queue[e] + 1).sum()
    return np.full((2, 66), np.nan), after.action_mask[e], reward, crash


def smax_rules(before, actions, after, e):
    before, after = before.state, after.state
    kind, health, place = after.unit_types[e], after.unit_health[e], after.unit_positions[e]
    alive, enemies = after.unit_alive[e, :5], after.unit_alive[e, 5:]
    most = np.array([45, 125, 160, 150, 35, 80])[kind]
    damage = ((before.unit_health[e] - health) / most)[5:].sum() / 5
    won = alive.any() and not enemies.any()
    pause = np.clip(
        after.unit_weapon_cooldowns[e] / np.array([0.61, 1.07, 1.87, 0.86, 0.5, 0.59])[kind], 0, 1
    )
    own = np.column_stack([health / most, place / 32, pause, np.eye(6)[kind]])[:5]
    obs = np.column_stack([np.full((5, 117), np.nan), own])  # what it sees of others is the package's own,
    obs = np.where(alive[:, None], obs, 0)  # but the dead see nothing
    distance = np.linalg.norm(place[:5, None] - place[5:], axis=-1)
    attack = (distance < np.array([5, 6, 6, 2, 2, 5])[kind[:5], None]) & enemies & alive[:, None]
    masks = np.column_stack([*[alive] * 4, np.full(5, True), attack])
    return obs, masks, damage + won, not (alive.any() and enemies.any())


def smax_state(states, e):
    after = states.state
    kind = after.unit_types[e]
    health = after.unit_health[e] / np.array([45, 125, 160, 150, 35, 80])[kind]
    units = np.column_stack(
        [health, after.unit_positions[e], after.unit_weapon_cooldowns[e], np.eye(6)[kind]]
    )
    return np.concatenate([(units * after.unit_alive[e][:, None]).ravel(), np.arange(10) >= 5, kind])


RULES = {"connector": connector_rules, "lbf": lbf_rules, "rware": rware_rules, "smax": smax_rules}


def ease(states):
    """Half of the copies are made easy, or random play would never win."""
    states = arrays(states)
    if hasattr(states, "state"):  # SMAX: the enemies are nearly dead
        states.state.unit_health[: E // 2, 5:] = 1
    if hasattr(states, "food_items"):  # one food is left, and one agent can load it
        states.food_items.level[: E // 2] = 1
        states.food_items.eaten[: E // 2, 0] = True
    return jax.tree.map(jax.numpy.array, states)


@EACH
def test_rules(env_id, options, longest, steps):
    """Rewards, observations, masks and both kinds of ends, in every copy and step."""
    suite = env_id.partition(":")[0]
    env, dice = envs.make(env_id, E, state=suite == "smax", **options), torch.Generator().manual_seed(1)
    assert env.max_episode_steps == longest
    _, infos = env.reset(seed=1)
    env._copies = (ease(env._copies[0]), env._copies[1])
    advance, advanced = env._advance, []  # this shows the states before a restart
    env._advance = lambda *args: advanced.append(advance(*args)) or advanced[-1]
    length, ends, best = np.zeros(E, int), np.zeros(2, int), 0

    for _ in range(steps):
        before, actions = arrays(env._copies[0]), random_actions(infos, dice)
        obs, rewards, terminated, truncated, infos = env.step(actions)
        after, now = arrays(advanced[-1][1][0]), arrays(env._copies[0])
        length += 1
        over = (terminated | truncated).numpy()
        np.testing.assert_array_equal((obs != infos["final_obs"]).any(2).any(1), over)
        for e in range(E):
            last, _, reward, is_over = RULES[suite](before, actions.numpy(), after, e)
            new, masks, *_ = RULES[suite](now, 0 * actions.numpy(), now, e)
            for seen, expected in ((infos["final_obs"][e], last), (obs[e], new)):
                expected = np.array(expected)
                np.testing.assert_allclose(np.where(np.isnan(expected), expected, seen), expected, atol=1e-5)
            np.testing.assert_array_equal(infos["action_mask"][e], masks)
            for key, states in (("state", now), ("final_state", after)) if env.state_dim else ():
                np.testing.assert_allclose(infos[key][e], smax_state(states, e), atol=1e-5)
            assert rewards[e].item() == pytest.approx(reward, abs=1e-5)
            in_time = (
                length[e] < longest or suite != "rware"
            )  # a crash in the last step of all counts as its end
            assert (terminated[e], truncated[e]) == (
                is_over and in_time,
                length[e] == longest and not terminated[e],
            )
        length[over] = 0
        ends += [terminated.sum(), truncated.sum()]
        best = max(best, rewards.max())
    assert ends.min() > 0 and (best > 0 or suite == "rware")


@EACH
def test_seeds_and_resume(env_id, options, longest, steps):
    """A seed repeats, copies and neighbours differ; what resumes in mid-episode goes on the same."""

    def go_on(env, obs, infos, steps):
        dice, seen = torch.Generator().manual_seed(2), [obs.clone()]
        for _ in range(steps):
            obs, rewards, *_, infos = env.step(random_actions(infos, dice))
            seen += [obs.clone(), rewards.clone(), infos["final_obs"].clone()]
        return seen, obs, infos

    def same(some, others):
        return all(torch.equal(x, y) for x, y in zip(some, others, strict=True))

    env, again = envs.make(env_id, E, **options), envs.make(env_id, E, **options)
    first, obs, infos = go_on(env, *env.reset(seed=1), 5)
    file = io.BytesIO()
    torch.save(env.state_dict(), file)
    file.seek(0)
    uninterrupted = go_on(env, obs, infos, 2 * longest)[0]
    assert same(
        uninterrupted, go_on(again, *again.reset(options=torch.load(file, weights_only=True)), 2 * longest)[0]
    )
    assert not same(first, go_on(env, *env.reset(), 5)[0])  # without a seed the random numbers go on
    assert same(first, go_on(env, *env.reset(seed=1), 5)[0])
    starts = torch.cat([first[0], env.reset(seed=2)[0]])
    assert len(starts.unique(dim=0)) == 2 * E


@pytest.mark.slow
def test_rware_delivers():
    """A carrier steps into a goal's cell: 1 if its shelf was asked for; the queue then asks for another."""
    env = envs.make("rware:tiny-2ag", E, time_limit=60)
    env.reset(seed=3)
    state = arrays(env._copies[0])
    asked = np.arange(E) % 2 == 0
    for e in range(E):
        ids = range(state.shelves.is_requested.shape[1])
        shelf = next(i for i in ids if (i in state.request_queue[e]) == asked[e])
        bottom = state.grid.shape[2] - 1
        for layer, entity, i in ((0, state.shelves, shelf), (1, state.agents, 0)):
            state.grid[e, layer, entity.position.x[e, i], entity.position.y[e, i]] = 0
            state.grid[e, layer, bottom - 1, 4] = i + 1
            entity.position.x[e, i], entity.position.y[e, i] = bottom - 1, 4
        state.agents.direction[e, 0], state.agents.is_carrying[e, 0] = 2, 1  # down
        state.action_mask[e] = True
    env._copies = (jax.tree.map(jax.numpy.array, state), env._copies[1])
    actions = torch.zeros(E, 2, dtype=torch.int64)
    actions[:, 0] = 1  # forward
    np.testing.assert_array_equal(env.step(actions)[1].numpy(), asked)
    queue = np.array(env._copies[0].request_queue)
    np.testing.assert_array_equal((queue != state.request_queue).any(1), asked)


# fmt: off
SHAPES = {  # N, D, A and longest episode
    "lbf": [(n, d, 6, 100) for n, d in ((2, 12), (2, 12), (3, 18), (3, 18), (3, 24), (4, 21), (4, 27))],
    "rware": [(n, 66, 5, 500) for n in (2, 2, 4, 4, 4, 4, 4, 4, 6, 4, 4, 8, 8, 4, 4)],
    "connector": [(3, 54, 5, 25), (5, 54, 5, 49), (10, 54, 5, 100), (23, 54, 5, 225)],
    "smax": [(5, 127, 10, 101), (8, 205, 13, 101), (5, 140, 11, 101), (10, 270, 16, 101), (27, 738, 35, 101),
             (8, 218, 14, 101), (3, 101, 10, 101), (6, 179, 13, 101), (5, 127, 10, 101), (10, 257, 15, 101)],
}
# fmt: on


@pytest.mark.slow
@pytest.mark.parametrize("suite", TASKS)
def test_every_task(suite):
    """All 36 can be made, with the shapes and lengths of the official code and with scores to compare."""
    for task, shape in zip(TASKS[suite], SHAPES[suite], strict=True):
        env = envs.make(f"{suite}:{task}", 1)
        num_agents, num_features = env.single_observation_space.shape
        assert (num_agents, num_features, env.single_action_space.nvec[0], env.max_episode_steps) == shape
        if suite == "rware":
            assert env._blank[0].request_queue.shape[1] == num_agents // (2 if "hard" in task else 1)
        assert len(env.references) == 3 and env.win_return == (1.5 if suite == "smax" else None)


@pytest.mark.parametrize(
    "env_id, options, sentence",
    [
        ("lbf:8x8", {}, "lbf: has no task '8x8'; choose one of 8x8-2p-2f-coop, 2s-8x8-2p-2f-coop, "),
        ("rware:tiny-4ag", {"state": True}, "no state beyond its observations"),
        ("rware:tiny-4ag", {"num_workers": 2}, "leave num_workers at 0"),
        (
            "connector:con-5x5x3a",
            {"time_limt": 9},
            "con-5x5x3a cannot be made with the options {'time_limt': 9}",
        ),
        ("connector:con-5x5x3a", {"time_limit": "x"}, "con-5x5x3a cannot be made with the options"),
        pytest.param("smax:2s3z", {"action_type": "continuous"}, "only discrete", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_made(env_id, options, sentence):
    with pytest.raises(ValueError) as caught:
        envs.make(env_id, 2, **options)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["jax", "jumanji.environments"])
def test_missing_packages(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "jax":
        monkeypatch.delitem(sys.modules, "adapters.jax_envs")
    with pytest.raises(ValueError, match=r"pip install -r requirements-jax.txt"):
        envs.make("lbf:2s-8x8-2p-2f-coop", 3)


@pytest.mark.slow
def test_output_and_imports_stay_the_callers():
    """Importing JaxMARL prints, and would swap sys.stdout; and nobody else pays for JAX."""
    code = """if True:
        import io, sys, envs
        envs.make("coordsum_3x10", 1)
        assert not any(name.split(".")[0] in ("jax", "jumanji", "jaxmarl") for name in sys.modules)
        streams = sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        envs.make("smax:2s3z", 2).reset(seed=1)
        assert (sys.stdout, sys.stderr) == streams and not any(stream.getvalue() for stream in streams)
    """
    ran = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


SMALL = "--num-envs 8 --num-steps 5 --num-minibatches 2 --eval-episodes 8 --hidden-dim 16"
MAGPO, CONNECTOR = str(Path(__file__).parents[1] / "magpo.py"), "connector:con-5x5x3a"
# magpo.py that gets Ctrl-C's signal at the end of iteration 3
STOPPED = """if True:
    import os, runpy, signal, sys
    sys.path.insert(0, os.path.dirname(sys.argv[1]))
    sys.argv = sys.argv[1:]
    from run import Run
    log = Run.log
    def log_and_stop(self, iteration, row):
        log(self, iteration, row)
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGINT)
    Run.log = log_and_stop
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def shell(folder, *words):
    """Run Python in a folder; the last of the words is a command line of its own."""
    words = [sys.executable, *words[:-1], *words[-1].split()]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_connector_stopped_and_resumed_is_the_uninterrupted_run(tmp_path):
    """By the command line, in three processes: all metrics but the clocks, and the networks, bit for bit."""
    line = f"--env {CONNECTOR} --total-timesteps 280 --eval-every 2 {SMALL}"
    whole = shell(tmp_path, MAGPO, f"{line} --runs-dir whole")
    part = shell(tmp_path, "-c", STOPPED, MAGPO, f"{line} --runs-dir part")
    assert whole.returncode == 0 and part.returncode == 128 + signal.SIGINT, whole.stderr + part.stderr
    (resume,) = re.findall(
        r"3 of 7 iterations are done.*To go on: python magpo.py (--resume .*)", part.stdout
    )
    assert shell(tmp_path, MAGPO, resume).returncode == 0
    metrics, networks = [], []
    for folder in ("whole", "part"):
        (path,) = tmp_path.glob(f"{folder}/*")
        with open(path / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        metrics.append([{key: x for key, x in row.items() if "seconds" not in key} for row in rows])
        checkpoint = torch.load(path / "checkpoint.pt", weights_only=True)
        networks.append([*checkpoint["guider"].items(), *checkpoint["learner"].items()])
    assert metrics[0] == metrics[1] and len(metrics[0]) == 7
    for (name, ours), (same, theirs) in zip(*networks, strict=True):
        assert name == same and torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["lbf:8x8-2p-2f-coop", "rware:tiny-2ag", CONNECTOR, "smax:2s3z"])
def test_training_gives_no_warning(env_id, tmp_path):
    """-W error: Python's warnings end the run, whoever gives them. Others would stand on stderr."""
    ran = shell(tmp_path, "-W", "error", MAGPO, f"--env {env_id} --total-timesteps 80 {SMALL}")
    assert ran.returncode == 0 and "learner_greedy" in ran.stdout, ran.stderr
    assert not re.search("warning|error|deprecated", ran.stderr, re.IGNORECASE), ran.stderr


def random_returns(env_id, seed, num_envs=128, rounds=4):
    """Returns (512,) of random allowed actions; every copy plays equally many episodes."""
    env, dice = envs.make(env_id, num_envs), torch.Generator().manual_seed(seed)
    played, returns = torch.zeros(num_envs, dtype=torch.long), torch.zeros(rounds + 1, num_envs)
    _, infos = env.reset(seed=seed)
    while (played < rounds).any():
        weights = infos["action_mask"].float()
        actions = torch.multinomial(weights.flatten(0, 1), 1, generator=dice).view(weights.shape[:2])
        _, rewards, terminated, truncated, infos = env.step(actions)
        returns[played.clamp(max=rounds), torch.arange(num_envs)] += rewards
        played += terminated | truncated
    return returns[:rounds].flatten()


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["lbf:10x10-3p-3f", "connector:con-5x5x3a"])
def test_random_reference(env_id):
    returns = random_returns(env_id, seed=2)
    error = returns.std().item() / len(returns) ** 0.5
    assert returns.mean().item() == pytest.approx(envs.make(env_id, 128).references["random"], abs=4 * error)


if __name__ == "__main__":  # prints the random scores in adapters/jax_envs.py, with 95 % confidence intervals
    for env_id in sys.argv[1:] or [f"{suite}:{task}" for suite in TASKS for task in TASKS[suite]]:
        returns = random_returns(env_id, seed=1)
        print(
            f"{env_id:24} {returns.mean():7.3f} +- {1.96 * returns.std() / len(returns) ** 0.5:.3f}",
            flush=True,
        )
        COMPILED.clear()  # or all the compiled code would stay in memory
