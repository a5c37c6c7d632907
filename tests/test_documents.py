"""The documents: commands are run, links and names lead somewhere, code runs, scripts print the tables."""

import csv
import os
import re
import shlex
import subprocess
import sys
import urllib.parse
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest
import torch
from mpe2 import simple_spread_v3

import magpo
from results import make
from theory import gap

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "TUTORIAL.md", "course/COURSE.md", "course/bugs/ANSWERS.md", "results/RESULTS.md")
TEXTS = {name: (ROOT / name).read_text() for name in DOCUMENTS}
TESTS = "\n".join(path.read_text() for path in [ROOT / "test_magpo.py", *ROOT.glob("tests/*.py")])
PROSE = {name: re.sub(r"```.*?```", "", text, flags=re.S) for name, text in TEXTS.items()}
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXTS["TUTORIAL.md"], re.S)


def run(command, cwd, **env):
    command = [sys.executable, *shlex.split(command)[1:]]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)


# --- Commands -----------------------------------------------------------------------------------------------


def commands(text):
    """Command lines in a document's bash blocks, and between single backticks in its prose."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += re.findall(r"`((?:python|pytest|torchrun|pip) [^`]*)`", prose)
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in dict.fromkeys(parts) if part and not part.startswith(("cd ", "pip "))]


COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in commands(text)))
TRAIN = [line for line in COMMANDS if re.match(r"python magpo.py --env (?!pettingzoo:my_team)", line)]
RUN_BY = {  # the tests that run the others
    "python magpo.py --env pettingzoo:my_team": "test_the_tutorials_own_environment_is_learned",
    "python magpo.py --help": "test_help_is_grouped_and_fits_80_columns",
    "python theory/gap.py": "test_the_imitation_gap_is_what_the_tutorial_says",
    "python theory/kl_direction.py": "test_the_kl_table_and_picture_regenerate",
    "python course/handout.py": "test_the_documented_commands_run_as_written",
    "python course/bugs/symptoms.py": "test_symptoms_are_shown_clean_and_bugged",
    "pytest": "test_the_documented_commands_run_as_written",
    "torchrun": "test_the_documented_torchrun_runs",
    "python results/references.py": "test_references_are_what_their_policies_earn",
    "python results/compare.py": "test_compare_prints_and_draws",
    "python results/export.py": "test_an_exported_learner_needs_no_project",
    "python results/watch.py": "test_watch_films_what_the_learners_do",
    "python results/make.py sweep": "test_sweeps_go_on_where_they_stopped",
    "python results/make.py tables": "test_the_tables_of_results_are_printed",
    "python results/make.py halfway": "test_halfway_is_where_each_run_first_stands_at_half_of_mappos_best",
    "python results/make.py draw": "test_every_picture_is_drawn",
    "python results/make.py record": "test_the_record_is_measured_and_printed",
    "python results/make.py random": "test_random_play_is_written_down",
    "python results/make.py healthy": "test_healthy_ranges_hold_nine_of_ten_values",
    "python results/details.py": "test_details_train_and_change_something",
    "python results/imitation.py": "test_imitation_runs",
    "python results/speed.py throughput": "test_throughput_takes_ratios_within_a_round",
    "python results/speed.py suites": "test_suites_are_timed",
    "python results/speed.py profile": "test_profile_adds_up",
    "python results/speed.py growth": "test_growth_is_written_and_drawn",
    "python results/speed.py quality": "test_quality_reads_the_first_step_at_which_a_score_stands",
    "python results/speed.py gpu": "test_gpu_without_one_is_one_sentence",
}


@pytest.mark.parametrize("command", [line for line in COMMANDS if line not in TRAIN])
def test_every_command_is_run_by_a_test(command):
    tests = [test for start, test in RUN_BY.items() if command.startswith(start)]
    assert any(f"def {test}(" in TESTS for test in tests)


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAIN)
def test_training_commands_run(command, tmp_path):
    small = "--total-timesteps 240 --num-envs 8 --num-steps 10 --num-minibatches 2 --eval-episodes 8"
    result = run(f"{command.replace('magpo.py', str(ROOT / 'magpo.py'))} {small}", tmp_path)
    if re.search("No module named '(lbforaging|jax|jumanji)", result.stderr):
        pytest.skip("an optional package is not installed")
    assert result.returncode == 0 and "learner_greedy" in result.stdout, result.stderr


@pytest.mark.slow
def test_the_documented_torchrun_runs(tmp_path):
    (command,) = [line for line in COMMANDS if line.startswith("torchrun")]
    command = command.replace("torchrun", "python -m torch.distributed.run")
    command = command.replace("magpo.py", str(ROOT / "magpo.py"))
    result = run(f"{command} --total-timesteps 320 --num-envs 16 --num-steps 10 --eval-episodes 16", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("learner_greedy") == 1 and len(list(tmp_path.glob("runs/*"))) == 1


# --- Links and names ----------------------------------------------------------------------------------------


def anchors(document):
    """Anchors of a Markdown file, as GitHub makes them from its headings."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    headings = re.findall(r"^#+ +(.+)$", text, re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]*)\)", PROSE[document]):
        if ":" in target:  # the web; only its form, as CI may be without it
            url = urllib.parse.urlsplit(target)
            good = url.scheme == "https" and "." in url.netloc
        else:
            path, _, anchor = target.partition("#")
            file = (ROOT / document).parent / path if path else ROOT / document
            good = file.exists() and (not anchor or anchor in anchors(file))
        wrong += [] if good else [target]
    assert not wrong


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_between_backticks_exist(document):
    code = "\n".join(path.read_text() for path in ROOT.rglob("*.py") if "test" not in path.name)
    options = {"help"} | {field.name.replace("_", "-") for field in fields(magpo.Args)}
    given = re.findall(r'add_argument\(f?"--([a-z-]+)', code) + ["nproc-per-node", "standalone", "residual"]
    wrong = []
    for span in re.findall(r"`([^`\n]+)`", PROSE[document]):
        if span.startswith(("--", "python ")):
            names = [name.removeprefix("no-") for name in re.findall(r"--([a-z][a-z-]*)", span)]
            good = all(name in options or name in given for name in names)
        elif re.fullmatch(r"test_\w*\*?", span):
            good = re.search(rf"def {span.removesuffix('*')}" + ("" if span.endswith("*") else r"\("), TESTS)
        elif re.fullmatch(r"[\w./-]+\.(py|md|txt)", span):
            good = span == "my_team.py" or any((ROOT / place / span).exists() for place in ("", "course"))
        elif re.fullmatch(r"[A-Za-z_]\w*(\.\w+)?(\(\))?", span):
            good = all(re.search(rf"\b{part}\b", code) for part in span.removesuffix("()").split("."))
        else:
            continue
        wrong += [] if good else [span]
    assert not wrong


