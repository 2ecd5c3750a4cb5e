from __future__ import annotations

import json
import signal
import subprocess
import sys
import traceback
from unittest import mock

import pytest

from refreward_trl import __main__, errors
from refreward_trl.cli import app, env
from refreward_trl.signals import STOPPING

HELP_SCRIPT = """
import contextlib, io, json, sys
import refreward_trl
from refreward_trl.cli import app

texts = {}
for words in [[]] + [[name] for name in app.NAMES]:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        app.main([*words, "--help"])
    texts[" ".join(words)] = text.getvalue()
heavy = sorted({"torch", "transformers", "trl", "diffusers", "numpy", "PIL"} & set(sys.modules))
print(json.dumps([heavy, texts]))
"""


@pytest.fixture(scope="module")
def helps():
    """Every help text, and the heavy packages that printing them all has imported."""
    done = subprocess.run([sys.executable, "-c", HELP_SCRIPT], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_no_help_imports_torch(helps):
    assert helps[0] == []


def test_every_help_fits_a_screen_and_has_an_example(helps):
    texts = helps[1]
    assert set(texts) == {"", *app.NAMES}
    for name, text in texts.items():
        lines = text.splitlines()
        assert len(lines) < 60, name
        assert max(map(len, lines)) < 120, name
        assert "example" in text, name
        assert f"refreward {name}".strip() in text.partition("example")[2], name


def test_the_help_names_every_command(helps):
    assert all(f"  {command.name} " in helps[1][""] for command in app.COMMANDS)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["refle"], 2, "there is no command 'refle'; did you mean 'refl'?"),
        (["env", "--josn"], 2, "unknown argument '--josn'"),
        (["score", "a"], 2, "the following arguments are required: SR"),
        (["score", "a", "b", "--rewards", "ssim"], 2, "unknown argument '--rewards'; did you mean '--reward'?"),
        (["recipes", "lst"], 2, "invalid choice: 'lst'"),
        (["refl", "--config"], 2, "--config needs a recipe"),
        (["refl", "--config", "a", "--config", "b"], 2, "give one recipe"),
        (["refl", "--config", "tiny/refl", "--sed", "1"], 2, "unknown flag 'sed'; did you mean 'seed'?"),
        (["score", "no/lr.png", "no/sr.png"], 3, "no/lr.png: the LR image or folder does not exist"),
    ],
)
def test_a_mistake_is_one_screen_and_its_exit_code(words, code, message, capsys):
    assert app.main(words) == code
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert "Traceback" not in shown
    assert len(shown.splitlines()) < 25


def test_debug_adds_the_traceback(capsys):
    assert app.main(["refl", "--config", "none.yaml", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "\nerror: none.yaml: " in shown


def test_ctrl_c_ends_with_130(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "main", interrupted)
    assert app.main(["env"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_a_mistake_in_the_words_is_told_by_one_process(rank, told, monkeypatch, capsys):
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert app.main(["refl", "--config", "none.yaml"]) == 2
    assert bool(capsys.readouterr().err) is told
    # A launcher ends the others with the first that fails, so the silent ones must not be first.
    assert bool(waited) is not told


def test_another_error_is_told_by_every_process_with_its_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert app.main(["score", "no/lr.png", "no/sr.png"]) == 3
    assert capsys.readouterr().err.startswith("[rank 1] error: no/lr.png")


def test_an_error_that_another_rank_tells_is_not_told_twice(monkeypatch, capsys):
    waited: list[float] = []
    error = errors.RewardError("rank 0 stopped: raised ConnectionError")
    error.reported_by = 0
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr(app, "_dispatch", mock.Mock(side_effect=error))
    assert app.main(["refl"]) == 4
    assert capsys.readouterr().err == ""
    assert waited == [app.HEAD_START]


def test_reporting_leaves_the_signals_as_they_were(monkeypatch):
    before = [signal.getsignal(number) for number in STOPPING]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert app.main(["score", "no/lr.png", "no/sr.png"]) == 3
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_exit_codes_are_distinct():
    kinds = [errors.ConfigError, errors.DataError, errors.RewardError]
    kinds += [errors.CheckpointError, errors.SetupError, errors.TrainingError]
    assert len({kind.exit_code for kind in [errors.RefRewardError, *kinds]}) == len(kinds) + 1


def test_env_is_a_list_to_paste(capsys):
    assert app.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("- ") and ": " in line for line in lines)
    assert any(line.startswith("- torch: ") and line[-1].isalnum() for line in lines)


def test_version(capsys):
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out == "refreward_trl 0.1.0\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(argv):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(env, "main", broken)
    with pytest.raises(ZeroDivisionError) as caught:
        app.main(["env"])
    assert "broken" in "".join(traceback.format_tb(caught.tb))


def test_a_command_leaves_the_group_of_its_processes(tmp_path, monkeypatch, capsys):
    distributed = pytest.importorskip("torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(sys, "argv", ["refreward", "--version"])
    try:
        assert __main__.main() == 0
        assert not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
