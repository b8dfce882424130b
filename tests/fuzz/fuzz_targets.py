"""What is fuzzed: each reader with a file of its own to damage, flags, requests and templates.

A target gets a folder with whole files, damages one with a `random.Random`, and reads it the way
the package does. `damage` returns what was damaged. atheris drives the same
targets (fuzz_atheris.py).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_mutations as mutations
from fuzz_seeds import PROMPT, TEMPLATE

Damage = Callable[[str, random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """A reader: the seed's files it needs, those that are damaged, and the call that reads them."""

    name: str
    needs: tuple[str, ...]
    damaged: tuple[str, ...]
    read: Callable[[Path, random.Random], None]

    def damage(self, folder: Path, draw: random.Random) -> str:
        """Damage one file in `folder`; its name and a part of what it holds now."""
        if not self.damaged:
            return ""
        path = folder / draw.choice(self.damaged)
        path = draw.choice([each for each in sorted(path.rglob("*")) if each.is_file()]
                           ) if path.is_dir() else path  # fmt: skip
        whole = path.read_bytes()
        if path.suffix == ".json" and not whole.startswith(b"["):
            made = mutations.damaged_json(whole.decode(), draw)
        elif path.suffix in (".json", ".jsonl", ".toml", ".yaml", ".csv", ".py", ".log"):
            made = mutations.damaged_text(whole.decode(), draw)
        else:
            made = mutations.damaged_bytes(whole, draw)
        path.write_bytes(made)
        return f"{path.relative_to(folder)}: {made[:300]!r}"


def model(name: str) -> Callable[[Path, random.Random], None]:
    """Open a model, count it, and load it where that can be done."""

    def read(folder: Path, draw: random.Random) -> None:
        import torch

        import pellucid
        from pellucid import checkpoints

        if draw.random() < 0.5:
            pellucid.model_report(str(folder / name))
        loaded = checkpoints.load_model(checkpoints.open_checkpoint(folder / name))
        with torch.no_grad():
            loaded(torch.tensor([[0, 1, 2]]))

    return read


def tokenizer(folder: Path, draw: random.Random) -> None:
    from pellucid import tokenizers

    made = tokenizers.load(folder / "hf")
    made.decode(made.encode(PROMPT))
    if made.chat is not None:
        made.chat.encode([{"role": "user", "content": "a <|x|>"}])


def adapter(folder: Path, draw: random.Random) -> None:
    import pellucid

    pellucid.load(folder / "hf", adapter=folder / "tuned" / "adapter")


def trace_file(folder: Path, draw: random.Random) -> None:
    from pellucid.trace import Trace

    Trace.load(folder / "trace.safetensors").meta.get("tokens")


def recording(folder: Path, draw: random.Random) -> None:
    from pellucid.diff.sides.recordings import load_recording

    load_recording(folder / "recording.npz")


def diff_of_recording(folder: Path, draw: random.Random) -> None:
    call("diff", folder / "hf", folder / "trace.safetensors", "--json")


def name_map(folder: Path, draw: random.Random) -> None:
    from pellucid.diff.sides.maps import load_map

    found = load_map(folder / "map.yaml")
    found.knows(["model.layers.0.mlp"])


def records(name: str) -> Callable[[Path, random.Random], None]:
    """Examples and the text they make."""

    def read(folder: Path, draw: random.Random) -> None:
        from pellucid.train.finetune import records as reader

        for each in reader.read_records(folder / name):
            reader.kind_of(each)

    return read


def talks(folder: Path, draw: random.Random) -> None:
    call(
        "finetune", folder / "hf", "--data", folder / "talks.jsonl", "--out", folder / "out",
        "--steps", 1, "--batch", 1, "--context", 24, "--lora", 1, "--json",
    )  # fmt: skip
    shutil.rmtree(folder / "out", ignore_errors=True)


def documents(folder: Path, draw: random.Random) -> None:
    from pellucid.train import TextFormat, read_documents

    for layout in (TextFormat(), TextFormat(separator="return")):
        read_documents([folder / "text.py"], layout)
    read_documents([folder / "lines.jsonl"], TextFormat())


def settings(folder: Path, draw: random.Random) -> None:
    from pellucid.train import settings as train_settings
    from pellucid.train.finetune import settings as finetune_settings

    train_settings.resolve({}, config=folder / "run" / "config.toml")
    finetune_settings.read(folder / "tuned" / "config.toml")


