"""A model folder against a GGUF file made of it, rightly and wrongly."""

from __future__ import annotations

import ctypes
from base64 import b85decode
from dataclasses import replace

import gguf
import pytest
import torch
from tiny import LLAMA, random_model

import pellucid
from pellucid.checkpoints import load_model, open_checkpoint
from pellucid.checkpoints.formats.gguf_tokenizer import NONE, tokenizer_keys
from pellucid.checkpoints.formats.gguf_writing import write_gguf
from pellucid.diff.gguf_types import declared_type
from pellucid.families.names import PairOrder
from pellucid.gguf_file import read_header
from pellucid.language_model import LanguageModel
from pellucid.models import RopeConfig
from pellucid.tokenizers.gguf import PRE, from_keys

SCALED = RopeConfig(theta=1e4, type="llama3", factor=8.0, original_context=32)
CONFIG = replace(LLAMA, width=64, hidden_width=96, head_dim=16, rope=SCALED)
ORDER = PairOrder(pairs="neighbours", head_dim=16, turned=16)
ORDER8 = PairOrder(pairs="neighbours", head_dim=8, turned=8)
TOKENS = list(range(2, 14))
# One block of each type, made by llama.cpp's quantiser (ggml_quantize_chunk) from `_row()`
_BLOCK = {
    "Q2_K": (
        '@2>Bz|E~Yvj^Cc&eeb{Tq>@T1s;Q-?o_gx4sic!iC6$$xlTLZ%m6eo|N-5=)C6$#_Q%-s1l~q(yNhOt)rKFN'
        'dDypfamtK16simZn#wb24'
    ),
    "Q3_K": (
        'oH=v%@6Vh$bNB!6&YU@O<IkTze*E$4-@kwU^x?~&3^K$JKmZOq?X=K90}VFVV1NJu2qTQ}Kmi9G_gt_*?6AN'
        'A2qTOzzySsscieEm0}V3BAb<b@3oW$JKm!dn;|kI`!b-w0@DK0<F`x'
    ),
    "Q4_K": (
        'DHx<9{`vX&{Qds_jh(;GPztz*hlX=K>8FQ>g<%`WmxqRQPWh*YhlXM-*q4Wgh=ouKxtNHDb3W>*h=_(^9Lbo'
        '7hjdT+sECM$VlCO2hj(^lPx+U3cXnbd$cJ}!bx;bYhj(^kJ=vFccXd%48@Pvec4SWJmv?t|Vl2pqcXxGA3aE'
        '#7c4Ix+mv?t{'
    ),
    "Q5_K": (
        'z7rB8{{H^{`uzR>Uw)3CY{`QMA3kj9!-o$ZK5WT@2M-=RX~TyP9zJZz!-o$Zum*7u01oGT(?Adp48u5rAOH^'
        'epY>4?4-M5?qA&mt5DTyeav=~N_l?v+5fBX1IFd0DANjBKQ6Uf=<yxaL9{&C4pY%@-{`|#Rp)UUY>YxQ+4*v'
        'Yte8NBe{`;~wIDsGk{^_6eKo9@@#af~-|NiQr24N5X{nvcMFc1Ix'
    ),
    "Q6_K": (
        ';avj2APf)5=W%c!2=;(f@W2BOFa{1_@dg)rny|0}2H{)+upkT%$md~T9|-o38~`u_55NZgpb-c7n`=N&@W28'
        'KA;unH-~<9&O244-2H;==;4lmi&iS!`9|-n@tnk1B3^CRYVBiG<Yg)gc4hG<F6VNaW56$_Ja32Wulu}A6s;Q'
        ')tPCDwTrIb@j2HL8ssBuNsnyRa8aR%C|#u{p>sG)@xT57ATvBefzrIb@jDypfZlTJG7sil-tc#wLNdX;@_fN'
        'X<phH;E{5)1'
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def state():
    return random_model(CONFIG, torch.float32).state_dict()


@pytest.fixture(scope="module")
def model(state):
    model = random_model(CONFIG, torch.float32)
    model.load_state_dict(state)
    return model


def side(path):
    """What a path with a tokenizer would be, for a file without."""
    checkpoint = open_checkpoint(path)
    tokenizer = pellucid.tokenizers.load(pellucid.checkpoints.resolve("demo"))
    return LanguageModel(load_model(checkpoint), tokenizer, checkpoint)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_each_block_is_proven(state, kind):
    a, number = state["layers.0.mlp.up_proj.weight"], gguf.GGMLQuantizationType[kind]
    b = torch.from_numpy(gguf.dequantize(gguf.quantize(a.numpy(), number), number))
    cause, finding, verdict = declared_type(a, b, kind)
    assert (cause, verdict) == ("quantised weights", "explained") and "192 groups" in finding
    b[5, 40] += 0.01
    cause, finding, verdict = declared_type(a, b, kind)
    assert verdict == "fault" and "1 of 192 groups" in finding and "[5, 32:64] first" in finding
    assert declared_type(torch.randn_like(a), b, kind) is None


def _row():
    """256 numbers, small ones the most, as weights are."""
    places = torch.arange(256, dtype=torch.float64)
    return ((((places * 7919 + 13) % 1009 - 504) / 504) ** 3).float()


@pytest.mark.parametrize("kind", _BLOCK)
def test_blocks_whose_scales_were_searched_are_proven(kind):
    block = torch.frombuffer(bytearray(b85decode(_BLOCK[kind])), dtype=torch.uint8)
    here = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1], [1, 0], [1, 1], [0, 1], [1, 0]])
    raw = (here[..., None] * block).flatten(1).byte()  # a block of zeros is 0.0
    a, number = (here[..., None] * _row()).flatten(1), gguf.GGMLQuantizationType[kind]

    def values(blocks):
        return torch.from_numpy(gguf.dequantize(blocks.numpy(), number))

    cause, finding, verdict = declared_type(a, values(raw), kind, raw=raw)
    assert (cause, verdict) == ("quantised weights", "explained") and f"A's in {kind}" in finding
    assert declared_type(a, values(raw), kind) is None  # without the file's blocks nothing is said
    for wrong in (a * 1.05, a.roll(1, 1), a.flip(1), -a):
        found = declared_type(wrong, values(raw), kind, raw=raw)
        assert found is None or found[2] == "fault"
    paired = ORDER8.theirs(raw)  # as llama.cpp's Llama files have them, and nobody turned back
    found = declared_type(a, values(paired), kind, head_dim=8, raw=paired)
    assert found is not None and found[0] == "q/k not permuted"
    where = {"Q2_K": 20, "Q3_K": 40, "Q4_K": 30, "Q5_K": 60, "Q6_K": 20}[kind]  # codes
    raw[5, where] ^= 0xFF
    cause, finding, verdict = declared_type(a, values(raw), kind, raw=raw)
    assert verdict == "fault" and "groups are not A's rounded, [5, " in finding


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_scales_that_were_fitted_to_their_codes_are_proven(state, kind):
    """As an importance matrix does: the codes are of one scale, the block holds another."""
    a, number = state["layers.0.mlp.up_proj.weight"], gguf.GGMLQuantizationType[kind]
    size = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24}[kind]
    raw = torch.from_numpy(gguf.quantize(a.numpy(), number)).clone()
    scales = raw.view(len(a), -1, size)[..., :2].contiguous().view(torch.float16)
    raw.view(len(a), -1, size)[..., :2] = (scales * 1.01).view(torch.uint8)

    def values(raw):
        return torch.from_numpy(gguf.dequantize(raw.numpy(), number))

    cause, finding, verdict = declared_type(a, values(raw), kind, raw=raw)
    assert (cause, verdict) == ("quantised weights", "explained") and "192 groups" in finding
    for wrong in (a * 1.1, a.roll(1, 1), -a):
        found = declared_type(wrong, values(raw), kind, raw=raw)
        assert found is None or found[2] == "fault"
    raw[5, -1] ^= 0xF0
    cause, finding, verdict = declared_type(a, values(raw), kind, raw=raw)
    assert verdict == "fault" and "1 of 192 groups" in finding


