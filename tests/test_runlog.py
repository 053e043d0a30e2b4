import importlib.util
import shutil

import pytest
import torch

import runlog


def rows(steps):
    return "".join(f"{step},0,0,0,0,0,0,0,,,0.5\n" for step in steps)


def test_a_continued_log_loses_what_lies_past_its_checkpoint(tmp_path):
    header = ",".join(runlog.LOG_COLUMNS) + "\n"
    with runlog.open_log(tmp_path, 0) as log:
        assert (tmp_path / "log.csv").read_text() == header
        log.write(rows([1, 2, 3, 4]) + "5,0,0,0")  # killed in the midst of a row
    runlog.open_log(tmp_path, 3).close()
    assert (tmp_path / "log.csv").read_text() == header + rows([1, 2, 3])
    runlog.open_log(tmp_path, 0).close()
    assert (tmp_path / "log.csv").read_text() == header


def test_a_log_of_other_columns_is_continued_in_those_of_today(tmp_path):
    """As it was before data_seconds, and with a column that no longer is one of ours."""
    old = "training_steps,training_tokens,training_loss,walltime,gputime,learning_rate,grad_norm,"
    (tmp_path / "log.csv").write_text(
        old + "loudness,tokens_per_second,mfu,validation_loss\n"
        "1,16,4.5,0.1,0.2,0.001,1.5,11,99,,4.25\n2,32,4.25,0.2,0.4,0.002,1.25,11,98,0.5,\n"
        "3,48,4.0,0.3,0.6,0.003,1.0,11,97,0.5,\n2,32,4.25\n"
    )
    runlog.open_log(tmp_path, 2).close()
    header, *lines = (tmp_path / "log.csv").read_text().splitlines()
    assert header == ",".join(runlog.LOG_COLUMNS)
    assert lines == [
        "1,16,4.5,0.1,0.2,0.001,1.5,99,,4.25,",
        "2,32,4.25,0.2,0.4,0.002,1.25,98,0.5,,",
    ]
    runlog.open_log(tmp_path, 2).close()
    assert (tmp_path / "log.csv").read_text().splitlines() == [header, *lines]


@pytest.mark.parametrize("text", ["", "\n", "no,log\n1,2\n"])
def test_what_is_no_log_is_begun_anew(tmp_path, text):
    (tmp_path / "log.csv").write_text(text)
    runlog.open_log(tmp_path, 2).close()
    assert (tmp_path / "log.csv").read_text() == ",".join(runlog.LOG_COLUMNS) + "\n"


def test_tensorboard_gets_what_the_row_has(tmp_path):
    class Board:
        seen = []

        def add_scalar(self, *scalar):
            self.seen.append(scalar)

    row = dict.fromkeys(runlog.LOG_COLUMNS) | {"training_steps": 7, "data_seconds": 0.5}
    with runlog.open_log(tmp_path, 0) as log:
        runlog.write(log, Board(), row | {"training_loss": 1.5})
    assert sorted(Board.seen) == [("data_seconds", 0.5, 7), ("training_loss", 1.5, 7)]


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    log = runlog.open_log(tmp_path, 0)
    row = dict.fromkeys(runlog.LOG_COLUMNS) | {"training_steps": 7, "training_loss": 1.5}
    runlog.write(log, None, row)
    assert (tmp_path / "log.csv").read_text().splitlines()[1] == "7,,1.5,,,,,,,,"


def test_versions_name_the_libraries_and_the_code(tmp_path):
    found = runlog.versions()
    assert found["torch"] == torch.__version__ and len(found["python"].split(".")) == 3
    copy = tmp_path / "runlog.py"  # a source archive
    shutil.copy(runlog.__file__, copy)
    spec = importlib.util.spec_from_file_location("archived", copy)
    archived = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(archived)
    assert archived.versions()["code"] == "not a git checkout"
