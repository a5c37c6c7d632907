"""What surrounds a run: its command line, folder, metrics, checkpoints, signals and processes.

magpo.py's reader need not open it. Of torchrun's processes, rank 0 alone writes and prints.
"""

import argparse
import atexit
import contextlib
import csv
import fcntl
import inspect
import io
import json
import math
import os
import random
import re
import signal
import sys
import textwrap
import time
import traceback
import typing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # its default arguments, read before there is a process group, do not keep that one alive
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import EnvFailure, make

VERSION = 2  # of checkpoints
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's

# --- Options ------------------------------------------------------------------------------------------------------


def whole(text):
    """A whole number, also one that is written as 1e6."""
    if float(text) % 1:
        raise ValueError
    return int(float(text))


def parse(options):
    """sys.argv -> dict of those options of the dataclass magpo.Args that were given. Its comments are the help."""
    parser = argparse.ArgumentParser("magpo.py", description=options.__doc__, argument_default=argparse.SUPPRESS)
    parser.allow_abbrev = False
    parser.error = refuse
    hints = typing.get_type_hints(options)
    for line in inspect.getsource(options).splitlines():
        if title := re.fullmatch(r"    # (.+)", line):
            group = parser.add_argument_group(title[1])
        elif option := re.fullmatch(r"    (\w+): .+ = (.+?)  # (.+)", line):
            name, default, text = option.groups()
            flag, text = "--" + name.replace("_", "-"), text + ("" if default == "None" else f" [{default}]")
            hint = hints[name]
            kind = next(iter(typing.get_args(hint)), hint)
            if kind is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            elif isinstance(kind, str):
                group.add_argument(flag, choices=typing.get_args(hint), help=text)
            else:
                group.add_argument(flag, type=whole if kind is int else kind, metavar=kind.__name__, help=text)
    try:
        given = vars(parser.parse_args())
        sys.stdout.flush()
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    for name, others in (("resume", {"env", "env_kwargs"}), ("eval", EVAL_OPTIONS)):
        if name in given and not given[name]:
            refuse(f"--{name} needs the folder of a run.")
        if name in given and (more := given.keys() - others - {name}):
            refuse(f"--{name} goes on by the run's own options: leave out {', '.join(sorted(more))}.")
    return given


EVAL_OPTIONS = {"env", "env_kwargs", "seed", "num_envs", "num_workers", "eval_episodes", "torch_threads"}


