{{ config(event_time='effective_at') }}

with source as (

    select
        interaction_id,
        {{ effective_time() }} as effective_at,
        case when jsonb_typeof(retrieved) = 'array' then retrieved else '[]'::jsonb end as retrieved
    from {{ source('feedback', 'interaction') }}

),

-- Named keys only: whatever else an app puts into an item may hold unredacted text.
unpacked as (

    select
        source.interaction_id,
        source.effective_at,
        element.place - 1 as ordinal,
        element.item ->> 'document_id' as document_id,
        element.item ->> 'chunk_id' as chunk_id,
        element.item ->> 'source' as named_source,
        case when jsonb_typeof(element.item -> 'rank') = 'number' then element.item -> 'rank' end as rank,
        case when jsonb_typeof(element.item -> 'score') = 'number' then element.item -> 'score' end as score
    from source
    cross join lateral jsonb_array_elements(source.retrieved) with ordinality as element (item, place)

),

renamed as (

    select
        interaction_id,
        ordinal,
        document_id,
        chunk_id,
        coalesce(named_source, nullif(split_part(document_id, '/', 1), ''), '(unknown)') as source_name,
        rank::numeric as rank,
        score::double precision as score,
        effective_at
    from unpacked

)

select * from renamed
