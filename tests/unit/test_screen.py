"""Lines for a person: whole on a terminal, and never read as markup."""

import io

from orchestration.screen import Screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_is_written_at_once_while_something_is_live() -> None:
    stream = Terminal()
    screen = Screen(stream)
    with screen.live("working"):
        screen.line("raw/notes", "0.1 s")
    lines = [line for line in stream.getvalue().split("\n") if "0.1 s" in line]
    assert lines and all("raw/notes" in line for line in lines)


def test_text_is_not_markup() -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    screen.title("Alpha [/red] title")
    screen.line("[bold]name", "[/x] :smile:")
    screen.progress("step", "[/y]")
    for part in ("Alpha [/red] title", "[bold]name", "[/x] :smile:", "[/y]"):
        assert part in stream.getvalue()
