"""Cards and licences: what the hub reads, and text of users that is neither YAML, Markdown nor HTML there."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_cli.runs import card, licence
from rlhf_cli.runs.licence import Declared
from rlhf_cli.runs.opening import Model, code

EVIL = 'a|b`<script>alert(1)</script>```\n---\nlicense: mit\n[x](javascript:y) {{ "x" }} \u202e.jsonl'
MODEL = Model("runs/dpo/final", "policy", adapter=True)
RUN: dict[str, Any] = {
    "stage": "dpo", "digest": "d" * 64, "versions": {"torch": "2.13.0", "bitsandbytes": "not installed"},
    "recipe": {"stage": "dpo", "model": {"name_or_path": "runs/sft", "quantization": "nf4"}, "lora": {"r": 8},
               "objective": {"terms": [{"name": "dpo"}, {"name": "sft"}]}},
    "lineage": {"base": {"name": "org/base-1b"}},
    "inputs": {"a.jsonl": "sha256:abc"},
    "ancestry": [{"name": "runs/sft", "stage": "sft", "objective": "cross_entropy", "base": "org/base-1b",
                  "digest": "e" * 64}],
    "base_license": "apache-2.0", "base_language": ["en"], "license": None,
    "data_licenses": {"a.jsonl": None, "org/pairs": "cc-by-4.0"}, "hub_data": ["org/pairs"],
}  # fmt: skip
REPORT = {"sources": [{"path": "a.jsonl", "split": "train", "rows": 1234, "kept": 1200}]}
METRICS = {"loss": 0.5, "eval/loss": 0.25, "rewards/margins": "NaN", "tokens_per_second": 9.0, "epoch": 1.0,
           "eval/rollout/seconds": 3.0}  # fmt: skip


def made(run: dict[str, Any] = RUN, path: str = "runs/dpo", report: Any = REPORT) -> tuple[dict[str, Any], str]:
    """Front matter and body, as the hub takes them apart."""
    text = card.of_run(path, run, MODEL, "stage: dpo\nseed: 42\n", report, METRICS)
    match = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1]), match[2]


def test_what_a_card_says() -> None:
    front, body = made()
    assert front == {
        "base_model": "org/base-1b", "base_model_relation": "adapter", "library_name": "peft",
        "pipeline_tag": "text-generation", "tags": ["rlhf", "dpo", "lora"], "license": "apache-2.0",
        "language": ["en"], "datasets": ["org/pairs"],
    }  # fmt: skip
    for words in (
        "# dpo\n", "objective `dpo + sft`, on `org/base-1b`: a LoRA adapter of rank 8 over nf4 weights.",
        "1. base: `org/base-1b`", "2. `runs/sft`: `rlhf sft`, `cross_entropy`, digest `eeeeeeeeeeee`",
        "3. **`runs/dpo`**: `rlhf dpo`, `dpo + sft`, digest `dddddddddddd`",
        "| `a.jsonl` | train | 1,234 | 1,200 | `sha256:abc` |", "| `loss` | 0.5 |", "| `eval/loss` | 0.25 |",
        "This model: not declared; it is derived from its base.", "Its base: `apache-2.0`.",
        "Data `a.jsonl`: not declared.", "Data `org/pairs`: `cc-by-4.0`.", "| torch | `2.13.0` |",
        "```yaml\nstage: dpo\nseed: 42\n```", 'path = "runs/dpo/final"',
    ):  # fmt: skip
        assert words in body, words
    for words in ("margins", "second", "epoch", "bitsandbytes"):
        assert words not in body.partition("## Recipe")[0], words


@pytest.mark.parametrize(
    ("own", "base", "front", "words"),
    [
        ("mit", "apache-2.0", {"license": "mit"}, "This model: `mit`."),
        ("My Own 1.0", None, {"license": "other", "license_name": "My Own 1.0"}, "This model: `My Own 1.0`."),
        (None, None, {}, "This model: not declared.\n- Its base: not declared."),
    ],
)
def test_licences(own: str | None, base: str | None, front: dict[str, str], words: str) -> None:
    found, body = made(RUN | {"license": own, "base_license": base})
    assert {k: v for k, v in found.items() if k.startswith("license")} == front
    assert words in body


def test_a_local_base_is_not_named_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base-1b").mkdir(parents=True)
    front, body = made(RUN | {"hub_data": []})
    assert not {"base_model", "base_model_relation", "datasets"} & set(front)
    assert "The adapter looks for its base at `org/base-1b`" in body


class Tags(HTMLParser):
    """What a browser would take for HTML once Markdown has taken the code out."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)


def without_code(text: str) -> str:
    """Markdown without its code: fences first, then spans by the length of their backticks."""
    text = re.sub(r"^(`{3,})[^\n`]*\n.*?^\1[ ]*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", text)


