"""A Qwen3-VL port as another team would write it, judged with `--graph third_party.port:factory`.

This file imports nothing of the harness and shares no habit with its graph: weights are a flat dict under names of its
own, q/k/v and gate/up are one matrix each, rotary angles are looked up in tables, the cache is written by slice
assignment, attention is torch's. What a port needs so that it can be judged:

- `factory(checkpoint, grid)` loads the checkpoint directory in float32 for one image of `grid` = (rows, columns) of
  patches. `slots` is the number of image rows it then expects.
- `tensors()` gives every weight by its checkpoint name and shape, taken from what the port computes with. What was
  concatenated is split back, so that a stale row inside a fused matrix is found under the name it came from.
- `seams()` names what is offered to `tap`, from the list in the harness's `trace.py`; offer what your code has at hand.
  What is lacking is reported as not answered, and the policy of a run says by name what it excuses. With fewer seams
  a fault is found all the same, but placed more coarsely: without `decoder.embed` a wrong embedding shows at layer 0.
- `tap(name, value)` takes tokens on axis 0, no batch axis. Go on with what it returns and set `injectable = True`: then
  each layer is also judged on the reference's own input, and the layer that is wrong is told from those that inherit
  its error. With `injectable = False` (see `Deaf`) the error accumulated so far is all that can be judged.
- Ids at or above the vocabulary V are image slots, id - V, counted row by row over the merged grid. `position_ids` is
  the ramp 0 .. T-1, and a call brings the last S tokens of it. Text at or after `rope_shift_start` stands
  `rope_shift_amount` earlier. `cache` is filled in place at slots T-S .. T-1, keys after rotation.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

TXT, IMG = "model.language_model.", "model.visual."
TEXT_BLOCK = {
    "norm_a": ["input_layernorm"], "wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "norm_q": ["self_attn.q_norm"], "norm_k": ["self_attn.k_norm"], "wo": ["self_attn.o_proj"],
    "norm_b": ["post_attention_layernorm"], "w13": ["mlp.gate_proj", "mlp.up_proj"], "w2": ["mlp.down_proj"]}
IMAGE_BLOCK = {"ln1": "norm1", "wqkv": "attn.qkv", "wo": "attn.proj", "ln2": "norm2", "up": "mlp.linear_fc1",
               "down": "mlp.linear_fc2"}
MERGER = {"ln": "norm", "up": "linear_fc1", "down": "linear_fc2"}


def read_spec(checkpoint):
    """The numbers of config.json that the arithmetic needs, in either spelling of the rope section."""
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    text, image = config["text_config"], config["vision_config"]
    rope = text.get("rope_parameters") or text["rope_scaling"]
    return {"V": text["vocab_size"], "L": text["num_hidden_layers"], "H": text["num_attention_heads"],
            "K": text["num_key_value_heads"], "D": text["head_dim"], "eps": text["rms_norm_eps"],
            "theta": rope.get("rope_theta") or text["rope_theta"], "sections": rope["mrope_section"],
            "reach": text["max_position_embeddings"], "tied": config["tie_word_embeddings"],
            "depth": image["depth"], "heads": image["num_heads"], "width": image["hidden_size"],
            "merge": image["spatial_merge_size"], "taps": image["deepstack_visual_indexes"],
            "add_after": list(range(len(image["deepstack_visual_indexes"])))}


def recipe(spec):
    """name of ours -> checkpoint names stacked into it, along axis 0."""
    plan = {"t.embed": [TXT + "embed_tokens.weight"], "t.norm": [TXT + "norm.weight"],
            "v.table": [IMG + "pos_embed.weight"], "v.patch.w": [IMG + "patch_embed.proj.weight"],
            "v.patch.b": [IMG + "patch_embed.proj.bias"]}
    if not spec["tied"]:
        plan["t.head"] = ["lm_head.weight"]
    for i in range(spec["L"]):
        plan |= {f"t{i}.{k}": [f"{TXT}layers.{i}.{n}.weight" for n in ns] for k, ns in TEXT_BLOCK.items()}
    places = [(f"v{i}", f"{IMG}blocks.{i}", IMAGE_BLOCK) for i in range(spec["depth"])]
    places += [("m", f"{IMG}merger", MERGER)]
    places += [(f"d{k}", f"{IMG}deepstack_merger_list.{k}", MERGER) for k in range(len(spec["taps"]))]
    for ours, theirs, names in places:
        for k, n in names.items():
            plan[f"{ours}.{k}.w"], plan[f"{ours}.{k}.b"] = [f"{theirs}.{n}.weight"], [f"{theirs}.{n}.bias"]
    return plan


def pack(raw, plan):
    """Fused matrices; a convolution's kernel becomes a row."""
    return {k: torch.cat([raw[n].flatten(1) if raw[n].ndim > 1 else raw[n] for n in ns]) for k, ns in plan.items()}


