"""Make every file in this folder anew, with the version of Pellucid that is checked out.

    OMP_NUM_THREADS=1 python tests/frozen/make.py            # all of it, some minutes
    OMP_NUM_THREADS=1 python tests/frozen/make.py traces     # or parts, in the order of PARTS below

The files say what a version did, so that later ones are held to it. Making them anew is giving that
up: do it only for a part that is changed on purpose, and say in the commit what changed and why.
README.md says which version made them. The model folders are written here tensor by tensor and
need nothing of Pellucid; everything else goes through the command line and `pellucid.load`.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]
os.environ["COLUMNS"] = "100"

import frozen_files  # noqa: E402
import frozen_models  # noqa: E402
import frozen_traces  # noqa: E402
import torch  # noqa: E402
from frozen_training import FINETUNED, RUNS, SHARDED, begin, sources  # noqa: E402
from frozen_verbs import CASES, SELF_TEST, TRANSCRIPTS, flags, perform, workplace  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import pellucid  # noqa: E402
from pellucid.cli import main as pellucid_main  # noqa: E402

WORDS = ["value", "name", "list", "item", "count", "index", "path", "line"]
WORDS += ["text", "file", "size", "key", "data", "node", "left", "right"]


def run(*argv: str) -> None:
    """One verb, which must succeed."""
    status = pellucid_main(list(argv))
    assert status == 0, (argv, status)


def text() -> None:
    """The text that tokenizer and runs learn from, and the examples of the fine-tuning runs."""
    lines = [f"def {WORDS[n % 16]}_{n}(x):\n    return x + {n * n}\n" for n in range(60)]
    (HERE / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    rows = [{"instruction": f"Name {n}", "output": WORDS[n % 16]} for n in range(24)]
    (HERE / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    with (HERE / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["text", "label"])
        table.writerows([f"{WORDS[n % 16]} {n}", "odd" if n % 2 else "even"] for n in range(24))
    rows = [{"prompt": f"{n}: ", "chosen": WORDS[n % 16], "rejected": "no"} for n in range(16)]
    (HERE / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def models() -> None:
    """Model folders in Hugging Face's layout, with a tokenizer learnt from the text."""
    shutil.rmtree(frozen_models.MODELS, ignore_errors=True)
    with TemporaryDirectory() as folder:
        learnt = Path(folder) / "run"
        sizes = [
            "--width=8",
            "--heads=2",
            "--layers=1",
            "--context=16",
            "--vocab=270",
            "--steps=1",
            "--warmup=0",
        ]
        quiet = ["--no-plot", "--no-tensorboard", "--sample-every=0", "--json"]
        run("train", "--data", str(HERE / "text.txt"), "--out", str(learnt), *sizes, *quiet)
        frozen_models.write_all(learnt / "last")


def traces() -> None:
    """Golden traces of every model in every dialect and dtype, and this machine's fingerprint."""
    frozen_traces.TRACES.mkdir(exist_ok=True)
    machine = json.dumps(frozen_traces.fingerprint(), indent=1)
    (HERE / "machine.json").write_text(machine + "\n")
    for name in frozen_traces.TRACED:
        runs, whole = {}, {}
        for dialect in frozen_traces.DIALECTS:
            for dtype in frozen_traces.DTYPES:
                lm = pellucid.load(frozen_traces.MODELS / name, dtype=dtype, dialect=dialect)
                for kind in frozen_traces.KINDS:
                    seen = frozen_traces.observe(lm, kind)
                    runs[f"{kind}/{dialect}/{dtype}"] = frozen_traces.golden(seen)
                    if name in frozen_traces.WHOLE and dialect == "hf" and kind == "plain":
                        found = {f"{dtype}/{key}": x.contiguous() for key, x in seen.items()}
                        whole.update({key: tensor.clone() for key, tensor in found.items()})
        lm = pellucid.load(frozen_traces.MODELS / name, dtype="float64")
        for kind in ("edited", "gradients"):
            runs[f"{kind}/hf/float64"] = frozen_traces.golden(frozen_traces.observe(lm, kind))
        frozen_traces.write(frozen_traces.TRACES / f"{name}.safetensors", runs)
        if whole:
            save_file(whole, frozen_traces.TRACES / f"whole-{name}.safetensors")


def runs() -> None:
    """Runs that stopped half way, the log of the whole ones and the weights at their end."""
    for name, (argv, half) in {**RUNS, **FINETUNED}.items():
        with TemporaryDirectory() as folder:
            here = sources(Path(folder).resolve(), name)
            begin([*argv, "--out", str(here / "whole")], here)
            begin([*argv, "--out", str(here / "run"), *half], here)
            frozen_files.keep(here / "run", HERE / "runs" / name, here)
            end(here / "whole", name)


