"""What surrounds a run: random numbers, processes, and its folder with metrics and checkpoints.

magpo.py's reader need not open it. Of torchrun's processes, rank 0 alone writes and prints.
"""

import atexit
import contextlib
import csv
import fcntl
import io
import json
import math
import os
import random
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # its default arguments, read before there is a process group, do not keep that one alive
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from options import WORLD, validate

RANK = int(os.environ.get("RANK", 0))  # torchrun's number of this process
VERSION = 2  # of checkpoints


# --- Random numbers and evaluations -------------------------------------------------------------------------------


def seed_everything(seed):
    """Seed PyTorch's, NumPy's and Python's global generators; environments may use any of them."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextlib.contextmanager
def seeded(seed, device):
    """Within it random numbers follow from this seed; afterwards all go on as if nothing had been."""
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


# --- Checkpoints --------------------------------------------------------------------------------------------------


class Checkpoint:
    """What a run saved, read without running code of the file's; ValueError if it cannot be read.

    path: the file, or the folder of the run that it is in.
    """

    def __init__(self, path, device="cpu"):
        self.path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
        try:
            self.saved = saved = torch.load(self.path, map_location=device, weights_only=True)
            if saved["version"] != VERSION:
                raise ValueError(f"its version is {saved['version']}, not {VERSION}")
            if not all(
                x.isfinite().all() for network in ("guider", "learner") for x in saved[network].values()
            ):
                raise ValueError("its weights are not finite")
            if not all(type(value) in (int, float) for row in saved["rows"] for value in row.values()):
                raise ValueError("its rows are not numbers")
            self.iteration, self.rows, self.here = (
                int(saved["iteration"]),
                list(saved["rows"]),
                dict(saved["here"]),
            )
        except (
            Exception
        ) as error:  # torch.load raises many kinds for missing, empty, cut, foreign and malicious files
            reason = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
            reason = str(reason).split("\n")[0]
            raise ValueError(f"{self.path} cannot be read as a checkpoint of magpo.py: {reason}") from None

    def options(self, **changes):
        """The run's options, with changes -> dict. A file has no say in what is imported, or where to read and write."""
        options = {
            k: v for k, v in self.saved["args"].items() if k not in ("runs_dir", "resume", "eval", "track")
        }
        if "env" in changes:
            options["env_kwargs"] = "{}"
        elif str(options["env"]).startswith(("pettingzoo:", "gym:")):
            raise ValueError(
                f"{self.path} is of {options['env']}; add --env {options['env']} if you trust its code."
            )
        return options | changes

    def load_into(self, **parts):
        """Load what was saved of each part that has a state_dict; ValueError if it does not fit."""
        try:
            for name, part in parts.items():
                part.load_state_dict(self.saved[name])
        except Exception as error:  # of another environment, other options, or a damaged file
            reason = str(error).strip().split("\n")[-1].strip()
            raise ValueError(
                f"{self.path} does not fit this environment and these options: {reason}"
            ) from None