def bake(w, spec, grid):
    """Constants of one image grid: vision positions and rotations, text rotation tables, slot -> row and column."""
    rows, cols = grid
    m, quarter, half = spec["merge"], spec["width"] // spec["heads"] // 4, spec["D"] // 2
    order = torch.arange(rows * cols).view(rows // m, m, cols // m, m).permute(0, 2, 1, 3).flatten()
    r, c = order // cols, order % cols
    table = w["v.table"].double()
    side = math.isqrt(len(table))
    grid_2d = torch.einsum("ra,cb,abx->rcx", hat(rows, side), hat(cols, side), table.view(side, side, -1))
    turn = spin(torch.arange(max(grid)), 1e4, quarter)
    slots = torch.arange(rows * cols // m**2, dtype=torch.int32)
    pick = torch.zeros(3, half)
    for lane in range(half):
        axis = lane % 3
        pick[axis if axis and lane < 3 * spec["sections"][axis] else 0, lane] = 1
    const = {"place": grid_2d.flatten(0, 1)[order].float(), "pick": pick,
             "row": slots // (cols // m), "col": slots - slots // (cols // m) * (cols // m)}
    for k, t in zip(("cos", "sin"), turn):
        const[f"v.{k}"] = torch.cat([t[r], t[c]], -1)
    const["cos"], const["sin"] = spin(torch.arange(spec["reach"]), spec["theta"], half)
    return const


def hat(n, side):
    """[n, side] weights that sample a line of `side` points at n evenly spaced places, ends included."""
    at = torch.linspace(0, side - 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1, dtype=torch.float64)
    return (1 - (at[:, None] - torch.arange(side)).abs()).clamp(min=0)


def spin(at, theta, lanes):
    """cos and sin [len(at), lanes] of at * theta^(-j / lanes)."""
    angle = at[:, None] * (1 / theta ** (torch.arange(lanes) / lanes))
    return angle.cos(), angle.sin()


def rms(x, g, eps):
    """x * sqrt(n) / sqrt(sum x^2 + n eps): the same as x / sqrt(mean x^2 + eps)."""
    n, y = x.shape[-1], x.float()
    return (y * (math.sqrt(n) / (y.square().sum(-1, keepdim=True) + n * eps).sqrt())).to(x.dtype) * g


def turned(x, cos, sin):
    """x [tokens, heads, D] rotated by cos and sin [tokens, D / 2]."""
    cos, sin = torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]
    a, b = x.float().tensor_split(2, -1)
    return (torch.cat([a, b], -1) * cos + torch.cat([b, a], -1) * sin).to(x.dtype)


def dense(x, w, name):
    return F.linear(x, w[name + ".w"], w[name + ".b"])


def normed(x, w, name):
    return F.layer_norm(x, x.shape[-1:], w[name + ".w"], w[name + ".b"], 1e-6)


def image_block(x, w, c, i, heads):
    q, k, v = dense(normed(x, w, f"v{i}.ln1"), w, f"v{i}.wqkv").unflatten(-1, (3, heads, -1)).unbind(1)
    q, k = (turned(t, c["v.cos"], c["v.sin"]) for t in (q, k))
    y = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)))
    x = x + dense(y[0].transpose(0, 1).flatten(1), w, f"v{i}.wo")
    return x + dense(F.gelu(dense(normed(x, w, f"v{i}.ln2"), w, f"v{i}.up"), approximate="tanh"), w, f"v{i}.down")


def merged(x, w, name, join, first):
    x = normed(x, w, f"{name}.ln").reshape(-1, join) if first else normed(x.reshape(-1, join), w, f"{name}.ln")
    return dense(F.gelu(dense(x, w, f"{name}.up")), w, f"{name}.down")


def encoder(w, c, spec, patches, tap):
    """patches [P, F] -> image rows [N, h], DeepStack rows [3N, h]."""
    join, extra = spec["width"] * spec["merge"]**2, []
    x = dense(patches, w, "v.patch") + c["place"].to(patches.dtype)
    for i in range(spec["depth"]):
        x = tap(f"vision.layers.{i:02d}", image_block(x, w, c, i, spec["heads"]))
        if i in spec["taps"]:
            k = spec["taps"].index(i)
            extra.append(tap(f"vision.deepstack.{k}", merged(x, w, f"d{k}", join, False)))
    return tap("vision.merger", merged(x, w, "m", join, True)), torch.cat(extra)


