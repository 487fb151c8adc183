"""Words that say nothing about a document's topic, for English and Chinese (simplified and traditional).

The English list is gensim's (337 words) less its words with content ("system", "fire"), and with what it lacks:
contractions without their apostrophe and the scaffolding of a text ("figure", "section"). Words that are stop words of
one corpus only are found by data_tools.topics.common.
"""

from __future__ import annotations

import functools

_ENGLISH = """
a able about above across after afterwards again against ain al all allow allows almost alone along already also
although always am among amongst amoungst an and another any anyhow anyone anything anyway anywhere are aren around as
at back be became because become becomes becoming been before beforehand behind being below beside besides between
beyond both but by call can cannot cant certain cf co com con could couldn couldnt de did didn different do does doesn
doing don done down due during each eg eight either eleven else elsewhere empty enough et etc even ever every everyone
everything everywhere except far few fifteen fifty fig figure first five for former formerly forty four from front
full further generally get getting give given gives go had hadn has hasn hasnt have haven he hence her here hereafter
hereby herein hereupon hers herself him himself his how however http https hundred i ie if in inc indeed into is isn
it its itself just keep kg km known last latter latterly lead leads least less let like likely ll ltd made main make
many may me meanwhile might mightn mine more moreover most mostly move much must mustn my myself namely need needed
needn neither never nevertheless new next nine no nobody none noone nor not nothing now nowhere of off often on once
one ones only onto or org other others otherwise our ours ourselves out over own part particular per perhaps please
possible put quite rather re really recent recently regarding respectively same say second section see seem seemed
seeming seems serious several shall shan she should shouldn show side since six sixty so some somehow someone
something sometime sometimes somewhere specifically still such sure table take taken ten than that the their them
themselves then thence there thereafter thereby therefore therein thereupon these they thing things third this those
though three through throughout thru thus to together too top toward towards twelve twenty two typically un under
unless unlike until up upon us used using usually various ve very via was wasn we well were weren what whatever when
whence whenever where whereafter whereas whereby wherein whereupon wherever whether which while whither who whoever
whole whom whose why will with within without won would wouldn www yet you your yours yourself yourselves
""".split()
_CHINESE = """
的 了 和 是 就 都 而 及 與 与 着 著 或 一 一个 一個 一些 一种 一種 一样 一樣 一下 一定 一般 一直 没有 沒有 我 我们
我們 你 你们 你們 您 他 他们 他們 她 她们 她們 它 它们 它們 自己 咱们 大家 这 這 这个 這個 这些 這些 这样 這樣 这里
這裡 这种 這種 那 那个 那個 那些 那样 那樣 那里 那裡 哪 哪些 哪个 哪個 什么 什麼 怎么 怎麼 怎样 怎樣 如何 为什么 為什麼
谁 誰 多少 几 幾 在 于 於 从 從 自 向 往 对 對 对于 對於 关于 關於 把 被 给 給 让 讓 使 使得 由 由于 由於 因为
因為 因此 所以 如果 假如 只要 只有 虽然 雖然 但 但是 然而 不过 不過 不仅 不僅 而且 并 並 并且 並且 还 還 还是 還是 以
以及 之 其 其中 其他 其它 此 此外 则 則 即 即使 可 可以 可能 能 能够 能夠 会 會 应 應 应该 應該 需要 必须 必須 要 想
不 不是 不会 不會 不能 也 又 再 更 更加 最 很 非常 太 十分 比较 比較 等 等等 有 有些 有的 有关 有關 具有 包括 进行
進行 通过 通過 根据 根據 按照 作为 作為 成为 成為 当 當 时 時 时候 時候 之后 之後 之前 以下 以上 上 下 中 里 裡 内 內
外 前 后 後 间 間 每 每个 每個 各 各种 各種 某 某些 许多 許多 很多 多 少 种 種 个 個 位 次 第 们 們 地 得 过 過
来 來 去 到 出 说 說 做 用 将 將 已 已经 已經 正在 曾 曾经 曾經 吗 嗎 吧 呢 啊 呀 哦 嗯 呗 例如 比如 如 像 似乎
同 同时 同時 跟 与其 與其 甚至 只 仅 僅 仅仅 僅僅 却 卻 几乎 幾乎 是否 之间 之間 方面 以便 为了 為了 为 為 至 至少 所
所有 任何 不同 相关 相關 这是 這是 就是 也是 都是 还有 還有 可是 一次 一位 一起 其实 其實 当然 當然 特别 特別 尤其 主要
一方面 另一方面 首先 其次 最后 最後 然后 然後 总之 總之 从而 從而 以来 以來
""".split()
# Single characters that carry grammar in classical Chinese, on top of those above.
_CLASSICAL = "不無无何一有人此如為为相自未來来應应可欲已更多今亦復复還还非誰谁莫但且乃者也矣兮焉哉乎於于與与若猶犹豈岂"


@functools.cache
def stop_words() -> frozenset[str]:
    """Every stop word, lower case; grammatical characters of classical Chinese are in `classical_characters`."""
    return frozenset(_ENGLISH) | frozenset(_CHINESE)


def classical_characters() -> frozenset[str]:
    """Characters left out where Chinese is read character by character."""
    return frozenset(_CLASSICAL) | frozenset(word for word in _CHINESE if len(word) == 1)
