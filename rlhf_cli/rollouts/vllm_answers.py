"""What a vLLM server answers to a request for completions: read strictly, since it is learned from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_cli.errors import ModelError
from rlhf_cli.rollouts.sampling import Completed, Sampling
from rlhf_cli.rollouts.server import Http

PATH = "/v1/completions"
ROUNDING = 1e-3
"""A log-probability may lie above 0 by so much."""


def completions(
    said: Any, http: Http, prompt: np.ndarray, count: int, stops: Sequence[int], sampling: Sampling, vocabulary: int
) -> list[Completed]:
    """The `count` completions of a prompt in the order of their indices. Raises ModelError for anything else."""
    choices = said.get("choices") if isinstance(said, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise http.odd(PATH, "no list of choices")
    if len(choices) != count:
        raise http.odd(PATH, f"{len(choices)} completions of {count}", "")
    by_index = {choice.get("index"): choice for choice in choices}
    if set(by_index) != set(range(count)):
        raise http.odd(PATH, f"completions whose indices are not 0 to {count - 1}", "")
    return [_completion(by_index[i], http, prompt, set(stops), sampling, vocabulary) for i in range(count)]


def of_next(said: Any, http: Http, ids: Sequence[int], tokens: Sequence[int]) -> dict[int, float]:
    """Log-probabilities of these tokens as the next one after `ids`. Raises ModelError for anything else."""
    try:
        (choice,) = said["choices"]
        (given,) = choice["logprobs"]["top_logprobs"]
        found = {token: given.get(f"token_id:{token}") for token in tokens}
        asked = choice.get("prompt_token_ids")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise http.odd(PATH, "no log-probabilities of what comes next") from error
    if asked not in (None, list(ids)):
        raise http.odd(PATH, "the completion of another prompt", "")
    if None in found.values():
        raise http.odd(PATH, "no log-probability of a label", "vLLM 0.27 and newer know logprob_token_ids: update it")
    return {token: _number(x, http) for token, x in found.items()}


def _completion(
    choice: dict[str, Any], http: Http, prompt: np.ndarray, stops: set[int], sampling: Sampling, vocabulary: int
) -> Completed:
    ids, reason = _ids(choice, http, vocabulary), choice.get("finish_reason")
    logp = _logp(choice, http, len(ids))
    if reason not in ("stop", "length"):
        raise http.odd(PATH, f"a completion that ended by {reason!r}", "see the server's own log")
    if choice.get("prompt_token_ids") not in (None, prompt.tolist()):
        raise http.odd(PATH, "the completion of another prompt", "")
    if len(ids) > sampling.max_new_tokens:
        raise http.odd(PATH, f"{len(ids)} tokens of at most {sampling.max_new_tokens}", "")
    length, finished = _end(ids, prompt, stops, sampling, by_text=isinstance(choice.get("stop_reason"), str))
    if not finished and len(ids) < sampling.max_new_tokens:
        raise http.odd(PATH, f"a completion that ended after {len(ids)} of {sampling.max_new_tokens} tokens without "
                       f"a stop of the recipe (stop_reason {choice.get('stop_reason')})",
                       "start it with --generation-config vllm (rlhf serve-rollouts does)")  # fmt: skip
    return Completed(np.array(ids[:length], np.int32), np.array(logp[:length], np.float32), finished)


def _end(ids: list[int], prompt: np.ndarray, stops: set[int], sampling: Sampling, *, by_text: bool) -> tuple[int, bool]:
    """How many tokens belong to the completion, and whether it ended by itself: by the first stop token, or by the
    first token that completes a stop string. by_text: the server ended it by a stop string."""
    text = sampling.stops
    for n in range(1, len(ids) + 1):
        if ids[n - 1] in stops or (text is not None and text.ends(prompt, ids[:n])):
            return n, True
    return len(ids), by_text


def _ids(choice: dict[str, Any], http: Http, vocabulary: int) -> list[int]:
    ids = choice.get("token_ids")
    if ids is None:
        raise http.odd(PATH, "no token_ids", "vLLM 0.27 and newer know return_token_ids: update it")
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise http.odd(PATH, "token_ids that are no list of tokens")
    outside = next((i for i in ids if not 0 <= i < vocabulary), None)
    if outside is not None:
        raise ModelError(f"sampled token {outside}, and the model has {vocabulary}", http.where,
                         "does the server hold the recipe's base?")  # fmt: skip
    return ids


def _logp(choice: dict[str, Any], http: Http, length: int) -> list[float]:
    given = choice.get("logprobs")
    found = given.get("token_logprobs") if isinstance(given, dict) else None
    if not isinstance(found, list):
        raise http.odd(PATH, "no log-probabilities")
    if len(found) != length:
        raise http.odd(PATH, f"{len(found)} log-probabilities of {length} tokens", "")
    return [_number(x, http) for x in found]


def _number(x: Any, http: Http) -> float:
    """A log-probability, checked."""
    if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x) or x > ROUNDING:
        raise http.odd(PATH, f"{x!r} as a log-probability",
                       "start it with --logprobs-mode processed_logprobs (rlhf serve-rollouts does)")  # fmt: skip
    return float(x)
