"""Speed: every figure on it. CPU-seconds, as the machine may be busy, and one thread of PyTorch.

    python results/speed.py throughput   steps per CPU-second: mpe2 and SimpleSpread at random, training
    python results/speed.py suites       the same of four of the paper's tasks, and the cost of compiling them
    python results/speed.py profile      where the CPU time of training goes
    python results/speed.py growth       acting and updating per agent-step for N = 3 to 100 agents; memory
    python results/speed.py quality      CPU-seconds to the scores 0.60 and 0.90, read from mpe_spread.csv
    python results/speed.py gpu [...]    on a GPU: 4,096 copies, 20 M steps, or magpo.py's options

All but quality write a CSV of that name (suites: suite_speed.csv) beside this file; growth also draws
growth.png.
"""

import contextlib
import cProfile
import csv
import inspect
import io
import itertools
import multiprocessing
import os
import platform
import pstats
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import torch
from mpe2 import simple_spread_v3
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import envs
import magpo
from results import compare, make
from support import terminal

SIZES = (3, 5, 10, 20, 50, 100)
SCORES = (0.60, 0.90)
MACHINE = dict(cores=os.cpu_count(), machine=platform.machine(), torch=torch.__version__, threads=1)


def write(name, rows):
    """Rows (dicts with the same keys; floats to 4 digits) -> results/NAME.csv, and the screen."""
    rows = [{key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows]
    (make.HERE / f"{name}.csv").unlink(missing_ok=True)
    make.append(name, [row | MACHINE for row in rows])
    for row in [{key: key for key in rows[0]}, *rows]:
        print("| " + " | ".join(str(x) for x in row.values()) + " |")


def train(evaluates=False, **given):
    """magpo.train without a word, and without evaluations unless asked for -> rows of metrics.csv."""
    with contextlib.ExitStack() as stack:
        if not evaluates:
            stack.enter_context(mock.patch.object(magpo, "evaluate", lambda *_: torch.zeros(2)))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        metrics = (magpo.train(magpo.Args(**given | dict(runs_dir=folder))) / "metrics.csv").read_text()
    return [{key: float(x) for key, x in row.items()} for row in csv.DictReader(metrics.splitlines())]


def spent(rows):
    """Median CPU-seconds of an iteration but the first, which warms up."""
    return statistics.median(b["cpu_seconds"] - a["cpu_seconds"] for a, b in itertools.pairwise(rows))


# --- Throughput ---------------------------------------------------------------------------------------------


def mpe2_rate(steps=4000):
    """Steps per CPU-second of mpe2's simple_spread_v3, three agents, random actions drawn beforehand."""
    env = simple_spread_v3.parallel_env()
    env.reset(seed=1)
    actions = [dict(zip(env.agents, row, strict=True)) for row in torch.randint(5, (steps, 3)).tolist()]
    begin = time.process_time()
    for action in actions:
        env.step(action)
        if not env.agents:
            env.reset()
    return steps / (time.process_time() - begin)


def spread_rate(steps=100, copies=2048):
    """Steps per CPU-second, of all copies together, of SimpleSpread, three agents, random actions."""
    env = envs.make("mpe_spread", copies)
    env.reset(seed=1)
    actions = torch.randint(5, (steps, copies, 3))
    begin = time.process_time()
    for action in actions:
        env.step(action)
    return steps * copies / (time.process_time() - begin)


def training_rate(iterations=5, **given):
    """Environment steps per CPU-second of training, evaluations left out."""
    args = magpo.Args(**given)
    size = args.num_envs * args.num_steps
    return size / spent(train(**given | dict(total_timesteps=iterations * size)))


def throughput(rounds=5):
    """All three in turn: whatever else the machine does meets them alike. Ratios are taken within a round."""
    rates = {"mpe2": [], "SimpleSpread, 2,048 copies": [], "training": []}
    for _ in range(rounds):
        for values, rate in zip(rates.values(), (mpe2_rate, spread_rate, training_rate), strict=True):
            values.append(rate())
    for name in list(rates)[1:]:
        pairs = zip(rates[name], rates["mpe2"], strict=True)
        rates[f"{name} / mpe2"] = [rate / base for rate, base in pairs]
    rows = [
        dict(what=what, median=statistics.median(x), lowest=min(x), highest=max(x), rounds=rounds)
        for what, x in rates.items()
    ]
    write("throughput", rows)


# --- The paper's suites -------------------------------------------------------------------------------------

SMALLEST = ("lbf:8x8-2p-2f-coop", "rware:tiny-2ag", "connector:con-5x5x3a", "smax:2s3z")


def play(env, infos, steps):
    """Random allowed actions -> the last infos, CPU-seconds in the environment alone."""
    seconds = 0.0
    for _ in range(steps):
        actions = magpo.Categorical(infos["action_mask"].float()).sample()
        begin = time.process_time()
        *_, infos = env.step(actions)
        seconds += time.process_time() - begin
    return infos, seconds


def suites(tasks=SMALLEST, copies=(64, 256), steps=100, iterations=3):
    """Steps per CPU-second of E copies, and of training by the preset; CPU-seconds to compile E copies.

    These are the first reset's and the first step's.
    """
    rows = []
    for task in tasks:
        row = dict(task=task)
        for E in copies:
            env = envs.make(task, E)
            begin = time.process_time()
            _, infos = env.reset(seed=1)
            reset = time.process_time() - begin
            infos, first = play(env, infos, 1)
            _, seconds = play(env, infos, steps)
            row |= {f"compile_{E}": reset + first, f"steps_{E}": steps * E / seconds}
        rows.append(row | dict(training=training_rate(iterations, env=task)))
    write("suite_speed", rows)


# --- Where the time goes ------------------------------------------------------------------------------------

PARTS = {
    "rollout: guider": [magpo.Guider.act],
    "rollout: environment": [envs.BatchedEnv.step],
    "rollout: advantages": [magpo.estimate_advantages],
    "update: guider forward": [magpo.Guider.forward],
    "update: learner forward": [magpo.Learner.forward],
    "update: losses": [
        magpo.guider_loss,
        magpo.learner_loss,
        magpo.kl_divergence,
        magpo.Categorical.log_prob,
    ],
    "update: backward": [torch.Tensor.backward],
    "update: clip, Adam": [torch.nn.utils.clip_grad_norm_, torch.optim.Adam.step],
}


def timed(**given):
    """Train under Python's profiler -> CPU-seconds of each of PARTS, a dict, and the rows of metrics.csv."""
    profiler = cProfile.Profile(time.process_time)
    rows = profiler.runcall(train, **given)
    stats = pstats.Stats(profiler).stats

    def cumulative(function):
        code = inspect.unwrap(function).__code__
        return stats.get((code.co_filename, code.co_firstlineno, code.co_name), [0] * 4)[3]

    return {part: sum(map(cumulative, functions)) for part, functions in PARTS.items()}, rows


def profile(iterations=6, **given):
    """CPU-seconds per iteration at the preset's settings, by part, and the arithmetic in it."""
    args = magpo.Args(**given)
    size = args.num_envs * args.num_steps
    seconds, rows = timed(**given | dict(total_timesteps=iterations * size))
    seconds = {part: x / iterations for part, x in seconds.items()}
    total = spent(rows)
    seconds["the rest"] = total - sum(seconds.values())
    seconds["one iteration"] = total
    write("profile", [dict(what=part, cpu_seconds=x, share=x / total) for part, x in seconds.items()])
    with FlopCounterMode(display=False) as counter:
        train(**given | dict(total_timesteps=size))
    gflop = counter.get_total_flops() / 1e9
    print(f"{size} steps per iteration, {gflop:.2f} GFLOP: {gflop / total:.1f} GFLOP per CPU-second.")


# --- Growth with the team -----------------------------------------------------------------------------------


def memory(num_agents):
    """Peak memory in MiB of this process, Python and PyTorch included, after one iteration."""
    torch.set_num_threads(1)
    args = magpo.Args()
    kwargs = f'{{"num_agents": {num_agents}}}'
    train(env_kwargs=kwargs, total_timesteps=args.num_envs * args.num_steps, update_epochs=1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def growth(sizes=SIZES, iterations=3, memory_sizes=(3, 50)):
    """CPU-microseconds per agent-step: acting (120 copies), one epoch (minibatches of 600 agent-steps)."""
    rows = []
    for n in sizes:
        given = dict(env_kwargs=f'{{"num_agents": {n}}}', num_envs=120, num_steps=5, update_epochs=1)
        seconds, _ = timed(**given, num_minibatches=n, total_timesteps=iterations * 600)
        update = sum(x for part, x in seconds.items() if part.startswith("update"))
        per_agent_step = 1e6 / (iterations * 600 * n)
        peak = ""
        if n in memory_sizes:  # in a process of its own
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                peak = pool.submit(memory, n).result()
        act = seconds["rollout: guider"]
        rows.append(
            dict(num_agents=n, act_us=act * per_agent_step, update_us=update * per_agent_step, peak_mib=peak)
        )
    write("growth", rows)
    figure, axes = plt.subplots(figsize=(5, 3.4))
    for key, label in (
        ("act_us", "act (120 copies)"),
        ("update_us", "update (minibatches of 600 agent-steps)"),
    ):
        axes.loglog(sizes, [row[key] for row in rows], "o-", label=label)
    axes.set(xlabel="agents N", ylabel="CPU-microseconds per agent-step", ylim=(1, None))
    axes.set_xticks(sizes, sizes)
    axes.minorticks_off()
    axes.legend(fontsize=8)
    compare.save(figure, make.HERE / "growth.png")


# --- Time to quality ----------------------------------------------------------------------------------------


def score_of(row):
    """The learners' score: 0 for random play's return, 1 for the heuristic's."""
    random, heuristic = envs.make("mpe_spread", 1).references.values()
    return (row["learner_return"] - random) / (heuristic - random)


def first_reached(rows, score, key, scored=score_of):
    """row[key] of the first row at which the learners' score is reached; inf if none is."""
    return next((row[key] for row in rows if scored(row) >= score), float("inf"))


def quality():
    """CPU-seconds (evaluations included) to each score, by seed and in the median, and the final score."""
    rows = make.read("mpe_spread")
    for algo in dict.fromkeys(row["algo"] for row in rows):
        curves = {row["command"]: [] for row in rows if row["algo"] == algo}
        for row in rows:
            if row["algo"] == algo and row["final"] == 0:
                curves[row["command"]].append(row)
        for score in SCORES:
            seconds = [first_reached(curve, score, "cpu_seconds") for curve in curves.values()]
            seeds = " ".join(f"{x:.0f}" for x in seconds)
            print(f"{algo:6s} {score:.2f}  median {statistics.median(seconds):6.0f}  seeds {seeds}")
        final = [score_of(row) for row in rows if row["algo"] == algo and row["final"] == 1]
        print(f"{algo:6s} final score {statistics.mean(final):.2f}")


# --- GPU ----------------------------------------------------------------------------------------------------


def gpu():
    """One training by the clock on the wall -> gpu.csv; a short one profiled, for the share of kernels."""
    if not torch.cuda.is_available():
        print("speed.py: gpu needs a GPU that PyTorch can use; there is none here.", file=sys.stderr)
        sys.exit(2)
    sys.argv[1:] = sys.argv[2:]
    given = dict(cuda=True, num_envs=4096, total_timesteps=20_000_000) | terminal.parse(magpo.Args)
    args = magpo.Args(**given)
    size = args.num_envs * args.num_steps
    rows = [row for row in train(evaluates=True, **given)]
    quiet = [
        b["seconds"] - a["seconds"]
        for a, b in itertools.pairwise(rows)
        if a["learner_return"] != a["learner_return"]
    ]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        short = train(**given | dict(total_timesteps=5 * size))
    cpu = torch.autograd.DeviceType.CPU
    events = [x for x in profiled.key_averages() if not x.is_user_annotation and x.device_type != cpu]
    kernels = sum(event.self_device_time_total for event in events) / 1e6
    row = dict(device=torch.cuda.get_device_name(), num_envs=args.num_envs, steps=int(rows[-1]["step"]))
    row |= dict(seconds=rows[-1]["seconds"], steps_per_second=size / statistics.median(quiet))
    row |= dict(kernel_share=kernels / short[-1]["seconds"])
    row |= {f"seconds_to_{score}": first_reached(rows, score, "seconds") for score in SCORES}
    write("gpu", [row | dict(learner_return=rows[-1]["learner_return"])])


if __name__ == "__main__":
    commands = {f.__name__: f for f in (throughput, suites, profile, growth, quality, gpu)}
    name = sys.argv[1] if sys.argv[1:] else ""
    if name not in commands or (name != "gpu" and len(sys.argv) > 2):
        sys.exit(__doc__)
    torch.set_num_threads(1)
    commands[name]()