def refuse(message):
    """End with one sentence and exit code 2."""
    print(f"magpo.py: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def one_sentence():
    """Wrong input ends in one sentence and exit code 2; what goes wrong while training in one and exit code 1."""
    try:
        yield
    except ValueError as error:
        refuse(error)
    except (EnvFailure, FloatingPointError, OSError) as error:
        print(f"magpo.py: {error}; {Run.kept}", file=sys.stderr)
        if error.__cause__:  # the environment's own exception
            traceback.print_exception(error.__cause__)
        sys.exit(1)


def check_types(args):
    """Raise ValueError for an option (of a dataclass) that is not of its field's type; nothing is converted."""
    for name, hint in typing.get_type_hints(type(args)).items():
        allowed, value = typing.get_args(hint) or (hint,), getattr(args, name)
        if typing.get_origin(hint) is typing.Literal:
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, but is {value!r}.")
        elif type(value) not in allowed and not (type(value) is int and float in allowed):
            raise ValueError(f"{name} must be of type {allowed[0].__name__}, but is {value!r}.")


def validate(args):
    """Raise ValueError, in one sentence, for options (magpo.Args) that cannot work."""
    may_be_zero = {"seed", "gamma", "gae_lambda", "ent_coef", "vf_coef", "lam", "num_workers"}
    for name, value in vars(args).items():
        if type(value) in (int, float):
            if math.isnan(value) or value == math.inf and name != "delta":
                raise ValueError(f"{name} must be a finite number, but is {value}.")
            if value < 0 or value == 0 and name not in may_be_zero:
                raise ValueError(f"{name} must {'not be negative' if name in may_be_zero else 'be above 0'}: {value}.")
    units = args.num_envs // WORLD * (1 if args.recurrent else args.num_steps)
    for good, message in (
        (max(args.gamma, args.gae_lambda) <= 1, "gamma and gae_lambda must lie in [0, 1]."),
        (args.delta > 1, f"delta must be above 1 (the guider's distance from the learners), but is {args.delta}."),
        (units % args.num_minibatches == 0, "num_minibatches must divide num_envs x num_steps, or num_envs if recurrent."),
        (args.seed < 2**32, f"seed must lie in [0, 2**32), but is {args.seed}."),
        (args.algo != "mappo" or args.backtracking == "soft", "mappo has no guider policy, so it knows no reset."),
        (args.num_envs % WORLD == 0, f"num_envs must be a multiple of torchrun's processes, {WORLD}."),
        (args.total_timesteps >= args.num_envs * args.num_steps, "total_timesteps is below one rollout, num_envs x num_steps."),
        (args.torch_threads <= os.cpu_count(), f"torch_threads is {args.torch_threads}; there are {os.cpu_count()} cores."),
        (args.num_workers in (0, args.num_envs), "num_workers must be 0 or num_envs: one process per copy."),
    ):
        if not good:
            raise ValueError(message)
    make_envs(args, 1).close()


def make_envs(args, num_envs, device="cpu"):
    """E copies of the environment that magpo.Args name -> gymnasium.vector.VectorEnv; ValueError if that cannot be."""
    try:
        kwargs = dict(**json.loads(args.env_kwargs))
    except (ValueError, TypeError):
        raise ValueError(f"env_kwargs must be a JSON object such as '{{\"N\": 5}}', not {args.env_kwargs!r}.") from None
    if taken := kwargs.keys() & {"env_id", "num_envs", "device", "num_workers", "state"}:
        raise ValueError(f"env_kwargs may not hold {', '.join(sorted(taken))}: magpo.py has options for these.")
    return make(args.env, num_envs, device, num_envs if args.num_workers else 0, args.state, **kwargs)


# --- Random numbers, evaluation, signals --------------------------------------------------------------------------


def seed_everything(seed):
    """Seed PyTorch's, NumPy's and Python's global generators; environments may use any of them."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextlib.contextmanager
def seeded(seed, device):
    """Within it random numbers follow from this seed; afterwards all three generators go on as if nothing had been."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_everything(seed)
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def affordable(episodes, steps, envs):
    """As many episodes, at most, as cost a tenth of so many steps of training; at least one."""
    return max(1, min(episodes, steps // (10 * envs.max_episode_steps)))


def progress(steps, title, stop):
    """range(steps), with a bar if it takes long, until something is in the list `stop`."""
    for step in tqdm(range(steps), title, leave=False, delay=3):
        if stop:
            return
        yield step


def catch_signals():
    """A list that will hold the number of the first Ctrl-C or SIGTERM; a second one ends the process at once."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def catch(number, _):
        caught.append(number)
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nStopping after this iteration; then saving. Once more to stop at once.\n")

    for number in numbers:
        signal.signal(number, catch)
    return caught


# --- Processes ----------------------------------------------------------------------------------------------------


def gather(x):
    """(T, E, ...) of this process -> (T, K E, ...) of all K processes of torchrun; x itself if there is one."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, 1)


def average_gradients(parameters):
    """Replace each gradient by its mean over all processes."""
    for parameter in parameters if WORLD > 1 else ():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= WORLD


# --- Numbers that are not finite ------------------------------------------------------------------------------------


def check_finite(iteration, env, buffer):
    """Raise FloatingPointError for the quantity of a rollout, a dict of (T, ...), that is the first not to be finite."""
    causes = dict.fromkeys(("returns", "advantages"), "rewards too large for float32") | {"values": "learning rate too high"}
    first = {}
    for name, x in buffer.items():
        if x.is_floating_point() and name != "episode_return":
            bad = ~x.isfinite().flatten(1).all(1)  # (T,)
            if bad.any():
                first[name] = bad.int().argmax().item()
    if first:
        name = min(first, key=first.get)
        raise FloatingPointError(f"iteration {iteration}: {name} not finite; likely cause: {causes.get(name, env)}")


def mean_metrics(iteration, metrics):
    """Mean over minibatches (a list of dicts of scalars) and processes -> dict of floats; FloatingPointError if not finite."""
    columns = {name: torch.stack([row[name] for row in metrics]).detach().unsqueeze(0) for name in metrics[0]}
    means = {name: gather(x).mean().item() for name, x in columns.items()}
    if bad := [name for name, mean in means.items() if not math.isfinite(mean)]:
        raise FloatingPointError(f"iteration {iteration}: {bad[0]} not finite; likely cause: learning rate too high")
    return means


# --- A run's folder -----------------------------------------------------------------------------------------------

NOT_FROM_FILES = {"runs_dir", "resume", "eval", "track"}  # a file has no say in where to read or write


def read_checkpoint(path, device="cpu"):
    """Read a checkpoint, or that of a run's folder -> dict. Runs no code of the file's; ValueError if it cannot be read."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["version"] != VERSION:
            raise ValueError(f"its version is {saved['version']}, not {VERSION}")
        if not all(x.isfinite().all() for network in ("guider", "learner") for x in saved[network].values()):
            raise ValueError("its weights are not finite")
        if not all(type(value) in (int, float) for row in saved["rows"] for value in row.values()):
            raise ValueError("its rows are no numbers")
        return saved | dict(path=path)
    except Exception as error:  # torch.load raises many kinds for missing, empty, cut, foreign and malicious files
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read as a checkpoint of magpo.py: {reason}".split("\n")[0]) from None


def run_options(saved, changes):
    """Options of a checkpoint's run, with changes -> dict. Code that the file names is not imported on its word alone."""
    options = {name: value for name, value in saved["args"].items() if name not in NOT_FROM_FILES}
    if "env" in changes:
        options["env_kwargs"] = "{}"
    elif options["env"].startswith(("pettingzoo:", "gym:")):
        raise ValueError(f"{saved['path']} is of {options['env']}. To import that, say it: --env {options['env']}")
    return options | changes


def load_weights(saved, **parts):
    """Load what was saved of each part; ValueError if it does not fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise ValueError(f"{saved['path']} does not fit this environment and these options: {reason}") from None


class Run:
    """A run's device and folder: args.json, metrics.csv, TensorBoard events and checkpoint.pt.

    Attributes:
        args: the options; of a run that is resumed, that run's. device: where to train. path: the folder.
        seed: of this process's environments and sampling. leads: whether this process writes and prints.
        iteration, num_iterations: how many are behind us, and in all.

    Raises:
        ValueError: the options cannot work, there is no checkpoint to go on from, or the folder cannot be written.
    """

    kept = "nothing was saved yet."  # for the last sentence of a run that fails

    def __init__(self, args):
        self.saved = {}
        if args.resume:
            self.saved = read_checkpoint(args.resume)
            given = dict(env=args.env, env_kwargs=args.env_kwargs) if "env" in args.given else {}
            args = type(args)(**run_options(self.saved, given), resume=args.resume)
        validate(args)
        self.args = args
        self.leads = RANK == 0
        sys.stdout = sys.stdout if self.leads else open(os.devnull, "w")
        cuda = args.cuda and torch.cuda.is_available()
        if args.cuda and not cuda:
            print("--cuda: PyTorch sees no GPU here; training on the CPU.")
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with one of these
        if WORLD > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
            atexit.register(dist.destroy_process_group)
        torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it costs 2 %, and everything here is initialized
        torch.set_num_threads(args.torch_threads)
        seed_everything(args.seed)
        self.generator = torch.cuda.default_generators[self.device.index] if cuda else torch.default_generator
        self.iteration, self.rows = self.saved.get("iteration", 0), self.saved.get("rows", [])
        self.samples = args.num_envs * args.num_steps
        self.num_iterations = args.total_timesteps // self.samples
        self.seed = args.seed
        if RANK or self.iteration:  # seeds of PyTorch's generators have 32 bits, so that adding will not do
            self.seed = int(np.random.SeedSequence((args.seed, RANK, self.iteration)).generate_state(1)[0])
        self.open_folder()
        before = self.rows[-1] if self.rows else dict(seconds=0, cpu_seconds=0)
        self.start = time.time() - before["seconds"], time.process_time() - before["cpu_seconds"]

    def open_folder(self):
        """Make the folder, or take that of the run to resume, and keep other processes out of it."""
        args = self.args
        name = f"{args.env}__{args.algo}__{args.seed}__{time.time():.2f}".replace(":", "_").replace("/", "_")
        self.path = self.saved["path"].parent if self.saved else Path(args.runs_dir) / name
        if not self.leads:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=bool(self.saved))
            self.lock = open(self.path / "lock", "w")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process ends
            (self.path / "args.json").write_text(json.dumps(asdict(args), indent=1))
        except BlockingIOError:
            raise ValueError(f"{self.path} is in use by another process; wait for it, or stop it.") from None
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error}") from None
        self.writer = SummaryWriter(self.path, purge_step=self.iteration * self.samples + 1)
        self.writer.add_text("args", "\n".join(f"    {name}: {value}" for name, value in asdict(args).items()))
        self.file = self.table = None

    def place(self, *networks):
        """The same networks on the run's device; compiled if --compile asks for it.

        On a GPU as CUDA graphs: what a call returns is overwritten by the next one.
        """
        for network in networks:
            network.to(self.device)
            if self.args.compile:
                network.compile(mode="reduce-overhead" if self.device.type == "cuda" else "default")
        return networks

    def iterations(self, envs, stop):
        """Numbers of the iterations still to go, until a process has something in its list `stop`. Says what counts."""
        options = (f"{name} {value}" + "*" * (name not in self.args.given) for name, value in asdict(self.args).items())
        print(textwrap.fill(f"{', '.join(options)} (*: not given, from the preset or by default)", 110))
        print(envs.note, end="\n" if envs.note else "")
        if self.num_iterations * self.samples < self.args.total_timesteps:
            print(f"total_timesteps is cut to {self.num_iterations * self.samples}, a multiple of num_envs x num_steps.")
        self.bar = tqdm(
            range(self.iteration + 1, self.num_iterations + 1),
            unit="step", unit_scale=self.samples, initial=self.iteration, total=self.num_iterations, disable=not self.leads,
        )  # fmt: skip
        for iteration in self.bar:
            yield iteration
            if gather(torch.full((1, 1), len(stop), device=self.device)).any():
                break

    def restore(self, parts):
        """Load what has a state_dict -> what else was saved `here`: empty at a start, or if the episodes start anew."""
        if not self.saved:
            return {}
        load_weights(self.saved, **parts)
        here = self.saved["here"]
        if WORLD == 1 and here.get("device") == self.device.type:
            self.generator.set_state(here["generator"].cpu())
            return here
        print("Episodes start anew: these environments cannot be saved, or not from this device or number of processes.")
        seed_everything(self.seed)
        return {}

    def save(self, parts, envs, **here):
        """Replace the checkpoint at once: whoever is killed meanwhile, or finds the disk full, leaves the old one whole."""
        if not self.leads:
            return
        here |= dict(envs=envs.state_dict(), generator=self.generator.get_state(), device=self.device.type)
        contents = dict(version=VERSION, args=asdict(self.args), iteration=self.iteration, rows=self.rows)
        contents |= {name: part.state_dict() for name, part in parts.items()}
        memory = io.BytesIO()  # so that a full disk is an OSError, and nothing is computed while the file is open
        torch.save(contents | {"here": here if here["envs"] and WORLD == 1 else {}}, memory)
        with open(self.path / "checkpoint.tmp", "wb") as file:
            file.write(memory.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.path / "checkpoint.pt")
        Run.kept = f"iteration {self.iteration} is saved: --resume {self.path}"
        self.writer.flush()

    def log(self, iteration, row):
        """Count an iteration as done, and add its row, behind the step and the times so far, to metrics.csv and TensorBoard."""
        self.iteration, step = iteration, iteration * self.samples
        if not self.leads:
            return
        row = dict(step=step, seconds=time.time() - self.start[0], cpu_seconds=time.process_time() - self.start[1]) | row
        if self.table is None:
            self.file = open(self.path / "metrics.csv", "w", newline="")
            self.table = csv.DictWriter(self.file, row)
            self.table.writeheader()
            self.table.writerows(self.rows)
        self.rows.append(row)
        self.table.writerow(row)
        self.file.flush()
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        if not math.isnan(row["learner_return"]):
            self.bar.set_postfix({name: f"{row[name]:.2f}" for name in ("guider_return", "learner_return")})

    def close(self):
        """Close the files, and say where they are."""
        if not self.leads:
            return
        self.writer.close()
        self.lock.close()
        if self.file:  # a finished run may be resumed, to no effect
            self.file.close()
        print(f"Everything is in {self.path}")
        if self.iteration < self.num_iterations:
            print(f"Stopped after iteration {self.iteration}. To go on: python magpo.py --resume {self.path}")
