"""The shuffle is a permutation, and looks like one that is drawn."""

from __future__ import annotations

import itertools

import pytest

from pellucid.train.data.shuffle import Shuffle, mix


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 4095, 4096, 4097, 9999])
def test_each_place_comes_once(size: int):
    for seed in (0, 1):
        shuffle = Shuffle(size, seed)
        assert sorted(shuffle[place] for place in range(size)) == list(range(size))


def test_seeds_give_orders_of_their_own():
    orders = {tuple(Shuffle(50, seed)[place] for place in range(50)) for seed in range(200)}
    assert len(orders) == 200
    assert Shuffle(50, 7)[3] == Shuffle(50, 7)[3]


def test_all_orders_of_four_things_come_about_equally_often():
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(4800):
        shuffle = Shuffle(4, seed)
        order = tuple(shuffle[place] for place in range(4))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert all(130 < count < 270 for count in counts.values())  # 200 expected, deviation 14


def test_neighbours_are_torn_apart_like_in_a_random_order():
    size = 10_000
    shuffle = Shuffle(size, 3)
    order = [shuffle[place] for place in range(size)]
    apart = [abs(a - b) for a, b in itertools.pairwise(order)]
    assert sum(apart) / len(apart) == pytest.approx(size / 3, rel=0.03)  # of a random order: n / 3
    rises = sum(a < b for a, b in itertools.pairwise(order))
    assert rises / size == pytest.approx(0.5, abs=0.02)
    fixed = sum(place == found for place, found in enumerate(order))
    assert fixed < 8  # 1 expected
    for part in range(10):  # each tenth of the order comes from everywhere
        some = order[part * 1000 : (part + 1) * 1000]
        assert sum(some) / 1000 == pytest.approx(size / 2, rel=0.08)


def test_any_size_takes_no_memory():
    shuffle = Shuffle(10**15 + 7, 1)
    found = [shuffle[place] for place in range(2000)]
    assert len(set(found)) == 2000
    assert min(found) < 10**13
    assert max(found) > 99 * 10**13
    with pytest.raises(IndexError):
        shuffle[10**15 + 7]
    with pytest.raises(ValueError, match="expected 1 or more"):
        Shuffle(0, 1)


@pytest.mark.parametrize(("size", "seed"), [(1, 0), (4, 5), (5, 2), (100, 7), (1000, 2**40)])
def test_the_order_is_that_of_the_network_as_written(size: int, seed: int):
    """A run that goes on in a later version reads what it would have read."""
    half = 1
    while 4**half < size:
        half += 1
    order = []
    for place in range(size):
        while True:
            left, right = divmod(place, 2**half)
            for number in range(6):
                scrambled = mix(right ^ mix(6 * seed + number))
                left, right = right, left ^ (scrambled % 2**half)
            place = left * 2**half + right
            if place < size:
                break
        order.append(place)
    shuffle = Shuffle(size, seed)
    assert [shuffle[place] for place in range(size)] == order


def test_mix_is_splitmix64():
    # First outputs for seed 1234567, as published with the generator (Vigna, splitmix64.c).
    gamma, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    found = [mix(1234567 + number * gamma & mask) for number in range(3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]
