"""A LanguageBundle and a vision bundle as another team would ship them: `port.py` through coreai_torch, RELEASE mode.

Nothing of the harness is imported: what its engine and its rungs learn about these bundles, they read from the bundles.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import coreai_torch
import torch
from coreai_opt import ExportBackend
from coreai_opt.quantization import Quantizer, QuantizerConfig
from torch import nn
from torch.export import Dim, export

from third_party.port import decoder, encoder

BODY, HEAD = "symmetric_with_clipping", "symmetric"
INPUTS = ["input_ids", "position_ids", "image_embeds", "deepstack_embeds", "rope_shift_start", "rope_shift_amount"]


def quiet(name, value):
    return value


class Store(nn.Module):
    """A port's weights in fp16 under the port's own names: matrices as Linears, which a quantizer can take."""

    def __init__(self, weights, matrices):
        super().__init__()
        self.tables = {k: t.half() for k, t in weights.items() if k not in matrices}
        self.linears = nn.ModuleDict()
        for k in matrices:
            linear = nn.Linear(*reversed(weights[k].shape), bias=False)
            linear.weight = nn.Parameter(weights[k].half(), requires_grad=False)
            self.linears[k.replace(".", "_")] = linear
        self.names = dict(zip(matrices, self.linears))

    def forward(self):
        return [linear(torch.zeros(1, linear.in_features, dtype=torch.float16)) for linear in self.linears.values()]

    def weights(self):
        return self.tables | {k: self.linears[n].weight for k, n in self.names.items()}


class Decode(nn.Module):
    def __init__(self, port, context, quantized):
        super().__init__()
        self.spec, self.c = port.spec, port.c | {k: port.c[k][:context] for k in ("cos", "sin")}
        own = {k: t for k, t in port.w.items() if k.startswith("t")}
        matrices = [k for k in own if k.split(".")[1] in ("wqkv", "wo", "w13", "w2")]
        if quantized and port.spec["tied"]:
            own["t.head"], self.spec = own["t.embed"], port.spec | {"tied": False}
        head = {"t.head": own.pop("t.head")} if "t.head" in own else {}
        self.body, self.head = Store(own, matrices), Store(head, list(head))
        if quantized:
            compress(self.body, BODY)
            compress(self.head, HEAD)

    def forward(self, input_ids, position_ids, image_embeds, deepstack_embeds, rope_shift_start, rope_shift_amount,
                keyCache, valueCache):
        weights = self.body.weights() | self.head.weights()
        return decoder(weights, self.c, self.spec, input_ids, position_ids, image_embeds, deepstack_embeds,
                       rope_shift_start, rope_shift_amount, keyCache, valueCache, quiet)


class Encode(nn.Module):
    def __init__(self, port):
        super().__init__()
        self.spec, self.c = port.spec, port.c
        self.w = {k: t.half() for k, t in port.w.items() if not k.startswith("t")}

    def forward(self, patches):
        return encoder(self.w, self.c, self.spec, patches, quiet)


def compress(store, scheme):
    """int8 codes with an fp16 scale for every 32 input features."""
    weight = {"dtype": "int8", "qscheme": scheme, "granularity": {"type": "per_block", "block_size": 32, "axis": 1}}
    config = {"execution_mode": "eager", "global_config": {
        "op_state_spec": {"weight": weight}, "op_input_spec": None, "op_output_spec": None}}
    quantizer = Quantizer(store, QuantizerConfig.from_dict({"quantization_config": config}))
    quantizer.finalize(quantizer.prepare(example_inputs=()), backend=ExportBackend.CoreAI)


def convert(module, example, shapes, inputs, states, outputs, path):
    program = export(module.eval(), example, dynamic_shapes=shapes).run_decompositions(coreai_torch.get_decomp_table())
    converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
    converter.add_exported_program(program, input_names=inputs, state_names=states, output_names=outputs)
    converter.to_coreai().save_asset(path)


def ship_decoder(port, checkpoint, folder, mode="fp16", context=64):
    """Write a LanguageBundle; mode fp16, or int8hu: blocks of 32 in the body, an int8 head of its own."""
    folder, half = Path(folder), torch.float16
    hidden, taps = port.w["t.embed"].shape[1], len(port.spec["taps"])
    cache = torch.zeros(port.spec["L"], 1, port.spec["K"], context, port.spec["D"], dtype=half)
    example = (torch.zeros(1, 1, dtype=torch.int32), torch.arange(8, dtype=torch.int32)[None],
               torch.zeros(port.slots, hidden, dtype=half), torch.zeros(taps * port.slots, hidden, dtype=half),
               torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), cache, cache.clone())
    language = {"tokenizer": "acme/vl-tiny", "vocab_size": port.spec["V"], "max_context_length": context,
                "embedded_tokenizer": True, "function_map": {"main": ["main"]}}
    describe(folder, {"kind": "llm", "compression": mode, "language": language})
    convert(Decode(port, context, mode != "fp16"), example, (None, {1: Dim("T", min=2, max=context - 1)}, *[None] * 6),
            INPUTS, ["keyCache", "valueCache"], ["logits"], folder / f"{folder.name}.aimodel")
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(checkpoint) / name, folder / "tokenizer" / name)
    return folder


def ship_vision(port, folder):
    """Write a vision bundle, fp16."""
    folder = Path(folder)
    describe(folder, {"kind": "vision", "compression": "fp16"})
    patches = torch.zeros(len(port.c["place"]), port.w["v.patch.w"].shape[1], dtype=torch.float16)
    convert(Encode(port), (patches,), None, ["patches"], [], ["image_embeds", "deepstack_embeds"],
            folder / f"{folder.name}.aimodel")
    return folder


def describe(folder, about):
    folder.mkdir(parents=True)
    about |= {"metadata_version": "0.2", "name": folder.name, "assets": {"main": f"{folder.name}.aimodel"},
              "source": {"model_definition": "acme.vl", "hf_model_id": "acme/vl-tiny"}, "x_acme_build": 7,
              "compilation": {"date": "2026-11-01T00:00:00Z", "targets": []}}
    (folder / "metadata.json").write_text(json.dumps(about))
