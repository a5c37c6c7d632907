"""The scripts of results/, at tiny budgets."""

import csv
import itertools
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mpe2 import simple_spread_v3
from PIL import Image, ImageOps, ImageSequence

import envs
import magpo
from results import compare, details, imitation, make, speed, watch

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
    for wrong in (
        [tmp_path],
        [runs[0], a_run(tmp_path / "x", (1.0,), env="matrix_sum10", algo="magpo", seed=1)],
    ):
        with pytest.raises(SystemExit) as end:
            main(monkeypatch, compare, *wrong)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_sweeps_go_on_where_they_stopped(here, monkeypatch, capsys):
    options = dict(env="matrix_xor", num_envs=64, total_timesteps=2048, eval_episodes=64)
    monkeypatch.setattr(make, "EXPERIMENTS", {"tiny": make.grid((1, 2), anneal_lr=False, **options)})
    make.sweep("tiny", "seed 2")
    make.sweep("tiny")
    rows = make.read("tiny")
    assert [row["seed"] for row in rows if row["final"] == 1] == [2, 1]
    assert capsys.readouterr().out.count("cpu-s") == 2
    args, points, final = make.train(**options, seed=1, anneal_lr=False)
    mine = [row for row in rows if row["seed"] == 1]
    assert [row["learner_return"] for row in mine[:-1]] == pytest.approx(
        [p["learner_return"] for p in points], rel=1e-4
    )
    assert mine[-1]["learner_return"] == pytest.approx(final["learner"], rel=1e-4)
    shutil.copy(ROOT / "results" / "random.csv", here)
    make.tables("tiny")
    table = capsys.readouterr().out
    flags = "--no-anneal-lr --env matrix_xor --num-envs 64 --total-timesteps 2048 --eval-episodes 64"
    assert f"| `{flags}` | 0.5 | **" in table


@pytest.mark.slow
def test_every_picture_is_drawn(here):
    for path in (ROOT / "results").glob("*.csv"):
        shutil.copy(path, here)
    make.draw()
    names = {"mpe_spread", "coordsum", "sum10", "delta", "delta_lambda", "clip"}
    assert {path.stem for path in here.glob("*.png")} == names
    assert names | {"growth"} == {path.stem for path in (ROOT / "results").glob("*.png")}


def test_random_play_is_written_down(here, monkeypatch):
    monkeypatch.setattr(make, "RANDOM", {make.REMEMBER: 512})
    make.random_returns()
    (row,) = csv.DictReader((here / "random.csv").read_text().splitlines())
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


# --- details.py and imitation.py ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """detail -> all weights after a little training with it."""
    folder, seen = tmp_path_factory.mktemp("details"), {}

    def train(**options):
        sizes = TINY | dict(num_steps=25, total_timesteps=200, runs_dir=str(folder), torch_threads=1)
        _, guider, learner = magpo.load(magpo.train(magpo.Args(**options | sizes)))
        seen["latest"] = torch.cat([p.flatten() for net in (guider, learner) for p in net.parameters()])
        return magpo.Args(**TINY), [dict(cpu_seconds=1.0)], dict(learner=1.0, guider=2.0)

    def of(detail):
        if detail not in seen:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(make, "train", train)
                patch.setattr(make, "HERE", folder)
                details.run(detail, 1)
                details.table()
            seen[detail] = seen["latest"]
        return seen[detail]

    return of


QUICK = ("nothing", "time-outs count as ends", "no LayerNorm")
DETAILS = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in details.DETAILS]


@pytest.mark.parametrize("detail", DETAILS)
def test_details_train_and_change_something(detail, weights, capsys):
    one, other = weights("nothing"), weights(detail)
    same = one.shape == other.shape and torch.equal(one, other)
    options = details.DETAILS[detail][1].keys()
    assert same == (detail == "nothing" or bool(options & {"num_minibatches", "torch_threads"}))
    assert f"| {detail} | 1.00 | 2.00 | 1 |" in capsys.readouterr().out


def test_imitation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(imitation, "__file__", str(tmp_path / "imitation.py"))
    main(monkeypatch, imitation, "--episodes", 8, "--updates", 2)
    assert len((tmp_path / "imitation.csv").read_text().splitlines()) == 1 + len(imitation.NETS)


