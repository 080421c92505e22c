{{ config(event_time='effective_at') }}

with events as (

    select * from {{ ref('stg_feedback__events') }}

),

redacted as (

    select
        -- ids
        event_id,
        feedback_id,
        interaction_id,
        session_id,
        trace_id,
        span_id,

        -- strings
        app,
        op,
        kind,
        name,
        label,
        reasons,
        annotator_kind,
        author_role,
        author_ref,
        identifier,
        scope,

        -- texts
        {{ redacted('explanation') }} as explanation,
        {{ redacted('correction') }} as correction,

        -- numerics
        revision,
        score,

        -- booleans
        coalesce(correction, '') <> '' as has_correction,

        -- times
        occurred_at,
        received_at,
        effective_at,
        day

    from events

)

select * from redacted
