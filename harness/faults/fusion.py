"""DeepStack once more: the edges of an image, one tap, small factors, buffers too short, and calls that cut an image."""

from __future__ import annotations

import torch

from harness.faults import fault
from harness.faults.hands import bend_decoder, bend_vision, wrap
from harness.graph.reference import Reference

FIRST, LAST = "decoder.layers.00.deepstack", "decoder.layers.02.deepstack"


def _extra(graph: Reference, around) -> None:
    wrap(bend_decoder(graph), "extra", around)


@fault("graph", "contract|decoder", FIRST, source="D12")
def rows_a_thousandth_large(graph: Reference) -> None:
    """DeepStack rows times 1.001"""
    _extra(graph, lambda plain, *arguments: 1.001 * plain(*arguments))


@fault("graph", "contract|decoder", LAST, source="V09")
def rows_of_the_last_tap_transposed(graph: Reference) -> None:
    """rows of the last tap taken column by column"""
    width = graph.grid[1] // graph.geometry.merge
    order = torch.arange(graph.slots).reshape(-1, width).T.reshape(-1)
    _extra(graph, lambda plain, number, slot, *rest: plain(number, order[slot] if number == 2 else slot, *rest))


@fault("graph", "contract|decoder", FIRST, source="D03")
def token_behind_the_image_gets_a_row(graph: Reference) -> None:
    """the token behind the image gets the last row too"""
    def around(plain, number, slot, is_image, *rest):
        behind = torch.roll(is_image, 1) & ~is_image
        behind[0] = False
        return plain(number, torch.where(behind, graph.slots - 1, slot), is_image | behind, *rest)

    _extra(graph, around)


@fault("graph", "contract|decoder", FIRST, source="D04")
def first_row_lost(graph: Reference) -> None:
    """the first image token gets nothing"""
    _extra(graph, lambda plain, number, slot, is_image, *rest: plain(number, slot, is_image & (slot > 0), *rest))


@fault("graph", "contract|decoder", LAST + "|decoder.layers.03", source="D06")
def last_addition_one_layer_late(graph: Reference) -> None:
    """the last addition happens behind the layer after its own"""
    decoder = bend_decoder(graph)
    held = []

    def extra(plain, number, *rest):
        made = plain(number, *rest)
        if number < 2:
            return made
        held[:] = [made]
        return torch.zeros_like(made)

    wrap(decoder, "extra", extra)
    wrap(decoder.layers[3], "forward", lambda plain, x, rope, visible, cache, name, tap: plain(
        x, rope, visible, cache, name, tap) + held[0][None])


@fault("graph", "contract|decoder", "decoder.layers.01.deepstack", source="D03")
def rows_replace_the_stream(graph: Reference) -> None:
    """after one layer the rows replace the stream instead of adding to it"""
    decoder = bend_decoder(graph)
    held = []

    def layer(plain, *arguments):
        made = plain(*arguments)
        held[:] = [made]
        return made

    wrap(decoder.layers[1], "forward", layer)
    wrap(decoder, "extra", lambda plain, number, slot, is_image, *rest: plain(number, slot, is_image, *rest) - (
        held[0][0] * is_image[:, None] if number == 1 else 0))


@fault("graph", "contract|decoder", FIRST, source="D12")
def rows_in_bfloat16(graph: Reference) -> None:
    """the DeepStack buffer holds bfloat16"""
    _extra(graph, lambda plain, *arguments: plain(*arguments).bfloat16().float())


@fault("graph", "contract|decoder", FIRST, source="D04")
def buffer_of_128_rows(graph: Reference) -> None:
    """slots past the 128th take its row: a buffer of another image size"""
    _extra(graph, lambda plain, number, slot, *rest: plain(number, slot.clamp(max=127), *rest))


@fault("graph", "decoder", "decoder.embed", source="V10")
def last_image_row_repeats(graph: Reference) -> None:
    """the last image token takes the row before its own"""
    wrap(bend_decoder(graph), "mix", lambda plain, text, image, slot, is_image: plain(
        text, image, slot.clamp(max=graph.slots - 2), is_image))


