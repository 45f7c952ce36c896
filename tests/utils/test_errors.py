"""The screen that a user reads."""

from utils.errors import Problem, UserError


def test_the_screen_groups_problems_by_file_in_order_of_first_appearance() -> None:
    error = UserError(
        [
            Problem("run.toml", "key `epochs`", "must be a whole number"),
            Problem("data.toml", "key `root`", "no such key"),
            Problem("run.toml", "", "is odd"),
        ]
    )
    assert str(error) == (
        "3 problems\n"
        "\nrun.toml\n  key `epochs`: must be a whole number\n  is odd\n"
        "\ndata.toml\n  key `root`: no such key"
    )


def test_one_problem_is_a_value_error_that_holds_it() -> None:
    error = UserError.of("is odd", "run.toml", "[model] shift")
    assert isinstance(error, ValueError)
    assert error.problems == [Problem("run.toml", "[model] shift", "is odd")]
    assert str(error).startswith("1 problem\n")
