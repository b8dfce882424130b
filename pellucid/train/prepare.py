"""What a training run needs before its first step: text, tokenizer, model, batches, settings."""

from __future__ import annotations

import math
import shutil
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pellucid import checkpoints, tokenizers
from pellucid.checkpoints.save import copy_tokenizer
from pellucid.models import Config, GPTConfig, LlamaConfig, Model, RopeConfig, build
from pellucid.tokenizers import Tokenizer
from pellucid.train import run_folder, watch
from pellucid.train.config import TrainConfig, check_rows
from pellucid.train.data.batches import Batches
from pellucid.train.data.documents import (
    Document,
    TextFormat,
    begin_and_end,
    beginnings,
    hold_out,
    note_spelt_specials,
    read_documents,
    token_stream,
)
from pellucid.train.data.mixture import shipped_text
from pellucid.train.data.recipe_batches import LoaderBatches, RandomBatches
from pellucid.train.data.shards import tokenise
from pellucid.train.data.spans import training_texts
from pellucid.train.data.token_source import TokenSource, TokenTensor
from pellucid.train.initial_weights import freeze_biases, new_model
from pellucid.train.listener import Listener
from pellucid.train.loop import Data
from pellucid.train.new_vocabulary import with_vocabulary
from pellucid.train.objective import next_token_objective, plain_next_token_objective
from pellucid.train.optim import Schedule
from pellucid.train.parallel import ranks_launched
from pellucid.train.parallel.recompute import recompute_blocks
from pellucid.train.precision import has_bfloat16
from pellucid.train.pretraining import Pretraining
from pellucid.train.run import EVENTS, LOG, PLOT
from pellucid.train.settings import CONFIG, TrainSettings
from pellucid.train.state import TrainState
from pellucid.train.watch import check_only
from pellucid.train.watch_plot import PICTURE

TOKENS = "tokens"  # the folder of tokenised text in a run's folder
OURS = (CONFIG, LOG, PLOT, EVENTS, run_folder.CHECKPOINTS, run_folder.LAST, run_folder.BEST)
OURS += (watch.TABLE, watch.FOLDER, PICTURE)


class Text(NamedTuple):
    """Tokens to train on, tokens held out, and how many bytes of text the latter are."""

    training: TokenSource
    held_out: TokenSource
    held_out_bytes: int


def prepare(settings: TrainSettings, out: Path, folder: Path, listener: Listener) -> Pretraining:
    """A run at step 0. A tokenizer that is learnt or copied goes to `folder`."""
    check(settings)  # first what is quick to complain about
    tokenizer = tokenizer_for(settings, folder)
    if settings.init is not None:
        checkpoint = checkpoints.open_checkpoint(settings.init)
        config, weights = checkpoint.config, dict(checkpoint.weights)
        if settings.new_vocab:
            spelt = tokenizers.load(checkpoint.folder)
            config, weights = with_vocabulary(config, weights, spelt, tokenizer)
        model = build(config, "meta")
        model.load_state_dict(weights)  # in float32, and apart from its file
    else:
        config = model_config(settings, tokenizer.vocab_size)
        model = new_model(config, settings.seed, settings.start, settings.bias)
    if settings.init is not None or settings.start != "torch":
        torch.manual_seed(settings.seed)  # for dropout; "torch" goes on from the weights' numbers
    return _run(settings, out, model, tokenizer, folder, listener)


def go_on(settings: TrainSettings, out: Path, folder: Path, listener: Listener) -> Pretraining:
    """A run as it was when ``RUN/last`` was saved."""
    with run_folder.reading_last(out) as last:
        checkpoint = checkpoints.open_checkpoint(last)
        model = build(checkpoint.config, "meta")
        model.load_state_dict(dict(checkpoint.weights))
    if not settings.bias:
        freeze_biases(model)
    copy_tokenizer(last, folder)  # the checkpoint goes when the next one is saved
    run = _run(settings, out, model, tokenizers.load(folder), folder, listener)
    if not ranks_launched():  # they take their parts of the state once the model is spread
        with run_folder.reading_last(out):
            run.state = TrainState.load(last, model, run.config)
        run.restore()
    return run


def clear(out: Path, *names: str) -> None:
    """Remove what an earlier run left in its folder, or these of it, and nothing else."""
    for name in names or OURS:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def make_room(settings: TrainSettings, out: Path, overwrite: bool) -> None:
    """Refuse a folder with something in it that is not to be replaced: FileExistsError."""
    if {path.name for path in out.iterdir()} - {TOKENS} and not overwrite:
        raise FileExistsError(
            f"--out {out} is not empty: give a new folder, --resume to go on, or --overwrite"
        )
    if overwrite and settings.tokens is None:
        clear(out, TOKENS)  # of an earlier run with another tokenizer


