"""Settings from TOML, presets and flags; what is wrong with them in one line."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

import pytest

from pellucid.cli.flags import given
from pellucid.cli.train import train_arguments
from pellucid.train import TrainSettings, settings
from pellucid.train.fields import rows
from pellucid.train.finetune.settings import FinetuneSettings


def resolve(*flags: str) -> TrainSettings:
    parser = argparse.ArgumentParser()
    train_arguments(parser)
    found = parser.parse_args(["--out", "run", *flags])
    chosen = given(found, TrainSettings)
    return settings.resolve(chosen, recipe=found.preset, config=found.config)


@pytest.mark.parametrize("name", settings.presets())
def test_a_preset_resolves_and_what_is_written_reads_as_the_same(name: str, tmp_path: Path):
    first = resolve("--preset", name, "--data", "story.txt", "--tokenizer", "characters")
    path = tmp_path / "config.toml"
    path.write_text(settings.dump(first, "a title"), encoding="utf-8")
    assert set(tomllib.loads(path.read_text())) == {"text", "model", "training", "output"}
    assert resolve("--config", str(path)) == first
    assert first.data is not None
    assert Path(first.data[0]).is_absolute()


def test_the_later_one_wins(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('[training]\nlr = 1\nsteps = 7\n[text]\ndata = "a"\n', encoding="utf-8")
    found = resolve("--preset", "shakespeare-char-cpu", "--config", str(path), "--steps", "9")
    assert (found.beta2, found.lr, found.steps) == (0.99, 1.0, 9)
    assert found.batch == 12
    assert resolve("--stdlib").steps == settings.DEFAULT_STEPS
    assert resolve("--stdlib", "--no-tied").tied is False


def test_recipes_are_those_of_their_authors():
    book = resolve("--preset", "book-gpt2", "--data", "a", "--tokenizer", "gpt2")
    assert (book.width, book.layers, book.heads, book.context) == (768, 12, 12, 256)
    assert (book.epochs, book.steps, book.batch, book.lr, book.seed) == (10, None, 2, 4e-4, 123)
    assert (book.weight_decay, book.dropout, book.schedule) == (0.1, 0.1, "constant")
    gpu = resolve("--preset", "shakespeare-char-gpu", "--data", "a")
    assert (gpu.width, gpu.layers, gpu.heads, gpu.context) == (384, 6, 6, 256)
    assert (gpu.batch, gpu.steps, gpu.dropout, gpu.min_lr) == (64, 5000, 0.2, 1e-4)


def test_a_recipe_of_a_tokenizer_insists_on_it():
    with pytest.raises(ValueError, match=r"GPT-2's tokenizer of 50,257 tokens.*--tokenizer"):
        resolve("--preset", "book-gpt2", "--data", "a")
    assert resolve("--preset", "book-gpt2", "--tokens", "a", "--stdlib").tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nbatchs = 1", "no setting 'batchs'; did you mean 'batch'?"),
        ("[training]\nlearning_rate = 1", "did you mean 'lr'?"),
        ("[trainin]\nlr = 1", "no section [trainin]; did you mean 'training'?"),
        ("[text]\nlr = 1", "lr belongs into [training], not [text]"),
        ("[training]\nlr = '1'", "lr = '1': expected a number"),
        ("[training]\nlr = nan", "lr = nan: expected a number"),
        ("[training]\nsteps = 1.5", "steps = 1.5: expected a whole number"),
        (f"[training]\nsteps = {1 << 63}", "expected a whole number below 2^63"),
        ("[training]\nsteps = true", "steps = True: expected a whole number"),
        ("[text]\nstdlib = 1", "stdlib = 1: expected true or false"),
        ("[text]\ndata = [1]", "expected a text or a list of texts"),
        ("[training]\nschedule = 'cosin'", "expected one of cosine, linear, constant"),
        ("lr = 1", "no section [lr]"),
        ("[training", "mine.toml is not TOML"),
    ],
)
def test_a_wrong_file_is_one_line(text: str, message: str):
    with pytest.raises(ValueError) as raised:
        settings.parse(text, "mine.toml")
    assert message in str(raised.value)
    assert "mine.toml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_setting_has_a_flag_of_its_own_and_a_sentence():
    for kind in (TrainSettings, FinetuneSettings):
        flags = [row.flag for row in rows(kind) if row.flag]
        assert len(set(flags)) == len(flags)
        for row in rows(kind):
            assert row.help, row.name
            assert row.checked(row.default, "default") == row.default
