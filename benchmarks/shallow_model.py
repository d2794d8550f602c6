"""Copies a model with only its first layers, so that a small machine processes many long prompts in minutes.

A server handles the slots, the cache and the batches of such a model as it does those of the whole one, and only the
time of a token shrinks. What the model writes makes no sense, so this is for measurements that do not look at it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGUFValueType

_BLOCK: Final = re.compile(r"blk\.(\d+)\.")
_MADE_BY_THE_WRITER: Final = {"general.architecture"}


def write_shallow_model(source: Path, target: Path, layers: int) -> None:
    """Writes a copy of a GGUF file that has only the first layers.

    Args:
        source: The file of the whole model.
        target: The file to write.
        layers: The number of layers to keep.
    """
    reader: Any = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer: Any = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        # The writer counts the tensors and the fields itself.
        if name in _MADE_BY_THE_WRITER or name.startswith("GGUF."):
            continue
        value = layers if name == f"{architecture}.block_count" else field.contents()
        item_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type=item_type)
    for tensor in reader.tensors:
        block = _BLOCK.match(tensor.name)
        if block is None or int(block[1]) < layers:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
