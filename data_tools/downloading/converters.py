"""How a record of a dataset becomes {"text"} or {"messages"}, declared in the catalogue and carried out in one place.

A converter has exactly one of these forms (columns are the source's fields):

    text: COLUMN                          the text is there (a list of strings is joined by newlines)
    template: "{title}\\n\\n{abstract}"     several columns in one text
      replace: {"<s>": ""}                beside text or template: strings to put in the place of others, in order
    messages:                             a conversation that is there as a list of turns
      conversations: COLUMN
      role: from                          key of a turn's speaker (role)
      content: value                      key of what is said (content)
      roles: {human: user}                what the source calls user, assistant and system, beside the usual names
      system: COLUMN                      a system message to put first, where the column is not empty
    messages:                             question and answer in columns
      prompt: [instruction, input]        one column or several, joined by a newline; empty ones are left out
      response: output
      history: COLUMN                     earlier turns, a list of [question, answer]
      system: COLUMN

Contract: fields that were used do not stay, all others do. A record that does not fit is Rejected with a reason
(no_text, empty, no_turns, bad_turn, unknown_role, empty_turn, no_answer, not_unicode), never mended by guess. Keys of
a turn beside role and content are dropped and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping

from data_tools.files import Raw, Record, Rejected
from data_tools.records import TextField
from data_tools.workshop import Stage

FORMS = ("text", "template", "messages")
ROLES = {
    "user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip
_TURN_KEYS = ("conversations", "role", "content", "roles", "system")
_PAIR_KEYS = ("prompt", "response", "history", "system")


def converter_problems(converter: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """What is wrong with a converter: (place below it, sentence)."""
    forms = [form for form in FORMS if form in converter]
    others = {key for key in converter if key not in forms and (key != "replace" or forms == ["messages"])}
    if len(forms) != 1 or others:
        got = ", ".join(map(str, converter)) or "nothing"
        yield "", f"needs one of {', '.join(FORMS)} and nothing else, it has {got}"
        return
    value = converter[forms[0]]
    if forms[0] != "messages":
        replace = converter.get("replace", {})
        if not isinstance(replace, dict) or not all(isinstance(item, str) for item in (*replace, *replace.values())):
            yield ".replace", "has to map strings to strings"
        if not isinstance(value, str) or not value:
            yield f".{forms[0]}", "has to be a string"
        elif forms[0] == "template" and ("{" not in value or "}" not in value):
            yield ".template", f"{value!r} names no column: write it as '{{title}}\\n{{abstract}}'"
        return
    if not isinstance(value, dict) or ("conversations" in value) == ("prompt" in value):
        yield ".messages", "needs either conversations: COLUMN or prompt: COLUMN with response: COLUMN"
        return
    keys = _TURN_KEYS if "conversations" in value else _PAIR_KEYS
    if "prompt" in value and "response" not in value:
        yield ".messages", "response is missing"
    for key, item in value.items():
        if key not in keys:
            yield f".messages.{key}", f"unknown key beside {keys[0]}: {', '.join(keys)}"
        elif key == "roles":
            if not isinstance(item, dict) or not set(item.values()) <= set(ROLES.values()):
                yield ".messages.roles", "maps the source's names to user, assistant or system"
        elif key == "prompt" and isinstance(item, list):
            if not item or not all(isinstance(column, str) for column in item):
                yield ".messages.prompt", "has to be a column or a list of columns"
        elif not isinstance(item, str) or not item:
            yield f".messages.{key}", "has to be a string"


class Convert(Stage):
    """Records of a dataset as {"id", "text"} or {"id", "messages"} with the fields that were not used."""

    name = "convert"

    def __init__(self, options: dict[str, object]) -> None:
        super().__init__(options)
        self.converter: Mapping[str, object] = options["converter"]
        self.dropped: Counter[str] = Counter()

    def process(self, record: Record) -> Record | Rejected:
        return convert(record, self.converter, self.dropped)

    def finish_unit(self) -> dict[str, object]:
        return {"turn_keys_dropped": dict(self.dropped)} if self.dropped else {}


def convert(record: Record, converter: Mapping[str, object], dropped: Counter[str] | None = None) -> Record | Rejected:
    """One record by a converter (which `converter_problems` finds nothing in); `dropped` counts keys of turns."""
    identity = str(record["id"])
    if "messages" not in converter:
        column, template = converter.get("text", "text"), converter.get("template")
        fields = {key: value for key, value in record.items() if key != "messages" or column == "messages"}
        field = TextField(str(column), None if template is None else str(template))
        taken = field.take(Raw(identity, identity, fields), identity)
        if isinstance(taken, Rejected) or "replace" not in converter:
            return taken
        text = str(taken["text"])
        for old, new in converter["replace"].items():
            text = text.replace(old, new)
        return {**taken, "text": text} if text.strip() else Rejected(identity, "empty", "only marks are in it")
    rules: Mapping[str, object] = converter["messages"]
    try:
        turns = _of_turns(record, rules, dropped) if "conversations" in rules else _of_columns(record, rules)
        if (column := rules.get("system")) and str(record.get(str(column)) or "").strip():
            turns.insert(0, {"role": "system", "content": str(record[str(column)])})
        _check(turns)
    except _Unfit as unfit:
        return Rejected(identity, unfit.reason, unfit.detail, json.dumps(record, ensure_ascii=False, default=str)[:200])
    used = _columns(rules)
    return {**{key: value for key, value in record.items() if key == "id" or key not in used}, "messages": turns}


class _Unfit(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail


def _columns(rules: Mapping[str, object]) -> set[object]:
    """The columns of the source that a conversation is made of."""
    values = [rules[name] for name in ("conversations", "prompt", "response", "history", "system") if name in rules]
    return {column for value in values for column in (value if isinstance(value, list) else [value])}


def _of_turns(record: Record, rules: Mapping[str, object], dropped: Counter[str] | None) -> list[dict[str, str]]:
    column, role_key, content_key = rules["conversations"], rules.get("role", "role"), rules.get("content", "content")
    value = record.get(str(column))
    if isinstance(value, str):  # CSV and some Parquet files hold the list as JSON
        try:
            value = json.loads(value)
        except ValueError:
            raise _Unfit("no_turns", f"{column!r} is a string that is no JSON") from None
    if not isinstance(value, list) or not value:
        raise _Unfit("no_turns", f"{column!r} is not a list of turns (fields {', '.join(record)})")
    roles = {**ROLES, **rules.get("roles", {})}
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
            got = ", ".join(map(str, turn)) if isinstance(turn, dict) else type(turn).__name__
            raise _Unfit("bad_turn", f"a turn of {column!r} has no {role_key!r} and {content_key!r} but {got}")
        role = roles.get(turn[role_key], roles.get(str(turn[role_key]).lower()))
        if role is None:
            raise _Unfit("unknown_role", f"a turn is by {turn[role_key]!r}, which is none of {', '.join(roles)}")
        turns.append({"role": role, "content": turn[content_key]})
        if dropped is not None:
            others = (key for key in turn if key not in (role_key, content_key))
            dropped.update(str(key) for key in others if turn[key] not in (None, ""))
    return turns


def _of_columns(record: Record, rules: Mapping[str, object]) -> list[dict[str, str]]:
    columns = rules["prompt"] if isinstance(rules["prompt"], list) else [rules["prompt"]]
    asked = [record.get(column) for column in columns]
    if all(value is None for value in asked):
        raise _Unfit("no_turns", f"there is no {' or '.join(columns)} (fields {', '.join(record)})")
    history = record.get(str(rules["history"])) if "history" in rules else None
    turns = []
    for pair in history if isinstance(history, list) else []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise _Unfit("bad_turn", f"a part of {rules['history']!r} is no [question, answer]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    prompt = "\n".join(str(value) for value in asked if value is not None and str(value).strip())
    answer = record.get(str(rules["response"]))
    return [*turns, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _check(turns: list[dict[str, str]]) -> None:
    for turn in turns:
        content = turn["content"]
        if not isinstance(content, str):
            raise _Unfit("bad_turn", f"what the {turn['role']} says is {type(content).__name__}, not a string")
        if not content.strip():
            raise _Unfit("empty_turn", f"the {turn['role']} says nothing")
        try:
            content.encode()
        except UnicodeEncodeError:
            raise _Unfit("not_unicode", f"what the {turn['role']} says holds half of a surrogate pair") from None
    if not any(turn["role"] == "assistant" for turn in turns):
        raise _Unfit("no_answer", "nobody answers: there is no turn of the assistant")
