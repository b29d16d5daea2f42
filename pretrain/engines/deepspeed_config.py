"""A user's DeepSpeed JSON and our knobs, made one; where they say different things, a refusal with both values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.config import Optim, Parallel, Train
from pretrain.errors import UserError

Json = dict[str, Any]

STAGE = 2
"""ZeRO stage where neither the knob nor the file names one."""
ELEMENTWISE = ("adamw", "lion")
"""Optimizers whose update of a number looks at that number's own gradient and moments alone: ZeRO cuts tensors up."""

_MOVED = {
    "zero_optimization.zenflow": "an optimizer of its own",
    "zero_optimization.offload_optimizer.super_offload": "an optimizer of its own",
    "compression_training": "weights that are not the model's",
    "load_universal_checkpoint": "checkpoints of its own",
}
"""Keys under which the engine could not find weights and moments by name any more."""


def merge(parallel: Parallel, optim: Optim, precision: str) -> Json:
    """What `deepspeed.initialize` is given: the file's keys as they are, and in their place what our knobs say.

    Batch sizes are one micro-batch of one pair: pretrain cuts batches itself. Clipping is asked for step by step.

    Args:
        precision: of the towers; bf16 is autocast over fp32 weights here, so that scale and moments stay fp32.

    Raises:
        UserError: the file cannot be read, contradicts a knob, or asks for what would be silently wrong.
    """
    file = _File(parallel.deepspeed)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        file.take(key)  # `check_batches` has compared them
    _check_optimizer(file, optim)
    _check_precision(file, precision)
    stage = file.agree("zero_optimization.stage", "parallel.zero_stage", parallel.zero_stage)
    stage = STAGE if stage is None else stage
    if stage not in (0, 1, 2, 3):
        raise UserError(f"parallel.zero_stage {stage!r}: DeepSpeed has stages 0, 1, 2 and 3")
    if stage and optim.name not in ELEMENTWISE:
        raise UserError(
            f"optim.name {optim.name}: it looks at whole tensors, which ZeRO stage {stage} cuts into pieces; set "
            f"parallel.zero_stage 0, engine ddp or fsdp2, or one of {', '.join(ELEMENTWISE)}"
        )
    _offload(file, parallel.offload, stage)
    for key, what in _MOVED.items():
        file.refuse(key, f"brings {what}, which a checkpoint could not hold; leave it out")
    file.put("zero_optimization.stage", stage)
    if file.get("zero_optimization.memory_efficient_linear") is None:
        # It would replace torch.nn.functional.linear for the whole process, by one that rounds otherwise in autocast.
        file.put("zero_optimization.memory_efficient_linear", False)
    own = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
    # Both optimizers are checked above; a compiled one of DeepSpeed's own is not needed: torch's is fused on a CPU too.
    defaults = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": None}
    return defaults | file.tree | own