def test_documents_keep_their_size():
    """A student reads TUTORIAL in ninety minutes, and README on a screen."""
    assert len(TEXTS["TUTORIAL.md"].split()) <= 4000
    assert len(TEXTS["README.md"].splitlines()) <= 65


# --- Numbers ------------------------------------------------------------------------------------------------


def test_the_tables_of_results_are_printed(capsys):
    """RESULTS.md's tables of sweeps are what `make.py tables` prints; README's means are, too."""
    make.tables()
    printed = capsys.readouterr().out.splitlines()
    sweeps = re.findall(r"^\| `sweep .*\n(?:\|.*\n)+", TEXTS["results/RESULTS.md"], re.M)
    rows = [row for sweep in sweeps for row in sweep.splitlines()]
    assert len(rows) > 40 and not [row for row in rows if row not in printed]
    means = re.findall(r"\*{0,2}(-?\d+\.\d\d)\*{0,2} (\[[^\]]+\])", TEXTS["README.md"])
    assert len(means) >= 8 and all(f"**{mean}** {interval}" in "".join(printed) for mean, interval in means)


def test_the_tutorials_tables_are_printed(capsys):
    """The gap, the KL's direction, and the two tables of training are what their commands print or write."""
    gap.main()
    printed = capsys.readouterr().out
    block = re.search(r"```text\nbacktracking.*?\n(.*?)```", TEXTS["TUTORIAL.md"], re.S)[1]
    assert block.count("\n") == 7 and all(line in printed for line in block.splitlines())
    with open(ROOT / "theory" / "kl_direction.csv") as file:
        first, last = (
            {(r["game"], float(r["eta"])): r for r in rows} for rows in split(csv.DictReader(file))
        )
    told = re.findall(r"^\| (climbing|penalty) \| ([\d.]+) \| (.*) \|$", TEXTS["TUTORIAL.md"], re.M)
    assert len(told) == 3
    for game, eta, cells in told:
        rows = first[game, float(eta)], last[game, float(eta)]
        numbers = [(float(row["worst_change"]), 100 * float(row["share_at_optimum"])) for row in rows]
        seen = [float(x.removesuffix(" %")) for x in cells.split(" | ")]
        assert seen == pytest.approx([x for pair in numbers for x in pair], abs=0.5)
    make.tables()
    printed = capsys.readouterr().out
    parts = TEXTS["TUTORIAL.md"].split("| `coordsum_3x10`, five seeds")[1].split("Climbing is a table")[0]
    means = re.findall(r"\d+\.\d\d", "".join(re.findall(r"^\|.*", parts, re.M)))
    assert len(means) == 11 and all(re.search(rf"\b{mean}\b", printed) for mean in means)


def split(rows):
    """Rows with the guider first in the KL, and with the learner first."""
    rows = list(rows)
    return [[row for row in rows if row["direction"] == name] for name in ("guider_first", "learner_first")]


