"""What a model or a data set says of itself: its licence and its languages, where they are declared. No torch."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

LONGEST = 2**20
"""Bytes of a README or a licence that are read."""
OTHER = "other"
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md", "COPYING")
_TEXTS: tuple[tuple[str, str], ...] = (
    ("apache-2.0", r"Apache License\s+Version 2\.0"),
    ("agpl-3.0", r"GNU AFFERO GENERAL PUBLIC LICENSE\s+Version 3"),
    ("lgpl-3.0", r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 3"),
    ("gpl-3.0", r"GNU GENERAL PUBLIC LICENSE\s+Version 3"),
    ("gpl-2.0", r"GNU GENERAL PUBLIC LICENSE\s+Version 2"),
    ("mpl-2.0", r"Mozilla Public License Version 2\.0"),
    ("bsd-3-clause", r"Redistribution and use in source and binary forms[\s\S]*Neither the name"),
    ("bsd-2-clause", r"Redistribution and use in source and binary forms"),
    ("mit", r"Permission is hereby granted, free of charge, to any person"),
    ("llama3.3", r"LLAMA 3\.3 COMMUNITY LICENSE"),
    ("llama3.2", r"LLAMA 3\.2 COMMUNITY LICENSE"),
    ("llama3.1", r"LLAMA 3\.1 COMMUNITY LICENSE"),
    ("llama3", r"META LLAMA 3 COMMUNITY LICENSE"),
    ("llama2", r"LLAMA 2 COMMUNITY LICENSE"),
    ("cc0-1.0", r"CC0 1\.0 Universal"),
    ("cc-by-sa-4.0", r"Attribution-ShareAlike 4\.0 International"),
    ("cc-by-nc-4.0", r"Attribution-NonCommercial 4\.0 International"),
    ("cc-by-4.0", r"Attribution 4\.0 International"),
    ("unlicense", r"This is free and unencumbered software released into the public domain"),
)
"""Words by which a licence's own text is known, the narrower ones first."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WAIT = 5.0
"""Seconds for a hub that does not answer."""


class Declared(NamedTuple):
    """What is declared; None and () where nothing is."""

    license: str | None = None
    language: tuple[str, ...] = ()


def is_hub_id(name: str) -> bool:
    """Whether a model or a data set of that name lies on the hub: it has its form, and nothing of that name is here."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).expanduser().exists()


def of_folder(folder: Path) -> Declared:
    """By the front matter of its README, else by the text of its licence. Nothing that cannot be read counts."""
    found = front_matter(_read(folder / "README.md"))
    if found.license is None:
        text = next(filter(None, (_read(folder / name) for name in _FILES)), "")
        found = found._replace(license=known(text))
    return found


def of_hub(name: str, kind: str, revision: str | None = None) -> Declared:
    """By the card of a model or a dataset (`kind`) on the hub, or of its copy in the cache."""
    with suppress(Exception):  # an absent card, no network, a private repository: nothing is known
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(name, "README.md", repo_type=kind, revision=revision, etag_timeout=_WAIT)
        return front_matter(_read(Path(path)))
    return Declared()


def of(name: str, kind: str, revision: str | None = None) -> Declared:
    """Of a folder, a file (which declares nothing) or a hub id."""
    path = Path(name).expanduser()
    with suppress(OSError, ValueError):
        if path.exists():
            return of_folder(path) if path.is_dir() else Declared()
        return of_hub(name, kind, revision) if is_hub_id(name) else Declared()
    return Declared()


def front_matter(text: str) -> Declared:
    """The YAML between the first two lines of three dashes of a card."""
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if match is None:
        return Declared()
    try:
        block = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return Declared()
    if not isinstance(block, dict):
        return Declared()
    licenses = _words(block.get("license"))
    name = _words(block.get("license_name"))
    chosen = name[0] if licenses[:1] == [OTHER] and name else licenses[0] if licenses else None
    return Declared(chosen, tuple(_words(block.get("language"))))


def known(text: str) -> str | None:
    """The name of a licence by its text; `other` for one that is not known; None for an empty text."""
    if not text.strip():
        return None
    plain = " ".join(text.split())
    return next((name for name, words in _TEXTS if re.search(words, plain, re.IGNORECASE)), OTHER)


def _words(value: Any) -> list[str]:
    """One text, or a list of texts."""
    found = value if isinstance(value, list) else [value]
    return [word.strip() for word in found if isinstance(word, str) and word.strip()]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(LONGEST).decode("utf-8", errors="replace")
    except OSError:
        return ""
