with feedback as (

    -- What can teach: a person's thumb, rating or correction that still stands.
    select * from {{ ref('feedback_current') }}
    where
        not is_retracted
        and annotator_kind = 'HUMAN'
        and (
            (kind in ('thumb', 'rating') and score is not null)
            or (kind = 'correction' and has_correction)
        )

),

interactions as (

    select * from {{ ref('fct_interactions') }}

),

trainable as (

    select coalesce(array_agg(source_name), '{}') as sources
    from {{ ref('stg_registry__sources') }}
    where 'finetune' = any(allowed_uses)

),

signals as (

    select
        feedback.feedback_id::text as signal_id,
        feedback.interaction_id,
        feedback.event_ids::text[] as event_ids,
        feedback.kind,
        feedback.first_event_at as occurred_at,
        feedback.created_day as day,
        interactions.app,
        coalesce(interactions.session_id, feedback.session_id) as session_id,
        interactions.user_ref,
        feedback.author_ref,
        interactions.prompt,
        interactions.prompt_sha256,
        interactions.completion,
        interactions.completion_sha256,
        case when feedback.kind = 'correction' then feedback.correction end as correction,
        case when feedback.kind in ('thumb', 'rating') then feedback.score >= 0.5 end as is_positive,
        feedback.score,
        feedback.label,
        feedback.reasons,
        interactions.model,
        interactions.prompt_version,
        interactions.retrieved,
        coalesce(interactions.sources, '{}') as sources,
        case
            when interactions.interaction_id is null then 'no_interaction'
            when not interactions.train_ok then 'train_not_ok'
            when not interactions.sources <@ trainable.sources then 'source_not_allowed'
            when
                not interactions.is_redacted or (feedback.kind = 'correction' and feedback.correction is null)
                then 'not_redacted'
            when
                feedback.kind = 'correction'
                and {{ squeezed('feedback.correction') }} = {{ squeezed('interactions.completion') }}
                then 'unchanged_correction'
        end as exclusion_reason
    from feedback
    cross join trainable
    left join interactions
        on feedback.interaction_id = interactions.interaction_id
    -- Without a prompt, or without an answer to judge, there is nothing to learn.
    where
        interactions.interaction_id is null
        or (interactions.message_count > 0 and (feedback.kind = 'correction' or interactions.has_completion))

)

select * from signals
