with source as (

    select * from {{ source('quarantine', 'file') }}

),

renamed as (

    select
        -- ids
        id as quarantine_id,
        source as source_name,
        file,
        sha256,
        run_id,

        -- strings
        rule,
        reason,
        remedy,
        lake_uri,

        -- numerics
        size as size_bytes,

        -- booleans
        resolved_at is null as is_open,

        -- times
        first_seen as first_seen_at,
        last_seen as last_seen_at,
        resolved_at

    from source

)

select * from renamed
