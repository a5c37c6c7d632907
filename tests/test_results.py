"""The scripts of results/, at tiny budgets."""

import csv
import functools
import itertools
import math
import re
import shutil
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from mpe2 import simple_spread_v3
from PIL import Image, ImageColor, ImageOps, ImageSequence

import envs
import magpo
from adapters.published import METHODS, ROWS, published
from results import compare, details, draw, experiments, imitation, make, record, speed, watch

ROOT = Path(__file__).parents[1]
TINY = dict(env="mpe_spread", num_envs=4, num_steps=5, num_minibatches=1, eval_episodes=4, hidden_dim=16)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder in place of results/."""
    monkeypatch.setattr(make, "HERE", tmp_path)
    return tmp_path


def main(monkeypatch, module, *words):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    module.main()


# --- compare.py and make.py ---------------------------------------------------------------------------------


def a_run(folder, returns, **options):
    """A run's folder as magpo.train leaves it, with these returns of the learners."""
    folder.mkdir()
    (folder / "args.json").write_text(__import__("json").dumps(options))
    lines = [f"{10 * (i + 1)},{i + 1},{2 * x},{x}" for i, x in enumerate(returns)]
    (folder / "metrics.csv").write_text("\n".join([",".join(compare.COLUMNS), *lines]) + "\n")
    return folder


def test_compare_prints_and_draws(tmp_path, monkeypatch, capsys):
    base = dict(env="matrix_xor", runs_dir="runs")
    specs = [("magpo", 1, 1.0), ("mappo", 1, 0.0), ("magpo", 2, 1.0), ("magpo", 3, 1.0)]
    runs = [
        a_run(tmp_path / f"{i}", (math.nan, 0.0, i), algo=algo, seed=seed, lam=lam, **base)
        for i, (algo, seed, lam) in enumerate(specs)
    ]
    main(monkeypatch, compare, *runs, "--out", tmp_path / "out.png")
    magpo_row, mappo_row = capsys.readouterr().out.splitlines()[2:4]
    # Seeds with 0, 2 and 3; a bootstrap of three values reaches the smallest and the largest in 1 of 27 draws
    assert magpo_row == "| algo magpo | **1.67** [0.00, 3.00] | 0.00, 2.00, 3.00 | 3.33 | 30 | 3 |"
    assert mappo_row == "| algo mappo | **1.00** [1.00, 1.00] | 1.00 |  | 30 | 3 |"
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 1000
    other = a_run(tmp_path / "x", (1.0,), env="matrix_sum10", algo="magpo", seed=1)
    for wrong in ([tmp_path], [runs[0], other]):
        with pytest.raises(SystemExit) as end:
            main(monkeypatch, compare, *wrong)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_sweeps_go_on_where_they_stopped(here, monkeypatch, capsys):
    options = dict(env="matrix_xor", num_envs=64, total_timesteps=2048, eval_episodes=64)
    runs = experiments.grid((1, 2, 3), anneal_lr=False, **options)
    monkeypatch.setattr(make, "EXPERIMENTS", {"tiny": runs})
    make.sweep("tiny", "seed 2")
    make.sweep("tiny", jobs=2)
    rows = make.read("tiny")
    seeds = [row["seed"] for row in rows if row["final"] == 1]
    assert seeds[0] == 2 and sorted(seeds[1:]) == [1, 3]
    assert capsys.readouterr().out.count("cpu-s") == 3
    args, points, final = make.train(**options, seed=1, anneal_lr=False)
    mine = [row["learner_return"] for row in rows if row["seed"] == 1]
    expected = [*(point["learner_return"] for point in points), final["learner"]]
    assert mine == pytest.approx(expected, rel=1e-4)
    shutil.copy(ROOT / "results" / "random.csv", here)
    make.tables("tiny")
    table = capsys.readouterr().out
    flags = "--no-anneal-lr --env matrix_xor --num-envs 64 --total-timesteps 2048 --eval-episodes 64"
    assert f"| `{flags}` | 0.5 | **" in table


