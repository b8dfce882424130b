"""The loop against what it must add up to: one big batch, a hand-made AdamW step, a learnt text."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid import checkpoints
from pellucid.models import Config, GPTConfig, LlamaConfig, Model, build, initialise
from pellucid.train import (
    IGNORED,
    Batch,
    Batches,
    Progress,
    Ranks,
    Schedule,
    TrainConfig,
    TrainingDiverged,
    TrainState,
    bits_per_byte,
    evaluate,
    held_out_windows,
    train,
)
from pellucid.train.loop import accumulate_gradients, compile_blocks
from pellucid.train.precision import own_compiler_cache

TEXT = torch.tensor(list(b"the cat sat on the mat and the dog sat on the log; " * 8))
LLAMA = LlamaConfig(
    vocab_size=128,
    context_length=16,
    width=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=4,
    hidden_width=32,
    tied=True,
)
GPT2 = GPTConfig(vocab_size=128, context_length=16, width=16, n_layers=2, n_heads=4)


def model_of(config: Config, seed: int = 0) -> Model:
    model = build(config, "meta")
    initialise(model, torch.Generator().manual_seed(seed))
    return model


def settings(steps: int, **change: object) -> TrainConfig:
    schedule = Schedule(peak=1e-2, final=1e-3, warmup=min(5, steps - 1), steps=steps)
    return TrainConfig(**({"schedule": schedule, "batch": 8, "micro_batch": 8} | change))


def run(model: Model, config: TrainConfig, seed: int = 0) -> Iterator[Progress]:
    batches = Batches(TEXT, context=16, batch=config.batch, seed=seed)
    return train(model, batches, held_out_windows(TEXT, 16), config)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_tiny_model_learns_a_short_text_by_heart(config: Config):
    model = model_of(config)
    done = list(run(model, settings(120, eval_every=60)))
    assert done[0].loss == pytest.approx(math.log(128), abs=0.3)  # nothing known: all 128 alike
    assert done[-1].loss < 1.0
    assert [progress.step for progress in done if progress.held_out_loss] == [60, 120]
    assert done[-1].held_out_loss == evaluate(model, held_out_windows(TEXT, 16))
    assert done[-1].tokens == 120 * 8 * 16
    assert model.training


def test_the_same_seed_gives_the_same_losses_and_another_one_others():
    def losses(seed: int) -> list[float]:
        return [progress.loss for progress in run(model_of(LLAMA, seed), settings(6), seed)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_gradients_of_small_passes_add_up_to_those_of_the_whole_batch(micro_batch: int):
    tokens = TEXT[: 8 * 17].view(8, 17)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def gradients(rows: int) -> tuple[float, dict[str, Tensor | None]]:
        model = model_of(GPT2).double()
        loss, _ = accumulate_gradients(
            model, Batch(inputs, targets), settings(1, micro_batch=rows, clip=0.0)
        )
        return loss, {name: parameter.grad for name, parameter in model.named_parameters()}

    loss, whole = gradients(8)
    small_loss, small = gradients(micro_batch)
    assert small_loss == pytest.approx(loss, abs=1e-12)
    for name, gradient in whole.items():
        torch.testing.assert_close(small[name], gradient, atol=1e-12, rtol=1e-12, msg=name)


def test_the_gradient_is_clipped_to_a_norm_and_its_own_norm_is_told():
    tokens = TEXT[: 8 * 17].view(8, 17)
    norms = {}
    for clip in (0.0, 0.01):
        model = model_of(LLAMA)
        _, told = accumulate_gradients(
            model, Batch(tokens[:, :-1], tokens[:, 1:]), settings(1, clip=clip)
        )
        flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        norms[clip] = (told, flat.norm().item())
    assert norms[0.0][0] == pytest.approx(norms[0.0][1], rel=1e-5)
    assert norms[0.01][0] == pytest.approx(norms[0.0][1], rel=1e-5)
    assert norms[0.01][1] == pytest.approx(0.01, rel=1e-3)


def test_one_step_is_the_step_of_adamw_worked_out_by_hand():
    model = model_of(LLAMA)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    schedule = Schedule(peak=1e-2, final=1e-2, warmup=0, steps=1)
    config = TrainConfig(schedule=schedule, batch=4, micro_batch=4, weight_decay=0.1, clip=0.0)
    list(run(model, config))

    twin = model_of(LLAMA)
    inputs, targets, _ = Batches(TEXT, context=16, batch=4, seed=0).at(0)
    F.cross_entropy(twin(inputs).transpose(1, 2), targets).backward()
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None
        decay = 0.1 if parameter.ndim == 2 else 0.0
        # In the first step both averages are the gradient itself: m / sqrt(v) = g / |g|.
        step = parameter.grad / (parameter.grad.abs() + 1e-8)
        wanted = before[name] * (1 - 1e-2 * decay) - 1e-2 * step
        got = model.state_dict()[name]
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4, msg=name)


def test_evaluation_is_the_mean_over_all_tokens_and_leaves_the_model_as_it_was():
    model = model_of(GPTConfig(**{**vars(GPT2), "embed_dropout": 0.5}))
    model.train()
    windows = held_out_windows(TEXT, 16)
    model.eval()
    logits = model(windows[:, :-1])
    wanted = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:]).item()
    model.train()
    for rows in (1, 3, 100):
        assert evaluate(model, windows, rows=rows) == pytest.approx(wanted, rel=1e-6)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_products_stay_near_float32_and_keep_float32_weights():
    losses = {}
    for bfloat16 in (False, True):
        model = model_of(LLAMA)
        losses[bfloat16] = [step.loss for step in run(model, settings(10, bfloat16=bfloat16))]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], abs=0.05)


def test_a_loss_that_is_no_number_stops_before_it_reaches_the_weights():
    model = model_of(GPT2)
    steps = run(model, settings(10))
    next(steps)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hook = model.norm.register_forward_hook(lambda *_: torch.tensor(float("nan")).expand(8, 16, 16))
    with pytest.raises(TrainingDiverged, match="step 2 has loss nan"):
        next(steps)
    hook.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_damaged_weight_is_named_and_no_rate_is_blamed():
    model = model_of(GPT2)
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        TrainingDiverged, match=r"layers\.1\.mlp\.up_proj\.weight has NaN"
    ) as caught:
        next(run(model, settings(10)))
    assert "rate" not in str(caught.value)


def test_a_saved_model_comes_back_with_equal_logits(tmp_path: Path):
    model = model_of(LLAMA)
    list(run(model, settings(3)))
    checkpoints.save(tmp_path / "model", model.config, model.state_dict())
    opened = checkpoints.open_checkpoint(tmp_path / "model")
    loaded = checkpoints.load_model(opened, dialect="meta")
    tokens = TEXT[None, :16]
    assert isinstance(loaded, nn.Module)
    assert torch.equal(loaded(tokens), model.eval()(tokens))


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight():
    assert bits_per_byte(math.log(256), tokens=1000, text_bytes=1000) == pytest.approx(8)
    assert bits_per_byte(math.log(256), tokens=500, text_bytes=1000) == pytest.approx(4)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch of 8 rows does not divide into passes of 3"):
        settings(1, micro_batch=3)
    with pytest.raises(ValueError, match="eval_every is 0"):
        settings(1, eval_every=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler's own looking
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_compiled_blocks_share_one_graph_and_evaluation_runs_as_written(
    config: Config, bfloat16: bool
):
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    plain, compiled = model_of(config), model_of(config)
    compile_blocks(compiled, backend=backend)
    wanted = list(run(plain, settings(6, eval_every=2, bfloat16=bfloat16)))
    # A held-out text of other lengths would be other graphs.
    done = list(
        train(
            compiled,
            Batches(TEXT, context=16, batch=8, seed=0),
            held_out_windows(TEXT, 16, 3),
            settings(6, eval_every=2, bfloat16=bfloat16),
        )
    )
    near = 1e-3 if bfloat16 else 1e-5
    assert [step.loss for step in done] == pytest.approx([step.loss for step in wanted], rel=near)
    assert len(graphs) == 1
    torch._dynamo.reset()


class Half(Ranks):
    """One of two ranks; the other's gradients and sums are added by hand."""

    world = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank


