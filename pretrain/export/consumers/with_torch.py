"""Programs of torch.export as torch alone runs them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import place
import programs
import torch


def main(folder: Path, work: Path) -> None:
    torch.set_num_threads(place.facts(work)["threads"])

    def load(name: str) -> tuple[programs.Run, dict[str, Any]]:
        extra = {"constants.json": ""}
        program = torch.export.load(folder / f"{name}.pt2", extra_files=extra).module()
        constants = json.loads(extra["constants.json"])

        @torch.inference_mode()
        def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            found = program(*(torch.from_numpy(inputs[name]) for name in constants["inputs"]))
            return [value.numpy() for value in (found if isinstance(found, tuple) else (found,))]

        return run, constants

    programs.main(folder, work, "pt2", load)


if __name__ == "__main__":
    place.each(main)
