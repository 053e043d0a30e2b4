"""What all commands share: options, exit codes, and progress in a log file.

tests/test_generate.py tries the streams of a real command: a closed input, a closed output, ASCII.
"""

import io
import re
import sys

import pytest
from tqdm import tqdm

from config.cli import ConfigError, LogFile, Parser, run_cli


def test_hyphens_are_accepted_for_underscores_in_names_only():
    parser = Parser()
    parser.add_argument("--out_dir")
    parser.add_argument("rest", nargs="*")
    for args in (["--out-dir", "a-b_c=--d"], ["--out_dir=a-b_c=--d"], ["--out-dir=a-b_c=--d"]):
        assert parser.parse_args(args).out_dir == "a-b_c=--d"
    assert parser.parse_args(["--", "--a-b"]).rest == ["--a-b"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["inspect", "--check"], "no option is called --check; did you mean '--check_bytes'?"),
        (["--top_k", "x"], "--top_k: must be a whole number, not 'x'"),
    ],
)
def test_options_that_do_not_exist_suggest_the_nearest(args, message):
    parser = Parser(prog="tool")
    parser.add_argument("--top_k", type=int)
    commands = parser.add_subparsers()
    commands.add_parser("inspect").add_argument("--check_bytes", action="store_true")
    with pytest.raises(ConfigError) as error:
        parser.parse_args(args)
    assert str(error.value) == message


class OurError(Exception):
    pass


def ending(result):
    """A main that ends so."""

    def main(args):
        assert args == ["--an=option"]
        if isinstance(result, BaseException):
            raise result
        return result

    return main


@pytest.mark.parametrize(
    "result, code, line",
    [
        (None, 0, ""),
        (ConfigError("no such thing\nand more"), 2, "tool.py: no such thing\n"),
        (OurError("of ours"), 2, "tool.py: of ours\n"),
        (FileNotFoundError(2, "No such file", "a.csv"), 2, "tool.py: a.csv: No such file\n"),
        (KeyboardInterrupt(), 130, "\n"),
    ],
)
def test_an_expected_error_is_one_line_and_an_exit_code(monkeypatch, capsys, result, code, line):
    monkeypatch.setattr(sys, "argv", ["some/tool.py", "--an=option"])
    with pytest.raises(SystemExit) as end:
        run_cli(ending(result), OurError)
    assert (end.value.code, capsys.readouterr().err) == (code, line)


@pytest.mark.parametrize(
    "rank, local_rank, kind, on_all_ranks, line",
    [
        ("3", "1", OurError, False, "tool.py: rank 3: why\n"),
        ("3", "1", ConfigError, False, ""),  # all ranks have the same command line
        ("4", "0", ConfigError, False, "tool.py: rank 4: why\n"),  # first of its machine
        ("0", "0", OurError, True, "tool.py: why\n"),
    ],
)
def test_a_rank_reports_its_own_errors_and_one_of_all_what_they_share(
    monkeypatch, capsys, rank, local_rank, kind, on_all_ranks, line
):
    error = kind("why")
    error.on_all_ranks = on_all_ranks
    monkeypatch.setattr(sys, "argv", ["tool.py", "--an=option"])
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit):
        run_cli(ending(error), OurError)
    assert capsys.readouterr().err == line


def test_a_bar_in_a_log_file_leaves_a_line_a_minute_and_its_last_one(monkeypatch):
    now, file = [0.0], io.StringIO()
    monkeypatch.setattr("config.cli.time.monotonic", lambda: now[0])
    log = LogFile(file)
    with tqdm(total=170, desc="steps", file=log, mininterval=0, miniters=1) as bar:
        for now[0] in range(1, 171):
            bar.update()
            if now[0] == 90:
                tqdm.write("a message", file=log)
    print("the end", file=log)
    assert "\r" not in file.getvalue()
    lines = [re.sub(r".* (\d+)/170 .*", r"\1", line) for line in file.getvalue().splitlines()]
    assert lines == ["60", "a message", "120", "170", "the end"]


def test_a_log_file_keeps_every_text():
    file = io.StringIO()
    log = LogFile(file)
    texts = ["one ", "line\n", "of Windows\r\n", "\rshown", "\rshown again", "\n", "unfinished"]
    for text in texts:
        log.write(text)
    log.finish()
    assert file.getvalue() == "one line\nof Windows\nshown again\nunfinished"
