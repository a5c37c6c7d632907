"""The paper's suites behind the contract: their rules, worked out again in numpy from the packages' state."""

import io
import subprocess
import sys

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


def play(env, steps, seed=1, edit=lambda states: states):
    """Play at random -> one dict a step; "before" and "after" are the states around it, without a restart."""
    dice, episode, history = torch.Generator().manual_seed(seed), np.zeros(E, int), []
    obs, infos = env.reset(seed=seed)
    env._copies = (edit(env._copies[0]), env._copies[1])
    advance, after = env._advance, []
    env._advance = lambda *args: after.append(advance(*args)) or after[-1]
    for _ in range(steps):
        before, actions, mask = (
            arrays(env._copies[0]),
            random_actions(infos, dice),
            infos["action_mask"].numpy().copy(),
        )
        obs, rewards, terminated, truncated, infos = env.step(actions)
        episode += 1
        states, views = after[-1][1]
        history.append(
            dict(before=before, after=arrays(states), actions=actions.numpy(), mask=mask, obs=obs.numpy())
            | dict(
                final_obs=infos["final_obs"].numpy(), final_mask=np.array(views["action_mask"]), infos=infos
            )
            | dict(rewards=rewards.numpy(), terminated=terminated.numpy(), truncated=truncated.numpy())
            | dict(length=episode.copy())
        )
        episode[(terminated | truncated).numpy()] = 0
    return history


def connector_rules(step, e):
    """-> obs (N, 54), action mask (N, 5), team reward, is the game over, of copy e."""
    grid, agents = step["after"].grid[e], step["after"].agents
    size = len(grid)
    obs, masks, reward, free = [], [], 0, []
    for i, (row, column) in enumerate(agents.position[e]):
        target = tuple(agents.target[e, i])
        was = tuple(step["before"].agents.position[e, i]) == target
        now = (row, column) == target
        reward += (now and not was) - 0.03 * (not was)
        heads, targets = np.ones((2, 5, 5))
        for y in range(5):
            for x in range(5):
                cell = (row + y - 2, column + x - 2)
                if min(cell) >= 0 and max(cell) < size:
                    what, whose = (grid[cell] - 1) % 3, (grid[cell] - 1) // 3
                    heads[y, x] = 0 if grid[cell] == 0 else {0: -1, 1: 1, 2: 0}[what]
                    targets[y, x] = 0 if grid[cell] == 0 or what < 2 else 1 if whose == i else -1
        place = np.array([row, column, *((0, 0) if now else target)]) / size**2
        obs.append(np.concatenate([place, heads.ravel(), targets.ravel()]))
        cells = [(row - 1, column), (row, column + 1), (row + 1, column), (row, column - 1)]
        inside = [0 <= y < size and 0 <= x < size for y, x in cells]
        masks.append(
            [True]
            + [ok and not now and grid[c] in (0, 3 * i + 3) for ok, c in zip(inside, cells, strict=True)]
        )
        free.append(not now and any(masks[-1][1:]))
    return obs, masks, reward, not any(free)


def lbf_rules(step, e):
    agents, food = step["after"].agents, step["after"].food_items
    position, level, uneaten = agents.position[e], agents.level[e], ~step["before"].food_items.eaten[e]
    loading = step["actions"][e] == 5
    near = np.abs(food.position[e][:, None] - position).sum(-1) == 1  # (food, N)
    eaten = uneaten & ((near & loading) @ level >= food.level[e]) & (near & loading).any(1)
    left = uneaten & ~eaten
    obs, masks = [], []
    for i, here in enumerate(position):

        def seen(what, levels, shown, here=here):
            offset = what - here
            shown = shown & (np.abs(offset).max(1) <= 2)
            rows = np.column_stack(
                [offset + np.minimum(here, 2), levels]
            )  # in the window, which the grid's edge cuts
            return np.where(shown[:, None], rows, (-1, -1, 0))

        all_agents = seen(position, level, np.full(len(position), True))
        order = [i] + [j for j in range(len(position)) if j != i]
        obs.append(np.concatenate([seen(food.position[e], food.level[e], left), all_agents[order]]).ravel())
        taken = {tuple(p) for p in (*food.position[e][left], *position)}
        cells = [tuple(here + move) for move in ((-1, 0), (1, 0), (0, -1), (0, 1))]
        masks.append([True] + [min(c) >= 0 and max(c) < 8 and c not in taken for c in cells])
        masks[-1].append((near[:, i] & left).any())
    return obs, masks, (eaten * food.level[e]).sum() / food.level[e].sum(), not left.any()


