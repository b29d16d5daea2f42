"""The dual encoder: two open_clip towers, a learned scale and bias, and unit-norm features in full precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pretrain import checkpoint, config, precision
from pretrain.compat import Towers, open_clip
from pretrain.data.images import transforms
from pretrain.errors import UserError
from pretrain.phases import phase
from pretrain.speed import options as speed
from pretrain.speed.apply import Ways, apply
from pretrain.towers import architecture, freeze, patches, recompute, weights
from pretrain.towers.architecture import Architecture
from pretrain.towers.head import Head, Wanted, choose
from pretrain.values import IMAGES, TEXTS, Announce, Features

Tower = Literal["image", "text", "head"]


class DualEncoder(nn.Module):
    """Images and texts in, features on the unit sphere out.

    Attributes:
        towers: open_clip's CLIP or CustomTextCLIP; the names in its state_dict are open_clip's own.
        architecture: what the towers are, in open_clip's words; `architecture.name` also finds the tokenizer.
        image_spec: the preprocessing that belongs to the towers.
        ways: how inputs reach the towers.
        max_logit_scale: ceiling of the learned scale, as the factor itself; inf for none.
    """

    towers: Towers

    def __init__(self, towers: Towers, described: Architecture, arithmetic: precision.Precision) -> None:
        super().__init__()
        self.towers = towers
        self.architecture = described
        self.image_spec = architecture.image_spec(described.preprocess)
        self.precision = arithmetic
        self.ways = Ways(towers.encode_text)
        self._max_log_scale = math.inf
        self._still: frozenset[str] = frozenset()

    @property
    def max_logit_scale(self) -> float:
        return math.exp(self._max_log_scale)

    def forward(
        self,
        images: Tensor,
        texts: Tensor,
        announce: Announce | None = None,
        further: Mapping[str, Tensor] | None = None,
    ) -> Features:
        """Features of pairs, with the scale and bias that turn their cosines into logits.

        Args:
            images: [B, 3, H, W] uint8 RGB, of `image_spec.size`.
            texts: [B, L] int64 token ids.
            announce: called with the text features, which come first, so that they may travel behind the image tower.
            further: 'image_views' [B, K, 3, H, W], 'text_views' and 'captions' [B, K, L], for `Features.extra`. They
                pass the towers together with the pairs' own: a tower sees B * (1 + K) rows.

        Returns:
            fp32 (fp64 where the weights are), unit norm.
        """
        further = further or {}
        with phase("text_tower"):
            text, of_texts = _together(self.encode_text, texts, {k: x for k, x in further.items() if k in TEXTS})
        text = text if announce is None else announce(text)
        with phase("image_tower"):
            image, of_images = _together(self.encode_image, images, {k: x for k, x in further.items() if k in IMAGES})
        bias = None if self.towers.logit_bias is None else self.towers.logit_bias.reshape(())
        return Features(image, text, self.towers.logit_scale.reshape(()).exp(), bias, of_texts | of_images)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit-norm features of images, [B, 3, H, W] uint8 -> [B, D] fp32."""
        with precision.towers(self.precision, self.towers.logit_scale.device):
            features = self.towers.encode_image(self._pixels(images))
        return self._unit_norm(features)

    def encode_text(self, texts: Tensor) -> Tensor:
        """Unit-norm features of token ids, [B, L] int64 -> [B, D] fp32."""
        with precision.towers(self.precision, self.towers.logit_scale.device):
            features = self.ways.encode_text(texts)
        return self._unit_norm(features)

    def clamp(self) -> None:
        """Keep the learned scale at or below its ceiling; call it after each optimizer step."""
        with torch.no_grad():
            self.towers.logit_scale.clamp_(max=self._max_log_scale)

    def train(self, mode: bool = True) -> DualEncoder:
        """Training or evaluation; the running statistics of locked norms stay still in either."""
        super().train(mode)
        for name in self._still:
            self.towers.get_submodule(name).eval()
        return self

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must note, as JSON, to be rebuilt without the files that the run started from."""
        ceiling = self._max_log_scale if math.isfinite(self._max_log_scale) else None
        return {"architecture": asdict(self.architecture), "max_log_scale": ceiling}

    @property
    def has_batch_norms(self) -> bool:
        """Whether features of a row depend on the other rows of the pass: norms over the batch that are not locked."""
        names = {name for name, module in self.towers.named_modules() if isinstance(module, _NormBase)}
        return bool(names - self._still)

    @staticmethod
    def tower_of(parameter_name: str) -> Tower:
        """Which part a parameter belongs to, by its name here or inside `towers`."""
        name = parameter_name.removeprefix("towers.")
        if name in ("logit_scale", "logit_bias"):
            return "head"
        return "image" if name.startswith("visual.") else "text"

    def _pixels(self, images: Tensor) -> Tensor:
        """What the image tower takes: the weights' dtype, but on a GPU at once the bf16 that autocast makes of it."""
        weight = self.towers.logit_scale
        narrow = images.is_cuda and self.precision == "bf16" and weight.dtype == torch.float32
        pixels = transforms.normalize(images, self.image_spec, torch.bfloat16 if narrow else torch.float32)
        pixels = pixels if narrow else pixels.to(weight.dtype)
        return pixels.contiguous(memory_format=self.ways.pixels)

    def _unit_norm(self, features: Tensor | tuple[Tensor, ...]) -> Tensor:
        # Towers built with output_tokens return (pooled, tokens).
        pooled = features[0] if isinstance(features, tuple) else features
        with precision.full_precision(pooled.device):
            return F.normalize(precision.at_least_fp32(pooled), dim=-1)

    def _lock(self, options: config.Model) -> None:
        self._still = freeze.apply(self.towers, options).still
        self.train(self.training)

    def _start_head(self, head: Head) -> None:
        """Set scale, bias and ceiling."""
        self._max_log_scale = head.max_log_scale
        with torch.no_grad():
            self.towers.logit_scale.fill_(head.log_scale)
            if head.bias is not None:
                self.towers.logit_bias.fill_(head.bias)


