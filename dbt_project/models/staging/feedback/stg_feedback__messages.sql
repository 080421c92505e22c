{{ config(event_time='effective_at') }}

with source as (

    select
        interaction_id,
        {{ effective_time() }} as effective_at,
        case when jsonb_typeof(messages) = 'array' then messages else '[]'::jsonb end as messages
    from {{ source('feedback', 'interaction') }}

),

unpacked as (

    select
        source.interaction_id,
        source.effective_at,
        element.place - 1 as ordinal,
        element.item ->> 'role' as role,
        coalesce(element.item ->> 'content', '') as raw_content
    from source
    cross join lateral jsonb_array_elements(source.messages) with ordinality as element (item, place)

),

redacted as (

    select
        interaction_id,
        ordinal,
        role,
        {{ redacted('raw_content') }} as content,
        effective_at
    from unpacked

)

select * from redacted
