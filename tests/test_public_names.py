"""What a notebook completes and shows of the public names: real signatures, nothing else."""

from __future__ import annotations

import inspect
import pydoc

import pytest

import pellucid
from pellucid.train.finetune.settings import FinetuneSettings
from pellucid.train.settings import TrainSettings


@pytest.mark.parametrize("name", sorted({*pellucid.__all__} - {"record"}))
def test_a_public_name_has_a_real_signature(name: str):
    named = inspect.signature(getattr(pellucid, name)).parameters
    assert all(each.kind is not each.VAR_KEYWORD for each in named.values()), name


def test_methods_of_a_model_have_real_signatures():
    methods = inspect.getmembers(pellucid.LanguageModel, inspect.isfunction)
    public = {name: method for name, method in methods if not name.startswith("_")}
    assert {"trace", "generate", "stream", "decode", "to", "loss", "walk"} <= set(public)
    for name, method in public.items():
        kinds = {each.kind for each in inspect.signature(method).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, name


def test_calls_that_are_modules_too_state_their_parameters():
    assert list(inspect.signature(pellucid.diff).parameters)[:3] == ["a", "b", "prompt"]
    assert list(inspect.signature(pellucid.assert_same_model).parameters)[:2] == ["a", "b"]
    train = inspect.signature(pellucid.train).parameters
    assert {"out", "preset", "resume", *TrainSettings.__dataclass_fields__} <= set(train)
    assert train["lr"].default == 0.003
    finetune = inspect.signature(pellucid.finetune).parameters
    assert {"model", "out", *FinetuneSettings.__dataclass_fields__} == set(finetune) - {
        "resume", "overwrite", "on_progress",
    }  # fmt: skip


@pytest.mark.parametrize("name", pellucid.__all__)
def test_a_signature_shows_no_function_at_an_address(name: str):
    assert " at 0x" not in str(inspect.signature(getattr(pellucid, name)))


def test_help_of_a_module_that_is_a_call_begins_with_the_call():
    for call, parameter in ((pellucid.train, "lr: float = 0.003,"), (pellucid.diff, "steps: int")):
        page = pydoc.render_doc(call, renderer=pydoc.plaintext)
        head = page.split("PACKAGE CONTENTS")[0]
        assert f"{call.__name__}(" in head and parameter in head
        assert "Raises ValueError" in head or "ValueError where" in head


def test_a_report_shows_itself_in_a_line():
    lm = pellucid.load("demo")
    report = pellucid.diff(lm, lm, "import os")
    assert repr(report) == "Report(demo and demo: identical)"
    assert len(repr(pellucid.logit_lens(lm, "import os"))) < 100


def test_completion_shows_the_calls_and_no_helper():
    found = [name for name in dir(pellucid) if not name.startswith("__")]
    assert set(pellucid.__all__) <= set(found)
    assert not {"Any", "import_module", "annotations", "_LAZY", "TYPE_CHECKING"} & set(found)