def build(
    model: config.Model,
    objective: Wanted | Sequence[Wanted],
    seed: int,
    device: torch.device,
    known: Mapping[str, Any] | None = None,
) -> DualEncoder:
    """A dual encoder ready to train: seeded or loaded, its scale and bias as the objective wants them, locked as asked.

    Args:
        model: the model section of a run.
        objective: the run's objective, or all of them.
        seed: of fresh weights, which are made on the CPU and so are the same on every rank and device.
        device: where the weights go; on 'meta' the model has its shapes and its ceiling, and no weights.
        known: `facts()` of the checkpoint whose weights will follow; what the run once started from is then not needed.

    Raises:
        UserError: unknown model or weights, weights that do not fit, or knobs that this model cannot follow.
    """
    described, origin = _described(model) if known is None else (architecture.recall(known["architecture"]), None)
    wanted = [objective] if isinstance(objective, Wanted) else list(objective)
    has_bias = any(item.init_logit_bias is not None for item in wanted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = origin is None and known is None
        trained = replace(described, towers=patches.dropped(described.towers, model.patch_dropout))
        towers = _shapes(trained, has_bias) if device.type == "meta" else _towers(trained, has_bias, fresh)
    patches.refuse_missing(towers, model)
    loaded = weights.load(towers, origin, model.name) if origin else None
    encoder = DualEncoder(towers, described, model.precision)
    head = choose(model, wanted, loaded)
    encoder._start_head(head if known is None else replace(head, max_log_scale=known["max_log_scale"] or math.inf))
    encoder._lock(model)
    again = speed.read_checkpointing(model.grad_checkpointing) or speed.Checkpointing()
    recompute.enable(towers, again)
    encoder.ways = replace(apply(towers, speed.read(model.speed), device), selective=again.selective)
    return encoder.to(device)


def restore(folder: checkpoint.Folder, average: bool, device: torch.device) -> DualEncoder:
    """The dual encoder of a checkpoint, in evaluation mode.

    Args:
        folder: a checkpoint, as `checkpoint.locate` finds it.
        average: whether to take the averaged weights.

    Raises:
        UserError: there are no such weights, or the model description they were trained with is gone or changed.
    """
    model, known = checkpoint.read_run(folder).model, checkpoint.read_facts(folder).get("model")
    described = architecture.recall(known["architecture"]) if known else _described(model)[0]
    tensors = weights.clean(checkpoint.read_weights(folder, average), str(folder))
    towers = _towers(described, "logit_bias" in tensors, fresh=False)
    try:
        towers.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{folder} does not fit model.name {model.name}, whose description has changed: {error}"
        ) from error
    return DualEncoder(towers, described, model.precision).to(device).eval()


