"""RoPE: rotation by its definition, the scaling types by hand, padded rows as if alone."""

from __future__ import annotations

import cmath
import math
from dataclasses import replace

import pytest
import torch

from pellucid.models import RopeConfig
from pellucid.models.rope import RotaryEmbedding, frequencies, interleaved, rotate
from pellucid.numerics import dialect

DOUBLE = torch.float64


def freqs(rope: RopeConfig, head_dim: int = 8, **more) -> list[float]:
    return frequencies(rope, head_dim, dtype=DOUBLE, **more).tolist()


def plain(theta: float, head_dim: int) -> list[float]:
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


@pytest.mark.parametrize("name", ["hf", "meta"])
def test_a_pair_is_a_complex_number_turned_by_its_angle(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 5, 8, generator=generator, dtype=DOUBLE)
    rope = RotaryEmbedding(RopeConfig(theta=100.0), 8, dialect(name, "llama"))
    cos, sin = rope(torch.arange(5) + 3, DOUBLE)
    turned = rotate(x, cos, sin, dialect(name, "llama"))
    for head in range(2):
        for token in range(5):
            for i, frequency in enumerate(plain(100.0, 8)):
                pair = complex(x[0, head, token, i], x[0, head, token, i + 4])
                expected = pair * cmath.exp(1j * (token + 3) * frequency)
                got = complex(turned[0, head, token, i], turned[0, head, token, i + 4])
                assert abs(got - expected) < 1e-14


