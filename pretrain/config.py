"""Every knob of a run, on one page: frozen dataclasses that nothing writes to after start.

`runfile.load` reads a run from a YAML file and flags; `problems` is the one place for rules that span several knobs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pretrain.errors import UserError


def free(default: Any) -> Any:
    """A knob that may change when a run goes on in its folder: it changes no result, only where, when or what is told."""
    return field(default=default, metadata={"resume": "free"})


@dataclass(frozen=True, kw_only=True)
class Data:
    source: Literal["shards", "synthetic"] = "shards"
    """Where pairs come from: WebDataset tar shards, or random pairs that need no disk."""
    train: tuple[str, ...] = ()
    """Training shards: paths, globs and brace patterns such as 'cc12m/{00000..01242}.tar'."""
    eval: tuple[str, ...] = ()
    """Held-out shards, in the same notation."""
    workers: int = free(2)
    """Decoding processes per rank; 0 decodes in the training process. Never changes what a batch holds."""
    prefetch: int = free(2)
    """Batches that each worker keeps ready."""
    shuffle: bool = True
    """Off: samples come in the order of the shards, every epoch."""
    shuffle_window: int = 50_000
    """Samples (rounded to whole shards) inside which order is fully random; the shards themselves always are."""
    image_keys: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """Tar member extensions that hold the image, first match wins."""
    text_keys: tuple[str, ...] = ("txt", "json:caption", "json:captions")
    """Where captions are: a text member, or 'json:FIELD' of the json member (a string or a list of them)."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Share of the image's area that the random training crop keeps."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Aspect ratios of the random training crop."""
    flip: bool = False
    """Mirror half of the training images."""
    max_bad: float = 0.01
    """Stop the run when more than this share of the last 10,000 samples (at least 10) had to be replaced."""
    index_dir: str | None = free(None)
    """Folder for shard indexes where the shards' own folder is read-only."""
    synthetic_samples: int = 1024
    """Samples per epoch of the synthetic source."""


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str = "ViT-B-32"
    """An open_clip model name, the name of a JSON in configs/models, or the path of such a JSON."""
    pretrained: str | None = None
    """An open_clip pretrained tag, or the path of a checkpoint, to start from."""
    quick_gelu: bool = False
    """Force QuickGELU, which OpenAI's original weights need."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the towers (bf16 = autocast); the loss is fp32 in either case."""
    logit_scale: float | None = None
    """Start of the learned scale, as the factor itself (14.3, not ln 14.3); default: the objective's, or the checkpoint's."""
    logit_bias: float | None = None
    """Start of the learned bias; default: the objective's, or the checkpoint's."""
    logit_scale_max: float | None = None
    """Ceiling of the learned scale; default: the objective's, raised to a loaded checkpoint's value where that is larger."""
    lock_image: bool = False
    """Freeze the image tower (LiT)."""
    lock_image_unlocked_groups: int = 0
    """Leave this many last layer groups of a locked image tower trainable."""
    lock_image_norms: bool = True
    """Freeze the normalisation layers (and their running statistics) of a locked image tower too."""
    lock_text: bool = False
    """Freeze the text tower."""
    lock_text_unlocked_layers: int = 0
    """Leave this many last layers of a locked text tower trainable."""
    lock_text_norms: bool = True
    """Freeze the normalisation layers of a locked text tower too."""
    grad_checkpointing: bool = free(False)
    """Recompute the towers' activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    name: Literal["adamw"] = "adamw"
    """Optimizer."""
    lr: float = 5e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's two averaging factors."""
    eps: float = 1e-6
    """AdamW's denominator guard."""
    weight_decay: float = 0.2
    """Decoupled decay of matrices; vectors, norms, embeddings that ask for it, scale and bias have none."""
    clip_norm: float | None = None
    """Scale the gradient down to this norm, over both towers."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, saved and evaluated; None: no average."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """Learning rate after warm-up: cosine to lr_end, constant, or constant with a final linear decay."""
    warmup_samples: int = 0
    """Linear warm-up, in samples."""
    decay_samples: int = 0
    """Length of wsd's final decay, in samples."""
    lr_end: float = 0.0
    """Learning rate at the end of a cosine or wsd schedule."""


