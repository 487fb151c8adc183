"""Lines that go: C4's line rules, and boilerplate (notices, navigation) in English and Chinese.

Contract: `LineRules(names, ...)(text)` is the text without the lines the rules in `names` are against, and how
many each took. Every line is judged by itself, so that a second pass finds nothing. What the whole text does not hold
is not searched for line by line. C4: Raffel et al. 2020, section 2.2, with the constants of the code that made it
(tensorflow_datasets/text/c4_utils.py); the Chinese counterparts are ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from data_tools.cleaning.repair import ROUNDS, non_ascii

_TERMINAL = tuple(".?!\"'”’»)" + "。？！…”』」》）；")
_ELLIPSIS = ("...",)
_CITATION = re.compile(r"\[(?:\d*|edit|citation needed|编辑|編輯|来源请求|來源請求|需要引用)\]")
_HAN = re.compile("[\u3400-\u9fff\u3041-\u30ff]")
_UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff]")  # Thai to Burmese, Khmer, kana, Han


def _by_script(phrases: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(all, those that text without Chinese can hold)."""
    return phrases, tuple(phrase for phrase in phrases if not _HAN.search(phrase))


# C4's own six, and what Chinese sites write in their place
_POLICY = _by_script((
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
    "隐私政策", "隱私政策", "隐私条款", "使用条款", "服务条款", "用户协议", "使用cookie", "使用 cookie", "cookie政策",
))  # fmt: skip
# a notice is a short line that holds one of these, or begins with one of the second list
_NOTICES = _by_script((
    "all rights reserved", "copyright ©", "copyright (c)", "© 19", "© 20", "©19", "©20", "accept cookies",
    "cookie settings", "cookie preferences", "powered by wordpress", "you must be logged in to", "skip to content",
    "skip to main content",
    "版权所有", "版權所有", "版权归", "备案号", "icp备", "icp证", "公网安备", "转载请注明", "未经授权不得",
    "未经许可不得", "未经允许不得", "未经授权，不得", "未经授权禁止", "微信公众号：", "责任编辑：", "责任编辑:",
    "分享到微信", "分享到朋友圈", "举报电话",
))  # fmt: skip
_NOTICE_BEGINNINGS = _by_script((
    "click here to", "share this:", "share on facebook", "share on twitter", "subscribe to our", "sign up for our",
    "this field is required", "leave a reply",
    "点击查看", "点击下载", "点击这里", "点击此处", "点击进入", "点击关注", "点击上方", "点击下方", "扫描二维码",
    "扫码关注", "扫一扫", "长按识别", "长按二维码", "关注公众号", "欢迎关注", "返回顶部", "返回首页", "加入收藏",
    "设为首页", "免责声明：", "声明：本",
))  # fmt: skip
_SEARCHED = {
    "c4_line_policy": _POLICY,
    "boilerplate_notice": tuple(held + begun for held, begun in zip(_NOTICES, _NOTICE_BEGINNINGS)),
}
_NOTICE_CHARACTERS = 200  # a longer line is prose that mentions it; Chinese says as much in a third of that
# navigation is a whole line of these
_NAVIGATION = frozenset((
    "home", "menu", "search", "login", "log in", "log out", "sign in", "sign up", "register", "subscribe", "share",
    "share this", "tweet", "print", "email", "next", "previous", "prev", "back", "back to top", "top", "read more",
    "continue reading", "learn more", "view more", "show more", "load more", "see more", "more", "click here", "close",
    "skip to content", "skip to main content", "skip to navigation", "main menu", "toggle navigation", "contact",
    "contact us", "about", "about us", "faq", "help", "sitemap", "site map", "privacy", "terms", "terms of service",
    "privacy policy", "cookie policy", "advertisement", "advertising", "sponsored", "add to cart", "checkout", "reply",
    "permalink", "leave a comment", "no comments", "comments", "related posts", "related articles", "recent posts",
    "categories", "tags", "archives", "follow us", "newsletter", "loading", "page not found",
    "首页", "首頁", "登录", "登錄", "登入", "注册", "註冊", "搜索", "搜尋", "更多", "查看更多", "加载更多",
    "点击加载更多", "阅读全文", "阅读更多", "阅读原文", "查看全文", "展开全文", "收起", "上一篇", "下一篇", "上一页",
    "下一页", "上一章", "下一章", "返回", "返回顶部", "返回首页", "返回列表", "联系我们", "关于我们", "加入我们",
    "网站地图", "友情链接", "免责声明", "意见反馈", "帮助中心", "分享", "分享到", "收藏", "加入收藏", "打印",
    "打印本页", "关闭", "关闭窗口", "评论", "发表评论", "相关阅读", "相关文章", "相关推荐", "热门推荐", "推荐阅读",
    "猜你喜欢", "广告", "扫一扫", "导航", "我的", "设置", "目录",
))  # fmt: skip
_NAVIGATION_CHARACTERS = 60
_SEPARATOR = re.compile(r"\s*[|»«›‹>·•/\\→←↑↓【】\[\]]+\s*")
_AROUND = " \t\u3000.:;,!?。：；，！？|»«›‹>·•→←↑↓…-–—*#[]【】()（）"

