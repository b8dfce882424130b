"""What a model is made of, from its config alone: no weight is read.

report = model_report("llama-3-8b", tokens=2048)
report.census.total, report.flops.forward
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pellucid.checkpoints.formats import hf_config, meta
from pellucid.checkpoints.formats.gguf import stored_types
from pellucid.checkpoints.hub import NAMES, PACKAGED, resolve
from pellucid.checkpoints.load import open_checkpoint
from pellucid.families.shapes import SHAPES
from pellucid.files import read_json
from pellucid.gguf_file import is_gguf
from pellucid.models import Config
from pellucid.models.census import Census, Flops, as_json, census
from pellucid.models.description import describe_fields
from pellucid.spelling import suggestion


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """A model's config, its parameters by group, and what they cost.

    title   the source as it was given, or the title of a published shape
    tokens  in view, for the KV cache and the FLOPs
    stored  of a GGUF file: type -> how many tensors have it, and their bytes
    """

    title: str
    config: Config
    census: Census
    tokens: int
    stored: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def flops(self) -> Flops:
        """Of one token with `tokens` in view."""
        return self.census.flops(self.tokens)

    def to_json(self) -> dict[str, Any]:
        """The object of ``pellucid info --json``; bytes and counts are whole numbers."""
        about = {"model": self.title, "family": self.config.family}
        fields = describe_fields(self.config)
        found = {**about, "config": fields, **as_json(self.census, self.tokens)}
        if self.stored:
            found["stored"] = {
                kind: {"tensors": count, "bytes": nbytes}
                for kind, (count, nbytes) in self.stored.items()
            }
        return found


def model_report(source: str | Path = "demo", tokens: int | None = None) -> ModelReport:
    """Count the parameters, bytes and FLOPs of a model.

    source  a folder, ``owner/name``, a demo, a config.json or params.json, or a published shape
    tokens  in view; None: the whole context

    Raises ValueError or OSError, in one line, for a source that is none of these and for a number
    of tokens that the model cannot take.
    """
    title, config = find_config(str(source))
    counted = census(config)
    report = ModelReport(
        title=title,
        config=config,
        census=counted,
        tokens=config.context_length if tokens is None else tokens,
        stored=_stored_types(str(source)),
    )
    counted.flops(report.tokens)  # refuses a number of tokens that the model cannot take
    return report


def _stored_types(source: str) -> dict[str, tuple[int, int]]:
    """The types of a GGUF file's tensors; {} for what is none."""
    if source in SHAPES and not Path(source).is_dir():
        return {}
    path = Path(source) if Path(source).is_file() else resolve(source)
    return stored_types(open_checkpoint(path).weights) if is_gguf(path) else {}


def find_config(source: str) -> tuple[str, Config]:
    """Title and config of a model, a bare config file or a published shape; no weight is read.

    ValueError or OSError in one line for what is none of them.
    """
    if source in SHAPES and not Path(source).is_dir():
        return SHAPES[source].title, SHAPES[source].config
    if Path(source).is_file() and not is_gguf(Path(source)):
        return source, read_config_file(Path(source))
    try:
        folder = resolve(source)
    except FileNotFoundError as error:
        if source in PACKAGED:
            raise
        where, mark, folder_like = str(error).partition("; did you mean")
        hint = suggestion(source, [*SHAPES, *NAMES]) or mark + folder_like
        raise FileNotFoundError(f"{where}, or a shape: {', '.join(SHAPES)}{hint}") from None
    stated = folder / "config.json"
    if folder.is_file():
        return source, open_checkpoint(folder).config
    if stated.is_file():
        return source, read_config_file(stated)
    params = folder / "params.json"
    if params.is_file() and not any(folder.glob("consolidated.*.pth")):
        return source, read_config_file(params)  # what a config can say without its weights
    return source, open_checkpoint(source).config  # Meta's: shapes complete the config


def read_config_file(path: Path) -> Config:
    """The config that a config.json or a params.json states; ValueError where it states none."""
    values = read_json(path)
    if "model_type" in values:
        return hf_config.read_config(values, str(path))
    if values.get("vocab_size", -1) < 1:
        raise ValueError(f"{path}: vocab_size is left to the weights; give the folder they lie in")
    return meta.read_params(values, str(path), shards=(), tied=False)
