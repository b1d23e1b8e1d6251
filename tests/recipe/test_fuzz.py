"""Whatever stands in a recipe or an override: a recipe or a RecipeError, never anything else."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.errors import RecipeError
from rlhf_cli.recipe.reader import read_recipe
from rlhf_cli.recipe.schema import RECIPES

PIECES = st.sampled_from(
    ["stage: dpo\n", "stage: ", "dpo", "ppo", "model:", " x\n", "data", "train", "objective: {name: ", "lora", "1e-5",
     "null", "training:\n", "learning_rate: ", "}", "{", "[", "]", ",", "- ", ": ", "\n", "  ", "\t", "'", '"', "&a ",
     "*a", "!!str ", "<<: ", "? ", "| ", "> ", "#", "---\n", "...\n", "%YAML 1.2\n", "\ufeff", "\x85", "\u2028", "\r",
     "\\", "@"]
)  # fmt: skip


def read(raw: bytes, overrides: list[str], stage: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "r.yaml"
        file.write_bytes(raw)
        problems = []
        try:
            read_recipe(file, overrides, stage)
        except RecipeError as error:
            problems = list(map(str, error.problems)) or [""]
    assert problems == [] or problems[0]
    assert all("\n" not in problem for problem in problems)


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes(raw: bytes) -> None:
    read(raw, [], None)


@given(st.text(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_text(text: str) -> None:
    with suppress(UnicodeEncodeError):
        read(text.encode(), [], None)


@given(st.lists(PIECES, max_size=40), st.sampled_from([None, *RECIPES]))
@settings(max_examples=300, deadline=None)
def test_pieces_of_yaml(pieces: list[str], stage: str | None) -> None:
    read("".join(pieces).encode(), [], stage)


VALUES = st.recursive(
    st.sampled_from(["1", "x", "null", "true", "'1'", "dpo", "ipo", "name", "-1", "2.5", "1e-5"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(
            st.sampled_from(["name", "path", "r", "beta", "run", "str", "ipo", "x"]), inner, max_size=3
        ).map(lambda d: "{" + ", ".join(f"{k}: {v}" for k, v in d.items()) + "}")
    ),
    max_leaves=6,
)
KEYS = sorted({key for model in RECIPES.values() for key in model.model_fields} | {"learning_rate", "x", "lora_rank"})


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8), st.sampled_from(sorted(RECIPES)))
@settings(max_examples=300, deadline=None)
def test_any_values_under_our_keys(values: dict[str, str], stage: str) -> None:
    body = "".join(f"{key}: {value}\n" for key, value in (values | {"stage": stage}).items())
    read(body.encode(), [], stage)


GOOD = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 6), PIECES), min_size=1, max_size=6)


@given(st.sampled_from(GOOD), CHANGES)
@settings(max_examples=250, deadline=None)
def test_good_recipes_with_a_few_bytes_changed(path: Path, changes: list[tuple[float, int, str]]) -> None:
    raw = path.read_bytes()
    for place, length, piece in changes:
        at = int(place * len(raw))
        raw = raw[:at] + piece.encode() + raw[at + length :]
    read(raw, [], None)


@given(
    st.lists(
        st.text(max_size=40)
        | st.builds("{}.{}={}".format, st.sampled_from(KEYS), st.sampled_from(["0", "r", "name", "x"]), VALUES),
        max_size=4,
    )
)
@settings(max_examples=200, deadline=None)
def test_any_overrides(overrides: list[str]) -> None:
    read(b"stage: ppo\nmodel: x\nrewards: [{run: a}]\n", overrides, "ppo")
