"""How a finished model is opened with plain transformers and peft: the code that its card shows. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["policy", "reward", "cost", "process"]


@dataclass(frozen=True)
class Model:
    """What a folder of a finished model holds."""

    path: str
    """Where it lies, as the user names it."""
    kind: Kind
    adapter: bool
    chat: bool = True
    """Whether it has a chat template."""
    end: str = ""
    """The token that ends an assistant's turn, as text."""
    pad: int | None = None
    """Token that pads for a classifier."""
    labels: tuple[str, ...] = ()
    """Of the classes of steps."""
    tokens: tuple[str, str] | None = None
    """Of a process model that answers with two tokens of the vocabulary: right and wrong."""
    quantization: str = "none"
    """Of the base that an adapter was trained on."""
    dtype: str = "bfloat16"
    """In which a quantised base computes."""


def of_folder(folder: Path, path: str, run: dict[str, Any], end: str, pad: int | None) -> Model:
    """A folder that was just written.

    Args:
        folder: where it lies for now.
        path: where it will.
        run: run.json of its run, or as much of it as there is.
        end: as text, the token that ends an assistant's turn.
        pad: token that pads for a classifier.
    """
    statistics, tokens = folder / "reward.json", None
    labels = json.loads(statistics.read_text()).get("classes", []) if statistics.is_file() else []
    recipe = run.get("recipe") or {}
    objective, settings = recipe.get("objective") or {}, recipe.get("model") or {}
    adapter = (folder / "adapter_config.json").is_file()
    if objective.get("name") == "two_token":
        tokens = (str(objective["good"]), str(objective["bad"]))
    return Model(
        path, run.get("role", "policy"), adapter,
        chat=_has_template(folder), end=end, pad=pad, labels=tuple(labels), tokens=tokens,
        quantization=str(settings.get("quantization", "none")) if adapter else "none",
        dtype=str(settings.get("dtype", "auto")).replace("auto", "bfloat16"),
    )  # fmt: skip


def code(model: Model) -> str:
    """Python that opens it and asks it something."""
    if model.kind == "policy":
        return _policy(model)
    if model.tokens is not None:
        return _two_token(model)
    return _classifier(model)


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))


def _text(value: str) -> str:
    """A text as Python spells it, in double quotes."""
    return json.dumps(value, ensure_ascii=False)


def _head(model: Model, task: str, more: str = "") -> str:
    package, kind = ("peft", f"AutoPeftModelFor{task}") if model.adapter else ("transformers", f"AutoModelFor{task}")
    names, quantised = ["AutoTokenizer"], ""
    if model.quantization != "none":
        names.append("BitsAndBytesConfig")
        more += f", dtype=torch.{model.dtype}, quantization_config=quantised"
        quantised = f"quantised = BitsAndBytesConfig({_bits(model)})  # as the adapter was trained\n"
    imports = (
        f"from peft import {kind}\nfrom transformers import {', '.join(names)}"
        if package == "peft"
        else f"from transformers import {', '.join([kind, *names])}"
    )
    return (
        f"import torch\n{imports}\n\npath = {_text(model.path)}\n{quantised}"
        f"model = {kind}.from_pretrained(path{more}).eval()\ntokenizer = AutoTokenizer.from_pretrained(path)\n\n"
    )


def _bits(model: Model) -> str:
    """How models/quantised.py quantises, as arguments."""
    if model.quantization == "int8":
        return "load_in_8bit=True"
    return (
        f'\n    load_in_4bit=True, bnb_4bit_quant_type="{model.quantization}", bnb_4bit_use_double_quant=True,\n'
        f"    bnb_4bit_compute_dtype=torch.{model.dtype},\n"
    )


def _policy(model: Model) -> str:
    asked = (
        'messages = [{"role": "user", "content": "Hello!"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
        if model.chat
        else 'inputs = tokenizer("Hello", return_tensors="pt")\n'
    )
    return (
        _head(model, "CausalLM")
        + asked
        + 'shape = inputs["input_ids"].shape[1]\n'
        + "with torch.no_grad():\n"
        + '    output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], '
        + "max_new_tokens=64)\n"
        + "print(tokenizer.decode(output[0, shape:], skip_special_tokens=True))"
    )


def _asked(model: Model) -> str:
    """A conversation up to the token that ends the last answer, where scores are read."""
    if not model.chat:
        return f'text = "Hello! Hi, how can I help?" + {_text(model.end)}\n'
    cut = f"end = {_text(model.end)}\ntext = text[: text.rindex(end) + len(end)]  # the score is read there\n"
    return (
        'messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi, how can I help?"}]\n'
        "text = tokenizer.apply_chat_template(messages, tokenize=False)\n" + (cut if model.end else "")
    )


_IDS = 'ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]\n'


def _classifier(model: Model) -> str:
    count = len(model.labels) or 1
    more = f", num_labels={count}" if model.adapter else ""
    if model.adapter and model.pad is not None:
        more += f", pad_token_id={model.pad}"
    task = "TokenClassification" if model.labels else "SequenceClassification"
    said = (
        f"    probabilities = model(input_ids=ids).logits[0].softmax(-1)  # a row a token: {', '.join(model.labels)}\n"
        "print(probabilities[-1])  # of the step that ends here"
        if model.labels
        else "    score = model(input_ids=ids).logits[0, 0]\nprint(float(score))"
    )
    return _head(model, task, more) + _asked(model) + _IDS + "with torch.no_grad():\n" + said


def _two_token(model: Model) -> str:
    assert model.tokens is not None
    good, bad = model.tokens
    return (
        _head(model, "CausalLM")
        + 'text = "Two and two are four."  # the steps so far\n'
        + _IDS
        + f"two = [tokenizer.encode(token, add_special_tokens=False)[-1] for token in ({_text(good)}, {_text(bad)})]\n"
        + "with torch.no_grad():\n"
        + "    logits = model(input_ids=ids).logits[0, -1]\n"
        + "print(float(logits[two].softmax(-1)[0]))  # how likely the last step is right"
    )
