{{ config(tags=['daily']) }}

{%- set dimensions = ['day', 'app', 'model', 'prompt_version'] %}

with interactions as (

    select
        interaction_id,
        day,
        app,
        coalesce(model, '(unknown)') as model,
        coalesce(prompt_version, '(unknown)') as prompt_version,
        input_tokens,
        output_tokens,
        cost_usd,
        latency_ms
    from {{ ref('fct_interactions') }}

),

feedback as (

    select
        feedback.interaction_id,
        feedback.created_day as day,
        coalesce(interactions.app, '(unknown)') as app,
        coalesce(interactions.model, '(unknown)') as model,
        coalesce(interactions.prompt_version, '(unknown)') as prompt_version,
        feedback.author_ref,
        feedback.kind,
        feedback.label,
        feedback.score,
        feedback.kind in ('thumb', 'rating')
        and feedback.score is not null
        and feedback.annotator_kind = 'HUMAN' as is_rating
    from {{ ref('feedback_current') }} as feedback
    left join interactions
        on feedback.interaction_id = interactions.interaction_id
    where not feedback.is_retracted

),

answered as (

    select
        interaction_id,
        bool_or(is_rating) as is_rated,
        bool_or(kind = 'implicit' and label = 'shown') as is_shown
    from feedback
    where interaction_id is not null
    group by interaction_id

),

usage_by_group as (

    select
        {{ dimensions | join(', ') }},
        count(*) as interactions,
        count(*) filter (where answered.is_rated) as rated_interactions,
        count(*) filter (where answered.is_shown) as shown_interactions,
        count(*) filter (where answered.is_shown and answered.is_rated) as shown_and_rated_interactions,
        sum(interactions.input_tokens)::bigint as input_tokens,
        sum(interactions.output_tokens)::bigint as output_tokens,
        sum(interactions.cost_usd) as cost_usd,
        percentile_cont(0.5) within group (order by interactions.latency_ms) as latency_p50_ms,
        percentile_cont(0.95) within group (order by interactions.latency_ms) as latency_p95_ms
    from interactions
    left join answered
        on interactions.interaction_id = answered.interaction_id
    group by {{ dimensions | join(', ') }}

),

feedback_by_group as (

    select
        {{ dimensions | join(', ') }},
        count(*) filter (where kind = 'implicit' and label = 'shown') as shown,
        count(*) filter (where kind = 'implicit' and label = 'accepted') as accepted,
        count(*) filter (where is_rating and kind = 'thumb' and score >= 0.5) as thumbs_up,
        count(*) filter (where is_rating and kind = 'thumb' and score < 0.5) as thumbs_down,
        count(*) filter (where is_rating and kind = 'rating') as ratings,
        count(*) filter (where is_rating) as n_rated,
        count(*) filter (where is_rating and score >= 0.5) as n_approved,
        count(distinct author_ref) filter (where is_rating) as raters,
        count(*) filter (where kind = 'correction') as corrections,
        count(*) filter (where kind = 'flag') as flags
    from feedback
    group by {{ dimensions | join(', ') }}

),

joined as (

    select
        {{ dimensions | join(', ') }},
        coalesce(usage_by_group.interactions, 0) as interactions,
        coalesce(feedback_by_group.shown, 0) as shown,
        coalesce(feedback_by_group.accepted, 0) as accepted,
        coalesce(feedback_by_group.thumbs_up, 0) as thumbs_up,
        coalesce(feedback_by_group.thumbs_down, 0) as thumbs_down,
        coalesce(feedback_by_group.ratings, 0) as ratings,
        coalesce(feedback_by_group.n_rated, 0) as n_rated,
        coalesce(feedback_by_group.n_approved, 0) as n_approved,
        coalesce(feedback_by_group.raters, 0) as raters,
        coalesce(feedback_by_group.corrections, 0) as corrections,
        coalesce(feedback_by_group.flags, 0) as flags,
        case when usage_by_group.shown_interactions > 0 then 'shown' else 'interactions' end as response_basis,
        coalesce(
            nullif(usage_by_group.shown_interactions, 0), usage_by_group.interactions, 0
        ) as response_n,
        case
            when usage_by_group.shown_interactions > 0 then usage_by_group.shown_and_rated_interactions
            else coalesce(usage_by_group.rated_interactions, 0)
        end as responses,
        usage_by_group.input_tokens,
        usage_by_group.output_tokens,
        usage_by_group.cost_usd,
        usage_by_group.latency_p50_ms,
        usage_by_group.latency_p95_ms
    from usage_by_group
    full join feedback_by_group using ({{ dimensions | join(', ') }})

),

final as (

    select
        -- grain
        {{ dimensions | join(',\n        ') }},

        -- use
        interactions,
        input_tokens,
        output_tokens,
        cost_usd,
        latency_p50_ms,
        latency_p95_ms,

        -- feedback
        shown,
        accepted,
        thumbs_up,
        thumbs_down,
        ratings,
        corrections,
        flags,

        -- approval
        n_rated,
        n_approved,
        raters,
        {{ rate('n_approved', 'n_rated') }} as approval_rate,
        {{ wilson_interval('n_approved', 'n_rated', 'low') }} as approval_low,
        {{ wilson_interval('n_approved', 'n_rated', 'high') }} as approval_high,
        case when n_rated >= {{ var('min_n') }} then 'ok' else 'not enough data' end as status,

        -- response
        response_basis,
        response_n,
        responses,
        {{ rate('responses', 'response_n') }} as response_rate

    from joined

)

select * from final