@pytest.mark.skipif(not (ROOT / "course" / "bugs").exists(), reason="a hand-out has no bugs")
def test_the_symptoms_told_are_those_measured():
    with open(ROOT / "course" / "bugs" / "symptoms.csv") as file:
        rows = list(csv.DictReader(file))
    for clean, bugged in zip(rows[::2], rows[1::2], strict=True):
        ranges = [f"{row['lowest']} to {row['highest']}" for row in (clean, bugged)]
        line = f"| {clean['bug']} | `{clean['options']}` | {clean['symptom']} | {ranges[0]} | {ranges[1]} |"
        assert line.replace("0 to 0 ", "0 ") in TEXTS["course/bugs/ANSWERS.md"]


def test_the_push_table_is_eq_9():
    rows = re.findall(r"^\| ([+-]1) \| (.*) \|$", PROSE["TUTORIAL.md"], re.M)
    assert len(rows) == 6
    for advantage, cells in rows:
        mu, pi, r, gap, objective, m, push = map(float, cells.split(" | ")[:7])
        log_mu = torch.tensor(mu).log().requires_grad_()
        log_pi, log_mu_old = torch.tensor(pi).log(), torch.tensor(0.25).log()
        zero, A = torch.zeros(()), torch.tensor(float(advantage))
        loss, masked, _ = magpo.guider_loss(log_mu, log_pi, log_mu_old, A, zero, 0.2, 1.5)
        (gradient,) = torch.autograd.grad(loss, log_mu)
        seen = [mu / 0.25, mu / pi, -loss.item(), masked.item(), -gradient.item()]
        assert seen == pytest.approx([r, gap, objective, m, push], abs=0.0051)


# --- Code ---------------------------------------------------------------------------------------------------


def snippet(text):
    (code,) = [code for code in SNIPPETS if text in code]
    return code


def train(folder, **options):
    """An untrained mpe_spread run's folder."""
    sizes = dict(
        num_envs=8, num_steps=5, num_minibatches=1, total_timesteps=40, eval_episodes=1, hidden_dim=16
    )
    return magpo.train(magpo.Args(env="mpe_spread", runs_dir=str(folder), **sizes, **options))


def test_the_sample_by_hand(capsys):
    code = snippet("loss_mu, m, _")
    exec(code, {})
    assert capsys.readouterr().out.strip() == re.search(r"# (-.*)", code)[1]


@pytest.mark.parametrize("recurrent", [False, True])
def test_the_snippet_acts_as_the_learners_do(recurrent, tmp_path, capsys):
    """Its greedy play has the return of the whole team's, asked at once, with its memory."""
    path = train(tmp_path, recurrent=recurrent)
    args, guider, learner = magpo.load(path)
    capsys.readouterr()
    with mock.patch.object(magpo.Categorical, "sample", lambda pi: pi.mode):
        exec(snippet("class Agent").replace("runs/my_run", str(path)), {})
    seen = float(capsys.readouterr().out)

    game, memory, total = (
        simple_spread_v3.parallel_env(),
        magpo.new_memory(args, magpo.make_envs(args, 1)),
        0.0,
    )
    obs, _ = game.reset(seed=1)
    while game.agents:
        rows = torch.stack([torch.as_tensor(obs[name]) for name in game.agents]).unsqueeze(0)
        with torch.no_grad():
            actions = learner(rows, memory=memory).mode[0].tolist()
            memory = magpo.next_hidden(guider, learner, rows, memory), torch.tensor([False])
        obs, rewards, *_ = game.step(dict(zip(game.agents, actions, strict=True)))
        total += sum(rewards.values()) / 3
    assert seen == pytest.approx(total, abs=0.01)


@pytest.mark.slow
def test_an_exported_learner_needs_no_project(tmp_path):
    path, out = train(tmp_path), tmp_path / "learner.pt2"
    result = run(f"python {ROOT}/results/export.py {path} {out}", tmp_path)
    assert result.returncode == 0, result.stderr
    code = "import torch; print(torch.export.load('learner.pt2').module()(torch.ones(3, 18)).tolist())"
    result = run(f"python -c {shlex.quote(code)}", tmp_path, PYTHONPATH="")
    assert result.returncode == 0, result.stderr
    seen = torch.tensor(eval(result.stdout.splitlines()[-1]))
    torch.testing.assert_close(seen, magpo.load(path)[2].logits(torch.ones(3, 18)))
    recurrent = train(tmp_path, recurrent=True)
    for words in (
        f"{recurrent} {out}",
        f"{tmp_path}/none {out}",
        f"{path} {tmp_path}/no/x",
        f"{path} {tmp_path}",
    ):
        result = run(f"python {ROOT}/results/export.py {words}", tmp_path)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.slow
def test_the_tutorials_own_environment_is_learned(tmp_path):
    (tmp_path / "my_team.py").write_text(snippet("class parallel_env"))
    command = f"python {ROOT / 'magpo.py'} --env pettingzoo:my_team --total-timesteps 20000"
    assert command.replace(f"{ROOT}/", "") in COMMANDS
    result = run(command, tmp_path, PYTHONPATH=".")
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"learner +([\d.]+)", result.stdout)[1]) > 0.9  # random: 1 / 9
