"""Decode: token by token from the cache, the graph chooses the oracle's tokens, with its logits and its KV cache.

Prefill alone never reads what was written: the prompt goes in at once, the rollout one token a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from harness.engines import Request
from harness.errors import Undecided
from harness.greedy import greedy
from harness.ladder import judge
from harness.metrics import kl_divergence
from harness.plan import cache_seams
from harness.rungs import sketched
from harness.rungs.contract import offset
from harness.rungs.swept import Judged, swept
from harness.subject import Subject, streams
from harness.subject.sweeps import for_all
from harness.trace import Trace
from harness.verdict import Outcome, Verdict

NAME = "decode"
BLOCK = 1 << 22
"""Logits compared at a time."""


def plan(subject: Subject) -> Mapping[str, Sequence[str]]:
    """The cache slot by slot in every layer, then what follows from it: KL over all positions, and tokens."""
    seams = (*cache_seams(subject.geometry.layers), "kl", "tokens", *sketched.lacking_seams(subject))
    return dict.fromkeys(subject.cases, seams)


def measure(subject: Subject, case: str) -> list[Verdict]:
    """One prefill and n single steps against the oracle."""
    if not streams(subject.conversion(subject.grid(case))):
        return _measure(subject, case)
    if "decoded" not in subject.memory:
        swept(subject)  # whose positions are asked for, before the steps of all cases are taken together
        found = Judged()
        for_all(subject, "decoding", subject.conversion, lambda name: found.add(name, lambda: _measure(subject, name)))
        subject.memory["decoded"] = found
    return subject.memory["decoded"].verdicts(case)


def _measure(subject: Subject, case: str) -> list[Verdict]:
    recorded, trace = subject.recorded(case), stepped(subject, case)
    tokens = recorded.rollout.tokens
    first = recorded.inputs.length - 1
    rows = slice(first, first + len(tokens))
    tie = subject.bounds.limit(NAME, "tie_margin", "tokens")
    seams = cache_seams(subject.geometry.layers)
    if subject.by_sketch:
        keys = _unturned(subject, case, recorded.trace.only(seams))
        return [*judge(NAME, case, seams, keys, {"": by_layer(trace)}, subject.bounds),
                sketched.no_divergence(NAME, case), *sketched.lacking(subject, NAME, case),
                sketched.greedy_by_top(NAME, case, subject, rows, tokens, trace["logits"], tie)]
    oracle = recorded.load(("logits", "kv.keys", "kv.values"))
    return [*judge(NAME, case, seams, _turned(subject, case, by_layer(oracle)), {"": by_layer(trace)}, subject.bounds),
            divergence(NAME, case, oracle["logits"], trace["logits"], subject.bounds.limit(NAME, "kl", "kl")),
            greedy(NAME, case, "tokens", tokens, oracle["logits"][rows], trace["logits"][rows], tie)]


def stepped(subject: Subject, case: str) -> Trace:
    """The prompt in one call of the graph under test, then the oracle's tokens one a call; logits and cache."""
    recorded = subject.recorded(case)
    request = Request(recorded.inputs, forced=tuple(map(int, recorded.rollout.tokens)), kv=True)
    return next(subject.graph(case, stepwise=True).run([request]))


def _apart(subject: Subject, case: str) -> int:
    """How many positions further the graph counts than the oracle, everywhere."""
    streamed = streams(subject.conversion(subject.grid(case))) and not subject.by_sketch
    trace = swept(subject).traces[case] if streamed else subject.graph_trace(case, "accumulated")
    planes = trace.get("decoder.positions")
    return 0 if planes is None else offset(subject.recorded(case).positions, planes.T)


def _unturned(subject: Subject, case: str, cache: Trace) -> Trace:
    """A sketch of the oracle's keys cannot be turned: such a graph is judged by the whole oracle only."""
    apart = _apart(subject, case)
    if apart:
        raise Undecided(f"the graph counts positions {apart} further than the oracle, and a sketch of keys cannot be turned",
                        fix="judge it by the whole oracle")
    return cache


def _turned(subject: Subject, case: str, cache: Trace) -> Trace:
    """The oracle's keys as a graph holds them whose positions are all a constant further: attention cannot tell."""
    apart = _apart(subject, case)
    if not apart:
        return cache
    geometry = subject.geometry
    lanes = geometry.head_dim // 2
    turn = np.exp(1j * apart * geometry.rope_theta ** -(np.arange(lanes) / lanes))

    def turned(keys: np.ndarray) -> np.ndarray:
        wide = (keys[..., :lanes] + 1j * keys[..., lanes:]) * turn
        return np.concatenate([wide.real, wide.imag], axis=-1).astype(np.float32)

    return Trace({name: turned(array) if ".keys." in name else array for name, array in cache.items()})


def divergence(rung: str, case: str, reference: np.ndarray, candidate: np.ndarray, limit: float) -> Verdict:
    """Verdict on the largest KL(reference || candidate) over all positions, in nats."""
    # In blocks of rows: in float64, and several times over, all logits of a large vocabulary are some GB.
    kl = np.concatenate([kl_divergence(*pair) for pair in zip(_blocks(reference), _blocks(candidate), strict=True)]) \
        if reference.shape == candidate.shape and len(reference) else kl_divergence(reference, candidate)
    worst = int(kl.argmax())
    agree = float((reference.argmax(-1) == candidate.argmax(-1)).mean())
    return Verdict(rung, case, "kl", Outcome.PASS if kl[worst] <= limit else Outcome.FAIL,
                   f"KL at most {kl[worst]:.3g} nats, at position {worst}; top-1 agrees on {agree:.1%}", "kl",
                   float(kl[worst]), limit, figures={"mean": float(kl.mean()), "top1": agree, "at": worst})


def _blocks(logits: np.ndarray) -> list[np.ndarray]:
    step = max(1, BLOCK // logits.shape[1])
    return [logits[start:start + step] for start in range(0, len(logits), step)]


def by_layer(trace: Mapping[str, np.ndarray]) -> Trace:
    """`kv.keys`, `kv.values` [L, kv_heads, T, head_dim] -> one seam a layer, slots on axis 0: [T, kv_heads, head_dim]."""
    return Trace({f"kv.{part}.{layer:02d}": state.transpose(1, 0, 2) for part in ("keys", "values")
                  if f"kv.{part}" in trace for layer, state in enumerate(trace[f"kv.{part}"])})
