"""A vLLM server that is gone, late, another one or out of its mind: each is one line with exit code 4."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import ModelError
from rlhf_cli.models.roles import Role
from rlhf_cli.rollouts.generate import sample
from rlhf_cli.rollouts.vllm import serving
from tests.rollouts.served import NEW, PROMPTS, asked, policy, said, settings
from tests.rollouts.stand_in import Refusal, StandIn, late


def fails(stand_in: StandIn, run: Path, role: Role | None = None, count: int = 2, **more: Any) -> str:
    """The one line of a rollout that cannot be."""

    def roll_out() -> None:
        sampling = asked(stand_in, run, **more)
        sample(role or Role("whole", stand_in.base), PROMPTS, count, [6], sampling, 0)

    with pytest.raises(ModelError) as caught:
        roll_out()
    (problem,) = caught.value.problems
    assert caught.value.exit_code == 4
    assert "\n" not in str(problem)
    assert stand_in.address in str(problem)
    return str(problem)


def choice(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    """The first completion of an answer, changed; None takes a key out."""

    def change(answer: dict[str, Any]) -> Any:
        first = answer["choices"][0]
        first |= {k: v for k, v in changes.items() if v is not None}
        for key in [k for k, v in changes.items() if v is None]:
            del first[key]
        return answer

    return change


def ended(tokens: list[int], reason: str = "stop", **more: Any) -> Callable[[dict[str, Any]], Any]:
    return choice(token_ids=tokens, logprobs={"token_logprobs": [-0.5] * len(tokens)}, finish_reason=reason, **more)


def raised(status: int, words: str) -> Callable[[dict[str, Any]], Any]:
    def change(answer: dict[str, Any]) -> Any:
        raise Refusal(status, words)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            raised(500, "EngineCore died"),
            "answered /v1/completions with 500: EngineCore died (see the server's own log)",
        ),
        (lambda a: b"<html>", "answered /v1/completions with something that is no JSON (is this a vLLM server?)"),
        (lambda a: [1], "with no list of choices"),
        (lambda a: {"choices": a["choices"][:1]}, "with 1 completions of 2"),
        (lambda a: {"choices": a["choices"][:1] * 2}, "whose indices are not 0 to 1"),
        (lambda a: None, "broke off while it answered /v1/completions"),
        (choice(token_ids=None), "with no token_ids (vLLM 0.27 and newer know return_token_ids"),
        (choice(token_ids=[]), "token_ids that are no list of tokens"),
        (choice(token_ids=["a"]), "token_ids that are no list of tokens"),
        (ended([5, 100000]), "sampled token 100000, and the model has"),
        (ended([-1]), "sampled token -1"),
        (choice(logprobs=None), "with no log-probabilities"),
        (choice(logprobs={"token_logprobs": [-0.5] * 7}), "7 log-probabilities of"),
        (ended([9] * 7), "7 tokens of at most 6"),
        (ended([9, 9]), "ended after 2 of 6 tokens without a stop of the recipe"),
        (ended([9, 9], "length"), "ended after 2 of 6 tokens without a stop of the recipe"),
        (ended([9, 6], "abort"), "a completion that ended by 'abort'"),
        (choice(prompt_token_ids=[1]), "the completion of another prompt"),
    ],
)
def test_an_answer_that_makes_no_sense_is_one_line(
    stand_in: StandIn, tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    stand_in.change = change
    assert words in fails(stand_in, tmp_path)


@pytest.mark.parametrize("number", [None, 0.5, True, float("nan"), -float("inf"), "-1"])
def test_a_log_probability_must_be_one(stand_in: StandIn, tmp_path: Path, number: Any) -> None:
    def change(answer: dict[str, Any]) -> Any:
        answer["choices"][1]["logprobs"]["token_logprobs"][0] = number
        return answer

    stand_in.change = change
    assert f"{number!r} as a log-probability (start it with --logprobs-mode" in fails(stand_in, tmp_path)


def test_a_completion_may_end_by_what_the_server_took_for_a_stop_string(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.change = ended([9, 9], stop_reason="ee")
    drawn = sample(Role("whole", stand_in.base), PROMPTS[:1], 1, [6], asked(stand_in, tmp_path), 0)
    assert said(drawn) == [([9, 9], True)]


def test_another_server_than_the_recipes(stand_in: StandIn, tmp_path: Path, fresh: Callable[..., StandIn]) -> None:
    stand_in.context = 63
    assert "takes sequences of 63 tokens (max_model_len), and the recipe has 64" in fails(stand_in, tmp_path)
    stand_in.context = 128
    for source in ("someone/model", str(tmp_path)):
        with pytest.raises(ModelError, match=f"holds .*, and the base of the recipe is {source}"):
            serving(settings(stand_in), source, 64, tmp_path)
    os.symlink(stand_in.root, tmp_path / "same")
    assert serving(settings(stand_in), str(tmp_path / "same"), 64, tmp_path) is not None
    stand_in.runtime_lora = False
    role = policy(stand_in)
    assert "with 404: Not Found (it was not started for this; start it: rlhf serve-rollouts" in fails(
        stand_in, tmp_path, role
    )
    assert "/wake_up with 404: Not Found (it was not started for this" in fails(stand_in, tmp_path, sleep=True)
    small = fresh(rank=2)
    line = fails(small, tmp_path, policy(small))
    assert "/v1/load_lora_adapter with 500: LoRA rank 4 is greater than max_lora_rank 2." in line
    assert "was it started for this recipe by rlhf serve-rollouts" in line


def test_log_probabilities_of_another_temperature(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.raw = True
    sample(Role("whole", stand_in.base), PROMPTS, 1, [6], asked(stand_in, tmp_path), 0)  # at 1 they are the same
    sampling = asked(stand_in, tmp_path, replace(NEW, temperature=0.5))
    with pytest.raises(ModelError, match=r"know nothing of rollout.temperature .start it with --logprobs-mode"):
        sample(Role("whole", stand_in.base), PROMPTS, 1, [6], sampling, 0)


def test_one_that_is_late_gone_or_elsewhere(stand_in: StandIn, tmp_path: Path) -> None:
    sampling = asked(stand_in, tmp_path, server_timeout=0.3)
    stand_in.change = late(1.0)
    with pytest.raises(ModelError, match=r"no answer to /v1/completions within 0.3 s .raise rollout.server_timeout"):
        sample(Role("whole", stand_in.base), PROMPTS[:1], 1, [6], sampling, 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ModelError, match=r"no server answers there: Connection refused .start it: rlhf serve-rollouts"):
        serving(settings(stand_in, server=address), stand_in.root, 64, tmp_path)


def test_nobody_is_followed_elsewhere(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a redirection nor a proxy."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    serving(settings(stand_in), stand_in.root, 64, tmp_path)
    listener = socket.create_server(("127.0.0.1", 0))

    def redirect() -> None:
        with listener.accept()[0] as one:
            one.recv(4096)
            one.sendall(f"HTTP/1.1 302 Found\r\nLocation: {stand_in.address}\r\nContent-Length: 0\r\n\r\n".encode())

    thread = threading.Thread(target=redirect)
    thread.start()
    stand_in.calls.clear()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(ModelError, match="answered /v1/models with 302"):
        serving(settings(stand_in, server=address), stand_in.root, 64, tmp_path)
    thread.join()
    listener.close()
    assert stand_in.calls == []
