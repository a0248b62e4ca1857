"""docs/reliability.md says what is tried, and enough is."""

from docs.make_reliability import PAGE, page


def test_the_page_counts_the_tables() -> None:
    assert page() == PAGE.read_text(encoding="utf-8")
