"""The predictions of docs/engines.md."""

from __future__ import annotations

from pretrain.plan.memory import Layout, bytes_sent, held
from pretrain.plan.towers import PRESETS, sizes

NODE, RANKS = 8, (8, 64)


def engines() -> str:
    """A Markdown table for `PRESETS` on 8 and 64 GPUs: GB of a rank, kept + at work, and GB that it sends a step."""
    names = [f"{name} on {ranks}" for name in PRESETS for ranks in RANKS]
    lines = [f"| predicted | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for label in _layouts(RANKS[0]):
        cells = [_cell(name, _layouts(ranks)[label]) for name in PRESETS for ranks in RANKS]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _layouts(ranks: int) -> dict[str, Layout]:
    several = max(ranks // NODE, 1)
    zero = {f"`deepspeed`, stage {n}": Layout("deepspeed", ranks, zero_stage=n) for n in range(4)}
    narrow = Layout("fsdp2", ranks, gather_bytes=2, reduce_bytes=2)
    return {
        "`ddp`": Layout("ddp", ranks),
        "`fsdp2`": Layout("fsdp2", ranks),
        "`fsdp2`, `reshard: false`": Layout("fsdp2", ranks, reshard=False),
        "`fsdp2`, a replica a node": Layout("fsdp2", ranks, replicas=several),
        "`fsdp2`, gathered and reduced in bf16": narrow,
        "`fsdp2`, `offload`": Layout("fsdp2", ranks, offload=True),
        **zero,
        "`deepspeed`, stage 2, `offload`": Layout("deepspeed", ranks, offload=True),
    }


def _cell(name: str, layout: Layout) -> str:
    model = sizes(PRESETS[name])
    memory = held(model, layout)
    kept, sent = memory.kept - memory.host, bytes_sent(model, layout)
    return f"{_gb(kept)} + {_gb(memory.at_work)}, {_gb(sent)}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2g}" if size < 1e10 else f"{size / 1e9:.0f}"
