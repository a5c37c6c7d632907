"""What surrounds a run: command line, folders, checkpoints, resume, stops, failures, processes."""

import contextlib
import csv
import functools
import io
import json
import math
import multiprocessing
import operator
import os
import pickle
import random
import re
import shlex
import shutil
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
from adapters import python_envs
from run import Run
from support import checkpoint, machine, options, terminal

HERE = Path(__file__).parent.parent
torch.set_num_threads(1)
QUICK = dict(num_envs=8, num_steps=5, num_minibatches=4, total_timesteps=120, eval_episodes=8, eval_every=2)

# A PettingZoo environment of two agents that see the time. wrong: what happens in step `at` of the process
CLUMSY = """
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
        return {a: np.full(2, self.time, np.float32) for a in self.agents}, {a: {} for a in self.agents}

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
"""


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
        Run.current = None
        with pytest.raises(SystemExit) as stop:
            terminal.command_line(magpo.Args, magpo.train, magpo.load, magpo.evaluate)
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
    stop, log = [], Run.log

    def counted(self, at, row):
        log(self, at, row)
        if at == iteration:
            stop.append(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", counted)
        return train(folder, stop, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a short run on mpe_spread. Not to be changed."""
    return train(tmp_path_factory.mktemp("runs"), seed=5, eval_episodes=3)


def refused(sentence, folder, main, *words):
    """One sentence and exit code 2, and nothing in the folder has changed."""
    contents = lambda: {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}  # noqa: E731
    before = contents()
    code, _, err = main(*words)
    assert code == 2 and err.count("\n") == 1 and sentence in err and len(err) < 700, err
    assert contents() == before


# --- Options ------------------------------------------------------------------------------------------------

REFUSED = {  # in Python
    "must be of type bool": [dict(cuda="False"), dict(state=1), dict(anneal_lr=None)],
    "must be of type int": [dict(num_envs=8.7), dict(seed=None), dict(num_steps=True), dict(seed=np.int8(3))],
    "must be of type float": [dict(lam="1"), dict(gamma=torch.tensor(0.9)), dict(clip_coef=None)],
    "must be of type str": [dict(env=None), dict(env=7), dict(runs_dir=Path("x")), dict(env_kwargs={"N": 5})],
    "must be one of magpo, mappo, ctds": [dict(algo="mapo"), dict(algo=["magpo"]), dict(algo=None)],
    "must be one of soft, reset": [dict(backtracking="Reset")],
    "and below 1e18, but is": [
        dict(lam=math.nan), dict(ent_coef=math.inf), dict(delta=math.nan), dict(num_envs=10**400),
        dict(embed_dim=0), dict(learning_rate=0.0), dict(delta=-math.inf), dict(lam=-1.0), dict(seed=-1),
    ],
    "seed must be below": [dict(seed=2**32 - 2)],
    "lam is always 0 with algo mappo: leave it out": [dict(algo="mappo", lam=1.0)],
    "delta is always inf with algo mappo": [dict(algo="mappo", delta=1.3)],
    "action_std is always 1 with algo mappo": [dict(algo="mappo", action_std=0.1)],
    "delta is always inf with algo ctds": [dict(algo="ctds", delta=1.2)],
    "action_std is always 1 with backtracking reset": [dict(backtracking="reset", action_std=0.2)],
    "torch_threads is 100000": [dict(torch_threads=100000)],
    "goes by the run's own options: leave out": [dict(resume="R", seed=5), dict(eval="R", algo="mappo")],
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_h_values_that_cannot_be(sentence):
    for given in REFUSED[sentence]:
        print(given)
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
    "--algo mappo --backtracking reset": "mappo has no guider, so",
    "--num-workers 256": "mpe_spread computes all its copies at once",
    "--env gym:x --num-workers 3": "one process per copy",
    "--env coordsum_3x10 --state": "no state",
    "--hidden-dim 10000000": "too large",
    "--num-envs 1e9 --total-timesteps 1e12": "too large",
    "--lam inf": "lam must be a number at least 0 and below 1e18, but is inf",
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
} | {
    f"""--env-kwargs '{{"{name}": 3}}'""": name
    for name in "num_envs device state env_id num_workers self".split()
}


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
    foreign = magpo.Args(env="pettingzoo:mpe2.simple_spread_v3")
    assert foreign.num_envs == options.PRESETS["pettingzoo"]["num_envs"]
    assert magpo.Args(delta=math.inf, lam=3).delta == math.inf
    names = {name.split("_")[0] for name in envs.ENVS}
    assert options.PRESETS.keys() <= names | set(re.findall(r"(\w+):", envs.ELSEWHERE))
    unset = {field.name for field in fields(magpo.Args) if field.default is None}
    assert unset == options.DEFAULTS.keys()
    assert all(preset.keys() <= unset for preset in options.PRESETS.values())


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
    given, preset = re.search(r"Given: (.*?)\. The rest: (.*?)\. ", printed).groups()
    assert code == 0 and "total_timesteps is cut to 120" in printed
    for text in ("env mpe_spread", "seed 1", "anneal_lr False", "total_timesteps 130"):
        assert text in given
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
    assert b"hidden_dim: 64" in board.Tensors("args/text_summary")[0].tensor_proto.string_val[0]
    assert len(board.Scalars("guider_return")) == 3


@pytest.mark.parametrize("env", ["mpe_spread", "matrix_sum10"])
def test_seeds_repeat_and_differ(env, tmp_path):
    first, again, other = (rows(train(tmp_path, env=env, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_track_is_one_call_and_a_missing_package_one_sentence(main, tmp_path, monkeypatch):
    calls, wandb = [], types.ModuleType("wandb")
    wandb.init, wandb.__spec__ = lambda **how: calls.append(how), "found"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = train(tmp_path, track=True)
    assert calls[0]["name"] == folder.name
    assert calls[0]["sync_tensorboard"] and calls[0]["config"]["seed"] == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = main("--track", "--runs-dir", tmp_path / "new")
    assert code == 2 and err.endswith("magpo.py: track needs the package wandb: pip install wandb.\n")
    assert not (tmp_path / "new").exists()


# --- Evaluation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "episodes, steps, longest, copies, expected",
    [
        (1024, 10**9, 25, 256, 1024),
        (1024, 20000, 500, 32, 4),
        (9, 10, 1000, 8, 1),
        (100, 10**6, 100, 64, 64),
    ],
)
def test_a_an_evaluation_costs_a_tenth_of_training(episodes, steps, longest, copies, expected):
    args, env = types.SimpleNamespace(num_envs=copies), types.SimpleNamespace(max_episode_steps=longest)
    assert options.affordable(args, episodes, steps, env) == expected


def test_a_an_environment_that_never_ends(main, clumsy, monkeypatch):
    monkeypatch.setattr(python_envs, "UNKNOWN_LIMIT", 50)
    code, out, err = main(*words(env="pettingzoo:clumsy", env_kwargs='{"length": 0}', **QUICK))
    assert code == 0 and re.search(r"learner +nan +\(0 episodes\)", out)
    assert sys.modules["clumsy"].steps < 120 + 6 * 51 + 200  # 50 of one copy for each of six evaluations
    assert all(row["learner_return"] == "nan" for row in rows(next(clumsy.glob("runs/*"))))


def test_b_an_evaluation_puts_all_random_numbers_back():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    machine.seed_everything(3)
    expected = [draw(), draw()]
    machine.seed_everything(3)
    got = [draw()]
    with pytest.raises(KeyError), machine.seeded(8, torch.device("cpu")):
        inside = draw()
        raise KeyError
    assert got + [draw()] == expected and inside not in expected
    with machine.seeded(8, torch.device("cpu")):
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
        ("--env mpe_spread_5ag", "does not fit this run's options"),
        ("--env mpe_spread_continuous", "does not fit this run's options"),
        ("--env coordsum_3x10", "does not fit this run's options"),
        ("""--env-kwargs '{"num_targets":30}'""", "num_targets"),
        ("--num-envs 0", "num_envs must be a number above 0"),
        ("--eval-episodes -3", "eval_episodes must be a number above 0"),
        ("--num-workers 8", "at once"),
        ("--num-workers 3", "one process per copy"),
    ],
)
def test_eval_refuses_what_does_not_fit(line, sentence, trained, main):
    refused(sentence, trained, main, "--eval", trained, *shlex.split(line))


# --- Resume -------------------------------------------------------------------------------------------------

RESUMED = [
    dict(env="mpe_spread", algo="mappo"),
    dict(env="mpe_spread_continuous"),
    dict(env="matrix_sum10", backtracking="reset"),
]
WITH_MEMORY = [
    dict(env="mpe_spread_partial", recurrent=True, state=True),
    dict(env="coordsum_3x10", recurrent=True, num_steps=7, total_timesteps=8 * 7 * 5, eval_every=5),
]


@pytest.mark.parametrize(
    "changes",
    [*RESUMED, *(pytest.param(changes, marks=pytest.mark.slow) for changes in WITH_MEMORY)],
    ids=lambda changes: changes["env"],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(changes, tmp_path, monkeypatch, capsys):
    changes = dict(total_timesteps=200, save_every=4, seed=3) | changes
    whole = train(tmp_path, **changes)
    part = train_until(2, tmp_path, monkeypatch, **changes)
    said = "2 of 5 iterations are done; the checkpoint is of iteration 2. To go on: python magpo.py --resume"
    assert f"{said} {part}\n" in capsys.readouterr().out
    assert len(rows(part)) == 2
    machine.seed_everything(99)  # what else draws random numbers meanwhile does not matter
    assert magpo.train(magpo.Args(resume=str(part / "checkpoint.pt"))) == part
    assert "Given: nothing. The rest: env" in capsys.readouterr().out
    assert rows(part) == rows(whole)
    ours, theirs = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (part, whole))
    for saved in (ours, theirs):
        saved.pop("rows")
    assert pickle.dumps(flat(ours)) == pickle.dumps(flat(theirs))
    with open(part / "metrics.csv") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    assert seconds == sorted(seconds)


def flat(x):
    """Nested dicts with lists in place of tensors."""
    if isinstance(x, dict):
        return {key: flat(value) for key, value in x.items()}
    return [flat(value) for value in x] if isinstance(x, (list, tuple)) else getattr(x, "tolist", lambda: x)()


def test_resuming_a_finished_run_changes_nothing(main, tmp_path, monkeypatch):
    folder = train(tmp_path, env="matrix_xor")
    folder = folder.rename(tmp_path / "seed")  # a value, not an option
    monkeypatch.chdir(tmp_path)
    before = torch.load("seed/checkpoint.pt", weights_only=True), rows("seed")
    written = os.stat("seed/checkpoint.pt").st_mtime_ns
    assert main("--resume", "seed", "--torch-threads", 1)[0] == 0
    after = torch.load("seed/checkpoint.pt", weights_only=True), rows("seed")
    assert flat(before[0]["learner"]) == flat(after[0]["learner"]) and before[1] == after[1]
    assert os.stat("seed/checkpoint.pt").st_mtime_ns == written


@pytest.mark.parametrize(
    "line, sentence",
    [("--env mpe_spread_5ag", "its env,"), ("""--env-kwargs '{"N": 5}'""", "its env_kwargs,")]
    + [("--no-anneal-lr", "leave out anneal_lr"), ("--num-envs 8", "leave out num_envs")],
)
def test_h_resume_keeps_the_runs_environment_and_options(line, sentence, trained, main):
    refused(sentence, trained, main, "--resume", trained, *shlex.split(line))


def test_h_resume_replaces_the_file_that_it_was_given(trained, tmp_path, main):
    copy = Path(shutil.copy(trained / "checkpoint.pt", tmp_path / "mine.pt"))
    code, _, err = main("--resume", copy)
    assert code == 2 and "resume needs a run's folder, or checkpoint.pt in it" in err
    assert main("--eval", copy)[0] == 0 and list(tmp_path.iterdir()) == [copy]


def test_eval_says_that_another_environment_has_its_own_options(main, tmp_path):
    folder = train(tmp_path, env="coordsum_3x10", env_kwargs='{"blur": 0}')
    assert "not used" not in main("--eval", folder)[1]
    code, out, _ = main("--eval", folder, "--env", "coordsum_3x10_official")
    assert code == 0 and """env_kwargs {"blur": 0} of the run are not used""" in out


def test_what_torchrun_started_goes_on_with_torchrun(monkeypatch):
    assert options.to_resume("R", magpo.Args()) == "python magpo.py --resume R"
    monkeypatch.setattr(options, "WORLD", 2)
    assert options.to_resume("R", magpo.Args()) == "torchrun --nproc-per-node 2 magpo.py --resume R"


# --- Checkpoints of strangers -------------------------------------------------------------------------------


class Runs:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def spoil(saved, path, value):
    """Put the value, or value(old), at a path of keys into a checkpoint."""
    *way, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    part = functools.reduce(operator.getitem, way, saved)
    if value is DELETE:
        del part[last]
    else:
        part[last] = value(part[last]) if callable(value) else value


DELETE, HEAD = object(), "policy_head.weight"
GARBAGE = [b"", b"Dear checkpoint,\n", pickle.dumps({"version": 2}), None, [1], {"weights": torch.zeros(3)}]
PARTS = "version args iteration rows here guider learner optimizer value_norm".split()
MALFORMED = {
    "cannot be read as a checkpoint": [
        *((key, DELETE) for key in PARTS),
        ("version", 1), ("version", torch.zeros(2)), ("args", None), ("args", [1]), ("iteration", "3"),
        ("iteration", -1), ("iteration", 99), ("rows", None), ("rows", [1, 2, 3]), ("rows/1", {}),
        ("rows/1/seconds", DELETE), ("rows/1/kl", "x"), ("rows/1/kl", 10**400),
        ("rows/1/kl", torch.zeros(1)), ("rows/0/kl", 10**19), ("guider", 3), ("args/env", None),
        ("args/env", "x\ny"), ("args/algo", ["magpo"]), ("optimizer", torch.zeros(1)), ("here", 0),
    ],
    "is of another magpo.py": [("args/seed", DELETE), ("args/speed", 3)],
    "/checkpoint.pt: ": [
        ("args/num_envs", "8"), ("args/num_envs", 8.0), ("args/num_envs", 0), ("args/gamma", "x"),
        ("args/lam", math.nan), ("args/algo", "x"), ("args/recurrent", 1), ("args/hidden_dim", -1),
        ("args/env", 3), ("args/env_kwargs", 3),
    ],
    "no environment": [("args/env", "clumsy"), ("args/env", "")],
    "env_kwargs": [("args/env_kwargs", "x"), ("args/env_kwargs", '{"device": "x"}')],
    "does not fit": [
        ("args/hidden_dim", 63), ("args/embed_dim", 33), ("args/recurrent", True),
        ("args/env", "mpe_spread_5ag"), ("args/state", True), ("learner", {}), ("learner/" + HEAD, DELETE),
        ("learner/" + HEAD, 3), ("learner/more", 3), ("learner/" + HEAD, lambda x: x[:, :-1]),
        ("learner/" + HEAD, lambda x: x.double()), ("learner/" + HEAD, lambda x: x * math.nan),
        ("guider/no_action", lambda x: x + math.inf),
        ("learner/" + HEAD, lambda x: torch.zeros(1, 1).expand(x.shape)),
        ("guider/no_action", lambda x: x.to("meta")), ("guider/no_action", lambda x: x.to_sparse()),
    ],
}  # fmt: skip
ONLY_TO_RESUME = {
    "does not fit": [
        ("value_norm/moments", torch.zeros(4)), ("value_norm/moments", lambda x: x * math.nan),
        ("value_norm", {}), ("optimizer/state", DELETE), ("optimizer/state", {}),
        ("optimizer/state/3", DELETE), ("optimizer/state/3", {}), ("optimizer/state", {9999: {}}),
        ("optimizer/state/3/exp_avg", torch.zeros(7)), ("optimizer/state/3/step", "x"),
        ("optimizer/state/3/exp_avg_sq", lambda x: x * math.inf),
        ("here/generator", torch.zeros(3, dtype=torch.uint8)),
        ("here/generator", lambda x: torch.zeros_like(x) + 255), ("here/generator", None),
        ("here/memory", None), ("here/memory", lambda x: x[:1]), ("here/episode_return", torch.zeros(9)),
        ("here/envs", {}), ("here/envs", 5), ("here/envs/position", torch.zeros(8, 4, 2)),
        ("here/envs/time", "x"), ("here/envs/generator", DELETE),
        ("here/envs/velocity", lambda x: x * math.nan), ("here/more", 3), ("args/num_envs", 4),
    ],
    "total_timesteps must be": [("args/num_envs", 10**12)],
}  # fmt: skip


@pytest.mark.parametrize("option", ["--eval", "--resume"])
@pytest.mark.parametrize(
    "garbage", [*GARBAGE, Runs, "cut", "none"], ids=lambda x: re.sub(r"\W+", "_", str(x)[:20])
)
def test_j_what_is_no_checkpoint(garbage, option, trained, tmp_path, main):
    path = tmp_path / "checkpoint.pt"
    if isinstance(garbage, bytes):
        path.write_bytes(garbage)
    elif garbage == "cut":
        path.write_bytes((trained / "checkpoint.pt").read_bytes()[:-200])
    elif garbage is Runs:
        torch.save(dict(version=4, args=Runs(tmp_path / "pwned")), path)
    elif garbage != "none":
        torch.save(garbage, path)
    refused(f"{path} cannot be read as a checkpoint", tmp_path, main, option, tmp_path)
    if garbage is Runs:  # the same file does run code where it is trusted
        torch.load(path, weights_only=False)
        assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("option", ["--eval", pytest.param("--resume", marks=pytest.mark.slow)])
def test_j_malformed_checkpoints(option, trained, tmp_path, main):
    data = (trained / "checkpoint.pt").read_bytes()
    for sentence, changes in [*MALFORMED.items(), *(ONLY_TO_RESUME.items() if option == "--resume" else ())]:
        for where, value in changes:
            saved = torch.load(io.BytesIO(data), weights_only=True)
            spoil(saved, where, value)
            torch.save(saved, tmp_path / "checkpoint.pt")
            print(where, value)
            refused(sentence, tmp_path, main, option, tmp_path)


@pytest.mark.parametrize("size, resumed", [(10**7, "too large"), (256, "does not fit")])
def test_j_nothing_is_built_before_a_file_fits(size, resumed, trained, tmp_path, main, monkeypatch):
    saved = torch.load(trained / "checkpoint.pt", weights_only=True)
    saved["args"]["hidden_dim"] = size
    for part in (saved["learner"], saved["guider"]):
        for name, x in part.items():  # tensors that only say that they are so large
            part[name] = torch.zeros(()).expand([size if length == 128 else length for length in x.shape])
    torch.save(saved, tmp_path / "checkpoint.pt")
    devices, orthogonal = set(), torch.nn.init.orthogonal_
    watched = lambda x, *gain: devices.add(x.device.type) or orthogonal(x, *gain)  # noqa: E731
    monkeypatch.setattr(torch.nn.init, "orthogonal_", watched)
    refused("is not finite", tmp_path, main, "--eval", tmp_path)
    refused(resumed, tmp_path, main, "--resume", tmp_path)
    assert devices == {"meta"}


def test_j_a_file_names_nothing_that_is_imported_or_written(trained, clumsy, main):
    """Its folder is the current one, where a module of the stranger's lies."""
    (clumsy / "clumsy.py").write_text("import pathlib; pathlib.Path('pwned').touch()\n" + CLUMSY)
    saved = torch.load(trained / "checkpoint.pt", weights_only=True)
    kwargs = '{"length": 3}'
    saved["args"] |= dict(env="pettingzoo:clumsy", env_kwargs=kwargs, runs_dir="x", eval="x", resume="y")
    saved["args"] |= dict(num_workers=8, torch_threads=99999, track=True, cuda=True, compile=True)
    torch.save(saved, "checkpoint.pt")
    for option in ("--eval", "--resume"):
        for more in ([], ["--env", "pettingzoo:clumsy"]):
            code, _, err = main(option, "checkpoint.pt", *more)
            assert code == 2 and f"add --env pettingzoo:clumsy --env-kwargs '{kwargs}'" in err
        code, _, err = main(option, "checkpoint.pt", "--env", "pettingzoo:clumsy", "--env-kwargs", kwargs)
        assert code == 2 and "does not fit" in err  # imported now, and of another shape
        assert Path("pwned").exists()
        Path("pwned").unlink()
        sys.modules.pop("clumsy")
    assert {path.name for path in clumsy.iterdir()} <= {"clumsy.py", "checkpoint.pt", "__pycache__"}
    saved["args"]["env"], saved["args"]["env_kwargs"] = "mpe_spread", "{}"
    torch.save(saved, "checkpoint.pt")
    args, *_ = magpo.load("checkpoint.pt")
    names = [name for name in options.NOT_FROM_FILES if getattr(args, name) != getattr(magpo.Args(), name)]
    assert names == []


def test_j_the_printed_command_resumes_a_run_on_other_code(main, clumsy):
    line = words(env="pettingzoo:clumsy", env_kwargs='{"wrong": "raises", "at": 70}', save_every=1, **QUICK)
    code, _, err = main(*line)
    command = re.search(r"the checkpoint is of iteration 1. To go on: python magpo.py (.*)", err)[1]
    assert code == 1 and "--env pettingzoo:clumsy --env-kwargs" in command
    sys.modules["clumsy"].steps = -999
    code, out, err = main(*shlex.split(command))
    assert code == 0 and "Episodes start anew" in out
    (folder,) = clumsy.glob("runs/*")
    refused("its env_kwargs,", folder, main, *shlex.split(command)[:4], "--env-kwargs", "{}")
    with pytest.raises(ValueError, match="add --env pettingzoo:clumsy"):
        magpo.train(magpo.Args(resume=str(folder)))


# --- Failures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong, words_of_it", [("raises", "KeyError"), ("short", "agent")])
@pytest.mark.parametrize(
    "at, kept", [(20, "0 of 3 iterations are done; nothing was saved"), (70, "of iteration 1. To go on:")]
)
def test_i_an_environment_that_fails(wrong, words_of_it, at, kept, main, clumsy):
    kwargs = json.dumps(dict(wrong=wrong, at=at))
    code, _, err = main(*words(env="pettingzoo:clumsy", env_kwargs=kwargs, save_every=1, **QUICK))
    first, *more = err[err.index("magpo.py: pettingzoo:clumsy") :].splitlines()
    assert code == 1 and kept in first and words_of_it in first and "step" in first
    assert ("a bug of the user's" in more[-1] and "clumsy.py" in err) if wrong == "raises" else more == []


BLAMED = {  # clumsy's env_kwargs -> what is said
    '{"wrong": "nan", "at": 100}': "rewards is .*: the environment pettingzoo:clumsy",
    '{"wrong": "huge", "at": 100}': "(returns|advantages) is .*: rewards of 3e[+]38",
    "{}": "is not finite; likely cause: (ent_coef of 1e|learning_rate of 1e)",
}


@pytest.mark.parametrize("kwargs", BLAMED)
def test_g_what_is_not_finite_is_blamed_on_its_cause(kwargs, clumsy, main):
    coefficients = dict(ent_coef=1e17, learning_rate=1e9) if kwargs == "{}" else {}
    code, _, err = main(*words(env="pettingzoo:clumsy", env_kwargs=kwargs, **QUICK | coefficients))
    sentence = f"magpo.py: iteration [123]: .*{BLAMED[kwargs]}.*nothing was saved yet.\n$"
    assert code == 1 and re.search(sentence, err), err[-500:]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, main):
    calls, loss = [], magpo.learner_loss
    broken = lambda *x: calls.append(0) or loss(*x) * (math.inf if len(calls) == 20 else 1)  # noqa: E731
    monkeypatch.setattr(magpo, "learner_loss", broken)
    code, _, err = main(*words(env="mpe_spread", runs_dir=tmp_path, save_every=1, **QUICK))
    assert code == 1 and "2 of 3 iterations are done; the checkpoint is of iteration 2" in err
    assert "iteration 3: learner_loss is not finite; likely cause: a learning_rate too high" in err
    assert checkpoint.Checkpoint(next(tmp_path.glob("*"))).iteration == 2


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, monkeypatch, main):
    calls, fsync = [], os.fsync

    def full(file):
        calls.append(0)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = main(*words(env="matrix_xor", runs_dir=tmp_path, save_every=1, **QUICK))
    said = r"magpo.py: .*No space left .*3 of 3 iterations are done; the checkpoint is of iteration 2.*\n$"
    assert code == 1 and re.search(said, err)
    assert checkpoint.Checkpoint(next(tmp_path.glob("*"))).iteration == 2


