with source as (

    select * from {{ source('corpus', 'chunk') }}

),

renamed as (

    select
        -- ids
        chunk_id,
        document_id,
        source as source_name,

        -- strings
        content_hash,
        heading,
        chunker,

        -- numerics
        ordinal,
        start_char,
        end_char

    from source

)

select * from renamed
