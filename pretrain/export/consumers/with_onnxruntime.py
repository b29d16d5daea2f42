"""ONNX files as onnxruntime runs them on the CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import place
import programs


def main(folder: Path, work: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = place.facts(work)["threads"]

    def load(name: str) -> tuple[programs.Run, dict[str, Any]]:
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        stored = session.get_modelmeta().custom_metadata_map
        names = [put.name for put in session.get_inputs()]

        def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            return list(session.run(None, {name: inputs[name] for name in names}))

        constants = {key: json.loads(value) for key, value in stored.items() if key in KNOWN}
        return run, constants

    programs.main(folder, work, "onnx", load)


KNOWN = ("size", "mean", "std", "interpolation", "resize_mode", "fill_color", "inputs", "outputs")

if __name__ == "__main__":
    place.each(main)
