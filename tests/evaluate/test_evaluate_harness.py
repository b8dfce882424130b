"""lm-evaluation-harness's requests, against one pass for each and, where installed, the harness."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import GPT, LLAMA, random_model

from pellucid import tokenizers
from pellucid.evaluate.harness import Answers, generation_options, harness_model, run_tasks
from pellucid.language_model import LanguageModel


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A random Llama of 300 tokens and a context of 64."""
    from dataclasses import replace

    tokenizer = tokenizers.train_bpe(
        ["the cat sat on the mat and the cat ran"] * 9, 300, tmp_path_factory.mktemp("bpe")
    )
    config = replace(LLAMA, vocab_size=tokenizer.vocab_size)
    return LanguageModel(random_model(config), tokenizer)


def log_likelihood(lm: LanguageModel, before: list[int], after: list[int]) -> tuple[float, bool]:
    total, greedy = 0.0, True
    for place, token in enumerate(after):
        seen = [*before, *after[:place]][-lm.config.context_length :]
        with torch.no_grad():
            found = lm.model(torch.tensor([seen]))[0, -1].log_softmax(-1)
        total += float(found[token])
        greedy = greedy and int(found.argmax()) == token
    return total, greedy


def test_continuations_are_scored_token_by_token(lm: LanguageModel):
    answers = Answers(lm, batch=2)
    start = lm.tokenizer.encode("the cat")
    greedy = lm.tokenizer.encode(lm.generate(start, max_new_tokens=4, temperature=0.0))
    pairs = [
        (start, lm.tokenizer.encode(" sat on the mat")),
        ([0], start),
        (start, greedy),
        (start[:1], [5]),
    ]
    found = answers.continuations(pairs)
    for pair, (total, greedy_too) in zip(pairs, found, strict=True):
        expected, expected_greedy = log_likelihood(lm, *pair)
        assert total == pytest.approx(expected, abs=1e-10)
        assert greedy_too is expected_greedy
    with pytest.raises(ValueError, match="0 tokens of context and 1 of continuation"):
        answers.continuations([([], [1])])


def test_a_context_that_is_too_long_is_read_from_its_end(lm: LanguageModel):
    answers = Answers(lm, context=8)
    before, after = list(range(1, 30)), [7, 8, 9]
    [(total, _)] = answers.continuations([(before, after)])
    # The model reads 8 tokens: 6 of the context and the continuation but its last.
    [(expected, _)] = answers.continuations([(before[-6:], after)])
    assert total == expected
    with pytest.raises(ValueError, match="a context of 65 tokens: expected 1 to the model's 64"):
        Answers(lm, context=65)


