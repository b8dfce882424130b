"""The files of a walk: a figure for each step that is worth one, and one page for all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pellucid.files import file_beside, write_whole
from pellucid.show.digest import Digest, digest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pellucid.walk import Step

_DRAWN = re.compile(
    r"(second_)?rope\.cis|embed|layers\.\d+\.attn\.(q|scores|capped_scores|masked_scores|pattern)"
)


class WalkFiles:
    """Draws figures as their steps come by, and keeps of every step what the page shows.

    token_strings  the text of each token of the prompt, for the axes
    plots          folder for the figures, made if it is not there; None: no figures
    page           HTML file to write; None: no page
    lines          from the name of a step to its lines of resolved code, for the page
    """

    def __init__(
        self,
        token_strings: Sequence[str],
        *,
        lines: Callable[[str], Sequence[str]],
        plots: Path | None = None,
        page: Path | None = None,
    ) -> None:
        self._lines = lines
        self.token_strings, self.plots, self.page = token_strings, plots, page
        self.figures: list[Path] = []
        self._digests: list[Digest] = []
        if plots is not None:
            plots.mkdir(parents=True, exist_ok=True)

    def add(self, step: Step) -> None:
        """Take what the files need of a step; the tensor itself is not kept."""
        if self.page is not None:
            source = "\n".join(self._lines(step.name)) if step.source else ""
            self._digests.append(replace(digest(step), source=source))
        if self.plots is not None and _DRAWN.fullmatch(step.name):
            from pellucid.show import figures

            drawn = figures.figure(step, self.token_strings)
            if drawn is not None:
                self._save(drawn[0], step.address)

    def write(self, result: Mapping[str, Any]) -> None:
        """The figure of the likeliest next tokens and the page, from the walk's JSON object."""
        if self.plots is not None:
            from pellucid.show import figures

            texts = [entry["text"] for entry in result["top"]]
            shares = [entry["probability"] for entry in result["top"]]
            self._save(figures.top_tokens(texts, shares)[0], "logits")
        if self.page is not None:
            from pellucid.show.walk_page import page

            write_whole(self.page, page(result, self._digests))

    def written(self) -> dict[str, str]:
        """What was written -> where."""
        places = {}
        if self.plots is not None:
            places["figures"] = f"{self.plots}  ({len(self.figures)} files)"
        if self.page is not None:
            places["page"] = str(self.page)
        return places

    def _save(self, drawn: Figure, address: str) -> None:
        from pellucid.show import figures

        assert self.plots is not None, "figures are drawn where there is a folder for them"
        path = self.plots / f"{file_name(address)}.png"
        with file_beside(path) as beside:
            figures.save(drawn, beside)
        self.figures.append(path)


def file_name(address: str) -> str:
    """An address as the name of a file: ``layers.0.attn.q[3]`` -> ``layers.0.attn.q-3``."""
    return re.sub(r"[^\w.]+", "-", address).strip("-")
