"""DeepStack and fusion: which features, onto which tokens, after which layer, at what size."""

from __future__ import annotations

import torch

from harness.faults import fault
from harness.faults.hands import bend_decoder, bend_vision, wrap
from harness.graph.reference import Reference

ADD = "decoder.layers.00.deepstack"


@fault("graph", "contract", ADD, source="D01")
def additions_dropped(graph: Reference) -> None:
    """no DeepStack addition in the decoder"""
    bend_decoder(graph).extra = lambda number, slot, is_image, deepstack, place: torch.zeros(1, deepstack.shape[1])


@fault("graph", "contract", "decoder.layers.02.deepstack", source="D01")
def last_addition_dropped(graph: Reference) -> None:
    """the last DeepStack addition missing"""
    wrap(bend_decoder(graph), "extra", lambda plain, number, *rest: plain(number, *rest) * (number != 2))


@fault("graph", "contract", ADD, source="D03")
def added_to_every_token(graph: Reference) -> None:
    """rows added to text tokens too"""
    bend_decoder(graph).extra = lambda number, slot, is_image, deepstack, place: deepstack[slot + number * graph.slots]


@fault("graph", "contract", ADD, source="D03")
def visual_mask_one_late(graph: Reference) -> None:
    """the mask of visual tokens one position late"""
    decoder = bend_decoder(graph)
    wrap(decoder, "extra", lambda plain, number, slot, is_image, *rest: plain(
        number, slot, torch.roll(is_image, 1), *rest))


@fault("graph", "contract", ADD, source="D04")
def rows_one_further(graph: Reference) -> None:
    """every image token takes its neighbour's row"""
    wrap(bend_decoder(graph), "extra", lambda plain, number, slot, *rest: plain(
        number, (slot + 1).clamp(max=graph.slots - 1), *rest))


@fault("graph", "contract", ADD, source="D04")
def last_row_zero(graph: Reference) -> None:
    """the last image token gets nothing"""
    wrap(bend_decoder(graph), "extra", lambda plain, number, slot, *rest: plain(
        number, slot, *rest) * (slot < graph.slots - 1)[:, None])


@fault("graph", "contract", "calls.chunked|decoder.layers.00.deepstack", source="D04")
def rows_restart_with_each_chunk(graph: Reference) -> None:
    """in a later chunk the rows start again at the first"""
    wrap(bend_decoder(graph), "extra", lambda plain, number, slot, is_image, deepstack, place: plain(
        number, torch.where(is_image & (place[0] > 0), slot - slot[is_image].min() if is_image.any() else slot, slot),
        is_image, deepstack, place))


@fault("graph", "contract", "calls.chunked|decoder.layers.00.deepstack", source="D13")
def slices_slip_in_later_chunks(graph: Reference) -> None:
    """an image that spans two calls reads the next tap's rows in the second"""
    wrap(bend_decoder(graph), "extra", lambda plain, number, slot, is_image, deepstack, place: plain(
        (number + int(place[0] > 0 and bool(is_image.any()))) % 3, slot, is_image, deepstack, place))


@fault("graph", "contract", "decoder.layers.01.deepstack", source="D06")
def chunks_exchanged(graph: Reference) -> None:
    """features of taps 1 and 2 exchanged on their way into the decoder"""
    wrap(bend_decoder(graph), "extra", lambda plain, number, *rest: plain((0, 2, 1)[number], *rest))


@fault("graph", "contract", ADD, source="D06")
def added_one_layer_late(graph: Reference) -> None:
    """each addition after the layer behind its own"""
    decoder = bend_decoder(graph)
    wrap(decoder, "extra", lambda plain, number, slot, is_image, deepstack, place: (
        plain(number - 1, slot, is_image, deepstack, place) if number else torch.zeros(1, deepstack.shape[1])))


@fault("graph", "weights", "model.visual.deepstack_merger_list.0.*|model.visual.deepstack_merger_list.1.*",
       source="D07")
def mergers_exchanged(graph: Reference) -> None:
    """the weights of two DeepStack mergers exchanged"""
    mergers = graph.vision.deepstack_merger_list
    mergers[0], mergers[1] = mergers[1], mergers[0]


@fault("graph", "vision", "vision.deepstack.0", "output|norm", source="D07")
def taps_one_block_late(graph: Reference) -> None:
    """features tapped one block late"""
    tower = bend_vision(graph)
    tower.source = lambda streams, number: streams[min(number + 1, len(streams) - 1)]
    wrap(tower, "forward", lambda plain, patches: _all_streams(tower, patches))


def _all_streams(tower, patches):
    """Every block first, then the mergers: what a late tap needs."""
    tap, streams = tower.tap, []
    x = tap("vision.embed", tower.patch_embed(patches) + tower.positions)
    for number, block in enumerate(tower.blocks):
        x = block(x, tower.cos, tower.sin, f"vision.layers.{number:02d}", tap)
        streams.append(x)
    found = [merger(streams[min(number + 1, len(streams) - 1)], f"vision.deepstack.{place}", tap)
             for place, (number, merger) in enumerate(zip(tower.taps, tower.deepstack_merger_list))]
    return tower.merger(x, "vision.merger", tap), torch.cat(found)


@fault("graph", "contract", ADD, source="D12")
def rows_scaled(graph: Reference) -> None:
    """DeepStack rows times 0.9"""
    wrap(bend_decoder(graph), "extra", lambda plain, *arguments: 0.9 * plain(*arguments))


@fault("graph", "decoder", "decoder.embed", source="D12")
def image_rows_scaled(graph: Reference) -> None:
    """image embeddings scaled before they enter the sequence"""
    wrap(bend_decoder(graph), "mix", lambda plain, text, image, *rest: plain(text, 0.98 * image, *rest))


@fault("graph", "decoder", "decoder.embed", source="V09")
def image_rows_transposed(graph: Reference) -> None:
    """merged tokens scattered column by column"""
    width = graph.grid[1] // graph.geometry.merge

    def mix(plain, text, image, *rest):
        return plain(text, image.reshape(-1, width, image.shape[1]).transpose(0, 1).reshape(image.shape), *rest)

    wrap(bend_decoder(graph), "mix", mix)


@fault("graph", "decoder", "decoder.embed", source="T07")
def placeholders_embedded_as_text(graph: Reference) -> None:
    """image tokens keep the embedding of the placeholder"""
    bend_decoder(graph).mix = lambda text, image, slot, is_image: text


@fault("graph", "contract", "deepstack.0", source="D09")
def mask_from_the_first_token(graph: Reference) -> None:
    """the visual mask counted from the sequence's start instead of the image's"""
    decoder = bend_decoder(graph)
    wrap(decoder, "extra", lambda plain, number, slot, is_image, *rest: plain(
        number, slot, torch.arange(len(slot)) < is_image.sum(), *rest))


@fault("graph", "vision", "vision.deepstack.2", "output", source="D12")
def one_merger_output_scaled(graph: Reference) -> None:
    """one DeepStack merger's output a fifth of a percent too large"""
    wrap(graph.vision.deepstack_merger_list[2].linear_fc2, "forward", lambda plain, x: 1.002 * plain(x))