@dataclass(frozen=True, kw_only=True)
class Train:
    samples: int | None = None
    """Length of the run in samples seen."""
    epochs: float | None = None
    """Length of the run in passes over the data; give this or samples."""
    global_batch: int = 1024
    """Pairs per optimizer step over all ranks: the negatives, the science."""
    micro_batch: int | None = free(None)
    """Pairs per rank and tower pass: the memory; smaller than global_batch / ranks turns on the cached-feature step."""
    timeout_s: float = free(600.0)
    """Seconds after which a collective that not every rank entered ends the run."""
    threads: int | None = None
    """CPU threads per rank for tensor arithmetic; default: the machine's cores shared out."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every_steps: int | None = free(None)
    """Save each time this many optimizer steps are done."""
    every_minutes: float | None = free(30.0)
    """Save when this long has passed since the last one."""
    keep_last: int = free(3)
    """Newest checkpoints to keep."""
    milestone_steps: int | None = free(None)
    """Checkpoints at multiples of this many steps are never pruned."""
    resume: bool = free(True)
    """Go on from the run folder's newest good checkpoint; False refuses a folder that holds one."""


@dataclass(frozen=True, kw_only=True)
class Log:
    every_steps: int = free(10)
    """Write metrics each time this many optimizer steps are done."""
    batch_digest: bool = free(False)
    """Log a hash of every global batch's sample keys, pixels and tokens."""
    wandb: bool = free(False)
    """Send metrics to Weights & Biases (offline without a login)."""
    wandb_project: str = free("pretrain")
    """Its project."""
    tensorboard: bool = free(False)
    """Write TensorBoard event files into the run folder."""
    progress: bool = free(True)
    """Live progress bar on a terminal; plain lines elsewhere."""


