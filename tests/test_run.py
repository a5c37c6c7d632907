"""run.py and options.py: the command line, options, run folders, checkpoints, resume, stops, failures, processes."""

import csv
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import envs
import magpo
import options
import run

HERE = Path(__file__).parent.parent
torch.set_num_threads(1)
QUICK = dict(num_envs=8, num_steps=5, num_minibatches=4, total_timesteps=120, eval_episodes=8, eval_every=2)

# A PettingZoo environment of two agents that see the time. wrong: what happens in step `at` of the process
CLUMSY = '''
import numpy as np
from gymnasium import spaces
from pettingzoo import ParallelEnv

steps = 0

class parallel_env(ParallelEnv):
    metadata = {}

    def __init__(self, length=5, wrong="", at=0):
        self.possible_agents, self.length, self.wrong, self.at = ["a", "b"], length, wrong, at

    def observation_space(self, agent):
        return spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def action_space(self, agent):
        return spaces.Discrete(2)

    def look(self):
        return {agent: np.full(2, self.time, np.float32) for agent in self.agents}, {a: {} for a in self.agents}

    def reset(self, seed=None, options=None):
        self.agents, self.time = ["a", "b"], 0
        return self.look()

    def step(self, actions):
        global steps
        steps, self.time = steps + 1, self.time + 1
        (obs, infos), reward = self.look(), 1.0
        if self.wrong and steps >= self.at:
            if self.wrong == "raises":
                raise KeyError("a bug of the user's")
            reward = {"nan": float("nan"), "huge": 3e38, "short": 1.0}[self.wrong]
            obs = {"a": np.zeros(1, np.float32)} if self.wrong == "short" else obs
        over = {agent: self.time == self.length for agent in self.agents}
        rewards = dict.fromkeys(self.agents, reward)
        self.agents = [agent for agent in self.agents if not over[agent]]
        return obs, rewards, over, dict.fromkeys(over, False), infos
'''


@pytest.fixture
def clumsy(tmp_path, monkeypatch):
    """A folder from which `pettingzoo:clumsy` can be imported; it is the current one, too."""
    (tmp_path / "clumsy.py").write_text(CLUMSY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("clumsy", None)


@pytest.fixture
def main(monkeypatch, capsys):
    """A function: words of the command line -> exit code, stdout, stderr."""

    def call(*words):
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        monkeypatch.setattr(sys, "argv", ["magpo.py", *map(str, words)])
        options.runs.clear()
        with pytest.raises(SystemExit) as stop:
            options.command_line(magpo.Args, magpo.train, magpo.load, magpo.print_table)
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])
        return stop.value.code or 0, *capsys.readouterr()

    return call


def shell(command, folder, **more):
    path = os.pathsep.join([str(HERE), str(folder)])
    how = dict(cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=path) | more
    return subprocess.Popen([sys.executable, *shlex.split(command)], env=env, **how)


def words(**given):
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def rows(folder):
    with open(Path(folder) / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]


def train(folder, stop=(), **changes):
    return magpo.train(magpo.Args(**QUICK | dict(env="mpe_spread", runs_dir=str(folder)) | changes), stop)


