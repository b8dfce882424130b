"""Loading a GGUF file takes the memory of the result and at most 15 % more, whatever its types."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from pellucid.checkpoints.formats.gguf_writing import planned
from pellucid.families import write_gguf_config
from pellucid.gguf_file import TYPES
from pellucid.models import Config, LlamaConfig, RopeConfig

CONFIG = LlamaConfig(  # 31 million parameters: 124 MB in float32
    vocab_size=16384, context_length=64, width=512, n_layers=5, n_heads=8, n_kv_heads=4,
    head_dim=64, hidden_width=2048, rope=RopeConfig(), tied=True,
)  # fmt: skip
BLOCKS = {name: (values, nbytes) for name, values, nbytes in TYPES.values()}
SMALL = replace(CONFIG, vocab_size=64, width=256, n_layers=1)
MEASURE = """
import os, sys, torch, gguf, pellucid
from pathlib import Path
from pellucid.checkpoints import load_model, open_checkpoint
torch.set_num_threads(1)
def occupied(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
for each in sys.argv[1:]:
    if os.fork():  # a process for each, so that none begins with what another one left behind
        os.wait()
        continue
    kind, dtype = each.split(":")
    load_model(open_checkpoint("small.gguf"), dtype=getattr(torch, dtype))  # pages of libraries
    Path("/proc/self/clear_refs").write_text("5")
    before = occupied("VmRSS")
    model = load_model(open_checkpoint(f"{kind}.gguf"), dtype=getattr(torch, dtype))
    peak = occupied("VmHWM") - before
    result = sum(tensor.nbytes for tensor in model.state_dict().values())
    print(each, peak, result, flush=True)
    os._exit(0)
"""


def write(path: Path, kind: str, config: Config = CONFIG) -> None:
    """A model of nothing but zeros, whose matrices are of a type."""
    keys = write_gguf_config(config)
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture"))
    for key, value in keys.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for each in planned(config, kind):
        values, nbytes = BLOCKS[each.type]
        shape = (*each.shape[:-1], each.shape[-1] // values * nbytes)
        data = np.zeros(shape, np.uint8)
        if each.type in ("F32", "F16"):
            data = data.view(np.float32 if each.type == "F32" else np.float16)
        writer.add_tensor(each.entry.stored, data, raw_dtype=gguf.GGMLQuantizationType[each.type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_peak_of_loading(tmp_path):
    loaded = ("Q8_0:float32", "Q4_1:bfloat16", "Q4_K:float32", "Q6_K:bfloat16", "F16:float32")
    for each in loaded:
        write(tmp_path / f"{each.partition(':')[0]}.gguf", each.partition(":")[0])
    write(tmp_path / "small.gguf", "Q8_0", SMALL)
    command = [sys.executable, "-c", MEASURE, *loaded]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    shares = {each: int(peak) / int(result) for each, peak, result in lines}
    assert shares.keys() == set(loaded) and max(shares.values()) <= 1.15, shares