def test_a_file_in_eight_bits_is_explained(tmp_path, model, state):
    write_gguf(tmp_path / "a.gguf", CONFIG, state.__getitem__, "Q8_0", NONE)
    report = pellucid.diff(model, side(tmp_path / "a.gguf"), TOKENS)
    assert report.verdict == "explained"


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_permutation_left_out_is_named(tmp_path, model, state, kind):
    def unpermuted(name):  # the writer permutes: what it gets here comes out as it was
        turned = name.endswith(("q_proj.weight", "k_proj.weight"))
        return ORDER.ours(state[name]) if turned else state[name]

    write_gguf(tmp_path / "a.gguf", CONFIG, unpermuted, kind, NONE)
    report = pellucid.diff(model, side(tmp_path / "a.gguf"), TOKENS)
    assert report.verdict == "diverged"
    assert "q/k not permuted" in str(report.to_json())


def test_a_scaling_left_out_is_named(tmp_path, model, state):
    plain = replace(CONFIG, rope=RopeConfig(theta=1e4))
    write_gguf(tmp_path / "a.gguf", plain, state.__getitem__, "F32", NONE)
    report = pellucid.diff(model, side(tmp_path / "a.gguf"), TOKENS)
    assert report.verdict == "diverged" and "RoPE scaling missing" in str(report.to_json())