def test_rows_of_two_ranks_add_up_to_those_of_one(monkeypatch: pytest.MonkeyPatch):
    tokens = TEXT[: 8 * 17].view(8, 17)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 3:] = IGNORED  # the ranks count differently many
    batch = Batch(inputs, targets, torch.zeros_like(inputs))
    config = settings(1, micro_batch=2, clip=0.0)

    model = model_of(GPT2).double()
    loss, norm = accumulate_gradients(model, batch, config)
    whole = [parameter.grad for parameter in model.parameters()]

    sums, parts = [], []
    for rank in range(2):
        model = model_of(GPT2).double()
        half = Half(rank)
        monkeypatch.setattr(half, "sum", lambda values: sums.append(values.clone()) or values)
        assert len(half.rows(batch).inputs) == 4
        accumulate_gradients(model, batch, config, ranks=half)
        # Each rank divided by its own count here; undo it, as a real sum over ranks would.
        share = sums[-1][1].item() / batch.inputs.numel()
        parts.append([parameter.grad * share for parameter in model.parameters()])
    total, count = sum(sums).tolist()
    assert count == 8 * 16 - 13
    assert total / count == pytest.approx(loss, abs=1e-12)
    for one, other, want in zip(*parts, whole, strict=True):
        got = (one + other) * batch.inputs.numel() / count
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    assert norm > 0


