import importlib.util
import shutil

import torch

import runlog


def rows(steps):
    return "".join(f"{step},0,0,0,0,0,0,0,,\n" for step in steps)


def test_a_continued_log_loses_what_lies_past_its_checkpoint(tmp_path):
    header = ",".join(runlog.LOG_COLUMNS) + "\n"
    with runlog.open_log(tmp_path, 0) as log:
        assert (tmp_path / "log.csv").read_text() == header
        log.write(rows([1, 2, 3, 4]) + "5,0,0,0")  # killed in the midst of a row
    runlog.open_log(tmp_path, 3).close()
    assert (tmp_path / "log.csv").read_text() == header + rows([1, 2, 3])
    runlog.open_log(tmp_path, 0).close()
    assert (tmp_path / "log.csv").read_text() == header


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    log = runlog.open_log(tmp_path, 0)
    row = dict.fromkeys(runlog.LOG_COLUMNS) | {"training_steps": 7, "training_loss": 1.5}
    runlog.write(log, None, row)
    assert (tmp_path / "log.csv").read_text().splitlines()[1] == "7,,1.5,,,,,,,"


def test_versions_name_the_libraries_and_the_code(tmp_path):
    found = runlog.versions()
    assert found["torch"] == torch.__version__ and len(found["python"].split(".")) == 3
    copy = tmp_path / "runlog.py"  # a source archive
    shutil.copy(runlog.__file__, copy)
    spec = importlib.util.spec_from_file_location("archived", copy)
    archived = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(archived)
    assert archived.versions()["code"] == "not a git checkout"
