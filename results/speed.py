"""Speed: every figure on it. CPU-seconds rather than seconds (the machine may be busy), PyTorch on one thread.

python figures/speed.py throughput   steps per CPU-second: mpe2 and SimpleSpread at random, training -> throughput.csv
python figures/speed.py profile      where the CPU time of training goes, and the floor: matrix products -> profile.csv
python figures/speed.py growth       acting and updating, per agent-step, for N = 3 to 100 agents; memory -> growth.csv
python figures/speed.py draw         redraw growth.png
python figures/speed.py quality      CPU-seconds to the scores 0.60 and 0.90, read from mpe_spread.csv
python figures/speed.py gpu [...]    train on a GPU with 4,096 copies, 20 M steps, or with magpo.py's options -> gpu.csv
"""

import contextlib
import csv
import io
import itertools
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import tyro
from mpe2 import simple_spread_v3
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import envs
import magpo

SIZES = (3, 5, 10, 20, 50, 100)
SCORES = (0.60, 0.90)
MACHINE = dict(cores=os.cpu_count(), machine=platform.machine(), torch=torch.__version__, threads=1)


def write(name, rows):
    """Rows (dicts with the same keys; floats to 4 digits) -> figures/NAME.csv, and the screen."""
    rows = [{key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows]
    with open(HERE / f"{name}.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        table.writeheader(), table.writerows(rows)
    shown = [key for key in rows[0] if key not in MACHINE]
    for row in [dict(zip(shown, shown)), *rows]:
        print("  ".join(f"{row[key]!s:>{max(12, *(len(str(r[key])) for r in rows))}s}" for key in shown))


def read(name):
    with open(HERE / f"{name}.csv") as file:
        return list(csv.DictReader(file))


def train(evaluates=False, **options):
    """magpo.train without a word, and without evaluations unless asked for -> rows of metrics.csv (numbers)."""
    stub = contextlib.nullcontext() if evaluates else mock.patch.object(magpo, "evaluate", lambda *_: torch.zeros(2))
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, stub, quiet[0], quiet[1]:
        metrics = (magpo.train(magpo.Args(**options, runs_dir=folder)) / "metrics.csv").read_text()
    return [{key: float(x) for key, x in row.items()} for row in csv.DictReader(metrics.splitlines())]


def spent(rows, key="cpu_seconds"):
    """Median seconds of an iteration but the first, which warms up."""
    return statistics.median(b[key] - a[key] for a, b in itertools.pairwise(rows))


# --- Throughput -------------------------------------------------------------------------------------------------------


def mpe2_rate(steps):
    """Steps per CPU-second of mpe2's simple_spread_v3, three agents, random actions drawn beforehand."""
    env = simple_spread_v3.parallel_env()
    env.reset(seed=1)
    actions = [dict(zip(env.agents, row)) for row in torch.randint(5, (steps, 3)).tolist()]
    begin = time.process_time()
    for action in actions:
        env.step(action)
        if not env.agents:
            env.reset()
    return steps / (time.process_time() - begin)


def spread_rate(steps, copies=2048):
    """Steps per CPU-second, of all copies together, of SimpleSpread, three agents, random actions drawn beforehand."""
    env = envs.make("mpe_spread", copies)
    env.reset(seed=1)
    actions = torch.randint(5, (steps, copies, 3))
    begin = time.process_time()
    for action in actions:
        env.step(action)
    return steps * copies / (time.process_time() - begin)


def training_rate(iterations, **options):
    """Environment steps per CPU-second of training, evaluations left out."""
    args = magpo.Args(**options)
    rows = train(**options, total_timesteps=iterations * args.num_envs * args.num_steps)
    return args.num_envs * args.num_steps / spent(rows)


def throughput(rounds=5, mpe2_steps=4000, spread_steps=100, iterations=5):
    """All three in turn, so that whatever else the machine does meets them alike; ratios are taken within a round."""
    rates = {"mpe2": [], "SimpleSpread, 2,048 copies": [], "training": []}
    for _ in range(rounds):
        for values, rate in zip(rates.values(), (mpe2_rate(mpe2_steps), spread_rate(spread_steps), training_rate(iterations))):
            values.append(rate)
    for name in list(rates)[1:]:
        rates[f"{name} / mpe2"] = [rate / base for rate, base in zip(rates[name], rates["mpe2"])]
    bars = {"SimpleSpread, 2,048 copies / mpe2": 200, "training / mpe2": 2.5}
    rows = []
    for what, x in rates.items():
        row = dict(what=what, median=statistics.median(x), lowest=min(x), highest=max(x), bar=bars.get(what, ""), rounds=rounds)
        rows.append(row | MACHINE)
    write("throughput", rows)


# --- Where the time goes ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def clock(times):
    """While open, train() adds to times, a Counter: CPU-seconds of its second and later iterations, by what was being done.

    Functions are wrapped from outside, and time belongs to the innermost one that has a name, or else to the phase's rest.
    `iterations` counts those timed.
    """
    now, last = ["outside"], [time.process_time()]

    def charge():
        begin, last[0] = last[0], time.process_time()
        times[now[-1]] += last[0] - begin

    def phase(name):
        charge()
        now[:] = [name]

    def named(function, rollout, update):
        def wrapped(*args, **kwargs):
            name = update if torch.is_grad_enabled() else rollout
            if name is None:
                return function(*args, **kwargs)
            charge()
            now.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                charge()
                now.pop()

        return wrapped

    def entering(name, function):
        return lambda *args, **kwargs: (phase(name), function(*args, **kwargs))[1]

    def iterations(bar):
        for iteration in bar.iterable:
            phase("rollout: rest")
            if iteration == 2:
                times.clear()
            times["iterations"] += 1
            yield iteration
        phase("outside")

    losses = [(magpo, name) for name in ("guider_loss", "learner_loss", "kl_divergence", "detached")]
    losses += [(magpo.Categorical, "log_prob"), (magpo.Categorical, "entropy")]
    steps = [(torch.nn.utils, "clip_grad_norm_"), (torch.optim.Adam, "zero_grad"), (torch.optim.Adam, "step")]
    names = {  # in the rollout (without gradients) and in the update; None: the time stays with who called
        (magpo.Guider, "act"): ("rollout: guider", None),
        (magpo.Guider, "encode"): ("rollout: guider", "update: guider forward"),
        (magpo.Guider, "forward"): (None, "update: guider forward"),
        (magpo.Learner, "params"): ("rollout: learner", "update: learner forward"),
        (magpo.Learner, "forward"): (None, "update: learner forward"),
        (envs.BatchedEnv, "step"): ("rollout: environment", None),
        (torch.Tensor, "backward"): (None, "update: backward"),
        **dict.fromkeys(losses, (None, "update: losses")),
        **dict.fromkeys(steps, (None, "update: clip, Adam")),
    }
    with contextlib.ExitStack() as stack:
        for (owner, name), pair in names.items():
            stack.enter_context(mock.patch.object(owner, name, named(getattr(owner, name), *pair)))
        stack.enter_context(mock.patch.object(tqdm, "__iter__", iterations))
        stack.enter_context(mock.patch.object(torch, "randperm", entering("update: rest", torch.randperm)))
        stack.enter_context(mock.patch.object(SummaryWriter, "add_scalar", entering("logging", SummaryWriter.add_scalar)))
        yield
    times.pop("outside", None)


class Products(TorchDispatchMode):
    """Counts matrix products by shape and layout: {((M, K), strides, (K, N), strides): how often}. Attention's are left out."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.counts[left.shape, left.stride(), right.shape, right.stride()] += 1
        return func(*args, **(kwargs or {}))


def multiply_adds(counts):
    """Products {(left shape, ..., right shape, ...): how often} -> floating-point operations, two per multiply-add."""
    return sum(2 * left[0] * left[1] * right[1] * number for (left, _, right, _), number in counts.items())


def span(shape, strides):
    """Elements of memory that a tensor reaches over: 1 for a number that stands for a whole matrix (all strides 0)."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))


def alone(counts, repeats=20):
    """CPU-seconds that these products take by themselves, on operands of the same layouts."""
    total = 0.0
    for (left, left_at, right, right_at), number in counts.items():
        a, b = (torch.randn(span(shape, at)).as_strided(shape, at) for shape, at in ((left, left_at), (right, right_at)))
        rounds, out = [], a @ b
        for _ in range(3):
            begin = time.process_time()
            for _ in range(repeats):
                torch.mm(a, b, out=out)
            rounds.append((time.process_time() - begin) / repeats)
        total += number * statistics.median(rounds)
    return total


def profile(iterations=6, **options):
    """CPU-seconds per iteration at the default settings, by what was being done, and the floor measured right after it."""
    args, times = magpo.Args(**options), Counter()
    size = args.num_envs * args.num_steps
    with clock(times):
        train(**options, total_timesteps=iterations * size)
    counted = times.pop("iterations")
    total = sum(times.values()) / counted
    with Products() as products:
        train(**options, total_timesteps=size)
    floor, flop = alone(products.counts), multiply_adds(products.counts)
    order = sorted(times, key=lambda name: (not name.startswith("rollout"), not name.startswith("update"), -times[name]))
    rows = [dict(what=name, cpu_seconds=times[name] / counted, share=times[name] / counted / total) for name in order]
    rows.append(dict(what="one iteration", cpu_seconds=total, share=1.0))
    rows.append(dict(what="matrix products alone", cpu_seconds=floor, share=floor / total))
    write("profile", [row | MACHINE for row in rows])
    print(
        f"{size} steps per iteration: {size / total:.0f} per CPU-second; {flop / 1e9:.2f} GFLOP in {sum(products.counts.values())} matrix"
    )
    print(
        f"products, which alone run at {flop / floor / 1e9:.0f} GFLOP/s and would allow {size / floor:.0f} steps per CPU-second."
    )


# --- Growth with the team ---------------------------------------------------------------------------------------------


def memory(num_agents):
    """Print the peak memory in MiB of this process, Python and PyTorch included, after one iteration at the default sizes."""
    torch.set_num_threads(1)
    args = magpo.Args()
    train(env_kwargs=f'{{"num_agents": {num_agents}}}', total_timesteps=args.num_envs * args.num_steps, update_epochs=1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def growth(sizes=SIZES, iterations=3, memory_sizes=(3, 50)):
    """CPU-microseconds per agent-step of acting (120 copies) and of updating (minibatches of 600 agent-steps, one epoch)."""
    rows = []
    for num_agents in sizes:
        times = Counter()
        with clock(times):
            kwargs = dict(env_kwargs=f'{{"num_agents": {num_agents}}}', num_envs=120, num_steps=5, update_epochs=1)
            train(**kwargs, num_minibatches=num_agents, total_timesteps=iterations * 600)
        microseconds = 1e6 / (times["iterations"] * 600 * num_agents)
        update = sum(seconds for name, seconds in times.items() if name.startswith("update"))
        act, update = times["rollout: guider"] * microseconds, update * microseconds
        row = dict(num_agents=num_agents, act_us=act, update_us=update, peak_mib="")
        if num_agents in memory_sizes:
            command = [sys.executable, __file__, "memory", str(num_agents)]
            row["peak_mib"] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        rows.append(row | MACHINE)
    write("growth", rows)


def draw():
    """figures/growth.csv -> figures/growth.png."""
    import matplotlib.pyplot as plt

    rows = read("growth")
    sizes = [int(row["num_agents"]) for row in rows]
    _, axes = plt.subplots(figsize=(5, 3.4))
    for key, label in (("act_us", "act (120 copies)"), ("update_us", "update (minibatches of 600 agent-steps)")):
        axes.loglog(sizes, [float(row[key]) for row in rows], "o-", label=label)
    axes.set(xlabel="agents N", ylabel="CPU-microseconds per agent-step", ylim=(1, None))
    axes.set_xticks(sizes, sizes), axes.minorticks_off(), axes.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(HERE / "growth.png", dpi=110)
    plt.close()


# --- Time to quality --------------------------------------------------------------------------------------------------


def score_of(row):
    """The learners' score: 0 for random play's return, 1 for the heuristic's."""
    random, heuristic = envs.make("mpe_spread", 1).references.values()
    return (float(row["learner_return"]) - random) / (heuristic - random)


def first_reached(rows, score, key):
    """row[key] of the first row at which the learners' score is reached; inf if none is."""
    reached = (float(row[key]) for row in rows if score_of(row) >= score)
    return next(reached, float("inf"))


def quality():
    """CPU-seconds (evaluations included) to each score, per seed and in the median, and the final score: from mpe_spread.csv."""
    curves, ends = ([row for row in read("mpe_spread") if row["final"] == f and row["env"] == "mpe_spread"] for f in "01")
    for algo, score in itertools.product(dict.fromkeys(row["algo"] for row in curves), SCORES):
        runs = {row["command"]: [] for row in curves if row["algo"] == algo}
        for command, run in runs.items():
            run += [row for row in curves if row["command"] == command]
        seconds = [first_reached(run, score, "cpu_seconds") for run in runs.values()]
        print(f"{algo:6s} {score:.2f}  median {statistics.median(seconds):6.0f}  seeds {' '.join(f'{x:.0f}' for x in seconds)}")
    for algo in dict.fromkeys(row["algo"] for row in ends):
        print(f"{algo:6s} final score {statistics.mean(score_of(row) for row in ends if row['algo'] == algo):.2f}")


# --- GPU --------------------------------------------------------------------------------------------------------------


def gpu(*options):
    """One whole training, measured by the clock on the wall, and a short one under the profiler, for the share of kernels."""
    if not torch.cuda.is_available():
        print("speed.py: gpu needs a GPU that PyTorch can use; there is none here.", file=sys.stderr)
        sys.exit(2)
    default = magpo.Args(cuda=True, num_envs=4096, total_timesteps=20_000_000)
    bench(tyro.cli(magpo.Args, default=default, args=options), torch.cuda.get_device_name())


def bench(args, device):
    """Train as args say -> gpu.csv: steps per second, seconds to each score and in all, share of the time in kernels."""
    options = {name: value for name, value in vars(args).items() if name != "runs_dir"}
    rows = train(evaluates=True, **options)
    size = args.num_envs * args.num_steps
    quiet = [b["seconds"] - a["seconds"] for a, b in itertools.pairwise(rows) if a["learner_return"] != a["learner_return"]]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        short = train(**options | dict(total_timesteps=5 * size))
    events = [event for event in profiled.key_averages() if not event.is_user_annotation]  # those span kernels counted already
    kernels = sum(event.self_device_time_total for event in events if event.device_type != torch.autograd.DeviceType.CPU) / 1e6
    row = dict(device=device, num_envs=args.num_envs, steps=int(rows[-1]["step"]), seconds=rows[-1]["seconds"])
    row |= dict(steps_per_second=size / statistics.median(quiet), kernel_share=kernels / short[-1]["seconds"])
    row |= {f"seconds_to_{score}": first_reached(rows, score, "seconds") for score in SCORES}
    write("gpu", [row | {"learner_return": rows[-1]["learner_return"], "torch": torch.__version__}])


if __name__ == "__main__":
    commands = dict(throughput=throughput, profile=profile, growth=growth, draw=draw, quality=quality, gpu=gpu, memory=memory)
    if len(sys.argv) < 2 or sys.argv[1] not in commands or sys.argv[1] not in ("gpu", "memory") and len(sys.argv) > 2:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    commands[sys.argv[1]](*sys.argv[2:])