def test_whole_texts_are_read_behind_the_begin_token_and_the_last_window_is_full(
    lm: LanguageModel,
):
    answers = Answers(lm, context=6)
    ids = lm.tokenizer.encode("the cat sat on the mat and ran off, the cat")
    assert len(ids) > 12
    assert len(ids) % 6
    expected, whole = 0.0, [0, *ids]
    for place in range(1, len(whole)):
        last = min(-(-place // 6) * 6, len(whole) - 1)
        start = max(0, last - 6)
        expected += log_likelihood(lm, whole[start:place], [whole[place]])[0]
    [found, empty] = answers.whole_texts(["the cat sat on the mat and ran off, the cat", ""])
    assert found == pytest.approx(expected, abs=1e-10)
    assert empty == 0.0


def test_writing_stops_where_the_task_says(lm: LanguageModel):
    answers = Answers(lm, batch=2)
    whole = lm.generate("the cat", max_new_tokens=12, temperature=0.0)
    stop = whole[3:5]
    requests = [
        ("the cat", {"until": [stop], "max_gen_toks": 12}),
        ("the cat", {"max_gen_toks": 12, "do_sample": False, "temperature": 0.7}),
        ("the mat and", {"max_gen_toks": 12, "do_sample": False, "temperature": 0.7}),
        ("the cat", {"until": "", "max_new_tokens": 3}),
    ]
    found = answers.writing(requests)
    assert found[0] == whole[: whole.index(stop)]
    assert found[1] == whole
    assert found[2] == lm.generate("the mat and", max_new_tokens=12, temperature=0.0)
    assert found[3] == lm.generate("the cat", max_new_tokens=3, temperature=0.0)
    long = "the cat sat " * 50
    ids = answers.encode(long)
    begins = ids[:1] if ids[0] == lm.tokenizer.bos_id else []
    kept = begins + ids[len(ids) - 63 + len(begins) :]  # all but one place of the context
    with pytest.warns(UserWarning, match="1 of 1 prompts leave less .* their answers get 1 tok"):
        [text] = answers.writing([(long, {"max_gen_toks": 12})])
    assert text == lm.generate(kept, max_new_tokens=1, temperature=0.0)
    whole = ids[:60]  # such a prompt is not cut, whatever the task asks for
    with pytest.warns(UserWarning, match="their answers get 4 tok"):
        [text] = answers.writing([(lm.tokenizer.decode(whole), {"max_gen_toks": 500})])
    assert text == lm.generate(whole, max_new_tokens=4, temperature=0.0)


def test_generation_options_of_a_task():
    assert generation_options({"until": ["\n", ""], "temperature": 0.5, "top_p": 0.9}) == {
        "max_new_tokens": 256,
        "stop": ["\n"],
        "temperature": 0.5,
        "top_p": 0.9,
    }
    assert generation_options({"temperature": 0.5, "do_sample": False})["temperature"] == 0.0
    assert generation_options({"max_tokens": 3})["max_new_tokens"] == 3
    with pytest.raises(ValueError, match="generation option 'beams': expected one of"):
        generation_options({"beams": 4})


def test_begin_tokens_are_put_where_the_models_expect_them(tmp_path: Path):
    tokenizer = tokenizers.train_bpe(["abc"], 260, tmp_path)  # adds_bos
    from dataclasses import replace

    answers = Answers(LanguageModel(random_model(replace(GPT, vocab_size=260)), tokenizer))
    plain = tokenizer.encode("abc")
    assert answers.encode("abc") == [0, *plain]
    assert answers.encode("<|endoftext|>abc") == [0, *plain]
    assert answers.encode("abc", bos=False) == plain
    tokenizer.adds_bos = False
    assert answers.encode("abc") == plain
    assert answers.encode("abc", bos=True) == [0, *plain]
    with pytest.raises(ValueError, match="has no chat format"):
        answers.chat([{"role": "user", "content": "hi"}], True)


@pytest.mark.assets
def test_a_conversation_comes_back_as_the_tokens_of_its_format(assets: Path):
    tokenizer = tokenizers.load(assets / "llama3")
    from dataclasses import replace

    config = replace(LLAMA, vocab_size=tokenizer.vocab_size, width=4, hidden_width=4)
    answers = Answers(LanguageModel(random_model(config), tokenizer))
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    assert tokenizer.chat is not None
    assert answers.encode(answers.chat(messages, True)) == tokenizer.chat.encode(messages)


def test_without_the_harness_the_error_says_what_to_install(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.api.model", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'pellucid\[lm-eval\]'"):
        harness_model(lm)


# ── With the harness itself ──────────────────────────────────────────────────────────────────────

CHOICE = """
task: cats
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT = """
task: cat_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{start}}}}{{{{ends[0]}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: byte_perplexity}}]
"""
WRITE = """
task: cat_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tasks_of_the_harness_give_what_its_transformers_model_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lm_eval = pytest.importorskip("lm_eval")
    import pellucid

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm = pellucid.load("demo", dtype="float32")
    lm.tokenizer.adds_bos = False  # transformers does not put it before the demo's prompts
    starts = ["def main(argv=None):\n    ", "import os\nimport ", "class Error("]
    rows = [
        {
            "start": start,
            "ends": ["sys", "return 0", "Exception):\n    pass"],
            "written": lm.generate(start, max_new_tokens=6, temperature=0.0, stop=["\n"]),
        }
        for start in starts
    ]
    file = tmp_path / "cats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {"cats": CHOICE, "cat_text": TEXT, "cat_write": WRITE}
    for name, text in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(text.format(file=file))
    assert lm.checkpoint is not None
    ours = run_tasks(lm, list(tasks), batch=2, task_path=str(tmp_path))["results"]
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(lm.checkpoint.folder), "dtype": "float32"},
        device="cpu",
        tasks=list(tasks),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path)),
    )["results"]
    for name in tasks:
        numbers = {key: value for key, value in theirs[name].items() if isinstance(value, float)}
        assert numbers
        found = {key: ours[name][key] for key in numbers}
        assert found == pytest.approx(numbers, rel=1e-4, nan_ok=True)
    assert ours["cat_write"]["exact_match,none"] == 1.0
