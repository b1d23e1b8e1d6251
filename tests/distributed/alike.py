"""What two processes hold of bases in 4 bits, against the same bases whole. Run by torchrun; process 0 prints figures.

torchrun --nproc-per-node 2 -m tests.distributed.alike FOLDER
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes.functional import dequantize_4bit

from rlhf_cli.errors import RlhfError
from rlhf_cli.models import mesh, processes, quantised, sharding
from rlhf_cli.models.base import Base, load_base
from rlhf_cli.recipe.settings.model import ModelSettings
from rlhf_cli.runs.place import place


def load(folder: str, kind: Any, dtype: Any, shard: mesh.Shard) -> Base:
    mesh.ask(shard)
    settings = ModelSettings(name_or_path=folder, quantization=kind, dtype=dtype)
    return load_base(folder, settings, trained=False)


def answers(base: Base) -> torch.Tensor:
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad(), base.autocast():
        return base.model(input_ids=ids, use_cache=False).logits


def compared(folder: str, kind: str, dtype: str) -> dict[str, Any]:
    whole, parts = load(folder, kind, dtype, "none"), load(folder, kind, dtype, "full")
    layers = {name: layer for name, layer in whole.model.named_modules() if hasattr(layer, "quant_storage")}
    same = bool(torch.equal(answers(whole), answers(parts)))
    numbers = [sum(quantised.numbers(p) for p in base.model.parameters()) for base in (whole, parts)]
    held = {name: sharding.held(parts.model.get_submodule(name).weight).numel() for name in layers}
    row = {name: parts.model.get_submodule(name).weight.numel() for name in layers}
    equal = True
    with sharding.gathered(parts):
        for name, layer in layers.items():
            codes, state = quantised.apart(parts.model.get_submodule(name))
            mine, about = layer.weight.data, layer.weight.quant_state
            equal &= torch.equal(codes, mine.view(-1, 1)) and torch.equal(state.absmax, about.absmax)
            equal &= torch.equal(dequantize_4bit(codes, state), dequantize_4bit(mine, about))
    return {"layers": len(layers), "same": same, "equal": equal, "numbers": numbers[0] == numbers[1],
            "share": sum(held.values()) / sum(row.values())}  # fmt: skip


def refused(folder: str, kind: str) -> list[Any]:
    """The exit code and the words."""
    try:
        load(folder, kind, "float32", "full")
    except RlhfError as error:
        return [error.exit_code, str(error)]
    return [0, "accepted"]


def main(*folders: str) -> None:
    processes.start(place(), 60.0)
    found = [compared(f, kind, dtype) for f in folders for kind, dtype in
             (("nf4", "float32"), ("nf4", "bfloat16"), ("fp4", "float32"))]  # fmt: skip
    told = {"found": found, "int8": refused(folders[0], "int8")}
    with patch.object(torch, "__version__", "2.11.0+cu128"):
        told["old"] = refused(folders[0], "nf4")
    if processes.rank() == 0:
        print("FOUND " + json.dumps(told), flush=True)
    processes.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