# --- watch.py -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of nearly untrained runs, by environment."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def make_run(env, **options):
        if (key := (env, *options.items())) not in made:
            options = TINY | dict(env=env, total_timesteps=20, runs_dir=str(folder)) | options
            made[key] = magpo.train(magpo.Args(**options))
        return made[key]

    return make_run


@pytest.mark.parametrize("recurrent", [False, True])
def test_watch_films_what_the_learners_do(recurrent, runs, tmp_path):
    """Two episodes on mpe2 itself, played once more without a camera; the film shows mpe2's pictures."""
    kwargs = '{"max_cycles": 6, "local_ratio": 0.2}'
    run, path = runs("mpe_spread", env_kwargs=kwargs, recurrent=recurrent), tmp_path / "film.gif"
    returns = watch.watch(run, path, seed=5, episodes=2)
    args, guider, learner = magpo.load(run)
    env_id, options = watch.as_mpe2(args)
    envs_by_hand = envs.make(env_id, 1, **options)
    args.num_envs = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magpo, "make_envs", lambda *_: envs_by_hand)
        assert (
            returns == magpo.evaluate(args, guider, learner, "learner", 2, 5).tolist()
            and len(set(returns)) == 2
        )
    with Image.open(path) as gif:
        frames = [np.asarray(frame.convert("RGB"), float) for frame in ImageSequence.Iterator(gif)]
    assert len(frames) == 2 * 7 and all((a != b).any() for a, b in itertools.pairwise(frames))
    game = simple_spread_v3.parallel_env(render_mode="rgb_array", max_cycles=6)
    seed = np.random.SeedSequence(5).generate_state(2)[0]
    game.reset(seed=int(seed))
    first = np.asarray(ImageOps.contain(Image.fromarray(game.render()), (watch.SIZE, watch.SIZE)), float)
    assert np.abs(frames[0][watch.LINE :] - first).mean() < 0.5


@pytest.mark.parametrize("env", ["coordsum_3x10", "matrix_climbing"])
def test_watch_draws_what_to_expect(env, runs, tmp_path):
    """The number in the picture is the payoff that sampling finds."""
    run, path = runs(env), tmp_path / "picture.png"
    (number,) = watch.watch(run, path)
    _, _, learner = magpo.load(run)
    N, M = envs.make(env, 1).single_observation_space.shape
    actions = learner(torch.eye(M).unsqueeze(1).expand(M, N, M)).sample((40_000 // M,))  # (S, M, N)
    if M > 1:
        payoff = (actions.sum(-1) == torch.arange(M)).double()
    else:
        payoff = torch.tensor(envs.CLIMBING)[actions[..., 0], actions[..., 1]].double()
    assert number == pytest.approx(payoff.mean().item(), abs=5 * payoff.std().item() / 200)
    assert path.stat().st_size > 5000


def test_watch_refuses_in_one_sentence(runs, tmp_path, monkeypatch, capsys):
    run = runs("matrix_climbing")
    capsys.readouterr()  # the run's own words
    for words in ((run, tmp_path / "x.gif"), (run, tmp_path / "no" / "x.png"), (tmp_path, "x.png")):
        with pytest.raises(SystemExit) as end:
            main(monkeypatch, watch, *words)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# --- speed.py -----------------------------------------------------------------------------------------------


def test_throughput_takes_ratios_within_a_round(here, monkeypatch):
    rates = {
        "mpe2_rate": (10.0, 20.0, 40.0),
        "spread_rate": (4000.0,) * 3,
        "training_rate": (20.0, 60.0, 80.0),
    }
    for name, values in rates.items():
        monkeypatch.setattr(speed, name, iter(values).__next__)
    speed.throughput(3)
    rows = {
        row["what"]: [float(row[key]) for key in ("median", "lowest", "highest")]
        for row in read(here, "throughput")
    }
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
def test_profile_adds_up(here, capsys):
    speed.profile(4, **TINY)
    *parts, whole = read(here, "profile")
    assert sum(float(row["cpu_seconds"]) for row in parts) == pytest.approx(
        float(whole["cpu_seconds"]), rel=1e-2
    )
    assert (
        all(float(row["cpu_seconds"]) > 0 for row in parts[:-1])
        and "20 steps per iteration" in capsys.readouterr().out
    )


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
