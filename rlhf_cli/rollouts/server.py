"""Talking to the one server that a recipe names: JSON over HTTP, by the standard library.

No proxy stands between, and no redirection is followed: nothing but that address is ever asked. Whatever goes wrong is
a ModelError of one line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from rlhf_cli.errors import ModelError

LONGEST = 300
"""Characters of a server's words that are shown."""
NOT_FOUND = 404
START = "start it: rlhf serve-rollouts RECIPE"
AGAIN = f"{START}; then the same command goes on from the newest whole checkpoint"


class _Stay(HTTPRedirectHandler):
    """Follows nobody elsewhere: the answer is an error of its own status."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


_opener = build_opener(ProxyHandler({}), _Stay)


class Refused(ModelError):
    """The server answered with an error of its own."""

    def __init__(self, status: int, said: str, path: str, where: str, hint: str) -> None:
        self.status, self.said = status, said
        super().__init__(f"answered {path} with {status}{f': {said}' if said else ''}", where, hint)

    @property
    def unknown(self) -> bool:
        """Whether it knows no such path."""
        return self.status == NOT_FOUND and self.said in ("", "Not Found")


@dataclass(frozen=True)
class Http:
    """A server by its address."""

    address: str
    seconds: float
    """How long an answer may take."""

    @property
    def where(self) -> str:
        """How errors name it."""
        return f"rollout.server {self.address}"

    def get(self, path: str) -> Any:
        """The JSON at a path. Raises ModelError."""
        return self._json(path, self._said(Request(self._url(path)), path))

    def post(self, path: str, body: Any) -> Any:
        """The JSON that a request is answered with. Raises ModelError."""
        return self._json(path, self.tell(path, body))

    def tell(self, path: str, body: Any = None) -> bytes:
        """Post a request, whatever is answered if it is no error. Raises ModelError."""
        content = b"" if body is None else json.dumps(body).encode()
        return self._said(Request(self._url(path), content, {"Content-Type": "application/json"}), path)

    def _url(self, path: str) -> str:
        return f"{self.address.rstrip('/')}{path}"

    def _json(self, path: str, said: bytes) -> Any:
        try:
            return json.loads(said)
        except (ValueError, RecursionError) as error:
            raise self.odd(path, "something that is no JSON") from error

    def odd(self, path: str, what: str, hint: str = "is this a vLLM server?") -> ModelError:
        """The error of an answer that makes no sense."""
        return ModelError(f"answered {path} with {what}", self.where, hint)

    def _said(self, request: Request, path: str) -> bytes:
        late = ModelError(f"gave no answer to {path} within {self.seconds:g} s", self.where,
                          "raise rollout.server_timeout, or lower rollout.max_batch")  # fmt: skip
        try:
            with _opener.open(request, timeout=self.seconds) as answer:
                content: bytes = answer.read()
                return content
        except HTTPError as error:
            with error:
                raise Refused(error.code, _words(error), path, self.where, "see the server's own log") from error
        except TimeoutError as error:
            raise late from error
        except URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise late from error
            reason = getattr(error.reason, "strerror", None) or error.reason
            raise ModelError(f"no server answers there: {_line(reason)}", self.where, AGAIN) from error
        except (HTTPException, OSError) as error:
            raise ModelError(f"broke off while it answered {path}: {_line(error) or type(error).__name__}", self.where,
                             AGAIN) from error  # fmt: skip


def _words(error: HTTPError) -> str:
    """What a server says of its error: the message of OpenAI's form, or the text."""
    try:
        said = error.read(1 << 16)
    except (HTTPException, OSError):
        return ""
    try:
        found = json.loads(said)
        found = found.get("error", found)
        return _line(found["message"] if "message" in found else found.get("detail", ""))
    except (ValueError, RecursionError, AttributeError, TypeError):
        return _line(said.decode(errors="replace"))


def _line(words: object) -> str:
    text = " ".join(str(words).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
