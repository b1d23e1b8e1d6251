"""What is wrong with a model's files and its template, told before any weights are read, and with what was read.

Only the headers of safetensors files are looked at: that they are whole, that index and files agree, that an adapter
has both matrices of every layer, that nothing is stored in a way that needs scales nobody has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2.exceptions import TemplateError

from rlhf_cli.data.examples import Message
from rlhf_cli.data.rendering import render
from rlhf_cli.data.template import Template
from rlhf_cli.errors import DataError, ModelError
from rlhf_cli.recipe.model_path import ModelPath, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf_cli.models.base import Base, Text

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
LONGEST_HEADER = 100_000_000
"""Bytes; the limit that safetensors itself has."""
PLAIN = {"F64", "F32", "F16", "BF16"}
"""Types in which a matrix can be stored as it is."""
DAMAGED = "the file is damaged; get it again"
UNKNOWN_PARTS = ("layer_replication", "trainable_token_indices", "target_parameters")
"""Parts of a peft configuration by which an adapter is more than its LoRA matrices."""


# --- files -----------------------------------------------------------------------------------------------


def check_files(folder: Path) -> None:
    """Look at the weight files of a model or adapter folder. Raises ModelError with the file or tensor named."""
    if (folder / "adapter_config.json").is_file():
        if (folder / ADAPTER).is_file():
            _check_adapter(folder)
        return
    if (folder / SINGLE).is_file():
        tensors = header(folder / SINGLE)
    elif (folder / INDEX).is_file():
        tensors = _sharded(folder)
    else:
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        raise ModelError(
            f"holds {found[0]} and neither {SINGLE} nor {INDEX}", str(folder), "the folder is not complete"
        )
    if "quantization_config" not in read_json(folder / "config.json"):
        odd = sorted(k for k, v in tensors.items() if k.endswith(".weight") and v["dtype"] not in PLAIN)
        if odd:
            raise ModelError(
                f"tensor {odd[0]} is stored as {tensors[odd[0]]['dtype']}, and config.json has no quantization_config "
                f"to say what its numbers mean", str(folder), "give the model before it was quantised",
            )  # fmt: skip


def header(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape, data_offsets} of a safetensors file. Raises ModelError when it is damaged or cut."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, LONGEST_HEADER):
                raise ModelError(f"is no safetensors file, or cut to {size} bytes", str(path), DAMAGED)
            found = json.loads(file.read(length))
        tensors = {name: entry for name, entry in found.items() if name != "__metadata__"}
        wanted = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", str(path)) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ModelError("its header is not valid", str(path), DAMAGED) from error
    if size != wanted:
        raise ModelError(f"has {size} bytes where its header says {wanted}", str(path), DAMAGED)
    return tensors


def _sharded(folder: Path) -> dict[str, dict[str, Any]]:
    """The tensors of all files that the index names."""
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise ModelError("has no usable weight_map", str(folder / INDEX), DAMAGED)
    tensors: dict[str, dict[str, Any]] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{INDEX} names {name}, which is not there", str(folder), "the folder is not complete")
        held = header(folder / name)
        lost = sorted(key for key, file in where.items() if file == name and key not in held)
        if lost:
            raise ModelError(f"{INDEX} says that tensor {lost[0]} is in {name}, which does not hold it", str(folder))
        tensors |= held
    return tensors


def _check_adapter(folder: Path) -> None:
    """Both matrices of every layer, and nothing beside LoRA matrices that would be left out in silence."""
    names = header(folder / ADAPTER).keys()
    for name in sorted(names):
        one, other = ("lora_A", "lora_B") if "lora_A" in name else ("lora_B", "lora_A")
        if one in name and name.replace(one, other) not in names:
            raise ModelError(
                f"half an adapter: it holds {name} and not its {other}", str(folder / ADAPTER), DAMAGED
            )  # fmt: skip
    settings = read_json(folder / "adapter_config.json")
    kept = set(settings.get("modules_to_save") or ()) - {"score"}
    odd = [f"modules_to_save {', '.join(sorted(map(str, kept)))}"] if kept else []
    odd += [f"bias: {settings['bias']}"] if settings.get("bias", "none") != "none" else []
    odd += [key for key in UNKNOWN_PARTS if settings.get(key)]
    if odd:
        raise ModelError(
            f"the adapter has more than LoRA matrices ({odd[0]}), which is not known here", str(folder),
            "merge it into its base with peft, and start from that",
        )  # fmt: skip


def check_tensors(model: PreTrainedModel, info: dict[str, Any], source: str) -> None:
    """ModelError for tensors that are missing, extra, of another shape or not finite; info: what the loader said."""
    for key, word in (
        ("missing_keys", "missing"),
        ("mismatched_keys", "of the wrong shape"),
        ("unexpected_keys", "extra"),
    ):
        names = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info.get(key) or ())
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(f"tensors {word}: {', '.join(names[:3])}{more}", source)
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"tensor {name} holds NaN or infinite numbers", source)


# --- tokenizer and template ------------------------------------------------------------------------------


def check_template(template: Template, where: str) -> None:
    """ModelError when the chat template begins with two BOS tokens, or does not write what the user says.

    A template that refuses this plain dialogue is left to the rows, which name it.
    """
    if template.chat is None:
        return
    said = (Message("user", "what is asked here"), Message("assistant", "what is said there"))
    try:
        text = render(template.tokenizer, template.chat, said, False)
        if said[0].content not in text:
            raise ModelError(
                "the chat template leaves out or changes what the user says", where, "give another model.chat_template"
            )  # fmt: skip
        ids = template.conversation(said)[0]
    except (TemplateError, DataError):
        return
    bos = template.tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise ModelError(
            f"the chat template begins with two {template.tokenizer.bos_token}, which no model was trained on", where,
            "take one out of the chat template",
        )  # fmt: skip


def check_same_template(template: Template, path: ModelPath, given: bool) -> None:
    """ModelError when a run was trained with another tokenizer or chat template than this. given: by the recipe, not
    by the run."""
    known = (path.run or {}).get("lineage", {}).get("template")
    if not known or known == template.digest:
        return
    if given:
        message, remedy = "model.chat_template is not the chat template this run was trained with", "leave it out"
    else:
        message = "its tokenizer or chat template is not the one it was trained with"
        remedy = "restore its tokenizer files and chat_template.jinja"
    raise ModelError(message, str(path.weights), f"{remedy}; to go on with another one, name this folder as the model")


def end_ids(settings: Mapping[str, Any], where: str) -> list[int]:
    """The end tokens of generation settings. Raises ModelError when they are no ids."""
    ends = settings.get("eos_token_id")
    found = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(isinstance(end, int) and not isinstance(end, bool) and end >= 0 for end in found):
        raise ModelError(
            f"eos_token_id is {ends!r}, which is no id of a token", where, "correct generation_config.json"
        )
    return [int(end) for end in found]


def check_vocabulary(base: Base, text: Text) -> None:
    """ModelError when the tokenizer, or an end token of the generation settings, goes beyond the embedding."""
    rows = int(base.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    if len(text.tokenizer) > rows:
        raise ModelError(f"the tokenizer has {len(text.tokenizer)} tokens, the embedding {rows} rows", base.source)
    _within(rows, text.tokenizer.get_vocab().values(), "the tokenizer has a token of id {}", base.source)
    _within(rows, text.template.stop_ids, "generation_config.json has the end token {}", base.source)


def _within(rows: int, ids: Iterable[int], words: str, where: str) -> None:
    if (last := max(ids, default=0)) >= rows:
        raise ModelError(f"{words.format(last)}, the embedding {rows} rows", where)
