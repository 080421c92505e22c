with source as (

    select * from {{ source('raw', 'tickets') }}

),

renamed as (

    select
        -- ids
        ticket_id,
        product_sku as sku,

        -- strings
        customer,
        channel,
        priority,
        status,
        subject,
        body,

        -- booleans
        status <> 'closed' as is_open,

        -- times
        opened_at,
        closed_at,
        {{ utc_day('opened_at') }} as opened_day

    from source

)

select * from renamed