@pytest.mark.slow
def test_every_picture_is_drawn(here):
    for path in (ROOT / "results").glob("*.csv"):
        shutil.copy(path, here)
    draw.draw()
    names = {"mpe_spread", "sum10", "delta", "clip"}
    names |= {f"paper_{suite}" for suite in experiments.PAPER if make.read(f"paper_{suite}")}
    assert {path.stem for path in here.glob("*.png")} == names
    # speed.py draws growth; and watch.py draws a run's learners, by a command in RESULTS
    watched = re.findall(r"watch\.py RUN (\w+)\.png", (ROOT / "results" / "RESULTS.md").read_text())
    pictures = {path.stem for path in (ROOT / "results").glob("*.png")}
    assert names | {"growth"} <= pictures <= names | {"growth", *watched}


def test_random_play_is_written_down(here, monkeypatch):
    monkeypatch.setattr(make, "RANDOM", {experiments.REMEMBER: 512})
    make.random_returns()
    (row,) = read(here, "random")
    assert abs(float(row["mean"]) - 1 / 9) < 3 * float(row["ci95"])  # two agents, three numbers


def test_healthy_ranges_hold_nine_of_ten_values(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("\n".join(["x", *map(str, [1000] * 10 + list(range(101)))]))
    make.healthy(tmp_path)
    low, high = map(float, capsys.readouterr().out.split()[1::2])
    assert (low, high) == pytest.approx((5, 95), abs=1)


def test_commands_of_sweeps_are_options():
    for runs in make.EXPERIMENTS.values():
        for options in runs:
            magpo.Args(**options)


def a_curve(returns, seed=1, final=math.nan, won=math.nan, machine="here", **options):
    """Rows of make.py as a run leaves them, an evaluation every 100 steps and 10 CPU-seconds."""
    same = dict(algo="magpo", seed=seed, delta=1.5, lam=2.0, machine=machine, won=math.nan) | options
    same["command"] = make.command(options | dict(seed=seed))
    rows = [
        dict(step=100 * i, cpu_seconds=10 * i, learner_return=x, guider_return=x, final=0) | same
        for i, x in enumerate((*returns, final), 1)
    ]
    rows[-1] |= dict(final=1, won=won)
    return [{name: row[name] for name in make.COLUMNS} for row in rows]


def test_the_papers_runs_are_in_step_when_stopped():
    for suite, (tasks, _) in experiments.PAPER.items():
        runs = make.EXPERIMENTS[f"paper_{suite}"]
        five = len(set(tasks) & set(experiments.SHORT))
        assert runs == experiments.paper(suite) and len(runs) == 3 * (3 * len(tasks) + 2 * five)
        counts = dict.fromkeys(itertools.product(tasks, make.ALGOS), 0)
        for run in runs[: 9 * len(tasks)]:
            counts[run["env"], run["algo"]] += 1
            assert max(counts.values()) - min(counts.values()) <= 1


def test_halfway_is_where_each_run_first_stands_at_half_of_mappos_best(here, monkeypatch, capsys):
    monkeypatch.setitem(make.EXPERIMENTS, "stub", [])
    curves = [
        ("mappo", [0, 3, 6], 6, 1),
        ("mappo", [0, 0, 9], 10, 2),  # MAPPO's mean is 8, half of it 4
        ("ctds", [0, 0, 0], 0, 1),
        ("magpo", [1, 2, 3], 3, 1),
    ]
    for algo, returns, final, seed in curves:
        rows = a_curve(returns, seed, final, env="matrix_xor", algo=algo)
        guider = dict(guider_return=5) if algo == "ctds" else {}
        make.append("stub", [row | dict(step=1000 * row["step"]) | guider for row in rows])
        make.EXPERIMENTS["stub"].append(dict(env="matrix_xor", algo=algo, seed=seed))
    make.halfway("stub")
    cells = [line.split(" | ")[1:] for line in capsys.readouterr().out.splitlines()[3:]]
    assert cells == [
        ["`--env matrix_xor --algo mappo`", "learner", "300, 300 |"],
        ["`--env matrix_xor --algo ctds`", "guider", "100 |"],
        ["`--env matrix_xor --algo magpo`", "learner", "nan |"],
    ]


def test_a_method_is_tuned_apart(monkeypatch):
    task = "lbf:10x10-3p-3f"
    monkeypatch.setattr(experiments, "TUNED", {(task, "mappo"): dict(learning_rate=4e-3)})
    rates = {(run["env"], run["algo"]): run.get("learning_rate") for run in experiments.paper("lbf")}
    assert rates.pop((task, "mappo")) == 4e-3 and len(rates) == 20 and set(rates.values()) == {None}


def test_runs_side_by_side_and_failures(here, monkeypatch, capsys):
    """Two at once: the first two wait for each other. The rows are all of every run that did not fail."""
    runs = experiments.grid((1, 2, 3, 4), env="matrix_xor")
    monkeypatch.setattr(make, "EXPERIMENTS", {"stub": runs})
    meet, inside, most = threading.Barrier(2, timeout=5), [], []

    def apart(options):
        inside.append(options)
        most.append(len(inside))
        if options["seed"] < 3:
            meet.wait()
        inside.remove(options)
        if options["seed"] == 3:
            raise ValueError("not this one")
        return a_curve((0.0, 1.0), final=options["seed"], **options)

    monkeypatch.setattr(make, "apart", apart)
    assert make.sweep("stub", jobs=2) == 1
    assert max(most) == 2 and Counter(row["seed"] for row in make.read("stub")) == {1: 3, 2: 3, 4: 3}
    assert "failed: python magpo.py --env matrix_xor --seed 3\nValueError: not" in capsys.readouterr().out
    monkeypatch.setattr(make, "apart", lambda options: a_curve((0.0,), **options))
    assert make.sweep("stub") == 0 and capsys.readouterr().out.count("cpu-s") == 1  # the one that failed


def test_no_run_starts_when_time_is_up(monkeypatch):
    """Every run takes a minute."""
    clock = [0]
    monkeypatch.setattr(make.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(make, "apart", lambda _: clock.append(clock.pop() + 60))
    assert [options for options, _ in make.side_by_side("abcdef", minutes=2.5)] == ["a", "b", "c"]


def test_ctrl_c_leaves_whole_rows(here, monkeypatch, capsys):
    monkeypatch.setattr(make, "EXPERIMENTS", {"stub": experiments.grid((1, 2, 3), env="matrix_xor")})

    def apart(options):
        if options["seed"] == 2:
            raise KeyboardInterrupt
        return a_curve((0.0,), **options)

    monkeypatch.setattr(make, "apart", apart)
    with pytest.raises(SystemExit) as end:
        main(monkeypatch, make, "sweep", "stub")
    assert "results/stub.csv" in end.value.code and {row["seed"] for row in make.read("stub")} == {1}


def test_a_sweep_does_not_mix_columns(here, monkeypatch):
    monkeypatch.setattr(make, "EXPERIMENTS", {"old": []})
    make.append("old", [dict(step=1, command="x")])
    with pytest.raises(SystemExit, match="delete it"):
        make.sweep("old")


def test_rows_of_a_run_say_who_won_and_where(monkeypatch):
    """In xor the return is 1 for an episode won, else 0."""
    options = dict(env="matrix_xor", num_envs=32, num_steps=4, total_timesteps=128, eval_episodes=64)
    nobody = make.run(options)[-1]
    monkeypatch.setattr(envs.MatrixGame, "win_return", 0.5)
    *curve, last = make.run(options)
    assert nobody["won"] == "nan" and {row["won"] for row in curve} == {"nan"}
    assert last["won"] == last["learner_return"] and last["final"] == "1" and 0 < float(last["won"]) < 1
    assert set(last) == set(make.COLUMNS) and last["machine"] == make.machine()
    assert last["machine"].endswith(f"; torch {torch.__version__}; cpu")


def test_tables_of_the_paper_stand_beside_the_published(here, monkeypatch, capsys):
    (here / "random.csv").write_text("env,mean,ci95\nsmax:2s3z,0.2149,0.0069\n")
    for seed, final in ((1, 1.0), (2, 2.0)):
        curve = a_curve((0.5,), seed, final, won=0.5 * seed, env="smax:5m_vs_6m", algo="magpo")
        make.append("paper_smax", curve)
    there = dict(env="smax:5m_vs_6m", algo="mappo")
    make.append("paper_smax", a_curve((0.5,), 1, 1.25, won=0.25, machine="there", **there))
    make.append("paper_smax", a_curve((0.5,), 2, 9.0, won=1.0, learning_rate=1.0, **there))  # not tuned so
    make.append("paper_smax", a_curve((0.5,), 1, 2.0, won=1.0, env="smax:2s3z", algo="ctds"))
    main(monkeypatch, make, "tables", "paper_*")
    heads, _, hard, easy, _, note, _, machines = capsys.readouterr().out.strip().splitlines()
    assert heads.count("published") == 4 and heads.endswith("MAGPO, published |")
    first = "**1.50** [1.00, 2.00], 75% won, guider 1.50 | **1.25** [1.25, 1.25], 25% won, guider 1.25 |"
    first += "  | 2 / 1 / 0 | 0.00 M"
    assert hard == f"| `smax:5m_vs_6m` |  | {first} | 20 / 20 /  | 1.05 | 1.6 | 1.47 |  |"
    assert easy.startswith("| `smax:2s3z` | 0.215 +- 0.0069 |  |  | **2.00** [2.00, 2.00], 100% won")
    assert easy.endswith("| 2 | 1.99 | 2 | 100 % won |") and "20 M steps" in note
    assert machines.endswith("runs: 3 of here, 1 of there.")


def test_the_papers_pictures_have_a_column_a_task(here, monkeypatch):
    for task, algo, seed in itertools.product(("smax:2s3z", "smax:5m_vs_6m"), ("magpo", "mappo"), (1, 2)):
        make.append("paper_smax", a_curve((0.0, seed), seed, final=9.0, env=task, algo=algo))
    axes = []
    monkeypatch.setattr(draw.plt, "close", lambda figure: axes.extend(figure.axes))
    draw.draw_paper("smax")
    assert len(axes) == 4 and (here / "paper_smax.png").stat().st_size > 5000
    over_steps, over_seconds = axes[1], axes[3]
    (steps, mean), (seconds, _) = (ax.get_lines()[0].get_data() for ax in (over_steps, over_seconds))
    assert list(steps) == [100, 200] and list(seconds) == [10, 20] and list(mean) == [0, 1.5]
    lines = {line.get_label(): line.get_ydata()[0] for line in over_steps.get_lines()[2:]}
    assert lines == {f"{method}, published": score for method, score in published("smax:5m_vs_6m").items()}


def test_published_scores_are_of_our_tasks_in_our_units():
    assert {row["method"] for row in ROWS} == set(METHODS) and len(ROWS) == 39 * 3 + 6
    assert {row["task"] for row in ROWS if ":" not in row["task"]} <= envs.ENVS.keys()
    for row in ROWS:
        if row["note"].startswith("published as"):  # a mean over N agents
            num_agents = int(row["task"].split("x")[-1].removesuffix("a"))
            mean = float(row["note"].split()[2].removesuffix(":"))
            assert float(row["score"]) == pytest.approx(num_agents * mean)
        else:
            assert not row["task"].startswith("connector") or not row["score"]


# --- record.py ----------------------------------------------------------------------------------------------


def test_the_record_is_measured_and_printed(here, monkeypatch, capsys):
    """Medians over three seeds. On mpe_spread a score of 0.60 is a return of -15.11, 0.90 is -9.50."""
    curves = {
        "mpe_spread": ((-26.0, -15.0, -9.0), (-15.2, -15.2, -15.0), (-15.0, -20.0, -20.0)),
        "lbf:8x8-2p-2f-coop": ((0.94, 0.95, 0.0), (0.0, 0.0, 1.0), (0.94, 0.94, 0.94)),
    }
    monkeypatch.setattr(
        make, "apart", lambda run: a_curve(curves[run["env"]][run["seed"] - 1], final=9, **run)
    )
    monkeypatch.setattr(record, "commit", lambda: "abc1234")
    main(monkeypatch, make, "record", "--add")
    heads, _, row, _, note = capsys.readouterr().out.split("\n\n", 1)[1].strip().splitlines()
    assert heads == "| date | commit | mpe_spread 0.60 | mpe_spread 0.90 | lbf 0.95 | machine |"
    cells = "abc1234 | 20 s, 200 steps | not reached | 30 s, 300 steps"
    assert row.split(" | ", 1)[1] == f"{cells} | {make.machine()} |" and "seeds 1, 2, 3" in note
    (saved,) = make.read("record")
    assert (saved["mpe_spread 0.90 step"], saved["lbf 0.95 cpu_seconds"]) == (math.inf, 30)
    main(monkeypatch, make, "record", "--add")
    assert len(make.read("record")) == 2


def test_a_record_is_of_a_commit():
    assert len(record.commit().removesuffix("-dirty")) >= 7


# --- details.py and imitation.py ----------------------------------------------------------------------------


@functools.cache
def weights(detail):
    """All weights after a little training with a detail; its row of the table is printed."""
    found = []

    def train(**options):
        sizes = TINY | dict(num_steps=25, total_timesteps=200, runs_dir=folder, torch_threads=1)
        _, *nets = magpo.load(magpo.train(magpo.Args(**options | sizes)))
        found.extend(p.flatten() for net in nets for p in net.parameters())
        return magpo.Args(**TINY), [dict(cpu_seconds=1.0)], dict(learner=1.0, guider=2.0)

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "train", train)
        patch.setattr(make, "HERE", Path(folder))
        make.append("details", [dict(detail="other", seed=1, learners=9, guider=9, cpu_seconds=9)])
        details.run(detail, 1)
        details.table()
    return torch.cat(found)


QUICK = ("nothing", "time-outs count as ends", "no LayerNorm")
DETAILS = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in details.DETAILS]


