"""The page says what the report says, in plain words, claims no more than that, and asks for nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
import reports

from farfield.protocols.audit.finding import Figure, Finding, Interval
from farfield.protocols.audit.page import VERDICTS, figure, interval, page, quantity
from farfield.protocols.audit.report import Report
from farfield.protocols.audit.wording import capital

VOID = {"meta", "link", "br", "img", "hr", "input"}
EVIL = "<script>alert('x')</script>\"><img src=http://x.example/ onerror=alert(1)>{{ 7*6181 }}\u202e\x00&amp;ε"

REPORT = reports.report()
PAGE = page(REPORT, reports.PUBLIC)


class Read(HTMLParser):
    """Tags, attributes and text of a page. Fails for one whose tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), attrs
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        seen = " ".join(words for tag, words in self.texts if tag != "style")
        return re.sub(r"\s+", " ", seen.replace("\u00a0", " "))

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.tags for key, value in attrs.items() if key == name and value is not None]


def read(report: Report = REPORT) -> Read:
    return Read(page(report, reports.PUBLIC))


def evil(value: Any) -> Any:
    """The same with something nasty in place of each text that a report leaves free."""
    if isinstance(value, dict):
        kept = {"verdict", "attack", "style"}
        return {key: one if key in kept else evil(one) for key, one in value.items()}
    if isinstance(value, list):
        return [evil(one) for one in value]
    return EVIL if isinstance(value, str) else value


def test_a_page_is_whole_and_asks_for_nothing() -> None:
    found = read()
    names = found.attributes("id")
    assert len(set(names)) == len(names)
    assert {one.removeprefix("#") for one in found.attributes("href")} <= set(names)
    assert all(one.startswith("#") for one in found.attributes("href"))
    for text in found.attributes("aria-labelledby"):
        assert set(text.split()) <= set(names)
    assert not {"script", "img", "iframe", "object", "link", "form"} & {tag for tag, _ in found.tags}
    assert not [key for _, attrs in found.tags for key in attrs if key.startswith("on") or key in ("src", "style")]
    assert "http:" not in PAGE and "https:" not in PAGE and "@import" not in PAGE
    assert set(re.findall(r"url\([^)]*\)", PAGE)) <= {f"url(#{name})" for name in names}
    assert "default-src 'none'" in PAGE


def test_whatever_stands_in_a_report_stays_text() -> None:
    findings = [evil(one.model_dump(mode="json")) for one in REPORT.findings]
    changes: dict[str, Any] = {
        "data": EVIL,
        "backbone": EVIL,
        "emulator": EVIL,
        "farfield": EVIL,
        "versions": {EVIL: EVIL},
    }
    assert REPORT.promise is not None and REPORT.ledger is not None
    report = reports.report(
        findings=findings,
        untried=[{"attack": "a", "title": EVIL, "reason": EVIL}],
        rounds=[{"round": 1, "clients": 2, "problems": [EVIL]}],
        promise={**evil(REPORT.promise.model_dump(mode="json")), "unit": "example"},
        ledger=REPORT.ledger.model_copy(update={"population": EVIL}),
        **changes,
    )
    text = page(report, reports.PUBLIC)
    found = Read(text)
    assert not {"script", "img"} & {tag for tag, _ in found.tags}
    assert not [key for _, attrs in found.tags for key in attrs if key.startswith("on")]
    assert "\u202e" not in text and "\x00" not in text
    assert "alert('x')" in found.text and "{{ 7*6181 }}" in found.text and "43267" not in found.text
    assert found.text.count("&amp;ε") > 50  # not one of them was taken for what is escaped already
    assert [tag for tag, _ in found.tags if tag == "svg"] == [tag for tag, _ in read().tags if tag == "svg"]


def test_every_part_of_a_finding_is_on_the_page() -> None:
    text = read().text
    for one in REPORT.findings:
        assert VERDICTS[one.verdict][1] in text
        for words in (one.title, *one.tried, *one.found, *one.limits):
            assert words in text
        for shown in one.figures:
            assert capital(shown.name) in text and shown.note in text
        for plot in one.plots:
            assert plot.title in text and plot.caption in text
            assert all(series.label in text for series in plot.series)
        for table in one.tables:
            assert all(cell in text for row in table.rows for cell in row) and table.caption in text
    for left in REPORT.untried:
        assert left.title in text and left.reason[1:] in text
    for words in (REPORT.plan_digest, REPORT.code, REPORT.backbone, reports.PUBLIC.hex(), "coordinator audit verify"):
        assert words in text
    assert REPORT.ledger is not None and REPORT.ledger.head in text and "numpy" in text
    assert "a client did not answer in 60 seconds" in text and REPORT.plan in text