def test_hostile_names_are_text() -> None:
    run = RUN | {
        "lineage": {"base": {"name": EVIL}}, "license": EVIL, "base_language": [EVIL], "hub_data": [EVIL],
        "data_licenses": {EVIL: EVIL}, "inputs": {EVIL: EVIL}, "versions": {"torch": EVIL},
        "ancestry": [RUN["ancestry"][0] | {"name": EVIL, "base": EVIL}],
    }  # fmt: skip
    source = {"path": EVIL, "split": "train", "rows": 1, "kept": 1}
    text = card.of_run(f"runs/{EVIL}", run, MODEL, f"model: {EVIL}\n", {"sources": [source]}, METRICS)
    ended = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    assert ended is not None
    front = yaml.safe_load(ended[1])
    assert front["license"] == "other"
    assert front["license_name"] == EVIL
    assert front["language"] == [EVIL]
    rest = without_code(ended[2])
    assert set(Tags(rest).found) == {"details", "summary"}
    assert "](" not in rest.replace("\\]\\(", "")
    rows = [line for line in ended[2].splitlines() if line.startswith("| ") and "train" in line]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [6]
    assert "\u202e" not in rest


def test_quoting() -> None:
    assert card.quoted("a`b") == "``a`b``"
    assert card.quoted("`") == "`` ` ``"
    assert card.quoted("a\nb\u2028c") == "`a b c`"
    assert card.escaped("run_1 (new)") == "run\\_1 \\(new\\)"
    assert card.escaped("plain run, 2.0") == "plain run, 2.0"
    assert card.fenced("````\nx", "yaml").startswith("`````yaml\n")


@pytest.mark.parametrize("model", [
    Model('runs/"x\\final', "policy", adapter=True), Model("m", "policy", adapter=False, chat=False),
    Model("m", "reward", adapter=True, end="<|end|>", pad=3), Model("m", "cost", adapter=False, chat=False, end="</s>"),
    Model("m", "process", adapter=True, end="x", labels=("wrong", "right")),
    Model("m", "process", adapter=False, tokens=("+", "-")),
])  # fmt: skip
def test_the_code_is_python(model: Model) -> None:
    names = compile(code(model), "card", "exec").co_consts
    assert model.path in names


# --- what is declared ------------------------------------------------------------------------------------

APACHE = "                                 Apache License\n                           Version 2.0, January 2004\n"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"README.md": "---\nlicense: apache-2.0\nlanguage: en\n---\n# x"}, Declared("apache-2.0", ("en",))),
        (
            {"README.md": "---\r\nlicense: other\r\nlicense_name: my-own\r\nlanguage:\r\n- en\r\n- de\r\n---\r\n"},
            Declared("my-own", ("en", "de")),
        ),
        ({"README.md": "---\nlicense: [mit]\n---\n", "LICENSE": APACHE}, Declared("mit")),
        ({"README.md": "# no front matter", "LICENSE": APACHE}, Declared("apache-2.0")),
        ({"LICENSE.txt": "Permission is hereby granted,\nfree of charge, to any person"}, Declared("mit")),
        ({"COPYING": "all mine"}, Declared("other")),
        ({"README.md": "---\nlicense: [[\n---\n"}, Declared()),
        ({"README.md": "---\n- a list\n---\n"}, Declared()),
        ({"README.md": "---\nlicense: 3\nlanguage: {a: b}\n---\n"}, Declared()),
        ({"README.md": "---\nlicense: !!python/object/apply:os.system ['true']\n---\n"}, Declared()),
        ({"README.md": "\xff\xfe---"}, Declared()),
        ({"LICENSE": "  \n"}, Declared()),
        ({}, Declared()),
    ],
)
def test_declared(tmp_path: Path, files: dict[str, str], found: Declared) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    assert licence.of_folder(tmp_path) == found
    assert licence.of(str(tmp_path), "model") == found


def test_the_hub_is_asked_once_and_may_be_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def download(name: str, file: str, repo_type: str, revision: str | None, etag_timeout: float) -> str:
        asked.append((name, repo_type, revision))
        if name == "org/gone":
            raise OSError("no network")
        (tmp_path / file).write_text("---\nlicense: cc0-1.0\n---\n")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert licence.of("org/pairs", "dataset") == Declared("cc0-1.0")
    assert licence.of("org/gone", "model", "v1") == Declared()
    assert asked == [("org/pairs", "dataset", None), ("org/gone", "model", "v1")]
    assert licence.of("./nowhere/at all", "dataset") == Declared()
    assert licence.of("a\0b", "dataset") == Declared()
    assert len(asked) == 2
