"""Write a run's learners as a program that needs nothing but PyTorch: `python results/export.py RUN OUT`.

    logits = torch.export.load(OUT).module()(observations)      # (N, D) -> (N, A)
    actions = torch.distributions.Categorical(logits=logits).sample()

For continuous actions they are means and log deviations, see magpo.distribution. Runs with --recurrent are
refused: their program would have to carry a memory.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import magpo
from envs import EnvFailure


class Logits(torch.nn.Module):
    """Observations (N, D) -> logits (N, A), or (N, 2 A)."""

    def __init__(self, learner):
        super().__init__()
        self.learner = learner

    def forward(self, obs):
        return self.learner.logits(obs)


def export(run, out, **changes):
    """Write a run's learners to the file `out`. changes: env, env_kwargs, as for magpo.load."""
    args, _, learner = magpo.load(run, **changes)
    if args.recurrent:
        raise ValueError(f"{run} has a memory, which an exported program would have to carry.")
    encoder = learner.obs_encoder
    example = torch.zeros(len(encoder.agent_id), encoder.obs_in.in_features)  # (N, D)
    program = torch.export.export(Logits(learner), (example,))
    with open(out, "wb") as file:  # a path would end in a RuntimeError where it cannot be written
        torch.export.save(program, file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("out", metavar="OUT", help="file to write, such as learner.pt2")
    parser.add_argument("--env", help="its environment again, if that is other people's")
    parser.add_argument("--env-kwargs", help="that environment's options, as JSON")
    options = vars(parser.parse_args())
    try:
        export(**options)
    except (ValueError, EnvFailure, OSError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{options['out']} is written.")


if __name__ == "__main__":
    main()
