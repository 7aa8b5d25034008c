"""The queue that serves keys in turn, against a simulation of it; and the shares of the device."""

import random

import pytest

from catversion_jax.serving.errors import ApiError
from catversion_jax.serving.fair_queue import FairQueue
from catversion_jax.serving.share import Shares


def queue(most=1000, of_one=1000):
    return FairQueue(most, of_one, "pictures", lambda: 2.0)


def anything(one, other):
    return True


def test_keys_take_turns_however_much_one_has():
    waiting = queue()
    for number in range(50):
        waiting.put("greedy", ("greedy", number))
    for owner in ("ada", "bo"):
        for number in range(2):
            waiting.put(owner, (owner, number))
    assert [owner for owner, _ in waiting.take(6, anything)] == ["greedy", "ada", "bo"] * 2
    assert waiting.take(2, anything) == [("greedy", 2), ("greedy", 3)]


def test_what_cannot_be_drawn_together_waits_for_its_own_turn():
    waiting = queue()
    for item in (("ada", "small"), ("bo", "large"), ("ada", "large"), ("cy", "small")):
        waiting.put(item[0], item)

    def same_size(one, other):
        return one[1] == other[1]

    assert waiting.would_take(4, same_size) == 2
    assert waiting.take(4, same_size) == [("ada", "small"), ("cy", "small")]
    assert waiting.take(4, same_size) == [("bo", "large"), ("ada", "large")]
    assert not waiting.take(4, same_size)


def test_the_place_in_the_queue_is_how_many_are_really_served_first():
    random.seed(0)
    for _ in range(200):
        waiting, items = queue(), []
        for number in range(random.randint(1, 15)):
            items.append((random.choice("abcd"), number))
            waiting.put(items[-1][0], items[-1])
        waiting.take(random.randint(0, 3), anything)
        places = {
            item: waiting.ahead(item[0], lambda one, item=item: one == item) for item in waiting
        }
        for place in range(len(places)):
            (served,) = waiting.take(1, anything)
            assert places[served] == place
        assert waiting.ahead("a", lambda one: True) is None


def test_a_full_queue_says_when_to_come_back():
    waiting = queue(most=5, of_one=3)
    waiting.admit("ada", 3)
    for number in range(3):
        waiting.put("ada", number)
    with pytest.raises(ApiError, match="3 pictures of this key wait and 1 more") as found:
        waiting.admit("ada", 1)
    assert (found.value.status, found.value.headers["Retry-After"]) == (429, "2")
    waiting.admit("bo", 2)
    with pytest.raises(ApiError, match="of all keys wait and 3 more would be above the limit of 5"):
        waiting.admit("bo", 3)
    assert waiting.remove(lambda item: item == 1) == [1]
    waiting.admit("ada", 1)


def test_each_kind_of_work_gets_its_share_of_the_seconds():
    shares, used = Shares(0.75), {"draw": 0.0, "teach": 0.0}
    for _ in range(1000):  # pictures take longer than dispatches
        work = shares.turn(draws=True, teaches=True)
        seconds = {"draw": 3.0, "teach": 0.7}[work]
        used[work] += seconds
        shares.spent(work, seconds)
    assert used["draw"] / sum(used.values()) == pytest.approx(0.75, abs=0.01)


def test_who_was_idle_has_saved_nothing_up():
    shares = Shares(0.5)
    for _ in range(100):
        assert shares.turn(draws=False, teaches=True) == "teach"
        shares.spent("teach", 1.0)
    turns = []
    for _ in range(10):
        turns.append(shares.turn(draws=True, teaches=True))
        shares.spent(turns[-1], 1.0)
    assert turns.count("draw") == 5
    assert shares.turn(draws=False, teaches=False) is None


def test_who_comes_after_a_rest_owes_and_gets_nothing_for_the_time_before():
    shares = Shares(0.75)
    for _ in range(100):  # drawing alone, then nothing, then teaching alone
        assert shares.turn(draws=True, teaches=False) == "draw"
        shares.spent("draw", 1.0)
    shares.turn(draws=False, teaches=False)
    for _ in range(3):
        assert shares.turn(draws=False, teaches=True) == "teach"
        shares.spent("teach", 1.0)
    used = {"draw": 0, "teach": 0}
    for _ in range(40):
        work = shares.turn(draws=True, teaches=True)
        used[work] += 1
        shares.spent(work, 1.0)
    assert used == {"draw": 30, "teach": 10}
