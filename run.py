"""What surrounds a run: random numbers, processes, and its folder with metrics and checkpoints.

magpo.py's reader need not open it. Of torchrun's processes, rank 0 alone writes and prints.
"""

import atexit
import contextlib
import csv
import io
import json
import math
import os
import pickle
import random
import shlex
import sys
import textwrap
import time
import warnings
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # read before there is a process group, its defaults do not keep that one alive
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from options import BESIDE, MACHINE, NOT_FROM_FILES, WORLD, runs, validate

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes out of one folder
    fcntl = None

RANK = int(os.environ.get("RANK", 0))  # torchrun's number of this process
VERSION = 2  # of checkpoints
CLOCKS = {"seconds", "cpu_seconds"}  # columns that a resumed run goes on from


# --- Random numbers and evaluations -------------------------------------------------------------------------


def seed_everything(seed):
    """Seed PyTorch's, NumPy's and Python's global generators; environments may use any of them."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextlib.contextmanager
def seeded(seed, device):
    """Within it random numbers follow from this seed; afterwards all go on as if nothing had been."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            seed_everything(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def affordable(args, episodes, steps, envs):
    """As many episodes, at most, as cost a tenth of so many steps of training; at least one.

    A multiple of num_envs if they are more, since every copy plays equally many.
    """
    most = max(1, min(episodes, steps // (10 * envs.max_episode_steps)))
    return most - most % min(most, args.num_envs)


def progress(steps, title, stop):
    """range(steps), with a bar if it takes long, until something is in the list `stop`."""
    for step in tqdm(range(steps), title, leave=False, delay=3):
        if stop:
            return
        yield step


# --- Processes ----------------------------------------------------------------------------------------------


def gather(x):
    """(T, E, ...) of this process -> (T, K E, ...) of all K processes of torchrun, or x itself."""
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


# --- Checkpoints --------------------------------------------------------------------------------------------


def check_like(x, like, name):
    """Raise an exception unless x is made as `like` is, key by key and shape by shape, of finite numbers."""
    if isinstance(like, (list, tuple)):
        x, like = dict(enumerate(x)), dict(enumerate(like))
    if isinstance(like, dict):
        if x.keys() != like.keys():
            raise ValueError(f"{name} lacks or adds {min(map(repr, x.keys() ^ like.keys()))}")
        for key in like:
            check_like(x[key], like[key], f"{name} {key}")
    elif not isinstance(like, torch.Tensor):
        if type(x) is not type(like):
            raise ValueError(f"{name} is no {type(like).__name__}")
    elif (x.shape, x.dtype) != (like.shape, like.dtype):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, not {tuple(like.shape)}, or another type")
    elif x.untyped_storage().nbytes() < x.nbytes or not x.isfinite().all():  # a small file may claim much
        raise ValueError(f"{name} is not finite")


class Checkpoint:
    """What a run saved, read without running code of the file's.

    path: the file, or the folder of the run that it is in. Raises ValueError if it cannot be read.
    """

    def __init__(self, path):
        self.path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
        try:
            with warnings.catch_warnings(action="ignore"):
                self.saved = saved = torch.load(self.path, map_location="cpu", weights_only=True)
            self.changed = os.stat(self.path).st_mtime_ns
            if saved["version"] != VERSION:
                raise ValueError(f"its version is {saved['version']}, not {VERSION}")
            parts = dict.fromkeys(("guider", "learner", "optimizer", "value_norm", "here"), dict)
            for name, kind in (parts | dict(args=dict, iteration=int, rows=list)).items():
                if not isinstance(saved.get(name), kind):
                    raise ValueError(f"its {name} is no {kind.__name__}")
            self.iteration, self.rows, self.args = saved["iteration"], saved["rows"], saved["args"]
            numbers = [value for row in self.rows for value in row.values()]
            if not all(type(x) is float or (type(x) is int and abs(x) < 1e18) for x in numbers):
                raise ValueError("its rows are not numbers")
            if len(self.rows) != self.iteration or not all(CLOCKS <= row.keys() for row in self.rows):
                raise ValueError("its rows are not one for each iteration")
            texts = [*self.args, *self.args.values()]
            if not all(type(x) in (str, int, float, bool) and str(x).isprintable() for x in texts):
                raise ValueError("its args are not plain numbers and text")
        except pickle.UnpicklingError:
            raise ValueError(
                f"{self.path} cannot be read as a checkpoint: more than numbers and text"
            ) from None
        except Exception as error:  # torch.load raises many kinds for missing, cut and foreign files
            raise ValueError(f"{self.path} cannot be read as a checkpoint: {reason(error)}") from None

    def options(self, kind, **changes):
        """The run's options with changes, as a `kind`: magpo.Args. ValueError if they cannot be.

        What is imported must be among the changes: a file could name any module.
        """
        saved = {name: value for name, value in self.args.items() if name not in NOT_FROM_FILES}
        if odd := saved.keys() ^ {field.name for field in fields(kind)} - NOT_FROM_FILES:
            raise ValueError(f"{self.path} is of another magpo.py: only one has {', '.join(sorted(odd))}.")
        needed = {"env"} if saved["env_kwargs"] == "{}" else {"env", "env_kwargs"}
        if changes.get("env", saved["env"]) != saved["env"]:
            saved["env_kwargs"] = "{}"
        elif imports(saved["env"]) and not needed <= changes.keys():
            raise ValueError(
                f"{self.path} runs other code: if you trust it, add {spell(kind, saved, needed)}"
            )
        try:
            return kind(**saved | changes)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def networks(self, build, args, envs):
        """build(args, envs) with the file's weights. ValueError, with no memory taken, if they do not fit."""
        with self.fitting():
            with torch.device("meta"):
                networks = dict(zip(("guider", "learner"), build(args, envs), strict=True))
            for name, network in networks.items():
                check_like(self.saved[name], network.state_dict(), name)
        networks = build(args, envs)
        for name, network in zip(("guider", "learner"), networks, strict=True):
            network.load_state_dict(self.saved[name])
        return networks

    @contextlib.contextmanager
    def fitting(self):
        """Whatever goes wrong in it: ValueError."""
        try:
            yield
        except Exception as error:
            raise ValueError(f"{self.path} does not fit this run's options: {reason(error)}") from None


def reason(error):
    """An exception's words, and its type if it is not from here."""
    return error if type(error) is ValueError else f"{type(error).__name__}: {error}"


def imports(env):
    """Whether an environment is a module that its name tells to import."""
    return str(env).startswith(("pettingzoo:", "gym:"))


def spell(kind, args, names):
    """Those of a dict of options with these names that are no defaults, for the command line."""
    words = []
    for field in fields(kind):
        value = args[field.name] if field.name in names else field.default
        if value != field.default:
            flag = f"--{field.name.replace('_', '-')}"
            words.append(flag if value is True else f"{flag} {shlex.quote(str(value))}")
    return " ".join(words)


class Run:
    """A run's device and folder: args.json, metrics.csv, TensorBoard events and checkpoint.pt.

    Attributes:
        args: the options; of a run that is resumed, that run's. device: where to train. path: the folder.
        seed: of this process's environments and sampling. num_envs: its copies. leads: it writes.
        iteration, num_iterations: how many are behind us, and in all. saved: how many the checkpoint has.

    Raises ValueError if the options cannot work, or there is no checkpoint to go on from.
    """

    def __init__(self, args):
        self.checkpoint, self.iteration, self.saved, self.rows = None, 0, 0, []
        if args.resume:
            self.checkpoint = Checkpoint(args.resume)
            changes = {name: getattr(args, name) for name in args.given & BESIDE["resume"]}
            for name in changes.keys() & {"env", "env_kwargs"}:
                if changes[name] != self.checkpoint.args.get(name):
                    raise ValueError(f"a run keeps its {name}, and {args.resume} has another one.")
            args = self.checkpoint.options(type(args), **changes)
            self.iteration = self.saved = self.checkpoint.iteration
            self.rows = self.checkpoint.rows
        validate(args)
        self.args, self.leads, self.num_envs = args, RANK == 0, args.num_envs // WORLD
        if not self.leads:
            sys.stdout = open(os.devnull, "w")
        self.device = self.start_device()
        self.samples = args.num_envs * args.num_steps
        self.num_iterations = args.total_timesteps // self.samples
        name = f"{args.env}__{args.algo}__{args.seed}__{time.time():.2f}".replace(":", "_").replace("/", "_")
        self.path = self.checkpoint.path.parent if self.checkpoint else Path(args.runs_dir) / name
        self.seed = args.seed
        if RANK or self.iteration:  # seeds of PyTorch's generators have 32 bits, so that adding will not do
            self.seed = int(np.random.SeedSequence((args.seed, RANK, self.iteration)).generate_state(1)[0])
        seed_everything(args.seed)  # all processes build the same networks

    def start_device(self):
        """Set PyTorch and torchrun's process group up -> the device."""
        cuda = self.args.cuda and torch.cuda.is_available()
        if self.args.cuda and not cuda:
            print("--cuda: PyTorch sees no GPU here; training on the CPU.")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with it
        self.generator = torch.cuda.default_generators[device.index] if cuda else torch.default_generator
        if WORLD > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
            atexit.register(dist.destroy_process_group)
        torch.use_deterministic_algorithms(self.args.torch_deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # 2 % of the time, and nothing reads it
        torch.set_num_threads(self.args.torch_threads)
        return device

    def networks(self, build, envs):
        """build(args, envs) on the run's device, of a resumed run with its weights; compiled if asked for.

        On a GPU as CUDA graphs: what a call returns is overwritten by the next one.
        """
        build = partial(self.checkpoint.networks, build) if self.checkpoint else build
        networks = build(self.args, envs)
        for network in networks:
            network.to(self.device)
            if self.args.compile:
                network.compile(mode="reduce-overhead" if self.device.type == "cuda" else "default")
        return networks

    def restore(self, envs, memory, **parts):
        """Give the parts of a resumed run what was saved, and open the folder -> where to start.

        parts: guider, learner, optimizer, value_norm. They will be saved.
        -> what envs.reset(options=...) takes, and the memory: None, and as given, if episodes start anew.
        """
        self.parts = parts
        self.episode_return = torch.zeros(self.num_envs, device=self.device)  # so far, in each copy
        if RANK or self.iteration:
            seed_everything(self.seed)
        start = dict(memory=memory, envs=None)
        if self.checkpoint:
            with self.checkpoint.fitting():
                start |= self.load(envs, memory)
        if self.leads:
            self.open_folder()
            runs[:] = [self]
        return start["envs"], start["memory"]

    def load(self, envs, memory):
        """Load the checkpoint -> what self.here() was then; {} if that does not help here."""
        saved, like = (
            dict(self.checkpoint.saved),
            {name: part.state_dict() for name, part in self.parts.items()},
        )
        parameters = self.parts["optimizer"].param_groups[0]["params"]
        trained = range(len(parameters))
        if self.args.algo == "mappo" or self.args.backtracking == "reset":  # they do not train all
            trained = saved["optimizer"]["state"]
        moments = {
            i: dict(exp_avg=parameters[i], exp_avg_sq=parameters[i], step=torch.tensor(0.0)) for i in trained
        }
        saved["optimizer"] = like["optimizer"] | dict(
            state=saved["optimizer"]["state"]
        )  # the rest is in args
        like["optimizer"] = like["optimizer"] | dict(state=moments)
        for name, part in self.parts.items():
            check_like(saved[name], like[name], name)
            part.load_state_dict(saved[name])
        here = saved["here"]
        if WORLD > 1 or here.get("device") != self.device.type:
            print(
                "Episodes start anew: these environments cannot be saved, or the device or torchrun changed."
            )
            return {}
        envs.reset(seed=self.seed)
        check_like(here, self.here(envs, memory), "here")
        envs.reset(seed=self.seed, options=here["envs"])
        self.generator.set_state(here["generator"])
        self.episode_return = here["episode_return"].to(self.device)
        return dict(envs=here["envs"], memory=tuple(x.to(self.device) for x in here["memory"]))

    def here(self, envs, memory):
        """Where the episodes stand -> dict; empty where that cannot be saved."""
        stand = envs.state_dict()
        if WORLD > 1 or not stand:
            return {}
        here = dict(envs=stand, memory=memory, episode_return=self.episode_return)
        return here | dict(generator=self.generator.get_state(), device=self.device.type)

    def open_folder(self):
        """Make the folder, or take that of the run to resume, and keep other processes out of it."""
        if self.args.track:
            try:
                import wandb
            except ImportError:
                raise ValueError("--track needs the package wandb: pip install wandb.") from None
            wandb.init(project="magpo", name=self.path.name, config=asdict(self.args), sync_tensorboard=True)
        try:
            self.path.mkdir(parents=True, exist_ok=bool(self.checkpoint))
            self.lock = open(self.path / "lock", "w")
            if fcntl:  # lockf, not flock: worker processes inherit that one, and may outlive their owner
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.checkpoint and os.stat(self.checkpoint.path).st_mtime_ns != self.checkpoint.changed:
                raise BlockingIOError
            (self.path / "args.json").write_text(json.dumps(asdict(self.args), indent=1))
            self.file, self.table = open(self.path / "metrics.csv", "a"), None  # emptied at the first row
            self.writer = SummaryWriter(self.path, purge_step=self.iteration * self.samples + 1)
            lines = (f"    {name}: {value}" for name, value in asdict(self.args).items())
            self.writer.add_text("args", "\n".join(lines))
        except BlockingIOError:
            raise ValueError(f"{self.path} is in use by another process: wait for it, or stop it.") from None
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error}") from None
        before = self.rows[-1] if self.rows else dict(seconds=0, cpu_seconds=0)
        self.start = time.time() - before["seconds"], time.process_time() - before["cpu_seconds"]

    def iterations(self, envs, stop):
        """Numbers of the iterations still to go, until a process has something in its list `stop`."""
        steps, given, rest = self.num_iterations * self.samples, [], []
        for name, value in asdict(self.args).items():
            if value != "":
                (given if name in self.args.given else rest).append(f"{name} {value}")
        print(textwrap.fill(f"Given: {', '.join(given)}. By preset or default: {', '.join(rest)}.", 110))
        if envs.note:
            print(envs.note)
        if steps < self.args.total_timesteps:
            print(f"total_timesteps is cut to {steps}, a multiple of num_envs x num_steps.")
        title = dict(unit="step", unit_scale=self.samples, initial=self.iteration, total=self.num_iterations)
        self.bar = tqdm(range(self.iteration + 1, self.num_iterations + 1), disable=not self.leads, **title)
        for iteration in self.bar:
            yield iteration
            signals = gather(torch.full((1, 1), stop[0] if stop else 0, device=self.device))
            if signals.any():
                if not stop:  # another process has it
                    stop.append(signals.max().item())
                return

    def ended_returns(self, rewards, over):
        """Returns (E,) of the episodes that end with this step, nan where they go on."""
        total = self.episode_return + rewards
        self.episode_return = total * ~over
        return total.where(over, math.nan)

    def check_finite(self, iteration, series):
        """Raise FloatingPointError for what is first not finite in a rollout or update, dicts of (T, ...)."""
        self.rollout = series if "rewards" in series else self.rollout
        first = {}
        for name, x in series.items():
            if x.is_floating_point() and name != "episode_return":  # nan where none ended
                bad = ~x.isfinite().reshape(len(x), -1).all(1)  # (T,)
                if bad.any():
                    later = name in ("advantages", "returns")  # than the step that they are of
                    first[name] = later, bad.int().argmax().item()
        if not first:
            return
        name = min(first, key=first.get)
        options = ("learning_rate", "ent_coef", "vf_coef", "lam", "clip_coef")
        sizes = {option: getattr(self.args, option) for option in options}
        sizes |= {key: self.rollout[key].nan_to_num().abs().max().item() for key in ("obs", "rewards")}
        largest = max(sizes, key=sizes.get)
        cause = f"{largest} of {sizes[largest]:.3g}" if sizes[largest] > 1e3 else "a learning_rate too high"
        if name in ("obs", "state", "rewards", "final_obs", "final_state"):
            cause = f"the environment {self.args.env}"
        raise FloatingPointError(f"iteration {iteration}: {name} is not finite; likely cause: {cause}")

    def mean(self, iteration, metrics):
        """Means over minibatches, a list of dicts of scalars, and processes. They must be finite."""
        columns = {name: torch.stack([row[name] for row in metrics]).detach() for name in metrics[0]}
        self.check_finite(iteration, columns)
        return {name: gather(x.unsqueeze(0)).mean().item() for name, x in columns.items()}

    def evaluates(self, iteration):
        """Whether the learners are evaluated after this iteration, by this process."""
        return self.leads and (iteration % self.args.eval_every == 0 or iteration in (1, self.num_iterations))

    def log(self, iteration, row):
        """Count an iteration as done, and add its row, behind the clocks, to metrics.csv and TensorBoard."""
        self.iteration, step = iteration, iteration * self.samples
        if not self.leads:
            return
        seconds, cpu_seconds = time.time() - self.start[0], time.process_time() - self.start[1]
        row = dict(step=step, seconds=seconds, cpu_seconds=cpu_seconds) | row
        if self.table is None:
            self.file.truncate(0)
            self.table = csv.DictWriter(self.file, row, extrasaction="ignore")
            self.table.writeheader()
            self.table.writerows(self.rows)
        self.rows.append(row)
        self.table.writerow(row)
        self.file.flush()
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        if not math.isnan(row["learner_return"]):
            self.bar.set_postfix({name: f"{row[name]:.2f}" for name in ("guider_return", "learner_return")})

    def save(self, envs, memory):
        """Replace the checkpoint at once: a kill or a full disk meanwhile leaves the old one whole."""
        if not self.leads:
            return
        contents = dict(version=VERSION, args=asdict(self.args), iteration=self.iteration, rows=self.rows)
        contents |= {name: part.state_dict() for name, part in self.parts.items()}
        data = io.BytesIO()  # so that a full disk is an OSError, and the file is not open for long
        torch.save(contents | {"here": self.here(envs, memory)}, data)
        with open(self.path / "checkpoint.tmp", "wb") as file:
            file.write(data.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.path / "checkpoint.pt")
        self.writer.flush()
        self.saved = self.iteration

    def what_is_saved(self):
        """Where the run stands, and how to go on with it: one or two sentences."""
        text = f"{self.iteration} of {self.num_iterations} iterations are done"
        if not self.saved:
            return f"{text}; nothing was saved yet."
        names = MACHINE | ({"env", "env_kwargs"} if imports(self.args.env) else set())
        command = f"python magpo.py --resume {shlex.quote(str(self.path))}"
        command = f"{command} {spell(type(self.args), vars(self.args), names)}"
        return f"{text}; the checkpoint is of iteration {self.saved}. To go on: {command.strip()}"

    def close(self):
        """Close the files, and say where they are -> the folder."""
        if self.leads:
            for file in (self.writer, self.file, self.lock):
                file.close()
            print(f"Everything is in {self.path}")
            if self.iteration < self.num_iterations:
                print(f"Stopped: {self.what_is_saved()}")
        return self.path
