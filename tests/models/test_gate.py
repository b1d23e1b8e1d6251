"""The model gate, through the command line: what is wrong with a model is one line and exit code 4, before training.

`CASES`: what is spoilt, in which recipe, and the whole line that names it. `{m}` stands for the spoilt folder, `{b}`
for the good model, `{o}` for another one, `{d}` for the data, and `*` for words of a library.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlhf_cli.data.template import load_template
from rlhf_cli.models import adapters
from rlhf_cli.models.base import load_base
from rlhf_cli.recipe.settings.model import LoraSettings, ModelSettings
from tests.conftest import TEMPLATE, make_tokenizer, run_cli
from tests.stages import world as w

Spoil = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]
KEY = "model.layers.1.mlp.up_proj.weight"
LORA = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
EVIL = "import pathlib\npathlib.Path(__file__).with_name('was-run').touch()\n"


@dataclass(frozen=True)
class Case:
    """A folder, what is done to it, and the line that refuses it."""

    start: str
    spoil: Spoil
    line: str
    code: int = 4
    stage: str = "sft"
    model: dict[str, Any] = field(default_factory=dict)
    """What the recipe says of the model besides its name."""


# --- ways to spoil ---------------------------------------------------------------------------------------


def _file(folder: Path) -> Path:
    return next(folder / n for n in ("model.safetensors", "adapter_model.safetensors") if (folder / n).exists())


def tensors(change: Callable[[Tensors], Tensors]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = _file(folder)
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
        save_file(change(load_file(path)), path, about)

    return spoil


def with_tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return tensors(lambda t: t | {name: make(t.get(name, torch.zeros(1)))})


def without(part: str) -> Spoil:
    return tensors(lambda t: {k: v for k, v in t.items() if part not in k})


def bytes_(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: _file(folder).write_bytes(change(_file(folder).read_bytes()))


def text(name: str, content: str) -> Spoil:
    return lambda folder: (_inside(folder) / name).write_text(content)


def _inside(folder: Path) -> Path:
    """Where the files of a model lie."""
    return folder / "final" if (folder / "final").is_dir() else folder


def keys(name: str, **changes: Any) -> Spoil:
    """Keys of a JSON file; `...` takes one out."""

    def spoil(folder: Path) -> None:
        path = _inside(folder) / name
        value = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))

    return spoil


def gone(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink() for name in names]


def both(*parts: Spoil) -> Spoil:
    return lambda folder: [part(folder) for part in parts]


def template(old: str, new: str) -> Spoil:
    return text("chat_template.jinja", TEMPLATE.replace(old, new) if old else new)


def pickled(folder: Path) -> None:
    torch.save(load_file(_file(folder)), folder / f"{_file(folder).stem}.bin")
    _file(folder).unlink()


def sharded(folder: Path) -> None:
    whole = load_file(_file(folder))
    _file(folder).unlink()
    names, where = sorted(whole), {}
    for n, part in enumerate((names[:5], names[5:]), start=1):
        file = f"model-0000{n}-of-00002.safetensors"
        save_file({k: whole[k] for k in part}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def larger_tokenizer(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<more>", "<and-more>"])
    tokenizer.save_pretrained(folder)


def far_token(folder: Path) -> None:
    """As many tokens as rows, and one whose id is beyond them."""
    path = _inside(folder) / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["vocab"]["Ġround"] = 999
    path.write_text(json.dumps(state))


WEIGHTS = "{m}/model.safetensors: "
DAMAGED = " (the file is damaged; get it again)"
RESTORE = " (the file is damaged; restore it)"
PART = " (the folder is not complete)"
INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"
MERGE = " (merge it into its base with peft, and start from that)"
REFUSES = "{d}/chat.jsonl:1: the chat template refuses these messages: "
ROWS = "the embedding 303 rows"
MANY = "model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, model.layers.2.mlp.gate_proj.weight"
HALF = "{m}/adapter_model.safetensors: half an adapter: it holds "
HEAD = "{m}: its head base_model.model.score.weight is "
ANOTHER = ", not (1, 32) (train it again, or take another reward model)"
NO_REWARD = (
    "this is a language model (LlamaForCausalLM); a reward model is wanted here (train one with `rlhf train-rm`)"
)
CODE = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
ON = "to go on with another one, name this folder as the model"
TRAINED = (
    "{m}/final: its tokenizer or chat template is not the one it was trained with (restore its tokenizer files and "
    f"chat_template.jinja; {ON})"
)
GIVEN = f"{{m}}/final: model.chat_template is not the chat template this run was trained with (leave it out; {ON})"
CHANGED = "the chat template leaves out or changes what the user says (give another model.chat_template)"


def reward(spoil: Spoil, line: str, code: int = 4) -> Case:
    return Case("reward", spoil, line, code, "ppo")


def head(make: Callable[[torch.Tensor], torch.Tensor], line: str) -> Case:
    return reward(with_tensor(adapters.SCORE, make), line)


def classifier(spoil: Spoil, line: str, code: int = 4) -> Case:
    return Case("classifier", spoil, line, code, "ppo")


def model(spoil: Spoil, line: str, code: int = 4) -> Case:
    return Case("model", spoil, line, code)


def adapter(spoil: Spoil, line: str, code: int = 4) -> Case:
    return Case("adapter", spoil, line, code)


CASES = {
    # weights
    "tensor-missing": model(without(KEY), f"{{m}}: tensors missing: {KEY}"),
    "tensor-extra": model(with_tensor("more", lambda t: torch.ones(2)), "{m}: tensors extra: more"),
    "tensor-nan": model(with_tensor(KEY, lambda t: t * float("nan")),
                        f"{{m}}: tensor {KEY} holds NaN or infinite numbers"),
    "tensor-infinite": model(with_tensor("lm_head.weight", lambda t: t / 0),
                             "{m}: tensor lm_head.weight holds NaN or infinite numbers"),
    "tensor-short": model(with_tensor(KEY, lambda t: t[:3].clone()), f"{{m}}: tensors of the wrong shape: {KEY}"),
    "tensor-int8": model(with_tensor(KEY, lambda t: (t * 9).to(torch.int8)),
                         f"{{m}}: tensor {KEY} is stored as I8, and config.json has no quantization_config to say what "
                         f"its numbers mean (give the model before it was quantised)"),
    "file-empty": model(bytes_(lambda b: b""), f"{WEIGHTS}is no safetensors file, or cut to 0 bytes{DAMAGED}"),
    "file-cut-header": model(bytes_(lambda b: b[:99]), f"{WEIGHTS}is no safetensors file, or cut to 99 bytes{DAMAGED}"),
    "file-cut": model(bytes_(lambda b: b[:-100]), f"{WEIGHTS}has * bytes where its header says *{DAMAGED}"),
    "file-longer": model(bytes_(lambda b: b + b"x"), f"{WEIGHTS}has * bytes where its header says *{DAMAGED}"),
    "file-header-length": model(bytes_(lambda b: b[:5] + b"\1" + b[6:]),
                                f"{WEIGHTS}is no safetensors file, or cut to * bytes{DAMAGED}"),
    "file-header-json": model(bytes_(lambda b: b[:9] + b"}" + b[10:]), f"{WEIGHTS}its header is not valid{DAMAGED}"),
    "pickled": model(pickled, "{m}: has weights only as pickle (model.bin), which can run any code when opened "
                              "(convert them to safetensors)"),
    "pickled-beside-others": model(
        both(pickled, lambda f: save_file({"x": torch.zeros(1)}, f / "other.safetensors")),
        f"{{m}}: holds other.safetensors and neither model.safetensors nor {INDEX}{PART}"),
    "shard-missing": model(both(sharded, gone(SECOND)), f"{{m}}: {INDEX} names {SECOND}, which is not there{PART}"),
    "shard-outside": model(both(sharded, keys(INDEX, weight_map={KEY: "../model/model.safetensors"})),
                           f"{{m}}: {INDEX} names ../model/model.safetensors, which is not there{PART}"),
    "shard-other": model(both(sharded, lambda f: save_file({"x": torch.zeros(1)}, f / SECOND)),
                         f"{{m}}: {INDEX} says that tensor model.layers.0.mlp.up_proj.weight is in {SECOND}, which "
                         f"does not hold it"),
    "index-missing": model(both(sharded, gone(INDEX)),
                           f"{{m}}: holds model-00001-of-00002.safetensors and neither model.safetensors nor "
                           f"{INDEX}{PART}"),
    "index-cut": model(both(sharded, text(INDEX, '{"weight')), f"{{m}}/{INDEX}: is not valid JSON{RESTORE}"),
    "index-empty": model(both(sharded, text(INDEX, "{}")), f"{{m}}/{INDEX}: has no usable weight_map{DAMAGED}"),
    # configuration
    "config-layers": model(keys("config.json", num_hidden_layers=3), f"{{m}}: tensors missing: {MANY} and 6 more"),
    "config-hidden": model(keys("config.json", hidden_size=64), "{m}: tensors of the wrong shape: lm_head.weight, "
                           "model.embed_tokens.weight, model.layers.0.input_layernorm.weight and 18 more"),
    "config-heads": model(keys("config.json", num_attention_heads=5), "{m}: no usable config.json: *multiple*"),
    "config-type": model(keys("config.json", hidden_size="many"), "{m}: no usable config.json: *hidden_size*"),
    "config-activation": model(keys("config.json", hidden_act="swoosh"), "{m}: cannot be loaded: 'swoosh'"),
    "config-missing": model(gone("config.json"), "{m}: holds no config.json and no adapter_config.json (give a model "
                                                 "or a run directory)"),
    "config-quantised": model(keys("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
                              "{m}: cannot be loaded: *"),
    "not-a-causal-model": model(keys("config.json", architectures=["T5Model"], model_type="t5"),
                                "{m}: cannot be loaded: Unrecognized configuration class *"),
    "remote-code": model(both(text("evil.py", EVIL), keys("config.json", model_type="evil", auto_map=CODE)),
                         "{m}: no usable config.json: *contains custom code*"),
    "remote-tokenizer": model(
        both(text("evil.py", EVIL), keys("tokenizer_config.json", tokenizer_class="T",
                                         auto_map={"AutoTokenizer": [None, "evil.T"]})),
        "{m}: no usable tokenizer: *contains custom code*"),
    "context": model(keys("config.json", max_position_embeddings=16),
                     "data.max_length: 48 tokens are asked of a model with a context of 16 (lower it)", 2),
    "generation-cut": model(text("generation_config.json", "{"),
                            "{m}: no usable generation_config.json (correct the file, or remove it)"),
    "generation-end": model(keys("generation_config.json", eos_token_id="x"),
                            "{m}: eos_token_id is 'x', which is no id of a token (correct generation_config.json)"),
    "generation-end-far": model(keys("generation_config.json", eos_token_id=9999),
                                f"{{m}}: generation_config.json has the end token 9999, {ROWS}"),
    # tokenizer and template
    "tokenizer-larger": model(larger_tokenizer, f"{{m}}: the tokenizer has 305 tokens, {ROWS}"),
    "tokenizer-far-id": model(far_token, f"{{m}}: the tokenizer has a token of id 999, {ROWS}"),
    "tokenizer-gone": model(gone("tokenizer.json", "tokenizer_config.json"), "{m}: no usable tokenizer: *"),
    "tokenizer-cut": model(text("tokenizer.json", '{"version"'), "{m}: no usable tokenizer: *"),
    "no-end-token": model(keys("tokenizer_config.json", eos_token=...),
                          "{m}: the tokenizer has no end token, so nothing would ever stop (set eos_token in "
                          "tokenizer_config.json)"),
    "template-missing": model(gone("chat_template.jinja"),
                              "{d}/chat.jsonl:1: the tokenizer has no chat template, and the data are chat messages "
                              "(give model.chat_template, or use prompt/completion text*", 3),
    "template-syntax": model(template("", "{% for m in messages %}{{ m.content }"),
                             "model.chat_template: the chat template is not valid Jinja: unexpected '}'"),
    "template-raises": model(template("", "{{ raise_exception('only kings') }}"), f"{REFUSES}only kings", 3),
    "template-undefined": model(template("", "{% for m in messages %}{{ m.content + nothing.at.all }}{% endfor %}"),
                                f"{REFUSES}'nothing' is undefined", 3),
    "template-type": model(template("", "{% for m in messages %}{{ m.content + 3 }}{% endfor %}"),
                           f"{REFUSES}TypeError: can only concatenate str (not \"int\") to str", 3),
    "template-zero": model(template("", "{% for m in messages %}{{ m.content }}{{ 1 / 0 }}{% endfor %}"),
                           f"{REFUSES}ZeroDivisionError: division by zero", 3),
    "template-bomb": model(template("", "{% for i in range(10 ** 9) %}a{% endfor %}"), f"{REFUSES}OverflowError: *", 3),
    "template-escape": model(template("", "{{ ''.__class__.__mro__ }}"), f"{REFUSES}access to attribute *", 3),
    "template-two-bos": model(template("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"),
                              "{m}: the chat template begins with two <s>, which no model was trained on (take one out "
                              "of the chat template)"),
    "template-without-user": model(template("in messages", "in messages if m['role'] != 'user'"), f"{{m}}: {CHANGED}"),
    "template-upper": model(template("m['content']", "m['content'] | upper"), f"{{m}}: {CHANGED}"),
    "template-reversed": model(template("in messages", "in messages | reverse"),
                               "{d}/chat.jsonl:1: the chat template renders the messages before an answer differently "
                               "once the answer is there, so training would not see what generation sees (give another "
                               "model.chat_template)", 3),
    # adapters
    "adapter-without-b": adapter(without("lora_B"), f"{HALF}{LORA} and not its lora_B{DAMAGED}"),
    "adapter-without-a": adapter(without("lora_A"), f"{HALF}{LORA.replace('_A', '_B')} and not its lora_A{DAMAGED}"),
    "adapter-without-one": adapter(without(LORA), f"{HALF}{LORA.replace('_A', '_B')} and not its lora_A{DAMAGED}"),
    "adapter-empty": adapter(without("lora"), f"{LORA}: the adapter does not fit the base {{b}}: tensor {LORA} on one "
                                              f"side only"),
    "adapter-nan": adapter(with_tensor(LORA, lambda t: t * float("nan")),
                           f"{{m}}/adapter_model.safetensors: tensor {LORA} holds NaN or infinite numbers"),
    "adapter-shape": adapter(with_tensor(LORA, lambda t: t[:, :9].clone()),
                             f"{LORA}: the adapter does not fit the base {{b}}: {LORA} is (8, 9), not (8, 64)"),
    "adapter-cut": adapter(bytes_(lambda b: b[:-20]),
                           f"{{m}}/adapter_model.safetensors: has * bytes where its header says *{DAMAGED}"),
    "adapter-pickled": adapter(pickled, "{m}: has weights only as pickle (adapter_model.bin), which can run any code "
                                        "when opened (convert them to safetensors)"),
    "adapter-kind": adapter(keys("adapter_config.json", peft_type="IA3"),
                            "{m}: an adapter of type IA3; only LoRA is known here"),
    "adapter-whole-modules": adapter(keys("adapter_config.json", modules_to_save=["lm_head"]),
                                     f"{{m}}: the adapter has more than LoRA matrices (modules_to_save lm_head), which "
                                     f"is not known here{MERGE}"),
    "adapter-biases": adapter(keys("adapter_config.json", bias="all"),
                              f"{{m}}: the adapter has more than LoRA matrices (bias: all), which is not known "
                              f"here{MERGE}"),
    "adapter-more-layers": adapter(keys("adapter_config.json", layer_replication=[[0, 2], [0, 2]]),
                                   f"{{m}}: the adapter has more than LoRA matrices (layer_replication), which is not "
                                   f"known here{MERGE}"),
    "adapter-targets": adapter(keys("adapter_config.json", target_modules=["nope"]),
                               "adapter policy: the adapter does not fit the base {b}: *"),
    "adapter-rank": adapter(keys("adapter_config.json", rank_pattern={"up_proj": 2}),
                            "*: the adapter does not fit the base {b}: *up_proj.lora_A.weight is (8, 32), not (2, 32)"),
    "adapter-base-gone": adapter(keys("adapter_config.json", base_model_name_or_path="/nowhere/m"),
                                 "{m}/adapter_config.json base_model_name_or_path: '/nowhere/m' does not exist in the "
                                 "working directory * (run from the folder the adapter was trained in, or put the "
                                 "right path there)"),
    "adapter-of-another-base": adapter(
        keys("adapter_config.json", base_model_name_or_path="{o}"),
        "{m}: its adapter was trained on other base weights than {o} holds now (restore the base, or train the adapter "
        "again)"),
    # runs
    "run-other-template": Case("run", template("{{ bos_token }}", "{{ bos_token }} "), TRAINED),
    "run-other-tokenizer": Case("run", keys("tokenizer_config.json", pad_token="</s>"), TRAINED),
    "run-other-spelling": Case("run", far_token, TRAINED),
    "run-given-template": Case("run", both(), GIVEN, model={"chat_template": TEMPLATE + "."}),
    # reward models
    "head-missing": reward(without("score"), f"{{m}}: the reward adapter has no tensor {adapters.SCORE}"),
    "head-of-two": head(lambda t: t.repeat(2, 1), f"{HEAD}(2, 32){ANOTHER}"),
    "head-of-none": head(lambda t: t[:0], f"{HEAD}(0, 32){ANOTHER}"),
    "head-narrow": head(lambda t: t[:, :16].clone(), f"{HEAD}(1, 16){ANOTHER}"),
    "head-flat": head(lambda t: t[0].clone(), f"{HEAD}(32,){ANOTHER}"),
    "head-nan": head(lambda t: t * float("nan"), f"{{m}}/adapter_model.safetensors: tensor {adapters.SCORE} holds NaN "
                                                 f"or infinite numbers"),
    "head-missing-full": classifier(without("score"), "{m}: tensors missing: score.weight"),
    "head-of-two-full": classifier(
        both(with_tensor("score.weight", lambda t: t.repeat(2, 1)), keys("config.json", id2label={"0": "a", "1": "b"},
                                                                         label2id={"a": 0, "b": 1})),
        "{m}: no `score` layer with one output (a reward model has num_labels 1)"),
    "head-infinite-full": classifier(with_tensor("score.weight", lambda t: t / 0),
                                     "{m}: tensor score.weight holds NaN or infinite numbers"),
    "reward-tokenizer-larger": classifier(larger_tokenizer, f"{{m}}: the tokenizer has 305 tokens, {ROWS}"),
    "reward-context": classifier(keys("config.json", max_position_embeddings=16),
                                 "data.max_length (reward model {m}): 48 tokens are asked of a model with a context of "
                                 "16 (lower it)", 2),
    "reward-without-template": classifier(gone("chat_template.jinja"),
                                          "{d}/prompts.jsonl:1: the reward model {m} cannot read this prompt: the "
                                          "tokenizer has no chat template, and the data are chat messages (give "
                                          "model.chat_template, or use prompt/completion text*", 3),
    "reward-statistics-cut": classifier(text("reward.json", "{"), f"{{m}}/reward.json: is not valid JSON{RESTORE}"),
    "reward-statistics-zero": classifier(text("reward.json", '{"mean": 0.5, "std": 0}'),
                                         "{m}/reward.json: has no usable mean and std: 0.5 and 0 (the file is damaged; "
                                         "restore it, or set normalize: false)"),
    "reward-statistics-words": classifier(text("reward.json", '{"mean": "x", "std": 1}'),
                                          "{m}/reward.json: has no usable mean and std: 'x' and 1 (the file is "
                                          "damaged; restore it, or set normalize: false)"),
    "language-model-as-reward": Case("model", lambda f: None, f"{{m}}: {NO_REWARD}", 4, "ppo"),
    "language-adapter-as-reward": Case("adapter", lambda f: None, f"{{m}}: {NO_REWARD}", 4, "ppo"),
    "reward-model-as-policy": Case("classifier", lambda f: None,
                                   "{m}: this is a reward model (LlamaForSequenceClassification); a language model is "
                                   "wanted here (name the language model it was trained from)"),
}  # fmt: skip


# --- the folders -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Untrained models of each kind, and a few rows of data."""
    folder = tmp_path_factory.mktemp("gate")
    shutil.copytree(tiny_model, folder / "model")
    shutil.copytree(tiny_model, folder / "other")
    with_tensor("model.norm.weight", lambda t: t * 1.5)(folder / "other")
    for kind in ("chat", "prompts"):
        w.write_rows(folder / f"{kind}.jsonl", w.rows(kind, 8, 1))
    settings = ModelSettings(name_or_path=str(folder / "model"))
    base = load_base(str(folder / "model"), settings, trained=False)
    adapters.add_adapter(base, "policy", adapters.lora_config(LoraSettings(r=8)))
    score = torch.nn.Linear(32, 1, bias=False)
    adapters.write_adapter(base, "policy", folder / "adapter")
    adapters.write_adapter(base, "policy", folder / "reward", score)
    (folder / "classifier").mkdir()
    write_classifier(folder / "classifier", score)
    write_run(folder / "run", tiny_model)
    for name in ("adapter", "reward", "classifier"):
        tokens = make_tokenizer()
        tokens.save_pretrained(folder / name)
        (folder / name / "reward.json").write_text('{"mean": 0.0, "std": 1.0}')
    return folder


