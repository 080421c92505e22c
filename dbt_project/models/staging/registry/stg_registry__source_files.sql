with source as (

    select * from {{ source('registry', 'source_file') }}

),

renamed as (

    select
        -- ids
        source as source_name,
        file,

        -- strings
        sha256,
        contract_sha256,

        -- numerics
        size as size_bytes,
        rows_in,
        rows_landed,
        rows_refused,

        -- times
        landed_at

    from source

)

select * from renamed
