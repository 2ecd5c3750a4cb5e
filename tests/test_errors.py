"""Every error says what, where and how to fix it, and maps to an exit code."""

from refreward_trl import errors


def test_message_holds_what_where_and_fix() -> None:
    error = errors.DataError("no hr_image", where="row 3", fix="add the column")
    assert str(error) == "row 3: no hr_image\n  fix: add the column"
    assert str(errors.DataError("no hr_image")) == "no hr_image"


def test_exit_codes_are_distinct() -> None:
    kinds = [errors.ConfigError, errors.DataError, errors.RewardError, errors.CheckpointError, errors.SetupError,
             errors.TrainingError, errors.Preempted]  # fmt: skip
    assert [kind.exit_code for kind in kinds] == [2, 3, 4, 5, 6, 7, 75]
