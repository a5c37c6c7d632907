"""Pictures of trained learners, for `python magpo.py --eval CHECKPOINT --render PATH`.

Shapes: N agents, D features of one agent's observation, A actions of one agent, M targets of CoordSum.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps

import envs

EPISODES, MAX_FRAMES = 3, 100  # a GIF ends after either, but not within an episode
SIZE, LINE, COLORS = 280, 16, 16  # of a GIF: pixels of its longer side, of its line of text; colors


@torch.no_grad()
def render(args, learner, path, seed=1):
    """Draw what the learners do, each from its own observation alone -> the numbers in the picture, a list of floats.

    mpe_spread*, pettingzoo:*    GIF of sampled play, on mpe2 itself  -> team return of each episode
    coordsum_*                   PNG of pi(action | target)           -> probability that the actions add up to the target
    matrix_*                     PNG of pi(action), and the payoffs   -> expected payoff

    Args:
        args, learner: magpo.Args and magpo.Learner (on the CPU), as magpo.load returns them.
        path: file to write.
        seed: a GIF's; its episodes are reset with seed, seed + 1, ...

    Raises:
        ValueError: the environment has no picture, or path does not suit it.
    """
    path, kwargs = Path(path), json.loads(args.env_kwargs)
    if args.env.startswith("gym:"):
        raise ValueError(f"{args.env} cannot be rendered: only mpe_spread, coordsum, matrix and pettingzoo: environments can.")
    env = None if args.env.startswith("pettingzoo:") else envs.make(args.env, 1, **kwargs)
    ending = ".gif" if env is None or isinstance(env, envs.SimpleSpread) else ".png"
    if path.suffix.lower() != ending or not path.parent.is_dir():
        raise ValueError(f"{args.env} is rendered to a {ending} file in a folder that exists, but the path given is {path}.")
    if ending == ".gif":
        return play(args, learner, path, seed, *((args.env, kwargs) if env is None else as_mpe2(env)))
    draw = draw_coordsum if isinstance(env, envs.CoordSum) else draw_matrix
    number, figure = draw(args, learner, env)
    figure.savefig(path, dpi=110)
    return [number]


def as_mpe2(env):
    """Name and options with which mpe2 makes the same environment as SimpleSpread's."""
    others, landmarks = env.seen
    kwargs = dict(N=env.num_agents, max_cycles=env.max_episode_steps, local_ratio=env.local_ratio)
    kwargs |= dict(continuous_actions=env.continuous)
    if env.seen != (None, None):  # options that older mpe2 does not have
        kwargs |= dict(num_agent_neighbors=others, num_landmark_neighbors=landmarks)
    return "pettingzoo:mpe2.simple_spread_v3", kwargs


def no_memory(args, learner, copies):
    """The learners' memory before an episode, as Features takes it; ignored unless they are recurrent."""
    return [torch.zeros(copies, len(learner.features.agent_id), args.hidden_dim), torch.zeros(copies, dtype=torch.bool)]


# --- Pictures that move -----------------------------------------------------------------------------------------------


