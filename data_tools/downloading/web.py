"""HTTP requests whose failures are told apart: what another try may mend, and what the user has to.

Contract: `Web.open` returns a streamed response with status 200, 206 or 416; every other outcome is a `Transient` (the
caller tries again, by `Web.retry`) or a UserError of one line. Only http and https are followed, redirects included;
the token goes to the hub's own host and to no host it redirects to. Proxies of the environment are used.
"""

from __future__ import annotations

import email.utils
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from minillm.utils.errors import UserError
from minillm.utils.logging import warn

if TYPE_CHECKING:
    import requests

T = TypeVar("T")

ATTEMPTS = 6  # without any new byte in between
LISTING_ATTEMPTS = 4  # nothing is lost yet: say sooner that there is no network
LONGEST_WAIT_S = 600.0  # a server that asks for more is left alone
_LONGEST_BACK_OFF_S = 60.0
_TRANSIENT_STATUS = (408, 425, 429)


class Transient(Exception):
    """A failure that another try may mend.

    Args:
        wait_s: how long the server asked to wait.
        progressed: the attempt brought new bytes, so that it does not count as a failure in a row.
    """

    def __init__(self, reason: str, wait_s: float | None = None, progressed: bool = False) -> None:
        super().__init__(reason)
        self.wait_s, self.progressed = wait_s, progressed


class Stopped(Exception):
    """Another file failed, or the user pressed Ctrl-C: leave what is there and end."""


class Web:
    """The way to one server (and where it redirects to), for several threads.

    Args:
        token: sent as a Bearer token with requests to `token_host`.
        wait_s: pause after the first failure; it doubles, up to a minute.
        timeout_s: seconds without a connection or without any new byte until a request counts as stalled.
    """

    def __init__(
        self,
        token: str | None = None,
        token_host: str = "",
        *,
        attempts: int = ATTEMPTS,
        wait_s: float = 1.0,
        timeout_s: float = 30.0,
    ) -> None:
        self.token, self.token_host = token, token_host
        self.attempts, self.wait_s, self.timeout_s = attempts, wait_s, timeout_s
        self.stop = threading.Event()
        self._local = threading.local()

    def open(self, url: str, headers: Mapping[str, str] | None = None) -> requests.Response:
        """GET a URL, following redirects; the body is not read yet. See the module for what is raised."""
        import requests

        if urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"{url}: only http and https are followed")
        headers = {"Accept-Encoding": "identity", **(headers or {})}
        if self.token and urlsplit(url).netloc == self.token_host:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            response = self._session().get(url, headers=headers, stream=True, timeout=self.timeout_s)
        except requests.exceptions.SSLError as error:
            raise UserError(f"{url}: the server's certificate is not accepted ({root_cause(error)})") from None
        except requests.exceptions.TooManyRedirects:
            raise UserError(f"{url} redirects in a circle: check the address, or name another --endpoint") from None
        except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL, ValueError) as error:
            if isinstance(error, requests.exceptions.JSONDecodeError):
                raise
            raise UserError(f"{url} cannot be followed ({root_cause(error)}): only http and https are") from None
        except requests.exceptions.RequestException as error:
            raise Transient(root_cause(error)) from None
        if response.status_code in (200, 206, 416):
            return response
        with response:
            status = response.status_code
            said = f"the server answers {status} {response.reason}"
            if status >= 500 or status in _TRANSIENT_STATUS:
                raise Transient(said, retry_after_s(response.headers, time.time()))
            raise UserError(self._refusal(url, response, said))

    def get_json(self, url: str) -> tuple[object, Mapping[str, Mapping[str, str]]]:
        """The parsed answer and its Link header (by relation, as requests gives it), with retries."""
        import requests

        def attempt() -> tuple[object, Mapping[str, Mapping[str, str]]]:
            with self.open(url) as response:
                try:
                    return response.json(), response.links
                except requests.exceptions.JSONDecodeError:
                    raise UserError(f"{url} answers with something else than JSON: is it the hub's address?") from None
                except requests.exceptions.RequestException as error:
                    raise Transient(root_cause(error)) from None

        attempts = min(self.attempts, LISTING_ATTEMPTS)
        return self.retry(url, attempt, attempts, "; a mirror: --endpoint or HF_ENDPOINT")

    def retry(self, what: str, attempt: Callable[[], T], attempts: int | None = None, hint: str = "") -> T:
        """Run `attempt` until it does not raise Transient; give up after so many failures in a row.

        Args:
            hint: what else may help, for the message.
        """
        attempts, failures = attempts or self.attempts, 0
        while True:
            if self.stop.is_set():
                raise Stopped
            try:
                return attempt()
            except Transient as error:
                failures = 1 if error.progressed else failures + 1
                if failures >= attempts:
                    raise UserError(
                        f"{what} could not be loaded in {attempts} attempts ({error}): check the network and the "
                        f"address{hint}; the same command goes on where this one stopped"
                    ) from None
                wait = min(self.wait_s * 2 ** (failures - 1), _LONGEST_BACK_OFF_S)
                if error.wait_s is not None:
                    if error.wait_s > LONGEST_WAIT_S:
                        raise UserError(
                            f"{what}: {error} and asks to come back in {error.wait_s:.0f} s: run the command again then"
                        ) from None
                    wait = error.wait_s
                warn(f"{what}: {error}; trying again in {wait:.3g} s ({failures} of {attempts - 1})")
                self.stop.wait(wait)

    def _session(self) -> requests.Session:
        """One session a thread: they are not made to be shared."""
        import requests

        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.headers["User-Agent"] = "minillm-download"
            self._local.session.auth = lambda request: request  # .netrc must not take the token's place
        return self._local.session

    def _refusal(self, url: str, response: requests.Response, said: str) -> str:
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        if status in (401, 403):
            if not self.token_host:
                return f"{url}: {said}: the file is not for everyone"
            if self.token:
                return f"{url}: {said}: the account of HF_TOKEN has no access; ask for it on the dataset's page"
            why = "it is gated or private" if code == "GatedRepo" else "it is gated, private or does not exist"
            return f"{url}: {said}: {why}; ask for access on the dataset's page and set HF_TOKEN"
        if status in (404, 410):
            return f"{url}: {said}: no such file or repository; check the name, --files, --source or --endpoint"
        return f"{url}: {said}: check the address"


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a Retry-After header asks for (a number or an HTTP date; `now` is Unix time), None without one."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (TypeError, ValueError):
        return None


