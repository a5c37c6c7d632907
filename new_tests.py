# ----------------------------------------------------------------------------------------------------------------------
# figures/speed.py: its counters against counts by hand, and every subcommand at a reduced budget
# ----------------------------------------------------------------------------------------------------------------------

import contextlib
import math
import time
import types
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import magpo
from figures import speed

torch.set_num_threads(1)
TINY = dict(num_envs=4, num_steps=5, num_minibatches=2, update_epochs=1)


@pytest.fixture
def speed_csvs(tmp_path, monkeypatch):
    """speed.py writes into a folder of the test's own -> function that reads one of its CSVs."""
    monkeypatch.setattr(speed, "HERE", tmp_path)
    return speed.read


def test_products_are_counted_as_by_hand_and_as_by_torch():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(7, 5), torch.randn(11, 7, requires_grad=True)
    with FlopCounterMode(display=False) as by_torch, speed.Products() as products:
        layer(x).sum().backward()  # forward, the weight's gradient, the input's: 11 x 7 x 5 multiply-adds each
    assert sum(products.counts.values()) == 3
    assert speed.multiply_adds(products.counts) == by_torch.get_total_flops() == 3 * 2 * 11 * 7 * 5
    assert speed.alone(products.counts, repeats=2) > 0


def test_products_of_training_are_those_of_its_layers():
    with speed.Products() as products:
        speed.train(**TINY, total_timesteps=20)
    with speed.Products() as longer:
        speed.train(**TINY | dict(update_epochs=2), total_timesteps=20)
    args = magpo.Args(**TINY)
    networks = magpo.build(args, magpo.make_envs(args, 1))
    layers = [layer.weight for network in networks for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = [networks[0].features.obs_in.weight, networks[1].features.obs_in.weight]  # no gradient goes on to the observations
    rows = args.num_envs * args.num_steps * 3
    epoch = 2 * rows * (3 * sum(weight.numel() for weight in layers) - sum(weight.numel() for weight in inputs))
    assert speed.multiply_adds(longer.counts) - speed.multiply_adds(products.counts) == epoch


def busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_clock_gives_every_cpu_second_to_one_name():
    """Slow one function of each phase down by a known time: its name receives it, whole and alone."""
    plain, slow = Counter(), Counter()
    for times, wait in ((plain, 0.0), (slow, 0.02)):
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            for owner, name in ((magpo.Guider, "act"), (speed.envs.BatchedEnv, "step"), (magpo, "learner_loss")):
                function = getattr(owner, name)
                patch.setattr(owner, name, lambda *a, function=function, wait=wait, **k: (busy(wait), function(*a, **k))[1])
            stack.enter_context(speed.clock(times))
            rows = speed.train(**TINY, total_timesteps=60)
        assert times["iterations"] == 2
        measured = rows[-1]["cpu_seconds"] - rows[0]["cpu_seconds"]
        assert sum(times.values()) - times["iterations"] == pytest.approx(measured, abs=0.05)
    extra = {name: (slow[name] - plain[name]) / 0.02 / 2 for name in slow if name != "iterations"}
    for name, calls in (("rollout: guider", 5), ("rollout: environment", 5), ("update: losses", 2)):
        assert extra.pop(name) == pytest.approx(calls, abs=1)
    assert all(abs(calls) < 1 for calls in extra.values()), extra


def test_clock_leaves_everything_as_it_was():
    before = (
        magpo.Guider.act,
        magpo.Guider.forward,
        torch.Tensor.backward,
        torch.randperm,
        speed.tqdm.__iter__,
        speed.SummaryWriter.add_scalar,
    )
    args = dict(**TINY, total_timesteps=60, seed=3)
    plain, times = speed.train(**args), Counter()
    with speed.clock(times):
        timed = speed.train(**args)
    assert before == (
        magpo.Guider.act,
        magpo.Guider.forward,
        torch.Tensor.backward,
        torch.randperm,
        speed.tqdm.__iter__,
        speed.SummaryWriter.add_scalar,
    )
    for a, b in zip(plain, timed, strict=True):
        assert all(a[key] == b[key] or math.isnan(a[key]) for key in a if "seconds" not in key)


def test_profile_adds_up(speed_csvs, capsys):
    speed.profile(3, **TINY)
    rows = {row["what"]: row for row in speed_csvs("profile")}
    parts = [row for what, row in rows.items() if what not in ("one iteration", "matrix products alone")]
    assert {row["what"].split(":")[0] for row in parts} == {"rollout", "update", "logging"}
    assert sum(float(row["cpu_seconds"]) for row in parts) == pytest.approx(
        float(rows["one iteration"]["cpu_seconds"]), rel=1e-2
    )
    assert sum(float(row["share"]) for row in parts) == pytest.approx(1, abs=1e-2)
    assert 0 < float(rows["matrix products alone"]["cpu_seconds"]) < float(rows["one iteration"]["cpu_seconds"])
    assert "20 steps per iteration" in capsys.readouterr().out


def test_throughput_takes_ratios_within_a_round(speed_csvs, monkeypatch):
    rates = iter([(10.0, 4000.0, 20.0), (20.0, 4000.0, 60.0), (40.0, 4000.0, 80.0)])
    now = []
    monkeypatch.setattr(speed, "mpe2_rate", lambda _: now.append(next(rates)) or now[-1][0])
    monkeypatch.setattr(speed, "spread_rate", lambda _: now[-1][1])
    monkeypatch.setattr(speed, "training_rate", lambda _: now[-1][2])
    speed.throughput(3)
    rows = {row["what"]: [float(row[key]) for key in ("median", "lowest", "highest")] for row in speed_csvs("throughput")}
    assert rows["training / mpe2"] == [2, 2, 3]
    assert rows["SimpleSpread, 2,048 copies / mpe2"] == [200, 100, 400]
    assert rows["training"] == [60, 20, 80]


def test_rates_are_rates():
    assert 100 < speed.mpe2_rate(100) < 1e6
    assert speed.spread_rate(3, copies=16) > 100
    assert speed.training_rate(4, **TINY) > 1


def test_growth_and_its_picture(speed_csvs, tmp_path):
    speed.growth(sizes=(2, 3), iterations=2, memory_sizes=())
    rows = speed_csvs("growth")
    assert [row["num_agents"] for row in rows] == ["2", "3"]
    assert all(0 < float(row[key]) < 1e5 for row in rows for key in ("act_us", "update_us"))
    speed.draw()
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_quality_reads_the_first_step_at_which_a_score_stands(speed_csvs, tmp_path, capsys):
    returns = {"a": (-26.0, -15.0, -9.0), "b": (-26.0, -16.0, -15.0), "c": (-10.0, -9.4, -9.6)}  # 0.60 is -15.11, 0.90 is -9.50
    lines = [
        f"{10 * (i + 1)},{value},0,magpo,mpe_spread,{name}" for name, row in returns.items() for i, value in enumerate(row)
    ]
    lines.append("99,-7.0,1,magpo,mpe_spread,b")  # a final row is not of the curve
    (tmp_path / "mpe_spread.csv").write_text("\n".join(["cpu_seconds,learner_return,final,algo,env,command", *lines]) + "\n")
    speed.quality()
    out = capsys.readouterr().out.splitlines()
    assert [line.split() for line in out] == [
        ["magpo", "0.60", "median", "20", "seeds", "20", "30", "10"],
        ["magpo", "0.90", "median", "30", "seeds", "30", "inf", "20"],
    ]


def test_gpu_without_one_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        speed.gpu()
    assert end.value.code == 2
    assert capsys.readouterr().err == "speed.py: gpu needs a GPU that PyTorch can use; there is none here.\n"


def test_gpu_benchmark_on_the_cpu(speed_csvs, monkeypatch):
    """All of it but the profiler, in whose place stand 3 kernels of 0.01 s in all, and what must not be counted with them."""
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [(cuda, False, 4e3), (cuda, False, 5e3), (cuda, False, 1e3), (cuda, True, 9e3), (cpu, False, 4e3)]
    names = "device_type", "is_user_annotation", "self_device_time_total"
    events = [types.SimpleNamespace(**dict(zip(names, event))) for event in events]
    profiled = types.SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(profiled))
    train, trained = speed.train, []
    monkeypatch.setattr(speed, "train", lambda **options: trained.append(train(**options)) or trained[-1])
    speed.bench(magpo.Args(**TINY, total_timesteps=120, eval_every=4, eval_episodes=4), device="CPU")
    (row,) = speed_csvs("gpu")
    assert (row["device"], row["steps"]) == ("CPU", "120")
    assert float(row["kernel_share"]) == pytest.approx(0.01 / trained[-1][-1]["seconds"], rel=1e-3)
    assert (len(trained[0]), len(trained[1])) == (6, 5)
    assert float(row["steps_per_second"]) > 1
    assert row["seconds_to_0.9"] == "inf" and float(row["seconds"]) > 0