def resume(folder: Path, draw: random.Random) -> None:
    call("train", "--out", folder / "run", "--resume", "--stop", 3, "--no-plot", "--json")


def corpus(folder: Path, draw: random.Random) -> None:
    from pellucid import tokenizers
    from pellucid.train.data.shards import open_corpus

    source = open_corpus(folder / "run" / "tokens", tokenizers.load(folder / "hf"))
    source.training.read(0, 4)


def template(folder: Path, draw: random.Random) -> None:
    """A damaged template, or one of pieces that loop, escape or grow."""
    from pellucid import tokenizers

    pieces = [
        *mutations.WORDS, TEMPLATE, "{% for m in messages %}{{ m.content * 99999 }}{% endfor %}",
        "{{ range(10**9) | list }}", "{{ 9 ** 9 ** 9 }}", "{{ messages.__class__ }}",
        "{{ 'a'.format.__globals__ }}", "{% set x = namespace(v='a') %}", "{{ x.v }}",
        "{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('touch executed') }}", "{{ '%999999999d' % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages | tojson(indent=10**6) }}",
        "{{ raise_exception('no') }}", "{{ strftime_now('%Y' * 9999) }}", "{{ 1 / 0 }}",
        "{{ messages | map(attribute='content') | join('x' * 99999) }}", "{{ (1, 2)[messages] }}",
        "{{ 'a' | indent(10**9) }}", "{% include '/etc/passwd' %}", "{{ none.a.b }}",
    ]  # fmt: skip
    text = "".join(draw.choice(pieces) for _ in range(draw.choice((1, 1, 2, 4))))
    path = folder / "hf" / "chat_template.jinja"
    path.write_bytes(mutations.damaged_text(text, draw) if draw.random() < 0.5
                     else text.encode("utf-8", "surrogatepass"))  # fmt: skip
    made = tokenizers.load(folder / "hf")
    content = draw.choice((*mutations.WORDS, "a" * 2000))
    assert made.chat is not None, "a template was given"
    made.chat.encode([{"role": draw.choice(("user", "system", "x")), "content": content}])


def request(folder: Path, draw: random.Random) -> None:
    """The body of a request to the server, as far as its fields are read."""
    from pellucid.serve import schemas
    from pellucid.serve.fields import RequestError, parse, read_json

    body: dict[str, Any] = {
        "model": "demo", "messages": [{"role": "user", "content": "a"}], "prompt": ["a", [1, 2]],
        "temperature": 0.5, "max_tokens": 3, "stop": ["x"], "seed": 1, "stream": True, "n": 1,
        "stream_options": {"include_usage": True}, "logprobs": 2, "top_p": 0.9, "input": "a",
    }  # fmt: skip
    data = mutations.damaged_json(json.dumps(body), draw)
    tables = [getattr(schemas, name) for name in dir(schemas) if name.isupper()]
    fields = draw.choice([table for table in tables if isinstance(table, dict) and table])
    with contextlib.suppress(RequestError):
        parse(read_json(data), fields)


# Verbs whose every flag is offered a value that nobody expects; none of these waits or listens.
VERBS = ("walk", "trace", "diff", "generate", "info", "code", "plan", "train", "finetune", "eval",
         "convert", "fetch", "chat", "bench", "serve")  # fmt: skip
_FIRST = {"walk": ["ab"], "trace": ["ab"], "generate": ["ab"], "eval": ["hf"], "finetune": ["hf"],
          "info": ["hf"], "code": ["hf"], "plan": ["hf"], "diff": ["hf", "hf"],
          "convert": ["hf", "new"], "fetch": ["a/b"], "serve": ["hf"]}  # fmt: skip
_NEVER = {"--prepare", "--traceback", "--help", "-h", "--work", "--peer-python", "--self-test"}