def text_block(x, w, i, spec, rot, mask, keys, values, begin, end):
    heads, kv, size = spec["H"], spec["K"], spec["D"]
    qkv = F.linear(rms(x, w[f"t{i}.norm_a"], spec["eps"]), w[f"t{i}.wqkv"]).unflatten(-1, (-1, size))
    q, k, v = qkv.split([heads, kv, kv], 1)
    q = turned(rms(q, w[f"t{i}.norm_q"], spec["eps"]), *rot)
    keys[i, :, :, begin:end] = turned(rms(k, w[f"t{i}.norm_k"], spec["eps"]), *rot).transpose(0, 1)[None]
    values[i, :, :, begin:end] = v.transpose(0, 1)[None]
    y = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys[i, :, :, :end], values[i, :, :, :end],
                                       attn_mask=mask, enable_gqa=True)
    x = x + F.linear(y[0].transpose(0, 1).flatten(1), w[f"t{i}.wo"])
    gate, up = F.linear(rms(x, w[f"t{i}.norm_b"], spec["eps"]), w[f"t{i}.w13"]).tensor_split(2, -1)
    return x + F.linear(F.silu(gate) * up, w[f"t{i}.w2"])


def angles(c, spec, ids, at, start, amount):
    """cos and sin [S, D / 2]: each lane looks its own plane (t, h or w) up in the table."""
    slot, pictured = (ids - spec["V"]).clamp(min=0), (ids >= spec["V"]).int()
    moved = at - amount * (at >= start).int()
    begin = at - slot
    planes = [moved + pictured * (begin + off - moved) for off in (0, c["row"][slot], c["col"][slot])]
    return tuple(sum(c[k][p] * c["pick"][j] for j, p in enumerate(planes)) for k in ("cos", "sin"))


def decoder(w, c, spec, input_ids, position_ids, image, extra, start, amount, keys, values, tap):
    """One call on S tokens: logits [1, S, V]."""
    ids, end, n = input_ids[0], position_ids.shape[1], len(c["row"])
    begin = end - ids.shape[0]
    at = position_ids[0, begin:]
    slot = (ids - spec["V"]).clamp(min=0)
    text, pictured = w["t.embed"][ids.clamp(max=spec["V"] - 1)], (ids >= spec["V"])[:, None].to(image.dtype)
    x = text * (1 - pictured) + image[slot] * pictured
    rot = angles(c, spec, ids, at, start, amount)
    mask = position_ids <= at[:, None]
    for i in range(spec["L"]):
        x = tap(f"decoder.layers.{i:02d}", text_block(x, w, i, spec, rot, mask, keys, values, begin, end))
        if i in spec["add_after"]:
            x = x + extra[slot + spec["add_after"].index(i) * n] * pictured
        if i < len(spec["taps"]):
            x = tap(f"decoder.layers.{i:02d}.deepstack", x)
    head = w["t.embed" if spec["tied"] else "t.head"]
    return tap("logits", F.linear(rms(x, w["t.norm"], spec["eps"]), head))[None]


class Port:
    """What `factory` returns; the methods are those that the harness calls."""

    injectable = True

    def __init__(self, checkpoint, grid):
        self.spec = read_spec(checkpoint)
        raw = {k: t for shard in sorted(Path(checkpoint).glob("*.safetensors")) for k, t in load_file(shard).items()}
        self.plan, self.shapes = recipe(self.spec), {k: t.shape for k, t in raw.items()}
        self.w = pack({k: t.float() for k, t in raw.items()}, self.plan)
        self.c = bake(self.w, self.spec, grid)
        self.slots = len(self.c["row"])

    def seams(self):
        names = [f"vision.layers.{i:02d}" for i in range(self.spec["depth"])] + ["vision.merger", "logits"]
        names += [f"decoder.layers.{i:02d}" for i in range(self.spec["L"])]
        for k in range(len(self.spec["taps"])):
            names += [f"vision.deepstack.{k}", f"decoder.layers.{k:02d}.deepstack"]
        return names

    def tensors(self):
        out = {}
        for k, names in self.plan.items():
            parts = self.w[k].split([self.shapes[n][0] for n in names])
            out |= {n: part.reshape(self.shapes[n]) for n, part in zip(names, parts)}
        return out

    @torch.no_grad()
    def encode(self, patches, tap):
        return encoder(self.w, self.c, self.spec, patches, tap)

    @torch.no_grad()
    def decode(self, input_ids, position_ids, image_embeds, deepstack_embeds, rope_shift_start, rope_shift_amount,
               cache, tap):
        return decoder(self.w, self.c, self.spec, input_ids, position_ids, image_embeds, deepstack_embeds,
                       rope_shift_start, rope_shift_amount, *cache, tap)


class Deaf(Port):
    """The same port where a tap only listens: nothing can be injected."""

    injectable = False

    def encode(self, patches, tap):
        return super().encode(patches, listening(tap))

    def decode(self, *inputs):
        return super().decode(*inputs[:-1], listening(inputs[-1]))


def listening(tap):
    def listen(name, value):
        tap(name, value)
        return value
    return listen


factory = Port
deaf = Deaf
