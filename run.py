"""What surrounds a run: its folder, metrics, checkpoints, signals and processes. magpo.py's reader need not open it."""

import atexit
import csv
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # its default arguments, read before there is a process group, do not keep that one alive
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import make

VERSION = 1  # of checkpoints
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's: this process, how many


def make_envs(args, num_envs, device="cpu"):
    """E copies of the environment that magpo.Args name -> gymnasium.vector.VectorEnv; ValueError if they cannot be made."""
    if args.num_workers not in (0, args.num_envs):
        raise ValueError("num_workers must be 0 or num_envs: gymnasium runs one process per copy.")
    workers = num_envs if args.num_workers and num_envs > 1 else 0
    try:
        kwargs = dict(**json.loads(args.env_kwargs))
    except (ValueError, TypeError):
        raise ValueError(f"env_kwargs must be a JSON object such as '{{\"N\": 5}}', not {args.env_kwargs!r}.") from None
    return make(args.env, num_envs, device, workers, args.state, **kwargs)


def validate(args):
    """Raise ValueError, in one sentence, for options (magpo.Args) that cannot work."""
    may_be_zero = {"seed", "gamma", "gae_lambda", "ent_coef", "vf_coef", "lam", "num_workers"}
    for name, value in vars(args).items():
        if type(value) in (int, float) and not (value > 0 or value == 0 and name in may_be_zero):
            raise ValueError(f"{name} must {'not be negative' if name in may_be_zero else 'be above 0'}, but is {value}.")
    samples = args.num_envs // WORLD * (1 if args.recurrent else args.num_steps)
    for good, message in (
        (args.algo in ("magpo", "mappo", "ctds"), f"algo must be magpo, mappo or ctds, but is {args.algo!r}."),
        (args.backtracking in ("soft", "reset"), f"backtracking must be soft or reset, but is {args.backtracking!r}."),
        (max(args.gamma, args.gae_lambda) <= 1, "gamma and gae_lambda must lie in [0, 1]."),
        (args.delta > 1, f"delta must be above 1 (the guider's distance from the learners), but is {args.delta}."),
        (samples % args.num_minibatches == 0, "num_minibatches must divide num_envs x num_steps, or num_envs if recurrent."),
        (args.seed < 2**32, f"seed must lie in [0, 2**32), but is {args.seed}."),
        (not (args.algo == "mappo" and args.residual), "mappo has no guider policy, so it knows neither residual nor reset."),
        (args.eval or not args.render, "render needs eval: it shows the learners of a checkpoint."),
        (args.num_envs % WORLD == 0, f"num_envs must be a multiple of torchrun's processes, {WORLD}."),
        (args.total_timesteps >= args.num_envs * args.num_steps, "total_timesteps is below one rollout, num_envs x num_steps."),
    ):
        if not good:
            raise ValueError(message)
    make_envs(args, 1).close()


def gather(x):
    """(T, E, ...) of this process -> (T, K E, ...) of all K processes of torchrun; x itself if there is one."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, 1)


def share_gradients(parameters):
    """The same list; from now on a backward pass leaves, in each parameter, the mean of all processes' gradients."""

    def mean(gradient):
        dist.all_reduce(gradient := gradient / WORLD)
        return gradient

    for parameter in parameters if WORLD > 1 else ():
        parameter.register_hook(mean)
    return parameters


def check_finite(iteration, cause, quantities):
    """Raise FloatingPointError for the quantity (of a dict of tensors) in whose first axis nan or infinity comes first."""
    bad = {name: ~x.reshape(len(x), -1).isfinite().all(1) for name, x in quantities.items()}
    first = {name: x.int().argmax().item() for name, x in bad.items() if x.any()}
    if first:
        name = min(first, key=first.get)
        raise FloatingPointError(f"iteration {iteration}: {name} is not finite; likely cause: {cause}")


