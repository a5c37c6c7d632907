"""Options of a run: what a preset fills in, what cannot work, what a file may say.

And what follows from them: environments, an evaluation's episodes, lines of text.

What the options mean stands in magpo.Args.
"""

import json
import math
import os
import re
import reprlib
import shlex
import textwrap
import typing
from dataclasses import asdict, fields
from importlib.util import find_spec

from envs import make
from support.machine import WORLD

DEFAULTS = dict(
    total_timesteps=1_000_000, num_envs=128, num_steps=25, learning_rate=3e-3, gamma=0.95, gae_lambda=0.9,
    num_minibatches=16, update_epochs=3, ent_coef=0.01, max_grad_norm=1.0, delta=2.0, lam=1.0, action_std=0.1,
    eval_every=10, eval_episodes=1024,
)  # fmt: skip
SUITE = dict(learning_rate=2e-3, gamma=0.99, num_minibatches=8, update_epochs=4, delta=1.5, lam=2.0,
             eval_episodes=256)  # fmt: skip
PRESETS = {  # by the environment's family, the first word of its name
    "mpe": dict(total_timesteps=2_048_000, num_envs=256, update_epochs=2, learning_rate=4.5e-3, delta=1.3,
                lam=3.0),
    "coordsum": dict(total_timesteps=320_000, learning_rate=4e-3, gamma=0.0, delta=1.3, lam=2.0),
    "matrix": dict(total_timesteps=40_960, num_steps=8, num_minibatches=2, update_epochs=4, ent_coef=0.05,
                   learning_rate=4e-3, gamma=0.0, max_grad_norm=0.5, delta=1.3, action_std=0.3),
    "pettingzoo": dict(num_envs=32, num_minibatches=4, learning_rate=1e-3, eval_every=25, eval_episodes=256),
    "gym": dict(num_envs=32, num_steps=50, num_minibatches=8, learning_rate=1e-3, ent_coef=0.05, gamma=0.99,
                eval_episodes=256, delta=1.3, lam=3.0),
    "lbf": SUITE | dict(total_timesteps=200_000, num_envs=64, num_steps=50, ent_coef=0.05, delta=1.2),
    "smax": SUITE | dict(total_timesteps=400_000, num_envs=64, num_steps=64),
    "connector": SUITE | dict(total_timesteps=400_000),
    "rware": SUITE | dict(total_timesteps=2_500_000, num_steps=128, num_minibatches=16, gae_lambda=0.95,
                          learning_rate=1e-3),
}  # fmt: skip

# A checkpoint has no say in what is imported or written, nor in what the machine does
MACHINE = {"cuda", "compile", "torch_threads", "num_workers", "track"}
NOT_FROM_FILES = MACHINE | {"runs_dir", "resume", "eval"}
BESIDE = {  # all that may be given together with these
    "resume": MACHINE | {"env", "env_kwargs"},
    "eval": {"env", "env_kwargs", "seed", "num_envs", "num_workers", "eval_episodes", "torch_threads"},
}


