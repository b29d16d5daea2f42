"""The encoders as programs with plain tensors going in and out, for formats that hold a traced graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pretrain.compat import Towers
from pretrain.errors import UserError
from pretrain.export.base import Asked
from pretrain.model import DualEncoder

_EXAMPLE = 2
"""Rows that are traced: with one, a graph would hold for one."""


@dataclass(frozen=True)
class Graph:
    """A module, and what to call the tensors of its forward; the first axis of each is the batch."""

    module: nn.Module
    inputs: dict[str, Tensor]
    """Examples."""
    outputs: tuple[str, ...]

    def traced(self) -> ExportedProgram:
        """The program, for any number of rows. UserError where the tower's code does not allow that."""
        batch = Dim("batch", min=1)
        shapes = {name: {0: batch} for name in self.inputs}
        with torch.no_grad(), _plain_attention():
            try:
                return torch.export.export(self.module, tuple(self.inputs.values()), dynamic_shapes=shapes)
            except (RuntimeError, ValueError, AssertionError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"torch.export cannot trace this tower for every batch size: {reason}") from error


def graphs(encoder: DualEncoder, asked: Asked) -> dict[str, Graph]:
    """The programs by name: image and text, as asked for."""
    found = {"image": image(encoder, asked.patch_tokens)} if asked.image else {}
    return found | ({"text": text(encoder, asked.embeddings)} if asked.text else {})


def image(encoder: DualEncoder, patch_tokens: bool) -> Graph:
    """pixels [B, 3, H, W] fp32, normalised -> unit-norm features [B, D] fp32, and projected patches [B, N, D] if asked.

    Raises:
        UserError: the image tower has no patches that its projection fits.
    """
    visual = copy.deepcopy(encoder.towers.visual).eval()
    pixels = torch.rand(_EXAMPLE, 3, *encoder.image_spec.size)
    if not patch_tokens:
        return Graph(_Image(visual), {"pixels": pixels}, ("image_features",))
    return Graph(_Patches(visual, _way_of(visual)), {"pixels": pixels}, ("image_features", "patch_tokens"))


def text(encoder: DualEncoder, embeddings: bool) -> Graph:
    """tokens [B, L] int64 -> unit-norm features [B, D] fp32; embeddings [B, L, W] fp32 before them if asked.

    Tokens that come beside their embeddings only say where a text ends.

    Raises:
        UserError: the text tower looks its tokens up where nothing can be given in place of that.
    """
    towers = copy.deepcopy(encoder.towers).eval()
    del towers.visual
    inner = getattr(towers, "text", towers)
    length = getattr(inner, "context_length", 77)
    tokens = torch.arange(_EXAMPLE * length).reshape(_EXAMPLE, length) % 100
    if not embeddings:
        return Graph(_Text(towers), {"tokens": tokens}, ("text_features",))
    if not isinstance(table := getattr(inner, "token_embedding", None), nn.Embedding):
        kind = type(getattr(inner, "transformer", inner)).__name__
        raise UserError(f"--embeddings: the text tower ({kind}) looks up its own tokens; leave it out")
    rows = table(tokens).detach()
    inner.token_embedding = _Given()
    return Graph(_Embedded(towers, inner), {"embeddings": rows, "tokens": tokens}, ("text_features",))


class _Image(nn.Module):
    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.visual(pixels).float(), dim=-1)


class _Patches(nn.Module):
    def __init__(self, visual: Any, way: str) -> None:
        super().__init__()
        self.visual, self._way = visual, way

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if self._way == "trunk":
            tokens = self.visual.trunk.forward_features(pixels)
            pooled = self.visual.head(self.visual.trunk.forward_head(tokens))
            patches = self.visual.head(tokens[:, self.visual.trunk.num_prefix_tokens :])
        else:
            pooled, tokens = self.visual(pixels)
            patches = tokens @ self.visual.proj
        return F.normalize(pooled.float(), dim=-1), patches.float()


class _Text(nn.Module):
    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.towers.encode_text(tokens).float(), dim=-1)


class _Embedded(_Text):
    def __init__(self, towers: Towers, inner: nn.Module) -> None:
        super().__init__(towers)
        self._table: Any = inner.token_embedding

    def forward(self, embeddings: Tensor, tokens: Tensor) -> Tensor:  # type: ignore[override]
        self._table.held.rows = embeddings
        return super().forward(tokens)


class _Held:
    """What a trace does not look into."""

    rows: Tensor


class _Given(nn.Module):
    """Stands where the table of token embeddings was, and gives what came in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.held = _Held()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.held.rows


def _way_of(visual: Any) -> str:
    """How patches are projected: 'proj' by open_clip's own matrix, 'trunk' by the head on a timm model."""
    own = getattr(visual, "proj", None) is not None and hasattr(visual, "output_tokens")
    if own and visual.attn_pool is None and not visual.final_ln_after_pool:
        visual.output_tokens = True
        return "proj"
    trunk = getattr(visual, "trunk", None)
    pool = getattr(trunk, "global_pool", "")
    plain = all(isinstance(getattr(trunk, name, None), nn.Identity) for name in ("fc_norm", "head"))
    if hasattr(trunk, "num_prefix_tokens") and pool in ("token", "avg") and plain:
        return "trunk"
    kind = type(trunk if trunk is not None else visual).__name__
    raise UserError(
        f"--patch-tokens: the image tower ({kind}, pooling {pool or 'by attention'}) has no projection that fits "
        "single patches; leave it out"
    )


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention in operators that every format knows, not torch's fused one for inference."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def constants(encoder: DualEncoder, name: str, each: Graph) -> dict[str, Any]:
    """What a program's user must know, as JSON can hold it."""
    found: dict[str, Any] = {"inputs": [*each.inputs], "outputs": [*each.outputs]}
    if name == "image":
        spec = encoder.image_spec
        known = {"size": [*spec.size], "mean": [*spec.mean], "std": [*spec.std], "interpolation": spec.interpolation}
        return found | known | {"resize_mode": spec.resize_mode, "fill_color": spec.fill_color}
    head = {"logit_scale": encoder.towers.logit_scale, "logit_bias": encoder.towers.logit_bias}
    length = {"context_length": each.inputs["tokens"].shape[1]}
    return found | length | {key: float(value.detach()) for key, value in head.items() if value is not None}


def write_table(encoder: DualEncoder, folder: Path, asked: Asked) -> None:
    """token_embedding.safetensors, 'weight' [vocabulary, W]: what prompts that are learned start from."""
    if asked.embeddings:
        inner: Any = getattr(encoder.towers, "text", encoder.towers)
        save_file({"weight": inner.token_embedding.weight.detach()}, folder / "token_embedding.safetensors")
