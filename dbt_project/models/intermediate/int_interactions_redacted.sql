{{ config(event_time='effective_at') }}

with interactions as (

    select * from {{ ref('stg_feedback__interactions') }}

),

redacted as (

    select
        interactions.*,
        prompt.message_count,
        prompt.messages as redacted_prompt,
        {{ redacted('interactions.output') }} as completion,
        coalesce(interactions.output, '') <> '' as has_completion,
        retrieval.items as retrieved_items,
        coalesce(retrieval.sources, '{}') as sources
    from interactions
    left join lateral (
        select
            count(*) as message_count,
            -- A prompt with one text that has no redaction is no prompt.
            case
                when bool_and(message.content is not null)
                    then jsonb_agg(
                        jsonb_build_object('role', message.role, 'content', message.content)
                        order by message.ordinal
                    )
            end as messages
        from {{ ref('stg_feedback__messages') }} as message
        where message.interaction_id = interactions.interaction_id
    ) as prompt on true
    left join lateral (
        select
            jsonb_agg(
                jsonb_strip_nulls(
                    jsonb_build_object(
                        'document_id', item.document_id,
                        'chunk_id', item.chunk_id,
                        'source', item.source_name,
                        'rank', item.rank,
                        'score', item.score
                    )
                ) order by item.ordinal
            ) as items,
            array_agg(distinct item.source_name order by item.source_name) as sources
        from {{ ref('stg_feedback__retrievals') }} as item
        where item.interaction_id = interactions.interaction_id
    ) as retrieval on true

),

final as (

    select
        -- ids
        interaction_id,
        session_id,
        user_ref,
        trace_id,
        span_id,
        response_id,

        -- strings
        app,
        provider,
        model,
        prompt_name,
        prompt_version,
        prompt_hash,
        app_release,
        config_hash,
        variant,

        -- texts
        redacted_prompt as prompt,
        {{ sha256_of('redacted_prompt::text') }} as prompt_sha256,
        completion,
        {{ sha256_of('completion') }} as completion_sha256,

        -- retrieval
        retrieved_items as retrieved,
        sources,

        -- numerics
        message_count,
        input_tokens,
        output_tokens,
        cost_usd,
        latency_ms,

        -- booleans
        has_completion,
        (message_count = 0 or redacted_prompt is not null)
        and (not has_completion or completion is not null) as is_redacted,
        train_ok,

        -- times
        occurred_at,
        received_at,
        effective_at,
        day

    from redacted

)

select * from final
