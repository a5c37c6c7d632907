"""The terminal: the command line, its signals and the table of returns."""

import argparse
import inspect
import math
import os
import re
import signal
import sys
import traceback
import typing

import torch

from envs import ELSEWHERE, ENVS, EnvFailure
from run import Run
from support.options import BESIDE, DEFAULTS, affordable, check_together, make_envs


def number(text):
    """A whole number, also one that is written as 1e6."""
    try:
        return int(text)
    except ValueError:
        if float(text) % 1 == 0:
            return int(float(text))
        raise


def parse(options):
    """sys.argv -> dict of the options of the dataclass magpo.Args that were given. Its comments are the help.

    Raises ValueError for what is no option or no value, and ends the process after --help.
    """
    parser = argparse.ArgumentParser(
        usage="python magpo.py [--OPTION VALUE ...]", description=options.__doc__,
        epilog=f"Environments: {', '.join(ENVS)}, {ELSEWHERE}. *: or what the environment's preset says.",
        argument_default=argparse.SUPPRESS, add_help=False, allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=80),
    )  # fmt: skip
    parser.error = refuse
    hints = typing.get_type_hints(options)
    for line in inspect.getsource(options).splitlines():
        if title := re.fullmatch(r"    # (.+)", line):
            group = parser.add_argument_group(title[1])
        elif option := re.fullmatch(r"    (\w+): .+ = (.+?)  # (.+)", line):
            name, default, text = option.groups()
            default = f"{DEFAULTS[name]}*" if default == "None" else default.strip('"')
            kind, *more = typing.get_args(hints[name]) or (hints[name],)
            how = dict(type=number if kind is int else kind, metavar=getattr(kind, "__name__", "").upper())
            if isinstance(kind, str):
                how = dict(choices=(kind, *more))
            if kind is bool:
                how = dict(action=argparse.BooleanOptionalAction)
            text = f"{text} [{default}]" if default else text
            group.add_argument(f"--{name.replace('_', '-')}", help=text.replace("%", "%%"), **how)
    group.add_argument("--help", "-h", action="store_true", help="show this and exit")
    given = vars(parser.parse_args())
    if "help" in given:
        print(parser.format_help(), flush=True)
        sys.exit()
    for name in BESIDE:
        if not given.get(name, True):
            raise ValueError(f"--{name} needs the folder of a run.")
    check_together(given.keys())
    return given


def command_line(options, train, load, evaluate):
    """Train or evaluate as sys.argv says, and end the process.

    Exit codes: 2 for wrong input, 1 for what fails later, 128 + its number for a signal that ended it early.
    """
    stop = catch_signals()
    try:
        given = parse(options)
        if "eval" in given:
            args, guider, learner = load(given.pop("eval"), **given)
            torch.set_num_threads(args.torch_threads)
            print_table(args, guider, learner, evaluate, stop)
        else:
            args = options(**given)
            args.given = set(given)
            train(args, stop)
        sys.stdout.flush()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not Run.current:  # of --help | head
            sys.exit()
        if isinstance(error, ValueError) and not Run.current:
            refuse(error)
        foreseen = isinstance(error, (EnvFailure, FloatingPointError, OSError))
        sentence = str(error) if foreseen else f"{type(error).__name__}: {error}"
        run = Run.current
        say(f"{sentence.rstrip('.')}.", run.what_is_saved() if run and run.leads else "")
        cause = error.__cause__ if foreseen else error  # the environment's own exception, or a bug of ours
        if cause:
            traceback.print_exception(cause)
        sys.exit(1)
    sys.exit(128 + stop[0] if stop else 0)


def say(*sentences):
    """Print in one line, to stderr."""
    print("magpo.py:", *" ".join(sentences).split(), file=sys.stderr)


def refuse(message):
    """End with one sentence and exit code 2."""
    say(str(message))
    sys.exit(2)


def catch_signals():
    """A list that will hold the number of the first Ctrl-C or SIGTERM; a second one ends the process."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def catch(number, _):
        caught.append(number)
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nStopping. An iteration of training ends, and is saved. Once more to end at once.\n")

    for number in numbers:
        signal.signal(number, catch)
    return caught


def print_table(args, guider, learner, evaluate, stop=()):
    """Print mean team return and 95 % interval of learners and guider, beside the references."""
    envs = make_envs(args, 1)
    episodes = affordable(args, args.eval_episodes, args.total_timesteps // 3, envs)  # for each policy
    print(f"{args.env}, {args.algo}, seed {args.seed}: mean team return per episode")
    for policy in ("learner", "learner_greedy", "guider")[: 2 if args.algo == "mappo" else 3]:
        returns = evaluate(args, guider, learner, policy, episodes, args.seed + 2, stop)
        if stop:
            break
        interval = f"+- {1.96 * returns.std() / math.sqrt(len(returns)):.2f}" if len(returns) > 1 else ""
        won = "" if envs.win_return is None else f", {(returns > envs.win_return).float().mean():.0%} won"
        print(f"  {policy:22s} {returns.mean():9.2f} {interval} ({len(returns)} episodes{won})")
    for name, score in envs.references.items():
        print(f"  {f'({name})':22s} {score:9.2f}")
    envs.close()