def check_batches(parallel: Parallel, train: Train, world_size: int) -> None:
    """The file's batch sizes against ours.

    Raises:
        UserError: they differ, or the file lets DeepSpeed choose them.
    """
    file = _File(parallel.deepspeed)
    share = train.global_batch // world_size
    micro = train.micro_batch or share
    file.agree("train_batch_size", "train.global_batch", train.global_batch)
    file.agree("train_micro_batch_size_per_gpu", "train.micro_batch", micro)
    file.agree("gradient_accumulation_steps", "train.global_batch / ranks / train.micro_batch", share // micro)
    file.agree("elasticity.enabled", "a train.global_batch that is fixed: elasticity.enabled", False)


def _check_optimizer(file: _File, optim: Optim) -> None:
    clip = file.take("gradient_clipping")
    if clip is not None and (clip or None) != optim.clip_norm:
        file.contradict("gradient_clipping", clip, "optim.clip_norm", optim.clip_norm)
    if optim.clip_norm is not None:
        file.agree("zero_optimization.compute_grad_norm", "optim.clip_norm, which needs compute_grad_norm", True)
    # DeepSpeed's Adam is AdamW unless it is told otherwise.
    names = {"adam": "adamw", "fusedadam": "adamw", "adam8bit": "adamw8bit"}
    file.agree("optimizer.type", "optim.name", optim.name, lambda a, b: names.get(str(a).lower(), str(a).lower()) == b)
    same_pair: Callable[[Any, Any], bool] = lambda a, b: isinstance(a, list) and tuple(a) == b  # noqa: E731
    file.agree("optimizer.params.lr", "optim.lr", optim.lr)
    file.agree("optimizer.params.betas", "optim.betas", optim.betas, same_pair)
    file.agree("optimizer.params.eps", "optim.eps", optim.eps)
    file.agree("optimizer.params.weight_decay", "optim.weight_decay", optim.weight_decay)
    file.agree("optimizer.params.adam_w_mode", "decoupled optim.weight_decay: adam_w_mode", True)
    file.take("optimizer.params.torch_adam")
    if left := file.take("optimizer"):
        told = next(iter(left.get("params") or left))
        raise UserError(
            f"parallel.deepspeed {file.path}: optimizer {told!r} has no knob here: the optimizer is built from the "
            "section optim; remove it"
        )
    if scheduler := file.take("scheduler"):
        kind = scheduler.get("type") if isinstance(scheduler, dict) else scheduler
        file.contradict("scheduler.type", kind, "optim.schedule", f"{optim.schedule} (by samples, in any engine)")


def _check_precision(file: _File, precision: str) -> None:
    file.agree("bf16.enabled", "model.precision", precision, lambda a, b: bool(a) == (b == "bf16"))
    file.take("bf16")
    for key in ("fp16", "amp"):
        file.agree(f"{key}.enabled", "model.precision", precision, lambda a, b: not a)
        file.take(key)
    if file.get("torch_autocast.enabled"):
        kind = file.get("torch_autocast.dtype") or "bfloat16"
        if precision != "bf16" or kind not in ("bfloat16", "bf16"):
            file.contradict("torch_autocast.dtype", kind, "model.precision", precision)
    file.agree(
        "managed_gradient_accumulation", "accumulation by train.micro_batch: managed_gradient_accumulation", True
    )


def _offload(file: _File, offload: bool, stage: int) -> None:
    """Moments, and at stage 3 weights, in CPU memory, where the knob or the file asks for it."""
    for part, least in (("optimizer", 1), ("param", 3)):
        key = f"zero_optimization.offload_{part}"
        device = file.get(f"{key}.device")
        if device == "nvme":
            file.refuse(f"{key}.device", "keeps tensors in files of its own, out of a checkpoint's reach; use cpu")
        if offload and device not in (None, "cpu") and stage >= least:
            file.contradict(f"{key}.device", device, "parallel.offload", True)
        if device == "cpu" and stage < least:
            file.contradict(f"{key}.device", device, "parallel.zero_stage", f"{stage} (it needs {least} or more)")
        if (file.get(f"{key}.ratio") or 1.0) != 1.0:
            file.refuse(f"{key}.ratio", "splits an update over two optimizers, one without our rates; leave it out")
        if offload and stage >= least:
            file.put(f"{key}.device", "cpu")
    if offload and not stage:
        raise UserError("parallel.offload True: nothing can be offloaded at parallel.zero_stage 0; set 1, 2 or 3")


class _File:
    """A DeepSpeed JSON; keys are paths such as 'zero_optimization.stage', and what reads 'auto' is left to us."""

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.tree: Json = {} if path is None else _without_auto(_read(Path(path)))

    def get(self, key: str) -> Any:
        """The value, or None where it is not written."""
        found: Any = self.tree
        for part in key.split("."):
            if not isinstance(found, dict) or part not in found:
                return None
            found = found[part]
        return found

    def take(self, key: str) -> Any:
        """The value, which DeepSpeed will not see then; a section that is empty without it goes too."""
        value = self.get(key)
        *above, last = key.split(".")
        if value is None and key not in self.tree:
            return None
        section: Any = self.tree
        for part in above:
            section = section[part]
        section.pop(last, None)
        if above and not section:
            self.take(".".join(above))
        return value

    def agree(self, key: str, knob: str, ours: Any, same: Callable[[Any, Any], bool] = lambda a, b: a == b) -> Any:
        """Take a value that must be ours, if both are given; the one that is."""
        theirs = self.take(key)
        if theirs is not None and ours is not None and not same(theirs, ours):
            self.contradict(key, theirs, knob, ours)
        return ours if theirs is None else theirs

    def contradict(self, key: str, theirs: Any, knob: str, ours: Any) -> None:
        raise UserError(
            f"parallel.deepspeed {self.path}: {key} {theirs!r} contradicts {knob} {ours!r}; change one of them, or "
            f"leave {key} out of the file"
        )

    def refuse(self, key: str, why: str) -> None:
        if value := self.get(key):
            raise UserError(f"parallel.deepspeed {self.path}: {key} {value!r} {why}")

    def put(self, key: str, value: Any) -> None:
        *above, last = key.split(".")
        section = self.tree
        for part in above:
            section = section.setdefault(part, {})
        section[last] = value


def _read(path: Path) -> Json:
    try:
        tree = json.loads(path.read_text(), object_pairs_hook=_once)
    except OSError as error:
        raise UserError(f"parallel.deepspeed {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"parallel.deepspeed {path}: not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"parallel.deepspeed {path}: a DeepSpeed config is an object, not a {type(tree).__name__}")
    return tree


def _once(pairs: list[tuple[str, Any]]) -> Json:
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{twice[0]} is written twice: keep one")
    return dict(pairs)


def _without_auto(tree: Json) -> Json:
    """Without the values that transformers' configs leave to the program that reads them."""
    kept = {key: value for key, value in tree.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}
