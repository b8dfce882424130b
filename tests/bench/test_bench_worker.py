"""The protocol of the workers, who is kept, and which engines can run here."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from tiny import LLAMA, random_model

from pellucid.bench import candidates, crew, worker
from pellucid.bench.engines import make, specs
from pellucid.bench.rounds import QUICK, BenchPlan
from pellucid.bench.shapes import RandomWeights, hf_folder, model_home
from pellucid.checkpoints import open_checkpoint
from pellucid.generate import Sampling, generate_plain


class Counting:
    """Commands that only remember what they were asked."""

    def __init__(self) -> None:
        self.asked = []

    def decode(self, steps):
        self.asked.append(steps)
        return {"tokens": [[7]] * steps}

    def broken(self):
        raise RuntimeError("out of\nluck")

    def close(self):
        return {}


def served(*commands: dict) -> tuple[Counting, list[dict]]:
    counting, replies = Counting(), io.StringIO()
    lines = io.StringIO("".join(json.dumps(command) + "\n" for command in commands))
    worker.serve(counting, lines, replies)
    return counting, [json.loads(line) for line in replies.getvalue().splitlines()]


def test_every_line_gets_one_reply_and_close_ends_it():
    counting, replies = served(
        {"do": "decode", "steps": 3},
        {"do": "broken"},
        {"do": "nothing"},
        {"do": "close"},
        {"do": "decode", "steps": 9},
    )
    assert counting.asked == [3]
    assert replies[0]["tokens"] == [[7], [7], [7]]
    assert replies[0]["peak_bytes"] > 1 << 20
    assert replies[0]["idle_share"] >= 0
    assert replies[1]["error"] == "RuntimeError: out of\nluck"
    assert "nothing" in replies[2]["error"]
    assert len(replies) == 4


def test_a_worker_that_cannot_begin_says_why(tmp_path):
    with pytest.raises(crew.WorkerError, match="KeyError: 'no/such/engine'"):
        crew.engine_worker("no/such/engine", tmp_path, 1)


def test_a_worker_that_dies_is_told_with_its_last_words(tmp_path):
    with pytest.raises(crew.WorkerError, match="exit status 1: .*ValueError"):
        crew.engine_worker("machine", tmp_path, "many")


class Pretended:
    """Stands for a worker; remembers that it was closed."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log
        log.append(f"+{name}")

    def close(self) -> None:
        self._log.append(f"-{self.name}")


def pretended(budget: int) -> tuple[crew.Workers, list[str]]:
    log: list[str] = []
    return crew.Workers(lambda name: Pretended(name, log), dict.fromkeys("abc", 4), budget), log


def test_workers_that_fit_are_kept():
    team, log = pretended(budget=12)
    for name in "abcabc":
        assert team.worker(name).name == name
    assert log == ["+a", "+b", "+c"]
    team.close()
    assert log[3:] == ["-a", "-b", "-c"]


def test_where_memory_is_short_the_one_used_last_goes():
    team, log = pretended(budget=8)
    for name in "abcab":
        team.worker(name)
    assert log == ["+a", "+b", "-b", "+c", "-a", "+b"]
    team.dismiss("nobody")


def test_one_larger_than_the_budget_runs_alone():
    team, log = pretended(budget=1)
    team.worker("a")
    team.worker("b")
    assert log == ["+a", "-a", "+b"]


def test_globs_choose_engines_in_the_order_of_the_table():
    names = [spec.name for spec in candidates.choose(["llama.cpp/q*", "pellucid/eager/*"])]
    assert names[0] == "pellucid/eager/float32"
    assert names[-2:] == ["llama.cpp/q8_0", "llama.cpp/q4_0"]
    assert candidates.choose(candidates.DEFAULT)
    with pytest.raises(ValueError, match="no engine is called 'vllm/\\*': expected a glob over"):
        candidates.choose(["vllm/*"])


