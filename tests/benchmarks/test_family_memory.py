"""Memory of other families, counted on fake tensors."""

import pytest

from benchmarks.memory.cards import family_cards
from benchmarks.memory.family_memory import count, in_four_bits


@pytest.mark.slow
@pytest.mark.parametrize("name, billions, text_billions", [("SDXL base", 2.57, 0.82), ("SD 3 medium", 2.03, 5.58)])
def test_sizes_are_those_of_the_released_models(name, billions, text_billions):
    """Two bytes a weight and LoRA; each part holds at least what it says, and text encoders only while they encode."""
    gib, sizes = count(name)
    less = in_four_bits(gib, sizes)
    # Of SDXL a quarter are convolutions.
    assert 0.25 * gib["network"] < less["network"] < 0.55 * gib["network"]
    assert less["text encoders"] == gib["text encoders"] and less["tuning"] < gib["tuning"]
    assert gib["network"] == pytest.approx(2e9 * billions / 2**30, rel=0.03)
    assert gib["text encoders"] == pytest.approx(2e9 * text_billions / 2**30, rel=0.03)
    assert gib["encoding"] >= gib["network"] + gib["text encoders"]
    assert gib["network"] < gib["tuning"] < gib["network"] + 2 and gib["network"] < gib["drawing"]


def test_the_smallest_card_holds_the_largest_part():
    gib = {"network": 4.0, "text encoders": 9.0, "encoding": 14.4, "tuning": 5.0, "drawing": 6.0}
    _, rows = family_cards({"a": gib, "b": gib | {"encoding": 90.0}})
    assert [row[-1] for row in rows] == ["16 GB", "-"]
