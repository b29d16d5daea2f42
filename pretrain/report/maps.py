"""Two flat maps of features: as they lie, and without the gap between the modalities."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pretrain.report import thumbs
from pretrain.report.html import Html, picture, tag
from pretrain.report.likeness import Flat, Likeness, flatten
from pretrain.report.scales import place

WIDTH, HEIGHT, AIR, THUMB = 480.0, 380.0, 24.0, 26
MOST, THUMBS, LABELS, LETTERS = 150, 24, 9, 24
"""Pairs, pictures and captions on a map; letters of a caption."""
Points = NDArray[np.float64]


def maps(like: Likeness) -> Html:
    """Both maps, side by side where there is room."""
    about = (
        ("As they lie", "Two clouds apart are the gap between the modalities.", False),
        ("Each modality centred", "What is left without the gap: pairs should be neighbours.", True),
    )
    figures = [_figure(like, title, words, flatten(like.pairs, centred)) for title, words, centred in about]
    return tag("div", *figures, class_="grid-cards wide-cards")


def _figure(like: Likeness, title: str, words: str, flat: Flat) -> Html:
    images, texts = _placed(flat)
    some = np.unique(np.linspace(0, len(images) - 1, MOST).round().astype(int))
    ties = [_tie(images[n], texts[n]) for n in some]
    dots = [_dot(images[n], "image", like.pairs.captions[n]) for n in some]
    dots += [_triangle(texts[n], like.pairs.captions[n]) for n in some]
    taken: list[tuple[float, float, float, float]] = []
    parts = [*ties, *dots, *_pictures(like, images, some, taken), *_labels(like, texts, taken)]
    label = f"{title}: principal components of image and caption features. {words}"
    svg = tag("svg", *parts, viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", role="img", aria_label=label, class_="map")
    share = f" {flat.share:.0%} of the spread lies in this plane; lines join pairs."
    legend = tag("ul", tag("li", "● image"), tag("li", "▲ caption"), class_="legend kinds")
    caption = tag("figcaption", tag("h3", title), tag("p", words + share), legend)
    return tag("figure", caption, svg, class_="card", tabindex="0")


def _placed(flat: Flat) -> tuple[Points, Points]:
    """In the picture's units, the same scale across and up."""
    both = np.concatenate([flat.images, flat.texts])
    middle, reach = (both.max(0) + both.min(0)) / 2, np.ptp(both, axis=0) / 2
    room = np.array([WIDTH / 2 - AIR, HEIGHT / 2 - AIR])
    scale = float((room / np.maximum(reach, 1e-9)).min())
    middle_of_all = np.array([WIDTH / 2, HEIGHT / 2])
    images, texts = ((part - middle) * scale + middle_of_all for part in (flat.images, flat.texts))
    return images, texts


def _tie(one: Points, other: Points) -> Html:
    path = f"M{place(one[0])} {place(one[1])}L{place(other[0])} {place(other[1])}"
    return tag("path", d=path, class_="tie")


def _dot(at: Points, kind: str, words: str) -> Html:
    circle = tag("circle", cx=place(at[0]), cy=place(at[1]), r="3.2", class_=kind)
    return tag("g", tag("title", f"{kind} of: {words[:100]}"), circle)


def _triangle(at: Points, words: str) -> Html:
    path = tag("path", d=f"M{place(at[0])} {place(at[1] - 4)}l4 7h-8z", class_="caption")
    return tag("g", tag("title", f"caption: {words[:100]}"), path)


def _pictures(
    like: Likeness, at: Points, some: NDArray[np.int64], taken: list[tuple[float, float, float, float]]
) -> Iterator[Html]:
    """Thumbnails where they cover no other one."""
    count = 0
    for n in some:
        x, y = float(at[n, 0]) - THUMB / 2, float(at[n, 1]) - THUMB / 2
        if count < THUMBS and _free((x, y, THUMB, THUMB), taken):
            count += 1
            image = picture(thumbs.jpeg(like.pairs.pixels[n], 2 * THUMB), "", THUMB)
            yield Html(image.replace("<img src=", "<image href=").replace(' alt=""', f' x="{x:.1f}" y="{y:.1f}"'))


def _labels(like: Likeness, at: Points, taken: list[tuple[float, float, float, float]]) -> Iterator[Html]:
    """Captions beside their triangles where they cover nothing that is labelled."""
    count = 0
    for n in like.different:
        words = " ".join(like.pairs.captions[n].split())
        words = words if len(words) <= LETTERS else f"{words[: LETTERS - 1]}…"
        x, y, width = float(at[n, 0]), float(at[n, 1]), 5.0 * len(words)
        left = x + 7 if x + 7 + width < WIDTH else x - 7 - width
        if count < LABELS and left > 0 and _free((left, y - 6, width, 12), taken):
            count += 1
            yield tag("text", words, x=place(left), y=place(y + 3))


def _free(box: tuple[float, float, float, float], taken: list[tuple[float, float, float, float]]) -> bool:
    """Whether a box meets no other one; it then is one of them."""
    x, y, width, height = box
    free = not any(x < a + w and a < x + width and y < b + h and b < y + height for a, b, w, h in taken)
    if free:
        taken.append(box)
    return free