def play(args, learner, path, seed, env_id, kwargs):
    """Write a GIF of learners who play an environment with PettingZoo's interface -> team returns, a list of floats."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame would look for a screen
    team = envs.Team(env_id, kwargs | {"render_mode": "rgb_array"})
    if "rgb_array" not in getattr(team.env, "metadata", {}).get("render_modes", ()):
        raise ValueError(f"{env_id} cannot be rendered: its pictures do not come as an rgb_array.")
    frames, returns, last = [], [], []  # last: which frames end an episode
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while len(returns) < EPISODES and len(frames) < MAX_FRAMES:
            arrays, _ = team.reset(seed=seed + len(returns))
            memory, total, step, over = no_memory(args, learner, 1), 0.0, 0, False
            frames.append(frame(team, f"episode {len(returns) + 1}"))
            while not over:
                arrays = {name: torch.as_tensor(array)[None] for name, array in arrays.items()}  # (1, ...)
                mask = arrays["action_mask"].bool() if team.discrete else None
                actions = learner(arrays["obs"], mask, memory).sample()[0].numpy()  # (N,), or (N, A) if continuous
                arrays, reward, terminated, truncated, _ = team.step(actions)
                total, step, over = total + reward, step + 1, terminated or truncated
                frames.append(frame(team, f"episode {len(returns) + 1}   step {step}   return {total:.2f}"))
            returns.append(total), last.append(len(frames) - 1)
    team.close()
    every = -(-len(frames) // MAX_FRAMES)
    shown = [i for i in range(len(frames)) if i % every == 0 or i in last]
    height = frames[0].height
    film = Image.fromarray(np.concatenate([frames[i] for i in shown])).quantize(COLORS, dither=Image.Dither.NONE)
    film = [film.crop((0, i * height, film.width, (i + 1) * height)) for i in range(len(shown))]  # one palette for all
    durations = [1500 if i in last else 100 for i in shown]
    film[0].save(path, save_all=True, append_images=film[1:], duration=durations, loop=0)
    return returns


def frame(team, text):
    """What the environment looks like now, scaled to SIZE, below a line of text -> Image."""
    picture = ImageOps.contain(Image.fromarray(team.env.render()), (SIZE, SIZE))
    image = Image.new("RGB", (picture.width, picture.height + LINE), "white")
    image.paste(picture, (0, LINE))
    ImageDraw.Draw(image).text((4, 2), text, "black")
    return image


# --- Pictures of a policy ---------------------------------------------------------------------------------------------


def draw_coordsum(args, learner, env):
    """Each agent's pi(action | target), and below the probability of a hit -> its mean over targets, Figure."""
    M = env.num_targets
    targets = torch.eye(M).unsqueeze(1).expand(-1, env.single_observation_space.shape[0], -1)  # (M, N, M)
    probs = learner(targets, memory=no_memory(args, learner, M)).probs.double()  # (M, N, A)
    N, A = probs.shape[1:]
    # The sum's distribution is the convolution of the agents', which are independent given the target
    spectrum = torch.fft.rfft(probs, max(N * (A - 1) + 1, M)).prod(1)
    hits = torch.fft.irfft(spectrum, max(N * (A - 1) + 1, M)).diagonal()  # (M,), P(sum = target)

    figure = Figure((1.5 + 0.065 * M + 3, 1.2 + 1.25 * (N + 1)), layout="constrained")
    axes = figure.subplots(N + 1, sharex=True)
    for i, ax in enumerate(axes[:N]):
        image = ax.imshow(probs[:, i].T.numpy(), origin="lower", aspect="auto", vmin=0, vmax=1, cmap="viridis")
        ax.set(ylabel=f"agent {i}:\naction", yticks=(0, A // 2, A - 1))
    figure.colorbar(image, ax=axes[:N], label="probability", shrink=min(1, 3 / N))
    axes[N].bar(range(M), hits.numpy(), color="tab:green")
    axes[N].set(xlabel="target", ylabel="P(hit)", ylim=(0, 1.02))
    start = " at an episode's start" if args.recurrent else ""
    title = f"{args.env}, {args.algo}, seed {args.seed}: the learners' policies{start}\nhit rate {hits.mean():.3f}"
    figure.suptitle(title, fontsize=11)
    return hits.mean().item(), figure


def draw_matrix(args, learner, env):
    """Each agent's pi(action) as bars; for two agents, also the payoffs on their joint probabilities -> E[payoff], Figure."""
    N, A = env.payoff.dim(), len(env.payoff)
    probs = learner(torch.ones(1, N, 1), memory=no_memory(args, learner, 1)).probs[0]  # (N, A)
    expected = env.payoff
    for agent_probs in probs:
        expected = torch.tensordot(agent_probs, expected, 1)

    figure = Figure((4.5 + 4 * (N == 2), 4), layout="constrained")
    axes = figure.subplots(1, 1 + (N == 2), squeeze=False)[0]
    for i in range(N):
        axes[0].bar(np.arange(A) + 0.8 * ((i + 0.5) / N - 0.5), probs[i].numpy(), 0.8 / N, label=f"agent {i}")
    axes[0].set(xlabel="action", ylabel="probability", xticks=range(A), ylim=(0, 1.02))
    figure.legend(loc="outside lower center", ncols=N)
    if N == 2:
        joint = torch.outer(*probs).numpy()  # (A, A)
        image = axes[1].imshow(joint, vmin=0, vmax=1, cmap="viridis")
        for i, j in np.ndindex(A, A):
            color = "white" if joint[i, j] < 0.6 else "black"
            axes[1].text(j, i, f"{env.payoff[i, j]:g}", ha="center", va="center", color=color)
        axes[1].set(xlabel="agent 1's action", ylabel="agent 0's action", xticks=range(A), yticks=range(A))
        axes[1].set_title("payoffs", fontsize=10)
        figure.colorbar(image, ax=axes[1], label="joint probability")
    title = f"{args.env}, {args.algo}, seed {args.seed}\nexpected payoff {expected:.3f}, best {env.payoff.max():g}"
    figure.suptitle(title, fontsize=11)
    return expected.item(), figure
