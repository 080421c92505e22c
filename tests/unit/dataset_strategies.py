"""Generated signals for the dataset tests: few texts and people, so that they collide often."""

from datetime import UTC, datetime, timedelta

from hypothesis import strategies as st

from assets.datasets.canonical import digest
from assets.datasets.signals import Message, Signal

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
TEXTS = ("yes", "Yes ", "no", "maybe", "it depends on the plan", "")
QUESTIONS = ("how?", "How? ", "why?", "where is the invoice of last month", "ping")


def signal(
    signal_id: str,
    *,
    kind: str = "thumb",
    question: str | None = "how?",
    completion: str | None = "yes",
    correction: str | None = None,
    up: bool | None = True,
    author: str | None = None,
    session: str | None = None,
    interaction: str | None = None,
    minute: int = 0,
    context: tuple[str, ...] = (),
    sources: tuple[str, ...] = ("handbook",),
    excluded: str | None = None,
) -> Signal:
    """A signal with defaults that make one usable vote; each signal is its own author and session."""
    prompt: tuple[Message, ...] = ()
    if question is not None:
        prompt = (Message(role="user", content=question),)
    return Signal(
        signal_id=signal_id,
        interaction_id=interaction or f"i-{signal_id}",
        event_ids=(f"e-{signal_id}",),
        kind=kind,
        occurred_at=EPOCH + timedelta(minutes=minute),
        session_id=session or f"chat-{signal_id}",
        user_ref=None,
        author_ref=author or f"author-{signal_id}",
        prompt=prompt,
        prompt_sha256=digest(prompt),
        completion=completion,
        correction=correction,
        is_positive=None if kind == "correction" else up,
        context=context,
        sources=sources,
        exclusion_reason=excluded,
    )


def correction(signal_id: str, text: str, **rest: object) -> Signal:
    """A correction of the answer to `text`."""
    return signal(signal_id, kind="correction", correction=text, **rest)  # type: ignore[arg-type]


@st.composite
def signal_lists(draw: st.DrawFn, max_size: int = 25) -> list[Signal]:
    """Up to `max_size` signals of every kind, usable or not, with unique ids."""
    size = draw(st.integers(0, max_size))
    made = []
    for number in range(size):
        kind = draw(st.sampled_from(("thumb", "thumb", "rating", "correction", "flag")))
        made.append(
            signal(
                f"s{number:02d}",
                kind=kind,
                question=draw(st.sampled_from((*QUESTIONS, None))),
                completion=draw(st.sampled_from((*TEXTS, None))),
                correction=draw(st.sampled_from((*TEXTS, None))) if kind == "correction" else None,
                up=draw(st.sampled_from((True, True, False, False, None))),
                author=draw(st.sampled_from(("ann", "bob", "cem", "dee"))),
                session=draw(st.sampled_from(("c1", "c2", "c3", None))),
                minute=draw(st.integers(0, 5)),
                context=draw(st.sampled_from(((), ("k1",), ("k1", "k2")))),
                sources=draw(st.sampled_from(((), ("handbook",), ("tickets", "handbook")))),
                excluded=draw(st.sampled_from((None, None, None, "train_not_ok", "source_not_allowed"))),
            )
        )
    return made