def write_run(folder: Path, model: Path) -> None:
    """A finished run that left this model."""
    shutil.copytree(model, folder / "final")
    head = {"stage": "sft", "role": "policy", "lineage": {"template": load_template(make_tokenizer()).digest}}
    (folder / "run.json").write_text(json.dumps(head))
    (folder / "DONE").write_text("{}")


def write_classifier(folder: Path, score: torch.nn.Linear) -> None:
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=303, num_labels=1, pad_token_id=0, eos_token_id=2, **size)
    made = AutoModelForSequenceClassification.from_config(config)
    made.score = score
    made.save_pretrained(folder)


def recipe(case: Case, good: Path, spoilt: Path, out: Path) -> dict[str, Any]:
    """The one that reads the spoilt folder."""
    lora: dict[str, Any] = {"lora": {} if case.start == "adapter" else None}
    if case.stage == "ppo":
        more = lora | {"lora": {"r": 8}, "rewards": [{"run": str(spoilt)}], "rollout": {"max_new_tokens": 6}}
        return w.recipe("ppo", good / "model", good, "prompts", out, **more, data={"eval": None})
    return w.recipe("sft", spoilt, good, "chat", out, **lora, data={"eval": None}, model=case.model)


@pytest.mark.parametrize("name", CASES)
def test_a_spoilt_model_is_refused(good: Path, tmp_path: Path, name: str) -> None:
    case, spoilt, out = CASES[name], tmp_path / "spoilt", tmp_path / "out"
    shutil.copytree(good / case.start, spoilt)
    case.spoil(spoilt)
    if (spoilt / "adapter_config.json").exists():
        path = spoilt / "adapter_config.json"
        path.write_text(path.read_text().replace("{o}", str(good / "other")))
    outcome = run_cli(case.stage, w.save(recipe(case, good, spoilt, out), tmp_path / "r.yaml"))
    line = case.line
    for sign, path in {"{m}": spoilt, "{b}": good / "model", "{d}": good, "{o}": good / "other"}.items():
        line = line.replace(sign, str(path))
    pattern = ".*".join(map(re.escape, f"error: {line}".split("*")))
    assert outcome.code == case.code, outcome.err
    assert len(outcome.errors) == 1, outcome.err
    assert re.fullmatch(pattern, outcome.errors[0]), outcome.errors[0]
    assert "Traceback" not in outcome.err
    assert not out.exists()
    assert not (spoilt / "was-run").exists()


