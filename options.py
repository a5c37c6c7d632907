"""Options of a run: what a preset fills in, the command line, and what cannot work.

magpo.py's reader need not open it. What the options mean stands there, in Args.
"""

import argparse
import contextlib
import inspect
import json
import math
import os
import re
import signal
import sys
import traceback
import typing
from dataclasses import fields

from envs import EnvFailure, make

WORLD = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's number of processes

DEFAULTS = dict(
    total_timesteps=1_000_000, num_envs=128, num_steps=25, learning_rate=3e-3, gamma=0.95, num_minibatches=16,
    update_epochs=3, ent_coef=0.01, max_grad_norm=1.0, delta=2.0, lam=1.0, hidden_dim=128, eval_every=10,
    eval_episodes=1024,
)  # fmt: skip
PRESETS = {  # by the environment's family, the first word of its name
    "mpe": dict(total_timesteps=2_048_000, num_envs=256, update_epochs=2, learning_rate=4.5e-3, delta=1.3, lam=3.0),
    "coordsum": dict(total_timesteps=320_000, learning_rate=2e-3, gamma=0.0, delta=1.3, lam=2.0),
    "matrix": dict(total_timesteps=40_960, num_steps=8, num_minibatches=2, update_epochs=4, learning_rate=4e-3,
                   gamma=0.0, max_grad_norm=0.5, delta=1.3, hidden_dim=64),
    "pettingzoo": dict(num_envs=32, num_minibatches=4, learning_rate=1e-3, eval_every=25, eval_episodes=256),
    "gym": dict(num_envs=32, num_steps=50, num_minibatches=8, learning_rate=1e-3, ent_coef=0.05, gamma=0.99,
                eval_episodes=256, delta=1.3, lam=3.0),
}  # fmt: skip


def apply_preset(args):
    """Replace each None by the value of the environment's preset, and remember in args.given which were no None.

    Raises ValueError for an option that is not of its field's type. Nothing is converted.
    """
    family = re.split("[_:]", str(args.env))[0]
    args.given = {f.name for f in fields(args) if getattr(args, f.name) != f.default}
    for name, value in (DEFAULTS | PRESETS.get(family, {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
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
            if math.isnan(value) or (value == math.inf and name != "delta"):
                raise ValueError(f"{name} must be a finite number, but is {value}.")
            if value < 0 or (value == 0 and name not in may_be_zero):
                bound = "must not be negative" if name in may_be_zero else "must be above 0"
                raise ValueError(f"{name} {bound}, but is {value}.")
    units = args.num_envs // WORLD * (1 if args.recurrent else args.num_steps)
    cores = os.cpu_count()
    for good, message in (
        (max(args.gamma, args.gae_lambda) <= 1, "gamma and gae_lambda must lie in [0, 1]."),
        (args.delta > 1, f"delta must be above 1, but is {args.delta}: it bounds mu/pi from both sides."),
        (
            units % args.num_minibatches == 0,
            "num_minibatches must divide num_envs x num_steps (num_envs if recurrent).",
        ),
        (args.seed < 2**32, f"seed must lie in [0, 2**32), but is {args.seed}."),
        (
            args.algo != "mappo" or args.backtracking == "soft",
            "mappo has no guider policy, so it knows no reset.",
        ),
        (args.num_envs % WORLD == 0, f"num_envs must be a multiple of torchrun's processes, {WORLD}."),
        (
            args.total_timesteps >= args.num_envs * args.num_steps,
            "total_timesteps is below num_envs x num_steps.",
        ),
        (
            args.torch_threads <= cores,
            f"torch_threads is {args.torch_threads}, but this machine has {cores} cores.",
        ),
        (
            args.num_workers in (0, args.num_envs),
            "num_workers must be 0, or num_envs for one process per copy.",
        ),
    ):
        if not good:
            raise ValueError(message)
    make_envs(args, 1).close()


def make_envs(args, num_envs, device="cpu"):
    """E copies of the environment that magpo.Args name -> gymnasium.vector.VectorEnv; ValueError if that cannot be."""
    try:
        kwargs = dict(**json.loads(args.env_kwargs))
    except (ValueError, TypeError):
        raise ValueError(
            f"env_kwargs must be a JSON object such as '{{\"N\": 5}}', not {args.env_kwargs!r}."
        ) from None
    if taken := kwargs.keys() & {"env_id", "num_envs", "device", "num_workers", "state"}:
        raise ValueError(
            f"env_kwargs may not hold {', '.join(sorted(taken))}: magpo.py has options for these."
        )
    return make(args.env, num_envs, device, num_envs if args.num_workers else 0, args.state, **kwargs)


# --- The command line ---------------------------------------------------------------------------------------------

EVAL_OPTIONS = {"env", "env_kwargs", "seed", "num_envs", "num_workers", "eval_episodes", "torch_threads"}


def whole(text):
    """A whole number, also one that is written as 1e6."""
    if float(text) % 1:
        raise ValueError
    return int(float(text))


def parse(options):
    """sys.argv -> dict of those options of the dataclass magpo.Args that were given. Its comments are the help."""
    parser = argparse.ArgumentParser(
        "magpo.py", description=options.__doc__, argument_default=argparse.SUPPRESS
    )
    parser.allow_abbrev, parser.error = False, refuse
    hints = typing.get_type_hints(options)
    for line in inspect.getsource(options).splitlines():
        if title := re.fullmatch(r"    # (.+)", line):
            group = parser.add_argument_group(title[1])
        elif option := re.fullmatch(r"    (\w+): .+ = (.+?)  # (.+)", line):
            name, default, text = option.groups()
            text = (text if default == "None" else f"{text} [{default}]").replace("%", "%%")
            kind, *more = typing.get_args(hints[name]) or (hints[name],)
            how = dict(type=whole if kind is int else kind, metavar=getattr(kind, "__name__", ""))
            if isinstance(kind, str):
                how = dict(choices=(kind, *more))
            if kind is bool:
                how = dict(action=argparse.BooleanOptionalAction)
            group.add_argument(f"--{name.replace('_', '-')}", help=text, **how)
    given = vars(parser.parse_args())
    for name, others in (("resume", {"env", "env_kwargs"}), ("eval", EVAL_OPTIONS)):
        if given.get(name) == "":
            refuse(f"--{name} needs the folder of a run.")
        if name in given and (more := given.keys() - others - {name}):
            refuse(f"--{name} goes by the run's own options: leave out {', '.join(sorted(more))}.")
    return given


def refuse(message):
    """End with one sentence and exit code 2."""
    print(f"magpo.py: {message}", file=sys.stderr)
    sys.exit(2)


def command_line(options, train, load, print_table):
    """Train or evaluate as sys.argv says. Exit codes: 2 for wrong input, 1 for what fails later, 130 for Ctrl-C."""
    stop = catch_signals()
    try:
        given = parse(options)
        if "eval" in given:
            print_table(*load(given.pop("eval"), **given), stop)
        else:
            train(options(**given), stop)
    except ValueError as error:
        refuse(error)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (EnvFailure, FloatingPointError, OSError) as error:
        print(f"magpo.py: {error}", file=sys.stderr)
        if error.__cause__:  # the environment's own exception
            traceback.print_exception(error.__cause__)
        sys.exit(1)
    sys.exit(128 + stop[0] if stop else 0)


def catch_signals():
    """A list that will hold the number of the first Ctrl-C or SIGTERM; a second one ends the process at once."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def catch(number, _):
        caught.append(number)
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nStopping after this iteration, then saving. Once more to stop at once.\n")

    for number in numbers:
        signal.signal(number, catch)
    return caught