def test_scores_depend_on_the_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=DOUBLE).expand(-1, -1, -1, 9, -1)
    rope = RotaryEmbedding(RopeConfig(), 16, dialect("hf", "llama"))
    near, far = (rope(torch.arange(9) + start, DOUBLE) for start in (0, 500))
    one, other = (
        rotate(q, *angles, dialect("hf", "llama"))
        @ rotate(k, *angles, dialect("hf", "llama")).transpose(-1, -2)
        for angles in (near, far)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_default_and_linear_by_hand():
    assert freqs(RopeConfig(theta=10000.0)) == pytest.approx([1, 0.1, 0.01, 0.001])
    linear = RopeConfig(theta=10000.0, type="linear", factor=4.0)
    assert freqs(linear) == pytest.approx([0.25, 0.025, 0.0025, 0.00025])
    assert freqs(RopeConfig(theta=1.0, type="linear", factor=1.25)) == [0.8] * 4


def test_dynamic_by_hand():
    rope = RopeConfig(theta=10000.0, type="dynamic", factor=2.0, original_context=100)
    assert freqs(rope, length=100) == pytest.approx(plain(10000.0, 8))
    assert freqs(rope, length=7) == pytest.approx(plain(10000.0, 8))
    stretched = 10000.0 * (2 * 250 / 100 - 1) ** (8 / 6)  # 4 ** (4 / 3)
    assert freqs(rope, length=250) == pytest.approx(plain(stretched, 8))


def test_llama3_by_hand():
    rope = RopeConfig(
        theta=10000.0,
        type="llama3",
        factor=8.0,
        original_context=1000,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    wavelengths = [2 * math.pi / f for f in plain(10000.0, 8)]  # 6.3, 63, 628, 6283 tokens
    ramp = (1000 / wavelengths[2] - 1) / (4 - 1)  # 628 lies between 1000 / 4 and 1000 / 1
    expected = [1, 0.1, (1 - ramp) * 0.01 / 8 + ramp * 0.01, 0.001 / 8]
    assert freqs(rope) == pytest.approx(expected, rel=1e-12)


def test_llama3_by_hand_where_the_ramp_begins_before_one_turn():
    rope = RopeConfig(
        theta=100.0, type="llama3", factor=4.0, original_context=64, low_freq_factor=2.0,
        high_freq_factor=8.0,
    )  # fmt: skip
    waves = [2 * math.pi / frequency for frequency in plain(100.0, 12)]
    expected = []
    for wave, frequency in zip(waves, plain(100.0, 12), strict=True):
        ramp = min(max((64 / wave - 2) / (8 - 2), 0), 1)
        expected.append((1 - ramp) * frequency / 4 + ramp * frequency)
    assert freqs(rope, 12) == pytest.approx(expected, rel=1e-14)
    # Some are kept, some in the ramp, some slowed: one of these is below 64 · 2.
    assert waves[0] < 64 / 8 < waves[2] < 64 / 2 < waves[3] < 64 * 2 < waves[4]


def test_a_part_of_a_head_is_turned_and_rows_by_their_own_angles():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 5, 12, generator=generator, dtype=DOUBLE)
    style = dialect("hf", "llama")
    angles = torch.randn(2, 5, 4, generator=generator, dtype=DOUBLE)  # (B, T, D/2) of 8 of 12
    turned = rotate(x, angles.cos(), angles.sin(), style)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    for row in range(2):
        alone = rotate(x[row : row + 1, ..., :8], angles[row].cos(), angles[row].sin(), style)
        assert torch.equal(turned[row : row + 1, ..., :8], alone)


def test_a_wave_at_an_edge_of_llama3_s_ramp():
    # The first wave is 2π tokens long, and so is 64 / (32 / π).
    edge = 32 / math.pi
    assert 64 / edge == 2 * math.pi
    long = RopeConfig(
        theta=100.0, type="llama3", factor=4.0, original_context=64, low_freq_factor=edge,
        high_freq_factor=2 * edge,
    )  # fmt: skip
    assert freqs(long)[0] == 1 / 4  # the longest of the ramp: slowed whole
    short = RopeConfig(
        theta=100.0, type="llama3", factor=4.0, original_context=64, high_freq_factor=edge
    )
    assert freqs(short)[0] == 1  # the shortest: as trained
    wave = 2 * math.pi * 100 ** (2 / 8)  # low_freq_factor is 1 where none is given
    ramp = (64 / wave - 1) / (edge - 1)
    second = plain(100.0, 8)[1]
    assert freqs(short)[1] == pytest.approx((1 - ramp) * second / 4 + ramp * second, rel=1e-14)


def test_longrope_by_hand():
    rope = RopeConfig(
        theta=10000.0, type="longrope", factor=4.0, original_context=100,
        short_factor=(1.0, 1.5, 2.0, 2.5), long_factor=(1.0, 4.0, 16.0, 64.0),
    )  # fmt: skip
    assert rope.follows_length
    base = plain(10000.0, 8)
    for length, divisors in ((1, rope.short_factor), (100, rope.short_factor),
                             (101, rope.long_factor)):  # fmt: skip
        expected = [each / by for each, by in zip(base, divisors, strict=True)]
        assert freqs(rope, length=length) == pytest.approx(expected, rel=1e-14)
    assert rope.magnitude == pytest.approx(math.sqrt(1 + math.log(4) / math.log(100)), rel=1e-15)
    cos, _ = RotaryEmbedding(rope, 8, dialect("hf", "llama"))(torch.arange(101), DOUBLE)
    angles = [5 * each / by for each, by in zip(base, rope.long_factor, strict=True)]
    assert cos[5].tolist() == pytest.approx([rope.magnitude * math.cos(a) for a in angles])
    cos, _ = RotaryEmbedding(rope, 8, dialect("hf", "llama"))(torch.arange(100), DOUBLE)
    angles = [5 * each / by for each, by in zip(base, rope.short_factor, strict=True)]
    assert cos[5].tolist() == pytest.approx([rope.magnitude * math.cos(a) for a in angles])


def test_turned_heads_have_the_precision_that_the_dialect_keeps():
    style = dialect("hf", "llama")
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    angles = RotaryEmbedding(RopeConfig(), 8, replace(style, rope="keep"))(
        torch.arange(5), torch.float32
    )
    kept = rotate(x, *angles, replace(style, rope="keep"))
    rounded = rotate(x, *angles, replace(style, rope="float32"))
    assert (kept.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(kept.bfloat16(), rounded)
    assert not torch.equal(kept, rounded.float())


def test_interleaved_puts_the_two_of_a_pair_side_by_side():
    x = torch.arange(2 * 3 * 5 * 6).view(2, 3, 5, 6)
    moved = interleaved(x)
    assert moved.shape == x.shape
    for place, source in enumerate((0, 3, 1, 4, 2, 5)):
        assert torch.equal(moved[..., place], x[..., source])


def test_the_rows_of_a_pass_are_laid_out_as_the_references_leave_them():
    """As (B, T, H, D) in memory: in another order q · k may add up its terms differently."""
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    for name in ("hf", "meta"):
        style = dialect(name, "llama")
        angles = RotaryEmbedding(RopeConfig(), 8, style)(torch.arange(5), torch.float32)
        turned = rotate(x, *angles, style)
        assert turned.transpose(1, 2).is_contiguous()
        assert interleaved(turned).transpose(1, 2).is_contiguous()


def test_the_angles_are_rounded_as_each_reference_rounds_them():
    """transformers takes cos and sin of the angles, Meta the parts of a complex number."""
    positions = torch.arange(3000)
    turns = 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8)
    angles = positions[:, None].float() * turns
    cis = torch.polar(torch.ones_like(angles), angles)
    for name, expected in (("hf", (angles.cos(), angles.sin())), ("meta", (cis.real, cis.imag))):
        embedding = RotaryEmbedding(RopeConfig(), 8, dialect(name, "llama"))
        cos, sin = embedding(positions, torch.float32)
        assert torch.equal(cos, expected[0])
        assert torch.equal(sin, expected[1])


def test_yarn_by_hand():
    rope = RopeConfig(theta=10000.0, type="yarn", factor=4.0, original_context=1000)
    # The pair with t turns in 1000 tokens is 8 ln(1000 / 2πt) / (2 ln 10000):
    # 0.70 for 32 turns -> 0 and 2.20 for 1 turn -> 3. The ramp over pairs 0 … 3 is 0, 1/3, 2/3, 1.
    expected = [1, 0.1 * (2 / 3 + 1 / 12), 0.01 * (1 / 3 + 2 / 12), 0.001 / 4]
    assert freqs(rope) == pytest.approx(expected, rel=1e-12)
    assert rope.magnitude == pytest.approx(0.1 * math.log(4) + 1)


def test_yarn_without_truncation_and_with_its_own_magnitude():
    rope = RopeConfig(type="yarn", factor=4.0, original_context=1000, truncate=False)
    low, high = (8 * math.log(1000 / (t * 2 * math.pi)) / (2 * math.log(10000)) for t in (32, 1))
    keep = [1 - min(max((i - low) / (high - low), 0), 1) for i in range(4)]
    expected = [f * (k + (1 - k) / 4) for f, k in zip(plain(10000.0, 8), keep, strict=True)]
    assert freqs(rope) == pytest.approx(expected, rel=1e-12)
    stated = RopeConfig(type="yarn", factor=4.0, original_context=1000, attention_factor=1.5)
    assert stated.magnitude == 1.5
    scaled = RopeConfig(
        type="yarn", factor=4.0, original_context=1000, mscale=0.7, mscale_all_dim=0.3
    )
    log = math.log(4)
    assert scaled.magnitude == pytest.approx((0.07 * log + 1) / (0.03 * log + 1))


def test_yarn_magnitude_scales_cos_and_sin():
    rope = RopeConfig(type="yarn", factor=4.0, original_context=1000)
    cos, sin = RotaryEmbedding(rope, 8, dialect("hf", "llama"))(torch.arange(50), DOUBLE)
    torch.testing.assert_close(
        (cos**2 + sin**2).sqrt(), torch.full_like(cos, rope.magnitude), rtol=0, atol=1e-14
    )


def test_only_yarn_has_a_magnitude():
    assert RopeConfig(type="linear", factor=4.0).magnitude == 1.0


def test_dynamic_rows_of_a_batch_are_as_if_alone():
    rope = RopeConfig(type="dynamic", factor=2.0, original_context=10)
    embedding = RotaryEmbedding(rope, 8, dialect("hf", "llama"))
    short, long = torch.arange(12), torch.arange(30)
    padded = torch.cat((torch.zeros(18, dtype=torch.long), short))
    cos, sin = embedding(torch.stack((padded, long)), DOUBLE)
    assert cos.shape == (2, 30, 4)
    for row, alone in ((0, short), (1, long)):
        expected_cos, expected_sin = embedding(alone, DOUBLE)
        assert torch.equal(cos[row, -len(alone) :], expected_cos)
        assert torch.equal(sin[row, -len(alone) :], expected_sin)


def test_angles_are_at_least_float32():
    """bfloat16 has 8 bits: position 1000 times a frequency would lose its place on the circle."""
    embedding = RotaryEmbedding(RopeConfig(), 8, dialect("meta", "llama"))
    cos, _ = embedding(torch.arange(1000), torch.bfloat16)
    exact, _ = embedding(torch.arange(1000), DOUBLE)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos.double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"type": "ntk"}, "unknown rope type 'ntk'.*default, linear, dynamic"),
        ({"theta": 0.0}, "theta is 0.0"),
        ({"share": 0.0}, "share is 0.0"),
        ({"type": "longrope", "original_context": 8, "short_factor": (1.0,)}, "1 short and 0 long"),
        ({"type": "longrope", "original_context": 8}, "0 short and 0 long"),
        ({"type": "longrope", "short_factor": (1.0,), "long_factor": (1.0,)}, "needs the original"),
        ({"share": 1.5}, "share is 1.5: expected a share above 0, at most 1"),
        ({"type": "linear", "factor": 0.5}, "factor is 0.5: expected 1 or more"),
        ({"type": "dynamic", "factor": 2.0}, "'dynamic' needs the original context"),
        ({"type": "llama3", "factor": 8.0}, "'llama3' needs the original context"),
        ({"type": "yarn", "factor": 8.0}, "'yarn' needs the original context"),
        (
            {"type": "llama3", "original_context": 8192, "low_freq_factor": 4.0},
            "low_freq_factor 4.0 must lie below high_freq_factor 4.0",
        ),
        (
            {"type": "llama3", "original_context": 8192, "low_freq_factor": 0.0},
            "low_freq_factor is 0.0: expected a number above 0",
        ),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**wrong)


# ── Against transformers ─────────────────────────────────────────────────────────────────────────

SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-mscale": {
        "factor": 40.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.9,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "original_max_position_embeddings": 64,
        "truncate": False,
    },
}
OURS = {"original_max_position_embeddings": "original_context"}


@pytest.mark.peers
@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_frequencies_equal_those_of_transformers(kind, theta):
    transformers = pytest.importorskip("transformers")
    utilities = pytest.importorskip("transformers.modeling_rope_utils")
    rope_type = kind.removesuffix("-mscale")
    stated = {"rope_type": rope_type, "rope_theta": theta, **SCALINGS[kind]}
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=64 if kind == "dynamic" else 256,
        rope_parameters=stated,
    )
    length = torch.tensor(100) if kind == "dynamic" else None  # a tensor, as a running model gives
    expected, magnitude = utilities.ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=length)
    fields = {OURS.get(key, key): value for key, value in SCALINGS[kind].items()}
    if kind == "dynamic":
        fields["original_context"] = 64
    rope = RopeConfig(theta=theta, type=rope_type, **fields)
    assert torch.equal(frequencies(rope, 64, length=100), expected)
    assert rope.magnitude == pytest.approx(magnitude, rel=1e-15)
