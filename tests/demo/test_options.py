"""A bad option is found before any rank is started, and told in one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import shardscale
from shardscale import cli
from shardscale.demo.model import DigitsNet
from shardscale.demo.options import (
    MAX_RANKS,
    Injection,
    JobOptions,
    OptionError,
    check_json,
    check_options,
)

GOOD = {
    "ranks": 4,
    "wrap": None,
    "optimizer": None,
    "scaler": None,
    "steps": 100,
    "inject": None,
}


def test_the_default_overflows_rank_one_half_way():
    assert check_options(**GOOD) == JobOptions(
        ranks=4,
        wrap="fsdp2",
        optimizer="adamw",
        scaler="shardscale",
        steps=100,
        inject=Injection(rank=1, step=50, param=None),
    )


def test_the_default_overflow_exists_in_the_smallest_job():
    assert check_options(**GOOD | {"ranks": 1, "steps": 1}).inject == (0, 1, None)


@pytest.mark.parametrize(
    ("text", "inject"),
    [
        ("none", None),
        ("0:1", (0, 1, None)),
        ("3:100", (3, 100, None)),
        ("2:7:head.bias", (2, 7, "head.bias")),
    ],
)
def test_an_overflow_is_put_where_it_is_asked_for(text: str, inject: object):
    assert check_options(**GOOD | {"inject": text}).inject == inject


@pytest.mark.parametrize(
    ("option", "value", "found", "allowed"),
    [
        ("ranks", 0, "--ranks is 0", "between 1 and 16"),
        ("ranks", 17, "--ranks is 17", "between 1 and 16"),
        ("steps", 0, "--steps is 0", "at least 1"),
        ("wrap", "zero", "--wrap is 'zero'", "ddp, fsdp1, fsdp2"),
        ("wrap", "", "--wrap is ''", "ddp, fsdp1, fsdp2"),
        ("optimizer", "lion", "--optimizer is 'lion'", "adamw, adamw-foreach, adamw-loop, adam"),
        ("scaler", "apex", "--scaler is 'apex'", "shardscale, torch"),
        ("inject", "9:3", "names rank 9", "0 to 3"),
        ("inject", "1:999", "names step 999", "1 to 100"),
        ("inject", "1:0", "names step 0", "1 to 100"),
        ("inject", "1:3:w9", "the parameter 'w9'", "first.weight, first.bias, second.weight"),
        ("inject", "1", "--inject is '1'", "RANK:STEP"),
        ("inject", "1:3:", "--inject is '1:3:'", "RANK:STEP"),
        ("inject", "-1:3", "--inject is '-1:3'", "RANK:STEP"),
        ("inject", "", "--inject is ''", "RANK:STEP"),
    ],
)
def test_an_error_says_what_was_found_and_what_is_allowed(
    option: str, value: object, found: str, allowed: str
):
    with pytest.raises(OptionError) as error:
        check_options(**GOOD | {option: value})
    assert found in str(error.value)
    assert allowed in str(error.value)


def test_a_record_that_could_not_be_written_is_refused(tmp_path: Path):
    with pytest.raises(OptionError, match="does not exist"):
        check_json(tmp_path / "missing" / "out.json")
    with pytest.raises(OptionError, match="is a folder"):
        check_json(tmp_path)


def test_a_record_that_can_be_written_is_accepted(tmp_path: Path):
    check_json(None)
    check_json(tmp_path / "out.json")
    assert list(tmp_path.iterdir()) == []


def test_every_rank_of_the_largest_job_owns_a_piece_of_the_first_layer():
    """The shards are the witnesses of the demo: a rank without any could testify to nothing.

    FSDP2 gives each rank ceil(rows / ranks) rows as long as there are any.
    """
    rows = DigitsNet().first.weight.shape[0]
    for ranks in range(1, MAX_RANKS + 1):
        per_rank = -(-rows // ranks)
        assert per_rank * (ranks - 1) < rows, ranks


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["shardscale", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_the_command_tells_a_bad_option_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(monkeypatch, "demo", "--inject", "9:3", "--ranks", "4") == 2
    said = capsys.readouterr()
    assert said.err == (
        "shardscale demo: --inject names rank 9, but the ranks of this job are 0 to 3.\n"
    )
    assert said.out == ""


def test_a_word_where_a_number_belongs_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(monkeypatch, "demo", "--ranks", "many") == 2
    assert "--ranks" in capsys.readouterr().err


def test_the_command_knows_its_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"shardscale {shardscale.__version__}\n"


@pytest.mark.parametrize("missing", ["typer", "rich", "sklearn"])
def test_a_missing_extra_is_told_with_the_line_that_installs_it(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == missing else object())
    assert run(monkeypatch, "demo") == 2
    error = capsys.readouterr().err
    assert missing in error
    assert "pip install 'shardscale[demo]'" in error
