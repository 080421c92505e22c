"""Lets ``python -m feedback`` run the command line; nothing else belongs here."""

from feedback.cli import app

if __name__ == "__main__":
    app(prog_name="python -m feedback")
