"""What surrounds a run: its folder with metrics and checkpoints, and where it stands.

magpo.py's reader need not open it. What it is made of has rooms in support/.
"""

import csv
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from support import machine
from support.checkpoint import Checkpoint, check_like, write
from support.options import affordable, likely_cause, resolved, to_resume, validate


class Run:
    """A run's device and folder: args.json, metrics.csv, TensorBoard events and checkpoint.pt.

    Attributes:
        args: the options; of a run that is resumed, that run's. device: where to train. path: the folder.
        seed: of this process's environments and sampling. num_envs: its copies. leads: it writes.
        iteration, num_iterations: how many are behind us, and in all. saved_iteration: the checkpoint's.

    Raises ValueError if the options cannot work, or there is no checkpoint to go on from.
    """

    current = None  # the run that has its folder open, so that a failure can say what is saved

    def __init__(self, args):
        self.checkpoint, self.iteration, self.rows = None, 0, []
        if args.resume:
            self.checkpoint = Checkpoint(args.resume)
            args = self.checkpoint.resumed(args)
            self.iteration, self.rows = self.checkpoint.iteration, self.checkpoint.rows
        validate(args)
        self.args, self.leads, self.num_envs = args, machine.RANK == 0, args.num_envs // machine.WORLD
        if not self.leads:
            sys.stdout = open(os.devnull, "w")
        self.device = machine.start_device(args)
        self.samples = args.num_envs * args.num_steps
        self.num_iterations = args.total_timesteps // self.samples
        self.saved_iteration = self.iteration
        name = f"{args.env}__{args.algo}__{args.seed}__{time.time():.2f}".replace(":", "_").replace("/", "_")
        self.path = self.checkpoint.path.parent if self.checkpoint else Path(args.runs_dir) / name
        self.seed = machine.own_seed(args.seed, self.iteration)
        machine.seed_everything(args.seed)  # all processes build the same networks

    def networks(self, build, envs):
        """build(args, envs) on the run's device, of a resumed run with its weights; compiled if asked for.

        On a GPU as CUDA graphs: what a call returns is overwritten by the next one.
        """
        resumed = self.checkpoint
        networks = resumed.networks(build, self.args, envs) if resumed else build(self.args, envs)
        for network in networks:
            network.to(self.device)
            if self.args.compile:
                network.compile(mode="reduce-overhead" if self.device.type == "cuda" else "default")
        return networks

    def open(self, envs, memory, **parts):
        """Open the folder. Give optimizer and value_norm of a resumed run what was saved.

        parts: guider, learner, optimizer, value_norm. They will be saved.
        -> options for envs.reset(), and the memory. If episodes start anew: None, and the memory as given.
        """
        self.parts, episodes = parts, None
        self.episode_return = torch.zeros(self.num_envs, device=self.device)  # so far, in each copy
        if self.seed != self.args.seed:
            machine.seed_everything(self.seed)
        if self.checkpoint:
            partly = self.args.algo == "mappo" or self.args.backtracking == "reset"
            with self.checkpoint.fitting():
                self.checkpoint.restore(parts["optimizer"], parts["value_norm"], all_trained=not partly)
                episodes, memory = self.load_episodes(envs, memory)
        if self.leads:
            self.open_folder()
        Run.current = self
        return episodes, memory

    def here(self, envs, memory):
        """Where the episodes stand -> dict; empty where that cannot be saved."""
        if machine.WORLD > 1 or not (stand := envs.state_dict()):
            return {}
        here = dict(envs=stand, memory=memory, episode_return=self.episode_return)
        return here | dict(generator=machine.generator(self.device).get_state(), device=self.device.type)

    def load_episodes(self, envs, memory):
        """Go on where the episodes stood -> what open returns."""
        here = self.checkpoint.saved["here"]
        if machine.WORLD > 1 or here.get("device") != self.device.type:
            why = "torchrun saves none" if machine.WORLD > 1 else "the checkpoint has none for this device"
            print(f"Episodes start anew: {why}.")
            return None, memory
        envs.reset(seed=self.seed)  # gives here() its shapes
        check_like(here, self.here(envs, memory), "here")
        envs.reset(seed=self.seed, options=here["envs"])
        machine.generator(self.device).set_state(here["generator"])
        self.episode_return = here["episode_return"].to(self.device)
        return here["envs"], tuple(x.to(self.device) for x in here["memory"])

    def open_folder(self):
        """Make the folder, or take that of the run to resume, and keep other processes out of it."""
        if self.args.track:
            import wandb

            wandb.init(project="magpo", name=self.path.name, config=asdict(self.args), sync_tensorboard=True)
        try:
            self.path.mkdir(parents=True, exist_ok=bool(self.checkpoint))
            self.lock = machine.lock(self.path)
            if self.checkpoint and os.stat(self.checkpoint.path).st_mtime_ns != self.checkpoint.changed:
                raise BlockingIOError
            (self.path / "args.json").write_text(json.dumps(asdict(self.args), indent=1))
            self.file, self.table = open(self.path / "metrics.csv", "a"), None  # rewritten with the next row
            self.writer = SummaryWriter(self.path, purge_step=self.iteration * self.samples + 1)
            lines = (f"    {name}: {value}" for name, value in asdict(self.args).items())
            self.writer.add_text("args", "\n".join(lines))
        except BlockingIOError:
            raise ValueError(f"{self.path} is in use by another process: wait for it, or stop it.") from None
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error}") from None
        before = self.rows[-1] if self.rows else dict(seconds=0, cpu_seconds=0)
        self.clocks = time.time() - before["seconds"], time.process_time() - before["cpu_seconds"]

    def iterations(self, envs, stop):
        """Numbers of the iterations still to go, until a process has something in its list `stop`."""
        steps = self.num_iterations * self.samples
        print(resolved(self.args))
        if envs.note:
            print(envs.note)
        if steps < self.args.total_timesteps:
            print(f"total_timesteps is cut to {steps}, a multiple of num_envs x num_steps.")
        title = dict(unit="step", unit_scale=self.samples, initial=self.iteration, total=self.num_iterations)
        self.bar = tqdm(range(self.iteration + 1, self.num_iterations + 1), disable=not self.leads, **title)
        for iteration in self.bar:
            yield iteration
            machine.share(stop, self.device)
            if stop:
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
            bad = ~x.isfinite().reshape(len(x), -1).all(1)  # (T,)
            if name != "episode_return" and bad.any():  # that one is nan where none ended
                later = name in ("advantages", "returns")  # than the step that they are of
                first[name] = later, bad.int().argmax().item()
        if not first:
            return
        name = min(first, key=first.get)
        cause = likely_cause(self.args, self.rollout, name)
        raise FloatingPointError(f"iteration {iteration}: {name} is not finite; likely cause: {cause}")

    def mean(self, iteration, metrics):
        """Means over minibatches, a list of dicts of scalars, and processes. They must be finite."""
        columns = {name: torch.stack([row[name] for row in metrics]).detach() for name in metrics[0]}
        self.check_finite(iteration, columns)
        return {name: machine.gather(x.unsqueeze(0)).mean().item() for name, x in columns.items()}

    def evaluates(self, iteration):
        """Whether the learners are evaluated after this iteration, by this process."""
        return self.leads and (iteration % self.args.eval_every == 0 or iteration in (1, self.num_iterations))

    def episodes(self, envs):
        """How many episodes an evaluation plays: as many as cost a tenth of the training between two."""
        return affordable(self.args, self.args.num_envs, self.args.eval_every * self.samples, envs)

    def log(self, iteration, row):
        """Count an iteration as done, and add its row, behind the clocks, to metrics.csv and TensorBoard."""
        self.iteration, step = iteration, iteration * self.samples
        if not self.leads:
            return
        seconds, cpu_seconds = time.time() - self.clocks[0], time.process_time() - self.clocks[1]
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
        """Replace the checkpoint by one of this iteration."""
        if not self.leads or self.saved_iteration == self.iteration:
            return
        contents = dict(args=asdict(self.args), iteration=self.iteration, rows=self.rows)
        contents |= {name: part.state_dict() for name, part in self.parts.items()}
        write(self.path, contents | dict(here=self.here(envs, memory)))
        self.writer.flush()
        self.saved_iteration = self.iteration

    def what_is_saved(self):
        """Where the run stands, and how to go on with it: one or two sentences."""
        text = f"{self.iteration} of {self.num_iterations} iterations are done"
        if not self.saved_iteration:
            return f"{text}; nothing was saved yet."
        command = to_resume(self.path, self.args)
        return f"{text}; the checkpoint is of iteration {self.saved_iteration}. To go on: {command}"

    def close(self):
        """Close the files, and say where they are -> the folder."""
        if self.leads:
            for file in (self.writer, self.file, self.lock):
                file.close()
            print(f"Everything is in {self.path}")
            if self.iteration < self.num_iterations:
                print(f"Stopped: {self.what_is_saved()}")
        return self.path
