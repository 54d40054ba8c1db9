"""Where a program holds its layers, found from its structure alone: no names, no debug information, no source.

The residual stream is followed back from the output: a layer adds to it what attention makes of it, then what the MLP
does. What is found is checked against what the program says of itself (layers of its cache, slots that each layer writes,
kinds of its additions), and nothing is handed out that fails a check.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from harness.engines.replay.contract import STATES, Layout, layout
from harness.engines.replay.flow import Flow
from harness.engines.replay.program import Function, Node, Value
from harness.errors import HarnessError


@dataclass
class Found:
    """values: seam -> value, its tokens on the leading axis. rows: seam -> shape of one token's row. checks: what was
    confirmed, in words. unnamed: what could not be found, in words."""

    values: dict[str, Value] = field(default_factory=dict)
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)

    def add(self, seam: str, value: Value | None, row: tuple[int, ...]) -> None:
        """Take a seam, or note that it has no value with its tokens in front."""
        if value is None:
            self.unnamed.append(seam)
        else:
            self.values[seam], self.rows[seam] = value, row

    def check(self, right: bool, what: str) -> None:
        """Raises HarnessError where a check fails."""
        if not right:
            raise HarnessError(f"its layers cannot be told apart from its structure: {what} does not hold")
        self.checks.append(what)


@dataclass(frozen=True)
class Step:
    """One addition to the residual stream: `before` + `branch` = `after`. nodes: what the branch is made of, not looking
    behind `before`."""

    before: Value
    branch: Value
    after: Value
    nodes: tuple[Node, ...]


def stream(flow: Flow, last: Value) -> list[Step]:
    """Additions to the residual stream that ends in `last`, first to last."""
    steps: list[Step] = []
    value = flow.source(last)
    while flow.maker(value) == "add" and "softmax" in flow.of(value):
        step = _step(flow, value)
        if step is None:
            break
        steps.insert(0, step)
        value = flow.source(step.before)
    return steps


def _step(flow: Flow, after: Value) -> Step | None:
    """The operand that the other one is made of is the stream; a branch made of inputs alone is an addition from outside."""
    left, right = flow.makers[after.id].operands
    for before, branch in ((left, right), (right, left)):
        origin = flow.source(before)
        # Made of it, or not made of any layer at all while the other is.
        outside = "softmax" not in flow.of(branch) and "softmax" in flow.of(before)
        if not flow.fixed(branch) and (outside or flow.rests_on(branch, origin)):
            return Step(before, branch, after, tuple(flow.between(branch, frozenset({origin.id, before.id}))))
    return None


def decoder_taps(function: Function) -> Found:
    """Seams of a decoder of the port's contract. Raises HarnessError where its structure is another."""
    return _Decoder(function).found


