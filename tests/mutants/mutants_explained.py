"""Mutants that change nothing that can be observed, and why: no test can kill them."""

from __future__ import annotations

# module -> the changed line, its new part in brackets, with the line above it where that is needed
# to tell it from others -> why
EXPLAINED: dict[str, dict[str, str]] = {
    "checkpoints/formats/meta.py": {
        "_ROWS_COMPARED = (4097)": "how many rows at a time: memory, no result",
        "first = (norm_eps <= 5e-06) or (width == 8192 and kv_heads is None)":
        "the releases have 1e-6 and 1e-5, nothing between",
        "return sum(shape[0] for shape in rows) if rows[0][1] == width else rows[(1)][0]":
        "shards that are split along the width have the same number of rows",
    },
    "checkpoints/formats/peft_config.py": {
        'if not isinstance(config.get("use_rslora") or (True), bool):':
        "either stands for one that is absent, and is a bool",
    },
    "diff/replay/judge.py": {
        "rows = torch.arange(mask.shape[(2)]) + mask.shape[-1] - mask.shape[-2]":
        "a mask of padded rows has four axes: the third is the last but one",
        "rows = torch.arange(mask.shape[-2]) + mask.shape[-1] - mask.shape[(2)]":
        "a mask of padded rows has four axes: the third is the last but one",
    },
    "diff/replay/statistics.py": {
        "ratios = rms(error_b, rest) / allowed.clamp(min=torch.finfo((torch.float32)).tiny)":
        "what is allowed is never that small: it is drawn towards the whole tensor's",
        'verdict: Verdict = "diverged" if (worst >= 1) else "within-rounding"':
        "errors are measured: none is the bound to the bit",
    },
    "generate/engine.py": {
        "if (len(self._live) <= len(logits)):": "all rows of logits are the same rows",
        "return any(longest > (rope.original_context or (2)) for rope in self._ropes_by_length())":
        "a RoPE that follows the length has an original context",
    },
    "generate/sample.py": {
        "smallest_kept = torch.topk(logits, min(k, logits.shape[(1)])).values[:, -1:]":
        "logits have two axes",
        "cumulative = probabilities.cumsum((1))  # (B, V)": "logits have two axes",
        "return logits.argmax((1))": "logits have two axes",
        'return logits.softmax((1)).to("cpu", torch.float64)': "logits have two axes",
        "return torch.from_numpy(logits.detach().numpy().argmax((1)))  # vectorised, unlike "
        "PyTorch's":
        "logits have two axes",
        "lowered = torch.where((logits <= 0), logits * penalty, logits / penalty)":
        "zero times and zero through the penalty are zero",
    },
    "models/quantised.py": {
        "padding = some[0, (1)].numel() - self.columns": "all rows of tiles are as long",
        "if group < 16 or group % 16 or group > (257):": "the next multiple of 16 is 272",
    },
    "models/rope_scaling.py": {
        "return math.sqrt(1 + stretch) if (self.factor >= 1) else 1.0":
        "a factor of 1 stretches by its logarithm, 0",
        "slowed = torch.where((wavelength >= original / low), plain / rope.factor, plain)":
        "there the ramp is taken, and gives the same",
    },
    "tokenizers/bytelevel.py": {
        "if left not in parts: return (True)":
        "a part that is not there by now never will be, and the count at the end says no",
        "if right not in parts: return (True)":
        "a part that is not there by now never will be, and the count at the end says no",
        "if (last >= rest):": "one more piece, without a character",
    },
    "train/cross_entropy.py": {
        "SLICE = (2 * 13)  # rows of the weight whose gradient is added at a time":
        "how many rows at a time: speed, no result",
        "log_p = F.log_softmax(some, dim=(1), dtype=wide)": "logits have two axes",
    },
    "train/data/batches.py": {
        "self._epoch, self._shift, self._order = -1, (1), Shuffle(1, 0)  # of the epoch read last":
        "no epoch has the number -1: all three are made anew before they are read",
        "self._epoch, self._shift, self._order = -1, 0, Shuffle(1, (1))  # of the epoch read last":
        "no epoch has the number -1: all three are made anew before they are read",
        "chosen = (torch.rand(self.batch, generator=generator) <= self.copies)":
        "a number drawn is none of the shares to the bit",
        "if limit is not None and (limit <= windows):":
        "as many as there are, evenly spread, are all",
    },
}  # fmt: skip
