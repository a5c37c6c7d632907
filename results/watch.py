"""See what trained learners do: `python results/watch.py RUN OUT [--env ENV]`.

    mpe_spread*, pettingzoo:*, gym:*   OUT is a GIF of sampled play; mpe_spread* are played on mpe2 itself
    coordsum_*, matrix_*               OUT is a PNG of every agent's probabilities

Name the environment again, as --env, where it is other people's code: pettingzoo:, gym:. N agents,
A actions, M different observations (CoordSum's targets; a matrix game has one).
"""

import argparse
import json
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))

import envs
import magpo

MAX_FRAMES = 100  # of longer films only some frames are kept, the ends of episodes among them
SIZE, LINE, COLORS = 280, 16, 16  # of a GIF: pixels of its longer side, of its line of text; colors


# --- Pictures that move -------------------------------------------------------------------------------------


def as_mpe2(args):
    """Name and options with which mpe2 makes the same environment as SimpleSpread's."""
    env = envs.make(args.env, 1, **json.loads(args.env_kwargs))
    kwargs = dict(N=env.num_agents, max_cycles=env.max_episode_steps, local_ratio=env.local_ratio)
    kwargs["continuous_actions"] = env.continuous
    if env.seen != (None, None):  # options that older mpe2 does not have
        kwargs |= dict(zip(("num_agent_neighbors", "num_landmark_neighbors"), env.seen, strict=True))
    return "pettingzoo:mpe2.simple_spread_v3", kwargs


def film(args, guider, learner, path, seed, episodes):
    """Write a GIF of the learners' sampled play -> team returns, a list of floats."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame would look for a screen
    env_id, kwargs = args.env, json.loads(args.env_kwargs)
    if args.env.startswith("mpe_"):
        env_id, kwargs = as_mpe2(args)
    copies = envs.make(env_id, 1, **kwargs | dict(render_mode="rgb_array"))
    game = copies.env.envs[0].env  # with PettingZoo's interface
    render = game.render if hasattr(game, "render") else game.env.render
    reset, step = game.reset, game.step
    frames, starts, totals = [], [], [0.0]

    def show(text):
        try:
            picture = Image.fromarray(render())
        except Exception as error:  # no rgb_array, or no screen, where it needs one: many kinds
            raise ValueError(f"{args.env} cannot be filmed: {type(error).__name__}: {error}") from error
        picture = ImageOps.contain(picture, (SIZE, SIZE))
        image = Image.new("RGB", (picture.width, picture.height + LINE), "white")
        image.paste(picture, (0, LINE))
        ImageDraw.Draw(image).text((4, 2), f"episode {len(starts)}   {text}", "black")
        frames.append(image)

    def filmed_reset(*args, **kwargs):
        result = reset(*args, **kwargs)
        starts.append(len(frames))
        totals[0] = 0.0
        show("")
        return result

    def filmed_step(actions):
        result = step(actions)
        totals[0] += sum(result[1].values()) / len(game.possible_agents)
        show(f"step {len(frames) - starts[-1]}   return {totals[0]:.2f}")
        return result

    game.reset, game.step = filmed_reset, filmed_step
    args.num_envs = 1
    with mock.patch.object(magpo, "make_envs", lambda *_: copies):
        returns = magpo.evaluate(args, guider, learner, "learner", episodes, seed)
    if len(returns) < episodes:
        raise ValueError(
            f"{args.env}: {episodes - len(returns)} episodes did not end: ask for less --episodes."
        )
    # The last reset began an episode that nobody plays
    save_gif(frames[: starts[-1]], [start - 1 for start in starts[1:]], path)
    return returns.tolist()


def save_gif(frames, ends, path):
    """ends: the frames that end an episode; they are kept, and stay longer."""
    every = -(-len(frames) // MAX_FRAMES)
    shown = [i for i in range(len(frames)) if i % every == 0 or i in ends]
    width, height = frames[0].size
    strip = Image.fromarray(np.concatenate([frames[i] for i in shown]))  # one palette for all
    strip = strip.quantize(COLORS, dither=Image.Dither.NONE)
    first, *others = [strip.crop((0, i * height, width, (i + 1) * height)) for i in range(len(shown))]
    durations = [1500 if i in ends else 100 for i in shown]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)


# --- Pictures of a policy -----------------------------------------------------------------------------------


@torch.no_grad()
def draw(args, learner, path):
    """Write a PNG of each agent's pi(action | observation), and of what the team may expect -> its mean."""
    kwargs = json.loads(args.env_kwargs)
    N, M = envs.make(args.env, 1, **kwargs).single_observation_space.shape
    env = envs.make(args.env, M, **kwargs)
    obs = torch.eye(M).unsqueeze(1).expand(-1, N, -1)  # (M, N, M), every target once
    probs = learner(obs, memory=magpo.new_memory(args, env)).probs.double().numpy()  # (M, N, A)
    if isinstance(env, envs.CoordSum):
        scores, what = [hit_probability(p, target) for target, p in enumerate(probs)], "P(hit)"
    else:
        scores, what = [env.payoff.double().numpy()], "E[payoff]"
        for p in probs[0]:
            scores = [np.tensordot(p, scores[0], 1)]

    figure = Figure((4.5 + 0.065 * M, 1.2 + 1.25 * (N + 1)), layout="constrained")
    axes = figure.subplots(N + 1, sharex=True)
    for i, ax in enumerate(axes[:N]):
        image = ax.imshow(probs[:, i].T, origin="lower", aspect="auto", vmin=0, vmax=1)
        ax.set(ylabel=f"agent {i}:\naction")
    figure.colorbar(image, ax=axes[:N], label="probability")
    axes[N].bar(range(M), scores, color="tab:green")
    axes[N].set(xlabel="target" if M > 1 else "", ylabel=what)
    figure.suptitle(
        f"{args.env}, {args.algo}, seed {args.seed}: the learners' policies, {what} {np.mean(scores):.3f}"
    )
    figure.savefig(path, dpi=110)
    return float(np.mean(scores))


def hit_probability(probs, target):
    """P(sum of actions = target) of independent agents with probabilities (N, A)."""
    total = np.ones(1)
    for p in probs:
        total = np.convolve(total, p)
    return total[target] if target < len(total) else 0.0


def watch(run, out, seed=1, episodes=3, **changes):
    """Draw or film a run's learners -> the numbers in the picture. changes: env, env_kwargs."""
    args, guider, learner = magpo.load(run, **changes)
    films = args.env.startswith(("mpe_", "pettingzoo:", "gym:"))
    if not films and not args.env.startswith(("coordsum_", "matrix_")):
        raise ValueError(f"{args.env} has no picture here.")
    ending, out = ".gif" if films else ".png", Path(out)
    if out.suffix.lower() != ending or not out.parent.is_dir():
        raise ValueError(f"{args.env} needs the name of a {ending} file, in a folder that exists, not {out}.")
    return film(args, guider, learner, out, seed, episodes) if films else [draw(args, learner, out)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("out", metavar="OUT", help="file to write, .gif or .png")
    parser.add_argument("--env", help="its environment again, or another one that fits")
    parser.add_argument("--env-kwargs", help="that environment's options, as JSON")
    parser.add_argument("--seed", type=int, help="of play [1]")
    parser.add_argument("--episodes", type=int, help="to film [3]")
    try:
        numbers = watch(**vars(parser.parse_args()))
    except (ValueError, envs.EnvFailure, OSError) as error:
        print(f"watch.py: {error}", file=sys.stderr)
        sys.exit(2)
    print("In the picture:", " ".join(f"{number:.2f}" for number in numbers))


if __name__ == "__main__":
    main()
