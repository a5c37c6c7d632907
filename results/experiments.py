"""Which runs there are: the experiments of make.py, by name, and what tasks are played at random."""

import itertools
import math
import shlex

ALGOS = ("magpo", "mappo", "ctds")
DELTAS = (1.05, 1.2, 1.5, 2.0, 4.0, math.inf)
MATRIX = tuple(f"matrix_{name}" for name in ("climbing", "penalty", "xor", "sum10"))
MPE2 = tuple(
    f"pettingzoo:mpe2.simple_{name}" for name in ("spread_v3", "reference_v3", "speaker_listener_v4")
)
FORAGING = "gym:Foraging-8x8-2p-2f-coop-v3"
REMEMBER = "pettingzoo:results.remember"
LONG = ("gym:rware-tiny-2ag-v2", "pettingzoo:butterfly.knights_archers_zombies_v11")
THREE, FIVE = (1, 2, 3), (1, 2, 3, 4, 5)  # seeds
COORDSUM = tuple(f"coordsum_{size}" for size in ("3x10", "3x30", "5x20", "8x15"))
LBF = ("8x8-2p-2f-coop", "2s-8x8-2p-2f-coop", "10x10-3p-3f", "2s-10x10-3p-3f", "15x15-3p-5f", "15x15-4p-3f",
       "15x15-4p-5f")  # fmt: skip
PAPER = {  # the paper's tasks, by suite: ids, and options if not the preset's
    "coordsum": ((*COORDSUM, *(f"{name}_official" for name in COORDSUM)), {}),
    "lbf": (tuple(f"lbf:{task}" for task in LBF), {}),
    "connector": (("connector:con-5x5x3a", "connector:con-7x7x5a"), {}),
    "mpe": (("mpe_spread_3ag_paper", "mpe_spread_5ag_paper"), dict(total_timesteps=512_000)),
    "smax": (("smax:2s3z", "smax:5m_vs_6m"), {}),
    "rware": (("rware:tiny-2ag", "rware:tiny-4ag"), {}),
}
SHORT = ("coordsum_3x10", "coordsum_3x10_official", "lbf:8x8-2p-2f-coop")  # five seeds, of the others three
# (task, algo) -> options over the preset's, which were chosen on magpo; guider_tries.csv has the tries
TUNED = {
    **{(task, "mappo"): dict(learning_rate=6e-3) for task in PAPER["coordsum"][0]},
    **{(task, "ctds"): dict(learning_rate=6e-3) for task in ("coordsum_3x10", "coordsum_3x10_official")},
    **{(f"lbf:{task}", "ctds"): dict(learning_rate=1e-3) for task in ("10x10-3p-3f", "2s-10x10-3p-3f")},
}
OTHERS = (
    *MPE2,
    FORAGING,
    REMEMBER,
    *(task for tasks, _ in PAPER.values() for task in tasks if ":" in task),
)
RANDOM = dict.fromkeys(OTHERS, 512) | dict.fromkeys(LONG, 32)  # episodes of random play


LONGER = (  # more steps of what the presets end too early
    dict(env="coordsum_3x10_official", algo="magpo", total_timesteps=1_000_000),
    *(dict(env="coordsum_8x15", algo=algo, total_timesteps=640_000) for algo in ALGOS),
    dict(env="coordsum_8x15", algo="mappo", learning_rate=6e-3, total_timesteps=640_000),
    dict(env="rware:tiny-2ag", algo="magpo", total_timesteps=5_000_000),
    dict(env="rware:tiny-2ag", algo="mappo", total_timesteps=5_000_000),
)


def grid(seeds, **options):
    """All combinations of the options' values (a tuple holds several), for every seed -> list of dicts."""
    values = [value if isinstance(value, tuple) else (value,) for value in options.values()]
    chosen = itertools.product(*values)
    return [dict(zip(options, choice, strict=True), seed=seed) for choice in chosen for seed in seeds]


def paper(suite):
    """Every method on the tasks of a suite, seed by seed: a sweep that is stopped halfway is balanced."""
    tasks, options = PAPER[suite]
    return [
        dict(env=env, algo=algo, **options, **TUNED.get((env, algo), {}), seed=seed)
        for seed, env, algo in itertools.product(FIVE, tasks, ALGOS)
        if seed in THREE or env in SHORT
    ]


EXPERIMENTS = {
    "mpe_spread": grid(THREE, env="mpe_spread", algo=ALGOS),
    "sum10": grid(FIVE, env="matrix_sum10", algo=ALGOS),
    "matrix": grid(FIVE, env=MATRIX, algo=ALGOS),
    "delta_matrix": grid(FIVE, env=("matrix_climbing", "matrix_sum10"), delta=DELTAS),
    "delta_coordsum": grid(FIVE, env="coordsum_3x10", delta=DELTAS),
    "delta_lambda": grid(THREE, env="matrix_sum10", delta=(*DELTAS[:4], math.inf), lam=(0.0, 0.5, 2.0, 8.0)),
    "backtracking": grid(THREE, env="coordsum_3x10", backtracking=("soft", "reset"), total_timesteps=240_000)
    + grid((1, 2), env="mpe_spread", backtracking=("soft", "reset"), total_timesteps=512_000),
    "others": grid(THREE, env=FORAGING, algo=("magpo", "mappo"), total_timesteps=480_000)
    + grid(THREE, env=MPE2, total_timesteps=120_000),
    "memory": grid(THREE, env=REMEMBER, recurrent=(False, True), total_timesteps=40_000),
    "ctds_preset": grid(FIVE, env="coordsum_3x10", algo="ctds"),  # what TUNED is worth to it
    "one_hot": [  # CoordSum's targets shown one-hot
        options | dict(env_kwargs='{"blur": 0}')
        for options in paper("coordsum")
        if options["env"] == "coordsum_3x10" and options["algo"] != "ctds" and options["seed"] in THREE
    ],
    "long": [options | dict(seed=seed) for seed in THREE for options in LONGER],
    **{f"paper_{suite}": paper(suite) for suite in PAPER},
    "paper_20m": grid(  # the paper's budget, on a GPU
        (1,),
        env=("rware:tiny-4ag", "smax:5m_vs_6m"),
        algo=("magpo", "mappo"),
        cuda=True,
        total_timesteps=20_000_000,
        num_envs=1024,
    ),
}


def command(options):
    """The command line that repeats a run."""
    words = ["python magpo.py"]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if type(value) is bool:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag} {shlex.quote(str(value))}")
    return " ".join(words)