PADS = {
    "no-pad": both(keys("tokenizer_config.json", pad_token=...), keys("config.json", pad_token_id=None)),
    "pad-is-eos": both(keys("tokenizer_config.json", pad_token="</s>"), keys("config.json", pad_token_id=2)),
    "pad-ends-turns": keys("tokenizer_config.json", pad_token="<|end|>"),
}


def test_padding_is_never_trained_on(good: Path, tmp_path: Path) -> None:
    """Whatever pads, the numbers are those of a tokenizer with a padding token of its own."""
    losses = {}
    for name, spoil in {"pad": both(), **PADS}.items():
        shutil.copytree(good / "model", tmp_path / name)
        spoil(tmp_path / name)
        more = {"training": {"max_steps": 1, "batch_size": 8, "layout": "padded"}, "data": {"eval": None}}
        made = w.recipe("sft", tmp_path / name, good, "chat", tmp_path / f"{name}-run", **more)
        outcome = run_cli("sft", w.save(made, tmp_path / "r.yaml"))
        assert outcome.code == 0, outcome.err
        losses[name] = w.column(tmp_path / f"{name}-run", "loss") + w.column(tmp_path / f"{name}-run", "grad_norm")
    assert len({str(found) for found in losses.values()}) == 1, losses


def test_an_adapter_knows_its_base_without_its_run(good: Path) -> None:
    settings = ModelSettings(name_or_path=str(good / "model"))
    base = load_base(str(good / "model"), settings, trained=False)
    assert adapters.trained_on(good / "adapter") == base.fingerprint
