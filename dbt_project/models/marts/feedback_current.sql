{{
    config(
        materialized='incremental',
        incremental_strategy='microbatch',
        event_time='first_event_at',
        batch_size='day',
        begin=var('start_date'),
        unique_key='feedback_id',
        on_schema_change='append_new_columns',
        indexes=[
            {'columns': ['feedback_id'], 'unique': true},
            {'columns': ['interaction_id']},
            {'columns': ['first_event_at']},
            {'columns': ['event_days'], 'type': 'gin'}
        ],
        tags=['daily']
    )
}}

-- A batch folds every feedback item that its day can have changed, each from all of its events, of any day:
-- refs are cut to the batch by dbt, .render() lifts that.
with interactions_of_batch as (

    select interaction_id from {{ ref('fct_interactions') }}

),

touched as (

    select feedback_id from {{ ref('fct_feedback') }}

    union

    -- An interaction that arrives after its feedback ends the orphanhood.
    select events.feedback_id
    from interactions_of_batch
    inner join {{ ref('stg_feedback__events').render() }} as events
        on interactions_of_batch.interaction_id = events.interaction_id

    {% if is_incremental() %}
        union

        -- Items that had an event on this day, which an erasure may have taken.
        select feedback_id
        from {{ this }}
        where event_days @> array['{{ model.batch.event_time_start }}'::date]
    {% endif %}

),

events as (

    select *
    from {{ ref('stg_feedback__events').render() }}
    where feedback_id in (select touched.feedback_id from touched)

),

ranked as (

    select
        *,
        row_number() over (
            partition by feedback_id
            order by revision desc, effective_at desc, event_id desc
        ) as place
    from events

),

logs as (

    select
        feedback_id,
        count(*) as event_count,
        array_agg(event_id order by revision, effective_at, event_id) as event_ids,
        array_agg(distinct day) as event_days,
        min(effective_at) as first_event_at,
        max(effective_at) as last_event_at
    from events
    group by feedback_id

),

folded as (

    select
        -- ids
        ranked.feedback_id,
        ranked.event_id as last_event_id,
        logs.event_ids,
        ranked.interaction_id,
        ranked.session_id,
        ranked.trace_id,
        ranked.span_id,

        -- strings
        ranked.op as last_op,
        ranked.kind,
        ranked.name,
        ranked.label,
        ranked.reasons,
        ranked.annotator_kind,
        ranked.author_role,
        ranked.author_ref,
        ranked.identifier,
        ranked.scope,

        -- texts
        {{ redacted('ranked.explanation') }} as explanation,
        {{ redacted('ranked.correction') }} as correction,

        -- numerics
        ranked.revision,
        ranked.score,
        logs.event_count,

        -- booleans
        ranked.op = 'retract' as is_retracted,
        ranked.interaction_id is not null and interactions.interaction_id is null as is_orphan,
        coalesce(ranked.correction, '') <> '' as has_correction,

        -- times
        logs.first_event_at,
        logs.last_event_at,
        {{ utc_day('logs.first_event_at') }} as created_day,
        logs.event_days

    from ranked
    inner join logs
        on ranked.feedback_id = logs.feedback_id
    left join {{ ref('stg_feedback__interactions').render() }} as interactions
        on ranked.interaction_id = interactions.interaction_id
    where ranked.place = 1

)

select * from folded
