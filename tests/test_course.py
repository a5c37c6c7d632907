"""The course kit: the hand-out lacks the exercises' bodies and nothing else; each bug breaks an invariant."""

import ast
import csv
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import magpo
from course import handout

ROOT = Path(__file__).parents[1]
COURSE = (ROOT / "course" / "COURSE.md").read_text()
in_clone = pytest.mark.skipif(not handout.BUGS, reason="a hand-out has neither solutions nor bugs")


def run(command, cwd):
    command = [sys.executable, *shlex.split(command)[1:]]
    env = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)


# --- The hand-out -------------------------------------------------------------------------------------------


@in_clone
def test_the_hand_out_lacks_the_bodies_and_nothing_else(tmp_path):
    folder = tmp_path / "course"
    handout.handout(folder)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert names == {name for name in listed.stdout.split() if not name.startswith(handout.LEFT_OUT)}
    changed = {name for name in names if (folder / name).read_bytes() != (ROOT / name).read_bytes()}
    assert changed == {"magpo.py"}

    clean, cut = (handout.functions((place / "magpo.py").read_text()) for place in (ROOT, folder))
    blank = {name for name in clean if ast.dump(clean[name]) != ast.dump(cut[name])}
    assert blank == {
        "compute_gae",
        "Guider.forward",
        "Guider.act",
        "guider_loss",
        "learner_loss",
        "backtrack",
    }
    for name in blank:
        docstring, body = cut[name].body
        assert ast.get_docstring(cut[name]) == ast.get_docstring(clean[name])
        assert ast.unparse(body) == "raise NotImplementedError"
    # Nothing else of the file is touched, comments included, and the bodies stand nowhere else
    source, lines = (
        (ROOT / "magpo.py").read_text().splitlines(),
        (folder / "magpo.py").read_text().splitlines(),
    )
    gone = [
        line.strip()
        for name in blank
        for line in source[clean[name].body[1].lineno - 1 : clean[name].end_lineno]
    ]
    rest = [line for line in source if line.strip() not in gone]
    assert rest == [line for line in lines if line.strip() not in [*gone, "raise NotImplementedError"]]
    texts = "".join(
        (folder / name).read_text(errors="ignore") for name in names if name.endswith((".py", ".md"))
    )
    assert not [line for line in gone if len(line) > 45 and line in texts]


@in_clone
@pytest.mark.slow
@pytest.mark.parametrize("solved", range(6))
def test_exercises_fail_until_they_are_solved(solved, tmp_path):
    """In the order 1 to 5, each needs those before it at most."""
    handout.handout(tmp_path / "course", range(1, solved + 1))
    result = run(
        "python -m pytest -q --tb=no -rA -k 'exercise and not learning' test_magpo.py", tmp_path / "course"
    )
    outcomes = set(
        re.findall(r"^(PASSED|FAILED|ERROR) test_magpo.py::test_exercise_(\d)", result.stdout, re.M)
    )
    assert outcomes == {("PASSED" if number <= solved else "FAILED", str(number)) for number in range(1, 6)}


def test_a_function_that_is_gone_is_named():
    with pytest.raises(ValueError, match="magpo.py has no B.f"):
        handout.without_bodies("def f():\n    pass\n", ["B.f"])