class _Decoder:
    def __init__(self, function: Function) -> None:
        self.flow, self.found, self.layout = Flow(function), Found(), layout(function)
        self.head_dim = next(state for state in function.states if state.name == STATES[0]).shape[-1]
        logits = function.outputs["logits"]
        heads = [node for node in self.flow.between(self.flow.source(logits), frozenset()) if self.flow.linear(node)]
        head = heads[-1] if heads else None
        self.found.check(head is not None and self.flow.source(logits).id == head.results[0].id,
                         "the logits are a product with a weight")
        last = self.flow.normed(head.operands[0])
        self.found.check(last is not None, "a norm stands before the head")
        self.steps = stream(self.flow, last)
        self._walk()
        self._tap("decoder.norm", head.operands[0])

    def _tap(self, seam: str, value: Value, heads: bool = False) -> None:
        tokens = self.layout.tokens
        place = self.flow.tokens_first(value, tokens)
        if place is None:
            self.found.unnamed.append(seam)
            return
        width = 1
        for length in place.shape:
            width *= length or 1
        width //= tokens or 1
        self.found.add(seam, place, (width // self.head_dim, self.head_dim) if heads else (width,))

    def _walk(self) -> None:
        flow, found, layers = self.flow, self.found, self.layout.layers
        kinds = [self._kind(step) for step in self.steps]
        deep = kinds.count("deepstack")
        expected = [(layer, kind) for layer in range(layers) for kind in
                    ("attention", "mlp", *(("deepstack",) if layer < deep else ()))]
        for place, (layer, kind) in enumerate(expected):
            if kinds[place:place + 1] != [kind]:
                found.check(False, f"addition {place + 1} to the stream is layer {layer}'s {kind}")
        found.check(len(kinds) == len(expected), f"{layers} layers in the cache, as many in the stream, each of attention "
                                                 f"and MLP, the first {deep} with DeepStack")
        start = flow.source(self.steps[0].before)
        found.check(not flow.of(start) & {"softmax", "read_handle"}, "the stream begins at embeddings")
        self._tap("decoder.embed", self.steps[0].before)
        layer = -1
        for step, kind in zip(self.steps, kinds):
            layer += kind == "attention"
            name = f"decoder.layers.{layer:02d}"
            if kind == "attention":
                self._attention(f"{name}.attn", name, step, layer)
            elif kind == "mlp":
                self._mlp(name, step)
                self._tap(name, step.after)
            else:
                self._tap(f"{name}.deepstack", step.after)
        found.check(True, "each layer writes its own slot of the cache")
        self._positions()

    def _kind(self, step: Step) -> str:
        ops = {node.op for node in step.nodes}
        if "softmax" in ops and "read_handle" in ops:
            return "attention"
        taken = {operand.id for node in step.nodes for operand in node.operands}
        inside = step.before.id in taken or self.flow.source(step.before).id in taken
        if inside:
            return "mlp"
        return "deepstack" if "deepstack_embeds" in self.flow.of(step.branch) else "?"

    def _attention(self, name: str, layer_name: str, step: Step, layer: int) -> None:
        flow, found = self.flow, self.found
        out = flow.source(step.branch)
        maker = flow.makers[out.id]
        found.check(flow.linear(maker), f"{name} ends in a product with a weight")
        self._tap(f"{name}.out", out)
        self._tap(f"{name}.context", maker.operands[0])
        softmax = [node for node in step.nodes if node.op == "softmax"]
        found.check(len(softmax) == 1, f"{name} has one softmax")
        scores = [node for node in flow.between(softmax[0].operands[0], frozenset({step.before.id}))
                  if node.op in ("batch_matmul", "broadcasting_batch_matmul") and not flow.linear(node)]
        found.check(len(scores) >= 1, f"{name} multiplies queries with keys")
        self._projections(name, layer_name, step, layer, scores[-1])

    def _projections(self, name: str, layer_name: str, step: Step, layer: int, scores: Node) -> None:
        flow = self.flow
        query = scores.operands[0]
        if flow.maker(flow.source(query)) == "mul":  # a scale
            query = flow.unshaped(query)
        key, value = (self._written(state, step, layer) for state in STATES)
        self._tap(f"{name}.q_rope", query, heads=True)
        self._tap(f"{name}.k_rope", key, heads=True)
        self._tap(f"{name}.v", value, heads=True)
        for part, rotated in (("q_norm", query), ("k_norm", key)):
            plain = self._before_rotation(rotated, step)
            if plain is not None and flow.normed(plain) is not None:
                self._tap(f"{name}.{part}", plain, heads=True)
            else:
                self.found.unnamed.append(f"{name}.{part}")
        products = [node for node in step.nodes if flow.linear(node)]
        self._norm(f"{layer_name}.input_norm", step, products[0])

    def _norm(self, seam: str, step: Step, product: Node) -> None:
        given = self.flow.normed(product.operands[0])
        self.found.check(given is not None and given.id == self.flow.source(step.before).id,
                         f"{seam} is a norm of the stream")
        self._tap(seam, product.operands[0])

    def _written(self, state: str, step: Step, layer: int) -> Value:
        """What this layer writes into a state before it reads it; its slot must be the layer's."""
        reads = [node.at for node in step.nodes if node.op == "read_handle" and node.operands[0].name == state]
        own = {node.at: node for node in step.nodes if node.op == "slice_update"
               and flow_root(self.flow, node.operands[0]) == state}
        before = [node for node in self.flow.function.nodes if node.op == "write_handle" and reads
                  and node.operands[0].name == state and node.at < max(reads)]
        writer = self.flow.makers.get(before[-1].operands[1].id) if before else None
        if writer is not None and writer.op == "slice_update":
            own[writer.at] = writer
        self.found.check(len(own) == 1, f"layer {layer} writes once into {state}")
        node, = own.values()
        self.found.check(first_number(self.flow, node.operands[1]) in (layer, None),
                         f"layer {layer} writes slot {layer} of {state}")
        return node.operands[4]

    def _before_rotation(self, rotated: Value, step: Step) -> Value | None:
        """What a rotation was given: the one value of the stream that meets the angles."""
        origins = frozenset({step.before.id, self.flow.source(step.before).id})
        nodes = self.flow.between(rotated, origins)
        turned = reached(nodes, {value.id for node in nodes if node.op in ("cos", "sin") for value in node.results})
        streamed = reached(nodes, origins)
        met = [operand for node in nodes if any(value.id in turned & streamed for value in node.results)
               for operand in node.operands if operand.id in streamed - turned]
        plain = {self.flow.source(value).id: self.flow.source(value) for value in met}
        return next(iter(plain.values())) if len(plain) == 1 else None

    def _mlp(self, name: str, step: Step) -> None:
        flow = self.flow
        out = flow.source(step.branch)
        down = flow.makers[out.id]
        self.found.check(flow.linear(down), f"{name}.mlp ends in a product with a weight")
        act = flow.source(down.operands[0])
        self._tap(f"{name}.mlp.out", out)
        self._tap(f"{name}.mlp.act", act)
        gate, up = self._gated(act)
        self.found.check(gate is not None, f"{name}.mlp multiplies a gate")
        self._tap(f"{name}.mlp.gate", gate)
        self._tap(f"{name}.mlp.up", up)
        products = [node for node in step.nodes if flow.linear(node)]
        self._norm(f"{name}.post_norm", step, products[0])

    def _gated(self, act: Value) -> tuple[Value | None, Value | None]:
        """gate and up of silu(gate) * up, silu being one operation or gate * sigmoid(gate)."""
        node = self.flow.makers.get(act.id)
        if node is None or self.flow.maker(act) != "mul":
            return None, None
        for one, other in (node.operands, node.operands[::-1]):
            gated = self.flow.source(one)
            if self.flow.maker(gated) == "silu":
                return self.flow.source(self.flow.makers[gated.id].operands[0]), self.flow.source(other)
            if self.flow.maker(gated) == "mul":
                for left, right in (self.flow.makers[gated.id].operands, self.flow.makers[gated.id].operands[::-1]):
                    if self.flow.maker(self.flow.source(right)) == "sigmoid":
                        return self.flow.source(left), self.flow.source(other)
        return None, None

    def _positions(self) -> None:
        """Integers [3, S] that the angles are made of; with one token a call their transposition is the same row."""
        angles = next((node for node in self.flow.function.nodes if node.op == "cos"), None)
        casts = [node for node in self.flow.between(angles.operands[0], frozenset())
                 if node.op == "cast" and node.operands[0].dtype == "si32" and node.operands[0].shape == (3, 1)
                 and node.results[0].dtype in ("f32", "f16")] if angles else []
        if len(casts) == 1 and self.layout.tokens == 1:
            self.found.add("decoder.positions", casts[0].operands[0], (3,))
        else:
            self.found.unnamed.append("decoder.positions")


def reached(nodes: Sequence[Node], start: Iterable[int]) -> set[int]:
    """Ids of the values that rest on those of `start`, these included."""
    found = set(start)
    for node in nodes:
        if any(operand.id in found for operand in node.operands):
            found |= {value.id for value in node.results}
    return found


def flow_root(flow: Flow, value: Value) -> str | None:
    """The state whose memory a value is: through reads, moves and updates."""
    while (node := flow.makers.get(value.id)) is not None:
        if node.op == "read_handle":
            return node.operands[0].name
        if node.op not in ("slice_update", "slice", "reshape", "expand_dims", "shrink_dims"):
            return None
        value = node.operands[0]
    return None


def first_number(flow: Flow, value: Value) -> int | None:
    """The first of a list of integers, where it is a constant or is joined from constants; None else."""
    if value.constant is not None:
        return int(value.constant.array.ravel()[0])
    node = flow.makers.get(value.id)
    if node is not None and node.op == "concat":
        return first_number(flow, node.operands[1])
    return first_number(flow, node.operands[0]) if node is not None and node.op in ("cast", "reshape") else None