def flags(folder: Path, draw: random.Random) -> None:
    """A verb with some of its flags and odd values, outputs among them; it writes in `folder`."""
    from pellucid.cli import VERBS as KNOWN
    from pellucid.cli.parser import VerbParser

    verb = draw.choice(VERBS)
    parser = VerbParser(f"pellucid {verb}", "")
    getattr(importlib.import_module(KNOWN[verb][0]), f"{verb}_arguments")(parser)
    offered = [action for action in parser._actions
               if action.option_strings and not _NEVER & set(action.option_strings)]  # fmt: skip
    words = [*_FIRST.get(verb, [])]
    if draw.random() < 0.1 and words:
        words[-1] = draw.choice(mutations.WORDS).replace("\0", "")
    if verb in ("walk", "trace", "generate", "chat"):
        words += ["-m", "hf"]
    values = [
        "0", "1", "-1", "2147483648", "9" * 400, "1e400", "nan", "inf", "0.5", "", "x", "hf",
        "text.py", "talks.jsonl", "labels.csv", "/dev/null", "/etc/passwd", ".", "..", "/",
        "hf/config.json",
        "new.out", "\udcff", "é", "a" * 5000, "~nosuch/x", "1,2,3", "*", "[", "cuda", "float16",
        "run", "tuned/adapter", "map.yaml", "trace.safetensors", "text", "labels",
    ]  # fmt: skip
    for action in draw.sample(offered, min(len(offered), draw.choice((0, 1, 1, 2, 4)))):
        words.append(draw.choice(action.option_strings))
        if action.nargs != 0:
            choices = [str(each) for each in action.choices or ()]
            words.append(draw.choice(choices if choices and draw.random() < 0.7 else values))
    if verb == "bench":
        words.append("--list")
    if verb in ("serve", "chat"):
        words += ["--dtype", "nothing"]  # so that neither goes on to listen or to read
    with contextlib.chdir(folder):
        call(verb, *words)


def call(*words: object) -> None:
    """A verb; AssertionError for a status that no user is told about, or an error in many lines."""
    from pellucid.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            status = main([str(word) for word in words])
        except SystemExit as ended:  # argparse
            status = ended.code
    assert status in (0, 1, 2), f"status {status!r} of {words}"
    lines = [line for line in said.getvalue().splitlines() if "Warning" not in line]
    assert status != 2 or (lines and len(lines[-1]) < 2000), f"an error of {said.getvalue()[:500]}"
    assert "Traceback" not in said.getvalue(), said.getvalue()


_HF = ("hf/config.json", "hf/model.safetensors")
_JSON = ("hf/tokenizer.json", "hf/tokenizer_config.json", "hf/special_tokens_map.json")
TARGETS = {
    target.name: target
    for target in (
        Target("hf", ("hf",), _HF, model("hf")),
        Target("sharded", ("sharded",), ("sharded",), model("sharded")),
        Target("meta", ("meta",), ("meta",), model("meta")),
        Target("int4", ("int4",), ("int4/config.json", "int4/model.safetensors"), model("int4")),
        Target("gguf", ("gguf.gguf",), ("gguf.gguf",), model("gguf.gguf")),
        Target("tokenizer", ("hf",), _JSON, tokenizer),
        Target("adapter", ("hf", "tuned"), ("tuned/adapter",), adapter),
        Target("trace", ("trace.safetensors",), ("trace.safetensors",), trace_file),
        Target("recording", ("recording.npz",), ("recording.npz",), recording),
        Target("diff", ("hf", "trace.safetensors"), ("trace.safetensors",), diff_of_recording),
        Target("map", ("map.yaml",), ("map.yaml",), name_map),
        Target("talks", ("talks.jsonl",), ("talks.jsonl",), records("talks.jsonl")),
        Target("labels", ("labels.csv",), ("labels.csv",), records("labels.csv")),
        Target("pairs", ("pairs.json",), ("pairs.json",), records("pairs.json")),
        Target("finetune", ("hf", "talks.jsonl"), ("talks.jsonl",), talks),
        Target("documents", ("text.py", "lines.jsonl"), ("text.py", "lines.jsonl"), documents),
        Target("settings", ("run", "tuned"), ("run/config.toml", "tuned/config.toml"), settings),
        Target("resume", ("run", "text.py"), ("run",), resume),
        Target("corpus", ("run", "hf"), ("run/tokens",), corpus),
        Target("template", ("hf",), (), template),
        Target("request", (), (), request),
        Target("flags", ("hf", "run", "tuned", "text.py", "talks.jsonl", "labels.csv", "map.yaml",
                         "trace.safetensors"), (), flags),
    )
}  # fmt: skip
# Readers that train or run a verb cost more; they get a smaller share of the inputs.
SHARES = {"finetune": 0.1, "resume": 0.15, "diff": 0.15, "flags": 2.0, "template": 1.5}
