"""A graphviz graph that says how to get Graphviz where it is missing."""

from __future__ import annotations

from typing import Any

import graphviz

from autoshard.errors import InputError

HOW_TO_GET_DOT = (
    "Graphviz's program `dot` was not found, which turns pictures into SVG, PNG or PDF: install it (apt-get install graphviz, "
    "brew install graphviz, conda install graphviz), or write the DOT text with picture.save(path) and render it elsewhere"
)


class Picture(graphviz.Digraph):
    """A graphviz.Digraph: `.source` is the DOT text, `.save(path)` writes it, `.render(outfile="plan.svg")` draws it by `dot`.

    In a notebook it shows itself, as text where there is no `dot`.
    """

    def pipe(self, *args: Any, **kwargs: Any) -> Any:
        """As graphviz.Digraph.pipe. Raises InputError where there is no `dot`."""
        try:
            return super().pipe(*args, **kwargs)
        except graphviz.ExecutableNotFound as error:
            raise InputError(HOW_TO_GET_DOT) from error

    def render(self, *args: Any, **kwargs: Any) -> str:
        """As graphviz.Digraph.render. Raises InputError where there is no `dot`."""
        try:
            return super().render(*args, **kwargs)
        except graphviz.ExecutableNotFound as error:
            raise InputError(HOW_TO_GET_DOT) from error

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **kwargs: Any) -> dict[str, str]:
        try:
            return super()._repr_mimebundle_(include, exclude, **kwargs)
        except InputError as error:
            return {"text/plain": f"{error}\n\n{self.source}"}
