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

    select
        interaction_id,
        response_id,
        trace_id,
        span_id
    from {{ ref('fct_interactions') }}

),

touched as (

    select feedback_id from {{ ref('fct_feedback') }}

    union

    -- An interaction that arrives after its feedback ends the orphanhood, by whichever of its names.
    select events.feedback_id
    from interactions_of_batch
    inner join {{ ref('stg_feedback__events').render() }} as events
        on interactions_of_batch.interaction_id = events.interaction_id

    union

    select events.feedback_id
    from interactions_of_batch
    inner join {{ ref('stg_feedback__events').render() }} as events
        on interactions_of_batch.response_id = events.interaction_id

    union

    select events.feedback_id
    from interactions_of_batch
    inner join {{ ref('fct_feedback').render() }} as events
        on
            interactions_of_batch.trace_id = events.trace_id
            and interactions_of_batch.span_id = events.span_id

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

standing as (

    select
        ranked.*,
        interactions.interaction_id as seen_id
    from ranked
    left join {{ ref('stg_feedback__interactions').render() }} as interactions
        on ranked.interaction_id = interactions.interaction_id
    where ranked.place = 1

),

-- What names no interaction by its id may name one of its app by the span that it is, or by the response.
orphans as (

    select
        feedback_id,
        app,
        interaction_id,
        trace_id,
        span_id
    from standing
    where seen_id is null and scope in ('interaction', 'span')

),

candidates as (

    select
        orphans.feedback_id,
        interactions.interaction_id,
        interactions.effective_at
    from orphans
    inner join {{ ref('fct_interactions').render() }} as interactions
        on
            orphans.trace_id = interactions.trace_id
            and orphans.span_id = interactions.span_id
            and orphans.app = interactions.app

    union all

    select
        orphans.feedback_id,
        interactions.interaction_id,
        interactions.effective_at
    from orphans
    inner join {{ ref('fct_interactions').render() }} as interactions
        on
            orphans.interaction_id = interactions.response_id
            and orphans.app = interactions.app

),

resolved as (

    select distinct on (feedback_id)
        feedback_id,
        interaction_id
    from candidates
    order by feedback_id, effective_at, interaction_id

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
        standing.feedback_id,
        standing.event_id as last_event_id,
        logs.event_ids,
        coalesce(resolved.interaction_id, standing.interaction_id) as interaction_id,
        standing.session_id,
        standing.trace_id,
        standing.span_id,

        -- strings
        standing.op as last_op,
        standing.kind,
        standing.name,
        standing.label,
        standing.reasons,
        standing.annotator_kind,
        standing.author_role,
        standing.author_ref,
        standing.identifier,
        standing.scope,

        -- texts
        {{ redacted('standing.explanation') }} as explanation,
        {{ redacted('standing.correction') }} as correction,

        -- numerics
        standing.revision,
        standing.score,
        logs.event_count,

        -- booleans
        standing.op = 'retract' as is_retracted,
        standing.interaction_id is not null
        and standing.seen_id is null
        and resolved.interaction_id is null as is_orphan,
        coalesce(standing.correction, '') <> '' as has_correction,

        -- times
        logs.first_event_at,
        logs.last_event_at,
        {{ utc_day('logs.first_event_at') }} as created_day,
        logs.event_days

    from standing
    inner join logs
        on standing.feedback_id = logs.feedback_id
    left join resolved
        on standing.feedback_id = resolved.feedback_id

)

select * from folded
