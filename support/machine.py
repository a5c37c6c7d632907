"""The machine under a run: device, locks, torchrun's processes, random numbers.

Of torchrun's processes, rank 0 alone writes and prints.
"""

import atexit
import contextlib
import os
import random

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, its default arguments would keep the process group alive

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes out of one folder
    fcntl = None

RANK = int(os.environ.get("RANK", 0))  # torchrun's number of this process
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # and of all of them


def start_device(args):
    """Set PyTorch and torchrun's process group up as magpo.Args say -> the device."""
    cuda = args.cuda and torch.cuda.is_available()
    if args.cuda and not cuda:
        print("--cuda: PyTorch sees no GPU here; training on the CPU.")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with it
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
        atexit.register(dist.destroy_process_group)
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # 2 % of the time, and nothing reads it
    torch.set_num_threads(args.torch_threads)
    return device


def lock(folder):
    """Keep other processes out of a folder -> the open file that does it. BlockingIOError if one is in it."""
    file = open(folder / "lock", "w")
    if fcntl:  # lockf, not flock: worker processes inherit that one, and may outlive their owner
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


# --- Processes ----------------------------------------------------------------------------------------------


def gather(x):
    """(T, E, ...) of this process -> (T, K E, ...) of all K processes of torchrun, or x itself."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, 1)


def average_gradients(parameters):
    """Replace each gradient by its mean over all processes."""
    for parameter in parameters if WORLD > 1 else ():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= WORLD


def share(stop, device):
    """Put the signal that a process has in its list `stop` into the lists of all."""
    signals = gather(torch.full((1, 1), stop[0] if stop else 0, device=device))
    if signals.any() and not stop:
        stop.append(signals.max().item())


# --- Random numbers -----------------------------------------------------------------------------------------


def own_seed(seed, iteration):
    """Seed of this process's environments and sampling, once so many iterations are done."""
    if RANK == 0 and iteration == 0:
        return seed
    # Seeds of PyTorch's generators have 32 bits, so that adding will not do
    return int(np.random.SeedSequence((seed, RANK, iteration)).generate_state(1)[0])


def generator(device):
    """The generator that sampling on this device draws from."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def seed_everything(seed):
    """Seed PyTorch's, NumPy's and Python's global generators; environments may use any of them."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextlib.contextmanager
def seeded(seed, device):
    """Within it random numbers follow from this seed; afterwards all go on as if nothing had been."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            seed_everything(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
