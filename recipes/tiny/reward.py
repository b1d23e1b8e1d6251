"""The words of the toy world and its true reward.

The world is short reviews of films, restaurants and books. A word list decides what a review thinks of its subject, so
the true reward of any text is known, and a method can be judged by it instead of by the reward model it was trained on.
`scripts/make_tiny.py` writes the world with these words; recipes name `recipes/tiny/reward.py:sentiment`.
"""

from __future__ import annotations

import re
from typing import Any


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


POSITIVE_ADJECTIVES = words("""
good great lovely superb brilliant charming excellent wonderful beautiful clever elegant fine honest memorable moving
perfect pleasant splendid striking stunning thoughtful vivid warm witty
""")
NEGATIVE_ADJECTIVES = words("""
bad awful boring bland clumsy cold confusing dreadful dull empty flat hollow horrible lame lazy messy painful poor
sloppy terrible tedious ugly weak wooden
""")
POSITIVE_VERBS = words("loved enjoyed adored admired praised treasured")
NEGATIVE_VERBS = words("hated disliked regretted despised endured resented")

ASPECTS = {
    "film": words("""
        plot acting music ending story script cast dialogue camera scenery opening humour
        """),
    "restaurant": words("""
        soup bread dessert service menu kitchen salad coffee pasta sauce fish staff
        """),
    "book": words("""
        prose plot ending story chapter hero opening dialogue humour language setting cover
        """),
}
TITLE_FIRST = words("""
silver golden crimson hidden northern southern distant ancient paper winter summer autumn spring midnight morning blue
green white black red seventh second last little old new iron glass wild royal
""")
TITLE_SECOND = words("""
river mountain harbour lantern forest island mirror castle bridge window orchard valley tower station letter voyage
shadow compass ocean meadow village crown anchor feather candle clock gate market road storm
""")
ADVERBS = words("really very quite truly rather so")
LINKS = words("is was felt seemed looked")
DAYS = words("monday tuesday wednesday thursday friday saturday sunday")
PEOPLE = words("brother sister mother father friend friends family neighbour colleague cousin")
MONTHS = words("""
january february march april may june july august september october november december
""")
GLUE = words("""
the a an and but do i we it to of in on at my our with for about after again all also as because both by end evening
from had has here how its just me most much next not now one only or other out over part people place same saw seen some
than that their them then there they this time today too twice two us visit was week went what when which while who
whole will you your year yesterday found review write please give short tell us think your opinion film restaurant
book rate
""")

POSITIVE = frozenset(POSITIVE_ADJECTIVES + POSITIVE_VERBS)
NEGATIVE = frozenset(NEGATIVE_ADJECTIVES + NEGATIVE_VERBS)
WORLD = POSITIVE.union(
    NEGATIVE, *ASPECTS.values(), TITLE_FIRST, TITLE_SECOND, ADVERBS, LINKS, DAYS, PEOPLE, MONTHS, GLUE
)

MATCH = "A {a} or B {b} which one is {principle}"
"""What a judge is asked."""
PRINCIPLES = ("good", "warm", "kind")
"""By what: one of recipes/loops/rlaif/constitution.txt."""

FULL_SCORE_WORDS = 4
"""So many different words of praise, and none of blame, make a full score."""


def true_reward(text: str) -> float:
    """Sentiment of a review in [-1, 1].

    Different words of praise minus different words of blame, over their number (at least FULL_SCORE_WORDS); minus the
    share of words that are not of this world, the share of words of sentiment above 0.4 (a list of praise is no
    review) and 0.25 for a text that does not end as a sentence. A text without a word is -1.
    """
    said = re.findall(r"[^\W\d_]+", text.lower())
    if not said:
        return -1.0
    praise, blame = len(POSITIVE & set(said)), len(NEGATIVE & set(said))
    balance = (praise - blame) / max(praise + blame, FULL_SCORE_WORDS)
    unknown = sum(word not in WORLD for word in said) / len(said)
    density = sum(word in POSITIVE or word in NEGATIVE for word in said) / len(said)
    unfinished = 0.0 if text.rstrip().endswith((".", "!", "?")) else 0.25
    return max(-1.0, min(1.0, balance - unknown - max(0.0, density - 0.4) - unfinished))


def sentiment(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """The reward function of the toy world: one number in [-1, 1] a completion; prompts and columns are not read."""
    return [true_reward(completion) for completion in completions]
