"""Which links count as cut, by what ranks say with their answers."""

from __future__ import annotations

import pytest

from elastic.engine.cut_links import Changes, CutLinks

pytestmark = pytest.mark.unit

NOTHING = Changes([], [])


def test_a_link_is_cut_once_two_answers_in_a_row_say_so_and_back_with_the_first_that_does_not() -> None:
    links = CutLinks()
    assert links.answered(0, [2, 3], ()) == NOTHING
    assert links.answered(0, [3, 2], ()) == Changes([2, 3], [])
    assert links.answered(0, [2, 3], ()) == NOTHING
    assert links.answered(0, [3], ()) == Changes([], [2])
    assert links.answered(0, [], ()) == Changes([], [3])
    assert links.answered(0, [], ()) == NOTHING


def test_a_rank_that_dies_is_no_cut_link() -> None:
    """Its peers miss it before it is masked, or report it in the same moment."""
    links = CutLinks()
    assert links.answered(0, [2], ()) == NOTHING
    assert links.answered(0, [2], {2}) == NOTHING
    assert links.answered(0, [2], ()) == NOTHING, "one answer only since it is not masked"


def test_a_cut_link_with_a_rank_that_is_masked_is_not_back() -> None:
    links = CutLinks()
    links.answered(0, [2], ())
    assert links.answered(0, [2], ()) == Changes([2], [])
    assert links.answered(0, [], {2}) == NOTHING


def test_each_side_is_reported() -> None:
    links = CutLinks()
    links.answered(0, [2], ())
    links.answered(2, [0], ())
    assert links.answered(0, [2], ()) == Changes([2], [])
    assert links.answered(2, [0], ()) == Changes([0], [])


def test_a_view_keeps_what_is_known_of_its_members_only() -> None:
    links = CutLinks()
    for _ in range(2):
        links.answered(0, [2, 3], ())
        links.answered(3, [0], ())
    links.adopt([0, 2])
    assert links.answered(0, [2, 3], ()) == NOTHING
    assert links.answered(0, [], ()) == Changes([], [2])
    assert links.answered(3, [], ()) == NOTHING
