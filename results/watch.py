"""See what trained learners do: `python results/watch.py RUN [OUT] [--env ENV]`.

    mpe_spread*, pettingzoo:*, gym:*   OUT is a GIF of sampled play; mpe_spread* are played on mpe2 itself
    lbf:*                              the same: discs are agents, squares food, both with their level
    coordsum_*, matrix_*               OUT is a PNG of every agent's probabilities

Without OUT it is watch.gif or watch.png, in the folder where you are.
Name the environment again, as --env, where it is other people's code: pettingzoo:, gym:. N agents,
A actions, M different observations (CoordSum's targets; a matrix game has one).
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))

import envs
import magpo

MAX_FRAMES = 100  # of longer films only some frames are kept, the ends of episodes among them
SIZE, LINE, COLORS = 280, 16, 16  # of a GIF: pixels of its longer side, of its line of text; colors
AGENT, LOADING, FOOD = "steelblue", "black", "darkorange"  # colors of lbf:


# --- Pictures that move -------------------------------------------------------------------------------------


def as_mpe2(args):
    """Name and options with which mpe2 makes the same environment as SimpleSpread's."""
    env = envs.make(args.env, 1, **json.loads(args.env_kwargs))
    kwargs = dict(N=env.num_agents, max_cycles=env.max_episode_steps, local_ratio=env.local_ratio)
    kwargs["continuous_actions"] = env.continuous
    if env.seen != (None, None):  # options that older mpe2 does not have
        kwargs |= dict(zip(("num_agent_neighbors", "num_landmark_neighbors"), env.seen, strict=True))
    return "pettingzoo:mpe2.simple_spread_v3", kwargs


class Film:
    """Frames, each with a line of text, of episode after episode."""

    def __init__(self):
        self.frames, self.starts, self.total = [], [], 0.0  # starts: the first frame of each episode

    def start(self, picture):
        self.starts.append(len(self.frames))
        self.total = 0.0
        self.add(picture, "")

    def step(self, picture, reward):
        self.total += reward
        self.add(picture, f"step {len(self.frames) - self.starts[-1]}   return {self.total:.2f}")

    def add(self, picture, text):
        image = Image.new("RGB", (picture.width, picture.height + LINE), "white")
        image.paste(picture, (0, LINE))
        ImageDraw.Draw(image).text((4, 2), f"episode {len(self.starts)}   {text}", "black")
        self.frames.append(image)


