"""The checks, in the order in which they are made: what is cheap and explains the rest comes first."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.doctor import clock, compute, data, disk, gpu, links, same, system, towers, trackers, versions
from pretrain.doctor.base import Check
from pretrain.errors import UserError

CHECKS: tuple[Check, ...] = (
    Check("packages", versions.packages, "Python and packages as pyproject.toml asks for",
          "an older one fails in the middle of a start, or computes something else"),
    Check("pairs", versions.pairs, "packages that ask of each other what is installed, torchvision of torch's build",
          "pip installs unfit pairs with a warning only"),
    Check("cuda", versions.cuda, "a driver for torch's CUDA, an NCCL that is not known to fail, the same everywhere",
          "an old driver hides the GPUs; a bad NCCL crashes or hangs after hours"),
    Check("same", same.same, "code, config, packages and NCCL's variables the same on all ranks",
          "ranks that compute differently hang, or train a wrong model without a word"),
    Check("gpus", gpu.gpus, "a GPU for each rank, all of one kind; or none at all",
          "the slowest sets the pace, and another kind rounds otherwise"),
    Check("health", gpu.health, "no memory errors, clocks not held down, nobody else on the GPU",
          "a sick GPU gives wrong numbers, or holds all others up"),
    Check("peers", gpu.peers, "GPUs of a node that reach each other's memory",
          "messages otherwise go through the CPU's memory"),
    Check("matmul", compute.matmul, "products that are right, repeat bit for bit and are the same on all ranks",
          "a device that computes wrongly spoils the run silently; one that is slow holds up all"),
    Check("kernels", compute.kernels, "the loss's and images' kernels as their references compute",
          "a pair of Triton and GPU that was never tried is tried here first"),
    Check("all_reduce", links.all_reduce, "sums over all ranks that are exact",
          "gradients travel so; the speed told is that of the slowest way", joint=True),
    Check("ring", links.ring, "messages that arrive as they were sent, no link far slower than the others",
          "features travel so; one bad cable sets the pace of all", joint=True),
    Check("clock", clock.skew, f"clocks within {clock.LIMIT_S:g} s of each other",
          "storage refuses logins of a wrong time, and reports of ranks cannot be put in order", joint=True),
    Check("limits", system.limits, f"{system.FILES} open files; on GPUs unlimited locked memory and room in /dev/shm",
          "shards are kept open; InfiniBand pins memory; NCCL's buffers within a node lie in /dev/shm "
          "(decoding needs none of it)"),
    Check("cores", system.cores, "a core for each rank and each of its workers",
          "decoding on too few cores starves the GPU"),
    Check("names", system.names, "an address for the host's own name and for MASTER_ADDR",
          "gloo listens on the address of the host's name"),
    Check("disk", disk.writing, f"write, fsync, rename and lock in the run's folders, {disk.SLOW_MB:g} MB/s",
          "a checkpoint is written, synced and renamed; caches are locked", config=True),
    Check("room", disk.room, "room for checkpoint.keep_last + 1 checkpoints, and for cached shards",
          "a full disk ends the run at its first checkpoint, hours in", config=True, once=True),
    Check("shards", data.shards, "shards that every node reads, as tar files, with indexes",
          "a missing mount or login shows at the first sample of that shard, not at the start", config=True),
    Check("wandb", trackers.wandb, "where log.wandb is set: a login, or WANDB_MODE=offline",
          "a run without one logs offline, which is noticed too late", config=True, once=True),
    Check("towers", towers.build, "towers that can be built as the config says",
          "a wrong name or option ends every rank at its start", config=True, once=True),
    Check("speed", towers.speed, "entries of model.speed that apply to these towers",
          "one that does not is refused at the start; others would make the run faster", config=True, once=True),
    Check("graph_breaks", towers.graph_breaks, "towers that torch.compile takes whole",
          "where it breaks inside a block, compiling gains little", config=True, once=True),
)  # fmt: skip


def chosen(only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Check]:
    """The checks to make.

    Raises:
        UserError: there is no check of a name.
    """
    names = [check.name for check in CHECKS]
    if unknown := [name for name in (*only, *skip) if name not in names]:
        raise UserError(f"there is no check {unknown[0]!r}; there are {', '.join(names)}")
    return [check for check in CHECKS if (not only or check.name in only) and check.name not in skip]


def table() -> str:
    """For docs/doctor.md."""
    rows = [f"| `{check.name}` | {_when(check)} | {check.needs} | {check.why} |" for check in CHECKS]
    return "\n".join(["| check | made | needed | why |", "|---|---|---|---|", *rows]) + "\n"


def _when(check: Check) -> str:
    where = "first rank" if check.once else "all ranks together" if check.joint else "every rank"
    return f"{where}, with CONFIG" if check.config else where
