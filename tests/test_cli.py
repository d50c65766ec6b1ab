"""What all command lines share."""

import pytest

from utils.cli import Parser, finite_float


@pytest.fixture
def parser() -> Parser:
    parser = Parser(description="", example="")
    parser.add_argument("--k", type=finite_float)
    parser.add_argument("--adaptive", action="store_true")
    return parser


@pytest.mark.parametrize("words", [["--k", "-1e-3"], ["--k=-1e-3"], ["--k", "-.001"]])
def test_numbers_below_0(words: list[str], parser: Parser) -> None:
    found = parser.parse_args([*words, "--adaptive"])
    assert (found.k, found.adaptive) == (-0.001, True)


@pytest.mark.parametrize("words", [["--k", ""], ["--k="], [""]])
def test_an_empty_word_is_refused(
    words: list[str], parser: Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(words)
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert "is empty: a variable that is not set?" in errors
