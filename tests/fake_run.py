"""Run records made up for tests of the reports: healthy, failing, hostile, half, huge. No model is run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from harness.bounds import Bound, Bounds, engine_key
from harness.gate import certificate
from harness.geometry import Geometry
from harness.greedy import greedy
from harness.ladder import decide
from harness.metrics import Distance
from harness.plan import SHARP, Kind, planned
from harness.policy import policy_from
from harness.report.png import data_uri
from harness.run import Run, run_from_record
from harness.trace import decoder_seams, vision_seams
from harness.verdict import Outcome, Verdict

HOSTILE = '<script>document.title="owned"</script>"><img src=http://example.invalid/x onerror=alert(1)>' \
          "'`|*_[a](b)@team</script>"
BROKEN = "decoder.layers.01"
KINDS = (("scene-211", "the published 211-token multimodal prompt", 211, 7),
         ("text-only", "zero embeds, start = 1<<30", 48, None),
         ("image-first", "nothing before the image", 214, 0), ("late-image", "image after a long text", 330, 120),
         ("second-turn", "a turn after an early image", 262, 5), ("long-text", "past 300 tokens", 340, None),
         ("white", "an all-white image", 211, 7), ("noise", "a noise image", 211, 7),
         ("non-ascii", "CJK, emoji, combining marks", 224, 9), ("wide", "a grid that is not square", 211, 7))
POLICY = {"name": "release", "allow_skip": [], "allow_unanswered": [], "min_cases": 1,
          "modes": ["fp16", "int8hu", "int8lin"]}
ENGINE = "coreai-cpu:int8hu*:h256"
_BOUNDS = (("vision", "local.worst_token", 2e-5, 3.1e-6, "*", "*"),
           ("vision", "accumulated.worst_token", 3e-4, 4.4e-5, "*", "*"),
           ("vision", "local.rel_l2", 6e-6, 9e-7, "*", "*"), ("decoder", "local.worst_token", 2e-5, 2.4e-6, "*", "*"),
           ("decoder", "accumulated.worst_token", 2e-4, 2.9e-5, "*", "*"),
           ("decoder", "accumulated.worst_token", 6e-4, 8.8e-5, "logits", "*"),
           ("decode", "worst_token", 2e-4, 2.9e-5, "kv.*", "*"), ("decode", "kl", 1e-6, 1e-8, "kl", "*"),
           ("decode", "tie_margin", 0.001, 0.0005, "tokens", "*"),
           ("quantized", "worst_token", 0.35, 0.19, "*", "int8hu"), ("quantized", "kl", 0.1, 0.02, "kl", "int8hu"),
           ("quantized", "tie_margin", 1.5, 0.4, "tokens", "int8hu"),
           ("engine", "worst_token", 0.03, 0.0085, "*", ENGINE), ("headroom", "fraction", 0.5, 0.11, "*", "*"),
           ("tokens", "tie_margin", 0.05, 0.021, "tokens", ENGINE))
BOUNDS = Bounds([Bound(*row[:4], "because", "2026-11-18", *row[4:]) for row in _BOUNDS])


def shape(layers: int, vision_layers: int) -> Geometry:
    """A geometry of these depths."""
    taps = tuple(tap for tap in (1, 3, 5) if tap < vision_layers)[:layers]
    return Geometry(vocab=151936, hidden=256, layers=layers, heads=8, kv_heads=2, head_dim=128, intermediate=768,
                    rms_eps=1e-6, rope_theta=5e6, mrope_section=(24, 20, 20), tied=False, max_positions=4096,
                    image_token=151655, vision_layers=vision_layers, vision_hidden=64, vision_heads=4,
                    vision_intermediate=172, vision_act="gelu_pytorch_tanh", patch=16, temporal_patch=2, merge=2,
                    channels=3, position_rows=2304, deepstack_taps=taps)


def _distance(value: float, rng: random.Random, tokens: int) -> Distance:
    total = value * rng.uniform(0.2, 0.25)
    return Distance(1 - min(1.0, total**2 / 2), 1 - min(1.0, value**2 / 2), total**2 / 2, total, value,
                    rng.randrange(tokens), value * 1.3, (rng.randrange(128),), total / 9, value * 7,
                    (rng.randrange(tokens), rng.randrange(128)), -20 * math.log10(total) if total else math.inf, 41.5, 0, 0,
                    tokens)


def _seam(rung: str, case: str, seam: str, ways: dict[str, float], image: bool, rng: random.Random,
          engine: str = "") -> Verdict:
    """A verdict decided as the ladder decides, on figures made up."""
    measured = {}
    for way, value in ways.items():
        measured[way] = {"all": _distance(value, rng, 211)}
        if image and not seam.startswith("vision."):
            measured[way] |= {"image": _distance(value, rng, 196), "text": _distance(value * rng.uniform(0.2, 0.7), rng, 15)}
    return decide(rung, case, seam, measured, BOUNDS.at(rung, seam, engine))


def _tower(rung: str, case: str, names: Sequence[str], image: bool, broken: str | None,
           rng: random.Random) -> Iterator[Verdict]:
    base, after = 4e-7, False
    for at, seam in enumerate(names):
        here = broken is not None and seam.startswith(broken)
        after = after or here
        local = base * rng.uniform(1, 4) * (9e4 if here else 1)
        accumulated = base * (2 + 20 * at / len(names)) * rng.uniform(0.8, 2) * (1.2e5 if after else 1)
        if seam.endswith(".embed"):
            local = accumulated = 0.0
        yield _seam(rung, case, seam, {"local": local, "accumulated": accumulated}, image, rng)


def _greedy(rung: str, case: str, flips: Mapping[int, float], tie: float) -> Verdict:
    """Tokens of 24 steps; `flips` are steps with their gap."""
    logits = np.zeros((24, 3))
    logits[:, 0] = 5.0
    candidate = logits.copy()
    for step, gap in flips.items():
        logits[step, 1], candidate[step, 1] = 5.0 - gap, 9.0
    return greedy(rung, case, "tokens", np.zeros(24, dtype=int), logits, candidate, tie)


def _verdicts(rung: str, case: str, seams: Sequence[str], image: bool, broken: str | None,
              rng: random.Random) -> Iterator[Verdict]:
    """What a rung answers of a case: every planned seam."""
    if rung in ("vision", "decoder"):
        yield from _tower(rung, case, seams, image, broken, rng)
        return
    for at, seam in enumerate(seams):
        if seam == "tokens":
            flip = broken is not None and (rung, case) == ("tokens", "scene-211")
            near = {4: 0.011} if rung == "tokens" and case == "long-text" else {}
            yield _greedy(rung, case, {9: 6.2} if flip else near,
                          {"decode": 0.001, "quantized": 1.5, "tokens": 0.05}[rung])
        elif seam == "kl":
            yield Verdict(rung, case, seam, Outcome.PASS, "KL at most 2e-9 nats", "kl", 2e-9,
                          BOUNDS.limit(rung, "kl", "kl", "int8hu"))
        elif rung == "decode":
            yield _seam(rung, case, seam, {"": 3e-6 * rng.uniform(1, 4)}, image, rng)
        elif rung == "engine":
            wide = case.endswith(SHARP)
            yield _seam(rung, case, seam, {"": (2e-6 if wide else 0.002) * rng.uniform(0.5, 3)}, image, rng,
                        engine_key("coreai-cpu", "int8hu", 256, wide))
        elif seam == "mode":
            yield Verdict(rung, case, seam, Outcome.PASS, "int8hu is among the policy's modes")
        elif rung == "quantized":
            yield _seam(rung, case, seam, {"": 0.02 + 0.12 * at / len(seams) * rng.uniform(0.8, 1.2)}, image, rng, "int8hu")
        elif rung == "headroom":
            largest = rng.uniform(1, 3000)
            yield Verdict(rung, case, seam, Outcome.PASS, f"largest magnitude {largest:.4g} of 65504", "fraction",
                          largest / 65504.0, 0.5, figures={"largest": {"scene-211": largest}, "at": [3, 77]})
        else:
            stored = {"stored": "float32" if case == "graph" else "int8 x 32"} if rung == "weights" else {}
            yield Verdict(rung, case, seam, Outcome.PASS, "48 values equal", "mismatches", 0.0, 0.0, figures=stored)


def _tokens(case: str, length: int, flip: bool, rng: random.Random) -> dict[str, Any]:
    words = ("a", " red", " circle", " left", " of", " a", " blue", " square", ",", " large", ",", " on", " a", " grey",
             " ground", ";", " two", " green", " rings", " below", " it", " touch", ".", " <|im_end|>")
    steps = []
    for step, word in enumerate(words):
        token = rng.randrange(151_000)
        margin = round(rng.uniform(1.5, 9), 3)
        steps.append({"step": step, "position": length + step, "oracle": token, "python": token, "engine": token,
                      "margin": margin, "tie": False, "text": word})
    if flip:
        steps[9] |= {"engine": 77, "margin": 6.2}
    elif case == "long-text":
        steps[4] |= {"engine": 812, "margin": 0.011, "tie": True}
    return {"case": case, "steps": steps}


def _heat(case: str, length: int, first: int | None, names: list[str], broken: str | None,
          rng: random.Random) -> dict[str, Any]:
    values, after = [], False
    for at, seam in enumerate(names):
        after = after or (broken is not None and seam.startswith(broken))
        row = []
        for token in range(length + 24):
            image = first is not None and first <= token < first + 196
            level = -6.2 + at / len(names) * 1.4 + rng.gauss(0, 0.18) + (0.25 if image else 0)
            if after and image:
                slot = token - first
                level += 3.2 if 4 <= slot // 14 <= 7 and 3 <= slot % 14 <= 9 else 1.1
            row.append(round(level, 2))
        values.append(row)
    return {"case": case, "way": "accumulated", "seams": names, "values": values}


def _picture() -> str:
    return data_uri([bytes((x * 3 + y * 2) % 250 for x in range(64)) for y in range(64)])


def make(layers: int = 8, vision_layers: int = 6, cases: int = 10, inside: bool = True, broken: str | None = None,
         name: str = "qwen3-vl-tiny", seed: int = 1) -> dict[str, Any]:
    """A record with all ten rungs; `broken` is the seam from which on the fp32 graph is wrong."""
    rng = random.Random(seed)
    kinds = [KINDS[at % len(KINDS)] for at in range(cases)]
    kinds = [(kind[0] if at < len(KINDS) else f"{kind[0]}-{at}", *kind[1:]) for at, kind in enumerate(kinds)]
    geometry = shape(layers, vision_layers)
    stream = decoder_seams(geometry)
    command = f"harness gate {name} --bundle exports/{name}_decode_int8hu_s1 --out reports/x"
    run = Run(command=command, created="2026-11-20T09:12:44+00:00",
              tool={"version": "0.1.0", "commit": "3f2a9c1b77de"},
              machine={"system": "Linux", "arch": "x86_64", "cpu": "AMD EPYC 7B13", "cores": 2, "python": "3.11.7"})
    run.policy = dict(POLICY)
    run.bounds = [{"rung": rung, "metric": metric, "limit": limit, "measured": noise, "seams": where, "engine": engine,
                   "because": "largest of four benign variants (SDPA kernel, summation order, fused qkv, seed)",
                   "date": "2026-11-18"} for rung, metric, limit, noise, where, engine in _BOUNDS]
    run.engine = {"name": "coreai-cpu", "version": "1.0.0b3", "platform": "Linux x86_64"}
    digest = ("ab12cd34ef56" * 6)[:64]
    run.subject = {"checkpoint": {"name": name, "revision": "9f8e7d6c5b4a3920", "digest": digest,
                                  "geometry": geometry.record()},
                   "oracle": {"digest": "77" * 32, "identity": "transformers 5.23.0 float32 eager"},
                   "mode": "int8hu", "exported": True, "graph": "harness.graph.reference:factory",
                   "bundle": {"name": f"{name}_decode_int8hu_s1", "digest": "5c" * 32, "bytes": 11_482_112,
                              "mode": "int8hu"},
                   "vision_bundle": {"name": f"{name}_vision", "digest": "6d" * 32, "bytes": 3_120_000,
                                     "mode": "fp16"}}
    for case, why, length, first in kinds:
        image = first is not None
        row = {"name": case, "why": why, "length": length, "prompt": "Describe the scene.\nWhat is left of the circle?",
               "engine": True,
               "image": {"grid": [14, 14], "first": first, "count": 196, "thumbnail": _picture()} if image else None}
        run.cases.append(row)
        run.tokens.append(_tokens(case, length, broken is not None and case == "scene-211", rng))
        run.heat.append(_heat(case, length, first, stream, broken, rng))
    images = {row["name"]: bool(row["image"]) for row in run.cases}
    plan = planned(geometry, {name: Kind(image, True) for name, image in images.items()}, "int8hu", True)
    for (rung, case), names in plan.items():
        if inside and rung in ("vision", "decoder"):
            names = (vision_seams if rung == "vision" else decoder_seams)(geometry, inside=True)
        run.verdicts += _verdicts(rung, case, names, images.get(case.removesuffix(SHARP), False), broken, rng)
    run.weights = [{"part": verdict.case, "tensor": verdict.seam, "outcome": "PASS", "stored": verdict.figures["stored"],
                    "error": 0.0 if verdict.case == "graph" else rng.uniform(1e-4, 8e-3)} for verdict in run.of("weights")]
    run.speed = {"prefill_tok_s": 412.5, "decode_tok_s": 398.1, "cold_load_s": 1.91, "warm_load_s": 0.42,
                 "bundle_bytes": 11_482_112, "bytes_per_token": 10_900_000, "vision_s": 0.31,
                 "bandwidth_gb_s": 38.0, "engine": "coreai-cpu 1.0.0b3",
                 "machine": "AMD EPYC 7B13, 2 cores"}
    if broken:
        run.localization.append({
            "case": kinds[0][0], "rung": broken.split(".")[0], "seam": broken, "op": f"{broken}.attn.q_rope",
            "metric": "local.worst_token", "value": 0.091, "bound": 2e-5, "tokens": "image tokens", "channel": 17,
            "reason": "local.worst_token 0.091 exceeds 2e-05",
            "cause": "rotary positions: h and w exchanged, a section boundary, theta, or the pairing of lanes",
            "reproduce": f"harness ladder {name} --rung decoder --case {kinds[0][0]}"})
    run.timings = [("record", 8.2), ("export", 21.4), ("rung decoder", 4.9), ("rung engine", 12.2)]
    return run.record()


def hostile() -> dict[str, Any]:
    """Markup wherever text can stand, an address where a picture should be, figures that are not finite."""
    record = make(layers=2, vision_layers=2, cases=2, inside=False, name=HOSTILE)
    record["command"] = f"harness gate {HOSTILE}"
    for row in record["cases"]:
        row |= {"why": HOSTILE, "prompt": HOSTILE * 50}
        if row["image"]:
            row["image"]["thumbnail"] = "http://example.invalid/track.png"
    for verdict in record["verdicts"]:
        verdict["reason"] = HOSTILE
        if verdict["rung"] == "decoder":
            verdict["seam"] += HOSTILE
            verdict |= {"outcome": "FAIL", "cause": HOSTILE}
            for way in verdict["figures"].values():
                way["all"] |= {"worst_token": "inf", "max_abs": "inf", "cosine": -1.0}
    for table in record["tokens"]:
        for step in table["steps"]:
            step["text"] = HOSTILE
    for row in record["heat"]:
        row["seams"] = [seam + HOSTILE for seam in row["seams"]]
        row["values"][0][3:6] = [None, "inf", "-inf"]
    record["weights"][0]["tensor"] = HOSTILE
    record["speed"] |= {"machine": HOSTILE, "engine": HOSTILE}
    record["localization"] = [{key: HOSTILE for key in ("case", "rung", "seam", "cause", "reproduce")}]
    record["subject"]["graph"] = HOSTILE
    return record


def half() -> dict[str, Any]:
    """A run that broke off early: only verdicts of two rungs, most lists empty, rows with holes."""
    record = make(layers=2, vision_layers=2, cases=1, inside=False)
    record["verdicts"] = [row for row in record["verdicts"] if row["rung"] in ("contract", "vision")]
    record |= {"tokens": [], "heat": [{"case": "scene-211"}, 7], "weights": [{}], "speed": {},
               "engine": {}, "timings": [], "cases": [{"name": "scene-211", "image": {"grid": "broken"}}],
               "bounds": [{}, {"rung": "vision"}]}
    record["subject"] = {"checkpoint": None, "bundle": None}
    return record


def huge(count: int = 10_000) -> dict[str, Any]:
    """Ten thousand seams of names that are not ours, in one rung of one case."""
    rng = random.Random(5)
    record = make(layers=1, vision_layers=1, cases=1, inside=False)
    values = {"local": 1e-6, "accumulated": 1e-5}
    record["verdicts"] += [_seam("decoder", "scene-211", f"other.block.{at:05d}", values, False, rng).record()
                           for at in range(count)]
    return record


@cache
def _made(kind: str) -> str:
    makers = {"healthy": lambda: make(layers=3, vision_layers=2, cases=2), "hostile": hostile, "half": half,
              "failing": lambda: make(layers=3, vision_layers=2, cases=2, broken=BROKEN)}
    return json.dumps(makers[kind]())


def record_of(kind: str) -> dict[str, Any]:
    """A fresh copy of a small record: healthy, failing (at BROKEN), hostile or half."""
    return json.loads(_made(kind))


def signed(record: dict[str, Any]) -> dict[str, Any]:
    """The certificate of a record."""
    return certificate(run_from_record(record), policy_from(record["policy"]))