def test_what_is_not_installed_is_left_out_with_the_reason():
    chosen = candidates.choose(["pellucid/eager/float32"])
    absent = specs()["llama.cpp/f32"]
    absent = type(absent)(**{**vars(absent), "package": "no_such_package_here"})
    found, skipped = candidates.available([*chosen, absent], [])
    assert [candidate.spec.name for candidate in found] == ["pellucid/eager/float32"]
    assert "no no_such_package_here in this interpreter" in skipped["llama.cpp/f32"]
    with pytest.raises(ValueError, match="not a Python interpreter that runs"):
        candidates.available([absent], ["/no/such/python"])


def test_a_plan_is_cut_to_the_context():
    plan = BenchPlan(threads=1).fitted(LLAMA)  # 64 tokens
    assert plan.prompt + plan.new < 64
    assert plan.prefill + 2 < 64
    assert plan.batch_new <= plan.new
    assert BenchPlan(threads=3).threads == 3
    assert QUICK.threads >= 1
    with pytest.raises(ValueError, match="rounds is 0"):
        BenchPlan(rounds=0)


def test_random_weights_are_the_same_at_every_asking_and_in_every_file(tmp_path):
    weights, home = RandomWeights(LLAMA), model_home(tmp_path, "my/shape", LLAMA)
    assert (weights["norm.weight"] == 1).all()
    here, there = (weights[f"layers.{layer}.attn.o_proj.weight"] for layer in (0, 1))
    assert not torch.equal(here, there)
    for dtype in ("bfloat16", "float32"):
        folder = hf_folder(home, LLAMA, dtype)
        assert folder == hf_folder(home, LLAMA, dtype)
        stored = open_checkpoint(folder)
        assert (stored.config, stored.dtype) == (LLAMA, getattr(torch, dtype))
        for name in weights:
            torch.testing.assert_close(
                stored.weights[name].bfloat16(), weights[name], rtol=0, atol=0
            )


def test_quantised_folders_run(tmp_path):
    engine = make(
        "pellucid/eager/int4", hf_folder(tmp_path, LLAMA, "int4"), torch.get_num_threads()
    )
    plain = make("pellucid/eager/bfloat16", tmp_path / "bfloat16", torch.get_num_threads())
    assert engine.prepare()["decode_bytes"] < plain.prepare()["decode_bytes"]
    assert len(engine.prefill([[1, 2, 3]], new=2) + engine.decode(2)) == 3


def test_our_engine_writes_what_the_plain_loop_writes(tmp_path):
    folder = hf_folder(tmp_path / "home", LLAMA, "float32")
    engine = make("pellucid/eager/float32", folder, torch.get_num_threads())
    facts = engine.prepare()
    rows = [[5, 9, 2, 7], [1, 2, 3, 4]]
    steps = [engine.prefill(rows, new=6), *engine.decode(6)]
    engine.close()
    model = random_model(LLAMA, torch.float32)
    model.load_state_dict(dict(RandomWeights(LLAMA)))
    for row, prompt in enumerate(rows):
        greedy = generate_plain(model, prompt, sampling=Sampling(temperature=0.0), max_new_tokens=7)
        assert [step[row] for step in steps] == greedy
    table = 4 * LLAMA.vocab_size * LLAMA.width
    assert facts["decode_bytes"] == sum(4 * p.numel() for p in model.parameters()) - table


@pytest.mark.peers
def test_transformers_computes_without_gradients(tmp_path):
    pytest.importorskip("transformers")
    folder = hf_folder(tmp_path / "home", LLAMA, "float32")
    engine: Any = make("transformers/float32", folder, torch.get_num_threads())
    engine.prepare()
    with torch.enable_grad():
        engine.prefill([[5, 9, 2, 7]], new=2)
        assert engine._cache.layers[0].keys.is_inference()
        assert len(engine.decode(2)) == 2
        assert not engine._cache.layers[0].keys.requires_grad
