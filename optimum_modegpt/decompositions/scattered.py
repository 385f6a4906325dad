"""Choose some of the calibration windows such that every text of a mixture is among them."""

from __future__ import annotations

from itertools import pairwise

GOLDEN_RATIO = (5**0.5 - 1) / 2


def scattered(total: int, count: int) -> set[int]:
    """Return `count` of `total` indices, one in each of `count` stretches of about equal length.

    The windows of a mixture of texts alternate, so indices at equal distances could all be of one text. The place of
    the index in its stretch therefore changes by the golden ratio, whose multiples modulo 1 are spread evenly and have
    no period.
    """
    bounds = [stretch * total // count for stretch in range(count + 1)]
    places = [(0.5 + stretch * GOLDEN_RATIO) % 1 for stretch in range(count)]
    return {start + int(place * (end - start)) for place, (start, end) in zip(places, pairwise(bounds), strict=True)}