@pytest.mark.parametrize("detail", DETAILS)
def test_details_train_and_change_something(detail, capsys):
    one, other = weights("nothing"), weights(detail)
    same = one.shape == other.shape and torch.equal(one, other)
    options = details.DETAILS[detail][1].keys()
    assert same == (detail == "nothing" or bool(options & TINY.keys()))
    assert f"| {detail} | 1.00 | 2.00 | 1 |" in capsys.readouterr().out


def test_imitation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(imitation, "__file__", str(tmp_path / "imitation.py"))
    main(monkeypatch, imitation, "--episodes", 8, "--updates", 2)
    assert len((tmp_path / "imitation.csv").read_text().splitlines()) == 1 + len(imitation.NETS)


# --- watch.py -----------------------------------------------------------------------------------------------


def train(folder, env, **options):
    """The folder of a nearly untrained run."""
    options = TINY | dict(env=env, total_timesteps=20, runs_dir=str(folder)) | options
    return magpo.train(magpo.Args(**options))


@pytest.mark.parametrize("recurrent", [False, True])
def test_watch_films_what_the_learners_do(recurrent, tmp_path, monkeypatch):
    """Two episodes on mpe2 itself, played once more without a camera; the film shows mpe2's pictures."""
    kwargs = '{"max_cycles": 6, "local_ratio": 0.2}'
    run = train(tmp_path, "mpe_spread", env_kwargs=kwargs, recurrent=recurrent)
    returns = watch.watch(run, path := tmp_path / "film.gif", seed=5, episodes=2)
    args, guider, learner = magpo.load(run)
    env_id, options = watch.as_mpe2(args)
    envs_by_hand = envs.make(env_id, 1, **options)
    args.num_envs = 1
    monkeypatch.setattr(magpo, "make_envs", lambda *_: envs_by_hand)
    assert returns == magpo.evaluate(args, guider, learner, "learner", 2, 5).tolist()
    assert len(set(returns)) == 2
    with Image.open(path) as gif:
        frames = [np.asarray(frame.convert("RGB"), float) for frame in ImageSequence.Iterator(gif)]
    assert len(frames) == 2 * 7 and all((a != b).any() for a, b in itertools.pairwise(frames))
    game = simple_spread_v3.parallel_env(render_mode="rgb_array", max_cycles=6)
    game.reset(seed=int(np.random.SeedSequence(5).generate_state(2)[0]))
    first = np.asarray(ImageOps.contain(Image.fromarray(game.render()), (watch.SIZE, watch.SIZE)), float)
    assert np.abs(frames[0][watch.LINE :] - first).mean() < 0.5