def filmed_game(args, reel):
    """One copy of a PettingZoo or gymnasium environment; it films what happens in it."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame would look for a screen
    env_id, kwargs = args.env, json.loads(args.env_kwargs)
    if args.env.startswith("mpe_"):
        env_id, kwargs = as_mpe2(args)
    copies = envs.make(env_id, 1, **kwargs | dict(render_mode="rgb_array"))
    game = copies.env.envs[0].env  # with PettingZoo's interface
    render = game.render if hasattr(game, "render") else game.env.render
    reset, step = game.reset, game.step

    def picture():
        try:
            image = Image.fromarray(render())
        except Exception as error:  # no rgb_array, or no screen, where it needs one: many kinds
            raise ValueError(f"{args.env} cannot be filmed: {type(error).__name__}: {error}") from error
        return ImageOps.contain(image, (SIZE, SIZE))

    def filmed_reset(*args, **kwargs):
        result = reset(*args, **kwargs)
        reel.start(picture())
        return result

    def filmed_step(actions):
        result = step(actions)
        reel.step(picture(), sum(result[1].values()) / len(game.possible_agents))
        return result

    game.reset, game.step = filmed_reset, filmed_step
    return copies


def filmed_foraging(args, reel):
    """One copy of an lbf: environment; it films its states, those that end an episode, too."""
    copies = envs.make(args.env, 1, **json.loads(args.env_kwargs))
    size = int(re.search(r"(\d+)x\d+-", args.env)[1])
    advance, restart = copies._advance, copies._restart

    def filmed_advance(*given):
        result = advance(*given)
        _, (states, _), rewards, _, _ = result
        reel.step(draw_field(states, size), rewards.item())
        return result

    def filmed_restart(key, before, over):
        result = restart(key, before, over)
        if over.any():
            reel.start(draw_field(result[1][0], size))
        return result

    copies._advance, copies._restart = filmed_advance, filmed_restart
    return copies


def draw_field(states, size):
    """Level-Based Foraging: the state of copy 0, on a grid of size x size cells -> image.

    Agents are discs, with a ring while they load; food that is left is square. Both show their level.
    """
    cell = SIZE // size
    image = Image.new("RGB", (cell * size + 1, cell * size + 1), "white")
    canvas = ImageDraw.Draw(image)
    font = ImageFont.truetype(findfont("DejaVu Sans:bold"), cell // 2)
    for line in range(0, cell * size + 1, cell):
        canvas.line((line, 0, line, cell * size), "lightgray")
        canvas.line((0, line, cell * size, line), "lightgray")

    def put(shape, position, level, color, ring):
        row, column = map(int, position)
        left, top, inside = column * cell, row * cell, cell - 4
        shape((left + 4, top + 4, left + inside, top + inside), color, ring, width=3)
        canvas.text((left + cell // 2, top + cell // 2), str(level), "white", font, "mm")

    agents, food = states.agents, states.food_items
    for i, position in enumerate(food.position[0]):
        if not food.eaten[0, i]:
            put(canvas.rectangle, position, food.level[0, i], FOOD, FOOD)
    for i, position in enumerate(agents.position[0]):
        ring = LOADING if agents.loading[0, i] else AGENT
        put(canvas.ellipse, position, agents.level[0, i], AGENT, ring)
    return image


def film(args, guider, learner, path, seed, episodes):
    """Write a GIF of the learners' sampled play -> team returns, a list of floats."""
    reel, slow = Film(), args.env.startswith("lbf:")
    copies = filmed_foraging(args, reel) if slow else filmed_game(args, reel)
    args.num_envs = 1
    with mock.patch.object(magpo, "make_envs", lambda *_: copies):
        returns = magpo.evaluate(args, guider, learner, "learner", episodes, seed)
    if len(returns) < episodes:
        raise ValueError(
            f"{args.env}: {episodes - len(returns)} episodes did not end: ask for less --episodes."
        )
    # The last reset began an episode that nobody plays
    *starts, last = reel.starts
    ends = [start - 1 for start in [*starts[1:], last]]
    save_gif(reel.frames[:last], ends, path, milliseconds=200 if slow else 100)
    return returns.tolist()


def save_gif(frames, ends, path, milliseconds):
    """ends: the frames that end an episode; they are kept, and stay longer than the others' milliseconds."""
    every = -(-len(frames) // MAX_FRAMES)
    shown = [i for i in range(len(frames)) if i % every == 0 or i in ends]
    width, height = frames[0].size
    strip = Image.fromarray(np.concatenate([frames[i] for i in shown]))  # one palette for all
    strip = strip.quantize(COLORS, dither=Image.Dither.NONE)
    first, *others = [strip.crop((0, i * height, width, (i + 1) * height)) for i in range(len(shown))]
    durations = [1500 if i in ends else milliseconds for i in shown]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)


# --- Pictures of a policy -----------------------------------------------------------------------------------


@torch.no_grad()
def draw(args, learner, path):
    """Write a PNG of each agent's pi(action | observation), and of what the team may expect -> its mean."""
    kwargs = json.loads(args.env_kwargs)
    N, M = envs.make(args.env, 1, **kwargs).single_observation_space.shape
    env = envs.make(args.env, M, **kwargs)
    codes = env.codes if isinstance(env, envs.CoordSum) else torch.ones(M, M)
    obs = codes.unsqueeze(1).expand(-1, N, -1)  # (M, N, M), every target once
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


def watch(run, out=None, seed=1, episodes=3, **changes):
    """Draw or film a run's learners -> the numbers in the picture. changes: env, env_kwargs."""
    args, guider, learner = magpo.load(run, **changes)
    films = args.env.startswith(("mpe_", "pettingzoo:", "gym:", "lbf:"))
    if not films and not args.env.startswith(("coordsum_", "matrix_")):
        raise ValueError(f"{args.env} has no picture here.")
    ending = ".gif" if films else ".png"
    out = Path(out or f"watch{ending}")
    if out.suffix.lower() != ending or not out.parent.is_dir():
        raise ValueError(f"{args.env} needs the name of a {ending} file, in a folder that exists, not {out}.")
    return film(args, guider, learner, out, seed, episodes) if films else [draw(args, learner, out)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("out", metavar="OUT", nargs="?", help="file to write [watch.gif or watch.png]")
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
