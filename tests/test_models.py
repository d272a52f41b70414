"""Whole models: every parameter of each, and what it is treated as. Small ones from configs, nothing is downloaded."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from spectral_ops.layers import discover
from spectral_ops.recognition import _is_zero_centred
from spectral_ops.rules import Rule

transformers = pytest.importorskip("transformers")

Row = tuple[str, str, int]  # pattern, treated as, number of parameters


def small(name: str, config: str, **sizes: Any) -> nn.Module:
    """A model of transformers with two layers of width 32, or as `sizes` says."""
    if config in ("ViT", "Bert", "Llama", "Gemma"):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, **sizes}
    return getattr(transformers, name)(getattr(transformers, f"{config}Config")(**sizes))


def assert_treated(model: nn.Module, rows: list[Row], **arguments: Any) -> None:
    """Every parameter matches exactly one row, is treated as it says, and each row matches its number of parameters."""
    entries = discover(model, **arguments)
    assert [entry.name for entry in entries] == [name for name, _ in model.named_parameters()]
    for entry in entries:
        matching = [row for row in rows if fnmatch.fnmatchcase(entry.name, row[0])]
        assert len(matching) == 1, f"{entry.name} ({entry.treated_as}) matches the rows {matching}"
        assert entry.treated_as == matching[0][1], f"{entry.name}: {entry.reason}"
    counts = {row: sum(fnmatch.fnmatchcase(entry.name, row[0]) for entry in entries) for row in rows}
    assert all(count == row[2] for row, count in counts.items()), counts


def test_transformer_encoder() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, norm=nn.LayerNorm(8))
    rows = [
        ("layers.*.self_attn.in_proj_weight", "3 matrices", 2),
        ("layers.*.self_attn.in_proj_bias", "3 biases", 2),
        ("layers.*.self_attn.out_proj.weight", "matrix", 2),
        ("layers.*.self_attn.out_proj.bias", "bias", 2),
        ("layers.*.linear?.weight", "matrix", 4),
        ("layers.*.linear?.bias", "bias", 4),
        ("*norm*.weight", "scale", 5),
        ("*norm*.bias", "shift", 5),
    ]
    assert_treated(model, rows)


def test_lstm() -> None:
    rows = [
        ("weight_ih_l?*", "4 matrices", 4),
        ("weight_hh_l?*", "4 matrices", 4),
        ("weight_hr_l?*", "matrix", 4),
        ("bias_?h_l?*", "4 biases", 8),
    ]
    assert_treated(nn.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=4), rows)


def test_vit() -> None:
    model = small("ViTForImageClassification", "ViT", image_size=16, patch_size=8, num_labels=5)
    rows = [
        ("vit.embeddings.cls_token", "left out", 1),
        ("vit.embeddings.position_embeddings", "left out", 1),
        ("vit.embeddings.patch_embeddings.projection.weight", "matrix", 1),
        ("vit.embeddings.patch_embeddings.projection.bias", "bias", 1),
        ("vit.layers.*.attention.[qkvo]_proj.weight", "matrix", 8),
        ("vit.layers.*.attention.[qkvo]_proj.bias", "bias", 8),
        ("vit.layers.*.mlp.fc?.weight", "matrix", 4),
        ("vit.layers.*.mlp.fc?.bias", "bias", 4),
        ("vit.*layernorm*.weight", "scale", 5),
        ("vit.*layernorm*.bias", "shift", 5),
        ("classifier.weight", "matrix", 1),
        ("classifier.bias", "bias", 1),
    ]
    assert_treated(model, rows)


def test_bert() -> None:
    model = small("BertForMaskedLM", "Bert", vocab_size=50, max_position_embeddings=16)
    rows = [
        ("bert.embeddings.*_embeddings.weight", "left out", 3),
        ("bert.encoder.layer.*.attention.self.*.weight", "matrix", 6),
        ("bert.encoder.layer.*.attention.self.*.bias", "bias", 6),
        ("bert.encoder.layer.*.dense.weight", "matrix", 6),
        ("bert.encoder.layer.*.dense.bias", "bias", 6),
        ("cls.predictions.transform.dense.weight", "matrix", 1),
        ("cls.predictions.transform.dense.bias", "bias", 1),
        ("cls.predictions.bias", "bias", 1),  # shared with the decoder, whose weight is the word embedding
        ("*.LayerNorm.weight", "scale", 6),
        ("*.LayerNorm.bias", "shift", 6),
    ]
    assert_treated(model, rows)
    reasons = {entry.name: entry.reason for entry in discover(model)}
    assert reasons["bert.embeddings.word_embeddings.weight"] == "embedding, tied with cls.predictions.decoder.weight"


GPT2_SIZES = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
GPT2_ROWS: list[Row] = [
    ("transformer.wte.weight", "left out", 1),  # and lm_head, tied with it
    ("transformer.wpe.weight", "left out", 1),
    ("transformer.h.*.attn.c_attn.weight", "matrix", 2),
    ("transformer.h.*.attn.c_attn.bias", "bias", 2),
    ("transformer.h.*.attn.c_proj.weight", "matrix", 2),
    ("transformer.h.*.attn.c_proj.bias", "bias", 2),
    ("transformer.h.*.mlp.c_*.weight", "matrix", 4),
    ("transformer.h.*.mlp.c_*.bias", "bias", 4),
    ("transformer.*ln_?.weight", "scale", 5),
    ("transformer.*ln_?.bias", "shift", 5),
]


def test_gpt2() -> None:
    assert_treated(small("GPT2LMHeadModel", "GPT2", vocab_size=50, **GPT2_SIZES), GPT2_ROWS)


def test_gpt2_with_a_rule_for_its_packed_projection() -> None:
    model = small("GPT2LMHeadModel", "GPT2", vocab_size=50, **GPT2_SIZES)
    split = {"matrix": "3 matrices", "bias": "3 biases"}
    rows = [(pattern, split[how] if "c_attn" in pattern else how, count) for pattern, how, count in GPT2_ROWS]
    assert_treated(model, rows, rules={"*.c_attn.weight": Rule(split=(3, 1))})


def test_gpt2_with_an_untied_head() -> None:
    model = small("GPT2LMHeadModel", "GPT2", vocab_size=50, tie_word_embeddings=False, **GPT2_SIZES)
    assert_treated(model, [*GPT2_ROWS, ("lm_head.weight", "matrix", 1)])


def test_llama() -> None:
    model = small("LlamaForCausalLM", "Llama", vocab_size=50, num_key_value_heads=1)
    rows = [
        ("model.embed_tokens.weight", "left out", 1),
        ("model.layers.*.self_attn.[qkvo]_proj.weight", "matrix", 8),
        ("model.layers.*.mlp.*_proj.weight", "matrix", 6),
        ("model.*norm.weight", "scale", 5),
        ("lm_head.weight", "matrix", 1),
    ]
    assert_treated(model, rows)


def test_gemma_has_norms_around_zero() -> None:
    model = small("GemmaForCausalLM", "Gemma", vocab_size=50, num_key_value_heads=1, head_dim=16)
    rows = [
        ("model.embed_tokens.weight", "left out", 1),  # and lm_head, tied with it
        ("model.layers.*.self_attn.[qkvo]_proj.weight", "matrix", 8),
        ("model.layers.*.mlp.*_proj.weight", "matrix", 6),
        ("model.*norm.weight", "left out", 5),
    ]
    assert_treated(model, rows)


def test_convnext() -> None:
    stages = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 2]}
    model = small("ConvNextForImageClassification", "ConvNext", num_labels=5, **stages)
    rows = [
        ("convnext.embeddings.patch_embeddings.weight", "matrix", 1),
        ("convnext.embeddings.patch_embeddings.bias", "bias", 1),
        ("convnext.encoder.stages.0.layers.*.dwconv.weight", "8 matrices", 1),  # depthwise: one per filter
        ("convnext.encoder.stages.0.layers.*.dwconv.bias", "8 biases", 1),
        ("convnext.encoder.stages.1.layers.*.dwconv.weight", "16 matrices", 2),
        ("convnext.encoder.stages.1.layers.*.dwconv.bias", "16 biases", 2),
        ("convnext.encoder.stages.*.pwconv?.weight", "matrix", 6),
        ("convnext.encoder.stages.*.pwconv?.bias", "bias", 6),
        ("convnext.encoder.stages.*.layer_scale_parameter", "left out", 3),
        ("convnext.encoder.stages.1.downsampling_layer.0.weight", "scale", 1),
        ("convnext.encoder.stages.1.downsampling_layer.0.bias", "shift", 1),
        ("convnext.encoder.stages.1.downsampling_layer.1.weight", "matrix", 1),
        ("convnext.encoder.stages.1.downsampling_layer.1.bias", "bias", 1),
        ("convnext.*layernorm.weight", "scale", 5),
        ("convnext.*layernorm.bias", "shift", 5),
        ("classifier.weight", "matrix", 1),
        ("classifier.bias", "bias", 1),
    ]
    assert_treated(model, rows)


def test_resnet() -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}
    model = small("ResNetForImageClassification", "ResNet", num_labels=5, **sizes)
    rows = [
        ("resnet.*.convolution.weight", "matrix", 12),
        ("resnet.*.normalization.weight", "scale", 12),
        ("resnet.*.normalization.bias", "shift", 12),
        ("classifier.1.weight", "matrix", 1),
        ("classifier.1.bias", "bias", 1),
    ]
    assert_treated(model, rows)


ADDS_ONE = re.compile(
    r"\b1(\.0)? \+ self\.(weight|gamma|scale)\b|self\.(weight|gamma|scale)\b(\.float\(\))? \+ (1|self\.unit)"
)


def test_every_zero_centred_norm_of_transformers_is_known() -> None:
    """When a new one appears, it belongs in ZERO_CENTRED_NORMS: its weight would be pulled to a scale of two."""
    found = set()
    for source in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = source.read_text(encoding="utf-8")
        if ADDS_ONE.search(text):
            classes = re.split(r"^class ", text, flags=re.MULTILINE)[1:]
            found |= {body.split("(")[0] for body in classes if ADDS_ONE.search(body)}
    assert {"GemmaRMSNorm", "NemotronLayerNorm1P"} <= found
    unknown = sorted(name for name in found if not _is_zero_centred(type(name, (nn.Module,), {})()))
    assert not unknown