def end(whole: Path, name: str) -> None:
    """What the uninterrupted run said and became."""
    ends = HERE / "runs" / "ends"
    ends.mkdir(parents=True, exist_ok=True)
    told = json.dumps(frozen_files.log(whole)).replace("], [", "],\n[")
    (ends / f"{name}.json").write_text(told + "\n", encoding="utf-8")
    weights = sorted((whole / "last").glob("*.safetensors"))
    found = {key: x for path in weights for key, x in load_file(path).items()}
    save_file(found, ends / f"{name}.safetensors")


def sharded() -> None:
    """A run that two ranks share, stopped half way: DCP's files and all."""
    argv, half = SHARDED
    with TemporaryDirectory() as folder:
        here = sources(Path(folder).resolve(), "sharded")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node=2", "-m", "pellucid"]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for out, more in (("whole", []), ("run", half)):
            command = [*launcher, *[part.replace("@HERE@", str(here)) for part in argv]]
            subprocess.run([*command, "--out", str(here / out), *more], env=env, check=True)
        frozen_files.keep(here / "run", HERE / "runs" / "sharded", here)
        end(here / "whole", "sharded")


def weights() -> None:
    """An adapter of the fine-tuning run, quantised folders, and the logits of each."""
    for bits in ("int8", "int6", "int4"):
        shutil.rmtree(HERE / "weights" / bits, ignore_errors=True)
        source, kept = HERE / "models" / "llama-wide", HERE / "weights" / bits
        run("convert", str(source), str(kept), "--to", bits, "--group", "32", "--json")
    shutil.rmtree(HERE / "weights" / "adapter", ignore_errors=True)
    with TemporaryDirectory() as folder:
        here = sources(Path(folder).resolve(), "lora")
        begin([*FINETUNED["lora"][0], "--out", str(here / "run")], here)
        frozen_files.keep((here / "run" / "adapter").resolve(), HERE / "weights" / "adapter", here)
    found = {}
    for bits in ("int8", "int6", "int4"):
        lm = pellucid.load(HERE / "weights" / bits, dtype="float32")
        found[bits] = lm.trace(frozen_traces.PROMPT)["logits"]
    base = HERE / "models" / "llama-wide"
    lm = pellucid.load(base, dtype="float32", adapter=HERE / "weights" / "adapter")
    found["adapter"] = lm.trace(frozen_traces.PROMPT)["logits"]
    save_file({key: x.clone() for key, x in found.items()}, HERE / "weights" / "logits.safetensors")


def verbs() -> None:
    """Transcripts of the verbs and the flags they take."""
    shutil.rmtree(TRANSCRIPTS, ignore_errors=True)
    TRANSCRIPTS.mkdir()
    listed = {verb: flags(verb) for verb in sorted(VERBS)}
    (HERE / "flags.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    for name, case in CASES.items():
        with TemporaryDirectory() as folder:
            told = perform(case, workplace(Path(folder).resolve()))
        shown = json.dumps(told, indent=1, ensure_ascii=False)
        (TRANSCRIPTS / f"{name}.json").write_text(shown + "\n", encoding="utf-8")


def bench() -> None:
    """A saved measurement, which `bench --show` is to read."""
    with TemporaryDirectory() as folder:
        shape = str(HERE / "models" / "llama-wide" / "config.json")
        engines = ["--engines", "pellucid/eager/float32,pellucid/eager/int8"]
        options = ["--quick", "--threads=1", "--measures=decode", "--work", folder, "--json"]
        saved = Path(folder) / "bench.json"
        run("bench", "--shape", shape, *engines, *options, "--save", str(saved))
        text = saved.read_text(encoding="utf-8").replace(str(HERE), frozen_files.PLACE)
        (HERE / "bench.json").write_text(text.replace(folder, "/tmp/work"), encoding="utf-8")


def faults() -> None:
    """The table of seeded faults on the small subjects."""
    told = perform({"commands": [SELF_TEST]}, HERE)[0]
    rows = [
        [row["fault"], row["model"], row["dtype"], row["weights_shown"], row["control"],
         row["verdict"], row["right"], row["expected"]["first"], row["found"]["first"],
         row["expected"]["cause"], row["found"]["cause"], row["expected"]["static"],
         row["found"]["static"]]
        for row in told["json"]["rows"]
    ]  # fmt: skip
    lines = ",\n".join(json.dumps(row) for row in rows)
    kept = f'{{"status": {told["status"]}, "summary": {json.dumps(told["json"]["summary"])},\n'
    (HERE / "faults.json").write_text(f'{kept}"rows": [\n{lines}\n]}}\n', encoding="utf-8")


VERBS = ["walk", "trace", "diff", "generate", "chat", "info", "plan", "train", "finetune", "eval"]
VERBS += ["bench", "convert", "fetch"]
PARTS = (text, models, traces, runs, sharded, weights, bench, verbs, faults)

if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or [part.__name__ for part in PARTS]
    for part in PARTS:
        if part.__name__ in wanted:
            print(part.__name__, flush=True)
            part()
