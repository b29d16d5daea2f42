"""Every knob of a run, on one page: frozen dataclasses that nothing writes to after start.

`runfile.load` reads a run from a YAML file and flags; rules.py holds what a type cannot state.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pretrain import rules
from pretrain.errors import UserError


def free(default: Any) -> Any:
    """A knob that may change when a run goes on: it changes no result, only where, when or what is told."""
    return field(default=default, metadata={"resume": "free"})


@dataclass(frozen=True, kw_only=True)
class Data:
    train: tuple[str, ...] = free(())
    """Training shards: paths, URLs, globs and brace patterns such as 'cc12m/{00000..01242}.tar', or files of them. Or
    'synthetic:SAMPLES' alone: patterns with captions that name them, which need no disk."""
    weights: tuple[float, ...] = ()
    """Share of the samples that each entry of data.train gives, exact in every window; none: all are one data set."""
    replacement: bool = False
    """Draw samples with replacement inside each shuffle window; False: every sample once per epoch."""
    eval: tuple[str, ...] = free(())
    """Held-out shards, in the same notation; a folder of class folders; JSON files of benchmarks ('FILE.json@IMAGES').
    'TASK=SAMPLES' among them, such as 'zero_shot=100000', measures that in training each time so many were seen."""
    workers: int = free(2)
    """Decoding processes per rank; 0 decodes in the training process. Never changes what a batch holds."""
    prefetch: int = free(2)
    """Batches that the workers keep ready."""
    shuffle_window: int = 50_000
    """Samples inside which order is fully random, drawn from the whole data set; 0: every epoch as the shards lie."""
    shuffle_chunk: int | None = None
    """Neighbouring samples that share a window; none: so few that no batch shows it; 0: whole shards, for a cache."""
    image_keys: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """Tar member extensions that hold the image, first match wins."""
    text_keys: tuple[str, ...] = ("txt", "json:caption", "json:captions")
    """Where captions are: a text member, or 'json:FIELD' of the json member (a string or a list of them)."""
    text_weights: tuple[float, ...] = ()
    """Chance of each of data.text_keys, among those that a sample has; none: every caption is as likely."""
    sentences: int = 0
    """Train on at most this many neighbouring sentences of a caption, drawn anew each time; 0: on all of it."""
    text_edits: tuple[str, ...] = ("delete=0.1", "swap=0.1")
    """Edits that make further views of a caption, where an objective asks for them, in this order."""
    exact_pixels: bool = False
    """Decode at full size and resize with Pillow, as open_clip does, bit for bit; slower."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Share of the image's area that the random training crop keeps."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Aspect ratios of the random training crop."""
    flip: bool = False
    """Mirror half of the training images."""
    augment: tuple[str, ...] = ()
    """Further augmentations of training images, in this order, such as 'color_jitter=0.4', 'grayscale=0.2'."""
    view_augment: tuple[str, ...] = ("color_jitter=0.4", "grayscale=0.2", "blur=0.5")
    """Augmentations of further views of an image, where an objective asks for them."""
    max_bad: float = 0.01
    """Stop the run when more than this share of a rank's last 10,000 samples (at least 10) had to be replaced."""
    index_dir: str | None = free(None)
    """Folder for shard indexes where the shards' own folder is read-only or remote."""
    cache_dir: str | None = free(None)
    """Folder on a local disk that keeps whole remote shards, shared by all ranks of a node; none: reads by range."""
    cache_gb: float = free(500.0)
    """Size at which that folder drops the shards that were not read for longest, in GiB."""
    sizes: str | None = None
    """JSON file {shard: samples}: a run starts before its shards are indexed; each is indexed when it is first read."""
    retry_s: float = free(300.0)
    """Seconds for which a failing transfer is tried again before it ends the run."""
    allow_pipe: bool = free(False)
    """Let data.train and data.eval name 'pipe:COMMAND' shards: the command runs in a shell."""
    read_ahead: int = free(4)
    """Threads per worker that read samples ahead of the decoding."""

    @property
    def synthetic(self) -> int | None:
        """Samples in an epoch of the synthetic source; None: `train` names shards."""
        named = re.fullmatch(r"synthetic:([1-9]\d*)", self.train[0]) if len(self.train) == 1 else None
        return int(named[1]) if named else None


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str = "ViT-B-32"
    """An open_clip model name, the name of a JSON in configs/models, or the path of such a JSON."""
    pretrained: str | None = None
    """An open_clip tag, or the path of a checkpoint, an export or a transformers folder, to start from."""
    quick_gelu: bool = False
    """Force QuickGELU, which OpenAI's original weights need."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the towers (bf16 = autocast); the loss is fp32 in either case."""
    logit_scale: float | None = None
    """Start of the learned scale, the factor itself (14.3, not ln 14.3); default: the objective's or checkpoint's."""
    logit_bias: float | None = None
    """Start of the learned bias; default: the objective's, or the checkpoint's."""
    logit_scale_max: float | None = None
    """Ceiling of the learned scale; default: the objective's, or a loaded checkpoint's value where that is larger."""
    lock_image: int | None = None
    """Freeze the image tower but this many last layer groups; 0: all of it (LiT); none: train it."""
    lock_text: int | None = None
    """Freeze the text tower but this many last layers; 0: all of it; none: train it."""
    lock_norms: bool = True
    """Freeze the normalisation layers (and their running statistics) of locked towers too."""
    grad_checkpointing: str = free("off")
    """Compute activations again in the backward pass: less memory, more time. off, all, every=N (each N-th block), or
    selective (keep results of matrix products and attention)."""
    speed: tuple[str, ...] = free(("causal",))
    """Faster forms of the towers: causal, compile, compile=max-autotune, cuda_graphs, channels_last, short_texts."""
    patch_dropout: float = 0.0
    """Share of each image's patches that training leaves out, drawn anew each time (FLIP); evaluation sees all."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    precision: Literal["auto", "fp32", "fp16", "bf16", "mixed"] = "auto"
    """Arithmetic of the loss's matrix products and of features between ranks; its sums are fp32 in any case. auto: fp16
    where the towers run in bf16 on a GPU, else fp32. mixed: fp16, and bf16 for the gradients' products."""
    kernel: Literal["auto", "triton", "blockwise", "reference"] = free("auto")
    """Form of the kernels; auto: the fastest that runs here, said once."""
    accumulators: Literal["fp32", "bf16"] = "fp32"
    """dtype in which gradients of features travel between ranks; bf16 halves the bytes and rounds at every hop."""
    slices: int = free(4)
    """Pieces that exchange streamed cuts the columns into: more take less memory and more messages."""
    node_size: int | None = free(None)
    """Ranks on a node, for exchange hierarchical and for auto; none: as the launcher says."""
    memory_gb: float = free(4.0)
    """What exchange auto may spend on features and their gradients of all ranks, in GiB on each rank."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    reduce_dtype: Literal["fp32", "bf16"] = free("fp32")
    """ddp, fsdp2: dtype in which gradients are summed over ranks; bf16 halves the bytes and rounds at every hop."""
    static_graph: bool = free(False)
    """ddp: promise that each step runs the same layers in the same order; parameters without a gradient may stay."""
    replicas: int = free(1)
    """fsdp2: whole copies of the model, each spread over neighbouring ranks (HSDP: one per node, say)."""
    reshard: bool = free(True)
    """fsdp2: free a block's weights after its forward pass and gather them again for the backward; False: keep them."""
    gather_dtype: Literal["fp32", "bf16"] = free("fp32")
    """fsdp2: dtype in which weights are gathered; bf16 halves the bytes, and norms and residuals are rounded too."""
    offload: bool = free(False)
    """fsdp2, deepspeed: keep weights (deepspeed: at stage 3), gradients and moments in CPU memory and update there."""
    zero_stage: Literal[0, 1, 2, 3] | None = free(None)
    """deepspeed: spread over ranks nothing (0), moments (1), gradients (2), weights (3); none: its file's or 2."""
    deepspeed: str | None = free(None)
    """deepspeed: a DeepSpeed JSON for what has no knob here; what contradicts a knob is refused."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    name: Literal["adamw", "stable_adamw", "lion", "lamb", "muon", "adamw8bit"] = "adamw"
    """Optimizer. muon: for matrices inside layers, adamw elsewhere; adamw8bit: 8-bit moments, by bitsandbytes."""
    lr: float = 5e-4
    """Peak learning rate."""
    lr_scaling: str | None = None
    """'linear=B' or 'sqrt=B': lr and lr_end are for a global batch of B, and grow with this run's; none: as is."""
    image_lr: float = 1.0
    """Learning rate of the image tower, as a multiple of optim.lr."""
    text_lr: float = 1.0
    """Learning rate of the text tower, as a multiple of optim.lr."""
    layer_decay: float = 1.0
    """Factor on the learning rate for each layer further down a tower, whose projection has the whole rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """The two averaging factors."""
    eps: float = 1e-6
    """The denominator's guard, where the optimizer has one."""
    weight_decay: float = 0.2
    """Decoupled decay of matrices; vectors, norms, embeddings that ask for it, scale and bias have none."""
    no_decay: tuple[str, ...] = ()
    """Further parameters without decay: name patterns such as 'token_embedding.*', '*proj'."""
    clip_norm: float | None = None
    """Scale the gradient down to this norm, over both towers."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, saved and evaluated; None: no average."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "rsqrt"] = "cosine"
    """After warm-up: cosine or linear to lr_end, constant, constant with a final decay, or sqrt(warmup / samples)."""
    warmup_samples: int = 0
    """Linear warm-up, in samples."""
    decay_samples: int = 0
    """Length of the final linear decay of wsd or rsqrt, in samples."""
    lr_end: float = 0.0
    """Learning rate at the end of a schedule that decays."""


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
    stop_signal: str = free("USR2")
    """A further signal that means: save and end, beside TERM and INT. USR1, USR2, HUP, QUIT or XCPU."""
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
    """Go on from the run's newest good checkpoint; False refuses a run that has one."""
    to: str | None = free(None)
    """Folder or fsspec URL (s3://..., gs://...) for checkpoints, in TO/NAME; none: the run folder."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    spikes: float | None = 6.0
    """Leave out a step whose loss or gradient norm exceeds mean + this many standard deviations of the last 128 steps
    taken; none: only those that are not finite."""
    patience: int = 10
    """Steps left out, of the last 128, after which the run goes back to the checkpoint before the first of them."""
    rewinds: int = free(2)
    """Times a run may go back so, leaving out the batches from the first of those steps to the last; then it ends."""
    compare_steps: int | None = free(1000)
    """Compare a hash of the weights over ranks each time this many steps are done; none: never."""


@dataclass(frozen=True, kw_only=True)
class Log:
    every_steps: int = free(10)
    """Write metrics each time this many optimizer steps are done."""
    batch_digest: bool = free(False)
    """Log a hash of every global batch's sample keys, pixels and tokens."""
    wandb: str | None = free(None)
    """Project of Weights & Biases that metrics are sent to (offline without a login); none: they are not."""
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
    """How features cross ranks for the loss: auto, local, gather, streamed, ring, bidirectional, hierarchical."""
    loss: Loss = field(default_factory=Loss)
    engine: str = free("auto")
    """How parameters and gradients are spread: auto, single, ddp, fsdp2, deepspeed."""
    parallel: Parallel = field(default_factory=Parallel)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    guard: Guard = field(default_factory=Guard)
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        for problem in rules.problems(self):
            raise UserError(problem)

    @property
    def path(self) -> Path:
        """The run folder."""
        return Path(self.folder) / self.name
