"""Every rule about knobs that a type cannot state, in one place. A rule is (broken, the sentence that says so)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pretrain import rules_data, signals
from pretrain.guard import asked
from pretrain.speed import options

if TYPE_CHECKING:
    from pretrain.config import Checkpoint, Loss, Model, Optim, Parallel, Run, Train

Rules = list[tuple[bool, str]]


def problems(run: Run) -> Iterator[str]:
    """One sentence for each rule that a run breaks: field, value, rule, fix."""
    sections = (
        finite(run),
        rules_data.sources(run.data),
        model(run.model),
        loss(run.loss),
        parallel(run.parallel, run),
        optim(run.optim),
        train(run.train),
        checkpoint(run.checkpoint),
        whole(run),
    )
    yield from (sentence for rules in sections for broken, sentence in rules if broken)


def finite(run: Run) -> Rules:
    """No knob is infinite or not a number."""
    sections: dict[str, Any] = {
        "data": run.data,
        "model": run.model,
        "loss": run.loss,
        "optim": run.optim,
        "train": run.train,
        "checkpoint": run.checkpoint,
    }
    values = {f"{name}.{item.name}": getattr(s, item.name) for name, s in sections.items() for item in fields(s)}
    flat = [(name, v) for name, value in values.items() for v in (value if isinstance(value, tuple) else (value,))]
    return [
        (isinstance(value, float) and not math.isfinite(value), f"{name} {value} must be a finite number")
        for name, value in flat
    ]


def model(model: Model) -> Rules:
    groups, layers = model.lock_image, model.lock_text
    return [
        (
            model.logit_scale is not None and model.logit_scale <= 0,
            f"model.logit_scale {model.logit_scale} must be positive: it is the factor itself, not its logarithm",
        ),
        (
            model.logit_scale_max is not None and model.logit_scale_max <= 0,
            f"model.logit_scale_max {model.logit_scale_max} must be positive",
        ),
        (groups is not None and groups < 0, f"model.lock_image {groups} must not be negative: 0 locks the whole tower"),
        (layers is not None and layers < 0, f"model.lock_text {layers} must not be negative: 0 locks the whole tower"),
        (
            groups == layers == 0,
            "model.lock_image 0 and model.lock_text 0 leave nothing to train: unlock one, or some of its last layers",
        ),
    ]


def loss(loss: Loss) -> Rules:
    return [
        (loss.slices < 1, f"loss.slices {loss.slices} must be at least 1: one slice is everything at once"),
        (
            loss.node_size is not None and loss.node_size < 1,
            f"loss.node_size {loss.node_size} must be at least 1 rank; none means as the launcher says",
        ),
        (loss.memory_gb <= 0, f"loss.memory_gb {loss.memory_gb} must be positive"),
        (
            loss.kernel == "triton" and loss.precision == "fp32",
            "loss.kernel triton with loss.precision fp32 is slower than blockwise: matrix units take fp16 and bf16; "
            "set loss.precision fp16, or leave loss.kernel at auto",
        ),
    ]


def parallel(parallel: Parallel, run: Run) -> Rules:
    """What an engine would have to ignore is refused; engine auto is single or ddp."""
    engine, model, micro_batch = run.engine, run.model, run.train.micro_batch
    asked = {
        "reduce_dtype": (parallel.reduce_dtype != "fp32", ("auto", "ddp", "fsdp2")),
        "static_graph": (parallel.static_graph, ("auto", "ddp")),
        "replicas": (parallel.replicas != 1, ("fsdp2",)),
        "reshard": (not parallel.reshard, ("fsdp2",)),
        "gather_dtype": (parallel.gather_dtype != "fp32", ("fsdp2",)),
        "offload": (parallel.offload, ("fsdp2", "deepspeed")),
        "zero_stage": (parallel.zero_stage is not None, ("deepspeed",)),
        "deepspeed": (parallel.deepspeed is not None, ("deepspeed",)),
    }
    return [
        (parallel.replicas < 1, f"parallel.replicas {parallel.replicas} must be at least 1"),
        (
            parallel.static_graph and micro_batch is not None,
            f"parallel.static_graph with train.micro_batch {micro_batch}: DDP counts the parts of an accumulated step "
            "as steps, and they differ; turn one of them off",
        ),
        (
            engine == "fsdp2" and run.optim.name == "adamw8bit",
            "optim.name adamw8bit cannot update weights that engine fsdp2 has cut up: take adamw, or engine ddp",
        ),
        (
            parallel.gather_dtype == "bf16" and model.precision != "bf16",
            f"parallel.gather_dtype bf16 needs model.precision bf16, not {model.precision}: weights would be rounded",
        ),
        *(
            (
                is_asked and engine in ("auto", "single", "ddp", "fsdp2", "deepspeed") and engine not in engines,
                f"parallel.{name} {getattr(parallel, name)} means nothing to engine {engine}: it is for "
                f"{' and '.join(engines[-2:])}; change one of the two",
            )
            for name, (is_asked, engines) in asked.items()
        ),
    ]


def optim(optim: Optim) -> Rules:
    towers = ("image_lr", optim.image_lr), ("text_lr", optim.text_lr)
    return [
        (optim.lr <= 0, f"optim.lr {optim.lr} must be positive"),
        *((value <= 0, f"optim.{name} {value} must be positive; to freeze a tower, lock it") for name, value in towers),
        (
            not 0 < optim.layer_decay <= 1,
            f"optim.layer_decay {optim.layer_decay} must lie in (0, 1]; 1 gives every layer the same rate",
        ),
        (
            optim.lr_scaling is not None and not re.fullmatch(r"(linear|sqrt)=[1-9]\d*", optim.lr_scaling),
            f"optim.lr_scaling {optim.lr_scaling!r} must be 'linear=B' or 'sqrt=B', B being the global batch that "
            "optim.lr is meant for",
        ),
        (not all(0 <= beta < 1 for beta in optim.betas), f"optim.betas {optim.betas} must lie in [0, 1)"),
        (optim.eps <= 0, f"optim.eps {optim.eps} must be positive"),
        (optim.weight_decay < 0, f"optim.weight_decay {optim.weight_decay} must not be negative"),
        (
            not 0 <= optim.lr_end <= optim.lr,
            f"optim.lr_end {optim.lr_end} must lie between 0 and optim.lr {optim.lr}",
        ),
        (
            optim.clip_norm is not None and optim.clip_norm <= 0,
            f"optim.clip_norm {optim.clip_norm} must be positive; none means no clipping",
        ),
        (
            optim.ema_decay is not None and not 0 < optim.ema_decay < 1,
            f"optim.ema_decay {optim.ema_decay} must lie in (0, 1); none means no average",
        ),
        *schedule(optim),
    ]


def schedule(optim: Optim) -> Rules:
    warmup, decay, kind = optim.warmup_samples, optim.decay_samples, optim.schedule
    return [
        (warmup < 0, f"optim.warmup_samples {warmup} must not be negative"),
        (
            kind == "rsqrt" and warmup == 0,
            "optim.warmup_samples 0 must be positive with optim.schedule rsqrt, whose rate is sqrt(warmup / samples)",
        ),
        (
            kind == "wsd" and decay <= 0,
            f"optim.decay_samples {decay} must be positive with optim.schedule wsd: it ends with a decay",
        ),
        (
            kind not in ("wsd", "rsqrt") and decay != 0,
            f"optim.decay_samples {decay} belongs to optim.schedule wsd and rsqrt, not {kind}",
        ),
        (decay < 0, f"optim.decay_samples {decay} must not be negative"),
        (
            optim.lr_end > 0 and (kind == "constant" or (kind == "rsqrt" and decay == 0)),
            f"optim.lr_end {optim.lr_end} is never reached by optim.schedule {kind} without a decay: leave it at 0",
        ),
    ]


def train(train: Train) -> Rules:
    samples, epochs = train.samples, train.epochs
    return [
        (
            (samples is None) == (epochs is None),
            f"train.samples ({samples}) and train.epochs ({epochs}): give exactly one of them",
        ),
        (samples is not None and samples < 1, f"train.samples {samples} must be at least 1"),
        (epochs is not None and epochs <= 0, f"train.epochs {epochs} must be positive"),
        (train.global_batch < 1, f"train.global_batch {train.global_batch} must be at least 1 pair"),
        (
            train.micro_batch is not None and train.micro_batch < 1,
            f"train.micro_batch {train.micro_batch} must be at least 1 pair; none means a rank's whole share",
        ),
        (train.timeout_s <= 0, f"train.timeout_s {train.timeout_s} must be positive"),
        *((True, problem) for problem in signals.problems(train.stop_signal)),
        (train.threads is not None and train.threads < 1, f"train.threads {train.threads} must be at least 1"),
    ]


def checkpoint(save: Checkpoint) -> Rules:
    return [
        (save.keep_last < 1, f"checkpoint.keep_last {save.keep_last} must be at least 1"),
        (
            save.every_steps is not None and save.every_steps < 1,
            f"checkpoint.every_steps {save.every_steps} must be at least 1; none means not by steps",
        ),
        (
            save.every_minutes is not None and save.every_minutes <= 0,
            f"checkpoint.every_minutes {save.every_minutes} must be positive; none means not by time",
        ),
        (
            save.milestone_steps is not None and save.milestone_steps < 1,
            f"checkpoint.milestone_steps {save.milestone_steps} must be at least 1; none means no milestones",
        ),
    ]


def whole(run: Run) -> Rules:
    warmup, decay, samples = run.optim.warmup_samples, run.optim.decay_samples, run.train.samples
    return [
        *((True, problem) for problem in options.problems(run.model, run.engine)),
        *((True, problem) for problem in asked.problems(run.guard)),
        (
            samples is not None and warmup + decay > samples,
            f"optim.warmup_samples {warmup} + optim.decay_samples {decay} exceed train.samples {samples}",
        ),
        (run.seed < 0, f"seed {run.seed} must not be negative"),
        (run.log.every_steps < 1, f"log.every_steps {run.log.every_steps} must be at least 1"),
        (
            run.log.wandb is not None and run.log.wandb.lower() in ("", "true", "false"),
            f"log.wandb {run.log.wandb!r} must be the name of a project; none sends nothing",
        ),
        (
            not run.name or "/" in run.name or run.name in (".", ".."),
            f"name {run.name!r} must be a plain folder name; `folder` says where it is made",
        ),
    ]
