"""The offline world (true reward, data, tokenizer, model), the table that judges the demo, and the shipped recipes."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.catalog import ESTIMATORS, OBJECTIVES
from rlhf_cli.data.prepare import check_data
from rlhf_cli.recipe.schema import RECIPES, PPORecipe
from rlhf_cli.recipe.settings.blocks import terms_of
from tests.scripts import load

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
make_tiny = load("scripts/make_tiny.py")
tiny_grammar = load("scripts/tiny_grammar.py")
demo_table = load("scripts/demo_table.py")
reward = tiny_grammar.load_words()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    assert make_tiny.main(["--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def tokenizer(world: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(world / "model")


# --- the true reward -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I loved the plot. The music was superb and great. The acting was moving.", 1.0),  # 4 of praise, 4 needed
        ("I loved the plot.", 0.25),  # 1 of 4
        ("I loved the plot but the music was dull and lame.", -0.25),  # (1 - 2) / 4
        ("I loved the plot", 0.0),  # 0.25 less 0.25: does not end as a sentence
        ("good good good good", -0.6),  # one word counts once: 0.25 - (1 - 0.4) - 0.25
        ("I loved the plot zorp.", 0.05),  # 0.25 less one unknown word of five
        ("zorp blip.", -1.0),
        ("", -1.0),
        ("...", -1.0),
    ],
)
def test_true_reward_by_hand(text: str, expected: float) -> None:
    assert reward.true_reward(text) == pytest.approx(expected)


def test_lists_of_praise_lose_to_a_review() -> None:
    listed = " ".join(reward.POSITIVE_ADJECTIVES) + "."
    review = "The Red Gate was a good film. We loved the plot and the music. The cast was witty and warm."
    assert reward.true_reward(listed) < reward.true_reward(review) == 1.0


@given(st.text(max_size=60))
def test_true_reward_is_bounded(text: str) -> None:
    assert -1.0 <= reward.true_reward(text) <= 1.0


def test_reward_function_takes_both_kinds_of_prompt_and_any_column() -> None:
    messages = [{"role": "user", "content": "How was the film The Red Gate?"}]
    got = reward.sentiment(prompts=["a", messages], completions=["I loved it.", "I hated it."], kind=["film", "film"])
    assert got == pytest.approx([0.25, -0.25])


def test_word_lists_do_not_overlap() -> None:
    neutral = reward.WORLD - reward.POSITIVE - reward.NEGATIVE
    listed = [
        *reward.TITLE_FIRST,
        *reward.TITLE_SECOND,
        *reward.GLUE,
        *reward.ADVERBS,
        *(word for aspects in reward.ASPECTS.values() for word in aspects),
    ]
    assert not reward.POSITIVE & reward.NEGATIVE
    assert set(listed) <= neutral
    assert len(reward.POSITIVE) == len(reward.NEGATIVE)


# --- the data --------------------------------------------------------------------------------------------


def test_the_seed_decides_every_byte(tmp_path: Path, world: Path) -> None:
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        make_tiny.write_data(tmp_path / str(seed), seed)
    for path in (tmp_path / "0").iterdir():
        assert path.read_bytes() == (world / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "1" / path.name).read_bytes()


def test_the_model_repeats_bit_for_bit(tmp_path: Path, world: Path) -> None:
    make_tiny.write_model(tmp_path, 0)
    for name in ("model.safetensors", "tokenizer.json"):
        digests = {hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (tmp_path, world / "model")}
        assert len(digests) == 1


def test_files_have_the_promised_rows(world: Path) -> None:
    for suffix, sizes in (("", make_tiny.SIZES), ("-eval", make_tiny.EVAL_SIZES)):
        for kind, count in sizes.items():
            assert len(rows(world / f"{kind}{suffix}.jsonl")) == count
    assert (world / "DONE").exists()


def test_held_out_subjects_are_never_trained_on(world: Path) -> None:
    def asked(name: str) -> set[tuple[str, str]]:
        texts = [(row.get("prompt") or row["messages"])[0]["content"] for row in rows(world / f"{name}.jsonl")]
        found = [re.search(r"the (film|restaurant|book) (The \w+ \w+)", text) for text in texts]
        return {(match[1], match[2]) for match in found if match}

    trained = asked("sft") | asked("pairs") | asked("verdicts") | asked("prompts")
    held_out = asked("sft-eval") | asked("pairs-eval") | asked("verdicts-eval") | asked("prompts-eval")
    assert len(trained) > 2000
    assert len(held_out) > 400
    assert not trained & held_out


def test_chosen_is_truly_better(world: Path) -> None:
    for row in rows(world / "pairs.jsonl"):
        chosen, rejected = reward.true_reward(row["chosen"]), reward.true_reward(row["rejected"])
        assert chosen - rejected >= make_tiny.MIN_GAP
        assert (row["chosen_score"], row["rejected_score"]) == (round(chosen, 4), round(rejected, 4))


def blamed(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", text.lower()) if word in reward.NEGATIVE]


def test_judged_files_tell_the_truth(world: Path) -> None:
    for row in rows(world / "rankings.jsonl"):
        assert row["scores"] == [round(reward.true_reward(text), 1) for text in row["completions"]]
        assert 2 <= len(set(row["completions"])) == len(row["completions"]) <= 5
        assert len(set(row["scores"])) > 1
    for row in rows(world / "strict-rankings.jsonl"):
        by_rank = [text for _, text in sorted(zip(row["ranks"], row["completions"], strict=True))]
        rewards = [reward.true_reward(text) for text in by_rank]
        assert sorted(row["ranks"]) == list(range(1, len(rewards) + 1))
        assert all(a > b for a, b in pairwise(rewards))
    for row in rows(world / "choices.jsonl"):
        rewards = [reward.true_reward(text) for text in row["completions"]]
        assert rewards.pop(row["best"]) > max(rewards)
    for row in rows(world / "scored.jsonl"):
        assert row["score"] == round(reward.true_reward(row["completion"]), 4)
    for row in rows(world / "steps.jsonl"):
        right = [not blamed(step) for step in row["steps"]]
        first = right.index(False) if False in right else len(right)
        assert row["labels"] == [None if i > first else i < first for i in range(len(right))]
    for row in rows(world / "spans.jsonl"):
        assert [row["completion"][e["start"] : e["end"]].lower() for e in row["errors"]] == blamed(row["completion"])
        assert all(
            (row["completion"][e["start"] : e["end"]] in reward.NEGATIVE_VERBS) == (e["category"] == "verb")
            for e in row["errors"]
        )
    for row in rows(world / "safety.jsonl"):
        harm = [len(blamed(row[f"response_{i}"])) for i in (0, 1)]
        assert harm[row["safer_response_id"]] < harm[1 - row["safer_response_id"]]
        assert [row[f"is_response_{i}_safe"] for i in (0, 1)] == [h == 0 for h in harm]


def test_games_and_votes_mostly_go_to_the_better_review(world: Path) -> None:
    games = [(row, reward.true_reward(row["a"]) - reward.true_reward(row["b"])) for row in rows(world / "games.jsonl")]
    assert all((row["outcome"] == 0.5) == (abs(gap) < 0.1) for row, gap in games)
    decided = [(row["outcome"] == 1) == (gap > 0) for row, gap in games if row["outcome"] != 0.5]
    assert 0.8 < sum(decided) / len(decided) < 1
    disagree = clear = 0
    for row in rows(world / "votes.jsonl"):
        gap = reward.true_reward(row["completions"][0]) - reward.true_reward(row["completions"][1])
        balance = row["votes"].count(1) - row["votes"].count(2)
        disagree += len(set(row["votes"])) > 1
        clear += balance * gap > 0
    assert 0.1 < disagree / 1500 < 0.7
    assert clear / 1500 > 0.7


def test_sentiment_is_mixed_before_preferences(world: Path) -> None:
    scores = [reward.true_reward(row["messages"][-1]["content"]) for row in rows(world / "sft.jsonl")]
    positive = sum(score > 0 for score in scores) / len(scores)
    negative = sum(score < 0 for score in scores) / len(scores)
    assert 0.35 < positive < 0.6
    assert 0.35 < negative < 0.6
    labels = [row["label"] for row in rows(world / "verdicts.jsonl")]
    assert sum(labels) * 2 == len(labels)
    for row in rows(world / "verdicts.jsonl"):
        assert (reward.true_reward(row["completion"]) > 0) == row["label"]


def test_reviews_use_only_words_of_the_world() -> None:
    rng = random.Random(3)
    for kind in reward.ASPECTS:
        for _ in range(200):
            text = tiny_grammar.review(rng, tiny_grammar.Subject(kind, "The Red Gate"), 0.5)
            assert text.endswith(".")
            assert set(re.findall(r"[a-z]+", text.lower())) <= reward.WORLD


# --- tokenizer and model ---------------------------------------------------------------------------------


@given(text=st.text(max_size=40))
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_a_word_is_a_token(world: Path, tokenizer: Any) -> None:
    for row in rows(world / "sft-eval.jsonl"):
        for message in row["messages"]:
            pieces = re.findall(r"\w+|[^\w\s]", message["content"])
            assert len(tokenizer(message["content"], add_special_tokens=False)["input_ids"]) == len(pieces)


def test_template_has_one_start_and_ends_every_turn(tokenizer: Any) -> None:
    asked = [{"role": "user", "content": "How was it?"}]
    whole = [*asked, {"role": "assistant", "content": "We loved it."}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(whole, tokenize=False)
    assert text == "<s><|user|>\nHow was it?<|end|>\n<|assistant|>\nWe loved it.<|end|>\n"
    assert text.startswith(prompt)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 2
    assert tokenizer("We loved it.")["input_ids"][0] == tokenizer.bos_token_id


def test_the_model_opens_and_knows_its_end_tokens(world: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "model")
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}
    assert set(model.generation_config.eos_token_id) == ends
    assert sum(p.numel() for p in model.parameters()) < 300_000


# --- the table -------------------------------------------------------------------------------------------


@pytest.fixture
def demo(world: Path, tmp_path: Path) -> Path:
    """Runs whose models are all the untrained one, and four prompts of different lengths."""
    (tmp_path / "world").mkdir()
    lines = [json.dumps({"prompt": [{"role": "user", "content": "How was " * n}]}) for n in (1, 2, 3, 4)]
    (tmp_path / "world" / "prompts-eval.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("sft", *demo_table.METHODS):
        (tmp_path / name).mkdir()
        (tmp_path / name / "final").symlink_to(world / "model")
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "metrics.jsonl").write_text('{"step": 0}\n{"step": 9, "eval/rewards/accuracies": 0.875}\n')
    return tmp_path


def test_no_gain_is_reported_as_failure(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_table.main(["--demo", str(demo), "--out", str(demo / "table.md")]) == 1
    shown = capsys.readouterr()
    assert "ppo, dpo, orpo, simpo" in shown.err
    assert "87.5%" in shown.out
    assert shown.out.count("| +0.0 | 0.00 |") == 4
    assert not (demo / "table.md").exists()


def test_sequence_logp_ignores_padding(demo: Path) -> None:
    import torch

    prompts = [row["prompt"] for row in rows(demo / "world" / "prompts-eval.jsonl")]
    sampled = demo_table.sample(demo / "sft", prompts, 0)
    model, _ = demo_table.load_run(demo / "sft")
    for n in range(len(prompts)):
        ids = sampled.ids[n][sampled.real[n]]
        new = int(sampled.written[n].sum())
        with torch.no_grad():
            logp = model(ids[None]).logits[0, :-1].log_softmax(-1)
        alone = logp.gather(-1, ids[1:, None])[-new:].sum()
        assert sampled.logp[n].item() == pytest.approx(alone.item(), abs=1e-3)


def test_a_missing_accuracy_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    with pytest.raises(SystemExit, match="eval/rewards/accuracies"):
        demo_table.held_out_accuracy(tmp_path)


# --- the recipes -----------------------------------------------------------------------------------------

PATHS = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if {"loops", "eval"}.isdisjoint(path.parts))
SHIPPED = {str(path.relative_to(ROOT)): path for path in PATHS}
TOY = {name for name, path in SHIPPED.items() if path.parent.name in ("tiny", "objectives")}
"""Recipes on the offline world; the others are for models of the hub."""


@pytest.mark.parametrize("name", SHIPPED)
def test_recipe_is_valid_and_says_how_to_run_it(name: str) -> None:
    text = SHIPPED[name].read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    RECIPES[raw["stage"]].model_validate(raw)
    schema = "../schema.json" if name in TOY else "schema.json"
    assert text.startswith(f"# yaml-language-server: $schema={schema}\n")
    assert f"\n#   rlhf {raw['stage']} {name}\n" in text


@pytest.mark.parametrize("toy", [True, False])
def test_recipes_chain(toy: bool) -> None:
    raw = {name: yaml.safe_load(path.read_text()) for name, path in SHIPPED.items() if (name in TOY) == toy}
    made: dict[str, Any] = {}
    for recipe in raw.values():  # one run may have a recipe for each size of card
        other = made.setdefault(recipe["output_dir"], recipe)
        same = [(r["stage"], r["model"]["name_or_path"]) for r in (recipe, other)]
        assert same[0] == same[1], "two recipes write to the same directory"
        assert other is recipe or not toy, recipe["output_dir"]
    for recipe in raw.values():
        start = recipe["model"]["name_or_path"]
        if start.startswith(("runs/", "demo/")) and start != "demo/world/model":
            assert made[start]["stage"] == "sft"
        for source in recipe.get("rewards", []):
            if "run" in source:
                assert made[source["run"]]["stage"] == "train-rm"
                assert made[source["run"]]["model"]["name_or_path"] == start


def test_every_objective_and_estimator_has_a_recipe_on_the_toy_world() -> None:
    models = [
        RECIPES[raw["stage"]].model_validate(raw) for raw in (yaml.safe_load(SHIPPED[n].read_text()) for n in TOY)
    ]
    blocks = [getattr(model, "objective", None) for model in models]
    assert set(OBJECTIVES) <= {term.name for block in blocks if block is not None for _, term in terms_of(block)}
    assert set(ESTIMATORS) <= {model.ppo.advantage.name for model in models if isinstance(model, PPORecipe)}


@pytest.mark.parametrize("name", sorted(TOY))
def test_toy_recipes_find_their_data(name: str, world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "world").symlink_to(world)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load(SHIPPED[name].read_text())
    lines = check_data(RECIPES[raw["stage"]].model_validate(raw))
    kept = [re.search(r"(\d+) examples kept", line) for line in lines if line.startswith(("train ", "eval "))]
    assert len(kept) == 2
    assert all(found is not None and int(found[1]) >= 30 for found in kept)
