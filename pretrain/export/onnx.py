"""ONNX: image.onnx and text.onnx, any batch size, in fp32, fp16 or int8; onnxruntime and most accelerators take them.

Preprocessing constants and names are metadata of each file, as JSON. fp16 and int8 models still take and give fp32.
fp16 leaves norms in fp32. int8 holds the weights of matrix products in blocks of 8-bit numbers and quantises inputs
row by row as they come, so features do not depend on the rest of a batch; convolutions and tables stay fp32. Only
onnxruntime has the operator for that, MatMulNBits.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pretrain.export import graph, vocabulary
from pretrain.export.base import Asked, Limit, Trained

CONSUMER, OPTIONS = "with_onnxruntime", frozenset({"patch_tokens", "embeddings", "precision"})
EXTRA, ROUNDS_CROPS = "onnx", True
OPSET = 23
"""The newest that torch writes, with attention as one operator."""
_BLOCK, _IN_INT8 = 128, 4


def write(trained: Trained, folder: Path, asked: Asked) -> None:
    """Fill a folder with the files and, where it has this form, the tokenizer.

    Raises:
        UserError: a tower lacks what is asked for, its code cannot be traced, or a library is missing.
    """
    for name, each in graph.graphs(trained.encoder, asked).items():
        path = folder / f"{name}.onnx"
        _save(each, path, graph.constants(trained.encoder, name, each) | {"precision": asked.precision})
        if asked.precision != "fp32":
            {"fp16": _halve, "int8": _quantize}[asked.precision](path)
    if asked.text:
        vocabulary.write_json(trained.encoder, folder)
        graph.write_table(trained.encoder, folder, asked)


def limit(asked: Asked) -> Limit:
    return Limit(largest=1e-4) if asked.precision == "fp32" else Limit(largest=1e-4, cosine=0.999)


def _save(each: graph.Graph, path: Path, constants: Mapping[str, Any]) -> None:
    with _quiet():
        options: dict[str, Any] = {"input_names": [*each.inputs], "output_names": [*each.outputs]}
        made = torch.onnx.export(each.traced(), (), dynamo=True, opset_version=OPSET, verbose=False, **options)
    assert made is not None
    made.model.metadata_props.update({key: json.dumps(value) for key, value in constants.items()})
    made.save(path)


def _halve(path: Path) -> None:
    import onnx
    from onnxruntime.transformers import float16

    # onnxruntime 1.32 crashes while it optimises norms in fp16 on a CPU.
    kept = [*float16.DEFAULT_OP_BLOCK_LIST, "LayerNormalization"]
    with _quiet():
        halved = float16.convert_float_to_float16(onnx.load(path), keep_io_types=True, op_block_list=kept)
        onnx.save(halved, path)


def _quantize(path: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with _quiet():
        how: dict[str, Any] = {"bits": 8, "block_size": _BLOCK, "is_symmetric": True, "accuracy_level": _IN_INT8}
        quantizer = MatMulNBitsQuantizer(onnx.load(path), **how)
        quantizer.process()
        quantizer.model.save_model_to_file(str(path), False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter remarks on its own internals."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
