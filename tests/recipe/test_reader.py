"""Every kind of mistake in a recipe, with the exact words."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rlhf_cli.catalog import objectives_of
from rlhf_cli.errors import RecipeError
from rlhf_cli.recipe.reader import read_recipe
from rlhf_cli.recipe.schema import RECIPES, DPORecipe, PPORecipe
from rlhf_cli.recipe.tree import read_scalar

DPO = """\
stage: dpo
model: runs/sft
data:
  train: pairs.jsonl
objective:
  name: dpo
training:
  learning_rate: 5e-6
output_dir: runs/dpo
"""
PPO = """\
stage: ppo
model: runs/sft
data: {train: prompts.jsonl}
rewards: [{run: runs/rm}, {function: "r.py:f"}]
training: {learning_rate: 1e-5}
output_dir: runs/ppo
"""


def problems(tmp_path: Path, text: str | bytes, *overrides: str, stage: str | None = "dpo") -> list[str]:
    """The problems of a recipe, the path of its file shortened to `r`."""
    file = tmp_path / "r.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        read_recipe(file, overrides, stage)
    assert caught.value.exit_code == 2
    return [str(problem).replace(str(file), "r") for problem in caught.value.problems]


def test_a_good_recipe_is_read(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(DPO)
    recipe = read_recipe(file, [], "dpo")
    assert isinstance(recipe, DPORecipe)
    assert recipe.training.learning_rate == 5e-6
    assert recipe.model.name_or_path == "runs/sft"
    assert recipe.data.train[0].path == "pairs.jsonl"
    assert read_recipe(str(file), [], None) == recipe


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_byte_order_mark_and_windows_lines(tmp_path: Path, end: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + DPO.replace("\n", end).encode())
    assert read_recipe(file, [], "dpo").output_dir == "runs/dpo"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("5E-6", 5e-6),
        (".5", 0.5),
        ("2.", 2.0),
        ("-3", -3),
        ("010", 10),
        ("+7", 7),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("1_000", "1_000"),
        ("on", "on"),
        ("yes", "yes"),
        ("2024-01-01", "2024-01-01"),
        ("0x10", "0x10"),
        ("1e-5x", "1e-5x"),
        ("12:30", "12:30"),
        ("٣", "٣"),
    ],
)
def test_scalars(text: str, value: object) -> None:
    assert read_scalar(text) == value
    assert type(read_scalar(text)) is type(value)


def test_quoted_numbers_stay_text(tmp_path: Path) -> None:
    assert problems(tmp_path, DPO.replace("5e-6", "'5e-6'")) == [
        "r:8:18 training.learning_rate: found the text '5e-6', wanted a number (without quotes it is a number)"
    ]


SETTINGS = [
    ("learning_rate: 1e-5x", "learning_rate: found the text '1e-5x', wanted a number"),
    ("learning_rate: [1]", "learning_rate: found a list, wanted a number"),
    ("learning_rate: 0", "learning_rate: must be above 0, found 0"),
    ("learning_rate:", "learning_rate: found nothing, wanted a number"),
    ("learning_rate: 1\n  batch_size: 2.0", "batch_size: found 2.0, wanted a whole number (write 2)"),
    ("learning_rate: 1\n  batch_size: 1_000", "batch_size: found the text '1_000', wanted a whole number (write 1000)"),
    ("learning_rate: 1\n  warmup_ratio: 2", "warmup_ratio: must be at most 1, found 2"),
    ("learning_rate: 1\n  max_steps: 0", "max_steps: must be at least 1, found 0"),
    ("learning_rate: 1\n  micro_batch_tokens: atuo",
     "micro_batch_tokens: found the text 'atuo', wanted auto or a whole number (did you mean 'auto'?)"),
    ("learning_rate: 1\n  micro_batch_tokens: 4", "micro_batch_tokens: must be at least 8, found 4"),
    ("learning_rate: 1\n  layout: pakced",
     "layout: the text 'pakced' is not one of auto, packed, padded (did you mean 'packed'?)"),
    ("learning_rate: 1\n  optimizer: adamw_torch",
     "optimizer: the text 'adamw_torch' is not one of adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, adafactor, sgd "
     "(here it is adamw)"),
    ("learning_rate: .inf", "learning_rate: .inf is not a finite number"),
    ("learning_rate: 1e999", "learning_rate: 1e999 is too large a number"),
    ("learning_rate: 1e39", "learning_rate: must be at most 1e+15, found 1e39"),
    ("learning_rate: 1\n  max_grad_norm: 1.1e15", "max_grad_norm: must be at most 1e+15, found 1.1e15"),
    ("learning_rate: 1\n  weight_decay: -1e39", "weight_decay: must be at least 0, found -1e39"),
    ("learning_rate: *x", "learning_rate: the alias *x is refused (no includes or interpolation: write it out)"),
    ("learning_rate: !!float 1",
     "learning_rate: the tag !!float is refused (no includes or interpolation: write it out)"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), SETTINGS)
def test_wrong_values(tmp_path: Path, line: str, message: str) -> None:
    found = problems(tmp_path, DPO.replace("learning_rate: 5e-6", line))
    assert [text.split(" training.")[1] for text in found] == [message]
    row = 8 + line.count("\n")
    last = line.rsplit("\n  ", maxsplit=1)[-1]
    column = 3 + (last.index(":") + (2 if " " in last else 1))
    assert found[0].startswith(f"r:{row}:{column} ")


KEYS = [
    ("lora: {rnk: 3}", "lora.rnk: unknown key (known here: r, alpha, dropout, target_modules, use_dora, use_rslora)"),
    ("lora: {alhpa: 3}", "lora.alhpa: unknown key (did you mean 'alpha'?)"),
    ("lora: {rank: 3}", "lora.rank: unknown key (it is called lora.r here)"),
    ("learning_rate: 3", "learning_rate: unknown key (it belongs under training)"),
    ("lerning_rate: 3", "lerning_rate: unknown key (did you mean 'training.learning_rate'?)"),
    ("beta: 0.1", "beta: unknown key (it belongs under objective)"),
    ("critic: {}", "critic: unknown key (it belongs to the command ppo)"),
    ("num_train_epochs: 3", "num_train_epochs: unknown key (it is called training.num_epochs here)"),
    ("kl_coef: 3", "kl_coef: unknown key (it is called ppo.kl.coef here, in the command ppo)"),
    ("evaluation: {stage: 1}", "evaluation.stage: unknown key (it belongs at the top)"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), KEYS)
def test_unknown_keys(tmp_path: Path, line: str, message: str) -> None:
    column = line.index("{") + 2 if "{" in line and not line.startswith("critic") else 1
    assert problems(tmp_path, DPO + line + "\n") == [f"r:10:{column} {message}"]


def test_missing_keys_are_placed_at_the_mapping_that_lacks_them(tmp_path: Path) -> None:
    text = DPO.replace("  learning_rate: 5e-6\n", "  batch_size: 3\n").replace("output_dir: runs/dpo\n", "")
    text = text.replace("  name: dpo\n", "  beta: 0.2\n")
    assert problems(tmp_path, text) == [
        "r:1:1 output_dir: this key is missing",
        "r:5:1 objective.name: this key is missing",
        "r:7:1 training.learning_rate: this key is missing",
    ]


def test_contradictions_are_placed_at_a_key_they_name(tmp_path: Path) -> None:
    text = DPO.replace("5e-6", "5e-6\n  warmup_ratio: 0.1\n  warmup_steps: 3")
    assert problems(tmp_path, text) == [
        "r:9:3 training.warmup_ratio: give warmup_ratio or warmup_steps, not both (see training.warmup_steps on line "
        "10)"
    ]
    assert problems(tmp_path, DPO.replace("runs/sft", "{name_or_path: a, quantization: nf4}")) == [
        "r:2:26 model.quantization: model.quantization is set but lora is null: a quantised base cannot be trained "
        "itself; add `lora: {}` or set `quantization: none`"
    ]


def test_lists_and_their_items(tmp_path: Path) -> None:
    text = DPO.replace("pairs.jsonl", "[]\n  eval: [5, {path: x, weight: -1, columns: {a: 3}}]")
    assert problems(tmp_path, text) == [
        "r:4:10 data.train: the list is empty (give at least one)",
        "r:5:10 data.eval.0: found 5, wanted a mapping",
        "r:5:31 data.eval.1.weight: must be above 0, found -1",
        "r:5:48 data.eval.1.columns.a: found 3, wanted text or a list",
    ]
    text = DPO + "lora: {target_modules: [1]}\nlogging: {report_to: [foo]}\n"
    assert problems(tmp_path, text) == [
        "r:10:25 lora.target_modules.0: found 1, wanted text",
        "r:11:23 logging.report_to.0: the text 'foo' is not one of tensorboard, wandb, trackio",
    ]
    assert problems(tmp_path, PPO.replace("{run: runs/rm}", "{run: a, function: b}"), stage="ppo") == [
        "r:4:12 rewards.0.run: give exactly one of run, function and rule"
    ]


def test_objectives(tmp_path: Path) -> None:
    def named(name: str, extra: str = "") -> list[str]:
        return problems(tmp_path, DPO.replace("name: dpo", f"name: {name}{extra}"))

    assert named("simpo", "\n  gamma: 1") == [
        "r:6:9 objective.name: 'simpo' belongs to the command simpo (run it with `rlhf simpo ...` and `stage: simpo`)"
    ]
    assert named("dppo") == ["r:6:9 objective.name: no objective is called 'dppo' (did you mean 'dpo'?)"]
    assert named("sigmoid") == ["r:6:9 objective.name: no objective is called 'sigmoid' (here it is dpo)"]
    (unknown,) = named("zzz")
    assert unknown.startswith("r:6:9 objective.name: no objective is called 'zzz' (known for dpo: dpo, robust, hinge, ")
    assert all(entry.name in unknown for entry in objectives_of("dpo"))
    assert named("ipo", "\n  beta: -1\n  avrage: true") == [
        "r:7:9 objective.beta: must be above 0, found -1",
        "r:8:3 objective.avrage: unknown key (did you mean 'average'?)",
    ]
    assert problems(tmp_path, DPO.replace("\n  name: dpo", " dpo")) == [
        "r:5:12 objective: found the text 'dpo', wanted a mapping (write `objective: {name: dpo}`)"
    ]
    assert problems(tmp_path, PPO + "ppo: {kl: {name: doublign}, advantage: {name: gea}}\n", stage="ppo") == [
        "r:7:18 ppo.kl.name: the text 'doublign' is not one of fixed, proportional, doubling "
        "(did you mean 'doubling'?)",
        "r:7:47 ppo.advantage.name: the text 'gea' is not one of gae, reinforce, reinforce_pp, rloo, "
        "grpo, dr_grpo, remax (did you mean 'gae'?)",
    ]


def test_stage(tmp_path: Path) -> None:
    wrong = DPO.replace("5e-6", "bad")
    assert problems(tmp_path, wrong, stage="ppo") == [
        "r:1:8 stage: this is a recipe for `rlhf dpo`, not for `rlhf ppo`"
    ]
    assert problems(tmp_path, DPO.replace("stage: dpo\n", "")) == [
        "r:1:1 stage: this key is missing (write `stage: dpo`)"
    ]
    assert problems(tmp_path, DPO.replace("stage: dpo\n", ""), stage=None) == [
        f"r:1:1 stage: this key is missing (write one of {', '.join(RECIPES)})"
    ]
    assert problems(tmp_path, PPO.replace("stage: ppo\n", ""), stage=None) == [
        "r:1:1 stage: this key is missing (write `stage: ppo`)"
    ]
    assert problems(tmp_path, DPO.replace("stage: dpo", "stage: rm"), stage=None) == [
        f"r:1:8 stage: 'rm' is not one of {', '.join(RECIPES)} (here it is train-rm)"
    ]


def test_duplicate_keys_name_both_lines(tmp_path: Path) -> None:
    assert problems(tmp_path, DPO + "stage: dpo\nseed: x\n") == [
        "r:10:1 stage: the key is given twice, first on line 1 (keep one of them)",
        "r:11:7 seed: found the text 'x', wanted a whole number",
    ]


def test_anchors_and_merge_keys_are_refused_with_everything_else(tmp_path: Path) -> None:
    write_out = "is refused (no includes or interpolation: write it out)"
    text = DPO.replace("5e-6", "&a 5e-6\n  <<: {batch_size: *a}\n  batch_size: *a\n  max_steps: 0")
    assert problems(tmp_path, text) == [
        f"r:8:18 training.learning_rate: the anchor &a {write_out}",
        f"r:9:3 training: the merge key << {write_out}",
        f"r:10:15 training.batch_size: the alias *a {write_out}",
        "r:11:14 training.max_steps: must be at least 1, found 0",
    ]


SYNTAX = [
    ("", "r:1:1: the recipe is empty (start with `stage: ...`)"),
    ("# nothing\n", "r:2:1: the recipe is empty (start with `stage: ...`)"),
    ("---\n", "r:2:1: the recipe is empty (it must be `key: value` lines)"),
    ("- a\n", "r:1:1: the recipe is a list (it must be `key: value` lines)"),
    ("dpo\n", "r:1:1: the recipe is 'dpo' (it must be `key: value` lines)"),
    ("a: b: c\n", "r:1:5: a ': ' stands where none can be (quote text that holds ': ', or indent)"),
    ("a:\n\tb: 1\n", "r:2:1: a tab cannot indent a line (use spaces)"),
    ("a: @b\n", "r:1:4: a value cannot start with '@' (put the text in quotes)"),
    ("a: 1\n b: 2\n", "r:2:3: a ': ' stands where none can be (quote text that holds ': ', or indent)"),
    ("a:\n  b: 1\n c: 2\n",
     "r:3:2: this line does not fit the lines above it (check the indentation and the ':' after the key)"),
    ("a: [1,\n2\nb: 3\n",
     "r:3:2: a ',' is missing, or the bracket opened on line 1 is not closed (one to a line helps)"),
    ("a: 'x\nb: 3\n", "r:3:1: the quote opened on line 1 is never closed (add the closing quote)"),
    ('a: "\\q"\n', "r:1:5: this escape is not known in double quotes (use single quotes, or double the \\)"),
    ("a: \x00\n",
     "r:1:4: a control character (U+0000) that no text file should hold (delete it, or save the file as UTF-8 text)"),
    ("{[a]: 1}\n", "r:1:2: a key must be one word (write `key: value`)"),
    ("stage: dpo\n---\nstage: ppo\n",
     "r:2:1: a second document starts here; a recipe is one document (delete the `---`, or make two files)"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), SYNTAX)
def test_syntax(tmp_path: Path, text: str, message: str) -> None:
    found = problems(tmp_path, text, stage=None)
    assert message in found


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    assert problems(tmp_path, b"stage: dpo\na: \xc3\xa9\xff\n") == [
        "r:2:5: byte 0xff is not UTF-8 (save the file as UTF-8)"
    ]
    assert problems(tmp_path, "stage: dpo".encode("utf-16")) == ["r: this file is UTF-16 (save it as UTF-8)"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "dpo.yaml").write_text(DPO)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(DPO)

    def said(path: str) -> str:
        with pytest.raises(RecipeError) as caught:
            read_recipe(path, [], "dpo")
        return str(caught.value).replace(str(tmp_path), "t")

    assert said(f"{tmp_path}/dop.yaml") == "t/dop.yaml: no such recipe (did you mean 't/dpo.yaml'?)"
    assert said(f"{tmp_path}/nope.yaml") == "t/nope.yaml: no such recipe (recipes in that folder: dpo.yaml)"
    assert said(f"{tmp_path}/zz/x") == "t/zz/x: no such recipe (the folder t/zz does not exist)"
    assert said(f"{tmp_path}/run") == "t/run: this is a folder, not a recipe (did you mean t/run/recipe.yaml?)"
    assert "cannot be read" in said("a\0b")


def test_overrides_replace_and_create(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(PPO)
    more = ["rewards.1.weight=2", "lora.r=8", "training.learning_rate = 5e-6", "data.train=a: b#c.jsonl", 'seed=7',
            "ppo.kl={name: doubling, coef: 0.2}", "output_dir='1e5'", "model=[x]"]  # fmt: skip
    with pytest.raises(RecipeError, match="--set model="):
        read_recipe(file, more, "ppo")
    recipe = read_recipe(file, more[:-1], "ppo")
    assert isinstance(recipe, PPORecipe)
    assert [reward.weight for reward in recipe.rewards] == [1.0, 2.0]
    assert recipe.lora is not None
    assert (recipe.lora.r, recipe.training.learning_rate, recipe.seed) == (8, 5e-6, 7)
    assert recipe.data.train[0].path == "a: b#c.jsonl"
    assert recipe.ppo.kl.name == "doubling"
    assert recipe.output_dir == "1e5"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: this is not an override (write key.path=value)"),
        (".seed=1", "--set .seed=1: this is not an override (write key.path=value)"),
        ("seed=-1", "--set seed=-1: must be at least 0, found -1"),
        ("lora={rnk: 1, alpha: 2}",
         "--set lora={rnk: 1, alpha: 2} lora.rnk: unknown key (known here: r, alpha, dropout, target_modules, "
         "use_dora, use_rslora)"),
        ("training.lr=1", "--set training.lr=1: unknown key (it is called training.learning_rate here)"),
        ("output_dir.x=1",
         "--set output_dir.x=1: output_dir is the value 'runs/ppo' and has no key 'x'; set output_dir as a whole"),
        ("rewards.2.run=x", "--set rewards.2.run=x: rewards is a list of 2; write a number from 0 to 1, not '2'"),
        ("rewards.run=x", "--set rewards.run=x: rewards is a list of 2; write a number from 0 to 1, not 'run'"),
        ("seed=[1",
         "--set seed=[1: a ',' is missing, or the bracket opened on line 1 is not closed (one to a line helps)"),
        ("stage=dpo", "--set stage=dpo: this is a recipe for `rlhf dpo`, not for `rlhf ppo`"),
        ("seed=\udc80", "the value is not UTF-8 text"),
        ("a." * 30 + "b=1", "this is not an override"),
    ],
)  # fmt: skip
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    found = problems(tmp_path, PPO, override, stage="ppo")
    assert len(found) == 1
    assert message in found[0]


def test_overrides_reach_into_the_short_form_of_a_model(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(DPO)
    model = read_recipe(file, ["model.dtype=float32"], "dpo").model
    assert (model.name_or_path, model.dtype) == ("runs/sft", "float32")


def test_overrides_that_fail_come_with_the_problems_of_the_file(tmp_path: Path) -> None:
    found = problems(tmp_path, DPO.replace("5e-6", "x"), "nonsense", "seed=x")
    assert [text.split(":")[0] for text in found] == ["r", "--set seed=x", "--set nonsense"]


HOSTILE = {
    "nested lists": "[" * 500_000,
    "nested maps": "{a: " * 200_000,
    "nested dashes": "- " * 400_000,
    "nested keys": "".join(" " * i + "a:\n" for i in range(1000)),
    "many keys": "stage: dpo\n" + "".join(f"key{i}: 1\n" for i in range(19_000)),
    "too many keys": "".join(f"k{i}: 1\n" for i in range(90_000)),
    "long key": "a" * 1_000_000 + ": 1",
    "long unknown key": "stage: dpo\n" + "a" * 900 + ": 1",
    "long number": "stage: dpo\nseed: " + "9" * 1_000_000,
    "long text": "stage: dpo\nseed: " + "x" * 1_000_000,
    "long name": "stage: dpo\nobjective: {name: " + "d" * 1_000_000 + "}",
    "laughs": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 99)),
    "large": "a" * 2_000_000,
    "quote": "a: '" + "\n" * 1_000_000,
    "many aliases": "a: &a 1\nb: [" + "*a, " * 15_000 + "1]",
    "regular expression": "stage: dpo\nseed: " + "1" * 5000 + "_" + "1" * 5000 + "x",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_is_refused_quickly(tmp_path: Path, name: str) -> None:
    start = time.process_time()
    found = problems(tmp_path, HOSTILE[name], stage="dpo")
    assert time.process_time() - start < 1.0
    assert 1 <= len(found) <= 51
    assert all(len(problem) < 1200 for problem in found)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    found = problems(tmp_path, DPO + "".join(f"key{i}: 1\n" for i in range(200)))
    assert len(found) == 51
    assert found[-1] == "and 150 more problems"


def test_a_mix(tmp_path: Path) -> None:
    def mix(*terms: str, stage: str = "dpo") -> list[str]:
        recipe = DPO.replace("name: dpo", f"terms: [{', '.join(terms)}]")
        return problems(tmp_path, recipe.replace("stage: dpo", f"stage: {stage}"), stage=stage)

    (one,) = mix("{name: dpo}")
    assert "objective.terms: the list has 1 of 2 (give at least 2)" in one
    (unknown,) = mix("{name: dpo}", "{name: sfft}")
    assert "objective.terms.1.name: no objective is called 'sfft' (did you mean 'sft'?)" in unknown
    (verdicts,) = mix("{name: dpo}", "{name: kto}")
    assert "objective.terms.1.name: 'kto' works on verdict data: a mix is made of objectives on pairs" in verdicts
    (foreign,) = mix("{name: dpo}", "{name: cpo}")
    assert "objective.terms.1.name: 'cpo' belongs to the command simpo" in foreign
    wrong = mix("{name: dpo, betta: 1.0}", "{name: sft, weight: 0}")
    assert "objective.terms.0.betta: unknown key (did you mean 'beta'?)" in wrong[0]
    assert "objective.terms.1.weight: must be above 0, found 0" in wrong[1]
    both = problems(tmp_path, DPO.replace("name: dpo", "terms: [{name: dpo}, {name: sft}]\n  name: dpo"))
    assert both == ["r:7:9 objective.name: give a name or terms, not both: a mix has no name of its own"]


def test_two_margins_for_one(tmp_path: Path) -> None:
    recipe = DPO.replace("name: dpo", "name: simpo\n  gamma: 1.0\n  gamma_beta_ratio: 0.5")
    (both,) = problems(tmp_path, recipe.replace("stage: dpo", "stage: simpo"), stage="simpo")
    assert "give gamma or gamma_beta_ratio, not both" in both


def test_data_settings_that_nothing_reads(tmp_path: Path) -> None:
    recipe = DPO.replace("stage: dpo", "stage: train-rm").replace("name: dpo", "name: bradley_terry")
    for line, reader in (("ratings: {target: minmax}", "regression"), ("segments: {by: sentence}", "step_labels")):
        (found,) = problems(tmp_path, recipe.replace("data:\n", f"data:\n  {line}\n"), stage="train-rm")
        key = line.partition(":")[0]
        assert found.startswith(f"r:4:3 data.{key}: data.{key} is only read by {reader}")
        assert found.endswith("and objective.name is bradley_terry (see objective.name on line 7)")


def test_what_whitening_may_do(tmp_path: Path) -> None:
    def ppo(block: str) -> list[str]:
        return problems(tmp_path, PPO + f"ppo: {block}\nrollout: {{completions_per_prompt: 2}}\n", stage="ppo")

    (found,) = ppo("{whiten_rewards: true, advantage: {name: rloo}}")
    assert "ppo.whiten_rewards shifts what ppo.advantage rloo compares: use gae, or false" in found
