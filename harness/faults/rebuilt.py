"""Export once more: a bundle whose program was built wrongly, quantized, converted and sealed as a right one is."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from harness.faults import fault
from harness.faults.files import Files
from harness.faults.hands import bend_attention, bend_decoder, layer_norms, rms, wrap


@fault("asset", "weights|engine", "decoder.layers.00|kv.values.01|kv.keys.01", source="A01")
def strict_mask_exported(files: Files) -> None:
    """the exported mask hides every token's own key"""
    def bend(towers):
        decoder = bend_decoder(towers)
        wrap(decoder, "seen", lambda plain, planes, place, total: plain(planes, (place - 1).clamp(min=0), total))

    files.rebuild(bend)


@fault("asset", "weights|engine", "decoder.layers.02.deepstack", source="D01")
def last_addition_not_exported(files: Files) -> None:
    """the exported decoder lacks the last DeepStack addition"""
    files.rebuild(lambda towers: setattr(towers.decoder, "deepstack", 2))


@fault("asset", "weights|engine", "decoder.layers.02|kv.keys.02", source="P18")
def rotation_backwards_in_the_program(files: Files) -> None:
    """one exported layer rotates the other way"""
    def bend(towers):
        attention = bend_attention(towers, 2)
        plain = attention.turn
        attention.turn = lambda x, cos, sin: plain(x, cos, -sin)

    files.rebuild(bend)


@fault("asset", "weights|engine", "decoder.layers.01|kv.values.01", source="A04")
def value_written_a_slot_early_in_the_program(files: Files) -> None:
    """one exported layer writes its value over the slot before as well"""
    def bend(towers):
        attention = bend_attention(towers, 1)

        def recall(plain, cache, k, v, visible):
            keys, values = plain(cache, k, v, visible)
            total, layer = visible.shape[1], attention.layer
            held = cache[1][layer:layer + 1]
            cache[1][layer:layer + 1] = torch.slice_scatter(held, v.unsqueeze(0), 3, total - 2, total - 1)
            return keys, values

        wrap(attention, "recall", recall)

    files.rebuild(bend)


@fault("asset", "weights|engine", "gelu.flavour|vision.layers.02", source="N06")
def gelu_of_one_block_exported_exact(files: Files) -> None:
    """one exported vision block has the exact GELU"""
    def bend(towers):
        mlp = towers.vision.blocks[2].mlp
        mlp.forward = lambda x, name, tap: tap(f"{name}.out", mlp.linear_fc2(tap(f"{name}.act", F.gelu(
            tap(f"{name}.fc1", mlp.linear_fc1(x))))))

    files.rebuild(bend)


@fault("asset", "weights|engine", "norm.eps|decoder.layers.02", source="N01")
def eps_of_one_norm_exported(files: Files) -> None:
    """one exported norm adds 1e-5"""
    files.rebuild(lambda towers: setattr(towers.decoder.layers[2].post_attention_layernorm, "eps", 1e-5))


@fault("asset", "weights|engine", "attention.scale|decoder.layers.03", source="A15")
def scale_of_one_layer_exported(files: Files) -> None:
    """one exported layer scales its scores by the root of the number of heads"""
    files.rebuild(lambda towers: setattr(towers.decoder.layers[3].self_attn, "scale", 0.25))


@fault("asset", "weights|engine", "decoder.layers.01", source="N09")
def gate_and_up_exchanged_in_the_program(files: Files) -> None:
    """one exported MLP takes SiLU of the other projection"""
    def bend(towers):
        mlp = towers.decoder.layers[1].mlp
        mlp.forward = lambda x, name, tap: mlp.down_proj(F.silu(mlp.up_proj(x)) * mlp.gate_proj(x))

    files.rebuild(bend)


@fault("asset", "weights", "norm.statistics|decoder.layers.00", source="N10")
def statistics_exported_in_half(files: Files) -> None:
    """the exported text norms take their mean of squares in fp16"""
    def bend(towers):
        for module in rms(towers, ""):
            module.forward = lambda x, m=module: m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.eps))

    files.rebuild(bend)


@fault("asset", "weights", "norm.statistics|vision.layers.00", source="N10")
def vision_statistics_exported_in_half(files: Files) -> None:
    """the exported vision norms take mean and variance in fp16"""
    def bend(towers):
        for module in layer_norms(towers):
            module.forward = lambda x, m=module: _centred(x, m.eps) * m.weight + m.bias

    files.rebuild(bend)


def _centred(x: torch.Tensor, eps: float) -> torch.Tensor:
    less = x - x.mean(-1, keepdim=True)
    return less * torch.rsqrt(less.pow(2).mean(-1, keepdim=True) + eps)


@fault("asset", "none", "none", equivalent=True, source="N10")
def statistics_of_scaled_rows_in_half(files: Files) -> None:
    """the exported text norms divide each row by its largest value, then take their mean of squares in fp16"""
    def bend(towers):
        for module in rms(towers, ""):
            module.forward = lambda x, m=module: m.weight * _scaled(x, m.eps)

    files.rebuild(bend)


def _scaled(x: torch.Tensor, eps: float) -> torch.Tensor:
    part = x / x.abs().amax(-1, keepdim=True).clamp(min=1e-3)
    return part * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + eps)


@fault("asset", "none", "none", equivalent=True, source="N10")
def softmax_exported_in_half(files: Files) -> None:
    """the exported text attention takes its softmax in fp16, as other teams do on purpose"""
    def bend(towers):
        for layer in towers.decoder.layers:
            attention = layer.self_attn
            attention.attend = lambda q, keys, values, visible, a=attention: torch.where(
                visible, q @ keys.transpose(2, 3) * a.scale, -1e4).softmax(-1) @ values

    files.rebuild(bend)


@fault("asset", "weights|engine", "vision.merger", source="V07")
def neighbours_transposed_in_the_program(files: Files) -> None:
    """the exported main merger joins its four patches column by column"""
    def bend(towers):
        merger = towers.vision.merger
        wrap(merger, "forward", lambda plain, x, name, tap: plain(
            x.reshape(-1, 2, 2, x.shape[-1]).transpose(1, 2).reshape(x.shape), name, tap))

    files.rebuild(bend)


@fault("asset", "weights|engine", "vision.eps|vision.layers.00", source="N04")
def vision_eps_exported_tiny(files: Files) -> None:
    """the exported first vision norms add 1e-12"""
    def bend(towers):
        for module in layer_norms(towers, "norm1"):
            module.eps = 1e-12

    files.rebuild(bend)


@fault("asset", "weights|engine", "decoder.layers.03", source="E07")
def residual_not_exported(files: Files) -> None:
    """the last exported layer lost the stream around its MLP"""
    def bend(towers):
        layer = towers.decoder.layers[3]

        def forward(x, rope, visible, cache, name, tap):
            x = x + layer.self_attn(layer.input_layernorm(x), rope, visible, cache, f"{name}.attn", tap)
            made = layer.mlp(layer.post_attention_layernorm(x), f"{name}.mlp", tap)
            tap(name, made[0])
            return made

        layer.forward = forward

    files.rebuild(bend)


@fault("asset", "weights|engine", "decoder.positions|rope.*|decoder.layers.00|kv.keys.00", source="P10")
def rows_and_columns_exchanged_in_the_program(files: Files) -> None:
    """the exported positions exchange h and w"""
    files.rebuild(lambda towers: wrap(towers.decoder.rope, "planes",
                                      lambda plain, *arguments: plain(*arguments)[[0, 2, 1]]))