def rware_rules(step, e):
    """Observations and masks are the package's own. A shelf that is asked for earns 1 in a goal's cell."""
    before, after = step["before"], step["after"]
    goals = after.grid[e, 0, -1, 4:6]  # shelves' numbers from 1, in the two middle cells of the last row
    reward = np.isin(goals, before.request_queue[e] + 1).sum()
    spots = {(x, y) for x, y in zip(after.agents.position.x[e], after.agents.position.y[e], strict=True)}
    return None, None, reward, len(spots) < 2


def smax_rules(step, e):
    before, after = step["before"].state, step["after"].state
    alive, enemies = after.unit_alive[e], after.unit_alive[e, 5:]
    most = np.array([45, 125, 160, 150, 35, 80])[after.unit_types[e]]  # health by type
    damage = ((before.unit_health[e] - after.unit_health[e]) / most)[5:].sum() / 5
    won = alive[:5].any() and not enemies.any()
    obs = np.where(alive[:5, None], step["final_obs"][e], 0)  # the dead see nothing
    distance = np.linalg.norm(after.unit_positions[e][:5, None] - after.unit_positions[e][None, 5:], axis=-1)
    reach = np.array([5, 6, 6, 2, 2, 5])[after.unit_types[e, :5], None]
    may_attack = (distance < reach) & enemies & alive[:5, None]
    masks = np.column_stack([*[alive[:5]] * 4, np.full(5, True), may_attack])
    units = [after.unit_health[e] / most, *after.unit_positions[e].T, after.unit_weapon_cooldowns[e]]
    units = np.column_stack([*units, np.eye(6)[after.unit_types[e]]]) * alive[:, None]
    state = np.concatenate([units.ravel(), np.arange(10) >= 5, after.unit_types[e]])
    np.testing.assert_allclose(step["infos"]["final_state"][e], state, atol=1e-5)
    return obs, masks, damage + won, not (alive[:5].any() and enemies.any())


RULES = {"connector": connector_rules, "lbf": lbf_rules, "rware": rware_rules, "smax": smax_rules}


@EACH
def test_rules(env_id, options, longest, steps):
    """Rewards, observations, masks and both kinds of ends, in every copy and step."""
    suite = env_id.partition(":")[0]
    env = envs.make(env_id, E, state=suite == "smax", **options)
    assert env.max_episode_steps == longest

    def ease(states):  # in half of the copies, or random play would never win
        states, half = arrays(states), E // 2
        if suite == "smax":
            states.state.unit_health[:half, 5:] = 1
        if suite == "lbf":  # one food is left, and one agent can load it
            states.food_items.level[:half] = 1
            states.food_items.eaten[:half, 0] = True
        return jax.tree.map(jax.numpy.array, states)

    history = play(env, steps, edit=ease)
    for step in history:
        assert (step["mask"] == np.array(step["mask"], bool)).all() and step["mask"].any(-1).all()
        over = step["terminated"] | step["truncated"]
        differs = (step["obs"] != step["final_obs"]).any((1, 2))
        np.testing.assert_array_equal(differs, over)
        for e in range(E):
            obs, masks, reward, is_over = RULES[suite](step, e)
            assert step["rewards"][e] == pytest.approx(reward, abs=1e-5)
            assert step["terminated"][e] == (
                is_over and not (suite == "rware" and step["length"][e] == longest)
            )
            assert step["truncated"][e] == (step["length"][e] == longest and not step["terminated"][e])
            if obs is not None:
                np.testing.assert_allclose(step["final_obs"][e], np.array(obs), atol=1e-6)
                np.testing.assert_array_equal(step["final_mask"][e], np.array(masks))
    total = {key: sum(step[key].sum() for step in history) for key in ("terminated", "truncated")}
    assert min(total.values()) > 0 and (
        suite == "rware" or max(step["rewards"].max() for step in history) > 0
    )


@EACH
def test_seeds_and_resume(env_id, options, longest, steps):
    """A seed repeats, its neighbour shares nothing with it; what resumes in mid-episode goes on the same."""

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
    assert not any(torch.equal(one, other) for one in first[0] for other in env.reset(seed=2)[0])


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