@dataclass(frozen=True)
class Choice:
    """A method by name, with its own options."""

    name: str
    options: Any


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str = "run"
    """The run folder's name."""
    folder: str = free("runs")
    """Where run folders are made."""
    seed: int = 0
    """Of weights, sample order, augmentation and dropout."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    objective: tuple[Choice, ...] = ()
    """What is minimised: objectives are summed. In YAML a name, {name: ..., option: ...}, or a list of them."""
    exchange: str = free("auto")
    """How features cross ranks for the loss: auto, local, gather."""
    engine: str = free("auto")
    """How parameters and gradients are spread: auto, single, ddp."""
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        for problem in problems(self):
            raise UserError(problem)

    @property
    def path(self) -> Path:
        """The run folder."""
        return Path(self.folder) / self.name


def problems(run: Run) -> list[str]:
    """Every rule that takes more than one field, or more than a type, to state. One sentence each."""
    data, optim, train, save = run.data, run.optim, run.train, run.checkpoint
    rules = [
        (data.source == "shards" and not data.train, "data.train is empty: name shards, or set data.source: synthetic"),
        (data.workers < 0, f"data.workers {data.workers} is negative: 0 decodes in the training process"),
        (data.prefetch < 1, f"data.prefetch {data.prefetch} must be at least 1"),
        (data.shuffle_window < 1, f"data.shuffle_window {data.shuffle_window} must be at least 1 sample"),
        (not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1, f"data.crop_scale {data.crop_scale} must rise within (0, 1]"),
        (not 0 < data.crop_ratio[0] <= data.crop_ratio[1], f"data.crop_ratio {data.crop_ratio} must rise and be positive"),
        (not 0 <= data.max_bad <= 1, f"data.max_bad {data.max_bad} is a share: between 0 and 1"),
        (data.synthetic_samples < 1, f"data.synthetic_samples {data.synthetic_samples} must be at least 1"),
        (run.model.logit_scale is not None and run.model.logit_scale <= 0, f"model.logit_scale {run.model.logit_scale} must be positive: it is the factor itself, not its logarithm"),
        (run.model.logit_scale_max is not None and run.model.logit_scale_max <= 0, f"model.logit_scale_max {run.model.logit_scale_max} must be positive"),
        (run.model.lock_image_unlocked_groups > 0 and not run.model.lock_image, "model.lock_image_unlocked_groups needs model.lock_image: true"),
        (run.model.lock_text_unlocked_layers > 0 and not run.model.lock_text, "model.lock_text_unlocked_layers needs model.lock_text: true"),
        (run.model.lock_image and run.model.lock_text and not run.model.lock_image_unlocked_groups + run.model.lock_text_unlocked_layers, "model.lock_image and model.lock_text leave nothing to train: unlock one, or some of its last layers"),
        (optim.lr <= 0, f"optim.lr {optim.lr} must be positive"),
        (not all(0 <= beta < 1 for beta in optim.betas), f"optim.betas {optim.betas} must lie in [0, 1)"),
        (optim.eps <= 0, f"optim.eps {optim.eps} must be positive"),
        (optim.weight_decay < 0, f"optim.weight_decay {optim.weight_decay} must not be negative"),
        (not 0 <= optim.lr_end <= optim.lr, f"optim.lr_end {optim.lr_end} must lie between 0 and optim.lr {optim.lr}"),
        (optim.clip_norm is not None and optim.clip_norm <= 0, f"optim.clip_norm {optim.clip_norm} must be positive; leave it out for no clipping"),
        (optim.ema_decay is not None and not 0 < optim.ema_decay < 1, f"optim.ema_decay {optim.ema_decay} must lie in (0, 1); leave it out for no average"),
        (optim.warmup_samples < 0, f"optim.warmup_samples {optim.warmup_samples} must not be negative"),
        (optim.schedule == "wsd" and optim.decay_samples <= 0, "optim.schedule wsd needs optim.decay_samples, the length of its final decay"),
        (optim.schedule != "wsd" and optim.decay_samples != 0, f"optim.decay_samples belongs to schedule wsd, not {optim.schedule}"),
        ((train.samples is None) == (train.epochs is None), f"give one of train.samples ({train.samples}) and train.epochs ({train.epochs})"),
        ((train.samples or train.epochs or 1) <= 0, "train.samples or train.epochs must be positive"),
        (train.samples is not None and optim.warmup_samples + optim.decay_samples > train.samples, f"optim.warmup_samples {optim.warmup_samples} + optim.decay_samples {optim.decay_samples} exceed train.samples {train.samples}"),
        (train.global_batch < 1, f"train.global_batch {train.global_batch} must be at least 1"),
        (train.micro_batch is not None and train.micro_batch < 1, f"train.micro_batch {train.micro_batch} must be at least 1"),
        (train.timeout_s <= 0, f"train.timeout_s {train.timeout_s} must be positive"),
        (train.threads is not None and train.threads < 1, f"train.threads {train.threads} must be at least 1"),
        (save.keep_last < 1, f"checkpoint.keep_last {save.keep_last} must be at least 1"),
        (save.every_steps is not None and save.every_steps < 1, f"checkpoint.every_steps {save.every_steps} must be at least 1"),
        (save.every_minutes is not None and save.every_minutes <= 0, f"checkpoint.every_minutes {save.every_minutes} must be positive; leave it out to save by steps only"),
        (save.milestone_steps is not None and save.milestone_steps < 1, f"checkpoint.milestone_steps {save.milestone_steps} must be at least 1"),
        (run.log.every_steps < 1, f"log.every_steps {run.log.every_steps} must be at least 1"),
        (not run.name or "/" in run.name or run.name in (".", ".."), f"name {run.name!r} must be a plain folder name; folder says where it is made"),
    ]  # fmt: skip
    return [text for broken, text in rules if broken]


def check_world(run: Run, world_size: int) -> None:
    """What can only be checked when the number of ranks is known.

    Raises:
        UserError: global_batch does not divide over the ranks, or micro_batch over a rank's share.
    """
    batch, micro = run.train.global_batch, run.train.micro_batch
    if batch % world_size:
        below = batch // world_size * world_size
        near = ", ".join(str(n) for n in (below, below + world_size) if n)
        raise UserError(f"train.global_batch {batch} is not a multiple of {world_size} ranks; nearest: {near}")
    if micro is not None and (micro > batch // world_size or (batch // world_size) % micro):
        share = batch // world_size
        fits = ", ".join(str(n) for n in range(share, 0, -1) if share % n == 0 and n <= max(micro, 1))[:40] or str(share)
        raise UserError(f"train.micro_batch {micro} does not divide the {share} pairs of each of {world_size} ranks; try {fits}")


def changes(old: Run, new: Run) -> list[str]:
    """Fields that differ and may not when a run goes on in its folder, as 'section.key: old -> new'."""
    found: list[str] = []
    for item in dataclasses.fields(Run):
        before, after = getattr(old, item.name), getattr(new, item.name)
        if dataclasses.is_dataclass(before) and not isinstance(before, type):
            found += [
                f"{item.name}.{sub.name}: {getattr(before, sub.name)} -> {getattr(after, sub.name)}"
                for sub in dataclasses.fields(before)
                if getattr(before, sub.name) != getattr(after, sub.name) and sub.metadata.get("resume") != "free"
            ]
        elif before != after and item.metadata.get("resume") != "free":
            found.append(f"{item.name}: {before} -> {after}")
    return found
