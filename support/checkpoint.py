"""A run's checkpoint.pt: written whole or not at all, and read as if a stranger had made it.

Reading one runs no code of the file's, and builds no network before the file fits it. The file says neither
what is imported or written, nor what the machine does.
"""

import contextlib
import io
import os
import pickle
import reprlib
import warnings
from dataclasses import fields
from pathlib import Path

import torch

from support.options import BESIDE, NOT_FROM_FILES, imports, make_envs, spell

VERSION = 4  # of checkpoints
CLOCKS = {"seconds", "cpu_seconds"}  # columns that a resumed run goes on from


def write(folder, contents):
    """Replace the checkpoint at once: a kill or a full disk meanwhile leaves the old one whole."""
    data = io.BytesIO()  # so that a full disk is an OSError, and the file is not open for long
    torch.save(contents | dict(version=VERSION), data)
    with open(folder / "checkpoint.tmp", "wb") as file:
        file.write(data.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, folder / "checkpoint.pt")


class Checkpoint:
    """What a run saved.

    path: the file, or the folder of the run that it is in. Raises ValueError if it cannot be read.
    """

    def __init__(self, path):
        self.path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
        try:
            with warnings.catch_warnings(action="ignore"):
                self.saved = torch.load(self.path, map_location="cpu", weights_only=True)
            self.changed = os.stat(self.path).st_mtime_ns
            check_contents(self.saved)
        except Exception as error:  # torch.load raises many kinds for missing, cut and foreign files
            foreign = isinstance(error, pickle.UnpicklingError)
            why = "it is none, or holds more than numbers and text" if foreign else reason(error)
            raise ValueError(f"{self.path} cannot be read as a checkpoint: {why}") from None
        self.args, self.iteration, self.rows = (self.saved[name] for name in ("args", "iteration", "rows"))

    def options(self, kind, **changes):
        """The run's options with changes, as a `kind`: magpo.Args. ValueError if they cannot be.

        What is imported must be among the changes: a file could name any module.
        """
        saved = {name: value for name, value in self.args.items() if name not in NOT_FROM_FILES}
        names = {field.name for field in fields(kind)} - NOT_FROM_FILES
        if odd := saved.keys() ^ names:
            raise ValueError(f"{self.path} is of another magpo.py: only one has {', '.join(sorted(odd))}.")
        needed = {"env"} if saved["env_kwargs"] == "{}" else {"env", "env_kwargs"}
        if changes.get("env", saved["env"]) != saved["env"]:
            if saved["env_kwargs"] != "{}" and "env_kwargs" not in changes:
                print(f"env_kwargs {saved['env_kwargs']} of the run are not used in another environment.")
            saved["env_kwargs"] = "{}"
        elif imports(saved["env"]) and not needed <= changes.keys():
            command = spell(kind, saved, needed)
            raise ValueError(f"{self.path} runs other code: if you trust it, add {command}")
        try:
            return kind(**saved | changes)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def load(self, kind, build, **changes):
        """What magpo.load returns, with magpo's Args and build."""
        args = self.options(kind, **changes)
        envs = make_envs(args, 1)
        guider, learner = self.networks(build, args, envs)
        envs.close()
        return args, guider, learner

    def resumed(self, args):
        """The run's options with what `args`, a magpo.Args, gives beside resume. ValueError: see options."""
        if self.path.name != "checkpoint.pt":  # it would not be the file that is replaced
            raise ValueError(f"resume needs a run's folder, or checkpoint.pt in it, not {self.path}.")
        changes = {name: getattr(args, name) for name in args.given & BESIDE["resume"]}
        for name in changes.keys() & {"env", "env_kwargs"}:
            if changes[name] != self.args.get(name):
                kept = reprlib.repr(self.args.get(name))
                raise ValueError(f"a run keeps its {name}, which is {kept} in {args.resume}.")
        resumed = self.options(type(args), **changes)
        resumed.given, resumed.runs_dir = args.given, str(self.path.parent.parent)
        return resumed

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

    def restore(self, optimizer, value_norm, all_trained):
        """Load Adam's moments, of all parameters if all are trained, and the returns' statistics."""
        state = self.saved["optimizer"]["state"]  # the rest, such as the learning rate, is in args
        moments = {
            i: dict(exp_avg=x, exp_avg_sq=x, step=torch.tensor(0.0))
            for i, x in enumerate(optimizer.param_groups[0]["params"])
            if all_trained or i in state
        }
        check_like(state, moments, "optimizer")
        check_like(self.saved["value_norm"], value_norm.state_dict(), "value_norm")
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=state))
        value_norm.load_state_dict(self.saved["value_norm"])

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


def check_contents(saved):
    """Raise an exception unless the parts are there, and what is printed and counted is text and numbers."""
    if saved["version"] != VERSION:
        raise ValueError(f"its version is {saved['version']}, not {VERSION}")
    parts = dict.fromkeys(("args", "guider", "learner", "optimizer", "value_norm", "here"), dict)
    for name, kind in (parts | dict(iteration=int, rows=list)).items():
        if not isinstance(saved.get(name), kind):
            raise ValueError(f"its {name} is no {kind.__name__}")
    rows, args = saved["rows"], saved["args"]
    numbers = [value for row in rows for value in row.values()]
    if not all(type(x) is float or (type(x) is int and abs(x) < 1e18) for x in numbers):
        raise ValueError("its rows are not numbers")
    if len(rows) != saved["iteration"] or not all(CLOCKS <= row.keys() for row in rows):
        raise ValueError("its rows are not one for each iteration")
    if not all(type(x) in (str, int, float, bool) and str(x).isprintable() for x in [*args, *args.values()]):
        raise ValueError("its args are not plain numbers and text")


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