@pytest.mark.parametrize("bug", [KeyError, ValueError, ZeroDivisionError])
def test_what_nobody_foresaw_keeps_its_traceback(bug, tmp_path, monkeypatch, main):
    def broken(*_):
        raise bug("of ours")

    monkeypatch.setattr(magpo, "compute_gae", broken)
    code, _, err = main(*words(env="matrix_xor", runs_dir=tmp_path, **QUICK))
    said = f"magpo.py: {bug.__name__}: '?of ours'?. 0 of 3 iterations are done; nothing was saved"
    assert code == 1 and "Traceback" in err and re.search(said, err)


# --- Signals, kills and locks -------------------------------------------------------------------------------

LONG = "--env coordsum_3x10 --num-envs 8 --num-minibatches 4 --total-timesteps 1e8 --save-every 1"


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("number", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_after_its_iteration(number, tmp_path):
    process = shell(f"{HERE / 'magpo.py'} {LONG}", tmp_path)
    wait_for(lambda: [*tmp_path.glob("runs/*/checkpoint.pt")])
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "mean team return" not in out and "Stopping. An iteration" in err
    (folder,) = tmp_path.glob("runs/*")
    assert f"To go on: python magpo.py --resume {folder.relative_to(tmp_path)}\n" in out
    assert checkpoint.Checkpoint(folder).iteration == len(rows(folder))


@pytest.mark.slow
def test_fifty_kills_leave_a_checkpoint_that_loads(tmp_path, monkeypatch):
    """kill -9 after random times, from 0 to 2 s; each process goes on from what the one before it left."""
    folder = train_until(1, tmp_path, monkeypatch, env="coordsum_3x10", save_every=1, total_timesteps=10**8)
    rng, fork, iterations = random.Random(0), multiprocessing.get_context("fork"), []
    for _ in range(50):
        process = fork.Process(target=magpo.train, args=(magpo.Args(resume=str(folder)),))
        process.start()
        process.join(rng.uniform(0, 2))
        process.kill(), process.join()
        iterations.append(checkpoint.Checkpoint(folder).iteration)
        assert len(rows(folder)) - iterations[-1] <= 1
    assert iterations == sorted(iterations) and iterations[-1] > 5


def test_k_two_processes_on_one_run(clumsy, main, monkeypatch):
    """The owner is killed, its worker processes live on: they do not keep anyone out."""
    kwargs = dict(env="pettingzoo:clumsy", num_envs=2, num_minibatches=2)
    folder = train_until(1, clumsy, monkeypatch, total_timesteps=10**8, **kwargs)
    line = f"--resume {folder} --env pettingzoo:clumsy --num-workers 2"
    owner = shell(f"{HERE / 'magpo.py'} {line}", clumsy)
    wait_for(lambda: len(rows(folder)) > 2)
    code, _, err = main(*line.split())
    assert code == 2
    assert err.endswith(f"magpo.py: {folder} is in use by another process: wait for it, or stop it.\n")
    assert main("--eval", folder, "--env", "pettingzoo:clumsy")[0] == 0  # to read it needs no lock
    children = Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().split()
    owner.kill(), owner.wait()
    try:
        assert len(children) >= 2
        magpo.train(magpo.Args(resume=str(folder), env="pettingzoo:clumsy"), [2])
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
    assert "\0" not in (folder / "metrics.csv").read_text()


def test_k_a_checkpoint_that_changed_since_it_was_read(trained, monkeypatch):
    read = checkpoint.Checkpoint.__init__

    def and_then_it_changes(self, path):
        read(self, path)
        self.changed -= 1

    monkeypatch.setattr(checkpoint.Checkpoint, "__init__", and_then_it_changes)
    with pytest.raises(ValueError, match="in use by another process"):
        magpo.train(magpo.Args(resume=str(trained)))


# --- torchrun -----------------------------------------------------------------------------------------------

TORCHRUN = """
import atexit, glob, os, signal, sys
def threads_left():
    names = [open(name).read().strip() for name in glob.glob("/proc/self/task/*/comm")]
    print("threads:", names, file=sys.stderr)
atexit.register(threads_left)  # first in, last out
import torch, magpo
from run import Run
from support.machine import RANK, WORLD
folder, mode, saved, stop = sys.argv[1], sys.argv[2], {}, []
build = magpo.build
magpo.build = lambda *x: saved.setdefault("nets", build(*x))
options = dict(env="mpe_spread", num_envs=8, num_steps=5, num_minibatches=4, total_timesteps=120)
options |= dict(eval_episodes=8, runs_dir=folder)
if mode == "stop" and RANK == 1:
    mean = Run.mean
    Run.mean = lambda self, at, *x: stop.extend([2] * (at == 2)) or mean(self, at, *x)
if mode == "first_step":  # the same data in one process as in two: copies, actions and their order fixed
    options |= dict(num_minibatches=1, update_epochs=1, total_timesteps=40, max_grad_norm=1e9)
    make = magpo.make_envs
    class Half:
        def __init__(self, args, num_envs, device="cpu"):
            self.envs, self.num_envs = make(args, 8, device), num_envs
            self.mine = slice(RANK * num_envs, (RANK + 1) * num_envs)
            self.observation_space = make(args, num_envs).observation_space
        def __getattr__(self, name):
            return getattr(self.envs, name)
        def cut(self, x):
            return {k: self.cut(v) for k, v in x.items()} if isinstance(x, dict) else x[self.mine]
        def reset(self, seed, options=None):
            return map(self.cut, self.envs.reset(seed=1))
        def step(self, actions):
            everyone = torch.zeros(8, 3, dtype=torch.long)
            everyone[self.mine] = actions
            return map(self.cut, self.envs.step(everyone))
    magpo.make_envs, magpo.evaluate = Half, lambda *_: torch.zeros(2)
    magpo.sample = lambda policy: policy.logits.argmax(-1)
magpo.train(magpo.Args(**options), stop)
parameters = [x for net in saved["nets"] for x in net.parameters()]
result = [[x.data for x in parameters], [x.grad for x in parameters], torch.rand(3), stop]
torch.save(result, f"{folder}/{WORLD}{RANK}.pt")
"""


def torchrun(processes, mode, folder):
    (folder / "script.py").write_text(TORCHRUN)
    line = f"-m torch.distributed.run --standalone --nproc-per-node {processes} script.py {folder} {mode}"
    process = shell(line, folder)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    # A thread of gloo's that outlives the process group may abort its process when the interpreter ends
    assert err.count("threads:") == processes and not re.search("threads:.*gloo", err)
    return out, [torch.load(folder / f"{processes}{rank}.pt") for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_stay_equal(tmp_path):
    printed, (first, second) = torchrun(2, "train", tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(first[0], second[0], strict=True))
    assert not torch.equal(first[2], second[2])  # while each drew random numbers of its own
    (folder,) = tmp_path.glob("mpe_spread*")  # one folder, one table: rank 0's
    assert printed.count("learner_greedy") == 1
    assert [row["step"] for row in rows(folder)] == ["40", "80", "120"]


@pytest.mark.slow
def test_a_stop_on_any_rank_stops_all_after_the_same_iteration(tmp_path):
    printed, (first, second) = torchrun(2, "stop", tmp_path)
    assert first[3] == second[3] == [2]
    assert "2 of 3 iterations are done; the checkpoint is of iteration 2" in printed
    assert "learner_greedy" not in printed and len(rows(next(tmp_path.glob("mpe_spread*")))) == 2


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    """With copies, actions and their order fixed, two halves' gradients average to the whole's."""
    ((_, one, *_),) = torchrun(1, "first_step", tmp_path)[1]
    for _, gradients, *_ in torchrun(2, "first_step", tmp_path)[1]:
        assert sum(x.abs().sum() for x in one) > 0.1
        for x, y in zip(one, gradients, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_b_ranks_have_random_numbers_of_their_own(monkeypatch, tmp_path):
    """PyTorch's generator heeds 32 bits of a seed only: ranks are told apart by their first numbers."""
    drawn = set()
    for rank in range(3):
        monkeypatch.setattr(machine, "RANK", rank)
        monkeypatch.setattr(sys, "stdout", sys.stdout)
        a_run = Run(args := magpo.Args(env="mpe_spread", num_envs=16, runs_dir=str(tmp_path)))
        env = magpo.make_envs(args, 16)
        networks = a_run.networks(magpo.build, env)
        drawn.add(("the same", *networks[1].policy_head.weight[0, :3].tolist()))
        a_run.open(env, magpo.new_memory(args, env), optimizer=None)
        of_envs = env.reset(seed=a_run.seed)[0].sum().item()
        drawn |= set(enumerate([random.random(), np.random.rand(), torch.rand(1).item(), of_envs]))
    assert len(drawn) == 1 + 3 * 4
