"""The catalogue: every name loads, function and settings agree, recipes and checks use it, its page is fresh."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from rlhf_cli.catalog import (
    CONTROLLERS,
    ESTIMATORS,
    NEEDS,
    OBJECTIVES,
    REWARDS,
    STAGES,
    Data,
    Entry,
    Estimator,
    Head,
    Need,
    Objective,
    Settings,
    look_up,
    objectives_of,
)
from rlhf_cli.catalog.explain import COLUMNS, DATA, HEADS, docstring, explain
from rlhf_cli.catalog.preference import SimPO
from rlhf_cli.data.formats import FORMATS
from rlhf_cli.errors import RecipeError
from rlhf_cli.recipe.reader import read_recipe
from rlhf_cli.recipe.schema import RECIPES
from tests.objectives.test_objectives import CHECKED

ROOT = Path(__file__).parents[1]
TABLES: dict[str, dict[str, Any]] = {
    "objective": OBJECTIVES, "estimator": ESTIMATORS, "controller": CONTROLLERS, "rule": REWARDS, "stage": STAGES
}  # fmt: skip
ENTRIES = [entry for table in TABLES.values() for entry in table.values()]
WITH_CHECKS = [*OBJECTIVES.values(), *ESTIMATORS.values(), *CONTROLLERS.values()]
WITH_SETTINGS = [*WITH_CHECKS, *REWARDS.values()]
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
SOURCE = re.compile(r"arXiv:\d{4}\.\d{4,5}|\b(19|20)\d\d\b")
every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
every_setting = pytest.mark.parametrize("entry", WITH_SETTINGS, ids=lambda entry: entry.name)


def named(parameters: Any) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters."""
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


@every_entry
def test_it_loads(entry: Entry) -> None:
    loaded = entry.load()
    assert callable(loaded)
    assert loaded.__name__ == entry.path.split(":")[1]
    assert entry.help
    assert "\n" not in entry.help
    assert not entry.help.endswith(".")


@pytest.mark.parametrize("kind", TABLES)
def test_keys_are_names(kind: str) -> None:
    assert all(key == entry.name for key, entry in TABLES[kind].items())


def test_names_are_unique() -> None:
    names = [entry.name for entry in WITH_SETTINGS]
    assert len(set(names)) == len(names)
    assert len({entry.path for entry in WITH_SETTINGS}) == len(names)


@every_setting
def test_parameters_are_the_settings(entry: Any) -> None:
    parameters = named(inspect.signature(entry.load()).parameters)
    assert set(parameters) == set(entry.settings.model_fields)


@every_setting
def test_defaults_stand_in_one_place(entry: Any) -> None:
    for name, parameter in inspect.signature(entry.load()).parameters.items():
        assert parameter.default is inspect.Parameter.empty, f"{name} has a default of its own"
        assert parameter.kind is not inspect.Parameter.VAR_KEYWORD


@every_setting
def test_defaults_pass_their_own_bounds(entry: Any) -> None:
    values = entry.settings().model_dump()
    assert entry.settings.model_validate(values).model_dump() == values
    with pytest.raises(ValidationError):
        entry.settings.model_validate(values | {"bta": 1.0})