@fault("graph", "decoder", "decoder.embed", source="D12")
def image_rows_a_thousandth_small(graph: Reference) -> None:
    """image embeddings times 0.999"""
    wrap(bend_decoder(graph), "mix", lambda plain, text, image, *rest: plain(text, 0.999 * image, *rest))


@fault("graph", "decoder", "decoder.embed", source="V09")
def image_rows_transposed_where_not_square(graph: Reference) -> None:
    """image rows scattered column by column where the grid is not square"""
    height, width = (side // graph.geometry.merge for side in graph.grid)
    order = torch.arange(graph.slots).reshape(height, width).T.reshape(-1)
    if height != width:
        wrap(bend_decoder(graph), "mix", lambda plain, text, image, *rest: plain(text, image[order], *rest))


@fault("graph", "decoder", "decoder.embed", source="D03")
def text_rows_scaled(graph: Reference) -> None:
    """text embeddings times the root of the width, as another family does, beside the image"""
    wrap(bend_decoder(graph), "mix", lambda plain, text, *rest: plain(text * 1.002, *rest))


@fault("graph", "vision", "vision.deepstack.1", "output|norm", source="D07")
def middle_tap_reads_the_first_block(graph: Reference) -> None:
    """the middle DeepStack merger reads block 0"""
    tower = bend_vision(graph)
    tower.source = lambda streams, number: streams[0 if number == 1 else number]


@fault("graph", "vision|contract", "vision.deepstack.1|decoder.layers.01.deepstack", source="D07")
def one_merger_for_all_taps(graph: Reference) -> None:
    """the first DeepStack merger serves every tap"""
    for merger in graph.vision.deepstack_merger_list[1:]:
        merger.forward = graph.vision.deepstack_merger_list[0].forward


@fault("graph", "contract", "calls.chunked|" + FIRST, source="D04")
def later_calls_add_nothing(graph: Reference) -> None:
    """additions happen in the first call only"""
    _extra(graph, lambda plain, number, slot, is_image, deepstack, place: plain(
        number, slot, is_image & (place[0] == 0), deepstack, place))


@fault("graph", "contract|decode", "calls.chunked|" + FIRST, source="D10")
def decode_steps_add_the_first_row(graph: Reference) -> None:
    """a call of one token adds row 0 whatever the token is"""
    _extra(graph, lambda plain, number, slot, is_image, deepstack, place: plain(
        number, slot, is_image | (len(slot) == 1), deepstack, place))


@fault("graph", "contract", "calls.chunked|" + FIRST, source="D13")
def last_row_of_a_call_lost(graph: Reference) -> None:
    """a call that ends inside an image drops the row of its last token"""
    def around(plain, number, slot, is_image, deepstack, place):
        kept = is_image.clone()
        kept[-1] = kept[-1] & ((slot[-1] == graph.slots - 1) | (len(slot) == 1))
        return plain(number, slot, kept, deepstack, place)

    _extra(graph, around)


@fault("graph", "contract|vision|decoder", "vision.deepstack.0|decoder.layers.00.deepstack", source="D06")
def taps_leave_in_reverse(graph: Reference) -> None:
    """the vision tower returns its three DeepStack blocks last first"""
    tower = bend_vision(graph)
    wrap(tower, "finish", lambda plain, image, deepstack: plain(
        image, deepstack.reshape(3, -1, deepstack.shape[1]).flip(0).reshape(deepstack.shape)))


@fault("graph", "contract|vision|decoder", "vision.merger|decoder.embed|vision.deepstack.0|decoder.layers.00.deepstack",
       source="D06")
def payload_exchanged(graph: Reference) -> None:
    """the vision tower's main output and its first DeepStack block in each other's place"""
    tower = bend_vision(graph)
    wrap(tower, "finish", lambda plain, image, deepstack: plain(
        deepstack[:len(image)], torch.cat([image, deepstack[len(image):]])))
