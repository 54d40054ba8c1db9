"""Forwards that wait: they compute what they would alone, leave nothing behind, and do not touch who drives them."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from greenlet import greenlet
from torch import Tensor, nn

from harness.streaming.parked import Parked, driven, parking


@pytest.fixture
def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(3, 3) for _ in range(3))


X = torch.arange(6.0).view(2, 3)


def chain(layers: nn.ModuleList) -> Tensor:
    return layers[2](layers[1](layers[0](X)))


def answer(waiting: Parked, real: dict) -> None:
    waiting.go(real[waiting.at.module](*waiting.at.arguments, **waiting.at.keywords))


def test_a_forward_that_waits_is_the_forward(layers: nn.ModuleList) -> None:
    expected, seen = chain(layers), []
    with parking(layers) as real, torch.no_grad():
        waiting = Parked(lambda: chain(layers))
        while waiting.at is not None:
            seen.append(waiting.at.module)
            answer(waiting, real)
    assert seen == list(layers) and torch.equal(waiting.result, expected)
    assert torch.equal(layers[0](X), nn.functional.linear(X, layers[0].weight, layers[0].bias)), "nothing waits any more"


def test_forwards_take_turns_in_any_order(layers: nn.ModuleList) -> None:
    expected = chain(layers).detach()
    with parking(layers) as real, torch.no_grad():
        first, second, third = (Parked(lambda: chain(layers)) for _ in range(3))
        for waiting in (third, first, third, second, second, third, first, second, first):
            answer(waiting, real)
    assert all(waiting.at is None and torch.equal(waiting.result, expected) for waiting in (first, second, third))


def test_gradients_are_off_in_it_and_as_they_were_around_it(layers: nn.ModuleList) -> None:
    inside: list[bool] = []

    def run() -> Tensor:
        inside.append(torch.is_grad_enabled())
        value = layers[0](X)
        inside.append(torch.is_grad_enabled())
        return layers[1](value)

    with parking(layers) as real:
        first = Parked(run)
        with torch.no_grad():
            second = Parked(run)
        for waiting in (first, second, first, second):  # what begins first also ends first
            assert torch.is_grad_enabled()
            answer(waiting, real)
        left = Parked(run)
        left.close()
    assert torch.is_grad_enabled() and inside == [False] * 5


def test_what_it_raises_is_raised_where_it_is_driven(layers: nn.ModuleList) -> None:
    with pytest.raises(ZeroDivisionError):
        Parked(lambda: 1 / 0)
    with parking(layers) as real:
        waiting = Parked(lambda: chain(layers) / "a word")
        answer(waiting, real)
        answer(waiting, real)
        with pytest.raises(TypeError):
            answer(waiting, real)
        assert waiting.at is None
        waiting.close()


def test_one_that_nobody_drives_any_more_lets_go(layers: nn.ModuleList) -> None:
    ended, held = [], []

    def run() -> Tensor:
        mine = torch.ones(2, 3)
        held.append(weakref.ref(mine))
        try:
            return layers[0](mine)
        finally:
            ended.append(True)

    with parking(layers):
        closed, dropped = Parked(run), Parked(run)
        closed.close()
        closed.close()
        assert ended == [True] and closed.at is None and closed.result is None
        del dropped
        gc.collect()
    assert ended == [True, True] and all(reference() is None for reference in held)


def test_who_is_driven_is_known_whatever_runs_around_it(layers: nn.ModuleList) -> None:
    def program() -> list[bool]:
        found = [driven()]
        with parking(layers) as real:
            waiting = Parked(lambda: (driven(), layers[0](X)))
            found.append(driven())
            answer(waiting, real)
        return [*found, waiting.result[0]]

    assert program() == [False, False, True]
    assert greenlet(program).switch() == [False, False, True], "a program that runs in a greenlet of its own"
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.extend(program()))
    thread.start()
    thread.join()
    assert found == [False, False, True], "and one that runs in a thread"


def test_one_that_is_driven_may_drive_another(layers: nn.ModuleList) -> None:
    expected = chain(layers).detach()
    with parking(layers) as real, torch.no_grad():
        def outer() -> Tensor:
            inner = Parked(lambda: chain(layers))
            while inner.at is not None:
                answer(inner, real)
            return inner.result + layers[0](X)

        waiting = Parked(outer)
        answer(waiting, real)
        assert torch.equal(waiting.result, expected + real[layers[0]](X))
