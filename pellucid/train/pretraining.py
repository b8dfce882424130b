"""A run that trains on raw text: its log and events, samples, evaluations and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid import checkpoints
from pellucid.models import Model
from pellucid.models.census import census
from pellucid.train import run_folder, watch
from pellucid.train.data.batches import Batch, held_out_windows
from pellucid.train.data.recipe_batches import LoaderBatches
from pellucid.train.data.token_source import TokenSource
from pellucid.train.evaluation import bits_per_byte, evaluate
from pellucid.train.events import EventFile
from pellucid.train.loop import Progress
from pellucid.train.loss_plot import draw
from pellucid.train.precision import keep_freed_memory
from pellucid.train.run import EVENTS, LOG, PLOT, SAMPLE_TOKENS, Run, Stop, Weights, is_due
from pellucid.train.settings import CONFIG, TrainSettings, dump
from pellucid.train.step_log import Write
from pellucid.train.utilisation import measured_peak
from pellucid.train.watch_plot import PICTURE, draw_watch


@dataclass(kw_only=True)
class Pretraining(Run):
    """A run that trains on raw text. `summary` says what has come of it."""

    settings: TrainSettings
    tokenizer_folder: Path
    begin_id: int | None  # the token before each document
    training_tokens: int
    held_out_text: TokenSource
    held_out_bytes: int
    bfloat16: bool  # of products, whatever `config` says of autocast
    training_sample_loss: float | None = None
    events: EventFile | None = None

    @property
    def last_step(self) -> int:
        """The step to end after."""
        return self.settings.stop or self.config.schedule.steps

    def settings_text(self) -> str:
        """What ``config.toml`` says."""
        return dump(self.settings, "A training run; pellucid train --config takes this file.")

    def restore(self) -> None:
        """Go on from `state`, which was read from ``RUN/last``.

        Raises ValueError where the text is not what it was, or the state not of such a run.
        """
        extra = self.state.extra
        missing = {"training_tokens", "loss", "held_out_loss"} - extra.keys()
        if missing:
            raise ValueError(
                f"{self.folder / run_folder.LAST} is not of a training run: its state does not say "
                f"{min(missing)}"
            )
        if extra["training_tokens"] != self.training_tokens:
            raise ValueError(
                f"the text has {self.training_tokens:,} tokens now, and had "
                f"{extra['training_tokens']:,}: a run goes on with the text it began with"
            )
        if isinstance(self.batches, LoaderBatches):
            self.batches.restore(extra["batches"])
        self.loss, self.held_out_loss = extra["loss"], extra["held_out_loss"]
        self.saved_step = self.step

    def extra(self) -> dict[str, Any]:
        """What the state is to hold besides its own."""
        found = {
            "training_tokens": self.training_tokens,
            "loss": self.loss,
            "held_out_loss": self.held_out_loss,
        }
        if isinstance(self.batches, LoaderBatches):
            found["batches"] = self.batches.state()
        return found

    def fit(self, stop: Stop) -> None:
        """Train to the end or until `stop`, then evaluate on all validation text and save."""
        settings, first = self.settings, self.crew.first
        if torch.device(settings.device).type == "cpu":
            keep_freed_memory()
        self.listener.opening(self.summary() | self._speed())
        with ExitStack() as stack:
            if settings.tensorboard and first:
                self.events = stack.enter_context(EventFile(self.folder / EVENTS))
            super().fit(stop)
        if self.stopped_early or self.step >= self.last_step:
            self._evaluate_all()
        if self.saved_step != self.step:
            self.save()
        if settings.plot and self.step and first:
            draw(self.folder / LOG, self.folder / PLOT, str(self.folder))
            if settings.trace_every:
                table, picture = self.folder / watch.TABLE, self.folder / PICTURE
                draw_watch(table, picture, str(self.folder))
        self.listener.closing(self.summary())

    def _speed(self) -> dict[str, Any]:
        """FLOPs of a token, the machine's FLOP/s, and where this run stands and ends."""
        facts = {
            "last_step": self.last_step,
            "bfloat16": self.bfloat16,
            "crew": self.crew.about,
            "flops_per_token": 0,
            "peak": 0.0,
            "evaluated_tokens": self._evaluated_tokens(),
            "evaluated_at_once": self._tokens_at_once(),
        }
        if self.listener.shows_speed:
            dtype = torch.bfloat16 if self.bfloat16 else torch.float32
            device = torch.device(self.settings.device)
            facts["peak"] = measured_peak(device, dtype) * self.crew.processes
            config = self.model.config
            facts["flops_per_token"] = census(config).flops(config.context_length).training
        return facts

    def _evaluated_tokens(self) -> tuple[float, int]:
        """Tokens evaluated for each step on the way, and at the end."""
        return self._tokens_at_once() / self.config.eval_every, len(self.held_out_text)

    def _tokens_at_once(self) -> int:
        """Tokens of an evaluation on the way: those of some windows, or all."""
        windows = self.settings.eval_windows or len(self.held_out_text)
        return min(len(self.held_out_text), windows * self.model.config.context_length)

    def log(self) -> AbstractContextManager[Write]:
        """Where the steps are written down: by the first process."""
        return super().log() if self.crew.first else _no_log()

    def watch(self) -> watch.Watch | None:
        """What records chosen tensors; None: no watch is asked for."""
        settings = self.settings
        if not (settings.trace_every and self.crew.first):
            return None
        return watch.Watch(
            self.folder,
            settings.trace_every,
            settings.only or ["*"],
            tensors=settings.trace_tensors,
            done=self.step,
        )

    def held_out(self, model: Model) -> float:
        """Loss on windows of validation text; the book's loop evaluates training text as well."""
        ranks = self.crew.ranks
        if isinstance(self.batches, LoaderBatches):
            sample = self.batches.evaluation_sample(self.step)
            if sample is not None:
                losses = [evaluate(model, _windows_of(batch), ranks=ranks) for batch in sample]
                self.training_sample_loss = sum(losses) / len(losses)
        windows = self._windows(self.settings.eval_windows or None)
        return evaluate(model, windows, bfloat16=self.config.bfloat16, ranks=ranks)

    def _windows(self, limit: int | None) -> Tensor:
        return held_out_windows(self.held_out_text, self.model.config.context_length, limit)

    def between_steps(self, progress: Progress, log: Write) -> None:
        """Log and events; a sample of text where it is due; the best model."""
        log(progress, {})
        self._add_events(progress)
        if self.training_sample_loss is not None and progress.held_out_loss is not None:
            self.listener.say(
                f"step {progress.step}: training text {self.training_sample_loss:.3f}, "
                f"validation text {progress.held_out_loss:.3f}"
            )
        if is_due(progress.step, self.settings.sample_every):
            self.listener.say(f"sample at step {progress.step}:\n{self.sample()}\n")
        if progress.best:
            self.crew.publish(self.folder, run_folder.BEST, self.step, self._write_best)

    def _add_events(self, progress: Progress) -> None:
        if self.events is None:
            return
        scalars = {
            "loss/training": progress.loss,
            "gradient norm": progress.gradient_norm,
            "learning rate": progress.rate,
            "tokens": progress.tokens,
        }
        if progress.held_out_loss is not None:
            scalars["loss/validation"] = progress.held_out_loss
            scalars["bits per byte"] = bits_per_byte(
                progress.held_out_loss, len(self.held_out_text), self.held_out_bytes
            )
        self.events.add(progress.step, scalars)

    def write_last(self, folder: Path) -> None:
        """A checkpoint to go on from."""
        save = self._save_model(torch.float32)
        settings = self.folder / CONFIG
        self.crew.write_checkpoint(folder, self.model, self.state, save, settings)

    def _write_best(self, folder: Path) -> None:
        save = self._save_model(getattr(torch, self.settings.dtype))
        self.crew.write_weights(folder, self.model, save)

    def _save_model(self, dtype: torch.dtype) -> Callable[[Path, Weights], None]:
        def save(folder: Path, weights: Weights) -> None:
            config, tokenizer = self.model.config, self.tokenizer_folder
            checkpoints.save(folder, config, weights, tokenizer_from=tokenizer, dtype=dtype)

        return save

    def sample(self) -> str:
        """The prompt and what the model writes after it, at temperature 0.8."""
        from pellucid.generate import Sampling, stream_text

        prompt = self.settings.prompt
        if prompt is None:
            prompt = self._first_words()
        begin = [] if self.begin_id is None else [self.begin_id]
        ids = [*begin, *self.tokenizer.encode(prompt)]
        self.model.eval()
        with torch.compiler.set_stance("force_eager"):
            stream = stream_text(
                self.model,
                self.tokenizer,
                [ids],
                sampling=Sampling(temperature=0.8),
                max_new_tokens=min(SAMPLE_TOKENS, self.model.config.context_length - len(ids)),
                seed=self.settings.seed,
            )
            text = prompt + stream.complete()[0].text
        self.model.train()
        return text

    def _first_words(self) -> str:
        """Up to three of the first words of the validation text; it may begin within a word."""
        count = min(24, len(self.held_out_text), self.model.config.context_length // 2)
        ids = [each for each in self.held_out_text.read(0, count).tolist() if each != self.begin_id]
        words = self.tokenizer.decode(ids).split()
        return " ".join(words[1:4] if len(words) > 4 else words[:1])

    def _evaluate_all(self) -> None:
        """Loss over all validation text, in float32."""
        windows = self._windows(None)
        with torch.compiler.set_stance("force_eager"):
            self.held_out_loss = evaluate(self.model, windows, ranks=self.crew.ranks)

    def summary(self) -> dict[str, Any]:
        """What came of it; losses in nats per token."""
        config, state, loss = self.model.config, self.state, self.held_out_loss
        tokens, text_bytes = len(self.held_out_text), self.held_out_bytes
        best = run_folder.step_of(self.folder / run_folder.BEST)
        return {
            "out": str(self.folder),
            "model": str(self.folder / (run_folder.LAST if best is None else run_folder.BEST)),
            "family": config.family,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "vocab_size": config.vocab_size,
            "context_length": config.context_length,
            "training_tokens": self.training_tokens,
            "held_out_tokens": tokens,
            "held_out_bytes": text_bytes,
            "steps": self.step,
            "interrupted": self.interrupted,
            "stopped_early": self.stopped_early,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "tokens_per_second": state.tokens / state.seconds if state.seconds else 0.0,
            "loss": self.loss,
            "held_out_loss": loss,
            "bits_per_byte": loss and bits_per_byte(loss, tokens, text_bytes),
            "best_step": best,
            "best_loss": None if best is None else state.best_loss,
        }


def _windows_of(batch: Batch) -> torch.Tensor:
    """Inputs and the last target: windows (B, T + 1)."""
    return torch.cat((batch.inputs, batch.targets[:, -1:]), dim=1)


@contextmanager
def _no_log() -> Iterator[Write]:
    yield lambda progress, values: None
