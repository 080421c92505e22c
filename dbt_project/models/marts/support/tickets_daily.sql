with tickets as (

    select * from {{ ref('stg_support__tickets') }}

),

products as (

    select * from {{ ref('stg_support__products') }}

),

daily as (

    select
        tickets.opened_day as day,
        coalesce(products.category, '(unknown)') as product_category,
        count(*) as opened,
        count(*) filter (where tickets.is_open) as still_open,
        count(*) filter (where tickets.priority = 'P1') as urgent,
        percentile_cont(0.5) within group (
            order by extract(epoch from tickets.closed_at - tickets.opened_at) / 3600
        ) as median_hours_to_close
    from tickets
    left join products on tickets.sku = products.sku
    group by tickets.opened_day, products.category

)

select * from daily