def test_a_state_that_is_saved_and_loaded_trains_on_as_if_nothing_happened(tmp_path: Path):
    config = GPTConfig(**{**vars(GPT2), "resid_dropout": 0.3})
    torch.manual_seed(1)
    wanted = [step.loss for step in run(model_of(config), settings(8))]

    torch.manual_seed(1)
    model = model_of(config)
    state = TrainState.begin(model, settings(8))
    batches, windows = Batches(TEXT, context=16, batch=8, seed=0), held_out_windows(TEXT, 16)
    steps = train(model, batches, windows, settings(8), state=state)
    losses = [next(steps).loss for _ in range(3)]
    state.extra = {"mine": [1, "two"]}
    state.save(tmp_path, model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    next(steps)  # goes on, and spoils the random numbers and the optimiser for what follows

    other = model_of(config, seed=9)
    other.load_state_dict(weights)
    loaded = TrainState.load(tmp_path, other, settings(8))
    assert (loaded.step, loaded.tokens, loaded.extra) == (3, 3 * 8 * 16, {"mine": [1, "two"]})
    losses += [p.loss for p in train(other, batches, windows, settings(8), state=loaded)]
    assert losses == wanted


def test_a_state_of_another_model_is_refused(tmp_path: Path):
    model = model_of(GPT2)
    state = TrainState.begin(model, settings(2))
    batches, windows = Batches(TEXT, context=16, batch=8, seed=0), held_out_windows(TEXT, 16)
    list(train(model, batches, windows, settings(2), state=state))
    state.save(tmp_path, model)
    wider = model_of(GPTConfig(**{**vars(GPT2), "width": 32, "hidden_width": 0}))
    with pytest.raises(ValueError, match="training state has exp_avg"):
        TrainState.load(tmp_path, wider, settings(2))
    deeper = model_of(GPTConfig(**{**vars(GPT2), "n_layers": 1}))
    with pytest.raises(ValueError, match="this model not"):
        TrainState.load(tmp_path, deeper, settings(2))


def test_the_best_loss_is_the_lowest_and_no_nan_replaces_it():
    state = TrainState.begin(model_of(GPT2), settings(2))
    losses = [math.nan, 3.0, 2.0, math.nan, 2.5, 1.0]
    assert [state.judge(loss) for loss in losses] == [False, True, True, False, False, True]
    assert (state.best_loss, state.evaluations_since_best) == (1.0, 0)


def test_a_batch_with_nothing_to_predict_is_refused():
    inputs = torch.zeros(8, 16, dtype=torch.long)
    batch = Batch(inputs, torch.full_like(inputs, IGNORED))
    with pytest.raises(ValueError, match="no target to predict"):
        accumulate_gradients(model_of(GPT2), batch, settings(1))


def test_compiled_code_lies_where_only_this_user_writes(tmp_path: Path, monkeypatch):
    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(name, "")
    own_compiler_cache()
    kept = Path(os.environ[name])
    assert kept == tmp_path / "pellucid" / "inductor"
    assert kept.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv(name, "/stated/by/the/user")
    own_compiler_cache()
    assert os.environ[name] == "/stated/by/the/user"
    kept.chmod(0o777)
    monkeypatch.setenv(name, "")
    with pytest.warns(RuntimeWarning, match="others may write"):
        own_compiler_cache()
    fresh = Path(os.environ[name])
    assert fresh != kept and fresh.stat().st_mode & 0o777 == 0o700
    fresh.rmdir()