def twin(encoder: DualEncoder, device: torch.device) -> DualEncoder:
    """An encoder of the same kind, in evaluation mode, whose weights are to be filled in."""
    with torch.random.fork_rng(devices=[]):
        towers = _towers(encoder.architecture, encoder.towers.logit_bias is not None, fresh=False)
    return DualEncoder(towers, encoder.architecture, encoder.precision).to(device).eval()


def _together(
    encode: Callable[[Tensor], Tensor], rows: Tensor, further: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Features of rows and of further columns, in one pass of the tower; another one for each column of another shape.

    Args:
        rows: [B, ...].
        further: name -> [B, K, ...].

    Returns:
        [B, D], and name -> [B, K, D].
    """
    same = {name: column for name, column in further.items() if column.shape[2:] == rows.shape[1:]}
    joined = {name: encode(column.flatten(0, 1)) for name, column in further.items() if name not in same}
    if same:
        parts = [rows, *(column.flatten(0, 1) for column in same.values())]
        own, *others = torch.split(encode(torch.cat(parts)), [len(part) for part in parts])
        joined |= dict(zip(same, others, strict=True))
    else:
        own = encode(rows)
    return own, {name: joined[name].reshape(*column.shape[:2], own.shape[1]) for name, column in further.items()}


def _described(model: config.Model) -> tuple[Architecture, weights.Origin | None]:
    """What the config names: the architecture, with the preprocessing of the weights that it starts from, and those."""
    described = architecture.find(model)
    origin = weights.origin(model, described.towers)
    return replace(described, preprocess=described.preprocess | (origin.preprocess if origin else {})), origin


def _shapes(described: Architecture, has_bias: bool) -> Towers:
    """The towers without memory; one that looks at its own values as it is built takes it for a moment."""
    try:
        with torch.device("meta"):
            return _towers(described, has_bias, fresh=False)
    except UserError:
        return _towers(described, has_bias, fresh=False).to("meta")


def _towers(described: Architecture, has_bias: bool, fresh: bool) -> Towers:
    """open_clip's model; a trunk's own pretrained weights are fetched only where no others follow."""
    options: dict[str, Any] = {key: value for key, value in described.towers.items() if key != "custom_text"}
    vision, text = dict(options["vision_cfg"]), dict(options["text_cfg"])
    vision["timm_model_pretrained"] = fresh and vision.get("timm_model_pretrained", False)
    text["hf_model_pretrained"] = fresh and text.get("hf_model_pretrained", True)
    options |= {"vision_cfg": vision, "text_cfg": text, "init_logit_bias": 0.0 if has_bias else None}
    custom_text = described.towers.get("custom_text") or "hf_model_name" in text
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    try:
        return kind(**options)
    except (TypeError, ValueError, AssertionError, KeyError, OSError, RuntimeError) as error:
        patches.refuse_unknown(error, vision, described.name)
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.name {described.name}: open_clip cannot build it ({type(error).__name__}: {reason})"
        ) from error
