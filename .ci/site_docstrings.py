"""Extension of griffe, which reads docstrings for the site: `name: what it is.` in their prose becomes an item of a list."""

import re
from typing import Any

import griffe


class ArgumentsAsLists(griffe.Extension):
    """Parameters of functions and fields of classes, wherever a sentence begins with them."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is None or not (obj.is_function or obj.is_class):
            return
        names = [parameter.name.lstrip("*") for parameter in obj.parameters]
        names += [name for name, member in obj.members.items() if member.is_attribute] if obj.is_class else []
        obj.docstring.value = with_lists(obj.docstring.value, names)


def with_lists(text: str, names: list[str]) -> str:
    """`a: one. b, c: two.` as a list; `Returns`, `Raises` and `Source` begin a paragraph."""
    if names:
        either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        text = re.sub(rf"(?:^|(?<=[.] )|(?<=[.]\) ))((?:{either})(?:, (?:{either}))*): ", r"\n\n- `\1`: ", text, flags=re.M)
    return re.sub(r"^(Returns|Raises|Source:?) ", r"\n\1 ", text, flags=re.M)
