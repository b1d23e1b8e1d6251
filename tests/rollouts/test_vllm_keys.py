"""vLLM servers that want a key, or speak https: the key is told to them alone, and their certificates are checked."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf_cli.errors import ModelError, RecipeError, RlhfError
from rlhf_cli.models.roles import Role
from rlhf_cli.rollouts.generate import sample
from rlhf_cli.rollouts.vllm import serving
from tests.rollouts.served import PROMPTS, asked, policy, said, server_of, settings
from tests.rollouts.stand_in import Refusal, StandIn

KEY = "sk-0123456789abcdef"


def line_of(stand_in: StandIn, run: Path, kind: type[RlhfError] = ModelError, **more: object) -> str:
    """The one line of a server that is not to be had; the key is not in it."""
    with pytest.raises(kind) as caught:
        serving(settings(stand_in, **more), stand_in.root, 64, run)
    (problem,) = caught.value.problems
    assert "\n" not in str(problem)
    assert KEY not in str(problem)
    return str(problem)


def test_the_key_of_a_variable_opens_the_server(
    fresh: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in = fresh()
    open_ = sample(policy(stand_in), PROMPTS, 2, [6], asked(stand_in, tmp_path), 0)
    stand_in.key = KEY
    monkeypatch.setenv("RLHF_TEST_KEY", f"{KEY}\n")
    sampling = asked(stand_in, tmp_path, api_key_env="RLHF_TEST_KEY")
    assert said(sample(policy(stand_in), PROMPTS, 2, [6], sampling, 0)) == said(open_)
    assert KEY not in repr(server_of(sampling))
    assert KEY not in repr(sampling)


def test_a_wrong_key_is_one_line(
    fresh: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in = fresh()
    stand_in.key = "another"
    assert line_of(stand_in, tmp_path).endswith(
        "answered /v1/models with 401: Unauthorized (it wants a key: name the variable that holds it in api_key_env)"
    )
    monkeypatch.setenv("RLHF_TEST_KEY", KEY)
    wrong = {"api_key_env": "RLHF_TEST_KEY"}
    assert line_of(stand_in, tmp_path, **wrong).endswith("with 401: Unauthorized (it wants another key)")
    monkeypatch.setattr(stand_in, "allow", lambda told: (_ for _ in ()).throw(Refusal(403, f"not with {told}")))
    assert "not with Bearer ..." in line_of(stand_in, tmp_path, **wrong)
    monkeypatch.setenv("RLHF_TEST_KEY", f"{KEY} {KEY}\u00e9")
    assert "what RLHF_TEST_KEY holds is no key" in line_of(stand_in, tmp_path, RecipeError, **wrong)
    monkeypatch.delenv("RLHF_TEST_KEY")
    assert line_of(stand_in, tmp_path, RecipeError, **wrong) == (
        "rollout.api_key_env: the environment variable RLHF_TEST_KEY is not set (export RLHF_TEST_KEY=...)"
    )


@pytest.mark.parametrize("written", [KEY, "abc", "A B"])
def test_a_key_in_the_place_of_a_variable_is_refused(written: str, stand_in: StandIn) -> None:
    with pytest.raises(ValueError, match="the key itself never stands here"):
        settings(stand_in, api_key_env=written)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an authority of our own, for 127.0.0.1 alone, with its private key."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("makes a certificate by openssl")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        [program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=stand-in", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out",
         str(path.with_name("public.pem"))], check=True, capture_output=True,
    )  # fmt: skip
    path.write_bytes(path.read_bytes() + path.with_name("public.pem").read_bytes())
    return path


@pytest.fixture
def secret(tiny_model: Path, certificate: Path) -> Iterator[StandIn]:
    """A server that speaks https."""
    made = StandIn(tiny_model, tls=certificate)
    yield made
    made.close()


def test_certificates_are_checked(
    secret: StandIn, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    line = line_of(secret, tmp_path)
    assert "its certificate is refused: self-signed certificate" in line
    assert line.endswith("(name those that you trust in SSL_CERT_FILE)")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("public.pem")))
    assert len(sample(Role("whole", secret.base), PROMPTS, 1, [6], asked(secret, tmp_path), 0)) == len(PROMPTS)
    named = secret.address.replace("127.0.0.1", "localhost")
    if socket.gethostbyname("localhost") == "127.0.0.1":
        assert "its certificate is refused: Hostname mismatch" in line_of(secret, tmp_path, server=named)


def test_https_of_a_server_that_speaks_http(stand_in: StandIn, tmp_path: Path) -> None:
    line = line_of(stand_in, tmp_path, server=stand_in.address.replace("http", "https"))
    assert "speaks no https" in line
    assert line.endswith("(is it http?)")
