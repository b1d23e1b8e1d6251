"""The words of the toy world and its true reward.

The world is short reviews of films, restaurants and books. A word list decides what a review thinks of its subject, so
the true reward of any text is known, and a method can be judged by it instead of by the reward model it was trained on.
`scripts/make_tiny.py` writes the world with these words; recipes name `recipes/tiny/reward.py:sentiment`.
"""

from __future__ import annotations

import re
from typing import Any

POSITIVE_ADJECTIVES = """
good great lovely superb brilliant charming delightful excellent fantastic wonderful beautiful clever elegant fine fresh
gentle graceful honest impressive inspiring joyful lively magical memorable moving perfect pleasant polished rich
satisfying sincere splendid striking stunning tasteful thoughtful touching vivid warm witty
""".split()
NEGATIVE_ADJECTIVES = """
bad awful boring bland clumsy cold confusing dreadful dull empty flat forgettable grim harsh hollow horrible lame lazy
loud mediocre messy painful pointless poor predictable rude shallow sloppy slow sour stale stiff terrible tedious tired
ugly unpleasant weak wooden worthless
""".split()
POSITIVE_VERBS = "loved enjoyed adored admired praised treasured".split()
NEGATIVE_VERBS = "hated disliked regretted despised endured resented".split()

ASPECTS = {
    "film": """
        plot acting music ending story script cast dialogue camera direction pacing scenery opening humour soundtrack
        """.split(),
    "restaurant": """
        soup bread dessert service menu kitchen salad coffee pasta sauce fish cake tea staff garden
        """.split(),
    "book": """
        prose plot ending story chapter hero narrator opening dialogue humour pacing language setting cover mystery
        """.split(),
}
TITLE_FIRST = """
silver golden crimson hidden northern southern distant ancient paper winter summer autumn spring midnight morning blue
green white black red seventh second last little old new iron glass wild royal
""".split()
TITLE_SECOND = """
river mountain harbour lantern forest island mirror castle bridge window orchard valley tower station letter voyage
shadow compass ocean meadow village crown anchor feather candle clock gate market road storm
""".split()
ADVERBS = "really very quite truly rather so".split()
LINKS = "is was felt seemed looked".split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
PEOPLE = "brother sister mother father friend friends family neighbour colleague cousin".split()
MONTHS = """
january february march april june july august september october november december
""".split()
GLUE = """
the a an and but i we it to of in on at my our with for about after again all also as because both by end evening from
had has here how its just me most much next not now one only or other out over part people place same saw seen some than
that their them then there they this time today too twice two us visit was week went what when which while who whole
will you your year yesterday found review write please give short tell us think your opinion film restaurant book rate
""".split()

POSITIVE = frozenset(POSITIVE_ADJECTIVES + POSITIVE_VERBS)
NEGATIVE = frozenset(NEGATIVE_ADJECTIVES + NEGATIVE_VERBS)
WORLD = frozenset(
    [*POSITIVE, *NEGATIVE, *(word for aspects in ASPECTS.values() for word in aspects)]
    + TITLE_FIRST + TITLE_SECOND + ADVERBS + LINKS + DAYS + PEOPLE + MONTHS + GLUE
)  # fmt: skip

FULL_SCORE_WORDS = 4
"""So many different words of praise, and none of blame, make a full score."""


def true_reward(text: str) -> float:
    """Sentiment of a review in [-1, 1].

    Different words of praise minus different words of blame, over their number (at least FULL_SCORE_WORDS); minus the
    share of words that are not of this world, the share of words of sentiment above 0.4 (a list of praise is no
    review) and 0.25 for a text that does not end as a sentence. A text without a word is -1.
    """
    words = re.findall(r"[^\W\d_]+", text.lower())
    if not words:
        return -1.0
    praise, blame = len(POSITIVE & set(words)), len(NEGATIVE & set(words))
    balance = (praise - blame) / max(praise + blame, FULL_SCORE_WORDS)
    unknown = sum(word not in WORLD for word in words) / len(words)
    density = sum(word in POSITIVE or word in NEGATIVE for word in words) / len(words)
    unfinished = 0.0 if text.rstrip().endswith((".", "!", "?")) else 0.25
    return max(-1.0, min(1.0, balance - unknown - max(0.0, density - 0.4) - unfinished))


def sentiment(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """The reward function of the toy world: one number in [-1, 1] a completion; prompts and columns are not read."""
    return [true_reward(completion) for completion in completions]
