"""Review: who judges which answer, once each, and what becomes of the judgement.

Belongs here: queues and their rules, leases, submissions, adjudication, agreement; functions over a pool whose
sessions act as ``datamoat_review``. Does not belong here: pages and HTTP (``feedback.pages``).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reviewer:
    """Who reviews: the key that signed in, and the person it was made for (its holder).

    The name is the identity: somebody who signs in with a second key is still the same reviewer.
    """

    key_id: str
    app: str
    name: str
