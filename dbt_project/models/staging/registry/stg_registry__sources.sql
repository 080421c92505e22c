with source as (

    select * from {{ source('registry', 'source') }}

),

renamed as (

    select
        -- ids
        source as source_name,

        -- strings
        version as contract_version,
        owner,
        description,
        kind,
        provenance,
        allowed_uses,
        location,
        contract_sha256,

        -- numerics
        freshness_days,

        -- booleans
        pii as has_pii,

        -- times
        updated_at

    from source

)

select * from renamed