@every_setting
def test_numbers_that_are_none_are_refused(entry: Any) -> None:
    for name, value in entry.settings().model_dump().items():
        wrong: list[Any] = ["x", []] if isinstance(value, str | bool) else [math.nan, math.inf, -math.inf, "1", True]
        if entry.settings.model_fields[name].annotation is str:
            wrong = [1, True, []]
        for one in wrong:
            with pytest.raises(ValidationError):
                entry.settings.model_validate({name: one})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dpo", {"beta": 0.0}),
        ("dpo", {"label_smoothing": 0.5}),
        ("dpo", {"label_smoothing": -0.1}),
        ("ipo", {"beta": -1.0}),
        ("kto", {"desirable_weight": 0.0}),
        ("kto", {"undesirable_weight": -1.0}),
        ("odpo", {"alpha": -0.1}),
        ("odpo", {"offset": "exp"}),
        ("orpo", {"beta": 0.0}),
        ("simpo", {"sft_weight": -1.0}),
        ("simpo", {"gamma": 0.5, "gamma_beta_ratio": 0.25}),
        ("simpo", {"gamma": 0.0, "gamma_beta_ratio": 0.0}),
        ("cross_entropy", {"label_smoothing": 1.0}),
        ("bradley_terry", {"centring": -0.01}),
        ("gae", {"gamma": 1.1}),
        ("gae", {"lam": -0.1}),
        ("fixed", {"coef": -0.1}),
        ("proportional", {"horizon": 0.0}),
        ("doubling", {"coef": 0.0}),
        ("robust", {"label_smoothing": 0.5}),
        ("exo", {"label_smoothing": 0.0}),
        ("f_dpo", {"divergence": "alpha", "alpha": 1.0}),
        ("ld_dpo", {"alpha": 1.1}),
        ("hinge", {"beta": 0.0}),
        ("sft", {"beta": 0.1}),
        ("slic", {"delta": 0.0}),
        ("alphapo", {"gamma_beta_ratio": -0.1}),
        ("rrhf", {"sft_reduction": "mean"}),
        ("stable_alignment", {"rating_scale": 0.0}),
        ("k_wise", {"centring": -1.0}),
        ("regression", {"delta": 0.0}),
        ("two_token", {"good": 1}),
        ("cost", {"l2": -0.1}),
        ("gae", {"length_adaptive": 0.0}),
        ("gae", {"lam_critic": 1.1}),
        ("grpo", {"epsilon": 0.0}),
        ("rloo", {"gamma": 1.0}),
        ("reinforce", {"credit": "all"}),
    ],
)
def test_out_of_bounds(name: str, settings: dict[str, Any]) -> None:
    block = {entry.name: entry.settings for entry in WITH_SETTINGS}[name]
    with pytest.raises(ValidationError):
        block.model_validate(settings)


def test_one_margin_is_enough() -> None:
    assert SimPO.model_validate({"gamma": 0.5}).gamma_beta_ratio is None
    assert SimPO.model_validate({"gamma_beta_ratio": 0.5}).gamma is None
    with pytest.raises(ValidationError, match="gamma or gamma_beta_ratio, not both"):
        SimPO(gamma=0.5, gamma_beta_ratio=0.25)


def test_settings_are_strict_and_frozen() -> None:
    for entry in WITH_SETTINGS:
        assert issubclass(entry.settings, Settings)
        config = entry.settings.model_config
        assert config["extra"] == "forbid"
        assert config["strict"]
        assert config["frozen"]


@every_setting
def test_every_setting_is_explained(entry: Any) -> None:
    for name, field in entry.settings.model_fields.items():
        assert field.description, name
        assert field.description.rstrip().endswith("."), name
        assert not field.is_required(), name


@every_setting
def test_the_docstring_has_its_parts(entry: Any) -> None:
    found = explain(entry)
    assert SOURCE.search(found.source), f"no paper or year in the source of {entry.path}"
    assert all((found.formula, found.symbols, found.step_0, found.traps))
    assert inspect.getdoc(entry.load()) == docstring(entry)
    for symbol in found.symbols:
        name, _, meaning = symbol.partition(": ")
        assert name, symbol
        assert meaning, symbol


def test_every_kind_and_need_has_its_words() -> None:
    assert list(DATA) == list(get_args(Data))
    assert list(NEEDS) == list(get_args(Need))
    assert list(HEADS) == list(get_args(Head))
    read = {column for form in FORMATS.values() for column in form.reads}
    assert {word for words in COLUMNS.values() for word in re.findall(r"\w+_\w+|target", words)} <= read


def test_estimators_share_one_signature() -> None:
    for entry in ESTIMATORS.values():
        assert isinstance(entry, Estimator)
        parameters = inspect.signature(entry.load()).parameters
        given = [n for n in parameters if n not in named(parameters)]
        assert given == ["rewards", "values", "mask", "group", "greedy"]


PASSED = ("reference", "scores", "safety", "kl_point", "running")
"""Needs that an objective is given as an argument of that name."""


