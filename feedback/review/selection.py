"""The SQL that chooses interactions for review.

Belongs here: what each rule looks for, the sample, the statement that queues. Does not belong here: running any of it
(``feedback.review.rules``).

Each rule looks at the interactions within the queue's window and at the state that all events on them fold to; what was
retracted and what reviewers said is left out.

- ``low_score``: the lowest standing thumb or rating of a person is below ``below``.
- ``judge_disagreement``: people's mean score and the mean score of judges (annotator_kind LLM or CODE) lie at least
  ``at_least`` apart, or they put different labels on a category of the same name, which counts as 1.
- ``high_edit_distance``: less than ``retained_below`` of the words of the output are left in a correction, or in the
  final text of an ``edited`` or ``accepted`` event (its ``value``, or ``value.text``); or such an event says itself how
  much is left (``value.retained``, as the browser element sends it instead of the text). Word order does not count
  and words that came on top do not either (SQL function ``feedback.retained``).
- ``rare_cluster``: an interaction belongs to the cluster of what was retrieved first for it (its document, else its
  chunk), else of its prompt's name; a cluster is rare when it holds less than ``share_below`` of all interactions that
  belong to any within the queue's window.
- ``flag``: somebody, or a judge, has flagged it.

A sample, of a rule's hits as of all interactions, is drawn by a hash of queue and interaction id: it is the same each
time, and a higher rate keeps what a lower one chose.
"""

from collections.abc import Mapping

EVERYTHING = "0"
"""The xact_id before all others."""

_SCOPE = """
    recent AS NOT MATERIALIZED (
        SELECT interaction_id, output, retrieved, prompt_name
        FROM feedback.interaction
        WHERE app = $1 AND least(occurred_at, received_at) >= now() - make_interval(days => $2)
    ),
    scope AS MATERIALIZED (
        SELECT interaction_id, output FROM recent
        WHERE $3::text = '0' OR interaction_id IN (
            SELECT interaction_id FROM feedback.interaction WHERE xact_id >= $3::text::xid8
            UNION
            SELECT interaction_id FROM feedback.feedback_event WHERE xact_id >= $3::text::xid8
        )
    )
"""

# The fold is the one of feedback.current(), so that the API, the rules and the marts agree.
_STANDING = """
    standing AS MATERIALIZED (
        SELECT c.interaction_id, c.kind, c.name, c.score, c.label, c.annotator_kind = 'HUMAN' AS human,
            coalesce(
                c.correction,
                CASE WHEN c.kind = 'implicit' AND c.label IN ('edited', 'accepted') THEN
                    CASE jsonb_typeof(c.value) WHEN 'string' THEN c.value #>> '{}'
                        WHEN 'object' THEN c.value ->> 'text' END
                END
            ) AS final_text,
            CASE WHEN c.kind = 'implicit' AND c.label IN ('edited', 'accepted')
                AND jsonb_typeof(c.value -> 'retained') = 'number' THEN (c.value ->> 'retained')::double precision
            END AS retained
        FROM feedback.current(ARRAY(
            SELECT DISTINCT e.feedback_id
            FROM feedback.feedback_event AS e JOIN scope ON scope.interaction_id = e.interaction_id
        )) AS c
        JOIN scope ON scope.interaction_id = c.interaction_id
        WHERE c.op <> 'retract' AND coalesce(c.author_role, '') NOT IN ('reviewer', 'adjudicator')
    )
"""

