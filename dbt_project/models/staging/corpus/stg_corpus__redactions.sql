with source as (

    select * from {{ source('corpus', 'redaction') }}

),

renamed as (

    select
        text_sha256,
        redacted,
        findings
    from source
    where policy = '{{ var("redaction_policy") }}'

)

select * from renamed
