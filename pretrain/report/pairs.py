"""Held-out pairs on the page: similarity matrix, nearest neighbours, best and worst pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.report import thumbs
from pretrain.report.html import Html, join, picture, tag
from pretrain.report.likeness import Likeness
from pretrain.report.maps import maps

LONGEST = 160
"""Characters of a caption."""


@dataclass(frozen=True)
class Shown:
    """How many pictures a page can hold."""

    side: int = 96
    """Pixels of a thumbnail."""
    matrix: int = 10
    queries: int = 6
    answers: int = 5
    extremes: int = 6
    """Best pairs, and worst."""


def section(like: Likeness, shown: Shown) -> Html:
    """All about the pairs of one run."""
    pairs = like.pairs
    about = (
        f"{len(pairs):,} pairs from all over data.eval, in the {pairs.source}. For {like.found:.0%} of the images the "
        "likest of these captions is one of their own. Numbers are cosine similarities."
    )
    board = _Board(like, shown)
    return join(
        [
            tag("p", about),
            tag("div", board.matrix(), board.overview(), class_="beside"),
            tag("h3", "Likest captions of an image", class_="sub"),
            tag("ul", *(board.of_image(int(n)) for n in like.some(shown.queries)), class_="pairs"),
            tag("h3", "Likest images of a caption", class_="sub"),
            tag("ul", *(board.of_caption(int(n)) for n in like.some(shown.queries)), class_="pairs"),
            tag("h3", "Worst pairs", class_="sub"),
            tag("p", "Own caption least above, or furthest below, the likest wrong one.", class_="soft"),
            tag("ul", *(board.pair(n) for n in like.worst(shown.extremes)), class_="pairs"),
            tag("h3", "Best pairs", class_="sub"),
            tag("ul", *(board.pair(n) for n in like.best(shown.extremes)), class_="pairs"),
            tag("h3", "Map of both modalities", class_="sub"),
            maps(like),
        ]
    )


@dataclass(frozen=True)
class _Board:
    """Draws pieces of one likeness."""

    like: Likeness
    shown: Shown

    def image(self, n: int, side: int) -> Html:
        alt = f"held-out image {n + 1}, whose caption is: {short_caption(self.like.pairs.captions[n])}"
        return picture(thumbs.jpeg(self.like.pairs.pixels[n], self.shown.side), alt, side)

    def matrix(self) -> Html:
        """A table: rows are images with their captions, columns the same captions by number."""
        some = self.like.some(self.shown.matrix)
        part = self.like.cosines[np.ix_(some, some)]
        low, span = float(part.min()), float(np.ptp(part)) or 1.0
        heads = [tag("th", str(k + 1), scope="col", title=self._caption(int(n))) for k, n in enumerate(some)]
        rows = [self._row(k, some, (part[k] - low) / span) for k in range(len(some))]
        body = tag("table", tag("thead", tag("tr", tag("th", "image and caption"), *heads)), tag("tbody", *rows))
        grid = Html(body.replace("<table>", '<table class="matrix">', 1))
        about = (
            "Images (rows) and captions (columns, by the number of the row that they belong to); own ones are framed."
        )
        scroll = tag("div", grid, class_="scroll", tabindex="0", role="region", aria_label="Similarity matrix")
        return tag("figure", tag("figcaption", tag("h3", "Similarity matrix"), tag("p", about)), scroll, class_="card")

    def overview(self) -> Html:
        """All pairs as one picture."""
        cosines, right = self.like.cosines, self.like.right
        own = float(np.diag(cosines).mean())
        rest = float(cosines[~right].mean()) if (~right).any() else float("nan")
        words = f"Mean {own:.3f} on the diagonal, {rest:.3f} where the caption is another image's."
        alt = f"Similarities of {len(cosines)} images (rows) and {len(cosines)} captions (columns). {words}"
        drawn = picture(thumbs.heat(cosines), alt, len(cosines), "png", class_="overview")
        scale = f"Dark is {cosines.min():.2f}, bright {cosines.max():.2f}; a bright diagonal is what training is for."
        heading = tag("figcaption", tag("h3", f"All {len(cosines)} pairs"), tag("p", f"{words} {scale}"))
        return tag("figure", heading, drawn, class_="card", tabindex="0")

    def of_image(self, n: int) -> Html:
        answers = [self._answer(n, k) for k in self.like.captions_of(n, self.shown.answers)]
        own = tag("small", f"own: {self._caption(n)}")
        return tag("li", self.image(n, 72), tag("div", tag("ol", *answers, class_="answers"), own, style="width:100%"))

    def of_caption(self, n: int) -> Html:
        figures = [self._found(n, k) for k in self.like.images_of(n, self.shown.answers)]
        return tag("li", tag("div", tag("p", f"“{self._caption(n)}”"), tag("div", *figures, class_="strip")))

    def pair(self, n: int) -> Html:
        like, wrong = self.like, self.like.likest_wrong(n)
        words = [tag("p", self._caption(n)), tag("small", f"own caption {like.cosines[n, n]:.3f}")]
        if wrong is not None:
            words.append(tag("small", f"likest wrong one {like.cosines[n, wrong]:.3f}: {self._caption(wrong)}"))
            kind = "good" if like.margins[n] > 0 else "bad"
            verdict = "right by" if like.margins[n] > 0 else "wrong by"
            words.append(tag("small", tag("b", f"{verdict} {abs(like.margins[n]):.3f}", class_=kind)))
        return tag("li", self.image(n, 72), tag("div", *words))

    def _row(self, k: int, some: Sequence[int] | np.ndarray, shares: np.ndarray) -> Html:
        n = int(some[k])
        head = tag("span", tag("em", f"{k + 1}. {self._caption(n)}"), self.image(n, 38))
        cells = [self._cell(n, int(m), float(share)) for m, share in zip(some, shares, strict=True)]
        return tag("tr", tag("th", head, scope="row"), *cells)

    def _cell(self, n: int, m: int, share: float) -> Html:
        kind = "own" if self.like.right[n, m] else None
        value = f"{self.like.cosines[n, m]:.2f}"
        return tag("td", value, class_=kind, style=f"--v:{share:.2f}", title=self._caption(m))

    def _answer(self, n: int, k: int) -> Html:
        own = bool(self.like.right[n, k])
        sign = tag("span", "✓", class_="good", title="its own") if own else tag("span", "·", class_="soft")
        words = tag("span", self._caption(k), class_="good" if own else None)
        return tag("li", sign, words, tag("b", f"{self.like.cosines[n, k]:.3f}"))

    def _found(self, n: int, k: int) -> Html:
        own = bool(self.like.right[k, n])
        words = f"{'✓ ' * own}{self.like.cosines[k, n]:.3f}"
        return tag("figure", self.image(k, 56), tag("figcaption", words), class_="own" if own else None)

    def _caption(self, n: int) -> str:
        return short_caption(self.like.pairs.captions[n])


def short_caption(words: str) -> str:
    """A caption on one line, cut where it is long."""
    line = " ".join(words.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"