def catch_signals():
    """A list that will hold the number of the first Ctrl-C or SIGTERM; a second one ends the process at once."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def catch(number, _):
        caught.append(number)
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nStopping after this iteration.\n")  # print may be in the middle of something

    for number in numbers:
        signal.signal(number, catch)
    return caught


def read_checkpoint(path, device="cpu"):
    """Read a checkpoint, or that of a run's folder -> dict; ValueError if it cannot be read.

    It runs no code of the file's; but the environment it names is imported, by whoever uses it.
    """
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        contents = torch.load(path, map_location=device, weights_only=True)
        if contents["version"] == VERSION and {"args", "iteration", "rows", "here", "guider", "learner"} <= contents.keys():
            return contents
        reason = f"its version is {contents['version']}, not {VERSION}, or it is not whole"
    except Exception as error:  # torch.load raises many kinds for missing, empty, cut, foreign and malicious files
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
    raise ValueError(f"{path} cannot be read as a checkpoint of magpo.py: {reason}")


class Run:
    """A run's device and folder: metrics.csv, TensorBoard events and checkpoint.pt. Of torchrun's processes, rank 0 writes.

    Args:
        args: magpo.Args, asdict'ed; "resume" is empty, or the run to go on with.

    Attributes:
        device: where to train. path: the folder. seed: of this process's environments and sampling.
        iteration, num_iterations: how many are behind us, and in all. leads: whether this process writes and prints.

    Raises:
        ValueError: no checkpoint to go on from. OSError: the folder cannot be written.
    """

    def __init__(self, args):
        self.args = args
        cuda = self.args["cuda"] and torch.cuda.is_available()
        self.leads = RANK == 0
        sys.stdout = sys.stdout if self.leads else open(os.devnull, "w")
        if self.args["cuda"] and not cuda:
            print("--cuda: PyTorch sees no GPU here; training on the CPU.")
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with one of these
        self.saved = read_checkpoint(args["resume"], self.device) if args["resume"] else {}
        if WORLD > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
            atexit.register(dist.destroy_process_group)
        torch.manual_seed(self.args["seed"])
        torch.use_deterministic_algorithms(self.args["torch_deterministic"], warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it costs 2 %, and everything here is initialized
        torch.set_num_threads(self.args["torch_threads"])
        self.iteration, self.rows = self.saved.get("iteration", 0), self.saved.get("rows", [])
        self.generator = torch.cuda.default_generators[self.device.index] if cuda else torch.default_generator
        self.samples = self.args["num_envs"] * self.args["num_steps"]
        self.num_iterations = self.args["total_timesteps"] // self.samples
        self.seed = self.args["seed"]
        if RANK or self.iteration:  # PyTorch's generators on the CPU heed 32 bits of a seed only, so that adding will not do
            self.seed = int(np.random.SeedSequence((self.seed, RANK, self.iteration)).generate_state(1)[0])
        name = "{env}__{algo}__{seed}__".format(**self.args).replace(":", "_") + f"{time.time():.2f}"
        self.file = self.table = None
        self.path = Path(args["resume"] or Path(args["runs_dir"]) / name)
        self.path = self.path.parent if self.path.is_file() and self.saved else self.path
        if self.leads:
            self.path.mkdir(parents=True, exist_ok=bool(self.saved))
            self.writer = SummaryWriter(self.path, purge_step=self.iteration * self.samples + 1)
        before = self.rows[-1] if self.rows else {"seconds": 0, "cpu_seconds": 0}
        self.start = time.time() - before["seconds"], time.process_time() - before["cpu_seconds"]

    def place(self, *networks):
        """The same networks on the run's device; their forward passes, and so the updates, compiled if --compile asks for it.

        On a GPU as CUDA graphs: what a call returns is overwritten by the next one.
        """
        for network in networks:
            network.to(self.device)
            if self.args["compile"]:
                network.compile(mode="reduce-overhead" if self.device.type == "cuda" else "default")
        return networks

    def iterations(self, note, stop):
        """Numbers, from 1, of the iterations still to go, until a process has something in its list `stop`; with a progress bar.

        Says first what of the options does not count.
        """
        print(note, end="\n" if note else "")
        if self.num_iterations * self.samples < self.args["total_timesteps"]:
            print(f"total_timesteps is cut to {self.num_iterations * self.samples}, a multiple of num_envs x num_steps.")
        if (self.args["algo"], self.args["backtracking"]) != ("magpo", "soft"):
            bound = "" if self.args["algo"] == "mappo" else f", delta {self.args['delta']}"
            print("{algo}, {backtracking} backtracking: lambda is {lam}".format(**self.args) + f"{bound}, by definition.")
        bar = dict(
            unit="step", unit_scale=self.samples, initial=self.iteration, total=self.num_iterations, disable=not self.leads
        )
        self.bar = tqdm(range(self.iteration + 1, self.num_iterations + 1), **bar)
        for iteration in self.bar:
            yield iteration
            if gather(torch.full((1, 1), len(stop), device=self.device)).any():
                break

    def restore(self, parts):
        """Load what has a state_dict -> what else was saved "here": empty at a start, or if the episodes start anew."""
        for name, part in parts.items() if self.saved else ():
            part.load_state_dict(self.saved[name])
        here = self.saved.get("here", {})
        if WORLD == 1 and here.get("device") == self.device.type:
            self.generator.set_state(here["generator"].cpu())
            return here
        if self.saved:
            print("Episodes start anew: these environments cannot be saved, or not from this device or number of processes.")
        if self.seed != self.args["seed"]:
            torch.manual_seed(self.seed)
        return {}

    def save(self, parts, envs, air):
        """Replace the checkpoint at once: whoever is killed meanwhile, or finds the disk full, leaves the old one whole."""
        if not self.leads:
            return
        here = dict(envs=envs.state_dict(), air=air, generator=self.generator.get_state(), device=self.device.type)
        contents = dict(version=VERSION, args=self.args | {"resume": ""}, iteration=self.iteration, rows=self.rows)
        contents |= {name: part.state_dict() for name, part in parts.items()}
        memory = io.BytesIO()  # so that a full disk is an OSError, and nothing is computed while the file is open
        torch.save(contents | {"here": here if here["envs"] and WORLD == 1 else {}}, memory)
        with open(self.path / "checkpoint.tmp", "wb") as file:
            file.write(memory.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.path / "checkpoint.pt")
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
        if row["learner_return"] == row["learner_return"]:  # there was an evaluation
            self.bar.set_postfix({name: f"{row[name]:.2f}" for name in ("guider_return", "learner_return")})

    def close(self):
        """Close the files, and say where they are."""
        self.writer.close()
        if self.file:  # a finished run may be resumed, to no effect
            self.file.close()
        print(f"Everything is in {self.path}")
        if self.iteration < self.num_iterations:
            print(f"Stopped after iteration {self.iteration}. To go on: python magpo.py --resume {self.path}")
