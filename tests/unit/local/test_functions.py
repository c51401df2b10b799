"""Functions here are told what Lambda tells them."""

import time

from local.seams import functions
from local.seams.functions import Sampling


def test_the_first_invocation_of_each_second_is_traced_and_few_others(monkeypatch):
    now, drawn = [1000.2], iter([0.9, 0.01, 0.5])
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(functions.random, "random", lambda: next(drawn))
    sampling = Sampling()
    assert [sampling.takes("one") for _ in range(3)] == [True, False, True]  # the third by its draw
    assert sampling.takes("another") is True
    now[0] = 1001.0
    assert [sampling.takes("one"), sampling.takes("one")] == [True, False]
