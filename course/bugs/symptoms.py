"""What each bug of the hunt does to metrics.csv: `python course/bugs/symptoms.py [BUG ...]` -> symptoms.csv.

Trains every command of RUNS with five seeds, clean and with the bug, in trees that course/handout.py makes. A
symptom counts if the five bugged numbers lie apart from the five clean ones. Bug 4's is another: each seed's
return in row 10 is what the clean tree has in row 9.
"""

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from course import handout

SEEDS = (1, 2, 3, 4, 5)
# One gradient step per rollout: mu is still mu_old, and clip_frac 0 however narrow the clip
ONE_STEP = "--update-epochs 1 --num-minibatches 1 --clip-coef 0.001"


def largest(name):
    return lambda rows: max(abs(row[name]) for row in rows)


def late(name):
    """Mean of the last ten rows."""
    return lambda rows: sum(row[name] for row in rows[-10:]) / 10


def evaluation(row):
    return lambda rows: rows[row - 1]["learner_return"]


EVERY = "--env matrix_sum10 --total-timesteps 10240 --eval-every 1"


RUNS = [  # bug, options, what is read off a run, and how
    (
        "1",
        f"--env matrix_sum10 --total-timesteps 10240 {ONE_STEP}",
        "largest clip_frac",
        largest("clip_frac"),
    ),
    (
        "2",
        "--env mpe_spread --num-envs 64 --num-minibatches 8 --total-timesteps 96000",
        "late guider_return",
        late("guider_return"),
    ),
    (
        "3",
        f"--env mpe_spread --algo mappo --recurrent --num-steps 5 --total-timesteps 12800 {ONE_STEP}",
        "largest clip_frac",
        largest("clip_frac"),
    ),
    ("4", EVERY, "learner_return in row 9", evaluation(9)),
    ("4", EVERY, "learner_return in row 10", evaluation(10)),
    (
        "5",
        f"--env matrix_sum10 --total-timesteps 10240 {ONE_STEP}",
        "largest clip_frac",
        largest("clip_frac"),
    ),
]


def metrics(tree, options):
    """Train in a tree -> rows of its metrics.csv, dicts of floats."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "magpo.py", *options.split(), "--runs-dir", folder, "--eval-episodes", "1"]
        subprocess.run(
            command, cwd=tree, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": ""}
        )
        (file,) = Path(folder).glob("*/metrics.csv")
        rows = csv.DictReader(file.read_text().splitlines())
        return [{name: float(x) for name, x in row.items()} for row in rows]


def main(bugs):
    """bugs: the numbers of those to try again, all if empty; the other bugs' rows stay in the CSV."""
    bugs, path = bugs or [number for number, *_ in RUNS], Path(__file__).with_suffix(".csv")
    old = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    table, known = [row for row in old if row["bug"] not in bugs], {}
    with tempfile.TemporaryDirectory() as folder:
        trees = {number: Path(folder) / number for number in dict.fromkeys(bugs)}
        for number, tree in trees.items():
            handout.bug(number, tree)
        for number, options, what, read in (run for run in RUNS if run[0] in bugs):
            for kind, tree in (("clean", handout.ROOT), ("bugged", trees[number])):
                values = []
                for seed in SEEDS:
                    key = kind, number, options, seed
                    if key not in known:
                        known[key] = metrics(tree, f"{options} --seed {seed}")
                    values.append(read(known[key]))
                texts = [f"{value:.3g}" for value in values]
                row = dict(
                    bug=number,
                    tree=kind,
                    symptom=what,
                    lowest=f"{min(values):.3g}",
                    highest=f"{max(values):.3g}",
                )
                table.append(row | dict(each_seed=" ".join(texts), options=options))
                print(*table[-1].values(), sep="  ", flush=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, table[-1], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(table, key=lambda row: row["bug"]))


if __name__ == "__main__":
    main(sys.argv[1:])
