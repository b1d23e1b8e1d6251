"""What the tests of runs share."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cli.recipe.schema import Recipe, SFTRecipe


@dataclass
class Screen:
    """A display that remembers."""

    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def make_model(folder: Path, weights: bytes = b"w" * 100, **config: Any) -> Path:
    """A folder that looks like a model: a valid safetensors header around the given bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"w": {"dtype": "U8", "shape": [len(weights)], "data_offsets": [0, len(weights)]}}).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + weights)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_recipe(root: Path, **training: Any) -> Recipe:
    """An sft recipe over files below `root`."""
    if not (root / "model").exists():
        make_model(root / "model")
    if not (root / "train.jsonl").exists():
        (root / "train.jsonl").write_text('{"text": "a"}\n')
    return SFTRecipe.model_validate(
        {
            "stage": "sft",
            "model": str(root / "model"),
            "data": {"train": str(root / "train.jsonl")},
            "training": {"learning_rate": 1e-3, **training},
            "output_dir": str(root / "runs" / "a"),
        }
    )


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