def train_until(iteration, folder, monkeypatch, **changes):
    """A training that is stopped after an iteration -> its folder."""
    stop, log = [], run.Run.log

    def counted(self, at, row):
        log(self, at, row)
        if at == iteration:
            stop.append(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "log", counted)
        return train(folder, stop, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a short run on mpe_spread. Not to be changed."""
    return train(tmp_path_factory.mktemp("runs"), seed=5, eval_episodes=3)


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# --- Options ------------------------------------------------------------------------------------------------

REFUSED = {  # in Python and, where it can be written there, on the command line
    "must be of type bool": [dict(cuda="False"), dict(state=1), dict(anneal_lr=None)],
    "must be of type int": [dict(num_envs=8.7), dict(seed=None), dict(num_steps=True), dict(seed=np.int64(3))],
    "must be of type float": [dict(lam="1"), dict(gamma=torch.tensor(0.9)), dict(clip_coef=None)],
    "must be of type str": [dict(env=None), dict(env=7), dict(runs_dir=Path("x")), dict(env_kwargs={"N": 5})],
    "must be one of magpo, mappo, ctds": [dict(algo="mapo"), dict(algo=["magpo"]), dict(algo=None)],
    "must be one of soft, reset": [dict(backtracking="Reset")],
    "below 1e18": [dict(lam=math.nan), dict(ent_coef=math.inf), dict(delta=math.nan), dict(num_envs=10**400)],
    "must be above 0": [dict(embed_dim=0), dict(learning_rate=0.0), dict(delta=-math.inf), dict(save_every=0)],
    "must not be negative": [dict(lam=-1.0), dict(seed=-1), dict(num_workers=-2)],
    "seed must lie": [dict(seed=2**32)],
    "torch_threads is 100000": [dict(torch_threads=100000)],
    "goes by the run's own options: leave out": [dict(resume="R", seed=5), dict(eval="R", algo="mappo")],
}


@pytest.mark.parametrize(
    "sentence, given", [(s, given) for s, many in REFUSED.items() for given in many], ids=lambda x: str(x)[:40]
)
def test_h_values_of_the_wrong_type_or_range(sentence, given):
    with pytest.raises(ValueError, match=sentence) as error:
        magpo.Args(**given)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


WRONG = {
    "--env mpe_sprad": "There is no environment 'mpe_sprad'; choose one of matrix_climbing,",
    "--num-envs 10 --num-minibatches 7": "num_minibatches must divide num_envs x num_steps",
    "--recurrent --num-envs 10 --num-minibatches 4": "num_minibatches must divide",
    "--delta 1.0": "delta must be above 1",
    "--gamma 1.5": "gamma and gae_lambda must lie in [0, 1]",
    "--total-timesteps 10": "total_timesteps must be at least num_envs x num_steps",
    "--algo mappo --backtracking reset": "mappo has no guider policy",
    "--num-workers 256": "mpe_spread computes all its copies at once",
    "--env gym:x --num-workers 3": "one process per copy",
    "--env coordsum_3x10 --state": "no state",
    "--hidden-dim 10000000": "too large",
    "--num-envs 1e9 --total-timesteps 1e12": "too large",
    "--lam inf": "lam must be a number below 1e18",
    "--num-envs 8.7": "num-envs",
    "--seed nan": "seed",
    "--cuda False": "unrecognized arguments: False",
    "--speed 3": "unrecognized arguments",
    "--resume ''": "--resume needs the folder of a run",
    "--eval ''": "--eval needs the folder of a run",
    "--resume R --seed 1": "leave out seed",  # the default, but given
    "--eval R --algo mappo": "leave out algo",
    "--resume R --eval R": "leave out",
    "--env-kwargs [[1]]": "must be a JSON object",
    "--env-kwargs 3": "must be a JSON object",
    "--env-kwargs {": "must be a JSON object",
    f"--env-kwargs {'[' * 9999}": "must be a JSON object",
    """--env-kwargs '{"speed": 2}'""": "speed",
    """--env-kwargs '{"num_agents": 100000}'""": "mpe_spread cannot be made",
    """--runs-dir file""": "cannot be written",
    """--runs-dir file/x""": "cannot be written",
    f"--runs-dir {'x' * 300}": "cannot be written",
} | {f"""--env-kwargs '{{"{name}": 3}}'""": name for name in "num_envs device state env_id num_workers self".split()}


@pytest.mark.parametrize("line", WRONG, ids=lambda line: line[:40])
def test_h_wrong_input_is_one_sentence_and_nothing_is_written(line, main, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    code, out, err = main(*shlex.split(line))
    assert code == 2 and err.count("\n") == 1 and WRONG[line] in err and len(err) < 900
    assert "saved" not in err and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_presets_fill_in_what_is_not_given():
    preset = options.PRESETS["coordsum"]
    assert magpo.Args(env="coordsum_3x10").gamma == preset["gamma"] != options.DEFAULTS["gamma"]
    assert magpo.Args(env="coordsum_3x10", gamma=0.95).gamma == 0.95
    assert magpo.Args(env="pettingzoo:mpe2.simple_spread_v3").num_envs == options.PRESETS["pettingzoo"]["num_envs"]
    assert magpo.Args(delta=math.inf, lam=3).delta == math.inf
    names = {name.split("_")[0] for name in envs.ENVS}
    assert options.PRESETS.keys() <= names | set(re.findall(r"(\w+):", envs.ELSEWHERE))
    unset = {field.name for field in fields(magpo.Args) if field.default is None}
    assert unset == options.DEFAULTS.keys() and all(preset.keys() <= unset for preset in options.PRESETS.values())


def test_help_is_grouped_and_fits_80_columns(main):
    code, out, err = main("--help")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    for text in ["Environment:", "MAGPO:", "Run:", "mpe_spread_5ag", "smax:<task>", "3*]"]:
        assert text in out
    for field in fields(magpo.Args):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", out)


def test_the_reader_of_help_may_leave(tmp_path):
    process = shell(f"{HERE / 'magpo.py'} --help", tmp_path)
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == ""


def test_1e6_is_a_number_and_what_is_given_counts_as_given(main, tmp_path):
    more = words(runs_dir=tmp_path, **QUICK | dict(total_timesteps="1.3e2"))
    code, out, _ = main("--env", "mpe_spread", "--no-anneal-lr", "--seed", "1", *more)
    printed = " ".join(out.split())
    given, preset = re.search(r"Given: (.*?)\. By preset or default: (.*?)\. ", printed).groups()
    assert code == 0 and "total_timesteps is cut to 120" in printed
    assert all(text in given for text in ("env mpe_spread", "seed 1", "anneal_lr False", "total_timesteps 130"))
    assert "learning_rate 0.0045" in preset and "seed" not in preset


# --- A run and its folder -----------------------------------------------------------------------------------


def test_a_run_leaves_everything_behind(tmp_path, capsys):
    folder = train(tmp_path, eval_episodes=256)
    assert re.fullmatch(r"mpe_spread__magpo__1__[\d.]+", folder.name)
    printed = capsys.readouterr().out
    for line in (r"learner +-\d+\.\d+ ", r"learner_greedy +-\d", r"guider +-\d", r"\(random\) +-26.34"):
        assert re.search(line, printed)
    assert [row["step"] for row in rows(folder)] == ["40", "80", "120"]
    args, guider, learner = magpo.load(folder / "checkpoint.pt")
    saved = json.loads((folder / "args.json").read_text())
    assert saved == asdict(args) | {"runs_dir": str(tmp_path)} and saved["learning_rate"] == 4.5e-3
    returns = magpo.evaluate(args, guider, learner, "learner", 1, args.seed + 2)
    assert f"{returns.mean():.2f}  (1 episodes)" in printed  # 120 steps pay for one of 25
    board = EventAccumulator(str(folder)).Reload()
    assert b"hidden_dim: 128" in board.Tensors("args/text_summary")[0].tensor_proto.string_val[0]
    assert len(board.Scalars("guider_return")) == 3


@pytest.mark.parametrize("env", ["mpe_spread", "coordsum_3x10"])
def test_seeds_repeat_and_differ(env, tmp_path):
    first, again, other = (rows(train(tmp_path, env=env, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_track_is_one_call_and_a_missing_package_one_sentence(main, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **how: calls.append(how)))
    folder = train(tmp_path, track=True)
    assert calls[0]["name"] == folder.name and calls[0]["sync_tensorboard"] and calls[0]["config"]["seed"] == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = main("--track", "--runs-dir", tmp_path / "new")
    assert code == 2 and err.endswith("magpo.py: --track needs the package wandb: pip install wandb.\n")
    assert not (tmp_path / "new").exists()


def test_g_one_sample_has_nothing_to_average(tmp_path, capsys, recwarn):
    one = dict(num_envs=1, num_steps=1, num_minibatches=1, total_timesteps=3, eval_episodes=1)
    numbers = rows(train(tmp_path, env="matrix_xor", **one))
    finite = [float(value) for row in numbers for name, value in row.items() if "return" not in name]
    assert all(map(math.isfinite, finite)) and "(1 episodes)" in capsys.readouterr().out
    assert not [w for w in recwarn if "std()" in str(w.message)]


# --- Evaluation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "episodes, steps, longest, copies, expected",
    [(1024, 10**9, 25, 256, 1024), (1024, 20_000, 500, 32, 4), (9, 10, 1000, 8, 1), (100, 10**6, 100, 64, 64)],
)
def test_a_an_evaluation_costs_a_tenth_of_training(episodes, steps, longest, copies, expected):
    args, env = types.SimpleNamespace(num_envs=copies), types.SimpleNamespace(max_episode_steps=longest)
    assert run.affordable(args, episodes, steps, env) == expected


def test_a_an_environment_that_never_ends(main, clumsy):
    monkey = dict(env="pettingzoo:clumsy", env_kwargs='{"length": 0}') | QUICK
    code, out, err = main(*words(**monkey))
    assert code == 0 and re.search(r"learner +nan +\(0 episodes\)", out)
    assert sys.modules["clumsy"].steps < 120 + 8000  # at most 1,000 steps of one copy, for each of five evaluations
    assert all(row["learner_return"] == "nan" for row in rows(next(clumsy.glob("runs/*"))))


def test_a_a_stop_ends_an_evaluation_and_the_table(trained, capsys):
    args, guider, learner = magpo.load(trained)
    stop, evaluations = [], []

    class Policy(type(learner)):
        def forward(self, *inputs):
            evaluations.append(0)
            stop.extend([2] * (len(evaluations) == 3))
            return super().forward(*inputs)

    learner.__class__ = Policy
    magpo.print_table(args, guider, learner, stop)
    assert len(evaluations) == 3 and "episodes" not in capsys.readouterr().out.split("\n", 1)[1]


def test_b_an_evaluation_puts_all_random_numbers_back():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    run.seed_everything(3)
    expected = [draw(), draw()]
    run.seed_everything(3)
    got = [draw()]
    with pytest.raises(KeyError), run.seeded(8, torch.device("cpu")):
        inside = draw()
        raise KeyError
    assert got + [draw()] == expected and inside not in expected
    with run.seeded(8, torch.device("cpu")):
        assert draw() == inside


def test_eval_prints_the_table_of_the_run(trained, main):
    torch.set_num_threads(2)
    code, out, _ = main("--eval", trained / "checkpoint.pt", "--seed", 5)
    assert code == 0 and "mpe_spread, magpo, seed 5" in out and torch.get_num_threads() == 1
    args, guider, learner = magpo.load(trained)
    assert f"{magpo.evaluate(args, guider, learner, 'guider', 1, 7).mean():.2f}" in out
    for more in (["--env", "pettingzoo:mpe2.simple_spread_v3"], ["--env-kwargs", '{"max_cycles": 3}']):
        code, out, _ = main("--eval", trained, "--num-envs", 2, *more)
        assert code == 0 and "learner_greedy" in out and "heuristic" not in out


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("--env mpe_spread_5ag", "does not fit this environment"),
        ("--env mpe_spread_continuous", "does not fit this environment"),
        ("--env coordsum_3x10", "does not fit this environment"),
        ("""--env-kwargs '{"num_targets":30}'""", "num_targets"),
        ("--num-envs 0", "num_envs must be above 0"),
        ("--eval-episodes -3", "eval_episodes must be above 0"),
        ("--num-workers 256", "at once"),
        ("--hidden-dim 128", "leave out hidden_dim"),
    ],
)
def test_eval_refuses_what_does_not_fit(line, sentence, trained, main):
    code, _, err = main("--eval", trained, *shlex.split(line))
    assert code == 2 and err.count("\n") == 1 and sentence in err
