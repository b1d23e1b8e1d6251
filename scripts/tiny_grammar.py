"""The grammar of the offline demo world: subjects, requests and reviews made of the words in recipes/tiny/reward.py."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

REWARD_FILE = Path(__file__).resolve().parent.parent / "recipes" / "tiny" / "reward.py"
REQUESTS = (
    "Write a review of the {kind} {title}.",
    "Please write a short review of the {kind} {title}.",
    "Tell us about the {kind} {title}.",
    "What do you think of the {kind} {title}?",
    "Give me your opinion of the {kind} {title}.",
    "How was the {kind} {title}?",
)
LEANINGS = (0.05, 0.05, 0.5, 0.95, 0.95)
"""Chance that one opinion in a review is praise; each review draws one of them."""


def load_words(path: Path = REWARD_FILE) -> ModuleType:
    """The module with the word lists and the true reward."""
    spec = importlib.util.spec_from_file_location("tiny_reward", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


W = load_words()


@dataclass(frozen=True)
class Subject:
    """What a review is about."""

    kind: str
    title: str


def article(word: str) -> str:
    """The word with a or an before it."""
    return f"{'an' if word[0] in 'aeiou' or word == 'honest' else 'a'} {word}"


def opinion(rng: random.Random, kind: str, leaning: float) -> str:
    """One sentence with one to three words of sentiment, each praise with chance `leaning`."""

    def adjective() -> str:
        return rng.choice(W.POSITIVE_ADJECTIVES if rng.random() < leaning else W.NEGATIVE_ADJECTIVES)

    def verb() -> str:
        return rng.choice(W.POSITIVE_VERBS if rng.random() < leaning else W.NEGATIVE_VERBS)

    one, two = rng.sample(W.ASPECTS[kind], 2)
    link, adverb, who = rng.choice(W.LINKS), rng.choice(W.ADVERBS), rng.choice(("I", "We"))
    forms = (
        lambda: f"The {one} {link} {adverb} {adjective()}.",
        lambda: f"The {one} {link} {adjective()} and {adjective()}.",
        lambda: f"The {one} {link} {adjective()} but the {two} {link} {adjective()}.",
        lambda: f"{who} {verb()} the {one}.",
        lambda: f"{who} {verb()} the {one} and the {two}.",
        lambda: f"{who} found the {one} {adverb} {adjective()} and {verb()} the {two}.",
        lambda: f"It has {article(adjective())} {one} and {article(adjective())} {two}.",
    )
    return rng.choice(forms)()


def scene(rng: random.Random, subject: Subject) -> str:
    """One sentence without sentiment."""
    person, day, month = rng.choice(W.PEOPLE), rng.choice(W.DAYS).capitalize(), rng.choice(W.MONTHS).capitalize()
    if subject.kind == "restaurant":
        return rng.choice((f"We went to {subject.title} on {day}.", f"I went there in {month} with my {person}."))
    if subject.kind == "film":
        return rng.choice((f"We saw {subject.title} on {day}.", f"I saw it in {month} with my {person}."))
    return rng.choice((f"I had {subject.title} from my {person}.", f"My {person} had it for all of {month}."))


def review(rng: random.Random, subject: Subject, leaning: float) -> str:
    """Two to four sentences about the subject."""
    word = rng.choice(W.POSITIVE_ADJECTIVES if rng.random() < leaning else W.NEGATIVE_ADJECTIVES)
    opening = f"{subject.title} {rng.choice(('is', 'was'))} {article(word)} {subject.kind}."
    sentences = [opening if rng.random() < 0.5 else scene(rng, subject)]
    sentences += [opinion(rng, subject.kind, leaning) for _ in range(rng.randint(1, 3))]
    return " ".join(sentences)


def spoilt(rng: random.Random, text: str) -> str:
    """The text with its end cut off, its words in disorder, or one word said over and over."""
    words = text.split()
    way = rng.randrange(3)
    if way == 0:
        return " ".join(words[: max(2, len(words) // 2)]).rstrip(".,")
    if way == 1:
        return " ".join(rng.sample(words, len(words))).rstrip(".,")
    return " ".join([rng.choice(W.POSITIVE_ADJECTIVES)] * rng.randint(8, 16))


def request(rng: random.Random, subject: Subject) -> list[dict[str, str]]:
    """The conversation up to the assistant's turn."""
    text = rng.choice(REQUESTS).format(kind=subject.kind, title=subject.title)
    return [{"role": "user", "content": text}]


def subjects(rng: random.Random) -> tuple[list[Subject], list[Subject]]:
    """All subjects, split into those of the training files and the held-out fifth."""
    titles = [f"The {a} {b}".title() for a in W.TITLE_FIRST for b in W.TITLE_SECOND]
    everything = [Subject(kind, title) for kind in W.ASPECTS for title in titles]
    rng.shuffle(everything)
    cut = len(everything) // 5
    return everything[cut:], everything[:cut]
