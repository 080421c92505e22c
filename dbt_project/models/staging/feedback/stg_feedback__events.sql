{{ config(event_time='effective_at') }}

with source as (

    select * from {{ source('feedback', 'feedback_event') }}

),

renamed as (

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
        explanation,
        correction,
        reasons,
        annotator_kind,
        author_role,
        author_ref,
        identifier,
        scope,

        -- numerics
        revision,
        score,

        -- times
        occurred_at,
        received_at,
        {{ effective_time() }} as effective_at,
        {{ utc_day(effective_time()) }} as day

    from source

)

select * from renamed
