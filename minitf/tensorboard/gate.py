"""Access control of the live route: only pages of this TensorBoard on this machine may run a sentence.

TensorBoard does not check the Host header, so a page of any site could reach a route by resolving its name to 127.0.0.1
(DNS rebinding), or by plain cross-site requests. Each check below closes one such way.
"""

import ipaddress
import json
from typing import Any
from urllib.parse import urlsplit

from werkzeug import Request

HEADER = "X-Minitf-Attention"  # a custom header, which pages of other sites cannot send without a CORS preflight
MAX_BODY_BYTES = 65_536


CODES = {400: "invalid", 403: "closed", 404: "missing", 405: "invalid", 409: "superseded", 411: "invalid"}
CODES |= {413: "invalid", 415: "invalid", 422: "unusable", 503: "busy"}


class RefusedError(Exception):
    """A request refused with this HTTP status and message.

    `code` and `values` are what a page says it by, in its own language: the key `refused_CODE` of the viewer's texts.
    """

    def __init__(self, status: int, message: str, code: str = "", **values: str | int) -> None:
        super().__init__(message)
        self.status = status
        self.code = code or CODES[status]
        self.values = values


class LiveGate:
    """Decides whether the live route is open in this TensorBoard, and to which requests."""

    def __init__(self, flags: Any, logdir: str | None) -> None:
        self.off = getattr(flags, "minitf_live", "auto") == "off"
        self.bind_all = bool(getattr(flags, "bind_all", False))
        self.host = str(getattr(flags, "host", None) or "localhost")
        self.logdir_spec = bool(getattr(flags, "logdir_spec", ""))
        self.logdir = logdir
        named = str(getattr(flags, "minitf_live_hosts", "") or "")
        self.allowed = {name.strip().lower() for name in named.split(",") if name.strip()}

    def why_closed(self) -> str | None:
        """Why the route is closed to all requests, or None; `why_` + the result is a key of the viewer's texts."""
        if self.off:
            return "off"
        if self.bind_all:
            return "bind_all"
        if self.logdir_spec or not self.logdir or "://" in self.logdir:
            return "logdir"
        if not (_is_loopback(self.host) or self.host.lower() in self.allowed):
            return "bind_all"
        return None

    def check(self, request: Request) -> None:
        """RefusedError unless the request comes from a page of this TensorBoard."""
        if why := self.why_closed():
            raise RefusedError(403, f"this TensorBoard does not run sentences ({why})")
        hosts, origins = request.headers.getlist("Host"), request.headers.getlist("Origin")
        if len(hosts) != 1 or not self._is_allowed(f"//{hosts[0]}"):
            raise RefusedError(403, "this host name is not allowed; see --minitf_live_hosts")
        # Browsers send Origin with every POST; a request without it comes from no page of ours.
        if len(origins) != 1 or not self._is_allowed(origins[0], scheme=True):
            raise RefusedError(403, "this origin is not allowed; see --minitf_live_hosts")
        if urlsplit(origins[0]).netloc.lower() != hosts[0].lower():
            raise RefusedError(403, "pages of another origin are not allowed")
        if request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            raise RefusedError(403, "pages of another site are not allowed")
        if request.headers.get(HEADER) != "1":
            raise RefusedError(403, f"the header {HEADER} is missing")
        if request.mimetype != "application/json":
            raise RefusedError(415, "the body must be application/json")

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON object in the request's body; RefusedError if it is invalid or too large."""
        if request.content_length is None:
            raise RefusedError(411, "the length of the body is missing")
        if request.content_length > MAX_BODY_BYTES:
            raise RefusedError(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
        try:
            content = json.loads(request.get_data(cache=False).decode("utf-8"))
        except (ValueError, RecursionError):
            raise RefusedError(400, "the body is not JSON") from None
        if not isinstance(content, dict):
            raise RefusedError(400, "the body is not a JSON object")
        return content

    def _is_allowed(self, url: str, scheme: bool = False) -> bool:
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            return False
        if scheme and parts.scheme not in ("http", "https"):
            return False
        if not host or parts.username is not None or parts.path or parts.query or parts.fragment:
            return False
        return _is_loopback(host) or host.lower() in self.allowed


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