@pytest.mark.parametrize("entry", OBJECTIVES.values(), ids=lambda entry: entry.name)
def test_objectives_ask_for_what_they_declare(entry: Objective) -> None:
    parameters = set(inspect.signature(entry.load()).parameters)
    passed = {*PASSED, "target"} if entry.data == "comparison" else {*PASSED}  # ratings are targets anyway
    assert parameters & passed == set(entry.needs) & passed
    assert not parameters & (set(get_args(Need)) - {*PASSED, "target"}), "these come with the data"
    assert len(set(entry.needs)) == len(entry.needs)


def test_a_head_is_for_reward_models() -> None:
    for entry in OBJECTIVES.values():
        assert (entry.head is not None) == (entry.stage == "train-rm"), entry.name


def test_estimators_say_how_many_completions_they_need() -> None:
    assert {e.name for e in ESTIMATORS.values() if e.critic} == {"gae"}
    assert {e.name for e in ESTIMATORS.values() if e.greedy} == {"remax"}
    assert {e.name: e.group for e in ESTIMATORS.values() if e.group != 1} == {"rloo": 2, "grpo": 2, "dr_grpo": 2}


def test_stages_and_objectives_belong_together() -> None:
    assert {entry.stage for entry in OBJECTIVES.values()} <= set(STAGES)
    assert set(RECIPES) == set(STAGES)
    for stage in STAGES.values():
        assert RECIPES[stage.name].__name__ == stage.recipe
        assert [o.name for o in objectives_of(stage.name)] == [
            o.name for o in OBJECTIVES.values() if o.stage == stage.name
        ]


def _blocks(node: Any) -> list[str]:
    """Every `name` of a catalogued block inside a recipe."""
    if isinstance(node, BaseModel):
        own = getattr(node, "name", None)
        found = [own] if isinstance(node, Settings) and own in {e.name for e in WITH_SETTINGS} else []
        return found + [name for key in type(node).model_fields for name in _blocks(getattr(node, key))]
    return [name for item in node for name in _blocks(item)] if isinstance(node, list) else []


def test_recipes_use_every_objective() -> None:
    used = {name for file in FILES for name in _blocks(read_recipe(file, [], None))}
    assert set(OBJECTIVES) | set(ESTIMATORS) <= used
    written = {(yaml.safe_load(file.read_text(encoding="utf-8")).get("objective") or {}).get("name") for file in FILES}
    assert {"dpo", "ipo", "kto", "odpo"} <= written, "the dpo command has no default: recipes must name it"


def test_a_check_holds_every_entry() -> None:
    names = [check.__name__.removeprefix("check_") for _, checks in CHECKED for check in checks]
    for entry in WITH_CHECKS:
        assert any(name == entry.name or name.startswith(f"{entry.name}_") for name in names), entry.name


@pytest.mark.parametrize("kind", TABLES)
def test_look_up(kind: str) -> None:
    table = TABLES[kind]
    first = next(iter(table))
    assert look_up(kind, table, first) is table[first]
    with pytest.raises(RecipeError) as caught:
        look_up(kind, table, f"{first}x")
    assert first in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        look_up(kind, table, "@@@@")
    assert all(name in str(caught.value) for name in table)


def test_the_page_is_fresh() -> None:
    file = ROOT / "scripts" / "make_docs.py"
    spec = importlib.util.spec_from_file_location("make_docs", file)
    assert spec is not None
    assert spec.loader is not None
    make_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_docs)
    text = make_docs.page()
    assert make_docs.PAGE.read_text(encoding="utf-8") == text, "run: python scripts/make_docs.py"
    for entry in WITH_SETTINGS:
        assert text.count(f"### {entry.name}\n") == 1
        for key in entry.settings.model_fields:
            assert f"| `{key}` |" in text
    snippets = [yaml.safe_load(snippet) for snippet in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert len(snippets) == len(WITH_SETTINGS)
    for snippet in snippets:
        recipe = snippet.get("ppo") or snippet.get("rewards", [snippet])[0]
        block = next(recipe[key] for key in ("objective", "advantage", "kl", "rule") if key in recipe)
        settings = {e.name: e.settings for e in WITH_SETTINGS}[block.pop("name")]
        assert settings.model_validate(block) == settings()
