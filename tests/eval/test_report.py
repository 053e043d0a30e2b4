import csv
import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from conftest import TINY
from test_curves import COLUMNS, SCHEDULE

from checkpoint import CheckpointError
from eval import report
from eval.curves import COLOURS, CurveError

matplotlib = pytest.importorskip("matplotlib")
OPTIONS = TINY | SCHEDULE | {"seq_len": 64, "rope_theta": 1e4, "tokenizer": "<r>.tiktoken"}
OPTIONS["mixture"] = "a_long_name_without_a_break/" * 3  # wider than a phone
PARTS = "overview learning speed benchmarks needle samples configuration versions".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two phases with all that a report tells of, and one that has only begun."""
    out = tmp_path_factory.mktemp("out")
    for name, losses in (("main", (8.0, 6.0, 4.0)), ("annealing", (3.0, 2.0)), ("begun", (9.0,))):
        (out / name / "checkpoints").mkdir(parents=True)
        lines = [f"{COLUMNS},validation_loss,tokens_per_second,mfu,data_seconds"]
        for n, loss in enumerate(losses, 1):
            lines.append(f"{n},{256 * n},{loss},{n / 4},{n},1e-3,{loss + 0.5},{1000 * n},0.{n}5,90")
        (out / name / "log.csv").write_text("\n".join(lines) + "\n")
        (out / name / "config.json").write_text(json.dumps(OPTIONS | {"name": name}))
    for phase, name, steps in (("1_main", "main", (2, 3)), ("3_annealing", "annealing", (2,))):
        for step in steps:
            folder = out / name / "checkpoints" / f"step{step:07d}"
            folder.mkdir()
            state = {"step": step, "config": OPTIONS, "versions": {"torch": f"2.13 <{name}>"}}
            (folder / "state.json").write_text(json.dumps(state))
            folder = out / name / "needle" / f"step{step:07d}"
            folder.mkdir(parents=True)
            with open(folder / "fr_generate.csv", "w", newline="") as f:
                rows = [(n, d, int(n < 65), 0, "", "") for n in (32, 64, 96) for d in (0, 50, 100)]
                head = ("length", "depth", "score", "position", "expected", "answer")
                csv.writer(f).writerows([head, *rows])
        with open(out / name / "evaluation.csv", "w", newline="") as f:
            head = "training_phase,training_steps,training_tokens,benchmark,dataset,num_fewshot"
            rows = [
                [phase, s, s * 256, "b", "arc_fr", 25, "acc,none", 0.25 * s, 0.01] for s in steps
            ]
            csv.writer(f).writerows([[*head.split(","), "score_name", "score", "stderr"], *rows])
        with open(out / name / "samples.jsonl", "w") as f:
            for step in steps:
                said = {"prompt": "Bon <b>", "text": f" jour & {step}\u2028\x1b</pre>"}
                line = {
                    "checkpoint": f"step{step:07d}",
                    "training_steps": step,
                    "training_tokens": 9,
                }
                f.write(json.dumps(line | said, ensure_ascii=False) + "\n")
    return out


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """The report of the two phases, as the command writes it."""
    file = tmp_path_factory.mktemp("page") / "sub" / "report.html"
    report.main([str(runs / "main"), str(runs / "annealing"), "--out", str(file)])
    return file


class Page(HTMLParser):
    """Tags and words of a page; every tag that is opened must be closed, in order."""

    ALONE = {"meta", "br", "link", "img"}

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.words, self.part = [], [], {}, ""
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.part = dict(attrs)["id"]
        if tag not in self.ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "section":
            self.part = ""

    def handle_data(self, data):
        self.words[self.part] = self.words.get(self.part, "") + data


def test_all_parts_tell_what_the_files_hold(page):
    read = Page(page.read_text(encoding="utf-8"))
    assert [attrs["id"] for tag, attrs in read.tags if tag == "section"] == PARTS
    words = {part: re.sub(r"\s+", " ", read.words[part]) for part in PARTS}
    for part, wanted in {
        "overview": [
            "4.000",
            "2.000",
            "4.500",
            "768.00",
            "2,000",
            "25.0%",
            "parameters",
            "0.75",
            "data10.0%",
            "30.0%",
        ],
        "learning": ["loss 4.000", "loss 2.000", "validation", "learning rate", "512.00 tokens"],
        "speed": ["tokens a second", "annealing"],
        "benchmarks": [
            "arc fr",
            "arc_fr",
            "0.7500 ± 0.0100",
            "main",
            "annealing",
            "all 3 scores",
        ],
        "needle": ["main, step0000003: fr, generate", "trained on 64 tokens", "1 of older"],
        "samples": ["Bon <b>", "jour & 3", "</pre>", "main, step 2", "annealing, step 2"],
        "configuration": ["num_hidden_layers", "<r>.tiktoken", "option"],
        "versions": ["torch", "2.13 <main>", "2.13 <annealing>"],
    }.items():
        for word in wanted:
            assert word in words[part], (part, word, words[part][:1500])
    # embedding, head; two blocks of q|k|v, output, gate|up, down and two norms; the last norm
    blocks = 2 * (128 * 64 + 64 * 64 + 192 * 64 + 64 * 96 + 2 * 64)
    assert f"{2 * 97 * 64 + blocks + 64:,}" in words["overview"]
    needle = words["needle"]
    assert (
        needle.index("step0000003") < needle.index("1 of older") < needle.index("main, step0000002")
    )
    assert words["needle"].index("annealing, step") > words["needle"].index("step0000002")


def test_the_file_stands_alone(page):
    content = page.read_text(encoding="utf-8")
    read = Page(content)
    links = [v for _, a in read.tags for k, v in a.items() if k in ("href", "src", "xlink:href")]
    assert links and all(link.startswith(("#", "data:image")) for link in links)
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in read.tags}
    assert "@import" not in content and not re.search(r"url\((?!#)", content)
    ids = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link[0] == "#"} <= set(ids)
    for used in re.findall(r"url\(#([\w.-]+)\)", content):
        assert used in ids


def test_pictures_are_svg_in_the_ink_of_the_page(page):
    content = page.read_text(encoding="utf-8")
    pictures = re.findall(r"<svg.*?</svg>", content, re.DOTALL)
    assert len(pictures) == 3 + 3  # curves, speed, scores; a map for each checkpoint
    for svg in pictures:
        ET.fromstring(svg)
        assert "currentColor" in svg and "#24292f" not in svg and 'role="img"' in svg
    assert COLOURS[0] in pictures[0] and COLOURS[1] in pictures[0]


def test_a_run_that_has_only_begun(runs):
    content = report.page([report.read(runs / "begun")], [])
    words = Page(content).words
    for part, option in (
        ("benchmarks", "--tasks"),
        ("needle", "--needle"),
        ("samples", "eval.watch"),
    ):
        assert "None yet" in words[part] and option in words[part]
    assert "9.000" in words["overview"]


@pytest.fixture
def phase(runs, tmp_path):
    """The first phase again, to be changed."""
    shutil.copytree(runs / "main", tmp_path / "main")
    return tmp_path / "main"


def a_map(folder, name="fr_generate"):
    folder.mkdir(parents=True, exist_ok=True)
    head = "length,depth,score,position,expected,answer"
    (folder / f"{name}.csv").write_text(f"{head}\n32,0,1.0,0,a,a\n64,0,0.5,0,a,b\n64,5")
    return folder


def test_maps_of_the_newest_checkpoint_alone_are_in_sight(phase):
    """Also if an older one has more maps, and lies elsewhere; none of a run with a longer name."""
    a_map(phase / "needle" / "step0000002", "en_likelihood")
    a_map(phase.parent / "needle" / "main_step0000001")
    a_map(phase.parent / "needle" / "main_long_step0000009")
    (phase / "needle" / "step0000003" / "notes.csv").write_text("day,note\n1,a\n")
    (phase / "needle" / "step0000003" / "es_generate.csv").write_text("length,depth,sco")
    content = report.needle_maps([report.read(phase)])
    seen, older = content.split("<details>")
    maps = re.compile(r'aria-label="needle map of main, (.*?)"')
    assert maps.findall(seen) == ["step0000003: fr, generate"]
    assert maps.findall(older) == [
        "step0000002: en, likelihood", "step0000002: fr, generate",
        "main_step0000001: fr, generate",
    ]  # fmt: skip
    assert "3 of older checkpoints" in older


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("samples.jsonl", '{"prompt": "a"', "samples.jsonl: damaged"),
        ("samples.jsonl", '{"prompt": "a"}', "samples.jsonl: not completions"),
        ("samples.jsonl", "7", "samples.jsonl: not completions"),
        ("needle/a_step1/x.csv", "length,depth,score,position,expected,answer\na,b,c,d,e,f\n",
         "x.csv: not a needle map"),
        ("needle/a_step1/x.csv", "length,depth,score,position,expected,answer\n1\n",
         "x.csv: not a needle map"),
        ("needle/a_step1/x.csv", "\xff\n", "x.csv: not a needle map"),
    ],
)  # fmt: skip
def test_damaged_files_are_one_line(phase, file, content, message):
    (phase / file).parent.mkdir(parents=True, exist_ok=True)
    (phase / file).write_text(content, encoding="latin-1")
    with pytest.raises((CurveError, CheckpointError), match=message):
        report.page([report.read(phase)], [])


def test_bad_input_is_one_line(runs, tmp_path, capsys):
    with pytest.raises(CurveError, match="is it a run"):
        report.main([str(tmp_path)])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CurveError, match="damaged"):
        report.main([str(tmp_path)])
