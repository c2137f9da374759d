import base64
from html.parser import HTMLParser

import pytest

from llava_ray.errors import ConfigError
from llava_ray.report.pieces import (
    Bar,
    Card,
    Fact,
    Facts,
    Gallery,
    Histogram,
    LineChart,
    Link,
    Links,
    Note,
    Picture,
    Report,
    ReportToken,
    Section,
    Series,
    Table,
    TokenText,
    bar_chart,
)
from llava_ray.report.rendering import render_report, write_report

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HOSTILE = "<script>alert('x')</script>\"><b onload=1>&amp; $a_b$ {{ 7*7 }}"
VOID = {"meta", "img", "br", "link", "path", "use"}


class Page(HTMLParser):
    """Elements in order, with the text below each, and whether every element was closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.well_formed = [], [], True
        self.feed(text)
        self.well_formed &= not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        self.well_formed &= bool(self.open) and self.open[-1][0] == tag
        if self.open:
            self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element[2].append(data)

    def all(self, tag, **attributes):
        return [
            (attrs, "".join(text))
            for name, attrs, text in self.elements
            if name == tag and attributes.items() <= attrs.items()
        ]

    def texts(self, tag, **attributes):
        return [" ".join(text.split()) for _, text in self.all(tag, **attributes)]


def page_of(*pieces):
    return Page(render_report(Report("Title", "Summary", [Section("Section", pieces)])))


def everything(text="plain"):
    picture = Picture(PNG, text, text, text, text, text, "wrong")
    pieces = [
        Note(text, warning=True),
        Facts([Fact(text, text, text)]),
        Table([text, text], [[text, Bar(0.5, text, reference=0.2)], [text, Link(text, "#there")]], text, text),
        LineChart(text, [Series(text, [0, 1], [2, 1]), Series(text + "2", [0, 1], [2, 1])], text, text),
        Histogram(text, [1, 2, 2], text, text, limit=2, limit_label=text),
        Gallery([picture]),
        TokenText(
            [
                ReportToken(text, "context"),
                ReportToken(text, "learnt"),
                ReportToken(text, "image"),
                ReportToken(text, "cut"),
            ]
        ),
        Links([Link(text, "https://example.org/?a=1&b=2")]),
        Card(text, [Note(text)], [picture], text, "there"),
    ]
    return Report(text, text, [Section(text, pieces, text), *[Section(text, [])] * 3], [Fact(text, text)])


def test_a_report_is_one_well_formed_page_that_asks_for_nothing_else():
    text = render_report(everything())
    page = Page(text)
    assert page.well_formed
    assert text.startswith("<!doctype html>")
    assert not page.all("script")
    assert not page.all("link")
    assert all(attrs["src"].startswith("data:image/png;base64,") for attrs, _ in page.all("img"))
    assert "url(" not in text.split("</style>")[0]
    assert "prefers-color-scheme: dark" in text
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_all_text_is_taken_literally():
    page = Page(render_report(everything(HOSTILE)))
    assert page.well_formed
    assert not page.all("script")
    assert not [attrs for tag, attrs, _ in page.elements if "onload" in attrs]
    plain = Page(render_report(everything("word")))
    assert [tag for tag, _, _ in page.elements if tag not in ("path", "g", "text")] == [
        tag for tag, _, _ in plain.elements if tag not in ("path", "g", "text")
    ]
    assert page.texts("h1") == [" ".join(HOSTILE.split())]
    assert HOSTILE in page.texts("text")  # in charts too, dollars included


def test_headings_and_pictures_can_be_heard():
    page = Page(render_report(everything()))
    levels = [int(tag[1]) for tag, _, _ in page.elements if tag in ("h1", "h2", "h3")]
    assert levels == [1, 2, 3, 2, 2, 2]
    assert all(attrs["alt"] for attrs, _ in page.all("img"))
    assert len(page.all("div", role="img")) == 2
    assert {attrs["scope"] for attrs, _ in page.all("th")} == {"col", "row"}
    assert page.all("html")[0][0]["lang"] == "en"


def test_a_table_aligns_numbers_and_writes_what_is_missing():
    page = page_of(Table(["id", "tokens", "loss"], [["a", 1234, 2.34567], ["b", None, float("nan")]], "Rows"))
    assert page.texts("caption") == ["Rows"]
    assert page.texts("th") == ["id", "tokens", "loss", "a", "b"]
    assert page.texts("td", **{"class": "number"}) == ["1,234", "2.346", "–", "–"]


def test_a_table_without_rows_says_so():
    assert page_of(Table(["id", "reason"], [])).texts("td") == ["none"]


def test_bars_have_their_length_and_their_reference():
    chart = bar_chart("Accuracy", ("kind", "accuracy"), [("all", 0.9, 0.718), ("x", 1.2, None)], legend="blind")
    page = page_of(chart)
    styles = [attrs["style"] for attrs, _ in page.all("span") if "style" in attrs]
    assert styles == ["width:90.00%", "left:71.80%", "width:100.00%"]
    assert page.texts("span", **{"class": "value"}) == ["90.0%", "120.0%"]
    assert page.texts("td")[1::2] == ["71.8%", "–"]
    assert page.texts("th")[:3] == ["kind", "accuracy", "blind"]


@pytest.mark.parametrize("value", [float("nan"), -0.5, 0.0])
def test_a_bar_of_nothing_is_empty(value):
    assert Bar(value, "").percent == 0
    assert Bar(0.5, "", maximum=0).percent == 0


def test_learnt_tokens_are_marked_one_by_one():
    tokens = [
        ReportToken("ASK:", "context"),
        ReportToken(" Yes", "learnt"),
        ReportToken("\n", "learnt"),
        ReportToken("image", "image"),
    ]
    page = page_of(TokenText([*tokens, ReportToken(" more", "cut")]))
    assert [text for _, text in page.all("mark")] == [" Yes", "↵\n"]
    assert [text for _, text in page.all("s")] == [" more"]
    assert page.all("p", **{"class": "tokens"})[0][1] == "ASK: Yes↵\nimage more"


def test_a_grid_shows_the_truth_where_the_answer_is_wrong():
    right = Picture(PNG, "a circle", question="What?", answer="circle", truth="circle", verdict="right")
    wrong = Picture(PNG, "a square", question="What?", answer="circle", truth="square", verdict="wrong")
    page = page_of(Gallery([right, wrong]))
    assert page.texts("p")[1:] == ["What?", "circle right", "What?", "circle wrong", "truth: square"]


def test_cards_are_where_links_lead():
    page = page_of(Links([Link("the sample", "#sample-7")]), Card("7", [Note("text")], anchor="sample-7"))
    assert page.all("a")[-1] == ({"href": "#sample-7"}, "the sample")
    assert page.all("article", id="sample-7")


def test_contents_lead_to_sections_once_there_are_many():
    few, many = (Page(render_report(Report("T", "S", [Section(f"Part {i}", [])] * n))) for i, n in ((1, 3), (2, 4)))
    assert not few.all("nav")
    assert {attrs["href"] for attrs, _ in many.all("a")} == {"#part-2"}
    assert many.all("h2", id="part-2")


@pytest.mark.parametrize("target", ["javascript:alert(1)", " JavaScript:alert(1)", "data:text/html,x"])
def test_unsafe_links_are_refused(target):
    with pytest.raises(ConfigError, match=r"expected #anchor, a path or an http\(s\) URL"):
        page_of(Links([Link("click", target)]))


def test_a_picture_of_another_format_is_refused():
    with pytest.raises(ConfigError, match=r"begins b'II\*.*expected PNG, JPEG, WebP or GIF"):
        page_of(Gallery([Picture(b"II*\0 tiff", "a scan")]))


def test_the_same_report_is_the_same_page():
    assert render_report(everything()) == render_report(everything())


def test_a_report_is_written_whole_in_a_new_folder(tmp_path):
    path = write_report(tmp_path / "new" / "report.html", everything("half of a pair: \ud83d"))
    assert path.read_text().rstrip().endswith("</html>")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written to .*file/report.html.*choose a folder"):
        write_report(tmp_path / "file" / "report.html", Report("T", "S", []))
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ConfigError, match="choose a folder"):
        write_report(tmp_path / "report.html", Report("T", "S", []))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "report.html"]
