"""What a fine-tuning run needs before its first step: model, examples, what is trained and how."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pellucid import checkpoints, tokenizers
from pellucid.checkpoints import Checkpoint, parameter_shapes
from pellucid.checkpoints.formats.hf import table
from pellucid.checkpoints.formats.peft import apply_adapter, module_names, use_template
from pellucid.checkpoints.formats.quantised import QuantisedWeights
from pellucid.devices import free_memory
from pellucid.models import Model
from pellucid.models import adapters as lora
from pellucid.models.adapters import LoraConfig
from pellucid.tokenizers import Tokenizer
from pellucid.train.config import TrainConfig, check_rows
from pellucid.train.data import documents
from pellucid.train.data.documents import Document
from pellucid.train.finetune import classify, freeze, tasks
from pellucid.train.finetune.preferences import DPO
from pellucid.train.finetune.records import kind_of, read_records, text_of
from pellucid.train.finetune.run import Finetuning
from pellucid.train.finetune.settings import FinetuneSettings
from pellucid.train.finetune.tasks import Task, TaskOptions
from pellucid.train.listener import Listener
from pellucid.train.optim import Schedule
from pellucid.train.precision import has_bfloat16
from pellucid.train.prepare import bfloat16
from pellucid.train.state import TrainState

RECORD_SUFFIXES = (".json", ".jsonl", ".csv")
MOST_CONTEXT = 1024  # tokens of a row, unless --context says more: memory grows with them


def prepare(
    settings: FinetuneSettings, out: Path, listener: Listener, *, resume: bool = False
) -> Finetuning:
    """A run at step 0: the model with its adapters or head, and the data as its task.

    resume  whether its settings are those of a run that began: what they leave open stays as it was
    """
    check_rows(settings.batch)
    settings = replace(settings, kind=kind_of_data(settings))
    checkpoint = checkpoints.open_checkpoint(settings.model)
    if isinstance(checkpoint.weights, QuantisedWeights):
        raise ValueError(f"{settings.model} is quantised: fine-tune the model it was made from")
    tokenizer = tokenizers.load(checkpoint.folder)
    whole = settings.lora is None and settings.adapter is None
    if settings.dtype is None and not whole and not resume and _better_wide(settings, checkpoint):
        settings = replace(settings, dtype="float32")
    dtype = getattr(torch, settings.dtype) if settings.dtype else checkpoint.dtype
    model = checkpoints.load_model(
        checkpoint, dtype=torch.float32 if whole else dtype, device=settings.device
    )
    if settings.adapter is not None:
        settings = _continue(settings, settings.adapter, model, tokenizer)
    options = TaskOptions(
        context=settings.context or min(model.config.context_length, MOST_CONTEXT),
        batch=settings.batch,
        seed=settings.seed,
        packed=settings.pack,
        bfloat16=bfloat16(settings.precision, torch.device(settings.device)),
    )
    if options.context > model.config.context_length:
        raise ValueError(
            f"--context {options.context}: the model has {model.config.context_length} positions"
        )
    task = make_task(settings, model, tokenizer, options)
    _choose_trained(settings, model)
    config = _train_config(settings, task, options)
    torch.manual_seed(settings.seed)  # for dropout
    return Finetuning(
        settings=settings,
        folder=out,
        checkpoint=checkpoint,
        model=model,
        tokenizer=tokenizer,
        task=task,
        batches=task.batches,
        objective=task.objective,
        config=config,
        state=TrainState.begin(model, config),
        listener=listener,
        save_every=settings.save_every,
    )


def _better_wide(settings: FinetuneSettings, checkpoint: Checkpoint) -> bool:
    """Whether weights of 16 bits are quicker held in float32, and there is room for them.

    A processor without instructions for bfloat16 took eight times as long over a LoRA step in it.
    """
    device = torch.device(settings.device)
    if device.type != "cpu" or has_bfloat16(device) or checkpoint.dtype == torch.float32:
        return False
    sizes = parameter_shapes(checkpoint.config).values()
    return 4 * sum(math.prod(shape) for shape in sizes) < free_memory(device) // 4


def _continue(
    settings: FinetuneSettings, folder: str, model: Model, tokenizer: Tokenizer
) -> FinetuneSettings:
    """Put in the adapters in `folder`, before examples are read; the settings with their rank.

    They are part of what preferences are measured against. ValueError for another rank or alpha
    than theirs.
    """
    made = apply_adapter(model, folder, module_names(table(model.config))).values()
    use_template(tokenizer, folder)
    for flag, given, there in (
        ("--lora", settings.lora, {adapter.rank for adapter in made}),
        ("--alpha", settings.alpha, {adapter.alpha for adapter in made}),
    ):
        if given is not None and not any(math.isclose(given, one) for one in there):
            found = ", ".join(f"{one:g}" for one in sorted(there))
            raise ValueError(f"{flag} {given:g}: the adapter in {folder} has {found}; leave it out")
    if settings.lora_dropout is not None:
        LoraConfig(dropout=settings.lora_dropout)  # refuses what is no share
        for adapter in made:
            adapter.dropout.p = settings.lora_dropout
    return replace(settings, lora=max(adapter.rank for adapter in made))


def _choose_trained(settings: FinetuneSettings, model: Model) -> None:
    if settings.adapter is not None:
        pass  # `_continue` has chosen
    elif settings.lora is not None:
        rank = settings.lora
        config = LoraConfig(
            rank=rank,
            alpha=2.0 * rank if settings.alpha is None else settings.alpha,
            dropout=settings.lora_dropout or 0.0,
            targets=tuple(settings.targets or ("all",)),
        )
        lora.inject(model, config, settings.seed)
    elif settings.last_blocks is not None:
        freeze.train_last_blocks(model, settings.last_blocks)
    if settings.kind == "classification":
        classify.head_of(model).requires_grad_(True)
    if not freeze.trainable(model)[0]:
        raise ValueError("--last-blocks 0 leaves nothing to train: only a classifier has a head")


def _train_config(settings: FinetuneSettings, task: Task, options: TaskOptions) -> TrainConfig:
    steps = settings.steps
    if steps is None:
        if not settings.epochs > 0:
            raise ValueError(f"--epochs {settings.epochs:g}: expected a number above 0")
        steps = max(1, round(settings.epochs * task.steps_per_epoch))
    peak = settings.lr if settings.lr is not None else default_rate(settings)
    warmup = round(0.03 * steps) if settings.warmup is None else settings.warmup
    return TrainConfig(
        schedule=Schedule(peak=peak, final=peak / 10, warmup=warmup, steps=steps),
        batch=settings.batch,
        micro_batch=settings.micro_batch or settings.batch,
        weight_decay=settings.weight_decay,
        betas=(0.9, 0.999),
        clip=settings.clip,
        bfloat16=options.bfloat16,
        eval_every=settings.eval_every or max(1, steps // 10),
        patience=settings.patience,
    )


def default_rate(settings: FinetuneSettings) -> float:
    """A learning rate for models of some billion parameters; small ones take ten times as much."""
    rate = 2e-4 if settings.lora else 1e-3 if settings.last_blocks == 0 else 2e-5
    return rate / 10 if settings.kind == "preferences" else rate


def kind_of_data(settings: FinetuneSettings) -> Any:
    """What ``--as`` says, or the keys of the first example, or plain text."""
    if settings.kind:
        return settings.kind
    first = Path((settings.data or [""])[0])
    if first.suffix not in RECORD_SUFFIXES or first.is_dir():
        return "text"
    try:
        return kind_of(read_records(first)[0])
    except ValueError as error:
        raise ValueError(f"{error}; or say with --as what {first} is") from None


def make_task(
    settings: FinetuneSettings, model: Model, tokenizer: Tokenizer, options: TaskOptions
) -> Task:
    """Read and split the data, and give the model its head if it is to have one."""
    kind = settings.kind
    if kind == "text":
        return tasks.text_task(*_documents(settings, tokenizer), tokenizer, options)
    examples, judged = _records(settings)
    if kind == "instructions":
        return tasks.instruction_task(examples, judged, tokenizer, options)
    if kind == "preferences":
        dpo = DPO(beta=settings.beta, smoothing=settings.label_smoothing)
        return tasks.preference_task(examples, judged, tokenizer, options, dpo, model)
    labels = classify.balance(examples)
    if settings.adapter is not None and (Path(settings.adapter) / classify.LABELS).is_file():
        known = classify.load_head(settings.adapter, model)
        if known != list(labels):
            raise ValueError(
                f"the adapter in {settings.adapter} tells {', '.join(known)} apart, the examples "
                f"{', '.join(labels)}"
            )
    else:
        classify.add_head(model, len(labels), settings.seed)
    apart = replace(options, packed=False)  # texts of a kind have a length of a kind
    return tasks.classification_task(examples, judged, labels, tokenizer, apart)


def _documents(
    settings: FinetuneSettings, tokenizer: Tokenizer
) -> tuple[list[Document], list[Document]]:
    data = settings.data or []
    layout = documents.TextFormat(separator=settings.separator)
    read = list(_texts(data, layout))
    texts = (document.text for document in read)
    documents.note_spelt_specials(texts, tokenizer, settings.separator)
    if not read:
        raise ValueError(f"no text to learn from in {' '.join(data)}")
    if settings.eval_data:
        return read, list(_texts(settings.eval_data, layout))
    return tasks.split_texts(read, settings.hold_out, settings.seed)


def _texts(paths: Sequence[str], layout: documents.TextFormat) -> Iterator[Document]:
    """The documents of files and folders; in JSON and CSV a text is an example's, not the file."""
    for path in map(Path, paths):
        if path.suffix not in (".json", ".csv") or path.is_dir():
            yield from documents.stream_documents([path], layout)
            continue
        for record in read_records(path):
            text = text_of(record, "text", record.where)
            if text.strip():
                yield Document(record.where, text)


def _records(settings: FinetuneSettings) -> tuple[list[Any], list[Any]]:
    read = [record for path in settings.data or [] for record in read_records(path)]
    if settings.eval_data:
        return read, [record for path in settings.eval_data for record in read_records(path)]
    return tasks.split(read, settings.hold_out, settings.seed)
