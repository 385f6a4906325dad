"""Test the choice of some of the calibration windows."""

from __future__ import annotations

import pytest

from optimum_modegpt.decompositions.scattered import scattered


@pytest.mark.parametrize("total", [1, 2, 7, 56, 64])
@pytest.mark.parametrize("share", [1, 2, 3, 8])
def test_every_stretch_has_one_index(total, share):
    count = -(-total // share)
    bounds = [stretch * total // count for stretch in range(count + 1)]
    chosen = sorted(scattered(total, count))
    assert len(chosen) == count
    assert all(bounds[i] <= index < bounds[i + 1] for i, index in enumerate(chosen))


@pytest.mark.parametrize("share", [2, 3, 4, 8])
@pytest.mark.parametrize("texts", [2, 3, 4])
def test_every_text_of_a_mixture_has_its_share(share, texts):
    # The windows of a mixture alternate, so text i has the windows i, i + texts, ….
    chosen = scattered(128, 128 // share)
    for text in range(texts):
        own = sum(index % texts == text for index in chosen)
        assert own >= 0.5 * len(chosen) / texts


def test_texts_one_after_another_have_their_share():
    assert sum(index < 32 for index in scattered(64, 8)) == 4