def check(settings: TrainSettings) -> None:
    """ValueError for settings that no text and no model can make right."""
    least = (settings.warmup or 0) + settings.hold + 1
    steps = settings.steps or max(least, settings.epochs or 1)
    train_config(settings, steps)
    if settings.stop is not None and settings.steps and not 1 <= settings.stop <= settings.steps:
        raise ValueError(f"--stop {settings.stop} is not one of the {settings.steps} steps")
    if settings.epochs is not None and settings.epochs < 1:
        raise ValueError(f"{settings.epochs} epochs: expected 1 or more")
    if settings.init is None and settings.tokenizer is None:
        model_config(settings, max(settings.vocab, 1))
    _check_watch(settings)


def _check_watch(settings: TrainSettings) -> None:
    if settings.trace_every < 0:
        raise ValueError(f"--trace-every {settings.trace_every}: expected 0 or more")
    if (settings.only or settings.trace_tensors) and not settings.trace_every:
        raise ValueError("--only and --trace-tensors say what to watch: add --trace-every N")
    if settings.trace_every and settings.recompute:
        raise ValueError(
            "--trace-every cannot watch blocks that run twice: leave out --recompute, or it"
        )


def _run(
    settings: TrainSettings,
    out: Path,
    model: Model,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    listener: Listener,
) -> Pretraining:
    check_rows(settings.batch)
    text = read_text(settings, tokenizer, out, listener)
    batches, per_epoch = _batches(settings, text.training, model.config.context_length)
    steps = settings.steps or (settings.epochs or 0) * per_epoch
    _check_prompt(settings, tokenizer, model.config.context_length)
    if settings.trace_every:
        check_only(model, settings.only or ["*"], logits=settings.loss == "plain")
    if not ranks_launched():  # they place and prepare it when it is spread over them
        model.to(settings.device)
        if settings.recompute:
            recompute_blocks(model)
    config = train_config(settings, steps)
    plain = settings.loss == "plain"
    return Pretraining(
        settings=settings,
        folder=out,
        model=model,
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        begin_id=around_texts(settings, tokenizer)[0],
        batches=batches,
        objective=plain_next_token_objective if plain else next_token_objective,
        training_tokens=len(text.training),
        held_out_text=text.held_out,
        held_out_bytes=text.held_out_bytes,
        config=config,
        state=TrainState.begin(model, config),
        listener=listener,
        save_every=settings.save_every,
        bfloat16=config.bfloat16,
    )


def _check_prompt(settings: TrainSettings, tokenizer: Tokenizer, context: int) -> None:
    """A prompt that cannot be sampled from shows now, not in the middle of the run."""
    length = len(tokenizer.encode(settings.prompt or "")) if settings.sample_every else 0
    if length + 1 >= context:
        raise ValueError(f"the prompt has {length} tokens, and {context} are in view: shorten it")


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────


def read_text(settings: TrainSettings, tokenizer: Tokenizer, out: Path, listener: Listener) -> Text:
    """The text as tokens: mapped from files, or in memory where it is small or has no begin."""
    begin, end = around_texts(settings, tokenizer)
    if settings.data and begin is not None:
        note_spelt_specials(beginnings(settings.data), tokenizer, settings.separator)
        with listener.tokenising() as report:
            corpus = tokenise(
                settings.data,
                tokenizer,
                Path(settings.tokens or out / TOKENS),
                begin=begin,
                end=end,
                layout=_layout(settings),
                hold_out=settings.hold_out,
                report=report,
            )
        return Text(corpus.training, corpus.held_out, corpus.held_out.text_bytes)
    training, held_out = _split_text(settings)
    return Text(
        TokenTensor(_stream(training, tokenizer, begin, end), begin),
        TokenTensor(_stream(held_out, tokenizer, begin, end), begin),
        sum(len(document.text.encode()) for document in held_out),
    )


def _stream(
    documents: list[Document], tokenizer: Tokenizer, begin: int | None, end: int | None
) -> Tensor:
    if begin is not None:
        return token_stream(documents, tokenizer.encode, begin, end)
    return torch.cat([torch.tensor(tokenizer.encode(document.text)) for document in documents])


def _layout(settings: TrainSettings) -> TextFormat:
    return TextFormat(text_key=settings.text_key, separator=settings.separator)


