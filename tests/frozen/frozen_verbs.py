"""Commands as users give them, and what is kept of what each of them said.

A case is one or more commands in a fresh place with the model folders of this directory, some of
them broken. Of each command its exit status, the object it wrote with ``--json``, its text and the
number of lines on standard error are kept; `differences` says what of these must stay.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pellucid.cli import main

HERE = Path(__file__).resolve().parent
TRANSCRIPTS = HERE / "transcripts"
PLACE = "@HERE@"
SELF_TEST = ["diff", "--self-test", "--json"]

# What depends on the clock, the machine or the version: only its type is kept.
VOLATILE = {"seconds", "tokens_per_second", "versions", "date"}
# Rounding itself, measured: on another machine these are of the same size, no more.
ROUNDING = {"ratio", "error_a", "error_b", "kl_max", "kl_mean", "top1", "reward_margin"}
NAME = re.compile(r"\b(?:step\.\d+\.)?(?:layers\.(?:\d+|\*)\.[a-z_]+(?:\.[a-z_]+)*|rope\.\w+)\b")
NUMBER = re.compile(r"(?<![\w.])[-−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")

GPT2, LLAMA = "-m models/gpt2", "-m models/llama-gqa"
_GREEDY = "--temperature 0 --engine plain"
_TRAIN = (
    "--width 12 --layers 1 --heads 2 --context 16 --vocab 270 --steps 4 --batch 4 --warmup 1 "
    "--precision float32 --eval-every 2 --sample-every 0 --no-tensorboard --no-plot"
)
_TUNE = "--steps 3 --batch 4 --warmup 0 --precision float32 --context 48 --lr 0.002"
_TOKENS = "--tokens 3,141,59,26,5,35,89"


def case(*commands: str | list[str], **more: Any) -> dict[str, Any]:
    """Commands in words, and how to look at what they say.

    stdin    what is typed in
    exact    the text is the result, to the letter where arithmetic is the same
    numbers  False: the text's numbers depend on the clock
    loose    keys of the JSON of which only the type is kept
    env      run as a process with these variables
    """
    words = [one if isinstance(one, list) else one.split() for one in commands]
    return {"commands": words, **more}


def _both(name: str, command: str, **more: Any) -> dict[str, dict[str, Any]]:
    """A command as text and with --json."""
    return {name: case(command, **more), f"{name}-json": case(f"{command} --json", **more)}


CASES: dict[str, dict[str, Any]] = {
    **_both("walk-gpt2", f"walk ab {GPT2} --layer 1 --head 2"),
    **_both("walk-llama", f"walk ab {LLAMA} --dtype float32 --head 3"),
    "walk-all-json": case(f"walk ab {LLAMA} --all --no-bos --dtype float64 --json"),
    "walk-scaled-json": case("walk abc -m models/llama-yarn --dialect meta --json"),
    "walk-book-json": case("walk ab -m models/gpt2-book --dialect notebook --json"),
    "walk-stdlib-json": case(["walk", "if not isinstance(value, str", *["-m", "stdlib", "--json"]]),
    "walk-standard-input": case(f"walk - {GPT2} --json", stdin="ab\n"),
    "walk-streamed": case(f"walk ab {LLAMA} --stream-weights --json"),
    "walk-page-and-figures": case(f"walk ab {LLAMA} --html page.html --plots figures --json"),
    **_both("trace-gpt2", f"trace ab {GPT2} -o t.safetensors", loose=["bytes"], numbers=False),
    "trace-all": case(f"trace ab {LLAMA} -o t.safetensors --all", numbers=False),
    "trace-only": case(
        f"trace ab {LLAMA} -o t.safetensors --only logits --only layers.*.attn.z --json",
        loose=["bytes"],
    ),
    "trace-generate": case(
        f"trace ab {LLAMA} -o t.safetensors --generate 2 --json", loose=["bytes"]
    ),
    "trace-force": case(
        f"trace ab {GPT2} -o t.safetensors",
        f"trace ab {GPT2} -o t.safetensors",
        f"trace ab {GPT2} -o t.safetensors --force",
        numbers=False,
    ),
    "trace-stdlib-gpt2-json": case(
        "trace import -m stdlib-gpt2 -o t.safetensors --json", loose=["bytes"]
    ),
    **_both("diff-same", f"diff models/gpt2 models/gpt2 {_TOKENS}"),
    "diff-steps-json": case(f"diff models/llama-gqa models/llama-gqa {_TOKENS} --steps 2 --json"),
    "diff-fused-json": case(f"diff models/llama-gqa models/llama-gqa {_TOKENS} --fused --json"),
    "diff-copies-json": case(f"diff models/gpt2 models/gpt2 {_TOKENS} --copies 3 --json"),
    "diff-rows-json": case("diff models/gpt2 models/gpt2 --tokens 1,2,3;4,5 --json"),
    "diff-dtype-json": case(
        f"diff models/llama-gqa models/llama-gqa {_TOKENS} --dtype-a float32 --json"
    ),
    "diff-dialect-json": case(
        f"diff models/llama-gqa models/llama-gqa {_TOKENS} --dialect-a meta --dialect-b hf --json"
    ),
    **_both("diff-theta", f"diff models/llama-gqa other-theta {_TOKENS} --dtype-a float32"),
    **_both(
        "diff-eps", f"diff models/gpt2 other-eps {_TOKENS} --dtype-a float32 --dtype-b float32"
    ),
    **_both("diff-layers", f"diff models/llama-gqa swapped {_TOKENS} --all"),
    "diff-int8-json": case(f"diff models/llama-wide weights/int8 {_TOKENS} --json"),
    "diff-adapter-json": case(
        "trace abc -m models/llama-wide --adapter weights/adapter -o b.safetensors",
        "diff models/llama-wide b.safetensors --tokens 0,65,66,67 --json",
        numbers=False,
    ),
    "diff-recordings-json": case(
        f"trace abc {LLAMA} -o a.safetensors",
        "trace abc -m other-theta -o b.safetensors",
        "diff a.safetensors b.safetensors --json",
        "diff a.safetensors a.safetensors --json",
        numbers=False,
    ),
    "diff-stdlib-json": case("diff stdlib stdlib -p import --json"),
    "diff-page": case(f"diff models/llama-gqa other-theta {_TOKENS} --html d.html --json"),
    **_both("generate-gpt2", f"generate ab {GPT2} --seed 1 -n 8 {_GREEDY}", exact=True),
    "generate-stdlib": case(
        ["generate", "if __name__", *f"-m stdlib -n 24 {_GREEDY}".split()], exact=True
    ),
    "generate-stdlib-float32-json": case(
        f"generate import -m stdlib -n 12 --dtype float32 --seed 2 {_GREEDY} --json"
    ),
    "generate-stdlib-gpt2-json": case(
        f"generate import -m stdlib-gpt2 -n 9 --seed 2 {_GREEDY} --json"
    ),
    "generate-batch": case(
        f"generate def import return -m stdlib -n 8 --dtype float32 {_GREEDY}", exact=True
    ),
    "generate-batch-json": case(
        f"generate def import return -m stdlib -n 8 --dtype float32 --seed 3 {_GREEDY} --json"
    ),
    "generate-drawn-json": case(
        "generate def -m stdlib -n 12 --seed 5 --temperature 0.9 --top-k 20 --top-p 0.9 "
        "--min-p 0.01 "
        "--repetition-penalty 1.1 --dtype float32 --engine plain --json"
    ),
    "generate-stop-json": case(
        f"generate def -m stdlib -n 40 --dtype float32 --stop ( --seed 1 {_GREEDY} --json"
    ),
    "generate-fast-json": case(
        "generate import -m stdlib -n 12 --dtype float32 --seed 2 --temperature 0 --engine fast "
        "--json",
        needs="cc",
    ),
    "generate-adapter-json": case(
        f"generate ab -m models/llama-wide --adapter weights/adapter -n 8 --seed 1 {_GREEDY} --json"
    ),
    "generate-int4-json": case(f"generate ab -m weights/int4 -n 8 --seed 1 {_GREEDY} --json"),
    "generate-slide-json": case(f"generate ab {GPT2} -n 70 --slide --seed 1 {_GREEDY} --json"),
    "generate-standard-input": case(
        f"generate - {LLAMA} -n 4 --no-bos {_GREEDY}", stdin="ab\n", exact=True
    ),
    "generate-specials-json": case(
        f"generate <|endoftext|>ab {GPT2} -n 4 --specials --seed 1 {_GREEDY} --json"
    ),
    "chat": case(
        f"chat -m models/llama-wide --adapter weights/adapter -n 6 --seed 1 {_GREEDY}",
        stdin="Name 3\n/system Be brief.\nName 4\n/reset\n/nothing\nName 5\n",
        exact=True,
    ),
    **_both("info-gpt2", "info models/gpt2"),
    **_both("info-llama", "info models/llama-llama3 --tokens 32 --no-diagram"),
    "info-int4-json": case("info weights/int4 --json"),
    "info-stdlib-json": case("info stdlib --json"),
    "info-picture": case("info models/gpt2 --svg g.svg --json"),
    **{
        f"info-{name}-json": case(f"info {name} --json")
        for name in ("gpt2", "book-gpt", "llama-2-7b", "llama-3-8b", "llama-3.2-1b")
    },
    "info-config-json": case("info models/llama-yarn/config.json --json"),
    "plan": case("plan models/gpt2 --cards 1 --gib 24 --context 16"),
    "plan-json": case("plan models/gpt2 --cards 1 --gib 24 --context 16 --json"),
    "train-json": case(f"train --data text.txt --out run {_TRAIN} --json"),
    "train": case(f"train --data text.txt --out run {_TRAIN}", numbers=False),
    "train-gpt2-json": case(
        f"train --data text.txt --out run {_TRAIN} --family gpt2 --dropout 0.1 --no-tied "
        "--order random --loss plain --schedule linear --json"
    ),
    "train-init-json": case(
        f"train --data text.txt --out run --init models/gpt2 "
        f"{_TRAIN.partition('--vocab 270 ')[2]} --json"
    ),
    "train-tokenise-json": case(
        "train --data text.txt --out run --vocab 270 --tokenise-only --json",
        f"train --data text.txt --out run {_TRAIN} --json",
    ),
    "train-watched-json": case(
        f"train --data text.txt --out run {_TRAIN} --trace-every 2 --only layers.0.resid_post "
        "--json"
    ),
    "train-characters-json": case(
        f"train --data text.txt --out run {_TRAIN} --tokenizer characters --no-begin --json"
    ),
    **{
        f"finetune-{kind}-json": case(
            f"finetune models/llama-wide --data {data} --out run {_TUNE} {more} --json"
        )
        for kind, data, more in (
            ("text", "text.txt", ""),
            ("instructions", "answers.jsonl", "--lora 2 --targets mlp --merge --dtype float32"),
            ("classification", "labels.csv", "--last-blocks 1"),
            ("preferences", "pairs.jsonl", "--lora 2 --beta 0.2 --dtype float32"),
        )
    },
    "finetune": case(  # in the dtype of the file, which was the default on every machine
        f"finetune models/gpt2 --data answers.jsonl --out run {_TUNE} --lora 2 --dtype bfloat16",
        numbers=False,
    ),
    "eval-text": case("eval models/gpt2 --text text.txt --context 32", numbers=False),
    "eval-text-json": case("eval models/gpt2 --text text.txt --context 32 --stride 8 --json"),
    "eval-stdlib-json": case("eval stdlib --text text.txt --json"),
    "eval-against-json": case(
        "eval models/llama-wide --text text.txt --against weights/int8 --context 32 --json"
    ),
    "eval-adapter-json": case(
        "eval models/llama-wide --adapter weights/adapter --text text.txt --context 32 --json"
    ),
    "eval-labels-json": case(
        f"finetune models/llama-wide --data labels.csv --out run {_TUNE} --json",
        "eval run/best --labels labels.csv --json",
    ),
    **_both("convert-meta", "convert models/llama-wide meta --to meta --shards 2"),
    "convert-back-json": case(
        "convert models/llama-wide meta --to meta --json",
        "convert meta again --to hf --context-length 64 --json",
        "info again --json",
        "info meta --json",
    ),
    "convert-hf-json": case(
        "convert models/gpt2 there --to hf --dtype float32 --max-shard-size 20K --json"
    ),
    **_both("convert-int8", "convert models/llama-wide q --to int8 --group 32 --text text.txt"),
    "bench-list": case("bench --list", exact=True),
    "bench-show": case("bench --show bench.json"),
    "bench-show-json": case("bench --show bench.json --json"),
    "fetch-json": case(
        "fetch tiny/gpt2 --json", env={"HF_HOME": f"{PLACE}/hub", "HF_HUB_OFFLINE": "1"}
    ),
    # Mistakes: one line on standard error, exit status 2
    "wrong-verb": case("wlak"),
    "wrong-flag": case("generate --no-such-flag"),
    "wrong-choice": case("generate ab --dtype float8"),
    "wrong-model": case("generate ab -m no-such-folder"),
    "wrong-dialect": case(f"generate ab {GPT2} --dialect latin"),
    "wrong-empty-folder": case("info empty"),
    "wrong-no-weights": case("generate ab -m no-weights"),
    "wrong-cut-short": case("generate ab -m cut-short"),
    "wrong-tensor-missing": case("generate ab -m tensor-missing"),
    "wrong-unknown-key": case("info unknown-key"),
    "wrong-other-family": case("info other-family"),
    "wrong-layer": case(f"walk ab {GPT2} --layer 7"),
    "wrong-empty-prompt": case(["walk", "", "-m", "models/gpt2"]),
    "wrong-place": case(f"trace ab {GPT2} -o nowhere/t.safetensors"),
    "wrong-glob": case(f"trace ab {GPT2} -o t.safetensors --only nothing.*"),
    "wrong-too-long": case(["generate", "ab " * 40, *f"{LLAMA} -n 2 {_GREEDY}".split()]),
    "wrong-temperature": case(f"generate ab {GPT2} --temperature -1"),
    "wrong-one-side": case("diff models/gpt2"),
    "wrong-no-recording": case("diff models/gpt2 text.txt"),
    "wrong-families": case("diff models/gpt2 models/llama-gqa"),
    "wrong-out-in-use": case(f"train --data text.txt --out models {_TRAIN}"),
    "wrong-nothing-to-resume": case("train --out none --resume"),
    "wrong-no-text": case(f"train --data no-such.txt --out run {_TRAIN}"),
    "wrong-no-data": case("finetune models/gpt2 --out run"),
    "wrong-alpha": case("finetune models/gpt2 --data answers.jsonl --out run --alpha 2"),
    "wrong-adapter": case("generate ab -m models/gpt2 --adapter weights/adapter -n 2"),
    "wrong-eval": case("eval models/gpt2"),
    "wrong-conversion": case("convert models/gpt2 there --to meta"),
    "wrong-destination": case("convert models/gpt2 weights --to hf"),
    "wrong-shape": case("plan no-such-shape"),
    "wrong-engine": case("bench --engines nothing*"),
    "wrong-repository": case("fetch nothing"),
}  # fmt: skip


def workplace(folder: Path) -> Path:
    """A folder with what the commands read: models, text, examples, and models that are broken."""
    for name in ("models", "weights"):
        (folder / name).symlink_to(HERE / name)
    for file in ("text.txt", "answers.jsonl", "labels.csv", "pairs.jsonl", "bench.json"):
        shutil.copyfile(HERE / file, folder / file)
    (folder / "empty").mkdir()
    _varied(folder / "other-theta", "llama-gqa", rope_theta=500.0)
    _varied(folder / "other-eps", "gpt2", layer_norm_epsilon=1e-2)
    _varied(folder / "unknown-key", "gpt2", sliding_windows=3)
    _varied(folder / "other-family", "gpt2", model_type="t5")
    _varied(folder / "no-weights", "gpt2")
    (folder / "no-weights" / "model.safetensors").unlink()
    weights = _varied(folder / "cut-short", "gpt2") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    weights = _varied(folder / "tensor-missing", "gpt2") / "model.safetensors"
    found = load_file(weights)
    save_file({name: x for name, x in found.items() if name != "transformer.ln_f.bias"}, weights)
    weights = _varied(folder / "swapped", "llama-gqa") / "model.safetensors"
    found = load_file(weights)
    one, other = (f"model.layers.{n}.self_attn.q_proj.weight" for n in range(2))
    found[one] = found[other].clone()
    save_file(found, weights)
    hub = folder / "hub" / "hub" / "models--tiny--gpt2"
    _varied(hub / "snapshots" / ("0" * 40), "gpt2")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)
    return folder


def _varied(folder: Path, name: str, **config: Any) -> Path:
    """A copy of a model with other values in its config."""
    shutil.copytree(HERE / "models" / name, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def perform(case: dict[str, Any], here: Path) -> list[dict[str, Any]]:
    """Give the commands of a case in `here`: what each said, and the files there were after it."""
    told = []
    for words in case["commands"]:
        say = _process if "env" in case else _within
        status, out, err = say(words, here, case)
        for path in (str(here), str(HERE)):
            out = out.replace(path, PLACE)
        one: dict[str, Any] = {"command": words, "status": status, "stderr_lines": err.count("\n")}
        if status == 2:
            assert "Traceback" not in err, err
        if status == 0 or out:
            one |= {"json": json.loads(out)} if "--json" in words else {"text": out}
        if here != HERE:
            one["files"] = sorted(_made(here))
        told.append(one)
    return told


def _made(here: Path) -> Iterator[str]:
    """What commands have written so far; numbers of random names left out."""
    given = ("models", "weights", "hub", "other-", "unknown-", "no-weights", "cut-", "tensor-")
    for path in here.rglob("*"):
        name = str(path.relative_to(here))
        known = name.startswith((*given, "swapped", "empty")) or path.suffix in (".jsonl", ".csv")
        if path.is_file() and not (known and not name.startswith("run/")):
            yield name


def _within(words: list[str], here: Path, case: dict[str, Any]) -> tuple[int, str, str]:
    """A command in this process."""
    out, err = io.StringIO(), io.StringIO()
    before, threads, stdin = Path.cwd(), torch.get_num_threads(), sys.stdin
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    os.chdir(here)
    torch.set_num_threads(1)
    sys.stdin = io.StringIO(case.get("stdin", ""))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(words)
            except SystemExit as ended:
                status = int(ended.code or 0)
    finally:
        sys.stdin = stdin
        torch.set_num_threads(threads)
        os.chdir(before)
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return status, out.getvalue(), err.getvalue()


def _process(words: list[str], here: Path, case: dict[str, Any]) -> tuple[int, str, str]:
    """A command in a process of its own, for variables that are read at import."""
    env = {name: value.replace(PLACE, str(here)) for name, value in case["env"].items()}
    done = subprocess.run(
        [sys.executable, "-m", "pellucid", *words],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"} | env,
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def flags(verb: str) -> list[str]:
    """The flags that the help of a verb lists."""
    status, text, _ = _within([verb, "--help"], HERE, {})
    assert status == 0
    listed = re.findall(r"^ {2,}(-\S.*?)(?: {2,}|$)", text, re.MULTILINE)
    return sorted(
        {flag for line in listed for flag in re.findall(r"(?<!\S)--?[A-Za-z][\w-]*", line)}
    )


def differences(
    now: list[dict], then: list[dict], case: dict[str, Any], *, same: bool
) -> list[str]:
    """What a later version says otherwise than it may, in lines.

    same  whether arithmetic is that of the machine where the transcripts were made
    """
    wrong = []
    for found, kept in zip(now, then, strict=True):
        at = " ".join(kept["command"])
        wrong += [
            f"{at}: {key} is {found[key]}, was {kept[key]}"
            for key in ("command", "status")
            if found[key] != kept[key]
        ]
        if kept["status"] == 2 and kept["stderr_lines"] == 1 != found["stderr_lines"]:
            wrong.append(f"{at}: {found['stderr_lines']} lines on standard error, was one")
        if kept["status"] == 0 and not kept["stderr_lines"] and found["stderr_lines"]:
            wrong.append(f"{at}: something on standard error")
        if lost := set(kept["files"]) - set(found["files"]):
            wrong.append(f"{at}: no {', '.join(sorted(lost))}")
        if "json" in kept:
            loose = VOLATILE | set(case.get("loose", ()))
            wrong += [
                f"{at}: {line}"
                for line in _json(found.get("json"), kept["json"], "", (loose, same))
            ]
        if "text" in kept:
            wrong += [f"{at}: {line}" for line in _text(found.get("text", ""), kept, case, same)]
    return wrong


def _json(now: Any, then: Any, at: str, how: tuple[set[str], bool]) -> Iterator[str]:
    """Key for key and value for value; numbers that come of float arithmetic nearly."""
    if isinstance(then, dict) and isinstance(now, dict):
        if list(now) != list(then):
            yield f"{at}: keys {list(now)}, were {list(then)}"
        for key in then.keys() & now.keys():
            if key not in how[0]:
                yield from _json(now[key], then[key], f"{at}.{key}", how)
            elif type(now[key]) is not type(then[key]):
                yield f"{at}.{key}: another type"
    elif isinstance(then, list) and isinstance(now, list):
        if len(now) != len(then):
            yield f"{at}: {len(now)} of them, were {len(then)}"
        for i, (one, other) in enumerate(zip(now, then, strict=False)):
            yield from _json(one, other, f"{at}[{i}]", how)
    elif type(now) is not type(then) or not _alike(now, then, _tolerance(at, how[1])):
        yield f"{at}: {now!r}, was {then!r}"


def _tolerance(at: str, same: bool) -> float:
    """How far a number may be off, as a share of it."""
    if same:
        return 1e-3
    return 0.5 if at.rpartition(".")[2].partition("[")[0] in ROUNDING else 2e-2


def _alike(now: Any, then: Any, tolerance: float) -> bool:
    if isinstance(then, float):
        return _near(now, then, tolerance)
    if isinstance(then, str):
        if NUMBER.sub("#", now) != NUMBER.sub("#", then):
            return False
        pairs = zip(NUMBER.findall(now), NUMBER.findall(then), strict=True)
        return all(
            a == b or ("." in b and _near(_value(a), _value(b), tolerance)) for a, b in pairs
        )
    return now == then


def _near(now: float, then: float, tolerance: float = 1e-3) -> bool:
    return now == then or math.isclose(now, then, rel_tol=tolerance, abs_tol=1e-4)


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("−", "-"))


def _text(now: str, kept: dict, case: dict[str, Any], same: bool) -> Iterator[str]:
    """Prose may change: what must stay are the names of tensors, in order, and the numbers."""
    then = kept["text"]
    if case.get("exact"):
        if same and now != then:
            yield f"wrote {now!r}, was {then!r}"
        return
    if NAME.findall(now) != NAME.findall(then):
        yield "other names of tensors, or another order"
    if same and case.get("numbers", True) and kept["status"] != 2:
        there = [_value(number) for number in NUMBER.findall(now)]
        for number in NUMBER.findall(then):  # short ones may be part of a sentence
            if len(number) > 2 and not any(_near(value, _value(number)) for value in there):
                yield f"no number {number}"