def apply_preset(args):
    """Replace each None by the value of the environment's preset, and check every value by itself.

    args.given: the names of options that differ from their defaults; of the command line, all that it names.
    Raises ValueError for an option that is not of its field's type (nothing is converted), or out of range.
    """
    args.given = {f.name for f in fields(args) if getattr(args, f.name) != f.default}
    check_together(args.given)
    family = re.split("[_:]", str(args.env))[0]
    for name, value in (DEFAULTS | PRESETS.get(family, {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_values(args)


def fix(args, **values):
    """Set options that algo or backtracking decides. ValueError if one was given with another value."""
    for name, value in values.items():
        if name in args.given and getattr(args, name) != value:
            which = f"algo {args.algo}" if args.backtracking == "soft" else "backtracking reset"
            raise ValueError(f"{name} is always {value:g} with {which}: leave it out.")
        setattr(args, name, value)


def check_together(given):
    """Raise ValueError if options, by name, are given together with resume or eval and cannot count."""
    for name, others in BESIDE.items():
        if name in given and (more := given - others - {name}):
            raise ValueError(f"{name} goes by the run's own options: leave out {', '.join(sorted(more))}.")


def check_values(args):
    """Raise ValueError for an option that cannot work, whatever the others are."""
    may_be_zero = {"seed", "gamma", "gae_lambda", "ent_coef", "vf_coef", "lam", "num_workers"}
    for name, hint in typing.get_type_hints(type(args)).items():
        allowed, value = typing.get_args(hint) or (hint,), getattr(args, name)
        wrong = ""
        if isinstance(allowed[0], str):
            wrong = "" if value in allowed else f"one of {', '.join(allowed)}"
        elif type(value) not in allowed and not (type(value) is int and float in allowed):
            wrong = f"of type {allowed[0].__name__}"
        elif type(value) in (int, float):
            least = "at least" if name in may_be_zero else "above"
            infinite = name == "delta" and value == math.inf
            if not (infinite or 0 < value < 1e18 or (value == 0 and name in may_be_zero)):
                wrong = f"a number {least} 0 and below 1e18"
        if wrong:
            raise ValueError(f"{name} must be {wrong}, but is {reprlib.repr(value)}.")
    if args.seed >= 2**32 - 2:  # evaluations take the next two
        raise ValueError(f"seed must be below 2**32 - 2, but is {args.seed}.")
    if args.torch_threads > os.cpu_count():
        raise ValueError(f"torch_threads is {args.torch_threads}, but there are {os.cpu_count()} cores.")


def validate(args):
    """Raise ValueError, in one sentence, for options (magpo.Args) with which there can be no training."""
    check_values(args)  # again: they can be changed after they were made
    units = args.num_envs // WORLD * (1 if args.recurrent else args.num_steps)
    samples = args.num_envs * args.num_steps
    wrong = {
        "eval is for the command line: in Python use load and evaluate.": args.eval,
        "gamma and gae_lambda must lie in [0, 1].": max(args.gamma, args.gae_lambda) > 1,
        f"delta must be above 1, but is {args.delta}: it bounds mu/pi from both sides.": args.delta <= 1,
        f"num_envs must be a multiple of torchrun's processes, {WORLD}.": args.num_envs % WORLD,
        f"num_minibatches must divide num_envs x num_steps, or num_envs if recurrent: {units}.": (
            units % args.num_minibatches
        ),
        "track needs the package wandb: pip install wandb.": args.track and not find_spec("wandb"),
        "mappo has no guider, so it knows no reset.": args.algo == "mappo" and args.backtracking == "reset",
        f"total_timesteps must be at least num_envs x num_steps, {samples}.": args.total_timesteps < samples,
    }
    for sentence, applies in wrong.items():
        if applies:
            raise ValueError(sentence)
    envs = make_envs(args, 1)
    envs.close()
    if hasattr(os, "sysconf"):  # not on Windows
        rollout = 2 * samples // WORLD * math.prod(envs.single_observation_space.shape)
        least = 4 * (rollout + 32 * args.hidden_dim**2 + 64 * args.embed_dim**2)  # bytes, with Adam's
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if least > memory:
            sizes = f"{least / 1e9:.0f} GB of {memory / 1e9:.0f}"
            raise ValueError(f"num_envs, num_steps, hidden_dim or embed_dim is too large: it takes {sizes}.")


def make_envs(args, num_envs, device="cpu"):
    """E copies of the environment that magpo.Args name -> gymnasium.vector.VectorEnv, or ValueError."""
    try:
        kwargs = dict(**json.loads(args.env_kwargs))
    except (ValueError, TypeError, RecursionError):
        example, text = '{"num_agents": 5}', reprlib.repr(args.env_kwargs)
        raise ValueError(f"env_kwargs must be a JSON object such as {example}, not {text}.") from None
    if taken := kwargs.keys() & {"self", "env_id", "num_envs", "device", "num_workers", "state"}:
        raise ValueError(f"env_kwargs may not hold {', '.join(sorted(taken))}: see --help.")
    if args.num_workers not in (0, args.num_envs):
        raise ValueError("num_workers must be 0, or num_envs: one process per copy.")
    return make(args.env, num_envs, device, num_envs if args.num_workers else 0, args.state, **kwargs)


def affordable(args, episodes, steps, envs):
    """As many episodes, at most, as cost a tenth of so many steps of training; at least one.

    A multiple of num_envs if they are more, since every copy plays equally many.
    """
    most = max(1, min(episodes, steps // (10 * envs.max_episode_steps)))
    return most - most % min(most, args.num_envs)


def likely_cause(args, rollout, name):
    """Words for what made numbers of this name not finite: the environment, or what is suspiciously large.

    rollout: the buffer of the step that it happened in, or of the rollout before an update.
    """
    if name in ("obs", "state", "rewards", "final_obs", "final_state"):
        return f"the environment {args.env}"
    options = ("learning_rate", "ent_coef", "vf_coef", "lam", "clip_coef")
    sizes = {option: getattr(args, option) for option in options}
    sizes |= {key: rollout[key].nan_to_num().abs().max().item() for key in ("obs", "rewards")}
    largest = max(sizes, key=sizes.get)
    return f"{largest} of {sizes[largest]:.3g}" if sizes[largest] > 1e3 else "a learning_rate too high"


def resolved(args):
    """All options, those that were given first: a few lines of text."""
    given, rest = [], []
    for name, value in asdict(args).items():
        if value != "":
            (given if name in args.given else rest).append(f"{name} {value}")
    return textwrap.fill(f"Given: {', '.join(given) or 'nothing'}. The rest: {', '.join(rest)}.", 110)


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


def to_resume(path, args):
    """The command line that goes on with the run in a folder."""
    names = MACHINE | ({"env", "env_kwargs"} if imports(args.env) else set())
    start = "python" if WORLD == 1 else f"torchrun --nproc-per-node {WORLD}"
    command = f"{start} magpo.py --resume {shlex.quote(str(path))}"
    return f"{command} {spell(type(args), vars(args), names)}".strip()