def _split_text(settings: TrainSettings) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents."""
    if not settings.data:
        return shipped_text(settings.world or 0.0, settings.hold_out)
    return hold_out(_documents(settings), settings.hold_out)


def _documents(settings: TrainSettings) -> list[Document]:
    if not settings.data:
        return [*chain(*_split_text(settings))]
    documents = read_documents(settings.data or [], _layout(settings))
    if not documents:
        given = " ".join(settings.data or [])
        raise ValueError(f"no text to train on in {given}: expected files with text in them")
    return documents


def tokenizer_for(settings: TrainSettings, folder: Path) -> Tokenizer:
    """The tokenizer of ``--init``, one that is given, or one learnt from the text.

    Its files go to `folder`.
    """
    if settings.init is not None and not settings.new_vocab:
        copy_tokenizer(checkpoints.open_checkpoint(settings.init).folder, folder)
        return tokenizers.load(folder)
    if settings.tokenizer is not None and settings.tokenizer != "characters":
        given = Path(settings.tokenizer)
        tokenizer = tokenizers.load(given)
        copy_tokenizer(given if given.is_dir() else given.parent, folder)
        return tokenizer
    if settings.tokenizer == "characters":  # also those that only held-out text has
        texts = (document.text for document in _documents(settings))
        return tokenizers.train_characters(texts, folder)
    if settings.data:
        texts = training_texts(settings.data, _layout(settings), settings.hold_out)
    else:
        texts = (document.text for document in _split_text(settings)[0])
    return tokenizers.train_bpe(texts, settings.vocab, folder)


def around_texts(settings: TrainSettings, tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """The tokens before and behind each document; none with ``--no-begin``."""
    if not settings.begin:
        return None, None
    try:
        return begin_and_end(tokenizer)
    except ValueError as error:
        raise ValueError(f"{error}: give another, or --no-begin") from None


def _batches(settings: TrainSettings, source: TokenSource, context: int) -> tuple[Data, int]:
    """Batches in the order that is asked for, and how many of them go once over the text."""
    batch = settings.batch
    if settings.order != "seeded" and (settings.copies or settings.documents == "masked"):
        raise ValueError("copies and masked documents need order seeded")
    if settings.order == "dataloader":
        loader = LoaderBatches(
            source,
            context=context,
            batch=batch,
            eval_every=settings.eval_every,
            eval_batches=max(1, settings.eval_windows // batch),
        )
        return loader, loader.steps_per_epoch
    per_epoch = math.ceil(len(source) // context / batch)
    if settings.order == "random":
        return RandomBatches(source, context=context, batch=batch, seed=settings.seed), per_epoch
    batches = Batches(
        source,
        context=context,
        batch=batch,
        seed=settings.seed,
        copies=settings.copies,
        documents=settings.documents == "masked",
    )
    return batches, per_epoch


# ── Model and training ───────────────────────────────────────────────────────────────────────────


def model_config(settings: TrainSettings, vocab_size: int) -> Config:
    """The shape of a model that begins from random weights."""
    return _NEW[settings.family](settings, vocab_size)


def _new_gpt2(settings: TrainSettings, vocab_size: int) -> Config:
    if settings.kv_heads not in (None, settings.heads):
        raise ValueError("--kv-heads is for llama: in GPT-2 every head has its own keys")
    return GPTConfig(
        vocab_size=vocab_size,
        context_length=settings.context,
        width=settings.width,
        n_layers=settings.layers,
        n_heads=settings.heads,
        hidden_width=settings.hidden or 0,
        qkv_bias=settings.qkv_bias,
        tied=settings.tied,
        embed_dropout=settings.dropout,
        attn_dropout=settings.dropout,
        resid_dropout=settings.dropout,
    )


def _new_llama(settings: TrainSettings, vocab_size: int) -> Config:
    width, heads = settings.width, settings.heads
    if settings.dropout:
        raise ValueError(f"--dropout {settings.dropout:g} is for gpt2: a Llama has none")
    if heads < 1 or width % heads:
        raise ValueError(f"--width {width} does not divide into --heads {heads}")
    return LlamaConfig(
        vocab_size=vocab_size,
        context_length=settings.context,
        width=width,
        n_layers=settings.layers,
        n_heads=heads,
        n_kv_heads=settings.kv_heads or heads,
        head_dim=width // heads,
        hidden_width=settings.hidden or _rounded(width * 8 / 3),
        rope=RopeConfig(theta=10000.0),
        tied=settings.tied,
    )


_NEW = {"gpt2": _new_gpt2, "llama": _new_llama}  # the setting `family` -> its config


def _rounded(width: float, multiple: int = 32) -> int:
    """`width` up to a multiple: three matrices of 8/3 are as many weights as GPT-2's two of 4."""
    return -int(-width // multiple) * multiple


def train_config(settings: TrainSettings, steps: int) -> TrainConfig:
    """How to train, checked."""
    peak = settings.lr
    return TrainConfig(
        schedule=Schedule(
            peak=peak,
            final=peak / 20 if settings.min_lr is None else settings.min_lr,
            warmup=min(80, steps // 4) if settings.warmup is None else settings.warmup,
            hold=settings.hold,
            steps=steps,
            shape=settings.schedule,
        ),
        batch=settings.batch,
        micro_batch=settings.micro_batch or settings.batch,
        weight_decay=settings.weight_decay,
        decay_all=settings.decay_all,
        betas=(settings.beta1, settings.beta2),
        fused=settings.fused,
        clip=settings.clip,
        bfloat16=bfloat16(settings.precision, torch.device(settings.device)),
        compile=settings.compile,
        eval_every=settings.eval_every,
        eval_first=settings.eval_first,
        patience=settings.patience,
    )


def bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to multiply matrices in bfloat16; "auto" asks the processor for instructions."""
    return has_bfloat16(device) if precision == "auto" else precision == "bfloat16"