@pytest.mark.parametrize("example", ["private.toml", "quickstart.toml"])
def test_nothing_is_ever_called_private(example: str) -> None:
    for findings in (None, ()):
        changes = {} if findings is None else {"findings": findings}
        assert "private" not in page(reports.report(example, **changes), reports.PUBLIC).lower()


def lead(report: Report) -> str:
    """The summary, up to the list of attacks."""
    text = read(report).text
    return text[text.index("Summary") : text.index("The attacks")]


def bound(value: float, claimed: float | None = None, verdict: str = "no leak found") -> Finding:
    shown = Figure(
        name="Lower bound on ε", value=value, interval=Interval(low=value), ceiling=20, claimed=claimed, headline=True
    )
    return Finding.model_validate(
        {
            "attack": "c",
            "title": "Canaries",
            "attacker": "x",
            "verdict": verdict,
            "tried": (),
            "found": (),
            "figures": (shown,),
        }
    )


def test_the_summary_counts_what_was_found() -> None:
    told = lead(REPORT)
    assert "Leaks were found" in told and "4 attacks were made; 2 of them found something beyond chance" in told
    assert "One test of the protection was made, and passed. 2 attacks were not tried." in told
    assert "Not tried: Emulator; Backdoor by one client." in told


def test_a_claim_is_not_falsified_or_it_is() -> None:
    within, beyond = (lead(reports.report(findings=(bound(value, 8.0, "leak"),))) for value in (3.0, 9.0))
    assert "claims ε = 7.999 at δ = 10⁻⁵ for one example. This was not falsified at 95 % by these attacks." in within
    assert "Leaks were found" in within and "More leaked" not in within
    assert (
        "That does not hold: Lower bound on ε, was measured to be 9, and claimed is 8." in beyond
        and "not falsified" not in beyond
    )
    assert "More leaked than the Plan claims" in beyond


def test_a_claim_that_no_attack_could_falsify_is_not_said_to_stand() -> None:
    for finding in (reports.exposure(), bound(9.0, claimed=None)):  # the second is of another unit than the claim
        told = lead(reports.report(findings=(finding,)))
        assert "None of these attacks measured an ε" in told and "not falsified" not in told
        assert "does not hold" not in told and "More leaked" not in told


def test_a_claim_that_was_out_of_reach_is_said_to_be() -> None:
    near, far = (lead(reports.report(findings=(bound(3.0, claimed),))) for claimed in (8.0, 20.0))
    assert "not falsified at 95 % by these attacks." in near
    assert "not falsified at 95 % by these attacks, and could not be: an ε above 20 could not have been shown" in far


def test_a_claim_that_only_single_steps_could_refute_is_said_to_be_one() -> None:
    promised = REPORT.promise
    assert promised is not None and promised.epsilon is not None
    whole, step = bound(0.0, promised.epsilon), bound(3.0, 6.0)
    low = whole.figures[0].model_copy(update={"ceiling": 3.96})
    step = step.model_copy(update={"attack": "mechanism"})
    both = (whole.model_copy(update={"figures": (low,)}), step)
    assert "of the whole run, no ε above 3.96 could have been shown" in lead(reports.report(findings=both))
    assert "of the whole run" not in lead(reports.report(findings=(bound(0.0, promised.epsilon), step)))


def test_without_a_claim_there_is_none_to_stand() -> None:
    told = lead(reports.report("quickstart.toml", findings=(bound(0.0),)))
    assert "claims no ε" in told and "does not mean that there is none" in told
    assert "falsified" not in told and "No leak was found" in told


def test_a_failed_test_is_not_hidden_by_leaks() -> None:
    failed = reports.self_test().model_copy(update={"verdict": "failed"})
    told = lead(reports.report(findings=(failed, reports.exposure())))
    assert "Leaks were found, and a test failed" in told
    told = lead(reports.report(findings=(failed,)))
    assert "A test of the protection failed" in told and "One test of the protection was made, and failed" in told