@pytest.mark.parametrize("words", ["", ".", "bug 0 x", "bug x", "a b"])
def test_wrong_words_end_in_one_sentence(words, tmp_path):
    result = run(f"python {ROOT / 'course' / 'handout.py'} {words}", tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@in_clone
def test_a_random_bug_is_one_of_the_five(tmp_path, monkeypatch):
    monkeypatch.setattr(handout.random, "choice", lambda numbers: numbers[1])
    handout.bug("random", tmp_path / "random")
    handout.bug("2", tmp_path / "second")
    sources = [(tmp_path / name / "magpo.py").read_text() for name in ("random", "second")]
    assert sources[0] == sources[1] != (ROOT / "magpo.py").read_text()


def test_a_handout_says_that_it_has_no_bugs(tmp_path, monkeypatch):
    monkeypatch.setattr(handout, "BUGS", {})
    for number in ("2", "random"):
        with pytest.raises(ValueError, match="A hand-out holds no bugs"):
            handout.bug(number, tmp_path / "bug")


@in_clone
@pytest.mark.slow
def test_the_documented_commands_run_as_written(tmp_path):
    """In a folder of the test's own instead of the one beside the project. Each pytest line finds tests."""
    blocks = re.findall(r"```bash\n(.*?)```", COURSE, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    makes = [line for line in lines if line.startswith("python course/handout.py")]
    for line in makes:
        assert run(line.replace("../", f"{tmp_path}/"), ROOT).returncode == 0, line
    for line in (line for line in lines if line.startswith("pytest")):
        result = run(f"python -m {line} --collect-only -q", tmp_path / "course")
        assert result.returncode == 0, result.stdout
    assert len(makes) == 2 and (tmp_path / "bugged" / "magpo.py").exists()


# --- The bug hunt -------------------------------------------------------------------------------------------


def metrics(module, folder, **options):
    """Rows of a short training's metrics.csv, and the run's folder."""
    defaults = dict(env="matrix_sum10", num_envs=64, eval_episodes=1, eval_every=1, runs_dir=str(folder))
    path = module.train(module.Args(**defaults | options))
    with open(path / "metrics.csv") as file:
        return [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)], path


# A gradient step per rollout: mu is still mu_old, and clip_frac 0 however narrow the clip
ONE_STEP = dict(update_epochs=1, num_minibatches=1, clip_coef=0.001)


def ratio_is_one(module, folder):
    rows, _ = metrics(module, folder, total_timesteps=64 * 8 * 4, **ONE_STEP)
    assert max(row["clip_frac"] for row in rows) == 0


def time_outs_bootstrap(module, folder):
    """A reward of 1 a step is worth 1 / (1 - gamma), time-out or not: nothing is above what was expected."""
    values, ends = torch.full((3, 1, 2), 10.0), torch.tensor([False, True, True]).view(3, 1, 1)
    advantages, _ = module.compute_gae(torch.ones(3, 1, 1), values, values, ends & False, ends, 0.9, 0.95)
    assert advantages.abs().max() < 1e-5


def memory_advances(module, folder):
    """The update sees the very memory that the rollout acted with."""
    sizes = dict(env="mpe_spread", num_envs=8, num_steps=6, total_timesteps=8 * 6 * 3)
    rows, _ = metrics(module, folder, algo="mappo", recurrent=True, hidden_dim=16, **sizes, **ONE_STEP)
    assert max(row["clip_frac"] for row in rows) == 0


def evaluation_is_of_the_updated_learners(module, folder):
    """The last logged return is what the checkpoint's learners earn with the same seed."""
    sizes = dict(env="mpe_spread", num_envs=8, num_steps=5, num_minibatches=1, total_timesteps=8 * 5 * 3)
    sizes["learning_rate"] = 0.1  # every update is to change what the few episodes return
    with mock.patch.object(module, "evaluate", wraps=module.evaluate) as evaluate:
        rows, path = metrics(module, folder, **sizes)
    args, guider, learner = module.load(path)
    episodes = [call.args[4] for call in evaluate.call_args_list if call.args[5] == args.seed + 1][-1]
    returns = module.evaluate(args, guider, learner, "learner", episodes, args.seed + 1)
    assert rows[-1]["learner_return"] == pytest.approx(returns.mean().item(), abs=1e-5)


def guider_is_causal(module, folder):
    torch.manual_seed(0)
    guider, actions = module.Guider(3, 4, 2, continuous=True), torch.rand(3, 2, requires_grad=True)
    mu, _ = guider(torch.rand(3, 4), actions)
    for j, mean in enumerate(mu.base_dist.loc):
        (gradient,) = torch.autograd.grad(mean.sum(), actions, retain_graph=True)
        assert (gradient[j:] == 0).all()


INVARIANTS = {
    "1": ratio_is_one,
    "2": time_outs_bootstrap,
    "3": memory_advances,
    "4": evaluation_is_of_the_updated_learners,
    "5": guider_is_causal,
}


@in_clone
@pytest.mark.parametrize("number", INVARIANTS)
def test_each_bug_applies_and_breaks_its_invariant(number, tmp_path, monkeypatch):
    assert handout.BUGS.keys() == INVARIANTS.keys()
    INVARIANTS[number](magpo, tmp_path)
    handout.bug(number, tmp_path / "bug")
    spec = importlib.util.spec_from_file_location("bugged", tmp_path / "bug" / "magpo.py")
    bugged = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bugged", bugged)  # where dataclasses look for it
    spec.loader.exec_module(bugged)
    with pytest.raises(AssertionError):
        INVARIANTS[number](bugged, tmp_path)


@in_clone
@pytest.mark.slow
def test_symptoms_are_shown_clean_and_bugged(tmp_path, monkeypatch):
    from course.bugs import symptoms

    monkeypatch.setattr(symptoms, "__file__", str(tmp_path / "symptoms.py"))
    monkeypatch.setattr(symptoms, "SEEDS", (1,))
    options = f"--env matrix_sum10 --total-timesteps 3072 {symptoms.ONE_STEP}"
    monkeypatch.setattr(
        symptoms, "RUNS", [("5", options, "largest clip_frac", symptoms.largest("clip_frac"))]
    )
    symptoms.main([])
    with open(tmp_path / "symptoms.csv") as file:
        clean, bugged = csv.DictReader(file)
    assert (clean["tree"], float(clean["highest"])) == ("clean", 0) and float(bugged["lowest"]) > 0
