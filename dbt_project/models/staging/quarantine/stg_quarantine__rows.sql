with source as (

    select * from {{ source('quarantine', 'row') }}

),

renamed as (

    select
        -- ids
        id as quarantine_id,
        source as source_name,
        file,
        row_number as file_row,
        content_hash,
        run_id,

        -- strings
        rule,
        reason,
        remedy,
        contract_version,

        -- booleans
        resolved_at is null as is_open,

        -- times
        first_seen as first_seen_at,
        last_seen as last_seen_at,
        resolved_at

    from source

)

select * from renamed