def test_an_audit_without_attacks_found_nothing_out() -> None:
    told = lead(reports.report(findings=()))
    assert "Nothing was tried" in told and "No leak" not in told


def test_the_chart_has_a_bound_beside_its_ceiling_and_the_claim() -> None:
    text = page(reports.report(findings=(bound(3.0, 8.0),)), reports.PUBLIC)
    told = re.search(r'<desc id="bounds-d">(.*?)</desc>', text)
    assert told is not None
    assert told[1] == "Lower bound on ε: at least 3, of at most 20 that it could show; claimed: 8."
    assert 'id="bounds-d"' not in page(reports.report(findings=(reports.exposure(),)), reports.PUBLIC)


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (Interval(low=0.008, high=0.034), "0.8 to 3.4 %"),
        (Interval(low=0.5), "at least 50 %"),
        (Interval(high=0.5), "at most 50 %"),
        (Interval(low=0.5, confidence=0.99), "at least 50 % (99 %)"),
        (Interval(), ""),
    ],
)
def test_an_interval_is_read_as_one(shown: Interval, wanted: str) -> None:
    assert interval(shown, "%") == wanted


def test_figures_have_their_units() -> None:
    assert quantity(0.125, "%") == "12.5 %" and quantity(3.1, "bits") == "3.1 bits" and quantity(0.42, "") == "0.42"
    assert figure(Figure(name="a", value=None, note="why")).value == "none"
    assert (
        figure(Figure(name="a", value=0.0)).value == "0" and figure(Figure(name="a", value=1, chance=0)).chance == "0"
    )


def answers(report: Report) -> dict[str, str]:
    """Terms and what is said of them, in the sections that follow NIST SP 800-226."""
    text = page(report, reports.PUBLIC)
    section = text[text.index('id="guarantee"') : text.index('id="verify"')]
    pairs = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", section)
    return {term: answer.replace("\u00a0", " ") for term, answer in pairs}


def test_the_guarantee_is_told_as_nist_asks_for_it() -> None:
    told = answers(REPORT)
    assert list(told) == [
        *("Parameters", "Unit", "Neighbours", "Budget"),
        *("Noise", "Sampling", "Randomness, floating point", "Tests of it"),
        *("Utility", "Bias"),
        *("Trust model", "Threat model", "Side channels"),
        *("Data collection", "Access, security", "Not covered"),
    ]
    assert "ε = 7.999 at δ = 10⁻⁵" in told["Parameters"] and "PLD (dp-accounting" in told["Parameters"]
    assert "One example of one client" in told["Unit"] and "4 entries" in told["Budget"]
    assert "0.7366" in told["Noise"] and "This is enforced" in told["Sampling"]
    assert "passed" in told["Tests of it"] and "sums of updates" in told["Trust model"]
    assert "1 answer of a client did not come" in told["Side channels"]
    assert "Held-out losses" in told["Not covered"]


def test_what_is_not_promised_is_not_told_as_if_it_were() -> None:
    told = answers(reports.report("quickstart.toml", findings=()))
    assert "no ε bounds" in told["Parameters"] and told["Noise"] == "None is added."
    assert told["Unit"].startswith("None") and told["Not covered"].startswith("Everything")
    assert "no ledger" in told["Budget"] and "made no test" in told["Tests of it"]
    assert "No attack was made" in told["Threat model"]


def test_a_client_level_promise_reads_as_one() -> None:
    assert REPORT.promise is not None
    client = REPORT.promise.model_copy(update={"unit": "client", "epsilon": None, "enforced": False})
    told = answers(reports.report(promise=client))
    assert told["Unit"].startswith("All that one client holds")
    assert "no finite ε" in told["Parameters"] and "This is not enforced" in told["Sampling"]


def test_what_one_client_audits_is_not_called_a_federation() -> None:
    told = lead(reports.report(scope="client", data="a folder of texts", clients=1))
    assert "federation" not in told
    text = read(reports.report(scope="client", data="a folder of texts", clients=1)).text
    assert "What the update of one client gives away before it is sent, on a folder of texts." in text
