"""Features that were computed once: a file for each set of them, found by what they were computed from."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.world import World


class Cache:
    """Tensors in a folder that ranks share; without a folder everything is computed."""

    def __init__(self, folder: Path | None, identity: str, world: World) -> None:
        """
        Args:
            identity: of the encoder, its preprocessing and its tokenizer.
        """
        self._folder, self._identity, self._world = folder, identity, world

    def tensor(self, name: str, of: Sequence[object], make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, on the CPU, or has given for the same inputs. Collective, as `make` may be.

        Args:
            name: beginning of the file's name.
            of: everything that the tensor depends on beside the encoder.

        Raises:
            UserError: a file there is damaged, or none can be written.
        """
        if self._folder is None:
            return make()
        digest = xxhash.xxh3_128_hexdigest(repr((self._identity, *of)).encode())
        path = self._folder / f"{name}_{digest}.safetensors"
        (missing,) = self._world.any(not path.is_file())
        if not missing:
            with self._world.together(f"reading {path}"):
                return _read(path)
        made = make()
        with self._world.together(f"writing {path}"):
            if self._world.is_main:
                _write(path, made)
        return made


def identity_of(towers: nn.Module, *further: object) -> str:
    """Hash of all weights, and of what else features depend on."""
    digest = xxhash.xxh3_128(repr(further).encode())
    for name, tensor in sorted(towers.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path) -> Tensor:
    try:
        return load_file(path)["features"]
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}): remove it") from None


def _write(path: Path, tensor: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"features": tensor.contiguous()}, aside)
    os.replace(aside, path)