def root_cause(error: BaseException) -> str:
    """A few words for a failed connection; the libraries' own texts nest five exceptions."""
    chain: list[BaseException] = []
    pending: list[object] = [error]
    while pending:
        item = pending.pop(0)
        if isinstance(item, BaseException) and item not in chain:
            chain.append(item)
            pending += [*item.args, getattr(item, "reason", None), item.__cause__, item.__context__]
    names = {type(item).__name__ for item in chain}
    host = ""
    for item in chain:
        for name in ("conn", "pool"):  # vars(): the attribute `pool` is deprecated on some
            host = host or getattr(vars(item).get(name), "host", "")
    where = f" to {host}" if host else ""
    if names & {"NameResolutionError", "gaierror"}:
        return f"the name {host or 'of the server'} cannot be resolved: is there a network?"
    if "ProxyError" in names:
        return "the proxy of HTTP_PROXY/HTTPS_PROXY does not answer"
    if "ReadTimeoutError" in names or "ReadTimeout" in names:
        return "the server sends nothing any more"
    if names & {"ConnectTimeoutError", "ConnectTimeout"}:
        return f"no connection{where} in time"
    if "ConnectionRefusedError" in names:
        return f"the connection{where} is refused"
    if names & {"IncompleteRead", "ConnectionResetError", "RemoteDisconnected", "BrokenPipeError", "ProtocolError"}:
        return "the connection was cut"
    return str(chain[-1]).splitlines()[0][:200] if str(chain[-1]) else type(error).__name__
