"""judge: every expected seam is answered, nothing compared is not a pass, and the verdict names the worst."""

from __future__ import annotations

import numpy as np
import pytest

from harness.bounds import Bound, Bounds
from harness.greedy import greedy
from harness.ladder import exact, judge
from harness.verdict import Outcome, Verdict, worst


def bound(metric: str, limit: float, **more: str) -> Bound:
    return Bound("decoder", metric, limit, 0.0, "a test", "2026-11-23", **more)


BOUNDS = Bounds([bound("rel_l2", 1e-5), bound("worst_token", 1e-4)])
RNG = np.random.default_rng(0)
REFERENCE = {"decoder.layers.00": RNG.standard_normal((20, 8)), "logits": RNG.standard_normal((20, 16))}
SEAMS = tuple(REFERENCE)


def outcomes(candidate, expected=SEAMS, reference=REFERENCE, **settings):
    return [verdict.outcome for verdict in judge("decoder", "c", expected, reference, {"": candidate}, BOUNDS, **settings)]


def test_equal_passes():
    assert outcomes({name: array.copy() for name, array in REFERENCE.items()}) == [Outcome.PASS] * 2


def test_nothing_expected_is_an_error():
    assert outcomes(REFERENCE, expected=())[0] is Outcome.ERROR


@pytest.mark.parametrize("spoil, outcome", [
    (lambda trace: trace.pop("logits"), Outcome.ERROR),
    (lambda trace: trace.update(more=np.ones((20, 8))), Outcome.ERROR),
    (lambda trace: trace.update(logits=np.zeros((20, 16))), Outcome.FAIL),
    (lambda trace: trace.update(logits=np.full((20, 16), np.nan)), Outcome.FAIL),
    (lambda trace: trace.update(logits=trace["logits"][:1]), Outcome.FAIL),
    (lambda trace: trace.update(logits=trace["logits"] * 1.001), Outcome.FAIL),
])
def test_no_spoiled_trace_passes(spoil, outcome):
    trace = dict(REFERENCE)
    spoil(trace)
    assert worst(outcomes(trace)) is outcome


def test_a_zero_reference_proves_nothing():
    zero = {name: np.zeros_like(array) for name, array in REFERENCE.items()}
    assert outcomes(zero, reference=zero) == [Outcome.ERROR] * 2


def test_a_seam_without_bound_is_an_error():
    found = judge("vision", "c", SEAMS, REFERENCE, {"": REFERENCE}, BOUNDS)
    assert {verdict.outcome for verdict in found} == {Outcome.ERROR}


def test_an_error_on_few_text_tokens_does_not_hide_behind_the_image():
    reference = {"decoder.layers.00": np.concatenate([1e4 * np.ones((200, 4)), np.ones((4, 4))])}
    candidate = {"decoder.layers.00": reference["decoder.layers.00"].copy()}
    candidate["decoder.layers.00"][-4:] *= 1.0001
    bounds = Bounds([bound("rel_l2", 1e-5)])
    hidden = judge("decoder", "c", ["decoder.layers.00"], reference, {"": candidate}, bounds)
    shown = judge("decoder", "c", ["decoder.layers.00"], reference, {"": candidate}, bounds,
                  regions={"image": np.arange(200), "text": np.arange(200, 204)})
    assert (hidden[0].outcome, shown[0].outcome) == (Outcome.PASS, Outcome.FAIL)
    assert "text tokens" in shown[0].reason


def test_the_last_matching_bound_wins_and_knows_its_engine():
    bounds = Bounds([bound("rel_l2", 1e-5), bound("rel_l2", 1.0, engine="coreai-*")])
    assert bounds.limit("decoder", "rel_l2", "logits", "coreai-cpu-linux:int8hu:h64") == 1.0
    assert bounds.limit("decoder", "rel_l2", "logits", "torch") == 1e-5


def test_exact_names_the_first_difference():
    verdict = exact("contract", "c", "planes", np.arange(6).reshape(2, 3), np.array([[0, 1, 2], [3, 9, 5]]), "planes")
    assert verdict.outcome is Outcome.FAIL and "[1, 1]: 9 where 4" in verdict.reason
    assert exact("contract", "c", "x", np.arange(0), np.arange(0), "x").outcome is Outcome.ERROR


LOGITS = np.array([[0.0, 5.0, 1.0], [2.0, 1.99, 0.0], [0.0, 0.0, 9.0]])


def test_greedy_tells_a_tie_from_a_flip():
    tokens = LOGITS.argmax(-1)
    tied, flipped = LOGITS.copy(), LOGITS.copy()
    tied[1] = [1.9, 2.0, 0.0]
    flipped[0] = [9.0, 5.0, 1.0]
    assert greedy("tokens", "c", "tokens", tokens, LOGITS, LOGITS, 0.0).outcome is Outcome.PASS
    assert greedy("tokens", "c", "tokens", tokens, LOGITS, tied, 0.02).outcome is Outcome.PASS
    assert greedy("tokens", "c", "tokens", tokens, LOGITS, tied, 0.001).outcome is Outcome.FAIL
    assert "step 0 gives 0 where 1" in greedy("tokens", "c", "tokens", tokens, LOGITS, flipped, 0.02).reason


def test_greedy_passes_neither_nan_nor_nothing():
    bad = np.full_like(LOGITS, np.nan)
    assert greedy("tokens", "c", "tokens", LOGITS.argmax(-1), LOGITS, bad, 1e9).outcome is Outcome.FAIL
    empty = np.zeros((0, 3))
    assert greedy("tokens", "c", "tokens", np.zeros(0, int), empty, empty, 1.0).outcome is Outcome.ERROR


def test_worst_of_nothing_is_an_error_and_a_fault_outweighs_a_gap():
    assert worst([]) is Outcome.ERROR
    assert worst([Outcome.PASS, Outcome.ERROR, Outcome.FAIL]) is Outcome.FAIL
    assert worst([Outcome.PASS, Outcome.SKIP]) is Outcome.SKIP


def test_verdict_records_survive_json():
    import json

    verdict = Verdict("decoder", "c", "logits", Outcome.FAIL, "why", "rel_l2", float("inf"), 1e-5, figures={"a": float("nan")})
    again = Verdict.from_record(json.loads(json.dumps(verdict.record(), allow_nan=False)))
    assert (again.outcome, again.value, again.id) == (Outcome.FAIL, float("inf"), "decoder[c-logits]")