class Run:
    """A run's device and folder: args.json, metrics.csv, TensorBoard events and checkpoint.pt.

    Attributes:
        args: the options; of a run that is resumed, that run's. device: where to train. path: the folder.
        seed: of this process's environments and sampling. num_envs: its copies. leads: whether it writes and prints.
        iteration, num_iterations: how many are behind us, and in all.

    Raises:
        ValueError: the options cannot work, there is no checkpoint to go on from, or the folder cannot be written.
    """

    def __init__(self, args):
        self.checkpoint = Checkpoint(args.resume) if args.resume else None
        if self.checkpoint:
            changes = {name: getattr(args, name) for name in ("env", "env_kwargs") if "env" in args.given}
            args = type(args)(**self.checkpoint.options(**changes), resume=args.resume)
        validate(args)
        self.args, self.leads, self.num_envs = args, RANK == 0, args.num_envs // WORLD
        sys.stdout = sys.stdout if self.leads else open(os.devnull, "w")
        self.device = self.start_device()
        self.samples = args.num_envs * args.num_steps
        self.num_iterations = args.total_timesteps // self.samples
        self.iteration, self.rows = 0, []
        if self.checkpoint:
            self.iteration, self.rows = self.checkpoint.iteration, self.checkpoint.rows
        self.seed = args.seed
        if RANK or self.iteration:  # seeds of PyTorch's generators have 32 bits, so that adding will not do
            self.seed = int(np.random.SeedSequence((args.seed, RANK, self.iteration)).generate_state(1)[0])
        seed_everything(args.seed)  # all processes build the same networks
        self.open_folder()
        before = self.rows[-1] if self.rows else dict(seconds=0, cpu_seconds=0)
        self.start = time.time() - before["seconds"], time.process_time() - before["cpu_seconds"]

    def start_device(self):
        """Set PyTorch and torchrun's process group up -> the device."""
        cuda = self.args.cuda and torch.cuda.is_available()
        if self.args.cuda and not cuda:
            print("--cuda: PyTorch sees no GPU here; training on the CPU.")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
            os.environ.setdefault(
                "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
            )  # cuBLAS repeats itself only with one of these
        self.generator = torch.cuda.default_generators[device.index] if cuda else torch.default_generator
        if WORLD > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
            atexit.register(dist.destroy_process_group)
        torch.use_deterministic_algorithms(self.args.torch_deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = (
            False  # it costs 2 %, and everything here is initialized
        )
        torch.set_num_threads(self.args.torch_threads)
        return device

    def open_folder(self):
        """Make the folder, or take that of the run to resume, and keep other processes out of it."""
        args = self.args
        name = f"{args.env}__{args.algo}__{args.seed}__{time.time():.2f}".replace(":", "_").replace("/", "_")
        self.path = self.checkpoint.path.parent if self.checkpoint else Path(args.runs_dir) / name
        if not self.leads:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=bool(self.checkpoint))
            self.lock = open(self.path / "lock", "w")
            fcntl.flock(
                self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the system frees it when this process ends
            (self.path / "args.json").write_text(json.dumps(asdict(args), indent=1))
        except BlockingIOError:
            raise ValueError(f"{self.path} is in use by another process; wait for it, or stop it.") from None
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error}") from None
        self.writer = SummaryWriter(self.path, purge_step=self.iteration * self.samples + 1)
        self.writer.add_text(
            "args", "\n".join(f"    {name}: {value}" for name, value in asdict(args).items())
        )
        self.file = open(self.path / "metrics.csv", "a")  # empties it when the first row comes
        self.table = None

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
        args = asdict(self.args)
        options = [
            f"{name} {value}" for name, value in args.items() if value != "" and name in self.args.given
        ]
        preset = [f"{name} {value}" for name, value in args.items() if name not in self.args.given]
        print(textwrap.fill(f"Options: {', '.join(options)}. From the preset: {', '.join(preset)}.", 110))
        if envs.note:
            print(envs.note)
        if self.num_iterations * self.samples < self.args.total_timesteps:
            print(
                f"total_timesteps is cut to {self.num_iterations * self.samples}, a multiple of num_envs x num_steps."
            )
        self.bar = tqdm(
            range(self.iteration + 1, self.num_iterations + 1),
            unit="step",
            unit_scale=self.samples,
            initial=self.iteration,
            total=self.num_iterations,
            disable=not self.leads,
        )
        for iteration in self.bar:
            yield iteration
            if gather(torch.full((1, 1), len(stop), device=self.device)).any():
                break

    def restore(self, **parts):
        """Keep the parts of the training, to save them -> where a resumed run's episodes stood.

        That is empty at a start, or if the episodes start anew.
        """
        self.parts = parts
        self.episode_return = torch.zeros(self.num_envs, device=self.device)  # so far, in each copy
        if not self.checkpoint:
            return {}
        self.checkpoint.load_into(**parts)
        here = self.checkpoint.here
        if WORLD == 1 and here.get("device") == self.device.type:
            self.generator.set_state(here["generator"].cpu())
            self.episode_return = here["episode_return"]
            return here
        print(
            "Episodes start anew: these environments cannot be saved, or not from this device or number of processes."
        )
        seed_everything(self.seed)
        return {}

    def ended_returns(self, rewards, over):
        """Returns (E,) of the episodes that end with this step, nan where they go on."""
        total = self.episode_return + rewards
        self.episode_return = total * ~over
        return total.where(over, math.nan)

    def check_finite(self, iteration, buffer):
        """Raise FloatingPointError for what in a rollout, a dict of (T, ...), is first not to be finite."""
        first = {}
        for name, x in buffer.items():
            if x.is_floating_point() and name != "episode_return":  # nan where none ended
                bad = ~x.isfinite().flatten(1).all(1)  # (T,)
                if bad.any():
                    first[name] = bad.int().argmax().item()
        if first:
            name = min(first, key=first.get)
            causes = dict(
                values="a learning rate too high", advantages="rewards too large", returns="rewards too large"
            )
            cause = causes.get(name, self.args.env)
            raise FloatingPointError(
                f"iteration {iteration}: {name} not finite; likely cause: {cause}{self.kept()}"
            )

    def mean(self, iteration, metrics):
        """Means over minibatches (a list of dicts of scalars) and processes; FloatingPointError if one is not finite."""
        columns = {
            name: torch.stack([row[name] for row in metrics]).detach().unsqueeze(0) for name in metrics[0]
        }
        means = {name: gather(x).mean().item() for name, x in columns.items()}
        if bad := [name for name, mean in means.items() if not math.isfinite(mean)]:
            cause = "a learning rate too high"
            raise FloatingPointError(
                f"iteration {iteration}: {bad[0]} not finite; likely cause: {cause}{self.kept()}"
            )
        return means

    def evaluates(self, iteration):
        """Whether the learners are evaluated after this iteration, by this process."""
        return self.leads and (iteration % self.args.eval_every == 0 or iteration in (1, self.num_iterations))

    def log(self, iteration, row):
        """Count an iteration as done, and add its row, behind the step and the times so far, to metrics.csv and TensorBoard."""
        self.iteration, step = iteration, iteration * self.samples
        if not self.leads:
            return
        row = (
            dict(
                step=step,
                seconds=time.time() - self.start[0],
                cpu_seconds=time.process_time() - self.start[1],
            )
            | row
        )
        if self.table is None:
            self.file.truncate(0)
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

    def save(self, envs, **episodes):
        """Replace the checkpoint at once: whoever is killed meanwhile, or finds the disk full, leaves the old one whole."""
        if not self.leads:
            return
        here = episodes | dict(
            envs=envs.state_dict(), generator=self.generator.get_state(), device=self.device.type
        )
        contents = dict(version=VERSION, args=asdict(self.args), iteration=self.iteration, rows=self.rows)
        contents |= {name: part.state_dict() for name, part in self.parts.items()}
        memory = (
            io.BytesIO()
        )  # so that a full disk is an OSError, and nothing is computed while the file is open
        torch.save(contents | {"here": here if here["envs"] and WORLD == 1 else {}}, memory)
        with open(self.path / "checkpoint.tmp", "wb") as file:
            file.write(memory.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.path / "checkpoint.pt")
        self.writer.flush()

    def resume_command(self):
        """How to go on with this run."""
        code = self.args.env.startswith(("pettingzoo:", "gym:"))
        return f"python magpo.py --resume {self.path}" + (f" --env {self.args.env}" if code else "")

    def close(self):
        """Close the files, and say where they are."""
        if not self.leads:
            return
        for file in (self.writer, self.file, self.lock):
            file.close()
        print(f"Everything is in {self.path}")
        if self.iteration < self.num_iterations:
            print(f"Stopped after iteration {self.iteration}. To go on: {self.resume_command()}")