LINE_RULES = (
    "c4_citations",
    "c4_line_long_word",
    "c4_line_end",
    "c4_line_words",
    "c4_line_javascript",
    "c4_line_policy",
    "boilerplate_notice",
    "boilerplate_navigation",
)


class LineRules:
    """The line rules that are switched on.

    Args:
        names: of LINE_RULES.
        min_words, min_characters: of a line, the second for lines in a script without spaces.
        max_word: characters of the longest word in a line.
    """

    def __init__(self, names: Iterable[str], min_words: int = 5, min_characters: int = 8, max_word: int = 1000):
        self.names = frozenset(names)
        self._min_words, self._min_characters, self._max_word = min_words, min_characters, max_word
        self._long_word = re.compile(rf"[!-~]{{{max_word + 1}}}")

    def __call__(self, text: str) -> tuple[str, Counter[str], list[tuple[str, str]]]:
        """(text that stays, how much each rule took, the (rule, line) pairs that went)."""
        counts: Counter[str] = Counter()
        if "c4_citations" in self.names and "[" in text:
            text, counts["c4_citations"] = _without_citations(text)
        asked = self._worth_asking(text)
        if not asked:
            return text, +counts, []
        # a long line with spaces enough has words enough and is no navigation: most lines end here
        long_is_good = asked <= {"c4_line_words", "boilerplate_navigation"}
        kept, gone = [], []
        for line in text.split("\n"):
            good = long_is_good and len(line) > _NAVIGATION_CHARACTERS and self._has_words(line)
            rule = None if good or not line else self._against(line, asked)
            if rule is None:
                kept.append(line)
            else:
                gone.append((rule, line))
                counts[rule] += 1
        return "\n".join(kept) if gone else text, +counts, gone

    def _worth_asking(self, text: str) -> frozenset[str]:
        """The rules that could be against a line of the text."""
        lower = text.lower()
        asked = set(self.names - {"c4_citations"})
        if len(text) <= self._max_word:
            asked.discard("c4_line_long_word")
        if "javascript" not in lower:
            asked.discard("c4_line_javascript")
        no_chinese = lower.isascii() or not _HAN.search(non_ascii(lower))
        for rule, phrases in _SEARCHED.items():
            if rule in asked and not any(phrase in lower for phrase in phrases[no_chinese]):
                asked.discard(rule)
        return frozenset(asked)

    def _against(self, line: str, asked: frozenset[str]) -> str | None:
        """The first rule that is against a line."""
        if "c4_line_long_word" in asked and len(line) > self._max_word and self._long_word.search(line):
            return "c4_line_long_word"
        if "c4_line_end" in asked and (not line.rstrip().endswith(_TERMINAL) or line.rstrip().endswith(_ELLIPSIS)):
            return "c4_line_end"
        if "c4_line_words" in asked and self._too_short(line):
            return "c4_line_words"
        if asked.isdisjoint(("c4_line_javascript", "c4_line_policy", "boilerplate_notice", "boilerplate_navigation")):
            return None
        if "c4_line_javascript" in asked and "javascript" in line.lower():
            return "c4_line_javascript"
        if "c4_line_policy" in asked and _holds(line, _POLICY):
            return "c4_line_policy"
        if "boilerplate_notice" in asked and is_notice(line):
            return "boilerplate_notice"
        if "boilerplate_navigation" in asked and is_navigation(line):
            return "boilerplate_navigation"
        return None

    def _has_words(self, line: str) -> bool:
        """Enough of them, judged by single spaces without splitting; False leaves it open."""
        return line.count(" ") >= self._min_words and "  " not in line

    def _too_short(self, line: str) -> bool:
        if self._has_words(line) or len(line.split()) >= self._min_words:
            return False
        return not _UNSPACED.search(line) or sum(not c.isspace() for c in line) < self._min_characters


def _holds(line: str, phrases: tuple[tuple[str, ...], tuple[str, ...]]) -> bool:
    lower = line.lower()
    return any(phrase in lower for phrase in phrases[0])


def is_notice(line: str) -> bool:
    """A short line with a copyright, licence, cookie or "click here" phrase in it."""
    limit = _NOTICE_CHARACTERS // 3 if _HAN.search(line) else _NOTICE_CHARACTERS
    if len(line) > limit:
        return False
    begins = line.lower().lstrip(_AROUND).startswith(_NOTICE_BEGINNINGS[0])
    return begins or _holds(line, _NOTICES)


def is_navigation(line: str) -> bool:
    """A line that is nothing but menu entries: "Home | About us | Contact", "上一篇 下一篇"."""
    if len(line) > _NAVIGATION_CHARACTERS:
        return False
    whole = line.lower().strip(_AROUND)
    if whole in _NAVIGATION:
        return True
    parts = [part for part in _SEPARATOR.split(whole) if part]
    if len(parts) < 2:
        parts = whole.split() if _HAN.search(whole) else parts
    return len(parts) > 1 and all(part.strip(_AROUND) in _NAVIGATION for part in parts)


def _without_citations(text: str) -> tuple[str, int]:
    total = 0
    for _ in range(ROUNDS):  # taking one away can make another: [[1]2]
        text, count = _CITATION.subn("", text)
        total += count
        if not count:
            break
    return text, total
