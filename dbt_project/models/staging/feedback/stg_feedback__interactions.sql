{{ config(event_time='effective_at') }}

with source as (

    select * from {{ source('feedback', 'interaction') }}

),

renamed as (

    select
        -- ids
        interaction_id,
        session_id,
        user_ref,

        -- other names it goes by; senders write them, so only what feedback could name is taken
        substring(metadata ->> 'trace_id' from '^[0-9a-f]{32}$') as trace_id,
        substring(metadata ->> 'span_id' from '^[0-9a-f]{16}$') as span_id,
        substring(metadata ->> 'response_id' from '^[^@]{1,200}$') as response_id,

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
        output,

        -- documents
        messages,
        retrieved,

        -- numerics
        input_tokens,
        output_tokens,
        cost_usd,
        latency_ms,

        -- booleans
        train_ok,

        -- times
        occurred_at,
        received_at,
        {{ effective_time() }} as effective_at,
        {{ utc_day(effective_time()) }} as day

    from source

)

select * from renamed