# Each ends with hit(interaction_id, detail): what the rule found, and the figures that go into the item's "why".
_HITS: Mapping[str, list[str]] = {
    "control": ["hit AS (SELECT interaction_id, '{}'::jsonb AS detail FROM scope)"],
    "low_score": [
        _STANDING,
        """
        hit AS (
            SELECT interaction_id, jsonb_build_object('score', min(score)) AS detail
            FROM standing
            WHERE human AND kind IN ('thumb', 'rating')
            GROUP BY interaction_id
            HAVING min(score) < $6
        )
        """,
    ],
    "judge_disagreement": [
        _STANDING,
        """
        gap AS (
            SELECT interaction_id,
                abs(avg(score) FILTER (WHERE human) - avg(score) FILTER (WHERE NOT human)) AS gap
            FROM standing
            WHERE kind IN ('thumb', 'rating')
            GROUP BY interaction_id
            UNION ALL
            SELECT DISTINCT person.interaction_id, 1.0
            FROM standing AS person
            JOIN standing AS judge ON judge.interaction_id = person.interaction_id AND judge.name = person.name
            WHERE person.human AND NOT judge.human AND person.kind = 'category' AND judge.kind = 'category'
                AND person.label <> judge.label
        ),
        hit AS (
            SELECT interaction_id, jsonb_build_object('gap', max(gap)) AS detail
            FROM gap
            GROUP BY interaction_id
            HAVING max(gap) >= $6
        )
        """,
    ],
    "high_edit_distance": [
        _STANDING,
        """
        hit AS (
            SELECT interaction_id, jsonb_build_object('retained', min(retained)) AS detail
            FROM (
                SELECT standing.interaction_id,
                    coalesce(standing.retained, feedback.retained(scope.output, standing.final_text)) AS retained
                FROM standing JOIN scope ON scope.interaction_id = standing.interaction_id
            ) AS kept
            GROUP BY interaction_id
            HAVING min(retained) < $6
        )
        """,
    ],
    "rare_cluster": [
        """
        clustered AS (
            SELECT interaction_id, coalesce(
                'document ' || (first ->> 'document_id'), 'chunk ' || (first ->> 'chunk_id'), 'prompt ' || prompt_name
            ) AS cluster
            FROM recent
            LEFT JOIN LATERAL (
                SELECT passage AS first
                FROM jsonb_array_elements(recent.retrieved) WITH ORDINALITY AS p (passage, place)
                ORDER BY (passage ->> 'rank')::bigint NULLS LAST, place
                LIMIT 1
            ) AS f ON true
        ),
        sized AS (
            SELECT cluster, count(*)::double precision / sum(count(*)) OVER () AS share
            FROM clustered
            WHERE cluster IS NOT NULL
            GROUP BY cluster
        ),
        hit AS (
            SELECT scope.interaction_id,
                jsonb_build_object('cluster', left(sized.cluster, 200), 'share', sized.share) AS detail
            FROM sized
            JOIN clustered ON clustered.cluster = sized.cluster
            JOIN scope ON scope.interaction_id = clustered.interaction_id
            WHERE sized.share < $6
        )
        """,
    ],
    "flag": [
        _STANDING,
        """
        hit AS (
            SELECT interaction_id, jsonb_build_object('labels', jsonb_agg(DISTINCT label)) AS detail
            FROM standing
            WHERE kind = 'flag'
            GROUP BY interaction_id
        )
        """,
    ],
}

_CHOSEN = """
    chosen AS (
        SELECT interaction_id, detail || jsonb_build_object('rule', $7::text) AS detail
        FROM hit
        -- $6 is never null; not every rule has a threshold, and every parameter must be used.
        WHERE feedback.draw($4, interaction_id) < $5 AND $6::double precision IS NOT NULL
    )
"""

# An item that is there already gets one more reason, while it is open. One that belongs to the control sample keeps
# the control sample's place in line, whatever the rules say: else those that look bad would be judged first.
# $8 to $11: queue, rule (null for the control sample), priority, overlap.
QUEUE = """,
    put AS (
        INSERT INTO feedback.review_item AS i (queue_id, interaction_id, why, control, priority)
        SELECT $8, interaction_id,
            jsonb_build_array(detail || CASE WHEN $9::uuid IS NULL THEN '{}' ELSE jsonb_build_object('rule_id', $9) END),
            $9 IS NULL, $10
        FROM chosen
        WHERE NOT EXISTS (
            SELECT FROM feedback.review_item AS old
            WHERE old.queue_id = $8 AND old.interaction_id = chosen.interaction_id
                AND (old.why @> jsonb_build_array(jsonb_build_object('rule_id', $9))
                    OR ($9 IS NULL AND old.control) OR ($9 IS NOT NULL AND old.state <> 'open'))
        )
        ON CONFLICT (queue_id, interaction_id) DO UPDATE SET
            why = i.why || excluded.why,
            control = i.control OR excluded.control,
            priority = CASE WHEN i.control OR excluded.control THEN 0 ELSE greatest(i.priority, excluded.priority) END
        RETURNING item_id, xmax = 0 AS new
    ),
    slots AS (
        INSERT INTO feedback.review_slot (item_id, slot)
        SELECT item_id, generate_series(1, $11) FROM put WHERE new
    ),
    history AS (
        INSERT INTO feedback.review_event (item_id, act) SELECT item_id, 'queued' FROM put WHERE new
    )
    SELECT count(*) AS chosen, count(*) FILTER (WHERE new) AS queued FROM put
"""


def chosen(kind: str) -> str:
    """The start of a statement with the CTEs ``scope`` (interactions that are looked at) and ``chosen``, of a rule or of
    the ``control`` sample. $1 to $7: app, days to look back, xact_id to start from (or EVERYTHING), salt of the sample, its
    rate, the rule's threshold, its kind.
    """
    return "WITH " + ",\n".join([_SCOPE, *_HITS[kind], _CHOSEN])
