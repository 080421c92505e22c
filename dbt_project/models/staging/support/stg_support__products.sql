with source as (

    select * from {{ source('raw', 'products') }}

),

renamed as (

    select
        -- ids
        sku,

        -- strings
        name,
        category,
        status,

        -- numerics
        price_gbp,
        warranty_months,

        -- times
        launched_on

    from source

)

select * from renamed
