"""What a host allows: robots.txt by RFC 9309, read by protego.

Contract: no file (4xx) allows everything; a server that fails (5xx) or cannot be reached allows nothing. The first
500 KiB count. Crawl-delay and Request-rate make the delay longer, never shorter.
"""

from __future__ import annotations

from data_tools.crawling.fetching import Answer, Fetcher

MAX_BYTES = 500 << 10
_REDIRECTS = 5


def fetch_robots(fetcher: Fetcher, host: str) -> tuple[str | None, Answer]:
    """(content, answer) of a host's robots.txt; the content is None where it could not be learned."""
    answer = fetcher.get(f"{host}/robots.txt", None, MAX_BYTES)
    for _ in range(_REDIRECTS):
        if answer.location is None:
            break
        answer = fetcher.get(answer.location, None, MAX_BYTES)
    if answer.problem is None and answer.location is None:
        return answer.body.decode("utf-8-sig", errors="replace"), answer
    if answer.location is not None or 400 <= answer.status < 500 and answer.status != 429:
        return "", answer
    return None, answer


class Robots:
    """The rules of one host for one crawler.

    Args:
        product: the name that rules may address: the part of the User-Agent before the first slash or space.
    """

    def __init__(self, content: str, product: str) -> None:
        from data_tools.extras import require

        self._rules = require("protego").Protego.parse(content)
        self._product = product

    def allows(self, url: str) -> bool:
        return bool(self._rules.can_fetch(url, self._product))

    @property
    def delay_s(self) -> float:
        """Seconds between two requests that the host asks for."""
        delay = float(self._rules.crawl_delay(self._product) or 0)
        rate = self._rules.request_rate(self._product)
        return max(delay, rate.seconds / rate.requests if rate and rate.requests else 0.0)

    @property
    def sitemaps(self) -> list[str]:
        return list(self._rules.sitemaps)


def product_of(user_agent: str) -> str:
    """The name of a crawler: `minillm-crawl` of `minillm-crawl/1.0 (+mail)`."""
    return user_agent.split("/")[0].split()[0]