def test_watch_films_foraging(tmp_path, monkeypatch):
    """Two episodes, played once more without a camera: a frame shows what agent 0 sees, the whole field."""
    pytest.importorskip("jumanji", reason="Jumanji is missing: pip install -r requirements-jax.txt")
    run = train(tmp_path, "lbf:8x8-2p-2f-coop", env_kwargs='{"time_limit": 40}', num_envs=1)
    returns = watch.watch(run, path := tmp_path / "film.gif", seed=5, episodes=2)
    args, guider, learner = magpo.load(run)
    game, seen = envs.make(args.env, 1, time_limit=40), []
    reset, step = game.reset, game.step

    def see(obs, actions):  # rows (row, column, level) of two foods, of agent 0 and 1, and who loads
        seen.append((obs[0, 0].view(4, 3).int().tolist(), (actions[0] == 5).tolist()))

    def seen_reset(**given):
        obs, infos = reset(**given)
        see(obs, torch.zeros(1, 2))
        return obs, infos

    def seen_step(actions):
        obs, rewards, terminations, truncations, infos = step(actions)
        see(infos["final_obs"], actions)
        if terminations | truncations:
            see(obs, torch.zeros(1, 2))
        return obs, rewards, terminations, truncations, infos

    game.reset, game.step = seen_reset, seen_step
    monkeypatch.setattr(magpo, "make_envs", lambda *_: game)
    assert returns == magpo.evaluate(args, guider, learner, "learner", 2, 5).tolist()
    with Image.open(path) as gif:
        frames = [np.asarray(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(gif)]
    frames = [frame[watch.LINE :] for frame in frames]
    assert len(frames) == len(seen) - 1 == 2 * 41 and any(True in loading for _, loading in seen)

    colors = {name: np.array(ImageColor.getrgb(name)) for name in ("white", watch.AGENT, watch.FOOD, "black")}
    cell, levels = watch.SIZE // 8, {}
    for frame, (rows, loading) in zip(frames, seen, strict=False):
        kinds = [watch.FOOD, watch.FOOD, watch.AGENT, watch.AGENT]
        there = {(row, column): what for (row, column, _), what in zip(rows, kinds, strict=True)}
        for row, column in np.ndindex(8, 8):
            pixel = frame[row * cell + cell // 2, column * cell + 9]
            distances = [np.abs(color - pixel).sum() for color in colors.values()]
            assert list(colors)[np.argmin(distances)] == there.get((row, column), "white")
        for (row, column, level), what in zip(rows, kinds, strict=True):
            if level:
                inside = frame[row * cell + 11 : row * cell + 25, column * cell + 11 : column * cell + 25]
                assert levels.setdefault((what, level), inside.tobytes()) == inside.tobytes()
        for (row, column, _), loads in zip(rows[2:], loading, strict=True):
            assert (frame[row * cell + cell // 2, column * cell + 5].max() < 60) == loads
    assert len(levels) > 2 and len(set(levels.values())) == len(levels)
    states = game._copies[0]
    states.food_items.eaten = np.ones((1, 2), bool)
    field = np.asarray(watch.draw_field(states, 8))
    assert not (field == colors[watch.FOOD]).all(2).any() and (field == colors[watch.AGENT]).all(2).any()


@pytest.mark.parametrize("env", ["coordsum_3x10", "matrix_climbing"])
def test_watch_draws_what_to_expect(env, tmp_path, monkeypatch):
    """The number in the picture is the payoff that sampling finds, where learners see what the game shows."""
    run, path, shown = train(tmp_path, env), tmp_path / "picture.png", []
    args, guider, learner = magpo.load(run)
    learner.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    monkeypatch.setattr(magpo, "load", lambda run: (args, guider, learner))
    (number,) = watch.watch(run, path)
    obs, _ = envs.make(env, 4096).reset(seed=0)  # so many that every target is there
    M = obs.shape[-1]
    first = [(obs[:, 0].argmax(-1) == target).nonzero()[0] for target in range(M)]
    assert torch.equal(shown[0], obs[torch.cat(first)])
    actions = learner(obs[torch.cat(first)]).sample((40_000 // M,))  # (S, M, N)
    if M > 1:
        payoff = (actions.sum(-1) == torch.arange(M)).double()
    else:
        payoff = torch.tensor(envs.CLIMBING)[actions[..., 0], actions[..., 1]].double()
    assert number == pytest.approx(payoff.mean().item(), abs=5 * payoff.std().item() / 200)
    assert path.stat().st_size > 5000


def test_watch_refuses_in_one_sentence(tmp_path, monkeypatch, capsys):
    run = train(tmp_path, "matrix_climbing")
    capsys.readouterr()  # the run's own words
    for words in ((run, tmp_path / "x.gif"), (run, tmp_path / "no" / "x.png"), (tmp_path, "x.png")):
        with pytest.raises(SystemExit) as end:
            main(monkeypatch, watch, *words)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# --- speed.py -----------------------------------------------------------------------------------------------


def test_throughput_takes_ratios_within_a_round(here, monkeypatch):
    rates = dict(mpe2_rate=(10.0, 20.0, 40.0), spread_rate=(4000.0,) * 3, training_rate=(20.0, 60.0, 80.0))
    for name, values in rates.items():
        monkeypatch.setattr(speed, name, iter(values).__next__)
    speed.throughput(3)
    keys = ("median", "lowest", "highest")
    rows = {row["what"]: [float(row[key]) for key in keys] for row in read(here, "throughput")}
    assert rows["training / mpe2"] == [2, 2, 3] and rows["training"] == [60, 20, 80]
    assert rows["SimpleSpread, 2,048 copies / mpe2"] == [200, 100, 400]


def read(folder, name):
    with open(folder / f"{name}.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_rates_are_rates():
    assert 50 < speed.mpe2_rate(100) < 1e6 and speed.spread_rate(3, copies=16) > 50
    assert speed.training_rate(3, **TINY) > 1


@pytest.mark.slow
def test_suites_are_timed(here, monkeypatch):
    pytest.importorskip("jumanji", reason="Jumanji is missing: pip install -r requirements-jax.txt")
    monkeypatch.setattr(speed, "training_rate", lambda *_, env: 7)
    speed.suites(("lbf:8x8-2p-2f-coop",), copies=(2,), steps=20)
    (row,) = read(here, "suite_speed")
    assert row["training"] == "7" and float(row["compile_2"]) > 100 * 2 / float(row["steps_2"])


@pytest.mark.slow
def test_profile_adds_up(here, capsys):
    speed.profile(4, **TINY)
    *parts, whole = [float(row["cpu_seconds"]) for row in read(here, "profile")]
    assert sum(parts) == pytest.approx(whole, rel=1e-2) and min(parts[:-1]) > 0
    assert "20 steps per iteration" in capsys.readouterr().out


@pytest.mark.slow
def test_growth_is_written_and_drawn(here):
    speed.growth(sizes=(2, 3), iterations=2, memory_sizes=())
    rows = read(here, "growth")
    assert [row["num_agents"] for row in rows] == ["2", "3"] and (here / "growth.png").stat().st_size > 5000
    assert all(0 < float(row[key]) < 1e5 for row in rows for key in ("act_us", "update_us"))


def test_quality_reads_the_first_step_at_which_a_score_stands(here, capsys):
    # A score of 0.60 is a return of -15.11, 0.90 is -9.50
    returns = {"a": (-26.0, -15.0, -9.0), "b": (-26.0, -16.0, -15.0), "c": (-10.0, -9.4, -9.6)}
    rows = [(10 * (i + 1), x, 0, name) for name, curve in returns.items() for i, x in enumerate(curve)]
    rows.append((99, -7.0, 1, "b"))  # a final row is not of the curve
    keys = ("cpu_seconds", "learner_return", "final", "command")
    make.append("mpe_spread", [dict(zip(keys, row, strict=True), algo="magpo") for row in rows])
    speed.quality()
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["magpo", "0.60", "median", "20", "seeds", "20", "30", "10"],
        ["magpo", "0.90", "median", "30", "seeds", "30", "inf", "20"],
        ["magpo", "final", "score", "1.03"],  # (-7.0 + 26.34) / (26.34 - 7.63)
    ]


def test_gpu_without_one_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        speed.gpu()
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
