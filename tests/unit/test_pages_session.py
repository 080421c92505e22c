"""Who somebody is on the pages, by name and for the audit."""

from feedback.access import Caller
from feedback.ids import uuid7
from feedback.pages.session import Person


def person(holder: str | None) -> Person:
    # Keys of the same moment: the first digits of their ids are the time.
    return Person(Caller(str(uuid7(1_800_000_000_000)), "support", ("review",), holder), "page-1")


def test_keys_without_a_holder_are_different_people() -> None:
    one, other = person(None), person(None)
    assert one.reviewer.name != other.reviewer.name
    assert person("Ada").reviewer.name == person("Ada").reviewer.name == "Ada"


def test_the_audit_names_person_and_key() -> None:
    for holder, name in (("Ada", "Ada"), (None, "support")):
        signed_in = person(holder)
        assert signed_in.actor == f"{name} (key {signed_in.caller.key_id})"
