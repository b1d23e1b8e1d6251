"""Talking to the one server that a recipe names: JSON over HTTP, by the standard library.

No proxy stands between, and no redirection is followed: nothing but that address is ever asked, or told the key. Of
https servers the certificate is checked, by the system's authorities or those of SSL_CERT_FILE and SSL_CERT_DIR.
Whatever goes wrong is a ModelError of one line.
"""

from __future__ import annotations

import json
import os
import re
import ssl
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPException, HTTPMessage
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request, build_opener

from rlhf_cli.errors import ModelError, Problem, RecipeError
from rlhf_cli.recipe.work import Work

LONGEST = 300
"""Characters of a server's words that are shown."""
NOT_FOUND, FORBIDDEN = 404, (401, 403)
START = "start it: rlhf serve-rollouts RECIPE"
AGAIN = "then the same command goes on from the newest whole checkpoint"


class _Stay(HTTPRedirectHandler):
    """Follows nobody elsewhere: the answer is an error of its own status."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


@cache
def _opener(*authorities: str | None) -> OpenerDirector:
    """For authorities as the environment names them, which OpenSSL reads by itself."""
    return build_opener(ProxyHandler({}), HTTPSHandler(context=ssl.create_default_context()), _Stay)


class Refused(ModelError):
    """The server answered with an error of its own."""

    def __init__(self, status: int, said: str, path: str, where: str, hint: str) -> None:
        self.status, self.said = status, said
        super().__init__(f"answered {path} with {status}{f': {said}' if said else ''}", where, hint)

    @property
    def unknown(self) -> bool:
        """Whether it knows no such path."""
        return self.status == NOT_FOUND and self.said in ("", "Not Found")


def key_of(variable: str | None, where: str) -> str:
    """The key that an environment variable holds; empty without one. Raises RecipeError, in which the key is not."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise RecipeError(f"the environment variable {variable} is not set", where, f"export {variable}=...")
    if re.fullmatch(r"[!-~]+", key) is None:
        raise RecipeError(f"what {variable} holds is no key: white space, or letters that are not ASCII", where)
    return key


def check_keys(recipe: Work) -> None:
    """Whether the environment holds the keys of the servers that a recipe names. Raises one RecipeError."""
    problems: list[Problem] = []
    for block in ("rollout", "judge"):
        try:
            key_of(getattr(getattr(recipe, block, None), "api_key_env", None), f"{block}.api_key_env")
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)


@dataclass(frozen=True)
class Http:
    """A server by its address."""

    address: str
    seconds: float
    """How long an answer may take."""
    key: str = field(default="", repr=False)
    """Is sent to it, and shown nowhere."""
    setting: str = "rollout.server"
    """The setting that names it."""
    start: str = START
    """How one is started."""
    again: str = AGAIN
    """What is to be done then."""

    @property
    def where(self) -> str:
        """How errors name it."""
        return f"{self.setting} {self.address}"

    def get(self, path: str) -> Any:
        """The JSON at a path. Raises ModelError."""
        return self._json(path, self._said(self._request(path), path))

    def post(self, path: str, body: Any) -> Any:
        """The JSON that a request is answered with. Raises ModelError."""
        return self._json(path, self.tell(path, body))

    def tell(self, path: str, body: Any = None) -> bytes:
        """Post a request, whatever is answered if it is no error. Raises ModelError."""
        content = b"" if body is None else json.dumps(body).encode()
        return self._said(self._request(path, content), path)

    def _request(self, path: str, content: bytes | None = None) -> Request:
        headers = {} if content is None else {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return Request(f"{self.address.rstrip('/')}{path}", content, headers)

    def _json(self, path: str, said: bytes) -> Any:
        try:
            return json.loads(said)
        except (ValueError, RecursionError) as error:
            raise self.odd(path, "something that is no JSON") from error

    def odd(self, path: str, what: str, hint: str = "is this a vLLM server?") -> ModelError:
        """The error of an answer that makes no sense."""
        return ModelError(f"answered {path} with {what}", self.where, hint)

    def _remedy(self, status: int) -> str:
        """What to do about an error of the server's own."""
        if status not in FORBIDDEN:
            return "see the server's own log"
        return "it wants another key" if self.key else "it wants a key: name the variable that holds it in api_key_env"

    def _said(self, request: Request, path: str) -> bytes:
        block = self.setting.rpartition(".")[0]
        late = ModelError(f"gave no answer to {path} within {self.seconds:g} s", self.where,
                          f"raise {block}.server_timeout, or lower {block}.max_batch")  # fmt: skip
        try:
            opener = _opener(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
            with opener.open(request, timeout=self.seconds) as answer:
                content: bytes = answer.read()
                return content
        except HTTPError as error:
            with error:
                said = _words(error).replace(self.key, "...") if self.key else _words(error)
                raise Refused(error.code, said, path, self.where, self._remedy(error.code)) from None
        except TimeoutError as error:
            raise late from error
        except URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise late from error
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise ModelError(f"its certificate is refused: {_line(error.reason.verify_message)}", self.where,
                                 "name those that you trust in SSL_CERT_FILE") from error  # fmt: skip
            if isinstance(error.reason, ssl.SSLError):
                words = _line(error.reason.reason or error.reason)
                raise ModelError(f"speaks no https: {words}", self.where, "is it http?") from error
            reason = getattr(error.reason, "strerror", None) or error.reason
            raise ModelError(
                f"no server answers there: {_line(reason)}", self.where, f"{self.start}; {self.again}"
            ) from error
        except (HTTPException, OSError) as error:
            raise ModelError(f"broke off while it answered {path}: {_line(error) or type(error).__name__}", self.where,
                             f"{self.start}; {self.again}") from error  # fmt: skip


def _words(error: HTTPError) -> str:
    """What a server says of its error: the message of OpenAI's form, or the text."""
    try:
        said = error.read(1 << 16)
    except (HTTPException, OSError):
        return ""
    try:
        found = json.loads(said)
        found = found.get("error", found)
        if isinstance(found, str):
            return _line(found)
        return _line(found["message"] if "message" in found else found.get("detail", ""))
    except (ValueError, RecursionError, AttributeError, TypeError):
        return _line(said.decode(errors="replace"))


def _line(words: object) -> str:
    text = " ".join(str(words).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
