"""Where a vision tower's program holds its blocks and mergers, found from its structure alone; see `taps`."""

from __future__ import annotations

import math

from harness.engines.replay.contract import EMBEDS, check_vision
from harness.engines.replay.flow import PRODUCTS, Flow
from harness.engines.replay.program import Function, Node, Value
from harness.engines.replay.taps import Found, Step, stream


def vision_taps(function: Function) -> Found:
    """Seams of a vision tower of the port's contract. Raises HarnessError where its structure is another."""
    return _Vision(function).found


class _Vision:
    def __init__(self, function: Function) -> None:
        check_vision(function)
        self.flow, self.found = Flow(function), Found()
        self.patches, self.merged = function.inputs[0].shape[0], function.outputs[EMBEDS[0]].shape[0]
        last = self._merger("vision.merger", function.outputs[EMBEDS[0]])
        self.steps = stream(self.flow, last)
        after = {self.flow.source(step.after).id: number for number, step in enumerate(self.steps)}
        self.found.check(last.id in after, "the merger reads the end of the stream")
        self._blocks()
        self._deepstack(function.outputs[EMBEDS[1]], after)

    def _tap(self, seam: str, value: Value, tokens: int | None = None, row: tuple[int, ...] | None = None) -> None:
        tokens = tokens or self.patches
        place = self.flow.tokens_first(value, tokens)
        if place is None:
            self.found.unnamed.append(seam)
        else:
            self.found.add(seam, place, row or (math.prod(place.shape) // tokens,))

    def _merger(self, name: str, output: Value) -> Value:
        """fc2(gelu(fc1(norm))): taps, and the stream that the norm was given."""
        flow, found = self.flow, self.found
        second = self._product(name, output)
        act = flow.source(second.operands[0])
        found.check(flow.maker(act) == "gelu", f"{name} has a GELU between its layers")
        wide = flow.makers[act.id].operands[0]
        first = self._product(name, wide)
        given = flow.normed(first.operands[0])
        found.check(given is not None, f"{name} begins with a norm")
        if name != "vision.merger":
            self._tap(name, output, self.merged)
        self._tap(f"{name}.act", act, self.merged)
        self._tap(f"{name}.fc1", flow.source(wide), self.merged)
        self._tap(f"{name}.norm", first.operands[0], self.merged)
        return given

    def _product(self, name: str, value: Value) -> Node:
        """The product with a weight that a value is, a bias apart."""
        node = self.flow.makers.get(self.flow.unshaped(value).id)
        self.found.check(node is not None and self.flow.linear(node), f"{name} holds a product with a weight")
        return node

    def _blocks(self) -> None:
        kinds = ["attention" if any(node.op == "softmax" for node in step.nodes) else "mlp" for step in self.steps]
        blocks = len(kinds) // 2
        self.found.check(kinds == ["attention", "mlp"] * blocks and blocks > 0, f"{blocks} blocks of attention and MLP")
        self._tap("vision.embed", self.steps[0].before)
        for number, (attention, mlp) in enumerate(zip(self.steps[::2], self.steps[1::2])):
            name = f"vision.layers.{number:02d}"
            self._attention(name, attention)
            self._mlp(name, mlp)
            self._tap(name, mlp.after)

    def _attention(self, name: str, step: Step) -> None:
        flow = self.flow
        self._tap(f"{name}.attn.out", flow.source(step.branch))
        out = self._product(f"{name}.attn", step.branch)
        self._tap(f"{name}.attn.context", out.operands[0])
        products = [node for node in step.nodes if node.op in PRODUCTS and not flow.linear(node)]
        self.found.check(len(products) == 2, f"{name}.attn multiplies queries with keys, then weights with values")
        scores, context = products
        size = context.results[0].shape[-1]
        query, key = (flow.unshaped(operand) for operand in scores.operands)
        for part, value in (("q_rope", query), ("k_rope", key), ("v", context.operands[1])):
            self._tap(f"{name}.attn.{part}", value, row=(math.prod(value.shape) // self.patches // size, size))
        self._norm(f"{name}.norm1", step)

    def _mlp(self, name: str, step: Step) -> None:
        flow = self.flow
        self._tap(f"{name}.mlp.out", flow.source(step.branch))
        act = flow.source(self._product(f"{name}.mlp", step.branch).operands[0])
        self.found.check(flow.maker(act) == "gelu", f"{name}.mlp has a GELU between its layers")
        self._tap(f"{name}.mlp.act", act)
        self._tap(f"{name}.mlp.fc1", flow.source(flow.makers[act.id].operands[0]))
        self._norm(f"{name}.norm2", step)

    def _norm(self, seam: str, step: Step) -> None:
        first = next(node for node in step.nodes if self.flow.linear(node))
        given = self.flow.normed(first.operands[0])
        self.found.check(given is not None and given.id == self.flow.source(step.before).id,
                         f"{seam} is a norm of the stream")
        self._tap(seam, first.operands[0])

    def _deepstack(self, joined: Value, after: dict[int, int]) -> None:
        node = self.flow.makers.get(self.flow.source(joined).id)
        parts = node.operands[1:] if node is not None and node.op == "concat" else [joined]
        self.found.check(len(parts) * self.merged == joined.shape[0], f"{len(parts)} DeepStack outputs are joined")
        blocks = []
        for number, part in enumerate(parts):
            given = self._merger(f"vision.deepstack.{number}", part)
            self.found.check(after.get(given.id, 0) % 2 == 1, f"DeepStack output {number} reads the stream after a block")
            blocks.append(after[given.id] // 2)
        self.found.check(blocks == sorted(set(blocks)), f"DeepStack outputs read the stream after blocks {blocks}")
