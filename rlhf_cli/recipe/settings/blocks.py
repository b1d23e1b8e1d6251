"""Pieces that recipe classes are made of: blocks of the catalogue, short forms, mixes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, create_model, model_validator

from rlhf_cli.catalog import Entry, Positive, Settings

Count = Annotated[int, Field(ge=1)]
LONGEST_NAME = 255
"""Bytes that file systems allow for the name of a file."""


def _can_be_a_name(value: str) -> str:
    if not value.strip():
        raise ValueError("the text is empty")
    if any(len(part.encode()) > LONGEST_NAME for part in value.split("/")):
        raise ValueError(f"a name in it is longer than {LONGEST_NAME} bytes; no file can be called so")
    return value


Name = Annotated[str, AfterValidator(_can_be_a_name)]
"""A file, a folder or a hub id."""


class Contradictions(ValueError):
    """Several things that do not go together."""

    def __init__(self, messages: Sequence[str]) -> None:
        self.messages = list(messages)
        super().__init__("; ".join(messages))


class Checked(Settings):
    """Settings with rules across their keys, all of which are looked at together."""

    def contradictions(self) -> Iterator[str]:
        """What does not go together: sentences that name the keys, first the one to be changed."""
        yield from ()

    def changed(self, *keys: str) -> Iterator[str]:
        """Those of these keys that are not at their default."""
        yield from (k for k in keys if getattr(self, k) != type(self).model_fields[k].get_default())

    def unread(self, keys: Sequence[str], key: str, value: Any) -> Iterator[str]:
        """A sentence for each of `keys` that was changed although nothing reads it: `key` is not `value`."""
        given = getattr(self, key)
        for name in () if given == value else self.changed(*keys):
            yield f"{name} is only read with {key}: {value}, and {key} is {given}"

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        found = list(self.contradictions())
        if found:
            raise Contradictions(found)
        return self


def block(entries: Iterable[Entry], default: str | None = None, *, mix: str | None = None) -> Any:
    """The type of a `{name: ..., settings...}` block that may hold any of these entries; without a name, the default.

    mix: the name of a further member, `{terms: [...]}`: a weighted sum of those entries that work on pairs.
    """
    entries = list(entries)
    members = [Annotated[_named(entry, "block", default), Tag(entry.name)] for entry in entries]
    if mix is not None:
        pairs = [_named(e, "term", weight=(Weight, 1.0)) for e in entries if getattr(e, "data", "") == "comparison"]
        term: Any = Annotated[reduce(or_, pairs), Field(discriminator="name")]
        terms: Any = (Annotated[list[term], Field(min_length=2)], ...)
        whole = create_model(mix, __base__=Settings, __doc__="A weighted sum of objectives.", terms=terms)
        members.append(Annotated[whole, Tag("a mix")])

    def tag(value: Any) -> Any:
        if isinstance(value, dict):
            return "a mix" if mix is not None and "terms" in value else value.get("name", default)
        return getattr(value, "name", "a mix")

    return members[0] if len(members) == 1 else Annotated[reduce(or_, members), Discriminator(tag)]


def _named(entry: Any, kind: str, default: str | None = None, **more: Any) -> Any:
    """The settings of an entry with its name."""
    keys: dict[str, Any] = {"name": (Literal[entry.name], entry.name if entry.name == default else ...), **more}
    bare = {"use_attribute_docstrings": False}  # help is inherited; looking for more would take most of the time
    return create_model(
        f"{entry.name}_{kind}", __base__=entry.settings, __doc__=entry.help, __cls_kwargs__=bare, **keys
    )


Weight = Annotated[Positive, Field(description="Factor of this term in the sum.")]


def terms_of(objective: Any) -> list[tuple[float, Any]]:
    """(weight, block) of each objective of a recipe: one, or those of a mix."""
    terms = getattr(objective, "terms", None)
    return [(1.0, objective)] if terms is None else [(term.weight, term) for term in terms]


def as_mapping(key: str, settings: type[Settings]) -> BeforeValidator:
    """A bare string stands for `{key: string}`."""
    return BeforeValidator(
        lambda value: {key: value} if isinstance(value, str) else value, json_schema_input_type=str | settings
    )


def as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]