def test_a_wrong_pre_tokenizer_is_seen():
    folder = pellucid.checkpoints.resolve("demo")
    before = pellucid.load("demo")
    keys = tokenizer_keys(before.tokenizer, folder, before.config.vocab_size)
    text = "x = 12345;  don't\n\n  y(ab)\t!!\n"
    ids = before.tokenizer.encode(text)
    assert from_keys(keys, "right.gguf").encode(text) == ids
    every = (from_keys({**keys, "tokenizer.ggml.pre": word}, "wrong.gguf") for word in PRE)
    wrong = next(tokenizer for tokenizer in every if tokenizer.encode(text) != ids)
    after = LanguageModel(before.model, wrong, before.checkpoint)
    report = pellucid.diff(before, after, text)
    assert report.verdict == "diverged" and "other splitting of the text" in str(report.to_json())


def importances(library, path):
    """An importance matrix of random numbers for every matrix of a file, as llama.cpp takes it."""
    matrices = [(n, t) for n, t in read_header(path).tensors.items() if len(t.shape) == 2]
    entries = (library.llama_model_imatrix_data * (len(matrices) + 1))()  # the last one is NULL
    for number, (entry, (name, tensor)) in enumerate(zip(entries, matrices, strict=False)):
        random = torch.Generator().manual_seed(number)
        columns = tensor.shape[1]
        weights = torch.rand(columns, generator=random).pow(4).add(1e-3).tolist()
        entry.name, entry.size = name.encode(), columns
        entry.data = (ctypes.c_float * columns)(*weights)
    return entries


@pytest.mark.peers
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance matrix"])
@pytest.mark.parametrize(  # llama.cpp's enum llama_ftype
    ("ftype", "kind"),
    [
        (2, "Q4_0"), (3, "Q4_1"), (8, "Q5_0"), (9, "Q5_1"),
        (15, "Q4_K"), (10, "Q2_K"), (12, "Q3_K"), (17, "Q5_K"), (18, "Q6_K"),
    ],
)  # fmt: skip
def test_a_file_that_llama_cpp_quantised_is_explained(tmp_path, ftype, kind, weighted):
    library = pytest.importorskip("llama_cpp", reason="llama-cpp-python")
    config = replace(CONFIG, width=256, hidden_width=512, head_dim=64)
    model = random_model(config, torch.float32)
    plain, small = tmp_path / "plain.gguf", tmp_path / "small.gguf"
    write_gguf(plain, config, model.state_dict().__getitem__, "F32", NONE)
    how = library.llama_model_quantize_default_params()
    how.ftype, how.nthread = ftype, 1
    if weighted:
        matrix = importances(library, plain)
        how.imatrix = ctypes.cast(matrix, ctypes.POINTER(library.llama_model_imatrix_data))
    assert not library.llama_model_quantize(
        str(plain).encode(), str(small).encode(), ctypes.byref(how)
    )
    report = pellucid.diff(model, side(small), TOKENS)
    assert report.verdict == "explained"
    said = [each for each in report.static if each.stage == "weights"]
    assert said and all("groups of" in each.finding for each in said if "norm" not in each.name)
    assert any(f"{kind}: all" in each.finding for each in said)
