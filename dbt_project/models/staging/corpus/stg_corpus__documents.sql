with source as (

    select * from {{ source('corpus', 'document') }}

),

renamed as (

    select
        -- ids
        document_id,
        source as source_name,

        -- strings
        path,
        title,
        media_type,
        text_sha256,
        parser,
        policy as redaction_policy,

        -- times
        updated_at

    from source

)

select * from renamed
