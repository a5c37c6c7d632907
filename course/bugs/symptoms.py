"""What each bug of the hunt does to the metrics, seed 1: `python figures/bugs/symptoms.py` -> figures/bugs/symptoms.csv.

Trains every command of RUNS twice, clean and with the bug, in trees that figures/kit.py makes; minutes on one core.
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from figures import kit

ONE_STEP = "--update-epochs 1 --num-minibatches 1"  # one gradient step per rollout: the ratio of every sample is 1
RUNS = [
    (1, f"--env matrix_sum10 {ONE_STEP}", ["clip_frac"]),
    (1, "--env matrix_sum10", ["guider_return", "clip_frac"]),
    (1, "--env coordsum_3x10 --total-timesteps 64000", ["learner_return", "clip_frac"]),
    (2, "--env mpe_spread --total-timesteps 160000", ["learner_return", "explained_variance", "value_loss"]),
    (3, "--env mpe_spread --recurrent --num-steps 5 --total-timesteps 64000", ["learner_return"]),
    (3, f"--env mpe_spread --algo mappo --recurrent --num-steps 5 --total-timesteps 32000 {ONE_STEP}", ["clip_frac", "guider_loss"]),
    (4, "--env matrix_sum10 --eval-every 1", ["learner_return", "guider_return", "kl", "entropy", "clip_frac", "guider_loss", "learner_loss"]),
    (5, "--env matrix_sum10", ["guider_return", "entropy", "clip_frac", "guider_loss"]),
    (5, f"--env matrix_sum10 {ONE_STEP}", ["clip_frac"]),
]


def metrics(tree, options):
    """Train in a tree -> columns of metrics.csv, lists of floats without the iterations that have no number."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "magpo.py", *options.split(), "--runs-dir", folder, "--eval-episodes", "128"]
        subprocess.run(command, cwd=tree, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": ""})
        (file,) = Path(folder).glob("*/metrics.csv")
        rows = list(csv.DictReader(file.read_text().splitlines()))
    return {name: [float(row[name]) for row in rows if row[name] != "nan"] for name in rows[0]}


def main():
    """Print and write: first three values, mean, largest size and last value of every metric, clean and with the bug."""
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for number in sorted({number for number, _, _ in RUNS}):
            kit.bug(str(number), Path(folder) / str(number))
        for number, options, names in RUNS:
            for tree in (kit.ROOT, Path(folder) / str(number)):
                columns = metrics(tree, options)
                for name in names:
                    x = columns[name]
                    numbers = dict(first=" ".join(f"{v:.3g}" for v in x[:3]), mean=sum(x) / len(x), largest=max(x, key=abs), last=x[-1])
                    numbers = {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in numbers.items()}
                    kind = "clean" if tree == kit.ROOT else "bugged"
                    table.append(dict(bug=number, tree=kind, metric=name) | numbers | dict(options=options))
                    print(*table[-1].values(), sep="  ", flush=True)
    with open(Path(__file__).with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, table[0], lineterminator="\n")
        writer.writeheader(), writer.writerows(table)


if __name__ == "__main__":
    main()
